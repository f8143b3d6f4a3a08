"""Rewards and their combination, against independently computed numbers."""

from itertools import combinations

import numpy as np
import pytest

from llmft.core.errors import ConfigError
from llmft.metrics import rewards

SAFETY, HELPFUL, ADVERSARIAL = [0.05, 0.15, 0.9, 0.6], [0.99, 0.8, 0.3, 0.7], [0, 0, 0, 1]


def test_the_rule_of_llama_2_then_logit_then_whitening():
    combined = rewards.llama2(SAFETY, HELPFUL, ADVERSARIAL)
    assert combined.tolist() == [0.05, 0.8, 0.3, 0.6]
    logits = rewards.logit(combined)
    assert logits == pytest.approx([-2.9444389792, 1.3862943611, -0.8472978604, 0.4054651081], abs=1e-9)
    whitened = [-1.5106247177, 1.1656939568, -0.2146275971, 0.5595583580]
    assert rewards.whiten(logits) == pytest.approx(whitened, abs=1e-9)
    assert rewards.combined("whiten(logit(llama2(s, h, a)))", {"s": SAFETY, "h": HELPFUL, "a": ADVERSARIAL}) == (
        pytest.approx(whitened, abs=1e-9)
    )


def test_an_unsafe_answer_never_gains_by_helpfulness():
    helpful = np.linspace(0, 1, 101)
    assert len(set(rewards.llama2(np.full(101, 0.1499), helpful))) == 1
    assert rewards.llama2(np.full(101, 0.15), helpful).tolist() == helpful.tolist()


def test_certain_probabilities_have_finite_logits_and_equal_values_no_spread():
    assert np.isfinite(rewards.logit([0.0, 1.0])).all()
    assert rewards.whiten([2.0, 2.0]).tolist() == [0.0, 0.0]


def test_expected_best_of_n_is_the_mean_over_all_draws():
    scores = [0.3, -1.0, 2.5, 0.3, 7.0]
    means = [np.mean([max(draw) for draw in combinations(scores, n)]) for n in range(1, 6)]
    assert rewards.expected_best(scores) == pytest.approx(means)


@pytest.mark.parametrize(
    ("reward", "reference", "answer", "expected"),
    [
        (rewards.exact_answer, "7", " 7\n", 1.0),
        (rewards.exact_answer, "7", "It is 7", 0.0),
        (rewards.last_number, "#### 1,234", "3 and so 1234.0", 1.0),
        (rewards.last_number, "7", "7 or 8", 0.0),
        (rewards.last_number, "7", "none", 0.0),
    ],
)
def test_verifiable_rewards(reward, reference, answer, expected):
    assert reward([reference], [answer]) == [expected]


def test_code_is_parsed_and_not_run(tmp_path):
    spy = tmp_path / "ran"
    assert rewards.python_code([f"open({str(spy)!r}, 'w')", "def f(:", "", "See:\n```python\nx = 1\n```"]) == [
        1,
        0,
        0,
        1,
    ]
    assert not spy.exists()


def test_patterns_and_lengths():
    assert rewards.matches(["a1", "b"], pattern=r"\d") == [1, 0]
    assert rewards.matches(["a1", "b"], pattern=r"\d", absent=True) == [0, 1]
    assert rewards.length(["one two", ""], target=1) == [-1, -1]
    with pytest.raises(ConfigError, match="regular expression"):
        rewards.matches(["a"], pattern="(")


@pytest.mark.parametrize("expression", ["__import__('os')", "a.real", "a if a else a", "b", "a **", "whiten()", "True"])
def test_an_expression_computes_nothing_but_sums_of_judges(expression):
    with pytest.raises(ConfigError, match="combine="):
        rewards.combined(expression, {"a": [1.0, 2.0]})


def test_an_expression_of_judges():
    assert rewards.combined("-a + 2 * max(a, b) / 4", {"a": [1, 5], "b": [2, 3]}).tolist() == [0.0, -2.5]
    assert rewards.combined("1", {"a": [1, 5]}).tolist() == [1.0, 1.0]
