"""Cached quantised bases: the same to the bit, never half-written, never a reason to fail."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import filelock
import pytest
import torch

from llmft.config.commands import Cleaning, DiskConfig
from llmft.config.model import LoraConfig, ModelInit, QuantizationConfig
from llmft.config.model import QuantizationFormat as Form
from llmft.data.hub import Located, locate
from llmft.disk import disk
from llmft.model import adapters
from llmft.model.load import load_base
from llmft.model.quantized_cache import FACTS, LEAST_WEIGHTS, bases_directory, entries
from llmft.training.objectives.classification import Classification
from llmft.training.objectives.language_modeling import LanguageModeling
from tests.model.test_twins import FILES, FIRST, batch, classifies, load, twin

QUICK = ("mistral", "mixtral")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of this test, without a minimum size of bases."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("llmft.model.load.LEAST_WEIGHTS", 1)
    return bases_directory()


class Loaded(NamedTuple):
    """A base, whether it was quantised from its files, and the warnings."""

    base: Any
    from_files: bool
    warnings: list[str]


class Saved:
    """A twin's directory."""

    def __init__(self, architecture: str, directory: Path) -> None:
        name = FIRST[architecture]
        self.file = FILES[name]
        self.model = twin(name)
        plain = load(self.model, Located(None, "random"), self.file, "none")
        plain.to(torch.bfloat16).save_pretrained(directory)
        self.model = replace(self.model, init=ModelInit.pretrained, path=str(directory), overrides={})

    def load(self, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> Loaded:
        import bitsandbytes as bnb

        quantized: list[int] = []
        warnings: list[str] = []
        arguments: dict[str, Any] = {
            "auto_class": "sequence_classification" if classifies(self.file) else "causal_lm",
            "num_labels": 3,
            "dtype": torch.float32,
            "device": torch.device("cpu"),
            "seed": 1,
            "keep_base": False,
            "warn": warnings.append,
            **changes,
        }
        quantization = arguments.pop("quantization", QuantizationConfig())
        with monkeypatch.context() as patch:
            for kind in (bnb.nn.Params4bit, bnb.nn.Int8Params):
                old = kind._quantize
                patch.setattr(kind, "_quantize", lambda s, d, old=old: quantized.append(1) or old(s, d))
            base = load_base(self.model, locate(self.model), quantization, **arguments)
        base.config.pad_token_id = 0
        return Loaded(base, bool(quantized), warnings)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return Saved("mistral", tmp_path_factory.mktemp("saved") / "model")


def gradients(base: Any, file: dict[str, Any]) -> dict[str, torch.Tensor]:
    auto_class = "sequence_classification" if classifies(file) else "causal_lm"
    model = adapters.attach(base, LoraConfig(r=4), auto_class=auto_class, seed=3, name="x")
    objective: Any = Classification() if classifies(file) else LanguageModeling()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero initially, which would hide the gradient of A
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    objective.losses(model, batch()).nll.sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def logits(base: Any) -> torch.Tensor:
    with torch.no_grad():
        return base(input_ids=batch().input_ids, attention_mask=batch().attention_mask).logits


@pytest.mark.parametrize("form", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize(
    "architecture", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in sorted(FIRST)]
)
def test_a_cached_base_is_the_fresh_one_to_the_bit(
    architecture: str, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = Saved(architecture, tmp_path / "model")
    fresh = saved.load(monkeypatch, quantization=QuantizationConfig(Form(form)))
    again = saved.load(monkeypatch, quantization=QuantizationConfig(Form(form)))
    assert fresh.from_files
    assert not again.from_files
    assert not fresh.warnings
    assert not again.warnings
    assert dict(fresh.base.named_modules()).keys() == dict(again.base.named_modules()).keys()
    for part in ("parameters", "buffers"):
        old, new = (dict(getattr(loaded.base, f"named_{part}")()) for loaded in (fresh, again))
        assert old.keys() == new.keys()
        assert all(torch.equal(old[name], new[name]) and old[name].dtype == new[name].dtype for name in old)
    assert fresh.base.config.to_diff_dict() == again.base.config.to_diff_dict()
    if fresh.base.can_generate():
        assert fresh.base.generation_config.to_dict() == again.base.generation_config.to_dict()
    assert torch.equal(logits(fresh.base), logits(again.base))
    old, new = gradients(fresh.base, saved.file), gradients(again.base, saved.file)
    assert old.keys() == new.keys()
    assert all(torch.equal(old[name], new[name]) for name in old)
    assert any(gradient.abs().sum() > 0 for gradient in new.values())


WEIGHTS = "model.safetensors"


def flip(entry: Path) -> None:
    content = bytearray((entry / WEIGHTS).read_bytes())
    content[-100] ^= 1
    (entry / WEIGHTS).write_bytes(content)


def cut(entry: Path) -> None:
    content = (entry / WEIGHTS).read_bytes()
    (entry / WEIGHTS).write_bytes(content[: len(content) // 2])


def garble(entry: Path) -> None:
    (entry / FACTS).write_text("{")


def empty(entry: Path) -> None:
    (entry / FACTS).write_text("[]")


def reconfigure(entry: Path) -> None:
    (entry / "config.json").write_text("{}")


def lose(entry: Path) -> None:
    (entry / WEIGHTS).unlink()


@pytest.mark.parametrize(
    "damage", [flip, cut, garble, empty, reconfigure, lose], ids=lambda damage: str(damage.__name__)
)
def test_a_damaged_entry_is_told_in_one_line_and_made_again(
    damage: Callable[[Path], None], saved: Saved, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh = logits(saved.load(monkeypatch).base)
    ((entry, _),) = entries()
    damage(entry)
    mended = saved.load(monkeypatch)
    assert mended.from_files
    assert torch.equal(logits(mended.base), fresh)
    (warning,) = mended.warnings
    assert "is damaged" in warning
    assert "\n" not in warning
    again = saved.load(monkeypatch)
    assert not again.from_files
    assert not again.warnings
    assert torch.equal(logits(again.base), fresh)


def test_a_whole_entry_of_another_model_is_dropped(
    saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved.load(monkeypatch)
    ((entry, _),) = entries()
    Saved("qwen2", tmp_path / "other").load(monkeypatch)
    (other,) = [path for path, _ in entries() if path != entry]
    shutil.rmtree(entry)
    other.rename(entry)
    mended = saved.load(monkeypatch)
    assert mended.from_files
    assert len(mended.warnings) == 1


def test_a_cache_that_cannot_be_written_costs_a_warning(
    saved: Saved, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_text("a file where the folder should be")
    loaded = saved.load(monkeypatch)
    assert loaded.from_files
    assert len(loaded.warnings) == 1
    assert "could not be cached" in loaded.warnings[0]
    cache.unlink()
    usage = shutil.disk_usage(cache.parent)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=1000))
    loaded = saved.load(monkeypatch)
    assert len(loaded.warnings) == 1
    assert "free" in loaded.warnings[0]
    assert not entries()


def test_a_write_that_fails_half_way_leaves_nothing(saved: Saved, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("transformers.PretrainedConfig.save_pretrained", full)
        loaded = saved.load(monkeypatch)
    assert len(loaded.warnings) == 1
    assert "No space left" in loaded.warnings[0]
    assert [path.name for path in cache.iterdir()] == [".lock"]


def test_the_least_recently_used_leave_for_the_new_and_what_is_too_large_stays_out(
    saved: Saved, monkeypatch: pytest.MonkeyPatch
) -> None:
    forms = [QuantizationConfig(Form("nf4"), double) for double in (True, False)]
    for form in forms:
        saved.load(monkeypatch, quantization=form)
    sizes = [sum(file.stat().st_size for file in path.iterdir()) for path, _ in entries()]
    assert len(sizes) == 2
    saved.load(monkeypatch, quantization=forms[0])  # used again: the other one is older now
    room = (sum(sizes) + min(sizes) // 2) / 2**30
    saved.load(monkeypatch, quantization=QuantizationConfig(Form("fp4"), cache_gib=room))
    assert len(entries()) == 2
    assert not saved.load(monkeypatch, quantization=forms[0]).from_files
    loaded = saved.load(monkeypatch, quantization=replace(forms[1], cache_gib=1e-6))
    assert loaded.from_files
    assert "quantization.cache_gib" in loaded.warnings[0]


def test_while_another_process_writes_nobody_waits(saved: Saved, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.mkdir(parents=True)
    with filelock.FileLock(cache / ".lock"):
        loaded = saved.load(monkeypatch)
    assert loaded.from_files
    assert not loaded.warnings
    assert not entries()


def test_what_a_killed_writer_left_is_swept_away(saved: Saved, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (cache / ".abc.1.tmp").mkdir(parents=True)
    saved.load(monkeypatch)
    assert sorted(path.name for path in cache.iterdir()) == [".lock", entries()[0][0].name]


def test_another_quantisation_precision_or_model_is_another_entry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = Saved("mistral", tmp_path / "model")
    assert saved.load(monkeypatch).from_files
    assert not saved.load(monkeypatch, seed=2).from_files, "the seed is no part of a base from files"
    assert saved.load(monkeypatch, dtype=torch.bfloat16).from_files
    assert saved.load(monkeypatch, quantization=QuantizationConfig(Form("fp4"))).from_files
    assert saved.load(monkeypatch, quantization=QuantizationConfig(Form("nf4"), double_quant=False)).from_files
    plain = saved.load(monkeypatch, quantization=QuantizationConfig(Form("none"))).base
    with torch.no_grad():
        next(plain.parameters()).add_(1)
    plain.save_pretrained(tmp_path / "model")
    assert saved.load(monkeypatch).from_files
    assert len(entries()) == 5


def test_random_small_and_unwanted_bases_are_not_cached(saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    load(twin(FIRST["mistral"]), Located(None, "random"), saved.file)
    saved.load(monkeypatch, quantization=QuantizationConfig(cache=False))
    monkeypatch.setattr("llmft.model.load.LEAST_WEIGHTS", LEAST_WEIGHTS)
    saved.load(monkeypatch)
    assert not entries()


def test_disk_lists_cached_bases_and_clears_them(
    saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    saved.load(monkeypatch)
    report: Any = disk(DiskConfig(output_dir=str(tmp_path)))
    (entry,) = [cached for cached in report["cached"] if cached["kind"] == "quantised base"]
    assert entry["name"] == "model nf4 float32"
    assert entry["size"] > 100_000
    disk(DiskConfig(output_dir=str(tmp_path), clean=[Cleaning.bases], dry_run=False))
    assert not entries()
    assert saved.load(monkeypatch).from_files
    capsys.readouterr()


def test_the_cache_is_no_part_of_a_runs_key() -> None:
    from llmft.config.convert import key_fields

    assert key_fields(QuantizationConfig(cache=False, cache_gib=1.0)) == key_fields(QuantizationConfig())
