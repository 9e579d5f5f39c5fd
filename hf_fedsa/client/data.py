"""Batches that hold rows of several clients, and what of them is whose."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch.utils.data import Sampler

from ..partition import is_transformed
from .slots import SlotRows

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


# Loading rows


class SlotDataset(torch.utils.data.Dataset):
    """Rows of a dataset by `(slot, row)`."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, keys: list[tuple[int, int]]) -> list[tuple[int, dict[str, Any]]]:
        if not keys:
            return []
        if is_transformed(self.dataset):
            return self._by_client(keys)  # A transform is given a batch, and must not see that of another client.
        try:
            rows = self.dataset.__getitems__([row for _, row in keys])
        except Exception:  # Whatever reading raises, it must not take the other clients with it.
            return self._by_client(keys)
        return [(slot, row) for (slot, _), row in zip(keys, rows, strict=True)]

    def _by_client(self, keys: list[tuple[int, int]]) -> list[tuple[int, "dict[str, Any] | Unreadable"]]:
        items: list[tuple[int, dict[str, Any] | Unreadable]] = []
        for slot in dict.fromkeys(slot for slot, _ in keys):
            try:
                rows = self.dataset.__getitems__([row for owner, row in keys if owner == slot])
            except Exception as error:
                items.append((slot, Unreadable(type(error).__name__, str(error))))
            else:
                items += [(slot, row) for row in rows]
        return items


@dataclasses.dataclass(frozen=True)
class Unreadable:
    """Stands for the rows of a client that raised when they were read: kind and text of the exception."""

    kind: str
    text: str


class SlotCollator:
    """
    Collates rows of several clients. Adds `slot_rows`, the number of rows of each slot, in order, and `unreadable`,
    what was wrong with the rows of slots that could not be read.
    """

    def __init__(self, collate: Callable):
        self.collate = collate

    def __call__(self, items: list[tuple[int, dict[str, Any]]]) -> dict[str, Any]:
        unreadable = {slot: (row.kind, row.text) for slot, row in items if isinstance(row, Unreadable)}
        items = [(slot, row) for slot, row in items if slot not in unreadable]
        if not items:
            # The Trainer counts tokens in every micro-batch, also in one that no client has rows for.
            empty = torch.zeros((0, 1), dtype=torch.long)
            return {"input_ids": empty, "labels": empty, "slot_rows": (), "unreadable": unreadable}
        counts: dict[int, int] = {}
        for slot, _ in items:
            counts[slot] = counts.get(slot, 0) + 1
        batch = self.collate([row for _, row in items])
        if len(counts) > 1:
            self._check_rows(batch, len(items))
        return {**batch, "slot_rows": tuple(counts.items()), "unreadable": unreadable}

    @staticmethod
    def _check_rows(batch: Mapping[str, Any], num_rows: int) -> None:
        """Rows that a collator joins or multiplies would be taken for every client's."""
        lengths = {k: len(v) for k, v in batch.items() if isinstance(v, torch.Tensor) and v.dim()}
        named = {k: n for k, n in lengths.items() if k in ("input_ids", "labels")} or lengths
        if any(length != num_rows for length in named.values()):
            raise ValueError(
                f"The data collator made a batch of {num_rows} rows into tensors of "
                f"{', '.join(f'{n} (`{k}`)' for k, n in named.items())}, so it is not known which are of which "
                "client. Use one that returns one entry per row, or set `parallel_clients=1`."
            )


class RoundSampler(Sampler):
    """Batches of the round that is open when iteration starts."""

    def __init__(self, batches: Callable[[], Iterator[list[tuple[int, int]]]], length: int):
        self.batches = batches
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return self.batches()


def split_rows(inputs: Mapping[str, Any], slot_rows: SlotRows) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each slot's part of a batch. All of it, if it is one client's."""
    entries = {key: value for key, value in inputs.items() if key != "slot_rows"}
    if len(slot_rows) == 1:
        yield slot_rows[0][0], entries
        return
    total = sum(count for _, count in slot_rows)
    start = 0
    for slot, count in slot_rows:
        yield slot, {key: rows_of(value, key, start, count, total) for key, value in entries.items()}
        start += count
