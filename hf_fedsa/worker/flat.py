"""Messages with their tensors as one array, and whether what came is what is shared here."""

import dataclasses
from typing import Any

import torch

from ..messages import Broadcast, MessageError, Tensors, Update, from_bytes, to_bytes
from ..tensors import flatten, layout_sha256, unflatten
from .connection import FlatMessage


def to_flat(message: Broadcast | Update) -> FlatMessage:
    """
    A message with its tensors as one array.

    Raises:
        `ValueError`: a tensor has a dtype that fp32 does not hold.
    """
    values = dataclasses.asdict(dataclasses.replace(message, shared={}))
    del values["shared"]
    array = flatten(message.shared).numpy().astype("<f4", copy=False).tobytes()
    return FlatMessage(values=values, array=array, layout=layout_sha256(message.shared))


def from_flat(kind: type[Broadcast] | type[Update], flat: FlatMessage, like: Tensors) -> Any:
    """
    The message that [`to_flat`] was given.

    Args:
        kind (`type`):
            `Broadcast` or `Update`.
        flat (`FlatMessage`):
            What [`to_flat`] made of it.
        like (`dict[str, torch.Tensor]`):
            Tensors of the names, shapes and dtypes that it must have. None are expected of an update with a fault.

    Raises:
        [`MessageError`]: it has tensors of other names or shapes, or of a dtype that fp32 does not hold, or a field is
            missing, unknown or of another type.
    """
    if kind is Update and flat.values.get("fault") is not None:
        like = {}
    if flat.layout != layout_sha256(like):
        raise MessageError(
            f"The array has layout {flat.layout[:12]}, but the {len(like)} tensors that are shared here have "
            f"{layout_sha256(like)[:12]}: other names or shapes. Both sides need one base model, adapter and rank."
        )
    try:
        # Refuses a dtype that the way back could not hold, before anyone trains for it.
        flatten({key: torch.empty(0, dtype=tensor.dtype) for key, tensor in like.items()})
        message = from_bytes(to_bytes(kind(shared={}, **flat.values)))
        array = torch.frombuffer(bytearray(flat.array), dtype=torch.float32) if len(flat.array) else torch.empty(0)
        return dataclasses.replace(message, shared=unflatten(array, like))
    except MessageError:
        raise
    except (TypeError, ValueError) as error:
        raise MessageError(f"A `{kind.__name__}` with an array that does not make up a message: {error}") from error


def in_layout(message: Any, like: Tensors) -> Broadcast:
    """The broadcast in the dtypes of `like`, if it has the same names and shapes."""
    if not isinstance(message, Broadcast):
        raise MessageError(f"A `{type(message).__name__}`, where a worker is sent a `Broadcast`.")
    for key in sorted(message.shared.keys() | like.keys()):
        sent, here = (tuple(side[key].shape) if key in side else None for side in (message.shared, like))
        if sent != here:
            raise MessageError(
                f"`{key}` has shape {sent} in the request and {here} in this worker (None: there is no such tensor). "
                "Both sides need one base model, adapter and rank."
            )
    return dataclasses.replace(message, shared={key: t.to(like[key].dtype) for key, t in message.shared.items()})
