"""Where B survives a round."""

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..files import write_json, write_safetensors
from ..tensors import clone_tensors

# The "round" of tensors that a client had before the run: they came from an earlier `train()` of the same trainer.
BEFORE = -1

StoreName = Literal["clients", "optimizers"]


class ClientStoreError(RuntimeError):
    """A client's stored tensors are missing or cannot be read."""


# One store


class ClientStore(Protocol):
    """
    Keeps what clients have after a round while they are not training. What was put is returned bit for bit, as a copy.

    A round may turn out not to count for a client, which then goes on from what it had before. So the last two rounds
    of every client are kept, and whoever knows which one counts drops the other by [`keep`].
    """

    def put(self, client_id: str, round_index: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """
        Stores a copy of a client's tensors after a round, in place of earlier ones of that round.

        Of the client's other rounds the newest older one stays. Those before it go, and so do later ones: they are of
        a future that this round has replaced.
        """

    def get(self, client_id: str, round_index: int) -> dict[str, torch.Tensor]:
        """Returns a copy of a client's tensors. Raises [`ClientStoreError`] if there are none or they are damaged."""

    def rounds(self, client_id: str) -> list[int]:
        """Rounds that a client's tensors are stored of, ascending. `BEFORE` is the first, if it is one of them."""

    def keep(self, client_id: str, round_index: int | None) -> None:
        """Drops all of a client's rounds but this one, or all of them if it is `None`."""

    def rename(self, client_id: str, old: int, new: int) -> None:
        """Makes a client's tensors of one round those of another. Raises [`ClientStoreError`] if there are none."""

    def clear(self) -> None:
        """Forgets all clients."""

    def forget(self, client_id: str) -> None:
        """Deletes all that is stored of a client. Nothing may be."""

    def missing(self, client_id: str, round_index: int) -> ClientStoreError:
        """The error to raise where tensors are wanted that are not stored."""

    def __contains__(self, client_id: str) -> bool:
        """Whether anything is stored of a client."""

    def __iter__(self) -> Iterator[str]:
        """Ids of the stored clients, sorted."""


def _outdated(rounds: Sequence[int], round_index: int) -> list[int]:
    """Which of a client's rounds go when tensors of `round_index` come."""
    newest_older = max((r for r in rounds if r < round_index), default=None)
    return [r for r in rounds if r not in (round_index, newest_older)]


def _check_round(round_index: int) -> None:
    if round_index < BEFORE:
        raise ValueError(
            f"`round_index={round_index}` is no round. Rounds are counted from 0, and `BEFORE` ({BEFORE}) stands for "
            "what a client had before the run."
        )


# The order of the entries is not part of it.
_Layout = frozenset[tuple[str, torch.Size, torch.dtype]]


class MemoryClientStore:
    """
    Client store in the process's memory.

    Tensors that are dropped are kept as room for the next ones of the same layout, which are written in place: making
    room anew for every client and round would fragment the memory. Stored tensors and room together never take more
    than was stored at once at some time.
    """

    def __init__(self):
        self._tensors: dict[str, dict[int, dict[str, torch.Tensor]]] = {}
        self._room: dict[_Layout, list[dict[str, torch.Tensor]]] = {}

    def put(self, client_id: str, round_index: int, tensors: Mapping[str, torch.Tensor]) -> None:
        _check_round(round_index)
        # Also of the same round: if copying fails, tensors that are half the old and half the new are never returned.
        rounds = self.rounds(client_id)
        self._drop(client_id, [*_outdated(rounds, round_index), *(r for r in rounds if r == round_index)])
        copy = self._copy_of(tensors)
        self._tensors.setdefault(client_id, {})[round_index] = copy

    def get(self, client_id: str, round_index: int) -> dict[str, torch.Tensor]:
        if round_index not in self.rounds(client_id):
            raise self.missing(client_id, round_index)
        return clone_tensors(self._tensors[client_id][round_index])

    def rounds(self, client_id: str) -> list[int]:
        return sorted(self._tensors.get(client_id, ()))

    def keep(self, client_id: str, round_index: int | None) -> None:
        self._drop(client_id, [r for r in self.rounds(client_id) if r != round_index])

    def forget(self, client_id: str) -> None:
        self._tensors.pop(client_id, None)
        self._room.clear()  # It may hold what the client had in earlier rounds.

    def rename(self, client_id: str, old: int, new: int) -> None:
        _check_round(new)
        rounds = self.rounds(client_id)
        if old not in rounds:
            raise self.missing(client_id, old)
        if old == new:
            return
        if new in rounds:
            self._drop(client_id, [new])
        self._tensors[client_id][new] = self._tensors[client_id].pop(old)

    def clear(self) -> None:
        self._tensors.clear()
        self._room.clear()

    def missing(self, client_id: str, round_index: int) -> ClientStoreError:
        when = "from before the run" if round_index == BEFORE else f"after round {round_index}"
        return ClientStoreError(
            f"No tensors are stored for client {client_id!r} {when}. Resume from a checkpoint, which holds a copy."
        )

    def __contains__(self, client_id: str) -> bool:
        return client_id in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._tensors))

    def _drop(self, client_id: str, rounds: Iterable[int]) -> None:
        stored = self._tensors.get(client_id, {})
        for round_index in rounds:
            tensors = stored.pop(round_index)
            self._room.setdefault(_layout(tensors), []).append(tensors)
        if not stored:
            self._tensors.pop(client_id, None)

    def _copy_of(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        room = self._room.get(_layout(tensors))
        if not room:
            # Room of other layouts goes, or it would come on top of what is stored.
            self._room.clear()
            return clone_tensors(tensors)
        copy = room.pop()
        with torch.no_grad():
            for key, tensor in tensors.items():
                copy[key].copy_(tensor)
        return copy


def _layout(tensors: Mapping[str, torch.Tensor]) -> _Layout:
    return frozenset((key, tensor.shape, tensor.dtype) for key, tensor in tensors.items())


_ROUND_FILE = re.compile(r"round-(0|[1-9][0-9]*)\.safetensors")
_BEFORE_FILE = "before.safetensors"


class DiskClientStore:
    """
    Client store in a folder, with one folder per client and one safetensors file per round.

    Several processes may use it at once. A put that is cut off leaves what was there, and at most a temporary file
    that is not read. Files and folders of other names are left alone.

    Args:
        directory (`str` or `Path`):
            Folder of its own for this run. It is made when needed.
    """

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)

    def path(self, client_id: str, round_index: int) -> Path:
        """The file of a client's tensors after a round."""
        name = _BEFORE_FILE if round_index == BEFORE else f"round-{round_index}.safetensors"
        return self.directory / client_id / name

    def put(self, client_id: str, round_index: int, tensors: Mapping[str, torch.Tensor]) -> None:
        _check_round(round_index)
        write_safetensors(self.path(client_id, round_index), tensors)
        self._drop(client_id, _outdated(self.rounds(client_id), round_index))

    def get(self, client_id: str, round_index: int) -> dict[str, torch.Tensor]:
        path = self.path(client_id, round_index)
        try:
            return load_file(path)
        except FileNotFoundError as error:
            raise self.missing(client_id, round_index) from error
        except (SafetensorError, OSError) as error:
            raise ClientStoreError(
                f"The tensors of client {client_id!r} in {path} cannot be read: {error}. Resume from a checkpoint, "
                "which holds a copy."
            ) from error

    def rounds(self, client_id: str) -> list[int]:
        try:
            with os.scandir(self.directory / client_id) as entries:
                names = [entry.name for entry in entries if entry.is_file()]
        except (FileNotFoundError, NotADirectoryError):
            return []
        numbered = sorted(int(match.group(1)) for name in names if (match := _ROUND_FILE.fullmatch(name)))
        return [BEFORE, *numbered] if _BEFORE_FILE in names else numbered

    def keep(self, client_id: str, round_index: int | None) -> None:
        self._drop(client_id, [r for r in self.rounds(client_id) if r != round_index])

    def rename(self, client_id: str, old: int, new: int) -> None:
        _check_round(new)
        try:
            os.replace(self.path(client_id, old), self.path(client_id, new))
        except FileNotFoundError as error:
            raise self.missing(client_id, old) from error

    def forget(self, client_id: str) -> None:
        self.keep(client_id, None)
        try:
            (self.directory / client_id).rmdir()
        except OSError:
            pass  # It holds other files, or another process has removed it, or nothing was stored.

    def clear(self) -> None:
        for client_id in self:
            self.forget(client_id)

    def missing(self, client_id: str, round_index: int) -> ClientStoreError:
        return ClientStoreError(
            f"No tensors are stored for client {client_id!r}: {self.path(client_id, round_index)} is missing. Resume "
            "from a checkpoint, which holds a copy."
        )

    def __contains__(self, client_id: str) -> bool:
        return bool(self.rounds(client_id))

    def __iter__(self) -> Iterator[str]:
        try:
            names = sorted(os.listdir(self.directory))
        except FileNotFoundError:
            return
        # No client id starts with a dot.
        yield from (name for name in names if not name.startswith(".") and name in self)

    def _drop(self, client_id: str, rounds: Iterable[int]) -> None:
        for round_index in rounds:
            self.path(client_id, round_index).unlink(missing_ok=True)


# The stores of a run


class ClientStores:
    """
    What the clients of a run keep: their own part of the adapter, and the state of their optimizers.

    On disk, both are in a folder whose `run.json` says which run they are of, so that no run takes or overwrites the
    clients of another one.

    Args:
        directory (`Path`, *optional*):
            Folder of the stores. In memory if there is none.
        output_dir (`Path`):
            The run's folder.
        client_ids (`Sequence[str]`):
            All clients of the run.
        named_by_user (`bool`):
            Whether the user has named the folder. It may then hold all that is left of a run that has finished.
        is_first (`bool`):
            Whether this process is the first of those that share the folder. It alone claims, fills and begins.
    """

    def __init__(
        self,
        directory: Path | None,
        output_dir: Path,
        client_ids: Sequence[str],
        *,
        named_by_user: bool,
        is_first: bool,
    ):
        self.directory = directory
        self.clients: ClientStore = _make_store(directory, "clients")
        self.optimizers: ClientStore = _make_store(directory, "optimizers")
        self._output_dir = output_dir
        self.client_ids = sorted(client_ids)
        self._named_by_user = named_by_user
        self._is_first = is_first
        self._claimed_as: str | None = None

    # What clients have

    def get(
        self, store: StoreName, client_id: str, round_index: int, where_else: Callable[[], str]
    ) -> dict[str, torch.Tensor]:
        """
        What a client that has trained has left in a store.

        Raises:
            [`ClientStoreError`]: it is missing or damaged, or the stores are those of another run. In the first case
                `where_else` tells in a sentence where a copy is.
        """
        self.check()
        try:
            return self._store(store).get(client_id, round_index)
        except ClientStoreError as error:
            raise ClientStoreError(f"{error} {where_else()}") from error

    def save(
        self, folder: Path, store: StoreName, client_id: str, rounds: Iterable[int], where_else: Callable[[], str]
    ) -> None:
        """Copies rounds of a client to where [`fill`] finds them, in a folder called like the store in `folder`."""
        copies = DiskClientStore(folder / store)
        for round_index in rounds:
            tensors = self.get(store, client_id, round_index, where_else)
            write_safetensors(copies.path(client_id, round_index), tensors)

    def fill(self, folders: Mapping[StoreName, Path]) -> None:
        """Replaces what the stores hold by what folders of checkpoints hold, or by nothing where none is given."""
        if not self._changes_stores():
            return
        for name in ("clients", "optimizers"):
            store = self._store(name)
            store.clear()
            if name not in folders:
                continue
            copies = DiskClientStore(folders[name])
            for client_id in copies:
                for round_index in copies.rounds(client_id):
                    store.put(client_id, round_index, copies.get(client_id, round_index))

    def begin_run(self, clients: Mapping[str, int], optimizers: Mapping[str, int]) -> None:
        """
        Makes what the trainer's last run has left that from before the run, and drops the rest.

        Args:
            clients (`Mapping[str, int]`), optimizers (`Mapping[str, int]`):
                Per client, the round that counted last. A client that is not named has nothing from before.

        Raises:
            [`ClientStoreError`]: tensors of such a round are missing. Nothing is changed then.
        """
        if not self._changes_stores():
            return
        effective = ((self.clients, clients), (self.optimizers, optimizers))
        for store, counted in effective:
            for client_id, round_index in counted.items():
                if round_index not in store.rounds(client_id):
                    raise store.missing(client_id, round_index)
        for store, counted in effective:
            for client_id, round_index in counted.items():
                store.rename(client_id, round_index, BEFORE)
            for client_id in list(store):
                store.keep(client_id, BEFORE if client_id in counted else None)

    def _store(self, name: StoreName) -> ClientStore:
        return {"clients": self.clients, "optimizers": self.optimizers}[name]

    def _changes_stores(self) -> bool:
        """Whether this process does what is done once for all of them."""
        return self.directory is None or self._is_first

    # Whose they are

    def claim(self, run_id: str, resuming: bool, nothing_to_resume: Callable[[], bool]) -> None:
        """
        Makes the stores this run's, unless they hold clients of another one on disk.

        Args:
            run_id (`str`):
                Names the run.
            resuming (`bool`):
                Whether it goes on from a checkpoint. The clients of the run that wrote it may then be replaced.
            nothing_to_resume (`Callable[[], bool]`):
                Whether the run's folder holds no whole checkpoint. What a run has left that died before its first one
                may be overwritten by one that starts anew in its place.

        Raises:
            `ValueError`: the stores hold clients of another run.
            [`ClientStoreError`]: another run has used them since this trainer's last one, and this one does not
                resume.
        """
        if self.directory is None or not self._is_first:
            return
        directory, output_dir = self.directory.resolve(), self._output_dir.resolve()
        # A store inside of the run's folder is moved with it.
        known_as = os.path.relpath(output_dir, directory) if directory.is_relative_to(output_dir) else str(output_dir)
        if not resuming:
            self.check()
        owner = self._owner()
        ours = self._claimed_as is not None and owner.get("run_id") == self._claimed_as
        if not ours and (any(self.clients) or any(self.optimizers)):
            same_place = owner.get("output_dir") in (known_as, str(output_dir))
            same_clients = owner.get("client_ids") == self.client_ids
            same_name = resuming and owner.get("run_id") == run_id
            # It may have moved, or clients may have come or gone since the checkpoint.
            same_run = same_place + same_clients + same_name >= 2
            # One that has finished may have left them nowhere else, in a folder that the user has named.
            is_all_there_is = bool(owner.get("finished")) and self._named_by_user
            if not (same_run and (resuming or (not is_all_there_is and nothing_to_resume()))):
                raise ValueError(
                    f"`client_store_dir={str(self.directory)!r}` holds the clients of another run, which this one "
                    "would overwrite. Resume that run from a checkpoint, or pass another directory."
                )
        write_json(self._run_file, {"output_dir": known_as, "client_ids": self.client_ids, "run_id": run_id})
        self._claimed_as = run_id

    def refuse_claimed(self) -> None:
        """
        Refuses stores of clients of a run, for clients that take part in a federation elsewhere.

        Raises:
            `ValueError`: a run has claimed them.
        """
        if self.directory is not None and self._owner() and (any(self.clients) or any(self.optimizers)):
            raise ValueError(
                f"`client_store_dir={str(self.directory)!r}` holds the clients of a run that has its server in it, "
                "which clients of a server elsewhere would overwrite. Pass another directory, or leave it out."
            )

    def check(self) -> None:
        """Raises [`ClientStoreError`] if stores on disk are no longer those of this trainer's last run."""
        if self._claimed_as is not None and self._owner().get("run_id") != self._claimed_as:
            raise ClientStoreError(
                f"{self.directory} is gone, or another run has used it since this trainer's last one, so its clients "
                "are not those to go on with. Resume from a checkpoint, or make a new trainer."
            )

    def take_over(self, client_ids: Sequence[str]) -> None:
        """Clients have come or gone: those of a run that holds the stores are these now."""
        self.client_ids = sorted(client_ids)
        if self._claimed_as is not None and (owner := self._owner()).get("run_id") == self._claimed_as:
            write_json(self._run_file, {**owner, "client_ids": self.client_ids})

    def mark_finished(self) -> None:
        """Notes beside stores on disk that the run has finished. Those of another run are left as they are."""
        if self._claimed_as is not None and (owner := self._owner()).get("run_id") == self._claimed_as:
            write_json(self._run_file, {**owner, "finished": True})

    @property
    def _run_file(self) -> Path:
        return self.directory / "run.json"

    def _owner(self) -> dict[str, Any]:
        """What is known of the run whose clients are in the stores on disk."""
        try:
            owner = json.loads(self._run_file.read_text(encoding="utf-8")) if self._run_file.is_file() else {}
        except ValueError:
            owner = {}
        return owner if isinstance(owner, dict) else {}


def _make_store(directory: Path | None, name: StoreName) -> ClientStore:
    return MemoryClientStore() if directory is None else DiskClientStore(directory / name)
