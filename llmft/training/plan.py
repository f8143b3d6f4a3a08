"""A training's plan, for the screen and for the run's record."""

from __future__ import annotations

import hashlib
from typing import Any

from llmft.config.sections import TrainConfig
from llmft.core.console import Screen
from llmft.model.assemble import Assembled
from llmft.model.quantization import stored_format, weight_counts
from llmft.training.micro_batching import MicroBatchPlan
from llmft.training.prepare import RunInputs
from llmft.training.readiness import Readiness
from llmft.training.references import describe_reference


def show_plan(
    screen: Screen,
    inputs: RunInputs,
    ready: Readiness,
    assembled: Assembled,
    plan: MicroBatchPlan,
    resumed_at: int | None,
) -> None:
    """Prints model, data, steps and warnings about them. `resumed_at`: the step of the checkpoint."""
    config, run, lengths = inputs.config, inputs.run, ready.rows.encoder.lengths
    lines = plan_lines(config, ready, assembled) | {"micro-batch": str(plan), "run": str(run.directory)}
    if resumed_at is not None:
        lines["resumed"] = f"after step {resumed_at}"
    screen.plan(lines)
    limits = lengths["train"]
    if limits.rows_cut or limits.rows_dropped:
        reasons = "".join(f", {count} by {key}" for key, count in limits.dropped_by.items())
        screen.warn(
            f"length limits: {limits.rows_cut} training rows were cut in their prompt and {limits.rows_dropped} "
            f"left out{reasons}, {limits.answer_share_dropped:.1%} of all answer tokens; "
            "`python -m llmft.check` shows more."
        )
    for finding in ready.inspection.findings:
        screen.warn(f"{finding.key}: {finding.message}.")
    if inputs.problems.rejected:
        screen.warn(f"{len(inputs.problems.rejected)} rows left out, see {run.rejected_file}.")


def plan_lines(config: TrainConfig, ready: Readiness, assembled: Assembled) -> dict[str, str]:
    """Lines of the plan by label: model, trained weights, data, steps; the model as it is, not as configured."""
    counts, held, lora = weight_counts(assembled.model), stored_format(assembled.base), config.lora
    quantized = counts["4-bit"] + counts["8-bit"]
    frozen = quantized + counts["full"]
    weights = f"{frozen:,} weights, {quantized / max(1, frozen):.1%} of them {held}"
    if held == "none":
        weights = f"{frozen + counts['trainable']:,} weights, none quantised"
    method, modules = "full fine-tuning", lora_modules(assembled.model)
    if lora.enabled:
        method = f"{'DoRA' if lora.dora else 'LoRA'} r={lora.r} alpha={lora.scaling_alpha:g}"
        method += f" on {modules['count']} modules: {', '.join(modules['names'])}"
    lengths, rate, total_steps = ready.rows.encoder.lengths, config.learning_rate, ready.rows.total_steps
    train, rows = lengths["train"], ", ".join(f"{part.rows:,} {split}" for split, part in lengths.items())
    epochs = total_steps * config.trainer.batch_size / max(1, train.rows)
    return {
        "model": f"{config.model.label}: {weights}, computing in {ready.precision.value}",
        "trained": f"{counts['trainable']:,} weights ({method})",
        "data": f"{config.data.name}: {rows} rows; {train.tokens / max(1, train.rows):.0f} tokens a row, "
        f"{train.labelled_tokens / max(1, train.tokens):.1%} of them learned; prompt format {config.prompt.name}",
        "steps": f"{total_steps:,} of {config.trainer.batch_size} rows ({epochs:.1f} epochs), "
        f"validation every {ready.rows.validate_every}, rate {rate.peak:g} {rate.schedule.value}, seed {config.seed}",
    }


def what_ran(config: TrainConfig, ready: Readiness, assembled: Assembled, plan: MicroBatchPlan) -> dict[str, Any]:
    """The record of the model as it is, not as configured: formats, weights, kernels, objective, prompt."""
    objective, template = type(ready.objective), str(ready.rows.prompt.config.template)
    return {
        "quantization": stored_format(assembled.base),
        "weights": weight_counts(assembled.model),
        "attention": getattr(assembled.base.config, "_attn_implementation", None),
        "gradient_checkpointing": plan.checkpointing.value,
        "reference": describe_reference(config) if config.task.feedback is not None else None,
        "objective": f"{objective.__module__}.{objective.__qualname__}",
        "prompt": {
            "name": config.prompt.name,
            "of_the_tokenizer": not config.prompt.template,
            "template_sha256": hashlib.sha256(template.encode()).hexdigest(),
        },
        "lora_modules": lora_modules(assembled.model),
    }


def lora_modules(model: Any) -> dict[str, Any]:
    """How many modules PEFT has adapted, and their last names."""
    modules = getattr(model, "targeted_module_names", [])
    return {"count": len(modules), "names": sorted({name.rpartition(".")[2] for name in modules})}
