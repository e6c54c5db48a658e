"""The least cost in a box, found by few trials: a grid, then a search around its best point."""

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import scipy.optimize
import scipy.stats

Point = tuple[float, ...]
Range = tuple[float, float]

DECIMALS = 4
"""Of a variable: what is measured is what the composed adapter is made from."""


def minimise(
    trial: Callable[[Point], tuple[float, float]], ranges: Sequence[Range], grid: int, budget: int, seed: int
) -> Point:
    """The tried point of least cost among those of no excess; of least excess where there are none.

    `trial` gives (cost, excess). First `grid` points over the box: of one variable equally far apart; of several a
    grid, or a Latin hypercube where a grid would have fewer than three a side. Then, up to `budget`: of one variable
    Brent's bounded search between the neighbours of the best, of several Nelder-Mead from it.
    """
    results: dict[Point, tuple[float, float]] = {}

    def run_once(point: Sequence[float]) -> tuple[float, float]:
        inside = (min(max(float(x), low), high) for x, (low, high) in zip(point, ranges, strict=True))
        rounded = tuple(round(x, DECIMALS) + 0.0 for x in inside)
        if rounded not in results:
            results[rounded] = trial(rounded)
        return results[rounded]

    for point in start_points(ranges, grid, seed):
        run_once(point)
    best = min(results, key=lambda point: results[point][::-1])
    costs = [cost for cost, _ in results.values()]
    worst, spread = max(costs), (max(costs) - min(costs)) or 1.0

    def penalised_cost(point: Sequence[float]) -> float:
        cost, excess = run_once(point)
        return worst + spread * (1 + excess) if excess else cost

    left = budget - len(results)
    if left > 0 and len(ranges) == 1:
        line = sorted(point[0] for point in results)
        at = line.index(best[0])
        low, high = line[max(0, at - 1)], line[min(len(line) - 1, at + 1)]
        if low < high:
            scipy.optimize.minimize_scalar(
                lambda x: penalised_cost((x,)),
                bounds=(low, high),
                method="bounded",
                options={"maxiter": left, "xatol": 1e-4},
            )
    elif left > len(ranges):
        simplex = initial_simplex(best, ranges)
        options = {"initial_simplex": simplex, "maxfev": left, "xatol": 1e-4, "fatol": 1e-9}
        scipy.optimize.minimize(penalised_cost, best, method="Nelder-Mead", bounds=ranges, options=options)
    return min(results, key=lambda point: results[point][::-1])


def start_points(ranges: Sequence[Range], count: int, seed: int) -> list[Point]:
    """At most `count` points over the box, its corners among them where there is a grid."""
    side = int(count ** (1 / len(ranges)) + 1e-9)
    if len(ranges) > 1 and side < 3:
        unit_points = scipy.stats.qmc.LatinHypercube(len(ranges), rng=seed).random(count)
        return [
            tuple(low + x * (high - low) for x, (low, high) in zip(point, ranges, strict=True)) for point in unit_points
        ]
    return list(itertools.product(*(np.linspace(low, high, side).tolist() for low, high in ranges)))


def initial_simplex(best: Point, ranges: Sequence[Range]) -> list[list[float]]:
    """The best point, and for each variable the point a sixth of its range away from it, inside the box."""
    corners = [list(best)]
    for variable, (low, high) in enumerate(ranges):
        step, corner = (high - low) / 6, list(best)
        corner[variable] += step if corner[variable] + step <= high else -step
        corners.append(corner)
    return corners
