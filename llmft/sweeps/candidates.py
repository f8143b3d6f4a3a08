"""A configuration that a search suggested, and how many it is to suggest."""

from __future__ import annotations

import itertools
import math
import statistics
from dataclasses import dataclass, field

from llmft.config.sweep import SearchConfig
from llmft.core.errors import ConfigError
from llmft.sweeps.conditions import Value
from llmft.sweeps.space import MOST_COMBINATIONS, Space
from llmft.sweeps.trials import Trial
from llmft.sweeps.twin import validations

DEFAULT_TRIALS = 20


@dataclass
class Candidate:
    """A configuration that was suggested: one trial for each of its seeds.

    Attributes:
        number: of its trial in the study.
        index: which of the configurations asked for it is; one that is tried again keeps it.
        waiting: trials to run; emptied by one that fails or is pruned.
        curve: the monitored metric of the first seed's run by step, which is what a pruner judges.
    """

    number: int
    index: int
    chosen: dict[str, Value]
    trials: list[Trial]
    waiting: list[Trial] = field(default_factory=list)
    under_way: list[Trial] = field(default_factory=list)
    curve: dict[int, float] = field(default_factory=dict)

    @property
    def first(self) -> Trial:
        """The trial that a pruner judges."""
        return self.trials[0]

    @property
    def value(self) -> float | None:
        """The mean over the seeds, None unless all have a finite value."""
        values = [trial.value for trial in self.trials if trial.status == "done"]
        if len(values) < len(self.trials) or any(v is None or not math.isfinite(v) for v in values):
            return None
        return statistics.fmean(value for value in values if value is not None)

    @property
    def keys(self) -> list[str]:
        """The runs that it is."""
        return [trial.key for trial in self.trials]

    def read_curve(self) -> None:
        """Takes the first seed's validations from its run, whoever trained it."""
        self.curve = validations(self.first.run.directory, self.first.config.trainer.monitor)


def wanted_trials(settings: SearchConfig, space: Space) -> tuple[int, list[dict[str, Value]] | None]:
    """(number of configurations to try, those of a grid in order).

    Raises ConfigError for a grid over a range without steps, or over too many combinations.
    """
    if settings.sampler not in ("grid", "brute"):
        return settings.n_trials or DEFAULT_TRIALS, None
    points = list(itertools.islice(space.combinations(), MOST_COMBINATIONS + 1))
    limit = settings.n_trials or len(points)
    if len(points) > MOST_COMBINATIONS and settings.n_trials is None:
        raise ConfigError(f"hydra.sweeper.n_trials: set it; there are more than {MOST_COMBINATIONS:,} combinations.")
    return min(limit, len(points)), points if settings.sampler == "grid" else None
