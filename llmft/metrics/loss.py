"""Metrics of row losses, which every objective has."""

from __future__ import annotations

import math
from collections.abc import Sequence

from llmft.metrics import lower_is_better


@lower_is_better
def loss_nats(losses: Sequence[float], counts: Sequence[float]) -> float:
    """Nats per labelled token, from row losses and each row's labelled tokens."""
    return math.fsum(losses) / math.fsum(counts)


@lower_is_better
def perplexity(loss: float) -> float:
    """exp of a loss in nats per token, with the loss limited to 700 so that it stays finite."""
    return math.exp(min(loss, 700.0))
