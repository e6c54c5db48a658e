"""What happens at a trainer's log lines and checkpoints."""

import math
import time
from pathlib import Path
from typing import Any, ClassVar

import transformers
from accelerate.utils import gather_object
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pipeline.runtime.checkpoints import training_bytes, weight_bytes
from pipeline.runtime.finite import check_finite
from pipeline.runtime.internals import running_averages, set_running_averages, tokens_trained
from pipeline.runtime.process import processes
from pipeline.runtime.stage_run import StageRun


class MetricsCallback(TrainerCallback):
    """Sends a trainer's log lines to the stage's metrics and its one progress bar."""

    names: ClassVar[dict[str, str]] = {
        "loss": "loss",
        "grad_norm": "grad_norm",
        "learning_rate": "learning_rate",
        "num_tokens": "tokens",
        "accuracy": "accuracy",
        "margin": "score_difference",
    }

    def __init__(self, run: StageRun) -> None:
        self.run, self.started = run, time.monotonic()
        self.shown: dict[str, str] = {}  # beside the progress: the numbers of the last log line
        self.earlier_tokens = run.resume_from.facts["state"]["tokens"] if run.resume_from else 0.0

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.run.heartbeat.phase = f"step {state.global_step}"  # steps are short: the next beat will write it

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step < state.max_steps:  # log lines may be minutes apart
            self.run.show_progress(state.max_steps, state.global_step, **self.shown)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.run.show_progress(state.max_steps, state.global_step, **self.shown)  # the last step may have no log line

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict | None = None, **_: Any
    ) -> None:
        if logs is None or "loss" not in logs:
            return
        metrics = {ours: logs[theirs] for theirs, ours in self.names.items() if theirs in logs}
        if not math.isfinite(metrics["loss"]):
            raise FloatingPointError(
                f"{self.run.stage}: loss is {metrics['loss']} at step {state.global_step}: lower the learning rate, "
                "look at the last lines of metrics.jsonl; checkpoints from before are untouched"
            )
        metrics["tokens_per_second"] = round(
            (metrics["tokens"] - self.earlier_tokens) / (time.monotonic() - self.started)
        )
        self.run.log(state.global_step, metrics)
        self.shown = {"loss": f"{metrics['loss']:.3f}", "tokens/s": f"{metrics['tokens_per_second']:,}"}
        if "accuracy" in metrics:
            self.shown["accuracy"] = f"{metrics['accuracy']:.3f}"
        self.run.show_progress(state.max_steps, state.global_step, **self.shown)


class CheckpointCallback(TrainerCallback):
    """Makes a stage's checkpoint of what the trainer has just written, also when the stage is told to stop."""

    def __init__(self, run: StageRun, trainer: transformers.Trainer) -> None:
        self.run, self.trainer = run, trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        every = self.run.config.run.save_steps
        written = math.ceil(state.max_steps / every) if every else 0  # the last step has one
        self.run.check_disk(training_bytes(model), written, weight_bytes(model))
        if self.run.resume_from:
            averages = self.run.resume_from.facts["state"]["averages"]
            losses = averages["losses"]
            world, rank = processes().num_processes, processes().process_index
            loss = losses[rank] if len(losses) == world else sum(losses) / len(losses)
            set_running_averages(self.trainer, averages | {"loss": loss})
        self.run.interrupts.phase = "stepping"

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        if self.run.interrupts.asked_to_stop():
            control.should_training_stop = True
            control.should_save = self.run.config.run.save_steps > 0
        if control.should_save:
            self.check_finite(model, state.global_step)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        assert args.output_dir is not None
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"

        def move_to(folder: Path) -> None:
            if processes().is_main_process:
                for path in checkpoint.iterdir():
                    path.rename(folder / path.name)
                checkpoint.rmdir()

        processes().wait_for_everyone()
        averages = running_averages(self.trainer)
        averages["losses"] = gather_object([averages.pop("loss")])  # of each process
        self.run.save_checkpoint(
            state.global_step, move_to, {"tokens": tokens_trained(self.trainer), "averages": averages}
        )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        self.check_finite(model, state.global_step)
        if self.run.interrupts.agreed:
            self.run.stop(state.global_step)
        self.run.interrupts.phase = "measuring"

    def check_finite(self, model: nn.Module, step: int) -> None:
        trained = ((name, p) for name, p in model.named_parameters() if p.requires_grad)
        check_finite(self.run.stage, trained, f"after step {step}")
