"""Wall and CPU seconds of a sweep of 8 short trials: one command of llmft against 8 processes of peers.

    python -m tests.bench.bench_sweep [--steps 20] [--base nf4|none] [--rounds 3] [--model DIR [--batch 16]] [--quick]

The trials (four rates, two ranks) train the embedded model, in NF4 as by default, on the embedded rows; with --model a
real one on rows of Alpaca. Each takes the same tokens in the same order from the same adapter in all systems, and its
losses are compared step by step. llmft's side is the whole command with what it always does: planning, a validation
before and after each trial (of 16 embedded rows or two of Alpaca, without generation), checkpoints, records, the
report. Peers train and do nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from llmft.core.imports import load_libraries
from tests.bench.bench_step import BARE, HF, LLMFT, PARITY, TRL, best_of
from tests.bench.systems import HERE, System, compile_package, machine, versions
from tests.bench.work import BATCH_SIZE, Work, dump
from tests.conftest import ROOT, SHARED

RATES = (5e-4, 1e-3, 2e-3, 4e-3)
RANKS = (4, 8)
SWEPT: dict[str, Sequence[float]] = {"learning_rate.peak": RATES, "lora.r": RANKS}
Losses = dict[tuple[float, ...], list[float]]
"""The losses of each trial's steps, by the values of its swept keys."""


def overrides(steps: int, quantization: str, model: Path | None, batch: int) -> list[str]:
    """The overrides that all trials share."""
    alpaca = SHARED / "instruction" / "llamafactory_alpaca_en_demo.json"
    embedded = ["data.rows={train: 320, validation: 16, test: 0}"]
    real = ["model=local", f"model.path={model}", "prompt=native", "data=alpaca", f"data.files={alpaca}"]
    return [
        *(embedded if model is None else [*real, "data.validation_fraction=0.002", "data.max_tokens=1024"]),
        f"quantization={quantization}",
        "logger=none",
        "task.generate_rows=0",
        "task.metrics=[]",
        "learning_rate=constant",
        "learning_rate.warmup_steps=0",
        f"trainer.batch_size={batch}",
        "trainer.precision=fp32",
        f"trainer.max_steps={steps}",
        f"trainer.validate_every={steps}",
        "trainer.accelerator=cpu",
    ]


def used(action: Callable[[], Losses]) -> tuple[float, float, Losses]:
    """(wall seconds, CPU seconds of all child processes, result) of `action`."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    losses = action()
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, losses


def environment(folder: Path) -> dict[str, str]:
    """The environment of all systems' processes."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "PYTHONPATH")}
    settings = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "cache")}
    return {**inherited, **settings}


def llmft_sweep(folder: Path, swept: dict[str, Sequence[float]], shared: Sequence[str]) -> Losses:
    """One command over all combinations of `swept`, in a new output directory; its trials' losses by their values."""
    with tempfile.TemporaryDirectory(dir=folder) as out:
        varied = [f"{key}={','.join(map(str, values))}" for key, values in swept.items()]
        command = [sys.executable, "-m", "llmft", "-m", *varied, *shared, "progress=false", f"output_dir={out}"]
        env = {**environment(folder), "PYTHONPATH": str(ROOT)}
        result = subprocess.run(command, env=env, capture_output=True, text=True, cwd=ROOT)
        if result.returncode:
            raise RuntimeError(f"llmft: {(result.stderr or result.stdout).strip().splitlines()[-1][:300]}")
        (record,) = Path(out).glob("sweeps/*/sweep.json")
        losses: Losses = {}
        for trial in json.loads(record.read_text())["trials"]:
            values = dict(override.split("=") for override in trial["overrides"])
            steps = map(json.loads, (Path(out) / trial["run"] / "metrics.jsonl").read_text().splitlines())
            of_trial = [step["train/loss_nats"] for step in steps if "train/loss_nats" in step]
            losses[tuple(float(values[key]) for key in swept)] = of_trial
        return losses


def processes(peer: System, works: dict[int, Work], steps: int, at_once: int) -> Losses:
    """Losses of all trials, each in a process of `peer`, `at_once` at a time."""
    losses: Losses = {}
    waiting, running = list(product(RATES, RANKS)), {}
    folder = works[RANKS[0]].directory
    while waiting or running:
        while waiting and len(running) < at_once:
            rate, rank = waiting.pop(0)
            settings = {**peer.settings, "rate": rate, **({"threads": 1} if at_once > 1 else {})}
            work = folder / f"{peer.runner}-{rate}-{rank}.json"
            work.write_text(json.dumps({**json.loads((folder / f"work-{rank}.json").read_text()), **settings}))
            command = [str(peer.python), str(HERE / f"run_{peer.runner}.py"), str(work)]
            running[rate, rank] = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=environment(folder),
                text=True,
            )
            pipe = running[rate, rank].stdin
            assert pipe is not None
            pipe.write(f"{steps}\n")
            pipe.close()
        for trial, process in list(running.items()):
            if process.poll() is not None:
                assert process.stdout is not None
                answer = process.stdout.read()
                process.stdout.close()
                if not answer:
                    raise RuntimeError(f"{peer.name}: a process left with code {process.returncode} and no answer")
                losses[trial] = json.loads(answer)["losses"]
                del running[trial]
        time.sleep(0.005)
    return losses


def largest_difference(one: Losses, other: Losses) -> float:
    """The largest difference over all steps of all trials."""
    return max(abs(a - b) for trial in other for a, b in zip(one[trial], other[trial], strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--base", choices=("nf4", "none"), default="nf4", help="none: fp32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="bare,hf,trl", help="names of peers with a comma between them")
    parser.add_argument("--model", type=Path, help="directory of a real model, trained on rows of Alpaca")
    parser.add_argument("--batch", type=int, default=BATCH_SIZE, help="rows of a step")
    parser.add_argument("--quick", action="store_true", help="one round, one peer")
    options = parser.parse_args()
    compile_package()
    load_libraries()
    print(machine())
    if not BARE.installed:
        raise SystemExit("no peer to compare with: python -m tests.bench.peers hf")
    selected = ["bare"] if options.quick else options.only.split(",")
    peers = [peer for peer in (BARE, HF, TRL) if peer.installed and peer.runner in selected]
    for system in (*peers, LLMFT):
        print(f"  {system.name}: {versions(system)}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["HF_DATASETS_CACHE"] = str(folder / "cache")
        shared = overrides(options.steps, options.base, options.model, options.batch)
        works = {rank: dump(folder, [*shared, f"lora.r={rank}"], options.steps, f"adapter-{rank}") for rank in RANKS}
        (folder / "work.json").write_text((folder / f"work-{RANKS[0]}.json").read_text())
        micros = [micro for micro in (1, 4, 16) if micro <= options.batch]
        chosen = [best_of(peer, works[RANKS[0]], micros, (None, 1)) for peer in peers]
        actions: dict[str, Callable[[], Losses]] = {
            "llmft -m": lambda: llmft_sweep(folder, SWEPT, shared),
            "llmft -m sweep.workers=2": lambda: llmft_sweep(folder, SWEPT, [*shared, "sweep.workers=2"]),
        }
        for peer in chosen:
            actions[f"8 x {peer.name}"] = partial(processes, peer, works, options.steps, 1)
        fastest = chosen[0]
        actions[f"8 x {fastest.name}, 2 at a time"] = lambda: processes(fastest, works, options.steps, 2)
        measured: dict[str, list[tuple[float, float, Losses]]] = {name: [] for name in actions}
        for _ in range(1 if options.quick else options.rounds):
            for name, action in actions.items():
                try:
                    measured[name].append(used(action))
                except RuntimeError as error:
                    print(f"left out: {name}: {error}")
        show(measured, f"8 trials of {options.steps} steps of {options.batch} rows, base in {options.base}")


def show(measured: dict[str, list[tuple[float, float, Losses]]], title: str) -> None:
    """Prints the table without lines whose losses differ from the first peer's."""
    reference: Any = next(runs[0][2] for name, runs in measured.items() if name.startswith("8 x") and runs)
    ours = {name: runs for name, runs in measured.items() if name.startswith("llmft") and runs}
    heads = "".join(f"{'against ' + name.split()[-1]:>27}" for name in ours)
    print(f"{title}; ratios of wall (CPU) seconds")
    print(f"{'':36} {'wall s':>7} {'CPU s':>7}{heads}   max |loss difference|")
    for name, runs in measured.items():
        if not runs:
            continue
        worst = max(largest_difference(losses, reference) for _, _, losses in runs)
        if worst > PARITY:
            print(f"{name:36} not shown: its losses differ by {worst:.1e}")
            continue
        wall, cpu = (statistics.median(run[number] for run in runs) for number in (0, 1))
        ratios = ""
        for other in ours.values():
            both = list(zip(runs, other, strict=False))
            by_wall, by_cpu = (statistics.median(a[number] / b[number] for a, b in both) for number in (0, 1))
            ratios += f"{f'{by_wall:.2f}x ({by_cpu:.2f}x)':>27}"
        print(f"{name:36} {wall:7.1f} {cpu:7.1f}{ratios}   {worst:.1e}")


if __name__ == "__main__":
    main()
