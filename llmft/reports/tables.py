"""The report's tables as plain values, and as Markdown and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmft.reports.classes import Table
from llmft.reports.configurations import Configuration, Study
from llmft.reports.curves import Diagnosis, Fit, diagnose, summed_up
from llmft.reports.read import RunRecord
from llmft.reports.verdicts import Comparison, Verdicts, number, sentence


@dataclass(frozen=True)
class Standing:
    """A line of the leaderboard."""

    place: int
    name: str
    values: dict[str, str]
    mean: float
    spread: float | None
    """Standard deviation between runs; None for a single one."""
    best: float
    num_runs: int
    replications: str
    seconds: float | None
    tokens: float | None
    tokens_per_s: float | None
    memory_gib: float | None
    energy_wh: float | None
    fit: str
    commands: list[tuple[str, str, str, float]]
    """(run, replication, command, metric) of each run."""
    other_metrics: dict[str, float]


def leaderboard(study: Study, diagnoses: dict[str, Diagnosis]) -> list[Standing]:
    """The configurations with a result, the best mean first."""
    return [_standing(place, c, study, diagnoses) for place, c in enumerate(study.configurations, 1)]


def diagnose_all(study: Study) -> dict[str, Diagnosis]:
    """What each run's curves say, by directory."""
    return {str(run.directory): diagnose(run) for run in study.runs if run.metrics or run.status == "diverged"}


def _standing(place: int, c: Configuration, study: Study, diagnoses: dict[str, Diagnosis]) -> Standing:
    values = c.sample(study.monitor).values
    shown = [diagnoses[str(run.directory)] for run in c.runs if str(run.directory) in diagnoses]
    others = {
        name: float(np.mean([v for run in c.runs if (v := run.value(name)) is not None]))
        for name in dict.fromkeys(name for run in c.runs for name in run.result.get("after") or {})
        if name != study.monitor and any(run.value(name) is not None for run in c.runs)
    }
    speed = [run.tokens / run.seconds for run in c.runs if run.tokens and run.seconds]
    best = values.min() if study.lower_is_better else values.max()
    return Standing(
        place,
        c.name,
        c.values,
        float(values.mean()),
        float(values.std(ddof=1)) if len(values) > 1 else None,
        float(best),
        len(values),
        replications(c.runs),
        _mean([run.seconds for run in c.runs]),
        _mean([run.tokens for run in c.runs]),
        _mean(speed),
        max((run.memory_gib for run in c.runs if run.memory_gib is not None), default=None),
        _mean([run.energy_wh for run in c.runs]),
        str(shown[0]) if len({str(d) for d in shown}) == 1 and shown else summed_up(shown),
        [(run.name, _replication(run), run.command, run.value(study.monitor) or float("nan")) for run in c.runs],
        others,
    )


def replications(runs: Sequence[RunRecord]) -> str:
    """ "3 seeds", "5 folds", "2 seeds x 5 folds"."""
    parts = []
    for key, word in (("seed", "seed"), ("data.fold", "fold"), ("data.split_seed", "split")):
        found = {str(run.config.get(key)) for run in runs}
        if key == "seed" or len(found) > 1:
            parts.append(f"{len(found)} {word}{'s' if len(found) > 1 else ''}")
    return " x ".join(parts)


def _replication(run: RunRecord) -> str:
    fold = run.config.get("data.fold")
    return f"seed {run.seed}" + (f", fold {fold}" if fold is not None else "")


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def duration(seconds: float | None) -> str:
    """ "4.2 s", "3 min 20 s", "2 h 05 min"; nothing for None."""
    if seconds is None:
        return ""
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{seconds // 60:.0f} min {seconds % 60:02.0f} s"
    return f"{seconds // 3600:.0f} h {seconds % 3600 // 60:02.0f} min"


def count(value: float | None) -> str:
    """ "12,034", "1.2 M"; nothing for None."""
    if value is None:
        return ""
    if value >= 1e9:
        return f"{value / 1e9:.1f} G"
    return f"{value / 1e6:.1f} M" if value >= 1e6 else f"{value:,.0f}"


def spread_of(line: Standing) -> str:
    """The standard deviation between runs."""
    return number(line.spread, 2) if line.spread is not None else "unknown"


NO_CURVES = Fit.unknown.value
HEAD = ["", "configuration", "mean", "sd", "n", "best", "time", "tokens", "tokens/s", "memory", "curves"]


def cells(line: Standing) -> list[str]:
    """A line of the leaderboard under `HEAD`, as text."""
    memory = f"{line.memory_gib:.1f} GiB" if line.memory_gib is not None else ""
    middle = [number(line.mean), spread_of(line), line.replications, number(line.best), duration(line.seconds)]
    return [str(line.place), line.name, *middle, count(line.tokens), count(line.tokens_per_s), memory, line.fit]


def board_table(board: Sequence[Standing]) -> Table:
    """The leaderboard without columns that say nothing."""
    lines = [cells(line) for line in board]
    kept = [i for i, name in enumerate(HEAD) if name == "" or {line[i] for line in lines} - {"", NO_CURVES}]
    return Table("", "", [HEAD[i] for i in kept], [[line[i] for i in kept] for line in lines])


def cost(study: Study) -> str:
    """What the runs took in all."""
    seconds = [run.seconds for run in study.runs if run.seconds is not None]
    tokens = [run.tokens for run in study.runs if run.tokens is not None]
    energy = [run.energy_wh for run in study.runs if run.energy_wh is not None]
    parts = [f"{len(study.runs)} run{'s' if len(study.runs) != 1 else ''}"]
    if seconds:
        parts.append(f"{duration(sum(seconds))} in training and validation")
    if tokens:
        parts.append(f"{count(sum(tokens))} tokens trained on")
    if energy:
        parts.append(f"{sum(energy):.1f} Wh ({len(energy)} runs told)")
    return ", ".join(parts)


def markdown_table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; bars and line ends in cells are taken care of."""

    def row(values: Sequence[str]) -> str:
        return "| " + " | ".join(" ".join(str(v).split()).replace("|", "\\|") for v in values) + " |"

    return "\n".join([row(head), row(["---"] * len(head)), *map(row, lines)])


def results_csv(study: Study, board: Sequence[Standing]) -> str:
    """A line per run: configuration, values, replication, metrics, cost, command."""
    metrics = list(dict.fromkeys(name for run in study.runs for name in run.result.get("after") or {}))
    head = ["place", "configuration", *study.keys, "seed", "fold", "run", "key", "status", *metrics]
    head += ["step", "seconds", "tokens", "memory_gib", "energy_wh", "command"]
    place = {name: line.place for line in board for name, *_ in line.commands}
    owner = {run.name: c for c in study.configurations for run in c.runs}
    lines: list[list[Any]] = []
    for run in sorted(study.runs, key=lambda run: (place.get(run.name, 10**9), run.part, run.seed)):
        c = owner.get(run.name)
        line = [place.get(run.name, ""), c.name if c else ""]
        line += [c.values[key] if c else run.config.get(key, "") for key in study.keys]
        line += [run.seed, run.config.get("data.fold", ""), run.name, run.key, run.status]
        line += [_blank(run.value(name)) for name in metrics]
        line += [_blank(v) for v in (run.step, run.seconds, run.tokens, run.memory_gib, run.energy_wh)]
        lines.append([*line, run.command])
    return to_csv(head, lines)


def _blank(value: Any) -> Any:
    return "" if value is None else value


def verdicts_csv(verdicts: Verdicts) -> str:
    """A line per comparison."""
    head = ["key", "first", "second", "verdict", "lead", "low", "high", "unit", "runs", "rows", "plan", "words"]
    lines = [
        [
            *(key or "", c.first, c.second, c.verdict.value, c.lead),
            *map(_blank, (c.low, c.high)),
            *("share" if c.rules.log else "metric", c.contrast.runs, c.contrast.num_rows, c.plan, sentence(c)),
        ]
        for key, c in verdicts.all
    ]
    return to_csv(head, lines)


def to_csv(head: Sequence[str], lines: Sequence[Sequence[Any]]) -> str:
    """CSV; a text that a spreadsheet would take for a formula gets a quote in front."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(head)
    for line in lines:
        writer.writerow([f"'{v}" if isinstance(v, str) and v[:1] in ("=", "+", "-", "@") else v for v in line])
    return out.getvalue()


def markdown(
    study: Study,
    verdicts: Verdicts,
    board: Sequence[Standing],
    curves: str,
    metrics: Sequence[Table] = (),
    warnings: Mapping[str, str] | None = None,
) -> str:
    """The whole report without figures."""
    parts = [f"# {study.title}"]
    if study.question:
        parts.append(f"**Question.** {' '.join(study.question.split())}")
    parts.append(f"**Answer.** {verdicts.answer}")
    if verdicts.basis:
        parts.append(verdicts.basis)
    parts += [f"**{name.capitalize()}.** {warning}" for name, warning in (warnings or {}).items()]
    table = board_table(board)
    if board:
        parts += [f"## Configurations by {study.monitor}", markdown_table(table.head, table.lines)]
    parts += [part for own in metrics for part in (f"## {own.title}", markdown_table(own.head, own.lines))]
    if verdicts.all:
        head = ["", "against", "verdict", "lead", "95% interval", "what would settle it"]
        lines = [
            [c.first, c.second, c.verdict.value, c.rules.told(c.lead), _interval(c), c.plan] for _, c in verdicts.all
        ]
        parts += ["## Verdicts", markdown_table(head, lines), *(f"- {sentence(c)}" for _, c in verdicts.all)]
    if curves:
        parts += ["## Over- and underfitting", curves]
    if study.others:
        lines = [[run.name, metrics_of(run), run.command] for run in study.others]
        parts += [f"## Runs without {study.monitor}", markdown_table(["run", "metrics", "command"], lines)]
    if study.failures:
        lines = [[f.name, f.status, f.cause, f"`{f.command}`" if f.command else ""] for f in study.failures]
        parts += ["## Failures", markdown_table(["trial", "status", "cause", "command"], lines)]
    if study.stopped:
        parts += ["## Stopped on purpose", *(f"- {line}" for line in study.stopped)]
    parts += ["## Cost", cost(study)]
    if board:
        lines = [[line.name, which, f"`{command}`"] for line in board for _, which, command, _ in line.commands]
        parts += ["## Commands", markdown_table(["configuration", "run", "command"], lines)]
    return "\n\n".join(parts) + "\n"


def _interval(found: Comparison) -> str:
    if found.low is None or found.high is None:
        return "unknown"
    return f"{found.rules.told(found.low)} to {found.rules.told(found.high)}"


def metrics_of(run: RunRecord) -> str:
    after = run.result.get("after")
    found = {name: run.value(name) for name in after} if isinstance(after, dict) else {}
    return ", ".join(f"{name} {number(value)}" for name, value in found.items() if value is not None) or "none"
