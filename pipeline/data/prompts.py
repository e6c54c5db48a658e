"""The prompts of PPO and evaluation, no longer than a recipe allows."""

from transformers import PreTrainedTokenizerBase

from pipeline.config.dials import Sampling
from pipeline.config.stages import PPO, Evaluate, Reward
from pipeline.data.formats import Text, read_rows
from pipeline.data.sources import DataError
from pipeline.data.tokenize import ensure_chat_template, prompt_ids
from pipeline.runtime.console import print_main


def read_prompts(
    source: str, limit: int, tokenizer: PreTrainedTokenizerBase, config: PPO | Reward | Evaluate
) -> list[Text]:
    """The sources' prompts; those longer than max_prompt_tokens treated as `long_prompts` says, and counted."""
    rows = read_rows(source, "prompt", limit, config.run.bad_rows, config.run.seed)
    ensure_chat_template(tokenizer, rows)
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
