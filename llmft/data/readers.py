"""Files to rows, by a small reader for each format.

They are our own for two reasons: an error names the file and the line, and a file is identified by its content.
`datasets` fills a missing column with None, changes the type of a column with one wrong value, and returned old rows
for an edited file of the same size and time.
"""

from __future__ import annotations

import bz2
import contextlib
import csv
import gzip
import io
import json
import lzma
import math
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmft.config.convert import canonical
from llmft.config.data import BadRow
from llmft.core.errors import ConfigError, DataError
from llmft.data.naming import NotFinite, Unreadable

DECOMPRESS = {".gz": gzip.decompress, ".bz2": bz2.decompress, ".xz": lzma.decompress}
MAX_RECORD = 4000
"""Longest record of a rejected row."""
MAX_NESTING = 100
"""Deepest nesting of lists and objects in a row; Python's own JSON reader fails at some hundreds."""
ARRAY_HINT = "; an array of objects belongs in a .json file"
FORMATS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt")


@dataclass(frozen=True, slots=True)
class Row:
    """One row: its columns, its place (`file:line`), and a name if two files have the same name."""

    values: dict[str, Any]
    where: str
    name: str = ""

    @property
    def id(self) -> str:
        """The row's id: file name and line, without the folders, which differ between machines."""
        return self.name or self.where.rpartition("/")[2]


@dataclass
class BadRows:
    """Rows that cannot be used. Under on_bad_row=error the first one raises; under skip they are recorded."""

    policy: BadRow = BadRow.error
    key: str | None = "data.on_bad_row"
    """The config key that leaves bad rows out; None where no key does."""
    rejected: list[dict[str, Any]] = field(default_factory=list)

    def add(self, where: str, reason: str, row: Any, advice: str = "") -> None:
        """Records a bad row and its content; raises DataError under on_bad_row=error."""
        if self.policy is BadRow.error:
            hint = f" ({self.key}=skip leaves such rows out)" if self.key else ""
            raise DataError(f"{where}: {reason}{advice}{hint}.")
        self.rejected.append({"where": where, "reason": reason, "row": shortened(row)})

    def reasons(self) -> dict[str, int]:
        """Number of rows left out, by reason."""
        return dict(Counter(entry["reason"] for entry in self.rejected))


def shortened(row: Any) -> Any:
    """A row as plain JSON data; only the beginning of its text where that is very long."""
    text = row if isinstance(row, str) else json.dumps(row, ensure_ascii=False, default=str)
    return f"{text[:MAX_RECORD]} …" if len(text) > MAX_RECORD else json.loads(json.dumps(row, default=str))


def read(path: Path, content: bytes, problems: BadRows, csv_columns: Sequence[str] = ()) -> Iterator[Row]:
    """The rows of one file. Its ending names the format; compressed files are decompressed first.

    `csv_columns` are the column names of a csv or tsv file without a header line.
    """
    endings = [suffix.lower() for suffix in path.suffixes]
    if endings and endings[-1] in DECOMPRESS:
        try:
            content = DECOMPRESS[endings[-1]](content)
        except (OSError, EOFError, ValueError, lzma.LZMAError, zlib.error) as error:
            raise DataError(f"{path}: cannot be decompressed ({error}).") from None
        endings.pop()
    ending = endings[-1] if endings else ""
    if ending not in FORMATS:
        raise ConfigError(f"{path}: cannot tell the format of '{path.name}'; known endings: {', '.join(FORMATS)}.")
    if ending == ".parquet":
        return _read_parquet(path, content)
    if ending == ".jsonl":
        return _read_json_lines(path, content, problems)
    if ending == ".txt":
        return (Row({"text": line}, where) for where, line, _ in _lines(path, content, problems))
    text = _decode(path, content)
    if ending == ".json":
        return _read_json(path, text, problems)
    return _read_csv(path, text, problems, "\t" if ending == ".tsv" else ",", list(csv_columns))


def _decode(path: Path, content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}:{line}: {_not_utf8(error, content)}; save the file as UTF-8.") from None


def _not_utf8(error: UnicodeDecodeError, content: bytes) -> str:
    column = error.start - (content.rfind(b"\n", 0, error.start) + 1) + 1
    return f"not UTF-8 (byte 0x{content[error.start]:02x} at column {column})"


def _lines(path: Path, content: bytes, problems: BadRows) -> Iterator[tuple[str, str, bool]]:
    """Non-empty lines as (where, text, whether it is the last line and has no newline)."""
    lines = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    for number, raw in enumerate(lines, start=1):
        if not raw.strip():
            continue
        where = f"{path}:{number}"
        try:
            yield where, raw.decode("utf-8").rstrip("\r"), number == len(lines)
        except UnicodeDecodeError as error:
            problems.add(where, _not_utf8(error, raw), raw.decode("utf-8", "replace"))


def _object_without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Raises ValueError for a duplicate key, which would hide a value."""
    values = dict(pairs)
    if len(values) != len(pairs):
        repeated = next(key for index, (key, _) in enumerate(pairs) if key in dict(pairs[:index]))
        raise ValueError(f"the key '{repeated}' appears twice")
    return values


_DECODER = json.JSONDecoder(object_pairs_hook=_object_without_duplicates)


def _check_values(text: str, values: Any) -> None:
    """Raises ValueError for a lone surrogate, which no tokenizer can read, and RecursionError for deep nesting."""
    if text.count("[") + text.count("{") > MAX_NESTING and _depth(values) > MAX_NESTING:
        raise RecursionError
    if "\\ud" in text or "\\uD" in text:
        try:
            canonical(values).encode()
        except UnicodeEncodeError:
            raise ValueError("half a character, a lone surrogate such as \\ud83d") from None


def _depth(value: Any) -> int:
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + max(map(_depth, children), default=0)


def _not_json(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return f"nested more than {MAX_NESTING} levels deep"
    return getattr(error, "msg", str(error).partition("; use sys.")[0])


def _read_json_lines(path: Path, content: bytes, problems: BadRows) -> Iterator[Row]:
    for where, line, is_cut_off in _lines(path, content, problems):
        try:
            values = _DECODER.decode(line)
            _check_values(line, values)
        except (ValueError, RecursionError) as error:
            column = f" at column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
            reason = f"not JSON ({_not_json(error)}{column})"
            advice = "; the last line has no newline: cut off?" if is_cut_off else ""
            problems.add(where, reason, line, ARRAY_HINT if line.lstrip().startswith("[") else advice)
            continue
        yield from _object_row(values, where, problems, ARRAY_HINT)


def _object_row(values: Any, where: str, problems: BadRows, advice: str = "") -> Iterator[Row]:
    if isinstance(values, dict):
        yield Row(values, where)
    else:
        advice = advice if isinstance(values, list) else ""
        problems.add(where, f"a JSON object was expected, not {type(values).__name__}", values, advice)


def _read_json(path: Path, text: str, problems: BadRows) -> Iterator[Row]:
    """The objects of a JSON array, each with the line it starts on."""

    def skip_space(position: int) -> int:
        return next((at for at in range(position, len(text)) if text[at] not in " \t\r\n"), len(text))

    position = skip_space(0)
    if not text.startswith("[", position):
        hint = "; one object per line belongs in a .jsonl file, an array within an object in a file of its own"
        raise DataError(
            f"{path}:1: a JSON array of objects was expected{hint if text.startswith('{', position) else ''}."
        )
    mark, counted, line, last_line = "[", 0, 1, 0
    while mark != "]":
        position = skip_space(position + 1)
        line, counted = line + text.count("\n", counted, position), position
        if mark == "[" and text.startswith("]", position):
            break
        if text.startswith((",", "]"), position):
            raise DataError(f"{path}:{line}: not JSON (one comma too many).")
        # A second row on the same line gets its column too.
        column = position - text.rfind("\n", 0, position)
        where = f"{path}:{line}" if line > last_line else f"{path}:{line}:{column}"
        last_line = line
        try:
            values, end = _DECODER.raw_decode(text, position)
            _check_values(text[position:end], values)
        except (ValueError, RecursionError) as error:
            where = f"{path}:{getattr(error, 'lineno', line)}"
            raise DataError(f"{where}: not JSON ({_not_json(error)}); the array is broken from here on.") from None
        yield from _object_row(values, where, problems)
        position = skip_space(end)
        mark = text[position : position + 1]
        if mark not in (",", "]"):
            raise DataError(f"{path}:{_line_of(text, position)}: not JSON (a comma is missing).")
    if text[position + 1 :].strip():
        raise DataError(f"{path}:{_line_of(text, position)}: text after the end of the array.")


def _line_of(text: str, position: int) -> int:
    return text.count("\n", 0, position) + 1


def _read_csv(path: Path, text: str, problems: BadRows, delimiter: str, names: list[str]) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        header: list[str] | None = names or next(reader, None)
        if header is None:
            return
        wrong_delimiter = next((mark for mark in ";\t|," if mark != delimiter and mark in "".join(header)), None)
        if wrong_delimiter and len(header) == 1 and not names:
            raise DataError(f"{path}:1: {wrong_delimiter!r} separates the columns, {delimiter!r} was expected.")
        repeated = [name for name, count in Counter(header).items() if count > 1]
        if repeated:
            where = "data.csv_columns" if names else f"{path}:1: the header"
            raise DataError(f"{where} names the column '{repeated[0]}' twice; rename one.")
        first_line = reader.line_num + 1
        rows: list[Row] = []
        for cells in reader:
            where, first_line = f"{path}:{first_line}", reader.line_num + 1
            if not cells:
                continue
            if len(cells) != len(header):
                header_name = "data.csv_columns" if names else "the header"
                problems.add(where, f"{len(cells)} cells where {header_name} has {len(header)}", cells)
                continue
            rows.append(Row(dict(zip(header, cells, strict=True)), where))
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num}: not CSV ({error}).") from None
    for name in header:
        _mark_not_finite(rows, name)
    yield from rows


def _mark_not_finite(rows: list[Row], name: str) -> None:
    """Marks cells such as `inf` in a column of numbers, where they are not words."""
    has_numbers, not_finite = False, []
    for row in rows:
        try:
            if math.isfinite(float(row.values[name] or "nan")):
                has_numbers = True
            elif row.values[name]:
                not_finite.append(row)
        except ValueError:
            return
    for row in not_finite if has_numbers else ():
        row.values[name] = NotFinite(row.values[name])


# --------------------------------------------------------------------------------------------------------- Arrow


def read_arrow_directory(path: Path) -> tuple[list[Row], dict[str, list[str]]]:
    """The rows and class names of a directory of `Dataset.save_to_disk`."""
    import datasets

    try:
        return dataset_rows(datasets.load_from_disk(str(path)), f"{path}:row ")
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{path}: not a directory of datasets.save_to_disk ({error}).") from None


def dataset_rows(dataset: Any, where: str) -> tuple[list[Row], dict[str, list[str]]]:
    """The rows as they are stored, without decoding images or audio, and the class names by column."""
    classes = _class_names(dataset.features.to_dict())
    return list(_table_rows(dataset.with_format("arrow")[:], where, classes)), classes


def _read_parquet(path: Path, content: bytes) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(content), page_checksum_verification=True)
        table = file.read()
    except Exception as error:  # pyarrow raises many kinds of errors for a damaged file
        reason = str(error).partition("\n")[0]
        raise DataError(f"{path}: not a parquet file, or a damaged one ({reason}).") from None
    return _table_rows(table, f"{path}:row ", parquet_classes(path, content))


def parquet_classes(path: Path, content: bytes) -> dict[str, list[str]]:
    """The class names that `datasets` wrote into a parquet file's metadata, by column."""
    if path.suffix.lower() != ".parquet":
        return {}
    import pyarrow.parquet

    metadata = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(content)).schema_arrow.metadata or {}
    try:
        return _class_names(json.loads(metadata.get(b"huggingface", b"{}"))["info"]["features"])
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}


def _class_names(features: dict[str, Any]) -> dict[str, list[str]]:
    """The ordered class names of each column of type ClassLabel or list of ClassLabel."""
    classes = {}
    for name, feature in features.items():
        inner = feature[0] if isinstance(feature, list) and feature else feature
        inner = inner.get("feature", inner) if isinstance(inner, dict) else inner
        if isinstance(inner, dict) and inner.get("_type") == "ClassLabel":
            classes[name] = [str(label) for label in inner["names"]]
    return classes


def _table_rows(table: Any, where: str, classes: dict[str, list[str]]) -> Iterator[Row]:
    """The rows of an Arrow table; numbers in the columns of `classes` become class names."""
    repeated = [name for name, count in Counter(table.column_names).items() if count > 1]
    if repeated:
        raise DataError(f"{where.rpartition(':')[0]}: two columns are called '{repeated[0]}'; rename one.")
    columns = []
    for name, column in zip(table.column_names, table.columns, strict=True):
        values = _column_values(column)
        columns.append([_named_class(value, classes[name]) for value in values] if name in classes else values)
    names = table.column_names
    for number, cells in enumerate(zip(*columns, strict=True), start=1):
        yield Row(dict(zip(names, cells, strict=True)), f"{where}{number}")


def _named_class(value: Any, names: list[str]) -> Any:
    if isinstance(value, list):
        return [_named_class(item, names) for item in value]
    return names[value] if isinstance(value, int) and 0 <= value < len(names) else None


def _column_values(column: Any) -> list[Any]:
    import pyarrow as pa

    if pa.types.is_timestamp(column.type) and column.type.unit == "ns":  # Python has no nanoseconds
        for kind in (pa.timestamp("us", column.type.tz), pa.string()):
            with contextlib.suppress(pa.ArrowException):
                column = column.cast(kind)
                break
    try:
        return list(column.to_pylist())
    except Exception:  # some values have no Python form: a time in the year 20000, text that is not UTF-8
        return [_cell_value(cell) for cell in column]


def _cell_value(cell: Any) -> Any:
    try:
        return cell.as_py()
    except Exception:
        return Unreadable(cell.type)
