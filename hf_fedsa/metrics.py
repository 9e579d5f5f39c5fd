"""Mean and spread over clients; a round's record and its log line."""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean, pstdev
from typing import Any


def round_metrics(
    round_index: int,
    losses: Mapping[str, float],
    weights: Mapping[str, float],
    left_out: Mapping[str, str],
    staleness: Mapping[str, int | None],
    counted: bool,
    bytes_down: int,
    bytes_up: int,
    seconds: float,
) -> dict[str, Any]:
    """
    Entry of `trainer.round_history` and line of `rounds.jsonl`.

    Args:
        round_index (`int`):
            Round, counted from 0.
        losses (`Mapping[str, float]`):
            Per client, the mean training loss over its local steps, in nats per token for language models.
        weights (`Mapping[str, float]`):
            Per client, its weight in the average of A, before normalisation.
        left_out (`Mapping[str, str]`):
            Clients whose update does not count, and why.
        staleness (`Mapping[str, int | None]`):
            Per client, the rounds since it had last trained, `None` if it never had.
        counted (`bool`):
            Whether A is the new average. Too few clients returned an update otherwise.
        bytes_down (`int`), bytes_up (`int`):
            Bytes of the tensors sent to and received from all clients of the round together.
        seconds (`float`):
            Wall time of the round.
    """
    return {
        "round": round_index,
        "clients": sorted(losses),
        "losses": {client_id: losses[client_id] for client_id in sorted(losses)},
        "weights": {client_id: weights[client_id] for client_id in sorted(weights)},
        "left_out": {client_id: left_out[client_id] for client_id in sorted(left_out)},
        "staleness": {client_id: staleness[client_id] for client_id in sorted(staleness)},
        "counted": counted,
        "bytes_down": bytes_down,
        "bytes_up": bytes_up,
        "seconds": round(seconds, 3),
    }


# Entries of a round's record that are by client, the evaluation's results included.
_BY_CLIENT = ("losses", "weights", "left_out", "staleness", "results")


def names_client(metrics: Mapping[str, Any], client_id: str) -> bool:
    """Whether a round's record says anything of a client."""
    return client_id in metrics["clients"] or any(client_id in metrics.get(name, ()) for name in _BY_CLIENT)


def forget_client(metrics: dict[str, Any], client_id: str) -> None:
    """Deletes a client's name and numbers from a round's record."""
    metrics["clients"] = [other for other in metrics["clients"] if other != client_id]
    for name in _BY_CLIENT:
        metrics.get(name, {}).pop(client_id, None)


def over_clients(values: Sequence[float], mean: Callable[[Sequence[float]], float] = fmean) -> dict[str, float]:
    """
    Mean, population standard deviation and extremes of a number over clients: `mean`, `std`, `min` and `max`.

    There is no `std` if a value is not finite, and nothing if there is no client.
    """
    if not values:
        return {}
    std = {"std": pstdev(values)} if all(map(math.isfinite, values)) else {}
    return {"mean": mean(values), **std, "min": min(values), "max": max(values)}


def _plain_mean(values: Sequence[float]) -> float:
    # Its last bit may differ from that of `fmean`.
    return sum(values) / len(values)


def log_line(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a round that go to the log: one line whatever the number of clients."""
    losses = over_clients(list(metrics["losses"].values()), mean=_plain_mean)
    stale = over_clients([rounds for rounds in metrics["staleness"].values() if rounds is not None], mean=_plain_mean)
    names = {"mean": "round_loss", "std": "round_loss_std", "min": "round_loss_best", "max": "round_loss_worst"}
    return {
        "round": metrics["round"],
        **{name: losses[key] for key, name in names.items() if key in losses},
        "round_clients": len(metrics["losses"]),
        "round_clients_left_out": len(metrics["left_out"]),
        **({"round_staleness": stale["mean"], "round_staleness_worst": stale["max"]} if stale else {}),
        "round_bytes_down": metrics["bytes_down"],
        "round_bytes_up": metrics["bytes_up"],
        "round_seconds": metrics["seconds"],
    }


# An evaluation of more clients than this is logged as mean and spread. `rounds.jsonl` has the numbers of each.
MOST_CLIENTS_IN_LOG = 10


def spread(by_name: Mapping[str, list[Any]], prefix: str) -> dict[str, float]:
    """Mean, standard deviation and extremes over clients of every metric that is a number."""
    logs: dict[str, float] = {}
    for name, values in by_name.items():
        if all(isinstance(value, (int, float)) for value in values):
            for key, number in over_clients(values).items():
                logs[f"{prefix}_{name}" if key == "mean" else f"{prefix}_{name}_{key}"] = number
    return {**logs, f"{prefix}_clients": max(map(len, by_name.values()))}


def mean_over_rounds(history: Sequence[Mapping[str, Any]]) -> float | None:
    """Mean training loss over rounds and clients, or `None` if no update has counted."""
    losses = [loss for record in history for loss in record["losses"].values()]
    return fmean(losses) if losses else None


def rounds_jsonl(history: Iterable[Mapping[str, Any]]) -> str:
    """`rounds.jsonl`: one line per round."""
    return "".join(json.dumps(record) + "\n" for record in history)
