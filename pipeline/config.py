"""Every dial of every stage, and `parse`: the YAML file first, then the command line, both type-checked.

A dial exists once, as a field of a frozen dataclass made with `dial(...)`: its default, its type, its range, its help
with unit and source. Dataclasses are composed by concern (`Run`, `Optim`, `Adapter`, `Sampling`); on the command line
and in YAML their fields are flat (`--seed 1`, `seed: 1`), so a name may occur only once in a stage. This module imports
no deep-learning library: `--help` answers at once.
"""

import argparse
import dataclasses
import difflib
import math
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_type_hints

import yaml

SOURCES = "file, folder or hub dataset, or several (docs/data.md)"
CHECKPOINTING = "keep only each layer's input for the backward pass, compute the rest again: less memory, more time"
JUDGED = "`text`, `label` (positive or negative), seen by no stage; empty: sentiment is not judged"


class UserError(ValueError):
    """Something a user can mend; its message is all they need to read, so stages print it without a traceback."""


class ConfigError(UserError):
    """A dial, file or combination of dials that cannot be used; the message says which, and what was expected."""


def dial(
    default: Any,
    help: str,
    *,
    choices: tuple = (),
    low: float | None = None,
    high: float | None = None,
    place: bool = False,
) -> Any:
    """A dataclass field with its help text, closed set of values or inclusive range.

    `place` marks a dial that says where something lies, not what it is: a stage is told apart by its inputs' content.
    """
    return dataclasses.field(
        default=default, metadata=dict(help=help, choices=choices, low=low, high=high, place=place)
    )


def exact(total: int, parts: int, what: str) -> int:
    """total / parts, refusing a remainder: a batch that does not divide would silently change the mathematics."""
    if parts < 1 or total % parts:
        raise ConfigError(f"{what}: {total} does not divide by {parts}; choose a multiple")
    return total // parts


@dataclasses.dataclass(frozen=True)
class Run:
    recipe: str = dial("imdb", "name of the recipe: the folder of its runs and the wandb group")
    runs: str = dial("runs", "folder that holds <recipe>/<stage>/", place=True)
    seed: int = dial(0, "seed of initialisation, data order and sampling", low=0)
    bad_rows: str = dial(
        "error", "a row that cannot be used stops the stage, or is left out and counted", choices=("error", "drop")
    )
    precision: str = dial(
        "auto",
        "arithmetic of forward and backward; weights stay fp32 (auto: bf16 where that is fast, else fp32; fp16: on "
        "CUDA GPUs, with a loss scale)",
        choices=("auto", "fp32", "bf16", "fp16"),
    )
    checkpoint_every: int = dial(
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

    def final(self, stage: str, given: str = "") -> Path:
        """The finished output of a stage: the directory given by a dial, else this recipe's own."""
        return Path(given) if given else self.folder(stage) / "final"


@dataclasses.dataclass(frozen=True)
class Optim:
    """AdamW with decoupled weight decay (Loshchilov & Hutter, arXiv 1711.05101), warm-up, then cosine to zero."""

    learning_rate: float = dial(1e-3, "peak learning rate", low=0)
    weight_decay: float = dial(0.1, "decoupled decay of matrices (not of biases and norms)", low=0)
    adam_beta2: float = dial(0.95, "decay of the second moment", low=0, high=1)
    warmup: float = dial(0.05, "share of the steps in which the learning rate rises linearly", low=0, high=1)
    max_grad_norm: float = dial(1.0, "global gradient norm above which gradients are scaled down", low=0)
    epochs: float = dial(1.0, "passes over the training rows", low=0)
    batch_size: int = dial(32, "rows per optimiser step, over all processes", low=1)
    micro_batch: int = dial(32, "rows per forward on one process", low=1)
    gradient_checkpointing: bool = dial(False, CHECKPOINTING)

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

    adapter: str = dial("none", "train an adapter, or all weights", choices=("none", "lora", "ia3"))
    lora_rank: int = dial(16, "rank of the LoRA update", low=1)
    lora_alpha: float = dial(32.0, "LoRA scale: the update is alpha/rank * BA (rsLoRA: alpha/sqrt(rank))", low=0)
    rslora: bool = dial(False, "rank-stabilised scale")
    dora: bool = dial(False, "LoRA trains direction and magnitude apart (Liu et al., arXiv 2402.09353)")
    adapter_targets: str = dial(
        "", "comma-separated module names; empty: every linear layer but the head (IA3: PEFT's)"
    )
    load_in_4bit: bool = dial(
        False, "the frozen base in 4 bits, in memory (Dettmers et al., arXiv 2305.14314): CUDA and bitsandbytes"
    )

    def check(self) -> None:
        if self.dora and self.adapter != "lora":
            raise ConfigError(f"dora: it is a kind of LoRA, and adapter is {self.adapter}; say --adapter lora")
        if self.load_in_4bit and self.adapter == "none":
            raise ConfigError("load_in_4bit: weights of 4 bits cannot be trained; say --adapter lora or ia3")


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Pure sampling: what is sampled is exactly what is scored, so there is no top-k, top-p or penalty to set."""

    max_new_tokens: int = dial(40, "longest response, in tokens, EOS included", low=1)
    max_prompt_tokens: int = dial(64, "longest prompt, in tokens", low=1)
    long_prompts: str = dial(
        "cut", "a longer prompt keeps its end, is left out, or stops the stage", choices=("cut", "drop", "error")
    )
    temperature: float = dial(1.0, "divides the logits in sampling and in every scoring forward", low=1e-3)


@dataclasses.dataclass(frozen=True)
class Pretrain:
    run: Run = Run()
    optim: Optim = Optim(learning_rate=3e-3)
    train_file: str = dial("data/imdb/pretrain/train.jsonl", "`text`: " + SOURCES, place=True)
    validation_file: str = dial("data/imdb/pretrain/validation.jsonl", "rows as in train_file", place=True)
    train_rows: int = dial(0, "use the first n rows; 0: all", low=0)
    validation_rows: int = dial(0, "use the first n rows; 0: all", low=0)
    stream: bool = dial(False, "read the rows while training and hold none: for text larger than memory; needs steps")
    steps: int = dial(0, "optimiser steps; 0: as many as `epochs` passes take", low=0)
    tokenizer: str = dial("bpe", "bpe | char | word: trained on the training text; else a tokenizer's name or folder")
    vocab_size: int = dial(4096, "entries of a trained tokenizer, special tokens included", low=8)
    init: str = dial("", "continue this model instead of starting from scratch (with its tokenizer)")
    hidden_size: int = dial(256, "width of the residual stream", low=8)
    intermediate_size: int = dial(704, "width of the gated MLP (Llama: about 8/3 of hidden_size)", low=8)
    layers: int = dial(4, "transformer blocks", low=1)
    heads: int = dial(4, "attention heads", low=1)
    context: int = dial(256, "tokens per packed row", low=8)
    packing: str = dial("wrapped", "how texts fill rows; neither loses a token", choices=("wrapped", "bfd_split"))
    sample_tokens: int = dial(60, "tokens of each sample shown at the end", low=1)

    def check(self) -> None:
        exact(self.hidden_size, self.heads, "hidden_size / heads")
        if self.stream and not self.steps:
            raise ConfigError("stream: the number of rows is not known, so say how many --steps to train")


@dataclasses.dataclass(frozen=True)
class SFT:
    run: Run = Run()
    optim: Optim = Optim(learning_rate=1e-3)
    adapter: Adapter = Adapter()
    base: str = dial("", "model to start from; empty: this recipe's pretrain/final", place=True)
    train_file: str = dial(
        "data/imdb/sft/train.jsonl", "`prompt` + `completion`, `messages`, or pairs: " + SOURCES, place=True
    )
    validation_file: str = dial("data/imdb/sft/validation.jsonl", "rows as in train_file", place=True)
    train_rows: int = dial(0, "use the first n rows; 0: all", low=0)
    validation_rows: int = dial(0, "use the first n rows; 0: all", low=0)
    max_tokens: int = dial(128, "longest prompt + completion + EOS", low=4)
    too_long: str = dial(
        "drop", "a longer row is left out, keeps its first tokens, or stops the stage", choices=("drop", "cut", "error")
    )
    label_smoothing: float = dial(
        0.0, "probability spread over the K-1 wrong classes (Szegedy et al., arXiv 1512.00567)", low=0, high=0.8
    )

    def check(self) -> None:
        self.adapter.check()


@dataclasses.dataclass(frozen=True)
class Reward:
    run: Run = Run()
    optim: Optim = Optim(batch_size=32, micro_batch=32)
    adapter: Adapter = Adapter()
    head_learning_rate: float = dial(5e-3, "peak learning rate of the score head, which alone starts from noise", low=0)
    base: str = dial("", "model to start from; empty: this recipe's pretrain/final", place=True)
    sft: str = dial("", "policy whose samples are given mean score 0; empty: this recipe's sft/final", place=True)
    train_file: str = dial(
        "data/imdb/reward/train.jsonl",
        "`chosen`, `rejected`, optional `prompt`, `margin`: " + SOURCES,
        place=True,
    )
    validation_file: str = dial("data/imdb/reward/validation.jsonl", "rows as in train_file", place=True)
    test_file: str = dial("data/imdb/reward/test.jsonl", "rows as in train_file; read once, at the end", place=True)
    prompts_file: str = dial(
        "data/imdb/ppo/validation.jsonl", "`prompt`, for the samples of mean score 0: " + SOURCES, place=True
    )
    train_rows: int = dial(0, "use the first n rows; 0: all", low=0)
    validation_rows: int = dial(0, "use the first n rows; 0: all", low=0)
    centre_prompts: int = dial(512, "prompts sampled to centre the score", low=1)
    max_tokens: int = dial(128, "longest prompt + completion + EOS", low=4)
    too_long: str = dial(
        "drop", "a longer row is left out, keeps its first tokens, or stops the stage", choices=("drop", "cut", "error")
    )
    sampling: Sampling = Sampling()

    def check(self) -> None:
        self.adapter.check()


@dataclasses.dataclass(frozen=True)
class PPO:
    run: Run = Run(checkpoint_every=10)
    adapter: Adapter = Adapter(adapter="lora")
    sampling: Sampling = Sampling()
    sft: str = dial("", "starting policy and frozen reference; empty: this recipe's sft/final", place=True)
    reward: str = dial("", "reward model; empty: this recipe's reward/final", place=True)
    train_file: str = dial("data/imdb/ppo/train.jsonl", "`prompt`, `messages`, or pairs: " + SOURCES, place=True)
    validation_file: str = dial("data/imdb/ppo/validation.jsonl", "rows as in train_file", place=True)
    rollouts: int = dial(60, "rollouts: sample, score, then update", low=1)
    rollout_batch: int = dial(128, "responses per rollout, over all processes", low=1)
    epochs: int = dial(2, "passes over each rollout (Schulman et al., arXiv 1707.06347)", low=1)
    minibatches: int = dial(2, "optimiser steps per epoch", low=1)
    target_kl: float | None = dial(
        None,
        "nats per token: a rollout's later epochs are left out once an epoch's approx_kl passes 1.5 times this",
        low=0,
    )
    micro_batch: int = dial(64, "sequences per forward on one process", low=1)
    gradient_checkpointing: bool = dial(False, CHECKPOINTING)
    learning_rate: float = dial(1e-3, "policy's learning rate, falling linearly to zero", low=0)
    critic_learning_rate: float = dial(5e-4, "critic's learning rate, falling linearly to zero", low=0)
    adam_eps: float = dial(
        1e-5, "Adam's epsilon (Huang et al. 2023, The N implementation details of RLHF with PPO)", low=0
    )
    max_grad_norm: float = dial(1.0, "global gradient norm above which gradients are scaled down", low=0)
    kl_coef: float = dial(
        0.1, "beta: reward units per nat of KL to the reference (Ziegler et al., arXiv 1909.08593)", low=0
    )
    adaptive_kl: float | None = dial(
        None, "nats per response to which kl_coef is steered (Ziegler et al., eq. 4); none: it is fixed", low=1e-6
    )
    adaptive_kl_horizon: int = dial(10_000, "responses over which kl_coef adapts", low=1)
    gamma: float = dial(1.0, "discount per token", low=0, high=1)
    lam: float = dial(0.95, "lambda of GAE (Schulman et al., arXiv 1506.02438)", low=0, high=1)
    clip: float = dial(0.2, "epsilon of the clipped ratio", low=0)
    value_clip: float = dial(0.2, "largest change of a value per rollout, in reward units", low=0)
    value_coef: float = dial(0.5, "c1: weight of the value loss", low=0)
    entropy_coef: float = dial(0.0, "c2: weight of the entropy bonus", low=0)
    score_clip: float | None = dial(
        None, "scores beyond +-this are cut to it, in reward units: enough is enough; none: they are not", low=0
    )
    missing_eos_score: float | None = dial(-1.0, "replaces the score of a response without EOS; none: keep the score")
    critic: str = dial(
        "reward",
        "state values: from a model of their own, made from the reward model or from sft, or from a head on the "
        "policy's trunk (one forward for both; critic_learning_rate is then the head's)",
        choices=("reward", "sft", "head"),
    )
    critic_warmup: int = dial(10, "first rollouts in which only the critic learns", low=0)
    keep: str = dial(
        "best", "the policy of the evaluation with the highest reward, or of the last rollout", choices=("best", "last")
    )
    kl_budget: float | None = dial(
        None, "nats per response on validation prompts: above it the run stops and goes back to the best", low=0
    )
    collapse_alarm: bool = dial(True, "the same when entropy halves or the text repeats itself (docs/ppo.md)")
    eval_every: int = dial(10, "rollouts between evaluations on validation prompts", low=1)
    eval_prompts: int = dial(128, "validation prompts per evaluation", low=1)
    judge_file: str = dial(
        "", "judges of sentiment in the evaluations, one fitted to these rows: " + JUDGED, place=True
    )

    def check(self) -> None:
        self.adapter.check()
        if self.adapter.load_in_4bit and self.critic == "head":
            raise ConfigError("critic: a head is saved with the policy's adapter merged, which 4 bits cannot hold")
        if self.critic_warmup >= self.rollouts:
            raise ConfigError(
                f"critic_warmup ({self.critic_warmup}) leaves no rollout of {self.rollouts} to train the policy in; "
                "lower critic_warmup or raise rollouts"
            )
        exact(self.rollout_batch, self.minibatches, "rollout_batch / minibatches")

    def per_process(self, processes: int) -> int:
        return exact(self.rollout_batch, processes, "rollout_batch / processes")

    def micro_batches(self, processes: int) -> int:
        """Micro-batches per optimiser step on one process."""
        own = exact(self.per_process(processes), self.minibatches, "rollout_batch / processes / minibatches")
        return exact(own, min(self.micro_batch, own), "sequences per minibatch and process / micro_batch")


@dataclasses.dataclass(frozen=True)
class Merge:
    run: Run = Run()
    policy: str = dial("", "policy to merge; empty: this recipe's ppo/final", place=True)
    probe_file: str = dial(
        "data/imdb/ppo/validation.jsonl", "rows with `prompt`: merged and unmerged must agree on them", place=True
    )


DTYPE = "type of the weights that are written; fp32 is exact, the others are measured against it"
DRIFT = "write although rounding to dtype, or merging, changes more than 5 % of what the adapter does"
PROBES = "rows with `prompt`: merged, on the fly and mixed from the parents must agree on them"
BASE = "model that the adapters were trained on; empty: the one in their folders"


@dataclasses.dataclass(frozen=True)
class Compose:
    """A new adapter, made from others by an expression: `compose "sft + 0.5*helpful - 0.3*toxic"`."""

    expression: str = dial("", "sum of adapters by their names (docs/adapter-arithmetic.md); stands first, unnamed")
    adapters: str = dial("", "what the names mean: name=folder,name=folder")
    out: str = dial("", "folder to write, not there yet")
    base: str = dial("", BASE)
    rank: int = dial(0, "ranks of the result at most; 0: as many as it needs", low=0)
    max_loss: float = dial(0.01, "share of |dW|^2 that `rank` may cost any module", low=0, high=1)
    max_rank: int = dial(512, "refuse a result of more ranks (vLLM serves up to 512)", low=1)
    heads: str = dial(
        "refuse",
        "whole layers trained beside the adapters: refused, the first adapter's, or base + sum of weighted differences",
        choices=("refuse", "first", "sum"),
    )
    dtype: str = dial("fp32", DTYPE, choices=("fp32", "bf16", "fp16"))
    allow_drift: bool = dial(False, DRIFT)
    probe_file: str = dial("data/imdb/ppo/validation.jsonl", PROBES)


@dataclasses.dataclass(frozen=True)
class MergeAdapter:
    """A plain model from an adapter and its base: `merge runs/x/composed`."""

    adapter: str = dial("", "folder of the adapter, composed or any other; stands first, unnamed")
    out: str = dial("", "folder to write, not there yet")
    base: str = dial("", BASE)
    dtype: str = dial("fp32", DTYPE, choices=("fp32", "bf16", "fp16"))
    allow_drift: bool = dial(False, DRIFT)
    probe_file: str = dial("data/imdb/ppo/validation.jsonl", PROBES)


@dataclasses.dataclass(frozen=True)
class Inspect:
    """What an adapter is: `inspect runs/x/composed`."""

    adapter: str = dial("", "folder of the adapter; stands first, unnamed")
    against: str = dial("", "another adapter: the cosine between the two, module by module")
    base: str = dial("", BASE)


@dataclasses.dataclass(frozen=True)
class Verify:
    """A composed adapter made anew from its parents, and what they and it write: `verify runs/x/composed`."""

    adapter: str = dial("", "folder of the composed adapter; stands first, unnamed")
    adapters: str = dial("", "parents that have moved: name=folder,name=folder")
    base: str = dial("", BASE)
    prompts_file: str = dial(
        "data/imdb/ppo/validation.jsonl", "`prompt` rows that parents and result answer; empty: none"
    )
    prompts: int = dial(64, "how many prompts", low=2)
    bad_rows: str = dial(
        "error", "a row that cannot be used stops it, or is left out and counted", choices=("error", "drop")
    )
    judge_file: str = dial("", "a second judge is fitted to these rows: " + JUDGED)
    seed: int = dial(0, "seed of sampling", low=0)
    sampling: Sampling = Sampling()


MEASURES = ("loss", "accuracy", "reward", "vader", "classifier")


@dataclasses.dataclass(frozen=True)
class Search:
    """Numbers for an expression's variables, found without training: `search "sft + $x*good" --range x=0:1.5`."""

    expression: str = dial("", "sum of adapters with $variables (docs/adapter-arithmetic.md); stands first, unnamed")
    adapters: str = dial("", "what the names mean: name=folder,name=folder")
    range: str = dial("", "where each variable may lie: x=0:1.5,y=-1:1")
    out: str = dial("", "folder to write, not there yet")
    base: str = dial("", BASE)
    objective: str = dial(
        "loss",
        "what is made best: loss of completions (nats per token), accuracy (the chosen of a pair is the likelier), or "
        "of sampled responses the reward model's score, VADER's compound or the fitted classifier's P(positive)",
        choices=MEASURES,
    )
    constraints: str = dial(
        "",
        "what must hold meanwhile: `perplexity <= 1.05*base, kl <= 6`; base is the model without adapters; objectives "
        "and repetition may be named too",
    )
    also: str = dial("", "comma-separated measures, as in constraints, that decide nothing and are reported")
    validation_file: str = dial("", "`prompt` + `completion` (loss), pairs (accuracy), else `prompt`: " + SOURCES)
    test_file: str = dial("", "rows as in validation_file and none of them; measured once, at the end")
    retain_file: str = dial("", "`text` of the perplexity: " + SOURCES)
    retain_test_file: str = dial("", "rows as in retain_file and none of them; measured once, at the end")
    reference: str = dial("base", "expression that kl is measured from: the policy before alignment")
    reward: str = dial("", "reward model, for the objective reward")
    judge_file: str = dial("", "the classifier is fitted to these rows: " + JUDGED)
    rows: int = dial(0, "use the first n rows of each file; 0: all", low=0)
    max_tokens: int = dial(128, "longest row; a longer one is left out, of retain_file cut", low=4)
    budget: int = dial(25, "trials at most", low=1)
    grid: int = dial(0, "how many of them lie on a grid, the others where it was best; 0: half of them", low=0)
    batch_size: int = dial(64, "sequences per forward", low=1)
    bad_rows: str = dial(
        "error", "a row that cannot be used stops it, or is left out and counted", choices=("error", "drop")
    )
    seed: int = dial(0, "seed of sampling, the same noise in every trial", low=0)
    sampling: Sampling = Sampling()

    def check(self) -> None:
        if self.grid > self.budget:
            raise ConfigError(f"grid ({self.grid}) is more than budget ({self.budget}); lower grid or raise budget")


@dataclasses.dataclass(frozen=True)
class Evaluate:
    run: Run = Run()
    sampling: Sampling = Sampling()
    base: str = dial("", "pretrained model; empty: this recipe's pretrain/final", place=True)
    sft: str = dial("", "policy before PPO; empty: this recipe's sft/final", place=True)
    policy: str = dial("", "policy after PPO; empty: this recipe's merge/final", place=True)
    reward: str = dial("", "reward model; empty: this recipe's reward/final", place=True)
    prompts_file: str = dial(
        "data/imdb/ppo/test.jsonl", "held-out `prompt`, `messages`, or pairs: " + SOURCES, place=True
    )
    judge_file: str = dial(
        "data/imdb/judge/train.jsonl", "the second judge is fitted to these rows: " + JUDGED, place=True
    )
    prompts: int = dial(1000, "how many prompts", low=2)
    batch_size: int = dial(128, "sequences per forward", low=1)
    show: int = dial(20, "samples shown side by side", low=1)


@dataclasses.dataclass(frozen=True)
class Chat:
    run: Run = Run(report_to="none")
    sampling: Sampling = Sampling(max_new_tokens=60, max_prompt_tokens=2048)
    prompt: str = dial("", "answer this one prompt and leave; empty: ask at the terminal")
    policies: str = dial("base,sft,ppo", "which of them answer")

    def check(self) -> None:
        for name in self.policies.split(","):
            if name not in ("base", "sft", "ppo"):
                raise ConfigError(f"policies: expected some of base,sft,ppo, got '{name}'")


Config = TypeVar("Config", Pretrain, SFT, Reward, PPO, Merge, Evaluate, Chat)
Command = TypeVar("Command", Compose, Verify, Inspect, MergeAdapter, Search)


def flat(config: Any) -> dict[str, Any]:
    """All dials of a config by name."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        values |= flat(value) if dataclasses.is_dataclass(value) else {field.name: value}
    return values


def identity(config: Any) -> dict[str, Any]:
    """The dials that decide what a stage computes."""
    return {field.name: getattr(owner, field.name) for owner, field, _ in _dials(config) if not field.metadata["place"]}


def parse(kind: type[Config], argv: Sequence[str] | None = None) -> Config:
    """The stage's config: defaults, then `--config file.yaml` (default configs/imdb/<stage>.yaml), then `--dial value`.

    Ends the program with status 2 and one sentence when a key is unknown or a value has the wrong type or range.
    """
    stage = kind.__name__.lower()
    argv = list(sys.argv[1:] if argv is None else argv)
    return _parse(kind, f"stages/{stage}.py", f"The {stage} stage.", f"configs/imdb/{stage}.yaml", argv)


def parse_command(kind: type[Command], program: str, argv: Sequence[str]) -> Command:
    """The dials of one command of a stage that has several: its first one may stand first, without its name.

    As `parse`, but a YAML file is read only where `--config` gives one.
    """
    argv = list(argv)
    if argv and argv[0] != "-h" and not re.match(r"--\w+(=|$)", argv[0]):
        argv[0] = f"--{dataclasses.fields(kind)[0].name}={argv[0]}"  # an expression may begin with a minus sign
    return _parse(kind, program, str(kind.__doc__), "", argv)


def _parse(kind: Any, program: str, about: str, default_file: str, argv: list[str]) -> Any:
    defaults = kind()
    parser = _Parser(prog=program, description=about, formatter_class=_Help, allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE", help=f"YAML of dials (default: {default_file or 'none'})")
    for owner, field, hint in _dials(defaults):
        default = getattr(owner, field.name)
        parser.add_argument(
            f"--{field.name}", type=_reader(field, hint), default=default, metavar=_metavar(field, hint),
            help=f"{field.metadata['help']} (default: {_text(default) or 'empty'})".replace("%", "%%"),
        )  # fmt: skip
    file = _config_file(argv) or default_file
    helps = not {"-h", "--help"}.isdisjoint(argv)  # answers wherever it is asked, with or without a readable file
    given = parser.parse_args(argv if helps or not file else _yaml_tokens(Path(file), parser) + argv)
    try:
        config = _rebuild(defaults, vars(given))
        if hasattr(config, "check"):
            config.check()
    except ConfigError as error:
        parser.error(str(error))
    return config


class _Help(argparse.HelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32, width=min(120, int(os.environ.get("COLUMNS", "120"))))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        unknown = message.removeprefix("unrecognized arguments: ")
        if unknown != message:
            key = unknown.split(" ")[0].lstrip("-").split("=")[0]
            message = f"unknown dial '{key}'" + nearest(key, [a.dest for a in self._actions])
        self.exit(2, f"error: {message}\n")


def nearest(key: str, known: Sequence[str]) -> str:
    """'; did you mean …?' where a known name is close."""
    close = difflib.get_close_matches(key, known, 1)
    return f"; did you mean '{close[0]}'?" if close else ""


def _dials(config: Any) -> Iterator[tuple[Any, dataclasses.Field, Any]]:
    hints = get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from _dials(value)
        else:
            yield config, field, hints[field.name]


def _rebuild(config: Any, values: dict[str, Any]) -> Any:
    fields = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        fields[field.name] = _rebuild(value, values) if dataclasses.is_dataclass(value) else values[field.name]
    return type(config)(**fields)


def _reader(field: dataclasses.Field, hint: Any) -> Any:
    meta = field.metadata

    def read(text: str) -> Any:
        if hint == float | None and text == "none":
            return None
        kind = float if hint == float | None else hint
        try:
            value = {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
        except (ValueError, KeyError):
            expected = {int: "an integer", float: "a number", bool: "true or false"}[kind]
            raise argparse.ArgumentTypeError(f"expected {expected}, got '{text}'") from None
        if isinstance(value, float) and not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"expected a finite number, got '{text}'")
        if meta["choices"] and value not in meta["choices"]:
            raise argparse.ArgumentTypeError(f"expected one of {', '.join(meta['choices'])}, got '{text}'")
        if meta["low"] is not None and value < meta["low"]:
            raise argparse.ArgumentTypeError(f"expected at least {meta['low']}, got {text}")
        if meta["high"] is not None and value > meta["high"]:
            raise argparse.ArgumentTypeError(f"expected at most {meta['high']}, got {text}")
        return value

    return read


def _metavar(field: dataclasses.Field, hint: Any) -> str:
    if field.metadata["choices"]:
        return "|".join(field.metadata["choices"])
    return {int: "N", float: "X", bool: "true|false", str: "TEXT"}.get(hint, "X|none")


def _text(value: Any) -> str:
    """A value as it is written on the command line and in YAML."""
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _config_file(argv: list[str]) -> str | None:
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    return first.parse_known_args(argv)[0].config


def _yaml_tokens(file: Path, parser: _Parser) -> list[str]:
    """The YAML file as command-line tokens, so that file and command line pass the same type checks."""
    if not file.is_file():
        parser.error(f"{file}: no such config file (run from the project's folder, or give --config)")
    try:
        rows = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, ValueError) as error:  # ValueError: not UTF-8, or a date that no calendar has
        parser.error(f"{file}: not readable as YAML: {' '.join(str(error).split())}")
    if not isinstance(rows, dict):
        parser.error(f"{file}: expected `dial: value` lines")
    known = {action.dest: action for action in parser._actions if action.dest not in ("config", "help")}
    tokens = []
    for key, value in rows.items():
        if key not in known:
            parser.error(f"{file}: unknown dial '{key}'" + nearest(str(key), list(known)))
        if isinstance(value, (dict, list)):
            parser.error(f"{file}: {key}: expected one value, got {type(value).__name__}")
        text = _text(value)
        if known[key].metavar == "TEXT" and not isinstance(value, str):
            parser.error(f"{file}: {key}: expected text, got {text}; put it in quotes")
        try:
            known[key].type(text)  # type: ignore[operator, misc]
        except argparse.ArgumentTypeError as error:
            parser.error(f"{file}: {key}: {error}")
        tokens.append(f"--{key}={text}")
    return tokens
