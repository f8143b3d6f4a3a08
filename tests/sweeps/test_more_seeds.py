"""sweep.seeds_until: the sweep adds trials where the result is open, and resumes where it stopped."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmft.config.sweep import SweepConfig
from llmft.core.console import Screen
from llmft.core.errors import ConfigError
from llmft.runs.directory import Run
from llmft.sweeps.more_seeds import Grid
from llmft.sweeps.progress import SweepProgress
from llmft.sweeps.trials import Sweep, Trial
from tests.conftest import SMALL, compose, llmft
from tests.reports.runs import make_run


class Plans:
    """Makes trials with runs in one directory, and runs them immediately."""

    def __init__(self, root: Path, means: dict[str, float]) -> None:
        self.root, self.means, self.ran = root, means, 0
        self.config = compose()

    def trial(self, number: int, overrides: Sequence[str], varied: Sequence[str]) -> Trial:
        values = dict(override.split("=") for override in overrides)
        config = replace(self.config, seed=int(values["seed"]), output_dir=str(self.root), sweep=self.settings)
        directory = self.root / "runs" / "_".join(overrides).replace(".", "_")
        return Trial(number, list(varied), list(overrides), config, directory.name, Run(directory, directory.name))

    def sweep(self, jobs: Sequence[Sequence[str]], **settings: Any) -> Sweep:
        self.settings = SweepConfig(**settings)
        trials = [self.trial(number, job, job) for number, job in enumerate(jobs)]
        directory = self.root / "sweeps" / "s"
        directory.mkdir(parents=True, exist_ok=True)
        return Sweep(directory, "s", trials, {"lora.r": sorted(self.means)}, "python -m llmft -m")

    def run(self, trial: Trial) -> None:
        values = dict(override.split("=") for override in trial.arguments)
        r, seed = values["lora.r"], int(values["seed"])
        luck = float(np.random.default_rng([int(r), seed]).normal(0.0, 0.01))
        run = make_run(self.root / "made", self.means[r] + luck, lora__r=int(r), seed=seed)
        trial.run.directory.parent.mkdir(parents=True, exist_ok=True)
        run.rename(trial.run.directory)
        trial.run.update(handed_over={})
        trial.mark("done", None)
        self.ran += 1


def spend(plans: Plans, **settings: Any) -> dict[str, int]:
    """Runs all trials that the source yields; returns the number of seeds of each value."""
    jobs = [[f"lora.r={r}", f"seed={seed}"] for r in plans.means for seed in (0, 1, 2)]
    sweep = plans.sweep(jobs, **settings)
    source = Grid(sweep, plans, jobs, SweepProgress(Screen(quiet=True), len(jobs)))  # type: ignore[arg-type]
    source.missing()
    while not source.over():
        trial = source.next()
        if trial is None:
            continue
        if not trial.finished_before():
            plans.run(trial)
        source.ended(trial)
    sweep.write()
    record = json.loads((sweep.directory / "sweep.json").read_text())
    assert len(record["trials"]) == len(sweep.trials)
    return {r: sum(f"lora.r={r}" in trial.overrides for trial in sweep.trials) for r in plans.means}


def test_open_configurations_get_seeds_hopeless_ones_do_not_and_the_same_command_finds_all_done(tmp_path: Path) -> None:
    plans = Plans(tmp_path, {"2": 1.0, "4": 1.001, "8": 1.5})
    assert spend(plans, seeds_until=7, looks=3) == {"2": 7, "4": 7, "8": 3}
    ran = plans.ran
    assert spend(plans, seeds_until=7, looks=3) == {"2": 7, "4": 7, "8": 3}
    assert plans.ran == ran


def test_a_verdict_that_stands_ends_the_sweep(tmp_path: Path) -> None:
    assert spend(Plans(tmp_path, {"2": 1.0, "4": 1.5}), seeds_until=9) == {"2": 3, "4": 3}


def test_nearer_than_the_smallest_difference_is_settled_too(tmp_path: Path) -> None:
    spent = spend(Plans(tmp_path, {"2": 1.0, "4": 1.001}), seeds_until=40, looks=3, smallest_difference=0.05)
    assert spent["2"] == spent["4"] < 40


def test_fewer_seeds_than_the_grid_has_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"sweep.seeds_until=3: the grid has 3 seeds itself"):
        spend(Plans(tmp_path, {"2": 1.0, "4": 1.001}), seeds_until=3)
    for wrong in ({"looks": "often"}, {"looks": 0}, {"seeds_until": 1}, {"smallest_difference": 0.0}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            SweepConfig(**wrong)  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_real_sweep_adds_seeds_and_goes_on_after_the_same_command(tmp_path: Path) -> None:
    # Configs that differ only in a directory's name would be one run; therefore two ranks after four steps.
    question = ["-m", *SMALL, "lora.r=2,3", "seed=0,1", "sweep.seeds_until=4", "sweep.looks=2", "sweep.workers=1"]
    first = llmft(*question, cwd=tmp_path, timeout=300)
    assert first.returncode == 0, first.stderr
    assert "more trials" in first.stdout or "It stands" in first.stdout
    again = llmft(*question, cwd=tmp_path, timeout=300)
    assert again.returncode == 0, again.stderr
    assert "begins" not in again.stdout
    (record,) = (tmp_path / "outputs" / "sweeps").glob("*/sweep.json")
    assert json.loads(record.read_text())["looks"] == 2
