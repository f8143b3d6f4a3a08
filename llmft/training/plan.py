"""What is about to happen, in five lines."""

from __future__ import annotations

from llmft.config import Precision, QuantizationFormat, TrainConfig
from llmft.data.encode import Lengths


def plan_facts(
    config: TrainConfig,
    counts: dict[str, int],
    lengths: dict[str, Lengths],
    precision: Precision,
    total_steps: int,
    validate_every: int,
) -> dict[str, str]:
    """Lines of the plan: model, what is trained, data, steps. `counts` are `weight_counts` of the model."""
    train = lengths["train"]
    rate = config.learning_rate
    epochs = total_steps * config.trainer.batch_size / max(1, train.rows)
    rows = ", ".join(f"{part.rows:,} {split}" for split, part in lengths.items())
    return {
        "model": f"{config.model.label}: {_weights(config, counts)}, computing in {precision.value}",
        "trained": f"{counts['trainable']:,} weights ({_method(config)})",
        "data": f"{config.data.name}: {rows} rows; {train.tokens / max(1, train.rows):.0f} tokens a row, "
        f"{train.labelled_tokens / max(1, train.tokens):.1%} of them learned; prompt format {config.prompt.name}",
        "steps": f"{total_steps:,} of {config.trainer.batch_size} rows ({epochs:.1f} epochs), "
        f"validation every {validate_every}, rate {rate.peak:g} {rate.schedule.value}, seed {config.seed}",
    }


def _weights(config: TrainConfig, counts: dict[str, int]) -> str:
    held = counts["4-bit"] + counts["8-bit"] + counts["full"]
    quantized = config.quantization.format
    if quantized is QuantizationFormat.none:
        return f"{held + counts['trainable']:,} weights, none quantised"
    share = (counts["4-bit"] + counts["8-bit"]) / max(1, held)
    return f"{held:,} weights, {share:.1%} of them {quantized.value}"


def _method(config: TrainConfig) -> str:
    lora = config.lora
    if not lora.enabled:
        return "full fine-tuning"
    kind = "DoRA" if lora.dora else "LoRA"
    return f"{kind} r={lora.r} alpha={lora.scaling_alpha:g} on {lora.targets}"
