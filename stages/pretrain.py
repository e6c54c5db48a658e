"""A small causal language model from scratch, with its tokenizer, on plain text.

python stages/pretrain.py --config configs/imdb/pretrain.yaml
accelerate launch stages/pretrain.py --seed 1
"""

from pipeline.config.parse import parse
from pipeline.config.stages import Pretrain


def main() -> None:
    config = parse(Pretrain)  # before torch is imported: --help and a wrong dial answer at once
    from pipeline import pretrain
    from pipeline.runtime.process import run_stage

    run_stage(pretrain.train, config)


if __name__ == "__main__":
    main()
