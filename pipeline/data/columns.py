"""From the columns of popular data sets to the fields of TRL's formats.

    instruction | question | query (+ input, context)       a prompt: one turn of the user
    response | output | answer                              a completion: one turn of the assistant
    conversations | conversation                            messages
    system | system_prompt                                  system: the first message
    response_0 + response_1 + better_response_id            chosen, rejected
    completions: two, each with response and score          chosen, rejected

`prompt`, `completion`, `chosen` and `rejected` stay text where they are text. The dial `columns` names everything else;
a column that changes what a row means and is not read is refused, never passed over.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from pipeline.data.files import DataError
from pipeline.data.messages import decode_messages, is_given, shorten, unread
from pipeline.data.transcripts import as_turn, is_talk

QUESTIONS = ("instruction", "question", "query")
ADDITIONS = ("input", "context")
ANSWERS = ("response", "output", "answer")
SYSTEMS = ("system", "system_prompt")
CONVERSATIONS = ("messages", "conversations", "conversation")
OF_MESSAGES = ("prompt", "completion", "chosen", "rejected", *CONVERSATIONS)
"""Columns that may hold messages."""

MEANINGFUL = (
    *QUESTIONS, *ADDITIONS, *SYSTEMS, "history", "tools", "functions", "tool_calls", "images", "image", "audios",
    "audio", "videos", "video", "reasoning_content", "reasoning", "thinking", "choices", "options", "passage",
    "article", "document", "documents", "knowledge", "chat_template_kwargs",
)  # fmt: skip
"""Columns that change what a row means: refused where they are not used."""

READ = {
    *OF_MESSAGES, *MEANINGFUL, *ANSWERS, "text", "margin", "label", "weight", "source", "key", "response_0",
    "response_1", "better_response_id", "completions",
}  # fmt: skip


def rename_columns(where: str, fields: Mapping[str, Any], names: Mapping[str, str], found: set[str]) -> dict[str, Any]:
    """The fields under the names that `names` gives them ('' leaves one out), in messages too.

    What of `names` the row has is added to `found`. Raises DataError where a row has a field of such a name already.
    """
    if not names:
        return dict(fields)
    renamed = rename_keys(where, fields, names, found)
    for name in renamed.keys() & set(OF_MESSAGES):
        value = renamed[name]
        if isinstance(value, str):
            value = decode_messages(where, name, value) or value
        items = value if isinstance(value, list) else [value]
        inner = [
            rename_keys(f"{where}: {name}", item, names, found) if isinstance(item, dict) else item for item in items
        ]
        renamed[name] = inner if isinstance(value, list) else inner[0]
    return renamed


def rename_keys(where: str, fields: Mapping[str, Any], names: Mapping[str, str], found: set[str]) -> dict[str, Any]:
    found |= fields.keys() & names.keys()
    kept = {name: value for name, value in fields.items() if name not in names and value is not None}
    for theirs, ours in names.items():
        if ours and fields.get(theirs) is not None:
            if ours in kept:
                raise DataError(
                    f"{where}: {ours}: columns says {ours}={theirs}, and there is a field {ours} too; leave one "
                    f"out, for example --columns {ours}=,{ours}={theirs}"
                )
            kept[ours] = fields[theirs]
    return kept


def standardise(where: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The row under TRL's names, without nulls. Raises DataError where columns of one meaning differ."""
    fields = {name: value for name, value in fields.items() if value is not None}
    merge_aliases(where, fields, CONVERSATIONS, "messages")
    merge_aliases(where, fields, SYSTEMS, "system")
    merge_question(where, fields)
    if {"response_0", "response_1", "better_response_id"} <= fields.keys():
        better = fields["better_response_id"]
        if better not in (0, 1, "0", "1"):
            raise DataError(f"{where}: better_response_id: expected 0 or 1, got {shorten(better)}")
        set_pair(where, fields, [fields[f"response_{number}"] for number in (int(better), 1 - int(better))])
    elif scored := scored_answers(fields.get("completions")):
        (first, high), (second, low) = scored
        if high != low:
            set_pair(where, fields, [first, second] if high > low else [second, first])
    if not {"messages", "chosen", "rejected"} & fields.keys():
        merge_answer(where, fields)
    return fields


def take(where: str, fields: dict[str, Any], names: Sequence[str]) -> Any:
    """Takes the columns of one meaning out of the fields: their value, empty or None where none says anything."""
    given = {name: fields.pop(name) for name in names if name in fields}
    said = {name: value for name, value in given.items() if is_given(value)}
    if not said:
        return next(iter(given.values()), None)
    first, *others = said
    for name in others:
        if said[name] != said[first]:
            raise DataError(
                f"{where}: {name}: another than {first}, which means the same here; leave one out, for example "
                f"--columns {name}="
            )
    return said[first]


def merge_aliases(where: str, fields: dict[str, Any], names: Sequence[str], ours: str) -> None:
    value = take(where, fields, names)
    if value is not None:
        fields[ours] = value


def merge_question(where: str, fields: dict[str, Any]) -> None:
    """A question with what is added to it becomes the prompt, a turn of the user."""
    name = next((name for name in QUESTIONS if is_given(fields.get(name))), "input")
    question = take(where, fields, QUESTIONS)
    if not is_given(question) and not {"prompt", "messages"} & fields.keys():
        question = fields.pop("input", question)
    if question is None or ("messages" in fields and not is_given(question)):
        return
    if isinstance(question, str) and is_given(question):
        added = [fields.pop(name) for name in ADDITIONS if isinstance(fields.get(name), str)]
        question = "\n\n".join([question, *filter(is_given, added)])
    if not is_given(fields.get("prompt")):
        fields["prompt"] = turn_of(where, name, "user", question)
    elif is_given(question) and squeezed(question) != squeezed(fields["prompt"]):
        raise DataError(f"{where}: {name}: another than prompt; leave one out, for example --columns {name}=")


def merge_answer(where: str, fields: dict[str, Any]) -> None:
    """An answer becomes the completion, a turn of the assistant."""
    name = next((name for name in ANSWERS if is_given(fields.get(name))), ANSWERS[0])
    answer = take(where, fields, ANSWERS)
    if answer is None:
        return
    if not is_given(fields.get("completion")):
        fields["completion"] = turn_of(where, name, "assistant", answer)
    elif is_given(answer) and squeezed(answer) != squeezed(fields["completion"]):
        raise DataError(f"{where}: {name}: another than completion; leave one out, for example --columns {name}=")


def set_pair(where: str, fields: dict[str, Any], answers: Sequence[Any]) -> None:
    """The better and the worse answer as chosen and rejected, where the row has none."""
    for side, answer in zip(("chosen", "rejected"), answers, strict=True):
        fields.setdefault(side, turn_of(where, side, "assistant", answer))


def scored_answers(value: Any) -> list[tuple[Any, float]] | None:
    """Two answers with their scores, of a list like UltraFeedback's `completions`; None for anything else."""
    if not isinstance(value, list) or len(value) != 2 or not all(isinstance(item, dict) for item in value):
        return None
    scored = [(item.get("response"), item.get("overall_score", item.get("score"))) for item in value]
    is_scored = all(isinstance(score, (int, float)) and isinstance(text, str) for text, score in scored)
    return scored if is_scored else None


def turn_of(where: str, name: str, role: str, value: Any) -> Any:
    """A text as a list of one message; a transcript, messages and what is no text as they are."""
    is_plain = isinstance(value, str) and is_given(value) and not is_talk(where, {name: value}, name)
    return as_turn(where, name, role, value) if is_plain else value


def squeezed(value: Any) -> Any:
    return value.strip() if isinstance(value, str) else value


def refuse_unread(where: str, fields: Mapping[str, Any]) -> None:
    """DataError for a column that changes what the row means and is not used."""
    for name in MEANINGFUL:
        if name != "system" and is_given(fields.get(name)):
            raise DataError(f"{where}: {unread(name)}")
    if fields.get("weight", 1) != 1:
        raise DataError(f"{where}: {unread('weight')}")


def unread_columns(fields: Mapping[str, Any]) -> set[str]:
    """Columns of a row that no stage reads."""
    return set(map(str, fields)) - READ


def check_found(source: str, names: Mapping[str, str], found: Collection[str]) -> None:
    """DataError for a column that the dial names and no row of the source has."""
    if missing := [name for name in names if name not in found]:
        raise DataError(
            f"{source}: columns: no row that was read has a field {', '.join(missing)}; leave that entry out, or mend "
            "its name (the dial is for every file of the stage)"
        )
