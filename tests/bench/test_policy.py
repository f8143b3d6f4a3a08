"""Policies that learn from rewards: beside TRL's, and on a real model."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from llmft.pipelines.report import gain, verdict
from tests.bench.bench_policy import PARITY, TRL, compare
from tests.bench.bench_sums import learn

MODELS = Path(os.environ.get("LLMFT_REAL_MODELS", Path.home() / ".cache/llmft-real-models"))
SMOLLM2 = MODELS / "SmolLM2-135M-Instruct"

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("task", "temperature"), [("grpo", 1.0), ("grpo", 0.7), ("rloo", 1.0)])
def test_ten_steps_have_the_losses_of_trls_on_the_same_answers(task: str, temperature: float) -> None:
    if not TRL.installed:
        pytest.skip("TRL has no environment here: python -m tests.bench.peers trl")
    ours, theirs = compare(task, 10, 0.04, temperature)
    assert len(ours) == 10
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) < PARITY


def test_a_real_model_learns_sums_from_whether_they_are_right(tmp_path: Path) -> None:
    if not SMOLLM2.is_dir():
        pytest.skip(f"no {SMOLLM2}")
    before, after = learn(SMOLLM2, tmp_path, 60)
    assert verdict(gain(before, after)) == "better"
