"""What a transport asks of a trainer."""

import socket
from collections.abc import Callable
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from .federation import Federation
from .messages import Broadcast, ClientInfo, Tensors
from .refusals import problem_of_broadcast


@dataclass(frozen=True)
class TrainerHost:
    """
    What a transport may ask of a trainer, see [`Host`].

    Args:
        federation ([`Federation`]):
            The trainer's federation.
        fingerprint (`Callable[[], dict]`):
            Says what must be equal on all clients. It looks at the whole model.
        evaluate (`Callable[[str, dict[str, torch.Tensor]], dict[str, float]]`):
            Evaluates a client with a given A.
    """

    federation: Federation
    fingerprint: Callable[[], dict[str, Any]]
    evaluate: Callable[[str, Tensors], dict[str, float]]

    def client_infos(self) -> list[ClientInfo]:
        # Tells workers apart, and nothing of the machine.
        place = f"{socket.gethostname()}:{Path(self.federation.transport.folder).resolve()}"
        worker = sha256(place.encode()).hexdigest()[:16]
        fingerprint = self.fingerprint()
        return [replace(info, worker=worker, fingerprint=fingerprint) for info in self.federation.client_infos()]

    def shared_like(self) -> Tensors:
        return self.federation.server.sent()

    def refuse(self, client_id: str, broadcast: Broadcast) -> str | None:
        client, last = self.federation.client, broadcast.last_counted.get(client_id)
        problem = problem_of_broadcast(self.federation.args, broadcast, client.slots.sharing.method)
        return problem or client.refuse(client_id, last)
