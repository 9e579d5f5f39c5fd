"""A federation written from its model: contents of `federation.json`, and all files of the folder."""

import json
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from ..adapters import AdapterKind
from ..client.parameters import adapter_tensors, as_plain_lora
from ..client.slots import mutates_base
from ..files import file_sha256, write_text
from ..methods import Sharing
from ..metrics import rounds_jsonl
from ..tensors import tensors_sha256
from .folder import write_adapter, write_descriptions
from .publication import summarize_results
from .saved_config import adapter_summary, as_json, config_dict, config_to_save
from .whole_folder import ROUNDS

_VERSIONED = ("hf_fedsa", "peft", "transformers", "trl", "torch")

# Settings of quantizations that hold the texts they were calibrated with, and are of no use after it.
_OF_CALIBRATION = ("dataset", "tokenizer")


def describe_federation(
    *,
    model: PeftModel,
    adapter_name: str,
    kind: AdapterKind,
    sharing: Sharing,
    shared: Mapping[str, torch.Tensor],
    frozen: Mapping[str, torch.Tensor],
    summary: Mapping[str, Any],
) -> dict[str, Any]:
    """
    Contents of `federation.json`, but for the hashes of the clients' files.

    Args:
        model ([`~peft.PeftModel`]):
            Model the adapters belong to.
        adapter_name (`str`):
            Adapter whose config is described.
        kind ([`~hf_fedsa.adapters.AdapterKind`]):
            The adapter's kind.
        sharing ([`~hf_fedsa.methods.Sharing`]):
            The method on its tensors.
        shared (`Mapping[str, torch.Tensor]`):
            The server's tensors.
        frozen (`Mapping[str, torch.Tensor]`):
            The adapter's constants, such as VeRA's projections.
        summary (`Mapping[str, Any]`):
            Further entries.
    """
    config = config_to_save(model, adapter_name)
    base = model.get_base_model()
    name = config.base_model_name_or_path
    found = {part for key in adapter_tensors(model, adapter_name) for part in key.split(".")}
    components = {"A": [name for name in kind.a if name in found], "B": [name for name in kind.b if name in found]}
    return {
        **summary,
        "method": sharing.method.name,
        "adapter_kind": kind.name,
        "task_type": as_json(config.task_type),
        "base_model": name,
        "base_dtype": str(base.dtype).removeprefix("torch."),
        "quantization_config": _quantization(base),
        "mutates_base": mutates_base(config),
        "adapter": adapter_summary(config),
        "shared_tensors": [name for factor in sharing.method.shared for name in components[factor]],
        "local_tensors": [name for factor in sharing.method.local for name in components[factor]],
        "shared_sha256": tensors_sha256(shared),
        "frozen_sha256": tensors_sha256(frozen) if frozen else None,
        "num_clients": len(summary["clients"]),
        "results": summarize_results(summary["clients"], named=summary["clients"]),
        "client_repositories": False,
        "clients": {
            client_id: {**entry, "path": f"clients/{client_id}"} for client_id, entry in summary["clients"].items()
        },
        "versions": {name: version(name) for name in _VERSIONED},
    }


def _quantization(base: PreTrainedModel) -> dict[str, Any] | None:
    """What to pass to `BitsAndBytesConfig` (or its like) for the quantization of a base model."""
    config = getattr(base.config, "quantization_config", None)
    if config is None:
        return None
    settings = dict(config if isinstance(config, dict) else config.to_diff_dict())
    for name in _OF_CALIBRATION:
        settings.pop(name, None)
    return json.loads(json.dumps(settings, default=str))


def save_federation(
    directory: Path,
    federation: Mapping[str, Any],
    rounds: Sequence[Mapping[str, Any]],
    *,
    model: PeftModel,
    adapter_name: str,
    shared: Mapping[str, torch.Tensor],
    start: Mapping[str, torch.Tensor],
    client_tensors: Callable[[str], Mapping[str, torch.Tensor]],
    initial_tensors: Mapping[str, torch.Tensor],
    frozen: Mapping[str, torch.Tensor],
) -> None:
    """
    Writes `shared/`, `clients/<client_id>/`, `rounds.jsonl`, the model card and `federation.json`.

    Args:
        directory (`Path`):
            Folder to write to. That of [`~hf_fedsa.hub.whole_folder.saving`], so that they replace the old ones all at
            once.
        federation (`Mapping[str, Any]`):
            What [`describe_federation`] returned. Its clients are saved.
        rounds (`Sequence[Mapping[str, Any]]`):
            One entry per finished round.
        model ([`~peft.PeftModel`]), adapter_name (`str`):
            Adapter whose config is saved.
        shared (`Mapping[str, torch.Tensor]`):
            The server's tensors.
        start (`Mapping[str, torch.Tensor]`):
            A as every client started, where each keeps its own. PEFT would fill it with random numbers.
        client_tensors (`Callable[[str], Mapping[str, torch.Tensor]]`):
            Complete adapter of a client, without its constants. Asked one client at a time.
        initial_tensors (`Mapping[str, torch.Tensor]`):
            The adapter as initialised, which some initialisations subtracted from the base weight.
        frozen (`Mapping[str, torch.Tensor]`):
            The adapter's constants.
    """
    config = config_to_save(model, adapter_name)
    write_adapter(directory / "shared", config_dict(config), {**start, **shared})
    entries = {}
    for client_id, entry in federation["clients"].items():
        tensors, client_config = {**client_tensors(client_id), **frozen}, config
        if mutates_base(config):
            client_config, tensors = as_plain_lora(config, tensors, initial_tensors)
        path = write_adapter(directory / "clients" / client_id, config_dict(client_config), tensors)
        entries[client_id] = {**entry, "sha256": file_sha256(path)}
    write_text(directory / ROUNDS, rounds_jsonl(rounds))
    write_descriptions(directory, {**federation, "clients": entries}, rounds)


def save_processing_class(processing_class: Any, directory: Path) -> list[str]:
    """Saves a tokenizer or processor to a folder that is still empty, and returns the names of the files."""
    processing_class.save_pretrained(str(directory))
    return sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())
