"""Losses of pairs against independently computed numbers in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from llmft.training.objectives import preference_losses as losses
from llmft.training.objectives.preference_losses import Pairs


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


PAIRS = Pairs(
    tensor(-12, -30.5, -8.25), tensor(-14, -28, -8.25), tensor(-13, -31, -9), tensor(-13.5, -29, -8),
    tensor(6, 20, 5), tensor(8, 14, 5),
)  # fmt: skip
SWAPPED = Pairs(
    PAIRS.rejected, PAIRS.chosen, PAIRS.ref_rejected, PAIRS.ref_chosen, PAIRS.rejected_tokens, PAIRS.chosen_tokens
)
VECTORS: list[tuple[str, float, dict[str, Any], tuple[float, ...]]] = [
    ("sigmoid", 0.1, {}, (0.6209570478, 0.7184596480, 0.6443966601)),
    ("sigmoid", 0.5, {}, (0.3868710061, 0.8259394199, 0.4740769842)),
    ("sigmoid", 0.1, {"label_smoothing": 0.1}, (0.6359570478, 0.7134596480, 0.6543966601)),
    ("sigmoid", 0.1, {"margin": 1.0}, (1.2058650684, 1.3500584796, 1.2411538747)),
    ("robust", 0.1, {"label_smoothing": 0.1}, (0.6022070478, 0.7247096480, 0.6318966601)),
    ("robust", 0.5, {"label_smoothing": 0.1}, (0.2931210061, 0.8571894199, 0.4115769842)),
    ("sigmoid_norm", 0.1, {}, (0.6817544925, 0.6954713036, 0.6831971797)),
    ("ipo", 0.1, {}, (22.7608506944, 25.4664413265, 23.04)),
    ("ipo", 0.5, {}, (0.5941840278, 1.0950127551, 0.64)),
    ("ipo_sum", 0.1, {}, (12.25, 30.25, 16.0)),
    ("hinge", 0.5, {}, (0.25, 1.25, 0.5)),
    ("apo_zero", 0.1, {}, (0.9625234160, 1.0124817910, 0.9750091096)),
    ("apo_down", 0.1, {}, (0.9875493421, 1.0249947930, 0.9937620284)),
    ("simpo", 2.0, {"gamma": 1.0}, (1.7014132780, 0.7184596480, 1.3132616875)),
    ("orpo", 0.1, {}, (2.0851757483, 1.5696417268, 1.7193147181)),
]


@pytest.mark.parametrize(("name", "beta", "options", "expected"), VECTORS)
def test_a_loss_of_pairs_has_its_published_value(
    name: str, beta: float, options: dict[str, Any], expected: tuple[float, ...]
) -> None:
    loss = getattr(losses, name)(PAIRS, beta, **options)
    torch.testing.assert_close(loss, tensor(*expected), rtol=0, atol=1e-9)


def test_kto_has_its_published_values_for_good_and_bad_answers() -> None:
    good = losses.kto(PAIRS.chosen_ratio, 0.2, torch.tensor([True] * 3), 0.1)
    bad = losses.kto(PAIRS.rejected_ratio, 0.2, torch.tensor([False] * 3), 0.1)
    torch.testing.assert_close(good, tensor(0.4800106598, 0.4925005624, 0.4862534651), rtol=0, atol=1e-9)
    torch.testing.assert_close(bad, tensor(0.4825071423, 0.5199893402, 0.4887518981), rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("margins", "centre", "expected"),
    [
        ((0, 0, 0, 0), 0.0, (0.3132616875, 0.8543552445, 0.6931471806, 0.0485873516)),
        ((1, 2 / 3, 1 / 3, 0), 0.0, (0.6931471806, 1.2890028561, 0.8736389080, 0.0485873516)),
        ((3, 2, 1, 0), 0.0, (2.1269280110, 2.3955454646, 1.3132616875, 0.0485873516)),
        ((0, 0, 0, 0), 0.01, (0.3232616875, 0.8592552445, 0.7031471806, 0.0585873516)),
    ],
)
def test_a_reward_has_the_values_of_llama_2s_margins(
    margins: tuple[float, ...], centre: float, expected: tuple[float, ...]
) -> None:
    loss = losses.reward(tensor(1, 0.2, -0.5, 2), tensor(0, 0.5, -0.5, -1), tensor(*margins), centre)
    torch.testing.assert_close(loss, tensor(*expected), rtol=0, atol=1e-9)


def test_swapping_the_answers_negates_what_is_learned_of_them() -> None:
    assert torch.equal(SWAPPED.delta, -PAIRS.delta)
    assert torch.equal(SWAPPED.mean_delta, -PAIRS.mean_delta)
    both = losses.sigmoid(PAIRS, 0.3) - losses.sigmoid(SWAPPED, 0.3)
    torch.testing.assert_close(both, -0.3 * PAIRS.delta)


def test_a_policy_that_is_its_reference_loses_ln_2_exactly() -> None:
    same = Pairs(PAIRS.chosen, PAIRS.rejected, PAIRS.chosen, PAIRS.rejected, PAIRS.chosen_tokens, PAIRS.rejected_tokens)
    assert torch.equal(losses.sigmoid(same, 0.1), tensor(*[math.log(2)] * 3))


def test_the_gradient_of_dpo_is_its_published_one() -> None:
    chosen = PAIRS.chosen.clone().requires_grad_()
    pairs = Pairs(chosen, *[value for name, value in vars(PAIRS).items() if name != "chosen"])
    losses.sigmoid(pairs, 0.1).sum().backward()
    assert chosen.grad is not None
    expected = tensor(-0.0462570155, -0.0512497396, -0.0475020813)
    torch.testing.assert_close(chosen.grad, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_odds_are_finite_and_right_near_0_and_1(dtype: torch.dtype) -> None:
    logs = torch.tensor([-1e-9, -1e-3, -0.5, -0.6931471805599453, -5.0, -80.0], dtype=dtype)
    odds = losses.log_odds(logs)
    assert torch.isfinite(odds).all()
    expected = torch.tensor([x - math.log(-math.expm1(x)) for x in logs.double().tolist()[1:]], dtype=dtype)
    torch.testing.assert_close(odds[1:], expected)
