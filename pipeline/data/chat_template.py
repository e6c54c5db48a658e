"""Conversations to ids: what a chat template writes, cut into segments at its answers.

A template comes with a model and is a program (jinja, in transformers' sandbox): it renders under a limit of time and
of memory, and whatever it raises is an error of the row that it was given.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from trl import get_training_chat_template

from pipeline.data.files import DataError
from pipeline.data.messages import Message
from pipeline.data.tokenizer import encode_plain, first_line
from pipeline.runtime.console import print_main
from pipeline.runtime.limits import limited

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

RENDERING_SECONDS, RENDERING_MEMORY = 10.0, 2**30
"""What a template may take to render one conversation: time, and bytes."""
MOST_ADDED = 10**7
"""Characters that a template may write beyond those of the messages."""

PROBE = [{"role": role, "content": "a"} for role in ("user", "assistant", "user", "assistant")]
ANOTHER = "give another with --chat_template FILE"

Segment = tuple[list[int], bool]
"""Token ids, and whether they are an answer."""


class ChangingTemplate(DataError):
    """A chat template that renders a message otherwise once more messages follow."""


def chat_segments(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[Segment]:
    """The segments of a conversation; each answer ends with EOS.

    After a last message of the user, the last segment is the start of the answer. Raises DataError for a chat template
    that does not close an answer with EOS, and as `rendered_segments`.
    """
    segments: list[Segment] = []
    names = placeholder_names(tokenizer)
    after_eos = list[int]()  # what the template writes after an answer's EOS is in the next segment
    for text, is_answer in rendered_segments(tokenizer, messages, names):
        ids, after_eos = after_eos + encode_rendered(tokenizer, text, names), []
        if is_answer:
            if tokenizer.eos_token_id not in ids:
                raise no_eos_error(tokenizer, ids)
            length = ids.index(tokenizer.eos_token_id) + 1
            ids, after_eos = ids[:length], ids[length:]
        segments.append((ids, is_answer))
    return segments


def rendered_segments(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], names: Sequence[str]
) -> Iterator[tuple[str, bool]]:
    """What the chat template writes up to each answer and as the answer, in turn, and whether it is one.

    Raises DataError for a template that refuses the conversation, and ChangingTemplate.
    """
    rendered = ""
    for end in range(len(messages) + 1):
        is_before_answer = end < len(messages) and messages[end]["role"] == "assistant"
        if not is_before_answer and (end < len(messages) or messages[-1]["role"] == "assistant"):
            continue
        for stop, is_answer in ((end, False), (end + 1, True))[: 1 + is_before_answer]:
            text = render_chat(tokenizer, messages[:stop], names, opens_answer=not is_answer)
            if not text.startswith(rendered):
                raise ChangingTemplate(
                    "the tokenizer's chat template renders a conversation otherwise when it goes on, so its turns "
                    f"cannot be told apart; {ANOTHER}"
                )
            yield text[len(rendered) :], is_answer
            rendered = text


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
        with limited(RENDERING_SECONDS, RENDERING_MEMORY):
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=opens_answer)
    except Exception as error:  # the template is a program: it may raise anything
        talk = f"a conversation of {', '.join(message['role'] for message in messages)}"
        why = rendering_failure(error, talk)
        raise DataError(f"the tokenizer's chat template {why}; mend the conversation, or {ANOTHER}") from None
    assert isinstance(text, str)
    if len(text) > MOST_ADDED + sum(len(message["content"]) for message in messages):
        raise DataError(f"the tokenizer's chat template writes {len(text):,} characters for a conversation; {ANOTHER}")
    return text


def rendering_failure(error: Exception, talk: str) -> str:
    if isinstance(error, TimeoutError):
        return f"is not done with {talk} after {RENDERING_SECONDS:g} seconds"
    if isinstance(error, MemoryError):
        return f"takes more than {RENDERING_MEMORY / 2**20:,.0f} MiB for {talk}"
    reason = first_line(error).rstrip(".")
    return f"refuses {talk}: {reason}" if isinstance(error, TemplateError) else f"fails on {talk}: {reason}"


def no_eos_error(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> DataError:
    """Of an answer that does not end with EOS, with the dial that makes its own last special token EOS."""
    special = tokenizer.added_tokens_decoder
    ends = [special[index].content for index in ids if index in special]
    way = f'say --eos_token "{ends[-1]}", which it closes answers with' if ends else ANOTHER
    return DataError(
        f"the tokenizer's chat template closes no answer with EOS ('{tokenizer.eos_token}'), so the policy could not "
        f"learn to stop: {way}"
    )


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


# which template


def ensure_chat_template(tokenizer: PreTrainedTokenizerBase, rows: Iterable[Mapping[str, Any]]) -> None:
    """Where a row has a conversation, gives the tokenizer a template that it can be trained on, and says so.

    TRANSCRIPT_TEMPLATE if it has none; TRL's training template of its family if its own renders a conversation
    otherwise when it goes on (Qwen3's drops the reasoning of earlier answers). The tokenizer is saved with it.
    """
    if not any(isinstance(row.get("prompt"), list) for row in rows):
        return
    if tokenizer.chat_template is None:
        tokenizer.chat_template = TRANSCRIPT_TEMPLATE
        print_main(
            'the tokenizer has no chat template: conversations are written as "Human: … Assistant: …", saved with it'
        )
    elif not keeps_beginnings(tokenizer) and (template := training_template(tokenizer)):
        tokenizer.chat_template = template
        print_main(
            "the tokenizer's chat template renders a conversation otherwise when it goes on: TRL's training template "
            "of its family is used, saved with it"
        )


def keeps_beginnings(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template renders a conversation's beginning the same when it goes on."""
    try:
        list(rendered_segments(tokenizer, PROBE, placeholder_names(tokenizer)))
    except ChangingTemplate:
        return False
    except DataError:
        pass  # it refuses the probe; whether it takes the rows is seen there
    return True


def training_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """TRL's training template for the tokenizer's own chat template; None if TRL has none, or one that is no better."""
    own = tokenizer.chat_template
    try:
        with limited(RENDERING_SECONDS, RENDERING_MEMORY):
            tokenizer.chat_template = get_training_chat_template(tokenizer)
        return tokenizer.chat_template if tokenizer.chat_template and keeps_beginnings(tokenizer) else None
    except Exception:  # a ValueError of TRL's, or whatever the template raises
        return None
    finally:
        tokenizer.chat_template = own


def conversation_check(tokenizer: PreTrainedTokenizerBase, *answers: str) -> Callable[[Mapping[str, Any]], None]:
    """What `read_rows` is to check of each row: that the chat template takes its conversation, with each of `answers`.

    At the first conversation the tokenizer gets a template that it can be trained on.
    """
    names: list[str] = []

    def check(row: Mapping[str, Any]) -> None:
        if not isinstance(row["prompt"], list):
            return
        if not names:
            ensure_chat_template(tokenizer, [row])
            names.extend(placeholder_names(tokenizer))
        for answer in [row[name] for name in answers] or [[]]:
            list(rendered_segments(tokenizer, [*row["prompt"], *answer], names))

    return check
