"""Rows to clients: IID, Dirichlet label skew, or a column that names the client."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict, concatenate_datasets

from .seeds import derive_seed

_MAX_DRAWS = 100


def partition_iid(
    dataset: Dataset, num_clients: int, *, seed: int = 42, eval_dataset: Dataset | None = None
) -> DatasetDict | tuple[DatasetDict, DatasetDict]:
    """
    Deals shuffled rows to clients of equal size (to one row).

    Args:
        dataset ([`~datasets.Dataset`]):
            Rows to deal. Each goes to exactly one client.
        num_clients (`int`):
            Number of clients. They are named `client_0`, `client_1`, ...
        seed (`int`, *optional*, defaults to `42`):
            Seed of the shuffle.
        eval_dataset ([`~datasets.Dataset`], *optional*):
            Evaluation rows, dealt in the same proportions.

    Returns:
        [`~datasets.DatasetDict`] of the clients' rows, or the pair `(train, eval)` if `eval_dataset` was passed.
    """
    _check_rows(dataset, num_clients, name="dataset")
    shares = np.full((1, num_clients), 1.0 / num_clients)
    return _deal(dataset, eval_dataset, lambda rows: np.zeros(len(rows), dtype=int), shares, seed)


def partition_dirichlet(
    dataset: Dataset,
    num_clients: int,
    alpha: float,
    label_column: str,
    *,
    seed: int = 42,
    min_examples: int = 1,
    eval_dataset: Dataset | None = None,
) -> DatasetDict | tuple[DatasetDict, DatasetDict]:
    """
    Splits each label's rows over the clients in proportions drawn from a symmetric Dirichlet distribution, the usual
    model of label skew (Hsu et al., https://arxiv.org/abs/1909.06335).

    Args:
        dataset ([`~datasets.Dataset`]):
            Rows to split. Each goes to exactly one client.
        num_clients (`int`):
            Number of clients. They are named `client_0`, `client_1`, ...
        alpha (`float`):
            Concentration. Small values give each client few labels; large ones approach IID.
        label_column (`str`):
            Column with the label.
        seed (`int`, *optional*, defaults to `42`):
            Seed of the proportions and of the shuffle.
        min_examples (`int`, *optional*, defaults to `1`):
            Rows every client must end up with. Proportions are drawn again until they do.
        eval_dataset ([`~datasets.Dataset`], *optional*):
            Evaluation rows, split with the *same* proportions, so that each client is evaluated on the mixture it
            trains on. A label that `dataset` lacks is spread like the rows as a whole.

    Returns:
        [`~datasets.DatasetDict`] of the clients' rows, or the pair `(train, eval)` if `eval_dataset` was passed.

    Raises:
        `ValueError`: an argument cannot work, or no draw gave every client `min_examples` rows.
    """
    _check_rows(dataset, num_clients, name="dataset")
    if not (alpha > 0 and np.isfinite(alpha)):
        raise ValueError(f"`alpha` must be a positive number, got {alpha}.")
    if min_examples < 1 or min_examples * num_clients > len(dataset):
        raise ValueError(
            f"`min_examples={min_examples}` for `num_clients={num_clients}` needs between {num_clients} and "
            f"{len(dataset)} rows in all. Lower one of them."
        )
    labels = _column(dataset, label_column, name="dataset")
    names = sorted(set(labels), key=str)
    index = {label: i for i, label in enumerate(names)}
    codes = np.array([index[label] for label in labels])
    counts = np.bincount(codes, minlength=len(names))

    for draw in range(_MAX_DRAWS):
        generator = np.random.default_rng(derive_seed(seed, "dirichlet", draw))
        shares = generator.dirichlet(np.full(num_clients, alpha), size=len(names))  # (labels, clients)
        sizes = sum(_apportion(count, share) for count, share in zip(counts, shares, strict=True))
        if sizes.min() >= min_examples:
            break
    else:
        raise ValueError(
            f"No split of {len(dataset)} rows over `num_clients={num_clients}` with `alpha={alpha}` gave every client "
            f"`min_examples={min_examples}` rows in {_MAX_DRAWS} draws. Raise `alpha`, or lower `min_examples` or "
            "`num_clients`."
        )

    # One more row of shares serves evaluation labels that the training rows lack.
    shares = np.vstack([shares, (sizes / sizes.sum())[None]])

    def code(rows: Dataset) -> np.ndarray:
        return np.array([index.get(label, len(names)) for label in _column(rows, label_column, name="eval_dataset")])

    return _deal(dataset, eval_dataset, code, shares, seed)


def partition_by_column(
    dataset: Dataset, column: str, *, eval_dataset: Dataset | None = None
) -> DatasetDict | tuple[DatasetDict, DatasetDict]:
    """
    Groups rows by the client that `column` names, in their original order.

    Args:
        dataset ([`~datasets.Dataset`]):
            Rows to group.
        column (`str`):
            Column with the client. Its values, as text, become the client ids.
        eval_dataset ([`~datasets.Dataset`], *optional*):
            Evaluation rows, grouped by the same column.

    Returns:
        [`~datasets.DatasetDict`] of the clients' rows, or the pair `(train, eval)` if `eval_dataset` was passed.
    """
    train = _group(dataset, column, name="dataset")
    return train if eval_dataset is None else (train, _group(eval_dataset, column, name="eval_dataset"))


def describe_partition(clients: Mapping[str, Dataset], label_column: str | None = None) -> str:
    """
    Table of who got what: rows per client and, with `label_column`, rows per label.

    Example:

    ```python
    >>> print(describe_partition(clients, label_column="topic"))
    client    rows  art  law
    client_0    12   10    2
    client_1     8    1    7
    ```
    """
    counts = {
        client_id: {} if label_column is None else _count(_column(rows, label_column, name=client_id))
        for client_id, rows in clients.items()
    }
    labels = sorted({label for count in counts.values() for label in count})
    table = [["client", "rows", *labels]] + [
        [client_id, str(len(rows)), *(str(counts[client_id].get(label, 0)) for label in labels)]
        for client_id, rows in clients.items()
    ]
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in table
    )


def _check_rows(dataset: Dataset, num_clients: int, name: str) -> None:
    if not isinstance(dataset, Dataset):
        raise TypeError(f"`{name}` must be a `datasets.Dataset`, got `{type(dataset).__name__}`.")
    if not 1 <= num_clients <= len(dataset):
        raise ValueError(
            f"`num_clients={num_clients}` must be between 1 and the {len(dataset)} rows of `{name}`, so that every "
            "client has a row."
        )


def _column(dataset: Dataset, column: str, name: str) -> list:
    if not isinstance(dataset, Dataset):
        raise TypeError(f"`{name}` must be a `datasets.Dataset`, got `{type(dataset).__name__}`.")
    if column not in dataset.column_names:
        raise ValueError(
            f"`{name}` has no column `{column}`, only: {', '.join(dataset.column_names)}. Name one of those."
        )
    values = dataset.with_format(None).select_columns(column)[:][column]
    if any(value is None for value in values):
        raise ValueError(
            f"Column `{column}` of `{name}` is null in row {values.index(None)}. Fill or drop such rows first."
        )
    return list(values)


def _count(values: Sequence) -> dict[str, int]:
    counts: dict[str, int] = {}
    for value in values:
        counts[str(value)] = counts.get(str(value), 0) + 1
    return counts


def _apportion(count: int, shares: np.ndarray) -> np.ndarray:
    """Whole numbers that add up to `count` in proportion to `shares`, by largest remainder."""
    exact = count * shares / shares.sum()
    whole = np.floor(exact).astype(int)
    order = np.argsort(whole - exact, kind="stable")
    whole[order[: count - whole.sum()]] += 1
    return whole


def _deal(dataset, eval_dataset, code, shares: np.ndarray, seed: int):
    """Splits the rows of each code by its row of `shares`, shape `(codes, clients)`."""

    def split(rows: Dataset, part: str) -> DatasetDict:
        codes = code(rows)
        order = np.random.default_rng(derive_seed(seed, "deal", part)).permutation(len(rows))
        owned: list[list[np.ndarray]] = [[] for _ in range(shares.shape[1])]
        for label in range(len(shares)):
            members = order[codes[order] == label]
            sizes = _apportion(len(members), shares[label])
            for client, chunk in enumerate(np.split(members, np.cumsum(sizes)[:-1])):
                owned[client].append(chunk)
        return DatasetDict(
            {f"client_{i}": rows.select(np.sort(np.concatenate(chunks))) for i, chunks in enumerate(owned)}
        )

    train = split(dataset, "train")
    return train if eval_dataset is None else (train, split(eval_dataset, "eval"))


def _group(dataset: Dataset, column: str, name: str) -> DatasetDict:
    return DatasetDict(
        {str(client_id): dataset.select(rows) for client_id, rows in rows_by_client(dataset, column, name).items()}
    )


# One dataset for all clients: the trainer tokenizes once and finds each client's rows again by a column.


def join_clients(clients: Mapping[str, Dataset], column: str) -> Dataset:
    """
    Puts the clients' rows into one dataset with a column that names the client.

    Raises:
        `TypeError`: a value is not a [`~datasets.Dataset`].
        `ValueError`: a client has no rows, has a column of that name with other values, or has other columns or
            another transform than the first client.
    """
    tagged = []
    first_id, features = None, None
    formats: dict[str, dict[str, Any]] = {}
    for client_id, rows in clients.items():
        if not isinstance(rows, Dataset):
            raise TypeError(
                f"The rows of client {client_id!r} must be a `datasets.Dataset`, got `{type(rows).__name__}`. "
                "Datasets that are streamed have no length to plan rounds with."
            )
        if len(rows) == 0:
            raise ValueError(f"Client {client_id!r} has no rows, so it cannot train. Leave it out, or give it data.")
        if column in rows.column_names:
            if set(map(str, rows.unique(column))) != {client_id}:
                raise ValueError(
                    f"The rows of client {client_id!r} have a column `{column}` with other values than the client's "
                    "id. Rename or drop it, or set `client_column` to a name that is free."
                )
            rows = rows.remove_columns(column)
        if features is None:
            first_id, features = client_id, rows.features
        elif rows.features != features:
            names = rows.features.keys() | features.keys()
            differing = sorted(name for name in names if rows.features.get(name) != features.get(name))
            raise ValueError(
                f"Clients {first_id!r} and {client_id!r} differ in the columns {', '.join(differing)}, by name or by "
                "type. Bring all clients to the same columns first, with `Dataset.select_columns` or `Dataset.cast`."
            )
        formats[client_id] = rows.format
        tagged.append(rows.add_column(column, [client_id] * len(rows)))
    merged = concatenate_datasets(tagged)
    if not any(map(is_transformed, clients.values())):
        return merged
    common = formats[first_id]
    for client_id, own in formats.items():
        if own != common:
            raise ValueError(
                f"The rows of client {client_id!r} have another transform than those of {first_id!r}, or only one of "
                "them has one, but all rows are read as one dataset. Pass the same function to "
                "`Dataset.with_transform` for every client, or apply it with `Dataset.map`."
            )
    # It goes on being given the columns that it knows, and not the one that was added.
    return merged.with_transform(
        common["format_kwargs"]["transform"],
        columns=common["columns"],
        output_all_columns=common["output_all_columns"],
    )


def is_transformed(rows: Any) -> bool:
    """Whether what is read of a dataset is what a function makes of it (`Dataset.with_transform`)."""
    return isinstance(rows, Dataset) and rows.format["type"] == "custom"


def rows_by_client(dataset: Dataset, column: str, name: str) -> dict[str, list[int]]:
    """Row numbers of each client that `column` names, the clients sorted and the rows in order."""
    members: dict[str, list[int]] = {}
    for row, client_id in enumerate(_column(dataset, column, name=name)):
        members.setdefault(client_id, []).append(row)
    return {client_id: members[client_id] for client_id in sorted(members, key=str)}
