"""The tokenizer of a run on instruction data, with the chat template that the run needs."""

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from apex_composer.data_prep.errors import SettingsError
from apex_composer.data_prep.tokens.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TULU = "tulu"
# That of Tulu (arXiv 2306.04751), for base models. Its markers are ordinary text, so that the
# vocabulary and the embeddings stay as they are, and an answer ends with the tokenizer's own eos,
# which ends a generation; nothing follows it, so that the loader has no eos to add. ChatML, which
# llm-foundry takes where there is no template, has neither: <|im_end|> is text, and never eos.
TULU_TEMPLATE = (
    "{% for message in messages %}"
    "{% if not loop.first %}{{ '\n' }}{% endif %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n<|assistant|>\n' }}{% endif %}"
)
# Chats are tokenised without what a tokenizer puts before a text: the template has to say it.
BOS = "{{ bos_token }}"
# llm-foundry fills them with the day of training.
DATES = ("date_string", "strftime_now")
# What every template must take.
QUESTION_AND_ANSWER = [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b."}]


def save_chat_tokenizer(name: str, template: str | None, folder: Path) -> None:
    """Save a tokenizer with a chat template, for the workers and for `tokenizer.name` of a YAML.

    Args:
        name: local folder, or a name on the hub.
        template: as `InstructOptions.chat_template`.
        folder: created.

    Raises:
        SettingsError: there is no such tokenizer or template, it writes the day into examples, or
            it takes no question with its answer.
    """
    load_tokenizer(name, folder)
    tokenizer = _load(str(folder))
    if template is not None or tokenizer.chat_template is None:
        tokenizer.chat_template = _read_template(template or TULU, tokenizer)
        tokenizer.save_pretrained(folder)
    _check_template(tokenizer, name)


def _check_template(tokenizer: "PreTrainedTokenizerBase", name: str) -> None:
    try:
        tokenizer.apply_chat_template(QUESTION_AND_ANSWER, tokenize=False)
    except Exception as error:  # of the template's syntax, or what it raises itself
        raise SettingsError(
            f"The chat template of tokenizer={name!r} cannot write a question with its answer: "
            f"{error}. Give chat_template='tulu' (--chat-template), or a file."
        ) from error
    dated = [date for date in DATES if date in tokenizer.get_chat_template()]
    if dated:
        raise SettingsError(
            f"The chat template of tokenizer={name!r} uses {dated[0]}: it writes the day of "
            "training into every example, so that the same data is other data tomorrow. Give "
            "chat_template='tulu' (--chat-template), or a file with a template without it."
        )


def _read_template(template: str, tokenizer: "PreTrainedTokenizerBase") -> str:
    if template != TULU:
        try:
            return Path(template).read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise SettingsError(
                f"chat_template={template!r} cannot be read ({error}). Give {TULU!r} or a file."
            ) from error
    has_bos = tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    return BOS + TULU_TEMPLATE if has_bos else TULU_TEMPLATE


def read_chat_tokenizer(folder: str) -> "PreTrainedTokenizerBase":
    """Load a saved tokenizer as llm-foundry does; once in a process, until its files change."""
    changes = tuple(sorted((path.name, path.stat().st_mtime_ns) for path in Path(folder).iterdir()))
    return _load_once(folder, changes)


@lru_cache(maxsize=1)
def _load_once(folder: str, changes: tuple[tuple[str, int], ...]) -> "PreTrainedTokenizerBase":
    del changes  # they tell a later call that the folder holds another tokenizer by now
    return _load(folder)


def _load(folder: str) -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer

    # Without a length: the loader asks for no warnings either.
    return AutoTokenizer.from_pretrained(folder, model_max_length=int(1e30))
