"""The content of a report, and its summary on the console."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from pathlib import Path

from rich.markup import escape

from llmft.core.console import Screen, text_table
from llmft.core.redaction import redact
from llmft.reports.configurations import Study
from llmft.reports.curves import Diagnosis, summarize
from llmft.reports.metrics import answers_table, chance_warning, length_warning, metric_tables, unit_warning
from llmft.reports.tables import BoardLine, Table, board_table
from llmft.reports.verdicts import Verdicts, sentence

MOST_LINES = 12
MOST_COLUMNS = 7
"""A wider table on the console is transposed."""


@dataclass
class Report:
    """The results of a report and its directory."""

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
        """All metrics by configuration and by fold with the prior's, and the change of compared answers."""
        answers = answers_table(self.study)
        return [*metric_tables(self.study), *([answers] if answers else [])]

    @property
    def warnings(self) -> dict[str, str]:
        """Warnings if the best configuration is no better than a baseline, or if losses have different units."""
        sentences = {
            "chance": chance_warning(self.study),
            "length": length_warning(self.study),
            "units": unit_warning(self.study),
        }
        return {name: sentence for name, sentence in sentences.items() if sentence}

    @property
    def curves(self) -> str:
        """Over- and underfitting, summarized over the runs."""
        return summarize(list(self.diagnoses.values()))

    def console(self, screen: Screen, *, failures: bool = True) -> None:
        """Prints the leaderboard and the verdicts; failures only with `failures`, since a sweep prints its own."""
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
                table = table.transposed()
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
