"""Trainings in forked processes: torch is imported once, and each start takes a fraction of a second."""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from llmft.core.errors import report
from llmft.runs.checkpoint import path_of, steps_on_disk
from llmft.train import train
from tests.conftest import SMALL, compose, run_directory

LONGER = [
    *SMALL,
    "data.rows={train: 30, validation: 6}",
    "trainer.max_steps=24",
    "trainer.validate_every=8",
    "trainer.checkpoint_every=1",
    "lora.dropout=0.1",
    "trainer.batch_size=4",
]


def records(directory: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / name).read_text().splitlines()]


def status(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "run.json").read_text())


def adapter_bytes(directory: Path) -> bytes:
    return (directory / "adapter" / "adapter_model.safetensors").read_bytes()


def same_checkpoint(a: Path, b: Path, step: int) -> None:
    """Asserts that weights, optimizer and state of `step` are equal bit for bit in two runs."""
    ours, theirs = load_file(path_of(a / "checkpoints", step)), load_file(path_of(b / "checkpoints", step))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items()), step


def same_run(a: Path, b: Path, last: int = 24) -> None:
    assert adapter_bytes(a) == adapter_bytes(b)
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name
    same_checkpoint(a, b, last)


@dataclass
class Child:
    """A training in a forked process, and its output."""

    pid: int
    output: Path
    code: int | None = None

    def poll(self) -> int | None:
        if self.code is None:
            pid, state = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(state)
        return self.code

    def wait(self, seconds: float = 120) -> int:
        deadline = time.monotonic() + seconds
        while self.poll() is None:
            assert time.monotonic() < deadline, self.text()
            time.sleep(0.005)
        assert self.code is not None
        return self.code

    def text(self) -> str:
        return self.output.read_text()


def fork(job: Callable[[], Any], output: Path) -> Child:
    """Runs `job` in a forked process, which exits with the command's exit code."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return Child(pid, output)
    code = 1
    try:
        handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
        sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
        job()
        code = 0
    except Exception as error:
        code = report(error)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def start(root: Path, *overrides: str, base: list[str] = LONGER) -> Child:
    """A training of `base` and `overrides` below `root` in a forked process."""
    config = compose(*base, f"output_dir={root}", *overrides)
    root.mkdir(exist_ok=True)
    return fork(lambda: train(config), root / "output.txt")


def newest_step(root: Path) -> int:
    """The newest checkpoint of the one run below `root`, 0 for none."""
    folders = list((root / "runs").glob("*/checkpoints"))
    return max(steps_on_disk(folders[0]), default=0) if folders else 0


def wait_for_step(root: Path, step: int, child: Child) -> None:
    deadline = time.monotonic() + 90
    while newest_step(root) < step:
        assert time.monotonic() < deadline, child.text()
        assert child.poll() is None, child.text()
        time.sleep(0.002)


def whole_run(root: Path, *overrides: str, base: list[str] = LONGER) -> Path:
    """The run directory of the same training without interruption."""
    train(compose(*base, f"output_dir={root}", *overrides), quiet=True)
    return run_directory(root)
