"""The dials of each stage.

Dataclasses are composed by concern (`Run`, `Optim`, `Adapter`, `Sampling`); on the command line and in YAML their
fields are flat (`--seed 1`, `seed: 1`), so a name may occur only once in a stage.
"""

import dataclasses

from pipeline.config.dials import CHECKPOINTING, JUDGED, SOURCES, Adapter, Optim, Run, Sampling, Tokens, dial, exact
from pipeline.config.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Pretrain:
    run: Run = Run()
    optim: Optim = Optim(learning_rate=3e-3)
    train_file: str = dial("data/imdb/pretrain/train.jsonl", "`text`: " + SOURCES, place=True, group="data", usual=True)
    validation_file: str = dial("data/imdb/pretrain/validation.jsonl", "rows as in train_file", place=True, usual=True)
    train_rows: int = dial(0, "use the first n rows; 0: all", low=0)
    validation_rows: int = dial(0, "use the first n rows; 0: all", low=0)
    stream: bool = dial(
        False, "read the rows while training and hold none: for text larger than memory; needs max_steps"
    )
    max_steps: int = dial(0, "optimiser steps; 0: as many as num_train_epochs takes", low=0, group="optimiser")
    tokenizer: str = dial(
        "bpe", "bpe | char | word: trained on the training text; else a tokenizer's name or folder", group="model"
    )
    vocab_size: int = dial(4096, "entries of a trained tokenizer, special tokens included", low=8)
    init: str = dial(
        "",
        "continue this model (transformers' model_name_or_path), with its tokenizer, instead of starting from scratch",
    )
    hidden_size: int = dial(256, "width of the residual stream", low=8, usual=True)
    intermediate_size: int = dial(704, "width of the gated MLP (Llama: about 8/3 of hidden_size)", low=8)
    num_hidden_layers: int = dial(4, "transformer blocks", low=1, usual=True)
    num_attention_heads: int = dial(4, "attention heads", low=1, usual=True)
    context: int = dial(256, "tokens per packed row (TRL's max_length)", low=8, group="data", usual=True)
    packing_strategy: str = dial(
        "wrapped", "how texts fill rows; neither loses a token", choices=("wrapped", "bfd_split")
    )
    sample_tokens: int = dial(60, "tokens of each sample shown at the end", low=1, group="evaluation")
    tokens: Tokens = Tokens()

    def check(self) -> None:
        exact(self.hidden_size, self.num_attention_heads, "hidden_size / num_attention_heads")
        if self.tokens != Tokens() and not self.init and self.tokenizer in ("bpe", "char", "word"):
            raise ConfigError(
                "eos_token, chat_template: a tokenizer that is trained here ends texts with <eos> and knows no "
                "conversations: leave them out, or name another tokenizer"
            )
        if self.stream and not self.max_steps:
            raise ConfigError("stream: the number of rows is not known, so say how many --max_steps to train")


@dataclasses.dataclass(frozen=True)
class SFT:
    run: Run = Run()
    optim: Optim = Optim(learning_rate=1e-3)
    adapter: Adapter = Adapter()
    base: str = dial(
        "",
        "model to start from (TRL's model_name_or_path); empty: this recipe's pretrain/final",
        place=True,
        group="models",
        usual=True,
    )
    train_file: str = dial(
        "data/imdb/sft/train.jsonl",
        "`prompt` + `completion`, `messages`, or pairs: " + SOURCES,
        place=True,
        group="data",
        usual=True,
    )
    validation_file: str = dial("data/imdb/sft/validation.jsonl", "rows as in train_file", place=True, usual=True)
    train_rows: int = dial(0, "use the first n rows; 0: all", low=0)
    validation_rows: int = dial(0, "use the first n rows; 0: all", low=0)
    max_length: int = dial(128, "longest prompt + completion + EOS", low=4, usual=True)
    too_long: str = dial(
        "drop", "a longer row is left out, keeps its first tokens, or stops the stage", choices=("drop", "cut", "error")
    )
    label_smoothing: float = dial(
        0.0,
        "probability spread over the K-1 wrong classes (Szegedy et al., arXiv 1512.00567); transformers' "
        "label_smoothing_factor is spread over all K",
        low=0,
        high=0.8,
        group="optimiser",
    )
    tokens: Tokens = Tokens()

    def check(self) -> None:
        self.adapter.check()


@dataclasses.dataclass(frozen=True)
class Reward:
    run: Run = Run()
    optim: Optim = Optim(batch_size=32, micro_batch=32)
    adapter: Adapter = Adapter()
    head_learning_rate: float = dial(
        5e-3, "peak learning rate of the score head, which alone starts from noise", low=0, group="optimiser"
    )
    base: str = dial(
        "",
        "model to start from (TRL's model_name_or_path); empty: this recipe's pretrain/final",
        place=True,
        group="models",
        usual=True,
    )
    sft: str = dial("", "policy whose samples are given mean score 0; empty: this recipe's sft/final", place=True)
    train_file: str = dial(
        "data/imdb/reward/train.jsonl",
        "`chosen`, `rejected`, optional `prompt`, `margin`: " + SOURCES,
        place=True,
        group="data",
        usual=True,
    )
    validation_file: str = dial("data/imdb/reward/validation.jsonl", "rows as in train_file", place=True, usual=True)
    test_file: str = dial("data/imdb/reward/test.jsonl", "rows as in train_file; read once, at the end", place=True)
    prompts_file: str = dial(
        "data/imdb/ppo/validation.jsonl", "`prompt`, for the samples of mean score 0: " + SOURCES, place=True
    )
    train_rows: int = dial(0, "use the first n rows; 0: all", low=0)
    validation_rows: int = dial(0, "use the first n rows; 0: all", low=0)
    centre_prompts: int = dial(512, "prompts sampled to centre the score", low=1)
    max_length: int = dial(128, "longest prompt + completion + EOS", low=4, usual=True)
    too_long: str = dial(
        "drop", "a longer row is left out, keeps its first tokens, or stops the stage", choices=("drop", "cut", "error")
    )
    sampling: Sampling = Sampling()
    tokens: Tokens = Tokens()

    def check(self) -> None:
        self.adapter.check()


@dataclasses.dataclass(frozen=True)
class PPO:
    run: Run = Run(save_steps=10)
    adapter: Adapter = Adapter(adapter="lora")
    sampling: Sampling = Sampling()
    sft: str = dial(
        "",
        "starting policy and frozen reference (TRL's sft_model_path); empty: this recipe's sft/final",
        place=True,
        group="models",
        usual=True,
    )
    reward: str = dial(
        "", "reward model (TRL's reward_model_path); empty: this recipe's reward/final", place=True, usual=True
    )
    train_file: str = dial(
        "data/imdb/ppo/train.jsonl", "`prompt`, `messages`, or pairs: " + SOURCES, place=True, group="data", usual=True
    )
    validation_file: str = dial("data/imdb/ppo/validation.jsonl", "rows as in train_file", place=True)
    rollouts: int = dial(
        60,
        "rollouts: sample, score, then update (TRL's total_episodes / rollout_batch)",
        low=1,
        group="PPO",
        usual=True,
    )
    rollout_batch: int = dial(128, "responses per rollout, over all processes (TRL's batch_size)", low=1, usual=True)
    num_ppo_epochs: int = dial(2, "passes over each rollout (Schulman et al., arXiv 1707.06347)", low=1)
    num_mini_batches: int = dial(2, "optimiser steps per epoch", low=1)
    target_kl: float | None = dial(
        None,
        "nats per token: a rollout's later epochs are left out once an epoch's approx_kl passes 1.5 times this",
        low=0,
    )
    micro_batch: int = dial(
        64,
        "sequences per forward on one process (TRL's per_device_train_batch_size)",
        low=1,
        group="optimiser",
        usual=True,
        place=True,
    )
    gradient_checkpointing: bool = dial(False, CHECKPOINTING, place=True)
    learning_rate: float = dial(1e-3, "policy's learning rate, falling linearly to zero", low=0, usual=True)
    critic_learning_rate: float = dial(5e-4, "critic's learning rate, falling linearly to zero", low=0)
    adam_epsilon: float = dial(
        1e-5, "Adam's epsilon (Huang et al. 2023, The N implementation details of RLHF with PPO)", low=0
    )
    max_grad_norm: float = dial(
        1.0, "gradient norm of the policy, and of the critic, above which its gradients are scaled down", low=0
    )
    kl_coef: float = dial(
        0.1,
        "beta: reward units per nat of KL to the reference (Ziegler et al., arXiv 1909.08593)",
        low=0,
        group="KL and score",
        usual=True,
    )
    adaptive_kl: float | None = dial(
        None, "nats per response to which kl_coef is steered (Ziegler et al., eq. 4); none: it is fixed", low=1e-6
    )
    adaptive_kl_horizon: int = dial(10_000, "responses over which kl_coef adapts", low=1)
    gamma: float = dial(1.0, "discount per token", low=0, high=1, group="PPO")
    lam: float = dial(0.95, "lambda of GAE (Schulman et al., arXiv 1506.02438)", low=0, high=1)
    cliprange: float = dial(0.2, "epsilon of the clipped ratio", low=0)
    cliprange_value: float = dial(0.2, "largest change of a value per rollout, in reward units", low=0)
    vf_coef: float = dial(0.5, "c1: weight of the value loss", low=0)
    entropy_coef: float = dial(0.0, "c2: weight of the entropy bonus", low=0)
    score_clip: float | None = dial(
        None,
        "scores beyond +-this are cut to it, in reward units: enough is enough; none: they are not",
        low=0,
        group="KL and score",
    )
    missing_eos_score: float | None = dial(
        -1.0, "replaces the score of a response without EOS (TRL subtracts missing_eos_penalty); none: keep the score"
    )
    critic: str = dial(
        "reward",
        "state values: from a model of their own, made from the reward model or from sft, or from a head on the "
        "policy's trunk (one forward for both; critic_learning_rate is then the head's)",
        choices=("reward", "sft", "head"),
        group="critic",
    )
    critic_warmup: int = dial(10, "first rollouts in which only the critic learns", low=0)
    keep: str = dial(
        "best",
        "the policy of the evaluation with the highest reward, or of the last rollout",
        choices=("best", "last"),
        group="evaluation and stopping",
    )
    kl_budget: float | None = dial(
        None, "nats per response on validation prompts: above it the run stops and goes back to the best", low=0
    )
    collapse_alarm: bool = dial(True, "the same when entropy halves or the text repeats itself (docs/ppo.md)")
    eval_steps: int = dial(10, "rollouts between evaluations on validation prompts", low=1)
    eval_prompts: int = dial(128, "validation prompts per evaluation", low=1)
    judge_file: str = dial(
        "", "judges of sentiment in the evaluations, one fitted to these rows: " + JUDGED, place=True
    )
    tokens: Tokens = Tokens()

    def check(self) -> None:
        self.adapter.check()
        if self.adapter.load_in_4bit and self.critic == "head":
            raise ConfigError("critic: a head is saved with the policy's adapter merged, which 4 bits cannot hold")
        if self.critic_warmup >= self.rollouts:
            raise ConfigError(
                f"critic_warmup ({self.critic_warmup}) leaves no rollout of {self.rollouts} to train the policy in; "
                "lower critic_warmup or raise rollouts"
            )
        exact(self.rollout_batch, self.num_mini_batches, "rollout_batch / num_mini_batches")

    def per_process(self, processes: int) -> int:
        return exact(self.rollout_batch, processes, "rollout_batch / processes")

    def micro_batches(self, processes: int) -> int:
        """Micro-batches per optimiser step on one process."""
        minibatch = exact(
            self.per_process(processes), self.num_mini_batches, "rollout_batch / processes / num_mini_batches"
        )
        return exact(minibatch, min(self.micro_batch, minibatch), "sequences per minibatch and process / micro_batch")


@dataclasses.dataclass(frozen=True)
class Merge:
    run: Run = Run()
    policy: str = dial("", "policy to merge; empty: this recipe's ppo/final", place=True, group="models", usual=True)
    probe_file: str = dial(
        "data/imdb/ppo/validation.jsonl",
        "rows with `prompt`: merged and unmerged must agree on them",
        place=True,
        group="data",
        usual=True,
    )


@dataclasses.dataclass(frozen=True)
class Evaluate:
    run: Run = Run()
    sampling: Sampling = Sampling()
    base: str = dial("", "pretrained model; empty: this recipe's pretrain/final", place=True, group="models")
    sft: str = dial("", "policy before PPO; empty: this recipe's sft/final", place=True, usual=True)
    policy: str = dial("", "policy after PPO; empty: this recipe's merge/final", place=True, usual=True)
    reward: str = dial("", "reward model; empty: this recipe's reward/final", place=True, usual=True)
    prompts_file: str = dial(
        "data/imdb/ppo/test.jsonl",
        "held-out `prompt`, `messages`, or pairs: " + SOURCES,
        place=True,
        group="data",
        usual=True,
    )
    judge_file: str = dial(
        "data/imdb/judge/train.jsonl", "the second judge is fitted to these rows: " + JUDGED, place=True, usual=True
    )
    prompts: int = dial(1000, "how many prompts", low=2, usual=True)
    batch_size: int = dial(128, "sequences per forward", low=1, group="evaluation")
    show: int = dial(20, "samples shown side by side", low=1)


@dataclasses.dataclass(frozen=True)
class Chat:
    run: Run = Run(report_to="none")
    sampling: Sampling = Sampling(max_new_tokens=60, max_prompt_tokens=2048)
    prompt: str = dial("", "answer this one prompt and leave; empty: ask at the terminal", group="chat", usual=True)
    policies: str = dial("base,sft,ppo", "which of them answer", usual=True)

    def check(self) -> None:
        for name in self.policies.split(","):
            if name not in ("base", "sft", "ppo"):
                raise ConfigError(f"policies: expected some of base,sft,ppo, got '{name}'")
