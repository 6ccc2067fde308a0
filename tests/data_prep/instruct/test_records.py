import json

import pytest
from chats import chat

from apex_composer.data_prep.errors import Rejected
from apex_composer.data_prep.instruct import records
from apex_composer.data_prep.instruct.records import take_conversation


def message(role, content, **more):
    return {"role": role, "content": content} | more


QUESTION, ANSWER = message("user", "a?"), message("assistant", "b.")

REJECTED = [
    ({"text": "no chat"}, records.NO_MESSAGES),
    ({"messages": "a? b."}, records.NO_MESSAGES),
    ({"messages": None, "prompt": None}, records.NO_MESSAGES),
    ({"prompt": ["a?"], "response": "b."}, records.NO_MESSAGES),
    ({"prompt": "a?", "response": 2}, records.NO_MESSAGES),
    ({"prompt": "a?", "response": "b.", "completion": "c."}, records.NO_MESSAGES),
    ({"prompt": "a?"}, records.NO_ANSWER),
    ({"prompt": "a?", "response": None}, records.NO_ANSWER),
    ({"prompt": "a?", "response": " \n"}, records.EMPTY_ANSWER),
    ({"prompt": "", "response": "b."}, records.EMPTY_PROMPT),
    ({"messages": []}, records.NO_ANSWER),
    ({"messages": [QUESTION]}, records.NO_ANSWER),
    ({"messages": [QUESTION, QUESTION]}, records.NO_ANSWER),
    ({"messages": chat("a?", "")}, records.EMPTY_ANSWER),
    ({"messages": chat("a?", " ", "c?", "d.")}, records.EMPTY_ANSWER),
    ({"messages": chat("\n", "b.")}, records.EMPTY_PROMPT),
    ({"messages": [ANSWER]}, records.ROLE_ORDER),
    ({"messages": [ANSWER, QUESTION]}, records.ROLE_ORDER),
    ({"messages": chat("a?", "b.", "c?")}, records.ROLE_ORDER),
    ({"messages": [QUESTION, ANSWER, ANSWER]}, records.ROLE_ORDER),
    ({"messages": [QUESTION, QUESTION, ANSWER]}, records.ROLE_ORDER),
    ({"messages": [QUESTION, message("system", "c"), ANSWER]}, records.ROLE_ORDER),
    ({"messages": [message("system", "c"), ANSWER]}, records.ROLE_ORDER),
    ({"messages": [message("system", "c")] * 2 + [QUESTION, ANSWER]}, records.ROLE_ORDER),
    ({"messages": [message("human", "a?"), ANSWER]}, records.UNKNOWN_ROLE),
    ({"messages": [QUESTION, ANSWER, message("tool", "1"), ANSWER]}, records.UNKNOWN_ROLE),
    ({"messages": [message(None, "a?"), ANSWER]}, records.NO_TEXT_CONTENT),
    ({"messages": [message(["user"], "a?"), ANSWER]}, records.UNKNOWN_ROLE),
    ({"messages": ["a?", "b."]}, records.NO_TEXT_CONTENT),
    ({"messages": [QUESTION, message("assistant", None)]}, records.NO_TEXT_CONTENT),
    ({"messages": [QUESTION, message("assistant", ["b."])]}, records.NO_TEXT_CONTENT),
    ({"messages": [QUESTION, ANSWER | {"tool_calls": ["f"]}]}, records.NO_TEXT_CONTENT),
    ({"messages": [{"from": "human", "value": "a?"}, ANSWER]}, records.NO_TEXT_CONTENT),
    (json.loads('{"messages": [{"role": "user", "content": "\\ud83d"}]}'), records.NO_ANSWER),
    (json.loads('{"prompt": "\\ud83d", "response": "b."}'), records.INVALID_UTF8),
]


@pytest.mark.parametrize(("record", "reason"), REJECTED)
def test_a_record_that_is_no_conversation_is_rejected_with_its_source(record, reason):
    with pytest.raises(Rejected, match=f"^{reason}$") as rejected:
        take_conversation(record | {"dataset": "lima"})
    assert rejected.value.domain == "lima"


def test_what_llm_foundry_reads_is_taken_and_nothing_else():
    messages = chat("a?", "b.", "c?", "d.", system="")
    padded = [one | {"name": None} for one in messages]  # as `datasets` fills columns up
    found = take_conversation({"id": 7, "dataset": "lima", "messages": padded, "prompt": "a?"})
    assert found == (records.CHAT, {"messages": messages}, "lima")
    assert json.loads(found.line) == {"messages": messages}
    found = take_conversation({"prompt": " a?", "completion": "b. ", "dataset": 3})
    expected = {"prompt": " a?", "response": "b. "}
    assert found == (records.PROMPT_RESPONSE, expected, records.UNNAMED)
