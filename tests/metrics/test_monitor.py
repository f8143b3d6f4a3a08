"""A metric's definition declares which direction is better, and everything that depends on it reads that."""

from __future__ import annotations

import importlib
import inspect
import json
import pkgutil
import sys
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import yaml

import llmft.metrics
from llmft.blend import blend
from llmft.config.commands import BlendConfig, Method, RefitConfig
from llmft.config.trainer import Mode
from llmft.core.errors import ConfigError
from llmft.metrics import higher_is_better, lower_is_better
from llmft.metrics.monitor import declared, mode_of, with_mode
from llmft.refit import refit_config
from llmft.reports.configurations import Study
from llmft.runs.key import run_key
from llmft.runs.predictions import Predictions
from llmft.sweeps.suggestions import Candidate, Search
from llmft.train import train
from llmft.training.prepare import prepare
from tests.conftest import ROOT, SMALL, compose
from tests.reports.runs import make_run, make_sweep, trial

MODULES = [importlib.import_module(f"llmft.metrics.{m.name}") for m in pkgutil.iter_modules(llmft.metrics.__path__)]
METRICS = {
    f"{module.__name__}.{name}": function
    for module in MODULES
    for name, function in inspect.getmembers(module, inspect.isfunction)
    if function.__module__ == module.__name__
    and not name.startswith("_")
    and function.__annotations__["return"] == "float"
}
MORE = ["llmft.metrics.classification.accuracy", "llmft.metrics.text.exact_match", "llmft.metrics.regression.pearson"]
LESS = ["llmft.metrics.classification.logloss", "llmft.metrics.loss.loss_nats", "llmft.metrics.loss.perplexity"]


@pytest.fixture
def mine(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module of metrics that a user added."""
    module = ModuleType("llmft.metrics.mine")

    def undeclared(targets: Any, values: Any, weight: float = 1.0) -> float:
        return 0.0

    undeclared.__module__ = module.__name__
    module.undeclared = undeclared  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def test_every_metric_declares_its_direction_and_those_of_one_name_the_same() -> None:
    assert {declared(METRICS[path]) for path in MORE} == {True}
    assert {declared(METRICS[path]) for path in LESS} == {False}
    by_name: dict[str, set[bool | None]] = {}
    for path, metric in METRICS.items():
        by_name.setdefault(path.rpartition(".")[2], set()).add(declared(metric))
    assert all(len(directions) == 1 for directions in by_name.values()), by_name
    # These two describe a policy or a judge; neither direction is better.
    assert {name for name, directions in by_name.items() if None in directions} == {"drift_nats", "length_correlation"}


def test_partials_classes_and_instances_declare_what_they_are_made_of() -> None:
    class Score:
        higher_is_better = True

        def __call__(self, targets: Any, values: Any) -> float:
            return 0.0

    metric = partial(METRICS[LESS[0]])
    assert [declared(of) for of in (Score, Score(), Score().__call__, metric)] == [True, True, None, False]
    assert declared(higher_is_better(metric)) is True
    assert declared(lower_is_better(lambda targets, values: 0.0)) is False
    assert declared(len) is None


@pytest.mark.parametrize(
    ("overrides", "mode"),
    [
        ([], Mode.min),
        (["trainer.monitor=val/perplexity"], Mode.min),
        (["trainer.monitor=val/exact_match"], Mode.max),
        (["trainer.monitor=val/exact_match", "trainer.mode=max"], Mode.max),
        (["task=classification", "trainer.monitor=val/accuracy"], Mode.max),
        (["task=classification", "trainer.monitor=val/calibration_error"], Mode.min),
        (["task=classification", "+task.metric_options.calibration_error.bins=5"], Mode.min),
        (["task=regression", "trainer.monitor=val/spearman"], Mode.max),
        (["task=regression", "trainer.monitor=val/rmse"], Mode.min),
    ],
)
def test_the_monitored_metric_decides_on_the_direction(overrides: list[str], mode: Mode) -> None:
    assert with_mode(compose(*overrides)).trainer.mode is mode


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["trainer.mode=max"], "trainer.mode=max: val/loss_nats declares that lower is better"),
        (
            ["trainer.monitor=val/exact_match", "trainer.mode=min"],
            "trainer.mode=min: val/exact_match declares that higher is better",
        ),
        (["trainer.monitor=val/exact_match", "task.generate_rows=0"], "scores generations, and there are none"),
        (
            ["trainer.monitor=val/undeclared", "task.metrics=[llmft.metrics.mine.undeclared]"],
            "does not declare whether",
        ),
        (
            ["task.metrics=[llmft.metrics.classification.auc,llmft.metrics.multilabel.auc]"],
            "two metrics are called auc",
        ),
    ],
)
def test_a_contradiction_or_an_unknown_direction_is_refused_before_anything_loads(
    overrides: list[str], message: str, mine: ModuleType, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        prepare(compose(*overrides, f"output_dir={tmp_path}"))
    assert not list(tmp_path.iterdir())


def test_a_metric_of_ones_own_says_its_direction_beside_it_or_on_the_command_line(mine: ModuleType) -> None:
    overrides = ["task.metrics=[llmft.metrics.mine.undeclared]", "trainer.monitor=val/undeclared"]
    assert with_mode(compose(*overrides, "trainer.mode=max")).trainer.mode is Mode.max
    mine.undeclared.higher_is_better = True
    assert with_mode(compose(*overrides, "+task.metric_options.undeclared.weight=2")).trainer.mode is Mode.max
    with pytest.raises(ConfigError, match="val/undeclared declares that higher is better"):
        with_mode(compose(*overrides, "trainer.mode=min"))


def test_auto_leaves_the_key_of_a_run_as_it_was() -> None:
    old = compose()
    old.trainer.mode = Mode.min
    assert run_key(with_mode(compose()), "data", "model") == run_key(old, "data", "model")


def test_lightnings_early_stopping_gets_the_metrics_direction() -> None:
    from llmft.training.parts import check_parts

    stop = "+trainer.callbacks.stop={_target_: lightning.pytorch.callbacks.EarlyStopping, monitor: val/exact_match}"
    assert check_parts(compose(stop)).callbacks["stop"].mode == "max"
    assert check_parts(compose(stop.replace("exact_match", "loss_nats"))).callbacks["stop"].mode == "min"
    with pytest.raises(ConfigError, match=r"trainer\.callbacks\.stop\.mode=min: val/exact_match declares"):
        check_parts(compose(stop.replace("}", ", mode: min}")))
    with pytest.raises(ConfigError, match=r"stop\.monitor=val/exact_mach: no such metric; did you mean"):
        check_parts(compose(stop.replace("exact_match", "exact_mach")))


def test_the_weights_handed_over_are_those_of_the_highest_exact_match(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 0.2, 0.9, 0.4 at steps 0, 2 and 4, 0.9 is the best, and a patience of one stops after it."""
    from llmft.metrics import text

    values = iter([0.2, 0.9, 0.4, 0.1, 0.1])
    metric = higher_is_better(lambda references, predictions: next(values))
    metric.__module__ = text.__name__
    monkeypatch.setattr(text, "exact_match", metric)
    config = compose(
        *SMALL, f"output_dir={tmp_path}", "trainer.monitor=val/exact_match", "trainer.patience=1",
        "task.metrics=[llmft.metrics.text.exact_match]", "trainer.max_steps=8",
    )  # fmt: skip
    assert train(config, quiet=True) == 0.9
    (run,) = (tmp_path / "runs").iterdir()
    result = json.loads((run / "run.json").read_text())["result"]
    assert (result["step"], result["steps"], result["stopped_early"]) == (2, 4, True)
    assert yaml.safe_load((run / "config.yaml").read_text())["trainer"]["mode"] == "max"


def test_a_search_prefers_what_its_metric_prefers() -> None:
    def best(monitor: str) -> float | None:
        sweep = type("S", (), {"config": with_mode(compose(f"trainer.monitor={monitor}"))})
        search = Search.__new__(Search)
        search.sweep = sweep  # type: ignore[assignment]
        search.candidates = []
        for value in (0.3, 0.8, 0.1):
            run = type("T", (), {"value": value, "status": "done"})
            search.candidates.append(Candidate(0, 0, {}, [run]))  # type: ignore[list-item]
        candidate = search.best()
        return None if candidate is None else candidate.value

    assert (best("val/exact_match"), best("val/loss_nats")) == (0.8, 0.1)


@pytest.mark.parametrize("path", sorted((ROOT / "sweeps" / "wandb").glob("*.yaml")), ids=lambda path: path.stem)
def test_wandbs_sweeps_aim_where_the_metric_does(path: Path) -> None:
    metric = yaml.safe_load(path.read_text())["metric"]
    mode = with_mode(compose(f"trainer.monitor={metric['name']}")).trainer.mode
    assert metric["goal"] == f"{mode.value}imize"


def test_a_blend_climbs_in_the_direction_of_its_metric_and_refuses_one_without(
    tmp_path: Path, mine: ModuleType
) -> None:
    rng = np.random.default_rng(0)
    truth = rng.integers(2, size=200)
    names = []
    for name, noise in (("good", 0.1), ("bad", 5.0)):
        scores = np.stack([1 - truth, truth], 1) + noise * rng.normal(size=(200, 2))
        values = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
        predictions = Predictions([f"r{k}" for k in range(200)], ["a", "b"], values, targets=["ab"[k] for k in truth])
        names.append(str(predictions.save(tmp_path / name / "predictions" / "val").parent.parent))

    def weights(metric: str) -> list[float]:
        config = BlendConfig(names, Method.hill_climbing, metric=metric, output_dir=str(tmp_path))
        record = json.loads((blend(config, quiet=True) / "blend.json").read_text())
        return [member["weight"] for member in record["members"]]

    for metric in ("accuracy", "auc", "logloss", "llmft.metrics.classification.quadratic_kappa"):
        good, bad = weights(metric)
        assert good > bad, metric
    with pytest.raises(ConfigError, match="undeclared does not declare whether higher or lower is better"):
        weights("llmft.metrics.mine.undeclared")


def test_a_report_ranks_by_the_metrics_own_direction_whatever_old_records_say(tmp_path: Path) -> None:
    for r, value in ((4, 0.9), (8, 0.3)):
        for seed in (0, 1):
            run = make_run(tmp_path, 1.0 + seed / 9, lora__r=r, seed=seed, trainer__monitor="val/exact_match",
                           trainer__mode="min")  # fmt: skip
            status = json.loads((run / "run.json").read_text())
            status["result"]["after"]["val/exact_match"] = value + seed / 100
            (run / "run.json").write_text(json.dumps(status))
    study = Study(sorted((tmp_path / "runs").iterdir()))
    assert (study.lower_is_better, study.configurations[0].name) == (False, "r=4")
    assert all("trainer.mode=min is wrong for" in run.faults[0] for run in study.runs)
    sweep = make_sweep(
        tmp_path, [trial(tmp_path, run.directory) for run in study.runs], monitor="val/exact_match", mode="min"
    )
    assert not Study([], sweep).lower_is_better


def test_a_report_on_a_metric_of_unknown_direction_asks_for_it(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path, 1.0, trainer__monitor="val/odd", lora__r=r, trainer__mode="auto", task__metrics=["gone.odd"])
        for r in (4, 8)
    ]
    with pytest.raises(ConfigError, match="mode: val/odd does not declare whether higher or lower is better"):
        Study(runs)
    assert Study(runs, mode=Mode.min).lower_is_better
    assert not Study(runs, mode=Mode.max).lower_is_better
    runs = [make_run(tmp_path, 1.1, trainer__monitor="val/odd", lora__r=r, trainer__mode="max") for r in (4, 8)]
    assert not Study(runs).lower_is_better  # as it was trained


def test_a_refit_does_not_take_the_steps_of_the_worst_validation(tmp_path: Path) -> None:
    run = make_run(tmp_path, trainer__monitor="val/exact_match", trainer__mode="min")
    status = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**status, "handed_over": {}}))
    with pytest.raises(
        ConfigError, match=r"config\.yaml: trainer\.mode=min: val/exact_match declares that higher is better"
    ):
        refit_config(RefitConfig(runs=str(run)))


def test_a_direction_that_nobody_says_is_an_error_with_the_way_out() -> None:
    with pytest.raises(ConfigError, match=r"put @higher_is_better or @lower_is_better .* or set trainer\.mode=max"):
        mode_of(len, "val/len")
    assert mode_of(len, "val/len", Mode.max) is Mode.max
