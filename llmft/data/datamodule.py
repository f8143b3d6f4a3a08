"""The one LightningDataModule: tokenised splits, and loaders that start where the run stands."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import lightning as L
from torch.utils.data import DataLoader, Dataset

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


class _Items(Dataset):
    """A list of thunks as a dataset, so that a batch is made when the loop asks for it."""

    def __init__(self, makers: list[Callable[[], object]]) -> None:
        self.makers = makers

    def __len__(self) -> int:
        return len(self.makers)

    def __getitem__(self, index: int) -> object:
        return self.makers[index]()

    def __iter__(self) -> Iterator[object]:
        return (make() for make in self.makers)


class DataModule(L.LightningDataModule):
    """Hands out one effective batch per optimizer step.

    Lightning's epochs are passes over the training rows: `train_dataloader` is asked anew for each and returns the
    steps from `position()` up to the pass's end, or the last one in `stops`, which are the steps with a validation.
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
    ) -> None:
        super().__init__()
        self.splits = splits
        self.pad_id = pad_id
        self.seed = seed
        self.batch_size = batch_size
        self.micro_batch = micro_batch
        self.validation_batch = validation_batch
        self.stops: list[int] = []
        self.position: Callable[[], int] = lambda: 0
        self._weights, self._lengths = {}, {}
        for split, examples in splits.items():
            self._weights[split], self._lengths[split] = weights_and_lengths(examples)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one pass over the training rows."""
        return steps_per_epoch(len(self.splits["train"]), self.batch_size)

    def _share(self) -> tuple[int, int]:
        trainer = self.trainer
        return (trainer.global_rank, trainer.world_size) if trainer is not None else (0, 1)

    def step_batch(self, step: int) -> StepBatch:
        """The batch of optimizer step `step`, this process's share of it."""
        examples = self.splits["train"]
        shares = self.groups_of_step(step)
        rows = [row for share in shares for group in share for row in group]
        rank, _ = self._share()
        micro_batches = [self._batch("train", group) for group in shares[rank]]
        while len(micro_batches) < max(map(len, shares)):
            micro_batches.append(zero_weight_batch(examples[rows[0]], self.pad_id))
        return StepBatch(step, micro_batches, sum(self._weights["train"][row] for row in rows))

    def groups_of_step(self, step: int) -> list[list[list[int]]]:
        """The rows of each micro-batch of optimizer step `step`, process by process."""
        rows = rows_of_step(step, len(self.splits["train"]), self.batch_size, self.seed)
        _, world = self._share()
        lengths = self._lengths["train"]
        # Dealt longest first, in turn, so that the processes have like work.
        ordered = sorted(rows, key=lambda row: (-lengths[row], row))
        return [self.micro_batch.groups(lengths, ordered[place::world]) for place in range(world)]

    def first_row(self, step: int) -> MicroBatch:
        """The first row of optimizer step `step` alone, the same in every process and with every micro-batch."""
        examples = self.splits["train"]
        row = rows_of_step(step, len(examples), self.batch_size, self.seed)[0]
        return collate([examples[row]], [row], self.pad_id)

    def train_dataloader(self) -> DataLoader:
        """The steps from here to the end of the pass or of the training."""
        start, per_epoch = self.position(), self.steps_per_epoch
        stop = min((start // per_epoch + 1) * per_epoch, self.stops[-1])
        makers: list[Callable[[], object]] = [partial(self.step_batch, step) for step in range(start, stop)]
        return DataLoader(_Items(makers), batch_size=None, num_workers=0)

    def val_dataloader(self) -> DataLoader:
        """Validation rows in batches of like length; every process has its share."""
        return self._evaluation("validation")

    def groups_of(self, split: str) -> list[list[int]]:
        """The rows of each batch of this process's share of a split that is evaluated."""
        rank, world = self._share()
        mine = range(len(self.splits.get(split, ())))[rank::world]
        return self.validation_batch.groups(self._lengths.get(split, ()), mine)

    def _evaluation(self, split: str) -> DataLoader:
        makers: list[Callable[[], object]] = [partial(self._batch, split, group) for group in self.groups_of(split)]
        return DataLoader(_Items(makers), batch_size=None, num_workers=0)

    def _batch(self, split: str, rows: list[int]) -> MicroBatch:
        return collate([self.splits[split][row] for row in rows], rows, self.pad_id)

    def test_dataloader(self) -> DataLoader:
        """Test rows, likewise."""
        return self._evaluation("test")
