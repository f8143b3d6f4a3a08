"""Metrics against independent implementations."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from llmft.metrics import classification, multilabel, regression, text


def random_case(rows: int = 400, classes: int = 7, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.integers(classes, size=rows), rng.dirichlet(np.full(classes, 0.4), size=rows)


@pytest.mark.parametrize("seed", range(3))
def test_logloss_is_scikit_learns_to_one_in_a_billion(seed: int) -> None:
    from sklearn.metrics import log_loss

    targets, chance = random_case(seed=seed)
    assert classification.logloss(targets, chance) == pytest.approx(
        log_loss(targets, chance, labels=range(7)), abs=1e-9
    )


def test_a_class_given_no_chance_costs_what_the_competition_charges() -> None:
    loss = classification.logloss([0, 1], np.asarray([[0.0, 1.0], [0.0, 1.0]]))
    assert loss == pytest.approx(-math.log(1e-15) / 2, rel=1e-9)


def test_a_class_that_is_in_no_row_does_not_shift_the_others() -> None:
    targets, chance = random_case(classes=4)
    present = targets < 3
    direct = -np.log(chance[present, targets[present]]).mean()
    assert classification.logloss(targets[present], chance[present]) == pytest.approx(direct, abs=1e-9)


def test_area_accuracy_f1_and_calibration_are_torchmetrics() -> None:
    from torchmetrics.functional.classification import (
        multiclass_accuracy,
        multiclass_auroc,
        multiclass_calibration_error,
        multiclass_f1_score,
    )

    targets, chance = random_case()
    true_classes, theirs = torch.tensor(targets), torch.tensor(chance)
    for ours, reference in (
        (classification.accuracy, multiclass_accuracy(theirs, true_classes, 7, average="micro")),
        (classification.macro_f1, multiclass_f1_score(theirs, true_classes, 7, average="macro")),
        (classification.auc, multiclass_auroc(theirs, true_classes, 7, average="macro")),
        (classification.calibration_error, multiclass_calibration_error(theirs, true_classes, 7, n_bins=15)),
    ):
        assert ours(targets, chance) == pytest.approx(float(reference), abs=1e-6), ours.__name__


def test_the_area_of_a_single_class_is_not_a_number_and_ties_count_half() -> None:
    assert math.isnan(classification.auc([0, 0], np.asarray([[0.5, 0.5], [0.6, 0.4]])))
    assert classification.areas_under_roc(np.asarray([[True], [False]]), np.ones((2, 1))) == [0.5]


def test_confusion_counts_true_by_likeliest() -> None:
    assert classification.confusion([0, 1, 1], [[0.9, 0.1], [0.8, 0.2], [0.1, 0.9]]) == [[1, 0], [1, 1]]


def test_several_classes_are_scored_class_by_class() -> None:
    from sklearn.metrics import log_loss, roc_auc_score

    rng = np.random.default_rng(0)
    targets, chance = rng.integers(2, size=(200, 3)), rng.uniform(size=(200, 3))
    expected = np.mean([log_loss(targets[:, k], chance[:, k]) for k in range(3)])
    assert multilabel.logloss(targets, chance) == pytest.approx(expected, abs=1e-9)
    assert multilabel.auc(targets, chance) == pytest.approx(roc_auc_score(targets, chance, average="macro"))
    assert multilabel.accuracy([[1, 0]], [[0.9, 0.6]]) == 0.0


def test_numbers_are_scored_in_their_own_unit() -> None:
    from scipy.stats import spearmanr

    rng = np.random.default_rng(0)
    targets = rng.normal(size=50)
    predicted = targets + rng.normal(size=50)
    assert regression.rmse([1.0, 3.0], [[1.0], [5.0]]) == pytest.approx(math.sqrt(2))
    assert regression.mae([1.0, 3.0], [[1.0], [5.0]]) == 1.0
    assert regression.spearman(targets, predicted) == pytest.approx(spearmanr(targets, predicted).statistic)
    assert math.isnan(regression.pearson([1.0, 1.0], [1.0, 2.0]))


def test_words_in_common_make_token_f1() -> None:
    assert text.token_f1(["the cat sat"], ["The cat ran"]) == pytest.approx(2 / 3)
    assert text.token_f1(["a a b"], ["a"]) == pytest.approx(0.5)
    assert text.token_f1(["", "x"], ["", ""]) == 0.5


def test_equal_texts_are_perfect_and_different_ones_are_not() -> None:
    same = ["the cat sat on the mat today", "a dog ran over a hill in the rain"]
    other = ["nothing here is as it was", "nobody knows what they want"]
    for metric in (text.bleu, text.rouge_l, text.token_f1, text.exact_match):
        assert metric(same, same) == pytest.approx(1.0)
        assert metric(same, other) < 0.2
    with pytest.raises(ValueError, match="1 references but 2"):
        text.bleu(["a"], ["a", "b"])


@pytest.mark.slow
def test_sharpened_cosine_is_the_cube_of_the_cosine_of_the_encoders_vectors(tmp_path: Path) -> None:
    from llmft.core.errors import ConfigError
    from tests.test_experiments import tiny_encoder

    folder = str(tiny_encoder(tmp_path))
    from sentence_transformers import SentenceTransformer

    texts = ["the cat sat", "a dog ran"]
    one, other = SentenceTransformer(folder, device="cpu").encode(texts).astype(np.float64)
    cosine = one @ other / np.linalg.norm(one) / np.linalg.norm(other)
    assert text.sharpened_cosine(texts[:1], texts[1:], encoder=folder) == pytest.approx(cosine**3, abs=1e-5)
    assert text.sharpened_cosine(texts, texts, encoder=folder) == pytest.approx(1.0, abs=1e-5)
    with pytest.raises(ConfigError, match="encoder"):
        text.sharpened_cosine(texts, texts, encoder=str(tmp_path))
