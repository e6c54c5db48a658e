"""What each stage reads from a row, what is refused in it, and where an error says it is; expected values by hand."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.data.formats import PARSERS, display_text, format_transcript, read_rows
from pipeline.data.sources import DataError

USER = {"role": "user", "content": "Hi?"}
BOT = {"role": "assistant", "content": "Yes."}
SYSTEM = {"role": "system", "content": "Be kind."}
OTHER = {"role": "assistant", "content": "No."}
HH = "Human: Hi?\n\nAssistant: Yes."


def parse(kind, fields):
    return PARSERS[kind](("f: row 1", fields))


@pytest.mark.parametrize(
    ("fields", "prompt", "completion"),
    [
        ({"prompt": "a", "completion": " b"}, "a", " b"),
        ({"prompt": [USER], "completion": [BOT]}, [USER], [BOT]),
        ({"messages": [SYSTEM, USER, BOT, USER, OTHER]}, [SYSTEM, USER, BOT, USER], [OTHER]),
        ({"conversations": [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Yes."}]}, [USER], [BOT]),
        ({"prompt": "Human: Hi?\n\nAssistant:", "completion": " Yes."}, [USER], [BOT]),
        ({"prompt": "Human: Hi?", "completion": "Human: Yes."}, [USER], [{**BOT, "content": "Human: Yes."}]),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "a", "b"),
        ({"chosen": HH, "rejected": "\n\nHuman: Hi?\n\nAssistant: No."}, [USER], [BOT]),
        ({"chosen": [USER, BOT], "rejected": [USER, OTHER]}, [USER], [BOT]),
    ],
)
def test_completions(fields, prompt, completion):
    parsed = parse("completion", fields)
    assert (parsed["prompt"], parsed["completion"]) == (prompt, completion)
    assert parsed.get("every_turn", False) == bool({"messages", "conversations"} & fields.keys())


@pytest.mark.parametrize(
    ("fields", "prompt", "chosen", "rejected", "margin"),
    [
        ({"chosen": "a b", "rejected": "a c"}, "", "a b", "a c", 0.0),
        ({"chosen": "a", "rejected": "c", "prompt": None, "margin": 2}, "", "a", "c", 2.0),
        ({"chosen": "a", "rejected": "c", "margin": "1.5"}, "", "a", "c", 1.5),
        ({"prompt": "p", "chosen": "a", "rejected": "c"}, "p", "a", "c", 0.0),
        ({"chosen": HH, "rejected": "Human: Hi?\n\nAssistant: No."}, [USER], [BOT], [OTHER], 0.0),
        ({"prompt": HH + "\n\nHuman: Hi?", "chosen": "a ", "rejected": "b"}, [USER, BOT, USER],
         [{"role": "assistant", "content": "a"}], [{"role": "assistant", "content": "b"}], 0.0),
        ({"prompt": [SYSTEM, USER], "chosen": [BOT], "rejected": [OTHER]}, [SYSTEM, USER], [BOT], [OTHER], 0.0),
        ({"chosen": [SYSTEM, USER, BOT], "rejected": [SYSTEM, USER, OTHER]}, [SYSTEM, USER], [BOT], [OTHER], 0.0),
    ],
)  # fmt: skip
def test_pairs(fields, prompt, chosen, rejected, margin):
    parsed = parse("pair", fields)
    assert [parsed[name] for name in ("prompt", "chosen", "rejected", "margin")] == [prompt, chosen, rejected, margin]


@pytest.mark.parametrize(
    ("fields", "prompt"),
    [
        ({"prompt": "a", "other": 3}, "a"),
        ({"prompt": [USER]}, [USER]),
        ({"prompt": "Human: Hi?\n\nAssistant:"}, [USER]),
        ({"messages": [USER, BOT, USER, OTHER]}, [USER, BOT, USER]),
        ({"chosen": HH, "rejected": "Human: Hi?\n\nAssistant: No."}, [USER]),
    ],
)
def test_prompts(fields, prompt):
    assert parse("prompt", fields)["prompt"] == prompt


def test_texts_are_the_field_or_the_rows_texts_joined():
    assert parse("text", {"text": "Human: a", "key": 1}) == {"text": "Human: a", "key": 1}
    assert parse("text", {"prompt": "a", "completion": " b"}) == {"text": "a b"}
    assert parse("text", {"messages": [SYSTEM, USER, BOT]}) == {"text": "Be kind.\n\nHuman: Hi?\n\nAssistant: Yes."}
    assert format_transcript([USER, BOT]) == HH
    assert (display_text("a"), display_text([USER, BOT, USER])) == ("a", "Hi?")


def test_other_fields_are_kept_and_the_row_is_not_changed():
    fields = {"conversations": [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Yes."}], "source": "x"}
    before = json.dumps(fields)
    assert parse("completion", fields)["source"] == "x"
    assert json.dumps(fields) == before


WRONG = [
    ("completion", {"prompt": "a"}, "completion: no such field .it has prompt.; expected text"),
    ("completion", {}, "prompt: no such field .it has none."),
    ("completion", {"prompt": "a", "completion": None}, "completion: expected text, got null"),
    ("completion", {"prompt": "a", "completion": 3}, "completion: expected text, got 3"),
    ("completion", {"prompt": "a", "completion": " \n"}, r"completion: expected text, got ' \\n'"),
    ("completion", {"prompt": "", "completion": "a"}, "prompt: expected text, got ''"),
    ("completion", {"prompt": "a", "completion": "\ud800"}, "completion: broken encoding"),
    ("completion", {"prompt": "a", "completion": [BOT]}, "completion: expected the type of prompt, text, got mess"),
    ("completion", {"prompt": [USER], "completion": "a"}, "completion: expected the type of prompt, messages"),
    ("completion", {"prompt": [USER], "completion": [BOT, USER]}, "expected one assistant message, got assist"),
    ("completion", {"prompt": [USER, BOT], "completion": [BOT]}, "prompt: roles are user, assistant; .*user last"),
    ("completion", {"messages": []}, "messages: expected a list of messages, got .."),
    ("completion", {"messages": "a"}, "messages: expected a list of messages, got 'a'"),
    ("completion", {"messages": [USER]}, "messages: roles are user; .*assistant last"),
    ("completion", {"messages": [BOT, USER, BOT]}, "messages: roles are assistant, user, assistant; expected user and"),
    ("completion", {"messages": [USER, USER, BOT]}, "messages: roles are user, user, assistant"),
    ("completion", {"messages": [USER, SYSTEM, BOT]}, "messages: roles are user, system, assistant"),
    ("completion", {"messages": [USER, {"role": "robot", "content": "a"}]}, "message 2: role: expected system"),
    ("completion", {"messages": [USER, {"role": "assistant"}]}, "message 2: content: no such field"),
    ("completion", {"messages": [USER, {"role": "assistant", "content": None}]}, "message 2: content: expected text"),
    ("completion", {"messages": [USER, "a"]}, "message 2: expected role and content, got 'a'"),
    ("completion", {"prompt": "Human: a\n\nHuman: b", "completion": "c"}, "prompt: roles are user, user"),
    ("completion", {"prompt": "Human: \n\nAssistant: b", "completion": "c"}, "prompt: turn 1 of the transcript is"),
    ("completion", {"chosen": "a", "rejected": "b"}, "prompt: no such field, and chosen is not a conversation"),
    ("pair", {"chosen": "a"}, "rejected: no such field"),
    ("pair", {"chosen": "a", "rejected": "a"}, "rejected: the same as chosen"),
    ("pair", {"chosen": "a", "rejected": [USER, BOT]}, "rejected: expected the type of chosen, text, got messages"),
    ("pair", {"chosen": [USER, BOT], "rejected": [SYSTEM, USER, BOT]}, "chosen: expected the conversation of rejected"),
    ("pair", {"chosen": [USER, BOT], "rejected": [{**USER, "content": "x"}, BOT]}, "chosen: expected the conversation"),
    ("pair", {"chosen": "a", "rejected": "b", "margin": "large"}, "margin: expected a finite number .* got 'large'"),
    ("pair", {"chosen": "a", "rejected": "b", "margin": None}, "margin: .* got null"),
    ("pair", {"chosen": "a", "rejected": "b", "margin": True}, "margin: .* got True"),
    ("pair", {"chosen": "a", "rejected": "b", "margin": float("nan")}, "margin: .* got nan"),
    ("pair", {"prompt": "", "chosen": "a", "rejected": "b"}, "prompt: expected text, got ''"),
    ("prompt", {"text": "a"}, "prompt: no such field .it has text."),
    ("prompt", {"prompt": [USER, BOT]}, "prompt: roles are user, assistant"),
    ("text", {"text": ["a"]}, "text: expected text, got"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "fields", "says"), WRONG)
def test_what_cannot_be_used_is_named(kind, fields, says):
    with pytest.raises(DataError, match=says) as raised:
        parse(kind, fields)
    assert str(raised.value).startswith("f: row 1: ")


@pytest.fixture
def rows(tmp_path):
    def write(*rows):
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path / "rows.jsonl")

    return write


PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}


def test_a_bad_row_stops_or_is_left_out_and_counted(rows, capsys):
    source = rows(
        PAIR, {"chosen": "x", "rejected": "x"}, {"prompt": "d", "chosen": "e", "rejected": "f"}, {"chosen": ""}
    )
    with pytest.raises(DataError, match=r"rows\.jsonl: row 2: rejected: the same .*--bad_rows drop"):
        read_rows(source, "pair")
    assert [row["chosen"] for row in read_rows(source, "pair", bad_rows="drop")] == ["b", "e"]
    printed = capsys.readouterr().out
    assert "2 rows dropped" in printed
    assert "row 2: rejected" in printed
    with pytest.raises(DataError, match=r"no row of it can be used; the first: .*row 1"):
        read_rows(rows({"chosen": 3}), "pair", bad_rows="drop")


def test_a_contradiction_names_both_rows_and_a_repetition_is_none(rows):
    turned = {**PAIR, "chosen": "c", "rejected": "b"}
    with pytest.raises(DataError, match=r"row 3: chosen: contradicts .*row 1"):
        read_rows(rows(PAIR, {**turned, "prompt": "z"}, turned), "pair")
    assert len(read_rows(rows(PAIR, PAIR, {**turned, "prompt": "z"}), "pair")) == 3


CELL = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=8)
    | st.sampled_from(["Human: a\n\nAssistant:", HH, "Human:", "Human: a\n\nHuman: b", "user", "assistant"]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(["role", "content", "from", "value"]), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
NAMES = st.sampled_from(
    ["text", "prompt", "completion", "messages", "conversations", "chosen", "rejected", "margin", "x"]
)


FIELDS = {
    "text": ["text"],
    "completion": ["prompt", "completion"],
    "pair": ["prompt", "chosen", "rejected", "margin"],
    "prompt": ["prompt"],
}


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(kind=st.sampled_from(list(PARSERS)), fields=st.dictionaries(NAMES, CELL, max_size=5))
def test_any_row_has_a_form_or_one_clear_error(kind, fields):
    message, parsed = "f: row 1: ", dict.fromkeys(FIELDS[kind])
    try:
        parsed = parse(kind, fields)
    except DataError as error:
        message = str(error)
    assert message.startswith("f: row 1: ")
    assert set(FIELDS[kind]) <= parsed.keys()
