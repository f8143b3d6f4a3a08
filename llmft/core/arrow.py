"""Arrow columns of numbers and texts without pandas, which `pyarrow.array` imports to see whether it was given any."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pyarrow as pa


def number_column(values: np.ndarray) -> pa.Array:
    """A column of the array's own type, which is no bool; it shares its memory."""
    import pyarrow as pa

    assert values.dtype != np.bool_, "Arrow keeps eight of them in a byte"
    values = np.ascontiguousarray(values)
    return pa.Array.from_buffers(pa.from_numpy_dtype(values.dtype), len(values), [None, pa.py_buffer(values)])


def text_column(values: Sequence[str]) -> pa.Array:
    """A column of strings, of less than 2 GiB in all."""
    import pyarrow as pa

    texts = [value.encode() for value in values]
    ends = np.cumsum([0, *map(len, texts)], dtype=np.int32)
    return pa.Array.from_buffers(pa.string(), len(texts), [None, pa.py_buffer(ends), pa.py_buffer(b"".join(texts))])


def numbers(column: pa.Array) -> np.ndarray:
    """What a column of integers or floats without gaps holds, sharing its memory; ValueError for any other."""
    import pyarrow as pa

    kind = column.type
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind)) or column.null_count:
        raise ValueError(f"a column of {kind} with {column.null_count} gaps, not of numbers")
    if not len(column):
        return np.zeros(0, np.dtype(kind.to_pandas_dtype()))
    found = np.frombuffer(column.buffers()[1], np.dtype(kind.to_pandas_dtype()))
    return found[column.offset : column.offset + len(column)]
