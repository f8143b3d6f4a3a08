"""How often the verdicts are wrong, and how often they find a real difference: a simulation.

    python -m tests.bench.calibration [sweeps=1000] [seed=0] [part=false|power|looks]

prints the tables of sweeps/README.md. A simulated sweep has one better configuration or none. The noise of runs is
Gaussian, Student's t with 3 degrees of freedom, skewed (log-normal) or has two modes; spreads are alike or differ
threefold. What is measured is

- `plain`: a number per run, without rows;
- `loss`: skewed losses of rows of about 60 tokens, most of it shared by all configurations. What configurations do to
  single rows has mean 0 over all rows that could have been drawn, so that none is better in truth;
- `accuracy`: rows that are right or wrong, likewise;
- `groups`: such losses where 7 rows answer one question, and are right or wrong together;
- `folds`: five-fold cross-validation of ridge regressions that see features of their own, equally good ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from llmft.config.invocation import arguments_of_process
from llmft.reports.statistics import Array, Looks, Replicate, RowScores, Sample, look_sizes
from llmft.reports.verdicts import Rules, Verdicts, judge_samples

LEVEL, SD = 1.0, 0.01
FOLDS = 5


@dataclass(frozen=True)
class Setting:
    """A kind of sweep; `effect` is how much better the first configuration is, in standard deviations between runs.

    The last `hopeless` ones are five standard deviations behind. With `until`, seeds are added to the configurations
    that may be the best, at each of the `looks`.
    """

    configurations: int
    seeds: int
    measured: str = "plain"
    noise: str = "gauss"
    spreads: tuple[float, float] = (1.0, 1.0)
    rows: int = 280
    shared: float = 0.0
    effect: float = 0.0
    hopeless: int = 0
    until: int = 0
    looks: Looks = 1

    def __str__(self) -> str:
        kind = self.measured if self.measured == "plain" else f"{self.measured}, {self.rows} rows"
        spread = "alike" if self.spreads[0] == self.spreads[1] else "threefold"
        return (
            f"{self.configurations:>2} | {self.seeds:>2} | {kind:<19} | {self.noise:<9} | {spread:<9} | {self.shared}"
        )


@dataclass(frozen=True)
class Outcome:
    """The outcome of a simulated sweep."""

    winner: str | None
    among: list[str]
    runs: int
    covered: bool


def luck(noise: str, rng: np.random.Generator, size: tuple[int, ...]) -> Array:
    """Noise with mean 0 and variance 1."""
    if noise == "t3":
        return rng.standard_t(3, size=size) / math.sqrt(3)
    if noise == "lognormal":
        return (rng.lognormal(0.0, 0.5, size=size) - math.exp(0.125)) / math.sqrt(math.exp(0.25) * (math.exp(0.25) - 1))
    if noise == "bimodal":
        return (rng.choice([-1.0, 1.0], size=size) + 0.5 * rng.normal(size=size)) / math.sqrt(1.25)
    return rng.normal(size=size)


def simulate(setting: Setting, rng: np.random.Generator) -> list[Sample]:
    """The samples of one sweep, with as many seeds as it may use."""
    if setting.measured == "folds":
        return _folds(setting, rng)
    count, seeds, rows = setting.configurations, max(setting.seeds, setting.until), setting.rows
    spread = rng.permutation(np.linspace(*setting.spreads, count))[:, None]
    common, individual = luck(setting.noise, rng, (seeds,)), luck(setting.noise, rng, (count, seeds))
    run = spread * (math.sqrt(setting.shared) * common + math.sqrt(1 - setting.shared) * individual)
    run[0] -= setting.effect
    run[count - setting.hopeless :] += 5.0
    if setting.measured == "plain":
        return [_sample(c, [(LEVEL + SD * value, None) for value in run[c]]) for c in range(count)]
    groups = rows // 7 if setting.measured == "groups" else rows
    group = np.arange(rows) % groups
    taste = rng.normal(size=(count, groups))[:, group] * 0.8 + rng.normal(size=(count, rows)) * 0.6
    wobble = rng.normal(size=(count, seeds, rows))
    base = rng.normal(size=groups)[group]
    names = np.array([f"rows:{row}" for row in range(rows)])
    samples = []
    for c in range(count):
        scores = []
        for s in range(seeds):
            if setting.measured == "accuracy":
                right = 0.8 + 1.5 * base + 0.5 * taste[c] + 0.4 * wobble[c, s] - 0.05 * run[c, s] > 0
                scores.append(RowScores(names, right.astype(float), np.ones(rows)))
                continue
            tokens = 20.0 + 80.0 * (np.arange(rows) % 10) / 9
            each = LEVEL * np.exp(0.5 * base) + 0.05 * taste[c] + 0.05 * wobble[c, s] + SD * run[c, s]
            own_rows = RowScores(names, each * tokens, tokens)
            scores.append(own_rows.by_group(group.astype(str).tolist()) if setting.measured == "groups" else own_rows)
        samples.append(_sample(c, [(score.metric, score) for score in scores]))
    return samples


def _sample(c: int, runs: Sequence[tuple[float, RowScores | None]]) -> Sample:
    return Sample(f"c{c}", tuple(Replicate(f"{s:03}", "", value, rows) for s, (value, rows) in enumerate(runs)))


def _folds(setting: Setting, rng: np.random.Generator) -> list[Sample]:
    """Ridge regressions on features of their own, by five-fold cross-validation; the first may have better ones."""
    rows, each = setting.rows, 8
    names = np.array([f"rows:{row}" for row in range(rows)])
    features = rng.normal(size=(setting.configurations, rows, each))
    strength = np.full(setting.configurations, 0.35)
    strength[0] += setting.effect
    target = np.einsum("crf,c->r", features, strength) / math.sqrt(each) * 2 + rng.normal(size=rows)
    fold = rng.permutation(np.arange(rows) % FOLDS)
    samples = []
    for c, x in enumerate(features):
        replicates = []
        for k in range(FOLDS):
            inside, outside = fold != k, fold == k
            weights = np.linalg.solve(x[inside].T @ x[inside] + 5 * np.eye(each), x[inside].T @ target[inside])
            squares = (target[outside] - x[outside] @ weights) ** 2
            score = RowScores(names[outside], squares, np.ones(len(squares)))
            replicates.append(Replicate("0", f"fold {k}", score.metric, score))
        samples.append(Sample(f"c{c}", tuple(replicates), 1 / (FOLDS - 1)))
    return samples


def outcome(setting: Setting, rng: np.random.Generator) -> Outcome:
    """Simulates a sweep and judges it, after each look where seeds are added."""
    samples = simulate(setting, rng)
    lower = setting.measured != "accuracy"
    if not setting.until:
        verdicts = judge_samples(samples, Rules(lower, setting.looks))
        return _outcome(setting, verdicts, sum(len(s.replicates) for s in samples))
    used = {s.name: setting.seeds for s in samples}
    among = list(used)
    for size in look_sizes(setting.seeds, setting.until, setting.looks):
        used |= dict.fromkeys(among, size)
        so_far = [replace(s, replicates=s.replicates[: used[s.name]]) for s in samples]
        verdicts = judge_samples(so_far, Rules(lower, setting.looks))
        among = verdicts.among
        if verdicts.winner is not None:
            break
    return _outcome(setting, verdicts, sum(used.values()))


def _outcome(setting: Setting, verdicts: Verdicts, runs: int) -> Outcome:
    """`covered`: whether the interval between the first two configurations contains the true difference."""
    covered = True
    for pair in verdicts.families[0].comparisons:
        if {pair.first, pair.second} == {"c0", "c1"} and pair.low is not None and pair.high is not None:
            truth = setting.effect * SD * (1 if pair.first == "c0" else -1)
            covered = pair.low <= truth <= pair.high
    return Outcome(verdicts.winner, verdicts.among, runs, covered)


def many(setting: Setting, sweeps: int, seed: int) -> list[Outcome]:
    """The outcomes of `sweeps` sweeps."""
    rng = np.random.default_rng([seed, *str(setting).encode()])
    return [outcome(setting, rng) for _ in range(sweeps)]


def false_winners(setting: Setting, sweeps: int, seed: int = 0) -> float:
    """The share of sweeps with a wrong winner; where nothing is better, with any winner."""
    return float(
        np.mean([o.winner not in (None, "c0" if setting.effect else None) for o in many(setting, sweeps, seed)])
    )


def without_difference() -> Iterator[Setting]:
    """Every kind of sweep in which nothing is better."""
    for count in (2, 3, 6, 12):
        for seeds in (2, 3, 5, 10):
            for noise in ("gauss", "t3", "lognormal", "bimodal"):
                yield Setting(count, seeds, noise=noise)
            yield Setting(count, seeds, spreads=(0.5, 1.5))
            yield Setting(count, seeds, shared=0.5)
    for measured in ("loss", "accuracy", "groups"):
        for count, seeds in ((2, 2), (2, 3), (2, 5), (6, 3), (6, 5)):
            yield Setting(count, seeds, measured)
    for count, rows in ((2, 200), (2, 1000), (6, 200)):
        yield Setting(count, 1, "folds", rows=rows)


def with_difference() -> Iterator[Setting]:
    """Every kind of sweep in which one is better."""
    for count in (2, 3, 6, 12):
        for effect in (1.0, 2.0, 3.0):
            yield Setting(count, 5, effect=effect)
        yield Setting(count, 5, effect=2.0, shared=0.5)
    for seeds in (3, 7, 10):
        yield Setting(6, seeds, effect=2.0)
    for count, rows in ((2, 200), (2, 1000), (6, 200)):
        yield Setting(count, 1, "folds", rows=rows, effect=0.25 * math.sqrt(200 / rows))


def with_looks() -> Iterator[Setting]:
    """Sweeps that add seeds, and fixed grids to compare them with."""
    for count, hopeless in ((2, 0), (6, 0), (6, 4)):
        for effect in (0.0, 1.0, 2.0, 3.0):
            kind = Setting(count, 2, effect=effect, hopeless=hopeless, until=10)
            yield replace(kind, looks=5)
            yield replace(kind, looks="any")
            yield replace(kind, seeds=5, until=0)
            yield replace(kind, seeds=10, until=0)


def main(arguments: Sequence[str]) -> None:
    """Prints the tables."""
    options = dict(argument.partition("=")[::2] for argument in arguments)
    sweeps, seed, part = int(options.get("sweeps", 1000)), int(options.get("seed", 0)), options.get("part", "")
    for name, settings in (("false", without_difference), ("power", with_difference), ("looks", with_looks)):
        if part not in ("", name):
            continue
        print(" k |  n | measured            | noise     | spreads   | shared | until/looks | effect"
              " | hopeless | false | found | in set | set size | covered | runs")  # fmt: skip
        for setting in settings():
            outcomes = many(setting, sweeps, seed)
            best = "c0" if setting.effect else None
            wrong = np.mean([o.winner not in (None, best) for o in outcomes])
            right = np.mean([o.winner == "c0" for o in outcomes]) if best else math.nan
            inside, size = np.mean(["c0" in o.among for o in outcomes]), np.mean([len(o.among) for o in outcomes])
            covered = np.mean([o.covered for o in outcomes]) if setting.measured != "folds" else math.nan
            runs = np.mean([o.runs for o in outcomes])
            looks = f"{setting.until}/{setting.looks}" if setting.until else ""
            print(f"{setting}    | {looks:<11} | {setting.effect:<6} | {setting.hopeless:<8} | "
                  f"{wrong:5.1%} | {right:5.0%} | {inside:6.1%} | {size:8.1f} | {covered:7.1%} | {runs:.1f}",
                  flush=True)  # fmt: skip


if __name__ == "__main__":
    main(arguments_of_process())
