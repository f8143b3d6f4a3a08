"""One function before every sink: no secret reaches a config file, log, tracker or report."""

from __future__ import annotations

import re
from typing import Any

MASK = "***"
_VALUES = re.compile(
    r"\bhf_[A-Za-z0-9]{16,}\b|\bsk-[A-Za-z0-9_-]{16,}\b|\bgh[pousr]_[A-Za-z0-9]{16,}\b|\bwandb_v1_[A-Za-z0-9_]{16,}\b"
    r"|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"
)
_KEYS = re.compile(r"(^|[._-])(api_?key|secret|password|passwd|access_?token|auth_?token|hf_?token|token)$", re.I)
_NOT_SECRET = re.compile(r"(pad|bos|eos|unk|sep|cls|mask|end|num|max|min|new)_token", re.I)


def redact(value: Any, key: str = "") -> Any:
    """`value` with everything that looks like a secret masked, by its form or by its key's name.

    `num_tokens`, `pad_token` and their like are no secrets.
    """
    if isinstance(value, dict):
        return {name: redact(item, str(name)) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [redact(item, key) for item in value]
    if isinstance(value, str):
        if value and _KEYS.search(key) and not _NOT_SECRET.search(key):
            return MASK
        return _VALUES.sub(MASK, value)
    return value
