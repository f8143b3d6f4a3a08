"""Transforms of conversations before rendering (Llama 2, arXiv:2307.09288, sections 3.3 and 4.2)."""

from __future__ import annotations

from dataclasses import replace

from llmft.config.data import Transform
from llmft.data.columns import Conversation, Message


def apply(transform: Transform, conversation: Conversation) -> Conversation:
    """Applies data.transform; a conversation without a system prompt stays as it is."""
    if transform is Transform.none or not conversation.messages or conversation.messages[0]["role"] != "system":
        return conversation
    system, *turns = conversation.messages
    if transform is Transform.context_distillation:
        # Answers made with a system prompt are learned without it.
        return replace(conversation, messages=_without(turns, system["content"], first=0))
    # Ghost attention: only the first turn has the instruction, and only the last answer is learned.
    answers = sum(message["role"] == "assistant" for message in turns)
    turns = _without(turns, system["content"], first=1)
    return replace(conversation, messages=[system, *turns], trained_from=max(0, answers - 1))


def _without(turns: list[Message], instruction: str, *, first: int) -> list[Message]:
    """`turns` without `instruction` at the beginning of user messages, from number `first` on."""
    messages, user_turn = [], 0
    for message in turns:
        content = message["content"]
        if message["role"] == "user":
            if user_turn >= first and content.startswith(instruction) and content != instruction:
                content = content[len(instruction) :].lstrip()
            user_turn += 1
        messages.append({**message, "content": content})
    return messages
