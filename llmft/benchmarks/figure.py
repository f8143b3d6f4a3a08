"""Time against the length of questions and answers, a figure for each model and number format, in one page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from markupsafe import Markup

from llmft.benchmarks.answers import Answered, Wish, hours, inference_hours
from llmft.reports.svg import SERIES, WIDTH, Scale, figure, short, tag, text, tipped

TOP, BOTTOM = 34, 236


def page(
    answered: Sequence[Answered], wish: Wish, name: str, rows: Sequence[Sequence[str]], remarks: Sequence[str]
) -> str:
    """An HTML page that asks nobody for anything: figures, a table of `rows`, and `remarks`."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent.parent / "reports"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    measured = [own for own in answered if own.measured.error is None]
    cases = [(title, list(own)) for title, own in groupby(measured, key=lambda own: f"{own.model} {own.quantization}")]
    heights = [value for _, own in cases for line in lines(own, wish).values() for _, value in line]
    figures = [(title, times(own, wish, title, [*heights, wish.hours])) for title, own in cases]
    return environment.get_template("bench.html.jinja").render(
        name=name, wish=wish, figures=figures, rows=rows, remarks=remarks
    )


def lines(own: Sequence[Answered], wish: Wish) -> dict[int, list[tuple[int, float]]]:
    """Hours for all samples by length of the answer, for each length of the question; measured pairs alone."""
    found: dict[int, list[tuple[int, float]]] = {}
    for answered in own:
        point = answered.measured
        value = inference_hours(point, wish, point.output_tokens)
        found.setdefault(point.input_tokens, []).append((point.output_tokens, value))
    return {inputs: sorted(line) for inputs, line in sorted(found.items())}


def times(own: Sequence[Answered], wish: Wish, title: str, heights: Sequence[float]) -> Markup:
    """One figure; `heights` are those of all, so that figures beside each other have one scale."""
    found = lines(own, wish)
    x = Scale([outputs for line in found.values() for outputs, _ in line], 58, WIDTH - 64)
    y = Scale(heights, BOTTOM, TOP, log=True)
    parts = [_axes(x, y), _limit(y, wish)]
    ends = _apart({inputs: y(line[-1][1]) for inputs, line in found.items()})
    for place, (inputs, line) in enumerate(found.items()):
        spots = [(x(outputs), y(value)) for outputs, value in line]
        path = "M" + "L".join(f"{px:.1f},{py:.1f}" for px, py in spots)
        shapes = [tag("path", d=path, class_="line")] if len(spots) > 1 else []
        shapes += [tag("circle", cx=px, cy=py, r=4, class_="point") for px, py in spots]
        told = "; ".join(f"{outputs} out: {hours(value)}" for outputs, value in line)
        label = text(spots[-1][0] + 8, ends[inputs] + 4, f"{inputs:,} in", class_="halo")
        tip = f"{inputs:,} tokens in, {told}"
        parts.append(tipped(tag("g", *shapes, label), tip, class_=f"series s{place % SERIES}"))
    described = (
        f"{title}: hours for {wish.samples:,} samples by length of the answer, one line per length of the question."
    )
    return figure(BOTTOM + 44, title, described, *parts)


def _apart(places: dict[int, float], least: float = 15.0) -> dict[int, float]:
    """`places` from the lowest in the figure upwards, each at least so far above the one before."""
    found: dict[int, float] = {}
    below = math.inf
    for key, place in sorted(places.items(), key=lambda item: -item[1]):
        below = found[key] = min(place, below - least)
    return found


def _axes(x: Scale, y: Scale) -> Markup:
    parts = [text(8, 16, "hours, logarithmic", class_="faint")]
    for value in y.ticks():
        parts.append(tag("line", x1=58, x2=WIDTH - 10, y1=y(value), y2=y(value), class_="grid"))
        parts.append(text(52, y(value) + 4, short(value), "end"))
    for value in x.ticks(4):
        parts.append(text(x(value), BOTTOM + 18, short(value), "middle"))
    parts.append(text((58 + WIDTH) / 2, BOTTOM + 38, "tokens of an answer", "middle", class_="faint"))
    return tag("g", *parts, class_="axes", aria_hidden="true")


def _limit(y: Scale, wish: Wish) -> Markup:
    line = tag("line", x1=58, x2=WIDTH - 10, y1=y(wish.hours), y2=y(wish.hours), class_="zero")
    return tag("g", line, text(62, y(wish.hours) - 6, f"the {wish.hours:g} hours there are", class_="halo"))
