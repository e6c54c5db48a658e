"""Stage 5: the policy with its adapter merged in, proved equal to the unmerged one before it is written."""

from functools import partial
from pathlib import Path

from pipeline.adapters.proof import prove_merge, read_probes
from pipeline.config.stages import Merge
from pipeline.data.sources import hash_sources
from pipeline.data.tokenizer import load_tokenizer
from pipeline.models.loading import disable_dropout_, load_language_model_with_adapter
from pipeline.models.saving import save_policy
from pipeline.runtime.console import print_main, silence_libraries
from pipeline.runtime.finished import recorded_form
from pipeline.runtime.stage_run import StageRun


def train(config: Merge) -> Path:
    """Writes the merged policy and returns its `final` directory: a plain `save_pretrained` one."""
    silence_libraries()
    source = config.run.final("ppo", config.policy)
    stage = StageRun("merge", config, {"policy": source}, hash_sources([config.probe_file]))
    if stage.is_finished():
        return stage.final
    with stage:
        stage.form = recorded_form(source)
        tokenizer = load_tokenizer(source)
        policy = load_language_model_with_adapter(source)
        prompts = read_probes(config.probe_file, tokenizer, config.run.reading)
        merge = prove_merge(disable_dropout_(policy).eval(), tokenizer, prompts, source)
        print_main(
            f"merge: merged and unmerged agree within {merge.error:.1e} of the largest logit on {len(prompts)} prompts"
        )
        return stage.finish(partial(save_policy, merge.model, tokenizer), {"relative_error": merge.error})
