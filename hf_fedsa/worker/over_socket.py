"""A resident worker's transport: it reads requests of a federation elsewhere, refuses, queues and answers them."""

import dataclasses
import hashlib
import json
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..files import validate_client_ids, write_json
from ..messages import Broadcast, ClientInfo, MessageError, Update, from_bytes, to_bytes
from ..run_lock import RunLock, RunLockError
from ..tensors import tensors_sha256
from ..transport import Host
from .connection import FlatMessage, WorkerError, pack, refuse_writable, unpack
from .flat import from_flat, in_layout, to_flat
from .listener import WorkerSocket
from .outbox import Outbox

logger = logging.getLogger(__name__)

RUN = "run.json"
# A request may be this many times as long as what is shared, and in any case this long, in bytes.
MOST_TIMES = 4
MOST_AT_LEAST = 64 << 20


@dataclass(eq=False)
class _Request:
    """One client's part in a round or an evaluation, and what will come of it for all who asked."""

    client_id: str
    broadcast: Broadcast
    together: int = 1
    arrived: float = field(default_factory=time.monotonic)
    future: "Future[Any]" = field(default_factory=Future)

    def __post_init__(self) -> None:
        values = dataclasses.asdict(dataclasses.replace(self.broadcast, shared={}))
        counted = values.pop("last_counted").get(self.client_id)
        # Clients that are sent the same can train side by side, whichever round counted last for each.
        self.sent = _sha256([values, tensors_sha256(self.broadcast.shared)])
        self.identity = {
            "run_id": self.broadcast.run_id,
            "round_index": self.broadcast.round_index,
            "sha256": _sha256([self.sent, counted]),
        }

    def fail(self, reason: str) -> None:
        if not self.future.done():
            self.future.set_exception(WorkerError(reason))


class OverSocket:
    """
    Brings a worker the rounds of a federation whose server is elsewhere, as other processes ask for them through
    [`WorkerConnection`].

    In the folder are `worker.key` and `worker.json` while it listens, `outbox/` with the last update of each client,
    and `run.json` with the run they belong to.

    Args:
        folder (`str` or `Path`):
            The worker's own folder. Other users of the machine must not be able to write to it.
        wait (`float`, *optional*, defaults to `2.0`):
            How long, in seconds, a round waits for the other clients that its requests say live here too.

    Raises:
        `ValueError`: `wait` is negative.
    """

    def __init__(self, folder: str | Path, *, wait: float = 2.0):
        if not wait >= 0:
            raise ValueError(f"`wait={wait!r}` must be 0 or more seconds: it is how long a round waits for clients.")
        self.folder = Path(folder)
        self.wait = wait
        self._lock = RunLock({"folder": self.folder / "outbox"})
        self._socket: WorkerSocket | None = None
        # Guards everything below, and tells of each change.
        self._changed = threading.Condition()
        self._why_closed: str | None = "The worker is not at work."
        self._waiting: list[_Request] = []
        self._evaluations: list[_Request] = []
        self._training: dict[str, _Request] = {}
        self._opened: tuple[str, set[str]] = ("", set())

    # For the trainer, in the thread that trains.

    def connect(self, host: Host) -> None:
        """
        Listens for requests, from now until `close`.

        Raises:
            [`RunLockError`]: another worker is at work in the folder.
            `PermissionError`: other users of the machine could connect.
            `ValueError`: there are no clients, an id cannot name a file, or `run.json` is damaged.
        """
        infos, like = host.client_infos(), host.shared_like()
        if not infos:
            raise ValueError("A worker without clients has nothing to answer with: `client_infos()` is empty.")
        validate_client_ids(info.client_id for info in infos)
        self._host = host
        self._infos = {info.client_id: info for info in infos}
        self._like = {key: torch.empty_like(tensor, device="meta") for key, tensor in like.items()}
        numbers = sum(tensor.numel() * max(4, tensor.element_size()) for tensor in like.values())
        for folder in (self.folder, self.folder / "outbox"):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            refuse_writable(folder)
        try:
            self._lock.acquire()
        except RunLockError as error:
            raise RunLockError(f"`folder={str(self.folder)!r}` has a worker already. {error}") from error
        try:
            self._run_id = _read_run(self.folder / RUN)
            self._outbox = Outbox(self.folder / "outbox")
            self._why_closed, self._opened = None, ("", set())
            self._socket = WorkerSocket(self.folder, self._reply, max(MOST_AT_LEAST, MOST_TIMES * numbers))
        except BaseException:
            self._lock.release()
            raise

    def expected_rounds(self) -> None:
        return None  # They are the server's to plan.

    def check_plan(self, rounds: Sequence[Sequence[str]]) -> None:
        pass

    def open_round(self) -> tuple[tuple[str, ...], Broadcast] | None:
        """
        Waits for requests, evaluates clients meanwhile, and returns the clients of one round that ask to train, and
        what they were sent. `None` if the worker has been told to stop.
        """
        with self._changed:
            while self._why_closed is None:
                if self._evaluations:
                    self._evaluate(self._evaluations[0])
                    continue
                together, patience = self._gather()
                if together and patience <= 0:
                    return self._open(together)
                self._changed.wait(patience if together else None)
        return None

    def send(self, update: Update) -> None:
        """
        Keeps an update in the outbox, and answers whoever asked for it.

        Raises:
            `ValueError`: this client's update in this round was not asked for.
            `OSError`: it could not be written. It is not answered then.
            [`RunLockError`]: another worker has taken over the folder.
        """
        with self._changed:
            request = self._training.get(update.client_id)
            if request is None or request.broadcast.round_index != update.round_index:
                raise ValueError(
                    f"The update of client {update.client_id!r} in round {update.round_index} answers no request. "
                    f"Send one update per client of the open round ({', '.join(sorted(self._training)) or 'none is'})."
                )
        self._lock.check()
        data = to_bytes(update)
        self._outbox.put(update.client_id, request.identity, data)
        with self._changed:
            del self._training[update.client_id]
            if not request.future.done():
                request.future.set_result(data)

    def close_round(self, seconds: float, step: int | None = None) -> None:
        """Records nothing, which is the server's part. Requests left unanswered are answered with an error."""
        with self._changed:
            for request in self._training.values():
                request.fail(
                    f"Round {request.broadcast.round_index} ended in the worker without an update of the client "
                    f"{request.client_id!r}. The log of the worker says why."
                )
            self._training.clear()

    def close(self) -> None:
        """Answers all who wait that the worker has ended, and removes key and socket."""
        if self._socket is None:
            return
        self._end("The worker has ended, finished or by an error that its own log shows. Start it again.")
        self.close_round(0.0)
        self._socket.close()
        self._socket = None
        self._lock.release()

    def _evaluate(self, request: _Request) -> None:
        self._changed.release()
        try:
            found = self._host.evaluate(request.client_id, request.broadcast.shared)
            metrics = {name: float(value) for name, value in found.items()}
        except Exception as error:
            logger.warning("The evaluation of client %r failed.", request.client_id, exc_info=True)
            reason = f"The evaluation of client {request.client_id!r} failed in the worker: {error!r}"
        else:
            reason = None
        finally:
            self._changed.acquire()
        if request in self._evaluations:
            self._evaluations.remove(request)
            request.fail(reason) if reason else request.future.set_result(metrics)

    def _gather(self) -> tuple[list[_Request], float]:
        """Requests that were sent the same as the one that came first, and the seconds to wait for more of them."""
        if not self._waiting:
            return [], 0.0
        first = self._waiting[0]
        together = [request for request in self._waiting if request.sent == first.sent]
        opened_before = self._opened[1] if self._opened[0] == first.sent else set()
        here = len(opened_before | {request.client_id for request in together})
        if here >= max(request.together for request in together):
            return together, 0.0
        return together, first.arrived + self.wait - time.monotonic()

    def _open(self, together: list[_Request]) -> tuple[tuple[str, ...], Broadcast]:
        self._waiting = [request for request in self._waiting if request not in together]
        self._training = {request.client_id: request for request in together}
        sent, client_ids = together[0].sent, set(self._training)
        self._opened = sent, client_ids | (self._opened[1] if self._opened[0] == sent else set())
        last_counted = {
            client_id: request.broadcast.last_counted[client_id]
            for client_id, request in self._training.items()
            if client_id in request.broadcast.last_counted
        }
        return tuple(sorted(client_ids)), dataclasses.replace(together[0].broadcast, last_counted=last_counted)

    def _end(self, reason: str) -> None:
        with self._changed:
            self._why_closed = reason
            for request in [*self._waiting, *self._evaluations]:
                request.fail(reason)
            self._waiting.clear()
            self._evaluations.clear()
            self._changed.notify_all()

    # For the socket, in a thread of each connection.

    def _reply(self, frame: bytes) -> bytes:
        try:
            header, payload = unpack(frame)
            kind = _value(header, "kind", str)
            if kind not in _KINDS:
                raise WorkerError(f"A worker knows no request `kind={kind!r:.50}`. It knows {', '.join(_KINDS)}.")
            return _KINDS[kind](self, header, payload)
        except (WorkerError, MessageError) as error:
            return pack({"error": str(error)})
        except Exception as error:
            logger.warning("A request to the worker failed.", exc_info=True)
            return pack({"error": f"The worker could not answer the request: {error!r}. Its own log shows where."})

    def _reply_infos(self, header: Mapping[str, Any], payload: bytes) -> bytes:
        return pack({"infos": [dataclasses.asdict(info) for info in self._infos.values()]})

    def _reply_stop(self, header: Mapping[str, Any], payload: bytes) -> bytes:
        self._end("The worker has been told to stop, and opens no round any more. Start it again.")
        return pack({})

    def _reply_evaluate(self, header: Mapping[str, Any], payload: bytes) -> bytes:
        request = self._request(header, payload)
        with self._changed:
            self._refuse_late()
            self._refuse_run(request.broadcast.run_id)
            self._evaluations.append(request)
            self._changed.notify_all()
        return pack({"metrics": request.future.result()})

    def _reply_train(self, header: Mapping[str, Any], payload: bytes) -> bytes:
        update = self._update(self._request(header, payload))
        if "layout" not in header:
            return pack({}, update)
        flat = to_flat(from_bytes(update))
        return pack({"values": flat.values, "layout": flat.layout}, flat.array)

    def _request(self, header: Mapping[str, Any], payload: bytes) -> _Request:
        info = self._infos.get(_value(header, "client_id", str))
        if info is None:
            raise WorkerError(
                f"`client_id={header['client_id']!r:.100}` does not live in this worker, which has "
                f"{', '.join(sorted(self._infos))}. Ask the worker of that client."
            )
        if header.get("fingerprint") is not None:
            _refuse_differing(_value(header, "fingerprint", dict), info)
        if "layout" in header:
            flat = FlatMessage(_value(header, "values", dict), payload, _value(header, "layout", str))
            broadcast = from_flat(Broadcast, flat, self._like)
        else:
            broadcast = in_layout(from_bytes(payload), self._like)
        return _Request(info.client_id, broadcast, _value(header, "together", int) if "together" in header else 1)

    def _update(self, request: _Request) -> bytes:
        """The update that answers a request: the one that there is, or that is in the making, or a new one."""
        client_id = request.client_id
        with self._changed:
            self._refuse_late()
            self._refuse_run(request.broadcast.run_id)
            if self._run_id != request.broadcast.run_id:
                write_json(self.folder / RUN, {"run_id": request.broadcast.run_id})
                self._run_id = request.broadcast.run_id
            if (update := self._outbox.get(client_id, request.identity)) is not None:
                return update
            others = [other for other in [*self._training.values(), *self._waiting] if other.client_id == client_id]
            same = next((other for other in others if other.identity == request.identity), None)
            if same is None:
                self._append(request, others)
        return (same or request).future.result()

    def _append(self, request: _Request, others: list[_Request]) -> None:
        client_id, round_index = request.client_id, request.broadcast.round_index
        newest = max([self._outbox.round_index(client_id), *(other.broadcast.round_index for other in others)])
        if round_index < newest:
            raise WorkerError(
                f"The request is for round {round_index}, but the client {client_id!r} has gone on to round {newest}, "
                "and so has what it does not share. Go on from that round, or begin another run with a new worker."
            )
        if (reason := self._host.refuse(client_id, request.broadcast)) is not None:
            raise WorkerError(reason)
        for other in others:
            if other in self._waiting:
                self._waiting.remove(other)
                other.fail(
                    f"Another request, for round {round_index}, has taken the place of this one for round "
                    f"{other.broadcast.round_index} of the client {client_id!r}, which had not begun to train."
                )
        self._waiting.append(request)
        self._changed.notify_all()

    def _refuse_late(self) -> None:
        if self._why_closed is not None:
            raise WorkerError(self._why_closed)

    def _refuse_run(self, run_id: str) -> None:
        untrained = self._outbox.is_empty() and not self._waiting and not self._training
        if run_id != self._run_id and self._run_id is not None and not untrained:
            raise WorkerError(
                f"The request is of the run {run_id!r:.100}, but the clients of this worker train in the run "
                f"{self._run_id!r} ({self.folder / RUN}), and what they do not share does not fit another. Go on with "
                "that run, or start a worker for this one, with a folder and a client store of its own."
            )


_KINDS: dict[str, Callable[[OverSocket, Mapping[str, Any], bytes], bytes]] = {
    "evaluate": OverSocket._reply_evaluate,
    "infos": OverSocket._reply_infos,
    "stop": OverSocket._reply_stop,
    "train": OverSocket._reply_train,
}


def _refuse_differing(fingerprint: dict[str, Any], info: ClientInfo) -> None:
    found = _first_difference(fingerprint, json.loads(json.dumps(info.fingerprint)))
    if found is not None:
        name, there, here = found
        raise WorkerError(
            f"The server and the client {info.client_id!r} differ in `{name}`: {there!r:.200} there, {here!r:.200} "
            "here. All clients of a federation need the same: start the worker with what the server has."
        )


def _first_difference(there: Any, here: Any, name: str = "") -> tuple[str, Any, Any] | None:
    if not (isinstance(there, dict) and isinstance(here, dict)):
        return None if there == here else (name, there, here)
    for key in sorted(there.keys() | here.keys()):
        inner = f"{name}.{key}" if name else key
        if (found := _first_difference(there.get(key), here.get(key), inner)) is not None:
            return found
    return None


def _read_run(path: Path) -> str | None:
    if not path.exists():
        return None
    try:
        return _value(json.loads(path.read_text(encoding="utf-8")), "run_id", str)
    except (ValueError, AttributeError, WorkerError) as error:
        raise ValueError(
            f"{path} is damaged ({error}). It names the run that the clients of this worker belong to: write the "
            '`run_id` of the server into it, as {"run_id": "..."}.'
        ) from error


def _value(values: Mapping[str, Any], name: str, kind: type) -> Any:
    value = values.get(name)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise WorkerError(f"`{name}={value!r:.50}` in a request to a worker must be of type {kind.__name__}.")
    return value


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
