"""Requests to save or to stop: signals, files in the run directory, the clock.

All are only noted, and met at the end of the optimizer step or batch under way, by all processes at the same one.
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
"""Requests, weakest first; a signal is SIGNAL + its number."""

LOOK_S = 0.5
"""How often the run directory is looked at: on a mounted drive a look takes milliseconds."""
SAME_S = 0.5
"""`timeout` and service managers send a signal to the process and again to its group: that is one request."""


class Signals:
    """Notes a signal until a step boundary; a second one ends the process at once."""

    def __init__(self) -> None:
        names = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1")  # Windows has but the first two
        main = threading.current_thread() is threading.main_thread()  # the only one that may take signals
        self._kinds = [getattr(signal, name) for name in names if main and hasattr(signal, name)]
        self.received = 0
        self._at = 0.0
        self._before: dict[int, Any] = {}

    def take(self) -> None:
        """Takes the signals over; again and again, since Lightning takes SIGTERM for itself when a loop begins."""
        for signum in self._kinds:
            if signal.getsignal(signum) is not signal.SIG_IGN:  # as `nohup` wants it
                before = signal.signal(signum, self._note)
                self._before.setdefault(signum, before)

    def release(self) -> None:
        """Gives the signals back."""
        while self._before:
            signum, handler = self._before.popitem()
            signal.signal(signum, handler if handler is not None else signal.SIG_DFL)

    def _note(self, signum: int, frame: Any) -> None:
        now = time.monotonic()
        if self.received and now - self._at > SAME_S:
            signal.signal(signum, signal.SIG_DFL)
            signal.raise_signal(signum)
        if not self.received:
            self.received, self._at = signum, now


class StopRequests:
    """What is asked of a training from outside: signals, the files SAVE and STOP in the run directory, a `deadline`.

    `deadline` is a time of `time.monotonic`.
    """

    def __init__(self, signals: Signals, run: Run, deadline: float | None = None) -> None:
        self.signals, self.run, self.deadline = signals, run, deadline
        self._looked = 0.0

    def strongest(self) -> int:
        """The strongest request, 0 for none."""
        if self.signals.received:
            return SIGNAL + self.signals.received
        now = time.monotonic()
        strongest = TIME_UP if self.deadline is not None and now >= self.deadline else 0
        if now - self._looked >= LOOK_S:
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
