"""Runs -> report.html, report.md, results.csv, verdicts.csv, and an entry in the logbook."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llmft.config.trainer import Mode
from llmft.core.files import write_atomically
from llmft.core.redaction import redact
from llmft.reports.configurations import Study
from llmft.reports.curves import Diagnosis, diagnose, summed_up
from llmft.reports.logbook import ENTRY, entry, update_logbook
from llmft.reports.metrics import answers_table, at_chance, at_length, at_units, metric_tables
from llmft.reports.tables import BoardLine, Table, board_table, markdown, results_csv, verdicts_csv
from llmft.reports.verdicts import Verdicts, judge, sentence

MOST_LINES = 12
MOST_COLUMNS = 7
"""Of a table on the console."""


@dataclass
class Report:
    """What was found out and where it was written."""

    study: Study
    verdicts: Verdicts
    board: list[BoardLine]
    diagnoses: dict[str, Diagnosis]
    directory: Path

    @property
    def html(self) -> Path:
        return self.directory / "report.html"

    @functools.cached_property
    def metrics(self) -> list[Table]:
        """Every metric by configuration and by fold, with the prior's, and what became of compared answers."""
        answers = answers_table(self.study)
        return [*metric_tables(self.study), *([answers] if answers else [])]

    @property
    def warnings(self) -> dict[str, str]:
        """Where the best configuration is no better than the prior or than length, or losses have no one unit."""
        sentences = {"chance": at_chance(self.study), "length": at_length(self.study), "units": at_units(self.study)}
        return {name: sentence for name, sentence in sentences.items() if sentence}

    @property
    def curves(self) -> str:
        """Over- and underfitting, summed up over the runs."""
        return summed_up(list(self.diagnoses.values()))

    def console(self, screen: Any, *, failures: bool = True) -> None:
        """Prints the leaderboard and the verdicts; `screen` has a `print` that takes rich markup and tables.

        Without `failures`, what failed is left out: a sweep that ends has told it.
        """
        from rich.markup import escape

        from llmft.core.console import text_table

        if self.board:
            board = board_table(self.board)
            board = board.only([i for i, n in enumerate(board.head) if n not in ("tokens", "tokens/s", "memory")])
            left = [i for i, name in enumerate(board.head) if name in ("configuration", "curves", "n")]
            screen.print(text_table(board.head, redact(board.lines[:MOST_LINES]), f"by {self.study.monitor}", left))
            if len(self.board) > MOST_LINES:
                screen.print(f"and {len(self.board) - MOST_LINES} more, see the page")
        for table in self.metrics:
            table = replace(table, lines=redact(table.lines[:MOST_LINES]))
            if len(table.head) > MOST_COLUMNS and len(table.lines) < MOST_COLUMNS:
                table = table.turned()
            sides = range(len(table.head)) if table.sentences else (0,)
            screen.print(text_table(table.head, table.lines, table.title.lower(), sides))
        for name, warning in self.warnings.items():
            screen.print(f"[red]{name}[/red]  {escape(warning)}")
        if self.study.question:
            screen.print(f"[bold]question[/bold]  {escape(self.study.question)}")
        screen.print(f"[bold]answer[/bold]  {escape(self.verdicts.answer)}")
        for _, comparison in self.verdicts.all[:MOST_LINES]:
            screen.print(f"  {escape(sentence(comparison))}")
        if self.verdicts.basis:
            screen.print(escape(self.verdicts.basis))
        if self.curves:
            screen.print(f"[bold]curves[/bold]  {escape(self.curves)}")
        for failure in self.study.failures[:MOST_LINES] if failures else []:
            screen.print(f"[red]{escape(failure.status)}[/red]  {escape(failure.name)}: {escape(failure.cause)}")
            if failure.command:
                screen.print(f"  {escape(failure.command)}")
        screen.print(f"[bold]report[/bold]  {escape(str(self.html))}")


def write_report(
    runs: Sequence[Path],
    directory: Path,
    *,
    sweep: Path | None = None,
    logbook: Path | None = None,
    leaderboard_scores: Mapping[str, float] | None = None,
    clusters: bool = True,
    mode: Mode = Mode.auto,
) -> Report:
    """Reads `runs` (and those that `sweep`, a sweep's directory, names), judges them and writes `directory`.

    `logbook` is made anew with this sweep's entry. `leaderboard_scores` are scores from elsewhere by run name or key.
    Odd, half-written and failed runs are listed with what is wrong with them.

    Raises ConfigError where nothing but `mode` could say which direction of the metric is better, and it does not;
    OSError where `directory` cannot be written.
    """
    from llmft.reports.page import render

    study = Study(runs, sweep, mode)
    diagnoses = {str(r.directory): diagnose(r) for r in study.runs if r.metrics or r.status == "diverged"}
    board = [BoardLine(rank, c, study, diagnoses) for rank, c in enumerate(study.configurations, 1)]
    report = Report(study, judge(study), board, diagnoses, directory)
    directory.mkdir(parents=True, exist_ok=True)
    _write(report.html, render(report, leaderboard_scores or {}, clusters=clusters))
    _write(directory / "report.md", markdown(report))
    _write(directory / "results.csv", results_csv(study, report.board))
    _write(directory / "verdicts.csv", verdicts_csv(report.verdicts))
    if logbook is not None and sweep is not None:
        _write(sweep / ENTRY, entry(report, logbook.parent))
        update_logbook(logbook, sweep.parent)
    return report


def _write(path: Path, content: str) -> None:
    write_atomically(path, str(redact(content)).encode("utf-8", errors="replace"))
