"""Rows to conversations, by the columns that data.columns names."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

from llmft.config.data import Columns, DataConfig
from llmft.config.task import Feedback, Head, TaskConfig
from llmft.core.errors import ConfigError, DataError
from llmft.data.mapping import check_mapping
from llmft.data.messages import (
    MEDIA,
    TOOLS,
    Keys,
    Message,
    check_turns,
    drop_nulls,
    message_text,
    read_message,
    read_messages,
    read_tools,
)
from llmft.data.naming import cell_text, missing_column, names_in, pieces, root_column, stable_text
from llmft.data.preferences import (
    Comparison,
    check_different,
    common_prompt,
    conversation_of,
    degree_of,
    label_of,
    number_of,
    ranked,
)
from llmft.data.readers import BadRows, Row
from llmft.data.sources import named_columns
from llmft.data.targets import Target, Targets


@dataclass(frozen=True, slots=True)
class Conversation:
    """One row: its messages in the form of `llmft.data.messages`, and `where` they come from (file:line).

    Attributes:
        target: for a task with a head, a class's index, a 0 or 1 for each class, or a number; see `Targets`.
        comparison: for a task that compares answers: the other answers, and which is better.
        trained_from: number of answers at the beginning that are not learned.
        id: the row's id in predictions.
        group: the value of data.group; a split keeps rows of one group together.
        weight: the row's weight in the loss.
        marked: whether answers are learned; None: they are where there is no target.
        tools: the tools that the assistant may call, in OpenAI's form.
    """

    messages: list[Message]
    where: str
    target: Target | None = None
    comparison: Comparison | None = None
    trained_from: int = 0
    id: str = ""
    group: str | None = None
    weight: float = 1.0
    marked: bool | None = None
    tools: list[Message] | None = None

    @property
    def learns_text(self) -> bool:
        """Whether the tokens of the answers are learned."""
        return self.target is None if self.marked is None else self.marked


@dataclass
class ColumnMap:
    """Turns rows into conversations as data.columns says.

    Attributes:
        data: its columns are those that the task reads and the rows have.
        task: what is learned.
        targets: the targets of a task with a head; None where text is learned.
        id: the column with the rows' ids; None: file:line.
        lenient: for rows to predict, which need no target; an empty column is empty text.
        left_out: optional columns that no row has.
        keys: the keys of messages that were read, and those that were not.
    """

    data: DataConfig
    task: TaskConfig
    targets: Targets | None = None
    id: str | None = None
    lenient: bool = False
    left_out: list[str] = field(default_factory=list)
    keys: Keys = field(default_factory=Keys)

    @property
    def columns(self) -> Columns:
        """The columns that are read."""
        return self.data.columns

    @property
    def feedback(self) -> Feedback | None:
        """The feedback that rows have, if it is learned; rows to predict have answers only to be scored."""
        return None if self.lenient and self.task.writes else self.task.feedback

    @property
    def labels(self) -> list[str]:
        """The classes in their order."""
        return self.targets.labels if self.targets is not None else []

    @classmethod
    def of(
        cls,
        data: DataConfig,
        train: list[Row],
        task: TaskConfig,
        *,
        targets: Targets | None = None,
        lenient: bool = False,
        test: Sequence[Row] = (),
    ) -> ColumnMap:
        """The map for `data`. Without data.labels, the classes are the sorted targets of the rows `train`.

        `targets` are those of a finished run. The rows `test` are only checked for ids.

        Raises ConfigError for a mapping without an answer or with a key that would not be used, DataError for a column
        that no row has.
        """
        columns = replace(data.columns)
        if not any((columns.messages, columns.text, columns.prompt, columns.chosen)):
            raise ConfigError(
                f"data={data.name} maps no columns: set data.columns.prompt and data.columns.response "
                f"(columns of the data: {', '.join(train[0].values)})."
            )
        if not lenient:
            check_mapping(data, task)
        if task.head is not None:  # the data options for generation name the target as the answer
            columns.target, columns.response = columns.target or columns.response, None
        elif columns.target and not columns.response:
            columns.target, columns.response = None, columns.target
        column_map = cls(replace(data, columns=columns), task, lenient=lenient)
        column_map._leave_out(train, set(chain.from_iterable(named_columns(data).values())))
        is_unique = all(_is_unique(rows, columns.id or "id") for rows in (train, test))
        column_map.id = columns.id or ("id" if is_unique else None)
        if columns.id and not lenient and not is_unique:
            raise DataError(
                f"data.columns.id={columns.id}: two rows have one id, or a row has none; each needs its own."
            )
        if task.head is not None:
            column_map.targets = targets or Targets.of(column_map.data, task, train, column_map._fill)
        return column_map

    def _leave_out(self, train: list[Row], named: set[str]) -> None:
        """Leaves out optional columns that no row has; raises DataError for others. `named` are all in the config."""
        existing = {name for row in train for name in row.values}
        unknown = {}
        for key, names in named_columns(self.data).items():
            entry = key.removeprefix("data.columns.")
            if self.lenient and entry not in ("prompt", "input", "system", "messages", "text"):
                continue
            if not self.reads(entry):
                continue
            missing = [name for name in names if name not in existing]
            optional = entry in ("input", "system") and {*names} <= {*self.data.optional_columns}
            if missing and missing == names and optional:
                setattr(self.columns, entry, None)
                self.left_out += missing
            elif missing:
                unknown[key] = missing[0]
        if unknown:
            raise DataError(_no_columns(unknown, train[0], named))

    def reads(self, entry: str) -> bool:
        """Whether the task reads the column of data.columns.`entry`; the rejected answer, say, only a comparing one."""
        return self.feedback is not None or entry not in ("rejected", "degree", "margin")

    def usage(self, rows: Sequence[Row]) -> dict[str, Any]:
        """The columns of `rows` that are read, with their keys; those that are not; and optional ones without any."""
        read: dict[str, list[str]] = {}
        for key, names in named_columns(replace(self.data, columns=replace(self.columns, id=self.id))).items():
            entry = key.removeprefix("data.").removeprefix("columns.")
            for name in names if self.reads(entry) else ():
                read.setdefault(name, []).append(entry)
        roots = {root_column(name) for name in read}
        existing = dict.fromkeys(name for row in rows for name in row.values)
        read |= {name: ["messages"] for name in TOOLS if self.columns.messages and name in existing}
        unread = [name for name in existing if name not in read and name not in roots]
        return {"read": read, "not_read": unread, "left_out": self.left_out}

    def _fill(self, template: str, row: Row) -> str:
        return "".join(text + ("" if name is None else self._text(row, name)) for text, name in pieces(template))

    def _text(self, row: Row, name: str) -> str:
        if name not in row.values:
            raise ValueError(missing_column(name, row.values))
        value = row.values[name]
        if value is None and self.lenient:
            return ""
        if value is None:
            raise ValueError(f"column '{name}' is empty (null)")
        return cell_text(value, name)

    def _optional_text(self, template: str | None, row: Row) -> str | None:
        """A system prompt or an extra input; None if it is empty, or if it is optional and missing."""
        if not template or ("{" not in template and row.values.get(template, template) is None):
            return None
        missing = [name for name in names_in(template) if name not in row.values]
        if missing and missing == names_in(template) and {*missing} <= {*self.data.optional_columns}:
            return None
        if missing:
            raise ValueError(
                f"{missing_column(missing[0], row.values)}, which other rows have; "
                f"data.optional_columns=[{missing[0]}] takes such rows as they are"
            )
        text = self._fill(template, row)
        return text if text.strip() else None

    def conversations(self, rows: list[Row], problems: BadRows) -> list[Conversation]:
        """The conversations of all usable rows; the others go to `problems`."""
        conversations = []
        for row in rows:
            try:
                conversations.append(self.conversation(row))
            except ValueError as error:
                problems.add(row.where, str(error), row.values)
        return conversations

    def conversation(self, row: Row) -> Conversation:
        """The conversation of one row. Raises ValueError that says what is wrong with the row."""
        conversation = self._conversation(row)
        if self.id and row.values.get(self.id) is None:
            raise ValueError(f"no '{self.id}', the column of the rows' ids")
        group = self.data.group
        conversation = replace(
            conversation,
            id=str(row.values[self.id]) if self.id else row.id,
            group=stable_text(row.values[group]) if group and group in row.values else None,
        )
        if self.targets is None:
            return conversation
        target = self._target(row)
        if self.task.head is not Head.tokens:
            return replace(conversation, target=target, marked=False)
        word = self.targets.words[target if isinstance(target, int) else 0]
        messages = [*conversation.messages, _answer(word)]
        return replace(conversation, messages=messages, target=target, marked=True)

    def _target(self, row: Row) -> Target | None:
        assert self.targets is not None
        names = self.data.target_columns or names_in(self.columns.target)
        if self.lenient and (not names or any(row.values.get(name) in (None, "") for name in names)):
            return None
        return self.targets.read(row, self.data, self._fill)

    def _conversation(self, row: Row) -> Conversation:
        columns = self.columns
        answered = bool(columns.response or columns.chosen or columns.candidates or self.targets is not None)
        if not any((columns.messages, columns.text, columns.prompt)):
            return self._whole_conversations(row)
        if columns.messages:
            # In an Arrow table every object has the keys of all rows' objects.
            from_arrow = ":row " in row.where or self.data.hub is not None
            values = drop_nulls(row.values) if from_arrow else row.values
            messages = read_messages(values.get(columns.messages), columns.messages, self.keys)
            media = next((name for name in MEDIA[:3] if values.get(f"{name}s") or values.get(name)), None)
            if media:
                raise ValueError(f"the row has {media}: this is a text trainer, leave rows with {media} out")
            tools = read_tools(values, values.get(columns.messages))
            if self.targets is None:
                messages = self._to_learn(messages)
            elif self.task.head is Head.tokens and any(message["role"] == "assistant" for message in messages):
                text = "\n\n".join(f"{message['role']}: {message_text(message)}" for message in messages)
                messages = [{"role": "user", "content": text}]  # to be answered with a class
        else:
            tools = None
            if isinstance(row.values.get(columns.prompt or ""), list):
                raise ValueError(
                    f"column '{columns.prompt}' contains a list, text was expected; a conversation is read with "
                    f"data.columns.prompt=null data.columns.messages={columns.prompt}"
                )
            content = self._fill(columns.text or columns.prompt or "", row)
            if columns.text and not content.strip() and not self.lenient:
                raise ValueError("the text is empty")
            messages = [{"role": "user" if columns.prompt or answered else "assistant", "content": content}]
            extra_input = self._optional_text(columns.input, row)
            if extra_input is not None:
                messages[0]["input"] = extra_input
        messages = self._with_system_prompt(row, messages)
        if self.targets is not None:
            return Conversation(messages, row.where, tools=tools)
        if self.feedback is not None:
            return replace(self._compared(row, messages), tools=tools)
        return Conversation(self._with_answer(row, messages), row.where, tools=tools)

    def _with_system_prompt(self, row: Row, messages: list[Message]) -> list[Message]:
        """`messages` with the row's system prompt first."""
        system = self._optional_text(self.columns.system, row)
        in_conversation = [message["content"].strip() for message in messages if message["role"] == "system"]
        if system is None or in_conversation == [system.strip()]:
            return messages
        if in_conversation:
            raise ValueError(f"column '{self.columns.system}' and the conversation's own system message differ")
        return [{"role": "system", "content": system}, *messages]

    def _with_answer(self, row: Row, messages: list[Message]) -> list[Message]:
        """`messages` with the chosen answer, or that of data.columns.response, if any."""
        chosen, response = self.columns.chosen, self.columns.response
        if chosen and not self.lenient:
            _refuse_answered(messages, "the chosen one")
            return [*messages, _answer(self._answer_text(row, chosen, messages))]
        if not response or (self.lenient and any(name not in row.values for name in names_in(response))):
            return messages
        _refuse_answered(messages, f"the one of '{response}'")
        text = self._fill(response, row)
        if not text.strip() and not self.lenient:
            raise ValueError("the answer is empty")
        return [*messages, _answer(text)]

    def _whole_conversations(self, row: Row) -> Conversation:
        """Columns of whole conversations: the chosen one, and one that ends with another answer."""
        chosen, rejected = self.columns.chosen, self.columns.rejected
        assert chosen
        messages = conversation_of(row.values.get(chosen), chosen, self.keys)
        check_turns(messages)
        if self.feedback is None and not self.lenient and not messages[-1]["content"]:
            raise ValueError(f"the answer in '{chosen}' is empty")
        if self.feedback is None or rejected is None or (self.lenient and row.values.get(rejected) is None):
            comparison = None if self.feedback is None else Comparison()  # with a single answer to predict for
            return Conversation(self._with_system_prompt(row, messages), row.where, comparison=comparison)
        other = conversation_of(row.values.get(rejected), rejected, self.keys)
        before, better, worse = common_prompt(messages, other)
        return self._judged(row, self._with_system_prompt(row, before), [better, worse], (0, 1))

    def _compared(self, row: Row, messages: list[Message]) -> Conversation:
        """A prompt with the feedback on its answers; rows to predict need no feedback, and one answer is enough."""
        columns, values, scores = self.columns, row.values, self.columns.scores or ""
        if columns.candidates and (not self.lenient or columns.candidates in values):
            answers = self._candidates(row, columns.candidates, messages)
            if self.lenient and values.get(scores) is None:
                return self._judged(row, messages, answers, (0,) * len(answers))
            return self._judged(row, messages, *ranked(answers, values.get(scores), scores))
        if columns.chosen and (not self.lenient or columns.chosen in values):
            names = [name for name in (columns.chosen, columns.rejected) if name]
            names = [name for name in names if not self.lenient or values.get(name) is not None]
            answers = [self._answer_text(row, name, messages) for name in names]
            return self._judged(row, messages, answers, tuple(range(len(answers))))
        response = columns.response or ("response" if self.lenient and "response" in values else None)
        if response is not None:
            _refuse_answered(messages, f"the one of '{response}'")
            messages = [*messages, _answer(self._fill(response, row))]
        if messages[-1]["role"] != "assistant" or not messages[-1]["content"].strip():
            raise ValueError("the row has no answer")
        return self._judged(row, messages[:-1], [str(messages[-1]["content"])], (0,))

    def _judged(self, row: Row, messages: list[Message], answers: list[str], ranks: tuple[int, ...]) -> Conversation:
        """`messages` with answers from better to worse, and the row's degree, margin or label."""
        columns = self.columns
        _refuse_answered(messages, "the compared ones")
        check_different(answers)
        comparison = Comparison(tuple(answers[1:]), ranks)
        if not self.lenient:
            if columns.degree:
                degrees = self.data.degrees
                degree = degree_of(self._fill(columns.degree, row), degrees, columns.degree)
                comparison = replace(comparison, degree=degree, margin=self.task.margins(degrees)[degree])
            if columns.margin:
                margin = number_of(row.values.get(columns.margin), columns.margin)
                if margin < 0:
                    raise ValueError(f"'{columns.margin}' contains {margin:g}: a margin is 0 or more")
                comparison = replace(comparison, margin=margin)
            if columns.label:
                comparison = replace(comparison, desirable=label_of(row.values.get(columns.label), columns.label))
        return Conversation([*messages, _answer(answers[0])], row.where, comparison=comparison)

    def _candidates(self, row: Row, name: str, messages: list[Message]) -> list[str]:
        """Several answers: texts, or messages."""
        values = row.values.get(name)
        least = 1 if self.lenient else 2
        if not isinstance(values, list) or len(values) < least:
            raise ValueError(f"'{name}' contains no list of {least} answers or more")
        answers = [self._answer_text(replace(row, values={name: value}), name, messages) for value in values]
        check_different(answers)  # named by their numbers in the file, so before ranking
        return answers

    def _answer_text(self, row: Row, name: str, messages: list[Message]) -> str:
        """An answer given as text, as one message, or as the last of several that begin like `messages`."""
        value = row.values.get(name)
        if isinstance(value, list) and value:
            if isinstance(value[-1], str):
                raise ValueError(
                    f"'{name}' contains a list of {len(value)} texts, one answer was expected; several answers of a "
                    "prompt are read with data.columns.candidates and data.columns.scores"
                )
            before = read_messages(value[:-1], name, self.keys) if len(value) > 1 else []
            prompt, repeated = ([(m["role"], message_text(m).strip()) for m in part] for part in (messages, before))
            if repeated and prompt[-len(repeated) :] != repeated:
                raise ValueError(f"the messages before the answer in '{name}' are not those of the prompt")
            value = value[-1]
        if isinstance(value, dict):
            turn = value if {"role", "from"} & set(value) else {"role": "assistant", **value}
            message = read_message(turn, 1, self.keys)
            if len(message) > 2 or message["role"] != "assistant":
                unusable = ", ".join(list(message)[2:]) or f"the role {message['role']}"
                raise ValueError(f"the answer in '{name}' has {unusable}: only the assistant's text can be used")
            return str(message["content"])
        answer = self._fill(name, row)
        if not answer.strip() and self.feedback is None:  # the other answer of a comparison may be empty
            raise ValueError(f"the answer in '{name}' is empty")
        return answer

    def _to_learn(self, messages: list[Message]) -> list[Message]:
        """`messages` up to the last answer that is learned; all of them for rows to predict."""
        check_turns(messages)
        if any((self.columns.chosen, self.columns.candidates, self.columns.response, self.lenient)):
            return messages
        answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        learned = [index for index in answers if "weight" not in messages[index]]
        if not learned:
            reason = " that is learned (each has weight 0)" if answers else ""
            raise ValueError(f"no message of the assistant{reason}, so there is nothing to learn")
        return messages[: learned[-1] + 1]


def prompt_of(data: DataConfig) -> Callable[[Row], str]:
    """A function from a row to its prompt as text, equal for all rows with the same prompt."""
    columns = data.columns
    templates = (columns.prompt, columns.input, columns.system, columns.messages, columns.text)
    names = [name for template in templates for name in names_in(template)]

    def prompt(row: Row) -> str:
        if names and not (columns.messages and columns.label and not columns.response):
            return stable_text([row.values.get(name) for name in names])
        whole = row.values.get(columns.messages or columns.chosen or "")
        if isinstance(whole, str):  # hh-rlhf: the text up to its last answer
            return whole.rpartition("\n\nAssistant:")[0]
        return stable_text(whole[:-1] if isinstance(whole, list) else whole)

    return prompt


def _answer(content: str) -> Message:
    return {"role": "assistant", "content": content}


def _refuse_answered(messages: list[Message], beside: str) -> None:
    """Raises ValueError for a prompt that has an answer already."""
    if messages[-1]["role"] == "assistant":
        raise ValueError(f"the conversation ends with an answer already, in addition to {beside}")


def _no_columns(unknown: dict[str, str], first: Row, used: set[str]) -> str:
    text = ". ".join(f"{key}: {missing_column(name, first.values, used)}" for key, name in unknown.items())
    text = text.replace("?. ", "? ")
    # In a file without a header a column's name may be a full text.
    text += f" (columns: {', '.join(name if len(name) <= 40 else f'{name[:39]}…' for name in first.values)})."
    if re.search(r"\.[ct]sv(\.\w+)?:", first.where.lower()):
        text += " A csv file without a header line needs its columns' names in data.csv_columns."
    return text


def _is_unique(rows: Sequence[Row], column: str) -> bool:
    """Whether every row has a different value in `column`."""
    values = [row.values.get(column) for row in rows]
    return None not in values and len({str(value) for value in values}) == len(values)
