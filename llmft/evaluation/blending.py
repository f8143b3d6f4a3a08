"""Several predictions to one: means, and weights chosen on rows whose targets are known."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from llmft.config.commands import Method
from llmft.config.sections import TaskType
from llmft.core.errors import ConfigError
from llmft.evaluation.scores import Metric
from llmft.metrics.monitor import mode_of

FITTED = (Method.hill_climbing, Method.convex)
SMALLEST = 1e-15
Weights = np.ndarray


def check_method(method: Method, problem: str) -> None:
    """Raises ConfigError for a mean that numbers do not have."""
    if problem == TaskType.regression.value and method in (Method.geometric, Method.rank):
        raise ConfigError(f"method={method.value} is for probabilities; numbers take mean, hill_climbing or convex.")


def combine(values: np.ndarray, weights: Weights, method: Method, problem: str) -> np.ndarray:
    """(members, rows, classes) and (members,) weights that sum to one, to (rows, classes)."""
    if method is Method.geometric:
        return _geometric(values, weights, problem)
    if method is Method.rank:
        values = _ranks(values)
    mixed = np.tensordot(weights, values, axes=1)
    single = problem == TaskType.single_label.value
    return mixed / mixed.sum(axis=1, keepdims=True) if single else mixed


def _geometric(values: np.ndarray, weights: Weights, problem: str) -> np.ndarray:
    logs = np.tensordot(weights, np.log(np.clip(values, SMALLEST, 1)), axes=1)
    if problem == TaskType.multi_label.value:  # of two answers for each class
        others = np.tensordot(weights, np.log(np.clip(1 - values, SMALLEST, 1)), axes=1)
        return 1 / (1 + np.exp(others - logs))
    odds = np.exp(logs - logs.max(axis=1, keepdims=True))
    return odds / odds.sum(axis=1, keepdims=True)


def _ranks(values: np.ndarray) -> np.ndarray:
    """Each value's rank among the rows of its member and class, above 0 and at most 1; ties share theirs."""
    from scipy.stats import rankdata

    return rankdata(values, axis=1) / values.shape[1]


def choose(
    values: np.ndarray, references: np.ndarray, method: Method, problem: str, metric: tuple[str, Metric], steps: int
) -> Weights:
    """The weights of the members, which sum to one."""
    count = len(values)
    if method not in FITTED or count == 1:
        return np.full(count, 1 / count)
    if method is Method.convex:
        return convex(values, references, problem)
    sign = mode_of(metric[1], metric[0], key=None).sign
    return hill_climb(values, lambda mixed: sign * metric[1](references, mixed), steps)


def hill_climb(values: np.ndarray, cost: Callable[[np.ndarray], float], steps: int) -> Weights:
    """Caruana et al. 2004: the best member, then always the one whose addition helps most, again and again.

    Members may be taken several times, which makes the weights; it ends when none lowers the `cost`.
    """
    singles = [_or_infinite(cost(own)) for own in values]
    best = int(np.argmin(singles))
    taken, total, value = np.eye(len(values))[best], values[best].copy(), singles[best]
    for step in range(1, steps):
        tried = [_or_infinite(cost((total + own) / (step + 1))) for own in values]
        place = int(np.argmin(tried))
        if not tried[place] < value:
            break
        taken[place] += 1
        total, value = total + values[place], tried[place]
    return taken / taken.sum()


def _or_infinite(cost: float) -> float:
    return np.inf if np.isnan(cost) else cost


def convex(values: np.ndarray, references: np.ndarray, problem: str) -> Weights:
    """The weights of least loss (logloss; squared error of numbers) on the simplex, which is a convex problem."""
    from scipy.optimize import minimize

    count = len(values)
    if problem == TaskType.single_label.value:
        chance = np.clip(values[:, np.arange(values.shape[1]), references], SMALLEST, 1)

        def loss(weights: Weights) -> tuple[float, np.ndarray]:
            mixed = weights @ chance
            return float(-np.log(mixed).mean()), -(chance / mixed).mean(axis=1)

    elif problem == TaskType.multi_label.value:
        own = np.clip(np.where(references[None] == 1, values, 1 - values), SMALLEST, 1)

        def loss(weights: Weights) -> tuple[float, np.ndarray]:
            mixed = np.tensordot(weights, own, axes=1)
            return float(-np.log(mixed).mean()), -(own / mixed).mean(axis=(1, 2))

    else:
        numbers = values[:, :, 0]
        scale = float(np.var(references)) or 1.0

        def loss(weights: Weights) -> tuple[float, np.ndarray]:
            off = weights @ numbers - references
            return float((off**2).mean() / scale), 2 * (numbers * off).mean(axis=1) / scale

    found = minimize(
        loss,
        np.full(count, 1 / count),
        jac=True,
        method="SLSQP",
        bounds=[(0, 1)] * count,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1, "jac": lambda w: np.ones(count)},
        options={"maxiter": 500, "ftol": 1e-12},
    )
    weights = np.clip(found.x, 0, None)
    return weights / weights.sum()


def nested(
    values: np.ndarray,
    references: np.ndarray,
    parts: Sequence[int],
    method: Method,
    problem: str,
    metric: tuple[str, Metric],
    steps: int,
) -> np.ndarray:
    """(rows, classes): each part of the rows blended with weights that were chosen without it."""
    own = np.asarray(parts)
    made = np.empty(values.shape[1:])
    if method not in FITTED:
        return combine(values, np.full(len(values), 1 / len(values)), method, problem)
    for part in np.unique(own):
        rest, held = own != part, own == part
        weights = choose(values[:, rest], references[rest], method, problem, metric, steps)
        made[held] = combine(values[:, held], weights, method, problem)
    return made
