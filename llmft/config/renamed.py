"""Renamed keys: on the command line the old name works for one more release, with a warning."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

RENAMED = {
    "data.rate": "data.learning_rate_factor",
    "task.rate": "task.learning_rate_factor",
    "data.pseudo_floor": "data.pseudo_min_confidence",
    "data.pseudo_cap": "data.pseudo_max_per_class",
    "sweep.silence_limit": "sweep.heartbeat_timeout",
    "sweep.twin_of": "sweep.early_stop_if_same_as",
    "sweep.twin_noise": "sweep.early_stop_noise",
}


def with_new_names(arguments: Sequence[str]) -> list[str]:
    """A command line's `arguments` with the current names; warns of each old one."""
    renamed = []
    for argument in arguments:
        old = argument.partition("=")[0].lstrip("+~")
        if (new := RENAMED.get(old)) is not None:
            print(f"warning: {old} is now called {new}; the old name ends with the next release.", file=sys.stderr)
            argument = argument.replace(old, new, 1)
        renamed.append(argument)
    return renamed


def move(plain: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """A config as plain data, with the dotted keys of `names` renamed to their values if present."""
    moved = {group: dict(values) if isinstance(values, dict) else values for group, values in plain.items()}
    for old, new in names.items():
        group, key = old.split(".")
        if isinstance(moved.get(group), dict) and key in moved[group]:
            moved[group][new.partition(".")[2]] = moved[group].pop(key)
    return moved
