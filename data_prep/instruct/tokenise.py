"""The tokens of a conversation, as llm-foundry's finetuning loader makes them.

llm-foundry itself would bring torch and a trainer into every worker; the tests compare with it.
"""

import re
from collections.abc import Iterator
from functools import cache
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

from apex_composer.data_prep.errors import Rejected
from apex_composer.data_prep.instruct.records import CHAT, EMPTY_ANSWER, EMPTY_PROMPT, Conversation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPELLS_SPECIAL = "text that spells a special token"
REFUSED = "the chat template refuses it"
CHANGED = "the chat template writes earlier turns otherwise later on"
TOO_MANY_TOKENS = "longer than the sequence length"

Turns = list[tuple[list[int], list[int]]]


class Length(NamedTuple):
    """Tokens of an example: all, and those that are trained with `target_responses: all`."""

    tokens: int
    response_tokens: int


def measure(conversation: Conversation, tokenizer: "PreTrainedTokenizerBase", limit: int) -> Length:
    """Count the tokens that the loader will make of a conversation.

    Args:
        conversation: what `take_conversation` took.
        tokenizer: with a chat template.
        limit: tokens at most, `max_seq_len`.

    Raises:
        Rejected: the loader would refuse, drop or cut it, or it spells a special token.
    """
    try:
        if any(_special_tokens(tokenizer).search(text) for text in conversation.texts):
            raise Rejected(SPELLS_SPECIAL)
        turns = tokenise(conversation, tokenizer)
        for prompt, response in turns:
            if not prompt or not response:
                raise Rejected(EMPTY_ANSWER if prompt else EMPTY_PROMPT)
        # The collator ends the last answer with eos where it does not.
        added = int(turns[-1][1][-1] != tokenizer.eos_token_id)
        tokens = sum(map(len, chain.from_iterable(turns))) + added
        if tokens > limit:
            raise Rejected(TOO_MANY_TOKENS)
    except Rejected as rejected:
        raise Rejected(str(rejected), conversation.source) from None
    return Length(tokens, sum(len(response) for _, response in turns) + added)


def tokenise(conversation: Conversation, tokenizer: "PreTrainedTokenizerBase") -> Turns:
    """The tokens of every prompt and response, without the eos that the collator may add.

    Raises:
        Rejected: the chat template does not take the conversation.
    """
    if conversation.kind == CHAT:
        texts = list(chain.from_iterable(slice_turns(conversation.content["messages"], tokenizer)))
        ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
        return list(zip(ids[::2], ids[1::2], strict=True))
    prompt, response = tokenizer(list(conversation.content.values()))["input_ids"]
    if prompt[:1] == response[:1] == [tokenizer.bos_token_id]:
        response = response[1:]
    return [(prompt, response)]


def slice_turns(
    messages: list[dict[str, str]], tokenizer: "PreTrainedTokenizerBase"
) -> Iterator[tuple[str, str]]:
    """Yield the templated prompt and response of every turn.

    Args:
        messages: of a conversation whose last one is an answer.

    Raises:
        Rejected: the template refuses them, or writes an earlier turn otherwise than it did.
    """
    before = ""
    for place, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        try:
            asked = tokenizer.apply_chat_template(
                messages[:place], tokenize=False, add_generation_prompt=True
            )
            answered = tokenizer.apply_chat_template(messages[: place + 1], tokenize=False)
        except Exception as error:  # templates raise what they like
            raise Rejected(REFUSED) from error
        if not asked.startswith(before) or not answered.startswith(asked):
            raise Rejected(CHANGED)
        yield asked[len(before) :], answered[len(asked) :]
        before = answered


@cache
def _special_tokens(tokenizer: "PreTrainedTokenizerBase") -> re.Pattern[str]:
    """What the tokenizer would read as a special token, also where somebody wrote it as text."""
    added = tokenizer.added_tokens_decoder.values()
    names = {token.content for token in added if token.special} | {*tokenizer.all_special_tokens}
    return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))))
