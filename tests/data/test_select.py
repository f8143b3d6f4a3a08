"""Properties of row selection and of folds."""

from __future__ import annotations

import csv
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from llmft.data.select import assign_folds, diverse


def planted(sizes: list[int]) -> tuple[list[str], list[int]]:
    """Texts of several topics, each with its own vocabulary, and the topic of each text."""
    rng = random.Random(0)
    topics = [topic for topic, size in enumerate(sizes) for _ in range(size)]
    texts = [" ".join(f"topic{topic}word{rng.randrange(30)}" for _ in range(20)) for topic in topics]
    return texts, topics


def shuffled(count: int) -> list[int]:
    return random.Random(7).sample(range(count), count)


def test_a_diverse_choice_covers_small_clusters_that_a_random_one_misses() -> None:
    sizes = [800, 100, 30, 20, 10, 10, 5, 5, 3, 3]
    texts, topics = planted(sizes)
    for seed in range(5):
        chosen = diverse(texts, 20, seed)
        assert len(set(chosen)) == 20
        assert {topics[row] for row in chosen} == set(range(len(sizes)))
        assert len({topics[row] for row in random.Random(seed).sample(range(len(texts)), 20)}) < len(sizes)


@pytest.mark.parametrize("sizes", [[40, 10], [300, 50, 20]])
def test_the_texts_chosen_do_not_depend_on_the_order_of_rows(sizes: list[int]) -> None:
    texts, _ = planted(sizes)
    order = shuffled(len(texts))
    chosen = diverse(texts, 12, 3)
    again = diverse([texts[row] for row in order], 12, 3)
    assert chosen == diverse(texts, 12, 3) == sorted(set(chosen))
    assert {texts[row] for row in chosen} == {texts[order[row]] for row in again}
    assert diverse(texts, 12, 4) != chosen


@pytest.mark.parametrize("count", [0, 1, 5, 12, 19, 20, 21])
def test_as_many_different_rows_are_chosen_as_asked_for(count: int) -> None:
    texts = ["a", "b", "", " ", "!", "我们", "我 们", *(f"text number {n}" for n in range(5)), *["copy"] * 8]
    chosen = diverse(texts, count, 0)
    assert len(set(chosen)) == len(chosen) == min(count, len(texts))
    assert chosen == sorted(chosen)


def test_copies_are_chosen_only_when_the_different_texts_run_out() -> None:
    texts = ["the same text"] * 50 + [f"another text about {n}" for n in range(10)]
    assert Counter(texts[row] for row in diverse(texts, 11, 0)).most_common(1)[0][1] == 1
    assert Counter(texts[row] for row in diverse(texts, 13, 0))["the same text"] == 3
    assert diverse(["x"] * 9, 4, 0) == [0, 1, 2, 3]


def test_each_row_has_one_fold_and_folds_differ_by_one_row_at_most() -> None:
    for rows, folds in [(2, 2), (10, 3), (101, 5), (1000, 10)]:
        dealt = assign_folds([f"row {n}" for n in range(rows)], folds, 0)
        counts = Counter(dealt)
        assert len(dealt) == rows
        assert set(counts) == set(range(folds))
        assert max(counts.values()) - min(counts.values()) <= 1


def random_rows(seed: int) -> tuple[list[str], list[str], list[str]]:
    """Keys with copies, targets of unequal size, and groups."""
    rng = random.Random(seed)
    keys = [f"row {rng.randrange(300)}" for _ in range(200)]
    targets = rng.choices("abcd", [50, 30, 15, 5], k=200)
    return keys, targets, [f"group {int(rng.paretovariate(1)) % 40}" for _ in keys]


@pytest.mark.parametrize("seed", range(5))
def test_a_permutation_of_rows_permutes_their_folds_alike(seed: int) -> None:
    keys, targets, groups = random_rows(seed)
    targets = [target_of[key] for target_of in [dict(zip(keys, targets, strict=True))] for key in keys]
    order = shuffled(len(keys))
    for named in ({}, {"targets": targets}, {"groups": groups}, {"targets": targets, "groups": groups}):
        folds = assign_folds(keys, 4, seed, **named)
        moved = {name: [values[row] for row in order] for name, values in named.items()}
        again = assign_folds([keys[row] for row in order], 4, seed, **moved)
        assert again == [folds[row] for row in order]


@pytest.mark.parametrize("seed", range(5))
def test_copies_and_groups_are_never_split(seed: int) -> None:
    keys, targets, _ = random_rows(seed)
    number = {key: index for index, key in enumerate(sorted(set(keys)))}
    groups = [f"group {number[key] // 3}" for key in keys]
    for named in ({}, {"targets": targets}, {"groups": groups}, {"targets": targets, "groups": groups}):
        folds = assign_folds(keys, 5, seed, **named)
        for names in (keys, *([groups] if "groups" in named else [])):
            assert len(set(zip(names, folds, strict=True))) == len(set(names))


def test_groups_that_share_a_row_stay_together() -> None:
    folds = assign_folds(["a", "b", "b", "c", "c", "d", "e"], 2, 0, groups=["1", "1", "2", "2", "3", "3", "4"])
    assert len(set(folds[:6])) == 1
    assert folds[6] != folds[0]
    with pytest.raises(ValueError, match="3 folds need at least 3 different groups, but there are 2"):
        assign_folds(["a", "b", "b", "c", "c", "d", "e"], 3, 0, groups=["1", "1", "2", "2", "3", "3", "4"])


@pytest.mark.parametrize("seed", range(5))
def test_without_groups_every_fold_has_its_share_of_each_target_and_of_all_within_one_row(seed: int) -> None:
    rng = random.Random(seed)
    targets = rng.choices("abcdefg", [60, 20, 10, 5, 3, 1, 1], k=997)
    folds = assign_folds([f"row {n}" for n in range(997)], 5, seed, targets=targets)
    counts = Counter(zip(folds, targets, strict=True))
    for target, total in Counter(targets).items():
        assert all(abs(counts[fold, target] - total / 5) < 1 for fold in range(5))
    assert sorted(Counter(folds).values()) == [199, 199, 199, 200, 200]


def test_targets_that_are_all_different_leave_the_dealing_to_the_seed() -> None:
    names = [f"row {n}" for n in range(100)]
    assert len({tuple(assign_folds(names, 5, seed, targets=names)) for seed in range(10)}) == 10


def imbalance(folds: list[int], targets: list[str]) -> float:
    """The largest gap between two folds in the share of any target, weighing targets alike."""
    counts, totals = Counter(zip(folds, targets, strict=True)), Counter(targets)
    return max(np.ptp([counts[fold, target] / total for fold in set(folds)]) for target, total in totals.items())


def test_groups_are_stratified_as_well_as_by_scikit_learn() -> None:
    from sklearn.model_selection import StratifiedGroupKFold

    mine, theirs = [], []
    for seed in range(20):
        _, targets, groups = random_rows(seed)
        groups = [f"group {random.Random(f'{seed}{row}').randrange(60)}" for row in range(len(groups))]
        mine.append(
            imbalance(assign_folds([f"{n}" for n in range(200)], 4, seed, targets=targets, groups=groups), targets)
        )
        folds = np.zeros(200, dtype=int)
        splitter = StratifiedGroupKFold(4, shuffle=True, random_state=seed)
        for fold, (_, held_out) in enumerate(splitter.split(np.zeros(200), targets, groups)):
            folds[held_out] = fold
        theirs.append(imbalance(folds.tolist(), targets))
    assert np.mean(mine) <= 1.1 * np.mean(theirs)


def test_other_seeds_deal_otherwise() -> None:
    keys = [f"row {n}" for n in range(50)]
    groups = [f"group {n % 20}" for n in range(50)]
    assert len({tuple(assign_folds(keys, 5, seed)) for seed in range(10)}) == 10
    assert len({tuple(assign_folds(keys, 5, seed, groups=groups)) for seed in range(10)}) == 10


@pytest.mark.parametrize(
    ("keys", "folds", "groups", "reason"),
    [
        (["a", "b"], 1, None, "must be at least 2"),
        (["a", "b"], 0, None, "must be at least 2"),
        (["a", "b"], 3, None, "3 folds need at least 3 different rows, but there are 2"),
        (["a", "a", "b"], 3, None, "different rows, but there are 2"),
        (["a", "b", "c"], 3, ["x", "x", "y"], "different groups, but there are 2"),
        ([], 2, None, "there are 0"),
    ],
)
def test_folds_that_cannot_be_made_are_refused(
    keys: list[str], folds: int, groups: list[str] | None, reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        assign_folds(keys, folds, 0, groups=groups)


def test_the_module_loads_no_heavy_library() -> None:
    code = (
        "import sys, llmft.data.select; print([name for name in ('sklearn', 'scipy', 'torch') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_seven_answers_to_a_question_stay_in_one_fold_of_real_data(shared_data: Path) -> None:
    file = shared_data / "classification" / "predict_llm7_alpacaeval_train.csv"
    if not file.is_file():
        pytest.skip(f"{file} is not here")
    with file.open(encoding="utf-8", newline="") as handle:
        rows = list(csv.DictReader(handle))
    questions, targets = [row["Question"] for row in rows], [row["target"] for row in rows]
    keys = [repr(row) for row in rows]
    folds = assign_folds(keys, 5, 0, targets=targets, groups=questions)
    assert len(set(zip(questions, folds, strict=True))) == len(set(questions))
    sizes = Counter(folds)
    assert max(sizes.values()) - min(sizes.values()) <= 0.03 * len(rows) / 5
    counts = Counter(zip(folds, targets, strict=True))
    for target, total in Counter(targets).items():
        assert all(abs(counts[fold, target] - total / 5) <= 0.03 * total / 5 for fold in range(5))
    chosen = diverse(questions, 100, 0)
    assert len({questions[row] for row in chosen}) == 100
