"""Selects runs to export, their format and target path, without importing torch."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

from llmft.config.commands import MergeConfig, MergeFormat, Stored
from llmft.config.convert import to_config
from llmft.config.hydra_app import make_known
from llmft.config.overrides import config_directory
from llmft.config.sections import TrainConfig
from llmft.config.untrusted import check_adapter
from llmft.core.errors import ConfigError, UserError, did_you_mean
from llmft.data.hub import locate
from llmft.evaluation.jobs import PredictionJob, targets_of
from llmft.evaluation.prediction_sets import EnsembleRecipe
from llmft.runs.directory import PeftAdapter, finished_run

RECORD = "llmft.json"
"""The record in a merged directory."""
WRITTEN = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
"""Number formats that the package gguf writes."""
QUANTIZED = (
    *("q2_k", "q3_k_s", "q3_k_m", "q3_k_l", "q4_k_s", "q4_k_m", "q5_k_s", "q5_k_m", "q6_k"),
    *("iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq2_m", "iq3_xxs", "iq3_s", "iq3_m", "iq4_nl", "iq4_xs"),
)
"""Types that only llama.cpp's llama-quantize writes."""

DTYPE_NAMES = {Stored.fp16: "float16", Stored.bf16: "bfloat16", Stored.fp32: "float32"}


class NotProved(UserError):
    """An exported model differs from its run."""

    exit_code = 1


def opened(directory: Path) -> PredictionJob:
    """A finished run (or an adapter directory of PEFT) as a job for export or serving.

    Raises ConfigError for anything without a language model of its own.
    """
    if (directory / "adapter_config.json").is_file():
        return opened(directory.parent) if (directory.parent / "run.json").is_file() else foreign(directory)
    if not (directory / "run.json").exists():
        raise ConfigError(
            f"{directory}: neither a run directory nor an adapter: it has no run.json and no adapter_config.json."
        )
    if EnsembleRecipe.of(directory) is not None:
        raise ConfigError(f"{directory}: an ensemble of runs; name one run directory of outputs/runs.")
    run, trained = finished_run(directory)
    job = PredictionJob(run, trained, directory, target_model=targets_of(run, trained))
    if job.baseline:
        raise ConfigError(f"{directory}: a baseline without a language model cannot be exported or served.")
    return job


def foreign(directory: Path) -> PredictionJob:
    """An adapter from elsewhere on the base that it names, with the chat template of the base's tokenizer.

    Raises ConfigError for an unsupported adapter, or a base that is not found.
    """
    import hydra
    from hydra.core.global_hydra import GlobalHydra

    path = directory / "adapter_config.json"
    adapter = check_adapter(directory)
    base = adapter.get("base_model_name_or_path")
    if not base:
        raise ConfigError(f"{path}: base_model_name_or_path is empty; write the path or Hub id of its base there.")
    if adapter.get("task_type") not in ("CAUSAL_LM", None):
        raise ConfigError(f"{path}: task_type={adapter['task_type']}; only adapters of language models are supported.")
    make_known("train", TrainConfig)
    GlobalHydra.instance().clear()
    overrides = ["model=local", "quantization=none", "data=messages", "logger=none"]
    with hydra.initialize_config_dir(str(config_directory()), version_base="1.3"):
        composed = hydra.compose("train", overrides)
    local = Path(base).expanduser().is_dir()
    composed.model.update({"path": base} if local else {"path": None, "id": base})
    composed.data.files = str(directory / "rows")  # unknown
    composed.lora.update({"r": adapter["r"], "alpha": adapter["lora_alpha"], "dora": adapter.get("use_dora", False)})
    composed.lora.modules_to_save = adapter.get("modules_to_save") or []
    config = to_config(composed, TrainConfig)
    try:
        located = locate(config.model)
    except ConfigError as error:
        raise ConfigError(f"{path}: base_model_name_or_path={base} (a local path is possible too): {error}") from None
    run = PeftAdapter(directory, "", fingerprint=located.fingerprint)
    return PredictionJob(run, config, directory)


def check_format(config: MergeConfig) -> None:
    """Raises ConfigError for a format that cannot be written."""
    if config.format is MergeFormat.hf:
        return
    if config.type not in (*WRITTEN, *QUANTIZED):
        raise ConfigError(f"type={config.type}: no such type{did_you_mean(config.type, (*WRITTEN, *QUANTIZED))}")
    if config.format is MergeFormat.gguf_adapter and config.type not in ("f32", "f16", "bf16"):
        raise ConfigError(f"type={config.type}: adapters are not quantised; choose f16, bf16 or f32.")
    checkout = None if config.converter is None else Path(config.converter).expanduser()
    if checkout is not None and not (checkout / "convert_hf_to_gguf.py").is_file():
        raise ConfigError(f"converter={checkout}: no convert_hf_to_gguf.py there; name a checkout of llama.cpp.")
    if importlib.util.find_spec("gguf") is None and config.converter is None:
        raise ConfigError('format=gguf needs the package gguf: pip install "llmft[gguf]".')


def is_current(directory: Path, job: PredictionJob, config: MergeConfig) -> bool:
    """Whether a merged directory has these weights and options."""
    try:
        record = json.loads((directory / RECORD).read_text())
    except (OSError, ValueError):
        return False
    wanted = None if config.dtype is Stored.auto else DTYPE_NAMES[config.dtype]
    base = config.base.value if job.config.lora.enabled else None
    return (
        record.get("weights") == job.run.digests()
        and record.get("base") == base
        and wanted in (None, record.get("dtype"))
    )


def target_of(job: PredictionJob, config: MergeConfig, several: bool) -> Path:
    """The path of a run's exported model."""
    run = job.run.directory
    if config.format is MergeFormat.hf:
        return run / "merged" if config.to is None else Path(config.to).expanduser() / (run.name if several else "")
    file_name = f"{run.name}-{config.type}.gguf"
    if config.format is MergeFormat.gguf_adapter:
        file_name = f"{run.name}-lora-{config.type}.gguf"
    if config.to == "lmstudio":
        pointer = Path.home() / ".lmstudio-home-pointer"
        home = Path(pointer.read_text().strip()) if pointer.is_file() else Path.home() / ".lmstudio"
        return home / "models" / "llmft" / run.name / file_name
    if config.to is None:
        return run / "gguf" / file_name
    target = Path(config.to).expanduser()
    return target if target.suffix == ".gguf" and not several else target / file_name
