"""TRL's trainers under our dials and loss, for pretraining, SFT and reward training."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.utils import convert_outputs_to_fp32
from datasets import Dataset
from torch import nn
from torch.nn.functional import logsigmoid
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.trainer_callback import PrinterCallback
from trl import RewardTrainer, SFTTrainer

from pipeline.config.dials import Optim, Run
from pipeline.config.errors import UserError
from pipeline.core.losses import next_token_loss
from pipeline.core.tensors import masked_sum
from pipeline.data.tokenize import IGNORE_INDEX
from pipeline.data.tokenizer import hash_tokenizer, load_tokenizer
from pipeline.models.sharding import Model, full_state_dict, is_sharded, load_full_state_dict, meta_copy
from pipeline.runtime.internals import (
    checkpointing_arguments,
    forward_override,
    log_metrics,
    log_tokens,
    set_tokens_trained,
    tokens_trained,
)
from pipeline.runtime.launch import keep_torch_optimizer, validate_launch
from pipeline.runtime.precision import autocast
from pipeline.runtime.process import processes
from pipeline.runtime.stage_run import StageRun
from pipeline.training.batches import FILLER_MARGIN, EpochSampler, epoch_order, with_filler
from pipeline.training.callbacks import CheckpointCallback, MetricsCallback


def training_arguments(run: Run, optim: Optim, folder: Path) -> dict[str, Any]:
    """The arguments that TRL's SFTConfig and RewardConfig share, from our dials."""
    return dict(
        output_dir=str(folder / "checkpoints/trainer"),
        seed=run.seed,
        bf16=False,  # `autocast_forward` does that, alike under every strategy
        fp16=run.precision == "fp16",
        use_cpu=not torch.accelerator.is_available(),
        **checkpointing_arguments(optim.gradient_checkpointing),
        per_device_train_batch_size=optim.rows_per_forward(processes().num_processes),
        gradient_accumulation_steps=optim.accumulation(processes().num_processes),
        num_train_epochs=optim.num_train_epochs,
        learning_rate=optim.learning_rate,
        weight_decay=optim.weight_decay,
        adam_beta2=optim.adam_beta2,
        max_grad_norm=optim.max_grad_norm,
        lr_scheduler_type="cosine",
        warmup_steps=optim.warmup_steps,
        logging_steps=10,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        save_strategy="steps" if run.save_steps else "no",
        save_steps=run.save_steps or 1,
        eval_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
    )


def run_training(trainer: SFTTrainer | RewardTrainer, model: Model, run: StageRun) -> Model:
    """Trains, from the stage's checkpoint if there is one, with our log in place of the trainer's printing.

    Returns the model, unsharded on every process.
    """
    accelerator = validate_launch(trainer.accelerator)
    keep_torch_optimizer(accelerator)
    meta = meta_copy(model) if is_sharded(accelerator) else None
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(MetricsCallback(run))
    trainer.add_callback(CheckpointCallback(run, trainer))
    start = None
    if run.resume_from:
        start = str(run.resume_from.folder)
        set_tokens_trained(trainer, run.resume_from.facts["state"]["tokens"])
        assert isinstance(trainer.processing_class, PreTrainedTokenizerBase)
        if hash_tokenizer(load_tokenizer(start)) != hash_tokenizer(trainer.processing_class):
            raise UserError(f"{start}: the tokenizer made now is another; move {run.checkpoints} away to start again")
    with autocast_forward(model, run.config.run.precision):
        trainer.train(resume_from_checkpoint=start)
    unset_hf_deepspeed_config()  # as in new_accelerator
    run.heartbeat.enter("evaluation")
    return model if meta is None else load_full_state_dict(meta, full_state_dict(model))


@contextmanager
def autocast_forward(model: nn.Module, precision: str) -> Iterator[None]:
    """Within it the model's forward runs in that precision and gives fp32, as Accelerate has it under DDP alone."""
    override = forward_override(model)  # a trainer may have put one on the instance
    model.forward = convert_outputs_to_fp32(autocast(precision)(model.forward))
    try:
        yield
    finally:
        del model.forward
        if override is not None:
            model.forward = override


class WholeBatches(transformers.Trainer):
    """A trainer whose optimiser steps all have `batch_size` places, in an order that each epoch draws anew.

    Its loss is a sum over `num_items_in_batch`, the labels of a step: one denominator for all its forwards.
    """

    loss_is_scaled_for_ga = True
    lengths: Sequence[int] | None = None  # of the rows, to be grouped by

    def get_train_dataloader(self) -> Any:
        """Rows in `epoch_order`; those of a stream as they come."""
        args, rows, tokenizer = self.args, self.train_dataset, self.processing_class
        if not isinstance(rows, Dataset):
            return super().get_train_dataloader()
        assert isinstance(tokenizer, PreTrainedTokenizerBase)
        size = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        loader = DataLoader(
            with_filler(rows, tokenizer.eos_token_id),
            batch_size=args.per_device_train_batch_size,
            sampler=EpochSampler(
                lambda epoch: epoch_order(len(rows), size, args.seed, epoch, self.lengths),
                lambda: int(self.state.epoch or 0),
            ),
            collate_fn=self.data_collator,
            pin_memory=args.dataloader_pin_memory,
        )
        return self.accelerator.prepare(loader)


class NextTokenTrainer(WholeBatches, SFTTrainer):  # type: ignore[misc]  # TRL says None where transformers says bool
    """TRL's SFTTrainer with our next-token loss: textbook label smoothing in one forward, one global denominator."""

    def __init__(self, *, label_smoothing: float, lengths: Sequence[int] | None = None, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.label_smoothing, self.lengths = label_smoothing, lengths

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
        loss = masked_sum(losses, mask) / max(1, num_items_in_batch) * self.accelerator.num_processes
        real = inputs.get("attention_mask", torch.ones_like(ids)) * (inputs["labels"] != IGNORE_INDEX).any(1)[:, None]
        count_tokens_trained(self, self.accelerator.gather(real.sum()).sum().item())
        return (loss, outputs) if return_outputs else loss


class HeadTrainer(WholeBatches, RewardTrainer):  # type: ignore[misc]
    """TRL's RewardTrainer with one denominator for all pairs of an optimiser step.

    AdamW with one more group: the head starts from noise, the trunk from pretrained features, which the head's
    learning rate would destroy (docs/log.md).
    """

    def __init__(self, *, head_learning_rate: float, lengths: Sequence[int] | None = None, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.head_learning_rate, self.lengths = head_learning_rate, lengths
        self.model_accepts_loss_kwargs = True  # else labels are not counted
        collate = self.data_collator
        self.data_collator = lambda rows: collate(rows) | {"labels": pair_labels(rows)}

    def compute_loss(
        self, model: nn.Module, inputs: dict, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Mean of -log sigmoid(chosen - rejected - margin) (Touvron et al. 2023, arXiv 2307.09288, eq. 2) over the
        pairs in the optimiser step on all processes."""
        ids, mask, real = inputs["input_ids"], inputs["attention_mask"], inputs["labels"] != IGNORE_INDEX
        outputs = model(input_ids=ids, attention_mask=mask, use_cache=False)
        chosen, rejected = outputs.logits.squeeze(-1).chunk(2)
        losses = -logsigmoid(chosen - rejected - inputs["margin"].masked_fill(~real, 0))
        loss = masked_sum(losses, real) / num_items_in_batch * self.accelerator.num_processes
        with torch.no_grad():
            counts = [masked_sum(x.float(), real) for x in (chosen > rejected, chosen - rejected, real)]
            tokens = (mask * real.repeat(2)[:, None]).sum().float()
            correct, margin, pairs, tokens = self.accelerator.reduce(torch.stack([*counts, tokens]), "sum").tolist()
        count_tokens_trained(self, tokens)
        if pairs:
            log_metrics(self, accuracy=correct / pairs, margin=margin / pairs)
        return (loss, outputs) if return_outputs else loss

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Overridden, and not handed over ready-made, since DeepSpeed and FSDP want to prepare the model first."""
        trained = self.model if model is None else model
        assert trained is not None
        named = {name: p for name, p in trained.named_parameters() if p.requires_grad}
        # An adapter keeps its trained head as `score.modules_to_save`; the one that it started from is frozen.
        head = [p for name, p in named.items() if "score" in name.split(".")]
        trunk = {name: p for name, p in named.items() if "score" not in name.split(".")}
        # IA3's vectors are kept as matrices with one column; decay would pull them to 0, where nothing is 1.
        decays = {name for name, p in trunk.items() if p.ndim > 1 and "ia3_l" not in name.split(".")}
        groups: list[dict[str, Any]] = [
            {"params": [p for name, p in trunk.items() if name in decays]},
            {"params": [p for name, p in trunk.items() if name not in decays], "weight_decay": 0.0},
            {"params": head, "lr": self.head_learning_rate},
        ]
        args = self.args
        self.optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            args.learning_rate,
            betas=(args.adam_beta1, args.adam_beta2),
            weight_decay=args.weight_decay,
            fused=True,
        )
        return self.optimizer


def pair_labels(rows: Sequence[dict[str, Any]]) -> torch.Tensor:
    """(B,) 1 for a pair, IGNORE_INDEX for the filler: what a trainer counts its items by."""
    return torch.tensor([IGNORE_INDEX if row["margin"] == FILLER_MARGIN else 1 for row in rows])


def count_tokens_trained(trainer: SFTTrainer | RewardTrainer, tokens: float) -> None:
    """Adds to the tokens that the trainer has been trained on, and to its next log line."""
    set_tokens_trained(trainer, tokens_trained(trainer) + tokens)
    log_tokens(trainer)


def count_tokens(rows: Dataset) -> int:
    """Tokens in all rows."""
    return sum(len(ids) for ids in rows["input_ids"])
