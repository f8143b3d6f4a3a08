"""The answers as a table, as JSON and CSV, and as a page with a figure of time against length."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from llmft.benchmarks.answers import Answered, Wish, hours, most_outputs, to_csv, training_hours
from llmft.benchmarks.figure import page
from llmft.core.errors import DiskError
from llmft.core.files import write_atomically
from llmft.runs.directory import slug


def write_answers(answered: Sequence[Answered], wish: Wish, root: Path, name: str, screen: Any) -> list[dict[str, Any]]:
    """Writes bench.json, bench.csv and bench.html below `root`, prints the table, and returns its rows.

    Raises DiskError where they cannot be written.
    """
    rows = [own.to_row(wish) for own in answered]
    directory = root / slug(name)[:80]
    content = {
        "bench.json": json.dumps({"asked": vars(wish), "rows": rows}, indent=1, ensure_ascii=False),
        "bench.csv": to_csv(rows),
        "bench.html": page(answered, wish, name, [cells(own, wish) for own in answered], remarks(answered)),
    }
    try:
        for file, text in content.items():
            write_atomically(directory / file, text.encode())
    except OSError as error:
        raise DiskError(f"{directory}: {error.strerror}; set output_dir to another disk.") from None
    show(answered, wish, screen)
    screen.print(
        f"[bold]figure[/bold]  {escape(str(directory / 'bench.html'))}, with bench.csv and bench.json beside it"
    )
    return rows


def show(answered: Sequence[Answered], wish: Wish, screen: Any) -> None:
    """Prints the table and what it means."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("model")
    for name in ("tokens in + out", "trained/s", "read/s", "written/s", "memory", "tokens out", "training"):
        table.add_column(name, justify="right")
    for own in answered:
        table.add_row(*cells(own, wish))
    screen.print(table)
    screen.print(
        f"tokens per second; medians ± half the range of the repeats. Tokens out, at most: {wish.samples:,} samples in "
        f"{wish.hours:g} hours, {wish.inference_rows} at once. Training: {wish.rows:,} rows x {wish.epochs:g} epochs "
        f"in batches of {wish.batch_size}, validations not counted."
    )
    for told in remarks(answered):
        screen.print(escape(told))


def cells(own: Answered, wish: Wish) -> list[str]:
    """One line of the table."""
    found = own.measured
    head = [f"{own.model} {own.quantization}", f"{found.input_tokens} + {found.output_tokens}"]
    if found.error is not None:
        return [*head, found.error, *[""] * 5]
    most, ends = most_outputs(found, wish, own.context_tokens)
    speeds = {
        "train": found.train_tokens_per_s,
        "prompt": found.prompt_tokens_per_s,
        "generate": found.generated_tokens_per_s,
    }
    return [
        *head,
        *(f"{value:,.0f} ±{100 * found.spread[name]:.0f}%" for name, value in speeds.items()),
        f"{found.peak_bytes / 2**30:.1f} GiB",
        f"{most:,}{' (context)' if ends else ''}",
        hours(training_hours(found, wish)),
    ]


def remarks(answered: Sequence[Answered]) -> list[str]:
    """What to know of the numbers."""
    told = [
        f"{name}: random weights of its shape, since its own are not here; they are as fast."
        for name in dict.fromkeys(own.model for own in answered if own.weights == "random")
    ]
    measured = [own for own in answered if own.measured.error is None]
    places = dict.fromkeys(f"{own.device}, {own.precision}" for own in measured)
    told += [f"On {place}." for place in places]
    fits = {f"{own.model} {own.quantization}": own.measured.at_once for own in measured}  # that of the longest rows
    return told + [f"{case}: {fit}." for case, fit in fits.items()]
