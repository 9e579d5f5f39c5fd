"""What a server is told to do, and where its run stands, as values."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ..faults import check_max_update_norm
from ..fit import first_difference, shapes_of
from ..metrics import names_client
from .aggregation import Aggregator, check_aggregator, check_clients_of_round, make_aggregator
from .optimizers import ServerOptimizer, check_server_optimizer, make_server_optimizer, optimizer_arguments
from .sampling import check_client_sampling


@dataclass(frozen=True)
class ServerSettings:
    """
    What a server is told to do.

    Args:
        seed (`int`):
            Seed of the rounds' samples.
        num_rounds (`int`, *optional*):
            Rounds in all. `None` means that the federation has no fixed end.
        clients_per_round (`int`, *optional*):
            Clients sampled per round. `None` means all that are available.
        client_sampling (`str`, *optional*, defaults to `"uniform"`):
            `"uniform"` draws all clients alike, `"examples"` with a probability proportional to their rows.
        min_clients_per_round (`int`, *optional*, defaults to `1`):
            Clients that must return an update for a round to count. If fewer do, A stays as it was.
        max_update_norm (`float` or `"auto"`, *optional*, defaults to `"auto"`):
            Largest change of A that a client may return, as a multiple of the norm of the A it was sent. `"auto"`
            compares it to the median change of the round's clients. `None` sets no limit.
        aggregator (`str`, *optional*, defaults to `"mean"`):
            How the clients' A become one: a name of [`~hf_fedsa.server.aggregation.AGGREGATORS`]. All but `"mean"` are
            without weights, and hold the A of every client of the round.
        trim_fraction (`float`, *optional*), krum_byzantine (`int`, *optional*):
            Arguments of `"trimmed_mean"` and `"krum"`. A round that has fewer clients than Krum needs does not count.
        server_optimizer (`str`, *optional*, defaults to `"fedavg"`):
            What makes the next A of theirs, see [`~hf_fedsa.server.optimizers.make_server_optimizer`]. `"fedavg"`
            takes it as it is.
        server_learning_rate, server_momentum, server_beta_1, server_beta_2, server_tau (`float`, *optional*):
            Arguments of the optimizer. `None` means its default.

    Raises:
        `TypeError`, `ValueError`: a field cannot be what it is.
    """

    seed: int
    num_rounds: int | None
    clients_per_round: int | None = None
    client_sampling: str = "uniform"
    min_clients_per_round: int = 1
    max_update_norm: float | str | None = "auto"
    aggregator: str = "mean"
    trim_fraction: float | None = None
    krum_byzantine: int | None = None
    server_optimizer: str = "fedavg"
    server_learning_rate: float | None = None
    server_momentum: float | None = None
    server_beta_1: float | None = None
    server_beta_2: float | None = None
    server_tau: float | None = None

    def __post_init__(self):
        for name, least in (("num_rounds", 0), ("clients_per_round", 1), ("min_clients_per_round", 1)):
            value = getattr(self, name)
            if value is None and name != "min_clients_per_round":
                continue
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"`{name}` must be an int, got {value!r} of type {type(value).__name__}.")
            if value < least:
                raise ValueError(f"`{name}` must be at least {least}, got {value}.")
        if self.clients_per_round is not None and self.min_clients_per_round > self.clients_per_round:
            raise ValueError(
                f"`min_clients_per_round={self.min_clients_per_round}` is more than the {self.clients_per_round} "
                "clients of a round, so no round could count. Lower it."
            )
        check_client_sampling(self.client_sampling)
        check_max_update_norm(self.max_update_norm)
        check_aggregator(self.aggregator, trim_fraction=self.trim_fraction, krum_byzantine=self.krum_byzantine)
        check_server_optimizer(self.server_optimizer, optimizer_arguments(self))
        if self.clients_per_round is not None:
            check_clients_of_round(self.clients_per_round, self.aggregator, self.krum_byzantine)

    def optimizer(self) -> ServerOptimizer:
        """What makes the next shared tensors of those that the round's clients have returned."""
        return make_server_optimizer(self.server_optimizer, **optimizer_arguments(self))

    def new_aggregator(self) -> Aggregator:
        """What a round's updates are added to."""
        return make_aggregator(self.aggregator, trim_fraction=self.trim_fraction, krum_byzantine=self.krum_byzantine)


@dataclass
class OpenRound:
    """
    A round whose clients have been sampled and whose A is not averaged yet.

    Args:
        round_index (`int`):
            Round, counted from 0.
        client_ids (`list[str]`):
            Its clients, sorted.
        num_clients (`int`):
            Clients of the federation when it began.
        num_steps (`int`):
            Local steps of the client that takes the most: its length on the learning rate schedule.
        weights (`dict[str, float]`), losses (`dict[str, float]`), staleness (`dict[str, int | None]`):
            Per client whose update is aggregated: its weight in the mean (other rules have none), the mean training
            loss over its local steps, and the rounds since one had last counted for it, `None` if none had.
        left_out (`dict[str, str]`):
            Clients whose update does not count, and why.
        changes (`dict[str, list[float]]`):
            Per client whose change of A is to be compared to those of the others: its norm, and the local steps.
        held (`dict[str, list[float]]`):
            Per client whose change is large, so that its update waits for the round's end: its weight and loss.
        forgotten (`list[str]`):
            Clients that the round's record must not name.
        bytes_down (`int`), bytes_up (`int`):
            Bytes of the tensors sent to its clients, and received from them.
        seconds (`float`):
            Wall time spent before the last restart.
    """

    round_index: int
    client_ids: list[str]
    num_clients: int
    num_steps: int
    weights: dict[str, float] = field(default_factory=dict)
    losses: dict[str, float] = field(default_factory=dict)
    staleness: dict[str, int | None] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    changes: dict[str, list[float]] = field(default_factory=dict)
    held: dict[str, list[float]] = field(default_factory=dict)
    forgotten: list[str] = field(default_factory=list)
    bytes_down: int = 0
    bytes_up: int = 0
    seconds: float = 0.0

    def has_answer(self, client_id: str) -> bool:
        """Whether a client has answered, or is left out without an answer."""
        return client_id in self.weights or client_id in self.left_out or client_id in self.held


@dataclass
class ServerState:
    """
    Where a server's run stands. As a dictionary (`dataclasses.asdict`) it is plain JSON.

    Args:
        run_id (`str`, *optional*, defaults to `""`):
            Names the run.
        open (`OpenRound`, *optional*):
            The open round, if there is one.
        last_round (`dict[str, int]`, *optional*):
            Per client, the last round that counted for it.
        history (`list[dict]`, *optional*):
            One entry per finished round.
        schedule_start (`int`, *optional*, defaults to `0`):
            Local steps that the learning rate schedule has behind it when the open or next round begins.
        changed (`dict[str, int]`, *optional*):
            Per factor that has changed in the run, the rounds that were done when it last did.
        seen (`dict[str, int]`, *optional*):
            Per client, the last round that it answered, with an update or a fault: what it was sent there, it has.
    """

    run_id: str = ""
    open: OpenRound | None = None
    last_round: dict[str, int] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    schedule_start: int = 0
    changed: dict[str, int] = field(default_factory=dict)
    seen: dict[str, int] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ServerState":
        """The state that `dataclasses.asdict` made a dictionary of."""
        open_round = values["open"]
        return cls(**{**values, "open": None if open_round is None else OpenRound(**open_round)})

    @property
    def rounds_done(self) -> int:
        """Finished rounds. It is also the index of the round that is open or comes next."""
        return len(self.history)

    def names(self, client_id: str) -> bool:
        """Whether a client is named in what is known of finished rounds."""
        known = client_id in self.seen or client_id in self.last_round
        return known or any(names_client(record, client_id) for record in self.history)


def split_names(tensors: Mapping[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """Tensors named `part|key`, by part and key."""
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        part, _, key = name.rpartition("|")
        parts.setdefault(part, {})[key] = tensor
    return parts


def check_same_shapes(saved: Mapping[str, torch.Tensor], current: Mapping[str, torch.Tensor]) -> None:
    """
    Checks that saved tensors can take the place of the current ones.

    Raises:
        `ValueError`: a name or a shape differs.
    """
    if difference := first_difference(shapes_of(current), shapes_of(saved)):
        key, here, there = difference
        raise ValueError(
            f"{key!r} has the shape {there} in that state, and {here} here. It is of another base model, adapter or "
            "rank."
        )
