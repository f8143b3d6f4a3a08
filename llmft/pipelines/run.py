"""A chain from its plan to its report. Each stage is a process of its own, which ends with this one."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from llmft.config.commands import PipelineConfig
from llmft.config.convert import canonical
from llmft.core.console import Screen
from llmft.core.errors import RunBusy, StageFailed
from llmft.core.files import exclusive_lock, write_atomically
from llmft.pipelines.process import run_command
from llmft.pipelines.report import write_report
from llmft.pipelines.stages import Stage, check_composes, stages_of
from llmft.runs.directory import slug


def run_pipeline(config: PipelineConfig, screen: Screen) -> Path | None:
    """Runs what is not done; returns the directory of the record, None for a plan alone."""
    stages = stages_of(config)
    directory = Path(config.output_dir) / "pipelines" / slug(config.name)
    record = _read(directory / "pipeline.json")
    _show_plan(stages, record, screen)
    for stage in stages:  # a mistake in the last stage is told before the first one starts
        check_composes(stage, stage.arguments(_known(stage, record)))
    if config.dry_run:
        return None
    directory.mkdir(parents=True, exist_ok=True)
    with exclusive_lock(directory / ".lock", RunBusy(f"{directory}: another process runs this chain; wait for it.")):
        results: dict[str, str] = {}
        entries: dict[str, Any] = {}
        for stage in stages:
            arguments = stage.arguments(results)
            before = record.get("stages", {}).get(stage.name, {})
            screen.print(f"\n[bold]{stage.name}[/bold]  [dim]{escape(stage.line(arguments))}[/dim]")
            started = time.monotonic()
            found = _run_stage(stage, arguments, directory, screen)
            results |= found
            entry: dict[str, Any] = {
                "command": stage.line(arguments),
                "result": found[stage.name],
                "runs": found.get(f"{stage.name}.runs"),
                "needs": list(stage.needs),
                "plan": _plan(stage, arguments),
            }
            same = before.get("plan") == entry["plan"] and before.get("result") == entry["result"]
            entry["seconds"] = before["seconds"] if same else round(time.monotonic() - started, 1)
            entries[stage.name] = entry
            record = {"name": config.name, "stages": {**record.get("stages", {}), **entries}}
            _write(directory / "pipeline.json", record)
        _write(directory / "pipeline.json", {"name": config.name, "stages": entries})
        write_report(config, stages, results, directory, screen)
    return directory


def _plan(stage: Stage, arguments: Sequence[str]) -> str:
    return hashlib.sha256(canonical([stage.module(), stage.sweep, list(arguments)]).encode()).hexdigest()[:16]


def _known(stage: Stage, record: dict[str, Any]) -> dict[str, str]:
    """What the stages that `stage` needs left last time, or stand-ins."""
    entries = record.get("stages", {})
    known: dict[str, str] = {}
    for name in stage.needs:
        entry = entries.get(name, {})
        known[name] = entry.get("result") or f"stage-{name}"
        known[f"{name}.runs"] = entry.get("runs") or f"[{known[name]}]"
    return known


def _show_plan(stages: Sequence[Stage], record: dict[str, Any], screen: Screen) -> None:
    table = Table(title="plan", title_justify="left", box=box.SIMPLE_HEAD)
    for title in ("stage", "command", "needs", "before"):
        table.add_column(title, overflow="fold")
    stale: set[str] = set()
    for stage in stages:
        entry = record.get("stages", {}).get(stage.name)
        arguments = stage.arguments(_known(stage, record))
        done = entry is not None and entry["plan"] == _plan(stage, arguments) and not stale & set(stage.needs)
        if not done:
            stale.add(stage.name)
        told = f"done, took {entry['seconds']:.0f} s" if done else "changed" if entry else "new"
        table.add_row(stage.name, escape(" ".join([stage.command, *stage.overrides])), ", ".join(stage.needs), told)
    screen.print(table)


def _run_stage(stage: Stage, arguments: Sequence[str], directory: Path, screen: Screen) -> dict[str, str]:
    """Runs a stage; returns its result under its name, and of a sweep the list of its runs too."""
    code, told = run_command(
        stage.module(), [*(["-m"] if stage.sweep else []), *arguments], directory / f".{stage.name}.outcome"
    )
    if code != 0:
        raise StageFailed(
            f"stage {stage.name} ended with exit code {code}, as told above; the same command goes on with it.",
            code if code > 0 else 128 - code,
        )
    if not told:
        return {stage.name: str(directory / f"stage-{stage.name}")}  # a command that leaves nothing to go on from
    if stage.sweep:
        from llmft.pipelines.sweeps import runs_of, winner

        runs = ",".join(map(str, runs_of(told[0])))
        return {stage.name: str(winner(told[0], screen)), f"{stage.name}.runs": f"[{runs}]"}
    return {stage.name: str(told[0])}


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _write(path: Path, content: dict[str, Any]) -> None:
    write_atomically(path, json.dumps(content, indent=1, ensure_ascii=False).encode())
