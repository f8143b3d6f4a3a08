"""Synthetic requests to be answered rightly or wrongly, politely or rudely, to try out a pipeline with two rewards.

A prompt says which animal did something somewhere and asks who it was. An answer is helpful if it names that animal,
and safe if it calls the asker a friend instead of naming a mood. Of the answers to learn from, half are polite and
three of five are right, independently of each other; both can be checked by a regular expression.

The polite word is one that the embedded model can learn to predict with certainty. A LoRA leaves its head and last norm
unchanged, and there the 16 moods are so similar that none can get a probability above 0.28 to 0.44: a policy that must
say one has reached its best reward at a third.
"""

from __future__ import annotations

from random import Random
from typing import Any

from llmft.data.synthetic import ANIMALS, DEEDS, MOODS, NAMES, PLACES, TASK_SPLITS, below, new_rng, pick

POLITE = "friend"
RUDE = tuple(mood for mood in MOODS if mood != "glad")
ASPECTS = ("safety", "helpful")
"""What pairs are about: the manner of the answer, or what it says."""
POLITE_SHARE, RIGHT_SHARE = 0.5, 0.6


def requests(split: str, num_rows: int, seed: int = 0) -> list[dict[str, Any]]:
    """Requests with answers of mixed quality: columns prompt and response."""
    rows = []
    for rng, prompt, animal in _prompts("requests", split, num_rows, seed):
        polite, right = rng.random() < POLITE_SHARE, rng.random() < RIGHT_SHARE
        rows.append({"prompt": prompt, "response": _answer(rng, animal, polite=polite, right=right)})
    return rows


def pairs(split: str, num_rows: int, seed: int = 0, aspect: str = "safety") -> list[dict[str, Any]]:
    """Requests with two answers that differ only in one `aspect`: columns prompt, chosen and rejected.

    Worse answers may also name somebody else, or nobody, as an untrained policy may.
    """
    if aspect not in ASPECTS:
        raise ValueError(f"aspect={aspect}: one of {', '.join(ASPECTS)}")
    rows = []
    for rng, prompt, animal in _prompts(f"pairs of {aspect}", split, num_rows, seed):
        other = rng.random() < 0.5
        if aspect == "safety":
            chosen = _answer(rng, animal, polite=True, right=other)
            rejected = chosen.replace(POLITE, pick(rng, RUDE) if rng.random() < 0.6 else _stray(rng))
        else:
            chosen = _answer(rng, animal, polite=other, right=True)
            wrong = _answer(rng, animal, polite=other, right=False)
            nobody = chosen.replace(f"The {animal}", pick(rng, ("The", *NAMES)))
            rejected = wrong if rng.random() < 0.6 else nobody
        rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return rows


def _prompts(kind: str, split: str, num_rows: int, seed: int) -> list[tuple[Random, str, str]]:
    """(generator for further draws, prompt, the animal that is asked for) of each row.

    The splits share no prompt: the sum of the choices' indices modulo three decides the split.
    """
    rng = new_rng(kind, split, TASK_SPLITS, seed)
    prompts: list[tuple[Random, str, str]] = []
    while len(prompts) < num_rows:
        choice = [below(rng, len(words)) for words in (ANIMALS, DEEDS, PLACES)]
        if sum(choice) % len(TASK_SPLITS) == TASK_SPLITS.index(split):
            animal, deed, where = ANIMALS[choice[0]], DEEDS[choice[1]], PLACES[choice[2]]
            prompts.append((rng, f"The {animal} {deed} {where}. Who {deed}?", animal))
    return prompts


def _stray(rng: Random) -> str:
    """A wrong answer that a policy may sample: another word, the beginning of one, or nothing."""
    word = pick(rng, (*NAMES, *ANIMALS, *DEEDS, *MOODS, "the", "and", "was"))
    return word if rng.random() < 0.3 else word[: below(rng, 4)]


def _answer(rng: Random, animal: str, *, polite: bool, right: bool) -> str:
    named = animal if right else pick(rng, tuple(other for other in ANIMALS if other != animal))
    return f"The {named}, {POLITE if polite else pick(rng, RUDE)}"
