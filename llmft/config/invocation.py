"""How a process was called. Only this module touches `sys.argv`; everything else gets an `Invocation`."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from llmft.core.redaction import redact

COMMANDS = (
    *("train", "check", "predict", "evaluate", "folds", "blend", "refit"),
    *("sample", "pipeline", "merge", "chat", "serve", "push", "bundle"),
    *("report", "bench", "doctor", "disk", "completion"),
)


@dataclass(frozen=True)
class Invocation:
    """The arguments of a command.

    Attributes:
        argv: the arguments after the name of the command.
        overrides: those that set a key; for a trial of a sweep, those that distinguish it from the others.
        command: the command line that repeats it, as a user would type it; secrets are masked.
    """

    argv: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()
    command: str = ""

    @classmethod
    def of(cls, argv: Sequence[str], verb: str = "train", overrides: Sequence[str] | None = None) -> Invocation:
        """The invocation of the command `verb` with `argv`."""
        import shlex

        if overrides is None:
            overrides = [argument.lstrip("+") for argument in argv if "=" in argument]
        # force=true would start again instead of resuming.
        typed = [argument.removeprefix("++") for argument in argv if not argument.startswith("force=")]
        module = "llmft" if verb == "train" else f"llmft.{verb}"
        return cls(tuple(argv), tuple(overrides), shlex.join(["python", "-m", module, *redact(typed)]))

    def words(self, key: str) -> list[str]:
        """The words, in lower case, that the command line itself, not a file, sets `key` to."""
        values = [value for name, _, value in (a.partition("=") for a in self.argv) if name.lstrip("+") == key]
        return [word for value in values for word in re.findall(r"[\w.-]+", value.lower())]


NO_COMMAND = Invocation()
"""The invocation of a program that calls llmft as a library."""


def arguments_of_process() -> list[str]:
    return sys.argv[1:]


def split_off(argv: Sequence[str], prefix: str) -> tuple[list[str], list[str]]:
    """Splits arguments into the values of those that start with `prefix`, and the others."""
    values = [argument.removeprefix(prefix) for argument in argv if argument.startswith(prefix)]
    return values, [argument for argument in argv if not argument.startswith(prefix)]


@contextlib.contextmanager
def arguments_for_hydra(argv: Sequence[str]) -> Iterator[Any]:
    """Sets sys.argv for hydra.main, which takes no arguments.

    Yields a function that restores it; Lightning needs the original to start other ranks.
    """
    before = sys.argv

    def restore() -> None:
        sys.argv = before

    sys.argv = [before[0], *argv]
    try:
        yield restore
    finally:
        restore()


def with_lists(argv: Sequence[str]) -> list[str]:
    """`argv` with `run=A,B` as the list `run=[A,B]`, for a command that has no sweeps."""
    return [re.sub(r"\Arun=([^\['\"].*,.*)\Z", r"run=[\1]", argument, flags=re.DOTALL) for argument in argv]
