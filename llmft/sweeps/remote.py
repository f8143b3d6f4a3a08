"""A worker on a machine of a Ray cluster, as a process here: `python -m llmft.sweeps.remote EVENTS_FD ADDRESS GPUS`.

The supervisor sees a worker like any other: orders on the standard input, events by the file descriptor, what is
printed on the standard output, signals, an exit code. Behind it an actor, which has a share of some machine's GPUs,
runs the same worker there. When the actor's machine is lost this process leaves with `LOST`.

All machines see the same directories: a run that is lost goes on elsewhere from its checkpoint.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from llmft.core.errors import ConfigError
from llmft.sweeps.process import Share, WorkerProcess

LOST = 75
"""Exit code for a machine that is gone: EX_TEMPFAIL of sysexits.h."""
NO_CLUSTER = 69
"""For a cluster that no longer answers: EX_UNAVAILABLE."""
ASK_S = 0.2


def connect(address: str) -> Any:
    """Ray, connected to the cluster. Raises ConfigError where there is none, or no Ray."""
    try:
        import ray
    except ImportError:
        raise ConfigError('hydra/launcher=ray needs Ray: pip install "llmft[ray]"') from None
    try:
        ray.init(address=address, log_to_driver=False, configure_logging=False, include_dashboard=False)
    except Exception as error:  # whatever a network, a token or another version make of it
        told = str(error).strip().splitlines()
        raise ConfigError(
            f"sweep.ray.address={address}: no Ray cluster answers ({told[0][:200] if told else type(error).__name__}); "
            "`ray start --head` starts one here."
        ) from None
    return ray


def cluster_workers(address: str, gpus_per_worker: float | None) -> tuple[int, float]:
    """(workers there is room for, GPUs of each): one for each GPU of the cluster, or machine where there are none."""
    ray = connect(address)
    try:
        gpus = ray.cluster_resources().get("GPU", 0.0)
        machines = sum(node["Alive"] for node in ray.nodes())
    finally:
        ray.shutdown()
    each = (1.0 if gpus else 0.0) if gpus_per_worker is None else gpus_per_worker
    return (int(gpus / each) if each else machines), each


class RemoteWorker:
    """A worker beside the actor that this is; methods may be called at the same time."""

    def __init__(self, directory: str) -> None:
        os.chdir(directory)
        self.log = Path(tempfile.mkdtemp(prefix="llmft-worker-")) / "log.txt"
        self.worker = WorkerProcess.start(self.log, Share())
        self._read = 0

    def order(self, line: bytes) -> None:
        """Hands an order on."""
        assert self.worker.orders is not None
        self.worker.orders.write(line)
        self.worker.orders.flush()

    def end(self) -> None:
        """No order will come."""
        assert self.worker.orders is not None
        self.worker.orders.close()

    def signal(self, signum: int) -> None:
        """See WorkerProcess."""
        self.worker.signal(signum)

    def news(self) -> tuple[bytes, bytes, int | None]:
        """(events, what was printed, exit code) since the last call."""
        code = self.worker.process.poll()
        events = self.worker.read_events()
        with self.log.open("rb") as file:
            file.seek(self._read)
            printed = file.read()
        self._read += len(printed)
        return events, printed, code


def main() -> None:
    """The process."""
    events, address, gpus = int(sys.argv[1]), sys.argv[2], float(sys.argv[3])
    try:
        ray = connect(address)
    except ConfigError as error:
        print(error, flush=True)
        os._exit(NO_CLUSTER)
    options: dict[str, Any] = {"num_gpus": gpus, "num_cpus": 0, "max_concurrency": 4, "scheduling_strategy": "SPREAD"}
    actor = ray.remote(**options)(RemoteWorker).remote(os.getcwd())
    signal.signal(signal.SIGTERM, lambda *_: actor.signal.remote(signal.SIGTERM))
    threading.Thread(target=_hand_on, args=(actor,), daemon=True).start()
    code = None
    while code is None:
        try:
            told, printed, code = ray.get(actor.news.remote())
        except ray.exceptions.RayActorError as error:
            print(f"the worker's machine is gone ({str(error).splitlines()[0]})", flush=True)
            os._exit(LOST)
        os.write(events, told)
        sys.stdout.buffer.write(printed)
        sys.stdout.flush()
        time.sleep(ASK_S)
    if code < 0:  # ended by a signal, as this process then is
        signal.signal(-code, signal.SIG_DFL) if -code != signal.SIGKILL else None
        os.kill(os.getpid(), -code)
    os._exit(code)


def _hand_on(actor: Any) -> None:
    with open(0, "rb", closefd=False) as orders:
        for line in orders:
            actor.order.remote(line)
    actor.end.remote()


if __name__ == "__main__":
    main()
