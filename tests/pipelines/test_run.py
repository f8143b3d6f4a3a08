"""Running chains: only changed stages and those that depend on them run again."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.conftest import SMALL

pytestmark = pytest.mark.slow

CHAIN = """# @package _global_
name: mine
stages:
  first:
    overrides: [data=manners, task.max_new_tokens=8]
  samples:
    command: sample
    overrides: ["run=${stage:first}", limit=8, samples=2, "judge=llmft.metrics.rewards.exact_answer", threads=1]
  other:
    overrides: [data=manners, task.max_new_tokens=8, seed=1]
  last:
    overrides: [data=messages, "data.rows={}", "data.files=${stage:samples}/best.jsonl", task.max_new_tokens=8]
compare: [first, last]
judged: ["rows=${stage:first}", split=validation, samples=2, "temperatures=[1.0]", threads=1,
  "judge={function: llmft.metrics.rewards.matches, pattern: friend}"]
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A directory with a test chain."""
    (tmp_path / "conf" / "pipeline").mkdir(parents=True)
    (tmp_path / "conf" / "pipeline" / "mine.yaml").write_text(CHAIN)
    return tmp_path / "conf"


def ready(name: str, output: Path, *overrides: str, training: Sequence[str] = SMALL) -> list[str]:
    """The command of a ready chain with small trainings."""
    shared = ",".join(f"'{override}'" if " " in override else override for override in training)
    chain = [f"pipeline={name}", f"output_dir={output}", f"training=[{shared}]"]
    return [sys.executable, "-m", "llmft.pipeline", *chain, *overrides]


def command(config: Path, output: Path) -> list[str]:
    return [*ready("mine", output), "--config-dir", str(config)]


def written(output: Path) -> dict[str, int]:
    """Modification times of all files of runs and samples except logs and locks."""
    names = ("adapter_model.safetensors", "samples.parquet")
    return {str(path.relative_to(output)): path.stat().st_mtime_ns for path in output.rglob("*") if path.name in names}


def weights(output: Path) -> dict[str, bytes]:
    return {str(p.relative_to(output)): p.read_bytes() for p in output.rglob("adapter_model.safetensors")}


def record(output: Path, name: str = "mine") -> dict[str, str]:
    stages = json.loads((output / "pipelines" / name / "pipeline.json").read_text())["stages"]
    return {name: stage["result"] for name, stage in stages.items()}


def test_a_done_chain_does_nothing_and_a_changed_stage_runs_with_its_dependants_alone(
    config: Path, tmp_path: Path
) -> None:
    output = tmp_path / "outputs"
    subprocess.run(command(config, output), check=True, timeout=600)
    before, results = written(output), record(output)
    report = json.loads((output / "pipelines" / "mine" / "report.json").read_text())
    assert [row["stage"] for row in report["rewards"]] == ["first", "last"]
    subprocess.run(command(config, output), check=True, timeout=600)
    assert written(output) == before
    # Other texts: a stage that reads what it read before is the run that it was before.
    changed = CHAIN.replace("limit=8, samples=2,", 'limit=8, samples=2, "temperatures=[0.5]",')
    assert changed != CHAIN
    (config / "pipeline" / "mine.yaml").write_text(changed)
    subprocess.run(command(config, output), check=True, timeout=600)
    again = record(output)
    assert {name: again[name] == results[name] for name in again} == {
        "first": True, "samples": False, "other": True, "last": False,
    }  # fmt: skip
    assert {path: at for path, at in written(output).items() if path in before} == before


def test_a_killed_chain_ends_where_it_would_have_ended(config: Path, tmp_path: Path) -> None:
    uninterrupted, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run(command(config, uninterrupted), check=True, timeout=600)
    for pattern in ("runs/*/checkpoints/*", "runs/*/samples/*/parts/*", "pipelines/mine/pipeline.json"):
        process = subprocess.Popen(command(config, killed), stdout=subprocess.DEVNULL)
        while process.poll() is None and not list(killed.glob(pattern)):
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    subprocess.run(command(config, killed), check=True, timeout=600)
    assert weights(killed) == weights(uninterrupted)


SWEEP = """# @package _global_
name: mine
stages:
  rates:
    sweep: true
    overrides: [data=manners, task.max_new_tokens=4, "learning_rate.peak=1e-2,1e-7"]
  last:
    overrides: [data=manners, task.max_new_tokens=4, "lora.adapter=${stage:rates}"]
"""


def test_a_sweeps_winner_goes_on_and_a_tie_is_said(config: Path, tmp_path: Path) -> None:
    output = tmp_path / "outputs"
    (config / "pipeline" / "mine.yaml").write_text(SWEEP)
    result = subprocess.run(command(config, output), check=True, timeout=600, capture_output=True, text=True)
    results = record(output)
    assert "lr0.01" in results["rates"]
    assert "continues with  learning_rate.peak=0.01" in result.stdout
    assert f"lora.adapter={results['rates']}" in result.stdout.replace("\n", "")
    same = SWEEP.replace("1e-2,1e-7", "1e-7,1.0001e-7")  # nearly equal
    (config / "pipeline" / "mine.yaml").write_text(same)
    result = subprocess.run(command(config, output), check=True, timeout=600, capture_output=True, text=True)
    assert "a tie: 1 other is not distinguishable from it" in result.stdout


def test_the_chain_from_answers_to_preferences_runs(tmp_path: Path) -> None:
    subprocess.run(ready("sft_dpo", tmp_path), check=True, timeout=600)
    assert set(record(tmp_path, "sft_dpo")) == {"sft", "dpo"}


def test_answers_under_a_system_prompt_are_distilled(tmp_path: Path) -> None:
    small = [override for override in SMALL if not override.startswith("data.rows")]  # the answers are a file
    subprocess.run(ready("distill", tmp_path, training=small), check=True, timeout=600)
    answers = Path(record(tmp_path, "distill")["answers"])
    rows = [json.loads(line) for line in (answers / "all.jsonl").read_text().splitlines()]
    assert rows
    assert all(message["role"] != "system" for row in rows for message in row["messages"])


def test_a_competition_goes_from_its_files_to_a_submission(tmp_path: Path) -> None:
    for name, count in (("train", 60), ("test", 8), ("template", 8)):
        with (tmp_path / f"{name}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["id", "target"] if name == "template" else ["id", "Question", "Response", "target"])
            for n in range(count):
                text = [f"Who sat {n}?", f"The {('cat', 'dog')[n % 2]} sat {n} times."]
                writer.writerow([n, 0] if name == "template" else [n, *text, n % 2])
    files = [f"files.{name}={tmp_path / name}.csv" for name in ("train", "test", "template")]
    small = [override for override in SMALL if not override.startswith("data.rows")]
    subprocess.run(ready("predict_the_llm", tmp_path, *files, training=small), check=True, timeout=1200)
    (submission,) = tmp_path.rglob("submission.csv")
    with submission.open() as file:
        assert [row["id"] for row in csv.DictReader(file)] == [str(n) for n in range(8)]


CONVERSATIONS = """# @package _global_
name: mine
stages:
  sft:
    overrides: [data=hh_rlhf, "data.files={files}", task.max_new_tokens=6]
  safety:
    overrides: [task=reward, data=hh_rlhf, "data.files={files}"]
  helpful:
    overrides: [task=reward, data=hh_rlhf, "data.files={files}", seed=1]
  samples:
    command: sample
    overrides: ["run=${{stage:sft}}", limit=8, samples=4, "temperatures=[0.5,1.0]", threads=1,
      "judge={{safety: '${{stage:safety}}', helpful: '${{stage:helpful}}'}}", combine=llmft.metrics.rewards.llama2]
  rejection:
    overrides: [data=messages, "data.files=${{stage:samples}}/best.jsonl", "lora.adapter=${{stage:sft}}",
      task.max_new_tokens=6]
  ppo:
    overrides: [task=ppo, data=hh_rlhf, "data.files={files}", "lora.adapter=${{stage:rejection}}", task.group=2,
      "task.judges={{safety: '${{stage:safety}}', helpful: '${{stage:helpful}}'}}", combine=x, task.max_new_tokens=6]
compare: [sft, rejection, ppo]
judged: ["rows=${{stage:sft}}", split=validation, samples=2, "temperatures=[1.0]", threads=1,
  "judge={{function: llmft.metrics.rewards.length, target: 3}}"]
""".replace("combine=x", "task.combine=llmft.metrics.rewards.llama2")


def test_whole_conversations_that_differ_in_their_last_answer_go_through_the_whole_chain(
    config: Path, tmp_path: Path
) -> None:
    rows = []
    for n in range(60):
        shared = (
            f"\n\nHuman: Where is cat {n}?\n\nAssistant: Which one?\n\nHuman: The one of house {n % 7}.\n\nAssistant:"
        )
        rows.append({"chosen": f"{shared} In the garden, I am glad to say.", "rejected": f"{shared} Go away {n}."})
    file = tmp_path / "hh.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (config / "pipeline" / "mine.yaml").write_text(CONVERSATIONS.format(files=file))
    small = [override for override in SMALL if not override.startswith("data.rows")]
    output = tmp_path / "outputs"
    subprocess.run([*ready("mine", output, training=small), "--config-dir", str(config)], check=True, timeout=1200)
    report = json.loads((output / "pipelines" / "mine" / "report.json").read_text())
    assert [row["stage"] for row in report["rewards"]] == ["sft", "rejection", "ppo"]
    best = [json.loads(line) for line in (Path(record(output)["samples"]) / "best.jsonl").read_text().splitlines()]
    assert all([m["role"] for m in row["messages"]] == ["user", "assistant", "user", "assistant"] for row in best)


def test_the_embedded_chain_earns_more_at_every_stage(tmp_path: Path) -> None:
    subprocess.run(ready("llama2", tmp_path, training=["logger=none", "progress=false"]), check=True, timeout=1800)
    report = json.loads((tmp_path / "pipelines" / "llama2" / "report.json").read_text())
    assert [(row["from"], row["to"], row["verdict"]) for row in report["steps"]] == [
        ("sft", "rejection", "better"),
        ("rejection", "ppo", "better"),
        ("sft", "ppo", "better"),
    ]
