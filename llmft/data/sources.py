"""Files, Hub datasets and generators to rows, with the faulty line named.

Files are read by our own small readers, because a row that is wrong must be named by file and line, and because
a file is known by its content: `datasets` fills a missing column with None, turns a column with one wrong value
into another type, and returned old rows for an edited file of the same size and time.
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
from os.path import isfile
from pathlib import Path
from typing import Any

from llmft.config.convert import canonical
from llmft.config.instantiate import find
from llmft.config.sections import BadRow, Columns, DataConfig
from llmft.core.errors import ConfigError, DataError, nearest
from llmft.data.naming import NotFinite, Unreadable, below, is_nested, names_in

SPLITS = ("train", "validation", "test")
COMPRESSED = {".gz": gzip.decompress, ".bz2": bz2.decompress, ".xz": lzma.decompress}
MOST_KEPT = 4000
"""Characters of a rejected row that are kept."""
MOST_NESTED = 100
"""Levels of lists and objects in a row: Python's own readers and writers give up at some hundreds."""
ARRAY = "; an array of objects belongs in a .json file"
FORMATS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt")


@dataclass(frozen=True, slots=True)
class Row:
    """One row: its columns, where it stands (`file:line`), and the file's name where another file has it too."""

    values: dict[str, Any]
    where: str
    name: str = ""

    @property
    def id(self) -> str:
        """What the row is called: where it stands, without the folders, which differ from machine to machine."""
        return self.name or self.where.rpartition("/")[2]


@dataclass
class BadRows:
    """Rows that cannot be used: the first one stops the run, or all are counted by reason and kept for the record."""

    policy: BadRow = BadRow.error
    rejected: list[dict[str, Any]] = field(default_factory=list)

    def add(self, where: str, reason: str, row: Any, advice: str = "") -> None:
        """Records a bad row with its content, as far as it could be read; raises DataError under on_bad_row=error."""
        if self.policy is BadRow.error:
            raise DataError(f"{where}: {reason}{advice} (data.on_bad_row=skip leaves such rows out).")
        self.rejected.append({"where": where, "reason": reason, "row": shortened(row)})

    def reasons(self) -> dict[str, int]:
        """How many rows were left out, by reason."""
        return dict(Counter(entry["reason"] for entry in self.rejected))


def shortened(row: Any) -> Any:
    """A row as JSON holds it; as the beginning of its text where it is very long."""
    text = row if isinstance(row, str) else json.dumps(row, ensure_ascii=False, default=str)
    return f"{text[:MOST_KEPT]} …" if len(text) > MOST_KEPT else json.loads(json.dumps(row, default=str))


@dataclass(frozen=True)
class Loaded:
    """The rows of each split that was given, and a fingerprint of all content they come from."""

    splits: dict[str, list[Row]]
    fingerprint: str


def load_rows(data: DataConfig, problems: BadRows) -> Loaded:
    """Reads what `data` names.

    Raises:
        ConfigError: a file, generator or dataset that does not exist, or one that would not be used.
        DataError: a row that cannot be read, or no rows at all.
    """
    names = list(chain.from_iterable(named_columns(data).values()))
    _refuse_unused(data)
    if data.source:
        loaded = _from_generator(data)
    elif data.files or data.split_files.train:  # a local copy comes before the Hub
        loaded = _from_files(data, problems)
    else:
        loaded = _from_hub(data)
    if not loaded.splits.get("train"):
        if problems.rejected:
            first = problems.rejected[0]
            raise DataError(f"data={data.name}: no training row can be read; {first['where']}: {first['reason']}.")
        raise DataError(f"data={data.name} has no training rows: {_named(data)} is empty.")
    return replace(loaded, splits={split: with_nested(rows, names) for split, rows in loaded.splits.items()})


def named_columns(data: DataConfig) -> dict[str, list[str]]:
    """The columns that each key of `data` names. Raises ConfigError for a template that cannot be read."""
    made: dict[str, list[str]] = {}
    for entry in fields(Columns):
        key, template = f"data.columns.{entry.name}", getattr(data.columns, entry.name)
        try:
            made[key] = names_in(template)
        except ValueError as error:
            raise ConfigError(f"{key}={template}: {error}; a brace of the text itself is written twice.") from None
    made["data.target_columns"] = list(data.target_columns)
    return made | {f"data.{key}": [name] for key in ("stratify", "group") if (name := getattr(data, key))}


def with_nested(rows: list[Row], names: Iterable[str]) -> list[Row]:
    """`rows` with a column for each nested name, such as `instances[0].output`, that they have."""
    nested = [name for name in dict.fromkeys(names) if is_nested(name)]
    return [replace(row, values={**row.values, **_nested(row, nested)}) for row in rows] if nested else rows


def _nested(row: Row, names: list[str]) -> dict[str, Any]:
    values = {}
    for name in names:
        with contextlib.suppress(KeyError, IndexError):
            values[name] = row.values[name] if name in row.values else below(row.values, name)
    return values


def _refuse_unused(data: DataConfig) -> None:
    """Raises ConfigError for a key that names rows which would not be read."""
    local = bool(data.files or data.split_files.train)
    wants: dict[str, dict[str, Any]] = {
        "data.files": {f"split_files.{split}": not local and getattr(data.split_files, split) for split in SPLITS},
        "data.source": {"rows": not data.source and data.rows},
        "data.hub": {f"hub_splits.{split}": not data.hub and getattr(data.hub_splits, split) for split in SPLITS},
        "data.pseudo": {"pseudo_rows": not data.pseudo and data.pseudo_rows},
    }
    wants["data.files"]["csv_columns"] = not local and data.csv_columns
    wants["data.hub"]["hub_config"] = not data.hub and data.hub_config
    for needed, keys in wants.items():
        for key, value in keys.items():
            if value:
                raise ConfigError(f"data.{key}={value} goes with {needed}, which is not set.")
    if data.source and data.hub:
        raise ConfigError("data.source and data.hub are both set: keep one.")


def _named(data: DataConfig) -> str:
    return str(data.source or data.files or data.split_files.train or data.hub)


# ---------------------------------------------------------------------------------------------------- generators


def _from_generator(data: DataConfig) -> Loaded:
    assert data.source is not None
    generate = find(data.source, "data.source", "source")
    splits = {
        split: [
            Row(values, f"{data.name}:{split}:{number}")
            for number, values in enumerate(generate(split, data.rows[split], data.split_seed), start=1)
        ]
        for split in SPLITS
        if data.rows.get(split)
    }
    content = canonical({split: [row.values for row in rows] for split, rows in splits.items()})
    return Loaded(splits, hashlib.sha256(content.encode()).hexdigest())


# ----------------------------------------------------------------------------------------------------------- Hub


def _from_hub(data: DataConfig) -> Loaded:
    from llmft.data.hub import online_or_cached

    if data.hub and Path(data.hub).exists():
        raise ConfigError(f"data.hub={data.hub}: that is a path; set data.files to the files in it.")

    def load() -> Any:
        import datasets

        return datasets.load_dataset(data.hub, data.hub_config, revision=data.hub_revision)

    found = online_or_cached(f"data.hub={data.hub}", data.hub or "", "dataset", load)
    wanted = {split: getattr(data.hub_splits, split) for split in SPLITS}
    wanted["train"] = wanted["train"] or "train"
    splits: dict[str, list[Row]] = {}
    digest = hashlib.sha256(f"{data.hub}@{data.hub_revision}/{data.hub_config}".encode())
    for split, name in wanted.items():
        if name is None:
            continue
        if name not in found:
            raise ConfigError(f"data.hub_splits.{split}={name}: {data.hub} has {', '.join(found)}.")
        splits[split], classes = _dataset_rows(found[name], f"{data.hub}/{name}:")
        digest.update(str(getattr(found[name], "_fingerprint", name)).encode())
        digest.update(canonical(classes).encode() if classes else b"")
    return Loaded(splits, digest.hexdigest())


# --------------------------------------------------------------------------------------------------------- files


def _from_files(data: DataConfig, problems: BadRows) -> Loaded:
    given = {split: (f"data.split_files.{split}", getattr(data.split_files, split)) for split in SPLITS}
    if data.files:
        given["train"] = ("data.files", data.files)
        for split, path in _splits_of_directory(data.files).items():
            if split != "train" and given[split][1]:
                raise ConfigError(f"{given[split][0]} is set, and data.files={data.files} has {split} rows: keep one.")
            given[split] = ("data.files", str(path))
    read = {split: read_files(named, key, problems, data.csv_columns) for split, (key, named) in given.items() if named}
    paths = [path for part in read.values() for path in part.paths]
    check_csv_columns(data.csv_columns, paths)
    digests = {split: part.digests for split, part in read.items()}
    for split, part in read.items():
        if not part.rows and split != "train" and not problems.rejected:
            raise DataError(f"{given[split][0]}={given[split][1]}: no rows.")
    rows = {split: part.rows for split, part in read.items()}
    return Loaded(rows, hashlib.sha256(canonical(digests).encode()).hexdigest())


def _splits_of_directory(named: Any) -> dict[str, Path]:
    """The splits of a directory that `DatasetDict.save_to_disk` wrote; none of anything else."""
    path = Path(str(named)).expanduser()
    there = _directory_splits(path)
    if there and ("train" not in there or not set(there) <= set(SPLITS)):
        raise ConfigError(
            f"data.files={named}: a directory of the splits {', '.join(there)}; say which is which: "
            f"data.split_files.train={path / there[0]}, data.split_files.validation=…"
        )
    return {split: path / split for split in there}


def _directory_splits(path: Path) -> list[str]:
    try:
        return [str(name) for name in json.loads((path / "dataset_dict.json").read_text())["splits"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def check_csv_columns(names: Sequence[str], paths: Sequence[Path]) -> None:
    """Raises ConfigError where data.csv_columns is set and no file is one whose columns it could name."""
    if names and not any({".csv", ".tsv"} & {suffix.lower() for suffix in path.suffixes} for path in paths):
        raise ConfigError(f"data.csv_columns is for csv and tsv files, and {paths[0]} is none: leave it out.")


@dataclass(frozen=True)
class Read:
    """The rows of a list of files, and the files with a digest of each one's content."""

    rows: list[Row]
    paths: list[Path]
    digests: list[str]


def read_files(named: Any, key: str, problems: BadRows, csv_columns: Sequence[str] = ()) -> Read:
    """The rows of all files that `key` names; every row has an id of its own.

    A row is called by its file's name and its line; where two files have one name, by the path below the folder that
    holds all of them.

    Raises ConfigError for a file that is missing or named twice, DataError for one that cannot be read.
    """
    paths = expand(named, key)
    whole = [Path(os.path.abspath(path)) for path in paths]
    twice = [path for path, count in Counter(whole).items() if count > 1]
    if twice:
        raise ConfigError(f"{key}: {twice[0]} is named twice; its rows would count twice.")
    root = None
    if len({path.name for path in whole}) < len(whole):
        root = os.path.commonpath([path.parent for path in whole])
    rows: list[Row] = []
    digests: list[str] = []
    for path, absolute in zip(paths, whole, strict=True):
        if path.is_dir():
            part, classes = _read_arrow_directory(path)
            digests.extend(hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(path.glob("*.arrow")))
        else:
            try:
                content = path.read_bytes()
            except OSError as error:
                raise ConfigError(f"{key}={path}: {error.strerror}.") from None
            digests.append(hashlib.sha256(content).hexdigest())
            part, classes = list(read(path, content, problems, csv_columns)), _parquet_classes(path, content)
        if classes:  # the rows hold the names, which are not part of the content in every file
            digests.append(hashlib.sha256(canonical(classes).encode()).hexdigest())
        if root is not None:
            name = absolute.relative_to(root).as_posix()
            part = [replace(row, name=name + row.where[len(str(path)) :]) for row in part]
        rows.extend(part)
    return Read(rows, paths, digests)


def expand(named: Any, key: str) -> list[Path]:
    """Paths and globs as a sorted list of existing files; ConfigError names the one that is missing."""
    paths: list[Path] = []
    for name in named if isinstance(named, (list, tuple)) else [named]:
        name = str(Path(str(name)).expanduser())
        matches = (
            sorted(glob.glob(name, recursive=True)) if glob.has_magic(name) and not os.path.exists(name) else [name]
        )
        files = [Path(match) for match in matches if isfile(match) or isfile(f"{match}/state.json")]
        if not files:
            raise ConfigError(f"{key}={name}: {_missing(Path(name))}")
        paths.extend(files)
    return paths


def _missing(path: Path) -> str:
    """Why there is nothing to read under a name."""
    if os.path.isdir(path):
        splits = _directory_splits(path)
        names = [path / split for split in splits] or [
            path / f"*{ending}" for ending in FORMATS if any(path.glob(f"*{ending}"))
        ]
        which = f"; name what is in it: {', '.join(map(str, names))}" if names else ""
        return f"a directory{' of several splits' if splits else ''}, a file was expected{which}."
    if os.path.exists(path):  # unlike Path's own, it takes a name that is too long for one that is not there
        return "no regular file."
    folder = path.parent
    if not os.path.isdir(folder):
        return f"no such file ({folder} is no directory)."
    best = nearest(path.name, [p.name for p in folder.iterdir() if p.is_file()][:200])
    return f"no such file{f'; did you mean {folder / best}?' if best else '.'}"


def _read_arrow_directory(path: Path) -> tuple[list[Row], dict[str, list[str]]]:
    """The rows of a directory that `datasets` wrote with save_to_disk, and the names of its classes."""
    import datasets

    try:
        return _dataset_rows(datasets.load_from_disk(str(path)), f"{path}:row ")
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{path}: not a directory of datasets.save_to_disk ({error}).") from None


def _dataset_rows(dataset: Any, where: str) -> tuple[list[Row], dict[str, list[str]]]:
    """The rows as they are stored, images and sounds not decoded, and the names of the classes."""
    classes = _class_names(dataset.features.to_dict())
    return list(_table_rows(dataset.with_format("arrow")[:], where, classes)), classes


def read(path: Path, content: bytes, problems: BadRows, csv_columns: Sequence[str] = ()) -> Iterator[Row]:
    """The rows of one file, its format told by its ending (a compressed one is opened first).

    `csv_columns` are the names of the columns of a csv or tsv file that has no header line.
    """
    endings = [suffix.lower() for suffix in path.suffixes]
    if endings and endings[-1] in COMPRESSED:
        try:
            content = COMPRESSED[endings[-1]](content)
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
        return _read_lines(path, content, problems)
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
    """Non-empty decoded lines as (where, text, is the last line and has no newline)."""
    lines = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    for number, raw in enumerate(lines, start=1):
        if not raw.strip():
            continue
        where = f"{path}:{number}"
        try:
            yield where, raw.decode("utf-8").rstrip("\r"), number == len(lines)
        except UnicodeDecodeError as error:
            problems.add(where, _not_utf8(error, raw), raw.decode("utf-8", "replace"))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON; a key that stands twice hides a value."""
    made = dict(pairs)
    if len(made) != len(pairs):
        twice = next(key for place, (key, _) in enumerate(pairs) if key in dict(pairs[:place]))
        raise ValueError(f"the key '{twice}' stands twice")
    return made


_DECODER = json.JSONDecoder(object_pairs_hook=_unique)


def _check_values(text: str, values: Any) -> None:
    """Refuses half a character (a lone surrogate), which JSON can spell and no tokenizer can read, and deep nesting."""
    if text.count("[") + text.count("{") > MOST_NESTED:
        level = [values]
        for _ in range(MOST_NESTED):
            level = [inner for value in level if isinstance(value, (dict, list)) for inner in _inner(value)]
        if level:
            raise RecursionError
    if "\\ud" in text or "\\uD" in text:
        try:
            canonical(values).encode()
        except UnicodeEncodeError:
            raise ValueError("half a character, a lone surrogate such as \\ud83d") from None


def _inner(value: dict[str, Any] | list[Any]) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value


def _not_json(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return f"nested more than {MOST_NESTED} levels deep"
    return getattr(error, "msg", str(error).partition("; use sys.")[0])


def _read_json_lines(path: Path, content: bytes, problems: BadRows) -> Iterator[Row]:
    for where, line, cut in _lines(path, content, problems):
        try:
            values = _DECODER.decode(line)
            _check_values(line, values)
        except (ValueError, RecursionError) as error:
            place = f" at column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
            reason = f"not JSON ({_not_json(error)}{place})"
            advice = "; the last line has no newline: cut off?" if cut else ""
            problems.add(where, reason, line, ARRAY if line.lstrip().startswith("[") else advice)
            continue
        yield from _checked(values, where, problems, ARRAY)


def _read_lines(path: Path, content: bytes, problems: BadRows) -> Iterator[Row]:
    for where, line, _ in _lines(path, content, problems):
        yield Row({"text": line}, where)


def _checked(values: Any, where: str, problems: BadRows, advice: str = "") -> Iterator[Row]:
    if isinstance(values, dict):
        yield Row(values, where)
    else:
        advice = advice if isinstance(values, list) else ""
        problems.add(where, f"a JSON object was expected, not {type(values).__name__}", values, advice)


def _read_json(path: Path, text: str, problems: BadRows) -> Iterator[Row]:
    """An array of objects, each with the line it starts on."""
    position, line, counted, line_start, last_line = 0, 1, 0, 0, 0

    def skip(characters: str) -> None:
        nonlocal position
        while position < len(text) and text[position] in characters:
            position += 1

    skip(" \t\r\n")
    if text[position : position + 1] != "[":
        hint = ""
        if text[position : position + 1] == "{":
            hint = "; one object per line belongs in a .jsonl file, an array within an object in a file of its own"
        raise DataError(f"{path}:1: a JSON array of objects was expected{hint}.")
    position += 1
    first = True
    while True:
        skip(" \t\r\n")
        comma = text[position : position + 1] == ","
        if comma and not first:
            position += 1
            skip(" \t\r\n")
        line += text.count("\n", counted, position)
        line_start = max(line_start, text.rfind("\n", counted, position) + 1)
        counted = position
        if text[position : position + 1] == "]" and not comma:
            if text[position + 1 :].strip():
                raise DataError(f"{path}:{line}: text behind the end of the array.")
            return
        if comma == first:
            raise DataError(f"{path}:{line}: not JSON (a comma is {'too many' if first else 'missing'}).")
        first = False
        # The second row on a line is told by its column too.
        where = f"{path}:{line}" if line > last_line else f"{path}:{line}:{position - line_start + 1}"
        last_line = line
        try:
            begin = position
            values, position = _DECODER.raw_decode(text, begin)
            _check_values(text[begin:position], values)
        except (ValueError, RecursionError) as error:
            number = getattr(error, "lineno", line)
            raise DataError(
                f"{path}:{number}: not JSON ({_not_json(error)}); the array is broken from here on."
            ) from None
        yield from _checked(values, where, problems)


def _read_csv(path: Path, text: str, problems: BadRows, delimiter: str, names: list[str]) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        header: list[str] | None = names or next(reader, None)
        if header is None:
            return
        other = next((mark for mark in ";\t|," if mark != delimiter and mark in "".join(header)), None)
        if other and len(header) == 1 and not names:
            raise DataError(f"{path}:1: {other!r} stands between the columns, where {delimiter!r} should: save it so.")
        twice = [name for name, count in Counter(header).items() if count > 1]
        if twice:
            where = "data.csv_columns" if names else f"{path}:1: the header"
            raise DataError(f"{where} names the column '{twice[0]}' twice; rename one.")
        begin = reader.line_num + 1
        rows: list[Row] = []
        for cells in reader:
            where, begin = f"{path}:{begin}", reader.line_num + 1
            if not cells:
                continue
            if len(cells) != len(header):
                what = "data.csv_columns" if names else "the header"
                problems.add(where, f"{len(cells)} cells where {what} has {len(header)}", cells)
                continue
            rows.append(Row(dict(zip(header, cells, strict=True)), where))
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num}: not CSV ({error}).") from None
    for name in header:
        _mark_not_finite(rows, name)
    yield from rows


def _mark_not_finite(rows: list[Row], name: str) -> None:
    """Marks the cells of a column of numbers that are not finite: there `inf` is no word."""
    finite, others = False, []
    for row in rows:
        try:
            if math.isfinite(float(row.values[name] or "nan")):
                finite = True
            elif row.values[name]:
                others.append(row)
        except ValueError:
            return
    for row in others if finite else ():
        row.values[name] = NotFinite(row.values[name])


def _read_parquet(path: Path, content: bytes) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(content), page_checksum_verification=True)
        table = file.read()
    except Exception as error:  # of whatever kind, and it has many: the file is damaged
        reason = str(error).partition("\n")[0]
        raise DataError(f"{path}: not a parquet file, or a damaged one ({reason}).") from None
    return _table_rows(table, f"{path}:row ", _parquet_classes(path, content))


def _parquet_classes(path: Path, content: bytes) -> dict[str, list[str]]:
    """The names of the classes that `datasets` wrote into a parquet file's metadata."""
    if path.suffix.lower() != ".parquet":
        return {}
    import pyarrow.parquet

    metadata = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(content)).schema_arrow.metadata or {}
    try:
        return _class_names(json.loads(metadata.get(b"huggingface", b"{}"))["info"]["features"])
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}


def _class_names(features: dict[str, Any]) -> dict[str, list[str]]:
    """The classes, in their order, of each column that `datasets` calls a ClassLabel or a list of them."""
    made = {}
    for name, feature in features.items():
        inner = feature[0] if isinstance(feature, list) and feature else feature
        inner = inner.get("feature", inner) if isinstance(inner, dict) else inner
        if isinstance(inner, dict) and inner.get("_type") == "ClassLabel":
            made[name] = [str(label) for label in inner["names"]]
    return made


def _table_rows(table: Any, where: str, classes: dict[str, list[str]]) -> Iterator[Row]:
    """The rows of an Arrow table; numbers of `classes` become their names."""
    twice = [name for name, count in Counter(table.column_names).items() if count > 1]
    if twice:
        raise DataError(f"{where.rpartition(':')[0]}: two columns are called '{twice[0]}'; rename one.")
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

    if pa.types.is_timestamp(column.type) and column.type.unit == "ns":  # for which Python has no type
        for kind in (pa.timestamp("us", column.type.tz), pa.string()):
            with contextlib.suppress(pa.ArrowException):
                column = column.cast(kind)
                break
    try:
        return list(column.to_pylist())
    except Exception:  # a time in the year 20000, text that is no UTF-8: some values have no Python form
        return [_value(cell) for cell in column]


def _value(cell: Any) -> Any:
    try:
        return cell.as_py()
    except Exception:
        return Unreadable(cell.type)
