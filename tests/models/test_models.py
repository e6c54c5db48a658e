import copy
import json
import math
import shutil

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from pipeline.config.dials import Adapter
from pipeline.config.stages import Pretrain
from pipeline.data.tokenize import decode
from pipeline.data.tokenizer import (
    PAD,
    ModelError,
    encode_plain,
    hash_tokenizer,
    load_shared_tokenizer,
    load_tokenizer,
    train_tokenizer,
)
from pipeline.models import forward
from pipeline.models.actor_critic import ActorCritic
from pipeline.models.forward import head_weight, response_logprobs
from pipeline.models.fresh_adapter import wrap_with_adapter
from pipeline.models.heads import Critic, ValueHead, load_reward_model, new_reward_model
from pipeline.models.loading import (
    ATTN_IMPLEMENTATION,
    check_model,
    disable_dropout_,
    freeze,
    load_language_model,
    merge_adapter,
    new_language_model,
    unwrap_peft,
)
from pipeline.models.multi_adapter import use_adapter
from pipeline.models.saving import save_policy
from pipeline.rl.rewards import reward_model_scores

KINDS = ("gpt2", "llama")
ADAPTERS = (Adapter(adapter="lora", lora_r=3, lora_alpha=8), Adapter(adapter="ia3"))
IDS = torch.tensor([[1, 6, 4, 9, 12, 5, 2], [1, 8, 8, 3, 7, 11, 10]])


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(input_ids=ids).logits


def close(actual, expected, atol):
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)


def disturbed(policy, seed=1):
    """The policy with every trainable weight moved, so that an adapter does something."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return policy.eval()


def adapter_layers(model):
    return [name for name, layer in model.named_modules() if isinstance(layer, BaseTunerLayer)]


# tokenizers

TEXTS = ["The cat sat.", "A dog, naïve: 日本!", " two  spaces\nand\ta line\n", "the end"]


@pytest.mark.parametrize("kind", ["bpe", "char", "word"])
def test_a_tokenizer_has_its_own_special_tokens_and_gives_the_text_back(kind, tmp_path):
    train_tokenizer(kind, TEXTS, 400).save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    special = [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id]
    assert sorted(special) == [0, 1, 2]
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id
        assert not set(ids[1:]) & set(special)
        assert decode(tokenizer, ids) == text
    assert tokenizer("")["input_ids"] == [tokenizer.bos_token_id]


def test_pieces_are_bytes_characters_or_words():
    bpe, char, word = (train_tokenizer(kind, TEXTS, 400) for kind in ("bpe", "char", "word"))
    assert word.convert_ids_to_tokens(word("The cat sat.")["input_ids"]) == ["<bos>", "The", " cat", " sat."]
    assert len(char("The cat")["input_ids"]) == 1 + 7
    assert decode(bpe, bpe("Ωmega 🙂")["input_ids"]) == "Ωmega 🙂"
    assert char("Ω")["input_ids"] == [char.bos_token_id, char.unk_token_id]
    assert len(train_tokenizer("word", TEXTS, 9)) == 9


def test_a_tokenizer_that_cannot_end_a_response_is_refused(tokenizer, tmp_path):
    PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, pad_token=PAD).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="has no EOS token"):
        load_tokenizer(tmp_path)


def words(tmp_path, special, unknown=None, **tokens):
    """A saved tokenizer of words with these special tokens in its vocabulary."""
    backend = Tokenizer(WordLevel({name: i for i, name in enumerate([*special, "a", "b"])}, unk_token=unknown or "a"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(special)
    PreTrainedTokenizerFast(tokenizer_object=backend, **tokens).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("given", [{}, {"pad_token": "<eos>"}], ids=["no pad", "pad is EOS"])
@pytest.mark.parametrize(
    ("special", "taken"),
    [
        (["<tool>", "<unused0>", "<|reserved_3|>", "<pad>"], "<pad>"),
        (["<tool>", "<unk>", "<unused0>", "<|reserved_3|>"], "<|reserved_3|>"),
        (["<tool>", "<unk>"], "<unk>"),
        (["<tool>"], "<tool>"),
    ],
)
def test_a_token_to_spare_becomes_the_padding_and_nothing_grows(given, special, taken, tmp_path, capsys):
    tokenizer = load_tokenizer(words(tmp_path, [*special, "<eos>"], eos_token="<eos>", **given))
    assert (tokenizer.pad_token, len(tokenizer)) == (taken, len(special) + 3)
    assert f"'{taken}' is taken" in capsys.readouterr().out


def test_a_token_that_text_or_template_uses_is_not_spare(tmp_path, capsys):
    used = ["<bos>", "<unk>", "<|user|>"]
    folder = words(tmp_path, [*used, "<eos>"], "<unk>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "<|user|>{{ messages[0].content }}{{ eos_token }}"
    tokenizer.save_pretrained(folder)
    tokenizer = load_tokenizer(folder)
    assert tokenizer.pad_token == "b"  # the last entry: in a text it stays what it is
    assert encode_plain(tokenizer, ["a b"]) == [[tokenizer.convert_tokens_to_ids("a"), tokenizer.pad_token_id]]
    assert "'b' is taken, its last entry, which no response will have" in capsys.readouterr().out


def test_tokenizers_must_agree_between_stages(tmp_path):
    names = {"sft": "abc", "reward": "abd", "base": "abc"}
    for name, letters in names.items():
        train_tokenizer("char", [letters], 40).save_pretrained(tmp_path / name)
    paths = {name: tmp_path / name for name in names}
    assert load_shared_tokenizer({name: paths[name] for name in ("sft", "base")}).get_vocab().keys() > {"a", "b", "c"}
    with pytest.raises(ModelError, match=r"tokenizers differ: sft [0-9a-f]{12} .*, reward [0-9a-f]{12} ") as raised:
        load_shared_tokenizer(paths)
    sft, reward, base = (hash_tokenizer(load_tokenizer(paths[name])) for name in ("sft", "reward", "base"))
    assert sft == base != reward
    assert {sft, reward} <= set(str(raised.value).replace(",", "").split())


def test_a_model_too_small_for_its_tokenizer_or_rows_is_refused(make_model, tokenizer):
    larger = copy.deepcopy(tokenizer)
    model = make_model("llama")
    check_model(model, tokenizer, 64, "here")
    with pytest.raises(ModelError, match="here: its context is 64 tokens, rows may have 65"):
        check_model(model, tokenizer, 65, "here")
    larger.add_tokens(["more"])
    with pytest.raises(ModelError, match=rf"has ids up to {len(tokenizer)}, the model has {len(tokenizer)} embeddings"):
        check_model(model, larger, 64, "here")


@pytest.mark.parametrize("load", [load_tokenizer, load_language_model, load_reward_model])
@pytest.mark.parametrize("breakage", ["nothing there", "not a config", "cut weights"])
def test_a_directory_that_cannot_be_read_is_named(load, breakage, saved, tmp_path):
    folder = tmp_path / "model"
    if breakage == "nothing there":
        folder.mkdir()
    else:
        shutil.copytree(saved["llama"], folder)
        name = "config.json" if breakage == "not a config" else "model.safetensors"
        (folder / name).write_bytes((folder / name).read_bytes()[:100])
        (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match=r"can be loaded from it: .+") as raised:
        load(folder)
    assert str(folder) in str(raised.value)
    assert len(str(raised.value)) < 500


# language models, adapters, saving


def test_a_new_language_model_has_the_dials_size_and_the_tokenizers_ids(tokenizer):
    model = new_language_model(
        Pretrain(hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=2, context=50),
        tokenizer,
    )
    d, m, v = 24, 40, len(tokenizer)
    assert model.num_parameters() == v * d + 3 * (4 * d * d + 3 * d * m + 2 * d) + d  # tied: the embedding once
    assert model.config.max_position_embeddings == 50
    assert (model.config.pad_token_id, model.config.bos_token_id, model.config.eos_token_id) == (0, 1, 2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("adapter", [Adapter(), *ADAPTERS], ids=lambda a: a.adapter)
def test_a_saved_policy_loads_anywhere(kind, adapter, make_model, tokenizer, saved, tmp_path, monkeypatch):
    def stock(name):
        return AutoModelForCausalLM.from_pretrained(tmp_path / name, attn_implementation=ATTN_IMPLEMENTATION).eval()

    shutil.copytree(saved[kind], tmp_path / "base")
    policy = load_language_model(tmp_path / "base")
    if adapter.adapter != "none":
        policy = wrap_with_adapter(policy, adapter)
    policy = disturbed(policy)
    before = logits(policy)
    assert (before - logits(make_model(kind))).abs().max() > 0.1
    save_policy(policy, tokenizer, tmp_path / "made")
    assert torch.equal(logits(policy), before)
    shutil.rmtree(tmp_path / "base")
    (tmp_path / "made").rename(tmp_path / "moved")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")

    if adapter.adapter != "none":
        named = json.loads((tmp_path / "moved" / "adapter_config.json").read_text())
        assert named["base_model_name_or_path"] is None  # any path would be wrong after a move
    close(logits(stock("moved")), before, 1e-6)
    assert bool(adapter_layers(stock("moved"))) == (adapter.adapter != "none")
    merged = load_language_model(tmp_path / "moved").eval()
    close(logits(merged), before, 1e-5)
    assert adapter_layers(merged) == []
    assert all(parameter.requires_grad for parameter in merged.parameters())
    merged.save_pretrained(tmp_path / "merged")
    assert not list((tmp_path / "merged").glob("adapter*"))
    close(logits(stock("merged")), before, 1e-5)
    again = disturbed(wrap_with_adapter(merged, ADAPTERS[0]))
    expected = logits(again)
    save_policy(again, tokenizer, tmp_path / "again")
    close(logits(stock("again")), expected, 1e-5)
    assert load_tokenizer(tmp_path / "moved")("the cat")["input_ids"] == tokenizer("the cat")["input_ids"]
    generation = GenerationConfig.from_pretrained(tmp_path / "moved")
    assert (generation.do_sample, generation.top_k, generation.top_p, generation.temperature) == (True, 0, 1.0, 1.0)
    assert (generation.eos_token_id, generation.pad_token_id, generation.suppress_tokens) == (2, 0, [0])


def test_a_language_model_without_all_its_weights_is_refused(saved, tmp_path):
    shutil.copytree(saved["llama"], tmp_path, dirs_exist_ok=True)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj\.weight"):
        load_language_model(tmp_path)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_merged_weights_are_base_plus_scaled_product(use_rslora, make_model, tokenizer, saved, tmp_path):
    dials = Adapter(adapter="lora", lora_r=4, lora_alpha=6, use_rslora=use_rslora, target_modules="q_proj,down_proj")
    policy = disturbed(wrap_with_adapter(load_language_model(saved["llama"]), dials))
    save_policy(policy, tokenizer, tmp_path)
    scale = 6 / math.sqrt(4) if use_rslora else 6 / 4
    weights = policy.state_dict()
    merged = load_language_model(tmp_path).state_dict()
    original = make_model("llama").state_dict()
    changed = {name for name in original if not torch.equal(merged[name], original[name])}
    names = {f"model.layers.{n}.{part}" for n in (0, 1) for part in ("self_attn.q_proj", "mlp.down_proj")}
    assert changed == {f"{name}.weight" for name in names}
    for name in names:
        a, b = (weights[f"base_model.model.{name}.lora_{x}.default.weight"].double() for x in "AB")
        close(merged[f"{name}.weight"].double(), original[f"{name}.weight"].double() + scale * b @ a, 1e-6)


@pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda a: a.adapter)
@pytest.mark.parametrize("kind", KINDS)
def test_merging_in_place_leaves_no_adapter(kind, adapter, make_model):
    policy = disturbed(wrap_with_adapter(make_model(kind), adapter))
    before = logits(policy)
    merged = merge_adapter(unwrap_peft(policy))
    assert adapter_layers(merged) == []
    assert not [name for name in merged.state_dict() if "lora" in name or "ia3" in name or "base_layer" in name]
    close(logits(merged), before, 1e-5)


@pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda a: a.adapter)
@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_role_is_the_base_bit_for_bit(kind, adapter, make_model):
    policy = wrap_with_adapter(make_model(kind), adapter)
    base = logits(make_model(kind))
    close(logits(policy), base, 0)  # a fresh adapter changes nothing
    trainable = {name for name, parameter in policy.named_parameters() if parameter.requires_grad}
    assert trainable
    assert all("lora_" in name or "ia3_" in name for name in trainable)
    optimizer = torch.optim.Adam([p for p in policy.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):  # LoRA's A has no gradient before B has moved
        policy(input_ids=IDS).logits.log_softmax(-1)[..., 3].sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = logits(policy)
    assert (moved - base).abs().max() > 0.1
    with use_adapter(policy, None):
        assert torch.equal(logits(policy), base)
        assert {name for name, parameter in policy.named_parameters() if parameter.requires_grad} == trainable
    assert torch.equal(logits(policy), moved)
    with pytest.raises(KeyError), use_adapter(policy, None):
        raise KeyError
    assert torch.equal(logits(policy), moved)
    assert {name for name, parameter in policy.named_parameters() if parameter.requires_grad} == trainable


@pytest.mark.parametrize("most", [1, 2 * 4 * 19, 10**9])
def test_log_probabilities_in_parts_are_those_of_the_whole(most, make_model, monkeypatch):
    """To the bit, gradients too (to rounding): of five rows, two at a time, and one by one."""
    model = make_model("llama")
    ids = torch.randint(3, 19, (5, 7), generator=torch.Generator().manual_seed(0))

    def found():
        model.zero_grad()
        outputs = response_logprobs(model, ids, torch.ones_like(ids).bool(), 4, 0.7, 0)
        (outputs[0].sum() + 0.3 * outputs[1].square().sum()).backward()
        return [*outputs, *(p.grad for p in model.parameters())]

    whole = found()
    monkeypatch.setattr(forward, "MOST_LOGITS", most)
    parts = found()
    assert all(torch.equal(a, b) for a, b in zip(parts[:2], whole[:2], strict=True))
    for part, expected in zip(parts[2:], whole[2:], strict=True):
        close(part, expected, 1e-5 * max(1, expected.abs().max().item()))


def test_an_unknown_adapter_is_refused(make_model):
    with pytest.raises(ModelError, match="lora or ia3, got prefix"):
        wrap_with_adapter(make_model("llama"), Adapter(adapter="prefix"))


@pytest.mark.parametrize("kind", KINDS)
def test_without_dropout_a_train_mode_forward_repeats_itself(kind, make_model, tokenizer, tmp_path):
    model = make_model(kind, dropout=0.3).train()
    assert not torch.equal(logits(model), logits(model))
    save_policy(model, tokenizer, tmp_path)
    quiet = disable_dropout_(model)
    assert torch.equal(logits(quiet), logits(quiet))
    torch.manual_seed(0)
    for loaded in (load_language_model(tmp_path).train(), new_reward_model(tmp_path, tokenizer).train()):
        assert torch.equal(logits(loaded), logits(loaded))


NOISY = {
    "bloom": {"hidden_dropout": 0.3, "attention_dropout": 0.3},
    "falcon": {"hidden_dropout": 0.3, "attention_dropout": 0.3},
    "gemma2": {"attention_dropout": 0.3},
    "gpt_neox": {"hidden_dropout": 0.3, "attention_dropout": 0.3},
    "gptj": {"resid_pdrop": 0.3, "embd_pdrop": 0.3, "attn_pdrop": 0.3, "rotary_dim": 4},
    "mistral": {"attention_dropout": 0.3},
    "mixtral": {"attention_dropout": 0.3, "router_jitter_noise": 0.3, "num_local_experts": 2},
    "opt": {"dropout": 0.3, "attention_dropout": 0.3, "activation_dropout": 0.3, "layerdrop": 0.5},
    "phi": {"resid_pdrop": 0.3, "embd_pdrop": 0.3, "attention_dropout": 0.3},
    "qwen2": {"attention_dropout": 0.3},
    "qwen3": {"attention_dropout": 0.3},
    "stablelm": {"hidden_dropout": 0.3, "attention_dropout": 0.3},
}
"""Configs with each rate that the architecture knows."""


@pytest.mark.parametrize("kind", NOISY)
def test_no_architecture_keeps_a_rate_of_dropout_or_a_noise(kind, tokenizer, tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    if kind in ("gemma2", "mistral", "mixtral", "phi", "qwen2", "qwen3", "stablelm"):
        sizes |= {"num_key_value_heads": 2, "intermediate_size": 24}
    if kind in ("gemma2", "qwen3"):
        sizes |= {"head_dim": 8}
    if kind == "opt":
        sizes |= {"ffn_dim": 24, "word_embed_proj_dim": 16}
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    config = AutoConfig.for_model(kind, vocab_size=len(tokenizer), **(sizes | ids | NOISY[kind]))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).train()
    assert not torch.equal(logits(model), logits(model)), "no noise to take away"
    save_policy(model, tokenizer, tmp_path)
    for quiet in (disable_dropout_(model), load_language_model(tmp_path).train()):
        assert torch.equal(logits(quiet), logits(quiet))


# reward models and critics


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_reward_model_is_the_trunk_with_a_fresh_head(kind, make_model, saved, tokenizer):
    torch.manual_seed(0)
    models = [new_reward_model(saved[kind], tokenizer) for _ in range(12)]
    trunk = make_model(kind).base_model
    with torch.no_grad():
        close(models[0].eval().base_model(IDS).last_hidden_state, trunk(IDS).last_hidden_state, 1e-6)
    weights = torch.cat([head_weight(model).flatten() for model in models])
    assert weights.std().item() == pytest.approx(17**-0.5, rel=4 / math.sqrt(2 * 12 * 16))
    assert abs(weights.mean().item()) < 4 * 17**-0.5 / math.sqrt(12 * 16)
    assert models[0].config.score_shift == 0
    assert models[0].config.pad_token_id == tokenizer.pad_token_id


def test_the_head_of_a_wide_reward_model_starts_small(tokenizer, tmp_path):
    sizes = {"hidden_size": 768, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    save_policy(LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes, **ids)), tokenizer, tmp_path)
    torch.manual_seed(0)
    weight = head_weight(new_reward_model(tmp_path, tokenizer))
    assert weight.std().item() == pytest.approx(0.03606, rel=4 / math.sqrt(2 * 768))


@pytest.mark.parametrize("kind", KINDS)
def test_a_loaded_reward_model_has_no_dropout(kind, make_model, tokenizer, tmp_path):
    save_policy(make_model(kind, dropout=0.3), tokenizer, tmp_path / "sft")
    new_reward_model(tmp_path / "sft", tokenizer).save_pretrained(tmp_path / "reward")
    loaded = load_reward_model(tmp_path / "reward").train()
    assert torch.equal(logits(loaded), logits(loaded))


def test_weights_are_float32_whatever_was_saved(make_model, tokenizer, tmp_path):
    save_policy(make_model("gpt2").bfloat16(), tokenizer, tmp_path)
    assert {p.dtype for p in load_language_model(tmp_path).parameters()} == {torch.float32}


def test_a_reward_model_on_an_adapter_starts_from_the_merged_weights(make_model, tokenizer, tmp_path):
    policy = disturbed(wrap_with_adapter(make_model("gpt2"), ADAPTERS[0]))
    save_policy(policy, tokenizer, tmp_path)
    reward_model = new_reward_model(tmp_path, tokenizer).eval()
    with torch.no_grad():
        expected = unwrap_peft(policy).base_model(IDS).last_hidden_state
        close(reward_model.base_model(IDS).last_hidden_state, expected, 1e-5)


def test_a_reward_model_without_its_head_or_shift_is_refused(reward_model, saved, tmp_path):
    reward_model.save_pretrained(tmp_path)
    assert load_reward_model(tmp_path).config.score_shift == 0.37
    with pytest.raises(ModelError, match=r"score\.weight"):
        load_reward_model(saved["gpt2"])
    config, weights = tmp_path / "config.json", tmp_path / "model.safetensors"
    whole = json.loads(config.read_text())
    config.write_text(json.dumps({name: value for name, value in whole.items() if name != "score_shift"}))
    with pytest.raises(ModelError, match="score_shift"):
        load_reward_model(tmp_path)
    config.write_text(json.dumps(whole))
    tensors = load_file(weights)
    save_file({**tensors, "extra.weight": torch.ones(1)}, weights, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"extra\.weight"):
        load_reward_model(tmp_path)
    del tensors["score.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"score\.weight"):
        load_reward_model(tmp_path)


def test_a_critic_starts_as_the_reward_model_and_is_its_own(reward_model, tmp_path):
    critic = Critic(reward_model)
    mask = torch.ones_like(IDS, dtype=torch.bool)
    values = critic(IDS, mask)
    close(values[:, -1], reward_model_scores(reward_model, IDS, mask), 1e-6)
    assert values.shape == IDS.shape
    assert all(parameter.requires_grad for parameter in critic.parameters())
    score = reward_model_scores(reward_model, IDS, mask)
    disturbed(critic)
    assert torch.equal(reward_model_scores(reward_model, IDS, mask), score)
    assert not any(parameter.requires_grad for parameter in reward_model.parameters())
    values = critic(IDS, mask)
    critic.save(tmp_path)
    close(Critic(load_reward_model(tmp_path))(IDS, mask), values, 1e-6)


def test_frozen_models_are_in_eval_mode_without_gradient(make_model):
    model = freeze(make_model("gpt2").train())
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


# log-probabilities and values of a response

SIZE = 4
MASK = torch.tensor([[1, 1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1, 1]]).bool()  # P = 3: two response tokens, four
REAL = MASK[:, -SIZE:]


def padded(ids, mask, left, right):
    """The rows with more padding on both sides, of ids that no mask should let through."""
    wide = torch.nn.functional.pad(ids, (left, right), value=7)
    return wide, torch.nn.functional.pad(mask, (left, right))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_logprobs_are_those_of_a_float64_softmax_without_the_padding_token(kind, temperature, make_model):
    model = make_model(kind, seed=3)
    logprobs, entropies = response_logprobs(model, IDS, MASK, SIZE, temperature, pad_id=0)
    for row in range(2):
        real = IDS[row][MASK[row]]
        z = logits(model, real[None])[0].double() / temperature
        z[:, 0] = -torch.inf
        oracle = z.log_softmax(-1)
        count = int(REAL[row].sum())
        for t in range(count):
            p = oracle[len(real) - count + t - 1]
            assert logprobs[row, t].item() == pytest.approx(p[real[len(real) - count + t]].item(), abs=2e-5)
            assert entropies[row, t].item() == pytest.approx(-(p.exp() * p)[1:].sum().item(), abs=2e-5)


@pytest.fixture(params=["own backbone", "head"])
def actor_critic(request, make_model, reward_model):
    critic = Critic(reward_model) if request.param == "own backbone" else disturbed(ValueHead(16))
    return ActorCritic(make_model("gpt2", seed=3), critic, temperature=0.7, pad_id=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("adapter", [None, *ADAPTERS], ids=lambda a: a and a.adapter)
def test_a_value_head_reads_the_trunks_last_state_in_the_same_forward(kind, adapter, make_model):
    policy = (
        make_model(kind, seed=3) if adapter is None else disturbed(wrap_with_adapter(make_model(kind, seed=3), adapter))
    )
    head = disturbed(ValueHead(16))
    forwards = []
    unwrap_peft(policy).register_forward_hook(lambda *_: forwards.append(1))
    mask = torch.ones_like(IDS, dtype=torch.bool)
    logprobs, _, values = ActorCritic(policy, head, 0.7, 0)(IDS, mask, SIZE)
    assert len(forwards) == 1
    with torch.no_grad():
        hidden = unwrap_peft(policy).base_model(IDS).last_hidden_state[:, -SIZE - 1 : -1].double()
        close(values.double(), hidden @ head.weight[0].double() + head.bias.double(), 1e-5)
        close(logprobs, response_logprobs(policy, IDS, mask, SIZE, 0.7, 0)[0], 0)
    assert values.std() > 0.1


def test_a_new_value_head_is_zero():
    assert not any(parameter.any() for parameter in ValueHead(16).parameters())


@pytest.mark.parametrize("update_policy", [True, False])
def test_the_value_loss_reaches_the_trunk_unless_only_the_critic_learns(update_policy, make_model):
    model = ActorCritic(make_model("gpt2", seed=3), disturbed(ValueHead(16)), 0.7, 0)
    model(IDS, torch.ones_like(IDS, dtype=torch.bool), SIZE, update_policy)[2].sum().backward()
    assert any(p.grad is not None and p.grad.any() for p in model.policy.parameters()) == update_policy
    assert all(p.grad.any() for p in model.critic.parameters())


@pytest.mark.parametrize("load", [load_language_model, load_reward_model])
def test_a_head_that_would_not_be_used_is_an_error(load, make_model, tokenizer, tmp_path):
    """A reward model with tied embeddings has all that a language model needs, and a score head besides."""
    save_policy(make_model("gpt2"), tokenizer, tmp_path / "sft")
    new_reward_model(tmp_path / "sft", tokenizer).save_pretrained(tmp_path / "reward")
    weights = load_file(tmp_path / "sft/model.safetensors") | {"v_head.summary.weight": torch.ones(1, 16)}
    save_file(weights, tmp_path / "sft/model.safetensors", metadata={"format": "pt"})
    if load is load_language_model:
        with pytest.raises(ModelError, match=r"head that would not be used: score\.weight"):
            load(tmp_path / "reward")
        with pytest.raises(ModelError, match=r"head that would not be used: v_head\.summary\.weight"):
            load(tmp_path / "sft")
    else:
        load(tmp_path / "reward")
        with pytest.raises(ModelError, match=r"missing or unused weights score\.weight, v_head"):
            load(tmp_path / "sft")


@pytest.mark.parametrize(("left", "right"), [(1, 0), (0, 1), (5, 2), (17, 6)])
def test_padding_changes_neither_logprobs_nor_values(left, right, actor_critic):
    model = actor_critic
    expected = model(IDS, MASK, SIZE)
    wide = model(*padded(IDS, MASK, left, right), SIZE + right)
    for theirs, ours in zip(expected, wide, strict=True):
        close(ours[:, :SIZE][REAL], theirs[REAL], 1e-5)


def test_what_stands_at_masked_positions_changes_nothing(actor_critic):
    model = actor_critic
    other = torch.where(MASK, IDS, 11)
    for ours, theirs in zip(model(other, MASK, SIZE), model(IDS, MASK, SIZE), strict=True):
        assert torch.equal(ours[REAL], theirs[REAL])


@pytest.mark.parametrize("t", range(SIZE))
def test_a_token_moves_its_logprob_and_what_follows_only(t, actor_critic):
    model = actor_critic
    mask = torch.ones_like(IDS, dtype=torch.bool)
    changed = IDS.clone()
    changed[:, -SIZE + t] = 15 - changed[:, -SIZE + t]
    (logprobs, entropies, values), (new_logprobs, new_entropies, new_values) = (
        model(ids, mask, SIZE) for ids in (IDS, changed)
    )
    moved = [(new - old).abs().amin(0) for new, old in ((new_logprobs, logprobs), (new_values, values))]
    assert torch.equal(new_logprobs[:, :t], logprobs[:, :t])
    assert torch.equal(new_entropies[:, : t + 1], entropies[:, : t + 1])
    assert torch.equal(new_values[:, : t + 1], values[:, : t + 1])
    assert (moved[0][t:] > 1e-4).all()
    assert (moved[1][t + 1 :] > 1e-4).all()
