"""What each stage reads from a row, what is refused in it, and where an error says it is; expected values by hand."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.config.dials import Reading
from pipeline.data.files import DataError
from pipeline.data.formats import PARSERS, read_rows
from pipeline.data.messages import display_text, format_transcript

USER = {"role": "user", "content": "Hi?"}
BOT = {"role": "assistant", "content": "Yes."}
SYSTEM = {"role": "system", "content": "Be kind."}
OTHER = {"role": "assistant", "content": "No."}
HH = "Human: Hi?\n\nAssistant: Yes."


def parse(kind, fields):
    return PARSERS[kind](("f: row 1", fields))


@pytest.mark.parametrize(
    ("fields", "prompt", "completion", "every_turn"),
    [
        ({"prompt": "a", "completion": " b"}, "a", " b", False),
        ({"prompt": [USER], "completion": [BOT]}, [USER], [BOT], False),
        ({"prompt": [USER], "completion": BOT}, [USER], [BOT], False),
        ({"prompt": "Hi?", "completion": [BOT]}, [USER], [BOT], False),
        ({"prompt": [USER], "completion": " Yes."}, [USER], [BOT], False),
        ({"prompt": [USER], "completion": [USER, BOT]}, [USER], [BOT], False),
        ({"prompt": "Human: Hi?\n\nAssistant:", "completion": " Yes."}, [USER], [BOT], False),
        ({"messages": [SYSTEM, USER, BOT, USER, OTHER]}, [SYSTEM, USER, BOT, USER], [OTHER], True),
        ({"messages": [USER, BOT, USER]}, [USER], [BOT], True),
        ({"messages": [USER, BOT], "prompt": "Hi?", "chosen": "a", "rejected": "b"}, [USER], [BOT], True),
        ({"messages": [USER], "chosen": BOT, "rejected": OTHER}, [USER], [BOT], False),
        ({"messages": HH}, [USER], [BOT], True),
        ({"messages": None, "prompt": "a", "completion": " b", "chosen": None}, "a", " b", False),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "a", "b", False),
        ({"chosen": HH, "rejected": "\n\nHuman: Hi?\n\nAssistant: No."}, [USER], [BOT], False),
        ({"chosen": [USER, BOT], "rejected": [USER, OTHER]}, [USER], [BOT], False),
        ({"text": "A tale.", "prompt": None}, "", "A tale.", False),
        ({"text": HH}, [USER], [BOT], True),
        ({"prompt": "a", "completion": " b", "every_turn": True}, "a", " b", False),  # a column of that name
    ],
)
def test_completions(fields, prompt, completion, every_turn):
    parsed = parse("completion", fields)
    assert [parsed[name] for name in ("prompt", "completion", "every_turn")] == [prompt, completion, every_turn]


@pytest.mark.parametrize(
    ("fields", "prompt", "chosen", "rejected", "margin"),
    [
        ({"chosen": "a b", "rejected": "a c"}, "", "a b", "a c", 0.0),
        ({"chosen": "a", "rejected": "c", "prompt": None, "margin": 2}, "", "a", "c", 2.0),
        ({"chosen": "a", "rejected": "c", "margin": "1.5"}, "", "a", "c", 1.5),
        ({"chosen": "a", "rejected": "c", "margin": None}, "", "a", "c", 0.0),
        ({"prompt": "Hi?", "chosen": [USER, BOT], "rejected": [USER, OTHER]}, [USER], [BOT], [OTHER], 0.0),
        ({"prompt": "Hi?", "chosen": [BOT], "rejected": [OTHER]}, [USER], [BOT], [OTHER], 0.0),
        ({"prompt": [USER], "chosen": [USER, BOT], "rejected": [USER, OTHER]}, [USER], [BOT], [OTHER], 0.0),
        ({"prompt": [SYSTEM, USER], "chosen": [USER, BOT], "rejected": [USER, OTHER]}, [SYSTEM, USER], [BOT], [OTHER],
         0.0),
        ({"messages": [USER], "chosen": BOT, "rejected": OTHER}, [USER], [BOT], [OTHER], 0.0),
        ({"messages": [USER, BOT], "prompt": "Hi?", "chosen": [USER, BOT], "rejected": [USER, OTHER]}, [USER], [BOT],
         [OTHER], 0.0),
        ({"prompt": "Is ice cold? It is", "chosen": "Is ice cold? It is so.", "rejected": "Is ice cold? It is not."},
         "Is ice cold? It is", " so.", " not.", 0.0),
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
        ({"messages": [USER, BOT, USER]}, [USER, BOT, USER]),
        ({"messages": [USER, BOT], "prompt": "Hi?"}, [USER]),
        ({"prompt": "Hi?", "chosen": [USER, BOT], "rejected": [USER, OTHER]}, [USER]),
        ({"prompt": "Hi?", "completion": 3}, "Hi?"),
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
    ("completion", {"completion": "a"}, "prompt: no such field .it has completion.*--columns prompt="),
    ("completion", {}, "completion: no such field .it has none."),
    ("completion", {"prompt": "a", "completion": None}, "completion: no such field .it has prompt."),
    ("completion", {"prompt": "a", "completion": 3}, "completion: expected text, got 3"),
    ("completion", {"prompt": "a", "completion": " \n"}, r"completion: expected text, got ' \\n'"),
    ("completion", {"prompt": "", "completion": "a"}, "prompt: expected text, got ''"),
    ("completion", {"prompt": "a", "completion": "\ud800"}, "completion: broken encoding"),
    ("completion", {"prompt": [USER], "completion": [BOT, USER]}, "completion: roles are assistant, user; expected"),
    ("completion", {"prompt": [USER, BOT, USER], "completion": [USER, BOT]}, "prompt: another than in the row's conv"),
    ("completion", {"prompt": "Ho?", "messages": [USER, BOT]}, "prompt: another than in .*--columns prompt="),
    ("completion", {"messages": [USER, BOT], "prompt": [SYSTEM, SYSTEM]}, "prompt: another than in"),
    ("completion", {"prompt": [USER, BOT], "completion": [BOT]}, "prompt: roles are user, assistant; .*user last"),
    ("completion", {"messages": []}, "messages: expected a list of messages, got .."),
    ("completion", {"messages": "a"}, "messages: expected a list of messages, got 'a'"),
    ("completion", {"messages": [USER]}, "messages: roles are user; .*assistant last"),
    ("completion", {"messages": [SYSTEM]}, "messages: roles are system; "),
    ("completion", {"messages": [{**SYSTEM, "content": ""}]}, "messages: roles are none; "),
    ("completion", {"messages": [BOT, USER, BOT]}, "messages: roles are assistant, user, assistant; expected user and"),
    ("completion", {"messages": [USER, USER, BOT]}, "messages: roles are user, user, assistant"),
    ("completion", {"messages": [USER, SYSTEM, BOT]}, "messages: roles are user, system, assistant"),
    ("completion", {"messages": [USER, {"role": "robot", "content": "a"}]}, "message 2: role: expected system"),
    ("completion", {"messages": [USER, {"role": "assistant"}]}, "message 2: content: no such field"),
    ("completion", {"messages": [USER, {"role": "assistant", "content": ""}]}, "message 2: content: expected text"),
    ("completion", {"messages": [USER, "a"]}, "message 2: expected role and content, got 'a'"),
    ("completion", {"prompt": "Human: \n\nAssistant: b", "completion": "c"}, "prompt: turn 1 of the transcript is"),
    ("completion", {"chosen": "a", "rejected": "b"}, "prompt: no such field, and chosen is not a conversation"),
    ("pair", {"chosen": "a"}, "rejected: no such field"),
    ("pair", {"prompt": "a", "completion": "b", "label": True}, "chosen: no such field; .*one .as for SFT or KTO"),
    ("pair", {"messages": [USER], "chosen": [OTHER], "rejected": [USER, OTHER]}, "chosen: expected the conversation"),
    ("pair", {"prompt": "Ho?", "chosen": [USER, BOT], "rejected": [USER, OTHER]}, "prompt: another than in the row's"),
    ("pair", {"chosen": [BOT], "rejected": [OTHER]}, "prompt: no such field, and no conversation before the answer"),
    ("pair", {"prompt": "a", "chosen": ["b", "c"], "rejected": ["d"]}, "chosen, message 1: .* got 'b'; a list is a"),
    ("pair", {"prompt": "a", "chosen": "a b", "rejected": "a c"}, "chosen: begins with the prompt itself"),
    ("pair", {"prompt": "Is ice cold?", "chosen": "Is ice cold? Yes", "rejected": "No"}, "chosen: begins with the"),
    ("completion", {"prompt": "Is ice cold?", "completion": "Is ice cold?"}, "completion: begins with the prompt"),
    ("pair", {"chosen": "a", "rejected": "a"}, "rejected: the same as chosen"),
    ("pair", {"chosen": "a", "rejected": [USER, BOT]}, "rejected: expected the type of chosen, text, got messages"),
    ("pair", {"chosen": [USER, BOT], "rejected": [SYSTEM, USER, BOT]}, "chosen: expected the conversation of rejected"),
    ("pair", {"chosen": [USER, BOT], "rejected": [{**USER, "content": "x"}, BOT]}, "chosen: expected the conversation"),
    ("pair", {"chosen": "a", "rejected": "b", "margin": "large"}, "margin: expected a finite number .* got 'large'"),
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
    half = Reading(bad_rows="drop", max_bad_rows=0.5)
    assert [row["chosen"] for row in read_rows(source, "pair", reading=half)] == ["b", "e"]
    printed = capsys.readouterr().out
    assert "left out: 2 of 4 rows cannot be used" in printed
    assert "row 2: rejected" in printed
    with pytest.raises(DataError, match=r"no row of it can be used; the first: .*row 1"):
        read_rows(rows({"chosen": 3}), "pair", reading=half)


def test_a_column_that_no_stage_reads_is_said_once(rows, capsys):
    read_rows(rows({**PAIR, "topic": "x", "source": "y"}, {**PAIR, "date": 1, "chosen": "z"}), "pair")
    assert "columns that are not read: date, topic\n" in capsys.readouterr().out
    read_rows(rows(PAIR), "pair")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("columns", "row", "prompt", "completion"),
    [
        ("prompt=q,completion=a", {"q": "x", "a": " y"}, "x", " y"),
        ("question=q,response=a", {"q": "Hi?", "a": "Yes."}, [USER], [BOT]),
        ("prompt=,prompt=q", {"prompt": "z", "q": "x", "completion": " y"}, "x", " y"),
        ("tools=", {"prompt": "x", "completion": " y", "tools": "t"}, "x", " y"),
        ("thinking=", {"messages": [USER, {**BOT, "thinking": "t"}]}, [USER], [BOT]),
        ("role=who,content=is", {"messages": [{"who": "user", "is": "Hi?"}, BOT]}, [USER], [BOT]),
        ("thinking=", {"messages": json.dumps([USER, {**BOT, "thinking": "t"}])}, [USER], [BOT]),
    ],
)  # fmt: skip
def test_columns_under_other_names(rows, columns, row, prompt, completion):
    (parsed,) = read_rows(rows(row), "completion", reading=Reading(columns=columns))
    assert (parsed["prompt"], parsed["completion"]) == (prompt, completion)


def test_a_turned_pair_is_turned_back(rows):
    (parsed,) = read_rows(rows(PAIR), "pair", reading=Reading(columns="chosen=rejected,rejected=chosen"))
    assert (parsed["chosen"], parsed["rejected"]) == ("c", "b")


def test_a_name_that_is_taken_or_that_no_row_has_is_an_error(rows):
    with pytest.raises(DataError, match="row 1: prompt: columns says prompt=q, and there is a field prompt too"):
        read_rows(rows({**PAIR, "q": "x"}), "pair", reading=Reading(columns="prompt=q"))
    with pytest.raises(DataError, match=r"rows\.jsonl: columns: no row that was read has a field tools;"):
        read_rows(rows(PAIR), "pair", reading=Reading(columns="tools="))
    assert len(read_rows(rows(PAIR, {**PAIR, "tools": "t"}), "pair", reading=Reading(columns="tools="))) == 2


def test_a_contradiction_names_both_rows_and_a_repetition_is_none(rows):
    turned = {**PAIR, "chosen": "c", "rejected": "b"}
    with pytest.raises(DataError, match=r"row 3: chosen: contradicts .*row 1"):
        read_rows(rows(PAIR, {**turned, "prompt": "z"}, turned), "pair")
    assert len(read_rows(rows(PAIR, PAIR, {**turned, "prompt": "z"}), "pair")) == 3


NAMES = [
    "text", "prompt", "completion", "messages", "conversations", "chosen", "rejected", "margin", "x", "system",
    "question", "instruction", "input", "response", "answer", "tools", "label", "weight", "completions", "response_0",
    "response_1", "better_response_id",
]  # fmt: skip
KEYS = ["role", "content", "from", "value", "human", "assistant", "type", "text", "weight", "response", "overall_score"]
TALK = [USER, BOT, {"from": "human", "value": "Hi?"}, {"role": "system", "content": ""}, {**BOT, "weight": 0}]
CELL = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=8)
    | st.sampled_from([
        "Human: a\n\nAssistant:", HH, "Human:", "Human: a\n\nHuman: b", "user", "assistant", "Hi?", "Hi? Yes.",
        json.dumps([USER, BOT]), str([USER, BOT]), "a\r\nAssistant: b",
    ]),
    lambda inner: st.lists(inner | st.sampled_from(TALK), max_size=3)
    | st.dictionaries(st.sampled_from(KEYS), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
ROW = st.dictionaries(st.sampled_from(NAMES), CELL, max_size=5)
KIND = st.sampled_from(list(PARSERS))
FIELDS = {
    "text": ["text"],
    "completion": ["prompt", "completion", "every_turn"],
    "pair": ["prompt", "chosen", "rejected", "margin"],
    "prompt": ["prompt"],
}
FEW = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def parsed_or_error(kind, fields):
    """What a row means, or the sentence that refuses it."""
    try:
        parsed = parse(kind, fields)
    except DataError as error:
        return str(error)
    return {name: parsed[name] for name in FIELDS[kind]}


@FEW
@given(kind=KIND, fields=ROW)
def test_any_row_has_a_form_or_one_clear_error(kind, fields):
    result = parsed_or_error(kind, fields)
    if isinstance(result, str):
        assert result.startswith("f: row 1: ")
        assert "\n" not in result
        return
    texts = [value for name, value in result.items() if name not in ("margin", "every_turn")]
    assert len({isinstance(text, list) for text in texts}) == 1  # one form
    for text in texts:
        for message in text if isinstance(text, list) else [{"content": text or "no prompt"}]:
            assert message["content"].strip()


@FEW
@given(kind=KIND, fields=ROW)
def test_a_null_field_is_none(kind, fields):
    without = {name: value for name, value in fields.items() if value is not None}
    nulls = dict.fromkeys(name for name in NAMES if name not in without)
    assert parsed_or_error(kind, without | nulls) == parsed_or_error(kind, without)


@FEW
@given(fields=ROW)
def test_a_row_means_the_same_prompt_at_every_stage(fields):
    """PPO asks what SFT answers and what the reward model scores; a user's last turn aside, which SFT does not read."""
    prompt, completion, pair = (parsed_or_error(kind, fields) for kind in ("prompt", "completion", "pair"))
    for other in (completion, pair):
        if isinstance(prompt, dict) and isinstance(other, dict) and other["prompt"]:
            asked = prompt["prompt"]
            assert asked == other["prompt"] or (
                other is completion and asked[: len(other["prompt"])] == other["prompt"]
            )


@FEW
@given(kind=st.sampled_from(["text", "completion", "prompt"]), rows_=st.lists(ROW, min_size=1, max_size=4))
def test_a_row_means_the_same_whatever_stands_beside_it(kind, rows_, tmp_path_factory):
    file = tmp_path_factory.getbasetemp() / "neighbours.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows_))
    alone = [parsed_or_error(kind, json.loads(json.dumps(row))) for row in rows_]
    expected = [parsed for parsed in alone if isinstance(parsed, dict)]
    try:
        together = read_rows(str(file), kind, reading=Reading(bad_rows="drop", max_bad_rows=1.0))
    except DataError:
        together = []
    assert [{name: row[name] for name in FIELDS[kind]} for row in together] == expected
