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
    """

    nll: torch.Tensor
    counts: torch.Tensor


class Objective(Protocol):
    """Scores a batch: the one thing that differs between what is learned."""

    def losses(self, model: Any, batch: MicroBatch) -> RowLosses:
        """Row losses of `batch` under `model`."""
        ...
