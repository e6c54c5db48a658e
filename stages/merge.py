"""The policy with its adapter merged in, proved equal to the unmerged one before it is written.

python stages/merge.py --config configs/imdb/merge.yaml
accelerate launch stages/merge.py --seed 1
"""

from pipeline.config import Merge, parse


def main() -> None:
    config = parse(Merge)  # before torch is imported: --help and a wrong dial answer at once
    from pipeline import merge
    from pipeline.process import stage_main

    stage_main(merge.train, config)


if __name__ == "__main__":
    main()
