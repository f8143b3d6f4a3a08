"""Steps whose loss or gradient norm is not finite: when a run stops, and the record that helps to find the cause."""

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
"""Consecutive skipped steps at which the run stops: the weights no longer learn."""
MOST_SHARE = 0.01
"""Share of all steps that may be skipped, where that is more than MOST_IN_A_ROW."""
MOST_UNSCALED = 30
"""Consecutive steps that fp16's loss scaling may skip: from 2^16 it needs 16 to reach a scale of 1."""


class NonFiniteStep(Exception):
    """Raised before the optimizer's step; `quantity` is the loss or the gradient norm. `final`: must not be skipped."""

    def __init__(self, quantity: str, value: float, *, final: bool = False) -> None:
        super().__init__(f"the {quantity} is {value}")
        self.final = final


def too_many_skipped(skipped: Sequence[int], total_steps: int) -> bool:
    """Whether a run that skipped these steps, the last one just now, has to stop."""
    last = list(skipped[-MOST_IN_A_ROW:])
    in_a_row = len(last) == MOST_IN_A_ROW and last[-1] - last[0] == MOST_IN_A_ROW - 1
    return in_a_row or len(skipped) > max(MOST_IN_A_ROW, MOST_SHARE * total_steps)


def write_bad_step(
    run: Run, step: dict[str, Any], losses: Sequence[tuple[int, float]], examples: Sequence[Example], tokenizer: Any
) -> Path:
    """Writes the record of a skipped `step` to the run directory; returns the file.

    `losses` are (row of `examples`, summed loss in nats) over all processes; the file has each row's place and text.
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
