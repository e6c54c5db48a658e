"""The formats of TRL's datasets, and what a stage reads from a row of each.

    text         `text`; or any of the below, read as one text                                      pretrain
    completion   `prompt` + `completion`; `messages`; a pair's `prompt` + `chosen`                  sft
    pair         `chosen` + `rejected`, with or without `prompt` and `margin`                       reward
    prompt       `prompt`; a conversation or pair without its last answer                           ppo, evaluate

A field holds text, or messages ({"role", "content"}; also "from", "value"). Text that opens with "Human:" is a
transcript (Bai et al., arXiv 2204.05862) and becomes messages. An error names the file, the row, the field and a fix.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from trl.data_utils import extract_prompt, maybe_convert_to_chatml

from pipeline.data.sources import DataError, Row, iterate_sources
from pipeline.runtime.console import print_main

Message = dict[str, str]
Text = str | list[Message]
"""Plain text, or a conversation."""

TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")
ROLES = {
    "Human": "user", "human": "user", "gpt": "assistant", "Assistant": "assistant",
    "user": "user", "assistant": "assistant", "system": "system",
}  # fmt: skip
ADVICE = "mend or remove the row, or leave out all such rows with --bad_rows drop"


def read_rows(source: str, kind: str, limit: int = 0, bad_rows: str = "error", seed: int = 0) -> list[dict[str, Any]]:
    """The first `limit` rows of the sources (0: all), with the fields that `kind` names above and each row's others.

    Raises DataError for the first row that cannot be used; with `bad_rows` drop such rows are left out and counted.
    """
    return list(iterate_rows(source, kind, limit, bad_rows, seed))


def iterate_rows(source: str, kind: str, limit: int, bad_rows: str, seed: int) -> Iterator[dict[str, Any]]:
    """The rows of `read_rows` one by one, as they are read."""
    parse = PARSERS[kind]
    used = dropped = 0
    first: DataError | None = None
    preferences: dict[str, tuple[str, str]] = {}
    for row in iterate_sources(source, limit, seed):
        try:
            parsed = parse(row)
            if kind == "pair":
                check_contradiction(row[0], parsed, preferences)
        except DataError as error:
            if bad_rows == "error":
                raise DataError(f"{error}; {ADVICE}") from None
            first, dropped = first or error, dropped + 1
            continue
        used += 1
        yield parsed
    if not used:
        raise DataError(f"{source}: no row of it can be used; the first: {first}")
    if dropped:
        print_main(f"{source}: {dropped:,} rows dropped; the first: {first}")


def parse_text(row: Row) -> dict[str, Any]:
    """`text`: the field itself, or prompt and completion joined."""
    where, fields = row
    if "text" in fields:
        return {**fields, "text": parse_string(where, fields, "text")}
    parsed = parse_completion(row)
    return {"text": full_text(parsed["prompt"], parsed["completion"])}


def parse_completion(row: Row) -> dict[str, Any]:
    """`prompt` and `completion`, both text or both messages; `every_turn` (from `messages`): train on all answers."""
    where, fields = row[0], rename_aliases(row[1])
    if "messages" in fields:
        messages = parse_messages(where, fields, "messages", last="assistant")
        return {**fields, "prompt": messages[:-1], "completion": messages[-1:], "every_turn": True}
    if "chosen" in fields and "completion" not in fields:
        pair = parse_pair(row)
        if not pair["prompt"]:
            raise DataError(f"{where}: prompt: no such field, and chosen is not a conversation; expected a prompt")
        return {**fields, "prompt": pair["prompt"], "completion": pair["chosen"]}
    prompt, completion = parse_prompt_and_answer(where, fields, "completion")
    return {**fields, "prompt": prompt, "completion": completion}


def parse_pair(row: Row) -> dict[str, Any]:
    """`prompt` ('' if there is none), `chosen` and `rejected`, all text or all messages, and `margin` (default 0.0)."""
    where, fields = row[0], rename_aliases(row[1])
    if fields.get("prompt") is not None:
        prompt, chosen = parse_prompt_and_answer(where, fields, "chosen")
        _, rejected = parse_prompt_and_answer(where, fields, "rejected")
    else:
        prompt = ""
        chosen, rejected = (parse_text_or_messages(where, fields, side) for side in ("chosen", "rejected"))
        if isinstance(chosen, list) != isinstance(rejected, list):
            raise DataError(
                f"{where}: rejected: expected the type of chosen, {type_name(chosen)}, got {type_name(rejected)}"
            )
    if chosen == rejected:
        raise DataError(f"{where}: rejected: the same as chosen, so there is nothing to prefer")
    if isinstance(chosen, list) and not prompt:
        parts: dict[str, Any] = extract_prompt({"chosen": chosen, "rejected": rejected})
        prompt, chosen, rejected = parts["prompt"], parts["chosen"], parts["rejected"]
        for side in (chosen, rejected):
            check_roles(where, "chosen" if side is chosen else "rejected", [*prompt, *side], last="assistant")
        if not prompt or len(chosen) > 1 or len(rejected) > 1:
            raise DataError(f"{where}: chosen: expected the conversation of rejected with another last answer")
    margin = fields.get("margin", 0.0)
    try:
        number = math.nan if isinstance(margin, bool) else float(margin)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise DataError(f"{where}: margin: expected a finite number or no such field, got {shorten(margin)}")
    return {**fields, "prompt": prompt, "chosen": chosen, "rejected": rejected, "margin": number}


def parse_prompt(row: Row) -> dict[str, Any]:
    """`prompt`."""
    where, fields = row[0], rename_aliases(row[1])
    if fields.get("prompt") is None:
        fields = parse_completion(row) if {"messages", "chosen"} & fields.keys() else fields
    prompt = parse_text_or_messages(where, fields, "prompt")
    if isinstance(prompt, list):
        check_roles(where, "prompt", prompt, last="user")
    return {**fields, "prompt": prompt}


PARSERS: dict[str, Callable[[Row], dict[str, Any]]] = {
    "text": parse_text,
    "completion": parse_completion,
    "pair": parse_pair,
    "prompt": parse_prompt,
}


def check_contradiction(where: str, pair: dict[str, Any], preferences: dict[str, tuple[str, str]]) -> None:
    """DataError where an earlier row prefers the other of the same two texts.

    `preferences` has for each pair of texts the first row that has it, and which it prefers; this pair is added.
    """
    chosen, rejected = (repr([pair["prompt"], pair[side]]) for side in ("chosen", "rejected"))
    key = "\0".join(sorted((chosen, rejected)))
    first, preferred = preferences.setdefault(key, (where, chosen))
    if preferred != chosen:
        raise DataError(f"{where}: chosen: contradicts {first}, which prefers the other of the same two texts")


# fields


def rename_aliases(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields, with `conversations`, `from` and `value` renamed to `messages`, `role` and `content`."""
    copied = {
        name: [dict(item) if isinstance(item, dict) else item for item in value] if isinstance(value, list) else value
        for name, value in fields.items()
    }
    return maybe_convert_to_chatml(copied)


def parse_string(where: str, fields: dict[str, Any], name: str) -> str:
    value = fields.get(name)
    if not isinstance(value, str) or not value.strip():
        raise field_error(where, fields, name, "text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise DataError(f"{where}: {name}: broken encoding (a lone surrogate)") from None
    return value


def parse_text_or_messages(where: str, fields: dict[str, Any], name: str) -> Text:
    """The field's text or messages; a transcript becomes messages."""
    if isinstance(fields.get(name), list):
        return parse_messages(where, fields, name)
    text = parse_string(where, fields, name)
    return parse_transcript(where, name, text) if text.lstrip().startswith("Human:") else text


def parse_messages(where: str, fields: dict[str, Any], name: str, last: str = "") -> list[Message]:
    """The field's messages, each with a role of ROLES and text; with `last` also in turn, that role last."""
    value = fields.get(name)
    if not isinstance(value, list) or not value:
        raise field_error(where, fields, name, "a list of messages")
    messages = []
    for number, message in enumerate(value, 1):
        place = f"{name}, message {number}"
        if not isinstance(message, dict):
            raise DataError(f"{where}: {place}: expected role and content, got {shorten(message)}")
        if not isinstance(message.get("role"), str) or message["role"] not in ROLES:
            raise DataError(
                f"{where}: {place}: role: expected system, user or assistant, got {shorten(message.get('role'))}"
            )
        messages.append(
            {"role": ROLES[message["role"]], "content": parse_string(f"{where}: {place}", message, "content")}
        )
    if last:
        check_roles(where, name, messages, last)
    return messages


def check_roles(where: str, name: str, messages: list[Message], last: str) -> None:
    """DataError unless an optional system message is followed by user and assistant in turn, up to the role `last`."""
    roles = [message["role"] for message in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    alternates = all(role == ("user", "assistant")[number % 2] for number, role in enumerate(turns))
    if not alternates or turns[-1:] != [last]:
        raise DataError(
            f"{where}: {name}: roles are {', '.join(roles[:8])}; expected user and assistant in turn "
            f"(after an optional system message), {last} last"
        )


def parse_prompt_and_answer(where: str, fields: dict[str, Any], name: str) -> tuple[Text, Text]:
    """The prompt and an answer to it, both text or both messages; text after a transcript is its next message."""
    prompt = parse_text_or_messages(where, fields, "prompt")
    answer: Text = (
        parse_messages(where, fields, name) if isinstance(fields.get(name), list) else parse_string(where, fields, name)
    )
    if isinstance(prompt, str) and isinstance(answer, str):
        return prompt, answer
    if isinstance(prompt, list) and isinstance(answer, str) and isinstance(fields["prompt"], str):
        answer = [{"role": "assistant", "content": answer.strip()}]
    if isinstance(prompt, str) or isinstance(answer, str):
        raise DataError(f"{where}: {name}: expected the type of prompt, {type_name(prompt)}, got {type_name(answer)}")
    check_roles(where, "prompt", prompt, last="user")
    if len(answer) != 1 or answer[0]["role"] != "assistant":
        roles = ", ".join(message["role"] for message in answer)
        raise DataError(f"{where}: {name}: expected one assistant message, got {roles}")
    return prompt, answer


def parse_transcript(where: str, name: str, text: str) -> list[Message]:
    """The messages of a transcript; an empty "Assistant:" at its end is left out."""
    pieces = TURN.split(text.strip())[1:]
    turns = [(ROLES[name], content.strip()) for name, content in zip(pieces[::2], pieces[1::2], strict=True)]
    if turns[-1] == ("assistant", ""):
        turns.pop()
    messages = [{"role": role, "content": content} for role, content in turns]
    for number, message in enumerate(messages, 1):
        if not message["content"]:
            raise DataError(f"{where}: {name}: turn {number} of the transcript is empty")
    check_roles(where, name, messages, messages[-1]["role"])
    return messages


def format_transcript(messages: Iterable[Message]) -> str:
    """The messages as one text, each after its speaker: `Human: ...`, `Assistant: ...`."""
    names = {"user": "Human: ", "assistant": "Assistant: ", "system": ""}
    return "\n\n".join(names[message["role"]] + message["content"] for message in messages)


def full_text(prompt: Text, completion: Text) -> str:
    """Prompt and completion as one text."""
    if isinstance(prompt, str) and isinstance(completion, str):
        return prompt + completion
    return format_transcript([*prompt, *completion])


def display_text(text: Text) -> str:
    """A prompt as it is shown to people: the text, or the content of its last message."""
    return text if isinstance(text, str) else text[-1]["content"]


def field_error(where: str, fields: dict[str, Any], name: str, expected: str) -> DataError:
    if name not in fields:
        return DataError(
            f"{where}: {name}: no such field (it has {', '.join(map(str, fields)) or 'none'}); expected {expected}"
        )
    return DataError(f"{where}: {name}: expected {expected}, got {shorten(fields[name])}")


def shorten(value: Any) -> str:
    return "null" if value is None else f"{value!r:.40}"


def type_name(text: Text) -> str:
    return "text" if isinstance(text, str) else "messages"
