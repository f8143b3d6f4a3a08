from llmft.metrics import higher_is_better


@higher_is_better
def same_first_letter(references: list[str], predictions: list[str]) -> float:
    """The share of answers with the reference's first letter; 0 to 1."""
    pairs = zip(references, predictions, strict=True)
    return sum(r.strip()[:1] == p.strip()[:1] for r, p in pairs) / len(references)
