from __future__ import annotations

import random

import pytest

from llmft.config import DataConfig
from llmft.data.sources import Loaded, Row
from llmft.data.splits import hold_out, make_splits, sample
from llmft.errors import DataError


def make(count: int) -> list[Row]:
    return [Row({"text": f"row {number}"}, f"f:{number}") for number in range(count)]


def texts(rows: list[Row]) -> set[str]:
    return {row.values["text"] for row in rows}


def test_a_rows_side_depends_on_its_content_and_the_seed_alone() -> None:
    rows = make(200)
    shuffled = random.Random(1).sample(rows, len(rows))
    _, held = hold_out(rows, 0.1, 5)
    _, again = hold_out(shuffled, 0.1, 5)
    assert len(held) == 20
    assert texts(held) == texts(again)
    assert texts(hold_out(rows, 0.1, 6)[1]) != texts(held)


def test_copies_of_a_row_stay_on_one_side() -> None:
    rows = make(50) * 3
    kept, held = hold_out(rows, 0.2, 0)
    assert held
    assert not texts(kept) & texts(held)


def test_a_limit_is_a_random_sample_and_not_the_first_rows() -> None:
    rows = make(100)
    few = sample(rows, 10, 0)
    assert len(few) == 10
    assert few != rows[:10]
    assert few == sample(rows, 10, 0)
    assert sample(rows, None, 0) is rows


def test_validation_and_test_are_held_out_once_and_apart() -> None:
    splits = make_splits(Loaded({"train": make(100)}, ""), DataConfig(name="d", files="f", test_fraction=0.1))
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 81, "validation": 9, "test": 10}
    assert not texts(splits["train"]) & (texts(splits["validation"]) | texts(splits["test"]))


def test_nothing_left_to_train_on_is_an_error() -> None:
    with pytest.raises(DataError, match="held out"):
        make_splits(Loaded({"train": make(1)}, ""), DataConfig(name="d", files="f"))
