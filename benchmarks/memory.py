"""Peak memory of PPO with four roles on one base, beside training one adapter and beside models of their own.

python benchmarks/memory.py [--checkpointing false true] [--cases adapter roles separate]

A model of SmolLM2-135M's shape with random weights (Llama, 30 layers, hidden 576, 9 heads, 3 of keys and values, MLP
1536, vocabulary 49,152, tied, fp32), LoRA of rank 16 on every linear layer, 8 rows of 64 + 192 tokens. Every case is a
process of its own; its figure is the highest resident size less the resident size before anything was loaded. PPO
samples, scores and makes one update; an adapter alone makes two steps of SFT. The allocator gives every large tensor's
memory back when it is freed, so that the figure is what was needed; what glibc keeps by itself comes on top of it.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

ROWS, PROMPT, RESPONSE = 8, 64, 192
CASES = {
    "adapter": "one LoRA adapter in training (SFT)",
    "roles": "PPO: policy, reference, critic and reward model on one base",
    "separate": "PPO: LoRA policy and its base, reward model and critic of their own",
}


def kibibytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def make_parents(folder: Path) -> None:
    """An SFT policy, a reward model that is an adapter on it and one that is not, each a stage's `final/`."""
    import torch
    from peft import TaskType
    from transformers import AutoModelForCausalLM, LlamaConfig

    from pipeline.config.dials import Adapter
    from pipeline.data.tokenizer import train_tokenizer
    from pipeline.models.fresh_adapter import wrap_with_adapter
    from pipeline.models.heads import new_reward_model
    from pipeline.models.saving import save_policy, save_with_base

    torch.manual_seed(0)
    tokenizer = train_tokenizer("bpe", ["a few words"], 300)
    config = LlamaConfig(
        vocab_size=49_152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True, pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    save_policy(AutoModelForCausalLM.from_config(config), tokenizer, folder / "sft")
    reward_model = new_reward_model(folder / "sft", tokenizer)
    save_with_base(reward_model, folder / "separate")
    save_with_base(wrap_with_adapter(reward_model, Adapter(adapter="lora"), TaskType.SEQ_CLS), folder / "roles")


def one_adapter(folder: Path, checkpointing: bool) -> None:
    import torch

    from pipeline.config.dials import Adapter
    from pipeline.core.losses import next_token_loss
    from pipeline.core.tensors import masked_mean
    from pipeline.models.loading import load_policy, unwrap_peft
    from pipeline.runtime.internals import enable_activation_checkpointing

    model = load_policy(folder / "sft", Adapter(adapter="lora")).train()
    if checkpointing:
        enable_activation_checkpointing(unwrap_peft(model))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-4)
    for _ in range(2):
        ids = torch.randint(10, 300, (ROWS, PROMPT + RESPONSE))
        labels = ids.clone()
        labels[:, :PROMPT] = -100
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        masked_mean(*next_token_loss(logits, labels, 0.0)).backward()
        del logits
        optimizer.step()
        optimizer.zero_grad()


def ppo_with(reward: str, folder: Path, checkpointing: bool) -> None:
    import torch
    from accelerate import Accelerator

    from pipeline import ppo
    from pipeline.config.dials import Adapter, Sampling
    from pipeline.config.stages import PPO
    from pipeline.core.tensors import identity, response_mask
    from pipeline.data.tokenizer import load_tokenizer
    from pipeline.models.actor_critic import ActorCritic, add_reward_model
    from pipeline.models.heads import ValueHead
    from pipeline.models.loading import load_policy
    from pipeline.rl import setup
    from pipeline.rl.experience import make_experience, score_rollout
    from pipeline.rl.rollout import Rollout, generate

    config = PPO(
        sampling=Sampling(max_new_tokens=RESPONSE, max_prompt_tokens=PROMPT), rollout_batch=ROWS, micro_batch=ROWS,
        num_ppo_epochs=1, num_mini_batches=1, gradient_checkpointing=checkpointing, critic_warmup=0,
    )  # fmt: skip
    accelerator = Accelerator(cpu=True)
    tokenizer = load_tokenizer(folder / "sft")
    policy = load_policy(folder / "sft", Adapter(adapter="lora"))
    reward_model = add_reward_model(folder / reward, policy)
    critic = setup.add_critic("reward", policy, reward_model, tokenizer.pad_token_id)
    head = reward_model if isinstance(reward_model, ValueHead) else None
    actor_critic = ActorCritic(policy, critic, 1.0, tokenizer.pad_token_id, head).eval()
    if checkpointing:
        actor_critic.checkpoint_activations()
    optimizer, _ = setup.make_optimizer(actor_critic, config)
    reference = setup.reference_forward(actor_critic, None, 1.0, tokenizer.pad_token_id)
    score = setup.reward_score(actor_critic, reward_model, torch.device("cpu"))
    rollout = generate(policy, tokenizer, ["a few words " * PROMPT] * ROWS, config.sampling)
    full = response_mask(torch.full((ROWS,), RESPONSE), RESPONSE)  # as if none had ended early: the most there can be
    ids = rollout.input_ids.masked_fill(rollout.input_ids == tokenizer.pad_token_id, 10)
    rollout = Rollout(
        **vars(rollout) | {"input_ids": ids, "response_mask": full, "attention_mask": torch.ones_like(ids).bool()}
    )
    assert ids.shape == (ROWS, PROMPT + RESPONSE)
    scored = score_rollout(rollout, actor_critic, reference, score, config.micro_batch)
    experience = make_experience(rollout, scored, config, config.kl_coef, identity)
    ppo.update(actor_critic, optimizer, experience, config, accelerator, True)


def measure(case: str, folder: Path, checkpointing: bool) -> None:
    """Runs a case in this process and prints its figures."""
    from pipeline import ppo  # so that what importing takes is not counted
    from pipeline.runtime.console import silence_libraries

    assert ppo
    silence_libraries()
    before, started = kibibytes("VmRSS"), time.monotonic()
    run = one_adapter if case == "adapter" else partial(ppo_with, case)
    run(folder, checkpointing)
    print(json.dumps({"peak": (kibibytes("VmHWM") - before) / 2**20, "seconds": time.monotonic() - started}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpointing", nargs="+", choices=("false", "true"), default=["false", "true"])
    parser.add_argument("--cases", nargs="+", choices=tuple(CASES), default=list(CASES))
    parser.add_argument(
        "--run", nargs=3, help=argparse.SUPPRESS
    )  # case, folder, checkpointing: in a process of its own
    given = parser.parse_args()
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**20)  # for the processes that are measured
    if given.run is not None:
        if given.run[0] == "parents":
            make_parents(Path(given.run[1]))
        else:
            measure(given.run[0], Path(given.run[1]), given.run[2] == "true")
        return
    print(f"| case | gradient_checkpointing | peak, GiB | of one adapter | seconds ({os.cpu_count()} CPU cores) |")
    print("| --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        own = [sys.executable, __file__, "--run"]
        subprocess.run([*own, "parents", folder, "false"], check=True, stdout=subprocess.DEVNULL)
        for checkpointing in given.checkpointing:
            alone = None
            for case in given.cases:
                done = subprocess.run([*own, case, folder, checkpointing], check=True, capture_output=True, text=True)
                found = json.loads(done.stdout.splitlines()[-1])
                alone = alone or found["peak"]
                print(
                    f"| {CASES[case]} | {checkpointing} | {found['peak']:.2f} | {found['peak'] / alone:.2f} "
                    f"| {found['seconds']:.0f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
