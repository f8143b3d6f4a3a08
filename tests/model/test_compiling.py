"""Compiled layers: one graph for all, any number of tokens, the same losses; and a way back where it fails."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from llmft.config.model import LoraConfig
from llmft.model import adapters
from llmft.model.compiling import compile_layers
from llmft.model.kernels import lora as lora_kernel
from tests.model.kernels.test_packing import base


def loss(model: Any, tokens: int) -> torch.Tensor:
    ids = torch.randint(5, 512, (2, tokens), generator=torch.Generator().manual_seed(tokens))
    return model(input_ids=ids, labels=ids, use_cache=False).loss


@pytest.mark.parametrize("form", ["none", "nf4"])
def test_layers_compile_without_a_break_and_once_for_all_alike_and_all_lengths(form: str) -> None:
    torch._dynamo.reset()
    model = adapters.attach(
        base("llama", form, num_hidden_layers=4), LoraConfig(r=4), auto_class="causal_lm", seed=0, name="twin"
    ).train()
    expected = [loss(model, tokens).detach() for tokens in (16, 24, 40)]
    counter = CompileCounter()
    warned: list[str] = []
    assert compile_layers(model, warned.append, backend=counter) == 4
    losses = [loss(model, tokens) for tokens in (16, 24, 40)]
    losses[0].backward()
    assert not warned
    # The first layer's input takes no gradient, the others' do.
    assert counter.frame_count <= 3, "all layers and lengths share their compilations"
    assert torch.allclose(torch.stack(losses), torch.stack(expected), rtol=1e-5)
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


def test_what_cannot_be_compiled_is_computed_all_the_same_and_said_once() -> None:
    torch._dynamo.reset()
    model = adapters.attach(base("llama"), LoraConfig(r=4), auto_class="causal_lm", seed=0, name="twin").train()
    expected = loss(model, 16)
    warned: list[str] = []

    def broken(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no compiler here")

    assert compile_layers(model, warned.append, backend=broken) == 0
    assert torch.allclose(loss(model, 16), expected, rtol=1e-6)
    assert len(warned) == 1
    assert "trainer.compile" in warned[0]
    assert all("forward" in layer.__dict__ for layer in lora_kernel.lora_layers(model).values())
