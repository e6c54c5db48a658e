"""From YAML and command line to a stage's config: the file first, then the command line, both type-checked."""

import argparse
import dataclasses
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml

from pipeline.config.commands import Compose, Inspect, MergeAdapter, Search, Verify
from pipeline.config.errors import ConfigError
from pipeline.config.help import asked_help, help_page
from pipeline.config.names import unknown
from pipeline.config.stages import PPO, SFT, Chat, Evaluate, Merge, Pretrain, Reward
from pipeline.config.values import Dial, as_text, dials, with_values

Config = TypeVar("Config", Pretrain, SFT, Reward, PPO, Merge, Evaluate, Chat)
Command = TypeVar("Command", Compose, Verify, Inspect, MergeAdapter, Search)


def flat(config: Any) -> dict[str, Any]:
    """All dials of a config by name."""
    return {dial.name: dial.value for dial in dials(config)}


def identity(config: Any) -> dict[str, Any]:
    """The dials that decide what a stage computes."""
    return {dial.name: dial.value for dial in dials(config) if not dial.meta["place"]}


def parse(kind: type[Config], argv: Sequence[str] | None = None) -> Config:
    """The stage's config: defaults, then `--config file.yaml` (default configs/imdb/<stage>.yaml), then `--dial value`.

    Ends the program with status 2 and one sentence when a key is unknown or a value has the wrong type or range.
    """
    stage = kind.__name__.lower()
    argv = list(sys.argv[1:] if argv is None else argv)
    return _parse(kind(), f"stages/{stage}.py", f"The {stage} stage.", f"configs/imdb/{stage}.yaml", argv)


def parse_command(kind: type[Command], program: str, argv: Sequence[str]) -> Command:
    """The dials of one command of a stage that has several: its first one may stand first, without its name.

    As `parse`, but a YAML file is read only where `--config` gives one.
    """
    argv = list(argv)
    if argv and argv[0] != "-h" and not re.match(r"--\w+(=|$)", argv[0]):
        argv[0] = f"--{dataclasses.fields(kind)[0].name}={argv[0]}"  # an expression may begin with a minus sign
    return _parse(kind(), program, str(kind.__doc__), "", argv)


def _parse(defaults: Any, program: str, about: str, default_file: str, argv: list[str]) -> Any:
    if page := asked_help(argv):  # answers with or without a readable file
        print(help_page(defaults, program, about, default_file, page), end="")
        sys.exit(0)
    stage = type(defaults).__name__.lower()
    known = {dial.name: dial for dial in dials(defaults)}
    try:
        texts = _words(argv, known, stage)
        file = texts.pop("config", "") or default_file
        values = flat(defaults) | (_read_file(Path(file), known, stage) if file else {})
        for name, text in texts.items():
            values[name] = known[name].read(text, f"argument --{name}")
        config = with_values(defaults, values)
        if hasattr(config, "check"):
            config.check()
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    return config


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def _words(argv: list[str], known: Mapping[str, Dial], stage: str) -> dict[str, str]:
    """What the command line gives each dial, and `config`, as text."""
    parser = _Parser(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for name in ("config", *known):
        parser.add_argument(f"--{name}")
    values, others = parser.parse_known_args(argv)
    if others:
        raise ConfigError(unknown(others[0].lstrip("-").split("=")[0], ("config", *known), stage))
    return vars(values)


def _read_file(file: Path, known: Mapping[str, Dial], stage: str) -> dict[str, Any]:
    """The dials that a YAML file sets."""
    values = {}
    for key, value in _read_yaml(file).items():
        if key not in known:
            raise ConfigError(f"{file}: {unknown(str(key), list(known), stage)}")
        if isinstance(value, (dict, list)):
            raise ConfigError(f"{file}: {key}: expected one value, got {type(value).__name__}")
        dial, text = known[key], as_text(value)
        if dial.takes == "TEXT" and not isinstance(value, str):
            raise ConfigError(f"{file}: {key}: expected text, got {text}; put it in quotes")
        values[key] = dial.read(text, f"{file}: {key}")
    return values


def _read_yaml(file: Path) -> dict[Any, Any]:
    """The lines of a YAML file, each key once."""
    if not file.is_file():
        raise ConfigError(f"{file}: no such config file (run from the project's folder, or give --config)")
    try:
        text = file.read_text(encoding="utf-8")
        rows, tree = yaml.safe_load(text), yaml.compose(text, yaml.SafeLoader)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: not UTF-8, or a date that no calendar has
        raise ConfigError(f"{file}: not readable as YAML: {' '.join(str(error).split())}") from None
    if tree is None:
        return {}
    if not isinstance(tree, yaml.MappingNode):
        raise ConfigError(f"{file}: expected `dial: value` lines")
    lines: dict[str, int] = {}
    for key, _ in tree.value:
        line = key.start_mark.line + 1
        if key.value in lines:
            raise ConfigError(f"{file}: {key.value}: expected once, got in line {lines[key.value]} and in line {line}")
        lines[key.value] = line
    return rows
