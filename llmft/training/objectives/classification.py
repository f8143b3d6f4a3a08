"""A target per row: one class, several, or a number; by a linear head or by the probabilities of label words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from llmft.config.task import TaskType
from llmft.data.batch import MicroBatch
from llmft.data.targets import Targets
from llmft.model.heads import linear_scores
from llmft.training.objectives.base import RowLosses
from llmft.training.objectives.language_modeling import LanguageModeling

Scores = Callable[[Any, MicroBatch], torch.Tensor]


class Classification:
    """Cross-entropy in nats (for several classes a row its mean over the classes), or half the squared error.

    Half the squared error, in standard deviations, is a Gaussian's negative log-likelihood up to a constant.

    Args:
        targets: the classes, or a regression's mean and standard deviation.
        scores: (model, batch) -> (rows, classes) scores, whose softmax or sigmoid are the probabilities.
        label_smoothing: share of the target spread over the classes; only in training.
        text_loss: weight of the language-modeling loss on the label words.
    """

    def __init__(
        self,
        targets: Targets | None = None,
        scores: Scores = linear_scores,
        label_smoothing: float = 0.0,
        text_loss: float = 0.0,
    ) -> None:
        self.targets, self.scores = targets or Targets(), scores
        self.label_smoothing, self.text_loss = label_smoothing, text_loss

    def losses(self, model: Any, batch: MicroBatch) -> RowLosses:
        """See RowLosses; `batch.targets` are class indices, 0 and 1 for each class, or numbers."""
        assert batch.targets is not None, "classification needs data.columns.target"
        scores = self.scores(model, batch).float()
        nll = self._nll(scores, batch.targets, self.label_smoothing)
        if self.text_loss:
            nll = nll + self.text_loss * LanguageModeling().losses(model, batch).nll
        return RowLosses.per_row(nll)

    def evaluate(self, model: Any, batch: MicroBatch) -> RowLosses:
        """Like `losses`, without label smoothing and with the predictions."""
        assert batch.targets is not None, "classification needs data.columns.target"
        scores = self.scores(model, batch).double()
        return RowLosses.per_row(self._nll(scores, batch.targets, 0.0), self.outputs(scores))

    def predict(self, model: Any, batch: MicroBatch) -> torch.Tensor:
        """(rows, classes) float64 probabilities, or (rows, 1) numbers."""
        return self.outputs(self.scores(model, batch).double())

    def outputs(self, scores: torch.Tensor) -> torch.Tensor:
        """Probabilities from `scores`, or numbers in the target's unit."""
        if self.targets.problem is TaskType.regression:
            return scores * self.targets.scale + self.targets.mean
        if self.targets.problem is TaskType.multi_label:
            return scores.sigmoid()
        return scores.softmax(dim=-1)

    def _nll(self, scores: torch.Tensor, targets: torch.Tensor, smoothing: float) -> torch.Tensor:
        if self.targets.problem is TaskType.regression:
            expected = (targets.to(scores.dtype) - self.targets.mean) / self.targets.scale
            return 0.5 * (scores[:, 0] - expected) ** 2
        if self.targets.problem is TaskType.multi_label:
            expected = targets.to(scores.dtype) * (1 - smoothing) + smoothing / 2
            return F.binary_cross_entropy_with_logits(scores, expected, reduction="none").mean(dim=-1)
        return F.cross_entropy(scores, targets, reduction="none", label_smoothing=smoothing)
