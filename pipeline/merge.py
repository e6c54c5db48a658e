"""Stage 5: the policy with its adapter merged in, proved equal to the unmerged one before it is written."""

from functools import partial
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from pipeline.adapters.compose import PROBES, TOLERANCE, probe
from pipeline.config.errors import UserError
from pipeline.config.stages import Merge
from pipeline.data.formats import read_rows
from pipeline.data.sources import hash_sources
from pipeline.data.tokenize import ensure_chat_template
from pipeline.data.tokenizer import load_tokenizer
from pipeline.models.loading import disable_dropout_, merge_adapter
from pipeline.models.saving import save_policy
from pipeline.runtime.console import print_main, silence_libraries
from pipeline.runtime.stage_run import StageRun


def train(config: Merge) -> Path:
    """Writes the merged policy and returns its `final` directory: a plain `save_pretrained` one."""
    silence_libraries()
    source = config.run.final("ppo", config.policy)
    stage = StageRun("merge", config, {"policy": source}, hash_sources([config.probe_file]))
    if stage.is_finished():
        return stage.final
    with stage:
        tokenizer = load_tokenizer(source)
        model = disable_dropout_(
            AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, trust_remote_code=False)
        )
        rows = read_rows(config.probe_file, "prompt", PROBES, config.run.bad_rows)
        ensure_chat_template(tokenizer, rows)
        prompts = [row["prompt"] for row in rows]
        before = probe(model.eval(), tokenizer, prompts)
        after = probe(merge_adapter(model), tokenizer, prompts)
        error = ((after - before).abs().max() / before.abs().max()).item()
        if not error <= TOLERANCE:
            raise UserError(
                f"{source}: merging changes the logits by {error:.2g} of the largest, more than {TOLERANCE:g}"
            )
        print_main(
            f"merge: merged and unmerged agree within {error:.1e} of the largest logit on {len(prompts)} prompts"
        )
        return stage.finish(partial(save_policy, model, tokenizer), {"relative_error": error})
