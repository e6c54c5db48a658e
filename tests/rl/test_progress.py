"""What a run of PPO wants of the disk."""

from types import SimpleNamespace

import pytest

from pipeline.config.dials import Run
from pipeline.config.stages import PPO
from pipeline.models.actor_critic import ActorCritic
from pipeline.models.heads import Critic, ValueHead
from pipeline.models.loading import unwrap_peft
from pipeline.rl.progress import disk_needs
from pipeline.runtime.checkpoints import CHECKPOINTS_KEPT


def needs(policy, critic, **dials):
    module = ActorCritic(policy, critic, 1.0, 0)
    return disk_needs(SimpleNamespace(config=PPO(**dials), actor_critic=module))


def test_full_ppo_holds_24_times_its_parents(policy, reward_model):
    """Policy and critic are trained: each parent's weights, Adam's two moments and the best weights, in checkpoints."""
    parent = 4 * sum(p.numel() for p in policy.parameters())
    critic = Critic(reward_model)
    checkpoint, written, final = needs(policy, critic, rollouts=60, run=Run(save_steps=10))
    both = parent + 4 * sum(p.numel() for p in critic.parameters())
    assert (checkpoint, final) == (4 * both, both)
    assert written == 5  # none after the last rollout
    assert (CHECKPOINTS_KEPT + 1) * checkpoint / parent == pytest.approx(24, rel=0.1)


def test_without_checkpoints_there_is_final_alone(policy, reward_model):
    assert needs(policy, Critic(reward_model), run=Run(save_steps=0))[1] == 0
    assert needs(policy, Critic(reward_model), rollouts=9, critic_warmup=0, run=Run(save_steps=10))[1] == 0


def test_an_adapter_writes_little_and_its_base_twice(policy):
    policy.requires_grad_(False)
    head = ValueHead(16)
    checkpoint, _, final = needs(policy, head)
    assert checkpoint == 16 * 17
    assert final == 2 * 4 * sum(p.numel() for p in unwrap_peft(policy).parameters())
