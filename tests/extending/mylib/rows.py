from collections.abc import Iterator
from pathlib import Path


def diary(split: str, num_rows: int | None, seed: int, path: str, separator: str = "=>") -> Iterator[dict[str, str]]:
    """Rows of a file in a format without a reader: blocks of lines, of which the last one is `question => answer`."""
    for block in Path(path).read_text().split("%%")[:num_rows]:
        *notes, last = [line for line in block.splitlines() if line.strip()]
        question, _, answer = last.partition(separator)
        yield {"notes": " ".join(notes), "question": question.strip(), "answer": answer.strip()}
