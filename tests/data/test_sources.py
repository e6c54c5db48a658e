"""Every kind of file gives the same rows; what cannot be read is named; mixtures keep their shares."""

import csv
import gzip
import json
import shutil
from collections import Counter
from itertools import islice
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.data import sources
from pipeline.data.files import DataError
from pipeline.data.sources import hash_source, iterate_sources

ROWS = [
    {"prompt": "größe, 1", "completion": 'says "so"\nand goes'},
    {"prompt": "b", "completion": "c"},
    {"prompt": "NA", "completion": "null"},
]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(name, rows=ROWS):
    lines = "\n".join(json.dumps(row) for row in rows) + "\n"
    if name.endswith(".jsonl"):
        Path(name).write_text(lines, encoding="utf-8")
    elif name.endswith(".json"):
        Path(name).write_text(json.dumps(rows, indent=1), encoding="utf-8")
    elif name.endswith(".csv"):
        with open(name, "w", encoding="utf-8", newline="") as file:
            table = csv.DictWriter(file, list(rows[0]))
            table.writeheader()
            table.writerows(rows)
    elif name.endswith(".parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), name)
    else:
        write(name.removesuffix(".gz"), rows)
        with open(name.removesuffix(".gz"), "rb") as plain, gzip.open(name, "wb") as packed:
            shutil.copyfileobj(plain, packed)
    return name


def fields(text, **options):
    return [row for _, row in iterate_sources(text, **options)]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet", "a.jsonl.gz", "a.json.gz", "a.csv.gz"])
def test_every_kind_of_file_gives_the_same_rows(name):
    assert fields(write(name)) == ROWS
    assert [where for where, _ in iterate_sources(name)] == [f"{name}: row {number}" for number in (1, 2, 3)]
    assert fields(name, limit=2) == ROWS[:2]


def test_a_byte_order_mark_and_blank_lines_are_no_rows():
    Path("a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a"}\n\n{"text": "b"}')
    assert list(iterate_sources("a.jsonl")) == [("a.jsonl: row 1", {"text": "a"}), ("a.jsonl: row 3", {"text": "b"})]
    Path("a.csv").write_bytes(b"\xef\xbb\xbftext\na\n")
    assert fields("a.csv") == [{"text": "a"}]


def test_a_folder_is_its_files_and_a_list_one_after_the_other(tmp_path):
    (tmp_path / "d").mkdir()
    write("d/2.csv", ROWS[1:])
    write("d/1.jsonl", ROWS[:1])
    (tmp_path / "d" / "README.md").write_text("not rows")
    assert fields("d") == ROWS
    assert fields("d/2.csv, d/1.jsonl") == ROWS[1:] + ROWS[:1]


def test_a_mixture_has_the_shares_asked_for_and_reads_each_source_through():
    write("a.jsonl", [{"text": f"a{i}"} for i in range(3000)])
    write("b.jsonl", [{"text": f"b{i}"} for i in range(50)])
    mixed = [row["text"] for row in fields("a.jsonl*3, b.jsonl*1", seed=1)]
    assert {f"a{i}" for i in range(3000)} | {f"b{i}" for i in range(50)} == set(mixed)
    share = Counter(text[0] for text in mixed[:2000])["a"] / 2000
    assert abs(share - 0.75) < 0.04  # four standard errors
    assert mixed == [row["text"] for row in fields("a.jsonl*3,b.jsonl*1", seed=1)]
    assert mixed != [row["text"] for row in fields("a.jsonl*3,b.jsonl*1", seed=2)]
    assert mixed[:100] == [row["text"] for row in fields("a.jsonl*3,b.jsonl*1", seed=1, limit=100)]


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.floats(-1, 1) | st.text(max_size=2),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from("abc"), inner, max_size=2),
    max_leaves=4,
)
TABLES = st.lists(st.dictionaries(st.sampled_from(["prompt", "margin", "messages"]), VALUES, min_size=1), min_size=1)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(parts=st.lists(TABLES.filter(lambda rows: len(rows) < 6), min_size=1, max_size=3), seed=st.integers(0, 3))
def test_a_mixture_is_the_union_of_its_parts(parts, seed):
    """Whatever columns and types these have: each row is what it is alone, each part read once, or over again."""
    for number, rows in enumerate(parts):
        write(f"p{number}.jsonl", rows)
    alone = [fields(f"p{number}.jsonl") for number in range(len(parts))]
    assert [[*rows] for rows in alone] == [[sources.without_nulls(row) for row in rows] for rows in parts]
    names = [f"p{number}.jsonl" for number in range(len(parts))]
    assert fields(", ".join(names)) == [row for rows in alone for row in rows]
    mixed = list(iterate_sources(", ".join(f"{name}*{number + 1}" for number, name in enumerate(names)), seed=seed))
    for name, rows in zip(names, alone, strict=True):
        mine = [row for where, row in mixed if where.startswith(name)]
        assert len(mine) >= len(rows)
        assert json.dumps(mine) == json.dumps([rows[number % len(rows)] for number in range(len(mine))])
    assert any(
        len([1 for where, _ in mixed if where.startswith(n)]) == len(r) for n, r in zip(names, alone, strict=True)
    )


def test_null_is_absent_in_every_kind_of_file():
    rows = [
        {"prompt": "a", "margin": None, "messages": [{"role": "user", "name": None}, {"role": "user", "name": "b"}]},
        {"prompt": None, "margin": 1.0, "messages": None},
    ]
    bare = [{"prompt": "a", "messages": [{"role": "user"}, {"role": "user", "name": "b"}]}, {"margin": 1.0}]
    for name in ("a.jsonl", "a.json", "a.parquet"):
        assert fields(write(name, rows)) == bare
    datasets.Dataset.from_list(rows).save_to_disk("saved")
    assert fields("saved") == bare
    Path("a.csv").write_text("prompt,margin\na,\n,1\n", encoding="utf-8")
    assert fields("a.csv") == [{"prompt": "a"}, {"margin": "1"}]


def test_patterns_commas_and_the_home_folder_name_files(tmp_path, monkeypatch):
    (tmp_path / "d, e").mkdir()
    for number in range(3):
        write(f"d, e/part-{number} [v1].jsonl", [{"text": f"{number}"}])
    texts = [{"text": "0"}, {"text": "1"}, {"text": "2"}]
    assert fields("d, e/part-*") == fields("d, e") == texts
    assert fields("d, e/part-1 [v1].jsonl") == texts[1:2]
    assert fields("d, e/part-2 [v1].jsonl, d, e/part-0 [v1].jsonl") == [texts[2], texts[0]]
    mixed = "d, e/part-2 [v1].jsonl*2, d, e/part-*.jsonl*1"
    assert {row["text"] for row in fields(mixed)} == {"0", "1", "2"}
    assert hash_source("d, e/part-*") == hash_source("d, e") != hash_source("d, e/part-1 [v1].jsonl")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert fields("~/d, e") == fields("~/d, e/*.jsonl") == texts


def test_a_saved_dataset_is_read_and_told_apart_by_its_rows():
    for name, rows in (("s1", ROWS), ("s2", ROWS[:2])):
        datasets.Dataset.from_list(rows).save_to_disk(name)
    assert fields("s1") == ROWS
    datasets.Dataset.from_list(ROWS).with_format("numpy", columns=["prompt"]).save_to_disk("chosen columns")
    assert fields("chosen columns") == ROWS
    assert [where for where, _ in iterate_sources("s2")] == ["s2: row 1", "s2: row 2"]
    assert hash_source("s1") != hash_source("s2")
    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}).save_to_disk("both")
    with pytest.raises(DataError, match=r"both: saved datasets are in it \(train\): name one, as in both/train"):
        fields("both")
    assert fields("both/train") == ROWS


def test_hidden_files_are_no_rows_and_what_is_not_read_is_said(tmp_path, capsys):
    (tmp_path / "d").mkdir()
    write("d/rows.jsonl")
    for name in ("._rows.jsonl", ".cache.json"):
        (tmp_path / "d" / name).write_bytes(b"\x00\x05\x16\x07")
    (tmp_path / "d" / "dataset_infos.json").write_text("{}")
    (tmp_path / "d" / "more").mkdir()
    write("d/more/rows.jsonl")
    for source in ("d", "d*1, d/rows.jsonl*1"):
        assert fields(source, limit=3) == ROWS or source != "d"
        assert "d: not read: ._rows.jsonl, .cache.json, dataset_infos.json, more/" in capsys.readouterr().out
    with pytest.raises(DataError, match=r"d/dataset_infos.json: a description of a dataset, by its name"):
        fields("d/*")


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (("train-00000-of-00002.parquet", "test-00000-of-00001.parquet"), r"test \(test-0.*\), train \(train-0.*\)"),
        (("pairs_train.jsonl", "pairs_dev.jsonl"), r"validation \(pairs_dev.jsonl\), train \(.*\)"),
        (("a.jsonl", "train.jsonl", "Validation.JSONL"), r"validation \(V.*\), no split \(a.jsonl\), train \(t.*\)"),
        (("more.jsonl", "test.jsonl"), r"no split \(more.jsonl\), test \(test.jsonl\)"),
    ],
)
def test_files_of_several_splits_are_not_read_together(names, found, tmp_path):
    (tmp_path / "d").mkdir()
    for name in names:
        write(f"d/{name.lower()}")
        (tmp_path / "d" / name.lower()).rename(tmp_path / "d" / name)
    for source in ("d", "d/*"):
        with pytest.raises(
            DataError, match=rf"^{source[0]}.*: files of several splits are in it: {found}; name a file"
        ):
            fields(source)
    assert fields(f"d/{names[0]}, d/{names[1]}") == ROWS * 2


def test_a_folder_names_the_split_of_the_files_in_it(tmp_path):
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        write(f"{split}/rows.jsonl")
    with pytest.raises(
        DataError, match=r"files of several splits are in it: test \(rows.jsonl\), train \(rows.jsonl\)"
    ):
        fields("**/*.jsonl")
    write("train/train-more.jsonl")
    assert fields("train") == ROWS * 2


def test_a_long_list_and_an_unknown_home_are_names_like_others():
    names = [write(f"part-{number:05}.jsonl", ROWS[:1]) for number in range(20)]  # too long for the name of one file
    assert fields(", ".join(names)) == ROWS[:1] * 20
    with pytest.raises(DataError, match=r"^~nobody-is/a.jsonl: no such file"):
        fields("~nobody-is/a.jsonl")


def test_a_folder_whose_rows_lie_further_down_says_where(tmp_path):
    (tmp_path / "clone" / "data").mkdir(parents=True)
    write("clone/data/train-00000.parquet")
    with pytest.raises(DataError, match=r"clone: no .jsonl.* in this folder; clone/data has some: name it"):
        fields("clone")
    assert fields("clone/data/train-*") == ROWS


def test_rows_are_read_only_as_far_as_they_are_used():
    Path("a.jsonl").write_text('{"text": "a"}\nnot JSON\n', encoding="utf-8")
    assert fields("a.jsonl", limit=1) == [{"text": "a"}]
    assert next(iter(iterate_sources("a.jsonl"))) == ("a.jsonl: row 1", {"text": "a"})


def test_a_fingerprint_tells_content_order_and_shares_apart(tmp_path):
    write("a.jsonl")
    write("b.csv")
    prints = {
        text: hash_source(text) for text in ("a.jsonl", "b.csv", "a.jsonl,b.csv", "b.csv,a.jsonl", "a.jsonl*1,b.csv*2")
    }
    assert len(set(prints.values())) == len(prints)
    shutil.copy("a.jsonl", "c.jsonl")
    assert hash_source("c.jsonl") == prints["a.jsonl"]
    write("a.jsonl", ROWS[:2])
    assert hash_source("a.jsonl") != prints["a.jsonl"]


BROKEN = {
    "latin.jsonl": (b'{"text": "a"}\n{"text": "\xe9"}\n', r"latin\.jsonl: line 2: not UTF-8"),
    "half.jsonl": (b'{"text": "a"}\n{"text": ', r"half\.jsonl: line 2: not JSON"),
    "list.jsonl": (b'{"text": "a"}\n["a"]\n', r"list\.jsonl: row 2: expected an object of fields, got list"),
    "deep.jsonl": (b'{"text": "a"}\n' + b"[" * 200_000, r"deep\.jsonl: line 2: (nested too deeply|not JSON)"),
    "nested.jsonl": (
        b'{"text": "a"}\n{"x": ' + b"[" * 600 + b"]" * 600 + b"}",
        r"nested\.jsonl: (row|line) 2: nested too deeply",
    ),
    "empty.jsonl": (b"", r"empty\.jsonl: no rows"),
    "blank.jsonl": (b"\n\n", r"blank\.jsonl: no rows"),
    "empty.csv": (b"", r"empty\.csv: no rows"),
    "header.csv": (b"text\n", r"header\.csv: no rows"),
    "short.csv": (b"prompt,completion\na,b\nc\n", r"short\.csv: row 2: expected 2 cells \(prompt, completion\), got 1"),
    "long.csv": (b"text\na, b\n", r"long\.csv: row 1: expected 1 cells .*quotes"),
    "latin.csv": (b"text\n\xe9\n", r"latin\.csv: not UTF-8"),
    "open.csv": (b'text\n"a', r"open\.csv: line \d: not CSV"),
    "not.parquet": (b"PAR1 no", r"not\.parquet: not readable as parquet"),
    "not.jsonl.gz": (b"plain", r"not\.jsonl\.gz: not readable"),
    "cut.jsonl.gz": (gzip.compress(b'{"text": "a"}\n' * 999)[:40], r"cut\.jsonl\.gz: not readable"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_cannot_be_read_is_named_with_its_place(name):
    content, says = BROKEN[name]
    Path(name).write_bytes(content)
    with pytest.raises(DataError, match=says) as raised:
        list(iterate_sources(name))
    assert len(str(raised.value)) < 300


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("absent.jsonl", r"absent\.jsonl: no such file"),
        ("data/imdb/sft/train.jsonl", "`make data` makes the default recipe's"),
        ("/absent/folder", "no such file"),
        ("a.txt", r"a\.txt: expected a \.jsonl"),
        ("nothing", "no such file"),
        ("bare", "no .jsonl, .json, .csv, .tsv or .parquet file in this folder"),
        ("*.txt", r"a\.txt: expected a \.jsonl"),
        ("b*.jsonl", r"b\*\.jsonl: no file matches"),
        ("bare/*.jsonl", r"bare/\*\.jsonl: no file matches"),
        ("a.jsonl*0", "expected a positive number"),
        ("a.jsonl*x", r"a\.jsonl\*x: expected a positive number after '\*', got 'x'"),
        ("a.jsonl*-1", "expected a positive number"),
        ("a.jsonl*nan", "expected a positive number"),
        ("a.jsonl*2, a.jsonl", "give every source a share"),
        ("a.jsonl,,a.jsonl", "before and after every comma"),
        ("org/name", "org/name: no such file or folder, and as a hub dataset: the hub is switched off"),
    ],
)
def test_a_source_that_is_not_there_is_named(text, says, tmp_path):
    write("a.jsonl")
    Path("a.txt").write_text("rows", encoding="utf-8")
    (tmp_path / "bare").mkdir()
    for read in (hash_source, lambda text: list(iterate_sources(text))):
        with pytest.raises(DataError, match=says):
            read(text)


def test_a_hub_dataset_is_read_at_one_commit(monkeypatch):
    """The hub's two functions are replaced: with what they are called, and what becomes of what they return."""
    calls = []

    class Api:
        def dataset_info(self, name, revision):
            calls.append((name, revision))
            return type("Info", (), {"sha": "c0ffee"})

    def load(name, config, **options):
        calls.append((name, config, options))
        return datasets.Dataset.from_list(ROWS).to_iterable_dataset()

    monkeypatch.setattr(sources, "HfApi", Api)
    monkeypatch.setattr(datasets, "load_dataset", load)
    assert fields("org/name:train[:3]@v1.0") == ROWS
    assert calls == [
        ("org/name", "v1.0"),
        ("org/name", None, {"split": "train[:3]", "revision": "c0ffee", "streaming": True}),
    ]
    assert hash_source("org/name:test") == "c0ffee/None:test"
    assert hash_source("org/name/en") == "c0ffee/en:train"
    assert [where for where, _ in iterate_sources("org/name", limit=1)] == ["org/name:train: row 1"]
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: iter([]))
    for source in ("org/name", "org/name*1, org/other*1"):
        with pytest.raises(DataError, match="org/name:train: no rows in it"):
            fields(source)


OBJECT = st.dictionaries(st.text(max_size=3), st.text(max_size=3), max_size=3).map(lambda row: json.dumps(row).encode())
LINES = st.lists(st.binary(max_size=30) | OBJECT, max_size=5)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(["x.jsonl", "x.json", "x.csv", "x.parquet", "x.jsonl.gz", "x.csv.gz"]), lines=LINES)
def test_any_bytes_are_rows_or_one_clear_error(name, lines):
    Path(name).write_bytes(b"\n".join(lines))
    message = name
    rows: list = []
    try:
        rows = list(islice(iterate_sources(name), 10))
    except DataError as error:
        message = str(error)
    assert message.startswith(name)
    assert all(isinstance(row, dict) for _, row in rows)
