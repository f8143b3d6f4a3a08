from dataclasses import replace
from typing import Any

from llmft.data.batch import MicroBatch
from llmft.training.objectives.base import RowLosses
from llmft.training.objectives.language_modeling import LanguageModeling


class Focal:
    """Weights rows that the model knows less: mean loss per token, to the power of 1 + gamma."""

    def __init__(self, gamma: float = 1.0) -> None:
        self.gamma = gamma
        self.plain = LanguageModeling()

    def losses(self, model: Any, batch: MicroBatch) -> RowLosses:
        """Losses for training: summed in each row."""
        plain = self.plain.losses(model, batch)
        mean = plain.nll / plain.counts.clamp(min=1)
        return replace(plain, nll=plain.nll * mean.detach() ** self.gamma)

    def evaluate(self, model: Any, batch: MicroBatch) -> RowLosses:
        """Losses for validation: in nats, comparable with other objectives."""
        return self.plain.losses(model, batch)
