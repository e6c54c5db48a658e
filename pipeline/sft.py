"""Stage 2: supervised fine-tuning on prompt -> completion, with loss on the completion only."""

import math
from functools import partial
from pathlib import Path

from transformers import set_seed
from trl import SFTConfig

from pipeline.config.stages import SFT
from pipeline.data.formats import read_rows
from pipeline.data.sources import hash_sources
from pipeline.data.tokenize import completion_rows, ensure_chat_template, show_example
from pipeline.data.tokenizer import load_tokenizer
from pipeline.models.loading import (
    Policy,
    cast_trained_to_fp32_,
    check_model,
    load_language_model,
    unwrap_peft,
    wrap_with_adapter,
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
    stage = StageRun("sft", config, {"base": base}, hash_sources([config.train_file, config.validation_file]))
    if stage.is_finished():
        return stage.final
    with stage:
        set_seed(config.run.seed)
        tokenizer = load_tokenizer(base)
        model: Policy = load_language_model(base, config.adapter.load_in_4bit)
        if config.adapter.adapter != "none":
            model = wrap_with_adapter(unwrap_peft(model), config.adapter)
        read = partial(read_rows, kind="completion", bad_rows=config.run.bad_rows, seed=config.run.seed)
        train, validation = (
            read(config.train_file, limit=config.train_rows),
            read(config.validation_file, limit=config.validation_rows),
        )
        ensure_chat_template(tokenizer, [*train, *validation])
        rows, longer = completion_rows(tokenizer, train, config.max_length, config.too_long)
        held_out, _ = completion_rows(tokenizer, validation, config.max_length, config.too_long)
        print_main(
            f"sft: {len(rows):,} rows; {longer:,} were longer than {config.max_length} tokens ({config.too_long})"
        )
        check_model(unwrap_peft(model), tokenizer, max(map(len, rows["input_ids"])), base)
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
        loss, tokens = validation_loss(model, tokenizer, held_out, config.optim.micro_batch, config.run.precision)
        metrics = {
            "rows": len(rows),
            "rows_too_long": longer,
            "validation_loss_before": before,
            "validation_loss": loss,
            "perplexity": math.exp(loss),
            "validation_tokens": tokens,
        }
        print_main(f"sft: validation loss {before:.3f} -> {loss:.3f} nats per token, perplexity {math.exp(loss):.1f}")
        return stage.finish(partial(save_policy, model, tokenizer), metrics)
