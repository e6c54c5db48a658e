"""The dial `columns`: read as each column's name here, and refused by name where it says nothing or two things."""

import pytest

from pipeline.config.columns import parse_columns
from pipeline.config.parse import parse
from pipeline.config.stages import PPO, SFT, Evaluate, Merge, Pretrain, Reward


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("", {}),
        ("prompt=question", {"question": "prompt"}),
        (" prompt = question , completion=the answer ", {"question": "prompt", "the answer": "completion"}),
        ("tools=", {"tools": ""}),
        ("prompt=,prompt=question", {"prompt": "", "question": "prompt"}),
        ("chosen=rejected,rejected=chosen", {"rejected": "chosen", "chosen": "rejected"}),
        ("role=speaker,content=said", {"speaker": "role", "said": "content"}),
    ],
)
def test_each_column_has_one_name_here(text, names):
    assert parse_columns(text) == names


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("prompt", "columns: expected ours=theirs, or theirs= to leave a column out, got 'prompt'"),
        ("=question", "got '=question'"),
        ("promt=question", "'promt' is no field here; expected one of prompt, completion"),
        ("prompt=a,prompt=b", "expected each name once on each side"),
        ("prompt=a,completion=a", "expected each name once on each side"),
        ("tools=,tools=", "expected each name once on each side"),
    ],
)
def test_an_entry_that_says_nothing_or_two_things_is_refused(refused, write, text, says):
    assert says in refused(SFT, "--config", write(""), "--columns", text)


@pytest.mark.parametrize("kind", [Pretrain, SFT, Reward, PPO, Merge, Evaluate])
def test_every_stage_that_reads_rows_has_it(write, kind):
    config = parse(kind, ["--config", write("columns: prompt=question,tools=\n"), "--max_bad_rows", "0.5"])
    assert config.run.reading.columns == "prompt=question,tools="
    assert config.run.reading.max_bad_rows == 0.5
