"""What clients do in a round: any set of them, as many side by side as there are slots."""

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.amp import GradScaler

from ..faults import judge
from ..messages import Broadcast, Tensors, Update
from ..seeds import derive_seed
from .local_optimizer import LocalOptimizer
from .slots import Slots
from .state import ClientSettings, ClientState
from .step import Step
from .store import BEFORE, ClientStores, StoreName
from .waves import Round, Wave, WavePlanner, WholePasses

logger = logging.getLogger(__name__)


class ClientRuntime:
    """
    The clients of one place in a round. It knows no server: a [`Broadcast`] comes in, [`Update`]s go out.

    Args:
        slots ([`Slots`]):
            Where clients train.
        stores ([`ClientStores`]):
            Where they wait.
        optimizer ([`LocalOptimizer`]):
            Their optimizer and schedule.
        settings ([`ClientSettings`]):
            What they are told once.
        initial_local (`dict[str, torch.Tensor]`):
            Where a client starts that has never trained.
        where_else (`Callable[[str, str], str]`):
            Says where a copy is of what a store has lost, from the store's name and the client.
        follows (`bool`, *optional*, defaults to `False`):
            Whether it is learned from the next [`Broadcast`] alone which rounds counted.
    """

    def __init__(
        self,
        slots: Slots,
        stores: ClientStores,
        optimizer: LocalOptimizer,
        settings: ClientSettings,
        initial_local: Tensors,
        where_else: Callable[[str, str], str],
        follows: bool = False,
    ):
        self.slots, self.stores, self.optimizer = slots, stores, optimizer
        self.settings = settings
        # Their waves and rows, known when a run begins.
        self.planner: WavePlanner | WholePasses | None = None
        self.initial_local = initial_local
        self.where_else, self.follows = where_else, follows
        self.state = ClientState()
        self.broadcast: Broadcast | None = None
        self.round: Round | None = None
        # First waves of the open round, of a run that goes on in the middle of it.
        self.trained: tuple[Wave, ...] = ()
        self.slot_of: dict[str, int] = {}
        self._losses: dict[str, torch.Tensor] = {}
        self._counts: dict[str, int] = {}
        self._scale_before_wave: dict[str, Any] = {}

    # A round

    def open(self, client_ids: Sequence[str], broadcast: Broadcast) -> None:
        """
        Plans a round. If it is open already, of a run that was resumed, it goes on. Nobody is loaded yet.

        Args:
            client_ids (`Sequence[str]`):
                Those of the round's clients that are trained here, by this process or another of the same run.
            broadcast ([`Broadcast`]):
                What the server has sent.
        """
        state = self.state
        self.broadcast = broadcast
        if not state.round_open:
            self.state = state = ClientState(
                round_index=broadcast.round_index, counted=state.counted, with_optimizer=state.with_optimizer
            )
            self._losses, self._counts = {}, {}
            self.trained = ()
            if self.follows:
                self._settle_before(client_ids)
        self.round = self.planner.plan(broadcast.round_index, client_ids, self.trained)

    def _settle_before(self, client_ids: Sequence[str]) -> None:
        """Puts back the B, and optimizer state, of clients for which a later round did not count after all."""
        for client_id in client_ids:
            last = self.broadcast.last_counted.get(client_id)
            if self.state.counted.get(client_id) in (last, BEFORE if last is None else last):
                continue
            stored = self.stores.clients.rounds(client_id)
            if last is None and BEFORE not in stored:
                self.state.counted.pop(client_id, None)
                self.state.with_optimizer = [c for c in self.state.with_optimizer if c != client_id]
                continue
            self.state.counted[client_id] = BEFORE if last is None else last
            others = [c for c in self.state.with_optimizer if c != client_id]
            kept = self.state.counted[client_id] in self.stores.optimizers.rounds(client_id)
            self.state.with_optimizer = sorted([*others, client_id]) if kept else others
        for client_id in client_ids:
            for store in (self.stores.clients, self.stores.optimizers):
                store.keep(client_id, self.state.counted.get(client_id))

    def open_none(self) -> None:
        """There is no round any more: an epoch that the Trainer has begun ends without a step."""
        self.round = Round(self.state.round_index, (), ())

    def batches(self, first: Round) -> Iterator[list[tuple[int, int]]]:
        """The open round's micro-batches as `(slot, row)` pairs. Of `first` if no round was ever opened."""
        return self.planner.micro_batches(self.round or first)

    @property
    def wave(self) -> Wave:
        """The wave that trains or comes next."""
        return self.round.waves[self.state.waves_done]

    @property
    def ends_wave(self) -> bool:
        """Whether the step that is about to end is the last one of its wave."""
        return self.state.wave_steps + 1 == self.wave.num_steps

    @property
    def has_finished(self) -> bool:
        """Whether all waves of the open round are done."""
        return self.state.round_open and self.state.waves_done == len(self.round.waves)

    @property
    def has_answered(self) -> bool:
        """Whether a client of the open round has returned an update or a fault."""
        return bool(self.state.returned or self.state.left_out)

    @property
    def step_seed(self) -> int:
        """From (seed, round, clients, step) alone, so that a step can be replayed whatever was drawn before it."""
        state = self.state
        return derive_seed(self.settings.seed, "step", state.round_index, *self.wave.client_ids, state.wave_steps)

    def clients_in_step(self) -> int:
        """Clients that train in the present step, over all processes."""
        return sum(steps > self.state.wave_steps for steps in self.wave.steps_of_all)

    def begin_step(self, scaler: GradScaler | None = None) -> None:
        """Loads the next wave's clients if none are in the slots: A as it was sent, B as it was stored."""
        if not self.state.wave_open:
            self._open_wave(scaler)
        # Here, where also a run comes by that was resumed within a wave, and after the optimizer has been made.
        self.slots.train(self.slots.sharing.trained(self.broadcast.trained))
        self.optimizer.begin_step(list(self.slot_of.values()))

    def _open_wave(self, scaler: GradScaler | None) -> None:
        state, wave = self.state, self.wave
        if not state.round_open:
            state.round_open = True
            self.optimizer.begin_round()
        else:
            self.optimizer.rewind()
        for slot, client_id in enumerate(wave.client_ids):
            self.slots.load(slot, self.broadcast.shared, self.local_of(client_id))
        self.slot_of = {client_id: slot for slot, client_id in enumerate(wave.client_ids)}
        self.optimizer.begin_wave(
            {
                slot: self._stored("optimizers", client_id, state.counted[client_id])
                for slot, client_id in enumerate(wave.client_ids)
                if self.optimizer.keeps and client_id in state.with_optimizer
            }
        )
        self._scale_before_wave = scaler.state_dict() if scaler is not None else {}
        state.wave_open, state.wave_steps = True, 0

    def end_step(self, step: Step, trainer: str = "Trainer", scaler: GradScaler | None = None) -> list[Update]:
        """
        Counts a step, and takes the clients out of the slots after the last one of a wave.

        Returns:
            `list[Update]`: the updates of the wave's clients, if it has ended.

        Raises:
            `RuntimeError`: a client of the step has no loss.
        """
        state = self.state
        self._note_unreadable(step)
        state.wave_steps += 1
        self.optimizer.keep_counts(list(self.slot_of.values()), list(step.batches))
        for slot, loss in step.losses:
            client_id = self.client_in(slot)
            self._losses[client_id] = self._losses.get(client_id, 0.0) + loss
        for slot in step.batches:
            client_id = self.client_in(slot)
            if client_id not in self._losses and client_id not in state.left_out:
                raise RuntimeError(
                    f"The step of client {client_id!r} has no loss: the `training_step` of `{trainer}` "
                    "did not call the one it overrides, which divides the work by client. Call "
                    "`super().training_step`, or put your computation into `compute_loss`."
                )
            self._counts[client_id] = self._counts.get(client_id, 0) + 1
        # A pass ends where the Trainer's loader does.
        if state.wave_steps == self.wave.num_steps:
            return self._close_wave(scaler)
        return []

    def _note_unreadable(self, step: Step) -> None:
        for slot, (kind, text) in step.unreadable.items():
            client_id = self.wave.client_ids[slot]
            if client_id not in self.state.left_out:
                # The text may quote rows and paths, and why a client was left out is published.
                logger.warning("Rows of client %s cannot be read: %s: %s", client_id, kind, text)
                self.state.left_out[client_id] = f"its rows cannot be read ({kind})"

    def client_in(self, slot: int) -> str:
        return next(client_id for client_id, other in self.slot_of.items() if other == slot)

    def close(self, scaler: GradScaler | None = None) -> list[Update]:
        """The updates of a wave that is cut short, or whose end the Trainer's loader knows alone."""
        return self._close_wave(scaler) if self.state.wave_open else []

    def _close_wave(self, scaler: GradScaler | None) -> list[Update]:
        state, wave = self.state, self.wave
        self.optimizer.end_wave()
        updates = []
        for slot, client_id in enumerate(wave.client_ids):
            if not self._counts.get(client_id) and client_id not in state.left_out:
                continue  # The run was stopped before its first step ended, so it is as it was.
            updates.append(self._update_of(client_id, slot))
        if self._scale_before_wave and any(update.fault for update in updates):
            # A client that is not finite has made the scale ever smaller, and the next ones would start from there.
            scaler.load_state_dict(self._scale_before_wave)
        self.slot_of = {}
        self._losses, self._counts = {}, {}
        state.wave_open, state.waves_done = False, state.waves_done + 1
        return updates

    def _update_of(self, client_id: str, slot: int) -> Update:
        """What a client returns. Unless there is a fault, its B of this round is then in the store."""
        state, steps = self.state, self._counts.get(client_id, 0)
        names = self.slots.sharing.returned(self.broadcast.trained)
        returned = {name: tensor for name, tensor in self.slots.take(slot, "shared").items() if name in names}
        received, local = {name: self.broadcast.shared[name] for name in returned}, self.slots.select(slot, "local")
        fault = state.left_out.get(client_id)
        if fault is None:
            limit, total = self.settings.max_update_norm, float(self._losses[client_id])
            fault = judge(returned, received, total, limit, local=local)
        if fault is not None:
            state.left_out[client_id] = fault
            return Update(client_id, state.round_index, {}, weight=0.0, num_steps=steps, fault=fault)
        self.stores.clients.put(client_id, state.round_index, local)
        if self.optimizer.keeps:
            self.stores.optimizers.put(client_id, state.round_index, self.optimizer.take(slot))
        state.returned = sorted({*state.returned, client_id})
        return Update(
            client_id,
            state.round_index,
            returned,
            weight=self._weight(client_id, steps),
            num_steps=steps,
            metrics={"loss": float(self._losses[client_id]) / steps},
        )

    def _weight(self, client_id: str, steps: int) -> float:
        if self.settings.weighting == "uniform":
            return 1.0
        return float(self.planner.num_examples(client_id, self.state.round_index, steps))

    def end_round(self, counted: Sequence[str] | None) -> None:
        """
        Closes the round. Clients that it counts for have their new B, the others the one from before.

        Args:
            counted (`Sequence[str]`, *optional*):
                Clients, of all processes, that it counts for. `None` if that is not known here: those that have
                returned an update are taken to be, until the next [`Broadcast`] says otherwise.
        """
        state, known = self.state, counted is not None
        self._count(counted if known else state.returned)
        self.optimizer.advance(self.round.local_steps - state.wave_steps)
        if known:
            for client_id in {c for wave in self.round.waves for c in wave.client_ids}:
                for store in (self.stores.clients, self.stores.optimizers):
                    store.keep(client_id, state.counted.get(client_id))
        self._reset(round_index=state.round_index + 1)

    def _count(self, client_ids: Iterable[str]) -> None:
        """The open round's B, and optimizer state, is now what these clients have."""
        state = self.state
        for client_id in client_ids:
            state.counted[client_id] = state.round_index
            if self.optimizer.keeps:
                state.with_optimizer = sorted({*state.with_optimizer, client_id})

    def abandon(self, counted: Sequence[str]) -> None:
        """Ends a run that has failed: clients whose update is in the average of the open round keep their new B."""
        self._count(set(counted) & set(self.state.returned))
        self._reset(round_index=self.state.round_index)

    def reopen(self) -> None:
        """Forgets a round in which nobody has taken a step."""
        self._reset(round_index=self.state.round_index)

    def _reset(self, round_index: int) -> None:
        state = self.state
        self.state = ClientState(round_index=round_index, counted=state.counted, with_optimizer=state.with_optimizer)
        self._losses, self._counts, self.slot_of, self.trained = {}, {}, {}, ()

    def begin_run(self) -> None:
        """Begins a run with what an earlier one has left: the B that each client has is the one from before."""
        counted, with_optimizer = self.state.counted, self.state.with_optimizer
        self.stores.begin_run(counted, {client_id: counted[client_id] for client_id in with_optimizer})
        self.state = ClientState(counted=dict.fromkeys(counted, BEFORE), with_optimizer=with_optimizer)
        self._losses, self._counts, self.slot_of, self.trained = {}, {}, {}, ()

    def go_on_from_stores(self, client_ids: Sequence[str]) -> None:
        """Begins a run of clients that outlive their process: each has the B that it stored last."""
        newest = {
            client_id: rounds[-1] for client_id in client_ids if (rounds := self.stores.clients.rounds(client_id))
        }
        with_optimizer = [c for c, last in newest.items() if last in self.stores.optimizers.rounds(c)]
        self._losses, self._counts, self.slot_of, self.trained = {}, {}, {}, ()
        self.state = ClientState(counted=newest, with_optimizer=with_optimizer)

    def forget(self, client_id: str) -> None:
        """Deletes what a client has stored."""
        self.state.counted.pop(client_id, None)
        self.state.with_optimizer = [other for other in self.state.with_optimizer if other != client_id]
        for store in (self.stores.clients, self.stores.optimizers):
            store.forget(client_id)

    def refuse(self, client_id: str, last_counted: int | None) -> str | None:
        """Why a client cannot go on from the round that counted last for it, or `None`."""
        stored = self.stores.clients.rounds(client_id)
        if last_counted is None or last_counted in stored:
            return None
        return (
            f"The last round that counted for client {client_id!r} is {last_counted}, and what it had after it is not "
            f"in its store, which has the rounds {', '.join(map(str, stored)) or 'of nobody'}. Put the store back "
            "that the client had in that round, or let the server forget the client, which then starts anew."
        )

    # What clients have

    def trains_elsewhere(self, client_id: str) -> bool:
        """Whether another process trains the client in the open round, and alone knows what it holds."""
        if not self.state.round_open or client_id not in self.round.client_ids:
            return False
        return not any(client_id in wave.client_ids for wave in self.round.waves)

    def local_of(self, client_id: str) -> Tensors:
        """
        What a client keeps, as it is now, also while it trains.

        Raises:
            `RuntimeError`: another process trains it.
            [`~hf_fedsa.client.store.ClientStoreError`]: it has trained, and its tensors are gone or damaged.
        """
        if client_id in self.slot_of:
            training = self.slots.take_trained(self.slot_of[client_id])
            return {key: tensor for key, tensor in training.items() if self.slots.sharing.share_of[key] == "local"}
        state = self.state
        if client_id in state.returned:
            return self._stored("clients", client_id, state.round_index)
        if self.trains_elsewhere(client_id):
            raise RuntimeError(
                f"Client {client_id!r} trains in another process in the round that is open, so what it holds now is "
                "not known here. Ask in `on_round_end` or after training. (`evaluate` can be called at any time, by "
                "all processes together.)"
            )
        # Not what the store has: that may be of another run until this one has begun, and what is lost must be missed.
        if client_id in state.counted:
            return self._stored("clients", client_id, state.counted[client_id])
        return self.initial_local

    def adapter_of(self, client_id: str, sent: Tensors) -> Tensors:
        """
        The complete adapter a client serves with now, in the dtype of the slots.

        Args:
            client_id (`str`):
                The client.
            sent (`dict[str, torch.Tensor]`):
                A as the server sends it, for a client that does not train at the moment.
        """
        if client_id in self.slot_of:
            return self.slots.take_trained(self.slot_of[client_id])
        return {**sent, **self.local_of(client_id)}

    def _stored(self, store: StoreName, client_id: str, round_index: int) -> Tensors:
        return self.stores.get(store, client_id, round_index, lambda: self.where_else(store, client_id))

    # The model as it is looked at

    @property
    def is_at_rest(self) -> bool:
        """Whether nobody trains, and nobody is looked at."""
        return not self.slot_of and not self.slots.is_shown

    @contextlib.contextmanager
    def weights_to_be_used(self) -> Iterator[None]:
        """Within this context the slots hold the weights that clients serve with."""
        training = list(self.slot_of.values()) if not self.slots.is_shown else []
        with self.optimizer.weights_to_be_used(training):
            yield

    def rest(self, client_id: str, sent: Tensors) -> None:
        """Puts a client's adapter into the model, for users to read and to write."""
        self.slots.load(0, self.adapter_of(client_id, sent))
        for slot in range(1, len(self.slots)):
            # Whatever is made of the model's state dict, it does not hold the B of the clients that came last.
            self.slots.load(slot, sent, self.initial_local)

    def edits(self, client_id: str, sent: Tensors) -> Mapping[str, torch.Tensor]:
        """What has been written into the model since it was put there by [`rest`]."""
        placed = self.adapter_of(client_id, sent)
        return {key: t for key, t in self.slots.take(0).items() if not torch.equal(t, placed[key].to(t.dtype))}

    def replace_local(self, client_id: str, tensors: Tensors, of_everyone: bool) -> None:
        """
        Changes what a client keeps, or where every client starts.

        Args:
            client_id (`str`):
                The client.
            tensors (`dict[str, torch.Tensor]`):
                What is to change.
            of_everyone (`bool`):
                Whether nobody has trained yet, so that all clients start from it.
        """
        if of_everyone:
            self.initial_local = {**self.initial_local, **tensors}
            return
        changed = {**self.local_of(client_id), **tensors}
        round_index = self.state.counted.setdefault(client_id, BEFORE)
        self.stores.clients.put(client_id, round_index, changed)

    # Saving

    def copy_stores(self, folder: Path) -> None:
        """Copies all that the stores have of clients to a folder."""
        state = self.state
        for client_id in sorted({*state.counted, *state.returned}):
            before = [state.counted[client_id]] if client_id in state.counted else []
            of_round = [state.round_index] if client_id in state.returned else []
            self._copy(folder, "clients", client_id, before + of_round)
            if self.optimizer.keeps:
                of_optimizer = before if client_id in state.with_optimizer else []
                self._copy(folder, "optimizers", client_id, of_optimizer + of_round)

    def _copy(self, folder: Path, store: StoreName, client_id: str, rounds: Sequence[int]) -> None:
        self.stores.save(folder, store, client_id, rounds, lambda: self.where_else(store, client_id))

    def snapshot(self) -> dict[str, Any]:
        """The state as JSON, with the losses of the clients in training."""
        losses = {client_id: [float(loss), self._counts.get(client_id, 0)] for client_id, loss in self._losses.items()}
        return {**self.state.to_dict(), "losses": losses}

    def resume(self, state: ClientState, waves: Sequence[Wave], slots: Mapping[int, Tensors]) -> None:
        """
        Goes on from a saved state.

        Args:
            state ([`ClientState`]):
                The state.
            waves (`Sequence[Wave]`):
                Waves of the open round that have trained, and the one that goes on in the middle.
            slots (`Mapping[int, dict[str, torch.Tensor]]`):
                What was in the slots, if a wave goes on.
        """
        self.state, self.trained = state, tuple(waves)
        self._losses = {client_id: torch.tensor(loss) for client_id, (loss, _) in state.losses.items()}
        self._counts = {client_id: count for client_id, (_, count) in state.losses.items()}
        self.slot_of = {}
        if state.wave_open:
            for slot, client_id in enumerate(waves[state.waves_done].client_ids):
                self.slots.load(slot, slots[slot])
                self.slot_of[client_id] = slot
