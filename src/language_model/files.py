"""Files: where the project is, writing a file whole or not at all, paths as a user would type them, cached facts."""

import errno
import hashlib
import json
import math
import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]  # of the checkout
LARGE = 1 << 26  # size in bytes of a file whose facts are cached


@contextmanager
def write_errors(file: Path, what_is_left: str = "") -> Iterator[None]:
    """Turn an OSError inside into one that names the file, and a full disk; its text is one line, in plain words."""
    try:
        yield
    except OSError as error:
        named = OSError(f"{file} could not be written: {reason(error)}{what_is_left}")
        named.errno = error.errno
        raise named from error


def reason(error: OSError) -> str:
    """Return what is wrong, in words."""
    return "the disk is full" if error.errno == errno.ENOSPC else (error.strerror or str(error)).lower()


def describe_os_error(error: OSError, folder: Path) -> str:
    """Return one line that names the error's file, or if it does not say which, the `folder`."""
    return str(error) if error.strerror is None else f"{error.filename or folder}: {reason(error)}"


def write_text(file: Path, content: str) -> None:
    """Write a file and move it into place in one step: other processes see the old file or the new one, whole."""
    temporary = file.with_name(f"{file.name}.{secrets.token_hex(4)}.tmp")  # no link that someone left there
    try:
        with write_errors(file):
            temporary.write_text(content, encoding="utf-8")
            temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Write JSON as `write_text` does; numbers that are not finite become null."""
    write_text(file, json.dumps(replace_non_finite(content), indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def read_json(file: Path) -> dict[str, Any]:
    """Return what a JSON file holds; an empty dict if there is no such file."""
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def replace_non_finite(value: Any) -> Any:
    """Return a value with None for NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: replace_non_finite(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def display_path(path: Path) -> str:
    """Return a path as a user would type it: relative to the working directory if it is inside."""
    path = path.resolve()
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def modified_time(file: Path) -> float:
    """Return when a file was last written, in seconds since 1970."""
    return file.stat().st_mtime


def sha256_of(file: Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def file_stamp(file: Path) -> list[int]:
    """Return size, modification time and inode, which change when a file does."""
    stat = file.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ino]


def cached_fact(what: str, file: Path, cache: Path, find: Callable[[], Any]) -> Any:
    """Return `find()`, a fact about a file; for a large file it is cached in `cache` until the file changes."""
    now = file_stamp(file)
    if now[0] < LARGE:
        return find()
    note = cache / f"{hashlib.sha256(f'{what} {file.resolve()}'.encode()).hexdigest()[:16]}.note"
    try:
        noted, value = json.loads(note.read_text())
        if noted == now:
            return value
    except (OSError, ValueError):
        pass
    value = find()
    if time.time_ns() - now[1] > 2e9:  # a change within the clock's resolution would not be seen
        cache.mkdir(parents=True, exist_ok=True)
        temporary = note.with_suffix(f".{os.getpid()}.partial")
        temporary.write_text(json.dumps([now, value]))
        temporary.replace(note)
    return value
