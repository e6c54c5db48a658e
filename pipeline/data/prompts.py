"""The prompts of PPO and evaluation, no longer than a recipe allows."""

from collections.abc import Mapping

from transformers import PreTrainedTokenizerBase

from pipeline.config.dials import Sampling
from pipeline.config.stages import PPO, Evaluate, Reward
from pipeline.data.chat_template import conversation_check
from pipeline.data.files import DataError
from pipeline.data.form import check_form
from pipeline.data.formats import read_rows
from pipeline.data.messages import Text
from pipeline.data.tokenize import prompt_ids
from pipeline.runtime.console import print_main


def read_prompts(
    source: str,
    limit: int,
    tokenizer: PreTrainedTokenizerBase,
    config: PPO | Reward | Evaluate,
    forms: Mapping[str, str] | None = None,
) -> list[Text]:
    """The sources' prompts; those longer than max_prompt_tokens treated as `long_prompts` says, and counted.

    Their form must be that of all `forms` (`data.form.check_form`).
    """
    check = conversation_check(tokenizer)
    rows = read_rows(source, "prompt", limit, config.run.reading, config.run.seed, check)
    check_form(rows, source, forms or {})
    return filter_prompts([row["prompt"] for row in rows], tokenizer, config.sampling, source)


def filter_prompts(
    prompts: list[Text], tokenizer: PreTrainedTokenizerBase, sampling: Sampling, source: str
) -> list[Text]:
    """The prompts, those longer than max_prompt_tokens treated as `long_prompts` says."""
    longest, treatment = sampling.max_prompt_tokens, sampling.long_prompts
    longer = [len(ids) > longest for ids in prompt_ids(tokenizer, prompts)]
    if not any(longer):
        return prompts
    message = f"{source}: {sum(longer):,} of {len(prompts):,} prompts are longer than {longest} tokens"
    if treatment == "error" or (treatment == "drop" and all(longer)):
        raise DataError(f"{message}: raise max_prompt_tokens, or say --long_prompts cut")
    print_main(f"{message} ({treatment})")
    return [prompt for prompt, is_longer in zip(prompts, longer, strict=True) if treatment == "cut" or not is_longer]
