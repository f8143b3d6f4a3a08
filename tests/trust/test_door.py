"""U5 and U6 of the acceptance suite; U1 to U4 are in tests/config/test_hydra_app.py."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llmft.core import console
from llmft.core.console import Screen, StepProgress
from tests.conftest import ROOT, SMALL, run_directory


class TestU5NoTerminal:
    """Without a progress bar there is a line every 30 s or 5% of the steps, written when it is due."""

    def lines(self, monkeypatch: pytest.MonkeyPatch, steps: int, seconds_a_step: float) -> list[tuple[int, str]]:
        """(step, line) as written to a file by a run of `steps` steps."""
        clock = {"now": 0.0}
        monkeypatch.setattr(console.time, "monotonic", lambda: clock["now"])
        out = io.StringIO()
        screen = Screen()
        monkeypatch.setattr(screen, "terminal", console.Console(file=out, width=110, highlight=False))
        progress = StepProgress(screen, steps)
        progress.start(0)
        lines = []
        for step in range(1, steps + 1):
            clock["now"] += seconds_a_step
            before = out.tell()
            progress.update(step, 1.0, 100.0)
            if out.tell() > before:
                lines.append((step, out.getvalue()[before:]))
        progress.stop()
        return lines

    def test_u5_a_thousand_quick_steps_are_a_line_or_two(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert len(self.lines(monkeypatch, 1000, 0.01)) <= 2

    def test_u5_a_thousand_slow_steps_are_at_most_twenty_lines(self, monkeypatch: pytest.MonkeyPatch) -> None:
        lines = self.lines(monkeypatch, 1000, 5.0)
        assert 15 <= len(lines) <= 21
        assert lines[0][0] <= 60, "the first one does not wait for the end"
        assert lines[-1][0] == 1000
        assert all(line.count("\n") == 1 and len(line) < 120 for _, line in lines)

    @pytest.mark.slow
    def test_u5_a_whole_run_into_a_pipe_is_short(self, tmp_path: Path) -> None:
        arguments = [override for override in SMALL if override not in ("progress=false", "trainer.max_steps=4")]
        arguments += ["trainer.max_steps=200", "trainer.validate_every=100", f"output_dir={tmp_path}"]
        result = run(arguments, tmp_path)
        assert result.returncode == 0, result.stderr
        assert len((result.stdout + result.stderr).splitlines()) < 80
        assert "\r" not in result.stdout + result.stderr


def run(arguments: list[str], cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if name not in ("HOME", "XDG_CACHE_HOME")}
    return subprocess.run(
        [sys.executable, "-m", "llmft", *arguments],
        cwd=cwd,
        env={**inherited, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_u6_no_home_a_read_only_place_and_a_name_of_many_signs(tmp_path: Path) -> None:
    """All at once; the one writable folder is named on the command line."""
    mount_point = tmp_path / "read only"
    mount_point.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "ro,size=1m", "tmpfs", str(mount_point)], capture_output=True)
    if mount.returncode != 0:
        pytest.skip("no read-only disk can be mounted here")
    try:
        target = tmp_path / "Übung = größer, 第一 [1]"
        environment: dict[str, Any] = {"HOME": "/nonexistent", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
        quoted = str(target).replace("'", "")
        result = run([*SMALL, f"output_dir='{quoted}'"], mount_point, **environment)
        assert result.returncode == 0, result.stderr
        assert (run_directory(target) / "adapter").is_dir()
        refused = run([*SMALL, "seed=1"], mount_point, **environment)
        assert refused.returncode == 74, refused.stderr
        assert "Traceback" not in refused.stderr
        assert "Read-only file system" in refused.stderr
    finally:
        subprocess.run(["umount", "-l", str(mount_point)], check=True)
