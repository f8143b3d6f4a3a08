from dataclasses import replace
from typing import Any

from llmft.data.batch import MicroBatch
from llmft.training.objectives.base import RowLosses
from llmft.training.objectives.language_modeling import LanguageModeling


class Focal:
    """Counts rows less that the model knows: mean loss per token, to the power of 1 + gamma."""

    def __init__(self, gamma: float = 1.0) -> None:
        self.gamma = gamma
        self.plain = LanguageModeling()

    def losses(self, model: Any, batch: MicroBatch) -> RowLosses:
        """As the loop takes them: summed in each row."""
        plain = self.plain.losses(model, batch)
        mean = plain.nll / plain.counts.clamp(min=1)
        return replace(plain, nll=plain.nll * mean.detach() ** self.gamma)

    def evaluate(self, model: Any, batch: MicroBatch) -> RowLosses:
        """Validation is in nats, comparable with other objectives."""
        return self.plain.losses(model, batch)
