from __future__ import annotations

import datetime
import random

import pytest

from llmft.config.data import DataConfig, TrainOn
from llmft.core.errors import ConfigError, DataError
from llmft.data.readers import Row
from llmft.data.sources import Loaded
from llmft.data.splits import hold_out, make_splits, sample


def make(count: int) -> list[Row]:
    return [Row({"text": f"row {number}"}, f"f:{number}") for number in range(count)]


def texts(rows: list[Row]) -> set[str]:
    return {row.values["text"] for row in rows}


def test_a_rows_side_depends_on_its_content_and_the_seed_alone() -> None:
    rows = make(200)
    shuffled = random.Random(1).sample(rows, len(rows))
    _, held_out = hold_out(rows, 0.1, 5)
    _, again = hold_out(shuffled, 0.1, 5)
    assert len(held_out) == 20
    assert texts(held_out) == texts(again)
    assert texts(hold_out(rows, 0.1, 6)[1]) != texts(held_out)


def test_copies_of_a_row_stay_on_one_side() -> None:
    rows = make(50) * 3
    training, held_out = hold_out(rows, 0.2, 0)
    assert held_out
    assert not texts(training) & texts(held_out)


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


def classes(sizes: dict[str, int]) -> list[Row]:
    return [
        Row({"text": f"{label} {n}", "label": label}, f"f:{label}{n}") for label in sizes for n in range(sizes[label])
    ]


SIZES = [
    {"dog": 60, "cat": 60, **{f"pair{n}": 2 for n in range(10)}, **{f"rare{n}": 1 for n in range(12)}},
    {f"c{n}": 14 for n in range(40)},
    {f"c{n}": 1 for n in range(30)},
    {f"c{n}": 3 for n in range(30)},
    {"a": 1000, "b": 1},
    {"a": 7, "b": 8, "c": 9},
]


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.3])
def test_a_stratified_split_holds_out_its_share_and_never_a_whole_class(sizes: dict[str, int], fraction: float) -> None:
    rows = classes(sizes)
    training, held_out = hold_out(rows, fraction, 0, stratify="label")
    assert column(training, "label") == set(sizes)
    most = sum(size - 1 for size in sizes.values())
    expected = min(most, round(len(rows) * fraction))
    assert abs(len(held_out) - expected) <= max(1, expected / 20)
    for label, size in sizes.items():
        assert abs(sum(row.values["label"] == label for row in held_out) - size * fraction) <= 1 or expected == most


def test_groups_and_copies_do_not_take_the_last_rows_of_a_class() -> None:
    rows = [Row({"text": f"t{n}", "label": f"c{n // 4}", "who": f"w{n // 3}"}, f"f:{n}") for n in range(120)]
    copies = [Row({"text": "same", "label": "copied"}, f"f:{n}") for n in range(5)]
    for part, group in ((rows, "who"), ([*make(50), *copies], None)):
        for row in part:
            row.values.setdefault("label", "other")
        for seed in range(20):
            training, held_out = hold_out(part, 0.2, seed, group=group, stratify="label")
            assert held_out
            assert column(training, "label") == column(part, "label")


def test_classes_of_one_row_each_cannot_be_stratified() -> None:
    with pytest.raises(DataError, match=r"data\.stratify=label: no row can be held out"):
        make_splits(Loaded({"train": classes({f"c{n}": 1 for n in range(9)})}, ""), config(stratify="label"))


def test_a_share_beside_given_rows_is_refused() -> None:
    splits = {"train": make(9), "validation": make(3), "test": make(2)}
    with pytest.raises(ConfigError, match=r"data\.validation_fraction=0\.2 would not be used with the given valid"):
        make_splits(Loaded(splits, ""), config(validation_fraction=0.2))
    with pytest.raises(ConfigError, match=r"data\.test_fraction=0\.2 would not be used with the given test rows"):
        make_splits(Loaded(splits, ""), config(test_fraction=0.2))
    with pytest.raises(ConfigError, match=r"data\.validation_fraction=0\.2 would not be used with data\.fold"):
        make_splits(Loaded({"train": make(9)}, ""), config(validation_fraction=0.2, fold=0))
    assert make_splits(Loaded(splits, ""), config(validation_fraction=0.0))["validation"] == splits["validation"]


def test_values_that_json_lacks_do_not_matter_to_a_split() -> None:
    rows = [Row({**row.values, "when": datetime.date(2024, 1, 1), "raw": b"\xff"}, row.where) for row in make(40)]
    training, held_out = hold_out(rows, 0.25, 0, group="when")
    assert (len(training), len(held_out)) == (0, 40)
    assert len(hold_out(rows, 0.25, 0)[1]) == 10


def test_a_group_that_no_row_has_is_refused_also_where_nothing_is_split() -> None:
    for key in ("group", "stratify"):
        with pytest.raises(ConfigError, match=rf"data\.{key}=txt"):
            make_splits(Loaded({"train": make(9), "validation": make(3)}, ""), config(**{key: "txt"}))
