"""Rows from wherever the user keeps them: data sources, files, folders, the hub, objects in memory."""

from __future__ import annotations

import csv
import importlib
import io
import json
import logging
import random
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence, Set
from itertools import islice
from pathlib import Path
from typing import Any

from ..plugins import data_sources
from ..support.hub import hub_dataset, is_dataset_id
from ..support.texts import is_placeholder, shortened
from .errors import DataError

logger = logging.getLogger(__name__)

_TABLES = (".jsonl", ".json", ".csv", ".parquet")
SUFFIXES = (*_TABLES, ".txt")
"""Data files that are read."""


def sources_of(source: Any, option: str) -> list[str | Path] | None:
    """
    The sources that a list names; None where it is one source, or a list of rows.

    A text names a source where it is the name of a registered one, an existing file or folder, or, without any white
    space, has the ending of a data file or the form of a hub data set ("organization/name"). Any other is a request.

    Args:
        source: As for `salora_plugins.rows.reading.load_examples`.
        option: What the user calls this data, for messages.

    Raises:
        DataError: Only some of the entries name a source.
    """
    if not isinstance(source, (list, tuple)):
        return None
    named = [entry for entry in source if _names_source(entry)]
    if not named:
        return None
    if len(named) < len(source):
        other = next(entry for entry in source if not _names_source(entry))
        raise DataError(
            f"{option}: a list holds either sources or rows, but {str(named[0])!r} names a source and "
            f"{shortened(other)} does not. Put the rows into a file and name that, or write {{'prompt': ...}} for "
            "a request that looks like a source."
        )
    if len(set(map(str, named))) < len(named):
        raise DataError(f"{option}: a source is named twice ({', '.join(map(str, named))}). Name each once.")
    return named


def named_by_a_host(given: Sequence[str], option: str) -> str | list[str]:
    """
    What a command line names: one source, or several.

    Raises:
        DataError: One of several is no source; in Python, it would be a request.
    """
    if len(given) == 1:
        return given[0]
    for entry in given:
        if not _names_source(entry):
            raise DataError(
                f"{option} {entry}: this is neither a registered data source ({', '.join(sorted(data_sources()))}) "
                "nor a file or folder that is there. Check the name; requests go into a file, one a line."
            )
    return list(given)


def _names_source(entry: Any) -> bool:
    if isinstance(entry, Path) or (isinstance(entry, str) and entry in data_sources()):
        return True
    if not isinstance(entry, str) or not entry.strip():
        return False
    has_space = any(map(str.isspace, entry))
    if not has_space and ((is_dataset_id(entry) and entry.count("/") == 1) or Path(entry).suffix.lower() in SUFFIXES):
        return True
    if has_space and "/" not in entry and Path(entry).suffix.lower() not in SUFFIXES:
        return False  # most requests; none of them is looked for among the files
    try:
        return Path(entry).expanduser().exists()
    except (OSError, RuntimeError, ValueError):  # too long for a name, no home folder, a zero byte
        return False


def read_rows(
    source: Any, *, option: str, max_rows: int, columns: Collection[str], beside: Collection[str] = ()
) -> Iterable[tuple[int, Any]]:
    """The rows of a source with their numbers, from 1.

    Args:
        source: as for `salora_plugins.rows.reading.load_examples`.
        option: what the user calls this data, for messages.
        max_rows: of a larger source, a fixed random subset of this size is read (of a stream, the first
            rows).
        columns: the columns that will be looked at; of a `datasets.Dataset` no others are decoded.
        beside: further columns that are wanted where there is one of these.

    Raises:
        DataError: the source does not exist or cannot be read.
    """
    where = describe(source, option)
    if isinstance(source, str) and source in data_sources():
        rows = _call_data_source(source, where, max_rows)
    elif isinstance(source, (str, Path)):
        rows = _read_path(source, option, where)
    else:
        rows = source
    rows = _train_split(rows, where)
    if _is_dataset(rows):
        wanted: Collection[str] = (*columns, *beside) if set(columns) & set(rows.column_names) else rows.column_names
        # Without a known column all stay, for the error message to list them.
        rows = rows.with_format(None).select_columns([name for name in rows.column_names if name in wanted])
    elif not _holds_rows(rows):
        raise DataError(
            f"{where}: data of type {type(rows).__name__} is not understood. Give the name of a data source, "
            "a file, a folder, a hub data set id, a `datasets.Dataset`, or a list of rows (of a data frame: "
            "`frame.to_dict('records')`)."
        )
    elif not isinstance(rows, Sequence):
        return enumerate(islice(rows, max_rows), start=1)
    if len(rows) <= max_rows:
        return enumerate(rows, start=1)
    logger.info("%s: reading a random %d of %d rows", where, max_rows, len(rows))
    indices = sorted(random.Random(0).sample(range(len(rows)), max_rows))
    return ((index + 1, rows[index]) for index in indices)


def describe(source: Any, option: str) -> str:
    """The source as messages name it: `option='value'` if it is a short text, else only the option."""
    return f"{option}={str(source)!r}" if isinstance(source, (str, Path)) else option


def _call_data_source(name: str, where: str, max_rows: int) -> Any:
    try:
        rows = data_sources()[name]()
        if _holds_rows(rows) and not isinstance(rows, Sequence) and not _is_dataset(rows):
            rows = list(islice(rows, max_rows))  # it may be endless, and fail only here
    except Exception as error:
        raise DataError(f"{where}: the data source failed: {type(error).__name__}: {error}") from error
    return rows


def _holds_rows(rows: Any) -> bool:
    """
    Whether rows come one after another; data frames and tables give their columns, and sets another order in every
    process.
    """
    if isinstance(rows, (Mapping, Set, str, bytes, bytearray)) or hasattr(rows, "columns"):
        return False
    return isinstance(rows, Iterable)


def _read_path(source: str | Path, option: str, where: str) -> Any:
    path = Path(source).expanduser()
    if not str(source).strip():
        raise DataError(f"{where}: the name is empty. Give a file, a folder or a hub data set id.")
    if path.is_dir():
        return _read_folder(path, where)
    if path.is_file():
        return _read_file(path, where)
    if isinstance(source, str) and is_dataset_id(source) and path.suffix not in SUFFIXES:
        return _read_hub(source, option, where)
    if is_placeholder(str(source)):
        raise DataError(f"{where}: a saved configuration has only the type of what was an object. Give the data again.")
    raise DataError(f"{where}: there is no such file or folder (looked in {Path.cwd()}). Check the path.")


def _read_hub(name: str, option: str, where: str) -> Any:
    _import("datasets", where, "to read a hub data set")
    repository, _, config = name.partition(":")
    try:
        return hub_dataset(repository, config or None, "train")
    except FileNotFoundError as error:
        raise DataError(
            f"{where} is neither a registered data source ({', '.join(sorted(data_sources()))}) nor a file, and "
            f"{error} Check the name, or pass {option} a file, a `datasets.Dataset` or a list of rows."
        ) from error


def _read_folder(folder: Path, where: str) -> Any:
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        datasets = _import("datasets", where, "to read a folder that `save_to_disk` wrote")
        try:
            return datasets.load_from_disk(str(folder))
        except Exception as error:
            raise DataError(f"{where}: cannot be read: {type(error).__name__}: {error}") from error
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in _TABLES)
    if len(files) > 1:
        # Several files may be splits, and calibrating on test rows would go unnoticed.
        files = [path for path in files if path.name.startswith("train")] or files
    if len(files) != 1:
        found = ", ".join(path.name for path in files) or "none"
        raise DataError(
            f"{where}: a folder must hold one data file ({', '.join(_TABLES)}), or one whose name starts "
            f"with 'train'; found: {found}. Name the file."
        )
    return _read_file(files[0], where)


def _read_file(path: Path, where: str) -> Sequence[Any]:
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise DataError(f"{where}: files of type {suffix or '(no suffix)'} are not read. Use {', '.join(SUFFIXES)}.")
    if suffix == ".parquet":
        parquet = _import("pyarrow.parquet", where, "to read a Parquet file")
        try:
            return parquet.read_table(path).to_pylist()
        except Exception as error:
            raise DataError(f"{where}: {path} is not a readable Parquet file: {error}") from error
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: {path} is not UTF-8 text (byte {error.start}). Save it as UTF-8.") from error
    if suffix == ".txt":  # a request a line
        return [{"prompt": line.strip()} for line in text.split("\n") if line.strip()]
    if suffix == ".csv":
        return _parse_csv(text, path)
    if suffix == ".json" and text.lstrip().startswith("["):
        return _parse_json(text, path)
    # Not splitlines(): it also splits at characters that JSON strings may hold as they are.
    lines = enumerate(text.split("\n"), start=1)
    return [_parse_json(line, path, number) for number, line in lines if line.strip()]


def _parse_json(text: str, path: Path, first_line: int = 1) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}:{first_line + error.lineno - 1}: not valid JSON: {error.msg} (column {error.colno}). A "
            "data file holds one JSON object a line, or (.json) a list of objects."
        ) from error
    except (RecursionError, ValueError) as error:  # values nested too deeply, or a number of too many digits
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise DataError(f"{path}: the JSON value that begins in line {first_line} cannot be read: {reason}") from error


def _parse_csv(text: str, path: Path) -> list[dict[str, str]]:
    # Some write a space behind every comma.
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True, skipinitialspace=True)
    rows = []
    try:
        reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
        for row in reader:
            if None in row:
                raise csv.Error("more cells than the header has columns; is a comma not quoted?")
            rows.append(row)
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num}: not valid CSV: {error}") from error
    return rows


def _train_split(rows: Any, where: str) -> Any:
    datasets = _loaded_datasets()
    if datasets is None or not isinstance(rows, (datasets.DatasetDict, datasets.IterableDatasetDict)):
        return rows
    if "train" not in rows:
        raise DataError(f"{where}: it has no split 'train', but {', '.join(map(repr, rows))}. Pass the split to use.")
    return rows["train"]


def _is_dataset(rows: Any) -> bool:
    datasets = _loaded_datasets()
    return datasets is not None and isinstance(rows, datasets.Dataset)


def _loaded_datasets() -> Any:
    """The library `datasets` if it is imported; none of its objects can be here before it is."""
    return sys.modules.get("datasets")


def _import(module: str, where: str, purpose: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DataError(
            f"{where}: the package {module.partition('.')[0]} is needed {purpose}: pip install salora-plugins[data]"
        ) from error
