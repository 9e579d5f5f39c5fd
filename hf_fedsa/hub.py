"""What is saved of a federation, and how it is loaded again."""

import copy
import json
import logging
import math
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
)

from .parameters import AdapterMethod, adapter_tensors, clone_tensors, tensors_sha256
from .slots import mutates_base
from .state import file_sha256, write_json, write_safetensors

logger = logging.getLogger(__name__)

# Class of the base model by the adapter's task. Adapters without a task are those of causal language models.
_AUTO_CLASSES = {
    "SEQ_CLS": AutoModelForSequenceClassification,
    "TOKEN_CLS": AutoModelForTokenClassification,
    "SEQ_2_SEQ_LM": AutoModelForSeq2SeqLM,
    "QUESTION_ANS": AutoModelForQuestionAnswering,
    "FEATURE_EXTRACTION": AutoModel,
}
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
    saved = {path.name for path in (directory / "clients").glob("*") if path.is_dir()}
    if others := sorted(saved - set(client_ids)):
        logger.warning(
            "%s also holds %s of an earlier run, made for another A. Remove them unless you want to keep them.",
            directory / "clients",
            ", ".join(others),
        )
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
        "base_dtype": str(model.get_base_model().dtype).removeprefix("torch."),
        "quantized": getattr(model.get_base_model().config, "quantization_config", None) is not None,
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
            Base to put the adapter on: a loaded model, which is changed in place, or the name or folder of one. If
            `None`, the one it was trained on.
        merge (`bool`, *optional*, defaults to `False`):
            Whether to merge the adapter into the base weights and return a plain model.
        kwargs:
            Passed to the base model's `from_pretrained`, e.g. `quantization_config` or `device_map`. `dtype` defaults
            to that of training; quantization is only what you pass.

    Returns:
        [`~peft.PeftModel`], or a [`~transformers.PreTrainedModel`] if `merge` is set, ready for inference.

    Raises:
        `FileNotFoundError`: the folder is not one that a federation was saved to.
        `ValueError`: there is no such client (the message lists the ones there are), its file is not the one that was
            saved, or the base cannot take it.

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
    folder = directory / "clients" / client_id
    weights = folder / "adapter_model.safetensors"
    if not weights.is_file() or file_sha256(weights) != federation["clients"][client_id]["sha256"]:
        raise ValueError(
            f"{weights} is missing or is not the file that {directory / 'federation.json'} lists, so it may belong to "
            "another save or another client. Save the federation again."
        )
    if base_model is None:
        if not federation["base_model"]:
            raise ValueError(
                f"{directory} does not name its base model, since it was built in memory. Pass it as `base_model`."
            )
        base_model = federation["base_model"]
    if isinstance(base_model, str):
        kwargs.setdefault("dtype", federation["base_dtype"])
        if federation["quantized"] and "quantization_config" not in kwargs:
            logger.info(
                "The base model was quantized in training and is not now. Pass `quantization_config` to have it."
            )
        task = PeftConfig.from_pretrained(str(folder)).task_type
        base_model = _AUTO_CLASSES.get(task, AutoModelForCausalLM).from_pretrained(base_model, **kwargs)
    elif kwargs:
        raise ValueError(
            f"`base_model` is already loaded, so {', '.join(f'`{name}`' for name in kwargs)} cannot apply to it. Pass "
            "its name instead, or leave them out."
        )
    if any(isinstance(module, BaseTunerLayer) for module in base_model.modules()):
        raise ValueError(
            "`base_model` already carries an adapter. Take it out with `unload()` first, or add this one to that "
            f"`PeftModel` with `load_adapter({str(folder)!r}, adapter_name=...)`."
        )
    model = PeftModel.from_pretrained(base_model, str(folder))
    return model.merge_and_unload() if merge else model.eval()


def read_federation(directory: Path) -> dict[str, Any]:
    """Reads `federation.json`. Raises `FileNotFoundError` where there is none."""
    path = directory / "federation.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{directory} holds no federation: {path.name} is missing. Pass the folder that `trainer.save_model()` "
            "wrote."
        )
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}). Save the federation again.") from error


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
