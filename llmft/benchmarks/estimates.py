"""Estimates from measured speeds: answer tokens within given hours, and hours of a training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llmft.benchmarks.measure import Measured
from llmft.reports.tables import to_csv


@dataclass(frozen=True)
class Workload:
    """The workload to estimate.

    Attributes:
        samples, hours: rows to answer, and the available time.
        rows, epochs: of the training.
        batch_size: rows per optimizer step. inference_rows: rows answered at once.
    """

    samples: int
    hours: float
    rows: int
    epochs: float
    batch_size: int
    inference_rows: int

    @property
    def batches(self) -> int:
        """Number of inference batches."""
        return math.ceil(self.samples / self.inference_rows)


def inference_hours(point: Measured, workload: Workload, outputs: int) -> float:
    """Hours for answers of `outputs` tokens each, at the measured time per token."""
    return workload.batches * (point.prompt_s + (outputs - 1) * point.token_s) / 3600


def max_output_tokens(point: Measured, workload: Workload) -> tuple[int, bool]:
    """(maximum tokens of an answer within the hours, whether the model's context is the limit)."""
    batch_s = 3600 * workload.hours / workload.batches
    within = 0 if batch_s < point.prompt_s else 1 + math.floor((batch_s - point.prompt_s) / point.token_s)
    room = math.inf if point.context_tokens is None else point.context_tokens - point.input_tokens
    return int(min(within, room)), within > room


def training_hours(point: Measured, workload: Workload) -> float:
    """Hours of training for the rows and epochs, without validations."""
    return workload.epochs * math.ceil(workload.rows / workload.batch_size) * point.step_s / 3600


def to_row(point: Measured, workload: Workload) -> dict[str, Any]:
    """`point` with its estimates as a row for JSON and CSV; without speeds if the measurement failed."""
    names = ("model", "quantization", "weights", "device", "precision", "input_tokens", "output_tokens")
    row: dict[str, Any] = {name: getattr(point, name) for name in names} | {"error": point.error or ""}
    if point.error is not None:
        return row
    max_tokens, by_context = max_output_tokens(point, workload)
    return row | {
        "train_tokens_per_s": round(point.train_tokens_per_s, 1),
        "prompt_tokens_per_s": round(point.prompt_tokens_per_s, 1),
        "generated_tokens_per_s": round(point.generated_tokens_per_s, 1),
        **{name: getattr(point, name) for name in ("step_s", "prompt_s", "token_s")},
        "peak_gib": round(point.peak_bytes / 2**30, 3),
        "max_output_tokens": max_tokens,
        "ended_by": "context" if by_context else "time",
        "inference_hours": inference_hours(point, workload, point.output_tokens),
        "training_hours": training_hours(point, workload),
        "micro_batch": point.micro_batch,
        "repeats": point.repeats,
        **{f"spread_{name}": round(value, 4) for name, value in point.spread.items()},
    }


def as_csv(rows: Sequence[dict[str, Any]]) -> str:
    """`rows` as CSV with the union of their columns."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    return to_csv(columns, [[row.get(column, "") for column in columns] for row in rows])
