"""The least cost in a box: known optima found, by few trials, none tried twice."""

import math

import pytest

from pipeline.adapters.optimise import minimise, start_points


@pytest.mark.parametrize("optimum", [0.3, 1.234, -0.5, 2.0])
def test_one_variable_finds_the_optimum_of_a_parabola(optimum):
    calls = []

    def trial(point):
        calls.append(point)
        return (point[0] - optimum) ** 2 + 7, 0.0

    best = minimise(trial, [(-1.0, 2.0)], grid=7, budget=20, seed=0)
    assert best == pytest.approx((optimum,), abs=2e-3)
    assert len(calls) <= 20
    assert len(set(calls)) == len(calls)  # nothing is measured twice


def test_two_variables_find_the_optimum_of_a_tilted_bowl():
    def trial(point):
        x, y = point[0] - 0.37, point[1] + 0.61
        return 2 * x * x + y * y + x * y, 0.0

    assert minimise(trial, [(0, 1.5), (-1, 1)], grid=16, budget=100, seed=0) == pytest.approx((0.37, -0.61), abs=5e-3)


def test_a_constraint_moves_the_optimum_to_its_edge():
    best = minimise(lambda p: (-p[0], max(0.0, p[0] ** 2 - 0.5)), [(0, 1)], grid=5, budget=30, seed=0)
    assert best[0] ** 2 <= 0.5
    assert best[0] == pytest.approx(math.sqrt(0.5), abs=2e-3)


def test_where_nothing_is_allowed_the_nearest_is_given():
    assert minimise(lambda p: (0.0, 1 + p[0]), [(0, 1)], grid=3, budget=3, seed=0) == (0.0,)


def test_many_variables_start_from_a_draw_by_the_seed():
    ranges = [(0.0, 1.0)] * 4
    first, again, other = (start_points(ranges, 10, seed) for seed in (1, 1, 2))
    assert first == again != other
    assert len(first) == 10
