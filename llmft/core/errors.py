"""Errors for users, their exit codes, and nearest names.

A user's mistake is reported in one sentence: what happened, where (file:line or config key), and what to do. A
traceback is shown only with `LLMFT_TRACE=1`. Exit codes: 0 done or paused as asked, 1 unexpected, 2 configuration,
3 training diverged, 4 data, 5 some trials of a sweep failed, 74 disk, 128 + number of a signal (130 SIGINT).
"""

from __future__ import annotations

import difflib
import errno
import os
import select
import signal
import sys
import traceback
from collections.abc import Callable, Iterable

from llmft.core.redaction import redact


class UserError(Exception):
    """A mistake that the user can fix; the message says where and how."""

    exit_code = 1


class ConfigError(UserError):
    """A wrong key, option or value in the configuration, or a wrong model or file that it names."""

    exit_code = 2


class RunBusy(ConfigError):
    """Another process is training this run."""


class DivergedError(UserError):
    """Loss or gradient is no longer a finite number."""

    exit_code = 3


class DataError(UserError):
    """A row, column or file of the data is wrong."""

    exit_code = 4


class TrialsFailed(UserError):
    """Some jobs of a multirun failed; each was reported when it did."""

    exit_code = 5


class StageFailed(UserError):
    """A pipeline stage failed and printed its error. Carries its exit code."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class DiskError(UserError):
    """The run could not be written."""

    exit_code = 74


class Stopped(UserError):
    """A trial was stopped on purpose after a validation; its state was saved."""

    exit_code = 0

    def __init__(self, message: str, status: str) -> None:
        super().__init__(message)
        self.status = status


class Interrupted(UserError):
    """A signal stopped the run; its state was saved at the last optimizer step."""

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signum


class Paused(Interrupted):
    """A time limit or a file stopped the run as planned, which is not a failure."""

    def __init__(self, message: str) -> None:
        super().__init__(message, 0)
        self.exit_code = 0


WRONG_PLACE = (errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP)


def nearest(word: str, options: Iterable[str]) -> str | None:
    """The option most similar to `word`; None if none is close."""
    matches = difflib.get_close_matches(word, list(options), n=1, cutoff=0.5)
    return matches[0] if matches else None


def did_you_mean(word: str, options: Iterable[str]) -> str:
    """'; did you mean X?' for the nearest option, else a list of all options."""
    options = sorted(options)
    near = nearest(word, options)
    if near:
        return f"; did you mean {near}?"
    return f"; choose from {', '.join(options)}" if options else ""


def first_line(error: BaseException) -> str:
    """First line of an error's message; its type name if it has none. A library's is cut at 300 characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    line = lines[0] if lines else type(error).__name__
    return line if isinstance(error, UserError) else line[:300]


def one_line(error: BaseException) -> str:
    """An error as records show it: a user's mistake as it is, others with their type's name before it."""
    return first_line(error) if isinstance(error, UserError) else f"{type(error).__name__}: {first_line(error)}"


def as_user_error(error: BaseException) -> BaseException:
    """A DiskError for a full or unwritable disk; other errors unchanged."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        where = f" while writing {error.filename}" if error.filename else ""
        return DiskError(f"{error.strerror}{where}: free some space or set output_dir to another disk.")
    if isinstance(error, OSError) and error.filename and error.errno in WRONG_PLACE:
        return DiskError(f"{error.filename}: {error.strerror}; move what is in the way, or choose another place.")
    return error


def report(error: BaseException) -> int:
    """Prints `error` for the user and returns the exit code."""
    error = as_user_error(error)
    if isinstance(error, KeyboardInterrupt):
        print("\nInterrupted. The same command goes on; a training does from its newest checkpoint.", file=sys.stderr)
        return 130
    if os.environ.get("LLMFT_TRACE") or not isinstance(error, UserError):
        print(redact("".join(traceback.format_exception(error))), end="", file=sys.stderr)
    if isinstance(error, UserError):
        # One line, even if it quotes an argument of several lines; indented lines are a list.
        message = str(error) if "\n  " in str(error) else " ".join(str(error).splitlines())
        print(redact(f"llmft: {message}"), file=sys.stderr)
        return error.exit_code
    print("llmft: unexpected error; see the traceback above.", file=sys.stderr)
    return 1


def exit_with(function: Callable[[], object]) -> None:
    """Runs `function`; an error ends the process with its exit code, a closed pipe (`| head`) silently."""
    try:
        try:
            function()
        finally:
            sys.stdout.flush()
    except (Exception, KeyboardInterrupt) as error:
        if isinstance(error, BrokenPipeError) and _reader_is_gone():
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left is flushed at exit
            sys.exit(128 + signal.SIGPIPE)
        sys.exit(report(error))


def _reader_is_gone() -> bool:
    """Whether stdout is a pipe whose reader is gone."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))
