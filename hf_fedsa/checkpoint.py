"""Checkpoints of a run: the folder one is written to, which ones are deleted, and which run may go on from one."""

import json
import logging
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from .client.waves import Wave
from .files import file_sha256, write_json
from .identity import FIXED, SCHEDULES_BY_METRIC, check_names_of_changes, find_changes

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
