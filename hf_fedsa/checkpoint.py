"""Everything that a run needs to go on bit for bit."""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from .checkpoint_folder import (
    FORMAT,
    STATE_FOLDER,
    CheckpointError,
    check_manifest,
    newest_whole_checkpoint,
    read_state,
)
from .client.local_optimizer import SCHEDULES_BY_METRIC
from .client.runtime import ClientRuntime
from .client.state import ClientState
from .client.waves import Wave
from .evaluation import EvaluationResults
from .files import write_json, write_safetensors
from .identity import FIXED, check_names_of_changes, find_changes
from .server.server import Server


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


logger = logging.getLogger(__name__)

# Differences that a message names with both values.
_MOST_SHOWN = 3


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
    round_open = state["client"]["round_open"]
    reached = len(state["server"]["history"]) + round_open
    if num_rounds < reached:
        raise CheckpointError(
            f"`num_rounds={num_rounds}`, but {checkpoint} stands {'in' if round_open else 'after'} round "
            f"{reached}. Set `num_rounds` to at least {reached}, or resume from an earlier checkpoint."
        )
    if not round_open:
        return
    if state["num_processes"] != num_processes:
        what = f"was saved by another number of processes ({state['num_processes']}) than resumes it ({num_processes})"
    elif changes:
        what = f"is resumed with another {', '.join(f'`{name}`' for name in sorted(changes))}"
    else:
        return
    whole = _newest_beside(checkpoint, lambda other: not other["client"]["round_open"])
    raise CheckpointError(
        f"{checkpoint} {what}, in the middle of a round, all of which trains alike. Resume from a checkpoint of a "
        f"round's end, {f'such as {whole}' if whole else 'of which there is none beside it'}."
    )


def _newest_beside(checkpoint: Path, accept: Callable[[dict[str, Any]], bool]) -> Path | None:
    return newest_whole_checkpoint(checkpoint.parent, warn=logger.debug, accept=lambda path: accept(read_state(path)))


def save_run(
    folder: Path,
    *,
    server: Server,
    client: ClientRuntime,
    results: EvaluationResults,
    identity: Mapping[str, Any],
    num_processes: int,
    seconds: float,
) -> None:
    """
    Writes all of the federation that a resumed run needs. The Trainer adds optimizer, schedule and generators.

    Args:
        folder (`Path`):
            The folder `federation_state` of the checkpoint.
        server, client, results:
            What is saved.
        identity (`Mapping[str, Any]`):
            What the run's results depend on.
        num_processes (`int`):
            Processes of the run.
        seconds (`float`):
            Wall time spent in the open round so far.
    """
    tensors, server_state = server.state_dict()
    if server_state["open"] is not None:
        server_state["open"]["seconds"] += seconds
    write_safetensors(folder / "server.safetensors", tensors)
    # Clients that have not trained yet start from these, which a head without a seed has anew in every process.
    write_safetensors(folder / "initial_local.safetensors", client.initial_local)
    client.copy_stores(folder)
    if client.state.wave_open:
        in_slots = {f"{slot}|{k}": t for slot in client.slot_of.values() for k, t in client.slots.take(slot).items()}
        write_safetensors(folder / "slots.safetensors", in_slots)
    if client.state.round_open and client.optimizer.round_start is not None:
        torch.save(client.optimizer.round_start, folder / "schedule_at_round_start.pt")
    state = {
        "format": FORMAT,
        "identity": identity,
        "server": server_state,
        "client": client.snapshot(),
        "results": asdict(results),
        "parallel_clients": len(client.slots),
        "num_processes": num_processes,
    }
    if client.state.round_open:
        state["waves"] = [asdict(wave) for wave in client.round.waves]
    write_json(folder / "state.json", state)


class SavedRun:
    """
    A run as a checkpoint holds it.

    Args:
        checkpoint (`Path`):
            The checkpoint.

    Raises:
        [`CheckpointError`]: it is not whole, or of another version.
    """

    def __init__(self, checkpoint: Path):
        check_manifest(checkpoint)
        self.checkpoint, self.folder = checkpoint, checkpoint / STATE_FOLDER
        self.state = read_state(checkpoint)

    @property
    def run_id(self) -> str:
        return self.state["server"]["run_id"]

    @property
    def results(self) -> EvaluationResults:
        return EvaluationResults(**self.state["results"])

    def load_server(self, server: Server) -> None:
        """
        Puts a server where the saved one was.

        Raises:
            [`CheckpointError`]: it would choose other clients for the open round.
        """
        server.load_state_dict(load_file(self.folder / "server.safetensors"), self.state["server"])
        if not self.state["client"]["round_open"]:
            return
        saved, now = server.state.open.client_ids, server.sample(server.state.open.round_index)
        if list(now) != saved:
            raise CheckpointError(
                f"{self.checkpoint} was written in a round of {', '.join(saved)}, and this run would go "
                f"on with {', '.join(now)}. Pass the `client_sampler` of that run, which "
                "must choose the same clients whenever it is asked for the same round."
            )

    def load_clients(self, client: ClientRuntime, with_optimizers: bool) -> int:
        """
        Puts the clients where the saved ones were.

        A wave that was saved in the middle by a run with another number of slots begins anew: its clients' B are in
        the store, and their steps depend on nothing else.

        Args:
            client ([`~hf_fedsa.client.runtime.ClientRuntime`]):
                The clients.
            with_optimizers (`bool`):
                Whether states of optimizers are of use.

        Returns:
            `int`: steps of the checkpoint that are taken again.
        """
        state = ClientState(**self.state["client"])
        if not with_optimizers:
            state.with_optimizer = []
        waves = [
            Wave(**{name: tuple(v) if isinstance(v, list) else v for name, v in wave.items()})
            for wave in self.state.get("waves", [])
        ]
        steps_back = 0
        if state.wave_open and self.state["parallel_clients"] != len(client.slots):
            steps_back = state.wave_steps
            state = state.before_wave(waves[state.waves_done].client_ids)
        trained = waves[: state.waves_done + state.wave_open]
        slots: dict[int, dict[str, torch.Tensor]] = {}
        if state.wave_open:
            for name, tensor in load_file(self.folder / "slots.safetensors").items():
                slot, key = name.split("|", maxsplit=1)
                slots.setdefault(int(slot), {})[key] = tensor
        client.initial_local = load_file(self.folder / "initial_local.safetensors")
        client.resume(state, trained, slots)
        schedule = self.folder / "schedule_at_round_start.pt"
        client.optimizer.round_start = torch.load(schedule, weights_only=True) if schedule.is_file() else None
        return steps_back
