"""Seconds to score seven words of several tokens: the prompt read once, and read again for every way the words part.

    python -m tests.bench.bench_scoring [rounds [prompt_tokens [rows]]]

A random Llama (hidden 256, 4 layers, 32,000 tokens) on two threads; both in turn; medians, and the largest difference.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from typing import Any
from unittest import mock

import torch

from llmft.core.machine import versions
from llmft.data.batch import MicroBatch
from llmft.data.examples import IGNORE
from llmft.model import heads
from llmft.model.kernels.packing import enable
from llmft.training.objectives.verbalizer import LabelWordScorer

END = 2
WORDS = {
    # Seven leaves of a tree: at most three places where words part lie in branches of their own.
    "three branches": [(9, b, c, END) for b, c in ((1, 1), (1, 2), (3, 1), (3, 2), (5, 1), (5, 2), (5, 4))],
    "two branches": [(b, 8, c, END) for b, c in ((4, 1), (4, 2), (4, 3), (5, 1), (5, 2), (5, 3), (5, 4))],
}


def batch_of(rows: int, prompt_tokens: int, answer: tuple[int, ...]) -> MicroBatch:
    """Prompts of up to `prompt_tokens` tokens, a few shorter each than the one before."""
    generator = torch.Generator().manual_seed(0)
    width = prompt_tokens + len(answer)
    ids = torch.zeros(rows, width, dtype=torch.long)
    labels = torch.full_like(ids, IGNORE)
    for row in range(rows):
        length = prompt_tokens - 3 * row
        ids[row, :length] = torch.randint(10, 32000, (length,), generator=generator)
        ids[row, length : length + len(answer)] = labels[row, length : length + len(answer)] = torch.tensor(answer)
    return MicroBatch(ids, (ids > 0).long(), labels, torch.ones(rows), None, list(range(rows)))


def timed(scores: LabelWordScorer, model: Any, batch: MicroBatch, *, shared: bool) -> tuple[float, torch.Tensor]:
    with torch.no_grad(), mock.patch.object(heads, "uses_packing", return_value=shared):
        began = time.perf_counter()
        log_probs = scores(model, batch)
        return time.perf_counter() - began, log_probs


def main() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("rounds", 5), ("prompt_tokens", 700), ("rows", 8)):
        parser.add_argument(name, nargs="?", type=int, default=default)
    rounds, prompt_tokens, rows = vars(parser.parse_args()).values()
    torch.set_num_threads(2)
    torch.manual_seed(0)
    shape = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 8}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32000, **shape)).eval()
    enable(model)
    print(platform.processor() or platform.machine(), json.dumps(versions()))
    print(f"{rows} prompts of about {prompt_tokens} tokens, {rounds} rounds")
    for name, words in WORDS.items():
        scores, batch = LabelWordScorer(words), batch_of(rows, prompt_tokens, words[0])
        times: dict[bool, list[float]] = {False: [], True: []}
        difference = 0.0
        for number in range(rounds + 1):
            log_probs = {}
            for shared in (False, True):
                seconds, log_probs[shared] = timed(scores, model, batch, shared=shared)
                times[shared] += [seconds] if number else []
            difference = max(difference, float((log_probs[True] - log_probs[False]).abs().max()))
        repeated, once = (statistics.median(times[shared]) for shared in (False, True))
        print(f"{name:15} every way {repeated:6.3f} s   prompt once {once:6.3f} s   {repeated / once:4.2f} x")
        print(f"{'':15} parity: log-probabilities differ by {difference:.1e} at most")


if __name__ == "__main__":
    main()
