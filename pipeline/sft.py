"""Stage 2: supervised fine-tuning on prompt -> completion, with loss on the completion only."""

import math
from functools import partial
from pathlib import Path

from transformers import set_seed
from trl import SFTConfig

from pipeline.config import SFT
from pipeline.data import completion_rows, show_example, with_chat_template
from pipeline.formats import read_rows
from pipeline.models import Policy, base_of, check_model, keep_fp32, load_language_model, save_policy, with_adapter
from pipeline.process import processes, quiet, say
from pipeline.run import StageRun
from pipeline.tokenizing import load_tokenizer
from pipeline.trainers import NextTokenTrainer, in_length_batches, trained, training_arguments, validation_loss


def train(config: SFT) -> Path:
    """Trains prompt -> completion and returns the `final` directory, which `from_pretrained` loads."""
    quiet()
    config.optim.accumulation(processes().num_processes)  # a batch that does not divide is refused before any work
    base = config.run.final("pretrain", config.base)
    stage = StageRun("sft", config, {"base": base}, [config.train_file, config.validation_file])
    if stage.is_finished():
        return stage.final
    with stage:
        set_seed(config.run.seed)
        tokenizer = load_tokenizer(base)
        model: Policy = load_language_model(base, config.adapter.load_in_4bit)
        if config.adapter.adapter != "none":
            model = with_adapter(base_of(model), config.adapter)
        read = partial(read_rows, kind="completion", bad_rows=config.run.bad_rows, seed=config.run.seed)
        train, validation = (
            read(config.train_file, limit=config.train_rows),
            read(config.validation_file, limit=config.validation_rows),
        )
        with_chat_template(tokenizer, [*train, *validation])
        rows, longer = completion_rows(tokenizer, train, config.max_tokens, config.too_long)
        held_out, _ = completion_rows(tokenizer, validation, config.max_tokens, config.too_long)
        say(f"sft: {len(rows):,} rows; {longer:,} were longer than {config.max_tokens} tokens ({config.too_long})")
        check_model(base_of(model), tokenizer, max(map(len, rows["input_ids"])), base)
        show_example(tokenizer, rows[0]["input_ids"], rows[0]["labels"])
        before, _ = validation_loss(model, tokenizer, held_out, config.optim.micro_batch, config.run.precision)
        trainer = NextTokenTrainer(
            label_smoothing=config.label_smoothing,
            model=model,
            args=SFTConfig(
                **training_arguments(config.run, config.optim, stage.folder),
                train_sampling_strategy="sequential",
                max_length=None,
            ),
            train_dataset=in_length_batches(
                rows, [len(ids) for ids in rows["input_ids"]], config.optim.batch_size, config.run.seed
            ),
            processing_class=tokenizer,
        )
        keep_fp32(model)
        model = trained(trainer, model, stage)
        loss, tokens = validation_loss(model, tokenizer, held_out, config.optim.micro_batch, config.run.precision)
        metrics = {
            "rows": len(rows),
            "rows_too_long": longer,
            "validation_loss_before": before,
            "validation_loss": loss,
            "perplexity": math.exp(loss),
            "validation_tokens": tokens,
        }
        say(f"sft: validation loss {before:.3f} -> {loss:.3f} nats per token, perplexity {math.exp(loss):.1f}")
        return stage.finish(partial(save_policy, model, tokenizer), metrics)
