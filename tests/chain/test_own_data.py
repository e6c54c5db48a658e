"""A user's own pairs of conversations, from the file to an aligned model one can talk to: recipe `own`, made small."""

import json
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline import chat, evaluate, merge, ppo, pretrain, reward, sft
from pipeline.config.dials import Sampling
from pipeline.config.parse import flat, parse
from pipeline.config.stages import PPO, SFT, Chat, Evaluate, Merge, Pretrain, Reward
from pipeline.data.chat_template import TRANSCRIPT_TEMPLATE
from pipeline.data.files import DataError
from pipeline.data.tokenize import decode, prompt_ids
from pipeline.data.tokenizer import load_tokenizer
from pipeline.models.loading import load_language_model
from pipeline.rl.rollout import generate
from pipeline.runtime.finished import read_done, recorded_form

ROOT = Path(__file__).resolve().parent.parent.parent
THINGS = ("cat", "dog", "sea", "hat", "tea", "cake", "mat", "sun")
SMALL = {
    "pretrain": "--vocab_size=300 --hidden_size=16 --intermediate_size=24 --num_hidden_layers=1 "
    "--num_attention_heads=2 --context=96 --num_train_epochs=1",
    "sft": "--max_length=90 --num_train_epochs=1",
    "reward": "--max_length=90 --num_train_epochs=1 --centre_prompts=8",
    "ppo": "--rollouts=2 --rollout_batch=8 --num_mini_batches=2 --micro_batch=2 --critic_warmup=1 --eval_prompts=4",
    "merge": "",
    "evaluate": "--prompts=8 --show=2",
}
SAMPLING = "--max_prompt_tokens=60 --max_new_tokens=8"


def pair(thing: str, number: int) -> dict[str, str]:
    talk = f"\n\nHuman: Is {number} a {thing}?\n\nAssistant: Who asks?\n\nHuman: I do.\n\nAssistant:"
    return {"chosen": f"{talk} Yes, a {thing}.", "rejected": f"{talk} No <eos> {thing}."}


@pytest.fixture(scope="module")
def printed() -> dict[str, str]:
    """What each stage printed."""
    return {}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, printed) -> Path:
    """Every stage of the recipe, one after the other, on transcripts."""
    folder = tmp_path_factory.mktemp("own")
    files = {}
    for name, numbers in {"train": range(5), "validation": range(5, 7), "test": range(7, 10)}.items():
        files[name] = str(folder / f"{name}.jsonl")
        rows = [pair(thing, number) for number in numbers for thing in THINGS]
        Path(files[name]).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    places = {
        "train_file": files["train"], "validation_file": files["validation"], "test_file": files["test"],
        "prompts_file": files["validation"], "probe_file": files["validation"],
    }  # fmt: skip
    kinds = {"pretrain": Pretrain, "sft": SFT, "reward": Reward, "ppo": PPO, "merge": Merge, "evaluate": Evaluate}
    modules = {"pretrain": pretrain, "sft": sft, "reward": reward, "ppo": ppo, "merge": merge, "evaluate": evaluate}
    for stage, kind in kinds.items():
        argv = ["--config", str(ROOT / f"configs/own/{stage}.yaml"), "--runs", str(folder / "runs")]
        argv += ["--report_to", "none", "--precision", "fp32", *SMALL[stage].split()]
        named = places if stage != "evaluate" else {"prompts_file": files["test"]}
        argv += [f"--{field}={file}" for field, file in named.items() if field in flat(kind())]
        if stage in ("reward", "ppo", "evaluate"):
            argv += SAMPLING.split()
        with redirect_stdout(StringIO()) as shown:
            modules[stage].train(parse(kind, argv))
        printed[stage] = shown.getvalue()
    return folder / "runs"


def test_every_stage_keeps_the_template_and_one_tokenizer(runs):
    finals = {stage: runs / "own" / stage / "final" for stage in ("sft", "reward", "ppo", "merge")}
    assert {AutoTokenizer.from_pretrained(final).chat_template for final in finals.values()} == {TRANSCRIPT_TEMPLATE}
    assert AutoTokenizer.from_pretrained(runs / "own/pretrain/final").chat_template is None
    assert len({read_done(final)["tokenizer"] for final in finals.values()}) == 1


def test_the_template_is_given_once_and_the_first_row_shown_with_its_loss(runs, printed):
    assert [stage for stage, text in printed.items() if "no chat template" in text] == ["sft"]
    said = " ".join(printed["sft"].split())
    assert "Who asks?<eos> Human: I do. Assistant:[[ Yes, a cat.<eos>]]" in said
    assert "loss on [[ ]]: <bos>Human: Is 0 a cat? Assistant: Who asks?" in said
    assert "a cat.[[<eos>]]" in " ".join(printed["reward"].split())


def test_each_final_records_its_form_and_ppo_shows_what_it_sends(runs, printed):
    forms = {stage: recorded_form(runs / "own" / stage / "final") for stage in ("pretrain", "sft", "reward", "ppo")}
    assert forms == {"pretrain": "text", "sft": "conversation", "reward": "conversation", "ppo": "conversation"}
    assert recorded_form(runs / "own/merge/final") == "conversation"
    sent = "first prompt, as it is sent: <bos>Human: Is 0 a cat? Assistant: Who asks?<eos> Human: I do. Assistant:"
    assert sent in " ".join(printed["ppo"].split())
    assert "as it is sent: <bos>Human: Is 7 a cat?" in " ".join(printed["evaluate"].split())


def test_each_figure_is_of_the_file_that_its_dial_names(runs):
    """There are 40 rows to train on, 16 to validate on and 24 to test on."""
    own = runs / "own"
    metrics = {stage: read_done(own / stage / "final")["metrics"] for stage in ("sft", "reward")}
    tokenizer = load_tokenizer(own / "sft/final")
    answers = [len(tokenizer(f" Yes, a {thing}.", add_special_tokens=False)["input_ids"]) + 1 for thing in THINGS]
    assert (metrics["sft"]["rows"], metrics["sft"]["validation_tokens"]) == (40, 2 * sum(answers))
    measured = [metrics["reward"][name]["accuracy"]["n"] for name in ("validation", "test")]
    assert (metrics["reward"]["pairs"], measured) == (40, [16, 24])


@pytest.fixture
def texts_file(tmp_path):
    """Rows of text, for every stage."""
    row = {"prompt": "Is it?", "completion": " Yes.", "chosen": " Yes.", "rejected": " No."}
    (tmp_path / "text.jsonl").write_text((json.dumps(row) + "\n") * 20)
    return f"{tmp_path}/text.jsonl"


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo", "evaluate"])
def test_text_after_conversations_is_refused_before_anything_is_trained(stage, runs, texts_file, tmp_path):
    """The policy was trained on conversations; of SFT it is the validation rows that have the other form."""
    kind, train = {
        "sft": (SFT, sft.train), "reward": (Reward, reward.train), "ppo": (PPO, ppo.train),
        "evaluate": (Evaluate, evaluate.train),
    }[stage]  # fmt: skip
    argv = ["--config", str(ROOT / f"configs/own/{stage}.yaml"), "--runs", str(tmp_path), "--report_to", "none"]
    argv += ["--precision", "fp32", *SMALL[stage].split()]
    defaults = flat(kind())
    parents = {"base": "pretrain", "sft": "sft", "reward": "reward", "policy": "merge"}
    argv += [f"--{name}={runs}/own/{parent}/final" for name, parent in parents.items() if name in defaults]
    files = {"train_file", "validation_file", "test_file", "prompts_file"} & defaults.keys()
    argv += [f"--{name}={texts_file}" for name in files]
    if stage == "sft":
        (tmp_path / "talk.jsonl").write_text(json.dumps(pair("cat", 1)) + "\n")
        argv.append(f"--validation_file={tmp_path}/talk.jsonl")
    if stage in ("reward", "ppo", "evaluate"):
        argv += SAMPLING.split()
    expected = (
        r"talk\.jsonl: the form of its rows is conversation, that of .*text\.jsonl is text: write its prompts as text"
    )
    if stage != "sft":
        expected = (
            r"text\.jsonl: the form of its rows is text, that of sft \(.*\) is conversation: write its prompts as m"
        )
    with pytest.raises(DataError, match=expected):
        train(parse(kind, argv))
    assert not list(tmp_path.rglob("metrics.jsonl"))


def test_the_merged_model_answers_through_its_template(runs):
    final = runs / "own/merge/final"
    tokenizer, model = AutoTokenizer.from_pretrained(final), AutoModelForCausalLM.from_pretrained(final)
    asked = [{"role": "user", "content": "Is 3 a cat?"}]
    inputs = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert inputs["input_ids"][0].tolist() == prompt_ids(load_tokenizer(final), [asked])[0]
    output = model.generate(**inputs, max_new_tokens=5)
    assert output.shape[1] > inputs["input_ids"].shape[1]


def test_the_evaluation_without_sentiment_judges_is_whole(runs):
    report = json.loads((runs / "own/evaluate/final/evaluation.json").read_text())
    assert list(report["ppo_against_sft"]) == ["score"]
    assert report["judge_accuracy"] is None
    page = (runs / "own/evaluate/final/evaluation.md").read_text()
    assert "No judge but the reward" in page
    assert "VADER" not in page
    assert "**I do.** …" in page


def test_samples_show_what_was_asked(runs):
    rows = [json.loads(line) for line in (runs / "own/ppo/samples.jsonl").read_text().splitlines()]
    assert {row["prompt"] for row in rows} == {"I do."}


@pytest.fixture
def talked(runs):
    argv = [
        "--config",
        str(ROOT / "configs/own/chat.yaml"),
        "--runs",
        str(runs),
        "--max_new_tokens",
        "6",
        "--seed",
        "3",
    ]
    return parse(Chat, argv)


def test_chat_streams_remembers_and_compares(talked, runs, capsys, monkeypatch):
    """Two turns: what is printed is what each policy sampled for its own talk so far, from the same noise."""
    asked, seen = iter(["Is 1 a hat?", "And 2?", "/new", "Is 1 a hat?", ""]), []
    monkeypatch.setattr(chat.console, "input", lambda _: next(asked))
    monkeypatch.setattr(chat, "generate", lambda *given: (seen.append(given[2][0]), generate(*given))[1])
    chat.talk(talked)
    printed = capsys.readouterr().out
    tokenizer = load_tokenizer(runs / "own/sft/final")
    for place, (name, stage) in enumerate({"base": "pretrain", "sft": "sft", "ppo": "merge"}.items()):
        model = load_language_model(runs / "own" / stage / "final").eval()
        said, turns = [], []
        for question in ("Is 1 a hat?", "And 2?"):
            said.append({"role": "user", "content": question})
            turns.append(list(said))
            torch.manual_seed(3)
            text = decode(tokenizer, generate(model, tokenizer, [said], talked.sampling).responses[0].tolist())
            assert squeezed(f"{name}:{text}") in squeezed(printed)
            said.append({"role": "assistant", "content": text.strip()})
        assert seen[place::3] == [*turns, turns[0]]  # after /new the first turn again


def test_in_the_form_of_text_chat_goes_on_with_the_text(saved, tokenizer, capsys):
    models = {"sft": load_language_model(saved["llama"]).eval()}
    first = chat.answer("the cat", {}, models, tokenizer, "text", Sampling(max_new_tokens=5), 1)
    assert first["sft"].startswith("the cat")
    second = chat.answer(" sat", first, models, tokenizer, "text", Sampling(max_new_tokens=5), 1)
    assert second["sft"].startswith(first["sft"] + " sat")
    assert squeezed(second["sft"].removeprefix(first["sft"])) in squeezed(capsys.readouterr().out)


def squeezed(text: str) -> str:
    return "".join(text.split())


@pytest.mark.parametrize("policies", ["sft,robot", ""])
def test_an_unknown_policy_is_refused(policies, capsys):
    with pytest.raises(SystemExit, match="2"):
        parse(Chat, ["--config", str(ROOT / "configs/own/chat.yaml"), "--policies", policies])
    assert "policies: expected some of base,sft,ppo" in capsys.readouterr().err


STREAM = SMALL["pretrain"].replace("=96", "=16") + " --batch_size=4 --micro_batch=4"


def streaming(folder, *more):
    argv = ["--config", str(ROOT / "configs/own/pretrain.yaml"), "--runs", str(folder / "runs"), "--report_to", "none"]
    return parse(Pretrain, [*argv, "--precision", "fp32", *STREAM.split(), "--stream", "true", *more])


@pytest.fixture
def texts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"text": f"{i} is a {THINGS[i % 8]} and {i * i} is not a {THINGS[i * i % 8]}."} for i in range(400)]
    Path("texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:9]))
    return tmp_path


FILES = ("--train_file", "texts.jsonl*3, few.jsonl*1", "--validation_file", "few.jsonl")


def test_pretraining_reads_a_stream_as_far_as_it_trains(texts):
    final = pretrain.train(streaming(texts, *FILES, "--max_steps", "30"))
    run = json.loads((final.parent / "run.json").read_text())
    assert run["metrics"]["tokens"] == 30 * 4 * 16
    rows = [json.loads(line) for line in (final.parent / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 30
    assert rows[-1]["tokens"] == 30 * 4 * 16
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.3


def test_a_bad_row_in_a_stream_is_named_when_it_is_reached(texts):
    with Path("texts.jsonl").open("a") as file:
        file.write('{"text": 3}\n')
    with pytest.raises(DataError, match=r"texts\.jsonl: row 401: text: expected text, got 3"):
        pretrain.train(
            streaming(
                texts,
                "--train_file",
                "texts.jsonl",
                "--validation_file",
                "few.jsonl",
                "--max_steps",
                "9",
                "--bad_rows",
                "error",
            )
        )
    assert not (texts / "runs/own/pretrain/final").exists()


def test_a_stream_without_steps_is_refused(texts, capsys):
    with pytest.raises(SystemExit, match="2"):
        streaming(texts)
    assert "say how many --max_steps" in capsys.readouterr().err
