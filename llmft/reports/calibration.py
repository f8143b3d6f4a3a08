"""How often the verdicts are wrong, and how often they find what is there: a simulation.

    python -m llmft.reports.calibration [sweeps=400] [seed=0] [part=aa|ab]

prints the two tables below for `sweeps` simulated sweeps per line (a quarter of an hour for 500 on one core).

A simulated sweep looks like the logs': a loss near 1.03 nats, a standard deviation of 0.005 to 0.015 between seeds,
200 or 2,000 validation rows of 60 tokens on average whose losses are skewed (log-normal) and mostly shared between
the configurations. Row i of run s of configuration c has, per token,

    base_i + taste_ci + luck_cs + wobble_csi

`taste` (skewed, mean 0 over all rows that could have been drawn) makes configurations differ on the rows at hand
without differing in truth; `luck` is the seed's, of which a share `shared` is common to all configurations that used
the seed (data order, initial weights); `wobble` is what a seed does to single rows.

**A/A**: no configuration is better in truth. Counted are sweeps in which any verdict calls anything better, over 2 to
5 seeds, 2 to 12 configurations, equal spreads and spreads that differ threefold. The limit is 5%.

**A/B**: one value of a key is better by two seed standard deviations, with 5 seeds. Counted are sweeps that say so.

Figures of `sweeps=500 seed=2`. A/A: the worst of the six kinds of spread, rows and sharing, in brackets their mean:

    values | 2 seeds      | 3 seeds      | 5 seeds
         2 |  3.2% (1.7%) |  3.2% (2.1%) |  6.2% (4.0%)
         3 |  1.8% (1.3%) |  2.8% (2.1%) |  3.6% (3.0%)
     2 x 3 |  0.8% (0.5%) |  2.4% (1.1%) |  3.0% (2.3%)
         6 |  2.6% (1.1%) |  3.2% (2.1%) |  4.4% (3.6%)
        12 |  2.2% (1.1%) |  4.8% (2.4%) |  5.0% (3.3%)

A/B, by the share of luck that is common to a seed:

    values | 0.0    | 0.5    | 0.8
         2 |  66.0% |  84.8% |  97.4%
     2 x 2 |  80.6% |  82.4% |  97.8%
     2 x 3 |  96.2% |  92.6% |  99.8%
     2 x 6 |  99.2% | 100.0% | 100.0%

and with nothing shared 87.8% for 2 x 3 values on 200 rows, 79.8% for two values with six seeds.

From three configurations on no line is above 5%. The worst line of two values with five seeds reads 6.2% (standard
error 1%; the six of them have a mean of 4.0%).

Two values alone, five seeds each that share nothing, stay short of 80%. Without any noise of rows, Student's test at
exactly 5%, the most powerful one, finds two standard deviations in 79.1% of the cases; the guards against unequal
spreads and against the choice of rows cost the rest, and about a sixth seed makes up for it. Seeds that share half of
their luck, or a second key in the sweep, put it above 80%. One key with 3, 6 or 12 values of which one is better by two
standard deviations is called better than *every* other one in 45%, 12% and 2% (200 sweeps each, nothing shared): the
best of many by chance lies ahead of its like by about as much. Over eight seeds of the embedded example, floors of the
schedule of 0 and 0.2 were correlated by 0.85 at rank 6 and 0.2 at rank 8, different ranks by -0.6 to 0.4.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from llmft.config.invocation import arguments_of_process
from llmft.reports.comparing import Verdict
from llmft.reports.noise import Replicate, RowLosses, Sample
from llmft.reports.verdicts import judge_samples

LOSS = 1.03
MEAN_TOKENS = 60.0


@dataclass(frozen=True)
class Setting:
    """A kind of sweep: `shape` values of each key, `seeds` runs of each configuration, `spreads` of the seeds' luck."""

    shape: tuple[int, ...]
    seeds: int
    num_rows: int = 2000
    spreads: tuple[float, float] = (0.01, 0.01)
    """The standard deviation of the first and of the last configuration, evenly spaced between."""
    odd: bool = False
    """Only the first configuration has the first spread, all others the last."""
    shared: float = 0.0
    effect: float = 0.0
    """How much better the first value of the first key is, in standard deviations of the seeds."""
    taste: float = 0.05
    wobble: float = 0.1

    @property
    def num_configurations(self) -> int:
        """Configurations in the sweep."""
        return int(np.prod(self.shape))

    def __str__(self) -> str:
        spread = (
            f"{self.spreads[0]:g}" if self.spreads[0] == self.spreads[1] else f"{self.spreads[0]:g}-{self.spreads[1]:g}"
        )
        kind = "one odd" if self.odd else "equal" if self.spreads[0] == self.spreads[1] else "graded"
        grid = " x ".join(map(str, self.shape))
        return f"{grid:>7} | {self.seeds} | {self.num_rows:>5} | {spread:>10} {kind:<7} | {self.shared:.1f}"


def simulate(setting: Setting, rng: np.random.Generator) -> tuple[list[Sample], dict[str, dict[str, str]], list[str]]:
    """One sweep: its samples, each configuration's values, and the keys."""
    count, n, rows = setting.num_configurations, setting.seeds, setting.num_rows
    spread = np.linspace(setting.spreads[0], setting.spreads[1], count)
    if setting.odd:
        spread = np.where(np.arange(count) == 0, setting.spreads[0], setting.spreads[1])
    base = rng.lognormal(-0.125, 0.5, rows) * LOSS
    tokens = np.maximum(rng.lognormal(np.log(MEAN_TOKENS) - 0.18, 0.6, rows).round(), 1)
    taste = setting.taste * (rng.exponential(size=(count, rows)) - 1)
    common = rng.normal(size=n)
    own = rng.normal(size=(count, n))
    luck = spread[:, None] * (np.sqrt(setting.shared) * common + np.sqrt(1 - setting.shared) * own)
    settings = list(np.ndindex(*setting.shape))
    better = np.array([place[0] == 0 for place in settings])
    # The standard deviation between seeds, as one would see it: luck, and what is left of the wobble over all rows.
    sd = float(np.hypot(np.mean(spread), setting.wobble * np.sqrt((tokens**2).sum()) / tokens.sum()))
    names = np.array([f"rows:{i}" for i in range(rows)])
    keys = [f"key{k}" for k in range(len(setting.shape))]
    samples, values = [], {}
    for c, place in enumerate(settings):
        name = ", ".join(f"{key}={value}" for key, value in zip(keys, place, strict=True))
        mean = base + taste[c] - better[c] * setting.effect * sd
        replicates = []
        for s in range(n):
            loss = (mean + luck[c, s] + setting.wobble * rng.normal(size=rows)) * tokens
            found = RowLosses(names, loss, tokens)
            replicates.append(Replicate(str(s), "", found.metric, found))
        samples.append(Sample(name, tuple(replicates)))
        values[name] = {key: str(value) for key, value in zip(keys, place, strict=True)}
    return samples, values, keys


def false_winner(setting: Setting, rng: np.random.Generator) -> bool:
    """Whether a sweep without any difference gets a winner."""
    found = judge_samples(*simulate(setting, rng))
    return any(c.verdict in (Verdict.better, Verdict.worse) for _, c in found.all)


def finds_it(setting: Setting, rng: np.random.Generator) -> bool:
    """Whether the better value of the first key is called better than each other one."""
    found = judge_samples(*simulate(setting, rng))
    wanted = "key0=0"
    family = next((f for f in found.families if f.key == "key0"), found.families[0])
    others = [c for c in family.comparisons if c.verdict is Verdict.better]
    return len(others) == len(family.comparisons) and all(c.first == wanted for c in others)


def settings_without_difference() -> Iterator[Setting]:
    """Every kind of A/A sweep that is counted."""
    for shape in ((2,), (3,), (2, 3), (6,), (12,)):
        for seeds in (2, 3, 5):
            for shared in (0.0, 0.5):
                equal = Setting(shape, seeds, shared=shared)
                yield equal
                yield replace(equal, num_rows=200, spreads=(0.005, 0.015))
                yield replace(equal, spreads=(0.015, 0.005), odd=True)


def settings_with_difference() -> Iterator[Setting]:
    """Every kind of A/B sweep that is counted."""
    for shape in ((2,), (2, 2), (2, 3), (2, 6)):
        for shared in (0.0, 0.5, 0.8):
            yield Setting(shape, 5, shared=shared, effect=2.0)
    yield Setting((2, 3), 5, num_rows=200, effect=2.0)
    yield Setting((2,), 6, effect=2.0)


def main(arguments: Sequence[str]) -> None:
    """Prints both tables."""
    given = dict(argument.partition("=")[::2] for argument in arguments)
    sweeps, seed = int(given.get("sweeps", 400)), int(given.get("seed", 0))
    part = given.get("part", "both")
    if part not in ("both", "aa", "ab"):
        raise SystemExit(f"part={part}: aa, ab or both.")
    if part != "ab":
        _without_difference(sweeps, seed)
    if part != "aa":
        _with_difference(sweeps, seed)


HEAD = " values | n | rows  | seed sd            | shared"


def _without_difference(sweeps: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    print(f"A/A, {sweeps} sweeps per line, seed {seed}: sweeps with a false winner\n{HEAD} | false")
    counts = []
    for setting in settings_without_difference():
        counts.append(sum(false_winner(setting, rng) for _ in range(sweeps)))
        print(f"{setting} | {counts[-1] / sweeps:6.1%}", flush=True)
    print(f"all: {np.mean(counts) / sweeps:.1%}, worst line {max(counts) / sweeps:.1%}\n")


def _with_difference(sweeps: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    print(f"A/B, two standard deviations, {sweeps} sweeps per line, seed {seed}: sweeps that find it\n{HEAD} | found")
    for setting in settings_with_difference():
        hits = sum(finds_it(setting, rng) for _ in range(sweeps))
        print(f"{setting} | {hits / sweeps:6.1%}", flush=True)


if __name__ == "__main__":
    main(arguments_of_process())
