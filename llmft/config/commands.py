"""The configs of the commands other than train: `PredictConfig` is that of `python -m llmft.predict`."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from typing import Any

from omegaconf import MISSING

from llmft.config.data import PromptConfig
from llmft.config.fields import Texts, require, require_each, seconds_of
from llmft.config.model import LoraConfig, ModelConfig, Precision, QuantizationFormat
from llmft.config.sections import TrainConfig
from llmft.config.trainer import Checkpointing, LoggerConfig, Mode, checkpointing_of, rows_or_tokens
from llmft.core.errors import ConfigError

PredictionFormat = StrEnum("PredictionFormat", "predictions submission")
"""What predict, folds and blend write in addition to the predictions."""
Method = StrEnum("Method", "mean geometric rank hill_climbing convex")
"""How the members of a blend are combined."""
OutputFormat = StrEnum("OutputFormat", "text json")
"""The output of a command: text for people or JSON for programs."""
KeepCheckpoints = StrEnum("KeepCheckpoints", "best last")
"""The checkpoints of a finished run to keep."""
Cleaning = StrEnum("Cleaning", "checkpoints leftovers tokens bases gguf merged wandb")
"""The kinds of files that `python -m llmft.disk` deletes."""


@dataclass(kw_only=True)
class Trusting:
    """Options of commands that may run a user's own code, which a run's config names."""

    trusted_packages: list[str] = field(default_factory=list)


@dataclass(kw_only=True)
class SubmissionConfig:
    """Options of predict, folds and blend for a competition's csv."""

    format: PredictionFormat = PredictionFormat.predictions
    template: str | None = None
    columns: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        is_submission = self.format is PredictionFormat.submission
        if is_submission and self.template is None:
            raise ConfigError("format=submission needs template=FILE, the competition's sample submission.")
        for key in ("template", "columns"):
            require(is_submission or not getattr(self, key), f"{key}: only format=submission has one; add it.")


@dataclass
class PredictData:
    """The rows to predict; they have the columns of the run."""

    files: Texts = None
    id: str | None = None
    csv_columns: list[str] | None = None


@dataclass
class PredictConfig(SubmissionConfig, Trusting):
    run: Texts = MISSING
    prompts: Any = None
    data: PredictData = field(default_factory=PredictData)
    name: str | None = None
    batch_size: int = 32
    max_new_tokens: int | None = None
    accelerator: str = "auto"
    threads: int | None = None
    force: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require_each(self, "", "batch_size", lambda n: n >= 1, "1 or more.")
        if (self.data.files is None) == (self.prompts is None):
            raise ConfigError('what to predict: data.files=FILE, or prompts=["…"], one of the two.')
        predictions = self.format is PredictionFormat.predictions
        require(self.prompts is None or predictions, "format=submission needs data.files=FILE.")
        require_each(self, "", "max_new_tokens threads", lambda n: n >= 1, "1 or more, or null.")
        reserved = "the name of a run's own held-out rows; choose another."
        require_each(self, "", "name", lambda name: name not in ("val", "test"), reserved)


KeepSamples = StrEnum("KeepSamples", "best all")
"""Which samples become training rows: the best of each prompt, or all of them as well."""


@dataclass
class SampleConfig(Trusting):
    run: str = MISSING
    prompts: Any = None
    data: PredictData = field(default_factory=PredictData)
    rows: str | None = None
    split: str = "train"
    limit: int | None = None
    system: str | None = None
    samples: int = 10
    temperatures: list[float] = field(default_factory=lambda: [1.0])
    judge: Any = None
    combine: str | None = None
    keep: KeepSamples = KeepSamples.best
    seed: int = 0
    name: str | None = None
    batch_size: int = 8
    max_new_tokens: int | None = None
    accelerator: str = "auto"
    threads: int | None = None
    force: bool = False

    def __post_init__(self) -> None:
        require(
            self.data.files is None or self.prompts is None,
            'what to answer: data.files=FILE, or prompts=["…"], one of the two (neither: the run\'s training prompts).',
        )
        check = partial(require_each, self, "")
        check("samples batch_size max_new_tokens threads limit", lambda n: n >= 1, "1 or more.")
        check("seed", lambda n: 0 <= n < 2**32, "0 to 4294967295.")
        numbers = "a list of numbers of 0 or more; 0 takes the likeliest token."
        check("temperatures", lambda list_: len(list_) > 0 and all(0 <= t < math.inf for t in list_), numbers)
        turns = len(self.temperatures)
        check("samples", lambda n: n % turns == 0, f"a multiple of the {turns} temperatures, which take turns.")
        require(self.combine is None or bool(self.judge), "combine: without judge=… there are no scores to combine.")


@dataclass
class StageConfig:
    """One command of a pipeline: its overrides, in which ${stage:NAME} is an earlier stage's directory."""

    command: str = "train"
    overrides: list[str] = field(default_factory=list)
    sweep: bool = False


@dataclass
class PipelineConfig(Trusting):
    name: str = MISSING
    stages: dict[str, StageConfig | None] = field(default_factory=dict)
    files: dict[str, Any] = field(default_factory=dict)
    training: list[str] = field(default_factory=list)
    compare: list[str] = field(default_factory=list)
    judged: list[str] = field(default_factory=list)
    output_dir: str = "outputs"
    dry_run: bool = False

    def __post_init__(self) -> None:
        for name in self.compare:
            require(name in self.stages, f"compare={self.compare}: no stage is called {name}.")
        require(not self.compare or bool(self.judged), "compare: judged is empty; say how answers are judged.")


@dataclass
class EvaluateConfig(Trusting):
    predictions: str = MISSING
    references: Texts = None
    target: str | None = None
    id: str | None = None
    slice: list[str] = field(default_factory=list)
    metrics: list[str] = field(default_factory=list)
    metric_options: dict[str, Any] = field(default_factory=dict)
    bootstrap: int = 1000
    confidence: float = 0.95
    seed: int = 0
    format: OutputFormat = OutputFormat.text

    def __post_init__(self) -> None:
        require_each(self, "", "bootstrap", lambda n: n >= 0, "resamples, 0 for none.")
        require_each(self, "", "confidence", lambda x: 0 < x < 1, "above 0 and below 1.")


@dataclass
class FoldsConfig(SubmissionConfig, Trusting):
    runs: Texts = None
    output_dir: str = "outputs"
    name: str | None = None
    metrics: list[str] = field(default_factory=list)


@dataclass
class BlendConfig(SubmissionConfig, Trusting):
    runs: Texts = MISSING
    method: Method = Method.mean
    predictions: str = "val"
    metric: str | None = None
    steps: int = 100
    num_folds: int = 5
    seed: int = 0
    output_dir: str = "outputs"
    name: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require_each(self, "", "steps", lambda n: n >= 1, "1 or more rounds of hill climbing.")
        require_each(self, "", "num_folds", lambda n: n >= 2, "2 or more.")


@dataclass
class RefitConfig(Trusting):
    runs: Texts = MISSING
    output_dir: str | None = None
    progress: bool = True
    logger: LoggerConfig | None = None


@dataclass
class BenchConfig:
    model: ModelConfig = MISSING
    prompt: PromptConfig = MISSING
    lora: LoraConfig = MISSING
    optimizer: dict[str, Any] = MISSING
    models: list[str] = field(default_factory=list)
    quantizations: list[QuantizationFormat] = field(default_factory=list)
    input_tokens: list[int] = field(default_factory=list)
    output_tokens: list[int] = field(default_factory=list)
    samples: int = 1000
    hours: float = 9.0
    rows: int = 1000
    epochs: float = 3.0
    batch_size: int = 16
    inference_rows: int = 16
    micro_batch: Any = "auto"
    gradient_checkpointing: Any = Checkpointing.auto
    precision: Precision = Precision.auto
    accelerator: str = "auto"
    threads: int | None = None
    repeats: int = 3
    max_time: str = "5m"
    output_dir: str = "outputs"
    name: str | None = None
    format: OutputFormat = OutputFormat.text
    progress: bool = True

    def __post_init__(self) -> None:
        check = partial(require_each, self, "")
        check("samples rows batch_size inference_rows repeats", lambda n: n >= 1, "1 or more.")
        check("hours epochs", lambda x: x > 0, "above 0.")
        lengths = "a list of lengths in tokens, {} or more each."
        check("input_tokens", lambda values: min(values, default=0) >= 1, lengths.format(1))
        check("output_tokens", lambda values: min(values, default=0) >= 2, lengths.format(2))
        check("quantizations", lambda formats: len(formats) > 0, "one at least, such as [nf4,none].")
        check("threads", lambda n: n >= 1, "1 or more, or null.")
        require(seconds_of(self.max_time, "max_time") > 0, f"max_time={self.max_time}: above 0.")
        rows_or_tokens(self.micro_batch)
        self.gradient_checkpointing = checkpointing_of(self.gradient_checkpointing)
        require(
            self.lora.enabled or self.quantizations == [QuantizationFormat.none],
            "lora=none trains all weights, and quantised weights cannot be trained: set quantizations=[none].",
        )
        require(
            not self.models or self.model.path is None or self.model.path.startswith("package:"),
            "models names options of the group model, and model.path a directory: choose one of them.",
        )


MergeFormat = StrEnum("MergeFormat", "hf gguf gguf_adapter")
"""What merge writes: a directory of transformers, a GGUF file, or only the adapter as GGUF."""
MergeBase = StrEnum("MergeBase", "dequantized original")
"""What an adapter is added to: the weights that it was trained on, or those before quantisation."""
Stored = StrEnum("Stored", "auto fp16 bf16 fp32")
"""The number format of a merged directory."""


@dataclass
class MergeConfig(Trusting):
    run: Texts = MISSING
    to: str | None = None
    format: MergeFormat = MergeFormat.hf
    type: str = "f16"
    dtype: Stored = Stored.auto
    base: MergeBase = MergeBase.dequantized
    converter: str | None = None
    bound: float | None = None
    accelerator: str = "auto"
    threads: int | None = None
    force: bool = False

    def __post_init__(self) -> None:
        check = partial(require_each, self, "")
        check("threads", lambda n: n >= 1, "1 or more, or null.")
        check("bound", lambda x: x > 0, "nats per token, above 0, or null.")
        lmstudio = self.to == "lmstudio" and self.format is not MergeFormat.gguf
        require(not lmstudio, "to=lmstudio: LM Studio runs GGUF files; add format=gguf.")
        self.type = self.type.lower()
        gguf = self.format is not MergeFormat.hf
        alone = "only for GGUF files; add format=gguf, or leave it out."
        check("type", lambda name: gguf or name == "f16", alone)
        check("converter", lambda path: gguf, alone)


@dataclass(kw_only=True)
class Serving(Trusting):
    """What chat and serve have in common."""

    run: Texts = MISSING
    max_new_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    accelerator: str = "auto"
    threads: int | None = None

    def __post_init__(self) -> None:
        check = partial(require_each, self, "")
        check("max_new_tokens threads", lambda n: n >= 1, "1 or more, or null.")
        check("temperature", lambda x: 0 <= x <= 10, "0 (greedy) to 10.")
        check("top_p", lambda x: 0 < x <= 1, "above 0, and 1 at most.")


@dataclass
class ChatConfig(Serving):
    message: str | None = None
    system: str | None = None
    save: str | None = None


ServedBy = StrEnum("ServedBy", "llmft vllm llamacpp transformers")
"""What answers requests."""


@dataclass
class ServeConfig(Serving):
    host: str = "127.0.0.1"
    port: int = 8000
    engine: ServedBy = ServedBy.llmft
    batch_size: int = 16
    max_requests: int = 64
    max_body_kib: int = 1024
    timeout: str = "5m"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_each(self, "", "port", lambda n: 0 <= n < 65536, "0 (any free one) to 65535.")
        require_each(self, "", "batch_size max_requests max_body_kib", lambda n: n >= 1, "1 or more.")
        require(seconds_of(self.timeout, "timeout") > 0, f"timeout={self.timeout}: above 0.")


Pushed = StrEnum("Pushed", "adapter merged gguf")
"""What push sends."""


@dataclass
class PushConfig(Trusting):
    run: str = MISSING
    repo: str = MISSING
    what: Pushed = Pushed.adapter
    private: bool = True
    send: bool = False


@dataclass
class BundleConfig(Trusting):
    run: str = MISSING
    to: str = MISSING
    wheels: bool = True
    python: str | None = None
    platform: list[str] = field(default_factory=list)
    installed: list[str] = field(default_factory=list)
    write: bool = True
    accelerator: str = "auto"
    threads: int | None = None

    def __post_init__(self) -> None:
        version = "a version such as 3.11, or null for this one's."
        require_each(self, "", "python", lambda text: re.fullmatch(r"3\.\d+", text) is not None, version)


@dataclass
class ReportConfig:
    runs: Texts = None
    sweep: str | None = None
    output_dir: str = "outputs"
    out: str | None = None
    lb: str | None = None
    numbers: str | None = None
    metric: str | None = None
    mode: Mode = Mode.auto
    clusters: bool = True


@dataclass
class DoctorConfig:
    output_dir: str = "outputs"
    network: bool = True
    format: OutputFormat = OutputFormat.text


@dataclass
class DiskConfig:
    output_dir: str = "outputs"
    clean: list[Cleaning] = field(default_factory=list)
    keep: list[KeepCheckpoints] = field(default_factory=lambda: [*KeepCheckpoints])
    dry_run: bool = True
    format: OutputFormat = OutputFormat.text


def schema_of(command: str) -> type:
    """The dataclass of a command's config; `check` takes that of a training."""
    return TrainConfig if command in ("train", "check") else globals()[f"{command.capitalize()}Config"]
