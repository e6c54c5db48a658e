"""Where text becomes tokens: rows with their errors, labels, padding; the oracle is a character tokenizer by hand."""

import json

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from pipeline.data import (
    IGNORED,
    DataError,
    completion_ids,
    completion_rows,
    language_rows,
    pad,
    preference_rows,
    prompt_batch,
    prompt_ids,
    read_rows,
    text_ids,
)
from pipeline.models import train_tokenizer

LETTERS = "abcdef "
IDS = {letter: 3 + i for i, letter in enumerate(LETTERS)}  # <pad> 0, <bos> 1, <eos> 2


@pytest.fixture(scope="module")
def tokenizer():
    """One id per letter, <bos> before a text and nothing after it."""
    fast = Tokenizer(models.WordLevel({"<pad>": 0, "<bos>": 1, "<eos>": 2, **IDS}, unk_token="<pad>"))
    fast.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    fast.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=fast, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")


def ids(text: str) -> list[int]:
    return [IDS[letter] for letter in text]


@pytest.fixture
def file(tmp_path):
    """Writes lines, each a row or raw bytes, and returns the file's name."""

    def write(*rows) -> str:
        lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
        (tmp_path / "rows.jsonl").write_bytes(b"\n".join(lines) + b"\n")
        return str(tmp_path / "rows.jsonl")

    return write


GOOD = {"prompt": "ab", "completion": " cd"}


def test_rows_are_read_whole_and_in_order(file):
    rows = [{"text": f"größe {i}", "key": i} for i in range(5)]
    assert read_rows(file(*rows), ["text"]) == rows
    assert read_rows(file(*rows), ["text"], limit=3) == rows[:3]
    assert read_rows(file(*rows), ["text"], limit=9) == rows
    assert read_rows(file(rows[0], b"not read"), ["text"], limit=1) == rows[:1]


@pytest.mark.parametrize(
    ("row", "field", "says"),
    [
        ({"prompt": "ab"}, "completion", "no such field"),
        ({"prompt": "ab", "completion": None}, "completion", "got None"),
        ({"prompt": "ab", "completion": 3}, "completion", "got 3"),
        ({"prompt": "ab", "completion": ["x"]}, "completion", r"got \['x'\]"),
        ({"prompt": "ab", "completion": ""}, "completion", "got ''"),
        ({"prompt": " \n\t", "completion": "a"}, "prompt", "expected text"),
        ({**GOOD, "margin": "large"}, "margin", "got 'large'"),
        ({**GOOD, "margin": None}, "margin", "got None"),
        ({**GOOD, "margin": float("nan")}, "margin", "got nan"),
        (["ab", "cd"], "", "expected a JSON object, got list"),
        (b'{"prompt": "ab",', "", "not JSON"),
        (b"", "", "not JSON"),
        (b'{"prompt": "\xff"}', "", "not JSON"),
    ],
)
def test_an_error_names_file_row_and_field(file, row, field, says):
    name = file(GOOD, GOOD, row, GOOD)
    with pytest.raises(DataError, match=says) as raised:
        read_rows(name, ["prompt", "completion"])
    assert str(raised.value).startswith(f"{name}: row 3: {field}")
    assert len(str(raised.value)) < len(name) + 200


def test_an_optional_prompt_may_be_absent_or_empty_but_not_another_type(file):
    pair = {"chosen": "a", "rejected": "b"}
    rows = [pair, {**pair, "prompt": ""}, {**pair, "prompt": "c"}]
    assert read_rows(file(*rows), ["chosen", "rejected"]) == rows
    with pytest.raises(DataError, match=r"row 2: prompt: .*got None"):
        read_rows(file(pair, {**pair, "prompt": None}), ["chosen", "rejected"])


def test_a_file_without_rows_is_named(tmp_path):
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(DataError, match=r"empty\.jsonl: no rows; .*prompt, completion"):
        read_rows(str(tmp_path / "empty.jsonl"), ["prompt", "completion"])


def test_a_long_wrong_value_is_shortened(file):
    with pytest.raises(DataError) as raised:
        read_rows(file({"text": list(range(5000))}), ["text"])
    assert len(str(raised.value)) < 400


def test_prompt_and_completion_join_as_ids(tokenizer):
    assert prompt_ids(tokenizer, ["ab", "e"]) == [[1, *ids("ab")], [1, *ids("e")]]
    assert completion_ids(tokenizer, [" cd", "e"]) == [[*ids(" cd"), 2], [*ids("e"), 2]]
    assert text_ids(tokenizer, ["ab", ""], [" cd", "f"]) == [[1, *ids("ab cd"), 2], [1, *ids("f"), 2]]
    assert language_rows(tokenizer, ["ab", "c"])["input_ids"] == [[1, *ids("ab"), 2], [1, *ids("c"), 2]]


def test_apart_and_together_differ_under_bpe_and_the_reward_model_reads_sfts_ids():
    """A merge may cross from prompt to completion; SFT, reward and PPO must all read the ids joined, never re-cut."""
    bpe = train_tokenizer("bpe", ["abcd " * 50, "ab cd abcd " * 50], 280)
    prompt, completion = "ab", "cd abcd"
    [joined] = text_ids(bpe, [prompt], [completion])
    assert joined != [*bpe(prompt + completion)["input_ids"], bpe.eos_token_id]  # else this test shows nothing
    assert joined == [
        bpe.bos_token_id,
        *bpe(prompt, add_special_tokens=False)["input_ids"],
        *bpe(completion, add_special_tokens=False)["input_ids"],
        bpe.eos_token_id,
    ]
    row = {"prompt": prompt, "completion": completion, "chosen": completion, "rejected": "ab"}
    assert completion_rows(bpe, [row], 99)[0]["input_ids"][0] == joined
    assert preference_rows(bpe, [row], 99)[0]["chosen_ids"][0] == joined
    assert bpe.decode(joined, skip_special_tokens=True) == prompt + completion


def test_loss_lies_on_the_completion_and_its_eos_alone(tokenizer):
    rows, dropped = completion_rows(tokenizer, [GOOD, {"prompt": "a", "completion": "bbb"}], 20)
    assert dropped == 0
    assert rows["input_ids"] == [[1, *ids("ab cd"), 2], [1, *ids("abbb"), 2]]
    assert rows["labels"] == [[IGNORED] * 3 + [*ids(" cd"), 2], [IGNORED] * 2 + [*ids("bbb"), 2]]


@pytest.mark.parametrize(("max_tokens", "kept"), [(7, [0, 1]), (6, [1]), (5, [1])])
def test_too_long_rows_are_dropped_whole_and_counted(tokenizer, max_tokens, kept):
    rows = [GOOD, {"prompt": "a", "completion": "bb"}, {"prompt": "abcdef", "completion": "ab"}]  # 7, 5 and 10 tokens
    tokens, dropped = completion_rows(tokenizer, rows, max_tokens)
    assert tokens["input_ids"] == text_ids(tokenizer, *([rows[i][f] for i in kept] for f in ("prompt", "completion")))
    assert dropped == len(rows) - len(kept)


def test_all_rows_too_long_is_an_error(tokenizer):
    with pytest.raises(DataError, match="max_tokens = 4"):
        completion_rows(tokenizer, [GOOD], 4)
    with pytest.raises(DataError, match="max_tokens = 4"):
        preference_rows(tokenizer, [{"chosen": "a", "rejected": "abcdef"}], 4)


def test_a_pair_is_dropped_when_either_side_is_too_long(tokenizer):
    rows = [
        {"chosen": "abc", "rejected": "f", "margin": 2},
        {"chosen": "abcd", "rejected": "f"},
        {"chosen": "f", "rejected": "abcd"},
        {"prompt": "ab", "chosen": "c", "rejected": ""},
    ]
    pairs, dropped = preference_rows(tokenizer, rows, 5)
    assert dropped == 2
    assert pairs["chosen_ids"] == [[1, *ids("abc"), 2], [1, *ids("abc"), 2]]
    assert pairs["rejected_ids"] == [[1, *ids("f"), 2], [1, *ids("ab"), 2]]
    assert pairs["margin"] == [2.0, 0.0]


@pytest.mark.parametrize("pad_id", [0, 7])  # 7 is a token of the texts: a mask of `ids != pad` would hide it
def test_padding_is_known_by_length(pad_id):
    rows = [[7, 5, 7], [7], [4, 7, 0, 6]]
    left, left_mask = pad(rows, pad_id, "left")
    right, right_mask = pad(rows, pad_id, "right")
    p = pad_id
    assert left.tolist() == [[p, 7, 5, 7], [p, p, p, 7], [4, 7, 0, 6]]
    assert right.tolist() == [[7, 5, 7, p], [7, p, p, p], [4, 7, 0, 6]]
    assert left_mask.tolist() == [[False, True, True, True], [False, False, False, True], [True] * 4]
    assert right_mask.tolist() == [[True, True, True, False], [True, False, False, False], [True] * 4]
    assert (left.dtype, left_mask.dtype) == (torch.long, torch.bool)


def test_prompts_are_padded_on_the_left_and_keep_their_end(tokenizer):
    tokens, mask = prompt_batch(tokenizer, ["abcdef", "f", ""], 4)
    assert tokens.tolist() == [ids("cdef"), [0, 0, 1, *ids("f")], [0, 0, 0, 1]]
    assert mask.sum(1).tolist() == [4, 2, 1]
    assert mask[:, -1].all()
    whole, _ = prompt_batch(tokenizer, ["abcdef", "f"], 99)
    assert whole[0].tolist() == [1, *ids("abcdef")]
