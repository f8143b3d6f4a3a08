from __future__ import annotations

import pytest

from llmft.config import BadRow, Columns, DataConfig
from llmft.data.columns import ColumnMap
from llmft.data.sources import Problems, Row
from llmft.errors import ConfigError, DataError


def convert(columns: Columns, **values: object) -> list[dict[str, str]]:
    return ColumnMap(columns).conversation(Row(dict(values), "f:1")).messages


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
        ({"q": "Q", "r": {"a": 1}}, "holds dict"),
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
    problems = Problems(BadRow.skip)
    rows = [Row({"q": "Q", "r": "A"}, "f:1"), Row({"q": "Q", "r": ""}, "f:2")]
    assert len(ColumnMap(Columns(prompt="q", response="r")).conversations(rows, problems)) == 1
    assert problems.rejected == [{"where": "f:2", "reason": "the answer is empty", "row": {"q": "Q", "r": ""}}]
    assert problems.reasons() == {"the answer is empty": 1}


def test_a_column_that_is_not_there_is_named_with_those_that_are() -> None:
    rows = [Row({"question": "Q", "answer": "A"}, "f.csv:2")]
    data = DataConfig(name="d", files="f.csv", columns=Columns(prompt="quetsion", response="answer"))
    with pytest.raises(DataError, match=r"no column 'quetsion'; did you mean question\? \(columns: question, answer\)"):
        ColumnMap.of(data, rows)
    with pytest.raises(ConfigError, match=r"maps no columns.*question, answer"):
        ColumnMap.of(DataConfig(name="d", files="f.csv"), rows)
    with pytest.raises(ConfigError, match=r"data\.columns\.response"):
        ColumnMap.of(DataConfig(name="d", files="f.csv", columns=Columns(prompt="question")), rows)


def test_classes_are_the_sorted_targets_of_the_training_rows() -> None:
    rows = [Row({"t": "x", "y": label}, "f:1") for label in ("b", "a", "b")]
    made = ColumnMap.of(DataConfig(name="d", files="f", columns=Columns(text="t", target="y")), rows)
    assert made.labels == ["a", "b"]
    assert made.conversation(rows[0]).target == 1
    with pytest.raises(ValueError, match="not among the classes"):
        made.conversation(Row({"t": "x", "y": "c"}, "f:9"))


def test_preference_pairs_end_in_the_chosen_answer_and_keep_the_rejected_one() -> None:
    columns = Columns(prompt="p", chosen="c", rejected="r")
    made = ColumnMap(columns).conversation(Row({"p": "Q", "c": "good", "r": "bad"}, "f:1"))
    assert made.messages[-1] == {"role": "assistant", "content": "good"}
    assert made.rejected == "bad"
    sharegpt = Columns(messages="m", chosen="c", rejected="r")
    turns = [{"from": "human", "value": "Q"}]
    values = {"m": turns, "c": {"from": "gpt", "value": "good"}, "r": {"from": "gpt", "value": "bad"}}
    made = ColumnMap(sharegpt).conversation(Row(values, "f:1"))
    assert [message["content"] for message in made.messages] == ["Q", "good"]
    assert made.rejected == "bad"
    with pytest.raises(ValueError, match="ends with an answer already"):
        ColumnMap(sharegpt).conversation(Row({**values, "m": [*turns, {"from": "gpt", "value": "A"}]}, "f:1"))
    with pytest.raises(ValueError, match="'c' is empty"):
        ColumnMap(columns).conversation(Row({"p": "Q", "c": " ", "r": "bad"}, "f:1"))


def test_numbers_and_booleans_are_text_and_not_a_number_is_empty() -> None:
    assert convert(Columns(prompt="q", response="r"), q=1.5, r=False)[1]["content"] == "False"
    with pytest.raises(ValueError, match="not a number"):
        convert(Columns(prompt="q", response="r"), q="Q", r=float("nan"))
