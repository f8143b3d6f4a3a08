"""One model on several machines: two launchers on the loopback, as torchrun and SLURM start them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.conftest import ROOT, SMALL, llmft, run_directory

pytestmark = pytest.mark.slow
NODES = [*SMALL, "trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=1", "trainer.num_nodes=2"]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def command(launcher: str, node: int, port: int) -> tuple[list[str], dict[str, str]]:
    """The command and environment with which `launcher` starts llmft on machine `node`."""
    if launcher == "torchrun":
        where = ["--nnodes=2", "--nproc-per-node=1", f"--node-rank={node}", "--master-addr=127.0.0.1"]
        return [sys.executable, "-m", "torch.distributed.run", *where, f"--master-port={port}", "-m", "llmft"], {}
    tasks = {"NTASKS": "2", "NTASKS_PER_NODE": "1", "NNODES": "2", "LOCALID": "0", "JOB_ID": "1", "JOB_NAME": "llmft"}
    slurm = {**tasks, "PROCID": str(node), "NODEID": str(node)}
    environment = {f"SLURM_{name}": value for name, value in slurm.items()}
    return [sys.executable, "-m", "llmft"], {**environment, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


class Machines:
    """Two machines, each with its launcher."""

    def __init__(self, launcher: str, *arguments: str, each: tuple[str, str] = ("", ""), cwd: Path) -> None:
        port = free_port()
        self.launchers = []
        for node in range(2):
            start, environment = command(launcher, node, port)
            options: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
            env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
            command_line = [*start, *NODES, *arguments, *filter(None, [each[node]])]
            self.launchers.append(subprocess.Popen(command_line, cwd=cwd, env=env, **options))

    def end(self) -> list[tuple[int, str]]:
        """(exit code, output) of each."""
        outputs = [launcher.communicate(timeout=300)[0] for launcher in self.launchers]
        return [(launcher.returncode, text) for launcher, text in zip(self.launchers, outputs, strict=True)]


def adapter(root: Path) -> bytes:
    return (run_directory(root) / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("launcher", ["torchrun", "slurm"])
def test_two_machines_train_what_two_devices_of_one_do(launcher: str, tmp_path: Path) -> None:
    for code, output in Machines(launcher, f"output_dir={tmp_path / 'nodes'}", cwd=tmp_path).end():
        assert code == 0, output
    one = ["trainer.devices=2", "trainer.num_nodes=1", f"output_dir={tmp_path / 'devices'}"]
    result = llmft(*NODES, *one, cwd=tmp_path, timeout=300)
    assert result.returncode == 0, result.stderr
    assert adapter(tmp_path / "nodes") == adapter(tmp_path / "devices")


def test_a_machine_that_is_lost_ends_the_run_in_a_sentence_and_the_same_command_goes_on(tmp_path: Path) -> None:
    more = ["trainer.max_steps=30", "trainer.validate_every=15", "trainer.checkpoint_every=1", "task.generate_rows=0"]
    machines = Machines("torchrun", *more, f"output_dir={tmp_path / 'nodes'}", cwd=tmp_path)
    deadline = time.monotonic() + 240
    while not list((tmp_path / "nodes").glob("runs/*/checkpoints/*.safetensors")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    for child in psutil.Process(machines.launchers[1].pid).children():
        child.send_signal(signal.SIGKILL)
    (code, output), (lost, _) = machines.end()
    assert code != 0
    assert lost != 0
    assert "another process of this run is gone" in output
    ended = Machines("torchrun", *more, f"output_dir={tmp_path / 'nodes'}", cwd=tmp_path).end()
    assert [code for code, _ in ended] == [0, 0], ended
    assert "resumed" in ended[0][1]
    for code, output in Machines("torchrun", *more, f"output_dir={tmp_path / 'whole'}", cwd=tmp_path).end():
        assert code == 0, output
    assert adapter(tmp_path / "nodes") == adapter(tmp_path / "whole")


def test_machines_that_do_not_share_the_run_directory_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = tmp_path / "calls"
    killed = ["trusted_packages=[tests]", "task.objective=tests.gpu.test_gpu.Killed", "trainer.checkpoint_every=1"]
    one = ["trainer=cpu", "trainer.num_nodes=1", f"output_dir={tmp_path / 'a'}"]
    llmft(*SMALL, *killed, *one, cwd=tmp_path, LLMFT_TEST_KILLED=str(mark))
    assert list((tmp_path / "a").glob("runs/*/checkpoints/*.safetensors"))
    directories = (f"output_dir={tmp_path / 'a'}", f"output_dir={tmp_path / 'b'}")
    monkeypatch.setenv("LLMFT_TEST_KILLED", str(mark))
    for code, output in Machines("slurm", *killed, each=directories, cwd=tmp_path).end():
        assert code == 2, output
        assert "set output_dir to a directory that all of them share" in output
