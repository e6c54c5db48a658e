"""The formats of TRL's datasets, and what a stage reads from a row of each.

    text         `text`; or any of the below, read as one text                                      pretrain
    completion   `messages`; `prompt` + `completion`; a pair's `prompt` + `chosen`; `text` alone    sft
    pair         `chosen` + `rejected`, with or without `prompt` and `margin`                       reward
    prompt       a conversation or pair without its last answer; `prompt`                           ppo, evaluate

What stands first is read where a row has several. A field holds text, or messages; where one of a row holds messages
all become messages. `data.columns` brings other names to these. An error names file, row, field and a fix.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

from pipeline.config.columns import parse_columns
from pipeline.config.dials import Reading
from pipeline.data.answers import parse_answers, parse_conversation, trained_answers
from pipeline.data.bad_rows import BadRows
from pipeline.data.columns import check_found, refuse_unread, rename_columns, standardise, unread_columns
from pipeline.data.files import DataError, Row
from pipeline.data.messages import check_roles, field_error, full_text, parse_string, shorten
from pipeline.data.sources import iterate_sources
from pipeline.data.transcripts import is_talk, parse_text_or_messages, refuse_unsplit
from pipeline.runtime.console import print_main

ADVICE = "mend or remove the row, or leave out all such rows with --bad_rows drop"

Check = Callable[[dict[str, Any]], None]


def read_rows(
    source: str, kind: str, limit: int = 0, reading: Reading = Reading(), seed: int = 0, check: Check | None = None
) -> list[dict[str, Any]]:
    """The first `limit` rows of the sources (0: all), with the fields that `kind` names above and each row's others.

    Raises DataError for the first row that cannot be used; with `bad_rows` drop such rows are left out and counted, and
    it is raised where they are more than `max_bad_rows`. `check` raises it for one that is read but cannot be used all
    the same.
    """
    return list(iterate_rows(source, kind, limit, reading, seed, check))


def iterate_rows(
    source: str, kind: str, limit: int, reading: Reading, seed: int, check: Check | None = None
) -> Iterator[dict[str, Any]]:
    """The rows of `read_rows` one by one, as they are read."""
    parse, names = PARSERS[kind], parse_columns(reading.columns)
    bad, found, others = BadRows(source, reading.max_bad_rows), set[str](), set[str]()
    preferences: dict[str, tuple[str, str]] = {}
    for where, fields in iterate_sources(source, limit, seed):
        try:
            renamed = rename_columns(where, fields, names, found)
            parsed = parse((where, renamed))
            if check is not None:
                check_row(where, parsed, check)
            if kind == "pair":
                check_contradiction(where, parsed, preferences)
        except DataError as error:
            if reading.bad_rows == "error":
                raise DataError(f"{error}; {ADVICE}") from None
            bad.drop(where, error)
            continue
        bad.use()
        others |= unread_columns(renamed)
        yield parsed
    check_found(source, names, found)
    bad.finish()
    if others:
        print_main(f"{source}: columns that are not read: {', '.join(sorted(others))}")


def parse_text(row: Row) -> dict[str, Any]:
    """`text`: the field itself, or prompt and completion joined."""
    where, fields = row
    if fields.get("text") is not None:
        return {**fields, "text": parse_string(where, fields, "text")}
    parsed = parse_completion(row)
    return {"text": full_text(parsed["prompt"], parsed["completion"])}


def parse_completion(row: Row) -> dict[str, Any]:
    """`prompt` and `completion`, both text or both messages.

    `every_turn`: True where all answers of a conversation are trained, or for each of them whether it is; else False.
    """
    where, fields = row[0], standardise(*row)
    refuse_unread(where, fields)
    refuse_label(where, fields)
    if "messages" not in fields and not {"prompt", "completion", "chosen"} & fields.keys() and "text" in fields:
        if not is_talk(where, fields, "text"):
            text = parse_text_or_messages(where, fields, "text")
            refuse_unsplit(where, "text", str(text))
            return {**fields, "prompt": "", "completion": text, "every_turn": False}
        fields["messages"] = fields["text"]
    messages = parse_conversation(where, fields) if "messages" in fields else []
    ends_with_user = messages[-1:] and messages[-1]["role"] == "user"
    if messages and not (ends_with_user and {"completion", "chosen"} & fields.keys()):
        answered = messages[:-1] if ends_with_user and len(messages) > 1 else messages
        check_roles(where, "messages", answered, last="assistant")
        trained = trained_answers(where, fields, "messages")
        return {**fields, "prompt": answered[:-1], "completion": answered[-1:], "every_turn": all(trained) or trained}
    if "chosen" in fields and "completion" not in fields:
        pair = parse_pair((where, fields))
        if not pair["prompt"]:
            raise DataError(f"{where}: prompt: no such field, and chosen is not a conversation; expected a prompt")
        return {**fields, "prompt": pair["prompt"], "completion": pair["chosen"], "every_turn": False}
    prompt, (completion,) = parse_answers(where, fields, ["completion"])
    if not prompt:
        raise field_error(where, fields, "prompt", "text or messages")
    return {**fields, "prompt": prompt, "completion": completion, "every_turn": False}


def parse_pair(row: Row) -> dict[str, Any]:
    """`prompt` ('' if there is none), `chosen` and `rejected`, all text or all messages, and `margin` (default 0.0)."""
    where, fields = row[0], standardise(*row)
    refuse_unread(where, fields)
    if not {"chosen", "rejected"} & fields.keys():
        refuse_other_than_pair(where, fields)
    refuse_label(where, fields)
    prompt, (chosen, rejected) = parse_answers(where, fields, ["chosen", "rejected"])
    if chosen == rejected:
        raise DataError(f"{where}: rejected: the same as chosen, so there is nothing to prefer")
    margin = fields.get("margin", 0.0)
    try:
        number = math.nan if isinstance(margin, bool) else float(margin)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise DataError(f"{where}: margin: expected a finite number or no such field, got {shorten(margin)}")
    return {**fields, "prompt": prompt, "chosen": chosen, "rejected": rejected, "margin": number}


def parse_prompt(row: Row) -> dict[str, Any]:
    """`prompt`."""
    where, fields = row[0], standardise(*row)
    refuse_unread(where, fields)
    talks = [name for name in ("completion", "chosen", "rejected") if is_talk(where, fields, name)]
    prompt, _ = parse_answers(where, fields, talks)
    if not prompt:
        raise field_error(where, fields, "prompt", "text or messages")
    return {**fields, "prompt": prompt}


PARSERS: dict[str, Callable[[Row], dict[str, Any]]] = {
    "text": parse_text,
    "completion": parse_completion,
    "pair": parse_pair,
    "prompt": parse_prompt,
}


def check_row(where: str, parsed: dict[str, Any], check: Check) -> None:
    """`check` of a parsed row; its DataError is given the row's place."""
    try:
        check(parsed)
    except DataError as error:
        raise DataError(f"{where}: {error}") from None


def check_contradiction(where: str, pair: dict[str, Any], preferences: dict[str, tuple[str, str]]) -> None:
    """DataError where an earlier row prefers the other of the same two texts.

    `preferences` has for each pair of texts the first row that has it, and which it prefers; this pair is added.
    """
    chosen, rejected = (repr([pair["prompt"], pair[side]]) for side in ("chosen", "rejected"))
    key = "\0".join(sorted((chosen, rejected)))
    first, preferred = preferences.setdefault(key, (where, chosen))
    if preferred != chosen:
        raise DataError(f"{where}: chosen: contradicts {first}, which prefers the other of the same two texts")


def refuse_label(where: str, fields: dict[str, Any]) -> None:
    """DataError for a label that says, or may say, that an answer is bad; True says that it is good."""
    label = fields.get("label")
    if str(label).lower() in ("false", "0", "1", "0.0", "1.0"):
        raise DataError(
            f"{where}: label: {shorten(label)} may mark an answer as bad (KTO), and no stage trains on labels; keep "
            "the good answers and leave the column out with --columns label="
        )


def refuse_other_than_pair(where: str, fields: dict[str, Any]) -> None:
    """DataError that says what a row is of which a reward model cannot be trained."""
    if "completion" in fields:
        raise DataError(
            f"{where}: chosen: no such field; a reward model compares two answers, and this row has one (as for SFT or "
            "KTO): write pairs of chosen and rejected"
        )
    for name in ("completions", "responses", "answers", "generations", "candidates"):
        if isinstance(fields.get(name), list):
            raise DataError(
                f"{where}: {name}: a list of answers is a pair only where there are two, each with response and "
                "another overall_score; write the pairs that are meant as chosen and rejected"
            )
