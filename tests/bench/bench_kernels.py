"""CPU time and peak memory of a real model's step without each piece of llmft/model/kernels.

`python -m tests.bench.bench_kernels [--rounds 5] [--form none,nf4]` on SmolLM2-135M-Instruct (LLMFT_REAL_MODELS) and
Alpaca rows, LoRA of rank 8, fp32. The settings take turns in one process, so that a busy machine hurts all alike.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from llmft.config.model import LoraConfig, ModelConfig, QuantizationConfig, QuantizationFormat
from llmft.core.imports import load_libraries, quiet_warnings
from llmft.data.batch import MicroBatch
from llmft.data.hub import locate
from llmft.model import adapters
from llmft.model.kernels import lora, packing
from llmft.model.load import load_base
from llmft.model.tokenizer import load_tokenizer
from llmft.training.objectives.language_modeling import LanguageModeling

DATA = Path(__file__).resolve().parents[3] / "shared/data/instruction/llamafactory_alpaca_en_demo.json"
MODEL = Path(os.environ.get("LLMFT_REAL_MODELS", Path.home() / ".cache/llmft-real-models")) / "SmolLM2-135M-Instruct"
WITHOUT = {"all": (), "lora": ("lora",), "rmsnorm_swiglu": ("rmsnorm_swiglu",), "packing": ("packing",),
           "none": ("lora", "rmsnorm_swiglu", "packing")}  # fmt: skip


def micro_batch(tokenizer: Any, rows: int, most: int) -> MicroBatch:
    """A micro-batch of rows of similar length with labelled answers."""
    encoded = []
    for row in json.loads(DATA.read_text()):
        prompt = tokenizer(f"{row['instruction']}\n{row['input']}\n")["input_ids"]
        answer = tokenizer(row["output"])["input_ids"]
        if len(prompt) + len(answer) <= most:
            encoded.append((prompt + answer, [-100] * len(prompt) + answer))
    encoded.sort(key=lambda pair: -len(pair[0]))
    chosen = encoded[: 3 * rows : 3]
    ids, labels = (
        pad_sequence([torch.tensor(pair[part]) for pair in chosen], True, value) for part, value in ((0, 0), (1, -100))
    )
    lengths = torch.tensor([len(pair[0]) for pair in chosen])
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    return MicroBatch(ids, mask, labels, torch.ones(len(chosen)), None, list(range(len(chosen))))


@contextlib.contextmanager
def without(model: Any, pieces: tuple[str, ...]) -> Any:
    """The model without these pieces."""
    base = model.get_base_model()
    layers = {id(layer) for layer in lora.lora_layers(model).values()}
    patched = [(m, vars(m)["forward"]) for m in base.modules() if "forward" in vars(m)]
    for module, _ in patched:
        if ("lora" if id(module) in layers else "rmsnorm_swiglu") in pieces:
            del module.forward
    if "packing" in pieces:
        base.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        for module, forward in patched:
            module.forward = forward
        base.set_attn_implementation(packing.NAME)


def memory_mib(name: str) -> float:
    """A line of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) / 1024
    raise OSError(f"no {name} here")


def step(model: Any, batch: MicroBatch) -> tuple[float, float, float]:
    """(CPU seconds, peak MiB above the process's memory before, loss) of one forward and backward."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before, began = memory_mib("VmRSS"), time.process_time()
    losses = LanguageModeling().losses(model, batch)
    loss = losses.nll.sum() / losses.counts.sum()
    loss.backward()
    model.zero_grad(set_to_none=True)
    return time.process_time() - began, memory_mib("VmHWM") - before, float(loss.detach())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=6)
    parser.add_argument("--most", type=int, default=192)
    parser.add_argument("--form", default="none,nf4")
    options = parser.parse_args()
    load_libraries()
    torch.set_num_threads(1)
    config = ModelConfig(name="smollm2", id="local", architecture="llama", path=str(MODEL))
    located = locate(config)
    batch = micro_batch(load_tokenizer(config, located), options.rows, options.most)
    for form in options.form.split(","):
        base = load_base(
            config, located, QuantizationConfig(QuantizationFormat(form), cache=False), auto_class="causal_lm",
            num_labels=0, dtype=torch.float32, device=torch.device("cpu"), seed=0, keep_base=False,
        )  # fmt: skip
        model = adapters.attach(base, LoraConfig(r=8), auto_class="causal_lm", seed=0, name="smollm2").train()
        taken: dict[str, list[tuple[float, float, float]]] = {name: [] for name in WITHOUT}
        for number in range(options.rounds + 1):
            for name, pieces in WITHOUT.items():
                with quiet_warnings(), without(model, pieces):
                    taken[name].append(step(model, batch))
                    print(form, number, name, *(f"{value:.5g}" for value in taken[name][-1]), flush=True)
        for name, runs in taken.items():
            seconds, peak, _ = (statistics.median(values) for values in zip(*runs[1:], strict=True))
            print(f"{form:5} without {name if name != 'all' else 'nothing':15} {seconds:6.2f} s {peak:6.0f} MiB")


if __name__ == "__main__":
    main()
