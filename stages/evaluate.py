"""Did alignment work, and is the text still text? Base, SFT and PPO on the same held-out prompts.

python stages/evaluate.py --config configs/imdb/evaluate.yaml
accelerate launch stages/evaluate.py --seed 1
"""

from pipeline.config.parse import parse
from pipeline.config.stages import Evaluate


def main() -> None:
    config = parse(Evaluate)  # before torch is imported: --help and a wrong dial answer at once
    from pipeline import evaluate
    from pipeline.runtime.process import run_stage

    run_stage(evaluate.train, config)


if __name__ == "__main__":
    main()
