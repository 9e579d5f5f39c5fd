"""Mean and spread over clients; a round's record and its log line."""

import json
import math
from collections.abc import Iterable, Mapping
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


def rounds_jsonl(rounds: Iterable[Mapping[str, Any]]) -> str:
    """Contents of `rounds.jsonl`: one line per round."""
    return "".join(json.dumps(entry) + "\n" for entry in rounds)


def log_line(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a round that go to the log: one line whatever the number of clients."""
    losses = list(metrics["losses"].values())
    stale = [rounds for rounds in metrics["staleness"].values() if rounds is not None]
    return {
        "round": metrics["round"],
        "round_loss": sum(losses) / len(losses),
        "round_loss_std": pstdev(losses),
        "round_loss_best": min(losses),
        "round_loss_worst": max(losses),
        "round_clients": len(losses),
        "round_clients_left_out": len(metrics["left_out"]),
        **({"round_staleness": sum(stale) / len(stale), "round_staleness_worst": max(stale)} if stale else {}),
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
            logs[f"{prefix}_{name}"] = fmean(values)
            if all(map(math.isfinite, values)):
                logs[f"{prefix}_{name}_std"] = pstdev(values)
            logs[f"{prefix}_{name}_min"], logs[f"{prefix}_{name}_max"] = min(values), max(values)
    return {**logs, f"{prefix}_clients": max(map(len, by_name.values()))}
