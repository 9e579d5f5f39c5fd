"""Every client on its own rows with its own adapter: what comes of it, and a model that is left as it was."""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from .metrics import MOST_CLIENTS_IN_LOG, spread

# Metrics of an evaluation that say nothing about the model.
_OF_SPEED = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time", "num_tokens")


@dataclass
class EvaluationResults:
    """
    What clients were found to be at their last evaluation, for the model card.

    Args:
        by_client (`dict[str, dict[str, float | None]]`, *optional*):
            Metrics of every client that was evaluated. `None` stands for what is not finite.
        after_round (`int`, *optional*, defaults to `0`):
            Rounds that were done when that was.
    """

    by_client: dict[str, dict[str, float | None]] = field(default_factory=dict)
    after_round: int = 0

    def add(self, results: Mapping[str, Mapping[str, Any]], rounds_done: int) -> None:
        """Keeps metrics of clients. Those of an earlier round are of another A, and go."""
        left_out = {"epoch", *(f"eval_{name}" for name in _OF_SPEED)}
        if self.after_round != rounds_done:
            self.by_client = {}
        self.after_round = rounds_done
        for client_id, metrics in results.items():
            self.by_client[client_id] = {
                name: value if math.isfinite(value) else None
                for name, value in metrics.items()
                if isinstance(value, (int, float)) and name not in left_out
            }


class ClientMetrics:
    """
    Metrics of several clients under the names of one evaluation.

    Args:
        outputs (`Mapping[str, tuple[dict, int]]`):
            Per client, its metrics as `<prefix>_<client_id>_<name>`, and the rows it was evaluated on.
        client_ids (`Sequence[str]`):
            The clients, in the order in which they are named.
        prefix (`str`):
            Prefix of the metrics' names.
        batch_size (`int`):
            Rows per batch.
    """

    def __init__(
        self,
        outputs: Mapping[str, tuple[Mapping[str, Any], int]],
        client_ids: Sequence[str],
        prefix: str,
        batch_size: int,
    ):
        self.prefix, self.num_clients = prefix, len(client_ids)
        self.num_samples = self.num_steps = 0
        # Every client's metrics, and their means.
        self.all: dict[str, Any] = {}
        # `eval_<name>` per client, whatever the prefix.
        self.by_client: dict[str, dict[str, Any]] = {}
        self._by_name: dict[str, list[Any]] = {}
        for client_id in client_ids:
            metrics, samples = outputs[client_id]
            self.num_samples += samples
            self.num_steps += math.ceil(samples / batch_size)
            for key, value in metrics.items():
                name = key.removeprefix(f"{prefix}_{client_id}_")
                if name != "model_preparation_time":
                    self.all[key] = value
                    self._by_name.setdefault(name, []).append(value)
                    self.by_client.setdefault(client_id, {})[f"eval_{name}"] = value
        for name, values in self._by_name.items():
            if all(isinstance(value, (int, float)) for value in values):
                self.all[f"{prefix}_{name}"] = sum(values) / len(values)

    def to_log(self) -> dict[str, Any]:
        """Each client's metrics, or of many clients their spread."""
        return spread(self._by_name, self.prefix) if self.num_clients > MOST_CLIENTS_IN_LOG else self.all


@contextlib.contextmanager
def kept_in_precision(model: nn.Module) -> Iterator[None]:
    """
    Within this context a model may be cast to another dtype. After it, every tensor is the one it was, bit for bit.

    `bf16_full_eval` and `fp16_full_eval` round the whole model in place and leave it so: the A and B that are saved
    next, and the base weights that training goes on with. Both copies are in memory while it lasts, as a rounded
    tensor cannot be widened again. Quantized weights are integers, which no cast touches.
    """
    before = {name: tensor.data for name, tensor in _floating(model)}
    try:
        yield
    finally:
        for name, tensor in _floating(model):
            tensor.data = before[name]


def _floating(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    for tensors in (model.named_parameters(), model.named_buffers()):
        yield from ((name, tensor) for name, tensor in tensors if tensor.is_floating_point())
