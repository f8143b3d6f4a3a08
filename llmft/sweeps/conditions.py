"""Conditions on the parameters of a search, such as `lora.r in [8,16] and optimizer == adamw`."""

from __future__ import annotations

import math
import operator
import re
from dataclasses import dataclass

from llmft.config.overrides import unquoted
from llmft.core.errors import ConfigError

Value = str | int | float
"""A choice is a string, as on the command line; a value from a range is a number."""
CLAUSE = re.compile(r"([\w./@-]+)\s*(==|!=|<=|>=|<|>|\bnot\s+in\b|\bin\b)\s*(\[[^\[\]]*\]|[^\[\]=<>!]+)")
COMPARE = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}


@dataclass(frozen=True)
class Clause:
    """`key relation values`, such as `lora.r in [8,16]`."""

    key: str
    relation: str
    values: tuple[float | str, ...]

    def is_satisfied_by(self, value: Value) -> bool:
        """Whether `value` satisfies the clause; numbers are compared by value, not by spelling."""
        compared = _comparable(value)
        if self.relation in COMPARE:
            return isinstance(compared, float) and bool(COMPARE[self.relation](compared, self.values[0]))
        return (compared in self.values) == (self.relation in ("==", "in"))


def parse_condition(key: str, text: str) -> tuple[Clause, ...]:
    """The clauses of `lora.r in [8,16] and optimizer == adamw`; raises ConfigError for anything else."""
    clauses = []
    for part in re.split(r"\s+and\s+", text.strip()):
        match = CLAUSE.fullmatch(part.strip())
        relation = " ".join(match[2].split()) if match else ""
        values = [value.strip() for value in match[3].strip("[]").split(",")] if match else [""]
        bounds = tuple(map(_comparable, values))
        listed = match is not None and match[3].startswith("[")
        is_sound = all(values) and listed == (relation in ("in", "not in"))
        if match is None or not is_sound or (relation in COMPARE and isinstance(bounds[0], str)):
            raise ConfigError(
                f"hydra.sweeper.conditions.{key}: '{text}' is not a condition; write for example 'lora.r in [8,16]', "
                "'optimizer == adamw' or 'lora.r >= 8', joined by 'and'."
            )
        clauses.append(Clause(match[1], relation, bounds))
    return tuple(clauses)


def _comparable(value: Value) -> float | str:
    """A finite number as a float, any other text without its quotes."""
    text = unquoted(str(value))
    try:
        number = float(text)
    except ValueError:
        return text
    return number if math.isfinite(number) else text
