"""Names of columns: alone, in templates such as "{question} {context}", and below others (`instances[0].output`)."""

from __future__ import annotations

import datetime
import json
import math
import re
import string
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

from llmft.core.errors import did_you_mean

_STEP = re.compile(r"\[(-?\d+)\]|\.?([^.\[\]]+)")


class NotFinite(str):
    """A cell of a text file that says inf or nan, or overflows, where the other rows have numbers."""

    __slots__ = ()


class Unreadable:
    """A value that Python has no type for, or that is damaged; it matters only where somebody asks for it."""

    def __init__(self, kind: Any) -> None:
        self.kind = str(kind)

    def __str__(self) -> str:
        return f"<{self.kind}>"


def pieces(template: str) -> list[tuple[str, str | None]]:
    """A template as texts, each with the name of the column behind it; a name without braces stands for itself.

    Raises ValueError for braces that do not close.
    """
    if "{" not in template:
        return [("", template)]
    parts = []
    for text, name, spec, conversion in string.Formatter().parse(template):
        if name is not None:  # nothing is formatted: what Python would take for a format belongs to the name
            name += (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")
        parts.append((text, name))
    return parts


def names_in(template: str | None) -> list[str]:
    """The columns that a template reads; none where it is null."""
    return [name for _, name in pieces(template) if name is not None] if template else []


def below(values: dict[str, Any], name: str) -> Any:
    """What lies under a nested name. Raises KeyError or IndexError where nothing does."""
    value: Any = values
    position = 0
    while position < len(name):
        step = _STEP.match(name, position)
        if step is None:
            raise KeyError(name)
        if step[1] and isinstance(value, list):
            value = value[int(step[1])]
        elif step[2] and isinstance(value, dict):
            value = value[step[2]]
        else:  # a letter of a text is no part of it
            raise KeyError(name)
        position = step.end()
    return value


def is_nested(name: str) -> bool:
    """Whether a name may mean something below a column."""
    return "." in name or "[" in name


def root_of(name: str) -> str:
    """The column above a nested name."""
    return re.split(r"[.\[]", name, maxsplit=1)[0]


def no_column(name: str, values: dict[str, Any], used: set[str] = frozenset()) -> str:  # type: ignore[assignment]
    """'no column X; did you mean Y?', where Y is none of `used`."""
    options = set(_paths(values)) if is_nested(name) else set(values)
    return f"no column '{name}'{did_you_mean(name, options - used)}"


def _paths(values: Any, prefix: str = "", depth: int = 0) -> Iterator[str]:
    """The names of all that lies in a row, of lists that of the first element."""
    inner: list[tuple[str, Any]] = []
    if isinstance(values, dict):
        inner = [(f"{prefix}.{key}" if prefix else str(key), value) for key, value in values.items()]
    elif isinstance(values, list) and values:
        inner = [(f"{prefix}[0]", values[0])]
    for name, value in inner[:100]:
        yield name
        if depth < 4:
            yield from _paths(value, name, depth + 1)


def cell_text(value: Any, name: str) -> str:
    """A cell as text: numbers as Python writes them, dates as ISO 8601 does.

    Raises ValueError for what is no text, such as bytes, objects, and numbers that are not finite.
    """
    if isinstance(value, NotFinite) or (isinstance(value, (float, Decimal)) and not math.isfinite(value)):
        empty = isinstance(value, float) and math.isnan(value)
        raise ValueError(
            f"column '{name}' {'is empty (not a number)' if empty else f'holds {value}, no finite number'}"
        )
    if isinstance(value, (str, int, float)):
        return str(value)
    if isinstance(value, Decimal):
        return format(value, "f")
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    if isinstance(value, Unreadable):
        raise ValueError(f"column '{name}' holds a {value.kind} that cannot be read")
    raise ValueError(f"column '{name}' holds {type(value).__name__}, text was expected")


def stable_text(value: Any) -> str:
    """What a row or a cell holds as one text, the same on every machine: JSON, and text for what JSON lacks."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=str)
