"""Which of the clients' updates count, and the streaming weighted mean of those that do."""

import math
from collections.abc import Iterable, Mapping
from statistics import median_low

import torch

# What honest clients of a tiny Llama change, of 2 to 60 rows, with Adam at rates of 1e-4 to 0.5, in 1 to 60 steps: up
# to 0.15 times the norm of A at ordinary rates, which nobody needs to look at, and 28 times at a rate of 0.5. Beyond
# `JUDGED_FROM`, never more than 2.8 times the median of their round, however unequal the clients were.
JUDGED_FROM = 0.5
MOST_OF_MEDIAN = 5.0
MOST_OF_NORM = 30.0
FEWEST_TO_COMPARE = 3


def outliers(changes: Mapping[str, tuple[float, int]], norm: float) -> dict[str, str]:
    """
    Clients whose change of A stands out from that of a round's other clients.

    A client is one if its change is larger than `JUDGED_FROM` times the norm of A and than `MOST_OF_MEDIAN` times the
    median change, in all and per local step: whoever takes more steps goes further. Of fewer than
    `FEWEST_TO_COMPARE` clients, each is compared to `MOST_OF_NORM` times the norm of A.

    Args:
        changes (`Mapping[str, tuple[float, int]]`):
            Per client of the round, the Frobenius norm of its change over all layers, and its local steps.
        norm (`float`):
            Norm of the A they were sent. If it is 0, there is nothing but the other clients to compare to.

    Returns:
        `dict[str, str]`: why, for each of them. It does not depend on the order of the clients.
    """
    if len(changes) < FEWEST_TO_COMPARE:
        limit = MOST_OF_NORM * norm
        return {
            client_id: f"its A has changed by {change / norm:.3g} times the norm it had, more than {MOST_OF_NORM:g}"
            for client_id, (change, _) in changes.items()
            if norm > 0 and change > limit
        }
    typical = median_low(change for change, _ in changes.values())
    typical_per_step = median_low(change / steps for change, steps in changes.values())
    return {
        client_id: f"its A has changed by {change:.3g}, more than {MOST_OF_MEDIAN:g} times the median of the round's "
        f"{len(changes)} clients, {typical:.3g}"
        for client_id, (change, steps) in changes.items()
        if change > JUDGED_FROM * norm
        and change > MOST_OF_MEDIAN * typical
        and change / steps > MOST_OF_MEDIAN * typical_per_step
    }


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
        if not (weight > 0 and math.isfinite(weight)):
            raise ValueError(f"`weight` must be a positive number, got {weight}.")
        if not self.mean:
            self.mean = {key: tensor.detach().to(torch.float32, copy=True) for key, tensor in tensors.items()}
            self.total_weight = float(weight)
            return
        if tensors.keys() != self.mean.keys():
            differing = sorted(tensors.keys() ^ self.mean.keys())
            raise ValueError(f"This client's tensors differ from the earlier ones' in {differing[0]!r}.")
        for key, mean in self.mean.items():
            if tensors[key].shape != mean.shape:
                raise ValueError(
                    f"This client's `{key}` has shape {tuple(tensors[key].shape)}, the earlier ones' "
                    f"{tuple(mean.shape)}. All clients need adapters of the same rank on the same base model."
                )
        self.total_weight += weight
        for key, mean in self.mean.items():
            mean.lerp_(tensors[key].detach().to(mean), weight / self.total_weight)


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
