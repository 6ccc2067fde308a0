"""Take the conversation out of one record, or say why it is rejected."""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from apex_composer.data_prep.errors import Rejected
from apex_composer.data_prep.read.records import INVALID_UTF8

# Why a record is rejected; that of a line that is no record stands in read/records.py.
NO_MESSAGES = "no messages, and no prompt with a response"
NO_TEXT_CONTENT = "a message that is not {role, content} with a text"
UNKNOWN_ROLE = "a role other than system, user and assistant"
NO_ANSWER = "no answer"
EMPTY_ANSWER = "an empty answer"
EMPTY_PROMPT = "an empty prompt"
ROLE_ORDER = "roles out of order"

ROLES = ("system", "user", "assistant")
TURN = ("user", "assistant")
RESPONSES = ("response", "completion")
CHAT, PROMPT_RESPONSE = "messages", "prompt and response"
# Source of an example that names none.
UNNAMED = "unnamed"


class Conversation(NamedTuple):
    """What one record says.

    Args:
        kind: CHAT, or PROMPT_RESPONSE.
        content: what is written of the record: {"messages"}, or {"prompt", "response"}. The loader
            refuses any further field.
        source: the set that it was taken from, Tulu's `dataset`.
    """

    kind: str
    content: dict[str, Any]
    source: str

    @property
    def texts(self) -> list[str]:
        """All that somebody has written."""
        if self.kind == CHAT:
            return [message["content"] for message in self.content["messages"]]
        return list(self.content.values())

    @property
    def line(self) -> str:
        """The line of the output; the same conversation always is the same line."""
        return json.dumps(self.content, ensure_ascii=False)


def take_conversation(record: Mapping[str, Any]) -> Conversation:
    """Take the conversation of a record, in one of the two forms that llm-foundry reads.

    Args:
        record: {"messages": [{"role", "content"}, ...]}, or {"prompt", "response"} (or
            "completion"); its field `dataset` names its source, all others are left out.

    Raises:
        Rejected: it is none, or one that llm-foundry would refuse, drop, or train without answer.
    """
    source = record.get("dataset")
    source = source if isinstance(source, str) and source else UNNAMED
    source = source.encode("utf-8", "replace").decode()  # it is shown, and names no token
    try:
        if isinstance(record.get("messages"), list):
            messages = [_take_message(message) for message in record["messages"]]
            _check_roles([message["role"] for message in messages])
            kind, content = CHAT, {"messages": messages}
            asked, answered = messages, [m for m in messages if m["role"] == "assistant"]
            prompts = [m["content"] for m in asked if m["role"] == "user"]
            answers = [m["content"] for m in answered]
        else:
            prompt, answer = _take_pair(record)
            kind, content = PROMPT_RESPONSE, {"prompt": prompt, "response": answer}
            prompts, answers = [prompt], [answer]
        for texts, reason in ((answers, EMPTY_ANSWER), (prompts, EMPTY_PROMPT)):
            if not all(text.strip() for text in texts):
                raise Rejected(reason)
        conversation = Conversation(kind, content, source)
        conversation.line.encode("utf-8")
    except UnicodeEncodeError:  # JSON may escape half of a surrogate pair
        raise Rejected(INVALID_UTF8, source) from None
    except Rejected as rejected:
        raise Rejected(str(rejected), source) from None
    return conversation


def _take_message(message: Any) -> dict[str, str]:
    """A message; fields of no value, which converters leave behind, are none."""
    if not isinstance(message, dict):
        raise Rejected(NO_TEXT_CONTENT)
    message = {name: value for name, value in message.items() if value is not None}
    if message.keys() != {"role", "content"} or not isinstance(message["content"], str):
        raise Rejected(NO_TEXT_CONTENT)
    return {"role": message["role"], "content": message["content"]}


def _check_roles(roles: list[Any]) -> None:
    """After an optional system message users and assistants take turns; an answer is the last."""
    if any(role not in ROLES for role in roles):
        raise Rejected(UNKNOWN_ROLE)
    if "assistant" not in roles:
        raise Rejected(NO_ANSWER)
    turns = roles[1:] if roles[0] == "system" else roles
    if turns != [*TURN] * (len(turns) // 2):
        raise Rejected(ROLE_ORDER)


def _take_pair(record: Mapping[str, Any]) -> tuple[str, str]:
    given = [record[name] for name in RESPONSES if record.get(name) is not None]
    if not isinstance(record.get("prompt"), str):
        raise Rejected(NO_MESSAGES)
    if not given:
        raise Rejected(NO_ANSWER)
    if len(given) > 1 or not isinstance(given[0], str):
        raise Rejected(NO_MESSAGES)
    return record["prompt"], given[0]
