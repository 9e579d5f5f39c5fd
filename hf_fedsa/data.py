"""Batches that hold rows of several clients, and what of them is whose."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

# What a batch may hold beside its rows: it is the same for every client.
_PLAIN = (type(None), bool, int, float, str, np.generic)


def rows_of(value: Any, name: str, start: int, count: int, total: int) -> Any:
    """
    One client's part of an entry of a batch.

    Tensors, arrays, lists and tuples have one item per row, or are lists of such. Dictionaries are divided entry by
    entry. Plain values, and tensors whose first axis has length 1 or that have none, are every client's.

    Args:
        value (`Any`):
            Entry of the batch.
        name (`str`):
            Its key, for errors.
        start (`int`), count (`int`), total (`int`):
            First row and number of rows of the client, and number of rows of all clients.

    Raises:
        `ValueError`: it cannot be told which part of the entry is the client's.
    """
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, Mapping):
        return {key: rows_of(item, f"{name}.{key}", start, count, total) for key, item in value.items()}
    length = _length(value)
    if isinstance(value, (torch.Tensor, np.ndarray)):
        if length == total:
            return value[start : start + count]
        if length is None or length == 1:
            return value
    elif isinstance(value, (list, tuple)):
        # Rows of lists, or lists of a value for every row, as torch's collator makes of rows that hold lists.
        transposed = bool(value) and all(_length(item) == total for item in value)
        if length == total and not transposed:
            return value[start : start + count]
        if transposed and length != total:
            return type(value)([rows_of(item, name, start, count, total) for item in value])
    raise ValueError(
        f"The data collator made `{name}` of a batch of {total} rows a {_describe(value)}, so it is not known which "
        "part of it is which client's. Return a tensor, an array or a list with one entry per row, or set "
        "`parallel_clients=1`."
    )


def _length(value: Any) -> int | None:
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return value.shape[0] if value.ndim else None
    return len(value) if isinstance(value, (list, tuple)) else None


def _describe(value: Any) -> str:
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return f"`{type(value).__name__}` of shape {tuple(value.shape)}"
    if not isinstance(value, (list, tuple)):
        return f"`{type(value).__name__}`"
    lengths = sorted({n for item in value if (n := _length(item)) is not None})
    of = f" of items of length {', '.join(map(str, lengths[:5]))}" if lengths else ""
    return f"`{type(value).__name__}` of length {len(value)}{of}"
