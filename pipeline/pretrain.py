"""Stage 1: a small causal language model from scratch, with its tokenizer, on plain text."""

import math
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from datasets import Dataset, IterableDataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed
from trl import SFTConfig

from pipeline.config.dials import Sampling
from pipeline.config.stages import Pretrain
from pipeline.data.form import TEXT
from pipeline.data.formats import iterate_rows, read_rows
from pipeline.data.sources import hash_sources
from pipeline.data.tokenize import decode, language_rows, language_stream
from pipeline.data.tokenizer import hash_template, load_tokenizer, train_tokenizer
from pipeline.evaluation.side_figures import show, side_figure
from pipeline.models.loading import check_model, load_language_model, new_language_model
from pipeline.models.saving import save_policy
from pipeline.rl.rollout import generate
from pipeline.runtime.console import print_main, silence_libraries
from pipeline.runtime.process import processes
from pipeline.runtime.stage_run import StageRun
from pipeline.training.trainer import NextTokenTrainer, count_tokens, run_training, training_arguments
from pipeline.training.validation import validation_loss

# Below it a model is mostly its initialisation; 20 is Hoffmann et al., arXiv 2203.15556.
ENOUGH_TOKENS_PER_PARAMETER = 5
TOKENIZER_ROWS = 100_000  # texts that a tokenizer is trained on at most
TEMPERATURES = (0.5, 0.8, 1.0)
VALIDATED = ("validation_loss", "perplexity", "bits_per_byte", "validation_tokens")


def train(config: Pretrain) -> Path:
    """Trains a language model with its tokenizer and returns its `final` directory, which `from_pretrained` loads."""
    silence_libraries()
    config.optim.accumulation(processes().num_processes)  # a batch that does not divide is refused before any work
    data = hash_sources([config.train_file, config.validation_file]) + hash_template(config.tokens)
    stage = StageRun("pretrain", config, {}, data)
    if stage.is_finished():
        return stage.final
    with stage:
        stage.form = TEXT
        set_seed(config.run.seed)
        texts = partial(training_texts, config) if config.stream else list(training_texts(config))
        held_out = [
            row["text"] for row in read_rows(config.validation_file, "text", config.validation_rows, config.run.reading)
        ]
        tokenizer = make_tokenizer(config, texts() if callable(texts) else texts)
        rows = (
            language_stream(tokenizer, texts, config.run.seed) if callable(texts) else language_rows(tokenizer, texts)
        )
        pieces = validation_pieces(tokenizer, held_out, config)
        model = load_language_model(config.init) if config.init else new_language_model(config, tokenizer)
        check_model(model, tokenizer, config.context, config.init or "the new model", "the dial context is", "it")
        trainer = NextTokenTrainer(
            label_smoothing=0.0,
            model=model,
            args=SFTConfig(
                **training_arguments(config.run, config.optim, stage.folder),
                max_steps=config.max_steps or -1,
                packing=True,
                packing_strategy=config.packing_strategy,
                max_length=config.context,
            ),
            train_dataset=rows,
            processing_class=tokenizer,
        )
        metrics: dict[str, float | None] = {**token_budget(model, trainer.train_dataset, config)}
        model = run_training(trainer, model, stage)
        stage.write(partial(save_policy, model, tokenizer))
        size = sum(len(text.encode()) for text in held_out)
        found = side_figure("pretrain: validation loss", validation_metrics, model, tokenizer, pieces, size, config)
        metrics |= found or dict.fromkeys(VALIDATED)
        print_main(
            f"pretrain: validation loss {show(metrics['validation_loss'], '.3f')} nats/token, perplexity "
            f"{show(metrics['perplexity'], '.1f')}, {show(metrics['bits_per_byte'], '.3f')} bits per byte"
        )
        tokens = min(config.sample_tokens, config.context - 1)  # after the token that an empty prompt is
        stage.log_samples(side_figure("pretrain: samples", sample_texts, model, tokenizer, tokens) or [])
        return stage.complete(metrics)


def training_texts(config: Pretrain) -> Iterator[str]:
    """The training rows' texts, read one by one."""
    run = config.run
    return (row["text"] for row in iterate_rows(config.train_file, "text", config.train_rows, run.reading, run.seed))


def make_tokenizer(config: Pretrain, texts: Iterable[str]) -> PreTrainedTokenizerBase:
    """The tokenizer that the dials ask for: of `init`, trained on texts, or an existing one."""
    if config.init:
        return load_tokenizer(config.init, config.tokens)
    if config.tokenizer in ("bpe", "char", "word"):
        return train_tokenizer(config.tokenizer, islice(texts, TOKENIZER_ROWS), config.vocab_size)
    return load_tokenizer(config.tokenizer, config.tokens)


def token_budget(model: PreTrainedModel, rows: Dataset | IterableDataset, config: Pretrain) -> dict[str, float]:
    """Parameters, training tokens and their ratio; says so when the model is too large for its data."""
    parameters = model.num_parameters()
    if config.max_steps:
        tokens = float(config.max_steps * config.optim.batch_size * config.context)
    else:
        assert isinstance(rows, Dataset)
        tokens = count_tokens(rows) * config.optim.num_train_epochs
    ratio = tokens / parameters
    print_main(f"pretrain: {parameters:,} parameters, {tokens:,.0f} tokens, {ratio:.1f} tokens per parameter")
    if ratio < ENOUGH_TOKENS_PER_PARAMETER:
        print_main(
            f"pretrain: warning: fewer than {ENOUGH_TOKENS_PER_PARAMETER} tokens per parameter: "
            "more text would teach this model more"
        )
    return {"parameters": parameters, "tokens": tokens, "tokens_per_parameter": ratio}


def validation_pieces(tokenizer: PreTrainedTokenizerBase, texts: list[str], config: Pretrain) -> Dataset:
    """The ids of held-out texts in pieces no longer than the context."""
    rows = language_rows(tokenizer, texts)
    pieces = [
        {"input_ids": ids[start : start + config.context]}
        for ids in rows["input_ids"]
        for start in range(
            0, len(ids) - 1, config.context - 1
        )  # each piece opens with the last token of the one before
    ]
    return Dataset.from_list(pieces)


def validation_metrics(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pieces: Dataset, size: int, config: Pretrain
) -> dict[str, float | None]:
    """Validation loss (nats per token), perplexity, and bits per byte of UTF-8, which compares across tokenizers.

    `size` is that of the pieces' texts, in bytes.
    """
    loss, tokens = validation_loss(model, tokenizer, pieces, config.optim.micro_batch, config.run.precision)
    perplexity = side_figure("pretrain: perplexity", math.exp, loss)
    figures = (loss, perplexity, loss * tokens / math.log(2) / size, tokens)
    return dict(zip(VALIDATED, figures, strict=True))


def sample_texts(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tokens: int) -> list[dict[str, object]]:
    """Texts from an empty prompt, two at each of three temperatures."""
    rows: list[dict[str, object]] = []
    for temperature in TEMPERATURES:
        torch.manual_seed(0)
        rollout = generate(model, tokenizer, ["", ""], Sampling(max_new_tokens=tokens, temperature=temperature))
        rows += [{"temperature": temperature, "text": decode(tokenizer, ids)} for ids in rollout.responses.tolist()]
    return rows
