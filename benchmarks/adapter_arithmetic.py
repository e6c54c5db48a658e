"""What Zhang et al. 2023 (arXiv 2306.14870) found of adapter arithmetic, tried on small real data: reproduced or not.

    python benchmarks/adapter_arithmetic.py distribution     adapters of two label-skewed halves, combined
    python benchmarks/adapter_arithmetic.py initialisation   the same from one start of A and from two
    python benchmarks/adapter_arithmetic.py multitask        two tasks in one adapter
    python benchmarks/adapter_arithmetic.py transfer         cls_imdb + c*(lm_rt - lm_imdb) on Rotten Tomatoes, and back
    python benchmarks/adapter_arithmetic.py unlearning [--pairs FILE]   an adapter of what is not wanted, subtracted

Adapters are trained by the project's SFT stage on the recipe's pretrained model; a class is a completion (" good" or
" bad") and is right where its log-likelihood is the higher. Weights are chosen on validation rows by
`pipeline.search` and reported on test rows. The base is one for all seeds: a seed draws the adapters' start
and the order of their rows. Figures go to docs/findings/<finding>.json, and from there into docs/adapter-arithmetic.md.
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

from pipeline import sft
from pipeline.adapter_files import read_adapters
from pipeline.config import SFT, Adapter, Optim, Run, Sampling, Search
from pipeline.expressions import parse
from pipeline.formats import read_rows
from pipeline.judges import mean_ci
from pipeline.report import markdown_table
from pipeline.search import figures, measured, new_bench, read_split, search, weights_of

DATA = Path("data/imdb")
PAGE = Path("docs/adapter-arithmetic.md")
WORDS = {"positive": " good", "negative": " bad"}
OTHER = {"positive": "negative", "negative": "positive"}
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


def texts(split: str, source: str) -> list[tuple[str, str]]:
    """(text, label) of the preference pairs' distinct texts from one source, in an order that depends on nothing."""
    labels: dict[str, set[str]] = {}
    for line in (DATA / "reward" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["source"] == source:
            labels.setdefault(row["chosen"], set()).add("positive")
            labels.setdefault(row["rejected"], set()).add("negative")
    rows = sorted((text, min(label)) for text, label in labels.items() if len(label) == 1)
    random.Random(0).shuffle(rows)
    return rows


def verdict(text: str, label: str) -> dict[str, str]:
    """A text as a question about its sentiment: a pair for what is measured, a completion for what is trained."""
    return asked(text, " It is", WORDS[label], WORDS[OTHER[label]])


def asked(text: str, question: str, right: str, wrong: str) -> dict[str, str]:
    return {"prompt": text + question, "completion": right, "chosen": right, "rejected": wrong}


def continued(text: str) -> dict[str, str]:
    """A text as three words and what follows them."""
    start = re.match(r"\s*(\S+\s+){2}\S+", text)
    cut = start.end() if start else 0
    return {"prompt": text[:cut] or " ", "completion": text[cut:] or " "}


def write(file: Path, rows: Sequence[Mapping[str, str]]) -> str:
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
            optim=Optim(learning_rate=rate, weight_decay=0.0, epochs=epochs, batch_size=16, micro_batch=16),
            adapter=Adapter(adapter=given.adapter, lora_rank=8, lora_alpha=8),
            base=str(given.base), train_file=file, validation_file=file, validation_rows=64,
        )
    )  # fmt: skip


def accuracies(given: Given, adapters: Mapping[str, Path], expressions: Mapping[str, str], file: str) -> Figures:
    """Share of the file's pairs whose right completion is the likelier, by expression."""
    config = Search(base=str(given.base))
    read, ground = read_adapters(adapters, config.base)
    trees = {name: parse(text, adapters) for name, text in expressions.items()}
    rows = read_split(file, "", config, {"accuracy"}, ground.tokenizer)
    with tempfile.TemporaryDirectory() as made:
        bench = new_bench(config, list(trees.values()), read, ground, {"accuracy"}, Path(made))
        return {name: figures(measured(weights_of(tree), rows, bench))["accuracy"] for name, tree in trees.items()}


def searched(given: Given, seed: int, name: str, adapters: Mapping[str, Path], **dials: object) -> dict:
    """result.json of a search, made unless it is there."""
    out = given.runs / given.adapter / f"seed{seed}" / "search" / name
    if not out.exists():
        folders = ",".join(f"{adapter}={folder}" for adapter, folder in adapters.items())
        search(Search(adapters=folders, base=str(given.base), out=str(out), seed=seed, **dials))  # type: ignore[arg-type]
    return json.loads((out / "result.json").read_text(encoding="utf-8"))


def pairs_file(given: Given, split: str, source: str, limit: int) -> str:
    rows = [verdict(*row) for row in texts(split, source)[:limit]]
    return write(given.runs / "data" / f"{source}_{split}.jsonl", rows)


# ------------------------------------------------------------------------------------------------- findings


def halves(seed: int) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Rotten Tomatoes cut in two by the seed: four of five negative texts in the first, four of five positive ones in
    the second."""
    found: tuple[list[tuple[str, str]], list[tuple[str, str]]] = ([], [])
    rows = texts("train", "rt")
    random.Random(seed).shuffle(rows)
    count = {"positive": 0, "negative": 0}
    for text, label in rows:
        count[label] += 1
        is_rare = count[label] % 5 == 0
        found[is_rare == (label == "negative")].append((text, label))
    return found


def distribution(given: Given, seed: int) -> Figures:
    one, two = halves(seed)
    adapters = {
        "one": train(given, seed, "half_one", [verdict(*row) for row in one], epochs=2),
        "two": train(given, seed, "half_two", [verdict(*row) for row in two], epochs=2),
        "all": train(given, seed, "rt", [verdict(*row) for row in [*one, *two]], epochs=2),
    }
    expressions = {
        "base": "base", "half one": "one", "half two": "two", "exact average": "avg(one, two)",
        "factor-wise average": "paper(0.5*one + 0.5*two)", "trained on all": "all",
    }  # fmt: skip
    if given.adapter == "ia3":
        expressions.pop("factor-wise average")  # it is the exact one
    found = accuracies(given, adapters, expressions, pairs_file(given, "test", "rt", 1000))
    return found | {"mean of the halves": (found["half one"] + found["half two"]) / 2}


def initialisation(given: Given, seed: int) -> Figures:
    one, two = halves(seed)
    rows = [verdict(*row) for row in two]
    adapters = {
        "one": train(given, seed, "half_one", [verdict(*row) for row in one], epochs=2),
        "two": train(given, seed, "half_two", rows, epochs=2),
        "other": train(given, seed + 100, "half_two", rows, epochs=2),
    }
    expressions = {
        f"{rule}, {start}": text.format(name)
        for rule, text in (("exact", "avg(one, {})"), ("factor-wise", "paper(0.5*one + 0.5*{})"))
        for start, name in (("one start", "two"), ("two starts", "other"))
    }
    alone = {"half two": "two", "half two, other start": "other"}
    return accuracies(given, adapters, expressions | alone, pairs_file(given, "test", "rt", 1000))


def multitask(given: Given, seed: int) -> Figures:
    """Sentiment, and which of the two collections a text is from; each trained on texts of both."""

    def rows(split: str, each: int) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
        sources = {"imdb": " review", "rt": " snippet"}
        drawn = {source: texts(split, source) for source in sources}
        for part in drawn.values():
            random.Random(seed).shuffle(part)
        words = list(sources.values())
        feeling = [verdict(*row) for part in drawn.values() for row in part[:each]]
        origin = [
            asked(text, " From a", sources[source], words[1 - words.index(sources[source])])
            for source, part in drawn.items()
            for text, _ in part[:each]
        ]
        return feeling, origin

    sentiment, origin = rows("train", 3000)
    adapters = {
        "sentiment": train(given, seed, "sentiment", sentiment),
        "origin": train(given, seed, "origin", origin),
        "both": train(given, seed, "both", [*sentiment, *origin]),
    }
    files = {}
    for split, each in (("validation", 200), ("test", 500)):
        for task, part in zip(("sentiment", "origin"), rows(split, each), strict=True):
            files[task, split] = write(given.runs / "data" / f"multitask{seed}_{task}_{split}.jsonl", part)
    chosen = searched(
        given, seed, "multitask", {name: adapters[name] for name in ("sentiment", "origin")},
        expression="$x*sentiment + $y*origin", range="x=0:1.5,y=0:1.5", objective="accuracy", budget=20,
        validation_file=f"{files['sentiment', 'validation']},{files['origin', 'validation']}",
        test_file=f"{files['sentiment', 'test']},{files['origin', 'test']}",
    )  # fmt: skip
    expressions = {
        "base": "base", "sentiment alone": "sentiment", "origin alone": "origin", "average": "avg(sentiment, origin)",
        "sum": "sentiment + origin", "searched": chosen["found"], "trained on both": "both",
    }  # fmt: skip
    tasks = {task: accuracies(given, adapters, expressions, files[task, "test"]) for task in ("sentiment", "origin")}
    found = {f"{name}: {task}": tasks[task][name] for name in expressions for task in tasks}
    found |= {f"{name}: mean": (tasks["sentiment"][name] + tasks["origin"][name]) / 2 for name in expressions}
    return found | {f"weight of {n}": chosen["chosen"][v] for n, v in (("sentiment", "x"), ("origin", "y"))}


def transfer(given: Given, seed: int) -> Figures:
    labelled = {source: [verdict(*row) for row in texts("train", source)[:6000]] for source in ("imdb", "rt")}
    plain = {source: [continued(text) for text, _ in texts("train", source)[:6000]] for source in labelled}
    adapters = {f"cls_{source}": train(given, seed, f"cls_{source}", labelled[source]) for source in labelled}
    adapters |= {f"lm_{source}": train(given, seed, f"lm_{source}", plain[source]) for source in labelled}
    found: Figures = {}
    for aim, other in (("rt", "imdb"), ("imdb", "rt")):
        chosen = searched(
            given, seed, f"transfer_{aim}", {k: v for k, v in adapters.items() if k != f"cls_{aim}"},
            expression=f"cls_{other} + $c*(lm_{aim} - lm_{other})", range="c=0:1", objective="accuracy", budget=11,
            grid=11, validation_file=pairs_file(given, "validation", aim, 500),
            test_file=pairs_file(given, "test", aim, 1000),
        )  # fmt: skip
        expressions = {
            "base": "base", f"cls_{other} alone": f"cls_{other}",
            "analogy, c = 1": f"cls_{other} + lm_{aim} - lm_{other}", "analogy, c searched": chosen["found"],
            f"cls_{aim}, trained there": f"cls_{aim}",
        }  # fmt: skip
        on_test = accuracies(given, adapters, expressions, pairs_file(given, "test", aim, 1000))
        found |= {f"on {aim}: {name}": value for name, value in on_test.items()}
        found[f"on {aim}: c"] = chosen["chosen"]["c"]
    return found


def unlearning(given: Given, seed: int) -> Figures:
    negative = [continued(text) for source in ("imdb", "rt") for text, _ in only(texts("train", source), "negative")]
    random.Random(seed).shuffle(negative)
    retained = [row["text"] for row in read_rows(str(DATA / "pretrain/validation.jsonl"), "text", 800)]
    held = {
        name: write(given.runs / "data" / f"retain_{name}.jsonl", [{"text": text} for text in part])
        for name, part in (("validation", retained[:400]), ("test", retained[400:]))
    }
    perplexity = {
        "constraints": "perplexity <= 1.05*base", "retain_file": held["validation"], "retain_test_file": held["test"],
    }  # fmt: skip
    prompts = {
        split: write(
            given.runs / "data" / f"prompts_{split}.jsonl",
            read_rows(str(DATA / f"ppo/{split}.jsonl"), "prompt", number),
        )
        for split, number in (("validation", 192), ("test", 384))
    }
    result = searched(
        given, seed, "negative", {"negative": train(given, seed, "negative", negative[:6000])},
        expression="-$x*negative", range="x=0:2", objective="vader", also="classifier,repetition", budget=12, grid=9,
        validation_file=prompts["validation"], test_file=prompts["test"], batch_size=64,
        judge_file=str(DATA / "judge/train.jsonl"), sampling=Sampling(max_new_tokens=40), **perplexity,
    )  # fmt: skip
    found = side_by_side(result, ("vader", "classifier", "repetition", "kl"), "reviews")
    if not given.pairs:
        return found
    rows = [short_dialogue(row) for row in read_rows(given.pairs, "pair", bad_rows="drop")]
    rows = [row for row in {row["prompt"]: row for row in rows if row is not None}.values()]
    random.Random(0).shuffle(rows)
    train_rows, validation, test = (
        rows[: -2 * len(rows) // 3],
        rows[-2 * len(rows) // 3 : -len(rows) // 3],
        rows[-len(rows) // 3 :],
    )
    harmful = [{"prompt": row["prompt"], "completion": row["rejected"]} for row in train_rows]
    result = searched(
        given, seed, "harmful", {"harmful": train(given, seed, "harmful", harmful, epochs=3)},
        expression="-$x*harmful", range="x=0:2", objective="accuracy", budget=12, grid=9,
        validation_file=write(given.runs / "data/pairs_validation.jsonl", validation),
        test_file=write(given.runs / "data/pairs_test.jsonl", test), **perplexity,
    )  # fmt: skip
    return found | side_by_side(result, ("accuracy",), "dialogue") | {"dialogue: test pairs": float(len(test))}


def only(rows: Sequence[tuple[str, str]], label: str) -> list[tuple[str, str]]:
    return [row for row in rows if row[1] == label]


def short_dialogue(row: Mapping) -> dict[str, str] | None:
    """The last question of a pair with both answers, as plain text; None where one is too long for the base."""
    question = row["prompt"][-1]["content"]
    answers = {
        side: row[side][-1]["content"] if isinstance(row[side], list) else row[side] for side in ("chosen", "rejected")
    }
    if max(len(f"{question} {answer}".split()) for answer in answers.values()) > LONGEST:
        return None
    return {"prompt": f"{question} Answer:"} | {side: f" {answer.strip()}" for side, answer in answers.items()}


def side_by_side(result: dict, measures: Sequence[str], what: str) -> Figures:
    """The test figures of the base and of what was found, of a search of one variable."""
    rows = {"base": result["test"]["base"]["figures"], "subtracted": result["test"]["chosen"]["figures"]}
    rows["added"] = next(row["figures"] for name, row in result["test"].items() if name.endswith("alone"))
    found = {f"{what}: {name}, {m}": row[m]["value"] for m in measures for name, row in rows.items()}
    for name in ("subtracted", "added"):
        ratio = rows[name]["perplexity"]["value"] / rows["base"]["perplexity"]["value"]
        found[f"{what}: {name}, perplexity ratio"] = ratio
    return found | {f"{what}: weight": result["chosen"]["x"]}


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
            Claim("the exact average beats the halves' mean", "exact average", "mean of the halves"),
            Claim("so does the factor-wise average", "factor-wise average", "mean of the halves"),
            Claim("the exact average beats the factor-wise one", "exact average", "factor-wise average"),
            Claim("the exact average beats training on all", "exact average", "trained on all"),
        ),
    ),
    "initialisation": (
        initialisation,
        (
            Claim("factor-wise: one start is better", "factor-wise, one start", "factor-wise, two starts"),
            Claim("exact: one start beats two", "exact, one start", "exact, two starts"),
            Claim("two starts: exact beats factor-wise", "exact, two starts", "factor-wise, two starts"),
        ),
    ),
    "multitask": (
        multitask,
        (
            Claim("both tasks: the sum beats the sentiment adapter", "searched: mean", "sentiment alone: mean"),
            Claim("both tasks: the sum beats the origin adapter", "searched: mean", "origin alone: mean"),
            Claim("both tasks: the sum beats the average", "searched: mean", "average: mean"),
            Claim("both tasks: the sum beats training on both", "searched: mean", "trained on both: mean"),
            Claim("sentiment: the sum beats its own adapter", "searched: sentiment", "sentiment alone: sentiment"),
            Claim("origin: the sum beats its own adapter", "searched: origin", "origin alone: origin"),
        ),
    ),
    "transfer": (
        transfer,
        (
            Claim("to rt: the analogy beats cls_imdb", "on rt: analogy, c searched", "on rt: cls_imdb alone"),
            Claim("to imdb: the analogy beats cls_rt", "on imdb: analogy, c searched", "on imdb: cls_rt alone"),
        ),
    ),
    "unlearning": (
        unlearning,
        (
            Claim("reviews: VADER rises", "reviews: subtracted, vader", "reviews: base, vader"),
            Claim("reviews: the other judge rises", "reviews: subtracted, classifier", "reviews: base, classifier"),
            Claim("reviews: perplexity is held", "1.05", "reviews: subtracted, perplexity ratio"),
            Claim("dialogue: accuracy rises", "dialogue: subtracted, accuracy", "dialogue: base, accuracy"),
            Claim("dialogue: perplexity is held", "1.05", "dialogue: subtracted, perplexity ratio"),
        ),
    ),
}  # fmt: skip
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
