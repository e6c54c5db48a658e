"""Policy, reference, critic and reward model as adapters of one base: each against what PEFT and transformers load."""

import copy
import dataclasses
import json
import math
import shutil
from functools import partial

import pytest
import torch
from accelerate import Accelerator
from experiences import to_experience
from peft import PeftModel, TaskType
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from pipeline import ppo, reward
from pipeline.config.dials import Adapter, Optim, Run, Sampling
from pipeline.config.errors import ConfigError
from pipeline.config.parse import parse
from pipeline.config.stages import PPO, SFT, Reward
from pipeline.core.tensors import identity
from pipeline.data.tokenize import preference_rows
from pipeline.data.tokenizer import ModelError
from pipeline.models.actor_critic import ActorCritic, add_reward_model
from pipeline.models.fresh_adapter import wrap_with_adapter
from pipeline.models.heads import Critic, ValueHead, load_reward_model, new_reward_model
from pipeline.models.loading import (
    ATTN_IMPLEMENTATION,
    load_language_model,
    load_policy,
    unwrap_peft,
)
from pipeline.models.multi_adapter import CRITIC, POLICY, REFERENCE, REWARD, adapter_layers, hash_trunk, use_adapter
from pipeline.models.saving import save_policy
from pipeline.rl import progress, setup
from pipeline.rl.rewards import adapter_reward_scores, reward_model_scores
from pipeline.rl.rollout import generate
from pipeline.runtime.finished import read_done

PAD = 0
KINDS = ("gpt2", "llama")
LORA, IA3 = Adapter(adapter="lora", lora_r=3, lora_alpha=8), Adapter(adapter="ia3")
CASES = [(kind, dials) for kind in KINDS for dials in (LORA, IA3)]
NAMES = [f"{kind}-{dials.adapter}" for kind, dials in CASES]
IDS = torch.tensor([[1, 6, 4, 9, 12, 5, 2], [1, 8, 8, 3, 7, 11, 10]])  # no padding: stock heads read the last token
MASK = torch.ones_like(IDS).bool()
PADDED = torch.tensor([[0, 0, 1, 6, 4, 9, 2, 0], [1, 8, 8, 3, 7, 11, 10, 5]])
PROMPTS = ["the cat", " a", "so he had tea", "", " no hat", "the sea on", "a dog ate", "he"]
SAMPLING = Sampling(max_new_tokens=9, max_prompt_tokens=12, temperature=0.7)
CONFIG = PPO(
    sampling=SAMPLING, rollouts=4, rollout_batch=8, num_ppo_epochs=2, num_mini_batches=2, micro_batch=2,
    learning_rate=3e-2,
    critic_learning_rate=2e-2, kl_coef=0.2, gamma=0.9, lam=0.8, critic_warmup=0,
)  # fmt: skip
SHIFT = 0.37


def disturbed(model, seed):
    """The model with every trainable weight moved, so that an adapter does something and a head is its own."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(scope="module")
def parents(saved, tokenizer, tmp_path_factory):
    """parents(kind, dials): a base, an SFT adapter and a reward adapter on it, as the stages leave them."""
    root = tmp_path_factory.mktemp("parents")

    def make(kind, dials):
        folder = root / kind / dials.adapter
        if not folder.exists():
            save_policy(
                disturbed(wrap_with_adapter(load_language_model(saved[kind]), dials), 1), tokenizer, folder / "sft"
            )
            scorer = dataclasses.replace(dials, lora_r=2)
            model = wrap_with_adapter(new_reward_model(saved[kind], tokenizer), scorer, TaskType.SEQ_CLS)
            model.config.score_shift = SHIFT
            reward.save_reward_model(disturbed(model, 2), tokenizer, IDS.tolist(), folder / "reward")
            shutil.copytree(saved[kind], folder / "base")
        return folder

    return make


def four_roles(folder, dials, critic="reward", sft="sft"):
    policy = load_policy(folder / sft, dials)
    reward_model = add_reward_model(folder / "reward", policy)
    head = setup.add_critic(critic, policy, reward_model, PAD)
    return ActorCritic(policy, head, SAMPLING.temperature, PAD, reward_model).eval()


@pytest.fixture(params=CASES, ids=NAMES)
def case(request, parents):
    kind, dials = request.param
    return parents(kind, dials), dials


@pytest.fixture
def folder(case):
    return case[0]


@pytest.fixture
def roles(case):
    """Four roles of which no two are alike: policy and critic have moved away from what they are copies of."""
    actor_critic = four_roles(*case)
    return disturbed(actor_critic, 3)


def stock_language_model(folder):
    """PEFT's own loading of the adapter in a folder onto its base."""
    base = AutoModelForCausalLM.from_pretrained(folder.parent / "base", attn_implementation=ATTN_IMPLEMENTATION)
    return PeftModel.from_pretrained(base, folder).eval()


def stock_classifier(folder, base, trainable=False):
    """The same of a classifier, whose head PEFT's adapter brings along: the base's own is drawn at random."""
    torch.manual_seed(11)
    model = AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=1, pad_token_id=PAD, attn_implementation=ATTN_IMPLEMENTATION
    )
    return PeftModel.from_pretrained(model, folder, is_trainable=trainable).eval()


def weights(module):
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def owner(name):
    """Whose weight it is, by its name in an ActorCritic: a role's, or the base's."""
    found = {CRITIC, REWARD, REFERENCE, POLICY} & set(name.split("."))
    return found.pop() if found else "base"


def close(actual, expected, atol=1e-5):
    torch.testing.assert_close(actual, expected, atol=atol, rtol=1e-5)


# what each role reads


@torch.no_grad()
def test_every_role_is_what_peft_loads_from_its_folder(case):
    folder, dials = case
    actor_critic = four_roles(folder, dials)
    scores = stock_classifier(folder / "reward", folder / "base")(input_ids=IDS).logits[:, 0] - SHIFT
    assert (scores[0] - scores[1]).abs() > 0.1
    close(adapter_reward_scores(actor_critic, IDS, MASK), scores)
    close(actor_critic.adapter_outputs(actor_critic.critic, IDS, MASK)[:, -1], scores)  # before training: what is paid
    values = actor_critic(IDS, MASK, 4)[2]
    shorter = stock_classifier(folder / "reward", folder / "base")(input_ids=IDS[:, :4]).logits[:, 0] - SHIFT
    close(values[:, 1], shorter)  # the state before the second of four tokens is the text of four
    logits = stock_language_model(folder / "sft")(input_ids=IDS).logits
    close(actor_critic.policy(input_ids=IDS).logits, logits)
    expected = logits[:, 2:-1].clone()
    expected[..., PAD] = -math.inf
    expected = (expected / SAMPLING.temperature).log_softmax(-1).gather(2, IDS[:, 3:, None]).squeeze(2)
    close(actor_critic(IDS, MASK, 4, as_adapter=REFERENCE)[0], expected)
    assert torch.equal(actor_critic(IDS, MASK, 4)[0], actor_critic(IDS, MASK, 4, as_adapter=REFERENCE)[0])


@torch.no_grad()
def test_the_score_is_read_at_the_last_real_token_of_a_padded_row(roles, folder):
    stock = stock_classifier(folder / "reward", folder / "base")
    rows = PADDED[:1, 2:7], PADDED[1:]
    expected = torch.cat([stock(input_ids=ids).logits[:, 0] - SHIFT for ids in rows])
    close(adapter_reward_scores(roles, PADDED, PADDED != PAD), expected)


@torch.no_grad()
def test_a_role_ends_where_it_is_left_and_changes_no_trainability(roles, folder):
    trainable = {name for name, p in roles.named_parameters() if p.requires_grad}
    assert {owner(name) for name in trainable} == {POLICY, CRITIC}
    assert {owner(name) for name, _ in roles.named_parameters()} == {"base", POLICY, REFERENCE, CRITIC, REWARD}
    before = roles.policy(input_ids=IDS).logits
    base = AutoModelForCausalLM.from_pretrained(folder / "base", attn_implementation=ATTN_IMPLEMENTATION).eval()
    seen = []
    for name in (None, REFERENCE, REWARD, CRITIC, POLICY):
        with use_adapter(roles.policy, name):
            assert {name for name, p in roles.named_parameters() if p.requires_grad} == trainable
            seen.append(roles.policy(input_ids=IDS).logits)
        with pytest.raises(KeyError), use_adapter(roles.policy, name):
            raise KeyError
        assert torch.equal(roles.policy(input_ids=IDS).logits, before)
    assert torch.equal(seen[0], base(input_ids=IDS).logits)
    assert torch.equal(seen[-1], before)
    assert all((a - b).abs().max() > 1e-2 for i, a in enumerate(seen) for b in seen[:i])
    assert {name for name, p in roles.named_parameters() if p.requires_grad} == trainable


def test_layers_that_the_policys_adapter_does_not_have_read_nothing_of_another(parents, saved, tokenizer, tmp_path):
    """A policy on the query alone, a reward model on every linear layer."""
    folder = parents("llama", LORA)
    narrow = dataclasses.replace(LORA, target_modules="q_proj")
    policy = disturbed(load_policy(saved["llama"], narrow), 4)
    with torch.no_grad():
        before = policy(input_ids=IDS).logits
        add_reward_model(folder / "reward", policy)
        assert torch.equal(policy(input_ids=IDS).logits, before)
    assert len(adapter_layers(policy)) > 2


def test_an_adapter_from_elsewhere_becomes_a_role_without_dropout(parents, tmp_path):
    folder = shutil.copytree(parents("llama", LORA) / "reward", tmp_path / "reward")
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"lora_dropout": 0.5}))
    policy = load_policy(parents("llama", LORA) / "base", LORA)
    head = add_reward_model(folder, policy)
    actor_critic = ActorCritic(policy, setup.add_critic("reward", policy, head, PAD), 0.7, PAD, head).train()
    with torch.no_grad():
        assert torch.equal(actor_critic(IDS, MASK, 4)[2], actor_critic(IDS, MASK, 4)[2])


# gradients


def gradients(actor_critic, policy_weight, value_weight, train=False):
    actor_critic.zero_grad()
    actor_critic.train(train)
    logprobs, entropies, values = actor_critic(IDS, MASK, 4)
    loss = policy_weight * (logprobs.sum() + 0.3 * entropies.sum()) + value_weight * values.square().sum()
    loss.backward()
    actor_critic.eval()
    return {name: p.grad.clone() for name, p in actor_critic.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_each_loss_reaches_its_own_adapter_and_no_other(checkpointing, roles):
    if checkpointing:
        roles.checkpoint_activations()
    both = gradients(roles, 1, 1, train=checkpointing)
    assert {owner(name) for name in both} == {POLICY, CRITIC}
    for name, gradient in both.items():
        assert gradient.abs().max() > 1e-6, name  # every matrix, B and A, and the head
    for mine, other, factors in ((POLICY, CRITIC, (1, 0)), (CRITIC, POLICY, (0, 1))):
        alone = gradients(roles, *factors, train=checkpointing)
        assert all(not gradient.any() for name, gradient in alone.items() if owner(name) == other)
        for name in (name for name in both if owner(name) == mine):
            close(alone[name], both[name], 1e-5 * max(1, both[name].abs().max().item()))


def test_activations_computed_again_have_the_same_gradient_to_the_bit(roles):
    plain = gradients(roles, 1, 1)
    layers = []
    roles.checkpoint_activations()
    layer = next(m for name, m in roles.policy.named_modules() if name.endswith(("h.0", "layers.0")))
    attention = next(m for name, m in layer.named_modules() if name.endswith("attn"))
    attention.register_forward_hook(lambda *_: layers.append(1))
    again = gradients(roles, 1, 1, train=True)
    assert len(layers) == 4  # policy and critic, each forward and again
    assert plain.keys() == again.keys()
    assert all(torch.equal(plain[name], again[name]) for name in plain)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_models_of_their_own(checkpointing, case, roles, tmp_path, tokenizer):
    """Policy and critic saved, loaded by PEFT, each alone on a base of its own, and put through the same loss."""
    folder, _ = case
    progress.save_actor_critic(roles, tokenizer, tmp_path)
    if checkpointing:
        roles.checkpoint_activations()
    found = gradients(roles, 1, 1, train=checkpointing)
    critic = stock_classifier(tmp_path / "critic", folder / "base", trainable=True)
    shift = json.loads((tmp_path / "critic/config.json").read_text())["score_shift"]
    hidden = unwrap_peft(critic).base_model(input_ids=IDS).last_hidden_state
    (unwrap_peft(critic).score(hidden)[:, 2:-1, 0] - shift).square().sum().backward()
    base = AutoModelForCausalLM.from_pretrained(folder / "base", attn_implementation=ATTN_IMPLEMENTATION)
    policy = PeftModel.from_pretrained(base, tmp_path, is_trainable=True).eval()
    logits = policy(input_ids=IDS).logits[:, 2:-1].clone()
    logits[..., PAD] = -1e30
    log_p = (logits / SAMPLING.temperature).log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum()
    (log_p.gather(2, IDS[:, 3:, None]).sum() + 0.3 * entropy).backward()
    compared = 0
    for model, name in ((critic, CRITIC), (policy, POLICY)):
        for key, parameter in model.named_parameters():
            if parameter.grad is not None and "score" not in key:
                ours = found[f"policy.{key.replace('.default', f'.{name}')}"]
                close(ours, parameter.grad, 1e-4 * max(1, parameter.grad.abs().max().item()))
                compared += 1
    assert compared == sum("policy" in name.split(".") for name in found)
    head = unwrap_peft(critic).score.modules_to_save[POLICY].weight.grad
    close(found["critic.weight"], head, 1e-4 * max(1, head.abs().max().item()))


def test_the_critic_is_computed_again_after_the_policys_backward_and_keeps_nothing_till_then(roles):
    """What makes the peak one trunk's: else the activations of both would be there at once."""
    kept = []

    def keep(tensor):
        kept[-1] += tensor.numel()
        return tensor

    for run in (lambda: roles(IDS, MASK, 4), lambda: roles.policy(input_ids=IDS, logits_to_keep=5)):
        kept.append(0)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            run()
    assert kept[0] < 1.2 * kept[1]
    first = next(p for name, p in roles.named_parameters() if owner(name) == POLICY and p.requires_grad)
    was_done = []
    roles.zero_grad()
    logprobs, _, values = roles(IDS, MASK, 4)
    unwrap_peft(roles.policy).base_model.register_forward_pre_hook(lambda *_: was_done.append(first.grad is not None))
    (logprobs.sum() + values.sum()).backward()
    assert was_done == [True]


# training


@pytest.fixture
def accelerator():
    return Accelerator(cpu=True)


def experience_of(actor_critic, tokenizer):
    torch.manual_seed(1)
    rollout = generate(actor_critic.policy, tokenizer, PROMPTS, SAMPLING)
    reference = setup.reference_forward(actor_critic, None, SAMPLING.temperature, PAD)
    score = setup.reward_score(actor_critic, actor_critic.reward, torch.device("cpu"))
    return to_experience(rollout, actor_critic, reference, score, CONFIG, identity)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("sft", ["sft", "base"])
def test_training_moves_policy_and_critic_and_nothing_else(sft, checkpointing, case, tokenizer, accelerator):
    """From an SFT adapter (the reference is a role) and from a full SFT (it is the base)."""
    actor_critic = four_roles(*case, sft=sft)
    config = dataclasses.replace(CONFIG, gradient_checkpointing=checkpointing)
    if checkpointing:
        actor_critic.checkpoint_activations()
    made = experience_of(actor_critic, tokenizer)
    assert not made.kl.any()  # the first rollout's policy is its reference, to the bit
    difference = (made.sampled_logprobs - made.old_logprobs)[made.response_mask]
    assert difference.abs().max() < 1e-4  # so `generate` reads the policy's role
    frozen = ("reference", REWARD)
    with torch.no_grad():
        reference = actor_critic(IDS, MASK, 4, as_adapter=REFERENCE)[0]
        scores = adapter_reward_scores(actor_critic, IDS, MASK)
    before = weights(actor_critic)
    optimizer, _ = setup.make_optimizer(actor_critic, config)
    rates = {group["lr"]: {id(p) for p in group["params"]} for group in optimizer.param_groups}
    for name, parameter in actor_critic.named_parameters():
        assert (id(parameter) in rates[3e-2]) == (owner(name) == POLICY and parameter.requires_grad)
        assert (id(parameter) in rates[2e-2]) == (owner(name) == CRITIC)
    metrics, skipped = ppo.update(actor_critic, optimizer, made, config, accelerator, True)
    assert skipped == 0
    assert metrics["grad_norm"] > 1e-3
    moved = {name for name, p in actor_critic.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name, p in actor_critic.named_parameters() if p.requires_grad}
    assert {owner(name) for name in moved} == {POLICY, CRITIC}
    assert not {name for name in moved if owner(name) in frozen}
    with torch.no_grad():
        assert torch.equal(actor_critic(IDS, MASK, 4, as_adapter=REFERENCE)[0], reference)
        assert torch.equal(adapter_reward_scores(actor_critic, IDS, MASK), scores)
        assert not torch.equal(actor_critic(IDS, MASK, 4)[0], reference)


def test_a_critic_from_sft_is_a_copy_of_its_adapter_or_a_fresh_one_under_zeros(case):
    folder, dials = case
    for sft in ("sft", "base"):
        actor_critic = four_roles(folder, dials, critic="sft", sft=sft)
        stock = stock_language_model(folder / "sft") if sft == "sft" else load_language_model(folder / "base").eval()
        with torch.no_grad():
            assert not actor_critic(IDS, MASK, 4)[2].any()
            with use_adapter(actor_critic.policy, CRITIC):
                states = unwrap_peft(actor_critic.policy).base_model(input_ids=IDS).last_hidden_state
            own = unwrap_peft(stock) if sft == "sft" else stock
            close(states, own.base_model(input_ids=IDS).last_hidden_state)
        assert {owner(name) for name, p in actor_critic.named_parameters() if p.requires_grad} == {POLICY, CRITIC}


def test_dora_is_a_role_too(saved, tokenizer, tmp_path):
    dials = dataclasses.replace(LORA, use_dora=True)
    policy = disturbed(wrap_with_adapter(load_language_model(saved["llama"]), dials), 1)
    assert any("lora_magnitude_vector" in name for name, p in policy.named_parameters() if p.requires_grad)
    with torch.no_grad():
        before = policy(input_ids=IDS).logits
    save_policy(policy, tokenizer, tmp_path / "sft")
    again = load_policy(tmp_path / "sft", dials).eval()
    with torch.no_grad():
        close(again(input_ids=IDS).logits, before)
        with use_adapter(again, REFERENCE):
            close(again(input_ids=IDS).logits, before)
        base = AutoModelForCausalLM.from_pretrained(saved["llama"], attn_implementation=ATTN_IMPLEMENTATION).eval()
        assert (base(input_ids=IDS).logits - before).abs().max() > 0.1
        close(PeftModel.from_pretrained(base, tmp_path / "sft").eval()(input_ids=IDS).logits, before)
        alone = AutoModelForCausalLM.from_pretrained(tmp_path / "sft", attn_implementation=ATTN_IMPLEMENTATION).eval()
        close(alone(input_ids=IDS).logits, before)
        close(load_language_model(tmp_path / "sft").eval()(input_ids=IDS).logits, before, 5e-5)


# what is written


@torch.no_grad()
def test_policy_and_critic_load_to_what_training_saw(roles, folder, tokenizer, tmp_path):
    logits = roles.policy(input_ids=IDS).logits
    values = roles.adapter_outputs(roles.critic, IDS, MASK)
    progress.save_actor_critic(roles, tokenizer, tmp_path)
    assert torch.equal(roles.policy(input_ids=IDS).logits, logits)
    shutil.copytree(folder / "base", tmp_path / "base")
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"critic", "base"}
    for file in ("adapter_model.safetensors", "model.safetensors"):
        assert {owner(name) for name in load_file(tmp_path / file)} == {"base"}  # no role's name but the folder's
    kinds = [json.loads((tmp_path / f / "adapter_config.json").read_text())["task_type"] for f in (".", "critic")]
    assert kinds == ["CAUSAL_LM", "SEQ_CLS"]
    base = AutoModelForCausalLM.from_pretrained(folder / "base", attn_implementation=ATTN_IMPLEMENTATION)
    close(PeftModel.from_pretrained(base, tmp_path).eval()(input_ids=IDS).logits, logits)
    alone = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=ATTN_IMPLEMENTATION).eval()
    close(alone(input_ids=IDS).logits, logits)
    close(load_language_model(tmp_path).eval()(input_ids=IDS).logits, logits, 5e-5)
    critic, info = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "critic", attn_implementation=ATTN_IMPLEMENTATION, output_loading_info=True
    )
    assert not any(info.values())
    shift = critic.config.score_shift
    assert abs(shift - SHIFT) > 1e-3  # it has been trained
    for stock in (critic.eval(), stock_classifier(tmp_path / "critic", folder / "base")):
        for length in (3, 5, 7):
            close(stock(input_ids=IDS[:, :length]).logits[:, 0] - shift, values[:, length - 1])
    close(Critic(load_reward_model(tmp_path / "critic"))(IDS, MASK), values, 5e-5)


@torch.no_grad()
def test_a_reward_adapter_loads_as_one_model_too(folder):
    stock = stock_classifier(folder / "reward", folder / "base")(input_ids=IDS).logits[:, 0]
    alone = AutoModelForSequenceClassification.from_pretrained(
        folder / "reward", attn_implementation=ATTN_IMPLEMENTATION
    ).eval()
    close(alone(input_ids=IDS).logits[:, 0], stock)
    merged = load_reward_model(folder / "reward").eval()
    assert not adapter_layers(merged)
    assert all(parameter.requires_grad for parameter in merged.parameters())
    close(reward_model_scores(merged, IDS, MASK), stock - SHIFT)


def test_a_reward_model_that_would_load_otherwise_is_never_finished(parents, tokenizer, saved, tmp_path, monkeypatch):
    model = wrap_with_adapter(new_reward_model(saved["llama"], tokenizer), LORA, TaskType.SEQ_CLS)
    whole = reward.save_with_base

    def without_the_trained_head(model, folder):
        whole(model, folder)
        file = folder / "adapter_model.safetensors"
        kept = load_file(file)
        kept["base_model.model.score.weight"] += 0.1
        save_file(kept, file, metadata={"format": "pt"})

    monkeypatch.setattr(reward, "save_with_base", without_the_trained_head)
    with pytest.raises(ModelError, match="scores texts otherwise than what was trained, by up to"):
        reward.save_reward_model(disturbed(model, 2), tokenizer, IDS.tolist(), tmp_path)


# reward training


def test_a_step_of_reward_training_moves_adapter_and_head_alone(case, tokenizer, tmp_path):
    folder, dials = case
    model = wrap_with_adapter(new_reward_model(folder / "base", tokenizer), dials, TaskType.SEQ_CLS)
    pairs = [{"prompt": "", "chosen": "the cat", "rejected": "a dog", "margin": 1.0}] * 4
    rows, _ = preference_rows(tokenizer, pairs, 99, "error")
    optim = Optim(learning_rate=1e-3, weight_decay=0.5, warmup_steps=0.0, batch_size=4, micro_batch=4)
    config = Reward(run=Run(precision="fp32", report_to="none"), optim=optim, adapter=dials, head_learning_rate=1e-2)
    names = {id(p): name for name, p in model.named_parameters()}
    before = weights(model)
    trainer = reward.new_trainer(model, tokenizer, rows, config, tmp_path)
    trainer.train()
    groups = {
        (group["initial_lr"], group["weight_decay"]): {names[id(p)] for p in group["params"]}
        for group in trainer.optimizer.param_groups
    }
    assert groups[1e-2, 0.5] == {"base_model.model.score.modules_to_save.default.weight"}
    rest = groups[1e-3, 0.0 if dials.adapter == "ia3" else 0.5]  # decay would pull IA3's vectors to 0
    assert len(groups) == 2
    assert rest == {name for name in before if "lora_" in name or "ia3_" in name}
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved - rest == groups[1e-2, 0.5]
    assert moved & rest


# the stage


def stage_config(folder, tmp_path, dials, **changes):
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS if prompt))
    run = Run(recipe="tiny", runs=str(tmp_path), precision="fp32", report_to="none")
    given = {
        "run": run, "adapter": dials, "sft": str(folder / "sft"), "reward": str(folder / "reward"), "rollouts": 3,
        "rollout_batch": 4, "critic_warmup": 1, "eval_steps": 2, "eval_prompts": 4, "train_file": str(file),
        "validation_file": str(file), "keep": "last", "collapse_alarm": False,
    }  # fmt: skip
    return dataclasses.replace(CONFIG, **given | changes)


@pytest.mark.parametrize("sft", ["sft", "base"])
def test_the_stage_with_four_roles(sft, parents, tmp_path):
    folder = parents("llama", LORA)
    final = ppo.train(stage_config(folder, tmp_path, LORA, sft=str(folder / sft)))
    lines = [json.loads(line) for line in (final.parent / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in lines if "ratio" in row]
    assert rows[0]["kl"] == 0
    assert rows[1]["kl"] == 0  # the critic alone was trained
    assert rows[2]["kl"] != 0
    assert rows[0]["approx_kl"] < 1e-10
    stock = stock_classifier(folder / "reward", folder / "base")
    sample = json.loads((final.parent / "samples.jsonl").read_text().splitlines()[0])
    assert math.isfinite(sample["score"])
    is_copy = sft == "sft"
    found = read_done(final)["metrics"]["roles"]
    assert found["policy"] == ("a copy of SFT's adapter" if is_copy else "a new adapter on SFT")
    assert found["reference"] == ("SFT's adapter" if is_copy else "the base")
    assert found["critic"] == found["reward"] == "an adapter on the base"
    assert found["base"] == hash_trunk(load_language_model(folder / "base")) == hash_trunk(unwrap_peft(stock))
    reloaded = load_policy(final, LORA)
    assert {REFERENCE} == set(reloaded.peft_config) - {POLICY}
    assert load_reward_model(final / "critic").config.score_shift != SHIFT


def test_a_full_reward_model_stands_outside_as_before(parents, saved, tokenizer, tmp_path):
    folder = parents("llama", LORA)
    model = new_reward_model(saved["llama"], tokenizer)
    reward.save_reward_model(model.eval(), tokenizer, IDS.tolist(), tmp_path / "full")
    policy = load_policy(folder / "sft", LORA)
    own = add_reward_model(tmp_path / "full", policy)
    assert not isinstance(own, ValueHead)
    assert isinstance(setup.add_critic("reward", policy, own, PAD), Critic)
    assert set(policy.peft_config) == {POLICY, REFERENCE}
    full = load_policy(folder / "sft", Adapter())
    assert not adapter_layers(full)
    merged = add_reward_model(folder / "reward", full)
    assert not adapter_layers(merged)
    assert not any(parameter.requires_grad for parameter in merged.parameters())


# refusals


def test_lora_and_ia3_do_not_share_a_base(parents):
    policy = load_policy(parents("llama", LORA) / "base", LORA)
    with pytest.raises(ModelError, match=r"reward: it is ia3 and the policy lora: adapters on one base have one type"):
        add_reward_model(parents("llama", IA3) / "reward", policy)


def test_a_reward_adapter_on_another_base_is_refused(parents, make_model, tokenizer, tmp_path):
    save_policy(make_model("llama", seed=9), tokenizer, tmp_path / "other")
    policy = load_policy(tmp_path / "other", LORA)
    folder = parents("llama", LORA)
    with pytest.raises(ModelError, match="train the reward model with --base") as raised:
        add_reward_model(folder / "reward", policy)
    for model in (load_language_model(folder / "base"), load_language_model(tmp_path / "other")):
        assert f"({hash_trunk(model)})" in str(raised.value)
    assert set(policy.peft_config) == {POLICY}


def test_a_fingerprint_is_of_the_trunk_alone_and_of_every_bit_of_it(parents):
    folder = parents("gpt2", LORA)
    model = load_language_model(folder / "base")
    own = hash_trunk(model)
    assert own == hash_trunk(unwrap_peft(load_policy(folder / "sft", LORA)))
    assert own != hash_trunk(load_language_model(folder / "sft"))  # merged
    with torch.no_grad():
        next(model.base_model.parameters()).flatten()[3] *= 1 + 2**-23
    assert own != hash_trunk(model)
    assert own != hash_trunk(load_language_model(parents("llama", LORA) / "base"))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"lora_r": 4}, "its lora_r is 3, not 4: say --lora_r 3"),
        ({"lora_alpha": 9.0}, "its lora_alpha is 8, not 9"),
        ({"use_rslora": True}, "its use_rslora is False, not True"),
        ({"use_dora": True}, "its use_dora is False, not True"),
        ({"adapter": "ia3"}, "its adapter is lora, not ia3"),
        ({"target_modules": "q_proj"}, r"its target_modules are .*q_proj.*, not q_proj: leave target_modules empty"),
    ],
)
def test_dials_that_contradict_sfts_adapter_are_refused(changes, says, parents):
    with pytest.raises(ModelError, match=f"sft: it is an adapter, which PPO trains further, and {says}"):
        load_policy(parents("llama", LORA) / "sft", dataclasses.replace(LORA, **changes))


@pytest.mark.parametrize("fault", ["missing", "unused"])
def test_a_head_that_is_missing_or_unused_is_an_error(fault, parents, tmp_path):
    folder = shutil.copytree(parents("gpt2", IA3) / "reward", tmp_path / "reward")
    kept = load_file(folder / "adapter_model.safetensors")
    head = kept.pop("base_model.model.score.weight")
    name = "score.modules_to_save.default.weight" if fault == "missing" else "v_head.weight"
    if fault == "unused":
        kept |= {"base_model.model.score.weight": head, "base_model.model.v_head.weight": head.clone()}
    save_file(kept, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    for load in (load_reward_model, partial(add_reward_model, policy=load_policy(parents("gpt2", IA3) / "base", IA3))):
        with pytest.raises(ModelError, match=f"missing or unused weights {name}"):
            load(folder)


def test_a_classifiers_adapter_is_no_policy(parents):
    for load in (load_language_model, partial(load_policy, dials=LORA)):
        with pytest.raises(ModelError, match=r"it has a head that would not be used: score\.weight"):
            load(parents("llama", LORA) / "reward")


@pytest.mark.parametrize("kind", [SFT, Reward, PPO])
def test_dora_is_a_kind_of_lora(kind, tmp_path, capsys):
    (tmp_path / "empty.yaml").write_text("recipe: x\n")
    with pytest.raises(SystemExit):
        parse(kind, ["--config", str(tmp_path / "empty.yaml"), "--use_dora", "true", "--adapter", "ia3"])
    assert "use_dora: it is a kind of LoRA, and adapter is ia3" in capsys.readouterr().err
    with pytest.raises(ConfigError):
        Adapter(use_dora=True).check()
    assert copy.copy(Adapter(adapter="lora", use_dora=True)).check() is None


def test_a_base_in_4_bits_is_refused_where_it_cannot_be(saved, tokenizer):
    """There is no GPU here; on one whose kernels run on CPUs the stages are in docs/log.md."""
    dials = dataclasses.replace(LORA, load_in_4bit=True)
    makes = (partial(load_policy, dials=dials), partial(load_language_model, in_4bit=True))
    for make in (*makes, partial(new_reward_model, tokenizer=tokenizer, in_4bit=True)):
        with pytest.raises(ModelError, match="load_in_4bit: it needs a CUDA GPU and the package bitsandbytes"):
            make(saved["llama"])
    with pytest.raises(ConfigError, match="weights of 4 bits cannot be trained; say --adapter lora or ia3"):
        Adapter(load_in_4bit=True).check()
    with pytest.raises(ConfigError, match="critic: a head is saved with the policy's adapter merged"):
        dataclasses.replace(CONFIG, adapter=dials, critic="head").check()
