"""Files to text: which files a path names, the text in them, and downloads."""

import codecs
import gzip
import io
import json
import os
import re
import secrets
import shlex
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import Annotated, Literal, NoReturn
from urllib.error import HTTPError

from pydantic import Field

from language_model.files import sha256_of
from language_model.terminal import progress

JSON_LINES = (".jsonl", ".ndjson")
SUFFIXES = (".txt", ".text", ".md", *JSON_LINES)  # the files of a folder that are read
CHUNK = 1 << 20  # bytes read at a time

Advance = Callable[[int], None]
NonEmpty = Annotated[str, Field(min_length=1)]
PathOrPaths = NonEmpty | Annotated[list[NonEmpty], Field(min_length=1)]  # of files, folders, globs: see `files_at`


class TextFiles:
    """The documents in one or several files: a plain text file is one document, so is each line of a .jsonl file.

    Args:
        path: a file, a folder (of files with SUFFIXES), a glob, or a list of these; files of a folder or glob are
            sorted; .gz files are decompressed while they are read.
        field: the key of the text in a line of a .jsonl file.
        encoding: one of Python's.
        newlines: keep the line ends, or normalise Windows' and old Macs' to one newline character.
        parameter: what `path` is called in messages.

    Raises:
        ValueError: there is no such file, or it cannot be read; also, while reading: a file is incomplete or not text
            of that encoding, or a line of .jsonl is not an object with that field. The message names `parameter`.
    """

    def __init__(
        self,
        path: str | list[str],
        field: str = "text",
        encoding: str = "utf-8",
        newlines: Literal["keep", "normalise"] = "keep",
        parameter: str = "path",
    ) -> None:
        self.path = path
        self.parameter = parameter
        with errors_name(parameter, path):
            self.files = files_at(path)
        self.name = (Path(path).expanduser().resolve() if isinstance(path, str) else self.files[0]).name
        self.field = field
        self.newlines = newlines
        try:
            "".encode(encoding)
            self.encoding = codecs.lookup(encoding).name
        except LookupError:
            raise ValueError(f"encoding={encoding}: Python knows no such text encoding; utf-8 is the usual") from None

    @property
    def num_bytes(self) -> int:
        """Size of the files, in bytes."""
        return sum(file.stat().st_size for file in self.files)

    @property
    def has_jsonl(self) -> bool:
        """Whether some files are .jsonl."""
        return any(ends_in(file, JSON_LINES) for file in self.files)

    def pieces(self, advance: Advance = lambda num_bytes: None) -> Iterator[tuple[str, bool]]:
        """Yield (text, ends) in order: a piece of a document, and whether the document ends with it.

        `advance` is called with the number of bytes that were read since its last call.
        """
        with errors_name(self.parameter, self.path):
            for file in self.files:
                if ends_in(file, JSON_LINES):
                    for number, line in enumerate(split_lines(self._decoded(file, advance)), 1):
                        if line.strip():
                            yield self._document_text(line, f"{file}, line {number:,}"), True
                else:
                    newlines = io.IncrementalNewlineDecoder(None, translate=self.newlines == "normalise")
                    for text in self._decoded(file, advance):
                        yield newlines.decode(text), False
                    yield newlines.decode("", final=True), True

    def _decoded(self, file: Path, advance: Advance) -> Iterator[str]:
        decoder = codecs.getincrementaldecoder(self.encoding)()
        position = read = 0
        with file.open("rb") as raw, gzip.open(raw) if file.suffix == ".gz" else raw as stream:
            while True:
                try:
                    content = stream.read(CHUNK)
                except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                    raise ValueError(f"{file} is not a complete gzip file: {error}") from None
                pending = len(decoder.getstate()[0])
                try:
                    text = decoder.decode(content, final=not content)
                except UnicodeDecodeError as error:
                    at, byte = position - pending + error.start, error.object[error.start]
                    raise ValueError(
                        f"{file} is not {self.encoding.upper()} text: byte {at:,} is 0x{byte:02x}; "
                        "set data.encoding if it has another one"
                    ) from None
                if "\0" in text:
                    raise ValueError(f"{file} is binary, not text: it has a NUL character")
                position += len(content)
                advance(raw.tell() - read)
                read = raw.tell()
                if text:
                    yield text
                if not content:
                    return

    def _document_text(self, line: str, where: str) -> str:
        try:
            document = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: not JSON: {error}") from None
        if not isinstance(document, dict):
            raise ValueError(f"{where}: not a JSON object but {type(document).__name__}")
        if self.field not in document:
            raise ValueError(f"{where}: there is no field {self.field!r}, only {', '.join(map(repr, document))}")
        text = document[self.field]
        if not isinstance(text, str):
            raise ValueError(f"{where}: the field {self.field!r} is not text but {type(text).__name__}")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"{where}: half of a surrogate pair at character {error.start} is not text") from None
        return text.replace("\r\n", "\n").replace("\r", "\n") if self.newlines == "normalise" else text


def files_at(path: str | list[str], suffixes: tuple[str, ...] = SUFFIXES) -> list[Path]:
    """Return the files that a path names: itself, those in a folder with these suffixes, or those matching a glob.

    Files of a folder or a glob are sorted. OSError or ValueError if there are none, or if one of them, or a folder in
    the folder, cannot be read.
    """
    if not isinstance(path, str):
        return [file for one in path for file in files_at(one, suffixes)]
    place = Path(path).expanduser()
    if place.is_dir():
        inside = (Path(folder, name) for folder, _, names in os.walk(place, onerror=fail) for name in names)
        found = sorted(file for file in inside if ends_in(file, suffixes))
        if not found:
            compressed = " (or these with .gz)" if suffixes == SUFFIXES else ""
            raise ValueError(f"{place}: it has no file that ends in {', '.join(suffixes)}{compressed}")
    elif not place.exists() and re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", path):
        raise ValueError(
            f"{path}: it is an address, not a file: download it, and give the file's path; "
            "or, for one text, set data.path=null, data.url and data.sha256 (its checksum)"
        )
    elif not place.exists() and re.search(r"[*?[]", path):
        matching = Path(place.anchor).glob(str(place.relative_to(place.anchor)))
        found = sorted(file for file in matching if not file.is_dir())
        if not found:
            raise ValueError(f"{path}: no file matches")
    else:
        found = [place]
    for file in found:
        check_readable(file)
    return found


def fail(error: OSError) -> NoReturn:
    """Raise the error: a folder that cannot be listed is not left out in silence."""
    raise error


def check_readable(file: Path) -> None:
    """Raise OSError or ValueError unless it is a regular file that can be opened: a pipe or a device never ends."""
    if not file.is_file():
        file.stat()  # raises if there is no such file
        raise ValueError(f"{file}: it is not a regular file, and it is read several times: copy what it holds to one")
    file.open("rb").close()


@contextmanager
def errors_name(parameter: str, value: object) -> Iterator[None]:
    """Begin the message of an OSError or ValueError inside with ``parameter=value: ``; it becomes a ValueError."""
    try:
        yield
    except (OSError, ValueError) as error:
        message = str(error)
        if isinstance(error, OSError) and error.filename:
            message = f"{error.filename}: {(error.strerror or '').lower()}"
        shown = f"[{','.join(value)}]" if isinstance(value, list) else value
        raise ValueError(f"{parameter}={shown}: {message.removeprefix(f'{value}: ')}") from error


def ends_in(file: Path, suffixes: tuple[str, ...]) -> bool:
    """Whether a file's name has one of the suffixes, .gz ignored."""
    return file.name.lower().removesuffix(".gz").endswith(suffixes)


def split_lines(texts: Iterator[str]) -> Iterator[str]:
    """Yield the lines of a text in pieces, without the newlines."""
    begun: list[str] = []
    for text in texts:
        first, *others = text.split("\n")
        begun.append(first)
        for line in others:
            yield "".join(begun)
            begun = [line]
    yield "".join(begun)


def download(url: str, sha256: str, folder: Path) -> Path:
    """Return a URL's file in a folder, downloaded if it is not there yet.

    Raises:
        ValueError: the download failed, or the file has another checksum; nothing is left of it then.
    """
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"url={url}: an address that begins with https:// or http:// is needed")
    target = folder / "-".join(url.rstrip("/").split("/")[-2:])
    if target.is_file() and sha256_of(target) == sha256:
        return target
    with errors_name("cache", folder):
        folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{target.name}.{secrets.token_hex(4)}.partial"
    try:
        with partial.open("wb") as file, urllib.request.urlopen(url, timeout=30) as response:
            size = int(response.headers.get("Content-Length") or 0)
            with progress(f"downloading {target.name}", size or None) as advance:
                while content := response.read(1 << 16):
                    advance(file.write(content))
            if size and file.tell() != size:
                raise ValueError(f"it ended after {file.tell():,} of {size:,} bytes")
        if (found := sha256_of(partial)) != sha256:
            raise ValueError(f"its sha256 is {found} and should be {sha256}: the download was changed or damaged")
        partial.replace(target)
    except (OSError, ValueError, HTTPException) as error:
        if isinstance(error, HTTPError):
            error.close()  # it is the response
        by_hand = f"curl -L -o {shlex.quote(target.name)} {shlex.quote(url)}"
        raise ValueError(
            f"url={url}: it could not be downloaded: {error}; download it by hand, {by_hand}, "
            f"and set data.path={target.name}"
        ) from None
    finally:
        partial.unlink(missing_ok=True)
    return target
