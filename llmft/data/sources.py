"""Files, Hub datasets and generators to rows, with the faulty line named.

Files are read by our own small readers, because a row that is wrong must be named by file and line, and because
a file is known by its content: `datasets` fills a missing column with None, turns a column with one wrong value
into another type, and returned old rows for an edited file of the same size and time.
"""

from __future__ import annotations

import bz2
import csv
import glob
import gzip
import hashlib
import importlib
import inspect
import io
import json
import lzma
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmft.config import BadRow, DataConfig, Files
from llmft.errors import ConfigError, DataError, nearest
from llmft.schema import canonical

SPLITS = ("train", "validation", "test")
COMPRESSED = {".gz": gzip.decompress, ".bz2": bz2.decompress, ".xz": lzma.decompress}
MOST_KEPT = 4000
"""Characters of a rejected row that are kept."""
FORMATS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt")


@dataclass(frozen=True, slots=True)
class Row:
    """One row: its columns, and where it stands (`file:line`)."""

    values: dict[str, Any]
    where: str


@dataclass
class Problems:
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


def load_rows(data: DataConfig, problems: Problems) -> Loaded:
    """Reads what `data` names.

    Raises:
        ConfigError: a file, generator or dataset that does not exist.
        DataError: a row that cannot be read, or no rows at all.
    """
    if data.source:
        loaded = _from_generator(data)
    elif data.files or data.split_files.train:  # a local copy comes before the Hub
        loaded = _from_files(data, problems)
    else:
        loaded = _from_hub(data)
    if not loaded.splits.get("train"):
        raise DataError(f"data={data.name} has no training rows: {_named(data)} is empty.")
    return loaded


def _named(data: DataConfig) -> str:
    return str(data.source or data.files or data.split_files.train or data.hub)


# ---------------------------------------------------------------------------------------------------- generators


def _from_generator(data: DataConfig) -> Loaded:
    assert data.source is not None
    module_name, _, function_name = data.source.rpartition(".")
    if not module_name.startswith("llmft.data."):
        raise ConfigError(f"data.source={data.source}: only functions under llmft.data may make rows.")
    try:
        generate = getattr(importlib.import_module(module_name), function_name)
        takes = list(inspect.signature(generate).parameters)
    except (ImportError, AttributeError, TypeError, ValueError):
        raise ConfigError(f"data.source={data.source}: no such function.") from None
    if takes != ["split", "num_rows", "seed"]:
        raise ConfigError(f"data.source={data.source}: a source takes (split, num_rows, seed), this takes {takes}.")
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
    from llmft.model.hub import online_or_cached

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
        splits[split] = [Row(dict(values), f"{data.hub}/{name}:{n}") for n, values in enumerate(found[name], 1)]
        digest.update(str(getattr(found[name], "_fingerprint", name)).encode())
    return Loaded(splits, digest.hexdigest())


# --------------------------------------------------------------------------------------------------------- files


def _from_files(data: DataConfig, problems: Problems) -> Loaded:
    given = Files(train=data.files) if data.files else data.split_files
    splits: dict[str, list[Row]] = {}
    digests: dict[str, list[str]] = {}
    for split in SPLITS:
        named = getattr(given, split)
        if not named:
            continue
        key = "data.files" if data.files else f"data.split_files.{split}"
        splits[split], digests[split] = [], []
        for path in expand(named, key):
            if path.is_dir():
                splits[split].extend(_read_arrow_directory(path))
                digests[split].extend(hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(path.glob("*.arrow")))
                continue
            content = path.read_bytes()
            digests[split].append(hashlib.sha256(content).hexdigest())
            splits[split].extend(read(path, content, problems, data.csv_columns))
    return Loaded(splits, hashlib.sha256(canonical(digests).encode()).hexdigest())


def expand(named: Any, key: str) -> list[Path]:
    """Paths and globs as a sorted list of existing files; ConfigError names the one that is missing."""
    paths: list[Path] = []
    for name in named if isinstance(named, (list, tuple)) else [named]:
        name = str(Path(str(name)).expanduser())
        matches = (
            sorted(glob.glob(name, recursive=True)) if glob.has_magic(name) and not Path(name).exists() else [name]
        )
        files = [Path(match) for match in matches if Path(match).is_file() or (Path(match) / "state.json").is_file()]
        if not files:
            folder = Path(name).parent
            near = [p.name for p in folder.iterdir() if p.is_file()][:200] if folder.is_dir() else []
            best = nearest(Path(name).name, near)
            hint = f"; did you mean {folder / best}?" if best else ""
            where = "" if folder.is_dir() else f" ({folder} is no directory)"
            raise ConfigError(f"{key}={name}: no such file{where}{hint or '.'}")
        paths.extend(files)
    return paths


def _read_arrow_directory(path: Path) -> Iterator[Row]:
    """A directory that `datasets` wrote with save_to_disk."""
    import datasets

    try:
        found = datasets.load_from_disk(str(path))
    except Exception as error:
        raise DataError(f"{path}: not a directory of datasets.save_to_disk ({error}).") from None
    for number, values in enumerate(found, start=1):
        yield Row(dict(values), f"{path}:row {number}")


def read(path: Path, content: bytes, problems: Problems, csv_columns: Sequence[str] = ()) -> Iterator[Row]:
    """The rows of one file, its format told by its ending (a compressed one is opened first).

    `csv_columns` are the names of the columns of a csv or tsv file that has no header line.
    """
    endings = [suffix.lower() for suffix in path.suffixes]
    if endings and endings[-1] in COMPRESSED:
        try:
            content = COMPRESSED[endings[-1]](content)
        except (OSError, EOFError, ValueError, lzma.LZMAError) as error:
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


def _lines(path: Path, content: bytes, problems: Problems) -> Iterator[tuple[str, str, bool]]:
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


def _check_characters(text: str, values: Any) -> None:
    """Refuses half a character (a lone surrogate), which JSON can spell and no tokenizer can read."""
    if "\\ud" in text or "\\uD" in text:
        try:
            canonical(values).encode()
        except UnicodeEncodeError:
            raise ValueError("half a character, a lone surrogate such as \\ud83d") from None


def _read_json_lines(path: Path, content: bytes, problems: Problems) -> Iterator[Row]:
    for where, line, cut in _lines(path, content, problems):
        try:
            values = _DECODER.decode(line)
            _check_characters(line, values)
        except (ValueError, RecursionError) as error:
            place = f" at column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
            reason = f"not JSON ({getattr(error, 'msg', error)}{place})"
            problems.add(where, reason, line, "; the last line has no newline: cut off?" if cut else "")
            continue
        yield from _checked(values, where, problems)


def _read_lines(path: Path, content: bytes, problems: Problems) -> Iterator[Row]:
    for where, line, _ in _lines(path, content, problems):
        yield Row({"text": line}, where)


def _checked(values: Any, where: str, problems: Problems) -> Iterator[Row]:
    if isinstance(values, dict):
        yield Row(values, where)
    else:
        problems.add(where, f"a JSON object was expected, not {type(values).__name__}", values)


def _read_json(path: Path, text: str, problems: Problems) -> Iterator[Row]:
    """An array of objects, each with the line it starts on."""
    position, line, counted = 0, 1, 0

    def skip(characters: str) -> None:
        nonlocal position
        while position < len(text) and text[position] in characters:
            position += 1

    skip(" \t\r\n")
    if text[position : position + 1] != "[":
        hint = "; one object per line belongs in a .jsonl file" if text[position : position + 1] == "{" else ""
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
        counted = position
        if text[position : position + 1] == "]" and not comma:
            if text[position + 1 :].strip():
                raise DataError(f"{path}:{line}: text behind the end of the array.")
            return
        if comma == first:
            raise DataError(f"{path}:{line}: not JSON (a comma is {'too many' if first else 'missing'}).")
        first = False
        where = f"{path}:{line}"
        try:
            begin = position
            values, position = _DECODER.raw_decode(text, begin)
            _check_characters(text[begin:position], values)
        except (ValueError, RecursionError) as error:
            number = getattr(error, "lineno", line)
            raise DataError(
                f"{path}:{number}: not JSON ({getattr(error, 'msg', error)}); the array is broken from here on."
            ) from None
        yield from _checked(values, where, problems)


def _read_csv(path: Path, text: str, problems: Problems, delimiter: str, names: list[str]) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        header: list[str] | None = names or next(reader, None)
        if header is None:
            return
        twice = [name for name, count in Counter(header).items() if count > 1]
        if twice:
            where = "data.csv_columns" if names else f"{path}:1: the header"
            raise DataError(f"{where} names the column '{twice[0]}' twice; rename one.")
        begin = reader.line_num + 1
        for cells in reader:
            where, begin = f"{path}:{begin}", reader.line_num + 1
            if not cells:
                continue
            if len(cells) != len(header):
                what = "data.csv_columns" if names else "the header"
                problems.add(where, f"{len(cells)} cells where {what} has {len(header)}", cells)
                continue
            yield Row(dict(zip(header, cells, strict=True)), where)
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num}: not CSV ({error}).") from None


def _read_parquet(path: Path, content: bytes) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(pyarrow.BufferReader(content))
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: not a parquet file ({error}).") from None
    for number, values in enumerate(table.to_pylist(), start=1):
        yield Row(values, f"{path}:row {number}")
