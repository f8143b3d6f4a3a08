"""Checkpoints: exact, atomic, verified, small."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llmft.runs.checkpoint import (
    Checkpoint,
    load_checkpoint,
    newest_sound,
    path_of,
    prune,
    save_checkpoint,
    steps_on_disk,
    verify,
)


def make(step: int) -> Checkpoint:
    generator = torch.Generator().manual_seed(step)
    weight = torch.randn(3, 4, generator=generator)
    state = {"step": torch.tensor(float(step)), "exp_avg": weight * 2, "groups": {"qmap": torch.arange(3), "n": 7}}
    return Checkpoint(step, {"a.b": weight}, {"a.b": state}, {"best_value": 0.1 + 0.2, "best_step": None})


def test_a_checkpoint_comes_back_exactly(tmp_path: Path) -> None:
    saved = make(3)
    loaded = load_checkpoint(save_checkpoint(tmp_path, saved))
    assert loaded.step == 3
    assert loaded.state == saved.state
    assert torch.equal(loaded.weights["a.b"], saved.weights["a.b"])
    assert torch.equal(loaded.optimizer["a.b"]["exp_avg"], saved.optimizer["a.b"]["exp_avg"])
    assert loaded.optimizer["a.b"]["groups"]["n"] == 7
    assert torch.equal(loaded.optimizer["a.b"]["groups"]["qmap"], torch.arange(3))


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty", "no digest"])
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_it_used(tmp_path: Path, damage: str) -> None:
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, make(step))
    path = path_of(tmp_path, 3)
    content = bytearray(path.read_bytes())
    if damage == "truncate":
        path.write_bytes(content[:-10])
    elif damage == "flip":
        content[-1] ^= 1
        path.write_bytes(content)
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        path.with_suffix(".sha256").unlink()
    warnings: list[str] = []
    newest = newest_sound(tmp_path, warnings.append)
    assert newest is not None
    assert newest.step == 2
    assert "step 3 is damaged" in warnings[0]
    assert "using step 2" in warnings[0]
    assert path.with_suffix(".bad").exists(), "nothing that was written is thrown away"


def test_all_damaged_means_starting_again_and_saying_so(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, make(1))
    path_of(tmp_path, 1).write_bytes(b"x")
    warnings: list[str] = []
    assert newest_sound(tmp_path, warnings.append) is None
    assert "starting again" in warnings[0]


def test_a_save_that_was_cut_off_leaves_no_trace(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, make(1))
    (tmp_path / ".step-00000002.safetensors.1.tmp").write_bytes(b"half")
    newest = newest_sound(tmp_path, lambda message: None)
    assert newest is not None
    assert newest.step == 1
    assert not list(tmp_path.glob(".*.tmp"))


def test_old_checkpoints_go_and_the_best_stays(tmp_path: Path) -> None:
    for step in range(1, 6):
        save_checkpoint(tmp_path, make(step))
    prune(tmp_path, keep=2, best=1)
    assert steps_on_disk(tmp_path) == [1, 4, 5]
    assert all(verify(path_of(tmp_path, step)) is None for step in (1, 4, 5))


def test_no_pickle_is_read_or_written_anywhere_in_the_package() -> None:
    package = Path(__file__).parents[2] / "llmft"
    for path in package.rglob("*.py"):
        text = path.read_text()
        for word in ("torch.load", "torch.save", "import pickle", "weights_only=False", "allow_pickle=True"):
            assert word not in text, f"{path.name} has {word}"
