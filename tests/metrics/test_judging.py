"""Judges by name, and their scores as one."""

import pytest

from llmft.core.errors import ConfigError
from llmft.metrics.judging import check_combination, combine_scores, judges_of

EXACT, MATCHES = "llmft.metrics.rewards.exact_answer", "llmft.metrics.rewards.matches"


def test_one_a_list_or_a_dictionary_of_judges():
    assert [judge.name for judge in judges_of(EXACT)] == ["exact_answer"]
    assert [judge.name for judge in judges_of([EXACT, {"function": MATCHES, "pattern": "x"}])] == [
        "exact_answer",
        "matches",
    ]
    named = judges_of({"right": EXACT, "safe": {"function": MATCHES, "pattern": "x", "absent": True}})
    assert [judge.name for judge in named] == ["right", "safe"]
    assert named[0].scores(["?"], ["7"], [" 7"]) == [1.0]
    assert named[1].scores(["?", "?"], ["", ""], ["ox", "o"]) == [0.0, 1.0]
    assert judges_of(None) == []


def test_a_directory_is_a_reward_run(tmp_path):
    (judge,) = judges_of([str(tmp_path)])
    assert judge.is_run
    assert judge.name == "judge1"


@pytest.mark.parametrize(
    ("judges", "message"),
    [
        ("llmft.metrics.rewards.exact_anser", "did you mean"),
        ("os.system", "only llmft.metrics.rewards"),
        ("llmft.metrics.rewards.whiten", "was expected"),
        ({"function": MATCHES, "patern": "x"}, "did you mean pattern"),
        ({"function": MATCHES, "answers": []}, "comes from the rows"),
        ("no/such/run", "neither the directory"),
        ([EXACT, EXACT], "two judges are called"),
    ],
)
def test_what_cannot_judge_is_refused(judges, message):
    with pytest.raises(ConfigError, match=message):
        judges_of(judges)


def test_several_judges_need_a_combination_and_names_that_it_knows():
    judges = judges_of({"safety": EXACT, "helpful": MATCHES})
    scores = {"safety": [0.1, 0.9], "helpful": [0.8, 0.8]}
    assert combine_scores("safety + helpful", judges, scores).tolist() == pytest.approx([0.9, 1.7])
    assert combine_scores("llmft.metrics.rewards.llama2", judges, scores).tolist() == [0.1, 0.8]
    other = judges_of({"kind": EXACT, "useful": MATCHES})  # no names that it knows: in their order
    assert combine_scores("llmft.metrics.rewards.llama2", other, {"kind": [0.1], "useful": [0.8]}).tolist() == [0.1]
    for combine, message in (
        (None, "set how they are combined"),
        ("safty", "did you mean safety"),
        ("os.system", "only llmft.metrics"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_combination(combine, judges)


def test_scores_of_reward_runs_become_probabilities_where_the_rule_wants_them(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    judges = judges_of({"safety": str(tmp_path / "a"), "helpful": str(tmp_path / "b")})
    combined = combine_scores("llmft.metrics.rewards.llama2", judges, {"safety": [-5.0, 3.0], "helpful": [2.0, 0.0]})
    assert combined.tolist() == pytest.approx([0.0066928509, 0.5], abs=1e-9)
