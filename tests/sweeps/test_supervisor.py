"""Sweeps: a failed trial affects no other, nothing is done twice, and a trial equals the same run alone.

The ids S1 to S9 are those of the acceptance suite of sweeps: S1 ten trials with every way to fail, S2 the same command
again, S3 kills of the whole sweep, S4 two sweeps at once, S5 a name that is taken, S6 starts in the same second,
S8 one mistake in all trials, S9 a wrong value found before the first begins.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from llmft.core import machine
from llmft.core.errors import ConfigError, DataError
from llmft.core.machine import usable_cores, visible_gpus
from llmft.data import hub
from llmft.sweeps import supervisor
from llmft.sweeps.process import WorkerProcess, WorkerResources, divide_machine, how_it_died
from llmft.sweeps.trials import Trial, identity_of, refuse, varying
from llmft.train import train
from tests.conftest import ROOT, SMALL, compose, llmft

SABOTAGE = """
import ctypes, os, sys, time
if os.environ.get("SABOTAGE"):
    import llmft.training.run
    original = llmft.training.run.train
    def train(config, **arguments):
        deed = dict(pair.split(":") for pair in os.environ["SABOTAGE"].split(",")).get(str(config.seed))
        if deed == "raise":
            raise RuntimeError(f"boom in seed {config.seed}")
        if deed == "exit":
            sys.exit(0)
        if deed == "kill":
            os.kill(os.getpid(), 9)
        if deed == "crash":
            ctypes.string_at(0)
        if deed == "hang":
            time.sleep(1000)
        return original(config, **arguments)
    llmft.training.run.train = train
"""
"""Runs at the start of every Python process: failures that no config can name, since targets are allow-listed."""


ONE = "sweep.workers=1"
"""Otherwise the number of cores would decide which trials run at the same time."""


def sweep(tmp_path: Path, *arguments: str, timeout: float = 180, sabotage: str = "") -> Any:
    """Runs a sweep below tmp_path with one worker; `sabotage` lists seeds and how they fail."""
    (tmp_path / "sabotage").mkdir(exist_ok=True)
    (tmp_path / "sabotage" / "sitecustomize.py").write_text(SABOTAGE)
    path = os.pathsep.join([str(tmp_path / "sabotage"), str(ROOT)])
    return llmft("-m", *SMALL, ONE, *arguments, cwd=tmp_path, timeout=timeout, PYTHONPATH=path, SABOTAGE=sabotage)


def start(tmp_path: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "llmft", "-m", *SMALL, ONE, *arguments],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
    )


def record(root: Path) -> dict[str, Any]:
    (path,) = (root / "sweeps").glob("*/sweep.json")
    return json.loads(path.read_text())


def statuses(root: Path) -> list[str]:
    return [trial["status"] for trial in record(root)["trials"]]


def modified(root: Path) -> dict[str, int]:
    """Modification times of the files of every finished run."""
    runs = [
        path.parent for path in (root / "runs").glob("*/run.json") if json.loads(path.read_text())["status"] == "done"
    ]
    return {
        str(f): f.stat().st_mtime_ns
        for run in runs
        for f in sorted(run.rglob("*"))
        if f.is_file() and f.name != ".lock"
    }


RAISE, KILL, HANG = ("raise", "RuntimeError: boom in seed "), ("kill", "SIGKILL"), ("hang", "heartbeat_timeout=8s")
EVERY_WAY = {1: RAISE, 3: KILL, 4: HANG, 5: ("exit", "sys.exit(0)"), 7: ("crash", "SIGSEGV")}


@pytest.mark.parametrize(
    "ways", [{1: RAISE, 2: KILL, 3: HANG}, pytest.param(EVERY_WAY, marks=pytest.mark.slow)], ids=["three", "every"]
)
def test_s1_s2_every_way_to_fail_costs_one_trial_and_the_same_command_runs_those_alone(
    ways: dict[int, tuple[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = {number: text for number, (_, text) in ways.items()}
    count = max(ways) + 2
    seeds = [f"seed={','.join(map(str, range(count)))}", "trainer.max_steps=2", "sweep.report=false"]
    sabotage = ",".join(f"{number}:{deed}" for number, (deed, _) in ways.items())
    first = sweep(tmp_path, *seeds, "sweep.heartbeat_timeout=8s", sabotage=sabotage)
    root = tmp_path / "outputs"
    assert first.returncode == 5, first.stderr
    assert f"{len(ways)} of {count} trials failed" in first.stderr
    for number, trial in enumerate(record(root)["trials"]):
        assert trial["status"] == ("failed" if number in expected else "done")
        if number in expected:
            assert expected[number] in trial["error"]
            assert trial["command"] in first.stdout.replace("\n", "")
            assert Path(tmp_path / trial["log"]).is_file()
    # The command shown for a trial runs that trial alone.
    again = record(root)["trials"][1]["command"].removeprefix("python -m llmft ")
    monkeypatch.chdir(tmp_path)
    train(compose(*shlex.split(again)), quiet=True)
    before = modified(root)
    second = sweep(tmp_path, *seeds)
    assert second.returncode == 0, second.stderr
    assert statuses(root) == ["done"] * count
    assert second.stdout.count("was done before") == count - len(ways) + 1
    assert {name: modified(root)[name] for name in before} == before, "a finished run was touched"


@pytest.mark.slow
def test_s3_a_sweep_killed_again_and_again_runs_each_trial_once_and_leaves_no_process(tmp_path: Path) -> None:
    arguments = ["seed=0,1,2,3,4", "trainer.max_steps=12", "trainer.checkpoint_every=1"]
    root = tmp_path / "outputs"
    for steps in (5, 20, 40):
        process = start(tmp_path, *arguments)
        wait_for_steps(root, steps, process)
        children = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        process.communicate()
        before = modified(root)
        _, alive = psutil.wait_procs(children, timeout=20)
        assert not alive, "a worker outlived its supervisor"
    last = sweep(tmp_path, *arguments)
    assert last.returncode == 0, last.stderr
    assert statuses(root) == ["done"] * 5
    assert {name: modified(root)[name] for name in before} == before
    for seed in range(5):
        train(compose(*SMALL, *arguments[1:], f"seed={seed}", f"output_dir={tmp_path}/whole"), quiet=True)
    for run in sorted((tmp_path / "whole" / "runs").iterdir()):
        same_files(run, root / "runs" / run.name)


def wait_for_steps(root: Path, steps: int, process: subprocess.Popen[str]) -> None:
    """Waits until the runs below `root` have taken `steps` optimizer steps in all."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if sum(file.read_bytes().count(b"train/loss_nats") for file in root.glob("runs/*/metrics.jsonl")) >= steps:
            return
        time.sleep(0.01)
    raise AssertionError(f"never took {steps} steps: {process.communicate(timeout=5)[0]}")


def same_files(one: Path, other: Path) -> None:
    for name in ("metrics.jsonl", "samples.jsonl", "adapter/adapter_model.safetensors"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), f"{one.name}/{name}"


@pytest.mark.slow
def test_s4_two_sweeps_at_once_share_their_trials(tmp_path: Path) -> None:
    one = start(tmp_path, "seed=0,1,2,3", "trainer.max_steps=30")
    two = start(tmp_path, "seed=3,2,1,0,4", "trainer.max_steps=30")
    outputs = [process.communicate(timeout=180)[0] for process in (one, two)]
    assert (one.returncode, two.returncode) == (0, 0), outputs
    runs = list((tmp_path / "outputs" / "runs").iterdir())
    assert len(runs) == 5
    for run in runs:
        steps = [
            r["step"]
            for r in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
            if "train/loss_nats" in r
        ]
        assert steps == list(range(1, 31)), "a trial was trained twice"
    assert sum(len(re.findall(r"^trial \d/\d done ", text, re.M)) for text in outputs) == 9


def test_s5_a_name_that_another_sweep_has_is_refused_and_its_record_stays(tmp_path: Path) -> None:
    few = ["trainer.max_steps=2", "sweep.report=false", "sweep.name=night"]
    assert sweep(tmp_path, "seed=0,1", *few).returncode == 0
    known = (tmp_path / "outputs/sweeps/night/sweep.json").read_bytes()
    other = sweep(tmp_path, "lora.r=1,2", "seed=0,1", *few)
    assert other.returncode == 2
    assert "contains another sweep (seed, 2 trials), not this one (lora.r x seed, 4 trials)" in other.stderr
    assert (tmp_path / "outputs/sweeps/night/sweep.json").read_bytes() == known


STARTS = """
import multiprocessing, sys
from llmft.core.errors import RunBusy
from llmft.training.prepare import prepare
from tests.conftest import SMALL, compose

root, *seeds = sys.argv[1:]
configs = [compose(*SMALL, f"output_dir={root}", f"seed={seed}") for seed in seeds]
together, over = multiprocessing.Barrier(len(seeds)), multiprocessing.Event()
taken = multiprocessing.Queue()

def take(config):
    together.wait(60)
    run = prepare(config).run
    try:
        run.lock()
    except RunBusy:
        taken.put(False)
    else:
        taken.put(True)
        over.wait(120)

started = [multiprocessing.Process(target=take, args=(config,)) for config in configs]
for process in started:
    process.start()
found = [taken.get(timeout=120) for _ in started]
over.set()
for process in started:
    process.join(60)
print(found.count(True), [process.exitcode for process in started])
"""
"""Starts the first half of several trainings at the same moment; forked before any library has threads."""


@pytest.mark.parametrize(("seeds", "expected"), [(range(8), 8), ([0] * 8, 1)], ids=["eight runs", "one run"])
def test_s6_eight_starts_in_one_second_make_as_many_runs_as_there_are_configs(
    seeds: Sequence[int], expected: int, tmp_path: Path
) -> None:
    result = subprocess.run(
        [sys.executable, "-c", STARTS, str(tmp_path), *map(str, seeds)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.stdout.strip() == f"{expected} {[0] * 8}", result.stderr
    assert len(list((tmp_path / "runs").iterdir())) == expected


@pytest.mark.slow
def test_s8_a_sweep_ends_early_when_all_trials_die_of_one_mistake(tmp_path: Path) -> None:
    result = sweep(tmp_path, "seed=0,1,2,3,4,5,6", sabotage=",".join(f"{n}:raise" for n in range(7)))
    assert result.returncode == 5
    assert statuses(tmp_path / "outputs") == ["failed"] * 3 + ["pending"] * 4
    assert "3 trials in a row failed with the same error" in result.stderr


def test_s9_a_part_that_cannot_be_built_is_found_before_the_first_trial(tmp_path: Path) -> None:
    result = sweep(tmp_path, "seed=0", "trainer.monitor=val/loss_nats,val/loss")
    assert result.returncode == 2
    assert "trainer.monitor=val/loss: no such metric; did you mean val/loss_nats?" in result.stderr
    assert not (tmp_path / "outputs/runs").exists()


def test_a_signal_saves_what_is_under_way_and_the_same_command_goes_on(tmp_path: Path) -> None:
    arguments = ["seed=0,1", "trainer.max_steps=80", "trainer.validate_every=80", "sweep.report=false"]
    process = start(tmp_path, *arguments)
    root = tmp_path / "outputs"
    wait_for_steps(root, 5, process)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 143, output
    assert "the same command goes on" in output
    assert statuses(root) == ["interrupted", "pending"]
    (run,) = (root / "runs").iterdir()
    assert list((run / "checkpoints").iterdir())
    result = sweep(tmp_path, *arguments)
    assert result.returncode == 0, result.stderr
    assert "resumed" in (run / "log.txt").read_text()


def test_a_trial_of_a_sweep_is_the_run_it_is_alone_and_says_what_it_reused(tmp_path: Path) -> None:
    arguments = ["lora.dropout=0.1", "sweep.report=false"]
    result = sweep(tmp_path, *arguments, "lora.r=1,4", "prompt=alpaca_short,plain", "quantization=nf4,none")
    assert result.returncode == 0, result.stderr
    trials = record(tmp_path / "outputs")["trials"]
    assert len(trials) == 8
    reused = []
    for trial in trials:
        run = tmp_path / "outputs" / trial["run"]
        reused.append(json.loads((run / "environment.json").read_text())["reused"]["base"])
    assert reused.count(False) == 2, "one base per quantisation, although that is the innermost key"
    for trial in (trials[2], trials[7]):
        train(compose(*SMALL, *arguments, *trial["overrides"], f"output_dir={tmp_path}/alone"), quiet=True)
        name = Path(trial["run"]).name
        same_files(tmp_path / "outputs/runs" / name, tmp_path / "alone/runs" / name)


@pytest.mark.slow
def test_two_workers_share_the_trials_and_give_the_same_numbers(tmp_path: Path) -> None:
    result = sweep(tmp_path, "seed=0,1,2,3", "sweep.workers=2")
    assert result.returncode == 0, result.stderr
    logs = [path.read_text().count("--- trial") for path in tmp_path.glob("outputs/sweeps/*/worker-*.log")]
    assert len(logs) == 2
    assert sum(logs) == 4
    for seed in range(4):
        train(compose(*SMALL, f"seed={seed}", f"output_dir={tmp_path}/alone"), quiet=True)
    for run in (tmp_path / "alone/runs").iterdir():
        same_files(run, tmp_path / "outputs/runs" / run.name)


@pytest.mark.slow
def test_a_distributed_trial_of_a_sweep_gives_the_numbers_it_gives_alone(tmp_path: Path) -> None:
    arguments = ["trainer=ddp", "trainer.accelerator=cpu"]
    result = sweep(tmp_path, *arguments, "seed=1")
    assert result.returncode == 0, result.stdout + result.stderr
    alone = llmft(*SMALL, *arguments, "seed=1", "output_dir=alone", cwd=tmp_path)
    assert alone.returncode == 0, alone.stderr
    (run,) = (tmp_path / "alone/runs").iterdir()
    same_files(run, tmp_path / "outputs/runs" / run.name)


@pytest.mark.slow
def test_a_distributed_trial_whose_supervisor_is_killed_ends_too(tmp_path: Path) -> None:
    process = start(tmp_path, "trainer=ddp", "trainer.accelerator=cpu", "seed=1", "trainer.max_steps=4000")
    wait_for_steps(tmp_path / "outputs", 5, process)
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= 2
    process.kill()
    process.communicate()
    _, alive = psutil.wait_procs(children, timeout=40)
    assert not alive
    (run,) = (tmp_path / "outputs/runs").iterdir()
    assert list((run / "checkpoints").iterdir()), "it saved before it ended"


@pytest.mark.slow
def test_a_twin_of_a_known_run_is_stopped_recorded_and_not_run_again(tmp_path: Path) -> None:
    arguments = ["trainer.max_steps=12", "trainer.validate_every=2", "data.split_seed=0"]
    train(compose(*SMALL, *arguments, f"output_dir={tmp_path}/outputs"), quiet=True)
    (reference,) = (tmp_path / "outputs/runs").iterdir()
    # The same weights under another run name: a rate that differs in its last digit.
    twins = [*arguments, f"sweep.early_stop_if_same_as={reference}", "learning_rate.peak=0.0020000001,0.02"]
    unsaid = sweep(tmp_path, *twins)
    assert unsaid.returncode == 2
    assert "sweep.early_stop_if_same_as needs sweep.early_stop_noise" in unsaid.stderr
    twins.append("sweep.early_stop_noise=0.001")
    result = sweep(tmp_path, *twins)
    assert result.returncode == 0, result.stderr
    assert statuses(tmp_path / "outputs") == ["twin", "done"]
    error = record(tmp_path / "outputs")["trials"][0]["error"]
    assert "for 3 validations in a row" in error
    assert "at step 6" in error
    before = modified(tmp_path / "outputs")
    again = sweep(tmp_path, *twins)
    assert again.returncode == 0
    assert modified(tmp_path / "outputs") == before


@pytest.mark.slow
def test_memory_after_twenty_trials_is_what_it_was_after_two(tmp_path: Path) -> None:
    process = start(tmp_path, f"seed={','.join(map(str, range(22)))}")
    used: dict[int, int] = {}
    while process.poll() is None:
        reached = [json.loads(p.read_text()).get("status") for p in tmp_path.glob("outputs/runs/*/run.json")]
        for child in psutil.Process(process.pid).children() if process.poll() is None else []:
            used[reached.count("done")] = child.memory_info().rss
        time.sleep(0.05)
    assert process.returncode == 0
    assert used[21] < used[2] * 1.05


def supervisor_of(*trials: Any, workers: Any = "auto") -> Any:
    from llmft.sweeps.supervisor import Supervisor

    config = compose(f"sweep.workers={workers}")
    return Supervisor(SimpleNamespace(config=config, trials=list(trials)), SimpleNamespace(say=print))  # type: ignore[arg-type]


def trial_of(number: int, *overrides: str, weight_bytes: int | None = 2**20) -> Trial:
    return Trial(number, [], [], compose(*overrides), "", SimpleNamespace(), weight_bytes=weight_bytes)  # type: ignore[arg-type]


def test_small_models_take_a_worker_per_core_and_others_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "visible_gpus", list)
    monkeypatch.setattr(supervisor, "allotted_cores", lambda: 4)
    monkeypatch.setattr(supervisor, "available_memory", lambda: 64 * 2**30)
    embedded = hub.weight_bytes(hub.locate(compose().model))
    small = [trial_of(number, "trainer.accelerator=cpu", weight_bytes=embedded) for number in range(6)]

    def count(trials: list[Trial], **how: Any) -> int:
        return supervisor_of(*trials, workers=how.pop("workers", "auto")).count_workers(trials, len(trials), grid=True)

    assert count(small) == 4
    assert count(small[:3]) == 3
    assert count(small, workers=2) == 2
    assert count([*small, trial_of(6, weight_bytes=10**9)]) == 1
    assert count([*small, trial_of(6, weight_bytes=None)]) == 1
    assert count([trial_of(n, "trainer.threads=1", weight_bytes=None) for n in range(5)]) == 4
    assert count([trial_of(n, "trainer.threads=2") for n in range(5)]) == 1
    assert supervisor_of(*small).count_workers(small, 6) == 1, "a search's suggestions depend on the number"
    monkeypatch.setattr(supervisor, "available_memory", lambda: 5 * 2**30)
    assert count(small) == 2
    monkeypatch.setattr(supervisor, "visible_gpus", lambda: ["0", "1", "2"])
    assert count(small) == 3


@pytest.mark.parametrize(
    "files",
    [
        {
            "memory.max": "1000",
            "memory.current": "700",
            "memory.stat": "anon 5\ninactive_file 300\n",
            "cpu.max": "150 100",
        },
        {
            "memory/memory.limit_in_bytes": "1000",
            "memory/memory.usage_in_bytes": "700",
            "memory/memory.stat": "inactive_file 300\n",
            "cpu/cpu.cfs_quota_us": "150",
            "cpu/cpu.cfs_period_us": "100",
        },
    ],
)
def test_a_container_has_the_memory_and_the_cores_it_was_given(
    files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "CONTROL_GROUP", tmp_path)
    monkeypatch.setattr(machine, "usable_cores", lambda: 8)
    memory = machine.available_memory()
    assert memory is not None
    assert memory > 1000
    assert machine.allotted_cores() == 8
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    assert machine.available_memory() == 600
    assert machine.allotted_cores() == 2
    unlimited = {"memory.max": "max", "cpu.max": "max 100", "memory/memory.limit_in_bytes": "9223372036854771712"}
    for name, content in {**unlimited, "cpu/cpu.cfs_quota_us": "-1"}.items():
        if name in files:
            (tmp_path / name).write_text(content)
    assert machine.allotted_cores() == 8
    assert machine.available_memory() > 1000


def events_until(worker: WorkerProcess, event: str) -> list[str]:
    """A worker's events up to `event`."""
    deadline = time.monotonic() + 60
    events: list[str] = []
    while event not in events and time.monotonic() < deadline:
        events += [fact["event"] for fact in worker.events()]
        time.sleep(0.02)
    return events


def test_a_worker_has_a_group_cores_and_a_log_of_its_own(tmp_path: Path) -> None:
    core = min(os.sched_getaffinity(0))
    worker = WorkerProcess.start(tmp_path / "sweep/worker-0.log", WorkerResources({"LLMFT_TRIED": "1"}, cores=[core]))
    worker.order(do="check", configs={})
    assert events_until(worker, "checked") == ["ready", "checked"]
    assert os.getpgid(worker.process.pid) == worker.process.pid
    assert os.sched_getaffinity(worker.process.pid) == {core}
    assert psutil.Process(worker.process.pid).environ()["LLMFT_TRIED"] == "1"
    assert worker.log.is_file()
    worker.close()
    assert worker.process.wait() == -signal.SIGTERM, "it leaves when its orders end"


def test_the_devices_are_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,2,5")
    assert visible_gpus() == ["0", "2", "5"]
    assert [s.environment for s in divide_machine(2)] == [
        {"CUDA_VISIBLE_DEVICES": "0,5"},
        {"CUDA_VISIBLE_DEVICES": "2"},
    ]
    assert divide_machine(4)[3].environment == {"CUDA_VISIBLE_DEVICES": "0"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    cores_of = [resources.cores or [] for resources in divide_machine(2)]
    assert len(cores_of) == 2
    assert sorted({core for cores in cores_of for core in cores}) == sorted(os.sched_getaffinity(0))
    assert usable_cores() == len(os.sched_getaffinity(0))


def test_a_process_that_left_without_a_word_is_described() -> None:
    assert how_it_died(-9) == ("the process was killed by SIGKILL (out of memory?)", "signal")
    assert how_it_died(0)[0] == "the process ended with exit code 0 and no result"


def test_what_varies_is_told_from_what_does_not() -> None:
    assert varying([["a=1", "b=2"], ["a=1", "b=3"]]) == {"b"}
    assert varying([["a=1", "b=2"], ["a=1"]]) == {"b"}


def test_a_sweep_is_known_again_whatever_changes_no_numbers() -> None:
    swept = {"lora.r": ["1", "8"], "seed": ["0", "1"]}
    plain = identity_of(swept, ["model=tiny", "trainer.max_steps=4"])
    beside = ["sweep.workers=2", "logger=none", "progress=false", "output_dir=x", "tags=[a]"]
    assert (
        identity_of({"seed": ["1", "0"], "lora.r": ["8", "1"]}, ["trainer.max_steps=4", "model=tiny", *beside]) == plain
    )
    assert identity_of(swept, ["model=tiny", "trainer.max_steps=5"]) != plain


def test_combinations_that_cannot_run_are_named_together() -> None:
    refuse([], 3)
    with pytest.raises(ConfigError, match=r"2 of 3 .*\n  a=1 and 1 more: no") as error:
        refuse([(["a=1"], ConfigError("no")), (["a=2"], ConfigError("no"))], 3)
    assert error.value.exit_code == 2
    with pytest.raises(DataError):
        refuse([(["a=1"], DataError("rows"))], 1)


LATE = """
import os, time
if os.environ.get("LATE"):
    import llmft.training.run
    original = llmft.training.run.train
    def train(config, **arguments):
        import signal
        if config.seed == 0:
            # As a session does whose last step is over: the signal is noted and met by nobody.
            signal.signal(signal.SIGTERM, lambda *_: None)
        found = original(config, **arguments)
        if config.seed == 0:
            time.sleep(8)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        return found
    llmft.training.run.train = train
"""


@pytest.mark.slow
def test_a_worker_that_ends_its_trial_before_it_hears_of_the_limit_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "late").mkdir()
    (tmp_path / "late" / "sitecustomize.py").write_text(LATE)
    path = os.pathsep.join([str(tmp_path / "late"), str(ROOT)])
    limits = ["sweep.time_limit=7s", "sweep.report=false"]
    result = llmft("-m", *SMALL, "seed=0,1", *limits, cwd=tmp_path, timeout=120, PYTHONPATH=path, LATE="1")
    assert result.returncode == 0, result.stdout + result.stderr
    assert statuses(tmp_path / "outputs") == ["done", "done"]


@pytest.mark.slow
def test_a_sweep_under_nohup_outlives_its_terminal(tmp_path: Path) -> None:
    def ignore() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    process = subprocess.Popen(
        [sys.executable, "-m", "llmft", "-m", *SMALL, "seed=0,1", "sweep.report=false", "progress=true"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=ignore,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if "begins" in line or "done" in line:
            process.send_signal(signal.SIGHUP)
    assert process.wait(120) == 0
    assert statuses(tmp_path / "outputs") == ["done", "done"]


def test_null_in_a_list_of_a_sweeps_file_is_null_and_no_word() -> None:
    from llmft.config.hydra_app import make_known
    from llmft.config.sections import TrainConfig

    make_known("train", TrainConfig)
    from hydra_plugins.llmft_sweeping import combinations, parsed  # type: ignore[import-not-found]

    jobs = combinations(parsed(None, {"prompt.system": [None, "Be brief"], "name": None}, []))
    assert [job[0] for job in jobs] == ["prompt.system=null", "prompt.system='Be brief'"]
    assert all(job[1] == "name=null" for job in jobs)
    quoted = combinations(parsed(None, {"prompt.system": ["Be brief, please", "don't, ever", "[a,b]"]}, []))
    assert [job[0] for job in quoted] == [
        "prompt.system='Be brief, please'",
        "prompt.system='don\\'t, ever'",
        "prompt.system='[a,b]'",
    ]


def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    refused = llmft("-m", *SMALL, "seed=0,1", "output_dir=taken", cwd=tmp_path)
    assert refused.returncode == 2, refused.stderr
    assert "output_dir=taken: there is a file in the way" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_a_log_that_is_named_says_where_a_trial_broke(tmp_path: Path) -> None:
    from llmft.core.console import Screen

    screen = Screen(quiet=True)
    screen.open_log(tmp_path / "log.txt")
    try:
        raise RuntimeError("boom")
    except RuntimeError as error:
        screen.log_error(error)
    screen.log_error(ConfigError("lora.r: no."))
    screen.close_log()
    log = (tmp_path / "log.txt").read_text()
    assert "Traceback" in log
    assert "RuntimeError: boom" in log
    assert log.endswith("lora.r: no.\n")


def test_what_was_done_before_counts_as_success_when_others_fail_alike() -> None:
    def stopped(earlier: str) -> str | None:
        trials: list[Any] = [SimpleNamespace(status=earlier, error=None)]
        supervisor = supervisor_of(*trials)
        trials = supervisor.sweep.trials
        for _ in range(3):
            trials.append(SimpleNamespace(status="failed", error="boom"))
            supervisor.count_errors(trials[-1])
        return supervisor.stopped_because

    assert stopped("done") is None
    assert stopped("pending") is not None
