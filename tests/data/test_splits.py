from __future__ import annotations

import random

import pytest

from llmft.config import DataConfig, TrainOn
from llmft.data.sources import Loaded, Row
from llmft.data.splits import hold_out, make_splits, sample
from llmft.errors import ConfigError, DataError


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


def grouped(groups: int, size: int) -> list[Row]:
    return [
        Row({"question": f"Q{g}", "answer": f"A{g}-{n}", "label": n % size}, f"f:{g}-{n}")
        for g in range(groups)
        for n in range(size)
    ]


def config(**values: object) -> DataConfig:
    return DataConfig(name="d", files="f", **values)  # type: ignore[arg-type]


def column(rows: list[Row], name: str) -> set[object]:
    return {row.values[name] for row in rows}


def test_a_group_is_never_on_both_sides() -> None:
    rows = grouped(40, 3)
    for values in ({"validation_fraction": 0.2, "test_fraction": 0.1}, {"fold": 1, "num_folds": 4}):
        splits = make_splits(Loaded({"train": rows}, ""), config(group="question", **values))
        train = column(splits["train"], "question")
        assert not train & column(splits["validation"], "question")
        assert not train & column(splits["test"], "question")
        assert sum(map(len, splits.values())) == len(rows)


def test_stratified_sides_have_the_classes_in_their_shares() -> None:
    rows = [Row({"text": f"t{n}", "label": "rare" if n % 10 == 0 else "common"}, f"f:{n}") for n in range(200)]
    for values in ({"validation_fraction": 0.2}, {"fold": 0, "num_folds": 5}):
        splits = make_splits(Loaded({"train": rows}, ""), config(stratify="label", **values))
        rare = sum(row.values["label"] == "rare" for row in splits["validation"])
        assert (len(splits["validation"]), rare) == (40, 4), values


def test_every_row_is_validated_in_exactly_one_fold() -> None:
    rows = make(53)
    seen: list[str] = []
    for fold in range(5):
        splits = make_splits(Loaded({"train": rows}, ""), config(fold=fold, num_folds=5))
        assert not texts(splits["train"]) & texts(splits["validation"])
        seen += [row.values["text"] for row in splits["validation"]]
    assert sorted(seen) == sorted(texts(rows))


def test_folds_beside_given_validation_rows_and_unknown_columns_are_refused() -> None:
    with pytest.raises(ConfigError, match="keep one"):
        make_splits(Loaded({"train": make(9), "validation": make(3)}, ""), config(fold=0))
    with pytest.raises(ConfigError, match=r"data\.group=txt: f:0 has no such column; did you mean text\?"):
        make_splits(Loaded({"train": make(9)}, ""), config(group="txt"))


def test_training_on_all_keeps_the_validation_rows_and_adds_them() -> None:
    splits = make_splits(Loaded({"train": make(50)}, ""), config(train_on=TrainOn.all, test_fraction=0.1))
    assert len(splits["train"]) == 45
    assert texts(splits["validation"]) <= texts(splits["train"])
    assert not texts(splits["test"]) & texts(splits["train"])
