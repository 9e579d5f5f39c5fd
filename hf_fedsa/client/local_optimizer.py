"""One optimizer, many clients: what of its parameter groups is a client's, and which optimizers cannot be shared."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers.training_args import OptimizerNames

from ..config import FederatedConfig

# Entries of a parameter group that follow the schedule or say what the group is, not how far a client has come.
_NOT_COUNTED = ("params", "lr", "initial_lr")

# Optimizers that step inside the backward pass: no gradient is left to clip per client, and no state to reset.
_STEPS_IN_BACKWARD = (
    OptimizerNames.LOMO,
    OptimizerNames.ADALOMO,
    OptimizerNames.GALORE_ADAMW_LAYERWISE,
    OptimizerNames.GALORE_ADAMW_8BIT_LAYERWISE,
    OptimizerNames.GALORE_ADAFACTOR_LAYERWISE,
    OptimizerNames.APOLLO_ADAMW_LAYERWISE,
)

# Why others go wrong although they step where they should.
_WRONG_IN_TURN = {
    OptimizerNames.APOLLO_ADAMW: "keeps seeds in its state from the moment it is made, which are lost when the state "
    "is another client's",
    OptimizerNames.GROKADAMW: "takes steps whose size depends on a parameter's place among all, so that a client's "
    "training would depend on who trains beside it",
}

# Their states hold objects or tensors of their own kinds.
_STATE_CANNOT_BE_KEPT = (
    OptimizerNames.ADAMW_TORCH_4BIT,
    OptimizerNames.ADAMW_TORCH_8BIT,
    OptimizerNames.GALORE_ADAMW,
    OptimizerNames.GALORE_ADAMW_8BIT,
    OptimizerNames.GALORE_ADAFACTOR,
)


def refuse_optimizer(args: FederatedConfig, keeps_state: bool, num_clients: int) -> None:
    """
    Refuses an optimizer whose state cannot be reset, or kept, for one client of several that use it in turn.

    Raises:
        `ValueError`: says which of the two, and what to do.
    """
    if args.optim in _STEPS_IN_BACKWARD:
        raise ValueError(
            f"`optim='{args.optim.value}'` updates the weights within the backward pass, where the gradients of one "
            "client cannot be clipped by themselves and its state cannot be told from the next client's. Use another "
            "one, such as 'adamw_torch'."
        )
    if reason := _WRONG_IN_TURN.get(args.optim):
        raise ValueError(f"`optim='{args.optim.value}'` {reason}. Use another optimizer, such as 'adamw_torch'.")
    if keeps_state and args.optim in _STATE_CANNOT_BE_KEPT:
        raise ValueError(
            f"`reset_optimizer=False` keeps the optimizer state of every client, but that of `optim="
            f"'{args.optim.value}'` is not made of plain tensors and numbers. Set `reset_optimizer=True`, or use "
            "another optimizer, such as 'adamw_torch'."
        )
    if keeps_state and num_clients > 1 and args.optim.value.startswith("schedule_free"):
        refuse_kept_weights(args.optim.value)


def refuse_kept_weights(name: str) -> None:
    raise ValueError(
        f"`reset_optimizer=False` with the optimizer '{name}', whose state holds a second copy of the weights: it "
        "would pull A back to where the client left it, past the average. Set `reset_optimizer=True`."
    )


def split_groups(optimizer: torch.optim.Optimizer, slots: Sequence[Mapping[str, nn.Parameter]]) -> None:
    """
    Gives every slot parameter groups of its own, so that what an optimizer counts in a group is one client's.

    A step then takes as many calls per group as there are slots, which only clients that keep their state need.
    """
    slot_of = {id(p): slot for slot, parameters in enumerate(slots) for p in parameters.values()}
    groups = []
    for group in optimizer.param_groups:
        by_slot: dict[int | None, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            by_slot.setdefault(slot_of.get(id(parameter)), []).append(parameter)
        groups += [{**group, "params": parameters} for parameters in by_slot.values()]
    optimizer.param_groups[:] = groups


def fit_groups(saved: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """
    A saved state of a schedule for an optimizer with more or fewer parameter groups, as it has with other slots.

    Entries per group are the schedule's own, but for the present learning rate, which all groups have in common.
    """
    fitted = dict(saved)
    for name, values in saved.items():
        if isinstance(values, (list, tuple)) and len(values) != len(own[name]):
            fitted[name] = [values[0]] * len(own[name]) if name == "_last_lr" else own[name]
    return fitted


def groups_of(optimizer: torch.optim.Optimizer, slot: Mapping[str, nn.Parameter]) -> list[int]:
    """Places of a slot's parameter groups among all of the optimizer's."""
    own = {id(p) for p in slot.values()}
    return [i for i, group in enumerate(optimizer.param_groups) if any(id(p) in own for p in group["params"])]


def counted(group: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of what an optimizer may count in a parameter group."""
    return {
        name: value.clone() if isinstance(value, torch.Tensor) else value
        for name, value in group.items()
        if name not in _NOT_COUNTED
    }


def renewed(group: Mapping[str, Any], fresh: Mapping[str, Any]) -> dict[str, Any]:
    """A parameter group as it was when the optimizer was made, at the present learning rate."""
    return {**fresh, **{name: group[name] for name in _NOT_COUNTED if name in group}}


def counters(group: Mapping[str, Any], fresh: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """
    What has changed in a parameter group since the optimizer was made, as tensors. [`counters_from`] reads them.

    Raises:
        `ValueError`: an entry has changed that is neither a number nor a tensor.
    """
    changed: dict[str, torch.Tensor] = {}
    for name, value in group.items():
        if name in _NOT_COUNTED:
            continue
        if isinstance(value, torch.Tensor):
            changed[f"tensor|{name}"] = value.detach().cpu().clone()
        elif name not in fresh or value != fresh[name]:
            if not isinstance(value, (bool, int, float)):
                raise ValueError(
                    f"The optimizer keeps {name!r} in its parameter groups, a {type(value).__name__}, which cannot be "
                    "kept with a client. Set `reset_optimizer=True`."
                )
            # Python's floats have 64 bits.
            changed[f"number|{name}"] = torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else None)
    return changed


def counters_from(changed: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Entries of a parameter group from what [`counters`] returned."""
    entries = {}
    for kind_and_name, value in changed.items():
        kind, name = kind_and_name.split("|", maxsplit=1)
        entries[name] = value if kind == "tensor" else value.item()
    return entries


def flatten_state(state: Mapping[str, Any]) -> Iterator[tuple[str, torch.Tensor | int | float]]:
    """Leaves of an optimizer's entry for one parameter. Those of bitsandbytes have a dictionary inside."""
    for name, value in state.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}|{inner}", leaf) for inner, leaf in flatten_state(value))
        elif value is not None:
            yield name, value
