"""A resident process whose clients take part in a federation elsewhere, and how other processes ask it to."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .connection import FlatMessage, NoWorkerError, WorkerConnection, WorkerError
    from .over_socket import OverSocket

# Who asks a worker needs the standard library alone.
_MODULES = {
    "FlatMessage": "connection",
    "NoWorkerError": "connection",
    "OverSocket": "over_socket",
    "WorkerConnection": "connection",
    "WorkerError": "connection",
}

__all__ = ["FlatMessage", "NoWorkerError", "OverSocket", "WorkerConnection", "WorkerError"]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)
