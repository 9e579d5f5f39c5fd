"""What survives a round: the run's state and the tensors of the clients that are not training."""

import json
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from .parameters import clone_tensors

_CLIENT_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")


def validate_client_ids(client_ids: Iterable[str]) -> None:
    """
    Checks that ids can name folders, on this machine and on the Hub.

    Raises:
        `TypeError`: an id is not a string.
        `ValueError`: an id has other characters than allowed, or two ids differ in case only.
    """
    folded: dict[str, str] = {}
    for client_id in client_ids:
        if not isinstance(client_id, str):
            raise TypeError(
                f"Client ids must be strings, got {client_id!r} of type {type(client_id).__name__}. Pass "
                f"`str({client_id!r})`."
            )
        if not _CLIENT_ID.fullmatch(client_id):
            raise ValueError(
                f"The client id {client_id!r} cannot name a folder. Use up to 96 letters, digits, dots, underscores "
                "and hyphens, and start with a letter or digit."
            )
        other = folded.setdefault(client_id.casefold(), client_id)
        if other != client_id:
            raise ValueError(
                f"The client ids {other!r} and {client_id!r} differ in case only, and would share a folder on some "
                "file systems. Rename one."
            )


# Files. Everything is written under a temporary name and renamed, so a reader sees the old file or the new one.


def _replace_atomically(path: Path, write: Callable[[str], None]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        if isinstance(error, (OSError, SafetensorError)):
            raise OSError(f"{path} could not be written, and is as it was: {error}. Is the disk full?") from error
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_safetensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Writes tensors to `path`, whole or not at all."""
    contiguous = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    _replace_atomically(path, lambda name: save_file(contiguous, name, metadata={"format": "pt"}))


def write_text(path: Path, text: str) -> None:
    """Writes text to `path`, whole or not at all."""
    _replace_atomically(path, lambda name: Path(name).write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Writes JSON to `path`, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True) + "\n")


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    digest = sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# Client stores


class ClientStoreError(RuntimeError):
    """A client's stored tensors are missing or cannot be read."""


class ClientStore(Protocol):
    """
    Keeps the tensors of clients that are not training. What was put is returned bit for bit, as a copy.
    """

    def put(self, client_id: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Stores a copy of a client's tensors in place of earlier ones."""

    def get(self, client_id: str) -> dict[str, torch.Tensor]:
        """Returns a copy of a client's tensors. Raises [`ClientStoreError`] if there are none or they are damaged."""

    def clear(self) -> None:
        """Forgets all clients."""

    def __contains__(self, client_id: str) -> bool: ...

    def __iter__(self) -> Iterator[str]:
        """Ids of the stored clients, sorted."""


class MemoryClientStore:
    """Client store in the process's memory."""

    def __init__(self):
        self._tensors: dict[str, dict[str, torch.Tensor]] = {}

    def put(self, client_id: str, tensors: Mapping[str, torch.Tensor]) -> None:
        stored = self._tensors.get(client_id, {})
        if client_id not in self._tensors or _layout(stored) != _layout(tensors):
            self._tensors[client_id] = clone_tensors(tensors)
            return
        # In place: making room anew for every client and round would fragment the memory.
        with torch.no_grad():
            for key, tensor in tensors.items():
                stored[key].copy_(tensor)

    def get(self, client_id: str) -> dict[str, torch.Tensor]:
        if client_id not in self._tensors:
            raise ClientStoreError(f"No tensors are stored for client {client_id!r}.")
        return clone_tensors(self._tensors[client_id])

    def clear(self) -> None:
        self._tensors.clear()

    def __contains__(self, client_id: str) -> bool:
        return client_id in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._tensors))


def _layout(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple]:
    return {key: (tensor.shape, tensor.dtype) for key, tensor in tensors.items()}


class DiskClientStore:
    """
    Client store in a folder, one safetensors file per client.

    Args:
        directory (`str` or `Path`):
            Folder of its own for this run. It is made when needed.
    """

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)

    def _path(self, client_id: str) -> Path:
        return self.directory / f"{client_id}.safetensors"

    def put(self, client_id: str, tensors: Mapping[str, torch.Tensor]) -> None:
        write_safetensors(self._path(client_id), tensors)

    def get(self, client_id: str) -> dict[str, torch.Tensor]:
        try:
            return load_file(self._path(client_id))
        except FileNotFoundError as error:
            raise ClientStoreError(
                f"No tensors are stored for client {client_id!r}: {self._path(client_id)} is missing. Resume from a "
                "checkpoint, which holds a copy."
            ) from error
        except (SafetensorError, OSError) as error:
            raise ClientStoreError(
                f"The tensors of client {client_id!r} in {self._path(client_id)} cannot be read: {error}. Resume from "
                "a checkpoint, which holds a copy."
            ) from error

    def clear(self) -> None:
        for client_id in list(self):
            self._path(client_id).unlink()

    def __contains__(self, client_id: str) -> bool:
        return self._path(client_id).is_file()

    def __iter__(self) -> Iterator[str]:
        # A file that was being written when the process died starts with a dot, as no client id does.
        paths = self.directory.glob("[!.]*.safetensors")
        return iter(sorted(path.name.removesuffix(".safetensors") for path in paths))


# Run state


@dataclass
class RunState:
    """
    Where a run stands.

    Args:
        rounds_done (`int`, *optional*, defaults to `0`):
            Rounds whose A has been averaged. It is also the index of the round that is open or comes next.
        round_open (`bool`, *optional*, defaults to `False`):
            Whether a client of that round has begun to train.
        waves_done (`int`, *optional*, defaults to `0`):
            Waves of the open round whose clients are back in the store.
        wave_open (`bool`, *optional*, defaults to `False`):
            Whether clients are in the slots.
        wave_steps (`int`, *optional*, defaults to `0`):
            Steps taken in the open wave.
        mean_weight (`float`, *optional*, defaults to `0.0`):
            Weight behind the running mean of the open round.
        losses (`dict[str, list[float]]`, *optional*):
            Per client of the open round: sum of the losses of its local steps, and their number.
        weights (`dict[str, float]`, *optional*):
            Weight of each client of the open round that has returned its tensors.
        left_out (`dict[str, str]`, *optional*):
            Clients of the open round whose update does not count, and why.
        changes (`dict[str, list[float]]`, *optional*):
            Per client of the open round whose update is finite: the norm of its change of A, and its local steps.
        staleness (`dict[str, int | None]`, *optional*):
            Per client of the open round, the rounds since it had last trained. `None` if it never had.
        bytes_down (`int`, *optional*, defaults to `0`):
            Bytes sent to the clients of the open round.
        bytes_up (`int`, *optional*, defaults to `0`):
            Bytes received from them.
        seconds (`float`, *optional*, defaults to `0.0`):
            Wall time spent in the open round before the last restart.
        last_round (`dict[str, int]`, *optional*):
            Per client, the last round it trained in.
        stored_before (`list[str]`, *optional*):
            Clients whose tensors are in the store since before this run: they have trained in an earlier one.
        with_optimizer (`list[str]`, *optional*):
            Clients whose optimizer state is in the store.
        history (`list[dict]`, *optional*):
            One entry per finished round.
        results (`dict[str, dict[str, float]]`, *optional*):
            Per client, the metrics of its last evaluation.
        results_after_round (`int`, *optional*):
            Rounds done when that was.
        run_id (`str`, *optional*):
            Names the run, wherever its folders are moved to.
    """

    rounds_done: int = 0
    round_open: bool = False
    waves_done: int = 0
    wave_open: bool = False
    wave_steps: int = 0
    mean_weight: float = 0.0
    losses: dict[str, list[float]] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    changes: dict[str, list[float]] = field(default_factory=dict)
    staleness: dict[str, int | None] = field(default_factory=dict)
    bytes_down: int = 0
    bytes_up: int = 0
    seconds: float = 0.0
    last_round: dict[str, int] = field(default_factory=dict)
    stored_before: list[str] = field(default_factory=list)
    with_optimizer: list[str] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)
    results: dict[str, dict[str, float]] = field(default_factory=dict)
    results_after_round: int = 0
    run_id: str = ""

    def after_round(self) -> "RunState":
        """The state in which the next round begins, or this one anew if no client has returned anything."""
        return RunState(
            rounds_done=len(self.history),
            last_round=self.last_round,
            stored_before=self.stored_before,
            with_optimizer=self.with_optimizer,
            history=self.history,
            results=self.results,
            results_after_round=self.results_after_round,
            run_id=self.run_id,
        )

    def before_wave(self, client_ids: Sequence[str], bytes_down: int) -> "RunState":
        """The state before the clients of the open wave took their first step. `bytes_down` were sent to them."""
        return replace(
            self,
            wave_open=False,
            wave_steps=0,
            losses={client_id: loss for client_id, loss in self.losses.items() if client_id not in client_ids},
            left_out={client_id: fault for client_id, fault in self.left_out.items() if client_id not in client_ids},
            bytes_down=self.bytes_down - bytes_down,
        )

    def for_next_run(self, run_id: str) -> "RunState":
        """The state in which another run begins with what this one has left in the store."""
        stored = sorted({*self.stored_before, *self.last_round})
        return RunState(run_id=run_id, stored_before=stored, with_optimizer=self.with_optimizer)

    def has_stored(self, client_id: str) -> bool:
        """Whether a client's tensors must be in the store."""
        return client_id in self.last_round or client_id in self.stored_before

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


# Checkpoints

STATE_FOLDER = "federation_state"
_MANIFEST = "manifest.json"
# Added to the name of a checkpoint while another one of its step is written in its place.
REPLACED = ".replaced"
CHECKPOINT_FOLDER = rf"checkpoint-(\d+)({re.escape(REPLACED)})?"


class CheckpointError(ValueError):
    """A checkpoint is damaged, or belongs to another federation."""


def write_manifest(checkpoint: Path) -> None:
    """Lists every file of a checkpoint with its size and SHA-256. Written last, it marks the checkpoint as whole."""
    manifest = checkpoint / STATE_FOLDER / _MANIFEST
    paths = [path for path in sorted(checkpoint.rglob("*")) if path.is_file() and path != manifest]
    files = {
        path.relative_to(checkpoint).as_posix(): {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
        for path in paths
    }
    write_json(manifest, files)


def has_manifest(checkpoint: Path) -> bool:
    """Whether the writing of a checkpoint was finished."""
    return (checkpoint / STATE_FOLDER / _MANIFEST).is_file()


def check_manifest(checkpoint: Path) -> None:
    """
    Checks that a checkpoint is whole.

    Raises:
        [`CheckpointError`]: a file is missing or differs, or the checkpoint was never finished.
    """
    manifest = checkpoint / STATE_FOLDER / _MANIFEST
    if not manifest.is_file():
        raise CheckpointError(
            f"{checkpoint} is not a finished checkpoint of a federated run: {STATE_FOLDER}/{_MANIFEST} is missing. "
            "Resume from an earlier checkpoint."
        )
    try:
        files = json.loads(manifest.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(
            f"{checkpoint} is damaged: {STATE_FOLDER}/{_MANIFEST} cannot be read ({error}). Resume from an earlier "
            "checkpoint."
        ) from error
    well_formed = isinstance(files, dict) and all(
        isinstance(entry, dict) and {"bytes", "sha256"} <= entry.keys() for entry in files.values()
    )
    if not well_formed:
        raise CheckpointError(
            f"{checkpoint} is damaged: {STATE_FOLDER}/{_MANIFEST} does not list files. Resume from an earlier "
            "checkpoint."
        )
    for name, expected in files.items():
        path = checkpoint / name
        if not path.is_file():
            raise CheckpointError(f"{checkpoint} is damaged: {name} is missing. Resume from an earlier checkpoint.")
        if path.stat().st_size != expected["bytes"] or file_sha256(path) != expected["sha256"]:
            raise CheckpointError(
                f"{checkpoint} is damaged: {name} is not the file that was written ({path.stat().st_size} bytes, "
                f"{expected['bytes']} expected). Resume from an earlier checkpoint."
            )


def check_same_federation(saved: Mapping[str, Any], current: Mapping[str, Any], checkpoint: Path) -> None:
    """
    Checks that a checkpoint was written by a run with the same clients, adapter and base model.

    Raises:
        [`CheckpointError`]: they differ. The message names the first difference.
    """
    for key, value in current.items():
        if saved.get(key) != value:
            before, now = saved.get(key), value
            if isinstance(before, Mapping) and isinstance(now, Mapping):
                # The one entry that differs, of the many there may be.
                entry = next(name for name in [*before, *now] if before.get(name) != now.get(name))
                key, before, now = f"{key}.{entry}", before.get(entry), now.get(entry)
            raise CheckpointError(
                f"{checkpoint} was written by another federation: its `{key}` is {brief(before)}, this run's is "
                f"{brief(now)}. Resume with the arguments of that run, or start anew in another `output_dir`."
            )


def brief(value: Any) -> str:
    """A value in a message."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def read_state(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint says of its run, see [`RunState`] and `hf_fedsa.identity`."""
    return json.loads((checkpoint / STATE_FOLDER / "state.json").read_text(encoding="utf-8"))


def checkpoint_with_copy(output_dir: Path, store: str, client_id: str) -> Path | None:
    """Finds the newest whole checkpoint, if it has a copy of what a client has in a store of this name."""
    checkpoint = newest_whole_checkpoint(output_dir, warn=lambda _: None)
    if checkpoint is None or not (checkpoint / STATE_FOLDER / store / f"{client_id}.safetensors").is_file():
        return None
    return checkpoint


def newest_whole_checkpoint(
    output_dir: Path, warn: Callable[[str], None], accept: Callable[[Path], bool] = lambda checkpoint: True
) -> Path | None:
    """
    Finds the checkpoint with the highest step that is whole, calling `warn` for each newer one passed over. Those that
    `accept` does not accept are no candidates.
    """
    numbered = [
        (int(match.group(1)), match.group(2) is None, path)
        for path in (output_dir.iterdir() if output_dir.is_dir() else ())
        if path.is_dir() and (match := re.fullmatch(CHECKPOINT_FOLDER, path.name))
    ]
    for _, _, path in sorted(numbered, reverse=True):
        try:
            check_manifest(path)
        except CheckpointError as error:
            warn(f"Passing over {path}: {error}")
        else:
            if accept(path):
                return path
    return None
