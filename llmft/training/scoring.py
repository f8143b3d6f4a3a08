"""From the task's configuration to an objective and the metrics of its predictions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from llmft.build import find, reads_text
from llmft.config import Head, TaskConfig
from llmft.data.encode import Encoder
from llmft.data.examples import Examples
from llmft.data.targets import Targets
from llmft.training.finetuner import Scoring
from llmft.training.objectives.base import Objective


def make_objective(
    task: TaskConfig, targets: Targets | None, encoder: Encoder, splits: Mapping[str, Examples]
) -> Objective:
    """What is learned. Raises ConfigError for class words that the tokenizer does not tell apart."""
    made = find(str(task.objective), "task.objective")
    if task.head is None:
        return made()
    from llmft.training.objectives.choice import make_scores

    options: dict[str, Any] = {"label_smoothing": task.label_smoothing}
    assert targets is not None
    if task.head is Head.tokens:
        options["scores"] = make_scores(encoder, targets.words, dict(splits))
        options["text_loss"] = task.text_loss
    return made(targets, **options)


def make_scoring(
    task: TaskConfig, metrics: Mapping[str, Callable[..., float]], splits: Mapping[str, Examples]
) -> Scoring | None:
    """How validation scores predictions; None where it only has losses and texts."""
    if task.head is None:
        return None
    wanted = [path.rpartition(".")[2] for path in task.metrics if not reads_text(path)]
    references = {
        name: np.asarray([row.conversation.target for row in splits[split]])
        for split, name in (("validation", "val"), ("test", "test"))
        if split in splits
    }
    return Scoring({name: metrics[name] for name in wanted}, references)
