"""Files, Hub datasets and generators to rows.

Files are read by small readers of our own, for two reasons: an error names the file and the line, and a file is
identified by its content. `datasets` fills a missing column with None, changes the type of a column with one wrong
value, and returned old rows for an edited file of the same size and time.
"""

from __future__ import annotations

import bz2
import contextlib
import csv
import glob
import gzip
import hashlib
import io
import json
import lzma
import math
import os
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import chain
from operator import attrgetter
from os.path import isfile
from pathlib import Path
from typing import Any

from llmft.config.convert import canonical, digest_of
from llmft.config.data import BadRow, Columns, DataConfig
from llmft.config.instantiate import SOURCE_ARGUMENTS, check_arguments, find
from llmft.core.errors import ConfigError, DataError, UserError, nearest
from llmft.data.naming import NotFinite, Unreadable, is_nested, names_in, nested_value

SPLITS = ("train", "validation", "test")
DECOMPRESS = {".gz": gzip.decompress, ".bz2": bz2.decompress, ".xz": lzma.decompress}
MAX_RECORD = 4000
"""Longest record of a rejected row."""
MAX_NESTING = 100
"""Deepest nesting of lists and objects in a row; Python's own JSON reader fails at some hundreds."""
ARRAY_HINT = "; an array of objects belongs in a .json file"
FORMATS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt")


@dataclass(frozen=True, slots=True)
class Row:
    """One row: its columns, its place (`file:line`), and a name where two files have the same name."""

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
    rejected: list[dict[str, Any]] = field(default_factory=list)

    def add(self, where: str, reason: str, row: Any, advice: str = "") -> None:
        """Records a bad row and its content; raises DataError under on_bad_row=error."""
        if self.policy is BadRow.error:
            raise DataError(f"{where}: {reason}{advice} (data.on_bad_row=skip leaves such rows out).")
        self.rejected.append({"where": where, "reason": reason, "row": shortened(row)})

    def reasons(self) -> dict[str, int]:
        """Number of rows left out, by reason."""
        return dict(Counter(entry["reason"] for entry in self.rejected))


def shortened(row: Any) -> Any:
    """A row as plain JSON data; only the beginning of its text where that is very long."""
    text = row if isinstance(row, str) else json.dumps(row, ensure_ascii=False, default=str)
    return f"{text[:MAX_RECORD]} …" if len(text) > MAX_RECORD else json.loads(json.dumps(row, default=str))


@dataclass(frozen=True)
class Loaded:
    """The rows of each given split, and a fingerprint of the content they were read from."""

    splits: dict[str, list[Row]]
    fingerprint: str


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def load_rows(data: DataConfig, problems: BadRows) -> Loaded:
    """Reads the rows that `data` names.

    Raises:
        ConfigError: a file, generator or dataset is missing, or would not be used.
        DataError: a row cannot be read, or there are no training rows.
    """
    names = list(chain.from_iterable(named_columns(data).values()))
    _refuse_unused(data)
    if data.source:
        loaded = _from_generator(data)
    elif data.files or data.split_files.train:  # local files take precedence over the Hub
        loaded = _from_files(data, problems)
    else:
        loaded = _from_hub(data)
    if not loaded.splits.get("train"):
        if problems.rejected:
            first = problems.rejected[0]
            raise DataError(f"data={data.name}: no training row can be read; {first['where']}: {first['reason']}.")
        source = data.source or data.files or data.split_files.train or data.hub
        raise DataError(f"data={data.name} has no training rows: {source} is empty.")
    return replace(loaded, splits={split: with_nested(rows, names) for split, rows in loaded.splits.items()})


def named_columns(data: DataConfig) -> dict[str, list[str]]:
    """The columns that each key of `data` names. Raises ConfigError for a template that cannot be read."""
    columns: dict[str, list[str]] = {}
    for entry in fields(Columns):
        key, template = f"data.columns.{entry.name}", getattr(data.columns, entry.name)
        try:
            columns[key] = names_in(template)
        except ValueError as error:
            raise ConfigError(f"{key}={template}: {error}; write a literal brace twice.") from None
    columns["data.target_columns"] = list(data.target_columns)
    return columns | {f"data.{key}": [name] for key in ("stratify", "group") if (name := getattr(data, key))}


def with_nested(rows: list[Row], names: Iterable[str]) -> list[Row]:
    """`rows` with one column for each nested name, such as `instances[0].output`, that they have."""
    nested = [name for name in dict.fromkeys(names) if is_nested(name)]
    if not nested:
        return rows
    extended = []
    for row in rows:
        values = dict(row.values)
        for name in nested:
            with contextlib.suppress(KeyError, IndexError):
                values.setdefault(name, nested_value(row.values, name))
        extended.append(replace(row, values=values))
    return extended


def _refuse_unused(data: DataConfig) -> None:
    """Raises ConfigError for a key whose rows would not be read."""
    local = bool(data.files or data.split_files.train)
    dependents: dict[str, tuple[Any, list[str]]] = {
        "files": (local, ["csv_columns", *(f"split_files.{split}" for split in SPLITS)]),
        "source": (data.source, ["rows", "source_options"]),
        "hub": (data.hub, ["hub_config", *(f"hub_splits.{split}" for split in SPLITS)]),
        "pseudo": (data.pseudo, ["pseudo_rows"]),
    }
    for needed, (is_set, keys) in dependents.items():
        for key in keys:
            if (value := attrgetter(key)(data)) and not is_set:
                raise ConfigError(f"data.{key}={value} needs data.{needed}, which is not set.")
    if data.source and data.hub:
        raise ConfigError("data.source and data.hub are both set: keep one.")


# ---------------------------------------------------------------------------------------------------- generators


def _from_generator(data: DataConfig) -> Loaded:
    assert data.source is not None
    generate, options = find(data.source, "data.source", "source"), data.source_options
    check_arguments(generate, data.source, options, "data.source_options", *SOURCE_ARGUMENTS, complete=True)
    wanted = {split: data.rows[split] for split in SPLITS if data.rows.get(split)} if data.rows else {"train": None}
    try:
        splits = {
            split: [
                Row(dict(values), f"{data.name}:{split}:{number}")
                for number, values in enumerate(generate(split, count, data.split_seed, **options), start=1)
            ]
            for split, count in wanted.items()
        }
        digest = digest_of({split: [row.values for row in rows] for split, rows in splits.items()})
    except UserError:
        raise
    except Exception as error:
        raise DataError(f"data.source={data.source}: {type(error).__name__}: {error}") from error
    return Loaded(splits, digest)


# ----------------------------------------------------------------------------------------------------------- Hub


def _from_hub(data: DataConfig) -> Loaded:
    from llmft.data.hub import online_or_cached

    if data.hub and Path(data.hub).exists():
        raise ConfigError(f"data.hub={data.hub}: that is a path; set data.files to the files in it.")

    def load() -> Any:
        from datasets.packaged_modules.cache.cache import Cache

        name = str(data.hub).rpartition("/")[2]
        return Cache(None, name, data.hub_config, version="auto", hash="auto", repo_id=data.hub).as_dataset()

    arguments = {"path": data.hub, "name": data.hub_config, "revision": data.hub_revision}
    key = f"data.hub={data.hub}"
    dataset = online_or_cached(key, data.hub or "", "dataset", load, "datasets.load_dataset", arguments)
    split_names = {split: getattr(data.hub_splits, split) for split in SPLITS}
    split_names["train"] = split_names["train"] or "train"
    splits: dict[str, list[Row]] = {}
    digest = hashlib.sha256(f"{data.hub}@{data.hub_revision}/{data.hub_config}".encode())
    for split, name in split_names.items():
        if name is None:
            continue
        if name not in dataset:
            raise ConfigError(f"data.hub_splits.{split}={name}: {data.hub} has {', '.join(dataset)}.")
        splits[split], classes = _dataset_rows(dataset[name], f"{data.hub}/{name}:")
        digest.update(str(getattr(dataset[name], "_fingerprint", name)).encode())
        digest.update(canonical(classes).encode() if classes else b"")
    return Loaded(splits, digest.hexdigest())


# --------------------------------------------------------------------------------------------------------- files


def _from_files(data: DataConfig, problems: BadRows) -> Loaded:
    sources = {split: (f"data.split_files.{split}", getattr(data.split_files, split)) for split in SPLITS}
    if data.files:
        sources["train"] = ("data.files", data.files)
        for split, path in _splits_of_directory(data.files).items():
            if split != "train" and sources[split][1]:
                raise ConfigError(
                    f"{sources[split][0]} is set, and data.files={data.files} has {split} rows: keep one."
                )
            sources[split] = ("data.files", str(path))
    results = {
        split: read_files(named, key, problems, data.csv_columns) for split, (key, named) in sources.items() if named
    }
    paths = [path for files in results.values() for path in files.paths]
    check_csv_columns(data.csv_columns, paths)
    digests = {split: files.digests for split, files in results.items()}
    for split, files in results.items():
        if not files.rows and split != "train" and not problems.rejected:
            raise DataError(f"{sources[split][0]}={sources[split][1]}: no rows.")
    rows = {split: files.rows for split, files in results.items()}
    return Loaded(rows, digest_of(digests))


def _splits_of_directory(files: Any) -> dict[str, Path]:
    """The splits of a directory of `DatasetDict.save_to_disk`; none for any other path."""
    path = Path(str(files)).expanduser()
    splits = _directory_splits(path)
    if splits and ("train" not in splits or not set(splits) <= set(SPLITS)):
        raise ConfigError(
            f"data.files={files}: a directory with the splits {', '.join(splits)}; name each one: "
            f"data.split_files.train={path / splits[0]}, data.split_files.validation=…"
        )
    return {split: path / split for split in splits}


def _directory_splits(path: Path) -> list[str]:
    try:
        return [str(name) for name in json.loads((path / "dataset_dict.json").read_text())["splits"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def check_csv_columns(names: Sequence[str], paths: Sequence[Path]) -> None:
    """Raises ConfigError where data.csv_columns is set and no file is a csv or tsv file."""
    if names and not any({".csv", ".tsv"} & {suffix.lower() for suffix in path.suffixes} for path in paths):
        raise ConfigError(f"data.csv_columns is for csv and tsv files, and {paths[0]} is neither: leave it out.")


@dataclass(frozen=True)
class FilesRead:
    """The rows of several files, the files, and digests of their content."""

    rows: list[Row]
    paths: list[Path]
    digests: list[str]


def read_files(files: Any, key: str, problems: BadRows, csv_columns: Sequence[str] = ()) -> FilesRead:
    """The rows of the files that `key` names, each with its own id.

    The id is the file's name and the line. Where two files have the same name, it begins with the path below their
    common folder.

    Raises ConfigError for a file that is missing or named twice, DataError for one that cannot be read.
    """
    paths = expand(files, key)
    absolute_paths = [Path(os.path.abspath(path)) for path in paths]
    repeated = [path for path, count in Counter(absolute_paths).items() if count > 1]
    if repeated:
        raise ConfigError(f"{key}: {repeated[0]} is named twice, so its rows would count twice.")
    root = None
    if len({path.name for path in absolute_paths}) < len(absolute_paths):
        root = os.path.commonpath([path.parent for path in absolute_paths])
    rows: list[Row] = []
    digests: list[str] = []
    for path, absolute in zip(paths, absolute_paths, strict=True):
        if path.is_dir():
            file_rows, classes = _read_arrow_directory(path)
            digests.extend(_sha256(file.read_bytes()) for file in sorted(path.glob("*.arrow")))
        else:
            try:
                content = path.read_bytes()
            except OSError as error:
                raise ConfigError(f"{key}={path}: {error.strerror}.") from None
            digests.append(_sha256(content))
            file_rows, classes = list(read(path, content, problems, csv_columns)), _parquet_classes(path, content)
        if classes:  # the names may not be part of the file's content
            digests.append(digest_of(classes))
        if root is not None:
            name = absolute.relative_to(root).as_posix()
            file_rows = [replace(row, name=name + row.where[len(str(path)) :]) for row in file_rows]
        rows.extend(file_rows)
    return FilesRead(rows, paths, digests)


def expand(files: Any, key: str) -> list[Path]:
    """Paths and globs as a list of existing files. Raises ConfigError for one that is missing."""
    paths: list[Path] = []
    for name in files if isinstance(files, (list, tuple)) else [files]:
        name = str(Path(str(name)).expanduser())
        matches = (
            sorted(glob.glob(name, recursive=True)) if glob.has_magic(name) and not os.path.exists(name) else [name]
        )
        existing = [Path(match) for match in matches if isfile(match) or isfile(f"{match}/state.json")]
        if not existing:
            raise ConfigError(f"{key}={name}: {_missing(Path(name))}")
        paths.extend(existing)
    return paths


def _missing(path: Path) -> str:
    """Why a path cannot be read as a file."""
    if os.path.isdir(path):
        splits = _directory_splits(path)
        names = [path / split for split in splits] or [
            path / f"*{ending}" for ending in FORMATS if any(path.glob(f"*{ending}"))
        ]
        hint = f"; name the files in it: {', '.join(map(str, names))}" if names else ""
        return f"a directory{' of several splits' if splits else ''}, a file was expected{hint}."
    if os.path.exists(path):  # unlike Path.exists, False for a name that is too long
        return "no regular file."
    folder = path.parent
    if not os.path.isdir(folder):
        return f"no such file ({folder} is no directory)."
    near = nearest(path.name, [p.name for p in folder.iterdir() if p.is_file()][:200])
    return f"no such file{f'; did you mean {folder / near}?' if near else '.'}"


def _read_arrow_directory(path: Path) -> tuple[list[Row], dict[str, list[str]]]:
    """The rows and class names of a directory of `Dataset.save_to_disk`."""
    import datasets

    try:
        return _dataset_rows(datasets.load_from_disk(str(path)), f"{path}:row ")
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{path}: not a directory of datasets.save_to_disk ({error}).") from None


def _dataset_rows(dataset: Any, where: str) -> tuple[list[Row], dict[str, list[str]]]:
    """The rows as they are stored, without decoding images or audio, and the class names by column."""
    classes = _class_names(dataset.features.to_dict())
    return list(_table_rows(dataset.with_format("arrow")[:], where, classes)), classes


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
    if text.count("[") + text.count("{") > MAX_NESTING:
        nested = [values]
        for _ in range(MAX_NESTING):
            nested = [
                child
                for value in nested
                if isinstance(value, (dict, list))
                for child in (value.values() if isinstance(value, dict) else value)
            ]
        if nested:
            raise RecursionError
    if "\\ud" in text or "\\uD" in text:
        try:
            canonical(values).encode()
        except UnicodeEncodeError:
            raise ValueError("half a character, a lone surrogate such as \\ud83d") from None


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

    position, counted, line, last_line, first = skip_space(0), 0, 1, 0, True
    if not text.startswith("[", position):
        hint = "; one object per line belongs in a .jsonl file, an array within an object in a file of its own"
        raise DataError(
            f"{path}:1: a JSON array of objects was expected{hint if text.startswith('{', position) else ''}."
        )
    position += 1
    while True:
        position = skip_space(position)
        comma = text.startswith(",", position)
        if comma and not first:
            position = skip_space(position + 1)
        line, counted = line + text.count("\n", counted, position), position
        if text.startswith("]", position) and not comma:
            if text[position + 1 :].strip():
                raise DataError(f"{path}:{line}: text after the end of the array.")
            return
        if comma == first:
            raise DataError(f"{path}:{line}: not JSON ({'one comma too many' if first else 'a comma is missing'}).")
        # A second row on the same line gets its column too.
        column = position - text.rfind("\n", 0, position)
        where = f"{path}:{line}" if line > last_line else f"{path}:{line}:{column}"
        first, last_line, start = False, line, position
        try:
            values, position = _DECODER.raw_decode(text, start)
            _check_values(text[start:position], values)
        except (ValueError, RecursionError) as error:
            where = f"{path}:{getattr(error, 'lineno', line)}"
            raise DataError(f"{where}: not JSON ({_not_json(error)}); the array is broken from here on.") from None
        yield from _object_row(values, where, problems)


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


def _read_parquet(path: Path, content: bytes) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(content), page_checksum_verification=True)
        table = file.read()
    except Exception as error:  # pyarrow raises many kinds of errors for a damaged file
        reason = str(error).partition("\n")[0]
        raise DataError(f"{path}: not a parquet file, or a damaged one ({reason}).") from None
    return _table_rows(table, f"{path}:row ", _parquet_classes(path, content))


def _parquet_classes(path: Path, content: bytes) -> dict[str, list[str]]:
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
