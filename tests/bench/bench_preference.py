"""Preference training against TRL's, on pairs of PandaLM: speed and memory of DPO and of a reward model, and a sweep.

    python -m tests.bench.bench_preference [--model DIR] [--only dpo,reward,sweep] [--parity] [--quick]

All take the same pairs in the same order from the same adapter, in fp32, in turn round by round; a line is shown only
where its losses agree with llmft's. TRL's fastest micro-batch is tried first, without gradient checkpointing; its own
default, with it, has a line too. The seconds of a reference computed before the first step have a column next to the
steps'; "with it" adds them once per pair, as for one pass over the rows. The sweep is four betas and two seeds: one
command of llmft, with all that it always does, against eight processes of TRL, which share TRL's cached reference.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from llmft.core.imports import load_libraries
from llmft.data.batch import rows_of_step
from llmft.model.adapters import trainable_state
from llmft.model.assemble import assemble
from llmft.training.parts import check_parts
from llmft.training.prepare import prepare
from llmft.training.readiness import check_readiness
from tests.bench.bench_sweep import Losses, environment, llmft_sweep, used
from tests.bench.systems import HERE, Runner, System, compile_package, machine, versions
from tests.conftest import SHARED, compose

PARITY = 1e-5
BETAS, SEEDS = (0.03, 0.1, 0.3, 1.0), (0, 1)
LLMFT = System("llmft", "llmft", None)
TRL = System("TRL", "trl_preference", "trl", settings={"precompute": False, "checkpointing": False})
VARIANTS = {
    "dpo": (
        TRL,
        replace(TRL, name="TRL, reference before", settings={**TRL.settings, "precompute": True}),
        replace(TRL, name="TRL, checkpointing", settings={**TRL.settings, "checkpointing": True}),
    ),
    "reward": (TRL, replace(TRL, name="TRL, checkpointing", settings={**TRL.settings, "checkpointing": True})),
}
SWEPT: dict[str, Sequence[float]] = {"task.beta": BETAS, "seed": SEEDS}


@dataclass
class Measured:
    """One system's measurements: losses of all steps, seconds of each round's steps and of the reference, memory."""

    system: System
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    reference_s: float = 0.0
    peak_mib: float = 0.0

    def add(self, answer: dict[str, Any], *, timed: bool) -> None:
        """Adds a runner's answer."""
        self.losses += answer["losses"]
        self.reference_s, self.peak_mib = answer["reference_s"], answer["peak_mib"]
        if timed:
            self.seconds.append(sum(answer["seconds"]))

    def largest_difference(self, other: Measured) -> float:
        """The largest difference between two systems' losses."""
        return max(abs(a - b) for a, b in zip(self.losses, other.losses, strict=True))


def overrides_of(options: argparse.Namespace, task: str, steps: int) -> list[str]:
    """llmft's command line; without a model the embedded one, on its own pairs."""
    embedded = [f"data.rows={{train: {steps * options.batch}, validation: 4, test: 0}}"]
    pandalm = [
        "model=local", f"model.path={options.model}", "prompt=native", "data=preference_degrees",
        f"data.files={SHARED}/preference/pandalm_degrees.jsonl", f"data.max_tokens={options.max_tokens}",
        "data.max_dropped_fraction=1", "data.truncation=drop", "data.validation_fraction=0.002",
        "data.max_overlap_fraction=1.0",
        f"data.limit={(steps + 1) * options.batch}",  # whole batches, and rows for validation
    ]  # fmt: skip
    return [
        f"task={task}", *(pandalm if options.model else embedded), "quantization=none", "logger=none",
        "learning_rate=constant", f"learning_rate.peak={options.rate}", "learning_rate.warmup_steps=0",
        f"trainer.max_steps={steps}", f"trainer.validate_every={steps}", f"trainer.batch_size={options.batch}",
        "trainer.precision=fp32", "trainer.accelerator=cpu", "task.generate_rows=0",
    ]  # fmt: skip


def dump(overrides: list[str], directory: Path, name: str) -> dict[str, Any]:
    """TRL's input: llmft's rows, their order and the adapter; also written to `directory`."""
    config = compose(*overrides, f"output_dir={directory / 'outputs'}")
    inputs = prepare(config, open_directory=False)
    ready = check_readiness(inputs, check_parts(config), print)
    tokenizer, examples = ready.rows.tokenizer, ready.rows.splits["train"]
    assembled = assemble(
        config, inputs.located, device=ready.device, precision=ready.precision, num_labels=inputs.num_outputs,
        pad_id=tokenizer.pad_token_id,
    )  # fmt: skip
    adapter = directory / f"{name}.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in trainable_state(assembled.model).items()}, adapter)
    rows = [
        [[int(t) for t, s in zip(row.input_ids, row.segments, strict=True) if s == part] for part in range(3)]
        for row in examples
        if row.segments is not None
    ]
    ends = {answer[-1] for _, *answers in rows for answer in answers}
    return {
        "task": config.task.name, "model": str(inputs.located.directory), "rows": rows, "adapter": str(adapter),
        "batches": [
            rows_of_step(step, len(rows), config.trainer.batch_size, config.seed)
            for step in range(config.trainer.max_steps or 0)
        ],
        "pad": next(token for token in range(len(tokenizer)) if token not in ends),
        "rate": config.learning_rate.peak, "clip": config.trainer.gradient_clip, "beta": config.task.beta,
        "r": config.lora.r, "alpha": config.lora.scaling_alpha,
    }  # fmt: skip


def written(path: Path, content: dict[str, Any]) -> Path:
    """`content` as a JSON file."""
    path.write_text(json.dumps(content))
    return path


def fastest_micro(work: dict[str, Any], sizes: list[int], directory: Path) -> int:
    """The number of pairs at a time with which TRL's second step is fastest."""
    seconds = {}
    for size in sizes if len(sizes) > 1 else ():
        runner = Runner(TRL, written(directory / "trial.json", {**work, **TRL.settings, "micro": size}))
        try:
            runner.steps(1)
            seconds[size] = runner.steps(1)["seconds"][0]
        except RuntimeError as error:
            print(f"left out: {size} pairs at a time: {error}")
        finally:
            runner.close()
    return min(seconds, key=lambda size: seconds[size]) if seconds else sizes[0]


def measure(options: argparse.Namespace, task: str, directory: Path) -> list[Measured]:
    """Steps of llmft and of every variant of TRL, in turn."""
    steps = 1 + options.rounds * options.steps
    overrides = overrides_of(options, task, steps)
    work = dump(overrides, directory, task)
    micro = fastest_micro(work, options.micro, directory)
    print(f"\n{task}: {steps} steps of {options.batch} pairs; TRL takes {micro} pairs at a time")
    llmft = [*overrides, f"output_dir={directory / task}"]
    measured = [Measured(LLMFT), *map(Measured, VARIANTS[task][: 1 if options.parity else None])]
    runners: list[Runner] = []
    try:
        for number, one in enumerate(measured):
            content = {"overrides": llmft} if one.system is LLMFT else {**work, **one.system.settings, "micro": micro}
            runners.append(Runner(one.system, written(directory / f"{task}-{number}.json", content)))
            one.add(runners[-1].steps(1), timed=False)
        for _ in range(options.rounds):
            for runner, one in zip(runners, measured, strict=True):
                one.add(runner.steps(options.steps), timed=True)
    finally:
        for runner in runners:
            runner.close()
    return measured


def table(measured: list[Measured], *, batch: int, steps: int) -> list[str]:
    """Lines of the table; llmft is the first, ratios are medians of the rounds' own."""
    ours = measured[0]
    pairs = batch * len(ours.losses)
    head = f"{'':24} {'s/pair':>7} {'reference':>9} {'with it':>7} {'pairs/s':>7} {'MiB':>6}"
    lines = [f"{head}   llmft: pairs/s   with references   memory   max |loss difference|"]
    for one in measured:
        difference = one.largest_difference(ours)
        if difference > PARITY:
            lines.append(f"{one.system.name:24} not shown: its losses differ from llmft's by {difference:.1e}")
            continue
        step, reference = statistics.median(one.seconds) / (batch * steps), one.reference_s / pairs
        both = step + reference
        line = f"{one.system.name:24} {step:7.3f} {reference:9.3f} {both:7.3f} {1 / both:7.2f} {one.peak_mib:6,.0f}"
        if one is not ours:
            ratio = statistics.median(a / b for a, b in zip(one.seconds, ours.seconds, strict=True))
            total = both / (statistics.median(ours.seconds) / (batch * steps) + ours.reference_s / pairs)
            line += f"   {f'{ratio:.2f}x':>14}   {f'{total:.2f}x':>15}   {f'{ours.peak_mib / one.peak_mib:.2f}x':>6}"
            line += f"   {difference:.1e}"
        lines.append(line)
    return lines


def trl_sweep(works: dict[int, dict[str, Any]], directory: Path, *, precompute: bool) -> Losses:
    """Losses of all trials, each run in a process of its own, one after the other."""
    losses: Losses = {}
    with tempfile.TemporaryDirectory(dir=directory) as cache:
        for beta, seed in product(BETAS, SEEDS):
            settings = {"beta": beta, "precompute": precompute, "dataset": f"{cache}/seed{seed}"}
            work = {**works[seed], **TRL.settings, **settings}
            path = written(directory / "trial.json", work)
            command = [str(TRL.python), str(HERE / f"run_{TRL.runner}.py"), str(path)]
            result = subprocess.run(
                command, input=f"{len(work['batches'])}\n", env=environment(directory), capture_output=True, text=True
            )
            if result.returncode or not result.stdout:
                raise RuntimeError(f"TRL: {' | '.join(result.stderr.strip().splitlines()[-3:])[-600:]}")
            losses[beta, seed] = json.loads(result.stdout)["losses"]
    return losses


def sweep(options: argparse.Namespace, directory: Path) -> None:
    """Prints wall and CPU seconds of eight trials."""
    steps, overrides = options.sweep_steps, overrides_of(options, "dpo", options.sweep_steps)
    works = {seed: dump([*overrides, f"seed={seed}"], directory, f"seed{seed}") for seed in SEEDS}
    micro = fastest_micro(works[SEEDS[0]], options.micro, directory)
    works = {seed: {**work, "micro": micro} for seed, work in works.items()}
    print(f"\nsweep: {len(BETAS)} betas x {len(SEEDS)} seeds of {steps} steps of {options.batch} pairs")
    wall, cpu, ours = used(lambda: llmft_sweep(directory, SWEPT, [*overrides, f"sweep.workers={options.workers}"]))
    print(f"{f'llmft -m sweep.workers={options.workers}':32} {wall:7.1f} s {cpu:7.1f} CPU s", flush=True)
    for name, precompute in (("8 x TRL, reference before", True), ("8 x TRL", False)):
        their_wall, their_cpu, theirs = used(partial(trl_sweep, works, directory, precompute=precompute))
        # A loss is a function of beta times log-probabilities, so rounding errors scale with beta too.
        difference = max(
            abs(a - b) / max(1, trial[0] / 0.1)
            for trial in ours
            for a, b in zip(ours[trial], theirs[trial], strict=True)
        )
        if difference > PARITY:
            print(f"{name:32} not shown: its losses differ from llmft's by {difference:.1e}")
            continue
        print(
            f"{name:32} {their_wall:7.1f} s {their_cpu:7.1f} CPU s   llmft {their_wall / wall:.2f}x "
            f"({their_cpu / cpu:.2f}x by CPU)   {difference:.1e}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="directory of a chat model; none: the embedded one")
    parser.add_argument("--only", default="dpo,reward,sweep", help="parts with a comma between them")
    parser.add_argument("--batch", type=int, default=8, help="pairs of a step")
    parser.add_argument("--micro", default="2,4,8", help="TRL's pairs at a time; the fastest is taken")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2, help="steps of each round, in turn")
    parser.add_argument("--sweep-steps", type=int, default=4)
    parser.add_argument("--workers", default="auto", help="trials of llmft's sweep at a time; auto: one on a CPU")
    parser.add_argument("--max-tokens", type=int, default=1024, help="of a prompt with its longer answer")
    parser.add_argument("--rate", type=float, default=1e-4)
    parser.add_argument("--parity", action="store_true", help="ten steps in one round, losses alone")
    parser.add_argument("--quick", action="store_true", help="one round of a step, a sweep of two, 8 pairs at a time")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.steps, options.sweep_steps, options.micro = 1, 1, 2, "8"
    if options.parity:
        options.rounds, options.steps, options.micro = 1, 9, str(options.batch)
    options.micro = [int(size) for size in str(options.micro).split(",")]
    options.model = options.model.resolve() if options.model else None
    if not TRL.installed:
        raise SystemExit("nothing to compare with: python -m tests.bench.peers trl")
    compile_package()
    load_libraries()
    print(machine())
    for system in (TRL, LLMFT):
        print(f"  {system.name}: {versions(system)}")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HF_DATASETS_CACHE"] = f"{folder}/cache"
        for part in options.only.split(","):
            if part == "sweep":
                sweep(options, Path(folder))
                continue
            measured = measure(options, part, Path(folder))
            if options.parity:
                ours, theirs = measured
                for step, (a, b) in enumerate(zip(ours.losses, theirs.losses, strict=True), start=1):
                    print(f"step {step:2}   llmft {a:.8f}   TRL {b:.8f}   {a - b:+.1e}")
                difference = theirs.largest_difference(ours)
                print(f"at most {difference:.1e} apart: {'the same' if difference <= PARITY else 'DIFFERENT'}")
            else:
                print("\n".join(table(measured, batch=options.batch, steps=options.steps)))


if __name__ == "__main__":
    main()
