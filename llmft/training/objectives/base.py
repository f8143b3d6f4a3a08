"""The interface of objectives, and the row losses that they return."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch

from llmft.data.batch import MicroBatch


@dataclass
class RowLosses:
    """Losses of a micro-batch, row by row.

    Attributes:
        nll: (rows,) negative log-likelihood in nats, summed over the row's labels; differentiable.
        counts: (rows,) tokens (or classes) in that sum.
        outputs: (rows, classes) float64 predictions, if the objective makes any; validation keeps them.
    """

    nll: torch.Tensor
    counts: torch.Tensor
    outputs: torch.Tensor | None = None

    @classmethod
    def per_row(cls, nll: torch.Tensor, outputs: torch.Tensor | None = None) -> RowLosses:
        """From (rows,) losses that are not sums over tokens: every row counts 1."""
        return cls(nll, torch.ones(len(nll), dtype=torch.long, device=nll.device), outputs)


class Objective(Protocol):
    """Computes the losses of a batch.

    An objective whose losses need a statistic of the effective batch has `before_step(model, micro_batches)`, whose
    tensor is summed over all processes, and `begin_step(sum)`.

    An objective whose validation loss differs from its training loss (no label smoothing, say) has a method `evaluate`
    with the signature of `losses`.
    """

    def losses(self, model: Any, batch: MicroBatch) -> RowLosses:
        """Row losses of `batch` under `model`."""
        ...
