"""Measures models point by point in a child process.

Each point is a short training on random words by `train`, which records the times, and answers of the resulting model,
loaded as by `predict`. A point that runs out of memory fails alone; if its process is killed, another one continues.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from llmft.config.sections import TrainConfig
from llmft.core.errors import ConfigError, UserError
from llmft.core.machine import die_with_parent, free_memory

VARIATION = 0.1
"""Relative variation of prompt lengths between rows; rows of equal length would be 15% faster on a CPU."""
MOST_TOKENS = {"cpu": 4_096, "cuda": 65_536}
"""Tokens of a measured step; times of larger steps are extrapolated."""
NUM_WORDS = 200
"""Number of different words in the random rows."""
GRACE, GRACE_S = 1.5, 30.0
"""A process is killed after GRACE times its seconds plus GRACE_S, since a point may take long."""


@dataclass
class Case:
    """One model in one number format, and its points to measure.

    Attributes:
        config: of a training.
        points: (input tokens, output tokens) of a row.
        seconds: after this time no further point is started.
        repeats: measurements of each point after a warm-up.
        inference_rows: rows that are answered at once.
        folder: an existing directory for the temporary trainings.
    """

    config: TrainConfig
    points: list[tuple[int, int]]
    seconds: float
    repeats: int
    inference_rows: int
    folder: Path


@dataclass
class Measured:
    """One measured point of a model: medians, and the relative half range of the repeats.

    Attributes:
        step_s: seconds of an optimizer step over the effective batch.
        prompt_s: seconds to read the prompts of `inference_rows` rows and generate one token each.
        token_s: seconds of each further token for all of them.
        peak_bytes: of the device's allocator, or of the process on a CPU.
        micro_batch: the limit of a micro-batch, and its gradient checkpointing, in words.
        weights: "own", or "random" of the model's shape.
    """

    input_tokens: int
    output_tokens: int
    train_tokens_per_s: float = 0.0
    step_s: float = 0.0
    prompt_tokens_per_s: float = 0.0
    prompt_s: float = 0.0
    generated_tokens_per_s: float = 0.0
    token_s: float = 0.0
    peak_bytes: int = 0
    micro_batch: str = ""
    spread: dict[str, float] = field(default_factory=dict)
    repeats: int = 0
    error: str | None = None
    model: str = ""
    quantization: str = ""
    weights: str = ""
    device: str = ""
    precision: str = ""
    context_tokens: int | None = None

    @property
    def case(self) -> str:
        """Model and number format as a label."""
        return f"{self.model} {self.quantization}"


def run_case(case: Case, report: Callable[[str], None]) -> tuple[list[Measured], dict[str, Any]]:
    """Measures the points of `case` in order; returns them with their device and precision.

    `report` is called with the current point. Raises ConfigError for what cannot be measured.
    """
    results = [Measured(*point, error="no time left") for point in case.points]
    about: dict[str, Any] = {}
    started, pool = time.monotonic(), None
    try:
        for number, point in enumerate(case.points):
            if time.monotonic() - started > case.seconds:
                break
            report(f"{point[0]} tokens in, {point[1]} out")
            pool = pool or ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), prepare_process)
            try:
                answer = pool.submit(measure_if_it_fits, case, *point)
                left = GRACE * case.seconds + GRACE_S - (time.monotonic() - started)
                results[number], about = answer.result(left) or (Measured(*point, error="does not fit"), about)
            except TimeoutError:
                break
            except BrokenProcessPool:
                (process,) = pool._processes.values()
                pool.shutdown()  # waits for the end of the process
                pool = None
                if (code := process.exitcode or 0) >= 0:
                    raise RuntimeError(f"the measuring process ended with code {code}") from None
                # Killed by the kernel for want of memory, or a library crashed.
                results[number].error = "does not fit" if code == -9 else f"ended by signal {-code}"
    finally:
        if pool is not None:
            for process in pool._processes.values():
                process.kill()
            pool.shutdown()
    return results, about


def prepare_process() -> None:
    """Silences the measuring process, since its streams carry the caller's JSON and progress bar; ends it with ours."""
    die_with_parent()
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    silence = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(silence, stream)


def measure_if_it_fits(case: Case, inputs: int, outputs: int) -> tuple[Measured, dict[str, str]] | None:
    """The result of `measure`; None if memory does not suffice.

    Raises ConfigError or RuntimeError, which unlike errors of libraries reach another process whole.
    """
    from llmft.core.imports import load_libraries, quiet_warnings
    from llmft.training.out_of_memory import is_out_of_memory

    try:
        with quiet_warnings():
            load_libraries()
            return measure(case, inputs, outputs)
    except Exception as error:
        if not is_out_of_memory(error) and not (isinstance(error, ConfigError) and "out of memory" in str(error)):
            if isinstance(error, UserError):
                raise ConfigError(str(error)) from None
            raise RuntimeError(f"the measuring process failed:\n{traceback.format_exc()}") from None
    free_memory()  # only now, since the error's frames kept memory alive
    return None


def measure(case: Case, inputs: int, outputs: int) -> tuple[Measured, dict[str, str]]:
    """Measures one point; returns it with its device and precision.

    Raises ConfigError or an error of a library if memory does not suffice.
    """
    import torch

    from llmft.core.console import Screen
    from llmft.data.hub import locate
    from llmft.model.assemble import assemble
    from llmft.model.device import mixed_precision, pick_device, pick_precision
    from llmft.model.tokenizer import load_tokenizer

    config = case.config
    device = pick_device(config.trainer.accelerator)
    precision = pick_precision(config.trainer.precision, device)
    located = locate(config.model)
    tokenizer = load_tokenizer(config.model, located)
    measured = Measured(inputs, outputs)
    with tempfile.TemporaryDirectory(dir=case.folder) as folder:
        rows = min(config.trainer.batch_size, max(1, MOST_TOKENS[device.type] // (inputs + outputs)))
        training = _short_training(config, Path(folder), tokenizer, measured, rows, case.repeats)
        trained = _train(training, measured, case.repeats)
        measured.step_s = config.trainer.batch_size * (inputs + outputs) / measured.train_tokens_per_s
        assembled = assemble(
            config,
            located,
            device=device,
            precision=precision,
            vocabulary=len(tokenizer),
            pad_id=tokenizer.pad_token_id,
            threads=config.trainer.threads,
            weights_directory=trained,
            warn=Screen(quiet=True).warn,
        )
    try:
        with mixed_precision(device, precision):
            _answer(assembled, measured, case)
    finally:
        assembled.release()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return measured, {"device": name, "precision": precision.value}


def _short_training(
    config: TrainConfig, folder: Path, tokenizer: Any, point: Measured, rows: int, repeats: int
) -> TrainConfig:
    """The config of a training on random words with `rows` per step, one warm-up step and `repeats` more."""
    from llmft.config.data import Columns, DataConfig, Files

    files = {"train": folder / "train.jsonl", "validation": folder / "validation.jsonl"}
    for seed, (path, count) in enumerate(zip(files.values(), (rows * (repeats + 1), 1), strict=True)):
        path.write_text("\n".join(map(json.dumps, random_rows(tokenizer, count, point, seed))))
    data = DataConfig(
        name="bench",
        split_files=Files(**{split: str(path) for split, path in files.items()}),
        columns=Columns(prompt="prompt", response="response"),
        max_tokens=max(8, getattr(tokenizer, "context_tokens", None) or 2 * (point.input_tokens + point.output_tokens)),
        max_dropped_fraction=1.0,
        max_overlap_fraction=1.0,
        cache=False,
    )
    trainer = replace(
        config.trainer, batch_size=rows, max_steps=repeats + 1, validate_every=float(repeats + 1), keep_checkpoints=1
    )
    task = replace(config.task, generate_rows=0)
    return replace(config, data=data, trainer=trainer, task=task, output_dir=str(folder), progress=False)


def random_rows(tokenizer: Any, count: int, point: Measured, seed: int) -> list[dict[str, str]]:
    """`count` rows of about the point's lengths in tokens; prompt lengths vary by VARIATION."""
    source = random.Random(seed)
    words: list[str] = []
    while len(words) < NUM_WORDS:
        word = tokenizer.decode([source.randrange(len(tokenizer))]).strip()
        if word.isalpha() and word.isascii():
            words.append(word)
    tokens = len(tokenizer(" ".join(words), add_special_tokens=False).input_ids) / len(words)

    def text(length: float) -> str:
        return " ".join(source.choices(words, k=max(1, round(length / tokens))))

    def row() -> dict[str, str]:
        length = point.input_tokens * source.uniform(1 - VARIATION, 1 + VARIATION)
        return {"prompt": text(length), "response": text(point.output_tokens)}

    return [row() for _ in range(count)]


def _train(config: TrainConfig, measured: Measured, repeats: int) -> Path:
    """Trains, and reads speed and memory from the run's record; returns the directory of its weights."""
    from llmft.config.trainer import Checkpointing
    from llmft.data.batch import Limit
    from llmft.training.micro_batching import MicroBatchPlan
    from llmft.training.run import train

    train(config, quiet=True)
    (directory,) = (Path(config.output_dir) / "runs").iterdir()
    lines = [json.loads(line) for line in (directory / "timing.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "train/step_s" in line]
    speeds = [line["train/tokens_per_s"] for line in steps[1:]]
    measured.train_tokens_per_s, measured.spread["train"] = _median(speeds)
    measured.peak_bytes = int(max(line["memory/peak_gib"] for line in steps) * 2**30)
    measured.repeats = repeats
    plan = json.loads((directory / "environment.json").read_text())["micro_batch"]
    limit = Limit(plan["rows"], plan["tokens"])
    measured.micro_batch = MicroBatchPlan(limit, Checkpointing(plan["checkpointing"]), "").size
    return directory / ("adapter" if config.lora.enabled else "model")


def _answer(assembled: Any, measured: Measured, case: Case) -> None:
    """Measures the time of the first token of `inference_rows` answers, and of each further one."""
    import torch

    from llmft.data.ends import Ends
    from llmft.model.generate import generate

    base, model, rows = assembled.base, assembled.model, case.inference_rows
    base.generation_config.eos_token_id = None  # so that all repeats have the same length
    vocabulary = int(base.get_input_embeddings().weight.shape[0])
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(3, vocabulary, (rows, measured.input_tokens), generator=generator).tolist()

    def seconds(tokens: int) -> float:
        began = time.perf_counter()
        # The answers are lists, so a GPU has finished by then.
        answers = generate(model, prompts, pad_id=0, ends=Ends([]), max_new_tokens=tokens, batch_size=rows)
        assert all(len(answer) == tokens for answer in answers)
        return max(time.perf_counter() - began, 1e-9)

    lengths = (1, measured.output_tokens)
    times = [[seconds(length) for length in lengths] for _ in range(case.repeats + 1)][1:]
    measured.prompt_s, measured.spread["prompt"] = _median([first for first, _ in times])
    further = [max(total - first, 1e-9) / (measured.output_tokens - 1) for first, total in times]
    measured.token_s, measured.spread["generate"] = _median(further)
    measured.prompt_tokens_per_s = rows * measured.input_tokens / measured.prompt_s
    measured.generated_tokens_per_s = rows / measured.token_s


def _median(values: list[float]) -> tuple[float, float]:
    """(median, half the range relative to it)."""
    middle = statistics.median(values)
    return middle, (max(values) - min(values)) / 2 / middle if middle > 0 else 0.0
