"""What a dial is, and the groups of dials that several stages share.

A dial exists once, as a field of a frozen dataclass made with `dial(...)`: its default, its type, its range, its help
with unit and source. Nothing in this package imports a deep-learning library: `--help` answers at once.
"""

import dataclasses
from pathlib import Path
from typing import Any

from pipeline.config.columns import parse_columns
from pipeline.config.errors import ConfigError

SOURCES = "file, folder or hub dataset, or several (docs/data.md)"
CHECKPOINTING = "keep only each layer's input for the backward pass, compute the rest again: less memory, more time"
JUDGED = "`text`, `label` (positive or negative), seen by no stage; empty: sentiment is not judged"


def dial(
    default: Any,
    help: str,
    *,
    group: str = "",
    usual: bool = False,
    choices: tuple = (),
    low: float | None = None,
    high: float | None = None,
    place: bool = False,
) -> Any:
    """A dataclass field with its help text, closed set of values or inclusive range.

    `group` is the heading of this dial, and of those after it in its dataclass, in `--help all`; a `usual` dial stands
    in `--help` too. `place` marks one that says where something lies, not what it is (a stage is told apart by its
    inputs' content), or how the same mathematics is cut up, which changes a result by rounding alone.
    """
    return dataclasses.field(
        default=default,
        metadata=dict(help=help, group=group, usual=usual, choices=choices, low=low, high=high, place=place),
    )


def exact(total: int, parts: int, what: str) -> int:
    """total / parts, refusing a remainder: a batch that does not divide would silently change the mathematics."""
    if parts < 1 or total % parts:
        raise ConfigError(f"{what}: {total} does not divide by {parts}; choose a multiple")
    return total // parts


@dataclasses.dataclass(frozen=True)
class Reading:
    """What the columns of a row mean, and what becomes of rows that cannot be used (docs/data.md)."""

    columns: str = dial(
        "",
        "columns under other names, ours=theirs, and those left out on purpose, theirs=, for example "
        "`prompt=question,tools=`; of every file of rows",
        group="data",
    )
    bad_rows: str = dial(
        "error", "a row that cannot be used stops the stage, or is left out and counted", choices=("error", "drop")
    )
    max_bad_rows: float = dial(
        0.05, "share of a source's rows that bad_rows drop may leave out; above it, it stops", low=0, high=1, place=True
    )

    def __post_init__(self) -> None:
        parse_columns(self.columns)


@dataclasses.dataclass(frozen=True)
class Run:
    recipe: str = dial(
        "imdb",
        "name of the recipe: the folder of its runs and the wandb group (transformers' run_name)",
        group="run",
        usual=True,
    )
    runs: str = dial("runs", "folder that holds <recipe>/<stage>/, which is transformers' output_dir", place=True)
    seed: int = dial(0, "seed of initialisation, data order and sampling", low=0, usual=True)
    reading: Reading = Reading()
    precision: str = dial(
        "auto",
        "arithmetic of forward and backward (transformers' bf16 and fp16); weights stay fp32 (auto: bf16 where that is "
        "fast, else fp32; fp16: on CUDA GPUs, with a loss scale)",
        choices=("auto", "fp32", "bf16", "fp16"),
    )
    save_steps: int = dial(
        100,
        "optimiser steps (PPO: rollouts) between checkpoints, from which a stage that was cut off goes on; 0: none",
        low=0,
        place=True,
    )
    patience: float = dial(
        40.0, "seconds without a sign of life from another process before this one stops", low=1, place=True
    )
    report_to: str = dial(
        "wandb",
        "where metrics go besides metrics.jsonl; wandb is offline by itself without a key",
        choices=("wandb", "tensorboard", "trackio", "none"),
        place=True,
    )

    def folder(self, stage: str) -> Path:
        return Path(self.runs) / self.recipe / stage

    def final(self, stage: str, folder: str = "") -> Path:
        """The finished output of a stage: the directory given by a dial, else this recipe's own."""
        return Path(folder) if folder else self.folder(stage) / "final"


@dataclasses.dataclass(frozen=True)
class Optim:
    """AdamW with decoupled weight decay (Loshchilov & Hutter, arXiv 1711.05101), warm-up, then cosine to zero."""

    learning_rate: float = dial(1e-3, "peak learning rate", low=0, group="optimiser", usual=True)
    weight_decay: float = dial(0.1, "decoupled decay of matrices (not of biases and norms)", low=0)
    adam_beta2: float = dial(0.95, "decay of the second moment", low=0, high=1)
    warmup_steps: float = dial(
        0.05, "optimiser steps in which the learning rate rises linearly; below 1: their share of all steps", low=0
    )
    max_grad_norm: float = dial(1.0, "global gradient norm above which gradients are scaled down", low=0)
    num_train_epochs: float = dial(1.0, "passes over the training rows", low=0, usual=True)
    batch_size: int = dial(
        32,
        "rows per optimiser step, over all processes (micro_batch x gradient_accumulation_steps x processes)",
        low=1,
        usual=True,
    )
    micro_batch: int = dial(
        32, "rows per forward on one process (transformers' per_device_train_batch_size)", low=1, usual=True, place=True
    )
    gradient_checkpointing: bool = dial(False, CHECKPOINTING, place=True)

    def rows_per_forward(self, processes: int) -> int:
        """`micro_batch`, or a process's whole share of a batch where that is less."""
        return min(self.micro_batch, exact(self.batch_size, processes, "batch_size / processes"))

    def accumulation(self, processes: int) -> int:
        """Forwards per optimiser step on one process."""
        parts = self.rows_per_forward(processes) * processes
        return exact(self.batch_size, parts, "batch_size / (micro_batch x processes)")


@dataclasses.dataclass(frozen=True)
class Adapter:
    """LoRA (Hu et al., arXiv 2106.09685), rsLoRA (arXiv 2312.03732) or IA3 (Liu et al., arXiv 2205.05638)."""

    adapter: str = dial(
        "none",
        "train an adapter, or all weights (TRL's use_peft)",
        choices=("none", "lora", "ia3"),
        group="adapter",
        usual=True,
    )
    lora_r: int = dial(16, "rank of the LoRA update", low=1)
    lora_alpha: float = dial(32.0, "LoRA scale: the update is alpha/rank * BA (rsLoRA: alpha/sqrt(rank))", low=0)
    use_rslora: bool = dial(False, "rank-stabilised scale")
    use_dora: bool = dial(False, "LoRA trains direction and magnitude apart (Liu et al., arXiv 2402.09353)")
    target_modules: str = dial("", "comma-separated module names; empty: every linear layer but the head (IA3: PEFT's)")
    load_in_4bit: bool = dial(
        False, "the frozen base in 4 bits, in memory (Dettmers et al., arXiv 2305.14314): CUDA and bitsandbytes"
    )

    def check(self) -> None:
        if self.use_dora and self.adapter != "lora":
            raise ConfigError(f"use_dora: it is a kind of LoRA, and adapter is {self.adapter}; say --adapter lora")
        if self.load_in_4bit and self.adapter == "none":
            raise ConfigError("load_in_4bit: weights of 4 bits cannot be trained; say --adapter lora or ia3")


@dataclasses.dataclass(frozen=True)
class Tokens:
    """What a tokenizer that a stage starts from lacks, or says otherwise than its chat template."""

    eos_token: str = dial(
        "", "token that ends a text or answer, for example <|im_end|>; empty: the tokenizer's own", group="tokens"
    )
    chat_template: str = dial(
        "", "jinja file that renders conversations (TRL's chat_template_path); empty: the tokenizer's own", place=True
    )


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Pure sampling: what is sampled is exactly what is scored, so there is no top-k, top-p or penalty to set."""

    max_new_tokens: int = dial(
        40, "longest response, in tokens, EOS included (TRL's response_length)", low=1, group="sampling", usual=True
    )
    max_prompt_tokens: int = dial(64, "longest prompt, in tokens (TRL's max_prompt_length)", low=1)
    long_prompts: str = dial(
        "cut", "a longer prompt keeps its end, is left out, or stops the stage", choices=("cut", "drop", "error")
    )
    temperature: float = dial(1.0, "divides the logits in sampling and in every scoring forward", low=1e-3)
