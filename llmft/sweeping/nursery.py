"""A process that loads the libraries once and gives workers: `python -m llmft.sweeping.nursery CHANNEL_FD`.

It splits itself for each worker, or becomes the only one. Workers share the memory of what was imported. Only where no
GPU is used: CUDA does not outlive a split.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import sys
from typing import Any

LONGEST_ORDER = 65536


def main() -> None:
    """The process; it ends with the supervisor's end of the channel."""
    from llmft.libraries import load_libraries

    load_libraries()
    import llmft.training.session  # noqa: F401

    with socket.socket(fileno=int(sys.argv[1])) as channel:
        order = _until_worker(channel)
    if order is not None:
        _become(*order)


def _until_worker(channel: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
    """Splits off workers as ordered; returns in each of them with its order, and in the end, without one."""
    ended, wakes = os.pipe()
    os.set_blocking(wakes, False)
    signal.set_wakeup_fd(wakes)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    workers: dict[int, int] = {}
    while True:
        readable, _, _ = select.select([channel.fileno(), ended], [], [])
        if ended in readable:
            os.read(ended, 4096)
            _tell_ends(channel, workers)
        if channel.fileno() not in readable:
            continue
        content, handles, _, _ = socket.recv_fds(channel, LONGEST_ORDER, 3)
        if not content:
            return None
        order = json.loads(content)
        _pass_on_what_was_printed(handles[2])
        pid = 0 if order["single"] else os.fork()
        if pid == 0:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.close(ended)
            os.close(wakes)
            return order, handles
        with contextlib.suppress(OSError):  # it has done so itself
            os.setpgid(pid, pid)
        workers[pid] = order["key"]
        for handle in handles:
            os.close(handle)
        _tell(channel, key=order["key"], pid=pid)


def _tell_ends(channel: socket.socket, workers: dict[int, int]) -> None:
    while workers:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return
        if pid in workers:
            _tell(channel, key=workers.pop(pid), code=os.waitstatus_to_exitcode(status))


def _tell(channel: socket.socket, **facts: int) -> None:
    with contextlib.suppress(BrokenPipeError):  # the channel's end is read next
        channel.send(json.dumps(facts).encode())


def _pass_on_what_was_printed(log: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    size = os.fstat(1).st_size
    os.write(log, os.pread(1, size, 0))
    os.ftruncate(1, 0)
    os.lseek(1, 0, os.SEEK_SET)


def _become(order: dict[str, Any], handles: list[int]) -> None:
    """A worker with its own process group, that takes orders from, prints to and computes on what it was given."""
    from llmft.sweeping.worker import take_cores, work

    orders, events, log = handles
    if not order["single"]:
        with contextlib.suppress(OSError):  # the nursery has done so
            os.setpgid(0, 0)
    for handle, place in ((orders, 0), (log, 1), (log, 2)):
        os.dup2(handle, place)
    os.close(orders)
    os.close(log)
    if order["cores"] is not None:
        import torch

        take_cores(order["cores"])
        torch.set_num_threads(len(order["cores"]))  # it has counted the cores before
    work(events)


if __name__ == "__main__":
    main()
