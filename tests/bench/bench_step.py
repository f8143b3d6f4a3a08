"""Seconds of an optimizer step: llmft against a bare PyTorch loop with PEFT, transformers' Trainer, TRL and others.

    python -m tests.bench.bench_step [--work short_answers|alpaca|stories] [--rounds 5] [--steps 2] [--quick] [--parity]
        [--tuned-only] [--shape '{"hidden_size": 512}'] [--prompts 600,200,1024] [--model DIR] [lora.r=16 …]

All take the same tokens in the same order from the same adapter, in turn, each in a process of its own; medians of
the rounds are printed. Peers get rows of similar length next to each other and the best of micro-batches of 1, 4 and 16
and of one and all threads, which is tried first; "as it comes" is a peer with its own defaults. llmft has its
defaults. The table shows a row only where its losses agree with the bare loop's: over the timed steps, and with
--parity over 50 steps of shorter rows.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from llmft.core.imports import load_libraries
from tests.bench.systems import Runner, System, machine, versions
from tests.bench.work import BATCH_SIZE, Work, make_work

BARE = System("bare PEFT loop", "bare", "hf")
HF = System("HF Trainer + PEFT", "hf", "hf")
TRL = System("TRL SFTTrainer", "trl", "trl")
LLAMA_FACTORY = System("LLaMA-Factory", "llamafactory", "llamafactory")
LITGPT = System("LitGPT", "litgpt", "litgpt", whole_batch=True)
LLMFT = System("llmft", "llmft", None)
PEERS = (BARE, HF, TRL, LLAMA_FACTORY, LITGPT)
DEFAULTS = (replace(HF, name="HF Trainer, as it comes", settings={"micro": 8}),)
PARITY = 1e-4
PARITY_STEPS = 50
WARM_UP = 2


@dataclass
class Measured:
    """One system's measurements."""

    system: System
    losses: list[float] = field(default_factory=list)
    seconds: list[list[float]] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    last: dict[str, Any] = field(default_factory=dict)

    def largest_difference(self, other: Measured) -> float:
        """The largest difference between two systems' losses."""
        return max(abs(a - b) for a, b in zip(self.losses, other.losses, strict=True))


def best_of(peer: System, work: Work, micros: Sequence[int], threads: Sequence[int | None]) -> System:
    """The peer with the micro-batch, and then the threads, whose second step is fastest."""
    micros = [BATCH_SIZE] if peer.whole_batch else micros
    best = replace(peer, settings={**peer.settings, "micro": micros[0], "sorted": True, "threads": threads[0]})
    for key, values in (("micro", micros), ("threads", threads)):
        if len(values) > 1:
            tried = [replace(best, settings={**best.settings, key: value}) for value in values]
            best = min(tried, key=partial(second_step, work=work))
    return best


def second_step(system: System, work: Work) -> float:
    """Seconds of a system's second step; infinite where it fails."""
    runner = Runner(system, work.write("trial", **system.settings))
    try:
        runner.steps(1)
        return float(runner.steps(1)["seconds"][0])
    except RuntimeError as error:
        print(f"left out with {system.settings}: {error}")
        return math.inf
    finally:
        runner.close()


def measure(systems: list[System], work: Work, *, rounds: int, steps: int) -> list[Measured]:
    """`rounds` times `steps` steps of each, after a warm-up; a system that fails is named and left out.

    Each round is shuffled: a system that frees gigabytes leaves the kernel work that the next one waits for.
    """
    measured: list[Measured] = []
    runners: list[Runner] = []
    try:
        for number, system in enumerate(systems):
            runner = Runner(system, work.write(f"work-{number}", **system.settings))
            try:
                answer = runner.steps(WARM_UP)
            except RuntimeError as error:
                print(f"left out: {error}")
                runner.close()
                continue
            runners.append(runner)
            measured.append(Measured(system, answer["losses"], last=answer))
        order = random.Random(0)
        for _ in range(rounds):
            for runner, one in order.sample(list(zip(runners, measured, strict=True)), len(runners)):
                answer = runner.steps(steps)
                one.losses += answer["losses"]
                one.seconds.append(answer["seconds"])
                one.cpu.append(answer["cpu"])
                one.last = answer
    finally:
        for runner in runners:
            runner.close()
    return measured


def table(measured: list[Measured], work: Work, *, rounds: int, steps: int) -> list[str]:
    """Lines of the table; a system whose losses are not the bare loop's has none."""
    runners = {one.system.runner: one for one in measured}
    if not {"bare", "llmft"} <= set(runners):
        raise SystemExit("nothing to compare: the bare loop or llmft was left out.")
    bare, ours = runners["bare"], runners["llmft"]
    spans = [range(WARM_UP + steps * number, WARM_UP + steps * (number + 1)) for number in range(rounds)]
    real = [sum(work.tokens(step)[0] for step in span) for span in spans]
    supervised = [sum(work.tokens(step)[1] for step in span) for span in spans]
    head = f"{'system':26} {'micro':>5} {'thr':>3} {'s/step':>7} {'CPU s':>7} {'real tok/s':>10} {'supervised/s':>12} "
    lines = [head + f"{'MiB':>6} {'llmft is':>9} {'by CPU':>7}   max |loss - bare loop's|"]
    for one in measured:
        difference = one.largest_difference(bare)
        if difference > PARITY:
            lines.append(f"{one.system.name:26} not shown: its losses differ from the bare loop's by {difference:.1e}")
            continue
        seconds = statistics.median(sum(s) for s in one.seconds) / steps
        cpu = statistics.median(one.cpu) / steps
        # Ratios within each round, in which both took the same steps one right after the other.
        ratio = statistics.median(sum(a) / sum(b) for a, b in zip(one.seconds, ours.seconds, strict=True))
        by_cpu = statistics.median(a / b for a, b in zip(one.cpu, ours.cpu, strict=True))
        rate = statistics.median(count / sum(s) for count, s in zip(real, one.seconds, strict=True))
        useful = statistics.median(count / sum(s) for count, s in zip(supervised, one.seconds, strict=True))
        settings = one.system.settings
        lines.append(
            f"{one.system.name:26} {settings.get('micro', '-'):>5} {settings.get('threads') or '-':>3} {seconds:7.3f} "
            f"{cpu:7.3f} {rate:10,.0f} {useful:12,.0f} {one.last['peak_mib']:6,.0f} {ratio:8.2f}x {by_cpu:6.2f}x   "
            f"{difference:.1e} over {len(one.losses)} steps"
        )
    return lines


def parity(systems: list[System], directory: Path) -> list[str]:
    """Losses of 50 steps against the bare loop's, in fp32."""
    work = make_work("short_answers", directory, steps=PARITY_STEPS, small_rows=True)
    lines, reference = [f"parity over {PARITY_STEPS} steps of short rows, fp32, gate {PARITY:.0e}:"], []
    for system in systems:
        runner = Runner(system, work.write("parity", **{"micro": BATCH_SIZE, **system.settings}))
        try:
            losses = runner.steps(PARITY_STEPS)["losses"]
        except RuntimeError as error:
            lines.append(f"  left out: {error}")
            continue
        finally:
            runner.close()
        reference = reference or losses
        off = max(abs(a - b) for a, b in zip(losses, reference, strict=True))
        verdict = "same" if off <= PARITY else "DIFFERENT"
        lines.append(
            f"  {system.name:26} max |loss difference| {off:.1e}  {verdict}  ({losses[0]:.4f} to {losses[-1]:.4f})"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", choices=("short_answers", "alpaca", "stories"), default="short_answers")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="steps of each round")
    parser.add_argument("--quick", action="store_true", help="one round, micro-batches of 4, all threads")
    parser.add_argument("--parity", action="store_true", help="compare losses only")
    parser.add_argument("--micro", help="peers' micro-batches with a comma between them; the best is taken (1,4,16)")
    parser.add_argument("--threads", help="peers' threads likewise; 0: as torch chooses (0,1)")
    parser.add_argument("--shape", help="of the model for short answers, as '{\"hidden_size\": 512}'")
    parser.add_argument("--prompts", default="600,200,1024", help="tokens of theirs: median, shortest, longest")
    parser.add_argument("--model", type=Path, help="directory of a real model for alpaca and short_answers")
    parser.add_argument("more", nargs="*", help="what llmft's config says besides, as lora.r=16; peers follow")
    parser.add_argument("--tuned-only", action="store_true", help="no peers with their own defaults")
    parser.add_argument("--only", help="names of peers with a comma between them: bare,hf,trl,llamafactory,litgpt")
    options = parser.parse_args()
    selected = {"bare", *options.only.split(",")} if options.only else {peer.runner for peer in PEERS}
    peers = [peer for peer in PEERS if peer.runner in selected]
    for peer in peers:
        if not peer.installed:
            print(f"left out: {peer.name} has no environment {peer.environment} (tests/bench/README.md)")
    peers = [peer for peer in peers if peer.installed]
    load_libraries()
    print(machine())
    if not BARE.installed:
        raise SystemExit("no losses to compare with: python -m tests.bench.peers hf")
    for system in (*peers, LLMFT):
        print(f"  {system.name}: {versions(system)}")
    with tempfile.TemporaryDirectory() as folder:
        if options.parity:
            print("\n".join(parity([*peers, LLMFT], Path(folder))))
            return
        rounds = 1 if options.quick else options.rounds
        work = make_work(
            options.work,
            Path(folder),
            steps=WARM_UP + rounds * options.steps,
            shape=json.loads(options.shape or "{}"),
            prompts=tuple(map(int, options.prompts.split(","))),
            model=options.model,
            more=options.more,
        )
        micros = [int(n) for n in (options.micro or ("4" if options.quick else "1,4,16")).split(",")]
        threads = [int(n) or None for n in (options.threads or ("0" if options.quick else "0,1")).split(",")]
        chosen = [best_of(peer, work, micros, threads) for peer in peers]
        defaults = [] if options.tuned_only else [p for p in DEFAULTS if p.runner in selected and p.installed]
        measured = measure([*chosen, *defaults, LLMFT], work, rounds=rounds, steps=options.steps)
        real, supervised = work.tokens(WARM_UP)
        print(f"{options.work}: {BATCH_SIZE} rows a step, about {real:,} tokens of which {supervised} are supervised")
        print("\n".join(table(measured, work, rounds=rounds, steps=options.steps)))


if __name__ == "__main__":
    main()
