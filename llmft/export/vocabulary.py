"""Converts tokenizer.json to the vocabulary of a GGUF file.

llama.cpp selects its pre-tokenizer by a name, `tokenizer.ggml.pre`, which its own converter looks up in a list of
hashes of known tokenizers. Here the name is derived from the regular expressions in tokenizer.json, so newly trained
tokenizers work too.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmft.core.errors import ConfigError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*")
_CASED_REST = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
GPT2, DIGITS = "GPT-2's words", "single digits"
PRE = {
    (GPT2,): "gpt-2",
    (DIGITS, GPT2): "smollm",
    (rf"{_WORDS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}",): "dbrx",
    (rf"{_WORDS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}",): "qwen2",
    (
        rf"{_WORDS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    ): "qwen35",
    (rf"{_CASED[0]}|{_CASED[1]}|\p{{N}}|{_CASED_REST}",): "tekken",
    (rf"{_CASED[0]}{_WORDS}?|{_CASED[1]}{_WORDS}?|\p{{N}}{{1,3}}|{_CASED_REST}",): "gpt-4o",
}
"""Steps of the pre-tokenizer -> its name in llama.cpp (src/llama-vocab.cpp)."""


@dataclass
class Vocabulary:
    """A tokenizer as stored in a GGUF file.

    Attributes:
        kind: "gpt2" for byte-level BPE, "llama" for SentencePiece's.
        scores: of SentencePiece's pieces; the highest are merged first.
        space: whether a space is prepended to a text; None if the kind has no such option.
    """

    kind: str
    pre: str
    tokens: list[bytes]
    types: list[int]
    scores: list[float] = field(default_factory=list)
    merges: list[str] = field(default_factory=list)
    space: bool | None = None


def read(directory: Path, size: int) -> Vocabulary:
    """Reads the tokenizer of a model directory with `size` embeddings.

    Raises ConfigError for one that llama.cpp does not support.
    """
    content = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
    model = content["model"]
    if model.get("type") != "BPE":
        raise ConfigError(f"{directory}: format=gguf does not support a {model.get('type')} tokenizer.")
    added = {entry["id"]: entry for entry in content.get("added_tokens", [])}
    byte_level = any(step["type"] == "ByteLevel" for step in _steps(content.get("pre_tokenizer")))
    pieces = {number: piece for piece, number in model["vocab"].items()}
    pieces |= {number: entry["content"] for number, entry in added.items()}
    if max(pieces) >= size:
        raise ConfigError(f"{directory}: token {max(pieces)} has no embedding; the model has {size}.")
    tokens, types = [], []
    for number in range(size):
        text = pieces.get(number, f"[PAD{number}]")
        kind = NORMAL if number in pieces else UNUSED
        if number in added:
            kind = CONTROL if added[number]["special"] or _looks_special(text) else USER_DEFINED
            text = text if kind == CONTROL else text.replace("▁", " ")
        if not byte_level and text == model.get("unk_token"):
            kind = UNKNOWN
        elif not byte_level and number in pieces and re.fullmatch(r"<0x[0-9A-F]{2}>", text):
            kind = BYTE
        tokens.append(text.encode())
        types.append(kind)
    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    if byte_level:
        joined = [" ".join(part.replace(" ", "Ġ") for part in pair) for pair in merges]
        return Vocabulary("gpt2", _pre(content, directory), tokens, types, merges=joined)
    if not model.get("byte_fallback"):
        raise ConfigError(f"{directory}: llama.cpp does not support a tokenizer without byte fallback.")
    scores = _scores(model["vocab"], merges, added, types)
    if (directory / "tokenizer.model").is_file():  # SentencePiece's own scores for the tokens in its file
        from sentencepiece import SentencePieceProcessor

        processor = SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
        for number in range(min(size, processor.GetPieceSize())):
            scores[number] = processor.GetScore(number)
    # The scheme "first" prepends a space only at the very start, which is the BOS token.
    prepends = any(step["type"] == "Prepend" for step in _steps(content.get("normalizer")))
    schemes = [s.get("prepend_scheme") for s in _steps(content.get("pre_tokenizer")) if s["type"] == "Metaspace"]
    return Vocabulary("llama", "default", tokens, types, scores, space=prepends or "always" in schemes)


def _steps(node: Any) -> list[dict[str, Any]]:
    """The steps of a pre-tokenizer or normalizer, which may be a sequence or None."""
    if not node:
        return []
    inner = node.get("pretokenizers") or node.get("normalizers")
    return [step for part in inner for step in _steps(part)] if inner else [node]


def _pre(content: dict[str, Any], directory: Path) -> str:
    """llama.cpp's name of a byte-level tokenizer's pre-tokenizer."""
    steps: list[str] = []
    for step in _steps(content.get("pre_tokenizer")):
        if step["type"] == "Split":
            pattern = step["pattern"]
            steps.append(pattern.get("Regex") or re.escape(pattern.get("String", "")))
        elif step["type"] == "Digits" and step.get("individual_digits"):
            steps.append(DIGITS)
        elif step["type"] == "ByteLevel" and step.get("use_regex", True):
            steps.append(GPT2)
        elif step["type"] != "ByteLevel":
            steps.append(step["type"])
    name = PRE.get(tuple(steps))
    if name is None:
        raise ConfigError(
            f"{directory}: its tokenizer splits words by {' then '.join(steps) or 'nothing'}, for which llama.cpp has "
            "no name here: set converter=DIR to a checkout of llama.cpp."
        )
    # The same split; Llama 3's name also means that whole words are looked up before merging.
    return "llama-bpe" if name == "dbrx" and content["model"].get("ignore_merges") else name


def _looks_special(text: str) -> bool:
    """Whether an added token is a control token although it is not marked as special (llama.cpp's own rule)."""
    marks = (("<|", "|>"), ("<｜", "｜>"), ("<unused", ">"))
    return text in ("<pad>", "<mask>", "<2mass>", "[@BOS@]") or any(
        text.startswith(one) and text.endswith(two) for one, two in marks
    )


def _scores(vocab: dict[str, int], merges: list[list[str]], added: dict[int, Any], types: list[int]) -> list[float]:
    """SentencePiece's scores: the piece that is merged first has the highest.

    If the merges are in vocabulary order, they are minus the position in the vocabulary, as in SentencePiece.
    """
    rank: dict[int, int] = {}
    for index, pair in enumerate(merges):
        number = vocab.get("".join(pair))
        if number is not None:
            rank.setdefault(number, index)
    joined = sorted(rank, key=lambda number: rank[number])
    in_order = joined == sorted(joined)
    first = joined[0] if joined else 0
    scores = []
    for number, kind in enumerate(types):
        if number in added and kind not in (UNKNOWN, BYTE):
            scores.append(-1000.0)
        elif kind == UNUSED:
            scores.append(-10000.0)
        elif kind != NORMAL:
            scores.append(0.0)
        else:
            scores.append(float(first - number if in_order else -rank.get(number, len(merges))))
    return scores
