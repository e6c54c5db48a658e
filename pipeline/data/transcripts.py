"""Text that holds a conversation: transcripts are split into messages, what else looks like one is refused.

A transcript opens with "Human:" (Bai et al., arXiv 2204.05862). A turn begins after a blank line, or where none
does, on a new line; line ends are normalised first.
"""

import re
from typing import Any

from pipeline.data.files import DataError
from pipeline.data.messages import (
    Message,
    Text,
    check_roles,
    decode_messages,
    parse_messages,
    parse_string,
)

SPEAKERS = {"Human": "user", "Assistant": "assistant"}
TURN = r"[^\S\n]*(Human|Assistant):"
AFTER_BLANK_LINE = re.compile(rf"(?:\A|\n[^\S\n]*\n){TURN}")
ON_NEW_LINE = re.compile(rf"(?:\A|\n){TURN}")
INSIDE = re.compile(rf"\n{TURN}")
UNSPLIT = re.compile(r"(?:\A|\n)[^\S\n]*#*[^\S\n]*Assistant:|###[^\S\n]*Assistant:")
"""An answer's speaker, in what is to be one message."""
RENDERED = re.compile(r"<\|im_start\|>|<\|start_header_id\|>|<start_of_turn>|<\|(?:user|assistant)\|>|\[INST\]")
"""What chat templates of popular families write between turns."""
MESSAGES = "expected messages (or text that opens with Human:)"


def parse_text_or_messages(where: str, fields: dict[str, Any], name: str) -> Text:
    """The field's messages, also of a transcript or of JSON in text, or its text, which holds no conversation."""
    if isinstance(fields.get(name), (list, dict)):
        return parse_messages(where, fields, name)
    text = parse_string(where, fields, name)
    if decode_messages(where, name, text) is not None:
        return parse_messages(where, fields, name)
    if opens_transcript(text):
        return parse_transcript(where, name, text)
    if marker := RENDERED.search(text):
        raise DataError(f"{where}: {name}: holds {marker[0]}, which a chat template writes and text cannot: {MESSAGES}")
    if {speaker for speaker in ON_NEW_LINE.findall(normal_lines(text))} == set(SPEAKERS):
        raise DataError(
            f"{where}: {name}: holds turns (Human:, Assistant:) after other text: {MESSAGES}, and what stands before "
            "them as a system message"
        )
    return text


def opens_transcript(text: str) -> bool:
    return text.lstrip().startswith("Human:")


def is_talk(where: str, fields: dict[str, Any], name: str) -> bool:
    """Whether the field holds a conversation or a message, right or wrong."""
    value = fields.get(name)
    if isinstance(value, str):
        return opens_transcript(value) or decode_messages(where, name, value) is not None
    return isinstance(value, (list, dict))


def parse_transcript(where: str, name: str, text: str) -> list[Message]:
    """The messages of a transcript; an empty "Assistant:" at its end is left out.

    Raises DataError where turns stand on new lines beside others after blank lines: then which are turns is not known.
    """
    text = normal_lines(text).strip()
    turn = AFTER_BLANK_LINE if len(AFTER_BLANK_LINE.findall(text)) > 1 else ON_NEW_LINE
    _, *pieces = turn.split(text)
    speakers, contents = pieces[::2], pieces[1::2]
    if "Assistant" not in speakers:
        raise DataError(
            f"{where}: {name}: opens with Human:, and no turn of Assistant: follows, so it is not known whether it is "
            f"a transcript: end it with Assistant:, or write messages"
        )
    if unsplit := next(filter(None, map(INSIDE.search, contents)), None):
        raise DataError(
            f"{where}: {name}: {unsplit[1]}: stands on a new line, other turns after a blank line; put a blank line "
            "before every turn, or write messages"
        )
    turns = [(SPEAKERS[speaker], content.strip()) for speaker, content in zip(speakers, contents, strict=True)]
    if turns[-1] == ("assistant", ""):
        turns.pop()
    messages = [{"role": role, "content": content} for role, content in turns]
    for number, message in enumerate(messages, 1):
        if not message["content"]:
            raise DataError(f"{where}: {name}: turn {number} of the transcript is empty")
    check_roles(where, name, messages, messages[-1]["role"])
    return messages


def as_turn(where: str, name: str, role: str, text: str) -> list[Message]:
    """A text as one message; DataError for a user's that holds an answer's speaker, or an answer that opens with it."""
    refuse_unsplit(where, name, text.lstrip().split("\n")[0] if role == "assistant" else text)
    return [{"role": role, "content": text.strip()}]


def refuse_unsplit(where: str, name: str, text: str) -> None:
    """DataError for a text that holds an answer's speaker, and so more than one turn."""
    if UNSPLIT.search(normal_lines(text)):
        raise DataError(f"{where}: {name}: holds Assistant:, so more than one turn: {MESSAGES}")


def normal_lines(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")
