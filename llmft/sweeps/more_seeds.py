"""The source of a grid's trials, which adds seeds while the result is open.

Trials with the same base run one after another; a trial that another process is training is tried again later.

`sweep.seeds_until=10` adds seeds to the configurations that may be the best. The grid's own seeds run first. The
numbers of seeds at each interim analysis (a "look") are fixed in advance. A configuration that cannot be the best gets
no more seeds. The sweep ends when there is a verdict or all seeds are used. Each look uses only the trials planned
before it, so the same command continues where it stopped.
"""

from __future__ import annotations

from collections.abc import Sequence

from llmft.core.errors import ConfigError
from llmft.reports.statistics import look_sizes
from llmft.reports.verdicts import still_open
from llmft.sweeps.progress import SweepProgress
from llmft.sweeps.same_as_reference import same_as_reference_rule
from llmft.sweeps.supervisor import BusyTrials
from llmft.sweeps.trials import Planner, Sweep, Trial


class Grid:
    """A grid as a source of trials; each look adds seeds to the configurations that may be the best."""

    def __init__(self, sweep: Sweep, planner: Planner, jobs: Sequence[Sequence[str]], progress: SweepProgress) -> None:
        self.sweep, self.planner, self.progress = sweep, planner, progress
        self.jobs = [list(job) for job in jobs]
        self.decide = same_as_reference_rule(sweep.config)
        bases = list(dict.fromkeys(trial.base for trial in sweep.trials))
        self.waiting = sorted(sweep.trials, key=lambda trial: bases.index(trial.base))
        self._busy = BusyTrials()
        self.seeds = sorted({trial.config.seed for trial in sweep.trials})
        settings, num_seeds = sweep.config.sweep, len(self.seeds)
        until = settings.seeds_until or num_seeds
        if settings.seeds_until is not None and until <= num_seeds:
            raise ConfigError(f"sweep.seeds_until={until}: the grid has {num_seeds} seeds itself; set a larger number.")
        # One seed allows no verdict, so the look at it does not count as one.
        sizes = look_sizes(max(num_seeds, min(until, 2)), until, settings.declared_looks)
        self.sizes = [1] * (num_seeds == 1 < until) + sizes
        self.under_way = 0

    def missing(self) -> list[Trial]:
        """The trials to run now; when all are done, those that the next look adds."""
        while not (missing := [trial for trial in self.sweep.trials if not trial.finished_before()]):
            if len(self.sizes) <= 1:
                return []
            self._look()
        return missing

    def next(self) -> Trial | None:
        """The next trial that no other process is training; when all have ended, one that the next look adds."""
        if not self.waiting and not self.under_way and len(self.sizes) > 1:
            self._look()
        trial = next((trial for trial in self.waiting if not self._busy.has(trial)), None)
        if trial is not None:
            self.waiting.remove(trial)
            self.under_way += 1
        return trial

    def over(self) -> bool:
        """Whether all trials were handed out and no look is left."""
        return not self.waiting and len(self.sizes) <= 1

    def ended(self, trial: Trial) -> None:
        """Puts a trial back in the queue if another process is training it, or if it has to be run again."""
        self.under_way -= 1
        if trial.status in ("busy", "pending"):
            self.waiting.append(trial)
        if trial.status == "busy":
            self._busy.add(trial)

    def _look(self) -> None:
        """Adds seeds to the configurations that may be the best, or ends the looks."""
        size = self.sizes.pop(0)
        self.sweep.write()
        open_runs, answer = still_open(self.sweep.directory)
        directories = {path.resolve() for path in open_runs}
        pairs = zip(self.sweep.trials, self.jobs, strict=True)
        jobs = {_without_seed(job): trial for trial, job in pairs if trial.run.directory.resolve() in directories}
        if not jobs:
            self.sizes = self.sizes[-1:]
            self.progress.say(f"{size} seeds: {answer} This is final, so no more seeds are run.")
            return
        more = [self.seeds[-1] + 1 + offset for offset in range(self.sizes[0] - len(self.seeds))]
        self.seeds += more
        for seed in more:
            for job, sibling in jobs.items():
                varied = [*_without_seed(sibling.overrides), f"seed={seed}"]
                trial = self.planner.trial(len(self.sweep.trials), [*job, f"seed={seed}"], varied)
                self.sweep.add(trial)
                self.jobs.append([*job, f"seed={seed}"])
                self.waiting.append(trial)
        self.sweep.swept["seed"] = [str(seed) for seed in self.seeds]
        self.progress.total = len(self.sweep.trials)
        self.progress.say(f"{size} seeds: {answer} {len(more) * len(jobs)} more trials.")


def _without_seed(overrides: Sequence[str]) -> tuple[str, ...]:
    return tuple(override for override in overrides if override.partition("=")[0].lstrip("+") != "seed")
