"""A machine's resources, found without CUDA; and Windows, which has fewer functions than Linux."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llmft.core.machine import visible_gpus
from tests.conftest import ROOT, SMALL


def test_gpus_without_device_files_are_asked_of_their_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'GPU 0: Tesla T4 (UUID: GPU-a)'\necho 'GPU 1: Tesla T4 (UUID: GPU-b)'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(sys, "platform", "win32")
    assert visible_gpus() == ["0", "1"]
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert visible_gpus() == []


AS_ON_WINDOWS = """
import os, runpy, signal, sys
from llmft.core.imports import load_libraries
load_libraries()
for name in [name for name in sys.modules if name.startswith("llmft")]:
    del sys.modules[name]
sys.modules["resource"] = None
for name in ("SIGKILL", "SIGHUP", "SIGUSR1", "SIGVTALRM", "setitimer"):
    delattr(signal, name)
for name in ("geteuid", "sched_getaffinity", "set_blocking"):
    delattr(os, name)
sys.platform = "win32"
sys.argv = sys.argv[1:]
runpy.run_module("llmft.check", run_name="__main__")
"""


@pytest.mark.slow
def test_nothing_is_asked_of_windows_that_only_linux_has(tmp_path: Path) -> None:
    command = [sys.executable, "-c", AS_ON_WINDOWS, "check", *SMALL, f"output_dir={tmp_path}"]
    result = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "llmft check" in result.stdout
