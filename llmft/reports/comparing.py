"""Better, worse, or not distinguishable: tests, intervals, and how many more seeds would settle it.

Two questions are asked of every contrast, and a winner is called only when both say yes:

1. Against the **pooled** spread, at the critical value of the studentised range (Tukey; Kramer for unequal numbers)
   for all means of the family. The best is compared with each: the range over all pairs covers that the best was
   picked after looking, so luck in the picking makes no winner. The larger of the pooled and the contrast's own
   variance counts, with fewer degrees of freedom where the configurations are visibly unequal in spread.
2. Against the contrast's **own** spread (Welch's t, or the paired t where seeds or folds are compared one by one),
   which stays right when one configuration is noisier than the rest.

Rows add to both: the half widths that seeds alone and rows alone would give are added in quadrature, each at its own
critical value. (Adding the variances and their degrees of freedom after Satterthwaite is too bold with two seeds:
when their variance comes out small by chance, it trusts the many degrees of freedom of the rows.) The two levels
below hold the family-wise rate of false winners at 5% in the simulation of `llmft.reports.calibration`, also where
spreads differ threefold. The interval is the wider of the two, so a verdict and its interval never disagree.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from llmft.reports.noise import Contrast, Noise, Variance

ALPHA = 0.05
POOLED_SHARE = 0.84
"""Level of the first question, as a share of the family's."""
OWN_SHARE = 0.86
OWN_SHARE_SOME = 0.65
OWN_SHARE_FEW = 0.42
"""Level of the second question: from `MANY_DF` degrees of freedom of the own spread on, below, and below `MANY`
replicates: estimates of a spread from a few runs are often far too small."""
MANY, MANY_DF = 5, 10
POWER = 0.8
MOST_SEEDS = 50
"""More seeds than that are not worth counting."""


class Verdict(Enum):
    """What can be said of a contrast; the first name is the better one where there is a winner."""

    better = "better"
    worse = "worse"
    same = "not distinguishable"
    rows_only = "seed noise unknown"
    unknown = "unknown"


@dataclass(frozen=True)
class Comparison:
    """A contrast `first` - `second` in the metric's units, with its interval, verdict, and what would settle it."""

    first: str
    second: str
    estimate: float
    low: float | None
    high: float | None
    verdict: Verdict
    contrast: Contrast
    seeds_needed: int | None = None
    """Replicates per configuration, in all, at which a difference of this size would be found in 80% of the cases; None
    where it is found already or no number up to `MOST_SEEDS` would."""
    rows_needed: int | None = None
    """Validation rows that it would take, where the rows and not the seeds are what is too few."""


def compare(
    noise: Noise,
    weights: Mapping[str, float],
    names: tuple[str, str],
    *,
    family: int,
    alpha: float = ALPHA,
    lower_is_better: bool = True,
) -> Comparison:
    """Compares two means, or two weighted groups of means: those with positive weights (`names[0]`) with the others.

    `family` is the number of means that were looked at, `alpha` the chance of any false winner among them.
    """
    contrast = noise.contrast(weights)
    half, seeds_known = _half_width(contrast, family, alpha)
    low = high = None
    verdict = Verdict.unknown
    if half is not None:
        low, high = contrast.estimate - half, contrast.estimate + half
        apart = abs(contrast.estimate) > half
        good = (contrast.estimate < 0) == lower_is_better
        verdict = (Verdict.better if good else Verdict.worse) if apart else Verdict.same
        if apart and not seeds_known:
            verdict = Verdict.rows_only
    seeds = rows = None
    if verdict is Verdict.same and seeds_known:
        seeds, rows = _needed(contrast, family, alpha)
    return Comparison(*names, contrast.estimate, low, high, verdict, contrast, seeds, rows)


def _half_width(contrast: Contrast, family: int, alpha: float) -> tuple[float | None, bool]:
    """Half of the interval's width, and whether it holds the noise of seeds."""
    rows = contrast.rows or Variance(0.0, math.inf)
    widths = []
    if contrast.pooled is not None:
        larger = max(contrast.pooled.value, contrast.own.value if contrast.own else 0.0)
        level = alpha * POOLED_SHARE
        of_seeds = range_critical(family, contrast.pooled.df, level) * math.sqrt(larger)
        widths.append(math.hypot(of_seeds, range_critical(family, rows.df, level) * math.sqrt(rows.value)))
    if contrast.own is not None:
        level = alpha * _own_share(contrast.replicates, contrast.own.df)
        of_seeds = _t_critical(contrast.own.df, level) * math.sqrt(contrast.own.value)
        widths.append(math.hypot(of_seeds, _t_critical(rows.df, level) * math.sqrt(rows.value)))
    if widths:
        return max(widths), True
    if contrast.rows is not None and contrast.num_rows > 1:
        return range_critical(family, rows.df, alpha) * math.sqrt(rows.value), False
    return None, False


def _own_share(replicates: int, df: float) -> float:
    if replicates < MANY:
        return OWN_SHARE_FEW
    return OWN_SHARE if df >= MANY_DF else OWN_SHARE_SOME


@functools.lru_cache(maxsize=4096)
def _t_critical(df: float, alpha: float) -> float:
    from scipy.special import ndtri, stdtrit  # scipy.stats takes a second to import

    return -float(ndtri(alpha / 2) if math.isinf(df) else stdtrit(max(df, 0.5), alpha / 2))


_GRID = (1, 1.5, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 30, 40, 60, 120, 1e5)
MOST_MEANS = 60


def range_critical(means: int, df: float, alpha: float) -> float:
    """Two-sided critical value of a difference over its standard error, for all pairs of `means` means.

    The studentised range over the root of two, its logarithm read off between whole degrees of freedom (within 0.1%);
    beyond `MOST_MEANS` means, where scipy's integral gets slow, Bonferroni's, which is larger.
    """
    if means < 2:
        return _t_critical(df, alpha)
    if means > MOST_MEANS:
        return _t_critical(df, alpha * 2 / means / (means - 1))
    if means == 2:
        return _t_critical(df, alpha)
    df = min(max(df, _GRID[0]), _GRID[-1])
    above = next(index for index, known in enumerate(_GRID) if known >= df)
    if df == _GRID[above]:
        return _range_at(means, df, alpha)
    right = math.log(_range_at(means, _GRID[above], alpha))
    left = math.log(_range_at(means, _GRID[above - 1], alpha))
    share = (1 / df - 1 / _GRID[above - 1]) / (1 / _GRID[above] - 1 / _GRID[above - 1])
    return math.exp(left + share * (right - left))


@functools.lru_cache(maxsize=4096)
def _range_at(means: int, df: float, alpha: float) -> float:
    from scipy.optimize import brentq
    from scipy.stats import studentized_range

    # One pair's value is too small and Bonferroni's too large: scipy's own search begins without bounds, and ends with
    # more digits than are of use.
    low, high = _t_critical(df, alpha), _t_critical(df, alpha * 2 / means / (means - 1))

    def excess(value: float) -> float:  # nearly straight in the logarithm, so that few integrals do
        found = float(studentized_range.sf(value * math.sqrt(2), means, df))
        return math.log(max(found, alpha * 1e-9) / alpha)

    try:
        return float(brentq(excess, low, high, xtol=1e-5 * low))
    except (
        ValueError
    ):  # scipy's integral is not exact enough to tell the bounds apart: one degree of freedom, tiny alpha
        return high


def _needed(contrast: Contrast, family: int, alpha: float) -> tuple[int | None, int | None]:
    """(replicates, rows) that would find a difference of the observed size in 80% of the cases; one of them is None."""
    from scipy.special import ndtri

    size = abs(contrast.estimate)
    if size == 0 or contrast.run_variance == 0:
        return None, None
    row_value = contrast.rows.value if contrast.rows else 0.0
    # With seeds without end only the rows' noise is left, and a normal critical value.
    reach = range_critical(family, math.inf, alpha * POOLED_SHARE) + float(ndtri(POWER))
    if reach * math.sqrt(row_value) >= size:
        return None, math.ceil(contrast.num_rows * row_value * (reach / size) ** 2 * 1.1)
    have = contrast.replicates
    for count in range(max(have + 1, 2), MOST_SEEDS + 1):
        grown = max(count - 1, 1) * (family if contrast.pooled else 1)
        seeds = Variance(contrast.run_variance / count, float(grown))
        if _power(contrast, seeds, count, size, family, alpha) >= POWER:
            return count, None
    return None, None


def _power(contrast: Contrast, seeds: Variance, count: int, size: float, family: int, alpha: float) -> float:
    """The chance to find a difference of `size` with `count` replicates, if the noise is what it seems to be."""
    from scipy.special import ndtr

    rows = contrast.rows or Variance(0.0, math.inf)
    critical = max(
        range_critical(family, seeds.df, alpha * POOLED_SHARE),
        _t_critical(2.0 * (count - 1), alpha * _own_share(count, 2.0 * (count - 1))),
    )
    half = math.hypot(critical * math.sqrt(seeds.value), range_critical(family, rows.df, alpha) * math.sqrt(rows.value))
    return float(ndtr((size - half) / math.sqrt(seeds.value + rows.value)))
