"""Which clients and updates a server does not take in, and why."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from ..files import validate_client_ids
from ..fit import first_difference
from ..messages import ClientInfo, Update
from .state import OpenRound

# Dtypes that a client may train in.
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def refuse_client(info: ClientInfo, client_ids: Iterable[str], fingerprint: Mapping[str, Any] | None) -> str | None:
    """
    Why a client cannot be one of a federation, or `None`.

    Args:
        info (`ClientInfo`):
            The client.
        client_ids (`Iterable[str]`):
            The federation's clients.
        fingerprint (`Mapping[str, Any]`, *optional*):
            What they have in common. `None` if there is none to compare to.
    """
    same = [client_id for client_id in client_ids if client_id.casefold() == info.client_id.casefold()]
    try:
        validate_client_ids([*same, info.client_id])
    except ValueError as error:
        return str(error)
    for name in ("num_rows", "num_steps"):
        if getattr(info, name) < 1:
            return f"its `{name}` is {getattr(info, name)}. A client needs rows for at least one local step."
    if fingerprint is None:
        return None
    if difference := first_difference(fingerprint, info.fingerprint):
        name, ours, theirs = difference
        return (
            f"its `{name}` is {theirs!r:.200}, and that of the federation is {ours!r:.200}. All clients need the "
            "same base model and adapter."
        )
    return None


def refuse_update(update: Update, open_round: OpenRound | None, expected: Mapping[str, torch.Tensor]) -> str | None:
    """
    Why an update cannot be one of the open round, or `None`.

    Args:
        update (`Update`):
            The update.
        open_round (`OpenRound`, *optional*):
            The open round, if there is one.
        expected (`Mapping[str, torch.Tensor]`):
            Tensors of the names and shapes that it must have, unless there is a fault. Empty if A is not trained.
    """
    client_id = update.client_id
    if open_round is None:
        return f"it is of round {update.round_index}, and no round is open"
    if update.round_index != open_round.round_index:
        return f"it is of round {update.round_index}, and round {open_round.round_index} is open"
    if client_id not in open_round.client_ids:
        return f"client {client_id!r} was not sampled for round {open_round.round_index}"
    if open_round.has_answer(client_id):
        left_out = open_round.left_out.get(client_id)
        how = "has answered" if left_out is None else f"is left out ({left_out})"
        return f"client {client_id!r} {how} in round {open_round.round_index} already"
    return None if update.fault is not None else _refuse_contents(update, expected)


def _refuse_contents(update: Update, expected: Mapping[str, torch.Tensor]) -> str | None:
    if not 0 < as_float(update.weight) < math.inf:
        return f"its `weight` is {update.weight!r:.100}, not a positive number"
    if not 1 <= as_float(update.num_steps) < math.inf:
        return f"its `num_steps` is {update.num_steps!r:.100}: without a local step there is nothing to average"
    if "loss" not in update.metrics:
        return f"its `metrics` have no `loss`, but {sorted(update.metrics)}"
    if differing := sorted(expected.keys() ^ update.shared.keys()):
        if not expected:
            return f"it has {differing[0]!r}, and A is not trained here"
        where = "lacks" if differing[0] in expected else "has"
        return f"it {where} {differing[0]!r}, and must have the {len(expected)} tensors of the broadcast"
    for key, tensor in update.shared.items():
        if tensor.shape != expected[key].shape:
            return f"its {key!r} has shape {tuple(tensor.shape)}, and {tuple(expected[key].shape)} was sent"
        if tensor.dtype not in _DTYPES:
            return f"its {key!r} is {tensor.dtype}, in which nothing can be trained"
    return None


def problem_of_everyone(open_round: OpenRound, faults: Mapping[str, str]) -> str | None:
    """
    What to tell the user if every client that has answered in a round is left out, else `None`.

    Args:
        open_round (`OpenRound`):
            The round.
        faults (`Mapping[str, str]`):
            Clients whose update is held back and will not count, and why.
    """
    left_out = {**open_round.left_out, **faults}
    if open_round.weights or len(faults) < len(open_round.held) or not left_out:
        return None
    client_id, fault = next(iter(left_out.items()))
    return (
        f"All {len(left_out)} clients of round {open_round.round_index} were left out, such as {client_id!r}: "
        f"{fault}. What is shared and what clients keep are as they were before the round, and so is what was saved. "
        "If losses are not finite, lower `learning_rate` or look at the rows. If rows cannot be read, the log says "
        "why."
    )


def does_not_count(open_round: OpenRound, setting: str, needed: int) -> str:
    """What the log says of a round in which fewer clients have returned an update than a setting needs."""
    return (
        f"Round {open_round.round_index} does not count: {len(open_round.weights)} clients returned an update, and "
        f"`{setting}` needs {needed}. What is shared stays as it was."
    )


def as_float(value: float) -> float:
    """A number that came from elsewhere. An integer that is too large for a float is infinite."""
    try:
        return float(value)
    except OverflowError:
        return math.inf
