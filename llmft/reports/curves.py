"""Diagnoses over- and underfitting from a run's training and validation curves.

Changes are compared with their noise: the standard error of the paired difference if the row losses of both validations
were kept, else the scatter of each validation around the line through its neighbours. A change counts if it is larger
than two standard errors. The training loss is a mean over the steps between two validations.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np

from llmft.metrics.prior import chance_sentence, is_better
from llmft.reports.read import RunRecord

LOSS, TRAIN = "val/loss_nats", "train/loss_nats"
ERRORS = 2.0
"""A change counts if it is larger than this many standard errors."""
LATE_SHARE = 0.02
"""The training was too short if the last interval brought more than this share of the whole improvement."""
LITTLE = 0.1
"""A run underfits if it lowered the loss by less than this share of the loss before training."""
MOST_POINTS = 120
"""Points of a drawn curve."""


class Fit(Enum):
    """The diagnosis of a run's curves."""

    fine = "fine"
    chance = "no better than chance"
    overfitting = "overfitting"
    underfitting = "underfitting"
    short = "train longer"
    diverged = "diverged"
    unknown = "no curves"


@dataclass(frozen=True)
class Diagnosis:
    """The diagnosis of a run's curves, and the step from which it applies if there is one."""

    fit: Fit
    step: int | None = None
    detail: str = ""

    def __str__(self) -> str:
        since = f" since step {self.step}" if self.fit is Fit.overfitting else ""
        return f"{self.fit.value}{since}"


def diagnose(run: RunRecord) -> Diagnosis:
    """Diagnoses `run`; a result that is no better than chance takes precedence."""
    diagnosis, chance = _of_curves(run), _at_chance(run)
    if chance is None or diagnosis.fit is Fit.diverged:
        return diagnosis
    return Diagnosis(Fit.chance, detail=f"{chance}; {diagnosis.detail}")


def _at_chance(run: RunRecord) -> str | None:
    """The reason if `run` is no better than chance: by its record, or for older runs by equal class probabilities."""
    if run.chance:
        return None if is_better(run.chance) else chance_sentence(run.chance)
    loss, data = run.value(LOSS), run.environment.get("data")
    if loss is None or run.config.get("task.head") is None:
        return None
    labels = data.get("labels") if isinstance(data, dict) else None
    of_problem = {"multi_label": math.log(2), "regression": 0.5}
    prior = of_problem.get(str(run.config.get("task.problem")), 0.0)
    if not prior and isinstance(labels, list) and labels:
        prior = math.log(len(labels))
    at_chance = prior > 0 and loss >= prior * (1 - LITTLE / 10)
    return f"loss {loss:.4f} against {prior:.4f} of equal probabilities for all classes" if at_chance else None


def _of_curves(run: RunRecord) -> Diagnosis:
    if run.status == "diverged":
        return Diagnosis(Fit.diverged, detail=run.error or "the loss was not finite")
    validation, train = run.curve(LOSS), run.curve(TRAIN)
    if run.config.get("data.train_on") == "all":
        return Diagnosis(Fit.unknown, detail="trained on all rows, so there is no validation")
    blank = [record["step"] for record in run.metrics if LOSS in record and record[LOSS] is None]
    if blank:
        return Diagnosis(Fit.diverged, blank[0], f"the validation loss of step {blank[0]} is not finite")
    if len(validation) < 2:
        return Diagnosis(Fit.unknown, detail="fewer than two validations")
    first, (last_step, last) = validation[0], validation[-1]
    best_step, best = min(validation, key=lambda point: point[1])
    if best_step == first[0] and last > 1.5 * first[1] and _clear(run, validation, last_step, first[0]):
        return Diagnosis(Fit.diverged, best_step, f"the validation loss rose from {first[1]:.4f} to {last:.4f}")
    if _clear(run, validation, last_step, best_step):
        rise = f"the validation loss rose from {best:.4f} at step {best_step} to {last:.4f} at step {last_step}"
        if _falls(train, validation, best_step):
            return Diagnosis(Fit.overfitting, best_step, f"{rise} while the training loss fell")
        return Diagnosis(Fit.overfitting, best_step, f"{rise}; the training loss did not fall with it")
    if len(validation) >= 3:
        before_step, before = validation[-2]
        gained, total = before - last, first[1] - last
        if gained > LATE_SHARE * total > 0 and _clear(run, validation, before_step, last_step):
            more = f"still {gained:.4f} better than at step {before_step}: more steps or a higher rate"
            return Diagnosis(Fit.short, last_step, more)
    if first[0] == 0 and first[1] - best < LITTLE * first[1]:
        flat = f"training and validation stay high ({first[1]:.4f} to {best:.4f}) and flat: a higher rate or rank"
        return Diagnosis(Fit.underfitting, detail=flat)
    return Diagnosis(Fit.fine, detail=f"the validation loss ends level at {last:.4f}")


def _clear(run: RunRecord, curve: Sequence[tuple[int, float]], high: int, low: int) -> bool:
    """Whether the validation loss at step `high` exceeds that at step `low` by more than noise."""
    if high == low:
        return False
    error = _scatter(curve)
    first, second = run.row_losses(high), run.row_losses(low)
    if first is not None and second is not None and len(first.rows) > 1 and np.array_equal(first.rows, second.rows):
        changes = first.influences() - second.influences()
        error = float(changes.std(ddof=1) / math.sqrt(len(changes)))
    values = dict(curve)
    return values[high] - values[low] > ERRORS * error


def _scatter(curve: Sequence[tuple[int, float]]) -> float:
    """The standard deviation of validations around the line through their neighbours, from second differences.

    Based on the median, so the steep start has no effect; a hundredth of the last value if there are fewer than five.
    """
    values = np.array([value for _, value in curve])
    floor = abs(float(values[-1])) / 100
    if len(values) < 5:
        return floor
    bends = np.abs(values[:-2] - 2 * values[1:-1] + values[2:])
    return max(float(np.median(bends)) / 0.6745 / math.sqrt(6), floor / 10)


def _falls(train: Sequence[tuple[int, float]], validation: Sequence[tuple[int, float]], best_step: int) -> bool:
    """Whether the training loss after `best_step` is below that of the interval before it."""
    stops = [step for step, _ in validation]
    before = max((step for step in stops if step < best_step), default=-1)
    earlier = [value for step, value in train if before < step <= best_step]
    later = [value for step, value in train if step > best_step]
    return bool(earlier) and bool(later) and float(np.mean(later)) < float(np.mean(earlier))


def summarize(diagnoses: Sequence[Diagnosis]) -> str:
    """The diagnoses of several runs in one line: "2 of 6 overfit (since step 40 to 60); …"."""
    if all(diagnosis.fit is Fit.unknown for diagnosis in diagnoses):
        return ""
    steps = sorted({d.step for d in diagnoses if d.fit is Fit.overfitting and d.step is not None})
    since = f" (since step {' to '.join(map(str, dict.fromkeys((steps[0], steps[-1]))))})" if steps else ""
    words = {
        Fit.diverged: "diverged",
        Fit.chance: "are no better than chance",
        Fit.overfitting: f"overfit{since}",
        Fit.underfitting: "underfit",
        Fit.short: "would benefit from longer training",
        Fit.fine: "have flattened",
        Fit.unknown: "have no training curve",
    }
    count = Counter(diagnosis.fit for diagnosis in diagnoses)
    return "; ".join(f"{count[fit]} of {len(diagnoses)} {verb}" for fit, verb in words.items() if count[fit])


@dataclass(frozen=True)
class Band:
    """A curve over several runs: steps, mean, and standard deviation between runs (0 for a single run)."""

    steps: list[int]
    mean: list[float]
    spread: list[float]


def band(curves: Sequence[Sequence[tuple[int, float]]]) -> Band | None:
    """Mean and spread at the steps common to all curves; long curves are averaged over intervals."""
    values = []
    for curve in filter(None, curves):
        stride = math.ceil(len(curve) / MOST_POINTS)
        stretches = [curve[at : at + stride] for at in range(0, len(curve), stride)]
        values.append({stretch[-1][0]: float(np.mean([value for _, value in stretch])) for stretch in stretches})
    if not values:
        return None
    steps = sorted(set.intersection(*map(set, values)))
    if not steps:
        values, steps = values[:1], list(values[0])
    table = np.array([[of_run[step] for step in steps] for of_run in values])
    spread = table.std(axis=0, ddof=1) if len(table) > 1 else np.zeros(len(steps))
    return Band(steps, table.mean(axis=0).tolist(), spread.tolist())
