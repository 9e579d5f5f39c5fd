"""Which clients train side by side (a wave), and on which rows in which step."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers.trainer_pt_utils import LengthGroupedSampler

from ..seeds import derive_seed

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


class WavePlanner:
    """
    Groups clients into waves, and lays out their rows. It depends on nothing that was drawn or planned before, so any
    round can be planned alone, as often as is wanted.

    Args:
        rows_of (`Mapping[str, Sequence[int]]`):
            Every client's rows, as positions in the dataset that all have in common.
        work ([`LocalWork`]):
            How much a client trains in a round.
        parallel_clients (`int`):
            Clients that train side by side in a process.
        seed (`int`):
            Seed of the random orders.
        order (`str`, *optional*, defaults to `"random"`):
            Order of a client's rows: `"random"`, `"sequential"` or `"group_by_length"`.
        lengths (`np.ndarray` of shape `(rows,)`, *optional*):
            Length of every row, in tokens. `None` takes all to be alike.
        as_alone (`bool`, *optional*, defaults to `False`):
            Whether the client is the only one of its federation, whose random orders are then those of its Trainer.
        num_processes (`int`, *optional*, defaults to `1`), process_index (`int`, *optional*, defaults to `0`):
            Processes that share the work, and the one whose waves are planned. All have the same waves and steps,
            some of which a process may have nothing to do in.
    """

    def __init__(
        self,
        rows_of: Mapping[str, Sequence[int]],
        work: LocalWork,
        *,
        parallel_clients: int,
        seed: int,
        order: str = "random",
        lengths: np.ndarray | None = None,
        as_alone: bool = False,
        num_processes: int = 1,
        process_index: int = 0,
    ):
        self.rows_of, self.work = rows_of, work
        self.parallel_clients, self.seed, self.order, self.lengths = parallel_clients, seed, order, lengths
        self.as_alone = as_alone
        self.num_processes, self.process_index = num_processes, process_index
        self._mean_length = {c: 1.0 if lengths is None else float(lengths[rows].mean()) for c, rows in rows_of.items()}

    def num_steps(self, client_id: str) -> int:
        """Local steps that a client takes in a round."""
        return self.work.num_steps(len(self.rows_of[client_id]))

    def num_examples(self, client_id: str, round_index: int, num_steps: int) -> int:
        """Different rows among those of a client's first local steps of a round."""
        rows = len(self.rows_of[client_id])
        return self.work.num_examples(rows, self._order_of(client_id, round_index), num_steps)

    def plan(self, round_index: int, client_ids: Sequence[str], trained: Sequence[Wave] = ()) -> Round:
        """
        Groups a round's clients into waves of at most `parallel_clients` per process.

        Clients with as many steps as each other train together, and among them those with rows of like length, so that
        few slots wait for a neighbour. Within a wave, the longest go to the process that has least to do.

        Args:
            round_index (`int`):
                Round, counted from 0.
            client_ids (`Sequence[str]`):
                Its clients, or those of them that live here.
            trained (`Sequence[Wave]`, *optional*, defaults to `()`):
                The round's first waves, where they have trained before the run was interrupted, or are about to go on.
                The other clients are grouped anew.
        """
        client_ids = sorted(client_ids)
        steps = {client_id: self.num_steps(client_id) for client_id in client_ids}
        lengths = self._mean_length
        left = set(client_ids).difference(*(wave.client_ids for wave in trained))
        by_length = sorted(left, key=lambda client_id: (-steps[client_id], -lengths[client_id], client_id))
        size = self.parallel_clients * self.num_processes
        waves = list(trained)
        for group in (by_length[i : i + size] for i in range(0, len(by_length), size)):
            work = {client_id: steps[client_id] * lengths[client_id] for client_id in group}
            shares = _deal(group, work, self.num_processes, self.parallel_clients)
            wave_steps = tuple(steps[client_id] for client_id in group)
            waves.append(Wave(tuple(shares[self.process_index]), max(wave_steps), steps_of_all=wave_steps))
        return Round(round_index=round_index, client_ids=tuple(client_ids), waves=tuple(waves))

    def micro_batches(self, round_: Round) -> Iterator[list[tuple[int, int]]]:
        """
        A round's micro-batches as `(slot, row)` pairs. Every step has as many as there are accumulation steps: where
        all clients have run out, the last ones are empty.
        """
        for wave in round_.waves:
            steps = [
                self.work.steps(len(self.rows_of[client_id]), self._order_of(client_id, round_.round_index))
                for client_id in wave.client_ids
            ]
            for step in range(wave.num_steps):
                for i in range(self.work.accumulation_steps):
                    yield [
                        (slot, self.rows_of[client_id][row])
                        for slot, client_id in enumerate(wave.client_ids)
                        if step < len(steps[slot]) and i < len(steps[slot][step])
                        for row in steps[slot][step][i]
                    ]

    def _order_of(self, client_id: str, round_index: int) -> Callable[[int], list[int]]:
        """Order of a client's rows in each pass of a round, from (seed, round, client) alone."""
        rows, work = self.rows_of[client_id], self.work
        lengths = self.lengths[rows] if self.lengths is not None else None

        def order(pass_index: int) -> list[int]:
            if self.order == "sequential":
                return list(range(len(rows)))
            if self.as_alone:
                # Accelerate shuffles epoch e with the generator seeded `seed + e`; a lone client sees the same rows.
                seed = self.seed + round_index * work.num_passes(len(rows)) + pass_index
            else:
                seed = derive_seed(self.seed, "rows", round_index, client_id, pass_index)
            generator = torch.Generator().manual_seed(seed)
            if self.order == "group_by_length":
                batch = work.batch_size * work.accumulation_steps
                return list(LengthGroupedSampler(batch, lengths=lengths.tolist(), generator=generator))
            shuffled = torch.randperm(len(rows), generator=generator).tolist()
            if self.as_alone or lengths is None:
                return shuffled
            seed, places = derive_seed(self.seed, "lengths", round_index), work.rows_per_pass(len(rows))
            return match_lengths(shuffled, lengths, seed=seed, start=pass_index * places, places=places)

        return order


class WholePasses:
    """
    Plans for a client that its Trainer trains by itself: a round is a pass, whose length the Trainer's loader alone
    knows.

    Args:
        client_id (`str`):
            The client.
        num_rows (`int`):
            Its rows.
    """

    def __init__(self, client_id: str, num_rows: int):
        self.client_id, self.num_rows = client_id, num_rows

    def num_steps(self, client_id: str) -> int:
        return 0

    def num_examples(self, client_id: str, round_index: int, num_steps: int) -> int:
        return self.num_rows

    def plan(self, round_index: int, client_ids: Sequence[str], trained: Sequence[Wave] = ()) -> Round:
        return Round(round_index, (self.client_id,), (Wave((self.client_id,), num_steps=0),))


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
