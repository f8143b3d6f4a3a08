"""RMSNorm and SwiGLU in less memory equal transformers' bit for bit forward, and have its gradients."""

from __future__ import annotations

import importlib
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoConfig
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from llmft.config.model import Kernels, LoraConfig
from llmft.data.hub import Located
from llmft.model import adapters
from llmft.model.kernels import lora as lora_kernel
from llmft.model.kernels import packing, rmsnorm_swiglu
from llmft.model.kernels.packing import uses_packing
from llmft.model.logits import _nll
from llmft.training.objectives.language_modeling import LanguageModeling
from tests.model.kernels.test_packing import micro_batch
from tests.model.test_memory import FIRST
from tests.model.test_twins import FILES, load, twin

NORMS = {"llama": True, "mistral": True, "qwen3": True, "gemma3": False, "olmo2": False, "cohere": False}
NETWORKS = {"llama": True, "mistral": True, "gemma": True, "qwen2": True, "phi3": False, "beam": False}
"""Gemma's network has the common form with another activation, checked in each forward; Beam's computes in fp32."""


def rows(model: Any) -> packing.PackedBatch:
    lengths = [61]
    ids = torch.randint(5, 512, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(1))
    return packing.pack(model, ids, lengths)


def class_of(family: str, suffix: str) -> Any:
    """A new class with the family's own forward."""
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    original = next(
        kind for name, kind in vars(module).items() if name.endswith(suffix) and kind.__module__ == module.__name__
    )
    return type("Own", (original,), {"forward": getattr(original.forward, "__wrapped__", original.forward)})


def norm_of(family: str) -> Any:
    norm = class_of(family, "LayerNorm" if family == "cohere" else "RMSNorm")(16, eps=1e-5)
    torch.nn.init.normal_(norm.weight, generator=torch.Generator().manual_seed(0))
    return norm.requires_grad_(False)


def network_of(family: str, function: str = "silu") -> Any:
    config = AutoConfig.for_model(
        family, hidden_size=32, intermediate_size=24, hidden_act=function, num_attention_heads=4, num_key_value_heads=4
    )
    return class_of(family, "MLP")(config)


def is_replaced(module: torch.nn.Module) -> bool:
    return "forward" in vars(module)


def test_only_the_common_forwards_are_replaced_and_only_once() -> None:
    for family, expected in NORMS.items():
        norm = norm_of(family)
        rmsnorm_swiglu.install(norm)
        assert is_replaced(norm) == expected, family
        assert type(norm).forward is class_of(family, type(norm).__bases__[0].__name__).forward
    for family, expected in NETWORKS.items():
        network = network_of(family)
        rmsnorm_swiglu.install(network)
        assert is_replaced(network) == expected, family


def run(module: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = x.detach().clone().requires_grad_()
    output = module(leaf)
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(3))
    (output.float() * weight).sum().backward()
    assert leaf.grad is not None
    return output.detach(), leaf.grad


def compared(module: Any, x: torch.Tensor) -> None:
    theirs = run(module, x)
    rmsnorm_swiglu.install(module)
    assert is_replaced(module)
    ours = run(module, x)
    assert torch.equal(ours[0], theirs[0]), "forward"
    assert ours[1].dtype is theirs[1].dtype
    eps = 16 * torch.finfo(x.dtype).eps
    assert torch.allclose(ours[1], theirs[1], eps, eps)


@pytest.mark.parametrize(
    ("dtype", "weights"), [(torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.bfloat16, torch.float32)]
)
def test_a_norm_and_its_gradient_are_transformers_own(dtype: torch.dtype, weights: torch.dtype) -> None:
    x = 3 * torch.randn(2, 37, 16, generator=torch.Generator().manual_seed(1))
    compared(norm_of("llama").to(weights), x.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("function", ["silu", "gelu_pytorch_tanh"])
def test_a_network_and_its_gradients_are_transformers_own(function: str, dtype: torch.dtype) -> None:
    x = torch.randn(1, 37, 32, generator=torch.Generator().manual_seed(1))
    compared(network_of("llama", function).to(dtype), x.to(dtype))


def test_the_weight_of_a_norm_that_is_trained_has_a_gradient() -> None:
    norm = norm_of("llama")
    rmsnorm_swiglu.install(norm)
    run(norm.requires_grad_(True), torch.randn(3, 16))
    assert norm.weight.grad is not None


def saved(model: Any) -> list[torch.Tensor]:
    """The tensors that a training forward of `model` saves, each storage once."""
    storages: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storages.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        state = model(**rows(model).arguments).logits
    state.sum().backward()
    return list(storages.values())


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_of_a_layers_network_its_two_products_are_kept_and_what_is_made_of_them_is_made_again(dropout: float) -> None:
    name = FIRST["llama"]
    model_config = twin(name, num_hidden_layers=3, intermediate_size=72)
    gradients = []
    for again in (True, False):
        base = load(model_config, Located(None, "random"), FILES[name])
        model = adapters.attach(base, LoraConfig(r=4, dropout=dropout), auto_class="causal_lm", seed=0, name="")
        model.train()
        torch.manual_seed(5)
        with pytest.MonkeyPatch.context() as patch:
            if not again:
                patch.setattr(rmsnorm_swiglu, "Recipe", lambda *args: None)
            tokens = rows(model).input_ids.numel()
            wide = [tensor for tensor in saved(model) if tensor.shape[-1] == 72 and tensor.numel() == 72 * tokens]
        masks = 3 if dropout else 0
        assert len([tensor for tensor in wide if tensor.dtype is torch.float32]) == (2 if again else 3) * 3
        assert len([tensor for tensor in wide if tensor.dtype is torch.bool]) == masks
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
        assert uses_packing(base)
        lora_kernel.uninstall(model)
    for ours, theirs in zip(*gradients, strict=True):
        assert torch.equal(ours, theirs)


def test_losses_at_labels_and_their_gradients_are_torchs_own() -> None:
    draw = torch.Generator().manual_seed(2)
    logits, weights = 9 * torch.randn(7, 501, generator=draw), torch.rand(7, generator=draw)
    targets = torch.randint(501, (7,), generator=draw)
    results = []
    for function in (_nll, lambda x, y: cross_entropy(x, y, reduction="none")):
        leaf = logits.clone().requires_grad_()
        losses = function(leaf, targets)
        (losses * weights).sum().backward()
        assert torch.equal(leaf.detach(), logits)
        results.append((losses.detach(), leaf.grad))
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-6, atol=1e-9)


def test_a_second_backward_of_a_loss_is_refused() -> None:
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
        losses = _nll(torch.randn(2, 9, requires_grad=True), torch.tensor([3, 4])).sum()
    losses.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward"):
        losses.backward()


def test_a_forward_that_fails_or_takes_more_is_left_to_itself() -> None:
    original = type(norm_of("llama")).forward

    def fails(self: Any, h: torch.Tensor) -> torch.Tensor:
        raise AssertionError("three dimensions, please")

    def plus(self: Any, h: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        return original(self, h if residual is None else h + residual)

    strict, more = (
        type("Own", (class_of("llama", "RMSNorm"),), {"forward": forward})(16).requires_grad_(False)
        for forward in (fails, plus)
    )
    for module in (strict, more):
        rmsnorm_swiglu.install(module)
    assert not is_replaced(strict)
    x = torch.randn(3, 16, requires_grad=True)
    assert is_replaced(more)
    assert torch.equal(more(x, x), original(more, 2 * x))
    assert torch.equal(more(h=x), original(more, x))


def test_only_the_models_own_modules_are_changed_and_none_of_them_without_kernels() -> None:
    name = FIRST["llama"]
    before = LlamaMLP.forward, LlamaRMSNorm.forward
    for kernels in Kernels:
        model = replace(twin(name, num_hidden_layers=1), kernels=kernels)
        base = load(model, Located(None, "random"), FILES[name])
        adapted = adapters.attach(base, LoraConfig(r=2), auto_class="causal_lm", seed=0, name="", kernels=kernels)
        replaced = [n for n, module in adapted.named_modules() if "forward" in vars(module)]
        assert (len(replaced) > 8) == uses_packing(base) == (kernels is Kernels.auto)
        assert bool(replaced) == (kernels is Kernels.auto)
    assert before == (LlamaMLP.forward, LlamaRMSNorm.forward)


def test_rows_are_computed_the_same_without_kernels() -> None:
    name = FIRST["llama"]
    losses = []
    for kernels in Kernels:
        base = load(replace(twin(name), kernels=kernels), Located(None, "random"), FILES[name])
        model = adapters.attach(base, LoraConfig(r=2), auto_class="causal_lm", seed=0, name="", kernels=kernels)
        losses.append(LanguageModeling().losses(model.train(), micro_batch()).nll)
        adapters.detach(model)
    assert torch.allclose(*losses, rtol=1e-5)


@pytest.mark.slow
def test_one_compiled_kernel_has_the_numbers_of_single_operations() -> None:
    rmsnorm_swiglu.can_fuse.cache_clear()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="RMSNorm and SwiGLU are computed step by step")
        assert rmsnorm_swiglu.can_fuse(torch.device("cpu")), "on a CPU it is only tried"


def test_where_nothing_compiles_it_is_told_and_operations_stay_single(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(function: Any) -> Any:
        raise RuntimeError("no compiler here\nand more")

    monkeypatch.setattr(rmsnorm_swiglu, "compiled", broken)
    rmsnorm_swiglu.can_fuse.cache_clear()
    with pytest.warns(UserWarning, match=r"step by step: no kernel could be compiled \(no compiler here\)"):
        assert not rmsnorm_swiglu.can_fuse(torch.device("cpu"))
    rmsnorm_swiglu.can_fuse.cache_clear()
