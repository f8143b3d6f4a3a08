"""What every objective hands to the loop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch

from llmft.data.batch import MicroBatch


@dataclass
class RowLosses:
    """Losses of a micro-batch, row by row.

    Attributes:
        nll: (rows,) negative log-likelihood in nats, summed over what is learned in the row; differentiable.
        counts: (rows,) how many tokens (or classes) that sum is over.
        outputs: (rows, classes) float64 predictions, where the objective makes any; validation keeps them.
    """

    nll: torch.Tensor
    counts: torch.Tensor
    outputs: torch.Tensor | None = None

    @classmethod
    def per_row(cls, nll: torch.Tensor, outputs: torch.Tensor | None = None) -> RowLosses:
        """Of (rows,) losses that are no sums over tokens: every row counts 1."""
        return cls(nll, torch.ones(len(nll), dtype=torch.long, device=nll.device), outputs)


class Objective(Protocol):
    """Scores a batch: the one thing that differs between what is learned.

    One whose losses need a number of the whole effective batch has `before_step(model, micro_batches)`, a tensor that
    is summed over all processes, and `begin_step(sum)`.

    An objective whose validation is scored otherwise than its training (without label smoothing, say) has a method
    `evaluate` of the same form.
    """

    def losses(self, model: Any, batch: MicroBatch) -> RowLosses:
        """Row losses of `batch` under `model`."""
        ...
