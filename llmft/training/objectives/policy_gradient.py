"""Advantages and losses of policies that learn from rewards (GRPO, RLOO, PPO), as pure functions.

Answers are padded tables, (answers, tokens) with a mask of 1 at tokens. Losses are sums with separate denominators, so
that a step over several micro-batches or devices divides once by the total.
"""

from __future__ import annotations

import torch

GROUP_EPSILON = 1e-4
"""Added to a group's standard deviation, as TRL does; a group without spread has advantages of 0."""


def advantages(rewards: torch.Tensor, kind: str) -> torch.Tensor:
    """(groups, answers) advantages of rewards of the same form.

    group: less the group's mean, over its standard deviation (GRPO, arXiv:2402.03300); centred: less the mean
    (Dr. GRPO, arXiv:2503.20783); leave_one_out: less the mean of the others (RLOO, arXiv:2402.14740), and of a single
    answer the reward itself.
    """
    count = rewards.shape[-1]
    centred = rewards - rewards.mean(-1, keepdim=True)
    if kind == "centred":
        return centred
    if kind == "leave_one_out":
        return centred * (count / (count - 1)) if count > 1 else rewards
    spread = rewards.std(-1, keepdim=True) if count > 1 else torch.zeros_like(centred)
    return centred / (spread + GROUP_EPSILON)


def gae(
    rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, gamma: float = 1.0, decay: float = 0.95
) -> torch.Tensor:
    """(answers, tokens) generalized advantage estimates (arXiv:1506.02438); the value after the end is 0.

    Args:
        rewards: (answers, tokens), usually 0 except at an answer's last token.
        values: (answers, tokens) what the value head expects at each token.
    """
    rewards, values = rewards * mask, values * mask
    estimates = torch.zeros_like(values)
    following = torch.zeros_like(values[:, 0])
    for token in range(values.shape[1] - 1, -1, -1):
        after = values[:, token + 1] if token + 1 < values.shape[1] else torch.zeros_like(following)
        surprise = rewards[:, token] + gamma * after - values[:, token]
        following = (surprise + gamma * decay * following) * mask[:, token]
        estimates[:, token] = following
    return estimates


def kl(log_probs: torch.Tensor, reference: torch.Tensor, estimator: str = "k3") -> torch.Tensor:
    """Estimates of KL(policy || reference) in nats at each sampled token.

    k1: the difference of log-probabilities, unbiased; k3: exp(-d) - 1 + d, never below 0 and with a useful gradient
    (Schulman, joschu.net/blog/kl-approx.html).
    """
    difference = log_probs - reference
    return difference if estimator == "k1" else torch.exp(-difference) - 1 + difference


def ratios(log_probs: torch.Tensor, old: torch.Tensor, mask: torch.Tensor, level: str = "token") -> torch.Tensor:
    """(answers, tokens) probability ratios of the policy to the one that sampled.

    token: of each token; sequence: the geometric mean of the answer's (GSPO, arXiv:2507.18071); product: of the whole
    answer, which is one action (RLOO, arXiv:2402.14740). A token's gradient goes through its answer's ratio.
    """
    difference = (log_probs - old) * mask
    if level != "token":
        count = mask.sum(-1, keepdim=True).clamp(min=1) if level == "sequence" else 1
        difference = (difference.sum(-1, keepdim=True) / count).expand_as(difference)
    return difference.exp()


def clipped_loss(ratio: torch.Tensor, advantage: torch.Tensor, clip: tuple[float, float] = (0.2, 0.2)) -> torch.Tensor:
    """(answers, tokens) PPO's loss at each token: -min(ratio A, clip(ratio) A) (arXiv:1707.06347)."""
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - clip[0], 1 + clip[1]) * advantage)


def clipped(ratio: torch.Tensor, advantage: torch.Tensor, clip: tuple[float, float] = (0.2, 0.2)) -> torch.Tensor:
    """1 where the clip stops a token's gradient."""
    high, low = (ratio > 1 + clip[1]) & (advantage > 0), (ratio < 1 - clip[0]) & (advantage < 0)
    return (high | low).to(ratio.dtype)


def value_loss(values: torch.Tensor, old: torch.Tensor, returns: torch.Tensor, clip: float = 0.2) -> torch.Tensor:
    """(answers, tokens) half the squared error of values that may not leave the old ones by more than `clip`."""
    near = old + (values - old).clamp(-clip, clip)
    return 0.5 * torch.maximum((values - returns) ** 2, (near - returns) ** 2)


def summed(losses: torch.Tensor, mask: torch.Tensor, aggregate: str) -> torch.Tensor:
    """(answers,) each answer's part of the loss, to be divided by the sum of `weights` over all answers.

    token: every token has equal weight (DAPO, arXiv:2503.14476); sequence: every answer; constant: every token, with a
    denominator of the longest allowed answer (Dr. GRPO).
    """
    sums = (losses * mask).sum(-1)
    return sums / mask.sum(-1).clamp(min=1) if aggregate == "sequence" else sums


def weights(lengths: torch.Tensor, aggregate: str, most: int) -> torch.Tensor:
    """(answers,) each answer's part of the loss's denominator, from its tokens; `most`: the longest allowed answer."""
    if aggregate == "token":
        return lengths.double()
    return torch.full(lengths.shape, float(most) if aggregate == "constant" else 1.0, dtype=torch.float64)
