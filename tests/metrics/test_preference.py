"""Metrics of compared answers, and their sentences."""

from __future__ import annotations

import numpy as np
import pytest

from llmft.metrics.preference import (
    COLUMNS,
    MARGIN,
    MORE_TOKENS,
    REWARD_COLUMNS,
    against_length,
    length_correlation,
    length_sentence,
    movement,
)


def outputs(margins: list[float], more_tokens: list[float]) -> np.ndarray:
    table = np.zeros((len(margins), len(REWARD_COLUMNS)))
    table[:, MARGIN], table[:, MORE_TOKENS] = margins, more_tokens
    return table


def test_the_columns_of_a_reward_model_are_the_first_of_a_policys() -> None:
    assert COLUMNS[: len(REWARD_COLUMNS)] == REWARD_COLUMNS
    assert COLUMNS[MORE_TOKENS] == "more_tokens"


def test_margins_that_go_with_length_correlate_with_it() -> None:
    degrees = np.zeros(4)
    assert length_correlation(degrees, outputs([1, 2, 3, 4], [10, 20, 30, 40])) == pytest.approx(1)
    assert length_correlation(degrees, outputs([4, 3, 2, 1], [10, 20, 30, 40])) == pytest.approx(-1)
    assert length_correlation(degrees, outputs([1, 2, 3, 4], [5, 5, 5, 5])) == 0


def test_a_judge_that_agrees_with_length_has_learned_length() -> None:
    longer = np.asarray([1.0] * 70 + [0.0] * 30)
    assert length_sentence(against_length(longer, longer)).startswith("NOT better than length")
    facts = against_length(np.ones(100), longer)
    assert (facts["accuracy"], facts["longer_wins"]) == (1.0, 0.7)
    assert facts["low"] < 0.3 < facts["high"]
    assert length_sentence(facts).startswith("better than length: accuracy 1.000 against 0.700")
    assert length_sentence(against_length(np.ones(1), np.zeros(1))).startswith("NOT better")


@pytest.mark.parametrize(
    ("chosen", "rejected", "words"),
    [
        (-2.0, -14.0, "both answers became less likely (chosen -2.0 nats, rejected -14.0); "
                      "the margin grew by pushing the rejected one down 14.0 nats"),
        (3.0, 1.0, "both answers became likelier (chosen +3.0 nats, rejected +1.0); "
                   "the margin grew by lifting the chosen one 3.0 nats"),
        (3.0, -1.0, "the chosen answer became likelier, the rejected one less likely "
                    "(chosen +3.0 nats, rejected -1.0); the margin grew by 4.0 nats"),
        (-3.0, 1.0, "the chosen answer became less likely, the rejected one likelier "
                    "(chosen -3.0 nats, rejected +1.0); the margin shrank by 4.0 nats"),
    ],
)  # fmt: skip
def test_what_became_of_both_answers_is_said_in_words(chosen: float, rejected: float, words: str) -> None:
    before = {"val/chosen_logp": -50.0, "val/rejected_logp": -60.0}
    after = {"val/chosen_logp": -50.0 + chosen, "val/rejected_logp": -60.0 + rejected}
    assert movement(before, after) == words
    assert movement({}, after) is None
