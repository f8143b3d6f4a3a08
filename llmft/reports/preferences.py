"""What policies and judges made of compared answers: their log-probabilities, and the rule "the longer answer wins"."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from llmft.metrics.preference import beats_length, movement
from llmft.reports.classes import Table
from llmft.reports.configurations import Study
from llmft.reports.read import RunRecord
from llmft.reports.verdicts import number


def answers_table(study: Study) -> Table | None:
    """By configuration what became of both answers, and accuracy beside the rule of length; None without either."""
    lines = [
        [c.name, movement(_mean(c.runs, "before"), _mean(c.runs, "after")) or "", against_length(c.runs)]
        for c in study.configurations
    ]
    head = ["configuration", "what became of the answers", 'against "the longer answer wins"']
    kept = [column for column in range(len(head)) if column == 0 or any(line[column] for line in lines)]
    if len(kept) < 2:
        return None
    note = "Means over the runs, on the validation rows; log-probabilities are those of whole answers."
    lines = [[line[column] for column in kept] for line in lines]
    return Table("Compared answers", note, [head[column] for column in kept], lines, sentences=True)


def _mean(runs: Sequence[RunRecord], when: str) -> dict[str, float]:
    """Means over `runs` of the metrics `before` training or `after` it that all of them have."""
    records = [values for run in runs if isinstance(values := run.result.get(when), dict)]
    names = set.intersection(*map(set, records)) if records else set()
    return {
        name: float(np.mean([record[name] for record in records]))
        for name in names
        if all(isinstance(record[name], (int, float)) for record in records)
    }


def against_length(runs: Sequence[RunRecord]) -> str:
    """Mean accuracy beside the rule's, and in how many of `runs` it is no better; nothing where they do not say."""
    facts = [run.length for run in runs if run.length]
    if not facts:
        return ""
    accuracy, rule = (number(float(np.mean([one[name] for one in facts]))) for name in ("accuracy", "longer_wins"))
    worse = sum(not beats_length(one) for one in facts)
    return f"{f'NOT better in {worse} of {len(facts)} runs' if worse else 'better'}: {accuracy} against {rule}"


def at_length(study: Study) -> str:
    """What must be said of the best configuration where "the longer answer wins" is as good; else nothing."""
    best = study.configurations[0] if study.configurations else None
    words = against_length(best.runs) if best is not None else ""
    if best is None or not words.startswith("NOT"):
        return ""
    return f'{best.name} may have learned length alone. Accuracy beside the rule "the longer answer wins": {words}.'


KEYS_OF_UNIT = ("task.beta", "task.loss", "task.margin", "task.label_smoothing", "task.sft_weight", "task.centre")
"""Keys that a loss of compared answers has another unit or another least value for."""


def at_units(study: Study) -> str:
    """What must be said where losses are compared that are not of one unit, as those of two betas; else nothing."""
    keys = [key for key in study.keys if key.startswith(KEYS_OF_UNIT)]
    compares = any(run.config.get("task.feedback") for run in study.runs)
    if not keys or not compares or study.monitor != "val/loss_nats":
        return ""
    return (
        f"every {' and '.join(keys)} gives {study.monitor} another unit, so a lower one is not a better one; "
        "trainer.monitor=val/accuracy judges by what is the same in all."
    )
