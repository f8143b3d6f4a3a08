"""The supervisor's side of its workers: start, orders, events, end."""

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
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol

import llmft
from llmft.environment import accelerators, usable_cores, visible_gpus
from llmft.schema import to_plain
from llmft.sweeping.trials import Trial
from llmft.sweeping.worker import EVENTS_VARIABLE

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


@dataclass
class WorkerProcess:
    """A worker, or a process that trains one distributed trial.

    Attributes:
        orders: its standard input; None for a process of one trial.
        log: where what the process prints is found.
        trials: what it is training, several at once where they are stacked.
        width: how many it was given at once.
        leaving: it ends by itself after a trial that may have left its libraries in any state.
        stopping: why it was asked to stop.
    """

    process: Process
    orders: IO[bytes] | None
    events_fd: int
    log: Path
    trials: list[Trial] = field(default_factory=list)
    width: int = 1
    since: float = field(default_factory=time.monotonic)
    last_sign: float = field(default_factory=time.monotonic)
    ready: bool = False
    leaving: bool = False
    leaving_since: float = 0.0
    stopping: str | None = None
    stopping_since: float = 0.0
    _buffer: bytes = b""

    @classmethod
    def start(cls, log: Path, share: Share, trial: Trial | None = None) -> WorkerProcess:
        """A worker that waits for orders; with `trial`, a process of that trial's own command line."""
        reading, writing = os.pipe()
        env = {**environment(), **share.environment}
        arguments = ["llmft.sweeping.worker", str(writing), *map(str, share.cores or ())]
        if trial is not None:
            env[EVENTS_VARIABLE] = str(writing)
            arguments = ["llmft", *trial.arguments]
        with _opened(log) as output:
            process = subprocess.Popen(
                [sys.executable, "-m", *arguments],
                stdin=subprocess.DEVNULL if trial is not None else subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=[writing],
                env=env,
                start_new_session=True,  # Ctrl-C reaches the supervisor alone, and a kill reaches all children
            )
        os.close(writing)
        os.set_blocking(reading, False)
        return cls(process, process.stdin, reading, log, [trial] if trial is not None else [], ready=trial is not None)

    @property
    def idle(self) -> bool:
        """Whether it waits for a trial."""
        return self.ready and not self.trials and self.stopping is None and not self.leaving

    def order(self, **content: Any) -> None:
        """Sends an order; a process that just died is noticed by its end."""
        assert self.orders is not None
        with contextlib.suppress(BrokenPipeError):
            self.orders.write(json.dumps(content).encode() + b"\n")
            self.orders.flush()

    def train(self, trials: list[Trial]) -> None:
        """Orders trials, all at once."""
        self.trials, self.width = list(trials), len(trials)
        self.since = self.last_sign = time.monotonic()
        orders = [
            {
                "number": trial.number,
                "config": to_plain(trial.config),
                "arguments": trial.arguments,
                "overrides": trial.overrides,
            }
            for trial in trials
        ]
        self.order(do="train", trials=orders)

    def trial(self, number: int) -> Trial | None:
        """The one of its trials that has this number."""
        return next((trial for trial in self.trials if trial.number == number), None)

    def events(self) -> list[dict[str, Any]]:
        """What it told since the last call."""
        while True:
            try:
                read = os.read(self.events_fd, 65536)
            except BlockingIOError:
                break
            if not read:
                break
            self._buffer += read
        *lines, self._buffer = self._buffer.split(b"\n")
        if lines:
            self.last_sign = time.monotonic()
        return [json.loads(line) for line in lines]

    def stop(self, why: str) -> None:
        """Asks it to save and leave."""
        if self.stopping is None:
            self.stopping, self.stopping_since = why, time.monotonic()
            self.signal(signal.SIGTERM)

    def signal(self, signum: int) -> None:
        """Sends a signal to the process; SIGKILL also to all that it started."""
        with contextlib.suppress(ProcessLookupError):
            if signum == signal.SIGKILL and self.process.pid:
                os.killpg(self.process.pid, signum)
            else:
                self.process.send_signal(signum)

    def close(self) -> None:
        """Lets an idle worker leave, and clears up after one that has left."""
        if self.orders is not None:
            with contextlib.suppress(OSError):
                self.orders.close()
        if self.process.poll() is not None and self.process.pid:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGTERM)  # what it started and left behind
        if self.events_fd >= 0:
            os.close(self.events_fd)
            self.events_fd = -1


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
        if self._process is None or share.environment or (not single and accelerators()):
            return None
        orders, order_end = os.pipe()
        event_end, events = os.pipe()
        key = len(self._splits)
        order = {"key": key, "single": single, "cores": share.cores}
        try:
            with _opened(log) as output:
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
                        with _opened(self._log) as log:
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


@dataclass(frozen=True)
class Share:
    """What a worker may use of the machine.

    Attributes:
        environment: variables that are set before it begins.
        cores: None for all.
    """

    environment: dict[str, str] = field(default_factory=dict)
    cores: list[int] | None = None


def shares_of_machine(workers: int) -> list[Share]:
    """What each of several workers may use: a fair share of the GPUs where there are any, else of the cores."""
    if workers == 1:
        return [Share()]
    gpus = visible_gpus()
    if gpus:
        shares = [gpus[place::workers] or [gpus[place % len(gpus)]] for place in range(workers)]
        return [Share({"CUDA_VISIBLE_DEVICES": ",".join(share)}) for share in shares]
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(usable_cores()))
    return [Share(cores=cores[place::workers] or [cores[place % len(cores)]]) for place in range(workers)]


def environment() -> dict[str, str]:
    """That of this process, in which its own package is found."""
    package = str(Path(llmft.__file__).resolve().parent.parent)
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))}


def _opened(log: Path) -> IO[bytes]:
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


def how_it_died(code: int) -> tuple[str, str]:
    """(error, cause) of a worker that left without a word."""
    if code == UNKNOWN_CODE:
        return "the process left without a result; how is not known", "exit"
    if code >= 0:
        return f"the process left with exit code {code} and no result", "exit"
    name = signal.Signals(-code).name if -code in {s.value for s in signal.Signals} else f"signal {-code}"
    hint = " (out of memory?)" if code == -signal.SIGKILL else ""
    return f"the process was killed by {name}{hint}", "signal"
