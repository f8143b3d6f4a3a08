"""Building blocks of figures: escaped SVG elements, scales, ticks."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence

from markupsafe import Markup, escape

WIDTH = 460
"""Units across a figure: on a phone of 390 pixels, text of 13 units is 10 pixels high."""
SERIES = 7
"""Number of colours, distinguishable with any colour vision (Okabe and Ito); lines also differ in their dashes."""


def tag(name: str, *children: str | Markup, **attributes: object) -> Markup:
    """An escaped element; `class_` becomes class, `font_size` font-size; attributes that are None are left out."""
    parts = []
    for key, value in attributes.items():
        shown = f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else value
        if shown is not None:
            parts.append(Markup(' {}="{}"').format(key.rstrip("_").replace("_", "-"), shown))
    inner = Markup("").join(escape(child) for child in children)
    return Markup("<{0}{1}>{2}</{0}>").format(Markup(name), Markup("").join(parts), inner)


def text(x: float, y: float, words: str, anchor: str = "start", **attributes: object) -> Markup:
    return tag("text", words, x=float(x), y=float(y), text_anchor=anchor, **attributes)


def figure(height: float, title: str, description: str, *children: Markup, width: float = WIDTH) -> Markup:
    """An SVG with a title and a description for screen readers."""
    # A wide figure scrolls on a narrow screen; scaled down, its text would be unreadable.
    wide = {"style": f"min-width: {0.7 * width:.0f}px"} if width > WIDTH else {}
    name = f"f{zlib.crc32(f'{title} {description}'.encode())}"
    head = [tag("title", title, id=f"{name}t"), tag("desc", description, id=f"{name}d")]
    box, labels = f"0 0 {width:g} {height:g}", f"{name}t {name}d"
    return tag("svg", *head, *children, viewBox=box, role="group", aria_labelledby=labels, class_="figure", **wide)


def tipped(shape: Markup, tip: str, **attributes: object) -> Markup:
    """A shape that shows `tip` on hover or keyboard focus."""
    return tag("g", shape, tabindex=0, role="img", aria_label=tip, data_tip=tip, **attributes)


def path(points: Sequence[tuple[float, float]]) -> str:
    """The `d` attribute of a line through `points`."""
    return "M" + "L".join(f"{x:.1f},{y:.1f}" for x, y in points)


def clip(words: str, maximum: int) -> str:
    """`words` on one line of at most `maximum` characters."""
    line = " ".join(words.split())
    return line if len(line) <= maximum else f"{line[: maximum - 1]}…"


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers within low..high."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(number * step, 12) for number in range(first, math.floor(high / step + 1e-9) + 1)]


class Scale:
    """Maps values to positions along an axis."""

    def __init__(self, values: Sequence[float], start: float, end: float, *, log: bool = False, pad: float = 0.04):
        low, high = min(values), max(values)
        if not high > low:
            low, high = low - (abs(low) * 0.05 or 0.5), high + (abs(high) * 0.05 or 0.5)
            log = log and low > 0
        if log:
            low, high = math.log(low), math.log(high)
        room = (high - low) * pad
        self.low, self.high, self.log = low - room, high + room, log
        self.start, self.end = start, end

    def __call__(self, value: float) -> float:
        position = math.log(max(value, 1e-300)) if self.log else value
        return self.start + (position - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self, count: int = 5) -> list[float]:
        if not self.log:
            return ticks(self.low, self.high, count)
        low, high = math.exp(self.low), math.exp(self.high)
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        values = [factor * 10.0**power for power in powers for factor in (1, 2, 5)]
        return [value for value in values if low <= value <= high] or [low, high]


def short(value: float) -> str:
    """A tick's label."""
    if value != 0 and (abs(value) < 1e-3 or abs(value) >= 1e5):
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:.6g}"


def axes(x: Scale, y: Scale, below: str, bottom: float) -> Markup:
    """Tick labels at the left with grid lines, tick labels at the `bottom`, and `below` as the axis title."""
    parts = []
    for value in y.ticks():
        parts.append(tag("line", x1=52, x2=WIDTH - 10, y1=y(value), y2=y(value), class_="grid"))
        parts.append(text(46, y(value) + 4, short(value), "end"))
    parts += [text(x(value), bottom + 18, short(value), "middle") for value in x.ticks()]
    parts.append(text((52 + WIDTH) / 2, bottom + 36, below, "middle", class_="faint"))
    return tag("g", *parts, class_="axes", aria_hidden="true")
