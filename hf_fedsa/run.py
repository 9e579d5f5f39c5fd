"""Where a trainer's own run stands: begun, resumed, at rest."""

import contextlib
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .checkpoint_folder import CheckpointError, newest_whole_checkpoint, read_state
from .files import write_json
from .processes import first_process_first
from .run_lock import RunLock

logger = logging.getLogger(__name__)

# Names the run that has begun last in `output_dir`, whose checkpoints are those to resume.
_LAST_RUN = "last_run.json"

# Arguments with which the optimizer is of another kind.
_OPTIMIZER_KIND = {"optim", "optim_args", "optim_target_modules", "optimizer_cls_and_kwargs"}


@dataclass
class Run:
    """
    What a trainer knows of its run, beside what the server and the clients know.

    Args:
        base (`dict`):
            What the base model was when it came here.
        begun (`bool`, *optional*), has_run (`bool`, *optional*):
            Whether the present `train()` has begun, and whether any has.
        at_rest (`bool`, *optional*):
            Whether slot 0 holds the first client's adapter, for users to read and to write.
        resuming (`bool`, *optional*):
            Whether a checkpoint has been loaded and the run has not begun yet.
        changes (`frozenset[str]`, *optional*):
            What differs from the run that was saved, and is meant to.
        steps_back (`int`, *optional*):
            Steps of the checkpoint that are taken again.
        ends_round_first (`bool`, *optional*):
            Whether the round was saved after its last step, so that its end is still to come.
        replaced_by (`Path`, *optional*):
            A checkpoint whose clients took the place of this trainer's own, for a run that then failed.
        lock ([`RunLock`], *optional*):
            Keeps others out of the run's folders.
    """

    base: dict[str, Any]
    begun: bool = False
    has_run: bool = False
    at_rest: bool = True
    resuming: bool = False
    changes: frozenset[str] = frozenset()
    steps_back: int = 0
    ends_round_first: bool = False
    replaced_by: Path | None = None
    lock: RunLock = field(default_factory=lambda: RunLock({}))

    def prepare(self) -> None:
        """`train()` was called."""
        self.begun = self.resuming = self.ends_round_first = False
        self.changes, self.steps_back = frozenset(), 0

    def begin(self) -> None:
        """Training begins."""
        self.resuming = self.ends_round_first = self.at_rest = False
        self.begun = self.has_run = True

    def refuse_lost_clients(self) -> None:
        """
        Refuses to begin with clients of another run.

        Raises:
            `RuntimeError`: a run that failed has left those of a checkpoint.
        """
        if not self.resuming and self.replaced_by is not None:
            raise RuntimeError(
                f"A run that was to go on from {self.replaced_by} has failed after it had put the clients of that "
                "checkpoint in the place of this trainer's own. Resume from a checkpoint, or make a new trainer."
            )
        self.replaced_by = None

    @contextlib.contextmanager
    def alone_in(self, folders: Mapping[str, Path], is_first: bool) -> Iterator[None]:
        """Within this context no other run can begin in these folders. Of several processes, the first locks them."""
        lock = RunLock(folders)
        try:
            with first_process_first(is_first):
                if is_first:
                    lock.acquire()
            self.lock = lock
            yield
        finally:
            lock.release()

    @property
    def changes_optimizer(self) -> bool:
        """Whether the optimizer is of another kind than that of the run that was saved."""
        return bool(self.changes & _OPTIMIZER_KIND)


def note_last_run(output_dir: Path, run_id: str) -> None:
    """Notes which run has begun last in a folder."""
    write_json(output_dir / _LAST_RUN, {"run_id": run_id})


def _last_run(output_dir: Path) -> str | None:
    path = output_dir / _LAST_RUN
    try:
        return json.loads(path.read_text(encoding="utf-8"))["run_id"] if path.is_file() else None
    except (ValueError, KeyError, TypeError):
        return None


def checkpoint_to_resume(output_dir: Path, given: str | bool | None) -> str | bool | None:
    """
    The checkpoint to go on from.

    Args:
        output_dir (`Path`):
            The run's folder.
        given (`str` or `bool`, *optional*):
            `resume_from_checkpoint`.

    Raises:
        [`CheckpointError`]: there is none.
    """
    if given is True:
        last_run = _last_run(output_dir)
        newest = newest_whole_checkpoint(
            output_dir,
            warn=logger.warning,
            accept=lambda path: last_run in (None, read_state(path)["server"]["run_id"]),
        )
        older = newest_whole_checkpoint(output_dir, warn=logger.debug)
        if newest is None and older is not None:
            raise CheckpointError(
                f"`resume_from_checkpoint=True`, but the run that began last in {output_dir} has left no whole "
                f"checkpoint there. {older} is of an earlier run: pass that path to go on from it, or call "
                "`train()` without it to start from the beginning."
            )
        if newest is None:
            raise CheckpointError(
                f"`resume_from_checkpoint=True`, but {output_dir} holds no whole checkpoint. Call "
                "`train()` without it to start from the beginning."
            )
        return str(newest)
    if given and not Path(given).is_dir():
        raise CheckpointError(
            f"`resume_from_checkpoint={str(given)!r}` is no folder. Pass a `checkpoint-...` "
            "folder of `output_dir`, or `True` for the newest one there."
        )
    return given
