"""Exports runs as standalone transformers directories, each compared with its run before it is kept."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from llmft import __version__
from llmft.config.commands import MergeBase, MergeConfig, PredictConfig, Stored
from llmft.config.model import Precision, QuantizationConfig, QuantizationFormat
from llmft.core.console import Screen
from llmft.core.errors import ConfigError
from llmft.core.files import format_bytes, staged_directory
from llmft.core.machine import available_memory
from llmft.evaluation.jobs import PredictionJob
from llmft.evaluation.predictor import Predictor
from llmft.export import card, proof, template, weights
from llmft.export.targets import DTYPE_NAMES, RECORD, NotProved
from llmft.model.device import pick_device, pick_precision
from llmft.model.families import base_of
from llmft.model.load import drop_base
from llmft.model.meta import auto_model

FP16_HEADROOM = 65504 / 2
"""Above this activation, other texts could overflow in fp16."""
COST = "base=original: the adapter was trained on the quantised base; the numbers above are its cost."


@dataclass
class Prepared:
    """A run whose merged weights are written but not compared yet; its model is released."""

    predictor: Predictor
    questions: proof.Questions
    answers: proof.ModelAnswers
    record: dict[str, Any]


def merged(job: PredictionJob, config: MergeConfig, screen: Screen, target: Path) -> None:
    """Writes a transformers directory and compares it with the run before it is moved to `target`.

    Raises NotProved if the difference exceeds the bound.
    """
    with staged_directory(target) as staged:
        prepared = write(job, config, screen, staged)
        drop_base()
        prove(prepared, config, screen, staged)


def write(job: PredictionJob, config: MergeConfig, screen: Screen, directory: Path) -> Prepared:
    """Writes a run's merged model into `directory`, and computes the run's answers for the comparison."""
    run = job.run.directory
    screen.print(f"[bold]{run.name}[/bold]")
    source = predictor = predictor_of(job, config)
    try:
        weights.check_mergeable(predictor.model, str(run))
        questions = proof.Questions.of(predictor)
        answers = proof.answers_of_run(predictor, questions)
        if config.base is MergeBase.original:
            source = _on_original(predictor, job, config)
        plan = weights.plan_export(source.model, str(job.config.task.auto_class))
        _describe(plan.config, predictor, job)
        stored = _write_weights(source.model, plan, directory, config, answers, screen)
        notes = _write_rest(predictor, source, directory)
        for note in notes:
            screen.warn(note)
    finally:
        source.close()
    record = {
        "run": run.name,
        "key": job.run.key,
        "weights": job.run.digests(),
        "base": config.base.value if job.config.lora.enabled else None,
        "base_model": job.config.model.label,
        "quantization": job.config.quantization.format.value,
        "dtype": str(stored).removeprefix("torch."),
        "notes": notes,
        "stop": [text for text in [predictor.encoder.ends.text, *job.config.prompt.stop] if text],
        "llmft": __version__,
    }
    return Prepared(predictor, questions, answers, record)


def predictor_of(job: PredictionJob, config: MergeConfig) -> Predictor:
    """A predictor of the run in fp32, so that bf16 rounding does not count as a difference."""
    trainer = job.config.trainer
    if pick_precision(trainer.precision, pick_device(config.accelerator)) is not Precision.fp32:
        quantization = replace(job.config.quantization, cache=False)  # the cache is for the training precision
        trainer = replace(trainer, precision=Precision.fp32)
        job = replace(job, config=replace(job.config, trainer=trainer, quantization=quantization))
    run = str(job.run.directory)
    return Predictor(job, PredictConfig(run=run, accelerator=config.accelerator, threads=config.threads, prompts=["-"]))


def _on_original(predictor: Predictor, job: PredictionJob, config: MergeConfig) -> Predictor:
    """A predictor with the run's adapter on the unquantised base."""
    if not job.config.lora.enabled:
        raise ConfigError("base=original: this run trained all weights and has no base; leave it out.")
    predictor.close()
    drop_base()
    unquantized_config = replace(job.config, quantization=QuantizationConfig(QuantizationFormat.none))
    return predictor_of(replace(job, config=unquantized_config), config)


def _write_weights(
    model: Any,
    plan: weights.ExportPlan,
    directory: Path,
    config: MergeConfig,
    answers: proof.ModelAnswers,
    screen: Screen,
) -> torch.dtype:
    """Writes in fp16 if weights and activations are in its range, else in bf16; returns the dtype."""
    dtypes = [torch.float16, torch.bfloat16]
    if config.dtype is not Stored.auto:
        dtypes = [getattr(torch, DTYPE_NAMES[config.dtype])]
    elif answers.largest > FP16_HEADROOM:
        screen.print(f"bf16: activations reach {answers.largest:,.0f}, near the end of fp16's range")
        dtypes = [torch.bfloat16]
    for dtype in dtypes:
        try:
            weights.write(model, plan, directory, dtype)
            return dtype
        except weights.Overflow as error:
            for path in directory.glob("*.safetensors"):
                path.unlink()
            screen.print(f"{error} is beyond the range of {str(dtype).removeprefix('torch.')}")
    raise ConfigError(f"dtype={config.dtype.value}: a weight is beyond its range; set dtype=bf16.")


def _describe(config: Any, predictor: Predictor, job: PredictionJob) -> None:
    """Sets classes, end and padding tokens in the transformers config."""
    heads = str(job.config.task.auto_class) == "sequence_classification"
    if heads and job.labels:
        config.id2label = dict(enumerate(job.labels))
        config.label2id = {label: number for number, label in config.id2label.items()}
        kinds = {"single_label": "single_label_classification", "multi_label": "multi_label_classification"}
        config.problem_type = kinds.get(job.problem, "regression")
    ids = predictor.encoder.ends.ids
    config.eos_token_id = (ids if len(ids) > 1 else ids[0]) if ids else None
    # transformers reads a decoder's scores before the padding, so it must not be a token that ends rows.
    if heads and predictor.tokenizer.pad_token_id in ids:
        predictor.tokenizer.pad_token = predictor.tokenizer.bos_token or predictor.tokenizer.unk_token
    config.pad_token_id = predictor.tokenizer.pad_token_id


def _write_rest(predictor: Predictor, source: Predictor, directory: Path) -> list[str]:
    """Writes tokenizer, template and generation config; returns notes for the user."""
    tokenizer = copy.deepcopy(predictor.tokenizer)
    ends, prompt = predictor.encoder.ends, predictor.encoder.prompt
    tokenizer.chat_template, notes = template.exported_template(prompt.config, predictor.tokenizer)
    if predictor.config.task.writes:
        template.check_template(tokenizer, prompt, predictor.job.run.directory)
    tokenizer.save_pretrained(directory)
    original = predictor.located.directory
    trained = predictor.config.model.train_tokenizer_vocab
    if original is not None and not trained and (original / "tokenizer.model").is_file():
        shutil.copyfile(original / "tokenizer.model", directory / "tokenizer.model")
    if str(predictor.config.task.auto_class) == "causal_lm":
        generation = copy.deepcopy(base_of(source.model).generation_config)
        generation.eos_token_id = list(ends.ids) or None
        generation.pad_token_id = tokenizer.pad_token_id
        generation.bos_token_id = tokenizer.bos_token_id
        generation.save_pretrained(directory)
    if ends.text:
        notes.append(f"answers end in {ends.text!r}, several tokens: set it as a stop string in a server")
    return notes


def prove(prepared: Prepared, config: MergeConfig, screen: Screen, directory: Path) -> None:
    """Loads the exported model by plain transformers and compares it with the run; raises NotProved."""
    predictor, device = prepared.predictor, prepared.predictor.device
    stored = getattr(torch, prepared.record["dtype"])
    size = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()
    computed = torch.float32 if free is None or size * 4 // stored.itemsize < 0.8 * free else stored
    kind = auto_model(str(predictor.config.task.auto_class))
    model = kind.from_pretrained(directory, dtype=computed, local_files_only=True, use_safetensors=True).to(device)
    result = proof.compare(prepared.answers, proof.answers_of_plain(model.eval(), predictor, prepared.questions))
    del model
    bound = config.bound or proof.bound_of(stored, computed, predictor.config.quantization.format)
    prepared.record["proof"] = {**asdict(result), "bound": bound, "rows": prepared.questions.source}
    screen.print(
        f"  {prepared.record['dtype']}, {format_bytes(size)}; against the run on {len(prepared.questions.rows)} "
        f"{prepared.questions.source}: {result}"
    )
    if config.base is MergeBase.original and config.bound is None:
        screen.warn(COST)
    elif not result.is_within(bound):
        raise NotProved(
            f"{predictor.job.run.directory}: the merged model differs from the run: {result}; the bound is {bound:.0e} "
            "nats; nothing was written."
        )
    if predictor.config.task.auto_class == "causal_lm":
        card.write(directory, prepared.record, predictor.config, predictor.job.run)
    (directory / RECORD).write_text(json.dumps(prepared.record, indent=1, ensure_ascii=False))
