"""The machine: versions, git state, memory, cores and GPUs."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import platform
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

PACKAGES = (
    "llmft", "torch", "lightning", "transformers", "tokenizers", "peft", "bitsandbytes", "accelerate", "datasets",
    "hydra-core", "omegaconf", "safetensors", "wandb", "numpy",
)  # fmt: skip


@lru_cache(maxsize=1)
def versions() -> dict[str, str | None]:
    """Installed versions of the packages that matter; None for a missing one."""
    import importlib.metadata  # takes 26 ms

    installed: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            installed[name] = None
    return installed


def git_state(directory: Path) -> dict[str, Any]:
    """The commit, and whether tracked files differ from it; empty without a git repository."""

    def ask(*arguments: str) -> str:
        return subprocess.check_output(
            ["git", "-C", str(directory), *arguments], stderr=subprocess.DEVNULL, text=True, timeout=10
        ).strip()

    try:
        return {"commit": ask("rev-parse", "HEAD"), "changed": bool(ask("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.SubprocessError):
        return {}


SMALL_MODEL_WEIGHTS = 3_000_000
"""Smaller models run on one thread.

For rows of 40 tokens, two threads take 1.25 times as long as one at 1M weights, and as long as one at 4M. For rows of
600 tokens they take 0.7 to 0.8 of the time at both sizes (two cores of an Intel Xeon, torch 2.13).
"""


def sensible_threads(num_weights: int, processes: int = 1) -> int:
    """CPU threads for a model of this size, where `processes` share the cores."""
    return 1 if num_weights < SMALL_MODEL_WEIGHTS else max(1, usable_cores() // processes)


CONTROL_GROUP = Path("/sys/fs/cgroup")
"""Limits of a container; /proc describes the whole machine."""


def available_memory() -> int | None:
    """Bytes that new processes can take without swapping; None if unknown."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return None
    version_1 = ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")
    for limit, used in (("memory.max", "memory.current"), version_1):
        with contextlib.suppress(OSError, ValueError):  # no such group, or "max"
            group_left = int((CONTROL_GROUP / limit).read_text()) - int((CONTROL_GROUP / used).read_text())
            stat = (CONTROL_GROUP / limit).with_name("memory.stat").read_text()
            cached = sum(int(line.split()[1]) for line in stat.splitlines() if line.startswith("inactive_file "))
            available = min(available, max(0, group_left + cached))  # cached files are dropped when memory is needed
    return available


def allotted_cores() -> int:
    """Number of cores that this process may use, with the quota of a container."""
    for names in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        with contextlib.suppress(OSError, ValueError):  # a quota of "max" is none, and so is -1
            quota, period = map(int, " ".join((CONTROL_GROUP / name).read_text() for name in names).split())
            if quota > 0:
                return max(1, min(usable_cores(), round(quota / period)))
    return usable_cores()


def usable_cores() -> int:
    """Number of cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def die_with_parent(signum: int = 9) -> None:
    """Makes the kernel send this process `signum` (9 is SIGKILL) when its parent ends (Linux only).

    A rank of a distributed run would otherwise wait for a killed launcher for ever.
    """
    if not sys.platform.startswith("linux"):
        return
    parent, libc = os.getppid(), ctypes.CDLL(None, use_errno=True)
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG, linux/prctl.h
    if libc.prctl(set_parent_death_signal, signum, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:  # the parent has just ended
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
    """Returns memory of freed tensors from glibc to the system, see malloc_trim(3).

    glibc keeps it in fragments that a step on rows of other lengths cannot use: a training of a 135M model grew from
    1.3 to 1.8 GiB in 38 steps, all of it free memory.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def free_memory() -> None:
    """Runs the garbage collector and empties CUDA's cache."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _processor() -> str:
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return platform.processor() or platform.machine()


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as in CUDA_VISIBLE_DEVICES, without initialising CUDA."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name.strip() for name in visible.split(",") if name.strip() and name.strip() != "-1"]
    count = len(list(Path("/dev").glob("nvidia[0-9]*"))) or _amd_gpus()
    if not count and (sys.platform == "win32" or Path("/dev/dxg").exists()):  # Windows and WSL2 have no such files
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20, check=True)
            count = sum(line.startswith("GPU ") for line in listing.stdout.splitlines())
    return [str(index) for index in range(count)]


def _amd_gpus() -> int:
    """The number of AMD's GPUs in the driver's topology; nodes without an id are processors."""
    nodes = Path("/sys/class/kfd/kfd/topology/nodes").glob("*/gpu_id")
    return sum(node.read_text().strip() not in ("", "0") for node in nodes)


def set_cuda_variables() -> None:
    """Makes matrix products deterministic, and lets memory grow in segments.

    Micro-batches of varying lengths would fragment it. Call it before CUDA is initialised. A variable that is already
    set is kept. Windows and WSL2 have no such segments.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if sys.platform == "linux" and not Path("/dev/dxg").exists() and "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
