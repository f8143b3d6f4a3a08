"""The report's tables as plain values, and as Markdown and CSV."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from llmft.core.console import duration
from llmft.reports.configurations import Configuration, Study
from llmft.reports.curves import Diagnosis, Fit, summarize
from llmft.reports.read import RunRecord
from llmft.reports.verdicts import Verdicts, number, sentence
from llmft.runs.predictions import csv_text


@dataclass(frozen=True)
class Table:
    """Title, note, column heads and lines of text; cells that are `sentences` are left-aligned and wrapped."""

    title: str
    note: str
    head: list[str]
    lines: list[list[str]]
    sentences: bool = False

    def transposed(self) -> Table:
        """The transposed table."""
        lines = [list(line) for line in zip(self.head[1:], *(line[1:] for line in self.lines), strict=True)]
        return replace(self, head=["", *(line[0] for line in self.lines)], lines=lines)

    def only(self, columns: Sequence[int]) -> Table:
        """The table with these columns only."""
        lines = [[line[column] for column in columns] for line in self.lines]
        return replace(self, head=[self.head[column] for column in columns], lines=lines)


def mean(values: Sequence[float | None]) -> float | None:
    """The mean of the values that are not None; None if all are."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


class BoardLine:
    """A line of the leaderboard: a configuration's rank, its metric over the runs, and their cost."""

    def __init__(self, rank: int, c: Configuration, study: Study, diagnoses: Mapping[str, Diagnosis]) -> None:
        values = c.sample(study.monitor).values
        self.rank, self.name, self.num_runs = rank, c.name, len(values)
        self.mean = float(values.mean())
        self.spread = float(values.std(ddof=1)) if len(values) > 1 else None  # standard deviation between runs
        self.best = float(values.min() if study.lower_is_better else values.max())
        self.replications = replications(c.runs)
        self.seconds, self.tokens = (mean([getattr(run, name) for run in c.runs]) for name in ("seconds", "tokens"))
        self.tokens_per_s = mean([run.tokens / run.seconds for run in c.runs if run.tokens and run.seconds])
        self.memory_gib = max((run.memory_gib for run in c.runs if run.memory_gib is not None), default=None)
        fits = [diagnoses[str(run.directory)] for run in c.runs if str(run.directory) in diagnoses]
        self.fit = str(fits[0]) if len(set(map(str, fits))) == 1 else summarize(fits)
        self.commands = []
        for run in c.runs:
            fold = run.config.get("data.fold")
            replication = f"seed {run.seed}" + (f", fold {fold}" if fold is not None else "")
            self.commands.append((run.name, replication, run.command, run.value(study.monitor) or math.nan))
        names = dict.fromkeys(name for run in c.runs for name in run.result["after"] if name != study.monitor)
        others = {name: mean([run.value(name) for run in c.runs]) for name in names}
        self.other_metrics = {name: value for name, value in others.items() if value is not None}


def replications(runs: Sequence[RunRecord]) -> str:
    """Text such as "3 seeds", "1 seed x 5 folds"."""
    parts = []
    for key, word in (("seed", "seed"), ("data.fold", "fold"), ("data.split_seed", "split")):
        number = len({str(run.config.get(key)) for run in runs})
        if key == "seed" or number > 1:
            parts.append(f"{number} {word}{'s' if number > 1 else ''}")
    return " x ".join(parts)


def count(value: float | None) -> str:
    """Text such as "12,034", "1.2 M"; empty for None."""
    if value is None:
        return ""
    if value >= 1e9:
        return f"{value / 1e9:.1f} G"
    return f"{value / 1e6:.1f} M" if value >= 1e6 else f"{value:,.0f}"


def spread_of(line: BoardLine) -> str:
    """The standard deviation between runs."""
    return number(line.spread, 2) if line.spread is not None else "unknown"


HEAD = ["", "configuration", "mean", "sd", "n", "best", "time", "tokens", "tokens/s", "memory", "curves"]


def board_table(board: Sequence[BoardLine]) -> Table:
    """The leaderboard without empty columns."""
    lines = [
        [
            str(line.rank),
            line.name,
            number(line.mean),
            spread_of(line),
            line.replications,
            number(line.best),
            duration(line.seconds) if line.seconds is not None else "",
            count(line.tokens),
            count(line.tokens_per_s),
            f"{line.memory_gib:.1f} GiB" if line.memory_gib is not None else "",
            line.fit,
        ]
        for line in board
    ]
    nothing = {"", Fit.unknown.value}
    shown = [i for i, name in enumerate(HEAD) if name == "" or {line[i] for line in lines} - nothing]
    return Table("", "", HEAD, lines).only(shown)


def cost(study: Study) -> str:
    """The total cost of the runs in words."""
    seconds, tokens = (
        [value for run in study.runs if (value := getattr(run, name)) is not None] for name in ("seconds", "tokens")
    )
    parts = [f"{len(study.runs)} run{'s' if len(study.runs) != 1 else ''}"]
    parts += [f"{duration(sum(seconds))} in training and validation"] if seconds else []
    parts += [f"{count(sum(tokens))} tokens trained on"] if tokens else []
    return ", ".join(parts)


def markdown_table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; bars and line ends in cells are escaped."""

    def row(values: Sequence[str]) -> str:
        return "| " + " | ".join(" ".join(str(v).split()).replace("|", "\\|") for v in values) + " |"

    return "\n".join([row(head), row(["---"] * len(head)), *map(row, lines)])


def results_csv(study: Study, board: Sequence[BoardLine]) -> str:
    """A line per run: configuration, values, replication, metrics, cost, command."""
    metrics = list(dict.fromkeys(name for run in study.runs for name in run.result["after"]))
    columns = ["step", "seconds", "tokens", "memory_gib", "command"]
    head = ["place", "configuration", *study.keys, "seed", "fold", "run", "key", "status", *metrics, *columns]
    rank_of = {name: line.rank for line in board for name, *_ in line.commands}
    owners = {run.name: c for c in study.configurations for run in c.runs}
    rows: list[list[Any]] = []
    for run in sorted(study.runs, key=lambda run: (rank_of.get(run.name, 10**9), run.part, run.seed)):
        c = owners.get(run.name)
        row = [rank_of.get(run.name), c.name if c else None]
        row += [c.values[key] if c else run.config.get(key) for key in study.keys]
        row += [run.seed, run.config.get("data.fold"), run.name, run.key, run.status]
        rows.append([*row, *map(run.value, metrics), *(getattr(run, name) for name in columns)])
    return to_csv(head, rows)


def verdicts_csv(verdicts: Verdicts) -> str:
    """A line per comparison."""
    head = ["key", "first", "second", "verdict", "lead", "low", "high", "unit", "runs", "rows", "plan", "words"]
    rows = []
    for key, c in verdicts.all:
        num_rows = c.contrast.rows.count if c.contrast.rows else 0
        interval = [c.lead, c.low, c.high, "share" if c.rules.log else "metric"]
        basis = [c.contrast.runs, num_rows, c.plan, sentence(c)]
        rows.append([key, c.first, c.second, c.verdict.value, *interval, *basis])
    return to_csv(head, rows)


def to_csv(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """CSV; a text that a spreadsheet would read as a formula gets a leading quote."""
    formulas = ("=", "+", "-", "@")
    return csv_text(head, ([f"'{v}" if isinstance(v, str) and v.startswith(formulas) else v for v in r] for r in rows))


def metrics_of(run: RunRecord) -> str:
    """All metrics of a run on one line."""
    values = {name: run.value(name) for name in run.result["after"]}
    return ", ".join(f"{name} {number(value)}" for name, value in values.items() if value is not None) or "none"
