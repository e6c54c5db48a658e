"""Tiny parents, made once for every test that wants finished stages, and each stage's config on them.

The texts are 32; SFT and reward take 30, so that the last of their batches of 8 is short.
"""

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from pipeline import pretrain, reward, sft
from pipeline.config.dials import Adapter, Optim, Run, Sampling
from pipeline.config.stages import PPO, SFT, Pretrain, Reward

SAMPLING = Sampling(max_new_tokens=8, max_prompt_tokens=16, temperature=0.7)
LORA = Adapter(adapter="lora", lora_r=2)
SIZES: dict[str, Any] = {
    "tokenizer": "char", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "context": 48, "sample_tokens": 4,
}  # fmt: skip


def configs(folder: Path, runs: Path, recipe: str) -> dict[str, Pretrain | SFT | Reward | PPO]:
    """Every stage, full and with an adapter, on the parents of `folder`; batches divide by one and by two processes.

    `ppo_roles` has policy, reference, critic and reward model on one base.
    """
    run = Run(recipe=recipe, runs=str(runs), precision="fp32", report_to="none")
    optim = Optim(learning_rate=1e-2, batch_size=8, micro_batch=2)
    final = {stage: str(folder / f"parents/{stage}/final") for stage in ("pretrain", "sft", "reward")}
    file = {name: str(folder / f"{name}.jsonl") for name in ("texts", "demonstrations", "pairs", "prompts")}
    tuned = SFT(
        run=run, optim=optim, base=final["pretrain"], train_file=file["demonstrations"],
        validation_file=file["demonstrations"], train_rows=30,
    )  # fmt: skip
    aligned = PPO(
        run=run, adapter=LORA, sampling=SAMPLING, sft=final["sft"], reward=final["reward"], train_file=file["prompts"],
        validation_file=file["prompts"], rollouts=3, rollout_batch=8, micro_batch=2, num_ppo_epochs=2,
        num_mini_batches=2,
        critic_warmup=1, eval_steps=2, eval_prompts=6, learning_rate=3e-3, keep="last",
        max_grad_norm=1e9,
    )  # fmt: skip
    scorer = Reward(
        run=run, optim=optim, base=final["pretrain"], sft=final["sft"], train_file=file["pairs"],
        validation_file=file["pairs"], test_file=file["pairs"], prompts_file=file["prompts"], centre_prompts=20,
        sampling=SAMPLING, train_rows=30,
    )  # fmt: skip
    elsewhere = partial(dataclasses.replace, run)
    return {
        "pretrain": Pretrain(
            run=run, optim=optim, train_file=file["texts"], validation_file=file["texts"], max_steps=2, **SIZES
        ),
        "sft": tuned,
        "sft_lora": dataclasses.replace(tuned, run=elsewhere(recipe=f"{recipe}_lora"), adapter=LORA),
        "reward": scorer,
        "reward_lora": dataclasses.replace(scorer, run=elsewhere(recipe=f"{recipe}_lora"), adapter=LORA),
        "ppo": aligned,
        "ppo_full": dataclasses.replace(
            aligned, run=elsewhere(recipe=f"{recipe}_full"), adapter=Adapter(adapter="none"), critic="head",
            max_grad_norm=0.1,
        ),
        "ppo_roles": dataclasses.replace(
            aligned, run=elsewhere(recipe=f"{recipe}_roles"),
            reward=str(folder / "parents_lora/reward/final"),
        ),
    }  # fmt: skip


def make_parents(folder: Path) -> None:
    """Data, a base, an SFT policy and two reward models: the second is an adapter on the policy, as a role must be."""
    words = ["cat", "dog", "hat", "sea"]
    texts = [f"the {a} saw the {b} and the {c}." for a in words for b in words for c in words[:2]]

    def write(name: str, rows: list[dict]) -> str:
        file = folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(file)

    corpus = write("texts", [{"text": text} for text in texts])
    demonstrations = write("demonstrations", [{"prompt": t[:11], "completion": t[11:]} for t in texts])
    pairs = write("pairs", [{"chosen": t, "rejected": t[::-1], "margin": n % 3} for n, t in enumerate(texts)])
    prompts = write("prompts", [{"prompt": text[: 8 + n % 5]} for n, text in enumerate(texts)])
    run = Run(recipe="parents", runs=str(folder), precision="fp32", report_to="none", seed=7)
    optim = Optim(learning_rate=1e-2, batch_size=8, micro_batch=8)
    pretrain.train(Pretrain(run=run, optim=optim, train_file=corpus, validation_file=corpus, **SIZES))
    sft.train(SFT(run=run, optim=optim, train_file=demonstrations, validation_file=demonstrations))
    scorer = Reward(
        run=run, optim=optim, train_file=pairs, validation_file=pairs, test_file=pairs, prompts_file=prompts,
        centre_prompts=20, sampling=Sampling(max_new_tokens=8, max_prompt_tokens=16),
    )  # fmt: skip
    reward.train(scorer)
    policy = str(folder / "parents/sft/final")
    elsewhere, adapter = dataclasses.replace(run, recipe="parents_lora"), Adapter(adapter="lora", lora_r=3)
    reward.train(dataclasses.replace(scorer, run=elsewhere, adapter=adapter, base=policy, sft=policy))


def saved_weights(final: Path) -> dict[str, torch.Tensor]:
    """All that a stage has written, by file and name."""
    return {
        str(f.relative_to(final)) + k: w for f in sorted(final.rglob("*.safetensors")) for k, w in load_file(f).items()
    }
