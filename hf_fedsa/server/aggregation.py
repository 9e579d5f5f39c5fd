"""Many clients' tensors to one: the streaming weighted mean, and rules that a few of them cannot take along."""

import itertools
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, Protocol

import torch

from ..messages import Tensors
from ..tensors import clone_tensors, flatten, unflatten

AllReduce = Callable[[torch.Tensor], torch.Tensor]
Gather = Callable[[list], list]

# Cut at either end where the user does not say.
TRIM_FRACTION = 0.1


class Aggregator(Protocol):
    """
    Makes one of what a round's clients return, in fp32. It does not depend on the order in which they come, beyond the
    rounding of the mean.

    Attributes:
        min_clients (`int`):
            Clients without which there is no result.
    """

    min_clients: int

    def add(self, client_id: str, tensors: Mapping[str, torch.Tensor], weight: float) -> None:
        """
        Takes in one client's tensors, of which it keeps no more than a copy.

        Raises:
            `ValueError`: the weight is not a positive number, or names or shapes differ from those of earlier clients.
        """

    def reduce(self, all_reduce: AllReduce, gather: Gather, like: Tensors) -> None:
        """
        Takes in what the aggregators of all processes hold. Called in all of them; they are equal after it.

        Args:
            all_reduce (`Callable[[torch.Tensor], torch.Tensor]`):
                Sum over processes of a tensor on the CPU, on the CPU.
            gather (`Callable[[list], list]`):
                The lists of all processes as one.
            like (`dict[str, torch.Tensor]`):
                Tensors of the names and shapes that clients return, fp32.
        """

    def result(self) -> Tensors:
        """
        One for all, fp32, which may be the aggregator's own memory. Empty if nobody has been added.

        Raises:
            `ValueError`: fewer than `min_clients` have been added.
        """

    def state(self) -> tuple[dict[str, Tensors], dict[str, Any]]:
        """What it holds: tensors by part and key, which are not copies, and plain JSON."""

    def load_state(self, parts: dict[str, Tensors], entries: dict[str, Any], client_ids: Collection[str]) -> None:
        """
        Goes on where another one stood, and takes its own out of what it is given. One that had taken in nobody may
        have been of another kind.

        Args:
            parts (`dict[str, dict[str, torch.Tensor]]`), entries (`dict[str, Any]`):
                What [`state`] returned, among others.
            client_ids (`Collection[str]`):
                Clients that had been added.

        Raises:
            `KeyError`, `ValueError`: there is no state of this kind.
        """


class WeightedMean:
    """
    Weighted mean of tensors that arrive one client at a time, held in fp32.

    After clients `1..n` it holds `sum_i(w_i * x_i) / sum_i(w_i)`, with the memory of one client: each arrival moves
    the mean by `w_i / (w_1 + ... + w_i)` of its distance. One client alone is returned bit for bit. Inputs are not
    changed.

    Args:
        mean (`Mapping[str, torch.Tensor]`, *optional*):
            Mean to go on from, fp32.
        total_weight (`float`, *optional*, defaults to `0.0`):
            Weight behind `mean`.
    """

    def __init__(self, mean: Mapping[str, torch.Tensor] | None = None, total_weight: float = 0.0):
        self.mean = {key: tensor.clone() for key, tensor in (mean or {}).items()}
        self.total_weight = total_weight

    @torch.no_grad()
    def add(self, tensors: Mapping[str, torch.Tensor], weight: float) -> None:
        """
        Takes in one client's tensors.

        Raises:
            `ValueError`: the weight is not a positive number, or names or shapes differ from those of earlier clients.
        """
        _check_weight(weight)
        if not self.mean:
            self.mean = {key: tensor.detach().to(torch.float32, copy=True) for key, tensor in tensors.items()}
            self.total_weight = float(weight)
            return
        _check_fits(tensors, self.mean)
        self.total_weight += weight
        for key, mean in self.mean.items():
            mean.lerp_(tensors[key].detach().to(mean), weight / self.total_weight)


def _check_weight(weight: float) -> None:
    if not (weight > 0 and math.isfinite(weight)):
        raise ValueError(f"`weight` must be a positive number, got {weight}.")


def _check_fits(tensors: Mapping[str, torch.Tensor], earlier: Mapping[str, torch.Tensor]) -> None:
    if tensors.keys() != earlier.keys():
        differing = sorted(tensors.keys() ^ earlier.keys())
        raise ValueError(f"This client's tensors differ from the earlier ones' in {differing[0]!r}.")
    for key, tensor in earlier.items():
        if tensors[key].shape != tensor.shape:
            raise ValueError(
                f"This client's `{key}` has shape {tuple(tensors[key].shape)}, the earlier ones' "
                f"{tuple(tensor.shape)}. All clients need adapters of the same rank on the same base model."
            )


class Mean:
    """[`WeightedMean`] of the clients, with the memory of one of them."""

    min_clients = 1

    def __init__(self):
        self._running = WeightedMean()

    def add(self, client_id: str, tensors: Mapping[str, torch.Tensor], weight: float) -> None:
        self._running.add(tensors, weight)

    def reduce(self, all_reduce: AllReduce, gather: Gather, like: Tensors) -> None:
        keys, total = sorted(like), self._running.total_weight
        sums = [self._running.mean.get(key, torch.zeros_like(like[key])) * total for key in keys]
        flat = torch.cat([*(tensor.flatten() for tensor in sums), torch.tensor([total], dtype=torch.float32)])
        flat = all_reduce(flat)
        if (weight := float(flat[-1])) > 0:
            parts = (flat[:-1] / weight).split([like[key].numel() for key in keys])
            mean = {key: part.view_as(like[key]) for key, part in zip(keys, parts, strict=True)}
            self._running = WeightedMean(mean, weight)

    def result(self) -> Tensors:
        return self._running.mean

    def state(self) -> tuple[dict[str, Tensors], dict[str, Any]]:
        return {"mean": self._running.mean}, {"mean_weight": self._running.total_weight}

    def load_state(self, parts: dict[str, Tensors], entries: dict[str, Any], client_ids: Collection[str]) -> None:
        mean, weight = parts.pop("mean", {}), entries.pop("mean_weight", None)
        if mean and weight is None:
            raise KeyError("mean_weight")
        self._running = WeightedMean(mean, weight or 0.0)


class _Unweighted:
    """
    Rules that need all clients at once, each counted alike: it holds an fp32 copy of what every client of the round
    has returned, so its memory is that of as many A as the round has clients, in every process.
    """

    name: str
    min_clients = 1

    def __init__(self):
        self._held: dict[str, Tensors] = {}

    def _combine(self, clients: list[Tensors]) -> Tensors:
        """One of what the clients have returned, in the order of their ids."""
        raise NotImplementedError

    @torch.no_grad()
    def add(self, client_id: str, tensors: Mapping[str, torch.Tensor], weight: float) -> None:
        _check_weight(weight)
        if client_id in self._held:
            raise ValueError(f"Client {client_id!r} has been added already, and each counts once.")
        for other in itertools.islice(self._held.values(), 1):
            _check_fits(tensors, other)
        self._held[client_id] = clone_tensors(tensors, dtype=torch.float32)

    def reduce(self, all_reduce: AllReduce, gather: Gather, like: Tensors) -> None:
        client_ids = sorted(gather([*self._held]))
        if not client_ids:
            return
        rows = torch.zeros(len(client_ids), sum(tensor.numel() for tensor in like.values()))
        for row, client_id in zip(rows, client_ids, strict=True):
            if client_id in self._held:
                row.copy_(flatten(self._held[client_id]))
        rows = all_reduce(rows)  # (clients, numbers): every row is zero in all processes but one
        self._held = {client_id: unflatten(row, like) for client_id, row in zip(client_ids, rows, strict=True)}

    @torch.no_grad()
    def result(self) -> Tensors:
        if not self._held:
            return {}
        if len(self._held) < self.min_clients:
            raise ValueError(
                f"`aggregator={self.name!r}` needs {self.min_clients} clients in a round, but {len(self._held)} have "
                "returned an update. Take more clients per round, or another aggregator."
            )
        return self._combine([self._held[client_id] for client_id in sorted(self._held)])

    def state(self) -> tuple[dict[str, Tensors], dict[str, Any]]:
        return {f"update|{client_id}": tensors for client_id, tensors in self._held.items()}, {}

    def load_state(self, parts: dict[str, Tensors], entries: dict[str, Any], client_ids: Collection[str]) -> None:
        entries.pop("mean_weight", None)
        if any(f"update|{client_id}" not in parts for client_id in client_ids):
            raise ValueError(
                f"The open round in that state was not begun with `aggregator={self.name!r}`. Go on with the one it "
                "was begun with, or from a state at a round's end."
            )
        self._held = {client_id: clone_tensors(parts.pop(f"update|{client_id}")) for client_id in client_ids}


class Median(_Unweighted):
    """Coordinate-wise median of the clients, without weights: of an even number, the mean of the two middle ones."""

    name = "median"

    def _combine(self, clients: list[Tensors]) -> Tensors:
        return _middle_mean(clients, cut=(len(clients) - 1) // 2)


class TrimmedMean(_Unweighted):
    """
    Coordinate-wise mean of the clients without the largest and smallest of them, without weights (Yin et al., 2018,
    https://arxiv.org/abs/1803.01498).

    Args:
        trim_fraction (`float`, *optional*, defaults to `0.1`):
            The fraction b of the K clients that is cut at either end, rounded down: `floor(b * K)` of them.
    """

    name = "trimmed_mean"

    def __init__(self, trim_fraction: float = TRIM_FRACTION):
        super().__init__()
        self.trim_fraction = trim_fraction

    def _combine(self, clients: list[Tensors]) -> Tensors:
        return _middle_mean(clients, cut=num_trimmed(self.trim_fraction, len(clients)))


class Krum(_Unweighted):
    """
    What one client has returned, as it is: that of the client which is closest to its neighbours (Blanchard et al.,
    2017, https://arxiv.org/abs/1703.02757).

    Of K clients, a client's score is the sum of the squared distances, over all tensors together, to the `K - f - 2`
    that are nearest to it. The lowest score wins, of equal ones that of the smaller client id.

    Args:
        krum_byzantine (`int`, *optional*):
            The number f of clients that may return anything. It needs `2 * f + 3` clients. `None` means the largest
            that goes with the clients of the round.
    """

    name = "krum"

    def __init__(self, krum_byzantine: int | None = None):
        super().__init__()
        self.krum_byzantine = krum_byzantine
        self.min_clients = 2 * (krum_byzantine or 0) + 3

    def _combine(self, clients: list[Tensors]) -> Tensors:
        byzantine = (len(clients) - 3) // 2 if self.krum_byzantine is None else self.krum_byzantine
        rows = torch.stack([flatten(tensors) for tensors in clients])  # (clients, numbers)
        distances = torch.zeros(len(clients), len(clients), dtype=torch.float64)
        # From differences, not from products, whose rounding would decide between clients that are equally close.
        for i, j in itertools.combinations(range(len(clients)), 2):
            distances[i, j] = distances[j, i] = (rows[i] - rows[j]).double().square().sum()
        # The distance to itself is the first of a sorted row.
        scores = distances.sort(dim=1).values[:, 1 : len(clients) - byzantine - 1].sum(dim=1).tolist()
        return clients[scores.index(min(scores))]


AGGREGATORS: dict[str, Callable[..., Aggregator]] = {
    "mean": Mean,
    "median": Median,
    "trimmed_mean": TrimmedMean,
    "krum": Krum,
}


def make_aggregator(name: str, **arguments: float | None) -> Aggregator:
    """
    An aggregator by its name, with those of the arguments that are not `None`.

    Example:

    ```python
    >>> median = make_aggregator("median")
    >>> for client_id, number in (("a", 1.0), ("b", 2.0), ("c", 99.0)):
    ...     median.add(client_id, {"A": torch.tensor([number])}, weight=1)
    >>> median.result()
    {'A': tensor([2.])}
    ```

    Raises:
        `TypeError`, `ValueError`: see [`check_aggregator`].
    """
    check_aggregator(name, **arguments)
    return AGGREGATORS[name](**{key: value for key, value in arguments.items() if value is not None})


def check_aggregator(name: str, trim_fraction: float | None = None, krum_byzantine: int | None = None) -> None:
    """
    Checks how updates are to be aggregated.

    Raises:
        `TypeError`, `ValueError`: there is no such aggregator, or it does not take the other arguments.
    """
    if name not in AGGREGATORS:
        raise ValueError(f"`aggregator` must be one of {', '.join(map(repr, AGGREGATORS))}, got {name!r}.")
    for argument, value, owner in (
        ("trim_fraction", trim_fraction, "trimmed_mean"),
        ("krum_byzantine", krum_byzantine, "krum"),
    ):
        if value is not None and name != owner:
            raise ValueError(
                f"`{argument}={value!r}` is an argument of `aggregator={owner!r}`, but `aggregator={name!r}`. Leave "
                f"one of them out."
            )
    if trim_fraction is not None:
        if not isinstance(trim_fraction, (int, float)) or isinstance(trim_fraction, bool):
            raise TypeError(
                f"`trim_fraction` must be a number or None, got {trim_fraction!r} of type "
                f"{type(trim_fraction).__name__}."
            )
        if not 0 <= trim_fraction < 0.5:
            raise ValueError(
                f"`trim_fraction` must be in [0, 0.5), got {trim_fraction!r}. It is cut at either end, "
                "and clients must be left."
            )
    if krum_byzantine is not None:
        if not isinstance(krum_byzantine, int) or isinstance(krum_byzantine, bool):
            raise TypeError(
                f"`krum_byzantine` must be an int or None, got {krum_byzantine!r} of type "
                f"{type(krum_byzantine).__name__}."
            )
        if krum_byzantine < 0:
            raise ValueError(f"`krum_byzantine` must be at least 0, got {krum_byzantine}.")


def check_clients_of_round(num_clients: int, name: str, krum_byzantine: int | None = None) -> None:
    """
    Checks that a round has enough clients to be aggregated.

    Raises:
        `ValueError`: it has not, so no round could count.
    """
    needed = make_aggregator(name, krum_byzantine=krum_byzantine).min_clients
    if num_clients < needed:
        given = "" if krum_byzantine is None else f" with `krum_byzantine={krum_byzantine}`"
        raise ValueError(
            f"`aggregator={name!r}`{given} needs {needed} clients in a round (2 f + 3, for f that may return "
            f"anything), but a round has {num_clients}, so no round could count. Raise `clients_per_round`, lower "
            "`krum_byzantine`, or take `aggregator='median'`."
        )


def num_trimmed(trim_fraction: float, num_clients: int) -> int:
    """Clients that are cut at either end."""
    # 0.29 * 100 is a little less than 29.
    return math.floor(trim_fraction * num_clients + 1e-9)


def _middle_mean(clients: list[Tensors], cut: int) -> Tensors:
    """Coordinate-wise mean of the clients without the `cut` smallest and the `cut` largest."""
    result = {}
    for key in clients[0]:
        ordered = torch.stack([tensors[key] for tensors in clients]).sort(dim=0).values  # (clients, *shape)
        result[key] = ordered[cut : len(clients) - cut].mean(dim=0)
    return result


def weighted_mean(updates: Iterable[tuple[Mapping[str, torch.Tensor], float]]) -> dict[str, torch.Tensor]:
    """
    Weighted mean of `(tensors, weight)` pairs in one pass.

    Example:

    ```python
    >>> weighted_mean([({"A": torch.tensor([0.0])}, 1), ({"A": torch.tensor([4.0])}, 3)])
    {'A': tensor([3.])}
    ```

    Raises:
        `ValueError`: there is no update, or a weight is not positive.
    """
    running = WeightedMean()
    for tensors, weight in updates:
        running.add(tensors, weight)
    if not running.mean:
        raise ValueError("`updates` is empty: there is nothing to average.")
    return running.mean
