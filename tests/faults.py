"""PPO on two processes, the second of which is killed, stops, raises or is told to stop while it scores.

accelerate launch --config_file configs/accelerate/ddp.yaml tests/faults.py FOLDER NAME kill|stop|raise|term|differ
"""

import dataclasses
import os
import signal
import sys
import time
from pathlib import Path

import torch
from tiny import configs

from pipeline import ppo
from pipeline.config.stages import PPO
from pipeline.runtime.process import processes, run_stage

FAULTS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "term": signal.SIGTERM}


def main(folder: Path, name: str, fault: str) -> None:
    config = configs(folder, folder / f"{name}_{fault}", "faults")["ppo"]
    assert isinstance(config, PPO)
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, patience=6.0), critic="sft")
    is_second = processes().process_index == 1
    if fault == "differ":
        run_stage(ppo.train, dataclasses.replace(config, kl_coef=0.3 if is_second else 0.1))
    calls = 0

    def score(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if is_second and calls == 5:  # two in the first evaluation, two in the first rollout
            (folder / f"{name}_{fault}.lost").write_text(str(time.time()))
            if fault == "raise":
                raise ZeroDivisionError("the reward broke")
            os.kill(os.getpid(), FAULTS[fault])
        return mask.sum(1).float()

    run_stage(lambda given: ppo.train(given, score), config)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
