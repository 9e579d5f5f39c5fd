"""A client's model again, and what a newcomer starts from."""

import copy
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel

from ..client.parameters import adapter_shapes, adapter_tensors
from ..fit import misfit
from ..server.aggregation import weighted_mean
from ..tensors import clone_tensors, tensors_sha256
from .card import TASKS
from .folder import divide_shared, sharing_of
from .merging import merge as merge_into_base
from .saved_config import as_json, comparable, config_dict
from .source import ClientAdapter, Source
from .whole_folder import FEDERATION, MIXTURE, WEIGHTS

logger = logging.getLogger(__name__)


def list_clients(
    source: str | Path,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> list[str]:
    """
    Lists the clients that can be loaded from a federation.

    Args:
        source, revision, subfolder, token, cache_dir, local_files_only:
            See [`load_personalized_model`].

    Returns:
        `list[str]`: their ids. Empty if only the shared tensors were published, or if each client has a repository of
        its own and is not named in this one.
    """
    origin = Source(source, revision, subfolder, token, cache_dir, local_files_only).open()
    federation = origin.federation
    return [
        client_id
        for client_id, entry in federation["clients"].items()
        if entry["path"] is not None or entry.get("repository")
    ]


def load_personalized_model(
    source: str | Path,
    client_id: str | Sequence[str],
    *,
    base_model: PreTrainedModel | PeftModel | str | None = None,
    merge: bool = False,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    **kwargs,
) -> PreTrainedModel | PeftModel:
    """
    Loads the base model with the adapter of one client, or of several.

    Adapters are named after their clients, so that `model.set_adapter("client_2")` switches to another one that is
    loaded. (An id that PEFT cannot take for a name, e.g. one with a dot, is changed; calling this function again with
    the model as `base_model` switches too, whatever the id.)

    Args:
        source (`str` or `Path`):
            Repository on the Hub, or folder written by `trainer.save_model()`.
        client_id (`str` or `Sequence[str]`):
            Client to load. Several are loaded side by side, and the first one is active.
        base_model ([`~transformers.PreTrainedModel`], [`~peft.PeftModel`] or `str`, *optional*):
            Base to put the adapter on: a loaded model, which is changed in place, or the name or folder of one. A
            model that this function returned takes the client as one more adapter. If `None`, the base is the one that
            the adapters were trained on.
        merge (`bool`, *optional*, defaults to `False`):
            Whether to merge the adapter into the base weights and return a plain model, e.g. for export. Where the
            adapter tells tied embeddings apart, they are no longer tied.
        revision (`str`, *optional*):
            Branch, tag or commit of the repository. A and all B of a federation are those of one commit.
        subfolder (`str`, *optional*):
            Folder of the federation within `source`.
        token (`str` or `bool`, *optional*):
            Token for private repositories. Defaults to the one logged in with.
        cache_dir (`str` or `Path`, *optional*):
            Folder for downloads. Defaults to the Hub's cache.
        local_files_only (`bool`, *optional*, defaults to `False`):
            Whether to look in the cache alone.
        kwargs:
            Passed to the base model's `from_pretrained`, e.g. `quantization_config` or `device_map`. `dtype` defaults
            to that of training; quantization is only what you pass.

    Returns:
        [`~peft.PeftModel`], or a [`~transformers.PreTrainedModel`] if `merge` is set, ready for inference.

    Raises:
        `FileNotFoundError`: there is no federation at `source`.
        `ValueError`: there is no such client (the message lists the ones there are), its file is not the one that was
            saved, or the base cannot take it. The base is then as it was.
        [`~huggingface_hub.errors.RepositoryNotFoundError`]: the repository does not exist, or `token` may not read it.

    Example:

    ```python
    >>> model = load_personalized_model("me/gsm8k-fedsa", client_id="client_1")
    >>> model = load_personalized_model("me/gsm8k-fedsa", client_id="client_2", base_model=model)
    >>> model.set_adapter("client_1")
    ```
    """
    client_ids = [client_id] if isinstance(client_id, str) else list(client_id)
    if not client_ids:
        raise ValueError("`client_id` is an empty list. Pass a client id, or several.")
    if merge and len(client_ids) > 1:
        raise ValueError(f"`merge=True` makes one plain model, but `client_id` names {len(client_ids)} clients.")
    if merge and isinstance(base_model, PeftModel):
        raise ValueError(
            "`merge=True` would write this client into the base weights under all adapters of the `PeftModel`. Pass "
            "the plain base model, or its name."
        )
    hub = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
    origin = Source(source, revision, subfolder, **hub).open()
    adapters = {client_id: origin.adapter(client_id) for client_id in client_ids}
    if base_model is None:
        base_model = origin.base_model()
        kwargs.setdefault("revision", origin.federation["base_revision"])
    if isinstance(base_model, str):
        base_model = _load_base(base_model, origin.federation, adapters[client_ids[0]], {**hub, **kwargs})
    elif kwargs:
        raise ValueError(
            f"`base_model` is already loaded, so {', '.join(f'`{name}`' for name in kwargs)} cannot apply to it. Pass "
            "its name instead, or leave them out."
        )
    model = base_model
    for client_id, adapter in adapters.items():
        model = _add_adapter(model, adapter, client_id)
    model.set_adapter(_adapter_name(model, client_ids[0]))
    if not merge:
        return model.eval()
    try:
        return merge_into_base(model)
    except ValueError:
        model.unload()
        raise


def _load_base(
    name: str, federation: Mapping[str, Any], adapter: ClientAdapter, kwargs: dict[str, Any]
) -> PreTrainedModel:
    kwargs.setdefault("dtype", federation["base_dtype"])
    if federation["quantization_config"] and "quantization_config" not in kwargs:
        logger.info(
            "The base model was quantized in training and is not now. `quantization_config` in %s says how it was.",
            FEDERATION,
        )
    _, kind = TASKS.get(as_json(adapter.config.task_type), TASKS[None])
    return getattr(transformers, kind).from_pretrained(
        name, **{key: value for key, value in kwargs.items() if value is not None}
    )


def _add_adapter(model: PreTrainedModel | PeftModel, adapter: ClientAdapter, client_id: str) -> PeftModel:
    """Adds a client's adapter to a model, or writes its tensors into the one of that name."""
    name = _adapter_name(model, client_id)
    if not isinstance(model, PeftModel):
        if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
            raise ValueError(
                "`base_model` already carries an adapter. Take it out with `unload()` first, or pass the `PeftModel`."
            )
        _check_fits(adapter_shapes(model, adapter.config), adapter, client_id)
        return PeftModel.from_pretrained(model, str(adapter.folder), adapter_name=name, config=adapter.config)
    if name in model.peft_config and _settings(model.peft_config[name]) != _settings(adapter.config):
        model.delete_adapter(name)  # One of the same name from elsewhere: its scale would stay.
    added = name not in model.peft_config
    if added:
        model.add_adapter(name, copy.deepcopy(adapter.config))
    try:
        expected = {key: tuple(tensor.shape) for key, tensor in adapter_tensors(model, name).items()}
        _check_fits(expected, adapter, client_id)
    except ValueError:
        if added:
            model.delete_adapter(name)
        raise
    model.load_adapter(str(adapter.folder), adapter_name=name)
    return model


def _settings(config: PeftConfig) -> dict[str, Any]:
    return comparable(json.loads(json.dumps(config_dict(config), default=str)))


def _check_fits(expected: Mapping[str, tuple[int, ...]], adapter: ClientAdapter, client_id: str) -> None:
    """PEFT ignores tensors too many and warns of missing ones. Here either means that something is wrong."""
    found = {key: tuple(tensor.shape) for key, tensor in adapter.tensors.items()}
    if problem := misfit(expected, found):
        raise ValueError(
            f"The adapter of {client_id!r} in {adapter.folder} {problem}. It was made for another base model or "
            "another adapter config."
        )


def _adapter_name(model: nn.Module, client_id: str) -> str:
    """
    The client's id, unless PEFT would mistake it for something else.

    PEFT makes attributes of adapter names, and finds them again as components of parameter names.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    reserved = {"weight", "bias", "base_layer", "base_model", "model", "original_module", "modules_to_save"}
    reserved.update(_module_names(base))
    misread = "." in client_id or "lora" in client_id or "vera" in client_id
    misread = misread or client_id.startswith("escaped-")
    if misread or client_id in reserved or hasattr(nn.ModuleDict(), client_id):
        return f"escaped-{client_id.encode().hex()}"
    return client_id


def _module_names(module: nn.Module) -> Iterator[str]:
    """Names of the base model's modules, without what adapters have added."""
    for name, child in module.named_children():
        yield name
        if not isinstance(child, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            yield from _module_names(child)


# Joining


@dataclass(frozen=True)
class Origin:
    """
    What a newcomer starts from.

    Args:
        federation (`dict[str, Any]`):
            Contents of `federation.json`.
        config ([`~peft.PeftConfig`]):
            Config of the adapter to create.
        saved_config ([`~peft.PeftConfig`]):
            The federation's own, which may have patterns where `config` has the names they stand for.
        shared (`dict[str, torch.Tensor]`):
            The server's tensors, fp32.
        start (`dict[str, torch.Tensor]`):
            A as every client has started, where each keeps its own.
        local (`dict[str, torch.Tensor]`, *optional*):
            What the newcomer starts from of its own. `None` means as the adapter is initialised: B is zero.
    """

    federation: dict[str, Any]
    config: PeftConfig
    saved_config: PeftConfig
    shared: dict[str, torch.Tensor]
    start: dict[str, torch.Tensor]
    local: dict[str, torch.Tensor] | None

    def restore_patterns(self, configs: Iterable[PeftConfig]) -> None:
        """Gives configs of adapters made from `config` the federation's patterns, so that both are saved alike."""
        for name in _NAMING_MODULES & vars(self.config).keys():
            if getattr(self.config, name) != getattr(self.saved_config, name):
                for config in configs:
                    setattr(config, name, copy.copy(getattr(self.saved_config, name)))


_NAMING_MODULES = {
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("rank_pattern", "alpha_pattern"),
}


def load_origin(
    source: str | Path, init_local: str, *, revision: str | None, subfolder: str | None, token: str | bool | None
) -> Origin:
    """
    Loads what a newcomer starts from.

    Args:
        source, revision, subfolder, token:
            See [`load_personalized_model`].
        init_local (`str`):
            `"zero"`, `"mean"` of the published clients, or the id of one of them.

    Raises:
        `ValueError`: there is no such client, or a file is not the one that was saved.
    """
    origin = Source(source, revision, subfolder, token).open()
    federation = origin.federation
    if federation["mutates_base"]:
        raise ValueError(
            f"The adapters of {source} were initialised with `init_lora_weights="
            f"{federation['adapter'].get('init_lora_weights')!r}`, which changed the base weights in a way a newcomer "
            "cannot repeat. Federations with the default initialisation can be joined."
        )
    shared = origin.read_adapter("shared", None, whose="The shared part")
    averaged, start = divide_shared(shared.tensors, federation)
    if tensors_sha256(averaged) != federation["shared_sha256"]:
        raise ValueError(MIXTURE.format(path=f"{source}/shared/{WEIGHTS}"))

    def local_of(client_id: str) -> dict[str, torch.Tensor]:
        tensors = origin.adapter(client_id).tensors
        share_of = sharing_of(tensors, federation, getattr(shared.config, "modules_to_save", None)).share_of
        return {key: t for key, t in tensors.items() if share_of.get(key) == "local"}

    local = None
    published = [client_id for client_id, entry in federation["clients"].items() if entry["path"] is not None]
    if init_local in ("zero", "mean") and init_local in federation["clients"]:
        raise ValueError(f"`init_local={init_local!r}` could mean the client of that name. Rename that client.")
    if init_local == "mean":
        if not published:
            raise ValueError(f'`init_local="mean"`, but {source} publishes no client. Use "zero".')
        local = weighted_mean((local_of(client_id), 1.0) for client_id in published)
    elif init_local != "zero":
        local = local_of(init_local)
    config = shared.config
    config.inference_mode = False
    for name in ("init_lora_weights", "init_weights"):  # A newcomer starts from what it draws.
        if name in vars(config):
            setattr(config, name, getattr(shared.saved_config, name))
    return Origin(
        federation,
        config,
        shared.saved_config,
        shared=clone_tensors(averaged, dtype=torch.float32),
        start=clone_tensors(start),
        local=local,
    )
