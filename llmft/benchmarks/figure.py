"""Time against the length of questions and answers, a figure for each model and number format, in one page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby

from markupsafe import Markup

from llmft.benchmarks.estimates import Estimate, Workload, hours, inference_hours
from llmft.reports.page import template
from llmft.reports.svg import SERIES, WIDTH, Scale, axes, figure, path, tag, text, tipped

TOP, BOTTOM = 34, 236


def page(
    estimates: Sequence[Estimate], workload: Workload, name: str, rows: Sequence[Sequence[str]], remarks: Sequence[str]
) -> str:
    """An HTML page that asks nobody for anything: figures, a table of `rows`, and `remarks`."""
    measured = [a for a in estimates if a.measured.error is None]
    cases = {title: lines(list(group), workload) for title, group in groupby(measured, key=lambda a: a.case)}
    heights = [value for case in cases.values() for line in case.values() for _, value in line]
    figures = [(title, times(case, workload, title, [*heights, workload.hours])) for title, case in cases.items()]
    html: str = template("bench.html.jinja").render(
        name=name, workload=workload, figures=figures, rows=rows, remarks=remarks
    )
    return html


def lines(estimates: Sequence[Estimate], workload: Workload) -> dict[int, list[tuple[int, float]]]:
    """Hours for all samples by length of the answer, for each length of the question; measured pairs alone."""
    by_inputs: dict[int, list[tuple[int, float]]] = {}
    for point in (a.measured for a in estimates):
        value = inference_hours(point, workload, point.output_tokens)
        by_inputs.setdefault(point.input_tokens, []).append((point.output_tokens, value))
    return {inputs: sorted(line) for inputs, line in sorted(by_inputs.items())}


def times(case: dict[int, list[tuple[int, float]]], workload: Workload, title: str, heights: Sequence[float]) -> Markup:
    """One figure of `lines`; `heights` are those of all, so that figures beside each other have one scale."""
    x = Scale([outputs for line in case.values() for outputs, _ in line], 58, WIDTH - 64)
    y = Scale(heights, BOTTOM, TOP, log=True)
    limit = y(workload.hours)
    parts = [
        text(8, 16, "hours, logarithmic", class_="faint"),
        axes(x, y, "tokens of an answer", BOTTOM),
        tag("line", x1=58, x2=WIDTH - 10, y1=limit, y2=limit, class_="zero"),
        text(62, limit - 6, f"the {workload.hours:g} hours there are", class_="halo"),
    ]
    ends = _without_overlap({inputs: y(line[-1][1]) for inputs, line in case.items()})
    for index, (inputs, line) in enumerate(case.items()):
        points = [(x(outputs), y(value)) for outputs, value in line]
        shapes = [tag("path", d=path(points), class_="line")] if len(points) > 1 else []
        shapes += [tag("circle", cx=px, cy=py, r=4, class_="point") for px, py in points]
        label = text(points[-1][0] + 8, ends[inputs] + 4, f"{inputs:,} in", class_="halo")
        values = "; ".join(f"{outputs} out: {hours(value)}" for outputs, value in line)
        style = f"series s{index % SERIES}"
        parts.append(tipped(tag("g", *shapes, label), f"{inputs:,} tokens in, {values}", class_=style))
    described = f"hours for {workload.samples:,} samples by length of the answer, one line per length of the question."
    return figure(BOTTOM + 44, title, f"{title}: {described}", *parts)


def _without_overlap(heights: dict[int, float], least: float = 15.0) -> dict[int, float]:
    """`heights` from the lowest in the figure upwards, each at least so far above the one before."""
    spaced: dict[int, float] = {}
    below = math.inf
    for key, height in sorted(heights.items(), key=lambda item: -item[1]):
        below = spaced[key] = min(height, below - least)
    return spaced
