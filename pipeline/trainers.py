"""What pretraining, SFT and reward training share: TRL's trainers under our dials, loss, log and validation."""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
import transformers
from accelerate.utils import convert_outputs_to_fp32
from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.trainer_callback import PrinterCallback
from trl import RewardTrainer, SFTTrainer

from pipeline.config import Optim, Run, UserError
from pipeline.data import IGNORED, length_batches, pad
from pipeline.losses import next_token_loss
from pipeline.process import autocast, checked, keep_torch_optimizer, new_accelerator, processes
from pipeline.run import StageRun
from pipeline.shards import Model, empty_copy, filled, in_pieces, whole_weights
from pipeline.tensors import masked_sum
from pipeline.tokenizing import load_tokenizer, tokenizer_fingerprint


def training_arguments(run: Run, optim: Optim, folder: Path) -> dict[str, Any]:
    """The arguments that TRL's SFTConfig and RewardConfig share, from our dials."""
    return dict(
        output_dir=str(folder / "checkpoints/trainer"),
        seed=run.seed,
        bf16=False,  # `trained` does that, alike under every strategy
        fp16=run.precision == "fp16",
        use_cpu=not torch.accelerator.is_available(),
        gradient_checkpointing=optim.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        per_device_train_batch_size=optim.rows_per_forward(processes().num_processes),
        gradient_accumulation_steps=optim.accumulation(processes().num_processes),
        num_train_epochs=optim.epochs,
        learning_rate=optim.learning_rate,
        weight_decay=optim.weight_decay,
        adam_beta2=optim.adam_beta2,
        max_grad_norm=optim.max_grad_norm,
        lr_scheduler_type="cosine",
        warmup_steps=optim.warmup,
        logging_steps=10,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        save_strategy="steps" if run.checkpoint_every else "no",
        save_steps=run.checkpoint_every or 1,
        eval_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
    )


def in_length_batches(rows: Dataset, lengths: Sequence[int], batch_size: int, seed: int) -> Dataset:
    """The rows in an order whose consecutive batches hold like lengths and come in random order.

    For `train_sampling_strategy="sequential"`. transformers' own grouping runs from long to short within each fifty
    batches, and where length goes with the kind of text the model then chases one kind after the other. `lengths` must
    say nothing about the label: see `pipeline.reward.pair_lengths`.
    """
    random = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(rows), generator=random)
    pools = [sorted(pool.tolist(), key=lambda row: lengths[row]) for pool in order.split(50 * batch_size)]
    batches = [pool[start : start + batch_size] for pool in pools for start in range(0, len(pool), batch_size)]
    shuffled = torch.randperm(len(batches), generator=random).tolist()
    return rows.select([row for batch in shuffled for row in batches[batch]])


class Report(TrainerCallback):
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
        self.run, self.started, self.tokens = run, time.monotonic(), 0.0
        self.before = run.resumed.facts["state"]["tokens"] if run.resumed else 0.0  # read by an earlier attempt

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.run.heartbeat.phase = f"step {state.global_step}"  # steps are short: the next beat will write it

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict | None = None, **_: Any
    ) -> None:
        if logs is None or "loss" not in logs:
            return
        metrics = {ours: logs[theirs] for theirs, ours in self.names.items() if theirs in logs}
        if not math.isfinite(metrics["loss"]):
            raise FloatingPointError(
                f"{self.run.stage}: loss is {metrics['loss']} at step {state.global_step}: stopped"
            )
        metrics["tokens_per_second"] = round((metrics["tokens"] - self.before) / (time.monotonic() - self.started))
        self.run.log(state.global_step, metrics)
        shown = {"loss": f"{metrics['loss']:.3f}", "tokens/s": f"{metrics['tokens_per_second']:,}"}
        if "accuracy" in metrics:
            shown["accuracy"] = f"{metrics['accuracy']:.3f}"
        self.run.progress(state.max_steps, state.global_step, **shown)


class Keeper(TrainerCallback):
    """Makes a stage's checkpoint of what the trainer has just written."""

    def __init__(self, run: StageRun, trainer: transformers.Trainer) -> None:
        self.run, self.trainer = run, trainer

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        assert args.output_dir is not None
        written = Path(args.output_dir) / f"checkpoint-{state.global_step}"

        def take(folder: Path) -> None:
            if processes().is_main_process:
                for path in written.iterdir():
                    path.rename(folder / path.name)
                written.rmdir()

        processes().wait_for_everyone()
        self.run.checkpoint(state.global_step, take, {"tokens": self.trainer._total_train_tokens})  # type: ignore[attr-defined]


def trained(trainer: SFTTrainer | RewardTrainer, model: Model, run: StageRun) -> Model:
    """Trains, from the stage's checkpoint if there is one, with our log in place of the trainer's printing.

    Returns the model, whole on every process.
    """
    accelerator = checked(trainer.accelerator)
    keep_torch_optimizer(accelerator)
    empty = empty_copy(model) if in_pieces(accelerator) else None
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Report(run))
    trainer.add_callback(Keeper(run, trainer))
    start = None
    if run.resumed:
        start = str(run.resumed.folder)
        trainer._total_train_tokens = run.resumed.facts["state"]["tokens"]
        assert isinstance(trainer.processing_class, PreTrainedTokenizerBase)
        if tokenizer_fingerprint(load_tokenizer(start)) != tokenizer_fingerprint(trainer.processing_class):
            raise UserError(f"{start}: the tokenizer made now is another; move {run.checkpoints} away to start again")
    with computing(model, run.config.run.precision):
        trainer.train(resume_from_checkpoint=start)
    unset_hf_deepspeed_config()  # as in new_accelerator
    run.heartbeat.enter("evaluation")
    return model if empty is None else filled(empty, whole_weights(model))


@contextmanager
def computing(model: nn.Module, precision: str) -> Iterator[None]:
    """Within it the model's forward runs in that precision and gives fp32, as Accelerate has it under DDP alone."""
    own = vars(model).get("forward")  # a trainer may have put one on the instance
    model.forward = convert_outputs_to_fp32(autocast(precision)(model.forward))
    try:
        yield
    finally:
        del model.forward
        if own is not None:
            model.forward = own


class NextTokenTrainer(SFTTrainer):
    """TRL's SFTTrainer with our next-token loss: textbook label smoothing in one forward, one global denominator."""

    def __init__(self, *, label_smoothing: float, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.label_smoothing = label_smoothing

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Without IA3's vectors: decay would pull them to 0, where nothing is 1."""
        return [name for name in super().get_decay_parameter_names(model) if "ia3_l" not in name.split(".")]

    def compute_loss(
        self, model: nn.Module, inputs: dict, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Sum of the token losses over the number of tokens in the optimiser step on all processes."""
        ids = inputs["input_ids"]
        # Rows are padded and masked, or (by bfd_split) joined into one whose positions say where each text starts.
        place = "attention_mask" if "attention_mask" in inputs else "position_ids"
        outputs = model(input_ids=ids, use_cache=False, **{place: inputs[place]})
        losses, mask = next_token_loss(outputs.logits, inputs["labels"], self.label_smoothing)
        # DDP averages gradients over processes, so the sum of each is scaled by their number.
        loss = masked_sum(losses, mask) / num_items_in_batch * self.accelerator.num_processes
        tokens = self.accelerator.gather(inputs.get("attention_mask", torch.ones_like(ids)).sum()).sum()
        self._total_train_tokens += tokens.item()
        self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
        return (loss, outputs) if return_outputs else loss


@torch.no_grad()
def validation_loss(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, rows: Dataset, batch_size: int, precision: str
) -> tuple[float, int]:
    """Mean cross-entropy in nats per token over the labelled tokens of all rows, never smoothed, and their number.

    Rows hold `input_ids` and optionally `labels`; they are shared out over processes.
    """
    accelerator = new_accelerator(precision)
    was_training = model.training
    model.eval()
    total = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
    ids, labels = rows["input_ids"], rows["labels"] if "labels" in rows.column_names else rows["input_ids"]
    batches = length_batches(list(map(len, ids)), batch_size)
    for part in batches[accelerator.process_index :: accelerator.num_processes]:
        inputs, mask = pad([ids[row] for row in part], tokenizer.pad_token_id, "right")
        targets, _ = pad([labels[row] for row in part], IGNORED, "right")
        inputs, mask, targets = (x.to(accelerator.device) for x in (inputs, mask, targets))
        with autocast(precision):
            logits = model(input_ids=inputs, attention_mask=mask.long(), use_cache=False).logits
        losses, counted = next_token_loss(logits, targets, 0.0)
        total += torch.stack([masked_sum(losses, counted).double(), counted.sum().double()])
    total = accelerator.reduce(total, "sum")
    model.train(was_training)
    return (total[0] / total[1]).item(), int(total[1])


def packed_tokens(rows: Dataset) -> int:
    """Tokens in all rows."""
    return sum(len(ids) for ids in rows["input_ids"])
