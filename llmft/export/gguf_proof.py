"""Exports a run to a GGUF file and compares llama.cpp's tokens, texts and probabilities with the run's."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llmft.config.commands import MergeBase, MergeConfig, MergeFormat
from llmft.config.convert import canonical
from llmft.config.model import QuantizationFormat
from llmft.core.console import Screen
from llmft.core.errors import ConfigError
from llmft.core.files import format_bytes, scratch_directory
from llmft.evaluation.jobs import PredictionJob
from llmft.export import gguf, merge
from llmft.export.llamacpp import LlamaCpp, is_installed
from llmft.export.targets import QUANTIZED, NotProved
from llmft.model.families import base_of
from llmft.model.load import drop_base

BOUNDS = {"f32": 1e-2, "f16": 1e-2, "bf16": 1e-1, "q8_0": 1e-1}
"""Bounds on the mean difference of greedy tokens' log-probabilities; for smaller types it is only printed.

llama.cpp rounds a layer's input to the weights' format: SmolLM2-135M in f16 has 1.2e-2 at most.
"""


@dataclass(frozen=True)
class GgufProof:
    """llama.cpp's agreement with the run on the same questions."""

    tokens_same: int
    texts_same: int
    texts: int
    mean_difference: float
    largest_difference: float

    def __str__(self) -> str:
        return (
            f"tokens of {self.tokens_same} of {self.texts} prompts the same, {self.texts_same} of {self.texts} greedy "
            f"texts the same, log-probabilities differ by {self.mean_difference:.1e} on average, at most "
            f"{self.largest_difference:.1e}"
        )


def export(job: PredictionJob, config: MergeConfig, screen: Screen, target: Path) -> None:
    """Writes a run as a GGUF file to `target` and compares it with the run.

    Raises NotProved if llama.cpp's tokens differ, or its probabilities differ by more than the type allows.
    """
    if str(job.config.task.auto_class) != "causal_lm":
        raise ConfigError(f"{job.run.directory}: GGUF files contain language models, and this run has a head.")
    if config.format is MergeFormat.gguf_adapter:
        _export_adapter(job, config, screen, target)
        return
    source = canonical([job.run.digests(), config.base.value, config.type])
    if not config.force and gguf.source_of(target) == source:
        screen.print(f"This is done: [bold]{target}[/bold] (force=true makes it again)")
        return
    with scratch_directory(target) as scratch:
        directory, file = scratch / "model", scratch / target.name
        directory.mkdir()
        prepared = merge.write(job, config, screen, directory)
        drop_base()
        if not is_installed():
            screen.warn('not tested in llama.cpp: pip install "llmft[gguf]"; compared by transformers only.')
            merge.prove(prepared, config, screen, directory)
        in_bf16 = prepared.record["dtype"] == "bfloat16"
        kind = config.type
        if kind in QUANTIZED:  # made from a file in 16 bits
            kind = "bf16" if in_bf16 else "f16"
        elif kind == "f16" and in_bf16:
            screen.warn("type=f16: this model needs the range of bf16; type=bf16 is safer.")
        if config.converter is not None:
            gguf.convert_by(config.converter, directory, file, kind)
        else:
            gguf.convert(directory, file, kind, source)
        if config.type in QUANTIZED and gguf.quantize(file, scratch / "quantized", config.type):
            os.replace(scratch / "quantized", file)
            kind = config.type
        elif config.type in QUANTIZED:
            unquantized = target.with_name(target.name.replace(config.type, kind))
            screen.warn(
                f"type={config.type}: llama-quantize is not on the path; this command writes it: "
                f"llama-quantize {unquantized} {target} {config.type.upper()}"
            )
            target = unquantized
        if is_installed():
            _prove(prepared, file, kind, config, screen)
        os.replace(file, target)
    screen.print(f"[bold]gguf[/bold]  {target} ({format_bytes(target.stat().st_size)})")


def _prove(prepared: merge.Prepared, file: Path, kind: str, config: MergeConfig, screen: Screen) -> None:
    proof = _compare(prepared, file)
    prepared.predictor.model = None
    screen.print(f"  {kind}; in llama.cpp, on {prepared.questions.source}: {proof}")
    bound = config.bound or BOUNDS.get(kind, float("inf"))
    if config.base is MergeBase.original and config.bound is None:
        screen.warn(merge.COST)
    elif proof.tokens_same < proof.texts or proof.mean_difference > bound:
        raise NotProved(
            f"{prepared.predictor.job.run.directory}: the model in llama.cpp differs from the run: {proof}; the bound "
            f"is {bound:.0e}; nothing was written."
        )


def _compare(prepared: merge.Prepared, file: Path) -> GgufProof:
    """Asks llama.cpp the same questions as the run."""
    predictor, questions, answers = prepared.predictor, prepared.questions, prepared.answers
    count = max((len(text) for text in answers.texts), default=0) + 1
    longest = max((len(ids) for ids in questions.prompts), default=1)
    engine = LlamaCpp(file, max(256, longest + count + 8))
    tokens = texts = 0
    differences: list[float] = []
    for ids, expected, expected_logprobs in zip(questions.prompts, answers.texts, answers.probabilities, strict=True):
        text = predictor.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        tokens += engine.tokens(text) == predictor.tokenizer(text, add_special_tokens=False).input_ids
        generated = engine.generate(ids, count)
        texts += [token for token, _ in generated[: len(expected)]] == expected
        for (token, logprob), expected_token, value in zip(generated, expected, expected_logprobs, strict=False):
            if logprob is not None:  # of llama.cpp's best token, also if it is another one
                differences.append(abs(logprob - value))
            if token != expected_token:
                break
    mean = sum(differences) / max(1, len(differences))
    return GgufProof(tokens, texts, len(questions.prompts), mean, max(differences, default=0.0))


# ---------------------------------------------------------------------------------------------------------- adapter


def _export_adapter(job: PredictionJob, config: MergeConfig, screen: Screen, target: Path) -> None:
    """Writes only the LoRA, for a GGUF file of its original base; raises ConfigError if something would be lost."""
    lora, run = job.config.lora, job.run.directory
    reasons = [
        ("it trained all weights", not lora.enabled),
        ("it has DoRA's magnitudes", lora.dora),
        (f"it trained {', '.join(lora.modules_to_save)} in full", bool(lora.modules_to_save)),
    ]
    if reason := next((reason for reason, applies in reasons if applies), None):
        raise ConfigError(f"format=gguf_adapter: {run}: {reason}, which a GGUF adapter cannot have; use format=gguf.")
    with scratch_directory(target) as scratch:
        predictor = merge.predictor_of(job, config)
        try:
            factors, alpha = _factors(predictor.model, job)
            base_of(predictor.model).config.save_pretrained(scratch)
        finally:
            predictor.close()
            drop_base()
        gguf.convert_adapter(factors, alpha, scratch, scratch / target.name, config.type)
        os.replace(scratch / target.name, target)
    screen.print(f"[bold]gguf adapter[/bold]  {target} ({format_bytes(target.stat().st_size)})")
    if job.config.quantization.format is not QuantizationFormat.none:
        screen.warn(
            "it was trained on a quantised base and will be used on another: the merged file, format=gguf, is exact."
        )


def _factors(model: Any, job: PredictionJob) -> tuple[dict[str, tuple[torch.Tensor, torch.Tensor]], float]:
    """name of a weight -> LoRA's (A, B), and the alpha with which llama.cpp scales like PEFT."""
    from peft.tuners.lora.layer import LoraLayer

    factors, scaling = {}, 1.0
    for name, layer in base_of(model).named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        if name in ("lm_head", "model.embed_tokens", "transformer.wte"):
            raise ConfigError(f"format=gguf_adapter: a LoRA on {name} is not read by llama.cpp; use format=gguf.")
        (adapter,) = layer.active_adapters
        scaling = layer.scaling[adapter]
        factors[f"{name}.weight"] = (
            *(getattr(layer, half)[adapter].weight.detach().cpu() for half in ("lora_A", "lora_B")),
        )
    return factors, scaling * job.config.lora.r
