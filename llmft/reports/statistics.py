"""Contrasts of means with their noise, and the choice of the best configuration.

A `Sample` has the results of one configuration, a `Replicate` per run. A contrast is a weighted sum of the samples'
means (1 and -1 for two). A claim must be true for new seeds *and* new validation rows, so an interval has two parts,
each at its own critical value, added in quadrature:

- **Runs.** Welch's variance: each configuration has its own spread, so a noisy one does not affect the others. Below
  `FEW` runs its degrees of freedom are averaged with those of the smaller side, since Welch's are too optimistic for
  bimodal or heavy-tailed noise. If common seeds explain more of the spread than chance (F test at `PAIRING_LEVEL`),
  Student's paired t by seed is used instead.
- **Rows.** A metric is sum(total) / sum(weight) over rows: nats over tokens, correct answers over one each. A row's
  influence is (total - metric x weight) / mean(weight), by the delta method. Influences are averaged over a
  configuration's runs and contrasted row by row. The variance between runs on single rows belongs to the first part
  and is subtracted (crossed random effects: Clark 1973). Rows of one `data.group` are summed first.
- **Folds** have different rows, and are compared fold by fold. The spread between folds includes the rows' noise; the
  excess is the first part. Folds share training rows, for which the rows' part is multiplied by Nadeau and Bengio's
  (2003) 1 + validation rows / training rows. If rows are not known, that correction is used alone.

**The best** is called when its interval against every other configuration excludes 0, each at 95% (an
intersection-union test needs no correction, since all must be won). Otherwise the answer is a set: a configuration is
excluded at a one-sided level of 1 - 0.95^(1/(k-1)), so the set contains the true best in 95% of the cases.

**Logarithms** are compared if values are positive losses whose means differ by more than a factor of `LOG_FROM` and
whose spreads are more similar on the log scale (Bartlett's statistic).

**Looks.** With a declared number of looks, each gets an equal share of the 5% (Bonferroni). With `looks="any"` the
critical value is that of a confidence sequence, valid at every number of runs: a t test's Bayes factor with the right
Haar prior on the spread and a normal prior of `PRIOR_VARIANCE` on the effect, against 1/level.

`tests.bench.calibration` measures all of this; its tables are in sweeps/README.md.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Looks = int | Literal["any"]
ALPHA = 0.05
POWER = 0.8
PAIRING_LEVEL = 0.01
FEW = 5
LOG_FROM = 1.5
PRIOR_VARIANCE = 1.0
MOST_RUNS = 50
"""The largest number of runs per configuration that `runs_needed` considers."""
MOST_BLOCKS = 100
"""Maximum number of blocks of rows in a jackknife."""


@dataclass(frozen=True)
class RowScores:
    """The contribution of each validation row to a metric that is sum(total) / sum(weight)."""

    rows: NDArray[np.str_]
    total: Array
    weight: Array
    log: bool = False
    """Whether the metric's logarithm is compared."""
    unit: str = "validation rows"
    """The unit of the rows."""

    @property
    def metric(self) -> float:
        """The metric over all rows."""
        return float(self.total.sum() / self.weight.sum())

    def influences(self) -> Array:
        """Each row's contribution to the metric's deviation, times the number of rows."""
        influences = (self.total - self.metric * self.weight) / self.weight.mean()
        return influences / self.metric if self.log else influences

    def by_group(self, groups: Sequence[str]) -> RowScores:
        """Sums the rows of each group to one, since they are not independent."""
        names, group = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
        totals, weights = (np.bincount(group, x).astype(float) for x in (self.total, self.weight))
        return RowScores(names, totals, weights, self.log, "groups of validation rows")


def jackknife(
    metric: Callable[[Any, Any], float], references: Any, predictions: Any, names: Sequence[str]
) -> RowScores | None:
    """Row scores of any metric by a jackknife (rows with the same name together, in at most `MOST_BLOCKS` blocks).

    None if the metric is not finite without some block. `references` and `predictions` are arrays over rows.
    """
    unique, index = np.unique(np.asarray(names, dtype=str), return_inverse=True)
    count = min(len(unique), MOST_BLOCKS)
    if count < 2:
        return None
    block = index % count
    of_all = metric(references, predictions)
    left = np.array([metric(references[block != b], predictions[block != b]) for b in range(count)])
    pseudo = count * of_all - (count - 1) * left
    # Equal rows give equal block names; different rows give different ones.
    labels = np.array([f"{count} blocks of {len(unique)} rows {unique[0]} to {unique[-1]}: {b}" for b in range(count)])
    kind = "blocks of " if count < len(unique) else "groups of " if count < len(references) else ""
    scores = RowScores(labels, pseudo, np.ones(count), unit=f"{kind}validation rows")
    return scores if np.isfinite(pseudo).all() else None


@dataclass(frozen=True)
class Replicate:
    """One run of a configuration: its seed, the part of the data that it was validated on, and the metric."""

    seed: str
    part: str
    value: float
    rows: RowScores | None = None

    @property
    def label(self) -> tuple[str, str]:
        """Identifies corresponding replicates of different configurations."""
        return self.seed, self.part


@dataclass(frozen=True)
class Sample:
    """The replicates of one configuration.

    Attributes:
        training_overlap: validation rows over training rows where parts are folds or repeated splits, else 0.
        lost: number of runs that diverged or failed; the rest may be a favourable selection.
        stated: (standard deviation of one run, its degrees of freedom) if given rather than measured here.
    """

    name: str
    replicates: tuple[Replicate, ...]
    training_overlap: float = 0.0
    lost: int = 0
    stated: tuple[float, float] | None = None

    @property
    def values(self) -> Array:
        """The metric of each replicate."""
        return np.array([replicate.value for replicate in self.replicates])

    @property
    def mean(self) -> float:
        return float(self.values.mean())

    @property
    def labels(self) -> set[tuple[str, str]]:
        return {replicate.label for replicate in self.replicates}

    def only(self, labels: set[tuple[str, str]]) -> Sample:
        """The sample with only the replicates in `labels`, sorted by label."""
        replicates = sorted((r for r in self.replicates if r.label in labels), key=lambda r: r.label)
        return replace(self, replicates=tuple(replicates))

    def finite(self) -> Sample:
        """The sample without runs whose metric is not finite, which count as lost."""
        finite = tuple(r for r in self.replicates if math.isfinite(r.value))
        return replace(self, replicates=finite, lost=self.lost + len(self.replicates) - len(finite))

    def logged(self) -> Sample:
        """The sample with the logarithm of the metric."""
        logs = (replace(r, value=math.log(r.value), rows=r.rows and replace(r.rows, log=True)) for r in self.replicates)
        return replace(self, replicates=tuple(logs))


@dataclass(frozen=True)
class Variance:
    """The variance of an estimate with its degrees of freedom (infinite if known exactly)."""

    value: float
    df: float

    def half_width(self, level: float, looks: Looks = 1, means: int = 2) -> float:
        """Half the interval at the two-sided `level`; simultaneous for all pairs of `means` means."""
        if self.value == 0:
            return 0.0
        return critical(self.df, level, looks, means) * math.sqrt(self.value)


@dataclass(frozen=True)
class RowNoise(Variance):
    """The row part of a contrast's variance, the number of rows, and whether all samples have the same rows."""

    count: int
    paired: bool
    unit: str


@functools.lru_cache(maxsize=65536)
def critical(df: float, level: float, looks: Looks = 1, means: int = 2) -> float:
    """Two-sided critical value of estimate / standard error; from the studentised range for more than two means."""
    from scipy.special import ndtri, stdtrit  # scipy.stats takes a second to import

    if looks == "any":
        if not 1 <= df < math.inf:
            return math.inf if df < 1 else -float(ndtri(level / 2))
        grown = 1 + (df + 1) * PRIOR_VARIANCE
        ratio = (grown / level**2) ** (1 / (df + 1))
        return math.sqrt(df * (ratio - 1) / (1 - ratio / grown)) if ratio < grown else math.inf
    level /= looks
    single = -float(ndtri(level / 2) if math.isinf(df) else stdtrit(max(df, 0.5), level / 2))
    if means <= 2:
        return single
    from scipy.optimize import brentq
    from scipy.stats import studentized_range

    pairs = means * (means - 1) / 2
    most = -float(ndtri(level / pairs / 2) if math.isinf(df) else stdtrit(max(df, 0.5), level / pairs / 2))
    try:
        return brentq(lambda t: studentized_range.sf(t * math.sqrt(2), means, df) - level, single, most, xtol=1e-3)
    except ValueError:  # scipy's integral is not accurate enough to bracket the root
        return most


@dataclass(frozen=True)
class Contrast:
    """A weighted sum of means with its noise by source; None if a source is not known."""

    estimate: float
    seeds: Variance | None
    rows: RowNoise | None
    runs: int
    """The smallest number of replicates of the samples."""
    num_samples: int = 2
    paired: bool = False
    folds: bool = False
    identical: bool = False
    """Whether runs with the same seed have equal results."""

    @property
    def seed_independent(self) -> bool:
        """Whether seeds have no effect: at least three equal runs of each, or `identical`."""
        return self.identical or (self.seeds is not None and self.seeds.value == 0 and self.runs > 2 and not self.folds)

    @property
    def seeded(self) -> bool:
        """Whether the runs' noise is known and not 0 merely because there are few runs."""
        return self.seeds is not None and (self.seeds.value > 0 or (self.folds and self.rows is not None))

    def half_width(self, level: float, looks: Looks) -> float | None:
        """Half the interval, from the known sources of noise; None if there are none."""
        known = [v.half_width(level, looks) for v in (self.seeds, self.rows) if v is not None]
        return math.hypot(*known) if known else None


def contrast(samples: Sequence[Sample], weights: Sequence[float], *, paired: bool = False) -> Contrast:
    """The contrast of the samples' means with `weights` (their sum is 0); `paired` compares seed by seed."""
    parts = {r.part for s in samples for r in s.replicates}
    common = set.intersection(*(s.labels for s in samples))
    folds = len(parts) > 1 and bool(common)
    paired = folds or (paired and len(common) >= 2)
    if paired:
        samples = [s.only(common) for s in samples]
    vector = np.array(weights)
    estimate = float(vector @ [s.mean for s in samples])
    rows = row_variance(samples, vector)
    fewest = min(len(s.replicates) for s in samples)
    values = [s.only(common).values for s in samples]
    measured = len(common) >= 2 and not any(s.stated for s in samples)
    identical = measured and all(np.allclose(v, values[0], rtol=1e-12, atol=0) for v in values)
    seeds = None
    if paired:
        seeds, rows = _paired(samples, vector, rows, folds=folds)
    if not folds and (seeds is None or seeds.value <= 0) and all(len(s.replicates) >= 2 or s.stated for s in samples):
        seeds = _welch(samples, vector)
    return Contrast(estimate, seeds, rows, fewest, len(samples), paired, folds, identical)


def _welch(samples: Sequence[Sample], weights: Array) -> Variance:
    value, below, sides = 0.0, 0.0, {True: 0.0, False: 0.0}
    for sample, weight in zip(samples, weights, strict=True):
        sd, df = sample.stated or (float(sample.values.std(ddof=1)), len(sample.replicates) - 1.0)
        part = weight**2 * sd**2 / len(sample.replicates)
        value, below = value + part, below + part**2 / df
        sides[bool(weight > 0)] += df
    df = value**2 / below if below > 0 else min(sides.values())
    few = min(len(s.replicates) for s in samples) < FEW and not any(s.stated for s in samples)
    return Variance(value, (df + min(df, *sides.values())) / 2 if few else df)


def _paired(
    samples: Sequence[Sample], weights: Array, rows: RowNoise | None, *, folds: bool
) -> tuple[Variance | None, RowNoise | None]:
    """The runs' variance by seed or by fold, and the rows' variance that belongs to it."""
    table = weights @ np.array([s.values for s in samples])
    if not folds:
        return Variance(float(table.var(ddof=1)) / len(table), len(table) - 1.0), rows
    # Seeds within a fold are averaged, since folds are the independent units.
    of_fold: dict[str, list[float]] = {}
    for replicate, value in zip(samples[0].replicates, table, strict=True):
        of_fold.setdefault(replicate.part, []).append(float(value))
    means = np.array([np.mean(values) for values in of_fold.values()])
    if len(means) < 2:
        return None, rows
    shared, square = max(s.training_overlap for s in samples), float(means.var(ddof=1))
    if rows is None:
        return Variance(square * (1 / len(means) + shared), len(means) - 1.0), None
    excess = max(square / len(means) - rows.value, 0.0)
    return Variance(excess, len(means) - 1.0), replace(rows, value=rows.value * (1 + shared))


def row_variance(samples: Sequence[Sample], weights: Array) -> RowNoise | None:
    """A contrast's variance from the choice of validation rows; None if a run's row scores are missing."""
    parts = sorted({r.part for s in samples for r in s.replicates})
    total, count, paired = 0.0, 0, True
    for part in parts:
        cells = [[r.rows for r in s.replicates if r.part == part] for s in samples]
        runs = [run for cell in cells for run in cell if run is not None]
        if len(runs) < sum(map(len, cells)) or not all(cells):
            return None
        # The weight of a part in the mean over all parts.
        share = weights * [len(cell) / len(s.replicates) for cell, s in zip(cells, samples, strict=True)]
        aligned = _aligned(runs)
        if aligned is None:
            noise = [
                np.mean([r.influences().var(ddof=1) / len(r.rows) for r in cell if r is not None]) for cell in cells
            ]
            total, count, paired = total + float(share**2 @ noise), count + min(len(r.rows) for r in runs), False
            continue
        size = len(aligned[0].rows)
        if size < 2:
            return None
        tables = np.split(np.array([r.influences() for r in aligned]), np.cumsum([len(cell) for cell in cells])[:-1])
        spread = float((share @ np.array([t.mean(axis=0) for t in tables])).var(ddof=1))
        within = [t.var(axis=0, ddof=1).mean() / len(t) if len(t) > 1 else 0.0 for t in tables]
        total, count = total + max(spread - float(share**2 @ within), 0.0) / size, count + size
    return RowNoise(total, float(max(count - len(parts), 1)), count, paired, runs[0].unit)


def _aligned(runs: Sequence[RowScores]) -> Sequence[RowScores] | None:
    """The runs restricted to common rows in one order; None if these are fewer than half of a run's rows."""
    if all(np.array_equal(run.rows, runs[0].rows) for run in runs):
        return runs
    if any(len(np.unique(run.rows)) != len(run.rows) for run in runs):
        return None
    common = functools.reduce(np.intersect1d, [run.rows for run in runs])
    if len(common) * 2 < max(len(run.rows) for run in runs):
        return None
    orders = [np.argsort(run.rows) for run in runs]
    indices = [o[np.searchsorted(r.rows, common, sorter=o)] for o, r in zip(orders, runs, strict=True)]
    return [replace(r, rows=common, total=r.total[p], weight=r.weight[p]) for r, p in zip(runs, indices, strict=True)]


def seeds_matter(samples: Sequence[Sample]) -> bool:
    """Whether the common seeds explain more of the spread than chance would."""
    from scipy.special import fdtrc

    common = set.intersection(*(s.labels for s in samples))
    if len(common) < 2 or len(samples) < 2 or any(s.stated for s in samples):
        return False
    table = np.array([s.only(common).values for s in samples])
    table = table - table.mean(axis=1, keepdims=True)
    seeds = table.mean(axis=0)
    explained, residual = len(samples) * float(seeds @ seeds), float(((table - seeds) ** 2).sum())
    if residual <= 0:
        return explained > 0
    ratio, df = explained / residual * (len(samples) - 1), len(common) - 1
    return bool(fdtrc(df, (len(samples) - 1) * df, ratio) < PAIRING_LEVEL)


def should_compare_logs(samples: Sequence[Sample], *, lower_is_better: bool) -> bool:
    """Whether means differ by much and spreads are more similar on the log scale."""
    means = [s.mean for s in samples]
    positive = all(r.value > 0 for s in samples for r in s.replicates)
    if not lower_is_better or not positive or max(means) < LOG_FROM * min(means) or any(s.stated for s in samples):
        return False
    return _bartlett([s.logged() for s in samples]) < _bartlett(samples)


def _bartlett(samples: Sequence[Sample]) -> float:
    """Bartlett's statistic for unequal variances, up to its factor."""
    variances = [(len(s.replicates) - 1, float(s.values.var(ddof=1))) for s in samples if len(s.replicates) > 1]
    degrees = sum(df for df, _ in variances)
    if not degrees or any(value <= 0 for _, value in variances):
        return math.inf
    pooled = sum(df * value for df, value in variances) / degrees
    return degrees * math.log(pooled) - sum(df * math.log(value) for df, value in variances)


def look_sizes(first: int, until: int, looks: Looks) -> list[int]:
    """Seeds per configuration at each look: every number for "any", else spread evenly up to `until`."""
    if looks == "any" or looks > until - first:
        return list(range(first, until + 1))
    return sorted({first + round((until - first) * step / max(looks - 1, 1)) for step in range(looks)} | {until})


def set_level(count: int, alpha: float) -> float:
    """The two-sided level at which one of `count` configurations is excluded from those that may be the best."""
    return min(alpha, 2 * (1 - (1 - alpha) ** (1 / max(count - 1, 1))))


def runs_needed(c: Contrast, size: float, level: float, looks: Looks) -> int | None:
    """Runs per configuration that detect a difference of `size` in 80% of the cases; None beyond `MOST_RUNS`.

    The measured spread is enlarged by sqrt(df / chi2(20%, df)), since a few runs often underestimate it.
    """
    from scipy.special import chdtri, ndtr

    if c.seeds is None or c.seeds.value <= 0 or c.folds:
        return None
    df = c.seeds.df
    variance = c.seeds.value * c.runs * (1.0 if math.isinf(df) else df / float(chdtri(df, 1 - 0.2)))
    rows = c.rows or Variance(0.0, math.inf)
    for count in range(max(c.runs, 2), MOST_RUNS + 1):
        grown = Variance(variance / count, float("inf") if math.isinf(df) else df / max(c.runs - 1, 1) * (count - 1))
        half = math.hypot(grown.half_width(level, looks), rows.half_width(level, looks))
        if ndtr((size - half) / math.sqrt(grown.value + rows.value)) >= POWER:
            return count
    return None


def rows_needed(c: Contrast, size: float, level: float) -> int | None:
    """The validation rows needed to detect `size` if no number of runs would suffice with these; else None."""
    from scipy.special import ndtri

    if c.rows is None or c.rows.value <= 0:
        return None
    share = c.rows.value * ((critical(math.inf, level) + float(ndtri(POWER))) / size) ** 2
    return math.ceil(c.rows.count * share * 1.1) if share >= 1 else None
