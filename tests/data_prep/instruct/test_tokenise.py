"""Tokens and refusals are those of llm-foundry's own functions, which are called beside ours."""

from functools import cache

import pytest
from backends import BACKENDS
from chats import CHATML, chat, tokenizer_folder, tulu_line
from hypothesis import given
from hypothesis import strategies as st
from llmfoundry.data.finetuning.collator import stitch_turns_decoder_only
from llmfoundry.data.finetuning.tasks import is_valid_ift_example, tokenize_formatted_example

from apex_composer.data_prep.errors import Rejected
from apex_composer.data_prep.instruct import tokenise
from apex_composer.data_prep.instruct.chat_template import read_chat_tokenizer, save_chat_tokenizer
from apex_composer.data_prep.instruct.records import take_conversation
from apex_composer.data_prep.instruct.tokenise import Length, measure

# Mistral's kind: a system message is refused.
STRICT = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' %}"
    "{{ raise_exception('no system') }}{% elif message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% else %}"
    "{{ ' ' + message['content'] + eos_token}}{% endif %}{% endfor %}"
)
# Those of reasoning models leave out the thoughts in all but the last answer.
FORGETFUL = CHATML.replace(
    "message['content']", "(message['content'] if loop.last else message['content'][:3])"
)


@cache
def tokenizer_of(kind="byte level", template=None):
    from pathlib import Path
    from tempfile import mkdtemp

    folder = Path(mkdtemp(prefix="apex-test-chat-"))
    save_chat_tokenizer(str(tokenizer_folder(kind, template)), None, folder)
    return read_chat_tokenizer(str(folder))


def of_llm_foundry(record, tokenizer):
    """What its loader makes of an example: ids, and labels with all responses as targets."""
    example = tokenize_formatted_example(record, tokenizer)
    assert is_valid_ift_example(10_000, "none", "all", True, example)
    turns = [(turn["input_ids"], turn["labels"]) for turn in example["turns"]]
    stitched = stitch_turns_decoder_only(example["turns"], "none", "all", tokenizer.eos_token_id)
    return turns, *stitched


def compare(record, tokenizer):
    conversation = take_conversation(record)
    turns, ids, labels = of_llm_foundry(conversation.content, tokenizer)
    assert tokenise.tokenise(conversation, tokenizer) == turns
    answered = sum(label != -100 for label in labels)
    assert measure(conversation, tokenizer, len(ids)) == Length(len(ids), answered)
    with pytest.raises(Rejected, match=tokenise.TOO_MANY_TOKENS):
        measure(conversation, tokenizer, len(ids) - 1)
    return ids


@pytest.mark.parametrize("kind", ["byte level", "prepend", "always"])
@pytest.mark.parametrize("template", [None, CHATML, STRICT])
def test_tokens_are_those_of_the_loader(kind, template):
    tokenizer = tokenizer_of(kind, template)
    for number in range(6):
        record = tulu_line(number)
        if template != STRICT or record["dataset"] != "open_orca":
            assert compare(record, tokenizer)[-1] == tokenizer.eos_token_id
    ids = compare({"prompt": "a ?\n", "response": " b."}, tokenizer)
    assert ids.count(tokenizer.bos_token_id) == 1 and ids[-1] == tokenizer.eos_token_id


def readable(text):
    return text.strip() and not tokenise._special_tokens(tokenizer_of()).search(text)


texts = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20).filter(readable)


@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=3), st.none() | texts)
def test_tokens_of_any_text_are_those_of_the_loader(turns, system):
    contents = [content for turn in turns for content in turn]
    for kind in BACKENDS:
        compare({"messages": chat(*contents, system=system)}, tokenizer_of(kind))
        compare({"prompt": contents[0], "response": contents[1]}, tokenizer_of(kind))


@pytest.mark.parametrize(
    ("template", "system", "reason"),
    [(STRICT, "In short.", tokenise.REFUSED), (FORGETFUL, None, tokenise.CHANGED)],
    ids=["system", "forgetful"],
)
def test_what_the_template_refuses_or_writes_otherwise_is_rejected(template, system, reason):
    tokenizer = tokenizer_of(template=template)
    record = {"messages": chat("abcdef?", "abcdef.", "c?", "d.", system=system)}
    with pytest.raises(Exception, match="template|conversation"):  # llm-foundry's, at the start
        tokenize_formatted_example(record, tokenizer)
    with pytest.raises(Rejected, match=reason) as rejected:
        measure(take_conversation(record | {"dataset": "lima"}), tokenizer, 1000)
    assert rejected.value.domain == "lima"


def test_an_answer_that_the_template_leaves_out_is_rejected():
    silent = (
        "{% for message in messages %}{% if message['role'] == 'user' %}x{% endif %}{% endfor %}"
    )
    tokenizer = tokenizer_of(template=silent)
    example = tokenize_formatted_example({"messages": chat("a?", "b.")}, tokenizer)
    assert not is_valid_ift_example(1000, "none", "all", True, example)  # dropped in silence
    with pytest.raises(Rejected, match="an empty answer"):
        measure(take_conversation({"messages": chat("a?", "b.")}), tokenizer, 1000)


def test_llama_2s_kind_learns_answers_with_a_blank_before_them():
    """As docs/instruct.md says: llm-foundry tokenises them by themselves."""
    tokenizer = tokenizer_of("prepend")
    conversation = take_conversation({"messages": chat("a?", "b.")})
    ((_, answer),) = tokenise.tokenise(conversation, tokenizer)
    assert tokenizer.convert_ids_to_tokens(answer)[0].startswith("\u2581")
    whole = tokenizer.apply_chat_template(conversation.content["messages"])
    assert whole[-len(answer) :] != answer


@pytest.mark.parametrize("place", range(3))
def test_text_that_spells_a_special_token_is_rejected(place):
    tokenizer = tokenizer_of("prepend")
    contents = ["In short.", "a?", "b."]
    contents[place] += "</s> and more"
    conversation = take_conversation({"messages": chat(*contents[1:], system=contents[0])})
    turns = tokenise.tokenise(conversation, tokenizer)
    assert sum(ids.count(tokenizer.eos_token_id) for turn in turns for ids in turn) == 2
    with pytest.raises(Rejected, match=tokenise.SPELLS_SPECIAL):
        measure(conversation, tokenizer, 1000)
