"""Every metric beside the loss, and what the prior scores: by configuration, by fold, and class against class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmft.metrics.prior import is_better
from llmft.metrics.text import token_f1
from llmft.reports.configurations import Study
from llmft.reports.read import RunRecord, is_free_text
from llmft.reports.verdicts import number

MOST_FOLDED = 4
"""Configurations whose folds are shown one by one."""
PRIOR = "prior"


@dataclass(frozen=True)
class Table:
    """A heading, column titles and lines of text; `sentences` are wrapped where numbers stand right."""

    title: str
    note: str
    head: list[str]
    lines: list[list[str]]
    sentences: bool = False


def metric_tables(study: Study) -> list[Table]:
    """All metrics by configuration with the prior's, then by fold; nothing where there is one metric and no prior."""
    runs = [run for c in study.configurations for run in c.runs]
    names = [name for name in dict.fromkeys(n for r in runs for n in r.result["after"]) if str(name).startswith("val/")]
    if runs and is_free_text(runs[0].samples()):
        names = ["val/token_f1" if name == "val/exact_match" else name for name in names]
    values = {name: [_value(run, name) for run in runs] for name in dict.fromkeys(names)}
    names = [name for name in values if any(value is not None for value in values[name])]
    # A loss that is the log-loss is shown once.
    loss = np.array(values.get("val/loss_nats", []), float)
    names = [n for n in names if n == "val/loss_nats" or not _same(np.array(values[n], float), loss)]
    priors = [_mean([_prior(run, name) for run in runs]) for name in names]
    known = any(run.chance for run in runs)
    if len(names) < 2 and not known:
        return []
    head = ["configuration", *(name.removeprefix("val/") for name in names), *(["against chance"] if known else [])]
    lines = [[c.name, *(_spread([_value(run, n) for run in c.runs]) for n in names), *_against(c.runs, known)]
             for c in study.configurations]  # fmt: skip
    if known:
        lines.append([PRIOR, *("" if prior is None else number(prior) for prior in priors), ""])
    note = "Means, with the standard deviation between runs in brackets."
    note += " The prior reads no row: it predicts the training rows' class shares, or their mean." if known else ""
    found = [Table("All metrics", note, head, lines)]
    folded = [c for c in study.configurations if len({run.part for run in c.runs}) > 1][:MOST_FOLDED]
    if folded:
        several = len(folded) > 1
        lines = []
        for c in folded:
            for part in dict.fromkeys(run.part for run in c.runs):
                own = [run for run in c.runs if run.part == part]
                means = [_mean([_value(run, name) for run in own]) for name in names]
                cells = ["" if mean is None else number(mean) for mean in means]
                label = part.removesuffix(", split 0")
                lines.append([f"{c.name}: {label}" if several else label, *cells, *_against(own, known)])
        found.append(Table("By fold", "", ["part", *head[1:]], lines))
    return found


def _value(run: RunRecord, name: str) -> float | None:
    """A metric of the run; token F1 of its generations where it was not asked for."""
    found = run.value(name)
    if found is None and name == "val/token_f1" and (samples := run.samples()):
        texts = [[str(sample.get(key) or "") for sample in samples] for key in ("reference", "generated")]
        return token_f1(*texts)
    return found


def at_chance(study: Study) -> str:
    """What must be said of the best configuration where it is no better than the prior; else nothing."""
    if not study.configurations:
        return ""
    best = study.configurations[0]
    told = [run.chance for run in best.runs if run.chance]
    bad = [chance for chance in told if not is_better(chance)]
    if not bad:
        return ""
    which = "one run" if len(told) == 1 else f"{len(bad)} of {len(told)} runs"
    loss, prior = (number(float(np.mean([chance[name] for chance in bad]))) for name in ("loss", "prior_loss"))
    return (
        f"{best.name} is not better than chance in {which}: loss {loss} against {prior} from the training rows' "
        "targets alone."
    )


def confusion(study: Study) -> tuple[list[str], list[list[int]], int] | None:
    """(classes, rows by true and likeliest class, runs) of the best configuration; None where no class is predicted."""
    labels: list[str] = []
    total: Any = 0
    count = 0
    for run in study.configurations[0].runs if study.configurations else []:
        found = _predictions(run)
        if found is None or (labels and found.labels != labels):
            continue
        from llmft.evaluation.scores import confusion as counts

        labels, total, count = found.labels, total + np.asarray(counts(found)), count + 1
    return (labels, total.tolist(), count) if count else None


def _predictions(run: RunRecord) -> Any:
    from llmft.config.sections import TaskType

    found = run.predictions()
    single = found is not None and found.problem == TaskType.single_label.value
    return found if single and found.known and found.labels else None


def _prior(run: RunRecord, name: str) -> float | None:
    last = name.removeprefix("val/")
    found = run.chance.get("prior_loss") if last == "loss_nats" else run.chance.get("metrics", {}).get(last)
    return round(float(found), 9) if isinstance(found, (int, float)) else None


def _same(values: np.ndarray, others: np.ndarray) -> bool:
    """Whether they are the same numbers but for the rounding of another order of summing."""
    return values.shape == others.shape and np.allclose(values, others, rtol=1e-9, atol=0.0, equal_nan=True)


def _against(runs: Sequence[RunRecord], known: bool) -> list[str]:
    if not known:
        return []
    told = [is_better(run.chance) for run in runs if run.chance]
    if not told or len(set(told)) == 1:
        return ["" if not told else "better" if told[0] else "NOT better"]
    return [f"better in {sum(told)} of {len(told)}"]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _spread(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return ""
    spread = f" ({number(float(np.std(known, ddof=1)), 2)})" if len(known) > 1 else ""
    return f"{number(float(np.mean(known)))}{spread}"
