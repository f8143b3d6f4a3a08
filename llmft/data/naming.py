"""Column names, templates such as "{question} {context}", and nested names such as `instances[0].output`."""

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
    """A cell that contains inf, nan or an overflow in a column of numbers of a text file."""

    __slots__ = ()


class Unreadable:
    """A value that Python cannot represent, or that is damaged; it is an error only where it is used."""

    def __init__(self, kind: Any) -> None:
        self.kind = str(kind)

    def __str__(self) -> str:
        return f"<{self.kind}>"


def pieces(template: str) -> list[tuple[str, str | None]]:
    """A template as pairs of a text and the column after it; a template without braces is a column's name.

    Raises ValueError for braces that do not close.
    """
    if "{" not in template:
        return [("", template)]
    parts = []
    for text, name, spec, conversion in string.Formatter().parse(template):
        if name is not None:  # what Python takes for a format is part of the name
            name += (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")
        parts.append((text, name))
    return parts


def names_in(template: str | None) -> list[str]:
    """The columns that a template reads; none for null."""
    return [name for _, name in pieces(template) if name is not None] if template else []


def nested_value(values: dict[str, Any], name: str) -> Any:
    """The value of a nested name. Raises KeyError or IndexError where there is none."""
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
        else:  # indexing a text is refused
            raise KeyError(name)
        position = step.end()
    return value


def is_nested(name: str) -> bool:
    """Whether a name may be nested."""
    return "." in name or "[" in name


def root_column(name: str) -> str:
    """The column that a nested name begins with."""
    return re.split(r"[.\[]", name, maxsplit=1)[0]


def missing_column(name: str, values: dict[str, Any], taken: set[str] = frozenset()) -> str:  # type: ignore[assignment]
    """'no column X; did you mean Y?', where Y is not in `taken`."""
    options = set(_all_names(values)) if is_nested(name) else set(values)
    return f"no column '{name}'{did_you_mean(name, options - taken)}"


def _all_names(values: Any, prefix: str = "", depth: int = 0) -> Iterator[str]:
    """The nested names of all values in a row; of a list those of its first element."""
    children: list[tuple[str, Any]] = []
    if isinstance(values, dict):
        children = [(f"{prefix}.{key}" if prefix else str(key), value) for key, value in values.items()]
    elif isinstance(values, list) and values:
        children = [(f"{prefix}[0]", values[0])]
    for name, value in children[:100]:
        yield name
        if depth < 4:
            yield from _all_names(value, name, depth + 1)


def cell_text(value: Any, name: str) -> str:
    """A cell as text: numbers as Python writes them, dates in ISO 8601.

    Raises ValueError for bytes, objects and numbers that are not finite.
    """
    if isinstance(value, NotFinite) or (isinstance(value, (float, Decimal)) and not math.isfinite(value)):
        if isinstance(value, float) and math.isnan(value):
            raise ValueError(f"column '{name}' is empty (not a number)")
        raise ValueError(f"column '{name}' contains {value}, which is not a finite number")
    if isinstance(value, (str, int, float)):
        return str(value)
    if isinstance(value, Decimal):
        return format(value, "f")
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    if isinstance(value, Unreadable):
        raise ValueError(f"column '{name}' contains a {value.kind} that cannot be read")
    raise ValueError(f"column '{name}' contains {type(value).__name__}, text was expected")


def stable_text(value: Any) -> str:
    """A row or a cell as canonical JSON, with `str` for types that JSON lacks."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=str)
