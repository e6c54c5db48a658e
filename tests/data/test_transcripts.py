"""Transcripts are split into the same turns however their lines end; text that only looks like one is refused."""

import pytest

from pipeline.data.files import DataError
from pipeline.data.formats import PARSERS
from pipeline.data.transcripts import parse_transcript

TALK = [
    {"role": "user", "content": "Hi?"},
    {"role": "assistant", "content": "Yes.\n\nNo."},
    {"role": "user", "content": "Ho?"},
]
BLANK = "Human: Hi?\n\nAssistant: Yes.\n\nNo.\n\nHuman: Ho?"


@pytest.mark.parametrize(
    "text",
    [
        BLANK, "\n\n" + BLANK + "\n\nAssistant:", BLANK.replace("\n", "\r\n"), BLANK.replace("\n", "\r"),
        BLANK.replace("\n\n", "\n \n"), BLANK.replace("\n\n", "\n\t\n\n"), BLANK.replace("\n\nH", "\n\n  H"),
        "Human: Hi?\nAssistant: Yes.\n\nNo.\nHuman: Ho?", "Human: Hi?\nAssistant: Yes.\n\nNo.\nHuman: Ho?\nAssistant:",
    ],
)  # fmt: skip
def test_turns_are_the_same_however_lines_end(text):
    messages = parse_transcript("f", "prompt", text)
    assert [message["role"] for message in messages] == [message["role"] for message in TALK]
    assert ["".join(message["content"].split()) for message in messages] == ["Hi?", "Yes.No.", "Ho?"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("Human: Hi?\n\nAssistant: Yes.\nHuman: Ho?\nAssistant:", "Human: stands on a new line, other turns after"),
        ("Human: the one word in this title", "opens with Human:, and no turn of Assistant: follows"),
        ("Human: Hi?\n\nHuman: Ho?", "opens with Human:, and no turn of Assistant:"),
        ("Human: \n\nAssistant: Yes.", "turn 1 of the transcript is empty"),
        ("Human: Hi?\n\nAssistant: Yes.\n\nAssistant: No.", "roles are user, assistant, assistant"),
        ("A talk.\n\nHuman: Hi?\n\nAssistant:", r"holds turns \(Human:, Assistant:\) after other text: .*system"),
        ("<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\n", r"holds <\|im_start\|>, which a chat template wr"),
        ("[INST] Hi? [/INST]", r"holds \[INST\]"),
    ],
)  # fmt: skip
def test_what_is_no_transcript_is_refused(text, says):
    with pytest.raises(DataError, match="f: row 1: prompt: " + says):
        PARSERS["prompt"](("f: row 1", {"prompt": text}))


@pytest.mark.parametrize("text", ["Alien: a title", "User: Hi?\n\nAssistant:", "### Human: Hi?\n### Assistant:"])
def test_other_text_stays_text(text):
    assert PARSERS["completion"](("f", {"prompt": text, "completion": " Yes."}))["prompt"] == text


ASKED = "\n\nHuman: Is ice cold?\n\nAssistant:"


def test_an_answer_that_holds_its_transcript_is_its_last_turn():
    parsed = PARSERS["pair"](("f", {"prompt": ASKED, "chosen": ASKED + " Yes.", "rejected": ASKED + " No."}))
    assert parsed["prompt"] == [{"role": "user", "content": "Is ice cold?"}]
    assert [parsed[side][0]["content"] for side in ("chosen", "rejected")] == ["Yes.", "No."]


@pytest.mark.parametrize(
    ("kind", "fields", "says"),
    [
        ("pair", {"chosen": ASKED + " Yes.", "rejected": ASKED}, "rejected: roles are user; .*assistant last"),
        ("pair", {"chosen": ASKED + " a\n\nHuman: b", "rejected": ASKED + " c\n\nHuman: b"}, "chosen: roles are user"),
        ("pair", {"prompt": ASKED, "chosen": ASKED[:-13] + "er?\n\nAssistant: a", "rejected": ASKED + "c"}, "chosen: "),
        ("completion", {"prompt": ASKED, "completion": " Yes.\n\nHuman: And fire?"}, "completion: holds more turns"),
        ("completion", {"prompt": ASKED, "completion": "Assistant: Yes."}, "completion: holds more turns"),
        ("completion", {"question": "User: Hi?\n\nAssistant:", "answer": "Yes."}, "question: holds Assistant:"),
        ("completion", {"prompt": "### Human: Hi?\n### Assistant:", "response": "Yes."}, "prompt: holds Assistant:"),
        ("completion", {"text": "### Human: Hi ### Assistant: Hello"}, "text: holds Assistant:, so more than one turn"),
    ],
)  # fmt: skip
def test_a_turn_that_is_not_split_is_refused(kind, fields, says):
    with pytest.raises(DataError, match="f: row 1: " + says):
        PARSERS[kind](("f: row 1", fields))
