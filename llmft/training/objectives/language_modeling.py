"""Next-token prediction on the answers."""

from __future__ import annotations

from typing import Any

import torch

from llmft.data.batch import MicroBatch, send
from llmft.data.examples import IGNORE
from llmft.model.logits import nll_at
from llmft.training.objectives.base import RowLosses


class LanguageModeling:
    """Cross-entropy in nats at labelled tokens.

    Logits are computed only where the next token has a label (about 3% of the tokens when answers are short): the same
    numbers in a fraction of the head's time and memory. Rows are packed without padding where the model family allows
    it (see `llmft.model.kernels.packing`); else they are padded on the right, which causal attention never sees, so no
    attention mask is passed and the fast causal kernel is used.
    """

    def losses(self, model: Any, batch: MicroBatch) -> RowLosses:
        """See RowLosses; `batch.labels` is not shifted, the shift happens here."""
        nll = nll_at(model, batch)
        (rows,) = send(batch.positions[:1], nll.device)
        sums = torch.zeros(len(batch.labels), dtype=nll.dtype, device=nll.device).index_add(0, rows, nll)
        return RowLosses(sums, (batch.labels[:, 1:] != IGNORE).sum(dim=1))
