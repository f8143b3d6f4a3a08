"""The LightningDataModule: tokenised splits, and loaders that start at the run's current step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader

from llmft.data.batch import (
    Limit,
    MicroBatch,
    StepBatch,
    collate,
    rows_of_step,
    steps_per_epoch,
    weights_and_lengths,
    zero_weight_batch,
)
from llmft.data.examples import Example


def _loader(items: Sequence[Any], batch_of: Callable[[Any], object]) -> DataLoader:
    """The batch of each item, made when the loop asks for it."""
    return DataLoader(items, batch_size=None, collate_fn=batch_of)  # type: ignore[arg-type]


class DataModule(L.LightningDataModule):
    """Provides one effective batch per optimizer step.

    Lightning calls `train_dataloader` once per epoch. It returns the steps from `current_step()` to the end of the
    epoch, or to the last of `validation_steps`, the steps at which a validation runs.

    Attributes:
        references: by split, (rows, answers) log-probabilities of the reference, which batches of answers get.
    """

    def __init__(
        self,
        splits: Mapping[str, Sequence[Example]],
        *,
        pad_id: int,
        seed: int,
        batch_size: int,
        micro_batch: Limit,
        validation_batch: Limit,
        references: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.splits = splits
        self.pad_id = pad_id
        self.seed = seed
        self.batch_size = batch_size
        self.micro_batch = micro_batch
        self.validation_batch = validation_batch
        self.validation_steps: list[int] = []
        self.current_step: Callable[[], int] = lambda: 0
        self.references = references or {}
        self._weights, self._lengths = {}, {}
        for split, examples in splits.items():
            self._weights[split], self._lengths[split] = weights_and_lengths(examples)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one pass over the training rows."""
        return steps_per_epoch(len(self.splits["train"]), self.batch_size)

    def _rank_and_world(self) -> tuple[int, int]:
        trainer = self.trainer
        return (trainer.global_rank, trainer.world_size) if trainer is not None else (0, 1)

    def step_batch(self, step: int) -> StepBatch:
        """This rank's part of the batch of optimizer step `step`."""
        shares = self.groups_of_step(step)
        rows = [row for share in shares for group in share for row in group]
        rank, _ = self._rank_and_world()
        micro_batches = [self._batch("train", group) for group in shares[rank]]
        while len(micro_batches) < max(map(len, shares)):
            micro_batches.append(zero_weight_batch(self._batch("train", rows[:1])))
        return StepBatch(step, micro_batches, sum(self._weights["train"][row] for row in rows))

    def groups_of_step(self, step: int) -> list[list[list[int]]]:
        """The rows of each micro-batch of optimizer step `step`, rank by rank."""
        rows = rows_of_step(step, len(self.splits["train"]), self.batch_size, self.seed)
        _, world = self._rank_and_world()
        lengths = self._lengths["train"]
        # Rows are dealt longest first, in turn: each rank gets about the same number of tokens.
        ordered = sorted(rows, key=lambda row: (-lengths[row], row))
        return [self.micro_batch.groups(lengths, ordered[rank::world]) for rank in range(world)]

    def first_row(self, step: int) -> MicroBatch:
        """The first row of optimizer step `step` alone: the same on every rank, for every micro-batch size."""
        return self._batch("train", rows_of_step(step, len(self.splits["train"]), self.batch_size, self.seed)[:1])

    def train_dataloader(self) -> DataLoader:
        """The steps from the current one to the end of the epoch or of the training."""
        start, per_epoch = self.current_step(), self.steps_per_epoch
        stop = min((start // per_epoch + 1) * per_epoch, self.validation_steps[-1])
        return _loader(range(start, stop), self.step_batch)

    def val_dataloader(self) -> DataLoader:
        """This rank's validation rows, in batches of similar length."""
        return _loader(self.groups_of("validation"), partial(self._batch, "validation"))

    def test_dataloader(self) -> DataLoader:
        """This rank's test rows, in batches of similar length."""
        return _loader(self.groups_of("test"), partial(self._batch, "test"))

    def groups_of(self, split: str) -> list[list[int]]:
        """The rows of each evaluation batch of this rank."""
        rank, world = self._rank_and_world()
        rows = range(len(self.splits.get(split, ())))[rank::world]
        return self.validation_batch.groups(self._lengths.get(split, ()), rows)

    def _batch(self, split: str, rows: list[int]) -> MicroBatch:
        batch = collate([self.splits[split][row] for row in rows], rows, self.pad_id)
        if batch.answers is not None and split in self.references:
            batch.answers.reference = self.references[split][rows, : batch.answers.max_answers]
        return batch
