"""The last update of each client of a worker, on disk, so that a request that comes again is answered from it."""

import json
import logging
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..files import write_safetensors
from ..messages import MessageError, Update, from_bytes

logger = logging.getLogger(__name__)

SUFFIX = ".safetensors"


class Outbox:
    """
    Updates as bytes, with what each of them answered: `{"run_id": ..., "round_index": ..., "sha256": ...}`.

    A file that cannot be read is passed over with a warning: its client trains that round again, from the same B.

    Args:
        folder (`Path`):
            Where they are, one file per client.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._requests: dict[str, dict[str, Any]] = {}
        for path in sorted(folder.glob(f"*{SUFFIX}")):
            client_id = path.name.removesuffix(SUFFIX)
            if (found := self._read(client_id)) is not None:
                self._requests[client_id] = found[0]

    def is_empty(self) -> bool:
        """Whether no client has ever trained, files that cannot be read included."""
        return not any(self.folder.glob(f"*{SUFFIX}"))

    def round_index(self, client_id: str) -> int:
        """The last round that the client trained in, or -1."""
        return self._requests.get(client_id, {}).get("round_index", -1)

    def put(self, client_id: str, request: dict[str, Any], update: bytes) -> None:
        """Keeps the update that answers a request, in the place of the client's last one."""
        values = {"request": json.dumps(request).encode(), "update": update}
        write_safetensors(
            self.folder / f"{client_id}{SUFFIX}",
            {name: torch.frombuffer(bytearray(value), dtype=torch.uint8) for name, value in values.items()},
        )
        self._requests[client_id] = request

    def get(self, client_id: str, request: dict[str, Any]) -> bytes | None:
        """The update that answered this very request, or `None`."""
        if self._requests.get(client_id) != request:
            return None
        found = self._read(client_id)
        if found is None or found[0] != request:
            del self._requests[client_id]
            return None
        return found[1]

    def _read(self, client_id: str) -> tuple[dict[str, Any], bytes] | None:
        path = self.folder / f"{client_id}{SUFFIX}"
        try:
            values = {name: tensor.numpy().tobytes() for name, tensor in load_file(path).items()}
            request, update = json.loads(values["request"]), from_bytes(values["update"])
            if not isinstance(update, Update):
                raise MessageError(f"a `{type(update).__name__}`")
            if (update.client_id, update.round_index) != (client_id, request["round_index"]):
                raise MessageError(f"the update of {update.client_id!r} in round {update.round_index}")
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            logger.warning(
                "%s holds no update of the client %r, and is passed over: %s. If its last round is asked for again, "
                "the client trains it again.",
                path,
                client_id,
                error,
            )
            return None
        return request, values["update"]
