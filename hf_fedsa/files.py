"""A file whole or not at all, and names that can be folders."""

import json
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

_CLIENT_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")


def validate_client_ids(client_ids: Iterable[str]) -> None:
    """
    Checks that ids can name folders, on this machine and on the Hub.

    Raises:
        `TypeError`: an id is not a string.
        `ValueError`: an id has other characters than allowed, or two ids differ in case only.
    """
    folded: dict[str, str] = {}
    for client_id in client_ids:
        if not isinstance(client_id, str):
            raise TypeError(
                f"Client ids must be strings, got {client_id!r} of type {type(client_id).__name__}. Pass "
                f"`str({client_id!r})`."
            )
        if not _CLIENT_ID.fullmatch(client_id):
            raise ValueError(
                f"The client id {client_id!r} cannot name a folder. Use up to 96 letters, digits, dots, underscores "
                "and hyphens, and start with a letter or digit."
            )
        other = folded.setdefault(client_id.casefold(), client_id)
        if other != client_id:
            raise ValueError(
                f"The client ids {other!r} and {client_id!r} differ in case only, and would share a folder on some "
                "file systems. Rename one."
            )


# Files. Everything is written under a temporary name and renamed, so a reader sees the old file or the new one.


def _replace_atomically(path: Path, write: Callable[[str], None]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        if isinstance(error, (OSError, SafetensorError)):
            raise OSError(f"{path} could not be written, and is as it was: {error}. Is the disk full?") from error
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_safetensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Writes tensors to `path`, whole or not at all."""
    contiguous = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    _replace_atomically(path, lambda name: save_file(contiguous, name, metadata={"format": "pt"}))


def write_text(path: Path, text: str) -> None:
    """Writes text to `path`, whole or not at all."""
    _replace_atomically(path, lambda name: Path(name).write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Writes JSON to `path`, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True) + "\n")


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    digest = sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
