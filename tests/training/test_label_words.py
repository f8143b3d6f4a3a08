"""Scores after prompts that are read once equal those of reading every prompt with every answer."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llmft.config.model import LoraConfig
from llmft.data.batch import MicroBatch
from llmft.data.examples import IGNORE
from llmft.data.hub import Located
from llmft.model import adapters, heads
from llmft.model.kernels.packing import uses_packing
from llmft.training.objectives import verbalizer
from llmft.training.objectives.verbalizer import LabelWordScorer
from tests.model.test_twins import FILES, FIRST, classifies, load, twin

END = 2
WORDS = [
    (10, 20, END),
    (10, 21, 30, END),
    (10, 21, 31, END),
    (11, 20, END),
    (11, 22, END),
    (12, 41, END),
    (12, 40, 7, END),
]
WRITERS = sorted(name for name in FIRST if not classifies(FILES[FIRST[name]]))


def model_of(architecture: str, form: str = "none") -> Any:
    name = FIRST[architecture]
    model = load(twin(name), Located(None, "random"), FILES[name], form)
    model.config.pad_token_id = 0
    return model


def batch_of(lengths: list[int]) -> MicroBatch:
    """Prompts of `lengths` tokens, each followed by a word, padded on the right."""
    generator = torch.Generator().manual_seed(0)
    rows = [
        torch.randint(50, 500, (length,), generator=generator).tolist() + list(WORDS[index % len(WORDS)])
        for index, length in enumerate(lengths)
    ]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    labels = ids.clone()
    for index, length in enumerate(lengths):
        labels[index, :length] = IGNORE
    labels[mask == 0] = IGNORE
    return MicroBatch(ids, mask, labels, torch.ones(len(rows)), None, list(range(len(rows))))


@torch.no_grad()
def expected_scores(model: Any, batch: MicroBatch) -> torch.Tensor:
    """By a forward of each prompt with each beginning of a word, one at a time."""
    scores = torch.zeros(len(batch.input_ids), len(WORDS))
    for row, (ids, labels) in enumerate(zip(batch.input_ids, batch.labels, strict=True)):
        prompt = ids[: int((labels != IGNORE).nonzero()[0])].tolist()
        for number, word in enumerate(WORDS):
            for depth, token in enumerate(word):
                beside = sorted({other[depth] for other in WORDS if other[:depth] == word[:depth]})
                logits = model(input_ids=torch.tensor([[*prompt, *word[:depth]]])).logits[0, -1].double()
                scores[row, number] += logits[token] - logits[beside].logsumexp(dim=0)
    return scores


def forwards(model: Any, batch: MicroBatch) -> tuple[torch.Tensor, int]:
    """(scores, tokens that the model read for them)."""
    seen: list[int] = []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    with torch.no_grad():
        scores = LabelWordScorer(WORDS)(model, batch)
    hook.remove()
    return scores, sum(seen)


@pytest.mark.parametrize("architecture", WRITERS)
def test_scores_are_those_of_single_forwards_in_every_family(architecture: str) -> None:
    model, batch = model_of(architecture), batch_of([31, 5, 18, 31, 40])
    scores, tokens = forwards(model, batch)
    torch.testing.assert_close(scores, expected_scores(model, batch), rtol=0, atol=1e-5)
    torch.testing.assert_close(scores.exp().sum(dim=1), torch.ones(5))
    assert (tokens < 2 * batch.input_ids.numel()) == uses_packing(model)


def test_a_quantised_base_with_an_adapter_scores_alike() -> None:
    base, batch = model_of("mistral", "nf4"), batch_of([9, 22, 15])
    model = adapters.attach(base, LoraConfig(r=4), auto_class="causal_lm", seed=0, name="x").eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(forwards(model, batch)[0], expected_scores(model, batch), rtol=0, atol=1e-5)


def test_rows_that_are_too_many_together_go_in_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = model_of("llama"), batch_of([31, 5, 18, 31, 40])
    monkeypatch.setattr(verbalizer, "MOST_ATTENDED", 2 * 40 * 4)
    torch.testing.assert_close(forwards(model, batch)[0], expected_scores(model, batch), rtol=0, atol=1e-5)


def test_one_class_is_certain() -> None:
    model, batch = model_of("llama"), batch_of([9, 22])
    with torch.no_grad():
        assert LabelWordScorer(WORDS[:1])(model, batch).tolist() == [[0.0], [0.0]]


def test_gradients_are_those_of_rows_that_are_read_again_for_every_word(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = model_of("llama"), batch_of([9, 22])
    model.requires_grad_(True)
    gradients = []
    for packs in (True, False):
        monkeypatch.setattr(heads, "uses_packing", lambda base, packs=packs: packs)
        model.zero_grad()
        LabelWordScorer(WORDS)(model, batch)[:, 0].sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(gradient.abs().sum() > 0 for gradient in gradients[0])
    for packed, again in zip(*gradients, strict=True):
        torch.testing.assert_close(packed, again, rtol=1e-4, atol=1e-6)
