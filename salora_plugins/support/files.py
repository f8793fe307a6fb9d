"""Writing files so that a reader never sees half of one, and reading what must be whole."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

_SUFFIX = ".tmp"
_ABANDONED_AFTER = 3600.0
"""Seconds after which what a writer left behind belongs to none that still runs."""
TAKEN_AWAY = "taken away"
"""A folder in a scratch folder, of files of the user's that are only removed when others have taken their place."""
_OS_ERROR = re.compile(r"\(os error (\d+)\)|\bOs { code: (\d+)")  # of newer and older safetensors


def read_json_object(file: Path) -> dict[str, Any]:
    """
    Raises:
        ValueError: The file is no JSON object; it is named.
    """
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} cannot be read, perhaps cut short ({error}). Save it again.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file} holds a {type(values).__name__} and no configuration. Save it again.")
    return values


def atomic_write(path: str | os.PathLike, content: bytes | Callable[[Path], None]) -> None:
    """
    Write a file beside its place and rename it, so that `path` holds the old content or all of the new.

    What a writer of the same file left behind when it was killed, an hour ago or longer, is removed.

    Args:
        path: File to write; its folder is created where it is missing.
        content: The bytes, or a function that writes the file whose path it is given.

    Raises:
        OSError: The file cannot be written: no permission, no space left; it is named, and nothing is left behind.
    """
    path = Path(path).expanduser()
    temporary = None
    try:
        make_folder(path.parent)
        remove_abandoned(path)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=_SUFFIX)
        os.close(handle)
        temporary = Path(name)
        if callable(content):
            content(temporary)
        else:
            temporary.write_bytes(content)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        # mkstemp makes files private; a published artifact has the permissions that any new file would have.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        if (failure := _naming(path, error)) is not None:
            raise failure from error
        raise


def make_folder(path: Path) -> None:
    """
    Raises:
        OSError: It cannot be made; the message names the file in its place, or the folder that cannot be written to.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise NotADirectoryError(_file_in_the_way(path)) from error


def check_writable(path: Path) -> None:
    """
    Whether a file can be written once there is something to write, its folder made where it is missing.

    Raises:
        OSError: See `make_folder`.
    """
    existing = next(folder for folder in path.absolute().parents if folder.exists())
    if not existing.is_dir():
        raise NotADirectoryError(_file_in_the_way(path.parent))
    if not os.access(existing, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(existing))


def _file_in_the_way(folder: Path) -> str:
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    return f"{existing} is a file, and a folder is needed there to write into {folder}. Name another place."


def remove_abandoned(path: Path) -> None:
    """Remove the temporary files (and folders) beside `path` that killed writers of it left there long ago."""
    now = time.time()
    with suppress(OSError), os.scandir(path.parent) as entries:
        for entry in entries:
            if entry.name.startswith(f".{path.name}.") and entry.name.endswith(_SUFFIX):
                with suppress(OSError):  # another writer is faster, or it is not ours
                    if now - entry.stat(follow_symlinks=False).st_mtime > _ABANDONED_AFTER:
                        if not entry.is_dir(follow_symlinks=False):
                            os.unlink(entry.path)
                        elif not any(Path(entry.path).glob(f"{TAKEN_AWAY}/*")):
                            shutil.rmtree(entry.path, ignore_errors=True)


def scratch_folder(path: Path) -> Path:
    """A new hidden folder beside `path`, which `remove_abandoned` finds if its owner is killed."""
    make_folder(path.parent)
    remove_abandoned(path)
    return Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=_SUFFIX))


def _naming(path: Path, error: BaseException) -> OSError | None:
    """A failure to write as an OSError that names the file, where it is one: safetensors has a type of its own."""
    # An error that names another file, such as a folder above, says more.
    if isinstance(error, OSError) and (error.filename is None or str(error.filename).endswith(_SUFFIX)):
        return None if error.errno is None else OSError(error.errno, os.strerror(error.errno), str(path))
    if isinstance(error, SafetensorError):
        code = _OS_ERROR.search(str(error))
        if code is None:
            return OSError(f"{path}: it cannot be written ({error}).")
        number = int(code.group(1) or code.group(2))
        return OSError(number, os.strerror(number), str(path))
    return None
