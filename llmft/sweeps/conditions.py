"""Conditions on the parameters of a search, such as `lora.r in [8,16] and optimizer == adamw`."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from llmft.config.overrides import unquoted
from llmft.core.errors import ConfigError

Value = str | int | float
"""A choice is a string, as on the command line; a value from a range is a number."""
CLAUSE = re.compile(r"([\w./@-]+)\s*(==|!=|<=|>=|<|>|\bnot\s+in\b|\bin\b)\s*(\[[^\[\]]*\]|[^\[\]=<>!]+)")
COMPARE = {"<": lambda a, b: a < b, "<=": lambda a, b: a <= b, ">": lambda a, b: a > b, ">=": lambda a, b: a >= b}


@dataclass(frozen=True)
class Clause:
    """`key operator values`, such as `lora.r in [8,16]`."""

    key: str
    operator: str
    values: tuple[str, ...]

    def is_satisfied_by(self, value: Value) -> bool:
        """Whether `value` satisfies the clause; numbers are compared by value, not by spelling."""
        if self.operator in COMPARE:
            number, bound = number_of(value), number_of(self.values[0])
            return number is not None and bound is not None and COMPARE[self.operator](number, bound)
        is_listed = any(_same(value, other) for other in self.values)
        return is_listed if self.operator in ("==", "in") else not is_listed


def parse_condition(key: str, text: str) -> tuple[Clause, ...]:
    """The clauses of `lora.r in [8,16] and optimizer == adamw`; raises ConfigError for anything else."""
    clauses = []
    for part in re.split(r"\s+and\s+", text.strip()):
        match = CLAUSE.fullmatch(part.strip())
        operator = " ".join(match[2].split()) if match else ""
        listed = match is not None and match[3].startswith("[")
        values = tuple(value.strip() for value in match[3].strip("[]").split(",")) if match else ()
        sound = bool(values) and all(values) and listed == (operator in ("in", "not in"))
        if not sound or (operator in COMPARE and number_of(values[0]) is None):
            raise ConfigError(
                f"hydra.sweeper.conditions.{key}: '{text}' is not a condition; write for example 'lora.r in [8,16]', "
                "'optimizer == adamw' or 'lora.r >= 8', joined by 'and'."
            )
        assert match is not None
        clauses.append(Clause(match[1], operator, values))
    return tuple(clauses)


def number_of(text: Value) -> float | None:
    """`text` as a finite number; None if it is not one."""
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _same(one: Value, other: Value) -> bool:
    a, b = number_of(one), number_of(other)
    return a == b if a is not None and b is not None else unquoted(str(one)) == unquoted(str(other))
