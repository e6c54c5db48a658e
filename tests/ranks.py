"""All stages in one launch, for tests/test_distributed.py: what several processes leave is compared with what one does.

    accelerate launch --config_file configs/accelerate/zero3.yaml tests/ranks.py FOLDER NAME

FOLDER has the parents (see the test); everything goes to FOLDER/NAME/.
"""

import dataclasses
import json
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from experiences import to_experience
from safetensors.torch import save_file

from pipeline import ppo, pretrain, reward, sft
from pipeline.config.dials import Adapter, Optim, Run, Sampling
from pipeline.config.stages import PPO, SFT, Pretrain, Reward
from pipeline.data.tokenizer import load_tokenizer
from pipeline.models.actor_critic import ActorCritic, add_reward_model
from pipeline.models.heads import Critic, ValueHead, load_reward_model
from pipeline.models.loading import Policy, load_language_model, unwrap_peft, wrap_with_adapter
from pipeline.models.sharding import full_state_dict
from pipeline.rl import monitor, setup
from pipeline.rl.rollout import Rollout, generate
from pipeline.runtime.console import silence_libraries
from pipeline.runtime.launch import new_accelerator
from pipeline.runtime.precision import autocast
from pipeline.runtime.process import processes
from pipeline.runtime.stage_run import StageRun

SAMPLING = Sampling(max_new_tokens=8, max_prompt_tokens=16, temperature=0.7)
LORA = Adapter(adapter="lora", lora_r=2)


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
        validation_file=file["demonstrations"],
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
        sampling=SAMPLING,
    )  # fmt: skip
    elsewhere = partial(dataclasses.replace, run)
    return {
        "pretrain": Pretrain(
            run=run, optim=optim, train_file=file["texts"], validation_file=file["texts"], tokenizer="char",
            hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, context=48,
            sample_tokens=4, max_steps=2,
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


STAGES = {"pretrain": pretrain, "sft": sft, "reward": reward, "ppo": ppo}


class CutOff(RuntimeError):
    """In place of a power cut."""


@contextmanager
def cut_off(after: int) -> Iterator[None]:
    """Within it a stage ends as soon as its checkpoint of that step is written."""
    save = StageRun.save_checkpoint

    def then_stop(run: StageRun, step: int, write: Callable[[Path], None], state: Mapping[str, Any]) -> None:
        save(run, step, write, state)
        if step == after:
            raise CutOff

    StageRun.save_checkpoint = then_stop  # type: ignore[method-assign]
    try:
        yield
    except CutOff:
        pass
    finally:
        StageRun.save_checkpoint = save  # type: ignore[method-assign]


def changed(config: Any, **values: Any) -> Any:
    """The config with other values, wherever its dials stand."""
    own = {field.name for field in dataclasses.fields(config)}
    run = {name: value for name, value in values.items() if name not in own}
    here = {name: value for name, value in values.items() if name in own}
    return dataclasses.replace(config, run=dataclasses.replace(config.run, **run), **here)


def fixed_update(folder: Path, out: Path, kind: str) -> None:
    """One PPO update on rollouts that do not depend on the number of processes; rank r of n learns from rows r::n.

    `fixed`: LoRA with a critic of its own; `fixed_full`: all weights with a head; `fixed_bf16`: that in bf16;
    `fixed_nan`: `fixed_full` after an update in which one process has an advantage that is no number; `fixed_roles`:
    four roles on one base; `fixed_roles_again`: these with activations computed again.
    """
    config = configs(folder, out, "fixed")["ppo"]
    config = changed(
        config, num_mini_batches=1, num_ppo_epochs=3, precision="bf16" if kind == "fixed_bf16" else "fp32",
        gradient_checkpointing=kind == "fixed_roles_again",
    )  # fmt: skip
    accelerator = new_accelerator(config.run.precision)
    paths = folder / "parents"
    tokenizer = load_tokenizer(paths / "sft/final")
    policy, judge = load_language_model(paths / "sft/final"), load_reward_model(paths / "reward/final").eval()
    reference = load_language_model(paths / "pretrain/final").eval()
    prompts = [json.loads(line)["prompt"] for line in (folder / "prompts.jsonl").read_text().splitlines()][:8]
    torch.manual_seed(1)
    rollout = generate(policy, tokenizer, prompts, SAMPLING)
    mine = slice(accelerator.process_index, None, accelerator.num_processes)
    rollout = Rollout(**{f.name: getattr(rollout, f.name)[mine] for f in dataclasses.fields(Rollout)})
    torch.manual_seed(2)
    full = kind in ("fixed_full", "fixed_bf16", "fixed_nan")
    actor: Policy = policy if full else wrap_with_adapter(unwrap_peft(policy), LORA)
    head = add_reward_model(folder / "parents_lora/reward/final", actor) if "roles" in kind else None
    assert head is None or isinstance(head, ValueHead)
    critic = ValueHead(16) if full else Critic(judge)
    if head is not None:
        critic = setup.add_critic("reward", actor, head, tokenizer.pad_token_id)
    actor_critic = ActorCritic(actor, critic, SAMPLING.temperature, tokenizer.pad_token_id, head).eval()
    start = {name: p.detach().clone() for name, p in actor_critic.named_parameters()}
    learns = {name for name, p in actor_critic.named_parameters() if p.requires_grad}
    if config.gradient_checkpointing:
        actor_critic.checkpoint_activations()
    optimizer, _ = setup.make_optimizer(actor_critic, config)
    prepared, optimizer = setup.prepare(accelerator, actor_critic, optimizer, config)
    against = setup.reference_forward(prepared, reference, SAMPLING.temperature, tokenizer.pad_token_id)
    score = setup.reward_score(prepared, judge if head is None else head, accelerator.device)
    with autocast(config.run.precision):
        experience = to_experience(
            rollout, prepared, against, score, config, partial(accelerator.reduce, reduction="sum")
        )
    if kind == "fixed_nan":
        right = experience.advantages.clone()
        if accelerator.is_main_process:
            experience.advantages[0, 0] = torch.nan
        spoilt, in_a_row = ppo.update(prepared, optimizer, experience, config, accelerator, True)
        assert (spoilt["skipped_updates"], in_a_row) == (3, 3), spoilt
        experience.advantages.copy_(right)
    torch.manual_seed(3)
    metrics, _ = ppo.update(prepared, optimizer, experience, config, accelerator, True)
    metrics |= monitor.rollout_metrics(experience, accelerator, config, config.kl_coef)
    weights = full_state_dict(actor_critic)
    moved = {name for name, weight in weights.items() if name in start and not torch.equal(weight, start[name])}
    assert moved == learns, moved ^ learns
    same = accelerator.gather(torch.stack([w.double().sum() for w in weights.values()])[None])
    assert (same == same[0]).all(), "ranks have drifted apart"
    if processes().is_main_process:
        save_file({key: w.contiguous().clone() for key, w in weights.items()}, out / f"{kind}.safetensors")
        (out / f"{kind}.json").write_text(json.dumps(metrics))
    accelerator.free_memory()


def fresh(train: Callable[[Any], object], config: Any) -> None:
    train(config)
    AcceleratorState._reset_state(reset_partial_state=True)


FIXED = ("fixed", "fixed_full", "fixed_roles", "fixed_roles_again")
UPDATES = (*FIXED, "fixed_bf16", "fixed_nan")
RESUMED = ("sft", "ppo_full", "ppo_roles")


def main(folder: Path, name: str, what: str = "all") -> None:
    silence_libraries()
    out = folder / name
    out.mkdir(exist_ok=True)
    for kind in UPDATES if what in ("all", "updates") else ():
        fresh(partial(fixed_update, folder, out), kind)
    stages = configs(folder, out, "tiny")
    for stage in stages if what in ("all", "stages") else ():
        fresh(STAGES[stage.split("_")[0]].train, stages[stage])
    cut = {stage: changed(configs(folder, out, "cut")[stage], save_steps=1) for stage in RESUMED}
    if what == "all":
        for stage in RESUMED:  # the last checkpoint of one is left for another launch
            with cut_off(2):
                STAGES[stage.split("_")[0]].train(cut[stage])
            AcceleratorState._reset_state(reset_partial_state=True)
            if processes().is_main_process:
                shutil.copytree(cut[stage].run.folder(stage[:3]), out / "left" / cut[stage].run.recipe / stage[:3])
            processes().wait_for_everyone()
    for stage in RESUMED if what in ("all", "resume") else ():
        fresh(STAGES[stage.split("_")[0]].train, cut[stage])
    print(f"rank {processes().process_index}: all done", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
