"""One model in one number format, measured point by point in a process of its own.

A point that finds no memory costs itself, and where it takes the process along, the one who asked starts another.
What is asked comes as JSON on the standard input; answers go out line by line behind `MARK`.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

MARK = "llmft-bench "
VARIATION = 0.1
"""Of the length of what is read, between the rows of a training; rows of one length would be 15% faster on a CPU."""
MOST_MICRO_BATCHES = 4
"""Of a step are measured; the time of more is told from theirs."""


@dataclass
class Case:
    """What is asked of a process.

    Attributes:
        config: a training's, as plain data.
        points: (input tokens, output tokens) of a row.
        seconds: after so many, no further point is begun.
        repeats: measurements of each point behind the one that warms up.
        inference_rows: rows that are answered at once.
    """

    config: dict[str, Any]
    points: list[tuple[int, int]]
    seconds: float
    repeats: int
    inference_rows: int


@dataclass
class Measured:
    """One point: medians, the relative half range of their repeats, and what they took.

    Attributes:
        step_s: an optimizer step over the effective batch.
        prompt_s: reading the prompts of `inference_rows` rows and writing a token each.
        token_s: one more token for all of them.
        peak_bytes: of the device's allocator, or of the process on a CPU.
        at_once: what a micro-batch holds and what is computed again.
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
    at_once: str = ""
    spread: dict[str, float] = field(default_factory=dict)
    repeats: int = 0
    error: str | None = None


def main() -> None:
    """Measures the case of the standard input."""
    import os

    os.environ["HF_HUB_OFFLINE"] = "1"
    own = Case(**json.loads(sys.stdin.read()))

    def tell(kind: str, **values: Any) -> None:
        print(MARK + json.dumps({"kind": kind, **values}), flush=True)

    from llmft.core.errors import UserError
    from llmft.core.imports import quiet_warnings

    try:
        with quiet_warnings():
            _measure(own, tell)
    except UserError as error:
        tell("error", message=str(error))


def _measure(case: Case, tell: Callable[..., None]) -> None:
    from llmft.core.imports import load_libraries
    from llmft.training.out_of_memory import is_out_of_memory

    load_libraries()
    began = time.monotonic()
    try:
        bench = Bench(case)
    except Exception as error:
        if not is_out_of_memory(error.__cause__ or error):  # "cannot be loaded", and why
            raise
        for number in range(len(case.points)):
            tell("point", number=number, error="does not fit")
        return
    tell("loaded", seconds=time.monotonic() - began, device=bench.device_name, precision=bench.precision.value)
    for number, (inputs, outputs) in enumerate(case.points):
        if time.monotonic() - began > case.seconds:
            tell("point", number=number, error="no time left")
            continue
        tell("begun", number=number)
        try:
            found = bench.point(inputs, outputs, began + case.seconds)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            found = None
        if found is None:  # here the error is gone, and with it what its frames held
            bench.clear()
            tell("point", number=number, error="does not fit")
        else:
            tell("point", number=number, measured=asdict(found))


class Bench:
    """A loaded model with its adapter and optimizer, as a training has them."""

    def __init__(self, case: Case) -> None:
        import torch

        from llmft.config.convert import from_plain
        from llmft.config.instantiate import optimizer_factory
        from llmft.config.sections import TrainConfig
        from llmft.data.hub import locate
        from llmft.model.assemble import assemble
        from llmft.model.load import TORCH_DTYPES, model_config, pick_device, pick_precision
        from llmft.training.finetuner import parameter_groups

        self.case = case
        self.config: TrainConfig = from_plain(case.config, TrainConfig)
        config = self.config
        self.device = pick_device(config.trainer.accelerator, 0)
        self.precision = pick_precision(config.trainer.precision, self.device)
        self.dtype = TORCH_DTYPES[self.precision] if config.lora.enabled else torch.float32
        located = locate(config.model)
        self.architecture = model_config(config.model, located)
        self.context_tokens = getattr(self.architecture, "max_position_embeddings", None)
        torch.set_float32_matmul_precision("high")
        torch.use_deterministic_algorithms(config.trainer.deterministic, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        assembled = assemble(
            config,
            located,
            device=self.device,
            precision=self.precision,
            threads=config.trainer.threads,
            keep=False,
        )
        self.base, self.model = assembled.base, assembled.model
        # An answer ends where it is told to, so that every repeat is as long.
        self.base.generation_config.eos_token_id = None
        self.optimizer = optimizer_factory(config.optimizer, config.learning_rate.peak)(parameter_groups(self.model))
        self.vocabulary = int(self.base.get_input_embeddings().weight.shape[0])
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"
        threads = torch.get_num_threads()
        self.device_name = f"{name}, {threads} thread{'s' if threads > 1 else ''}" if name == "CPU" else name

    def point(self, inputs: int, outputs: int, deadline: float) -> Measured:
        """Trains on rows of `inputs` + `outputs` tokens, the latter with loss, then writes as many."""
        import torch

        from llmft.training.callbacks import peak_memory_gib

        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        found = Measured(inputs, outputs)
        self._train(found, deadline)
        self._infer(found, deadline)
        found.peak_bytes = round(peak_memory_gib(self.device) * 2**30)
        return found

    def clear(self) -> None:
        """Gives back what a point that did not fit has left."""
        import gc

        import torch

        self.model.zero_grad(set_to_none=True)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    # ------------------------------------------------------------------------------------------------------ training

    def _train(self, found: Measured, deadline: float) -> None:
        """A step, or its first micro-batches where there are many, and the optimizer's part."""
        import torch

        from llmft.data.batch import collate
        from llmft.model.checkpointing import Offloaded, set_checkpointing
        from llmft.training.micro_batching import MicroBatchPlan, plan_micro_batches
        from llmft.training.objectives.language_modeling import LanguageModeling

        config, rows = self.config, self.config.trainer.batch_size
        offloads = config.trainer.offload_activations and self.device.type == "cuda"
        objective = LanguageModeling()
        fits: list[MicroBatchPlan] = []
        tokens: list[int] = []
        left: list[float] = []
        self.model.train()

        def accumulate() -> None:
            # New lengths each time, as in a training: memory is handed out and given back in other pieces.
            examples = _rows(rows, found, self.vocabulary, self.context_tokens, seed=len(tokens))
            if not fits:
                arguments = (self.device, self.dtype)
                fits.append(plan_micro_batches(config, examples, lambda: self.architecture, *arguments))
                set_checkpointing(self.base, fits[0].checkpointing)
            lengths = examples.lengths.tolist()
            groups = fits[0].limit.groups(lengths, range(rows))[:MOST_MICRO_BATCHES]
            for group in groups:
                batch = collate([examples[row] for row in group], group, 0).to(self.device)
                with Offloaded(self.model) if offloads else nullcontext(), self._autocast():
                    losses = objective.losses(self.model, batch)
                    loss = losses.nll.sum() / (rows * found.output_tokens)
                loss.backward()
            tokens.append(sum(lengths))
            left.append(sum(lengths) / sum(lengths[row] for group in groups for row in group))

        def step() -> None:
            gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
            norm = torch.nn.utils.get_total_norm(gradients)
            if config.trainer.gradient_clip is not None:
                parameters = [p for p in self.model.parameters() if p.grad is not None]
                torch.nn.utils.clip_grads_with_norm_(parameters, config.trainer.gradient_clip, norm)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

        times = self._repeat([accumulate, step], deadline)
        # The first of `tokens` and `left` are those of the warm-up.
        each = [
            (first * whole + second) / count
            for (first, second), count, whole in zip(times, tokens[1:], left[1:], strict=True)
        ]
        token_s, found.spread["train"] = _median(each)
        found.train_tokens_per_s = 1 / token_s
        found.step_s = rows * (found.input_tokens + found.output_tokens) * token_s
        found.at_once, found.repeats = str(fits[0]), len(times)

    # ----------------------------------------------------------------------------------------------------- inference

    def _infer(self, found: Measured, deadline: float) -> None:
        import torch

        from llmft.data.encode import Ends
        from llmft.model.generate import generate

        rows = self.case.inference_rows
        generator = torch.Generator().manual_seed(1)
        prompts = torch.randint(3, self.vocabulary, (rows, found.input_tokens), generator=generator).tolist()
        self.model.eval()

        def write(tokens: int) -> None:
            with self._autocast():
                made = generate(self.model, prompts, pad_id=0, ends=Ends([]), max_new_tokens=tokens, batch_size=rows)
            assert all(len(answer) == tokens for answer in made)

        times = self._repeat([lambda: write(1), lambda: write(found.output_tokens)], deadline)
        found.prompt_s, found.spread["prompt"] = _median([first for first, _ in times])
        more = found.output_tokens - 1
        found.token_s, found.spread["generate"] = _median([(whole - first) / more for first, whole in times])
        found.prompt_tokens_per_s = rows * found.input_tokens / found.prompt_s
        found.generated_tokens_per_s = rows / found.token_s
        found.repeats = min(found.repeats, len(times))

    # -------------------------------------------------------------------------------------------------------- clocks

    def _autocast(self) -> Any:
        import torch

        from llmft.config.sections import Precision
        from llmft.model.load import TORCH_DTYPES

        mixed = self.precision is not Precision.fp32
        return torch.autocast(self.device.type, dtype=TORCH_DTYPES[self.precision], enabled=mixed)

    def _repeat(self, parts: list[Callable[[], None]], deadline: float) -> list[list[float]]:
        """Seconds of `parts`, taken in turn, `repeats` times behind one that warms up; fewer when time runs out."""
        for part in parts:
            part()
        found: list[list[float]] = []
        while len(found) < self.case.repeats and (not found or time.monotonic() < deadline):
            found.append([self._seconds(part) for part in parts])
        return found

    def _seconds(self, part: Callable[[], None]) -> float:
        import torch

        def wait() -> None:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)

        wait()
        began = time.perf_counter()
        part()
        wait()
        return max(time.perf_counter() - began, 1e-9)


def _rows(count: int, asked: Measured, vocabulary: int, context_tokens: int | None, seed: int) -> Any:
    """Examples of random tokens, the last of each with loss; what is read varies by a tenth either way."""
    import numpy as np

    from llmft.data.columns import Conversation
    from llmft.data.examples import Examples

    rng = np.random.Generator(np.random.PCG64([seed]))
    inputs, outputs = asked.input_tokens, asked.output_tokens
    lengths = np.rint(inputs * rng.uniform(1 - VARIATION, 1 + VARIATION, count)).astype(int)
    most = lengths.max() if context_tokens is None else context_tokens - outputs
    lengths = np.clip(lengths, 1, most)
    ids = [rng.integers(3, vocabulary, length + outputs).tolist() for length in lengths]
    marks = [np.repeat(np.array([0, 1], np.uint8), [length, outputs]) for length in lengths]
    return Examples.of(ids, marks, range(count), [Conversation([], "bench") for _ in range(count)])


def _median(values: list[float]) -> tuple[float, float]:
    """The median, and half of the range relative to it."""
    import statistics

    middle = statistics.median(values)
    return middle, (max(values) - min(values)) / 2 / middle if middle > 0 else 0.0


if __name__ == "__main__":
    main()
