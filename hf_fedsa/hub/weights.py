"""An adapter's tensors, which may come from anyone: read from a file and checked."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from .federation_file import brief

LONGEST_NAME = 500
_DTYPES = {
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
}


def check_tensors(tensors: Mapping[str, torch.Tensor], place: str) -> None:
    """
    Checks the values of an adapter.

    Args:
        tensors (`Mapping[str, torch.Tensor]`):
            The adapter.
        place (`str`):
            What to call it in messages.

    Raises:
        `ValueError`: a tensor is not finite, or of a dtype that no adapter has.
    """
    for key, tensor in tensors.items():
        if len(key) > LONGEST_NAME:
            raise ValueError(f"{place} holds a tensor with a name of {len(key)} characters: {brief(key)}.")
        if tensor.dtype not in _DTYPES:
            raise ValueError(f"{place} holds {key!r} in {tensor.dtype}, which adapters are not saved in.")
        if not torch.isfinite(tensor).all():
            raise ValueError(
                f"{place} holds {key!r} with {int((~torch.isfinite(tensor)).sum())} of {tensor.numel()} values that "
                "are NaN or infinite. Such an adapter makes all outputs NaN. Load an earlier revision, or train again."
            )


def load_checked(path: Path, whose: str) -> dict[str, torch.Tensor]:
    """
    Reads an adapter's tensors.

    Args:
        path (`Path`):
            The file.
        whose (`str`):
            What to call it in messages.

    Raises:
        `ValueError`: it is no safetensors file, or [`check_tensors`] refuses what it holds.
    """
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} cannot be read as safetensors ({error}). Files of another kind, such as pickles, are not opened."
        ) from error
    check_tensors(tensors, f"{whose} ({path})")
    return tensors
