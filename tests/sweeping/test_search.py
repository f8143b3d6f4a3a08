"""A search: its space, its memory, and what a kill leaves of it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from llmft.config import SearchConfig, TrainConfig
from llmft.console import Screen
from llmft.errors import ConfigError
from llmft.runs import Run, append_line
from llmft.sweeping.candidates import Search, wanted_trials
from llmft.sweeping.progress import SweepProgress
from llmft.sweeping.settings import search_settings
from llmft.sweeping.space import Space, make_space, parse_condition
from llmft.sweeping.study import Study
from llmft.sweeping.trials import Sweep, Trial
from llmft.sweeping.twin import twin_rule
from tests.conftest import compose

STEPS = 4


def space_of(*overrides: str, **conditions: str) -> Space:
    named = {key.replace("__", "."): text for key, text in conditions.items()}
    return make_space(OverridesParser.create().parse_overrides(list(overrides)), named)


RANK_AND_RATE = ("lora.r=choice(1,4,8)", "learning_rate.peak=tag(log,interval(1e-5,1e-2))")


# ---------------------------------------------------------------------------------------------------- the space


@pytest.mark.parametrize(
    ("override", "values"),
    [
        ("lora.r=1,4,8", ["1", "4", "8"]),
        ("lora.r=choice(8,1,8)", ["8", "1"]),
        ("lora.r=range(1,8,2)", [1, 3, 5, 7]),
        ("lora.r=int(interval(2,5))", [2, 3, 4, 5]),
        ("lora.dropout=range(0,0.3,0.1)", [0.0, 0.1, 0.2]),
        ("learning_rate.peak=interval(1e-4,1e-2)", None),
    ],
)
def test_a_range_holds_what_hydra_says_it_holds(override: str, values: list[Any] | None) -> None:
    (parameter,) = space_of(override).parameters
    found = parameter.values()
    assert found == (None if values is None else pytest.approx(values) if isinstance(values[0], float) else values)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("lora.r=interval(8,1)", "first number must be below"),
        ("lora.r=tag(log,interval(0,1))", "begins above 0"),
        ("lora.r=range(5,5)", "no number lies"),
        ("lora.r=tag(log,choice(1,2))", "log is for a range"),
        ("lora.r=tag(ln,interval(1,2))", "tag ln means nothing"),
        ("lora.r=8", "nothing to vary"),
    ],
)
def test_a_range_that_makes_no_sense_is_refused(override: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        space_of(override)


@pytest.mark.parametrize(
    ("text", "value", "holds"),
    [
        ("lora.r in [8,16]", "8", True),
        ("lora.r in [8,16]", 4, False),
        ("lora.r not in [8, 16]", 4, True),
        ("lora.r == 8.0", "8", True),
        ("lora.r >= 8", 7, False),
        ("lora.r > 7 and lora.r <= 8", 8, True),
        ("lora.r != sgd", "adamw", True),
    ],
)
def test_a_condition_compares_numbers_as_numbers_and_words_as_words(text: str, value: Any, holds: bool) -> None:
    assert all(clause.holds(value) for clause in parse_condition("x", text)) is holds


@pytest.mark.parametrize("text", ["lora.r", "lora.r in 8", "lora.r == [8]", "lora.r < a", "__import__('os')", ""])
def test_what_is_no_condition_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"hydra\.sweeper\.conditions\.x: .* is no condition"):
        parse_condition("x", text)


def test_a_conditional_parameter_exists_only_under_its_condition() -> None:
    space = space_of("lora.dropout=0.0,0.1", "lora.r=1,8", lora__dropout="lora.r == 8")
    points = [space.overrides(point) for point in space.combinations()]
    assert points == [["lora.r=1"], ["lora.r=8", "lora.dropout=0.0"], ["lora.r=8", "lora.dropout=0.1"]]


def test_conditions_that_nothing_meets_or_that_form_a_circle_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"lora\.dropout never exists"):
        space_of("lora.dropout=0.0,0.1", "lora.r=1,8", lora__dropout="lora.r == 16")
    with pytest.raises(ConfigError, match="in a circle"):
        space_of("lora.dropout=0.0,0.1", "lora.r=1,8", lora__dropout="lora.r == 1", lora__r="lora.dropout == 0.0")
    with pytest.raises(ConfigError, match=r"did you mean lora\.r\?"):
        space_of("lora.dropout=0.0,0.1", "lora.r=1,8", lora__dropout="lora.rr == 1")


def test_the_points_to_check_take_every_choice_and_both_ends() -> None:
    space = space_of(
        "model=tiny,gpt2", "lora.alpha=interval(1,64)", "lora.dropout=0.0,0.5", lora__dropout="lora.alpha > 30"
    )
    seen = {override for point in space.probes() for override in space.overrides(point)}
    assert seen >= {"model=tiny", "model=gpt2", "lora.alpha=1", "lora.alpha=64", "lora.dropout=0.0", "lora.dropout=0.5"}
    for point in space.probes():
        assert ("lora.dropout" in point) == (point["lora.alpha"] > 30)


# ---------------------------------------------------------------------------------------------------- the settings


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("sampler", "tpee", "did you mean tpe?"),
        ("pruner", "medain", "did you mean median?"),
        ("n_trial", 5, "did you mean hydra.sweeper.n_trials?"),
        ("n_trials", 0, "1 or more"),
        ("n_trials", "many", "could not be converted"),
        ("seeds", [1, 1], "different numbers"),
        ("reduction_factor", 1, "2 or more"),
    ],
)
def test_a_wrong_setting_is_answered_with_its_key(key: str, value: Any, told: str) -> None:
    known = key if key != "n_trial" else "n_trials"
    told = told.replace("hydra.sweeper.", "")
    with pytest.raises(ConfigError) as error:
        search_settings({"sampler": "tpe", key: value})
    assert str(error.value).startswith(f"hydra.sweeper.{key}")
    assert told in str(error.value).replace("hydra.sweeper.", "")
    assert known in SearchConfig.__dataclass_fields__


def test_a_grid_over_a_range_without_steps_is_refused() -> None:
    with pytest.raises(ConfigError, match="a grid needs values"):
        wanted_trials(SearchConfig(sampler="grid"), space_of(*RANK_AND_RATE))


# ---------------------------------------------------------------------------------------------------- the search


class Killed(BaseException):
    """What SIGKILL is to a process."""


class World:
    """Runs and a study in a directory; trains by a formula, and dies at the given moment.

    `clock` counts the moments at which a kill could fall: before and after every write.
    """

    def __init__(self, root: Path, config: TrainConfig, settings: SearchConfig, space: Space) -> None:
        self.root, self.config, self.settings, self.space = root, config, settings, space
        self.clock, self.dies_at = 0, math.inf
        self.trained: list[str] = []
        self.fails: Callable[[str], bool] = lambda told: False

    def tick(self) -> None:
        self.clock += 1
        if self.clock == self.dies_at:
            raise Killed

    def trial(self, number: int, chosen: dict[str, Any], seed: int | None) -> Trial:
        overrides = self.space.overrides(chosen) + ([] if seed is None else [f"seed={seed}"])
        key = hashlib.sha256(" ".join(overrides).encode()).hexdigest()[:10]
        return Trial(number, overrides, overrides, self.config, key, Run(self.root / "runs" / key, key))

    def loss(self, trial: Trial, step: int) -> float:
        values = dict(override.split("=") for override in trial.overrides)
        rate = float(values.get("learning_rate.peak", 1e-3))
        final = abs(math.log10(rate) + 3) + 1 / int(values.get("lora.r", 1)) + 0.01 * int(values.get("seed", 0))
        return final + 1 / step

    def train(self, search: Search, trial: Trial) -> None:
        """As a worker and the supervisor do it together."""
        run, monitor = trial.run, self.config.trainer.monitor
        run.directory.mkdir(parents=True, exist_ok=True)
        lines = run.metrics_file.read_text().splitlines() if run.metrics_file.is_file() else []
        done = len(lines)
        if self.fails(trial.label):
            trial.mark("failed", "no luck", "error")
            return
        for step in range(max(done, 1), STEPS + 1):
            metrics = {monitor: self.loss(trial, step)}
            if step > done:
                self.tick()
                append_line(run.metrics_file, {"step": step, **metrics})
                self.trained.append(f"{trial.label} {step}")
            self.tick()
            verdict = search.decide(trial, step, metrics)
            self.tick()
            if verdict is not None and step < STEPS:
                run.update(status=verdict[0], error=verdict[1])
                trial.mark(*verdict)
                return
        value = self.loss(trial, STEPS)
        run.update(status="done", handed_over={}, result={"after": {monitor: value}, "seconds": 0.1})
        trial.mark("done", None)
        trial.value = value

    def search(self) -> Search:
        self.root.mkdir(exist_ok=True)
        study = Study(self.root / "study.db", self.settings, self.space, "minimize")
        sample = self.trial(0, {}, None)
        sweep = Sweep(self.root, "x", [], {}, "command", sample=sample)
        progress = SweepProgress(Screen(quiet=True), 0, enabled=False)
        search = Search(study, self.settings, sweep, progress, self.trial, twin_rule(self.config))
        search.recall()
        return search

    def go(self, dies_at: float = math.inf) -> Search:
        self.clock, self.dies_at = 0, dies_at
        search = self.search()
        while not search.over():
            trial = search.next()
            assert trial is not None
            self.tick()
            if not trial.finished_before():
                self.train(search, trial)
            self.tick()
            search.ended(trial)
            self.tick()
        return search


@pytest.fixture(scope="module")
def config() -> TrainConfig:
    return compose("logger=none")


def world(root: Path, config: TrainConfig, *overrides: str, **settings: Any) -> World:
    return World(root, config, SearchConfig(**settings), space_of(*(overrides or RANK_AND_RATE)))


def history(search: Search) -> list[Any]:
    """All that a study holds of its trials."""
    return [(t.number, t.state.name, t.params, t.value, t.intermediate_values) for t in search.study.trials]


@pytest.mark.parametrize(
    "settings",
    [
        {"sampler": "tpe", "startup_trials": 3, "n_trials": 5},
        {"sampler": "tpe", "startup_trials": 3, "n_trials": 5, "pruner": "median", "pruner_startup_trials": 1},
        {"sampler": "tpe", "startup_trials": 3, "n_trials": 5, "pruner": "hyperband"},
        {"sampler": "random", "n_trials": 3, "pruner": "successive_halving", "seeds": [0, 1]},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
@pytest.mark.slow
def test_killed_at_every_moment_a_search_ends_as_if_it_had_not_been(
    settings: dict[str, Any], tmp_path: Path, config: TrainConfig
) -> None:
    whole = world(tmp_path / "whole", config, **settings)
    expected = history(whole.go())
    for moment in range(1, whole.clock + 1):
        killed = world(tmp_path / f"killed{moment}", config, **settings)
        with pytest.raises(Killed):
            killed.go(dies_at=moment)
        assert history(killed.go()) == expected, moment
        assert killed.trained == whole.trained, moment
