"""Selects the run of a sweep with which a pipeline continues."""

from __future__ import annotations

import json
from pathlib import Path

from rich.markup import escape

from llmft.config.trainer import Mode
from llmft.core.console import Screen
from llmft.core.errors import ConfigError
from llmft.reports.configurations import Study
from llmft.reports.verdicts import Verdict, judge


def best_run(sweep: Path, screen: Screen) -> tuple[Path, list[Path]]:
    """(best run, all runs with a result) of a sweep's directory; ties are printed.

    Raises ConfigError if no trial has a result.
    """
    record = json.loads((sweep / "sweep.json").read_text())
    runs = {sweep.parent.parent / trial["run"]: trial for trial in record["trials"] if trial["value"] is not None}
    if not runs:
        raise ConfigError(f"{sweep}: no trial has a result, so the pipeline cannot continue.")
    sign = Mode(record["mode"]).sign
    best = min(runs, key=lambda run: sign * runs[run]["value"])
    study = Study([*runs], sweep)
    ties = [c for key, c in judge(study).all if key is None and c.verdict is not Verdict.better]
    others = "1 other is" if len(ties) == 1 else f"{len(ties)} others are"
    tie = f"; a tie: {others} not distinguishable from it" if ties else ""
    name = " ".join(runs[best]["overrides"]) or best.name
    if len(study.configurations) == 1 and len(runs) > 1:
        name = f"{len(runs)} runs of one configuration; where a single run is needed, {name}"
    screen.print(f"[bold]continues with[/bold]  {escape(name)}{tie}")
    return best, [*runs]
