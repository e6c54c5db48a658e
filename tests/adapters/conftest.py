"""Adapters and classifiers that the tests of adapter arithmetic share."""

from pathlib import Path

import pytest
import torch
from adapter_factory import AdapterFactory
from peft import LoraConfig, get_peft_model
from transformers import LlamaForSequenceClassification


@pytest.fixture(scope="session")
def factory(tmp_path_factory, saved, make_model) -> AdapterFactory:
    return AdapterFactory(tmp_path_factory.mktemp("factory"), saved, make_model)


@pytest.fixture(scope="session")
def classifiers(factory, tokenizer) -> dict[str, Path]:
    """Two adapters of a sequence classifier, each with its own score head, on the saved llama."""
    folders = {}
    for seed in (1, 2):
        torch.manual_seed(seed)
        model = LlamaForSequenceClassification.from_pretrained(factory.bases["llama"], num_labels=1).eval()
        peft = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="SEQ_CLS"))
        with torch.no_grad():
            for parameter in peft.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        folders["ab"[seed - 1]] = factory.folder / f"classifier{seed}"
        peft.save_pretrained(str(folders["ab"[seed - 1]]))
    return folders
