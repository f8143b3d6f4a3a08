"""What a run directory says of its run, besides the numbers of each step."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from llmft.data.overlap import Overlap
from llmft.files import write_atomically
from llmft.prepare import Prepared
from llmft.redaction import redact
from llmft.runs import Run, append_line, write_config
from llmft.training.rows import Rows


def write_records(prepared: Prepared, rows: Rows, overlaps: Sequence[Overlap], environment: dict[str, Any]) -> None:
    """Writes the config, the environment with what the limits cost, and the rejected rows."""
    run = prepared.run
    write_config(run, prepared.config)
    record = {
        **environment,
        "data": {
            "fingerprint": prepared.data_fingerprint,
            "splits": {split: asdict(lengths) for split, lengths in rows.encoder.lengths.items()},
            "labels": prepared.labels,
            "left_out": prepared.problems.reasons(),
            "overlaps": [asdict(overlap) for overlap in overlaps],
            "train_on": prepared.config.data.train_on.value,
        },
        "model": {"fingerprint": prepared.located.fingerprint, "remote_code": _remote_code(prepared)},
        "tokenizer": {"pad": rows.tokenizer.pad_token, "end": rows.tokenizer.eos_token},
    }
    write_atomically(run.environment_file, json.dumps(redact(record), indent=1).encode())
    if prepared.problems.rejected:
        run.rejected_file.unlink(missing_ok=True)
        for entry in prepared.problems.rejected:
            append_line(run.rejected_file, redact(entry))


def _remote_code(prepared: Prepared) -> str | None:
    """Whose code ran with the training, if anybody's: a pinned revision or a directory."""
    model = prepared.config.model
    return (model.path or f"{model.id}@{model.revision}") if model.trust_remote_code else None


def before_and_after(run: Run, step: int) -> tuple[dict[str, float | None], dict[str, float | None]]:
    """Metrics of the validation before training, and of the one at `step` with the test's."""
    before: dict[str, float | None] = {}
    after: dict[str, float | None] = {}
    for line in run.metrics_file.read_text().splitlines():
        record = json.loads(line)
        values = {key: value for key, value in record.items() if key.startswith(("val/", "test/"))}
        if record["step"] == 0:
            before.update(values)
        if record["step"] == step or "test/loss_nats" in values:
            after.update(values)
    return before, after


def validated_at(run: Run, step: int) -> dict[str, float] | None:
    """Metrics of the validation at `step`, None where there was none."""
    if not run.metrics_file.is_file():
        return None
    for line in run.metrics_file.read_text().splitlines():
        record = json.loads(line)
        if record["step"] == step and "val/loss_nats" in record:
            return {key: value for key, value in record.items() if key.startswith("val/")}
    return None
