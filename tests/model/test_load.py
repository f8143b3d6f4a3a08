"""Model directories: complete ones load, broken ones are refused before training."""

from __future__ import annotations

import gc
import json
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmft.config.model import ModelConfig, ModelInit, QuantizationConfig, QuantizationFormat
from llmft.core.errors import ConfigError
from llmft.data.hub import Located, fingerprint, locate
from llmft.model import load
from llmft.model.device import pick_device
from llmft.train import train
from tests.conftest import ROOT

TINY = ROOT / "llmft" / "assets" / "tiny"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return Path(shutil.copytree(TINY, tmp_path / "model"))


def change_weights(directory: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    path = directory / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def drop_layer(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in weights.items() if "layers.1." not in name}


def rename(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"other.{name}": value for name, value in weights.items()}


def reshape(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    name = "model.layers.0.mlp.up_proj.weight"
    return {**weights, name: weights[name][:64].contiguous()}


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("change", [drop_layer, rename, reshape], ids=lambda change: change.__name__)
def test_weights_that_are_missing_or_of_another_shape_are_refused_not_made_up(
    small: Callable[..., Any], directory: Path, change: Callable[..., Any], quantization: str
) -> None:
    change_weights(directory, change)
    with pytest.raises(ConfigError, match=r"model"):
        train(small(f"model.path={directory}", f"quantization={quantization}"), quiet=True)


@pytest.mark.parametrize("damage", ["truncated", "pickled", "no weights", "config", "unknown type"])
def test_a_broken_directory_is_one_sentence(small: Callable[..., Any], directory: Path, damage: str) -> None:
    weights, config = directory / "model.safetensors", directory / "config.json"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:100_000])
    elif damage == "pickled":
        weights.rename(directory / "pytorch_model.bin")
    elif damage == "no weights":
        weights.unlink()
    elif damage == "config":
        config.write_text("{")
    else:
        config.write_text(json.dumps({**json.loads(config.read_text()), "model_type": "nonesuch"}))
    with pytest.raises(ConfigError) as error:
        train(small(f"model.path={directory}"), quiet=True)
    assert "\n" not in str(error.value)
    if damage == "pickled":
        assert "pickled weights are not loaded" in str(error.value)


def test_large_files_are_known_by_a_piece_of_every_tensor(tmp_path: Path) -> None:
    weights = {f"layer{n}": torch.zeros(1024, 1024) for n in range(18)}  # 72 MiB
    (tmp_path / "config.json").write_text("{}")
    save_file(weights, tmp_path / "model.safetensors")
    before = fingerprint(tmp_path)
    weights["layer7"] += 1
    save_file(weights, tmp_path / "model.safetensors")
    assert fingerprint(tmp_path) != before


def test_a_fingerprint_does_not_depend_on_the_place(directory: Path) -> None:
    assert fingerprint(directory) == fingerprint(TINY)


def test_a_random_model_needs_no_files() -> None:
    model = ModelConfig(name="m", id="some/model", architecture="llama", init=ModelInit.random)
    assert locate(model).directory is None


def test_w7_an_uncached_hub_model_says_what_to_do_without_network() -> None:
    model = ModelConfig(name="m", id="mistralai/Mistral-7B-Instruct-v0.1", architecture="mistral")
    with pytest.raises(ConfigError, match=r"model\.path=DIR"):
        locate(model)


def test_a_list_of_devices_names_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device("auto", 0, [1]) == torch.device("cuda", 1)
    assert pick_device("gpu", 1, [2, 3]) == torch.device("cuda", 3)
    assert pick_device("gpu", 1, 2) == torch.device("cuda", 1)


def test_a_base_that_was_not_kept_is_gone_before_the_next_one_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    """A trainer and its model hold each other; two models trained whole would not fit on a GPU side by side."""
    import bitsandbytes  # noqa: F401  # the error that it logs would keep the frames that import it

    made: list[weakref.ref[Any]] = []
    gone: list[bool] = []
    load_files = load._pretrained

    def watched(*arguments: Any) -> Any:
        gone.extend(base() is None for base in made)
        return load_files(*arguments)

    monkeypatch.setattr(load, "_pretrained", watched)
    model = ModelConfig(name="tiny", id="tiny", path=str(TINY))
    gc.disable()
    try:
        for seed in (1, 2):
            base = load.load_base(
                model,
                locate(model),
                QuantizationConfig(QuantizationFormat.none),
                auto_class="causal_lm",
                num_labels=0,
                dtype=torch.float32,
                device=torch.device("cpu"),
                seed=seed,
                keep_base=False,
            )
            made.append(weakref.ref(base))
            circle: list[Any] = [base]
            circle.append(circle)
            del base, circle
    finally:
        gc.enable()
    assert gone == [True]


@pytest.mark.parametrize("architecture", ["llama", pytest.param("mixtral", marks=pytest.mark.slow)])
def test_a_large_random_model_is_quantised_while_it_is_made(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.model.test_memory import LiveBytes
    from tests.model.test_twins import FIRST, twin

    def peak_and_logits() -> tuple[int, torch.Tensor]:
        with LiveBytes([]) as bytes_:
            base = load.load_base(
                twin(FIRST[architecture], num_hidden_layers=6),
                Located(None, "random"),
                QuantizationConfig(QuantizationFormat.nf4),
                auto_class="causal_lm",
                num_labels=0,
                dtype=torch.float32,
                device=torch.device("cpu"),
                seed=1,
                keep_base=False,
            )
        assert not any(tensor.is_meta for tensor in (*base.parameters(), *base.buffers()))
        return bytes_.peak, base(input_ids=torch.arange(8)[None]).logits

    at_once, expected = peak_and_logits()
    monkeypatch.setattr(load, "PIECEMEAL_WEIGHTS", 0)
    piecemeal, logits = peak_and_logits()
    assert piecemeal < 0.6 * at_once
    assert logits.isfinite().all()
    assert 0.5 < logits.std() / expected.std() < 2, "drawn from the same distribution"
    assert torch.equal(logits, peak_and_logits()[1]), "and from the seed alone"
