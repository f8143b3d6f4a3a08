"""Masks secrets before anything is written to a config file, log, tracker or report.

A secret is recognised by its form (`hf_…`, a signed URL, a private key), by its name (`api_key`), or as the value of
an environment variable with such a name (`WANDB_API_KEY`). The forms are those of gitleaks (config/gitleaks.toml) and
detect-secrets (plugins/) that are more specific than entropy. detect-secrets as a library takes a quarter of a second
to import and one pass per rule. A hexadecimal hash alone is not a secret, since records have commits and fingerprints.

Parquet files (predictions, row losses) are not masked: they contain the user's own rows, which later commands read.
"""

from __future__ import annotations

import os
import re
from functools import lru_cache
from typing import Any

MASK = "***"
SHORTEST = 12
"""Shortest value of an environment variable that is masked; 8 for one with letters and digits."""
_RULES: tuple[tuple[tuple[str, ...], str], ...] = (
    # Texts of which one must occur before the pattern is tried, and the pattern; its group is kept.
    (
        ("hf_", "api_org_", "sk-", "gh", "github_pat_", "wandb_v1_", "nvapi-", "gsk_", "r8_", "dop_v1_", "xapp-"),
        r"\b(?:(?:hf|api_org|r8|gsk|gh[pousr])_[A-Za-z0-9]{16,}"
        r"|(?:sk-|github_pat_|wandb_v1_|nvapi-|dop_v1_|xapp-)[A-Za-z0-9_-]{16,})(?![A-Za-z0-9])",
    ),
    (
        ("gl", "npm_", "pypi-", "xox", "SG.", "_live_", "_test_"),
        r"\b(?:gl[a-z]{2,5}-[A-Za-z0-9_-]{20,}|npm_[A-Za-z0-9]{36}|pypi-(?:AgE[A-Za-z0-9_-]{13,}|[A-Za-z0-9_-]{40,})"
        r"|xox[abeoprs]-[A-Za-z0-9-]{10,}|SG\.[\w-]{16,}\.[\w-]{16,}|[prs]k_(?:live|test)_[A-Za-z0-9]{16,})",
    ),
    (
        ("AKIA", "ASIA", "AIza", "ya29.", "GOCSPX-"),
        r"\b(?:A(?:KIA|SIA)[A-Z0-9]{16}\b|AIza[A-Za-z0-9_-]{35}|ya29\.[\w-]{20,}|GOCSPX-[\w-]{20,})",
    ),
    (("eyJ",), r"\beyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}(?:\.[A-Za-z0-9_-]*)?"),
    (
        ("PRIVATE KEY",),
        r"-----BEGIN [A-Z0-9 ]*PRIVATE KEY[A-Z -]*[\s\S]*?(?:-----END [A-Z0-9 ]*PRIVATE KEY[A-Z -]*|\Z)",
    ),
    (("earer", "asic", "token "), r"((?:[Bb]earer|(?<=: )[Bb]asic|[Aa]uthorization: token) )[A-Za-z0-9._~+/-]{16,}=*"),
    (("://",), r"(://)(?:[^/\s:@'\"]*:[^/\s'\"]+|[A-Za-z0-9_-]{20,})(?=@)"),
    (("hooks.slack.com", "discord"), r"((?:hooks\.slack\.com/services|discord(?:app)?\.com/api/webhooks)/)[\w/-]+"),
    (
        ("=",),
        r"(?i)([?&;](?:x-(?:amz|goog)-(?:signature|credential|security-token)|sig|signature|awsaccesskeyid|code)=)"
        r"[^&\s\"'<>]{6,}",
    ),
    (
        ("wandb", "login", "key", "KEY", "Key", "oken", "TOKEN", "assword", "ecret"),
        r"(?i)((?<![a-z0-9])(?:wandb(?: login)?|(?:api[ _-]?)?key|token|secret|password)[\"']?[ :=]{1,3}[\"']?)"
        r"(?:[0-9a-f]{40}|[0-9a-f]{32})(?![0-9a-f])",
    ),
)
_COMPILED = tuple((marks, re.compile(pattern)) for marks, pattern in _RULES)
_ASSIGNED = re.compile(
    r"(?<![\w.-])([\w.-]*+)([\"']?(?: ?= ?|: ?|=> ?)[\"']?)(?=[^\s\"'&;,(){}\[\]<>$*])"
    r"((?<==[\"'])[^\"'\n]{4,}+(?=[\"'])|[^\s\"'&;,(){}\[\]<>]{4,}+)(?![(\[])"
)
_LAST_WORDS = (
    "key", "token", "pass", "word", "passwd", "pwd", "phrase", "secret", "credential", "credentials", "pat", "sas",
)  # fmt: skip
_ASSIGNS = tuple(f"{word}{end}" for word in _LAST_WORDS for end in ("=", ":", '"', "'", " ="))
_STRONG = r"pass(?:word|wd|phrase)|pwd|(?<=[._-])pass|secret"
_KEYS = re.compile(
    rf"(?:^|[._-]|(?<=[a-z]))(?:{_STRONG}|pgpassword|credentials?|(?:api|secret|access|private|account|auth|encryption"
    r"|signing|storage|subscription|service|client|master|kaggle|wandb|ssh)[_-]?(?:access[_-]?)?key"
    r"|(?:access|auth|hf|hub|api|bearer|refresh|session|security|client|bot)?[_-]?token)$",
    re.I,
)
_IN_ENVIRONMENT = re.compile(r"(?:_|^)(?:KEY|PASS|PWD|PAT|SAS)$", re.I)
_PASSWORDS = re.compile(rf"(?:{_STRONG}|password)$", re.I)
_NOT_SECRET = re.compile(r"(pad|bos|eos|unk|sep|cls|mask|end|num|max|min|new|image|eot|eom|stop|special)_token", re.I)
_HEX_KEY = re.compile(r"[0-9a-f]{32}|[0-9a-f]{40}", re.I)


def redact(value: Any) -> Any:
    """`value` with all secrets masked; names such as `num_tokens` and `pad_token` are not secret."""
    return _mask(value, "", _of_environment(tuple(sorted(_secrets()))))


def _mask(value: Any, key: str, known: re.Pattern[str] | None) -> Any:
    if isinstance(value, dict):
        return {_mask(name, "", known): _mask(item, str(name), known) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_mask(item, key, known) for item in value]
    if isinstance(value, str):
        if value and (_is_secret(key) or (key.lower().endswith("key") and _HEX_KEY.fullmatch(value))):
            return MASK
        return _mask_text(known.sub(MASK, value) if known is not None else value)
    if isinstance(value, int) and not isinstance(value, bool) and _PASSWORDS.search(key):
        return MASK
    return value


def _mask_text(text: str) -> str:
    for marks, pattern in _COMPILED:
        if any(mark in text for mark in marks):
            text = pattern.sub(_keep_groups, text)
    return _ASSIGNED.sub(_mask_assigned, text) if any(word in text.lower() for word in _ASSIGNS) else text


def _keep_groups(match: re.Match[str]) -> str:
    return f"{match[1] or ''}{MASK}" if match.re.groups else MASK


def _mask_assigned(match: re.Match[str]) -> str:
    """Masks `name=value` where the name is that of a secret and the value is more than a word or a number."""
    name, separator, value = match.groups()
    if not _is_secret(name) and not (name.isupper() and _IN_ENVIRONMENT.search(name)):
        return match[0]
    mixed = bool(re.search(r"\d", value) and re.search(r"[A-Za-z]", value))
    is_assignment = ":" not in separator or separator[-1] in "\"'"
    if (mixed and len(value) >= 8) or (is_assignment and (len(value) >= 20 or _PASSWORDS.search(name))):
        return f"{name}{separator}{MASK}"
    return match[0]


@lru_cache(maxsize=4096)
def _is_secret(key: str) -> bool:
    return bool(_KEYS.search(key)) and not _NOT_SECRET.search(key)


def _secrets() -> list[str]:
    """Values of environment variables named like secrets, without existing paths."""
    return [
        value
        for name, value in os.environ.items()
        if (_is_secret(name) or _IN_ENVIRONMENT.search(name))
        and name not in ("PWD", "OLDPWD")
        and not (value.startswith("/") and os.path.exists(value))
        and (len(value) >= SHORTEST or (len(value) >= 8 and not value.isalpha() and not value.isdigit()))
    ]


@lru_cache(maxsize=8)
def _of_environment(secrets: tuple[str, ...]) -> re.Pattern[str] | None:
    # The longest first, and case-insensitive: a run's name is in lower case.
    parts = sorted(secrets, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, parts)), re.I) if parts else None
