"""From YAML and command line to a stage's config: the file first, then the command line, both type-checked."""

import argparse
import dataclasses
import difflib
import math
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_type_hints

import yaml

from pipeline.config.commands import Compose, Inspect, MergeAdapter, Search, Verify
from pipeline.config.errors import ConfigError
from pipeline.config.stages import PPO, SFT, Chat, Evaluate, Merge, Pretrain, Reward

Config = TypeVar("Config", Pretrain, SFT, Reward, PPO, Merge, Evaluate, Chat)
Command = TypeVar("Command", Compose, Verify, Inspect, MergeAdapter, Search)


def flat(config: Any) -> dict[str, Any]:
    """All dials of a config by name."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        values |= flat(value) if dataclasses.is_dataclass(value) else {field.name: value}
    return values


def identity(config: Any) -> dict[str, Any]:
    """The dials that decide what a stage computes."""
    return {field.name: getattr(owner, field.name) for owner, field, _ in _dials(config) if not field.metadata["place"]}


def parse(kind: type[Config], argv: Sequence[str] | None = None) -> Config:
    """The stage's config: defaults, then `--config file.yaml` (default configs/imdb/<stage>.yaml), then `--dial value`.

    Ends the program with status 2 and one sentence when a key is unknown or a value has the wrong type or range.
    """
    stage = kind.__name__.lower()
    argv = list(sys.argv[1:] if argv is None else argv)
    return _parse(kind, f"stages/{stage}.py", f"The {stage} stage.", f"configs/imdb/{stage}.yaml", argv)


def parse_command(kind: type[Command], program: str, argv: Sequence[str]) -> Command:
    """The dials of one command of a stage that has several: its first one may stand first, without its name.

    As `parse`, but a YAML file is read only where `--config` gives one.
    """
    argv = list(argv)
    if argv and argv[0] != "-h" and not re.match(r"--\w+(=|$)", argv[0]):
        argv[0] = f"--{dataclasses.fields(kind)[0].name}={argv[0]}"  # an expression may begin with a minus sign
    return _parse(kind, program, str(kind.__doc__), "", argv)


def _parse(kind: Any, program: str, about: str, default_file: str, argv: list[str]) -> Any:
    defaults = kind()
    parser = _Parser(prog=program, description=about, formatter_class=_Help, allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE", help=f"YAML of dials (default: {default_file or 'none'})")
    for owner, field, hint in _dials(defaults):
        default = getattr(owner, field.name)
        parser.add_argument(
            f"--{field.name}", type=_reader(field, hint), default=default, metavar=_metavar(field, hint),
            help=f"{field.metadata['help']} (default: {_text(default) or 'empty'})".replace("%", "%%"),
        )  # fmt: skip
    file = _config_file(argv) or default_file
    helps = not {"-h", "--help"}.isdisjoint(argv)  # answers wherever it is asked, with or without a readable file
    given = parser.parse_args(argv if helps or not file else _yaml_tokens(Path(file), parser) + argv)
    try:
        config = _rebuild(defaults, vars(given))
        if hasattr(config, "check"):
            config.check()
    except ConfigError as error:
        parser.error(str(error))
    return config


class _Help(argparse.HelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32, width=min(120, int(os.environ.get("COLUMNS", "120"))))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        unknown = message.removeprefix("unrecognized arguments: ")
        if unknown != message:
            key = unknown.split(" ")[0].lstrip("-").split("=")[0]
            message = f"unknown dial '{key}'" + nearest(key, [a.dest for a in self._actions])
        self.exit(2, f"error: {message}\n")


def nearest(key: str, known: Sequence[str]) -> str:
    """'; did you mean …?' where a known name is close."""
    close = difflib.get_close_matches(key, known, 1)
    return f"; did you mean '{close[0]}'?" if close else ""


def _dials(config: Any) -> Iterator[tuple[Any, dataclasses.Field, Any]]:
    hints = get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from _dials(value)
        else:
            yield config, field, hints[field.name]


def _rebuild(config: Any, values: dict[str, Any]) -> Any:
    fields = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        fields[field.name] = _rebuild(value, values) if dataclasses.is_dataclass(value) else values[field.name]
    return type(config)(**fields)


def _reader(field: dataclasses.Field, hint: Any) -> Any:
    meta = field.metadata

    def read(text: str) -> Any:
        if hint == float | None and text == "none":
            return None
        kind = float if hint == float | None else hint
        try:
            value = {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
        except (ValueError, KeyError):
            expected = {int: "an integer", float: "a number", bool: "true or false"}[kind]
            raise argparse.ArgumentTypeError(f"expected {expected}, got '{text}'") from None
        if isinstance(value, float) and not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"expected a finite number, got '{text}'")
        if meta["choices"] and value not in meta["choices"]:
            raise argparse.ArgumentTypeError(f"expected one of {', '.join(meta['choices'])}, got '{text}'")
        if meta["low"] is not None and value < meta["low"]:
            raise argparse.ArgumentTypeError(f"expected at least {meta['low']}, got {text}")
        if meta["high"] is not None and value > meta["high"]:
            raise argparse.ArgumentTypeError(f"expected at most {meta['high']}, got {text}")
        return value

    return read


def _metavar(field: dataclasses.Field, hint: Any) -> str:
    if field.metadata["choices"]:
        return "|".join(field.metadata["choices"])
    return {int: "N", float: "X", bool: "true|false", str: "TEXT"}.get(hint, "X|none")


def _text(value: Any) -> str:
    """A value as it is written on the command line and in YAML."""
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _config_file(argv: list[str]) -> str | None:
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    return first.parse_known_args(argv)[0].config


def _yaml_tokens(file: Path, parser: _Parser) -> list[str]:
    """The YAML file as command-line tokens, so that file and command line pass the same type checks."""
    if not file.is_file():
        parser.error(f"{file}: no such config file (run from the project's folder, or give --config)")
    try:
        rows = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, ValueError) as error:  # ValueError: not UTF-8, or a date that no calendar has
        parser.error(f"{file}: not readable as YAML: {' '.join(str(error).split())}")
    if not isinstance(rows, dict):
        parser.error(f"{file}: expected `dial: value` lines")
    known = {action.dest: action for action in parser._actions if action.dest not in ("config", "help")}
    tokens = []
    for key, value in rows.items():
        if key not in known:
            parser.error(f"{file}: unknown dial '{key}'" + nearest(str(key), list(known)))
        if isinstance(value, (dict, list)):
            parser.error(f"{file}: {key}: expected one value, got {type(value).__name__}")
        text = _text(value)
        if known[key].metavar == "TEXT" and not isinstance(value, str):
            parser.error(f"{file}: {key}: expected text, got {text}; put it in quotes")
        try:
            known[key].type(text)  # type: ignore[operator, misc]
        except argparse.ArgumentTypeError as error:
            parser.error(f"{file}: {key}: {error}")
        tokens.append(f"--{key}={text}")
    return tokens
