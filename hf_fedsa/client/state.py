"""Where the clients of one place stand in a round, and what they are told once: values."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class ClientSettings:
    """
    What clients are told once.

    Args:
        seed (`int`):
            The run's seed.
        weighting (`str`, *optional*, defaults to `"examples"`):
            A client's weight in the average: `"examples"`, the different rows it trained on, or `"uniform"`, 1.
        max_update_norm (`float`, *optional*):
            Largest change of A, as a multiple of the norm of the A that was sent. `None` leaves it to the server.
    """

    seed: int
    weighting: str = "examples"
    max_update_norm: float | None = None


@dataclass
class ClientState:
    """
    Where the clients of one place stand. A JSON value.

    Args:
        round_index (`int`, *optional*, defaults to `0`):
            The round that is open or was last.
        round_open (`bool`, *optional*, defaults to `False`):
            Whether a client of it has begun to train and the round is not closed.
        waves_done (`int`, *optional*, defaults to `0`):
            Waves of the open round whose clients are back in the store.
        wave_open (`bool`, *optional*, defaults to `False`):
            Whether clients are in the slots.
        wave_steps (`int`, *optional*, defaults to `0`):
            Steps taken in the open wave.
        losses (`dict[str, list[float]]`, *optional*):
            Per client in the slots, sum of the losses of its local steps, and their number.
        left_out (`dict[str, str]`, *optional*):
            Clients of the open round whose update is known not to count, and why.
        returned (`list[str]`, *optional*):
            Clients of the open round whose B of this round is in the store.
        counted (`dict[str, int]`, *optional*):
            Per client that has trained, the round whose B it has: the last that counted for it.
        with_optimizer (`list[str]`, *optional*):
            Those of them whose optimizer state is in the store.
    """

    round_index: int = 0
    round_open: bool = False
    waves_done: int = 0
    wave_open: bool = False
    wave_steps: int = 0
    losses: dict[str, list[float]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    returned: list[str] = field(default_factory=list)
    counted: dict[str, int] = field(default_factory=dict)
    with_optimizer: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def before_wave(self, client_ids: Sequence[str]) -> "ClientState":
        """The state before the clients of the open wave took their first step."""
        left_out = {client_id: fault for client_id, fault in self.left_out.items() if client_id not in client_ids}
        return replace(self, wave_open=False, wave_steps=0, losses={}, left_out=left_out)
