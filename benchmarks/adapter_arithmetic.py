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
import sys
import time
from collections.abc import Callable
from pathlib import Path

from finding_report import Claim, Figures, format_section, make_report, write_into_page
from findings import (
    Setup,
    measure_distribution,
    measure_initialisation,
    measure_multitask,
    measure_transfer,
    measure_unlearning,
)

FINDINGS: dict[str, tuple[Callable[[Setup, int], Figures], tuple[Claim, ...]]] = {
    "distribution": (
        measure_distribution,
        (
            Claim("the exact average beats the halves' mean", "mean of the halves", "exact average"),
            Claim("the factor-wise average beats the halves' mean", "mean of the halves", "factor-wise average"),
            Claim("the exact average beats the factor-wise one", "factor-wise average", "exact average"),
            Claim("the exact sum beats the halves' mean", "mean of the halves", "exact sum"),
            Claim("the exact average beats training on all", "trained on all", "exact average"),
        ),
    ),
    "initialisation": (
        measure_initialisation,
        (
            Claim("factor-wise: one start beats two", "factor-wise, two starts", "factor-wise, one start"),
            Claim("exact: one start beats two", "exact, two starts", "exact, one start"),
            Claim("one start: exact beats factor-wise", "factor-wise, one start", "exact, one start"),
            Claim("two starts: exact beats factor-wise", "factor-wise, two starts", "exact, two starts"),
        ),
    ),
    "multitask": (
        measure_multitask,
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
        measure_transfer,
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
        measure_unlearning,
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("finding", choices=FINDINGS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--base", type=Path, default=Path("runs/imdb/pretrain/final"))
    parser.add_argument("--runs", type=Path, default=Path("runs/adapter_arithmetic"))
    parser.add_argument("--adapter", choices=("lora", "ia3"), default="lora")
    parser.add_argument("--pairs", default="", help="unlearning: preference rows whose rejected answers are harmful")
    arguments = parser.parse_args()
    if not arguments.base.is_dir():
        sys.exit(f"error: {arguments.base}: no pretrained model; `make pretrain`, or give --base")
    setup = Setup(arguments.base, arguments.runs, arguments.adapter, arguments.pairs)
    finding, seeds = arguments.finding, arguments.seeds
    measure_finding, claims = FINDINGS[finding]
    by_seed = {}
    for seed in seeds:
        by_seed[seed] = measure_finding(setup, seed)
        print(f"{finding}, seed {seed}: {json.dumps(by_seed[seed])}", flush=True)
    options = f" --adapter {setup.adapter}" if setup.adapter != "lora" else ""
    options += " --pairs FILE" if setup.pairs else ""
    command = f"python benchmarks/adapter_arithmetic.py {finding} --seeds {' '.join(map(str, seeds))}{options}"
    report = make_report(claims, by_seed, time.process_time(), command)
    name = finding if setup.adapter == "lora" else f"{finding}-{setup.adapter}"
    file = Path("docs/findings") / f"{name}.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    lines = format_section(report)
    write_into_page(name, lines)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
