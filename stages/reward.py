"""A Bradley-Terry reward model on pairs of whole texts, centred on the SFT policy, beside a linear baseline.

python stages/reward.py --config configs/imdb/reward.yaml
accelerate launch stages/reward.py --seed 1
"""

from pipeline.config.parse import parse
from pipeline.config.stages import Reward


def main() -> None:
    config = parse(Reward)  # before torch is imported: --help and a wrong dial answer at once
    from pipeline import reward
    from pipeline.runtime.process import run_stage

    run_stage(reward.train, config)


if __name__ == "__main__":
    main()
