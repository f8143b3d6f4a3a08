"""Tool calls in the forms that chat templates expect."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

from llmft.data.messages import Message


def call_form(turn: Message, name: str, empty_content: str | None, as_json: bool, short_ids: bool) -> Message:
    """`turn` with its tool calls in one form.

    `empty_content` replaces an empty text next to calls, `as_json` writes arguments as JSON text, `short_ids` shortens
    ids to nine characters. `name` is the id of a result without one.
    """

    def short_id(name: str) -> str:
        return name if len(name) == 9 and name.isalnum() else hashlib.sha256(name.encode()).hexdigest()[:9]

    if turn["role"] == "tool":
        return {**turn, "tool_call_id": short_id(turn.get("tool_call_id", name))} if short_ids else turn
    if "tool_calls" not in turn:
        return turn
    calls = []
    for number, call in enumerate(turn["tool_calls"]):
        converted = {**call, "function": dict(call["function"])}
        if as_json:
            converted["function"]["arguments"] = json.dumps(converted["function"]["arguments"], ensure_ascii=False)
        if short_ids:
            converted["id"] = short_id(call.get("id", f"call{number}"))
        calls.append(converted)
    return {**turn, "content": turn["content"] or empty_content, "tool_calls": calls}


def has_python_arguments(turns: list[Message], text: str) -> bool:
    """Whether `text` contains the arguments of a call as a Python literal instead of JSON."""
    arguments = [call["function"]["arguments"] for turn in turns for call in turn.get("tool_calls", ())]
    return any(str(value) in text and str(value) != json.dumps(value, ensure_ascii=False) for value in arguments)


def with_placeholders(value: Any, words: Iterator[str], used: list[str]) -> Any:
    """`value` with every text replaced by one of `words`; keys and numbers stay."""
    if isinstance(value, dict):
        return {key: with_placeholders(entry, words, used) for key, entry in value.items()}
    if isinstance(value, list):
        return [with_placeholders(entry, words, used) for entry in value]
    if isinstance(value, str):
        used.append(next(words))
        return used[-1]
    return value
