"""Tokens/s of a 7B model's training on one GPU, of llmft and of peers, against what the device's arithmetic allows.

    python -m tests.bench.bench_gpu [--base nf4,bf16] [--tokens 8192] [--deadline 540] [--json FILE]
    python -m tests.bench.bench_gpu --device cpu --model tiny          # the same on a tiny model, to try it out

The model has Mistral-7B's shape and random weights, made and quantised on the device. A step is one micro-batch of rows
of 200 to 1024 tokens with answers of 4 to 32, and the adapter's B is not zero, so that losses show whether it is
computed. llmft trains as a run does: its kernels, deterministic operations alone, no layer computed again unless
stated. transformers' Trainer and TRL (where installed) pad and compute layers again, as they do at such sizes.

The share of the roof is tokens/s times 4P floating-point operations (6P where layers are computed again), P the weights
of linear layers, over what a product of two large matrices reaches here. A row without the losses of a plain PEFT
forward is not shown. Every line is printed at once; llmft's first row comes before the peers' in case the
deadline, in seconds from the start, is reached.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import platform
import random
import statistics
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from llmft.core.imports import load_libraries
from llmft.core.machine import set_cuda_variables, versions

SHAPES: dict[str, dict[str, Any]] = {
    "mistral-7b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
        "max_position_embeddings": 32768,
        "sliding_window": None,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 1000,
        "sliding_window": None,
    },
}
PARITY_MEDIAN, PARITY_MOST = 5e-3, 1e-1
"""In bf16, whose products round differently in each order of additions; see TRL's own measurements (pull 5575)."""
WARM_UP = 3
BEGAN = time.monotonic()
Row = tuple[list[int], int]
"""Token ids, and the number of learned ones at their end."""


class Step(NamedTuple):
    """One step's loss, seconds and tokens."""

    loss: float
    seconds: float
    tokens: int
    labelled: int


def rows_of(tokens: int, vocabulary: int, seed: int) -> list[Row]:
    """Rows of lognormal length that fill at most `tokens`; at least one."""
    draw = random.Random(seed)
    rows: list[Row] = []
    left = tokens
    while left > 0:
        answer = draw.randint(4, 32)
        length = min(1024, max(200, round(600 * draw.lognormvariate(0, 0.45)))) + answer
        if rows and length > left:
            break
        length = min(length, left)
        rows.append(([draw.randrange(3, vocabulary) for _ in range(length)], answer))
        left -= length
    return sorted(rows, key=lambda row: -len(row[0]))


def padded(rows: list[Row], device: torch.device | str = "cpu") -> dict[str, torch.Tensor]:
    """input_ids, attention_mask and labels, padded on the right."""
    width = max(len(ids) for ids, _ in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for index, (row, answer) in enumerate(rows):
        ids[index, : len(row)], mask[index, : len(row)] = torch.tensor(row), 1
        labels[index, len(row) - answer : len(row)] = torch.tensor(row[-answer:])
    return {name: t.to(device) for name, t in (("input_ids", ids), ("attention_mask", mask), ("labels", labels))}


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a product of two square matrices."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(6):
        synchronise(device)
        began = time.perf_counter()
        for _ in range(8):
            a @ b
        synchronise(device)
        best = min(best, (time.perf_counter() - began) / 8)
    return 2 * size**3 / best


class Setting:
    """A base, and what all systems share.

    Attributes:
        linear_weights: those that a token is multiplied with in the layers.
    """

    def __init__(self, model: str, form: str, device: torch.device) -> None:
        from llmft.config.model import Kernels, LoraConfig, ModelConfig, ModelInit, Precision
        from llmft.config.model import QuantizationConfig as Quantization
        from llmft.config.model import QuantizationFormat as Format
        from llmft.data.hub import Located
        from llmft.model.device import TORCH_DTYPES, pick_precision
        from llmft.model.load import load_base
        from llmft.model.quantization import weight_counts

        self.device = device
        self.dtype = TORCH_DTYPES[pick_precision(Precision.auto, device)] if device.type == "cuda" else torch.float32
        self.vocabulary = SHAPES[model]["vocab_size"]
        self.lora = LoraConfig(r=8)
        self.base = load_base(
            ModelConfig(
                name=model,
                id=model,
                init=ModelInit.random,
                architecture="mistral",
                config=SHAPES[model],
                kernels=Kernels.none,
            ),
            Located(None, "random"),
            Quantization(Format.nf4 if form == "nf4" else Format.none),
            auto_class="causal_lm",
            num_labels=0,
            dtype=self.dtype,
            device=device,
            seed=0,
            keep_base=False,
        )
        counts = weight_counts(self.base)
        ends = sum(m.weight.numel() for m in (self.base.get_input_embeddings(), self.base.get_output_embeddings()))
        self.linear_weights = counts["4-bit"] + counts["full"] - ends

    @contextmanager
    def adapted(self, *, plain: bool, recompute: bool) -> Iterator[Any]:
        """A model with an adapter around the base; `plain` as PEFT itself makes it."""
        from llmft.config.model import Kernels
        from llmft.model import kernels
        from llmft.model.adapters import attach

        self.base.set_attn_implementation("sdpa")
        if not plain:
            kernels.install(self.base)
        how = Kernels.none if plain else Kernels.auto
        model = attach(self.base, self.lora, auto_class="causal_lm", seed=0, name="base", kernels=how)
        draw = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.01)
        if recompute:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.enable_input_require_grads()
        try:
            yield model.train()
        finally:
            self.base.gradient_checkpointing_disable()
            model.unload()
            for module in self.base.modules():
                vars(module).pop("forward", None)

    def autocast(self) -> Any:
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)

    def batch(self, tokens: int, step: int) -> list[Row]:
        return rows_of(tokens, self.vocabulary, 1000 * tokens + step)


def timed_steps(
    setting: Setting, model: Any, tokens: int, steps: int, loss_of: Callable[[Any, Any], Any]
) -> list[Step]:
    """Steps of forward, backward, clipping and AdamW; `loss_of` gives the loss of a model on a padded batch."""
    from llmft.training.finetuner import parameter_groups

    optimizer = torch.optim.AdamW(parameter_groups(model), lr=1e-4, weight_decay=0.0)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    scaler = torch.amp.GradScaler(setting.device.type, enabled=setting.dtype is torch.float16)
    seen: list[Step] = []
    for step in range(steps):
        rows = setting.batch(tokens, step)
        synchronise(setting.device)
        began = time.perf_counter()
        with setting.autocast():
            loss = loss_of(model, padded(rows, setting.device))
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        value = float(loss.detach())
        synchronise(setting.device)
        seconds = time.perf_counter() - began
        seen.append(Step(value, seconds, sum(len(ids) for ids, _ in rows), sum(answer for _, answer in rows)))
    return seen


def ours(setting: Setting, tokens: int, steps: int, *, recompute: bool = False, strict: bool = True) -> list[Step]:
    """Steps of llmft's objective and forward; `strict` is trainer.deterministic."""
    from llmft.data.batch import MicroBatch
    from llmft.training.finetuner import deterministic_only
    from llmft.training.objectives.language_modeling import LanguageModeling

    objective = LanguageModeling()

    def loss_of(model: Any, batch: dict[str, torch.Tensor]) -> Any:
        ones = torch.ones(len(batch["labels"]), device=setting.device)
        loss = objective.losses(model, MicroBatch(**batch, weights=ones, targets=None, rows=[]))
        return loss.nll.sum() / loss.counts.sum()

    with setting.adapted(plain=False, recompute=recompute) as model, deterministic_only(strict):
        timed = timed_steps(setting, model, tokens, steps, loss_of)
    torch.use_deterministic_algorithms(False)
    return timed


def plain(setting: Setting, tokens: int, steps: int) -> list[Step]:
    """Steps of PEFT's forward on padded rows with logits everywhere: the reference for losses."""
    with setting.adapted(plain=True, recompute=True) as model:
        return timed_steps(setting, model, tokens, steps, lambda m, batch: m(**batch, use_cache=False).loss)


def trainer(setting: Setting, tokens: int, steps: int, *, trl: bool = False) -> list[Step]:
    """transformers' Trainer, or TRL's SFTTrainer: a dataset item is a whole micro-batch."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    batches = [setting.batch(tokens, step) for step in range(steps)]
    losses: list[torch.Tensor] = []
    times: list[float] = []

    class Timed(TrainerCallback):
        def on_step_begin(self, *arguments: Any, **named: Any) -> None:
            synchronise(setting.device)
            times.append(time.perf_counter())

        def on_step_end(self, *arguments: Any, **named: Any) -> None:
            synchronise(setting.device)
            times[-1] = time.perf_counter() - times[-1]

    kind, arguments, more = Trainer, TrainingArguments, {}
    if trl:
        from trl import SFTConfig, SFTTrainer

        kind, arguments = SFTTrainer, SFTConfig
        more = {"dataset_kwargs": {"skip_prepare_dataset": True}, "max_length": None}

    class InOrder(kind):  # type: ignore[misc, valid-type]
        def _get_train_sampler(self, *arguments: Any, **named: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

        def compute_loss(self, *arguments: Any, **named: Any) -> Any:
            output = super().compute_loss(*arguments, **named)
            losses.append((output[0] if isinstance(output, tuple) else output).detach())
            return output

    with setting.adapted(plain=True, recompute=False) as model, tempfile.TemporaryDirectory() as folder:
        settings = arguments(
            output_dir=folder,
            per_device_train_batch_size=1,
            max_steps=steps,
            learning_rate=1e-4,
            lr_scheduler_type="constant",
            max_grad_norm=1.0,
            weight_decay=0.0,
            optim="adamw_torch_fused" if setting.device.type == "cuda" else "adamw_torch",
            bf16=setting.dtype is torch.bfloat16,
            fp16=setting.dtype is torch.float16,
            use_cpu=setting.device.type == "cpu",
            gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": False},
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            **more,
        )
        options: dict[str, Any] = {"data_collator": lambda items: padded(items[0]["rows"]), "callbacks": [Timed()]}
        data: Any = [{"rows": batch} for batch in batches]
        if trl:
            import datasets

            flat = [{"rows": [{"ids": ids, "answer": n} for ids, n in batch]} for batch in batches]
            data = datasets.Dataset.from_list(flat)
            options["processing_class"] = dummy_tokenizer()
            options["data_collator"] = lambda items: padded([(row["ids"], row["answer"]) for row in items[0]["rows"]])
        InOrder(model=model, args=settings, train_dataset=data, **options).train()
    counts = [(sum(len(ids) for ids, _ in batch), sum(answer for _, answer in batch)) for batch in batches]
    return [Step(float(loss), s, *count) for loss, s, count in zip(losses, times, counts, strict=True)]


def dummy_tokenizer() -> Any:
    """A tokenizer for TRL, which requires one even for rows of token ids."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<s>": 1, "</s>": 2}
    backend = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", bos_token="<s>")


class Report:
    """Prints every row at once, and keeps it as a line of JSON."""

    def __init__(self, path: Path | None, deadline: float) -> None:
        self.path = path
        self.deadline = deadline

    def say(self, text: str, **record: Any) -> None:
        """One line."""
        print(f"[{time.monotonic() - BEGAN:5.0f} s] {text}", flush=True)
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps({"at_s": round(time.monotonic() - BEGAN, 1), **record}) + "\n")

    def end_in_time(self) -> None:
        """Ends the process at the deadline, wherever it is; all rows so far have been written."""

        def end() -> None:
            self.say("the deadline: what is missing was not measured", event="deadline")
            os._exit(0)

        timer = threading.Timer(max(1.0, self.deadline - (time.monotonic() - BEGAN)), end)
        timer.daemon = True
        timer.start()


def measure(device: torch.device, action: Callable[[], list[Step]]) -> tuple[list[Step], float] | str:
    """The result of `action` and its peak memory in GiB, or why it failed."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        return action(), torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else 0.0
    except torch.OutOfMemoryError:
        return "does not fit"
    except ImportError as error:
        return f"not installed ({error.name})"


def row(
    report: Report, name: str, seen: tuple[list[Step], float] | str, reference: list[Step], of_roof: float, **facts: Any
) -> None:
    """Reports one system's row, or why there is none; `of_roof` is the share of the roof per token/s."""
    if isinstance(seen, str):
        report.say(f"  {name:36} {seen}", system=name, missing=seen, **facts)
        return
    steps, peak = seen
    timed = steps[WARM_UP:]
    real = statistics.median(step.tokens / step.seconds for step in timed)
    supervised = statistics.median(step.labelled / step.seconds for step in timed)
    off = [abs(step.loss - other.loss) for step, other in zip(steps, reference, strict=False)]
    middle, most = statistics.median(off), max(off)
    record = {
        "system": name,
        "loss_off_median": middle,
        "loss_off_most": most,
        "losses": [s.loss for s in steps],
        **facts,
    }
    if middle > PARITY_MEDIAN or most > PARITY_MOST:
        report.say(f"  {name:36} not shown: losses differ by {middle:.1e} (median), {most:.1e} (most)", **record)
        return
    share = real * of_roof
    record |= {"tokens_per_s": real, "supervised_per_s": supervised, "peak_gib": peak, "share_of_roof": share}
    line = f"  {name:36} {real:10,.0f} {supervised:12,.0f} {peak:8.1f} {share:7.1%}   {middle:.0e}, {most:.0e}"
    report.say(line, **record)


def compare(report: Report, setting: Setting, form: str, tokens: int, steps: int, roof: float) -> None:
    """The table of one base and one size of micro-batch."""
    facts = {"base": form, "micro_batch_tokens": tokens}
    report.say(f"base in {form}, {tokens:,} tokens per micro-batch", event="table", **facts)
    report.say(
        f"  {'':36} {'real tok/s':>10} {'supervised/s':>12} {'peak GiB':>8} {'of roof':>7}   loss off", event="head"
    )
    keep, again = 4.0 * setting.linear_weights / roof, 6.0 * setting.linear_weights / roof
    reference = measure(setting.device, lambda: plain(setting, tokens, WARM_UP + 1))
    if isinstance(reference, str):
        row(report, "plain PEFT, padded, recomputed", reference, [], again, **facts)
        return
    expected = reference[0]
    systems: dict[str, tuple[Callable[[], list[Step]], float]] = {
        "llmft": (lambda: ours(setting, tokens, steps), keep),
        "llmft again": (lambda: ours(setting, tokens, WARM_UP + 1), keep),
        "HF Trainer, padded, recomputed": (lambda: trainer(setting, tokens, steps), again),
        "llmft, recomputed": (lambda: ours(setting, tokens, steps, recompute=True), again),
        "llmft, trainer.deterministic=false": (lambda: ours(setting, tokens, steps, strict=False), keep),
        "TRL SFTTrainer, padded, recomputed": (lambda: trainer(setting, tokens, steps, trl=True), again),
    }
    row(report, "plain PEFT, padded, recomputed", reference, expected, again, **facts)
    losses: list[float] = []
    for name, (action, of_roof) in systems.items():
        seen = measure(setting.device, action)
        if name == "llmft again" and not isinstance(seen, str) and losses:
            same = all(step.loss == loss for step, loss in zip(seen[0], losses, strict=False))
            report.say(f"  {name:36} the same losses to the bit: {same}", system=name, same_bits=same, **facts)
            continue
        if name == "llmft" and not isinstance(seen, str):
            losses = [step.loss for step in seen[0]]
        row(report, name, seen, expected, of_roof, **facts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--model", choices=sorted(SHAPES), default="mistral-7b")
    parser.add_argument("--base", default="nf4,bf16")
    parser.add_argument("--tokens", default="8192", help="of a micro-batch; several with commas")
    parser.add_argument("--steps", type=int, default=6, help="that are timed")
    parser.add_argument("--deadline", type=float, default=540.0, help="seconds until the process ends, as far as it is")
    parser.add_argument("--json", type=Path, help="a line for every row")
    options = parser.parse_args()
    report = Report(options.json, options.deadline)
    report.end_in_time()
    set_cuda_variables()
    load_libraries()
    warnings.simplefilter("ignore")  # raised by peers although they are called as documented
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    device = torch.device(options.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    for form in options.base.split(","):
        setting = Setting(options.model, form, device)
        roof = product_rate(device, setting.dtype)
        title = f"{name}, torch {torch.__version__}, matrix products at {roof / 1e12:.1f} TFLOP/s; {options.model}"
        facts = {"device": name, "roof_flops": roof, "model": options.model, "dtype": str(setting.dtype)}
        report.say(title, **facts, versions=versions())
        for tokens in map(int, options.tokens.split(",")):
            compare(report, setting, form, tokens, WARM_UP + options.steps, roof)
        del setting


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
