"""Losses of pairs of answers: pure functions of log-probabilities, one number per pair.

Every function takes `Pairs` and `beta`; some take a `margin`, by which the chosen answer should be ahead (ODPO,
arXiv:2402.10571), set by `task.margin`. `task.loss` names one of these, or your own function by its dotted path.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class Pairs:
    """Log-probabilities in nats, summed over each answer's tokens.

    Attributes:
        chosen, rejected: (pairs,) of the policy.
        ref_chosen, ref_rejected: (pairs,) of the reference; zeros where there is none.
        chosen_tokens, rejected_tokens: (pairs,) tokens of the answers.
    """

    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor
    ref_rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor

    @property
    def chosen_ratio(self) -> Tensor:
        """log pi/pi_ref of the chosen answer."""
        return self.chosen - self.ref_chosen

    @property
    def rejected_ratio(self) -> Tensor:
        """log pi/pi_ref of the rejected answer."""
        return self.rejected - self.ref_rejected

    @property
    def delta(self) -> Tensor:
        """How much more the policy than the reference prefers the chosen answer, in nats."""
        return self.chosen_ratio - self.rejected_ratio

    @property
    def mean_delta(self) -> Tensor:
        """Like `delta`, of log-ratios per token."""
        return self.chosen_ratio / self.chosen_tokens - self.rejected_ratio / self.rejected_tokens


Margin = Tensor | float


def _smoothed(z: Tensor, label_smoothing: float) -> Tensor:
    return -(1 - label_smoothing) * F.logsigmoid(z) - label_smoothing * F.logsigmoid(-z)


def sigmoid(pairs: Pairs, beta: float, margin: Margin = 0.0, label_smoothing: float = 0.0) -> Tensor:
    """DPO, -log sigmoid(beta delta - margin) (arXiv:2305.18290); label_smoothing: the share of wrong labels (cDPO)."""
    return _smoothed(beta * pairs.delta - margin, label_smoothing)


def robust(pairs: Pairs, beta: float, margin: Margin = 0.0, label_smoothing: float = 0.1) -> Tensor:
    """DPO, unbiased although a share `label_smoothing` of the labels is wrong (arXiv:2403.00409)."""
    z = beta * pairs.delta - margin
    wrong = label_smoothing * F.logsigmoid(-z)
    return (-(1 - label_smoothing) * F.logsigmoid(z) + wrong) / (1 - 2 * label_smoothing)


def sigmoid_norm(pairs: Pairs, beta: float, margin: Margin = 0.0, label_smoothing: float = 0.0) -> Tensor:
    """Length-normalised DPO: log-ratios per token (arXiv:2411.15124, section 5); takes a beta near 5."""
    return _smoothed(beta * pairs.mean_delta - margin, label_smoothing)


def ipo(pairs: Pairs, beta: float) -> Tensor:
    """(mean_delta - 1 / (2 beta))^2 (arXiv:2310.12036), with log-ratios per token as its authors confirmed."""
    return (pairs.mean_delta - 1 / (2 * beta)) ** 2


def ipo_sum(pairs: Pairs, beta: float) -> Tensor:
    """IPO with summed log-ratios, as in its paper and in some libraries."""
    return (pairs.delta - 1 / (2 * beta)) ** 2


def hinge(pairs: Pairs, beta: float, margin: Margin = 0.0) -> Tensor:
    """max(0, 1 - beta delta + margin) (SLiC, arXiv:2305.10425)."""
    return torch.relu(1 - beta * pairs.delta + margin)


def apo_zero(pairs: Pairs, beta: float) -> Tensor:
    """Makes the chosen answer likelier and the rejected one less likely, independently (arXiv:2408.06266)."""
    return 1 - torch.sigmoid(beta * pairs.chosen_ratio) + torch.sigmoid(beta * pairs.rejected_ratio)


def apo_down(pairs: Pairs, beta: float) -> Tensor:
    """Makes both answers less likely and the rejected one more so: for a policy better than the chosen answers."""
    return torch.sigmoid(beta * pairs.chosen_ratio) + 1 - torch.sigmoid(beta * pairs.delta)


def simpo(pairs: Pairs, beta: float, margin: Margin = 0.0, gamma: float = 1.0) -> Tensor:
    """-log sigmoid(beta (mean log-probabilities' difference) - gamma), without a reference (arXiv:2405.14734)."""
    difference = pairs.chosen / pairs.chosen_tokens - pairs.rejected / pairs.rejected_tokens
    return -F.logsigmoid(beta * difference - gamma - margin)


def orpo(pairs: Pairs, beta: float) -> Tensor:
    """Nats per token of the chosen answer, and beta x -log sigmoid(log odds ratio), no reference (arXiv:2403.07691)."""
    chosen, rejected = pairs.chosen / pairs.chosen_tokens, pairs.rejected / pairs.rejected_tokens
    return -chosen - beta * F.logsigmoid(log_odds(chosen) - log_odds(rejected))


def log_odds(log_probability: Tensor) -> Tensor:
    """log(p / (1 - p)), exact even where p is near 0 or 1."""
    # Of the two forms of log(1 - exp(x)), the first is exact above -ln 2, the second below.
    x = log_probability.clamp(max=-torch.finfo(log_probability.dtype).eps)
    near_one = x > -0.6931471805599453
    small = torch.log(-torch.expm1(torch.where(near_one, x, -1.0)))
    large = torch.log1p(-torch.exp(torch.where(near_one, -1.0, x)))
    return x - torch.where(near_one, small, large)


def kto(ratio: Tensor, kl: Tensor | float, desirable: Tensor, beta: float) -> Tensor:
    """1 - sigmoid(beta (ratio - kl)) of a good answer, 1 - sigmoid(beta (kl - ratio)) of a bad one (arXiv:2402.01306).

    `ratio`: (rows,) log pi/pi_ref; `desirable`: (rows,) true where the answer is good; `kl`: the policy's
    divergence from the reference on answers to other prompts, at least 0, without a gradient.
    """
    gain = beta * (ratio - kl)
    return 1 - torch.sigmoid(torch.where(desirable, gain, -gain))


def reward(chosen: Tensor, rejected: Tensor, margin: Margin = 0.0, centre: float = 0.0) -> Tensor:
    """-log sigmoid(chosen - rejected - margin) + centre (chosen + rejected)^2 of a reward model's scores, (pairs,).

    Bradley-Terry with Llama 2's margin (arXiv:2307.09288, section 3.2.2); centring keeps the scores' mean near 0
    (arXiv:2312.09244).
    """
    return -F.logsigmoid(chosen - rejected - margin) + centre * (chosen + rejected) ** 2
