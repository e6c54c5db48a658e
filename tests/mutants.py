"""Would the tests notice? Bugs planted one at a time into a copy of the code, and the tests run on it.

    python tests/mutants.py [--sample N] [--jobs 2]        (make mutants)

PLANTED are bugs that pipelines for PPO have had; the rest is made from the syntax tree of the files where the maths
is (an operator, a comparison, a slice's bound, a maximum, a sign, a mask or a detach changed), leaving out lines that only a
clock or a second process can tell apart (tests/test_stages.py has two processes). Each mutant runs in a
process forked after the heavy imports. Prints caught / total, and what survived. Exit status 1 when a planted bug
survives or fewer than nine in ten of the others are caught.
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
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FILES = ("tensors", "losses", "advantages", "rollout", "ppo", "monitor")
TESTS = {
    "tensors": ("tensors", "golden", "rollout", "parity", "ppo"),
    "losses": ("losses", "golden", "parity", "trainers"),
    "advantages": ("advantages", "golden", "parity", "rollout", "ppo"),
    "rollout": ("rollout", "parity", "ppo"),
    "ppo": ("parity", "ppo", "roles"),
    "monitor": ("ppo",),
    "actor_critic": ("models", "roles", "parity", "rollout", "ppo"),
    "models": ("models", "roles", "parity", "rollout", "ppo"),
    "roles": ("roles",),
    "scoring": ("scoring", "parity", "rollout"),
    "data": ("data", "rollout"),
    "checkpoints": ("checkpoints",),
    "keeping": ("ppo", "checkpoints"),
    "run": ("checkpoints", "run"),
}
SECONDS = 240  # a mutant may loop for ever


@dataclass(frozen=True)
class Mutant:
    name: str
    file: str
    text: str


# file, what stands there, what stands there instead, whose bug it was
PLANTED = [
    ("tensors", "return counts.cumsum(dim=1) - counts", "return torch.arange(counts.shape[1]).expand(counts.shape)", "positions count padding"),
    ("tensors", "is_eos.long().cumsum(dim=1) - is_eos.long() == 0", "is_eos.long().cumsum(dim=1) == 0", "the EOS is left out of the mask"),
    ("tensors", "not_after_eos.sum(dim=1), is_eos.any(dim=1)", "not_after_eos.sum(dim=1), is_eos[:, -1]", "EOS looked for in the last slot only"),
    ("tensors", "return torch.where(mask, x, 0).sum()", "return (x * mask).sum()", "NaN times a mask"),
    ("tensors", "masked_sum(x, mask) / (mask.sum() if denominator is None else denominator)", "masked_sum(x, mask) / mask.sum()", "a mean per micro-batch"),
    ("tensors", "masked_sum(x, mask) / (mask.sum() if denominator is None else denominator)", "torch.where(mask, x, 0).mean()", "a mean over padding"),
    ("tensors", "total, count = reduce(torch.stack([masked_sum(x_real, mask), mask.sum().double()]))", "total, count = torch.stack([masked_sum(x_real, mask), mask.sum().double()])", "whitening per process"),
    ("tensors", "masked_sum((x_real - mean).square(), mask)", "(x_real - mean).square().sum()", "variance over padding"),
    ("tensors", "centred = x.double().masked_fill(~mask, 0) - mean", "centred = x.double().masked_fill(~mask, 0)", "whitening does not centre"),
    ("tensors", "(logits.float() / temperature).log_softmax(dim=-1)", "logits.float().log_softmax(dim=-1)", "temperature forgotten in scoring"),
    ("tensors", "(logits.float() / temperature).log_softmax(dim=-1)", "(logits / temperature).log_softmax(dim=-1).float()", "log-softmax in the model's type"),
    ("tensors", "log_p.masked_fill(log_p == -torch.inf, 0)", "log_p", "entropy of a token that cannot be emitted"),
    ("losses", "return torch.maximum(free, bound), statistics", "return torch.minimum(free, bound), statistics", "pessimism turned round"),
    ("losses", "log_ratio = torch.where(mask, logprobs - old_logprobs, 0)", "log_ratio = torch.where(mask, old_logprobs - logprobs, 0)", "the ratio turned round"),
    ("losses", "log_ratio = torch.where(mask, logprobs - old_logprobs, 0)", "log_ratio = logprobs - old_logprobs", "padding in the ratio"),
    ("losses", "ratio.clamp(1 - clip, 1 + clip)", "ratio.clamp(1 / (1 + clip), 1 + clip)", "a clip range that is not symmetric"),
    ("losses", '"clipped": bound > free,\n    }', '"clipped": (ratio.detach() - 1).abs() > clip,\n    }', "clip fraction of all far ratios"),
    ("losses", "values.clamp(old_values - clip, old_values + clip)", "values.clamp(returns - clip, returns + clip)", "values clipped around the return"),
    ("losses", "return 0.5 * torch.maximum(free, bound), {", "return 0.5 * free, {", "the clipped value loss is not taken"),
    ("losses", "return 0.5 * torch.maximum(free, bound), {", "return torch.maximum(free, bound), {", "the half of the value loss"),
    ("losses", "label_smoothing * z.shape[1] / (z.shape[1] - 1)", "label_smoothing", "smoothing over all classes"),
    ("losses", "targets = labels[:, 1:]", "targets = labels[:, :-1]", "labels not shifted"),
    ("advantages", "return logprobs - ref_logprobs", "return ref_logprobs - logprobs", "KL of the wrong sign"),
    ("advantages", "return logprobs - ref_logprobs", "return (logprobs - ref_logprobs).clamp(min=0)", "KL clamped to be positive"),
    ("advantages", "return logprobs - ref_logprobs", "return kl_k3(logprobs, ref_logprobs)", "k3 in the reward"),
    ("advantages", "torch.where(has_eos, scores, missing_eos_score)", "torch.where(has_eos, scores, scores + missing_eos_score)", "missing EOS subtracts"),
    ("advantages", "scores[:, None].to(penalty.dtype))", "scores[:, None].to(penalty.dtype) / mask.sum(1, keepdim=True))", "the score shared out over tokens"),
    ("advantages", "slots.masked_fill(~mask, -1).amax(dim=1)", "(slots.masked_fill(~mask, -1).amax(dim=1) + 1).clamp(max=mask.shape[1] - 1)", "the score one slot late"),
    ("advantages", "penalty = -kl_coef * kl.masked_fill(~mask, 0)", "penalty = kl_coef * kl.masked_fill(~mask, 0)", "KL paid instead of charged"),
    ("advantages", "    values = values.masked_fill(~mask, 0)\n    next_value", "    next_value", "values after the end bootstrap"),
    ("advantages", "rewards[:, t] + gamma * next_value - values[:, t]", "rewards[:, t] + next_value - values[:, t]", "gamma forgotten"),
    ("advantages", "next_advantage = delta + gamma * lam * next_advantage", "next_advantage = delta + lam * next_advantage", "gamma forgotten in the trace"),
    ("advantages", "error = min(max(kl / target - 1, -0.2), 0.2)", "error = kl / target - 1", "the controller's error is not cut"),
    ("rollout", "returns=(advantages + old_values).masked_fill(~mask, 0)", "returns=(whiten(advantages, mask, reduce) + old_values).masked_fill(~mask, 0)", "returns of whitened advantages"),
    ("rollout", "replace_missing_eos(clip_scores(all_scores, config.score_clip), rollout.has_eos, config.missing_eos_score)", "clip_scores(all_scores, config.score_clip)", "a cut-off answer keeps its score"),
    ("rollout", "advantages=whiten(advantages, mask, reduce),", "advantages=advantages,", "no whitening"),
    ("rollout", "    model.eval()\n", "", "dropout while sampling"),
    ("rollout", "value=tokenizer.pad_token_id", "value=tokenizer.eos_token_id", "padded with EOS"),
    ("ppo", "accelerator.backward(loss * accelerator.num_processes)", "accelerator.backward(loss * accelerator.num_processes / len(parts))", "gradient divided by micro-batches"),
    ("ppo", "float(update_policy) * (policy - config.entropy_coef * entropy)", "float(update_policy) * (policy + config.entropy_coef * entropy)", "the entropy bonus punishes"),
    ("ppo", "float(update_policy) * (policy - config.entropy_coef * entropy)", "policy - config.entropy_coef * entropy", "no critic warm-up"),
    ("ppo", "    optimizer.zero_grad()\n    return norm", "    return norm", "gradients pile up"),
    ("ppo", "for rows in torch.randperm(len(experience)).split(own):", "for rows in torch.arange(len(experience)).split(own):", "the same minibatches every epoch"),
    ("ppo", "for rows in torch.randperm(len(experience)).split(own):", "for rows in torch.randperm(len(experience)).split(own)[:1]:", "one minibatch per epoch"),
    ("ppo", "lambda step: 1 - step / config.rollouts", "lambda step: 1.0", "the learning rate stays"),
    ("ppo", "groups[CRITIC in name.split(\".\")]", "groups[False]", "the critic's rate is the policy's"),
    ("actor_critic", "with role(self.policy, REFERENCE if REFERENCE in self.policy.peft_config else None):", "if True:", "the reference learns with the policy"),
    ("ppo", "    if norm.isfinite() or accelerator.scaler is not None:", "    if True:", "steps into NaN"),
    ("ppo", "norm.isfinite() or accelerator.scaler is not None:", "norm.isfinite():", "a loss scale that is never lowered"),
    ("checkpoints", "    load_accelerator_state(", "    (lambda *_: None)(", "random states not restored"),
    ("checkpoints", "dcp.load({", "(lambda *_, **__: None)({", "weights and moments stay where they began"),
    ("checkpoints", "        if not damaged:\n", "        if True:\n", "a damaged checkpoint is gone on from"),
    ("keeping", "kl_coef\"])", "kl_coef\"] / 2)", "the KL coefficient of a run that goes on is another's"),
    ("keeping", "history[best].weights.update(load_file(found.folder / BEST))", "pass", "the best policy is lost when a run goes on"),
    ("ppo", "        for _ in range(progress.rollouts):\n            next(batches)\n", "", "the first prompts come again"),
    ("run", "os.truncate(self.folder / name, found.facts[\"logs\"].get(name, 0))", "pass", "log lines twice"),
    ("ppo", "config = adapted(config, metrics[\"kl\"])", "adapted(config, metrics[\"kl\"])", "the adaptive coefficient is not used"),
    ("ppo", "update_policy = step >= config.critic_warmup", "update_policy = step > config.critic_warmup", "the warm-up lasts one rollout too long"),
    ("keeping", "if wrong or config.keep == \"best\" else last", "if config.keep == \"best\" else last", "a collapsed policy is kept"),
    ("monitor", "last[\"eval_kl\"] > config.kl_budget", "first[\"eval_kl\"] > config.kl_budget", "the KL budget watches SFT"),
    ("monitor", "\"kl\": kl / sequences", "\"kl\": kl / tokens", "KL per token called KL per response"),
    ("actor_critic", "[:, -size - 1 : -1]", "[:, -size:]", "values after the token"),
    ("actor_critic", "logits, tokens = output.logits[:, :-1]", "logits, tokens = output.logits[:, 1:]", "log-probabilities of the next token"),
    ("actor_critic", "states[0][:, -size - 1 : -1]", "states[0][:, -size:]", "values of a head after the token"),
    ("actor_critic", "self.critic(hidden if update_policy else hidden.detach())", "self.critic(hidden)", "the critic's warm-up moves the policy"),
    ("actor_critic", "classifier.config.score_shift = -self.bias.item()", "classifier.config.score_shift = 0.0", "a value head's bias lost when saved"),
    ("models", "    if heads:\n", "    if False:\n", "a reward model taken for a policy"),
    ("models", 'if info["missing_keys"] or info["unexpected_keys"]:', "if False:", "a random head in place of a missing one"),
    ("actor_critic", "logprobs_and_entropy(logits_without(logits, [pad_id]), tokens, temperature)", "logprobs_and_entropy(logits, tokens, temperature)", "padding can be emitted when scored"),
    ("models", "top_k=0,", "", "transformers' own top-k of 50"),
    ("roles", "            layer._active_adapter, layer._disable_adapters = names, is_base\n", "            pass\n", "a role is not given back"),
    ("roles", "return nullcontext(), reading(layers, None if is_base else layers[0].active_adapters[0])", "return nullcontext(), nullcontext()", "activations computed again in another role"),
    ("roles", "part.requires_grad_(owner in (POLICY, CRITIC))", "part.requires_grad_(True)", "reference and reward learn too"),
    ("actor_critic", "with role(self.policy, head.role):", "if True:", "the critic reads the policy's adapter"),
    ("actor_critic", "return head(checkpoint(states, use_reentrant=False))", "return head(states())", "two trunks' activations at a time"),
    ("actor_critic", "weights | {f\"{PREFIX}score.weight\": self.weight}", "weights | {f\"{PREFIX}score.weight\": 0 * self.weight}", "a critic's head lost when saved"),
    ("actor_critic", "theirs, ours = hash_trunk(model), hash_trunk(full_precision_base(unwrap_peft(policy)))", "theirs = ours = hash_trunk(model)", "a reward adapter on another base"),
    ("actor_critic", "head.bias.fill_(-shift)", "head.bias.fill_(shift)", "a role's score shifted the wrong way"),
    ("scoring", "model.config.score_shift), attention_mask)", "0.0), attention_mask)", "the score is not centred"),
    ("scoring", "torch.where(attention_mask, positions, -1).amax(1)", "attention_mask.sum(1) - 1", "the last token under left padding"),
    ("data", "[*next(closed), tokenizer.eos_token_id]", "[*next(closed)]", "no EOS in reward training"),
]  # fmt: skip


def planted() -> Iterator[Mutant]:
    """The bugs of PLANTED; an error when the code has changed under one of them."""
    for file, old, new, name in PLANTED:
        text = (ROOT / f"pipeline/{file}.py").read_text(encoding="utf-8")
        if old not in text:
            raise SystemExit(f"mutants: '{name}': no such text in pipeline/{file}.py any more: {old}")
        yield Mutant(f"planted: {name}", file, text.replace(old, new, 1))


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
            yield Mutant(f"{file}.py:{line}: {what}", file, ast.unparse(ast.fix_missing_locations(mutated)))


def is_caught(mutant: Mutant, copies: list[Path]) -> bool:
    """Whether a test fails on a copy of the project with the mutant in it; the copy is put back as it was."""
    copy = copies.pop()
    target = copy / f"pipeline/{mutant.file}.py"
    target.write_text(mutant.text, encoding="utf-8")
    try:
        return any(fails(copy, test) for test in TESTS[mutant.file])
    finally:
        shutil.copy(ROOT / f"pipeline/{mutant.file}.py", target)
        copies.append(copy)


def fails(copy: Path, test: str) -> bool:
    """Whether tests/test_<test>.py fails, or does not end, in a process forked from this one."""
    child = os.fork()
    if child == 0:
        os.setsid()
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        os.chdir(copy)
        sys.path[:0] = [str(copy), str(copy / "tests")]
        import pytest

        status = pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-p", "no:randomly", f"tests/test_{test}.py"])
        os._exit(int(status != 0))
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status != 0
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return True


def new_copy(folder: Path) -> Path:
    for name in ("pipeline", "tests", "configs", "stages", "benchmarks", "docs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "Makefile"):
        shutil.copy(ROOT / name, folder / name)
    return folder


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=int, default=70, help="how many automatic mutants, drawn with a fixed seed")
    parser.add_argument("--planted", type=int, default=len(PLANTED), help="how many planted ones, spread over the list")
    parser.add_argument("--only", default="", help="planted ones of this file alone, and no automatic ones")
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
    step = max(1, len(hand) // max(1, given.planted))
    hand = hand[::step][: given.planted]
    every = [mutant for file in FILES for mutant in automatic(file)]
    drawn = random.Random(0).sample(every, 0 if given.only else min(given.sample, len(every)))
    started, survivors = time.monotonic(), []
    with tempfile.TemporaryDirectory() as place, ThreadPoolExecutor(given.jobs) as pool:
        copies = [new_copy(Path(place) / str(number)) for number in range(given.jobs)]
        for mutant, caught in zip(
            [*hand, *drawn], pool.map(lambda m: is_caught(m, copies), [*hand, *drawn]), strict=True
        ):
            if not caught:
                survivors.append(mutant)
                print(f"survived: {mutant.name}", flush=True)
    lost = sum(mutant.name.startswith("planted") for mutant in survivors)
    rest = len(survivors) - lost
    print(f"planted: {len(hand) - lost}/{len(hand)} caught; automatic: {len(drawn) - rest}/{len(drawn)} caught "
          f"(of {len(every)}); {time.monotonic() - started:.0f} s")  # fmt: skip
    return int(lost > 0 or rest > 0.1 * len(drawn))


if __name__ == "__main__":
    sys.exit(main())
