"""What a row means: the formats of TRL, and what a stage makes of each.

    text         `text`; or any of the below, read as one text                                      pretrain
    completion   `prompt` + `completion`; `messages`; a pair's `prompt` + `chosen`                  sft
    pair         `chosen` + `rejected`, with or without `prompt` and `margin`                       reward
    prompt       `prompt`; a conversation or pair without its last answer                           ppo, evaluate

A field holds text, or messages ({"role", "content"}; also "from", "value"). Text that opens with "Human:" is a
transcript (Bai et al., arXiv 2204.05862) and becomes messages. An error names file, row, field and how to mend it.
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
MEND = "mend or remove the row, or leave out all such rows with --bad_rows drop"


def read_rows(source: str, kind: str, limit: int = 0, bad_rows: str = "error", seed: int = 0) -> list[dict[str, Any]]:
    """Rows of the sources in the form that `kind` names (see above), each with its other fields; the first `limit`.

    Raises DataError for the first row that cannot be used; with `bad_rows` drop such rows are left out and counted.
    """
    return list(iterate_rows(source, kind, limit, bad_rows, seed))


def iterate_rows(source: str, kind: str, limit: int, bad_rows: str, seed: int) -> Iterator[dict[str, Any]]:
    """The rows of `read_rows` one by one, as they are read."""
    conform = FORMS[kind]
    used = dropped = 0
    first: DataError | None = None
    seen: dict[str, tuple[str, str]] = {}
    for row in iterate_sources(source, limit, seed):
        try:
            form = conform(row)
            if kind == "pair":
                refuse_contradiction(row[0], form, seen)
        except DataError as error:
            if bad_rows == "error":
                raise DataError(f"{error}; {MEND}") from None
            first, dropped = first or error, dropped + 1
            continue
        used += 1
        yield form
    if not used:
        raise DataError(f"{source}: no row of it can be used; the first: {first}")
    if dropped:
        print_main(f"{source}: {dropped:,} rows dropped; the first: {first}")


def as_text(row: Row) -> dict[str, Any]:
    """`text`: the field itself, or the row's other texts joined."""
    where, fields = row
    if "text" in fields:
        return {**fields, "text": text_field(where, fields, "text")}
    form = as_completion(row)
    return {"text": full_text(form["prompt"], form["completion"])}


def as_completion(row: Row) -> dict[str, Any]:
    """`prompt` and `completion`, of one type; of `messages`, `every_turn` says that all answers are to be learned."""
    where, fields = row[0], apply_aliases(row[1])
    if "messages" in fields:
        messages = conversation(where, fields, "messages", last="assistant")
        return {**fields, "prompt": messages[:-1], "completion": messages[-1:], "every_turn": True}
    if "chosen" in fields and "completion" not in fields:
        pair = as_pair(row)
        if not pair["prompt"]:
            raise DataError(f"{where}: prompt: no such field, and chosen is not a conversation; expected a prompt")
        return {**fields, "prompt": pair["prompt"], "completion": pair["chosen"]}
    prompt, completion = prompt_and(where, fields, "completion")
    return {**fields, "prompt": prompt, "completion": completion}


def as_pair(row: Row) -> dict[str, Any]:
    """`prompt` ('' when there is none), `chosen` and `rejected`, of one type, and `margin` (0.0 when there is none)."""
    where, fields = row[0], apply_aliases(row[1])
    if fields.get("prompt") is not None:
        (prompt, chosen), (_, rejected) = (prompt_and(where, fields, side) for side in ("chosen", "rejected"))
    else:
        prompt = ""
        chosen, rejected = (either_field(where, fields, side) for side in ("chosen", "rejected"))
        if isinstance(chosen, list) != isinstance(rejected, list):
            raise DataError(f"{where}: rejected: expected the type of chosen, {_type(chosen)}, got {_type(rejected)}")
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
        raise DataError(f"{where}: margin: expected a finite number or no such field, got {_shown(margin)}")
    return {**fields, "prompt": prompt, "chosen": chosen, "rejected": rejected, "margin": number}


def as_prompt(row: Row) -> dict[str, Any]:
    """`prompt`."""
    where, fields = row[0], apply_aliases(row[1])
    if fields.get("prompt") is None:
        fields = as_completion(row) if {"messages", "chosen"} & fields.keys() else fields
    prompt = either_field(where, fields, "prompt")
    if isinstance(prompt, list):
        check_roles(where, "prompt", prompt, last="user")
    return {**fields, "prompt": prompt}


FORMS: dict[str, Callable[[Row], dict[str, Any]]] = {
    "text": as_text,
    "completion": as_completion,
    "pair": as_pair,
    "prompt": as_prompt,
}


def refuse_contradiction(where: str, pair: dict[str, Any], seen: dict[str, tuple[str, str]]) -> None:
    """DataError for a pair whose texts an earlier row, kept in `seen`, prefers the other way round."""
    chosen, rejected = (repr([pair["prompt"], pair[side]]) for side in ("chosen", "rejected"))
    key = "\0".join(sorted((chosen, rejected)))
    first, better = seen.setdefault(key, (where, chosen))
    if better != chosen:
        raise DataError(f"{where}: chosen: contradicts {first}, which prefers the other of the same two texts")


# fields


def apply_aliases(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields with `conversations`, `from` and `value` under TRL's names."""
    copied = {
        name: [dict(item) if isinstance(item, dict) else item for item in value] if isinstance(value, list) else value
        for name, value in fields.items()
    }
    return maybe_convert_to_chatml(copied)


def text_field(where: str, fields: dict[str, Any], name: str) -> str:
    value = fields.get(name)
    if not isinstance(value, str) or not value.strip():
        raise _wrong(where, fields, name, "text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise DataError(f"{where}: {name}: broken encoding (a lone surrogate)") from None
    return value


def either_field(where: str, fields: dict[str, Any], name: str) -> Text:
    """Text or messages; a transcript becomes messages."""
    if isinstance(fields.get(name), list):
        return conversation(where, fields, name)
    text = text_field(where, fields, name)
    return turns(where, name, text) if text.lstrip().startswith("Human:") else text


def conversation(where: str, fields: dict[str, Any], name: str, last: str = "") -> list[Message]:
    """Messages with known roles and text in each; in order, and ending with the role `last`, where that is given."""
    value = fields.get(name)
    if not isinstance(value, list) or not value:
        raise _wrong(where, fields, name, "a list of messages")
    messages = []
    for number, message in enumerate(value, 1):
        place = f"{name}, message {number}"
        if not isinstance(message, dict):
            raise DataError(f"{where}: {place}: expected role and content, got {_shown(message)}")
        if not isinstance(message.get("role"), str) or message["role"] not in ROLES:
            raise DataError(
                f"{where}: {place}: role: expected system, user or assistant, got {_shown(message.get('role'))}"
            )
        messages.append(
            {"role": ROLES[message["role"]], "content": text_field(f"{where}: {place}", message, "content")}
        )
    if last:
        check_roles(where, name, messages, last)
    return messages


def check_roles(where: str, name: str, messages: list[Message], last: str) -> None:
    """DataError unless an optional system message is followed by user and assistant in turn, up to the role `last`."""
    roles = [message["role"] for message in messages]
    spoken = roles[1:] if roles[:1] == ["system"] else roles
    in_turn = all(role == ("user", "assistant")[place % 2] for place, role in enumerate(spoken))
    if not in_turn or spoken[-1:] != [last]:
        raise DataError(
            f"{where}: {name}: roles are {', '.join(roles[:8])}; expected user and assistant in turn "
            f"(after an optional system message), {last} last"
        )


def prompt_and(where: str, fields: dict[str, Any], name: str) -> tuple[Text, Text]:
    """The prompt and an answer to it, both text or both messages (text answers a transcript as its next turn)."""
    prompt = either_field(where, fields, "prompt")
    answer: Text = (
        conversation(where, fields, name) if isinstance(fields.get(name), list) else text_field(where, fields, name)
    )
    if isinstance(prompt, str) and isinstance(answer, str):
        return prompt, answer
    if isinstance(prompt, list) and isinstance(answer, str) and isinstance(fields["prompt"], str):
        answer = [{"role": "assistant", "content": answer.strip()}]
    if isinstance(prompt, str) or isinstance(answer, str):
        raise DataError(f"{where}: {name}: expected the type of prompt, {_type(prompt)}, got {_type(answer)}")
    check_roles(where, "prompt", prompt, last="user")
    if len(answer) != 1 or answer[0]["role"] != "assistant":
        roles = ", ".join(message["role"] for message in answer)
        raise DataError(f"{where}: {name}: expected one assistant message, got {roles}")
    return prompt, answer


def turns(where: str, name: str, text: str) -> list[Message]:
    """Messages of a transcript; its last "Assistant:" may wait for an answer."""
    pieces = TURN.split(text.strip())[1:]
    spoken = [(ROLES[who], said.strip()) for who, said in zip(pieces[::2], pieces[1::2], strict=True)]
    if spoken[-1] == ("assistant", ""):
        spoken.pop()
    messages = [{"role": role, "content": content} for role, content in spoken]
    for number, message in enumerate(messages, 1):
        if not message["content"]:
            raise DataError(f"{where}: {name}: turn {number} of the transcript is empty")
    check_roles(where, name, messages, messages[-1]["role"])
    return messages


def transcript(messages: Iterable[Message]) -> str:
    """The conversation as one text."""
    names = {"user": "Human: ", "assistant": "Assistant: ", "system": ""}
    return "\n\n".join(names[message["role"]] + message["content"] for message in messages)


def full_text(prompt: Text, completion: Text) -> str:
    """Prompt and completion as one text."""
    if isinstance(prompt, str) and isinstance(completion, str):
        return prompt + completion
    return transcript([*prompt, *completion])


def display_text(text: Text) -> str:
    """A prompt as people read it: text, or the last thing asked."""
    return text if isinstance(text, str) else text[-1]["content"]


def _wrong(where: str, fields: dict[str, Any], name: str, expected: str) -> DataError:
    if name not in fields:
        return DataError(
            f"{where}: {name}: no such field (it has {', '.join(map(str, fields)) or 'none'}); expected {expected}"
        )
    return DataError(f"{where}: {name}: expected {expected}, got {_shown(fields[name])}")


def _shown(value: Any) -> str:
    return "null" if value is None else f"{value!r:.40}"


def _type(text: Text) -> str:
    return "text" if isinstance(text, str) else "messages"
