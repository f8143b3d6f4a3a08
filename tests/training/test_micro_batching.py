"""A step is divided to fit in memory, depending on config, rows, model and total memory alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmft.config.trainer import Checkpointing
from llmft.data.batch import Limit
from llmft.data.examples import Examples
from llmft.data.hub import Located
from llmft.model.load import model_config
from llmft.train import train
from llmft.training import micro_batching
from llmft.training.finetuner import FineTuner
from llmft.training.micro_batching import MicroBatchPlan, StepRows, plan_micro_batches
from tests.conftest import compose, run_directory
from tests.model.test_twins import FIRST, twin
from tests.test_train import adapter_bytes


class MadeUp(Exception):
    """Ends a run as a crash does."""


CPU = torch.device("cpu")


def rows_of(lengths: list[int], labelled: int = 4) -> Examples:
    marks = [np.r_[np.zeros(length - labelled, np.uint8), np.ones(labelled, np.uint8)] for length in lengths]
    return Examples.of([range(length) for length in lengths], marks, range(len(lengths)), [])


def chosen(
    monkeypatch: pytest.MonkeyPatch, memory: int, *overrides: str, lengths: list[int] | None = None
) -> MicroBatchPlan:
    """The plan for a Llama of 256 units on a device with `memory` bytes."""
    monkeypatch.setattr(micro_batching, "device_memory", lambda device: memory)
    monkeypatch.setattr("llmft.model.memory.LIBRARIES_BYTES", {"cpu": 0})
    config = compose("data=alpaca", "data.files=none", "logger=none", "quantization=none", *overrides)
    config.model = twin(FIRST["llama"], hidden_size=256, intermediate_size=704, num_hidden_layers=4, head_dim=64)
    architecture = model_config(config.model, Located(None, "random"))
    examples = rows_of(lengths or [50 + 25 * n for n in range(16)] * 2)
    return plan_micro_batches(config, examples, lambda: architecture, CPU, torch.float32)


def test_less_memory_means_layers_computed_again_and_then_fewer_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    fits = [chosen(monkeypatch, mebibytes * 2**20) for mebibytes in (2000, 60, 36, 25)]
    assert [fit.checkpointing.value for fit in fits] == ["none", "full", "full", "full"]
    tokens = [fit.limit.tokens or 0 for fit in fits]
    assert tokens[0] == micro_batching.MOST_TOKENS["cpu"]
    assert tokens[2] > tokens[3] > 0
    for fit, mebibytes in zip(fits[:3], (2000, 60, 36), strict=True):
        assert fit.estimate is not None
        assert fit.estimate.total <= 0.8 * mebibytes * 2**20
        assert "estimated peak" in str(fit)
    assert chosen(monkeypatch, 60 * 2**20).to_plain() == fits[1].to_plain()
    assert "may not fit" in str(chosen(monkeypatch, 2**20))


def test_what_is_configured_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    fit = chosen(monkeypatch, 2**20, "trainer.micro_batch=3", "trainer.gradient_checkpointing=full")
    assert (fit.limit, fit.checkpointing) == (Limit(rows=3), Checkpointing.full)
    only = chosen(monkeypatch, 55 * 2**20, "trainer.gradient_checkpointing=none")
    assert only.checkpointing is Checkpointing.none
    assert (only.limit.tokens or 0) < micro_batching.MOST_TOKENS["cpu"]
    rows = chosen(monkeypatch, 110 * 2**20, "trainer.micro_batch=4")
    assert (rows.limit, rows.checkpointing) != (Limit(rows=4), Checkpointing.none)
    assert rows.limit == Limit(rows=4)


def test_a_model_whose_memory_cannot_be_told_is_trained_with_care_and_the_reason_is_shown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("needs values")

    monkeypatch.setattr(micro_batching, "StepMemory", refuse)
    fit = chosen(monkeypatch, 2**34)
    assert (fit.limit.tokens, fit.checkpointing) == (micro_batching.MOST_TOKENS["cpu"], Checkpointing.full)
    assert "NotImplementedError: needs values" in str(fit)


@pytest.mark.parametrize("lengths", [[7], [900, 3, 3], [200] * 40, list(range(10, 90))])
@pytest.mark.parametrize("limit", [Limit(rows=3), Limit(tokens=256), Limit(64, 512)])
def test_no_micro_batch_is_larger_than_what_was_estimated(lengths: list[int], limit: Limit) -> None:
    labelled = [max(1, length // 3) for length in lengths]
    step_rows = StepRows.of(np.asarray(lengths), np.asarray(labelled), 16)
    positions, longest, labels = step_rows.largest(limit)
    rng = np.random.default_rng(0)
    for _ in range(20):
        batch = rng.permutation(len(lengths))[:16]
        for group in limit.groups(lengths, [int(row) for row in batch]):
            assert len(group) * max(lengths[row] for row in group) <= positions
            assert max(lengths[row] for row in group) <= longest
            assert sum(labelled[row] for row in group) <= labels


def test_a_validation_takes_its_rows_or_four_times_the_tokens() -> None:
    assert MicroBatchPlan(Limit(tokens=100), Checkpointing.none, "").validation(64) == Limit(64, 400)
    assert MicroBatchPlan(Limit(rows=4), Checkpointing.none, "").validation(64) == Limit(64, None)


def test_a_resumed_run_makes_the_micro_batches_of_its_checkpoint_on_another_machine(
    small: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ["trainer.micro_batch=auto", "trainer.checkpoint_every=1", "trainer.validate_every=4"]
    sizes: list[list[int]] = []
    original = FineTuner.training_step

    def noted(self: FineTuner, batch: Any, index: int) -> None:
        if limit and len(sizes) == limit[0]:
            raise MadeUp
        sizes.append([len(micro.rows) for micro in batch.micro_batches])
        original(self, batch, index)

    monkeypatch.setattr(FineTuner, "training_step", noted)
    limit: list[int] = []
    monkeypatch.setattr(micro_batching, "device_memory", lambda device: 6 * 2**20)
    train(small(*config, f"output_dir={tmp_path}/whole"), quiet=True)
    expected, sizes[:] = list(sizes), []
    assert max(map(len, expected)) > 1, "so little memory cuts a batch of eight rows"

    limit[:] = [2]
    with pytest.raises(MadeUp):
        train(small(*config, f"output_dir={tmp_path}/cut"), quiet=True)
    limit[:] = []
    monkeypatch.setattr(micro_batching, "device_memory", lambda device: 2**40)
    train(small(*config, f"output_dir={tmp_path}/cut"), quiet=True)
    assert sizes == expected
    uninterrupted, cut = run_directory(tmp_path / "whole"), run_directory(tmp_path / "cut")
    assert adapter_bytes(uninterrupted) == adapter_bytes(cut)
    assert (uninterrupted / "metrics.jsonl").read_bytes() == (cut / "metrics.jsonl").read_bytes()
