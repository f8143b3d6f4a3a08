"""The estimated peak of a training step against that of real twins of every architecture."""

from __future__ import annotations

import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llmft.config.instantiate import optimizer_factory
from llmft.config.sections import TrainConfig
from llmft.config.trainer import Checkpointing
from llmft.core.files import format_bytes
from llmft.data.batch import MicroBatch
from llmft.data.hub import Located
from llmft.model import adapters
from llmft.model.load import load_base, model_config
from llmft.model.memory import MemoryEstimate, StepMemory, device_memory
from llmft.training.objectives.classification import Classification
from llmft.training.objectives.language_modeling import LanguageModeling
from tests.conftest import compose
from tests.model.test_twins import FILES, FIRST, classifies, twin
from tests.model.twins import TWINS, VOCAB_SIZE

WIDER: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 256, "n_layer": 4},
    "mpt": {"d_model": 256, "n_layers": 4},
    "opt": {"hidden_size": 256, "word_embed_proj_dim": 256, "ffn_dim": 704, "num_hidden_layers": 4},
    "falcon": {"hidden_size": 256, "ffn_hidden_size": 704, "num_hidden_layers": 4},
    "phi": {"num_attention_heads": 8, "num_key_value_heads": 4},
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention"] * 2},
    "deberta-v2": {"pooler_hidden_size": 256},
}
_WIDTHS = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "head_dim": 64}
CORE = ("mistral", "gpt2")
"""Families tested in every run; the others are marked slow."""


class Training(SimpleNamespace):
    """A twin with 256 hidden units and 4 layers, ready to train, and its estimated memory."""

    config: TrainConfig
    memory: StepMemory
    base_bytes: int
    model: Any
    batch: MicroBatch
    dtype: torch.dtype

    def losses(self) -> torch.Tensor:
        objective = LanguageModeling() if self.batch.targets is None else Classification()
        with torch.autocast("cpu", self.dtype, enabled=self.dtype != torch.float32):
            return objective.losses(self.model, self.batch).nll.sum()

    def estimate(self, level: Checkpointing | None = None) -> MemoryEstimate:
        """Losses of the batch."""
        rows, longest = self.batch.input_ids.shape
        level = level or Checkpointing(self.config.trainer.gradient_checkpointing)
        return self.memory.at(rows * longest, longest, rows * longest // 4, level)


def core_first(architectures: list[str], *more: str) -> list[Any]:
    """Test parameters, those outside CORE marked slow."""
    return [pytest.param(name, *more, marks=() if name in CORE else pytest.mark.slow) for name in architectures]


def training(
    architecture: str,
    *overrides: str,
    rows: int = 2,
    tokens: int = 64,
    dtype: torch.dtype = torch.float32,
    checkpointing: bool = False,
) -> Training:
    name = FIRST[architecture]
    file = FILES[name]
    widths = {key: value for key, value in _WIDTHS.items() if key in TWINS[architecture]}
    config = compose("model=tiny", "data=alpaca", "data.files=none", "logger=none", *overrides)
    kernels = config.model.kernels
    config.model = twin(name, **{**widths, **WIDER.get(architecture, {})})
    config.task.auto_class = "sequence_classification" if classifies(file) else "causal_lm"
    config.model.kernels = kernels
    config.trainer.gradient_checkpointing = Checkpointing.full if checkpointing else Checkpointing.none
    hf_config = model_config(config.model, Located(None, "random"))
    if classifies(file):
        hf_config.num_labels = 3
    memory = StepMemory(config, hf_config, dtype, "cpu")
    base = load_base(
        config.model,
        Located(None, "random"),
        config.quantization,
        auto_class=config.task.auto_class,
        num_labels=3,
        dtype=dtype if config.lora.enabled else torch.float32,
        device=torch.device("cpu"),
        seed=0,
        keep_base=False,
    )
    base.config.pad_token_id = 0
    base_bytes = held_bytes(base)
    if checkpointing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    else:
        base.gradient_checkpointing_disable()
    if config.lora.enabled:
        model = adapters.attach(
            base, config.lora, auto_class=config.task.auto_class, seed=0, name="twin", kernels=kernels
        )
    else:
        model = base.requires_grad_(True)
    model.train()
    ids = torch.randint(5, VOCAB_SIZE, (rows, tokens), generator=torch.Generator().manual_seed(0))
    labels = torch.where(torch.arange(tokens) < tokens - tokens // 4, -100, ids)
    targets = torch.zeros(rows, dtype=torch.long) if classifies(file) else None
    batch = MicroBatch(ids, torch.ones_like(ids), labels, torch.ones(rows), targets, list(range(rows)))
    return Training(config=config, memory=memory, base_bytes=base_bytes, model=model, batch=batch, dtype=dtype)


def held_bytes(base: torch.nn.Module) -> int:
    """Bytes of all weights and their quantisation states without the shared table."""
    total = sum(parameter.nbytes for parameter in base.parameters())
    states = [getattr(parameter, "quant_state", None) for parameter in base.parameters()]
    experts = [module for module in base.modules() if type(module).__name__ == "Bnb4bitParametrization"]
    for state in [*states, *(module.quant_state for module in experts)]:
        if state is not None:
            total += state.absmax.nbytes + state.code.nbytes
            total += state.offset.nbytes + state.state2.absmax.nbytes if state.nested else 0
    scales = [getattr(parameter, "SCB", None) for parameter in base.parameters()]
    return total + sum(scale.nbytes for scale in scales if scale is not None)


def resident(model: torch.nn.Module) -> list[torch.Tensor]:
    """Tensors that exist before a step: weights and buffers."""
    return [*model.parameters(), *model.buffers()]


class LiveBytes(TorchDispatchMode):
    """Follows the bytes of all storages that operations make; `peak` is their highest sum."""

    def __init__(self, known: list[torch.Tensor]) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if not isinstance(tensor, torch.Tensor) or tensor.is_meta:
                continue
            if tensor.untyped_storage()._cdata not in self.known:
                storage = tensor.untyped_storage()
                self.known.add(storage._cdata)
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
        return result

    def _free(self, key: int, size: int) -> None:
        self.live -= size
        self.known.discard(key)


def peak_bytes(run: Training) -> int:
    """Peak bytes of a later step: weights, optimizer states, gradients, and all live tensors."""
    run.losses().backward()
    gradients = [p.grad for p in run.model.parameters() if p.grad is not None]
    with LiveBytes([*resident(run.model), *gradients]) as live:
        run.losses().backward()
    weights = held_bytes(run.model) if run.config.lora.enabled else run.memory.adapter
    return weights + sum(gradient.nbytes for gradient in gradients) + run.memory.optimizer + live.peak


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("architecture", core_first(sorted(FIRST)))
def test_the_peak_of_a_step_is_told_to_a_seventh(architecture: str, checkpointing: bool) -> None:
    run = training(architecture, rows=4, tokens=160, checkpointing=checkpointing)
    assert run.estimate().total - run.memory.libraries == pytest.approx(peak_bytes(run), rel=0.15)


@pytest.mark.parametrize(
    ("overrides", "dtype"),
    [
        (["model.kernels=none"], torch.float32),
        pytest.param(["model.kernels=none"], torch.bfloat16, marks=pytest.mark.slow),
        pytest.param([], torch.bfloat16, marks=pytest.mark.slow),
        (["quantization=none", "lora=none"], torch.float32),
        pytest.param(["quantization=none", "lora=none"], torch.bfloat16, marks=pytest.mark.slow),
        pytest.param(["quantization=int8"], torch.float32, marks=pytest.mark.slow),
        pytest.param(["lora.dora=true"], torch.float32, marks=pytest.mark.slow),
        pytest.param(["lora.dropout=0.1"], torch.float32, marks=pytest.mark.slow),
        pytest.param(["lora=attention"], torch.float32, marks=pytest.mark.slow),
    ],
)
def test_the_peak_follows_precision_kernels_and_adapter(overrides: list[str], dtype: torch.dtype) -> None:
    run = training("mistral", *overrides, rows=4, tokens=160, dtype=dtype)
    assert run.estimate().total - run.memory.libraries == pytest.approx(peak_bytes(run), rel=0.15)


@pytest.mark.parametrize(
    ("architecture", "quantization"),
    core_first(sorted(FIRST), "nf4")
    + [
        pytest.param(a, q, marks=pytest.mark.slow)
        for a in ("mistral", "gpt2", "mixtral")
        for q in ("fp4 quantization.double_quant=false", "int8", "none")
    ],
)
def test_the_base_takes_the_bytes_of_its_tensors(architecture: str, quantization: str) -> None:
    run = training(architecture, *f"quantization={quantization}".split())
    assert run.memory.base == pytest.approx(run.base_bytes, rel=0.001)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit", "paged_adamw_8bit", "sgd"])
def test_adapter_gradients_and_optimizer_are_exact(optimizer: str) -> None:
    run = training("mistral", f"optimizer={optimizer}", "lora.r=16")
    trained = [p for p in run.model.parameters() if p.requires_grad]
    step = optimizer_factory(run.config.optimizer, 1e-3)(trained)
    run.losses().backward()
    step.step()
    assert run.memory.adapter == sum(p.nbytes for p in trained)
    assert run.estimate().gradients == sum(p.grad.nbytes for p in trained if p.grad is not None)
    states = [
        value
        for state in step.state.values()
        for key, value in state.items()
        if isinstance(value, torch.Tensor) and key != "step" and not key.startswith("qmap")
    ]
    assert run.memory.optimizer == sum(value.nbytes for value in states)


def test_mistral_7b_takes_the_published_bytes() -> None:
    config = compose("model=mistral", "data=alpaca", "data.files=none", "logger=none", "lora.r=16")
    memory = StepMemory(config, model_config(config.model, Located(None, "random")), torch.bfloat16, "cuda")
    without, again = (memory.at(16 * 512, 512, 256, level) for level in (Checkpointing.none, Checkpointing.full))
    assert 3.6e9 < memory.base < 4.3e9
    assert memory.adapter == 4 * 41_943_040
    assert memory.optimizer == 2 * memory.adapter
    # 32 layers' inputs of 8 KiB a token; without checkpointing some 3.5 MB a token.
    assert again.activations / (16 * 512) == pytest.approx(32 * 8192, rel=0.1)
    assert without.activations / (16 * 512) == pytest.approx(3.5e6, rel=0.1)
    divided = memory.at(16 * 512, 512, 256, Checkpointing.full, num_shards=4).base
    assert divided == (memory.base - memory.scales) // 4 + memory.scales
    assert memory.scales < 0.04 * memory.base


def test_logits_count_at_labelled_positions_alone_and_in_chunks() -> None:
    memory = training("llama").memory
    few, many, all_at_once = (memory.at(1, 1, labels, Checkpointing.none).workspace for labels in (256, 512, 5120))
    assert many == 2 * few == 512 * VOCAB_SIZE * 8
    assert all_at_once == many


def test_bytes_are_shown_in_units_that_people_read() -> None:
    assert [format_bytes(n) for n in (0, 1023, 1536, 5 * 2**20, 3_865_470_566, 2**41)] == [
        "0 B",
        "1023 B",
        "1.5 KiB",
        "5.0 MiB",
        "3.6 GiB",
        "2048.0 GiB",
    ]


def test_the_memory_of_this_machine_is_known() -> None:
    assert 2**28 < (device_memory(torch.device("cpu")) or 0) < 2**50
    assert device_memory(torch.device("meta")) is None
