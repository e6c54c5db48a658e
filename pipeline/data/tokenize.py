"""From rows to token ids: every stage tokenizes text here.

    prompt      [bos] Just saw this with my              Human: What is up?\n\nAssistant:
    completion                              dad. [eos]                                     The sky. [eos]
    score input [bos] Just saw this with my dad. [eos]   Human: What is up?\n\nAssistant: The sky. [eos]

A prompt and its completion are tokenized apart and joined as ids, in SFT, in reward training and in PPO alike, so the
reward model reads in PPO exactly the ids it was trained on. A conversation goes through the tokenizer's chat template
and is split into segments at its answers, each of which ends with EOS. Masks are made from lengths, never from the
padding id, and text that spells a special token ("<eos>") is not read as that token.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import chain

import torch
from datasets import Dataset, IterableDataset
from rich.text import Text as Styled
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from pipeline.data.chat_template import Segment, chat_segments, join_segments
from pipeline.data.files import DataError
from pipeline.data.messages import Text
from pipeline.data.tokenizer import encode_plain
from pipeline.runtime.console import console, print_main
from pipeline.runtime.process import is_main

IGNORE_INDEX = -100  # the label of a token that carries no loss (PyTorch's convention)


# text to ids


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Text]) -> list[list[int]]:
    """Ids of each prompt: text after bos, or a conversation up to where its answer begins."""
    plain = iter(encode_plain(tokenizer, [prompt for prompt in prompts if isinstance(prompt, str)], opens=True))
    return [
        next(plain) if isinstance(prompt, str) else join_segments(chat_segments(tokenizer, prompt))
        for prompt in prompts
    ]


def row_segments(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Text], completions: Sequence[Text]
) -> list[list[Segment]]:
    """The segments of each prompt + completion + EOS; the last one is the completion."""
    plain = [row for row in zip(prompts, completions, strict=True) if isinstance(row[0], str)]
    plain_prompts = iter(encode_plain(tokenizer, [str(prompt) for prompt, _ in plain], opens=True))
    plain_completions = iter(encode_plain(tokenizer, [str(completion) for _, completion in plain]))
    return [
        [(next(plain_prompts), False), ([*next(plain_completions), tokenizer.eos_token_id], True)]
        if isinstance(prompt, str)
        else chat_segments(tokenizer, [*prompt, *completion])
        for prompt, completion in zip(prompts, completions, strict=True)
    ]


def text_ids(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Text], completions: Sequence[Text]
) -> list[list[int]]:
    """Ids of each prompt + completion + EOS: what SFT trains on and what the reward model scores."""
    return [join_segments(segments) for segments in row_segments(tokenizer, prompts, completions)]


# rows to datasets


def language_rows(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Dataset:
    """`input_ids` of whole texts, each opened by bos and closed by EOS."""
    return Dataset.from_list([{"input_ids": ids} for ids in text_ids(tokenizer, [""] * len(texts), texts)])


def language_stream(
    tokenizer: PreTrainedTokenizerBase, texts: Callable[[], Iterator[str]], seed: int
) -> IterableDataset:
    """`language_rows` of a stream of texts, shuffled in a buffer of ten thousand rows."""

    def rows() -> Iterator[dict[str, list[int]]]:
        return ({"input_ids": text_ids(tokenizer, [""], [text])[0]} for text in texts())

    return IterableDataset.from_generator(rows).shuffle(seed, buffer_size=10_000)


def completion_rows(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[dict], max_length: int, too_long: str
) -> tuple[Dataset, int]:
    """`input_ids` and `labels` of prompt + completion + EOS, and how many rows were longer than max_length.

    Labels are IGNORE_INDEX outside the completion and its EOS; in an `every_turn` row, outside all answers, or outside
    those that it marks. `too_long`: drop leaves a longer row out, cut keeps its first tokens, error raises DataError.
    """
    encoded = []
    texts = ([row[field] for row in rows] for field in ("prompt", "completion"))
    for row, segments in zip(rows, row_segments(tokenizer, *texts), strict=True):
        trained = trained_segments(segments, row.get("every_turn", False))
        labels = [
            ids if is_trained else [IGNORE_INDEX] * len(ids)
            for (ids, _), is_trained in zip(segments, trained, strict=True)
        ]
        encoded.append({"input_ids": join_segments(segments), "labels": list(chain.from_iterable(labels))})
    fields = ("input_ids", "labels")
    return filter_by_length(encoded, fields, max_length, too_long, lambda row: set(row["labels"]) != {IGNORE_INDEX})


def trained_segments(segments: Sequence[Segment], every_turn: bool | list[bool]) -> list[bool]:
    """Which segments carry loss: the last answer; with `every_turn` all of them, or those that it marks in turn."""
    answers = [number for number, (_, is_answer) in enumerate(segments) if is_answer]
    marks = every_turn if isinstance(every_turn, list) else [every_turn] * (len(answers) - 1) + [True]
    marked = {number for number, mark in zip(answers, marks, strict=True) if mark}
    return [number in marked for number in range(len(segments))]


def preference_rows(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[dict], max_length: int, too_long: str
) -> tuple[Dataset, int]:
    """`chosen_ids`, `rejected_ids` and `margin` of pairs, and how many had a text longer than max_length."""
    prompts = [row["prompt"] for row in rows]
    chosen, rejected = (text_ids(tokenizer, prompts, [row[side] for row in rows]) for side in ("chosen", "rejected"))
    encoded = [
        {"chosen_ids": chosen_ids, "rejected_ids": rejected_ids, "margin": row["margin"]}
        for row, chosen_ids, rejected_ids in zip(rows, chosen, rejected, strict=True)
    ]
    sides = ("chosen_ids", "rejected_ids")
    return filter_by_length(encoded, sides, max_length, too_long, lambda row: row["chosen_ids"] != row["rejected_ids"])


def filter_by_length(
    rows: list[dict], fields: Sequence[str], max_length: int, too_long: str, is_useful: Callable[[dict], bool]
) -> tuple[Dataset, int]:
    """The rows with at most max_length tokens a field, and how many had more; a cut row stays if it `is_useful`."""
    kept, longer = [], 0
    for number, row in enumerate(rows, 1):
        length = max(len(row[field]) for field in fields)
        if length > max_length:
            longer += 1
            if too_long == "error":
                raise DataError(
                    f"usable row {number} has {length} tokens, max_length is {max_length}: raise max_length, "
                    "shorten the text, or say --too_long drop or cut"
                )
            cut = row | {field: row[field][:max_length] for field in fields}
            if too_long == "drop" or not is_useful(cut):
                continue
            row = cut
        kept.append(row)
    if not kept:
        raise DataError(f"every row is longer than max_length = {max_length}; raise max_length or shorten the texts")
    return Dataset.from_list(kept), longer


def show_example(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], labels: Sequence[int], what: str = "loss on"
) -> None:
    """Prints one decoded row; tokens with a label other than IGNORE_INDEX are in [[ ]] and in colour."""
    if is_main():
        console.print(Styled(f"first row, {what} [[ ]]: ") + styled_row(tokenizer, ids, labels))


def styled_row(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], labels: Sequence[int]) -> Styled:
    """A decoded row, what carries loss in [[ ]]."""
    line = Styled()
    start = 0
    for end in range(1, len(ids) + 1):
        if end == len(ids) or (labels[end] == IGNORE_INDEX) != (labels[start] == IGNORE_INDEX):
            text = str(tokenizer.decode(list(ids[start:end]), clean_up_tokenization_spaces=False))
            line.append(text, "dim") if labels[start] == IGNORE_INDEX else line.append(f"[[{text}]]", "bold green")
            start = end
    return line


def show_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Text, max_length: int) -> None:
    """Prints a prompt as it is sent to the policy, special tokens and all."""
    ids, _ = prompt_batch(tokenizer, [prompt], max_length)
    print_main(f"first prompt, as it is sent: {tokenizer.decode(ids[0].tolist(), clean_up_tokenization_spaces=False)}")


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Text of ids, without special tokens; spaces are not cleaned up."""
    text = tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


def pad_rows(rows: Sequence[Sequence[int]], pad_id: int, side: str) -> tuple[Tensor, Tensor]:
    """(B, S) ids padded on one side, and (B, S) bool, true at real tokens, made from the lengths."""
    ids = [torch.tensor(row, dtype=torch.long) for row in rows]
    real = [torch.ones(len(row), dtype=torch.bool) for row in rows]
    return (
        pad_sequence(ids, batch_first=True, padding_value=pad_id, padding_side=side),
        pad_sequence(real, batch_first=True, padding_value=False, padding_side=side),
    )


def length_batches(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Row numbers in batches of at most `size` rows of similar lengths, for little padding; short ones first."""
    return in_batches(sorted(range(len(lengths)), key=lengths.__getitem__), size)


def in_batches(rows: Sequence[int], size: int) -> list[list[int]]:
    """The row numbers in their order, `size` at a time; the last batch may be shorter."""
    return [list(rows[start : start + size]) for start in range(0, len(rows), size)]


def prompt_batch(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Text], max_length: int) -> tuple[Tensor, Tensor]:
    """Left-padded prompts (B, P) and their mask; of a longer prompt its last max_length tokens.

    A prompt without a token (an empty text, where the tokenizer puts no BOS) is EOS, after which the next text begins.
    """
    rows = [ids[-max_length:] or [tokenizer.eos_token_id] for ids in prompt_ids(tokenizer, prompts)]
    return pad_rows(rows, tokenizer.pad_token_id, "left")
