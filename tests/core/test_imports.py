"""Loading torch and related libraries changes nothing in them, and in the process only what is documented."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT


def run(body: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", body], cwd=ROOT, env={**os.environ}, capture_output=True, text=True, timeout=300
    )


def test_libraries_are_their_own_and_the_filters_of_warnings_and_the_collector_stay() -> None:
    body = """
import gc, sys, warnings
before = list(warnings.filters)
from llmft.core.imports import load_libraries
load_libraries()
print(gc.isenabled(), gc.get_freeze_count())
print([f for f in warnings.filters if f[0] == "ignore" and f not in before and f[1] in (Warning, UserWarning)])
import scipy.optimize, torch, transformers
print(type(sys.modules["torch._dynamo"]).__name__, torch.compile.__module__, transformers.utils.is_scipy_available())
"""
    result = run(body)
    assert result.stdout.splitlines() == ["True 0", "[]", "module torch True"], result.stdout + result.stderr


def test_inside_the_context_these_libraries_are_quiet_and_everybody_else_is_heard() -> None:
    body = """
import warnings
from llmft.core.imports import quiet_warnings
def warn(module, category=UserWarning):
    warnings.warn_explicit("heard " + module, category, "file.py", 1, module=module, registry={})
with quiet_warnings():
    warn("transformers.generation.utils"); warn("torchmetrics"); warn("mylib"); warn("torch", RuntimeWarning)
warn("transformers")
"""
    result = run(body)
    heard = [line.rpartition(" ")[2] for line in result.stderr.splitlines() if "heard" in line]
    assert heard == ["torchmetrics", "mylib", "torch", "transformers"], result.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["--cfg", "job"], ["lora.rr=1"]])
def test_a_command_that_trains_nothing_loads_no_torch(arguments: list[str]) -> None:
    body = f"""
import atexit, os, sys
atexit.register(lambda: print("libraries", [n for n in ("torch", "transformers", "lightning") if n in sys.modules]))
import llmft.train
sys.argv = ["llmft", *{arguments!r}]
llmft.train.main(sys.argv[1:])
"""
    result = run(body)
    assert "libraries []" in result.stdout, result.stdout[-300:] + result.stderr


def test_a_training_called_from_a_notebook_gives_the_libraries_their_messages_back(tmp_path: Path) -> None:
    body = f"""
import logging, lightning, transformers
names = ("lightning", "lightning.pytorch", "transformers", "torch", "peft")
def state():
    return [logging.getLogger(n).level for n in names], transformers.utils.logging.is_progress_bar_enabled()
before = state()
from llmft.core.imports import load_libraries
from llmft.training.run import train
from tests.conftest import compose
train(compose("trainer=cpu", "trainer.max_steps=1", "logger=none", r"output_dir={tmp_path}"), quiet=True)
assert before[1] and state() == before, (before, state())
load_libraries()
assert state() == ([logging.ERROR] * len(names), False), state()
"""
    done = run(body)
    assert done.returncode == 0, done.stdout + done.stderr
