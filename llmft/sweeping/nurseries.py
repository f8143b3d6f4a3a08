"""A process that loads the libraries while a sweep is planned, and gives workers: the supervisor's side of it.

Imports nothing but the standard library, since such a process is the first thing that a sweep starts.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO, TYPE_CHECKING, Protocol

import llmft

if TYPE_CHECKING:
    from llmft.sweeping.process import Share, WorkerProcess

UNKNOWN_CODE = 999
"""In the place of the exit code of a process whose parent has gone."""


class Process(Protocol):
    """What is asked of a process, as of `subprocess.Popen`."""

    @property
    def pid(self) -> int:
        """Its number."""

    def poll(self) -> int | None:
        """Its exit code, negative for a signal; None while it runs."""

    def wait(self) -> int:
        """The same once it has ended."""

    def send_signal(self, signum: int) -> None:
        """Sends a signal; ProcessLookupError where it has ended."""


class Split:
    """A worker's process that was split off a nursery, as `subprocess.Popen` would be one."""

    def __init__(self, nursery: Nursery) -> None:
        self.nursery = nursery
        self.known_pid = 0
        self.code: int | None = None
        self.doom = 0

    @property
    def pid(self) -> int:
        """0 before it is there."""
        self.nursery.listen()
        return self.known_pid

    def poll(self) -> int | None:
        """Its exit code; None while it runs or is not there yet."""
        if self.code is None:
            self.nursery.listen()
        return self.code

    def wait(self) -> int:
        """Its exit code, once it has ended."""
        while (code := self.poll()) is None:
            time.sleep(0.01)
        return code

    def send_signal(self, signum: int) -> None:
        """Sends a signal; one that is not there yet gets it when it is."""
        if self.pid == 0:
            self.doom = self.doom or signum
            if signum == signal.SIGKILL:
                self.doom = signum
                self.nursery.end_if_none_is_there()
        elif self.poll() is None:
            os.kill(self.known_pid, signum)


class Nursery:
    """The supervisor's side of a process that loads the libraries while it is planned what for.

    It gives workers at once: as many as are asked for where no GPU is used, else a single one.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._splits: dict[int, Split] = {}
        self._log: Path | None = None
        self._open = contextlib.ExitStack()
        if sys.platform != "linux":
            return  # a message with file descriptors needs a socket that keeps messages apart
        with contextlib.suppress(OSError):  # where it does not find room, workers start when they are needed
            self._printed = self._open.enter_context(_unnamed())
            self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            self._open.enter_context(self._channel)
            self._channel.setblocking(False)
            with theirs:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "llmft.sweeping.nursery", str(theirs.fileno())],
                    stdin=subprocess.DEVNULL,
                    stdout=self._printed,
                    stderr=subprocess.STDOUT,
                    pass_fds=[theirs.fileno()],
                    env=environment(),
                    start_new_session=True,
                )

    def worker(self, log: Path, share: Share, *, single: bool) -> WorkerProcess | None:
        """A worker; where it is the `single` one the process itself becomes it. None where there is none to be had."""
        from llmft.environment import accelerators
        from llmft.sweeping.process import WorkerProcess

        if self._process is None or share.environment or (not single and accelerators()):
            return None
        orders, order_end = os.pipe()
        event_end, events = os.pipe()
        key = len(self._splits)
        order = {"key": key, "single": single, "cores": share.cores}
        try:
            with opened(log) as output:
                socket.send_fds(self._channel, [json.dumps(order).encode()], [orders, events, output.fileno()])
        except OSError:  # it has ended, or its log cannot be opened
            os.close(order_end)
            os.close(event_end)
            return None
        finally:
            os.close(orders)
            os.close(events)
        self._log = log
        os.set_blocking(event_end, False)
        process: Process = self._process
        if single:
            self._process = None
        else:
            process = self._splits[key] = Split(self)
        return WorkerProcess(process, os.fdopen(order_end, "wb"), event_end, log)

    @property
    def splits(self) -> bool:
        """Whether it has given workers and can give more."""
        return bool(self._splits) and self._process is not None

    def listen(self) -> None:
        """Takes in which workers are there and how others ended."""
        if self._process is not None and not self._take_in():
            self.end()
        if self._process is None:
            for split in self._splits.values():
                if split.code is None and not _runs(split.known_pid):
                    split.code = UNKNOWN_CODE  # only its parent would know

    def _take_in(self) -> bool:
        """What it told; whether it is still there."""
        while True:
            try:
                content = self._channel.recv(4096)
            except BlockingIOError:
                return True
            except OSError:
                return False
            if not content:
                return False
            told = json.loads(content)
            split = self._splits[told["key"]]
            split.code = told.get("code", split.code)
            if "pid" in told:
                split.known_pid = told["pid"]
                if split.doom:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(split.known_pid, split.doom)

    def _there(self) -> list[bool]:
        """Of every worker that has not ended, whether it is there yet."""
        self.listen()
        return [split.known_pid > 0 for split in self._splits.values() if split.code is None]

    def end_if_none_is_there(self) -> None:
        """Ends it where none of the workers is there yet: it may hang."""
        if not any(self._there()):
            self.end()

    def end_unless_all_are_there(self) -> None:
        """Ends it where somebody would wait for workers that are not there yet."""
        if not all(self._there()):
            self.end()

    def end(self) -> None:
        """Ends it; workers that are there go on, others never come."""
        if self._process is not None:
            ended, self._process = self._process, None
            ended.kill()
            ended.wait()
            self._take_in()  # its last words

    def __enter__(self) -> Nursery:
        return self

    def __exit__(self, *error: object) -> None:
        """Ends it; what it printed and no worker passed on, such as why it ended itself, goes to the last one's log."""
        self.end()
        with self._open:
            if self._log is not None:
                printed = os.pread(self._printed.fileno(), os.fstat(self._printed.fileno()).st_size, 0)
                with contextlib.suppress(OSError):
                    if printed:
                        with opened(self._log) as log:
                            log.write(printed)


_begun: list[Nursery] = []


def begin_nursery() -> None:
    """Starts one for a sweep that is still to be planned; where nobody takes it, it ends with this process."""
    _begun.append(Nursery())
    atexit.register(end_nursery)


def take_nursery() -> Nursery:
    """The one that was begun, or a new one."""
    return _begun.pop() if _begun else Nursery()


def end_nursery() -> None:
    """Ends the one that was begun, where nobody has taken it."""
    while _begun:
        with _begun.pop():
            pass


def environment() -> dict[str, str]:
    """That of this process, in which its own package is found."""
    package = str(Path(llmft.__file__).resolve().parent.parent)
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))}


def opened(log: Path) -> IO[bytes]:
    """A log to add to, in a folder that is made where it is missing."""
    log.parent.mkdir(parents=True, exist_ok=True)
    return log.open("ab")


def _unnamed() -> IO[bytes]:
    """A file that nobody has to clear up."""
    return tempfile.TemporaryFile()


def _runs(pid: int) -> bool:
    try:
        return pid > 0 and Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
