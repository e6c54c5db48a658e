"""What Zhang et al. 2023 (arXiv 2306.14870) found of adapter arithmetic, tried on small real data: reproduced or not.

    python benchmarks/adapter_arithmetic.py distribution     adapters of two label-skewed halves, combined
    python benchmarks/adapter_arithmetic.py initialisation   the same from one start of A and from two
    python benchmarks/adapter_arithmetic.py multitask        two tasks in one adapter
    python benchmarks/adapter_arithmetic.py transfer         sentiment of one collection + (one domain - the other)
    python benchmarks/adapter_arithmetic.py unlearning [--pairs FILE]   an adapter of what is not wanted, subtracted

Adapters are trained by the project's SFT stage on the recipe's pretrained model. It has 1.2 M parameters and does not
learn to say " good" or " bad" after a text (docs/log.md), so texts are learnt as texts: three words are the prompt,
what follows them the completion, and a sentiment is a pair of adapters, of the positive and of the negative texts; a
text is positive where the first gives it the higher likelihood. Weights are chosen on validation rows and reported on
test rows. The base is one for all seeds: a seed draws the adapters' start, the rows and their order. Figures go to
docs/findings/<finding>.json and into docs/adapter-arithmetic.md.
"""

import argparse
import json
import random
import re
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import sft
from pipeline.adapters.expressions import parse
from pipeline.adapters.files import read_adapters
from pipeline.adapters.metrics import log_likelihoods, measured, new_bench, read_split, weights_of
from pipeline.adapters.search import search
from pipeline.config.commands import Search
from pipeline.config.dials import Adapter, Optim, Run
from pipeline.config.stages import SFT
from pipeline.data.formats import read_rows
from pipeline.evaluation.report import markdown_table
from pipeline.evaluation.statistics import mean_ci, pair_accuracy

DATA = Path("data/imdb")
PAGE = Path("docs/adapter-arithmetic.md")
ROWS = 3000  # texts that an adapter learns from
LONGEST = 60  # words of a question and an answer: the base's context is 128 tokens
Figures = dict[str, float]
"""By what was measured; of one seed."""


@dataclass(frozen=True)
class Given:
    base: Path
    runs: Path
    adapter: str
    pairs: str


# ------------------------------------------------------------------------------------------------- data


def texts(split: str, source: str, seed: int, limit: int, label: str = "") -> list[tuple[str, str]]:
    """(text, label) of distinct texts, five words or more, of one source of the preference pairs, in a drawn order."""
    labels: dict[str, set[str]] = {}
    for line in (DATA / "reward" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["source"] == source:
            labels.setdefault(row["chosen"], set()).add("positive")
            labels.setdefault(row["rejected"], set()).add("negative")
    rows = sorted((text, min(label)) for text, label in labels.items() if len(label) == 1 and len(text.split()) > 4)
    random.Random(seed).shuffle(rows)
    return [row for row in rows if label in ("", row[1])][:limit]


def continued(rows: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    """Each text as three words and what follows them."""
    found = []
    for text, _ in rows:
        start = re.match(r"\s*(\S+\s+){2}\S+", text)
        assert start is not None
        found.append({"prompt": text[: start.end()], "completion": text[start.end() :]})
    return found


def write(file: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(file)


# ------------------------------------------------------------------------------------------------- training, measuring


def train(given: Given, seed: int, name: str, rows: Sequence[Mapping[str, str]], epochs: float = 1.0) -> Path:
    """An adapter trained on the rows, unless it is there; returns its folder."""
    folder = given.runs / given.adapter / f"seed{seed}"
    file = write(folder / "data" / f"{name}.jsonl", rows)
    rate = {"lora": 5e-3, "ia3": 3e-2}[given.adapter]
    return sft.train(
        SFT(
            run=Run(recipe=name, runs=str(folder), seed=seed, precision="fp32", report_to="none"),
            optim=Optim(learning_rate=rate, weight_decay=0.0, num_train_epochs=epochs, batch_size=16, micro_batch=16),
            adapter=Adapter(adapter=given.adapter, lora_r=8, lora_alpha=8),
            base=str(given.base), train_file=file, validation_file=file, validation_rows=64,
        )
    )  # fmt: skip


def train_language(given: Given, seed: int, source: str) -> Path:
    """An adapter of one collection's texts, whatever their label."""
    return train(given, seed, f"lm_{source}", continued(texts("train", source, seed, ROWS)))


def measure(
    given: Given, adapters: Mapping[str, Path], expressions: Mapping[str, str], file: str, what: str
) -> Figures:
    """loss: nats per token of the file's completions; accuracy: share of its pairs; by expression."""
    return {name: float(x.mean()) for name, x in by_row(given, adapters, expressions, file, what).items()}


def by_row(
    given: Given, adapters: Mapping[str, Path], expressions: Mapping[str, str], file: str, what: str
) -> dict[str, np.ndarray]:
    """What was measured of each row; `likelihood`: of its completion, nats."""
    config = Search(base=str(given.base))
    read, ground = read_adapters(adapters, config.base)
    trees = {name: parse(text, adapters) for name, text in expressions.items()}
    asked = {"loss" if what == "likelihood" else what}
    rows = read_split(file, "", config, asked, ground.tokenizer)
    found = {}
    with tempfile.TemporaryDirectory() as made:
        bench = new_bench(config, list(trees.values()), read, ground, asked, Path(made))
        for name, tree in trees.items():
            if what == "likelihood":
                bench.mixture.set(weights_of(tree))
                found[name] = log_likelihoods(bench.mixture.model, bench.tokenizer, rows.completions, 64)[0]
            else:
                found[name] = measured(weights_of(tree), rows, bench)[what]
    return found


def searched(given: Given, seed: int, name: str, adapters: Mapping[str, Path], **dials: Any) -> dict[str, Any]:
    """result.json of a search, made unless it is there."""
    out = given.runs / given.adapter / f"seed{seed}" / "search" / name
    if not out.exists():
        folders = ",".join(f"{adapter}={folder}" for adapter, folder in adapters.items())
        search(Search(adapters=folders, base=str(given.base), out=str(out), seed=seed, **dials))
    return json.loads((out / "result.json").read_text(encoding="utf-8"))


def data_file(given: Given, name: str, rows: Sequence[Mapping[str, Any]]) -> str:
    return write(given.runs / "data" / f"{name}.jsonl", rows)


# ------------------------------------------------------------------------------------------------- findings


def halves(seed: int) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """The texts of lm_rt in two: four of five negative ones in the first, four of five positive ones in the second."""
    found: tuple[list[tuple[str, str]], list[tuple[str, str]]] = ([], [])
    count = {"positive": 0, "negative": 0}
    for text, label in texts("train", "rt", seed, ROWS):
        count[label] += 1
        found[(count[label] % 5 == 0) == (label == "negative")].append((text, label))
    return found


def distribution(given: Given, seed: int) -> Figures:
    one, two = halves(seed)
    adapters = {
        "one": train(given, seed, "half_one", continued(one)),
        "two": train(given, seed, "half_two", continued(two)),
        "all": train_language(given, seed, "rt"),
    }
    expressions = {
        "base": "base", "half one": "one", "half two": "two", "exact average": "avg(one, two)",
        "factor-wise average": "paper(0.5*one + 0.5*two)", "exact sum": "one + two", "trained on all": "all",
    }  # fmt: skip
    found = measure(
        given, adapters, expressions, data_file(given, "rt_test", continued(texts("test", "rt", 0, 1000))), "loss"
    )
    return found | {"mean of the halves": (found["half one"] + found["half two"]) / 2}


def initialisation(given: Given, seed: int) -> Figures:
    one, two = halves(seed)
    adapters = {
        "one": train(given, seed, "half_one", continued(one)),
        "two": train(given, seed, "half_two", continued(two)),
        "other": train(given, seed + 100, "half_two", continued(two)),
    }
    expressions = {
        f"{rule}, {start}": text.format(name)
        for rule, text in (("exact", "avg(one, {})"), ("factor-wise", "paper(0.5*one + 0.5*{})"))
        for start, name in (("one start", "two"), ("two starts", "other"))
    }
    alone = {"half one": "one", "half two": "two", "half two, other start": "other"}
    file = data_file(given, "rt_test", continued(texts("test", "rt", 0, 1000)))
    return measure(given, adapters, expressions | alone, file, "loss")


def multitask(given: Given, seed: int) -> Figures:
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
        drawn = [(text, source) for source in ("imdb", "rt") for text, _ in texts(split, source, seed, each)]
        if task == "origin":
            return [row(task, text, source) for text, source in drawn]
        parts = [text.split() for text, _ in drawn]
        return [
            row(task, " ".join(part[: -max(1, len(part) // 3)] if number % 2 else part), ("whole", "cut")[number % 2])
            for number, part in enumerate(parts)
        ]

    learnt = {task: rows(task, "train", ROWS // 3) for task in words}
    adapters = {task: train(given, seed, task, learnt[task]) for task in words}
    adapters["both"] = train(given, seed, "both", [*learnt["origin"], *learnt["ending"]])
    files = {
        (task, split): data_file(given, f"{task}{seed}_{split}", rows(task, split, each))
        for task in words
        for split, each in (("validation", 75), ("test", 250))
    }
    found = searched(
        given, seed, "multitask", {task: adapters[task] for task in words}, objective="accuracy",
        expression="$x*origin + $y*ending", range="x=0:1.5,y=0:1.5", budget=13, grid=9,
        validation_file=f"{files['origin', 'validation']},{files['ending', 'validation']}",
        test_file=f"{files['origin', 'test']},{files['ending', 'test']}",
    )  # fmt: skip
    expressions = {
        "base": "base", "origin alone": "origin", "ending alone": "ending", "average": "avg(origin, ending)",
        "sum": "origin + ending", "searched": found["found"], "trained on both": "both",
    }  # fmt: skip
    tasks = {task: measure(given, adapters, expressions, files[task, "test"], "accuracy") for task in words}
    result = {f"{name}: {task}": tasks[task][name] for name in expressions for task in tasks}
    result |= {f"{name}: mean": (tasks["origin"][name] + tasks["ending"][name]) / 2 for name in expressions}
    return result | {"weight of origin": found["chosen"]["x"], "weight of ending": found["chosen"]["y"]}


def transfer(given: Given, seed: int) -> Figures:
    adapters = {f"lm_{source}": train_language(given, seed, source) for source in ("imdb", "rt")}
    for source in ("imdb", "rt"):
        for label in ("positive", "negative"):
            rows = continued(texts("train", source, seed, ROWS // 2, label))
            adapters[f"{label}_{source}"] = train(given, seed, f"{label}_{source}", rows)

    def accuracy(split: str, aim: str, sentiment: str, shifts: Mapping[str, str]) -> Figures:
        """Of texts of `aim` by the two adapters of `sentiment`, each shifted."""
        rows = texts(split, aim, 0, 700)
        file = data_file(given, f"{aim}_{split}", continued(rows))
        both = {
            (name, label): f"{label}_{sentiment}{shift}"
            for name, shift in shifts.items()
            for label in ("positive", "negative")
        }
        found = by_row(given, adapters, {f"{n} {label}": text for (n, label), text in both.items()}, file, "likelihood")
        truth = np.array([1 if label == "positive" else -1 for _, label in rows])
        return {
            name: float(pair_accuracy((found[f"{name} positive"] - found[f"{name} negative"]) * truth).mean())
            for name in shifts
        }

    found: Figures = {}
    for aim, other in (("rt", "imdb"), ("imdb", "rt")):
        shifts = {c: f" + {c}*(lm_{aim} - lm_{other})" for c in ("0", "0.25", "0.5", "0.75", "1")}
        grid = accuracy("validation", aim, other, shifts)
        c = max(grid, key=grid.__getitem__)
        reported = {"alone": "", "analogy, c = 1": shifts["1"], "analogy, c chosen": shifts[c]}
        on_test = accuracy("test", aim, other, reported)
        found |= {f"on {aim}, sentiment of {other}: {name}": value for name, value in on_test.items()}
        found[f"on {aim}: c"] = float(c)
        found[f"on {aim}, sentiment of {aim}"] = accuracy("test", aim, aim, {"": ""})[""]
    return found


def unlearning(given: Given, seed: int) -> Figures:
    """An adapter of negative reviews, subtracted from the base: all of it, and less what it shares with all reviews."""
    kinds = {"negative": "negative", "reviews": ""}
    adapters = {
        name: train(
            given, seed, name,
            [row for source in ("imdb", "rt") for row in continued(texts("train", source, seed, ROWS // 2, label))],
        )
        for name, label in kinds.items()
    }  # fmt: skip
    retained = [{"text": row["text"]} for row in read_rows(str(DATA / "pretrain/validation.jsonl"), "text", 160)]
    prompts = {
        split: data_file(given, f"prompts_{split}", read_rows(str(DATA / f"ppo/{split}.jsonl"), "prompt", number))
        for split, number in (("validation", 128), ("test", 192))
    }
    common: dict[str, Any] = {
        "constraints": "perplexity <= 1.05*base", "budget": 6, "grid": 4,
        "retain_file": data_file(given, "retain_validation", retained[:80]),
        "retain_test_file": data_file(given, "retain_test", retained[80:]),
    }  # fmt: skip
    sampled: dict[str, Any] = {
        "objective": "classifier", "also": "vader,repetition", "judge_file": str(DATA / "judge/train.jsonl"),
        "validation_file": prompts["validation"], "test_file": prompts["test"],
    }  # fmt: skip
    judges = ("classifier", "vader", "repetition", "kl")
    found: Figures = {}
    for what, expression, most in (("negated", "-$x*negative", 1), ("difference", "$x*(reviews - negative)", 3)):
        used = {name: folder for name, folder in adapters.items() if name in expression}
        result = searched(given, seed, what, used, expression=expression, range=f"x=0:{most}", **sampled, **common)
        found |= subtracted(result, judges, f"reviews, {what}")
    if not given.pairs:
        return found
    rows = [short_dialogue(row) for row in read_rows(given.pairs, "pair", bad_rows="drop")]
    rows = list({row["prompt"]: row for row in rows if row is not None}.values())
    random.Random(0).shuffle(rows)
    held_out = len(rows) // 4
    files = {
        split: data_file(given, f"pairs_{split}", part)
        for split, part in (("test", rows[:held_out]), ("validation", rows[held_out : 2 * held_out]))
    }
    learnt = [{"prompt": row["prompt"], "completion": row["rejected"]} for row in rows[2 * held_out :]]
    result = searched(
        given, seed, "harmful", {"harmful": train(given, seed, "harmful", learnt, epochs=3)},
        expression="-$x*harmful", range="x=0:1", objective="accuracy", validation_file=files["validation"],
        test_file=files["test"], **common,
    )  # fmt: skip
    return found | subtracted(result, ("accuracy",), "dialogue")


def subtracted(result: Mapping[str, Any], measures: Sequence[str], what: str) -> Figures:
    """The test figures of a search of one variable: of the base, of what was found, and of the variable at 1."""
    kinds = {"base": "base", "chosen": "chosen", "x = 1": "all variables 1"}
    rows = {name: result["test"][kind]["figures"] for name, kind in kinds.items()}
    found = {f"{what}: {name}, {m}": row[m]["value"] for m in measures for name, row in rows.items()}
    for name in ("chosen", "x = 1"):
        ratio = rows[name]["perplexity"]["value"] / rows["base"]["perplexity"]["value"]
        found[f"{what}: {name}, perplexity ratio"] = ratio
    return found | {f"{what}: x": result["chosen"]["x"]}


def short_dialogue(row: Mapping) -> dict[str, str] | None:
    """The last question of a pair with both answers, as plain text; None where one is too long for the base."""
    question = row["prompt"][-1]["content"]
    answers = {
        side: row[side][-1]["content"] if isinstance(row[side], list) else row[side] for side in ("chosen", "rejected")
    }
    if max(len(f"{question} {answer}".split()) for answer in answers.values()) > LONGEST:
        return None
    return {"prompt": f"{question} Answer:"} | {side: f" {answer.strip()}" for side, answer in answers.items()}


@dataclass(frozen=True)
class Claim:
    """That one figure is above another (or a number), on the mean over seeds."""

    text: str
    more: str
    less: str | float


FINDINGS: dict[str, tuple[Callable[[Given, int], Figures], tuple[Claim, ...]]] = {
    "distribution": (
        distribution,
        (
            Claim("the exact average beats the halves' mean", "mean of the halves", "exact average"),
            Claim("the factor-wise average beats the halves' mean", "mean of the halves", "factor-wise average"),
            Claim("the exact average beats the factor-wise one", "factor-wise average", "exact average"),
            Claim("the exact sum beats the halves' mean", "mean of the halves", "exact sum"),
            Claim("the exact average beats training on all", "trained on all", "exact average"),
        ),
    ),
    "initialisation": (
        initialisation,
        (
            Claim("factor-wise: one start beats two", "factor-wise, two starts", "factor-wise, one start"),
            Claim("exact: one start beats two", "exact, two starts", "exact, one start"),
            Claim("one start: exact beats factor-wise", "factor-wise, one start", "exact, one start"),
            Claim("two starts: exact beats factor-wise", "factor-wise, two starts", "exact, two starts"),
        ),
    ),
    "multitask": (
        multitask,
        (
            Claim("both tasks: the searched sum beats the origin adapter", "searched: mean", "origin alone: mean"),
            Claim("both tasks: the searched sum beats the ending adapter", "searched: mean", "ending alone: mean"),
            Claim("both tasks: the searched sum beats the average", "searched: mean", "average: mean"),
            Claim("both tasks: the searched sum beats training on both", "searched: mean", "trained on both: mean"),
            Claim("origin: the searched sum beats its own adapter", "searched: origin", "origin alone: origin"),
            Claim("ending: the searched sum beats its own adapter", "searched: ending", "ending alone: ending"),
        ),
    ),
    "transfer": (
        transfer,
        tuple(
            Claim(
                f"to {aim}: the analogy beats the sentiment of {other} alone",
                f"on {aim}, sentiment of {other}: analogy, c chosen",
                f"on {aim}, sentiment of {other}: alone",
            )
            for aim, other in (("rt", "imdb"), ("imdb", "rt"))
        ),
    ),
    "unlearning": (
        unlearning,
        (
            *(
                Claim(text.format(what), f"{what}: {more}" if more != "1.05" else more, f"{what}: {less}")
                for what in ("reviews, negated", "reviews, difference")
                for text, more, less in (
                    ("{}: judge 2 rises", "chosen, classifier", "base, classifier"),
                    ("{}: VADER rises", "chosen, vader", "base, vader"),
                    ("{}: perplexity is held", "1.05", "chosen, perplexity ratio"),
                )
            ),
            Claim("dialogue: accuracy rises", "dialogue: chosen, accuracy", "dialogue: base, accuracy"),
            Claim("dialogue: perplexity is held", "1.05", "dialogue: chosen, perplexity ratio"),
        ),
    ),
}
BOUNDS = {"1.05": 1.05}
"""Figures of claims that nothing measures."""


# ------------------------------------------------------------------------------------------------- reporting


def report(finding: str, found: Mapping[int, Figures], seconds: float, command: str) -> dict:
    """What is written: figures by seed with mean and interval, and what becomes of each claim."""
    measures = list(next(iter(found.values())))
    rows = {
        name: {"seeds": [figures[name] for figures in found.values()], **interval([f[name] for f in found.values()])}
        for name in measures
    }
    claims = []
    for claim in FINDINGS[finding][1]:
        known = [{**figures, **BOUNDS} for figures in found.values()]
        if not all(claim.more in figures and claim.less in figures for figures in known):
            continue
        differences = [figures[claim.more] - figures[claim.less] for figures in known]
        claims.append({"claim": claim.text, "seeds": differences, **interval(differences)})
        claims[-1]["outcome"] = outcome(claims[-1])
    return {"command": command, "seeds": list(found), "cpu_seconds": round(seconds), "figures": rows, "claims": claims}


def interval(values: Sequence[float]) -> dict[str, float]:
    if len(values) < 2:
        return {"mean": values[0]}
    found = mean_ci(values)
    return {"mean": found.value, "low": found.low, "high": found.high}


def outcome(difference: Mapping) -> str:
    if "low" not in difference:
        return "one seed says nothing"
    return "yes" if difference["low"] > 0 else "no: the opposite" if difference["high"] < 0 else "not shown"


def section(result: Mapping) -> list[str]:
    """The finding's two tables."""

    def cells(name: str, row: Mapping) -> tuple[str, ...]:
        spread = f" [{row['low']:.3f}, {row['high']:.3f}]" if "low" in row else ""
        return name, f"{row['mean']:.3f}{spread}", ", ".join(f"{value:.3f}" for value in row["seeds"])

    return [
        f"`{result['command']}` ({result['cpu_seconds']} seconds of CPU time)",
        "",
        *markdown_table(
            ("measure", "mean over seeds", "each seed"), [cells(name, row) for name, row in result["figures"].items()]
        ),
        "",
        *markdown_table(
            ("claim", "difference", "each seed", "shown"),
            [(*cells(row["claim"], row), row["outcome"]) for row in result["claims"]],
        ),
    ]


def into_page(finding: str, lines: Sequence[str]) -> None:
    """Puts the lines between the finding's two marks in the page, if it has them."""
    marks = [f"<!-- {finding}: written by benchmarks/adapter_arithmetic.py -->", f"<!-- end of {finding} -->"]
    page = PAGE.read_text(encoding="utf-8") if PAGE.is_file() else ""
    if all(mark in page for mark in marks):
        before, _, rest = page.partition(marks[0])
        after = rest.partition(marks[1])[2]
        PAGE.write_text(before + "\n\n".join([marks[0], "\n".join(lines), marks[1]]) + after, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("finding", choices=FINDINGS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--base", type=Path, default=Path("runs/imdb/pretrain/final"))
    parser.add_argument("--runs", type=Path, default=Path("runs/adapter_arithmetic"))
    parser.add_argument("--adapter", choices=("lora", "ia3"), default="lora")
    parser.add_argument("--pairs", default="", help="unlearning: preference rows whose rejected answers are harmful")
    given = parser.parse_args()
    if not given.base.is_dir():
        sys.exit(f"error: {given.base}: no pretrained model; `make pretrain`, or give --base")
    found = {}
    for seed in given.seeds:
        found[seed] = FINDINGS[given.finding][0](Given(given.base, given.runs, given.adapter, given.pairs), seed)
        print(f"{given.finding}, seed {seed}: {json.dumps(found[seed])}", flush=True)
    seeds = " ".join(map(str, given.seeds))
    options = "".join(
        f" --{k} {v}" for k, v in (("adapter", given.adapter), ("pairs", "FILE")) if v != "lora" and getattr(given, k)
    )
    command = f"python benchmarks/adapter_arithmetic.py {given.finding} --seeds {seeds}{options}"
    result = report(given.finding, found, time.process_time(), command)
    name = given.finding if given.adapter == "lora" else f"{given.finding}-{given.adapter}"
    file = Path("docs/findings") / f"{name}.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    lines = section(result)
    into_page(name, lines)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
