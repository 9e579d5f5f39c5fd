"""Where the server is: in this process, in all processes of a run alike, or elsewhere.

It is light to import: a process that only relays messages needs no accelerate.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from .messages import Broadcast, ClientInfo, Tensors, Update
from .server.server import Server

if TYPE_CHECKING:
    from accelerate import Accelerator


class Host(Protocol):
    """What a transport may ask of the trainer that pulls its rounds from it."""

    def client_infos(self) -> list[ClientInfo]:
        """Every client that lives here."""

    def shared_like(self) -> Tensors:
        """Tensors of the names, shapes and dtypes of what is shared, as clients train it."""

    def evaluate(self, client_id: str, shared: Tensors) -> dict[str, float]:
        """Metrics of one client on its own rows, with a given A and its own B. Between rounds alone."""

    def refuse(self, client_id: str, broadcast: Broadcast) -> str | None:
        """Why a client cannot start from what it is sent, or `None`. Called in any thread."""


class Transport(Protocol):
    """
    Brings rounds to the clients that live here, and their updates to the server.

    One `Trainer.train()` is the whole participation, wherever the rounds come from.
    """

    # Folder of clients whose server is elsewhere, which outlives the process. `None` if the server is in this run.
    folder: Path | None

    def connect(self, host: Host) -> None:
        """Makes ready for a run."""

    def expected_rounds(self) -> list[tuple[str, ...]] | None:
        """
        Clients of every round of the run, those done included, as far as they are still there. `None` if they are not
        known here.
        """

    def check_plan(self, rounds: Sequence[Sequence[str]]) -> None:
        """Checks, as the run begins, that all who take part have the same rounds in mind."""

    def open_round(self) -> tuple[tuple[str, ...], Broadcast] | None:
        """The round's clients that live here, and what they are sent. It may wait. `None` ends the run."""

    def send(self, update: Update) -> None:
        """Takes an update to the server."""

    def close_round(self, seconds: float, step: int) -> dict[str, Any] | None:
        """The round's record, where it is known. `None` if it is not, or if nobody has taken a step."""

    def close(self) -> None:
        """Ends the run, whether or not it has succeeded."""


class InProcess:
    """
    The server is an object in this process.

    Args:
        server ([`Server`]):
            The server.
    """

    folder = None

    def __init__(self, server: Server):
        self.server = server

    def connect(self, host: Host) -> None:
        pass

    def expected_rounds(self) -> list[tuple[str, ...]]:
        # Who has left since is no longer asked of a sampler, and has no rows to plan with.
        clients = self.server.clients
        done = [
            tuple(sorted(clients.keys() & {*record["clients"], *record["left_out"]}))
            for record in self.server.state.history
        ]
        return done + self.server.planned_rounds()

    def check_plan(self, rounds: Sequence[Sequence[str]]) -> None:
        pass

    def open_round(self) -> tuple[tuple[str, ...], Broadcast]:
        return self.server.begin_round()

    def send(self, update: Update) -> None:
        self.server.receive(update)

    def close_round(self, seconds: float, step: int) -> dict[str, Any] | None:
        """
        Closes the round.

        Raises:
            `RuntimeError`: all of its clients were left out, so that a simulation has gone wrong. It stays open.
        """
        if problem := self.server.all_left_out():
            raise RuntimeError(problem)
        self.server.withdraw()
        return self.server.end_round(seconds, step)

    def close(self) -> None:
        pass


class AcrossProcesses(InProcess):
    """
    Every process of a run has a replica of the server, which receives the updates of its own clients. At a round's end
    the sums of A are all-reduced, and the small facts are gathered.

    Args:
        server ([`Server`]):
            This process's replica.
        accelerator ([`~accelerate.Accelerator`]):
            Connects the processes.
    """

    def __init__(self, server: Server, accelerator: "Accelerator"):
        super().__init__(server)
        self.accelerator = accelerator

    def close_round(self, seconds: float, step: int) -> dict[str, Any] | None:
        from accelerate.utils import gather_object

        self.server.reduce(self._sum, gather_object)
        return super().close_round(seconds, step)

    def _sum(self, flat: torch.Tensor) -> torch.Tensor:
        return self.accelerator.reduce(flat.to(self.accelerator.device), reduction="sum").cpu()

    def check_plan(self, rounds: Sequence[Sequence[str]]) -> None:
        """
        Compares the rounds that are planned here to those of the other processes.

        Raises:
            `ValueError`: they differ.
        """
        from accelerate.utils import gather_object

        plans = gather_object([list(map(tuple, rounds))])
        differing = [i for i, sampled in enumerate(zip(*plans, strict=True)) if len(set(sampled)) > 1]
        if differing:
            raise ValueError(
                f"`client_sampler` chose other clients for round {differing[0]} in one process than in another. "
                "It must depend on its arguments alone, so draw from a generator that is seeded by them."
            )
