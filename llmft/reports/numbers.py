"""Verdicts on plain numbers, such as those of a paper or a notebook: a mean, how many runs, their spread.

A csv with the columns `configuration` and `value` (the mean over its runs), and, as far as known: `seeds` (runs
behind the value; 1), `sd` (standard deviation between runs; one for all lines is enough), `sd_seeds` (on how many
runs it was measured; empty: on the line's own, or taken as known where that is one), `comparison` (lines with the same
word are compared with one another), `metric` (what the value measures, such as accuracy, which says whether more or
less of it is better).
"""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llmft.config.sections import Mode
from llmft.core.errors import ConfigError, DataError, did_you_mean
from llmft.metrics.monitor import mode_of, named_metric
from llmft.reports.statistics import Replicate, Sample
from llmft.reports.verdicts import Verdicts, judge_samples

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
    """Verdicts per comparison of values of `metric`, where the lines do not name theirs.

    Spreads that were told are pooled within the comparison; where there are none, those of all lines.
    Raises DataError for fewer than two configurations, two of one name, or two metrics; ConfigError where nothing says
    which direction is better.
    """
    groups: dict[str, list[Published]] = {}
    for line in published:
        groups.setdefault(line.comparison, []).append(line)
    found = {}
    for name, lines in groups.items():
        where = f"comparison {name}" if name else "the numbers"
        if len(lines) < 2:
            raise DataError(f"{where}: two configurations are needed, there is {len(lines)}.")
        if len({line.name for line in lines}) < len(lines):
            raise DataError(f"{where}: a configuration stands twice; give its mean and the number of its runs (seeds).")
        measured = {line.metric or metric or "" for line in lines}
        if len(measured) > 1:
            raise DataError(f"{where}: values of {' and '.join(sorted(measured))} cannot be compared with each other.")
        lower_is_better = _mode(measured.pop(), mode, where) is Mode.min
        spread = _spread([line for line in lines if line.sd is not None] or published)
        samples = [_sample(line, spread) for line in lines]
        found[name] = judge_samples(samples, lower_is_better=lower_is_better)
    return found


def _mode(metric: str, mode: Mode, where: str) -> Mode:
    if not metric and mode is Mode.auto:
        raise ConfigError(
            f"{where}: nothing says what the values measure: set metric=accuracy, say (or a column `metric`), or which "
            "direction is better, mode=max or mode=min."
        )
    return mode_of(named_metric(metric) if metric else None, metric or "the values", mode, key="mode")


def _degrees(line: Published) -> float:
    """Of the line's spread; infinite for one that is taken as known."""
    measured = line.sd_seeds or line.seeds
    return measured - 1.0 if measured > 1 else math.inf


def _spread(lines: Sequence[Published]) -> tuple[float, float] | None:
    """(pooled standard deviation, degrees of freedom) of the lines that tell one; None where none does."""
    told = [line for line in lines if line.sd is not None]
    if not told:
        return None
    degrees = [_degrees(line) for line in told]
    weights = [1.0 if math.inf in degrees else df for df in degrees]
    variance = sum(w * (line.sd or 0.0) ** 2 for w, line in zip(weights, told, strict=True)) / sum(weights)
    # The same spread said on every line was measured once.
    once = len({(line.sd, line.sd_seeds) for line in told}) == 1
    return math.sqrt(variance), math.inf if math.inf in degrees else degrees[0] if once else sum(degrees)


def _sample(line: Published, spread: tuple[float, float] | None) -> Sample:
    stated = spread
    if spread is not None:
        # Two lines with one estimate between them have its degrees of freedom together.
        stated = (line.sd, _degrees(line)) if line.sd and line.seeds > 1 else (spread[0], spread[1] / 2)
    runs = tuple(Replicate(str(run), "", line.value) for run in range(line.seeds))
    return Sample(line.name, runs, stated=stated)


def read_numbers(path: Path) -> list[Published]:
    """Reads the csv. Raises DataError naming the line."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            lines = list(csv.reader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"numbers={path}: {error}") from None
    head = [name.strip().lower() for name in lines[0]] if lines else []
    for name in head:
        if name not in COLUMNS:
            raise DataError(f"{path}:1: no column is called '{name}'{did_you_mean(name, COLUMNS)}")
    for name in COLUMNS[:2]:
        if name not in head:
            raise DataError(f"{path}:1: the column `{name}` is missing.")
    found = []
    for place, line in enumerate(lines[1:], 2):
        if not any(cell.strip() for cell in line):
            continue
        if len(line) != len(head):
            raise DataError(f"{path}:{place}: {len(line)} values for {len(head)} columns.")
        found.append(_published(dict(zip(head, (cell.strip() for cell in line), strict=True)), f"{path}:{place}"))
    if not found:
        raise DataError(f"{path}: no numbers.")
    return found


def _published(line: dict[str, str], where: str) -> Published:
    def number(column: str, least: float) -> float | None:
        text = line.get(column, "")
        if not text:
            return None
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or value < least:
            raise DataError(f"{where}: {column} '{text}' is no such number.")
        return value

    value = number("value", -math.inf)
    if value is None:
        raise DataError(f"{where}: value is missing.")
    seeds, measured = number("seeds", 1), number("sd_seeds", 2)
    return Published(
        line["configuration"],
        value,
        int(seeds or 1),
        number("sd", 0),
        int(measured) if measured is not None else None,
        line.get("comparison", ""),
        line.get("metric", ""),
    )
