"""The report as one HTML page that asks nobody for anything: styles, script and figures are in it."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from llmft.core.redaction import redact
from llmft.metrics.text import token_f1
from llmft.reports import figures, tables
from llmft.reports.classes import confusion
from llmft.reports.clusters import text_clusters
from llmft.reports.configurations import Study
from llmft.reports.curves import TRAIN
from llmft.reports.importance import importance
from llmft.reports.leaderboard import match_scores, rank_correlation
from llmft.reports.read import is_free_text
from llmft.reports.verdicts import finding, number, undecided

if TYPE_CHECKING:
    from llmft.reports.write import Report

MOST_SAMPLES = 12
MOST_COLUMNS = 4
MOST_MAPS = 3
MOST_CHARACTERS = 700
SHORTEST_PREAMBLE = 12
"""Characters that all prompts must have in common for these to be left out."""
MOST_CLASSES = 20
"""Of a confusion that is drawn."""


@functools.cache
def template() -> Any:
    """The page without its content."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "finding": finding}
    for part in ("style.html.jinja", "tips.html.jinja"):
        environment.get_template(part)  # made now and kept, for the page that includes it
    return environment.get_template("page.html.jinja")


def render(report: Report, scores: Mapping[str, float], *, clusters: bool = True) -> str:
    """The page."""
    study = report.study
    values: dict[str, Any] = {
        "report": report,
        "study": study,
        "board": tables.board_table(report.board),
        "legend": figures.series_of(study)[: figures.MOST_LINES],
        "figures": _figures(report, scores, clusters),
        "metrics": report.metrics,
        "samples": side_by_side(study),
        "fits": _fits(report),
        "cost": tables.cost(study),
        "others": [(run.name, tables.metrics_of(run), run.command) for run in study.others],
        "faults": [(run.name, fault) for run in study.runs for fault in dict.fromkeys(run.faults)],
    }
    page: str = template().render(**values)
    return page


@dataclass(frozen=True)
class Drawn:
    """A figure with what stands above it."""

    title: str
    note: str
    svg: Markup


def _figures(report: Report, scores: Mapping[str, float], clusters: bool) -> dict[str, list[Drawn]]:
    study = report.study
    groups: dict[str, list[Drawn]] = {
        "verdicts": [],
        "curves": [],
        "keys": [],
        "scores": [],
        "clusters": [],
        "metrics": [],
    }
    dots = figures.points(study)
    if dots is not None:
        groups["verdicts"].append(Drawn("Every run", "A dot is a run, the bar their mean.", dots))
    for family in report.verdicts.families:
        if family.key is not None and len(family.comparisons) < 2:
            continue  # one interval is said as well as drawn
        lead = family.comparisons[0].first
        svg = figures.differences(family.comparisons, f"Lead of {lead}", study.monitor)
        if svg is not None:
            note = "Where the mark is hollow, the difference may be noise."
            groups["verdicts"].append(Drawn(f"Lead of {lead}", note, svg))
    for metric in dict.fromkeys([study.monitor, "val/loss_nats", TRAIN]):
        drawn_curves = figures.curves(study, metric, metric)
        if drawn_curves is not None:
            svg, note = drawn_curves
            groups["curves"].append(Drawn(metric, note, svg))
    paths = figures.parallel(study)
    if paths is not None:
        note = "A line is a configuration; the stronger, the better. Better metrics are at the top."
        groups["keys"].append(Drawn("Parallel coordinates", note, paths))
    shares = importance(study)
    if shares:
        how = "Share of the variance that each key explains by itself in a random forest (Optuna's fANOVA)."
        bars = figures.importance_bars(shares, undecided(report.verdicts, study.keys))
        groups["keys"].append(Drawn("Importance", how, bars))
    for first, second in list(itertools.combinations(shares or study.keys[:2], 2))[:MOST_MAPS]:
        if len(study.configurations) > 2:
            svg = figures.heat_map(study, first, second)
            note = f"{study.monitor}: the stronger the colour, the better."
            groups["keys"].append(Drawn("Interaction", note, svg))
    groups["scores"] = _scores(study, scores)
    classes = confusion(study)
    if classes is not None and len(classes[0]) <= MOST_CLASSES:
        labels, counts, runs = classes
        note = (
            f"{study.configurations[0].name}, {runs} run{'s' if runs > 1 else ''}: true class down, likeliest across."
        )
        groups["metrics"].append(Drawn("Confusion", note, figures.confusion(labels, counts)))
    drawn = text_clusters(study) if clusters else None
    if drawn is not None:
        groups["clusters"].append(Drawn("Validation rows by their words", drawn.note, drawn.svg))
    return groups


def _scores(study: Study, scores: Mapping[str, float]) -> list[Drawn]:
    matched = match_scores(study, scores)
    if len(matched) < 2:
        return []
    local = [run.value(study.monitor) or 0.0 for run, _ in matched]
    points = [
        figures.Point(x, score, f"{run.name}: local {number(x)}, leaderboard {number(score)}")
        for x, (run, score) in zip(local, matched, strict=True)
    ]
    svg = figures.scatter(points, "Local validation against leaderboard", f"local {study.monitor}", "leaderboard")
    return [Drawn("Local validation against leaderboard", rank_correlation(local, [s for _, s in matched]), svg)]


def side_by_side(study: Study) -> dict[str, Any] | None:
    """The same rows as the best configurations generate them."""
    columns = []
    for c in study.configurations:
        found = next((s for run in c.runs if (s := run.samples())), None)
        if found:
            columns.append((c.name, {str(s.get("where", i)): s for i, s in enumerate(found)}))
        if len(columns) == MOST_COLUMNS:
            break
    if not columns:
        return None
    shown = list(columns[0][1].items())[:MOST_SAMPLES]
    free = is_free_text([sample for _, sample in shown])
    prompts = distinct([str(redact(str(sample.get("prompt") or ""))) for _, sample in shown])
    lines = []
    for (where, sample), prompt in zip(shown, prompts, strict=True):
        reference, answers = _shown(sample.get("reference")), []
        for _, samples in columns:
            text = _shown(samples.get(where, {}).get("generated"))
            answers.append((text, text.strip() == reference.strip(), f"{token_f1([reference], [text]):.2f}"))
        lines.append({"where": where, "prompt": _shown(prompt), "reference": reference, "told": answers})
    return {"names": [name for name, _ in columns], "lines": lines, "free": free}


def distinct(prompts: Sequence[str]) -> list[str]:
    """Prompts without what all of them begin and end with, cut between words."""

    def shared(texts: Sequence[str]) -> int:
        low, high = min(texts), max(texts)
        unlike = (place for place, pair in enumerate(zip(low, high, strict=False)) if pair[0] != pair[1])
        common = low[: next(unlike, 0)]
        return max(common.rfind(" "), common.rfind("\n")) + 1

    start = shared(prompts)
    end = shared([prompt[start:][::-1] for prompt in prompts])
    start, end = (length if length >= SHORTEST_PREAMBLE else 0 for length in (start, end))
    return [f"{'… ' * (start > 0)}{p[start : len(p) - end].strip()}{' …' * (end > 0)}" for p in prompts]


def _shown(value: Any) -> str:
    text = re.sub(r"\n\s*\n+", "\n", str(redact("" if value is None else str(value))).strip())
    return text if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]}…"


def _fits(report: Report) -> Sequence[tuple[str, str, str]]:
    by_run = report.diagnoses
    order = {str(r.directory): i for i, r in enumerate(r for c in report.study.configurations for r in c.runs)}
    runs = sorted(report.study.runs, key=lambda run: order.get(str(run.directory), len(order)))
    return [
        (run.name, str(by_run[str(run.directory)]), by_run[str(run.directory)].detail)
        for run in runs
        if str(run.directory) in by_run
    ]
