"""Tables as programs write them: each is read as it was meant, or refused by name."""

import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from pipeline.data.files import DataError
from pipeline.data.sources import iterate_sources

ROW = {"prompt": "Sky?", "completion": " Blue."}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def read(name, content):
    Path(name).write_bytes(content.encode() if isinstance(content, str) else content)
    return [row for _, row in iterate_sources(name)]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", "\ufeffprompt,completion\r\nSky?, Blue.\r\n"),
        ("quoted.csv", '\ufeff"prompt","completion"\r\n"Sky?"," Blue."\r\n'),
        ("mac.csv", "prompt,completion\rSky?, Blue.\r"),
        ("blank.csv", "prompt,completion\n\nSky?, Blue.\n\n\n"),
        ("late.csv", "\n \nprompt;completion\nSky?; Blue.\n"),
        ("spaced.csv", " prompt , completion \nSky?, Blue.\n"),
        ("semicolon.csv", "prompt;completion\nSky?; Blue.\n"),
        ("tabs.csv", "prompt\tcompletion\nSky?\t Blue.\n"),
        ("a.tsv", "prompt\tcompletion\nSky?\t Blue.\n"),
        ("UPPER.CSV", "prompt,completion\nSky?, Blue.\n"),
        ("UPPER.JSONL", '{"prompt": "Sky?", "completion": " Blue."}'),
        ("index.csv", ",prompt,completion\n7,Sky?, Blue.\n"),
        ("last.csv", "prompt,completion,\nSky?, Blue.,\n"),
    ],
)
def test_a_table_is_read_as_it_was_meant(name, content):
    assert read(name, content) == [ROW]


def test_a_cell_may_hold_what_separates_when_it_is_quoted_or_the_header_says_otherwise():
    assert read("a.csv", 'a,b\n"1, 2;\n3",x\n') == [{"a": "1, 2;\n3", "b": "x"}]
    assert read("d.csv", 'a,b\n"1, ","  ""x"""\n"1\n ",x\n') == [{"a": "1, ", "b": '  "x"'}, {"a": "1\n ", "b": "x"}]
    assert read("b.csv", "a;b\n1, 2;x\n") == [{"a": "1, 2", "b": "x"}]
    assert read("c.tsv", "a,c\tb\n1\tx\n") == [{"a,c": "1", "b": "x"}]


def test_a_column_without_a_name_is_said_to_be_left_out(capsys):
    read("index.csv", ",prompt\n0,a\n1,b\n")
    assert "index.csv: column 1 has no name and is not read" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("twice.csv", "a,b,a\n1,2,3\n", r"twice.csv: a heads two columns"),
        ("twice.jsonl", '{"a": 1}\n{"b": {"a": 1, "a": 2}}', r"twice.jsonl: line 2: a stands twice in one object"),
        ("unnamed.csv", ",a\n0,x\nsky,y\n", r"unnamed.csv: row 2: column 1 has no name and holds 'sky'; name it"),
        ("stray.csv", 'a, b\n"x", "y"\n', r"stray.csv: a blank before the quotes of a cell: '\"x\", \"y\"'; take such"),
        ("wide.csv", b"\xff\xfea\x00\n\x00", r"wide.csv: not UTF-8"),
        ("backslash.csv", 'a,b\n"say \\"hi\\"",x\n', r"backslash.csv: line 2: not CSV"),
    ],
)
def test_what_is_not_certain_is_refused_by_name(name, content, says):
    with pytest.raises(DataError, match=says):
        read(name, content)


def test_a_column_that_a_parquet_file_has_twice_is_refused():
    pyarrow.parquet.write_table(pyarrow.table([["a"], ["b"], ["c"]], names=["x", "y", "x"]), "twice.parquet")
    with pytest.raises(DataError, match=r"twice.parquet: x heads two columns"):
        list(iterate_sources("twice.parquet"))


@pytest.mark.parametrize("name", ["damaged.jsonl.gz", "damaged.csv.gz"])
def test_a_damaged_archive_is_named(name):
    packed = bytearray(gzip.compress(json.dumps([*range(999)]).encode()))
    packed[10] = 0xFF  # the kind of the first block
    with pytest.raises(DataError, match=rf"{name}: not readable"):
        read(name, bytes(packed))
