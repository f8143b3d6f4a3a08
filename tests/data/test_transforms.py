from __future__ import annotations

from llmft.config.data import Transform
from llmft.data.columns import Conversation
from llmft.data.transforms import apply

SYSTEM = "Answer as a pirate."


def conversation() -> Conversation:
    def user(text: str) -> dict[str, str]:
        return {"role": "user", "content": text}

    def answer(text: str) -> dict[str, str]:
        return {"role": "assistant", "content": text}

    first = {"role": "system", "content": SYSTEM}
    turns = [user(f"{SYSTEM} Q1"), answer("A1"), user(f"{SYSTEM}\n\nQ2"), answer("A2"), user("Q3"), answer("A3")]
    return Conversation([first, *turns], "f:1")


def test_context_distillation_trains_the_answers_without_the_system_prompt() -> None:
    transformed = apply(Transform.context_distillation, conversation())
    assert [m["content"] for m in transformed.messages] == ["Q1", "A1", "Q2", "A2", "Q3", "A3"]
    assert transformed.trained_from == 0


def test_ghost_attention_keeps_the_instruction_in_the_first_turn_and_trains_the_last_answer_only() -> None:
    transformed = apply(Transform.ghost_attention, conversation())
    assert [m["content"] for m in transformed.messages] == [SYSTEM, f"{SYSTEM} Q1", "A1", "Q2", "A2", "Q3", "A3"]
    assert transformed.trained_from == 2


def test_without_a_system_prompt_or_a_transform_nothing_changes() -> None:
    plain = Conversation(conversation().messages[1:], "f:1")
    for transform in Transform:
        assert apply(transform, plain) is plain
    with_system = conversation()
    assert apply(Transform.none, with_system) is with_system
