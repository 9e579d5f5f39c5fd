"""An adapter's config as a federation saves, summarises and compares it."""

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

# Fields of an adapter's config that say nothing about the adapter, and those that mattered while it trained alone.
_INCIDENTAL = ("base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping", "task_type")
_OF_TRAINING = ("init_lora_weights", "init_weights", "lora_dropout", "vera_dropout")

# Settings of initialisations. They name files of this machine, and nothing after the initialisation reads them.
_OF_INITIALISATION = ("corda_config", "eva_config", "loftq_config", "lora_ga_config")


def config_to_save(model: "PeftModel", adapter_name: str) -> "PeftConfig":
    """A copy of an adapter's config that names its base and its task, for others to load it with."""
    config = copy.deepcopy(model.peft_config[adapter_name])
    config.inference_mode = True
    base = model.get_base_model()
    if config.base_model_name_or_path is None:
        config.base_model_name_or_path = base.config._name_or_path
    if config.task_type is None and type(base).__name__.endswith("ForCausalLM"):
        config.task_type = "CAUSAL_LM"  # Or PEFT's auto classes could not load it.
    return config


def config_dict(config: "PeftConfig") -> dict[str, Any]:
    """Contents of `adapter_config.json`."""
    defaults = type(config)().to_dict()
    return {
        key: as_json(defaults[key] if key in _OF_INITIALISATION else value) for key, value in config.to_dict().items()
    }


def as_json(value: Any) -> Any:
    """A config value as JSON holds it. Sets are sorted, so that equal configs are equal files."""
    if isinstance(value, set):
        return sorted(value)
    return getattr(value, "value", value)


def adapter_summary(config: "PeftConfig") -> dict[str, Any]:
    """The settings of an adapter worth reading, without those left at their defaults."""
    plain = config_dict(type(config)())
    return {
        key: value
        for key, value in config_dict(config).items()
        if key not in _INCIDENTAL and (value != plain[key] or key in ("r", "lora_alpha"))
    }


def comparable(config: Mapping[str, Any]) -> dict[str, Any]:
    """What must be equal in `adapter_config.json` for two adapters to be of one kind."""
    return {key: value for key, value in config.items() if key not in (*_INCIDENTAL, *_OF_TRAINING)}
