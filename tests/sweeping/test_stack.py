"""Trials at once on one base: each is the run it is alone, and leaves when it ends, however it does."""

from __future__ import annotations

import json
import re
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from llmft.config import Mode, TrainOn
from llmft.errors import ConfigError
from llmft.runs import append_line
from llmft.sweeping.halving import Halving, check_halving, cohorts_of
from llmft.sweeping.supervisor import Listed
from llmft.train import train
from tests.conftest import SMALL, compose
from tests.sweeping.test_supervisor import record, start, statuses, sweep, wait_for_steps


def results(root: Path) -> dict[str, list[bytes]]:
    """What every run's numbers are, byte for byte."""
    names = ("metrics.jsonl", "samples.jsonl", "adapter/adapter_model.safetensors")
    return {run.name: [(run / name).read_bytes() for name in names] for run in sorted((root / "runs").iterdir())}


DIFFERENT = [
    ["lora.r=1", "seed=0", "lora.dropout=0.2"],
    ["lora.r=4", "seed=1", "learning_rate.peak=0.01", "trainer.max_steps=5"],
    ["lora.r=4", "seed=1", "lora.targets=[q_proj,v_proj]", "trainer.batch_size=4"],
    ["lora.r=2", "seed=3", "trainer.gradient_clip=null", "optimizer=sgd"],
]


def test_lanes_of_every_kind_end_as_the_runs_they_are_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmft.schema import to_plain
    from llmft.sweeping.worker import _train
    from llmft.training.lanes import Stack

    monkeypatch.chdir(tmp_path)
    fixed = [*SMALL, "trainer.precision=fp32", "trainer.threads=1"]
    for number, own in enumerate(DIFFERENT):
        train(compose(*fixed, *own, f"output_dir={tmp_path}/alone"), quiet=True)
        assert number == len(list((tmp_path / "alone" / "runs").iterdir())) - 1
    ended: list[dict[str, Any]] = []

    class Silent:
        def step(self, *facts: Any) -> None: ...

        def alive(self) -> None: ...

        def validation(self, *facts: Any) -> None: ...

    def job(number: int) -> Any:
        config = to_plain(compose(*fixed, *DIFFERENT[number], f"output_dir={tmp_path}/stacked"))
        order = {"number": number, "config": config, "arguments": DIFFERENT[number], "overrides": DIFFERENT[number]}
        return lambda lane: ended.append(_train(order, Silent(), lane))  # type: ignore[arg-type]

    stack = Stack()
    forwards: list[int] = []
    original = stack._forward
    monkeypatch.setattr(stack, "_forward", lambda lanes: (forwards.append(len(lanes)), original(lanes)))
    stack.run([(DIFFERENT[number], job(number)) for number in range(len(DIFFERENT))])
    assert [outcome["status"] for outcome in ended] == ["done"] * 4, ended
    assert max(forwards) == 4, "no forward was shared by all"
    assert min(forwards) < 4, "lanes of fewer steps left"
    assert results(tmp_path / "stacked") == results(tmp_path / "alone")


def test_a_failure_costs_one_lane_and_a_kill_sets_the_others_on_their_own(tmp_path: Path) -> None:
    done = sweep(tmp_path, "seed=0,1,2,3", "sweep.stack=4", sabotage="1:raise,3:kill")
    root = tmp_path / "outputs"
    assert done.returncode == 5, done.stderr
    assert statuses(root) == ["done", "failed", "done", "failed"]
    told = record(root)["trials"]
    assert "boom in seed 1" in told[1]["error"]
    assert "SIGKILL" in told[3]["error"]
    again = sweep(tmp_path, "seed=0,1,2,3", "sweep.stack=4")
    assert again.returncode == 0, again.stderr
    assert statuses(root) == ["done"] * 4


@pytest.mark.slow  # the shorter way, a kill, is tested above
def test_a_lane_that_hangs_takes_the_others_along_for_a_while_only(tmp_path: Path) -> None:
    done = sweep(tmp_path, "seed=0,1", "sweep.stack=2", "sweep.silence_limit=8s", sabotage="1:hang")
    assert done.returncode == 5, done.stderr
    assert statuses(tmp_path / "outputs") == ["done", "failed"]
    assert "silence_limit=8s" in record(tmp_path / "outputs")["trials"][1]["error"]


@pytest.mark.slow
def test_a_signal_saves_all_lanes_and_the_same_command_goes_on_to_the_same_numbers(tmp_path: Path) -> None:
    grid = ["seed=0,1,2", "sweep.stack=3", "trainer.max_steps=40", "trainer.checkpoint_every=1", "sweep.report=false"]
    process = start(tmp_path, *grid)
    root = tmp_path / "outputs"
    wait_for_steps(root, 12, process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=90)
    assert process.returncode == 143, output
    # One that had ended by then stays done.
    assert set(statuses(root)) <= {"interrupted", "done"}
    assert "interrupted" in statuses(root)
    again = start(tmp_path, *grid)
    output, _ = again.communicate(timeout=120)
    assert again.returncode == 0, output
    whole = start(tmp_path, *grid, "output_dir=whole")
    output, _ = whole.communicate(timeout=120)
    assert whole.returncode == 0, output
    assert results(root) == results(tmp_path / "whole")


def test_every_lane_has_a_run_of_its_own_in_weights_and_biases(tmp_path: Path) -> None:
    done = sweep(tmp_path, "seed=0,1", "sweep.stack=2", "logger=wandb", "sweep.report=false")
    assert done.returncode == 0, done.stderr
    runs = list((tmp_path / "outputs" / "runs").iterdir())
    found = [sorted(run.glob("wandb/offline-run-*/run-*.wandb")) for run in runs]
    assert [len(files) for files in found] == [1, 1]
    for run, files in zip(runs, found, strict=True):
        content = files[0].read_bytes()
        assert run.name.rpartition("-")[2].encode() in content


def test_the_stacked_launcher_takes_as_many_at_once_as_gain_by_it(tmp_path: Path) -> None:
    done = sweep(tmp_path, "seed=0,1", "hydra/launcher=stacked", "trainer.batch_size=2", "progress=true")
    assert done.returncode == 0, done.stderr
    assert done.stdout.index("trial 2/2 begins") < done.stdout.index("trial 1/2 done")
    (trial,) = halving_trials(tmp_path, {(1, 0): [1.0] * 4})
    trial.config.sweep.stack, trial.config.data.max_tokens = "auto", 512
    lanes = []
    for characters in (10, 200, 800, 100_000):
        trial.row_characters = characters
        lanes.append(trial.lanes)
    assert lanes == sorted(lanes, reverse=True)
    assert (lanes[0], lanes[-1]) == (8, 1)
    trial.config.lora.enabled = False
    assert trial.lanes == 1


def halving_trials(tmp_path: Path, curves: dict[tuple[int, int], list[float]], stack: int = 8) -> list[Any]:
    """Trials of rank and seed, with a record of `curves` at 1/8, 1/4, 1/2 and all of 8 steps."""
    from llmft.runs import Run
    from llmft.sweeping.trials import Trial

    trials = []
    for number, ((rank, seed), curve) in enumerate(curves.items()):
        config = compose(*SMALL, f"lora.r={rank}", f"seed={seed}", f"sweep.stack={stack}", "sweep.halving=true")
        run = Run(tmp_path / f"r{rank}-{seed}", f"{rank}{seed}")
        run.directory.mkdir()
        for step, value in zip((1, 2, 4, 8), curve, strict=True):
            append_line(run.metrics_file, {"step": step, "val/loss_nats": value})
        trials.append(Trial(number, [], [], config, run.key, run, status="running"))
    return trials


def play(trials: list[Any]) -> list[tuple[int, list[int]]]:
    """Which ranks are left after each validation, all trials in step."""
    halving = Halving(cohorts_of(trials, lambda trial: trial.lanes), "val/loss_nats", Mode.min)
    left = []
    answers: list[tuple[Any, Any]] = []

    def note(trial: Any, decision: Any) -> None:
        answers.append((trial, decision))

    for step in (1, 2, 4, 8):
        answers.clear()
        for trial in [t for t in trials if t.status == "running"]:
            halving.ask(trial, step, 8, partial(note, trial))
        for trial, decision in answers:
            if decision is not None:
                trial.mark(*decision)
        left.append((step, sorted({t.config.lora.r for t in trials if t.status == "running"})))
    return left


def test_eight_configurations_become_four_two_and_one_and_the_best_is_left(tmp_path: Path) -> None:
    # The best one at each rung by its own curve; rank 5 begins well and falls behind.
    ends = {1: 0.9, 2: 0.8, 3: 0.7, 4: 0.6, 5: 0.95, 6: 0.5, 7: 0.4, 8: 0.3}
    curves = {(rank, 0): [1.0 if rank == 5 else 1 + end, 1 + end, end, end] for rank, end in ends.items()}
    assert play(halving_trials(tmp_path, curves)) == [(1, [5, 6, 7, 8]), (2, [7, 8]), (4, [8]), (8, [8])]


def test_seeds_go_on_or_stop_together_by_their_mean(tmp_path: Path) -> None:
    # Each rank has one lucky seed; rank 2 is better on average.
    curves = {(1, 0): [0.1] * 4, (1, 1): [2.0] * 4, (2, 0): [0.9] * 4, (2, 1): [0.8] * 4}
    trials = halving_trials(tmp_path, curves, stack=4)
    assert play(trials)[-1] == (8, [2])
    assert [trial.status for trial in trials] == ["pruned", "pruned", "running", "running"]
    assert re.search(r"place 2 of 2; the best 1 go on", str(trials[0].error))


def test_a_cohort_holds_whole_configurations(tmp_path: Path) -> None:
    curves = {(rank, seed): [1.0] * 4 for rank in (1, 2, 3) for seed in (0, 1, 2)}
    trials = halving_trials(tmp_path, curves, stack=8)
    cohorts = cohorts_of(trials, lambda trial: trial.lanes)
    assert [[(t.config.lora.r, t.config.seed) for t in cohort] for cohort in cohorts] == [
        [(1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (2, 2)],
        [(3, 0), (3, 1), (3, 2)],
    ]


def test_trials_are_shared_out_among_free_workers_before_they_are_stacked(tmp_path: Path) -> None:
    curves = {(rank, 0): [1.0] * 4 for rank in range(1, 8)}
    trials = halving_trials(tmp_path, curves)
    trials[6].status = "done"
    listed = Listed(trials[1:])
    assert [listed.share(trials[0], workers) for workers in (1, 2, 4)] == [6, 3, 2]
    assert Listed(trials[1:], cohorts=[trials]).share(trials[0], 2) == 7


def test_heads_for_other_classes_stand_on_other_bases(tmp_path: Path) -> None:
    (trial,) = halving_trials(tmp_path, {(1, 0): [1.0] * 4})
    trial.num_labels = 2
    other = replace(trial, num_labels=3)
    assert trial.lane == other.lane
    for each in (trial, other):
        each.config.task.auto_class = "sequence_classification"
    assert trial.lane != other.lane


def test_halving_refuses_what_it_cannot_compare(tmp_path: Path) -> None:
    trials = halving_trials(tmp_path, {(1, 0): [1.0] * 4}, stack=2)
    with pytest.raises(ConfigError, match=r"trainer.max_steps makes trials of different lengths"):
        check_halving(trials, {"trainer.max_steps": ["1", "2"]})
    with pytest.raises(ConfigError, match=r"3 seeds and folds .* must be 6 or more"):
        check_halving(trials, {"seed": ["0", "1", "2"], "lora.r": ["1", "2"]})
    with pytest.raises(ConfigError, match=r"trainer.validate_every .* at different steps"):
        check_halving(trials, {"trainer.validate_every": ["1", "2"]})
    with pytest.raises(ConfigError, match=r"no two configurations of this sweep train side by side"):
        check_halving(trials, {"learning_rate.schedule": ["cosine"]})
    trials[0].config.data.train_on = TrainOn.all
    with pytest.raises(ConfigError, match=r"with data.train_on=all no validation tells"):
        check_halving(trials, {"lora.r": ["1", "2"]})
    trials[0].config.data.train_on = TrainOn.train
    trials[0].config.sweep.stack = 1
    with pytest.raises(ConfigError, match=r"set sweep.stack=8"):
        check_halving(trials, {"lora.r": ["1", "2"]})


def test_a_sweep_is_halved_and_its_pruned_trials_stay_so(tmp_path: Path) -> None:
    grid = ["lora.r=1,2", "learning_rate.peak=0.00001,0.02", "sweep.stack=4", "sweep.halving=true"]
    grid += ["trainer.max_steps=8", "trainer.validate_every=2"]
    done = sweep(tmp_path, *grid)
    root = tmp_path / "outputs"
    assert done.returncode == 0, done.stderr + done.stdout
    trials = record(root)["trials"]
    assert sorted(statuses(root)) == ["done", "pruned", "pruned", "pruned"]
    (winner,) = [trial for trial in trials if trial["status"] == "done"]
    assert "learning_rate.peak=0.02" in winner["overrides"]

    def steps() -> list[int]:
        return [len((root / trial["run"] / "timing.jsonl").read_text().splitlines()) for trial in trials]

    taken = steps()
    before = json.loads((root / winner["run"] / "run.json").read_text())
    again = sweep(tmp_path, *grid)
    assert again.returncode == 0, again.stderr
    assert sorted(statuses(root)) == ["done", "pruned", "pruned", "pruned"]
    assert steps() == taken, "a trial that was dropped went on"
    assert json.loads((root / winner["run"] / "run.json").read_text()) == before
