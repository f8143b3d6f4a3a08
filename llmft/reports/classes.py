"""Every metric beside the loss, and what the prior scores: by configuration, by fold, and class against class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from llmft.config.task import TaskType
from llmft.metrics.prior import is_better
from llmft.metrics.text import token_f1
from llmft.reports.configurations import Study
from llmft.reports.read import RunRecord, is_free_text
from llmft.reports.verdicts import number

MOST_FOLDED = 4
"""Configurations whose folds are shown one by one."""
PRIOR = "prior"
SINGLE_LABEL = TaskType.single_label.value


@dataclass(frozen=True)
class Table:
    """A heading, column titles and lines of text; `sentences` are wrapped where numbers stand right."""

    title: str
    note: str
    head: list[str]
    lines: list[list[str]]
    sentences: bool = False

    def turned(self) -> Table:
        """The same with lines as columns."""
        lines = [list(line) for line in zip(self.head[1:], *(line[1:] for line in self.lines), strict=True)]
        return replace(self, head=["", *(line[0] for line in self.lines)], lines=lines)


def metric_tables(study: Study) -> list[Table]:
    """All metrics by configuration with the prior's, then by fold; nothing where there is one metric and no prior."""
    runs = [run for c in study.configurations for run in c.runs]
    names = dict.fromkeys(name for run in runs for name in run.result["after"] if str(name).startswith("val/"))
    if runs and is_free_text(runs[0].samples()):
        names = dict.fromkeys("val/token_f1" if name == "val/exact_match" else name for name in names)
    values = {name: np.array([_value(run, name) for run in runs], float) for name in names}
    values = {name: column for name, column in values.items() if not np.isnan(column).all()}
    # A loss that is the log-loss, but for the rounding of another order of summing, is shown once.
    loss = values.get("val/loss_nats", np.array([]))
    shown = [n for n, v in values.items() if n == "val/loss_nats" or v.shape != loss.shape or not np.allclose(
        v, loss, rtol=1e-9, atol=0.0, equal_nan=True)]  # fmt: skip
    known = any(run.chance for run in runs)
    if len(shown) < 2 and not known:
        return []
    head = [*(name.removeprefix("val/") for name in shown), *(["against chance"] if known else [])]
    lines = [[c.name, *(_mean_and_spread([_value(run, n) for run in c.runs]) for n in shown), *_against(c.runs, known)]
             for c in study.configurations]  # fmt: skip
    note = "Means, with the standard deviation between runs in brackets."
    if known:
        lines.append([PRIOR, *(_shown(mean([_prior(run, name) for run in runs])) for name in shown), ""])
        note += " The prior reads no row: it predicts the training rows' class shares, or their mean."
    tables = [Table("All metrics", note, ["configuration", *head], lines)]
    folded = [c for c in study.configurations if len({run.part for run in c.runs}) > 1][:MOST_FOLDED]
    lines = []
    for c in folded:
        for part in dict.fromkeys(run.part for run in c.runs):
            of_part = [run for run in c.runs if run.part == part]
            cells = [_shown(mean([_value(run, name) for run in of_part])) for name in shown]
            label = f"{c.name}: " * (len(folded) > 1) + part.removesuffix(", split 0")
            lines.append([label, *cells, *_against(of_part, known)])
    return [*tables, *([Table("By fold", "", ["part", *head], lines)] if lines else [])]


def _shown(value: float | None) -> str:
    return "" if value is None else number(value)


def _value(run: RunRecord, name: str) -> float | None:
    """A metric of the run; token F1 of its generations where it was not asked for."""
    value = run.value(name)
    if value is None and name == "val/token_f1" and (samples := run.samples()):
        texts = [[str(sample.get(key) or "") for sample in samples] for key in ("reference", "generated")]
        return token_f1(*texts)
    return value


def at_chance(study: Study) -> str:
    """What must be said of the best configuration where it is no better than the prior; else nothing."""
    known = [run.chance for c in study.configurations[:1] for run in c.runs if run.chance]
    bad = [chance for chance in known if not is_better(chance)]
    if not bad:
        return ""
    which = "one run" if len(known) == 1 else f"{len(bad)} of {len(known)} runs"
    loss, prior = (number(float(np.mean([chance[name] for chance in bad]))) for name in ("loss", "prior_loss"))
    return (
        f"{study.configurations[0].name} is not better than chance in {which}: loss {loss} against {prior} from the "
        "training rows' targets alone."
    )


def confusion(study: Study) -> tuple[list[str], list[list[int]], str, int] | None:
    """(classes, rows by true and likeliest class, name, runs) of the best configuration; None without classes."""
    best = study.configurations[0] if study.configurations else None
    predictions = [run.predictions() for run in best.runs] if best is not None else []
    predictions = [p for p in predictions if p is not None and p.problem == SINGLE_LABEL and p.known and p.labels]
    predictions = [p for p in predictions if p.labels == predictions[0].labels]
    if best is None or not predictions:
        return None
    from llmft.evaluation.scores import confusion as counts

    total = np.sum([counts(p) for p in predictions], axis=0)
    return predictions[0].labels, total.tolist(), best.name, len(predictions)


def _prior(run: RunRecord, name: str) -> float | None:
    last = name.removeprefix("val/")
    prior = run.chance.get("prior_loss") if last == "loss_nats" else run.chance.get("metrics", {}).get(last)
    return round(float(prior), 9) if isinstance(prior, (int, float)) else None


def _against(runs: Sequence[RunRecord], known: bool) -> list[str]:
    if not known:
        return []
    better = [is_better(run.chance) for run in runs if run.chance]
    if len(set(better)) == 2:
        return [f"better in {sum(better)} of {len(better)}"]
    return ["" if not better else "better" if better[0] else "NOT better"]


def mean(values: Sequence[float | None]) -> float | None:
    """The mean of those that are known; None without any."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _mean_and_spread(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    spread = f" ({number(float(np.std(known, ddof=1)), 2)})" if len(known) > 1 else ""
    return f"{number(float(np.mean(known)))}{spread}" if known else ""
