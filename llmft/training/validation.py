"""The numbers of one validation: loss, perplexity, and metrics of predictions and of generated text."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from llmft.metrics import score
from llmft.metrics.loss import loss_nats, perplexity
from llmft.training.scoring import Scoring

ValidatedRow = tuple[int, float, float, Any]
"""(row of the split, summed loss in nats, labelled tokens, (classes,) float64 predictions or None)."""


@dataclass
class Validation:
    """What one validation measured."""

    step: int
    split: str
    metrics: dict[str, float]
    samples: list[dict[str, Any]] = field(default_factory=list)
    rows: list[tuple[int, float, float]] = field(default_factory=list)
    """(row of the split, summed loss in nats, labelled tokens) of every row, in order."""
    outputs: np.ndarray | None = None
    """(rows, classes) float64 predictions of these rows, of an objective that makes any."""
    scores: dict[str, list[float]] = field(default_factory=dict)
    """Each row's score of a metric that is a mean over rows, by the metric's name."""

    def add_samples(self, samples: list[dict[str, Any]], metrics: Mapping[str, Callable[..., float]]) -> None:
        """Adds generations and their `metrics`; each sample gets its own score of a metric that is a mean over rows."""
        references = [sample["reference"] for sample in samples]
        predictions = [sample["generated"] for sample in samples]
        for name, metric in metrics.items():
            self.metrics[f"{self.split}/{name}"], row_scores = score(metric, references, predictions)
            for sample, value in zip(samples, row_scores or [], strict=False):
                sample.setdefault("scores", {})[name] = value
        self.samples = samples

    def blank(self) -> Validation:
        """This validation with metrics of NaN and without rows, for rows that are trained on."""
        return Validation(self.step, self.split, dict.fromkeys(self.metrics, math.nan), self.samples)


def validation_of(step: int, split: str, rows: Sequence[ValidatedRow], scoring: Scoring | None) -> Validation:
    """The validation of all rows of `split`, in order: loss in nats per labelled token, perplexity or metrics."""
    losses = [row[:3] for row in rows]
    loss = loss_nats([nll for _, nll, _ in losses], [count for _, _, count in losses])
    outputs = np.stack([row[3] for row in rows]) if rows and rows[0][3] is not None else None
    metrics = {f"{split}/loss_nats": loss}
    if scoring is None:
        metrics[f"{split}/perplexity"] = perplexity(loss)
    scores: dict[str, list[float]] = {}
    if scoring is not None and outputs is not None:
        for name, metric in scoring.metrics.items():
            metrics[f"{split}/{name}"], row_scores = score(metric, scoring.references[split], outputs)
            if row_scores is not None and len(row_scores) == len(losses):
                scores[name] = row_scores
    return Validation(step, split, metrics, rows=losses, outputs=outputs, scores=scores)
