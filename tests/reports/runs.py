"""Synthetic run directories as training writes them, made in milliseconds."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from llmft.config.convert import to_plain
from llmft.runs.directory import Run
from llmft.runs.records import write_row_losses
from tests.conftest import compose

STEPS = (0, 20, 40, 60, 80)


@functools.cache
def _defaults() -> str:
    return json.dumps(to_plain(compose()))


def settled(step: int) -> float:
    """A validation curve that ends flat."""
    return 2.0 * float(np.exp(-step / 8))


def make_run(
    root: Path,
    value: float = 1.03,
    *,
    status: str = "done",
    curve: Callable[[int], float] = settled,
    train: Callable[[int], float] | None = None,
    num_rows: int = 60,
    rows: bool = True,
    samples: Sequence[dict[str, Any]] = (),
    taste: int = 0,
    first_row: int = 0,
    metrics: dict[str, float] | None = None,
    **overrides: Any,
) -> Path:
    """A run whose validation loss is `value` at the end and `value + curve(step)` before; overrides as a__b=value."""
    config = json.loads(_defaults())
    for key, setting in overrides.items():
        *path, last = key.split("__")
        node = config
        for part in path:
            node = node[part]
        node[last] = setting
    name = "-".join(str(v).replace("/", "_")[:20] for v in overrides.values()) or "run"
    directory = root / "runs" / f"{name}-{abs(hash((value, name))) % 16**8:08x}"
    directory.mkdir(parents=True)
    run = Run(directory, directory.name[-8:])
    run.config_file.write_text(yaml.safe_dump(config, sort_keys=False))
    validation = [(step, value + curve(step)) for step in STEPS[:-1]] + [(STEPS[-1], value)]
    best_step, best = min(validation, key=lambda point: point[1])
    lines = [{"step": s, "val/loss_nats": v, "val/exact_match": 0.5} for s, v in validation]
    falling = train or (lambda step: curve(step) + value)
    lines += [{"step": s, "train/loss_nats": falling(s), "train/learning_rate": 1e-3} for s in range(1, STEPS[-1] + 1)]
    lines.sort(key=lambda line: line["step"])
    run.metrics_file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    timing = [{"step": s, "train/tokens_per_s": 1000.0, "train/step_s": 0.1, "memory/peak_gib": 0.5} for s in range(80)]
    run.timing_file.write_text("".join(json.dumps(line) + "\n" for line in timing))
    shared, individual = np.random.default_rng(0), np.random.default_rng(taste + int(config["seed"]) * 1000 + 1)
    base, wobble = shared.exponential(size=num_rows), individual.normal(size=num_rows) * 0.02
    if rows:
        for step, loss in validation:
            tokens = np.full(num_rows, 10.0)
            each = loss * tokens + (base - base.mean() + wobble - wobble.mean()) * tokens * min(loss, 1.0)
            losses = [(i, float(each[i]), 10.0) for i in range(num_rows)]
            write_row_losses(run.row_losses_file("val", step), losses, lambda row: f"rows.jsonl:{row + first_row + 1}")
    run.samples_file.write_text("".join(json.dumps({"step": best_step, "split": "val", **s}) + "\n" for s in samples))
    after = {"val/loss_nats": best, "val/exact_match": 0.5, **(metrics or {})}
    result = {"before": {}, "after": after, "step": best_step, "steps": STEPS[-1], "seconds": 12.5}
    run.update(
        status=status,
        key=run.key,
        command=f"python -m llmft {' '.join(f'{k}={v}' for k, v in overrides.items())}".replace("__", "."),
        error=None if status == "done" else f"{status}: out of luck",
        **({"result": result} if status == "done" else {}),
    )
    return directory


def make_sweep(root: Path, trials: Sequence[dict[str, Any]], name: str = "ranks-0123456789", **record: Any) -> Path:
    """A sweep's directory over `trials`."""
    directory = root / "sweeps" / name
    directory.mkdir(parents=True, exist_ok=True)
    content = {
        "name": name.rpartition("-")[0],
        "question": "Is r=4 better than r=8?",
        "created": "2026-01-02 03:04:05",
        "command": "python -m llmft -m lora.r=4,8 seed=0,1,2",
        "output_dir": str(root),
        "monitor": "val/loss_nats",
        "mode": "min",
        "swept": {"lora.r": ["4", "8"], "seed": ["0", "1", "2"]},
        **record,
        "trials": list(trials),
    }
    (directory / "sweep.json").write_text(json.dumps(content))
    return directory


def trial(root: Path, run: Path, number: int = 0, **values: Any) -> dict[str, Any]:
    """A trial's entry in sweep.json."""
    return {
        "number": number,
        "run": str(run.relative_to(root)),
        "status": "done",
        "overrides": [f"seed={number}"],
        "command": f"python -m llmft trial={number}",
        **values,
    }
