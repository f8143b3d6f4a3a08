"""The report as one HTML page that asks nobody for anything: styles, script and figures are in it."""

from __future__ import annotations

import functools
import itertools
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmft.core.redaction import redact
from llmft.metrics.text import token_f1
from llmft.reports import figures, tables
from llmft.reports.clusters import text_clusters
from llmft.reports.configurations import Study
from llmft.reports.curves import TRAIN
from llmft.reports.importance import importance
from llmft.reports.leaderboard import against_local
from llmft.reports.metrics import confusion
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
def template(name: str = "page.html.jinja") -> Any:
    """A page without its content."""
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
    return environment.get_template(name)


def render(report: Report, scores: Mapping[str, float], *, clusters: bool = True) -> str:
    study = report.study
    page: str = template().render(
        report=report,
        study=study,
        board=tables.board_table(report.board),
        legend=[(c.name, style) for c, style in figures.styled(study)[: figures.MOST_LINES]],
        figures=_figures(report, scores, clusters),
        samples=side_by_side(study),
        fits=_fits(report),
        cost=tables.cost(study),
        others=[(run.name, tables.metrics_of(run), run.command) for run in study.others],
        faults=[(run.name, fault) for run in study.runs for fault in dict.fromkeys(run.faults)],
    )
    return page


def _figures(report: Report, scores: Mapping[str, float], clusters: bool) -> dict[str, list[figures.Figure]]:
    study = report.study
    # Of a single value over another, the interval is said as well as drawn.
    families = [f for f in report.verdicts.families if f.key is None or len(f.comparisons) > 1]
    shares = importance(study)
    pairs = list(itertools.combinations(shares or study.keys[:2], 2)) if len(study.configurations) > 2 else []
    counts = confusion(study)
    sections = {
        "verdicts": [figures.points(study), *(figures.differences(f.comparisons, study.monitor) for f in families)],
        "curves": [figures.curves(study, name) for name in dict.fromkeys([study.monitor, "val/loss_nats", TRAIN])],
        "keys": [
            figures.parallel(study),
            figures.importance_bars(shares, undecided(report.verdicts, study.keys)),
            *(figures.heat_map(study, *pair) for pair in pairs[:MOST_MAPS]),
        ],
        "scores": [against_local(study, scores)],
        "metrics": [figures.confusion(*counts) if counts is not None and len(counts[0]) <= MOST_CLASSES else None],
        "clusters": [text_clusters(study) if clusters else None],
    }
    return {section: [drawn for drawn in group if drawn is not None] for section, group in sections.items()}


def side_by_side(study: Study) -> dict[str, Any] | None:
    """The same rows as the best configurations generate them."""
    generations = ((c.name, next((s for run in c.runs if (s := run.samples())), None)) for c in study.configurations)
    shown = itertools.islice(((name, samples) for name, samples in generations if samples), MOST_COLUMNS)
    columns = {name: {str(s.get("where", i)): s for i, s in enumerate(samples)} for name, samples in shown}
    if not columns:
        return None
    first = dict(itertools.islice(next(iter(columns.values())).items(), MOST_SAMPLES))
    prompts = distinct([str(redact(str(sample.get("prompt") or ""))) for sample in first.values()])
    lines = []
    for (where, sample), prompt in zip(first.items(), prompts, strict=True):
        reference = _shown(sample.get("reference"))
        texts = [_shown(samples.get(where, {}).get("generated")) for samples in columns.values()]
        answers = [(text, text.strip() == reference.strip(), f"{token_f1([reference], [text]):.2f}") for text in texts]
        lines.append({"where": where, "prompt": _shown(prompt), "reference": reference, "answers": answers})
    return {"names": list(columns), "lines": lines, "free": is_free_text(list(first.values()))}


def distinct(prompts: Sequence[str]) -> list[str]:
    """Prompts without what all of them begin and end with, cut between words."""

    def shared(texts: Sequence[str]) -> int:
        common = os.path.commonprefix(texts)  # noqa: RUF071 (letters are meant, not folders)
        return max(common.rfind(" "), common.rfind("\n")) + 1

    start = shared(prompts)
    end = shared([prompt[start:][::-1] for prompt in prompts])
    start, end = (length if length >= SHORTEST_PREAMBLE else 0 for length in (start, end))
    return [f"{'… ' * (start > 0)}{p[start : len(p) - end].strip()}{' …' * (end > 0)}" for p in prompts]


def _shown(value: Any) -> str:
    text = re.sub(r"\n\s*\n+", "\n", str(redact("" if value is None else str(value))).strip())
    return text if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]}…"


def _fits(report: Report) -> Sequence[tuple[str, str, str]]:
    """(run, what its curves say, why), the best configurations first."""
    best_first = [run for c in report.study.configurations for run in c.runs]
    runs = {str(run.directory): run.name for run in [*best_first, *report.study.runs]}
    pairs = [(name, report.diagnoses.get(directory)) for directory, name in runs.items()]
    return [(name, str(diagnosis), diagnosis.detail) for name, diagnosis in pairs if diagnosis is not None]
