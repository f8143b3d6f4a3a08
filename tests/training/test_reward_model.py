"""Reward runs on a policy's base: they score as they do alone, and leave the policy unchanged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from llmft.data.columns import Conversation
from llmft.data.hub import locate
from llmft.metrics.judging import judges_of
from llmft.model.adapters import save, trainable_state
from llmft.model.assemble import assemble
from llmft.model.tokenizer import load_tokenizer
from llmft.train import train
from llmft.training.reward_model import Host, RewardModel, host_of, load_judges, shares_base
from tests.conftest import SMALL, compose, run_directory

PAIRS = ["task=reward", "data=manners_pairs", "data.rows={train: 48, validation: 12}"]
ASKED = [f"The {animal} sat by the fire. Who sat?" for animal in ("cat", "dog", "bear", "owl")]
ROWS = [
    Conversation([{"role": "user", "content": text}, {"role": "assistant", "content": "x"}], "f:1") for text in ASKED
]
TEXTS = ["The cat, friend", "The dog, sad", "", "nobody at all"]


@pytest.fixture(scope="module")
def judges(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Two reward runs of one base, of other ranks than the policy, and one of another base."""
    runs = {}
    for name, more in {"safety": [], "helpful": ["lora.r=4", "seed=1"], "other": ["quantization=none"]}.items():
        directory = tmp_path_factory.mktemp(name)
        train(compose(*SMALL, *PAIRS, *more, f"output_dir={directory}"), quiet=True)
        runs[name] = str(run_directory(directory))
    return runs


@pytest.fixture
def policy(tmp_path: Path) -> tuple[Any, Host, Any]:
    """A policy's model with a non-zero adapter, its host of judges, and its tokenizer."""
    config = compose(*SMALL, "data=manners", f"output_dir={tmp_path}")
    located = locate(config.model)
    precision = config.trainer.precision
    model = assemble(config, located, device=torch.device("cpu"), precision=precision, threads=1, keep_base=False).model
    for parameter in trainable_state(model).values():
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(0))
    host = host_of(model, config, located.fingerprint)
    assert host is not None
    return model, host, load_tokenizer(config.model, located)


def gradients(model: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(input_ids=torch.arange(3, 19)[None], labels=torch.arange(3, 19)[None]).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_judges_on_the_policys_base_score_as_alone_to_the_bit(
    judges: dict[str, str], policy: tuple[Any, Host, Any]
) -> None:
    _, host, _ = policy
    for name in ("safety", "helpful"):
        alone, shared = RewardModel(judges[name], name), RewardModel(judges[name], name, host=host)
        assert shared.shared
        assert not alone.shared
        assert shared.scores(ROWS, TEXTS) == alone.scores(ROWS, TEXTS)


def test_a_policy_with_judges_on_its_base_is_the_policy_that_it_was(
    judges: dict[str, str], policy: tuple[Any, Host, Any], tmp_path: Path
) -> None:
    model, host, tokenizer = policy
    model.train()
    state, before = {name: t.clone() for name, t in trainable_state(model).items()}, gradients(model)
    sizes = {id(p): p.numel() for p in model.parameters()}
    save(model, tokenizer, tmp_path / "before")
    random = torch.random.get_rng_state()
    models = [RewardModel(judges[name], name, host=host) for name in ("safety", "helpful")]
    assert torch.equal(torch.random.get_rng_state(), random)
    for judge in models:
        judge.scores(ROWS, TEXTS)
    assert model.training
    assert same(trainable_state(model), state)
    assert same(gradients(model), before)
    added = sum(p.numel() for p in model.parameters() if id(p) not in sizes)
    assert added < 0.1 * sum(sizes.values())
    save(model, tokenizer, tmp_path / "after")
    files = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("before", "after")]
    assert files[0] == files[1]


def test_a_judge_of_another_base_has_a_model_of_its_own_and_that_is_said_once(
    judges: dict[str, str], policy: tuple[Any, Host, Any]
) -> None:
    _, host, _ = policy
    assert not shares_base(judges["other"], host)
    said: list[str] = []
    models = load_judges(judges_of(judges), "task.judges", host, said.append)
    assert {name: model.shared for name, model in models.items()} == {"safety": True, "helpful": True, "other": False}
    assert len(said) == 1
    assert "other: not of the policy's base" in said[0]
