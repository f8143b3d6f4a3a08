"""A worker on a machine of a Ray cluster, as a process here: `python -m llmft.sweeps.remote EVENTS_FD ADDRESS …`.

To the supervisor it is a worker like any other: orders on standard input, events on the file descriptor, output on
standard output, signals, an exit code. The worker itself runs in a Ray actor, which owns part of some machine's GPUs.
If the actor's machine is lost, this process exits with `LOST`, and the trial resumes elsewhere from its checkpoint; if
the cluster is lost, it exits with `NO_CLUSTER`.

A machine without access to this machine's directories receives the run as one object before a trial
(`runs/archive.py`) and returns it after each checkpoint and at the end; this process holds the run's lock meanwhile.
Data and models must have the same paths there as here.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import shutil
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmft.config.convert import from_plain
from llmft.config.invocation import arguments_of_process
from llmft.config.sections import TrainConfig
from llmft.core.errors import ConfigError, RunBusy, first_line
from llmft.runs.archive import REQUESTS, pack, unpack
from llmft.runs.directory import Run, write_config
from llmft.sweeps.process import WorkerProcess, WorkerResources

LOST = 75
"""Exit code for a lost machine: EX_TEMPFAIL of sysexits.h."""
NO_CLUSTER = 69
"""Exit code for a cluster that no longer responds: EX_UNAVAILABLE."""
ASK_S = 0.2
ANSWER_S = 5.0


def connect(address: str) -> Any:
    """Connects to the cluster and returns the ray module. Raises ConfigError without a cluster, or without Ray."""
    try:
        import ray
    except ImportError:
        raise ConfigError('hydra/launcher=ray needs Ray: pip install "llmft[ray]"') from None
    try:
        if address.rpartition(":")[2].isdigit() and not answers(address):  # Ray itself would wait for a minute
            raise ConnectionError("connection refused")
        ray.init(address=address, log_to_driver=False, configure_logging=False, include_dashboard=False)
    except Exception as error:  # of the network, of authentication, or of another Ray version
        raise ConfigError(
            f"sweep.ray.address={address}: no Ray cluster answers ({first_line(error)}); `ray start --head` "
            "starts one here."
        ) from None
    return ray


def answers(address: str) -> bool:
    """Whether HOST:PORT accepts connections."""
    host, _, port = address.rpartition("/")[2].rpartition(":")
    try:
        with socket.create_connection((host, int(port)), timeout=ANSWER_S):
            return True
    except OSError:
        return False


def cluster_workers(address: str, gpus_per_worker: float | None, wanted: Any) -> tuple[int, float, str]:
    """(number of workers, GPUs of each, HOST:PORT of the cluster).

    At most as many as the cluster has room for, since another would wait forever. "auto" is one worker per GPU of the
    cluster, or one per machine if there are no GPUs.
    """
    ray = connect(address)
    try:
        resources = ray.cluster_resources()
        head = ray.get_runtime_context().gcs_address
        machines = sum(node["Alive"] for node in ray.nodes())
    finally:
        ray.shutdown()
    gpus = resources.get("GPU", 0.0)
    each = (1.0 if gpus else 0.0) if gpus_per_worker is None else gpus_per_worker
    room = int(gpus / each) if each else int(resources.get("CPU", 0.0))
    if room == 0:
        raise ConfigError(f"sweep.ray.gpus_per_worker={each:g}: the cluster at {address} has no room for a worker.")
    usual = room if each else machines
    return min(room, usual if wanted == "auto" else int(wanted)), each, head


def checkpoints_of(run: Path) -> list[str]:
    """The names of a run's checkpoints; they are not validated, which would need torch."""
    return sorted(path.name for path in (run / "checkpoints").glob("*.safetensors"))


class RemoteWorker:
    """The Ray actor, which runs a worker as its child process; its methods may be called concurrently."""

    def __init__(self, directory: str) -> None:
        self.home = Path(tempfile.mkdtemp(prefix="llmft-worker-"))
        os.chdir(directory if Path(directory).is_dir() else self.home)
        self.log = self.home / "log.txt"
        self.worker = WorkerProcess.start(self.log, WorkerResources())
        self.run: Path | None = None
        self._read = 0
        self._rest = b""

    def sees(self, path: str) -> bool:
        """Whether the caller's file `path` is visible here."""
        return Path(path).is_file()

    def order(self, order: dict[str, Any]) -> None:
        self.worker.order(**order)

    def train(self, order: dict[str, Any], packed: bytes) -> None:
        """Unpacks the run into a directory here and orders the trial."""
        self.run = self.home / "runs" / Path(order["run"]).name
        unpack(packed, self.run)
        order["config"]["output_dir"] = str(self.home)
        self.order(order)

    def packed_run(self) -> bytes:
        """The run's current files, packed."""
        assert self.run is not None
        return pack(self.run)

    def request(self, name: str) -> None:
        """Creates a request file (such as SAVE) in the run's directory."""
        if self.run is not None:
            (self.run / name).touch()

    def forget(self) -> None:
        """Deletes the local copy of the run."""
        if self.run is not None:
            shutil.rmtree(self.run, ignore_errors=True)
            self.run = None

    def end(self) -> None:
        """Closes the worker's orders: none will follow."""
        assert self.worker.orders is not None
        with contextlib.suppress(BrokenPipeError):
            self.worker.orders.close()

    def clear(self) -> None:
        """Deletes all files."""
        shutil.rmtree(self.home, ignore_errors=True)

    def signal(self, signum: int) -> None:
        self.worker.signal(signum)

    def updates(self) -> tuple[list[bytes], bytes, int | None, list[str]]:
        """(events as lines of JSON, output, exit code, the run's checkpoints) since the last call.

        The exit code is None while the worker runs. Checkpoints are listed only for a run that is copied here.
        """
        code = self.worker.process.poll()
        *events, self._rest = (self._rest + self.worker.read_events()).split(b"\n")
        with self.log.open("rb") as file:
            file.seek(self._read)
            printed = file.read()
        self._read += len(printed)
        return events, printed, code, [] if self.run is None else checkpoints_of(self.run)


class RunCopy:
    """Keeps the run's directory here up to date with the copy on the machine that trains it."""

    def __init__(self, ray: Any, actor: Any) -> None:
        self.ray, self.actor = ray, actor
        self.run: Run | None = None
        self._checkpoints: list[str] = []

    def train(self, order: dict[str, Any]) -> None:
        """Sends the run and the order. Raises RunBusy if another process is training it."""
        run = Run(Path(order["run"]), "")
        run.directory.mkdir(parents=True, exist_ok=True)
        run.lock()
        self.run, self._config = run, from_plain(order["config"], TrainConfig)
        self._checkpoints = checkpoints_of(run.directory)
        self.ray.get(self.actor.train.remote(order, pack(run.directory)))

    def update(self, checkpoints: list[str]) -> None:
        """Forwards requests, and fetches the run if its checkpoints have changed."""
        if self.run is None:
            return
        for name in REQUESTS:
            if (self.run.directory / name).exists():
                self.ray.get(self.actor.request.remote(name))
                (self.run.directory / name).unlink()
        if checkpoints != self._checkpoints:
            self._fetch()
            self._checkpoints = checkpoints

    def end(self) -> None:
        """Fetches the finished run and releases its lock."""
        if self.run is None:
            return
        self._fetch()
        self.ray.get(self.actor.forget.remote())
        self.run.unlock()
        self.run = None

    def _fetch(self) -> None:
        assert self.run is not None
        unpack(self.ray.get(self.actor.packed_run.remote()), self.run.directory)
        write_config(self.run, self._config)  # the remote one has the remote output_dir


def main(argv: Sequence[str]) -> None:
    """Runs the process; `argv` is EVENTS_FD ADDRESS GPUS OUTPUT_DIR SHARED (true, false, or null to find out)."""
    events, address, gpus, output, shared = int(argv[0]), argv[1], float(argv[2]), argv[3], json.loads(argv[4])
    try:
        ray = connect(address)
    except ConfigError as error:
        print(error, flush=True)
        os._exit(NO_CLUSTER)
    with_resources = ray.remote(
        num_gpus=gpus, num_cpus=0 if gpus else 1, max_concurrency=4, scheduling_strategy="SPREAD"
    )
    actor = with_resources(RemoteWorker).remote(os.getcwd())
    signal.signal(signal.SIGTERM, lambda *_: actor.signal.remote(signal.SIGTERM))
    try:
        if shared is None:
            with tempfile.NamedTemporaryFile(dir=output, prefix=".seen-") as file:
                shared = ray.get(actor.sees.remote(file.name))
        code = _relay(ray, actor, events, None if shared else RunCopy(ray, actor))
    except (ray.exceptions.RayActorError, OSError) as error:  # OSError: the archive was damaged in transit
        print(f"the worker's machine was lost ({first_line(error)})", flush=True)
        os._exit(LOST)
    if code < 0:  # killed by a signal: this process ends by the same one
        signal.signal(-code, signal.SIG_DFL) if -code != signal.SIGKILL else None
        os.kill(os.getpid(), -code)
    os._exit(code)


def _relay(ray: Any, actor: Any, events: int, copy: RunCopy | None) -> int:
    """Forwards orders to the actor, and its events and output back, until it ends; returns its exit code."""
    orders: queue.Queue[bytes] = queue.Queue()
    threading.Thread(target=_listen, args=(orders,), daemon=True).start()
    while True:
        with contextlib.suppress(queue.Empty):
            _order(ray, actor, orders.get(timeout=ASK_S), events, copy)
        lines, printed, code, checkpoints = ray.get(actor.updates.remote())
        sys.stdout.buffer.write(printed)
        sys.stdout.flush()
        if copy is not None:
            copy.update(checkpoints)
        for line in lines:
            if copy is not None and json.loads(line)["event"] == "end":
                copy.end()  # before the event, since the supervisor then reads the run's files
            _tell(events, line)
        if code is not None:
            if copy is not None:
                copy.end()
            ray.get(actor.clear.remote())
            return int(code)


def _order(ray: Any, actor: Any, line: bytes, events: int, copy: RunCopy | None) -> None:
    if not line:
        ray.get(actor.end.remote())
    elif (order := json.loads(line))["do"] == "train" and copy is not None:
        try:
            copy.train(order)
        except RunBusy as error:
            end = {"event": "end", "status": "busy", "value": None, "error": str(error), "cause": None, "sound": True}
            _tell(events, json.dumps(end).encode())
    else:
        ray.get(actor.order.remote(order))


def _tell(events: int, line: bytes) -> None:
    with contextlib.suppress(BrokenPipeError):  # the supervisor is gone; the worker saves, and the run is still fetched
        os.write(events, line + b"\n")


def _listen(orders: queue.Queue[bytes]) -> None:
    """Queues the orders from standard input; an empty one marks the end."""
    with open(0, "rb", closefd=False) as lines:
        for line in lines:
            orders.put(line)
    orders.put(b"")


if __name__ == "__main__":
    main(arguments_of_process())
