"""The last layer at the ends of rows gives what the whole last layer gives there, in every family."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llmft.config import LoraConfig
from llmft.data.batch import MicroBatch
from llmft.model import adapters, flat, tail
from llmft.model.families import layers_of
from llmft.training.objectives import language_modeling
from llmft.training.objectives.language_modeling import LanguageModeling
from tests.model.test_flat import CAUSAL, FIRSTS, LENGTHS, base, check_as_each_alone, everywhere, reference_varlen, rows

WHOLE = ("falcon", "mpt", "gemma2")
"""Families whose rows stay padded."""


def at_the_ends(ids: torch.Tensor) -> torch.Tensor:
    """Every second place from the first label on, and none in one row."""
    places = torch.arange(ids.shape[1])
    first = torch.tensor(FIRSTS)[:, None]
    keep = everywhere(ids) & (places >= first) & ((places - first) % 2 == 0)
    keep[5] = False
    return keep


def watch_last_layer(model: Any) -> list[int]:
    """How many tokens the last layer is computed at, call by call."""
    seen: list[int] = []

    def note(layer: Any, args: Any, kwargs: Any) -> None:
        seen.append((args[0] if args else kwargs["hidden_states"]).shape[:-1].numel())

    layers_of(model)[-1].register_forward_pre_hook(note, with_kwargs=True)
    return seen


@pytest.mark.parametrize("architecture", CAUSAL)
def test_logits_at_the_ends_are_those_of_each_row_alone(architecture: str) -> None:
    model, ids = base(architecture), rows()
    keep = at_the_ends(ids)
    firsts = [*FIRSTS[:5], LENGTHS[5] - 1, *FIRSTS[6:]]  # a row without any has its last place computed
    computed = sum(length - first for length, first in zip(LENGTHS, firsts, strict=True))
    assert tail.takes_ends(model) == (architecture not in WHOLE)
    seen = watch_last_layer(model)
    check_as_each_alone(model, ids, keep)
    assert seen[0] == (len(LENGTHS) * max(LENGTHS) if architecture in WHOLE else computed)
    assert len(seen) == 1 + len(LENGTHS)


@pytest.mark.parametrize("window", [None, 16])
@pytest.mark.parametrize("varlen", [False, True])
def test_a_window_and_the_variable_length_kernel_hold_at_the_ends_too(
    window: int | None, varlen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = pytest.importorskip("torch.nn.attention.varlen", reason="torch has it from 2.10 on")

    monkeypatch.setattr(kernels, "varlen_attn", reference_varlen)
    monkeypatch.setattr(language_modeling, "takes_varlen", lambda model: varlen)
    model, ids = base("mistral", sliding_window=window), rows()
    check_as_each_alone(model, ids, at_the_ends(ids))


def test_a_kernel_that_takes_queries_for_the_beginning_of_a_row_gets_whole_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kernels = pytest.importorskip("torch.nn.attention.varlen", reason="torch has it from 2.10 on")

    def from_the_beginning(
        query: Any, key: Any, value: Any, of_queries: Any, of_keys: Any, *more: Any, **how: Any
    ) -> Any:
        shorter = torch.cat([torch.arange(s, s + n) for s, n in zip(of_keys, of_queries.diff(), strict=False)])
        return reference_varlen(query, key[shorter], value[shorter], of_queries, of_queries, *more, **how)

    ids = rows()
    ends = {"firsts": [n - 1 for n in LENGTHS], "varlen": True}
    for kernel, understood in ((from_the_beginning, False), (reference_varlen, True)):
        flat._last_query_sees_all.cache_clear()
        monkeypatch.setattr(kernels, "varlen_attn", kernel)
        assert (flat.flatten(ids, LENGTHS, **ends).blocks.tail is not None) == understood  # type: ignore[arg-type]
    flat._last_query_sees_all.cache_clear()


def batch() -> MicroBatch:
    ids = rows()
    # Labels are shifted by one: the outputs are read at the ends.
    labels = torch.where(torch.nn.functional.pad(at_the_ends(ids), (1, 0))[:, :-1] & everywhere(ids), ids, -100)
    return MicroBatch(ids, everywhere(ids).long(), labels, torch.ones(len(ids)), None, list(range(len(ids))))


@pytest.mark.parametrize("form", ["none", "nf4"])
@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "gpt2", "mixtral"])
def test_losses_and_gradients_are_those_of_the_whole_layer(
    architecture: str, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    dry = {"gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}}.get(architecture, {})
    model = adapters.attach(
        base(architecture, form, **dry), LoraConfig(r=4), auto_class="causal_lm", seed=0, name="twin"
    ).train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02, generator=torch.Generator().manual_seed(len(name)))

    def run() -> tuple[torch.Tensor, list[torch.Tensor]]:
        losses = LanguageModeling().losses(model, batch()).nll
        losses.sum().backward()
        found = [p.grad for p in model.parameters() if p.grad is not None]
        model.zero_grad()
        return losses.detach(), found

    losses, found = run()
    monkeypatch.setattr(language_modeling, "takes_ends", lambda model: False)
    whole, expected = run()
    assert torch.allclose(losses, whole, rtol=1e-5)
    assert len(found) == len(expected)
    assert all((a - b).norm() <= 1e-5 * b.norm() for a, b in zip(found, expected, strict=True))


def test_rows_that_are_all_label_are_computed_at_once() -> None:
    ids = rows()
    assert flat.flatten(ids, LENGTHS, firsts=[0] * len(LENGTHS)).blocks.tail is None
    assert flat.flatten(ids, LENGTHS, firsts=[n - 1 for n in LENGTHS]).blocks.tail is not None
