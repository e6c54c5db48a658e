"""Chat with base, SFT and PPO side by side: the same prompts, the same sampling noise, a history for each policy."""

from dataclasses import replace

import torch
from transformers import PreTrainedTokenizerBase, TextStreamer

from pipeline.config.dials import Sampling
from pipeline.config.stages import Chat
from pipeline.data.form import CONVERSATION, TEXT
from pipeline.data.messages import Text
from pipeline.data.tokenize import decode
from pipeline.data.tokenizer import load_shared_tokenizer
from pipeline.models.loading import Policy, check_model, freeze, load_language_model, unwrap_peft
from pipeline.rl.rollout import generate
from pipeline.runtime.console import console, silence_libraries
from pipeline.runtime.finished import read_done, recorded_form
from pipeline.runtime.process import processes

HELP = """Every policy answers from the same noise and remembers what was said. /new starts over, an empty line ends."""


def talk(config: Chat) -> None:
    """Answers `config.prompt`, or what is typed line by line until an empty line."""
    silence_libraries()
    paths = {"base": config.run.final("pretrain"), "sft": config.run.final("sft"), "ppo": config.run.final("merge")}
    paths = {name: path for name, path in paths.items() if name in config.policies.split(",")}
    for path in paths.values():
        read_done(path)
    in_turn = sorted(paths, key=["sft", "ppo", "base"].index)
    tokenizer = load_shared_tokenizer({name: paths[name] for name in in_turn})
    form = recorded_form(paths[in_turn[0]]) or (TEXT if tokenizer.chat_template is None else CONVERSATION)
    models: dict[str, Policy] = {
        name: freeze(load_language_model(path)).to(processes().device) for name, path in paths.items()
    }
    sampling = config.sampling
    for name, model in models.items():
        longest = getattr(model.config, "max_position_embeddings", 10**9) - sampling.max_new_tokens
        check_model(unwrap_peft(model), tokenizer, sampling.max_new_tokens + 1, paths[name])
        sampling = replace(sampling, max_prompt_tokens=min(longest, sampling.max_prompt_tokens))
    if config.prompt:
        answer(config.prompt, {}, models, tokenizer, form, sampling, config.run.seed)
        return
    console.print(HELP)
    histories: dict[str, Text] = {}
    while prompt := console.input("> ").rstrip():
        is_new = prompt == "/new"
        histories = {} if is_new else answer(prompt, histories, models, tokenizer, form, sampling, config.run.seed)


def answer(
    prompt: str,
    histories: dict[str, Text],
    models: dict[str, Policy],
    tokenizer: PreTrainedTokenizerBase,
    form: str,
    sampling: Sampling,
    seed: int,
) -> dict[str, Text]:
    """Prints each policy's answer as it is sampled, and returns the histories with prompt and answer added.

    In a conversation the prompt is the user's next message; in the form of text it is appended to what was said.
    """
    updated: dict[str, Text] = {}
    for name, model in models.items():
        history: Text
        if form == TEXT:
            history = "".join([str(histories.get(name, "")), prompt])
            console.print(f"{name:>5}: {prompt}", end="", markup=False)
        else:
            history = [*histories.get(name, []), {"role": "user", "content": prompt}]
            console.print(f"{name:>5}: ", end="", markup=False)
        torch.manual_seed(seed)
        streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        rollout = generate(model, tokenizer, [history], sampling, streamer)
        text = decode(tokenizer, rollout.responses[0].tolist())
        reply = {"role": "assistant", "content": text.strip()}
        updated[name] = history + text if isinstance(history, str) else [*history, reply]
    return updated
