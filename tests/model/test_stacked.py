"""Adapters on one base in one forward compute, to the bit, what each computes alone on the CPU in fp32."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from llmft.config import Checkpointing, LoraConfig
from llmft.model import adapters, stacked
from llmft.model.checkpointing import set_checkpointing
from llmft.model.kernels import lora as lora_kernel
from llmft.model.kernels import packing
from tests.model.kernels.test_packing import CAUSAL, base
from tests.model.test_twins import FILES, FIRST

LORAS = (
    LoraConfig(r=4, dropout=0.2),
    LoraConfig(r=8, alpha=4.0),
    LoraConfig(r=1, targets=["q_proj", "v_proj"]),
    LoraConfig(r=4, rslora=True, dropout=0.1),
)
LENGTHS = ([40, 39, 17], [61], [5, 4, 3, 2, 1], [23, 22])


class Random:
    """Random numbers of one lane."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.state = torch.get_rng_state()

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        torch.set_rng_state(self.state)
        yield
        self.state = torch.get_rng_state()


def lanes(model: Any, loras: tuple[LoraConfig, ...]) -> list[Any]:
    made = []
    for number, lora in enumerate(loras):
        own = adapters.attach(stacked.share(model), lora, auto_class="causal_lm", seed=number, name="twin").train()
        with torch.no_grad():
            for name, parameter in own.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.02, generator=torch.Generator().manual_seed(number))
        made.append(own)
    return made


def rows(number: int) -> packing.PackedBatch:
    lengths = LENGTHS[number]
    ids = torch.randint(5, 512, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(number))
    return packing.pack(ids, lengths)


def gradients(model: Any) -> list[torch.Tensor]:
    found = [p.grad for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    return found


def loss_of(state: torch.Tensor) -> torch.Tensor:
    return (state[0, ::3] ** 2).mean()


def alone(model: Any, number: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    torch.manual_seed(number)
    loss = loss_of(stacked.body_of(model)(**rows(number).arguments).last_hidden_state)
    loss.backward()
    return loss.detach(), gradients(model)


def together(model: Any, own: list[Any]) -> list[tuple[torch.Tensor, list[torch.Tensor]]]:
    parts = [
        stacked.Part(rows(number).arguments, lora_kernel.lora_layers(stacked.body_of(lane)), Random(number))
        for number, lane in enumerate(own)
    ]
    losses = [loss_of(output.last_hidden_state) for output in stacked.Joint(model).forward(parts)]
    torch.autograd.backward(losses)
    return [(loss.detach(), gradients(lane)) for loss, lane in zip(losses, own, strict=True)]


def check_equal(model: Any, loras: tuple[LoraConfig, ...]) -> None:
    own = lanes(model, loras)
    for lane in own:
        assert stacked.why_alone(lane) is None
    expected = [alone(lane, number) for number, lane in enumerate(own)]
    for number, (loss, found) in enumerate(together(model, own)):
        assert torch.equal(loss, expected[number][0]), number
        assert all(torch.equal(a, b) for a, b in zip(found, expected[number][1], strict=True)), number


STACKABLE = [a for a in CAUSAL if a not in ("mixtral", "falcon", "mpt", "gemma2")]
NO_DROPOUT = {
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "opt": {"dropout": 0.0},
    "phi": {"resid_pdrop": 0.0, "embd_pdrop": 0.0},
}


@pytest.mark.parametrize("form", ["none", "nf4"])
@pytest.mark.parametrize("architecture", STACKABLE)
def test_every_familys_lanes_equal_themselves_alone(architecture: str, form: str) -> None:
    model = base(architecture, form, **NO_DROPOUT.get(architecture, {}))
    named = "q_proj" in {name.rpartition(".")[2] for name, _ in model.named_modules()}
    check_equal(model, LORAS if named else tuple(lora for lora in LORAS if isinstance(lora.targets, str)))


@pytest.mark.parametrize("threads", [1, 2])
def test_widths_that_no_vector_fits_and_other_threads_make_no_difference(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check_equal(base("llama", intermediate_size=172, hidden_size=72, head_dim=18), LORAS)
    finally:
        torch.set_num_threads(before)


def test_8_bit_and_dora_lanes_are_stacked_by_their_own_forwards() -> None:
    check_equal(base("llama", "int8"), (LoraConfig(r=4), LoraConfig(r=8)))
    check_equal(base("llama"), (LoraConfig(r=4, dora=True), LoraConfig(r=8)))


def test_a_change_in_one_lane_changes_no_other() -> None:
    # The control: lanes that differ do differ, and only where they should.
    model = base("llama")
    first = together(model, lanes(model, LORAS))
    changed = together(model, lanes(model, (LoraConfig(r=4, dropout=0.3), *LORAS[1:])))
    assert not torch.equal(first[0][0], changed[0][0])
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first[1:], changed[1:], strict=True))


def test_what_computes_tokens_together_stays_alone() -> None:
    for architecture, why in (("mixtral", "experts"), ("gpt2", "dropout"), ("falcon", "padding")):
        lora = LoraConfig(r=4)
        assert FILES[FIRST[architecture]]
        own = adapters.attach(base(architecture), lora, auto_class="causal_lm", seed=0, name="twin")
        assert why in str(stacked.why_alone(own))


def test_a_shared_structure_leaves_the_base_untouched() -> None:
    model = base("llama", "nf4")
    before = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    own = lanes(model, LORAS)
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == before
    assert not lora_kernel.lora_layers(model)
    weights = {p.data_ptr() for p in own[0].parameters() if not p.requires_grad}
    assert weights == set(before.values())


def test_a_joint_body_keeps_all_for_its_backward_however_the_base_was_trained_before() -> None:
    model = base("llama")
    set_checkpointing(model, Checkpointing.full)
    joint = stacked.Joint(model)
    assert model.is_gradient_checkpointing
    assert not joint.body.is_gradient_checkpointing
