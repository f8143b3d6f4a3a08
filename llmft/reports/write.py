"""Runs -> report.html, report.md, results.csv, verdicts.csv, and an entry in the logbook."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from llmft.config.trainer import Mode
from llmft.core.files import write_atomically
from llmft.core.redaction import redact
from llmft.reports.configurations import Study
from llmft.reports.curves import diagnose
from llmft.reports.logbook import ENTRY, entry, update_logbook
from llmft.reports.page import render
from llmft.reports.report import Report
from llmft.reports.tables import BoardLine, board_table, cost, markdown_table, metrics_of, results_csv, verdicts_csv
from llmft.reports.verdicts import ends_of, judge, sentence


def write_report(
    runs: Sequence[Path],
    directory: Path,
    *,
    sweep: Path | None = None,
    leaderboard_scores: Mapping[str, float] | None = None,
    clusters: bool = True,
    mode: Mode = Mode.auto,
) -> Report:
    """Reads `runs` and those of `sweep` (a sweep's directory), compares them and writes the report to `directory`.

    A sweep in a directory `sweeps` gets an entry in the logbook next to that. `leaderboard_scores`: run name or key ->
    external score. Incomplete, faulty and failed runs are listed with their problems.

    Raises ConfigError if the better direction of the metric is unknown and not given by `mode`;
    OSError if `directory` cannot be written.
    """
    study = Study(runs, sweep, mode)
    diagnoses = {str(r.directory): diagnose(r) for r in study.runs if r.metrics or r.status == "diverged"}
    board = [BoardLine(rank, c, study, diagnoses) for rank, c in enumerate(study.configurations, 1)]
    report = Report(study, judge(study), board, diagnoses, directory)
    directory.mkdir(parents=True, exist_ok=True)
    _write(report.html, render(report, leaderboard_scores or {}, clusters=clusters))
    _write(directory / "report.md", markdown(report))
    _write(directory / "results.csv", results_csv(study, report.board))
    _write(directory / "verdicts.csv", verdicts_csv(report.verdicts))
    if sweep is not None and (sweeps := Path(os.path.abspath(sweep)).parent).name == "sweeps":
        _write(sweep / ENTRY, entry(report, sweeps.parent))
        update_logbook(sweeps)
    return report


def markdown(report: Report) -> str:
    """The report as Markdown, without figures."""
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


def _write(path: Path, content: str) -> None:
    write_atomically(path, str(redact(content)).encode("utf-8", errors="replace"))
