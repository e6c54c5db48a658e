"""Text or conversation: the form of a stage's rows, which its `final/` records and the stages after it hold to."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from pipeline.data.files import DataError
from pipeline.data.messages import Text
from pipeline.runtime.console import print_main
from pipeline.runtime.finished import recorded_form

TEXT, CONVERSATION = "text", "conversation"
WAYS = {
    TEXT: 'write its prompts as messages ([{"role": "user", "content": …}]), or use text in both',
    CONVERSATION: "write its prompts as text, or use conversations in both",
}


def form_of(text: Text) -> str:
    return TEXT if isinstance(text, str) else CONVERSATION


def check_form(rows: Sequence[Mapping[str, Any]], source: str, others: Mapping[str, str]) -> str:
    """The form of the rows of `source`; DataError if some have another, or if one of `others` has (its form by name).

    A policy that was trained on one form answers prompts of the other in a way that nobody trained.
    """
    talks = sum(form_of(row["prompt"]) == CONVERSATION for row in rows)
    if 0 < talks < len(rows):
        raise DataError(
            f"{source}: {talks:,} of its {len(rows):,} rows are conversations, the others are text, which is tokenized "
            "without a chat template: give all of them one form, or leave one kind out"
        )
    form = CONVERSATION if talks else TEXT
    for name, other in others.items():
        if other and other != form:
            raise DataError(f"{source}: the form of its rows is {form}, that of {name} is {other}: {WAYS[form]}")
    return form


def forms_of(parents: Mapping[str, Path]) -> dict[str, str]:
    """What form each parent was trained on, '' where that is not recorded; by name and place."""
    return {f"{name} ({path})": recorded_form(path) for name, path in parents.items()}


def say_template_unused(tokenizer: PreTrainedTokenizerBase, form: str) -> None:
    """One line where there is a chat template, but the rows are text."""
    if form == TEXT and tokenizer.chat_template is not None:
        print_main(
            "the rows are text: the tokenizer's chat template is not used, here or in later stages; for a chat model "
            "give `messages`"
        )
