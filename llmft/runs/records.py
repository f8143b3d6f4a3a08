"""The records of a run that grow while it trains: JSON lines, and a table of row losses per validation."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llmft.core.redaction import redact
from llmft.runs.predictions import write_table


def write_row_losses(
    path: Path,
    rows: Sequence[tuple[int, float, float]],
    describe: Callable[[int], str],
    names: Sequence[str] = (),
    outputs: Any = None,
    *,
    groups: Sequence[str | None] = (),
    scores: Mapping[str, Sequence[float]] | None = None,
) -> None:
    """Writes a table of `row` (file:line), `loss_nats` (summed over the row's labelled tokens) and `tokens`.

    `groups` becomes a column `group`, each of `scores` a column score_NAME, and `outputs`, (rows, names), a column for
    each of `names`.
    """
    import numpy as np

    columns: dict[str, Any] = {
        "row": [describe(row) for row, _, _ in rows],
        "loss_nats": np.array([loss for _, loss, _ in rows], np.float64),
        "tokens": np.array([tokens for _, _, tokens in rows], np.int32),
    }
    if outputs is not None:
        columns |= {name: outputs[:, index].astype(np.float64) for index, name in enumerate(names)}
    if any(group is not None for group in groups):
        columns["group"] = [str(group) for group in groups]
    columns |= {f"score_{name}": np.array(values, np.float64) for name, values in (scores or {}).items()}
    write_table(path, columns)


def append_line(path: Path, record: dict[str, Any]) -> None:
    """Appends one JSON line, after completing a line that a kill cut off."""
    with path.open("ab+") as file:
        end = file.seek(0, os.SEEK_END)
        if end:
            file.seek(end - 1)
            if file.read(1) != b"\n":
                file.write(b"\n")
        blank = [key for key, value in record.items() if isinstance(value, float) and not math.isfinite(value)]
        plain = record | dict.fromkeys(blank)
        file.write((json.dumps(redact(plain), ensure_ascii=False) + "\n").encode())
