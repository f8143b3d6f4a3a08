"""Tokens/s of a 7B model's training on one GPU, of llmft and of peers, against what the device's arithmetic allows.

    python -m tests.bench.bench_gpu [--device cuda] [--base bf16,nf4] [--tokens 512,1024,…] [--quick]
    python -m tests.bench.bench_gpu --device cpu --model tiny --quick      # the same on a tiny model, to try it out

The model has Mistral-7B's shape and random weights, which are made on the device tensor by tensor. Micro-batches hold
rows of 200 to 1024 tokens with answers of 4 to 32, as many as fit into so many tokens; a step is one micro-batch. llmft
computes rows without padding, keeps activations where they fit, and logits at answers only; transformers' Trainer and
TRL (where installed) pad and compute layers again, as they do at such sizes. The share of the roof is tokens/s times
4P floating-point operations (6P where layers are computed again), P the weights of linear layers, over what a product
of two large matrices reaches here. A row without the same losses as a plain PEFT forward's is not shown.
"""

from __future__ import annotations

import argparse
import gc
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from llmft.core.imports import load_libraries

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
"""In bf16, whose products round otherwise with every order of additions; see TRL's own measurements (pull 5575)."""
WARM_UP = 3
Row = tuple[list[int], int]
"""Token ids, and how many of them, at the end, are learned."""


def on_device(shape: dict[str, Any], device: torch.device, dtype: torch.dtype) -> Any:
    """A random Mistral whose weights never leave `device`."""
    from transformers import AutoModelForCausalLM, MistralConfig

    config = MistralConfig(**shape)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    draw = torch.Generator(device).manual_seed(0)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            made = torch.empty(parameter.shape, dtype=dtype, device=device)
            # Norms are one-dimensional; random weights, not zeros: those are quicker to multiply.
            made = made.fill_(1.0) if made.ndim == 1 else made.normal_(0.0, 0.02, generator=draw)
            setattr(module, name, torch.nn.Parameter(made, requires_grad=False))
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(config).to(device)  # its buffer is computed, not stored
    return model.eval()


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
    for place, (row, answer) in enumerate(rows):
        ids[place, : len(row)], mask[place, : len(row)] = torch.tensor(row), 1
        labels[place, len(row) - answer : len(row)] = torch.tensor(row[-answer:])
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
        from llmft.config.sections import LoraConfig, QuantizationConfig, QuantizationFormat
        from llmft.model.quantization import keep_packing, quantize_in_place

        self.device = device
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.vocabulary = SHAPES[model]["vocab_size"]
        self.lora = LoraConfig(r=8)
        self.base = on_device(SHAPES[model], device, self.dtype)
        layers = self.base.model.layers
        self.linear_weights = sum(m.weight.numel() for m in layers.modules() if isinstance(m, torch.nn.Linear))
        if form == "nf4":
            quantize_in_place(self.base, QuantizationConfig(QuantizationFormat.nf4), self.dtype, [], device)
            keep_packing(self.base)

    @contextmanager
    def adapted(self, *, plain: bool, recompute: bool) -> Iterator[Any]:
        """A model with an adapter around the base; `plain` as PEFT itself makes it."""
        from llmft.model import kernels
        from llmft.model.adapters import attach
        from llmft.model.kernels import lora as lora_kernel

        self.base.set_attn_implementation("sdpa")
        if not plain:
            kernels.install(self.base)
        model = attach(self.base, self.lora, auto_class="causal_lm", seed=0, name="base")
        if plain:
            lora_kernel.uninstall(model)
        if recompute:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.enable_input_require_grads()
        try:
            yield model.train()
        finally:
            self.base.gradient_checkpointing_disable()
            model.unload()

    def autocast(self) -> Any:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.device.type == "cuda")

    def batch(self, tokens: int, step: int) -> list[Row]:
        return rows_of(tokens, self.vocabulary, 1000 * tokens + step)


Seen = list[tuple[float, float, int, int]]
"""Of each step: its loss, its seconds, its real and its supervised tokens."""


def optimizer_of(model: Any, device: torch.device) -> Any:
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0, fused=device.type == "cuda"), trained


def ours(setting: Setting, tokens: int, steps: int, *, recompute: bool) -> Seen:
    """llmft's objective on its own forward."""
    from llmft.data.batch import MicroBatch
    from llmft.training.objectives.language_modeling import LanguageModeling

    seen: Seen = []
    objective = LanguageModeling()
    with setting.adapted(plain=False, recompute=recompute) as model:
        optimizer, trained = optimizer_of(model, setting.device)
        for step in range(steps):
            rows = setting.batch(tokens, step)
            b = padded(rows, setting.device)
            ones = torch.ones(len(rows), device=setting.device)
            micro = MicroBatch(b["input_ids"], b["attention_mask"], b["labels"], ones, None, [])
            synchronise(setting.device)
            began = time.perf_counter()
            with setting.autocast():
                found = objective.losses(model, micro)
                loss = found.nll.sum() / found.counts.sum()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            value = float(loss.detach())
            synchronise(setting.device)
            seconds = time.perf_counter() - began
            seen.append((value, seconds, sum(len(ids) for ids, _ in rows), sum(answer for _, answer in rows)))
    return seen


def plain(setting: Setting, tokens: int, steps: int) -> Seen:
    """PEFT's own forward on padded rows, logits everywhere: what losses are compared with."""
    seen: Seen = []
    with setting.adapted(plain=True, recompute=True) as model:
        optimizer, trained = optimizer_of(model, setting.device)
        for step in range(steps):
            rows = setting.batch(tokens, step)
            synchronise(setting.device)
            began = time.perf_counter()
            with setting.autocast():
                loss = model(**padded(rows, setting.device), use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            value = float(loss.detach())
            synchronise(setting.device)
            seconds = time.perf_counter() - began
            seen.append((value, seconds, sum(len(ids) for ids, _ in rows), sum(answer for _, answer in rows)))
    return seen


def trainer(setting: Setting, tokens: int, steps: int, *, trl: bool) -> Seen:
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
            found = super().compute_loss(*arguments, **named)
            losses.append((found[0] if isinstance(found, tuple) else found).detach())
            return found

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
            bf16=setting.device.type == "cuda",
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
        given: dict[str, Any] = {"data_collator": lambda items: padded(items[0]["rows"]), "callbacks": [Timed()]}
        data: Any = [{"rows": batch} for batch in batches]
        if trl:
            import datasets

            flat = [{"rows": [{"ids": ids, "answer": n} for ids, n in batch]} for batch in batches]
            data = datasets.Dataset.from_list(flat)
            given["processing_class"] = dummy_tokenizer()
            given["data_collator"] = lambda items: padded([(row["ids"], row["answer"]) for row in items[0]["rows"]])
        InOrder(model=model, args=settings, train_dataset=data, **given).train()
    counts = [(sum(len(ids) for ids, _ in batch), sum(answer for _, answer in batch)) for batch in batches]
    return [(float(loss), s, *count) for loss, s, count in zip(losses, times, counts, strict=True)]


def dummy_tokenizer() -> Any:
    """TRL wants one, also for rows that are token ids."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<s>": 1, "</s>": 2}
    backend = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", bos_token="<s>")


def memory(device: torch.device) -> float:
    """Peak GiB of the device's allocator since the last reset; 0 on a CPU."""
    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else 0.0


def measure(setting: Setting, action: Callable[[], Seen]) -> tuple[Seen, float] | str:
    """What `action` saw and its peak memory in GiB, or why there is nothing."""
    gc.collect()
    if setting.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        return action(), memory(setting.device)
    except torch.OutOfMemoryError:
        return "does not fit"
    except ImportError as error:
        return f"not installed ({error.name})"


def line(name: str, seen: Seen, peak: float, reference: Seen, flops: float, roof: float) -> str:
    """One row of the table, or why it is not one."""
    timed = seen[WARM_UP:]
    real = statistics.median(count / s for _, s, count, _ in timed)
    supervised = statistics.median(count / s for _, s, _, count in timed)
    differences = [abs(a[0] - b[0]) for a, b in zip(seen, reference, strict=True)]
    middle, most = statistics.median(differences), max(differences)
    if middle > PARITY_MEDIAN or most > PARITY_MOST:
        return f"  {name:34} not shown: losses differ by {middle:.1e} (median), {most:.1e} (most)"
    share = f"{real * flops / roof:7.1%}   {middle:.0e} median, {most:.0e} most"
    return f"  {name:34} {real:10,.0f} {supervised:12,.0f} {peak:8.1f} {share}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--model", choices=sorted(SHAPES), default="mistral-7b")
    parser.add_argument("--base", default="bf16,nf4")
    parser.add_argument("--tokens", default="512,1024,2048,4096,8192,16384", help="of a micro-batch")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--quick", action="store_true", help="two sizes, 3 steps")
    asked = parser.parse_args()
    load_libraries()
    device = torch.device(asked.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    steps = WARM_UP + (3 if asked.quick else asked.steps)
    sizes = [int(size) for size in asked.tokens.split(",")][: 2 if asked.quick else None]
    roof = product_rate(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    print(f"{name}, torch {torch.__version__}, products of matrices at {roof / 1e12:.1f} TFLOP/s; {asked.model}")
    for form in asked.base.split(","):
        setting = Setting(asked.model, form, device)
        for tokens in sizes:
            compare(setting, form, tokens, steps, roof)
        del setting


def compare(setting: Setting, form: str, tokens: int, steps: int, roof: float) -> None:
    """The table of one base and one size of micro-batch."""
    print(f"base in {form}, {tokens:,} tokens per micro-batch")
    print(f"  {'':34} {'real tok/s':>10} {'supervised/s':>12} {'peak GiB':>8} {'of roof':>7}   |loss - plain PEFT's|")
    keep, again = 4.0 * setting.linear_weights, 6.0 * setting.linear_weights
    reference = measure(setting, lambda: plain(setting, tokens, steps))
    if isinstance(reference, str):
        print(f"  plain PEFT, padded, recomputed     {reference}: no losses to compare with")
        return
    actions: dict[str, tuple[Callable[[], Seen], float]] = {
        "HF Trainer, padded, recomputed": (lambda: trainer(setting, tokens, steps, trl=False), again),
        "TRL SFTTrainer, padded, recomputed": (lambda: trainer(setting, tokens, steps, trl=True), again),
        "llmft": (lambda: ours(setting, tokens, steps, recompute=False), keep),
        "llmft, recomputed": (lambda: ours(setting, tokens, steps, recompute=True), again),
    }
    print(line("plain PEFT, padded, recomputed", *reference, reference[0], again, roof))
    for name, (action, flops) in actions.items():
        tell(name, measure(setting, action), reference, flops, roof)


def tell(
    name: str, found: tuple[Seen, float] | str, reference: tuple[Seen, float] | str, flops: float, roof: float
) -> None:
    """Prints a row, or why there is none."""
    if isinstance(found, str) or isinstance(reference, str):
        print(f"  {name:34} {found if isinstance(found, str) else reference}")
    else:
        print(line(name, *found, reference[0], flops, roof))


if __name__ == "__main__":
    main()
