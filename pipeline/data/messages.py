"""Text and messages: what a field of a row holds, and where an error says it is.

A message has a role of ROLES and content. Read are also ShareGPT's `from` and `value`, one message without a list
around it, turns as {"human": …, "assistant": …}, content in parts that are all text, and a list that is JSON in text.
"""

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

from pipeline.data.files import DataError

Message = dict[str, str]
Text = str | list[Message]
"""Plain text, or a conversation."""

ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "bot": "assistant",
    "ai": "assistant",
}  # fmt: skip
"""Of each role, in lower case, the one it is here."""

MEANINGFUL = (
    "tool_calls", "function_call", "tool_call_id", "tools", "reasoning_content", "reasoning", "thinking", "images",
    "image", "audio", "videos", "video", "name",
)  # fmt: skip
"""Fields of a message that change what it says and are not read."""

MESSAGES_AS_TEXT = re.compile(
    r"""\s*\[\s*\{(?=.*["'](role|from)["']\s*:)(?=.*["'](content|value)["']\s*:).*\]\s*""", re.DOTALL
)


# fields


def is_given(value: Any) -> bool:
    """Whether a field says anything: null, blank text and an empty list, also as JSON text, do not."""
    return value not in (None, [], {}) and not (isinstance(value, str) and value.strip() in ("", "[]", "{}", "null"))


def parse_string(where: str, fields: dict[str, Any], name: str) -> str:
    """The field's text, which is not blank."""
    value = fields.get(name)
    if not isinstance(value, str) or not value.strip():
        raise field_error(where, fields, name, "text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise DataError(f"{where}: {name}: broken encoding (a lone surrogate)") from None
    return value


def field_error(where: str, fields: dict[str, Any], name: str, expected: str) -> DataError:
    if fields.get(name) is None:
        given = ", ".join(str(key) for key, value in fields.items() if value is not None) or "none"
        return DataError(
            f"{where}: {name}: no such field (it has {given}); expected {expected}, "
            f"or its column named by --columns {name}=…"
        )
    return DataError(f"{where}: {name}: expected {expected}, got {shorten(fields[name])}")


def shorten(value: Any) -> str:
    return "null" if value is None else f"{value!r:.40}"


# messages


def parse_messages(where: str, fields: dict[str, Any], name: str) -> list[Message]:
    """The field's messages, each with a role of ROLES and text; an empty system message is none."""
    messages = []
    for number, message in enumerate(raw_messages(where, fields, name), 1):
        place = f"{where}: {name}, message {number}"
        role = parse_role(place, message)
        for key in MEANINGFUL:
            if is_given(message.get(key)):
                raise DataError(f"{place}: {unread(key)}")
        content = join_parts(place, either(place, message, "content", "value"))
        if role == "system" and not is_given(content):
            continue
        messages.append({"role": role, "content": parse_string(place, {"content": content}, "content")})
    return messages


def parse_weights(where: str, fields: dict[str, Any], name: str) -> list[bool]:
    """Whether each answer of the field's messages is trained: its `weight`, 0 or 1, where it has one."""
    trained = []
    for number, message in enumerate(raw_messages(where, fields, name), 1):
        place = f"{where}: {name}, message {number}"
        weight = message.get("weight", 1)
        if weight not in (None, 0, 1):
            raise DataError(f"{place}: weight: expected 0 or 1, got {shorten(weight)}")
        if parse_role(place, message) == "assistant":
            trained.append(weight != 0)
    return trained


def raw_messages(where: str, fields: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """The field's list of objects, read from JSON text and from turns; a single object is a list of one."""
    value = fields.get(name)
    if isinstance(value, str):
        value = decode_messages(where, name, value)
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list) or not value:
        raise field_error(where, fields, name, "a list of messages")
    messages = list(expand_turns(value))
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict):
            raise DataError(
                f"{where}: {name}, message {number}: expected role and content, got {shorten(message)}; a list is a "
                "conversation, so give one answer as text"
            )
    return messages


def parse_role(where: str, message: dict[str, Any]) -> str:
    given = either(where, message, "role", "from")
    role = ROLES.get(given.strip().lower()) if isinstance(given, str) else None
    if role is None:
        raise DataError(f"{where}: role: expected system, user or assistant, got {shorten(given)}")
    return role


def either(where: str, message: dict[str, Any], name: str, other: str) -> Any:
    """The field under one of two names; DataError if both are there and differ."""
    first, second = message.get(name), message.get(other)
    if first is not None and second is not None and first != second:
        raise DataError(f"{where}: {other}: expected the same as {name} or no such field, got {shorten(second)}")
    return second if first is None else first


def join_parts(where: str, content: Any) -> Any:
    """Content in parts as one text, without anything between them, as chat templates write it; other content as it is.

    DataError for a part that is not text.
    """
    if not isinstance(content, list) or not content:
        return content
    texts = []
    for number, part in enumerate(content, 1):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            what = shorten(part if kind is None else kind)
            raise DataError(f"{where}: content, part {number}: expected a part of type text, got {what}")
        texts.append(parse_string(f"{where}: content, part {number}", part, "text"))
    return "".join(texts)


def expand_turns(value: Iterable[Any]) -> Iterator[Any]:
    """The messages of a list, an item like {"human": …, "assistant": …} as one for each of its keys."""
    for item in value:
        given = {key: text for key, text in item.items() if text is not None} if isinstance(item, dict) else {}
        if given and all(isinstance(key, str) and key.lower() in ROLES for key in given):
            yield from ({"role": key, "content": text} for key, text in given.items())
        else:
            yield item


def decode_messages(where: str, name: str, text: str) -> list[Any] | None:
    """The messages that a text is as JSON, None for any other text; DataError for a list that Python has printed."""
    if not MESSAGES_AS_TEXT.fullmatch(text):
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise DataError(
            f"{where}: {name}: a list of messages as text that is not JSON, as Python prints it; write the file with "
            "json.dumps, or as parquet"
        ) from None
    return value if isinstance(value, list) and all(isinstance(item, dict) for item in value) else None


def unread(name: str) -> str:
    """What is said of a field that changes the meaning and is not read."""
    return f"{name}: it changes what the row means and is not read; leave it out on purpose with --columns {name}="


def check_roles(where: str, name: str, messages: list[Message], last: str) -> None:
    """DataError unless an optional system message is followed by user and assistant in turn, up to the role `last`."""
    roles = [message["role"] for message in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    alternates = all(role == ("user", "assistant")[number % 2] for number, role in enumerate(turns))
    if not alternates or turns[-1:] != [last]:
        raise DataError(
            f"{where}: {name}: roles are {', '.join(roles[:8]) or 'none'}; expected user and assistant in turn "
            f"(after an optional system message), {last} last"
        )


# one text


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


def type_name(text: Text) -> str:
    return "text" if isinstance(text, str) else "messages"
