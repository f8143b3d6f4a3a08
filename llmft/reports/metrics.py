"""Tables of all metrics next to trivial baselines, and warnings.

The baselines are the prior and, for compared answers, "the longer answer wins".
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from llmft.config.task import TaskType
from llmft.metrics.preference import beats_length, movement
from llmft.metrics.prior import is_better
from llmft.metrics.text import token_f1
from llmft.reports.configurations import Study
from llmft.reports.read import RunRecord, is_free_text
from llmft.reports.tables import Table, mean
from llmft.reports.verdicts import number

MOST_FOLDED = 4
"""Number of configurations that are shown by fold."""
PRIOR = "prior"
KEYS_OF_UNIT = ("task.beta", "task.loss", "task.margin", "task.label_smoothing", "task.sft_weight", "task.centre")
"""Keys that change the unit or the minimum of a loss on compared answers."""


def metric_tables(study: Study) -> list[Table]:
    """All metrics by configuration with the prior's, then by fold; empty for a single metric without a prior."""
    runs = [run for c in study.configurations for run in c.runs]
    names = dict.fromkeys(name for run in runs for name in run.result["after"] if str(name).startswith("val/"))
    if runs and is_free_text(runs[0].samples()):
        names = dict.fromkeys("val/token_f1" if name == "val/exact_match" else name for name in names)
    values = {name: np.array([_value(run, name) for run in runs], float) for name in names}
    values = {name: column for name, column in values.items() if not np.isnan(column).all()}
    # A log-loss that equals the loss up to rounding is shown once.
    loss = values.get("val/loss_nats", np.full(len(runs), np.nan))
    duplicates = [name for name, column in values.items() if np.allclose(column, loss, 1e-9, 0.0, equal_nan=True)]
    shown = [name for name in values if name == "val/loss_nats" or name not in duplicates]
    known = any(run.chance for run in runs)
    if len(shown) < 2 and not known:
        return []
    head = [*(name.removeprefix("val/") for name in shown), *(["against chance"] if known else [])]
    lines = []
    for c in study.configurations:
        cells = [_mean_and_spread([_value(run, name) for run in c.runs]) for name in shown]
        lines.append([c.name, *cells, *_against(c.runs, known)])
    note = "Means, with the standard deviation between runs in brackets."
    if known:
        lines.append([PRIOR, *(_shown(mean([_prior(run, name) for run in runs])) for name in shown), ""])
        note += " The prior ignores the inputs: it predicts the class shares of the training rows, or their mean."
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
    """A metric of the run; token F1 is computed from its generations if it was not recorded."""
    value = run.value(name)
    if value is None and name == "val/token_f1" and (samples := run.samples()):
        texts = [[str(sample.get(key) or "") for sample in samples] for key in ("reference", "generated")]
        return token_f1(*texts)
    return value


def chance_warning(study: Study) -> str:
    """A warning if the best configuration is no better than the prior; else empty."""
    known = [run.chance for c in study.configurations[:1] for run in c.runs if run.chance]
    bad = [chance for chance in known if not is_better(chance)]
    if not bad:
        return ""
    which = "one run" if len(known) == 1 else f"{len(bad)} of {len(known)} runs"
    loss, prior = (_shown(mean([chance[name] for chance in bad])) for name in ("loss", "prior_loss"))
    return (
        f"{study.configurations[0].name} is not better than chance in {which}: loss {loss} against {prior} from the "
        "training rows' targets alone."
    )


def confusion(study: Study) -> tuple[list[str], list[list[int]], str, int] | None:
    """(classes, rows by true and predicted class, name, runs) of the best configuration; None without classes."""
    from llmft.metrics.classification import confusion as counts

    of_runs = [run.predictions() for c in study.configurations[:1] for run in c.runs]
    known = [p for p in of_runs if p is not None and p.problem == TaskType.single_label and p.known and p.labels]
    known = [p for p in known if p.labels == known[0].labels]
    if not known:
        return None
    total = np.sum([counts(p.references(), p.values) for p in known], axis=0)
    return known[0].labels, total.tolist(), study.configurations[0].name, len(known)


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


def _mean_and_spread(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    spread = f" ({number(float(np.std(known, ddof=1)), 2)})" if len(known) > 1 else ""
    return _shown(mean(known)) + spread


def answers_table(study: Study) -> Table | None:
    """By configuration the change of both answers, and accuracy against the rule of length; None without either."""
    lines = [
        [c.name, movement(_means(c.runs, "before"), _means(c.runs, "after")) or "", against_length(c.runs)]
        for c in study.configurations
    ]
    head = ["configuration", "change of the answers", 'against "the longer answer wins"']
    note = "Means over the runs, on the validation rows; log-probabilities are those of whole answers."
    shown = [column for column in range(len(head)) if column == 0 or any(line[column] for line in lines)]
    return Table("Compared answers", note, head, lines, sentences=True).only(shown) if len(shown) > 1 else None


def _means(runs: Sequence[RunRecord], when: str) -> dict[str, float]:
    """Means over `runs` of the metrics that all of them have `when`: "before" or "after" training."""
    records = [values for run in runs if isinstance(values := run.result.get(when), dict)]
    names = set.intersection(*map(set, records)) if records else set()
    return {
        name: float(np.mean([record[name] for record in records]))
        for name in names
        if all(isinstance(record[name], (int, float)) for record in records)
    }


def against_length(runs: Sequence[RunRecord]) -> str:
    """Mean accuracy against the rule's, and in how many of `runs` it is no better; empty if not recorded."""
    records = [run.length for run in runs if run.length]
    if not records:
        return ""
    accuracy, rule = (_shown(mean([record[name] for record in records])) for name in ("accuracy", "longer_wins"))
    worse = sum(not beats_length(record) for record in records)
    return f"{f'NOT better in {worse} of {len(records)} runs' if worse else 'better'}: {accuracy} against {rule}"


def length_warning(study: Study) -> str:
    """A warning if the best configuration is no better than "the longer answer wins"; else empty."""
    words = against_length([run for c in study.configurations[:1] for run in c.runs])
    if not words.startswith("NOT"):
        return ""
    name, rule = study.configurations[0].name, 'Accuracy against the rule "the longer answer wins"'
    return f"{name} may have learned length alone. {rule}: {words}."


def unit_warning(study: Study) -> str:
    """A warning if the compared losses have different units, such as those of two betas; else empty."""
    keys = [key for key in study.keys if key.startswith(KEYS_OF_UNIT)]
    compares_answers = any(run.config.get("task.feedback") for run in study.runs)
    if not keys or not compares_answers or study.monitor != "val/loss_nats":
        return ""
    return (
        f"the unit of {study.monitor} depends on {' and '.join(keys)}, so a lower value is not better; "
        "trainer.monitor=val/accuracy is comparable."
    )
