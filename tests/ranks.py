"""Updates and stages in one launch: what several processes leave is compared with what one does.

    accelerate launch --config_file configs/accelerate/zero3.yaml tests/ranks.py FOLDER NAME ITEM...

FOLDER has the parents of `tiny.make_parents`; each of the ITEMS leaves its work in FOLDER/NAME/.
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
from accelerate import Accelerator, DeepSpeedPlugin
from accelerate.state import AcceleratorState
from experiences import to_experience
from safetensors.torch import save_file
from tiny import LORA, SAMPLING, configs
from torch import nn
from torch.distributed.tensor import DTensor

from pipeline import ppo, pretrain, reward, sft
from pipeline.data.tokenizer import load_tokenizer
from pipeline.models.actor_critic import ActorCritic, add_reward_model
from pipeline.models.fresh_adapter import wrap_with_adapter
from pipeline.models.heads import Critic, ValueHead, load_reward_model
from pipeline.models.loading import Policy, load_language_model, unwrap_peft
from pipeline.models.sharding import full_state_dict, is_sharded
from pipeline.rl import monitor, setup
from pipeline.rl.rollout import Rollout, generate
from pipeline.runtime.console import silence_libraries
from pipeline.runtime.launch import new_accelerator
from pipeline.runtime.precision import autocast
from pipeline.runtime.process import processes
from pipeline.runtime.stage_run import StageRun

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


def shard_everything() -> None:
    """Has ZeRO-3 cut the smallest weight too, where it keeps whole what has under 100,000 numbers; and looks.

    Under ZeRO-3 and FSDP2 no process may have all of a weight once a module is prepared.
    """
    complete, prepare = DeepSpeedPlugin.__post_init__, Accelerator.prepare

    def completed(plugin: DeepSpeedPlugin) -> None:
        complete(plugin)
        plugin.deepspeed_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0

    def prepared(accelerator: Accelerator, *given: Any, **named: Any) -> Any:
        made = prepare(accelerator, *given, **named)
        for module in given if is_sharded(accelerator) else ():
            for name, parameter in module.named_parameters() if isinstance(module, nn.Module) else ():
                assert is_cut(parameter), f"{name} is whole on this process"
        return made

    DeepSpeedPlugin.__post_init__, Accelerator.prepare = completed, prepared  # type: ignore[method-assign]


def is_cut(parameter: Any) -> bool:
    """Whether this process has a part of a weight that can be cut: ZeRO-3 cuts any two numbers, FSDP2 any two rows."""
    if hasattr(parameter, "ds_id"):
        is_let_go = parameter.numel() == 0 and not parameter.ds_persist  # after each use
        return is_let_go and parameter.ds_tensor.numel() < max(2, parameter.ds_numel)
    return isinstance(parameter, DTensor) and len(parameter.to_local()) < max(2, len(parameter))


def changed(config: Any, **values: Any) -> Any:
    """The config with other values, wherever its dials stand."""
    own = {field.name for field in dataclasses.fields(config)}
    run = {name: value for name, value in values.items() if name not in own}
    here = {name: value for name, value in values.items() if name in own}
    return dataclasses.replace(config, run=dataclasses.replace(config.run, **run), **here)


def fixed_update(folder: Path, out: Path, kind: str) -> None:
    """Two PPO updates, the critic's alone and both, on rollouts that do not depend on the number of processes; rank r
    of n learns from rows r::n.

    `fixed`: LoRA with a critic of its own; `fixed_full`: all weights with a head; `fixed_bf16`: that in bf16;
    `fixed_nan`: `fixed_full` after an update in which one process has an advantage that is no number; `fixed_roles`:
    four roles on one base; `fixed_roles_again`: these with activations computed again.
    """
    config = configs(folder, out, "fixed")["ppo"]
    config = changed(
        config, num_mini_batches=1, num_ppo_epochs=3, max_grad_norm=0.05,
        precision="bf16" if kind == "fixed_bf16" else "fp32",
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
    ppo.update(prepared, optimizer, experience, config, accelerator, update_policy=False)
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


UPDATES = ("fixed", "fixed_full", "fixed_roles", "fixed_roles_again", "fixed_bf16", "fixed_nan")
WHOLE = ("pretrain", "sft", "sft_lora", "reward", "reward_lora", "ppo", "ppo_full", "ppo_roles")
CUT = ("cut_sft", "cut_ppo_full", "cut_ppo_roles")
ITEMS = (*UPDATES, *WHOLE, *CUT)


def do(item: str, folder: Path, out: Path) -> None:
    """One of ITEMS; or `resume_sft` and the like, the second part alone of what is cut off."""
    kind, _, stage = item.partition("_")
    if item in UPDATES:
        fixed_update(folder, out, item)
    elif item in WHOLE:
        STAGES[kind].train(configs(folder, out, "tiny")[item])
    else:
        config = changed(configs(folder, out, "cut")[stage], save_steps=1)
        train, name = STAGES[stage.partition("_")[0]].train, stage[:3]
        if kind == "cut":
            with cut_off(2):
                train(config)
            AcceleratorState._reset_state(reset_partial_state=True)
            if processes().is_main_process:  # for another launch to go on with
                shutil.copytree(config.run.folder(name), out / "left" / config.run.recipe / name)
            processes().wait_for_everyone()
        train(config)
    AcceleratorState._reset_state(reset_partial_state=True)


def main(folder: Path, name: str, *items: str) -> None:
    silence_libraries()
    shard_everything()
    (folder / name).mkdir(exist_ok=True)
    for item in items:
        do(item, folder, folder / name)
    print(f"rank {processes().process_index}: all done", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
