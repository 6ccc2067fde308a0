import pytest
from chats import CHATML, chat, tokenizer_folder
from transformers import AutoTokenizer

from apex_composer.data_prep.errors import SettingsError
from apex_composer.data_prep.instruct.chat_template import save_chat_tokenizer

CHAT = chat("a?", "b.", "c?", "d.", system="In short.")
TULU = (
    "<s><|system|>\nIn short.\n<|user|>\na?\n<|assistant|>\nb.</s>\n"
    "<|user|>\nc?\n<|assistant|>\nd.</s>"
)


def saved(folder, template=None, kind="prepend", own=None):
    save_chat_tokenizer(str(tokenizer_folder(kind, own)), template, folder)
    return AutoTokenizer.from_pretrained(folder)


def test_a_base_model_gets_tulus_template_and_no_new_token(tmp_path):
    tokenizer = saved(tmp_path)
    assert tokenizer.apply_chat_template(CHAT, tokenize=False) == TULU
    asked = tokenizer.apply_chat_template(CHAT[:2], tokenize=False, add_generation_prompt=True)
    assert TULU.startswith(asked) and asked.endswith("a?\n<|assistant|>\n")
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(tokenizer_folder("prepend")).vocab


def test_what_a_generation_sees_is_what_was_trained_on(tmp_path):
    # Of byte-level tokenizers, whose tokens do not depend on where llm-foundry cuts the text.
    from llmfoundry.data.finetuning.tasks import tokenize_formatted_example

    tokenizer = saved(tmp_path, kind="byte level")
    turns = tokenize_formatted_example({"messages": CHAT}, tokenizer)["turns"]
    trained = sum((turn["input_ids"] + turn["labels"] for turn in turns), [])
    assert tokenizer.apply_chat_template(CHAT) == trained
    assert trained[0] == tokenizer.bos_token_id and trained[-1] == tokenizer.eos_token_id


def test_bos_is_there_only_where_the_tokenizer_puts_it(tmp_path):
    base = AutoTokenizer.from_pretrained(tokenizer_folder("prepend"))
    base.backend_tokenizer.post_processor = type(base.backend_tokenizer.post_processor)(
        single="$A", special_tokens=[]
    )
    base.save_pretrained(tmp_path / "base")
    save_chat_tokenizer(str(tmp_path / "base"), None, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.apply_chat_template(CHAT, tokenize=False) == TULU.removeprefix("<s>")


def test_a_template_of_its_own_stays_unless_another_is_given(tmp_path):
    assert saved(tmp_path / "own", own=CHATML).chat_template == CHATML
    tulu = saved(tmp_path / "tulu", "tulu", own=CHATML)
    assert tulu.apply_chat_template(CHAT, tokenize=False) == TULU
    (tmp_path / "chatml.jinja").write_text(CHATML)
    given = saved(tmp_path / "given", str(tmp_path / "chatml.jinja"))
    assert given.chat_template == CHATML


def test_a_template_that_writes_the_day_is_refused(tmp_path):
    # Llama 3.1's; llm-foundry gives it the day of training.
    dated = "{% if not date_string is defined %}{% set date_string = '26 Jul 2024' %}{% endif %}"
    with pytest.raises(SettingsError, match="date_string.*day of training.*chat_template='tulu'"):
        saved(tmp_path / "out", own=dated + CHATML)
    saved(tmp_path / "tulu", "tulu", own=dated + CHATML)


def test_a_mark_of_byte_order_is_no_part_of_a_template(tmp_path):
    (tmp_path / "chatml.jinja").write_text("\ufeff" + CHATML)
    assert saved(tmp_path / "out", str(tmp_path / "chatml.jinja")).chat_template == CHATML


@pytest.mark.parametrize(
    ("template", "why"),
    [("{% for message in messages %}", "endfor"), ("{{ raise_exception('closed') }}", "closed")],
)
def test_a_template_that_can_write_no_example_is_refused_at_once(tmp_path, template, why):
    with pytest.raises(SettingsError, match=f"a question with its answer: .*{why}.*tulu"):
        saved(tmp_path / "out", own=template)


def test_a_template_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(SettingsError, match="chat_template='x.jinja' cannot be read.*'tulu'"):
        saved(tmp_path / "out", "x.jinja")
