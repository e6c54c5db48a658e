"""Figures that are measured beside what a stage is for: none of them, if it cannot be computed, ends the stage."""

from collections.abc import Callable
from typing import Any, TypeVar

from pipeline.runtime.console import print_main

Figure = TypeVar("Figure")
NOT_MEASURED = "not measured"


def side_figure(what: str, compute: Callable[..., Figure], *arguments: Any) -> Figure | None:
    """What `compute` gives of the arguments; None, and a printed line that says why, where it raises any error.

    For what comes after the weights are written. Processes that measure together must fail together.
    """
    try:
        return compute(*arguments)
    except Exception as error:
        print_main(f"{what}: {NOT_MEASURED}: {str(error) or type(error).__name__}")
        return None


def show(figure: Any, form: str) -> str:
    """A number, or the value of an estimate, in a format; in words where it was not measured."""
    value = figure["value"] if isinstance(figure, dict) else figure
    return NOT_MEASURED if value is None else format(value, form)
