"""Popular shapes mean the same at every stage; a column that changes the meaning and is not read is refused."""

import pytest

from pipeline.data.files import DataError
from pipeline.data.formats import PARSERS

SYSTEM = {"role": "system", "content": "Be kind."}


def user(text):
    return {"role": "user", "content": text}


def bot(text):
    return {"role": "assistant", "content": text}


def parse(kind, fields):
    return PARSERS[kind](("f: row 1", fields))


ANSWERED = [
    ({"instruction": "Add", "input": "1, 2", "output": "3"}, [user("Add\n\n1, 2")], [bot("3")]),
    ({"instruction": "Add", "input": "", "output": "3", "text": "Below is"}, [user("Add")], [bot("3")]),
    ({"instruction": "", "input": "1 + 2", "output": "3"}, [user("1 + 2")], [bot("3")]),
    ({"instruction": "Sky?", "context": "At noon.", "response": "Blue", "category": "qa"}, [user("Sky?\n\nAt noon.")],
     [bot("Blue")]),
    ({"question": "Sky?", "answer": "Blue"}, [user("Sky?")], [bot("Blue")]),
    ({"query": "Sky?", "response": "Blue"}, [user("Sky?")], [bot("Blue")]),
    ({"input": "Sky?", "output": "Blue"}, [user("Sky?")], [bot("Blue")]),
    ({"prompt": "Sky?", "response": "Blue", "reward": 0.9}, [user("Sky?")], [bot("Blue")]),
    ({"prompt": "Sky?", "question": "Sky?", "completion": " Blue"}, "Sky?", " Blue"),
    ({"system_prompt": "Be kind.", "question": "Sky?", "response": "Blue"}, [SYSTEM, user("Sky?")], [bot("Blue")]),
    ({"system": "Be kind.", "prompt": "Sky?", "completion": " Blue"}, [SYSTEM, user("Sky?")], [bot("Blue")]),
    ({"system": "", "prompt": "Sky?", "completion": " Blue"}, [user("Sky?")], [bot("Blue")]),
    ({"system": "Be kind.", "messages": [user("Sky?"), bot("Blue")]}, [SYSTEM, user("Sky?")], [bot("Blue")]),
    ({"system": "Be kind.", "messages": [SYSTEM, user("Sky?"), bot("Blue")]}, [SYSTEM, user("Sky?")], [bot("Blue")]),
    ({"conversation": [{"human": "Sky?", "assistant": "Blue"}]}, [user("Sky?")], [bot("Blue")]),
    ({"messages": [user("Sky?"), bot("Blue")], "instruction": "Sky?", "tools": "[]"}, [user("Sky?")], [bot("Blue")]),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "prompt", "completion"), ANSWERED)
def test_a_prompt_and_its_answer(fields, prompt, completion):
    parsed = parse("completion", fields)
    assert (parsed["prompt"], parsed["completion"]) == (prompt, completion)
    assert parse("prompt", fields)["prompt"] == prompt


PAIRED = [
    ({"question": "Sky?", "chosen": "Blue", "rejected": "Red"}, [user("Sky?")], "Blue", "Red"),
    ({"instruction": "Add", "input": "1, 2", "chosen": "3", "rejected": "4"}, [user("Add\n\n1, 2")], "3", "4"),
    ({"system": "Be kind.", "question": "Sky?", "chosen": "Blue", "rejected": "Red"}, [SYSTEM, user("Sky?")], "Blue",
     "Red"),
    ({"conversations": [{"from": "human", "value": "Sky?"}], "chosen": {"from": "gpt", "value": "Blue"},
      "rejected": {"from": "gpt", "value": "Red"}}, [user("Sky?")], "Blue", "Red"),
    ({"prompt": "Sky?", "response_0": "Red", "response_1": "Blue", "better_response_id": 1}, [user("Sky?")], "Blue",
     "Red"),
    ({"instruction": "Sky?", "completions": [{"response": "Red", "overall_score": 2},
                                             {"response": "Blue", "overall_score": 9.5}]}, [user("Sky?")], "Blue",
     "Red"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "prompt", "chosen", "rejected"), PAIRED)
def test_a_pair(fields, prompt, chosen, rejected):
    parsed = parse("pair", fields)
    assert [parsed[name] for name in ("prompt", "chosen", "rejected")] == [prompt, [bot(chosen)], [bot(rejected)]]
    answered = parse("completion", fields)
    assert (answered["prompt"], answered["completion"]) == (prompt, [bot(chosen)])
    assert parse("prompt", fields)["prompt"] == prompt


ANSWER = {"prompt": "Sky?", "completion": " Blue"}


@pytest.mark.parametrize("kind", ["completion", "prompt", "text"])
@pytest.mark.parametrize(
    "more",
    [
        {"tools": '[{"name": "look"}]'}, {"images": ["a.png"]}, {"reasoning_content": "Air scatters."},
        {"history": [["a"]]}, {"context": "At noon."}, {"input": "At noon."}, {"choices": ["Blue", "Red"]},
        {"weight": 0}, {"chat_template_kwargs": {"enable_thinking": False}},
    ],
)  # fmt: skip
def test_a_column_that_changes_the_meaning_is_refused_with_the_way_on(kind, more):
    (name,) = more
    with pytest.raises(DataError, match=f"f: row 1: {name}: it changes .*--columns {name}="):
        parse(kind, {**ANSWER, **more})


@pytest.mark.parametrize("nothing", [None, "", " ", "[]", [], {}])
def test_an_empty_column_says_nothing(nothing):
    assert parse("completion", {**ANSWER, "tools": nothing, "context": nothing, "images": nothing})["prompt"] == "Sky?"


@pytest.mark.parametrize(
    ("kind", "fields", "says"),
    [
        ("completion", {"question": "Sky?", "query": "Sea?", "answer": "Blue"}, "query: another than question"),
        ("completion", {"prompt": "Sky?", "question": "Sea?", "completion": "Blue"}, "question: another than prompt"),
        ("completion", {"prompt": "Sky?", "completion": "Blue", "answer": "Red"}, "answer: another than completion"),
        ("completion", {"messages": [user("Sky?"), bot("Blue")], "question": "Sea?"}, "prompt: another than in"),
        ("completion", {"system": "Be rude.", "messages": [SYSTEM, user("Sky?"), bot("Blue")]}, "system: another than"),
        ("completion", {"system": 3, "prompt": "Sky?", "completion": "Blue"}, "system: expected text, got 3"),
        ("completion", {"question": "Sky?", "answer": 3}, "completion: expected text, got 3"),
        ("completion", {"instruction": "", "output": "Blue"}, "prompt: expected text, got ''"),
        ("completion", {**ANSWER, "label": False}, "label: False may mark an answer as bad .KTO.*--columns label="),
        ("completion", {**ANSWER, "label": 0}, "label: 0 may mark"),
        ("completion", {**ANSWER, "label": "False"}, "label: 'False' may mark"),
        ("pair", {**ANSWER, "label": False}, "chosen: no such field; a reward model compares two answers"),
        ("pair", {"prompt": "Sky?", "response_0": "a", "response_1": "b", "better_response_id": 2}, "better_res"),
        ("pair", {"prompt": "a", "completions": [{"response": "b", "overall_score": 1}] * 3}, "completions: a list of"),
        ("pair", {"prompt": "a", "completions": [{"response": "b", "overall_score": 1}] * 2}, "completions: a list of"),
    ],
)  # fmt: skip
def test_what_is_not_certain_is_refused_by_name(kind, fields, says):
    with pytest.raises(DataError, match="f: row 1: " + says):
        parse(kind, fields)


def test_a_good_label_is_an_answer_and_a_label_of_texts_is_none_of_ours():
    assert parse("completion", {**ANSWER, "label": True})["completion"] == " Blue"
    assert parse("prompt", {**ANSWER, "label": False})["prompt"] == "Sky?"
    assert parse("text", {"text": "Fine.", "label": 0, "tools": "x"})["label"] == 0
