"""Sweeps over the machines of a Ray cluster: two of them on the loopback."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from omegaconf import OmegaConf

from llmft.config.convert import to_plain
from llmft.core.errors import RunBusy
from llmft.runs.directory import Run, write_config
from llmft.sweeps.remote import RemoteWorker, RunCopy, checkpoints_of
from tests.conftest import SMALL, compose, llmft

SEEDS = 8


def test_without_ray_or_a_cluster_there_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "ray.py").write_text("raise ImportError('as if it were not installed')\n")
    arguments = ["-m", "seed=0,1", "hydra/launcher=ray", *SMALL]
    result = llmft(*arguments, cwd=tmp_path)  # modules in the working directory are found first
    assert result.returncode == 2
    assert 'needs Ray: pip install "llmft[ray]"' in result.stderr
    assert "Traceback" not in result.stderr


class Machine(RemoteWorker):
    """A machine with its own files, without a process or Ray: its methods are called directly."""

    def __init__(self, home: Path) -> None:
        self.home, self.run, self.orders = home, None, list[dict[str, Any]]()

    def order(self, order: dict[str, Any]) -> None:
        self.orders.append(order)

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        return SimpleNamespace(remote=value) if callable(value) and name != "order" else value


def test_a_run_goes_to_a_machine_without_its_files_and_comes_back(tmp_path: Path) -> None:
    config = compose(*SMALL, f"output_dir={tmp_path}/here")
    directory, there = tmp_path / "here" / "runs" / "run-k", tmp_path / "there" / "runs" / "run-k"
    (directory / "checkpoints").mkdir(parents=True)
    (directory / "checkpoints" / "step-00000001.safetensors").write_text("one")
    machine = Machine(tmp_path / "there")
    copy = RunCopy(SimpleNamespace(get=lambda value: value), machine)
    order = {"do": "train", "number": 0, "config": to_plain(config), "run": str(directory)}
    copy.train(order)
    assert (there / "checkpoints" / "step-00000001.safetensors").read_text() == "one"
    assert machine.orders[0]["config"]["output_dir"] == str(tmp_path / "there")
    assert Run(directory, "").busy
    with pytest.raises(RunBusy):
        RunCopy(copy.ray, machine).train(order)

    (there / "checkpoints" / "step-00000001.safetensors").rename(there / "checkpoints" / "step-00000002.safetensors")
    (directory / "STOP").touch()
    copy.update(checkpoints_of(there))
    assert checkpoints_of(directory) == ["step-00000002.safetensors"]
    assert (there / "STOP").exists()
    assert not (directory / "STOP").exists()

    (there / "run.json").write_text('{"status": "done"}')
    write_config(Run(there, "k"), replace(config, output_dir=str(tmp_path / "there")))
    copy.end()
    assert Run(directory, "").status() == {"status": "done"}
    assert OmegaConf.load(directory / "config.yaml").output_dir == str(tmp_path / "here")
    assert not Run(directory, "").busy
    assert not there.exists()


@pytest.fixture
def cluster() -> Iterator[Any]:
    utilities = pytest.importorskip("ray.cluster_utils", reason='Ray is not installed: pip install "llmft[ray]"')
    machine: dict[str, Any] = {"num_cpus": 1, "num_gpus": 0, "object_store_memory": 80 * 2**20}
    started = utilities.Cluster(initialize_head=True, head_node_args={**machine, "include_dashboard": False})
    started.second = started.add_node(**machine)
    started.wait_for_nodes()
    yield started
    started.shutdown()


def weights(root: Path) -> dict[str, bytes]:
    return {run.name: (run / "adapter" / "adapter_model.safetensors").read_bytes() for run in (root / "runs").iterdir()}


MORE = ["trainer.max_steps=20", "trainer.checkpoint_every=1", "task.generate_rows=0", "sweep.report=false"]
SWEEP = ["-m", f"seed={','.join(map(str, range(SEEDS)))}", *SMALL, *MORE]


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The weights of the sweep's runs with the launcher of one machine."""
    root = tmp_path_factory.mktemp("local")
    result = llmft(*SWEEP, f"output_dir={root}", cwd=root, timeout=500)
    assert result.returncode == 0, result.stderr
    return weights(root)


def start(cluster: Any, root: Path, *arguments: str) -> subprocess.Popen[str]:
    """The sweep on the cluster, when at least two of its trials are done."""
    launcher = ["hydra/launcher=ray", f"sweep.ray.address={cluster.address}", f"output_dir={root}"]
    command = [sys.executable, "-m", "llmft", *SWEEP, *launcher, *arguments]
    running = subprocess.Popen(command, cwd=root.parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 300
    while len(list(root.glob("runs/*/adapter"))) < 2:
        assert running.poll() is None, running.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return running


@pytest.mark.slow
@pytest.mark.parametrize("shared", ["null", "false"])
def test_a_lost_machine_costs_no_trial_and_no_bit(
    cluster: Any, local: dict[str, bytes], tmp_path: Path, shared: str
) -> None:
    root = tmp_path / "remote"
    running = start(cluster, root, f"sweep.ray.shared_files={shared}")
    cluster.remove_node(cluster.second, allow_graceful=False)
    printed = running.communicate(timeout=500)[0]
    assert running.returncode == 0, printed
    assert "its machine was lost" in printed
    assert weights(root) == local
    for run in (root / "runs").iterdir():
        steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
        validated = range(0, 21, 2)
        assert sorted(steps) == sorted([*range(1, 21), *validated]), "every step and every validation once"
        assert OmegaConf.load(run / "config.yaml").output_dir == str(root)


@pytest.mark.slow
def test_a_dead_head_is_one_sentence_and_the_same_command_goes_on(
    cluster: Any, local: dict[str, bytes], tmp_path: Path
) -> None:
    root = tmp_path / "remote"
    running = start(cluster, root, "sweep.ray.shared_files=false")
    cluster.head_node.kill_gcs_server(check_alive=False)
    cluster.head_node.kill_raylet(check_alive=False)
    printed = running.communicate(timeout=200)[0]
    assert running.returncode == 5, printed
    assert "the Ray cluster no longer responds; the same command runs only those again." in " ".join(printed.split())
    assert "Traceback" not in printed
    result = llmft(*SWEEP, f"output_dir={root}", cwd=root, timeout=500)
    assert result.returncode == 0, result.stderr
    assert weights(root) == local
