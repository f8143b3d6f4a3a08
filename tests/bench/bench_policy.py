"""Losses of GRPO and RLOO against TRL's on the same answers: `python -m tests.bench.bench_policy [--task rloo]`.

llmft trains first and keeps what its policy drew; TRL gets the same answers with their rewards, from the same adapter.
From the second update on, the losses depend on the weights after all earlier steps.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from llmft.core.imports import load_libraries
from llmft.model.adapters import trainable_state
from llmft.model.assemble import assemble
from llmft.runs.predictions import read_table
from llmft.train import train
from llmft.training.parts import check_parts
from llmft.training.prepare import prepare
from llmft.training.readiness import check_readiness
from tests.bench.systems import Runner, System, machine, versions
from tests.conftest import compose, run_directory

PARITY = 1e-5
TRL = System("TRL GRPOTrainer / RLOOTrainer", "trl_policy", "trl")


def overrides_of(task: str, steps: int, beta: float, temperature: float, directory: Path) -> list[str]:
    return [
        f"task={task}", "data=manners", "quantization=none", "logger=none", "progress=false", "trainer.accelerator=cpu",
        "trainer.precision=fp32", "trainer.threads=1", "data.rows={train: 64, validation: 8, test: 0}",
        f"trainer.max_steps={steps}", f"trainer.validate_every={steps}", "trainer.batch_size=4", "task.group=4",
        "task.updates=2", "task.max_new_tokens=12", f"task.kl.beta={beta}", f"task.temperature={temperature}",
        "task.generate_rows=2", "learning_rate=constant", "learning_rate.peak=1e-3", "learning_rate.warmup_steps=0",
        "task.judges={function: llmft.metrics.rewards.length, target: 3}", f"output_dir={directory / 'outputs'}",
    ]  # fmt: skip


def work_of(config: Any, directory: Path) -> dict[str, Any]:
    """TRL's input: the initial adapter, and each window's prompts, answers and rewards."""
    inputs = prepare(config, open_directory=False)
    ready = check_readiness(inputs, check_parts(config), print)
    pad = ready.rows.tokenizer.pad_token_id
    model = assemble(config, inputs.located, device=ready.device, precision=ready.precision, pad_id=pad).model
    save_file({n: t.contiguous() for n, t in trainable_state(model).items()}, directory / "start.safetensors")
    examples, encoder = ready.rows.splits["train"], ready.rows.encoder
    windows = []
    for path in sorted((run_directory(directory / "outputs") / "rollouts").iterdir()):
        drawn = read_table(path)
        prompts = [list(encoder.prompt_ids(examples[row].conversation)) for row in drawn["row"]]
        columns = zip(prompts, drawn["ids"], drawn["reward"], strict=True)
        windows.append([{"prompt": prompt, "answer": ids, "reward": reward} for prompt, ids, reward in columns])
    task = config.task
    return {
        "task": task.name, "model": str(inputs.located.directory), "windows": windows, "pad": pad, "threads": 1,
        "beta": task.kl.beta, "updates": task.updates, "group": task.group, "temperature": task.temperature,
        "most": task.max_new_tokens, "rate": config.learning_rate.peak, "clip": config.trainer.gradient_clip,
        "r": config.lora.r, "alpha": config.lora.scaling_alpha, "quantization": "none",
        "adapter": str(directory / "start.safetensors"),
    }  # fmt: skip


def compare(task: str, steps: int, beta: float, temperature: float) -> list[list[float]]:
    """The losses of `steps` steps, llmft's and TRL's."""
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        config = compose(*overrides_of(task, steps, beta, temperature, directory))
        train(config, quiet=True)
        path = directory / "trl.json"
        path.write_text(json.dumps(work_of(config, directory)))
        lines = (run_directory(directory / "outputs") / "metrics.jsonl").read_text().splitlines()
        losses = [value for line in lines if (value := json.loads(line).get("train/loss_nats")) is not None]
        runner = Runner(TRL, path)
        try:
            return [losses, runner.steps(steps)["losses"]]
        finally:
            runner.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=("grpo", "rloo"), default="grpo")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--beta", type=float, default=0.04, help="of the divergence: in GRPO's loss, in RLOO's reward")
    parser.add_argument("--temperature", type=float, default=1.0)
    options = parser.parse_args()
    load_libraries()
    print(machine(), versions(TRL), sep="\n")
    ours, theirs = compare(options.task, options.steps, options.beta, options.temperature)
    difference = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
    print(*(f"{a:+.7f} {b:+.7f}" for a, b in zip(ours, theirs, strict=True)), sep="\n")
    print(f"{options.task}, {options.steps} steps: losses at most {difference:.1e} apart")
    if difference > PARITY:
        raise SystemExit("the losses differ")


if __name__ == "__main__":
    main()
