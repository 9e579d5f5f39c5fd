"""One adapter's tensors on a PEFT model: its parameters and shapes, and a plain LoRA made of it."""

import copy
import math
from collections.abc import Mapping
from dataclasses import fields

import torch
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..adapters import ADAPTERS, AdapterKind


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
            f"`peft_config` is a {kind}, and no row of `hf_fedsa.adapters.ADAPTERS` says which of its "
            f"tensors are shared. Covered are: {', '.join(sorted(row.name for row in ADAPTERS))}. Use one of those, "
            "or add a row."
        )
    return row


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


def as_plain_lora(
    config: PeftConfig, tensors: Mapping[str, torch.Tensor], initial: Mapping[str, torch.Tensor]
) -> tuple[PeftConfig, dict[str, torch.Tensor]]:
    """
    Rewrites an adapter whose initialisation took `s B_0 A_0` out of the base weight as one for the untouched base.

    `W - s B_0 A_0 + s B A` is `W + s [B, -B_0] [A; A_0]`: a LoRA of twice the rank at the same scale.
    """
    doubled = {}
    for key, tensor in tensors.items():
        name = key.removesuffix(".weight").rpartition(".")[2]
        if name == "lora_A":
            doubled[key] = torch.cat([tensor, initial[key].to(tensor)], dim=0)
        elif name == "lora_B":
            doubled[key] = torch.cat([tensor, -initial[key].to(tensor)], dim=1)
        else:
            doubled[key] = tensor
    # The scale is alpha / r, or alpha / sqrt(r) for rsLoRA, and must not change as r doubles.
    growth = math.sqrt(2) if config.use_rslora else 2
    plain = copy.deepcopy(config)
    plain.init_lora_weights = True
    plain.r, plain.lora_alpha = 2 * config.r, growth * config.lora_alpha
    plain.rank_pattern = {name: 2 * rank for name, rank in (config.rank_pattern or {}).items()}
    plain.alpha_pattern = {name: growth * alpha for name, alpha in (config.alpha_pattern or {}).items()}
    return plain, doubled
