"""Federated fine-tuning with FedSA-LoRA as a Hugging Face Trainer."""

from .callbacks import FederatedCallback
from .config import FederatedConfig
from .hub import list_clients, load_personalized_model, push_federation
from .partition import describe_partition, partition_by_column, partition_dirichlet, partition_iid
from .peft_config import FedSALoraConfig, FedSAVeraConfig
from .sft_trainer import FederatedTrainer
from .trainer import FederatedMixin

__version__ = "0.1.0"

__all__ = [
    "FedSALoraConfig",
    "FedSAVeraConfig",
    "FederatedCallback",
    "FederatedConfig",
    "FederatedMixin",
    "FederatedTrainer",
    "describe_partition",
    "list_clients",
    "load_personalized_model",
    "partition_by_column",
    "partition_dirichlet",
    "partition_iid",
    "push_federation",
]
