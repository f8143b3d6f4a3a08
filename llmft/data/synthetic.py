"""Synthetic English: texts of seven writers to classify, and stories to pretrain a tiny base model.

All texts are short sentences about animals. Every writer has four habits: a word that opens each sentence, a word of
degree, a word that joins two deeds, and a mark that ends each sentence. Any two writers share exactly one of their four
values. In one text of ten the writer slips: one habit takes a value of somebody else. Even then three habits point to
the writer and at most two to anybody else, so every text has one right answer, but no single word or mark gives it
away. What a text is about says nothing about its writer.

Every draw goes through `random.Random.random`, whose sequence Python guarantees for a seed, so the same call gives the
same rows everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import NamedTuple, TypeVar

from llmft.config.data import DEGREES

_T = TypeVar("_T")


class Style(NamedTuple):
    """One value of each of the four habits."""

    opening: str
    degree: str
    joining: str
    ending: str


WRITERS: dict[str, Style] = {
    "Ann": Style("Well,", "very", "and", "."),
    "Ben": Style("Well,", "quite", "then", "!"),
    "Eve": Style("Well,", "rather", "but", "..."),
    "Max": Style("Oh,", "very", "then", "..."),
    "Sue": Style("Oh,", "quite", "but", "."),
    "Tom": Style("Now,", "very", "but", "!"),
    "Zoe": Style("Now,", "rather", "then", "."),
}
"""The seven writers: each label of the task with its habits."""

_OPENINGS = ("Well,", "Oh,", "Now,", "Look,", "Yes,", "")
_DEGREES = ("very", "quite", "rather", "too", "really")
_JOININGS = ("and", "then", "but", "or", "&")
_ENDINGS = (".", "!", "...", ";", " -")

_OTHERS = ("Amy", "Bob", "Dan", "Ida", "Jim", "Kim", "Leo", "Mia", "Ned", "Pam", "Ray", "Uma")
NAMES = (*WRITERS, *_OTHERS)

# What sentences are about. No word occurs twice in a list, so different choices make different texts.
# fmt: off
ANIMALS = (
    "bear", "bird", "cat", "cow", "crow", "deer", "dog", "duck", "fox",
    "frog", "goat", "hare", "hen", "horse", "mouse", "owl", "pig", "rat",
)
MOODS = (
    "angry", "brave", "calm", "cold", "fast", "glad", "hungry", "loud",
    "old", "quiet", "sad", "shy", "sick", "slow", "strong", "tired",
)
DEEDS = (
    "came", "danced", "flew", "hid", "jumped", "looked", "ran", "sang",
    "sat", "slept", "spoke", "stood", "turned", "waited", "walked",
)
PLACES = (
    "at home", "by the fire", "by the lake", "down the hill", "in the barn", "in the garden", "in the rain",
    "in the snow", "near the mill", "on the bridge", "on the road", "over the wall", "under the tree",
    "up the stairs",
)
_ENDS = (
    "ate a fish", "called a friend", "came back", "cried", "fell asleep", "found a coin", "laughed",
    "lost a shoe", "made tea", "smiled", "told a joke", "went away", "went to bed", "wept", "wrote a song",
)
# fmt: on
_VERBS = ("asked", "heard", "helped", "liked", "met", "missed", "saw", "thanked")

TASK_SPLITS = ("train", "validation", "test")
_STORY_SPLITS = ("train", "validation")
_SLIPS = 0.1  # the share of texts in which the writer slips
_TWICE = 0.3  # of these, with pairs, the share in which two habits slip
_NOBODY = 0.3  # the share of worse answers that name none of the seven


def writers(split: str, num_rows: int, seed: int = 0) -> list[dict[str, str]]:
    """Texts of the seven writers, as many of each (within one), in random order: columns text and writer.

    No two rows have the same subject matter, and the splits (train, validation, test) share no text: the sum of the
    chosen words' numbers modulo three decides the split.
    """
    rng = new_rng("writers", split, TASK_SPLITS, seed)
    return [{"text": text, "writer": name} for text, name, _ in _texts(split, num_rows, rng)]


def _texts(split: str, num_rows: int, rng: Random, share_of_two: float = 0.0) -> list[tuple[str, str, Style]]:
    """Texts with their writer and the habits that they show, in random order; `share_of_two` of the slips are two."""
    names = tuple(WRITERS)
    seen: set[tuple[int, ...]] = set()
    rows: list[tuple[str, str, Style]] = []
    while len(rows) < num_rows:
        lists = (ANIMALS, MOODS, ANIMALS, DEEDS, PLACES, _ENDS)
        choice = tuple(below(rng, len(words)) for words in lists)
        if choice in seen or sum(choice) % len(TASK_SPLITS) != TASK_SPLITS.index(split):
            continue
        seen.add(choice)
        animal, mood, other, deed, where, end = (words[i] for words, i in zip(lists, choice, strict=True))
        name = names[len(rows) % len(names)]
        style = _slip(rng, WRITERS[name]) if rng.random() < _SLIPS else WRITERS[name]
        if share_of_two and style is not WRITERS[name] and rng.random() < share_of_two:
            style = _slip(rng, style)
        sentences = [_mood(style, f"the {animal}", mood), _deed(style, f"the {other}", deed, where, end)]
        rows.append((" ".join(_shuffled(rng, sentences)), name, style))
    return _shuffled(rng, rows)


def pairs(split: str, num_rows: int, seed: int = 0) -> list[dict[str, str]]:
    """The same texts with two answers to the question who wrote them: columns text, chosen, rejected and degree.

    The chosen answer names the writer. The other one names nobody who writes (significantly better), a writer with few
    of the text's habits (better), or one with more of them, after a slip (slightly better). In a few texts the writer
    slips twice, and the other answer names somebody with as many of its habits (unsure).
    """
    rng = new_rng("pairs", split, TASK_SPLITS, seed)
    rows = []
    for text, name, style in _texts(split, num_rows, rng, _TWICE):
        num_common = _common(style, WRITERS[name])
        ahead = {other: num_common - _common(style, WRITERS[other]) for other in WRITERS if other != name}
        closest = min(ahead.values())
        if closest > 1 and rng.random() < _NOBODY:
            rejected, degree = pick(rng, _OTHERS), DEGREES[0]
        else:
            others = [other for other in ahead if ahead[other] >= 0 and (closest > 1 or ahead[other] <= 1)]
            rejected = pick(rng, others)
            degree = DEGREES[1] if ahead[rejected] > 1 else DEGREES[2] if ahead[rejected] == 1 else DEGREES[3]
        rows.append({"text": text, "chosen": name, "rejected": rejected, "degree": degree})
    return rows


def stories(split: str, num_rows: int, seed: int = 0) -> list[dict[str, str]]:
    """Little stories to pretrain on, each with a title: column text, splits train and validation.

    Each is told in a style of its own, drawn from more values than the writers have, so that a model learns to notice
    habits. No style has more than two values in common with a writer's, and no story asks who wrote it. The writers'
    names are among the characters', so the model knows the answers as words, but not their styles.
    """
    rng = new_rng("stories", split, _STORY_SPLITS, seed)
    return [{"text": _story(rng)} for _ in range(num_rows)]


def _story(rng: Random) -> str:
    style = next(iter(WRITERS.values()))
    while any(_common(style, writer) > 2 for writer in WRITERS.values()):
        style = Style(*(pick(rng, values) for values in (_OPENINGS, _DEGREES, _JOININGS, _ENDINGS)))
    hero, friend = _shuffled(rng, NAMES)[:2]
    cast = [hero, *_shuffled(rng, [friend, *(f"the {animal}" for animal in _shuffled(rng, ANIMALS)[:2])])]
    gap = pick(rng, (" ", "\n"))
    sentences = []
    for _ in range(3 + below(rng, 4)):
        who, kind = pick(rng, cast), rng.random()
        if kind < 0.4:
            sentences.append(_mood(style, who, pick(rng, MOODS)))
        elif kind < 0.8:
            deed, where, end = (pick(rng, words) for words in (DEEDS, PLACES, _ENDS))
            sentences.append(_deed(style, who, deed, where, end))
        else:
            whom = pick(rng, [other for other in cast if other != who])
            sentences.append(_sentence(style, f"{who} {pick(rng, _VERBS)} {whom}"))
    return f"{cast[0]} and {cast[1]}\n" + gap.join(sentences)


def _slip(rng: Random, style: Style) -> Style:
    habit = pick(rng, Style._fields)
    values = dict.fromkeys(getattr(writer, habit) for writer in WRITERS.values())
    others = [value for value in values if value != getattr(style, habit)]
    return style._replace(**{habit: pick(rng, others)})


def _common(one: Style, other: Style) -> int:
    return sum(a == b for a, b in zip(one, other, strict=True))


def _mood(style: Style, who: str, mood: str) -> str:
    return _sentence(style, f"{who} was {style.degree} {mood}")


def _deed(style: Style, who: str, deed: str, where: str, end: str) -> str:
    return _sentence(style, f"{who} {deed} {where} {style.joining} {end}")


def _sentence(style: Style, body: str) -> str:
    text = f"{style.opening} {body}".strip()
    return text[0].upper() + text[1:] + style.ending


def new_rng(kind: str, split: str, splits: tuple[str, ...], seed: int) -> Random:
    if split not in splits:
        raise ValueError(f"Unknown split '{split}' of the {kind}: there are {', '.join(splits)}.")
    return Random(f"{kind}/{split}/{seed}")


def below(rng: Random, limit: int) -> int:
    return int(rng.random() * limit)


def pick(rng: Random, options: Sequence[_T]) -> _T:
    return options[below(rng, len(options))]


def _shuffled(rng: Random, items: Sequence[_T]) -> list[_T]:
    return [items[i] for i in sorted(range(len(items)), key=lambda _: rng.random())]
