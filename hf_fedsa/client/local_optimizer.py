"""One optimizer and schedule for many clients: a client's state reset or kept, the rate rewound per wave."""

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers.training_args import OptimizerNames

from .slots import Slots

# Schedulers that follow a metric are stepped by evaluations, not by optimizer steps.
SCHEDULES_BY_METRIC = ("reduce_lr_on_plateau", "greedy")

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


def refuse_optimizer(optim: OptimizerNames, keeps_state: bool, num_clients: int) -> None:
    """
    Refuses an optimizer whose state cannot be reset, or kept, for one client of several that use it in turn.

    Raises:
        `ValueError`: says which of the two, and what to do.
    """
    if optim in _STEPS_IN_BACKWARD:
        raise ValueError(
            f"`optim='{optim.value}'` updates the weights within the backward pass, where the gradients of one "
            "client cannot be clipped by themselves and its state cannot be told from the next client's. Use another "
            "one, such as 'adamw_torch'."
        )
    if reason := _WRONG_IN_TURN.get(optim):
        raise ValueError(f"`optim='{optim.value}'` {reason}. Use another optimizer, such as 'adamw_torch'.")
    if keeps_state and optim in _STATE_CANNOT_BE_KEPT:
        raise ValueError(
            f"`reset_optimizer=False` keeps the optimizer state of every client, but that of `optim="
            f"'{optim.value}'` is not made of plain tensors and numbers. Set `reset_optimizer=True`, or use "
            "another optimizer, such as 'adamw_torch'."
        )
    if keeps_state and num_clients > 1 and optim.value.startswith("schedule_free"):
        refuse_kept_weights(optim.value)


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


class LocalOptimizer:
    """
    The Trainer's one optimizer and schedule, as many clients use them in turn and side by side.

    A client's optimizer state is reset, or taken out and put back, when a slot changes hands. The schedule follows the
    client's own steps: every wave of a round begins where the round began.

    Args:
        slots ([`Slots`]):
            The slots whose parameters the optimizer holds.
        resets (`bool`):
            Whether a client starts each round with a fresh state.
        keeps (`bool`):
            Whether a client's state waits with its B for its next round.
        steps_schedule (`bool`):
            Whether the schedule is one of local steps, and not the Trainer's own or one that follows a metric.
        many (`bool`):
            Whether there is more than one client.
    """

    def __init__(self, slots: Slots, *, resets: bool, keeps: bool, steps_schedule: bool, many: bool):
        self.slots = slots
        self.resets, self.keeps, self.steps_schedule, self.many = resets, keeps, steps_schedule, many
        self.optimizer: torch.optim.Optimizer | None = None
        self.schedule: LRScheduler | None = None
        # State of the schedule when the open round began.
        self.round_start: dict[str, Any] | None = None
        self._fresh: list[dict[str, Any]] | None = None
        # What the optimizer had counted in a group when its client last took a step.
        self._counts: dict[int, dict[str, Any]] = {}

    # The Trainer's objects

    @property
    def is_noted(self) -> bool:
        """Whether [`note`] has seen the optimizer."""
        return self._fresh is not None

    def note(self, optimizer: torch.optim.Optimizer) -> None:
        """
        Keeps what the optimizer's groups hold as long as it is fresh. A subclass may have made it.

        Raises:
            `ValueError`: it does not hold the parameters of all slots, or its state cannot be kept.
        """
        self.optimizer = optimizer
        if self._fresh is not None:
            return
        known = {id(p) for group in optimizer.param_groups for p in group["params"]}
        slots = [p for slot in self.slots.parameters for p in slot.values() if p.requires_grad]
        if any(id(p) not in known for p in slots):
            raise ValueError(
                "The optimizer passed in `optimizers` or made by `create_optimizer` does not hold the parameters of "
                "all slots, which the trainer makes. Pass `optimizer_cls_and_kwargs` instead, or set "
                "`parallel_clients=1`."
            )
        if not self.resets and self.many and self.trains_other_weights:
            refuse_kept_weights(type(self._inner).__name__)
        if self._counts_by_client:
            split_groups(self._inner, self.slots.parameters)
        self._fresh = copy.deepcopy(optimizer.state_dict()["param_groups"])

    def use(self, optimizer: torch.optim.Optimizer, schedule: LRScheduler) -> None:
        """Works with these from now on: the Trainer wraps what it has made."""
        self.optimizer, self.schedule = optimizer, schedule

    @property
    def _inner(self) -> torch.optim.Optimizer:
        return getattr(self.optimizer, "optimizer", self.optimizer)

    @property
    def _counts_by_client(self) -> bool:
        """Whether clients side by side have counts of their own in the optimizer's groups."""
        return not self.resets and len(self.slots) > 1

    @property
    def trains_other_weights(self) -> bool:
        """Whether the optimizer holds other weights while it trains than those to be used: it is schedule-free."""
        return callable(getattr(self._inner, "eval", None))

    @contextlib.contextmanager
    def weights_to_be_used(self, training: Sequence[int]) -> Iterator[None]:
        """
        Within this context the slots in training hold the weights that clients serve with, where others are trained.

        Afterwards all is bit for bit as it was: an optimizer that converts them there and back rounds twice.
        """
        if not training or not self.trains_other_weights:
            yield
            return
        before = {slot: self.slots.take(slot) for slot in training}
        groups = [{k: v for k, v in group.items() if k != "params"} for group in self._inner.param_groups]
        self._inner.eval()
        try:
            yield
        finally:
            for group, entries in zip(self._inner.param_groups, groups, strict=True):
                group.update(entries)
            for slot, tensors in before.items():
                self.slots.load(slot, tensors)

    def end_wave(self) -> None:
        """Leaves the weights in the slots that clients serve with."""
        if self.trains_other_weights:
            self._inner.eval()

    # A client's state

    def reset(self) -> None:
        """Forgets all of the optimizer's state."""
        self._set_state({})

    def begin_wave(self, states: Mapping[int, Mapping[str, torch.Tensor]]) -> None:
        """Resets the optimizer's state, or loads that of the clients which have one, by slot."""
        self._counts = {}
        if self.resets:
            self._set_state({})
        elif self.keeps:
            self._load(states)

    def take(self, slot: int) -> dict[str, torch.Tensor]:
        """
        A slot's optimizer state as tensors, numbers among them as tensors without dimensions.

        What the optimizer counts in the slot's parameter groups is named `group|<number>|...`.
        """
        saved = self.optimizer.state_dict()
        taken = {
            f"{key}|{name}": value.detach().cpu().clone() if isinstance(value, torch.Tensor) else torch.tensor(value)
            for (owner, key), position in self._entries().items()
            if owner == slot
            for name, value in flatten_state(saved["state"].get(position, {}))
        }
        for number, index in enumerate(groups_of(self.optimizer, self.slots.parameters[slot])):
            changed = counters(saved["param_groups"][index], self._fresh[index])
            taken |= {f"group|{number}|{name}": value for name, value in changed.items()}
        return taken

    def keep_counts(self, in_use: Sequence[int], trained: Sequence[int]) -> None:
        """Undoes what an optimizer counted for clients that were not in the step. It counts steps, not gradients."""
        if not self._counts_by_client:
            return
        for slot in in_use:
            for index in groups_of(self.optimizer, self.slots.parameters[slot]):
                group = self.optimizer.param_groups[index]
                if slot in trained or index not in self._counts:
                    self._counts[index] = counted(group)
                else:
                    group.update(counted(self._counts[index]))

    def begin_step(self, in_use: Sequence[int]) -> None:
        """Takes note of what is counted when a wave begins."""
        if not self._counts:
            self.keep_counts(in_use, trained=())

    def _load(self, states: Mapping[int, Mapping[str, torch.Tensor]]) -> None:
        state: dict[int, dict[str, Any]] = {}
        counts: dict[int, dict[str, Any]] = {}
        entries = self._entries()
        for slot, tensors in states.items():
            groups = groups_of(self.optimizer, self.slots.parameters[slot])
            for name, value in tensors.items():
                if name.startswith("group|"):
                    _, number, entry_name = name.split("|", maxsplit=2)
                    counts.setdefault(groups[int(number)], {}).update(counters_from({entry_name: value}))
                    continue
                key, *fields, last = name.split("|")
                entry = state.setdefault(entries[slot, key], {})
                for field in fields:
                    entry = entry.setdefault(field, {})
                # Integer tensors without dimensions were Python numbers: torch's own step counters are floats.
                number = value.dim() == 0 and not value.is_floating_point()
                entry[last] = value.item() if number else value
        self._set_state(state, counts)

    def _entries(self) -> dict[tuple[int, str], int]:
        """Position of every slot's parameters in the optimizer's state dict, as `(slot, key) -> position`."""
        ordered = [p for group in self.optimizer.param_groups for p in group["params"]]
        position = {id(p): i for i, p in enumerate(ordered)}
        return {
            (slot, key): position[id(p)]
            for slot, parameters in enumerate(self.slots.parameters)
            for key, p in parameters.items()
            if id(p) in position
        }

    def _set_state(
        self, state: dict[int, dict[str, Any]], counts: Mapping[int, Mapping[str, Any]] | None = None
    ) -> None:
        """Replaces all of the optimizer's state, and what it counts in its groups. Learning rates stay."""
        pairs = zip(self.optimizer.state_dict()["param_groups"], self._fresh, strict=True)
        groups = [renewed(group, copy.deepcopy(fresh)) for group, fresh in pairs]
        for index, entries in (counts or {}).items():
            groups[index].update(entries)
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})

    # The schedule

    def begin_round(self) -> None:
        """Remembers where the schedule is, for the round's further waves."""
        if self.steps_schedule:
            self.round_start = copy.deepcopy(self.schedule.state_dict())

    def rewind(self) -> None:
        """Takes the schedule back to where the round began."""
        if self.steps_schedule:
            self.schedule.load_state_dict(copy.deepcopy(self.round_start))
            self._set_rates(self.schedule.get_last_lr())

    def advance(self, num_steps: int) -> None:
        """Takes the schedule on by local steps that nobody here has taken."""
        if self.steps_schedule:
            for _ in range(num_steps):
                self.schedule.step()

    def move_to(self, position: int) -> None:
        """
        Puts the schedule at a local step, counted over all rounds, wherever it is.

        Raises:
            `ValueError`: it lies behind, and the schedule is no function of the step alone.
        """
        if not self.steps_schedule or self.schedule.last_epoch == position:
            return
        if isinstance(self.schedule, LambdaLR):
            self.schedule.load_state_dict(self._at(position))
            self._set_rates(self.schedule.get_last_lr())
        elif position > self.schedule.last_epoch:
            self.advance(position - self.schedule.last_epoch)
        else:
            raise ValueError(
                f"The round begins at local step {position} of the schedule, and a {type(self.schedule).__name__} "
                f"that stands at {self.schedule.last_epoch} cannot go back. Use a schedule of `lr_scheduler_type`."
            )

    def _set_rates(self, rates: Sequence[float]) -> None:
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

    def _at(self, position: int) -> dict[str, Any]:
        """State of the schedule at a local step, counted over all rounds."""
        schedule = self.schedule
        rates = [rate * f(position) for rate, f in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
        return {**copy.deepcopy(schedule.state_dict()), "last_epoch": position, "_last_lr": rates}

    # Resuming

    def load_schedule(self, saved: Mapping[str, Any]) -> None:
        """Takes over the position of a saved schedule, of a run that may have had more or fewer slots."""
        self.schedule.load_state_dict(fit_groups(saved, self.schedule.state_dict()))
        self._set_rates(self.schedule.get_last_lr())

    def go_on(self, changed: bool) -> None:
        """
        Goes on by this run's own schedule and settings from where the saved one stood.

        Args:
            changed (`bool`):
                Whether arguments differ from those of the saved run, and the optimizer's are to be the present ones.
        """
        if self.round_start is not None:
            self.round_start = fit_groups(self.round_start, self.schedule.state_dict())
        if not isinstance(self.schedule, LambdaLR):
            return
        if changed:
            for group, fresh in zip(self.optimizer.param_groups, self._fresh, strict=True):
                group.update({k: copy.deepcopy(v) for k, v in fresh.items() if k != "params"}, initial_lr=fresh["lr"])
            self.schedule.base_lrs = [fresh["lr"] for fresh in self._fresh]
        if self.round_start is not None:
            self.round_start = self._at(self.round_start["last_epoch"])
        self.schedule.load_state_dict(self._at(self.schedule.last_epoch))
        self._set_rates(self.schedule.get_last_lr())
