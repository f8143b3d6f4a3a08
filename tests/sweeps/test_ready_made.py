"""Every file of sweeps/ composes; command lines of W&B's agents and Hydra's other launchers run."""

from __future__ import annotations

import csv
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import ROOT, SMALL, compose, llmft
from tests.training.test_tracking import collect, offline_files

GRIDS = sorted((ROOT / "sweeps" / "sweep").glob("*.yaml"))
AGENTS = sorted((ROOT / "sweeps" / "wandb").glob("*.yaml"))
FEW = ["trainer.max_steps=2", "trainer.epochs=1"]


@pytest.mark.parametrize("path", GRIDS, ids=lambda path: path.stem)
def test_every_combination_of_a_ready_grid_composes(path: Path) -> None:
    content = yaml.safe_load(path.read_text())
    values = {key: _values(value) for key, value in content["hydra"]["sweeper"]["params"].items()}
    fixed = [f"{key}={value}" for key, value in _flat(content) if not key.startswith(("hydra", "sweep"))]
    data = ["data=alpaca", "data.files=rows.json"] if path.stem == "models" else []
    for combination in itertools.product(*values.values()):
        compose(*data, *fixed, *(f"{key}={value}" for key, value in zip(values, combination, strict=True)))
    command = path.read_text().splitlines()[1]
    assert f"+sweep={path.stem}" in command
    assert content["sweep"]["question"].endswith("?")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["beta", "preference_losses", "margins"])
def test_a_ready_grid_of_preferences_trains_on_the_embedded_pairs_and_is_judged(name: str, tmp_path: Path) -> None:
    few = [override for override in SMALL if not override.startswith("data.rows")]
    rows = ["data.rows={train: 24, validation: 12, test: 0}", "quantization=none", "task.generate_rows=0", "seed=0,1"]
    grid = ["-m", "--config-dir", str(ROOT / "sweeps"), f"+sweep={name}"]
    result = llmft(*grid, *few, *FEW, *rows, cwd=tmp_path, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    (record,) = (tmp_path / "outputs/sweeps").glob("*/sweep.json")
    trials = json.loads(record.read_text())["trials"]
    content = yaml.safe_load((ROOT / "sweeps" / "sweep" / f"{name}.yaml").read_text())
    params = content["hydra"]["sweeper"]["params"]
    values = next(_values(value) for key, value in params.items() if "," in str(value) and key != "seed")
    assert [trial["status"] for trial in trials] == ["done"] * 2 * len(values)
    report = (record.parent / "report.md").read_text()
    assert content["sweep"]["question"] in report
    assert "longer answer wins" in report
    assert len(list((tmp_path / "outputs" / "references").glob("*.parquet"))) == (name != "margins")


def _values(value: Any) -> list[str]:
    return next(csv.reader([value], quotechar="'")) if isinstance(value, str) else [str(value)]


def _flat(content: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    flat: list[tuple[str, Any]] = []
    for key, value in content.items():
        flat += _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(f"{prefix}{key}", value)]
    return flat


def agent_command(path: Path) -> tuple[list[str], dict[str, Any]]:
    """The command line that W&B's agent makes of a sweep file, with the first value of everything."""
    content = yaml.safe_load(path.read_text())
    chosen = {}
    for key, what in content["parameters"].items():
        chosen[key] = what.get("value", what.get("values", [what.get("min")])[0])
    words: list[str] = []
    for word in content["command"]:
        if word == "${args_no_hyphens}":
            words += [f"{key}={value}" for key, value in chosen.items()]
        elif word == "python":
            words.append(sys.executable)
        elif word != "${env}":
            words.append(word)
    return words, chosen


@pytest.mark.parametrize("path", AGENTS, ids=lambda path: path.stem)
def test_the_parameters_of_an_agent_compose_and_are_numbers(path: Path) -> None:
    command, chosen = agent_command(path)
    config = compose(*command[3:])
    assert all(not isinstance(value, str) for value in chosen.values()), "PyYAML reads 2e-4 as text"
    metric = yaml.safe_load(path.read_text())["metric"]
    assert metric == {"name": config.trainer.monitor, "goal": "minimize"}


@pytest.mark.slow
def test_the_command_line_of_an_agent_logs_into_the_run_that_the_agent_made(tmp_path: Path) -> None:
    command, chosen = agent_command(ROOT / "sweeps" / "wandb" / "grid.yaml")
    agent = {"WANDB_SWEEP_ID": "abc", "WANDB_RUN_ID": "given1", "WANDB_MODE": "offline", "SEED": "0"}
    small = [override for override in SMALL if not override.startswith(("lora.r", "logger"))]
    result = llmft(*command[3:], *small, cwd=tmp_path, **agent)
    assert result.returncode == 0, result.stderr
    assert len(offline_files(tmp_path / "outputs")) == 1, result.stdout
    (file,) = offline_files(tmp_path / "outputs")
    run = collect(file)
    assert run["run"].run_id == "given1"
    assert run["config"]["lora.r"] == chosen["lora.r"]
    assert f"lora.r={chosen['lora.r']}" in run["config"]["overrides"]
    # The agent's next trial was done before and still gets its result.
    again = llmft(*command[3:], *small, cwd=tmp_path, **{**agent, "WANDB_RUN_ID": "given2"})
    assert again.returncode == 0, again.stderr
    files = [collect(path) for path in offline_files(tmp_path / "outputs")]
    second = next(f for f in files if f["run"].run_id == "given2")
    assert any("val/loss_nats" in record for record in second["history"])


@pytest.mark.slow
def test_every_trial_and_the_sweep_are_runs_of_one_group_and_one_command_uploads_them(tmp_path: Path) -> None:
    arguments = [
        *SMALL,
        "logger=wandb",
        "seed=0,1",
        "lora.r=1",
        "output_dir=all mine",
        "tags=[night]",
        "sweep.question='Does the seed matter?'",
    ]
    result = llmft("-m", *arguments, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    root = tmp_path / "all mine"  # a folder's name may hold spaces
    trials = [collect(path) for path in offline_files(root)]
    (sweep,) = (root / "sweeps").iterdir()
    assert len(list(sweep.glob("wandb/offline-run-*/*.wandb"))) == 1, result.stdout
    (sweep_run,) = [collect(path) for path in sweep.glob("wandb/offline-run-*/*.wandb")]
    assert {f["run"].run_group for f in [*trials, sweep_run]} == {sweep.name}
    assert [f["run"].job_type for f in trials] == ["train", "train"]
    assert sweep_run["run"].job_type == "sweep"
    assert len({f["run"].run_id for f in [*trials, sweep_run]}) == 3
    assert all("seed=" in " ".join(json.loads(json.dumps(f["config"]["overrides"]))) for f in trials)
    assert any(key.startswith("trials") for record in sweep_run["history"] for key in record)
    assert any(key.startswith("report") for record in sweep_run["history"] for key in record)
    assert "verdicts" in sweep_run["summary"]
    # The one command, run by the shell, passes all folders to W&B.
    (upload,) = [line for line in result.stdout.splitlines() if "wandb sync" in line and "wandb-offline.txt" in line]
    (tmp_path / "wandb").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "wandb").chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    uploaded = subprocess.run(upload, shell=True, cwd=tmp_path, env={**os.environ, "PATH": path}, capture_output=True)
    first, *folders = uploaded.stdout.decode().splitlines()
    assert first == "sync"
    assert len(folders) == 3
    assert all((tmp_path / folder).is_dir() for folder in folders)
    # The same command again logs nothing to W&B.
    llmft("-m", *arguments, cwd=tmp_path)
    assert len(list(sweep.glob("wandb/offline-run-*"))) == 1


def test_the_dashboard_shows_the_swept_keys_of_the_group() -> None:
    pytest.importorskip("wandb_workspaces", reason="an optional package, for online sweeps only")
    from llmft.sweeps.answer import dashboard
    from llmft.sweeps.trials import Sweep, Trial

    config = compose("logger.wandb.project=mine")
    trial = Trial(0, ["lora.r=1", "seed=0"], [], config, "k", None)  # type: ignore[arg-type]
    sweep = Sweep(Path("outputs/sweeps/r_x_seed-12"), "12", [trial], {"lora.r": ["1", "8"], "seed": ["0", "1"]}, "")
    text = dashboard(sweep, "me")._to_model().model_dump_json(by_alias=True)
    for part in ("Parallel Coordinates Plot", "Parameter Importance", "Run History Line Plot", "lora.r", "r_x_seed-12"):
        assert part in text
    assert '"project":"mine"' in text


@pytest.mark.slow
def test_a_sweep_by_slurms_launcher_runs_what_is_missing_and_reports(tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="the extra llmft[slurm] is not installed")
    launcher = "hydra/launcher=submitit_local"
    result = llmft("-m", *SMALL, "seed=0,1,2", launcher, cwd=tmp_path, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    (record,) = (tmp_path / "outputs/sweeps").glob("*/sweep.json")
    assert [trial["status"] for trial in json.loads(record.read_text())["trials"]] == ["done"] * 3
    again = llmft("-m", *SMALL, "seed=0,1,2,3", "lora.r=2", launcher, cwd=tmp_path, timeout=300)
    assert again.returncode == 0, again.stderr
    assert len(list((tmp_path / "outputs/runs").iterdir())) == 4


def test_the_commands_in_the_files_name_the_files() -> None:
    for path in AGENTS:
        assert f"wandb sweep sweeps/wandb/{path.name}" in path.read_text().splitlines()[0]
