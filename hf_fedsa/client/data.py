"""The clients' rows, and batches that hold rows of several clients."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow
import pyarrow.compute
import torch
from datasets import Dataset, IterableDataset, concatenate_datasets
from torch.utils.data import Sampler

from ..files import validate_client_ids
from ..partition import is_transformed, join_clients, rows_by_client
from .slots import SlotRows

# Id of the one client of a `Dataset` that names none.
ONLY_CLIENT = "client_0"


class ClientRows:
    """
    Whose the rows are: from what the user passes, through the Trainer's own preparation, to each client's rows.

    Args:
        train_dataset (`Dataset` or `dict[str, Dataset]`):
            Training rows, as the user passed them.
        column (`str`):
            Column that names the client of a row.
        expects_names (`bool`):
            Whether the arguments leave no doubt that there is more than one client.
        unseen (`bool`, *optional*, defaults to `False`):
            Whether there may be evaluation rows of clients that never train.

    Raises:
        `TypeError`, `ValueError`: the rows do not say which clients there are, or a client has none.
    """

    def __init__(self, train_dataset: Any, column: str, *, expects_names: bool, unseen: bool = False):
        self.column, self.expects_names, self.unseen = column, expects_names, unseen
        # One dataset, which the Trainer prepares as it would any.
        self.joined = self.as_one_dataset(train_dataset, "train_dataset")
        self.are_named = column in self.joined.column_names
        self.client_ids = [ONLY_CLIENT]
        if self.are_named:
            self.client_ids = list(rows_by_client(self.joined, column, name="train_dataset"))
        validate_client_ids(self.client_ids)
        # Positions of each client's rows, once they are prepared.
        self.of: dict[str, list[int]] = {}
        self.prepared: Dataset | None = None
        self._check_number: Callable[[str, int], None] | None = None

    def as_one_dataset(self, dataset: Any, name: str) -> Dataset:
        """The rows of all clients as one dataset. With a column that names the client, if they are named."""
        if isinstance(dataset, Mapping):
            if not dataset:
                raise ValueError(f"`{name}` is an empty dictionary. Pass at least one client with its rows.")
            if set(dataset) <= {"train", "test", "validation"}:
                raise ValueError(
                    f"`{name}` has the keys {', '.join(dataset)}, which look like splits of one dataset, not clients. "
                    "Pass a split, or a dictionary from client id to rows."
                )
            validate_client_ids(dataset)
            return join_clients(dataset, self.column)
        if isinstance(dataset, IterableDataset):
            raise TypeError(
                f"`{name}` is an `IterableDataset`, which has no length, but rounds are planned from the number of "
                "rows of each client. Pass `Dataset`s; `Dataset.from_generator` makes one."
            )
        if not isinstance(dataset, Dataset):
            raise TypeError(f"`{name}` must be a `Dataset` or a dictionary of them, got `{type(dataset).__name__}`.")
        if len(dataset) == 0:
            raise ValueError(f"`{name}` has no rows.")
        if self.column not in dataset.column_names:
            if self.expects_names:
                raise ValueError(
                    f"`{name}` has no column `{self.column}` to tell the clients apart, only: "
                    f"{', '.join(dataset.column_names)}. Set `client_column` to one of those, or pass a dictionary "
                    "from client id to dataset."
                )
            return dataset
        if getattr(dataset.features[self.column], "dtype", None) not in ("string", "large_string"):
            raise TypeError(
                f"Column `{self.column}` of `{name}` must hold client ids as strings, got "
                f"{dataset.features[self.column]}. Convert it, e.g. with `partition_by_column`."
            )
        return dataset

    # Evaluation rows

    def join_eval(self, eval_dataset: Any) -> Any:
        """Evaluation rows as one dataset that names the clients. As they are, if training rows name none."""
        if not self.are_named or eval_dataset is None:
            return eval_dataset
        if isinstance(eval_dataset, Mapping):
            # A split in the training set's proportions may leave small clients without evaluation rows.
            eval_dataset = {c: rows for c, rows in eval_dataset.items() if not isinstance(rows, Dataset) or len(rows)}
        return self.join_named_eval(eval_dataset)

    def join_named_eval(self, eval_dataset: Any) -> Dataset:
        """
        Evaluation rows as one dataset that names the clients.

        Raises:
            `ValueError`: it is not known whose they are, or a client has no training rows.
        """
        joined = self.as_one_dataset(eval_dataset, "eval_dataset")
        if self.column not in joined.column_names:
            raise ValueError(
                f"`eval_dataset` has no column `{self.column}`, so it is not known which client to evaluate on "
                "which rows. Add the column, or pass a dictionary from client id to dataset."
            )
        named = rows_by_client(joined, self.column, name="eval_dataset")
        unseen = sorted(named.keys() - set(self.client_ids))
        if unseen and not self.unseen:
            raise ValueError(
                f"`eval_dataset` has rows of {unseen[0]!r}{and_more(unseen)}, which has no training rows and so no B "
                "of its own. Remove them, or set `eval_unseen_clients=True` to evaluate such clients with the shared "
                "A and an untrained B."
            )
        validate_client_ids([*self.client_ids, *unseen])
        return joined

    def split(self, joined: Dataset) -> dict[str, Dataset]:
        """Each client's part of evaluation rows that name the clients."""
        rows = rows_by_client(joined, self.column, name="eval_dataset")
        without_names = joined.remove_columns(self.column)
        return {client_id: without_names.select(indices) for client_id, indices in rows.items()}

    # Training rows

    def find(self, prepared: Dataset, *, batches: Callable[[int], int], batch_size: int, max_length: int | None):
        """
        Finds each client's rows again in what the Trainer has made of them.

        Args:
            prepared (`Dataset`):
                The Trainer's `train_dataset`.
            batches (`Callable[[int], int]`):
                Batches in one pass over so many rows.
            batch_size (`int`), max_length (`int`, *optional*):
                Named in errors.

        Returns:
            `Dataset`: the rows without the column that names the client.

        Raises:
            `ValueError`: a client has no row left, or fewer than a batch where such are dropped.
        """
        if not self.are_named:
            self.of, self.prepared = {ONLY_CLIENT: list(range(len(prepared)))}, prepared
            return prepared
        rows = rows_by_client(prepared, self.column, name="train_dataset")
        self._check_number = functools.partial(_check_number, batches, batch_size, max_length)
        for client_id in self.client_ids:
            self._check_number(client_id, len(rows.get(client_id, ())))
        self.of = {client_id: rows[client_id] for client_id in self.client_ids}
        self.prepared = prepared.remove_columns(self.column)
        return self.prepared

    # Clients that come and go

    def join_newcomer(self, rows: Mapping[str, Any], name: str) -> Dataset:
        """
        A newcomer's rows as one dataset that names it.

        Raises:
            `ValueError`: there is a client of that name, or it has no rows, or lacks a column of the others'.
        """
        (client_id,) = rows
        if client_id in self.client_ids:
            raise ValueError(f"There is a client {client_id!r} already. Give the newcomer another name.")
        validate_client_ids([*self.client_ids, client_id])
        joined = self.as_one_dataset(rows, name)
        missing = [column for column in self.joined.column_names if column not in joined.column_names]
        if missing and name == "train_dataset":
            raise ValueError(
                f"The rows of {client_id!r} have no column `{missing[0]}`, which those of the others have. Give them "
                "the columns of the other clients' rows."
            )
        return joined

    def add(self, client_id: str, prepared: Dataset) -> Dataset:
        """
        Puts a newcomer's prepared rows after those of the other clients.

        Returns:
            `Dataset`: the rows of all.

        Raises:
            `ValueError`: it has too few rows left, or other columns or another transform than the others.
        """
        self._check_number(client_id, len(prepared))
        if missing := sorted(self.prepared.features.keys() - prepared.features.keys()):
            raise ValueError(
                f"The rows of {client_id!r} have no column `{missing[0]}`, which those of the others have. Give them "
                "the columns of the other clients' rows."
            )
        first = len(self.prepared)
        prepared = prepared.select_columns(self.prepared.column_names)
        self.prepared = _concatenated(self.prepared, prepared, client_id)
        self.of = dict(sorted({**self.of, client_id: list(range(first, len(self.prepared)))}.items()))
        self.client_ids = list(self.of)
        return self.prepared

    def remove(self, client_id: str) -> None:
        """Forgets which rows are a client's. Nobody reads them any more."""
        self.of = {other: rows for other, rows in self.of.items() if other != client_id}
        self.client_ids = list(self.of)

    def lengths(self, column: str) -> np.ndarray | None:
        """
        Length of every training row, in tokens, or `None` where rows have no token ids yet.

        Args:
            column (`str`):
                Column that holds lengths, where there is one of integers.
        """
        rows = self.prepared.with_format("arrow")
        if column in rows.column_names:
            lengths = rows[:][column]
            if pyarrow.types.is_integer(lengths.type) and not lengths.null_count:
                return lengths.to_numpy()
        if "input_ids" not in rows.column_names:
            return None
        # A part of the rows at a time: those of a selection are copied.
        lengths = [pyarrow.compute.list_value_length(part["input_ids"]).to_numpy() for part in rows.iter(10_000)]
        return np.concatenate(lengths)


def _check_number(
    batches: Callable[[int], int], batch_size: int, max_length: int | None, client_id: str, num_rows: int
) -> None:
    """Refuses a client that has no row left to train on, or fewer than a batch where such are dropped."""
    if num_rows == 0:
        raise ValueError(EMPTY_AFTER_TRUNCATION.format(client_id=client_id, max_length=max_length))
    if batches(num_rows) == 0:
        raise ValueError(
            f"Client {client_id!r} has {num_rows} rows, fewer than one batch of {batch_size}, and "
            "`dataloader_drop_last=True` drops them. Lower `per_device_train_batch_size` or set "
            "`dataloader_drop_last=False`."
        )


def _concatenated(rows: Dataset, newcomer: Dataset, client_id: str) -> Dataset:
    """A newcomer's rows after the others, read as theirs are."""
    if any(rows.format[name] != newcomer.format[name] for name in ("type", "format_kwargs")):
        raise ValueError(
            f"The rows of {client_id!r} have another format or transform than those of the other clients, but all "
            "rows are read as one dataset. Pass the same function to `Dataset.with_transform` for every client, or "
            "apply it with `Dataset.map`."
        )
    joined = concatenate_datasets([rows.with_format(None), newcomer.with_format(None).cast(rows.features)])
    common = rows.format
    if not is_transformed(rows):
        return joined.with_format(common["type"], **common["format_kwargs"])
    return joined.with_transform(
        common["format_kwargs"]["transform"],
        columns=common["columns"],
        output_all_columns=common["output_all_columns"],
    )


EMPTY_AFTER_TRUNCATION = (
    "Client {client_id!r} has no row left to train on: once rows are cut to `max_length={max_length}`, none has a "
    "token that counts for the loss. Raise `max_length`, check the labels, or leave the client out."
)


def and_more(items: Sequence, shown: int = 1) -> str:
    return f" and {len(items) - shown} more" if len(items) > shown else ""


# Batches

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
