"""Samples are drawn from softmax(logits / T) and depend on their own seeds alone."""

import numpy as np
import pytest
import scipy.stats
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llmft.core.seeds import stream
from llmft.data.ends import Ends
from llmft.model.generate import generate
from llmft.model.sampling import Draw, choose, sample

VOCABULARY, END = 40, 1


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=None, eos_token_id=END, pad_token_id=0,
    )  # fmt: skip
    llama = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        llama.lm_head.weight.mul_(12)  # otherwise a random model's tokens are nearly equally likely
    return llama


def drawn(model, prompts, temperatures, batch_size, seed=0, most=12, **more):
    draws = [
        [Draw(t, stream(seed, "sample", row, number)) for number, t in enumerate(temperatures)]
        for row in range(len(prompts))
    ]
    options = {"pad_id": 0, "ends": Ends([END]), "max_new_tokens": most, "batch_size": batch_size} | more
    return sample(model, prompts, draws, **options)


def prompts(count):
    rng = np.random.Generator(np.random.PCG64(5))
    return [rng.integers(2, VOCABULARY, rng.integers(1, 12)).tolist() for _ in range(count)]


def test_ten_temperatures_are_the_same_at_any_batch_size(model):
    temperatures = [round(0.1 * n, 1) for n in range(1, 11)]
    alone, some, all_at_once = (drawn(model, prompts(12), temperatures, size) for size in (1, 8, 64))
    assert alone == some == all_at_once
    assert len({tuple(answer.ids) for row in alone for answer in row}) > 50


def test_other_rows_and_other_samples_change_nothing(model):
    rows = prompts(6)
    assert drawn(model, rows, [1.0], 8)[:3] == drawn(model, rows[:3], [1.0], 8)
    few = drawn(model, rows, [1.0, 0.5], 8)
    assert [row[:1] for row in few] == drawn(model, rows, [1.0], 8)
    assert drawn(model, rows, [1.0], 8, seed=1) != drawn(model, rows, [1.0], 8)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_as_frequent_as_the_softmax_says(model, temperature):
    prompt, count = [3, 7, 11], 3000
    answers = drawn(model, [prompt], [temperature] * count, 1, most=1)[0]
    with torch.no_grad():
        expected = (model(torch.tensor([prompt])).logits[0, -1].double() / temperature).softmax(-1).numpy() * count
    seen = np.bincount([answer.ids[0] for answer in answers], minlength=VOCABULARY)
    cell = np.where(expected >= 5, np.arange(VOCABULARY), VOCABULARY)  # rare tokens share one cell
    seen, expected = np.bincount(cell, seen), np.bincount(cell, expected)
    assert scipy.stats.chisquare(seen[expected > 0], expected[expected > 0]).pvalue > 0.001


@pytest.mark.parametrize("temperature", [0.0, 1e-6])
def test_towards_zero_the_likeliest_token_is_taken(model, temperature):
    rows, ends = prompts(12), Ends([END])
    greedy = generate(model, rows, pad_id=0, ends=ends, max_new_tokens=12)
    assert [ends.cut(row[0].ids) for row in drawn(model, rows, [temperature], 4)] == greedy


def test_an_answer_ends_with_its_end_token_or_unfinished_at_the_models_last_position(model):
    rows = [[2] * 60, [2] * 5]
    answers = drawn(model, rows, [1.0] * 8, 8, most=30, context_tokens=64)
    for prompt, row in zip(rows, answers, strict=True):
        for answer in row:
            assert len(answer.ids) <= min(30, 64 - len(prompt))
            assert answer.finished == (answer.ids[-1] == END)
            assert END not in answer.ids[:-1]
    assert answers == drawn(model, rows, [1.0] * 8, 1, most=30, context_tokens=64)


def test_a_draw_at_the_edge_between_two_tokens_is_not_sure():
    logits, temperature = torch.zeros(1, 4), torch.ones(1, dtype=torch.float64)
    for number, expected in ((0.25, False), (0.3, True), (0.7499, False)):
        _, sure = choose(logits, temperature, torch.tensor([number], dtype=torch.float64), 1e-3)
        assert bool(sure) is expected
