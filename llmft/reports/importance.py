"""How much of what differs between configurations is due to each varied key: a functional analysis of variance.

The metric over all combinations of the values is split into a mean, a part for each key, a part for each pair of
keys, and the rest; a key's importance is its part's share of the variance (Hooker 2007; Hutter, Hoos, Leyton-Brown
2014, "An efficient approach for assessing hyperparameter importance"). A complete grid gives the parts exactly, and
what seeds alone would put into each is taken off. Where combinations are missing (a search), a random forest fills
them in and no noise is taken off. Seeds and folds are replications, not keys.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from llmft.reports.noise import Array, Noise
from llmft.reports.study import Study, sorted_values

DRAWS = 200
"""Tables with the seeds' noise added once more, whose shares say how far a share may be trusted."""
LARGEST_GRID = 20_000
"""Combinations; beyond it a random part of them stands for all."""


@dataclass(frozen=True)
class Importance:
    """Shares of the variance between configurations, 0 to 1: of each key, of each pair's interplay, of noise."""

    keys: dict[str, float]
    pairs: dict[tuple[str, str], float]
    noise: float
    exact: bool
    ranges: dict[Any, tuple[float, float]] = field(default_factory=dict)
    """95% of the shares of a key or a pair that the noise of seeds (of a search: of the forest's trees) gives; nothing
    where no noise is known."""


def importance(study: Study) -> Importance | None:
    """The importance of each varied key; None for fewer than two configurations or too many missing combinations."""
    keys = study.keys
    if not keys or len(study.configurations) < 2:
        return None
    levels = {key: sorted_values({c.values[key] for c in study.configurations}) for key in keys}
    size = int(np.prod([float(len(found)) for found in levels.values()]))
    samples = [c.sample(study.monitor) for c in study.configurations]
    if size == len(samples):
        noise = Noise.measured(samples)
        runs = float(np.mean([1 / len(s.replicates) for s in samples]))
        table = np.empty([len(levels[key]) for key in keys])
        for configuration, sample in zip(study.configurations, samples, strict=True):
            table[tuple(levels[key].index(configuration.values[key]) for key in keys)] = sample.mean
        cell = (noise.variance or 0.0) * runs
        found = _of_table(table, keys, cell)
        if found is None or noise.variance is None:
            return found
        draws = np.random.default_rng(0).normal(0.0, math.sqrt(cell), (DRAWS, *table.shape))
        again = [own for draw in draws if (own := _of_table(table + draw, keys, cell)) is not None]
        return replace(found, ranges=_ranges([{**own.keys, **own.pairs} for own in again]))
    if len(samples) < max(4, len(keys) + 2):
        return None
    means = np.array([s.mean for s in samples])
    return _of_search([c.values for c in study.configurations], means, levels)


def _ranges(shares: Sequence[Mapping[Any, float]]) -> dict[Any, tuple[float, float]]:
    names = shares[0] if shares else {}
    ends = {name: np.percentile([own[name] for own in shares], [2.5, 97.5]) for name in names}
    return {name: (float(low), float(high)) for name, (low, high) in ends.items()}


def _of_table(table: Array, keys: Sequence[str], noise: float) -> Importance | None:
    """Parts of a complete grid; `noise` is the variance of one cell by seeds."""
    total = float(((table - table.mean()) ** 2).sum())
    if total <= 0:
        return None
    main = {key: _marginal(table, (axis,)) for axis, key in enumerate(keys)}
    shares, pairs, taken = {}, {}, 0.0

    def share(square: float, degrees: int) -> float:
        nonlocal taken
        expected = min(degrees * noise, square)
        taken += expected
        return (square - expected) / total

    for axis, key in enumerate(keys):
        shares[key] = share(_square(table, main[key], (axis,)), table.shape[axis] - 1)
    for (i, a), (j, b) in itertools.combinations(enumerate(keys), 2):
        both = _marginal(table, (i, j)) - main[a].reshape(-1, 1) - main[b].reshape(1, -1)
        pairs[a, b] = share(_square(table, both, (i, j)), (table.shape[i] - 1) * (table.shape[j] - 1))
    return Importance(shares, pairs, taken / total, True)


def _marginal(table: Array, axes: tuple[int, ...]) -> Array:
    """The table's mean over all other axes, without the grand mean."""
    others = tuple(axis for axis in range(table.ndim) if axis not in axes)
    return table.mean(axis=others) - table.mean()


def _square(table: Array, part: Array, axes: tuple[int, ...]) -> float:
    return float((part**2).sum()) * table.size / int(np.prod([table.shape[axis] for axis in axes]))


def _of_search(
    values: Sequence[Mapping[str, str]], means: Array, levels: Mapping[str, Sequence[str]]
) -> Importance | None:
    from sklearn.ensemble import RandomForestRegressor

    keys = list(levels)
    scales = {key: _scale(levels[key]) for key in keys}
    known = np.array([[scales[key][v[key]] for key in keys] for v in values])
    forest = RandomForestRegressor(n_estimators=200, min_samples_leaf=1, random_state=0, n_jobs=1).fit(known, means)
    rng = np.random.default_rng(0)
    # Marginals over the values that were tried, each weighted alike.
    grid = [np.array(sorted(scales[key].values())) for key in keys]
    size = int(np.prod([float(len(g)) for g in grid]))
    if size <= LARGEST_GRID:
        points = np.array(list(itertools.product(*grid)))
    else:
        points = np.column_stack([rng.choice(g, LARGEST_GRID) for g in grid])
    place = [np.searchsorted(g, points[:, axis]) for axis, g in enumerate(grid)]
    sizes = [len(g) for g in grid]
    found = _of_predicted(forest.predict(points), keys, place, sizes)
    if found is None:
        return None
    trees = [_of_predicted(tree.predict(points), keys, place, sizes) for tree in forest.estimators_]
    ranges = _ranges([{**own.keys, **own.pairs} for own in trees if own is not None])
    return replace(found, ranges=ranges)


def _of_predicted(
    predicted: Array, keys: Sequence[str], place: Sequence[np.ndarray], sizes: Sequence[int]
) -> Importance | None:
    """Parts of what is predicted at points whose values are numbered in `place`."""
    total = float(predicted.var())
    if total <= 0:
        return None
    main = [_group_means(predicted, place[axis], sizes[axis]) - predicted.mean() for axis in range(len(keys))]
    shares = {key: float(main[axis][place[axis]].var()) / total for axis, key in enumerate(keys)}
    pairs = {}
    for (i, a), (j, b) in itertools.combinations(enumerate(keys), 2):
        joint = _group_means(predicted, place[i] * sizes[j] + place[j], sizes[i] * sizes[j])
        both = joint[place[i] * sizes[j] + place[j]] - predicted.mean() - main[i][place[i]] - main[j][place[j]]
        pairs[a, b] = float(both.var()) / total
    return Importance(shares, pairs, 0.0, False)


def _group_means(values: Array, group: np.ndarray, count: int) -> Array:
    found = np.bincount(group, minlength=count)
    return np.bincount(group, values, count) / np.maximum(found, 1)


def _scale(values: Sequence[str]) -> dict[str, float]:
    """Numbers by their rank, which leaves a tree's cuts as they are; words by their place."""
    return {value: float(place) for place, value in enumerate(values)}


def interaction(study: Study, first: str, second: str) -> tuple[list[str], list[str], list[list[float | None]]]:
    """(values of `first`, of `second`, mean metric of each combination over all others; None where never tried)."""
    rows = sorted_values({c.values[first] for c in study.configurations})
    columns = sorted_values({c.values[second] for c in study.configurations})
    cells: dict[tuple[str, str], list[float]] = {}
    for c in study.configurations:
        cells.setdefault((c.values[first], c.values[second]), []).append(c.sample(study.monitor).mean)
    table = [[float(np.mean(found)) if (found := cells.get((r, c))) else None for c in columns] for r in rows]
    return rows, columns, table
