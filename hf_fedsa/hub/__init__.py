"""The public names of saving, publishing and loading, each from its own module when it is first asked for."""

from importlib import import_module
from typing import Any

_MODULES = {
    "FEDERATION": "whole_folder",
    "Origin": "loading",
    "Publisher": "publisher",
    "check_repository": "push",
    "choose_clients": "publication",
    "describe_federation": "saving",
    "list_clients": "loading",
    "load_origin": "loading",
    "load_personalized_model": "loading",
    "name_on_hub": "publication",
    "open_shared": "halves",
    "push_federation": "push",
    "push_saved": "push",
    "read_federation": "folder",
    "read_saved": "folder",
    "save_client_half": "halves",
    "save_federation": "saving",
    "save_processing_class": "saving",
    "save_server_half": "halves",
    "warn_of_other_clients": "folder",
}

__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
