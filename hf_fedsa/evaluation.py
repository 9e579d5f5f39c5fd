"""Evaluation that leaves a model as it was."""

import contextlib
from collections.abc import Iterator

from torch import nn


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
