"""Scores after prompts that are read once equal those of reading every prompt with every answer."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llmft.config.model import LoraConfig
from llmft.data.batch import MicroBatch
from llmft.data.examples import IGNORE
from llmft.data.hub import Located
from llmft.model import adapters
from llmft.training.objectives import prompt_cache
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
SHARING = {"llama", "mistral", "mixtral", "qwen2", "qwen3", "gemma", "phi", "phi3", "falcon"}
"""Families with rotary positions and no window shorter than these rows; others add positions differently."""
WINDOWED = {"gemma2", "gemma3_text"}


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


def unshared(model: Any, batch: MicroBatch, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(prompt_cache, "can_share", lambda *_: False)
        return LabelWordScorer(WORDS)(model, batch)


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
def test_scores_are_those_of_whole_forwards_in_every_family(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = model_of(architecture), batch_of([31, 5, 18, 31, 40])
    expected = unshared(model, batch, monkeypatch)
    scores, tokens = forwards(model, batch)
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(scores.exp().sum(dim=1), torch.ones(5))
    shared = tokens < 2 * batch.input_ids.numel()
    assert shared == (architecture in SHARING)


@pytest.mark.parametrize("architecture", sorted(WINDOWED))
def test_a_window_that_the_rows_fit_in_is_no_hindrance(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = model_of(architecture), batch_of([5, 3, 7])
    scores, tokens = forwards(model, batch)
    assert tokens < 2 * batch.input_ids.numel()
    torch.testing.assert_close(scores, unshared(model, batch, monkeypatch), rtol=0, atol=1e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_every_attention_that_takes_a_mask_agrees(attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = model_of("llama"), batch_of([9, 22, 15])
    model.set_attn_implementation(attention)
    scores, tokens = forwards(model, batch)
    assert tokens < 2 * batch.input_ids.numel()
    torch.testing.assert_close(scores, unshared(model, batch, monkeypatch), rtol=0, atol=1e-5)


def test_a_quantised_base_with_an_adapter_scores_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    base, batch = model_of("mistral", "nf4"), batch_of([9, 22, 15])
    model = adapters.attach(base, LoraConfig(r=4), auto_class="causal_lm", seed=0, name="x").eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02, generator=torch.Generator().manual_seed(0))
    scores, _ = forwards(model, batch)
    torch.testing.assert_close(scores, unshared(model, batch, monkeypatch), rtol=0, atol=1e-5)


def test_rows_that_do_not_fit_into_memory_together_go_in_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = model_of("llama"), batch_of([31, 5, 18, 31, 40])
    expected = unshared(model, batch, monkeypatch)
    monkeypatch.setattr(prompt_cache, "CACHE_BYTES", 2 * 40 * prompt_cache.bytes_per_token(model))
    torch.testing.assert_close(forwards(model, batch)[0], expected, rtol=0, atol=1e-5)


def test_the_kept_bytes_of_a_token_are_those_of_its_keys_and_values() -> None:
    from transformers import DynamicCache

    for architecture in ("llama", "gemma", "falcon"):
        model, cache = model_of(architecture), DynamicCache()
        with torch.no_grad():
            model(input_ids=torch.ones(1, 10, dtype=torch.long), past_key_values=cache, use_cache=True)
        num_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        assert num_bytes == 10 * prompt_cache.bytes_per_token(model)


def test_training_reads_whole_rows_and_its_gradients_flow() -> None:
    model, batch = model_of("llama"), batch_of([9, 22])
    model.requires_grad_(True)
    scores = LabelWordScorer(WORDS)(model, batch)
    scores.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
