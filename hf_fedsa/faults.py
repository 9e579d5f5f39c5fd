"""Which updates must not count, and why."""

import math
from collections.abc import Mapping
from statistics import median_low

import torch
from torch import nn

# What honest clients of a tiny Llama change, of 2 to 60 rows, with Adam at rates of 1e-4 to 0.5, in 1 to 60 steps: up
# to 0.15 times the norm of A at ordinary rates, which nobody needs to look at, and 28 times at a rate of 0.5. Beyond
# `JUDGED_FROM`, never more than 2.8 times the median of their round, however unequal the clients were.
JUDGED_FROM = 0.5

MOST_OF_MEDIAN = 5.0

MOST_OF_NORM = 30.0

FEWEST_TO_COMPARE = 3


def judge(
    returned: Mapping[str, torch.Tensor],
    received: Mapping[str, torch.Tensor],
    loss: float,
    max_update_norm: float | str | None,
    *,
    local: Mapping[str, torch.Tensor] | None = None,
) -> str | None:
    """
    Why one client's update must not count, whatever the others return, or `None`.

    The client asks before it keeps its B, and the server again.

    Args:
        returned (`Mapping[str, torch.Tensor]`):
            The client's A after its local steps. Empty if A is not trained.
        received (`Mapping[str, torch.Tensor]`):
            The A it was sent.
        loss (`float`):
            Its training loss.
        max_update_norm (`float` or `str`, *optional*):
            Largest change of A, as a multiple of the norm of the A it was sent. `None` and `"auto"` set no limit of
            its own, see [`outliers`] for the latter.
        local (`Mapping[str, torch.Tensor]`, *optional*):
            The client's B after its local steps, where it is known.
    """
    if not math.isfinite(loss):
        return f"its loss is {loss}"
    if not torch.isfinite(nn.utils.get_total_norm([*returned.values(), *(local or {}).values()])):
        return "its update is not finite"
    if not returned or max_update_norm in (None, "auto"):
        return None
    before, change = norm_and_change(received, returned)
    # A that starts at zero, as that of embeddings does, has no scale to compare to.
    if before > 0 and change > max_update_norm * before:
        return (
            f"its A has changed by {change / before:.3g} times the norm it had, more than "
            f"`max_update_norm={max_update_norm}`"
        )
    return None


def outliers(changes: Mapping[str, tuple[float, int]], norm: float) -> dict[str, str]:
    """
    Clients whose change of A stands out from that of a round's other clients.

    A client is one if its change is larger than `JUDGED_FROM` times the norm of A and than `MOST_OF_MEDIAN` times the
    median change, in all and per local step: whoever takes more steps goes further. Of fewer than
    `FEWEST_TO_COMPARE` clients, each is compared to `MOST_OF_NORM` times the norm of A.

    Args:
        changes (`Mapping[str, tuple[float, int]]`):
            Per client of the round, the Frobenius norm of its change over all layers, and its local steps.
        norm (`float`):
            Norm of the A they were sent. If it is 0, there is nothing but the other clients to compare to.

    Returns:
        `dict[str, str]`: why, for each of them. It does not depend on the order of the clients.
    """
    if len(changes) < FEWEST_TO_COMPARE:
        limit = MOST_OF_NORM * norm
        return {
            client_id: f"its A has changed by {change / norm:.3g} times the norm it had, more than {MOST_OF_NORM:g}"
            for client_id, (change, _) in changes.items()
            if norm > 0 and change > limit
        }
    typical = median_low(change for change, _ in changes.values())
    typical_per_step = median_low(change / steps for change, steps in changes.values())
    return {
        client_id: f"its A has changed by {change:.3g}, more than {MOST_OF_MEDIAN:g} times the median of the round's "
        f"{len(changes)} clients, {typical:.3g}"
        for client_id, (change, steps) in changes.items()
        if change > JUDGED_FROM * norm
        and change > MOST_OF_MEDIAN * typical
        and change / steps > MOST_OF_MEDIAN * typical_per_step
    }


def norm_and_change(sent: Mapping[str, torch.Tensor], returned: Mapping[str, torch.Tensor]) -> tuple[float, float]:
    """Norm of what a client was sent, and of how far from it is what the client returned."""
    before = nn.utils.get_total_norm([tensor.float() for tensor in sent.values()])
    change = nn.utils.get_total_norm([returned[key].float() - tensor.float() for key, tensor in sent.items()])
    return float(before), float(change)
