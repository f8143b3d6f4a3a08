"""Metrics of generated text against reference text."""

from __future__ import annotations

from collections.abc import Sequence


def exact_match(references: Sequence[str], predictions: Sequence[str]) -> float:
    """Share of predictions that equal their reference, white space at both ends left out; 0 to 1."""
    if len(references) != len(predictions):
        raise ValueError(f"{len(references)} references but {len(predictions)} predictions")
    if not references:
        raise ValueError("no references")
    hits = sum(r.strip() == p.strip() for r, p in zip(references, predictions, strict=True))
    return hits / len(references)
