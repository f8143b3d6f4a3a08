"""Killed, stopped, damaged, out of memory: the run continues to the same numbers.

The ids in the names are those of the acceptance suite.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llmft.config.trainer import Checkpointing
from llmft.core.errors import ConfigError, DivergedError, Interrupted, Paused
from llmft.runs.checkpoint import Checkpoint, load_checkpoint, path_of, save_checkpoint, steps_on_disk, verify
from llmft.train import train
from llmft.training import stopping
from llmft.training.callbacks import Checkpointer
from llmft.training.finetuner import FineTuner
from llmft.training.micro_batching import MicroBatchPlan, plan_micro_batches
from tests.conftest import ROOT, SMALL, compose, run_directory
from tests.trust.helpers import (
    LONGER,
    adapter_bytes,
    newest_step,
    records,
    same_checkpoint,
    same_run,
    start,
    status,
    wait_for_step,
    whole_run,
)

SEED = os.environ.get("LLMFT_KILL_SEED", "11")


def kill_again_and_again(root: Path, kills: int, reference: Path, *overrides: str, base: list[str] = LONGER) -> None:
    """Kills a run at random moments until it has died `kills` times, then lets it end; compares with `reference`."""
    chance = random.Random(f"{SEED}{overrides}")
    died = 0
    while True:
        child = start(root, *overrides, base=base)
        if died < kills:
            deadline = time.monotonic() + 60
            goal = newest_step(root) + 1
            while newest_step(root) < min(goal, 23) and child.poll() is None and time.monotonic() < deadline:
                time.sleep(0.001)
            time.sleep(chance.uniform(0, 0.05))
            if child.poll() is None:
                os.kill(child.pid, signal.SIGKILL)
        code = child.wait()
        if code == -signal.SIGKILL:
            died += 1
            continue
        assert code == 0, child.text()
        break
    assert died >= min(kills, 15)
    same_run(reference, run_directory(root))


def test_r1_kills_at_random_moments_end_in_bit_identical_weights(uninterrupted: Path, tmp_path: Path) -> None:
    """Compares every step's numbers, the samples and the optimizer's state too."""
    kill_again_and_again(tmp_path, 8, uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["nf4", "int8", "none"])
@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("adamw_8bit", marks=pytest.mark.slow)])
def test_r1_twenty_kills_on_every_number_format(quantization: str, optimizer: str, tmp_path: Path) -> None:
    overrides = [f"quantization={quantization}", f"optimizer={optimizer}"]
    uninterrupted = whole_run(tmp_path / "whole", *overrides)
    kill_again_and_again(tmp_path / "killed", 20, uninterrupted, *overrides)


@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("adamw_8bit", marks=pytest.mark.slow)])
def test_r2_resumed_from_every_step_all_later_checkpoints_are_the_same(
    small: Callable[..., Any], tmp_path: Path, optimizer: str
) -> None:
    """Also from the first and last step of an epoch and of the run; each resumed run is itself resumed."""
    every_step(
        small(
            f"optimizer={optimizer}",
            "data.rows.train=12",
            "trainer.batch_size=5",
            "trainer.max_steps=8",
            "trainer.validate_every=3",
            "trainer.checkpoint_every=1",
            "trainer.keep_checkpoints=99",
            "lora.dropout=0.2",
            "learning_rate.peak=0.02",
        ),
        tmp_path,
        steps=8,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [["optimizer=sgd"], ["quantization=none", "lora=none"], ["quantization=int8"], ["lora.dora=true"]],
    ids=" ".join,
)
def test_r2_resumed_from_every_step_of_every_kind_of_training(
    small: Callable[..., Any], tmp_path: Path, overrides: list[str]
) -> None:
    every_step(
        small(
            *overrides,
            "data.rows.train=12",
            "trainer.batch_size=5",
            "trainer.max_steps=8",
            "trainer.validate_every=3",
            "trainer.checkpoint_every=1",
            "trainer.keep_checkpoints=99",
        ),
        tmp_path,
        steps=8,
    )


def every_step(config: Any, root: Path, steps: int) -> None:
    train(config, quiet=True)
    directory = run_directory(root)
    uninterrupted = root / "whole"
    shutil.copytree(directory, uninterrupted)
    handed_over = "adapter" if config.lora.enabled else "model"
    for step in reversed(range(1, steps + 1)):
        for later in range(step + 1, steps + 1):
            path_of(directory / "checkpoints", later).unlink()
            path_of(directory / "checkpoints", later).with_suffix(".sha256").unlink()
        (directory / "run.json").write_text(json.dumps({"status": "running"}))
        shutil.rmtree(directory / handed_over)
        train(config, quiet=True)
        for path in (uninterrupted / handed_over).glob("*.safetensors"):
            assert (directory / handed_over / path.name).read_bytes() == path.read_bytes(), step
        assert (directory / "metrics.jsonl").read_bytes() == (uninterrupted / "metrics.jsonl").read_bytes(), step
        for later in range(step, steps + 1):
            same_checkpoint(directory, uninterrupted, later)


def at_step(monkeypatch: pytest.MonkeyPatch, phase: str, step: int, act: Callable[[Any], None]) -> None:
    """Calls `act` with the trainer when the run reaches the hook of `phase` at `step`."""
    hook = {
        "step": "on_train_batch_end",
        "val": "on_validation_batch_end",
        "test": "on_test_batch_end",
    }[phase]
    original = getattr(Checkpointer, hook)

    def acted(self: Any, trainer: Any, module: Any, *arguments: Any, **keywords: Any) -> None:
        if module.step == step:
            act(trainer)
        original(self, trainer, module, *arguments, **keywords)

    monkeypatch.setattr(Checkpointer, hook, acted)


class TestR3Signals:
    """A signal saves at the next step boundary; nothing of an accumulation window is ever in a checkpoint."""

    KINDS = [  # noqa: RUF012
        (signal.SIGTERM, 143),
        (signal.SIGINT, 130),
        pytest.param(signal.SIGHUP, 129, marks=pytest.mark.slow),
        pytest.param(signal.SIGUSR1, 138, marks=pytest.mark.slow),
    ]
    OVERRIDES = ["trainer.max_steps=6", "trainer.validate_every=2", "data.rows.test=8", "lora.dropout=0.1"]  # noqa: RUF012

    @pytest.fixture(scope="class")
    def reference_run(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        return whole_run(tmp_path_factory.mktemp("signals"), *self.OVERRIDES, base=SMALL)

    @pytest.fixture(scope="class")
    def reference_run_in_threes(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        return whole_run(tmp_path_factory.mktemp("threes"), *self.OVERRIDES, "trainer.micro_batch=3", base=SMALL)

    @pytest.mark.parametrize(("signum", "code"), KINDS, ids=["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"])
    @pytest.mark.parametrize(
        "micro", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)]
    )
    def test_r3_a_signal_at_any_micro_batch_is_met_at_the_step_boundary(
        self,
        small: Callable[..., Any],
        reference_run_in_threes: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        signum: int,
        code: int,
        micro: int,
    ) -> None:
        """Three micro-batches a step; the signal comes while one of the fourth step is computed."""
        from llmft.training.objectives.language_modeling import LanguageModeling

        config = small(*self.OVERRIDES, "trainer.micro_batch=3")
        calls = {"count": 0}
        original = LanguageModeling.losses

        def losses(self: Any, model: Any, batch: Any) -> Any:
            if model.training:
                calls["count"] += 1
                if calls["count"] == 9 + micro:
                    os.kill(os.getpid(), signum)
            return original(self, model, batch)

        with monkeypatch.context() as patch:
            patch.setattr(LanguageModeling, "losses", losses)
            with pytest.raises(Interrupted) as error:
                train(config, quiet=True)
        assert error.value.exit_code == code
        assert str(error.value).startswith(f"{signal.Signals(signum).name}: saved after step 4 of 6")
        assert "the same command goes on from there" in str(error.value)
        directory = run_directory(tmp_path)
        assert steps_on_disk(directory / "checkpoints")[-1] == 4
        assert status(directory)["status"] == "interrupted"
        train(config, quiet=True)
        same_run(reference_run_in_threes, directory, last=6)
        assert signal.getsignal(signum) is (signal.default_int_handler if signum == signal.SIGINT else signal.SIG_DFL)

    PLACES = [("step", 1), ("step", 4), ("step", 6), ("val", 0), ("val", 4), ("test", 6)]  # noqa: RUF012
    OTHERS = [("step", 2), ("step", 3), ("step", 5), ("val", 2), ("val", 6)]  # noqa: RUF012

    @pytest.mark.parametrize(
        ("phase", "step"), [*PLACES, *(pytest.param(*other, marks=pytest.mark.slow) for other in OTHERS)]
    )
    def test_r3_a_signal_anywhere_saves_and_the_resumed_run_is_the_same(
        self,
        small: Callable[..., Any],
        reference_run: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        phase: str,
        step: int,
    ) -> None:
        config = small(*self.OVERRIDES)
        with monkeypatch.context() as patch:
            at_step(patch, phase, step, lambda trainer: os.kill(os.getpid(), signal.SIGTERM))
            with pytest.raises(Interrupted) as error:
                train(config, quiet=True)
        assert error.value.exit_code == 143
        directory = run_directory(tmp_path)
        assert status(directory)["status"] == "interrupted"
        train(config, quiet=True)
        same_run(reference_run, directory, last=6)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL

    def test_r3_the_command_itself_leaves_with_the_code_and_says_how_to_go_on(
        self, uninterrupted: Path, tmp_path: Path
    ) -> None:
        command = [sys.executable, "-m", "llmft", *LONGER, f"output_dir={tmp_path}", "trainer.checkpoint_every=null"]
        process = subprocess.Popen(
            command,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        deadline = time.monotonic() + 90
        while newest_step(tmp_path) < 8 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        process.send_signal(signal.SIGTERM)
        output = process.communicate(timeout=60)[0]
        assert process.returncode == 143, output
        assert "the same command goes on from there: python -m llmft" in output
        assert "Traceback" not in output
        again = start(tmp_path)
        assert again.wait() == 0, again.text()
        assert "resumed" in again.text()
        same_run(uninterrupted, run_directory(tmp_path))

    def test_r3_a_second_signal_ends_the_process_at_once(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        at_step(monkeypatch, "step", 3, lambda trainer: time.sleep(60))
        child = start(tmp_path)
        wait_for_step(tmp_path, 2, child)
        time.sleep(0.2)
        os.kill(child.pid, signal.SIGTERM)
        time.sleep(stopping.SAME_REQUEST_S + 0.3)
        assert child.poll() is None, "the first one waits for the step boundary"
        began = time.monotonic()
        os.kill(child.pid, signal.SIGTERM)
        assert child.wait(10) == -signal.SIGTERM
        assert time.monotonic() - began < 5

    def test_r3_one_wish_that_arrives_twice_is_one(self) -> None:
        """`timeout` signals the process and its group; service managers send SIGHUP after SIGTERM."""
        signals = stopping.Signals()
        signals.take()
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGTERM)
            assert signals.received == signal.SIGTERM
        finally:
            signals.release()


class TestR3Wishes:
    """Requests by files in the run directory and by the time limit."""

    @pytest.fixture(autouse=True)
    def look_always(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(stopping, "CHECK_EVERY_S", 0.0)

    def test_r3_touch_save_saves_and_the_run_goes_on(
        self, uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
    ) -> None:
        at_step(monkeypatch, "step", 5, lambda trainer: (run_directory(tmp_path / "a") / "SAVE").touch())
        train(
            compose(*LONGER, "trainer.checkpoint_every=null", "trainer.keep_checkpoints=9", f"output_dir={tmp_path}/a")
        )
        directory = run_directory(tmp_path / "a")
        assert 5 in steps_on_disk(directory / "checkpoints")
        assert not (directory / "SAVE").exists(), "what is done is taken away"
        assert "saved after step 5, as the file SAVE asked" in capsys.readouterr().out
        same_run(uninterrupted, directory)

    @pytest.mark.parametrize("phase", ["step", "val"])
    def test_r3_touch_stop_saves_and_ends_with_exit_code_0(
        self, uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, phase: str
    ) -> None:
        with monkeypatch.context() as patch:
            at_step(patch, phase, 8, lambda trainer: (run_directory(tmp_path) / "STOP").touch())
            with pytest.raises(Paused, match="asked by the file STOP: saved after step 8 of 24") as error:
                train(compose(*LONGER, f"output_dir={tmp_path}"), quiet=True)
        assert error.value.exit_code == 0
        directory = run_directory(tmp_path)
        assert status(directory)["status"] == "interrupted"
        assert not (directory / "STOP").exists()
        train(compose(*LONGER, f"output_dir={tmp_path}"), quiet=True)
        same_run(uninterrupted, directory)

    def test_r3_a_stop_from_before_the_start_is_not_meant_for_this_one(
        self, small: Callable[..., Any], tmp_path: Path
    ) -> None:
        config = small()
        train(config, quiet=True)
        (run_directory(tmp_path) / "STOP").touch()
        train(small("force=true"), quiet=True)
        assert status(run_directory(tmp_path))["status"] == "done"

    @pytest.mark.slow
    def test_r3_max_time_saves_and_ends_with_exit_code_0(self, uninterrupted: Path, tmp_path: Path) -> None:
        """Restarts with a limit of a second until the run is done; each of them takes a step at least."""
        codes, steps = [], [0]
        while not codes or status(run_directory(tmp_path))["status"] != "done":
            codes.append(start(tmp_path, "trainer.max_time=0.9s").wait())
            steps.append(steps_on_disk(run_directory(tmp_path) / "checkpoints")[-1])
            if status(run_directory(tmp_path))["status"] != "done":
                assert "trainer.max_time is over" in status(run_directory(tmp_path))["error"]
                assert steps[-1] > steps[-2]
        assert set(codes) == {0}
        assert len(codes) > 1
        same_run(uninterrupted, run_directory(tmp_path))

    @pytest.mark.parametrize("value", ["soon", "0", "-5"])
    def test_r3_a_max_time_that_is_none_is_refused(self, value: str) -> None:
        with pytest.raises(ConfigError, match=r"trainer\.max_time"):
            compose(f"trainer.max_time={value}")


class TestR7Damage:
    """A damaged checkpoint is found by its digest, named and set aside; the one before it is used."""

    @pytest.fixture(scope="class")
    def killed(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        root = tmp_path_factory.mktemp("killed")
        child = start(root, "trainer.keep_checkpoints=5")
        wait_for_step(root, 14, child)
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        return root

    @pytest.mark.parametrize("damage", ["truncate", pytest.param("flip", marks=pytest.mark.slow), "flip two"])
    def test_r7_the_run_goes_on_from_the_newest_sound_one(
        self, uninterrupted: Path, killed: Path, tmp_path: Path, damage: str
    ) -> None:
        shutil.copytree(killed, tmp_path, dirs_exist_ok=True)
        directory = run_directory(tmp_path)
        steps = steps_on_disk(directory / "checkpoints")
        chance = random.Random(SEED)
        for step in steps[-2 if damage == "flip two" else -1 :]:
            path = path_of(directory / "checkpoints", step)
            content = bytearray(path.read_bytes())
            if damage == "truncate":
                content = content[: chance.randrange(len(content))]
            else:
                content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
            path.write_bytes(content)
        again = start(tmp_path)
        assert again.wait() == 0, again.text()
        sound = steps[-3] if damage == "flip two" else steps[-2]
        assert f"the checkpoint of step {steps[-1]} is damaged (sha256" in again.text()
        assert f"using step {sound}." in again.text()
        assert path_of(directory / "checkpoints", steps[-1]).with_suffix(".bad").exists()
        same_run(uninterrupted, directory)


class TestR8OlderCheckpoints:
    """A checkpoint of every released format loads. `python -m tests.trust.make_fixture` made the files."""

    FIXTURES = sorted((Path(__file__).parent / "fixtures").glob("format-*"))

    @pytest.mark.parametrize("fixture", FIXTURES, ids=[path.name for path in FIXTURES])
    def test_r8_an_older_checkpoint_loads_and_its_run_goes_on(self, fixture: Path, tmp_path: Path) -> None:
        from tests.trust.make_fixture import OVERRIDES, STEP

        expected = json.loads((fixture / "expected.json").read_text())
        (path,) = fixture.glob("*.safetensors")
        assert verify(path) is None
        checkpoint = load_checkpoint(path)
        assert checkpoint.step == STEP
        assert sorted(checkpoint.weights) == sorted(expected["weights"])
        assert {name: sorted(entries) for name, entries in checkpoint.optimizer.items()} == expected["optimizer"]
        config = compose(*OVERRIDES, f"output_dir={tmp_path}")
        train(config, quiet=True)
        directory = run_directory(tmp_path)
        shutil.rmtree(directory / "checkpoints")
        shutil.copytree(fixture, directory / "checkpoints")
        (directory / "run.json").write_text(json.dumps({"status": "running"}))
        metric = train(config, quiet=True)
        assert metric == pytest.approx(expected["val/loss_nats"], rel=1e-4)
        assert [r["step"] for r in records(directory) if "train/loss_nats" in r][-1] == STEP + 2

    @pytest.mark.parametrize("key", ["fit", "micro_batch_plan"])
    def test_r8_a_resumed_run_keeps_its_micro_batches_also_from_a_checkpoint_with_the_older_key(
        self, key: str, tmp_path: Path
    ) -> None:
        from tests.trust.make_fixture import OVERRIDES, STEP

        config = compose(*OVERRIDES, "trainer.micro_batch=auto", f"output_dir={tmp_path}")
        train(config, quiet=True)
        directory = run_directory(tmp_path)
        saved = load_checkpoint(path_of(directory / "checkpoints", STEP))
        assert saved.state.pop("micro_batch_plan")["tokens"] != 7
        saved.state[key] = {"rows": None, "tokens": 7, "checkpointing": "none"}
        shutil.rmtree(directory / "checkpoints")
        save_checkpoint(directory / "checkpoints", saved)
        (directory / "run.json").write_text(json.dumps({"status": "running"}))
        train(config, quiet=True)
        assert json.loads((directory / "environment.json").read_text())["micro_batch"] == saved.state[key]

    def test_r8_a_checkpoint_of_a_newer_llmft_says_so(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        import llmft.runs.checkpoint

        checkpoint = Checkpoint(1, {"a": torch.zeros(2)}, {}, {})
        with monkeypatch.context() as patch:
            patch.setattr(llmft.runs.checkpoint, "FORMAT", 2)
            path = save_checkpoint(tmp_path, checkpoint)
        with pytest.raises(ConfigError, match="written by a newer llmft"):
            load_checkpoint(path)


class TestR10OutOfMemory:
    """A step without enough memory is computed in smaller pieces with the same numbers."""

    ERRORS = {  # noqa: RUF012
        "cuda": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
        "cpu": lambda: RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
        "python": lambda: MemoryError(),
        "cublas": lambda: RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"),
    }

    def limit(
        self, monkeypatch: pytest.MonkeyPatch, rows: int, kind: str, *, training: bool = True, steps: int = 0
    ) -> list[int]:
        """Lets batches of more than `rows` rows fail, after `steps` calls that do not; returns the sizes asked for."""
        from llmft.training.objectives.language_modeling import LanguageModeling

        original = LanguageModeling.losses
        sizes: list[int] = []

        def losses(objective: Any, model: Any, batch: Any) -> Any:
            if model.training is training:
                sizes.append(len(batch.rows))
                if len(sizes) > steps and len(batch.rows) > rows:
                    raise self.ERRORS[kind]()
            return original(objective, model, batch)

        monkeypatch.setattr(LanguageModeling, "losses", losses)
        return sizes

    @pytest.mark.parametrize("kind", ERRORS)
    def test_r10_every_way_of_saying_so_is_understood(self, kind: str) -> None:
        from llmft.training.out_of_memory import is_out_of_memory

        assert is_out_of_memory(self.ERRORS[kind]())
        assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))

    def test_r10_the_micro_batch_is_halved_until_it_fits_with_the_same_numbers(
        self, small: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        size = "trainer.micro_batch=8"
        uninterrupted = whole_run(tmp_path / "whole", size, base=SMALL)
        tmp_path = tmp_path / "halved"
        sizes = self.limit(monkeypatch, 2, "cpu")
        train(small(size, f"output_dir={tmp_path}"), quiet=True)
        directory = run_directory(tmp_path)
        assert max(sizes) == 8
        assert set(sizes[-16:]) == {2}
        notes = status(directory)["out_of_memory"]
        assert [(n["stage"], n["key"], n["from"], n["to"]) for n in notes] == [
            ("training", "trainer.micro_batch", 8, 4),
            ("training", "trainer.micro_batch", 4, 2),
        ]
        for ours, theirs in zip(records(directory), records(uninterrupted), strict=False):
            assert ours.keys() == theirs.keys()
            for name, value in ours.items():
                assert value == pytest.approx(theirs[name], rel=1e-4), name

    def test_r10_the_gradient_of_the_halved_batch_is_the_same(self) -> None:
        """To 1e-6, on a float64 model: see also R11."""
        from tests.training.test_finetuner import test_r11_k_micro_batches_of_b_equal_one_batch_of_k_times_b as law

        law([[0, 1], [2, 3], [4, 5]])

    def test_r10_nothing_that_was_learned_is_lost(
        self, small: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Memory runs out in step 3 of 4 without a checkpoint after step 2: the run continues from step 2."""
        self.limit(monkeypatch, 2, "cuda", steps=5)
        taken: list[int] = []
        original = FineTuner.training_step
        monkeypatch.setattr(
            FineTuner,
            "training_step",
            lambda self, batch, index: (taken.append(batch.step), original(self, batch, index))[1],
        )
        train(small("trainer.validate_every=4"), quiet=True)
        assert taken == [0, 1, 2, 2, 3]

    def test_r10_the_rescue_is_saved_when_the_failed_step_has_given_its_memory_back(
        self, small: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A forward, or memory still held by the error's frames, would make the rescue run out of memory too."""
        import llmft.training.callbacks as callbacks
        from llmft.training.objectives.language_modeling import LanguageModeling

        losses, save = LanguageModeling.losses, callbacks.save_checkpoint
        references: list[weakref.ref[torch.Tensor]] = []
        saved: list[tuple[int, int, Any]] = []

        def failing(objective: Any, model: Any, batch: Any) -> Any:
            activations = torch.zeros(1000)
            if model.training:
                references.append(weakref.ref(activations))
            if model.training and len(references) == 6:
                try:
                    raise torch.OutOfMemoryError("CUDA out of memory.")
                except RuntimeError as error:
                    raise RuntimeError("DefaultCPUAllocator: can't allocate memory") from error
            return losses(objective, model, batch)

        def saving(directory: Path, checkpoint: Any) -> Path:
            alive = sum(reference() is not None for reference in references)
            saved.append((checkpoint.step, alive, checkpoint.state["next_loss"]))
            return save(directory, checkpoint)

        monkeypatch.setattr(LanguageModeling, "losses", failing)
        monkeypatch.setattr(callbacks, "save_checkpoint", saving)
        train(small("trainer.validate_every=4"), quiet=True)
        rescue, _ = saved
        assert rescue == (2, 0, None)
        assert status(run_directory(tmp_path))["status"] == "done"

    def test_r10_validation_has_a_batch_of_its_own(
        self, small: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.limit(monkeypatch, 6, "cuda", training=False)
        train(small(), quiet=True)
        notes = status(run_directory(tmp_path))["out_of_memory"]
        assert {n["key"] for n in notes} == {"trainer.validation_batch_size"}
        assert notes[-1]["to"] <= 6

    def test_r10_at_one_row_there_is_advice(
        self, small: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.limit(monkeypatch, 0, "cuda")
        with pytest.raises(ConfigError, match=r"out of memory in training .* try .*data.max_tokens="):
            train(small(), quiet=True)
        assert status(run_directory(tmp_path))["status"] == "failed"

    def test_r10_under_auto_the_tokens_at_once_are_halved(
        self, small: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sizes = self.limit(monkeypatch, 2, "cpu")
        train(small("trainer.micro_batch=auto"), quiet=True)
        assert max(sizes) == 8
        assert max(sizes[-4:]) <= 2
        notes = status(run_directory(tmp_path))["out_of_memory"]
        assert {note["key"] for note in notes} == {"trainer.micro_batch"}
        for before, after in pairwise(notes):
            assert int(after["from"].removesuffix("tokens")) <= int(before["to"].removesuffix("tokens"))

    def test_r10_at_one_row_layers_are_computed_again(
        self, small: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def plan(*arguments: Any, **keywords: Any) -> MicroBatchPlan:
            chosen = plan_micro_batches(*arguments, **keywords)
            if chosen.checkpointing is not Checkpointing.full:
                self.limit(monkeypatch, 0, "cuda")
            else:
                monkeypatch.undo()
            return chosen

        monkeypatch.setattr("llmft.training.session.plan_micro_batches", plan)
        train(small("trainer.micro_batch=1", "trainer.max_steps=1", "trainer.validate_every=1"), quiet=True)
        (note,) = status(run_directory(tmp_path))["out_of_memory"]
        assert (note["key"], note["from"], note["to"]) == ("trainer.gradient_checkpointing", "none", "full")

    def test_r10_a_base_that_does_not_fit_is_not_tried_again(
        self, small: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import llmft.model.assemble

        def load(*arguments: Any, **keywords: Any) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory.")

        monkeypatch.setattr(llmft.model.assemble, "load_base", load)
        with pytest.raises(ConfigError, match=r"out of memory in loading .* try .*quantization=nf4"):
            train(small("quantization=none"), quiet=True)


class TestR12NotFinite:
    """A loss or gradient that is not finite stops the run before the optimizer's step."""

    def spoil(self, monkeypatch: pytest.MonkeyPatch, where: Callable[[int], bool], kind: str = "nan") -> None:
        """Spoils the loss or the gradient of the steps (from 1) that `where` names, in one row."""
        from llmft.training.objectives.language_modeling import LanguageModeling

        current = {"step": 0}
        original_step, original = FineTuner.training_step, LanguageModeling.losses

        def step(module: Any, batch: Any, index: int) -> None:
            current["step"], current["first"] = batch.step + 1, True
            original_step(module, batch, index)

        def losses(objective: Any, model: Any, batch: Any) -> Any:
            output = original(objective, model, batch)
            if model.training and current.pop("first", False) and where(current["step"]):
                if kind == "gradient":
                    output.nll.register_hook(lambda gradient: gradient * float("inf"))
                else:
                    output.nll[0] = output.nll[0] * float(kind)
            return output

        monkeypatch.setattr(FineTuner, "training_step", step)
        monkeypatch.setattr(LanguageModeling, "losses", losses)

    @pytest.mark.parametrize("kind", ["nan", pytest.param("inf", marks=pytest.mark.slow), "gradient"])
    def test_r12_it_stops_before_the_step_and_keeps_the_weights_and_the_batch(
        self, uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
    ) -> None:
        config = compose(*LONGER, "trainer.checkpoint_every=null", f"output_dir={tmp_path}/a")
        with monkeypatch.context() as patch:
            self.spoil(patch, lambda step: step == 11, kind)
            with pytest.raises(DivergedError) as error:
                train(config, quiet=True)
        assert error.value.exit_code == 3
        directory = run_directory(tmp_path / "a")
        assert status(directory)["status"] == "diverged"
        same_checkpoint(directory, uninterrupted, 10)
        assert steps_on_disk(directory / "checkpoints")[-1] == 10
        report = json.loads((directory / "not_finite" / "step-00000011.json").read_text())
        assert report["step"] == 11
        assert ("gradient norm" if kind == "gradient" else "loss") in report["reason"]
        assert len(report["rows"]) == 4
        for row in report["rows"]:
            assert row["where"].startswith("writers:train:")
            assert "Who wrote this text" in row["text"]
            assert row["labelled_tokens"] > 0
        named = [row["where"] for row in report["rows"] if isinstance(row["loss_nats"], str)]
        assert len(named) == (0 if kind == "gradient" else 1)
        assert all(where in str(error.value) for where in named)
        assert "step-00000011.json" in str(error.value)
        if kind != "gradient":
            train(config, quiet=True)
            assert adapter_bytes(directory) == adapter_bytes(uninterrupted)

    def test_r12_on_request_a_bad_step_is_skipped_counted_and_resumed_exactly(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
    ) -> None:
        self.spoil(monkeypatch, lambda step: step in (5, 6, 9))
        overrides = [*LONGER, "trainer.on_nan=skip", "trainer.keep_checkpoints=99", "trainer.max_steps=12"]
        train(compose(*overrides, f"output_dir={tmp_path}/a"))
        directory = run_directory(tmp_path / "a")
        assert "which is skipped" in capsys.readouterr().out
        assert status(directory)["result"]["skipped_steps"] == [5, 6, 9]
        lines = {r["step"]: r for r in records(directory) if "train/learning_rate" in r}
        assert lines[5]["train/loss_nats"] is None
        assert [lines[step].get("train/skipped_steps") for step in (4, 5, 6, 8, 9, 12)] == [None, 1, 2, 2, 3, 3]
        before, after = (load_file(path_of(directory / "checkpoints", step)) for step in (4, 6))
        assert all(torch.equal(value, after[name]) for name, value in before.items()), "no weight, no state changed"
        with monkeypatch.context() as patch:
            at_step(patch, "step", 7, lambda trainer: os.kill(os.getpid(), signal.SIGTERM))
            with pytest.raises(Interrupted):
                train(compose(*overrides, f"output_dir={tmp_path}/b"), quiet=True)
        train(compose(*overrides, f"output_dir={tmp_path}/b"), quiet=True)
        same_run(directory, run_directory(tmp_path / "b"), last=12)
        assert status(run_directory(tmp_path / "b"))["result"]["skipped_steps"] == [5, 6, 9]

    def test_r12_a_run_that_only_skips_is_stopped(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.spoil(monkeypatch, lambda step: step >= 4)
        with pytest.raises(DivergedError, match=r"at step 8 .* 4 steps were skipped before it"):
            train(compose(*LONGER, "trainer.on_nan=skip", f"output_dir={tmp_path}"), quiet=True)

    def test_r12_skips_spread_over_a_run_are_bounded_too(self) -> None:
        from llmft.training.divergence import too_many_skipped

        assert not too_many_skipped(range(10, 60, 10), total_steps=100)
        assert too_many_skipped(range(10, 70, 10), total_steps=100)
        assert not too_many_skipped(range(10, 1010, 10), total_steps=100_000)
        assert too_many_skipped([7, 8, 9, 10, 11], total_steps=100_000)
        assert not too_many_skipped([7, 9, 10, 11, 12], total_steps=100_000)

    def test_r12_the_command_leaves_with_code_3(self, tmp_path: Path) -> None:
        child = start(tmp_path, "learning_rate.peak=1e30", "learning_rate.warmup_fraction=0.0")
        assert child.wait() == 3, child.text()
        assert child.text().count("llmft: training diverged") == 1
        assert "Traceback" not in child.text()


class TestR13FirstLossAfterResume:
    """The first loss of the next step is saved, and compared when the run is resumed."""

    def stopped(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
        config = compose(*LONGER, f"output_dir={tmp_path}")
        with monkeypatch.context() as patch:
            at_step(patch, "step", 10, lambda trainer: os.kill(os.getpid(), signal.SIGTERM))
            with pytest.raises(Interrupted):
                train(config, quiet=True)
        return config

    def test_r13_it_is_the_same_to_the_last_bit(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        config = self.stopped(tmp_path, monkeypatch)
        directory = run_directory(tmp_path) / "checkpoints"
        saved = load_checkpoint(path_of(directory, steps_on_disk(directory)[-1])).state["next_loss"]
        losses: list[float] = []
        original = FineTuner.probe
        monkeypatch.setattr(FineTuner, "probe", lambda self, batch: losses.append(original(self, batch)) or losses[-1])
        train(config, quiet=True)
        assert saved is not None
        assert losses[0] == saved

    def test_r13_other_weights_are_noticed_before_the_first_step(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        config = self.stopped(tmp_path, monkeypatch)
        directory = run_directory(tmp_path) / "checkpoints"
        newest = steps_on_disk(directory)[-1]
        checkpoint = load_checkpoint(path_of(directory, newest))
        checkpoint.weights = {name: torch.randn_like(weight) for name, weight in checkpoint.weights.items()}
        save_checkpoint(directory, checkpoint)
        with pytest.raises(DivergedError, match=r"after step 10 the next row's loss was"):
            train(config, quiet=True)


def test_r15_a_checkpoint_holds_what_is_trained_and_not_the_base(uninterrupted: Path) -> None:
    newest = path_of(uninterrupted / "checkpoints", 24)
    trained = sum(t.numel() for t in load_file(uninterrupted / "adapter" / "adapter_model.safetensors").values())
    assert newest.stat().st_size < trained * 16 + 2**18
