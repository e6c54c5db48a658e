"""What parents and result write."""

import json
import math

import pytest
import torch
from peft import PeftModel

from pipeline.adapters.verify import verify
from pipeline.config.commands import Verify
from pipeline.config.dials import Sampling
from pipeline.config.errors import UserError
from pipeline.evaluation.text import word_repetition


def test_verify_treats_long_prompts_as_the_dial_says(factory):
    out = factory.compose("a", folders={"a": factory.adapter("plain")})
    short = Sampling(max_new_tokens=4, max_prompt_tokens=2, long_prompts="error")
    with pytest.raises(UserError, match="prompts are longer than 2 tokens: raise max_prompt_tokens"):
        verify(Verify(adapter=str(out), prompts_file=str(factory.probes), prompts=4, sampling=short))


def test_verify_says_what_parents_and_result_write(factory, tokenizer, capsys):
    out = factory.compose("a + b", folders={"a": factory.adapter("plain"), "b": factory.adapter("rslora", 2)})
    report = verify(Verify(adapter=str(out), prompts_file=str(factory.probes), prompts=4))
    assert report["writes"].keys() == {"base", "a", "b", "result"}
    for figures in report["writes"].values():
        assert figures.keys() == {"vader", "repetition", "duplicates", "perplexity"}
        assert math.isfinite(figures["perplexity"])
    assert report["writes"]["a"]["perplexity"] != report["writes"]["result"]["perplexity"]
    assert "identical to the bit" in capsys.readouterr().out
    # the result's own figures, from stock generation
    model = PeftModel.from_pretrained(factory.base("llama"), str(out)).eval()
    prompts = [json.loads(line)["prompt"] for line in factory.probes.read_text().splitlines()]
    ids = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left", return_token_type_ids=False)
    torch.manual_seed(0)
    made = model.generate(**ids, max_new_tokens=40, do_sample=True, top_k=0, top_p=1.0, suppress_tokens=[0])
    texts = tokenizer.batch_decode(made[:, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    repetition = sum(map(word_repetition, texts)) / len(texts)
    assert report["writes"]["result"]["repetition"] == pytest.approx(repetition)
