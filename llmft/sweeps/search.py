"""Plans and runs a search, and reports its result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from rich.markup import escape

from llmft.config.convert import canonical, to_plain
from llmft.config.sweep import SearchConfig
from llmft.core.console import Screen
from llmft.core.errors import ConfigError, RunBusy
from llmft.core.files import exclusive_lock
from llmft.sweeps.conditions import Value
from llmft.sweeps.progress import SweepProgress
from llmft.sweeps.space import Space, make_space, wanted_trials
from llmft.sweeps.study import OptunaStudy, import_optuna
from llmft.sweeps.suggestions import Search
from llmft.sweeps.supervisor import Supervisor
from llmft.sweeps.sweep import finish
from llmft.sweeps.trials import Planner, Sweep, Trial, open_sweep, plan_all

STUDY = "study.db"
"""Optuna's study in the sweep's directory; `optuna-dashboard sqlite:///PATH` opens it."""


def run_search(planner: Planner, settings: SearchConfig, overrides: Sequence[Any], fixed: Sequence[str]) -> Sweep:
    """Checks the whole space, continues the study if there is one, trains the suggested trials, writes the report.

    `overrides` are Hydra's parsed overrides, including ranges; `fixed` are the overrides common to all trials.

    Raises ConfigError or DataError, before any trial starts, for a range with a bound or choice that cannot run;
    TrialsFailed at the end if some failed; Interrupted if a signal ended the search.
    """
    import_optuna()
    if any(override.partition("=")[0] == "sweep.seeds_until" for override in fixed):
        raise ConfigError("sweep.seeds_until: a search has its own seeds, hydra.sweeper.seeds=[0,1,2].")
    space = make_space(overrides, settings.conditions or {})
    if settings.seeds and any(parameter.key == "seed" for parameter in space.parameters):
        raise ConfigError("seed: varied and in hydra.sweeper.seeds too; leave one out.")
    wanted_trials(settings, space)
    make = partial(make_trial, planner, space)
    points, seed = space.probes(), settings.seeds[0] if settings.seeds else None
    probes = plan_all([space.overrides(point) for point in points], lambda number: make(number, points[number], seed))
    if len({(probe.config.trainer.monitor, probe.config.trainer.mode) for probe in probes}) > 1:
        raise ConfigError("trainer.monitor: varied, but a search compares its trials by it; keep it fixed.")
    sweep = open_search(probes, space, settings, fixed, planner.invocation.command)
    config, screen = sweep.config, Screen()
    busy = RunBusy(f"{sweep.directory}: another process runs this very search; wait for it.")
    with exclusive_lock(sweep.directory / ".lock", busy, timeout_s=1):
        study_file = sweep.directory / STUDY
        if config.force:
            study_file.unlink(missing_ok=True)
        study = OptunaStudy(study_file, settings, space, f"{config.trainer.mode.value}imize")
        progress = SweepProgress(screen, 0, enabled=config.progress, monitor=config.trainer.monitor)
        supervisor = Supervisor(sweep, progress)
        search = Search(study, settings, sweep, progress, make)
        search.workers = supervisor.count_workers(probes, search.num_wanted * search.num_seeds)
        search.recall()
        progress.total = max(search.num_wanted, search.num_suggested) * search.num_seeds
        show_plan(search, sweep, space, settings, screen)
        missing = not search.over()
        try:
            if missing:
                supervisor.run(search, check=probes, workers=search.workers)
            try:
                finish(sweep, screen, supervisor.stopped_because, has_new_results=missing)
            finally:
                show_best(search, sweep, screen)
        except BaseException:
            sweep.write()
            raise
    return sweep


def make_trial(planner: Planner, space: Space, number: int, chosen: dict[str, Value], seed: int | None) -> Trial:
    """The trial for a point of the space and a seed."""
    varied = space.overrides(chosen) + ([f"seed={seed}"] if seed is not None else [])
    fixed = [override for override in space.fixed if seed is None or not override.startswith("seed=")]
    return planner.trial(number, [*fixed, *varied], varied)


def open_search(probes: list[Trial], space: Space, settings: SearchConfig, fixed: Sequence[str], command: str) -> Sweep:
    """The sweep of a search; the same space, settings, data and model give the same sweep.

    n_trials is not part of its identity, so a larger number continues the same search.
    """
    swept = {parameter.key: [parameter.text] for parameter in space.parameters}
    keys = {*swept, "seed"} if settings.seeds else set(swept)
    same = [override for override in fixed if override.partition("=")[0].lstrip("+") not in keys]
    requested = to_plain(replace(settings, n_trials=None, params=None))
    # The key of a run covers all values common to the trials, and the content of data and model.
    identity = [*same, f"search={canonical(requested)}", f"run={probes[0].key}"]
    sweep = open_sweep(probes, swept, identity, command)
    sweep.sample, sweep.trials = probes[0], []
    return sweep


def show_plan(search: Search, sweep: Sweep, space: Space, settings: SearchConfig, screen: Screen) -> None:
    """Prints the plan."""
    question = sweep.config.sweep.question
    plan = {"question": question} if question else {}
    plan["search"] = f"{settings.sampler}, {search.num_wanted} configurations" + (
        f" x seeds {','.join(map(str, settings.seeds))}" if settings.seeds else ""
    )
    plan["space"] = "  ".join(f"{parameter.key}={parameter.text}" for parameter in space.parameters)
    if settings.conditions:
        plan["conditions"] = "  ".join(f"{key} if {text}" for key, text in settings.conditions.items())
    if settings.pruner != "none":
        plan["pruning"] = settings.pruner
    if search.num_suggested:
        plan["known"] = f"{search.num_suggested} configurations from before"
    plan["sweep"] = str(sweep.directory)
    screen.plan(plan)
    if settings.pruner != "none" and sweep.sample is not None and sweep.sample.distributed:
        screen.warn("trials on several devices are not pruned, since their processes take no orders.")


def show_best(search: Search, sweep: Sweep, screen: Screen) -> None:
    """Prints the best configuration and the command that trains it."""
    best = search.best()
    if best is None:
        return
    monitor = sweep.config.trainer.monitor
    over = f", mean of {search.num_seeds} seeds" if search.num_seeds > 1 else ""
    shown = " ".join(search.study.space.overrides(best.chosen))
    answer = f"best of {len(search.candidates)} configurations: {monitor} {best.value:.4f}{over}"
    screen.print(f"{answer}  [bold]{escape(shown)}[/bold]", f"  {escape(best.first.command)}")
