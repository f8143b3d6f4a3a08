"""`python -m llmft.sample`: output depends on seed, rows and weights alone; the best are the judge's best."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from llmft.config.commands import SampleConfig
from llmft.core.errors import ConfigError
from llmft.runs.predictions import read_table
from llmft.sample import sample
from llmft.train import train
from tests.conftest import SMALL, compose

LENGTH = "{function: llmft.metrics.rewards.length, target: 3, unit: characters}"
FILES = ("samples.parquet", "best.jsonl", "random.jsonl", "pairs.jsonl", "report.json")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps."""
    directory = tmp_path_factory.mktemp("sampling")
    train(compose(*SMALL, f"output_dir={directory}"), quiet=True)
    (run_folder,) = (directory / "runs").iterdir()
    return run_folder


def sampled(run: Path, *overrides: str) -> Path:
    arguments = [f"run={run}", "samples=4", "temperatures=[0.5,1.5]", "threads=1", *overrides]
    return sample(compose(*arguments, verb="sample", kind=SampleConfig), quiet=True)


def content(directory: Path) -> dict[str, bytes]:
    return {name: (directory / name).read_bytes() for name in FILES}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_files_are_the_same_at_any_batch_size_and_the_best_are_the_judges_argmax(run: Path) -> None:
    one = sampled(run, "limit=6", f"judge={LENGTH}", "batch_size=1", "name=one", "keep=all")
    all_ = sampled(run, "limit=6", f"judge={LENGTH}", "batch_size=64", "name=all", "keep=all")
    assert content(one) == content(all_)
    table = read_table(one / "samples.parquet")
    assert table["temperature"] == [0.5, 0.5, 1.5, 1.5] * 6
    assert table["reward"] == [-abs(len(text) - 3) for text in table["text"]]
    for number, (best, chance) in enumerate(zip(lines(one / "best.jsonl"), lines(one / "random.jsonl"), strict=True)):
        rewards = table["reward"][number * 4 : number * 4 + 4]
        texts = table["text"][number * 4 : number * 4 + 4]
        assert best["reward"] == max(rewards)
        assert best["messages"][-1] == {"role": "assistant", "content": texts[rewards.index(max(rewards))]}
        assert chance["messages"][-1]["content"] in texts
        assert best["id"] == chance["id"]
    for pair in lines(one / "pairs.jsonl"):
        assert pair["chosen"][:-1] == pair["rejected"][:-1]
        assert pair["margin"] > 0
    report = json.loads((one / "report.json").read_text())
    assert report["expected_best"] == sorted(report["expected_best"])
    assert sum(entry["picks"] for entry in report["temperatures"].values()) == pytest.approx(1)


def test_answers_under_a_system_prompt_are_learned_without_it(run: Path) -> None:
    plain, with_system = (
        sampled(run, "limit=3", "temperatures=[0]", "samples=1", *more) for more in ([], ["system='Be brief.'"])
    )
    assert [row["messages"][0] for row in lines(with_system / "all.jsonl")] == [
        row["messages"][0] for row in lines(plain / "all.jsonl")
    ]
    assert read_table(with_system / "samples.parquet")["logprob"] != read_table(plain / "samples.parquet")["logprob"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["judge=llmft.metrics.rewards.lenght"], "did you mean length"),
        (["combine=a"], "no scores to combine"),
        (["samples=3"], "a multiple of the 2 temperatures"),
        (["judge=os.system"], "only llmft.metrics.rewards"),
        (["split=nowhere"], "no such rows"),
        (["temperatures=[-1]"], "temperatures"),
    ],
)
def test_mistakes_are_told_before_the_weights_load(run: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sampled(run, *overrides)


@pytest.mark.slow
def test_killed_at_any_part_the_same_command_ends_at_the_same_files(run: Path) -> None:
    options = ["limit=48", f"judge={LENGTH}", "samples=4", "temperatures=[1.0]", "threads=1"]
    uninterrupted = sampled(run, *options, "name=whole")
    command = [sys.executable, "-m", "llmft.sample", f"run={run}", *options, "name=killed"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not list((run / "samples" / "killed").glob("parts/*.parquet")):
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert content(sampled(run, *options, "name=killed")) == content(uninterrupted)
