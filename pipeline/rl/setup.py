"""What PPO's loop works with: models, optimiser, prompts and reward, made once before it starts.

The order is fixed: the reward model and the critic may become adapters on the policy's base, so the policy comes first;
nothing changes `requires_grad` once the optimiser and the process group know the parameters.
"""

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.config.dials import exact
from pipeline.config.errors import UserError
from pipeline.config.stages import PPO
from pipeline.data.form import form_of, forms_of
from pipeline.data.messages import Text
from pipeline.data.prompts import read_prompts
from pipeline.data.sources import hash_sources
from pipeline.data.tokenize import show_prompt
from pipeline.data.tokenizer import hash_template, load_shared_tokenizer
from pipeline.evaluation.judges import Judge, Vader, fit_judge
from pipeline.models.actor_critic import ActorCritic, add_reward_model
from pipeline.models.forward import response_logprobs
from pipeline.models.heads import Critic, ValueHead, new_classifier
from pipeline.models.loading import Policy, check_model, freeze, load_policy, unwrap_peft
from pipeline.models.multi_adapter import (
    CRITIC,
    REFERENCE,
    REWARD,
    adapter_config,
    add_adapter,
    copy_adapter,
)
from pipeline.models.sharding import gathered, gathering_cost, is_sharded, meta_copy
from pipeline.rl.experience import Forward, ScoreFunction
from pipeline.rl.rewards import adapter_reward_scores, reward_model_scores
from pipeline.rl.rollout import Rollout, generate
from pipeline.rl.update import clip_partitions_
from pipeline.runtime.console import print_main
from pipeline.runtime.launch import new_accelerator, uses_deepspeed
from pipeline.runtime.process import processes
from pipeline.runtime.stage_run import StageRun

EVALUATED = (
    "score", "kl", "reward", "length", "eos_share", "entropy", "win_rate", "repetition", "duplicates",
)  # fmt: skip
"""Figures of each evaluation, which a judge cannot take the name of."""


@dataclass(frozen=True)
class Setup:
    """What the loop needs; made by `set_up`."""

    config: PPO
    stage: StageRun
    accelerator: Accelerator
    tokenizer: PreTrainedTokenizerBase
    actor_critic: ActorCritic  # the module itself
    prepared: nn.Module  # the same as the launch wraps it: what is called, trained and saved
    meta: ActorCritic | None  # its copy without weights, where they are sharded over processes
    optimizer: Any
    scheduler: torch.optim.lr_scheduler.LRScheduler
    reference: Forward
    score: ScoreFunction
    judges: Mapping[str, Judge]
    prompts: list[Text]
    held_out: list[Text]

    def sample(self, prompts: Sequence[Text]) -> Rollout:
        """A response to each prompt by the policy; sharded weights are gathered once, for all tokens.

        No process waits for another while it samples, so responses may end anywhere.
        """
        with gathered(self.actor_critic.policy, None if self.meta is None else self.meta.policy) as policy:
            return generate(policy, self.tokenizer, prompts, self.config.sampling)

    def prompt_batches(self, skip: int) -> Iterator[list[Text]]:
        """This process's prompts of each rollout, without the first `skip` rollouts'."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        batches = prompt_batches(len(self.prompts), self.config.rollout_batch, self.config.run.seed)
        for rows in islice(batches, skip, None):
            yield [self.prompts[row] for row in rows[rank::world]]

    def reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over processes."""
        return self.accelerator.reduce(x, reduction="sum")


def parent_folders(config: PPO, score: ScoreFunction | None) -> dict[str, Path]:
    """Where SFT policy and reward model lie; no reward model where nothing is made from it."""
    parents = {"sft": config.run.final("sft", config.sft)}
    if score is None or config.critic == "reward":
        parents["reward"] = config.run.final("reward", config.reward)
    return parents


def open_stage(config: PPO, score: ScoreFunction | None, judges: Mapping[str, Judge] | None) -> StageRun:
    """The run of this stage, before any work; UserError for a batch that does not divide, or a judge's name taken."""
    config.micro_batches(processes().num_processes)
    exact(config.eval_prompts, processes().num_processes, "eval_prompts / processes")
    if taken := set(judges or {}) & set(EVALUATED):
        raise UserError(f"judges: {', '.join(sorted(taken))}: figures of that name are measured already; choose others")
    functions = {} if score is None else {"score": getattr(score, "__name__", type(score).__name__)}
    functions |= {} if judges is None else {"judges": ",".join(judges)}
    files = [file for file in (config.train_file, config.validation_file, config.judge_file) if file]
    return StageRun(
        "ppo", config, parent_folders(config, score), hash_sources(files) + hash_template(config.tokens), functions
    )


def set_up(
    stage: StageRun, config: PPO, score: ScoreFunction | None = None, judges: Mapping[str, Judge] | None = None
) -> Setup:
    """Loads, prepares and reads everything; `score` and `judges` stand in for those that the dials name."""
    accelerator = new_accelerator(config.run.precision)
    set_seed(config.run.seed)  # the same weights on every process
    parents = parent_folders(config, score)
    tokenizer = load_shared_tokenizer(parents, config.tokens)
    policy = load_policy(parents["sft"], config.adapter)
    longest = config.sampling.max_prompt_tokens + config.sampling.max_new_tokens
    check_model(unwrap_peft(policy), tokenizer, longest, parents["sft"])
    reward_model = add_reward_model(parents["reward"], policy) if "reward" in parents else None
    if isinstance(reward_model, PreTrainedModel):
        check_model(reward_model, tokenizer, longest, parents["reward"])
    critic = add_critic(config.critic, policy, reward_model, tokenizer.pad_token_id)
    reward_head = reward_model if isinstance(reward_model, ValueHead) else None
    actor_critic = ActorCritic(policy, critic, config.sampling.temperature, tokenizer.pad_token_id, reward_head).eval()
    reference_model = None if isinstance(policy, PeftModel) else freeze(deepcopy(policy)).to(accelerator.device)
    if config.gradient_checkpointing:
        actor_critic.checkpoint_activations()
    meta = meta_copy(actor_critic) if is_sharded(accelerator) else None
    optimizer, scheduler = make_optimizer(actor_critic, config)
    prepared, optimizer = prepare(accelerator, actor_critic, optimizer, config)
    # Other samples on every process; not seed + 1, which is another run's.
    set_seed(config.run.seed + 100_003 * accelerator.process_index)

    forms = forms_of(parents)
    prompts = read_prompts(config.train_file, 0, tokenizer, config, forms)
    stage.form = form_of(prompts[0])
    forms |= {config.train_file: stage.form}
    held_out = read_prompts(config.validation_file, config.eval_prompts, tokenizer, config, forms)
    show_prompt(tokenizer, prompts[0], config.sampling.max_prompt_tokens)
    exact(len(held_out), accelerator.num_processes, f"prompts of {config.validation_file} / processes")
    check_rollout_batch(config.rollout_batch, len(prompts))
    if judges is None and config.judge_file and accelerator.is_main_process:
        classifier = fit_judge(config.judge_file, config.run.seed, config.run.reading)
        judges = {"vader": Vader(), "classifier": classifier}
    if meta is not None:
        print_main(gathering_cost("ppo", actor_critic.policy, meta.policy))
    return Setup(
        config=config,
        stage=stage,
        accelerator=accelerator,
        tokenizer=tokenizer,
        actor_critic=actor_critic,
        prepared=prepared,
        meta=meta,
        optimizer=optimizer,
        scheduler=scheduler,
        reference=reference_forward(prepared, reference_model, actor_critic.temperature, actor_critic.pad_id),
        score=score or reward_score(prepared, reward_model, accelerator.device),
        judges=judges or {},
        prompts=prompts,
        held_out=held_out,
    )


def add_critic(
    kind: str, policy: Policy, reward_model: PreTrainedModel | ValueHead | None, pad_id: int
) -> Critic | ValueHead:
    """The critic that the dial `critic` names: a model of its own, a head on the policy's trunk, or an adapter.

    An adapter is put onto the policy's base here: where the reward model that it copies is one there, and from SFT
    where the policy is an adapter.
    """
    width = unwrap_peft(policy).config.hidden_size
    if kind == "head":
        return ValueHead(width)
    if kind == "reward" and isinstance(reward_model, PreTrainedModel):
        return Critic(reward_model)
    if not isinstance(policy, PeftModel):
        return Critic(new_classifier(policy, pad_id))
    critic = ValueHead(width, CRITIC)
    if kind == "reward":
        assert isinstance(reward_model, ValueHead)
        copy_adapter(policy, REWARD, CRITIC)
        critic.load_state_dict(reward_model.state_dict())
    elif REFERENCE in policy.peft_config:
        copy_adapter(policy, REFERENCE, CRITIC)
    else:
        add_adapter(policy, CRITIC, adapter_config(policy))
    return critic


def make_optimizer(
    actor_critic: ActorCritic, config: PPO
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """Adam over policy and critic, each with its learning rate, falling linearly to zero just after the last.

    The critic's weights have its name in theirs, as a module of its own or as an adapter on the policy's base.
    """
    groups: list[dict[str, Any]] = [
        {"params": [], "lr": config.learning_rate},
        {"params": [], "lr": config.critic_learning_rate},
    ]
    for name, parameter in actor_critic.named_parameters():
        if parameter.requires_grad:
            groups[CRITIC in name.split(".")]["params"].append(parameter)
    optimizer = torch.optim.Adam(groups, eps=config.adam_epsilon)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / config.rollouts)


def prepare(
    accelerator: Accelerator, actor_critic: ActorCritic, optimizer: torch.optim.Optimizer, config: PPO
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Module and optimiser as the launch asks: DDP, a DeepSpeed engine or FSDP around them, or nothing."""
    plugin = accelerator.state.deepspeed_plugin if uses_deepspeed(accelerator) else None
    if plugin is not None:  # what its engine wants to know beforehand
        plugin.deepspeed_config |= {
            "train_micro_batch_size_per_gpu": min(config.micro_batch, config.per_process(accelerator.num_processes)),
            "gradient_clipping": 0.0,
        }
        optimizer.register_step_pre_hook(
            partial(clip_partitions_, accelerator=accelerator, max_norm=config.max_grad_norm)
        )
    return accelerator.prepare(actor_critic, optimizer)


def reference_forward(prepared: nn.Module, model: Policy | None, temperature: float, pad_id: int) -> Forward:
    """Log-probabilities of the frozen SFT policy: a model of its own, or (None) an adapter on the policy's base."""
    if model is None:
        return partial(prepared, as_adapter=REFERENCE)
    return partial(response_logprobs, model, temperature=temperature, pad_id=pad_id)


def reward_score(prepared: nn.Module, reward_model: PreTrainedModel | ValueHead | None, device: Any) -> ScoreFunction:
    """The reward model's score: of a model of its own, or of an adapter on the policy's base."""
    if isinstance(reward_model, PreTrainedModel):
        return partial(reward_model_scores, reward_model.to(device))
    return partial(adapter_reward_scores, prepared)


def check_rollout_batch(size: int, prompts: int) -> None:
    """UserError if a rollout wants more prompts than there are."""
    if size > prompts:
        raise UserError(f"rollout_batch is {size}, but there are {prompts} prompts; lower it or give more prompts")


def prompt_batches(count: int, size: int, seed: int) -> Iterator[list[int]]:
    """Batches of row numbers, the same on every process: each pass in a new order, no row twice in a batch."""
    check_rollout_batch(size, count)
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(count, generator=generator).tolist()
        yield from (order[start : start + size] for start in range(0, count - size + 1, size))
