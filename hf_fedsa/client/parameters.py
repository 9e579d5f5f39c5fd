"""Which adapter tensor is shared with the server and which stays with the client.

This is the only file that knows PEFT's key names. A new adapter is a row in [`ADAPTERS`].
"""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Literal

import torch
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn


@dataclass(frozen=True)
class AdapterKind:
    """
    How one adapter's tensors are divided between server and client.

    Args:
        name (`str`):
            Identifier written to `federation.json`.
        peft_type (`str`):
            The PEFT type the row applies to, e.g. `"LORA"`.
        shared (`tuple[str, ...]`):
            Last component of the keys of tensors that are averaged between rounds.
        local (`tuple[str, ...]`):
            Last component of the keys of tensors that never leave the client.
        frozen (`tuple[str, ...]`, *optional*, defaults to `()`):
            Last component of the keys of constants that PEFT may save but that never train and never travel.
        flag (`str`, *optional*):
            Config field that must be set for the row to apply. `None` means the row is the type's default.
    """

    name: str
    peft_type: str
    shared: tuple[str, ...]
    local: tuple[str, ...]
    frozen: tuple[str, ...] = ()
    flag: str | None = None


# The first row that fits a config is its method, so a row with a flag stands before the default of its type. The split
# of A and B is that of FedSA-LoRA, https://arxiv.org/abs/2410.01463, sections 3.2 (LoRA) and 3.3 (rsLoRA, VeRA).
_LORA_SHARED = ("lora_A", "lora_embedding_A")

_LORA_LOCAL = ("lora_B", "lora_embedding_B")

ADAPTERS: tuple[AdapterKind, ...] = (
    AdapterKind("dora", "LORA", _LORA_SHARED, (*_LORA_LOCAL, "lora_magnitude_vector"), flag="use_dora"),
    AdapterKind("rslora", "LORA", _LORA_SHARED, _LORA_LOCAL, flag="use_rslora"),
    AdapterKind("lora", "LORA", _LORA_SHARED, _LORA_LOCAL),
    AdapterKind("vera", "VERA", ("vera_lambda_d",), ("vera_lambda_b",), frozen=("vera_A", "vera_B")),
)

Share = Literal["shared", "local", "frozen"]


def adapter_kind(config: PeftConfig) -> AdapterKind:
    """
    Returns the row of [`ADAPTERS`] that `config` falls under.

    Raises:
        `TypeError`: `config` is not a PEFT config.
        `ValueError`: no row covers the adapter, so it is not known which of its tensors may leave a client.
    """
    if not isinstance(config, PeftConfig):
        raise TypeError(
            f"`peft_config` must be a `peft.PeftConfig`, got `{type(config).__name__}`. Pass a `FedSALoraConfig` or a "
            "`FedSAVeraConfig`."
        )
    peft_type = getattr(config.peft_type, "value", config.peft_type)
    rows = [row for row in ADAPTERS if row.peft_type == peft_type]
    known_flags = {row.flag for row in rows}
    # PEFT marks the fields that switch on a LoRA variant with tensors or a forward of its own.
    variants = [f.name for f in fields(config) if f.metadata.get("is_lora_variant") and getattr(config, f.name)]
    unknown = sorted(set(variants) - known_flags)
    row = next((row for row in rows if row.flag is None or getattr(config, row.flag)), None)
    if row is None or unknown:
        kind = (
            f"{type(config).__name__}({', '.join(unknown)})" if unknown else f"{type(config).__name__} ({peft_type})"
        )
        raise ValueError(
            f"`peft_config` is a {kind}, and no row of `hf_fedsa.client.parameters.ADAPTERS` says which of its "
            f"tensors are shared. Covered are: {', '.join(sorted(row.name for row in ADAPTERS))}. Use one of those, "
            "or add a row."
        )
    return row


def classify(
    key: str,
    method: AdapterKind,
    modules_to_save: Iterable[str] | None = None,
    share_modules_to_save: bool = False,
) -> Share:
    """
    Says where the tensor saved under `key` belongs.

    Args:
        key (`str`):
            Key as PEFT saves it, i.e. without the adapter's name.
        method ([`AdapterKind`]):
            The adapter's row.
        modules_to_save (`Iterable[str]`, *optional*):
            The PEFT config's `modules_to_save`: modules trained in full, such as a classification head.
        share_modules_to_save (`bool`, *optional*, defaults to `False`):
            Whether those modules are averaged. Off, each client keeps its own.

    Raises:
        `ValueError`: the key is none of the method's. A guess could send a client's own tensor to the server.
    """
    parts = key.split(".")
    name = parts[-2] if parts[-1] in ("weight", "bias") and len(parts) > 1 else parts[-1]
    if name in method.shared:
        return "shared"
    if name in method.local:
        return "local"
    if name in method.frozen:
        return "frozen"
    if any(f".{module}." in f".{key}." for module in modules_to_save or ()):
        return "shared" if share_modules_to_save else "local"
    raise ValueError(
        f"The adapter tensor `{key}` is neither shared nor local under method `{method.name}` (shared: "
        f"{', '.join(method.shared)}; local: {', '.join(method.local)}; modules_to_save: "
        f"{', '.join(modules_to_save or ()) or 'none'}). Add its last component to a row of "
        "`hf_fedsa.client.parameters.ADAPTERS`."
    )


def adapter_tensors(model: PeftModel, adapter_name: str) -> dict[str, torch.Tensor]:
    """
    Returns the live tensors of one adapter under the keys PEFT saves them with. They share memory with the model.

    Embeddings of the base model, which PEFT may add to a saved adapter, are left out: they do not train.
    """
    return get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)


def adapter_parameters(model: PeftModel, adapter_name: str) -> dict[str, nn.Parameter]:
    """
    Returns the parameters of one adapter under the keys PEFT saves them with, in a stable order.

    PEFT stays the authority on the names: its state dict is matched to the parameters by memory address. Constants
    (VeRA's projections are buffers) have no parameter and are left out.
    """
    by_address = {parameter.data_ptr(): parameter for parameter in model.parameters() if parameter.numel()}
    tensors = adapter_tensors(model, adapter_name)
    return {
        key: by_address[tensors[key].data_ptr()] for key in sorted(tensors) if tensors[key].data_ptr() in by_address
    }


def refuse_tied(tensors: Mapping[str, torch.Tensor]) -> None:
    """
    Refuses an adapter with two tensors in the same memory.

    Raises:
        `ValueError`: there are two such tensors, so that what the server averages could be what a client keeps.
    """
    first_at: dict[int, str] = {}
    for key in sorted(tensors):
        first = first_at.setdefault(tensors[key].data_ptr(), key)
        if first != key and tensors[key].numel():
            raise ValueError(
                f"`ensure_weight_tying=True` has made `{first}` and `{key}` one tensor. The adapter of a head is then "
                "that of the embedding transposed, so A of the one is B of the other and a client's own tensor would "
                "be sent to the server; and PEFT ties only the first of several adapters. Set "
                "`ensure_weight_tying=False`, or leave the embedding out of `target_modules` and `modules_to_save`."
            )


def adapter_shapes(model: nn.Module, config: PeftConfig) -> dict[str, tuple[int, ...]]:
    """
    Shapes of the tensors that an adapter of a config has on a base model, under the keys PEFT saves them with.

    The model is left as it was. For that, modules trained in full are looked up rather than wrapped: taken off again,
    PEFT's wrapper would leave a copy of the module in its place, no longer tied to another one.
    """
    config = copy.deepcopy(config)
    modules_to_save, config.modules_to_save = getattr(config, "modules_to_save", None), None
    try:
        trial = get_peft_model(model, config, adapter_name="trial")
    except ValueError:
        _unwrap(model)  # PEFT changes layers one by one, and leaves those it had come to.
        raise
    shapes = {key: tuple(tensor.shape) for key, tensor in adapter_tensors(trial, "trial").items()}
    trial.unload()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if any(f".{module}." in f".{name}." for module in modules_to_save or ()):
            shapes[f"base_model.model.{name}"] = tuple(parameter.shape)
    return shapes


def _unwrap(model: nn.Module) -> None:
    for name, layer in list(model.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, layer.get_base_layer())
