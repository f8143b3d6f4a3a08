"""predictions + references -> metrics: `python -m llmft.evaluate predictions=DIR`.

With bootstrap intervals, per class, per slice, and the confusion matrix; all of it also in evaluation.json beside the
predictions.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmft.config.commands import EvaluateConfig
from llmft.config.convert import to_config
from llmft.config.hydra_app import run_verb
from llmft.config.invocation import arguments_of_process

MOST_CLASSES = 12
"""Of a confusion matrix on the screen; evaluation.json holds it whole."""


def main(argv: Sequence[str]) -> None:
    """The command."""
    run_verb("evaluate", EvaluateConfig, lambda composed, _: evaluate(to_config(composed, EvaluateConfig)), argv)


def evaluate(config: EvaluateConfig, *, quiet: bool = False) -> dict[str, Any]:
    """Scores predictions, shows and writes what it found, and returns it.

    Raises ConfigError or DataError for files, columns or rows that do not fit each other.
    """
    from llmft.core.files import write_atomically
    from llmft.evaluation import scores
    from llmft.evaluation.references import open_predictions, with_references
    from llmft.metrics.prior import against_prior

    predictions, beside = open_predictions(config.predictions)
    predictions, columns = with_references(predictions, config)
    metrics = scores.metrics_for(predictions, config.metrics, config.metric_options)
    found = scores.score(predictions, metrics)
    intervals = {}
    if config.bootstrap:
        intervals = scores.bootstrap(predictions, metrics, config.bootstrap, config.confidence, config.seed)
    chance = against_prior(predictions, metrics)
    prior = chance.metrics if chance is not None else {}
    report = {
        "predictions": str(config.predictions),
        "rows": len(predictions.ids),
        "problem": predictions.problem,
        "labels": predictions.labels,
        "confidence": config.confidence,
        "resamples": config.bootstrap,
        "metrics": {
            name: {
                "value": value,
                "interval": list(intervals[name]) if name in intervals else None,
                "prior": prior.get(name),
            }
            for name, value in found.items()
        },
        "chance": chance.to_plain() if chance is not None else None,
        "classes": scores.per_class(predictions),
        "slices": scores.per_slice(predictions, columns, metrics),
        "confusion": scores.confusion(predictions),
    }
    report = _plain(report)
    write_atomically(beside, json.dumps(report, indent=1, ensure_ascii=False).encode())
    if config.format == "json" and not quiet:
        print(json.dumps(report, indent=1, ensure_ascii=False))
    elif not quiet:
        _show(report, beside)
    return report


def _plain(value: Any) -> Any:
    """JSON has no number for what is not one."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _show(report: dict[str, Any], path: Path) -> None:
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from llmft.metrics.prior import chance_sentence, is_better

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 110

    def number(value: Any) -> str:
        return "" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.4f}"

    table = Table(title=f"{report['rows']:,} rows", title_justify="left", box=box.SIMPLE_HEAD)
    chance = report["chance"]
    for name in ("metric", "value", f"{report['confidence']:.0%} interval", *(["prior"] if chance else [])):
        table.add_column(name, justify="left" if name == "metric" else "right")
    for name, entry in report["metrics"].items():
        interval = entry["interval"]
        cells = [number(entry["value"]), " to ".join(map(number, interval)) if interval else ""]
        table.add_row(name, *cells, *([number(entry["prior"])] if chance else []))
    console.print(table)
    if chance:
        console.print(
            f"[{'green' if is_better(chance) else 'red'}]{escape(chance_sentence(chance))}[/]", soft_wrap=True
        )
    parts = {"class": report["classes"], **report["slices"]}
    for title, rows in parts.items():
        if not rows:
            continue
        table = Table(box=box.SIMPLE_HEAD)
        names = list(next(iter(rows.values())))
        for name in (title, *names):
            table.add_column(escape(name), justify="left" if name == title else "right")
        for value, entry in rows.items():
            table.add_row(escape(value), *(number(entry[name]) for name in names))
        console.print(table)
    if 0 < len(report["confusion"]) <= MOST_CLASSES:
        table = Table(
            title="rows by true class (down) and likeliest (across)", title_justify="left", box=box.SIMPLE_HEAD
        )
        for name in ("", *report["labels"]):
            table.add_column(escape(name), justify="right" if name else "left")
        for name, counts in zip(report["labels"], report["confusion"], strict=True):
            table.add_row(escape(name), *map(number, counts))
        console.print(table)
    console.print(f"[bold]written[/bold]  {escape(str(path))}")


if __name__ == "__main__":
    main(arguments_of_process())
