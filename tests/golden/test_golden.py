"""Three recipes train to the losses stored in this folder: other changes must not alter them.

Each file has one `step loss` line per step. `python -m tests.golden.test_golden` writes them again, for a change that
is meant to alter losses; the commit then says why.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

import pytest

from llmft.train import train
from tests.conftest import SHARED, compose, run_directory

HERE = Path(__file__).resolve().parent
SMOLLM2 = Path(os.environ.get("LLMFT_REAL_MODELS", Path.home() / ".cache/llmft-real-models")) / "SmolLM2-135M-Instruct"
SAME = ["logger=none", "progress=false", "trainer.threads=1", "trainer.accelerator=cpu", "trainer.precision=fp32",
        "trainer.gradient_checkpointing=none", "trainer.micro_batch=4", "trainer.batch_size=8",
        "task.generate_rows=0"]  # fmt: skip
ALPACA = [f"data.files={SHARED}/instruction/llamafactory_alpaca_en_demo.json", "data=alpaca", "model=local",
          f"model.path={SMOLLM2}", "data.limit=40", "data.validation_fraction=0.002", "trainer.max_steps=5",
          "trainer.validate_every=5", "data.max_tokens=192", "data.max_dropped_fraction=1", "lora.r=8"]  # fmt: skip
RECIPES = {
    "embedded": ["trainer.max_steps=20", "data.rows={train: 80, validation: 8, test: 0}"],
    "alpaca_fp32": [*ALPACA, "quantization=none"],
    "alpaca_nf4": [*ALPACA, "quantization=nf4"],
    "classification": ["task=classification", "data=predict_llm", "prompt=alpaca", "model=local",
                       f"data.files={SHARED}/classification/predict_llm7_alpacaeval_train.csv",
                       f"model.path={SHARED}/models/stories260K", "data.limit=80", "data.validation_fraction=0.004",
                       "data.max_tokens=384", "data.max_dropped_fraction=1", "trainer.max_steps=10"],
}  # fmt: skip
NEEDS = {"alpaca_fp32": SMOLLM2, "alpaca_nf4": SMOLLM2, "classification": SHARED}
TOLERANCE = 1e-5
"""Relative. On one kind of machine the losses are equal to the bit; another CPU's matrix products add up in another
order, and 20 steps make some millionths of that."""


def losses(recipe: str, output: Path, kernels: str = "auto") -> list[tuple[int, float]]:
    """(step, loss in nats) of every training step."""
    train(compose(*SAME, *RECIPES[recipe], f"model.kernels={kernels}", f"output_dir={output}"), quiet=True)
    lines = map(json.loads, (run_directory(output) / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], line["train/loss_nats"]) for line in lines if "train/loss_nats" in line]


@pytest.mark.parametrize("kernels", ["auto", "none"])
@pytest.mark.parametrize(
    "recipe", [pytest.param(name, marks=[pytest.mark.slow] if name in NEEDS else []) for name in RECIPES]
)
def test_a_recipe_trains_to_its_golden_losses_with_kernels_and_without(
    recipe: str, kernels: str, tmp_path: Path
) -> None:
    needed = [path for path in (NEEDS.get(recipe), SHARED) if path is not None and recipe in NEEDS]
    for path in needed:
        if not path.is_dir():
            pytest.skip(f"not here: {path}")
    golden = [line.split() for line in (HERE / f"{recipe}.txt").read_text().splitlines()]
    trained = losses(recipe, tmp_path, kernels)
    assert [step for step, _ in trained] == [int(step) for step, _ in golden]
    assert [loss for _, loss in trained] == pytest.approx([float(loss) for _, loss in golden], rel=TOLERANCE)


def main(recipes: list[str]) -> None:
    """Writes the files."""
    for recipe in recipes or RECIPES:
        with tempfile.TemporaryDirectory() as folder:
            lines = [f"{step} {loss}" for step, loss in losses(recipe, Path(folder))]
        (HERE / f"{recipe}.txt").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
