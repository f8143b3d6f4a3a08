"""Writes estimates as a table, as JSON and CSV, and as a page with figures of time against length of answers."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from markupsafe import Markup
from rich.markup import escape

from llmft.benchmarks.estimates import Workload, as_csv, inference_hours, max_output_tokens, to_row, training_hours
from llmft.benchmarks.measure import Measured
from llmft.core.console import duration, text_table
from llmft.core.errors import DiskError
from llmft.core.files import write_atomically
from llmft.reports.page import template
from llmft.reports.svg import SERIES, WIDTH, Scale, axes, figure, path, tag, text, tipped
from llmft.runs.naming import slug

TOP, BOTTOM = 34, 236
LABEL_DISTANCE = 15.0


def write_estimates(
    points: Sequence[Measured], workload: Workload, root: Path, name: str, screen: Any
) -> list[dict[str, Any]]:
    """Writes bench.json, bench.csv and bench.html below `root`, prints the table, and returns its rows.

    Raises DiskError where they cannot be written.
    """
    rows, table = [to_row(point, workload) for point in points], [cells(point, workload) for point in points]
    directory = root / slug(name)[:80]
    content = {
        "bench.json": json.dumps({"asked": vars(workload), "rows": rows}, indent=1, ensure_ascii=False),
        "bench.csv": as_csv(rows),
        "bench.html": page(points, workload, name, table, remarks(points)),
    }
    try:
        for file, words in content.items():
            write_atomically(directory / file, words.encode())
    except OSError as error:
        raise DiskError(f"{directory}: {error.strerror}; set output_dir to another disk.") from None
    head = ("model", "tokens in + out", "trained/s", "read/s", "written/s", "memory", "tokens out", "training")
    screen.print(
        text_table(head, table),
        f"tokens per second; medians ± half the range of the repeats. Tokens out, at most: {workload.samples:,} "
        f"samples in {workload.hours:g} hours, {workload.inference_rows} at once. Training: {workload.rows:,} rows x "
        f"{workload.epochs:g} epochs in batches of {workload.batch_size}, validations not counted.",
        *map(escape, remarks(points)),
        f"[bold]figure[/bold]  {escape(str(directory / 'bench.html'))}, with bench.csv and bench.json",
    )
    return rows


def cells(point: Measured, workload: Workload) -> list[str]:
    head = [point.case, f"{point.input_tokens} + {point.output_tokens}"]
    if point.error is not None:
        return [*head, point.error, *[""] * 5]
    max_tokens, by_context = max_output_tokens(point, workload)
    speeds = {
        "train": point.train_tokens_per_s,
        "prompt": point.prompt_tokens_per_s,
        "generate": point.generated_tokens_per_s,
    }
    return [
        *head,
        *(f"{value:,.0f} ±{100 * point.spread[name]:.0f}%" for name, value in speeds.items()),
        f"{point.peak_bytes / 2**30:.1f} GiB",
        f"{max_tokens:,}{' (context)' if by_context else ''}",
        duration(3600 * training_hours(point, workload)),
    ]


def remarks(points: Sequence[Measured]) -> list[str]:
    random = dict.fromkeys(point.model for point in points if point.weights == "random")
    measured = [point for point in points if point.error is None]
    devices = dict.fromkeys(f"{point.device}, {point.precision}" for point in measured)
    sizes = {point.case: point.micro_batch for point in measured}  # of the longest rows
    return [
        *(f"{name}: random weights of its shape, since its own are not here, at the same speed." for name in random),
        *(f"On {device}." for device in devices),
        *(f"{case}: micro-batch {size}." for case, size in sizes.items()),
    ]


def page(
    points: Sequence[Measured], workload: Workload, name: str, rows: Sequence[Sequence[str]], remarks: Sequence[str]
) -> str:
    """A self-contained HTML page with figures, a table of `rows`, and `remarks`."""
    measured = [point for point in points if point.error is None]
    cases = {title: lines(list(group), workload) for title, group in groupby(measured, key=lambda point: point.case)}
    heights = [value for case in cases.values() for line in case.values() for _, value in line]
    figures = [(title, times(case, workload, title, [*heights, workload.hours])) for title, case in cases.items()]
    html: str = template("bench.html.jinja").render(
        name=name, workload=workload, figures=figures, rows=rows, remarks=remarks
    )
    return html


def lines(points: Sequence[Measured], workload: Workload) -> dict[int, list[tuple[int, float]]]:
    """input tokens -> [(output tokens, hours for all samples)] of the measured pairs."""
    by_inputs: dict[int, list[tuple[int, float]]] = {}
    for point in points:
        value = inference_hours(point, workload, point.output_tokens)
        by_inputs.setdefault(point.input_tokens, []).append((point.output_tokens, value))
    return {inputs: sorted(line) for inputs, line in sorted(by_inputs.items())}


def times(case: dict[int, list[tuple[int, float]]], workload: Workload, title: str, heights: Sequence[float]) -> Markup:
    """A figure of `lines`; `heights` are those of all figures, so that they have the same scale."""
    x = Scale([outputs for line in case.values() for outputs, _ in line], 58, WIDTH - 64)
    y = Scale(heights, BOTTOM, TOP, log=True)
    limit = y(workload.hours)
    parts = [
        text(8, 16, "hours, logarithmic", class_="faint"),
        axes(x, y, "tokens of an answer", BOTTOM),
        tag("line", x1=58, x2=WIDTH - 10, y1=limit, y2=limit, class_="zero"),
        text(62, limit - 6, f"the available {workload.hours:g} hours", class_="halo"),
    ]
    ends = _without_overlap({inputs: y(line[-1][1]) for inputs, line in case.items()})
    for index, (inputs, line) in enumerate(case.items()):
        points = [(x(outputs), y(value)) for outputs, value in line]
        shapes = [tag("path", d=path(points), class_="line")] if len(points) > 1 else []
        shapes += [tag("circle", cx=px, cy=py, r=4, class_="point") for px, py in points]
        label = text(points[-1][0] + 8, ends[inputs] + 4, f"{inputs:,} in", class_="halo")
        values = "; ".join(f"{outputs} out: {duration(3600 * value)}" for outputs, value in line)
        style = f"series s{index % SERIES}"
        parts.append(tipped(tag("g", *shapes, label), f"{inputs:,} tokens in, {values}", class_=style))
    described = f"hours for {workload.samples:,} samples by length of the answer, one line per length of the question."
    return figure(BOTTOM + 44, title, f"{title}: {described}", *parts)


def _without_overlap(heights: dict[int, float]) -> dict[int, float]:
    """`heights` of labels moved up so that they are at least LABEL_DISTANCE apart."""
    spaced: dict[int, float] = {}
    below = math.inf
    for key, height in sorted(heights.items(), key=lambda item: -item[1]):
        below = spaced[key] = min(height, below - LABEL_DISTANCE)
    return spaced
