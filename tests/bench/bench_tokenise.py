"""CPU seconds from files to token ids and masks: llmft, the bare fast tokenizer, and TRL's SFTTrainer where installed.

    python -m tests.bench.bench_tokenise [rounds]

All three take the same rows (Alpaca's format, the Llama 2 tokenizer) on one thread, in turn; medians are printed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

os.environ.update(TOKENIZERS_PARALLELISM="false", RAYON_NUM_THREADS="1", HF_HUB_OFFLINE="1")

from llmft.config.data import BadRow, Columns, DataConfig
from llmft.config.task import TaskConfig
from llmft.core.machine import versions
from llmft.data.columns import ColumnMap, Conversation
from llmft.data.encode import Encoder
from llmft.data.prompt import PromptFormat
from llmft.data.readers import BadRows
from llmft.data.sources import load_rows
from tests.conftest import SHARED, prompt_config

FILES = [str(SHARED / "instruction" / name) for name in ("llamafactory_alpaca_en_demo.json", "code_alpaca_2k.json")]


def seconds(action: Callable[[], Any]) -> float:
    began = time.process_time()
    action()
    return time.process_time() - began


def ours(tokenizer: Any) -> tuple[list[Conversation], Encoder, int]:
    columns = Columns(prompt="instruction", input="input", response="output")
    data = DataConfig(name="alpaca", files=FILES, columns=columns, max_tokens=4096, cache=False)
    problems = BadRows(BadRow.skip)
    rows = load_rows(data, problems).splits["train"]
    conversations = ColumnMap(data, TaskConfig(name="text", objective="x")).conversations(rows, problems)
    tokens = {"bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token}
    encoder = Encoder(tokenizer, PromptFormat(prompt_config("alpaca"), **tokens), data)
    examples = encoder.encode("train", conversations, problems)
    return conversations, encoder, len(examples.ids)


def trl(tokenizer: Any, texts: list[tuple[str, str]]) -> Callable[[], Any] | None:
    try:
        from trl import SFTConfig, SFTTrainer
    except ImportError:
        return None
    import datasets
    from transformers import LlamaConfig, LlamaForCausalLM

    datasets.disable_progress_bars()
    datasets.disable_caching()
    rows = datasets.Dataset.from_list([{"prompt": prompt, "completion": answer} for prompt, answer in texts])
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32000, **shape))
    folder = tempfile.mkdtemp()
    settings = SFTConfig(
        output_dir=folder, report_to=[], max_length=4096, use_cpu=True, bf16=False, gradient_checkpointing=False
    )
    return lambda: SFTTrainer(model=model, args=settings, train_dataset=rows, processing_class=tokenizer)


def main() -> None:
    from transformers import AutoTokenizer

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rounds", nargs="?", type=int, default=5)
    rounds = parser.parse_args().rounds
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "tokenizers" / "llama2")
    tokenizer.pad_token = tokenizer.eos_token
    conversations, encoder, tokens = ours(tokenizer)
    rendered = [encoder.render(conversation) for conversation in conversations]
    texts = [r.text for r in rendered]
    pairs = [(r.text[: r.spans[-1][0]], r.text[r.spans[-1][0] :]) for r in rendered]
    actions: dict[str, Callable[[], Any] | None] = {
        "bare tokenizer": lambda: tokenizer(texts, add_special_tokens=False),
        "llmft": lambda: ours(tokenizer),
        "TRL SFTTrainer": trl(tokenizer, pairs),
    }
    cpu_seconds: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(rounds + 1):
        for name, action in actions.items():
            if action is not None:
                cpu_seconds[name].append(seconds(action))
    bare = statistics.median(cpu_seconds["bare tokenizer"][1:])
    print(platform.processor() or platform.machine(), json.dumps(versions()))
    print(f"{len(texts)} rows, {tokens} tokens, {rounds} rounds")
    for name, times in cpu_seconds.items():
        if times:
            median = statistics.median(times[1:])
            print(f"{name:16} {median:6.2f} s  {median / bare:5.2f} x  {tokens / median:10,.0f} tokens/s")
        else:
            print(f"{name:16} not installed")


if __name__ == "__main__":
    main()
