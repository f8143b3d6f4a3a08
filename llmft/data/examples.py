"""Tokenised rows in columns, compact in memory and memory-mapped from a cache file if there is one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmft.core.files import staged_file
from llmft.data.columns import Conversation

IGNORE = -100


@dataclass(slots=True)
class Example:
    """One example: token ids, labels (`IGNORE` where there is no loss) and the conversation it comes from."""

    input_ids: Sequence[int]
    labels: Sequence[int]
    conversation: Conversation
    segments: np.ndarray | None = None
    """For compared answers: 0 for a token of the shared prompt, j for a token of answer j."""

    @property
    def where(self) -> str:
        """`file:line` of the row."""
        return self.conversation.where

    @property
    def labelled_tokens(self) -> int:
        """Number of tokens with a loss; the first token has none, since nothing predicts it."""
        return int(np.count_nonzero(np.asarray(self.labels)[1:] != IGNORE))


@dataclass(eq=False, repr=False)
class Examples(Sequence[Example]):
    """The examples of one split.

    Attributes:
        ids: (tokens,) int32, the token ids of all rows, concatenated.
        labelled: (tokens,) uint8, 1 for a token that is learned; for compared answers, the answer's number.
        starts: (rows + 1,) offset of each row in `ids`.
        rows: (rows,) index of each example's conversation.
    """

    ids: np.ndarray
    labelled: np.ndarray
    starts: np.ndarray
    rows: np.ndarray
    conversations: Sequence[Conversation]

    @classmethod
    def of(
        cls, ids: Sequence[Sequence[int]], labelled: Sequence[np.ndarray], rows: Sequence[int], conversations: Any
    ) -> Examples:
        """Concatenates one sequence of ids and one of 0/1 marks per row."""
        starts = np.zeros(len(ids) + 1, np.int64)
        np.cumsum([len(row) for row in ids], out=starts[1:])
        token_ids = np.fromiter((token for row in ids for token in row), np.int32, int(starts[-1]))
        marks = np.concatenate(labelled) if len(labelled) else np.zeros(0, np.uint8)
        return cls(token_ids, marks.astype(np.uint8), starts, np.asarray(rows, np.int32), conversations)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:  # type: ignore[override]  # no slices
        if not 0 <= index < len(self):
            raise IndexError(index)
        tokens = slice(self.starts[index], self.starts[index + 1])
        ids, marks = self.ids[tokens], self.labelled[tokens]
        labels = np.where(marks != 0, ids, IGNORE)
        conversation = self.conversations[self.rows[index]]
        segments = marks if conversation.comparison is not None else None
        return Example(ids, labels, conversation, segments)  # type: ignore[arg-type]

    @property
    def lengths(self) -> np.ndarray:
        """(rows,) number of tokens of each row."""
        return np.diff(self.starts)

    @property
    def labelled_tokens(self) -> np.ndarray:
        """(rows,) number of tokens with a loss of each row."""
        learned = self.labelled != 0
        learned[self.starts[:-1][self.lengths > 0]] = False  # nothing predicts a row's first token
        return np.diff(np.concatenate([[0], np.cumsum(learned, dtype=np.int64)])[self.starts])


def save_examples(path: Path, examples: Examples, facts: dict[str, Any]) -> None:
    """Writes an Arrow stream, which `datasets.Dataset.from_file` can open too."""
    import pyarrow as pa

    def column(values: np.ndarray) -> pa.Array:
        return pa.LargeListArray.from_arrays(pa.array(examples.starts), pa.array(values))

    columns = {"input_ids": column(examples.ids), "labelled": column(examples.labelled), "row": examples.rows}
    table = pa.table(columns, metadata={"llmft": json.dumps(facts)})
    with staged_file(path) as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)


def load_examples(path: Path, conversations: Sequence[Conversation]) -> tuple[Examples, dict[str, Any]]:
    """Memory-maps a file of `save_examples`. Raises ValueError when it is damaged."""
    import pyarrow as pa

    try:
        table = pa.ipc.open_stream(pa.memory_map(str(path))).read_all()
        facts = json.loads(table.schema.metadata[b"llmft"])
        columns = [table.column(name).combine_chunks() for name in ("input_ids", "labelled", "row")]
        ids, labelled, row = (c.chunk(0) if isinstance(c, pa.ChunkedArray) else c for c in columns)
        rows, starts = row.to_numpy(), ids.offsets.to_numpy()
        examples = Examples(ids.values.to_numpy(), labelled.values.to_numpy(), starts, rows, conversations)
        if len(rows) and (int(rows.max()) >= len(conversations) or len(examples.ids) != starts[-1]):
            raise ValueError("rows are missing")
        return examples, facts
    except (OSError, KeyError, TypeError, IndexError, pa.ArrowException, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None
