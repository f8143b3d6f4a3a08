"""Columns of a row to the messages of a conversation."""

from __future__ import annotations

import string
from dataclasses import dataclass, field, fields, replace
from typing import Any

from llmft.config import Columns, DataConfig
from llmft.data.sources import Problems, Row
from llmft.errors import ConfigError, DataError, did_you_mean

Message = dict[str, str]

ROLES = {
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "system": "system",
}


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages with the roles system, user and assistant, and where they stand.

    Attributes:
        target: the class, for classification.
        rejected: the answer that was not preferred, in preference data; the preferred one is the last message.
        trained_from: how many answers at the beginning are not learned.
    """

    messages: list[Message]
    where: str
    target: int | None = None
    rejected: str | None = None
    trained_from: int = 0


@dataclass
class ColumnMap:
    """Turns rows into conversations as data.columns says."""

    columns: Columns
    labels: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, data: DataConfig, train: list[Row]) -> ColumnMap:
        """The map for `data`; classes that data.labels leaves out are the sorted values of the training rows.

        Raises ConfigError for a mapping that names no answer, DataError for a column that no row has.
        """
        columns = data.columns
        kinds = [kind for kind in ("messages", "text", "prompt") if getattr(columns, kind)]
        if not kinds:
            raise ConfigError(
                f"data={data.name} maps no columns: set data.columns.prompt and data.columns.response "
                f"(columns of the data: {', '.join(train[0].values)})."
            )
        if columns.prompt and not (columns.response or columns.target or columns.chosen):
            raise ConfigError("data.columns.prompt is set without data.columns.response (or target): set both.")
        made = cls(replace(columns), list(data.labels))
        for entry in fields(columns):
            named = getattr(columns, entry.name)
            if not named:
                continue
            if entry.name in ("input", "system") and not any(named in row.values for row in train):
                setattr(made.columns, entry.name, None)  # Alpaca files without `input` are Alpaca files
                continue
            made._check(f"data.columns.{entry.name}", named, train[0])
        if columns.target and not made.labels:
            made.labels = sorted({made._fill(columns.target, row) for row in train})
        return made

    @staticmethod
    def _names(template: str) -> list[str]:
        if "{" not in template:
            return [template]
        return [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]

    def _check(self, key: str, template: str, first: Row) -> None:
        taken = {n for e in fields(self.columns) for n in self._names(getattr(self.columns, e.name) or "")}
        for name in self._names(template):
            if name not in first.values:
                raise DataError(
                    f"{key}={template}: {first.where} has no column '{name}'"
                    f"{did_you_mean(name, set(first.values) - taken)} (columns: {', '.join(first.values)})."
                )

    def _fill(self, template: str, row: Row) -> str:
        values = {name: self._text(row, name) for name in self._names(template)}
        return values[template] if "{" not in template else template.format(**values)

    @staticmethod
    def _text(row: Row, name: str) -> str:
        if name not in row.values:
            raise ValueError(f"no column '{name}'{did_you_mean(name, row.values)}")
        value = row.values[name]
        if value is None:
            raise ValueError(f"column '{name}' is empty (null)")
        if isinstance(value, (dict, list, bytes)):
            raise ValueError(f"column '{name}' holds {type(value).__name__}, text was expected")
        if isinstance(value, float) and value != value:
            raise ValueError(f"column '{name}' is empty (not a number)")
        return value if isinstance(value, str) else str(value)

    def conversations(self, rows: list[Row], problems: Problems) -> list[Conversation]:
        """All rows that can be used; the others go to `problems`."""
        made = []
        for row in rows:
            try:
                made.append(self.conversation(row))
            except ValueError as error:
                problems.add(row.where, str(error), row.values)
        return made

    def conversation(self, row: Row) -> Conversation:
        """One row's messages. Raises ValueError saying what is wrong with the row."""
        columns = self.columns
        if columns.messages:
            return self._preferred(row, self._turns(row))
        target = None
        if columns.target:
            label = self._fill(columns.target, row)
            if label not in self.labels:
                raise ValueError(f"target '{label}' is not among the classes{did_you_mean(label, self.labels)}")
            target = self.labels.index(label)
        if columns.text:
            content = self._fill(columns.text, row)
            if not content.strip():
                raise ValueError("the text is empty")
            role = "user" if columns.target else "assistant"
            return Conversation([{"role": role, "content": content}], row.where, target)
        assert columns.prompt
        user: Message = {"role": "user", "content": self._fill(columns.prompt, row)}
        if columns.input:
            extra = self._fill(columns.input, row)
            if extra.strip():
                user["input"] = extra
        messages = [user]
        if columns.system:
            system = self._fill(columns.system, row)
            if system.strip():
                messages.insert(0, {"role": "system", "content": system})
        if columns.chosen:
            return self._preferred(row, messages)
        if columns.response:
            answer = self._fill(columns.response, row)
            if not answer.strip():
                raise ValueError("the answer is empty")
            messages.append({"role": "assistant", "content": answer})
        return Conversation(messages, row.where, target)

    def _preferred(self, row: Row, messages: list[Message]) -> Conversation:
        """Preference data: the chosen answer ends the conversation, the rejected one is kept beside it."""
        columns = self.columns
        if not columns.chosen:
            return Conversation(messages, row.where)
        if messages[-1]["role"] == "assistant":
            raise ValueError("the conversation ends with an answer already, beside the chosen one")
        chosen = self._answer(row, columns.chosen)
        rejected = self._answer(row, columns.rejected) if columns.rejected else None
        return Conversation([*messages, {"role": "assistant", "content": chosen}], row.where, None, rejected)

    def _answer(self, row: Row, name: str) -> str:
        """An answer given as text, as one message, or as the last of several."""
        value = row.values.get(name)
        if isinstance(value, list) and value:
            value = value[-1]
        if isinstance(value, dict):
            return self._turn({"role": "assistant", **value}, 1)["content"]
        answer = self._fill(name, row)
        if not answer.strip():
            raise ValueError(f"the answer in '{name}' is empty")
        return answer

    def _turns(self, row: Row) -> list[Message]:
        assert self.columns.messages
        turns = row.values.get(self.columns.messages)
        if not isinstance(turns, list) or not turns:
            raise ValueError(f"column '{self.columns.messages}' holds no list of messages")
        if all(isinstance(turn, str) for turn in turns):  # LIMA: plain texts that take turns
            turns = [{"role": ("user", "assistant")[place % 2], "content": turn} for place, turn in enumerate(turns)]
        messages = [self._turn(turn, number) for number, turn in enumerate(turns, start=1)]
        spoken = [message["role"] for message in messages if message["role"] != "system"]
        if any(role != ("user", "assistant")[place % 2] for place, role in enumerate(spoken)):
            raise ValueError("user and assistant must take turns, starting with user")
        if self.columns.chosen:
            return messages
        if "assistant" not in spoken:
            raise ValueError("no message of the assistant, so nothing to learn from")
        if spoken[-1] == "user":
            messages.pop()
        return messages

    @staticmethod
    def _turn(turn: Any, number: int) -> Message:
        if not isinstance(turn, dict):
            raise ValueError(f"message {number} is {type(turn).__name__}, an object was expected")
        role = turn.get("role", turn.get("from"))
        content = turn.get("content", turn.get("value"))
        if isinstance(content, list):  # OpenAI's typed parts
            parts = [part.get("text", part.get("value")) for part in content if isinstance(part, dict)]
            content = "".join(part for part in parts if isinstance(part, str))
        if role not in ROLES:
            raise ValueError(f"message {number} has the role '{role}'; known are {', '.join(sorted(ROLES))}")
        if not isinstance(content, str) or (ROLES[role] == "assistant" and not content.strip()):
            raise ValueError(f"message {number} ({role}) has no text")
        return {"role": ROLES[role], "content": content}
