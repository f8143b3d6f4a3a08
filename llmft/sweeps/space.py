"""The search space: parameters, their distributions and conditions."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from graphlib import CycleError, TopologicalSorter
from typing import Any

from llmft.config.sweep import SearchConfig
from llmft.core.errors import ConfigError, did_you_mean, first_line
from llmft.sweeps.conditions import Clause, Value, parse_condition

DEFAULT_TRIALS = 20
DRAWS = 10_000
"""A parameter that is active in none of so many random points is taken for a mistake."""


@dataclass(frozen=True)
class Parameter:
    """A varied key.

    Attributes:
        spelled: the key as written in the override, including a leading `+`.
        text: the range as written.
        distribution: Optuna's, categorical over texts, or of integers or floats with both bounds included.
    """

    spelled: str
    text: str
    distribution: Any
    condition: tuple[Clause, ...] = ()

    @property
    def key(self) -> str:
        return self.spelled.lstrip("+")

    def override(self, value: Value) -> str:
        """The override that sets `value`; floats are written with six significant digits."""
        shown = f"{value:.6g}" if isinstance(value, float) else str(value)
        return f"{self.spelled}={shown}"

    def values(self) -> list[Value]:
        """All values in order; none for a continuous range."""
        over = self.distribution
        if hasattr(over, "choices"):
            return list(over.choices)
        count = 0 if over.step is None else round((over.high - over.low) / over.step) + 1
        return [over.low + index * over.step for index in range(count)]

    def probes(self) -> list[Value]:
        """The values to check before a search starts: every choice, or both bounds."""
        over = self.distribution
        return list(over.choices) if hasattr(over, "choices") else [over.low, over.high]


@dataclass
class Space:
    """The varied parameters, each after those in its condition, and the overrides common to all trials."""

    parameters: list[Parameter]
    fixed: list[str] = field(default_factory=list)

    def overrides(self, point: Mapping[str, Value]) -> list[str]:
        """The overrides of the active values of a point, without the fixed ones."""
        active = self.active(point)
        return [parameter.override(active[parameter.key]) for parameter in self.parameters if parameter.key in active]

    def active(self, point: Mapping[str, Value]) -> dict[str, Value]:
        """The values of a point whose conditions hold, given the fixed overrides and the other active values."""
        fixed = (override.lstrip("+").partition("=") for override in self.fixed)
        values: dict[str, Value] = {key: value for key, _, value in fixed}
        for parameter in self.parameters:
            holds = all(c.key in values and c.is_satisfied_by(values[c.key]) for c in parameter.condition)
            if holds and parameter.key in point:
                values[parameter.key] = point[parameter.key]
        return {parameter.key: values[parameter.key] for parameter in self.parameters if parameter.key in values}

    def probes(self) -> list[dict[str, Value]]:
        """Points that together cover every choice and both bounds of every range.

        Raises ConfigError for a parameter whose condition cannot be satisfied.
        """
        points: list[dict[str, Value]] = []
        for parameter in self.parameters:
            for value in parameter.probes():
                candidates = (self.active({**draw, parameter.key: value}) for draw in self._draws())
                point = next((candidate for candidate in candidates if parameter.key in candidate), None)
                if point is None:
                    never = f"{parameter.key} is never active; change its condition or the range in it."
                    raise ConfigError(f"hydra.sweeper.conditions: {never}")
                if point not in points:
                    points.append(point)
        return points

    def _draws(self) -> Iterator[dict[str, Value]]:
        """The point of all first values, then random ones."""
        yield {parameter.key: parameter.probes()[0] for parameter in self.parameters}
        rng = random.Random(0)
        options = [(p.key, p.values(), p.distribution) for p in self.parameters]
        for _ in range(DRAWS):
            yield {key: rng.choice(vs) if vs else rng.uniform(over.low, over.high) for key, vs, over in options}

    def combinations(self) -> Iterator[dict[str, Value]]:
        """Every point of the grid once, its active values; the last parameter varies fastest.

        Raises ConfigError for a continuous range.
        """
        for parameter in self.parameters:
            if not parameter.values():
                advice = "give choices or a range, or take hydra.sweeper.sampler=tpe."
                raise ConfigError(f"{parameter.key}={parameter.text}: a grid needs values; {advice}")
        keys, seen = [parameter.key for parameter in self.parameters], set()
        for values in itertools.product(*(parameter.values() for parameter in self.parameters)):
            point = self.active(dict(zip(keys, values, strict=True)))
            if (items := tuple(point.items())) not in seen:
                seen.add(items)
                yield point


def wanted_trials(settings: SearchConfig, space: Space) -> tuple[int, list[dict[str, Value]] | None]:
    """(number of configurations to try, the points of a grid in order; None for other samplers).

    Raises ConfigError for a grid over a continuous range.
    """
    if settings.sampler != "grid":
        return settings.n_trials or DEFAULT_TRIALS, None
    points = list(itertools.islice(space.combinations(), settings.n_trials))
    return len(points), points


def make_space(overrides: Sequence[Any], conditions: Mapping[str, Any]) -> Space:
    """The space given by Hydra's parsed overrides; later overrides of a key replace earlier ones.

    Raises ConfigError for an invalid range or condition.
    """
    parameters: dict[str, Parameter] = {}
    fixed: dict[str, str] = {}
    for override in overrides:
        spelled = override.get_key_element()
        key = spelled.lstrip("+")
        parameters.pop(key, None)
        fixed.pop(key, None)
        if override.is_sweep_override():
            parameters[key] = parameter_of(override)
        else:
            fixed[key] = f"{spelled}={override.get_value_element_as_str()}"
    parents: dict[str, list[str]] = {key: [] for key in parameters}
    for key, text in conditions.items():
        if key not in parameters:
            if key in fixed:
                continue  # fixed on the command line
            raise ConfigError(f"hydra.sweeper.conditions: {key} is not varied{did_you_mean(key, parameters)}")
        clauses = parse_condition(key, str(text))
        for clause in clauses:
            if clause.key not in parameters and clause.key not in fixed:
                others = [name for name in (*parameters, *fixed) if name != key]
                depends = f"{key} depends on {clause.key}, which has no value{did_you_mean(clause.key, others)}"
                raise ConfigError(f"hydra.sweeper.conditions: {depends}")
        parameters[key] = replace(parameters[key], condition=clauses)
        parents[key] = [clause.key for clause in clauses if clause.key in parameters]
    if not parameters:
        raise ConfigError("nothing to vary: give a range, as in learning_rate.peak=interval(1e-4,1e-2).")
    try:
        ordered = [parameters[key] for key in TopologicalSorter(parents).static_order()]
    except CycleError as error:
        keys = " and ".join(dict.fromkeys(error.args[1]))
        raise ConfigError(f"hydra.sweeper.conditions: {keys} depend on each other in a cycle.") from None
    space = Space(ordered, list(fixed.values()))
    space.probes()
    return space


def parameter_of(override: Any) -> Parameter:
    """The parameter given by a parsed override: a,b,c, choice(…), range(…), interval(…) or tag(log, …)."""
    spelled, written = override.get_key_element(), override.input_line.partition("=")[2]
    try:
        return Parameter(spelled, written, _distribution(override))
    except ValueError as error:
        raise ConfigError(f"{spelled.lstrip('+')}={written}: {first_line(error)}") from None


def _distribution(override: Any) -> Any:
    """The Optuna distribution of a parsed override; raises ValueError for an invalid one."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    swept = override.value()
    tags = set(getattr(swept, "tags", ()))
    log = "log" in tags
    if unknown := sorted(tags - {"log"}):
        raise ValueError(f"unknown tag {unknown[0]}; the only one is log.")
    if override.is_choice_sweep():
        if log:
            raise ValueError("log is for a range or an interval.")
        return CategoricalDistribution(tuple(dict.fromkeys(override.sweep_string_iterator())))
    if override.is_range_sweep():
        values = list(swept.range())
        if not values:
            raise ValueError("the range is empty.")
        low, high, step = min(values), max(values), abs(swept.step)
    else:
        low, high, step = swept.start, swept.end, None
    if isinstance(low, int) and isinstance(high, int):
        return IntDistribution(low, high, log=log, step=step or 1)
    return FloatDistribution(low, high, log=log, step=step)
