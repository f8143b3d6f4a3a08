"""Files, Hub datasets and generators to rows, as the config names them."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import chain
from operator import attrgetter
from os.path import isfile
from pathlib import Path
from typing import Any

from llmft.config.convert import canonical, digest_of
from llmft.config.data import Columns, DataConfig
from llmft.config.instantiate import SOURCE_ARGUMENTS, check_arguments, find
from llmft.core.errors import ConfigError, DataError, UserError, nearest
from llmft.data.naming import is_nested, names_in, nested_value
from llmft.data.readers import FORMATS, BadRows, Row, dataset_rows, parquet_classes, read, read_arrow_directory

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Loaded:
    """The rows of each given split, and a fingerprint of the content they were read from."""

    splits: dict[str, list[Row]]
    fingerprint: str


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
    key, advice = f"data.hub={data.hub}", "set data.files=FILE to a local copy, or HF_ENDPOINT to a mirror"
    dataset = online_or_cached(key, data.hub or "", "dataset", load, "datasets.load_dataset", arguments, advice)
    split_names = {split: getattr(data.hub_splits, split) for split in SPLITS}
    split_names["train"] = split_names["train"] or "train"
    splits: dict[str, list[Row]] = {}
    digest = hashlib.sha256(f"{data.hub}@{data.hub_revision}/{data.hub_config}".encode())
    for split, name in split_names.items():
        if name is None:
            continue
        if name not in dataset:
            raise ConfigError(f"data.hub_splits.{split}={name}: {data.hub} has {', '.join(dataset)}.")
        splits[split], classes = dataset_rows(dataset[name], f"{data.hub}/{name}:")
        digest.update(str(getattr(dataset[name], "_fingerprint", name)).encode())
        digest.update(canonical(classes).encode() if classes else b"")
    return Loaded(splits, digest.hexdigest())


# --------------------------------------------------------------------------------------------------------- files


def _from_files(data: DataConfig, problems: BadRows) -> Loaded:
    sources = {split: (f"data.split_files.{split}", getattr(data.split_files, split)) for split in SPLITS}
    if data.files:
        sources["train"] = ("data.files", data.files)
        for split, path in _splits_of_directory(data.files).items():
            key, named = sources[split]
            if split != "train" and named:
                raise ConfigError(f"{key} is set, and data.files={data.files} has {split} rows: keep one.")
            sources[split] = ("data.files", str(path))
    results = {
        split: read_files(named, key, problems, data.csv_columns) for split, (key, named) in sources.items() if named
    }
    check_csv_columns(data.csv_columns, [path for files in results.values() for path in files.paths])
    for split, files in results.items():
        if not files.rows and split != "train" and not problems.rejected:
            raise DataError(f"{sources[split][0]}={sources[split][1]}: no rows.")
    digest = digest_of({split: files.digests for split, files in results.items()})
    return Loaded({split: files.rows for split, files in results.items()}, digest)


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
            file_rows, classes = read_arrow_directory(path)
            digests.extend(hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(path.glob("*.arrow")))
        else:
            try:
                content = path.read_bytes()
            except OSError as error:
                raise ConfigError(f"{key}={path}: {error.strerror}.") from None
            digests.append(hashlib.sha256(content).hexdigest())
            file_rows, classes = list(read(path, content, problems, csv_columns)), parquet_classes(path, content)
        if classes:  # the names may not be part of the file's content
            digests.append(digest_of(classes))
        if root is not None:
            name = absolute.relative_to(root).as_posix()
            file_rows = [replace(row, name=name + row.where[len(str(path)) :]) for row in file_rows]
        rows.extend(file_rows)
    return FilesRead(rows, paths, digests)


def read_table(files: Any, key: str) -> list[Row]:
    """The rows of the files that `key` names. Raises like `read_files`, and DataError for a bad row or without rows."""
    rows = read_files(files, key, BadRows(key=None)).rows
    if not rows:
        raise DataError(f"{key}={files}: no rows.")
    return rows


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
