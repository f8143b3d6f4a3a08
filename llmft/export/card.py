"""The page that goes with a model: what it was made of, from which data, and how good it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmft.config.sections import TrainConfig
from llmft.runs.directory import PeftAdapter, Run

CARD = """---
{head}
---

# {name}

{what}

| | |
|---|---|
{facts}

{metrics}
"""


def text(name: str, what: str, config: TrainConfig, run: Run, facts: dict[str, str], library: str) -> str:
    """A model card of the Hub; its numbers are those of run.json."""
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
        what=what,
        facts="\n".join(f"| {fact} | {value} |" for fact, value in {**rows, **facts}.items() if value),
        metrics="\n".join(table) if after else "",
    )


def merged(config: TrainConfig) -> str:
    """What a merged model is, in a sentence."""
    return f"A fine-tuned language model{', its adapter merged into the weights' if config.lora.enabled else ''}."


def write(directory: Path, facts: dict[str, Any], config: TrainConfig, run: Run) -> None:
    """Writes README.md beside merged weights."""
    proof = facts["proof"]
    rows = {
        "weights in": facts["dtype"],
        "compared with the run": f"KL {proof['kl_nats']:.1e} nats per token, "
        f"{proof['argmax']:.2%} of {proof['positions']} argmaxes the same",
        "stop strings": ", ".join(f"`{stop}`" for stop in facts["stop"]),
    }
    page = text(facts["run"], merged(config), config, run, rows, "transformers")
    (directory / "README.md").write_text(page, encoding="utf-8")
