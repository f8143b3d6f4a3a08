"""Synchronous halving of configurations that train side by side: 8, then 4, 2 and 1.

Configurations are compared at the same step, where their schedules are alike too; the better half goes on. Seeds and
folds are replicates of a configuration: it counts by their mean, and they go on or stop together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from llmft.config import Mode, TrainConfig, TrainOn
from llmft.errors import ConfigError
from llmft.schema import canonical, to_plain
from llmft.sweeping.trials import Trial
from llmft.sweeping.twin import validations

REPLICATES = ("seed", "data.fold")
"""Keys that make no other configuration, only another draw of one."""
LENGTHS = ("trainer.max_steps", "trainer.epochs", "trainer.batch_size", "data.limit")

Decision = tuple[str, str] | None


def configuration_of(config: TrainConfig) -> str:
    """Equal for trials that differ in seed and fold alone."""
    parts = [config.model, config.quantization, config.lora, config.learning_rate, config.optimizer, config.prompt]
    data = to_plain(config.data)
    trainer = to_plain(config.trainer)
    return canonical([*to_plain(parts), {**data, "fold": None}, to_plain(config.task), trainer])


def check_halving(trials: Sequence[Trial], swept: dict[str, list[str]]) -> None:
    """Raises ConfigError where sweep.halving has nothing to compare, or trials that cannot be compared."""
    settings = trials[0].config.sweep
    longer = [key for key in LENGTHS if len(swept.get(key, ())) > 1]
    if longer:
        raise ConfigError(
            f"sweep.halving=true: {longer[0]} makes trials of different lengths, whose schedules cannot be compared "
            "half-way; keep it fixed."
        )
    if len(swept.get("trainer.validate_every", ())) > 1:
        raise ConfigError(
            "sweep.halving=true: trainer.validate_every makes trials that validate at different steps, where they "
            "cannot be compared; keep it fixed."
        )
    if any(trial.config.data.train_on is TrainOn.all for trial in trials):
        raise ConfigError(
            "sweep.halving=true: with data.train_on=all no validation tells configurations apart; leave one out."
        )
    if settings.stack == 1:
        raise ConfigError("sweep.halving=true compares trials that train side by side: set sweep.stack=8, say.")
    replicates = math.prod(len(swept.get(key, ())) or 1 for key in REPLICATES)
    if isinstance(settings.stack, int) and settings.stack < 2 * replicates:
        raise ConfigError(
            f"sweep.halving=true: with {replicates} seeds and folds of each configuration sweep.stack must be "
            f"{2 * replicates} or more, to hold two configurations."
        )
    cohorts = cohorts_of(trials, lambda trial: trial.lanes)
    if all(len({configuration_of(trial.config) for trial in cohort}) < 2 for cohort in cohorts):
        raise ConfigError(
            "sweep.halving=true: no two configurations of this sweep train side by side to be compared; that takes "
            f"LoRA on one base, two configurations or more, and room for them (sweep.stack={settings.stack})."
        )


class Halving:
    """Decides for the cohorts that are stacked together.

    A decision waits until all of a cohort's trials have come to the same validation. It is made from the runs' own
    records, so a sweep that goes on after a kill decides as it would have.
    """

    def __init__(self, cohorts: Sequence[Sequence[Trial]], monitor: str, mode: Mode) -> None:
        self.cohorts = [list(cohort) for cohort in cohorts]
        self.monitor = monitor
        self.sign = mode.sign
        self._asked: dict[int, tuple[int, Callable[[Decision], None]]] = {}

    def ask(self, trial: Trial, step: int, total: int, answer: Callable[[Decision], None]) -> None:
        """A trial has validated; `answer` is called with the decision, now or when the others have come as far."""
        cohort = next((c for c in self.cohorts if trial in c), None)
        if cohort is None or step == 0 or not self._due(cohort, step, total):
            answer(None)
            return
        self._asked[trial.number] = (step, answer)
        self.look()

    def look(self) -> None:
        """Decides wherever all have come; call when a trial has ended too."""
        for cohort in self.cohorts:
            waiting = [trial for trial in cohort if trial.number in self._asked]
            running = [trial for trial in cohort if trial.status == "running"]
            if waiting and len(waiting) == len(running):
                self._decide(cohort, waiting)

    def _alive(self, cohort: Sequence[Trial]) -> dict[str, list[Trial]]:
        """Trials by configuration, without the configurations that were dropped or have nothing to show."""
        found: dict[str, list[Trial]] = {}
        for trial in cohort:
            found.setdefault(configuration_of(trial.config), []).append(trial)
        return {
            name: trials
            for name, trials in found.items()
            if not any(trial.status == "pruned" for trial in trials)
            and any(trial.status in ("running", "done") for trial in trials)
        }

    def _due(self, cohort: Sequence[Trial], step: int, total: int) -> bool:
        """Whether the cohort is to be halved at this step: one of 8 survives halvings at 1/8, 1/4 and 1/2."""
        configurations = len({configuration_of(trial.config) for trial in cohort})
        halvings = math.ceil(math.log2(configurations)) if configurations > 1 else 0
        alive = len(self._alive(cohort))
        if alive < 2:
            return False
        left = math.ceil(math.log2(alive))
        return step < total and step >= total / 2 ** min(left, halvings)

    def _decide(self, cohort: Sequence[Trial], waiting: Sequence[Trial]) -> None:
        steps = {self._asked[trial.number][0] for trial in waiting}
        pending = any(trial.status in ("pending", "busy") for trial in cohort)
        dropped: dict[str, str] = {}
        if len(steps) == 1 and not pending:  # else a stack broke up: what goes on alone goes on to its end
            dropped = self._worse_half(cohort, steps.pop())
        for trial in waiting:
            _, answer = self._asked.pop(trial.number)
            reason = dropped.get(configuration_of(trial.config))
            answer(None if reason is None else ("pruned", reason))

    def _worse_half(self, cohort: Sequence[Trial], step: int) -> dict[str, str]:
        """Why each configuration of the worse half leaves."""
        means: dict[str, float] = {}
        for name, trials in self._alive(cohort).items():
            values = [validations(t.run.directory, self.monitor).get(step) for t in trials]
            known = [value for value in values if value is not None and math.isfinite(value)]
            means[name] = math.fsum(known) / len(known) if known else self.sign * math.inf
        order = sorted(means, key=lambda name: self.sign * means[name])
        stay = math.ceil(len(order) / 2)
        return {
            name: f"sweep.halving: {self.monitor} {means[name]:.4f} at step {step}, place {place + 1} of {len(order)}; "
            f"the best {stay} go on"
            for place, name in enumerate(order)
            if place >= stay
        }


def cohorts_of(trials: Sequence[Trial], lanes: Callable[[Trial], int]) -> list[list[Trial]]:
    """Trials that are stacked together: whole configurations, in their order, as many as fit."""
    groups: dict[Any, dict[str, list[Trial]]] = {}
    for trial in trials:
        if trial.lane is not None:
            groups.setdefault(trial.lane, {}).setdefault(configuration_of(trial.config), []).append(trial)
    found: list[list[Trial]] = []
    for configurations in groups.values():
        current: list[Trial] = []
        for replicates in configurations.values():
            if current and len(current) + len(replicates) > lanes(replicates[0]):
                found.append(current)
                current = []
            current = [*current, *replicates]
        found.append(current)
    return found
