"""Federated fine-tuning with FedSA-LoRA as a Hugging Face Trainer."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .callbacks import FederatedCallback
    from .config import FederatedConfig
    from .hub.loading import list_clients, load_personalized_model
    from .hub.push import push_federation
    from .methods import METHODS, Method, register_method
    from .partition import describe_partition, partition_by_column, partition_dirichlet, partition_iid
    from .peft_config import FedSALoraConfig, FedSAVeraConfig
    from .sft_trainer import FederatedTrainer
    from .trainer import FederatedMixin

__version__ = "0.1.0"

# A process that only relays messages does not pay for transformers: every name is imported when it is first asked for.
_MODULES = {
    "FedSALoraConfig": "peft_config",
    "FedSAVeraConfig": "peft_config",
    "FederatedCallback": "callbacks",
    "FederatedConfig": "config",
    "FederatedMixin": "trainer",
    "FederatedTrainer": "sft_trainer",
    "METHODS": "methods",
    "Method": "methods",
    "describe_partition": "partition",
    "list_clients": "hub.loading",
    "load_personalized_model": "hub.loading",
    "partition_by_column": "partition",
    "partition_dirichlet": "partition",
    "partition_iid": "partition",
    "push_federation": "hub.push",
    "register_method": "methods",
}

__all__ = [
    "FedSALoraConfig",
    "FedSAVeraConfig",
    "FederatedCallback",
    "FederatedConfig",
    "FederatedMixin",
    "FederatedTrainer",
    "METHODS",
    "Method",
    "describe_partition",
    "list_clients",
    "load_personalized_model",
    "partition_by_column",
    "partition_dirichlet",
    "partition_iid",
    "push_federation",
    "register_method",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f".{_MODULES[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
