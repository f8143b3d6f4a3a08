"""Predictions in the format of a competition's sample: one function for predict, folds and blend."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmft.core.console import Screen
from llmft.core.errors import ConfigError, DataError
from llmft.evaluation.submission import read_template, write_fitting, write_submission
from llmft.runs.predictions import Predictions

VALUES = np.asarray([[0.1, 0.7, 0.2], [0.5, 0.2, 0.3]])


def written(tmp_path: Path, sample: str, predictions: Predictions, **columns: str) -> list[list[str]]:
    (tmp_path / "sample.csv").write_text(sample)
    template, path = read_template(tmp_path / "sample.csv"), tmp_path / "submission.csv"
    path = write_submission(predictions, template, columns, path, Screen(quiet=True))
    with path.open() as file:
        return list(csv.reader(file))


@pytest.mark.parametrize(
    ("sample", "cells"),
    [
        ("id,label\nx,a\ny,a\n", ["b", "a"]),
        ("id,label\nx,\ny,\n", ["b", "a"]),
        ("id,label\nx,a b c\ny,a b c\n", ["b c a", "a c b"]),  # MAP@3
        ("id,label\nx,c|a\ny,a|b\n", ["b|c", "a|c"]),
        ("id,is_b\nx,0.5\ny,0.5\n", ["0.7", "0.2"]),  # named after a class
    ],
)
def test_one_column_gets_what_the_sample_has_in_it(tmp_path: Path, sample: str, cells: list[str]) -> None:
    rows = written(tmp_path, sample, Predictions(["y", "x"], ["a", "b", "c"], VALUES[::-1]))
    assert [row[1] for row in rows[1:]] == cells
    assert [row[0] for row in rows[1:]] == ["x", "y"], "the sample's order"


def test_a_probability_is_written_where_the_sample_has_numbers_and_never_guessed(tmp_path: Path) -> None:
    two = Predictions(["x", "y"], ["0", "1"], VALUES[:, :2])
    assert [row[1] for row in written(tmp_path, "id,generated\nx,0.1\ny,0.1\n", two)[1:]] == ["0.7", "0.2"]
    assert [row[1] for row in written(tmp_path, "id,generated\nx,0\ny,1\n", two)[1:]] == ["1", "0"]
    sample = "id,generated\nx,0\ny,1\n"
    assert [row[1] for row in written(tmp_path, sample, two, **{"0": "generated"})[1:]] == ["0.1", "0.5"]
    names = Predictions(["x", "y"], ["human", "model"], VALUES[:, :2])
    with pytest.raises(ConfigError, match=r"has numbers such as 0\.1.*columns\.CLASS=generated"):
        written(tmp_path, "id,generated\nx,0.1\ny,0.1\n", names)
    with pytest.raises(ConfigError, match=r"columns\.model=genrated: the template has no such column; did you mean"):
        written(tmp_path, "id,generated\nx,0.1\ny,0.1\n", names, model="genrated")


def test_several_classes_numbers_and_texts_have_their_own_form(tmp_path: Path) -> None:
    several = Predictions(["x", "y"], ["a", "b", "c"], np.asarray([[0.9, 0.1, 0.6], [0.1, 0.2, 0.3]]), "multi_label")
    assert [row[1] for row in written(tmp_path, "id,tags\nx,a b\ny,b c\n", several)[1:]] == ["a c", ""]
    assert written(tmp_path, "id,c,b,a\nx,0,0,0\ny,0,0,0\n", several)[1][1:] == ["0.6", "0.1", "0.9"]
    number = Predictions(["x", "y"], ["score"], np.asarray([[1.5], [2.5]]), "regression")
    assert [row[1] for row in written(tmp_path, "id,target\nx,0\ny,0\n", number)[1:]] == ["1.5", "2.5"]
    text = Predictions(["x", "y"], [], np.zeros((2, 0)), "text", columns={"generated": ["Rewrite, please", "b"]})
    assert written(tmp_path, "id,rewrite_prompt\nx,-\ny,-\n", text)[1] == ["x", "Rewrite, please"]


@pytest.mark.parametrize(
    ("ids", "values", "error"),
    [
        (["x"], VALUES[:1], r"1 of its rows are not predicted \(y first\)"),
        (["x", "y", "z"], np.ones((3, 3)), r"1 predicted rows are not in it \(z first\)"),
        (["test.csv:2", "test.csv:3"], VALUES, r"\(x first\); predicted rows have ids such as test\.csv:2"),
        (["x", "y"], np.asarray([[0.1, 0.9, 0], [np.nan, 0.5, 0.5]]), "of the row y is not finite"),
    ],
)
def test_rows_that_do_not_match_are_named(tmp_path: Path, ids: list[str], values: Any, error: str) -> None:
    with pytest.raises(DataError, match=error):
        written(tmp_path, "id,a,b,c\nx,0,0,0\ny,0,0,0\n", Predictions(ids, ["a", "b", "c"], values))
    assert not (tmp_path / "submission.csv").exists()


def test_a_member_submits_the_predictions_of_the_samples_rows_or_says_how_to_make_them(tmp_path: Path) -> None:
    (tmp_path / "sample.csv").write_text("id,a,b,c\nx,0,0,0\ny,0,0,0\n")
    template, screen = read_template(tmp_path / "sample.csv"), Screen(quiet=True)
    held_out = Predictions(["1", "2"], ["a", "b", "c"], VALUES)
    test, other = Predictions(["y", "x"], ["a", "b", "c"], VALUES), Predictions(["u"], ["a", "b", "c"], VALUES[:1])
    path = write_fitting({"val": held_out, "more": other, "new": test}, template, {}, tmp_path / "M", screen)
    assert path == tmp_path / "M" / "predictions" / "new" / "submission.csv"
    with pytest.raises(DataError, match=r"python -m llmft\.predict run=.*M data\.files=FILE format=submission"):
        write_fitting({"val": held_out}, template, {}, tmp_path / "M", screen)
    second = Predictions(["y", "x"], ["a", "b", "c"], VALUES[::-1])
    with pytest.raises(ConfigError, match="new, old are different predictions of the rows"):
        write_fitting({"new": test, "old": second}, template, {}, tmp_path / "M", screen)
