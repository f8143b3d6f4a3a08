"""Columns of a row to the messages of a conversation."""

from __future__ import annotations

import string
from dataclasses import dataclass, field, fields, replace

from llmft.config import Columns, DataConfig, Head, TaskConfig
from llmft.data.messages import (
    MEDIA,
    Keys,
    Message,
    check_turns,
    read_message,
    read_messages,
    read_tools,
    text_of,
    without_null,
)
from llmft.data.sources import Problems, Row
from llmft.data.targets import Target, Targets
from llmft.errors import ConfigError, DataError, did_you_mean
from llmft.schema import canonical


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages, as `llmft.data.messages` makes them, and where they stand.

    Attributes:
        target: for classification, a class's index, a 0 or 1 for each class, or a number; see `Targets`.
        rejected: the answer that was not preferred, in preference data; the preferred one is the last message.
        trained_from: how many answers at the beginning are not learned.
        id: what predictions call the row.
        group: what must not be torn apart by a split, where data.group is set.
        weight: what the row counts for in the loss.
        marked: whether answers are marked as learned; None: where there is no target.
        tools: what the assistant may call, in OpenAI's form.
    """

    messages: list[Message]
    where: str
    target: Target | None = None
    rejected: str | None = None
    trained_from: int = 0
    id: str = ""
    group: str | None = None
    weight: float = 1.0
    marked: bool | None = None
    tools: list[Message] | None = None

    @property
    def learns_text(self) -> bool:
        """Whether tokens of answers are learned."""
        return self.target is None if self.marked is None else self.marked


@dataclass
class ColumnMap:
    """Turns rows into conversations as data.columns says.

    Attributes:
        targets: what is predicted by a task with a head; None where text is learned.
        id: the column that names the rows; None: file:line.
        lenient: for rows to predict: they need no target, and an empty column is empty text.
        keys: the keys of messages that were read, and those that were not.
    """

    columns: Columns
    data: DataConfig | None = None
    targets: Targets | None = None
    head: Head | None = None
    id: str | None = None
    lenient: bool = False
    keys: Keys = field(default_factory=Keys)

    @property
    def labels(self) -> list[str]:
        """The classes in their order."""
        return self.targets.labels if self.targets is not None else []

    @classmethod
    def of(
        cls,
        data: DataConfig,
        train: list[Row],
        task: TaskConfig | None = None,
        *,
        targets: Targets | None = None,
        lenient: bool = False,
    ) -> ColumnMap:
        """The map for `data`; classes that data.labels leaves out are the sorted values of the rows `train`.

        Without a `task`, columns with a target are for a linear head. `targets` are those of a run that is opened
        again; with them, `lenient`, a row needs none.

        Raises ConfigError for a mapping that names no answer, DataError for a column that no row has.
        """
        columns = data.columns
        kinds = [kind for kind in ("messages", "text", "prompt") if getattr(columns, kind)]
        if not kinds:
            raise ConfigError(
                f"data={data.name} maps no columns: set data.columns.prompt and data.columns.response "
                f"(columns of the data: {', '.join(train[0].values)})."
            )
        answered = columns.response or columns.target or columns.chosen or data.target_columns
        if columns.prompt and not answered and not lenient:
            raise ConfigError("data.columns.prompt is set without data.columns.response (or target): set both.")
        task = task or TaskConfig(name="classification", head=Head.linear if columns.target else None, objective="")
        made = cls(replace(columns), data, head=task.head, lenient=lenient)
        if task.head is not None:  # a data option made for generation names its target as the answer
            made.columns.target, made.columns.response = columns.target or columns.response, None
        elif columns.target and not columns.response:
            made.columns.target, made.columns.response = None, columns.target
        for entry in fields(columns):
            named = getattr(made.columns, entry.name)
            if not named or (lenient and entry.name in ("target", "response", "chosen", "rejected", "id")):
                continue
            if entry.name in ("input", "system") and not any(named in row.values for row in train):
                setattr(made.columns, entry.name, None)  # Alpaca files without `input` are Alpaca files
                continue
            made._check(f"data.columns.{entry.name}", named, train[0])
        made.id = columns.id or ("id" if _tells_apart(train, "id") else None)
        if columns.id and not lenient and not _tells_apart(train, columns.id):
            raise DataError(f"data.columns.id={columns.id}: two rows have the same, or one has none; they must differ.")
        if task.head is not None:
            made.targets = targets or Targets.of(data, task, train, made.columns.target, made._fill)
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
                    f"{did_you_mean(name, set(first.values) - taken)} (columns: "
                    f"{', '.join(map(_short, first.values))}); a csv file without a header line needs its columns' "
                    "names in data.csv_columns."
                )

    def _fill(self, template: str, row: Row) -> str:
        values = {name: self._text(row, name) for name in self._names(template)}
        return values[template] if "{" not in template else template.format(**values)

    def _text(self, row: Row, name: str) -> str:
        if name not in row.values:
            raise ValueError(f"no column '{name}'{did_you_mean(name, row.values)}")
        value = row.values[name]
        if value is None and self.lenient:
            return ""
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
        made = self._conversation(row)
        name = str(row.values[self.id]) if self.id else base_name(row.where)
        group = self.data.group if self.data is not None else None
        own = canonical(row.values[group]) if group and group in row.values else None
        if self.targets is None:
            return replace(made, id=name, group=own)
        target = self._target(row)
        if self.head is not Head.tokens:
            return replace(made, id=name, group=own, target=target, marked=False)
        word = self.targets.words[target if isinstance(target, int) else 0]
        messages = [*made.messages, {"role": "assistant", "content": word}]
        return replace(made, messages=messages, id=name, group=own, target=target, marked=True)

    def _target(self, row: Row) -> Target | None:
        assert self.targets is not None
        assert self.data is not None
        column = self.columns.target
        if self.lenient and any(
            row.values.get(name) in (None, "") for name in self.data.target_columns or self._names(column or "")
        ):
            return None
        return self.targets.read(row, self.data, column, self._fill)

    def _conversation(self, row: Row) -> Conversation:
        columns = self.columns
        if columns.messages:
            # In a table of Arrow an object has the keys of all rows' objects.
            filled = ":row " in row.where or (self.data is not None and self.data.hub is not None)
            values = without_null(row.values) if filled else row.values
            messages = read_messages(values.get(columns.messages), columns.messages, self.keys)
            media = next((name for name in MEDIA[:3] if values.get(f"{name}s") or values.get(name)), None)
            if media:
                raise ValueError(f"the row has {media}: this is a text trainer, leave rows with {media} out")
            tools = read_tools(values, values.get(columns.messages))
            made = self._asked(messages) if self.targets is not None else self._turns(messages)
            return replace(self._preferred(row, made), tools=tools)
        if columns.text:
            content = self._fill(columns.text, row)
            if not content.strip() and not self.lenient:
                raise ValueError("the text is empty")
            role = "user" if columns.response or self.targets is not None else "assistant"
            return self._answered(row, [{"role": role, "content": content}])
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
        if columns.chosen and not self.lenient:
            return self._preferred(row, messages)
        return self._answered(row, messages)

    def _answered(self, row: Row, messages: list[Message]) -> Conversation:
        """`messages` with the row's answer behind them, where its columns name one."""
        response = self.columns.response
        if not response or (self.lenient and any(name not in row.values for name in self._names(response))):
            return Conversation(messages, row.where)
        answer = self._fill(response, row)
        if not answer.strip() and not self.lenient:
            raise ValueError("the answer is empty")
        return Conversation([*messages, {"role": "assistant", "content": answer}], row.where)

    def _asked(self, messages: list[Message]) -> list[Message]:
        """A conversation to classify, whole; for a head that writes the class, as one text of its user."""
        if self.head is Head.tokens and any(message["role"] == "assistant" for message in messages):
            text = "\n\n".join(f"{message['role']}: {text_of(message)}" for message in messages)
            return [{"role": "user", "content": text}]
        return messages

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
            turn = value if {"role", "from"} & set(value) else {"role": "assistant", **value}
            message = read_message(turn, 1, self.keys)
            if len(message) > 2 or message["role"] != "assistant":
                more = ", ".join(list(message)[2:]) or f"the role {message['role']}"
                raise ValueError(f"the answer in '{name}' has {more}: only the assistant's text can be used")
            return str(message["content"])
        answer = self._fill(name, row)
        if not answer.strip():
            raise ValueError(f"the answer in '{name}' is empty")
        return answer

    def _turns(self, messages: list[Message]) -> list[Message]:
        """A conversation to learn from, up to its last answer; of rows to predict all of it."""
        check_turns(messages)
        if self.columns.chosen or self.lenient:
            return messages
        while messages and messages[-1]["role"] != "assistant":
            messages.pop()
        if not any(message["role"] == "assistant" and "weight" not in message for message in messages):
            raise ValueError("no message of the assistant, so nothing to learn from")
        return messages


def _short(name: str) -> str:
    """A column's name; cut where a file without a header gives a row's text for one."""
    return name if len(name) <= 40 else f"{name[:39]}…"


def base_name(where: str) -> str:
    """`file:line` without the folders, which differ from machine to machine."""
    return where.rpartition("/")[2]


def _tells_apart(rows: list[Row], column: str) -> bool:
    """Whether every row has a value of its own in `column`."""
    values = [row.values.get(column) for row in rows]
    return None not in values and len({str(value) for value in values}) == len(values)
