"""Every key of a message is read, refused by name, or counted as unused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from llmft.config.data import Columns, DataConfig
from llmft.config.task import TaskConfig
from llmft.data.columns import ColumnMap, Conversation
from llmft.data.messages import message_text
from llmft.data.readers import Row

USER = {"role": "user", "content": "Q"}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"town": "Rome"}}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {}}}


def column_map() -> ColumnMap:
    data = DataConfig(name="d", files="f", columns=Columns(messages="m"))
    return ColumnMap(data, TaskConfig(name="text", objective="x"))


def read(*messages: Any, where: str = "f:1", **more: Any) -> Conversation:
    return column_map().conversation(Row({"m": list(messages), **more}, where))


def said(**keys: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": "A", **keys}


@pytest.mark.parametrize(
    "message",
    [
        said(content=None, tool_calls=[CALL]),
        said(content="", tool_calls=[{**CALL, "function": {"name": "weather", "arguments": '{"town": "Rome"}'}}]),
        said(content=None, tool_calls=json.dumps([CALL])),
        said(content=None, function_call={"name": "weather", "arguments": '{"town": "Rome"}'}),
        {"from": "function_call", "value": '{"name": "weather", "arguments": {"town": "Rome"}}'},
        {"from": "function_call", "value": '[{"name": "weather", "parameters": {"town": "Rome"}}]'},
        said(content=[{"type": "tool_use", "id": None, "name": "weather", "input": {"town": "Rome"}}]),
        said(content=[{"type": "tool_call", "value": '{"name": "weather", "arguments": {"town": "Rome"}}'}]),
    ],
)
def test_a_call_of_a_tool_is_the_same_in_every_spelling(message: dict[str, Any]) -> None:
    assert read(USER, message).messages[-1] == {"role": "assistant", "content": "", "tool_calls": [CALL]}


@pytest.mark.parametrize("role", ["tool", "function", "observation", "ipython"])
def test_a_tools_result_is_one_under_every_name_of_its_role(role: str) -> None:
    call = said(content=None, tool_calls=[CALL])
    row = read(USER, call, {"role": role, "content": "sunny", "tool_call_id": "c1", "name": "weather"}, said())
    assert row.messages[2] == {"role": "tool", "content": "sunny", "tool_call_id": "c1", "name": "weather"}


@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL]), [TOOL["function"]], TOOL])
def test_the_tools_of_a_row_are_the_same_in_every_spelling(tools: Any) -> None:
    assert read(USER, said(), tools=tools).tools == [TOOL]
    assert read({"role": "system", "content": "S", "tools": tools}, USER, said()).tools == [TOOL]
    assert read(USER, said(), tools="[]").tools is None


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_is_kept_apart_from_the_text(key: str) -> None:
    thoughtful = {"role": "assistant", "content": "A", "reasoning_content": "why"}
    assert read(USER, said(**{key: "why"})).messages[-1] == thoughtful
    parts = [{"type": "reasoning", "value": "why"}, {"type": "text", "text": "A"}]
    assert read(USER, said(content=parts)).messages[-1] == thoughtful
    assert message_text(thoughtful) == "A\nwhy"


@pytest.mark.parametrize("key", ["weight", "loss_weight", "train", "loss"])
def test_answers_with_weight_0_are_marked_and_others_are_as_they_were(key: str) -> None:
    wrong, right = said(**{key: 0}), said(**{key: 1})
    assert [m.get("weight") for m in read({**USER, key: 0.0}, wrong, USER, right).messages] == [None, 0, None, None]
    with pytest.raises(ValueError, match="nothing to learn"):
        read(USER, {**wrong, key: False})


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (said(weight=0.5), r"message 2 \(assistant\) has weight=0.5"),
        (said(weight=1, train=False), "both that it is learned"),
        (said(content=[{"type": "image_url", "image_url": {"url": "x"}}]), "type 'image_url': this is a text trainer"),
        (said(content=[{"type": "input_audio", "input_audio": {}}]), "type 'input_audio': this is a text trainer"),
        (said(content=[{"type": "video", "video": "x"}]), "type 'video': this is a text trainer"),
        (said(content=[{"type": "poem", "text": "x"}]), "part of type 'poem'; known are text"),
        (said(content=["A"]), "a part that is str"),
        (said(content={"text": "A"}), "contains dict, text or a list of parts"),
        (said(images=["x.png"]), "has 'images': this is a text trainer"),
        (said(audio={"id": "x"}), "has 'audio': this is a text trainer"),
        (said(refusal="No."), "has 'refusal'"),
        (said(reasoning="a", thinking="b"), "'reasoning' and 'thinking', which differ"),
        (said(value="B"), "'content' and 'value', which differ"),
        (said(tool_calls=[{"type": "function"}]), "a tool call without a name"),
        (
            said(tool_calls=[{"function": {"name": "f", "arguments": "town=Rome"}}]),
            "arguments that are not a JSON object",
        ),
        ({"role": "tool", "content": "sunny"}, "tool follows user"),
    ],
)
def test_what_cannot_be_used_is_refused_by_name(message: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        read(USER, message)


def test_a_row_beside_whose_messages_there_are_pictures_is_refused() -> None:
    with pytest.raises(ValueError, match="this is a text trainer"):
        read(USER, said(), images=["x.png"])
    with pytest.raises(ValueError, match="is not a list of tools"):
        read(USER, said(), tools=["hammer"])
    with pytest.raises(ValueError, match="only answers of the assistant are learned"):
        read({**USER, "weight": 1}, said())
    with pytest.raises(ValueError, match="which only the assistant has"):
        read({**USER, "reasoning": "why"}, said())


def test_keys_that_nothing_reads_are_counted_and_null_is_no_key() -> None:
    columns = column_map()
    parts = [{"type": "text", "text": "Q", "cache_control": {"type": "x"}, "image_url": None}]
    question = {"role": "user", "content": parts, "id": 1, "name": "Bo", "tool_calls": None}
    columns.conversation(Row({"m": [question, said(timestamp=3, audio=None)]}, "f:1"))
    assert dict(columns.keys.unused) == {"id": 1, "name": 1, "timestamp": 1, "content.cache_control": 1}
    assert dict(columns.keys.read) == {"role": 2, "content": 2, "content.text": 1}


def test_null_in_the_arguments_of_a_table_of_arrow_is_no_argument() -> None:
    call = {"type": "function", "function": {"name": "weather", "arguments": {"town": "Rome", "city": None}}}
    assert read(USER, said(tool_calls=[call]), where="f.parquet:row 1").messages[-1]["tool_calls"] == [CALL]
    assert read(USER, said(tool_calls=[call])).messages[-1]["tool_calls"] == [call]


def test_a_text_and_its_calls_in_messages_of_their_own_are_one_answer() -> None:
    call = {"from": "function_call", "value": json.dumps(CALL["function"])}
    row = read(USER, said(content="Let me look."), call, call, {"from": "observation", "value": "sunny"}, said())
    assert row.messages[1] == said(content="Let me look.", tool_calls=[CALL, CALL])


@pytest.mark.parametrize("key", ["mask", "masked", "loss_mask", "train_on_input", "ignore", "thoughts", "think"])
def test_a_key_about_what_is_thought_or_learned_is_read_or_refused(key: str) -> None:
    with pytest.raises(ValueError, match=f"has '{key}', which cannot be used"):
        read(USER, said(**{key: True}))
    with pytest.raises(ValueError, match=f"has '{key}', which cannot be used"):
        read(USER, said(content=[{"type": "text", "text": "A", key: True}]))
    assert read(USER, said(finish_reason="stop", **{key: None})).messages[-1] == said()


def test_a_conversation_ends_with_its_last_answer_that_is_learned() -> None:
    assert read(USER, said(), USER, said(content="BAD", weight=0)).messages == [USER, said()]
    with pytest.raises(ValueError, match="no message of the assistant that is learned"):
        read(USER, said(weight=0))


def test_what_a_message_lacks_is_said_with_the_keys_that_it_has() -> None:
    with pytest.raises(ValueError, match=r"message 1 has no role \(its keys: speaker, content\)"):
        read({"speaker": "user", "content": "Q"}, said())
    with pytest.raises(ValueError, match=r"no text \(its keys: role, message; known are content"):
        read({"role": "user", "message": "Q"}, said())
