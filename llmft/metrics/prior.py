"""Chance: what a prediction scores that reads no row, from the training rows' targets alone.

Of one class that is the classes' shares (so the commonest class is the guess), of several each class's share, of a
number the mean. A model that is not better than that has learned nothing of its rows.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from llmft.config.sections import TaskType
from llmft.runs.predictions import TEXT, Predictions

LEAST = 1e-15


def prior_of(problem: TaskType, num_labels: int, targets: Sequence[Any]) -> list[float]:
    """Each class's share of `targets`, or their mean; a class that none of them has counts as if one had it."""
    if problem is TaskType.single_label:
        counts = Counter(targets)
        seen = [max(1, counts[place]) for place in range(num_labels)]
        return [count / sum(seen) for count in seen]
    return np.asarray(targets, dtype=np.float64).reshape(len(targets), -1).mean(axis=0).tolist()


def row_losses(values: np.ndarray, references: np.ndarray, problem: TaskType, scale: float = 1.0) -> np.ndarray:
    """(rows,) the loss of each row, as the objective `Classification` defines it."""
    if problem is TaskType.regression:
        return 0.5 * ((values[:, 0] - references) / scale) ** 2
    safe = np.clip(values, LEAST, 1 - LEAST)
    if problem is TaskType.multi_label:
        return -(references * np.log(safe) + (1 - references) * np.log1p(-safe)).mean(axis=1)
    return -np.log(safe[np.arange(len(safe)), references])


@dataclass(frozen=True)
class Chance:
    """A prediction beside the prior on the same rows.

    Attributes:
        metrics: the prior's value of each metric; not a number where a constant prediction has none.
        loss, prior_loss: mean row losses.
        low, high: 95% interval of how much lower the prediction's loss is; of whole groups where rows have them.
        trained: whether the prior is the training rows'; else it is that of the very rows, and knows a little too much.
    """

    metrics: dict[str, float]
    loss: float
    prior_loss: float
    low: float
    high: float
    rows: int
    trained: bool = True

    @property
    def better(self) -> bool:
        """Whether the prediction is better than the prior by more than the noise of the rows."""
        return self.low > 0

    def to_plain(self) -> dict[str, Any]:
        """As JSON holds it: what is no finite number is blank."""
        plain = asdict(self)
        plain["metrics"] = {name: value if math.isfinite(value) else None for name, value in self.metrics.items()}
        return {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in plain.items()}

    def __str__(self) -> str:
        return chance_sentence(self.to_plain())


def is_better(plain: Mapping[str, Any]) -> bool:
    """`Chance.better` of what `to_plain` gave."""
    return (plain.get("low") or 0.0) > 0


def chance_sentence(plain: Mapping[str, Any]) -> str:
    """What `Chance.to_plain` gave, in words."""
    loss, prior, low, high = (plain[name] for name in ("loss", "prior_loss", "low", "high"))
    whose = "the training rows' targets alone" if plain.get("trained", True) else "these rows' own targets"
    if loss is None or prior is None or low is None or high is None:
        return f"chance: too few rows to compare with the prior of {whose}"
    verdict = "better than chance" if low > 0 else "WORSE than chance" if high < 0 else "NOT better than chance"
    gap, ends = prior - loss, (low, high) if prior >= loss else (-high, -low)
    how = "lower" if gap >= 0 else "higher"
    return (
        f"{verdict}: loss {loss:.4f} against {prior:.4f} from {whose} ({abs(gap):.4f} {how}, 95% interval "
        f"{ends[0]:.4f} to {ends[1]:.4f}; {plain['rows']:,} rows)"
    )


def against_prior(predictions: Predictions, metrics: Mapping[str, Any], scale: float = 1.0) -> Chance | None:
    """`predictions` beside the prior on the same rows; None for texts. `scale` is a regression's unit of loss."""
    if predictions.problem == TEXT or not predictions.known:
        return None
    problem, references = TaskType(predictions.problem), predictions.references()
    constant, trained = _values(predictions, problem, references)
    own, theirs = (row_losses(v, references, problem, scale) for v in (predictions.values, constant))
    low, high = _interval(theirs - own, predictions.columns.get("group"))
    found = {}
    for name, metric in metrics.items():
        try:
            found[name] = float(metric(references, constant))
        except Exception:  # a metric of somebody's own that takes no constant prediction must not cost the run
            found[name] = math.nan
    return Chance(found, float(own.mean()), float(theirs.mean()), low, high, len(own), trained)


def _values(predictions: Predictions, problem: TaskType, references: np.ndarray) -> tuple[np.ndarray, bool]:
    """((rows, classes) of the prior, whether the training rows' is known): of each row's own fold, else the mean."""
    sources = predictions.facts.get("sources") or []
    priors = [(source.get("fold"), source.get("prior")) for source in sources]
    width = predictions.values.shape[1]
    if not priors or any(not prior or len(prior) != width for _, prior in priors):
        own = prior_of(problem, width, references.tolist())
        return np.tile(own, (len(references), 1)), False
    of_fold: dict[Any, list[list[float]]] = {}
    for fold, prior in priors:
        of_fold.setdefault(fold, []).append(prior)
    mean = np.mean([prior for _, prior in priors], axis=0)
    folds = predictions.columns.get("fold") or [None] * len(references)
    return np.asarray([np.mean(of_fold[fold], axis=0) if fold in of_fold else mean for fold in folds]), True


def _interval(gains: np.ndarray, groups: Sequence[Any] | None) -> tuple[float, float]:
    """95% interval of the mean by Student's t; rows of one group count together."""
    from scipy.stats import t

    place = np.unique([str(g) for g in groups], return_inverse=True)[1] if groups is not None else np.arange(len(gains))
    off = np.bincount(place, weights=gains - gains.mean())
    if len(off) < 2:
        return math.nan, math.nan
    half = t.ppf(0.975, len(off) - 1) * math.sqrt(len(off) / (len(off) - 1) * (off**2).sum()) / len(gains)
    return float(gains.mean() - half), float(gains.mean() + half)
