"""The findings of Zhang et al. 2023 (arXiv 2306.14870): adapters trained, combined and measured, for one seed."""

import json
import random
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from finding_data import DATA, ROWS, read_labelled_texts, shorten_dialogue, split_in_halves, to_completions, write_rows
from finding_report import Figures

from pipeline import sft
from pipeline.adapters.eval_rows import read_split
from pipeline.adapters.expression_parser import parse
from pipeline.adapters.metrics import log_likelihoods, make_eval_context, measure
from pipeline.adapters.mixture import mixture_weights
from pipeline.adapters.reading import read_adapters
from pipeline.adapters.search import search
from pipeline.config.commands import Search
from pipeline.config.dials import Adapter, Optim, Reading, Run
from pipeline.config.stages import SFT
from pipeline.data.formats import read_rows
from pipeline.evaluation.statistics import pair_accuracy


@dataclass(frozen=True)
class Setup:
    """What the findings are tried on; `pairs`: preference rows of dialogue, empty: none."""

    base: Path
    runs: Path
    adapter: str
    pairs: str


def train_adapter(setup: Setup, seed: int, name: str, rows: Sequence[Mapping[str, str]], epochs: float = 1.0) -> Path:
    """An adapter trained on the rows, unless it is there; returns its folder."""
    folder = setup.runs / setup.adapter / f"seed{seed}"
    file = write_rows(folder / "data" / f"{name}.jsonl", rows)
    rate = {"lora": 5e-3, "ia3": 3e-2}[setup.adapter]
    return sft.train(
        SFT(
            run=Run(recipe=name, runs=str(folder), seed=seed, precision="fp32", report_to="none"),
            optim=Optim(learning_rate=rate, weight_decay=0.0, num_train_epochs=epochs, batch_size=16, micro_batch=16),
            adapter=Adapter(adapter=setup.adapter, lora_r=8, lora_alpha=8),
            base=str(setup.base), train_file=file, validation_file=file, validation_rows=64,
        )
    )  # fmt: skip


def train_language_adapter(setup: Setup, seed: int, source: str) -> Path:
    """An adapter of one collection's texts, whatever their label."""
    return train_adapter(setup, seed, f"lm_{source}", to_completions(read_labelled_texts("train", source, seed, ROWS)))


def measure_means(
    setup: Setup, adapters: Mapping[str, Path], expressions: Mapping[str, str], file: str, what: str
) -> Figures:
    """loss: nats per token of the file's completions; accuracy: share of its pairs; by expression."""
    return {name: float(x.mean()) for name, x in measure_rows(setup, adapters, expressions, file, what).items()}


def measure_rows(
    setup: Setup, adapters: Mapping[str, Path], expressions: Mapping[str, str], file: str, what: str
) -> dict[str, np.ndarray]:
    """What was measured of each row; `likelihood`: of its completion, nats."""
    config = Search(base=str(setup.base))
    saved, base = read_adapters(adapters, config.base)
    trees = {name: parse(text, adapters) for name, text in expressions.items()}
    measures = {"loss" if what == "likelihood" else what}
    rows = read_split(file, "", config, measures, base.tokenizer)
    numbers = {}
    with tempfile.TemporaryDirectory() as folder:
        context = make_eval_context(config, list(trees.values()), saved, base, measures, Path(folder))
        for name, tree in trees.items():
            weights = mixture_weights(tree)
            if what == "likelihood":
                context.mixture.set_weights(weights)
                numbers[name] = log_likelihoods(context.mixture.model, context.tokenizer, rows.completions, 64)[0]
            else:
                numbers[name] = measure(weights, rows, context)[what]
    return numbers


def run_search(setup: Setup, seed: int, name: str, adapters: Mapping[str, Path], **dials: Any) -> dict[str, Any]:
    """result.json of a search, made unless it is there."""
    out = setup.runs / setup.adapter / f"seed{seed}" / "search" / name
    if not out.exists():
        folders = ",".join(f"{adapter}={folder}" for adapter, folder in adapters.items())
        search(Search(adapters=folders, base=str(setup.base), out=str(out), seed=seed, **dials))
    return json.loads((out / "result.json").read_text(encoding="utf-8"))


def write_data_file(setup: Setup, name: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """Writes rows that all seeds share; returns the file's path."""
    return write_rows(setup.runs / "data" / f"{name}.jsonl", rows)


def measure_distribution(setup: Setup, seed: int) -> Figures:
    """Adapters of two label-skewed halves, combined: nats per token of balanced test texts."""
    one, two = split_in_halves(seed)
    adapters = {
        "one": train_adapter(setup, seed, "half_one", to_completions(one)),
        "two": train_adapter(setup, seed, "half_two", to_completions(two)),
        "all": train_language_adapter(setup, seed, "rt"),
    }
    expressions = {
        "base": "base", "half one": "one", "half two": "two", "exact average": "avg(one, two)",
        "factor-wise average": "paper(0.5*one + 0.5*two)", "exact sum": "one + two", "trained on all": "all",
    }  # fmt: skip
    file = write_data_file(setup, "rt_test", to_completions(read_labelled_texts("test", "rt", 0, 1000)))
    figures = measure_means(setup, adapters, expressions, file, "loss")
    return figures | {"mean of the halves": (figures["half one"] + figures["half two"]) / 2}


def measure_initialisation(setup: Setup, seed: int) -> Figures:
    """The same from one start of A and from two."""
    one, two = split_in_halves(seed)
    adapters = {
        "one": train_adapter(setup, seed, "half_one", to_completions(one)),
        "two": train_adapter(setup, seed, "half_two", to_completions(two)),
        "other": train_adapter(setup, seed + 100, "half_two", to_completions(two)),
    }
    expressions = {
        f"{rule}, {start}": text.format(name)
        for rule, text in (("exact", "avg(one, {})"), ("factor-wise", "paper(0.5*one + 0.5*{})"))
        for start, name in (("one start", "two"), ("two starts", "other"))
    }
    alone = {"half one": "one", "half two": "two", "half two, other start": "other"}
    file = write_data_file(setup, "rt_test", to_completions(read_labelled_texts("test", "rt", 0, 1000)))
    return measure_means(setup, adapters, expressions | alone, file, "loss")


def measure_multitask(setup: Setup, seed: int) -> Figures:
    """Which collection a text is from, and whether it was cut short: each said in a word after it."""
    words = {
        "origin": (" From", {"imdb": " users", "rt": " critics"}),
        "ending": (" It is", {"whole": " whole", "cut": " cut"}),
    }

    def row(task: str, text: str, label: str) -> dict[str, str]:
        question, answers = words[task]
        wrong = next(answer for other, answer in answers.items() if other != label)
        return {"prompt": text + question, "completion": answers[label], "chosen": answers[label], "rejected": wrong}

    def rows(task: str, split: str, each: int) -> list[dict[str, str]]:
        """Of texts from both collections; to be cut is to lose the last third of the words."""
        texts = {source: read_labelled_texts(split, source, seed, each) for source in ("imdb", "rt")}
        drawn = [(text, source) for source, rows in texts.items() for text, _ in rows]
        if task == "origin":
            return [row(task, text, source) for text, source in drawn]
        parts = [text.split() for text, _ in drawn]
        return [
            row(task, " ".join(part[: -max(1, len(part) // 3)] if number % 2 else part), ("whole", "cut")[number % 2])
            for number, part in enumerate(parts)
        ]

    train_rows = {task: rows(task, "train", ROWS // 3) for task in words}
    adapters = {task: train_adapter(setup, seed, task, train_rows[task]) for task in words}
    adapters["both"] = train_adapter(setup, seed, "both", [*train_rows["origin"], *train_rows["ending"]])
    files = {
        (task, split): write_data_file(setup, f"{task}{seed}_{split}", rows(task, split, each))
        for task in words
        for split, each in (("validation", 75), ("test", 250))
    }
    searched = run_search(
        setup, seed, "multitask", {task: adapters[task] for task in words}, objective="accuracy",
        expression="$x*origin + $y*ending", range="x=0:1.5,y=0:1.5", budget=13, grid=9,
        validation_file=f"{files['origin', 'validation']},{files['ending', 'validation']}",
        test_file=f"{files['origin', 'test']},{files['ending', 'test']}",
    )  # fmt: skip
    expressions = {
        "base": "base", "origin alone": "origin", "ending alone": "ending", "average": "avg(origin, ending)",
        "sum": "origin + ending", "searched": searched["found"], "trained on both": "both",
    }  # fmt: skip
    tasks = {task: measure_means(setup, adapters, expressions, files[task, "test"], "accuracy") for task in words}
    result = {f"{name}: {task}": tasks[task][name] for name in expressions for task in tasks}
    result |= {f"{name}: mean": (tasks["origin"][name] + tasks["ending"][name]) / 2 for name in expressions}
    return result | {"weight of origin": searched["chosen"]["x"], "weight of ending": searched["chosen"]["y"]}


def measure_transfer(setup: Setup, seed: int) -> Figures:
    """Sentiment of one collection + c (language of the other - of the first): accuracy on the other."""
    adapters = {f"lm_{source}": train_language_adapter(setup, seed, source) for source in ("imdb", "rt")}
    for source in ("imdb", "rt"):
        for label in ("positive", "negative"):
            rows = to_completions(read_labelled_texts("train", source, seed, ROWS // 2, label))
            adapters[f"{label}_{source}"] = train_adapter(setup, seed, f"{label}_{source}", rows)

    def accuracy(split: str, aim: str, sentiment: str, shifts: Mapping[str, str]) -> Figures:
        """Of texts of `aim` by the two adapters of `sentiment`, each shifted."""
        rows = read_labelled_texts(split, aim, 0, 700)
        file = write_data_file(setup, f"{aim}_{split}", to_completions(rows))
        both = {
            (name, label): f"{label}_{sentiment}{shift}"
            for name, shift in shifts.items()
            for label in ("positive", "negative")
        }
        expressions = {f"{name} {label}": text for (name, label), text in both.items()}
        likelihoods = measure_rows(setup, adapters, expressions, file, "likelihood")
        truth = np.array([1 if label == "positive" else -1 for _, label in rows])
        return {
            name: float(
                pair_accuracy((likelihoods[f"{name} positive"] - likelihoods[f"{name} negative"]) * truth).mean()
            )
            for name in shifts
        }

    figures: Figures = {}
    for aim, other in (("rt", "imdb"), ("imdb", "rt")):
        shifts = {c: f" + {c}*(lm_{aim} - lm_{other})" for c in ("0", "0.25", "0.5", "0.75", "1")}
        grid = accuracy("validation", aim, other, shifts)
        c = max(grid, key=grid.__getitem__)
        reported = {"alone": "", "analogy, c = 1": shifts["1"], "analogy, c chosen": shifts[c]}
        on_test = accuracy("test", aim, other, reported)
        figures |= {f"on {aim}, sentiment of {other}: {name}": value for name, value in on_test.items()}
        figures[f"on {aim}: c"] = float(c)
        figures[f"on {aim}, sentiment of {aim}"] = accuracy("test", aim, aim, {"": ""})[""]
    return figures


def measure_unlearning(setup: Setup, seed: int) -> Figures:
    """Adapters of what is not wanted, subtracted: negative reviews and, with `pairs`, harmful answers."""
    retained = [{"text": row["text"]} for row in read_rows(str(DATA / "pretrain/validation.jsonl"), "text", 160)]
    common: dict[str, Any] = {
        "constraints": "perplexity <= 1.05*base", "budget": 6, "grid": 4,
        "retain_file": write_data_file(setup, "retain_validation", retained[:80]),
        "retain_test_file": write_data_file(setup, "retain_test", retained[80:]),
    }  # fmt: skip
    figures = unlearn_reviews(setup, seed, common)
    return figures | unlearn_dialogue(setup, seed, common) if setup.pairs else figures


def unlearn_reviews(setup: Setup, seed: int, common: Mapping[str, Any]) -> Figures:
    """An adapter of negative reviews, subtracted from the base: all of it, and less what it shares with all reviews."""
    adapters = {}
    for name, label in (("negative", "negative"), ("reviews", "")):
        texts = [read_labelled_texts("train", source, seed, ROWS // 2, label) for source in ("imdb", "rt")]
        adapters[name] = train_adapter(setup, seed, name, [row for part in texts for row in to_completions(part)])
    prompts = {
        split: write_data_file(setup, f"prompts_{split}", read_rows(str(DATA / f"ppo/{split}.jsonl"), "prompt", number))
        for split, number in (("validation", 128), ("test", 192))
    }
    sampled: dict[str, Any] = {
        "objective": "classifier", "also": "vader,repetition", "judge_file": str(DATA / "judge/train.jsonl"),
        "validation_file": prompts["validation"], "test_file": prompts["test"],
    }  # fmt: skip
    judges = ("classifier", "vader", "repetition", "kl")
    figures: Figures = {}
    for what, expression, most in (("negated", "-$x*negative", 1), ("difference", "$x*(reviews - negative)", 3)):
        used = {name: folder for name, folder in adapters.items() if name in expression}
        result = run_search(setup, seed, what, used, expression=expression, range=f"x=0:{most}", **sampled, **common)
        figures |= unlearning_figures(result, judges, f"reviews, {what}")
    return figures


def unlearn_dialogue(setup: Setup, seed: int, common: Mapping[str, Any]) -> Figures:
    """An adapter of the rejected, harmful answers of `pairs`, subtracted from the base."""
    dialogues = [shorten_dialogue(row) for row in read_rows(setup.pairs, "pair", reading=Reading(bad_rows="drop"))]
    rows = list({row["prompt"]: row for row in dialogues if row is not None}.values())
    random.Random(0).shuffle(rows)
    held_out = len(rows) // 4
    files = {
        split: write_data_file(setup, f"pairs_{split}", part)
        for split, part in (("test", rows[:held_out]), ("validation", rows[held_out : 2 * held_out]))
    }
    train_rows = [{"prompt": row["prompt"], "completion": row["rejected"]} for row in rows[2 * held_out :]]
    result = run_search(
        setup, seed, "harmful", {"harmful": train_adapter(setup, seed, "harmful", train_rows, epochs=3)},
        expression="-$x*harmful", range="x=0:1", objective="accuracy", validation_file=files["validation"],
        test_file=files["test"], **common,
    )  # fmt: skip
    return unlearning_figures(result, ("accuracy",), "dialogue")


def unlearning_figures(result: Mapping[str, Any], measures: Sequence[str], what: str) -> Figures:
    """The test figures of a search of one variable: of the base, of the chosen value, and of the variable at 1."""
    kinds = {"base": "base", "chosen": "chosen", "x = 1": "all variables 1"}
    rows = {name: result["test"][kind]["figures"] for name, kind in kinds.items()}
    figures = {f"{what}: {name}, {m}": row[m]["value"] for m in measures for name, row in rows.items()}
    for name in ("chosen", "x = 1"):
        ratio = rows[name]["perplexity"]["value"] / rows["base"]["perplexity"]["value"]
        figures[f"{what}: {name}, perplexity ratio"] = ratio
    return figures | {f"{what}: x": result["chosen"]["x"]}
