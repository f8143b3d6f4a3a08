"""Properties of the generated English."""

import hashlib
import itertools
import json
import random
import re
from collections import Counter

import pytest

from llmft.data.synthetic import WRITERS, stories, writers

SPLITS = ("train", "validation", "test")
OPENINGS, DEGREES, JOININGS, ENDINGS = (
    "|".join(map(re.escape, values))
    for values in (
        ["Well,", "Oh,", "Now,", "Look,", "Yes,"],
        ["very", "quite", "rather", "too", "really"],
        ["and", "then", "but", "or", "&"],
        ["...", ".", "!", ";", " -"],
    )
)


def digest(rows: list[dict[str, str]]) -> str:
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]


def habits(text: str) -> tuple[set[str], ...]:
    """The values of the four habits that a text shows, each found anywhere in it."""
    patterns = (rf"({OPENINGS}) ", rf" was ({DEGREES}) ", rf" ({JOININGS}) ", rf"({ENDINGS})(?=\s|$)")
    return tuple(set(re.findall(pattern, text)) for pattern in patterns)


def in_common(text: str, writer: str) -> int:
    return sum(value in shown for value, shown in zip(WRITERS[writer], habits(text), strict=True))


def test_the_same_call_gives_these_rows_everywhere_whatever_the_global_state() -> None:
    for state in (0, 1):
        random.seed(state)
        assert digest(writers("train", 1000)) == "f1e4f1f7d1e0cd5d"
        assert digest(stories("train", 1000)) == "05b52591665affd1"


def test_seeds_and_splits_give_other_rows() -> None:
    for make in (writers, stories):
        assert len({digest(make(split, 50, seed)) for split in SPLITS[:2] for seed in range(3)}) == 6


def test_no_text_occurs_twice_nor_in_two_splits_whatever_their_seeds() -> None:
    texts = [[row["text"] for row in writers(split, 3000, seed)] for seed, split in enumerate(SPLITS)]
    assert all(len(set(rows)) == len(rows) for rows in texts)
    for one, other in itertools.combinations(texts, 2):
        assert not set(one) & set(other)


@pytest.mark.parametrize("num_rows", [0, 1, 20, 700])
def test_each_writer_has_as_many_rows_within_one(num_rows: int) -> None:
    counts = Counter(row["writer"] for row in writers("test", num_rows))
    assert counts.total() == num_rows
    assert max(counts[name] for name in WRITERS) - min(counts[name] for name in WRITERS) <= 1


def test_rows_are_shuffled() -> None:
    assert [row["writer"] for row in writers("train", 70)] != list(WRITERS) * 10


def test_any_two_writers_share_exactly_one_habit() -> None:
    for one, other in itertools.combinations(WRITERS.values(), 2):
        assert sum(a == b for a, b in zip(one, other, strict=True)) == 1


def test_a_text_shows_three_habits_of_its_writer_and_two_at_most_of_others_and_no_name() -> None:
    slips = 0
    for row in writers("train", 2000):
        text, writer = row["text"], row["writer"]
        assert all(len(shown) == 1 for shown in habits(text)), text
        assert in_common(text, writer) >= 3
        assert all(in_common(text, other) <= 2 for other in WRITERS if other != writer)
        assert not any(name in text for name in WRITERS)
        slips += in_common(text, writer) == 3
    assert 150 < slips < 250


def test_a_story_keeps_one_style_that_no_writer_nor_a_slip_of_theirs_has() -> None:
    for row in stories("train", 2000):
        story = row["text"].split("\n", 1)[1]
        assert all(len(shown) <= 1 for shown in habits(story)), story
        assert all(in_common(story, writer) <= 2 for writer in WRITERS)


def test_every_writer_is_a_character_in_stories() -> None:
    text = "\n".join(row["text"] for row in stories("train", 500))
    assert all(len(re.findall(rf"\b{name}\b", text)) > 20 for name in WRITERS)


@pytest.mark.parametrize("make", [writers, stories])
def test_an_unknown_split_is_refused_with_the_known_ones(make) -> None:
    with pytest.raises(ValueError, match=r"Unknown split 'dev' of the (writers|stories): there are train, "):
        make("dev", 1)
