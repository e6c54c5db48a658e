"""PPO (Schulman et al., arXiv 1707.06347) on a language model, against a reward model and a frozen reference.

python stages/ppo.py --config configs/imdb/ppo.yaml
accelerate launch stages/ppo.py --seed 1
"""

from pipeline.config.parse import parse
from pipeline.config.stages import PPO


def main() -> None:
    config = parse(PPO)  # before torch is imported: --help and a wrong dial answer at once
    from pipeline import ppo
    from pipeline.runtime.process import run_stage

    run_stage(ppo.train, config)


if __name__ == "__main__":
    main()
