"""Prints a run's metrics before and after training, and whether its predictions are better than chance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.markup import escape

from llmft.core.console import Screen, text_table
from llmft.metrics.prior import chance_sentence, is_better


def show_summary(
    screen: Screen,
    before: Mapping[str, float | None],
    after: Mapping[str, float | None],
    facts: Mapping[str, str],
    chance: Mapping[str, Mapping[str, Any]],
    notes: Sequence[str] = (),
    *,
    blank: bool,
) -> None:
    """Prints metrics before and after training, the prior's, `notes` about them, and `facts` (a run's directory, …).

    With `blank`, validation metrics are left out.
    """
    if blank:
        after = {name: value for name, value in after.items() if not name.startswith("val/")}
        screen.print("Validation metrics are not reported, because those rows are trained on.")
    rows = []
    for name, value in after.items():
        split, _, metric = name.partition("/")
        of_split = chance.get(split, {})
        prior = of_split.get("prior_loss") if metric == "loss_nats" else of_split.get("metrics", {}).get(metric)
        numbers = ["" if number is None else f"{number:.4f}" for number in (before.get(name), value, prior)]
        rows.append([name, numbers[0], numbers[1] or "not finite", *(numbers[2:] if chance else [])])
    table = text_table(["metric", "before", "after", *(["prior"] if chance else [])], rows, "result")
    table.columns[2].style = "bold"
    if after:
        screen.print(table)
    show_chance(screen, chance)
    for sentence in notes:
        screen.print(escape(sentence))
    for name, text in facts.items():
        screen.print(f"[bold]{name}[/bold]  {escape(text)}")


def show_chance(screen: Screen, chance: Mapping[str, Mapping[str, Any]]) -> None:
    """Prints whether predictions are better than the prior of the training rows, by split."""
    for split, values in chance.items():
        colour = "green" if is_better(values) else "red"
        screen.print(f"[{colour}]{split}[/{colour}]  {escape(chance_sentence(values))}")
