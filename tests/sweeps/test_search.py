"""A search: its space, its memory, and its state after a kill."""

from __future__ import annotations

import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import filelock
import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser

from llmft.config.sections import TrainConfig
from llmft.config.sweep import SearchConfig, search_settings
from llmft.core.console import Screen
from llmft.core.errors import ConfigError
from llmft.metrics.monitor import with_mode
from llmft.runs.directory import Run
from llmft.runs.records import append_line
from llmft.sweeps.conditions import parse_condition
from llmft.sweeps.progress import SweepProgress
from llmft.sweeps.space import Space, make_space, wanted_trials
from llmft.sweeps.study import OptunaStudy, import_optuna
from llmft.sweeps.suggestions import Search
from llmft.sweeps.trials import Sweep, Trial
from tests.conftest import ROOT, SMALL, compose, llmft

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
    listed = parameter.values()
    assert listed == (None if values is None else pytest.approx(values) if isinstance(values[0], float) else values)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lora.r=interval(8,1)", "first number must be below"),
        ("lora.r=tag(log,interval(0,1))", "starts above 0"),
        ("lora.r=range(5,5)", "the range is empty"),
        ("lora.r=tag(log,choice(1,2))", "log is for a range"),
        ("lora.r=tag(ln,interval(1,2))", "unknown tag ln"),
        ("lora.r=8", "nothing to vary"),
    ],
)
def test_a_range_that_makes_no_sense_is_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
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
    assert all(clause.is_satisfied_by(value) for clause in parse_condition("x", text)) is holds


@pytest.mark.parametrize("text", ["lora.r", "lora.r in 8", "lora.r == [8]", "lora.r < a", "__import__('os')", ""])
def test_what_is_no_condition_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"hydra\.sweeper\.conditions\.x: .* is not a condition"):
        parse_condition("x", text)


def test_a_conditional_parameter_exists_only_under_its_condition() -> None:
    space = space_of("lora.dropout=0.0,0.1", "lora.r=1,8", lora__dropout="lora.r == 8")
    points = [space.overrides(point) for point in space.combinations()]
    assert points == [["lora.r=1"], ["lora.r=8", "lora.dropout=0.0"], ["lora.r=8", "lora.dropout=0.1"]]


def test_conditions_that_nothing_meets_or_that_form_a_circle_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"lora\.dropout is never active"):
        space_of("lora.dropout=0.0,0.1", "lora.r=1,8", lora__dropout="lora.r == 16")
    with pytest.raises(ConfigError, match="in a cycle"):
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
    ("key", "value", "message"),
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
def test_a_wrong_setting_is_answered_with_its_key(key: str, value: Any, message: str) -> None:
    known = key if key != "n_trial" else "n_trials"
    message = message.replace("hydra.sweeper.", "")
    with pytest.raises(ConfigError) as error:
        search_settings({"sampler": "tpe", key: value})
    assert str(error.value).startswith(f"hydra.sweeper.{key}")
    assert message in str(error.value).replace("hydra.sweeper.", "")
    assert known in SearchConfig.__dataclass_fields__


def test_a_grid_over_a_range_without_steps_is_refused() -> None:
    with pytest.raises(ConfigError, match="a grid needs values"):
        wanted_trials(SearchConfig(sampler="grid"), space_of(*RANK_AND_RATE))


# ---------------------------------------------------------------------------------------------------- the search


class Killed(BaseException):
    """Stands for SIGKILL."""


class World:
    """Runs and a study in a directory; trains by a formula, and dies at the given moment.

    `clock` counts the moments at which a kill could fall: before and after every write.
    """

    def __init__(self, root: Path, config: TrainConfig, settings: SearchConfig, space: Space) -> None:
        self.root, self.config, self.settings, self.space = root, config, settings, space
        self.clock, self.dies_at = 0, math.inf
        self.trained: list[str] = []
        self.fails: Callable[[str], bool] = lambda label: False

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
        """Trains a trial as a worker and the supervisor would."""
        run, monitor = trial.run, self.config.trainer.monitor
        run.directory.mkdir(parents=True, exist_ok=True)
        lines = run.metrics_file.read_text().splitlines() if run.metrics_file.is_file() else []
        recorded_steps = len(lines)
        if self.fails(trial.label):
            trial.mark("failed", "no luck", "error")
            return
        for step in range(max(recorded_steps, 1), STEPS + 1):
            metrics = {monitor: self.loss(trial, step)}
            if step > recorded_steps:
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
        study = OptunaStudy(self.root / "study.db", self.settings, self.space, "minimize")
        sample = self.trial(0, {}, None)
        sweep = Sweep(self.root, "x", [], {}, "command", sample=sample)
        progress = SweepProgress(Screen(quiet=True), 0, enabled=False)
        search = Search(study, self.settings, sweep, progress, self.trial)
        search.recall()
        return search

    def go(self, dies_at: float = math.inf) -> Search:
        self.clock, self.dies_at = 0, dies_at
        search = self.search()
        while not search.over():
            trial = search.next()
            if trial is None:  # the last suggestions were known
                assert search.over()
                break
            self.tick()
            if not trial.finished_before():
                self.train(search, trial)
            self.tick()
            search.ended(trial)
            self.tick()
        return search


@pytest.fixture(scope="module")
def config() -> TrainConfig:
    return with_mode(compose("logger=none"))


def world(root: Path, config: TrainConfig, *overrides: str, **settings: Any) -> World:
    return World(root, config, SearchConfig(**settings), space_of(*(overrides or RANK_AND_RATE)))


def history(search: Search) -> list[Any]:
    """All that a study stores of its trials."""
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
    uninterrupted = world(tmp_path / "whole", config, **settings)
    expected = history(uninterrupted.go())
    for moment in range(1, uninterrupted.clock + 1):
        killed = world(tmp_path / f"killed{moment}", config, **settings)
        with pytest.raises(Killed):
            killed.go(dies_at=moment)
        assert history(killed.go()) == expected, moment
        assert killed.trained == uninterrupted.trained, moment


@pytest.mark.parametrize("moment", [9, 33])
def test_s7_a_killed_search_repeats_no_suggestion_and_ends_with_as_many_as_asked(
    moment: int, tmp_path: Path, config: TrainConfig
) -> None:
    settings = {"sampler": "tpe", "startup_trials": 2, "n_trials": 4, "pruner": "median", "pruner_startup_trials": 1}
    uninterrupted = history(world(tmp_path / "whole", config, **settings).go())
    killed = world(tmp_path / "killed", config, **settings)
    with pytest.raises(Killed):
        killed.go(dies_at=moment)
    search = killed.go()
    assert history(search) == uninterrupted
    points = [tuple(trial.params.items()) for trial in search.study.trials]
    assert len(set(points)) == len(points) == 4
    assert len(set(killed.trained)) == len(killed.trained)  # no step was trained twice


def test_the_same_search_elsewhere_suggests_the_same_and_a_larger_one_goes_on(
    tmp_path: Path, config: TrainConfig
) -> None:
    one = world(tmp_path / "one", config, sampler="tpe", startup_trials=2, n_trials=5).go()
    other = world(tmp_path / "other", config, sampler="tpe", startup_trials=2, n_trials=3)
    assert history(other.go()) == history(one)[:3]
    other.settings.n_trials = 5
    assert history(other.go()) == history(one)
    assert len(other.trained) == 5 * STEPS


def test_a_suggestion_that_was_tried_before_gets_its_value_without_training(
    tmp_path: Path, config: TrainConfig
) -> None:
    searched = world(tmp_path / "w", config, "lora.r=1,2", sampler="random", n_trials=6)
    search = searched.go()
    assert [trial.state.name for trial in search.study.trials] == ["COMPLETE"] * 6
    assert len(searched.trained) == 2 * STEPS
    assert len(search.sweep.trials) == 2
    assert search.repeated == 4
    assert history(searched.go()) == history(search)


@pytest.mark.parametrize("sampler", ["grid", "brute"])
def test_an_exhaustive_search_takes_every_combination_once(sampler: str, tmp_path: Path, config: TrainConfig) -> None:
    searched = world(tmp_path / "w", config, "lora.r=1,4,8", "seed=0,1", sampler=sampler)
    labels = [trial.label for trial in searched.go().sweep.trials]
    everything = [f"lora.r={rank} seed={seed}" for rank in (1, 4, 8) for seed in (0, 1)]
    assert sorted(labels) == everything
    assert (labels == everything) == (sampler == "grid")


def test_a_configuration_is_worth_the_mean_of_its_seeds(tmp_path: Path, config: TrainConfig) -> None:
    searched = world(tmp_path / "w", config, "lora.r=1,4", sampler="grid", seeds=[0, 3])
    search = searched.go()
    for candidate in search.candidates:
        values = [searched.loss(trial, STEPS) for trial in candidate.trials]
        assert search.study.trials[candidate.number].value == pytest.approx(sum(values) / 2)
    best = search.best()
    assert best is not None
    assert best.chosen == {"lora.r": "4"}
    assert search.sweep.extra["search"]["best"]["value"] == best.value
    assert search.sweep.swept == {"lora.r": ["1", "4"], "seed": ["0", "3"]}


def test_a_configuration_pruned_with_its_first_seed_is_not_trained_with_the_rest(
    tmp_path: Path, config: TrainConfig
) -> None:
    settings: dict[str, Any] = {"sampler": "grid", "seeds": [0, 1], "pruner": "median", "pruner_startup_trials": 1}
    searched = world(tmp_path / "w", config, "lora.r=8,1", **settings)
    search = searched.go()
    assert [trial.state.name for trial in search.study.trials] == ["COMPLETE", "PRUNED"]
    assert [(t.label, t.status) for t in search.sweep.trials] == [
        ("lora.r=8 seed=0", "done"),
        ("lora.r=8 seed=1", "done"),
        ("lora.r=1 seed=0", "pruned"),
    ]
    assert searched.trained[-1] == "lora.r=1 seed=0 1"  # which the first validation showed
    again = searched.go()  # it stays pruned, and is no failure
    assert [t.status for t in again.sweep.trials] == ["done", "done", "pruned"]


def test_a_run_that_one_search_pruned_is_completed_by_a_sweep_that_asks_for_it(
    tmp_path: Path, config: TrainConfig
) -> None:
    settings: dict[str, Any] = {"sampler": "grid", "pruner": "median", "pruner_startup_trials": 1}
    searched = world(tmp_path / "w", config, "lora.r=8,1", **settings)
    pruned = searched.go().sweep.trials[1]
    assert pruned.run.status()["status"] == "pruned"
    assert not searched.trial(1, {"lora.r": "1"}, None).finished_before()
    (tmp_path / "w" / "study.db").unlink()
    searched.settings = SearchConfig(sampler="grid")
    assert [t.status for t in searched.go().sweep.trials] == ["done", "done"]
    assert searched.trained == [f"lora.r=8 {step}" for step in range(1, 5)] + [f"lora.r=1 {s}" for s in range(1, 5)]


def test_a_failed_trial_is_tried_again_once_each_time_the_search_is_started(
    tmp_path: Path, config: TrainConfig
) -> None:
    searched = world(tmp_path / "w", config, "lora.r=1,4,8", sampler="grid")
    searched.fails = lambda label: label == "lora.r=4"
    for attempts in (1, 2):
        search = searched.go()
        states = [trial.state.name for trial in search.study.trials]
        assert states.count("FAIL") == attempts
        assert states.count("COMPLETE") == 2
        assert [t.status for t in search.sweep.trials] == ["done", "failed", "done"] or attempts == 2
    searched.fails = lambda label: False
    search = searched.go()
    assert sorted((t.number, t.label, t.status) for t in search.sweep.trials) == [
        (0, "lora.r=1", "done"),
        (1, "lora.r=4", "done"),
        (2, "lora.r=8", "done"),
    ]
    assert len(searched.trained) == 3 * STEPS


def test_what_diverges_is_a_result_of_the_search_and_no_failure(tmp_path: Path, config: TrainConfig) -> None:
    searched = world(tmp_path / "w", config, "lora.r=1,4", sampler="grid")
    search = searched.search()
    trial = search.next()
    assert trial is not None
    trial.run.directory.mkdir(parents=True)
    trial.run.update(status="diverged", error="loss is nan after step 2")
    trial.mark("failed", "loss is nan after step 2", "error")
    search.ended(trial)
    assert (trial.status, search.study.trials[0].state.name) == ("pruned", "PRUNED")
    assert len(searched.go().study.trials) == 2


def test_several_workers_ask_side_by_side(tmp_path: Path, config: TrainConfig) -> None:
    searched = world(tmp_path / "w", config, sampler="tpe", startup_trials=2, n_trials=6)
    search = searched.search()
    search.workers = 3
    finished = 0
    while not search.over():
        under_way = [search.next() for _ in range(4)]
        trials = [trial for trial in under_way if trial is not None]
        assert len(trials) == 3
        for trial in trials:
            searched.train(search, trial)
            search.ended(trial)
            finished += 1
    assert finished == 6
    assert len({tuple(trial.params.items()) for trial in search.study.trials}) == 6


def test_a_study_that_cannot_be_read_is_told_in_one_sentence(tmp_path: Path, config: TrainConfig) -> None:
    searched = world(tmp_path / "w", config, sampler="random", n_trials=1)
    searched.root.mkdir()
    (searched.root / "study.db").write_text("no database" * 100)
    with pytest.raises(ConfigError, match=r"study\.db: the study cannot be read .* move it away"):
        searched.search()


def test_without_optuna_one_sentence_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ConfigError, match=r'pip install "llmft\[search\]"'):
        import_optuna()


# ---------------------------------------------------------------------------------------------------- the command

READY = sorted((ROOT / "sweeps" / "optuna").glob("*.yaml"))
SEARCH = [
    "-m",
    *SMALL,
    "hydra.sweeper.sampler=tpe",
    "hydra.sweeper.n_trials=4",
    "hydra.sweeper.startup_trials=2",
    "lora.r=choice(1,2)",
    "learning_rate.peak=tag(log,interval(1e-3,1e-1))",
]


def record_of(root: Path) -> dict[str, Any]:
    (path,) = (root / "sweeps").glob("*/sweep.json")
    record: dict[str, Any] = json.loads(path.read_text())
    return record


def outcome_of(root: Path) -> list[Any]:
    return [(t["overrides"], t["status"], t["value"], t["key"]) for t in record_of(root)["trials"]]


@pytest.mark.parametrize("path", READY, ids=lambda path: path.stem)
def test_a_ready_search_states_its_command_and_varies_keys_that_exist(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert lines[1] == f"# python -m llmft -m --config-dir sweeps +optuna={path.stem}"
    assert lines[2].startswith("# ")
    content = yaml.safe_load(path.read_text())
    assert content["hydra"]["mode"] == "MULTIRUN"
    plain = dict(content["hydra"]["sweeper"])
    settings = search_settings(plain)
    written = [f"{key}={value}" for key, value in (settings.params or {}).items()]
    space = make_space(OverridesParser.create().parse_overrides(written), settings.conditions or {})
    wanted_trials(settings, space)
    last = space.probes()[-1]
    compose(*space.overrides(last))


@pytest.mark.slow
@pytest.mark.parametrize("path", READY, ids=lambda path: path.stem)
def test_a_ready_search_runs(path: Path, tmp_path: Path) -> None:
    few = ["hydra.sweeper.n_trials=3", "trainer.validate_every=1"]
    if "startup_trials" in path.read_text():
        few.append("hydra.sweeper.startup_trials=2")
    others = [argument for argument in SMALL if not argument.startswith(("lora.r=", "trainer.validate_every="))]
    result = llmft(
        "-m",
        "--config-dir",
        str(ROOT / "sweeps"),
        f"+optuna={path.stem}",
        *others,
        *few,
        f"output_dir={tmp_path}",
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    record = record_of(tmp_path)
    assert {trial["status"] for trial in record["trials"]} <= {"done", "pruned"}
    assert record["search"]["n_trials"] == 3
    best = record["trials"][[t["number"] for t in record["trials"]].index(record["search"]["best"]["trial"])]
    assert best["command"] in result.stdout
    assert "hydra.mode=RUN" in best["command"]


@pytest.mark.slow
def test_a_search_killed_at_any_trial_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    uninterrupted = tmp_path / "whole"
    result = llmft(*SEARCH, f"output_dir={uninterrupted}", cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    for number in (0, 1, 3):
        root = tmp_path / f"killed{number}"
        command = [sys.executable, "-m", "llmft", *SEARCH, f"output_dir={root}"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(
            command, cwd=tmp_path, env=environment, start_new_session=True, stdout=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 90
        while len(list(root.glob("runs/*/metrics.jsonl"))) <= number:
            assert process.poll() is None, "it ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.01)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        for pid in (process.pid, *map(int, children)):
            os.killpg(pid, signal.SIGKILL)  # every process leads a group of its own
        process.wait()
        again = llmft(*SEARCH, f"output_dir={root}", cwd=tmp_path)
        assert again.returncode == 0, again.stdout + again.stderr
        assert outcome_of(root) == outcome_of(uninterrupted)
        assert len(list((root / "runs").iterdir())) == 4


@pytest.mark.slow
def test_a_search_finds_what_is_done_refuses_a_bad_choice_and_lets_no_second_one_in(tmp_path: Path) -> None:
    result = llmft(*SEARCH, "lora.r=choice(1,-2)", f"output_dir={tmp_path}", cwd=tmp_path)
    assert result.returncode == 2
    assert "lora.r=-2" in result.stderr
    assert not list(tmp_path.glob("runs/*"))
    two = ["-m", *SMALL, "hydra.sweeper.sampler=grid", "lora.r=1,2", f"output_dir={tmp_path}"]
    for message in ("trial 2/2 done", "was done before"):
        result = llmft(*[a for a in two if a != "progress=false"], cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        assert message in result.stdout or "best of 2" in result.stdout
    (study_file,) = tmp_path.glob("sweeps/*/study.db")
    before = outcome_of(tmp_path)
    study_file.unlink()
    result = llmft(*[a for a in two if a != "progress=false"], cwd=tmp_path)
    assert result.stdout.count("was done before") == 2
    assert outcome_of(tmp_path) == before
    with filelock.FileLock(study_file.parent / ".lock"):
        result = llmft(*two, cwd=tmp_path)
    assert result.returncode == 2
    assert "another process runs this very search" in result.stderr


@pytest.mark.slow
def test_a_pruned_trial_is_no_failure_and_a_grid_completes_it_to_the_numbers_it_has_alone(tmp_path: Path) -> None:
    small = [argument for argument in SMALL if not argument.startswith("trainer.validate_every")]
    search = [
        "hydra.sweeper.sampler=grid",
        "hydra.sweeper.pruner=median",
        "hydra.sweeper.pruner_startup_trials=1",
        "learning_rate.peak=4e-2,1e-4",
    ]
    both = ["-m", *small, "trainer.validate_every=1", f"output_dir={tmp_path / 'both'}"]
    result = llmft(*both, *search, cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    first, second = record_of(tmp_path / "both")["trials"]
    assert (first["status"], second["status"]) == ("done", "pruned")
    run = Run(tmp_path / "both" / second["run"], second["key"])
    assert run.status()["status"] == "pruned"
    assert [json.loads(line)["step"] for line in run.metrics_file.read_text().splitlines()] == [0, 1, 1]
    result = llmft(*both, "learning_rate.peak=1e-4", cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert run.done
    result = llmft(*both[1:-1], "learning_rate.peak=1e-4", f"output_dir={tmp_path / 'alone'}", cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    (alone,) = (tmp_path / "alone" / "runs").iterdir()
    assert Run(alone, "").metrics_file.read_bytes() == run.metrics_file.read_bytes()
