"""Policies that learn from rewards of their own answers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llmft.config.task import Advantage, KlConfig, KlEstimator, KlWhere, TaskConfig
from llmft.core.errors import ConfigError
from llmft.data.batch import MicroBatch, PolicyRows, collate
from llmft.data.columns import Conversation
from llmft.data.examples import IGNORE, Example
from llmft.model import logits
from llmft.train import train
from llmft.training.objectives.policy import PolicyGradient, token_log_probs
from llmft.training.rollout_batch import RolloutBatch, advantages_and_returns
from tests.conftest import SMALL, compose

OBJECTIVE = "llmft.training.objectives.policy.PolicyGradient"
LENGTH = "task.judges={function: llmft.metrics.rewards.length, target: 2}"
ONLINE = ["task.group=2", "trainer.batch_size=2", "quantization=none", LENGTH]
KINDS = {
    "grpo": ["task=grpo"],
    "rloo": ["task=rloo", "task.updates=2"],
    "ppo": ["task=ppo", "task.updates=2"],
    "gspo": ["task=grpo", "task.ratio=sequence", "task.clip=[0.0003,0.0004]", "task.kl.beta=0.04"],
}


def task(**more: Any) -> TaskConfig:
    return TaskConfig(name="grpo", objective=OBJECTIVE, rollouts=True, judges="x", **more)


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=4)).double()


def answers(*rows: int) -> MicroBatch:
    """A batch of `rows` with answers of 2 to 6 tokens, advantages and a reference."""
    generator = torch.Generator().manual_seed(1)
    examples, advantages, references = [], [], []
    for prompt, answer in ((3, 4), (5, 2), (2, 6)):
        ids = torch.randint(3, 64, (prompt + answer,), generator=generator).tolist()
        examples.append(Example(ids, [*[IGNORE] * prompt, *ids[prompt:]], Conversation([], "f:1")))
        advantages.append(float(torch.randn(1, generator=generator)))
        references.append(torch.randn(answer, generator=generator).abs().neg())
    batch = collate([examples[row] for row in rows], rows, 0)
    labelled = batch.labels[:, 1:] != IGNORE
    reference = torch.zeros(labelled.shape).masked_scatter(labelled, torch.cat([references[row] for row in rows]))
    row_advantages = torch.tensor([advantages[row] for row in rows])[:, None] * labelled
    batch.policy = PolicyRows(row_advantages, reference=reference)
    return batch


def gradient(model: Any, objective: PolicyGradient, *batches: MicroBatch) -> list[torch.Tensor]:
    model.zero_grad()
    for batch in batches:
        objective.losses(model, batch).nll.sum().backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize("aggregate", ["token", "sequence", "constant"])
def test_micro_batches_change_nothing(model: Any, aggregate: str) -> None:
    objective = PolicyGradient(aggregate=aggregate, kl=0.1)
    together = gradient(model, objective, answers(0, 1, 2))
    separate = gradient(model, objective, answers(1), answers(0, 2))
    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in zip(together, separate, strict=True))


def test_with_one_update_the_gradient_is_reinforces(model: Any) -> None:
    batch = answers(0, 1, 2)
    assert batch.policy is not None
    clipped = gradient(model, PolicyGradient(), batch)
    model.zero_grad()
    log_probs, _ = token_log_probs(model, batch)
    (-log_probs * batch.policy.advantages).sum().backward()
    assert all(
        torch.allclose(a, p.grad, rtol=1e-9, atol=1e-12) for a, p in zip(clipped, model.parameters(), strict=True)
    )


@pytest.mark.parametrize("at_once", [512, 2])
def test_log_probabilities_are_of_the_distribution_that_is_drawn_from(
    model: Any, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    model.requires_grad_(False)  # logits of an untrained head are computed in parts
    monkeypatch.setattr(logits, "positions_at_a_time", lambda vocabulary, device: at_once)
    batch = answers(2)
    table, mask = token_log_probs(model, batch, temperature=0.7)
    log_probs = (model(batch.input_ids).logits / 0.7).log_softmax(-1)[0, :-1]
    expected = log_probs.gather(1, batch.input_ids[0, 1:, None])[:, 0] * mask[0]
    assert torch.allclose(table[0].double(), expected, rtol=0, atol=1e-5)
    assert PolicyGradient(temperature=0.7).losses(model, batch).nll == pytest.approx(
        PolicyGradient().losses(model, batch).nll  # the policy is unchanged: its ratios are 1 at any temperature
    )


def rollout(**more: Any) -> RolloutBatch:
    ids = [[5, 1], [6, 7, 1]]
    return RolloutBatch([0, 0], ids, ["a", "b"], [True, True], [1.0, 0.0], {"x": [1.0, 0.0]}, **more)


def test_divergence_in_the_reward_is_taken_from_it_before_advantages() -> None:
    old, reference = [[-1.0, -1.0], [-1.0, -1.0, -1.0]], [[-1.5, -1.0], [-1.0, -1.0, -2.0]]
    in_reward = task(group=2, advantage=Advantage.leave_one_out, kl=KlConfig(0.1, KlWhere.reward, KlEstimator.k1))
    advantages, _ = advantages_and_returns(rollout(old=old, reference=reference), in_reward)
    first, second = 1.0 - 0.1 * 0.5, 0.0 - 0.1 * 1.0
    assert advantages[0] == pytest.approx([first - second] * 2, abs=1e-7)
    assert advantages[1] == pytest.approx([second - first] * 3, abs=1e-7)


def test_what_was_drawn_comes_back_from_the_disk_and_damage_is_seen(tmp_path: Path) -> None:
    one = rollout(old=[[-1.0, -0.1], [-2.0, -0.5, -0.25]])
    one.write(tmp_path / "a.parquet")
    assert RolloutBatch.read(tmp_path / "a.parquet") == one
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    assert RolloutBatch.read(tmp_path / "a.parquet") is None
    assert RolloutBatch.read(tmp_path / "b.parquet") is None


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["task=grpo"], "task.judges: nothing scores the answers"),
        (["task=grpo", LENGTH, "task.group=1"], "measured by the others"),
        (["task=grpo", "task.judges=os.system"], "only llmft.metrics.rewards"),
        (["task=grpo", LENGTH, "task.combine=lenght"], "did you mean length"),
        (["task=grpo", LENGTH, "task.clip=[0.2]"], "task.clip"),
        (["task=ppo", LENGTH, "lora=none", "quantization=none"], "needs a LoRA"),
        (["task.judges=x"], "draws no answers"),
    ],
)
def test_mistakes_are_told_before_the_weights_load(tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        train(compose(*SMALL, *overrides, f"output_dir={tmp_path}"), quiet=True)


def online(directory: Path, kind: str, *more: str) -> list[str]:
    return [*SMALL, *ONLINE, *KINDS[kind], f"output_dir={directory}", "trainer.checkpoint_every=1", *more]


def run_of(directory: Path) -> Path:
    (run,) = (directory / "runs").iterdir()
    return run


@pytest.mark.parametrize("kind", ["grpo", "ppo"])
def test_a_policy_trains_to_an_ordinary_adapter(tmp_path: Path, kind: str) -> None:
    assert train(compose(*online(tmp_path, kind)), quiet=True) is not None
    run = run_of(tmp_path)
    assert sorted(path.name for path in (run / "rollouts").iterdir())[0] == "step-00000000.parquet"
    from safetensors.torch import load_file

    assert all(".lora_" in name for name in load_file(run / "adapter" / "adapter_model.safetensors"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_policy_killed_between_two_updates_ends_at_the_same_weights(tmp_path: Path, kind: str) -> None:
    train(compose(*online(tmp_path / "whole", kind)), quiet=True)
    command = [sys.executable, "-m", "llmft", *online(tmp_path / "killed", kind)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not list((tmp_path / "killed").glob("runs/*/checkpoints/*3*")):
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    train(compose(*online(tmp_path / "killed", kind)), quiet=True)
    uninterrupted, killed = run_of(tmp_path / "whole"), run_of(tmp_path / "killed")
    weights = "adapter/adapter_model.safetensors"
    assert (killed / weights).read_bytes() == (uninterrupted / weights).read_bytes()
    assert (killed / "metrics.jsonl").read_text() == (uninterrupted / "metrics.jsonl").read_text()


@pytest.mark.slow
def test_the_reward_rises(tmp_path: Path) -> None:
    overrides = ["task=grpo", "trainer.max_steps=40", "trainer.batch_size=8", "task.max_new_tokens=8", LENGTH]
    rows = ["data.rows={train: 240, validation: 24, test: 0}", "task.generate_rows=24", "trainer.validate_every=10"]
    fixed = ["logger=none", "progress=false", "trainer.threads=1", f"output_dir={tmp_path}"]
    after = train(compose(*fixed, *overrides, *rows), quiet=True)
    assert after is not None
    assert after > -1.0  # two words are right; untrained answers have eight tokens
