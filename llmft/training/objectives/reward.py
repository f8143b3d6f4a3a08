"""A reward model: one score per answer, read at its last token, higher for the better answer."""

from __future__ import annotations

from typing import Any

import torch

from llmft.data.batch import MicroBatch
from llmft.metrics.preference import REWARD_COLUMNS
from llmft.model.heads import answer_scores
from llmft.training.objectives.answers import token_counts
from llmft.training.objectives.base import RowLosses
from llmft.training.objectives.preference import over_rows, pair_columns
from llmft.training.objectives.preference_losses import reward


class Reward:
    """-log sigmoid of the better answer's score less the worse one's and the margin; the mean over a row's pairs.

    Args:
        centre: weight of a pair's squared sum of scores in the loss, which keeps scores near 0; 0.01 is usual.
    """

    columns = REWARD_COLUMNS

    def __init__(self, centre: float = 0.0) -> None:
        self.centre = centre

    def losses(self, model: Any, batch: MicroBatch) -> RowLosses:
        """See RowLosses; outputs are named by `columns`."""
        answers = batch.answers
        assert answers is not None, "task.feedback=pairs brings rows with answers"
        row, better, worse = answers.pairs.unbind(1)
        scores = answer_scores(model, batch)
        chosen, rejected = scores[row, better], scores[row, worse]
        losses = reward(chosen, rejected, answers.margins[row], self.centre)
        counts = token_counts(answers, scores.device)
        columns = pair_columns(chosen.detach(), rejected.detach(), counts[row, better] - counts[row, worse])
        outputs = torch.stack([column.double() for column in columns], dim=1)
        return RowLosses.per_row(over_rows(losses, answers), over_rows(outputs, answers))

    def predict(self, model: Any, batch: MicroBatch) -> torch.Tensor:
        """(rows, answers) float64 scores; NaN where a row has fewer answers."""
        answers = batch.answers
        assert answers is not None
        counts = torch.tensor([len(lengths) - 1 for lengths in answers.lengths], device=batch.input_ids.device)
        scores = answer_scores(model, batch).double()
        numbers = torch.arange(answers.max_answers, device=scores.device)
        return scores.masked_fill(numbers >= counts[:, None], float("nan"))
