"""A step whose loss or gradient is not a finite number: what is kept of it for the person who looks for the cause."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmft.core.files import write_json
from llmft.core.redaction import redact
from llmft.data.examples import Example
from llmft.runs.directory import Run

MOST_IN_A_ROW = 5
"""Steps skipped one after the other before the run stops: the weights no longer learn."""
MOST_SHARE = 0.01
"""Share of all steps that may be skipped, where that is more than MOST_IN_A_ROW."""
MOST_UNSCALED = 30
"""Steps in a row that fp16's loss scaling may leave out: from 2^16 it needs 16 to reach a scale of 1."""


class NotFinite(Exception):
    """Raised before the optimizer's step; `what` is the loss or the gradient norm. `final`: never to be skipped."""

    def __init__(self, what: str, value: float, *, final: bool = False) -> None:
        super().__init__(f"the {what} is {value}")
        self.final = final


def too_many_skipped(skipped: Sequence[int], total_steps: int) -> bool:
    """Whether a run that skipped these steps (the last one just now) had better stop."""
    last = list(skipped[-MOST_IN_A_ROW:])
    in_a_row = len(last) == MOST_IN_A_ROW and last[-1] - last[0] == MOST_IN_A_ROW - 1
    return in_a_row or len(skipped) > max(MOST_IN_A_ROW, MOST_SHARE * total_steps)


def write_bad_step(
    run: Run, step: dict[str, Any], losses: Sequence[tuple[int, float]], examples: Sequence[Example], tokenizer: Any
) -> Path:
    """Writes what is known of a `step` that was not taken to the run directory; returns the file.

    `losses` are rows of `examples`, with place, text and their summed loss in nats there, over all processes.
    """
    rows = [
        {
            "row": row,
            "where": examples[row].where,
            "loss_nats": loss if math.isfinite(loss) else str(loss),
            "tokens": len(examples[row].input_ids),
            "labelled_tokens": examples[row].labelled_tokens,
            "text": tokenizer.decode(list(map(int, examples[row].input_ids))),
        }
        for row, loss in losses
    ]
    path = run.directory / "not_finite" / f"step-{step['step']:08d}.json"
    write_json(path, redact({**step, "rows": rows}))
    return path
