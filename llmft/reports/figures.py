"""The report's figures as self-contained SVG."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from llmft.reports.configurations import Configuration, Study, short_names
from llmft.reports.curves import Band, band
from llmft.reports.svg import SERIES, WIDTH, Scale, axes, clip, figure, path, short, tag, text, tipped
from llmft.reports.verdicts import ConfigComparison, Verdict, interval_of, number

MOST_LINES = 24
TOP, BOTTOM = 14, 236
EARLY, CUT_FROM = 0.15, 3.0
"""If the first EARLY of the steps spans more than CUT_FROM times the range of the rest, the axis shows the rest."""
LOG_FROM, DOTS_LOG_FROM = 20.0, 3.0
"""Curves, or dots of runs, get a logarithmic axis if their largest value is more than this times the smallest."""


@dataclass(frozen=True)
class Figure:
    title: str
    note: str
    svg: Markup


def styled(study: Study) -> list[tuple[Configuration, str]]:
    """(configuration, CSS class): the best ones in colour, the rest in grey."""
    return [(c, f"s{rank}" if rank < SERIES else "rest") for rank, c in enumerate(study.configurations)]


def curves(study: Study, metric: str) -> Figure | None:
    """The mean of a metric over each configuration's runs by step; the band is one standard deviation between runs."""
    lines = [(c, band([run.curve(metric) for run in c.runs]), style) for c, style in styled(study)[:MOST_LINES]]
    shown = [(c, line, style) for c, line, style in lines if line is not None and len(line.steps) > 1]
    if not shown:
        return None
    x = Scale([s for _, line, _ in shown for s in line.steps], 52, WIDTH - 10, pad=0.01)
    edges, log, cut = _heights([line for _, line, _ in shown])
    y = Scale(edges, BOTTOM, TOP, log=log)
    best = max if metric == study.monitor and not study.lower_is_better else min
    shapes = [_line(c, style, line, metric, x, y, best) for c, line, style in reversed(shown)]
    # A nested svg clips what lies above the axis.
    inside = tag("svg", *shapes, x=0, y=0, width=WIDTH, height=BOTTOM + 4, overflow="hidden")
    ends = "; ".join(f"{c.name} ends at {number(line.mean[-1])}" for c, line, _ in shown[:SERIES])
    description = f"{metric}: {len(shown)} configurations" + (", logarithmic scale" if log else "")
    description += f"{', the beginning is above the figure' if cut else ''}. {ends}"
    note = "Logarithmic scale." if log else "The beginning is above the figure." if cut else ""
    return Figure(metric, note, figure(276, metric, description, axes(x, y, "optimizer step", BOTTOM), inside))


def _heights(lines: Sequence[Band]) -> tuple[list[float], bool, bool]:
    """(values that the axis must cover, whether it is logarithmic, whether the start of the curves is cut off)."""
    last = max(step for line in lines for step in line.steps)
    points = [(s, m, d) for line in lines for s, m, d in zip(line.steps, line.mean, line.spread, strict=True)]
    late = [v for s, m, d in points if s > last * EARLY for v in (m - d, m + d)]
    means = [m for _, m, _ in points]
    if late and max(means) - min(means) > CUT_FROM * (max(late) - min(late)) and max(means) > max(late):
        return [*late, max(late) + (max(late) - min(late)) * 0.25], False, True
    log = min(means) > 0 and max(means) / min(means) > LOG_FROM
    edges = [v for _, m, d in points for v in (m - d, m + d)]
    return ([max(v, min(means) * 0.8) for v in edges] if log else edges), log, False


def _line(
    c: Configuration, style: str, line: Band, metric: str, x: Scale, y: Scale, best: Callable[[list[float]], float]
) -> Markup:
    points = list(zip(map(x, line.steps), map(y, line.mean), strict=True))
    shapes = []
    if any(line.spread):
        rows = list(zip(map(x, line.steps), line.mean, line.spread, strict=True))
        upper = [(px, y(m + d)) for px, m, d in rows]
        lower = [(px, min(y(m - d), y.start) if not y.log or m > d else y.start) for px, m, d in rows]
        shapes.append(tag("path", d=path([*upper, *reversed(lower)]) + "Z", class_="band"))
    shapes.append(tag("path", d=path(points), class_="line"))
    if len(points) <= 30:
        shapes += [tag("circle", cx=px, cy=py, r=2.2, class_="dot") for px, py in points]
    tip = f"{c.name}: {metric} {number(line.mean[-1])} at step {line.steps[-1]}"
    tip += f", best {number(best(line.mean))}, {len(c.runs)} runs"
    return tipped(tag("g", *shapes), tip, class_=f"series {style}")


def differences(comparisons: Sequence[ConfigComparison], metric: str) -> Figure | None:
    """The lead of the best over each other configuration with its interval; one that contains 0 is open."""
    shown = [c for c in comparisons if c.low is not None and c.high is not None][:MOST_LINES]
    if not shown:
        return None
    x = Scale([0.0, *(v for c in shown for v in (c.low, c.high) if v is not None)], 14, WIDTH - 14)
    height, log = 46.0 * len(shown) + 56, shown[0].rules.log
    label = f"how much lower {metric} is" if log else f"lead in {metric}"
    parts = _columns(x, 8, height, f"{label}, 95% interval", "{:.0%}".format if log else short)
    start, shift = ("start", 8) if x(0.0) < WIDTH / 2 else ("end", -8)
    for rank, c in enumerate(shown):
        at, clear = 46.0 * rank + 36, c.verdict in (Verdict.better, Verdict.behind)
        shape = tag(
            "g",
            text(x(0.0) + shift, at - 12, clip(f"over {c.second}", 40), start, class_="halo"),
            tag("line", x1=x(0.0), x2=x(0.0), y1=at - 24, y2=at + 22, class_="zero"),
            tag("line", x1=x(c.low or 0.0), x2=x(c.high or 0.0), y1=at, y2=at, class_="interval"),
            tag("circle", cx=x(c.lead), cy=at, r=5, class_="mark" if clear else "mark open"),
        )
        tip = f"{c.first} over {c.second}: {c.rules.amount(c.lead)}, {interval_of(c)}"
        parts.append(tipped(shape, tip, class_="clear" if clear else "unclear"))
    title = f"Lead of {comparisons[0].first}"
    description = f"{title}: {len(shown)} comparisons, each listed in the verdicts."
    note = "Where the mark is hollow, the difference may be noise."
    return Figure(title, note, figure(height, title, description, *parts))


def points(study: Study) -> Figure | None:
    """A row per configuration, best on top, with a dot for each run and a bar for the mean."""
    shown = [(c.name, style, c.sample(study.monitor).values.tolist()) for c, style in styled(study)[:MOST_LINES]]
    if len(shown) < 2:
        return None
    values = [value for *_, of_runs in shown for value in of_runs]
    log = min(values) > 0 and max(values) / min(values) > DOTS_LOG_FROM
    x = Scale(values, 14, WIDTH - 14, log=log)
    height = 40.0 * len(shown) + 48
    parts = _columns(x, 4, height, f"{study.monitor}{', logarithmic' if log else ''}", short)
    for rank, (name, style, of_runs) in enumerate(shown):
        at, mean = 40.0 * rank + 32, float(np.mean(of_runs))
        dots = [tag("circle", cx=x(value), cy=at, r=4, class_="dot") for value in of_runs]
        bar = tag("line", x1=x(mean), x2=x(mean), y1=at - 9, y2=at + 9, class_="line")
        shape = tag("g", text(14, at - 12, clip(name, 56), class_="halo"), *dots, bar)
        tip = f"{name}: mean {number(mean)}; {', '.join(map(number, of_runs))}"
        parts.append(tipped(shape, tip, class_=f"series {style}"))
    svg = figure(height, "Every run", f"Every run of {len(shown)} configurations.", *parts)
    return Figure("Every run", "A dot is a run, the bar their mean.", svg)


def _columns(x: Scale, top: float, height: float, below: str, label: Callable[[float], str]) -> list[Markup]:
    """Vertical grid lines with tick labels, and `below` as the axis title."""
    parts = []
    for value in x.ticks():
        parts.append(tag("line", x1=x(value), x2=x(value), y1=top, y2=height - 44, class_="grid"))
        parts.append(text(x(value), height - 26, label(value), "middle"))
    return [*parts, text(WIDTH / 2, height - 6, below, "middle", class_="faint")]


def parallel(study: Study) -> Figure | None:
    """Parallel coordinates: a line per configuration through its values to its metric; better is darker."""
    keys = study.keys
    if len(keys) < 2 or len(study.configurations) < 2:
        return None
    names = short_names(keys)
    width = max(WIDTH, 124.0 * len(keys) + 150)
    at = [24 + (width - 94) * rank / len(keys) for rank in range(len(keys) + 1)]
    levels = [study.values_of(key) for key in keys]
    spots = [{v: 155.0 if len(level) == 1 else 250 - 190 * i / (len(level) - 1) for i, v in enumerate(level)}
             for level in levels]  # fmt: skip
    means = [c.sample(study.monitor).mean for c in study.configurations]
    y = Scale(means, 60, 250) if study.lower_is_better else Scale(means, 250, 60)
    parts = []
    for rank, (c, mean) in enumerate(zip(study.configurations, means, strict=True)):
        line = path([*((at[i], spots[i][c.values[key]]) for i, key in enumerate(keys)), (at[-1], y(mean))])
        tip = f"{c.name}: {study.monitor} {number(mean)}"
        style = f"series q{min(4, rank * 5 // len(means))}"
        parts.append(tipped(tag("path", d=line, class_="line"), tip, class_=style))
    parts.reverse()  # the best on top
    labels = [[(v, spot[v]) for v in level[:: math.ceil(len(level) / 10)]]
              for level, spot in zip(levels, spots, strict=True)]  # fmt: skip
    labels.append([(short(v), y(v)) for v in y.ticks(4)])
    for i, key in enumerate([*keys, study.monitor]):
        parts.append(tag("line", x1=at[i], x2=at[i], y1=46, y2=264, class_="axis"))
        anchor = "start" if i == 0 else "middle"
        parts.append(text(at[i] - 16 * (i == 0), 22, clip(names.get(key, key), 15), anchor, class_="strong"))
        parts += [text(at[i] + 7, spot + 4, clip(label, 14), class_="halo") for label, spot in labels[i]]
    title = "Every configuration, from its values to its metric"
    description = f"{title}. The best is {study.configurations[0].name} at {number(means[0])}."
    note = "A line is a configuration; the stronger, the better. Better metrics are at the top."
    return Figure("Parallel coordinates", note, figure(280, title, description, *parts, width=width))


def importance_bars(shares: Mapping[str, float], undecided: Collection[str]) -> Figure | None:
    """Each key's share of the variance; keys without a clear verdict have a hollow bar that says so."""
    parts, listed = [], []
    for rank, (name, share) in enumerate(shares.items()):
        at, hollow = 44.0 * rank, name in undecided
        words = "not distinguishable from noise" if hollow else f"{share:.0%}"
        listed.append(f"{name} {words}")
        box = {"x": 4, "y": at + 21, "height": 12, "rx": 3}
        shape = tag(
            "g",
            text(4, at + 15, clip(name, 30)),
            text(WIDTH - 4, at + 15, words, "end", class_="faint"),
            tag("rect", **box, width=WIDTH - 8, class_="track"),
            tag("rect", **box, width=max((WIDTH - 8) * share, 1.5), class_="bar open" if hollow else "bar"),
        )
        parts.append(tipped(shape, f"{name}: {words}", class_="series s0"))
    description = f"Share of the variance: {'; '.join(listed)}."
    note = "Share of the variance that each key explains by itself in a random forest (Optuna's fANOVA)."
    svg = figure(44.0 * len(shares) + 4, "Importance of each key", description, *parts)
    return Figure("Importance", note, svg) if shares else None


@dataclass(frozen=True)
class Cell:
    """A cell of a matrix: its text, tooltip, and shade from 0 (dark) to 4."""

    words: str
    tip: str
    shade: int
    strong: bool = False


def _matrix(
    down: str, rows: Sequence[str], across: str, columns: Sequence[str], cells: Sequence[Sequence[Cell | None]],
    title: str, description: str,
) -> Markup:  # fmt: skip
    """A shaded matrix; `down` and `across` name its rows and columns, None is an empty cell."""
    left, top, high = 118.0, 62.0, 32.0
    width = max((WIDTH - left - 6) / max(len(columns), 2), 46.0)
    lefts = [left + width * j for j in range(len(columns))]
    parts = [text(left, 18, clip(across, 40), class_="faint"), text(4, 44, clip(down, 14), class_="faint")]
    for x, name in zip(lefts, columns, strict=True):
        parts.append(text(x + width / 2, 44, clip(name, int(width / 9)), "middle"))
    for i, row in enumerate(rows):
        y = top + high * i
        parts.append(text(left - 8, y + 0.6 * high, clip(row, 14), "end"))
        for x, cell in zip(lefts, cells[i], strict=True):
            box = {"x": x + 1, "y": y + 1, "width": width - 2, "height": high - 2, "rx": 3}
            if cell is None:
                parts.append(tag("rect", **box, class_="empty"))
                continue
            style = "strong" if cell.strong else None
            words = text(x + width / 2, y + 0.64 * high, cell.words, "middle", class_=style)
            parts.append(tipped(tag("g", tag("rect", **box), words), cell.tip, class_=f"cell h{cell.shade}"))
    total_width = max(WIDTH, left + len(columns) * width + 6)
    return figure(top + high * len(rows) + 6, title, description, *parts, width=total_width)


def confusion(labels: Sequence[str], counts: Sequence[Sequence[int]], name: str, runs: int) -> Figure:
    """Confusion matrix: true class down, predicted class across; darker for a larger share of the true class."""

    def cell(i: int, j: int) -> Cell:
        value, share = counts[i][j], counts[i][j] / max(1, sum(counts[i]))
        tip = f"true {labels[i]}, predicted {labels[j]}: {value:,} rows, {share:.0%} of that class"
        return Cell(f"{value:,}", tip, 4 - min(4, int(5 * share)), i == j)

    indices = range(len(labels))
    right = sum(counts[i][i] for i in indices)
    description = f"Confusion of {len(labels)} classes: {right:,} of {sum(map(sum, counts)):,} rows right."
    cells = [[cell(i, j) for j in indices] for i in indices]
    note = f"{name}, {runs} run{'s' if runs > 1 else ''}: true class down, predicted across."
    svg = _matrix("true", labels, "predicted", labels, cells, "Confusion", description)
    return Figure("Confusion", note, svg)


def heat_map(study: Study, first: str, second: str) -> Figure:
    """The metric for each pair of values of two keys, averaged over other keys; better is darker."""
    rows, columns = (study.values_of(key) for key in (first, second))
    down, across = (short_names(study.keys)[key] for key in (first, second))
    tried: dict[tuple[str, str], list[float]] = {}
    for c in study.configurations:
        tried.setdefault((c.values[first], c.values[second]), []).append(c.sample(study.monitor).mean)
    means = {pair: float(np.mean(values)) for pair, values in tried.items()}
    known = sorted(means.values(), reverse=not study.lower_is_better)

    def cell(row: str, column: str) -> Cell | None:
        value = means.get((row, column))
        if value is None:
            return None
        tip = f"{down}={row}, {across}={column}: {study.monitor} {number(value)}"
        return Cell(number(value, 3), tip, min(4, 5 * known.index(value) // len(known)))

    cells = [[cell(row, column) for column in columns] for row in rows]
    title = f"{down} with {across}"
    description = f"{title}: {study.monitor}, best {number(known[0])}."
    svg = _matrix(down, rows, across, columns, cells, title, description)
    return Figure("Interaction", f"{study.monitor}: the stronger the colour, the better.", svg)


@dataclass(frozen=True)
class Point:
    """A point of a scatter plot: position, tooltip, CSS class of its colour, and whether it is marked as wrong."""

    x: float
    y: float
    tip: str
    style: str = "s0"
    wrong: bool = False


def scatter(
    points: Sequence[Point], title: str, note: str, across: str, up: str = "", *, names: Sequence[str] = ()
) -> Figure:
    """A scatter plot; wrong points are crosses, so that colour is not the only mark. `names` label the colours.

    Without `up` (the y axis) only distances have a meaning, and the axes have no numbers.
    """
    x, y = Scale([p.x for p in points], 58, WIDTH - 12), Scale([p.y for p in points], 286, 26)
    parts = [axes(x, y, across, 286) if up else text((58 + WIDTH) / 2, 314, across, "middle", class_="faint")]
    parts.append(text(8, 14, up, class_="faint"))
    for rank, name in enumerate(names):
        left, top = 14 + (rank % 3) * (WIDTH - 20) / 3, 346 + 22 * (rank // 3)
        dot = tag("circle", cx=left, cy=top - 5, r=5, class_="point")
        parts.append(tag("g", dot, text(left + 10, top, clip(name, 16)), class_=f"s{rank}"))
    for p in points:
        px, py = x(p.x), y(p.y)
        if p.wrong:
            cross = f"M{px - 4:.1f},{py - 4:.1f}l8,8M{px + 4:.1f},{py - 4:.1f}l-8,8"
            shape = tag("path", d=cross, class_="cross")
        else:
            shape = tag("circle", cx=px, cy=py, r=4, class_="point")
        parts.append(tipped(shape, p.tip, class_=f"series {p.style}"))
    svg = figure(326 + 22 * math.ceil(len(names) / 3), title, f"{title}: {len(points)} points.", *parts)
    return Figure(title, note, svg)
