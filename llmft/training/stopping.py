"""Requests to save or to stop: signals, files in the run directory, the clock.

All are only recorded, and obeyed at the end of the current optimizer step or batch, by all processes at the same one.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from typing import Any

from llmft.runs.directory import Run

SAVE = 1
TIME_UP = 2
STOP = 3
SIGNAL = 16
"""Requests, in rising order of strength; a signal is SIGNAL + its number."""

CHECK_EVERY_S = 0.5
"""Seconds between checks of the run directory, each of which takes milliseconds on a mounted drive."""
SAME_REQUEST_S = 0.5
"""Seconds within which signals are one request: `timeout` and service managers signal both a process and its group."""


class Signals:
    """Records a signal until a step boundary; a second one ends the process at once."""

    def __init__(self) -> None:
        names = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1")  # Windows has only the first two
        main = threading.current_thread() is threading.main_thread()  # only it may set signal handlers
        self._kinds = [getattr(signal, name) for name in names if main and hasattr(signal, name)]
        self.received = 0
        self._at = 0.0
        self._before: dict[int, Any] = {}

    def take(self) -> None:
        """Installs the handlers; to be repeated before each loop, since Lightning handles SIGTERM itself there."""
        for signum in self._kinds:
            if signal.getsignal(signum) is not signal.SIG_IGN:  # `nohup` ignores SIGHUP
                before = signal.signal(signum, self._note)
                self._before.setdefault(signum, before)

    def release(self) -> None:
        """Restores the earlier handlers."""
        while self._before:
            signum, handler = self._before.popitem()
            signal.signal(signum, handler if handler is not None else signal.SIG_DFL)

    def _note(self, signum: int, frame: Any) -> None:
        now = time.monotonic()
        if self.received and now - self._at > SAME_REQUEST_S:
            signal.signal(signum, signal.SIG_DFL)
            signal.raise_signal(signum)
        if not self.received:
            self.received, self._at = signum, now


class StopRequests:
    """Requests to a training: signals, the files SAVE and STOP in the run directory, and a deadline.

    `deadline` is a value of `time.monotonic()`.
    """

    def __init__(self, signals: Signals, run: Run, deadline: float | None) -> None:
        self.signals, self.run, self.deadline = signals, run, deadline
        self._looked = 0.0

    def strongest(self) -> int:
        """The strongest request, 0 for none."""
        if self.signals.received:
            return SIGNAL + self.signals.received
        now = time.monotonic()
        strongest = TIME_UP if self.deadline is not None and now >= self.deadline else 0
        if now - self._looked >= CHECK_EVERY_S:
            self._looked = now
            for request, path in ((SAVE, self.run.save_file), (STOP, self.run.stop_file)):
                if path.exists():
                    strongest = max(strongest, request)
        return strongest


def describe_request(request: int, seconds: Callable[[], float]) -> str:
    """A request to stop in words."""
    if request >= SIGNAL:
        return signal.Signals(request - SIGNAL).name
    return "asked by the file STOP" if request == STOP else f"trainer.max_time is over ({seconds():.0f} s)"
