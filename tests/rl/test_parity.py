"""PPO once more, independently: in float64, one unpadded sequence and one token at a time, from the papers' formulas.

Nothing of `pipeline`'s maths is used here but the sampled tokens. Schulman et al. 2017 (arXiv 1707.06347) eq. 7 and 9;
GAE as the sum of arXiv 1506.02438, eq. 16; the reward of arXiv 2203.02155, eq. 2.
"""

import copy
import dataclasses
import math
from functools import partial

import pytest
import torch
from experiences import to_experience

from pipeline.config.dials import Adapter, Sampling
from pipeline.config.stages import PPO
from pipeline.core.tensors import identity
from pipeline.models.actor_critic import ActorCritic
from pipeline.models.forward import response_logprobs
from pipeline.models.heads import Critic
from pipeline.models.loading import freeze
from pipeline.rl.rewards import reward_model_scores
from pipeline.rl.rollout import generate
from pipeline.rl.update import ppo_loss

PAD, EOS = 0, 2
PROMPTS = ["the cat", " a", "so he had tea", "", " no hat", "the sea on", "a dog ate", "he"]
CONFIGS = {
    "crooked": PPO(
        adapter=Adapter(adapter="none"), sampling=Sampling(max_new_tokens=9, max_prompt_tokens=12, temperature=0.7),
        micro_batch=3, kl_coef=0.2, gamma=0.9, lam=0.8, cliprange=0.1, cliprange_value=0.3, vf_coef=0.7,
        entropy_coef=0.05,
        score_clip=0.5, missing_eos_score=-1.5,
    ),
    "plain": PPO(
        adapter=Adapter(adapter="none"), sampling=Sampling(max_new_tokens=7, max_prompt_tokens=12),
        micro_batch=8, kl_coef=0.05, gamma=1.0, lam=0.95, missing_eos_score=None,
    ),
}  # fmt: skip


class Reference:
    """What the papers say of one set of sequences, each a list of prompt ids and a list of response ids."""

    def __init__(self, config: PPO, sequences: list[tuple[list[int], list[int]]]) -> None:
        self.config, self.sequences = config, sequences

    def distributions(self, model, prompt, response):
        """log pi(. | state) of every response token, (T, V): temperature in, padding never to be chosen."""
        logits = model(torch.tensor([prompt + response])).logits[0] / self.config.sampling.temperature
        logits = torch.cat([torch.full_like(logits[:, :1], -math.inf), logits[:, 1:]], dim=1)  # PAD is token 0
        return [
            logits[len(prompt) - 1 + t] - torch.logsumexp(logits[len(prompt) - 1 + t], 0) for t in range(len(response))
        ]

    def head(self, model, shift, prompt, response):
        """w . h - shift after every token, (P + T)."""
        hidden = model.base_model(torch.tensor([prompt + response])).last_hidden_state[0]
        return [hidden[i] @ model.score.weight[0] - shift for i in range(len(prompt) + len(response))]

    def experience(self, policy, critic, shift, reference, reward_model):
        """Per sequence: old log-probabilities, old values, returns, advantages before whitening."""
        c, rows = self.config, []
        for prompt, response in self.sequences:
            old = [d[y] for d, y in zip(self.distributions(policy, prompt, response), response, strict=True)]
            ref = [d[y] for d, y in zip(self.distributions(reference, prompt, response), response, strict=True)]
            values = self.head(critic, shift, prompt, response)[len(prompt) - 1 : -1]
            score = self.head(reward_model, reward_model.config.score_shift, prompt, response)[-1]
            if c.score_clip is not None:
                score = max(min(score, torch.tensor(c.score_clip).double()), torch.tensor(-c.score_clip).double())
            if response[-1] != EOS and c.missing_eos_score is not None:
                score = torch.tensor(c.missing_eos_score).double()
            size = len(response)
            rewards = [-c.kl_coef * (old[t] - ref[t]) + (score if t == size - 1 else 0) for t in range(size)]
            following = [*values[1:], torch.zeros(()).double()]
            deltas = [rewards[t] + c.gamma * following[t] - values[t] for t in range(size)]
            advantages = [sum((c.gamma * c.lam) ** (k - t) * deltas[k] for k in range(t, size)) for t in range(size)]
            returns = [advantages[t] + values[t] for t in range(size)]
            rows.append([[x.detach() for x in column] for column in (old, values, returns, advantages)])
        every = torch.stack([a for row in rows for a in row[3]])
        mean, deviation = every.mean(), (every.square().mean() - every.mean() ** 2).sqrt()
        return [(old, values, returns, [(a - mean) / deviation for a in advs]) for old, values, returns, advs in rows]

    def loss(self, policy, critic, shift, experience):
        """L^CLIP + c1 L^VF - c2 S, each a mean over all tokens."""
        c, terms = self.config, []
        for (prompt, response), (old, old_values, returns, advantages) in zip(self.sequences, experience, strict=True):
            distributions = self.distributions(policy, prompt, response)
            values = self.head(critic, shift, prompt, response)[len(prompt) - 1 : -1]
            for t, y in enumerate(response):
                ratio = (distributions[t][y] - old[t]).exp()
                inside = ratio.clamp(1 - c.cliprange, 1 + c.cliprange)
                surrogate = torch.minimum(ratio * advantages[t], inside * advantages[t])
                near = old_values[t] + (values[t] - old_values[t]).clamp(-c.cliprange_value, c.cliprange_value)
                value = 0.5 * torch.maximum((values[t] - returns[t]) ** 2, (near - returns[t]) ** 2)
                entropy = -(distributions[t].exp()[1:] * distributions[t][1:]).sum()
                terms.append(-surrogate + c.vf_coef * value - c.entropy_coef * entropy)
        return torch.stack(terms).mean()


@pytest.fixture(params=CONFIGS)
def problem(request, policy, reward_model, make_model, tokenizer):
    """Our experience and module, and float64 copies of all models; the policy has moved since the rollout."""
    config = CONFIGS[request.param]
    actor_critic = ActorCritic(policy, Critic(reward_model), config.sampling.temperature, PAD)
    frozen_reference = freeze(make_model("gpt2", seed=8))
    before = [
        copy.deepcopy(model).double() for model in (policy, actor_critic.critic.model, frozen_reference, reward_model)
    ]
    torch.manual_seed(1)
    rollout = generate(policy, tokenizer, PROMPTS, config.sampling)
    forward = partial(response_logprobs, frozen_reference, temperature=config.sampling.temperature, pad_id=PAD)
    score = partial(reward_model_scores, reward_model)
    experience = to_experience(rollout, actor_critic, forward, score, config, identity)
    assert 1 <= rollout.has_eos.sum() <= 7
    width = rollout.input_ids.shape[1] - rollout.response_tokens
    sequences = [
        (ids[:width][mask[:width]].tolist(), ids[width:][mask[width:]].tolist())
        for ids, mask in zip(rollout.input_ids, rollout.attention_mask, strict=True)
    ]
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in actor_critic.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return config, actor_critic, experience, sequences, before


def test_the_experience_is_the_papers(problem):
    config, _, experience, sequences, before = problem
    shift = before[3].config.score_shift
    rows = Reference(config, sequences).experience(before[0], before[1], shift, before[2], before[3])
    for number, row in enumerate(rows):
        mask = experience.response_mask[number]
        for name, expected in zip(("old_logprobs", "old_values", "returns", "advantages"), row, strict=True):
            ours = getattr(experience, name)[number][mask].double()
            torch.testing.assert_close(ours, torch.stack(expected), atol=2e-5, rtol=1e-5, msg=f"{name} of row {number}")


def test_loss_and_gradient_are_the_papers(problem):
    config, actor_critic, experience, sequences, before = problem
    reference = Reference(config, sequences)
    rows = reference.experience(before[0], before[1], before[3].config.score_shift, before[2], before[3])
    policy, critic = copy.deepcopy(actor_critic.policy).double(), copy.deepcopy(actor_critic.critic.model).double()
    shift = actor_critic.critic.shift.detach().double().requires_grad_()
    expected = reference.loss(policy, critic, shift, rows)
    expected.backward()

    tokens = experience.response_mask.sum()
    total = torch.zeros(())
    for part in experience.micro_batches(torch.randperm(len(experience)), config.micro_batch):
        loss, statistics = ppo_loss(actor_critic, part, config, tokens, True)
        loss.backward()
        total = total + loss.detach()
    assert total.item() == pytest.approx(expected.item(), abs=2e-5)
    _, statistics = ppo_loss(actor_critic, experience, dataclasses.replace(config, micro_batch=8), tokens, True)
    assert statistics["clip_fraction"] > 0.05  # the policy has moved: both branches of the maximum are in use
    theirs = dict(policy.named_parameters(prefix="policy")) | dict(critic.named_parameters(prefix="critic.model"))
    theirs["critic.shift"] = shift
    compared = 0
    for name, parameter in actor_critic.named_parameters():
        if parameter.grad is None:
            assert theirs[name].grad is None or not theirs[name].grad.any()
            continue
        size = theirs[name].grad.abs().max().item()
        torch.testing.assert_close(
            parameter.grad.double(), theirs[name].grad, atol=1e-4 * size + 1e-6, rtol=0, msg=name
        )
        compared += size > 1e-3
    assert compared > 20
