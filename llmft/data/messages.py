"""Messages in the common chat formats to one form. Every key is read, refused by name, or counted as unused.

Known are OpenAI's chat format with tools, tool calls and typed parts; ShareGPT's `from` and `value` with the roles of
LLaMA-Factory's tool data; and the reasoning fields of reasoning models. A message here has `role` (system, user,
assistant or tool) and `content` (text). It may have `reasoning_content`, `tool_calls` (OpenAI's form, with `arguments`
as an object), `tool_call_id` and `name` of a tool's result, `weight` 0 for an answer that is not learned, and `input`,
the second text of Alpaca.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

Message = dict[str, Any]

ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "bot", "chatgpt"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("tool", "function", "observation", "ipython", "tool_response", "tool_result"), "tool"),
    **dict.fromkeys(("function_call", "tool_call", "tool_calls"), "call"),
}  # fmt: skip
CONTENT = ("content", "value", "parts")
REASONING = ("reasoning_content", "reasoning", "thinking")
WEIGHTS = ("weight", "loss_weight", "train", "training", "trainable", "loss")
TOOLS = ("tools", "functions")
EMPTY: tuple[Any, ...] = (None, "", [], {})
MEDIA = ("image", "audio", "video", "file", "document")
# Ignoring these keys would change what a conversation says or which answers are learned, so they are refused.
REFUSED = re.compile(r"refus|reasoning|think|thought|train|learn|loss|mask|weight|ignore", re.IGNORECASE)


@dataclass
class Keys:
    """How many messages or parts have each key, for keys that are read and for those that are not."""

    read: Counter[str] = field(default_factory=Counter)
    unused: Counter[str] = field(default_factory=Counter)


def message_text(message: Message) -> str:
    """All texts of a message as one."""
    parts = [message["content"], message.get("input"), message.get("reasoning_content")]
    parts += [json.dumps(call["function"], ensure_ascii=False) for call in message.get("tool_calls", ())]
    return "\n".join([parts[0], *(part for part in parts[1:] if part is not None)])


def read_messages(turns: Any, column: str, keys: Keys) -> list[Message]:
    """The messages in `column`. Raises ValueError that says which message is wrong and why."""
    turns = _parse_json(turns)
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"column '{column}' contains no list of messages")
    if all(isinstance(turn, str) for turn in turns):  # LIMA: a list of texts, user and assistant in turn
        turns = [{"role": ("user", "assistant")[index % 2], "content": turn} for index, turn in enumerate(turns)]
    messages: list[Message] = []
    for number, turn in enumerate(turns, start=1):
        message = read_message(turn, number, keys)
        previous = messages[-1] if messages else None
        calls = message.get("tool_calls") or []
        # ShareGPT puts each call into a message of its own, after the text that it belongs to.
        continues = previous is not None and calls and not message["content"] and "reasoning_content" not in message
        if previous and continues and all(message.get(key) == previous.get(key) for key in ("role", "weight")):
            previous["tool_calls"] = [*previous.get("tool_calls", ()), *calls]
        else:
            messages.append(message)
    return messages


def read_message(turn: Any, number: int, keys: Keys) -> Message:
    """One message. Raises ValueError with its number and the key that cannot be used."""
    if not isinstance(turn, dict):
        raise ValueError(f"message {number} is {type(turn).__name__}, an object was expected")
    values = {key: value for key, value in turn.items() if value is not None}  # Arrow fills missing keys with null
    known = {"role", "from", *CONTENT, *REASONING, *WEIGHTS, "tool_calls", "function_call"}
    role = _single(values, ("role", "from"), number)
    if role is None:
        raise ValueError(f"message {number} has no role (its keys: {', '.join(turn)})")
    if not isinstance(role, str) or role not in ROLES:
        raise ValueError(f"message {number} has the role '{role}'; known are {', '.join(sorted(ROLES))}")
    label = f"message {number} ({role})"
    known |= {"tool": {"name", "tool_call_id"}, "system": set(TOOLS if number == 1 else ())}.get(ROLES[role], set())
    message: Message = {"role": ROLES[role], "content": _single(values, CONTENT, number)}
    assistant = message["role"] in ("assistant", "call")
    if message["role"] == "call":
        message |= {"role": "assistant", "content": "", "tool_calls": _calls(message["content"], label)}
    if isinstance(message["content"], list):
        _read_parts(message, label, keys)
    for key, value in values.items():
        medium = key.removesuffix("s").removesuffix("_url")
        if medium in MEDIA and value not in EMPTY:
            raise ValueError(f"{label} has '{key}': this is a text trainer, leave rows with {medium} out")
        if key in (*REASONING, "tool_calls", "function_call") and value not in EMPTY and not assistant:
            raise ValueError(f"{label} has '{key}', which only the assistant has")
        _count(key, value, key in known, label, keys)
    reasoning = _single({key: values[key] for key in REASONING if values.get(key) not in ("", None)}, REASONING, number)
    if reasoning is not None:
        if not isinstance(reasoning, str) or message.get("reasoning_content", reasoning) != reasoning:
            raise ValueError(f"{label} has reasoning that is not text, or two that differ")
        message["reasoning_content"] = reasoning
    calls = _calls(values.get("tool_calls"), label) + _calls(values.get("function_call"), label)
    if calls:
        message["tool_calls"] = [*message.get("tool_calls", ()), *calls]
    if message["role"] == "tool":
        message |= {key: str(values[key]) for key in ("name", "tool_call_id") if key in values}
        if isinstance(message["content"], (dict, list)):
            message["content"] = json.dumps(message["content"], ensure_ascii=False)
    weight = _weight(values, label)
    if weight and not assistant:
        raise ValueError(f"{label} has a weight, but only answers of the assistant are learned")
    if weight == 0 and assistant:
        message["weight"] = 0
    if message["content"] is None and message.get("tool_calls"):
        message["content"] = ""
    content = message["content"]
    if not isinstance(content, str | None):
        raise ValueError(f"{label} contains {type(content).__name__}, text or a list of parts was expected")
    if content is None or not (content.strip() or message["role"] != "assistant" or "tool_calls" in message):
        hint = "" if set(CONTENT) & set(turn) else f" (its keys: {', '.join(turn)}; known are {', '.join(CONTENT)})"
        raise ValueError(f"{label} has no text{hint}")
    return message


def _count(key: str, value: Any, is_read: bool, label: str, keys: Keys, prefix: str = "") -> None:
    """Counts a key as read or unused. Raises ValueError for a key that must not be ignored."""
    if not is_read and REFUSED.search(key) and value not in EMPTY:
        raise ValueError(
            f"{label} has '{key}', which cannot be used: leave out the key or the row (known are "
            f"{', '.join(REASONING)}; {', '.join(WEIGHTS)}: 1 for an answer that is learned, 0 for one that is not)"
        )
    (keys.read if is_read else keys.unused)[prefix + key] += 1


def _single(values: dict[str, Any], keys: tuple[str, ...], number: int) -> Any:
    """The value under any of `keys`. Raises ValueError for two that differ."""
    candidates = [values[name] for name in keys if name in values]
    if any(value != candidates[0] for value in candidates[1:]):
        raise ValueError(f"message {number} has {' and '.join(repr(n) for n in keys if n in values)}, which differ")
    return candidates[0] if candidates else None


def _weight(values: dict[str, Any], label: str) -> int | None:
    """1 for an answer that is learned, 0 for one that is not, None where the message does not say."""
    weights = {key: values[key] for key in WEIGHTS if values.get(key) is not None}
    for key, value in weights.items():
        if not isinstance(value, (bool, int, float)) or value not in (0, 1):
            raise ValueError(f"{label} has {key}={value!r}: 1 (learned) and 0 (not learned) are known")
    if len({int(value) for value in weights.values()}) > 1:
        raise ValueError(f"{label} says both that it is learned and that it is not")
    return next(map(int, weights.values()), None)


def _read_parts(message: Message, label: str, keys: Keys) -> None:
    """Replaces a list of typed parts by text, reasoning and tool calls."""
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[Message] = []
    if message["role"] == "tool" and not all(isinstance(part, dict) and "type" in part for part in message["content"]):
        return  # the tool returned a list
    for part in message["content"]:
        if not isinstance(part, dict):
            raise ValueError(f"{label} has a part that is {type(part).__name__}, an object was expected")
        part = {key: value for key, value in part.items() if value is not None}
        kind = str(part.pop("type", "text" if "text" in part else next(iter(part), "nothing")))
        if any(medium in kind for medium in MEDIA):
            raise ValueError(f"{label} has a part of type '{kind}': this is a text trainer; leave the row out")
        part_type = kind.removeprefix("input_").removeprefix("output_")
        if part_type in ("text", "reasoning", "thinking", "think"):
            names = ("text", "value", "content", *((part_type, "thinking", "reasoning") if part_type != "text" else ()))
            text = next((part[name] for name in names if isinstance(part.get(name), str)), None)
            if text is None:
                raise ValueError(f"{label} has a part of type '{kind}' without text")
            if part_type != "text" and message["role"] != "assistant":
                raise ValueError(f"{label} has a part of type '{kind}', which only the assistant has")
            (texts if part_type == "text" else thoughts).append(text)
            used: tuple[str, ...] = tuple(name for name in names if part.get(name) == text)
        elif kind in ("tool_call", "tool_use", "function_call") and message["role"] == "assistant":
            call = part.get("value", {**part, "arguments": part["input"]} if "input" in part else part)
            calls += _calls(call, label)
            used = ("value", "id", "name", "arguments", "input", "function")
        else:
            raise ValueError(f"{label} has a part of type '{kind}'; known are text, reasoning and tool_call")
        for key, value in part.items():
            _count(key, value, key in used, label, keys, "content.")
    message["content"] = "".join(texts)
    if thoughts:
        message["reasoning_content"] = "".join(thoughts)
    if calls:
        message["tool_calls"] = calls


def _parse_json(value: Any) -> Any:
    """The parsed value of a text that is JSON, as in csv files and ShareGPT; any other value as it is."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


def _calls(value: Any, label: str) -> list[Message]:
    """Tool calls in OpenAI's form, from one call or a list of them, parsed or as JSON text."""
    value = _parse_json(value)
    if value in EMPTY:
        return []
    calls = []
    for call in value if isinstance(value, list) else [value]:
        call = _parse_json(call)
        function = call.get("function", call) if isinstance(call, dict) else None
        if isinstance(function, str) and isinstance(call, dict):
            function = {**call, "name": function}
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(function, dict) or not isinstance(name, str) or not name:
            raise ValueError(f"{label} has a tool call without a name: {json.dumps(call, default=str)[:80]}")
        arguments = _parse_json(next((function[key] for key in ("arguments", "parameters") if key in function), None))
        if arguments in (None, ""):
            arguments = {}
        if not isinstance(arguments, dict):
            raise ValueError(f"{label} calls {name} with arguments that are not a JSON object: {str(arguments)[:80]}")
        parsed: Message = {"type": "function", "function": {"name": name, "arguments": arguments}}
        if call.get("id") is not None:
            parsed = {"id": str(call["id"]), **parsed}
        calls.append(parsed)
    return calls


def read_tools(values: dict[str, Any], turns: Any) -> list[Message] | None:
    """The tools of a row in OpenAI's form, from its own columns or its system message; None where it has none."""
    turns = _parse_json(turns)
    first = turns[0] if isinstance(turns, list) and turns and isinstance(turns[0], dict) else {}
    first = first if ROLES.get(str(first.get("role", first.get("from")))) == "system" else {}
    candidates = [(name, _parse_json(source.get(name))) for source in (values, first) for name in TOOLS]
    candidates = [(name, tools) for name, tools in candidates if tools not in EMPTY]
    if not candidates:
        return None
    name, tools = candidates[0]
    if any(other != tools for _, other in candidates[1:]):
        raise ValueError(f"the row names its tools twice, in '{name}' and '{candidates[1][0]}', and they differ")
    parsed = []
    for tool in tools if isinstance(tools, list) else [tools]:
        tool = _parse_json(tool)
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError(f"'{name}' is not a list of tools in OpenAI's form, each with a name")
        parsed.append(tool if "function" in tool else {"type": "function", "function": function})
    return parsed


def check_turns(messages: list[Message]) -> None:
    """Raises ValueError unless user and assistant take turns and tool results follow the assistant."""
    follows = {"user": ("nothing", "assistant"), "assistant": ("user", "tool"), "tool": ("assistant", "tool")}
    roles = [message["role"] for message in messages if message["role"] != "system"]
    for previous, role in pairwise(["nothing", *roles]):
        if previous not in follows[role]:
            raise ValueError(f"user and assistant must take turns, starting with user; here {role} follows {previous}")


def drop_nulls(value: Any) -> Any:
    """`value` without null entries, which Arrow adds for keys that other rows have."""
    if isinstance(value, dict):
        return {key: drop_nulls(entry) for key, entry in value.items() if entry is not None}
    return [drop_nulls(entry) for entry in value] if isinstance(value, list) else value
