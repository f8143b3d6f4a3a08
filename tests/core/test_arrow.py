"""Columns made without pandas are those that pyarrow makes."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from llmft.core.arrow import number_column, numbers, text_column


def test_columns_are_those_of_pyarrow() -> None:
    for values in (np.arange(5), np.array([0.5, np.nan]), np.arange(8, dtype=np.uint8)[::2], np.zeros(0, np.int32)):
        assert number_column(values).equals(pa.array(np.ascontiguousarray(values))) or np.isnan(values).any()
        np.testing.assert_array_equal(numbers(number_column(values)), values)
    np.testing.assert_array_equal(numbers(number_column(np.arange(9))[3:7]), [3, 4, 5, 6])
    for texts in (["Anné", "", "🦊 and\nmore"], []):
        made = text_column(texts)
        made.validate(full=True)
        assert made.equals(pa.array(texts, pa.string()))


@pytest.mark.parametrize(
    "column", [pa.array([1, None]), pa.array(["a"]), pa.array([True]), pa.array(["a"]).dictionary_encode()]
)
def test_what_is_no_column_of_numbers_is_refused(column: pa.Array) -> None:
    with pytest.raises(ValueError, match="not of numbers"):
        numbers(column)
