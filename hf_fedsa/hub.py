"""What is saved of a federation, and how it is loaded again."""

import copy
import json
import math
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel

from .parameters import AdapterMethod, adapter_tensors, clone_tensors, tensors_sha256
from .slots import mutates_base
from .state import file_sha256, write_json, write_safetensors

_VERSIONED = ("hf_fedsa", "peft", "transformers", "trl", "torch")


def save_federation(
    directory: Path,
    *,
    model: PeftModel,
    adapter_name: str,
    method: AdapterMethod,
    shared: Mapping[str, torch.Tensor],
    client_ids: list[str],
    client_tensors: Callable[[str], Mapping[str, torch.Tensor]],
    initial_tensors: Mapping[str, torch.Tensor],
    summary: Mapping[str, Any],
) -> None:
    """
    Writes `shared/`, `clients/<client_id>/` and, last, `federation.json`.

    Args:
        directory (`Path`):
            Folder to write to.
        model ([`~peft.PeftModel`]):
            Model the adapters belong to.
        adapter_name (`str`):
            Adapter whose config, and whose frozen constants, are saved.
        method ([`~hf_fedsa.parameters.AdapterMethod`]):
            Row of the adapter in the table of shared tensors.
        shared (`Mapping[str, torch.Tensor]`):
            The server's tensors.
        client_ids (`list[str]`):
            Clients to save.
        client_tensors (`Callable[[str], Mapping[str, torch.Tensor]]`):
            Complete adapter of a client. Asked one client at a time.
        initial_tensors (`Mapping[str, torch.Tensor]`):
            The adapter as initialised, which some initialisations subtracted from the base weight.
        summary (`Mapping[str, Any]`):
            Further entries of `federation.json`.
    """
    config = _config_to_save(model, adapter_name)
    every = clone_tensors(adapter_tensors(model, adapter_name))
    frozen = {key: tensor for key, tensor in every.items() if key not in initial_tensors}
    _write_adapter(directory / "shared", config, shared)
    files = {}
    for client_id in client_ids:
        tensors, client_config = {**client_tensors(client_id), **frozen}, config
        if mutates_base(config):
            client_config, tensors = _as_plain_lora(config, tensors, initial_tensors)
        path = _write_adapter(directory / "clients" / client_id, client_config, tensors)
        files[client_id] = file_sha256(path)
    federation = {
        **summary,
        "method": method.name,
        "base_model": config.base_model_name_or_path,
        "shared_tensors": list(method.shared),
        "local_tensors": list(method.local),
        "shared_sha256": tensors_sha256(shared),
        "versions": {name: version(name) for name in _VERSIONED},
    }
    federation["clients"] = {
        client_id: {**entry, "sha256": files[client_id]} for client_id, entry in summary["clients"].items()
    }
    write_json(directory / "federation.json", federation)


def load_personalized_model(
    path: str | Path,
    client_id: str,
    *,
    base_model: PreTrainedModel | str | None = None,
    merge: bool = False,
    **kwargs,
) -> PreTrainedModel | PeftModel:
    """
    Loads the base model with one client's adapter.

    Args:
        path (`str` or `Path`):
            Folder written by `trainer.save_model()`.
        client_id (`str`):
            Client to load.
        base_model ([`~transformers.PreTrainedModel`] or `str`, *optional*):
            Base to put the adapter on: a loaded model, or the name or folder of one. If `None`, the one it was trained
            on.
        merge (`bool`, *optional*, defaults to `False`):
            Whether to merge the adapter into the base weights and return a plain model.
        kwargs:
            Passed to [`~transformers.AutoModelForCausalLM.from_pretrained`], e.g. `quantization_config`, `dtype` or
            `device_map`.

    Returns:
        [`~peft.PeftModel`], or a [`~transformers.PreTrainedModel`] if `merge` is set, ready for inference.

    Raises:
        `FileNotFoundError`: the folder is not one that a federation was saved to.
        `ValueError`: there is no such client. The message lists the ones there are.

    Example:

    ```python
    >>> model = load_personalized_model("gsm8k-fedsa", client_id="client_1")
    ```
    """
    directory = Path(path)
    federation = read_federation(directory)
    if client_id not in federation["clients"]:
        raise ValueError(
            f"{directory} holds no client {client_id!r}. Its clients are: {', '.join(federation['clients'])}."
        )
    if base_model is None:
        base_model = federation["base_model"]
    if isinstance(base_model, str):
        base_model = AutoModelForCausalLM.from_pretrained(base_model, **kwargs)
    elif kwargs:
        raise ValueError(
            f"`base_model` is already loaded, so {', '.join(f'`{name}`' for name in kwargs)} cannot apply to it. Pass "
            "its name instead, or leave them out."
        )
    model = PeftModel.from_pretrained(base_model, str(directory / "clients" / client_id))
    return model.merge_and_unload() if merge else model.eval()


def read_federation(directory: Path) -> dict[str, Any]:
    """Reads `federation.json`. Raises `FileNotFoundError` where there is none."""
    path = directory / "federation.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{directory} holds no federation: {path.name} is missing. Pass the folder that `trainer.save_model()` "
            "wrote."
        )
    return json.loads(path.read_text(encoding="utf-8"))


def _config_to_save(model: PeftModel, adapter_name: str) -> PeftConfig:
    config = copy.deepcopy(model.peft_config[adapter_name])
    config.inference_mode = True
    if config.base_model_name_or_path is None:
        config.base_model_name_or_path = model.get_base_model().config._name_or_path
    return config


def _write_adapter(directory: Path, config: PeftConfig, tensors: Mapping[str, torch.Tensor]) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "adapter_model.safetensors"
    write_safetensors(path, tensors)
    config.save_pretrained(str(directory))
    return path


def _as_plain_lora(
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
