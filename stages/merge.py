"""The policy with its adapter merged in, proved equal to the unmerged one before it is written; and adapter arithmetic.

python stages/merge.py --config configs/imdb/merge.yaml
accelerate launch stages/merge.py --seed 1
python stages/merge.py compose "sft + 0.5*good" --adapters sft=runs/a/sft/final,good=some/folder --out runs/x/composed
python stages/merge.py inspect | verify | merge runs/x/composed   (docs/adapter-arithmetic.md)
"""

import sys

from pipeline.config import Compose, Inspect, Merge, MergeAdapter, Verify, parse, parse_command

COMMANDS = {"compose": Compose, "verify": Verify, "inspect": Inspect, "merge": MergeAdapter}


def main() -> None:
    command, *rest = sys.argv[1:] or [""]
    if command in COMMANDS:
        dials = parse_command(COMMANDS[command], f"stages/merge.py {command}", rest)  # before torch is imported
        from pipeline import adapters
        from pipeline.process import stage_main

        stage_main(getattr(adapters, command), dials)
        return
    config = parse(Merge)  # before torch is imported: --help and a wrong dial answer at once
    from pipeline import merge
    from pipeline.process import stage_main

    stage_main(merge.train, config)


if __name__ == "__main__":
    main()
