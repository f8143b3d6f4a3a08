"""The run of a sweep that a chain goes on with."""

from __future__ import annotations

import json
from pathlib import Path

from rich.markup import escape

from llmft.config.trainer import Mode
from llmft.core.console import Screen
from llmft.core.errors import ConfigError
from llmft.reports.configurations import Study
from llmft.reports.verdicts import Verdict, judge


def runs_of(sweep: Path) -> list[Path]:
    """The sweep's runs that have a result."""
    record = json.loads((sweep / "sweep.json").read_text())
    return [Path(record["output_dir"]) / trial["run"] for trial in record["trials"] if trial["value"] is not None]


def winner(sweep: Path, screen: Screen) -> Path:
    """The directory of the sweep's best run; where others are not told apart from it, that is said.

    Raises ConfigError where no trial has a result.
    """
    record = json.loads((sweep / "sweep.json").read_text())
    sign = Mode(record["mode"]).sign
    done = [trial for trial in record["trials"] if trial["value"] is not None]
    if not done:
        raise ConfigError(f"{sweep}: no trial has a result, so the chain has nothing to go on with.")
    best = min(done, key=lambda trial: sign * trial["value"])
    study = Study([sweep.parent.parent / trial["run"] for trial in done], sweep)
    ties = [c for key, c in judge(study).all if key is None and c.verdict is not Verdict.better]
    others = "1 other is" if len(ties) == 1 else f"{len(ties)} others are"
    tie = f"; a tie: {others} not told apart from it" if ties else ""
    name = " ".join(best["overrides"]) or best["run"]
    if len(study.configurations) == 1 and len(done) > 1:
        name = f"{len(done)} runs of one configuration; where one is asked for, {name}"
    screen.print(f"[bold]goes on with[/bold]  {escape(name)}{tie}")
    return Path(record["output_dir"]) / best["run"]
