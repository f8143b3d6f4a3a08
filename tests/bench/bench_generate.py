"""Seconds to generate with an NF4 base on the CPU: weights dequantised for every token, and once for all.

    python -m tests.bench.bench_generate [rounds [prompts [new_tokens]]]

A random Llama of 134M weights in NF4, prompts of 100 tokens, two threads; both in turn, medians, and whether the tokens
are the same.
"""

from __future__ import annotations

import contextlib
import json
import platform
import statistics
import sys
import time
from typing import Any
from unittest import mock

import torch

from llmft.config.model import ModelConfig, ModelInit, QuantizationConfig
from llmft.core.machine import versions
from llmft.data.encode import Ends
from llmft.data.hub import Located
from llmft.model.generate import generate
from llmft.model.load import load_base

SHAPE = {
    "vocab_size": 32000,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
}


@contextlib.contextmanager
def nothing_kept(model: Any) -> Any:
    yield False


def main() -> None:
    rounds, rows, new_tokens = [*map(int, sys.argv[1:]), *(5, 8, 16)[len(sys.argv) - 1 :]]
    torch.set_num_threads(2)
    model = ModelConfig(name="llama", id="random/llama", architecture="llama", init=ModelInit.random, config=SHAPE)
    base = load_base(
        model,
        Located(None, "random"),
        QuantizationConfig(),
        auto_class="causal_lm",
        num_labels=0,
        dtype=torch.float32,
        device=torch.device("cpu"),
        seed=0,
    )
    prompts = torch.randint(3, 32000, (rows, 100), generator=torch.Generator().manual_seed(0)).tolist()
    times: dict[bool, list[float]] = {False: [], True: []}
    found: dict[bool, list[list[int]]] = {}
    for number in range(rounds + 1):
        for kept in (False, True):
            patch = mock.patch("llmft.model.generate.dequantized", nothing_kept)
            with contextlib.nullcontext() if kept else patch:
                began = time.perf_counter()
                found[kept] = generate(base, prompts, pad_id=0, ends=Ends([]), max_new_tokens=new_tokens)
            times[kept] += [time.perf_counter() - began] if number else []
    print(platform.processor() or platform.machine(), json.dumps(versions()))
    print(f"{rows} prompts of 100 tokens, {new_tokens} new ones each, {rounds} rounds")
    each, once = (statistics.median(times[kept]) for kept in (False, True))
    print(f"for every token {each:6.2f} s   once {once:6.2f} s   {each / once:4.2f} x")
    print(f"parity: the tokens are {'the same' if found[False] == found[True] else 'DIFFERENT'}")


if __name__ == "__main__":
    main()
