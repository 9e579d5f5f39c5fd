"""What travels between a server and its clients, as values and as bytes.

Bytes are a safetensors file: tensors of any dtype as they are, everything else as JSON in its header. Nothing is
pickled, so reading a message from elsewhere runs no code of theirs.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from .tensors import tensors_sha256

Tensors = dict[str, torch.Tensor]


class MessageError(ValueError):
    """Bytes that are no message, or one that was damaged on its way."""


@dataclass(frozen=True)
class Broadcast:
    """
    From the server to every client of a round.

    Args:
        round_index (`int`):
            Round, counted from 0.
        shared (`dict[str, torch.Tensor]`):
            The server's tensors, in the dtype that clients train in, under the keys PEFT saves them with.
        trained (`tuple[str, ...]`, *optional*, defaults to `("A", "B")`):
            Factors that train in this round.
        last_counted (`dict[str, int | None]`, *optional*):
            Per client of the round, the last round that counted for it, whose B is the one to start from. `None` if
            there was none.
        schedule_start (`int`, *optional*, defaults to `0`):
            Local steps that the learning rate schedule has behind it when the round begins. It is the same for all
            clients, so that one that sat out rounds is where the others are.
        schedule_steps (`int`, *optional*):
            Length of that schedule, in local steps. `None` if the federation has no fixed end.
        run_id (`str`, *optional*, defaults to `""`):
            Names the server's run, so that no client goes on with a B of another one.
    """

    round_index: int
    shared: Tensors
    trained: tuple[str, ...] = ("A", "B")
    last_counted: dict[str, int | None] = field(default_factory=dict)
    schedule_start: int = 0
    schedule_steps: int | None = None
    run_id: str = ""

    def to(self, client_id: str) -> "Broadcast":
        """What one client is sent. It does not learn from it who else takes part."""
        return replace(self, last_counted={client_id: self.last_counted.get(client_id)})


@dataclass(frozen=True)
class Update:
    """
    From a client to the server. This is all that leaves it.

    Args:
        client_id (`str`):
            The client.
        round_index (`int`):
            The round it trained in.
        shared (`dict[str, torch.Tensor]`):
            What is shared and was trained. Empty if there is a fault.
        weight (`float`):
            Different rows trained on, or 1. Its weight in the average.
        num_steps (`int`):
            Local steps taken.
        metrics (`dict[str, float]`, *optional*):
            Numbers to report; at least `loss`, the mean training loss over the local steps, in nats per token for
            language models.
        fault (`str`, *optional*):
            Why it does not count. The client's B is then as it was before the round.
    """

    client_id: str
    round_index: int
    shared: Tensors
    weight: float
    num_steps: int
    metrics: dict[str, float] = field(default_factory=dict)
    fault: str | None = None


@dataclass(frozen=True)
class ClientInfo:
    """
    From a client to the server, once: who it is, and whether it fits.

    Args:
        client_id (`str`):
            The client.
        num_rows (`int`):
            Its training rows.
        num_steps (`int`):
            Local steps it takes in a round.
        worker (`str`, *optional*, defaults to `""`):
            The resident process it lives in. Clients of one worker can train side by side.
        fingerprint (`dict[str, Any]`, *optional*):
            What must be equal on all clients: adapter, shapes, base model, hash of constants. Plain JSON.
    """

    client_id: str
    num_rows: int
    num_steps: int
    worker: str = ""
    fingerprint: dict[str, Any] = field(default_factory=dict)


Message = Broadcast | Update | ClientInfo
_KINDS: dict[str, type] = {kind.__name__: kind for kind in (Broadcast, Update, ClientInfo)}


def to_bytes(message: Message) -> bytes:
    """A message as bytes, see [`from_bytes`]."""
    tensors = {key: t.detach().cpu().contiguous() for key, t in getattr(message, "shared", {}).items()}
    values = {f.name: getattr(message, f.name) for f in fields(message) if f.name != "shared"}
    text = json.dumps(values, sort_keys=True)
    metadata = {"kind": type(message).__name__, "values": text, "sha256": _sha256(text, tensors)}
    return save(tensors, metadata=metadata)


def from_bytes(data: bytes) -> Message:
    """
    The message that [`to_bytes`] made bytes of, bit for bit.

    Raises:
        [`MessageError`]: the bytes are no message, were cut or changed on their way, or have a field of another type.
    """
    try:
        tensors = load(data)
        metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
        kind, text, digest = _KINDS[metadata["kind"]], metadata["values"], metadata["sha256"]
        values = {**json.loads(text)}
    except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise MessageError(f"{len(data)} bytes that are no whole message: {error!r}. Send it again.") from error
    if _sha256(text, tensors) != digest:
        raise MessageError(f"A `{kind.__name__}` of {len(data)} bytes was changed on its way. Send it again.")
    if kind is not ClientInfo:
        values["shared"] = tensors
    if isinstance(values.get("trained"), list):
        values["trained"] = tuple(values["trained"])
    _check(kind, values)
    return kind(**values)


def _sha256(text: str, tensors: Mapping[str, torch.Tensor]) -> str:
    return hashlib.sha256((text + tensors_sha256(tensors)).encode()).hexdigest()


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _dict_of(is_value: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(map(is_value, value.values()))


_TYPES: dict[str, Callable[[Any], bool]] = {
    "client_id": _is_text,
    "fault": lambda value: value is None or _is_text(value),
    "fingerprint": lambda value: isinstance(value, dict),
    "last_counted": _dict_of(lambda value: value is None or _is_int(value)),
    "metrics": _dict_of(_is_number),
    "num_rows": _is_int,
    "num_steps": _is_int,
    "round_index": _is_int,
    "run_id": _is_text,
    "schedule_start": _is_int,
    "schedule_steps": lambda value: value is None or _is_int(value),
    "shared": lambda value: isinstance(value, dict),
    "trained": lambda value: isinstance(value, tuple) and all(map(_is_text, value)),
    "weight": _is_number,
    "worker": _is_text,
}


def _check(kind: type, values: Mapping[str, Any]) -> None:
    names = {f.name for f in fields(kind)}
    if values.keys() != names:
        differing = sorted(values.keys() ^ names)
        raise MessageError(f"A `{kind.__name__}` differs in the field {differing[0]!r}. Both sides need one version.")
    for name, value in values.items():
        if not _TYPES[name](value):
            raise MessageError(f"The field `{name}` of a `{kind.__name__}` is {value!r:.100}, of the wrong type.")
