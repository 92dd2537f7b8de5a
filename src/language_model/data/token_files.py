"""Token files: ids on disk, memory-mapped."""

import codecs
import mmap
from pathlib import Path
from typing import Any
from unicodedata import category

import numpy as np

from language_model.data.text_files import SUFFIXES, ends_in, errors_name, files_at
from language_model.terminal import progress

CHUNK = 1 << 20  # tokens read at a time


class TokenFile:
    """Token ids in a file, memory-mapped; numpy.asarray gives the array (N,), whose parts are read when used.

    Pickling stores only the path: a worker process maps the file itself.
    """

    def __init__(self, path: Path, dtype: str, header: int = 0) -> None:
        self.path = path
        self.dtype = dtype
        self.header = header  # bytes before the first token
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if hasattr(mmap, "MADV_RANDOM"):  # else each access reads 100 kB around it
            mapped.madvise(mmap.MADV_RANDOM)
        self._tokens = np.frombuffer(mapped, np.dtype(dtype).newbyteorder("<"), offset=header)

    def __len__(self) -> int:
        return len(self._tokens)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self._tokens.astype(dtype or self._tokens.dtype, copy=bool(copy))

    def __reduce__(self) -> tuple:
        return TokenFile, (self.path, self.dtype, self.header)

    def largest_id(self) -> int:
        """Return the largest id, by reading the whole file."""
        with progress(f"checking {self.path.name}", self._tokens.nbytes) as advance:
            largest = 0
            for start in range(0, len(self), CHUNK):
                part = self._tokens[start : start + CHUNK]
                largest = max(largest, int(part.max()))
                advance(part.nbytes)
        return largest


LLM_C = {20240520: (1, "uint16"), 20240801: (7, "uint32")}  # a file's first number: (version, dtype)


def token_files(path: str | list[str], parameter: str) -> list[TokenFile]:
    """Return the token files that a path names, as `files_at` does; a ValueError names `parameter`."""
    with errors_name(parameter, path):
        return [token_file(file) for file in files_at(path, (".bin",))]


def token_file(path: Path) -> TokenFile:
    """Return a token file of nanoGPT or llm.c; ValueError if it is neither, or text."""
    size = path.stat().st_size
    if not size:
        raise ValueError(f"{path}: it is empty")
    with path.open("rb") as file:
        sample = file.read(1 << 16)
    if ends_in(path, SUFFIXES) or is_text(sample):
        raise ValueError(f"{path}: it is text, not tokens: use data=text data.path={path}")
    if path.suffix == ".gz":
        raise ValueError(f"{path}: it is compressed, and token files are read in place: decompress it, gunzip {path}")
    start = np.frombuffer(sample[:1024], "u1")
    header = start.view("<i4") if len(start) == 1024 else np.zeros(1, "<i4")
    if int(header[0]) not in LLM_C:
        if size % 2:
            raise ValueError(f"{path}: it is no file of uint16 tokens: it has an odd number of bytes, {size:,}")
        return TokenFile(path, "uint16")
    version, dtype = LLM_C[int(header[0])]
    if header[1] != version:
        raise ValueError(f"{path} has llm.c's header of version {header[1]}; {version} is known")
    should = 1024 + int(header[2]) * np.dtype(dtype).itemsize
    if size != should:
        raise ValueError(f"{path} has {size:,} bytes, and by its header of {header[2]:,} tokens should have {should:,}")
    return TokenFile(path, dtype, header=1024)


def is_text(sample: bytes) -> bool:
    """Whether the first bytes of a file are UTF-8 text without control characters, other than line ends and tabs.

    Tokens are not: in 16 bits, each id below 8,192 has a byte that is a control character, nearly always.
    """
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(sample)  # the last character may be cut
    except UnicodeDecodeError:
        return False
    return bool(text) and all(character in "\t\n\r\f" or category(character) != "Cc" for character in text)
