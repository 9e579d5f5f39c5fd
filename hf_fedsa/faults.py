"""Which updates must not count, and why."""

import math
from collections.abc import Mapping
from statistics import median_low

import torch
from torch import nn

# Measured on a tiny Llama in 210 federations of 3 to 10 clients with skewed words and 1 to 60 rows: up to 60 steps,
# Adam at rates of 1e-4 to 0.1 and SGD at 1e-3 to 1, warmup, weight decay and kept optimizer states among them. B
# starts at zero, so at first A moves with the square of the steps: of those beyond `JUDGED_FROM`, honest clients
# were up to 22 times the median of their round in all and per step, but with the square up to 1.7 times (Adam), 2.2
# times (SGD) and 5.5 times (SGD at rate 1). The same holds for B, were it shared. One of those without clipped
# gradients, at rate 1, stood out. Scaled by 10, and with as many steps as the others, an update was found in all
# cases with Adam at 5e-4 and more, in 3 of 4 with SGD at 0.1 and more; where steps were as unequal as 1 to 60, in a
# third to a half. At lower rates it is too small to be judged. Scaled by 2 or 5, few were; one that is turned around
# is no matter of size, nor is noise of an honest one. Noise of the norm of A is found wherever the median is less
# than a sixth of that.
JUDGED_FROM = 0.05

MOST_OF_MEDIAN = 6.0

MOST_OF_NORM = 30.0

FEWEST_TO_COMPARE = 3


def check_max_update_norm(max_update_norm: float | str | None) -> None:
    """
    Checks a limit on the change of A.

    Raises:
        `TypeError`, `ValueError`: it is neither a positive number, `"auto"` nor `None`.
    """
    if max_update_norm in (None, "auto"):
        return
    if not isinstance(max_update_norm, (int, float)):
        raise TypeError(
            f"`max_update_norm` must be a number, 'auto' or None, got {max_update_norm!r} of type "
            f"{type(max_update_norm).__name__}."
        )
    if not max_update_norm > 0:
        raise ValueError(
            f"`max_update_norm` must be a positive number, or None for no limit, got {max_update_norm!r}."
        )


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
    median change, in all, per local step, and per local step squared: whoever takes more steps goes further, and while
    B grows from zero, faster and faster. (The number of steps is the client's own word.) Smaller changes are taken for
    ones that would just allow for `JUDGED_FROM`, as that of one step from `B = 0` says nothing. Of fewer than
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
    least = JUDGED_FROM / MOST_OF_MEDIAN * norm
    of_clients = [_measures(max(change, least), steps) for change, steps in changes.values()]
    limits = [MOST_OF_MEDIAN * median_low(values) for values in zip(*of_clients, strict=True)]
    typical = median_low(change for change, _ in changes.values())
    return {
        client_id: f"its A has changed by {change:.3g}, more than {MOST_OF_MEDIAN:g} times the median of the round's "
        f"{len(changes)} clients, {typical:.3g}"
        for client_id, (change, steps) in changes.items()
        if change > JUDGED_FROM * norm
        and all(value > limit for value, limit in zip(_measures(change, steps), limits, strict=True))
    }


def _measures(change: float, steps: int) -> tuple[float, float, float]:
    # Divided twice: the square of a number of steps that somebody has made up may be too large for a float.
    return change, change / steps, change / steps / steps


def norm_and_change(sent: Mapping[str, torch.Tensor], returned: Mapping[str, torch.Tensor]) -> tuple[float, float]:
    """Norm of what a client was sent, and of how far from it is what the client returned."""
    before = nn.utils.get_total_norm([tensor.float() for tensor in sent.values()])
    change = nn.utils.get_total_norm([returned[key].float() - tensor.float() for key, tensor in sent.items()])
    return float(before), float(change)
