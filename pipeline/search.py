"""The numbers in an expression, found without training: chosen on validation rows, reported once on test rows.

    adapters loaded once -> grid -> refined where it was best -> the best trial that keeps the constraints -> test rows

A trial sets the weights of loaded adapters and measures; nothing is merged and no tensor is made. What a trial samples,
it samples from the same noise as every other. The number on the validation rows is the best of many and so flatters
itself: what is reported, with its interval, comes from rows that no trial has seen, beside every variable at 0, at 1,
the plain average, each adapter alone and the base.
"""

import importlib.metadata
import itertools
import json
import math
import re
import shlex
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import scipy.optimize
import scipy.stats
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline import algebra
from pipeline.adapter_files import (
    Adapter,
    AdapterError,
    Ground,
    places,
    read_adapters,
    refuse_existing,
    write_adapter,
    written_whole,
)
from pipeline.adapters import Mixture
from pipeline.config import Search, UserError, flat, nearest
from pipeline.data import IGNORED, decode, joined, length_batches, pad, row_pieces, with_chat_template
from pipeline.expressions import Call, Expression, Name, names, parse, parts, substitute, variables, weighted
from pipeline.formats import Text, read_rows
from pipeline.judges import (
    Classifier,
    Estimate,
    Vader,
    mean_ci,
    pair_accuracy,
    paired_difference_ci,
    share_ci,
    word_repetition,
)
from pipeline.losses import next_token_loss
from pipeline.models import Policy, check_model, frozen, load_reward_model, response_logprobs, same_tokenizer
from pipeline.process import new_accelerator, quiet, say
from pipeline.rollout import generate
from pipeline.scoring import fitted_judge, reward_model_scores
from pipeline.sources import fingerprint

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Array = NDArray[np.float64]
Point = tuple[float, ...]
Weights = Mapping[str, float]
"""Of adapters, and of functions of adapters, by their text in the expression; one that is not named has 0."""
Labelled = tuple[list[int], list[int]]
"""Ids of a row, and its labels: IGNORED where nothing is predicted."""

SAMPLED = ("reward", "vader", "classifier", "repetition", "kl")
MEASURED = ("loss", "accuracy", "perplexity", *SAMPLED)
FIELDS = {
    "prompt": ("prompt",),
    "completion": ("prompt", "completion"),
    "pair": ("prompt", "chosen", "rejected"),
    "text": ("text",),
}
"""By what a row is known."""
DECIMALS = 4
"""Of a variable: what is measured is what the composed adapter is made from."""
CONSTRAINT = re.compile(r"(\w+)\s*(<=|>=)\s*(?:([0-9.]+(?:e-?\d+)?)\s*(?:\*\s*(base))?|(base))", re.IGNORECASE)


class SearchError(UserError):
    """A search that cannot be made as asked; the message names the dial and what was expected."""


@dataclass(frozen=True)
class Constraint:
    """`measure <= bound`, or `>=`; the bound alone or times the base model's."""

    measure: str
    sign: str
    bound: float
    of_base: bool

    def __str__(self) -> str:
        return f"{self.measure} {self.sign} {self.bound:g}{'*base' if self.of_base else ''}"

    def limit(self, base: Mapping[str, float]) -> float:
        return self.bound * base[self.measure] if self.of_base else self.bound

    def excess(self, figures: Mapping[str, float], base: Mapping[str, float]) -> float:
        """By how much it is broken, as a share of its limit; 0 where it is kept."""
        limit = self.limit(base)
        over = (figures[self.measure] - limit) * (1 if self.sign == "<=" else -1)
        return max(0.0, over) / (abs(limit) or 1.0)


@dataclass(frozen=True)
class Rows:
    """One split, made tokens once: what is not measured is empty."""

    prompts: list[Text]
    completions: list[Labelled]
    chosen: list[Labelled]
    rejected: list[Labelled]
    retained: list[Labelled]
    keys: set[str]  # of its rows
    retained_keys: set[str]


@dataclass(frozen=True)
class Bench:
    """What measures: the loaded adapters and the judges that are asked."""

    mixture: Mixture
    tokenizer: PreTrainedTokenizerBase
    asked: set[str]
    reference: Weights
    reward_model: PreTrainedModel | None
    classifier: Classifier | None
    config: Search


@dataclass(frozen=True)
class Trial:
    """A choice of the variables and what it gave on the validation rows."""

    values: dict[str, float]
    figures: dict[str, float]
    excess: float  # of all constraints together; 0: all kept


# ------------------------------------------------------------------------------------------------- command


def search(config: Search) -> Path:
    """Writes trials.jsonl, result.json and curve.png, prints the test figures, and returns the folder.

    Raises SearchError for a dial that does not fit, rows in both splits, or constraints that no trial keeps.
    """
    quiet()
    out = refuse_existing(config.out)
    folders = places(config.adapters)
    expression = parse(config.expression, folders)
    ranges = read_ranges(config.range, variables(expression))
    constraints = read_constraints(config.constraints)
    asked = {config.objective, *(constraint.measure for constraint in constraints), *read_measures(config.also)}
    asked |= {"kl"} if asked & set(SAMPLED) else set()  # what the objective was paid with
    used = dict.fromkeys([*names(expression), *names(parse(config.reference, folders))])
    adapters, ground = read_adapters({name: folders[name] for name in used or folders}, config.base)
    refuse_unmixable(adapters, ground)
    generated = config.sampling.max_prompt_tokens + config.sampling.max_new_tokens if asked & set(SAMPLED) else 0
    longest = max(config.max_tokens if asked - set(SAMPLED) else 0, generated)
    check_model(ground.model, ground.tokenizer, longest, ground.path)
    validation, test = read_splits(config, asked, ground.tokenizer)
    with tempfile.TemporaryDirectory() as made:
        bench = new_bench(config, [expression], adapters, ground, asked, Path(made))
        base = figures(measured({}, validation, bench))
        trials: list[Trial] = []

        def trial(point: Point) -> tuple[float, float]:
            values = dict(zip(ranges, point, strict=True))
            found = figures(measured(weights_of(substitute(expression, values)), validation, bench))
            excess = sum(constraint.excess(found, base) for constraint in constraints)
            trials.append(Trial(values, found, excess))
            say(f"search: {told(values)}: {told(found)}{'' if not excess else '  (breaks a constraint)'}")
            return found[config.objective] * (1 if config.objective == "loss" else -1), excess

        best = minimise(
            trial, list(ranges.values()), config.grid or (config.budget + 1) // 2, config.budget, config.seed
        )
        chosen = next(t for t in trials if tuple(t.values.values()) == best)
        if chosen.excess:
            raise SearchError(
                f"constraints: none of {len(trials)} trials keeps {config.constraints}; the nearest, "
                f"{told(chosen.values)}, has {told(chosen.figures)} (base: {told(base)}): widen range or constraints"
            )
        found = substitute(expression, chosen.values)
        report = tested(found, expression, list(adapters), constraints, test, bench)
    result: dict[str, Any] = {
        "expression": str(expression),
        "ranges": ranges,
        "objective": config.objective,
        "constraints": [str(constraint) for constraint in constraints],
        "chosen": chosen.values,
        "found": str(found),
        "compose": compose_command(found, config),
        "trials": len(trials),
        "validation": {"chosen": chosen.figures, "base": base},
        "test": report,
        "adapters": {name: dict(adapter.sha256) for name, adapter in adapters.items()},
        "base": ground.fingerprint,
        "files": {
            dial: fingerprint(source) for dial, source in flat(config).items() if dial.endswith("file") and source
        },
        "dials": flat(config),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft", "scipy")},
    }
    with written_whole(out) as folder:
        lines = (json.dumps(asdict(trial)) + "\n" for trial in trials)
        (folder / "trials.jsonl").write_text("".join(lines), encoding="utf-8")
        (folder / "result.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        draw(folder / "curve.png", trials, chosen, config.objective, constraints, base)
    say(f"search: {len(trials)} trials -> {out}; on test rows:")
    for name, row in report.items():
        say(f"  {name}: {row['expression']}: {told({key: e['value'] for key, e in row['figures'].items()})}")
    say(result["compose"])
    return out


def tested(
    found: Expression,
    expression: Expression,
    adapters: Sequence[str],
    constraints: Sequence[Constraint],
    test: Rows,
    bench: Bench,
) -> dict[str, dict[str, Any]]:
    """What was found and what it must beat, on the test rows: every measure with its interval, and whether it keeps
    the constraints there; `chosen_minus` is the paired difference of the objective."""
    every = {"chosen": found}
    every |= {
        f"all variables {n}": substitute(expression, dict.fromkeys(variables(expression), float(n))) for n in (0, 1)
    }
    every |= {"average": parse(f"avg({', '.join(adapters)})")}
    every |= {f"{name} alone": Name(name) for name in adapters} | {"base": parse("base")}
    rows: dict[str, dict[str, Array]] = {}
    for name, candidate in every.items():
        weights = weights_of(candidate)
        same = [other for other in rows if weights_of(every[other]) == weights]
        rows[name] = rows[same[0]] if same else measured(weights, test, bench)
    objective, base = bench.config.objective, figures(rows["base"])
    return {
        name: {
            "expression": str(every[name]),
            "figures": {measure: asdict(estimate(measure, values)) for measure, values in found_rows.items()},
            "kept": not any(constraint.excess(figures(found_rows), base) for constraint in constraints),
            "chosen_minus": asdict(paired_difference_ci(rows["chosen"][objective], found_rows[objective])),
        }
        for name, found_rows in rows.items()
    }


def compose_command(found: Expression, config: Search) -> str:
    """The command that writes what was found as an adapter."""
    given = {"adapters": config.adapters, "base": config.base, "out": f"{config.out.rstrip('/')}_composed"}
    dials = (f"--{dial} {shlex.quote(text)}" for dial, text in given.items() if text)
    return f"python stages/merge.py compose {shlex.quote(str(found))} {' '.join(dials)}"


# ------------------------------------------------------------------------------------------------- optimising


def minimise(
    trial: Callable[[Point], tuple[float, float]],
    ranges: Sequence[tuple[float, float]],
    grid: int,
    budget: int,
    seed: int,
) -> Point:
    """The tried point of least cost among those of no excess; of least excess where there are none.

    `trial` gives (cost, excess). First `grid` points over the box: of one variable equally far apart; of several a
    grid, or a Latin hypercube where a grid would have fewer than three a side. Then, up to `budget`: of one variable
    Brent's bounded search between the neighbours of the best, of several Nelder-Mead from it.
    """
    found: dict[Point, tuple[float, float]] = {}

    def tried(point: Sequence[float]) -> tuple[float, float]:
        inside = (min(max(float(x), low), high) for x, (low, high) in zip(point, ranges, strict=True))
        rounded = tuple(round(x, DECIMALS) + 0.0 for x in inside)
        if rounded not in found:
            found[rounded] = trial(rounded)
        return found[rounded]

    for point in start_points(ranges, grid, seed):
        tried(point)
    best = min(found, key=lambda point: found[point][::-1])
    costs = [cost for cost, _ in found.values()]
    worst, spread = max(costs), (max(costs) - min(costs)) or 1.0

    def penalised(point: Sequence[float]) -> float:
        cost, excess = tried(point)
        return worst + spread * (1 + excess) if excess else cost

    left = budget - len(found)
    if left > 0 and len(ranges) == 1:
        line = sorted(point[0] for point in found)
        at = line.index(best[0])
        between = (line[max(0, at - 1)], line[min(len(line) - 1, at + 1)])
        if between[0] < between[1]:
            scipy.optimize.minimize_scalar(
                lambda x: penalised((x,)), bounds=between, method="bounded", options={"maxiter": left, "xatol": 1e-4}
            )
    elif left > len(ranges):
        sides = [high - low for low, high in ranges]
        corners = [list(best)] + [
            [x + (side / 6 if x + side / 6 <= high else -side / 6) * (i == j) for j, x in enumerate(best)]
            for i, (side, (_, high)) in enumerate(zip(sides, ranges, strict=True))
        ]
        scipy.optimize.minimize(
            penalised,
            best,
            method="Nelder-Mead",
            bounds=ranges,
            options={"initial_simplex": corners, "maxfev": left, "xatol": 1e-4, "fatol": 1e-9},
        )
    return min(found, key=lambda point: found[point][::-1])


def start_points(ranges: Sequence[tuple[float, float]], count: int, seed: int) -> list[Point]:
    """At most `count` points over the box, its corners among them where there is a grid."""
    side = int(count ** (1 / len(ranges)) + 1e-9)
    if len(ranges) > 1 and side < 3:
        drawn = scipy.stats.qmc.LatinHypercube(len(ranges), rng=seed).random(count)
        return [tuple(low + x * (high - low) for x, (low, high) in zip(row, ranges, strict=True)) for row in drawn]
    return list(itertools.product(*(np.linspace(low, high, side).tolist() for low, high in ranges)))


# ------------------------------------------------------------------------------------------------- measuring


def measured(weights: Weights, rows: Rows, bench: Bench) -> dict[str, Array]:
    """Numbers (n,) of each measure, one a row, whose mean is the figure (perplexity: its logarithm)."""
    bench.mixture.set(weights)
    likelihoods = {
        name: log_likelihoods(bench.mixture.model, bench.tokenizer, part, bench.config.batch_size)
        for name in ("completions", "chosen", "rejected", "retained")
        if (part := getattr(rows, name))
    }
    found: dict[str, Array] = {}
    if rows.completions:
        found["loss"] = per_token(*likelihoods["completions"])
    if rows.chosen:
        found["accuracy"] = pair_accuracy(likelihoods["chosen"][0] - likelihoods["rejected"][0])
    if rows.retained:
        found["perplexity"] = per_token(*likelihoods["retained"])
    if rows.prompts:
        found |= sampled(weights, rows.prompts, bench)
    for name, values in found.items():
        if not np.isfinite(values).all():
            raise SearchError(f"{name}: not a finite number at weights {told(weights)}; narrow the range")
    return found


@torch.no_grad()
def log_likelihoods(
    model: Policy, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Labelled], batch_size: int
) -> tuple[Array, Array]:
    """Log-likelihood (n,) of each row's labelled tokens, nats, and their number (n,)."""
    likelihood, count = np.zeros(len(rows)), np.zeros(len(rows))
    for part in length_batches([len(ids) for ids, _ in rows], batch_size):
        ids, mask = pad([rows[row][0] for row in part], tokenizer.pad_token_id, "right")
        labels, _ = pad([rows[row][1] for row in part], IGNORED, "right")
        ids, mask, labels = (x.to(model.device) for x in (ids, mask, labels))
        logits = model(input_ids=ids, attention_mask=mask.long(), use_cache=False).logits
        losses, counted = next_token_loss(logits, labels, 0.0)
        likelihood[part], count[part] = -losses.double().sum(1).cpu().numpy(), counted.sum(1).cpu().numpy()
    return likelihood, count


def per_token(likelihood: Array, count: Array) -> Array:
    """Numbers (n,) whose mean is the mean loss of a token and whose spread is that mean's, by linearisation.

    A ratio of two sums over rows, r = sum l / sum c, has the standard error of the mean of r + (l - r c) / mean(c).
    """
    ratio = -likelihood.sum() / count.sum()
    return np.asarray(ratio + (-likelihood - ratio * count) / count.mean())


@torch.no_grad()
def sampled(weights: Weights, prompts: Sequence[Text], bench: Bench) -> dict[str, Array]:
    """What is asked of one response to each prompt, sampled from the same noise at all weights; kl is k1, nats."""
    config, model, tokenizer = bench.config, bench.mixture.model, bench.tokenizer
    texts: list[str] = []
    scores: list[torch.Tensor] = []
    kl: list[torch.Tensor] = []
    torch.manual_seed(config.seed)
    for start in range(0, len(prompts), config.batch_size):
        bench.mixture.set(weights)
        rollout = generate(model, tokenizer, prompts[start : start + config.batch_size], config.sampling)
        texts += [decode(tokenizer, ids) for ids in rollout.responses.tolist()]
        if bench.reward_model is not None:
            scores.append(reward_model_scores(bench.reward_model, rollout.input_ids, rollout.attention_mask))
        ids = (rollout.input_ids, rollout.attention_mask, rollout.size, config.sampling.temperature)
        own = response_logprobs(model, *ids, tokenizer.pad_token_id)[0]
        bench.mixture.set(bench.reference)
        log_ratio = own - response_logprobs(model, *ids, tokenizer.pad_token_id)[0]
        kl.append(log_ratio.masked_fill(~rollout.response_mask, 0).sum(1))
    found: dict[str, Array] = {"kl": torch.cat(kl).double().cpu().numpy()}
    if scores:
        found["reward"] = torch.cat(scores).double().cpu().numpy()
    if "vader" in bench.asked:
        found["vader"] = Vader()(texts)
    if bench.classifier is not None:
        found["classifier"] = bench.classifier(texts)
    if "repetition" in bench.asked:
        found["repetition"] = np.array([word_repetition(text) for text in texts])
    return found


def figures(rows: Mapping[str, Array]) -> dict[str, float]:
    return {name: float(np.exp(x.mean()) if name == "perplexity" else x.mean()) for name, x in rows.items()}


def estimate(name: str, values: Array) -> Estimate:
    """The figure with its 95 % interval over rows."""
    if name == "accuracy":
        return share_ci(values)
    found = mean_ci(values)
    if name != "perplexity":
        return found
    return Estimate(math.exp(found.value), math.exp(found.low), math.exp(found.high), found.n)


# ------------------------------------------------------------------------------------------------- reading


def read_ranges(text: str, free: Sequence[str]) -> dict[str, tuple[float, float]]:
    """The range of each variable of `x=0:1.5,y=0:1`, in the expression's order; SearchError if one is amiss."""
    if not free:
        raise SearchError("expression: it has no $variable to find a number for; `compose` writes it as it is")
    found: dict[str, tuple[float, float]] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        match = re.fullmatch(r"\$?([\w.]+)\s*=\s*([^:]+):([^:]+)", part)
        if match is None:
            raise SearchError(f"range: expected variable=low:high,variable=low:high, got '{part}'")
        name = match[1]
        if name not in free:
            raise SearchError(f"range: the expression has no ${name}{nearest(name, list(free))}")
        try:
            low, high = float(match[2]), float(match[3])
        except ValueError:
            raise SearchError(f"range: {name}: expected two numbers, got '{match[2]}:{match[3]}'") from None
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise SearchError(f"range: {name}: expected low < high, both finite, got '{match[2]}:{match[3]}'")
        found[name] = (low, high)
    if missing := [name for name in free if name not in found]:
        raise SearchError(f"range: ${missing[0]} has none: say {missing[0]}=low:high")
    return {name: found[name] for name in free}


def read_measures(text: str, dial: str = "also") -> list[str]:
    """The measures that a dial names."""
    found = [part.strip() for part in text.split(",") if part.strip()]
    for name in found:
        if name not in MEASURED:
            expected = f"expected one of {', '.join(MEASURED)}"
            raise SearchError(f"{dial}: '{name}' is not measured{nearest(name, MEASURED)}; {expected}")
    return found


def read_constraints(text: str) -> list[Constraint]:
    """The constraints of `perplexity <= 1.05*base, kl <= 6`."""
    found = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        match = CONSTRAINT.fullmatch(part)
        if match is None:
            raise SearchError(f"constraints: expected `measure <= number` or `measure <= number*base`, got '{part}'")
        read_measures(match[1], "constraints")
        bound = float(match[3]) if match[3] else 1.0
        found.append(Constraint(match[1], match[2], bound, bool(match[4] or match[5])))
    return found


def read_splits(config: Search, asked: set[str], tokenizer: PreTrainedTokenizerBase) -> tuple[Rows, Rows]:
    """Validation and test rows; SearchError where they share a row."""
    splits = []
    for name, file, retained in (
        ("validation_file", config.validation_file, config.retain_file),
        ("test_file", config.test_file, config.retain_test_file),
    ):
        if not file:
            raise SearchError(f"{name}: say which rows; the two splits must share none")
        if "perplexity" in asked and not retained:
            which = "retain_file" if name == "validation_file" else "retain_test_file"
            raise SearchError(f"{which}: perplexity is asked for: say of which text")
        splits.append(read_split(file, retained if "perplexity" in asked else "", config, asked, tokenizer))
    validation, test = splits
    for one, other, rows, others in (
        ("validation_file", "test_file", validation.keys, test.keys),
        ("retain_file", "retain_test_file", validation.retained_keys, test.retained_keys),
    ):
        if shared := rows & others:
            raise SearchError(
                f"{other}: {len(shared)} of its rows are in {one} too, first {min(shared)[:80]}: what is chosen on a "
                "row cannot be reported on it; give rows that the search does not see"
            )
    return validation, test


def read_split(file: str, retained: str, config: Search, asked: set[str], tokenizer: PreTrainedTokenizerBase) -> Rows:
    """The rows of one split, each file read once, as tokens for what is asked."""
    kind = "pair" if "accuracy" in asked else "completion" if "loss" in asked else "prompt"
    rows = read_rows(file, kind, config.rows, config.bad_rows, config.seed)
    with_chat_template(tokenizer, rows)
    prompts = [row["prompt"] for row in rows]
    chosen, rejected = (
        labelled(tokenizer, prompts, [row[side] for row in rows]) if "accuracy" in asked else []
        for side in ("chosen", "rejected")
    )
    completion = "chosen" if kind == "pair" else "completion"
    completions = labelled(tokenizer, prompts, [row[completion] for row in rows]) if "loss" in asked else []
    short = [row for row in zip(chosen, rejected, strict=True) if max(len(ids) for ids, _ in row) <= config.max_tokens]
    fitting = [row for row in completions if len(row[0]) <= config.max_tokens]
    for kept, given in ((short, chosen), (fitting, completions)):
        if len(kept) < min(2, len(given)):
            raise SearchError(f"{file}: fewer than 2 rows have at most max_tokens = {config.max_tokens}: raise it")
        if len(kept) < len(given):
            say(f"{file}: {len(given) - len(kept):,} rows are longer than {config.max_tokens} tokens (left out)")
    texts = read_rows(retained, "text", config.rows, config.bad_rows, config.seed) if retained else []
    whole = labelled(tokenizer, [""] * len(texts), [row["text"] for row in texts]) if texts else []
    return Rows(
        prompts=prompts if asked & set(SAMPLED) else [],
        completions=fitting,
        chosen=[row[0] for row in short],
        rejected=[row[1] for row in short],
        retained=[(ids[: config.max_tokens], labels[: config.max_tokens]) for ids, labels in whole],
        keys={key(row, kind) for row in rows},
        retained_keys={key(row, "text") for row in texts},
    )


def key(row: Mapping[str, Any], kind: str) -> str:
    """A row's content."""
    return json.dumps([row[field] for field in FIELDS[kind]], ensure_ascii=False)


def labelled(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Text], completions: Sequence[Text]
) -> list[Labelled]:
    """Rows whose labels are the completion and its EOS."""
    rows = []
    for pieces in row_pieces(tokenizer, prompts, completions):
        before, completion = joined(pieces[:-1]), pieces[-1][0]
        rows.append((before + completion, [IGNORED] * len(before) + completion))
    return rows


def refuse_unmixable(adapters: Mapping[str, Adapter], ground: Ground) -> None:
    """AdapterError for what side by side is not the sum."""
    if ground.task != "CAUSAL_LM":
        raise AdapterError(f"adapters: task_type: {ground.task}; a search measures language models")
    for name, adapter in adapters.items():
        if adapter.heads:
            raise AdapterError(
                f"adapter '{name}': modules_to_save: it has whole trained layers ({', '.join(adapter.heads)}), which "
                "have no weight to search for"
            )


def new_bench(
    config: Search,
    expressions: Sequence[Expression],
    adapters: Mapping[str, Adapter],
    ground: Ground,
    asked: set[str],
    made: Path,
) -> Bench:
    """All adapters loaded, functions of adapters among them, written into the folder `made`; and the judges asked."""
    reference = parse(config.reference, adapters)
    if free := variables(reference):
        raise SearchError(f"reference: ${free[0]} has no value")
    folders = {name: adapter.folder for name, adapter in adapters.items()}
    updates = {name: adapter.update for name, adapter in adapters.items()}
    functions = {part: None for whole in (*expressions, reference) for part in parts(whole) if isinstance(part, Call)}
    for number, call in enumerate(call for call in functions if call.function not in ("avg", "lerp")):
        if free := variables(call):
            raise SearchError(
                f"expression: ${free[0]} stands in {call}, which is made anew for each number of it: a search finds "
                "weights only; put the variable before the function"
            )
        folders[str(call)] = made / str(number)
        folders[str(call)].mkdir()
        write_adapter(folders[str(call)], algebra.compress(algebra.evaluate(call, updates))[0], {}, ground, "fp32")
    device = new_accelerator("fp32").device
    reward_model, classifier = None, None
    if "reward" in asked:
        if not config.reward:
            raise SearchError("reward: say which reward model")
        same_tokenizer({"base": ground.path, "reward": config.reward})
        reward_model = frozen(load_reward_model(config.reward)).to(device)
    if "classifier" in asked:
        if not config.judge_file:
            raise SearchError("judge_file: say which rows the classifier is fitted to")
        classifier = fitted_judge(config.judge_file, config.seed)
    mixture = Mixture(ground.model, folders)
    mixture.model.to(device)
    return Bench(mixture, ground.tokenizer, asked, weights_of(reference), reward_model, classifier, config)


def weights_of(expression: Expression) -> dict[str, float]:
    """The expression as weights of what is loaded."""
    return {str(atom): float(weight) for atom, weight in weighted(expression).items()}


# ------------------------------------------------------------------------------------------------- showing


def told(numbers: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {number:.4g}" for name, number in numbers.items())


def draw(
    file: Path,
    trials: Sequence[Trial],
    chosen: Trial,
    objective: str,
    constraints: Sequence[Constraint],
    base: Mapping[str, float],
) -> None:
    """The objective against each variable and against each other measure, a panel each; hollow: breaks a constraint."""
    others = [name for name in chosen.figures if name != objective]
    across = [(f"${name}", lambda trial, name=name: trial.values[name]) for name in chosen.values]
    across += [(name, lambda trial, name=name: trial.figures[name]) for name in others]
    figure, axes = plt.subplots(
        1, len(across), figsize=(3.6 * len(across), 3.2), layout="constrained", squeeze=False, sharey=True
    )
    for axis, (title, of) in zip(axes[0], across, strict=True):
        rows = sorted((of(trial), trial.figures[objective], trial.excess) for trial in trials)
        if len(chosen.values) == 1 and title.startswith("$"):
            axis.plot([x for x, _, _ in rows], [y for _, y, _ in rows], color="0.75", zorder=1)
        colours = ["none" if excess else "C0" for _, _, excess in rows]
        axis.scatter([x for x, _, _ in rows], [y for _, y, _ in rows], c=colours, edgecolors="C0", s=22, zorder=2)
        axis.scatter([of(chosen)], [chosen.figures[objective]], marker="*", color="C3", s=120, zorder=3, label="chosen")
        for constraint in constraints:
            if constraint.measure == title:
                axis.axvline(constraint.limit(base), color="0.4", linestyle=":", label=str(constraint))
        axis.set_xlabel(title.replace("$", r"\$"), fontsize=9)
        axis.tick_params(labelsize=8)
        axis.legend(fontsize=8)
    axes[0, 0].set_ylabel(f"{objective}, validation rows", fontsize=9)
    figure.savefig(file, dpi=90)
    plt.close(figure)
