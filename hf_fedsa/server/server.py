"""The server's part of a round: it samples, sends, receives, aggregates, records."""

import copy
import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from ..faults import JUDGED_FROM, judge, norm_and_change, outliers
from ..files import validate_client_ids
from ..messages import Broadcast, ClientInfo, Tensors, Update
from ..metrics import forget_client, round_metrics
from ..tensors import clone_tensors, count_bytes, tensors_sha256
from .admission import as_float, refuse_client, refuse_update
from .aggregation import WeightedMean
from .sampling import ClientSampler, TooFewClientsError, ask_sampler, seeded_sampler
from .state import OpenRound, ServerSettings, ServerState, check_same_shapes, split_names

logger = logging.getLogger(__name__)


class Server:
    """
    The server of a federation. It holds A and never a model, a row or a client's B.

    A round is [`begin_round`], [`receive`] for every client's update in whatever order they come, and [`end_round`].
    What it holds between two calls is a value ([`state_dict`]), so it can stop and go on anywhere.

    Args:
        shared (`dict[str, torch.Tensor]`):
            A, copied to fp32 on the CPU.
        clients (`Mapping[str, ClientInfo]`):
            The clients by their ids. More may come, see [`register`].
        settings (`ServerSettings`):
            May be replaced between rounds.
        sampler (`ClientSampler`, *optional*):
            Chooses the clients of a round in place of `settings.client_sampling`.
        dtypes (`Mapping[str, torch.dtype]`, *optional*):
            Per tensor, the dtype that clients train in, in which it travels. `None` means fp32.
        run_id (`str`, *optional*, defaults to `""`):
            Names the run.

    Attributes:
        shared, initial_shared (`dict[str, torch.Tensor]`):
            A as it is, and as it was at the beginning of the run. `shared` may be replaced between rounds.
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
        sampler: ClientSampler | None = None,
        dtypes: Mapping[str, torch.dtype] | None = None,
        run_id: str = "",
    ):
        self.shared = clone_tensors(shared, dtype=torch.float32)
        self.settings = settings
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
                update that is held back is dropped. It also works for a client that has left before.
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
        wanted = self.settings.clients_per_round
        if len(num_rows) < (wanted or 1):
            raise TooFewClientsError(
                f"Round {round_index} needs {wanted or 1} clients (`clients_per_round={wanted}`), but of the "
                f"{len(self.clients)} that are registered {len(num_rows)} are available. Wait for more, or lower "
                "`clients_per_round`."
            )
        sampler = self._sampler or seeded_sampler(self.settings.seed, self.settings.client_sampling)
        return ask_sampler(sampler, round_index, num_rows, wanted)

    # A round

    def sent(self) -> Tensors:
        """A as it travels: in the dtypes that clients train in."""
        return {key: tensor.to(self._dtypes.get(key, tensor.dtype)) for key, tensor in self.shared.items()}

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
        sent = self.sent()
        if self.state.open is None:
            index = self.state.rounds_done
            client_ids = self._plan(index) if available is None else self._sample(index, available)
            self.schedule_steps()  # A sampler that fails in a later round does so before this one is open.
            self.state.open = OpenRound(
                round_index=index,
                client_ids=list(client_ids),
                num_clients=len(self.clients),
                num_steps=self._longest(client_ids),
                bytes_down=len(client_ids) * count_bytes(sent),
            )
        open_round = self.state.open
        return tuple(open_round.client_ids), Broadcast(
            round_index=open_round.round_index,
            shared=sent,
            trained=("A", "B") if self.settings.trains_shared else ("B",),
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
        expected = self.shared if self.settings.trains_shared else {}
        if (reason := refuse_update(update, self.state.open, expected)) is not None:
            return reason
        client_id = update.client_id
        sent = self.sent() if expected else {}
        returned = {key: tensor.detach().cpu() for key, tensor in update.shared.items()}
        fault = update.fault
        if fault is None:
            weight, loss = as_float(update.weight), as_float(update.metrics["loss"])
            fault = judge(returned, sent, loss, self.settings.max_update_norm)
        if fault is not None:
            self._leave_out(client_id, fault)
            return fault
        if self._compares_clients:
            before, change = norm_and_change(sent, returned)
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
        if self.settings.trains_shared:
            open_round.bytes_up += count_bytes(returned)
            self._mean.add(returned, weight)
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
        norm = float(nn.utils.get_total_norm([tensor.float() for tensor in self.sent().values()]))
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
        if self.settings.trains_shared:
            keys = sorted(self.shared)
            total = self._mean.total_weight
            sums = [self._mean.mean.get(key, torch.zeros_like(self.shared[key])) * total for key in keys]
            flat = torch.cat([*(tensor.flatten() for tensor in sums), torch.tensor([total], dtype=torch.float32)])
            flat = all_reduce(flat)
            if (weight := float(flat[-1])) > 0:
                parts = (flat[:-1] / weight).split([self.shared[key].numel() for key in keys])
                mean = {k: part.view_as(self.shared[k]) for k, part in zip(keys, parts, strict=True)}
                self._mean = WeightedMean(mean, weight)
        names = ("losses", "weights", "left_out", "staleness")
        everyone = gather([{"bytes_up": open_round.bytes_up, **{name: getattr(open_round, name) for name in names}}])
        for name in names:
            setattr(open_round, name, {c: value for part in everyone for c, value in part[name].items()})
        open_round.bytes_up = sum(part["bytes_up"] for part in everyone)

    def all_left_out(self) -> str | None:
        """What to tell the user if every client that has answered in the open round is left out, else `None`."""
        open_round = self._open_round()
        faults = self._faults_of_held()
        left_out = {**open_round.left_out, **faults}
        if open_round.weights or len(faults) < len(self._held) or not left_out:
            return None
        client_id, fault = next(iter(left_out.items()))
        return (
            f"All {len(left_out)} clients of round {open_round.round_index} were left out, such as {client_id!r}: "
            f"{fault}. A and every B are as they were before the round, and so is what was saved. If losses are not "
            "finite, lower `learning_rate` or look at the rows. If rows cannot be read, the log says why."
        )

    def withdraw(self) -> None:
        """Takes the round back from clients that have not answered and were sent nothing: it has been cut short."""
        open_round = self._open_round()
        unanswered = sum(not open_round.has_answer(client_id) for client_id in open_round.client_ids)
        open_round.bytes_down -= unanswered * count_bytes(self.sent())

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
        mean, self._mean = self._mean.mean, WeightedMean()
        if not open_round.weights and not open_round.left_out:
            state.open = None
            return None
        counted = len(open_round.weights) >= self.settings.min_clients_per_round
        if counted:
            if self.settings.trains_shared:
                self.shared = {key: mean[key] for key in self.shared}
            state.last_round.update(dict.fromkeys(open_round.weights, open_round.round_index))
        else:
            logger.warning(
                "Round %d does not count: %d clients returned an update, and `min_clients_per_round=%d`. A stays as "
                "it was.",
                open_round.round_index,
                len(open_round.weights),
                self.settings.min_clients_per_round,
            )
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
        self._mean = WeightedMean()
        self._held: dict[str, Tensors] = {}

    def state_dict(self) -> tuple[Tensors, dict[str, Any]]:
        """
        All that [`load_state_dict`] needs, also in the middle of a round. The clients are not part of it.

        Returns:
            `tuple[dict[str, torch.Tensor], dict]`: the tensors, which are not copies, and plain JSON.
        """
        parts = {"shared": self.shared, "initial_shared": self.initial_shared, "mean": self._mean.mean}
        parts |= {f"held|{client_id}": tensors for client_id, tensors in self._held.items()}
        tensors = {f"{part}|{key}": tensor for part, named in parts.items() for key, tensor in named.items()}
        state = {
            **asdict(self.state),
            "mean_weight": self._mean.total_weight,
            "fingerprint": copy.deepcopy(self.fingerprint),
        }
        return tensors, state

    def load_state_dict(self, tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any]) -> None:
        """
        Goes on where another server stood, bit for bit.

        Raises:
            `ValueError`: the tensors or the entries are not those of a server of this federation.
        """
        values, parts = copy.deepcopy(dict(state)), split_names(tensors)
        try:
            weight, fingerprint = values.pop("mean_weight"), values.pop("fingerprint")
            loaded = ServerState.from_dict(values)
            held = {} if loaded.open is None else {c: parts.pop(f"held|{c}") for c in loaded.open.held}
            mean = parts.pop("mean", {})
            shared, initial_shared = parts.pop("shared"), parts.pop("initial_shared")
            for named in (shared, initial_shared, *held.values(), *([mean] if mean else [])):
                check_same_shapes(named, self.shared)
        except (KeyError, TypeError) as error:
            raise ValueError(f"This is not the state of a server of this version: {error!r}.") from error
        if parts:
            raise ValueError(f"The tensors {sorted(parts)[0]!r} are not those of a server in this state.")
        if None not in (self.fingerprint, fingerprint) and self.fingerprint != fingerprint:
            raise ValueError("The clients of that server have another fingerprint than those of this one.")
        order = list(self.shared)
        self.shared, self.initial_shared = (
            clone_tensors({key: named[key] for key in order}, dtype=torch.float32)
            for named in (shared, initial_shared)
        )
        self._held = {client_id: clone_tensors({key: t[key] for key in order}) for client_id, t in held.items()}
        self._mean = WeightedMean(mean, weight)
        self.state = loaded
        if fingerprint is not None:
            self.fingerprint = fingerprint
