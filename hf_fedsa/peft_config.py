"""PEFT configs of the adapters that FedSA shares in part."""

from dataclasses import dataclass
from typing import Any

from peft import LoraConfig, PeftConfig, PeftModel, VeraConfig
from transformers import PreTrainedModel

from .client.parameters import adapter_kind
from .client.slots import mutates_base


def validate_peft_config(config: PeftConfig | None) -> None:
    """
    Checks that an adapter can be split between server and client.

    Raises:
        `TypeError`: `config` is not a PEFT config.
        `ValueError`: there is none, its kind is in no row of the table of shared tensors, or it trains parameters that
            the clients would have to hold in common.
    """
    if config is None:
        raise ValueError(
            "`peft_config` is None, but federated training needs an adapter to share: only its A matrices travel. "
            "Pass a `FedSALoraConfig` or `FedSAVeraConfig` (a stock `LoraConfig` or `VeraConfig` will do)."
        )
    adapter_kind(config)
    if getattr(config, "bias", "none") != "none":
        raise ValueError(
            f"`bias={config.bias!r}` trains the base model's own biases, which all clients have in common. Set "
            '`bias="none"`.'
        )
    if getattr(config, "trainable_token_indices", None):
        raise ValueError(
            "`trainable_token_indices` trains rows of the base model's embedding, for which there is no rule of what "
            "is shared. Add the embedding to `modules_to_save` to give each client its own copy."
        )
    if getattr(config, "layer_replication", None):
        raise ValueError(
            "`layer_replication` builds another base model inside PEFT. Build that model first and pass it as `model`."
        )


@dataclass
class FedSALoraConfig(LoraConfig):
    """
    LoRA whose A matrices are averaged between rounds while every client keeps its own B (FedSA-LoRA,
    https://arxiv.org/abs/2410.01463).

    Takes every argument of [`~peft.LoraConfig`], among them `use_rslora=True` for rsLoRA, `use_dora=True` for DoRA
    (whose magnitudes stay with the client) and any `init_lora_weights`. It adds no field, so the `adapter_config.json`
    saved next to the weights is stock PEFT's.

    Example:

    ```python
    >>> FedSALoraConfig(r=8, lora_alpha=16, lora_dropout=0.05, target_modules="all-linear")
    ```
    """

    def __post_init__(self):
        super().__post_init__()
        validate_peft_config(self)


@dataclass
class FedSAVeraConfig(VeraConfig):
    """
    VeRA whose scaling vectors `d` are averaged between rounds while every client keeps its own `b` (FedSA-VeRA,
    https://arxiv.org/abs/2410.01463). The random projections are frozen, equal everywhere and never travel.

    Takes every argument of [`~peft.VeraConfig`] and adds no field.

    Example:

    ```python
    >>> FedSAVeraConfig(r=256, target_modules=["q_proj", "v_proj"])
    ```
    """

    def __post_init__(self):
        super().__post_init__()
        validate_peft_config(self)


def check_peft_model(model: PeftModel) -> None:
    for config in model.peft_config.values():
        validate_peft_config(config)
        if mutates_base(config):
            raise ValueError(
                f"`init_lora_weights={config.init_lora_weights!r}` has changed the base weights of the `PeftModel` "
                "you passed, and what it took out of them is not known here, so the adapters could not be saved for "
                "the original base. Pass the base model and `peft_config` instead."
            )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            "The `PeftModel` you passed has no trainable parameter. Load it with `PeftModel.from_pretrained(..., "
            "is_trainable=True)`."
        )


def check_model(model: Any) -> PeftConfig:
    """
    Checks that a Trainer has made a model that clients can train.

    Returns:
        `PeftConfig`: the config of its adapter.

    Raises:
        `TypeError`: it has no adapter, or a base that cannot be named.
        `ValueError`: the adapter is not covered.
    """
    if not isinstance(model, PeftModel):
        raise TypeError(
            f"The model is a `{type(model).__name__}` without an adapter, but only adapters are trained and "
            "shared. Wrap it with `peft.get_peft_model` first."
        )
    if not isinstance(model.get_base_model(), PreTrainedModel):
        raise TypeError(
            f"The base model is a `{type(model.get_base_model()).__name__}`, but it must be a "
            "`PreTrainedModel`: what is saved names the base by its config. Derive it from that class."
        )
    config = next(iter(model.peft_config.values()))
    validate_peft_config(config)
    return config
