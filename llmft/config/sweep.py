"""The group sweep of a training, and hydra.sweeper: how trials run, and how a search finds them."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

from llmft.config.convert import from_plain
from llmft.config.fields import is_count, require, require_each, seconds_of
from llmft.core.errors import ConfigError, did_you_mean


@dataclass
class RayConfig:
    """Trials on other machines: `hydra/launcher=ray` asks for a cluster."""

    address: str | None = None
    gpus_per_worker: float | None = None
    shared_files: bool | None = None
    retries: int = 2

    def __post_init__(self) -> None:
        require_each(self, "sweep.ray.", "gpus_per_worker", lambda x: x >= 0, "0 or more, or null.")
        require_each(self, "sweep.ray.", "retries", lambda n: n >= 0, "0 or more.")


@dataclass
class SweepConfig:
    """How the trials of a multirun run and what they should answer; no part of any run's key."""

    name: str | None = None
    question: str | None = None
    workers: Any = "auto"
    time_limit: str | None = None
    heartbeat_timeout: str | None = "1h"
    stop_after_same_error: int | None = 3
    early_stop_if_same_as: str | None = None
    early_stop_noise: float | None = None
    looks: Any = None
    seeds_until: int | None = None
    smallest_difference: float | None = None
    report: bool = True
    ray: RayConfig = field(default_factory=RayConfig)

    @property
    def declared_looks(self) -> Any:
        """How often the results are looked at: `looks`, by default once, or five times if seeds are added."""
        return self.looks if self.looks is not None else 5 if self.seeds_until else 1

    def __post_init__(self) -> None:
        for key in ("time_limit", "heartbeat_timeout"):
            if (value := getattr(self, key)) is not None:
                seconds_of(value, f"sweep.{key}")
        check = partial(require_each, self, "sweep.")
        require(is_count(self.workers) or self.workers == "auto", f"sweep.workers={self.workers}: 1 or more, or auto.")
        check("looks", lambda value: is_count(value) or value == "any", "1 or more, any, or null.")
        check("stop_after_same_error seeds_until", lambda n: n >= 2, "2 or more, or null.")
        units = "above 0, in units of trainer.monitor, or null."
        check("smallest_difference early_stop_noise", lambda x: x > 0, units)


@dataclass
class SearchConfig:
    """Config of a multirun below hydra.sweeper; errors name keys without that prefix.

    Attributes:
        sampler: the search algorithm; None: no search, all combinations.
        n_trials: number of configurations; None: 20, or all of a grid.
        seed: seed of the search.
        seeds: seeds with which each configuration is trained; its value is their mean.
        startup_trials: random configurations before TPE or GP begin.
        pruner_startup_trials: complete trials before the median pruner begins.
        min_validations: number of the first validation at which a trial may be pruned (0 is before training).
        max_validations: validations of a full run, for Hyperband; None: as many as the longest complete trial had.
        reduction_factor: at each rung of successive halving, one trial in this many continues.
        params: ranges by key; the command line takes precedence.
        conditions: parameters that exist only under a condition on others.
    """

    sampler: str | None = None
    pruner: str = "none"
    n_trials: int | None = None
    seed: int = 0
    seeds: list[int] | None = None
    startup_trials: int = 10
    pruner_startup_trials: int = 5
    min_validations: int = 1
    max_validations: int | None = None
    reduction_factor: int = 3
    params: dict[str, Any] | None = None
    conditions: dict[str, str] | None = None

    def __post_init__(self) -> None:
        samplers = ("tpe", "random", "grid", "brute", "gp")
        pruners = ("none", "median", "successive_halving", "hyperband")
        for key, known in (("sampler", samplers), ("pruner", pruners)):
            value = getattr(self, key)
            require(value is None or value in known, f"{key}={value}: no such {key}{did_you_mean(str(value), known)}")
        check = partial(require_each, self, "")
        check("n_trials startup_trials min_validations", lambda n: n >= 1, "1 or more.")
        check("reduction_factor", lambda n: n >= 2, "2 or more.")
        check("seed pruner_startup_trials", lambda n: n >= 0, "0 or more.")
        least = f"min_validations={self.min_validations} or more, or null."
        check("max_validations", lambda n: n >= self.min_validations, least)
        different = "different numbers, as in [0,1,2], or null."
        check("seeds", lambda seeds: 1 <= len(seeds) == len(set(seeds)), different)


def search_settings(plain: dict[str, Any]) -> SearchConfig:
    """The settings below hydra.sweeper.

    Raises ConfigError naming the key of a wrong one, or of one for a search if there is no search.
    """
    try:
        settings: SearchConfig = from_plain(plain, SearchConfig)
    except ConfigError as error:
        raise ConfigError(f"hydra.sweeper.{error}") from None
    for key, default in vars(SearchConfig()).items() if settings.sampler is None else ():
        if key != "params" and getattr(settings, key) != default:
            raise ConfigError(f"hydra.sweeper.{key}: only a search has it; add hydra.sweeper.sampler=tpe.")
    return settings
