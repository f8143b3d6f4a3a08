"""Plans and runs a grid, and reports its result."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from rich.markup import escape

from llmft.core.console import Screen, text_table
from llmft.core.errors import ConfigError, TrialsFailed
from llmft.core.outcome import write_outcome
from llmft.sweeps.more_seeds import Grid
from llmft.sweeps.progress import SweepProgress
from llmft.sweeps.supervisor import Supervisor
from llmft.sweeps.trials import FINISHED, Planner, Sweep, Trial, open_sweep, varying


def run_grid(planner: Planner, jobs: Sequence[Sequence[str]], fixed: Sequence[str]) -> Sweep:
    """Plans all trials, runs the missing ones under a supervisor, writes the report.

    Raises ConfigError or DataError, before any trial starts, if one of them cannot run; TrialsFailed at the end
    if some failed; Interrupted if a signal ended the sweep.
    """
    sweep = make_sweep(planner, jobs, fixed)
    screen = Screen()
    progress = SweepProgress(
        screen, len(sweep.trials), enabled=sweep.config.progress, monitor=sweep.config.trainer.monitor
    )
    grid = Grid(sweep, planner, jobs, progress)
    show_plan(sweep, screen)
    supervisor = Supervisor(sweep, progress)
    missing = grid.missing()
    try:
        if missing:
            supervisor.run(grid, check=missing, workers=supervisor.count_workers(missing, len(missing), grid=True))
        finish(sweep, screen, supervisor.stopped_because, has_new_results=bool(missing))
    except BaseException:
        sweep.write()
        raise
    return sweep


def run_elsewhere(planner: Planner, jobs: Sequence[Sequence[str]], fixed: Sequence[str], launcher: Any) -> Sweep:
    """Like `run_grid` with another Hydra launcher (submitit, …); results are read from the run directories."""
    sweep = make_sweep(planner, jobs, fixed)
    if sweep.config.sweep.seeds_until is not None:
        raise ConfigError("sweep.seeds_until: another launcher starts all trials at once; use hydra/launcher=local.")
    screen = Screen()
    show_plan(sweep, screen)
    missing = [index for index, trial in enumerate(sweep.trials) if not trial.finished_before()]
    if missing:
        sweep.write()
        launcher.launch([jobs[index] for index in missing], initial_job_idx=0)
    for index in missing:
        trial = sweep.trials[index]
        if not trial.finished_before():
            status = trial.run.status()
            ended = status.get("status")
            how = ended if ended in ("interrupted", "pruned", "twin") else "failed"
            trial.mark(how, status.get("error") or "it left no result", "error")
            trial.log = trial.run.log_file
    finish(sweep, screen, None, has_new_results=bool(missing))
    return sweep


def make_sweep(planner: Planner, jobs: Sequence[Sequence[str]], fixed: Sequence[str]) -> Sweep:
    """Plans the trials and opens the sweep's directory."""
    if not jobs:
        raise ConfigError("this sweep has no combinations: give a key several values, as in seed=0,1,2.")
    trials = planner.plan(jobs)
    varied = varying(jobs)
    swept: dict[str, list[str]] = {}
    for job in jobs:
        for override in job:
            key, _, value = override.partition("=")
            if key in varied and value not in swept.setdefault(key.lstrip("+"), []):
                swept[key.lstrip("+")].append(value)
    same = [override for override in fixed if override.partition("=")[0].lstrip("+") not in swept]
    return open_sweep(trials, swept, same, planner.invocation.command)


def show_plan(sweep: Sweep, screen: Screen) -> None:
    """Prints the plan."""
    question = sweep.config.sweep.question
    keys = "  ".join(f"{key}={','.join(values)}" for key, values in sweep.swept.items())
    trials = f"{len(sweep.trials)}: {keys}" if keys else str(len(sweep.trials))
    screen.plan({**({"question": question} if question else {}), "trials": trials, "sweep": str(sweep.directory)})


def finish(sweep: Sweep, screen: Screen, stopped_because: str | None, *, has_new_results: bool = True) -> None:
    """Writes the record and the report, prints the failures; raises TrialsFailed if there are any."""
    sweep.finished = time.strftime("%Y-%m-%d %H:%M:%S")
    sweep.write()
    failed = [trial for trial in sweep.trials if trial.status not in FINISHED]
    if failed:
        show_failures(failed, screen)
    if sweep.config.sweep.report:
        from llmft.sweeps.answer import write_sweep_report

        write_sweep_report(sweep, screen, has_new_results=has_new_results)
    because = f": {stopped_because}" if stopped_because else ""
    if failed:
        num_pending = sum(trial.status == "pending" for trial in failed)
        not_run = f", {num_pending} not run" if num_pending else ""
        count = f"{len(failed) - num_pending} of {len(sweep.trials)} trials failed{not_run}"
        raise TrialsFailed(f"{count}{because}; the same command runs only those again.")
    if because:
        raise TrialsFailed(f"ended early{because}; the same command continues.")
    write_outcome(sweep.directory)


def show_failures(failed: Sequence[Trial], screen: Screen) -> None:
    """Prints the failed trials with the reason and a command that runs each alone."""
    rows = [[trial.label, trial.status, trial.error or ""] for trial in failed]
    screen.print(text_table(["trial", "status", "why"], rows, "trials without a result", range(3)))
    for trial in failed[:20]:
        log = f"log: {escape(str(trial.log))}; " if trial.log is not None and trial.log.exists() else ""
        screen.print(f"[bold]{escape(trial.label)}[/bold]  {log}alone:", f"  {escape(trial.command)}")
    if len(failed) > 20:
        screen.print(f"  … and {len(failed) - 20} more, in sweep.json")
