"""Checkpoints of a run: the folder one is written to, which ones are deleted, and which run may go on from one."""

import json
import logging
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .identity import FIXED, SCHEDULES_BY_METRIC, check_names_of_changes, find_changes
from .sampling import Wave
from .state import (
    CHECKPOINT_FOLDER,
    REPLACED,
    CheckpointError,
    brief,
    check_same_federation,
    has_manifest,
    newest_whole_checkpoint,
    read_state,
)

logger = logging.getLogger(__name__)

# Differences that a message names with both values.
_MOST_SHOWN = 3


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


# Resuming


@dataclass(frozen=True)
class Resumption:
    """
    How a run goes on from a checkpoint. Without arguments, a run that begins.

    Args:
        changes (`frozenset[str]`, *optional*):
            What differs from the run that was saved, and is meant to.
        trained (`tuple[Wave, ...]`, *optional*):
            Waves of the open round that have trained, and the one that goes on in the middle.
        steps_back (`int`, *optional*, defaults to `0`):
            Steps of the checkpoint that are taken again.
        scheduled_before (`int`, *optional*, defaults to `0`):
            Length of the rounds done on the learning rate schedule, as planned when they were trained.
    """

    changes: frozenset[str] = frozenset()
    trained: tuple[Wave, ...] = ()
    steps_back: int = 0
    scheduled_before: int = 0


def check_changes(
    checkpoint: Path,
    identity: Mapping[str, Any],
    meant: Sequence[str],
    defaults: Mapping[str, Any],
) -> frozenset[str]:
    """
    Checks that a run may go on from a checkpoint: that it is the run that was saved, or differs as it is meant to.

    Args:
        checkpoint (`Path`):
            The checkpoint.
        identity (`Mapping[str, Any]`):
            What the run's results depend on.
        meant (`Sequence[str]`):
            Names of what may differ.
        defaults (`Mapping[str, Any]`):
            Values of what the saved run did not know yet.

    Returns:
        `frozenset[str]`: what does differ.

    Raises:
        [`CheckpointError`]: it is another run. The message names the differences.
        `ValueError`: `meant` names what cannot change.
    """
    identity = json.loads(json.dumps(identity))
    known = {*identity["arguments"], *identity["adapter"], *defaults}
    check_names_of_changes(meant, known=known)
    saved = read_state(checkpoint)["identity"]
    check_same_federation(saved, {key: identity[key] for key in FIXED if key in identity}, checkpoint)
    changes = find_changes(saved, identity, defaults)
    for change in changes:
        if change.name == "lr_scheduler_type" and {change.before, change.now} & set(SCHEDULES_BY_METRIC):
            raise CheckpointError(
                f"{checkpoint} was written by another federation: its `lr_scheduler_type` is {change.before!r}, this "
                f"run's is {change.now!r}. One follows evaluations, so it has no place on the other. Start anew."
            )
    missed = [change for change in changes if change.name not in meant]
    if missed:
        shown = "; ".join(
            f"its `{c.shown}` is {brief(c.before)}, this run's is {brief(c.now)}" for c in missed[:_MOST_SHOWN]
        )
        more = f"; and {len(missed) - _MOST_SHOWN} more" if len(missed) > _MOST_SHOWN else ""
        own = _newest_beside(checkpoint, lambda state: not find_changes(state["identity"], identity, defaults))
        names = sorted({*meant, *(change.name for change in missed)})
        raise CheckpointError(
            f"{checkpoint} was written by another federation: {shown}{more}. Resume with the arguments of that run, "
            f"or start anew in another `output_dir`. If the change is meant, set `resume_with_changes={names}`."
            + (f" {own} is of this run." if own else "")
        )
    return frozenset(change.name for change in changes)


def check_position(
    checkpoint: Path, state: Mapping[str, Any], changes: frozenset[str], num_rounds: int, num_processes: int
) -> None:
    """
    Checks that a run may go on from where a checkpoint stands in its rounds.

    Raises:
        [`CheckpointError`]: it may not. The message says from where it may.
    """
    progress = state["progress"]
    reached = progress["rounds_done"] + progress["round_open"]
    if num_rounds < reached:
        raise CheckpointError(
            f"`num_rounds={num_rounds}`, but {checkpoint} stands {'in' if progress['round_open'] else 'after'} round "
            f"{reached}. Set `num_rounds` to at least {reached}, or resume from an earlier checkpoint."
        )
    if not progress["round_open"]:
        return
    if state["num_processes"] != num_processes:
        what = f"was saved by another number of processes ({state['num_processes']}) than resumes it ({num_processes})"
    elif changes:
        what = f"is resumed with another {', '.join(f'`{name}`' for name in sorted(changes))}"
    else:
        return
    whole = _newest_beside(checkpoint, lambda other: not other["progress"]["round_open"])
    raise CheckpointError(
        f"{checkpoint} {what}, in the middle of a round, all of which trains alike. Resume from a checkpoint of a "
        f"round's end, {f'such as {whole}' if whole else 'of which there is none beside it'}."
    )


def _newest_beside(checkpoint: Path, accept: Callable[[dict[str, Any]], bool]) -> Path | None:
    return newest_whole_checkpoint(checkpoint.parent, warn=logger.debug, accept=lambda path: accept(read_state(path)))
