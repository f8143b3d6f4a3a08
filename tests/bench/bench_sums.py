"""A real model learns sums of two numbers from correctness rewards: `python -m tests.bench.bench_sums --model DIR`.

A few steps on answers teach it the form; then GRPO samples, and a rule rewards correct sums. The gain is measured on
greedy answers to the same held-out sums before and after.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from llmft.config.instantiate import trust
from llmft.core.imports import load_libraries
from llmft.metrics.rewards import last_number
from llmft.pipelines.report import Answers, gain, verdict
from llmft.train import train
from tests.bench.systems import machine
from tests.conftest import compose, run_directory

SPLITS = ("train", "validation", "test")


def sums(split: str, num_rows: int, seed: int = 0) -> list[dict[str, str]]:
    """Sums of two numbers from 10 to 99; no pair of numbers is in two splits, and every split has all sums."""
    random = Random(f"sums/{split}/{seed}")
    rows: list[dict[str, str]] = []
    while len(rows) < num_rows:
        a, b = random.randrange(10, 100), random.randrange(10, 100)
        if (a + 2 * b) % len(SPLITS) == SPLITS.index(split):
            rows.append({"prompt": f"{a} + {b} =", "response": f" {a + b}"})
    return rows


def answers_at(run: Path, step: int) -> Answers:
    """The greedy answers of one validation, rewarded."""
    lines = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    rows = [line for line in lines if line["step"] == step]
    texts = [row["generated"] for row in rows]
    rewards = last_number([row["reference"] for row in rows], texts)
    return Answers(f"step {step}", np.asarray(rewards), [row["prompt"] for row in rows], texts)


def learn(model: Path, directory: Path, steps: int, *more: str) -> tuple[Answers, Answers]:
    """The answers before and after `steps` steps of GRPO."""
    shared = [
        "model=local", f"model.path={model}", "prompt=plain", "quantization=none", "trainer.precision=fp32",
        "data=prompt_response", "data.source=tests.bench.bench_sums.sums", "trusted_packages=[tests]",
        "logger=none", "progress=false", "trainer.accelerator=cpu", "task.max_new_tokens=5",
        "data.rows={train: 960, validation: 160, test: 0}", "trainer.checkpoint_every=null", "task.show_rows=0",
    ]  # fmt: skip
    trust(["tests"])
    forms = compose(
        *shared, f"output_dir={directory}/form", "trainer.max_steps=24", "trainer.validate_every=24",
        "trainer.batch_size=32", "learning_rate.peak=5e-4", "task.generate_rows=0",
    )  # fmt: skip
    train(forms, quiet=True)
    policy = compose(
        *shared, f"output_dir={directory}/policy", "task=grpo", f"trainer.max_steps={steps}",
        f"trainer.validate_every={steps}", "trainer.export=last",
        f"lora.adapter={run_directory(directory / 'form')}", "task.judges=llmft.metrics.rewards.last_number",
        "trainer.batch_size=6", "task.group=8", "task.generate_rows=160", "learning_rate=constant",
        "learning_rate.peak=1e-4", *more,
    )  # fmt: skip
    train(policy, quiet=True)
    run = run_directory(directory / "policy")
    return answers_at(run, 0), answers_at(run, steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="directory of a small model that knows numbers")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("overrides", nargs="*", help="of the training with rewards")
    options = parser.parse_args()
    load_libraries()
    print(machine())
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        before, after = learn(options.model.expanduser(), Path(folder), options.steps, *options.overrides)
    show(before, after)
    print(f"{time.monotonic() - began:.0f} s in all")


def show(before: Answers, after: Answers) -> None:
    """The rewards and whether they rose by more than the noise of the sums."""
    gained: dict[str, Any] = gain(before, after)
    for answers in (before, after):
        print(f"{answers.stage:8} right {answers.mean:.3f} ± {answers.noise:.3f} of {len(answers.rewards)} sums")
    difference = f"{gained['difference']:+.3f} [{gained['low']:+.3f}, {gained['high']:+.3f}]"
    print(f"{verdict(gained)}: {difference}")
    for prompt, first, last in list(zip(before.prompts, before.texts, after.texts, strict=True))[:4]:
        print(f"  {prompt!r}: {first!r}, then {last!r}")


if __name__ == "__main__":
    main()
