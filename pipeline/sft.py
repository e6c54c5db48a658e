"""Stage 2: supervised fine-tuning on prompt -> completion, with loss on the completion only."""

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from datasets import Dataset
from transformers import PreTrainedTokenizerBase, set_seed
from trl import SFTConfig

from pipeline.config.stages import SFT
from pipeline.data.chat_template import conversation_check
from pipeline.data.form import check_form, say_template_unused
from pipeline.data.formats import read_rows
from pipeline.data.sources import hash_sources, naming
from pipeline.data.tokenize import completion_rows, show_example
from pipeline.data.tokenizer import hash_template, load_tokenizer
from pipeline.evaluation.side_figures import show, side_figure
from pipeline.models.fresh_adapter import wrap_with_adapter
from pipeline.models.loading import (
    Policy,
    cast_trained_to_fp32_,
    check_model,
    load_language_model,
    unwrap_peft,
)
from pipeline.models.saving import save_policy
from pipeline.runtime.console import print_main, silence_libraries
from pipeline.runtime.process import processes
from pipeline.runtime.stage_run import StageRun
from pipeline.training.trainer import NextTokenTrainer, run_training, training_arguments
from pipeline.training.validation import validation_loss


def train(config: SFT) -> Path:
    """Trains prompt -> completion and returns the `final` directory, which `from_pretrained` loads."""
    silence_libraries()
    config.optim.accumulation(processes().num_processes)  # a batch that does not divide is refused before any work
    base = config.run.final("pretrain", config.base)
    data = hash_sources([config.train_file, config.validation_file]) + hash_template(config.tokens)
    stage = StageRun("sft", config, {"base": base}, data)
    if stage.is_finished():
        return stage.final
    with stage:
        set_seed(config.run.seed)
        tokenizer = load_tokenizer(base, config.tokens)
        model: Policy = load_language_model(base, config.adapter.load_in_4bit)
        if config.adapter.adapter != "none":
            model = wrap_with_adapter(unwrap_peft(model), config.adapter)
        rows, longer, stage.form = read_tokens(config.train_file, config.train_rows, tokenizer, model, config, {})
        forms = {config.train_file: stage.form}
        held_out, held_out_longer, _ = read_tokens(
            config.validation_file, config.validation_rows, tokenizer, model, config, forms
        )
        say_template_unused(tokenizer, stage.form)
        print_main(
            f"sft: {len(rows):,} rows; {longer:,} were longer than {config.max_length} tokens ({config.too_long})"
        )
        show_example(tokenizer, rows[0]["input_ids"], rows[0]["labels"])
        before, _ = validation_loss(model, tokenizer, held_out, config.optim.micro_batch, config.run.precision)
        trainer = NextTokenTrainer(
            label_smoothing=config.label_smoothing,
            model=model,
            args=SFTConfig(
                **training_arguments(config.run, config.optim, stage.folder),
                max_length=None,
            ),
            train_dataset=rows,
            lengths=[len(ids) for ids in rows["input_ids"]],
            processing_class=tokenizer,
        )
        cast_trained_to_fp32_(model)
        model = run_training(trainer, model, stage)
        stage.write(partial(save_policy, model, tokenizer))
        loss, tokens = side_figure(
            "sft: validation loss", validation_loss, model, tokenizer, held_out, config.optim.micro_batch,
            config.run.precision,
        ) or (None, None)  # fmt: skip
        perplexity = None if loss is None else side_figure("sft: perplexity", math.exp, loss)
        print_main(
            f"sft: validation loss {before:.3f} -> {show(loss, '.3f')} nats per token, perplexity "
            f"{show(perplexity, '.1f')}"
        )
        return stage.complete(
            {
                "rows": len(rows),
                "rows_too_long": longer,
                "validation_rows_too_long": held_out_longer,
                "validation_loss_before": before,
                "validation_loss": loss,
                "perplexity": perplexity,
                "validation_tokens": tokens,
            }
        )


def read_tokens(
    file: str,
    limit: int,
    tokenizer: PreTrainedTokenizerBase,
    model: Policy,
    config: SFT,
    forms: Mapping[str, str],
) -> tuple[Dataset, int, str]:
    """The rows of a file as tokens and labels, how many were longer than `max_length`, and their form.

    DataError for rows of another form than those of `forms`; ModelError for any longer than the model's context.
    """
    check = conversation_check(tokenizer, "completion")
    rows = read_rows(file, "completion", limit, config.run.reading, config.run.seed, check)
    form = check_form(rows, file, forms)
    with naming(file):
        tokens, longer = completion_rows(tokenizer, rows, config.max_length, config.too_long)
    longest = max(map(len, tokens["input_ids"]))
    base = config.run.final("pretrain", config.base)
    check_model(unwrap_peft(model), tokenizer, longest, base, f"rows of {file} have up to", "max_length")
    return tokens, longer, form
