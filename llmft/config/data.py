"""The groups data and prompt of a training."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from typing import Any

from llmft.config.fields import Texts, later, not_in_key, require, require_each
from llmft.core.errors import ConfigError

SystemRole = StrEnum("SystemRole", "native merge refuse")
"""What a prompt format does with a system prompt."""
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

NO_LIMIT = 2**31 - 1
"""data.max_tokens without a limit."""


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
    learning_rate_factor: float | None = not_in_key(None)
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
        check("learning_rate_factor", lambda x: x > 0, "a factor above 0, or null for task.learning_rate_factor.")
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
