"""One function before every sink: no secret reaches a config file, log, tracker or report.

A secret is known by its form (`hf_…`), by the name of its key (`api_key`), or because it is the value of a variable
of the environment with such a name (`WANDB_API_KEY`), whatever it looks like.
"""

from __future__ import annotations

import os
import re
from functools import lru_cache
from typing import Any

MASK = "***"
SHORTEST = 12
"""Characters of the shortest value of the environment that is looked for: a shorter one may be any word."""
_VALUES = re.compile(
    r"\bhf_[A-Za-z0-9]{16,}\b|\bsk-[A-Za-z0-9_-]{16,}\b|\bgh[pousr]_[A-Za-z0-9]{16,}\b|\bgithub_pat_[A-Za-z0-9_]{16,}\b"
    r"|\bwandb_v1_[A-Za-z0-9_]{16,}\b|\bxox[abprs]-[A-Za-z0-9-]{10,}|\bAKIA[A-Z0-9]{16}\b|\bAIza[A-Za-z0-9_-]{35}\b"
    r"|(?<=Bearer )[A-Za-z0-9._~+/-]{16,}=*|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"
)
_KEYS = re.compile(
    r"(^|[._-])(api_?key|secret(_?(access_?)?key)?|password|passwd|(access|auth|hf|hub|api|bearer)?_?token)$", re.I
)
_NOT_SECRET = re.compile(r"(pad|bos|eos|unk|sep|cls|mask|end|num|max|min|new|image|eot|eom|stop|special)_token", re.I)


def redact(value: Any, key: str = "") -> Any:
    """`value` with everything that looks like a secret masked.

    `num_tokens`, `pad_token` and their like are no secrets.
    """
    return _mask(value, key, _of_environment(tuple(sorted(_secrets()))))


def _mask(value: Any, key: str, known: re.Pattern[str] | None) -> Any:
    if isinstance(value, dict):
        return {name: _mask(item, str(name), known) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_mask(item, key, known) for item in value]
    if isinstance(value, str):
        if value and _is_secret(key):
            return MASK
        return _VALUES.sub(MASK, known.sub(MASK, value) if known is not None else value)
    return value


def _is_secret(key: str) -> bool:
    return bool(_KEYS.search(key)) and not _NOT_SECRET.search(key)


def _secrets() -> list[str]:
    """Values of the environment's variables that are called secrets."""
    return [value for name, value in os.environ.items() if len(value) >= SHORTEST and _is_secret(name)]


@lru_cache(maxsize=8)
def _of_environment(secrets: tuple[str, ...]) -> re.Pattern[str] | None:
    # The longest first, and in small letters too: a run's name is.
    parts = sorted(secrets, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, parts)), re.I) if parts else None
