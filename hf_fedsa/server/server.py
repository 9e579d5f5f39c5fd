"""The server's part of a round: it samples, sends, receives, aggregates, records."""

import copy
import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import nn

from ..faults import JUDGED_FROM, judge, norm_and_change, outliers
from ..files import validate_client_ids
from ..messages import Broadcast, ClientInfo, Tensors, Update
from ..methods import METHODS, Sharing
from ..metrics import forget_client, round_metrics
from ..tensors import clone_tensors, count_bytes, tensors_sha256
from .admission import as_float, does_not_count, problem_of_everyone, refuse_client, refuse_update
from .sampling import ClientSampler, TooFewClientsError, ask_sampler, check_enough_clients, seeded_sampler
from .state import OpenRound, ServerSettings, ServerState, check_same_shapes, split_names

logger = logging.getLogger(__name__)


class Server:
    """
    The server of a federation. It holds what is shared, and never a model, a row or what a client keeps.

    A round is [`begin_round`], [`receive`] for every client's update in whatever order they come, and [`end_round`].
    What it holds between two calls is a value ([`state_dict`]), so it can stop and go on anywhere.

    Args:
        shared (`dict[str, torch.Tensor]`):
            What is shared, copied to fp32 on the CPU. With FedSA it is A.
        clients (`Mapping[str, ClientInfo]`):
            The clients by their ids. More may come, see [`register`].
        settings (`ServerSettings`):
            May be replaced between rounds.
        sharing ([`~hf_fedsa.methods.Sharing`], *optional*):
            The method on these tensors: which of them have their turn in a round. `None` means that all do, always.
        sampler (`ClientSampler`, *optional*):
            Chooses the clients of a round in place of `settings.client_sampling`.
        dtypes (`Mapping[str, torch.dtype]`, *optional*):
            Per tensor, the dtype that clients train in, in which it travels. `None` means fp32.
        run_id (`str`, *optional*, defaults to `""`):
            Names the run.

    Attributes:
        shared, initial_shared (`dict[str, torch.Tensor]`):
            What is shared as it is, and as it was when the run began. `shared` may be replaced between rounds.
        clients (`dict[str, ClientInfo]`):
            The clients that rounds are sampled from.
        fingerprint (`dict[str, Any]`, *optional*):
            What all clients must have in common: that of the first one. `None` if there has been none.
        state (`ServerState`):
            Where the run stands.

    Raises:
        `ValueError`: a client's id cannot be one, or the client does not fit the others.
    """

    def __init__(
        self,
        shared: Tensors,
        clients: Mapping[str, ClientInfo],
        settings: ServerSettings,
        *,
        sharing: Sharing | None = None,
        sampler: ClientSampler | None = None,
        dtypes: Mapping[str, torch.dtype] | None = None,
        run_id: str = "",
    ):
        self.shared = clone_tensors(shared, dtype=torch.float32)
        self.settings = settings
        self.sharing = sharing or Sharing(dict.fromkeys(shared, "A"), METHODS["fedsa"])
        self._sampler = sampler
        self._dtypes = dict(dtypes or {})
        self.clients: dict[str, ClientInfo] = {}
        self.fingerprint: dict[str, Any] | None = None
        self._planned: dict[tuple[ServerSettings, int], tuple[str, ...]] = {}
        self.restart(run_id)
        validate_client_ids(clients)
        for client_id, info in clients.items():
            if info.client_id != client_id:
                raise ValueError(f"`clients` has the client {info.client_id!r} under the name {client_id!r}.")
            if (reason := refuse_client(info, (), self.fingerprint)) is not None:
                raise ValueError(f"Client {client_id!r} cannot be one of this federation: {reason}")
            self._admit(info)

    # Who takes part

    def register(self, info: ClientInfo) -> str | None:
        """
        Lets a client take part from the next round on. One that is known already is taken to have changed.

        Returns:
            `str` or `None`: why it cannot take part, if so; nothing has changed then.
        """
        if (reason := refuse_client(info, self.clients, self.fingerprint)) is None:
            self._admit(info)
        return reason

    def _admit(self, info: ClientInfo) -> None:
        if self.fingerprint is None:
            self.fingerprint = copy.deepcopy(info.fingerprint)
        self.clients[info.client_id] = info
        self._planned.clear()

    def deregister(self, client_id: str, forget: bool = False) -> None:
        """
        Takes a client out of all later rounds, and out of the open one if it has not answered.

        Args:
            client_id (`str`):
                The client.
            forget (`bool`, *optional*, defaults to `False`):
                Whether its name and numbers are deleted from `state`; those of the open round go when that ends. An
                update that is held back is dropped; one that counts already stays in the round, whatever the
                aggregator. It also works for a client that has left before.
                What this does not undo: A is an average that the client's updates have entered, and it stays as it
                is, as does every B that was trained with it. Checkpoints, logs, files and repositories that were
                written before keep what they say, and what has been published cannot be called back.

        Raises:
            `ValueError`: there is no such client.
        """
        state, open_round = self.state, self.state.open
        in_round = open_round is not None and client_id in open_round.client_ids
        if client_id not in self.clients and not (forget and (in_round or state.names(client_id))):
            raise ValueError(f"There is no client {client_id!r} to take out.")
        self.clients.pop(client_id, None)
        state.seen.pop(client_id, None)
        self._planned.clear()
        if in_round and forget and self._held.pop(client_id, None) is not None:
            del open_round.held[client_id]
            del open_round.changes[client_id]
        if in_round and not open_round.has_answer(client_id):
            self._leave_out(client_id, "it has left the federation")
        if not forget:
            return
        state.last_round.pop(client_id, None)
        for record in state.history:
            forget_client(record, client_id)
        if in_round and client_id not in open_round.forgotten:
            open_round.forgotten.append(client_id)

    # Which rounds there are

    def planned_rounds(self) -> list[tuple[str, ...]]:
        """
        Clients of every round from the open or next one to the last, if all are available and none comes or leaves.

        Raises:
            `ValueError`: `settings.num_rounds` is `None`, so there is no last one.
        """
        if self.settings.num_rounds is None:
            raise ValueError("`num_rounds` is None: the federation has no fixed end, so its rounds cannot be planned.")
        opened = [] if self.state.open is None else [tuple(self.state.open.client_ids)]
        first = self.state.rounds_done + len(opened)
        return opened + [self._plan(round_index) for round_index in range(first, self.settings.num_rounds)]

    def schedule_steps(self) -> int | None:
        """Length of the learning rate schedule in local steps, or `None` if the federation has no fixed end."""
        state, num_rounds = self.state, self.settings.num_rounds
        if num_rounds is None:
            return None
        if state.open is None:
            return state.schedule_start + sum(map(self._longest, self.planned_rounds()))
        try:
            later = [self._longest(client_ids) for client_ids in self.planned_rounds()[1:]]
        except TooFewClientsError:  # Clients have left, or have yet to come back to a server that was restarted.
            later = [state.open.num_steps] * (num_rounds - state.rounds_done - 1)
        return state.schedule_start + state.open.num_steps + sum(later)

    def sample(self, round_index: int) -> tuple[str, ...]:
        """Clients of a round if all are available, whether or not it has been."""
        return self._plan(round_index)

    def _longest(self, client_ids: Collection[str]) -> int:
        return max(self.clients[client_id].num_steps for client_id in client_ids)

    def _plan(self, round_index: int) -> tuple[str, ...]:
        key = (self.settings, round_index)
        if key not in self._planned:
            self._planned[key] = self._sample(round_index, self.clients)
        return self._planned[key]

    def _sample(self, round_index: int, available: Collection[str]) -> tuple[str, ...]:
        num_rows = {c: info.num_rows for c, info in self.clients.items() if c in available}
        settings = self.settings
        check_enough_clients(round_index, settings.clients_per_round, len(num_rows), registered=len(self.clients))
        sampler = self._sampler or seeded_sampler(settings.seed, settings.client_sampling)
        return ask_sampler(sampler, round_index, num_rows, settings.clients_per_round)

    # A round

    def sent(self, names: Collection[str] | None = None) -> Tensors:
        """What is shared, or some of it, as it travels: in the dtypes that clients train in."""
        names = self.shared if names is None else names
        return {key: self.shared[key].to(self._dtypes.get(key, torch.float32)) for key in names}

    def lacks(self, client_id: str) -> frozenset[str]:
        """Names of the shared tensors that have changed since a client was last sent them: all that it needs now."""
        seen, changed = self.state.seen.get(client_id), self.state.changed
        return frozenset(
            name for name in self.shared if seen is None or changed.get(self.sharing.factors[name], 0) > seen
        )

    def message_to(self, client_id: str, broadcast: Broadcast) -> Broadcast:
        """What a client is sent that keeps what it was sent before: [`lacks`] of a broadcast, and no other's name."""
        return replace(broadcast.to(client_id), shared={k: broadcast.shared[k] for k in sorted(self.lacks(client_id))})

    def _bytes_to(self, client_ids: Collection[str]) -> int:
        sent = self.sent()
        return sum(count_bytes({name: sent[name] for name in self.lacks(client_id)}) for client_id in client_ids)

    def _returned(self, round_index: int) -> list[str]:
        """Names of what clients return from a round, in the order of those that are shared."""
        returned = self.sharing.returned(self.sharing.method.trained(round_index))
        return [name for name in self.shared if name in returned]

    def _sent_to_train(self) -> Tensors:
        """What clients return from the open round, as it was sent to them."""
        return self.sent(self._returned(self.state.open.round_index))

    def begin_round(self, available: Collection[str] | None = None) -> tuple[tuple[str, ...], Broadcast]:
        """
        Samples a round's clients. Asked again before [`end_round`], it gives the same round.

        Args:
            available (`Collection[str]`, *optional*):
                Clients that can be reached. Those that are not registered are not sampled. `None` means all.

        Returns:
            `tuple[tuple[str, ...], Broadcast]`: the round's clients, sorted, and what each of them is sent.

        Raises:
            [`TooFewClientsError`]: fewer clients are available than `settings.clients_per_round`, or none.
            `TypeError`, `ValueError`: `sampler` did not return clients.
        """
        if self.state.open is None:
            index = self.state.rounds_done
            client_ids = self._plan(index) if available is None else self._sample(index, available)
            self.schedule_steps()  # A sampler that fails in a later round does so before this one is open.
            self._aggregator = self.settings.new_aggregator()  # `settings` may have been replaced.
            self.state.open = OpenRound(
                round_index=index,
                client_ids=list(client_ids),
                num_clients=len(self.clients),
                num_steps=self._longest(client_ids),
                bytes_down=self._bytes_to(client_ids),
            )
        open_round = self.state.open
        return tuple(open_round.client_ids), Broadcast(
            round_index=open_round.round_index,
            shared=self.sent(),
            trained=self.sharing.method.trained(open_round.round_index),
            last_counted={client_id: self.state.last_round.get(client_id) for client_id in open_round.client_ids},
            schedule_start=self.state.schedule_start,
            schedule_steps=self.schedule_steps(),
            run_id=self.state.run_id,
        )

    def receive(self, update: Update) -> str | None:
        """
        Takes in a client's update: adds it to the average, or leaves it out.

        Returns:
            `str` or `None`: why it does not count. If the client is not in `state.open.left_out` then, the update was
            refused, and nothing has changed.
        """
        expected = {} if self.state.open is None else self._sent_to_train()
        if (reason := refuse_update(update, self.state.open, expected)) is not None:
            return reason
        client_id = update.client_id
        returned = {key: tensor.detach().cpu() for key, tensor in update.shared.items()}
        fault = update.fault
        if fault is None:
            weight, loss = as_float(update.weight), as_float(update.metrics["loss"])
            fault = judge(returned, expected, loss, self.settings.max_update_norm)
        if fault is not None:
            self._leave_out(client_id, fault)
            return fault
        if self._compares_clients:
            before, change = norm_and_change(expected, returned)
            self.state.open.changes[client_id] = [change, update.num_steps]
            if change > JUDGED_FROM * before:
                self._held[client_id] = clone_tensors(returned)
                self.state.open.held[client_id] = [weight, loss]
                return None
        self._count(client_id, returned, weight, loss)
        return None

    @property
    def _compares_clients(self) -> bool:
        """Whether large changes of A are compared to those of the round's other clients, once all are known."""
        return self.settings.max_update_norm == "auto" and self.state.open.num_clients > 1

    def _count(self, client_id: str, returned: Tensors, weight: float, loss: float) -> None:
        open_round = self.state.open
        open_round.weights[client_id], open_round.losses[client_id] = weight, loss
        if returned:
            open_round.bytes_up += count_bytes(returned)
            self._aggregator.add(client_id, returned, weight)
        last = self.state.last_round.get(client_id)
        open_round.staleness[client_id] = None if last is None else open_round.round_index - last

    def _leave_out(self, client_id: str, fault: str) -> None:
        self.state.open.left_out[client_id] = fault
        logger.warning("Client %s is left out of round %d: %s.", client_id, self.state.open.round_index, fault)

    def _faults_of_held(self) -> dict[str, str]:
        """Clients among those held back that stand out from the round's others, and why."""
        if not self._compares_clients:
            return {}
        changes = {client_id: (change, steps) for client_id, (change, steps) in self.state.open.changes.items()}
        norm = float(nn.utils.get_total_norm([tensor.float() for tensor in self._sent_to_train().values()]))
        faults = outliers(changes, norm=norm)
        return {client_id: faults[client_id] for client_id in sorted(self._held) if client_id in faults}

    def _judge_held(self) -> None:
        """At the round's end, so that it does not matter in which order clients answer, nor in which process."""
        faults = self._faults_of_held()
        for client_id, returned in sorted(self._held.items()):
            weight, loss = self.state.open.held.pop(client_id)
            if client_id in faults:
                self._leave_out(client_id, faults[client_id])
            else:
                self._count(client_id, returned, weight, loss)
        self._held = {}

    def reduce(self, all_reduce: Callable[[torch.Tensor], torch.Tensor], gather: Callable[[list], list]) -> None:
        """
        Adds up the round over several processes, of which each has a replica of the server that received the updates
        of its own clients. Called once, before [`end_round`], in all of them; the replicas are equal after it.

        Args:
            all_reduce (`Callable[[torch.Tensor], torch.Tensor]`):
                Sum over processes of a tensor on the CPU, on the CPU.
            gather (`Callable[[list], list]`):
                The lists of all processes as one.
        """
        open_round = self._open_round()
        if self._compares_clients:
            changes = {client_id: (change, steps) for client_id, (change, steps) in open_round.changes.items()}
            open_round.changes = {c: list(change) for part in gather([changes]) for c, change in part.items()}
        self._judge_held()
        if returned := self._returned(open_round.round_index):
            self._aggregator.reduce(all_reduce, gather, like={key: self.shared[key] for key in returned})
        names = ("losses", "weights", "left_out", "staleness")
        everyone = gather([{"bytes_up": open_round.bytes_up, **{name: getattr(open_round, name) for name in names}}])
        for name in names:
            setattr(open_round, name, {c: value for part in everyone for c, value in part[name].items()})
        open_round.bytes_up = sum(part["bytes_up"] for part in everyone)

    def all_left_out(self) -> str | None:
        """What to tell the user if every client that has answered in the open round is left out, else `None`."""
        open_round = self._open_round()
        faults = self._faults_of_held()
        return problem_of_everyone(open_round, faults)

    def withdraw(self) -> None:
        """Takes the round back from clients that have not answered and were sent nothing: it has been cut short."""
        open_round = self._open_round()
        open_round.bytes_down -= self._bytes_to([c for c in open_round.client_ids if not open_round.has_answer(c)])

    def end_round(self, seconds: float, step: int | None = None) -> dict[str, Any] | None:
        """
        Makes the average the new A, if enough clients are in it, and the round a record of `state.history`.

        Args:
            seconds (`float`):
                Wall time of the round, since the last restart if there was one.
            step (`int`, *optional*):
                The Trainer's step, to be recorded.

        Returns:
            `dict` or `None`: the record. `None` if nobody took a step: the round is as if it had not begun.
        """
        state, open_round = self.state, self._open_round()
        self._judge_held()
        aggregator, self._aggregator = self._aggregator, self.settings.new_aggregator()
        if not open_round.weights and not open_round.left_out:
            state.open = None
            return None
        needed, by = self.settings.min_clients_per_round, "min_clients_per_round"
        if self._returned(open_round.round_index) and aggregator.min_clients > needed:
            needed, by = aggregator.min_clients, "aggregator"
        counted = len(open_round.weights) >= needed
        if counted:
            result = aggregator.result()
            before = {key: self.shared[key] for key in result}
            new, self._optimizer_state = self.settings.optimizer().apply(before, result, self._optimizer_state)
            self.shared = {key: new.get(key, tensor) for key, tensor in self.shared.items()}
            state.changed |= {self.sharing.factors[key]: state.rounds_done + 1 for key in new}
            state.last_round.update(dict.fromkeys(open_round.weights, open_round.round_index))
        else:
            logger.warning(does_not_count(open_round, f"{by}={getattr(self.settings, by)}", needed))
        record = round_metrics(
            round_index=open_round.round_index,
            losses=open_round.losses,
            weights=open_round.weights,
            left_out=open_round.left_out,
            staleness=open_round.staleness,
            counted=counted,
            bytes_down=open_round.bytes_down,
            bytes_up=open_round.bytes_up,
            seconds=open_round.seconds + seconds,
        )
        answered = [c for c in (*open_round.weights, *open_round.left_out) if c in self.clients]
        state.seen |= dict.fromkeys(answered, open_round.round_index)
        for client_id in open_round.forgotten:
            state.last_round.pop(client_id, None)
            forget_client(record, client_id)
        if step is not None:
            record["step"] = step
        record["shared_sha256"] = tensors_sha256(self.shared)
        state.history.append(record)
        state.schedule_start += open_round.num_steps
        state.open = None
        return record

    def _open_round(self) -> OpenRound:
        if self.state.open is None:
            raise RuntimeError("No round is open. Call `begin_round` first.")
        return self.state.open

    # What it holds, as a value

    def restart(self, run_id: str) -> None:
        """Begins a new run from A as it is: no round is done, and no client has taken part."""
        self.initial_shared = clone_tensors(self.shared)
        self.state = ServerState(run_id=run_id)
        self._aggregator = self.settings.new_aggregator()
        self._optimizer_state = self.settings.optimizer().init(self.shared)
        self._held: dict[str, Tensors] = {}

    def state_dict(self) -> tuple[Tensors, dict[str, Any]]:
        """
        All that [`load_state_dict`] needs, also in the middle of a round. The clients are not part of it.

        Returns:
            `tuple[dict[str, torch.Tensor], dict]`: the tensors, which are not copies, and plain JSON.
        """
        aggregated, entries = self._aggregator.state()
        parts = {"shared": self.shared, "initial_shared": self.initial_shared, **aggregated}
        parts["optimizer"] = self._optimizer_state
        parts |= {f"held|{client_id}": tensors for client_id, tensors in self._held.items()}
        tensors = {f"{part}|{key}": tensor for part, named in parts.items() for key, tensor in named.items()}
        state = {**asdict(self.state), **entries, "server_optimizer": self.settings.server_optimizer}
        return tensors, {**state, "fingerprint": copy.deepcopy(self.fingerprint)}

    def load_state_dict(self, tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any]) -> None:
        """
        Goes on where another server stood, bit for bit.

        Raises:
            `ValueError`: the tensors or the entries are not those of a server of this federation.
        """
        values, parts, aggregator = copy.deepcopy(dict(state)), split_names(tensors), self.settings.new_aggregator()
        try:
            fingerprint, optimizer = values.pop("fingerprint"), values.pop("server_optimizer")
            opened = values["open"]
            returned = self._returned(opened["round_index"]) if opened else []
            aggregator.load_state(parts, values, opened["weights"] if returned else ())
            loaded = ServerState.from_dict(values)
            held = {} if loaded.open is None else {c: parts.pop(f"held|{c}") for c in loaded.open.held}
            # Of no tensors there is no part.
            shared, initial_shared = (parts.pop(name) if self.shared else {} for name in ("shared", "initial_shared"))
            added = [named for named in aggregator.state()[0].values() if named]
            for named in (shared, initial_shared):
                check_same_shapes(named, self.shared)
            optimizer_state, saved = self.settings.optimizer().init(shared), parts.pop("optimizer", {})
            if optimizer == self.settings.server_optimizer:  # That of another one would be of no use.
                check_same_shapes(saved, optimizer_state)
                optimizer_state = clone_tensors(saved)
            for named in (*held.values(), *added):
                check_same_shapes(named, {key: self.shared[key] for key in returned})
        except (KeyError, TypeError) as error:
            raise ValueError(f"This is not the state of a server of this version: {error!r}.") from error
        if parts:
            raise ValueError(
                f"The tensors {sorted(parts)[0]!r} are not those of a server in this state, with "
                f"`aggregator={self.settings.aggregator!r}`."
            )
        if None not in (self.fingerprint, fingerprint) and self.fingerprint != fingerprint:
            raise ValueError("The clients of that server have another fingerprint than those of this one.")
        order = list(self.shared)
        self.shared, self.initial_shared = (
            clone_tensors({key: named[key] for key in order}, dtype=torch.float32)
            for named in (shared, initial_shared)
        )
        self._held = {client_id: clone_tensors(named) for client_id, named in held.items()}
        self._aggregator, self._optimizer_state = aggregator, optimizer_state
        self.state = loaded
        if fingerprint is not None:
            self.fingerprint = fingerprint
