"""Runs -> report.html, report.md, results.csv, verdicts.csv, and an entry in the logbook."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmft.config.sections import Mode
from llmft.core.files import write_atomically
from llmft.core.redaction import redact
from llmft.reports import classes
from llmft.reports.classes import at_chance, metric_tables
from llmft.reports.configurations import Study, make_study
from llmft.reports.curves import Diagnosis, summed_up
from llmft.reports.logbook import ENTRY, entry, update_logbook
from llmft.reports.preferences import answers_table, at_length
from llmft.reports.tables import (
    Standing,
    board_table,
    diagnose_all,
    leaderboard,
    markdown,
    results_csv,
    verdicts_csv,
)
from llmft.reports.verdicts import Verdicts, judge, sentence

SHOWN_ON_CONSOLE = 12


@dataclass
class Report:
    """What was found out and where it was written."""

    study: Study
    verdicts: Verdicts
    board: list[Standing]
    diagnoses: dict[str, Diagnosis]
    directory: Path

    @property
    def html(self) -> Path:
        """The page."""
        return self.directory / "report.html"

    @functools.cached_property
    def metrics(self) -> list[classes.Table]:
        """Every metric by configuration and by fold, with the prior's, and what became of compared answers."""
        answers = answers_table(self.study)
        return [*metric_tables(self.study), *([answers] if answers else [])]

    @property
    def warnings(self) -> dict[str, str]:
        """Where the best configuration is no better than the prior, or than the rule that the longer answer wins."""
        found = {"chance": at_chance(self.study), "length": at_length(self.study)}
        return {name: sentence for name, sentence in found.items() if sentence}

    @property
    def curves(self) -> str:
        """Over- and underfitting, summed up over the runs."""
        return summed_up(list(self.diagnoses.values()))

    def console(self, screen: Any, *, failures: bool = True) -> None:
        """Prints the leaderboard and the verdicts; `screen` has a `print` that takes rich markup and tables.

        Without `failures`, what failed is left out: a sweep that ends has told it.
        """
        from rich import box
        from rich.markup import escape
        from rich.table import Table

        if self.board:
            table = Table(title=escape(f"by {self.study.monitor}"), title_justify="left", box=box.SIMPLE_HEAD)
            whole = board_table(self.board)
            kept = [i for i, name in enumerate(whole.head) if name not in ("tokens", "tokens/s", "memory")]
            for name in (whole.head[i] for i in kept):
                justify: Any = "left" if name in ("configuration", "curves", "n") else "right"
                table.add_column(name, justify=justify, overflow="fold")
            for cells in whole.lines[:SHOWN_ON_CONSOLE]:
                table.add_row(*map(escape, redact([cells[i] for i in kept])))
            screen.print(table)
            if len(self.board) > SHOWN_ON_CONSOLE:
                screen.print(f"and {len(self.board) - SHOWN_ON_CONSOLE} more, see the page")
        for own in self.metrics:
            table = Table(title=escape(own.title.lower()), title_justify="left", box=box.SIMPLE_HEAD)
            for name in own.head:
                first = name == own.head[0]
                justify = "left" if first else "right"
                table.add_column(escape(name), justify=justify, overflow="fold", min_width=14 if first else None)
            for cells_of_line in own.lines[:SHOWN_ON_CONSOLE]:
                table.add_row(*map(escape, redact(cells_of_line)))
            screen.print(table)
        for name, warning in self.warnings.items():
            screen.print(f"[red]{name}[/red]  {escape(warning)}")
        if self.study.question:
            screen.print(f"[bold]question[/bold]  {escape(self.study.question)}")
        screen.print(f"[bold]answer[/bold]  {escape(self.verdicts.answer)}")
        for _, found in self.verdicts.all[:SHOWN_ON_CONSOLE]:
            screen.print(f"  {escape(sentence(found))}")
        if self.verdicts.basis:
            screen.print(escape(self.verdicts.basis))
        if self.curves:
            screen.print(f"[bold]curves[/bold]  {escape(self.curves)}")
        for failure in self.study.failures[:SHOWN_ON_CONSOLE] if failures else []:
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

    study = make_study(runs, sweep, mode)
    verdicts = judge(study)
    diagnoses = diagnose_all(study)
    board = leaderboard(study, diagnoses)
    report = Report(study, verdicts, board, diagnoses, directory)
    directory.mkdir(parents=True, exist_ok=True)
    files = {
        "report.html": render(report, dict(leaderboard_scores or {}), clusters=clusters),
        "report.md": markdown(study, verdicts, board, report.curves, report.metrics, report.warnings),
        "results.csv": results_csv(study, board),
        "verdicts.csv": verdicts_csv(verdicts),
    }
    for name, content in files.items():
        _write(directory / name, content)
    if logbook is not None and sweep is not None:
        _write(sweep / ENTRY, entry(study, verdicts, board, directory, logbook.parent, report.warnings))
        update_logbook(logbook, sweep.parent)
    return report


def _write(path: Path, content: str) -> None:
    write_atomically(path, str(redact(content)).encode("utf-8", errors="replace"))
