"""A saved reward model scores the same where it is loaded without this project."""

import json

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Tokenizer,
    LlamaConfig,
    LlamaForCausalLM,
)

from pipeline.data.tokenize import pad_rows, text_ids
from pipeline.data.tokenizer import load_tokenizer
from pipeline.models.heads import new_reward_model
from pipeline.models.loading import load_language_model
from pipeline.models.saving import save_policy
from pipeline.pretrain import sample_texts
from pipeline.reward import save_reward_model
from pipeline.rl.rewards import reward_model_scores

END = "<|endoftext|>"
PAIRS = [("the cat", " sat on the mat ÿ õ"), ("a", " b"), ("", "the mat")]


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def base(request, tmp_path_factory):
    """A language model whose tokenizer has one special token, as GPT-2's."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=270, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(["the cat sat on the mat"], trainer)
    state = json.loads(backend.to_str())["model"]
    tokenizer = GPT2Tokenizer(vocab=state["vocab"], merges=[tuple(pair) for pair in state["merges"]])
    torch.manual_seed(0)
    if request.param == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=2, n_head=2, n_positions=64))
    else:
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes))
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("side", ["left", "right"])
def test_transformers_own_forward_gives_the_same_scores_of_a_padded_batch(base, side, tmp_path):
    """It finds the last token by `pad_token_id`: were that EOS, with which every row ends, it would find another."""
    tokenizer = load_tokenizer(base)
    model = new_reward_model(base, tokenizer).eval()
    rows = text_ids(tokenizer, *zip(*PAIRS, strict=True))
    assert len({len(row) for row in rows}) == len(rows)
    ids, mask = pad_rows(rows, tokenizer.pad_token_id, side)
    expected = reward_model_scores(model, ids, mask)
    save_reward_model(model, tokenizer, rows, tmp_path)
    loaded, theirs = (
        AutoModelForSequenceClassification.from_pretrained(tmp_path),
        AutoTokenizer.from_pretrained(tmp_path),
    )
    texts = [prompt + completion + theirs.eos_token for prompt, completion in PAIRS]
    batch = theirs(texts, padding=True, padding_side=side, return_tensors="pt")
    if side == "right":
        assert batch["input_ids"].tolist() == ids.tolist()
    batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)  # GPT-2 counts padding otherwise
    scores = loaded.eval()(**batch).logits.squeeze(-1).detach()
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=0)


def test_a_saved_policy_says_the_ends_that_it_was_trained_with(base, tmp_path):
    """Servers read them from config.json, or from the generation config."""
    tokenizer = load_tokenizer(base)
    save_policy(load_language_model(base), tokenizer, tmp_path)
    for kind in (AutoConfig, GenerationConfig):
        saved = kind.from_pretrained(tmp_path)
        assert (saved.eos_token_id, saved.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)


def test_without_bos_a_text_is_sampled_from_eos(base):
    tokenizer, model = load_tokenizer(base), load_language_model(base)
    assert tokenizer("")["input_ids"] == []
    rows = sample_texts(model, tokenizer, 3)
    assert [row["temperature"] for row in rows] == [0.5, 0.5, 0.8, 0.8, 1.0, 1.0]
