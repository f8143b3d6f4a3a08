"""Rows held out for validation and test: seeded, and independent of the rows' order."""

from __future__ import annotations

import hashlib

from llmft.config import DataConfig, canonical
from llmft.data.sources import Loaded, Row
from llmft.errors import DataError


def _rank(row: Row, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}\0{canonical(row.values)}".encode()).digest()


def hold_out(rows: list[Row], fraction: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Splits `rows` into (kept, held out).

    A row's side depends on its content and `seed` alone, so that neither the file's order nor the training seed
    moves it, and copies of one row stay on one side. At least one row is held out when `fraction` is above 0.
    """
    if fraction <= 0 or not rows:
        return rows, []
    ranks = [_rank(row, seed) for row in rows]
    wanted = max(1, round(len(rows) * fraction))
    limit = sorted(ranks)[wanted - 1]
    kept = [row for row, rank in zip(rows, ranks, strict=True) if rank > limit]
    held = [row for row, rank in zip(rows, ranks, strict=True) if rank <= limit]
    return kept, held


def sample(rows: list[Row], count: int | None, seed: int) -> list[Row]:
    """A seeded random sample of `count` rows, in their order; never simply the first."""
    if count is None or count >= len(rows):
        return rows
    chosen = set(sorted(range(len(rows)), key=lambda index: _rank(rows[index], seed))[:count])
    return [row for index, row in enumerate(rows) if index in chosen]


def make_splits(loaded: Loaded, data: DataConfig) -> dict[str, list[Row]]:
    """Train, validation and test rows: as given, or held out of the training rows.

    Raises DataError when nothing is left to train on.
    """
    train = loaded.splits["train"]
    test = loaded.splits.get("test")
    if test is None:
        train, test = hold_out(train, data.test_fraction, data.split_seed + 1)
    validation = loaded.splits.get("validation")
    if validation is None:
        train, validation = hold_out(train, data.validation_fraction, data.split_seed)
    train = sample(train, data.limit, data.split_seed)
    if not train:
        raise DataError(
            f"data={data.name}: all {len(loaded.splits['train'])} rows were held out, none is left to train on; "
            "lower data.validation_fraction or data.test_fraction."
        )
    return {"train": train, "validation": validation, "test": test}
