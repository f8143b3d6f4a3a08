"""Verdicts: no winner out of noise, what is there is found, and every claim says what it rests on."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
from scipy import stats

from llmft.config.sections import Mode
from llmft.core.errors import ConfigError, DataError
from llmft.reports.calibration import Setting, false_winner, finds_it
from llmft.reports.comparing import Verdict, compare, range_critical
from llmft.reports.noise import Noise, Replicate, RowLosses, Sample, row_variance
from llmft.reports.numbers import Published, judge_numbers
from llmft.reports.verdicts import judge_samples, sentence


def sample(name: str, values: list[float], part: str = "") -> Sample:
    return Sample(name, tuple(Replicate(str(seed), part, value) for seed, value in enumerate(values)))


def losses(per_token: np.ndarray, tokens: np.ndarray) -> RowLosses:
    return RowLosses(np.array([f"r:{i}" for i in range(len(tokens))]), per_token * tokens, tokens)


def lone(name: str, found: RowLosses) -> Sample:
    return Sample(name, (Replicate("0", "", found.metric, found),))


A, B = [1.02, 1.05, 1.01, 1.04, 1.03], [1.00, 0.96, 1.02, 0.95, 1.01]


def test_two_independent_samples_are_judged_by_students_t_at_the_wider_of_both_questions() -> None:
    noise = Noise.measured([sample("a", A), sample("b", B)])
    assert not noise.blocked
    found = compare(noise, {"a": 1, "b": -1}, ("a", "b"), family=2)
    t = stats.ttest_ind(A, B)
    assert found.contrast.pooled is not None
    assert found.estimate / math.sqrt(found.contrast.pooled.value) == pytest.approx(t.statistic)
    assert noise.df == 8
    # Kramer's form of the interval at the level of the first question is scipy's own.
    level = t.confidence_interval(1 - 0.05 * 0.86)
    assert found.low is not None
    assert found.low <= level.low + 1e-9


def test_the_critical_value_for_many_means_is_the_studentised_range() -> None:
    for means in (3, 7, 12):
        for df in (2.0, 7.3, 33.0):
            exact = stats.studentized_range.isf(0.05, means, df) / math.sqrt(2)
            assert range_critical(means, df, 0.05) == pytest.approx(exact, rel=2e-3)
    assert range_critical(2, 9.0, 0.05) == pytest.approx(stats.t.isf(0.025, 9))
    # Where scipy's integral is not exact enough, Bonferroni's, which is larger.
    assert range_critical(4, 1.0, 1e-5) == pytest.approx(stats.t.isf(1e-5 / 12, 1))


def test_shared_seeds_are_compared_seed_by_seed_like_a_paired_t() -> None:
    luck = np.array([0.0, 0.3, -0.2, 0.5, -0.6, 0.1])
    a = (luck + np.array([0.01, -0.01, 0.0, 0.01, 0.0, -0.01])).tolist()
    b = (luck + 0.05 + [0.0, 0.01, -0.01, 0.0, 0.01, 0.0]).tolist()
    noise = Noise.measured([sample("a", a), sample("b", b)])
    found = compare(noise, {"a": 1, "b": -1}, ("a", "b"), family=2)
    assert noise.blocked
    assert found.verdict is Verdict.better
    assert found.contrast.own is not None
    paired = stats.ttest_rel(a, b)
    assert found.estimate / math.sqrt(found.contrast.own.value) == pytest.approx(paired.statistic)


def test_row_variance_of_a_ratio_is_that_of_a_bootstrap_over_rows() -> None:
    rng = np.random.default_rng(1)
    tokens = rng.integers(5, 80, 400).astype(float)
    base = rng.lognormal(size=400)
    first, second = losses(base + rng.normal(size=400) * 0.3, tokens), losses(base, tokens)
    samples = [Sample(n, (Replicate("0", "", r.metric, r),)) for n, r in (("a", first), ("b", second))]
    found = row_variance(samples, np.array([1.0, -1.0]))
    assert found is not None
    drawn = rng.integers(0, 400, (4000, 400))
    ratios = [r.loss_nats[drawn].sum(1) / r.tokens[drawn].sum(1) for r in (first, second)]
    assert math.sqrt(found.variance.value) == pytest.approx((ratios[0] - ratios[1]).std(), rel=0.06)


def test_what_seeds_do_to_single_rows_is_not_counted_twice() -> None:
    rng = np.random.default_rng(2)
    tokens = np.full(500, 20.0)
    base = rng.lognormal(size=500)
    # Two names for one configuration: all that differs between them by rows is the seeds' doing.
    samples = []
    for name in "ab":
        runs = [losses(base + rng.normal(size=500), tokens) for _ in range(4)]
        samples.append(Sample(name, tuple(Replicate(str(s), "", r.metric, r) for s, r in enumerate(runs))))
    found = row_variance(samples, np.array([1.0, -1.0]))
    assert found is not None
    naive = 2 * 1.0 / 4 / 500
    assert found.variance.value < 0.2 * naive


def test_rows_in_another_order_are_paired_by_their_names() -> None:
    rng = np.random.default_rng(3)
    tokens = np.full(100, 10.0)
    base = rng.lognormal(size=100)
    straight, other = losses(base, tokens), losses(base + rng.normal(size=100) * 0.01, tokens)
    back = RowLosses(other.rows[::-1], other.loss_nats[::-1], other.tokens[::-1])
    both = [row_variance([lone("a", straight), lone("b", found)], np.array([1.0, -1.0])) for found in (other, back)]
    assert both[0] is not None
    assert both[1] is not None
    assert both[0].variance.value == pytest.approx(both[1].variance.value)
    assert both[1].paired


def test_one_seed_each_never_makes_a_winner() -> None:
    rng = np.random.default_rng(4)
    tokens, base = np.full(200, 10.0), rng.lognormal(size=200)
    runs = {n: losses(base + shift + rng.normal(size=200) * 0.01, tokens) for n, shift in (("a", 0.0), ("b", 0.5))}
    found = judge_samples([Sample(n, (Replicate("0", "", r.metric, r),)) for n, r in runs.items()])
    (comparison,) = found.families[0].comparisons
    assert comparison.verdict is Verdict.rows_only
    assert "No winner" in found.answer
    assert "seed noise is unknown" in sentence(comparison)
    assert "run 4 more seeds" in sentence(comparison)


def test_a_single_seed_borrows_the_spread_of_other_configurations_and_says_so() -> None:
    found = judge_samples([sample("a", [1.0, 1.01, 0.99]), sample("b", [2.0]), sample("c", [1.005])])
    words = {c.second: sentence(c) for c in found.families[0].comparisons}
    assert "a spread known from elsewhere" in words["b"]
    assert "borrow the spread" in found.basis
    assert {c.second: c.verdict for c in found.families[0].comparisons} == {"b": Verdict.better, "c": Verdict.same}


def test_published_numbers_rank_is_told_apart_and_quantisation_is_not() -> None:
    found = judge_numbers(
        [
            Published("r=4", 1.028, sd=0.015, comparison="rank"),
            Published("r=8", 1.08536, sd=0.015, comparison="rank"),
            Published("int4", 1.028, sd=0.015, comparison="quantisation"),
            Published("bf16", 1.03694, sd=0.015, comparison="quantisation"),
        ],
        metric="loss_nats",
    )
    rank, quantisation = (found[name].families[0].comparisons[0] for name in ("rank", "quantisation"))
    assert rank.verdict is Verdict.better
    assert "one run each" in sentence(rank)
    assert "Rests on the stated standard deviation of 0.015" in found["rank"].basis
    assert quantisation.verdict is Verdict.same
    # The same spread measured on two seeds is hardly known, and the first falls too.
    few = judge_numbers([Published("r=4", 1.028, 1, 0.015, 2), Published("r=8", 1.08536, 1, 0.015, 2)], mode=Mode.min)
    assert few[""].families[0].comparisons[0].verdict is Verdict.same


def test_published_numbers_without_a_spread_make_no_winner_and_a_lone_one_is_refused() -> None:
    found = judge_numbers([Published("a", 1.0), Published("b", 3.0)], mode=Mode.min)
    assert found[""].families[0].comparisons[0].verdict is Verdict.unknown
    with pytest.raises(DataError, match="two configurations are needed"):
        judge_numbers([Published("a", 1.0, comparison="x")], mode=Mode.min)


def test_the_metric_of_published_numbers_says_which_is_better_and_none_is_refused() -> None:
    def best(column: str, **how: Any) -> str:
        lines = [Published("low", 0.5, 5, 0.01, metric=column), Published("high", 0.9, 5, 0.01, metric=column)]
        return judge_numbers(lines, **how)[""].families[0].comparisons[0].first

    assert best("accuracy") == best("val/rouge_l") == best("mine", mode=Mode.max) == best("", metric="auc") == "high"
    assert best("rmse") == best("loss_nats") == best("llmft.metrics.multilabel.logloss") == "low"
    for metric, how, message in (
        ("", {}, "the numbers: nothing says what the values measure: set metric=accuracy"),
        ("mine", {}, "mode: mine does not declare whether higher or lower is better"),
        ("accuracy", {"mode": Mode.min}, "mode=min: more of accuracy is better"),
    ):
        with pytest.raises(ConfigError, match=re.escape(message)):
            best(metric, **how)
    with pytest.raises(DataError, match="values of accuracy and rmse cannot be compared"):
        judge_numbers([Published("a", 1.0, metric="accuracy"), Published("b", 2.0, metric="rmse")])


def test_a_higher_metric_wins_where_higher_is_better() -> None:
    found = judge_samples([sample("a", [0.5, 0.51, 0.49]), sample("b", [0.9, 0.91, 0.89])], lower_is_better=False)
    assert found.answer == "b is better than a."


def test_as_many_seeds_as_are_asked_for_do_settle_it() -> None:
    rng = np.random.default_rng(5)
    seeds = None
    while seeds is None:
        found = judge_samples(
            [sample("a", rng.normal(1.0, 0.1, 4).tolist()), sample("b", rng.normal(1.1, 0.1, 4).tolist())]
        )
        comparison = found.families[0].comparisons[0]
        seeds = comparison.seeds_needed
    size, sd = abs(comparison.estimate), math.sqrt(comparison.contrast.run_variance / 2)
    again = [
        judge_samples([sample(n, rng.normal(m, sd, seeds).tolist()) for n, m in (("a", 1.0), ("b", 1.0 + size))])
        for _ in range(200)
    ]
    hits = np.mean([a.families[0].comparisons[0].verdict is Verdict.better for a in again])
    assert hits > 0.7


def test_folds_are_compared_fold_by_fold_and_their_shared_rows_widen_the_interval() -> None:
    rng = np.random.default_rng(6)
    hard = rng.normal(size=5)

    def folds(shift: float, overlap: float) -> Sample:
        values = hard + shift + rng.normal(size=5) * 0.01
        return Sample(f"{shift}", tuple(Replicate("0", f"fold {f}", v) for f, v in enumerate(values)), overlap)

    narrow, wide = (compare(Noise.measured(s), {"0.0": 1, "0.1": -1}, ("0.0", "0.1"), family=2)
                    for s in ([folds(0.0, o), folds(0.1, o)] for o in (0.0, 0.25)))  # fmt: skip
    assert narrow.verdict is Verdict.better
    assert narrow.contrast.blocked
    assert wide.contrast.own is not None
    assert narrow.contrast.own is not None
    assert wide.contrast.own.value > narrow.contrast.own.value


@pytest.mark.parametrize(
    "setting",
    [
        Setting((3,), 2, num_rows=200),
        Setting((3,), 5, num_rows=200),
        Setting((12,), 3, num_rows=200, spreads=(0.005, 0.015)),
        Setting((6,), 3, num_rows=200, spreads=(0.015, 0.005), odd=True),
        Setting((2, 3), 3, num_rows=200, shared=0.5),
    ],
    ids=str,
)
def test_sweeps_without_a_difference_rarely_get_a_winner(setting: Setting) -> None:
    rng = np.random.default_rng(7)
    hits = sum(false_winner(setting, rng) for _ in range(150))
    # At a rate of 5%, more than 14 of 150 come once in fifty times.
    assert hits <= 14


@pytest.mark.parametrize("setting", [Setting((2,), 5, shared=0.5, effect=2.0), Setting((2, 3), 5, effect=2.0)], ids=str)
def test_a_value_better_by_two_standard_deviations_is_found_with_five_seeds(setting: Setting) -> None:
    rng = np.random.default_rng(8)
    assert np.mean([finds_it(setting, rng) for _ in range(120)]) >= 0.8


@pytest.mark.slow
@pytest.mark.parametrize("shared", [0.0, 0.5])
@pytest.mark.parametrize("seeds", [2, 3, 4, 5])
@pytest.mark.parametrize("shape", [(3,), (2, 3), (12,)], ids=str)
def test_false_winners_stay_below_five_percent(shape: tuple[int, ...], seeds: int, shared: float) -> None:
    rng = np.random.default_rng(9)
    for spreads, odd in (((0.01, 0.01), False), ((0.005, 0.015), False), ((0.015, 0.005), True)):
        setting = Setting(shape, seeds, spreads=spreads, odd=odd, shared=shared, num_rows=500)
        hits = sum(false_winner(setting, rng) for _ in range(600))
        assert stats.binomtest(hits, 600, 0.05, alternative="greater").pvalue > 0.01, (setting, hits)
