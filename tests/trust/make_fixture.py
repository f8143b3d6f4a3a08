"""Makes the checkpoint of the current format that later versions must load: `python -m tests.trust.make_fixture`.

Run it once per format (`llmft.runs.checkpoint.FORMAT`) and commit what it writes below tests/trust/fixtures/.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

from llmft.runs.checkpoint import FORMAT, load_checkpoint, path_of
from llmft.train import train
from tests.conftest import SMALL, compose, run_directory

STEP = 4
OVERRIDES = [
    *SMALL,
    "lora=attention",
    "lora.r=1",
    "lora.targets=.*layers.0.self_attn.q_proj",
    "trainer.max_steps=6",
    "trainer.checkpoint_every=4",
    "trainer.validate_every=6",
    "trainer.keep_checkpoints=9",
]


def main() -> None:
    """Trains, and stores the checkpoint of step 4 with its expected contents and the run's final numbers."""
    target = Path(__file__).parent / "fixtures" / f"format-{FORMAT}"
    with tempfile.TemporaryDirectory() as root:
        metric = train(compose(*OVERRIDES, f"output_dir={root}"), quiet=True)
        path = path_of(run_directory(Path(root)) / "checkpoints", STEP)
        checkpoint = load_checkpoint(path)
        target.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
        shutil.copy(path.with_suffix(".sha256"), target)
    expected = {
        "weights": sorted(checkpoint.weights),
        "optimizer": {name: sorted(entries) for name, entries in checkpoint.optimizer.items()},
        "val/loss_nats": metric,
    }
    (target / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    main()
