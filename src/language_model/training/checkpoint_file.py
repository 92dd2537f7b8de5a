"""Reading a checkpoint's file: as it was written, or not at all.

Torch does not compare its archives' checksums, and unpacks whatever a file claims to hold.
"""

import pickle
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from language_model.files import display_path


class CheckpointError(ValueError):
    """A file that is damaged, or no checkpoint, or refused; the message names it."""


def read_checkpoint(file: Path, device: str = "meta") -> dict[str, Any]:
    """Return what a checkpoint holds, tensors on `device` (``meta``: shapes without values).

    The whole file is read once to compare checksums, in pieces. FileNotFoundError if there is none, CheckpointError if
    it is damaged, or holds more than numbers and text.
    """
    name = display_path(file)
    if not file.is_file():
        raise FileNotFoundError(f"{name} does not exist")
    check_archive(file)
    try:
        content = torch.load(file, map_location="meta", weights_only=True)
        check_tensors(name, content, file.stat().st_size)
        return content if device == "meta" else torch.load(file, map_location=device, weights_only=True)
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        if "GLOBAL" in str(error):
            raise CheckpointError(
                f"{name} holds more than numbers and text, which could run code when loaded: refused"
            ) from error
        raise CheckpointError(f"{name} is damaged, or not a checkpoint") from error
    except Exception as error:  # torch raises many kinds for damaged files
        reason = " ".join(str(error).split())[:100]
        raise CheckpointError(f"{name} is damaged, or not a checkpoint: {reason}") from error


def with_paths_in(content: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return a checkpoint's content in which the files of checkpoint callbacks lie in this folder, its own.

    The run may have been moved, and Lightning removes the best file of before when there is a better one.
    """
    for state in content.get("callbacks", {}).values():
        if "best_model_path" in state:
            names = {path: str(folder / Path(path).name) for path in state.get("best_k_models", {})}
            state["best_k_models"] = {names[path]: score for path, score in state.get("best_k_models", {}).items()}
            for key in ("best_model_path", "kth_best_model_path", "last_model_path"):
                state[key] = str(folder / Path(state[key]).name) if state.get(key) else ""
            state["dirpath"] = str(folder)
    return content


def check_archive(file: Path) -> None:
    """Raise CheckpointError unless a file is an archive of torch's, with the checksums that were written."""
    name = display_path(file)
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            packed = [entry for entry in entries if entry.compress_type != zipfile.ZIP_STORED]
            if packed or sum(entry.file_size for entry in entries) > file.stat().st_size:  # torch does not compress
                raise CheckpointError(f"{name} would unpack to more than its size: refused")
            different = archive.testzip()
            code = b"".join(archive.read(entry) for entry in entries if entry.filename.endswith("data.pkl"))
            if different or len(entries) != len({entry.filename for entry in entries}):
                raise CheckpointError(f"{name} is damaged: the checksum of {different or 'an entry'} differs")
    except CheckpointError:
        raise
    except Exception as error:  # zipfile raises many kinds for damaged files
        raise CheckpointError(f"{name} is damaged, or not a checkpoint") from error
    if re.search(rb"c(builtins|__builtin__)\nbytearray\n", code):  # of any length, from one number
        raise CheckpointError(f"{name} holds more than numbers, tensors and text: refused")


def check_tensors(name: str, content: Any, file_size: int) -> None:
    """Raise CheckpointError for a tensor that would take more memory than the file (in bytes) has for it.

    Args:
        name: of the file.
        content: what it holds, tensors on the device ``meta``.
        file_size: in bytes.
    """
    for tensor in tensors_in(content):
        plain = tensor.device.type == "meta" and tensor.layout == torch.strided
        stored = tensor.untyped_storage().nbytes() if plain else 0
        if not plain or tensor.numel() * tensor.element_size() > stored or stored > file_size:
            raise CheckpointError(
                f"{name} has a tensor of shape {tuple(tensor.shape)} that takes more memory than is stored: refused"
            )


def tensors_in(content: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors in nested dicts, lists, tuples and sets, each once."""
    seen: set[int] = set()
    left = [content]
    while left:
        value = left.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, dict):
            left += [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple | set | frozenset):
            left += value
