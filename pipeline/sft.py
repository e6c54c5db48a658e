"""Stage 2: supervised fine-tuning on prompt -> completion, with loss on the completion only."""

import math
from functools import partial
from pathlib import Path

from transformers import set_seed
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
        read = partial(
            read_rows, kind="completion", reading=config.run.reading, seed=config.run.seed,
            check=conversation_check(tokenizer, "completion"),
        )  # fmt: skip
        train, validation = (
            read(config.train_file, limit=config.train_rows),
            read(config.validation_file, limit=config.validation_rows),
        )
        stage.form = check_form(train, config.train_file, {})
        check_form(validation, config.validation_file, {config.train_file: stage.form})
        say_template_unused(tokenizer, stage.form)
        with naming(config.train_file):
            rows, longer = completion_rows(tokenizer, train, config.max_length, config.too_long)
        with naming(config.validation_file):
            held_out, held_out_longer = completion_rows(tokenizer, validation, config.max_length, config.too_long)
        print_main(
            f"sft: {len(rows):,} rows; {longer:,} were longer than {config.max_length} tokens ({config.too_long})"
        )
        for file, part in ((config.train_file, rows), (config.validation_file, held_out)):
            longest = max(map(len, part["input_ids"]))
            check_model(unwrap_peft(model), tokenizer, longest, base, f"rows of {file} have up to", "max_length")
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
