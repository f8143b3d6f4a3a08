"""Where templates run: Jinja's immutable sandbox, with bounds on time, memory and output.

The sandbox keeps a template from files, attributes and mutation, but lets it compute for ever (3e7 rounds of two
nested loops take five seconds) and write gigabytes. Templates come with models that strangers made, so: a rendering
is ended by a timer, large allocations fail, and what is written is counted while it is written.
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
"""For one conversation; a real one takes well under a millisecond. Only where timers work: in the main thread, and not
on Windows."""
MEMORY_BYTES = 2**30
"""What a rendering may add to the process's address space (on Linux)."""
MOST_CHARACTERS = 100_000
TIMES_INPUT = 20
"""The text may have MOST_CHARACTERS, and TIMES_INPUT characters for each that goes in."""


class Missing(jinja2.Undefined):
    """A name that a vendor's template may ask for (`if tools`) but not write: it would write nothing, silently."""

    __str__ = __iter__ = __len__ = jinja2.Undefined._fail_with_undefined_error  # type: ignore[assignment]


def make_environment(extensions: list[Any], *, strict: bool) -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    """The environment of transformers' chat templates; `strict` refuses even to ask for what is not there."""
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
    """The template of `source`; raises ValueError when that alone is too much, since Jinja computes constants here."""
    with _Bounds():
        return environment.from_string(source)


def render_bounded(template: jinja2.Template, values: dict[str, Any], characters_in: int) -> str:
    """The text of `template`; raises ValueError when it takes too long, too much memory, or writes too much."""
    most = MOST_CHARACTERS + TIMES_INPUT * characters_in
    parts: list[str] = []
    written = 0
    with _Bounds():
        for part in template.generate(**values):
            written += len(part)
            if written > most:
                raise ValueError(f"the template writes more than {most:,} characters")
            parts.append(part)
    return "".join(parts)


def match_bounded(pattern: str, texts: Iterable[str]) -> None:
    """Matches a regular expression; raises ValueError or re.error for one that takes too long, or is none."""
    with _Bounds("the expression", "the names of one model"):
        for text in texts:
            re.fullmatch(pattern, text)


class _TooLong(BaseException):
    """Past every `except Exception` in a filter."""


def _ring(signum: int, frame: Any) -> None:
    if frame.f_code is not _Bounds.__exit__.__code__:  # where it has ended already, if late: a large text was freed
        raise _TooLong


class _Bounds:
    """Bounds time and memory while it is entered; 20 microseconds, so that a million rows cost 20 s.

    What ends a template leaves as one ValueError.
    """

    def __init__(self, what: str = "the template", over: str = "one conversation") -> None:
        self.what, self.over = what, over

    def __enter__(self) -> None:
        self.timed = hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread()
        self.limits: tuple[int, int] | None = None
        if sys.platform.startswith("linux"):
            self.limits = soft, hard = resource.getrlimit(resource.RLIMIT_AS)
            limit = _address_space() + MEMORY_BYTES
            resource.setrlimit(resource.RLIMIT_AS, (limit if soft < 0 else min(limit, soft), hard))
        if self.timed:
            self.before = signal.signal(signal.SIGALRM, _ring)
            signal.setitimer(signal.ITIMER_REAL, SECONDS)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if self.timed:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, self.before)
        if self.limits is not None:
            resource.setrlimit(resource.RLIMIT_AS, self.limits)
        if isinstance(error, _TooLong):
            raise ValueError(f"{self.what} takes more than {SECONDS:g} s for {self.over}") from None
        if isinstance(error, (MemoryError, OverflowError)):
            raise ValueError(f"{self.what} takes too much memory") from None
        if isinstance(error, RecursionError):
            raise ValueError(f"{self.what} calls itself without end") from None


def _address_space() -> int:
    """Bytes of this process's address space."""
    handle = os.open("/proc/self/statm", os.O_RDONLY)
    try:
        return int(os.read(handle, 64).split()[0]) * resource.getpagesize()
    finally:
        os.close(handle)
