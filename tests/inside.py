"""
Everything that tests see or change inside hf_fedsa, beyond what users can.

Where the package is cut differently, this file follows and the tests stay. A hook is called with what its name says,
before or after the package does it; a hook that comes before may raise, and then the package does not do it.
"""

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer

from hf_fedsa import (
    FederatedTrainer,
    chat_template,
    checkpoint_folder,
    files,
    identity,
    other_trainers,
    processes,
    run_lock,
    trackers,
)
from hf_fedsa.client.parameters import adapter_parameters
from hf_fedsa.client.store import DiskClientStore, MemoryClientStore
from hf_fedsa.tensors import clone_tensors
from hf_fedsa.worker import OverSocket

# What the package knows of others

CONFIG_OF_TRAINER = other_trainers._CONFIG_OF
TRAINERS_THAT_GENERATE_ROWS = other_trainers._GENERATE_ROWS
TRACKERS_THAT_UPLOAD = frozenset(trackers._UPLOADERS)
MULTIPLE_OF_CLONED_VOCABULARIES = chat_template._VOCABULARY_MULTIPLE
ARGUMENTS_WITHOUT_EFFECT = identity._WITHOUT_EFFECT
PREFIXES_OF_ARGUMENTS_WITHOUT_EFFECT = identity._PREFIXES_WITHOUT_EFFECT
# A private name that the trainer certainly has, for a test that collects them all.
A_NAME_OF_THE_TRAINER = "_slots"

# Slots


def num_slots(trainer: FederatedTrainer) -> int:
    return len(trainer._slots)


def clients_in_slots(trainer: FederatedTrainer) -> dict[str, int]:
    """Slot of every client that is training now."""
    return dict(trainer._client.slot_of)


def slot_of(trainer: FederatedTrainer, client_id: str) -> int | None:
    """Slot of a client, `None` while it is not training."""
    return trainer._client.slot_of.get(client_id)


def slot_parameters(trainer: FederatedTrainer, slot: int, share: str | None = None) -> dict[str, nn.Parameter]:
    """Live parameters of a slot: all of them, or the `"shared"` or `"local"` ones."""
    return trainer._slots.select(slot, share)


def slot_tensors(trainer: FederatedTrainer, slot: int, share: str | None = None) -> dict[str, torch.Tensor]:
    """Copies of a slot's tensors: all of them, or the `"shared"` or `"local"` ones."""
    return trainer._slots.take(slot, share)


def after_loading_slot(trainer: FederatedTrainer, function: Callable[[int], None]) -> None:
    """Calls `function(slot)` whenever tensors have been written into a slot."""
    load = trainer._slots.load

    def load_and_call(slot: int, *tensors: Mapping[str, torch.Tensor]) -> None:
        load(slot, *tensors)
        function(slot)

    trainer._slots.load = load_and_call


def routing_of(trainer: FederatedTrainer) -> Any:
    """What tells the adapted layers of the trainer's model which rows go through which slot."""
    return trainer._slots._routing


# Rows


def rows_of(trainer: FederatedTrainer, client_id: str) -> list[int]:
    """Numbers of a client's rows in `trainer.train_dataset`."""
    return trainer._rows.of[client_id]


def num_rows(trainer: FederatedTrainer) -> dict[str, int]:
    """Rows of every client, once prepared."""
    return {client_id: len(rows) for client_id, rows in trainer._rows.of.items()}


# What the clients start from


def initial_shared(trainer: FederatedTrainer) -> dict[str, torch.Tensor]:
    """The server's tensors before the first round."""
    return trainer._server.initial_shared


def initial_local(trainer: FederatedTrainer) -> dict[str, torch.Tensor]:
    """What a client starts with that has not trained yet."""
    return trainer._client.initial_local


def add_to_initial_tensors(trainer: FederatedTrainer, value: float) -> None:
    """As if the trainer had drawn another initialisation, but not its model."""
    trainer._server.initial_shared = {key: tensor + value for key, tensor in trainer._server.initial_shared.items()}
    trainer._client.initial_local = {key: tensor + value for key, tensor in trainer._client.initial_local.items()}


def add_to_shared(trainer: FederatedTrainer, value: float) -> None:
    """As if rounds had moved the server's tensors, and the model of the trainer at rest with them."""
    for key in trainer._server.shared:
        trainer._server.shared[key] = trainer._server.shared[key] + value
    trainer._slots.load(0, trainer._server.shared)


def add_to_initial_local(trainer: FederatedTrainer, value: float) -> None:
    """Moves what clients start with that have not trained yet, and the model of the trainer at rest with it."""
    for key in trainer._client.initial_local:
        trainer._client.initial_local[key] = trainer._client.initial_local[key] + value
    trainer._slots.load(0, trainer._client.initial_local)


# A round


def wave_is_open(trainer: FederatedTrainer) -> bool:
    """Whether clients are in the slots."""
    return trainer._client.state.wave_open


def wave_steps(trainer: FederatedTrainer) -> int:
    """Steps that the wave in the slots has taken, or the last one if none is."""
    return trainer._client.state.wave_steps


def updates_held_back(trainer: FederatedTrainer) -> dict[str, Any]:
    """Updates that wait for the round's end to be judged, by client."""
    return trainer._server._held


def after_opening_wave(trainer: FederatedTrainer, function: Callable[[tuple[str, ...]], None]) -> None:
    """Calls `function(client_ids)` once the clients of a wave have been loaded, the first one into slot 0."""
    open_wave = trainer._client._open_wave

    def open_and_call(*args) -> None:
        open_wave(*args)
        function(trainer._client.wave.client_ids)

    trainer._client._open_wave = open_and_call


def around_closing_wave(
    trainer: FederatedTrainer,
    before: Callable[[], None],
    after: Callable[[], None] = lambda: None,
) -> None:
    """Calls `before()` while a wave that has trained is still in the slots, and `after()` when it has been counted."""
    close_wave, send = trainer._client._close_wave, trainer._send

    def call_and_close(*args):
        before()
        return close_wave(*args)

    def send_and_call(updates) -> None:
        send(updates)
        if updates:
            after()

    trainer._client._close_wave, trainer._send = call_and_close, send_and_call


def before_closing_round(trainer: FederatedTrainer, function: Callable[[], None]) -> None:
    """Calls `function()` when every B of a round is in the store, and A is still the old one."""
    close_round = trainer._close_round

    def call_and_close() -> None:
        function()
        close_round()

    trainer._close_round = call_and_close


def without_gathering(trainer: FederatedTrainer) -> contextlib.AbstractContextManager[None]:
    """Within this context a process computes alone, where the Trainer would gather from all of them."""
    return trainer._alone()


# A worker


def waiting_in(transport: OverSocket) -> list[Any]:
    """Requests to train that have not begun."""
    return transport._waiting


def training_in(transport: OverSocket) -> dict[str, Any]:
    """Requests of the open round that are not answered, by client."""
    return transport._training


def evaluations_in(transport: OverSocket) -> list[Any]:
    """Requests to evaluate that wait for the round to end."""
    return transport._evaluations


def connections_of(transport: OverSocket) -> list[Any]:
    """Connections that are open to a worker."""
    return list(transport._socket._connections.values())


# Stores and optimizers


def client_store(trainer: FederatedTrainer) -> Any:
    """Where B is while its client does not train."""
    return trainer._federation.stores.clients


def tensors_stored(store: MemoryClientStore) -> dict[str, dict[int, dict[str, torch.Tensor]]]:
    """The tensors themselves that a store in memory holds, by client and round."""
    return store._tensors


def room_in(store: MemoryClientStore) -> list[dict[str, torch.Tensor]]:
    """Memory that a store keeps for the next tensors."""
    return [tensors for room in store._room.values() for tensors in room]


def on_use_of_disk_stores(monkeypatch: pytest.MonkeyPatch, function: Callable[[str], None]) -> None:
    """Calls `function(client_id)` whenever any trainer reads or writes a client in a store on the disk."""

    def call_before(method: Callable) -> Callable:
        def call_and_go_on(self, client_id: str, *args, **kwargs):
            function(client_id)
            return method(self, client_id, *args, **kwargs)

        return call_and_go_on

    for name in ("get", "put"):
        monkeypatch.setattr(DiskClientStore, name, call_before(getattr(DiskClientStore, name)))


def optimizer_state(trainer: FederatedTrainer, client_id: str) -> dict[str, torch.Tensor]:
    """State of the optimizer for a client that is training, named `<parameter>|<entry>`."""
    return trainer._federation.optimizer.take(trainer._client.slot_of[client_id])


def kept_optimizer_states(trainer: FederatedTrainer) -> dict[str, dict[str, torch.Tensor]]:
    """State of the optimizer that is kept for each client between its rounds, named as in `optimizer_state`."""
    store = trainer._federation.stores.optimizers
    return {client_id: store.get(client_id, store.rounds(client_id)[-1]) for client_id in store}


def count_no_items(monkeypatch: pytest.MonkeyPatch, kind: type[Trainer]) -> None:
    """Trainers of this kind then have no count of items to average a loss by."""
    monkeypatch.setattr(kind, "_get_num_items_in_batch", lambda self, batch_samples, device: None)


# Files


def save_checkpoint(trainer: FederatedTrainer) -> None:
    """Writes a checkpoint now, as the Trainer does at its `save_steps`."""
    trainer._save_checkpoint(trainer.model, trial=None)


def before_reading_optimizer(
    monkeypatch: pytest.MonkeyPatch, trainer: FederatedTrainer, function: Callable[[], None]
) -> None:
    """Calls `function()` when a resumed run is about to read its optimizer, the clients' tensors having been read."""
    load = trainer._load_optimizer_and_scheduler

    def call_and_load(checkpoint) -> None:
        function()
        load(checkpoint)

    monkeypatch.setattr(trainer, "_load_optimizer_and_scheduler", call_and_load)


def before_writing_manifest(monkeypatch: pytest.MonkeyPatch, function: Callable[[Path], None]) -> None:
    """Calls `function(checkpoint)` when a checkpoint is complete but for the manifest that says so."""
    write = checkpoint_folder.write_manifest

    def call_and_write(checkpoint: Path) -> None:
        function(checkpoint)
        write(checkpoint)

    monkeypatch.setattr(checkpoint_folder, "write_manifest", call_and_write)


def before_writing_file(monkeypatch: pytest.MonkeyPatch, function: Callable[[Path], None]) -> None:
    """Calls `function(path)` before a file is written under a temporary name and renamed to `path`."""
    replace = files._replace_atomically

    def call_and_replace(path: Path, write: Callable[[str], None]) -> None:
        function(path)
        replace(path, write)

    monkeypatch.setattr(files, "_replace_atomically", call_and_replace)


# Processes and locks


def is_running(pid: int) -> bool:
    """Whether a process is there and no zombie. Known on Linux alone."""
    return run_lock._start_of(pid) is not None


def lose_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the parent that this process had at first had died."""
    monkeypatch.setattr(processes, "_parent", -1)


def become_a_fork(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the package had been imported by the process that this one was forked from."""
    monkeypatch.setattr(processes, "_this_process", -1)


def hide_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a system that does not tell which machine it is."""
    monkeypatch.setattr(run_lock, "_machine", lambda: None)


@contextlib.contextmanager
def kept_alive(path: Path) -> Iterator[None]:
    """Within this context a lock's file is touched in time, as by the one who wrote it."""
    owner, released = run_lock._Owner.read_path(path), threading.Event()
    thread = threading.Thread(target=run_lock._beat, args=(owner, [path], released))
    thread.start()
    try:
        yield
    finally:
        released.set()
        thread.join()


def suspend(lock: run_lock.RunLock) -> None:
    """A lock that is held touches its files no more."""
    lock._released.set()


def move_to(lock: run_lock.RunLock, path: Path, *, machine: str | None, host: str) -> None:
    """A lock that is held, and its file, are then another machine's."""
    lock._owner = dataclasses.replace(lock._owner, machine=machine, host=host)
    with open(path, "r+") as file:
        lock._owner.write(file)


# Methods


@dataclasses.dataclass
class Watched:
    """Complete adapters of clients, by round and client: where they began, what they trained, what they returned."""

    start: dict[tuple[int, str], dict[str, torch.Tensor]] = dataclasses.field(default_factory=dict)
    end: dict[tuple[int, str], dict[str, torch.Tensor]] = dataclasses.field(default_factory=dict)
    returned: dict[tuple[int, str], dict[str, torch.Tensor]] = dataclasses.field(default_factory=dict)


def watch_clients(trainer: FederatedTrainer) -> Watched:
    """Records the adapters of all clients that train from now on."""
    client, slots, watched = trainer._client, trainer._slots, Watched()
    open_wave, update_of = client._open_wave, client._update_of

    def open_and_record(*args):
        open_wave(*args)
        for client_id, slot in client.slot_of.items():
            watched.start[client.state.round_index, client_id] = slots.take(slot)

    def update_and_record(client_id, slot):
        update = update_of(client_id, slot)
        watched.end[update.round_index, client_id] = slots.take(slot)
        watched.returned[update.round_index, client_id] = update.shared
        return update

    client._open_wave, client._update_of = open_and_record, update_and_record
    return watched


def initial_adapter(trainer: FederatedTrainer) -> dict[str, torch.Tensor]:
    """The complete adapter that a client has before it trains."""
    return trainer._slots.take(0)


def adapter_tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of what trains of a `PeftModel`'s active adapter, under the keys PEFT saves it with."""
    return clone_tensors(adapter_parameters(model, model.active_adapter))
