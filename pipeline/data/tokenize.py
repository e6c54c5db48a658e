"""From rows to token ids: every stage tokenizes text here.

    prompt      [bos] Just saw this with my              Human: What is up?\n\nAssistant:
    completion                              dad. [eos]                                     The sky. [eos]
    score input [bos] Just saw this with my dad. [eos]   Human: What is up?\n\nAssistant: The sky. [eos]

A prompt and its completion are tokenized apart and joined as ids, in SFT, in reward training and in PPO alike, so the
reward model reads in PPO exactly the ids it was trained on. A conversation goes through the tokenizer's chat template
and is split into segments at its answers, each of which ends with EOS. Masks are made from lengths, never from the
padding id, and text that spells a special token ("<eos>") is not read as that token.
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
from pipeline.data.sources import DataError
from pipeline.runtime.console import console, print_main
from pipeline.runtime.process import is_main

IGNORE_INDEX = -100  # the label of a token that carries no loss (PyTorch's convention)

TRANSCRIPT_TEMPLATE = """{{- bos_token or '' -}}
{%- for message in messages -%}
{%- if message.role == 'user' -%}{{- 'Human: ' + message.content + '\\n\\n' -}}
{%- elif message.role == 'system' -%}{{- message.content + '\\n\\n' -}}
{%- else -%}{{- 'Assistant:' -}}{%- generation -%}{{- ' ' + message.content + eos_token -}}{%- endgeneration -%}
{{- '\\n\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'Assistant:' -}}{%- endif -%}"""
"""The chat template given to a tokenizer that has none (the form of Bai et al., arXiv 2204.05862)."""

PLACEHOLDER = re.compile("\ue000(\\d+)\ue001")
"""Replaces the name of a special token in a message, so that only those of the chat template are read as tokens."""

Segment = tuple[list[int], bool]
"""Token ids, and whether they are an answer."""


# text to ids


def encode_plain(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], opens: bool = False) -> list[list[int]]:
    """Ids of texts in which no special token is read; `opens` puts first what the tokenizer opens a text with (bos)."""
    return tokenizer(list(texts), add_special_tokens=opens, split_special_tokens=True)["input_ids"] if texts else []


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


def chat_segments(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[Segment]:
    """The segments of a conversation; each answer ends with EOS.

    After a last message of the user, the last segment is the start of the answer. Raises DataError for a chat template
    that renders a message differently once more messages follow, or that does not close an answer with EOS.
    """
    segments: list[Segment] = []
    rendered, after_eos = "", list[int]()  # what the template writes after an answer's EOS is in the next segment
    names = placeholder_names(tokenizer)
    for end in range(len(messages) + 1):
        is_before_answer = end < len(messages) and messages[end]["role"] == "assistant"
        if not is_before_answer and (end < len(messages) or messages[-1]["role"] == "assistant"):
            continue
        for stop, is_answer in ((end, False), (end + 1, True))[: 1 + is_before_answer]:
            text = render_chat(tokenizer, messages[:stop], names, opens_answer=not is_answer)
            if not text.startswith(rendered):
                raise DataError(
                    "the tokenizer's chat template renders a conversation otherwise when it goes on, so its turns "
                    "cannot be told apart; set chat_template in the tokenizer to one that does not"
                )
            ids = after_eos + encode_rendered(tokenizer, text[len(rendered) :], names)
            rendered, after_eos = text, []
            if is_answer:
                if tokenizer.eos_token_id not in ids:
                    raise DataError(
                        f"the tokenizer's chat template closes no answer with EOS ('{tokenizer.eos_token}'), so the "
                        "policy could not learn to stop; set eos_token, or chat_template, in the tokenizer"
                    )
                length = ids.index(tokenizer.eos_token_id) + 1
                ids, after_eos = ids[:length], ids[length:]
            segments.append((ids, is_answer))
    return segments


def render_chat(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], names: Sequence[str], opens_answer: bool
) -> str:
    """The conversation through the chat template, with a PLACEHOLDER for each of the names in the messages."""
    if tokenizer.chat_template is None:
        raise DataError(
            "a conversation was given to a tokenizer without a chat template: train it on conversations first"
        )
    pattern = re.compile("|".join(map(re.escape, names)))
    messages = [
        message | {"content": pattern.sub(lambda match: f"\ue000{names.index(match[0])}\ue001", message["content"])}
        for message in messages
    ]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=opens_answer)
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise DataError(f"the tokenizer's chat template refuses a conversation of {roles}: {error}") from None
    assert isinstance(text, str)
    return text


def encode_rendered(tokenizer: PreTrainedTokenizerBase, text: str, names: Sequence[str]) -> list[int]:
    """Ids of `render_chat`'s text: the template's special tokens are read, the placeholders become plain text again."""
    ids = list[int]()
    for number, piece in enumerate(PLACEHOLDER.split(text)):
        if number % 2:
            ids += encode_plain(tokenizer, [names[int(piece)]])[0]
        elif piece:
            ids += tokenizer(piece, add_special_tokens=False)["input_ids"]
    return ids


def placeholder_names(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The names of the special tokens, longest first, after the first character of a placeholder itself."""
    names = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return ["\ue000", *sorted(names, key=len)[::-1]]


def join_segments(segments: Iterable[Segment]) -> list[int]:
    return list(chain.from_iterable(ids for ids, _ in segments))


def ensure_chat_template(tokenizer: PreTrainedTokenizerBase, rows: Iterable[dict[str, Any]]) -> None:
    """Sets the tokenizer's chat template to TRANSCRIPT_TEMPLATE if it has none and a row has a conversation."""
    if tokenizer.chat_template is None and any(isinstance(row.get("prompt"), list) for row in rows):
        tokenizer.chat_template = TRANSCRIPT_TEMPLATE
        print_main(
            'the tokenizer has no chat template: conversations are written as "Human: … Assistant: …", saved with it'
        )


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

    Labels are IGNORE_INDEX outside the completion and its EOS; in an `every_turn` row, outside all answers. `too_long`:
    drop leaves a longer row out, cut keeps its first tokens, error raises DataError.
    """
    encoded = []
    texts = ([row[field] for row in rows] for field in ("prompt", "completion"))
    for row, segments in zip(rows, row_segments(tokenizer, *texts), strict=True):
        last = len(segments) - 1
        trained = [answer and (number == last or row.get("every_turn")) for number, (_, answer) in enumerate(segments)]
        labels = [
            ids if is_trained else [IGNORE_INDEX] * len(ids)
            for (ids, _), is_trained in zip(segments, trained, strict=True)
        ]
        encoded.append({"input_ids": join_segments(segments), "labels": list(chain.from_iterable(labels))})
    fields = ("input_ids", "labels")
    return filter_by_length(encoded, fields, max_length, too_long, lambda row: set(row["labels"]) != {IGNORE_INDEX})


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
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    return [order[start : start + size] for start in range(0, len(order), size)]


def prompt_batch(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Text], max_length: int) -> tuple[Tensor, Tensor]:
    """Left-padded prompts (B, P) and their mask; of a longer prompt its last max_length tokens."""
    return pad_rows([ids[-max_length:] for ids in prompt_ids(tokenizer, prompts)], tokenizer.pad_token_id, "left")
