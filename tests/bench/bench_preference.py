"""Preference training beside TRL's: `python -m tests.bench.bench_preference --model DIR [--task reward]`.

Both take the same pairs of PandaLM in the same order from the same adapter; a table is shown where their losses agree.
llmft's reference is computed once; its time is told apart and counted to every pair of one pass over the rows.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from llmft.core.imports import load_libraries
from llmft.data.batch import rows_of_step
from llmft.model.adapters import trainable_state
from llmft.model.assemble import assemble
from llmft.training.parts import check_parts
from llmft.training.prepare import prepare
from llmft.training.readiness import make_ready
from llmft.training.references import compute_references, policy_before
from tests.bench.systems import Runner, System, machine, versions
from tests.conftest import SHARED, compose

PARITY = 1e-5
TRL = System("TRL DPOTrainer / RewardTrainer", "trl_preference", "trl")
LLMFT = System("llmft", "llmft", None)


def overrides_of(asked: argparse.Namespace, directory: Path) -> list[str]:
    steps = asked.warm_up + asked.rounds * asked.steps
    return [
        f"task={asked.task}", "model=local", f"model.path={asked.model}", "prompt=native", "data=preference_degrees",
        f"data.files={SHARED}/preference/pandalm_degrees.jsonl", f"data.max_tokens={asked.max_tokens}", "data.max_dropped_fraction=1", "data.truncation=drop", "quantization=none",
        "logger=none", "learning_rate=constant", "learning_rate.peak=1e-4", "learning_rate.warmup_steps=0",
        f"trainer.max_steps={steps}", f"trainer.validate_every={steps}", f"trainer.batch_size={asked.batch}",
        "trainer.precision=fp32", "trainer.accelerator=cpu", "data.validation_fraction=0.002",
        "data.max_overlap_fraction=1.0", "task.generate_rows=0", f"output_dir={directory / 'outputs'}",
        f"data.limit={steps * asked.batch}",
    ]  # fmt: skip


def dump(asked: argparse.Namespace, directory: Path) -> tuple[list[str], Path, float]:
    """llmft's command line, the JSON for TRL, and the seconds that the reference takes for each pair."""
    overrides = overrides_of(asked, directory)
    config = compose(*overrides)
    inputs = prepare(config, open_directory=False)
    ready = make_ready(inputs, check_parts(config), print)
    examples = ready.rows.splits["train"]
    pad = ready.rows.tokenizer.pad_token_id
    assembled = assemble(
        config,
        inputs.located,
        device=ready.device,
        precision=ready.precision,
        num_labels=inputs.num_outputs,
        pad_id=pad,
    )
    save_file({n: t.contiguous() for n, t in trainable_state(assembled.model).items()}, directory / "start.safetensors")
    seconds = 0.0
    if config.task.reference.value != "none":
        began = time.perf_counter()
        with policy_before(assembled.model, config):
            compute_references(assembled.model, {"train": examples}, pad, ready.device, torch.no_grad())
        seconds = (time.perf_counter() - began) / len(examples)
    rows = []
    for example in examples:
        assert example.segments is not None
        parts = [[int(t) for t, s in zip(example.input_ids, example.segments, strict=True) if s == n] for n in range(3)]
        rows.append(parts)
    steps = config.trainer.max_steps or 0
    batches = [rows_of_step(step, len(rows), asked.batch, config.seed) for step in range(steps)]
    work = {
        "task": asked.task, "model": str(asked.model), "rows": rows, "batches": batches, "pad": asked.pad or pad,
        "rate": config.learning_rate.peak, "clip": config.trainer.gradient_clip, "beta": config.task.beta,
        "r": config.lora.r, "alpha": config.lora.scaling_alpha, "quantization": "none", "margin": 0.0,
        "adapter": str(directory / "start.safetensors"), "micro": asked.micro, "precompute": asked.precompute,
    }  # fmt: skip
    path = directory / "trl.json"
    path.write_text(json.dumps(work))
    return overrides, path, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="directory of a chat model")
    parser.add_argument("--task", choices=("dpo", "reward"), default="dpo")
    parser.add_argument("--batch", type=int, default=8, help="pairs of a step")
    parser.add_argument("--micro", type=int, default=4, help="TRL's pairs at a time")
    parser.add_argument("--warm-up", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2, help="steps of each round, in turn")
    parser.add_argument("--max-tokens", type=int, default=1024, help="of a prompt with its longer answer")
    parser.add_argument("--pad", type=int, help="token that TRL pads with; it must end no answer")
    parser.add_argument("--precompute", action="store_true", help="TRL computes its reference before the first step")
    asked = parser.parse_args()
    load_libraries()
    print(machine())
    for system in (TRL, LLMFT):
        print(f"  {system.name}: {versions(system)}")
    with tempfile.TemporaryDirectory() as folder:
        overrides, path, reference_s = dump(asked, Path(folder))
        own = Path(folder) / "llmft.json"
        own.write_text(json.dumps({"overrides": overrides}))
        runners = [Runner(TRL, path), Runner(LLMFT, own)]
        losses: list[list[float]] = [[], []]
        seconds: list[list[float]] = [[], []]
        peaks = [0.0, 0.0]
        try:
            for number in range(asked.rounds + 1):
                for place, runner in enumerate(runners):
                    answer = runner.steps(asked.steps if number else asked.warm_up)
                    losses[place] += answer["losses"]
                    peaks[place] = answer["peak_mib"]
                    if number:
                        seconds[place].append(sum(answer["seconds"]) / asked.steps)
        finally:
            for runner in runners:
                runner.close()
    apart = max(abs(a - b) for a, b in zip(*losses, strict=True))
    print(f"losses over {len(losses[0])} steps: {losses[0][0]:.6f} to {losses[0][-1]:.6f}; at most {apart:.1e} apart")
    if apart > PARITY:
        raise SystemExit(f"not shown: the losses differ:\n{losses[0]}\n{losses[1]}")
    theirs, ours = (statistics.median(own) / asked.batch for own in seconds)
    ratios = [a / b for a, b in zip(*seconds, strict=True)]
    with_reference = theirs / (ours + reference_s)
    print(f"{'system':32} {'s/pair':>8} {'pairs/s':>8} {'MiB':>7}")
    for name, own_s, peak in (("TRL", theirs, peaks[0]), ("llmft", ours, peaks[1])):
        print(f"{name:32} {own_s:8.3f} {1 / own_s:8.2f} {peak:7,.0f}")
    print(f"the reference takes llmft {reference_s:.3f} s a pair, once for all runs of a sweep")
    print(f"llmft trains {statistics.median(ratios):.2f}x the pairs a second; {with_reference:.2f}x with its reference")
    print(f"memory {peaks[1] / peaks[0]:.2f}x")


if __name__ == "__main__":
    main()
