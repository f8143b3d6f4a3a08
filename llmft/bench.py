"""Measures how fast models train and answer: `python -m llmft.bench models=[mistral,qwen25_7b] samples=1300 hours=9`.

Measures the training step, prompt processing and generation of each model and quantisation in a child process, and
estimates the maximum tokens of an answer and the time of a training. A model whose weights are not here is measured
with random ones, at the same speed. Nothing is downloaded.
"""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmft.config.commands import BenchConfig, OutputFormat
from llmft.config.convert import to_config
from llmft.config.fields import seconds_of
from llmft.config.hydra_app import explain, make_known, run_verb
from llmft.config.invocation import arguments_of_process
from llmft.config.model import ModelInit
from llmft.config.sections import TrainConfig
from llmft.core.errors import ConfigError

if TYPE_CHECKING:
    from llmft.benchmarks.measure import Measured

GROUPS = ("model", "prompt", "lora", "optimizer")
"""Config groups of a training that can be overridden here."""


def main(argv: Sequence[str]) -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    run_verb("bench", BenchConfig, lambda config, invocation: bench(config, invocation.argv), argv)


@dataclass(frozen=True)
class Subject:
    """One model in one number format: a training's config, the origin of its weights, and its context."""

    config: TrainConfig
    weights: str
    context_tokens: int | None

    @property
    def label(self) -> str:
        return f"{self.config.model.label} {self.config.quantization.format.value}"


def bench(config: BenchConfig, arguments: Sequence[str]) -> list[dict[str, Any]]:
    """Measures the models in `config`, prints and writes the estimates, and returns them as plain rows.

    `arguments` is the command line, from which overrides of the training's groups are taken.

    Raises ConfigError before anything is loaded for an invalid model, format or length.
    """
    from llmft.benchmarks.estimates import Workload
    from llmft.benchmarks.report import write_estimates
    from llmft.core.console import Screen
    from llmft.core.imports import load_libraries

    load_libraries(training=False)
    subjects = subjects_of(config, arguments)
    points = [points_of(config, subject) for subject in subjects]
    if not any(points):
        raise ConfigError(
            f"input_tokens={config.input_tokens} with output_tokens={config.output_tokens}: more than the context of "
            f"{subjects[0].config.model.label} ({subjects[0].context_tokens} tokens); choose shorter ones."
        )
    for_programs = config.format is OutputFormat.json
    measured = _measure(config, subjects, points, quiet=for_programs or not config.progress)
    workload = Workload(
        config.samples, config.hours, config.rows, config.epochs, config.batch_size, config.inference_rows
    )
    name = config.name or "-".join(dict.fromkeys(subject.config.model.label for subject in subjects))
    rows = write_estimates(measured, workload, Path(config.output_dir) / "bench", name, Screen(quiet=for_programs))
    if for_programs:
        print(json.dumps(rows, indent=1, ensure_ascii=False))
    return rows


def _measure(
    config: BenchConfig, subjects: Sequence[Subject], points: Sequence[list[tuple[int, int]]], *, quiet: bool
) -> list[Measured]:
    """Measures each subject at its points, within max_time, with a progress bar."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from llmft.benchmarks.measure import Case, run_case
    from llmft.core.files import scratch_directory

    ends = time.monotonic() + seconds_of(config.max_time, "max_time")
    measured: list[Measured] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    scratch = scratch_directory(Path(config.output_dir).absolute() / "bench")
    with scratch as folder, Progress(*columns, console=Console(stderr=True), disable=quiet, transient=True) as bar:
        task = bar.add_task("", total=sum(map(len, points)))
        for index, (subject, lengths) in enumerate(zip(subjects, points, strict=True)):
            started = itertools.count(len(measured))

            def report(status: str, label: str = subject.label, started: Iterator[int] = started) -> None:
                bar.update(task, description=f"{label}: {status}", completed=next(started))

            share = max(1.0, (ends - time.monotonic()) / (len(subjects) - index))
            case = Case(subject.config, lengths, share, config.repeats, config.inference_rows, folder)
            results, about = run_case(case, report)
            about |= {"model": subject.config.model.label, "quantization": subject.config.quantization.format.value}
            about |= {"weights": subject.weights, "context_tokens": subject.context_tokens}
            measured += [replace(result, **about) for result in results]
            bar.update(task, completed=len(measured))
    return measured


def subjects_of(config: BenchConfig, arguments: Sequence[str]) -> list[Subject]:
    """A subject for each model and quantisation, in this order."""
    overrides = [a for a in arguments if a.lstrip("+~").partition("=")[0].partition(".")[0] in GROUPS]
    common = [
        "logger=none",
        "prompt=plain" if config.models else "prompt=alpaca_short",
        *overrides,
        f"trainer.batch_size={config.batch_size}",
        f"trainer.micro_batch={config.micro_batch}",
        f"trainer.gradient_checkpointing={config.gradient_checkpointing.value}",
        f"trainer.accelerator={config.accelerator}",
        f"trainer.threads={'null' if config.threads is None else config.threads}",
    ]
    if config.precision.value != "auto":
        common.append(f"trainer.precision={config.precision.value}")
    return [
        _subject([*common, *([f"model={model}"] if model else []), f"quantization={format.value}"])
        for model in config.models or [""]
        for format in config.quantizations
    ]


def _subject(overrides: list[str]) -> Subject:
    """The subject of a training with `overrides`, with local weights, or else random ones of the same shape."""
    import hydra

    from llmft.data.hub import Located, locate
    from llmft.model.load import model_config

    make_known("train", TrainConfig)
    try:
        config: TrainConfig = to_config(hydra.compose("train", overrides), TrainConfig)
    except ConfigError:
        raise
    except Exception as error:
        raise explain(error, TrainConfig, overrides) or error from error
    if config.model.architecture == "tfidf":
        raise ConfigError(f"model={config.model.name} counts words, which takes seconds anywhere: nothing to measure.")
    weights = "own" if config.model.init is ModelInit.pretrained else "random"
    try:
        located = locate(config.model)
    except ConfigError:
        if config.model.path is not None:
            raise
        config = replace(config, model=replace(config.model, init=ModelInit.random))
        located, weights = Located(None, "random"), "random"
    context = getattr(model_config(config.model, located), "max_position_embeddings", None)
    return Subject(config, weights, context)


def points_of(config: BenchConfig, subject: Subject) -> list[tuple[int, int]]:
    """Pairs of lengths that fit into the model's context, shortest first."""
    pairs = [(inputs, outputs) for inputs in config.input_tokens for outputs in config.output_tokens]
    limit = subject.context_tokens
    return sorted({pair for pair in pairs if limit is None or sum(pair) <= limit}, key=lambda pair: (sum(pair), pair))


if __name__ == "__main__":
    main(arguments_of_process())
