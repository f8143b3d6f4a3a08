"""Seconds to load a quantised base in a fresh process: from its files, and from the cache of quantised bases.

    python -m tests.bench.bench_load [rounds [format]]

A random Llama of 134M weights is saved in bf16 and in fp32; every load is a process of its own, cold and cached in
turn. Medians of the load and of the whole process with its imports; a parity line says whether the logits are equal.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from llmft.core.machine import versions
from tests.conftest import ROOT

LOAD = """
import json, sys, time
from llmft.core.imports import load_libraries

load_libraries(training=False)
import torch, transformers.models.llama.modeling_llama
from llmft.config.model import ModelConfig, QuantizationConfig, QuantizationFormat
from llmft.data.hub import locate
from llmft.model.load import load_base
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

get_checkpoint_conversion_mapping("llama")  # 0.15 s once in a process, for a table that PEFT asks for in any case
torch.set_num_threads(2)
model = ModelConfig(name="llama", id="random/llama", architecture="llama", path=sys.argv[1])
quantization = QuantizationConfig(QuantizationFormat(sys.argv[2]), cache=sys.argv[3] == "cached")
began, cpu = time.perf_counter(), time.process_time()
base = load_base(
    model, locate(model), quantization, auto_class="causal_lm", num_labels=0, dtype=torch.float32,
    device=torch.device("cpu"), seed=0,
)
seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
with torch.no_grad():
    logits = base(input_ids=torch.arange(3, 67)[None]).logits
torch.save(logits, sys.argv[4])
print(json.dumps({"load": seconds, "cpu": cpu}))
"""


def make(directory: Path) -> None:
    """The two directories."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32000, **shape))
    model.save_pretrained(directory / "fp32")
    model.to(torch.bfloat16).save_pretrained(directory / "bf16")


def load(folder: Path, name: str, form: str, kind: str) -> dict[str, float]:
    """Seconds of one load in a process of its own."""
    began = time.perf_counter()
    result = subprocess.run(
        [sys.executable, "-c", LOAD, str(folder / name), form, kind, str(folder / f"{kind}.pt")],
        cwd=ROOT,
        env={**os.environ, "HF_DATASETS_CACHE": str(folder / "cache")},
        capture_output=True,
        text=True,
        check=True,
    )
    seconds: dict[str, float] = json.loads(result.stdout.splitlines()[-1])
    return {**seconds, "process": time.perf_counter() - began}


def main() -> None:
    import torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rounds", nargs="?", type=int, default=5)
    parser.add_argument("format", nargs="?", default="nf4", help="of quantised weights")
    options = parser.parse_args()
    rounds, form = options.rounds, options.format
    print(platform.processor() or platform.machine(), json.dumps(versions()))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(folder)
        for precision in ("bf16", "fp32"):
            load(folder, precision, form, "cached")  # fills the cache
            runs: dict[str, list[dict[str, Any]]] = {"cold": [], "cached": []}
            for _ in range(rounds):
                for kind, times in runs.items():
                    times.append(load(folder, precision, form, kind))
            logits = [torch.load(folder / f"{kind}.pt", weights_only=True) for kind in runs]
            for part in ("load", "cpu", "process"):
                cold, cached = (statistics.median(times[part] for times in runs[kind]) for kind in runs)
                print(
                    f"{precision} {form} {part:8} cold {cold:6.2f} s   cached {cached:6.2f} s   {cold / cached:5.1f} x"
                )
            print(f"{precision} {form} parity: logits {'equal' if torch.equal(*logits) else 'DIFFER'}")


if __name__ == "__main__":
    main()
