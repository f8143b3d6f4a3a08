"""A column of messages to messages of one form, whoever wrote them: every key is read, refused by name, or counted.

Known are OpenAI's chat format, with tools, tool calls and typed parts; ShareGPT's `from` and `value`, with the roles of
LLaMA-Factory's tool data; and what reasoning models write their thoughts into. A message of ours has `role` (system,
user, assistant or tool) and `content` (text), and where the row has it: `reasoning_content`, `tool_calls`
(OpenAI's form, `arguments` an object), `tool_call_id` and `name` of a tool's result, `weight` 0 for an answer that is
not learned, and `input`, Alpaca's second text.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass, field
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
# Dropping these would change what a conversation says or what of it is learned, and nothing here can read them.
REFUSED = re.compile(r"refus|reasoning|think|thought|train|learn|loss|mask|weight|ignore", re.IGNORECASE)


@dataclass
class Keys:
    """The keys of messages and of their parts, by how many messages have each: those that are read and those not."""

    read: Counter[str] = field(default_factory=Counter)
    unused: Counter[str] = field(default_factory=Counter)


def text_of(message: Message) -> str:
    """All that a message says, as one text."""
    parts = [message["content"], message.get("input"), message.get("reasoning_content")]
    parts += [json.dumps(call["function"], ensure_ascii=False) for call in message.get("tool_calls", ())]
    return "\n".join([parts[0], *(part for part in parts[1:] if part is not None)])


def read_messages(turns: Any, column: str, keys: Keys) -> list[Message]:
    """The messages in `column`. Raises ValueError saying what is wrong with one of them."""
    turns = _parsed(turns)
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"column '{column}' holds no list of messages")
    if all(isinstance(turn, str) for turn in turns):  # LIMA: plain texts that take turns
        turns = [{"role": ("user", "assistant")[place % 2], "content": turn} for place, turn in enumerate(turns)]
    messages: list[Message] = []
    for number, turn in enumerate(turns, start=1):
        message = read_message(turn, number, keys)
        last = messages[-1] if messages else None
        calls = message.get("tool_calls")
        # ShareGPT has a call, and each of several, in a message behind the text that it belongs to.
        if last and calls and message["role"] == last["role"] and not message["content"] and _shared(last, message):
            last["tool_calls"] = [*last.get("tool_calls", ()), *calls]
        else:
            messages.append(message)
    return messages


def _shared(one: Message, two: Message) -> bool:
    return one.get("weight") == two.get("weight") and "reasoning_content" not in two


def read_message(turn: Any, number: int, keys: Keys) -> Message:
    """One message. Raises ValueError naming its number, and the key that cannot be used."""
    if not isinstance(turn, dict):
        raise ValueError(f"message {number} is {type(turn).__name__}, an object was expected")
    given = {key: value for key, value in turn.items() if value is not None}  # columns of Arrow fill up with null
    known = {"role", "from", *CONTENT, *REASONING, *WEIGHTS, "tool_calls", "function_call"}
    role = _one(given, ("role", "from"), number)
    if role is None:
        raise ValueError(f"message {number} has no role (its keys: {', '.join(turn)})")
    if not isinstance(role, str) or role not in ROLES:
        raise ValueError(f"message {number} has the role '{role}'; known are {', '.join(sorted(ROLES))}")
    what = f"message {number} ({role})"
    known |= {"tool": {"name", "tool_call_id"}, "system": set(TOOLS if number == 1 else ())}.get(ROLES[role], set())
    message: Message = {"role": ROLES[role], "content": _one(given, CONTENT, number)}
    assistant = message["role"] in ("assistant", "call")
    if message["role"] == "call":
        message |= {"role": "assistant", "content": "", "tool_calls": _calls(message["content"], what)}
    if isinstance(message["content"], list):
        _read_parts(message, what, keys)
    for key, value in given.items():
        media = key.removesuffix("s").removesuffix("_url")
        if media in MEDIA and value not in EMPTY:
            raise ValueError(f"{what} has '{key}': this is a text trainer, leave rows with {media} out")
        if key in (*REASONING, "tool_calls", "function_call") and value not in EMPTY and not assistant:
            raise ValueError(f"{what} has '{key}', which only the assistant has")
        _count(key, value, key in known, what, keys)
    reasoning = _one({key: given[key] for key in REASONING if given.get(key) not in ("", None)}, REASONING, number)
    if reasoning is not None:
        if not isinstance(reasoning, str) or message.get("reasoning_content", reasoning) != reasoning:
            raise ValueError(f"{what} holds reasoning that is no text, or two that differ")
        message["reasoning_content"] = reasoning
    calls = _calls(given.get("tool_calls"), what) + _calls(given.get("function_call"), what)
    if calls:
        message["tool_calls"] = [*message.get("tool_calls", ()), *calls]
    if message["role"] == "tool":
        message |= {key: str(given[key]) for key in ("name", "tool_call_id") if key in given}
        if isinstance(message["content"], (dict, list)):
            message["content"] = json.dumps(message["content"], ensure_ascii=False)
    weight = _weight(given, what)
    if weight and not assistant:
        raise ValueError(f"{what} has a weight: only answers of the assistant are learned")
    if weight == 0 and assistant:
        message["weight"] = 0
    if message["content"] is None and message.get("tool_calls"):
        message["content"] = ""
    content = message["content"]
    if not isinstance(content, str | None):
        raise ValueError(f"{what} holds {type(content).__name__}, text or a list of parts was expected")
    if content is None or not (content.strip() or message["role"] != "assistant" or "tool_calls" in message):
        hint = "" if set(CONTENT) & set(turn) else f" (its keys: {', '.join(turn)}; known are {', '.join(CONTENT)})"
        raise ValueError(f"{what} has no text{hint}")
    return message


def _count(key: str, value: Any, used: bool, what: str, keys: Keys, prefix: str = "") -> None:
    """Notes a key as read or not. Raises ValueError for one that must not be passed over."""
    if not used and REFUSED.search(key) and value not in EMPTY:
        raise ValueError(
            f"{what} has '{key}', which cannot be used: leave it out, or the row (known are {', '.join(REASONING)}; "
            f"{', '.join(WEIGHTS)}: 1 for an answer that is learned, 0 for one that is not)"
        )
    (keys.read if used else keys.unused)[prefix + key] += 1


def _one(given: dict[str, Any], names: tuple[str, ...], number: int) -> Any:
    """The value under one of `names`; two that differ are refused."""
    values = [given[name] for name in names if name in given]
    if any(value != values[0] for value in values[1:]):
        raise ValueError(f"message {number} has {' and '.join(repr(n) for n in names if n in given)}, which differ")
    return values[0] if values else None


def _weight(given: dict[str, Any], what: str) -> int | None:
    """1 or 0, whether an answer is learned; None where the message does not say."""
    weight = None
    for key in WEIGHTS:
        value = given.get(key)
        if value is None:
            continue
        if not isinstance(value, (bool, int, float)) or value not in (0, 1):
            raise ValueError(f"{what} has {key}={value!r}: 1 (learned) and 0 (not learned) are known")
        if weight is not None and weight != int(value):
            raise ValueError(f"{what} says both that it is learned and that it is not")
        weight = int(value)
    return weight


def _read_parts(message: Message, what: str, keys: Keys) -> None:
    """Typed parts: their text, and what an assistant thinks and calls."""
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[Message] = []
    if message["role"] == "tool" and not all(isinstance(part, dict) and "type" in part for part in message["content"]):
        return  # a result that is a list
    for part in message["content"]:
        if not isinstance(part, dict):
            raise ValueError(f"{what} has a part that is {type(part).__name__}, an object was expected")
        part = {key: value for key, value in part.items() if value is not None}
        kind = str(part.pop("type", "text" if "text" in part else next(iter(part), "nothing")))
        media = next((name for name in MEDIA if name in kind), None)
        if media:
            raise ValueError(f"{what} has a part of type '{kind}': this is a text trainer, leave rows with {media} out")
        simple = kind.removeprefix("input_").removeprefix("output_")
        if simple in ("text", "reasoning", "thinking", "think"):
            names = ("text", "value", "content", *((simple, "thinking", "reasoning") if simple != "text" else ()))
            text = next((part[name] for name in names if isinstance(part.get(name), str)), None)
            if text is None:
                raise ValueError(f"{what} has a part of type '{kind}' without text")
            if simple != "text" and message["role"] != "assistant":
                raise ValueError(f"{what} has a part of type '{kind}', which only the assistant has")
            (texts if simple == "text" else thoughts).append(text)
            read: tuple[str, ...] = tuple(name for name in names if part.get(name) == text)
        elif kind in ("tool_call", "tool_use", "function_call") and message["role"] == "assistant":
            call = part.get("value", {**part, "arguments": part["input"]} if "input" in part else part)
            calls += _calls(call, what)
            read = ("value", "id", "name", "arguments", "input", "function")
        else:
            raise ValueError(f"{what} has a part of type '{kind}'; known are text, reasoning and tool_call")
        for key, value in part.items():
            _count(key, value, key in read, what, keys, "content.")
    message["content"] = "".join(texts)
    if thoughts:
        message["reasoning_content"] = "".join(thoughts)
    if calls:
        message["tool_calls"] = calls


def _parsed(value: Any) -> Any:
    """JSON that stands in a text, as csv files and ShareGPT have it; else the value."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


def _calls(value: Any, what: str) -> list[Message]:
    """Calls of tools in OpenAI's form; of a call, a list of them, or either as JSON."""
    value = _parsed(value)
    if value in EMPTY:
        return []
    calls = []
    for call in value if isinstance(value, list) else [value]:
        call = _parsed(call)
        function = call.get("function", call) if isinstance(call, dict) else None
        if isinstance(function, str) and isinstance(call, dict):
            function = {**call, "name": function}
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(function, dict) or not isinstance(name, str) or not name:
            raise ValueError(f"{what} has a call of a tool without a name: {json.dumps(call, default=str)[:80]}")
        arguments = _parsed(next((function[key] for key in ("arguments", "parameters") if key in function), None))
        if arguments in (None, ""):
            arguments = {}
        if not isinstance(arguments, dict):
            raise ValueError(f"{what} calls {name} with arguments that are no JSON object: {str(arguments)[:80]}")
        made: Message = {"type": "function", "function": {"name": name, "arguments": arguments}}
        if call.get("id") is not None:
            made = {"id": str(call["id"]), **made}
        calls.append(made)
    return calls


def read_tools(values: dict[str, Any], turns: Any) -> list[Message] | None:
    """The tools that a row offers beside its messages, or in its system message, in OpenAI's form."""
    turns = _parsed(turns)
    first = turns[0] if isinstance(turns, list) and turns and isinstance(turns[0], dict) else {}
    first = first if ROLES.get(str(first.get("role", first.get("from")))) == "system" else {}
    given = [(name, _parsed(source.get(name))) for source in (values, first) for name in TOOLS]
    given = [(name, tools) for name, tools in given if tools not in EMPTY]
    if not given:
        return None
    name, tools = given[0]
    if any(other != tools for _, other in given[1:]):
        raise ValueError(f"the row names its tools twice, in '{name}' and '{given[1][0]}', and they differ")
    made = []
    for tool in tools if isinstance(tools, list) else [tools]:
        tool = _parsed(tool)
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError(f"'{name}' holds no list of tools with a name each (JSON, as OpenAI writes them)")
        made.append(tool if "function" in tool else {"type": "function", "function": function})
    return made


def check_turns(messages: list[Message]) -> None:
    """Raises ValueError for turns that no template writes: tools answer calls, and user and assistant take turns."""
    before = "system"
    for message in messages:
        role = message["role"]
        if role == "system":
            continue
        follows = {"user": ("system", "assistant"), "assistant": ("user", "tool"), "tool": ("assistant", "tool")}
        if before not in follows[role]:
            raise ValueError(
                f"user and assistant must take turns, starting with user; here {role} follows "
                f"{'nothing' if before == 'system' else before}"
            )
        before = role


def without_null(value: Any) -> Any:
    """`value` without the keys that Arrow's tables fill with null, where other rows have them."""
    if isinstance(value, dict):
        return {key: without_null(entry) for key, entry in value.items() if entry is not None}
    return [without_null(entry) for entry in value] if isinstance(value, list) else value
