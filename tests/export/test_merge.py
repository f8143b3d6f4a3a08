"""A run merged to a standalone model: the same answers by transformers and by llama.cpp, or no file at all."""

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
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from llmft.config.commands import MergeBase, MergeConfig, MergeFormat, PredictConfig
from llmft.core.errors import ConfigError
from llmft.core.files import staged_directory
from llmft.export.llamacpp import is_installed
from llmft.export.targets import NotProved
from llmft.merge import merge
from llmft.predict import predict
from llmft.runs.directory import finished_run
from llmft.runs.predictions import Predictions
from llmft.train import train
from tests.conftest import ROOT, SMALL, compose, run_directory

PROMPT = "Who wrote this text?\n\nThe fox was quite angry."


def predicted(run: Path, **options: Any) -> Predictions:
    options |= {"prompts": [PROMPT], "accelerator": "cpu", "force": True}
    (folder,) = predict(PredictConfig(run=str(run), **options), quiet=True)
    return Predictions.load(folder)


def merged(run: Path, **options: Any) -> Path:
    (path,) = merge(MergeConfig(run=str(run), accelerator="cpu", **options), quiet=True)
    return path


def test_plain_transformers_says_with_a_merged_run_what_the_run_says(two_runs: list[Path], tmp_path: Path) -> None:
    directory = merged(two_runs[0], to=str(tmp_path / "merged"))
    facts = json.loads((directory / "llmft.json").read_text())
    assert facts["dtype"] == "float16"
    assert facts["proof"]["kl_nats"] < 1e-5
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    turns = [{"role": "user", "content": PROMPT}]
    prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt")
    written = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(written, skip_special_tokens=True) == predicted(two_runs[0]).predicted[0]
    assert "generation" not in tokenizer.chat_template
    with_system = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": PROMPT}]
    assert "Be brief.\n\nWho wrote" in tokenizer.apply_chat_template(with_system, tokenize=False)
    assert model.generation_config.eos_token_id == [tokenizer.eos_token_id]
    before = (directory / "model.safetensors").stat().st_mtime_ns
    assert merged(two_runs[0], to=str(tmp_path / "merged")) == directory
    assert (directory / "model.safetensors").stat().st_mtime_ns == before, "what is there is not made again"


@pytest.mark.slow
def test_the_original_base_is_another_model_and_the_bound_is_kept(two_runs: list[Path], tmp_path: Path) -> None:
    directory = merged(two_runs[0], to=str(tmp_path / "a"), base=MergeBase.original)
    assert json.loads((directory / "llmft.json").read_text())["proof"]["kl_nats"] > 1e-4
    with pytest.raises(NotProved, match=r"the merged model differs from the run: KL .*; nothing was written"):
        merged(two_runs[0], to=str(tmp_path / "b"), base=MergeBase.original, bound=1e-6)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.skipif(not is_installed(), reason="xllamacpp is not installed")
@pytest.mark.parametrize("kind", [pytest.param("f16", marks=pytest.mark.slow), "q8_0"])
def test_llama_cpp_says_with_a_gguf_file_what_the_run_says(two_runs: list[Path], tmp_path: Path, kind: str) -> None:
    import xllamacpp

    path = merged(two_runs[1], to=str(tmp_path), format=MergeFormat.gguf, type=kind)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    before = path.stat().st_mtime_ns
    assert merged(two_runs[1], to=str(path), format=MergeFormat.gguf, type=kind) == path
    assert path.stat().st_mtime_ns == before, "what is there is not made again"
    if kind == "q8_0":  # another type at the same path is another file
        merged(two_runs[1], to=str(path), format=MergeFormat.gguf, type="f32")
        assert path.stat().st_mtime_ns > before
        merged(two_runs[1], to=str(path), format=MergeFormat.gguf, type=kind)
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.verbosity, params.warmup = str(path), 256, -1, False
    answer = xllamacpp.Server(params).handle_chat_completions(
        {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": 12, "temperature": 0}
    )
    assert answer["choices"][0]["message"]["content"] == predicted(two_runs[1]).predicted[0]


@pytest.mark.slow
def test_heads_and_full_fine_tunings_are_merged_too(tmp_path: Path) -> None:
    train(compose(*SMALL, f"output_dir={tmp_path}", "task=classification", "data=writers"), quiet=True)
    run = run_directory(tmp_path)
    directory = merged(run)
    model = AutoModelForSequenceClassification.from_pretrained(directory, dtype=torch.float32)
    assert list(model.config.id2label.values()) == json.loads((run / "targets.json").read_text())["labels"]
    with pytest.raises(ConfigError, match="GGUF files contain language models"):
        merged(run, format=MergeFormat.gguf)
    root = tmp_path / "reward"
    train(compose(*SMALL, f"output_dir={root}", "task=reward"), quiet=True)
    directory = merged(run_directory(root))
    reward = AutoModelForSequenceClassification.from_pretrained(directory, dtype=torch.float32)
    assert reward.config.num_labels == 1
    assert json.loads((directory / "llmft.json").read_text())["proof"]["largest_difference"] < 5e-3
    root = tmp_path / "full"
    train(compose(*SMALL, f"output_dir={root}", "lora=none", "quantization=none", "trainer.precision=fp32"), quiet=True)
    facts = json.loads((merged(run_directory(root)) / "llmft.json").read_text())
    assert facts["base"] is None
    assert facts["proof"]["kl_nats"] < 1e-5


def test_a_file_for_lm_studio_is_where_it_looks(two_runs: list[Path], tmp_path: Path, monkeypatch: Any) -> None:
    pytest.importorskip("gguf")
    monkeypatch.setenv("HOME", str(tmp_path))
    run = two_runs[0]
    config = MergeConfig(run=str(run), format=MergeFormat.gguf, type="q8_0", to="lmstudio")
    (path,) = merge(config, quiet=True)
    assert path == tmp_path / ".lmstudio" / "models" / "llmft" / run.name / f"{run.name}-q8_0.gguf"
    assert path.read_bytes()[:4] == b"GGUF"
    (tmp_path / ".lmstudio-home-pointer").write_text(f"{tmp_path / 'elsewhere'}\n")
    (path,) = merge(config, quiet=True)
    assert path.is_relative_to(tmp_path / "elsewhere" / "models")


def test_what_cannot_be_exported_is_named_before_weights_load(
    two_runs: list[Path], tmp_path: Path, monkeypatch: Any
) -> None:
    run = str(two_runs[0])
    with pytest.raises(ConfigError, match="type=q8: no such type; did you mean q8_0"):
        merge(MergeConfig(run=run, format=MergeFormat.gguf, type="q8"))
    (tmp_path / "link").symlink_to("/")
    with pytest.raises(ConfigError, match="neither a run directory nor an adapter"):
        merge(MergeConfig(run=str(tmp_path)))
    with pytest.raises(ConfigError, match="not a run directory"):
        finished_run(tmp_path)
    with pytest.raises(ConfigError, match="to=lmstudio: LM Studio runs GGUF"):
        MergeConfig(run=run, to="lmstudio")
    with pytest.raises(ConfigError, match="converter=/nowhere: no convert_hf_to_gguf"):
        merge(MergeConfig(run=run, format=MergeFormat.gguf, converter="/nowhere"))
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'needs the package gguf: pip install "llmft\[gguf\]"'):
        merge(MergeConfig(run=run, format=MergeFormat.gguf))


def test_a_staged_directory_is_whole_or_not_there(tmp_path: Path) -> None:
    target = tmp_path / "model"

    def fail() -> None:
        with staged_directory(target) as staged:
            (staged / "half").write_text("x")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert not list(tmp_path.iterdir())
    dead = subprocess.Popen(["true"])
    dead.wait()
    (tmp_path / f".model.{dead.pid}.tmp").mkdir()
    (tmp_path / f".model.{os.getpid()}.tmp" / "model").mkdir(parents=True)  # of another container
    for text in ("old", "new"):
        with staged_directory(target) as staged:
            (staged / "file").write_text(text)
    assert [path.name for path in tmp_path.iterdir()] == ["model"], "what a killed process left is gone"
    assert (target / "file").read_text() == "new"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options", "moments"),
    [
        ("model", [], ["", "/**/model.safetensors", "/**/config.json", "/**/tokenizer.json", "/**/README.md"]),
        (
            "model.gguf",
            ["format=gguf", "type=q8_0"],
            ["", "/**/model.safetensors", "/**/tokenizer.json", "/model.gguf"],
        ),
    ],
    ids=["directory", "gguf"],
)
def test_an_export_that_is_killed_leaves_nothing_half_and_goes_on(
    two_runs: list[Path], tmp_path: Path, name: str, options: list[str], moments: list[str]
) -> None:
    """Kills when a file appears: before all weights, amid them, before and in the proof; at first and again."""
    target = tmp_path / name
    command = [sys.executable, "-m", "llmft.merge", f"run={two_runs[0]}", f"to={target}", "force=true", *options]

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen([*command, "accelerator=cpu"], env={**os.environ, "PYTHONPATH": str(ROOT)})

    def kill_when(pattern: str) -> None:
        before = set(tmp_path.glob(pattern))
        process = start()
        while process.poll() is None and not set(tmp_path.glob(pattern)) - before:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, f"it ended before {pattern} was there"

    for moment in moments:
        kill_when(f".{name}.*.tmp{moment}")
        assert not target.exists()
    assert start().wait() == 0
    assert list(tmp_path.iterdir()) == [target], "what killed processes left is gone"
    content = target if target.is_file() else target / "model.safetensors"
    changed, written = content.stat().st_mtime_ns, content.read_bytes()
    kill_when(f".{name}.*.tmp{moments[-1]}")
    assert (content.stat().st_mtime_ns, content.read_bytes()) == (changed, written)
    assert start().wait() == 0
    assert list(tmp_path.iterdir()) == [target]
    assert content.read_bytes() == written
