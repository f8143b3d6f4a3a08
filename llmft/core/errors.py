"""The one error for users, its exit codes, and nearest names.

A user's mistake is one sentence: what happened, where (file:line or config key), what to do. The traceback is
shown only with `LLMFT_TRACE=1`. Exit codes: 0 done or paused as asked, 1 unexpected, 2 configuration, 3 training
diverged, 4 data, 5 some trials of a sweep failed, 74 disk, 128 + number for signals (130 SIGINT, 143 SIGTERM).
"""

from __future__ import annotations

import difflib
import errno
import os
import sys
import traceback
from collections.abc import Callable, Iterable

from llmft.core.redaction import redact


class UserError(Exception):
    """Something that the user can mend; the message says where and how."""

    exit_code = 1


class ConfigError(UserError):
    """A key, option or value of the configuration, or a model or file it names, is wrong."""

    exit_code = 2


class RunBusy(ConfigError):
    """Another process is training the run."""


class DivergedError(UserError):
    """Loss or gradient is no longer a finite number."""

    exit_code = 3


class DataError(UserError):
    """A row, column or file of the data is wrong."""

    exit_code = 4


class TrialsFailed(UserError):
    """Some jobs of a multirun failed; each was reported when it did."""

    exit_code = 5


class DiskError(UserError):
    """The run could not be written."""

    exit_code = 74


class Stopped(UserError):
    """A trial was ended on purpose after a validation; its state was saved."""

    exit_code = 0

    def __init__(self, message: str, status: str) -> None:
        super().__init__(message)
        self.status = status


class Interrupted(UserError):
    """A signal asked the run to stop; the state was saved at the last optimizer step."""

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signum


class Paused(Interrupted):
    """The clock or a file asked the run to stop, and it did as planned: no failure."""

    def __init__(self, message: str) -> None:
        super().__init__(message, 0)
        self.exit_code = 0


IN_THE_WAY = (errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP)


def nearest(word: str, options: Iterable[str]) -> str | None:
    """The option most like `word`, or None when nothing is close."""
    found = difflib.get_close_matches(word, list(options), n=1, cutoff=0.5)
    return found[0] if found else None


def did_you_mean(word: str, options: Iterable[str]) -> str:
    """'; did you mean X?' for the nearest option, else the list of all of them."""
    options = sorted(options)
    best = nearest(word, options)
    if best:
        return f"; did you mean {best}?"
    return f"; choose from {', '.join(options)}" if options else ""


def as_user_error(error: BaseException) -> BaseException:
    """Gives a full disk and its kin the name they have for users; other errors pass unchanged."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        where = f" while writing {error.filename}" if error.filename else ""
        return DiskError(f"{error.strerror}{where}: free some space or set output_dir to another disk.")
    if isinstance(error, OSError) and error.filename and error.errno in IN_THE_WAY:
        return DiskError(f"{error.filename}: {error.strerror}; move what is in the way, or choose another place.")
    return error


def report(error: BaseException) -> int:
    """Prints `error` as the user should see it and returns the exit code."""
    error = as_user_error(error)
    if isinstance(error, KeyboardInterrupt):
        print("\nInterrupted. The same command goes on from the newest checkpoint.", file=sys.stderr)
        return 130
    trace = bool(os.environ.get("LLMFT_TRACE"))
    if isinstance(error, UserError):
        if trace:
            _print_trace(error)
        # One line, also where it repeats an argument that had several; indented ones are meant as a list.
        told = str(error) if "\n  " in str(error) else " ".join(str(error).splitlines())
        print(redact(f"llmft: {told}"), file=sys.stderr)
        return error.exit_code
    _print_trace(error)
    print("llmft: an unexpected error; the lines above say where.", file=sys.stderr)
    return 1


def _print_trace(error: BaseException) -> None:
    print(redact("".join(traceback.format_exception(error))), end="", file=sys.stderr)


def exit_with(function: Callable[[], object]) -> None:
    """Runs `function` and leaves the process with the exit code that fits what happened."""
    try:
        function()
    except Exception as error:
        sys.stdout.flush()
        sys.exit(report(error))
    except KeyboardInterrupt as error:
        sys.exit(report(error))
