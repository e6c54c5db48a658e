"""Talking to base, SFT and PPO side by side: the same prompt, the same noise, each with its own memory of the talk."""

from dataclasses import replace

import torch
from transformers import PreTrainedTokenizerBase, TextStreamer

from pipeline.config import Chat, Sampling
from pipeline.data import decode
from pipeline.formats import Text
from pipeline.models import Policy, base_of, check_model, frozen, load_language_model
from pipeline.process import console, processes, quiet
from pipeline.rollout import generate
from pipeline.run import read_done
from pipeline.tokenizing import same_tokenizer

HELP = """Every policy answers from the same noise and remembers what was said. /new starts over, an empty line ends."""


def talk(config: Chat) -> None:
    """Answers `config.prompt`, or what is typed line by line until an empty line."""
    quiet()
    paths = {"base": config.run.final("pretrain"), "sft": config.run.final("sft"), "ppo": config.run.final("merge")}
    paths = {name: path for name, path in paths.items() if name in config.policies.split(",")}
    for path in paths.values():
        read_done(path)
    tokenizer = same_tokenizer({name: paths[name] for name in sorted(paths, key=["sft", "ppo", "base"].index)})
    models: dict[str, Policy] = {
        name: frozen(load_language_model(path)).to(processes().device) for name, path in paths.items()
    }
    sampling = config.sampling
    for name, model in models.items():
        room = getattr(model.config, "max_position_embeddings", 10**9) - sampling.max_new_tokens
        check_model(base_of(model), tokenizer, sampling.max_new_tokens + 1, paths[name])
        sampling = replace(sampling, max_prompt_tokens=min(room, sampling.max_prompt_tokens))
    if config.prompt:
        answer(config.prompt, {}, models, tokenizer, sampling, config.run.seed)
        return
    console.print(HELP)
    said: dict[str, Text] = {}
    while prompt := console.input("> ").rstrip():
        said = {} if prompt == "/new" else answer(prompt, said, models, tokenizer, sampling, config.run.seed)


def answer(
    prompt: str,
    said: dict[str, Text],
    models: dict[str, Policy],
    tokenizer: PreTrainedTokenizerBase,
    sampling: Sampling,
    seed: int,
) -> dict[str, Text]:
    """Prints each policy's answer as it is written, and returns what each has said and heard so far.

    With a chat template the prompt is the user's next turn; without one it goes on with the text.
    """
    now: dict[str, Text] = {}
    for name, model in models.items():
        asked: Text
        if tokenizer.chat_template is None:
            asked = "".join([str(said.get(name, "")), prompt])
            console.print(f"{name:>5}: {prompt}", end="", markup=False)
        else:
            asked = [*said.get(name, []), {"role": "user", "content": prompt}]
            console.print(f"{name:>5}: ", end="", markup=False)
        torch.manual_seed(seed)
        streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        rollout = generate(model, tokenizer, [asked], sampling, streamer)
        text = decode(tokenizer, rollout.responses[0].tolist())
        now[name] = asked + text if isinstance(asked, str) else [*asked, {"role": "assistant", "content": text.strip()}]
    return now
