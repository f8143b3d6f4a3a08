"""Duplicates and leaks are counted as in a comparison of every pair of rows."""

from __future__ import annotations

import csv
import random
import subprocess
import sys
from pathlib import Path

import pytest

from llmft.data.columns import Conversation
from llmft.data.overlap import Overlap, find_overlaps, shingles, words


def row(prompt: str, answer: str = "", where: str = "f:1", target: int | None = None) -> Conversation:
    messages = [{"role": "user", "content": prompt}]
    return Conversation([*messages, {"role": "assistant", "content": answer}] if answer else messages, where, target)


def split(name: str, *rows: tuple[str, str]) -> list[Conversation]:
    return [row(prompt, answer, f"{name}:{line}") for line, (prompt, answer) in enumerate(rows, start=1)]


def between(overlaps: list[Overlap], first: str, second: str) -> Overlap:
    (one,) = [overlap for overlap in overlaps if (overlap.first, overlap.second) == (first, second)]
    return one


LONG = " ".join(f"word{n}" for n in range(60))


def test_every_kind_of_copy_is_counted_once_and_shown_with_its_places() -> None:
    splits = {
        "train": split("a", ("Who?", "Ann"), ("Where?", "Here"), (LONG, "yes"), ("Who?", "Ann"), ("Who?", "Ben")),
        "validation": split("b", ("Who? ", " Ann\n"), ("Where?", "There"), (LONG + " more", "yes"), ("who?", "ann")),
        "test": split("c", ("What?", "That")),
    }
    overlaps = find_overlaps(splits)
    pairs = [("train", "train"), ("train", "validation"), ("train", "test"), ("validation", "test")]
    assert [(overlap.first, overlap.second) for overlap in overlaps] == pairs
    within, leak, *none = overlaps
    assert (within.exact, within.exact_prompts, within.near, within.looked_at) == (1, 2, 0, 5)
    assert within.examples == [("a:1", "a:4"), ("a:1", "a:5")]
    # "who? ann" differs in case only: no exact copy, but near.
    assert (leak.exact, leak.exact_prompts, leak.near, leak.looked_at) == (1, 2, 2, 4)
    assert leak.examples == [("a:1", "b:1"), ("a:3", "b:3"), ("a:1", "b:4"), ("a:2", "b:2")]
    assert all(
        (overlap.exact, overlap.exact_prompts, overlap.near, overlap.examples) == (0, 0, 0, []) for overlap in none
    )


def test_near_duplicates_are_not_looked_for_when_not_asked_for() -> None:
    overlaps = find_overlaps({"train": split("a", (LONG, "x"), (LONG + " y", "x"))}, near=False)
    assert overlaps == [Overlap("train", "train", 0, 0, None, 0, [])]


def test_empty_splits_and_empty_texts_have_nothing_in_common() -> None:
    assert find_overlaps({"train": [], "validation": split("b", ("Q", "A")), "test": []}) == []
    blank = [Conversation([{"role": "user", "content": ""}, {"role": "assistant", "content": " "}], "f:1")]
    (_, leak) = find_overlaps({"train": blank, "validation": split("b", ("", "A"))})
    assert (leak.exact, leak.exact_prompts, leak.near) == (0, 0, 0)


def test_a_text_with_another_class_is_the_same_prompt_and_no_copy() -> None:
    splits = {"train": [row("text", target=0)], "validation": [row("text", target=1), row("text", target=0)]}
    leak = between(find_overlaps(splits, near=False), "train", "validation")
    assert (leak.exact, leak.exact_prompts) == (1, 2)


def test_the_prompt_of_a_conversation_is_all_before_its_last_answer_and_inputs_count() -> None:
    def chat(*texts: str, extra: str = "") -> Conversation:
        roles = ("user", "assistant")
        messages = [{"role": roles[position % 2], "content": text} for position, text in enumerate(texts)]
        messages[0] |= {"input": extra} if extra else {}
        return Conversation(messages, "f:1")

    splits = {
        "train": [chat("Q1", "A1", "Q2", "A2"), chat("Q", "A", extra="x")],
        "validation": [chat("Q1", "A1", "Q2", "other"), chat("Q1", "A2"), chat("Q", "A", extra="y"), chat("Q", "A")],
    }
    leak = between(find_overlaps(splits, near=False), "train", "validation")
    assert (leak.exact, leak.exact_prompts) == (0, 1)


def test_a_shared_system_message_makes_no_near_duplicates() -> None:
    def conversation(text: str) -> Conversation:
        return Conversation([{"role": "system", "content": LONG}, {"role": "user", "content": text}], "f:1")

    (within,) = find_overlaps({"train": [conversation("one two three four"), conversation("five six seven eight")]})
    assert within.near == 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [("", 0), (" \n", 0), ("one", 1), ("one two", 1), ("a b c", 1), ("a b c d", 2), ("我们去学校", 3)],
)
def test_shingles_are_runs_of_three_words_or_the_whole_of_a_shorter_text(text: str, expected: int) -> None:
    assert len(shingles(text)) == expected


def test_words_are_lower_case_and_marks_stand_alone() -> None:
    assert words("Don't  STOP, x_1+2!") == ["don", "'", "t", "stop", ",", "x_1", "+", "2", "!"]
    assert words("GPT用中文") == ["gpt", "用", "中", "文"]


def runs(text: str) -> set[tuple[str, ...]]:
    words_of_text = text.lower().split()
    return {tuple(words_of_text[start : start + 3]) for start in range(len(words_of_text) - 2)}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.8, 0.9])
def test_near_duplicates_are_those_of_brute_force(seed: int, threshold: float) -> None:
    rng = random.Random(seed)

    def text() -> list[str]:
        return [f"w{rng.randrange(500)}" for _ in range(rng.randint(20, 60))]

    originals = [text() for _ in range(60)]
    changed = []
    for original in originals * 3:
        copy = list(original)
        for _ in range(rng.randrange(5)):
            copy[rng.randrange(len(copy))] = f"new{rng.randrange(10**6)}"
        changed.append(copy)
    train = [row(" ".join(words)) for words in [*originals, *(text() for _ in range(100))]]
    validation = [row(" ".join(words)) for words in changed]
    overlaps = find_overlaps({"train": train, "validation": validation}, threshold=threshold)

    def expected(first: list[Conversation], second: list[Conversation], within: bool) -> int:
        near = 0
        sets = [runs(one.messages[0]["content"]) for one in first]
        for index, two in enumerate(second):
            mine = runs(two.messages[0]["content"])
            shares = [len(mine & its) / len(mine | its) for its in (sets[:index] if within else sets)]
            near += any(share >= threshold for share in shares) and 1.0 not in shares
        return near

    assert between(overlaps, "train", "train").near == expected(train, train, True) == 0
    leak = between(overlaps, "train", "validation")
    truth = expected(train, validation, False)
    assert truth > 0
    assert 0.97 * truth - 1 <= leak.near <= truth  # no false ones, few missed
    alone = find_overlaps({"train": validation}, threshold=threshold)[0]
    assert alone.near <= expected(validation, validation, True)


def test_of_a_large_split_a_sample_is_looked_at_the_same_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmft.data.overlap.MAX_ROWS", 50)
    texts = [" ".join(f"w{(number * 31 + position) % 997}" for position in range(30)) for number in range(200)]
    splits = {
        "train": [row(text, where=f"a:{number}") for number, text in enumerate(texts)],
        "validation": [row(text + " more", where=f"b:{number}") for number, text in enumerate(texts)],
    }
    overlaps = find_overlaps(splits)
    leak = between(overlaps, "train", "validation")
    assert (leak.near, leak.looked_at) == (50, 50)
    assert leak.examples != [(f"a:{number}", f"b:{number}") for number in range(5)]
    assert find_overlaps(splits) == overlaps


def test_near_duplicates_are_found_among_many_rows_of_one_template(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(0)

    def text() -> str:
        return f"{LONG} {' '.join(f'w{rng.randrange(10**6)}' for _ in range(60))}"

    monkeypatch.setattr("llmft.data.overlap.MAX_IN_BUCKET", 10)
    originals = [text() for _ in range(600)]
    leaked = [row(f"{original} more") for original in originals[-100:]]
    overlaps = find_overlaps({"train": [row(one) for one in originals], "validation": leaked})
    assert between(overlaps, "train", "train").near == 0
    assert (between(overlaps, "train", "validation").near or 0) >= 98


def test_rows_that_are_all_alike_do_not_take_for_ever() -> None:
    rng = random.Random(0)
    train = [row(f"{LONG} {rng.random()}") for _ in range(1500)]
    (within,) = find_overlaps({"train": train})
    assert within.near == 1499


def test_the_module_loads_no_heavy_library() -> None:
    code = "import sys, llmft.data.overlap; print([m for m in ('datasketch', 'scipy', 'torch') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_a_random_split_of_seven_answers_to_a_question_leaks_its_prompts(shared_data: Path) -> None:
    file = shared_data / "classification" / "predict_llm7_alpacaeval_train.csv"
    if not file.is_file():
        pytest.skip(f"{file} is not here")
    with file.open(encoding="utf-8", newline="") as handle:
        rows = [
            row(values["Question"], values["Response"], f"{file.name}:{number}", int(values["target"]))
            for number, values in enumerate(csv.DictReader(handle), start=2)
        ]
    questions = set(list(dict.fromkeys(one.messages[0]["content"] for one in rows))[:200])
    rows = [one for one in rows if one.messages[0]["content"] in questions]
    random.Random(0).shuffle(rows)
    leak = between(find_overlaps({"train": rows[500:], "validation": rows[:500]}), "train", "validation")
    assert leak.exact_prompts > 450
    assert leak.exact < 10
    assert leak.near is not None
    assert leak.near > 0
    assert len(leak.examples) == 5
    grouped = sorted(rows, key=lambda one: one.messages[0]["content"])
    start = next(index for index in range(500, 600) if grouped[index].messages[0] != grouped[index - 1].messages[0])
    overlap = between(find_overlaps({"train": grouped[start:], "validation": grouped[:start]}), "train", "validation")
    assert (overlap.exact, overlap.exact_prompts) == (0, 0)
