"""Folders of checkpoints: which are whole, which one to go on from, and which are deleted."""

import contextlib
import json
import logging
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from .client.store import ClientStoreError
from .files import file_sha256, write_json

logger = logging.getLogger(__name__)

STATE_FOLDER = "federation_state"
# Of what is in it.
FORMAT = 2

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


def read_state(checkpoint: Path) -> dict[str, Any]:
    """
    What a checkpoint says of its run, see [`hf_fedsa.checkpoint.save_run`].

    Raises:
        [`CheckpointError`]: it was written by another version of this package.
    """
    state = json.loads((checkpoint / STATE_FOLDER / "state.json").read_text(encoding="utf-8"))
    if (found := state.get("format", 1)) != FORMAT:
        raise CheckpointError(
            f"{checkpoint} was written by another version of hf_fedsa: its format is {found}, this version's is "
            f"{FORMAT}. Go on with the version that wrote it, or start anew in another `output_dir`."
        )
    return state


def checkpoint_with_copy(output_dir: Path, store: str, client_id: str) -> Path | None:
    """Finds the newest whole checkpoint, if it has a copy of what a client has in a store of this name."""
    checkpoint = newest_whole_checkpoint(output_dir, warn=lambda _: None)
    if checkpoint is None or not any((checkpoint / STATE_FOLDER / store / client_id).glob("*.safetensors")):
        return None
    return checkpoint


def where_else(output_dir: Path, store: str, client_id: str) -> str:
    """Says where a copy is of what a client has lost in a store of this name."""
    checkpoint = checkpoint_with_copy(output_dir, store, client_id)
    return f"{checkpoint or 'But no whole checkpoint'} {'is whole and ' if checkpoint else ''}has one."


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


def make_room(checkpoint: Path) -> None:
    """
    Clears the place of a checkpoint that is about to be written, so that it will hold what is written now alone.

    A finished one that is there already is kept under another name, under which it is found, until
    [`remove_replaced`] says that the new one is whole.
    """
    if not checkpoint.is_dir():
        return
    if not has_manifest(checkpoint):
        shutil.rmtree(checkpoint)
        return
    shutil.rmtree(_replaced(checkpoint), ignore_errors=True)
    checkpoint.rename(_replaced(checkpoint))


def remove_replaced(checkpoint: Path) -> None:
    """Deletes what a checkpoint has taken the place of."""
    shutil.rmtree(_replaced(checkpoint), ignore_errors=True)


def restore_replaced(checkpoint: Path) -> None:
    """Deletes a checkpoint that could not be finished, and puts what it was to replace back in its place."""
    if has_manifest(checkpoint):
        return  # There was not even room made for the new one.
    shutil.rmtree(checkpoint, ignore_errors=True)
    if _replaced(checkpoint).is_dir():
        _replaced(checkpoint).rename(checkpoint)


def _replaced(checkpoint: Path) -> Path:
    return checkpoint.with_name(checkpoint.name + REPLACED)


@contextlib.contextmanager
def writing_checkpoint(checkpoint: Path, here: bool, to_resume: bool) -> Iterator[None]:
    """
    Within this context a checkpoint is written. It is whole afterwards, or not there.

    Args:
        checkpoint (`Path`):
            Its folder.
        here (`bool`):
            Whether it is this process that writes.
        to_resume (`bool`):
            Whether it is written to go on from.

    Raises:
        `OSError`: it could not be written. What it was to replace is back in its place.
    """
    try:
        if here:
            make_room(checkpoint)
        yield
        if here and to_resume:
            write_manifest(checkpoint)
    except (OSError, RuntimeError, SafetensorError) as error:  # As torch and safetensors report a full disk.
        restore_replaced(checkpoint)
        if isinstance(error, ClientStoreError):
            raise  # It says itself what to do, and no disk is full.
        kept = newest_whole_checkpoint(checkpoint.parent, warn=logger.warning)
        raise OSError(
            f"{checkpoint} could not be written: {error}. What there was of it has been removed, and "
            f"{kept or 'no earlier checkpoint'} is whole. If the disk is full, make room (`save_total_limit` "
            "keeps fewer checkpoints), and go on with `train(resume_from_checkpoint=True)`."
        ) from error
    if here:
        remove_replaced(checkpoint)


def delete_older_checkpoints(newest: Path, limit: int | None, best: str | None = None) -> None:
    """
    Deletes checkpoints beside the one that was just written until `limit` are left. That one and the
    best one always stay.

    What counts is the number of steps and not the time of writing, since clocks may be set back. Steps beyond those of
    the newest checkpoint are not of this run's past but of another run in the folder, and are the first to go.

    Args:
        newest (`Path`):
            The checkpoint that was just written.
        limit (`int`, *optional*):
            How many to keep. `None` or 0 keeps all.
        best (`str`, *optional*):
            The checkpoint with the best metric, where that counts.
    """
    if limit is None or limit <= 0:
        return
    steps = {
        path: int(match.group(1))
        for path in newest.parent.iterdir()
        if path.is_dir() and (match := re.fullmatch(CHECKPOINT_FOLDER, path.name))
    }
    stay = {newest, Path(best)} if best is not None else {newest}
    others = sorted(steps.keys() - stay, key=lambda path: (steps[path] <= steps[newest], steps[path], path.name))
    for path in others[: max(0, len(steps) - limit)]:
        shutil.rmtree(path, ignore_errors=True)
