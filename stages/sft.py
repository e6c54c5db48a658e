"""Supervised fine-tuning on prompt -> completion, with loss on the completion only.

python stages/sft.py --config configs/imdb/sft.yaml
accelerate launch stages/sft.py --seed 1
"""

from pipeline.config.parse import parse
from pipeline.config.stages import SFT


def main() -> None:
    config = parse(SFT)  # before torch is imported: --help and a wrong dial answer at once
    from pipeline import sft
    from pipeline.runtime.process import run_stage

    run_stage(sft.train, config)


if __name__ == "__main__":
    main()
