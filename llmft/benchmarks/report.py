"""The answers as a table, as JSON and CSV, and as a page with a figure of time against length."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape

from llmft.benchmarks.estimates import Estimate, Workload, as_csv, hours, most_outputs, training_hours
from llmft.benchmarks.figure import page
from llmft.core.console import text_table
from llmft.core.errors import DiskError
from llmft.core.files import write_atomically
from llmft.runs.directory import slug


def write_estimates(
    estimates: Sequence[Estimate], workload: Workload, root: Path, name: str, screen: Any
) -> list[dict[str, Any]]:
    """Writes bench.json, bench.csv and bench.html below `root`, prints the table, and returns its rows.

    Raises DiskError where they cannot be written.
    """
    rows = [a.to_row(workload) for a in estimates]
    directory = root / slug(name)[:80]
    content = {
        "bench.json": json.dumps({"asked": vars(workload), "rows": rows}, indent=1, ensure_ascii=False),
        "bench.csv": as_csv(rows),
        "bench.html": page(estimates, workload, name, [cells(a, workload) for a in estimates], remarks(estimates)),
    }
    try:
        for file, text in content.items():
            write_atomically(directory / file, text.encode())
    except OSError as error:
        raise DiskError(f"{directory}: {error.strerror}; set output_dir to another disk.") from None
    show(estimates, workload, screen)
    html = escape(str(directory / "bench.html"))
    screen.print(f"[bold]figure[/bold]  {html}, with bench.csv and bench.json beside it")
    return rows


def show(estimates: Sequence[Estimate], workload: Workload, screen: Any) -> None:
    """Prints the table and what it means."""
    head = ("model", "tokens in + out", "trained/s", "read/s", "written/s", "memory", "tokens out", "training")
    screen.print(text_table(head, [cells(a, workload) for a in estimates]))
    screen.print(
        f"tokens per second; medians ± half the range of the repeats. Tokens out, at most: {workload.samples:,} "
        f"samples in {workload.hours:g} hours, {workload.inference_rows} at once. Training: {workload.rows:,} rows x "
        f"{workload.epochs:g} epochs in batches of {workload.batch_size}, validations not counted.",
        *map(escape, remarks(estimates)),
    )


def cells(estimate: Estimate, workload: Workload) -> list[str]:
    """One line of the table."""
    point = estimate.measured
    head = [estimate.case, f"{point.input_tokens} + {point.output_tokens}"]
    if point.error is not None:
        return [*head, point.error, *[""] * 5]
    most, by_context = most_outputs(point, workload, estimate.context_tokens)
    speeds = {
        "train": point.train_tokens_per_s,
        "prompt": point.prompt_tokens_per_s,
        "generate": point.generated_tokens_per_s,
    }
    return [
        *head,
        *(f"{value:,.0f} ±{100 * point.spread[name]:.0f}%" for name, value in speeds.items()),
        f"{point.peak_bytes / 2**30:.1f} GiB",
        f"{most:,}{' (context)' if by_context else ''}",
        hours(training_hours(point, workload)),
    ]


def remarks(estimates: Sequence[Estimate]) -> list[str]:
    """What to know of the numbers."""
    random = dict.fromkeys(a.model for a in estimates if a.weights == "random")
    measured = [a for a in estimates if a.measured.error is None]
    devices = dict.fromkeys(f"{a.device}, {a.precision}" for a in measured)
    fits = {a.case: a.measured.at_once for a in measured}  # that of the longest rows
    return [
        *(f"{name}: random weights of its shape, since its own are not here; they are as fast." for name in random),
        *(f"On {device}." for device in devices),
        *(f"{case}: {fit}." for case, fit in fits.items()),
    ]
