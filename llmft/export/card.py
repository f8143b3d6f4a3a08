"""The model card: base, data, training and metrics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmft.config.sections import TrainConfig
from llmft.runs.directory import PeftAdapter, Run

CARD = """---
{head}
---

# {name}

{description}

| | |
|---|---|
{properties}

{metrics}
"""


def text(name: str, description: str, config: TrainConfig, run: Run, properties: dict[str, str], library: str) -> str:
    """A model card for the Hub with the numbers in run.json; `properties` are further rows of its table."""
    from huggingface_hub import ModelCardData

    model, on_hub = config.model, config.model.path is None
    head = ModelCardData(
        library_name=library,
        pipeline_tag="text-generation" if config.task.auto_class == "causal_lm" else "text-classification",
        base_model=model.id if on_hub else None,
        license=model.license if model.license not in ("unknown", "") else None,
        tags=["llmft"],
    )
    rows = {"base": model.id if on_hub else model.label, "licence of the base": model.license}
    method = f"LoRA r={config.lora.r}" if config.lora.enabled else "all weights trained"
    if isinstance(run, PeftAdapter):
        rows["method"] = method
    else:
        if config.lora.enabled:
            method += f" on a base in {config.quantization.format.value}, rate {config.learning_rate.peak:g}"
        rows |= {"data": config.data.name, "method": method, "seed": str(config.seed)}
    result = run.status().get("result", {})
    before, after = (
        {name: f"{value:.4f}" for name, value in (result.get(when) or {}).items() if isinstance(value, float)}
        for when in ("before", "after")
    )
    table = ["| metric | before | after |", "|---|---|---|"]
    table += [f"| {name} | {before.get(name, '')} | {value} |" for name, value in sorted(after.items())]
    return CARD.format(
        head=head.to_yaml(),
        name=name,
        description=description,
        properties="\n".join(f"| {key} | {value} |" for key, value in {**rows, **properties}.items() if value),
        metrics="\n".join(table) if after else "",
    )


def describe_merged(config: TrainConfig) -> str:
    """A sentence that describes a merged model."""
    return f"A fine-tuned language model{', its adapter merged into the weights' if config.lora.enabled else ''}."


def write(directory: Path, record: dict[str, Any], config: TrainConfig, run: Run) -> None:
    """Writes README.md into the directory of merged weights; `record` is its llmft.json."""
    proof = record["proof"]
    rows = {
        "weights in": record["dtype"],
        "compared with the run": f"KL {proof['kl_nats']:.1e} nats per token, "
        f"{proof['argmax']:.2%} of {proof['positions']} argmaxes the same",
        "stop strings": ", ".join(f"`{stop}`" for stop in record["stop"]),
    }
    page = text(record["run"], describe_merged(config), config, run, rows, "transformers")
    (directory / "README.md").write_text(page, encoding="utf-8")
