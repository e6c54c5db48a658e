"""The YAML file first, then the command line; whatever is wrong is one sentence with status 2, never a traceback."""

import dataclasses
import subprocess
import sys
import types
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.config.dials import Reading, exact
from pipeline.config.errors import ConfigError
from pipeline.config.parse import flat, identity, parse
from pipeline.config.stages import PPO, SFT, Chat, Evaluate, Merge, Pretrain, Reward
from pipeline.config.values import dials

ROOT = Path(__file__).resolve().parent.parent.parent
KINDS = (Pretrain, SFT, Reward, PPO, Merge, Evaluate, Chat)
PLACES = {
    "chat_template",
    "gradient_checkpointing",
    "max_bad_rows",
    "micro_batch",
    "runs",
    "report_to",
    "patience",
    "save_steps",
    "train_file",
    "validation_file",
    "sft",
    "reward",
    "judge_file",
}


def test_the_defaults_of_ppo_are_those_that_its_page_argues_for():
    config = PPO()
    assert (config.gamma, config.lam, config.cliprange, config.adam_epsilon) == (1.0, 0.95, 0.2, 1e-5)
    assert (config.missing_eos_score, config.critic_warmup, config.entropy_coef) == (-1.0, 10, 0.0)
    assert (config.critic, config.max_grad_norm, config.adaptive_kl) == ("reward", 1.0, None)


def test_an_empty_file_means_the_defaults(write):
    for text in ("", "# only a comment\n"):
        assert parse(PPO, ["--config", write(text)]) == PPO()


def test_yaml_overrides_the_default_and_the_command_line_wins(write):
    file = write("seed: 7\ncliprange: 0.3\n")
    parsed = parse(PPO, [f"--config={file}", "--seed", "9"])
    assert (parsed.run.seed, parsed.cliprange, parsed.gamma) == (9, 0.3, PPO().gamma)
    assert parse(PPO, ["--seed=9", "--config", file]) == parsed  # in whatever order


def test_the_default_file_is_the_default_recipes(tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    assert "configs/imdb/sft.yaml" in refused(SFT)
    (tmp_path / "configs" / "imdb").mkdir(parents=True)
    (tmp_path / "configs" / "imdb" / "sft.yaml").write_text("max_length: 77\n")
    assert parse(SFT, []).max_length == 77


@pytest.mark.parametrize(
    ("kind", "line", "dial", "value"),
    [
        (SFT, "use_rslora: true", "use_rslora", True),
        (SFT, "use_rslora: false", "use_rslora", False),
        (SFT, "use_rslora: yes", "use_rslora", True),  # YAML 1.1
        (PPO, "missing_eos_score: none", "missing_eos_score", None),
        (PPO, "missing_eos_score: null", "missing_eos_score", None),
        (PPO, "missing_eos_score:", "missing_eos_score", None),
        (PPO, "missing_eos_score: -2.5", "missing_eos_score", -2.5),
        (PPO, "missing_eos_score: -3", "missing_eos_score", -3.0),
        (PPO, "learning_rate: 1e-4", "learning_rate", 1e-4),  # a string to YAML 1.1
        (PPO, "learning_rate: 1.0e-4", "learning_rate", 1e-4),
        (PPO, "learning_rate: 0", "learning_rate", 0.0),
        (PPO, "gamma: 1", "gamma", 1.0),
        (SFT, "warmup_steps: 0.1", "warmup_steps", 0.1),
        (SFT, "warmup_steps: 500", "warmup_steps", 500.0),
        (PPO, "seed: 0", "seed", 0),
        (PPO, "seed: 1", "seed", 1),
        (PPO, "adapter: none", "adapter", "none"),
        (Pretrain, "report_to: none", "report_to", "none"),
        (SFT, "base: ''", "base", ""),
        (Chat, "prompt: '--seed 3 = 50 % of: #it'", "prompt", "--seed 3 = 50 % of: #it"),
        (Chat, 'recipe: "12"', "recipe", "12"),
    ],
)
def test_a_yaml_value_survives(write, kind, line, dial, value):
    got = flat(parse(kind, ["--config", write(line + "\n")]))[dial]
    assert got == value
    assert type(got) is type(value)  # True == 1 == 1.0


@pytest.mark.parametrize(
    ("kind", "line", "dial", "says"),
    [
        (SFT, "batch_size: 12.5", "batch_size", "expected an integer, got '12.5'"),
        (SFT, "batch_size: 12.0", "batch_size", "expected an integer"),
        (SFT, "batch_size: many", "batch_size", "expected an integer, got 'many'"),
        (SFT, "batch_size: true", "batch_size", "expected an integer, got 'true'"),
        (SFT, "batch_size:", "batch_size", "expected an integer, got 'none'"),
        (SFT, "batch_size: [1, 2]", "batch_size", "expected one value, got list"),
        (SFT, "batch_size: {a: 1}", "batch_size", "expected one value, got dict"),
        (SFT, "batch_size: 2020-02-02", "batch_size", "expected an integer"),
        (SFT, "learning_rate: fast", "learning_rate", "expected a number, got 'fast'"),
        (SFT, "learning_rate: false", "learning_rate", "expected a number"),
        (SFT, "learning_rate: .nan", "learning_rate", "expected a finite number"),
        (SFT, "learning_rate: nan", "learning_rate", "expected a finite number"),
        (SFT, "learning_rate: .inf", "learning_rate", "expected a finite number"),
        (PPO, "missing_eos_score: -.inf", "missing_eos_score", "expected a finite number"),
        (SFT, "learning_rate: none", "learning_rate", "expected a number, got 'none'"),
        (SFT, "warmup_steps: -0.1", "warmup_steps", "expected at least 0, got '-0.1'"),
        (SFT, "use_rslora: 1", "use_rslora", "expected true or false, got '1'"),
        (SFT, "use_rslora: maybe", "use_rslora", "expected true or false"),
        (SFT, "precision: fp8", "precision", "expected one of auto, fp32, bf16, fp16, got 'fp8'"),
        (SFT, "report_to: no", "report_to", "expected one of wandb, tensorboard, trackio, none, got 'false'"),
        (SFT, "batch_size: 0", "batch_size", "expected at least 1, got '0'"),
        (SFT, "seed: -1", "seed", "expected at least 0, got '-1'"),
        (PPO, "gamma: 1.01", "gamma", "expected at most 1, got '1.01'"),
        (SFT, "base:", "base", "expected text, got none"),
        (SFT, "recipe: 12", "recipe", "expected text, got 12"),
        (SFT, "recipe: true", "recipe", "expected text, got true"),
        (SFT, "bach_size: 3", "bach_size", "unknown dial 'bach_size'; did you mean 'batch_size'?"),
        (SFT, "yield: 3", "yield", "unknown dial 'yield'"),
        (SFT, "config: other.yaml", "config", "unknown dial 'config'"),
        (SFT, "help: true", "help", "unknown dial 'help'"),
        (SFT, "3: 4", "3", "unknown dial '3'"),
        (SFT, "cliprange: 0.1", "cliprange", "unknown dial 'cliprange'"),  # a dial of another stage
    ],
)
def test_a_wrong_line_of_yaml_names_file_and_key(write, refused, kind, line, dial, says):
    file = write(f"runs: here\n{line}\n")
    message = refused(kind, "--config", file)
    assert message.startswith(f"{file}: ")
    assert dial in message
    assert says in message
    assert "did you mean 'config'" not in message


def test_every_wrong_value_is_named_even_where_the_command_line_overrides_it(write, refused):
    file = write("seed: x\n")
    assert refused(SFT, "--config", file, "--seed", "1") == f"{file}: seed: expected an integer, got 'x'"


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--batch_size", "12.5"], "argument --batch_size: expected an integer, got '12.5'"),
        (["--batch_size=0"], "argument --batch_size: expected at least 1, got '0'"),
        (["--learning_rate", "nan"], "argument --learning_rate: expected a finite number"),
        (["--precision", "fp8"], "argument --precision: expected one of auto, fp32, bf16, fp16"),
        (["--use_rslora", "2"], "argument --use_rslora: expected true or false"),
        (["--batchsize", "3"], "unknown dial 'batchsize'; did you mean 'batch_size'?"),
        (["--batchsize=3"], "unknown dial 'batchsize'; did you mean 'batch_size'?"),
        (["--batch", "3"], "unknown dial 'batch'"),  # no abbreviations: a new dial must not change an old command
        (["--seed"], "argument --seed: expected one argument"),
        (["stray"], "unknown dial 'stray'"),
        ([""], "unknown dial ''"),
    ],
)
def test_a_wrong_command_line_names_the_dial(write, refused, argv, says):
    assert says in refused(SFT, "--config", write("# nothing\n"), *argv)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"a: [1,\nb: 2", "not readable as YAML"),
        (b"seed: 1\n  lr: 2\n", "not readable as YAML"),
        (b"recipe: !!python/object/apply:os.getcwd []", "not readable as YAML"),
        (b"recipe: 2020-13-45", "not readable as YAML"),  # PyYAML's ValueError, not its own error
        (b"recipe: \xff\xfe\xfa", "not readable as YAML"),
        (b"- seed\n- 1\n", "expected `dial: value` lines"),
        (b"seed", "expected `dial: value` lines"),
        (b"false", "expected `dial: value` lines"),
    ],
)
def test_a_file_that_is_not_lines_of_dials_is_named(tmp_path, refused, content, says):
    file = tmp_path / "odd.yaml"
    file.write_bytes(content)
    message = refused(SFT, "--config", str(file))
    assert message.startswith(f"{file}: ")
    assert says in message


def test_a_repeated_key_is_refused_with_both_lines(write, refused):
    """YAML's own rule would be that the last one holds, in silence."""
    file = write("# twice\nseed: 1\nruns: here\n\n'seed': 2\n")
    assert refused(SFT, "--config", file) == f"{file}: seed: expected once, got in line 2 and in line 5"
    assert refused(SFT, "--config", file, "--seed", "3").endswith("got in line 2 and in line 5")


def test_a_missing_file_is_named(tmp_path, refused):
    for path in (tmp_path / "none.yaml", tmp_path):
        assert refused(SFT, "--config", str(path)).startswith(f"{path}: no such config file")


def test_dials_that_do_not_go_together_are_refused(write, refused):
    file = write("")
    assert "critic_warmup (4) leaves no rollout of 4" in refused(
        PPO, "--config", file, "--rollouts=4", "--critic_warmup=4"
    )
    assert "rollout_batch / num_mini_batches: 10 does not divide by 3" in refused(
        PPO, "--config", file, "--rollout_batch=10", "--num_mini_batches=3"
    )
    assert "hidden_size / num_attention_heads: 30 does not divide by 4" in refused(
        Pretrain, "--config", file, "--hidden_size=30", "--num_attention_heads=4"
    )


def test_exact_divides_or_raises():
    assert exact(96, 8, "rows") == 12
    for total, parts in ((97, 8), (4, 8), (4, 0), (4, -2)):
        with pytest.raises(ConfigError, match=rf"rows: {total} does not divide by {parts}"):
            exact(total, parts, "rows")


def test_batches_are_shared_out_exactly():
    optim = dataclasses.replace(SFT().optim, batch_size=48, micro_batch=6)
    assert [optim.accumulation(processes) for processes in (1, 2, 4, 8)] == [8, 4, 2, 1]
    with pytest.raises(ConfigError, match="batch_size"):
        optim.accumulation(3)
    ppo = dataclasses.replace(PPO(), rollout_batch=48, num_mini_batches=3, micro_batch=4)
    assert (ppo.per_process(2), ppo.micro_batches(1), ppo.micro_batches(2)) == (24, 4, 2)
    assert dataclasses.replace(ppo, micro_batch=64).micro_batches(2) == 1  # never more than there is
    with pytest.raises(ConfigError, match="micro_batch"):
        dataclasses.replace(ppo, micro_batch=5).micro_batches(1)
    with pytest.raises(ConfigError, match="processes"):
        ppo.per_process(5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_dial_exists_once_and_its_default_passes_its_own_check(kind, write):
    names = [dial.name for dial in dials(kind())]
    assert len(names) == len(set(names))
    assert all(dial.meta["help"] for dial in dials(kind()))
    file = write(yaml.safe_dump(flat(kind())))  # the config.yaml that a run leaves behind
    assert parse(kind, ["--config", file]) == kind()


def test_a_resolved_config_parses_to_itself(write):
    argv = ["--missing_eos_score=none", "--use_rslora=true", "--learning_rate=1e-5", "--recipe=007", "--lora_alpha=3"]
    first = parse(PPO, ["--config", write(""), *argv])
    assert first.run.recipe == "007"
    assert parse(PPO, ["--config", write(yaml.safe_dump(flat(first)))]) == first


def test_identity_leaves_out_places_and_nothing_else():
    moved = dataclasses.replace(
        PPO(), run=dataclasses.replace(PPO().run, runs="elsewhere", report_to="none", patience=9.0, save_steps=3)
    )
    moved = dataclasses.replace(moved, sft="a", reward="b", train_file="c", validation_file="d", judge_file="e")
    assert identity(moved) == identity(PPO())
    assert set(flat(PPO())) - set(identity(PPO())) == PLACES
    for changed in (
        dataclasses.replace(PPO(), cliprange=0.19),
        dataclasses.replace(PPO(), run=dataclasses.replace(PPO().run, seed=1)),
        dataclasses.replace(PPO(), run=dataclasses.replace(PPO().run, reading=Reading(columns="prompt=question"))),
        dataclasses.replace(PPO(), sampling=dataclasses.replace(PPO().sampling, temperature=0.9)),
    ):
        assert identity(changed) != identity(PPO())


def test_folders():
    run = dataclasses.replace(SFT().run, runs="r", recipe="x")
    assert run.folder("sft") == Path("r/x/sft")
    assert run.final("sft") == Path("r/x/sft/final")
    assert run.final("sft", "given") == Path("given")


def test_parsing_imports_no_deep_learning_library(write):
    script = f"""
import sys
from pipeline.config.parse import parse
from pipeline.config.stages import PPO
parse(PPO, ["--config", {write("cliprange: 0.1")!r}])
print({{"torch", "transformers", "accelerate", "datasets", "numpy"}} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def attempt(file: Path) -> tuple[PPO | None, object]:
    """The parsed config, or None with the exit status; any other exception passes through."""
    try:
        return parse(PPO, ["--config", str(file)]), 0
    except SystemExit as stopped:
        return None, stopped.code


NAMES = st.one_of(st.sampled_from(sorted(flat(PPO()))), st.sampled_from(["config", "help", "-x", "--seed"]), st.text())
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.dates(), st.datetimes(), st.binary(max_size=4),
    st.sampled_from(["none", "true", "1e-4", "-1", "--seed=3", "lora", "bf16", "%", "@x"]),
)  # fmt: skip


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    derandomize=True,
)
@given(st.dictionaries(NAMES, SCALARS, max_size=4))
def test_any_scalars_parse_or_end_with_status_2(tmp_path, capsys, rows):
    file = tmp_path / "any.yaml"
    file.write_text(yaml.safe_dump(rows, allow_unicode=True), encoding="utf-8")
    parsed, status = attempt(file)
    error = capsys.readouterr().err
    if parsed is None:
        assert status == 2
        assert error.startswith("error: ")
    else:
        assert set(rows) <= set(flat(parsed))
        for dial in dials(parsed):
            assert type(dial.value) in (dial.type.__args__ if isinstance(dial.type, types.UnionType) else (dial.type,))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(st.sampled_from(sorted(flat(PPO()))), SCALARS)
def test_one_dial_of_any_value_parses_or_is_named(tmp_path, capsys, name, value):
    file = tmp_path / "one.yaml"
    file.write_text(yaml.safe_dump({name: value}), encoding="utf-8")
    parsed, status = attempt(file)
    error = capsys.readouterr().err
    if parsed is None:
        assert status == 2
        assert name in error
    else:
        assert {k: v for k, v in flat(parsed).items() if k != name} == {
            k: v for k, v in flat(PPO()).items() if k != name
        }
