"""Training, validation and test rows: seeded, and independent of the rows' order."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable

from llmft.config.data import DataConfig, Sampling, TrainOn
from llmft.core.errors import ConfigError, DataError, did_you_mean
from llmft.data.naming import stable_text
from llmft.data.readers import Row
from llmft.data.select import assign_folds, diverse, rank
from llmft.data.sources import Loaded

Group = str | Callable[[Row], str]
"""A column whose rows stay together, or a function of the row."""


def _column(rows: list[Row], name: Group, key: str) -> list[str]:
    """A column's values as text. Raises ConfigError naming `key` for a row without the column."""
    if callable(name):
        return [name(row) for row in rows]
    for row in rows:
        if name not in row.values:
            raise ConfigError(f"{key}={name}: {row.where} has no such column{did_you_mean(name, row.values)}")
    return [stable_text(row.values[name]) for row in rows]


def hold_out(
    rows: list[Row], fraction: float, seed: int, *, group: Group | None = None, stratify: str | None = None
) -> tuple[list[Row], list[Row]]:
    """Splits `rows` into (kept, held out).

    A row's side depends only on its content (or its group's name) and `seed`, not on the order of the rows or the
    training seed. Copies of a row, and all rows of a group, stay on one side. With `stratify`, classes are held out in
    proportion, by largest remainder, and each keeps at least one training row. If `fraction` is above 0, at least one
    row or group is held out.
    """
    if fraction <= 0 or not rows:
        return rows, []
    units = _column(rows, group, "data.group") if group else [stable_text(row.values) for row in rows]
    classes = _column(rows, stratify, "data.stratify") if stratify else [""] * len(rows)
    rows_of_class: dict[str, Counter[str]] = defaultdict(Counter)  # class -> unit -> number of rows
    rows_of_unit: dict[str, Counter[str]] = defaultdict(Counter)  # unit -> class -> number of rows
    for unit, label in zip(units, classes, strict=True):
        rows_of_class[label][unit] += 1
        rows_of_unit[unit][label] += 1
    remaining = Counter(classes)
    targets = _rows_per_class(remaining, fraction, seed) if stratify else {"": max(1, round(len(rows) * fraction))}
    held_out: set[str] = set()
    for label in sorted(rows_of_class):
        num_held_out = sum(count for unit, count in rows_of_class[label].items() if unit in held_out)
        for unit in sorted(rows_of_class[label], key=lambda unit: rank(seed, unit)):
            if num_held_out >= targets[label]:
                break
            if unit in held_out or (
                stratify and any(remaining[name] <= count for name, count in rows_of_unit[unit].items())
            ):
                continue  # a class keeps its last rows
            held_out.add(unit)
            num_held_out += rows_of_class[label][unit]
            remaining.subtract(rows_of_unit[unit])
    kept = [row for row, unit in zip(rows, units, strict=True) if unit not in held_out]
    return kept, [row for row, unit in zip(rows, units, strict=True) if unit in held_out]


def _rows_per_class(sizes: Counter[str], fraction: float, seed: int) -> dict[str, int]:
    """Number of rows of each class to hold out: `fraction` of all rows, by largest remainder, never a whole class.

    The simple rounding of each class is used where it is above 0 for all and the sum is within 5%.
    """
    total = max(1, round(sizes.total() * fraction))
    counts = {label: round(size * fraction) for label, size in sizes.items()}
    if all(0 < counts[label] < sizes[label] for label in sizes) and abs(sum(counts.values()) - total) <= total / 20:
        return counts
    counts = {label: math.floor(size * fraction) for label, size in sizes.items()}

    for label in sorted(sizes, key=lambda label: (counts[label] - sizes[label] * fraction, rank(seed, label))):
        if sum(counts.values()) < total and counts[label] + 1 < sizes[label]:
            counts[label] += 1
    return counts


def sample(rows: list[Row], count: int | None, seed: int) -> list[Row]:
    """A seeded random sample of `count` rows, in their order."""
    if count is None or count >= len(rows):
        return rows
    ranks = sorted(range(len(rows)), key=lambda index: rank(seed, stable_text(rows[index].values)))
    return [rows[index] for index in sorted(ranks[:count])]


def _fold(rows: list[Row], data: DataConfig, group: Group | None) -> tuple[list[Row], list[Row]]:
    targets = _column(rows, data.stratify, "data.stratify") if data.stratify else None
    groups = _column(rows, group, "data.group") if group else None
    try:
        keys = [stable_text(row.values) for row in rows]
        folds = assign_folds(keys, data.num_folds, data.split_seed, targets=targets, groups=groups)
    except ValueError as error:
        raise ConfigError(f"data.num_folds={data.num_folds}: {error}") from None
    kept = [row for row, fold in zip(rows, folds, strict=True) if fold != data.fold]
    return kept, [row for row, fold in zip(rows, folds, strict=True) if fold == data.fold]


def make_splits(loaded: Loaded, data: DataConfig, together: Callable[[Row], str] | None = None) -> dict[str, list[Row]]:
    """Train, validation and test rows: given ones, or held out of the training rows, or a fold of them.

    Without data.group, rows with the same value of `together` stay in one split.

    Raises DataError when no training rows are left. Raises ConfigError for a fold or fraction with given rows, or for
    a column that a row lacks.
    """
    train = loaded.splits["train"]
    _refuse_unused(loaded, data)
    group = data.group or together
    stratify = data.stratify
    test = loaded.splits.get("test")
    if test is None:
        train, test = hold_out(train, data.test_fraction, data.split_seed + 1, group=group, stratify=stratify)
    validation = loaded.splits.get("validation")
    if data.fold is not None:
        train, validation = _fold(train, data, group)
    elif validation is None:
        train, validation = hold_out(train, data.validation_fraction, data.split_seed, group=group, stratify=stratify)
        if data.stratify and data.validation_fraction and not validation:
            raise DataError(
                f"data.stratify={data.stratify}: no {f'group of data.group={data.group}' if data.group else 'row'} can "
                "be held out, because each class would lose its only training rows; set data.stratify=null, or name a "
                "file in data.split_files.validation."
            )
    if data.train_on is TrainOn.all:
        train = [*train, *validation]
    train = _limited(train, data)
    if not train:
        rows = loaded.splits["train"]
        units = set(_column(rows, group, "data.group")) if group else set()
        name = f"data.group={data.group} is the same in all" if data.group else "all have one prompt, and so one split"
        raise DataError(
            f"data={data.name}: {len(rows)} of {len(rows)} rows were held out, none is left to train on"
            f"{f' ({name})' if len(units) == 1 < len(rows) else ''}; lower data.validation_fraction or "
            "data.test_fraction, or name a file in data.split_files.validation."
        )
    return {"train": train, "validation": validation, "test": test}


def _refuse_unused(loaded: Loaded, data: DataConfig) -> None:
    given_splits = set(loaded.splits)
    if data.fold is not None and "validation" in given_splits:
        raise ConfigError("data.fold is set and validation rows are given too: keep one.")
    decided_elsewhere = {
        "validation": "validation" in given_splits or data.fold is not None,
        "test": "test" in given_splits,
    }
    for split, is_decided in decided_elsewhere.items():
        key = f"{split}_fraction"
        fraction, default = getattr(data, key), DataConfig.__dataclass_fields__[key].default
        if is_decided and fraction not in (0, default):
            source = "data.fold" if split == "validation" and split not in given_splits else f"the given {split} rows"
            raise ConfigError(f"data.{key}={fraction} would not be used with {source}: set it to 0.")
    for key in ("stratify", "group"):
        if getattr(data, key):
            _column(loaded.splits["train"], getattr(data, key), f"data.{key}")


def _limited(rows: list[Row], data: DataConfig) -> list[Row]:
    if data.limit is None or data.sample is Sampling.random:
        return sample(rows, data.limit, data.split_seed)
    texts = [" ".join(str(value) for value in row.values.values()) for row in rows]
    return [rows[index] for index in diverse(texts, data.limit, data.split_seed)]
