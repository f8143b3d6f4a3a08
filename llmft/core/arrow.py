"""Arrow columns of numbers and texts without importing pandas, as `pyarrow.array` does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pyarrow as pa


def number_column(values: np.ndarray) -> pa.Array:
    """A column that shares memory with `values`, which are not bool."""
    import pyarrow as pa

    assert values.dtype != np.bool_, "Arrow packs eight bools into a byte"
    values = np.ascontiguousarray(values)
    return pa.Array.from_buffers(pa.from_numpy_dtype(values.dtype), len(values), [None, pa.py_buffer(values)])


def text_column(values: Sequence[str]) -> pa.Array:
    """A column of strings, less than 2 GiB in total."""
    import pyarrow as pa

    texts = [value.encode() for value in values]
    ends = np.cumsum([0, *map(len, texts)], dtype=np.int32)
    return pa.Array.from_buffers(pa.string(), len(texts), [None, pa.py_buffer(ends), pa.py_buffer(b"".join(texts))])


def numbers(column: pa.Array) -> np.ndarray:
    """The values of a column of integers or floats, without a copy. Raises ValueError for other types and for nulls."""
    import pyarrow as pa

    kind = column.type
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind)) or column.null_count:
        raise ValueError(f"a column of {kind} with {column.null_count} nulls, not of numbers")
    if not len(column):
        return np.zeros(0, np.dtype(kind.to_pandas_dtype()))
    values = np.frombuffer(column.buffers()[1], np.dtype(kind.to_pandas_dtype()))
    return values[column.offset : column.offset + len(column)]
