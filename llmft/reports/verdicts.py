"""What a study's numbers allow to be said, in words: the best against each, and the values of each varied key.

All verdicts of a study share one chance of 5% of any false winner: with one key they are one family; with several, the
configurations get half of it and the keys share the other half (Bonferroni).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from llmft.reports.comparing import ALPHA, MOST_SEEDS, Comparison, Verdict, compare
from llmft.reports.noise import Noise, Sample
from llmft.reports.study import Study, short_names


@dataclass
class Family:
    """Comparisons that belong together: of configurations (`key` is None), or of a key's values."""

    key: str | None
    comparisons: list[Comparison]
    headline: str


@dataclass
class Verdicts:
    """All comparisons of a study, and what they rest on."""

    families: list[Family] = field(default_factory=list)
    answer: str = ""
    basis: str = ""

    @property
    def all(self) -> list[tuple[str | None, Comparison]]:
        """Every comparison with its family's key."""
        return [(family.key, found) for family in self.families for found in family.comparisons]


def undecided(verdicts: Verdicts, keys: Sequence[str]) -> set[str]:
    """The keys of which no verdict tells one value from another."""
    of_key = {family.key if len(keys) > 1 else keys[0]: family for family in verdicts.families} if keys else {}
    clear = (Verdict.better, Verdict.worse)
    return {k for k in keys if k not in of_key or not any(c.verdict in clear for c in of_key[k].comparisons)}


def judge(study: Study) -> Verdicts:
    """The verdicts on a study."""
    samples = [c.sample(study.monitor) for c in study.configurations]
    return judge_samples(
        samples,
        {c.name: c.values for c in study.configurations},
        study.keys,
        monitor=study.monitor,
        lower_is_better=study.lower_is_better,
    )


def judge_samples(
    samples: Sequence[Sample],
    values: Mapping[str, Mapping[str, str]] | None = None,
    keys: Sequence[str] = (),
    *,
    monitor: str = "val/loss_nats",
    lower_is_better: bool = True,
    noise: Noise | None = None,
) -> Verdicts:
    """The verdicts on samples whose configurations have `values` of `keys`; `noise` where the spread is told."""
    found = Verdicts()
    if not samples:
        found.answer = "No run finished with a result: see the failures."
        return found
    if len(samples) == 1:
        found.answer = _alone(samples[0], monitor)
        return found
    noise = noise or Noise.measured(samples)
    found.basis = _basis(samples, noise)
    several = len(keys) > 1
    ordered = sorted(samples, key=lambda s: s.mean * (1 if lower_is_better else -1))
    alpha = ALPHA / 2 if several else ALPHA
    best = ordered[0].name
    against = [
        compare(
            noise,
            {best: 1.0, other.name: -1.0},
            (best, other.name),
            family=len(ordered),
            alpha=alpha,
            lower_is_better=lower_is_better,
        )
        for other in ordered[1:]
    ]
    found.families.append(Family(None, against, _headline(best, against)))
    for key in keys if several and values else ():
        assert values is not None
        family = _key_family(noise, values, key, keys, ALPHA / 2 / len(keys), lower_is_better)
        if family is not None:
            found.families.append(family)
    found.answer = " ".join(family.headline for family in found.families)
    return found


def _key_family(
    noise: Noise,
    values: Mapping[str, Mapping[str, str]],
    key: str,
    keys: Sequence[str],
    alpha: float,
    lower_is_better: bool,
) -> Family | None:
    """The best value of `key` against its others, over the settings of the other keys that both were tried with."""
    cells: dict[str, dict[tuple[str, ...], str]] = {}
    for name, setting in values.items():
        rest = tuple(setting.get(other, "") for other in keys if other != key)
        cells.setdefault(setting.get(key, ""), {})[rest] = name
    sign = 1 if lower_is_better else -1

    def gap(first: str, second: str) -> float:
        both = cells[first].keys() & cells[second].keys()
        if not both:
            return math.nan
        each = (noise.samples[cells[first][r]].mean - noise.samples[cells[second][r]].mean for r in both)
        return sign * sum(each) / len(both)

    # The value that on average does best against those it can be compared with.
    standing = {value: [g for o in cells if o != value and not math.isnan(g := gap(value, o))] for value in cells}
    standing = {value: gaps for value, gaps in standing.items() if gaps}
    if len(standing) < 2:
        return None
    best = min(standing, key=lambda value: sum(standing[value]) / len(standing[value]))
    short = short_names(keys)[key]
    comparisons = []
    for other in sorted((v for v in standing if v != best), key=lambda v: -_or_zero(gap(best, v))):
        both = sorted(cells[best].keys() & cells[other].keys())
        if not both:
            continue
        weights = {cells[best][r]: 1 / len(both) for r in both} | {cells[other][r]: -1 / len(both) for r in both}
        names = (f"{short}={best}", f"{short}={other}")
        found = compare(noise, weights, names, family=len(cells), alpha=alpha, lower_is_better=lower_is_better)
        comparisons.append(found)
    return Family(key, comparisons, _headline(f"{short}={best}", comparisons)) if comparisons else None


def _or_zero(value: float) -> float:
    return 0.0 if math.isnan(value) else value


def _headline(best: str, comparisons: Sequence[Comparison]) -> str:
    won = [c.second for c in comparisons if c.verdict is Verdict.better]
    open_ = [c.second for c in comparisons if c.verdict is Verdict.same]
    unseeded = [c.second for c in comparisons if c.verdict is Verdict.rows_only]
    unknown = [c.second for c in comparisons if c.verdict is Verdict.unknown]
    if len(won) == len(comparisons):
        return f"{best} is better than {'every other' if len(won) > 1 else won[0]}."
    whole = len(comparisons)
    parts = []
    if won:
        parts.append(f"better than {_counted(won, whole)}")
    if open_:
        parts.append(f"not distinguishable from {_counted(open_, whole)}")
    if unseeded:
        parts.append(f"ahead of {_counted(unseeded, whole)} on these rows, but the seed noise is unknown")
    if unknown:
        parts.append(f"ahead of {_counted(unknown, whole)} by a difference whose noise is unknown")
    return f"No winner: {best} leads, and is {'; '.join(parts)}." if not won else f"{best} leads: {'; '.join(parts)}."


def _counted(names: Sequence[str], whole: int) -> str:
    """One or two by name, more by their number."""
    if len(names) <= 2:
        return " and ".join(names)
    return f"all {whole} others" if len(names) == whole else f"{len(names)} of the {whole} others"


def _alone(sample: Sample, monitor: str) -> str:
    n = len(sample.replicates)
    spread = f", standard deviation {number(float(sample.values.std(ddof=1)))} over {n} runs" if n > 1 else ""
    return f"One configuration, nothing to compare: {monitor} {number(sample.mean)}{spread}."


def _basis(samples: Sequence[Sample], noise: Noise) -> str:
    if noise.known and noise.variance is None:
        return "No spread was told: the noise is not known, so no winner is called."
    if noise.known:
        told = "taken as known: say sd_seeds if few runs measured it"
        if math.isfinite(noise.df):
            told = f"measured on {noise.df + 1:.0f} runs"
        sd = number(math.sqrt(noise.variance or 0.0))
        return f"Rests on the stated standard deviation of {sd} of one run ({told}). Row noise is not known."
    rows = [r.rows for s in samples for r in s.replicates]
    known = [row for row in rows if row is not None]
    told_rows = (
        f"Row noise from the losses of {len({name for row in known for name in row.rows}):,} validation rows, paired."
        if known and len(known) == len(rows)
        else "Row noise is not known for this metric: what is said holds for these validation rows."
    )
    if noise.variance is None:
        return f"One run per configuration: seed noise is unknown, so no winner is called. {told_rows}"
    how = "after seeds or folds were compared one by one" if noise.blocked else "pooled"
    few = noise.replicated < len(samples)
    borrowed = " Configurations with one run borrow the spread of the others." if few else ""
    return (
        f"Standard deviation between runs {number(math.sqrt(noise.variance))} ({how}; {noise.df:.0f} degrees of "
        f"freedom, {noise.replicated} of {len(samples)} configurations have several runs).{borrowed} {told_rows}"
    )


def sentence(found: Comparison) -> str:
    """A comparison in words: verdict, estimate, interval, what it rests on, and what would settle it."""
    return f"{found.first} against {found.second}: {finding(found)}"


def finding(found: Comparison) -> str:
    """A comparison in words, without the names."""
    size = number(abs(found.estimate))
    if found.low is None or found.high is None:
        return f"ahead by {size}; noise unknown, run 4 more seeds of each."
    low, high = sorted((found.low, found.high) if found.estimate >= 0 else (-found.low, -found.high))
    interval = f"95% interval {number(low)} to {number(high)}"
    if found.verdict in (Verdict.better, Verdict.worse):
        return f"{found.verdict.value} by {size} ({interval}); {rests_on(found)}."
    if found.verdict is Verdict.rows_only:
        return (
            f"ahead by {size} ({interval} from the rows alone): the rows distinguish them, the seed noise is unknown: "
            "run 4 more seeds of each."
        )
    ahead = f"ahead by {size} ({interval})" if found.estimate else f"equal ({interval})"
    return f"not distinguishable, {ahead}; {settles(found)}; {rests_on(found)}."


def settles(found: Comparison) -> str:
    """What would settle an open comparison."""
    if found.verdict is not Verdict.same:
        return "4 more seeds of each" if found.verdict in (Verdict.rows_only, Verdict.unknown) else ""
    if found.seeds_needed is not None:
        more = found.seeds_needed - found.contrast.replicates
        runs = "run" if more == 1 else "runs"
        return f"{more} more {runs} of each ({found.seeds_needed} in all) would settle a difference of this size"
    if found.rows_needed is not None:
        return f"more seeds would not settle it, about {found.rows_needed:,} validation rows would"
    if found.contrast.run_variance == 0:
        return f"{'all runs are alike' if found.contrast.own else 'seed noise is unknown'}: run 4 more seeds of each"
    return f"not even {MOST_SEEDS} runs of each would settle a difference of this size"


def rests_on(found: Comparison) -> str:
    """Which noise a comparison takes into account."""
    contrast = found.contrast
    n = contrast.replicates
    if contrast.pooled is None and contrast.own is None:
        runs = "one run each, seed noise unknown"
    elif contrast.own is None:
        runs = f"{'one run' if n == 1 else f'{n} runs'} each, with a spread known from elsewhere"
    else:
        runs = f"{n} runs each{', seeds or folds compared one by one' if contrast.blocked else ''}"
    if contrast.num_samples > 2:
        runs = runs.replace("each", f"of each of {contrast.num_samples} configurations", 1)
    if contrast.rows is None:
        return f"rests on {runs}; row noise unknown"
    same = "not the same in both" if contrast.unpaired_rows else "paired"
    return f"rests on {runs}, {contrast.num_rows:,} validation rows ({same})"


def number(value: float, digits: int = 4) -> str:
    """A number with four significant digits, without an exponent where it can be read."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    if 1e-5 <= abs(value) < 1e6:
        places = max(digits - 1 - math.floor(math.log10(abs(value))), 0)
        return f"{value:.{places}f}"
    return f"{value:.{digits - 1}e}"
