"""Where the trials of a grid come from, with more seeds where the answer is open.

Trials of one base come after each other; one that another process holds comes again later.

`sweep.seeds_until=10` adds seeds to the configurations that may be the best. The grid's own seeds run first. Then the
sweep is looked at, at numbers of seeds that are known beforehand. What cannot be the best gets no further seeds. When
the verdict stands, or all seeds are used, the sweep ends. A look sees what was planned before it and nothing else, so
that the same command goes on where it was.
"""

from __future__ import annotations

from collections.abc import Sequence

from llmft.core.errors import ConfigError
from llmft.reports.statistics import look_sizes
from llmft.reports.verdicts import still_open
from llmft.sweeps.progress import SweepProgress
from llmft.sweeps.supervisor import BusyTrials
from llmft.sweeps.trials import Planner, Sweep, Trial
from llmft.sweeps.twin import twin_rule


class Grid:
    """The supervisor's source of a grid, whose open configurations get more seeds at each look."""

    def __init__(self, sweep: Sweep, planner: Planner, jobs: Sequence[Sequence[str]], progress: SweepProgress) -> None:
        self.sweep, self.planner, self.progress = sweep, planner, progress
        self.jobs = [list(job) for job in jobs]
        self.decide = twin_rule(sweep.config)
        bases = list(dict.fromkeys(trial.base for trial in sweep.trials))
        self.waiting = sorted(sweep.trials, key=lambda trial: bases.index(trial.base))
        self._busy = BusyTrials()
        self.seeds = sorted({trial.config.seed for trial in sweep.trials})
        settings, num_seeds = sweep.config.sweep, len(self.seeds)
        until = settings.seeds_until or num_seeds
        if settings.seeds_until is not None and until <= num_seeds:
            raise ConfigError(f"sweep.seeds_until={until}: the grid has {num_seeds} seeds itself; set a larger number.")
        # One seed tells nothing, so that looking at it is no look.
        sizes = look_sizes(max(num_seeds, min(until, 2)), until, settings.declared_looks)
        self.sizes = [1] * (num_seeds == 1 < until) + sizes
        self.under_way = 0

    def missing(self) -> list[Trial]:
        """What is to run now; of the next look, where all before it is done."""
        while not (missing := [trial for trial in self.sweep.trials if not trial.finished_before()]):
            if len(self.sizes) <= 1:
                return []
            self._look()
        return missing

    def next(self) -> Trial | None:
        """The next that is free; where all have ended, one of those that the next look asks for."""
        if not self.waiting and not self.under_way and len(self.sizes) > 1:
            self._look()
        trial = next((trial for trial in self.waiting if not self._busy.has(trial)), None)
        if trial is not None:
            self.waiting.remove(trial)
            self.under_way += 1
        return trial

    def over(self) -> bool:
        """Whether all have been handed out and no look is to come."""
        return not self.waiting and len(self.sizes) <= 1

    def ended(self, trial: Trial) -> None:
        """Takes back one that another process snatched away, or that is to run again by itself."""
        self.under_way -= 1
        if trial.status in ("busy", "pending"):
            self.waiting.append(trial)
        if trial.status == "busy":
            self._busy.add(trial)

    def _look(self) -> None:
        """Gives the open configurations their next seeds, or ends the looks."""
        size = self.sizes.pop(0)
        self.sweep.write()
        open_runs, words = still_open(self.sweep.directory)
        directories = {path.resolve() for path in open_runs}
        pairs = zip(self.sweep.trials, self.jobs, strict=True)
        jobs = {_without_seed(job): trial for trial, job in pairs if trial.run.directory.resolve() in directories}
        if not jobs:
            self.sizes = self.sizes[-1:]
            self.progress.say(f"{size} seeds: {words} It stands, so no more seeds are run.")
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
        self.progress.say(f"{size} seeds: {words} {len(more) * len(jobs)} more trials.")


def _without_seed(overrides: Sequence[str]) -> tuple[str, ...]:
    return tuple(override for override in overrides if override.partition("=")[0].lstrip("+") != "seed")
