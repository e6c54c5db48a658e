"""Talking to base, SFT and PPO side by side: the same prompt, the same noise."""

import torch
from transformers import PreTrainedTokenizerBase

from pipeline.config import Chat
from pipeline.data import decode
from pipeline.models import Policy, frozen, load_language_model, load_tokenizer
from pipeline.process import console, processes, quiet
from pipeline.rollout import generate
from pipeline.run import read_done


def talk(config: Chat) -> None:
    """Answers `config.prompt`, or what is typed line by line until an empty line."""
    quiet()
    paths = {"base": config.run.final("pretrain"), "sft": config.run.final("sft"), "ppo": config.run.final("merge")}
    for path in paths.values():
        read_done(path)
    tokenizer = load_tokenizer(paths["sft"])
    models: dict[str, Policy] = {
        name: frozen(load_language_model(path)).to(processes().device) for name, path in paths.items()
    }
    if config.prompt:
        answer(config, config.prompt, models, tokenizer)
        return
    console.print("Write the opening of a text; an empty line ends. Every policy continues it from the same noise.")
    while prompt := console.input("> ").strip():
        answer(config, prompt, models, tokenizer)


def answer(config: Chat, prompt: str, models: dict[str, Policy], tokenizer: PreTrainedTokenizerBase) -> None:
    """Prints each policy's continuation of the prompt."""
    for name, model in models.items():
        torch.manual_seed(config.run.seed)
        rollout = generate(model, tokenizer, [prompt], config.sampling)
        console.print(f"{name:>5}: {prompt}{decode(tokenizer, rollout.responses[0].tolist())}", markup=False)
