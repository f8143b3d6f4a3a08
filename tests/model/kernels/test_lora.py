"""The LoRA kernel has the outputs and gradients of PEFT's own layer, with and without dropout."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llmft.config.model import LoraConfig
from llmft.model import adapters
from llmft.model.kernels import lora
from tests.model.kernels.test_packing import base


def loss_and_gradients(model: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
    ids = torch.randint(5, 512, (2, 17), generator=torch.Generator().manual_seed(0))
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    return loss.detach(), gradients


@pytest.mark.parametrize("form", ["none", "nf4"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma3_text"])
def test_loss_and_gradients_are_those_of_pefts_own_layers(architecture: str, form: str) -> None:
    model = adapters.attach(base(architecture, form), LoraConfig(r=4), auto_class="causal_lm", seed=0, name="x").train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02, generator=torch.Generator().manual_seed(len(name)))
    loss, gradients = loss_and_gradients(model)
    assert lora.uninstall(model), "the kernel was there"
    expected_loss, expected = loss_and_gradients(model)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=0)
    for gradient, reference in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_gradients_are_the_functions_own_slopes(dropout: float, bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    layer = torch.nn.Linear(5, 3, bias=bias).double().requires_grad_(False)
    x, a, b = (torch.randn(size, dtype=torch.float64, generator=generator) for size in ((4, 5), (2, 5), (3, 2)))

    def kernel(*inputs: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(1)
        x, a, b = inputs
        return lora.lora_linear(x, layer, a, b, 0.7, dropout)

    assert torch.autograd.gradcheck(kernel, [t.requires_grad_() for t in (x, a, b)])


def test_dropout_leaves_the_mean_and_drops_the_adapters_input_alone() -> None:
    layer = torch.nn.Linear(64, 8).requires_grad_(False)
    x, a, b = torch.randn(1, 64), torch.randn(4, 64) / 8, torch.randn(8, 4)
    undropped = lora.lora_linear(x, layer, a, b, 1.0)
    torch.manual_seed(0)
    rows = lora.lora_linear(x.expand(20_000, -1), layer, a, b, 1.0, 0.25)
    assert rows.std(0).min() > 0
    torch.testing.assert_close(rows.mean(0), undropped[0], rtol=0, atol=0.1)
    assert torch.equal(lora.lora_linear(x, layer, a, torch.zeros_like(b), 1.0, 0.25), layer(x))
