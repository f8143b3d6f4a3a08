"""Kinds of fields of the configs' dataclasses, and checks whose errors name the key."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import field
from typing import Any

from omegaconf import MISSING

from llmft.core.errors import ConfigError

Texts = Any
"""One text, such as a path or glob, or a list of them. The command line is not parsed further, unlike other `Any`."""


def _field(mark: str, default: Any, factory: Any) -> Any:
    if factory is not None:
        return field(default_factory=factory, metadata={mark: True})
    return field(default=default, metadata={mark: True})


def not_in_key(default: Any = MISSING, *, factory: Any = None) -> Any:
    """A field that cannot change a run's results and is not part of its key."""
    return _field("not_in_key", default, factory)


def later(default: Any = MISSING, *, factory: Any = None) -> Any:
    """A field left out of the run key at its default, so keys of older runs, which lack it, stay valid."""
    return _field("later", default, factory)


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def require_each(config: Any, prefix: str, keys: str, is_valid: Callable[[Any], bool], expected: str) -> None:
    """Raises ConfigError for the first of the `keys` whose value is not null and does not satisfy `is_valid`.

    The sentence is `{prefix}{key}={value}: {expected}`.
    """
    for key in keys.split():
        value = getattr(config, key)
        require(value is None or is_valid(value), f"{prefix}{key}={value}: {expected}")


def is_count(value: Any) -> bool:
    """Whether a value of any type is a whole number of 1 or more."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def seconds_of(duration: str, key: str) -> float:
    """Seconds of a duration such as "11h30m", "90m", "45s" or "1d12h"; a bare number means seconds.

    Raises ConfigError naming `key`.
    """
    parts = re.fullmatch(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+(?:\.\d+)?)s?)?", str(duration).strip())
    if parts is None or not any(parts.groups()):
        raise ConfigError(f"{key}={duration}: a duration such as 11h30m, 90m or 45s.")
    days, hours, minutes, seconds = (float(part or 0) for part in parts.groups())
    return days * 86400 + hours * 3600 + minutes * 60 + seconds
