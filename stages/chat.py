"""Talking to base, SFT and PPO side by side.

python stages/chat.py --config configs/imdb/chat.yaml
accelerate launch stages/chat.py --seed 1
"""

from pipeline.config.parse import parse
from pipeline.config.stages import Chat


def main() -> None:
    config = parse(Chat)  # before torch is imported: --help and a wrong dial answer at once
    from pipeline import chat
    from pipeline.runtime.process import run_stage

    run_stage(chat.talk, config)


if __name__ == "__main__":
    main()
