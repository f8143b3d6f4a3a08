"""Runs -> one page with tables, verdicts and figures: `python -m llmft.report`.

By default for the newest sweep in `output_dir`, or else all its runs. `lb.RUN=0.736` adds an external score.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmft.config.commands import ReportConfig
from llmft.config.hydra_app import run_verb
from llmft.config.invocation import arguments_of_process, split_off
from llmft.core.errors import ConfigError


def main(argv: Sequence[str]) -> None:
    # Names of runs contain dots, which Hydra would read as nested keys.
    scores, argv = split_off(argv, "lb.")
    run_verb("report", ReportConfig, lambda config, _: report(config, scores), argv)


def report(config: ReportConfig, scores: list[str] | None = None) -> Any:
    """Writes the report for `config`, prints its main table and the verdicts, and returns it.

    `scores` are "RUN=0.736". Raises ConfigError if no runs are found, DataError for an invalid csv.
    """
    from llmft.core.console import Screen

    screen = Screen()
    if config.numbers is not None:
        return _report_numbers(config.numbers, config, screen)
    from llmft.reports.leaderboard import read_scores, to_score
    from llmft.reports.run_selection import select_runs
    from llmft.reports.write import write_report

    runs, sweep = select_runs(config.runs, config.sweep, Path(config.output_dir))
    scores_by_run = read_scores(config.lb) if config.lb is not None else {}
    for score in scores or []:
        name, equals, value = score.rpartition("=")
        if not equals:
            raise ConfigError(f"lb.{score}: write lb.RUN=SCORE.")
        scores_by_run[name] = to_score(value, f"lb.{name}")
    page = write_report(
        runs,
        Path(config.out) if config.out is not None else sweep or Path(config.output_dir) / "report",
        sweep=sweep,
        leaderboard_scores=scores_by_run,
        clusters=config.clusters,
        mode=config.mode,
    )
    page.console(screen)
    return page


def _report_numbers(file: str, config: ReportConfig, screen: Any) -> Any:
    from rich.markup import escape

    from llmft.reports.numbers import judge_numbers, read_numbers
    from llmft.reports.verdicts import sentence

    judged = judge_numbers(read_numbers(file), metric=config.metric, mode=config.mode)
    for name, verdicts in judged.items():
        screen.print(f"[bold]{escape(name or 'answer')}[/bold]  {escape(verdicts.answer)}")
        for _, verdict in verdicts.all:
            screen.print(f"  {escape(sentence(verdict))}")
        screen.print(f"  {escape(verdicts.basis)}")
    return judged


if __name__ == "__main__":
    main(arguments_of_process())
