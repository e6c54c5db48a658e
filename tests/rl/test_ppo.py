import copy
import dataclasses
import itertools
import json
import math
import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from experiences import to_experience
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_post_hook

from pipeline import ppo, pretrain, reward, sft
from pipeline.config.dials import Adapter, Optim, Run, Sampling
from pipeline.config.errors import ConfigError, UserError
from pipeline.config.stages import PPO, SFT, Pretrain, Reward
from pipeline.core.tensors import identity
from pipeline.data.tokenize import decode
from pipeline.data.tokenizer import ModelError
from pipeline.models.actor_critic import ActorCritic
from pipeline.models.forward import response_logprobs
from pipeline.models.fresh_adapter import wrap_with_adapter
from pipeline.models.heads import Critic, ValueHead, load_reward_model
from pipeline.models.loading import freeze, load_language_model
from pipeline.rl import monitor, progress, setup, update
from pipeline.rl.rewards import reward_model_scores
from pipeline.rl.rollout import generate
from pipeline.runtime.finished import read_done

PAD, BOS, EOS = 0, 1, 2
PROMPTS = ["the cat", " a", "so he had tea", "", " no hat", "the sea on", "a dog ate", "he"]
CONFIG = PPO(
    adapter=Adapter(adapter="none"),
    sampling=Sampling(max_new_tokens=9, max_prompt_tokens=12, temperature=0.7),
    rollouts=4, rollout_batch=8, num_ppo_epochs=3, num_mini_batches=2, micro_batch=2, learning_rate=3e-3,
    critic_learning_rate=2e-3,
    kl_coef=0.2, gamma=0.9, lam=0.8, critic_warmup=0,
)  # fmt: skip


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator(cpu=True)


@pytest.fixture(params=["own backbone", "head"])
def actor_critic(request, policy, reward_model):
    critic = Critic(reward_model) if request.param == "own backbone" else ValueHead(16)
    if isinstance(critic, ValueHead):  # at zero its trunk would have no gradient
        torch.manual_seed(4)
        torch.nn.init.normal_(critic.weight, std=0.1)
        torch.nn.init.constant_(critic.bias, 0.2)
    return ActorCritic(policy, critic, CONFIG.sampling.temperature, PAD)


def rollout_of(actor_critic, tokenizer, seed=1, prompts=PROMPTS, sampling=CONFIG.sampling):
    torch.manual_seed(seed)
    return generate(actor_critic.policy, tokenizer, prompts, sampling)


@pytest.fixture
def experience(actor_critic, reward_model, make_model, tokenizer):
    """Ragged responses, with and without EOS, against a reference that is not the policy."""
    reference = partial(response_logprobs, freeze(make_model("gpt2", seed=8)), temperature=0.7, pad_id=PAD)
    score = partial(reward_model_scores, reward_model)
    made = to_experience(rollout_of(actor_critic, tokenizer), actor_critic, reference, score, CONFIG, identity)
    assert len(set(made.response_mask.sum(1).tolist())) >= 3
    assert 1 <= made.has_eos.sum() <= 7
    return made


def weights(module):
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def same(module, before):
    return all(torch.equal(parameter, before[name]) for name, parameter in module.named_parameters())


def run_update(actor_critic, experience, accelerator, config=CONFIG, update_policy=True):
    optimizer, _ = setup.make_optimizer(actor_critic, config)
    torch.manual_seed(0)
    return ppo.update(actor_critic, optimizer, experience, config, accelerator, update_policy)[0]


def texts(input_ids, attention_mask):
    """The real tokens of each row, whatever it is padded to."""
    return [tuple(ids[mask].tolist()) for ids, mask in zip(input_ids, attention_mask, strict=True)]


# what an update is made of


@pytest.fixture
def half_broken(experience):
    """An experience of which one row's advantages are NaN: every epoch has one broken minibatch of its two."""
    advantages = experience.advantages.clone()
    advantages[5] = math.nan
    return dataclasses.replace(experience, advantages=advantages)


def test_a_step_without_a_finite_gradient_is_skipped_and_counted(actor_critic, half_broken, accelerator):
    optimizer, _ = setup.make_optimizer(actor_critic, CONFIG)
    steps = []
    optimizer.register_step_post_hook(lambda *_: steps.append(1))
    before = weights(actor_critic)
    metrics, skipped = ppo.update(actor_critic, optimizer, half_broken, CONFIG, accelerator, True)
    assert (len(steps), metrics["skipped_updates"], metrics["update_epochs"]) == (3, 3, 3)
    assert skipped in (0, 1)  # whether the last step was the broken one
    assert all(math.isfinite(value) for value in metrics.values())
    assert not same(actor_critic, before)
    assert all(parameter.isfinite().all() for parameter in actor_critic.parameters())


def test_nothing_moves_when_every_step_is_skipped(actor_critic, half_broken, accelerator):
    config = dataclasses.replace(CONFIG, num_ppo_epochs=2, num_mini_batches=1)
    optimizer, _ = setup.make_optimizer(actor_critic, config)
    before = weights(actor_critic)
    assert ppo.update(actor_critic, optimizer, half_broken, config, accelerator, True, skipped=1) == (
        {"update_epochs": 2, "skipped_updates": 2}, 3,
    )  # fmt: skip
    assert same(actor_critic, before)
    assert not optimizer.state


def test_too_many_skipped_in_a_row_stop_the_run_and_name_the_tensor(actor_critic, half_broken, accelerator):
    config = dataclasses.replace(CONFIG, num_ppo_epochs=1, num_mini_batches=1)
    optimizer, _ = setup.make_optimizer(actor_critic, config)
    with pytest.raises(FloatingPointError, match=r"6 optimiser steps in a row .*not finite here: loss, policy_loss\."):
        ppo.update(actor_critic, optimizer, half_broken, config, accelerator, True, skipped=update.MAX_SKIPPED_STEPS)


def test_five_skipped_in_a_row_are_not_yet_too_many(actor_critic, half_broken, accelerator):
    config = dataclasses.replace(CONFIG, num_ppo_epochs=1, num_mini_batches=1)
    optimizer, _ = setup.make_optimizer(actor_critic, config)
    assert ppo.update(actor_critic, optimizer, half_broken, config, accelerator, True, skipped=4)[1] == 5


@pytest.fixture
def scaled(monkeypatch):
    """scaled(module, config, scale): accelerator and optimiser as fp16 on a GPU has them, but for the arithmetic."""

    def make(module, config, scale):
        monkeypatch.setattr(Accelerator, "mixed_precision", "fp16")
        accelerator = Accelerator(cpu=True)
        accelerator.native_amp, accelerator.scaler = True, torch.amp.GradScaler("cpu", init_scale=scale)
        return accelerator, accelerator.prepare(setup.make_optimizer(module, config)[0])

    return make


def test_a_loss_scale_changes_nothing(actor_critic, experience, accelerator, scaled):
    config = dataclasses.replace(CONFIG, max_grad_norm=0.01)  # what is clipped is the gradient without its scale
    other = copy.deepcopy(actor_critic)
    plain = run_update(actor_critic, experience, accelerator, config)
    with_scale, optimizer = scaled(other, config, 2.0**12)
    torch.manual_seed(0)
    metrics, _ = ppo.update(other, optimizer, experience, config, with_scale, True)
    assert metrics == pytest.approx(plain, rel=1e-5, abs=1e-7)
    for ours, theirs in zip(actor_critic.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_a_loss_scale_that_was_too_high_is_lowered_and_its_step_skipped(actor_critic, experience, scaled):
    config = dataclasses.replace(CONFIG, num_ppo_epochs=1, num_mini_batches=1)
    accelerator, optimizer = scaled(actor_critic, config, 2.0**120)
    experience.advantages.mul_(2.0**20)
    before = weights(actor_critic)
    metrics, skipped = ppo.update(actor_critic, optimizer, experience, config, accelerator, True)
    assert (metrics["skipped_updates"], skipped) == (1, 1)
    assert accelerator.scaler.get_scale() == 2.0**119
    assert same(actor_critic, before)


def test_weights_that_are_not_finite_are_never_written(actor_critic, tokenizer, tmp_path):
    with torch.no_grad():
        next(actor_critic.critic.parameters()).flatten()[0] = math.inf
    with pytest.raises(FloatingPointError, match=r"critic\.\S+ is not finite"):
        progress.save_actor_critic(actor_critic, tokenizer, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("target", "epochs"), [(None, 3), (1e9, 3), (0.0, 1)])
def test_epochs_end_early_when_the_policy_has_moved_far(target, epochs, actor_critic, experience, accelerator):
    optimizer, _ = setup.make_optimizer(actor_critic, CONFIG)
    steps = []
    optimizer.register_step_post_hook(lambda *_: steps.append(1))
    config = dataclasses.replace(CONFIG, target_kl=target)
    metrics, _ = ppo.update(actor_critic, optimizer, experience, config, accelerator, True)
    assert (metrics["update_epochs"], len(steps)) == (epochs, 2 * epochs)


def test_epochs_end_by_their_own_mean_not_by_the_rollouts(actor_critic, experience, accelerator):
    """approx_kl grows from epoch to epoch: a target between the first and the second stops after the second."""
    config = dataclasses.replace(CONFIG, num_ppo_epochs=1)
    first = run_update(copy.deepcopy(actor_critic), experience, accelerator, config)["approx_kl"]
    both = run_update(
        copy.deepcopy(actor_critic), experience, accelerator, dataclasses.replace(config, num_ppo_epochs=2)
    )
    second = 2 * both["approx_kl"] - first
    assert second > 2 * first > 0
    config = dataclasses.replace(CONFIG, num_ppo_epochs=2, target_kl=first)  # the mean of two steps, not their sum
    assert run_update(copy.deepcopy(actor_critic), experience, accelerator, config)["update_epochs"] == 2
    config = dataclasses.replace(CONFIG, num_ppo_epochs=5, target_kl=(first + second) / 3)  # 1.5 times it lies half-way
    assert run_update(actor_critic, experience, accelerator, config)["update_epochs"] == 2


def test_the_kl_coefficient_moves_only_when_it_is_to():
    """By 0.2 at most of 512 in 10,000; within it by the error itself: 6.6 is a tenth more than 6."""
    config = dataclasses.replace(CONFIG, adaptive_kl=6.0, rollout_batch=512)
    moves = ((CONFIG, 50.0, 0.15), (config, 12.0, 0.151536), (config, 0.0, 0.148464))
    for dials, kl, moved in (*moves, (config, 6.6, 0.150768), (config, 5.4, 0.149232)):
        state = progress.Progress(kl_coef=0.15)
        state.advance(kl, dials)
        assert (state.kl_coef, state.rollouts) == (pytest.approx(moved), 1)


@pytest.mark.parametrize("micro_batch", [1, 2, 3, 4, 64])
def test_without_a_learning_rate_every_ratio_is_one(micro_batch, actor_critic, experience, accelerator):
    config = dataclasses.replace(CONFIG, micro_batch=micro_batch, learning_rate=0.0, critic_learning_rate=0.0)
    calls, errors = [], []

    def record(_, inputs, outputs):
        known = texts(experience.input_ids, experience.attention_mask)
        for text, logprobs in zip(texts(*inputs[:2]), outputs[0], strict=True):
            row = known.index(text)
            old = experience.old_logprobs[row][experience.response_mask[row]]
            errors.append((logprobs[: len(old)] - old).abs().max().item())
        calls.append(len(outputs[0]))

    actor_critic.register_forward_hook(record)
    metrics = run_update(actor_critic, experience, accelerator, config)
    assert len(calls) == 3 * 2 * -(-4 // min(micro_batch, 4))
    assert sum(calls) == 3 * 8
    assert max(errors) < 1e-5
    assert metrics["ratio"] == pytest.approx(1, abs=1e-5)
    assert metrics["approx_kl"] < 1e-10
    assert metrics["clip_fraction"] == metrics["value_clip_fraction"] == 0


def test_the_first_step_starts_at_the_rollouts_policy_exactly(actor_critic, experience):
    """The forward of training on the micro-batches of the rollout repeats its log-probabilities bit for bit."""
    for rows in torch.arange(8).split(CONFIG.micro_batch):
        _, sums = update.ppo_loss(actor_critic, experience[rows], CONFIG, experience.response_mask[rows].sum(), True)
        assert sums["ratio"].item() == pytest.approx(1, abs=1e-6)
        assert sums["approx_kl"].item() == sums["clip_fraction"].item() == sums["value_clip_fraction"].item() == 0
    config = dataclasses.replace(CONFIG, micro_batch=8)
    _, sums = update.ppo_loss(actor_critic, experience, config, experience.response_mask.sum(), True)
    mean_advantage = experience.advantages[experience.response_mask].mean()
    assert sums["policy_loss"].item() == pytest.approx(-mean_advantage.item(), abs=1e-6)


def test_in_bfloat16_too_the_first_ratio_is_one_exactly(actor_critic, reward_model, tokenizer):
    """Rollout and update under one autocast and on the same rows; under two kinds of arithmetic it would not be."""
    with torch.autocast("cpu", torch.bfloat16):
        rollout = rollout_of(actor_critic, tokenizer)
        reference = setup.reference_forward(actor_critic, freeze(copy.deepcopy(actor_critic.policy)), 0.7, PAD)
        made = to_experience(
            rollout, actor_critic, reference, partial(reward_model_scores, reward_model), CONFIG, identity
        )
        assert (made.kl == 0).all()
        ratios = [
            update.ppo_loss(actor_critic, made[rows], CONFIG, made.response_mask[rows].sum(), True)[1]
            for rows in torch.arange(8).split(CONFIG.micro_batch)
        ]
    assert {sums["approx_kl"].item() for sums in ratios} == {0.0}
    assert all(sums["ratio_min"] == sums["ratio_max"] == 1 for sums in ratios)
    assert made.old_logprobs.dtype == made.old_values.dtype == torch.float32
    _, sums = update.ppo_loss(actor_critic, made, CONFIG, made.response_mask.sum(), True)
    assert sums["approx_kl"] > 1e-7


@pytest.mark.parametrize("poison", [math.nan, math.inf, 1e30])
def test_what_stands_in_masked_slots_changes_neither_update_nor_metrics(poison, actor_critic, experience, accelerator):
    def spoilt(x):
        return torch.where(experience.response_mask, x, poison)

    names = ("sampled_logprobs", "old_logprobs", "old_values", "kl", "rewards", "returns", "advantages")
    dirty = dataclasses.replace(experience, **{name: spoilt(getattr(experience, name)) for name in names})
    results = []
    for given in (experience, dirty):
        module = copy.deepcopy(actor_critic)
        metrics = run_update(module, given, accelerator, dataclasses.replace(CONFIG, entropy_coef=0.1))
        results.append((metrics, monitor.rollout_metrics(given, accelerator, CONFIG, CONFIG.kl_coef), weights(module)))
    assert results[0][:2] == results[1][:2]
    assert all(torch.equal(results[0][2][name], results[1][2][name]) for name in results[0][2])


@pytest.mark.parametrize("micro", [1, 2, 4])
def test_the_gradient_does_not_depend_on_the_micro_batch(micro, actor_critic, experience):
    config = dataclasses.replace(CONFIG, entropy_coef=0.3)
    moved = dataclasses.replace(experience, old_logprobs=experience.old_logprobs + 0.1)  # ratios that are not one

    def gradient(size):
        actor_critic.zero_grad()
        totals = {}
        for rows in torch.arange(8).split(size):
            loss, sums = update.ppo_loss(actor_critic, moved[rows], config, moved.response_mask.sum(), True)
            loss.backward()
            for name in update.EXTREMES:
                sums.pop(name)
            totals = {name: totals.get(name, 0) + value.item() for name, value in sums.items()}
        return torch.cat([parameter.grad.flatten() for parameter in actor_critic.parameters()]), totals

    (whole, totals), (parts, part_totals) = gradient(8), gradient(micro)
    assert whole.abs().max() > 1e-2
    torch.testing.assert_close(parts, whole, atol=1e-6 * max(1.0, whole.abs().max().item()), rtol=1e-5)
    assert part_totals == pytest.approx(totals, abs=1e-5)


@pytest.mark.parametrize("micro_batch", [1, 3, 64])
def test_the_extreme_ratios_are_those_of_all_steps(micro_batch, actor_critic, experience, accelerator):
    """Old log-probabilities moved on one token up and one down: with no learning rate these are the extremes."""
    moved = experience.old_logprobs.clone()
    rows = experience.response_mask.sum(1).argsort()
    moved[rows[-1], 1] += 1.5
    moved[rows[0], 0] -= 0.8
    config = dataclasses.replace(CONFIG, micro_batch=micro_batch, learning_rate=0.0, critic_learning_rate=0.0)
    metrics = run_update(actor_critic, dataclasses.replace(experience, old_logprobs=moved), accelerator, config)
    assert metrics["ratio_min"] == pytest.approx(math.exp(-1.5), abs=1e-4)
    assert metrics["ratio_max"] == pytest.approx(math.exp(0.8), abs=1e-4)
    lower = dataclasses.replace(experience, old_logprobs=experience.old_logprobs - 0.5)  # padding is at ratio 1
    assert run_update(actor_critic, lower, accelerator, config)["ratio_min"] == pytest.approx(math.exp(0.5), abs=1e-4)
    higher = dataclasses.replace(experience, old_logprobs=experience.old_logprobs + 0.5)
    highest = run_update(actor_critic, higher, accelerator, config)["ratio_max"]
    assert highest == pytest.approx(math.exp(-0.5), abs=1e-4)


def test_update_accumulates_the_gradient_of_the_whole_minibatch(actor_critic, experience, accelerator):
    """One minibatch, in micro-batches that do not even divide it, is a step on the whole batch and on nothing else."""
    still = {"learning_rate": 0.0, "critic_learning_rate": 0.0}  # so that every step starts at the same weights
    config = dataclasses.replace(CONFIG, num_ppo_epochs=2, num_mini_batches=1, entropy_coef=0.3, **still)
    actor_critic.zero_grad()
    loss, _ = update.ppo_loss(actor_critic, experience, config, experience.response_mask.sum(), True)
    loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in actor_critic.named_parameters()}
    halves = {half: [g.flatten() for name, g in gradients.items() if ("critic" in name) == half] for half in (0, 1)}
    norms = [torch.cat(half).norm() for half in halves.values()]
    config = dataclasses.replace(config, max_grad_norm=min(norms).item() / 2)
    actor_critic.zero_grad()
    optimizer, _ = setup.make_optimizer(actor_critic, config)
    used = []
    optimizer.register_step_pre_hook(lambda *_: used.extend(p.grad.clone() for p in actor_critic.parameters()))
    metrics, skipped = ppo.update(
        actor_critic, optimizer, experience, dataclasses.replace(config, micro_batch=3), accelerator, True
    )
    assert skipped == 0
    found = [metrics[f"{name}grad_norm"] for name in ("", "policy_", "critic_")]
    assert found == pytest.approx([math.hypot(*norms), *map(float, norms)], rel=1e-4)
    assert metrics["loss"] == pytest.approx(loss.item(), abs=1e-5)
    for ours, (name, theirs) in zip(used, [*gradients.items()] * 2, strict=True):
        scale = config.max_grad_norm / norms["critic" in name]
        torch.testing.assert_close(ours, theirs * scale, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("warmup", [0, 1, 7])
def test_the_policys_first_step_is_adams_first_however_long_only_the_critic_learned(
    warmup, actor_critic, experience, accelerator
):
    """Adam's first step is the learning rate in every coordinate with a gradient far above epsilon."""
    rate = 3e-4
    config = dataclasses.replace(CONFIG, num_ppo_epochs=1, num_mini_batches=1, learning_rate=rate, adam_epsilon=1e-12)
    optimizer, _ = setup.make_optimizer(actor_critic, config)
    start = copy.deepcopy(actor_critic.policy.state_dict())
    for _ in range(warmup):
        ppo.update(actor_critic, optimizer, experience, config, accelerator, update_policy=False)
    moves = []
    for steps in (1, 2):
        before = copy.deepcopy(actor_critic.policy.state_dict())
        assert all(torch.equal(weight, start[name]) for name, weight in before.items()) == (steps == 1)
        ppo.update(actor_critic, optimizer, experience, config, accelerator, update_policy=True)
        now = actor_critic.policy.state_dict()
        moves.append(torch.cat([(now[name] - before[name]).abs().flatten() for name in now]))
    assert moves[0].max().item() == pytest.approx(rate, rel=1e-2)
    assert moves[0].median().item() == pytest.approx(rate, rel=1e-2)
    assert moves[1].max().item() < 1.1 * rate
    state = optimizer.state[next(actor_critic.policy.parameters())]
    assert int(state["step"]) == 2
    assert {int(optimizer.state[p]["step"]) for p in actor_critic.critic.parameters()} == {warmup + 2}


@pytest.mark.parametrize("actor_critic", ["own backbone"], indirect=True)
def test_a_large_gradient_of_the_critic_leaves_the_policys_step_as_it_is(actor_critic, experience, accelerator):
    steps = []
    for vf_coef in (0.1, 1e4):
        config = dataclasses.replace(
            CONFIG, num_ppo_epochs=1, num_mini_batches=2, vf_coef=vf_coef, max_grad_norm=1e-3, adam_epsilon=1e-3
        )
        module = copy.deepcopy(actor_critic)
        run_update(module, experience, accelerator, config)
        steps.append(module.policy.state_dict())
    assert all(torch.equal(weight, steps[1][name]) for name, weight in steps[0].items())


@pytest.mark.parametrize(("epochs", "minibatches"), [(1, 1), (3, 2), (2, 4), (1, 8)])
def test_each_epoch_steps_once_per_minibatch_and_uses_each_sequence_once(
    epochs, minibatches, actor_critic, experience, accelerator
):
    config = dataclasses.replace(CONFIG, num_ppo_epochs=epochs, num_mini_batches=minibatches)
    optimizer, _ = setup.make_optimizer(actor_critic, config)
    steps, used = [], []
    optimizer.register_step_post_hook(lambda *_: steps.append(len(used)))
    actor_critic.register_forward_pre_hook(lambda _, inputs: used.extend(texts(*inputs[:2])))
    torch.manual_seed(0)
    ppo.update(actor_critic, optimizer, experience, config, accelerator, True)
    size = 8 // minibatches
    assert steps == [size * (n + 1) for n in range(epochs * minibatches)]
    epochs_used = [used[8 * n : 8 * n + 8] for n in range(epochs)]
    rows = sorted(texts(experience.input_ids, experience.attention_mask))
    assert [sorted(epoch) for epoch in epochs_used] == [rows] * epochs
    assert len(set(map(tuple, epochs_used))) == epochs  # each in an order of its own


@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_activations_computed_again_give_the_same_update(adapter, actor_critic, experience, accelerator):
    """To the bit, with every layer run twice as often, and sampling with its cache before and after."""
    if adapter != "none":
        actor_critic.policy = wrap_with_adapter(actor_critic.policy, Adapter(adapter=adapter))
    results, plain = [], copy.deepcopy(actor_critic)
    for checkpointing in (False, True):
        module, forwards = copy.deepcopy(plain), []
        if checkpointing:
            module.checkpoint_activations()
        attention = next(part for name, part in module.policy.named_modules() if name.endswith("h.0.attn"))
        attention.register_forward_hook(lambda *_, seen=forwards: seen.append(1))
        metrics = run_update(
            module, experience, accelerator, dataclasses.replace(CONFIG, gradient_checkpointing=checkpointing)
        )
        assert not module.training
        results.append((metrics, weights(module), len(forwards)))
    assert results[0][0] == results[1][0]
    assert all(torch.equal(results[0][1][name], results[1][1][name]) for name in results[0][1])
    assert not same(actor_critic, results[0][1])
    assert results[1][2] == 2 * results[0][2]


def test_the_loss_is_linear_in_its_coefficients(actor_critic, experience):
    tokens = experience.response_mask.sum()

    def loss(vf_coef, entropy_coef, update_policy=True):
        config = dataclasses.replace(CONFIG, vf_coef=vf_coef, entropy_coef=entropy_coef)
        return update.ppo_loss(actor_critic, experience, config, tokens, update_policy)

    _, sums = loss(0.0, 0.0)
    assert not any(value.requires_grad for value in sums.values())
    for vf_coef, entropy_coef in itertools.product((0.0, 0.5, 2.0), (0.0, 0.01, 1.0)):
        expected = sums["policy_loss"] + vf_coef * sums["value_loss"] - entropy_coef * sums["entropy"]
        assert loss(vf_coef, entropy_coef)[0].item() == pytest.approx(expected.item(), abs=1e-5)
        warm = loss(vf_coef, entropy_coef, False)[0].item()
        assert warm == pytest.approx(vf_coef * sums["value_loss"].item(), abs=1e-6)
    assert sums["entropy"].item() > 0.1
    actor_critic.zero_grad()
    loss(0.0, 0.01)[0].backward()
    assert all(not p.grad.any() for p in actor_critic.critic.parameters() if p.grad is not None)
    assert any(p.grad.any() for p in actor_critic.policy.parameters())


@pytest.mark.parametrize("adapter", ["none", "lora", "ia3"])
def test_policy_and_critic_move_and_the_reference_does_not(
    adapter, actor_critic, experience, accelerator, reward_model
):
    if adapter != "none":
        actor_critic.policy = wrap_with_adapter(actor_critic.policy, Adapter(adapter=adapter))
    copied = freeze(copy.deepcopy(actor_critic.policy)) if adapter == "none" else None
    reference = setup.reference_forward(actor_critic, copied, 0.7, PAD)
    ids, mask, size = experience.input_ids, experience.attention_mask, experience.response_tokens
    real = experience.response_mask
    with torch.no_grad():
        expected, own = reference(ids, mask, size)[0], actor_critic(ids, mask, size)[0]
    assert torch.equal(expected[real], own[real])
    frozen_before = weights(reward_model)
    policy, critic = weights(actor_critic.policy), weights(actor_critic.critic)
    run_update(actor_critic, experience, accelerator)
    changed = {n for n, p in actor_critic.policy.named_parameters() if not torch.equal(p, policy[n])}
    trainable = {n for n, p in actor_critic.policy.named_parameters() if p.requires_grad}
    assert changed
    assert changed <= trainable
    assert len(changed) >= 0.9 * len(trainable)
    assert not same(actor_critic.critic, critic)
    bias = next(name for name in critic if name in ("shift", "bias"))
    assert not torch.equal(actor_critic.critic.get_parameter(bias), critic[bias])
    with torch.no_grad():
        assert torch.equal(reference(ids, mask, size)[0][real], expected[real])
        assert not torch.equal(actor_critic(ids, mask, size)[0][real], own[real])
    assert same(reward_model, frozen_before)


def test_one_step_changes_nearly_every_weight_that_has_a_gradient(actor_critic, experience, accelerator):
    """Weights are float32: a step of 1e-6 would be lost in bfloat16, whose numbers lie 2^-8 apart."""
    config = dataclasses.replace(
        CONFIG, num_ppo_epochs=1, num_mini_batches=1, learning_rate=1e-6, critic_learning_rate=1e-6
    )
    before, gradients = weights(actor_critic), {}
    optimizer, _ = setup.make_optimizer(actor_critic, config)
    optimizer.register_step_pre_hook(
        lambda *_: gradients.update({n: p.grad.abs() > 1e-5 for n, p in actor_critic.named_parameters()})
    )
    ppo.update(actor_critic, optimizer, experience, config, accelerator, True)
    moved = torch.cat([(p != before[n])[gradients[n]] for n, p in actor_critic.named_parameters()])
    assert len(moved) > 3000
    assert moved.float().mean() > 0.9


def test_in_warm_up_only_the_critic_learns(actor_critic, experience, accelerator):
    policy, critic = weights(actor_critic.policy), weights(actor_critic.critic)
    config = dataclasses.replace(CONFIG, entropy_coef=0.1)
    metrics = run_update(actor_critic, experience, accelerator, config, update_policy=False)
    assert same(actor_critic.policy, policy)
    assert not same(actor_critic.critic, critic)
    assert metrics["approx_kl"] < 1e-10


def test_two_updates_from_one_seed_are_the_same_to_the_bit(actor_critic, experience, accelerator):
    results = []
    for _ in range(2):
        module = copy.deepcopy(actor_critic)
        results.append((run_update(module, experience, accelerator), weights(module)))
    assert results[0][0] == results[1][0]
    assert all(torch.equal(results[0][1][name], results[1][1][name]) for name in results[0][1])


# schedule, prompts, the check of the first rollout, metrics


def test_every_learning_rate_falls_linearly_and_the_last_is_above_zero(actor_critic):
    optimizer, scheduler = setup.make_optimizer(actor_critic, CONFIG)
    rates = []
    for _ in range(CONFIG.rollouts):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    shares = (1.0, 0.75, 0.5, 0.25)
    assert rates == [pytest.approx([3e-3 * share, 2e-3 * share]) for share in shares]
    held = [{id(p) for p in group["params"]} for group in optimizer.param_groups]
    assert held[0] == {id(p) for p in actor_critic.policy.parameters()}
    assert held[1] == {id(p) for p in actor_critic.critic.parameters()}
    assert {group["eps"] for group in optimizer.param_groups} == {CONFIG.adam_epsilon}


def test_no_prompt_comes_twice_in_a_pass_and_ranks_share_out_a_batch():
    batches = list(itertools.islice(setup.prompt_batches(11, 4, seed=0), 6))
    for first in range(0, 6, 2):  # two batches of four to a pass over eleven
        rows = batches[first] + batches[first + 1]
        assert len(set(rows)) == 8
        assert set(rows) <= set(range(11))
    assert len(set(map(tuple, batches))) == 6
    assert batches == list(itertools.islice(setup.prompt_batches(11, 4, seed=0), 6))
    assert batches != list(itertools.islice(setup.prompt_batches(11, 4, seed=1), 6))
    with pytest.raises(ValueError, match="12, but there are 11"):
        next(setup.prompt_batches(11, 12, seed=0))


def test_a_reference_that_is_not_the_policy_stops_the_first_rollout_only(experience, accelerator):
    with pytest.raises(RuntimeError, match="differs from its reference"):
        monitor.check_first_rollout(0, experience, accelerator)
    monitor.check_first_rollout(1, experience, accelerator)
    monitor.check_first_rollout(0, dataclasses.replace(experience, kl=0 * experience.kl), accelerator)


def test_metrics_are_those_of_numpy(experience, accelerator):
    bound = experience.scores.abs().median().item()  # one of them
    metrics = monitor.rollout_metrics(experience, accelerator, dataclasses.replace(CONFIG, score_clip=bound), 0.2)
    mask = experience.response_mask
    rows = [experience.kl[row, mask[row]].double() for row in range(8)]
    tokens = torch.cat(rows)
    scores = experience.scores.double()
    returns, values = experience.returns[mask].double(), experience.old_values[mask].double()
    expected = {
        "score": scores.mean(),
        "score_std": scores.std(correction=0),
        "score_clipped": (scores.abs() > bound).double().mean(),
        "score_length_correlation": torch.corrcoef(torch.stack([scores, mask.sum(1).double()]))[0, 1],
        "kl": sum(row.sum() for row in rows) / 8,
        "kl_per_token": tokens.mean(),
        "kl_k3_per_token": ((-tokens).exp() - 1 + tokens).mean(),
        "reward": torch.where(experience.has_eos, scores, -1.0).mean() - 0.2 * sum(row.sum() for row in rows) / 8,
        "reference_perplexity": (-(experience.old_logprobs - experience.kl)[mask].double().mean()).exp(),
        "sampling_difference": (experience.old_logprobs - experience.sampled_logprobs)[mask].abs().mean(),
        "length": torch.tensor(len(tokens) / 8),
        "eos_share": experience.has_eos.double().mean(),
        "return": returns.mean(),
        "explained_variance": 1 - (returns - values).var() / returns.var(),
        "kl_coef": 0.2,
    }
    assert 0 < expected["score_clipped"] < 1
    assert metrics == pytest.approx({name: float(value) for name, value in expected.items()}, abs=1e-4, rel=1e-5)
    assert metrics["sampling_difference"] < 1e-4
    assert monitor.rollout_metrics(experience, accelerator, CONFIG, 0.2)["score_clipped"] == 0


def test_a_correlation_with_what_never_changes_is_zero():
    same, other = torch.full((7,), 0.1), torch.arange(7.0)
    assert monitor.correlation(same, other, identity).item() == monitor.correlation(other, same, identity).item() == 0
    for scale in (1.0, 1e-7, 1e7):
        assert monitor.correlation(scale * other, -2 * other + 1, identity).item() == pytest.approx(-1)


# learning


def learn(make_model, tokenizer, critic, score, config, rollouts, accelerator):
    """Mean scores and KLs of rollouts by PPO from a tiny policy that is its own reference."""
    make = partial(make_model, "gpt2", seed=3, lean=(EOS, 1.0))
    actor_critic = ActorCritic(make(), critic, config.sampling.temperature, PAD)
    reference = partial(response_logprobs, freeze(make()), temperature=config.sampling.temperature, pad_id=PAD)
    optimizer, scheduler = setup.make_optimizer(actor_critic, dataclasses.replace(config, rollouts=rollouts))
    history = []
    torch.manual_seed(0)
    for _ in range(rollouts):
        rollout = generate(actor_critic.policy, tokenizer, PROMPTS * 4, config.sampling)
        experience = to_experience(rollout, actor_critic, reference, score, config, identity)
        history.append(monitor.rollout_metrics(experience, accelerator, config, config.kl_coef))
        ppo.update(actor_critic, optimizer, experience, config, accelerator, True)
        scheduler.step()
    return history


LEARNING = dataclasses.replace(
    CONFIG, rollout_batch=32, micro_batch=32, num_mini_batches=1, num_ppo_epochs=4, learning_rate=3e-3,
    critic_learning_rate=1e-2,
    kl_coef=0.01, gamma=1.0, lam=0.95, missing_eos_score=None,
    sampling=Sampling(max_new_tokens=6, max_prompt_tokens=14, temperature=0.7),
)  # fmt: skip


def share_of(token, ids, mask):
    """Share of one token among the last six slots: 1 when the policy writes nothing else."""
    return ((ids[:, -6:] == token) & mask[:, -6:]).sum(1) / 6


@pytest.mark.parametrize("kl_coef", [0.01, 10.0])
def test_ppo_learns_to_write_one_token_unless_the_kl_forbids_it(
    kl_coef, make_model, tokenizer, reward_model, accelerator
):
    config = dataclasses.replace(LEARNING, kl_coef=kl_coef)
    history = learn(make_model, tokenizer, Critic(reward_model), partial(share_of, 9), config, 30, accelerator)
    first, last = history[0], history[-1]
    assert first["score"] < 0.2
    assert first["kl"] == pytest.approx(0, abs=1e-5)
    if kl_coef == 0.01:
        assert last["score"] > 0.8
        assert last["kl"] > 10
    else:
        assert last["score"] < 0.3
        assert sum(row["kl"] for row in history[-8:]) / 8 < 2


def test_ppo_learns_to_stop(make_model, tokenizer, reward_model, accelerator):
    """The EOS is an action: were it outside the mask, nothing would make it likelier."""
    history = learn(
        make_model,
        tokenizer,
        Critic(reward_model),
        lambda ids, mask: -mask[:, -6:].sum(1).float(),
        LEARNING,
        30,
        accelerator,
    )
    assert history[0]["length"] > 4
    assert history[-1]["length"] < 1.5
    assert history[-1]["eos_share"] > 0.9


def test_ppo_learns_to_end_when_only_a_whole_response_is_paid(make_model, tokenizer, reward_model, accelerator):
    """Score +1 for each, which a missing EOS replaces by -1."""
    config = dataclasses.replace(LEARNING, missing_eos_score=-1.0, num_ppo_epochs=2, learning_rate=1e-3)
    history = learn(
        make_model, tokenizer, Critic(reward_model), lambda ids, mask: torch.ones(len(ids)), config, 20, accelerator
    )
    assert history[0]["eos_share"] < 0.7
    assert history[-1]["eos_share"] > 0.95
    assert history[-1]["length"] > 1.2  # no more is paid for ending at once


def test_a_head_on_the_policys_trunk_learns_with_it(make_model, tokenizer, reward_model, accelerator):
    history = learn(make_model, tokenizer, ValueHead(16), partial(share_of, 9), LEARNING, 30, accelerator)
    assert history[0]["score"] < 0.2 < 0.8 < history[-1]["score"]
    assert history[0]["explained_variance"] < 0.01 < 0.15 < max(row["explained_variance"] for row in history)


# the stage, on parents made by the other stages


def write(folder, name, rows):
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def parents(tmp_path_factory):
    """A recipe's folder with its finished pretrain, sft and reward stages, and two files of other prompts."""
    folder = tmp_path_factory.mktemp("parents")
    words = ["cat", "dog", "hat", "sea"]
    texts = [f"the {a} saw the {b} and the {c}." for a in words for b in words for c in words[:2]]
    prompts = write(folder, "prompts.jsonl", [{"prompt": text[:11]} for text in texts[:20]])
    write(folder, "held_out.jsonl", [{"prompt": text[:15]} for text in texts[20:]])
    run = Run(recipe="tiny", runs=str(folder / "runs"), precision="fp32", report_to="none")
    optim = Optim(learning_rate=1e-2, batch_size=8, micro_batch=8)
    corpus = write(folder, "texts.jsonl", [{"text": text} for text in texts])
    pretrain.train(
        Pretrain(
            run=run, optim=optim, train_file=corpus, validation_file=corpus, tokenizer="char", hidden_size=16,
            intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, context=48, sample_tokens=4,
        )
    )  # fmt: skip
    rows = write(folder, "sft.jsonl", [{"prompt": text[:11], "completion": text[11:]} for text in texts])
    adapter = Adapter(adapter="lora", lora_r=2)
    sft.train(SFT(run=run, optim=optim, adapter=adapter, train_file=rows, validation_file=rows))
    pairs = [{"chosen": text, "rejected": text[::-1], "margin": n % 3} for n, text in enumerate(texts)]
    file = write(folder, "pairs.jsonl", pairs)
    reward.train(
        Reward(
            run=run, optim=optim, train_file=file, validation_file=file, test_file=file, prompts_file=prompts,
            centre_prompts=20, sampling=Sampling(max_new_tokens=8, max_prompt_tokens=16),
        )
    )  # fmt: skip
    return folder


def stage_config(parents, runs, **dials):
    finals = {stage: str(parents / "runs" / "tiny" / stage / "final") for stage in ("sft", "reward")}
    prompts = str(parents / "prompts.jsonl")
    config = PPO(
        run=Run(recipe="tiny", runs=str(runs), precision="fp32", report_to="none", seed=3),
        adapter=Adapter(adapter="lora", lora_r=2),
        sampling=Sampling(max_new_tokens=8, max_prompt_tokens=16, temperature=0.7),
        train_file=prompts, validation_file=str(parents / "held_out.jsonl"), rollouts=4, rollout_batch=8, micro_batch=4,
        num_ppo_epochs=2,
        num_mini_batches=2, critic_warmup=1, eval_steps=2, eval_prompts=6, **finals,
    )  # fmt: skip
    return dataclasses.replace(config, **dials)


def logged(final):
    lines = (final.parent / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if "second" not in k} for line in lines]


@pytest.mark.parametrize("adapter", ["lora", "none"])
def test_the_stage_trains_from_its_parents(adapter, parents, tmp_path):
    final = ppo.train(stage_config(parents, tmp_path, adapter=Adapter(adapter=adapter, lora_r=2)))
    rows = logged(final)
    evaluations, rollouts = [r for r in rows if "eval_kl" in r], [r for r in rows if "ratio" in r]
    assert [row["step"] for row in evaluations] == [0, 2, 4]
    assert [row["step"] for row in rollouts] == [0, 1, 2, 3]
    assert [row["learning_rate"] for row in rollouts] == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])
    assert evaluations[0]["eval_kl"] == rollouts[0]["kl"] == 0
    assert rollouts[0]["approx_kl"] < 1e-10  # warm-up: the policy stands still
    assert rollouts[0]["clip_fraction"] == 0
    assert abs(rollouts[1]["kl"]) < 1e-4
    assert rollouts[2]["kl"] != 0
    done = read_done(final)
    assert set(done["parents"]) == {"sft", "reward"}
    best = max(evaluations, key=lambda row: row["eval_reward"])
    expected = {k: v for k, v in best.items() if k != "step"} | {"kept_rollout": best["step"], "stopped": ""}
    started = done["metrics"].pop("roles")["policy"]
    assert started == ("all of SFT's weights" if adapter == "none" else "a copy of SFT's adapter")
    assert done["metrics"] == expected
    critic, before = load_reward_model(final / "critic"), load_reward_model(parents / "runs/tiny/reward/final")
    assert (critic.config.score_shift == before.config.score_shift) == (best["step"] == 0)
    assert same(critic, weights(before)) == (best["step"] == 0)
    samples = [json.loads(line) for line in (final.parent / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 3 * 6
    assert {len(sample["prompt"]) for sample in samples} == {15}  # of the validation file: training's have 11
    for row in evaluations:
        mine = [sample for sample in samples if sample["step"] == row["step"]]
        assert sum(sample["kl"] for sample in mine) / 6 == pytest.approx(row["eval_kl"], abs=0.006)
        assert sum(sample["score"] for sample in mine) / 6 == pytest.approx(row["eval_score"], abs=0.001)
    for line in (final.parent / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        if "seconds" in row:
            assert row["tokens_per_second"] == pytest.approx(row["length"] * 8 / row["seconds"], rel=0.2)
            assert 0 < row["sampling_seconds"] < row["seconds"]


@pytest.mark.parametrize("critic", ["sft", "head"])
@pytest.mark.parametrize("adapter", ["lora", "none"])
def test_a_critic_of_another_origin_is_trained_and_saved(critic, adapter, parents, tmp_path, monkeypatch):
    """With a score function no reward model is asked for; what is saved gives the values that training saw."""
    known, saving = [], ActorCritic.save_critic

    def save_critic(self, folder):
        ids = torch.tensor([[1, 5, 7, 4, 9, 3]])
        mask = torch.ones_like(ids).bool()
        with torch.no_grad():
            known.append((ids, mask, self.eval()(ids, mask, 4)[2]))
        saving(self, folder)

    monkeypatch.setattr(ActorCritic, "save_critic", save_critic)
    config = stage_config(parents, tmp_path, critic=critic, adapter=Adapter(adapter=adapter, lora_r=2), keep="last")
    config = dataclasses.replace(config, reward=str(tmp_path / "nothing there"))
    final = ppo.train(config, lambda ids, mask: mask.sum(1).float() / 10)
    assert set(read_done(final)["parents"]) == {"sft"}
    rows = [row for row in logged(final) if "ratio" in row]
    assert rows[0]["explained_variance"] == pytest.approx(0, abs=1e-6)  # a head of zeros explains nothing
    assert rows[-1]["explained_variance"] != 0
    assert rows[0]["approx_kl"] < 1e-10  # warm-up: the policy stands still, whatever trunk the critic has
    assert rows[1]["kl"] == pytest.approx(0, abs=1e-4)
    ids, mask, values = known[0]
    assert values.std() > 1e-4
    with torch.no_grad():
        torch.testing.assert_close(Critic(load_reward_model(final / "critic"))(ids, mask)[:, -5:-1], values)
    trunk, policy = load_reward_model(final / "critic").base_model, load_language_model(final).base_model
    moved = max((a - b).abs().max().item() for a, b in zip(trunk.parameters(), policy.parameters(), strict=True))
    assert (moved < 1e-6) == (critic == "head")


def test_a_critic_from_sft_starts_at_zero_on_its_trunk(parents):
    sft = load_language_model(parents / "runs/tiny/sft/final")
    critic = setup.add_critic("sft", sft, None, PAD)
    ids = torch.tensor([[1, 5, 7, 4, 9, 3]])
    with torch.no_grad():
        assert not critic(ids, torch.ones_like(ids).bool()).any()
        assert torch.equal(critic.model.base_model(ids).last_hidden_state, sft.base_model(ids).last_hidden_state)
    assert all(parameter.requires_grad for parameter in critic.parameters())


def test_the_kl_coefficient_of_a_run_follows_its_kl(parents, tmp_path, monkeypatch):
    """The controller's error is cut at 0.2, where another figure than the KL per response may give the same.

    So the run is told a KL that keeps it within, beside the figures that it measured.
    """
    told = [5.2, 6.9, 5.7, 6.3, 6.0]

    def log_rollout(setup, step, *given):
        return monitor.log_rollout(setup, step, *given) | {"kl": told[step]}

    monkeypatch.setattr(ppo, "log_rollout", log_rollout)
    config = stage_config(
        parents, tmp_path, rollouts=5, adaptive_kl=6.0, adaptive_kl_horizon=20, learning_rate=0.03,
        missing_eos_score=None,
    )  # fmt: skip
    rows = [row for row in logged(ppo.train(config)) if "ratio" in row]
    expected = [0.1]
    for kl in told[:-1]:
        expected.append(expected[-1] * (1 + (kl / 6 - 1) * 8 / 20))
    assert [row["kl_coef"] for row in rows] == pytest.approx(expected, rel=1e-12)
    for row in rows:
        assert row["reward"] == pytest.approx(row["score"] - row["kl_coef"] * row["kl"], abs=1e-5)
    assert max(row["kl"] for row in rows) > 0.01


def test_a_run_makes_as_many_optimiser_steps_as_its_dials_say(parents, tmp_path):
    """The prompts are read four times over: the end of a pass is no reason for a step."""
    steps = []
    handle = register_optimizer_step_post_hook(lambda *_: steps.append(1))
    ppo.train(stage_config(parents, tmp_path, rollouts=8, micro_batch=1))
    handle.remove()
    assert len(steps) == 8 * 2 * 2


def test_judges_are_heard_in_evaluations_alone(parents, tmp_path):
    rows = logged(
        ppo.train(stage_config(parents, tmp_path, rollouts=2), judges={"letters": lambda texts: [*map(len, texts)]})
    )
    silent = logged(ppo.train(stage_config(parents, tmp_path / "silent", rollouts=2)))
    found = [json.loads(line) for line in (tmp_path / "tiny/ppo/samples.jsonl").read_text().splitlines()]
    for row in (row for row in rows if "eval_kl" in row):
        texts = [sample["response"] for sample in found if sample["step"] == row["step"]]
        assert row["eval_letters"] == pytest.approx(sum(map(len, texts)) / 6)
        del row["eval_letters"]
    assert rows == silent


@pytest.mark.parametrize(
    ("judge", "says"),
    [
        (lambda texts: [1.0], "judge odd: expected one finite number for each of 6 texts"),
        (lambda texts: 1.0, "judge odd: expected one"),
        (lambda texts: [math.nan, *[0.0] * (len(texts) - 1)], "judge odd: expected one"),
    ],
)
def test_a_judge_that_gives_no_number_per_text_is_refused(judge, says, parents, tmp_path):
    with pytest.raises(UserError, match=says):
        ppo.train(stage_config(parents, tmp_path), judges={"odd": judge})


def test_a_judge_that_fails_later_is_not_measured_and_ends_nothing(accelerator, capsys):
    """Before anything is trained it is refused; after that what was learnt is not lost to it."""

    def unreachable(texts):
        raise ConnectionError("no answer")

    judges = {"letters": lambda texts: [*map(len, texts)], "far": unreachable, "odd": lambda texts: [math.inf] * 2}
    assert monitor.mean_judgements(["a", "bcd"], judges, accelerator, is_first=False) == {"letters": 2.0}
    printed = " ".join(capsys.readouterr().out.split())
    assert "ppo: judge far: not measured: no answer" in printed
    assert "ppo: judge odd: not measured: expected one finite number for each of 2 texts" in printed
    with pytest.raises(UserError, match="judge far: no answer"):
        monitor.mean_judgements(["a", "bcd"], judges, accelerator, is_first=True)


def test_a_judge_cannot_take_the_place_of_a_figure(parents, tmp_path):
    with pytest.raises(UserError, match="judges: reward: figures of that name are measured already"):
        ppo.train(stage_config(parents, tmp_path), judges={"reward": len, "mine": len})
    assert not any(tmp_path.iterdir())


def test_another_score_function_is_another_stage(parents, tmp_path):
    def longer(ids, mask):
        return mask.sum(1).float()

    config = stage_config(parents, tmp_path, rollouts=2)
    ppo.train(config)
    with pytest.raises(UserError, match="score: absent then, longer now"):
        ppo.train(config, longer)
    config = dataclasses.replace(config, critic="head")
    moved = dataclasses.replace(config, run=dataclasses.replace(config.run, runs=str(tmp_path / "moved")))
    ppo.train(moved, longer)
    with pytest.raises(UserError, match="score: longer then, absent now"):
        ppo.train(moved)


def test_a_judge_is_fitted_to_the_recipes_file(parents, tmp_path):
    lines = [
        {"text": f"a {word} {n} cat", "label": label}
        for n in range(20)
        for word, label in (("fine", "positive"), ("bad", "negative"))
    ]
    config = stage_config(parents, tmp_path, rollouts=2, judge_file=write(tmp_path, "judge.jsonl", lines))
    final = ppo.train(config)
    for row in (row for row in logged(final) if "eval_kl" in row):
        assert 0 < row["eval_classifier"] < 1
        assert -1 <= row["eval_vader"] <= 1
    assert len(read_done(final)["identity"]["data"]) == 3


def extreme(push, make_model, tokenizer, reward_model, accelerator):
    """A rollout, an update on it and an evaluation of a policy whose EOS has `push` added to its logit."""
    actor_critic = ActorCritic(make_model("gpt2", seed=3, lean=(EOS, push)), Critic(reward_model), 0.7, PAD)
    reference = freeze(copy.deepcopy(actor_critic.policy))
    made_up = setup.Setup(
        config=CONFIG, stage=Silent(), accelerator=accelerator, tokenizer=tokenizer, actor_critic=actor_critic,
        prepared=actor_critic, meta=None, optimizer=None, scheduler=None,
        reference=partial(response_logprobs, reference, temperature=0.7, pad_id=PAD),
        score=partial(reward_model_scores, reward_model), judges={}, prompts=PROMPTS, held_out=PROMPTS,
    )  # fmt: skip
    made = to_experience(
        rollout_of(actor_critic, tokenizer), actor_critic, made_up.reference, made_up.score, CONFIG, identity
    )
    found = monitor.evaluate_policy(made_up, 0, [])
    metrics = run_update(actor_critic, made, accelerator) | found.metrics
    assert all(math.isfinite(value) for value in metrics.values())
    assert all(parameter.isfinite().all() for parameter in actor_critic.parameters())
    return actor_critic, made, found


def test_samples_are_whole_responses_to_their_prompts(make_model, tokenizer, reward_model, accelerator):
    _, _, found = extreme(1.0, make_model, tokenizer, reward_model, accelerator)
    fresh = make_model("gpt2", seed=3, lean=(EOS, 1.0))
    torch.manual_seed(0)
    rollout = generate(fresh, tokenizer, PROMPTS, CONFIG.sampling)
    assert [row["prompt"] for row in found.samples] == PROMPTS
    assert [row["response"] for row in found.samples] == [decode(tokenizer, ids) for ids in rollout.responses.tolist()]
    assert found.metrics["eval_length"] == pytest.approx(rollout.length.float().mean().item())


def test_a_policy_that_never_ends_is_told_of(make_model, tokenizer, reward_model, accelerator, capsys):
    actor_critic, made, found = extreme(-60.0, make_model, tokenizer, reward_model, accelerator)
    assert found.metrics["eval_eos_share"] == 0
    assert found.metrics["eval_length"] == CONFIG.sampling.max_new_tokens
    assert (made.rewards[:, -1] == -1.0).all()
    progress.record_evaluation(Silent(), found, actor_critic, [])
    assert "no response of the evaluation at rollout 0 ended by itself" in " ".join(capsys.readouterr().out.split())


def test_empty_responses_are_responses(make_model, tokenizer, reward_model, accelerator, capsys):
    """A policy that ends at once: one token each, the EOS, which is scored and learnt from like any other."""
    actor_critic, made, found = extreme(60.0, make_model, tokenizer, reward_model, accelerator)
    assert made.response_mask.sum(1).tolist() == [1] * 8
    assert made.has_eos.all()
    assert torch.equal(made.rewards[:, 0], made.scores)
    assert [row["response"] for row in found.samples] == [""] * 8
    assert (found.metrics["eval_length"], found.metrics["eval_repetition"]) == (1, 0)
    assert found.metrics["eval_duplicates"] == pytest.approx(7 / 8)
    progress.record_evaluation(Silent(), found, actor_critic, [])
    assert "ended by itself" not in capsys.readouterr().out


def test_every_figure_is_in_the_glossary(parents, tmp_path):
    glossary = (Path(__file__).parent.parent.parent / "README.md").read_text(encoding="utf-8").split("## Metrics")[1]
    names = {
        name for cell in re.findall(r"^\| (.*?) \|", glossary, re.MULTILINE) for name in re.findall(r"`(\w+)`", cell)
    }
    rows = logged(ppo.train(stage_config(parents, tmp_path, rollouts=2)))
    rollout, evaluation = ({key for row in rows if kind in row for key in row} for kind in ("ratio", "eval_kl"))
    assert rollout - {"step"} - names == set()
    assert {name.removeprefix("eval_") for name in evaluation} - {"step"} - {
        n.removeprefix("eval_") for n in names
    } == set()
    assert rollout >= {
        "score", "score_std", "kl", "reward", "kl_coef", "approx_kl", "clip_fraction", "ratio", "entropy", "value_loss",
        "value_clip_fraction", "explained_variance", "return", "length", "eos_share", "grad_norm", "learning_rate",
    }  # fmt: skip


def test_the_best_policy_is_kept_or_the_last(parents, tmp_path):
    """A score that falls with every call: SFT's own weights are the best, and what `last` keeps is something else."""
    sft = load_language_model(parents / "runs/tiny/sft/final").state_dict()
    calls = itertools.count()

    def worse_and_worse(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return torch.full((len(ids),), -1.0 - next(calls))

    kept = {}
    for name in ("best", "last"):
        adapter = Adapter(adapter="none")
        final = ppo.train(stage_config(parents, tmp_path / name, adapter=adapter, keep=name), worse_and_worse)
        weights_now = load_file(final / "model.safetensors")
        kept[name] = all(torch.equal(weights_now[key], sft[key]) for key in weights_now)
        assert read_done(final)["metrics"]["kept_rollout"] == {"best": 0, "last": 4}[name]
    assert kept == {"best": True, "last": False}


def test_a_run_over_its_kl_budget_stops_and_goes_back(parents, tmp_path, capsys):
    config = stage_config(parents, tmp_path, rollouts=9, learning_rate=0.3, kl_budget=0.01, keep="last")
    final = ppo.train(config)
    evaluations = [row for row in logged(final) if "eval_kl" in row]
    stopped = evaluations[-1]
    assert stopped["eval_kl"] > 0.01 >= max(row["eval_kl"] for row in evaluations[:-1])
    assert stopped["step"] < 9
    metrics = read_done(final)["metrics"]
    assert metrics["stopped"] == f"KL is {stopped['eval_kl']:.1f} nats per response, kl_budget is 0.01"
    assert metrics["kept_rollout"] == max(evaluations, key=lambda row: row["eval_reward"])["step"]
    assert f"stopped at rollout {stopped['step']}: KL is" in " ".join(capsys.readouterr().out.split())


class Silent:
    def log(self, *_):
        pass

    log_samples = log


def evaluation_with(step=0, **metrics):
    found = {f"eval_{name}": 0.0 for name in setup.EVALUATED} | {"eval_entropy": 4.0, "eval_repetition": 0.2}
    found |= {f"eval_{name}": value for name, value in metrics.items()}
    return monitor.Evaluation(step, found, [], torch.zeros(1))


@pytest.mark.parametrize(
    ("metrics", "says"),
    [
        ({}, ""),
        ({"entropy": 2.1, "repetition": 0.29, "duplicates": 0.09, "kl": 9.9}, ""),
        ({"kl": 10.1}, "KL is 10.1 nats per response, kl_budget is 10"),
        ({"entropy": 2.0}, ""),
        ({"entropy": 1.9}, "entropy fell from 4.00 to 1.90 nats per token"),
        ({"repetition": 0.31}, "repetition rose from 0.200 to 0.310, above 0.300"),
        ({"duplicates": 0.11}, "duplicates rose from 0.000 to 0.110, above 0.100"),
    ],
)
@pytest.mark.parametrize("between", ["nothing", "the same", "the opposite"])
def test_the_alarm_names_what_it_saw(metrics, says, between):
    """Against the first evaluation, however slowly it came to that, and whatever was in between."""
    config = dataclasses.replace(CONFIG, kl_budget=10.0)
    opposite = {"entropy": 9.0, "repetition": 0.0} if says else {"entropy": 1.0, "repetition": 0.9, "kl": 99.0}
    history = {
        "nothing": [],
        "the same": [evaluation_with(**metrics)],
        "the opposite": [evaluation_with(**opposite | ({} if says else {"duplicates": 0.9}))],
    }
    steps = [evaluation_with(), *history[between], evaluation_with(**metrics)]
    assert monitor.reason_to_stop(steps, config) == says
    silent = dataclasses.replace(CONFIG, collapse_alarm=False)
    assert monitor.reason_to_stop([evaluation_with(), evaluation_with(**metrics)], silent) == ""


@pytest.mark.parametrize(("keep", "kl", "kept"), [("last", 0.0, 1), ("best", 0.0, 0), ("last", 11.0, 0)])
def test_an_alarm_goes_back_whatever_is_to_be_kept(keep, kl, kept, actor_critic):
    """The first evaluation has the higher reward; the second is the last, within its KL budget or over it."""
    config = dataclasses.replace(CONFIG, keep=keep, kl_budget=10.0)
    history = []
    progress.record_evaluation(Silent(), evaluation_with(reward=1.0), actor_critic, history)
    before = weights(actor_critic)
    with torch.no_grad():
        for parameter in actor_critic.parameters():
            parameter.add_(1.0)
    progress.record_evaluation(Silent(), evaluation_with(step=1, reward=0.5, kl=kl), actor_critic, history)
    kept_module, metrics = progress.restore_kept(history, actor_critic, None, config)
    assert kept_module is actor_critic
    assert metrics["kept_rollout"] == kept
    assert bool(metrics["stopped"]) == (kl > 10)
    assert same(actor_critic, before) == (kept == 0)


def test_little_repetition_may_grow_by_a_twentieth():
    first = evaluation_with(repetition=0.02)
    assert monitor.reason_to_stop([first, evaluation_with(repetition=0.069)], CONFIG) == ""
    assert "above 0.070" in monitor.reason_to_stop([first, evaluation_with(repetition=0.071)], CONFIG)


def test_a_figure_at_its_bound_is_not_above_it():
    config = dataclasses.replace(CONFIG, kl_budget=10.0)
    at_bounds = evaluation_with(kl=10.0, duplicates=0.1, entropy=2.0)
    assert monitor.reason_to_stop([evaluation_with(), at_bounds], config) == ""


def test_of_equal_rewards_the_first_is_the_best(actor_critic, tmp_path):
    history = []
    for value in (1.0, 1.0, 2.0, 1.5):
        progress.record_evaluation(Silent(), evaluation_with(reward=value), actor_critic, history)
    assert [bool(found.weights) for found in history] == [False, False, True, False]


def test_evaluations_charge_the_configured_coefficient_wherever_it_was_steered(parents, tmp_path):
    """`keep: best` compares rewards, so all evaluations of a run pay the same for a nat."""
    config = stage_config(
        parents, tmp_path, rollouts=5, kl_coef=0.5, adaptive_kl=1e-3, adaptive_kl_horizon=10, learning_rate=0.1,
        missing_eos_score=None, eval_steps=1,
    )  # fmt: skip
    rows = logged(ppo.train(config))
    assert abs([row["kl_coef"] for row in rows if "kl_coef" in row][-1] - config.kl_coef) > 0.1
    evaluations = [row for row in rows if "eval_kl" in row]
    assert max(row["eval_kl"] for row in evaluations) > 0.01
    for row in evaluations:
        assert row["eval_reward"] == pytest.approx(row["eval_score"] - 0.5 * row["eval_kl"], abs=1e-5)


@pytest.mark.parametrize(("world", "skip"), [(1, 0), (2, 0), (4, 3)])
def test_processes_share_out_the_prompts_of_each_rollout(world, skip):
    """Each prompt of the global batch goes to one process; a resumed run goes on with the next batch."""
    names = [f"prompt {n}" for n in range(24)]
    others = dict.fromkeys(field.name for field in dataclasses.fields(setup.Setup))

    def batches(rank: int, of: int, without: int) -> list[list[str]]:
        place = SimpleNamespace(process_index=rank, num_processes=of)
        made = setup.Setup(**others | {"config": CONFIG, "accelerator": place, "prompts": names})
        return list(itertools.islice(made.prompt_batches(without), 6 - without))

    alone = batches(0, 1, 0)
    assert all(len(set(batch)) == CONFIG.rollout_batch for batch in alone)
    shares = [batches(rank, world, skip) for rank in range(world)]
    together = [sorted(itertools.chain(*parts)) for parts in zip(*shares, strict=True)]
    assert together == [sorted(batch) for batch in alone[skip:]]


def test_every_prompt_of_a_batch_is_answered(parents, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(setup, "generate", lambda *given: (asked.append(len(given[2])), generate(*given))[1])
    ppo.train(stage_config(parents, tmp_path, rollouts=2))
    assert asked == [6, 8, 8, 6]  # an evaluation, two rollouts, an evaluation


def test_evaluations_compare_with_sft_on_the_same_prompts(parents, tmp_path):
    """A score that grows with every call: later evaluations win every pair, the first ties with itself."""
    calls = itertools.count()
    score = lambda ids, mask: torch.full((len(ids),), float(next(calls)))  # noqa: E731
    rows = [row for row in logged(ppo.train(stage_config(parents, tmp_path), score)) if "eval_kl" in row]
    assert [row["eval_win_rate"] for row in rows] == [0.5, 1.0, 1.0]
    assert all(0 <= row["eval_repetition"] < 1 and 0 <= row["eval_duplicates"] < 1 for row in rows)
    assert all(0 < row["eval_entropy"] < math.log(100) for row in rows)


def test_evaluating_changes_nothing_but_the_log(parents, tmp_path):
    often, once = (
        logged(ppo.train(stage_config(parents, tmp_path / str(every), rollouts=3, eval_steps=every)))
        for every in (1, 3)
    )
    assert [row for row in often if "ratio" in row] == [row for row in once if "ratio" in row]
    first, second, third, _ = (row for row in often if "eval_kl" in row)
    assert first | {"step": 1} == second  # the policy stood still, and the noise is the same
    assert second != third | {"step": 1}


def test_rows_that_do_not_fit_into_the_context_are_refused(parents, tmp_path):
    sampling = Sampling(max_new_tokens=33, max_prompt_tokens=16)
    with pytest.raises(ModelError, match="context is 48 tokens, rows may have 49"):
        ppo.train(stage_config(parents, tmp_path, sampling=sampling))


def test_eight_samples_of_an_evaluation_are_kept(parents, tmp_path):
    final = ppo.train(stage_config(parents, tmp_path, rollouts=2, eval_prompts=12))
    assert len((final.parent / "samples.jsonl").read_text().splitlines()) == 2 * 8


def test_a_batch_that_does_not_divide_is_refused(parents, tmp_path):
    with pytest.raises(ConfigError, match="6 does not divide by 4"):
        ppo.train(stage_config(parents, tmp_path, rollout_batch=12, micro_batch=4))
    assert not any(tmp_path.iterdir())


def test_a_given_score_replaces_the_reward_model_and_one_seed_gives_one_result(parents, tmp_path):
    def score(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return mask.sum(1).float()

    finals = [ppo.train(stage_config(parents, tmp_path / name, rollouts=2), score) for name in ("a", "b")]
    first, second = (logged(final) for final in finals)
    assert first == second
    for row in first:
        if "ratio" in row:
            assert row["score"] > row["length"]  # prompt and response, counted
    files = sorted(path.relative_to(finals[0]) for path in finals[0].rglob("*.safetensors"))
    assert Path("adapter_model.safetensors") in files
    for file in files:
        ours, theirs = load_file(finals[0] / file), load_file(finals[1] / file)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours), file


def test_the_first_rollout_scores_about_zero(parents, tmp_path):
    """The reward's shift was set on samples of this very policy."""
    config = stage_config(parents, tmp_path, rollouts=2, eval_prompts=20, eval_steps=2)
    rows = logged(ppo.train(dataclasses.replace(config, sampling=Sampling(max_new_tokens=8, max_prompt_tokens=16))))
    scores = [row["score"] for row in rows if "score" in row]
    spread = [row["score_std"] for row in rows if "score" in row]
    assert abs(scores[0]) < 4 * spread[0] / 8**0.5
