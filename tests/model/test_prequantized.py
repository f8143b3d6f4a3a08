"""Files that are already quantised stay as they are, and the record matches the loaded model."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llmft.config.model import ModelConfig, QuantizationConfig
from llmft.config.model import QuantizationFormat as Form
from llmft.core.errors import ConfigError
from llmft.data.hub import locate
from llmft.model.load import load_base
from llmft.model.quantization import effective_quantization, stored_format, weight_counts
from llmft.model.tokenizer import load_tokenizer
from llmft.train import train
from tests.conftest import SMALL, compose, run_directory


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The embedded model, saved quantised by transformers."""
    tiny = ModelConfig(name="tiny", path="package:tiny", id="x", architecture="llama")
    directories = {}
    for form in (Form.nf4, Form.int8):
        directory = tmp_path_factory.mktemp(form.value)
        base = load_base(
            tiny,
            locate(tiny),
            QuantizationConfig(form, cache=False),
            auto_class="causal_lm",
            num_labels=0,
            dtype=torch.bfloat16,
            device=torch.device("cpu"),
            seed=0,
            keep_base=False,
        )
        base.save_pretrained(directory)
        load_tokenizer(tiny, locate(tiny)).save_pretrained(directory)
        directories[form.value] = directory
    return directories


def ran(directory: Path, tmp_path: Path, *more: str) -> tuple[dict[str, Any], str]:
    train(compose(*SMALL, "model=local", f"model.path={directory}", f"output_dir={tmp_path}", *more), quiet=True)
    run = run_directory(tmp_path)
    return json.loads((run / "environment.json").read_text())["ran"], (run / "log.txt").read_text()


@pytest.mark.parametrize(("form", "quantization"), [("nf4", "nf4"), ("nf4", "checkpoint"), ("int8", "checkpoint")])
def test_the_record_says_what_the_model_is(
    stored: dict[str, Path], tmp_path: Path, form: str, quantization: str
) -> None:
    record, log = ran(stored[form], tmp_path, f"quantization={quantization}")
    bits = "4-bit" if form == "nf4" else "8-bit"
    assert record["quantization"] == form
    assert record["weights"][bits] > record["weights"]["full"] > 0
    assert f"of them {form}" in log
    assert record["objective"] == "llmft.training.objectives.language_modeling.LanguageModeling"
    assert record["lora_modules"]["count"] > 0
    assert f"on {record['lora_modules']['count']} modules: {', '.join(record['lora_modules']['names'])[:6]}" in log


def test_a_quantised_checkpoint_trains_as_the_same_quantisation_of_its_original(
    stored: dict[str, Path], tmp_path: Path
) -> None:
    def losses(root: Path, *arguments: str) -> list[Any]:
        train(
            compose(*SMALL, *arguments, "trainer.precision=bf16", "learning_rate.peak=1e-3", f"output_dir={root}"),
            quiet=True,
        )
        return [json.loads(line) for line in (run_directory(root) / "metrics.jsonl").read_text().splitlines()]

    of_files = losses(
        tmp_path / "a", "model=local", f"model.path={stored['nf4']}", "quantization=checkpoint", "prompt=plain"
    )
    assert of_files == losses(tmp_path / "b", "quantization=nf4", "prompt=plain")


@pytest.mark.parametrize(
    ("form", "quantization"),
    [("nf4", "none"), ("nf4", "int8"), ("nf4", "fp4"), ("int8", "none"), ("int8", "nf4"), (None, "checkpoint")],
)
def test_another_quantisation_than_that_of_the_files_is_refused_before_weights_load(
    stored: dict[str, Path], tmp_path: Path, form: str | None, quantization: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmft.model.assemble.load_base", lambda *_, **__: pytest.fail("weights were loaded"))
    of = [] if form is None else ["model=local", f"model.path={stored[form]}"]
    with pytest.raises(ConfigError, match=rf"quantization={quantization}: .*(are {form}.* already|are not quantised)"):
        train(compose(*SMALL, *of, f"quantization={quantization}", f"output_dir={tmp_path}"), quiet=True)


def test_double_quantisation_is_part_of_the_format() -> None:
    files = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    model = SimpleNamespace(quantization_config=files)
    with pytest.raises(ConfigError, match=r"nf4 with quantization\.double_quant=false already"):
        effective_quantization(QuantizationConfig(Form.nf4), model, "x")
    assert effective_quantization(QuantizationConfig(Form.nf4, double_quant=False), model, "x").format is Form.nf4


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", "compressed-tensors", "mxfp4", "hqq", "torchao"])
def test_formats_of_others_go_by_their_checkpoint_alone(method: str) -> None:
    model = SimpleNamespace(quantization_config={"quant_method": method, "bits": 4})
    for form in (Form.none, Form.nf4, Form.fp4, Form.int8):
        with pytest.raises(ConfigError, match=f"are {method} already"):
            effective_quantization(QuantizationConfig(form), model, "x")
    assert effective_quantization(QuantizationConfig(Form.checkpoint), model, "x").format is Form.checkpoint


def test_packed_integers_are_counted_by_the_weights_in_them() -> None:
    model = torch.nn.Module()
    model.layer = torch.nn.Module()
    model.layer.register_buffer("qweight", torch.zeros(8, 16, dtype=torch.int32))
    model.scale = torch.nn.Parameter(torch.zeros(3), requires_grad=False)
    model.config = SimpleNamespace(quantization_config={"quant_method": "gptq", "bits": 4})
    assert weight_counts(model) == {"4-bit": 1024, "8-bit": 0, "full": 3, "trainable": 0}
    assert stored_format(model) == "gptq"
