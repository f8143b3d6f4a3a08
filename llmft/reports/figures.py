"""The report's figures, as SVG that needs nothing but itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from llmft.reports.configurations import Configuration, Study, short_names, sorted_values
from llmft.reports.curves import Band, band
from llmft.reports.importance import interaction
from llmft.reports.svg import SERIES, WIDTH, Scale, clip, figure, short, tag, text, tipped
from llmft.reports.verdicts import Comparison, Verdict, interval_of, number

MOST_LINES = 24
TOP, BOTTOM = 14, 236
EARLY, CUT_FROM = 0.15, 3.0
"""Where the first so much of the steps spans more than so many times the rest, the rest is shown."""
LOG_FROM, DOTS_LOG_FROM = 20.0, 3.0
"""Curves, and dots of runs, whose values span more than so many times the smallest get a logarithmic axis."""


@dataclass(frozen=True)
class Series:
    """One line of a legend: a configuration and the class of its colour."""

    name: str
    style: str


def series_of(study: Study) -> list[Series]:
    """The best configurations in colour, the rest in grey."""
    return [Series(c.name, f"s{place}" if place < SERIES else "rest") for place, c in enumerate(study.configurations)]


def curves(study: Study, metric: str, title: str) -> tuple[Markup, str] | None:
    """Mean of a metric over a configuration's runs by step, one standard deviation between runs as a band; and
    what to know of the axis."""
    found: list[tuple[Configuration, Series, Band]] = []
    for configuration, series in list(zip(study.configurations, series_of(study), strict=True))[:MOST_LINES]:
        line = band([run.curve(metric) for run in configuration.runs])
        if line is not None and len(line.steps) > 1:
            found.append((configuration, series, line))
    if not found:
        return None
    x = Scale([s for _, _, line in found for s in line.steps], 52, WIDTH - 10, pad=0.01)
    edges, log, cut = _heights([line for _, _, line in found])
    y = Scale(edges, BOTTOM, TOP, log=log)
    best = max if metric == study.monitor and not study.lower_is_better else min
    lines = [_line(configuration, series, line, metric, x, y, best) for configuration, series, line in reversed(found)]
    # What lies above the highest tick is cut off by a picture of its own.
    inside = tag("svg", *lines, x=0, y=0, width=WIDTH, height=BOTTOM + 4, overflow="hidden")
    note = f"{title}: {len(found)} configurations" + (", logarithmic scale" if log else "")
    note += ", the beginning is above the figure" if cut else ""
    drawn = figure(276, title, f"{note}. {_ends(found)}", _axes(x, y, "optimizer step", BOTTOM), inside)
    return drawn, "Logarithmic scale." if log else "The beginning is above the figure." if cut else ""


def _heights(lines: Sequence[Band]) -> tuple[list[float], bool, bool]:
    """(values that the axis must hold, whether it is logarithmic, whether the curves' beginning is left out)."""
    last = max(step for line in lines for step in line.steps)
    pairs = [(s, m, d) for line in lines for s, m, d in zip(line.steps, line.mean, line.spread, strict=True)]
    late = [v for s, m, d in pairs if s > last * EARLY for v in (m - d, m + d)]
    whole = [m for _, m, _ in pairs]
    if late and max(whole) - min(whole) > CUT_FROM * (max(late) - min(late)) and max(whole) > max(late):
        return [*late, max(late) + (max(late) - min(late)) * 0.25], False, True
    log = min(whole) > 0 and max(whole) / min(whole) > LOG_FROM
    edges = [v for _, m, d in pairs for v in (m - d, m + d)]
    return ([max(v, min(whole) * 0.8) for v in edges] if log else edges), log, False


def _ends(found: Sequence[tuple[Configuration, Series, Band]]) -> str:
    return "; ".join(f"{c.name} ends at {number(line.mean[-1])}" for c, _, line in found[:SERIES])


def _axes(x: Scale, y: Scale, below: str, bottom: float) -> Markup:
    parts = []
    for value in y.ticks():
        parts.append(tag("line", x1=52, x2=WIDTH - 10, y1=y(value), y2=y(value), class_="grid"))
        parts.append(text(46, y(value) + 4, short(value), "end"))
    for value in x.ticks():
        parts.append(text(x(value), bottom + 18, short(value), "middle"))
    parts.append(text((52 + WIDTH) / 2, bottom + 36, below, "middle", class_="faint"))
    return tag("g", *parts, class_="axes", aria_hidden="true")


def _line(
    c: Configuration, series: Series, line: Band, metric: str, x: Scale, y: Scale, best: Callable[[list[float]], float]
) -> Markup:
    points = [(x(step), y(mean)) for step, mean in zip(line.steps, line.mean, strict=True)]
    shapes = []
    if any(line.spread):
        low = y.start
        edge = [(x(s), y(m + d)) for s, m, d in zip(line.steps, line.mean, line.spread, strict=True)]
        back = [
            (x(s), min(y(m - d), low) if not y.log or m > d else low)
            for s, m, d in zip(line.steps, line.mean, line.spread, strict=True)
        ]
        shapes.append(tag("path", d=_path([*edge, *reversed(back)]) + "Z", class_="band"))
    shapes.append(tag("path", d=_path(points), class_="line"))
    if len(points) <= 30:
        shapes += [tag("circle", cx=px, cy=py, r=2.2, class_="dot") for px, py in points]
    tip = f"{c.name}: {metric} {number(line.mean[-1])} at step {line.steps[-1]}"
    tip += f", best {number(best(line.mean))}, {len(c.runs)} runs"
    return tipped(tag("g", *shapes), tip, class_=f"series {series.style}")


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{px:.1f},{py:.1f}" for px, py in points)


def differences(comparisons: Sequence[Comparison], title: str, unit: str) -> Markup | None:
    """The lead of the best over each other one with its interval; one that holds 0 tells nothing apart."""
    shown = [c for c in comparisons if c.low is not None and c.high is not None][:MOST_LINES]
    if not shown:
        return None
    x = Scale([0.0, *(v for c in shown for v in (c.low, c.high) if v is not None)], 14, WIDTH - 14)
    height = 46.0 * len(shown) + 56
    parts = []
    for value in x.ticks():
        parts.append(tag("line", x1=x(value), x2=x(value), y1=8, y2=height - 44, class_="grid"))
        parts.append(text(x(value), height - 26, f"{value:.0%}" if shown[0].rules.log else short(value), "middle"))
    left = x(0.0) < WIDTH / 2
    of = f"lead in {unit}" if not shown[0].rules.log else f"how much lower {unit} is"
    parts.append(text(WIDTH / 2, height - 6, f"{of}, 95% interval", "middle", class_="faint"))
    for place, c in enumerate(shown):
        at = 46.0 * place + 36
        clear, words = c.verdict in (Verdict.better, Verdict.behind), clip(f"over {c.second}", 40)
        shape = tag(
            "g",
            text(x(0.0) + (8 if left else -8), at - 12, words, "start" if left else "end", class_="halo"),
            tag("line", x1=x(0.0), x2=x(0.0), y1=at - 24, y2=at + 22, class_="zero"),
            tag("line", x1=x(c.low or 0.0), x2=x(c.high or 0.0), y1=at, y2=at, class_="interval"),
            tag("circle", cx=x(c.lead), cy=at, r=5, class_="mark" if clear else "mark open"),
        )
        tip = f"{c.first} over {c.second}: {c.rules.told(c.lead)}, {interval_of(c)}"
        parts.append(tipped(shape, tip, class_="clear" if clear else "unclear"))
    return figure(height, title, f"{title}: {len(shown)} comparisons, each listed in the verdicts.", *parts)


def points(study: Study) -> Markup | None:
    """A dot for every run and a bar for the mean, a line per configuration, the best on top."""
    shown = study.configurations[:MOST_LINES]
    if len(shown) < 2:
        return None
    values = [c.sample(study.monitor).values for c in shown]
    every = [float(v) for own in values for v in own]
    log = min(every) > 0 and max(every) / min(every) > DOTS_LOG_FROM
    x = Scale(every, 14, WIDTH - 14, log=log)
    height = 40.0 * len(shown) + 48
    parts = []
    for value in x.ticks():
        parts.append(tag("line", x1=x(value), x2=x(value), y1=4, y2=height - 44, class_="grid"))
        parts.append(text(x(value), height - 26, short(value), "middle"))
    note = f"{study.monitor}{', logarithmic' if log else ''}"
    parts.append(text(WIDTH / 2, height - 6, note, "middle", class_="faint"))
    for place, (c, own) in enumerate(zip(shown, values, strict=True)):
        at, mean = 40.0 * place + 32, float(own.mean())
        dots = [tag("circle", cx=x(float(value)), cy=at, r=4, class_="dot") for value in own]
        bar = tag("line", x1=x(mean), x2=x(mean), y1=at - 9, y2=at + 9, class_="line")
        words = f"{c.name}: mean {number(mean)}; {', '.join(number(float(value)) for value in own)}"
        shape = tag("g", text(14, at - 12, clip(c.name, 56), class_="halo"), *dots, bar)
        parts.append(tipped(shape, words, class_=f"series s{place}" if place < SERIES else "series rest"))
    return figure(height, "Every run", f"Every run of {len(shown)} configurations.", *parts)


def parallel(study: Study) -> Markup | None:
    """A line per configuration through its value of each key to its metric; the better, the darker."""
    keys = study.keys
    if len(keys) < 2 or len(study.configurations) < 2:
        return None
    names = short_names(keys)
    width = max(WIDTH, 124.0 * len(keys) + 150)
    at = [24 + (width - 94) * place / len(keys) for place in range(len(keys) + 1)]
    levels = [sorted_values({c.values[key] for c in study.configurations}) for key in keys]
    spots = [{v: _spot(i, len(level)) for i, v in enumerate(level)} for level in levels]
    means = [c.sample(study.monitor).mean for c in study.configurations]
    y = Scale(means, 60, 250) if study.lower_is_better else Scale(means, 250, 60)
    parts = []
    for place, (configuration, mean) in enumerate(zip(study.configurations, means, strict=True)):
        points = [(at[i], spots[i][configuration.values[key]]) for i, key in enumerate(keys)]
        points.append((at[-1], y(mean)))
        style = f"q{min(4, place * 5 // len(means))}"
        tip = f"{configuration.name}: {study.monitor} {number(mean)}"
        parts.append(tipped(tag("path", d=_path(points), class_="line"), tip, class_=f"series {style}"))
    parts.reverse()  # the best on top
    for i, key in enumerate([*keys, study.monitor]):
        parts.append(tag("line", x1=at[i], x2=at[i], y1=46, y2=264, class_="axis"))
        anchor = "start" if i == 0 else "middle"
        parts.append(text(at[i] - 16 * (i == 0), 22, clip(names.get(key, key), 15), anchor, class_="strong"))
        for label, spot in _labels(levels[i], spots[i]) if i < len(keys) else [(short(v), y(v)) for v in y.ticks(4)]:
            parts.append(text(at[i] + 7, spot + 4, clip(label, 14), class_="halo"))
    title = "Every configuration, from its values to its metric"
    best = study.configurations[0]
    return figure(280, title, f"{title}. The best is {best.name} at {number(means[0])}.", *parts, width=width)


def _spot(place: int, count: int) -> float:
    return 155.0 if count == 1 else 250 - 190 * place / (count - 1)


def _labels(level: Sequence[str], spots: dict[str, float]) -> list[tuple[str, float]]:
    stride = math.ceil(len(level) / 10)
    return [(value, spots[value]) for value in level[::stride]]


def importance_bars(shares: Mapping[str, float], undecided: Collection[str] = ()) -> Markup:
    """Each key's share of the variance; the bar of a key that no verdict tells from noise is hollow and says so."""
    parts, listed = [], []
    for place, (name, share) in enumerate(shares.items()):
        at, hollow = 44.0 * place, name in undecided
        words = "not distinguishable from noise" if hollow else f"{share:.0%}"
        listed.append(f"{name} {words}")
        shape = tag(
            "g",
            text(4, at + 15, clip(name, 30)),
            text(WIDTH - 4, at + 15, words, "end", class_="faint"),
            tag("rect", x=4, y=at + 21, width=WIDTH - 8, height=12, rx=3, class_="track"),
            tag(
                "rect", x=4, y=at + 21, width=max((WIDTH - 8) * share, 1.5), height=12, rx=3,
                class_="bar open" if hollow else "bar",
            ),
        )  # fmt: skip
        parts.append(tipped(shape, f"{name}: {words}", class_="series s0"))
    note = f"Share of the variance: {'; '.join(listed)}."
    return figure(44.0 * len(shares) + 4, "Importance of each key", note, *parts)


def confusion(labels: Sequence[str], counts: Sequence[Sequence[int]]) -> Markup:
    """Rows by true class (down) and likeliest class (across); the larger its share of the true class, the darker."""
    left, top, high = 118.0, 62.0, 32.0
    width = max((WIDTH - left - 6) / len(labels), 46.0)
    whole = max(WIDTH, left + len(labels) * width + 6)
    parts = [
        text(left, 18, "predicted", class_="faint"),
        text(4, 44, "true", class_="faint"),
        *(text(left + width * (j + 0.5), 44, clip(v, int(width / 9)), "middle") for j, v in enumerate(labels)),
    ]
    for i, (label, row) in enumerate(zip(labels, counts, strict=True)):
        parts.append(text(left - 8, top + high * (i + 0.6), clip(label, 14), "end"))
        for j, value in enumerate(row):
            share = value / max(1, sum(row))
            box = {"x": left + width * j + 1, "y": top + high * i + 1, "width": width - 2, "height": high - 2, "rx": 3}
            word = text(
                left + width * (j + 0.5), top + high * (i + 0.64), f"{value:,}", "middle", class_="strong" * (i == j)
            )
            tip = f"true {label}, predicted {labels[j]}: {value:,} rows, {share:.0%} of that class"
            style = f"h{4 - min(4, int(5 * share))}"
            parts.append(tipped(tag("g", tag("rect", **box), word), tip, class_=f"cell {style}"))
    right = sum(row[i] for i, row in enumerate(counts))
    note = f"Confusion of {len(labels)} classes: {right:,} of {sum(map(sum, counts)):,} rows right."
    return figure(top + high * len(labels) + 6, "Confusion", note, *parts, width=whole)


def heat_map(study: Study, first: str, second: str) -> Markup:
    """The metric for each pair of values of two keys, a mean over the others; the better, the darker."""
    rows, columns, table = interaction(study, first, second)
    names = short_names(study.keys)
    known = sorted((v for row in table for v in row if v is not None), reverse=not study.lower_is_better)
    left, top = 118.0, 44.0
    width = min((WIDTH - left - 6) / len(columns), 168.0)
    whole = max(WIDTH, left + len(columns) * max(width, 52.0) + 6)
    width, high = max(width, 52.0), 36.0
    parts = [
        text(left + width * len(columns) / 2, 16, clip(names[second], 40), "middle", class_="strong"),
        text(4, 36, clip(names[first], 14), class_="strong"),
    ]
    parts += [text(left + width * (j + 0.5), 36, clip(v, int(width / 7)), "middle") for j, v in enumerate(columns)]
    for i, row in enumerate(rows):
        parts.append(text(left - 8, top + high * (i + 0.6), clip(row, 14), "end"))
        for j, column in enumerate(columns):
            value = table[i][j]
            box = {"x": left + width * j + 1, "y": top + high * i + 1, "width": width - 2, "height": high - 2, "rx": 3}
            if value is None:
                parts.append(tag("rect", **box, class_="empty"))
                continue
            style = f"h{min(4, 5 * known.index(value) // len(known))}"
            label = text(left + width * (j + 0.5), top + high * (i + 0.62), number(value, 3), "middle")
            tip = f"{names[first]}={row}, {names[second]}={column}: {study.monitor} {number(value)}"
            parts.append(tipped(tag("g", tag("rect", **box), label), tip, class_=f"cell {style}"))
    title = f"{names[first]} with {names[second]}"
    best = min if study.lower_is_better else max
    note = f"{title}: {study.monitor}, best {number(best(known))}."
    return figure(top + high * len(rows) + 6, title, note, *parts, width=whole)


@dataclass(frozen=True)
class Point:
    """A dot of a scatter: place, words on hover, class of its colour, and whether it is marked as wrong."""

    x: float
    y: float
    tip: str
    style: str = "s0"
    wrong: bool = False


def scatter(
    points: Sequence[Point], title: str, across: str, up: str, *, labels: bool = True, names: Sequence[str] = ()
) -> Markup:
    """Dots; wrong ones as crosses, so that colour is not all that tells. `names` are those of the colours, in order."""
    x = Scale([p.x for p in points], 58, WIDTH - 12)
    y = Scale([p.y for p in points], 286, 26)
    parts = []
    if labels:
        parts.append(_axes(x, y, across, 286))
    else:
        parts.append(text((58 + WIDTH) / 2, 314, across, "middle", class_="faint"))
    parts.append(text(8, 14, up, class_="faint"))
    for place, name in enumerate(names):
        left, top = 14 + (place % 3) * (WIDTH - 20) / 3, 346 + 22 * (place // 3)
        dot = tag("circle", cx=left, cy=top - 5, r=5, class_="point")
        parts.append(tag("g", dot, text(left + 10, top, clip(name, 16)), class_=f"s{place}"))
    for p in points:
        px, py = x(p.x), y(p.y)
        if p.wrong:
            cross = f"M{px - 4:.1f},{py - 4:.1f}l8,8M{px + 4:.1f},{py - 4:.1f}l-8,8"
            shape = tag("path", d=cross, class_="cross")
        else:
            shape = tag("circle", cx=px, cy=py, r=4, class_="point")
        parts.append(tipped(shape, p.tip, class_=f"series {p.style}"))
    return figure(326 + 22 * math.ceil(len(names) / 3), title, f"{title}: {len(points)} points.", *parts)
