"""Estimates from measured speeds; a measurement that fails leaves the others unaffected."""

from __future__ import annotations

import csv
import io
import json
import os
import pickle
import select
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llmft import bench as verb
from llmft.benchmarks import measure
from llmft.benchmarks.estimates import Workload, as_csv, inference_hours, max_output_tokens, training_hours
from llmft.benchmarks.measure import Case, Measured, run_case
from llmft.benchmarks.report import cells, lines, page, write_estimates
from llmft.config.commands import BenchConfig
from llmft.config.convert import to_plain
from llmft.core.console import Screen, duration
from llmft.core.errors import ConfigError, DataError
from tests.conftest import ROOT, compose

WORKLOAD = Workload(samples=1300, hours=9.0, rows=1000, epochs=3.0, batch_size=16, inference_rows=16)
SPREAD = {"train": 0.01, "prompt": 0.02, "generate": 0.03}


def measured(inputs: int, outputs: int, quantization: str = "nf4", **changes: Any) -> Measured:
    point = Measured(inputs, outputs, 8000.0, 0.5, 20000.0, 2.0, 40.0, 0.4, 2**30, "2,048 tokens", SPREAD, 3)
    labels = {"model": "tiny", "weights": "own", "device": "CPU, 1 threads", "precision": "fp32"}
    return replace(point, quantization=quantization, context_tokens=4096, **labels, **changes)


def test_the_longest_answer_is_the_last_that_fits_into_the_hours() -> None:
    """1,300 samples, 16 at once, are 82 batches of 395 s: 2 for the prompts, the rest at 0.4 s a token."""
    point = measured(128, 32)
    most, by_context = max_output_tokens(point, WORKLOAD)
    assert most == 1 + int((9 * 3600 / 82 - 2.0) / 0.4) == 983
    assert not by_context
    assert inference_hours(point, WORKLOAD, most) <= 9.0 < inference_hours(point, WORKLOAD, most + 1)
    assert max_output_tokens(replace(point, context_tokens=512), WORKLOAD) == (384, True)
    assert max_output_tokens(point, replace(WORKLOAD, hours=0.01)) == (0, False)
    assert training_hours(point, WORKLOAD) == pytest.approx(3 * 63 * 0.5 / 3600)


def test_durations_are_shown_as_people_say_them() -> None:
    shown = {
        3.6: "3.6 s",
        59.96: "1 min",
        200: "3 min 20 s",
        3599.6: "1 h",
        7500: "2 h 05 min",
        4.32e6: "1,200 h",
    }
    assert {seconds: duration(seconds) for seconds in shown} == shown


def test_table_csv_json_and_page_tell_the_same(tmp_path: Path) -> None:
    rows = [
        measured(128, 32),
        measured(128, 64),
        measured(512, 32),
        measured(512, 64, "none", error="does not fit"),
    ]
    written = write_estimates(rows, WORKLOAD, tmp_path, "Tiny/one", Screen(quiet=True))
    directory = tmp_path / "tiny-one"
    assert json.loads((directory / "bench.json").read_text())["rows"] == json.loads(json.dumps(written))
    table = list(csv.DictReader(io.StringIO((directory / "bench.csv").read_text())))
    assert [line["max_output_tokens"] for line in table] == ["983", "983", "983", ""]
    assert table[3]["error"] == "does not fit"
    html = (directory / "bench.html").read_text()
    for cell in [cell for row in rows for cell in cells(row, WORKLOAD)]:
        assert cell in html
    assert "http" not in html.replace("http-equiv", "")
    assert html.count("<svg") == 1, "nothing was measured of the other"
    assert "128 tokens in, 32 out" in html


def test_the_figure_has_a_line_per_length_of_the_question_and_only_what_was_measured() -> None:
    curves = lines([measured(512, 32), measured(128, 64), measured(128, 32)], WORKLOAD)
    assert {inputs: [outputs for outputs, _ in line] for inputs, line in curves.items()} == {128: [32, 64], 512: [32]}
    assert page([measured(8, 8, error="no time left")], WORKLOAD, "x", [], []).count("<svg") == 0


def test_a_name_from_outside_is_text_in_the_page() -> None:
    bad = replace(measured(8, 8), model="<script>alert(1)</script>")
    assert "<script>alert" not in page([bad], WORKLOAD, "<script>alert(2)</script>", [cells(bad, WORKLOAD)], [])


def test_csv_has_the_columns_of_all_rows() -> None:
    assert as_csv([{"a": 1}, {"b": 2}]).splitlines() == ["a,b", "1,", ",2"]


# ------------------------------------------------------------------------------------------------------ the processes


def three_points(seconds: float = 60.0, folder: str = ".") -> Case:
    config = compose("logger=none")
    return Case(config, [(1, 2), (3, 4), (5, 6)], seconds, repeats=1, inference_rows=1, folder=Path(folder))


def killed_by_one_token_and_crashing_at_three(case: Case, inputs: int, outputs: int) -> tuple[Measured, dict[str, str]]:
    if inputs < 5:
        os.kill(os.getpid(), signal.SIGKILL if inputs == 1 else signal.SIGSEGV)
    return measured(inputs, outputs), {}


def killed_before_a_point() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def leaving(case: Case, inputs: int, outputs: int) -> None:
    os._exit(3)


def slow_from_three_tokens_on(case: Case, inputs: int, outputs: int) -> tuple[Measured, dict[str, str]]:
    time.sleep(60 if inputs == 3 else 0)
    return measured(inputs, outputs), {}


def refusing(case: Case, inputs: int, outputs: int) -> None:
    raise ConfigError("model=x: no such model.")


def writing_its_number(case: Case, inputs: int, outputs: int) -> None:
    (case.folder / "new").write_text(str(os.getpid()))
    (case.folder / "new").rename(case.folder / "number")
    time.sleep(60)


class OfTwoArguments(Exception):
    """An error that cannot be passed between processes."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(first)


def refused(*_: Any) -> None:
    raise DataError("model=x: no such model.")


def faulty(*_: Any) -> None:
    raise OfTwoArguments("a fault", "of a library")


def errors_of(case: Case, monkeypatch: pytest.MonkeyPatch, **functions: Any) -> list[str | None]:
    """Each point's error with `functions` in place of those of the same names in the module."""
    for name, function in functions.items():
        monkeypatch.setattr(measure, name, function)
    return [point.error for point in run_case(case, lambda _: None)[0]]


def test_a_point_that_takes_the_process_along_costs_itself_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    errors = errors_of(three_points(), monkeypatch, measure_if_it_fits=killed_by_one_token_and_crashing_at_three)
    assert errors == ["does not fit", "ended by signal 11", None]


def test_a_process_that_is_killed_before_it_measures_fits_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    errors = errors_of(three_points(), monkeypatch, prepare_process=killed_before_a_point)
    assert errors == ["does not fit"] * 3


def test_a_process_that_leaves_by_itself_is_no_want_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="ended with code 3"):
        errors_of(three_points(), monkeypatch, measure_if_it_fits=leaving)


def test_what_was_not_measured_in_time_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "GRACE_S", 8.0)
    began = time.monotonic()
    errors = errors_of(three_points(5.0), monkeypatch, measure_if_it_fits=slow_from_three_tokens_on)
    assert errors == [None, "no time left", "no time left"]
    assert time.monotonic() - began < 30, "the process is killed, not waited for"


@pytest.mark.parametrize(
    ("fault", "error", "message"),
    [(refused, ConfigError, "^model=x: no such model"), (faulty, RuntimeError, r"(?s)failed:.*in faulty.*a fault")],
)
def test_an_error_of_the_measuring_process_is_raised_here(
    monkeypatch: pytest.MonkeyPatch, fault: Any, error: type[Exception], message: str
) -> None:
    monkeypatch.setattr(measure, "measure", fault)
    with pytest.raises(error, match=message) as raised:
        measure.measure_if_it_fits(three_points(), 1, 2)
    assert str(pickle.loads(pickle.dumps(raised.value))) == str(raised.value)


def test_an_error_of_the_measuring_process_ends_the_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="no such model"):
        errors_of(three_points(), monkeypatch, measure_if_it_fits=refusing)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a process ends with its parent on Linux only")
def test_the_measuring_process_ends_with_a_killed_bench(tmp_path: Path) -> None:
    program = (
        "import sys; from tests.benchmarks import test_estimates as t; "
        "t.measure.measure_if_it_fits = t.writing_its_number; t.run_case(t.three_points(folder=sys.argv[1]), print)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    bench = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], env=environment)
    path, until = tmp_path / "number", time.monotonic() + 60
    while not path.exists() and time.monotonic() < until:
        time.sleep(0.1)
    process = os.pidfd_open(int(path.read_text()))
    bench.kill()
    bench.wait()
    assert select.select([process], [], [], 30)[0], "it has ended"
    os.close(process)


# ------------------------------------------------------------------------------------------------------------ the verb


def bench_config(*overrides: str) -> BenchConfig:
    config: BenchConfig = compose(*overrides, verb="bench", kind=BenchConfig)
    return config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("samples=0", "samples=0: 1 or more"),
        ("hours=-1", "hours=-1.0: above 0"),
        ("input_tokens=[]", r"input_tokens=\[\]: a list of lengths"),
        ("output_tokens=[1]", r"output_tokens=\[1\]: a list of lengths in tokens, 2 or more"),
        ("quantizations=[]", "quantizations=.*one at least"),
        ("max_time=soon", "max_time=soon: a duration"),
        ("lora=none", "quantised weights cannot be trained: set quantizations"),
        ("micro_batch=x", "micro_batch=x"),
    ],
)
def test_what_cannot_be_asked_is_refused_in_one_sentence(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        bench_config(override)


def test_a_case_for_every_model_and_quantisation_with_the_weights_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    import hydra

    from llmft.config.overrides import config_directory

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    config = bench_config("models=[tiny,mistral]", "lora.r=4", "batch_size=8", "gradient_checkpointing=full")
    with hydra.initialize_config_dir(str(config_directory()), version_base="1.3"):
        subjects = verb.subjects_of(config, ["models=[tiny,mistral]", "lora.r=4", "batch_size=8"])
        with pytest.raises(ConfigError, match="model=mistrall: no such option; did you mean model=mistral"):
            verb.subjects_of(replace(config, models=["mistrall"]), [])
        with pytest.raises(ConfigError, match="counts words"):
            verb.subjects_of(replace(config, models=["tfidf"]), [])
    labels = [(subject.label, subject.weights) for subject in subjects]
    assert labels == [
        ("tiny nf4", "own"),
        ("tiny none", "own"),
        ("mistral nf4", "random"),
        ("mistral none", "random"),
    ]
    trainer = to_plain(subjects[3].config)["trainer"]
    assert (subjects[3].config.lora.r, trainer["batch_size"], trainer["gradient_checkpointing"]) == (4, 8, "full")
    assert verb.points_of(config, subjects[0]) == [(128, 32), (128, 128)], "nothing beyond the context of 256"


@pytest.mark.slow
def test_a_model_is_measured_from_the_command_line_to_the_files(tmp_path: Path) -> None:
    arguments = ["quantizations=[none]", "input_tokens=[16]", "output_tokens=[4]", "repeats=2", "batch_size=4"]
    result = subprocess.run(
        [sys.executable, "-m", "llmft.bench", *arguments, f"output_dir={tmp_path}", "format=json", "inference_rows=2"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    (row,) = json.loads(result.stdout)
    assert row["error"] == ""
    assert row["weights"] == "own"
    assert row["train_tokens_per_s"] == pytest.approx(4 * 20 / row["step_s"], rel=1e-3)
    assert row["prompt_tokens_per_s"] == pytest.approx(2 * 16 / row["prompt_s"], rel=1e-3)
    assert row["generated_tokens_per_s"] == pytest.approx(2 / row["token_s"], rel=1e-3)
    assert (row["max_output_tokens"], row["ended_by"]) == (240, "context")
    assert {path.name for path in (tmp_path / "bench" / "tiny").iterdir()} == {"bench.csv", "bench.html", "bench.json"}


@pytest.mark.parametrize(
    "error",
    [RuntimeError("DefaultCPUAllocator: can't allocate memory"), ConfigError("out of memory in loading; try x.")],
)
def test_a_point_without_room_is_told_as_one_that_does_not_fit(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def without_room(*arguments: Any) -> None:
        raise error

    monkeypatch.setattr(measure, "measure", without_room)
    assert measure.measure_if_it_fits(three_points(), 1, 2) is None


def test_random_rows_have_about_the_tokens_that_are_asked_for() -> None:
    from llmft.data.hub import locate
    from llmft.model.tokenizer import load_tokenizer

    model = compose("logger=none").model
    tokenizer = load_tokenizer(model, locate(model))
    rows = measure.random_rows(tokenizer, 40, Measured(200, 50), seed=0)
    prompts = [len(tokenizer(row["prompt"]).input_ids) for row in rows]
    assert sum(prompts) / len(prompts) == pytest.approx(200, rel=0.1)
    assert max(prompts) > 1.1 * min(prompts)
    assert sum(len(tokenizer(row["response"]).input_ids) for row in rows) / 40 == pytest.approx(50, rel=0.15)
