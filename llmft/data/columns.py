"""Columns of a row to the messages of a conversation."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import chain
from typing import Any

from llmft.config.sections import Columns, DataConfig, Head, TaskConfig, TaskType
from llmft.core.errors import ConfigError, DataError
from llmft.data.messages import (
    MEDIA,
    TOOLS,
    Keys,
    Message,
    check_turns,
    read_message,
    read_messages,
    read_tools,
    text_of,
    without_null,
)
from llmft.data.naming import cell_text, names_in, no_column, pieces, root_of, stable_text
from llmft.data.sources import BadRows, Row, named_columns
from llmft.data.targets import Target, Targets


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
        left_out: optional columns that no row has.
        keys: the keys of messages that were read, and those that were not.
    """

    columns: Columns
    data: DataConfig | None = None
    targets: Targets | None = None
    head: Head | None = None
    id: str | None = None
    lenient: bool = False
    left_out: list[str] = field(default_factory=list)
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
        test: Sequence[Row] = (),
    ) -> ColumnMap:
        """The map for `data`; classes that data.labels leaves out are the sorted values of the rows `train`.

        Without a `task`, columns with a target are for a linear head. `targets` are those of a run that is opened
        again; with them, `lenient`, a row needs none. Of the rows `test` nothing is learned but whether they have ids.

        Raises ConfigError for a mapping that names no answer or a key that would not be used, DataError for a column
        that no row has.
        """
        columns = data.columns
        task = task or TaskConfig(name="classification", head=Head.linear if columns.target else None, objective="")
        if not any((columns.messages, columns.text, columns.prompt)):
            raise ConfigError(
                f"data={data.name} maps no columns: set data.columns.prompt and data.columns.response "
                f"(columns of the data: {', '.join(train[0].values)})."
            )
        if not lenient:
            _refuse_unused(data, task)
        made = cls(replace(columns), data, head=task.head, lenient=lenient)
        if task.head is not None:  # a data option made for generation names its target as the answer
            made.columns.target, made.columns.response = columns.target or columns.response, None
        elif columns.target and not columns.response:
            made.columns.target, made.columns.response = None, columns.target
        there = {name for row in train for name in row.values}
        unknown = {}
        for key, names in named_columns(replace(data, columns=made.columns)).items():
            entry = key.removeprefix("data.columns.")
            if lenient and entry not in ("prompt", "input", "system", "messages", "text"):
                continue
            lacking = [name for name in names if name not in there]
            if entry in ("input", "system") and lacking and lacking == names and {*names} <= {*data.optional_columns}:
                setattr(made.columns, entry, None)
                made.left_out += lacking
            elif lacking:
                unknown[key] = lacking[0]
        if unknown:
            raise DataError(_no_columns(unknown, train[0], set(chain.from_iterable(named_columns(data).values()))))
        known = (train, test)
        made.id = columns.id or ("id" if all(_tells_apart(rows, "id") for rows in known) else None)
        if columns.id and not lenient and not all(_tells_apart(rows, columns.id) for rows in known):
            raise DataError(f"data.columns.id={columns.id}: two rows have the same, or one has none; they must differ.")
        if task.head is not None:
            made.targets = targets or Targets.of(data, task, train, made.columns.target, made._fill)
        return made

    def usage(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Which columns of `rows` are read, and for which keys; which are not; and optional ones that none has."""
        assert self.data is not None
        uses: dict[str, list[str]] = {}
        for key, names in named_columns(replace(self.data, columns=replace(self.columns, id=self.id))).items():
            for name in names:
                uses.setdefault(name, []).append(key.removeprefix("data.").removeprefix("columns."))
        roots = {root_of(name) for name in uses}
        there = dict.fromkeys(name for row in rows for name in row.values)
        uses |= {name: ["messages"] for name in TOOLS if self.columns.messages and name in there}
        unread = [name for name in there if name not in uses and name not in roots]
        return {"read": uses, "not_read": unread, "left_out": self.left_out}

    def _fill(self, template: str, row: Row) -> str:
        return "".join(text + ("" if name is None else self._text(row, name)) for text, name in pieces(template))

    def _text(self, row: Row, name: str) -> str:
        if name not in row.values:
            raise ValueError(no_column(name, row.values))
        value = row.values[name]
        if value is None and self.lenient:
            return ""
        if value is None:
            raise ValueError(f"column '{name}' is empty (null)")
        return cell_text(value, name)

    def _further(self, template: str | None, row: Row) -> str | None:
        """A system prompt or further input; None where the row's is empty, or optional and not there."""
        optional = self.data.optional_columns if self.data is not None else ()
        if not template or ("{" not in template and row.values.get(template, template) is None):
            return None
        lacking = [name for name in names_in(template) if name not in row.values]
        if lacking and lacking == names_in(template) and {*lacking} <= {*optional}:
            return None
        if lacking:
            raise ValueError(
                f"{no_column(lacking[0], row.values)}, which other rows have; "
                f"data.optional_columns=[{lacking[0]}] takes such rows as they are"
            )
        text = self._fill(template, row)
        return text if text.strip() else None

    def conversations(self, rows: list[Row], problems: BadRows) -> list[Conversation]:
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
        if self.id and row.values.get(self.id) is None:
            raise ValueError(f"no '{self.id}', which every row is called by")
        name = str(row.values[self.id]) if self.id else row.id
        group = self.data.group if self.data is not None else None
        own = stable_text(row.values[group]) if group and group in row.values else None
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
        named = self.data.target_columns or names_in(column)
        if self.lenient and (not named or any(row.values.get(name) in (None, "") for name in named)):
            return None
        return self.targets.read(row, self.data, column, self._fill)

    def _conversation(self, row: Row) -> Conversation:
        columns = self.columns
        answered = bool(columns.response or columns.chosen or self.targets is not None)
        if columns.messages:
            # In a table of Arrow an object has the keys of all rows' objects.
            filled = ":row " in row.where or (self.data is not None and self.data.hub is not None)
            values = without_null(row.values) if filled else row.values
            messages = read_messages(values.get(columns.messages), columns.messages, self.keys)
            media = next((name for name in MEDIA[:3] if values.get(f"{name}s") or values.get(name)), None)
            if media:
                raise ValueError(f"the row has {media}: this is a text trainer, leave rows with {media} out")
            tools = read_tools(values, values.get(columns.messages))
            messages = self._asked(messages) if self.targets is not None else self._turns(messages)
        else:
            tools = None
            content = self._fill(columns.text or columns.prompt or "", row)
            if columns.text and not content.strip() and not self.lenient:
                raise ValueError("the text is empty")
            messages = [{"role": "user" if columns.prompt or answered else "assistant", "content": content}]
            further = self._further(columns.input, row)
            if further is not None:
                messages[0]["input"] = further
        messages = self._instructed(row, messages)
        if self.targets is not None:
            return Conversation(messages, row.where, tools=tools)
        preferred = columns.chosen and not self.lenient
        return replace(self._preferred(row, messages) if preferred else self._answered(row, messages), tools=tools)

    def _instructed(self, row: Row, messages: list[Message]) -> list[Message]:
        """`messages` with the row's system prompt in front."""
        system = self._further(self.columns.system, row)
        own = [message["content"].strip() for message in messages if message["role"] == "system"]
        if system is None or own == [system.strip()]:
            return messages
        if own:
            raise ValueError(f"column '{self.columns.system}' and the conversation's own system message differ")
        return [{"role": "system", "content": system}, *messages]

    def _answered(self, row: Row, messages: list[Message]) -> Conversation:
        """`messages` with the row's answer behind them, where its columns name one."""
        response = self.columns.response
        if not response or (self.lenient and any(name not in row.values for name in names_in(response))):
            return Conversation(messages, row.where)
        if messages[-1]["role"] == "assistant":
            raise ValueError(f"the conversation ends with an answer already, beside the one of '{response}'")
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
        assert columns.chosen
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
        """A conversation to learn from, up to the last answer that is learned; of rows to predict all of it."""
        check_turns(messages)
        if self.columns.chosen or self.columns.response or self.lenient:
            return messages
        answers = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
        learned = [n for n in answers if "weight" not in messages[n]]
        if not learned:
            why = " that is learned (each has weight 0)" if answers else ""
            raise ValueError(f"no message of the assistant{why}, so nothing to learn from")
        return messages[: learned[-1] + 1]


def _refuse_unused(data: DataConfig, task: TaskConfig) -> None:
    """Raises ConfigError for a key of data.columns that is set and that no example of `task` would use."""
    set_to = {entry.name: value for entry in fields(Columns) if (value := getattr(data.columns, entry.name))}
    texts = [key for key in ("messages", "text", "prompt") if key in set_to]
    if len(texts) > 1:
        raise ConfigError(f"data.columns.{texts[0]} and data.columns.{texts[1]} are both set: set one of them to null.")
    answers = [key for key in ("response", "target", "chosen") if key in set_to]
    if set_to.get("response") == set_to.get("target") and len(answers) > 1:  # one column under two names
        answers.remove("response")
    unused: dict[str, str] = {}
    _refuse_classes(data, task)
    if task.head is not None:
        unused |= dict.fromkeys(("chosen", "rejected"), f"task={task.name} learns no answers")
        if data.target_columns:
            unused |= dict.fromkeys(("response", "target"), "the targets are data.target_columns")
        elif "target" in set_to and "response" in answers:
            unused["response"] = f"task={task.name} predicts data.columns.target; write its column into a template"
    else:
        if data.target_columns:
            raise ConfigError(f"data.target_columns is set, and task={task.name} learns text: set it to [].")
        if len(answers) > 1:
            raise ConfigError(f"data.columns.{' and data.columns.'.join(answers)} are set: set all but one to null.")
        if "chosen" not in set_to:
            unused["rejected"] = "data.columns.chosen is not set"
        if "prompt" in set_to and not answers:
            raise ConfigError("data.columns.prompt is set without data.columns.response (or target): set both.")
        if "text" in set_to and not answers:
            unused |= dict.fromkeys(
                ("input", "system"), "every token of data.columns.text is learned, and nothing else"
            )
    if "messages" in set_to:
        unused["input"] = "data.columns.messages has all that is said"
    for key, reason in unused.items():
        if key in set_to:
            raise ConfigError(f"data.columns.{key}={set_to[key]} would not be used: {reason}; set it to null.")


def _refuse_classes(data: DataConfig, task: TaskConfig) -> None:
    """Raises ConfigError for keys about classes where there are none, and for a class that is named twice."""
    several = task.head is not None and task.problem is TaskType.multi_label
    if data.labels and (task.head is None or task.problem is TaskType.regression):
        raise ConfigError(f"data.labels={data.labels}: task={task.name} has no classes; set it to [].")
    if data.target_separator != DataConfig.target_separator and (not several or data.target_columns):
        raise ConfigError(
            f"data.target_separator={data.target_separator} stands between the classes of task=multi_label in one "
            "column of targets, and would not be used here; leave it out."
        )
    for key in ("labels", "target_columns"):
        twice = [name for name, count in Counter(getattr(data, key)).items() if count > 1]
        if twice:
            raise ConfigError(f"data.{key} names '{twice[0]}' twice.")


def _no_columns(unknown: dict[str, str], first: Row, taken: set[str]) -> str:
    text = " ".join(f"{key}: {no_column(name, first.values, taken)}" for key, name in unknown.items())
    text += f" (columns: {', '.join(map(_short, first.values))})."
    if re.search(r"\.[ct]sv(\.\w+)?:", first.where.lower()):
        text += " A csv file without a header line needs its columns' names in data.csv_columns."
    return text


def _short(name: str) -> str:
    """A column's name; cut where a file without a header gives a row's text for one."""
    return name if len(name) <= 40 else f"{name[:39]}…"


def _tells_apart(rows: Sequence[Row], column: str) -> bool:
    """Whether every row has a value of its own in `column`."""
    values = [row.values.get(column) for row in rows]
    return None not in values and len({str(value) for value in values}) == len(values)
