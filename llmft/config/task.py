"""The group task of a training: what is learned, and from what feedback."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from typing import Any

from llmft.config.fields import later, not_in_key, require, require_each
from llmft.core.errors import ConfigError, did_you_mean

Head = StrEnum("Head", "linear tokens")
"""linear: a new head on the last hidden state; tokens: the LM's probabilities of label words."""
TaskType = StrEnum("TaskType", "single_label multi_label regression")
"""The kind of target: one class, any number of classes, or a number."""
Feedback = StrEnum("Feedback", "pairs labels")
"""Human feedback: which of a prompt's answers is better, or whether each answer is good."""
Reference = StrEnum("Reference", "start base none")
"""The reference policy: the policy before the first step, its base without any adapter, or none."""
Advantage = StrEnum("Advantage", "group centred leave_one_out gae")
"""Baseline of an answer's reward: its prompt's other answers, or a value head's estimate."""
Aggregate = StrEnum("Aggregate", "token sequence constant")
"""How token losses are aggregated into a step's loss."""
KlWhere = StrEnum("KlWhere", "loss reward")
"""Where the KL penalty is applied."""
KlEstimator = StrEnum("KlEstimator", "k1 k3")
"""Estimator of the KL divergence at a sampled token."""
Ratio = StrEnum("Ratio", "token sequence product")
"""What is clipped: each token's ratio, or an answer's: the geometric mean or the product of its tokens' ratios."""
CLASSIFICATION = "llmft.training.objectives.classification.Classification"


@dataclass
class KlConfig:
    """KL penalty towards the reference policy."""

    beta: float = 0.0
    where: KlWhere = KlWhere.loss
    estimator: KlEstimator = KlEstimator.k3

    def __post_init__(self) -> None:
        require_each(self, "task.kl.", "beta", lambda x: 0 <= x < math.inf, "0 or more.")


@dataclass(kw_only=True)
class RolloutConfig:
    """How a policy samples answers, and how they are judged and learned from."""

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
        require(bool(self.judges), "task.judges: nothing scores the answers; name functions or reward runs.")
        compares = self.advantage in (Advantage.group, Advantage.centred)
        others = f"2 or more: with task.advantage={self.advantage.value} an answer is measured by the others."
        check("group", lambda n: n > 1 or not compares, others)


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
    learning_rate_factor: float = not_in_key(1.0)
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
            other = f"task.head={self.head} always uses {model}; leave it out."
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
        tokens_alone = "0 or more, and only for task.head=tokens."
        check("text_loss", lambda x: x == 0 or (x > 0 and self.head is Head.tokens), tokens_alone)
        several = self.problem is not TaskType.single_label
        if several and self.head is Head.tokens:
            raise ConfigError(
                f"task.head=tokens chooses one class: task.problem={self.problem} needs task.head=linear."
            )
        if several and self.class_weights is not None:
            raise ConfigError(f"task.class_weights: task.problem={self.problem} has no classes to weigh.")
        if self.label_smoothing and self.problem is TaskType.regression:
            raise ConfigError("task.label_smoothing: a regression has no labels to smooth.")
        weights = "balanced, a dictionary of weights by class, or null."
        check("class_weights", lambda value: value == "balanced" or isinstance(value, dict), weights)
        if self.words not in ("labels", "letters") and not isinstance(self.words, dict):
            raise ConfigError(f"task.words={self.words}: labels, letters, or a dictionary of a word for each class.")

    @property
    def predicts(self) -> bool:
        """Whether predictions of rows are numbers, of classes or of answers, not only text."""
        return self.head is not None or self.feedback is not None

    @property
    def scores_answers(self) -> bool:
        """Whether the task learns a reward model: a head with one score per answer."""
        return self.feedback is not None and self.auto_class == "sequence_classification"

    @property
    def writes(self) -> bool:
        """Whether a trained model is asked for text, not for a class, number or score."""
        return self.head is None and not self.scores_answers

    def margins(self, degrees: list[str]) -> list[float]:
        """Required margin of the chosen answer, per degree; Llama 2's small ones are 1, 2/3, 1/3, 0."""
        if isinstance(self.margin, dict):
            return [float(self.margin[name]) for name in degrees]
        last = len(degrees) - 1
        unit = {"none": math.inf, "small": last, "large": 1}[self.margin]
        return [step / unit for step in range(last, -1, -1)]

    def _check_feedback(self) -> None:
        check = partial(require_each, self, "task.")
        check("epochs", lambda x: x > 0, "above 0, or null for data.epochs.")
        check("learning_rate_factor", lambda x: 0 < x < math.inf, "a factor on the model's learning rate, above 0.")
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
        less = "below 0.5 for comparisons, which say nothing at 0.5."
        check("label_smoothing", lambda x: x < 0.5 or self.feedback is None, less)
