import dataclasses
import math
from functools import partial

import pytest
import torch
from experiences import to_experience
from transformers import LlamaConfig, LlamaForCausalLM

from pipeline.config.dials import Adapter, Sampling
from pipeline.config.errors import UserError
from pipeline.config.stages import PPO
from pipeline.core.tensors import identity
from pipeline.data.files import DataError
from pipeline.data.prompts import read_prompts
from pipeline.data.tokenize import decode, preference_rows, text_ids
from pipeline.data.tokenizer import train_tokenizer
from pipeline.models.actor_critic import ActorCritic
from pipeline.models.forward import response_logprobs
from pipeline.models.fresh_adapter import wrap_with_adapter
from pipeline.models.heads import Critic
from pipeline.rl.experience import Experience
from pipeline.rl.rewards import reward_model_scores
from pipeline.rl.rollout import Rollout, generate
from pipeline.rl.update import ppo_loss

PAD, BOS, EOS = 0, 1, 2
PROMPTS = ["the cat", " a", "so he had tea", "", " no hat", "the sea on", "a dog ate", "he"]
SAMPLING = Sampling(max_new_tokens=11, max_prompt_tokens=9, temperature=0.7)
CONFIG = PPO(sampling=SAMPLING, micro_batch=3, kl_coef=0.3, gamma=0.9, lam=0.8, missing_eos_score=-1.5)


def sample(policy, tokenizer, seed=0, sampling=SAMPLING):
    torch.manual_seed(seed)
    return generate(policy, tokenizer, PROMPTS, sampling)


# generation


def test_what_is_sampled_is_what_is_scored(policy, tokenizer):
    rollout = sample(policy, tokenizer)
    torch.manual_seed(0)
    prompts = rollout.input_ids[:, : -rollout.response_tokens]
    theirs = policy.generate(
        prompts, attention_mask=rollout.attention_mask[:, : -rollout.response_tokens].long(),
        do_sample=True, top_k=0, top_p=1.0, temperature=0.7, suppress_tokens=[PAD], eos_token_id=EOS, pad_token_id=PAD,
        max_new_tokens=11, output_scores=True, return_dict_in_generate=True,
    )  # fmt: skip
    sampled = theirs.sequences[:, prompts.shape[1] :]
    assert torch.equal(rollout.responses[:, : sampled.shape[1]], sampled)
    scores = torch.stack(theirs.scores, 1)
    expected = scores.double().log_softmax(-1).gather(-1, sampled[..., None]).squeeze(-1)
    ours, _ = response_logprobs(policy, rollout.input_ids, rollout.attention_mask, rollout.response_tokens, 0.7, PAD)
    mask = rollout.response_mask[:, : sampled.shape[1]]
    torch.testing.assert_close(ours[:, : sampled.shape[1]][mask].double(), expected[mask], atol=1e-4, rtol=0)
    theirs = rollout.sampled_logprobs[:, : sampled.shape[1]]
    torch.testing.assert_close(theirs[mask].double(), expected[mask], atol=1e-5, rtol=0)
    assert scores.isneginf().sum() == scores[..., PAD].isneginf().sum() == scores[..., 0].numel()


def test_nothing_is_left_out_of_a_large_vocabulary():
    """512 draws from 300 equally likely tokens: transformers' own top-k of 50 would show."""
    tokenizer = train_tokenizer("bpe", ["the cat sat on the mat, and the dog sat on the cat"], 300)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).eval()
    torch.nn.init.zeros_(model.lm_head.weight)
    torch.manual_seed(0)
    rollout = generate(model, tokenizer, ["the"] * 512, Sampling(max_new_tokens=1, max_prompt_tokens=4))
    count = len(tokenizer) - 1  # padding aside
    assert len(set(rollout.responses.flatten().tolist())) == pytest.approx(
        count * (1 - math.exp(-512 / count)), rel=0.1
    )
    torch.testing.assert_close(rollout.sampled_logprobs, torch.full((512, 1), -math.log(count)))


def test_the_cache_is_used_while_sampling(policy, tokenizer):
    widths = []
    policy.register_forward_pre_hook(lambda _, __, given: widths.append(given["input_ids"].shape[1]), with_kwargs=True)
    sample(policy, tokenizer)
    assert widths == [9] + [1] * 10


def test_a_rollout_is_ragged_and_ends_at_eos(policy, tokenizer):
    rollout = sample(policy, tokenizer)
    assert rollout.response_tokens == rollout.responses.shape[1] == 11
    assert rollout.input_ids.shape == rollout.attention_mask.shape == (8, 9 + 11)
    assert 2 <= rollout.has_eos.sum() <= 6
    assert len(set(rollout.length.tolist())) > 3
    for row, (tokens, length) in enumerate(zip(rollout.responses.tolist(), rollout.length.tolist(), strict=True)):
        assert rollout.has_eos[row] == (EOS in tokens)
        assert length == (tokens.index(EOS) + 1 if EOS in tokens else 11)
        assert set(tokens[length:]) <= {PAD}
        assert PAD not in tokens[:length]
        assert rollout.response_mask[row].tolist() == [t < length for t in range(11)]
        prompt = tokenizer(PROMPTS[row])["input_ids"][-9:]
        assert rollout.input_ids[row, :9].tolist() == [PAD] * (9 - len(prompt)) + prompt
        assert rollout.attention_mask[row].tolist() == [t >= 9 - len(prompt) and t < 9 + length for t in range(20)]
    assert len(tokenizer(PROMPTS[2])["input_ids"]) > 9  # one prompt lost its beginning


def test_padding_is_never_sampled_however_likely(make_model, tokenizer):
    rollout = sample(make_model("gpt2", seed=3, lean=(PAD, 50.0)), tokenizer)
    assert (rollout.responses[rollout.response_mask] != PAD).all()
    assert (rollout.length > 1).any()


def test_early_stopping_samples_what_a_fixed_length_does_up_to_eos(policy, tokenizer):
    rollout = sample(policy, tokenizer)
    torch.manual_seed(0)
    prompts, mask = rollout.input_ids[:, :-11], rollout.attention_mask[:, :-11]
    fixed = policy.generate(
        prompts, attention_mask=mask.long(), do_sample=True, top_k=0, temperature=0.7, suppress_tokens=[PAD],
        eos_token_id=None, pad_token_id=PAD, max_new_tokens=11, min_new_tokens=11,
    )[:, -11:]  # fmt: skip
    assert torch.equal(rollout.responses[rollout.response_mask], fixed[rollout.response_mask])


def test_the_models_own_generation_settings_do_not_warp_the_distribution(policy, tokenizer):
    expected = sample(policy, tokenizer).input_ids
    policy.generation_config.update(top_k=2, repetition_penalty=2.0, min_new_tokens=5, num_beams=2, top_p=0.5)
    assert torch.equal(sample(policy, tokenizer).input_ids, expected)


def test_a_rollout_that_ends_early_is_as_wide_as_any(make_model, tokenizer):
    rollout = sample(make_model("gpt2", lean=(EOS, 50.0)), tokenizer)
    assert rollout.length.tolist() == [1] * 8
    assert rollout.responses.tolist() == [[EOS] + [PAD] * 10] * 8


@pytest.fixture
def prompt_file(tmp_path):
    """Prompts of 4, 7 and 10 tokens with their bos."""
    (tmp_path / "p.jsonl").write_text("".join(f'{{"prompt": "{text}"}}\n' for text in ("cat", "so tea", "a hat on a")))
    return str(tmp_path / "p.jsonl")


@pytest.mark.parametrize(
    ("long_prompts", "most", "kept", "says"),
    [
        ("cut", 11, 3, ""), ("drop", 11, 3, ""), ("error", 11, 3, ""),
        ("cut", 7, 3, "1 of 3 prompts are longer than 7 tokens (cut)"),
        ("drop", 7, 2, "1 of 3 prompts are longer than 7 tokens (drop)"),
        ("cut", 3, 3, "3 of 3 prompts are longer than 3 tokens (cut)"),
    ],
)  # fmt: skip
def test_long_prompts_are_cut_or_left_out_and_counted(long_prompts, most, kept, says, prompt_file, tokenizer, capsys):
    config = PPO(sampling=Sampling(max_prompt_tokens=most, long_prompts=long_prompts))
    texts = ["cat", "so tea", "a hat on a"]
    assert read_prompts(prompt_file, 0, tokenizer, config) == texts[:kept]
    said = " ".join(capsys.readouterr().out.split())
    assert said.endswith(says)
    assert bool(said) == bool(says)
    assert read_prompts(prompt_file, 1, tokenizer, config) == texts[:1]


@pytest.mark.parametrize(("long_prompts", "most"), [("error", 9), ("drop", 3)])
def test_long_prompts_are_refused(long_prompts, most, prompt_file, tokenizer):
    config = PPO(sampling=Sampling(max_prompt_tokens=most, long_prompts=long_prompts))
    with pytest.raises(DataError, match=r"p\.jsonl: . of 3 prompts are longer than . tokens: raise max_prompt_tokens"):
        read_prompts(prompt_file, 0, tokenizer, config)


def test_dropout_is_off_while_sampling(make_model, tokenizer):
    """A policy in training mode with dropout samples what it samples in eval mode, and stays in training mode."""
    policy = make_model("gpt2", dropout=0.5)
    torch.manual_seed(1)
    expected = generate(policy.eval(), tokenizer, PROMPTS, SAMPLING)
    torch.manual_seed(1)
    assert torch.equal(generate(policy.train(), tokenizer, PROMPTS, SAMPLING).input_ids, expected.input_ids)
    assert policy.training


def test_generation_leaves_the_mode_and_samples_from_the_adapter(policy, tokenizer):
    before = sample(policy, tokenizer).input_ids
    adapted = wrap_with_adapter(policy, Adapter(adapter="lora")).train()
    assert torch.equal(sample(adapted, tokenizer).input_ids, before)
    assert all(module.training for module in adapted.modules())
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    assert not torch.equal(sample(adapted, tokenizer).input_ids, before)


# experience from given forwards


def given_forwards(poison):
    """Forwards whose outputs depend on the tokens, with `poison` wherever a slot is masked."""

    def outputs(scale, ids, mask, size):
        return torch.where(mask[:, -size:], torch.sin(scale * ids[:, -size:].float()), poison)

    def actor_critic(ids, mask, size):
        return outputs(1.0, ids, mask, size), outputs(2.0, ids, mask, size), outputs(3.0, ids, mask, size)

    def score(ids, mask):
        return torch.where(mask, ids, 0).sum(1) / 50

    return actor_critic, lambda ids, mask, size: (outputs(4.0, ids, mask, size), None), score


def rollout_of(responses, eos):
    """A rollout with P = 3 and T = 5, from lists of response tokens."""
    length = torch.tensor([len(row) for row in responses])
    tokens = torch.tensor([row + [PAD] * (5 - len(row)) for row in responses])
    mask = torch.arange(5) < length[:, None]
    prompts, prompt_mask = torch.tensor([[PAD, BOS, 7]] * len(responses)), torch.tensor([[False, True, True]])
    return Rollout(
        torch.cat([prompts, tokens], 1), torch.cat([prompt_mask.expand(len(responses), 3), mask], 1),
        mask, length, torch.tensor(eos), torch.where(mask, -0.5, 0.0),
    )  # fmt: skip


ROLLOUT = rollout_of([[5, 9, EOS], [4, 4, 8, 11, 13], [EOS], [6, 3, 12, EOS]], [True, False, True, True])


def experience_of(poison, config=CONFIG, rollout=ROLLOUT, reduce=identity):
    return to_experience(rollout, *given_forwards(poison), config, reduce)


def test_rewards_returns_and_advantages_by_their_definitions():
    experience = experience_of(0.0)
    used = [0.48 - 12 / 50 + 0.24, -1.5, 0, 0]
    raw, rewards = torch.zeros(4, 5, dtype=torch.float64), torch.zeros(4, 5, dtype=torch.float64)
    for row, length in enumerate(ROLLOUT.length.tolist()):
        tokens = ROLLOUT.responses[row, :length].tolist()
        scores = (BOS + 7 + sum(tokens)) / 50
        assert experience.scores[row].item() == pytest.approx(scores, abs=1e-6)
        used[row] = scores if EOS in tokens else -1.5
        kl = [math.sin(y) - math.sin(4 * y) for y in tokens]
        values = [math.sin(3 * y) for y in tokens] + [0.0]
        torch.testing.assert_close(experience.kl[row, :length].double(), torch.tensor(kl).double(), atol=1e-5, rtol=0)
        for t in range(length):
            rewards[row, t] = -0.3 * kl[t] + (used[row] if t == length - 1 else 0)
        delta = [rewards[row, t].item() + 0.9 * values[t + 1] - values[t] for t in range(length)]
        for t in range(length):
            raw[row, t] = sum((0.9 * 0.8) ** (u - t) * delta[u] for u in range(t, length))
    mask = ROLLOUT.response_mask
    torch.testing.assert_close(experience.rewards.double(), rewards, atol=1e-5, rtol=0)
    totals = torch.tensor(used) - 0.3 * experience.kl.sum(1)
    torch.testing.assert_close(experience.rewards.sum(1), totals, atol=1e-5, rtol=0)
    returns = (raw + experience.old_values.double()) * mask
    torch.testing.assert_close(experience.returns.double(), returns, atol=1e-5, rtol=0)
    white = (raw[mask] - raw[mask].mean()) / raw[mask].std(correction=0)
    torch.testing.assert_close(experience.advantages[mask].double(), white, atol=1e-4, rtol=0)
    assert (experience.advantages[~mask] == 0).all()
    assert experience.advantages[mask].mean().item() == pytest.approx(0, abs=1e-6)
    assert experience.advantages[mask].var(correction=0).item() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("size", [1, 2, 4, 9])
def test_micro_batches_hold_each_row_once_and_no_column_of_padding(size, policy, tokenizer):
    """NaN stands wherever a row of the experience has no token: what is cut away or kept is seen by it."""
    rollout = sample(policy, tokenizer)
    mask, rows = rollout.response_mask, torch.tensor([6, 0, 3, 2, 7])
    per_token = [torch.rand(mask.shape).masked_fill(~mask, torch.nan) for _ in range(7)]
    experience = Experience(
        rollout.input_ids, rollout.attention_mask, mask, rollout.has_eos, *per_token[:4], torch.arange(8.0),
        *per_token[4:],
    )  # fmt: skip
    parts = experience.micro_batches(rows, size)
    assert [len(part) for part in parts] == [size] * (5 // size) + [5 % size] * (5 % size > 0)
    assert torch.cat([part.scores for part in parts]).sort().values.tolist() == [0, 2, 3, 6, 7]
    lengths = [part.attention_mask.sum(1) for part in parts]
    assert torch.equal(torch.cat(lengths), torch.cat(lengths).sort().values)
    for part in parts:
        assert part.attention_mask.any(0).all()
        assert part.response_mask.any(0).all()
        for number, row in enumerate(part.scores.long().tolist()):
            for field in dataclasses.fields(Experience):
                whole, piece = getattr(experience, field.name)[row], getattr(part, field.name)[number]
                if field.name in ("input_ids", "attention_mask"):
                    whole, piece = whole[experience.attention_mask[row]], piece[part.attention_mask[number]]
                elif piece.ndim:
                    assert piece.shape == (part.response_tokens,)
                    whole, piece = whole[mask[row]], piece[part.response_mask[number]]
                assert torch.equal(whole, piece), field.name


@pytest.mark.parametrize("bound", [0.0, 0.05, None])
def test_scores_are_clipped_on_both_sides_before_a_missing_eos_replaces_them(bound):
    actor_critic, reference, score = given_forwards(0.0)
    scores = score(ROLLOUT.input_ids, ROLLOUT.attention_mask)
    middle = scores[ROLLOUT.has_eos].mean()

    def centred(ids, mask):
        return score(ids, mask) - middle

    config = dataclasses.replace(CONFIG, score_clip=bound)
    experience = to_experience(ROLLOUT, actor_critic, reference, centred, config, identity)
    free = (scores - middle).tolist()
    assert experience.scores.tolist() == pytest.approx(free, abs=1e-6)  # logged as they are
    assert min(free) < -0.05 < 0.05 < max(free)
    cut = free if bound is None else [min(max(s, -bound), bound) for s in free]
    expected = torch.where(ROLLOUT.has_eos, torch.tensor(cut), -1.5)
    torch.testing.assert_close(experience.rewards.sum(1) + 0.3 * experience.kl.sum(1), expected, atol=1e-5, rtol=0)


def test_a_missing_eos_keeps_its_score_when_told_so():
    kept = experience_of(0.0, dataclasses.replace(CONFIG, missing_eos_score=None))
    replaced = experience_of(0.0)
    assert torch.equal(kept.scores, replaced.scores)
    difference = (kept.rewards - replaced.rewards).abs()
    assert difference[1, 4].item() == pytest.approx(kept.scores[1].item() + 1.5, abs=1e-6)
    difference[1, 4] = 0
    assert (difference == 0).all()


@pytest.mark.parametrize("poison", [math.nan, math.inf, 1e30])
def test_masked_slots_reach_nothing(poison):
    clean, poisoned = experience_of(0.0), experience_of(poison)
    mask = ROLLOUT.response_mask
    for field in dataclasses.fields(Experience):
        ours, theirs = getattr(poisoned, field.name), getattr(clean, field.name)
        if field.name in ("old_logprobs", "old_values"):
            ours, theirs = ours[mask], theirs[mask]
        assert torch.equal(ours, theirs), field.name
        assert ours.isfinite().all(), field.name
    results = []
    for experience, fill in ((clean, 0.0), (poisoned, poison)):
        leaves = [torch.where(mask, torch.full((4, 5), x), fill).requires_grad_() for x in (0.1, 0.2, 0.3)]
        loss, sums = ppo_loss(lambda *_, made=leaves: made, experience, CONFIG, mask.sum(), True)
        loss.backward()
        results.append([loss, *sums.values(), *(leaf.grad for leaf in leaves if leaf.grad is not None)])
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)
        assert ours.isfinite().all()


def test_the_micro_batch_changes_nothing_and_may_not_divide():
    for micro in (1, 2, 4, 7):
        other = experience_of(0.0, dataclasses.replace(CONFIG, micro_batch=micro))
        assert all(
            torch.equal(getattr(other, f.name), getattr(experience_of(0.0), f.name)) for f in dataclasses.fields(other)
        )


def test_advantages_are_whitened_with_the_moments_of_all_processes():
    """A process that is told of twice its tokens and of moments around another mean whitens with those."""
    alone = experience_of(0.0)
    shift = torch.tensor([5.0, 0.0], dtype=torch.float64)  # added to the sum, not to the count
    moved = experience_of(0.0, reduce=lambda x: x + shift if x.shape == (2,) else 4 * x)
    mask = ROLLOUT.response_mask
    raw = (alone.returns - alone.old_values)[mask].double()
    mean = raw.mean() + 5 / mask.sum()
    expected = (raw - mean) / (4 * (raw - mean).square().mean()).sqrt()
    torch.testing.assert_close(moved.advantages[mask].double(), expected, atol=1e-5, rtol=0)


def test_rows_of_an_experience_are_picked_together():
    part = experience_of(0.0)[torch.tensor([3, 1])]
    assert len(part) == 2
    assert part.response_tokens == 5
    for field in dataclasses.fields(Experience):
        assert torch.equal(getattr(part, field.name), getattr(experience_of(0.0), field.name)[[3, 1]])


# experience from models


@pytest.mark.parametrize(
    ("score", "says"),
    [
        (lambda ids, mask: torch.full((len(ids),), math.nan), "the score of response 0 is nan; .* finite number"),
        (lambda ids, mask: torch.where(ids[:, -1] == PAD, 1.0, -math.inf), "the score of response [0-9] is -inf"),
        (lambda ids, mask: ids.float(), r"gave shapes .*\(3, 8\).* for [0-9]+ responses; expected one number for each"),
        (lambda ids, mask: torch.zeros(1), r"gave shapes \[\(1,\), .* expected one number for each"),
        (lambda ids, mask: torch.zeros(()), r"gave shapes \[\(\), "),
    ],
)
def test_a_score_that_is_no_number_per_response_is_refused(score, says):
    actor_critic, reference, _ = given_forwards(0.0)
    with pytest.raises(UserError, match=says):
        to_experience(ROLLOUT, actor_critic, reference, score, CONFIG, identity)


def test_the_reward_model_reads_the_very_ids_it_was_trained_on(policy, reward_model, tokenizer):
    seen = []

    def score(ids, mask):
        seen.extend(row[real].tolist() for row, real in zip(ids, mask, strict=True))
        return reward_model_scores(reward_model, ids, mask)

    actor_critic = ActorCritic(policy, Critic(reward_model), 0.7, PAD)
    rollout = sample(policy, tokenizer, sampling=dataclasses.replace(SAMPLING, max_prompt_tokens=40))
    to_experience(rollout, actor_critic, lambda *x: response_logprobs(policy, *x, 0.7, PAD), score, CONFIG, identity)
    plain = 0
    for row, prompt in enumerate(PROMPTS):
        tokens = rollout.responses[row, : rollout.length[row]].tolist()
        completion = decode(tokenizer, tokens)
        if rollout.has_eos[row] and not {BOS, tokenizer.unk_token_id} & set(tokens):
            plain += 1
            assert [seen[row]] == text_ids(tokenizer, [prompt], [completion])
            pair = {"prompt": prompt, "chosen": completion, "rejected": "a", "margin": 0.0}
            rows, _ = preference_rows(tokenizer, [pair], 99, "error")
            assert seen[row] == rows["chosen_ids"][0]
    assert plain >= 2
    assert len(seen) == len(PROMPTS)


def test_the_kl_is_exactly_zero_against_itself_and_nothing_has_a_gradient(policy, reward_model, tokenizer):
    actor_critic = ActorCritic(policy, Critic(reward_model), 0.7, PAD)
    reference = partial(response_logprobs, policy, temperature=0.7, pad_id=PAD)
    rollout = sample(policy, tokenizer)
    score = partial(reward_model_scores, reward_model)
    experience = to_experience(
        rollout, actor_critic, lambda ids, mask, size: reference(ids, mask, size), score, CONFIG, identity
    )
    assert (experience.kl == 0).all()
    assert (experience.rewards != 0).sum(1).tolist() == [1] * 8
    assert not any(getattr(experience, field.name).requires_grad for field in dataclasses.fields(Experience))
    last = rollout.length - 1
    used = torch.where(rollout.has_eos, experience.scores, -1.5)
    assert torch.equal(experience.rewards.gather(1, last[:, None]).squeeze(1), used)
