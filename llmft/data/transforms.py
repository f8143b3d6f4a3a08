"""What may be done to conversations before they are rendered (Llama 2, arXiv:2307.09288, sections 3.3 and 4.2)."""

from __future__ import annotations

from dataclasses import replace

from llmft.config.sections import Transform
from llmft.data.columns import Conversation, Message


def apply(transform: Transform, conversation: Conversation) -> Conversation:
    """`conversation` as `data.transform` wants it; one without a system prompt is left as it is."""
    if transform is Transform.none or not conversation.messages or conversation.messages[0]["role"] != "system":
        return conversation
    system, *turns = conversation.messages
    if transform is Transform.context_distillation:
        # Answers that were made with a system prompt are learned without it.
        return replace(conversation, messages=_without(turns, system["content"], first=0))
    # Ghost attention: the instruction stands before the first turn only, and only the last answer is learned.
    answers = sum(message["role"] == "assistant" for message in turns)
    turns = _without(turns, system["content"], first=1)
    return replace(conversation, messages=[system, *turns], trained_from=max(0, answers - 1))


def _without(turns: list[Message], instruction: str, *, first: int) -> list[Message]:
    """`turns` whose user messages, from number `first` on, no longer begin with `instruction`."""
    made, number = [], 0
    for message in turns:
        content = message["content"]
        if message["role"] == "user":
            if number >= first and content.startswith(instruction) and content != instruction:
                content = content[len(instruction) :].lstrip()
            number += 1
        made.append({**message, "content": content})
    return made
