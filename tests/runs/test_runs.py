"""Run directories: named by their config, locked, never overwriting other files."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llmft.core.errors import ConfigError
from llmft.runs.directory import open_run
from llmft.runs.key import run_key
from llmft.runs.naming import MAX_NAME, run_name, slug
from llmft.runs.records import append_line
from tests.conftest import ROOT, compose


def key(*overrides: str, data: str = "data", model: str = "model") -> str:
    return run_key(compose(*overrides), data, model)


def test_the_key_follows_the_content_of_data_and_model_not_their_place() -> None:
    files = ["data=alpaca", "data.files=a.json"]
    assert key(*files) == key("data=alpaca", "data.files=b.json")
    assert key(*files) != key(*files, data="other rows")
    assert key("model.path=x") == key("model.path=y")
    assert key(model="other weights") != key()


KEYS = {
    "": "49236b387a",
    "lora.r=8 seed=0": "49236b387a",
    "model=mistral data=alpaca data.files=a.csv": "98ce860a47",
    "task=classification data=predict_llm data.files=a.csv data.fold=2 lora.r=4": "744bf767f4",
    "data.pseudo_min_confidence=0.9": "adf523f5ca",
}
"""Keys of existing runs by their command line. A new key of the config must not change them."""


def test_a_config_has_the_key_that_it_had_in_earlier_releases_and_other_processes() -> None:
    code = (
        "import json, sys; from tests.runs.test_runs import key\n"
        "print(json.dumps({line: key(*line.split()) for line in json.loads(sys.argv[1])}))"
    )
    for hash_seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        output = subprocess.check_output([sys.executable, "-c", code, json.dumps([*KEYS])], cwd=ROOT, env=environment)
        assert json.loads(output) == KEYS


def test_a_name_cannot_leave_the_output_directory() -> None:
    assert slug("../../etc/passwd") == "etc-passwd"
    assert slug("a/b\\c:d é") == "a-b-c-d"
    assert slug("...") == "run"
    name = run_name(compose("name='../" + "x" * 300 + "'"))
    assert len(name) <= MAX_NAME
    assert "/" not in name


def test_a_renamed_config_finds_its_run_again(tmp_path: Path) -> None:
    run = open_run(compose(f"output_dir={tmp_path}"), "0123456789")
    run.update(status="done")
    assert open_run(compose(f"output_dir={tmp_path}", "name=other"), "0123456789").directory == run.directory


def test_a_foreign_directory_is_not_touched(tmp_path: Path) -> None:
    config = compose(f"output_dir={tmp_path}", "name=mine")
    directory = tmp_path / "runs" / "mine-0123456789"
    directory.mkdir(parents=True)
    (directory / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match="not a run of llmft"):
        open_run(config, "0123456789")
    assert (directory / "thesis.tex").read_text() == "years of work"


def test_a_file_in_the_place_of_the_output_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="output_dir"):
        open_run(compose(f"output_dir={tmp_path}/file"), "0123456789")


def _hold(root: Path, ready: object, release: object) -> None:
    run = open_run(compose(f"output_dir={root}"), "0123456789")
    run.lock()
    run.clear()  # as force=true does; it must still be identifiable
    ready.set()  # type: ignore[attr-defined]
    release.wait(30)  # type: ignore[attr-defined]


def test_two_processes_cannot_train_one_run_and_a_killed_one_leaves_no_lock(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ready, release = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(tmp_path, ready, release))
    other.start()
    assert ready.wait(60)
    run = open_run(compose(f"output_dir={tmp_path}"), "0123456789")
    with pytest.raises(ConfigError, match=f"process {other.pid} on .* is training this run"):
        run.lock()
    other.kill()
    other.join()
    run.lock()
    run.unlock()


def test_records_after_a_step_and_torn_lines_are_dropped_on_resume(tmp_path: Path) -> None:
    run = open_run(compose(f"output_dir={tmp_path}"), "0123456789")
    for step in (1, 2, 3):
        append_line(run.metrics_file, {"step": step, "train/loss_nats": 1.0})
    append_line(run.metrics_file, {"step": 2, "test/loss_nats": 1.0})
    with run.metrics_file.open("a") as file:
        file.write('{"step": 2, "tra')
    run.truncate_records(2)
    assert [json.loads(line)["step"] for line in run.metrics_file.read_text().splitlines()] == [1, 2]


def test_a_torn_line_does_not_spoil_the_next_one(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    path.write_text('{"step": 1}\n{"st')
    append_line(path, {"step": 2})
    assert path.read_text().splitlines()[-1] == '{"step": 2}'
