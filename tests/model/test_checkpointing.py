"""Saving less for the backward changes memory and no number."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llmft.config.trainer import Checkpointing
from llmft.core.errors import ConfigError
from llmft.model.checkpointing import LEAST_OFFLOADED, Offloaded, set_checkpointing
from tests.model.test_memory import LiveBytes, Training, resident, training

LEVELS = (Checkpointing.none, Checkpointing.full)
FRESH = ["lora.dropout=0.1"]


def prepared(*overrides: str, **options: Any) -> Training:
    run = training("mistral", *overrides, rows=2, tokens=128, **options)
    for name, parameter in run.model.named_parameters():
        if "lora_B" in name:  # zeros would hide what does not reach the loss
            torch.nn.init.normal_(parameter, std=0.02, generator=torch.Generator().manual_seed(len(name)))
    return run


def at(run: Training, level: Checkpointing) -> Training:
    base = run.model.get_base_model() if hasattr(run.model, "get_base_model") else run.model
    set_checkpointing(base, level)
    return run


def step(run: Training) -> list[torch.Tensor]:
    """Loss and gradients of one step."""
    torch.manual_seed(7)
    run.model.zero_grad(set_to_none=True)
    loss = run.losses()
    loss.backward()
    return [loss.detach(), *(p.grad for p in run.model.parameters() if p.grad is not None)]


@pytest.mark.parametrize(
    ("overrides", "options"),
    [
        (["quantization=none", *FRESH], {}),
        pytest.param(["quantization=nf4", *FRESH], {}, marks=pytest.mark.slow),
        (["quantization=nf4", *FRESH], {"dtype": torch.bfloat16}),
        (["quantization=none", "lora.dora=true", *FRESH], {}),
        pytest.param(["quantization=none", "lora.r=256", *FRESH], {}, marks=pytest.mark.slow),
        pytest.param(["quantization=none", "lora=none"], {}, marks=pytest.mark.slow),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else str(value.get("dtype", "")),
)
def test_loss_and_gradients_are_the_same_to_the_bit_whatever_is_kept(
    overrides: list[str], options: dict[str, Any]
) -> None:
    run = prepared(*overrides, **options)
    expected = step(at(run, Checkpointing.none))
    assert len(expected) > 8
    recomputed = step(at(run, Checkpointing.full))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(recomputed, expected, strict=True))


def test_dropout_is_at_work_in_the_comparison_above() -> None:
    run = at(prepared("quantization=none", *FRESH), Checkpointing.full)
    first = step(run)
    torch.manual_seed(8)
    assert not torch.equal(run.losses(), first[0])


@pytest.mark.parametrize("quantization", ["none", pytest.param("nf4", marks=pytest.mark.slow)])
def test_each_level_keeps_less_than_the_one_before(quantization: str) -> None:
    run = prepared(f"quantization={quantization}")
    peaks, after_forward = [], []
    for level in LEVELS:
        at(run, level)
        with LiveBytes(resident(run.model)) as bytes_:
            loss = run.losses()
            after_forward.append(bytes_.live)
            loss.backward()
        peaks.append(bytes_.peak)
        run.model.zero_grad(set_to_none=True)
    assert peaks[0] > peaks[1]
    assert after_forward[0] > after_forward[1]


def test_offloaded_activations_give_the_same_numbers_and_leave_weights_where_they_are() -> None:
    run = at(prepared("quantization=none", *FRESH), Checkpointing.none)
    expected = step(run)
    offloaded = Offloaded(run.model)
    moved: list[torch.Tensor] = []
    storages: set[int] = set()
    pack = offloaded.pack_hook

    def noted(tensor: torch.Tensor) -> Any:
        packed = pack(tensor)
        if packed[1] is not tensor:
            moved.append(tensor)
            storages.add(packed[1].data_ptr())
        return packed

    offloaded.pack_hook = noted
    torch.manual_seed(7)
    run.model.zero_grad(set_to_none=True)
    with offloaded:
        loss = run.losses()
    loss.backward()
    results = [loss.detach(), *(p.grad for p in run.model.parameters() if p.grad is not None)]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(results, expected, strict=True))
    weights = {p.untyped_storage().data_ptr() for p in run.model.parameters()}
    assert 0 < len(storages) < len(moved), "the projections of one input keep it once"
    assert all(t.nbytes >= LEAST_OFFLOADED and t.untyped_storage().data_ptr() not in weights for t in moved)


def test_a_model_that_cannot_compute_its_layers_again_is_named() -> None:
    class Base:
        supports_gradient_checkpointing = False

    with pytest.raises(ConfigError, match="gradient_checkpointing=full: Base cannot"):
        set_checkpointing(Base(), Checkpointing.full)
