"""The policy with its adapter merged in, proved equal to the unmerged one before it is written; and adapter arithmetic.

python stages/merge.py --config configs/imdb/merge.yaml
accelerate launch stages/merge.py --seed 1
python stages/merge.py compose "sft + 0.5*good" --adapters sft=runs/a/sft/final,good=some/folder --out runs/x/composed
python stages/merge.py search "sft + $x*good" --range x=0:1.5 --adapters … --out runs/x/search
python stages/merge.py inspect | verify | merge runs/x/composed   (docs/adapter-arithmetic.md)
"""

import sys

from pipeline.config.commands import Compose, Inspect, MergeAdapter, Search, Verify
from pipeline.config.parse import parse, parse_command
from pipeline.config.stages import Merge

COMMANDS = {"compose": Compose, "verify": Verify, "inspect": Inspect, "merge": MergeAdapter, "search": Search}


def main() -> None:
    command, *rest = sys.argv[1:] or [""]
    if command in COMMANDS:
        dials = parse_command(COMMANDS[command], f"stages/merge.py {command}", rest)  # before torch is imported
        from pipeline.adapters import compose, search
        from pipeline.runtime.process import stage_main

        stage_main(getattr(search if command == "search" else compose, command), dials)
        return
    config = parse(Merge)  # before torch is imported: --help and a wrong dial answer at once
    from pipeline import merge
    from pipeline.runtime.process import stage_main

    stage_main(merge.train, config)


if __name__ == "__main__":
    main()
