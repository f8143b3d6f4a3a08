"""Verdicts: no winner from noise, real differences are found, and every claim states its basis."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
from scipy import stats

from llmft.config.trainer import Mode
from llmft.core.errors import ConfigError, DataError
from llmft.metrics import classification
from llmft.reports.numbers import Published, judge_numbers
from llmft.reports.statistics import (
    Replicate,
    RowScores,
    Sample,
    contrast,
    critical,
    jackknife,
    look_sizes,
    row_variance,
    seeds_matter,
    should_compare_logs,
)
from llmft.reports.verdicts import Rules, Verdict, judge_samples, sentence
from tests.bench.calibration import Setting, false_winners, many, with_looks, without_difference


def sample(name: str, values: list[float], part: str = "", **more: Any) -> Sample:
    return Sample(name, tuple(Replicate(str(seed), part, value) for seed, value in enumerate(values)), **more)


def losses(per_token: np.ndarray, tokens: np.ndarray) -> RowScores:
    return RowScores(np.array([f"r:{i}" for i in range(len(tokens))]), per_token * tokens, tokens)


def seeds(name: str, runs: list[RowScores]) -> Sample:
    return Sample(name, tuple(Replicate(str(s), "", r.metric, r) for s, r in enumerate(runs)))


A, B = [1.02, 1.05, 1.01, 1.04, 1.03], [1.00, 0.96, 1.02, 0.95, 1.01]


def test_two_configurations_are_judged_by_welchs_test_and_shared_luck_by_the_paired_one() -> None:
    (comparison,) = judge_samples([sample("a", A), sample("b", B)]).families[0].comparisons
    interval = stats.ttest_ind(A, B, equal_var=False).confidence_interval(0.95)
    assert (comparison.low, comparison.high) == pytest.approx((interval.low, interval.high))
    assert comparison.verdict is (Verdict.better if interval.low > 0 else Verdict.same)
    luck = np.array([0.0, 0.3, -0.2, 0.5, -0.6, 0.1])
    first, second = luck + np.array([1, -1, 0, 1, 0, -1]) / 100, luck + np.array([5, 6, 4, 5, 6, 5]) / 100
    pair = [sample("a", first.tolist()), sample("b", second.tolist())]
    assert seeds_matter(pair)
    (comparison,) = judge_samples(pair).families[0].comparisons
    interval = stats.ttest_rel(second, first).confidence_interval(0.95)
    assert (comparison.low, comparison.high) == pytest.approx((interval.low, interval.high))
    assert comparison.verdict is Verdict.better
    assert "seed by seed" in sentence(comparison)


def test_critical_values_are_those_of_the_textbook_and_looking_costs() -> None:
    assert critical(9.0, 0.05) == pytest.approx(stats.t.isf(0.025, 9))
    for means, df in ((3, 7.3), (7, 33.0)):
        exact = stats.studentized_range.isf(0.05, means, df) / math.sqrt(2)
        assert critical(df, 0.05, 1, means) == pytest.approx(exact, rel=2e-3)
    assert critical(9.0, 0.05, 5) == pytest.approx(stats.t.isf(0.005, 9))
    assert critical(9.0, 0.05, "any") > critical(9.0, 0.05, 5)


def test_the_sequential_critical_value_is_where_the_bayes_factor_of_the_t_test_is_twenty() -> None:
    from scipy.integrate import quad

    n, df = 6, 5.0
    t = critical(df, 0.05, "any")
    density = stats.nct.pdf
    effects = quad(lambda d: density(t, df, d * math.sqrt(n)) * stats.norm.pdf(d), -12, 12)[0]
    assert effects / stats.t.pdf(t, df) == pytest.approx(20, rel=1e-3)


def test_row_variance_of_a_ratio_is_that_of_a_bootstrap_over_rows() -> None:
    rng = np.random.default_rng(1)
    tokens = rng.integers(5, 80, 400).astype(float)
    base = rng.lognormal(size=400)
    first, second = losses(base + rng.normal(size=400) * 0.3, tokens), losses(base, tokens)
    variance = row_variance([seeds("a", [first]), seeds("b", [second])], np.array([1.0, -1.0]))
    assert variance is not None
    drawn = rng.integers(0, 400, (4000, 400))
    ratios = [r.total[drawn].sum(1) / r.weight[drawn].sum(1) for r in (first, second)]
    assert math.sqrt(variance.value) == pytest.approx((ratios[0] - ratios[1]).std(), rel=0.06)


@pytest.mark.parametrize("metric", [classification.auc, classification.macro_f1])
def test_the_jackknife_over_blocks_of_rows_is_scipys_bootstrap(metric: Any) -> None:
    rng = np.random.default_rng(2)
    targets = rng.integers(0, 3, 300)
    probabilities = rng.dirichlet([1, 1, 1], 300) + 0.7 * np.eye(3)[targets]
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    variance = jackknife(metric, targets, probabilities, [f"row {i}" for i in range(300)])
    assert variance is not None
    error = math.sqrt(variance.influences().var(ddof=1) / len(variance.rows))
    places = (np.arange(300),)
    drawn = stats.bootstrap(
        places, lambda rows: metric(targets[rows], probabilities[rows]), n_resamples=150, vectorized=False, rng=rng
    )
    assert error == pytest.approx(drawn.standard_error, rel=0.2)


def test_rows_of_one_group_count_once() -> None:
    rng = np.random.default_rng(3)
    of_group = np.repeat(rng.normal(size=40), 7)
    alike = RowScores(np.array([f"r{i}" for i in range(280)]), of_group + 10, np.ones(280))
    groups = [str(i // 7) for i in range(280)]
    variances = [row_variance([seeds("a", [r])], np.array([1.0])) for r in (alike, alike.by_group(groups))]
    assert variances[0] is not None
    assert variances[1] is not None
    assert variances[1].value == pytest.approx(7 * variances[0].value, rel=0.05)


def test_what_seeds_do_to_single_rows_is_not_counted_twice() -> None:
    rng = np.random.default_rng(2)
    tokens, base = np.full(500, 20.0), rng.lognormal(size=500)
    # Two names for one configuration: all differences between their rows come from the seeds.
    samples = [seeds(name, [losses(base + rng.normal(size=500), tokens) for _ in range(4)]) for name in "ab"]
    variance = row_variance(samples, np.array([1.0, -1.0]))
    assert variance is not None
    assert variance.value < 0.2 * 2 * 1.0 / 4 / 500


def test_rows_in_another_order_are_paired_by_their_names() -> None:
    rng = np.random.default_rng(3)
    tokens, base = np.full(100, 10.0), rng.lognormal(size=100)
    straight, other = losses(base, tokens), losses(base + rng.normal(size=100) * 0.01, tokens)
    back = RowScores(other.rows[::-1], other.total[::-1], other.weight[::-1])
    both = [row_variance([seeds("a", [straight]), seeds("b", [r])], np.array([1.0, -1.0])) for r in (other, back)]
    assert both[0] is not None
    assert both[1] is not None
    assert both[0].value == pytest.approx(both[1].value)
    assert both[1].paired


def test_a_hopeless_configuration_does_not_blur_the_others_and_losses_are_compared_as_logarithms() -> None:
    example = [sample("r=8", [0.068, 0.071, 0.077]), sample("r=1", [0.27, 0.52, 0.39])]
    assert should_compare_logs(example, lower_is_better=True)
    judged = judge_samples(example)
    assert judged.answer == "r=8 is better than r=1."
    assert "%" in sentence(judged.families[0].comparisons[0])
    rates = [[0.676, 0.684, 0.671], [0.701, 0.712, 0.706], [3.5, 4.4, 3.845]]
    judged = judge_samples([sample(f"rate {i}", values) for i, values in enumerate(rates)])
    assert judged.winner == "rate 0"


def test_nothing_wins_by_one_run_by_zero_width_or_by_survivors() -> None:
    single = judge_samples([sample("a", [1.0]), sample("b", [1.3, 1.31, 1.29, 1.3])])
    assert single.winner is None
    assert "One run alone is no basis for a winner: a." in single.basis
    width = judge_samples([sample("a", [0.5, 0.5]), sample("b", [0.53125, 0.53125])])
    assert width.winner is None
    assert "are equal, so their noise is not known" in sentence(width.families[0].comparisons[0])
    left = judge_samples([sample("r=8", [0.5, 0.51, 0.49], lost=2), sample("r=4", [0.9, 0.91, 0.89, 0.9, 0.92])])
    assert left.winner is None
    assert "2 runs of r=8 diverged or failed" in left.answer
    infinite = judge_samples([sample("r=8", [0.5, 0.51, math.inf]), sample("r=4", [0.9, 0.91, 0.89])])
    assert infinite.winner is None
    assert "1 run of r=8" in infinite.answer
    assert "nan" not in sentence(infinite.families[0].comparisons[0])
    judged = judge_samples([sample("r=8", [0.5, 0.51, 0.49]), sample("r=4", [0.9, 0.91], lost=1)])
    assert judged.answer.startswith("r=8 is better than r=4. 1 run of r=4 diverged or failed")


def test_identical_runs_under_another_name_say_that_the_key_has_no_effect() -> None:
    judged = judge_samples([sample("kernels=auto", A), sample("kernels=none", A)])
    assert "the same in every run" in judged.answer
    assert "no effect" in sentence(judged.families[0].comparisons[0])


def test_an_open_answer_names_those_that_may_be_the_best() -> None:
    values = {"a": [1.00, 1.02, 0.98, 1.01], "b": [1.01, 1.03, 0.99, 1.02], "c": [1.3, 1.31, 1.29, 1.3]}
    judged = judge_samples([sample(name, v) for name, v in values.items()])
    assert judged.among == ["a", "b"]
    assert "No winner yet: the best is among {a, b}." in judged.answer
    assert {c.second: c.verdict for c in judged.families[0].comparisons} == {"b": Verdict.same, "c": Verdict.behind}
    assert {pair[:2] for pair in judged.pairs} == {("a", "b"), ("a", "c"), ("b", "c")}


def test_one_seed_each_never_makes_a_winner_and_the_way_out_is_said() -> None:
    rng = np.random.default_rng(4)
    tokens, base = np.full(200, 10.0), rng.lognormal(size=200)
    runs = {n: losses(base + shift + rng.normal(size=200) * 0.01, tokens) for n, shift in (("a", 0.0), ("b", 0.5))}
    judged = judge_samples([seeds(n, [r]) for n, r in runs.items()])
    (comparison,) = judged.families[0].comparisons
    assert comparison.verdict is Verdict.rows_only
    assert "No winner" in judged.answer
    assert "the noise of seeds is unknown; run each with 2 seeds or more" in sentence(comparison)


def test_published_numbers_rank_is_told_apart_and_quantisation_is_not() -> None:
    judged = judge_numbers(
        [
            Published("r=4", 1.028, sd=0.015, comparison="rank"),
            Published("r=8", 1.08536, sd=0.015, comparison="rank"),
            Published("int4", 1.028, sd=0.015, comparison="quantisation"),
            Published("bf16", 1.03694, sd=0.015, comparison="quantisation"),
        ],
        metric="loss_nats",
    )
    assert judged["rank"].winner == "r=4"
    assert "Based on the stated standard deviation of 0.01500" in judged["rank"].basis
    assert judged["quantisation"].winner is None
    # The same spread measured on two seeds is very uncertain, and the first falls too.
    few = judge_numbers([Published("r=4", 1.028, 1, 0.015, 2), Published("r=8", 1.08536, 1, 0.015, 2)], mode=Mode.min)
    assert few[""].winner is None


def test_a_measured_spread_counts_as_measured() -> None:
    lines = [Published("a", 1.0, 2, 0.01), Published("b", 1.028, 2, 0.012)]
    (comparison,) = judge_numbers(lines, mode=Mode.min)[""].families[0].comparisons
    welch = stats.ttest_ind_from_stats(1.028, 0.012, 2, 1.0, 0.01, 2, equal_var=False)
    assert (comparison.low or 0) < 0 < welch.pvalue
    known = [Published("a", 1.0, 2, 0.01, 1000), Published("b", 1.028, 2, 0.012, 1000)]
    assert judge_numbers(known, mode=Mode.min)[""].winner == "a"


def test_published_numbers_without_a_spread_make_no_winner_and_a_lone_one_is_refused() -> None:
    judged = judge_numbers([Published("a", 1.0), Published("b", 3.0)], mode=Mode.min)
    assert judged[""].families[0].comparisons[0].verdict is Verdict.unknown
    with pytest.raises(DataError, match="two configurations are needed"):
        judge_numbers([Published("a", 1.0, comparison="x")], mode=Mode.min)


def test_the_metric_of_published_numbers_says_which_is_better_and_none_is_refused() -> None:
    def best(column: str, **how: Any) -> str:
        lines = [Published("low", 0.5, 5, 0.01, metric=column), Published("high", 0.9, 5, 0.01, metric=column)]
        return judge_numbers(lines, **how)[""].families[0].comparisons[0].first

    assert best("accuracy") == best("val/rouge_l") == best("mine", mode=Mode.max) == best("", metric="auc") == "high"
    assert best("rmse") == best("loss_nats") == best("llmft.metrics.multilabel.logloss") == "low"
    for metric, how, message in (
        ("", {}, "the numbers: what the values measure is unknown: set metric=accuracy"),
        ("mine", {}, "mode: mine does not declare whether higher or lower is better"),
        ("accuracy", {"mode": Mode.min}, "mode=min: accuracy declares that higher is better; set mode=max"),
    ):
        with pytest.raises(ConfigError, match=re.escape(message)):
            best(metric, **how)
    with pytest.raises(DataError, match="values of accuracy and rmse cannot be compared"):
        judge_numbers([Published("a", 1.0, metric="accuracy"), Published("b", 2.0, metric="rmse")])


def test_a_higher_metric_wins_where_higher_is_better() -> None:
    judged = judge_samples(
        [sample("a", [0.5, 0.51, 0.49]), sample("b", [0.9, 0.91, 0.89])], Rules(lower_is_better=False)
    )
    assert judged.answer == "b is better than a."


def test_as_many_runs_as_are_planned_find_the_smallest_difference_that_matters() -> None:
    rng = np.random.default_rng(5)
    wins = []
    while len(wins) < 40:
        pair = [sample(n, rng.normal(1.0, 0.1, 4).tolist()) for n in "ab"]
        (comparison,) = judge_samples(pair, Rules(smallest=0.2)).families[0].comparisons
        planned = re.search(r"\((\d+) in all\) would find a difference of 0.2000", sentence(comparison))
        if planned:
            count = int(planned[1])
            again = [sample(n, rng.normal(m, 0.1, count).tolist()) for n, m in (("a", 1.0), ("b", 1.2))]
            wins.append(judge_samples(again).winner == "a")
    assert np.mean(wins) > 0.75


def test_folds_are_compared_fold_by_fold_and_one_fold_alone_says_nothing() -> None:
    rng = np.random.default_rng(6)
    hard = rng.normal(size=5)

    def folds(shift: float, overlap: float, count: int = 5) -> Sample:
        values = hard + shift + rng.normal(size=5) * 0.01
        return Sample(f"{shift}", tuple(Replicate("0", f"fold {f}", v) for f, v in enumerate(values[:count])), overlap)

    narrow, wide = (contrast([folds(0.0, o), folds(0.1, o)], [1, -1]) for o in (0.0, 0.25))
    assert narrow.folds
    assert wide.seeds is not None
    assert narrow.seeds is not None
    assert wide.seeds.value > narrow.seeds.value
    alone = judge_samples([folds(0.0, 0.25), Sample("b", (Replicate("0", "fold 0", 2.0),), 0.25)])
    assert alone.winner is None
    assert "and is ." not in alone.answer


def test_looks_are_spread_over_the_seeds() -> None:
    assert look_sizes(2, 10, 5) == [2, 4, 6, 8, 10]
    assert look_sizes(3, 5, "any") == look_sizes(3, 5, 5) == [3, 4, 5]
    assert look_sizes(3, 10, 1) == [3, 10]


@pytest.mark.parametrize(
    "setting",
    [
        Setting(2, 3),
        Setting(2, 5, spreads=(0.5, 1.5)),
        Setting(6, 3, noise="bimodal"),
        Setting(2, 2, "accuracy"),
        Setting(2, 3, "groups"),
        Setting(2, 1, "folds", rows=200),
        Setting(2, 2, until=10, looks=5),
    ],
    ids=str,
)
def test_sweeps_without_a_difference_rarely_get_a_winner(setting: Setting) -> None:
    # At a rate of 5%, more than 14 of 150 have a probability of 2%.
    assert false_winners(setting, 150, 7) <= 14 / 150


def test_what_is_better_by_two_standard_deviations_is_found() -> None:
    two = many(Setting(2, 5, effect=2.0), 200, 8)
    assert np.mean([o.winner == "c0" for o in two]) >= 0.7
    six = many(Setting(6, 5, effect=2.0), 150, 8)
    assert np.mean(["c0" in o.among for o in six]) >= 0.94


@pytest.mark.slow
@pytest.mark.parametrize("setting", [*without_difference(), *(s for s in with_looks() if not s.effect)], ids=str)
def test_false_winners_stay_below_five_percent(setting: Setting) -> None:
    hits = round(600 * false_winners(setting, 600, 9))
    assert stats.binomtest(hits, 600, 0.055, alternative="greater").pvalue > 0.01, hits


@pytest.mark.slow
def test_the_promised_power_and_coverage_are_reached() -> None:
    for setting, least in ((Setting(6, 5, effect=2.0), 0.41), (Setting(2, 5, effect=2.0), 0.73)):
        outcomes = many(setting, 1000, 10)
        assert np.mean([o.winner == "c0" for o in outcomes]) >= least
        assert np.mean(["c0" in o.among for o in outcomes]) >= 0.94
        assert 0.93 <= np.mean([o.covered for o in outcomes]) <= 0.995
