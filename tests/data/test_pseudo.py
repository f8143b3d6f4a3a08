"""Pseudo-labels: minimum confidence, cap and weight, and never a held-out row."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmft.core.errors import ConfigError, DataError
from llmft.data.batch import weight_of
from llmft.data.examples import Example
from llmft.data.pseudo import prompt_content
from llmft.runs.predictions import Predictions
from llmft.training.prepare import RunInputs, prepare
from tests.conftest import compose

QUESTIONS, ANSWERS = 20, 2


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Training rows; and rows to predict, of which half repeat a training row and a quarter only its question."""
    train, test = [], []
    for n in range(QUESTIONS):
        for answer in range(ANSWERS):
            train.append([f"{n}-{answer}", f"Question {n}", f"Answer {answer} to {n}", "ab"[answer]])
        test += [[f"t{n}", f"Question {n}", f"Answer 0 to {n}"], [f"u{n}", f"Question {n}", f"new {n}"]]
        test += [[f"v{n}-{k}", f"Other question {n}", f"new {k} {n}"] for k in range(2)]
    for name, rows, header in (
        ("train", train, ["id", "Question", "Response", "target"]),
        ("test", test, ["id", "Question", "Response"]),
    ):
        with (tmp_path / f"{name}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([header, *rows])
    chance = np.random.default_rng(0).uniform(0.5, 1.0, len(test))
    values = np.stack([chance, 1 - chance], axis=1)
    values[1::3] = values[1::3, ::-1]
    provenance = {"files": [str(tmp_path / "test.csv")], "id_column": "id"}
    Predictions([row[0] for row in test], ["a", "b"], values, provenance=provenance).save(tmp_path / "predicted")
    return tmp_path


def prepared(files: Path, *overrides: str) -> RunInputs:
    arguments = ["task=classification", "model=tfidf", "data=predict_llm", f"data.files={files}/train.csv"]
    config = compose(*arguments, f"data.pseudo={files}/predicted", f"output_dir={files}", *overrides)
    return prepare(config, open_directory=False)


@pytest.mark.parametrize("head", ["linear", "tokens"])
def test_no_pseudo_row_shares_content_or_group_with_a_held_out_row(files: Path, head: str) -> None:
    config = prepared(files, "data.fold=0", f"task.head={head}").config
    for fold in range(5):
        of_fold = replace(config, data=replace(config.data, fold=fold))
        check_apart(prepare(of_fold, open_directory=False))


def check_apart(inputs: RunInputs) -> None:
    validation = inputs.conversations["validation"]
    pseudo = inputs.pseudo.conversations
    assert not {prompt_content(row) for row in validation} & {prompt_content(row) for row in pseudo}
    assert not {row.group for row in validation} & {row.group for row in pseudo}
    # Two of each held-out question: the row itself and the one with a new answer.
    assert inputs.pseudo.held_out == 2 * len({row.group for row in validation})
    contents = [prompt_content(row) for row in inputs.conversations["train"]]
    assert len(set(contents)) == len(contents)
    assert inputs.pseudo.offered == 4 * QUESTIONS
    counts = inputs.pseudo
    assert counts.used + counts.held_out + counts.repeated + counts.unsure + counts.over_cap == counts.offered
    assert len(pseudo) == counts.used > 0


def test_the_floor_keeps_sure_rows_and_the_cap_the_surest_of_each_class(files: Path) -> None:
    everything = prepared(files)
    sure = prepared(files, "data.pseudo_min_confidence=0.8")
    assert 0 < sure.pseudo.used < everything.pseudo.used
    values = dict(zip(*(lambda p: (p.ids, p.values.max(axis=1)))(Predictions.load(files / "predicted")), strict=True))
    assert all(values[row.id.removeprefix("pseudo:")] >= 0.8 for row in sure.pseudo.conversations)
    capped = prepared(files, "data.pseudo_max_per_class=3")
    assert capped.pseudo.classes == {"a": 3, "b": 3}
    for target in (0, 1):
        before, after = (
            sorted((values[r.id[7:]] for r in inputs.pseudo.conversations if r.target == target), reverse=True)
            for inputs in (everything, capped)
        )
        assert after == before[:3]


def test_the_weight_is_the_rows_share_of_the_loss_and_all_of_it_is_in_the_key(files: Path) -> None:
    inputs = prepared(files, "data.pseudo_weight=0.25")
    weights = {row.id.startswith("pseudo:"): row.weight for row in inputs.conversations["train"]}
    assert weights == {False: 1.0, True: 0.25}
    assert weight_of(Example([1, 2], [-100, -100], inputs.pseudo.conversations[0])) == 0.25
    keys = {
        prepared(files, *more).run.key for more in ([], ["data.pseudo_weight=0.25"], ["data.pseudo_min_confidence=0.9"])
    }
    assert len(keys) == 3
    assert prepared(files, "data.pseudo=null").run.key not in keys


def test_predictions_that_do_not_fit_are_refused(files: Path) -> None:
    with pytest.raises(ConfigError, match="same order"):
        prepared(files, "data.labels=[b,a]")
    (files / "test.csv").write_text("id,Question,Response\nt0,Question 0,Answer 0 to 0\n")
    with pytest.raises(DataError, match=r"the row .* is not in"):
        prepared(files)
    with pytest.raises(ConfigError, match=r"data\.pseudo"):
        prepared(files, "data.pseudo=nowhere")


def test_a_file_of_rows_with_targets_is_taken_too(files: Path) -> None:
    rows: list[list[Any]] = [["Question", "Response", "target", "confidence"]]
    rows += [[f"More {n}", f"text {n}", "ab"[n % 2], 0.5 + n / 20] for n in range(10)]
    with (files / "more.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    inputs = prepared(files, f"data.pseudo={files}/more.csv", "data.pseudo_min_confidence=0.75")
    assert inputs.pseudo.used == 5


def test_a_confidence_that_is_no_probability_and_rows_that_are_not_asked_for_are_refused(files: Path) -> None:
    for wrong in ("nan", "inf", "97"):
        (files / "p.csv").write_text(f"id,Question,Response,target,confidence\n1,Q,R,a,0.9\n2,Q2,R,a,{wrong}\n")
        with pytest.raises(DataError, match=rf"p\.csv:3: its confidence '{wrong}' is not a probability"):
            prepared(files, f"data.pseudo={files}/p.csv")
    with pytest.raises(ConfigError, match=r"data\.pseudo_rows is for a directory of predictions"):
        prepared(files, f"data.pseudo={files}/p.csv", f"data.pseudo_rows={files}/test.csv")
