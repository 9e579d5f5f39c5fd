"""Adapters side by side on one base model: slot loading and the batched forward."""

import contextlib
import copy
import functools
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.tuners.vera import Linear as VeraLinear
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ..adapters import factor_of
from ..methods import METHODS, Method, Share, Sharing
from ..tensors import clone_tensors, load_tensors
from .parameters import adapter_kind, adapter_parameters, adapter_tensors, refuse_tied

# Initialisations that subtract the starting adapter from the base weight. They must run once, for the first slot.
MUTATING_INITS = ("pissa", "olora", "corda", "lora_ga", "loftq")

# Rows of a batch by slot: `((slot, number of rows), ...)`, in the order in which the rows stand.
SlotRows = tuple[tuple[int, int], ...]
BatchedForward = Callable[..., torch.Tensor]


def mutates_base(config) -> bool:
    """Whether creating an adapter with `config` changes the base weight."""
    init = getattr(config, "init_lora_weights", None)
    return isinstance(init, str) and init.lower().startswith(MUTATING_INITS)


class Slots:
    """
    `num_slots` adapters of one PEFT config on one base model, each an ordinary named PEFT adapter.

    Slot 0 is the adapter the model came with; the others are added as `slot_1`, `slot_2`, ... A client is loaded into
    a slot to train and its tensors are taken out after. Within [`Slots.rows`], one forward pass serves the rows of
    several clients, each through its own slot.

    Args:
        model ([`~peft.PeftModel`]):
            Model with exactly one adapter.
        num_slots (`int`):
            Number of clients that can train at the same time.
        method ([`Method`], *optional*, defaults to FedSA):
            Says which factors are shared.
        share_modules_to_save (`bool`, *optional*, defaults to `False`):
            Whether modules trained in full (`modules_to_save`) are shared rather than kept by each client.
        side_by_side (`bool`, *optional*, defaults to `True`):
            Whether layers are made to route rows to slots. Off, PEFT's own forward is left in place, and there can be
            one slot only.

    Raises:
        `ValueError`: the model has several adapters, or a tensor of the adapter is no known factor.
    """

    def __init__(
        self,
        model: PeftModel,
        num_slots: int,
        method: Method = METHODS["fedsa"],
        share_modules_to_save: bool = False,
        side_by_side: bool = True,
    ):
        if len(model.peft_config) != 1:
            raise ValueError(
                f"The model has the adapters {', '.join(model.peft_config)}, but slots are made from exactly one. "
                "Delete the others, or merge them into the base model first."
            )
        self.model = model
        first = next(iter(model.peft_config))
        self.config = model.peft_config[first]
        self.kind = adapter_kind(self.config)
        self.names: tuple[str, ...] = (first, *(f"slot_{index}" for index in range(1, num_slots)))
        refuse_tied(adapter_tensors(model, first))
        self.parameters: list[dict[str, nn.Parameter]] = [adapter_parameters(model, first)]
        modules_to_save = getattr(self.config, "modules_to_save", None)
        factors = {key: factor_of(key, self.kind, modules_to_save) for key in self.parameters[0]}
        self.sharing = Sharing(factors, method, share_modules_to_save)
        self._trainable = {key for key, parameter in self.parameters[0].items() if parameter.requires_grad}
        self._trained = self._trainable
        for name in self.names[1:]:
            self.parameters.append(self._add_adapter(name))
        if num_slots > 1:
            _save_one_client(model, self.names[1:])
        model.__deepcopy__ = functools.partial(_copy_model, model)
        self._routing = _Routing()
        # The adapter of slot 0, while another one is there to be looked at.
        self._displaced: dict[str, torch.Tensor] | None = None
        if side_by_side:
            for module in _outermost_adapter_layers(model):
                # Held as arguments, not closed over: a copy of the module then gets them copied along.
                module.forward = functools.partial(
                    _routed_forward, module, module.forward, _batched_forward_of(module), self._routing
                )

    def __len__(self) -> int:
        return len(self.names)

    def _add_adapter(self, name: str) -> dict[str, nn.Parameter]:
        config = copy.deepcopy(self.config)
        if mutates_base(config):
            config.init_lora_weights = True
        # The values drawn here are overwritten, so they must not move the global generator.
        with torch.random.fork_rng():
            self.model.add_adapter(name, config)
        parameters = adapter_parameters(self.model, name)
        for key, first in self.parameters[0].items():
            # TRL casts the adapter it creates (bf16 under QLoRA), and PEFT leaves added adapters frozen.
            parameters[key].data = first.data.clone()
            parameters[key].requires_grad_(first.requires_grad)
        return parameters

    # What trains

    def use(self, method: Method) -> None:
        """Shares by another method from now on."""
        self.sharing = Sharing(self.sharing.factors, method, self.sharing.share_heads)
        self.train(self.sharing.ever_trained)

    def train(self, keys: Collection[str]) -> None:
        """Lets these tensors train, in every slot, and no others."""
        trained = self._trainable & set(keys)
        if trained == self._trained:
            return
        self._trained = trained
        for parameters in self.parameters:
            for key, parameter in parameters.items():
                parameter.requires_grad_(key in self._trained)

    def keep_trained(self) -> None:
        """
        Lets slots train that were frozen as a whole, and keeps frozen what is to be.

        PEFT's `set_adapter` freezes all adapters but one, which it lets train altogether. It is also called where
        `disable_adapter` ends, so a look at the base model would end the training of every slot but the first.
        """
        for parameters in self.parameters:
            if not any(parameter.requires_grad for parameter in parameters.values()):
                for key in self._trained:
                    parameters[key].requires_grad_(True)
            for key in self._trainable - self._trained:
                parameters[key].requires_grad_(False)

    # Loading

    def load(self, slot: int, *tensors: Mapping[str, torch.Tensor]) -> None:
        """Writes a client's tensors (shared, local, or both) into a slot."""
        for part in tensors:
            load_tensors(self.parameters[slot], part)

    def take(self, slot: int, share: Share | None = None) -> dict[str, torch.Tensor]:
        """Copies a slot's tensors to the CPU, all of them or only the `"shared"` or `"local"` ones."""
        return clone_tensors(self.select(slot, share))

    def take_trained(self, slot: int) -> dict[str, torch.Tensor]:
        """Copies what trains in a slot to the CPU, also while another adapter is in its place to be looked at."""
        return clone_tensors(self._displaced) if slot == 0 and self._displaced is not None else self.take(slot)

    @contextlib.contextmanager
    def showing(self, tensors: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """Within this context the model has this adapter, in slot 0. Whoever trained there goes on afterwards."""
        before, outer = self.take(0), self._displaced
        self._displaced = outer if outer is not None else before
        try:
            self.load(0, tensors)
            with self.whole_batches(0):
                yield
        finally:
            self.load(0, before)
            self._displaced = outer

    @property
    def is_shown(self) -> bool:
        """Whether an adapter is in slot 0 to be looked at."""
        return self._displaced is not None

    def select(self, slot: int, share: Share | None = None) -> dict[str, nn.Parameter]:
        """The live parameters of a slot, all of them or only the `"shared"` or `"local"` ones."""
        share_of = self.sharing.share_of
        return {key: p for key, p in self.parameters[slot].items() if share is None or share_of[key] == share}

    # Side by side

    @contextlib.contextmanager
    def rows(self, slot_rows: SlotRows, sequence_length: int | None = None) -> Iterator[None]:
        """
        Within this context, the first rows of every batch go through the first slot named, and so on.

        It must enclose the backward pass too: activation checkpointing runs the forward pass again.

        Args:
            slot_rows (`tuple[tuple[int, int], ...]`):
                Slot and number of rows, in the order of the rows.
            sequence_length (`int`, *optional*):
                Tokens per row. Lets layers that see rows and tokens flattened into one axis tell the rows apart.
        """
        names, counts = zip(*((self.names[slot], count) for slot, count in slot_rows), strict=True)
        with self._set_routing(names, counts, sequence_length):
            yield

    @contextlib.contextmanager
    def whole_batches(self, slot: int) -> Iterator[None]:
        """Within this context all rows go through one slot, by the forward that serves several side by side."""
        with self._set_routing((self.names[slot],), None, None):
            yield

    @contextlib.contextmanager
    def _set_routing(self, names, counts, sequence_length) -> Iterator[None]:
        routing = self._routing
        before = routing.active_rows, routing.sequence_length
        routing.active_rows, routing.sequence_length = (names, counts), sequence_length
        try:
            yield
        finally:
            routing.active_rows, routing.sequence_length = before


@dataclass
class _Routing:
    """
    Which rows go through which slot, as all adapted layers of a model see it.

    Args:
        active_rows (`tuple`, *optional*):
            Names of the slots in use and their numbers of rows, or `None` in place of these for all rows. Without it
            PEFT's own forward runs.
        sequence_length (`int`, *optional*):
            Tokens per row, where that is known.
    """

    active_rows: tuple[tuple[str, ...], tuple[int, ...] | None] | None = None
    sequence_length: int | None = None

    def __deepcopy__(self, memo) -> "_Routing":
        return _Routing()  # A copy of the model is nobody's step, also if it is made within one.

    def counts_of(self, x: torch.Tensor, counts: Sequence[int] | None, module: nn.Module) -> Sequence[int]:
        if counts is None or len(counts) == 1:
            return (x.shape[0],)
        num_rows = sum(counts)
        if x.shape[0] == num_rows:
            return counts
        if self.sequence_length is not None and x.shape[0] == num_rows * self.sequence_length:
            return [count * self.sequence_length for count in counts]
        raise ValueError(
            f"A {type(module).__name__} layer received an input of shape {tuple(x.shape)} for a batch of {num_rows} "
            "rows, so its rows cannot be told apart by client (layers that route tokens, such as mixture-of-experts, "
            "do this). Set `parallel_clients=1` to train the clients one after the other."
        )


def _routed_forward(
    module: nn.Module,
    original: Callable[..., torch.Tensor],
    batched: BatchedForward | None,
    routing: _Routing,
    x: torch.Tensor,
    *args,
    **kwargs,
) -> torch.Tensor:
    """Stands for `module.forward`: routes rows to slots while rows are set."""
    if routing.active_rows is None or module.disable_adapters:
        return original(x, *args, **kwargs)
    names, counts = routing.active_rows
    counts = routing.counts_of(x, counts, module)
    if batched is not None:
        return batched(module, x, names, counts, *args, **kwargs)
    return _forward_by_client(module, original, x, names, counts, *args, **kwargs)


# The model as users are handed it


def _save_one_client(model: PeftModel, others: Sequence[str]) -> None:
    """
    Makes `model.save_pretrained`, and `push_to_hub` which calls it, leave out the slots named in `others`.

    PEFT saves all adapters unless told otherwise, and what lies in these slots is other clients' B.
    """
    model.save_pretrained = functools.partial(_save_pretrained, model, model.save_pretrained, tuple(others))


def _save_pretrained(
    model: PeftModel,
    original: Callable[..., None],
    others: Sequence[str],
    save_directory: str,
    safe_serialization: bool = True,
    selected_adapters: list[str] | None = None,
    *args,
    **kwargs,
) -> None:
    if selected_adapters is None:
        selected_adapters = [name for name in model.peft_config if name not in others]
    refused = sorted(set(selected_adapters) & set(others))
    if refused:
        raise ValueError(
            f"`selected_adapters` names {refused[0]!r}, which holds whichever client last trained there. To save a "
            "certain client, call `save_pretrained` within `trainer.use_client(client_id)`; `trainer.save_model` "
            "saves all of them."
        )
    original(save_directory, safe_serialization, selected_adapters, *args, **kwargs)


def _copy_model(model: PeftModel, memo: dict[int, Any]) -> PeftModel:
    """
    A deep copy that computes with its own weights.

    TRL puts a function in place of the base model's `forward` that closes over the original's, and `deepcopy` takes
    functions over as they are. The copy gets the forward of its class.
    """
    copied = type(model).__new__(type(model))
    memo[id(model)] = copied
    copied.__setstate__(copy.deepcopy(model.__dict__, memo))
    base = copied.get_base_model()
    replaced = base.__dict__.get("forward")
    if inspect.unwrap(getattr(replaced, "__func__", replaced)) is inspect.unwrap(type(base).forward):
        del base.forward
    return copied


def _outermost_adapter_layers(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if isinstance(child, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            yield child
        else:
            yield from _outermost_adapter_layers(child)


@contextlib.contextmanager
def _active_adapter(module: nn.Module, name: str) -> Iterator[None]:
    """
    Switches one layer to another adapter.

    PEFT's `set_adapter` also freezes the adapter it switches away from, whose gradients are still wanted here.
    """
    layers = [m for m in module.modules() if isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
    before = [layer._active_adapter for layer in layers]
    for layer in layers:
        layer._active_adapter = [name]
    try:
        yield
    finally:
        for layer, adapter in zip(layers, before, strict=True):
            layer._active_adapter = adapter


def take_rows(value: Any, start: int, count: int, total: int) -> Any:
    """Rows `start` to `start + count` of a tensor with one entry for each of `total` rows; all else as it is."""
    per_row = isinstance(value, torch.Tensor) and value.dim() and value.shape[0] == total
    return value[start : start + count] if per_row else value


def _forward_by_client(module, original, x, names, counts, *args, **kwargs) -> torch.Tensor:
    """Runs each client's rows through the layer's own forward: right for every kind of layer, without the gain."""
    total, start = x.shape[0], 0
    outputs = []
    for name, count in zip(names, counts, strict=True):
        part = functools.partial(take_rows, start=start, count=count, total=total)
        with _active_adapter(module, name):
            output = original(part(x), *map(part, args), **{key: part(value) for key, value in kwargs.items()})
        if not isinstance(output, torch.Tensor):
            raise ValueError(
                f"A {type(module).__name__} layer returned a {type(output).__name__}, which cannot be put together "
                "from the parts of several clients. Set `parallel_clients=1` to train the clients one after the other."
            )
        outputs.append(output)
        start += count
    return torch.cat(outputs)


def _lora_forward(layer, x, names, counts, *args, **kwargs) -> torch.Tensor:
    """`W x + s B_i A_i x` for the rows of every client i: `W x` once, the rest as batched products."""
    result = layer.base_layer(x, *args, **kwargs)  # (rows, ..., out_features)
    first = names[0]
    dtype = _compute_dtype(x, layer.lora_A[first].weight)
    x = layer.lora_dropout[first](x.to(dtype))
    scaling = layer.scaling[first]
    if len(set(counts)) == 1:
        a = _stack([layer.lora_A[name].weight for name in names]).to(dtype)  # (clients, r, in_features)
        b = _stack([layer.lora_B[name].weight for name in names]).to(dtype)  # (clients, out_features, r)
        reduced = torch.bmm(x.reshape(len(names), -1, x.shape[-1]), a.mT)  # (clients, rows * tokens, r)
        biased, autocast = layer.lora_B[first].bias is not None, torch.is_autocast_enabled(x.device.type)
        if result.dtype == dtype and not biased and not autocast:
            # In one pass over the outputs, which is what takes the time. Autocast would round the base layer's too.
            by_client = result.reshape(len(names), -1, result.shape[-1])
            return torch.baddbmm(by_client, reduced, b.mT, alpha=scaling).view(result.shape)
        delta = torch.bmm(reduced, b.mT)
        if biased:
            delta = delta + torch.stack([layer.lora_B[name].bias for name in names])[:, None]
        delta = delta.view(result.shape)
    else:
        parts = zip(names, x.split(list(counts)), strict=True)
        delta = torch.cat([_low_rank_product(layer, name, rows, dtype) for name, rows in parts])
    return torch.add(result, delta.to(result.dtype), alpha=scaling)


def _stack(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack(tensors) if len(tensors) > 1 else tensors[0].unsqueeze(0)  # One client alone is not copied.


def _low_rank_product(layer, name, rows, dtype) -> torch.Tensor:
    bias = layer.lora_B[name].bias
    reduced = F.linear(rows, layer.lora_A[name].weight.to(dtype))
    return F.linear(reduced, layer.lora_B[name].weight.to(dtype), None if bias is None else bias.to(dtype))


def _compute_dtype(x: torch.Tensor, weight: torch.Tensor) -> torch.dtype:
    """
    Dtype of the low-rank products: the adapter's, as in PEFT, or what autocast makes of the input.

    On the CPU it is never below fp32. TRL keeps QLoRA adapters in bf16, in which most CPUs multiply so slowly that the
    low-rank products took as long as all the rest of a step.
    """
    if torch.is_autocast_enabled(x.device.type):
        return x.dtype
    return torch.promote_types(weight.dtype, torch.float32) if x.device.type == "cpu" else weight.dtype


def _vera_forward(layer, x, names, counts, *args, **kwargs) -> torch.Tensor:
    """`W x + b_i * B (d_i * A x)` for the rows of every client i. The projections A and B are common."""
    given = x.dtype
    result = layer.base_layer(x, *args, **kwargs)  # (rows, ..., out_features)
    first = names[0]
    dtype = _compute_dtype(x, layer.vera_lambda_d[first])
    a = layer.vera_A[first][:, : layer.in_features].to(device=x.device, dtype=dtype)  # (r, in_features)
    b = layer.vera_B[first][: layer.out_features].to(device=x.device, dtype=dtype)  # (out_features, r)
    x = x.to(dtype)
    rows = torch.repeat_interleave(
        torch.arange(len(names), device=x.device), torch.tensor(counts, device=x.device), output_size=sum(counts)
    )
    shape = (len(rows), *(1,) * (x.dim() - 2), -1)
    d_rows = torch.stack([layer.vera_lambda_d[name] for name in names])[rows].view(shape)  # (rows, ..., r)
    b_rows = torch.stack([layer.vera_lambda_b[name] for name in names])[rows].view(shape)  # (rows, ..., out_features)
    delta = b_rows * F.linear(d_rows * F.linear(layer.vera_dropout[first](x), a), b)
    return (result + delta).to(result.dtype).to(given)


def _batched_forwards() -> dict[type, BatchedForward]:
    forwards: dict[type, BatchedForward] = {LoraLinear: _lora_forward, VeraLinear: _vera_forward}
    # PEFT defines these two only where bitsandbytes is installed.
    from peft.import_utils import is_bnb_4bit_available, is_bnb_available

    if is_bnb_available():
        from peft.tuners.lora import Linear8bitLt

        forwards[Linear8bitLt] = _lora_forward
    if is_bnb_4bit_available():
        from peft.tuners.lora import Linear4bit

        forwards[Linear4bit] = _lora_forward
    return forwards


# A variant that should be fast side by side adds its layer class here. Every other layer runs client by client.
BATCHED_FORWARDS: dict[type, BatchedForward] = _batched_forwards()


def _batched_forward_of(module: nn.Module) -> BatchedForward | None:
    # Variants such as DoRA live on the plain LoRA classes with a forward of their own.
    if getattr(module, "lora_variant", None):
        return None
    return BATCHED_FORWARDS.get(type(module))
