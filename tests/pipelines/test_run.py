"""Chains that run: what is done is not done again, what has changed is, with what depends on it and nothing else."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import SMALL

pytestmark = pytest.mark.slow

CHAIN = """# @package _global_
name: mine
stages:
  first:
    overrides: [data=manners, task.max_new_tokens=8]
  samples:
    command: sample
    overrides: ["run=${stage:first}", limit=8, samples=2, "judge=llmft.metrics.rewards.exact_answer", threads=1]
  other:
    overrides: [data=manners, task.max_new_tokens=8, seed=1]
  last:
    overrides: [data=messages, "data.rows={}", "data.files=${stage:samples}/best.jsonl", task.max_new_tokens=8]
compare: [first, last]
judged: ["rows=${stage:first}", split=validation, samples=2, "temperatures=[1.0]", threads=1,
  "judge={function: llmft.metrics.rewards.matches, pattern: glad}"]
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A directory with a chain of our own."""
    (tmp_path / "conf" / "pipeline").mkdir(parents=True)
    (tmp_path / "conf" / "pipeline" / "mine.yaml").write_text(CHAIN)
    return tmp_path / "conf"


def command(config: Path, output: Path, *overrides: str) -> list[str]:
    shared = ",".join(f"'{o}'" if " " in o else o for o in SMALL)
    return [
        *(sys.executable, "-m", "llmft.pipeline", "--config-dir", str(config), "pipeline=mine", f"output_dir={output}"),
        *(f"training=[{shared}]", *overrides),
    ]


def written(output: Path) -> dict[str, int]:
    """When each file of every run and of its samples was written last, but for logs and locks."""
    kept = ("adapter_model.safetensors", "samples.parquet")
    return {str(path.relative_to(output)): path.stat().st_mtime_ns for path in output.rglob("*") if path.name in kept}


def weights(output: Path) -> dict[str, bytes]:
    return {str(p.relative_to(output)): p.read_bytes() for p in output.rglob("adapter_model.safetensors")}


def record(output: Path) -> dict[str, str]:
    stages = json.loads((output / "pipelines" / "mine" / "pipeline.json").read_text())["stages"]
    return {name: stage["result"] for name, stage in stages.items()}


def test_a_done_chain_does_nothing_and_a_changed_stage_runs_with_its_dependants_alone(
    config: Path, tmp_path: Path
) -> None:
    output = tmp_path / "outputs"
    subprocess.run(command(config, output), check=True, timeout=600)
    before, results = written(output), record(output)
    report = json.loads((output / "pipelines" / "mine" / "report.json").read_text())
    assert [row["stage"] for row in report["rewards"]] == ["first", "last"]
    subprocess.run(command(config, output), check=True, timeout=600)
    assert written(output) == before
    judge = "llmft.metrics.rewards.exact_answer"
    changed = CHAIN.replace(f'samples=2, "judge={judge}"', f'samples=3, "judge={judge}"')
    assert changed != CHAIN
    (config / "pipeline" / "mine.yaml").write_text(changed)
    subprocess.run(command(config, output), check=True, timeout=600)
    again = record(output)
    assert {name: again[name] == results[name] for name in again} == {
        "first": True, "samples": False, "other": True, "last": False,
    }  # fmt: skip
    assert {path: at for path, at in written(output).items() if path in before} == before


def test_a_killed_chain_ends_where_it_would_have_ended(config: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run(command(config, whole), check=True, timeout=600)
    for pattern in ("runs/*/checkpoints/*", "runs/*/samples/*/parts/*", "pipelines/mine/pipeline.json"):
        process = subprocess.Popen(command(config, killed), stdout=subprocess.DEVNULL)
        while process.poll() is None and not list(killed.glob(pattern)):
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    subprocess.run(command(config, killed), check=True, timeout=600)
    assert weights(killed) == weights(whole)
