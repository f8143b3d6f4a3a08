"""Compared answers from token ids to trained policies and reward models."""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, Qwen2Config, Qwen2ForCausalLM

from llmft.config.commands import PredictConfig, PredictData
from llmft.config.sections import TrainConfig
from llmft.core.errors import ConfigError
from llmft.data.batch import MicroBatch, collate
from llmft.data.columns import Conversation
from llmft.data.examples import Example
from llmft.data.preferences import Comparison
from llmft.model.heads import answer_scores
from llmft.model.kernels.packing import enable
from llmft.predict import predict
from llmft.runs.predictions import Predictions, read_table
from llmft.train import train
from llmft.training.objectives.answers import answer_log_probs
from llmft.training.objectives.preference import Preference
from llmft.training.objectives.reward import Reward
from tests.conftest import SMALL, compose, llmft, run_directory
from tests.trust.helpers import same_run, start, wait_for_step, whole_run

SHAPE = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
PAIRS = ["data=pairs", "data.rows={train: 48, validation: 12, test: 0}", "quantization=none"]


def rows_of(*lengths: tuple[int, ...], seed: int = 0) -> list[Example]:
    """Rows of random tokens; `lengths`: tokens of the prompt and of each answer, from the best to the worst."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for number, parts in enumerate(lengths):
        ids = torch.randint(3, 64, (sum(parts),), generator=generator).tolist()
        segments = np.repeat(np.arange(len(parts)), parts).astype(np.uint8)
        answers = len(parts) - 1
        comparison = Comparison(tuple("x" * n for n in range(1, answers)), tuple(range(answers)))
        rows.append(Example(ids, ids, Conversation([], f"f:{number}", comparison=comparison), segments))
    return rows


def batch_of(rows: list[Example]) -> MicroBatch:
    return collate(rows, range(len(rows)), 0)


def model_of(kind: str, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    if kind == "window":  # every layer sees the last 5 tokens alone
        config = Qwen2Config(**SHAPE, num_key_value_heads=2, sliding_window=5, use_sliding_window=True,
                             max_window_layers=0)  # fmt: skip
        return Qwen2ForCausalLM(config).to(dtype).eval()
    model_class = LlamaForSequenceClassification if kind == "reward" else LlamaForCausalLM
    return model_class(LlamaConfig(**SHAPE, num_key_value_heads=2, num_labels=1, pad_token_id=0)).to(dtype).eval()


LENGTHS = ((5, 3, 4), (9, 1, 6), (2, 2, 2), (7, 4, 1), (3, 2, 5, 1))


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("kind", ["llama", "window", "reward"])
def test_answers_that_share_their_prompt_have_the_numbers_and_gradients_of_rows_apart(
    kind: str, dtype: torch.dtype, close: float
) -> None:
    separate = model_of(kind, dtype)
    shared = copy.deepcopy(separate)
    enable(shared)
    batch = batch_of(rows_of(*LENGTHS))
    score: Callable[..., torch.Tensor] = answer_scores if kind == "reward" else answer_log_probs
    one, two = score(separate, batch), score(shared, batch)
    torch.testing.assert_close(one, two, rtol=close, atol=close)
    alone = torch.cat(
        [torch.nn.functional.pad(score(separate, batch_of([row])), (0, 3))[:, :3] for row in rows_of(*LENGTHS)]
    )
    torch.testing.assert_close(one, alone, rtol=close, atol=close)
    one.square().sum().backward()
    two.square().sum().backward()
    for a, b in zip(separate.parameters(), shared.parameters(), strict=True):
        if a.grad is not None and b.grad is not None:
            largest = float(a.grad.abs().max())
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=max(1e-5, close) * largest)


def test_log_probabilities_are_those_of_the_answers_tokens_and_a_score_is_read_at_an_answers_end() -> None:
    model, judge = model_of("llama", torch.float64), model_of("reward", torch.float64)
    (row,) = rows_of((4, 3, 2))
    log_probs = answer_log_probs(model, batch_of([row]))[0].tolist()
    scores = answer_scores(judge, batch_of([row]))[0].tolist()
    for index, (begin, length) in enumerate(((4, 3), (7, 2))):
        ids = torch.tensor([[*row.input_ids[:4], *row.input_ids[begin : begin + length]]])
        logs = model(ids).logits.log_softmax(-1)[0]
        expected = sum(float(logs[3 + n, ids[0, 4 + n]]) for n in range(length))
        assert log_probs[index] == pytest.approx(expected, abs=1e-12)
        hidden = judge.model(ids).last_hidden_state[0, -1]
        assert scores[index] == pytest.approx(float(judge.score(hidden)), abs=1e-6)


@pytest.mark.parametrize("objective", [Preference("sigmoid", 0.2), Reward(0.01)])
def test_micro_batches_add_up_to_one_batch_and_candidates_count_as_the_mean_of_their_pairs(objective: Any) -> None:
    model = model_of("reward" if isinstance(objective, Reward) else "llama", torch.float64)
    rows = rows_of(*LENGTHS)
    together = objective.losses(model, batch_of(rows)).nll
    parts = torch.cat([objective.losses(model, batch_of(part)).nll for part in (rows[:2], rows[2:4], rows[4:])])
    torch.testing.assert_close(together.double(), parts.double(), rtol=1e-5, atol=1e-6)
    last = rows[-1]
    pairs = []
    for better, worse in ((0, 1), (0, 2), (1, 2)):
        assert last.segments is not None
        mask = np.isin(last.segments, (0, better + 1, worse + 1))
        ids = np.asarray(last.input_ids)[mask].tolist()
        comparison = Comparison(("x",), (0, 1))
        segments = np.select([last.segments[mask] == better + 1, last.segments[mask] == worse + 1], [1, 2]).astype(
            np.uint8
        )
        pairs.append(Example(ids, ids, Conversation([], "f", comparison=comparison), segments))
    mean = objective.losses(model, batch_of(pairs)).nll.mean()
    torch.testing.assert_close(together[-1].double(), mean.double(), rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------------------------------- runs


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def adapter(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


def same_tensors(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def trained(config: TrainConfig) -> Path:
    train(config, quiet=True)
    (status,) = [
        path for path in Path(config.output_dir).glob("runs/*/config.yaml") if path.parent.name.endswith(key_of(config))
    ]
    return status.parent


def key_of(config: TrainConfig) -> str:
    from llmft.training.prepare import prepare

    return prepare(config, open_directory=False).run.key


def test_before_the_first_step_the_policy_is_its_reference(small: Callable[..., TrainConfig]) -> None:
    run = trained(small(*PAIRS, "task=dpo"))
    first = next(line for line in metrics(run) if "val/loss_nats" in line)
    assert first["val/loss_nats"] == pytest.approx(math.log(2), abs=1e-12)
    assert first["val/accuracy"] == 0.5
    assert first["val/drift_nats"] == first["val/margin"] == 0.0
    steps = [line["train/loss_nats"] for line in metrics(run) if "train/loss_nats" in line]
    assert steps[0] == pytest.approx(math.log(2), abs=1e-6)
    words = json.loads((run / "run.json").read_text())["result"]["words"]
    assert "answer" in words[0]
    assert "the longer answer wins" in words[1]
    table = read_table(next((run / "row_losses").glob("val-*.parquet")))
    assert {"loss_nats", "ahead", "margin", "chosen_logp", "rejected_logp", "more_tokens"} <= table.keys()


def test_the_reference_is_computed_once_for_a_sweep_and_a_run_goes_on_from_its_own_copy(
    small: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    one = trained(small(*PAIRS, "task=dpo"))
    (shared,) = (tmp_path / "references").glob("*.parquet")
    written = shared.stat().st_mtime_ns
    other = trained(small(*PAIRS, "task=dpo", "task.beta=0.5", "lora.r=4", "seed=3", "task.loss=ipo"))
    assert [*(tmp_path / "references").glob("*.parquet")] == [shared]
    assert shared.stat().st_mtime_ns == written
    tables = [read_table(path) for path in (shared, one / "reference.parquet", other / "reference.parquet")]
    assert tables[0] == tables[1] == tables[2]
    weights = adapter(one)
    for files in ([shared], [shared, one / "reference.parquet"]):
        for path in files:
            path.unlink()
        again = trained(small(*PAIRS, "task=dpo", "force=true"))
        assert again == one
        assert same_tensors(adapter(again), weights)
        assert read_table(one / "reference.parquet") == tables[0]


@pytest.mark.slow
def test_a_damaged_reference_is_computed_anew(small: Callable[..., TrainConfig], tmp_path: Path) -> None:
    run = trained(small(*PAIRS, "task=dpo"))
    weights = adapter(run)
    (shared,) = (tmp_path / "references").glob("*.parquet")
    shared.write_bytes(shared.read_bytes()[:200])
    assert same_tensors(adapter(trained(small(*PAIRS, "task=dpo", "force=true"))), weights)


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param(["task=simpo"], marks=pytest.mark.slow),
        pytest.param(["task=orpo"], marks=pytest.mark.slow),
        pytest.param(["task=dpo", "task.margin=large", "task.sft_weight=0.5"], marks=pytest.mark.slow),
        ["task=dpo", "task.loss=robust", "task.label_smoothing=0.2", "quantization=nf4"],
        ["task=reward", "task.margin={significantly better: 2, better: 1, slightly better: 0.5, unsure: 0}"],
    ],
)
def test_every_task_of_pairs_trains_and_says_what_it_did(
    small: Callable[..., TrainConfig], overrides: list[str]
) -> None:
    run = trained(small(*PAIRS, *overrides))
    last = [line for line in metrics(run) if "val/accuracy" in line][-1]
    assert all(math.isfinite(value) for value in last.values())
    assert 0 <= last["val/accuracy"] <= 1
    assert "val/accuracy_better" in last


@pytest.mark.slow
def test_micro_batches_change_a_training_by_rounding_alone(small: Callable[..., TrainConfig], tmp_path: Path) -> None:
    runs = []
    for size in (1, 8):
        root = tmp_path / str(size)
        runs.append(trained(small(*PAIRS, "task=dpo", f"trainer.micro_batch={size}", f"output_dir={root}")))
    one, two = (adapter(run) for run in runs)
    assert all(torch.allclose(one[name], two[name], atol=2e-5) for name in one)


def test_a_reward_model_is_saved_with_its_head_and_scores_rows_and_candidates_alike(
    small: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    run = trained(small(*PAIRS, "task=reward", "learning_rate.peak=1e-2"))
    assert any("score" in name for name in adapter(run))
    text = "Well, the cow was quite hungry! Well, the hen sat at home then wept!"
    pair = {"id": "a", "text": text, "chosen": "Ben", "rejected": "Amy"}
    other = {"id": "b", "text": text, "chosen": "Amy", "rejected": "Ben"}
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, (pair, other))))
    alone = [{"id": str(n), "text": text, "response": name} for n, name in enumerate(("Ben", "Amy"))]
    (tmp_path / "alone.jsonl").write_text("\n".join(map(json.dumps, alone)))
    predictions = {}
    for name in ("pairs", "alone"):
        (directory,) = predict(PredictConfig(run=[str(run)], data=files(tmp_path / f"{name}.jsonl")), quiet=True)
        predictions[name] = Predictions.load(directory)
    scores = predictions["pairs"].columns["scores"]
    assert scores[0] == pytest.approx(scores[1][::-1], abs=1e-5)
    assert scores[0] == pytest.approx([row[0] for row in predictions["alone"].columns["scores"]], abs=1e-5)
    assert scores[0][0] != scores[0][1]
    assert predictions["pairs"].values[:, 0].tolist() == [row[0] for row in scores]


def files(path: Path) -> Any:
    return PredictData(files=str(path))


def test_a_training_goes_on_from_an_adapter_which_is_its_reference(
    small: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    first = trained(small("quantization=none", "learning_rate.peak=1e-2"))
    from_first = f"lora.adapter={first}"
    run = trained(small(*PAIRS, "task=dpo", from_first))
    start = next(line for line in metrics(run) if "val/loss_nats" in line)
    assert start["val/loss_nats"] == pytest.approx(math.log(2), abs=1e-12)
    assert start["val/accuracy"] == 0.5
    reference = json.loads((run / "environment.json").read_text())["ran"]["reference"]
    assert str(first) in reference
    copied = shutil.copytree(first / "adapter", tmp_path / "copy")
    assert key_of(small(*PAIRS, "task=dpo", f"lora.adapter={copied}")) == run.name[-10:]
    with pytest.raises(ConfigError, match=r"set lora\.r=2 lora\.alpha=4"):
        train(small(*PAIRS, "task=dpo", from_first, "lora.r=4"), quiet=True)
    with pytest.raises(ConfigError, match=r"lora\.adapter=.*nowhere"):
        train(small(*PAIRS, "task=dpo", "lora.adapter=nowhere"), quiet=True)


@pytest.mark.slow
def test_the_base_may_be_the_reference_of_an_adapter_and_a_judge_may_begin_with_one(
    small: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    first = trained(small("quantization=none", "learning_rate.peak=1e-2"))
    from_first = f"lora.adapter={first}"
    trained(small(*PAIRS, "task=dpo", from_first))
    base = trained(small(*PAIRS, "task=dpo", from_first, "task.reference=base"))
    drift = next(line for line in metrics(base) if "val/drift_nats" in line)
    assert drift["val/drift_nats"] != 0
    assert len([*(tmp_path / "references").glob("*.parquet")]) == 2
    judge = trained(small(*PAIRS, "task=reward", from_first))
    assert any("score" in name for name in adapter(judge))


def test_kto_learns_from_single_answers_in_any_micro_batch(tmp_path: Path) -> None:
    rows = [
        {"q": f"Text {n}: {'cat' if n % 2 else 'dog'}", "a": "yes" if n % 3 else "no", "ok": bool(n % 2)}
        for n in range(60)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["data=prompt_response", f"data.files={tmp_path / 'rows.jsonl'}", "data.columns.prompt=q"]
    arguments += ["data.columns.response=a", "data.columns.label=ok", "task=kto", "quantization=none"]
    arguments = [*(override for override in SMALL if not override.startswith("data.rows")), *arguments]
    runs = [trained(compose(*arguments, f"trainer.micro_batch={n}", f"output_dir={tmp_path}/{n}")) for n in (2, 8)]
    first = next(line for line in metrics(runs[0]) if "val/loss_nats" in line)
    assert first["val/loss_nats"] == pytest.approx(0.5, abs=1e-12)
    assert first["val/accuracy"] == 0.5
    one, two = (adapter(run) for run in runs)
    assert all(torch.allclose(one[name], two[name], atol=2e-5) for name in one)


@pytest.mark.slow
@pytest.mark.parametrize("removed", ["", "references", "*"])
def test_a_killed_policy_goes_on_to_the_same_bits_with_and_without_its_reference(removed: str, tmp_path: Path) -> None:
    uninterrupted = whole_run(tmp_path / "whole", "task=dpo")
    child = start(tmp_path / "killed", "task=dpo")
    wait_for_step(tmp_path / "killed", 10, child)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    for path in (tmp_path / "killed").rglob("*.parquet"):
        if removed == path.parent.name or (removed == "*" and path.parent.name != "row_losses"):
            path.unlink()
    again = start(tmp_path / "killed", "task=dpo")
    assert again.wait() == 0, again.text()
    same_run(uninterrupted, run_directory(tmp_path / "killed"))


@pytest.mark.slow
@pytest.mark.parametrize("task", ["dpo", "reward"])
def test_two_processes_train_what_one_does_and_share_one_reference(task: str, tmp_path: Path) -> None:
    arguments = [*SMALL, *PAIRS, f"task={task}", "trainer.accelerator=cpu", "trainer.precision=fp32"]
    roots = {count: tmp_path / str(count) for count in (1, 2)}
    for count, root in roots.items():
        more = ["trainer=ddp", f"trainer.devices={count}"] if count > 1 else []
        result = llmft(*arguments, *more, "trainer.accelerator=cpu", f"output_dir={root}", cwd=tmp_path, timeout=300)
        assert result.returncode == 0, result.stdout + result.stderr
        assert result.stdout.count("computed once") == (task == "dpo")
    one, two = (run_directory(root) for root in roots.values())
    weights = adapter(two)
    assert all(torch.allclose(tensor, weights[name], atol=2e-5) for name, tensor in adapter(one).items())
    for a, b in zip(metrics(one), metrics(two), strict=True):
        assert a == pytest.approx(b, abs=1e-4)
    if task == "dpo":
        tables = [read_table(run / "reference.parquet")["log_prob_nats"] for run in (one, two)]
        assert tables[0] == tables[1]
