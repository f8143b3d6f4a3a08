"""Mixtures of experts: in 4 bits from their files, stack by stack, in the memory of one layer."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmft.config.model import LoraConfig, ModelConfig, QuantizationConfig
from llmft.config.model import QuantizationFormat as Form
from llmft.core.errors import ConfigError
from llmft.data.hub import locate
from llmft.model import adapters
from llmft.model.experts import PIECE_WEIGHTS, fused_shapes, quantize_4bit
from llmft.model.load import load_base
from llmft.model.quantization import quantize_in_place, weight_counts
from llmft.training.objectives.language_modeling import LanguageModeling
from tests.conftest import ROOT
from tests.model.test_memory import held_bytes
from tests.model.test_twins import batch
from tests.model.twins import TWINS

SHAPE = {**TWINS["mixtral"], "num_experts_per_tok": 2}
DEEPSEEK = {
    "n_routed_experts": 4,
    "moe_intermediate_size": 128,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 64,
    "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "num_key_value_heads": 4,
}
SPARSE = {"num_experts": 4, "moe_intermediate_size": 128}
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "qwen3_moe": SPARSE,
    "qwen2_moe": {**SPARSE, "shared_expert_intermediate_size": 128},
    "olmoe": {"num_experts": 4},
    "granitemoe": {},
    "phimoe": {},
    "deepseek_v2": {**DEEPSEEK, "q_lora_rank": None},
    "deepseek_v3": {**DEEPSEEK, "q_lora_rank": 64, "n_group": 1, "topk_group": 1},
    "glm4_moe": {"n_routed_experts": 4, "moe_intermediate_size": 128, "n_group": 1, "topk_group": 1},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 128},
    "llama4_text": {"num_experts_per_tok": 1, "intermediate_size_mlp": 256},
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2},
    "minimax": {},
}
QUICK = ("mixtral", "qwen3_moe")


def saved(family: str, directory: Path) -> ModelConfig:
    """A random model of `family` in several files, in bf16, as published ones are."""
    import transformers

    shape = {key: value for key, value in {**SHAPE, **FAMILIES[family]}.items() if key != "head_dim"}
    if family.startswith(("deepseek", "hunyuan", "llama4")):
        shape |= {"head_dim": 32}
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **shape)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(directory, max_shard_size="400KB")
    assert len(list(directory.glob("*.safetensors"))) > 1
    return ModelConfig(name=family, id=f"x/{family}", architecture=family, path=str(directory))


def load(model: ModelConfig, form: str = "nf4", **changes: Any) -> Any:
    arguments: dict[str, Any] = {"dtype": torch.float32, "seed": 0, **changes}
    quantization = QuantizationConfig(Form(form), cache=False)
    device = torch.device("cpu")
    return load_base(
        model,
        locate(model),
        quantization,
        auto_class="causal_lm",
        num_labels=0,
        device=device,
        keep_base=False,
        **arguments,
    )


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=batch().input_ids).logits


@pytest.mark.parametrize(
    "family", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
def test_experts_are_4_bit_while_they_are_read_as_they_are_afterwards_and_train(family: str, tmp_path: Path) -> None:
    import transformers

    model = saved(family, tmp_path)
    base = load(model)
    unquantized = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    stacks, weights = fused_shapes(unquantized), dict(unquantized.named_parameters())
    assert stacks
    assert not fused_shapes(base)
    matrices = {
        name: weight.numel()
        for name, weight in weights.items()
        if name.endswith(".weight") and type(unquantized.get_submodule(name.removesuffix(".weight"))) is torch.nn.Linear
    }
    matrices.pop("lm_head.weight", None)  # or it is the embedding
    expected = sum(shape.numel() for shape in stacks.values()) + sum(matrices.values())
    assert weight_counts(base)["4-bit"] == expected
    assert expected > 0.75 * sum(weight.numel() for weight in weights.values())
    quantize_in_place(unquantized, QuantizationConfig(), torch.float32, [], torch.device("cpu"))
    before = logits(base)
    assert torch.equal(before, logits(unquantized))

    adapted = adapters.attach(base, LoraConfig(r=2), auto_class="causal_lm", seed=0, name=str(tmp_path)).train()
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1.0)
    LanguageModeling().losses(adapted, batch()).nll.sum().backward()
    assert all(parameter.grad is not None for parameter in trained)
    optimizer.step()
    assert not torch.equal(logits(adapted.eval()), before)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_check_foretells_the_bytes_of_a_mixture_from_files(family: str, tmp_path: Path) -> None:
    from llmft.model.load import model_config
    from llmft.model.memory import StepMemory
    from tests.conftest import compose

    model = saved(family, tmp_path)
    config = compose("model=tiny", "data=alpaca", "data.files=none", "logger=none")
    config.model = model
    memory = StepMemory(config, model_config(model, locate(model)), torch.float32, "cpu")
    assert memory.base == pytest.approx(held_bytes(load(model)), rel=0.01)


def change(directory: Path, what: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    for path in directory.glob("*.safetensors"):
        save_file(what(load_file(path)), path, metadata={"format": "pt"})


LAYER = "layers.1.block_sparse_moe.experts"
EXPERT = f"{LAYER}.2.w1.weight"


@pytest.mark.parametrize(
    "damage",
    [
        lambda weights: {key: value for key, value in weights.items() if EXPERT not in key},
        lambda weights: {
            key: value for key, value in weights.items() if "layers.1.block_sparse_moe.experts" not in key
        },
        lambda weights: {k: v[:64].contiguous() if "layers.1" in k and ".w1." in k else v for k, v in weights.items()},
    ],
    ids=["one expert", "all of a layer", "another shape"],
)
def test_experts_that_are_missing_or_of_another_shape_are_refused(damage: Any, tmp_path: Path) -> None:
    model = saved("mixtral", tmp_path)
    change(tmp_path, damage)
    with pytest.raises(ConfigError) as error:
        load(model)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("form", ["nf4", "fp4"])
def test_quantising_in_pieces_is_bitsandbytes_to_the_bit(form: str, double: bool) -> None:
    from bitsandbytes import functional

    weight = torch.randn(3, 1024, 512, generator=torch.Generator().manual_seed(0))
    assert weight.numel() > PIECE_WEIGHTS
    packed, state = quantize_4bit(weight, form, double)
    expected, other = functional.quantize_4bit(weight, quant_type=form, compress_statistics=double)
    assert torch.equal(packed, expected)
    mine, theirs = state.as_dict(packed=True), other.as_dict(packed=True)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    assert torch.equal(functional.dequantize_4bit(packed, state), functional.dequantize_4bit(expected, other))


def test_convolutions_are_no_experts() -> None:
    assert not fused_shapes(torch.nn.Conv1d(128, 128, 4))


PEAK = """
import json, sys, threading, time
import torch, bitsandbytes, transformers.models.mixtral.modeling_mixtral
from tests.model.test_experts import ModelConfig, load

def anonymous():  # what the system cannot read again from files
    lines = open("/proc/self/status").read().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

def watch():
    while True:
        peaks[0] = max(peaks[0], anonymous())
        time.sleep(0.002)

load(ModelConfig(name="m", id="x/m", architecture="mixtral", path=sys.argv[2]))
before, peaks = anonymous(), [0]
threading.Thread(target=watch, daemon=True).start()
base = load(ModelConfig(name="m", id="x/m", architecture="mixtral", path=sys.argv[1]))
print(json.dumps([peaks[0] - before, sum(parameter.nbytes for parameter in base.parameters())]))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux alone tells memory of its own and of files")
@pytest.mark.slow
def test_loading_takes_the_4_bit_size_and_a_few_of_the_largest_stacks(tmp_path: Path) -> None:
    import transformers

    small = saved("mixtral", tmp_path / "small")
    shape = {"hidden_size": 512, "intermediate_size": 1792, "num_hidden_layers": 8, "num_local_experts": 8}
    config = transformers.MixtralConfig(**{**SHAPE, **shape, "num_attention_heads": 8, "head_dim": 64})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "large", max_shard_size="60MB")
    del model
    result = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path / "large"), str(small.path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    added, resident = json.loads(result.stdout.splitlines()[-1])
    largest = 8 * 2 * 1792 * 512 * 4  # one layer's gate and up projections in fp32
    assert added < resident + 4 * largest
    assert added < 8 * largest  # the whole model in fp32 is 12 of them
