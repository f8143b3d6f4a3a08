"""Advantages and losses of policies, against TRL's formulas in float64."""

import pytest
import torch

from llmft.config.task import Aggregate
from llmft.training.objectives import policy_gradient as pg

LOGP = torch.tensor([[-1.0, -2.0, -0.5, 0.0], [-0.7, -1.5, 0.0, 0.0]], dtype=torch.float64)
OLD = torch.tensor([[-1.2, -1.8, -0.5, 0.0], [-0.4, -1.9, 0.0, 0.0]], dtype=torch.float64)
REFERENCE = torch.tensor([[-1.1, -2.2, -0.7, 0.0], [-0.6, -1.4, 0.0, 0.0]], dtype=torch.float64)
MASK = torch.tensor([[1.0, 1, 1, 0], [1, 1, 0, 0]], dtype=torch.float64)
REWARDS = torch.tensor([[1.0, 0.0]], dtype=torch.float64)


def loss(aggregate, beta=0.0, level="token", clip=(0.2, 0.2)):
    advantage = pg.advantages(REWARDS, "group").view(-1, 1)
    per_token = pg.clipped_loss(pg.ratios(LOGP, OLD, MASK, level), advantage, clip) + beta * pg.kl(LOGP, REFERENCE)
    return float(pg.summed(per_token, MASK, aggregate).sum() / pg.weights(MASK.sum(-1), aggregate, 4).sum())


@pytest.mark.parametrize(("kind", "expected"), [("group", 0.7070067953), ("centred", 0.5), ("leave_one_out", 1.0)])
def test_advantages(kind, expected):
    assert pg.advantages(REWARDS, kind)[0].tolist() == pytest.approx([expected, -expected], abs=1e-9)


def test_advantages_of_a_group_without_spread_are_zero():
    assert pg.advantages(torch.ones(1, 4), "group").tolist() == [[0.0] * 4]


@pytest.mark.parametrize(
    ("aggregate", "beta", "expected"),
    [
        ("sequence", 0.0, 0.0493733828),
        ("token", 0.0, -0.1027855042),
        ("constant", 0.0, -0.0642409401),
        ("sequence", 0.04, 0.0497587940),
        ("token", 0.04, -0.1023643781),
        ("constant", 0.04, -0.0639777363),
    ],
)
def test_losses_by_aggregation_with_and_without_kl(aggregate, beta, expected):
    assert loss(aggregate, beta) == pytest.approx(expected, abs=1e-9)


def test_sequence_ratios():
    ratio = pg.ratios(LOGP, OLD, MASK, "sequence")
    assert ratio[:, 0].tolist() == pytest.approx([1.0, 1.0512710964], abs=1e-9)
    assert loss("sequence", level="sequence", clip=(3e-4, 4e-4)) == pytest.approx(0.0181245068, abs=1e-9)


def test_ratios_of_whole_answers_make_the_loss_of_one_action_each():
    advantage = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    ratio = pg.ratios(LOGP, OLD, MASK, "product")
    assert ratio[:, 0].tolist() == pytest.approx([1.0, 1.1051709181], abs=1e-9)
    losses = pg.clipped_loss(ratio, advantage)
    loss = pg.summed(losses, MASK, "sequence").sum() / pg.weights(MASK.sum(-1), "sequence", 4).sum()
    assert float(loss) == pytest.approx((-1.0 + 1.1051709181) / 2, abs=1e-9)


def test_kl_estimates():
    assert float((pg.kl(LOGP, REFERENCE) * MASK).sum() / MASK.sum()) == pytest.approx(0.0105281521, abs=1e-9)
    assert torch.equal(pg.kl(LOGP, REFERENCE, "k1"), LOGP - REFERENCE)


def test_generalized_advantage_estimates_and_what_is_padded_changes_nothing():
    rewards = torch.tensor([[0.0, 0, 1, 9]], dtype=torch.float64)
    values = torch.tensor([[0.5, 0.4, 0.6, 9]], dtype=torch.float64)
    mask = torch.tensor([[1.0, 1, 1, 0]], dtype=torch.float64)
    assert pg.gae(rewards, values, mask)[0].tolist() == pytest.approx([0.451, 0.58, 0.4, 0.0], abs=1e-9)


@pytest.mark.parametrize("aggregate", [*Aggregate])
def test_before_the_policy_has_moved_the_gradient_is_reinforces(aggregate):
    advantage = pg.advantages(REWARDS, "group").view(-1, 1)
    total = pg.weights(MASK.sum(-1), aggregate, 4).sum()

    def gradient(of):
        log_probs = OLD.clone().requires_grad_()
        (pg.summed(of(log_probs), MASK, aggregate).sum() / total).backward()
        return log_probs.grad

    clipped = gradient(lambda log_probs: pg.clipped_loss(pg.ratios(log_probs, OLD, MASK), advantage))
    reinforce = gradient(lambda log_probs: -advantage * log_probs)
    assert torch.allclose(clipped, reinforce, rtol=0, atol=1e-15)


@pytest.mark.parametrize("aggregate", [*Aggregate])
def test_answers_one_by_one_add_up_to_all_at_once(aggregate):
    advantage = pg.advantages(REWARDS, "group").view(-1, 1)
    per_token = pg.clipped_loss(pg.ratios(LOGP, OLD, MASK), advantage)
    parts = [pg.summed(per_token[row : row + 1], MASK[row : row + 1], aggregate) for row in range(2)]
    assert torch.equal(torch.cat(parts), pg.summed(per_token, MASK, aggregate))


def test_a_clipped_token_has_no_gradient():
    log_probs = torch.tensor([[0.5, 0.0]], dtype=torch.float64, requires_grad=True)
    ratio = pg.ratios(log_probs, torch.zeros(1, 2, dtype=torch.float64), torch.ones(1, 2))
    pg.clipped_loss(ratio, torch.ones(1, 1)).sum().backward()
    assert log_probs.grad[0].tolist() == [0.0, -1.0]
    assert pg.clipped(ratio, torch.ones(1, 1))[0].tolist() == [1.0, 0.0]


def test_values_leave_the_old_ones_by_no_more_than_the_clip():
    old, returns = torch.zeros(1, 1), torch.ones(1, 1)
    assert float(pg.value_loss(torch.full((1, 1), 0.5), old, returns)) == pytest.approx(0.5 * 0.8**2)
