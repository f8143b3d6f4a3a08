"""The page that goes with a model: what it was made of, from which data, and how good it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmft.evaluation.predictor import Predictor

CARD = """---
library_name: {library}
pipeline_tag: {task}
{base}{license}tags:
- llmft
---

# {name}

{what}

| | |
|---|---|
{facts}

{metrics}
"""


def text(name: str, what: str, predictor_config: Any, run: Any, facts: dict[str, str], library: str) -> str:
    """A model card of the Hub; its numbers are those of run.json."""
    config = predictor_config
    base = f"base_model: {config.model.id}\n" if config.model.path is None else ""
    known = config.model.license not in ("unknown", "")
    license_ = f"license: {config.model.license}\n" if known else ""
    result = run.status().get("result", {})
    metrics = {key: value for key, value in (result.get("after") or {}).items() if isinstance(value, float)}
    before = result.get("before") or {}
    table = ["| metric | before | after |", "|---|---|---|"]
    table += [f"| {key} | {_number(before.get(key))} | {_number(value)} |" for key, value in sorted(metrics.items())]
    rows = {
        "base": config.model.id if config.model.path is None else config.model.label,
        "licence of the base": config.model.license,
        "data": config.data.name,
        "method": _method(config),
        "seed": str(config.seed),
        **facts,
    }
    return CARD.format(
        library=library,
        task="text-generation" if config.task.auto_class == "causal_lm" else "text-classification",
        base=base,
        license=license_,
        name=name,
        what=what,
        facts="\n".join(f"| {key} | {value} |" for key, value in rows.items() if value),
        metrics="\n".join(table) if metrics else "",
    )


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, (int, float)) else ""


def _method(config: Any) -> str:
    if not config.lora.enabled:
        return "all weights trained"
    return f"LoRA r={config.lora.r} on a base in {config.quantization.format.value}, rate {config.learning_rate.peak:g}"


def write(directory: Path, facts: dict[str, Any], predictor: Predictor) -> None:
    """Writes README.md beside merged weights."""
    found = facts["proof"]
    proof = f"KL {found['kl_nats']:.1e} nats per token, {found['argmax']:.2%} of {found['positions']} argmaxes the same"
    stop = ", ".join(f"`{text}`" for text in facts["stop"])
    what = "A fine-tuned language model, its adapter merged into the weights."
    own = {"weights in": facts["dtype"], "compared with the run": proof, "stop strings": stop}
    (directory / "README.md").write_text(
        text(facts["run"], what, predictor.config, predictor.job.run, own, "transformers"), encoding="utf-8"
    )
