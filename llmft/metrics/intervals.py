"""Confidence intervals of means."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

CONFIDENCE = 0.95


def mean_interval(values: np.ndarray, groups: Sequence[Any] | None = None) -> tuple[float, float]:
    """95% interval of the mean of (rows,) values by Student's t, over groups of rows where given; infinite for one."""
    from scipy.stats import t

    names = np.arange(len(values)) if groups is None else np.array(list(map(str, groups)))
    sums = np.bincount(np.unique(names, return_inverse=True)[1], weights=values - values.mean())
    if len(sums) < 2:
        return -math.inf, math.inf
    error = math.sqrt(len(sums) / (len(sums) - 1) * (sums**2).sum()) / len(values)
    half = t.ppf((1 + CONFIDENCE) / 2, len(sums) - 1) * error
    return float(values.mean() - half), float(values.mean() + half)
