"""Many clients' tensors to one: the arithmetic of the streaming weighted mean."""

import math
from collections.abc import Iterable, Mapping

import torch


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
