"""Answers that a policy has sampled, with their rewards and advantages; stored in a run's `rollouts/`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from llmft.config.task import Advantage, KlWhere, TaskConfig
from llmft.core.errors import DataError
from llmft.runs.predictions import read_table, write_table
from llmft.training.objectives import policy_gradient as pg

SCORE = "score_"


@dataclass
class RolloutBatch:
    """The answers to the prompts of one window of updates, a row each; those to one prompt are adjacent.

    Attributes:
        row: each answer's prompt, a row of the training split.
        ids: each answer's tokens, with its end token.
        old, reference, values: a number for each token of each answer; empty where not needed.
    """

    row: list[int]
    ids: list[list[int]]
    text: list[str]
    finished: list[bool]
    reward: list[float]
    scores: dict[str, list[float]]
    old: list[list[float]] = field(default_factory=list)
    reference: list[list[float]] = field(default_factory=list)
    values: list[list[float]] = field(default_factory=list)

    def write(self, path: Path) -> None:
        """Writes a parquet table with a row for each answer."""
        columns = {name: column for name, column in vars(self).items() if name != "scores" and column}
        write_table(path, columns | {f"{SCORE}{name}": scores for name, scores in self.scores.items()})

    @classmethod
    def read(cls, path: Path) -> RolloutBatch | None:
        """What `write` wrote; None if missing or damaged."""
        try:
            columns = read_table(path)
            scores = {name: columns.pop(name) for name in list(columns) if name.startswith(SCORE)}
            return cls(**columns, scores={name.removeprefix(SCORE): column for name, column in scores.items()})
        except (DataError, TypeError, ValueError):
            return None

    def metrics(self, group: int) -> dict[str, float]:
        """Means over the answers, of which each prompt has `group`."""
        rewards = np.asarray(self.reward, np.float64).reshape(-1, group)
        metrics = {
            "train/reward": float(rewards.mean()),
            "train/reward_sd": float(rewards.std()),
            "train/answer_tokens": float(np.mean([len(ids) for ids in self.ids])),
            "train/finished": float(np.mean(self.finished)),
        }
        if group > 1:
            metrics["train/groups_without_spread"] = float((rewards.std(axis=1) == 0).mean())
        return metrics


PerToken = list[list[float]]
"""A number for each token of each answer."""


def advantages_and_returns(rollout: RolloutBatch, task: TaskConfig) -> tuple[PerToken, PerToken]:
    """Each answer's advantages, and the targets (returns) of the value head; [] without one."""
    lengths = [len(ids) for ids in rollout.ids]
    rewards = torch.tensor(rollout.reward, dtype=torch.float64)
    penalties = _padded([[0.0] * length for length in lengths])
    if task.kl.beta > 0 and task.kl.where is KlWhere.reward:
        drift = pg.kl(_padded(rollout.old), _padded(rollout.reference), task.kl.estimator.value)
        penalties = task.kl.beta * drift  # 0 after an answer's end, where both are
    if task.advantage is not Advantage.gae:
        grouped = (rewards - penalties.sum(-1)).view(-1, task.group)
        advantages = pg.advantages(grouped, task.advantage.value).flatten().tolist()
        return [[value] * length for value, length in zip(advantages, lengths, strict=True)], []
    mask, values = _padded([[1.0] * length for length in lengths]), _padded(rollout.values)
    rewards_per_token = -penalties
    rewards_per_token[torch.arange(len(lengths)), torch.tensor(lengths) - 1] += rewards
    estimates = pg.gae(rewards_per_token, values, mask, task.gamma, task.decay)
    # Normalised over all tokens of the step (as PPO implementations do, arXiv:2005.12729).
    mean = estimates.sum() / mask.sum()
    spread = (((estimates - mean) ** 2 * mask).sum() / mask.sum()).sqrt()
    tables = ((estimates - mean) / (spread + 1e-8)).tolist(), (estimates + values).tolist()
    advantages, returns = ([row[:n] for row, n in zip(table, lengths, strict=True)] for table in tables)
    return advantages, returns


def _padded(rows: Sequence[Sequence[float]]) -> torch.Tensor:
    """(answers, tokens) float64, padded with 0 at the end of each row."""
    tensors = [torch.tensor(row, dtype=torch.float64) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True)
