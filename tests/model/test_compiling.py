"""Compiled layers: one graph for all, any number of tokens, the same losses; and a way back where it fails."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch._dynamo.testing import CompileCounter

from llmft.config import LoraConfig
from llmft.model import adapters, fused
from llmft.model.compiling import compile_layers, release_layers
from llmft.model.families import layers_of
from tests.model.test_flat import base


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
    assert compile_layers(model, warned.append, backend=counter) == 3  # type: ignore[arg-type]
    found = [loss(model, tokens) for tokens in (16, 24, 40)]
    found[0].backward()
    assert not warned
    # The last layer computes what is read of it, and begins twice.
    # The first layer's input takes no gradient, the others' do.
    assert counter.frame_count == 2, "all layers and lengths share their compilations"
    assert torch.allclose(torch.stack(found), torch.stack(expected), rtol=1e-5)
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
    release_layers(model)
    assert loss(model, 16).isfinite()
    assert counter.frame_count == 2


def test_what_cannot_be_compiled_is_computed_all_the_same_and_said_once() -> None:
    torch._dynamo.reset()
    model = adapters.attach(base("llama"), LoraConfig(r=4), auto_class="causal_lm", seed=0, name="twin").train()
    expected = loss(model, 16)
    warned: list[str] = []

    def broken(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no compiler here")

    compile_layers(model, warned.append, backend=broken)  # type: ignore[arg-type]
    assert torch.allclose(loss(model, 16), expected, rtol=1e-6)
    assert len(warned) == 1
    assert "trainer.compile" in warned[0]
    assert all(layer._compiled_call_impl is None for layer in layers_of(model))
    assert all("forward" in layer.__dict__ for layer in fused.lora_layers(model).values())


def test_layers_that_are_compiled_too_often_are_computed_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_often(*args: Any, **kwargs: Any) -> Any:
        raise FailOnRecompileLimitHit("Hard failure due to fullgraph=True")

    monkeypatch.setattr(torch, "compile", lambda *_, **__: too_often)
    model = adapters.attach(base("llama"), LoraConfig(r=4), auto_class="causal_lm", seed=0, name="twin").train()
    expected = loss(model, 16)
    warned: list[str] = []
    compile_layers(model, warned.append)
    assert torch.allclose(loss(model, 16), expected, rtol=1e-6)
    assert len(warned) == 1
