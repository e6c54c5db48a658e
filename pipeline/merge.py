"""Stage 5: the policy with its adapter merged in, proved equal to the unmerged one before it is written."""

from functools import partial
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from pipeline.adapters import PROBES, TOLERANCE, probe
from pipeline.config import Merge, UserError
from pipeline.data import with_chat_template
from pipeline.formats import read_rows
from pipeline.models import merge_adapter, save_policy, without_dropout
from pipeline.process import quiet, say
from pipeline.run import StageRun
from pipeline.tokenizing import load_tokenizer


def train(config: Merge) -> Path:
    """Writes the merged policy and returns its `final` directory: a plain `save_pretrained` one."""
    quiet()
    source = config.run.final("ppo", config.policy)
    stage = StageRun("merge", config, {"policy": source}, [config.probe_file])
    if stage.is_finished():
        return stage.final
    with stage:
        tokenizer = load_tokenizer(source)
        model = without_dropout(
            AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, trust_remote_code=False)
        )
        rows = read_rows(config.probe_file, "prompt", PROBES, config.run.bad_rows)
        with_chat_template(tokenizer, rows)
        prompts = [row["prompt"] for row in rows]
        before = probe(model.eval(), tokenizer, prompts)
        after = probe(merge_adapter(model), tokenizer, prompts)
        error = ((after - before).abs().max() / before.abs().max()).item()
        if not error <= TOLERANCE:
            raise UserError(
                f"{source}: merging changes the logits by {error:.2g} of the largest, more than {TOLERANCE:g}"
            )
        say(f"merge: merged and unmerged agree within {error:.1e} of the largest logit on {len(prompts)} prompts")
        return stage.finish(partial(save_policy, model, tokenizer), {"relative_error": error})
