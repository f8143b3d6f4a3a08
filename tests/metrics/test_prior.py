"""Every classification is compared with the score of the training rows' class shares alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.dummy import DummyClassifier, DummyRegressor
from sklearn.metrics import log_loss

from llmft.config.commands import EvaluateConfig, FoldsConfig
from llmft.config.task import TaskType
from llmft.evaluate import evaluate
from llmft.folds import folds
from llmft.metrics import classification, regression
from llmft.metrics.prior import against_prior, chance_sentence, is_better, prior_of, row_losses
from llmft.reports.curves import Fit, diagnose
from llmft.reports.read import RunRecord
from llmft.reports.write import write_report
from llmft.runs.predictions import Predictions
from llmft.train import train
from tests.conftest import compose
from tests.reports.runs import make_run

METRICS = {"logloss": classification.logloss, "accuracy": classification.accuracy, "auc": classification.auc}


def predictions(values: np.ndarray, targets: list[Any], prior: list[float] | None, **columns: Any) -> Predictions:
    provenance = {"sources": [{"fold": None, "prior": prior}]} if prior is not None else {}
    names = [f"r{row}" for row in range(len(values))]
    return Predictions(names, list("abc"), values, targets=targets, columns=columns, provenance=provenance)


def test_the_prior_is_scikit_learns_dummy_of_the_training_rows() -> None:
    rng = np.random.default_rng(0)
    train_rows, held_out = rng.choice(3, 90, p=[0.6, 0.3, 0.1]), rng.choice(3, 40, p=[0.2, 0.3, 0.5])
    dummy = DummyClassifier(strategy="prior").fit(np.zeros((90, 1)), train_rows)
    prior = prior_of(TaskType.single_label, 3, train_rows.tolist())
    assert prior == pytest.approx(dummy.class_prior_)
    comparison = against_prior(predictions(np.full((40, 3), 1 / 3), ["abc"[k] for k in held_out], prior), METRICS)
    assert comparison is not None
    constant = dummy.predict_proba(np.zeros((40, 1)))
    assert comparison["metrics"]["logloss"] == pytest.approx(log_loss(held_out, constant, labels=[0, 1, 2]))
    assert comparison["metrics"]["accuracy"] == dummy.score(np.zeros((40, 1)), held_out)
    assert comparison["metrics"]["auc"] == 0.5
    assert comparison["prior_loss"] == pytest.approx(comparison["metrics"]["logloss"])


def test_the_prior_of_numbers_is_their_mean_and_of_several_classes_each_share() -> None:
    dummy = DummyRegressor().fit(np.zeros((4, 1)), [1.0, 2.0, 3.0, 10.0])
    assert prior_of(TaskType.regression, 1, [1.0, 2.0, 3.0, 10.0]) == pytest.approx(dummy.predict([[0.0]]))
    assert prior_of(TaskType.multi_label, 2, [(1, 0), (1, 1), (0, 0), (0, 0)]) == [0.5, 0.25]
    assert prior_of(TaskType.single_label, 3, [0, 0, 0, 1]) == pytest.approx([0.6, 0.2, 0.2])  # c does not occur
    numbers = Predictions(["x", "y"], ["t"], np.asarray([[4.0], [5.0]]), "regression", [4.0, 6.0])
    numbers.provenance = {"sources": [{"fold": None, "prior": [4.0]}]}
    comparison = against_prior(numbers, {"rmse": regression.rmse, "pearson": regression.pearson})
    assert comparison is not None
    assert comparison["metrics"]["rmse"] == pytest.approx(np.sqrt(2))
    assert comparison["metrics"]["pearson"] is None
    assert row_losses(np.asarray([[4.0]]), np.asarray([6.0]), TaskType.regression, 2.0) == pytest.approx([0.5])


@pytest.mark.parametrize(("strength", "words"), [(3.0, "better than chance"), (0.0, "NOT better"), (-3.0, "WORSE")])
def test_what_is_at_chance_or_worse_is_said_plainly(strength: float, words: str) -> None:
    rng = np.random.default_rng(1)
    truth = rng.integers(3, size=200)
    scores = strength * np.eye(3)[truth] + 0.1 * rng.normal(size=(200, 3))
    values = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    comparison = against_prior(predictions(values, ["abc"[k] for k in truth], [1 / 3] * 3), METRICS)
    assert comparison is not None
    assert chance_sentence(comparison).startswith(words)
    assert is_better(comparison) is (strength > 0)


def test_rows_of_one_group_count_once_and_each_fold_has_its_own_prior() -> None:
    values = np.asarray([[0.8, 0.1, 0.1], [0.5, 0.3, 0.2]] * 10)
    ungrouped = predictions(values, ["a"] * 20, [0.4, 0.3, 0.3])
    grouped = predictions(values, ["a"] * 20, [0.4, 0.3, 0.3], group=["x", "y"] * 10)
    by_row, together = against_prior(ungrouped, METRICS), against_prior(grouped, METRICS)
    assert by_row is not None
    assert together is not None
    assert is_better(by_row)
    assert not is_better(together)  # two answers, ten times each
    folded = predictions(values[:2], ["a", "a"], [0.0], fold=[0, 1])
    folded.provenance = {"sources": [{"fold": 0, "prior": [0.8, 0.1, 0.1]}, {"fold": 1, "prior": [0.2, 0.4, 0.4]}]}
    comparison = against_prior(folded, METRICS)
    assert comparison is not None
    assert comparison["prior_loss"] == pytest.approx(-np.log([0.8, 0.2]).mean())


def test_without_the_training_rows_the_prior_is_that_of_the_rows_and_says_so() -> None:
    comparison = against_prior(predictions(np.full((4, 3), 1 / 3), ["a", "a", "b", "c"], None), METRICS)
    assert comparison is not None
    assert not comparison["trained"]
    assert "these rows' own targets" in chance_sentence(comparison)
    assert comparison["metrics"]["accuracy"] == 0.5


def test_a_training_its_folds_evaluation_and_report_all_show_the_prior(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    words = {"a": "apple", "b": "bread"}
    lines = [{"text": f"{words[k]} {rng.integers(99)} is here", "target": k} for k in rng.choice(["a", "b"], 60)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for fold in (0, 1):
        train(
            compose(
                "model=tfidf", "task=classification", "data=classification", f"data.files={tmp_path}/rows.jsonl",
                "data.columns.text=text", "data.num_folds=2", f"data.fold={fold}",
                f"output_dir={tmp_path}", "logger=none",
            ),
            quiet=True,
        )  # fmt: skip
    runs = sorted((tmp_path / "runs").iterdir())
    for run in runs:
        chance = json.loads((run / "run.json").read_text())["result"]["chance"]["val"]
        assert chance_sentence(chance).startswith("better than chance")
        assert chance["metrics"]["auc"] == 0.5
    (joined,) = folds(FoldsConfig(output_dir=str(tmp_path)), quiet=True)
    assert json.loads((joined / "folds.json").read_text())["chance"]["rows"] == 60
    evaluation = evaluate(EvaluateConfig(predictions=str(joined / "predictions" / "val"), bootstrap=0), quiet=True)
    assert evaluation["metrics"]["auc"]["prior"] == 0.5
    assert evaluation["chance"]["trained"] is True
    report = write_report(runs, tmp_path / "out", clusters=False)
    page, text = report.html.read_text(), (tmp_path / "out" / "report.md").read_text()
    for name in ("accuracy", "macro_f1", "against chance", "prior", "By fold", "fold 1"):
        assert name in page, name
        assert name in text, name
    assert "true a, predicted b" in page


def test_a_run_at_chance_is_never_called_fine(tmp_path: Path) -> None:
    def fit(name: str, value: float, chance: dict[str, Any] | None = None, **config: Any) -> Fit:
        run = make_run(tmp_path / name, value, **config)
        record = json.loads((run / "run.json").read_text())
        if chance is not None:
            record["result"]["chance"] = {"val": {"metrics": {}, "rows": 60, "trained": True, **chance}}
        (run / "run.json").write_text(json.dumps(record))
        (run / "environment.json").write_text(json.dumps({"data": {"labels": list("abcdefg")}}))
        return diagnose(RunRecord(run)).fit

    learned = {"loss": 1.0, "prior_loss": 1.9, "low": 0.7, "high": 1.1}
    assert fit("learned", 1.0, learned) is Fit.fine
    assert fit("level", 1.9, {**learned, "loss": 1.9, "low": -0.1, "high": 0.1}) is Fit.chance
    assert fit("worse", 2.4, {**learned, "loss": 2.4, "low": -0.6, "high": -0.4}) is Fit.chance
    # Records of older versions: seven classes of equal chance.
    assert fit("old", 1.95, task__head="linear") is Fit.chance
    assert fit("old-learned", 1.0, task__head="linear") is Fit.fine
    report = write_report(sorted(tmp_path.glob("worse/runs/*")), tmp_path / "out")
    assert "not better than chance in one run: loss 2.4" in report.warnings["chance"]
    assert "1 of 1 are no better than chance" in report.curves
    assert "NOT better" in (tmp_path / "out" / "report.md").read_text()


def test_importance_is_not_told_where_no_verdict_tells_the_values_apart(tmp_path: Path) -> None:
    """A verdict "not distinguishable" comes without a share of the variance, which would suggest a difference."""
    for r, values in ((4, (1.0, 1.3, 0.9)), (8, (1.2, 1.0, 1.35))):
        for epochs in (1, 2):
            for seed, value in enumerate(values):
                make_run(tmp_path, value + epochs, lora__r=r, trainer__epochs=epochs, seed=seed)
    report = write_report(sorted((tmp_path / "runs").iterdir()), tmp_path / "out")
    assert "r=4 leads, but is not distinguishable from r=8" in report.verdicts.answer
    page = report.html.read_text()
    assert "r not distinguishable from noise" in page
    assert 'class="bar open"' in page


def test_the_logbook_gives_the_interval_with_the_verdict_and_the_metrics_with_the_result(tmp_path: Path) -> None:
    from tests.reports.runs import make_sweep, trial

    runs = [make_run(tmp_path, 1.0 + r / 50 + seed / 1000, lora__r=r, seed=seed) for r in (4, 8) for seed in range(3)]
    sweep = make_sweep(tmp_path, [trial(tmp_path, run, number) for number, run in enumerate(runs)])
    write_report([], sweep, sweep=sweep)
    text = (tmp_path / "LOGBOOK.md").read_text()
    assert "95% interval" in text.partition("**Verdict.**")[2]
    assert "exact_match 0.5000" in text.partition("**Result.**")[2]


def test_odd_records_of_chance_and_metrics_are_left_out(tmp_path: Path) -> None:
    for number, odd in enumerate((5, "x", [], {"val": 3}, {"val": {"loss": "x", "metrics": 7}})):
        run = make_run(tmp_path, 1.0 + number, lora__r=number + 1, task__metrics=odd, task__head="linear")
        record = json.loads((run / "run.json").read_text())
        record["result"]["chance"] = odd
        (run / "run.json").write_text(json.dumps(record))
        (run / "environment.json").write_text(json.dumps({"data": {"labels": odd}}))
    report = write_report(sorted((tmp_path / "runs").iterdir()), tmp_path / "out")
    assert len(report.board) == 5
    assert "chance" not in report.warnings
