"""Blends of predictions: means, and weights chosen on rows with known targets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from llmft.config.commands import Method
from llmft.config.task import TaskType
from llmft.core.errors import ConfigError
from llmft.evaluation.scores import Metric
from llmft.metrics.monitor import mode_of

FITTED = (Method.hill_climbing, Method.convex)
SMALLEST = 1e-15
Weights = np.ndarray


@dataclass(frozen=True)
class Blender:
    """Combines predictions. Raises ConfigError for numbers with a method that is only for probabilities.

    Attributes:
        name, metric: the metric that `hill_climbing` improves in at most `steps` additions.
    """

    method: Method
    problem: str
    name: str
    metric: Metric
    steps: int

    def __post_init__(self) -> None:
        if self.problem == TaskType.regression and self.method in (Method.geometric, Method.rank):
            raise ConfigError(
                f"method={self.method.value} is for probabilities; numbers take mean, hill_climbing or convex."
            )

    def weights(self, values: np.ndarray, references: np.ndarray) -> Weights:
        """The members' weights, which sum to 1; equal except for hill_climbing and convex."""
        if self.method not in FITTED or len(values) == 1:
            return np.full(len(values), 1 / len(values))
        if self.method is Method.convex:
            return convex(values, references, self.problem)
        sign = mode_of(self.metric, self.name, key=None).sign
        return hill_climb(values, lambda mixed: sign * self.metric(references, mixed), self.steps)

    def out_of_fold(self, values: np.ndarray, references: np.ndarray, parts: Sequence[int]) -> np.ndarray:
        """(rows, classes) blends, in which each part of the rows has weights chosen on the other parts."""
        if self.method not in FITTED:
            return combine(values, self.weights(values, references), self.method, self.problem)
        part_of_row = np.asarray(parts)
        blended = np.empty(values.shape[1:])
        for part in np.unique(part_of_row):
            rest, held_out = part_of_row != part, part_of_row == part
            weights = self.weights(values[:, rest], references[rest])
            blended[held_out] = combine(values[:, held_out], weights, self.method, self.problem)
        return blended


def combine(values: np.ndarray, weights: Weights, method: Method, problem: str) -> np.ndarray:
    """Blends (members, rows, classes) with (members,) weights that sum to 1 to (rows, classes)."""
    if method is Method.geometric:
        return _geometric(values, weights, problem)
    if method is Method.rank:  # of the rows of each member and class, in (0, 1]; ties share a rank
        from scipy.stats import rankdata

        values = rankdata(values, axis=1) / values.shape[1]
    mixed = np.tensordot(weights, values, axes=1)
    single = problem == TaskType.single_label
    return mixed / mixed.sum(axis=1, keepdims=True) if single else mixed


def _geometric(values: np.ndarray, weights: Weights, problem: str) -> np.ndarray:
    logs = np.tensordot(weights, np.log(np.clip(values, SMALLEST, 1)), axes=1)
    if problem == TaskType.multi_label:  # each class is a yes or a no
        others = np.tensordot(weights, np.log(np.clip(1 - values, SMALLEST, 1)), axes=1)
        return 1 / (1 + np.exp(others - logs))
    odds = np.exp(logs - logs.max(axis=1, keepdims=True))
    return odds / odds.sum(axis=1, keepdims=True)


def hill_climb(values: np.ndarray, cost: Callable[[np.ndarray], float], steps: int) -> Weights:
    """Ensemble selection of Caruana et al. 2004: adds the member that lowers the cost most, with replacement.

    A member's weight is its share of the additions. The search ends when no member lowers the `cost`.
    """
    singles = [_or_infinite(cost(member)) for member in values]
    first = int(np.argmin(singles))
    counts, total, cost_so_far = np.eye(len(values))[first], values[first].copy(), singles[first]
    for step in range(1, steps):
        costs = [_or_infinite(cost((total + member) / (step + 1))) for member in values]
        best_index = int(np.argmin(costs))
        if not costs[best_index] < cost_so_far:
            break
        counts[best_index] += 1
        total, cost_so_far = total + values[best_index], costs[best_index]
    return counts / counts.sum()


def _or_infinite(cost: float) -> float:
    return np.inf if np.isnan(cost) else cost


def convex(values: np.ndarray, references: np.ndarray, problem: str) -> Weights:
    """The weights on the simplex with the least logloss (squared error for numbers): a convex problem."""
    from scipy.optimize import minimize

    count = len(values)
    if problem == TaskType.regression:
        numbers = values[:, :, 0]
        scale = float(np.var(references)) or 1.0

        def loss(weights: Weights) -> tuple[float, np.ndarray]:
            errors = weights @ numbers - references
            return float((errors**2).mean() / scale), 2 * (numbers * errors).mean(axis=1) / scale

    else:
        if problem == TaskType.single_label:
            of_truth = values[:, np.arange(values.shape[1]), references]
        else:
            of_truth = np.where(references == 1, values, 1 - values)
        of_truth = np.clip(of_truth, SMALLEST, 1).reshape(count, -1)

        def loss(weights: Weights) -> tuple[float, np.ndarray]:
            mixed = weights @ of_truth
            return float(-np.log(mixed).mean()), -(of_truth / mixed).mean(axis=1)

    result = minimize(
        loss,
        np.full(count, 1 / count),
        jac=True,
        method="SLSQP",
        bounds=[(0, 1)] * count,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1, "jac": lambda w: np.ones(count)},
        options={"maxiter": 500, "ftol": 1e-12},
    )
    weights = np.clip(result.x, 0, None)
    return weights / weights.sum()
