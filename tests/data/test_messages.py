"""Messages: known roles, parts that are text, weights, JSON in text; what they hold beside that is refused by name."""

import json

import pytest

from pipeline.data.files import DataError
from pipeline.data.formats import PARSERS
from pipeline.data.messages import parse_messages

USER = {"role": "user", "content": "Hi?"}
BOT = {"role": "assistant", "content": "Yes."}


def read(*messages):
    return parse_messages("f: row 1", {"messages": list(messages)}, "messages")


@pytest.mark.parametrize(
    ("role", "means"),
    [
        ("developer", "system"), ("human", "user"), ("prompter", "user"), ("User", "user"), ("gpt", "assistant"),
        ("chatgpt", "assistant"), ("model", "assistant"), ("bot", "assistant"), ("ASSISTANT", "assistant"),
    ],
)  # fmt: skip
def test_roles(role, means):
    assert (
        read({"role": role, "content": "a"}) == read({"from": role, "value": "a"}) == [{"role": means, "content": "a"}]
    )


@pytest.mark.parametrize(
    ("messages", "means"),
    [
        ([{"role": "system", "content": ""}, USER], [USER]),
        ([{"role": "system"}, USER], [USER]),
        ([{**USER, "from": None, "value": None, "tool_calls": None, "name": ""}], [USER]),
        ([{"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i?"}]}], [USER]),
        ([{"human": "Hi?", "assistant": "Yes."}], [USER, BOT]),
        ([{"human": "Hi?", "assistant": None}], [USER]),
    ],
)
def test_forms_of_a_message(messages, means):
    assert read(*messages) == means


def test_a_list_that_is_json_in_text_is_read_and_one_that_python_printed_is_refused():
    talk = [USER, {"role": "assistant", "content": 'He said: "Yes", \u00e9.'}]
    for text in (json.dumps(talk), json.dumps(talk, indent=1)):
        assert parse_messages("f", {"messages": text}, "messages") == talk
    with pytest.raises(DataError, match=r"f: row 1: chosen: a list of messages as text that is not JSON.*json\.dumps"):
        PARSERS["pair"](("f: row 1", {"chosen": str(talk), "rejected": str([USER, BOT])}))
    numbers = {"prompt": "Which role?", "completion": '[{"value": 3}] and {"role": 1}'}  # an answer in JSON is text
    assert PARSERS["completion"](("f", numbers))["completion"] == numbers["completion"]


@pytest.mark.parametrize(
    ("message", "says"),
    [
        ({"role": "tool", "content": "3"}, "role: expected system, user or assistant, got 'tool'"),
        ({**BOT, "tool_calls": [{"name": "look"}]}, "tool_calls: it changes .*--columns tool_calls="),
        ({**BOT, "reasoning_content": "Hm."}, "reasoning_content: it changes"),
        ({**BOT, "thinking": "Hm."}, "thinking: it changes"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "part 1: expected a part of type text, got 'image_url'"),
        ({"role": "user", "content": ["Hi"]}, "part 1: expected a part of type text, got 'Hi'"),
        ({"role": "user", "content": []}, r"content: expected text, got \[\]"),
        ({**USER, "value": "Ho?"}, "value: expected the same as content"),
        ({**USER, "from": "gpt"}, "from: expected the same as role"),
    ],
)
def test_what_a_message_may_not_hold(message, says):
    with pytest.raises(DataError, match=r"f: row 1: messages, message 1: (content, )?" + says):
        read(message)


@pytest.mark.parametrize(
    ("weights", "every_turn"),
    [((None, None), True), ((1, 1), True), ((0, 1), [False, True]), ((1, 0), [True, False]), ((1, 0.0), [True, False])],
)
def test_weights_say_which_answers_are_trained(weights, every_turn):
    messages = [USER, {**BOT, "weight": weights[0]}, {**USER, "weight": 0}, {**BOT, "weight": weights[1]}]
    for value in (messages, json.dumps(messages)):
        assert PARSERS["completion"](("f", {"messages": value}))["every_turn"] == every_turn


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"messages": [USER, {**BOT, "weight": 0}]}, "messages: every answer has weight 0"),
        ({"messages": [USER, {**BOT, "weight": 0.5}]}, "messages, message 2: weight: expected 0 or 1, got 0.5"),
        ({"prompt": [USER], "completion": [{**BOT, "weight": 0}]}, "completion: .* weight 0"),
    ],
)
def test_a_weight_that_trains_nothing_or_half_is_refused(fields, says):
    with pytest.raises(DataError, match="f: row 1: " + says):
        PARSERS["completion"](("f: row 1", fields))
