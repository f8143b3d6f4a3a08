"""predict, evaluate, folds, blend, refit: from runs to one submission, by way of directories of predictions."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf

from llmft.blend import blend
from llmft.config.commands import (
    BlendConfig,
    EvaluateConfig,
    FoldsConfig,
    Method,
    PredictConfig,
    PredictData,
    PredictionFormat,
    RefitConfig,
)
from llmft.config.overrides import yes_or_no
from llmft.config.renamed import RENAMED
from llmft.core.errors import ConfigError, DataError
from llmft.data.synthetic import writers
from llmft.evaluate import evaluate
from llmft.evaluation.blending import combine, convex, hill_climb
from llmft.folds import folds
from llmft.metrics.classification import logloss
from llmft.predict import predict, texts_of
from llmft.refit import refit_config
from llmft.reports.read import RunRecord
from llmft.runs.directory import Run
from llmft.runs.predictions import Predictions
from llmft.train import train
from tests.conftest import compose, run_directory

LABELS = ["a", "b", "c"]


def member(root: Path, name: str, noise: float, *, seed: int = 0, rows: int = 300, **other: Any) -> Path:
    """A directory with predictions of `rows` rows and of a test file: the truth plus `noise`."""
    truth = np.random.default_rng(99).integers(3, size=rows)
    rng = np.random.default_rng(seed)
    values = np.exp(2 * np.eye(3)[truth] + noise * rng.normal(size=(rows, 3)))
    values /= values.sum(axis=1, keepdims=True)
    ids = [f"r{n}" for n in range(rows)]
    group = {"group": [f"g{n // 3}" for n in range(rows)]}
    facts = {"labels": LABELS, "targets": [LABELS[k] for k in truth], "columns": group, **other}
    Predictions(ids, values=values, **facts).save(root / name / "predictions" / "val")
    Predictions(["t0", "t1"], facts["labels"], values[:2]).save(root / name / "predictions" / "test")
    return root / name


def test_predictions_survive_the_way_to_the_disk_and_damage_is_found(tmp_path: Path) -> None:
    folder = member(tmp_path, "a", 1.0) / "predictions" / "val"
    predictions = Predictions.load(folder)
    assert predictions.ids[:2] == ["r0", "r1"]
    assert predictions.columns["group"][3] == "g1"
    with (folder / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(rows[5][f"p_{label}"]) for label in LABELS] == predictions.values[5].tolist()
    assert rows[5]["predicted"] == predictions.predicted[5]
    member(tmp_path, "b", 2.0)
    (folder / "predictions.parquet").write_bytes(
        (tmp_path / "b" / "predictions" / "val" / "predictions.parquet").read_bytes()
    )
    with pytest.raises(DataError, match=r"do not belong together"):
        Predictions.load(folder)
    with pytest.raises(DataError, match="two rows have the id 'x'"):
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
    values, references = np.stack([predictions.values for predictions in both]), both[0].references()
    grid = [(logloss(references, w * values[0] + (1 - w) * values[1]), w) for w in np.linspace(0, 1, 201)]
    weights = convex(values, references, "single_label")
    assert weights.sum() == pytest.approx(1)
    assert weights[0] == pytest.approx(min(grid)[1], abs=0.01)
    climbed = hill_climb(values, lambda mixed: logloss(references, mixed), 200)
    assert logloss(references, np.tensordot(climbed, values, axes=1)) == pytest.approx(min(grid)[0], abs=1e-3)


@pytest.mark.parametrize("method", list(Method))
def test_a_blend_has_predictions_like_a_runs_and_can_be_blended(tmp_path: Path, method: Method) -> None:
    names = [str(member(tmp_path, name, n, seed=n)) for n, name in enumerate(("a", "b"), start=1)]
    first = blend(BlendConfig(runs=names, method=method, output_dir=str(tmp_path)), quiet=True)
    assert Predictions.load(first / "predictions" / "test").ids == ["t0", "t1"]
    again = blend(BlendConfig(runs=[str(first), names[0]], method=method, output_dir=str(tmp_path)), quiet=True)
    predictions = Predictions.load(again / "predictions" / "val")
    assert predictions.values.sum(axis=1) == pytest.approx(np.ones(300))
    record = json.loads((first / "blend.json").read_text())
    assert record["correlation"][0][0] == pytest.approx(1)
    alone = {entry["directory"]: entry for entry in record["members"]}
    assert alone[names[0]]["score_without"] == pytest.approx(alone[names[1]]["score"], abs=0.5)


@pytest.mark.slow
def test_the_told_score_is_of_rows_that_chose_no_weights(tmp_path: Path) -> None:
    """Twelve members of noise: optimised weights look good only on the rows they were optimised on."""
    rng = np.random.default_rng(0)
    truth = [LABELS[k] for k in rng.integers(3, size=60)]
    names = []
    for n in range(12):
        values = rng.dirichlet(np.ones(3), size=60)
        predictions = Predictions([f"r{k}" for k in range(60)], LABELS, values, targets=truth)
        names.append(str(predictions.save(tmp_path / f"m{n}" / "predictions" / "val").parent.parent))
    directory = blend(BlendConfig(runs=names, method=Method.hill_climbing, output_dir=str(tmp_path)), quiet=True)
    record = json.loads((directory / "blend.json").read_text())
    assert record["score_in_sample"] < record["score"] - 0.02
    blended = Predictions.load(directory / "predictions" / "val")
    assert logloss(blended.references(), blended.values) == pytest.approx(record["score"], abs=1e-12)


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
        evaluation = evaluate(EvaluateConfig(predictions=str(path), bootstrap=100, slice=["target"]), quiet=True)
        low, high = evaluation["metrics"]["logloss"]["interval"]
        assert low < evaluation["metrics"]["logloss"]["value"] < high
        widths.append(high - low)
        assert sum(part["rows"] for part in evaluation["classes"].values()) == rows
        assert sum(part["rows"] for part in evaluation["slices"]["target"].values()) == rows
    assert widths[1] < widths[0] / 2
    assert json.loads((path / "evaluation.json").read_text()) == evaluation


def test_references_are_joined_by_id_whatever_their_order(tmp_path: Path) -> None:
    path = member(tmp_path, "a", 1.0, rows=30) / "predictions" / "val"
    predictions = Predictions.load(path)
    kinds = ["even", "odd"] * 15
    rows = [",".join(row) for row in zip(predictions.ids, predictions.targets, kinds, strict=True)]
    (tmp_path / "truth.csv").write_text("\n".join(["id,label,kind", *rows[::-1]]))
    by_run = EvaluateConfig(predictions=str(path), bootstrap=0)
    by_file = EvaluateConfig(
        predictions=str(path), references=str(tmp_path / "truth.csv"), target="label", slice=["kind"], bootstrap=0
    )
    assert evaluate(by_run, quiet=True)["metrics"] == (evaluation := evaluate(by_file, quiet=True))["metrics"]
    assert set(evaluation["slices"]["kind"]) == {"even", "odd"}
    (tmp_path / "truth.csv").write_text("\n".join(["id,label,kind", *rows[1:]]))
    with pytest.raises(DataError, match=r"1 predicted rows are missing \(r0 first\)"):
        evaluate(by_file, quiet=True)
    (tmp_path / "truth.csv").write_text("\n".join(["id,label,kind", *rows]))
    with pytest.raises(
        ConfigError, match=r"no predictions\.json there; name .*a/predictions/test, .*a/predictions/val"
    ):
        evaluate(EvaluateConfig(predictions=str(tmp_path / "a")), quiet=True)
    with pytest.raises(ConfigError, match=r"2 match; name one, such as .*/test"):
        evaluate(EvaluateConfig(predictions=str(tmp_path / "a" / "predictions" / "*")), quiet=True)
    with pytest.raises(ConfigError, match=r"target=labl.*did you mean label"):
        evaluate(replace(by_file, target="labl"), quiet=True)


def test_a_key_that_names_a_file_or_its_columns_is_used_or_refused(tmp_path: Path) -> None:
    path = member(tmp_path, "a", 1.0, rows=30) / "predictions" / "val"
    for key in ("target", "id"):
        with pytest.raises(ConfigError, match=f"{key}=x needs references=FILE"):
            evaluate(EvaluateConfig(predictions=str(path), **{key: "x"}), quiet=True)
    for values in ({"template": "sample.csv"}, {"columns": {"a": "A"}}):
        with pytest.raises(ConfigError, match="only format=submission has one"):
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
        task = ["model=tfidf", "task=classification", "data=classification", "data.columns.target=writer"]
        small = ["data.num_folds=3", "logger=none", f"data.files={files}", f"output_dir={tmp_path}"]
        return compose(*task, *small, *overrides)

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
    predictions = Predictions.load(joined / "predictions" / "val")
    assert predictions.ids == [str(n) for n in range(120)], "each row once, in the file's order"
    each = [Predictions.load(Path(run) / "predictions" / "hidden").values for run in runs]
    assert Predictions.load(joined / "predictions" / "hidden").values == pytest.approx(np.mean(each, axis=0))
    record = json.loads((joined / "folds.json").read_text())
    assert record["score"]["logloss"] == pytest.approx(logloss(predictions.references(), predictions.values))
    assert record["spread"]["logloss"] == pytest.approx(np.std([entry["logloss"] for entry in record["folds"]], ddof=1))
    twice = Path(runs[0]) / "predictions" / "val"
    predictions = Predictions.load(twice)
    predictions.ids[0] = Predictions.load(Path(runs[1]) / "predictions" / "val").ids[0]
    predictions.save(twice)
    with pytest.raises(DataError, match="1 rows are in two folds"):
        folds(FoldsConfig(output_dir=str(tmp_path)), quiet=True)
    again = refit_config(RefitConfig(runs=runs))
    assert train(again, quiet=True) is None
    (refitted,) = (tmp_path / "runs").glob("*-all-*")
    after = json.loads((refitted / "run.json").read_text())["result"]["after"]
    assert set(after.values()) == {None}
    check_submission(refitted, files, tmp_path)


def check_submission(run: Path, files: str, tmp_path: Path) -> None:
    sample = tmp_path / "sample_submission.csv"
    names = ["Zoe", "Ann", "Ben", "Eve", "Max", "Sue", "Tom"]
    header = ["id", *(f"writer_{name}" for name in names)]

    def ask(rows: list[int], columns: list[str]) -> list[Path]:
        lines = [",".join([str(n), *["0"] * (len(columns) - 1)]) for n in rows]
        sample.write_text("\n".join([",".join(columns), *lines]))
        return predict(question(run, files, format=PredictionFormat.submission, template=str(sample)), quiet=True)

    (folder,) = ask(list(range(20))[::-1], header)
    predictions = Predictions.load(folder)
    with (folder / "submission.csv").open() as file:
        written = list(csv.reader(file))
    assert written[0] == header
    assert [row[0] for row in written[1:]] == [str(n) for n in range(20)][::-1]
    by_class = dict(zip(predictions.labels, predictions.values[19], strict=True))
    assert [float(cell) for cell in written[1][1:]] == [by_class[name] for name in names]
    with pytest.raises(DataError, match="1 predicted rows are not in it"):
        ask(list(range(19)), header)
    with pytest.raises(DataError, match="1 of its rows are not predicted"):
        ask(list(range(21)), header)
    with pytest.raises(ConfigError, match="the class Zoe has no column"):
        ask(list(range(20)), ["id", *header[2:]])
    with pytest.raises(ConfigError, match="no class matches the column writer_Bob"):
        ask(list(range(20)), [*header[:-1], "writer_Bob"])


def test_the_baselines_loss_is_of_what_it_writes(baseline: Callable[..., Any], tmp_path: Path) -> None:
    loss = train(baseline(), quiet=True)
    predictions = Predictions.load(run_directory(tmp_path) / "predictions" / "val")
    assert loss == pytest.approx(logloss(predictions.references(), predictions.values), abs=1e-9)
    (again,) = predict(question(run_directory(tmp_path), table(tmp_path / "train.csv", 120)), quiet=True)
    both = Predictions.load(again)
    rows = [both.ids.index(name) for name in predictions.ids]
    assert both.values[rows] == pytest.approx(predictions.values, abs=1e-12)
    assert train(baseline(), quiet=True) == loss, "the finished run is found"
    with pytest.raises(ConfigError, match="writes no text"):
        train(baseline("task=language_modeling"), quiet=True)


def trained_folds(baseline: Callable[..., Any], tmp_path: Path) -> list[str]:
    """Run directories of all three folds."""
    for fold in range(3):
        train(baseline(f"data.fold={fold}"), quiet=True)
    return sorted(str(path) for path in (tmp_path / "runs").iterdir())


def with_old_names(run: Path) -> None:
    """Writes a run's config with the names that its keys had in the last release."""
    config = OmegaConf.load(run / "config.yaml")
    for old, new in RENAMED.items():
        group, key = new.split(".")
        config[group][old.rpartition(".")[2]] = config[group].pop(key)
    OmegaConf.save(config, run / "config.yaml")


def template(tmp_path: Path, rows: int) -> str:
    names = ["Ann", "Ben", "Eve", "Max", "Sue", "Tom", "Zoe"]
    lines = [",".join([str(n), *["0"] * 7]) for n in range(rows)]
    (tmp_path / "sample.csv").write_text("\n".join([",".join(["id", *names]), *lines]))
    return str(tmp_path / "sample.csv")


def test_folds_and_blends_predict_with_their_members_and_submit_in_one_command(
    baseline: Callable[..., Any], tmp_path: Path
) -> None:
    runs = trained_folds(baseline, tmp_path)
    with_old_names(Path(runs[2]))
    first, last = (RunRecord(Path(run)).config for run in (runs[0], runs[2]))
    assert {key for key in first | last if first.get(key) != last.get(key)} == {"data.fold"}
    files = table(tmp_path / "test.csv", 20, known=False)
    options: dict[str, Any] = {"format": PredictionFormat.submission, "template": template(tmp_path, 20)}
    (joined,) = folds(FoldsConfig(runs=f"{tmp_path}/runs/*", output_dir=str(tmp_path)), quiet=True)
    with pytest.raises(DataError, match=r"python -m llmft\.predict run=.* data\.files=FILE"):
        folds(FoldsConfig(runs=runs, output_dir=str(tmp_path), **options), quiet=True)
    blended = blend(BlendConfig(runs=[str(joined), str(copy_of(joined))], output_dir=str(tmp_path)), quiet=True)
    (joined_folder, blended_folder) = predict(question([str(joined), str(blended)], files, **options), quiet=True)
    each = [Predictions.load(Path(run) / "predictions" / joined_folder.name).values for run in runs]
    assert Predictions.load(joined_folder).values == pytest.approx(np.mean(each, axis=0))
    assert Predictions.load(blended_folder).values == pytest.approx(np.mean(each, axis=0)), "two equal members"
    one = (joined_folder / "submission.csv").read_text()
    for path in (joined_folder, blended_folder):
        (path / "submission.csv").unlink()
    folds(FoldsConfig(runs=runs, output_dir=str(tmp_path), **options), quiet=True)
    assert (joined_folder / "submission.csv").read_text() == one, "joining what is predicted gives the same"
    blend(BlendConfig(runs=[str(joined), str(copy_of(joined))], output_dir=str(tmp_path), **options), quiet=True)
    assert (blended_folder / "submission.csv").is_file()
    shutil.rmtree(runs[0])
    with pytest.raises(ConfigError, match=r"its member .*fold0.* is missing"):
        predict(question([str(blended)], files), quiet=True)


def copy_of(joined: Path) -> Path:
    target = joined.with_name("copy")
    if not target.exists():
        shutil.copytree(joined, target)
    else:
        shutil.copytree(joined / "predictions", target / "predictions", dirs_exist_ok=True)
    return target


def test_a_glob_leaves_out_what_cannot_be_used_and_a_name_is_refused(
    baseline: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained_folds(baseline, tmp_path)
    every, files = f"{tmp_path}/runs/*", table(tmp_path / "test.csv", 5, known=False)
    config = refit_config(RefitConfig(runs=every))
    train(config, quiet=True)
    (refitted,) = (tmp_path / "runs").glob("*-all-*")
    Run(refitted, "").update(status="interrupted")  # as a kill leaves it
    (tmp_path / "runs" / "foreign").mkdir()
    left_out: list[str] = []
    assert refit_config(RefitConfig(runs=every), left_out.append) == config, "the same command goes on"
    assert len(left_out) == 2
    assert len(predict(question([every], files))) == 3
    folds(FoldsConfig(runs=every, output_dir=str(tmp_path)))
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.count("left out:") == 4
    assert "this run is interrupted, not done" in printed
    for command in (
        lambda: refit_config(RefitConfig(runs=str(refitted))),
        lambda: predict(question([str(refitted)], files), quiet=True),
        lambda: folds(FoldsConfig(runs=[str(refitted)], output_dir=str(tmp_path)), quiet=True),
    ):
        with pytest.raises(ConfigError, match="-all-"):
            command()


def test_blank_numbers_are_not_told_as_numbers_that_are_not_finite(
    baseline: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):  # trained, then found
        train(baseline("data.train_on=all"))
        printed = capsys.readouterr().out
        assert "not finite" not in printed
        assert "Validation metrics are not reported, because those rows are trained on." in printed


@pytest.mark.parametrize("answer", ["logger=false", "logger=none", "logger=null", "logger=csv", "logger=true"])
def test_refit_takes_its_logger_as_training_does_and_as_yes_or_no(
    baseline: Callable[..., Any], tmp_path: Path, answer: str
) -> None:
    train(baseline("logger=tensorboard"), quiet=True)
    config = compose(*yes_or_no([f"runs={tmp_path}/runs/*", answer]), verb="refit", kind=RefitConfig)
    loggers = {"logger=csv": ["csv"], "logger=true": ["tensorboard"]}.get(answer, [])
    assert list(refit_config(config).logger.loggers) == loggers


@pytest.mark.parametrize(
    ("prompts", "texts"),
    [
        ("[\"It's so, isn't it?\"]", ["It's so, isn't it?"]),
        ("[It's so, isn't it?]", ["It's so, isn't it?"]),  # as bash passes it
        ("[Hello, world,What now?]", ["Hello, world", "What now?"]),
        ("['a, b','c']", ["a, b", "c"]),
        ("Who wrote ${oc.env:HOME} (this) text?", ["Who wrote ${oc.env:HOME} (this) text?"]),
        ("[]", []),
    ],
)
def test_prompts_are_what_the_shell_hands_over(prompts: str, texts: list[str]) -> None:
    assert texts_of(prompts) == texts


def test_prompts_and_files_of_the_prompt_alone_are_predicted_alike(
    baseline: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(baseline("data.columns.text=null", "data.columns.prompt='{text}!'"), quiet=True)
    run = run_directory(tmp_path)
    texts = ["The fox lost a shoe.", "It's late, again!"]
    (of_prompts,) = predict(PredictConfig(run=str(run), prompts=texts))
    printed = capsys.readouterr().out
    predictions = Predictions.load(of_prompts)
    assert "each is used as the whole prompt ('{text}!' in the training)" in " ".join(printed.split())
    assert all(text in printed for text in texts)
    assert printed.count("%") == 2 * len(predictions.labels)
    (tmp_path / "lines.txt").write_text("\n".join(texts))
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"id": n, "prompt": t}) + "\n" for n, t in enumerate(texts))
    )
    (tmp_path / "rows.csv").write_text("question\n" + "\n".join(f'"{text}"' for text in texts))
    for name in ("rows.jsonl", "rows.csv"):
        (folder,) = predict(question(run, str(tmp_path / name)))
        assert Predictions.load(folder).values == pytest.approx(predictions.values)
        assert "is used as the whole prompt" in " ".join(capsys.readouterr().out.split())
    (folder,) = predict(question(run, str(tmp_path / "lines.txt")), quiet=True)  # `text` is the training's own column
    assert Predictions.load(folder).ids == ["lines.txt:1", "lines.txt:2"]
    with pytest.raises(ConfigError, match=r"prompts: no text"):
        predict(PredictConfig(run=str(run), prompts=[]))
    with pytest.raises(ConfigError, match="one of the two"):
        PredictConfig(run=str(run), prompts=texts, data=PredictData("x.csv"))


def test_rows_are_named_by_the_samples_id_column(baseline: Callable[..., Any], tmp_path: Path) -> None:
    train(baseline(), quiet=True)
    (tmp_path / "test.csv").write_text("row_id,text\n7,The fox.\n9,A shoe.\n")
    sample = Path(template(tmp_path, 0))
    sample.write_text(sample.read_text().replace("id,", "row_id,", 1) + "\n9,0,0,0,0,0,0,0\n7,0,0,0,0,0,0,0\n")
    options: dict[str, Any] = {"format": PredictionFormat.submission, "template": str(sample)}
    (folder,) = predict(question(run_directory(tmp_path), str(tmp_path / "test.csv"), **options), quiet=True)
    assert Predictions.load(folder).ids == ["7", "9"]
    named = PredictConfig(run=str(run_directory(tmp_path)), data=PredictData(str(tmp_path / "test.csv"), id="rowid"))
    with pytest.raises(DataError, match=r"data\.id=rowid: .*test\.csv:2 has none; did you mean row_id"):
        predict(named, quiet=True)


# ---------------------------------------------------------------------------------------------- predict with a model


@pytest.mark.slow
@pytest.mark.parametrize("head", ["linear", "tokens"])
def test_an_opened_run_predicts_what_it_validated(
    small: Callable[..., Any], tmp_path: Path, head: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Head and adapter survive the disk; a kill half-way costs one part; a run with another base is refused."""
    files = table(tmp_path / "train.csv", 60)
    overrides = ["task=classification", f"task.head={head}", "task.generate_rows=0", "data=classification"]
    overrides += ["data.columns.target=writer", f"data.files={files}", "data.rows={}"]
    train(small(*overrides), quiet=True)
    run = run_directory(tmp_path)
    validated = Predictions.load(run / "predictions" / "val")

    from llmft.evaluation import predictor

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
    predictions = Predictions.load(folder)
    assert predictions.ids == [str(n) for n in range(60)]
    rows = [predictions.ids.index(name) for name in validated.ids]
    assert predictions.values[rows] == pytest.approx(validated.values, abs=1e-6)
    assert not (folder / "parts").exists()
    before = predictions.fingerprint
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
    predictions = Predictions.load(folder)
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    for sample in [entry for entry in samples if entry["step"] == 40]:
        row = int(sample["where"].rpartition(":")[2]) - 1
        assert predictions.columns["generated"][row] == sample["generated"]
    assert all(value <= 0 for value in predictions.columns["logprob"])


@pytest.mark.slow
def test_a_chat_models_prompt_is_a_turn_of_its_user_wherever_it_comes_from(
    small: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"messages": [{"role": "user", "content": f"Q {n}?"}, {"role": "assistant", "content": "A."}]}
        for n in range(40)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train(small("data=messages", f"data.files={tmp_path}/rows.jsonl", "data.rows={}"), quiet=True)
    run, prompt = run_directory(tmp_path), "What is it?"
    (of_prompt,) = predict(PredictConfig(run=str(run), prompts=prompt))
    text = Predictions.load(of_prompt).columns["generated"]
    assert prompt in (printed := capsys.readouterr().out)
    assert text[0] in printed
    for name, row in (("m", {"messages": [{"role": "user", "content": prompt}]}), ("p", {"prompt": prompt})):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row))
        (folder,) = predict(question(run, str(tmp_path / f"{name}.jsonl")), quiet=True)
        assert Predictions.load(folder).columns["generated"] == text
