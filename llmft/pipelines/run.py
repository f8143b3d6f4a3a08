"""Plans and runs a pipeline, each stage as a child process, and writes its report."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape

from llmft.config.commands import PipelineConfig, SampleConfig
from llmft.config.convert import digest_of
from llmft.config.sections import TrainConfig
from llmft.core.console import Screen, text_table
from llmft.core.errors import RunBusy, StageFailed
from llmft.core.files import exclusive_lock, write_json
from llmft.pipelines.process import run_command
from llmft.pipelines.report import write_report
from llmft.pipelines.stages import Stage, check_composes, stages_of
from llmft.reports.read import read_dictionary
from llmft.runs.naming import slug


def run_pipeline(config: PipelineConfig, screen: Screen) -> Path | None:
    """Runs the unfinished stages; returns the directory of the record, None for a dry run."""
    stages = stages_of(config)
    directory = Path(config.output_dir) / "pipelines" / slug(config.name)
    before = read_dictionary(directory / "pipeline.json", []).get("stages", {})
    # A mistake in any stage is reported before the first one starts.
    configs = [check_composes(stage, stage.arguments(_results_needed(stage, before))) for stage in stages]
    _show_plan(stages, configs, before, screen)
    if config.dry_run:
        return None
    directory.mkdir(parents=True, exist_ok=True)
    with exclusive_lock(directory / ".lock", RunBusy(f"{directory}: another process runs this pipeline; wait for it.")):
        results: dict[str, str] = {}
        entries: dict[str, Any] = {}
        for stage in stages:
            arguments = stage.arguments(results)
            screen.print(f"\n[bold]{stage.name}[/bold]  [dim]{escape(stage.line(arguments))}[/dim]")
            started = time.monotonic()
            results |= _run_stage(stage, arguments, directory, screen)
            entries[stage.name] = _entry(stage, arguments, results, before.get(stage.name, {}), started)
            write_json(directory / "pipeline.json", {"name": config.name, "stages": {**before, **entries}})
        write_json(directory / "pipeline.json", {"name": config.name, "stages": entries})
        write_report(config, stages, results, directory, screen)
    return directory


def _entry(
    stage: Stage, arguments: Sequence[str], results: dict[str, str], before: dict[str, Any], started: float
) -> dict[str, Any]:
    """A stage's entry in the record; a stage that was already done keeps its earlier seconds."""
    entry: dict[str, Any] = {
        "command": stage.line(arguments),
        "result": results[stage.name],
        "runs": results.get(f"{stage.name}.runs"),
        "needs": list(stage.needs),
        "plan": _plan(stage, arguments),
    }
    same = before.get("plan") == entry["plan"] and before.get("result") == entry["result"]
    return entry | {"seconds": before["seconds"] if same else round(time.monotonic() - started, 1)}


def _plan(stage: Stage, arguments: Sequence[str]) -> str:
    return digest_of([stage.module(), stage.sweep, list(arguments)])[:16]


def _results_needed(stage: Stage, before: dict[str, Any]) -> dict[str, str]:
    """The earlier results of the stages that `stage` needs, or placeholders."""
    values: dict[str, str] = {}
    for name in stage.needs:
        entry = before.get(name, {})
        values[name] = entry.get("result") or f"stage-{name}"
        values[f"{name}.runs"] = entry.get("runs") or f"[{values[name]}]"
    return values


def _show_plan(stages: Sequence[Stage], configs: Sequence[Any], before: dict[str, Any], screen: Screen) -> None:
    """Prints the stages with their amount of work, and how long they took before."""
    rows: list[list[str]] = []
    stale: set[str] = set()
    for stage, config in zip(stages, configs, strict=True):
        entry = before.get(stage.name)
        arguments = stage.arguments(_results_needed(stage, before))
        done = entry is not None and entry["plan"] == _plan(stage, arguments) and not stale & set(stage.needs)
        if not done:
            stale.add(stage.name)
        state = "done, took" if done else "changed, took"
        took = f"{state} {entry['seconds']:.0f} s" if entry is not None else "new"
        line = " ".join([stage.command, *stage.overrides])
        rows.append([stage.name, line, ", ".join(stage.needs), work_of(config), took])
    screen.print(text_table(["stage", "command", "needs", "work", "before"], rows, "plan", range(5)))


def work_of(config: Any) -> str:
    """A stage's amount of work, as far as its config gives it; empty for commands that only read."""
    if isinstance(config, SampleConfig):
        prompts = "all prompts" if config.limit is None else f"up to {config.limit:,} prompts"
        return f"{config.samples} answers to {prompts}"
    if not isinstance(config, TrainConfig):
        return ""
    trainer, rows = config.trainer, config.data.rows.get("train")
    steps = trainer.max_steps
    if steps is None and rows is not None and config.data.source is not None:
        steps = math.ceil(trainer.epochs * rows / trainer.batch_size)
    length = f"{trainer.epochs:g} epochs" if steps is None else f"{steps:,} steps"
    answers = f" with {config.task.group} answers each" if config.task.rollouts and config.task.group > 1 else ""
    return f"{length} of {trainer.batch_size} {'prompts' if config.task.rollouts else 'rows'}{answers}"


def _run_stage(stage: Stage, arguments: Sequence[str], directory: Path, screen: Screen) -> dict[str, str]:
    """Runs a stage; returns name -> result, and for a sweep also name.runs -> list of its runs."""
    code, directories = run_command(
        stage.module(), [*(["-m"] if stage.sweep else []), *arguments], directory / f".{stage.name}.outcome"
    )
    if code != 0:
        raise StageFailed(
            f"stage {stage.name} ended with exit code {code}, see the error above; the same command continues with it.",
            code if code > 0 else 128 - code,
        )
    if not directories:
        return {stage.name: str(directory / f"stage-{stage.name}")}  # a command without a result directory
    if stage.sweep:
        from llmft.pipelines.sweeps import best_run

        best, runs = best_run(directories[0], screen)
        return {stage.name: str(best), f"{stage.name}.runs": f"[{','.join(map(str, runs))}]"}
    return {stage.name: str(directories[0])}
