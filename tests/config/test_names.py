"""A name that is no dial is answered with what it is called now, or here, or with the nearest."""

import re

import pytest

from pipeline.config.commands import Compose, Inspect, MergeAdapter, Search, Verify
from pipeline.config.names import ELSEWHERE, RENAMED, nearest, unknown
from pipeline.config.parse import Config, flat, parse_command
from pipeline.config.stages import PPO, SFT, Evaluate, Merge, Pretrain, Reward

KINDS = {
    kind.__name__.lower(): kind for kind in (*Config.__constraints__, Compose, Verify, Inspect, MergeAdapter, Search)
}


@pytest.mark.parametrize(
    ("kind", "old", "now"),
    [
        *((kind, "epochs", "num_train_epochs") for kind in (Pretrain, SFT, Reward)),
        *((kind, "warmup", "warmup_steps") for kind in (Pretrain, SFT, Reward)),
        *((kind, "checkpoint_every", "save_steps") for kind in (Pretrain, SFT, Reward, PPO, Merge, Evaluate)),
        *((kind, "lora_rank", "lora_r") for kind in (SFT, Reward, PPO)),
        (SFT, "rslora", "use_rslora"), (SFT, "dora", "use_dora"), (SFT, "adapter_targets", "target_modules"),
        (Pretrain, "steps", "max_steps"), (Pretrain, "layers", "num_hidden_layers"),
        (Pretrain, "heads", "num_attention_heads"), (Pretrain, "packing", "packing_strategy"),
        (SFT, "max_tokens", "max_length"), (Reward, "max_tokens", "max_length"),
        (PPO, "epochs", "num_ppo_epochs"), (PPO, "minibatches", "num_mini_batches"), (PPO, "adam_eps", "adam_epsilon"),
        (PPO, "clip", "cliprange"), (PPO, "value_clip", "cliprange_value"), (PPO, "value_coef", "vf_coef"),
        (PPO, "eval_every", "eval_steps"),
    ],
)  # fmt: skip
def test_an_old_name_is_refused_with_the_new_one(write, refused, kind, old, now):
    file = write(f"{old}: 1\n")
    assert refused(kind, "--config", file) == f"{file}: '{old}' is now called '{now}'"
    empty = write("", "empty.yaml")
    assert refused(kind, "--config", empty, f"--{old}=1") == f"'{old}' is now called '{now}'"
    assert refused(kind, "--config", empty, f"--{old}", "1") == f"'{old}' is now called '{now}'"


def test_an_old_name_of_a_command_is_refused_with_the_new_one(capsys):
    with pytest.raises(SystemExit):
        parse_command(Search, "x", ["a", "--max_tokens", "9"])
    assert capsys.readouterr().err == "error: 'max_tokens' is now called 'max_length'\n"


@pytest.mark.parametrize(
    ("kind", "name", "says"),
    [
        (PPO, "response_length", "'response_length' is called 'max_new_tokens' here"),
        (PPO, "per_device_train_batch_size", "'per_device_train_batch_size' is called 'micro_batch' here"),
        (SFT, "per_device_train_batch_size", "'per_device_train_batch_size' is called 'micro_batch' here"),
        (PPO, "missing_eos_penalty", "'missing_eos_score', which replaces the score"),
        (PPO, "total_episodes", "say 'rollouts'"),
        (PPO, "batch_size", "'batch_size' is called 'rollout_batch' here"),
        (PPO, "num_train_epochs", "say 'rollouts' for all of training, 'num_ppo_epochs'"),
        (SFT, "bf16", "say 'precision'"),
        (SFT, "fp16", "say 'precision'"),
        (SFT, "output_dir", "say 'runs' and 'recipe'"),
        (SFT, "warmup_ratio", "say 'warmup_steps': below 1 it is a share of all steps"),
        (SFT, "label_smoothing_factor", "'label_smoothing', (K-1)/K of it: spread over the K-1 wrong classes"),
        (Pretrain, "max_length", "'max_length' is called 'context' here"),
        (Pretrain, "model_name_or_path", "'model_name_or_path' is called 'init' here"),
        (Reward, "model_name_or_path", "'model_name_or_path' is called 'base' here"),
        (PPO, "ppo_target", "'ppo_target' is called 'adaptive_kl' here"),
        (PPO, "warmup_ratio", "unknown dial 'warmup_ratio'"),  # PPO has no warm-up of its rate
        (SFT, "missing_eos_penalty", "unknown dial 'missing_eos_penalty'"),
        (SFT, "clip", "unknown dial 'clip'"),
    ],
)
def test_a_name_of_trl_or_transformers_is_answered_where_it_has_a_meaning_here(write, refused, kind, name, says):
    file = write(f"{name}: 1\n")
    assert says in refused(kind, "--config", file)
    assert says in refused(kind, "--config", write("", "empty.yaml"), f"--{name}=1")


def answered(table: dict[str, str]) -> list[tuple[str, str, str]]:
    """Stage, name and answer, for each stage in which a table answers."""
    found = []
    for stage, kind in KINDS.items():
        for name in {key.rpartition(".")[2] for key in table}:
            says = table.get(f"{stage}.{name}", table.get(name, ""))
            if set(re.findall(r"'(\w+)'", says) or [says]) & set(flat(kind())):
                found.append((stage, name, says))
    return found


@pytest.mark.parametrize("table", [RENAMED, ELSEWHERE])
def test_every_answer_is_given_somewhere_and_names_dials_of_that_stage(table):
    found = answered(table)
    assert {says for _, _, says in found} == set(table.values())
    for stage, name, says in found:
        known = flat(KINDS[stage]())
        assert set(re.findall(r"'(\w+)'", says) or [says]) <= set(known), (stage, name)
        assert says in unknown(name, known, stage) or name in known


def test_no_old_name_is_a_dial_of_its_stage():
    """Else an old config would be read, with another meaning."""
    for stage, name, now in answered(RENAMED):
        assert name not in flat(KINDS[stage]()), f"{stage}: {name} is a dial, and {now} was called so"


def test_no_name_stands_in_both_tables():
    assert RENAMED.keys() & ELSEWHERE.keys() == set()


def test_the_nearest_is_named_where_one_is_near():
    assert nearest("kl_coeff", ["kl_coef", "gamma"]) == "; did you mean 'kl_coef'?"
    assert nearest("colour", ["kl_coef", "gamma"]) == ""
