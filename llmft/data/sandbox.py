"""Jinja's immutable sandbox for templates, with limits on time, memory and output.

The sandbox keeps a template from files, attributes and mutation. It does not keep it from computing for ever or writing
gigabytes. Templates come with models from strangers. So a timer ends a rendering, large allocations fail, and the
output is counted while it is written.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import threading
from collections.abc import Iterable
from datetime import datetime
from typing import Any

try:
    import resource
except ModuleNotFoundError:  # Windows, which has no such limits
    resource = None  # type: ignore[assignment]

import jinja2
import jinja2.ext
import jinja2.sandbox

SECONDS = 5.0
"""CPU seconds for one conversation, which takes well under a millisecond; a busy machine does not count. Timers work in
the main thread only, and not on Windows."""
MEMORY_BYTES = 2**30
"""Memory that a rendering may add to the process's address space (Linux only)."""
MAX_CHARACTERS = 100_000
TIMES_INPUT = 20
"""The text may have MAX_CHARACTERS, plus TIMES_INPUT characters for each input character."""


class Missing(jinja2.Undefined):
    """An undefined name that a vendor's template may test (`if tools`) but not write: it would write nothing."""

    __str__ = __iter__ = __len__ = jinja2.Undefined._fail_with_undefined_error  # type: ignore[assignment]


def make_environment(extensions: list[Any], *, strict: bool) -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    """The environment of transformers' chat templates; `strict` refuses even to test an undefined name."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[*extensions, "jinja2.ext.loopcontrols"],
        undefined=jinja2.StrictUndefined if strict else Missing,
    )
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    environment.filters["tojson"] = _to_json
    return environment


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def compile_bounded(environment: jinja2.Environment, source: str) -> jinja2.Template:
    """Compiles `source`. Raises ValueError at the limits, since Jinja computes constants when it compiles."""
    with _Bounds():
        return environment.from_string(source)


def render_bounded(template: jinja2.Template, values: dict[str, Any], characters_in: int) -> str:
    """Renders `template`. Raises ValueError when it takes too long or too much memory, or writes too much."""
    limit = MAX_CHARACTERS + TIMES_INPUT * characters_in
    parts: list[str] = []
    written = 0
    with _Bounds():
        for part in template.generate(**values):
            written += len(part)
            if written > limit:
                raise ValueError(f"the template writes more than {limit:,} characters")
            parts.append(part)
    return "".join(parts)


def match_bounded(pattern: str, texts: Iterable[str]) -> None:
    """Matches a regular expression. Raises ValueError when that takes too long, re.error for an invalid one."""
    with _Bounds("the expression", "the names of one model"):
        for text in texts:
            re.fullmatch(pattern, text)


class _TooLong(BaseException):
    """Not an Exception, so that no `except Exception` in a filter catches it."""


def _on_alarm(signum: int, frame: Any) -> None:
    if frame.f_code is not _Bounds.__exit__.__code__:  # a late alarm: the rendering has already ended
        raise _TooLong


class _Bounds:
    """Limits time and memory inside a `with` block; a violation becomes a ValueError. Costs 20 microseconds."""

    def __init__(self, subject: str = "the template", unit: str = "one conversation") -> None:
        self.subject, self.unit = subject, unit

    def __enter__(self) -> None:
        self.timed = hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread()
        self.limits: tuple[int, int] | None = None
        if sys.platform.startswith("linux"):
            self.limits = soft, hard = resource.getrlimit(resource.RLIMIT_AS)
            limit = _address_space() + MEMORY_BYTES
            resource.setrlimit(resource.RLIMIT_AS, (limit if soft < 0 else min(limit, soft), hard))
        if self.timed:
            self.before = signal.signal(signal.SIGVTALRM, _on_alarm)
            signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if self.timed:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            signal.signal(signal.SIGVTALRM, self.before)
        if self.limits is not None:
            resource.setrlimit(resource.RLIMIT_AS, self.limits)
        if isinstance(error, _TooLong):
            raise ValueError(f"{self.subject} takes more than {SECONDS:g} CPU seconds for {self.unit}") from None
        if isinstance(error, (MemoryError, OverflowError)):
            raise ValueError(f"{self.subject} takes too much memory") from None
        if isinstance(error, RecursionError):
            raise ValueError(f"{self.subject} calls itself without end") from None


def _address_space() -> int:
    """Size of this process's address space in bytes."""
    handle = os.open("/proc/self/statm", os.O_RDONLY)
    try:
        return int(os.read(handle, 64).split()[0]) * resource.getpagesize()
    finally:
        os.close(handle)
