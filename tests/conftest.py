"""Settings for every test, made before anything is imported: no hub, no upload, no threads, no accelerator.

The fixtures are crooked on purpose: weights ten times the usual size (a tiny random model would hardly notice a
permuted prefix), a GPT-2 whose absolute positions feel padding, a reward model whose scores are shifted, and policy,
reference and critic that all differ.
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import make_parents
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from pipeline.data.tokenizer import train_tokenizer
from pipeline.models.heads import new_reward_model
from pipeline.models.loading import ATTN_IMPLEMENTATION
from pipeline.models.saving import save_policy

SENTENCES = ("the cat sat on a mat.", " a dog ate the cake,", " not the hat. no", " so he had tea on the sea.")

ModelMaker = Callable[..., PreTrainedModel]


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """Characters: what it decodes it encodes again, so ids and text can be compared."""
    return train_tokenizer("char", SENTENCES, 40)


@pytest.fixture(scope="session")
def make_model(tokenizer: Tokenizer) -> ModelMaker:
    """make_model("gpt2" | "llama", seed, dropout, lean): a tiny random language model in eval mode.

    `lean` = (token, push) adds push to that token's logit (GPT-2): its last output coordinate then carries that alone.
    """

    def make(kind: str, seed: int = 0, dropout: float = 0.0, lean: tuple[int, float] | None = None) -> PreTrainedModel:
        torch.manual_seed(seed)
        special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
        common = {"vocab_size": len(tokenizer), "initializer_range": 0.5, "attention_dropout": dropout} | special
        if kind == "llama":
            sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64}
            llama = LlamaForCausalLM(LlamaConfig(hidden_size=16, intermediate_size=40, **sizes, **common)).eval()
            llama.set_attn_implementation(ATTN_IMPLEMENTATION)
            return llama
        sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
        dropouts = {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout}
        model = GPT2LMHeadModel(GPT2Config(**sizes, **dropouts, **common)).eval()
        model.set_attn_implementation(ATTN_IMPLEMENTATION)
        if lean is not None:
            with torch.no_grad():
                model.transformer.ln_f.weight[-1], model.transformer.ln_f.bias[-1] = 0, 1
                model.lm_head.weight[:, -1] = 0
                model.lm_head.weight[lean[0], -1] = lean[1]
        return model

    return make


@pytest.fixture(scope="session")
def saved(make_model: ModelMaker, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Directories of a saved `gpt2` and a saved `llama`."""
    folder = tmp_path_factory.mktemp("saved")
    for kind in ("gpt2", "llama"):
        save_policy(make_model(kind), tokenizer, folder / kind)
    return {kind: folder / kind for kind in ("gpt2", "llama")}


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of `tiny.make_parents`: data, a base, an SFT policy and two reward models; tests add folders of their own."""
    folder = tmp_path_factory.mktemp("tiny")
    make_parents(folder)
    return folder


@pytest.fixture
def policy(make_model: ModelMaker, tokenizer: Tokenizer) -> PreTrainedModel:
    """A GPT-2 that ends some of its responses early, some late and some not at all."""
    return make_model("gpt2", seed=3, lean=(tokenizer.eos_token_id, 1.0))


@pytest.fixture
def reward_model(saved: dict[str, Path], tokenizer: Tokenizer) -> PreTrainedModel:
    """A GPT-2 reward model whose trunk is not a policy's and whose shift is not zero."""
    torch.manual_seed(5)
    model = new_reward_model(saved["gpt2"], tokenizer)
    with torch.no_grad():
        for parameter in model.base_model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.config.score_shift = 0.37
    return model.eval().requires_grad_(False)
