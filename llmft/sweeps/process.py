"""Worker processes as the supervisor sees them: start, orders, events, exit."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import llmft
from llmft.config.convert import to_plain
from llmft.core.machine import usable_cores, visible_gpus
from llmft.sweeps.trials import Trial
from llmft.sweeps.worker import EVENTS_VARIABLE


@dataclass
class WorkerProcess:
    """A worker, or a process that trains one distributed trial.

    Attributes:
        orders: its standard input; None for a process that trains a single trial.
        log: the file with its output.
        trial: the trial that it is training.
        exiting: it exits by itself, since its last trial may have left libraries in an undefined state.
        stopping: why it was asked to stop.
    """

    process: subprocess.Popen[bytes]
    orders: IO[bytes] | None
    events_fd: int
    log: Path
    trial: Trial | None = None
    since: float = field(default_factory=time.monotonic)
    last_sign: float = field(default_factory=time.monotonic)
    ready: bool = False
    exiting: bool = False
    exiting_since: float = 0.0
    stopping: str | None = None
    stopping_since: float = 0.0
    _buffer: bytes = b""

    @classmethod
    def start(cls, log: Path, resources: WorkerResources, trial: Trial | None = None) -> WorkerProcess:
        """Starts a worker, which gets `trial` once it is ready, or a process for a distributed `trial` alone."""
        alone = trial is not None and trial.distributed
        reading, writing = os.pipe()
        package = str(Path(llmft.__file__).resolve().parent.parent)
        python_path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
        env = {**os.environ, "PYTHONPATH": python_path, **resources.environment}
        arguments = ["llmft.sweeps.worker", str(writing), *map(str, resources.cores or ())]
        if resources.remote is not None:
            arguments = ["llmft.sweeps.remote", str(writing), *resources.remote]
        if trial is not None and alone:
            env[EVENTS_VARIABLE] = str(writing)
            arguments = ["llmft", *trial.arguments]
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", *arguments],
                stdin=subprocess.DEVNULL if alone else subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=[writing],
                env=env,
                start_new_session=True,  # Ctrl-C reaches the supervisor alone, and a kill reaches all children
            )
        os.close(writing)
        os.set_blocking(reading, False)
        return cls(process, process.stdin, reading, log, trial, ready=alone)

    @property
    def idle(self) -> bool:
        """Whether it waits for a trial."""
        return self.ready and self.trial is None and self.stopping is None and not self.exiting

    def order(self, **content: Any) -> None:
        """Sends an order; errors are ignored, since a dead process is noticed by its exit code."""
        assert self.orders is not None
        with contextlib.suppress(BrokenPipeError):
            self.orders.write(json.dumps(content).encode() + b"\n")
            self.orders.flush()

    def train(self, trial: Trial) -> None:
        """Orders a trial."""
        self.trial = trial
        self.since = self.last_sign = time.monotonic()
        order = {"number": trial.number, "config": to_plain(trial.config), "run": str(trial.run.directory)}
        self.order(do="train", **order, arguments=trial.arguments, overrides=trial.overrides)

    def events(self) -> list[dict[str, Any]]:
        """The events since the last call."""
        self._buffer += self.read_events()
        *lines, self._buffer = self._buffer.split(b"\n")
        if lines:
            self.last_sign = time.monotonic()
        return [json.loads(line) for line in lines]

    def read_events(self) -> bytes:
        """The bytes received since the last call."""
        content = b""
        with contextlib.suppress(BlockingIOError):
            while chunk := os.read(self.events_fd, 65536):
                content += chunk
        return content

    def stop(self, why: str) -> None:
        """Asks it to save and exit."""
        if self.stopping is None:
            self.stopping, self.stopping_since = why, time.monotonic()
            self.signal(signal.SIGTERM)

    def signal(self, signum: int) -> None:
        """Sends a signal to the process; SIGKILL also to its children."""
        with contextlib.suppress(ProcessLookupError):
            if signum == signal.SIGKILL:
                os.killpg(self.process.pid, signum)
            else:
                self.process.send_signal(signum)

    def close(self) -> None:
        """Lets an idle worker exit, and cleans up after one that has exited."""
        if self.orders is not None:
            with contextlib.suppress(OSError):
                self.orders.close()
        if self.process.poll() is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGTERM)  # children that it left running
        if self.events_fd >= 0:
            os.close(self.events_fd)
            self.events_fd = -1


@dataclass(frozen=True)
class WorkerResources:
    """The part of the machine that a worker may use.

    Attributes:
        environment: variables that are set before it starts.
        cores: None for all.
        remote: the arguments of `llmft.sweeps.remote` for a worker on a Ray cluster; None for a local one.
    """

    environment: dict[str, str] = field(default_factory=dict)
    cores: list[int] | None = None
    remote: tuple[str, ...] | None = None


def divide_machine(workers: int) -> list[WorkerResources]:
    """The resources of each of several workers: an equal part of the GPUs if there are any, else of the cores."""
    if workers == 1:
        return [WorkerResources()]
    gpus = visible_gpus()
    if gpus:
        gpus_of = [gpus[slot::workers] or [gpus[slot % len(gpus)]] for slot in range(workers)]
        return [WorkerResources({"CUDA_VISIBLE_DEVICES": ",".join(names)}) for names in gpus_of]
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(usable_cores()))
    return [WorkerResources(cores=cores[slot::workers] or [cores[slot % len(cores)]]) for slot in range(workers)]


def how_it_died(code: int) -> tuple[str, str]:
    """(error, cause) of a worker that exited without reporting a result."""
    if code >= 0:
        return f"the process ended with exit code {code} and no result", "exit"
    name = signal.Signals(-code).name if -code in {s.value for s in signal.Signals} else f"signal {-code}"
    hint = " (out of memory?)" if code == -signal.SIGKILL else ""
    return f"the process was killed by {name}{hint}", "signal"
