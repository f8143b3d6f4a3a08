"""The search space: parameters, their ranges and conditions."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from llmft.config.sweep import SearchConfig
from llmft.core.errors import ConfigError, did_you_mean
from llmft.sweeps.conditions import Clause, Value, number_of, parse_condition

DEFAULT_TRIALS = 20
MOST_COMBINATIONS = 10_000
"""A larger grid is taken for a mistake."""


@dataclass(frozen=True)
class Parameter:
    """A varied key: over `choices`, or from `low` to `high`, inclusive.

    Attributes:
        spelled: the key as written in the override, including a leading `+`.
        text: the range as written.
        step: the distance between values; None for a continuous range.
        log: sampled on a logarithmic scale.
    """

    spelled: str
    text: str
    choices: tuple[str, ...] = ()
    low: float = 0.0
    high: float = 0.0
    step: float | None = None
    integer: bool = False
    log: bool = False
    condition: tuple[Clause, ...] = ()

    @property
    def key(self) -> str:
        return self.spelled.lstrip("+")

    def override(self, value: Value) -> str:
        """The override that sets `value`; floats are written with six significant digits."""
        shown = f"{value:.6g}" if isinstance(value, float) else str(value)
        return f"{self.spelled}={shown}"

    def values(self) -> list[Value] | None:
        """All values in order; None for a continuous range."""
        if self.choices:
            return list(self.choices)
        if self.step is None:
            return None
        count = round((self.high - self.low) / self.step) + 1
        numbers = [self.low + index * self.step for index in range(count)]
        return [round(value) for value in numbers] if self.integer else list(numbers)

    def probes(self) -> list[Value]:
        """The values to check before a search starts: every choice, or both bounds."""
        ends: list[Value] = [self.low, self.high] if not self.integer else [round(self.low), round(self.high)]
        return list(self.choices) or ends

    def suggest(self, trial: Any) -> Value:
        """Asks Optuna's `trial` for a value."""
        if self.choices:
            return trial.suggest_categorical(self.key, self.choices)
        if self.integer:
            step = round(self.step or 1)
            return trial.suggest_int(self.key, round(self.low), round(self.high), log=self.log, step=step)
        return trial.suggest_float(self.key, self.low, self.high, log=self.log, step=self.step)

    def distribution(self) -> Any:
        """The parameter as an Optuna distribution."""
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        if self.choices:
            return CategoricalDistribution(self.choices)
        if self.integer:
            return IntDistribution(round(self.low), round(self.high), log=self.log, step=round(self.step or 1))
        return FloatDistribution(self.low, self.high, log=self.log, step=self.step)


@dataclass
class Space:
    """The varied parameters, each after those in its condition, and the overrides common to all trials."""

    parameters: list[Parameter]
    fixed: list[str] = field(default_factory=list)

    @property
    def known(self) -> dict[str, Value]:
        """The values set by the fixed overrides."""
        return {key.lstrip("+"): value for key, _, value in (override.partition("=") for override in self.fixed)}

    def overrides(self, chosen: Mapping[str, Value]) -> list[str]:
        """The overrides of a point, without the fixed ones."""
        return [parameter.override(chosen[parameter.key]) for parameter in self.parameters if parameter.key in chosen]

    def active(self, parameter: Parameter, chosen: Mapping[str, Value]) -> bool:
        """Whether `parameter` is active given the values chosen so far."""
        values = {**self.known, **chosen}
        return all(
            clause.key in values and clause.is_satisfied_by(values[clause.key]) for clause in parameter.condition
        )

    def probes(self) -> list[dict[str, Value]]:
        """Points that together cover every choice and both bounds of every range.

        Raises ConfigError for a parameter whose condition cannot be satisfied.
        """
        points: list[dict[str, Value]] = []
        for parameter in self.parameters:
            for value in parameter.probes():
                point = self._point({**self._condition_met(parameter), parameter.key: value})
                if point not in points:
                    points.append(point)
        return points

    def _point(self, wanted: Mapping[str, Value]) -> dict[str, Value]:
        point: dict[str, Value] = {}
        for parameter in self.parameters:
            if self.active(parameter, point):
                point[parameter.key] = wanted.get(parameter.key, parameter.probes()[0])
        return point

    def _condition_met(self, parameter: Parameter) -> dict[str, Value]:
        """Values of other parameters for which `parameter` is active."""
        met: dict[str, Value] = {}
        for key in {clause.key: None for clause in parameter.condition}:
            clauses = [clause for clause in parameter.condition if clause.key == key]
            parent = next((p for p in self.parameters if p.key == key), None)
            offered = [self.known[key]] if parent is None else [*parent.probes(), *(parent.values() or [])]
            offered += [] if parent is None or parent.choices else _inside(parent, clauses)
            value = next((v for v in offered if all(clause.is_satisfied_by(v) for clause in clauses)), None)
            if value is None:
                never = f"{parameter.key} is never active, since no value of {key} satisfies its condition"
                raise ConfigError(f"hydra.sweeper.conditions: {never}; change the condition or the range.")
            if parent is not None:
                met = {**met, **self._condition_met(parent), key: value}
        return met

    def combinations(self) -> Iterator[dict[str, Value]]:
        """Every point of the grid; the last parameter varies fastest.

        Raises ConfigError for a continuous range.
        """
        for parameter in self.parameters:
            if parameter.values() is None:
                advice = "give choices or a range, or take hydra.sweeper.sampler=tpe."
                raise ConfigError(f"{parameter.key}={parameter.text}: a grid needs values; {advice}")
        return self._from(0, {})

    def _from(self, index: int, chosen: dict[str, Value]) -> Iterator[dict[str, Value]]:
        if index == len(self.parameters):
            yield chosen
            return
        parameter = self.parameters[index]
        if not self.active(parameter, chosen):
            yield from self._from(index + 1, chosen)
            return
        for value in parameter.values() or []:
            yield from self._from(index + 1, {**chosen, parameter.key: value})


def wanted_trials(settings: SearchConfig, space: Space) -> tuple[int, list[dict[str, Value]] | None]:
    """(number of configurations to try, the points of a grid in order; None for other samplers).

    Raises ConfigError for a grid over a continuous range, or of too many combinations.
    """
    if settings.sampler not in ("grid", "brute"):
        return settings.n_trials or DEFAULT_TRIALS, None
    points = list(itertools.islice(space.combinations(), MOST_COMBINATIONS + 1))
    limit = settings.n_trials or len(points)
    if len(points) > MOST_COMBINATIONS and settings.n_trials is None:
        advice = f"there are more than {MOST_COMBINATIONS:,} combinations; set it, or choose another sampler."
        raise ConfigError(f"hydra.sweeper.n_trials: {advice}")
    return min(limit, len(points)), points if settings.sampler == "grid" else None


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
    if not parameters:
        raise ConfigError("nothing to vary: give a range, as in learning_rate.peak=interval(1e-4,1e-2).")
    space = Space(_parents_first(parameters), list(fixed.values()))
    space.probes()
    return space


def parameter_of(override: Any) -> Parameter:
    """The parameter given by a parsed override: a,b,c, choice(…), range(…), interval(…) or tag(log, …)."""
    spelled, written = override.get_key_element(), override.input_line.partition("=")[2]
    swept = override.value()
    key, tags = spelled.lstrip("+"), set(getattr(swept, "tags", ()))
    unknown = sorted(tags - {"log"})
    if unknown:
        raise ConfigError(f"{key}={written}: unknown tag {unknown[0]}; the only one is log.")
    log = "log" in tags
    if override.is_choice_sweep():
        if log:
            raise ConfigError(f"{key}={written}: log is for a range or an interval.")
        values = tuple(dict.fromkeys(override.sweep_string_iterator()))
        if not values:
            raise ConfigError(f"{key}={written}: there is no value.")
        return Parameter(spelled, written, choices=values)
    if override.is_range_sweep():
        return _range(spelled, written, swept, log)
    low, high = swept.start, swept.end
    integer = isinstance(low, int) and isinstance(high, int)
    if not low < high:
        raise ConfigError(f"{key}={written}: the first number must be below the second.")
    if log and low <= 0:
        raise ConfigError(f"{key}={written}: a log range starts above 0.")
    step = 1.0 if integer else None
    return Parameter(spelled, written, low=low, high=high, step=step, integer=integer, log=log)


def _range(spelled: str, written: str, swept: Any, log: bool) -> Parameter:
    values = list(swept.range())
    key = spelled.lstrip("+")
    if not values:
        raise ConfigError(f"{key}={written}: the range is empty.")
    if log and (swept.step != 1 or min(values) <= 0):
        raise ConfigError(f"{key}={written}: a log range has step 1 and starts above 0; interval(…) takes any numbers.")
    low, high = min(values), max(values)
    integer = all(isinstance(value, int) for value in values)
    return Parameter(
        spelled, written, low=low, high=high, step=abs(float(swept.step)), integer=integer, log=log and low < high
    )


def _parents_first(parameters: Mapping[str, Parameter]) -> list[Parameter]:
    ordered: list[Parameter] = []
    waiting = list(parameters.values())
    while waiting:
        placed = {parameter.key for parameter in ordered}
        free = [p for p in waiting if all(c.key in placed or c.key not in parameters for c in p.condition)]
        if not free:
            keys = " and ".join(parameter.key for parameter in waiting)
            raise ConfigError(f"hydra.sweeper.conditions: {keys} depend on each other in a cycle.")
        ordered += free
        waiting = [parameter for parameter in waiting if parameter not in free]
    return ordered


def _inside(parent: Parameter, clauses: Sequence[Clause]) -> list[Value]:
    """Numbers within a continuous parent's range: its bounds, those in the clauses, and the midpoints between."""
    named = [number for clause in clauses for text in clause.values if (number := number_of(text)) is not None]
    ends = sorted({parent.low, parent.high, *(n for n in named if parent.low <= n <= parent.high)})
    between = [(a + b) / 2 for a, b in itertools.pairwise(ends)]
    return [*ends, *between]
