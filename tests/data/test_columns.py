from __future__ import annotations

import contextlib
import datetime
from dataclasses import replace
from decimal import Decimal
from itertools import combinations
from typing import Any

import pytest

from llmft.config.data import BadRow, Columns, DataConfig
from llmft.config.task import Head, TaskConfig, TaskType
from llmft.core.errors import ConfigError, DataError
from llmft.data.columns import ColumnMap
from llmft.data.readers import BadRows, Row


def mapped(columns: Columns) -> ColumnMap:
    return ColumnMap(DataConfig(name="d", files="f", columns=columns), HEADS["text"])


def convert(columns: Columns, **values: object) -> list[dict[str, str]]:
    return mapped(columns).conversation(Row(dict(values), "f:1")).messages


def test_alpaca_prompt_response_messages_and_text_become_messages() -> None:
    user, answer = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
    alpaca = Columns(prompt="instruction", input="input", response="output")
    assert convert(alpaca, instruction="Q", input="", output="A") == [user, answer]
    assert convert(alpaca, instruction="Q", input="I", output="A") == [{**user, "input": "I"}, answer]
    assert convert(Columns(prompt="{a}-{b}", response="r"), a="1", b=2, r=True)[0]["content"] == "1-2"
    assert convert(Columns(messages="m"), m=[user, answer]) == [user, answer]
    sharegpt = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]
    assert convert(Columns(messages="m"), m=sharegpt) == [user, answer]
    assert convert(Columns(messages="m"), m=["Q", "A"]) == [user, answer]
    parts = [{"role": "user", "content": [{"type": "text", "text": "Q"}]}, answer]
    assert convert(Columns(messages="m"), m=parts) == [user, answer]
    assert convert(Columns(text="t"), t="A") == [answer]
    system = convert(Columns(prompt="q", response="r", system="s"), q="Q", r="A", s="S")
    assert [message["role"] for message in system] == ["system", "user", "assistant"]


def test_a_question_without_an_answer_at_the_end_is_left_out() -> None:
    turns = [
        {"role": "user", "content": "Q"},
        {"role": "assistant", "content": "A"},
        {"role": "user", "content": "Q2"},
    ]
    assert len(convert(Columns(messages="m"), m=turns)) == 2


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"q": "Q", "r": ""}, "answer is empty"),
        ({"q": "Q", "r": "  \n"}, "answer is empty"),
        ({"q": "Q", "r": None}, "column 'r' is empty"),
        ({"q": "Q", "r": {"a": 1}}, "contains dict"),
        ({"q": "Q"}, "no column 'r'"),
    ],
)
def test_a_bad_row_says_why(values: dict, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        convert(Columns(prompt="q", response="r"), **values)


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ([], "no list of messages"),
        ("text", "no list of messages"),
        ([{"role": "user", "content": "Q"}], "nothing to learn"),
        ([{"role": "assistant", "content": "A"}], "take turns"),
        ([{"role": "user", "content": "Q"}, {"role": "user", "content": "Q"}], "take turns"),
        ([{"role": "tool", "content": "Q"}], "take turns"),
        ([{"role": "narrator", "content": "Q"}], "has the role 'narrator'"),
        ([{"role": "user", "content": "Q"}, {"role": "assistant", "content": " "}], "has no text"),
        ([1], "an object was expected"),
        (["Q"], "nothing to learn"),
    ],
)
def test_bad_messages_say_why(turns: object, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        convert(Columns(messages="m"), m=turns)


def test_bad_rows_go_to_the_problems_with_their_place() -> None:
    problems = BadRows(BadRow.skip)
    rows = [Row({"q": "Q", "r": "A"}, "f:1"), Row({"q": "Q", "r": ""}, "f:2")]
    assert len(mapped(Columns(prompt="q", response="r")).conversations(rows, problems)) == 1
    assert problems.rejected == [{"where": "f:2", "reason": "the answer is empty", "row": {"q": "Q", "r": ""}}]
    assert problems.reasons() == {"the answer is empty": 1}


def test_a_column_that_is_not_there_is_named_with_those_that_are() -> None:
    rows = [Row({"question": "Q", "answer": "A"}, "f.csv:2")]
    data = DataConfig(name="d", files="f.csv", columns=Columns(prompt="quetsion", response="answer"))
    with pytest.raises(DataError, match=r"no column 'quetsion'; did you mean question\? \(columns: question, answer\)"):
        ColumnMap.of(data, rows, HEADS["text"])
    with pytest.raises(ConfigError, match=r"maps no columns.*question, answer"):
        ColumnMap.of(DataConfig(name="d", files="f.csv"), rows, HEADS["text"])
    with pytest.raises(ConfigError, match=r"data\.columns\.response"):
        ColumnMap.of(DataConfig(name="d", files="f.csv", columns=Columns(prompt="question")), rows, HEADS["text"])


def test_classes_are_the_sorted_targets_of_the_training_rows() -> None:
    rows = [Row({"t": "x", "y": label}, "f:1") for label in ("b", "a", "b")]
    config = DataConfig(name="d", files="f", columns=Columns(text="t", target="y"))
    columns = ColumnMap.of(config, rows, HEADS["classes"])
    assert columns.labels == ["a", "b"]
    assert columns.conversation(rows[0]).target == 1
    with pytest.raises(ValueError, match="not among the classes"):
        columns.conversation(Row({"t": "x", "y": "c"}, "f:9"))


def test_preference_pairs_end_in_the_chosen_answer() -> None:
    columns = Columns(prompt="p", chosen="c", rejected="r")
    conversation = mapped(columns).conversation(Row({"p": "Q", "c": "good", "r": "bad"}, "f:1"))
    assert conversation.messages[-1] == {"role": "assistant", "content": "good"}
    sharegpt = Columns(messages="m", chosen="c", rejected="r")
    turns = [{"from": "human", "value": "Q"}]
    values = {"m": turns, "c": {"from": "gpt", "value": "good"}, "r": {"from": "gpt", "value": "bad"}}
    conversation = mapped(sharegpt).conversation(Row(values, "f:1"))
    assert [message["content"] for message in conversation.messages] == ["Q", "good"]
    with pytest.raises(ValueError, match="ends with an answer already"):
        mapped(sharegpt).conversation(Row({**values, "m": [*turns, {"from": "gpt", "value": "A"}]}, "f:1"))
    with pytest.raises(ValueError, match="'c' is empty"):
        mapped(columns).conversation(Row({"p": "Q", "c": " ", "r": "bad"}, "f:1"))


def test_numbers_and_booleans_are_text_and_not_a_number_is_empty() -> None:
    assert convert(Columns(prompt="q", response="r"), q=1.5, r=False)[1]["content"] == "False"
    with pytest.raises(ValueError, match="not a number"):
        convert(Columns(prompt="q", response="r"), q="Q", r=float("nan"))


KEYS = ("prompt", "input", "response", "system", "messages", "text", "target", "id", "chosen", "rejected",
        "degree", "margin")  # fmt: skip
HEADS = {
    "text": TaskConfig(name="generation", objective="x"),
    "classes": TaskConfig(name="classification", head=Head.linear),
}


def marked_rows(without_answer: bool) -> list[Row]:
    """Two rows in which each column's value names the column."""
    rows = []
    for number in range(2):
        values: dict[str, Any] = {key: f"<{key}> {number}" for key in KEYS}
        turns = [{"role": "user", "content": values["messages"]}, {"role": "assistant", "content": "said"}]
        rows.append(Row({**values, "messages": turns[:1] if without_answer else turns}, f"f:{number}"))
    return rows


def outcome(keys: tuple[str, ...], task: TaskConfig, without_answer: bool) -> str:
    """The used parts of a row as one text; or the sentence of its refusal."""
    rows = marked_rows(without_answer)
    data = DataConfig(name="d", files="f", columns=Columns(**{key: key for key in keys}))
    try:
        columns = ColumnMap.of(data, rows, task)
        conversation = columns.conversation(rows[1])
    except (ConfigError, DataError, ValueError) as error:
        return f"refused: {error}"
    named = columns.targets.name(conversation.target) if columns.targets is not None else ""
    unread = " ".join(f"<{name}> 1" for name in columns.usage(rows)["not_read"])
    return f"{conversation.messages} {named} {conversation.id}; told as not read: {unread}"


@pytest.mark.parametrize("task", HEADS)
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_a_named_column_is_used_or_refused(task: str, size: int) -> None:
    for keys in combinations(KEYS, size):
        for without_answer in (True, False):
            result = outcome(keys, HEADS[task], without_answer)
            if not result.startswith("refused: "):
                assert [key for key in keys if f"<{key}> 1" not in result] == [], (keys, result)
            elif "turns" not in result and "nothing to learn" not in result and "answer already" not in result:
                assert "data.columns" in result, (keys, result)


@pytest.mark.parametrize("task", HEADS)
def test_one_column_may_stand_under_two_keys(task: str) -> None:
    rows = marked_rows(True)
    for one, two in combinations(KEYS, 2):
        data = DataConfig(name="d", files="f", columns=Columns(**{"prompt": "prompt", one: "text", two: "text"}))
        with contextlib.suppress(ConfigError, DataError):
            ColumnMap.of(data, rows, HEADS[task])
    same = DataConfig(name="d", files="f", columns=Columns(prompt="prompt", response="target", target="target"))
    assert "<target> 0" in str(ColumnMap.of(same, rows, HEADS["text"]).conversation(rows[0]).messages)
    assert ColumnMap.of(same, rows, HEADS["classes"]).labels == ["<target> 0", "<target> 1"]


@pytest.mark.parametrize(
    ("task", "keys"),
    [
        ("text", ("prompt", "input", "system", "response", "id")),
        ("text", ("prompt", "system", "target")),
        ("text", ("prompt", "chosen", "rejected", "system")),
        ("text", ("text", "input", "system", "response")),
        ("text", ("text", "chosen", "rejected")),
        ("text", ("text",)),
        ("text", ("messages", "system", "response")),
        ("text", ("messages", "system", "chosen", "rejected")),
        ("classes", ("prompt", "input", "system", "target")),
        ("classes", ("prompt", "response")),
        ("classes", ("text", "input", "system", "target", "id")),
        ("classes", ("messages", "system", "target")),
    ],
)
def test_what_goes_together_is_used(task: str, keys: tuple[str, ...]) -> None:
    assert not outcome(keys, HEADS[task], True).startswith("refused"), outcome(keys, HEADS[task], True)


def test_a_last_question_is_answered_by_the_response_column_and_never_left_out() -> None:
    row = marked_rows(True)[0]
    conversation = mapped(Columns(messages="messages", response="response", system="system")).conversation(row)
    assert [(m["role"], m["content"]) for m in conversation.messages] == [
        ("system", "<system> 0"),
        ("user", "<messages> 0"),
        ("assistant", "<response> 0"),
    ]
    with pytest.raises(ValueError, match="ends with an answer already"):
        mapped(Columns(messages="messages", response="response")).conversation(marked_rows(False)[0])


def test_two_system_prompts_that_differ_are_refused_by_row() -> None:
    turns = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "Q"},
        {"role": "assistant", "content": "A"},
    ]
    columns = Columns(messages="m", system="s")
    assert convert(columns, m=turns, s="S ") == convert(columns, m=turns, s=None) == convert(columns, m=turns, s=" ")
    assert convert(columns, m=turns[1:], s="S")[0] == turns[0]
    with pytest.raises(ValueError, match="column 's' and the conversation's own system message differ"):
        convert(columns, m=turns, s="T")


def test_a_mistyped_column_is_an_error_and_only_a_data_options_own_may_be_missing() -> None:
    rows = [Row({"prompt": "Q", "response": "A", "system_prompt": "S", "context": "C"}, "f.jsonl:1")]
    columns = Columns(prompt="prompt", response="response", input="contxt", system="sytem_prompt")
    with pytest.raises(DataError) as error:
        ColumnMap.of(DataConfig(name="d", files="f", columns=columns), rows, HEADS["text"])
    for words in ("no column 'sytem_prompt'; did you mean system_prompt?", "no column 'contxt'; did you mean context?"):
        assert words in str(error.value)
    assert "csv" not in str(error.value)
    with pytest.raises(DataError, match=r"no column 'a'; choose from .*?\. data\.columns\.system: no column"):
        ColumnMap.of(DataConfig(name="d", files="f", columns=replace(columns, input="a")), rows, HEADS["text"])
    optional = DataConfig(
        name="d",
        files="f",
        columns=Columns(prompt="prompt", input="input", response="response"),
        optional_columns=["input"],
    )
    column_map = ColumnMap.of(optional, rows, HEADS["text"])
    assert len(column_map.conversation(rows[0]).messages) == 2
    assert column_map.usage(rows) == {
        "read": {"prompt": ["prompt"], "response": ["response"]},
        "not_read": ["system_prompt", "context"],
        "left_out": ["input"],
    }
    optional.columns.input = "inptu"
    with pytest.raises(DataError, match=r"data\.columns\.input: no column 'inptu'"):
        ColumnMap.of(optional, rows, HEADS["text"])


def test_a_column_that_some_rows_lack_makes_those_rows_bad_and_no_others() -> None:
    full, bare = {"q": "Q", "i": "I", "s": "S", "r": "A"}, {"q": "Q", "r": "A"}
    data = DataConfig(name="d", files="f", columns=Columns(prompt="q", input="i", system="s", response="r"))
    for first, second in ((full, bare), (bare, full)):
        rows = [Row(first, "f:1"), Row(second, "f:2")]
        problems = BadRows(BadRow.skip)
        assert len(ColumnMap.of(data, rows, HEADS["text"]).conversations(rows, problems)) == 1
        assert problems.rejected[0]["where"] == ("f:2" if second is bare else "f:1")
        assert "no column 'i'" in problems.rejected[0]["reason"]


def test_the_hint_on_csv_headers_is_given_for_csv_files_alone() -> None:
    data = DataConfig(name="d", files="f", columns=Columns(prompt="qu", response="r"))
    for where, hinted in (("a.csv:2", True), ("a.tsv.gz:2", True), ("a.jsonl:1", False), ("a.csv.d/b.json:1", False)):
        with pytest.raises(DataError) as error:
            ColumnMap.of(data, [Row({"q": "Q", "r": "A"}, where)], HEADS["text"])
        assert ("data.csv_columns" in str(error.value)) is hinted, where


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (datetime.date(2024, 2, 1), "2024-02-01"),
        (datetime.datetime(2024, 2, 1, 3, 4), "2024-02-01T03:04:00"),
        (Decimal("12.50"), "12.50"),
        (Decimal("1E+3"), "1000"),
        (7, "7"),
        (b"x", None),
        ([1], None),
        ({"a": 1}, None),
        (datetime.timedelta(1), None),
        (float("inf"), None),
        (float("-inf"), None),
        (Decimal("NaN"), None),
    ],
)
def test_a_value_is_plain_text_or_refused(value: object, text: str | None) -> None:
    columns = Columns(prompt="q", response="r")
    if text is not None:
        assert convert(columns, q=value, r=value)[0]["content"] == text
        return
    with pytest.raises(ValueError, match=r"text was expected|not a finite number"):
        convert(columns, q=value, r="A")


def test_templates_take_names_with_dots_and_colons_and_say_what_is_wrong_with_braces() -> None:
    conversation = convert(Columns(prompt="{a.b} {c: d} {{x}}", response="r"), **{"a.b": 1, "c: d": 2, "r": "A"})
    assert conversation[0]["content"] == "1 2 {x}"
    rows = [Row({"a": "x", "r": "A"}, "f:1")]
    for template in ("{a", "a}{"):
        data = DataConfig(name="d", files="f", columns=Columns(prompt=template, response="r"))
        with pytest.raises(ConfigError, match=r"data\.columns\.prompt=.*brace"):
            ColumnMap.of(data, rows, HEADS["text"])
    data = DataConfig(name="d", files="f", columns=Columns(prompt="{a.b} text", response="r"))
    with pytest.raises(DataError, match=r"data\.columns\.prompt: no column 'a\.b'"):
        ColumnMap.of(data, rows, HEADS["text"])


def test_ids_must_tell_the_rows_of_every_split_apart() -> None:
    rows = [Row({"q": "Q", "r": "A", "id": n}, f"f:{n}") for n in range(3)]
    data = DataConfig(name="d", files="f", columns=Columns(prompt="q", response="r"))
    assert ColumnMap.of(data, rows, HEADS["text"], test=rows[:1]).id == "id"
    lacking = [Row({"q": "Q", "r": "A"}, "t:1")]
    assert ColumnMap.of(data, rows, HEADS["text"], test=lacking).id is None
    data.columns.id = "id"
    with pytest.raises(DataError, match=r"data\.columns\.id=id"):
        ColumnMap.of(data, rows, HEADS["text"], test=lacking)


def test_a_row_may_lack_an_optional_column_that_others_have() -> None:
    full, bare = Row({"q": "Q", "i": "I", "c": "C", "r": "A"}, "f:1"), Row({"q": "Q", "c": "C", "r": "A"}, "f:2")
    columns = Columns(prompt="q", input="i", response="r")
    data = DataConfig(name="d", files="f", columns=columns, optional_columns=["i"])
    columns_of_both = ColumnMap.of(data, [full, bare], HEADS["text"])
    first_messages = [c.messages[0] for c in columns_of_both.conversations([full, bare], BadRows())]
    assert first_messages == [{"role": "user", "content": "Q", "input": "I"}, {"role": "user", "content": "Q"}]
    data.columns.input = "{i} {c}"  # of a template that has another column nothing is left out
    with pytest.raises(DataError, match=r"f:2: no column 'i'.*data\.optional_columns=\[i\]"):
        ColumnMap.of(data, [full, bare], HEADS["text"]).conversations([full, bare], BadRows())
    with pytest.raises(DataError, match=r"data\.columns\.input: no column 'i'"):
        ColumnMap.of(data, [bare], HEADS["text"])


@pytest.mark.parametrize(
    ("task", "keys", "sentence"),
    [
        ("language_modeling", {"labels": ["a", "b"]}, "has no classes"),
        ("regression", {"labels": ["a", "b"]}, "has no classes"),
        ("single_label", {"labels": ["a", "b", "a"]}, "names 'a' twice"),
        ("single_label", {"target_separator": ";"}, "would not be used"),
        ("multi_label", {"target_columns": ["a", "a"]}, "names 'a' twice"),
        ("multi_label", {"target_columns": ["a", "b"], "target_separator": ";"}, "would not be used"),
    ],
)
def test_a_key_about_classes_is_used_or_refused(task: str, keys: dict[str, Any], sentence: str) -> None:
    head = None if task == "language_modeling" else Head.linear
    problem = TaskType(task) if head else TaskType.single_label
    config = TaskConfig(name=task, head=head, problem=problem, objective=None if head else "x")
    columns = Columns(text="t", target=None if "target_columns" in keys else "y")
    with pytest.raises(ConfigError, match=sentence):
        ColumnMap.of(
            DataConfig(name="d", files="f", columns=columns, **keys), [Row({"t": "T", "y": "a"}, "f:1")], config
        )
