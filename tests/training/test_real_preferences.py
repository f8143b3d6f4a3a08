"""SmolLM2 in NF4 learns from pairs that people compared: PandaLM's with degrees, LLaMA-Factory's demo."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmft.runs.predictions import read_table
from llmft.train import train
from tests.conftest import compose, run_directory

pytestmark = pytest.mark.slow
SMOLLM2 = Path(os.environ.get("LLMFT_REAL_MODELS", Path.home() / ".cache/llmft-real-models")) / "SmolLM2-135M-Instruct"
FEW = ["model=local", f"model.path={SMOLLM2}", "prompt=native", "quantization=nf4", "logger=none", "progress=false",
       "data.max_dropped_fraction=1", "data.truncation=drop", "data.max_overlap_fraction=1", "trainer.batch_size=4",
       "trainer.max_steps=9", "trainer.validate_every=9", "trainer.accelerator=cpu", "learning_rate=constant",
       "learning_rate.warmup_steps=0", "task.generate_rows=0"]  # fmt: skip
DATA = {
    "pandalm_degrees.jsonl": ["data=preference_degrees", "data.max_tokens=128", "data.limit=16",
                              "data.validation_fraction=0.02"],
    "llamafactory_dpo_en_demo.json": ["data=preference_messages", "data.max_tokens=256", "data.limit=120",
                                      "data.validation_fraction=0.4"],
}  # fmt: skip
"""Few rows of each, and only the short ones of the demo."""


@pytest.fixture(params=list(DATA))
def rows(request: pytest.FixtureRequest, shared_data: Path) -> list[str]:
    """The overrides of one of the data sets; skips where it or the model is missing."""
    file = shared_data / "preference" / request.param
    for path in (SMOLLM2, file):
        if not path.exists():
            pytest.skip(f"not here: {path}")
    return [*DATA[request.param], f"data.files={file}"]


def trained(*overrides: str) -> tuple[list[float], dict[str, Any], Path]:
    """Losses of the steps, the run's result, and its directory."""
    config = compose(*overrides)
    train(config, quiet=True)
    run = run_directory(Path(config.output_dir))
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    losses = [line["train/loss_nats"] for line in lines if "train/loss_nats" in line]
    return losses, json.loads((run / "run.json").read_text())["result"], run


def test_the_loss_of_dpo_falls_from_ln_2(rows: list[str], tmp_path: Path) -> None:
    losses, result, _ = trained("task=dpo", *rows, *FEW, "learning_rate.peak=2e-4", f"output_dir={tmp_path}")
    assert losses[0] == pytest.approx(np.log(2), abs=5e-3)  # the reference rounds bf16 in other groups
    assert np.mean(losses[-3:]) < losses[0] - 0.1
    assert result["before"]["val/loss_nats"] == pytest.approx(np.log(2), abs=1e-12)
    assert result["before"]["val/accuracy"] == 0.5
    assert result["before"]["val/drift_nats"] == 0
    assert result["after"]["val/margin"] != 0
    assert "chosen" in result["words"][0]


def test_a_reward_model_learns_and_stands_beside_the_rule_of_length(rows: list[str], tmp_path: Path) -> None:
    losses, result, run = trained("task=reward", *rows, *FEW, "learning_rate.peak=2e-4", f"output_dir={tmp_path}")
    assert np.mean(losses[-3:]) < np.mean(losses[:3])
    facts = result["length"]
    table = read_table(run / "row_losses" / f"val-{result['step']:08d}.parquet")
    more = np.asarray(table["more_tokens"])
    assert facts["rows"] == len(more)
    assert facts["longer_wins"] == pytest.approx(float(((np.sign(more) + 1) / 2).mean()))
    assert facts["accuracy"] == pytest.approx(result["after"]["val/accuracy"])
    assert 'of the rule "the longer answer wins"' in result["words"][-1]
