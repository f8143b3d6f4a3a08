"""Verdicts on a study: the best configuration, and the best value of each varied key.

The chance of any false winner in a study is at most 5%. With one key its values are the configurations; with several
keys the configurations get half of the 5%, and the keys share the other half (Bonferroni).
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path

from llmft.reports.configurations import Study, short_names, show
from llmft.reports.statistics import (
    ALPHA,
    MOST_RUNS,
    Contrast,
    Looks,
    Sample,
    contrast,
    rows_needed,
    runs_needed,
    seeds_matter,
    set_level,
    should_compare_logs,
)

SHARE = 1.5
"""The difference for which runs are planned without sweep.smallest_difference, in standard deviations."""
MOST_PAIRS = 28


class Verdict(Enum):
    """The result of comparing the best with another one (`behind`: it is clearly worse, though there is no winner)."""

    better = "better"
    behind = "behind"
    same = "may be as good"
    rows_only = "seed noise unknown"
    unknown = "noise unknown"


@dataclass(frozen=True)
class Rules:
    """How a sweep is judged: better direction, looks, the smallest difference that matters.

    Attributes:
        log, level: whether logarithms are compared, and the best's mean then, of which a difference is a share.
        paired: whether runs are compared seed by seed. These three are derived from the samples.
    """

    lower_is_better: bool = True
    looks: Looks = 1
    smallest: float | None = None
    log: bool = False
    level: float = 1.0
    paired: bool = False

    def lead(self, estimate: float) -> float:
        """The lead of the first, positive if it is better."""
        return -estimate if self.lower_is_better else estimate

    def share(self, lead: float) -> float:
        """A lead in the metric's units, or as a share of the other mean if logarithms are compared."""
        return -math.expm1(-lead) if self.log else lead

    def amount(self, share: float) -> str:
        """The result of `share` as text with its unit."""
        return f"{100 * share:.{1 if abs(share) < 0.1 else 0}f}%" if self.log else number(share)


@dataclass(frozen=True)
class ConfigComparison:
    """`first`, the best by its mean, against `second`; `lead` is in the metric's units, or a share with logarithms.

    `low` and `high` are the ends of its interval, None if no noise is known. `plan` says what would settle it.
    """

    first: str
    second: str
    lead: float
    low: float | None
    high: float | None
    verdict: Verdict
    contrast: Contrast
    rules: Rules
    plan: str = ""


@dataclass
class Family:
    """The best configuration (`key` is None), or the best value of `key`, against each of the others.

    `among` are the names of those that may be the best: only the winner if there is one.
    """

    key: str | None
    comparisons: list[ConfigComparison]
    among: list[str]
    headline: str = ""

    @property
    def winner(self) -> str | None:
        """The winner, if there is one."""
        return self.among[0] if len(self.among) == 1 and self.comparisons[0].verdict is Verdict.better else None

    def settled_by(self, smallest: float | None) -> bool:
        """Whether those that may be the best are equal in every run, or differ by less than what matters."""
        inside = [c for c in self.comparisons if c.second in self.among]
        near = smallest and all(c.high is not None and c.high * c.rules.level < smallest for c in inside)
        return bool(inside) and bool(near or all(c.contrast.seed_independent for c in inside))


@dataclass
class Verdicts:
    """All comparisons of a study, and their basis in words."""

    families: list[Family] = field(default_factory=list)
    answer: str = ""
    basis: str = ""
    compared: list[Sample] = field(default_factory=list)
    rules: Rules = field(default_factory=Rules)

    @property
    def all(self) -> list[tuple[str | None, ConfigComparison]]:
        """Every comparison with its family's key."""
        return [(family.key, comparison) for family in self.families for comparison in family.comparisons]

    @functools.cached_property
    def pairs(self) -> list[tuple[str, str, str, str]]:
        """(first, second, lead, interval) of every pair, with Tukey's simultaneous intervals.

        As of Games and Howell, with separate spreads. Empty for two configurations, or for very many.
        """
        count, rules = len(self.compared), self.rules
        if count < 3 or count * (count - 1) // 2 > MOST_PAIRS:
            return []
        pairs = []
        for first, second in itertools.combinations(self.compared, 2):
            c = contrast([first, second], [1.0, -1.0], paired=rules.paired)
            if c.seeds is not None:
                # Integer degrees of freedom, so that few integrals are computed.
                known = [replace(v, df=float(min(max(v.df, 1) // 1, 60))) for v in (c.seeds, c.rows) if v is not None]
                half, lead = math.hypot(*(v.half_width(ALPHA, 1, count) for v in known)), rules.lead(c.estimate)
                middle, low, high = (rules.amount(rules.share(end)) for end in (lead, lead - half, lead + half))
                pairs.append((first.name, second.name, middle, f"{low} to {high}"))
        return pairs

    @property
    def winner(self) -> str | None:
        """The winning configuration, if there is one."""
        return self.families[0].winner if self.families else None

    @property
    def among(self) -> list[str]:
        """The configurations that may be the best."""
        return self.families[0].among if self.families else []


def undecided(verdicts: Verdicts, keys: Sequence[str]) -> set[str]:
    """The keys without a clear difference between any of their values."""
    of_key = {family.key if len(keys) > 1 else keys[0]: family for family in verdicts.families} if keys else {}
    clear = (Verdict.better, Verdict.behind)
    return {k for k in keys if k not in of_key or not any(c.verdict in clear for c in of_key[k].comparisons)}


def judge(study: Study) -> Verdicts:
    """Compares the configurations of a study."""
    samples = [c.sample(study.monitor, rows=True) for c in study.configurations]
    values = {c.name: c.values for c in study.configurations}
    rules = Rules(study.lower_is_better, study.looks, study.smallest_difference)
    verdicts = judge_samples(samples, rules, study.monitor, values)
    if study.configurations:
        verdicts.basis = f"{verdicts.basis} {scope(study)}".strip()
    return verdicts


def still_open(sweep: Path) -> tuple[set[Path], str]:
    """(runs of configurations that need more seeds, the answer so far); no runs if the answer is final."""
    study = Study([], sweep)
    verdicts = judge(study)
    names = verdicts.among or [c.name for c in study.configurations]
    if verdicts.winner is not None or any(f.settled_by(study.smallest_difference) for f in verdicts.families[:1]):
        names = []
    return {run.directory for c in study.configurations if c.name in names for run in c.runs}, verdicts.answer


def scope(study: Study) -> str:
    """The scope of the verdicts in words: steps, learning rate, seeds, folds and data common to all runs."""
    runs = [run for c in study.configurations for run in c.runs]
    parts = []
    steps = {run.result["steps"] for run in runs if isinstance(run.result.get("steps"), int)}
    if steps and max(steps) > 1:
        parts.append(f"after {min(steps):,}" + (f" to {max(steps):,}" if len(steps) > 1 else "") + " steps")
    rates = {show(run.config["learning_rate.peak"]) for run in runs if "learning_rate.peak" in run.config}
    if len(rates) == 1 and steps and max(steps) > 1:
        parts.append(f"at one learning rate ({rates.pop()})")
    seeds = [len({run.seed for run in c.runs}) for c in study.configurations]
    folds = {show(run.config.get("data.fold")) for run in runs} - {"null"}
    span = f"{min(seeds)}" if len(set(seeds)) == 1 else f"{min(seeds)} to {max(seeds)}"
    parts.append(f"with {span} seed{'s' if max(seeds) > 1 else ''}" + (f" and {len(folds)} folds" if folds else ""))
    parts.append("on this data")
    return f"This applies {', '.join(parts)}; under other conditions another one may be best."


def judge_samples(
    samples: Sequence[Sample],
    rules: Rules = Rules(),
    monitor: str = "val/loss_nats",
    values: Mapping[str, Mapping[str, str]] | None = None,
) -> Verdicts:
    """Compares samples of `monitor`; also the values of each varied key, given by `values` for every sample."""
    values = values or {}
    keys = list(next(iter(values.values()), {}))
    samples = [s for sample in samples if (s := sample.finite()).replicates]
    if len(samples) < 2:
        nothing = "No run finished with a result: see the failures."
        return Verdicts(answer=_alone(samples[0], monitor) if samples else nothing)
    log = should_compare_logs(samples, lower_is_better=rules.lower_is_better)
    compared = sorted((s.logged() if log else s for s in samples), key=lambda s: -rules.lead(s.mean))
    level = math.exp(compared[0].mean) if log else 1.0
    rules = replace(rules, log=log, level=level, paired=rules.looks == "any" or seeds_matter(compared))
    contrasts = [contrast([compared[0], other], [1.0, -1.0], paired=rules.paired) for other in compared[1:]]
    lost = {s.name: s.lost for s in samples if s.lost}
    several = len(keys) > 1
    others = {s.name: c for s, c in zip(compared[1:], contrasts, strict=True)}
    best = _family(None, compared[0].name, others, rules, ALPHA / 2 if several else ALPHA, lost)
    cells = {s.name: s for s in compared}
    of_keys = [_key_family(cells, values, key, keys, rules) for key in (keys if several else ())]
    families = [best, *(family for family in of_keys if family is not None)]
    answer = " ".join(family.headline for family in families)
    return Verdicts(families, answer, _basis(samples, contrasts, rules), compared, rules)


def _family(
    key: str | None, best: str, others: Mapping[str, Contrast], rules: Rules, alpha: float, lost: Mapping[str, int]
) -> Family:
    """The best against `others`, name -> contrast."""

    def beaten(c: Contrast, level: float) -> bool:
        half = c.half_width(level, rules.looks)
        return best not in lost and c.seeded and half is not None and 0 < half < rules.lead(c.estimate)

    won = bool(others) and all(beaten(c, alpha) for c in others.values())
    level = alpha if won else set_level(len(others) + 1, alpha)
    among = [best, *(name for name, c in others.items() if not won and not beaten(c, level))]
    comparisons = []
    for other, c in others.items():
        half, lead = c.half_width(level, rules.looks), rules.lead(c.estimate)
        ends = (None, None) if half is None or math.isinf(half) else (lead - half, lead + half)
        low, high = (None if end is None else rules.share(end) for end in ends)
        verdict, plan = Verdict.better if won else Verdict.behind, ""
        if other in among:
            unknown = Verdict.unknown if c.rows is None else Verdict.rows_only
            verdict, plan = unknown if c.seeds is None else Verdict.same, _plan(c, level, rules)
        comparisons.append(ConfigComparison(best, other, rules.share(lead) or 0.0, low, high, verdict, c, rules, plan))
    family = Family(key, comparisons, among)
    family.headline = _headline(family, lost, rules.smallest)
    return family


def _key_family(
    samples: Mapping[str, Sample], values: Mapping[str, Mapping[str, str]], key: str, keys: Sequence[str], rules: Rules
) -> Family | None:
    """The best value of `key` against the others, over the settings of other keys that both were tried with."""
    cells: dict[str, dict[tuple[str, ...], Sample]] = {}
    for name, setting in values.items():
        if name in samples:
            other_settings = tuple(setting[other] for other in keys if other != key)
            cells.setdefault(setting[key], {})[other_settings] = samples[name]

    def versus(first: str, second: str) -> Contrast | None:
        shared_settings = sorted(cells[first].keys() & cells[second].keys())
        weights = [sign / len(shared_settings) for sign in (1, -1) for _ in shared_settings]
        pairs = [cells[value][settings] for value in (first, second) for settings in shared_settings]
        return contrast(pairs, weights, paired=rules.paired) if shared_settings else None

    contrasts = {(a, b): c for a, b in itertools.permutations(cells, 2) if (c := versus(a, b)) is not None}
    leads = {value: [rules.lead(c.estimate) for (a, _), c in contrasts.items() if a == value] for value in cells}
    standing = {value: sum(each) / len(each) for value, each in leads.items() if each}
    if len(standing) < 2:
        return None
    best = max(standing, key=lambda value: standing[value])
    others = [(b, c) for (a, b), c in contrasts.items() if a == best]
    others.sort(key=lambda item: rules.lead(item[1].estimate))
    names = {value: f"{short_names(keys)[key]}={value}" for value in standing}
    lost = {names[value]: count for value in standing if (count := sum(s.lost for s in cells[value].values()))}
    against = {names[value]: c for value, c in others}
    return _family(key, names[best], against, rules, ALPHA / 2 / len(keys), lost)


def _plan(c: Contrast, level: float, rules: Rules) -> str:
    """What would settle an open comparison, for the smallest difference that matters."""
    if c.identical:
        return "the same in every run: what differs has no effect, or the metric is too coarse to show it"
    if c.seeds is None:
        return "" if c.folds else "run each with 2 seeds or more"
    if c.folds:
        return "more rows or folds"
    if c.seeds.value <= 0:
        return "all runs of each are equal, so their noise is not known: try more seeds, or more validation rows"
    sd = math.sqrt(c.seeds.value * c.runs / 2)
    size = rules.smallest / rules.level if rules.smallest else SHARE * sd
    in_spreads = f"{rules.amount(rules.share(size))} ({SHARE:g} standard deviations between runs)"
    amount = number(rules.smallest) if rules.smallest else in_spreads
    rows = rows_needed(c, size, level)
    if rows is not None and c.rows is not None:
        return f"more seeds would not find a difference of {amount}; about {rows:,} {c.rows.unit} would"
    runs = runs_needed(c, size, level, rules.looks)
    if runs is None:
        return f"not even {MOST_RUNS} runs of each would reliably find a difference of {amount}"
    if runs <= c.runs:
        return f"a difference of {amount} would probably have been found; a smaller one may exist"
    more = runs - c.runs
    return f"{more} more run{'s' if more > 1 else ''} of each ({runs} in all) would find a difference of {amount}"


def _headline(family: Family, lost: Mapping[str, int], smallest: float | None) -> str:
    best, others, comparisons = family.among[0], family.among[1:], family.comparisons
    lost_runs = [f"{count} run{'s' if count > 1 else ''} of {name}" for name, count in lost.items()]
    survivors = f" {_listed(lost_runs)} diverged or failed, so the rest may be a favourable selection." if lost else ""
    if family.winner is not None:
        return f"{best} is better than {'every other' if len(comparisons) > 1 else comparisons[0].second}.{survivors}"
    if comparisons and all(c.contrast.identical for c in comparisons):
        return (
            f"No winner: {_listed([best, *others])} are the same in every run: what differs has no effect, or the "
            "metric is too coarse to show it."
        )
    if best in lost:
        return f"No winner: {best} leads only among the runs that finished.{survivors}"
    if smallest and family.settled_by(smallest):
        return f"No winner, and no difference that matters: {_listed([best, *others])} are within {number(smallest)}."
    unknown = [c for c in comparisons if c.verdict in (Verdict.rows_only, Verdict.unknown)]
    if unknown and len(unknown) == len(comparisons):
        if unknown[0].verdict is Verdict.rows_only:
            return f"No winner: {best} leads on these rows, but the seed noise is unknown.{survivors}"
        return f"No winner: {best} leads by a difference whose noise is unknown.{survivors}"
    if len(comparisons) == 1:
        return f"No winner: {best} leads, but is not distinguishable from {others[0]}.{survivors}"
    if len(others) == len(comparisons) > 2:
        return f"No winner yet: {best} leads, but any of the {len(family.among)} may be the best.{survivors}"
    return f"No winner yet: the best is among {{{', '.join(family.among)}}}.{survivors}"


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _alone(sample: Sample, monitor: str) -> str:
    n = len(sample.replicates)
    spread = f", standard deviation {number(float(sample.values.std(ddof=1)))} over {n} runs" if n > 1 else ""
    return f"One configuration, nothing to compare: {monitor} {number(sample.mean)}{spread}."


def _basis(samples: Sequence[Sample], contrasts: Sequence[Contrast], rules: Rules) -> str:
    """The basis of the verdicts in words."""
    if any(s.stated for s in samples):
        spreads = sorted({s.stated for s in samples if s.stated})
        known = all(math.isinf(df) for _, df in spreads)
        sds = " and ".join(dict.fromkeys(number(sd) for sd, _ in spreads)) if len(spreads) <= 3 else "each line"
        how = (
            "taken as known: give seeds or sd_seeds if few runs measured it" if known else "measured on the given runs"
        )
        return f"Based on the stated standard deviation of {sds} of one run ({how}). Row noise is not known."
    parts = []
    single = [s.name for s in samples if len(s.replicates) < 2]
    if len(single) == len(samples):
        parts.append("One run per configuration: seed noise is unknown, so no winner is called.")
    elif single:
        parts.append(f"One run alone is no basis for a winner: {_listed(single[:4])}.")
    if contrasts[0].folds:
        parts.append(f"Compared fold by fold ({contrasts[0].runs} runs each).")
    elif rules.paired:
        parts.append("Compared seed by seed, since seeds explain part of the spread.")
    if rules.log:
        parts.append("Compared on the logarithm, since the spread grows with the loss.")
    rows = [c.rows for c in contrasts if c.rows is not None]
    if len(rows) == len(contrasts):
        same = "" if all(r.paired for r in rows) else ", not the same in all"
        parts.append(f"Noise of {max(r.count for r in rows):,} {rows[0].unit} is included{same}.")
    else:
        parts.append("Row noise is not known for this metric: the verdicts apply to these validation rows only.")
    if rules.looks == "any":
        parts.append("Valid for any number of looks.")
    elif rules.looks > 1:
        parts.append(f"Valid for {rules.looks} looks.")
    return " ".join(parts)


def sentence(c: ConfigComparison) -> str:
    """A comparison in words: verdict, estimate, interval, basis, and what would settle it."""
    return f"{c.first} against {c.second}: {describe_comparison(c)}"


def describe_comparison(c: ConfigComparison) -> str:
    """A comparison in words, without the names."""
    if c.contrast.identical:
        return f"{c.plan}."
    size, interval = c.rules.amount(abs(c.lead)), interval_of(c)
    if c.verdict in (Verdict.better, Verdict.behind):
        return f"better by {size} ({interval}); {basis_of(c)}."
    plan = f"; {c.plan}" if c.plan else ""
    if c.verdict is Verdict.unknown or c.low is None:
        return f"ahead by {size}; its noise is not known{plan}."
    if c.verdict is Verdict.rows_only:
        return f"ahead by {size} ({interval} from the rows alone); the noise of seeds is unknown{plan}."
    ahead = "ahead by" if c.lead > 0 else "level at"
    return f"not distinguishable, {ahead} {size} ({interval}){plan}; {basis_of(c)}."


def interval_of(c: ConfigComparison) -> str:
    """The interval of the lead in words."""
    return f"95% interval {ends_of(c)}" if ends_of(c) else "noise unknown"


def ends_of(c: ConfigComparison) -> str:
    """The ends of that interval; empty if no noise is known."""
    return "" if c.low is None or c.high is None else f"{c.rules.amount(c.low)} to {c.rules.amount(c.high)}"


def basis_of(comparison: ConfigComparison) -> str:
    """The basis of a comparison: runs, rows and the noise that is included."""
    c = comparison.contrast
    how = ", compared fold by fold" if c.folds else ", compared seed by seed" if c.paired else ""
    each = f"of each of {c.num_samples} configurations" if c.num_samples > 2 else "each"
    runs = f"{c.runs} run{'s' if c.runs != 1 else ''} {each}{how}"
    if c.seeds is None:
        runs += ", seed noise unknown"
    if c.rows is None:
        return f"based on {runs}; row noise unknown"
    return f"based on {runs}, {c.rows.count:,} {c.rows.unit} ({'paired' if c.rows.paired else 'not the same in both'})"


def number(value: float, digits: int = 4) -> str:
    """A number with `digits` significant digits, without an exponent if it is readable."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    if 1e-5 <= abs(value) < 1e6:
        places = max(digits - 1 - math.floor(math.log10(abs(value))), 0)
        return f"{value:.{places}f}"
    return f"{value:.{digits - 1}e}"
