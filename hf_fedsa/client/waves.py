"""Clients to waves, rows to local steps."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..server.sampling import ClientSampler

# One local step of a client: its micro-batches (one per gradient accumulation step), each a list of row numbers.
LocalStep = list[list[int]]


@dataclass(frozen=True)
class LocalWork:
    """
    How much a client trains in a round.

    Args:
        batch_size (`int`):
            Rows per micro-batch.
        accumulation_steps (`int`):
            Micro-batches per local step.
        local_steps (`int`, *optional*):
            Local steps per round, cycling through the client's rows. Exclusive with `local_epochs`.
        local_epochs (`int`, *optional*):
            Passes over the client's rows per round.
        drop_last (`bool`, *optional*, defaults to `False`):
            Whether a pass ends before its last, smaller batch.
    """

    batch_size: int
    accumulation_steps: int
    local_steps: int | None
    local_epochs: int | None
    drop_last: bool = False

    def batches_per_pass(self, num_rows: int) -> int:
        """Micro-batches in one pass over `num_rows` rows."""
        return num_rows // self.batch_size if self.drop_last else math.ceil(num_rows / self.batch_size)

    def steps_per_pass(self, num_rows: int) -> int:
        """Local steps in one pass. As in `Trainer`, the last one of a pass may be short of micro-batches."""
        return math.ceil(self.batches_per_pass(num_rows) / self.accumulation_steps)

    def num_steps(self, num_rows: int) -> int:
        """Local steps that a client with `num_rows` rows takes in a round."""
        if self.local_steps is not None:
            return self.local_steps
        return self.local_epochs * self.steps_per_pass(num_rows)

    def rows_per_pass(self, num_rows: int) -> int:
        """Rows in one pass if every step were full: where the next pass begins, in places of the round."""
        return self.steps_per_pass(num_rows) * self.accumulation_steps * self.batch_size

    def num_passes(self, num_rows: int) -> int:
        """Passes over the rows that a round starts."""
        return math.ceil(self.num_steps(num_rows) / self.steps_per_pass(num_rows))

    def steps(self, num_rows: int, order: Callable[[int], Sequence[int]]) -> list[LocalStep]:
        """
        Lays out a client's rows for one round.

        Args:
            num_rows (`int`):
                Rows the client has.
            order (`Callable[[int], Sequence[int]]`):
                Order of the rows in pass 0, 1, ... of the round.
        """
        steps: list[LocalStep] = []
        for pass_index in range(self.num_passes(num_rows)):
            rows = list(order(pass_index))
            size, accumulate = self.batch_size, self.accumulation_steps
            batches = [rows[i * size : (i + 1) * size] for i in range(self.batches_per_pass(num_rows))]
            steps.extend(batches[i : i + accumulate] for i in range(0, len(batches), accumulate))
        return steps[: self.num_steps(num_rows)]

    def num_examples(self, num_rows: int, order: Callable[[int], Sequence[int]], num_steps: int) -> int:
        """Different rows among those of the first `num_steps` local steps of a round."""
        steps = self.steps(num_rows, order)[:num_steps]
        return len({row for step in steps for batch in step for row in batch})


def match_lengths(shuffled: Sequence[int], lengths: np.ndarray, seed: int, start: int, places: int) -> list[int]:
    """
    Reorders one pass of a client's rows so that clients side by side have rows of like length at the same time.

    Every place of a round has a random number in [0, 1) that all clients have in common. A client's row there is the
    one whose rank among its rows, by length, is the rank of that number among those of the pass. Ranks of independent
    numbers are a uniformly random permutation, so a client by itself sees its rows in a uniformly random order, as it
    would without; what is gained is the padding to a longer row of another client.

    Args:
        shuffled (`Sequence[int]`):
            The client's row numbers, 0 to n - 1, in an order of its own: that of rows of equal length.
        lengths (`np.ndarray` of shape `(n,)`):
            Length of each row.
        seed (`int`):
            Seed that the round's clients have in common.
        start (`int`):
            Place in the round of the pass's first row.
        places (`int`):
            Places in the round until the next pass. Rows beyond them, which `drop_last` drops, have numbers apart, so
            that passes do not depend on each other.

    Returns:
        `list[int]`: the row numbers in their new order.
    """
    in_place = min(places, len(shuffled))
    numbers = np.concatenate(
        [_uniform(seed, start, in_place), _uniform(seed, start + 2**64, len(shuffled) - in_place)]
    )
    rows = np.asarray(shuffled)
    order = np.empty_like(rows)
    order[np.argsort(numbers)] = rows[np.argsort(lengths[rows], kind="stable")]
    return order.tolist()


def _uniform(seed: int, start: int, count: int) -> np.ndarray:
    """Numbers `start` to `start + count` of an endless sequence."""
    return np.random.Generator(np.random.PCG64(seed).advance(start)).random(count)


@dataclass(frozen=True)
class Wave:
    """
    Clients that train at the same time.

    Args:
        client_ids (`tuple[str, ...]`):
            Those of this process, in slot order.
        num_steps (`int`):
            Steps until the last one has finished, in whichever process.
        steps_of_all (`tuple[int, ...]`, *optional*, defaults to `()`):
            Local steps of every client of the wave, in all processes.
    """

    client_ids: tuple[str, ...]
    num_steps: int
    steps_of_all: tuple[int, ...] = ()


@dataclass(frozen=True)
class Round:
    """
    What one round trains.

    Args:
        round_index (`int`):
            Round, counted from 0.
        client_ids (`tuple[str, ...]`):
            Its clients, sorted.
        waves (`tuple[Wave, ...]`):
            The clients in the order in which they train. Of several processes, each has its own clients.
    """

    round_index: int
    client_ids: tuple[str, ...]
    waves: tuple[Wave, ...]

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the round: the waves one after the other."""
        return sum(wave.num_steps for wave in self.waves)

    @property
    def local_steps(self) -> int:
        """Local steps of the client that takes the most: the round's length on the learning rate schedule."""
        return max(wave.num_steps for wave in self.waves)


def plan_round(
    round_index: int,
    num_rows: Mapping[str, int],
    work: LocalWork,
    clients_per_round: int | None,
    parallel_clients: int,
    sampler: ClientSampler,
    num_processes: int = 1,
    process_index: int = 0,
    row_lengths: Mapping[str, float] | None = None,
    trained: Sequence[Wave] = (),
) -> Round:
    """
    Samples a round's clients and groups them into waves of at most `parallel_clients` per process.

    Clients with as many steps as each other train together, and among them those with rows of like length, so that few
    slots wait for a neighbour. Within a wave, the longest go to the process that has least to do.

    Args:
        round_index (`int`):
            Round, counted from 0.
        num_rows (`Mapping[str, int]`):
            Rows of every client.
        work (`LocalWork`):
            How much a client trains.
        clients_per_round (`int`, *optional*):
            Clients to sample. `None` means all.
        parallel_clients (`int`):
            Clients that train side by side in a process.
        sampler (`ClientSampler`):
            Chooses the clients.
        num_processes (`int`, *optional*, defaults to `1`), process_index (`int`, *optional*, defaults to `0`):
            Processes that share the work, and the one whose waves are returned. All have the same number of waves and
            of steps, some of which a process may have nothing to do in.
        row_lengths (`Mapping[str, float]`, *optional*):
            Mean length of each client's rows, in tokens. `None` takes all to be alike.
        trained (`Sequence[Wave]`, *optional*, defaults to `()`):
            The round's first waves, where they have trained before the run was interrupted, or are about to go on.
            The other clients are grouped anew.

    Raises:
        `ValueError`: `sampler` returned no client, one twice, or one that does not exist.
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
    steps = {client_id: work.num_steps(num_rows[client_id]) for client_id in client_ids}
    lengths = row_lengths or dict.fromkeys(client_ids, 1.0)
    left = set(client_ids).difference(*(wave.client_ids for wave in trained))
    by_length = sorted(left, key=lambda client_id: (-steps[client_id], -lengths[client_id], client_id))
    size = parallel_clients * num_processes
    waves = list(trained)
    for group in (by_length[i : i + size] for i in range(0, len(by_length), size)):
        shares = _deal(group, {c: steps[c] * lengths[c] for c in group}, num_processes, parallel_clients)
        wave_steps = tuple(steps[client_id] for client_id in group)
        waves.append(Wave(tuple(shares[process_index]), max(wave_steps), steps_of_all=wave_steps))
    return Round(round_index=round_index, client_ids=tuple(client_ids), waves=tuple(waves))


def _deal(
    client_ids: Sequence[str], work: Mapping[str, float], num_processes: int, parallel_clients: int
) -> list[list[str]]:
    """Gives each client, the one with most work first, to the process that has least to do and a slot free."""
    shares: list[list[str]] = [[] for _ in range(num_processes)]
    load = [0.0] * num_processes
    for client_id in sorted(client_ids, key=lambda client_id: -work[client_id]):
        free = [process for process in range(num_processes) if len(shares[process]) < parallel_clients]
        process = min(free, key=lambda process: (load[process], process))
        shares[process].append(client_id)
        load[process] += work[client_id]
    return shares
