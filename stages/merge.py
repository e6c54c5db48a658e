"""The policy with its adapter merged in, proved equal to the unmerged one before it is written; and adapter arithmetic.

python stages/merge.py --config configs/imdb/merge.yaml
accelerate launch stages/merge.py --seed 1
python stages/merge.py compose "sft + 0.5*good" --adapters sft=runs/a/sft/final,good=some/folder --out runs/x/composed
python stages/merge.py search "sft + $x*good" --range x=0:1.5 --adapters … --out runs/x/search
python stages/merge.py inspect | verify | merge runs/x/composed   (docs/adapter-arithmetic.md)
"""

import sys
from collections.abc import Callable
from typing import Any

from pipeline.config.commands import Compose, Inspect, MergeAdapter, Search, Verify
from pipeline.config.help import asked_help
from pipeline.config.names import nearest
from pipeline.config.parse import parse, parse_command
from pipeline.config.stages import Merge

COMMANDS = {"compose": Compose, "verify": Verify, "inspect": Inspect, "merge": MergeAdapter, "search": Search}


def main() -> None:
    command, *arguments = sys.argv[1:] or [""]
    if command in COMMANDS:
        run_command(command, arguments)
        return
    if command and not command.startswith("-"):
        expected = f"expected one of {', '.join(COMMANDS)}, or the dials of the stage"
        print(f"error: unknown command '{command}'{nearest(command, COMMANDS) or f'; {expected}'}", file=sys.stderr)
        sys.exit(2)
    if asked_help(sys.argv[1:]):
        print(f"Commands: {', '.join(COMMANDS)}; each has a --help of its own. Without one, the stage of a recipe:\n")
    config = parse(Merge)  # before torch is imported: --help and a wrong dial answer at once
    from pipeline import merge
    from pipeline.runtime.process import run_stage

    run_stage(merge.train, config)


def run_command(command: str, arguments: list[str]) -> None:
    config = parse_command(COMMANDS[command], f"stages/merge.py {command}", arguments)  # before torch is imported
    from pipeline.adapters.compose import compose
    from pipeline.adapters.inspect import inspect
    from pipeline.adapters.merge import merge
    from pipeline.adapters.search import search
    from pipeline.adapters.verify import verify
    from pipeline.runtime.process import run_stage

    commands: dict[str, Callable[[Any], object]] = {
        "compose": compose,
        "verify": verify,
        "inspect": inspect,
        "merge": merge,
        "search": search,
    }
    run_stage(commands[command], config)


if __name__ == "__main__":
    main()
