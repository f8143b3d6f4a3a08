"""Metrics that every objective has: of its own row losses, not of predictions."""

from __future__ import annotations

import math
from collections.abc import Sequence

from llmft.metrics import lower_is_better


@lower_is_better
def loss_nats(losses: Sequence[float], counts: Sequence[float]) -> float:
    """Nats per labelled token, of row losses and the labelled tokens of each row."""
    return math.fsum(losses) / math.fsum(counts)


@lower_is_better
def perplexity(loss: float) -> float:
    """Of a loss in nats per token; large ones are bounded, so that it stays a number."""
    return math.exp(min(loss, 700.0))
