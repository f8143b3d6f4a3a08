"""The page that goes with a model: what it was made of, from which data, and how good it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmft.config.sections import TrainConfig
from llmft.runs.directory import ForeignRun, Run

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
    if isinstance(run, ForeignRun):
        rows["method"] = f"LoRA r={config.lora.r}"
    else:
        rows |= {"data": config.data.name, "method": _method(config), "seed": str(config.seed)}
    result = run.status().get("result", {})
    before, after = (
        {k: v for k, v in (result.get(n) or {}).items() if isinstance(v, float)} for n in ("before", "after")
    )
    table = ["| metric | before | after |", "|---|---|---|"]
    table += [f"| {key} | {_number(before.get(key))} | {_number(value)} |" for key, value in sorted(after.items())]
    return CARD.format(
        head=head.to_yaml(),
        name=name,
        what=what,
        facts="\n".join(f"| {key} | {value} |" for key, value in {**rows, **facts}.items() if value),
        metrics="\n".join(table) if after else "",
    )


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _method(config: TrainConfig) -> str:
    if not config.lora.enabled:
        return "all weights trained"
    return f"LoRA r={config.lora.r} on a base in {config.quantization.format.value}, rate {config.learning_rate.peak:g}"


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
