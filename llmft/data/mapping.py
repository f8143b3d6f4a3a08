"""Whether data.columns names what the task learns from, and nothing that it would not use."""

from __future__ import annotations

from collections import Counter
from dataclasses import fields

from llmft.config.data import Columns, DataConfig
from llmft.config.task import Feedback, TaskConfig, TaskType
from llmft.core.errors import ConfigError


def check_mapping(data: DataConfig, task: TaskConfig) -> None:
    """Raises ConfigError for a key of data.columns that is set but that `task` would not use."""
    set_to = {entry.name: value for entry in fields(Columns) if (value := getattr(data.columns, entry.name))}
    texts = [key for key in ("messages", "text", "prompt") if key in set_to]
    if len(texts) > 1:
        raise ConfigError(f"data.columns.{texts[0]} and data.columns.{texts[1]} are both set: set one of them to null.")
    answers: list[str] = [key for key in ("response", "target", "chosen", "candidates") if key in set_to]
    if set_to.get("response") == set_to.get("target") and len(answers) > 1:  # one column, named twice
        answers.remove("response")
    unused: dict[str, str] = {}
    _refuse_classes(data, task)
    if task.head is None and data.target_columns:
        learns = "learns text" if task.feedback is None else "compares answers"
        raise ConfigError(f"data.target_columns is set, and task={task.name} {learns}: set it to [].")
    if task.head is None and len(answers) > 1:
        raise ConfigError(f"data.columns.{' and data.columns.'.join(answers)} are set: set all but one to null.")
    if task.feedback is not None:
        unused |= _feedback_columns(data, task, set_to)
    elif task.head is not None:
        unused |= dict.fromkeys((*_COMPARED, "candidates"), f"task={task.name} learns no answers")
        if data.target_columns:
            unused |= dict.fromkeys(("response", "target"), "the targets are data.target_columns")
        elif "target" in set_to and "response" in answers:
            unused["response"] = f"task={task.name} predicts data.columns.target; write its column into a template"
    else:
        comparison_keys = ("candidates", "scores", "label", *(() if "chosen" in set_to else _COMPARED))
        unused |= dict.fromkeys(comparison_keys, f"task={task.name} compares no answers")
        if "prompt" in set_to and not answers:
            raise ConfigError("data.columns.prompt is set without data.columns.response (or target): set both.")
        if "text" in set_to and not answers:
            reason = "every token of data.columns.text is learned, and nothing else"
            unused |= dict.fromkeys(("input", "system"), reason)
    if "messages" in set_to or not texts:
        key = "messages" if "messages" in set_to else "chosen"
        unused["input"] = f"data.columns.{key} contains the whole conversation"
    for key, reason in unused.items():
        if key in set_to:
            raise ConfigError(f"data.columns.{key}={set_to[key]} would not be used: {reason}; set it to null.")


_COMPARED = ("chosen", "rejected", "degree", "margin", "scores", "label")


def _feedback_columns(data: DataConfig, task: TaskConfig, set_to: dict[str, str]) -> dict[str, str]:
    """The keys that a task of feedback would not use, with the reason. Raises ConfigError for one that it lacks."""
    if task.feedback is Feedback.labels:
        if "label" not in set_to:
            raise ConfigError(f"task={task.name} needs data.columns.label: whether a row's answer is good.")
        missing = "response" if "messages" not in set_to and "response" not in set_to else None
        unused = ["target", "chosen", "rejected", "candidates", "scores", "degree", "margin", "text"]
    else:
        pair = ("candidates", "scores") if "candidates" in set_to else ("chosen", "rejected")
        missing = next((key for key in pair if key not in set_to), None)
        unused = ["target", "response", "label", "text", "degree" if "candidates" in set_to else "scores"]
    if missing is not None:
        raise ConfigError(f"task={task.name} needs data.columns.{missing}; data={data.name} does not name it.")
    return dict.fromkeys(unused, f"task={task.name} learns from {task.feedback}")


def _refuse_classes(data: DataConfig, task: TaskConfig) -> None:
    """Raises ConfigError for keys about classes in a task without classes, and for a class that is named twice."""
    multi_label = task.head is not None and task.problem is TaskType.multi_label
    if data.labels and (task.head is None or task.problem is TaskType.regression):
        raise ConfigError(f"data.labels={data.labels}: task={task.name} has no classes; set it to [].")
    if data.target_separator != DataConfig.target_separator and (not multi_label or data.target_columns):
        raise ConfigError(
            f"data.target_separator={data.target_separator} separates the classes of task=multi_label in "
            "data.columns.target, and would not be used here; leave it out."
        )
    for key in ("labels", "target_columns"):
        repeated = [name for name, count in Counter(getattr(data, key)).items() if count > 1]
        if repeated:
            raise ConfigError(f"data.{key} names '{repeated[0]}' twice.")
