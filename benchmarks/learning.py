"""Does PPO learn what it is paid for? Two tasks whose optimum is known, on several seeds: docs/learning.md.

    python benchmarks/learning.py walk --seeds 1 2 3      shortest paths, from a model of random walks
    python benchmarks/learning.py stop --seeds 1 2 3      end after exactly seven tokens, from the same model

Each seed draws a directed graph of 21 nodes, pretrains a Llama of about 1 M parameters on random walks over it, and
trains that by PPO against a score function whose best value is 1. Curves go to docs/curves/<task>_<critic>.png.
"""

import argparse
import json
import os
import random
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path

from plots import draw, series
from torch import Tensor, tensor
from transformers import PreTrainedTokenizerBase

from pipeline import ppo, pretrain
from pipeline.config.dials import Adapter, Optim, Run, Sampling
from pipeline.config.stages import PPO, Pretrain
from pipeline.data.tokenizer import load_tokenizer
from pipeline.evaluation.report import markdown_table
from pipeline.evaluation.statistics import mean_ci

Graph = list[list[int]]  # the nodes to which each node leads

NODES, GOAL, LONGEST = 21, 0, 10  # nodes; where a walk shall end; most steps of a walk
WALKS = 4000
STOP_AFTER = 7  # tokens, EOS included


def new_graph(rng: random.Random) -> Graph:
    """A directed graph in which an edge has probability 0.1 and every node reaches the goal within LONGEST steps."""
    while True:
        graph = [[b for b in range(NODES) if b != a and rng.random() < 0.1] for a in range(NODES)]
        if all(graph) and max(steps_to_goal(graph)) <= LONGEST:
            return graph


def steps_to_goal(graph: Graph) -> list[int]:
    """Steps of each node's shortest path to the goal, by breadth-first search; NODES where there is none."""
    steps = [NODES] * NODES
    reached = [GOAL]
    for distance in range(NODES):
        for node in reached:
            steps[node] = distance
        reached = [a for a in range(NODES) if steps[a] == NODES and any(b in reached for b in graph[a])]
    return steps


def random_walk(graph: Graph, rng: random.Random) -> list[int]:
    """Nodes from a random start other than the goal: to the goal, or for LONGEST steps."""
    walk = [rng.randrange(1, NODES)]
    while walk[-1] != GOAL and len(walk) <= LONGEST:
        walk.append(rng.choice(graph[walk[-1]]))
    return walk


def optimality(graph: Graph, walk: Sequence[int]) -> float:
    """Steps of the shortest path from the walk's start to the goal, over the walk's; 0 for what is no path to it."""
    if len(walk) < 2 or walk[-1] != GOAL or any(b not in graph[a] for a, b in pairwise(walk)):
        return 0.0
    return steps_to_goal(graph)[walk[0]] / (len(walk) - 1)


def closeness(length: int) -> float:
    """1 for a response of STOP_AFTER tokens, falling by a seventh with each token more or fewer."""
    return max(0.0, 1 - abs(length - STOP_AFTER) / STOP_AFTER)


def text(walk: Sequence[int]) -> str:
    return "".join(f" n{node}" for node in walk)


def walk_of(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    """The nodes that a row of tokens names, special tokens left out."""
    return [int(word[1:]) for word in tokenizer.decode(ids, skip_special_tokens=True).split()]


def score_function(task: str, graph: Graph, tokenizer: PreTrainedTokenizerBase) -> Callable[[Tensor, Tensor], Tensor]:
    """The task's score of each row: a prompt of bos and a start, then the response."""

    def score(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        rows = [ids[mask].tolist() for ids, mask in zip(input_ids, attention_mask, strict=True)]
        if task == "stop":
            return tensor([closeness(len(row) - 2) for row in rows])
        return tensor([optimality(graph, walk_of(tokenizer, row)) for row in rows])

    return score


def write(file: Path, rows: list[dict[str, str]]) -> str:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(file)


def train(task: str, critic: str, runs: Path, seed: int) -> Path:
    """Pretrains on random walks, unless that is done, and then PPO; returns PPO's folder."""
    rng = random.Random(seed)
    graph = new_graph(rng)
    folder = runs / f"seed{seed}"
    walks = [{"text": text(random_walk(graph, rng))} for _ in range(WALKS)]
    starts = [{"prompt": text([node])} for node in range(1, NODES)]
    file, held_out = write(folder / "walks.jsonl", walks[:-200]), write(folder / "held_out.jsonl", walks[-200:])
    prompts = write(folder / "prompts.jsonl", starts * 13)  # a prompt occurs once in a rollout: several of each start
    run = Run(recipe="learning", runs=str(folder), seed=seed, precision="fp32", report_to="none")
    base = pretrain.train(
        Pretrain(
            run=run, optim=Optim(learning_rate=1e-3, num_train_epochs=6, batch_size=32, micro_batch=32),
            train_file=file,
            validation_file=held_out, tokenizer="word", hidden_size=128, intermediate_size=352, num_hidden_layers=5,
            num_attention_heads=4,
            context=64, sample_tokens=12,
        )
    )  # fmt: skip
    tokenizer = load_tokenizer(base)
    config = PPO(
        run=Run(recipe=f"{task}_{critic}", runs=str(folder), seed=seed, precision="fp32", report_to="none"),
        adapter=Adapter(adapter="none"), sampling=Sampling(max_new_tokens=LONGEST + 1, max_prompt_tokens=4),
        sft=str(base), train_file=prompts, validation_file=prompts, critic=critic, rollouts=60, rollout_batch=128,
        micro_batch=128, num_ppo_epochs=4, num_mini_batches=1, learning_rate=3e-4, critic_learning_rate=1e-3,
        kl_coef=0.0,
        missing_eos_score=0.0, critic_warmup=5, eval_steps=5, eval_prompts=260, keep="last", collapse_alarm=False,
    )  # fmt: skip
    return ppo.train(config, score_function(task, graph, tokenizer)).parent


PANELS = {
    "eval_score": "score on every start (share of the optimum)",
    "kl": "KL to the random walks (nats per response)",
    "entropy": "entropy (nats per token)",
    "length": "length (tokens)",
    "explained_variance": "explained variance of the returns",
    "clip_fraction": "clipped tokens (share)",
}


def row(task: str, critic: str, seed: int, folder: Path) -> tuple[list[str], float]:
    """The seed's line of the table, and the score of the last evaluation."""
    found = series(folder)
    scores, seconds = [value for _, value in found["eval_score"]], sum(value for _, value in found["seconds"])
    reached = next((str(step) for step, value in found["eval_score"] if value >= 0.95), "never")
    last = [f"{found[name][-1][1]:.2f}" for name in ("eval_kl", "eval_length", "eval_eos_share")]
    cells = [task, critic, str(seed), f"{scores[0]:.3f}", f"{scores[-1]:.3f}", reached, *last, f"{seconds:.0f}"]
    return cells, scores[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=("walk", "stop"))
    parser.add_argument("--critic", choices=("sft", "head"), default="sft", help="PPO's dial")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--runs", type=Path, default=Path("runs/learning"))
    parser.add_argument("--jobs", type=int, default=1, help="seeds run side by side, sharing the cores")
    given = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // given.jobs))
    one = partial(train, given.task, given.critic, given.runs)
    if given.jobs == 1:
        folders = list(map(one, given.seeds))
    else:
        with ProcessPoolExecutor(given.jobs, get_context("spawn")) as pool:
            folders = list(pool.map(one, given.seeds))
    by_seed = dict(zip(given.seeds, folders, strict=True))
    lines = {f"seed {seed}": (folder, f"C{n}") for n, (seed, folder) in enumerate(by_seed.items())}
    draw(Path("docs/curves") / f"{given.task}_{given.critic}.png", PANELS, lines, {"eval_score": 1.0})
    rows = [row(given.task, given.critic, seed, folder) for seed, folder in by_seed.items()]
    header = (
        "task", "critic", "seed", "before", "after", "0.95 at rollout", "KL, nats", "length", "ended", "PPO, seconds",
    )  # fmt: skip
    print("\n".join(markdown_table(header, [cells for cells, _ in rows])))
    if len(rows) > 1:
        mean = mean_ci([score for _, score in rows])
        print(f"mean over seeds {mean.value:.3f} [{mean.low:.3f}, {mean.high:.3f}] of an optimum of 1")


if __name__ == "__main__":
    main()
