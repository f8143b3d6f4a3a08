"""Runs an llmft command as a child process, which ends with this one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmft.core.errors import Interrupted
from llmft.core.machine import die_with_parent
from llmft.core.outcome import VARIABLE, read_outcome


def run_command(module: str, arguments: Sequence[str], outcome: Path) -> tuple[int, Sequence[Path]]:
    """Runs `python -m module`; returns its exit code and the directories that it listed in the file `outcome`.

    The child dies with this process; SIGINT and SIGTERM are forwarded to it, then Interrupted is raised.
    """
    outcome.unlink(missing_ok=True)
    child = subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        env={**os.environ, VARIABLE: str(outcome.absolute())},
        preexec_fn=die_with_parent if os.name == "posix" else None,
    )
    signals_received: list[int] = []

    def hand_on(signum: int, _: Any) -> None:
        signals_received.append(signum)
        if signum != signal.SIGINT:  # a terminal sends SIGINT to both
            child.send_signal(signum)

    before = {number: signal.signal(number, hand_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        code = child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if child.poll() is None:
            child.kill()
    directories = read_outcome(outcome)
    outcome.unlink(missing_ok=True)
    if signals_received:
        raise Interrupted("interrupted; the same command continues with this stage.", signals_received[-1])
    return code, directories
