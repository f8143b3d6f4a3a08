"""Metrics of compared answers: (degrees, outputs) -> number.

`outputs` is (rows, columns), named by `COLUMNS` for a policy and by `REWARD_COLUMNS` for a reward model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from llmft.metrics import higher_is_better, lower_is_better, mean_over_rows
from llmft.metrics.intervals import mean_interval

COLUMNS = (
    "ahead", "margin", "chosen_reward", "rejected_reward", "more_tokens", "longer", "chosen_logp", "rejected_logp",
    "drift_nats",
)  # fmt: skip
"""Whether the chosen answer is ahead (1, 0, or 0.5), its margin, both rewards, how many tokens longer it is, whether it
is longer (1, 0, or 0.5), both log-probabilities in nats, and log pi/pi_ref per token of the chosen answer."""
REWARD_COLUMNS = COLUMNS[:6]
AHEAD, MARGIN, CHOSEN_REWARD, REJECTED_REWARD, MORE_TOKENS, _, CHOSEN_LOGP, REJECTED_LOGP, DRIFT = range(len(COLUMNS))


def _mean_of(column: int, meaning: str) -> Callable[..., float]:
    @mean_over_rows
    def column_of(degrees: np.ndarray, outputs: np.ndarray) -> np.ndarray:
        return outputs[:, column]

    column_of.__doc__ = meaning
    return column_of


accuracy = higher_is_better(_mean_of(AHEAD, "Share of pairs whose chosen answer is ahead; a tie counts half."))
margin = higher_is_better(_mean_of(MARGIN, "Mean of the chosen answer's reward less the rejected one's."))
chosen_reward = higher_is_better(
    _mean_of(CHOSEN_REWARD, "Mean reward of the chosen answers: a reward model's score, or beta log pi/pi_ref.")
)
rejected_reward = lower_is_better(_mean_of(REJECTED_REWARD, "Mean reward of the rejected answers."))
chosen_logp = higher_is_better(_mean_of(CHOSEN_LOGP, "Mean log-probability of the chosen answers, in nats."))
rejected_logp = lower_is_better(_mean_of(REJECTED_LOGP, "Mean log-probability of the rejected answers, in nats."))
drift_nats = _mean_of(DRIFT, "Mean log pi/pi_ref per token of the chosen answers: distance from the reference.")


def length_correlation(degrees: np.ndarray, outputs: np.ndarray) -> float:
    """Correlation of margins with how many tokens longer the chosen answer is; 0 where one of them never varies."""
    margins, more_tokens = outputs[:, MARGIN], outputs[:, MORE_TOKENS]
    if len(margins) < 2 or margins.std() == 0 or more_tokens.std() == 0:
        return 0.0
    return float(np.corrcoef(margins, more_tokens)[0, 1])


def movement(before: Mapping[str, float | None], after: Mapping[str, float | None]) -> str | None:
    """A sentence on how both answers' probabilities changed; None where their log-probabilities are not known."""
    changes = []
    for name in ("val/chosen_logp", "val/rejected_logp"):
        start, end = before.get(name), after.get(name)
        if start is None or end is None:
            return None
        changes.append(end - start)
    chosen, rejected = changes
    directions = ["likelier" if change >= 0 else "less likely" for change in changes]
    sentence = f"the chosen answer became {directions[0]}, the rejected one {directions[1]}"
    if directions[0] == directions[1]:
        sentence = f"both answers became {directions[0]}"
    if chosen < rejected:
        how = f"shrank by {rejected - chosen:.1f}"
    elif chosen < 0:
        how = f"grew by pushing the rejected one down {-rejected:.1f}"
    elif rejected >= 0:
        how = f"grew by lifting the chosen one {chosen:.1f}"
    else:
        how = f"grew by {chosen - rejected:.1f}"
    return f"{sentence} (chosen {chosen:+.1f} nats, rejected {rejected:+.1f}); the margin {how} nats"


def against_length(ahead: np.ndarray, longer: np.ndarray) -> dict[str, float]:
    """The accuracy, that of the rule "the longer answer wins", and a 95% interval of the difference over rows.

    Args:
        ahead, longer: (rows,) the columns of these names.
    """
    low, high = mean_interval(ahead - longer)
    return {
        "accuracy": float(ahead.mean()),
        "longer_wins": float(longer.mean()),
        "low": low,
        "high": high,
        "rows": len(ahead),
    }


def beats_length(facts: Mapping[str, float]) -> bool:
    """Whether `against_length` found an accuracy above that of the length rule by more than the rows' noise."""
    return facts["low"] > 0


def length_sentence(facts: Mapping[str, float]) -> str:
    """The result of `against_length` in a sentence."""
    rule = (
        f'accuracy {facts["accuracy"]:.3f} against {facts["longer_wins"]:.3f} of the rule "the longer answer wins" '
        f"(95% interval of the difference {facts['low']:+.3f} to {facts['high']:+.3f}; {facts['rows']:,.0f} rows)"
    )
    if beats_length(facts):
        return f"better than length: {rule}"
    return f"NOT better than length, so it may have learned length alone: {rule}"


def degree_names(degrees: Sequence[str]) -> list[str]:
    """The name of the accuracy on each degree."""
    return [f"accuracy_{'_'.join(name.casefold().split())}" for name in degrees]
