"""Metrics for generated text, of (references, predictions)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from llmft.core.errors import ConfigError
from llmft.metrics import higher_is_better, mean_over_rows

SENTENCE_ENCODER = "sentence-transformers/sentence-t5-base"
ENCODER_KEY = "task.metric_options.sharpened_cosine.encoder"
ENCODER_ADVICE = (
    f"set {ENCODER_KEY}=DIR (of evaluate: {ENCODER_KEY.removeprefix('task.')}=DIR) to a local encoder, or HF_ENDPOINT "
    "to a mirror"
)


def _check(references: Sequence[str], predictions: Sequence[str]) -> None:
    if len(references) != len(predictions):
        raise ValueError(f"{len(references)} references but {len(predictions)} predictions")
    if not references:
        raise ValueError("no references")


@higher_is_better
@mean_over_rows
def exact_match(references: Sequence[str], predictions: Sequence[str]) -> list[float]:
    """Share of predictions that equal their reference up to white space at both ends, 0 to 1."""
    _check(references, predictions)
    return [float(r.strip() == p.strip()) for r, p in zip(references, predictions, strict=True)]


@higher_is_better
@mean_over_rows
def token_f1(references: Sequence[str], predictions: Sequence[str]) -> list[float]:
    """Mean over rows of the F1 of common words, lower-cased and split at white space, 0 to 1.

    This is SQuAD's F1 (arXiv:1606.05250) with articles and punctuation kept. Two empty texts count as equal.
    """
    _check(references, predictions)
    scores = []
    for reference, prediction in zip(references, predictions, strict=True):
        reference_words, predicted_words = reference.lower().split(), prediction.lower().split()
        common = sum((Counter(reference_words) & Counter(predicted_words)).values())
        words = len(reference_words) + len(predicted_words)
        scores.append(2 * common / words if words else 1.0)
    return scores


@higher_is_better
def bleu(references: Sequence[str], predictions: Sequence[str]) -> float:
    """BLEU of the whole set by sacrebleu (13a words, exponential smoothing), 0 to 1."""
    import sacrebleu

    _check(references, predictions)
    return float(sacrebleu.corpus_bleu(list(predictions), [list(references)]).score / 100)


@higher_is_better
@mean_over_rows
def rouge_l(references: Sequence[str], predictions: Sequence[str]) -> list[float]:
    """Mean ROUGE-L F-measure of the rows by rouge-score, without stemming, 0 to 1."""
    from rouge_score import rouge_scorer

    _check(references, predictions)
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=False)
    return [scorer.score(r, p)["rougeL"].fmeasure for r, p in zip(references, predictions, strict=True)]


@higher_is_better
@mean_over_rows
def sharpened_cosine(
    references: Sequence[str], predictions: Sequence[str], encoder: str = SENTENCE_ENCODER, exponent: float = 3.0
) -> list[float]:
    """Mean of the cosine similarity of the texts' sentence embeddings, raised to `exponent`.

    This is the score of the LLM prompt recovery competition. `encoder` is a directory of sentence-transformers, or an
    id in the Hub's cache or on the Hub.

    Raises ConfigError where sentence-transformers or the encoder is missing.
    """
    import numpy as np

    _check(references, predictions)
    model = _encoder(encoder)
    options = {"normalize_embeddings": True, "show_progress_bar": False, "batch_size": 64}
    first, second = (
        np.asarray(model.encode(list(texts), **options), np.float64) for texts in (references, predictions)
    )
    cosine = np.clip((first * second).sum(axis=1), -1.0, 1.0)
    return (np.sign(cosine) * np.abs(cosine) ** exponent).tolist()


def encoder_ready(encoder: str = SENTENCE_ENCODER, **_: Any) -> None:
    """Raises ConfigError where sentence-transformers or `sharpened_cosine`'s encoder is missing. Loads nothing."""
    import importlib.util

    from llmft.data.hub import ask_hub, cached_ids

    if importlib.util.find_spec("sentence_transformers") is None:
        raise ConfigError("sharpened_cosine needs sentence-transformers: pip install 'llmft[sentences]'.")
    directory = Path(encoder).expanduser()
    if directory.is_dir():
        if not any((directory / name).is_file() for name in ("modules.json", "config.json")):
            raise ConfigError(f"{ENCODER_KEY}={encoder}: not a sentence-transformers model (it has no modules.json).")
    elif encoder not in cached_ids("model"):
        ask_hub(f"{ENCODER_KEY}={encoder}", encoder, "model", ENCODER_ADVICE)


sharpened_cosine.ready = encoder_ready  # type: ignore[attr-defined]


@lru_cache(maxsize=1)
def _encoder(name: str) -> Any:
    encoder_ready(name)
    from sentence_transformers import SentenceTransformer

    from llmft.data.hub import online_or_cached

    def load() -> Any:
        return SentenceTransformer(str(Path(name).expanduser()), device="cpu", local_files_only=True)

    key, fetch = f"{ENCODER_KEY}={name}", "huggingface_hub.snapshot_download"
    if not Path(name).expanduser().is_dir():
        return online_or_cached(key, name, "model", load, fetch, {"repo_id": name}, ENCODER_ADVICE)
    try:
        return load()
    except Exception as error:
        raise ConfigError(f"{key}: not a sentence-transformers model ({str(error)[:200]}).") from None
