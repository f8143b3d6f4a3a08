"""Full disks, kills in the middle of a save, orphans, and the order of rows: R4 to R6, R9, R11, R14."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from llmft.core.errors import DiskError
from llmft.core.files import write_atomically
from llmft.runs import checkpoint
from llmft.runs.checkpoint import Checkpoint, newest_sound, path_of, save_checkpoint, steps_on_disk, verify
from llmft.train import train
from tests.conftest import ROOT, SMALL, compose, llmft, run_directory
from tests.trust.helpers import LONGER, fork, newest_step, records, same_run, start, whole_run


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Mounts small disks in memory; skips where that is not allowed."""
    mount_points: list[Path] = []

    def mount(name: str, size: str) -> Path:
        mount_point = tmp_path / name
        mount_point.mkdir()
        result = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(mount_point)], capture_output=True, text=True
        )
        if result.returncode != 0:
            pytest.skip(f"no disk of its own can be mounted here: {result.stderr.strip()}")
        mount_points.append(mount_point)
        return mount_point

    yield mount
    for mount_point in reversed(mount_points):
        subprocess.run(["umount", "-l", str(mount_point)], check=True)


def fill(mount_point: Path, leave: int = 0) -> None:
    """Fills the disk at `mount_point` except `leave` bytes."""
    free = shutil.disk_usage(mount_point).free
    handle = os.open(mount_point / "filler", os.O_WRONLY | os.O_CREAT)
    os.posix_fallocate(handle, 0, max(1, free - leave))
    os.close(handle)
    assert shutil.disk_usage(mount_point).free <= leave


def big(step: int, weights: int = 500_000) -> Checkpoint:
    generator = torch.Generator().manual_seed(step)
    return Checkpoint(step, {"w": torch.randn(weights, generator=generator)}, {}, {})


class TestR4KilledInsideASave:
    """The file gets its name only when it is complete; $TMPDIR is not used."""

    def test_r4_a_kill_at_any_moment_of_a_save_leaves_sound_checkpoints_only(
        self, mounted: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        output, elsewhere = mounted("output", "64m"), tmp_path / "elsewhere"
        elsewhere.mkdir()
        monkeypatch.setenv("TMPDIR", str(elsewhere))
        self.kill_while_saving(output / "checkpoints", tmp_path)
        assert not list(elsewhere.iterdir())

    def kill_while_saving(self, directory: Path, tmp_path: Path) -> None:
        directory.mkdir()
        chance = random.Random(os.environ.get("LLMFT_KILL_SEED", "11"))
        step, leftovers = 0, 0
        for _ in range(12):
            first = step + 1

            def save(first: int = first) -> None:
                # As slow as a hard disk, so that kills come before the file has its name.
                os.fsync = lambda handle: time.sleep(0.01)  # type: ignore[assignment]
                for number in range(first, first + 1000):
                    save_checkpoint(directory, big(number))
                    checkpoint.prune(directory, 2, set())

            child = fork(save, tmp_path / "output.txt")
            deadline = time.monotonic() + 30
            while not steps_on_disk(directory)[-1:] > [step] and time.monotonic() < deadline:
                time.sleep(0.001)
            time.sleep(chance.uniform(0, 0.04))
            os.kill(child.pid, signal.SIGKILL)
            child.wait()
            for saved_step in steps_on_disk(directory):
                assert verify(path_of(directory, saved_step)) is None, saved_step
            leftovers += len(list(directory.glob(".*.tmp")))
            newest = newest_sound(directory, print)
            assert newest is not None
            assert not list(directory.glob(".*.tmp")), "what a kill left is swept"
            assert torch.equal(newest.weights["w"], big(newest.step).weights["w"])
            step = newest.step
        assert leftovers > 0, "no kill hit a save, so nothing was proved"


class TestR5FullDisk:
    """Old checkpoints stay; needed and free bytes are named; exit code 74, or the training continues."""

    def test_r5_a_save_that_finds_no_room_names_the_bytes_and_leaves_the_old_one(
        self, mounted: Callable[..., Path]
    ) -> None:
        mount_point = mounted("disk", "8m")
        save_checkpoint(mount_point, big(1))
        fill(mount_point, leave=2 * 2**20)
        with pytest.raises(OSError, match=r"2\.9 MiB needed, 2\.0 MiB free") as error:
            save_checkpoint(mount_point, big(2))
        assert error.value.errno == errno.ENOSPC
        assert steps_on_disk(mount_point) == [1]
        assert verify(path_of(mount_point, 1)) is None
        assert not list(mount_point.glob(".*"))

    def test_r5_a_disk_that_fills_while_writing_leaves_no_half_file(
        self, mounted: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Another process fills the disk between the check and the write."""
        mount_point = mounted("disk", "8m")
        save_checkpoint(mount_point, big(1))
        fill(mount_point, leave=2**20)
        monkeypatch.setattr(checkpoint, "check_space", lambda directory, needed: None)
        with pytest.raises(OSError, match="No space left"):
            save_checkpoint(mount_point, big(2))
        assert steps_on_disk(mount_point) == [1]
        assert not list(mount_point.glob(".*"))

    def full_from(self, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
        original = checkpoint.check_space

        def check(directory: Path, needed: int) -> None:
            if max(steps_on_disk(directory), default=0) >= step:
                raise OSError(errno.ENOSPC, "2.0 MiB needed, 1.0 MiB free", str(directory))
            original(directory, needed)

        monkeypatch.setattr(checkpoint, "check_space", check)

    def test_r5_a_run_that_cannot_save_leaves_with_code_74_and_goes_on_later(
        self, uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with monkeypatch.context() as patch:
            self.full_from(patch, 5)
            child = start(tmp_path / "a")
            assert child.wait() == 74, child.text()
        message = child.text()[child.text().index("llmft: ") :]
        assert "the checkpoint of step 6 could not be written" in message
        assert "2.0 MiB needed, 1.0 MiB free" in message
        assert "the checkpoint of step 5 is intact" in message
        assert "Traceback" not in message
        again = start(tmp_path / "a")
        assert again.wait() == 0
        same_run(uninterrupted, run_directory(tmp_path / "a"))

    def test_r5_on_request_training_goes_on_without_its_checkpoints(
        self, uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with monkeypatch.context() as patch:
            self.full_from(patch, 5)
            child = start(tmp_path / "a", "trainer.on_save_error=warn", "trainer.export=last")
            assert child.wait() == 0, child.text()
        assert "training goes on (trainer.on_save_error=warn)" in child.text()
        assert records(run_directory(tmp_path / "a")) == records(uninterrupted)

    def test_r5_room_is_looked_for_before_the_first_step(
        self, mounted: Callable[..., Path], small: Callable[..., Any]
    ) -> None:
        mount_point = mounted("disk", "2m")
        with pytest.raises(DiskError, match=r"[\d.]+ MiB needed, [\d.]+ MiB free for checkpoints and weights") as error:
            train(small(f"output_dir={mount_point}", "lora.r=16"), quiet=True)
        assert error.value.exit_code == 74
        assert not list(mount_point.rglob("*.safetensors"))

    def test_r5_a_disk_full_to_the_last_byte_is_one_sentence(
        self, mounted: Callable[..., Path], small: Callable[..., Any]
    ) -> None:
        mount_point = mounted("disk", "1m")
        fill(mount_point)
        child = fork(lambda: train(small(f"output_dir={mount_point}")), mount_point.parent / "output.txt")
        assert child.wait() == 74, child.text()
        assert "Traceback" not in child.text()

    def test_r5_a_read_only_directory_is_one_sentence(
        self, mounted: Callable[..., Path], small: Callable[..., Any]
    ) -> None:
        mount_point = mounted("disk", "8m")
        train(small(f"output_dir={mount_point}"), quiet=True)
        before = sorted(path for path in mount_point.rglob("*") if path.is_file())
        subprocess.run(["mount", "-o", "remount,ro", str(mount_point)], check=True)
        assert train(small(f"output_dir={mount_point}"), quiet=True) is not None, "what is done can be read"
        for more in (["force=true"], ["seed=1"]):
            with pytest.raises(DiskError, match="Read-only file system"):
                train(small(f"output_dir={mount_point}", *more), quiet=True)
        assert sorted(path for path in mount_point.rglob("*") if path.is_file()) == before


@pytest.mark.slow
def test_r6_a_full_tmpdir_does_not_matter(
    mounted: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mount_point = mounted("tmp", "1m")
    fill(mount_point)
    result = llmft(*SMALL, "logger=wandb", f"output_dir={tmp_path}/out", cwd=tmp_path, TMPDIR=str(mount_point))
    assert result.returncode == 0, result.stderr
    assert (run_directory(tmp_path / "out") / "adapter").is_dir()


def test_r9_the_micro_batch_changes_neither_order_nor_numbers(tmp_path: Path) -> None:
    """Rows are tokenised once and collated in the training process: there are no loader workers to vary."""
    recorded = []
    for size in (8, "100tokens", 1):
        directory = whole_run(tmp_path / str(size), f"trainer.micro_batch={size}", base=SMALL)
        recorded.append(records(directory))
    for other in recorded[1:]:
        for ours, theirs in zip(recorded[0], other, strict=True):
            assert ours.keys() == theirs.keys()
            for name, value in ours.items():
                assert value == pytest.approx(theirs[name], rel=1e-4), name
            if ours["step"] <= 1 and "train/loss_nats" in ours:  # before an optimizer has amplified rounding
                assert ours["train/loss_nats"] == pytest.approx(theirs["train/loss_nats"], rel=1e-6)


class TestR14Orphans:
    """Whichever process is killed, none is left running."""

    ARGUMENTS = [  # noqa: RUF012
        *LONGER,
        "trainer=ddp",
        "trainer.accelerator=cpu",
        "trainer.max_steps=2000",
        "trainer.checkpoint_every=5",
        "logger=wandb",
    ]

    def descendants(self, pid: int) -> list[int]:
        children: dict[int, list[int]] = {}
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, ValueError, IndexError):
                continue
            children.setdefault(parent, []).append(int(entry.name))
        pids, queue = [], [pid]
        while queue:
            for child in children.get(queue.pop(), []):
                pids.append(child)
                queue.append(child)
        return pids

    @pytest.mark.slow
    def test_r14_no_process_outlives_a_killed_launcher(self, tmp_path: Path) -> None:
        process = subprocess.Popen(
            [sys.executable, "-m", "llmft", *self.ARGUMENTS, f"output_dir={tmp_path}"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 120
        while newest_step(tmp_path) < 5 and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.1)
        left = self.descendants(process.pid)
        process.kill()
        process.wait()
        assert len(left) >= 2, "a second process of the training, and W&B's"
        deadline = time.monotonic() + 10
        while any(_runs(pid) for pid in left) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert [pid for pid in left if _runs(pid)] == []

    def test_r14_a_process_ends_with_the_one_that_started_it(self, tmp_path: Path) -> None:
        """Two forks: the grandchild asks to die with the child, which is killed."""
        pid_file = tmp_path / "pid"

        def child() -> None:
            if os.fork() == 0:
                from llmft.core.machine import die_with_parent

                die_with_parent()
                pid_file.write_text(str(os.getpid()))
            time.sleep(60)

        started = fork(child, tmp_path / "output.txt")
        deadline = time.monotonic() + 10
        while not (pid_file.exists() and pid_file.read_text()) and time.monotonic() < deadline:
            time.sleep(0.01)
        grandchild = int(pid_file.read_text())
        os.kill(started.pid, signal.SIGKILL)
        started.wait()
        deadline = time.monotonic() + 10
        while _runs(grandchild) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not _runs(grandchild)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_what_a_kill_left_of_a_file_is_gone_with_the_next_write_and_a_living_writers_is_not(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    dead, other = tmp_path / f".report.html.{gone.pid}.tmp", tmp_path / f".other.html.{gone.pid}.tmp"
    alive = tmp_path / f".report.html.{os.getppid()}.tmp"
    for path in (dead, other, alive):
        path.write_text("half")
    write_atomically(tmp_path / "report.html", b"whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([alive.name, other.name, "report.html"])


def test_names_of_an_adapter_are_written_in_order_and_a_kills_leftovers_go(tmp_path: Path) -> None:
    train(compose(*SMALL, f"output_dir={tmp_path}/outputs"), quiet=True)
    run = run_directory(tmp_path / "outputs")
    targets = json.loads((run / "adapter" / "adapter_config.json").read_text())["target_modules"]
    assert len(targets) > 3
    assert targets == sorted(targets)
    (run / ".adapter.x1y2z3").mkdir()
    train(compose(*SMALL, "force=true", f"output_dir={tmp_path}/outputs"), quiet=True)
    assert not list(run.glob(".adapter.*"))


@pytest.mark.slow
def test_a_report_of_the_same_runs_is_the_same_to_the_byte(tmp_path: Path) -> None:
    for seed in (0, 1):
        train(compose(*SMALL, f"seed={seed}", f"output_dir={tmp_path}/outputs"), quiet=True)
    pages = []
    for number in ("0", "1"):
        environment = {**os.environ, "PYTHONHASHSEED": number}
        command = [sys.executable, "-m", "llmft.report", "runs=outputs/runs/*"]
        subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
        pages.append({path: path.read_bytes() for path in tmp_path.rglob("*.html")})
    assert pages[0] == pages[1]
    assert pages[0]
