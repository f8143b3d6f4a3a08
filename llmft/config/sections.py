"""The dataclasses that YAML is checked against.

All values that llmft reads are typed here, so a typo or a wrong type fails at composition. Objects of libraries
(optimizer, callbacks, loggers) are `_target_` nodes, which `llmft.config.instantiate` checks before any weights load.
`__post_init__` refuses values out of range and contradictions, in one sentence that names the key.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum, StrEnum
from functools import partial
from typing import Any

from omegaconf import MISSING

from llmft.core.errors import ConfigError, did_you_mean

Texts = Any
"""One text, such as a path or glob, or a list of them. The command line is not parsed further, unlike other `Any`."""


def _field(mark: str, default: Any, factory: Any) -> Any:
    if factory is not None:
        return field(default_factory=factory, metadata={mark: True})
    return field(default=default, metadata={mark: True})


def not_in_key(default: Any = MISSING, *, factory: Any = None) -> Any:
    """A field that cannot change a run's results and is not part of its key."""
    return _field("not_in_key", default, factory)


def later(default: Any = MISSING, *, factory: Any = None) -> Any:
    """A field that older runs lack: with its default it has no part in a run's key, so that they are found again."""
    return _field("later", default, factory)


def require(condition: bool, message: str) -> None:
    """Raises ConfigError(message) unless `condition` holds."""
    if not condition:
        raise ConfigError(message)


def require_each(config: Any, prefix: str, keys: str, holds: Callable[[Any], bool], expected: str) -> None:
    """Raises ConfigError for the first of the `keys` whose value is not null and does not fulfil `holds`.

    The sentence is `{prefix}{key}={value}: {expected}`.
    """
    for key in keys.split():
        value = getattr(config, key)
        require(value is None or holds(value), f"{prefix}{key}={value}: {expected}")


def is_count(value: Any) -> bool:
    """Whether a value of any type is a whole number of 1 or more."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def seconds_of(duration: str, key: str) -> float:
    """Seconds of a duration such as "11h30m", "90m", "45s" or "1d12h"; a bare number means seconds.

    Raises ConfigError naming `key`.
    """
    parts = re.fullmatch(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+(?:\.\d+)?)s?)?", str(duration).strip())
    if parts is None or not any(parts.groups()):
        raise ConfigError(f"{key}={duration}: a duration such as 11h30m, 90m or 45s.")
    days, hours, minutes, seconds = (float(part or 0) for part in parts.groups())
    return days * 86400 + hours * 3600 + minutes * 60 + seconds


Kernels = StrEnum("Kernels", "auto none")
"""Whether parts of transformers and PEFT are replaced by faster or smaller ones."""
ModelInit = StrEnum("ModelInit", "pretrained random")
"""Where the weights come from."""
SystemRole = StrEnum("SystemRole", "native merge refuse")
"""What a prompt format does with a system prompt."""
QuantizationFormat = StrEnum("QuantizationFormat", "nf4 fp4 int8 none checkpoint")
"""Number format of the frozen base's linear layers; `checkpoint` is the format of its files."""
Head = StrEnum("Head", "linear tokens")
"""How a model classifies: with new weights on its last state, or with its own words for the classes."""
TaskType = StrEnum("TaskType", "single_label multi_label regression")
"""The kind of target: one class, any number of classes, or a number."""
Feedback = StrEnum("Feedback", "pairs labels")
"""What people said of answers: which of a prompt's answers is better, or of each answer whether it is good."""
Reference = StrEnum("Reference", "start base none")
"""What a policy is measured against: itself before the first step, its base without any adapter, or nothing."""
Advantage = StrEnum("Advantage", "group centred leave_one_out gae")
"""By what an answer's reward is measured: its prompt's other answers, or a value head's expectation."""
Aggregate = StrEnum("Aggregate", "token sequence constant")
"""How tokens of answers add up to a step's loss."""
KlWhere = StrEnum("KlWhere", "loss reward")
"""Where the divergence from the reference counts."""
KlEstimator = StrEnum("KlEstimator", "k1 k3")
"""How the divergence is estimated at a drawn token."""
Ratio = StrEnum("Ratio", "token sequence product")
"""Whether the clip looks at tokens, or at whole answers by the geometric mean or the product of their tokens."""
Schedule = StrEnum("Schedule", "constant linear cosine")
"""The course of the learning rate from its peak to its floor."""
Precision = StrEnum("Precision", "auto bf16 fp16 fp32")
"""Number format of the computation; `auto` is the best native format of the device."""
Truncation = StrEnum("Truncation", "cut_prompt_left cut_prompt_middle cut_prompt_right drop error")
"""How rows longer than data.max_tokens are handled; answers are never cut."""
Turns = StrEnum("Turns", "all last")
"""The answers of a conversation that are learned."""
Transform = StrEnum("Transform", "none context_distillation ghost_attention")
"""Transform of conversations before rendering."""
TrainOn = StrEnum("TrainOn", "train all")
"""The rows to train on; with `all`, validation rows too, so validation numbers mean nothing."""
Sampling = StrEnum("Sampling", "random diverse")
"""How data.limit chooses rows."""
BadRow = StrEnum("BadRow", "error skip")
"""What happens to a row that cannot be used."""
OnNan = StrEnum("OnNan", "stop skip")
"""What happens to a step whose loss or gradient is not a finite number."""
OnSaveError = StrEnum("OnSaveError", "stop warn")
"""What happens when a checkpoint cannot be written."""
Checkpointing = StrEnum("Checkpointing", "auto none full")
"""Activation checkpointing: none, or full (only layers' inputs are kept); `auto` is none if it fits, else full."""


class Mode(Enum):
    """The better direction of the monitored metric; `auto` is the direction that the metric declares."""

    auto = "auto"
    min = "min"
    max = "max"

    @property
    def sign(self) -> float:
        """1 or -1: a value times this is better when it is lower."""
        assert self is not Mode.auto, "llmft.metrics.monitor.with_mode comes first"
        return 1.0 if self is Mode.min else -1.0


Export = StrEnum("Export", "best last")
"""The weights that a run exports."""


@dataclass
class ModelConfig:
    name: str = not_in_key()
    id: str = MISSING
    revision: str = "main"
    path: str | None = None
    init: ModelInit = ModelInit.pretrained
    architecture: str = MISSING
    config: dict[str, Any] = field(default_factory=dict)
    overrides: dict[str, Any] = field(default_factory=dict)
    load_overrides: dict[str, Any] = field(default_factory=dict)
    train_tokenizer_vocab: int | None = None
    train_tokenizer_extra: list[str] = field(default_factory=list)
    trust_remote_code: bool = False
    requires_remote_code: bool = False
    unsupported: str | None = None
    skip_modules: list[str] = field(default_factory=list)
    attn_implementation: str | None = None
    kernels: Kernels = not_in_key(Kernels.auto)
    learning_rate: float = not_in_key(2e-4)
    precision: Precision = not_in_key(Precision.auto)
    license: str = not_in_key("unknown")
    gated: bool = not_in_key(False)
    context_tokens: int | None = not_in_key(None)

    @property
    def label(self) -> str:
        """The model's name: that of model.path where it is set, else that of the option."""
        if self.path is None or self.path.startswith("package:"):
            return self.name
        return self.path.rstrip("/").rpartition("/")[2] or self.name

    def __post_init__(self) -> None:
        require(self.path is not None or self.id != "local", "model=local needs model.path=DIR, a model directory.")
        require(self.unsupported is None, f"model={self.name} cannot be trained: {self.unsupported}")
        pretrained = self.init is ModelInit.pretrained
        require(
            not (pretrained and self.overrides),
            "model.overrides reshapes a model, which its pretrained weights would not fit: "
            "set model.init=random or leave it out.",
        )
        require(
            not pretrained or self.train_tokenizer_vocab is None,
            "model.train_tokenizer_vocab makes a new vocabulary, which pretrained weights would not fit: "
            "set model.init=random or leave it out.",
        )
        expected = "260 at least (256 bytes and 3 special tokens)."
        require_each(self, "model.", "train_tokenizer_vocab", lambda n: n >= 260, expected)
        require(
            self.trust_remote_code or not (self.requires_remote_code and pretrained),
            f"model={self.name} only runs with code from its repository: read that code, then set "
            "model.trust_remote_code=true and model.revision to the commit you read.",
        )
        require(
            not self.trust_remote_code or self.path is not None or bool(re.fullmatch("[0-9a-f]{40}", self.revision)),
            f"model.trust_remote_code=true needs model.revision as a 40-digit commit, not '{self.revision}': "
            "otherwise the code may change under you.",
        )


@dataclass
class QuantizationConfig:
    format: QuantizationFormat = QuantizationFormat.nf4
    double_quant: bool = True
    cache: bool = not_in_key(True)
    cache_gib: float = not_in_key(50.0)

    def __post_init__(self) -> None:
        require_each(self, "quantization.", "cache_gib", lambda x: x >= 0, "0 or more.")


MOST_RANK = 65_536
"""Largest LoRA rank; a higher one in a stranger's config would take all memory."""


@dataclass
class LoraConfig:
    enabled: bool = True
    r: int = 8
    alpha: float | None = None
    dropout: float = 0.0
    targets: Texts = "all-linear"
    rslora: bool = False
    dora: bool = False
    modules_to_save: list[str] = field(default_factory=list)
    adapter: str | None = later(None)

    @property
    def scaling_alpha(self) -> float:
        """LoRA's alpha; unset, it is 2 r, so that one learning rate carries over between ranks."""
        return 2.0 * self.r if self.alpha is None else self.alpha

    def __post_init__(self) -> None:
        check = partial(require_each, self, "lora.")
        check("r", lambda n: n >= 1, "an integer of 1 or more (lora=none trains all weights).")
        check("r", lambda n: n <= MOST_RANK, f"{MOST_RANK:,} or less; no layer is so wide.")
        check("dropout", lambda x: 0 <= x < 1, "at least 0 and below 1.")
        check("alpha", lambda x: x > 0, "above 0, or null for 2 r.")
        require(
            isinstance(self.targets, str) or (isinstance(self.targets, list) and len(self.targets) > 0),
            "lora.targets: 'all-linear', a regular expression, or a list of module names.",
        )


@dataclass
class LearningRateConfig:
    peak: float = MISSING
    warmup_fraction: float = 0.03
    warmup_steps: int | None = None
    schedule: Schedule = Schedule.cosine
    floor: float = 0.0

    def __post_init__(self) -> None:
        check = partial(require_each, self, "learning_rate.")
        check("peak", lambda x: 0 < x < math.inf, "above 0, and finite.")
        check("warmup_fraction", lambda x: 0 <= x <= 1, "0 to 1.")
        check("warmup_steps", lambda n: n >= 0, "0 or more, or null for warmup_fraction.")
        check("floor", lambda x: 0 <= x <= 1, "a share of the peak, 0 to 1.")


@dataclass
class PromptConfig:
    name: str = not_in_key()
    template: str | None = None
    system_role: SystemRole = SystemRole.merge
    system: str | None = None
    instruction: str | None = None
    joiner: str = "\n\n"
    stop: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        require(
            not self.system or self.system_role is not SystemRole.refuse,
            f"prompt.system is set but the format {self.name} has no place for one: "
            "use prompt.instruction, or prompt.system_role=merge.",
        )


@dataclass
class Files:
    """One path, glob or list of them per split."""

    train: Texts = None
    validation: Texts = None
    test: Texts = None


@dataclass
class Columns:
    """The column, or template such as "{question} {context}", of each part of an example."""

    prompt: str | None = None
    input: str | None = None
    response: str | None = None
    system: str | None = None
    messages: str | None = None
    text: str | None = None
    target: str | None = None
    id: str | None = None
    chosen: str | None = None
    rejected: str | None = None
    candidates: str | None = later(None)
    scores: str | None = later(None)
    degree: str | None = later(None)
    margin: str | None = later(None)
    label: str | None = later(None)


DEGREES = ("significantly better", "better", "slightly better", "unsure")
"""How much better an answer is, most first: Llama 2's four degrees."""


@dataclass
class DataConfig:
    name: str = not_in_key()
    source: str | None = None
    source_options: dict[str, Any] = not_in_key(factory=dict)
    rows: dict[str, int] = field(default_factory=dict)
    files: Texts = not_in_key(None)
    split_files: Files = not_in_key(factory=Files)
    hub: str | None = None
    hub_config: str | None = None
    hub_revision: str = "main"
    hub_splits: Files = field(default_factory=Files)
    csv_columns: list[str] = field(default_factory=list)
    columns: Columns = field(default_factory=Columns)
    degrees: list[str] = later(factory=lambda: list(DEGREES))
    optional_columns: list[str] = not_in_key(factory=list)
    labels: list[str] = field(default_factory=list)
    target_columns: list[str] = field(default_factory=list)
    target_separator: str = ","
    pseudo: str | None = not_in_key(None)
    pseudo_rows: Texts = not_in_key(None)
    pseudo_min_confidence: float = 0.0
    pseudo_max_per_class: int | None = None
    pseudo_weight: float = 1.0
    validation_fraction: float = 0.1
    test_fraction: float = 0.0
    fold: int | None = None
    num_folds: int = 5
    stratify: str | None = None
    group: str | None = None
    train_on: TrainOn = TrainOn.train
    split_seed: int = 0
    limit: int | None = None
    sample: Sampling = Sampling.random
    train_turns: Turns = Turns.all
    transform: Transform = Transform.none
    max_tokens: int = 1024
    max_prompt_tokens: int | None = None
    max_answer_tokens: int | None = None
    min_prompt_tokens: int = 0
    min_answer_tokens: int = 0
    truncation: Truncation = Truncation.cut_prompt_left
    epochs: float = not_in_key(3.0)
    rate: float | None = not_in_key(None)
    on_bad_row: BadRow = BadRow.error
    max_bad_fraction: float = 0.05
    max_overlap_fraction: float = 0.5
    max_dropped_fraction: float = not_in_key(0.01)
    cache: bool = not_in_key(True)

    def __post_init__(self) -> None:
        local = bool(self.files or self.split_files.train)
        if not (local or self.source or self.hub):
            raise ConfigError(f"data={self.name} names no rows: set data.files=FILE (or data.hub=ID).")
        require(not (local and self.source), f"data={self.name} makes its own rows: data.files has no place there.")
        twice = bool(self.files and self.split_files.train)
        require(not twice, "data.files and data.split_files.train are both set: keep one.")
        check = partial(require_each, self, "data.")
        check("validation_fraction test_fraction max_bad_fraction", lambda x: 0 <= x < 1, "at least 0 and below 1.")
        check("max_dropped_fraction max_overlap_fraction", lambda x: 0 <= x <= 1, "0 to 1.")
        check("num_folds", lambda n: n >= 2, "2 or more.")
        folds = f"0 to {self.num_folds - 1} (data.num_folds={self.num_folds}), or null."
        check("fold", lambda n: 0 <= n < self.num_folds, folds)
        check("rate", lambda x: x > 0, "a factor above 0, or null for task.rate.")
        check("max_prompt_tokens max_answer_tokens", lambda n: n >= 1, "1 or more, or null.")
        check("min_prompt_tokens min_answer_tokens", lambda n: n >= 0, "0 or more.")
        check("pseudo_min_confidence", lambda x: 0 <= x <= 1, "a probability, 0 to 1.")
        check("pseudo_weight", lambda x: x > 0, "above 0; 1 counts as a row does.")
        check("pseudo_max_per_class", lambda n: n >= 1, "1 or more rows a class, or null.")
        different = "two different names or more, that of the clearest preference first."
        check("degrees", lambda names: 2 <= len(names) == len({name.casefold() for name in names}), different)
        check("max_tokens", lambda n: n >= 8, "8 or more.")
        check("limit", lambda n: n >= 1, "1 or more, or null for all rows.")
        for split, count in self.rows.items():
            known = split in ("train", "validation", "test")
            require(known and count >= 0, f"data.rows.{split}={count}: train, validation or test, each 0 or more.")


CLASSIFICATION = "llmft.training.objectives.classification.Classification"


@dataclass
class KlConfig:
    """What holds a policy to the one that it began as."""

    beta: float = 0.0
    where: KlWhere = KlWhere.loss
    estimator: KlEstimator = KlEstimator.k3

    def __post_init__(self) -> None:
        require_each(self, "task.kl.", "beta", lambda x: 0 <= x < math.inf, "0 or more.")


@dataclass(kw_only=True)
class RolloutConfig:
    """How a policy that learns from rewards answers, and how its answers are judged and learned from."""

    rollouts: bool = later(False)
    judges: Any = later(None)
    combine: str | None = later(None)
    group: int = later(8)
    advantage: Advantage = later(Advantage.group)
    aggregate: Aggregate = later(Aggregate.token)
    ratio: Ratio = later(Ratio.token)
    clip: list[float] = later(factory=lambda: [0.2, 0.2])
    kl: KlConfig = later(factory=KlConfig)
    updates: int = later(1)
    temperature: float = later(1.0)
    gamma: float = later(1.0)
    decay: float = later(0.95)
    value_weight: float = later(0.1)
    prompts_at_once: int = not_in_key(8)

    def check_rollouts(self) -> None:
        """Raises ConfigError for values out of range."""
        check = partial(require_each, self, "task.")
        check("group updates prompts_at_once", lambda n: n >= 1, "1 or more.")
        bounds = "how far below and above 1 a ratio may go, such as [0.2,0.2]."
        check("clip", lambda clip: len(clip) == 2 and 0 < clip[0] < 1 and 0 < clip[1] < math.inf, bounds)
        check("temperature value_weight", lambda x: 0 < x < math.inf, "above 0.")
        check("gamma decay", lambda x: 0 <= x <= 1, "0 to 1.")
        if not self.rollouts:
            require(self.judges is None, "task.judges: this task draws no answers; choose task=grpo, rloo or ppo.")
            return
        require(bool(self.judges), "task.judges: nobody says which answers are good; name functions or reward runs.")
        require(
            self.group > 1 or self.advantage not in (Advantage.group, Advantage.centred),
            f"task.group=1 with task.advantage={self.advantage.value}: an answer is measured by the others of its "
            "prompt; 2 or more.",
        )


@dataclass
class TaskConfig(RolloutConfig):
    name: str = not_in_key()
    head: Head | None = None
    problem: TaskType = TaskType.single_label
    words: Any = "labels"
    class_weights: Any = None
    label_smoothing: float = 0.0
    text_loss: float = 0.0
    objective: str | None = None
    objective_options: dict[str, Any] = later(factory=dict)
    feedback: Feedback | None = later(None)
    loss: str | None = later(None)
    loss_options: dict[str, Any] = later(factory=dict)
    beta: float = later(0.1)
    sft_weight: float = later(0.0)
    margin: Any = later("none")
    centre: float = later(0.0)
    reference: Reference = later(Reference.none)
    epochs: float | None = not_in_key(None)
    rate: float = not_in_key(1.0)
    auto_class: str | None = None
    metrics: list[str] = field(default_factory=list)
    metric_options: dict[str, Any] = field(default_factory=dict)
    generate_rows: int = 128
    max_new_tokens: int = 128
    show_rows: int = not_in_key(8)
    monitor: str | None = not_in_key(None)

    def __post_init__(self) -> None:
        if self.head is not None:
            self.objective = self.objective or CLASSIFICATION
            model = "causal_lm" if self.head is Head.tokens else "sequence_classification"
            other = f"task.head={self.head} sits on a {model}; leave it out."
            require_each(self, "task.", "auto_class", lambda name: name == model, other)
            self.auto_class = model
        require(self.objective is not None, f"task={self.name} has no task.objective.")
        self._check_feedback()
        self.check_rollouts()
        self.auto_class = self.auto_class or "causal_lm"
        options = ("causal_lm", "sequence_classification")
        hint = did_you_mean(self.auto_class, options)
        require(self.auto_class in options, f"task.auto_class={self.auto_class}: no such kind of model{hint}")
        check = partial(require_each, self, "task.")
        check("generate_rows show_rows", lambda n: n >= 0, "0 or more.")
        check("max_new_tokens", lambda n: n >= 1, "1 or more.")
        check("label_smoothing", lambda x: 0 <= x < 1, "at least 0 and below 1.")
        tokens_alone = "0 or more, and for task.head=tokens alone."
        check("text_loss", lambda x: x == 0 or (x > 0 and self.head is Head.tokens), tokens_alone)
        several = self.problem is not TaskType.single_label
        if several and self.head is Head.tokens:
            raise ConfigError(
                f"task.head=tokens chooses one class: task.problem={self.problem} needs task.head=linear."
            )
        if several and self.class_weights is not None:
            raise ConfigError(
                f"task.class_weights: task.problem={self.problem} has no classes to weigh against each other."
            )
        if self.label_smoothing and self.problem is TaskType.regression:
            raise ConfigError("task.label_smoothing: a regression has no labels to smooth.")
        weights = "balanced, a dictionary of weights by class, or null."
        check("class_weights", lambda value: value == "balanced" or isinstance(value, dict), weights)
        if self.words not in ("labels", "letters") and not isinstance(self.words, dict):
            raise ConfigError(f"task.words={self.words}: labels, letters, or a dictionary of a word for each class.")

    @property
    def predicts(self) -> bool:
        """Whether rows have numbers that are predicted, of classes or of answers, and not their text alone."""
        return self.head is not None or self.feedback is not None

    @property
    def scores_answers(self) -> bool:
        """Whether the task learns a reward model: a head with one score an answer."""
        return self.feedback is not None and self.auto_class == "sequence_classification"

    @property
    def writes(self) -> bool:
        """Whether what is asked of a trained model is text, and no class, number or score."""
        return self.head is None and not self.scores_answers

    def margins(self, degrees: list[str]) -> list[float]:
        """What each of `degrees` asks the chosen answer to be ahead by; Llama 2's small ones are 1, 2/3, 1/3, 0."""
        if isinstance(self.margin, dict):
            return [float(self.margin[name]) for name in degrees]
        last = len(degrees) - 1
        unit = {"none": math.inf, "small": last, "large": 1}[self.margin]
        return [step / unit for step in range(last, -1, -1)]

    def _check_feedback(self) -> None:
        check = partial(require_each, self, "task.")
        check("epochs", lambda x: x > 0, "above 0, or null for data.epochs.")
        check("rate", lambda x: 0 < x < math.inf, "a factor of the model's rate, above 0.")
        check("beta", lambda x: 0 < x < math.inf, "above 0.")
        check("sft_weight centre", lambda x: 0 <= x < math.inf, "0 or more.")
        known = ("none", "small", "large")
        numbers = self.margin.values() if isinstance(self.margin, dict) else ()
        require(
            (isinstance(self.margin, dict) or self.margin in known)
            and all(isinstance(number, (int, float)) and 0 <= number < math.inf for number in numbers),
            f"task.margin={self.margin}: none, small, large, or a number of 0 or more for each of data.degrees"
            f"{did_you_mean(str(self.margin), known)}",
        )
        if self.head is not None and self.feedback is not None:
            raise ConfigError(f"task.head={self.head}: task.feedback compares answers; set one to null.")
        less = "of a comparison less than 0.5, where it says nothing."
        check("label_smoothing", lambda x: x < 0.5 or self.feedback is None, less)


def rows_or_tokens(micro_batch: Any) -> tuple[int | None, int | None]:
    """trainer.micro_batch as (rows, None) or (None, tokens); (None, None) for auto."""
    if micro_batch == "auto":
        return None, None
    match = re.fullmatch(r"([1-9]\d*) ?(tokens)?", str(micro_batch))
    if match is None:
        expected = "a number of rows, a number of tokens (4096tokens), or auto."
        raise ConfigError(f"trainer.micro_batch={micro_batch}: {expected}")
    return (None, int(match[1])) if match[2] else (int(match[1]), None)


def checkpointing_of(value: Any) -> Checkpointing:
    """A value of trainer.gradient_checkpointing; true and false mean full and none."""
    if isinstance(value, Checkpointing):
        return value
    if isinstance(value, bool):
        return Checkpointing.full if value else Checkpointing.none
    if value == "selective":  # in runs of llmft 0.1
        warnings.warn("trainer.gradient_checkpointing=selective is gone; full is taken.", FutureWarning, stacklevel=2)
        return Checkpointing.full
    hint = did_you_mean(str(value), Checkpointing)
    require(value in [*Checkpointing], f"trainer.gradient_checkpointing={value}: auto, none or full{hint}")
    return Checkpointing(value)


@dataclass
class TrainerConfig:
    batch_size: int = 16
    epochs: float = 3.0
    max_steps: int | None = None
    validate_every: float = 0.25
    gradient_clip: float | None = 1.0
    monitor: str = "val/loss_nats"
    mode: Mode = Mode.auto
    patience: int | None = None
    export: Export = Export.best
    precision: Precision = Precision.auto
    callbacks: dict[str, Any] = field(default_factory=dict)
    # The following change time and memory, not the results.
    micro_batch: Any = not_in_key("auto")
    gradient_checkpointing: Any = not_in_key(Checkpointing.auto)
    offload_activations: bool = not_in_key(False)
    compile: bool = not_in_key(False)
    validation_batch_size: int = not_in_key(64)
    checkpoint_every: int | None = not_in_key(None)
    keep_checkpoints: int = not_in_key(2)
    accelerator: str = not_in_key("auto")
    devices: Any = not_in_key(1)
    num_nodes: int = not_in_key(1)
    strategy: Any = not_in_key("auto")
    threads: int | None = not_in_key(None)
    deterministic: bool = not_in_key(True)
    # The following matter only when something goes wrong.
    max_time: str | None = not_in_key(None)
    on_nan: OnNan = not_in_key(OnNan.stop)
    on_save_error: OnSaveError = not_in_key(OnSaveError.stop)

    def __post_init__(self) -> None:
        if self.max_time is not None:
            limit = seconds_of(self.max_time, "trainer.max_time")
            require(limit > 0, f"trainer.max_time={self.max_time}: above 0, or null for no limit.")
        rows_or_tokens(self.micro_batch)
        self.gradient_checkpointing = checkpointing_of(self.gradient_checkpointing)
        check = partial(require_each, self, "trainer.")
        check("batch_size validation_batch_size keep_checkpoints num_nodes", lambda n: n >= 1, "1 or more.")
        check("max_steps checkpoint_every patience threads", lambda n: n >= 1, "1 or more, or null.")
        require(
            is_count(self.devices) or self.devices == "auto" or (isinstance(self.devices, list) and self.devices != []),
            f"trainer.devices={self.devices}: 1 or more, a list of device numbers, or auto.",
        )
        check("epochs", lambda x: x > 0, "above 0.")
        check("validate_every", lambda x: x > 0, "a share of the run (0.25) or a number of steps (100).")
        check("gradient_clip", lambda x: x > 0, "above 0, or null for none.")


@dataclass
class WandbConfig:
    """Settings of Weights & Biases; `logger=wandb` sets `enabled`."""

    enabled: bool = False
    project: str = "llmft"
    entity: str | None = None
    group: str | None = None
    job_type: str = "train"
    start_timeout_s: float = 4.0
    finish_timeout_s: float = 60.0

    def __post_init__(self) -> None:
        check = partial(require_each, self, "logger.wandb.")
        characters = "W&B takes 1 to 128 characters, none of them /, \\, #, ?, % or :."
        check("project entity", lambda name: re.fullmatch(r"[^/\\#?%:]{1,128}", name) is not None, characters)
        check("start_timeout_s finish_timeout_s", lambda x: 0 < x < math.inf, "a number of seconds above 0.")


@dataclass
class LoggerConfig:
    wandb: WandbConfig = field(default_factory=WandbConfig)
    loggers: dict[str, Any] = field(default_factory=dict)


@dataclass
class RayConfig:
    """Where trials run on other machines: `hydra/launcher=ray` asks for a cluster."""

    address: str | None = None
    gpus_per_worker: float | None = None
    shared_files: bool | None = None
    retries: int = 2

    def __post_init__(self) -> None:
        require_each(self, "sweep.ray.", "gpus_per_worker", lambda x: x >= 0, "0 or more, or null.")
        require_each(self, "sweep.ray.", "retries", lambda n: n >= 0, "0 or more.")


@dataclass
class SweepConfig:
    """How the trials of a multirun run and what is asked of them; no part of any run's key."""

    name: str | None = None
    question: str | None = None
    workers: Any = "auto"
    time_limit: str | None = None
    heartbeat_timeout: str | None = "1h"
    stop_after_same_error: int | None = 3
    early_stop_if_same_as: str | None = None
    early_stop_noise: float | None = None
    looks: Any = None
    seeds_until: int | None = None
    smallest_difference: float | None = None
    report: bool = True
    ray: RayConfig = field(default_factory=RayConfig)

    @property
    def declared_looks(self) -> Any:
        """How often the results are looked at; once, or five times where seeds are added, unless it is said."""
        return self.looks if self.looks is not None else 5 if self.seeds_until else 1

    def __post_init__(self) -> None:
        for key in ("time_limit", "heartbeat_timeout"):
            if (value := getattr(self, key)) is not None:
                seconds_of(value, f"sweep.{key}")
        check = partial(require_each, self, "sweep.")
        require(is_count(self.workers) or self.workers == "auto", f"sweep.workers={self.workers}: 1 or more, or auto.")
        check("looks", lambda value: is_count(value) or value == "any", "1 or more, any, or null.")
        check("stop_after_same_error seeds_until", lambda n: n >= 2, "2 or more, or null.")
        units = "above 0, in units of trainer.monitor, or null."
        check("smallest_difference early_stop_noise", lambda x: x > 0, units)


OutputFormat = StrEnum("OutputFormat", "text json")
"""The output of a command: text for people or JSON for programs."""
Keep = StrEnum("Keep", "best last")
"""The checkpoints of a finished run to keep."""
Cleaning = StrEnum("Cleaning", "checkpoints leftovers tokens bases gguf merged wandb")
"""The kinds of files that `python -m llmft.disk` deletes."""


@dataclass
class DoctorConfig:
    """Config of `python -m llmft.doctor`."""

    output_dir: str = "outputs"
    network: bool = True
    format: OutputFormat = OutputFormat.text


@dataclass
class DiskConfig:
    """Config of `python -m llmft.disk`."""

    output_dir: str = "outputs"
    clean: list[Cleaning] = field(default_factory=list)
    keep: list[Keep] = field(default_factory=lambda: [Keep.best, Keep.last])
    dry_run: bool = True
    format: OutputFormat = OutputFormat.text


@dataclass
class SearchConfig:
    """Config of a multirun below hydra.sweeper; errors name keys without that prefix.

    Attributes:
        sampler: the search algorithm; None: no search, all combinations.
        n_trials: number of configurations; None: 20, or all of a grid.
        seed: seed of the search.
        seeds: seeds with which each configuration is trained; its value is their mean.
        startup_trials: random configurations before TPE or GP begin.
        pruner_startup_trials: complete trials before the median pruner begins.
        min_validations: number of the first validation at which a trial may be pruned (0 is before training).
        max_validations: validations of a whole run, for Hyperband; None: as many as the longest complete trial had.
        reduction_factor: at each rung of successive halving, one trial in this many continues.
        params: ranges by key; the command line takes precedence.
        conditions: parameters that exist only under a condition on others.
    """

    sampler: str | None = None
    pruner: str = "none"
    n_trials: int | None = None
    seed: int = 0
    seeds: list[int] | None = None
    startup_trials: int = 10
    pruner_startup_trials: int = 5
    min_validations: int = 1
    max_validations: int | None = None
    reduction_factor: int = 3
    params: dict[str, Any] | None = None
    conditions: dict[str, str] | None = None

    def __post_init__(self) -> None:
        samplers = ("tpe", "random", "grid", "brute", "gp")
        pruners = ("none", "median", "successive_halving", "hyperband")
        for key, known in (("sampler", samplers), ("pruner", pruners)):
            value = getattr(self, key)
            require(value is None or value in known, f"{key}={value}: no such {key}{did_you_mean(str(value), known)}")
        check = partial(require_each, self, "")
        check("n_trials startup_trials min_validations", lambda n: n >= 1, "1 or more.")
        check("reduction_factor", lambda n: n >= 2, "2 or more.")
        check("seed pruner_startup_trials", lambda n: n >= 0, "0 or more.")
        least = f"min_validations={self.min_validations} or more, or null."
        check("max_validations", lambda n: n >= self.min_validations, least)
        different = "different numbers, as in [0,1,2], or null."
        check("seeds", lambda seeds: 1 <= len(seeds) == len(set(seeds)), different)


@dataclass
class TrainConfig:
    """Config of `python -m llmft`."""

    model: ModelConfig = MISSING
    quantization: QuantizationConfig = MISSING
    lora: LoraConfig = MISSING
    learning_rate: LearningRateConfig = MISSING
    optimizer: dict[str, Any] = MISSING
    prompt: PromptConfig = MISSING
    data: DataConfig = MISSING
    task: TaskConfig = MISSING
    trainer: TrainerConfig = MISSING
    logger: LoggerConfig = not_in_key()
    sweep: SweepConfig = not_in_key()
    trusted_packages: list[str] = not_in_key(factory=list)
    seed: int = 0
    force: bool = not_in_key(False)
    progress: bool = not_in_key(True)
    output_dir: str = not_in_key("outputs")
    name: str | None = not_in_key(None)
    tags: list[str] = not_in_key(factory=list)
    notes: str | None = not_in_key(None)

    def __post_init__(self) -> None:
        require(
            self.lora.enabled or self.quantization.format is QuantizationFormat.none,
            f"quantization.format={self.quantization.format} with lora=none leaves nothing to train: "
            "use quantization=none for full fine-tuning, or a LoRA.",
        )
        if self.lora.adapter is not None and not self.lora.enabled:
            raise ConfigError("lora.adapter with lora=none: an adapter is trained on as one; choose lora=default.")
        self._check_margins()
        require_each(self, "", "seed", lambda n: 0 <= n < 2**32, "0 to 4294967295.")

    def _check_margins(self) -> None:
        """Raises ConfigError for a margin that no row would have."""
        margin, columns = self.task.margin, self.data.columns
        if margin == "none":
            return
        if columns.degree is None:
            advice = "name its column in data.columns.degree."
            raise ConfigError(f"task.margin={margin}: a pair's margin comes from its degree; {advice}")
        if columns.margin is not None:
            raise ConfigError(
                f"task.margin={margin} and data.columns.margin={columns.margin} both give a margin: keep one."
            )
        for name in sorted(set(margin) ^ set(self.data.degrees)) if isinstance(margin, dict) else ():
            raise ConfigError(
                f"task.margin: {name} is not in both this dictionary and data.degrees={self.data.degrees}; "
                "give each degree a number."
            )
