"""Wall and CPU seconds until llmft answers, and until it and its peers have taken their first step.

    python -m tests.bench.bench_startup [--rounds 5] [--quick]

llmft's first step is that of `python -m llmft`: the embedded model in NF4, read, quantised, validated with generations,
one step taken. Peers take the first step on the same model, rows and adapter, which are handed to them as token ids,
and do not validate. Another row is llmft without generations. A peer whose first loss is not the bare loop's is
not shown.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import psutil

from llmft.core.imports import load_libraries
from tests.bench.bench_step import BARE, HF, PARITY, TRL
from tests.bench.bench_sweep import environment
from tests.bench.systems import Runner, System, compile_package, machine
from tests.bench.work import BATCH_SIZE, dump
from tests.conftest import ROOT

ANSWERS = {
    "--help": ["--help"],
    "a mistyped key": ["lora.rr=3"],
    "--cfg job": ["--cfg", "job"],
}
Taken = tuple[float, float]


def command(folder: Path, *arguments: str) -> Taken:
    """(wall, CPU) seconds of a whole command."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    env = {**environment(folder), "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-m", "llmft", *arguments], env=env, capture_output=True, cwd=folder)
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def first_step(folder: Path, *arguments: str) -> Taken:
    """(wall, CPU) seconds of `python -m llmft` until its first step is recorded."""
    with tempfile.TemporaryDirectory(dir=folder) as out:
        began = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-m", "llmft", f"output_dir={out}", *arguments],
            env={**environment(folder), "PYTHONPATH": str(ROOT), "WANDB_MODE": "offline"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=folder,
        )
        try:
            while process.poll() is None:
                if any('"step": 1,' in path.read_text() for path in Path(out).glob("runs/*/timing.jsonl")):
                    wall = time.perf_counter() - began
                    spent = psutil.Process(process.pid).cpu_times()
                    return wall, spent.user + spent.system
                time.sleep(0.01)
            raise RuntimeError(f"python -m llmft left with code {process.returncode} before its first step")
        finally:
            process.kill()
            process.wait()


def peer_step(peer: System, work: Path, losses: dict[str, float]) -> Taken:
    """(wall, CPU) seconds of a peer's process until its first step is taken."""
    runner = Runner(peer, work)
    try:
        answer = runner.steps(1)
    finally:
        runner.close()
    losses[peer.name] = answer["losses"][0]
    return answer["to_first_s"], answer["first_cpu"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="one round")
    options = parser.parse_args()
    compile_package()
    load_libraries()
    print(machine())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["HF_DATASETS_CACHE"] = str(folder / "cache")
        work = dump(folder, ["trainer.accelerator=cpu", "learning_rate=constant", "learning_rate.warmup_steps=0"], 2)
        losses: dict[str, float] = {}
        actions: dict[str, Callable[[], Taken]] = {
            f"llmft {what}": partial(command, folder, *arguments) for what, arguments in ANSWERS.items()
        }
        actions["llmft to its first step"] = partial(first_step, folder)
        actions["llmft, nothing logged or generated"] = partial(
            first_step, folder, "logger=none", "task.generate_rows=0", "task.metrics=[]"
        )
        for peer in (BARE, HF, TRL):
            if peer.installed:
                single_threaded = replace(peer, settings={"micro": BATCH_SIZE, "threads": 1})
                actions[f"{peer.name} to its first step"] = partial(
                    peer_step, single_threaded, work.write(peer.runner, **single_threaded.settings), losses
                )
        runs_of: dict[str, list[Taken]] = {what: [] for what in actions}
        for number in range(1 + (1 if options.quick else options.rounds)):
            for what, action in actions.items():
                try:
                    taken = action()
                except RuntimeError as error:
                    print(f"left out: {what}: {error}")
                    continue
                if number:  # the first fills caches
                    runs_of[what].append(taken)
        print(f"{'':40} {'wall s':>7} {'CPU s':>7}")
        for what, runs in runs_of.items():
            system = what.removesuffix(" to its first step")
            difference = abs(losses.get(system, 0.0) - losses[BARE.name]) if system in losses else 0.0
            if runs and difference > PARITY:
                print(f"{what:40} not shown: its first loss differs from the bare loop's by {difference:.1e}")
            elif runs:
                wall, cpu = (statistics.median(run[index] for run in runs) for index in (0, 1))
                same = f"   first loss within {difference:.1e} of the bare loop's" if system in losses else ""
                print(f"{what:40} {wall:7.2f} {cpu:7.2f}{same}")


if __name__ == "__main__":
    main()
