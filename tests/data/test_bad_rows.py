"""Rows that cannot be used are left out up to a share, and counted by reason."""

import json
from itertools import islice

import pytest

from pipeline.config.dials import Reading
from pipeline.data.bad_rows import FIRST_LOOK
from pipeline.data.files import DataError
from pipeline.data.formats import iterate_rows, read_rows

GOOD = {"prompt": "a", "completion": " b"}
DROP = Reading(bad_rows="drop")


@pytest.fixture
def file(tmp_path):
    def write(rows):
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path / "rows.jsonl")

    return write


def test_the_share_is_a_limit(file):
    rows = [{"prompt": "a", "completion": ""}] * 5 + [GOOD] * 95
    assert len(read_rows(file(rows), "completion", reading=DROP)) == 95
    with pytest.raises(DataError, match=r"6 of 101 rows cannot be used.*more than max_bad_rows = 0\.05 of them"):
        read_rows(file([*rows, {"prompt": 3}]), "completion", reading=DROP)


def test_the_commonest_reason_is_named_with_its_first_row_and_count(file):
    bad = [{"prompt": "a"}, *({"prompt": "a", "completion": number} for number in range(7)), {"prompt": "a"}]
    with pytest.raises(
        DataError, match=r"9 of 19 rows cannot be used, 7 of them .*row 2: completion: expected text, got 0"
    ):
        read_rows(file([*bad, *[GOOD] * 10]), "completion", reading=DROP)


def test_a_stream_is_stopped_on_the_way(file):
    """It is looked at after FIRST_LOOK rows, not at an end that may not come."""
    rows = [GOOD] * (FIRST_LOOK - 51) + [{}] * 51 + [GOOD] * 2_000
    stream = iterate_rows(file(rows), "completion", 0, DROP, 0)
    assert len(list(islice(stream, FIRST_LOOK - 51))) == FIRST_LOOK - 51
    with pytest.raises(DataError, match="51 of 1,000 rows cannot be used"):
        next(stream)
    early = [{}] * 60 + [GOOD] * 2_000
    assert len(read_rows(file(early), "completion", reading=DROP)) == 2_000
