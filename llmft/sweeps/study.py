"""Optuna's study of a search, stored in a file that survives a kill.

The search works on a study in memory and writes each change to SQLite in one transaction: a suggestion is in the file
with all its values or not at all. Optuna's journal file was tried instead: after a kill during a write the next start
waits 30 s for its lock and then fails with a JSONDecodeError on the incomplete line. Optuna's own heartbeat for dead
trials works inside `study.optimize` only.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmft.config.sweep import SearchConfig
from llmft.core.errors import ConfigError, first_line
from llmft.sweeps.conditions import Value
from llmft.sweeps.space import Space

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

NAME = "search"
"""Of the study in the file; Hyperband derives the bracket of a trial from it."""


def import_optuna() -> Any:
    """Optuna with its log messages turned off; raises ConfigError if it is not installed."""
    try:
        import optuna
    except ImportError:
        raise ConfigError('hydra.sweeper.sampler needs Optuna: pip install "llmft[search]".') from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    logging.getLogger("alembic").setLevel(logging.ERROR)
    return optuna


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Suppresses the warning that Optuna gives for each "experimental" sampler or pruner."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=import_optuna().exceptions.ExperimentalWarning)
        yield


class OptunaStudy:
    """The trials of a search: `ask` suggests one, `judge` prunes after validations, `tell` stores its result.

    A new sampler is created for each suggestion, seeded by the number of the trial. The suggestion depends only on
    earlier trials, so a resumed search suggests the same values as an uninterrupted one.
    """

    def __init__(self, file: Path, settings: SearchConfig, space: Space, direction: str) -> None:
        optuna = import_optuna()
        self.settings = settings
        self.space = space
        self.distributions = {parameter.key: parameter.distribution() for parameter in space.parameters}
        try:
            on_disk = optuna.storages.RDBStorage(f"sqlite:///{file.resolve()}")
            self._file = optuna.create_study(storage=on_disk, study_name=NAME, direction=direction, load_if_exists=True)
            before = self._file.get_trials()
        except Exception as error:
            if not type(error).__module__.startswith(("optuna", "sqlalchemy", "sqlite3", "alembic")):
                raise
            reason = first_line(error)
            raise ConfigError(
                f"{file}: the study cannot be read ({reason}); move it away to start a new one, which trains no "
                "finished trial again."
            ) from None
        memory = optuna.storages.InMemoryStorage()
        self._in_memory = optuna.create_study(storage=memory, study_name=NAME, direction=direction)
        self._storages = [(storage, storage.get_study_id_from_name(NAME)) for storage in (memory, on_disk)]
        for trial in before:
            trial.system_attrs.update(trial.user_attrs.get("judged", {}).get("rungs", {}))
            self._in_memory.add_trial(trial)

    @property
    def trials(self) -> list[FrozenTrial]:
        """All trials, by number."""
        return self._in_memory.get_trials(deepcopy=False)

    def ask(self, index: int) -> tuple[int, dict[str, Value]]:
        """(number, values) of a new trial, for the configuration `index`."""
        number = len(self.trials)
        self._in_memory.sampler = make_sampler(self.settings, self.space, number)
        self._in_memory.pruner = make_pruner(self.settings)
        trial = self._in_memory.ask()
        assert trial.number == number
        chosen: dict[str, Value] = {}
        for parameter in self.space.parameters:
            if self.space.active(parameter, chosen):
                chosen[parameter.key] = parameter.suggest(trial)
        trial.set_user_attr("place", index)
        self._file.add_trial(self.trials[number])
        return number, chosen

    def put(self, values: Mapping[str, Value], attributes: Mapping[str, Any]) -> int:
        """Adds a trial of given values; returns its number."""
        optuna = import_optuna()
        trial = optuna.trial.create_trial(
            state=optuna.trial.TrialState.RUNNING,
            params=dict(values),
            distributions={key: self.distributions[key] for key in values},
            user_attrs=dict(attributes),
        )
        for study in (self._file, self._in_memory):
            study.add_trial(trial)
        return len(self.trials) - 1

    def judge(self, number: int, curve: Mapping[int, float], step: int) -> bool:
        """Stores the validations of `curve` up to `step`; returns whether the trial should end there.

        Pruners count in validations, from 1. The decision for a step is stored and never changes.
        """
        steps = [known for known in sorted(curve) if known <= step]
        for index, validated in enumerate(steps, start=1):
            if index not in self.trials[number].intermediate_values:
                for storage, identity in self._stored(number):
                    storage.set_trial_intermediate_value(identity, index, curve[validated])
        if self.settings.pruner == "none":
            return False
        judged = self.trials[number].user_attrs.get("judged", {"step": -1, "ends": False})
        if step <= judged["step"]:
            return bool(judged["ends"] and step == judged["step"])
        ends = bool(make_pruner(self.settings).prune(self._in_memory, self.trials[number]))
        rungs = {k: v for k, v in self.trials[number].system_attrs.items() if k.startswith("completed_rung_")}
        # The decision and the pruner's state in one transaction: one without the other would change later decisions.
        self._note(number, {"judged": {"step": step, "ends": ends, "rungs": rungs}})
        return ends

    def tell(self, number: int, state: str, value: float | None, attributes: Mapping[str, Any]) -> None:
        """Ends a trial: COMPLETE with a value, PRUNED or FAIL without."""
        optuna = import_optuna()
        self._note(number, attributes)
        for storage, identity in self._stored(number):
            storage.set_trial_state_values(identity, optuna.trial.TrialState[state], None if value is None else [value])

    def _note(self, number: int, attributes: Mapping[str, Any]) -> None:
        for storage, identity in self._stored(number):
            for name, value in attributes.items():
                storage.set_trial_user_attr(identity, name, value)

    def _stored(self, number: int) -> list[tuple[Any, int]]:
        """(storage, the trial's id in it) in memory and in the file."""
        return [(s, s.get_trial_id_from_study_id_trial_number(study, number)) for s, study in self._storages]


@_without_warnings()
def make_sampler(settings: SearchConfig, space: Space, number: int) -> Any:
    """The sampler that suggests trial `number`."""
    samplers = import_optuna().samplers
    digest = hashlib.sha256(f"{settings.seed}/{number}".encode()).digest()
    seed = int.from_bytes(digest[:4], "big")
    if settings.sampler == "random":
        return samplers.RandomSampler(seed=seed)
    if settings.sampler == "brute":
        return samplers.BruteForceSampler(seed=seed)
    if settings.sampler == "gp":
        # Training a configuration again gives the same value, and seeds are averaged: the objective has no noise.
        return samplers.GPSampler(
            seed=seed,
            n_startup_trials=settings.startup_trials,
            deterministic_objective=True,
            independent_sampler=samplers.RandomSampler(seed=seed),
            warn_independent_sampling=False,
        )
    conditional = any(parameter.condition for parameter in space.parameters)
    return samplers.TPESampler(
        seed=seed, n_startup_trials=settings.startup_trials, multivariate=True, group=conditional
    )


@_without_warnings()
def make_pruner(settings: SearchConfig) -> Any:
    """The pruner; a new one is created for each decision, since its state is in the study."""
    pruners = import_optuna().pruners
    first = settings.min_validations
    if settings.pruner == "median":
        return pruners.MedianPruner(n_startup_trials=settings.pruner_startup_trials, n_warmup_steps=first)
    if settings.pruner == "successive_halving":
        return pruners.SuccessiveHalvingPruner(min_resource=first, reduction_factor=settings.reduction_factor)
    if settings.pruner == "hyperband":
        return pruners.HyperbandPruner(
            min_resource=first,
            max_resource=settings.max_validations or "auto",
            reduction_factor=settings.reduction_factor,
        )
    return pruners.NopPruner()
