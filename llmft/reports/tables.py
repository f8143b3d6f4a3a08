"""The report's tables as plain values, and as Markdown and CSV."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from llmft.reports.configurations import Configuration, Study
from llmft.reports.curves import Diagnosis, Fit, summed_up
from llmft.reports.read import RunRecord
from llmft.reports.verdicts import Verdicts, ends_of, number, sentence
from llmft.runs.predictions import csv_text

if TYPE_CHECKING:
    from llmft.reports.write import Report


@dataclass(frozen=True)
class Table:
    """A heading, column titles and lines of text; `sentences` are wrapped where numbers stand right."""

    title: str
    note: str
    head: list[str]
    lines: list[list[str]]
    sentences: bool = False

    def turned(self) -> Table:
        """The same with lines as columns."""
        lines = [list(line) for line in zip(self.head[1:], *(line[1:] for line in self.lines), strict=True)]
        return replace(self, head=["", *(line[0] for line in self.lines)], lines=lines)

    def only(self, columns: Sequence[int]) -> Table:
        """The same with these columns alone."""
        lines = [[line[column] for column in columns] for line in self.lines]
        return replace(self, head=[self.head[column] for column in columns], lines=lines)


def mean(values: Sequence[float | None]) -> float | None:
    """The mean of those that are known; None without any."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


class BoardLine:
    """A line of the leaderboard: a configuration's place, its metric over the runs, and what these took."""

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
        self.fit = str(fits[0]) if len(set(map(str, fits))) == 1 else summed_up(fits)
        self.commands = []
        for run in c.runs:
            fold = run.config.get("data.fold")
            replication = f"seed {run.seed}" + (f", fold {fold}" if fold is not None else "")
            self.commands.append((run.name, replication, run.command, run.value(study.monitor) or math.nan))
        names = dict.fromkeys(name for run in c.runs for name in run.result["after"] if name != study.monitor)
        others = {name: mean([run.value(name) for run in c.runs]) for name in names}
        self.other_metrics = {name: value for name, value in others.items() if value is not None}


def replications(runs: Sequence[RunRecord]) -> str:
    """ "3 seeds", "5 folds", "2 seeds x 5 folds"."""
    parts = []
    for key, word in (("seed", "seed"), ("data.fold", "fold"), ("data.split_seed", "split")):
        number = len({str(run.config.get(key)) for run in runs})
        if key == "seed" or number > 1:
            parts.append(f"{number} {word}{'s' if number > 1 else ''}")
    return " x ".join(parts)


def duration(seconds: float | None) -> str:
    """ "4.2 s", "3 min 20 s", "2 h 05 min"; nothing for None."""
    if seconds is None:
        return ""
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{seconds // 60:.0f} min {seconds % 60:02.0f} s"
    return f"{seconds // 3600:.0f} h {seconds % 3600 // 60:02.0f} min"


def count(value: float | None) -> str:
    """ "12,034", "1.2 M"; nothing for None."""
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
    """The leaderboard without columns that say nothing."""
    lines = [
        [
            str(line.rank),
            line.name,
            number(line.mean),
            spread_of(line),
            line.replications,
            number(line.best),
            duration(line.seconds),
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
    """What the runs took in all."""
    seconds, tokens, energy = (
        [value for run in study.runs if (value := getattr(run, name)) is not None]
        for name in ("seconds", "tokens", "energy_wh")
    )
    parts = [f"{len(study.runs)} run{'s' if len(study.runs) != 1 else ''}"]
    parts += [f"{duration(sum(seconds))} in training and validation"] if seconds else []
    parts += [f"{count(sum(tokens))} tokens trained on"] if tokens else []
    parts += [f"{sum(energy):.1f} Wh ({len(energy)} runs told)"] if energy else []
    return ", ".join(parts)


def markdown_table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; bars and line ends in cells are taken care of."""

    def row(values: Sequence[str]) -> str:
        return "| " + " | ".join(" ".join(str(v).split()).replace("|", "\\|") for v in values) + " |"

    return "\n".join([row(head), row(["---"] * len(head)), *map(row, lines)])


def results_csv(study: Study, board: Sequence[BoardLine]) -> str:
    """A line per run: configuration, values, replication, metrics, cost, command."""
    metrics = list(dict.fromkeys(name for run in study.runs for name in run.result["after"]))
    facts = ["step", "seconds", "tokens", "memory_gib", "energy_wh", "command"]
    head = ["place", "configuration", *study.keys, "seed", "fold", "run", "key", "status", *metrics, *facts]
    rank_of = {name: line.rank for line in board for name, *_ in line.commands}
    owners = {run.name: c for c in study.configurations for run in c.runs}
    rows: list[list[Any]] = []
    for run in sorted(study.runs, key=lambda run: (rank_of.get(run.name, 10**9), run.part, run.seed)):
        c = owners.get(run.name)
        row = [rank_of.get(run.name), c.name if c else None]
        row += [c.values[key] if c else run.config.get(key) for key in study.keys]
        row += [run.seed, run.config.get("data.fold"), run.name, run.key, run.status]
        rows.append([*row, *map(run.value, metrics), *(getattr(run, name) for name in facts)])
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
    """CSV; a text that a spreadsheet would take for a formula gets a quote in front."""
    formulas = ("=", "+", "-", "@")
    return csv_text(head, ([f"'{v}" if isinstance(v, str) and v.startswith(formulas) else v for v in r] for r in rows))


def markdown(report: Report) -> str:
    """The whole report without figures."""
    study, verdicts, board = report.study, report.verdicts, board_table(report.board)

    def section(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
        return [f"## {title}", markdown_table(head, rows)] if rows else []

    parts = [f"# {study.title}"]
    parts += [f"**Question.** {' '.join(study.question.split())}"] if study.question else []
    parts += [f"**Answer.** {verdicts.answer}", *([verdicts.basis] if verdicts.basis else [])]
    parts += [f"**{name.capitalize()}.** {warning}" for name, warning in report.warnings.items()]
    parts += section(f"Configurations by {study.monitor}", board.head, board.lines)
    for table in report.metrics:
        parts += section(table.title, table.head, table.lines)
    head = ["", "against", "verdict", "lead", "95% interval", "what would settle it"]
    comparisons = [c for _, c in verdicts.all]
    rows = [[c.first, c.second, c.verdict.value, c.rules.amount(c.lead), ends_of(c) or "unknown", c.plan]
            for c in comparisons]  # fmt: skip
    parts += section("Verdicts", head, rows) + [f"- {sentence(c)}" for c in comparisons]
    parts += ["## Over- and underfitting", report.curves] if report.curves else []
    rows = [[run.name, metrics_of(run), run.command] for run in study.others]
    parts += section(f"Runs without {study.monitor}", ["run", "metrics", "command"], rows)
    rows = [[f.name, f.status, f.cause, f"`{f.command}`" if f.command else ""] for f in study.failures]
    parts += section("Failures", ["trial", "status", "cause", "command"], rows)
    parts += ["## Stopped on purpose", *(f"- {line}" for line in study.stopped)] if study.stopped else []
    parts += ["## Cost", cost(study)]
    rows = [[line.name, which, f"`{command}`"] for line in report.board for _, which, command, _ in line.commands]
    parts += section("Commands", ["configuration", "run", "command"], rows)
    return "\n\n".join(parts) + "\n"


def metrics_of(run: RunRecord) -> str:
    """All metrics of a run on one line."""
    values = {name: run.value(name) for name in run.result["after"]}
    return ", ".join(f"{name} {number(value)}" for name, value in values.items() if value is not None) or "none"
