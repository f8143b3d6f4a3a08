"""Sweeps over the machines of a Ray cluster: two of them on the loopback."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import SMALL, llmft

SEEDS = 8


def test_without_ray_or_a_cluster_there_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "ray.py").write_text("raise ImportError('as if it were not installed')\n")
    arguments = ["-m", "seed=0,1", "hydra/launcher=ray", *SMALL]
    done = llmft(*arguments, cwd=tmp_path)  # what lies in the working directory is found first
    assert done.returncode == 2
    assert 'needs Ray: pip install "llmft[ray]"' in done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture
def cluster() -> Iterator[Any]:
    utilities = pytest.importorskip("ray.cluster_utils", reason='Ray is not installed: pip install "llmft[ray]"')
    machine: dict[str, Any] = {"num_cpus": 1, "num_gpus": 0, "object_store_memory": 80 * 2**20}
    made = utilities.Cluster(initialize_head=True, head_node_args={**machine, "include_dashboard": False})
    made.second = made.add_node(**machine)
    made.wait_for_nodes()
    yield made
    made.shutdown()


def weights(root: Path) -> dict[str, bytes]:
    return {run.name: (run / "adapter" / "adapter_model.safetensors").read_bytes() for run in (root / "runs").iterdir()}


@pytest.mark.slow
def test_a_lost_machine_costs_no_trial_and_no_bit(cluster: Any, tmp_path: Path) -> None:
    more = ["trainer.max_steps=20", "trainer.checkpoint_every=1", "task.generate_rows=0", "sweep.report=false"]
    sweep = ["-m", f"seed={','.join(map(str, range(SEEDS)))}", *SMALL, *more]
    remote = [*sweep, "hydra/launcher=ray", f"sweep.ray.address={cluster.address}", f"output_dir={tmp_path / 'remote'}"]
    running = subprocess.Popen(
        [sys.executable, "-m", "llmft", *remote],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    deadline = time.monotonic() + 300
    while len(list((tmp_path / "remote").glob("runs/*/adapter"))) < 2:
        assert running.poll() is None, running.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    cluster.remove_node(cluster.second, allow_graceful=False)
    told = running.communicate(timeout=500)[0]
    assert running.returncode == 0, told
    assert "its machine is gone" in told
    done = llmft(*sweep, f"output_dir={tmp_path / 'local'}", cwd=tmp_path, timeout=500)
    assert done.returncode == 0, done.stderr
    found = weights(tmp_path / "remote")
    assert len(found) == SEEDS
    assert found == weights(tmp_path / "local")
    for run in (tmp_path / "remote" / "runs").iterdir():
        steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
        validated = range(0, 21, 2)
        assert sorted(steps) == sorted([*range(1, 21), *validated]), "every step and every validation once"
