"""predict, evaluate, folds, blend, refit: from runs to one submission, by way of directories of predictions."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmft.blend import blend
from llmft.blending import combine, convex, hill_climb
from llmft.config_verbs import (
    BlendConfig,
    EvaluateConfig,
    FoldsConfig,
    Form,
    Method,
    PredictConfig,
    PredictData,
    RefitConfig,
)
from llmft.data.synthetic import writers
from llmft.errors import ConfigError, DataError
from llmft.evaluate import evaluate
from llmft.folds import folds
from llmft.metrics.classification import logloss
from llmft.predict import predict
from llmft.predictions import Predictions
from llmft.refit import refit_config
from llmft.train import train
from tests.conftest import compose, run_directory

LABELS = ["a", "b", "c"]


def member(root: Path, name: str, noise: float, *, seed: int = 0, rows: int = 300, **other: Any) -> Path:
    """A directory with predictions of `rows` rows, and of a test file, that are right but for `noise`."""
    truth = np.random.default_rng(99).integers(3, size=rows)
    rng = np.random.default_rng(seed)
    values = np.exp(2 * np.eye(3)[truth] + noise * rng.normal(size=(rows, 3)))
    values /= values.sum(axis=1, keepdims=True)
    ids = [f"r{n}" for n in range(rows)]
    group = {"group": [f"g{n // 3}" for n in range(rows)]}
    made = {"labels": LABELS, "targets": [LABELS[k] for k in truth], "columns": group, **other}
    Predictions(ids, values=values, **made).save(root / name / "predictions" / "val")
    Predictions(["t0", "t1"], made["labels"], values[:2]).save(root / name / "predictions" / "test")
    return root / name


def test_predictions_survive_the_way_to_the_disk_and_damage_is_found(tmp_path: Path) -> None:
    folder = member(tmp_path, "a", 1.0) / "predictions" / "val"
    made = Predictions.load(folder)
    assert made.ids[:2] == ["r0", "r1"]
    assert made.columns["group"][3] == "g1"
    with (folder / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(rows[5][f"p_{label}"]) for label in LABELS] == made.values[5].tolist()
    assert rows[5]["predicted"] == made.predicted[5]
    member(tmp_path, "b", 2.0)
    (folder / "predictions.parquet").write_bytes(
        (tmp_path / "b" / "predictions" / "val" / "predictions.parquet").read_bytes()
    )
    with pytest.raises(DataError, match=r"not what predictions\.json describes"):
        Predictions.load(folder)
    with pytest.raises(DataError, match="two rows are called 'x'"):
        Predictions(["x", "x"], LABELS, np.ones((2, 3)) / 3).save(tmp_path / "c")


# ------------------------------------------------------------------------------------------------------------- blend


def test_means_are_what_they_are_called() -> None:
    values = np.asarray([[[0.8, 0.2]], [[0.2, 0.8]], [[0.5, 0.5]]])
    half = np.full(3, 1 / 3)
    assert combine(values, half, Method.mean, "single_label")[0] == pytest.approx([0.5, 0.5])
    assert combine(values[:1], np.ones(1), Method.geometric, "single_label")[0] == pytest.approx([0.8, 0.2])
    two = combine(values[[0, 2]], np.full(2, 0.5), Method.geometric, "single_label")[0]
    assert two == pytest.approx(np.sqrt([0.4, 0.1]) / np.sqrt([0.4, 0.1]).sum())
    ranks = combine(np.asarray([[[0.9, 0.1], [0.6, 0.4]]]), np.ones(1), Method.rank, "single_label")
    assert ranks[0] == pytest.approx([2 / 3, 1 / 3])


def test_optimised_weights_are_the_best_of_a_grid_and_the_climb_comes_near(tmp_path: Path) -> None:
    folders = [member(tmp_path, f"m{noise}", noise, seed=noise) for noise in (1, 2)]
    both = [Predictions.load(folder / "predictions" / "val") for folder in folders]
    values, references = np.stack([own.values for own in both]), both[0].references()
    grid = [(logloss(references, w * values[0] + (1 - w) * values[1]), w) for w in np.linspace(0, 1, 201)]
    found = convex(values, references, "single_label")
    assert found.sum() == pytest.approx(1)
    assert found[0] == pytest.approx(min(grid)[1], abs=0.01)
    climbed = hill_climb(values, lambda mixed: logloss(references, mixed), 200)
    assert logloss(references, np.tensordot(climbed, values, axes=1)) == pytest.approx(min(grid)[0], abs=1e-3)


@pytest.mark.parametrize("method", list(Method))
def test_a_blend_has_predictions_like_a_runs_and_can_be_blended(tmp_path: Path, method: Method) -> None:
    names = [str(member(tmp_path, name, n, seed=n)) for n, name in enumerate(("a", "b"), start=1)]
    first = blend(BlendConfig(runs=names, method=method, output_dir=str(tmp_path)), quiet=True)
    assert Predictions.load(first / "predictions" / "test").ids == ["t0", "t1"]
    again = blend(BlendConfig(runs=[str(first), names[0]], method=method, output_dir=str(tmp_path)), quiet=True)
    made = Predictions.load(again / "predictions" / "val")
    assert made.values.sum(axis=1) == pytest.approx(np.ones(300))
    record = json.loads((first / "blend.json").read_text())
    assert record["correlation"][0][0] == pytest.approx(1)
    alone = {own["directory"]: own for own in record["members"]}
    assert alone[names[0]]["score_without"] == pytest.approx(alone[names[1]]["score"], abs=0.5)


@pytest.mark.slow
def test_the_told_score_is_of_rows_that_chose_no_weights(tmp_path: Path) -> None:
    """Twelve members of noise: chosen weights look good on the rows that chose them, and only there."""
    rng = np.random.default_rng(0)
    truth = [LABELS[k] for k in rng.integers(3, size=60)]
    names = []
    for n in range(12):
        values = rng.dirichlet(np.ones(3), size=60)
        made = Predictions([f"r{k}" for k in range(60)], LABELS, values, targets=truth)
        names.append(str(made.save(tmp_path / f"m{n}" / "predictions" / "val").parent.parent))
    found = blend(BlendConfig(runs=names, method=Method.hill_climbing, output_dir=str(tmp_path)), quiet=True)
    record = json.loads((found / "blend.json").read_text())
    assert record["score_in_sample"] < record["score"] - 0.02
    own = Predictions.load(found / "predictions" / "val")
    assert logloss(own.references(), own.values) == pytest.approx(record["score"], abs=1e-12)


def test_members_that_do_not_fit_are_refused_by_name(tmp_path: Path) -> None:
    good = str(member(tmp_path, "good", 1.0))
    for name, other, message in (
        ("order", {"labels": ["b", "a", "c"]}, "same order"),
        ("short", {"rows": 299}, r"1 rows of good are missing \(r299 first\)"),
        ("targets", {"targets": ["a"] * 300}, "the row r0 has the target 'a'"),
    ):
        bad = member(tmp_path, name, 1.0, **other)  # type: ignore[arg-type]
        with pytest.raises(DataError, match=message) as error:
            blend(BlendConfig(runs=[good, str(bad)], output_dir=str(tmp_path)), quiet=True)
        assert f"/{name}:" in str(error.value)
    with pytest.raises(DataError, match="no predictions called vall; did you mean val"):
        blend(BlendConfig(runs=[good, good.replace("good", "order")], predictions="vall"), quiet=True)
    with pytest.raises(ConfigError, match="two members"):
        blend(BlendConfig(runs=[good]), quiet=True)


# ---------------------------------------------------------------------------------------------------------- evaluate


def test_intervals_hold_the_value_and_narrow_with_more_rows(tmp_path: Path) -> None:
    widths = []
    for rows in (60, 600):
        path = member(tmp_path, f"m{rows}", 1.0, rows=rows) / "predictions" / "val"
        found = evaluate(EvaluateConfig(predictions=str(path), bootstrap=100, slice=["target"]), quiet=True)
        low, high = found["metrics"]["logloss"]["interval"]
        assert low < found["metrics"]["logloss"]["value"] < high
        widths.append(high - low)
        assert sum(own["rows"] for own in found["classes"].values()) == rows
        assert sum(own["rows"] for own in found["slices"]["target"].values()) == rows
    assert widths[1] < widths[0] / 2
    assert json.loads((path / "evaluation.json").read_text()) == found


def test_references_are_joined_by_id_whatever_their_order(tmp_path: Path) -> None:
    path = member(tmp_path, "a", 1.0, rows=30) / "predictions" / "val"
    made = Predictions.load(path)
    kinds = ["even", "odd"] * 15
    rows = [",".join(row) for row in zip(made.ids, made.targets, kinds, strict=True)]
    (tmp_path / "truth.csv").write_text("\n".join(["id,label,kind", *rows[::-1]]))
    own = EvaluateConfig(predictions=str(path), bootstrap=0)
    given = EvaluateConfig(
        predictions=str(path), references=str(tmp_path / "truth.csv"), target="label", slice=["kind"], bootstrap=0
    )
    assert evaluate(own, quiet=True)["metrics"] == (found := evaluate(given, quiet=True))["metrics"]
    assert set(found["slices"]["kind"]) == {"even", "odd"}
    (tmp_path / "truth.csv").write_text("\n".join(["id,label,kind", *rows[1:]]))
    with pytest.raises(DataError, match=r"1 predicted rows are not there \(r0 first\)"):
        evaluate(given, quiet=True)
    (tmp_path / "truth.csv").write_text("\n".join(["id,label,kind", *rows]))
    with pytest.raises(ConfigError, match=r"target=labl.*did you mean label"):
        evaluate(replace(given, target="labl"), quiet=True)


def test_a_key_that_names_a_file_or_its_columns_is_used_or_refused(tmp_path: Path) -> None:
    path = member(tmp_path, "a", 1.0, rows=30) / "predictions" / "val"
    for key in ("target", "id"):
        with pytest.raises(ConfigError, match=f"{key}=x goes with references=FILE"):
            evaluate(EvaluateConfig(predictions=str(path), **{key: "x"}), quiet=True)
    for values in ({"template": "sample.csv"}, {"columns": {"a": "A"}}):
        with pytest.raises(ConfigError, match="goes with format=submission"):
            question(tmp_path, "a.csv", **values)


# ------------------------------------------------------------------------------------------------- runs of the baseline


def table(path: Path, count: int, *, known: bool = True) -> str:
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["id", "text", "writer"][: 3 if known else 2])
        for number, row in enumerate(writers("train" if known else "test", count, 0)):
            rows.writerow([number, row["text"], row["writer"]][: 3 if known else 2])
    return str(path)


@pytest.fixture
def baseline(tmp_path: Path) -> Callable[..., Any]:
    """Composes a baseline run on written rows."""
    files = table(tmp_path / "train.csv", 120)

    def make(*overrides: str) -> Any:
        own = ["model=tfidf", "task=classification", "data=classification", "data.columns.target=writer"]
        small = ["data.num_folds=3", "logger=none", f"data.files={files}", f"output_dir={tmp_path}"]
        return compose(*own, *small, *overrides)

    return make


def question(run: Path | list[str], files: str, **more: Any) -> PredictConfig:
    return PredictConfig(run=str(run) if isinstance(run, Path) else run, data=PredictData(files), **more)


@pytest.mark.slow
def test_folds_are_joined_once_refitted_and_submitted(baseline: Callable[..., Any], tmp_path: Path) -> None:
    for fold in (0, 1):
        train(baseline(f"data.fold={fold}"), quiet=True)
    with pytest.raises(
        ConfigError, match=r"fold 2 of its 3 \(0 to 2\) is not done; run the same command with -m data\.fold=2"
    ):
        folds(FoldsConfig(runs=str(tmp_path / "runs" / "*"), output_dir=str(tmp_path)), quiet=True)
    train(baseline("data.fold=2"), quiet=True)
    runs = sorted(str(path) for path in (tmp_path / "runs").iterdir())
    files = table(tmp_path / "test.csv", 20, known=False)
    predict(question(runs, files, name="hidden"), quiet=True)
    (joined,) = folds(FoldsConfig(output_dir=str(tmp_path)), quiet=True)
    made = Predictions.load(joined / "predictions" / "val")
    assert made.ids == [str(n) for n in range(120)], "each row once, in the file's order"
    each = [Predictions.load(Path(run) / "predictions" / "hidden").values for run in runs]
    assert Predictions.load(joined / "predictions" / "hidden").values == pytest.approx(np.mean(each, axis=0))
    record = json.loads((joined / "folds.json").read_text())
    assert record["score"]["logloss"] == pytest.approx(logloss(made.references(), made.values))
    assert record["spread"]["logloss"] == pytest.approx(np.std([own["logloss"] for own in record["folds"]], ddof=1))
    twice = Path(runs[0]) / "predictions" / "val"
    own = Predictions.load(twice)
    own.ids[0] = Predictions.load(Path(runs[1]) / "predictions" / "val").ids[0]
    own.save(twice)
    with pytest.raises(DataError, match="1 rows are in two folds"):
        folds(FoldsConfig(output_dir=str(tmp_path)), quiet=True)
    again = refit_config(RefitConfig(runs=runs))
    assert train(again, quiet=True) is None
    (whole,) = (tmp_path / "runs").glob("*-all-*")
    after = json.loads((whole / "run.json").read_text())["result"]["after"]
    assert set(after.values()) == {None}
    check_submission(whole, files, tmp_path)


def check_submission(run: Path, files: str, tmp_path: Path) -> None:
    sample = tmp_path / "sample_submission.csv"
    names = ["Zoe", "Ann", "Ben", "Eve", "Max", "Sue", "Tom"]
    header = ["id", *(f"writer_{name}" for name in names)]

    def ask(rows: list[int], columns: list[str]) -> list[Path]:
        lines = [",".join([str(n), *["0"] * (len(columns) - 1)]) for n in rows]
        sample.write_text("\n".join([",".join(columns), *lines]))
        return predict(question(run, files, format=Form.submission, template=str(sample)), quiet=True)

    (folder,) = ask(list(range(20))[::-1], header)
    made = Predictions.load(folder)
    with (folder / "submission.csv").open() as file:
        written = list(csv.reader(file))
    assert written[0] == header
    assert [row[0] for row in written[1:]] == [str(n) for n in range(20)][::-1]
    assert [float(cell) for cell in written[1][1:]] == [made.values[19][made.labels.index(name)] for name in names]
    with pytest.raises(DataError, match="1 predicted rows are not in it"):
        ask(list(range(19)), header)
    with pytest.raises(DataError, match="1 of its rows are not predicted"):
        ask(list(range(21)), header)
    with pytest.raises(ConfigError, match="the class Zoe has no column"):
        ask(list(range(20)), ["id", *header[2:]])
    with pytest.raises(ConfigError, match="fills the column writer_Bob"):
        ask(list(range(20)), [*header[:-1], "writer_Bob"])


def test_the_baselines_loss_is_of_what_it_writes(baseline: Callable[..., Any], tmp_path: Path) -> None:
    found = train(baseline(), quiet=True)
    made = Predictions.load(run_directory(tmp_path) / "predictions" / "val")
    assert found == pytest.approx(logloss(made.references(), made.values), abs=1e-9)
    (again,) = predict(question(run_directory(tmp_path), table(tmp_path / "train.csv", 120)), quiet=True)
    both = Predictions.load(again)
    rows = [both.ids.index(name) for name in made.ids]
    assert both.values[rows] == pytest.approx(made.values, abs=1e-12)
    assert train(baseline(), quiet=True) == found, "the finished run is found"
    with pytest.raises(ConfigError, match="writes no text"):
        train(baseline("task=language_modeling"), quiet=True)


# ---------------------------------------------------------------------------------------------- predict with a model


@pytest.mark.slow
@pytest.mark.parametrize("head", ["linear", "tokens"])
def test_an_opened_run_predicts_what_it_validated(
    small: Callable[..., Any], tmp_path: Path, head: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Head and adapter go to the disk and back; a kill half-way costs a part; a run with another base is refused."""
    files = table(tmp_path / "train.csv", 60)
    own = ["task=classification", f"task.head={head}", "task.generate_rows=0", "data=classification"]
    own += ["data.columns.target=writer", f"data.files={files}", "data.rows={}"]
    train(small(*own), quiet=True)
    run = run_directory(tmp_path)
    validated = Predictions.load(run / "predictions" / "val")

    from llmft.inference import predictor

    write, calls = predictor._write_part, []

    def killed(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        write(*arguments)

    monkeypatch.setattr(predictor, "_write_part", killed)
    with pytest.raises(KeyboardInterrupt):
        predict(question(run, files, batch_size=4), quiet=True)
    (folder,) = predict(question(run, files, batch_size=4), quiet=True)
    assert len(calls) == 3 + 2, "of four parts two were there"
    made = Predictions.load(folder)
    assert made.ids == [str(n) for n in range(60)]
    rows = [made.ids.index(name) for name in validated.ids]
    assert made.values[rows] == pytest.approx(validated.values, abs=1e-6)
    assert not (folder / "parts").exists()
    before = made.fingerprint
    assert Predictions.load(predict(question(run, files, batch_size=4), quiet=True)[0]).fingerprint == before
    assert len(calls) == 5, "what is done is not done again"
    record = json.loads((run / "environment.json").read_text())
    record["model"]["fingerprint"] = "another"
    (run / "environment.json").write_text(json.dumps(record))
    with pytest.raises(ConfigError, match="not the one that this run was trained on"):
        predict(question(run, files, batch_size=4, force=True), quiet=True)


@pytest.mark.slow
def test_generations_come_with_their_log_probability(small: Callable[..., Any], tmp_path: Path) -> None:
    train(small("trainer.max_steps=40", "trainer.validate_every=40"), quiet=True)
    run = run_directory(tmp_path)
    path = tmp_path / "q.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["text"], *([row["text"]] for row in writers("validation", 12, 0))])
    (folder,) = predict(question(run, str(path)), quiet=True)
    made = Predictions.load(folder)
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    for sample in [own for own in samples if own["step"] == 40]:
        row = int(sample["where"].rpartition(":")[2]) - 1
        assert made.columns["generated"][row] == sample["generated"]
    assert all(value <= 0 for value in made.columns["logprob"])
