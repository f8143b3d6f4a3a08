"""Verdicts on published numbers, such as those of a paper or a notebook: a mean, number of runs, their spread.

A table with columns `configuration` and `value` (the mean over its runs), and optionally: `seeds` (number of runs of
the value, default 1), `sd` (standard deviation between runs; one line with it is enough), `sd_seeds` (number of runs on
which sd was measured; default: the line's seeds, and for a single seed sd is taken as known), `comparison` (lines with
the same value are compared), `metric` (what the value measures, such as accuracy, which gives the better direction).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from llmft.config.trainer import Mode
from llmft.core.errors import ConfigError, DataError, did_you_mean
from llmft.data.sources import read_table
from llmft.metrics.monitor import mode_of, named_metric
from llmft.reports.statistics import Replicate, Sample
from llmft.reports.verdicts import Rules, Verdicts, judge_samples

COLUMNS = ("configuration", "value", "seeds", "sd", "sd_seeds", "comparison", "metric")


@dataclass(frozen=True)
class Published:
    """One configuration's published result: the mean of `seeds` runs, whose standard deviation is `sd`."""

    name: str
    value: float
    seeds: int = 1
    sd: float | None = None
    sd_seeds: int | None = None
    comparison: str = ""
    metric: str = ""


def judge_numbers(
    published: Sequence[Published], *, metric: str | None = None, mode: Mode = Mode.auto
) -> dict[str, Verdicts]:
    """comparison -> verdicts; `metric` applies to lines that do not name theirs.

    Given spreads are pooled within a comparison; if it has none, those of all lines are.
    Raises DataError for fewer than two configurations, duplicate names, or two metrics; ConfigError if the better
    direction is unknown.
    """
    groups: dict[str, list[Published]] = {}
    for line in published:
        groups.setdefault(line.comparison, []).append(line)
    verdicts = {}
    for name, lines in groups.items():
        where = f"comparison {name}" if name else "the numbers"
        if len(lines) < 2:
            raise DataError(f"{where}: two configurations are needed, there is {len(lines)}.")
        if len({line.name for line in lines}) < len(lines):
            raise DataError(f"{where}: a configuration is listed twice; give its mean and its number of runs (seeds).")
        metrics = {line.metric or metric or "" for line in lines}
        if len(metrics) > 1:
            raise DataError(f"{where}: values of {' and '.join(sorted(metrics))} cannot be compared with each other.")
        measured = metrics.pop()
        if not measured and mode is Mode.auto:
            raise ConfigError(
                f"{where}: what the values measure is unknown: set metric=accuracy, say (or a column `metric`), or "
                "which direction is better, mode=max or mode=min."
            )
        direction = mode_of(named_metric(measured) if measured else None, measured or "the values", mode, key="mode")
        spread = _pooled_spread([line for line in lines if line.sd is not None] or published)
        samples = [_sample(line, spread) for line in lines]
        verdicts[name] = judge_samples(samples, Rules(lower_is_better=direction is Mode.min))
    return verdicts


def _degrees(line: Published) -> float:
    """Degrees of freedom of the line's spread; infinite if it is taken as known."""
    measured = line.sd_seeds or line.seeds
    return measured - 1.0 if measured > 1 else math.inf


def _pooled_spread(lines: Sequence[Published]) -> tuple[float, float] | None:
    """(pooled standard deviation, degrees of freedom) of the lines with a spread; None if there are none."""
    spreads = [(line.sd, _degrees(line)) for line in lines if line.sd is not None]
    if not spreads:
        return None
    known = any(math.isinf(df) for _, df in spreads)
    weights = [1.0 if known else df for _, df in spreads]
    variance = sum(w * sd**2 for w, (sd, _) in zip(weights, spreads, strict=True)) / sum(weights)
    # The same spread on every line was measured once.
    once = len({(line.sd, line.sd_seeds) for line in lines if line.sd is not None}) == 1
    return math.sqrt(variance), spreads[0][1] if once and not known else sum(df for _, df in spreads)


def _sample(line: Published, spread: tuple[float, float] | None) -> Sample:
    stated = spread
    if spread is not None:
        # Two lines with a common estimate share its degrees of freedom.
        stated = (line.sd, _degrees(line)) if line.sd and line.seeds > 1 else (spread[0], spread[1] / 2)
    runs = tuple(Replicate(str(run), "", line.value) for run in range(line.seeds))
    return Sample(line.name, runs, stated=stated)


def read_numbers(file: str) -> list[Published]:
    """Reads the table. Raises ConfigError for a missing file, DataError that names the line."""
    published = []
    for row in read_table(file, "numbers"):
        cells = {name.strip().lower(): "" if cell is None else str(cell).strip() for name, cell in row.values.items()}
        for name in cells:
            if name not in COLUMNS:
                raise DataError(f"{row.where}: no column is called '{name}'{did_you_mean(name, COLUMNS)}")
        for name in COLUMNS[:2]:
            if name not in cells:
                raise DataError(f"{row.where}: the column `{name}` is missing.")
        if any(cells.values()):
            published.append(_published(cells, row.where))
    if not published:
        raise DataError(f"numbers={file}: no numbers.")
    return published


def _published(line: dict[str, str], where: str) -> Published:
    def number(column: str, minimum: float) -> float | None:
        text = line.get(column, "")
        try:
            value = float(text or minimum)
        except ValueError:
            value = math.nan
        if text and not (math.isfinite(value) and value >= minimum):
            raise DataError(f"{where}: {column} '{text}' is not a valid number.")
        return value if text else None

    value = number("value", -math.inf)
    if value is None:
        raise DataError(f"{where}: value is missing.")
    seeds, sd, sd_seeds = int(number("seeds", 1) or 1), number("sd", 0), int(number("sd_seeds", 2) or 0)
    texts = (line.get(column, "") for column in ("comparison", "metric"))
    return Published(line["configuration"], value, seeds, sd, sd_seeds or None, *texts)
