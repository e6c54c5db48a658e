"""The tasks of benchmarks/learning.py: their optimum is what it says, and the command runs; docs/learning.md has what
it gives."""

import itertools
import random
from dataclasses import replace

import learning
import pytest
import torch

from pipeline.data.tokenizer import train_tokenizer

SMALL = [[1, 2], [2], [3, 0], [3, 1]]  # to 0 from 1: 1 2 0; from 2: 2 0; from 3: 3 1 2 0


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(learning, "NODES", 4)
    return SMALL


def test_steps_to_the_goal_are_those_of_the_shortest_path(small):
    assert learning.steps_to_goal(small) == [0, 2, 1, 3]
    assert learning.steps_to_goal([[1], [1], [0], [2]])[1] == 4  # no path


@pytest.mark.parametrize("seed", range(5))
def test_no_path_is_shorter(seed):
    """Every walk of up to four steps from every node, against the breadth-first search."""
    graph = learning.new_graph(random.Random(seed))
    steps = learning.steps_to_goal(graph)
    assert max(steps) <= learning.LONGEST
    for start, length in itertools.product(range(1, learning.NODES), range(1, 5)):
        ends = {start}
        for _ in range(length):
            ends = {b for a in ends for b in graph[a]}
        assert (learning.GOAL not in ends) or steps[start] <= length
        if steps[start] == length:
            assert learning.GOAL in ends


@pytest.mark.parametrize(
    ("walk", "score"),
    [
        ([1, 2, 0], 1.0), ([2, 0], 1.0), ([3, 1, 2, 0], 1.0), ([2, 3, 1, 2, 0], 1 / 4), ([3, 3, 1, 2, 0], 3 / 4),
        ([1, 0], 0.0), ([1, 2, 3], 0.0), ([1], 0.0), ([0], 0.0), ([1, 2, 0, 1], 0.0),
    ],
)  # fmt: skip
def test_a_walk_is_worth_the_shortest_over_its_own_steps(walk, score, small):
    assert learning.optimality(small, walk) == pytest.approx(score)


def test_random_walks_follow_edges_and_end_at_the_goal_or_at_the_limit():
    rng = random.Random(0)
    graph = learning.new_graph(rng)
    walks = [learning.random_walk(graph, rng) for _ in range(300)]
    assert all(b in graph[a] for walk in walks for a, b in itertools.pairwise(walk))
    assert all(walk[-1] == learning.GOAL or len(walk) == learning.LONGEST + 1 for walk in walks)
    assert {walk[0] for walk in walks} == set(range(1, learning.NODES))
    assert {learning.GOAL in walk[:-1] for walk in walks} == {False}
    assert 0.05 < sum(learning.optimality(graph, walk) for walk in walks) / 300 < 0.6


def test_scores_are_read_from_tokens(small):
    tokenizer = train_tokenizer("word", [learning.text(range(4))], 20)
    encode = lambda walk: tokenizer(learning.text(walk))["input_ids"] + [tokenizer.eos_token_id]  # noqa: E731
    rows = [encode([1, 2, 0]), [0, 0, *encode([2])], [0, *encode([3, 3])]]
    ids = torch.tensor(rows)
    mask = ids != tokenizer.pad_token_id
    assert learning.score_function("walk", small, tokenizer)(ids, mask).tolist() == [1.0, 0.0, 0.0]
    # bos and a start, then three, one and two tokens with their EOS
    expected = pytest.approx([1 - 4 / 7, 1 - 6 / 7, 1 - 5 / 7])
    assert learning.score_function("stop", small, tokenizer)(ids, mask).tolist() == expected


@pytest.mark.parametrize(("length", "score"), [(7, 1.0), (6, 6 / 7), (8, 6 / 7), (1, 1 / 7), (14, 0.0), (30, 0.0)])
def test_the_seventh_token_is_the_one_to_end_at(length, score):
    assert learning.closeness(length) == pytest.approx(score)


@pytest.mark.parametrize("critic", ["sft", "head"])
def test_the_command_trains_draws_and_prints_its_table(critic, tmp_path, monkeypatch, capsys):
    """Both tasks, on a model and runs that are much too small."""
    small_model = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    pretrain, ppo = learning.pretrain.train, learning.ppo.train
    monkeypatch.setattr(learning, "WALKS", 300)
    monkeypatch.setattr(learning.pretrain, "train", lambda config: pretrain(replace(config, **small_model)))
    monkeypatch.setattr(
        learning.ppo,
        "train",
        lambda config, score: ppo(replace(config, rollouts=7, eval_steps=2, num_ppo_epochs=1), score),
    )
    monkeypatch.chdir(tmp_path)
    for task in ("walk", "stop"):
        monkeypatch.setattr("sys.argv", ["learning.py", task, "--critic", critic, "--seeds", "1", "2"])
        learning.main()
        lines = capsys.readouterr().out.splitlines()
        rows = [line.split("|")[1:-1] for line in lines if line.startswith(f"| {task}")]
        assert [(cells[1].strip(), cells[2].strip(), len(cells)) for cells in rows] == [
            (critic, "1", 10),
            (critic, "2", 10),
        ]
        scores = [float(cells[4]) for cells in rows]
        assert all(0 <= score <= 1 for score in scores)
        assert lines[-1].startswith(f"mean over seeds {sum(scores) / 2:.3f}"[:19])
        assert (tmp_path / f"docs/curves/{task}_{critic}.png").stat().st_size > 10_000
