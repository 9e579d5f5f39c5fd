"""Dictionaries of tensors: copied, loaded, counted, hashed."""

import hashlib
from collections.abc import Mapping

import torch
from torch import nn


def clone_tensors(tensors: Mapping[str, torch.Tensor], dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """Copies tensors to the CPU, detached from the graph and from the model's memory."""
    with torch.no_grad():
        return {
            key: tensor.detach().to(device="cpu", dtype=dtype or tensor.dtype, copy=True).contiguous()
            for key, tensor in tensors.items()
        }


def load_tensors(parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, torch.Tensor]) -> None:
    """
    Writes `tensors` into `parameters` in place, cast to each parameter's dtype and device.

    Writing into the parameters, rather than through PEFT, also works for a part of an adapter.

    Raises:
        `KeyError`: a tensor has no parameter of its name.
        `ValueError`: a shape differs.
    """
    unknown = sorted(tensors.keys() - parameters.keys())
    if unknown:
        raise KeyError(f"The model has no adapter tensor named {unknown[0]!r} ({len(unknown)} unknown in all).")
    with torch.no_grad():
        for key, tensor in tensors.items():
            if parameters[key].shape != tensor.shape:
                raise ValueError(
                    f"`{key}` has shape {tuple(tensor.shape)}, but the model's is {tuple(parameters[key].shape)}. The "
                    "adapter was made with another rank or another base model."
                )
            parameters[key].copy_(tensor)


def count_bytes(tensors: Mapping[str, torch.Tensor]) -> int:
    """Number of bytes of the tensors' values, as they would be sent."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def tensors_sha256(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and values, in the order of the names."""
    digest = hashlib.sha256()
    for key in sorted(tensors):
        tensor = tensors[key].detach().cpu().contiguous()
        digest.update(f"{key}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


# All tensors as one array, in the order of their names: how they travel where one object is wanted and not hundreds.


def layout_sha256(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over names and shapes: what must be equal for one flat array to mean the same on both sides."""
    layout = "\n".join(f"{key}|{tuple(tensors[key].shape)}" for key in sorted(tensors))
    return hashlib.sha256(layout.encode()).hexdigest()


def flatten(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """
    All tensors as one fp32 array of shape `(numbers,)` on the CPU, which is exact from bf16 and fp16 too.

    Raises:
        `ValueError`: a tensor has a dtype that fp32 does not hold.
    """
    for key, tensor in tensors.items():
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"`{key}` is {tensor.dtype}, which a flat array of fp32 does not hold exactly.")
    parts = [tensors[key].detach().to("cpu", torch.float32).flatten() for key in sorted(tensors)]
    return torch.cat(parts) if parts else torch.empty(0)


def unflatten(flat: torch.Tensor, like: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    The tensors that [`flatten`] made one array of, in the dtypes of `like`.

    Args:
        flat (`torch.Tensor` of shape `(numbers,)`):
            The array.
        like (`Mapping[str, torch.Tensor]`):
            Tensors of the names, shapes and dtypes that are wanted.

    Raises:
        `ValueError`: the array has more or fewer numbers than these tensors.
    """
    numbers = sum(tensor.numel() for tensor in like.values())
    if flat.dim() != 1 or flat.numel() != numbers:
        raise ValueError(
            f"An array of shape {tuple(flat.shape)} cannot be divided into the {len(like)} tensors that are shared "
            f"here, which have {numbers} numbers. It is of another base model, adapter or rank."
        )
    parts = flat.split([like[key].numel() for key in sorted(like)])
    return {
        key: part.view(like[key].shape).to(like[key].dtype, copy=True)
        for key, part in zip(sorted(like), parts, strict=True)
    }
