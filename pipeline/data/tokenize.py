"""From rows to token ids: one place where text becomes tokens, for every stage.

    prompt      [bos] Just saw this with my              Human: What is up?\n\nAssistant:
    completion                              dad. [eos]                                     The sky. [eos]
    score input [bos] Just saw this with my dad. [eos]   Human: What is up?\n\nAssistant: The sky. [eos]

A prompt and its completion are tokenized apart and joined as ids, in SFT, in reward training and in PPO alike, so the
reward model reads in PPO exactly the ids it was trained on. A conversation goes through the tokenizer's chat template
and is cut at its answers, each of which ends with EOS. Nothing here looks for padding by its id, and text that spells
a special token stays text.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from jinja2 import TemplateError
from rich.text import Text as Styled
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from pipeline.data.formats import Message, Text
from pipeline.runtime.console import console, print_main
from pipeline.runtime.process import is_main
from pipeline.data.sources import DataError

IGNORE_INDEX = -100  # the label of a token that carries no loss (PyTorch's convention)

TRANSCRIPT = """{{- bos_token or '' -}}
{%- for message in messages -%}
{%- if message.role == 'user' -%}{{- 'Human: ' + message.content + '\\n\\n' -}}
{%- elif message.role == 'system' -%}{{- message.content + '\\n\\n' -}}
{%- else -%}{{- 'Assistant:' -}}{%- generation -%}{{- ' ' + message.content + eos_token -}}{%- endgeneration -%}
{{- '\\n\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'Assistant:' -}}{%- endif -%}"""
"""The chat template given to a tokenizer that has none (the form of Bai et al., arXiv 2204.05862)."""

QUOTED = re.compile("\ue000(\\d+)\ue001")
"""Stands for a special token's name in what people wrote, while a chat template writes the real ones around it."""


# text to ids


def plain_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], opens: bool = False) -> list[list[int]]:
    """Ids of texts in which no special token is read; `opens` puts what the tokenizer puts before a text (bos)."""
    return tokenizer(list(texts), add_special_tokens=opens, split_special_tokens=True)["input_ids"] if texts else []


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Text]) -> list[list[int]]:
    """Ids of each prompt: text opened by bos, or a conversation up to where its answer begins."""
    plain = iter(plain_ids(tokenizer, [prompt for prompt in prompts if isinstance(prompt, str)], opens=True))
    return [next(plain) if isinstance(prompt, str) else flatten_pieces(turn_ids(tokenizer, prompt)) for prompt in prompts]


def row_pieces(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Text], completions: Sequence[Text]
) -> list[list[tuple[list[int], bool]]]:
    """Ids of each prompt + completion + EOS in pieces, and which are answers; the last piece is the completion."""
    texts = [row for row in zip(prompts, completions, strict=True) if isinstance(row[0], str)]
    opened = iter(plain_ids(tokenizer, [str(prompt) for prompt, _ in texts], opens=True))
    closed = iter(plain_ids(tokenizer, [str(completion) for _, completion in texts]))
    return [
        [(next(opened), False), ([*next(closed), tokenizer.eos_token_id], True)]
        if isinstance(prompt, str)
        else turn_ids(tokenizer, [*prompt, *completion])
        for prompt, completion in zip(prompts, completions, strict=True)
    ]


def text_ids(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Text], completions: Sequence[Text]
) -> list[list[int]]:
    """Ids of each prompt + completion + EOS: what SFT trains on and what the reward model scores."""
    return [flatten_pieces(pieces) for pieces in row_pieces(tokenizer, prompts, completions)]


def turn_ids(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[tuple[list[int], bool]]:
    """Ids of a conversation in pieces, each with whether it is an answer; an answer ends with EOS.

    Where the user spoke last, the last piece opens the answer. Raises DataError for a chat template that renders a
    turn otherwise once more turns follow, or that does not close an answer with EOS.
    """
    pieces: list[tuple[list[int], bool]] = []
    rendered, carried = "", list[int]()
    names = quotable(tokenizer)
    for end in range(len(messages) + 1):
        answers = end < len(messages) and messages[end]["role"] == "assistant"
        if not answers and (end < len(messages) or messages[-1]["role"] == "assistant"):
            continue
        for upto, is_answer in ((end, False), (end + 1, True))[: 1 + answers]:
            text = render(tokenizer, messages[:upto], names, opens_answer=not is_answer)
            if not text.startswith(rendered):
                raise DataError(
                    "the tokenizer's chat template renders a conversation otherwise when it goes on, so its turns "
                    "cannot be told apart; set chat_template in the tokenizer to one that does not"
                )
            ids = carried + quoted_ids(tokenizer, text[len(rendered) :], names)
            rendered, carried = text, []
            if is_answer:
                if tokenizer.eos_token_id not in ids:
                    raise DataError(
                        f"the tokenizer's chat template closes no answer with EOS ('{tokenizer.eos_token}'), so the "
                        "policy could not learn to stop; set eos_token, or chat_template, in the tokenizer"
                    )
                stop = ids.index(tokenizer.eos_token_id) + 1
                ids, carried = ids[:stop], ids[stop:]
            pieces.append((ids, is_answer))
    return pieces


def render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], names: Sequence[str], opens_answer: bool
) -> str:
    """The conversation through the chat template, the given names of special tokens in the messages quoted."""
    if tokenizer.chat_template is None:
        raise DataError(
            "a conversation was given to a tokenizer without a chat template: train it on conversations first"
        )
    special = re.compile("|".join(map(re.escape, names)))
    quoted = [
        message | {"content": special.sub(lambda found: f"\ue000{names.index(found[0])}\ue001", message["content"])}
        for message in messages
    ]
    try:
        text = tokenizer.apply_chat_template(quoted, tokenize=False, add_generation_prompt=opens_answer)
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise DataError(f"the tokenizer's chat template refuses a conversation of {roles}: {error}") from None
    assert isinstance(text, str)
    return text


def quoted_ids(tokenizer: PreTrainedTokenizerBase, rendered: str, names: Sequence[str]) -> list[int]:
    """Ids of rendered text: special tokens of the template are read, those quoted from the messages are not."""
    pieces = QUOTED.split(rendered)
    ids = list[int]()
    for number, piece in enumerate(pieces):
        if number % 2:
            ids += plain_ids(tokenizer, [names[int(piece)]])[0]
        elif piece:
            ids += tokenizer(piece, add_special_tokens=False)["input_ids"]
    return ids


def quotable(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What is quoted in messages: the mark of a quotation itself, and the special tokens' names, longest first."""
    names = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return ["\ue000", *sorted(names, key=len)[::-1]]


def flatten_pieces(pieces: Iterable[tuple[list[int], bool]]) -> list[int]:
    return list(chain.from_iterable(ids for ids, _ in pieces))


def ensure_chat_template(tokenizer: PreTrainedTokenizerBase, rows: Iterable[dict[str, Any]]) -> None:
    """Gives the tokenizer a chat template if the rows hold conversations and it has none."""
    if tokenizer.chat_template is None and any(isinstance(row.get("prompt"), list) for row in rows):
        tokenizer.chat_template = TRANSCRIPT
        print_main('the tokenizer has no chat template: conversations are written as "Human: … Assistant: …", saved with it')


# rows to datasets


def language_rows(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Dataset:
    """`input_ids` of whole texts, each opened by bos and closed by EOS."""
    return Dataset.from_list([{"input_ids": ids} for ids in text_ids(tokenizer, [""] * len(texts), texts)])


def language_stream(
    tokenizer: PreTrainedTokenizerBase, texts: Callable[[], Iterator[str]], seed: int
) -> IterableDataset:
    """The same, read while it is used; rows trade places within ten thousand."""

    def rows() -> Iterator[dict[str, list[int]]]:
        return ({"input_ids": text_ids(tokenizer, [""], [text])[0]} for text in texts())

    return IterableDataset.from_generator(rows).shuffle(seed, buffer_size=10_000)


def completion_rows(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[dict], max_length: int, too_long: str
) -> tuple[Dataset, int]:
    """`input_ids` and `labels` (IGNORED where nothing is learned) of prompt + completion; how many rows were too long.

    Learned are the completion and its EOS; of `every_turn` rows each answer. `too_long` drop leaves a longer row out,
    cut keeps its first tokens, error refuses it.
    """
    encoded = []
    texts = ([row[field] for row in rows] for field in ("prompt", "completion"))
    for row, pieces in zip(rows, row_pieces(tokenizer, *texts), strict=True):
        last = len(pieces) - 1
        learned = [answer and (number == last or row.get("every_turn")) for number, (_, answer) in enumerate(pieces)]
        labels = [ids if learn else [IGNORE_INDEX] * len(ids) for (ids, _), learn in zip(pieces, learned, strict=True)]
        encoded.append({"input_ids": flatten_pieces(pieces), "labels": list(chain.from_iterable(labels))})
    return filter_by_length(encoded, ("input_ids", "labels"), max_length, too_long, lambda row: set(row["labels"]) != {IGNORE_INDEX})


def preference_rows(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[dict], max_length: int, too_long: str
) -> tuple[Dataset, int]:
    """`chosen_ids`, `rejected_ids` and `margin` of pairs of whole texts, and how many pairs were too long."""
    prompts = [row["prompt"] for row in rows]
    chosen, rejected = (text_ids(tokenizer, prompts, [row[side] for row in rows]) for side in ("chosen", "rejected"))
    encoded = [
        {"chosen_ids": better, "rejected_ids": worse, "margin": row["margin"]}
        for row, better, worse in zip(rows, chosen, rejected, strict=True)
    ]
    sides = ("chosen_ids", "rejected_ids")
    return filter_by_length(encoded, sides, max_length, too_long, lambda row: row["chosen_ids"] != row["rejected_ids"])


def filter_by_length(
    rows: list[dict], fields: Sequence[str], max_length: int, too_long: str, is_useful: Callable[[dict], bool]
) -> tuple[Dataset, int]:
    """The rows with at most max_length in each field, and how many were longer; `is_useful` judges a cut one."""
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
    """Prints one decoded row; what carries loss, its labels not IGNORED, stands in [[ ]] and in colour."""
    line = Styled(f"first row, {what} [[ ]]: ")
    start = 0
    for end in range(1, len(ids) + 1):
        if end == len(ids) or (labels[end] == IGNORE_INDEX) != (labels[start] == IGNORE_INDEX):
            text = str(tokenizer.decode(list(ids[start:end]), clean_up_tokenization_spaces=False))
            line.append(text, "dim") if labels[start] == IGNORE_INDEX else line.append(f"[[{text}]]", "bold green")
            start = end
    if is_main():
        console.print(line)


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Text of ids, special tokens left out, spaces as they were."""
    text = tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


def pad_rows(rows: Sequence[Sequence[int]], pad_id: int, side: str) -> tuple[Tensor, Tensor]:
    """(B, S) ids padded on one side, and the boolean mask of the real ones, made from the lengths."""
    ids = [torch.tensor(row, dtype=torch.long) for row in rows]
    real = [torch.ones(len(row), dtype=torch.bool) for row in rows]
    return (
        pad_sequence(ids, batch_first=True, padding_value=pad_id, padding_side=side),
        pad_sequence(real, batch_first=True, padding_value=False, padding_side=side),
    )


def length_batches(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Row numbers in batches of at most `size` rows of like lengths, so that they pad little; short ones first."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    return [order[start : start + size] for start in range(0, len(order), size)]


def prompt_batch(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Text], max_length: int) -> tuple[Tensor, Tensor]:
    """Left-padded prompts (B, P) and their mask; a longer prompt keeps its end (the part that asks)."""
    return pad_rows([ids[-max_length:] for ids in prompt_ids(tokenizer, prompts)], tokenizer.pad_token_id, "left")
