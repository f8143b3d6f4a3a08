"""llmft by its public path: `train` of a config, with all records; its reporter waits at the gate before each step."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

here = Path(__file__).resolve().parent
root = here.parents[2]
sys.path.insert(0, str(root))  # this checkout, whichever is installed
from common import Gate, read_work

# As `python -m llmft` sets them.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
work = read_work()
from llmft.core.imports import load_libraries

load_libraries()
import llmft.training.references
import llmft.training.trial_reporter
from llmft.train import train
from tests.conftest import compose


class GateReporter:
    """A TrialReporter that takes a step when the gate opens."""

    def __init__(self) -> None:
        self.gate = Gate()

    def step(self, step: int, total: int, loss: float, tokens_per_s: float) -> None:
        self.gate.end(loss)
        if step < total:
            self.gate.begin()

    def alive(self) -> None:
        """Validations are not timed."""

    def validation(self, step: int, total: int, metrics: dict[str, float]) -> None:
        if step == 0:
            self.gate.begin()


reporter = GateReporter()
compute_references = llmft.training.references.compute_references


def timed(*arguments: Any, **named: Any) -> Any:
    """Computes references, and records the time."""
    began = time.perf_counter()
    references = compute_references(*arguments, **named)
    reporter.gate.reference_s += time.perf_counter() - began
    return references


llmft.training.references.compute_references = timed
llmft.training.trial_reporter.STEP_EVERY_S = 0.0  # every step is reported, not four a second
train(compose(*work["overrides"], "progress=false", "force=true", *work.get("more", [])), quiet=True, reporter=reporter)
