"""The benchmarks run, and compare like with like."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.bench import bench_preference as preference
from tests.bench.bench_step import PARITY, Measured, System, table
from tests.bench.work import Work, make_work
from tests.conftest import ROOT


def test_a_system_with_other_losses_has_no_row() -> None:
    work = Work(Path(), [], [[0, 1]] * 6, [10, 20], [2, 3])

    def measured(name: str, runner: str, shift: float) -> Measured:
        losses = [2.0 + shift] * 4
        return Measured(System(name, runner, None), losses, [[1.0], [2.0]], [1.0, 2.0], {"peak_mib": 1.0})

    systems = [measured("bare", "bare", 0.0), measured("same", "hf", PARITY / 2), measured("other", "trl", PARITY * 2)]
    lines = table([*systems, measured("llmft", "llmft", 0.0)], work, rounds=2, steps=1)
    assert [line.split()[0] for line in lines] == ["system", "bare", "same", "other", "llmft"]
    assert "not shown" in lines[3]
    assert "1.00x" not in lines[3]
    assert lines[1].split()[5:7] == ["22", "4"]  # 30 real tokens, 5 supervised, in one second and in two: the medians


def test_pairs_a_second_count_a_reference_once_and_ratios_are_taken_within_rounds() -> None:
    losses = [0.7, 0.6, 0.5]  # of a warm-up and two rounds of a step
    ours = preference.Measured(preference.LLMFT, losses, [1.0, 2.0], 1.2, 500.0)
    peer = preference.Measured(preference.TRL, [0.7, 0.6, 0.5 + preference.PARITY / 2], [3.0, 4.0], 0.0, 1000.0)
    other = preference.Measured(preference.TRL, [0.7, 0.6, 0.6], [3.0, 4.0], 0.0, 1000.0)
    head, first, second, third = preference.table([ours, peer, other], batch=4, steps=1)
    assert head.split()[:4] == ["s/pair", "reference", "with", "it"]
    assert first.split()[1:] == ["0.375", "0.100", "0.475", "2.11", "500"]
    assert second.split()[1:9] == ["0.875", "0.000", "0.875", "1.14", "1,000", "2.50x", "1.84x", "0.50x"]
    assert "not shown" in third


@pytest.mark.slow
def test_peers_read_the_rows_order_and_adapter_that_llmft_trains(tmp_path: Path) -> None:
    work = make_work("short_answers", tmp_path, steps=2, small_rows=True)
    work_file = json.loads((tmp_path / "work.json").read_text())
    assert [len(batch) for batch in work_file["batches"]] == [16, 16]
    for row, (ids, labels) in enumerate(work_file["rows"]):
        learned = [label for label in labels if label != -100]
        assert ids[-len(learned) :] == learned
        assert ids[0] == 1
        assert ids[-1] == 2
        assert (len(ids), len(learned)) == (work.lengths[row], work.labelled[row])


@pytest.mark.slow
def test_the_gpu_benchmark_runs_on_a_tiny_model(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.bench.bench_gpu", "--device", "cpu", "--model", "tiny", "--tokens", "512"]
    options = ["--steps", "2", "--json", str(tmp_path / "rows.json")]
    result = subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for line in (tmp_path / "rows.json").read_text().splitlines()]
    speeds = {(row["base"], row["system"]): row["tokens_per_s"] for row in rows if "tokens_per_s" in row}
    assert {(base, system) for base in ("nf4", "bf16") for system in ("llmft", "llmft, recomputed")} <= speeds.keys()
    assert all(row["same_bits"] for row in rows if "same_bits" in row)
    assert "not shown" not in result.stdout


@pytest.mark.slow
def test_the_gpu_benchmark_ends_at_its_deadline_with_what_it_has(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.bench.bench_gpu", "--device", "cpu", "--model", "tiny", "--deadline", "1"]
    command += ["--json", str(tmp_path / "rows.json")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=100)
    assert result.returncode == 0
    assert json.loads((tmp_path / "rows.json").read_text().splitlines()[-1])["event"] == "deadline"
