"""Where B survives a round."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..files import write_safetensors
from ..tensors import clone_tensors

# Client stores


class ClientStoreError(RuntimeError):
    """A client's stored tensors are missing or cannot be read."""


class ClientStore(Protocol):
    """
    Keeps the tensors of clients that are not training. What was put is returned bit for bit, as a copy.
    """

    def put(self, client_id: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Stores a copy of a client's tensors in place of earlier ones."""

    def get(self, client_id: str) -> dict[str, torch.Tensor]:
        """Returns a copy of a client's tensors. Raises [`ClientStoreError`] if there are none or they are damaged."""

    def clear(self) -> None:
        """Forgets all clients."""

    def __contains__(self, client_id: str) -> bool: ...

    def __iter__(self) -> Iterator[str]:
        """Ids of the stored clients, sorted."""


class MemoryClientStore:
    """Client store in the process's memory."""

    def __init__(self):
        self._tensors: dict[str, dict[str, torch.Tensor]] = {}

    def put(self, client_id: str, tensors: Mapping[str, torch.Tensor]) -> None:
        stored = self._tensors.get(client_id, {})
        if client_id not in self._tensors or _layout(stored) != _layout(tensors):
            self._tensors[client_id] = clone_tensors(tensors)
            return
        # In place: making room anew for every client and round would fragment the memory.
        with torch.no_grad():
            for key, tensor in tensors.items():
                stored[key].copy_(tensor)

    def get(self, client_id: str) -> dict[str, torch.Tensor]:
        if client_id not in self._tensors:
            raise ClientStoreError(f"No tensors are stored for client {client_id!r}.")
        return clone_tensors(self._tensors[client_id])

    def clear(self) -> None:
        self._tensors.clear()

    def __contains__(self, client_id: str) -> bool:
        return client_id in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._tensors))


def _layout(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple]:
    return {key: (tensor.shape, tensor.dtype) for key, tensor in tensors.items()}


class DiskClientStore:
    """
    Client store in a folder, one safetensors file per client.

    Args:
        directory (`str` or `Path`):
            Folder of its own for this run. It is made when needed.
    """

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)

    def _path(self, client_id: str) -> Path:
        return self.directory / f"{client_id}.safetensors"

    def put(self, client_id: str, tensors: Mapping[str, torch.Tensor]) -> None:
        write_safetensors(self._path(client_id), tensors)

    def get(self, client_id: str) -> dict[str, torch.Tensor]:
        try:
            return load_file(self._path(client_id))
        except FileNotFoundError as error:
            raise ClientStoreError(
                f"No tensors are stored for client {client_id!r}: {self._path(client_id)} is missing. Resume from a "
                "checkpoint, which holds a copy."
            ) from error
        except (SafetensorError, OSError) as error:
            raise ClientStoreError(
                f"The tensors of client {client_id!r} in {self._path(client_id)} cannot be read: {error}. Resume from "
                "a checkpoint, which holds a copy."
            ) from error

    def clear(self) -> None:
        for client_id in list(self):
            self._path(client_id).unlink()

    def __contains__(self, client_id: str) -> bool:
        return self._path(client_id).is_file()

    def __iter__(self) -> Iterator[str]:
        # A file that was being written when the process died starts with a dot, as no client id does.
        paths = self.directory.glob("[!.]*.safetensors")
        return iter(sorted(path.name.removesuffix(".safetensors") for path in paths))
