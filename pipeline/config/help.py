"""What `--help` and `--help all` print."""

import argparse
import os
from collections.abc import Sequence
from typing import Any

from pipeline.config.values import Dial, as_text, dials


class _Layout(argparse.HelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32, width=min(120, int(os.environ.get("COLUMNS", "120"))))


def asked_help(argv: Sequence[str]) -> str:
    """The page of help that a command line asks for, wherever it does: `usual`, `all`, or empty for none."""
    for at, word in enumerate(argv):
        if word in ("-h", "--help", "--help=all"):
            return "all" if word == "--help=all" or list(argv[at + 1 : at + 2]) == ["all"] else "usual"
    return ""


def help_page(config: Any, program: str, about: str, default_file: str, page: str) -> str:
    """`usual`: the usual dials, and how many others there are; `all`, or where none is usual: all, by concern."""
    usual = [dial for dial in dials(config) if dial.meta["usual"]]
    others: dict[str, list[Dial]] = {}
    for dial in dials(config):
        if not dial.meta["usual"]:
            others.setdefault(dial.group, []).append(dial)
    parser = argparse.ArgumentParser(
        prog=program, usage="%(prog)s [--config FILE] [--dial value ...]", description=about,
        formatter_class=_Layout, add_help=False,
    )  # fmt: skip
    file = parser.add_argument_group("file")
    file.add_argument("--config", metavar="FILE", help=f"YAML of dials, read first (default: {default_file or 'none'})")
    if usual and page != "all":
        parser.epilog = f"--help all: the other {sum(map(len, others.values()))} dials, grouped by concern"
        others = {}
    for title, members in {"usual": usual, **others}.items():
        group = parser.add_argument_group(title)
        for dial in members:
            text = f"{dial.meta['help']} (default: {as_text(dial.value) or 'empty'})"
            group.add_argument(f"--{dial.name}", metavar=dial.takes, help=text.replace("%", "%%"))
    return parser.format_help()
