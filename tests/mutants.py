"""Would the tests notice? Bugs planted one at a time into a copy of the code, and the tests run on it.

    python tests/mutants.py [--planted N] [--sample N] [--two N] [--jobs 2]        (make mutants)

First the tests run on the code as it is: were one to fail there, every bug would count as caught. Then come the bugs of
tests/planted_bugs.py, and changes made from the syntax tree of the files where the maths is (an operator, a comparison,
a slice's bound, a maximum, a sign, a mask or a detach changed), leaving out lines that only a clock or a second process
can tell apart. Each mutant runs in a process forked after the heavy imports. Prints caught / total, and what survived.
Exit status 1 when the control run fails, when a planted bug survives, or when fewer than nine in ten of the others are
caught.
"""

import argparse
import ast
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from planted_bugs import PLANTED, TWO_PROCESSES

ROOT = Path(__file__).resolve().parent.parent
FILES = (
    "core/tensors",
    "core/losses",
    "core/advantages",
    "rl/rollout",
    "rl/experience",
    "rl/update",
    "rl/monitor",
    "ppo",
)
TESTS = {
    "core/tensors": ("core/test_tensors", "rl/test_golden", "rl/test_rollout", "rl/test_parity", "rl/test_ppo"),
    "core/losses": ("core/test_losses", "rl/test_golden", "rl/test_parity", "training/test_trainer"),
    "core/advantages": ("core/test_advantages", "rl/test_golden", "rl/test_parity", "rl/test_rollout", "rl/test_ppo"),
    "rl/rollout": ("rl/test_rollout", "rl/test_parity", "rl/test_ppo", "chain/test_reward"),
    "rl/experience": ("rl/test_rollout", "rl/test_parity", "rl/test_ppo"),
    "rl/update": ("rl/test_parity", "rl/test_ppo"),
    "rl/setup": ("rl/test_ppo", "models/test_multi_adapter", "runtime/test_checkpoints"),
    "rl/monitor": ("rl/test_ppo",),
    "rl/progress": ("rl/test_ppo", "runtime/test_checkpoints"),
    "rl/rewards": ("rl/test_rewards", "rl/test_parity", "rl/test_rollout"),
    "ppo": ("rl/test_parity", "rl/test_ppo", "models/test_multi_adapter"),
    "models/actor_critic": ("models/test_models", "models/test_multi_adapter", "rl/test_parity", "rl/test_ppo"),
    "models/forward": ("models/test_models", "rl/test_parity", "rl/test_rollout", "rl/test_ppo"),
    "models/heads": ("models/test_models", "models/test_multi_adapter", "rl/test_ppo"),
    "models/fresh_adapter": ("models/test_fresh_adapter",),
    "models/loading": ("models/test_models", "models/test_multi_adapter", "models/test_loading"),
    "models/saving": ("models/test_models", "models/test_fresh_adapter", "rl/test_rollout"),
    "adapters/base": ("models/test_custom_code",),
    "reward": ("chain/test_reward",),
    "training/batches": ("training/test_batches", "training/test_trainer"),
    "training/trainer": ("training/test_trainer", "chain/test_reward"),
    "data/files": ("data/test_files",),
    "data/sources": ("data/test_sources",),
    "models/multi_adapter": ("models/test_multi_adapter",),
    "data/tokenize": ("data/test_tokenize", "rl/test_rollout"),
    "runtime/checkpoints": ("runtime/test_checkpoints",),
    "runtime/logs": ("runtime/test_checkpoints",),
}
TWO = "chain/test_distributed"
SECONDS = 600  # a mutant may loop for ever
NO_TESTS = 5  # pytest's exit status


@dataclass(frozen=True)
class Mutant:
    name: str
    file: str
    text: str
    tests: tuple[str, ...]
    only: str = ""  # an expression of `pytest -k`


def planted() -> Iterator[Mutant]:
    """The bugs of PLANTED, and those that show on two processes alone."""
    for file, old, new, name in PLANTED:
        yield Mutant(f"planted: {name}", file, with_bug(file, old, new, name), TESTS[file])
    for file, old, new, name, only in TWO_PROCESSES:
        yield Mutant(f"planted: {name}", file, with_bug(file, old, new, name), (TWO,), only)


def with_bug(file: str, old: str, new: str, name: str) -> str:
    """The file's text with the bug; an error when the code has changed under it."""
    text = (ROOT / f"pipeline/{file}.py").read_text(encoding="utf-8")
    if text.count(old) != 1:
        raise SystemExit(f"mutants: '{name}': not once in pipeline/{file}.py: {old}")
    return text.replace(old, new)


SWAPS: dict[type, type] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult,
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
}  # fmt: skip
CALLS = {
    "maximum": "minimum",
    "sum": "mean",
    "mean": "sum",
    "amax": "amin",
    "any": "all",
    "exp": "abs",
    "max": "min",
    "min": "max",
}
ALONE = re.compile(r"is_main|uses_deepspeed|DTensor|num_processes|process_index|no_sync|number == len|monotonic")
DROPPED = ("masked_fill", "detach", "square", "clamp")


def changes(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """Each way to change this node alone: what it is called, and the changed node."""
    new = deepcopy(node)
    if isinstance(new, ast.BinOp) and type(new.op) in SWAPS and not isinstance(new.left, ast.Constant | ast.JoinedStr):
        new.op = SWAPS[type(new.op)]()
        yield f"{type(node.op).__name__} -> {type(new.op).__name__}", new  # type: ignore[attr-defined]
    elif isinstance(new, ast.Compare) and len(new.ops) == 1 and type(new.ops[0]) in SWAPS:
        new.ops = [SWAPS[type(new.ops[0])]()]
        yield f"{type(node.ops[0]).__name__} -> {type(new.ops[0]).__name__}", new  # type: ignore[attr-defined]
    elif (
        isinstance(new, ast.UnaryOp)
        and isinstance(new.op, ast.USub | ast.Invert)
        and not isinstance(new.operand, ast.Constant)
    ):
        yield f"{type(new.op).__name__} dropped", new.operand
    elif isinstance(new, ast.Slice):
        for side in ("lower", "upper"):
            bound = getattr(new, side)
            if bound is not None:
                moved = deepcopy(new)
                setattr(moved, side, ast.BinOp(bound, ast.Add(), ast.Constant(1)))
                yield f"slice {side} + 1", moved
    elif isinstance(new, ast.Call) and isinstance(new.func, ast.Attribute):
        name = new.func.attr
        if name in CALLS:
            new.func.attr = CALLS[name]
            yield f"{name} -> {CALLS[name]}", new
        elif name in DROPPED:
            yield f"{name} dropped", new.func.value


class Replace(ast.NodeTransformer):
    def __init__(self, number: int, new: ast.AST) -> None:
        self.number, self.new, self.seen = number, new, -1

    def visit(self, node: ast.AST) -> ast.AST:
        self.seen += 1
        return self.new if self.seen == self.number else self.generic_visit(node)


def automatic(file: str) -> Iterator[Mutant]:
    """Every change to every node of a file, assertions and error messages aside."""
    source = (ROOT / f"pipeline/{file}.py").read_text(encoding="utf-8")
    tree = ast.parse(source)
    counter = Replace(-2, tree)
    order: list[ast.AST] = []
    counter.visit = lambda node: (order.append(node), ast.NodeTransformer.generic_visit(counter, node))[1]  # type: ignore[method-assign]
    counter.visit(ast.parse(source))
    skipped = {
        id(inner)
        for node in order
        if isinstance(node, ast.Raise | ast.Assert | ast.JoinedStr)
        for inner in ast.walk(node)
    }
    skipped |= {
        id(inner)
        for node in order
        if isinstance(node, ast.FunctionDef)
        for inner in [n for a in (node.args, node.returns) if a for n in ast.walk(a)]
    }
    lines = source.splitlines()
    for number, node in enumerate(order):
        if id(node) in skipped or ALONE.search(lines[getattr(node, "lineno", 1) - 1]):
            continue
        for what, new in changes(node):
            mutated = Replace(number, new).visit(ast.parse(source))
            line = getattr(node, "lineno", 0)
            yield Mutant(
                f"{file}.py:{line}: {what}", file, ast.unparse(ast.fix_missing_locations(mutated)), TESTS[file]
            )


def is_caught(mutant: Mutant, copies: list[Path]) -> bool:
    """Whether a test fails on a copy of the project with the mutant in it; the copy is put back as it was."""
    copy = copies.pop()
    target = copy / f"pipeline/{mutant.file}.py"
    target.write_text(mutant.text, encoding="utf-8")
    try:
        return any(fails(copy, test, mutant.only) for test in mutant.tests)
    finally:
        shutil.copy(ROOT / f"pipeline/{mutant.file}.py", target)
        copies.append(copy)


def fails(copy: Path, test: str, only: str = "") -> bool:
    """Whether tests/<test>.py, or what of it `only` chooses, fails or does not end; in a process forked from here."""
    child = os.fork()
    if child == 0:
        os.setsid()
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        os.chdir(copy)
        sys.path[:0] = [str(copy), str(copy / "tests")]
        import pytest

        chosen = ["-k", only] if only else []
        status = pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-p", "no:randomly", *chosen, f"tests/{test}.py"])
        os._exit(int(status))
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            if os.waitstatus_to_exitcode(status) == NO_TESTS:
                raise SystemExit(f"mutants: no test is chosen by -k '{only}' in tests/{test}.py")
            return status != 0
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return True


def new_copy(folder: Path) -> Path:
    for name in ("pipeline", "tests", "configs", "stages", "benchmarks", "docs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "Makefile", "data-requirements.txt"):
        shutil.copy(ROOT / name, folder / name)
    return folder


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=int, default=70, help="how many automatic mutants, drawn with a fixed seed")
    parser.add_argument("--planted", type=int, default=len(PLANTED), help="how many planted ones, spread over the list")
    parser.add_argument("--two", type=int, default=len(TWO_PROCESSES), help="how many that want two processes")
    parser.add_argument("--only", default="", help="planted ones of this file alone, and no automatic ones")
    parser.add_argument("--control", default="", help="control run of this test file alone, where all have just passed")
    parser.add_argument("--jobs", type=int, default=2)
    given = parser.parse_args()
    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "WANDB_MODE": "offline",
        "OMP_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
    sys.dont_write_bytecode = True
    import peft  # noqa: F401  # what every test imports, before the forks
    import torch
    import transformers  # noqa: F401
    from trl import RewardTrainer, SFTTrainer  # noqa: F401

    torch.set_num_threads(1)
    hand = [mutant for mutant in planted() if given.only in ("", mutant.file)]
    alone = spread([mutant for mutant in hand if not mutant.only], given.planted)
    together = spread([mutant for mutant in hand if mutant.only], given.two)
    every = [mutant for file in FILES for mutant in automatic(file)]
    drawn = random.Random(0).sample(every, 0 if given.only else min(given.sample, len(every)))
    chosen = [*together, *alone, *drawn]  # the longest first
    started, survivors = time.monotonic(), []
    with tempfile.TemporaryDirectory() as place, ThreadPoolExecutor(given.jobs) as pool:
        copies = [new_copy(Path(place) / str(number)) for number in range(given.jobs)]
        control = dict.fromkeys((test, mutant.only) for mutant in chosen for test in mutant.tests)
        if given.control:
            control = {(given.control, ""): None}
        wrong = [
            test
            for test, failed in zip(control, pool.map(partial(control_fails, copies), control), strict=True)
            if failed
        ]
        if wrong:
            names = ", ".join(f"tests/{test}.py" + (f" -k '{only}'" if only else "") for test, only in wrong)
            print(f"mutants: the tests fail without any bug, so they can tell nothing: {names}")
            return 1
        print(f"control: {len(control)} test files pass without a bug; {time.monotonic() - started:.0f} s", flush=True)
        for mutant, caught in zip(chosen, pool.map(lambda m: is_caught(m, copies), chosen), strict=True):
            if not caught:
                survivors.append(mutant)
                print(f"survived: {mutant.name}", flush=True)
    lost = sum(mutant.name.startswith("planted") for mutant in survivors)
    rest, planted_ones = len(survivors) - lost, len(chosen) - len(drawn)
    print(f"planted: {planted_ones - lost}/{planted_ones} caught; automatic: {len(drawn) - rest}/{len(drawn)} caught "
          f"(of {len(every)}); {time.monotonic() - started:.0f} s")  # fmt: skip
    return int(lost > 0 or rest > 0.1 * len(drawn))


def control_fails(copies: list[Path], run: tuple[str, str]) -> bool:
    """Whether a test file fails on the code as it is."""
    copy = copies.pop()
    try:
        return fails(copy, *run)
    finally:
        copies.append(copy)


def spread(mutants: list[Mutant], count: int) -> list[Mutant]:
    """So many of them, evenly over the list."""
    return mutants[:: max(1, len(mutants) // max(1, count))][:count]


if __name__ == "__main__":
    sys.exit(main())
