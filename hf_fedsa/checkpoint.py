"""Checkpoints of a run: the folder one is written to, and which ones are deleted."""

import re
import shutil
from pathlib import Path

from .state import CHECKPOINT_FOLDER, REPLACED, has_manifest


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
    shutil.rmtree(checkpoint, ignore_errors=True)
    if _replaced(checkpoint).is_dir():
        _replaced(checkpoint).rename(checkpoint)


def _replaced(checkpoint: Path) -> Path:
    return checkpoint.with_name(checkpoint.name + REPLACED)


def delete_older_checkpoints(newest: Path, limit: int | None) -> None:
    """
    Deletes checkpoints beside the one that was just written until `limit` are left. That one always stays.

    What counts is the number of steps and not the time of writing, since clocks may be set back. Steps beyond those of
    the newest checkpoint are not of this run's past but of another run in the folder, and are the first to go.

    Args:
        newest (`Path`):
            The checkpoint that was just written.
        limit (`int`, *optional*):
            How many to keep. `None` or 0 keeps all.
    """
    if limit is None or limit <= 0:
        return
    steps = {
        path: int(match.group(1))
        for path in newest.parent.iterdir()
        if path.is_dir() and (match := re.fullmatch(CHECKPOINT_FOLDER, path.name))
    }
    others = sorted(steps.keys() - {newest}, key=lambda path: (steps[path] <= steps[newest], steps[path], path.name))
    for path in others[: max(0, len(steps) - limit)]:
        shutil.rmtree(path, ignore_errors=True)
