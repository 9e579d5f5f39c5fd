"""Clients to a round."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

from ..seeds import derive_seed

# Chooses a round's clients: called with the round's index, the number of rows of every client, and how many to choose
# (`None` for all), it returns their ids. It must return the same whenever it is asked the same.
ClientSampler = Callable[[int, Mapping[str, int], int | None], Sequence[str]]


class TooFewClientsError(ValueError):
    """A round wants more clients than are there. Ask again once more have come."""


def check_enough_clients(round_index: int, wanted: int | None, available: int, registered: int) -> None:
    """Raises [`TooFewClientsError`] unless there are as many clients as a round wants, and at least one."""
    if available < (wanted or 1):
        raise TooFewClientsError(
            f"Round {round_index} needs {wanted or 1} clients (`clients_per_round={wanted}`), but of the "
            f"{registered} that are registered {available} are available. Wait for more, or lower "
            "`clients_per_round`."
        )


def sample_clients(
    client_ids: Iterable[str],
    clients_per_round: int | None,
    seed: int,
    round_index: int,
    weights: Mapping[str, float] | None = None,
) -> list[str]:
    """
    Draws a round's clients without replacement, sorted by id.

    Every client draws its own number from (seed, round, client) and the smallest ones are in. So a round can be
    replayed alone, the order of `client_ids` does not matter, and no client's number depends on who else is there.

    Args:
        client_ids (`Iterable[str]`):
            All clients of the federation.
        clients_per_round (`int`, *optional*):
            How many to draw. `None` takes all.
        seed (`int`):
            The run's seed.
        round_index (`int`):
            Round, counted from 0.
        weights (`Mapping[str, float]`, *optional*):
            Positive weight of each client. One client after the other is drawn with a probability proportional to its
            weight among those left: with `u` uniform in (0, 1), the smallest `-log(u) / weight` are in (Efraimidis and
            Spirakis, 2006, https://doi.org/10.1016/j.ipl.2005.11.003). `None` draws all alike.
    """

    def rank(client_id: str) -> tuple[float, str]:
        number = derive_seed(seed, "sample", round_index, client_id)
        if weights is None:
            return number, client_id
        return -math.log((number + 0.5) / 2**63) / weights[client_id], client_id

    return sorted(sorted(client_ids, key=rank)[:clients_per_round])


def check_client_sampling(client_sampling: str) -> None:
    """
    Checks how clients are to be sampled.

    Raises:
        `ValueError`: it is no way of [`seeded_sampler`].
    """
    if client_sampling not in ("uniform", "examples"):
        raise ValueError(f"`client_sampling` must be 'uniform' or 'examples', got {client_sampling!r}.")


def seeded_sampler(seed: int, client_sampling: str) -> ClientSampler:
    """[`sample_clients`] of a run: `"uniform"`, or by the clients' numbers of rows (`"examples"`)."""

    def sampler(round_index: int, num_rows: Mapping[str, int], clients_per_round: int | None) -> list[str]:
        weights = num_rows if client_sampling == "examples" else None
        return sample_clients(num_rows, clients_per_round, seed=seed, round_index=round_index, weights=weights)

    return sampler


def ask_sampler(
    sampler: ClientSampler, round_index: int, num_rows: Mapping[str, int], clients_per_round: int | None
) -> tuple[str, ...]:
    """
    A round's clients as `sampler` chooses them, sorted by id.

    Raises:
        `TypeError`: it did not return a list of ids.
        `ValueError`: it returned no client, one twice, or one that it was not given.
    """
    chosen = sampler(round_index, dict(num_rows), clients_per_round)
    if chosen is None or isinstance(chosen, str):
        raise TypeError(f"`client_sampler` returned {chosen!r} for round {round_index}, not a list of client ids.")
    client_ids = sorted(chosen)
    unknown = [client_id for client_id in client_ids if client_id not in num_rows]
    if not client_ids or unknown or len(set(client_ids)) < len(client_ids):
        problem = f"{unknown[0]!r}, which is no client" if unknown else "a client twice" if client_ids else "no client"
        raise ValueError(
            f"`client_sampler` returned {problem} for round {round_index}: {client_ids}. It must return at least one "
            "of the ids it is given, and each once."
        )
    return tuple(client_ids)
