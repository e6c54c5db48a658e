"""A dial with its value: where it stands in a config, and how its value is read from text and written as text."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any, get_type_hints

from pipeline.config.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Dial:
    """One dial of a config."""

    name: str
    value: Any
    type: Any  # int, float, bool, str or float | None
    group: str  # the heading in `--help all`
    meta: Mapping[str, Any]  # help, choices, low, high, place: see `dials.dial`

    def read(self, text: str, where: str) -> Any:
        """The value that a text means. Raises ConfigError, '<where>: expected …, got …', if it means none."""
        if self.type == float | None and text == "none":
            return None
        kind = float if self.type == float | None else self.type
        choices, low, high = self.meta["choices"], self.meta["low"], self.meta["high"]
        value: Any = None
        try:
            value = {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
        except (ValueError, KeyError):
            expected = {int: "an integer", float: "a number", bool: "true or false"}[kind]
        else:
            expected = (
                "a finite number" if kind is float and not math.isfinite(value)
                else f"one of {', '.join(choices)}" if choices and value not in choices
                else f"at least {low}" if low is not None and value < low
                else f"at most {high}" if high is not None and value > high
                else ""
            )  # fmt: skip
        if expected:
            raise ConfigError(f"{where}: expected {expected}, got '{text}'")
        return value

    @property
    def takes(self) -> str:
        """What may stand after its name, in short."""
        kinds = {int: "N", float: "X", bool: "true|false", str: "TEXT"}
        return "|".join(self.meta["choices"]) or kinds.get(self.type, "X|none")


def as_text(value: Any) -> str:
    """A value as it is written on the command line and in YAML."""
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def dials(config: Any) -> Iterator[Dial]:
    """The dials of a config and of the dataclasses in it, in their order."""
    types, group = get_type_hints(type(config)), "dials"
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from dials(value)
        else:
            group = field.metadata["group"] or group
            yield Dial(field.name, value, types[field.name], group, field.metadata)


def with_values(config: Any, values: Mapping[str, Any]) -> Any:
    """The config with other values of its dials."""
    fields = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        fields[field.name] = with_values(value, values) if dataclasses.is_dataclass(value) else values[field.name]
    return type(config)(**fields)
