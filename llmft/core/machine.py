"""What a run ran on: versions, device, git state."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import re
import signal
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

PACKAGES = (
    "llmft",
    "torch",
    "lightning",
    "transformers",
    "tokenizers",
    "peft",
    "bitsandbytes",
    "accelerate",
    "datasets",
    "hydra-core",
    "omegaconf",
    "safetensors",
    "wandb",
    "numpy",
)


@lru_cache(maxsize=1)
def versions() -> dict[str, str | None]:
    """Installed versions of the packages that take part; None for one that is missing."""
    import importlib.metadata  # 26 ms, for which a command's start would wait

    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            # `importlib.metadata.version` would parse the package's whole description, 1 ms each.
            told = re.match(
                r"(?:.+\n)*?Version: *(.+)\n", importlib.metadata.distribution(name).read_text("METADATA") or ""
            )
            found[name] = told[1] if told else importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def git_state(directory: Path) -> dict[str, Any]:
    """Commit, and whether tracked files differ from it; empty where there is no git repository."""

    def ask(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(directory), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
        return done.stdout.strip()

    try:
        return {"commit": ask("rev-parse", "HEAD"), "changed": bool(ask("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.SubprocessError):
        return {}


SMALL_MODEL_WEIGHTS = 3_000_000
"""Below, a model is too small to share out among threads.

Two threads take a quarter more time than one for a step of 1M weights on rows of 40 tokens, the same as one at 4M; on
rows of 600 they take 0.7 to 0.8 of it in both (two cores of an Intel Xeon, torch 2.13).
"""


def sensible_threads(num_weights: int, processes: int = 1) -> int:
    """Threads for a model's computations on a CPU, where so many processes share the cores."""
    return 1 if num_weights < SMALL_MODEL_WEIGHTS else max(1, usable_cores() // processes)


CONTROL_GROUP = Path("/sys/fs/cgroup")
"""Where a container reads what it may use of its machine, which /proc describes as a whole."""


def available_memory() -> int | None:
    """Bytes that new processes may take without swapping; None where it cannot be told."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        machine = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return None
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        with contextlib.suppress(OSError, ValueError):  # no such group, or "max"
            left = int((CONTROL_GROUP / limit).read_text()) - int((CONTROL_GROUP / used).read_text())
            stat = (CONTROL_GROUP / limit).with_name("memory.stat").read_text()
            cached = sum(int(line.split()[1]) for line in stat.splitlines() if line.startswith("inactive_file "))
            machine = min(machine, max(0, left + cached))  # files that nobody reads give way
    return machine


def allotted_cores() -> int:
    """Cores' worth of time that this process gets: fewer than it may run on where a container has a quota."""
    with contextlib.suppress(OSError, ValueError):
        quota, period = (CONTROL_GROUP / "cpu.max").read_text().split()
        return max(1, min(usable_cores(), round(int(quota) / int(period))))  # a quota of "max" is none
    with contextlib.suppress(OSError, ValueError):
        allowed, each = (
            int((CONTROL_GROUP / "cpu" / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period")
        )
        if allowed > 0:
            return max(1, min(usable_cores(), round(allowed / each)))
    return usable_cores()


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def die_with_parent(signum: int | None = None) -> None:
    """Sends this process `signum` when the one that started it ends, however it does (Linux; elsewhere nothing).

    Without `signum` it is killed.

    A process of a distributed run whose launcher was killed would otherwise wait for it, for ever.
    """
    if not sys.platform.startswith("linux"):
        return
    signum = signal.SIGKILL if signum is None else signum
    parent = os.getppid()
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG, linux/prctl.h
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(set_parent_death_signal, signum, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:  # it ended just before
        os.kill(os.getpid(), signum)


def describe(device: Any) -> dict[str, Any]:
    """Versions, machine and git state, for a run's record."""
    import torch

    facts: dict[str, Any] = {
        "versions": versions(),
        "git": git_state(Path.cwd()),
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "device": str(device),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts["gpu"] = {"name": properties.name, "memory_gib": round(properties.total_memory / 2**30, 1)}
        facts["cuda"] = torch.version.cuda
    return facts


RETURN_EVERY_STEPS = 10


def return_freed_memory() -> None:
    """Gives back to the system what glibc keeps of tensors that were freed.

    It keeps them in fragments between what still lives: a step on rows of other lengths finds no room there, and a
    training of a 135M model grew from 1.3 to 1.8 GiB in 38 steps, all of it free. See malloc_trim(3).
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them; found without CUDA."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name.strip() for name in named.split(",") if name.strip() and name.strip() != "-1"]
    count = len(list(Path("/dev").glob("nvidia[0-9]*"))) or _amd_gpus()
    if not count and (sys.platform == "win32" or Path("/dev/dxg").exists()):  # Windows and its Linux have no such files
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            asked = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20, check=True)
            count = sum(line.startswith("GPU ") for line in asked.stdout.splitlines())
    return [str(place) for place in range(count)]


def _amd_gpus() -> int:
    """AMD's GPUs as their driver counts them; its nodes without an id are processors."""
    nodes = Path("/sys/class/kfd/kfd/topology/nodes").glob("*/gpu_id")
    return sum(node.read_text().strip() not in ("", "0") for node in nodes)


def set_allocator() -> None:
    """Lets CUDA's memory grow in place, since micro-batches of other lengths would leave it in fragments.

    Before CUDA begins; whoever has set the variable keeps it. Windows, and Linux inside it, do not have it.
    """
    if sys.platform == "linux" and not Path("/dev/dxg").exists() and "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
