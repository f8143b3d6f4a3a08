"""How far a mean moves by chance: between seeds (or folds), and between validation rows.

A `Sample` holds the results of one configuration, one `Replicate` per run. A contrast is a weighted sum of the
samples' means; a plain comparison of two has the weights 1 and -1. Its chance movement has two sources, and a claim
about new seeds *and* new rows must cover both:

- **Seeds.** The variance between the replicates of a configuration. Two estimates are made: a pooled one over all
  configurations (more degrees of freedom, right when all are equally noisy) and one of the contrast's own replicates
  (right in any case). Where the same seeds or folds were used throughout and they explain more than chance would (F
  test at `BLOCK_LEVEL`), replicates are compared seed by seed; folds always are, since each has its own rows. The
  means of k folds share most of their training rows, so their variance carries the correction of Nadeau and Bengio
  (2003, "Inference for the generalization error"): 1/J becomes 1/J + validation rows / training rows.
- **Rows.** The metric is a ratio, sum(loss) / sum(tokens). By the delta method a row's influence is (loss - metric x
  tokens) / mean(tokens); influences are averaged over seeds, then contrasted row by row, and the variance of the
  contrast's influences over their number is the row variance. The share of it that is seed noise within rows is
  already in the first source and is taken off (crossed random effects: Clark 1973).

What is assumed: replicates are independent but for their seed or fold, roughly normal, and validation rows are
exchangeable draws (rows that come in groups, such as several answers to one question, make the row part too small).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
BLOCK_LEVEL = 0.2
"""Level of the F test that decides whether seeds are compared one by one."""


@dataclass(frozen=True)
class RowLosses:
    """The losses of one run's validation rows: names, nats summed over each row's labelled tokens, their number."""

    rows: NDArray[np.str_]
    loss_nats: Array
    tokens: Array

    @property
    def metric(self) -> float:
        """Nats per token over all rows."""
        return float(self.loss_nats.sum() / self.tokens.sum())

    def influences(self) -> Array:
        """What each row adds to the metric's deviation, times the number of rows."""
        return (self.loss_nats - self.metric * self.tokens) / self.tokens.mean()


@dataclass(frozen=True)
class Replicate:
    """One run of a configuration: its seed, the part of the data that it was validated on, and the metric."""

    seed: str
    part: str
    value: float
    rows: RowLosses | None = None

    @property
    def label(self) -> tuple[str, str]:
        """What replicates of different configurations have in common."""
        return self.seed, self.part


@dataclass(frozen=True)
class Sample:
    """The replicates of one configuration."""

    name: str
    replicates: tuple[Replicate, ...]
    training_overlap: float = 0.0
    """Validation rows over training rows where parts are folds or repeated splits, else 0."""

    @property
    def values(self) -> Array:
        """The metric of each replicate."""
        return np.array([replicate.value for replicate in self.replicates])

    @property
    def mean(self) -> float:
        """The mean metric."""
        return float(self.values.mean())


@dataclass(frozen=True)
class Variance:
    """A variance of an estimate with its degrees of freedom (infinite where it is known)."""

    value: float
    df: float

    def __add__(self, other: Variance) -> Variance:
        """The variance of a sum of independent terms, degrees of freedom after Satterthwaite."""
        total = self.value + other.value
        if total <= 0:
            return Variance(total, min(self.df, other.df))
        parts = sum(v.value**2 / v.df for v in (self, other) if np.isfinite(v.df) and v.df > 0)
        return Variance(total, total**2 / parts if parts > 0 else float("inf"))


@dataclass(frozen=True)
class Contrast:
    """A weighted sum of means with what is known of its noise; None where a source is not known."""

    estimate: float
    pooled: Variance | None
    own: Variance | None
    rows: Variance | None
    replicates: int
    """Fewest replicates that any of the samples has in the contrast."""
    num_samples: int = 2
    num_rows: int = 0
    blocked: bool = False
    unpaired_rows: bool = False
    run_variance: float = 0.0
    """The seed part for one replicate each: the contrast's is this over `replicates`, plus what folds share."""


@dataclass
class Noise:
    """The spread between replicates over a set of samples."""

    samples: Mapping[str, Sample]
    variance: float | None = None
    """Pooled variance of one run within its configuration (after blocks, where these are used)."""
    df: float = 0.0
    df_unequal: float = 0.0
    """`df`, made smaller where some configurations are clearly noisier than others."""
    blocked: bool = False
    known: bool = False
    """Whether the variance was told, not measured."""
    replicated: int = 0
    """How many configurations have two replicates or more."""
    _labels: list[tuple[str, str]] = field(default_factory=list)

    @classmethod
    def told(cls, samples: Sequence[Sample], sd: float, seeds: int | None = None) -> Noise:
        """The spread is given from outside: `sd` of one run, measured on `seeds` runs (None: taken as known)."""
        df = float("inf") if seeds is None else float(max(seeds - 1, 0))
        return cls({s.name: s for s in samples}, sd**2 if df > 0 else None, df, df, known=True)

    @classmethod
    def measured(cls, samples: Sequence[Sample]) -> Noise:
        """Pools the variance between replicates over `samples`, by seed or fold where that explains much of it."""
        found = cls({s.name: s for s in samples})
        found.replicated = sum(len(s.replicates) >= 2 for s in samples)
        apart, together = _residuals(samples, blocked=False), _residuals(samples, blocked=True)
        parts = {r.part for s in samples for r in s.replicates}
        found.blocked = together.df >= 1 and (len(parts) > 1 or _blocks_matter(apart, together))
        fit = together if found.blocked else apart
        if fit.df >= 1:
            found.variance, found.df, found.df_unequal = fit.mean_square, fit.df, fit.df_unequal
        return found

    def contrast(self, weights: Mapping[str, float]) -> Contrast:
        """The contrast with `weights` (they add up to 0) over the samples' means."""
        samples = [self.samples[name] for name in weights]
        parts = {r.part for s in samples for r in s.replicates}
        common = set.intersection(*({r.label for r in s.replicates} for s in samples))
        # Folds have rows of their own: only the common ones compare. Else whatever both have is used.
        paired = (self.blocked and len(common) >= 2) or (len(parts) > 1 and len(common) >= 1)
        if paired:
            samples = [Sample(s.name, _only(s, common), s.training_overlap) for s in samples]
        vector = np.array(list(weights.values()))
        rows = None if self.known else row_variance(samples, vector)
        estimate = float(vector @ [s.mean for s in samples])
        counts = np.array([len(s.replicates) for s in samples])
        shared = max(s.training_overlap for s in samples) if len(parts) > 1 else 0.0
        pooled = own = None
        scale = float((vector**2 * (1 / counts + shared)).sum())
        if self.variance is not None:
            pooled = Variance(self.variance * scale, self.df_unequal)
        if counts.min() >= 2 and not self.known:
            own = _own_paired(samples, vector, shared) if paired else _own_apart(samples, vector)
        single = own.value / (1 / counts.min() + shared) if own is not None else 0.0
        if pooled is not None and self.variance is not None:
            single = max(single, self.variance * float((vector**2).sum()))
        return Contrast(
            estimate,
            pooled,
            own,
            rows.variance if rows else None,
            int(counts.min()),
            num_samples=len(samples),
            num_rows=rows.count if rows else 0,
            blocked=paired,
            unpaired_rows=bool(rows and not rows.paired),
            run_variance=single,
        )


def _only(sample: Sample, labels: set[tuple[str, str]]) -> tuple[Replicate, ...]:
    return tuple(sorted((r for r in sample.replicates if r.label in labels), key=lambda r: r.label))


@dataclass(frozen=True)
class _Fit:
    square: float
    df: int
    df_unequal: float

    @property
    def mean_square(self) -> float:
        return self.square / self.df if self.df else 0.0


def _residuals(samples: Sequence[Sample], *, blocked: bool) -> _Fit:
    """Least squares with a mean per sample and, where `blocked`, one per label."""
    labels = sorted({r.label for s in samples for r in s.replicates})
    place = {label: index for index, label in enumerate(labels)}
    y = np.array([r.value for s in samples for r in s.replicates])
    owner = np.array([i for i, s in enumerate(samples) for _ in s.replicates])
    if not len(y):
        return _Fit(0.0, 0, 0.0)
    if not blocked:
        means = np.bincount(owner, y) / np.bincount(owner)
        residual, df = y - means[owner], len(y) - len(samples)
    else:
        design = np.zeros((len(y), len(samples) + len(labels)))
        design[np.arange(len(y)), owner] = 1
        design[np.arange(len(y)), len(samples) + np.array([place[r.label] for s in samples for r in s.replicates])] = 1
        solved, _, rank, _ = np.linalg.lstsq(design, y - y.mean(), rcond=None)
        residual, df = (y - y.mean()) - design @ solved, len(y) - int(rank)
    square = float((residual**2).sum())
    if df < 1:
        return _Fit(square, 0, 0.0)
    # Satterthwaite's degrees of freedom of a sum of unequal variances, each a chi-square of about n - 1 degrees; the
    # n + 1 makes up for the variances' being estimates, whose squares are too large.
    each = np.bincount(owner, residual**2)
    count = np.bincount(owner)
    own = each[count >= 2] / (count[count >= 2] - 1)
    fourth = float((own**2).sum())
    n = float(count[count >= 2].mean()) if len(own) else 1.0
    share = df / max(float((count - 1).sum()), 1.0)
    unequal = (n + 1) * float(own.sum()) ** 2 / fourth * share if fourth > 0 else float(df)
    return _Fit(square, df, min(unequal, float(df)))


def _blocks_matter(apart: _Fit, together: _Fit) -> bool:
    from scipy.special import fdtrc  # scipy.stats takes a second to import

    extra = apart.df - together.df
    if extra < 1 or together.df < 1:
        return False
    if together.square <= 0:
        return apart.square > 0
    ratio = (apart.square - together.square) / extra / together.mean_square
    return bool(fdtrc(extra, together.df, ratio) < BLOCK_LEVEL)


def _own_paired(samples: Sequence[Sample], weights: Array, shared: float) -> Variance:
    values = np.array([s.values for s in samples])
    each = weights @ values
    return Variance(float(each.var(ddof=1)) * (1 / len(each) + shared), float(len(each) - 1))


def _own_apart(samples: Sequence[Sample], weights: Array) -> Variance:
    total = Variance(0.0, float("inf"))
    for sample, weight in zip(samples, weights, strict=True):
        n = len(sample.replicates)
        total = total + Variance(float(weight**2 * sample.values.var(ddof=1) / n), float(n - 1))
    return total


@dataclass(frozen=True)
class RowVariance:
    """The row part of a contrast's variance, the number of rows, and whether all samples had the same ones."""

    variance: Variance
    count: int
    paired: bool


def row_variance(samples: Sequence[Sample], weights: Array) -> RowVariance | None:
    """The variance of a contrast by the choice of validation rows; None where a run's row losses are missing."""
    if any(r.rows is None for s in samples for r in s.replicates):
        return None
    parts = sorted({r.part for s in samples for r in s.replicates})
    total, count, paired = 0.0, 0, True
    for part in parts:
        # A row's part in the mean over all parts.
        share = [np.array([r.rows for r in s.replicates if r.part == part], dtype=object) for s in samples]
        if any(len(found) == 0 for found in share):
            return None
        scale = [len(found) / len(s.replicates) for found, s in zip(share, samples, strict=True)]
        value, rows, same = _part_variance(share, weights * scale)
        total, count, paired = total + value, count + rows, paired and same
    return RowVariance(Variance(total, float(max(count - len(parts), 1))), count, paired)


def _part_variance(samples: Sequence[NDArray[np.object_]], weights: Array) -> tuple[float, int, bool]:
    names = samples[0][0].rows
    same = all(np.array_equal(run.rows, names) for runs in samples for run in runs)
    if not same:
        aligned = _align(samples)
        if aligned is None:
            each = [np.mean([_variance_of_mean(run.influences()) for run in runs]) for runs in samples]
            return float((weights**2 * each).sum()), min(len(run.rows) for runs in samples for run in runs), False
        samples = aligned
    mean, inner = [], []
    for runs in samples:
        influences = np.array([run.influences() for run in runs])
        mean.append(influences.mean(axis=0))
        inner.append(influences.var(axis=0, ddof=1).mean() / len(runs) if len(runs) > 1 else 0.0)
    found = weights @ np.array(mean)
    rows = len(found)
    if rows < 2:
        return 0.0, rows, True
    spread = float(found.var(ddof=1)) - float((weights**2 * inner).sum())
    return max(spread, 0.0) / rows, rows, True


def _variance_of_mean(values: Array) -> float:
    return float(values.var(ddof=1) / len(values)) if len(values) > 1 else 0.0


def _align(samples: Sequence[NDArray[np.object_]]) -> list[NDArray[np.object_]] | None:
    """The runs cut down to the rows that all have, in one order; None where fewer than half of a run's rows are."""
    runs = [run for runs in samples for run in runs]
    if any(len(np.unique(run.rows)) != len(run.rows) for run in runs):
        return None
    common = runs[0].rows
    for run in runs[1:]:
        common = np.intersect1d(common, run.rows)
    if len(common) * 2 < max(len(run.rows) for run in runs) or len(common) < 2:
        return None

    def cut(run: RowLosses) -> RowLosses:
        order = np.argsort(run.rows)
        place = order[np.searchsorted(run.rows, common, sorter=order)]
        return RowLosses(common, run.loss_nats[place], run.tokens[place])

    made = []
    for found in samples:
        cell = np.empty(len(found), dtype=object)
        cell[:] = [cut(run) for run in found]
        made.append(cell)
    return made
