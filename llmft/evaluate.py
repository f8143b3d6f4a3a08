"""predictions + references -> metrics: `python -m llmft.evaluate predictions=DIR`.

With bootstrap intervals, per class, per slice, and the confusion matrix; all of it is also written to evaluation.json
next to the predictions.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmft.config.commands import EvaluateConfig, OutputFormat
from llmft.config.hydra_app import run_verb
from llmft.config.invocation import arguments_of_process

MOST_CLASSES = 12
"""Largest confusion matrix on the screen; evaluation.json always has it."""


def main(argv: Sequence[str]) -> None:
    run_verb("evaluate", EvaluateConfig, lambda config, _: evaluate(config), argv)


def evaluate(config: EvaluateConfig, *, quiet: bool = False) -> dict[str, Any]:
    """Scores predictions, shows and writes the report, and returns it.

    Raises ConfigError or DataError for files, columns or rows that do not match.
    """
    from llmft.core.files import write_json
    from llmft.evaluation import scores
    from llmft.evaluation.references import open_predictions, with_references
    from llmft.metrics.prior import against_prior

    predictions, report_file = open_predictions(config.predictions)
    predictions, columns = with_references(predictions, config)
    metrics = scores.metrics_for(predictions, config.metrics, config.metric_options)
    intervals = {}
    if config.bootstrap:
        intervals = scores.bootstrap(predictions, metrics, config.bootstrap, config.confidence, config.seed)
    chance = against_prior(predictions, metrics)
    prior = chance["metrics"] if chance is not None else {}
    report = {
        "predictions": str(config.predictions),
        "rows": len(predictions.ids),
        "problem": predictions.problem,
        "labels": predictions.labels,
        "confidence": config.confidence,
        "resamples": config.bootstrap,
        "metrics": {
            name: {"value": value, "interval": list(intervals.get(name, ())) or None, "prior": prior.get(name)}
            for name, value in scores.score(predictions, metrics).items()
        },
        "chance": chance,
        "classes": scores.per_class(predictions),
        "slices": scores.per_slice(predictions, columns, metrics),
        "confusion": scores.confusion(predictions),
    }
    report = _plain(report)
    write_json(report_file, report)
    if config.format is OutputFormat.json and not quiet:
        print(json.dumps(report, indent=1, ensure_ascii=False))
    elif not quiet:
        _show(report, report_file)
    return report


def _plain(value: Any) -> Any:
    """`value` with None for NaN and infinities, which JSON lacks."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _show(report: dict[str, Any], path: Path) -> None:
    from rich.markup import escape

    from llmft.core.console import Screen, text_table
    from llmft.metrics.prior import chance_sentence, is_better

    screen = Screen()

    def number(value: Any) -> str:
        return "" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.4f}"

    chance = report["chance"]
    rows = [
        [
            name,
            number(m["value"]),
            " to ".join(map(number, m["interval"] or [])),
            *([number(m["prior"])] if chance else []),
        ]
        for name, m in report["metrics"].items()
    ]
    head = ["metric", "value", f"{report['confidence']:.0%} interval", *(["prior"] if chance else [])]
    screen.print(text_table(head, rows, f"{report['rows']:,} rows"))
    if chance:
        screen.print(f"[{'green' if is_better(chance) else 'red'}]{escape(chance_sentence(chance))}[/]")
    for title, entries in {"class": report["classes"], **report["slices"]}.items():
        if entries:
            names = list(next(iter(entries.values())))
            rows = [[value, *(number(entry[name]) for name in names)] for value, entry in entries.items()]
            screen.print(text_table([title, *names], rows))
    if 0 < len(report["confusion"]) <= MOST_CLASSES:
        pairs = zip(report["labels"], report["confusion"], strict=True)
        rows = [[name, *map(number, counts)] for name, counts in pairs]
        screen.print(text_table(["", *report["labels"]], rows, "rows by true class (down) and likeliest (across)"))
    screen.print(f"[bold]written[/bold]  {escape(str(path))}")


if __name__ == "__main__":
    main(arguments_of_process())
