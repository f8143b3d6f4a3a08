"""What is about to happen, in five lines."""

from __future__ import annotations

from collections.abc import Sequence

from llmft.config.sections import Precision, TrainConfig
from llmft.data.encode import Lengths


def plan_facts(
    config: TrainConfig,
    counts: dict[str, int],
    lengths: dict[str, Lengths],
    precision: Precision,
    total_steps: int,
    validate_every: int,
    quantization: str,
    targets: Sequence[str],
) -> dict[str, str]:
    """Lines of the plan: model, what is trained, data, steps. `counts` are `weight_counts` of the model.

    `quantization` and `targets` are the format and the modules with a LoRA that the model has, whatever was asked for.
    """
    train = lengths["train"]
    rate = config.learning_rate
    epochs = total_steps * config.trainer.batch_size / max(1, train.rows)
    rows = ", ".join(f"{part.rows:,} {split}" for split, part in lengths.items())
    return {
        "model": f"{config.model.label}: {_weights(quantization, counts)}, computing in {precision.value}",
        "trained": f"{counts['trainable']:,} weights ({_method(config, targets)})",
        "data": f"{config.data.name}: {rows} rows; {train.tokens / max(1, train.rows):.0f} tokens a row, "
        f"{train.labelled_tokens / max(1, train.tokens):.1%} of them learned; prompt format {config.prompt.name}",
        "steps": f"{total_steps:,} of {config.trainer.batch_size} rows ({epochs:.1f} epochs), "
        f"validation every {validate_every}, rate {rate.peak:g} {rate.schedule.value}, seed {config.seed}",
    }


def _weights(quantization: str, counts: dict[str, int]) -> str:
    held = counts["4-bit"] + counts["8-bit"] + counts["full"]
    if quantization == "none":
        return f"{held + counts['trainable']:,} weights, none quantised"
    share = (counts["4-bit"] + counts["8-bit"]) / max(1, held)
    return f"{held:,} weights, {share:.1%} of them {quantization}"


def _method(config: TrainConfig, targets: Sequence[str]) -> str:
    lora = config.lora
    if not lora.enabled:
        return "full fine-tuning"
    kind = "DoRA" if lora.dora else "LoRA"
    return f"{kind} r={lora.r} alpha={lora.scaling_alpha:g} on {len(targets)} modules: {', '.join(last_names(targets))}"


def last_names(targets: Sequence[str]) -> list[str]:
    """The last names of modules, each once, in order."""
    return sorted({name.rpartition(".")[2] for name in targets})
