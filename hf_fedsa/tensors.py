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
