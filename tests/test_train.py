"""Training: a config becomes a run directory, the same one every time."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from llmft.core.errors import ConfigError
from llmft.train import train
from tests.commands import command
from tests.conftest import ROOT, SMALL, compose, llmft, run_directory
from tests.trust.helpers import LONGER, adapter_bytes, records, start, wait_for_step

OTHER = ["seed=5", "lora.r=4", "trainer.max_steps=1", "trainer.validate_every=1", "task.generate_rows=0"]
OWN = [*SMALL, "data.rows.test=8"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float | None]:
    """(output_dir, metric) of OWN, trained in a process that trained another run before."""
    train(compose(*SMALL, *OTHER, f"output_dir={tmp_path_factory.mktemp('other')}"), quiet=True)
    root = tmp_path_factory.mktemp("trained")
    return root, train(compose(*OWN, f"output_dir={root}"), quiet=True)


@pytest.fixture
def copied(trained: tuple[Path, float | None], tmp_path: Path) -> Path:
    """A copy of its run directory that a test may change."""
    shutil.copytree(trained[0], tmp_path, dirs_exist_ok=True)
    return run_directory(tmp_path)


def test_a_run_validates_trains_validates_and_writes_its_record(trained: tuple[Path, float | None]) -> None:
    root, metric = trained
    directory = run_directory(root)
    validated = [r for r in records(directory) if "val/loss_nats" in r]
    assert [r["step"] for r in validated] == [0, 2, 4]
    assert validated[-1]["val/loss_nats"] < validated[0]["val/loss_nats"]
    assert [r["step"] for r in records(directory) if "train/loss_nats" in r] == [1, 2, 3, 4]
    assert sum("test/loss_nats" in r for r in records(directory)) == 1
    status = json.loads((directory / "run.json").read_text())
    assert status["status"] == "done"
    assert metric == status["result"]["after"]["val/loss_nats"] == min(r["val/loss_nats"] for r in validated)
    environment = json.loads((directory / "environment.json").read_text())
    assert environment["versions"]["torch"] == importlib.metadata.version("torch")
    assert len(environment["data"]["fingerprint"]) == 64
    samples = records(directory, "samples.jsonl")
    assert len([s for s in samples if s["step"] == 4 and s["split"] == "val"]) == 4
    assert set(samples[0]) == {"step", "split", "where", "prompt", "reference", "generated", "scores"}
    assert "val/loss_nats" in (directory / "log.txt").read_text()


def test_the_run_directorys_config_composes_the_same_run_again(trained: tuple[Path, float | None]) -> None:
    from omegaconf import OmegaConf

    from llmft.config.convert import canonical, key_fields, to_config
    from llmft.config.sections import TrainConfig
    from llmft.metrics.monitor import with_mode

    stored = OmegaConf.load(run_directory(trained[0]) / "config.yaml")
    again = to_config(OmegaConf.merge(OmegaConf.structured(TrainConfig), stored), TrainConfig)
    assert canonical(key_fields(again)) == canonical(key_fields(with_mode(compose(*OWN))))


def test_the_second_call_finds_the_finished_run_and_force_runs_it_again(
    trained: tuple[Path, float | None], copied: Path, tmp_path: Path
) -> None:
    overrides, first = [*OWN, f"output_dir={tmp_path}"], trained[1]
    before = {path: path.stat().st_mtime_ns for path in copied.rglob("*") if path.is_file()}
    began = time.process_time()
    assert train(compose(*overrides), quiet=True) == first
    assert time.process_time() - began < 2.0
    changed = [p for p, stamp in before.items() if p.stat().st_mtime_ns != stamp and p.name != ".lock"]
    assert changed == []
    assert train(compose(*overrides, "force=true"), quiet=True) == first
    assert run_directory(tmp_path) == copied
    assert all(path.stat().st_mtime_ns != before[path] for path in copied.glob("adapter/*.safetensors"))


def test_the_same_config_gives_bit_identical_metrics_and_weights(
    trained: tuple[Path, float | None], tmp_path: Path
) -> None:
    """In one process after another run, and in a process that trained nothing: sharing the base changes nothing."""
    result = command("llmft", *OWN, f"output_dir={tmp_path}", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    a, b = run_directory(trained[0]), run_directory(tmp_path)
    assert a.name == b.name
    assert (a / "metrics.jsonl").read_bytes() == (b / "metrics.jsonl").read_bytes()
    assert (a / "samples.jsonl").read_bytes() == (b / "samples.jsonl").read_bytes()
    assert adapter_bytes(a) == adapter_bytes(b)


def test_seeds_differ(trained: tuple[Path, float | None], tmp_path: Path) -> None:
    losses = {train(compose(*OWN, f"output_dir={tmp_path}", f"seed={seed}"), quiet=True) for seed in (1, 2)}
    assert len({trained[1], *losses}) == 3


@pytest.mark.parametrize("trainer", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_two_processes_give_the_numbers_of_one(trainer: str, tmp_path: Path) -> None:
    arguments = ["trainer.batch_size=6", "trainer.micro_batch=100tokens", "data.rows={train: 20, validation: 7}"]
    train(compose(*SMALL, *arguments, f"output_dir={tmp_path}/one"), quiet=True)
    two = llmft(
        *SMALL, *arguments, f"output_dir={tmp_path}/two", f"trainer={trainer}", "trainer.accelerator=cpu", cwd=tmp_path
    )
    assert two.returncode == 0, two.stderr
    a, b = run_directory(tmp_path / "one"), run_directory(tmp_path / "two")
    assert a.name == b.name, "how many processes share the work is no part of the key"
    for ours, theirs in zip(records(a), records(b), strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            assert value == pytest.approx(theirs[name], rel=1e-4), name


def test_plain_peft_and_transformers_load_the_adapter(trained: tuple[Path, float | None]) -> None:
    """An independent loader gets the validation loss that the run recorded."""
    import peft
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    root, metric = trained
    adapter = run_directory(root) / "adapter"
    card = (adapter / "README.md").read_text()
    assert f"# {adapter.parent.name}" in card
    assert "Needed" not in card, "a form that nobody fills in"
    name = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    base = AutoModelForCausalLM.from_pretrained(
        name,
        dtype=torch.float32,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
        ),
    )
    for module in base.modules():  # see llmft.model.quantization.keep_packing
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    model = peft.PeftModel.from_pretrained(base, adapter).eval()
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    from llmft.data.synthetic import writers

    total, count = 0.0, 0
    for row in writers("validation", 12, 0):
        turns = [
            {"role": "user", "content": f"Who wrote this text?\n\n{row['text']}"},
            {"role": "assistant", "content": row["writer"]},
        ]
        ids = tokenizer.apply_chat_template(turns, return_tensors="pt")["input_ids"]
        prompt = tokenizer.apply_chat_template(turns[:1], add_generation_prompt=True)["input_ids"]
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        answer = ids[0, len(prompt) :]
        total -= float(logits.gather(1, answer[:, None]).sum())
        count += len(answer)
    assert total / count == pytest.approx(metric, rel=1e-4)


def test_full_fine_tuning_writes_a_model_that_transformers_loads(small: Callable[..., Any], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    train(small("lora=none", "quantization=none"), quiet=True)
    directory = run_directory(tmp_path) / "model"
    model = AutoModelForCausalLM.from_pretrained(directory)
    base = load_file(ROOT / "llmft" / "assets" / "tiny" / "model.safetensors")
    assert not torch.equal(model.model.norm.weight, base["model.norm.weight"])


def hooks_of(model: Any) -> list[list[Any]]:
    return [[*module._forward_pre_hooks.values(), *module._forward_hooks.values()] for module in model.modules()]


def test_training_leaves_the_base_for_the_next_run_as_it_was(small: Callable[..., Any]) -> None:
    from llmft.model import load

    few = ["trainer.max_steps=1", "trainer.validate_every=1", "task.generate_rows=0"]
    train(small(*few), quiet=True)
    model = load._kept.model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    hooks = hooks_of(model)
    train(small(*few, "seed=1", "lora.r=3", "lora.dropout=0.1"), quiet=True)
    assert load._kept.model is model, "the second run loaded a base of its own"
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert hooks_of(model) == hooks
    assert not any(module._backward_hooks for module in model.modules())


def test_early_stopping_ends_the_run_with_its_best_weights(tmp_path: Path) -> None:
    worse = ["learning_rate.peak=0.5", "trainer.patience=1", "trainer.max_steps=12", "trainer.validate_every=1"]
    train(compose(*SMALL, *worse, "learning_rate=constant", f"output_dir={tmp_path}"), quiet=True)
    directory = run_directory(tmp_path)
    result = json.loads((directory / "run.json").read_text())["result"]
    validated = {r["step"]: r["val/loss_nats"] for r in records(directory) if "val/loss_nats" in r and r["step"]}
    assert result["stopped_early"]
    assert result["steps"] < 12
    assert result["after"]["val/loss_nats"] == min(validated.values())
    assert result["step"] == min(validated, key=lambda step: validated[step])


def test_two_commands_at_once_train_one_run_once(tmp_path: Path) -> None:
    long = "trainer.max_steps=4000"  # the first still holds the lock when the second asks, even on a slow machine
    first = start(tmp_path, long)
    wait_for_step(tmp_path, 1, first)
    with pytest.raises(ConfigError, match=f"process {first.pid} on"):
        train(compose(*LONGER, f"output_dir={tmp_path}", long), quiet=True)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()


CHOICES = [
    ["quantization=fp4"],
    ["quantization=int8"],
    ["quantization=none"],
    ["lora.rslora=true", "lora.alpha=3"],
    ["lora.dora=true"],
    ["lora=attention", "lora.r=2"],
    ["lora.targets=.*mlp.up_proj"],
    ["lora.modules_to_save=[lm_head]"],
    ["optimizer=adamw_8bit"],
    ["optimizer=paged_adamw_8bit"],
    ["optimizer=sgd", "learning_rate.peak=0.1"],
    ["learning_rate=linear", "learning_rate.warmup_steps=2"],
    ["learning_rate=constant"],
    ["trainer.gradient_checkpointing=true"],
    ["trainer.gradient_clip=null"],
    ["trainer.export=last"],
    ["prompt=alpaca", "data.max_tokens=256"],
    ["prompt=llama2", "prompt.system=Be brief."],
    ["trainer.precision=bf16"],
]
TOGETHER = [[0, 3, 8, 11, 16], [1, 5, 9, 12, 14, 17], [2, 4, 10, 13, 15], [6, 7, 18]]
"""Choices that can be combined; a slow test tries each alone."""


@pytest.mark.parametrize("numbers", [*TOGETHER, *(pytest.param([n], marks=pytest.mark.slow) for n in range(19))])
def test_every_choice_trains(small: Callable[..., Any], tmp_path: Path, numbers: list[int]) -> None:
    assert sorted(number for group in TOGETHER for number in group) == list(range(len(CHOICES)))
    train(small(*(override for number in numbers for override in CHOICES[number])), quiet=True)
    validated = [r["val/loss_nats"] for r in records(run_directory(tmp_path)) if "val/loss_nats" in r]
    assert validated[-1] < validated[0]


def test_gradient_checkpointing_changes_no_number(tmp_path: Path) -> None:
    runs = []
    for value in ("true", "false"):
        overrides = [f"output_dir={tmp_path}/{value}", f"trainer.gradient_checkpointing={value}", "lora.dropout=0.1"]
        train(compose(*SMALL, *overrides), quiet=True)
        runs.append(run_directory(tmp_path / value))
    assert len({directory.name for directory in runs}) == 1, "no part of the key"
    assert len({adapter_bytes(directory) for directory in runs}) == 1
    assert len({(directory / "metrics.jsonl").read_bytes() for directory in runs}) == 1


def test_a_random_architecture_of_any_model_trains_without_its_files(small: Callable[..., Any], tmp_path: Path) -> None:
    shape = "{hidden_size: 64, intermediate_size: 128, num_hidden_layers: 2, num_attention_heads: 2, head_dim: 32, "
    shape += "num_key_value_heads: 1, vocab_size: 1024}"
    train(
        small("model=mistral", "model.init=random", f"model.overrides={shape}", "learning_rate.peak=0.01"), quiet=True
    )
    assert "mistral" in run_directory(tmp_path).name


def test_real_input_learns(shared_data: Path, tmp_path: Path) -> None:
    """A public pretrained checkpoint and Alpaca rows, by overrides on the command line."""
    result = command(
        "llmft",
        "model=local",
        f"model.path={shared_data}/models/stories260K",
        "data=alpaca",
        f"data.files={shared_data}/instruction/llamafactory_alpaca_en_demo.json",
        "prompt=alpaca",
        "data.max_tokens=384",
        "data.truncation=drop",
        "data.limit=200",
        "trainer.max_steps=12",
        "trainer.precision=fp32",
        "learning_rate.peak=0.005",
        "task.generate_rows=4",
        "task.max_new_tokens=8",
        "logger=none",
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr
    validated = [r["val/loss_nats"] for r in records(run_directory(tmp_path / "outputs")) if "val/loss_nats" in r]
    assert validated[0] > 4.0
    assert validated[-1] < validated[0] - 0.5


def test_the_embedded_example_reaches_its_numbers(tmp_path: Path) -> None:
    result = llmft("logger=none", cwd=tmp_path, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "Trainer.fit" not in result.stdout + result.stderr, "a library speaks for itself"
    numbers = json.loads((run_directory(tmp_path / "outputs") / "run.json").read_text())["result"]
    assert numbers["after"]["val/exact_match"] > 0.8
    assert numbers["after"]["test/exact_match"] > 0.8
    assert numbers["after"]["val/loss_nats"] < 0.5 * numbers["before"]["val/loss_nats"]


def test_a_damaged_adapter_is_made_again_from_the_best_checkpoint(copied: Path, tmp_path: Path) -> None:
    path = copied / "adapter" / "adapter_model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:100])
    train(compose(*OWN, f"output_dir={tmp_path}"), quiet=True)
    assert path.read_bytes() == content


def test_row_losses_of_every_validation_add_up_to_its_metric(trained: tuple[Path, float | None]) -> None:
    run = run_directory(trained[0])
    said = {
        record["step"]: record["val/loss_nats"]
        for record in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        if "val/loss_nats" in record
    }
    assert sorted(said) == [0, 2, 4]
    for step, loss in said.items():
        rows = pq.read_table(run / "row_losses" / f"val-{step:08d}.parquet").to_pydict()
        assert len(set(rows["row"])) == 12
        assert sum(rows["loss_nats"]) / sum(rows["tokens"]) == pytest.approx(loss, rel=1e-12)
