"""A policy that learns from the rewards of its own answers: GRPO, RLOO, PPO and their combinations.

Rows are answers that the policy has sampled, see `llmft.training.rollouts`. A step's denominator is counted over all
its answers when they are sampled, so micro-batches do not change the loss.
"""

from __future__ import annotations

from typing import Any

import torch

from llmft.data.batch import MicroBatch
from llmft.data.examples import IGNORE
from llmft.model.logits import nll_at
from llmft.model.value_head import token_values
from llmft.training.objectives import policy_gradient as pg
from llmft.training.objectives.base import RowLosses
from llmft.training.objectives.language_modeling import LanguageModeling


def token_log_probs(model: Any, batch: MicroBatch, temperature: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows, seq_len - 1) log-probabilities in nats of the labelled tokens, and the mask of these; 0 elsewhere.

    They are those of sampling at `temperature`.
    """
    labels = batch.labels[:, 1:]
    labelled = labels != IGNORE
    nll = nll_at(model, batch, temperature)
    table = torch.zeros(labels.shape, dtype=nll.dtype, device=nll.device)
    return table.masked_scatter(labelled, -nll), labelled.to(nll.dtype)


class PolicyGradient:
    """The clipped loss of sampled answers, plus the divergence from the reference, and the value head's loss if any.

    A row is an answer; its nll is its part of the step's loss. Validation computes the language-modeling loss of the
    rows' own answers.

    Args:
        aggregate: how tokens count, see `policy_gradient.summed`.
        clip: how far ratios may fall below and rise above 1.
        ratio: whether ratios are of tokens or of whole answers, see `policy_gradient.ratios`.
        kl: KL coefficient in the loss; 0 where the divergence is in the reward.
        estimator: of that divergence, k1 or k3.
        value_weight: value loss coefficient.
        temperature: of sampling. The trained policy is the sampling one, softmax(logits / temperature), which all
            log-probabilities here belong to, as in TRL.
    """

    def __init__(
        self,
        aggregate: str = "token",
        clip: tuple[float, float] = (0.2, 0.2),
        ratio: str = "token",
        kl: float = 0.0,
        estimator: str = "k3",
        value_weight: float = 0.0,
        temperature: float = 1.0,
    ) -> None:
        self.aggregate, self.clip, self.ratio, self.temperature = aggregate, clip, ratio, temperature
        self.kl, self.estimator, self.value_weight = kl, estimator, value_weight
        self.sums: list[torch.Tensor] = []
        """For each micro-batch of the step: tokens, clipped ones, summed nats of divergence and of surprisal."""

    def losses(self, model: Any, batch: MicroBatch) -> RowLosses:
        """See RowLosses; rows without rewards get the language-modeling loss."""
        rows = batch.policy
        if rows is None:
            return LanguageModeling().losses(model, batch)
        with token_values(model, batch, enabled=self.value_weight > 0) as values:
            log_probs, mask = token_log_probs(model, batch, self.temperature)
        old = log_probs.detach() if rows.old is None else rows.old
        ratio = pg.ratios(log_probs, old, mask, self.ratio)
        losses = pg.clipped_loss(ratio, rows.advantages, self.clip)
        if rows.reference is not None and self.kl:
            losses = losses + self.kl * pg.kl(log_probs, rows.reference, self.estimator)
        if self.value_weight:
            assert rows.values is not None
            assert rows.returns is not None
            losses = losses + self.value_weight * pg.value_loss(values.of(mask), rows.values, rows.returns)
        with torch.no_grad():
            stopped = pg.clipped(ratio, rows.advantages, self.clip)
            drift = torch.zeros_like(mask) if rows.reference is None else pg.kl(log_probs, rows.reference, "k1")
            sums = [mask.sum(), *((part * mask).sum() for part in (stopped, drift, -log_probs))]
            self.sums.append(torch.stack([part.double() for part in sums]))
        return RowLosses(pg.summed(losses, mask, self.aggregate), mask.sum(-1))

    def evaluate(self, model: Any, batch: MicroBatch) -> RowLosses:
        """The language-modeling losses of the rows' own answers."""
        return LanguageModeling().losses(model, batch)

    def step_metrics(self) -> dict[str, float]:
        """The step's share of clipped tokens, and divergence from the reference and entropy in nats per token.

        The entropy is estimated from the sampled tokens' log-probabilities.
        """
        tokens, *sums = (sum(column) for column in zip(*torch.stack(self.sums).tolist(), strict=True))
        self.sums.clear()
        names = ("train/clipped", "train/kl_nats", "train/entropy_nats")
        return {name: value / max(tokens, 1) for name, value in zip(names, sums, strict=True)}
