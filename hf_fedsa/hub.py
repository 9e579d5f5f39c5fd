"""What is saved of a federation, what is pushed of it, and how it is loaded again."""

import copy
import json
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import transformers
from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    hf_hub_download,
)
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors
from torch import nn
from transformers import PreTrainedModel

from .adapter_file import check_tensors, config_to_build, read_adapter_config
from .client.parameters import ADAPTERS, AdapterKind, adapter_shapes, adapter_tensors, classify
from .client.slots import mutates_base
from .federation_file import read_federation_file, read_object, read_rounds
from .files import file_sha256, write_json, write_safetensors, write_text
from .folder import CONFIG, FEDERATION, ROUNDS, WEIGHTS, is_known_processing_file, locate, locate_own
from .merging import merge as merge_into_base
from .model_card import TASKS, make_model_card, summarize
from .server.aggregation import weighted_mean
from .tensors import clone_tensors, tensors_sha256

logger = logging.getLogger(__name__)

CARD = "README.md"

_VERSIONED = ("hf_fedsa", "peft", "transformers", "trl", "torch")
# Fields of an adapter's config that say nothing about the adapter, and those that mattered while it trained alone.
_INCIDENTAL = ("base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping", "task_type")
_OF_TRAINING = ("init_lora_weights", "init_weights", "lora_dropout", "vera_dropout")
# Settings of initialisations. They name files of this machine, and nothing after the initialisation reads them.
_OF_INITIALISATION = ("corda_config", "eva_config", "loftq_config", "lora_ga_config")

# Settings of quantizations that hold the texts they were calibrated with, and are of no use after it.
_OF_CALIBRATION = ("dataset", "tokenizer")


# Saving


def describe_federation(
    *,
    model: PeftModel,
    adapter_name: str,
    method: AdapterKind,
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
        method ([`~hf_fedsa.client.parameters.AdapterKind`]):
            Row of the adapter in the table of shared tensors.
        shared (`Mapping[str, torch.Tensor]`):
            The server's tensors.
        frozen (`Mapping[str, torch.Tensor]`):
            The adapter's constants, such as VeRA's projections.
        summary (`Mapping[str, Any]`):
            Further entries.
    """
    config = _config_to_save(model, adapter_name)
    base = model.get_base_model()
    name = config.base_model_name_or_path
    kinds = {part for key in adapter_tensors(model, adapter_name) for part in key.split(".")}
    return {
        **summary,
        "method": method.name,
        "task_type": _as_json(config.task_type),
        "base_model": name,
        "base_dtype": str(base.dtype).removeprefix("torch."),
        "quantization_config": _quantization(base),
        "mutates_base": mutates_base(config),
        "adapter": _adapter_summary(config),
        "shared_tensors": [kind for kind in method.shared if kind in kinds],
        "local_tensors": [kind for kind in method.local if kind in kinds],
        "shared_sha256": tensors_sha256(shared),
        "frozen_sha256": tensors_sha256(frozen) if frozen else None,
        "num_clients": len(summary["clients"]),
        "results": _summarize_results(summary["clients"], named=summary["clients"]),
        "client_repositories": False,
        "clients": {
            client_id: {**entry, "path": f"clients/{client_id}"} for client_id, entry in summary["clients"].items()
        },
        "versions": {name: version(name) for name in _VERSIONED},
    }


def name_on_hub(base_model: str | None) -> str | None:
    """
    The name of a base model if it is one of the Hub's. That of a folder on this machine is nobody else's business.

    To be asked where and when the model was loaded: a folder may be gone later, and its name look like a repository's.
    """
    if not base_model or os.path.isabs(base_model) or os.path.isdir(base_model):
        return None
    try:
        validate_repo_id(base_model)
    except HFValidationError:
        return None
    return base_model


# Numbers of so few unnamed clients would follow from a mean and the numbers of the named ones.
_FEWEST_UNNAMED = 3


def _summarize_results(clients: Mapping[str, Mapping[str, Any]], named: Iterable[str]) -> dict[str, dict[str, float]]:
    """Mean and spread of each metric over the clients: all of them, or the named ones if few others are behind it."""
    named = set(named)
    summary = {}
    for name in sorted({name for entry in clients.values() for name in entry["results"]}):
        values = {c: entry["results"].get(name) for c, entry in clients.items()}
        values = {client_id: value for client_id, value in values.items() if value is not None}
        unnamed = values.keys() - named
        if len(unnamed) < _FEWEST_UNNAMED:
            values = {client_id: value for client_id, value in values.items() if client_id in named}
        if not values:
            continue
        summary[name] = summarize(list(values.values()))
        if len(unnamed) >= _FEWEST_UNNAMED:
            del summary[name]["min"], summary[name]["max"]  # Each is the number of one client.
    return summary


def save_federation(
    directory: Path,
    federation: Mapping[str, Any],
    rounds: Sequence[Mapping[str, Any]],
    *,
    model: PeftModel,
    adapter_name: str,
    shared: Mapping[str, torch.Tensor],
    client_tensors: Callable[[str], Mapping[str, torch.Tensor]],
    initial_tensors: Mapping[str, torch.Tensor],
    frozen: Mapping[str, torch.Tensor],
) -> None:
    """
    Writes `shared/`, `clients/<client_id>/`, `rounds.jsonl`, the model card and `federation.json`.

    Args:
        directory (`Path`):
            Folder to write to. That of [`~hf_fedsa.folder.saving`], so that they replace the old ones all at once.
        federation (`Mapping[str, Any]`):
            What [`describe_federation`] returned. Its clients are saved.
        rounds (`Sequence[Mapping[str, Any]]`):
            One entry per finished round.
        model ([`~peft.PeftModel`]), adapter_name (`str`):
            Adapter whose config is saved.
        shared (`Mapping[str, torch.Tensor]`):
            The server's tensors.
        client_tensors (`Callable[[str], Mapping[str, torch.Tensor]]`):
            Complete adapter of a client, without its constants. Asked one client at a time.
        initial_tensors (`Mapping[str, torch.Tensor]`):
            The adapter as initialised, which some initialisations subtracted from the base weight.
        frozen (`Mapping[str, torch.Tensor]`):
            The adapter's constants.
    """
    config = _config_to_save(model, adapter_name)
    _write_adapter(directory / "shared", config, shared)
    entries = {}
    for client_id, entry in federation["clients"].items():
        tensors, client_config = {**client_tensors(client_id), **frozen}, config
        if mutates_base(config):
            client_config, tensors = _as_plain_lora(config, tensors, initial_tensors)
        path = _write_adapter(directory / "clients" / client_id, client_config, tensors)
        entries[client_id] = {**entry, "sha256": file_sha256(path)}
    complete = {**federation, "clients": entries}
    write_text(directory / ROUNDS, _jsonl(rounds))
    write_text(directory / CARD, make_model_card(complete, rounds, repo_id=None))
    write_json(directory / FEDERATION, complete)


def warn_of_other_clients(directory: Path, client_ids: Iterable[str]) -> None:
    """Warns of clients in a folder that a save of these leaves as they are."""
    saved = {path.name for path in (directory / "clients").glob("*") if path.is_dir()}
    if others := sorted(saved - set(client_ids)):
        logger.warning(
            "%s also holds %s of an earlier run, made for another A. Remove them unless you want to keep them.",
            directory / "clients",
            ", ".join(others),
        )


def save_processing_class(processing_class: Any, directory: Path) -> list[str]:
    """Saves a tokenizer or processor to a folder that is still empty, and returns the names of the files."""
    processing_class.save_pretrained(str(directory))
    return sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())


def _config_to_save(model: PeftModel, adapter_name: str) -> PeftConfig:
    config = copy.deepcopy(model.peft_config[adapter_name])
    config.inference_mode = True
    base = model.get_base_model()
    if config.base_model_name_or_path is None:
        config.base_model_name_or_path = base.config._name_or_path
    if config.task_type is None and type(base).__name__.endswith("ForCausalLM"):
        config.task_type = "CAUSAL_LM"  # Or PEFT's auto classes could not load it.
    return config


def _as_json(value: Any) -> Any:
    """A config value as JSON holds it. Sets are sorted, so that equal configs are equal files."""
    if isinstance(value, set):
        return sorted(value)
    return getattr(value, "value", value)


def _quantization(base: PreTrainedModel) -> dict[str, Any] | None:
    """What to pass to `BitsAndBytesConfig` (or its like) for the quantization of a base model."""
    config = getattr(base.config, "quantization_config", None)
    if config is None:
        return None
    settings = dict(config if isinstance(config, dict) else config.to_diff_dict())
    for name in _OF_CALIBRATION:
        settings.pop(name, None)
    return json.loads(json.dumps(settings, default=str))


def _config_dict(config: PeftConfig) -> dict[str, Any]:
    defaults = type(config)().to_dict()
    return {
        key: _as_json(defaults[key] if key in _OF_INITIALISATION else value) for key, value in config.to_dict().items()
    }


def _adapter_summary(config: PeftConfig) -> dict[str, Any]:
    """The settings of an adapter worth reading, without those left at their defaults."""
    plain = _config_dict(type(config)())
    return {
        key: value
        for key, value in _config_dict(config).items()
        if key not in _INCIDENTAL and (value != plain[key] or key in ("r", "lora_alpha"))
    }


def _write_adapter(directory: Path, config: PeftConfig, tensors: Mapping[str, torch.Tensor]) -> Path:
    path = directory / WEIGHTS
    write_safetensors(path, tensors)
    write_json(directory / CONFIG, _config_dict(config))
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


def _jsonl(rounds: Iterable[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(entry) + "\n" for entry in rounds)


# Publishing


def choose_clients(choice: str | Sequence[str] | None, client_ids: Sequence[str]) -> list[str]:
    """
    Resolves what the user said about publishing clients' adapters.

    Args:
        choice (`str` or `Sequence[str]`, *optional*):
            `"all"`, `"none"`, or ids.
        client_ids (`Sequence[str]`):
            The clients there are.

    Raises:
        `ValueError`: nothing was said, or a client does not exist.
    """
    if choice is None:
        raise ValueError(
            "`hub_clients` is not set. A client's adapter holds what it never shared in training, so nothing of it is "
            f'uploaded unless you say so: pass "all" to publish the adapters of all {len(client_ids)} clients, a list '
            'of client ids, or "none" to publish the shared tensors alone.'
        )
    names = [choice] if isinstance(choice, str) else list(choice)
    if ambiguous := sorted({"all", "none"} & set(client_ids) & set(names)):
        raise ValueError(
            f"`hub_clients={choice!r}` could mean the client called {ambiguous[0]!r}. Rename that client, or list "
            "others."
        )
    if names == ["all"]:
        return list(client_ids)
    if names in (["none"], []):
        return []
    if unknown := [name for name in names if name not in client_ids]:
        raise ValueError(
            f"`hub_clients` names {unknown[0]!r}, which is not a client. The clients are: {', '.join(client_ids)}."
        )
    return [client_id for client_id in client_ids if client_id in names]


def check_repository(
    repo_id: str,
    *,
    private: bool | None,
    token: str | None,
    revision: str | None,
    clients: Sequence[str] = (),
    client_repositories: bool | None = None,
    model: PeftModel | None = None,
    hub_base_model: str | None = None,
) -> None:
    """
    Checks before training that a repository can be pushed to after it.

    Args:
        repo_id, private, token, revision, clients, client_repositories:
            See [`push_federation`].
        model ([`~peft.PeftModel`], *optional*):
            Model whose adapter would be pushed. Without it, only the permissions are checked.
        hub_base_model (`str`, *optional*):
            Id of the base model on the Hub.

    Raises:
        `ValueError`: the repository is public, or holds another model or a federation of another kind.
        [`~huggingface_hub.errors.HfHubHTTPError`]: the token may not write to it.
    """
    api = _api(token)
    repo_id = _full_name(api, repo_id)
    remote = _existing(api, repo_id, revision=revision, private=private)
    if model is None:
        api.auth_check(repo_id, write=True)
        if client_repositories or (remote.federation is not None and remote.federation["client_repositories"]):
            _read_client_repositories(api, [f"{repo_id}-{client_id}" for client_id in clients])
    elif remote.federation is not None:
        config = _config_to_save(model, model.active_adapter)
        remote.check_same_adapter(hub_base_model, _config_dict(config), repo_id)


def _api(token: str | None) -> HfApi:
    return HfApi(token=token, library_name="hf_fedsa", library_version=version("hf_fedsa"))


def _full_name(api: HfApi, repo_id: str) -> str:
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"`repo_id={repo_id!r}` cannot name a repository; a `commit_message` can. {error}") from error
    return repo_id if "/" in repo_id else f"{api.whoami()['name']}/{repo_id}"


def push_federation(
    directory: str | Path,
    repo_id: str,
    *,
    clients: str | Sequence[str],
    client_repositories: bool | None = None,
    name_clients: bool = False,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str = "Push federation",
) -> CommitInfo:
    """
    Publishes a federation that `trainer.save_model()` wrote, as one commit.

    Files that the repository already has are not sent again. Clients of the repository that this federation does not
    know, such as newcomers, stay: if A has changed, they are given the new one, as clients that sit out a round are.

    Args:
        directory (`str` or `Path`):
            Folder to publish. Nothing else in it is read or sent.
        repo_id (`str`):
            Repository. It is created if it does not exist.
        clients (`str` or `Sequence[str]`):
            Clients whose adapters are published: `"all"`, `"none"`, or their ids. Those published earlier and not
            chosen now are deleted from the branch, though not from its history.
        client_repositories (`bool`, *optional*):
            Whether each of them goes to a repository of its own, `<repo_id>-<client_id>`, which is always private.
            `None` does what `repo_id` does already, and else keeps them in it.
        name_clients (`bool`, *optional*, defaults to `False`):
            Whether the clients that are not published in `repo_id` are named in it. Off, they are counted.
        private (`bool`, *optional*):
            Whether `repo_id` is private. `None` creates it so, and refuses one that is public.
        token (`str`, *optional*):
            Token with write permission. Defaults to the one logged in with.
        revision (`str`, *optional*):
            Branch to commit to.
        commit_message (`str`, *optional*, defaults to `"Push federation"`):
            Message of the commit.

    Returns:
        [`~huggingface_hub.CommitInfo`]: the commit to `repo_id`, or its last one if nothing has changed.

    Raises:
        `ValueError`: the folder is not whole, or the repository is public, or holds something else: another model, or
            a federation with another base, adapter or A.
        [`~huggingface_hub.errors.HfHubHTTPError`]: the Hub refused, e.g. for want of permission.
    """
    saved = read_saved(directory)
    return push_saved(
        saved,
        repo_id,
        clients=choose_clients(clients, saved.client_ids),
        client_repositories=client_repositories,
        name_clients=name_clients,
        private=private,
        token=token,
        revision=revision,
        commit_message=commit_message,
    )


def read_saved(directory: str | Path, processing_files: Iterable[str] = ()) -> "_Saved":
    """
    Reads what is to be pushed from a folder.

    Args:
        directory (`str` or `Path`):
            The folder.
        processing_files (`Iterable[str]`, *optional*):
            Files of the tokenizer or processor that this process has written itself, whatever their names.

    Raises:
        `ValueError`: its files are not of one save, or are not all its own.
    """
    return _Saved.read(Path(directory), processing_files)


def push_saved(
    saved: "_Saved",
    repo_id: str,
    *,
    clients: Sequence[str],
    client_repositories: bool | None,
    name_clients: bool,
    private: bool | None,
    token: str | None,
    revision: str | None,
    commit_message: str,
) -> CommitInfo:
    """[`push_federation`] of a folder that has been read, with ids alone as `clients`."""
    api = _api(token)
    repo_id = _full_name(api, repo_id)
    if not saved.federation["hub_base_model"]:
        logger.warning(
            "The base model %r was not loaded from the Hub, where others could find it, so its name is not pushed. "
            "Set `hub_base_model` to its id there.",
            saved.federation["base_model"],
        )
    remote = _Remote.read(api, repo_id, revision=revision, private=private)
    if client_repositories is None:
        client_repositories = bool(remote and remote.federation and remote.federation["client_repositories"])

    def plan(remote: _Remote) -> tuple[dict[str, bytes | Path], list[CommitOperationDelete]]:
        return saved.files(
            remote,
            repo_id=repo_id,
            published=clients,
            name_clients=name_clients,
            client_repositories=client_repositories,
        )

    # What cannot be joined is refused before anything is uploaded.
    planned = plan(remote) if remote is not None else None
    if client_repositories:
        _push_to_client_repositories(api, saved, repo_id, clients, commit_message)
    attempts = 3
    while True:
        if planned is None:
            remote = _existing(api, repo_id, revision=revision, private=private)
            planned = plan(remote)
        try:
            commit = _commit(api, repo_id, *planned, remote=remote, revision=revision, message=commit_message)
        except HfHubHTTPError as error:
            # Someone else, e.g. a newcomer, has pushed since the repository was read, so there is more to join.
            attempts -= 1
            if error.response.status_code != 412 or attempts == 0:
                raise
            planned = None
        else:
            saved.pushed.update(entry["sha256"] for entry in saved.federation["clients"].values() if entry["sha256"])
            return commit


def _existing(api: HfApi, repo_id: str, *, revision: str | None, private: bool | None) -> "_Remote":
    """Reads a repository, after creating it if need be."""
    remote = _Remote.read(api, repo_id, revision=revision, private=private)
    if remote is None:
        api.create_repo(repo_id, private=private is not False, exist_ok=True)
        remote = _Remote.read(api, repo_id, revision=revision, private=private)
    return remote


def _push_to_client_repositories(
    api: HfApi, saved: "_Saved", repo_id: str, chosen: Sequence[str], message: str
) -> None:
    names = {client_id: f"{repo_id}-{client_id}" for client_id in saved.client_ids}
    remotes = _read_client_repositories(api, [names[client_id] for client_id in chosen])
    for client_id, remote in zip(chosen, remotes, strict=True):
        if remote is not None and remote.federation is not None:
            if list(remote.federation["clients"]) != [client_id] or remote.federation["clients"][client_id]["path"]:
                raise ValueError(f"The repository {names[client_id]} exists and holds another federation. Rename it.")
            remote.check_same_adapter(saved.federation["hub_base_model"], saved.config, names[client_id], path="")
    for client_id, remote in zip(chosen, remotes, strict=True):
        remote = remote or _existing(api, names[client_id], revision=None, private=True)
        files = saved.client_repository_files(client_id, repo_id=names[client_id])
        _commit(api, names[client_id], files, [], remote=remote, revision=None, message=message)
    if left := [name for c, name in names.items() if c not in chosen and api.repo_exists(name)]:
        logger.warning(
            "%s still exist, of clients that are not pushed now. Delete them (`HfApi().delete_repo`) to take the "
            "adapters back.",
            ", ".join(left),
        )


def _read_client_repositories(api: HfApi, names: Sequence[str]) -> "list[_Remote | None]":
    for name in names:
        validate_repo_id(name)
    return [_Remote.read(api, name, revision=None, private=True) for name in names]


def _commit(
    api: HfApi,
    repo_id: str,
    files: Mapping[str, bytes | Path],
    deleted: Sequence[CommitOperationDelete],
    *,
    remote: "_Remote",
    revision: str | None,
    message: str,
) -> CommitInfo:
    added = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in files.items()]
    return api.create_commit(
        repo_id, [*deleted, *added], commit_message=message, revision=revision, parent_commit=remote.head
    )


@dataclass
class _Remote:
    """What a repository holds at the head of a branch."""

    head: str
    federation: dict[str, Any] | None = None
    rounds: list[dict[str, Any]] = field(default_factory=list)
    fetch: Callable[[str], Path] | None = None

    @classmethod
    def read(cls, api: HfApi, repo_id: str, *, revision: str | None, private: bool | None) -> "_Remote | None":
        """Returns `None` if the repository does not exist. Raises `ValueError` if it must not be written to."""
        try:
            info = api.repo_info(repo_id, revision=revision)
        except RepositoryNotFoundError:
            return None
        if info.private and private is False:
            logger.warning("%s exists and stays private. Its settings on the Hub can make it public.", repo_id)
        if not info.private and private is not False:
            raise ValueError(
                f"The repository {repo_id} exists and is public. Make it private, choose another one, or say that it "
                "is to be public: `hub_private_repo=False` (`private=False`)."
            )
        paths = {sibling.rfilename for sibling in info.siblings}
        if FEDERATION not in paths:
            if models := sorted(path for path in paths if path.endswith(("config.json", ".safetensors", ".bin"))):
                raise ValueError(
                    f"The repository {repo_id} exists and is not a federation: it holds {models[0]} and no "
                    f"{FEDERATION}. Choose another name."
                )
            return cls(info.sha)

        def fetch(name: str) -> Path:
            return Path(hf_hub_download(repo_id, name, revision=info.sha, token=api.token))

        federation = read_federation_file(fetch(FEDERATION), f"{FEDERATION} of {repo_id}")
        rounds = read_rounds(fetch(ROUNDS)) if ROUNDS in paths else []
        return cls(info.sha, federation, rounds, fetch)

    def check_same_adapter(
        self, base_model: str | None, config: Mapping[str, Any], repo_id: str, path: str = "shared"
    ) -> None:
        """Raises `ValueError` if the repository's adapters are of another base model or another config."""
        ours, theirs = (
            _comparable(config),
            _comparable(read_object(self.fetch(_join_path(path, CONFIG)), f"{CONFIG} of {repo_id}")),
        )
        if path == "" and self.federation["mutates_base"]:
            return  # A client's adapter has twice the rank then.
        if base_model and self.federation["base_model"]:
            ours["base_model"], theirs["base_model"] = base_model, self.federation["base_model"]
        for key in sorted(ours.keys() | theirs.keys()):
            if ours.get(key) != theirs.get(key):
                raise ValueError(
                    f"The repository {repo_id} holds a federation of another kind: its `{key}` is "
                    f"{theirs.get(key)!r}, this one's is {ours.get(key)!r}. Push to another repository."
                )


@dataclass
class _Saved:
    """A federation in a folder, whose files are those that its `federation.json` lists."""

    directory: Path
    federation: dict[str, Any]
    rounds: list[dict[str, Any]]
    shared: dict[str, torch.Tensor]
    # Hashes of the clients' files that this process has pushed: of these it knows that they are its own.
    pushed: set[str] = field(default_factory=set)

    @classmethod
    def read(cls, directory: Path, processing_files: Iterable[str] = ()) -> "_Saved":
        federation = read_federation(directory)
        names = [*_adapter_paths("shared"), FEDERATION, ROUNDS, *federation["processing_files"]]
        for entry in federation["clients"].values():
            if entry["path"] is not None:
                names += _adapter_paths(entry["path"])
        for name in names:
            locate_own(directory, name)
        if unknown := set(federation["processing_files"]) - set(processing_files):
            _check_processing_files(directory, unknown)
        # A run that goes on, or starts anew, in the same folder adds rounds that the saved adapters are not of.
        rounds = read_rounds(locate(directory, ROUNDS))[: federation["rounds_done"]]
        shared = _load_checked(locate(directory, f"shared/{WEIGHTS}"), "The shared part")
        if tensors_sha256(shared) != federation["shared_sha256"]:
            raise ValueError(_MIXTURE.format(path=directory / "shared" / WEIGHTS))
        if rounds and rounds[-1]["shared_sha256"] != federation["shared_sha256"]:
            raise ValueError(_MIXTURE.format(path=directory / ROUNDS))
        for client_id, entry in federation["clients"].items():
            if entry["path"] is not None:
                path = locate(directory, _join_path(entry["path"], WEIGHTS))
                if not path.is_file() or file_sha256(path) != entry["sha256"]:
                    raise ValueError(_MIXTURE.format(path=path))
                _load_checked(path, f"The adapter of {client_id!r}")
        return cls(directory, federation, rounds, shared)

    @property
    def config(self) -> dict[str, Any]:
        """Config of the adapters."""
        return self._read_config("shared")

    def _read_config(self, folder: str) -> dict[str, Any]:
        path = locate(self.directory, _join_path(folder, CONFIG))
        if not path.is_file():
            raise ValueError(_MIXTURE.format(path=path))
        return read_object(path, str(path))

    @property
    def processing_files(self) -> dict[str, bytes | Path]:
        """Files of the tokenizer or processor, by their names."""
        return {name: locate(self.directory, name) for name in self.federation["processing_files"]}

    @property
    def client_ids(self) -> list[str]:
        """Clients whose adapters are here."""
        return [client_id for client_id, entry in self.federation["clients"].items() if entry["path"] is not None]

    def files(
        self,
        remote: _Remote,
        *,
        repo_id: str,
        published: Sequence[str],
        name_clients: bool,
        client_repositories: bool,
    ) -> tuple[dict[str, bytes | Path], list[CommitOperationDelete]]:
        """What the repository is to hold, and what is to be deleted from it."""
        here = [] if client_repositories else published
        files = {**self.processing_files, **self._adapter_files("shared", "shared")}
        for client_id in here:
            path = self.federation["clients"][client_id]["path"]
            files |= self._adapter_files(path, path)
        root = self.federation["root_adapter"] if self.federation["root_adapter"] in here else None
        if root is not None:
            files |= self._adapter_files(self.federation["clients"][root]["path"], "")
        names = list(self.federation["clients"]) if name_clients else here
        federation = self._published_federation(names, here)
        federation |= {"client_repositories": client_repositories, "root_adapter": root}
        if client_repositories:
            for client_id in set(names) & set(published):
                federation["clients"][client_id]["repository"] = f"{repo_id}-{client_id}"
        rounds = _only_named(self.rounds, set(names))
        deleted: list[CommitOperationDelete] = []
        if remote.federation is not None:
            federation, rounds, carried = self._join(federation, rounds, remote, repo_id)
            files |= carried
            deleted = self._deletions(remote, federation, repo_id)
        files |= _descriptions(federation, rounds, repo_id)
        return files, deleted

    def _deletions(self, remote: _Remote, federation: Mapping[str, Any], repo_id: str) -> list[CommitOperationDelete]:
        """Adapters that the repository holds and is not to hold any more."""
        folders = [
            entry["path"]
            for client_id, entry in remote.federation["clients"].items()
            if entry["path"] and not federation["clients"].get(client_id, {}).get("path")
        ]
        if folders:
            logger.warning(
                "%s no longer publishes %s. Earlier revisions of it still do: delete the repository, or squash its "
                "history, to take them back.",
                repo_id,
                ", ".join(folders),
            )
        root = [CONFIG, WEIGHTS] if remote.federation["root_adapter"] and not federation["root_adapter"] else []
        return [
            *(CommitOperationDelete(path_in_repo=f"{folder}/", is_folder=True) for folder in folders),
            *(CommitOperationDelete(path_in_repo=name) for name in root),
        ]

    def client_repository_files(self, client_id: str, repo_id: str) -> dict[str, bytes | Path]:
        """What a client's own repository is to hold."""
        federation = self._published_federation([client_id], [client_id])
        entry = {**federation["clients"][client_id], "path": ""}
        federation |= {"client_repositories": False, "root_adapter": None, "clients": {client_id: entry}}
        path = self.federation["clients"][client_id]["path"]
        rounds = _only_named(self.rounds, {client_id})
        return {**self.processing_files, **self._adapter_files(path, ""), **_descriptions(federation, rounds, repo_id)}

    def _adapter_files(self, source: str, target: str) -> dict[str, bytes | Path]:
        config = self._read_config(source)
        # A local folder's name means nothing to others, and may say more than its owner wants to.
        config["base_model_name_or_path"] = self.federation["hub_base_model"]
        return {
            _join_path(target, CONFIG): _json_bytes(config),
            _join_path(target, WEIGHTS): locate(self.directory, _join_path(source, WEIGHTS)),
        }

    def _published_federation(self, names: Sequence[str], published: Sequence[str]) -> dict[str, Any]:
        entries = {}
        for client_id in names:
            entry = self.federation["clients"][client_id]
            entries[client_id] = dict(entry) if client_id in published else {**entry, "path": None, "sha256": None}
        origin = self.federation["origin"]
        return {
            **self.federation,
            "base_model": self.federation["hub_base_model"],
            # The names of the clients it was joined from are not this federation's to publish.
            "origin": origin and {key: value for key, value in origin.items() if key != "clients"},
            "clients": entries,
            "results": _summarize_results(self.federation["clients"], named=names),
        }

    def _join(
        self, federation: dict[str, Any], rounds: list[dict[str, Any]], remote: _Remote, repo_id: str
    ) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, bytes | Path]]:
        """
        Joins this federation with what the repository holds.

        Returns:
            `federation.json`, `rounds.jsonl`, and, where A has changed, files of clients known there alone.
        """
        there = remote.federation
        remote.check_same_adapter(federation["base_model"], self.config, repo_id)
        # Not the clients of a federation that was trained anew: their B would be joined with an A they never saw.
        lineage = {self.federation["initial_shared_sha256"], *(entry["shared_sha256"] for entry in self.rounds)}
        descends = there["shared_sha256"] in lineage
        others = {c: entry for c, entry in there["clients"].items() if c not in self.federation["clients"]}
        newcomer = self.federation["origin"] is not None
        if (others or newcomer or there["returned_rounds"]) and not descends:
            what = f"clients that this federation does not know ({', '.join(others)})" if others else "a federation"
            raise ValueError(
                f"{repo_id} holds {what}, with an A that this one was not trained from. Start again from what is "
                "there now (`FederatedTrainer.from_shared`), or push to another repository."
            )
        self._check_names(there, repo_id)
        carried: dict[str, bytes | Path] = {}
        if there["shared_sha256"] != self.federation["shared_sha256"]:
            for client_id, entry in others.items():
                if entry.get("path"):
                    carried |= self._with_new_shared(client_id, entry, remote)
        known = set(there["clients"])
        if newcomer:
            seen = {there["shared_sha256"], *(entry["shared_sha256"] for entry in remote.rounds)}
            added = [entry for entry in rounds if entry["shared_sha256"] not in seen]
            rounds = remote.rounds + [{**entry, "round": len(remote.rounds) + i} for i, entry in enumerate(added)]
            federation = {
                **there,
                "shared_sha256": federation["shared_sha256"],
                "rounds_done": there["rounds_done"] + len(added),
                "returned_rounds": there["returned_rounds"] + len(added),
                "clients": {**others, **federation["clients"]},
                "num_clients": there["num_clients"] + len(set(federation["clients"]) - known),
            }
        else:
            federation = {
                **federation,
                "clients": {**federation["clients"], **others},
                "num_clients": federation["num_clients"] + len(others),
            }
        return federation, rounds, carried

    def _check_names(self, there: Mapping[str, Any], repo_id: str) -> None:
        """Raises `ValueError` if a client of the repository has the name of one of these, and is another."""
        known = set((self.federation["origin"] or {}).get("clients", ()))
        for client_id, entry in self.federation["clients"].items():
            other = there["clients"].get(client_id)
            if other is None or client_id in known or other["sha256"] in {*self.pushed, entry["sha256"]}:
                continue
            if other["joined"] or entry["joined"]:
                raise ValueError(
                    f"{repo_id} already holds a client called {client_id!r} that this federation did not put there. "
                    "Give one of them another name."
                )

    def _with_new_shared(self, client_id: str, entry: dict[str, Any], remote: _Remote) -> dict[str, bytes | Path]:
        """A client's complete adapter with this federation's A in place of the one it had. Updates its `entry`."""
        if self.federation["mutates_base"]:
            raise ValueError(
                f"The repository also holds the client {client_id!r}, whose adapter cannot be given the new A: "
                f"`init_lora_weights` changed the base weights. Push to another repository."
            )
        path = remote.fetch(_join_path(entry["path"], WEIGHTS))
        if file_sha256(path) != entry["sha256"]:
            raise ValueError(_MIXTURE.format(path=path))
        tensors = _load_checked(path, f"The adapter of {client_id!r} in the repository")
        if wrong := [key for key, new in self.shared.items() if key not in tensors or tensors[key].shape != new.shape]:
            raise ValueError(
                f"The adapter of the client {client_id!r} in the repository has no `{wrong[0]}` of the shape it has "
                "here, so it was made for another base model. Push to another repository."
            )
        tensors |= {key: new.to(tensors[key].dtype) for key, new in self.shared.items()}
        content = to_safetensors(tensors, metadata={"format": "pt"})
        entry["sha256"] = sha256(content).hexdigest()
        files: dict[str, bytes | Path] = {_join_path(entry["path"], WEIGHTS): content}
        if remote.federation["root_adapter"] == client_id:
            files[WEIGHTS] = content
        return files


def _adapter_paths(folder: str) -> list[str]:
    return [_join_path(folder, CONFIG), _join_path(folder, WEIGHTS)]


def _check_processing_files(directory: Path, names: Iterable[str]) -> None:
    """A `federation.json` may come from anyone, and must not choose what else of a folder is uploaded."""
    for name in sorted(names):
        if not is_known_processing_file(name):
            raise ValueError(
                f"{FEDERATION} in {directory} lists {name!r} among the files of the tokenizer or processor, and it is "
                "no file of a tokenizer or processor of transformers. If it is one of yours, push with "
                "`trainer.push_to_hub()`; else take it out of `processing_files`."
            )
        if not locate(directory, name).is_file():
            raise ValueError(_MIXTURE.format(path=directory / name))


def _only_named(rounds: Iterable[Mapping[str, Any]], names: set[str]) -> list[dict[str, Any]]:
    """Rounds in which clients outside of `names` are counted, not named, and their losses left to the mean."""
    only = []
    for entry in rounds:
        clients = set(entry["clients"])
        public: dict[str, Any] = {"num_clients": len(clients), **entry}
        unnamed = clients - names
        if unnamed and len(unnamed) >= _FEWEST_UNNAMED:
            public["loss"] = fmean(entry["losses"].values())
        for key, value in entry.items():
            if isinstance(value, Mapping):
                public[key] = {client_id: number for client_id, number in value.items() if client_id in names}
            elif isinstance(value, list):
                public[key] = [item for item in value if isinstance(item, str) and item in names]
        only.append(public)
    return only


def _descriptions(
    federation: Mapping[str, Any], rounds: Sequence[Mapping[str, Any]], repo_id: str
) -> dict[str, bytes | Path]:
    return {
        FEDERATION: _json_bytes(federation),
        ROUNDS: _jsonl(rounds).encode(),
        CARD: make_model_card(federation, rounds, repo_id).encode(),
    }


def _comparable(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in (*_INCIDENTAL, *_OF_TRAINING)}


def _json_bytes(value: Any) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()


def _join_path(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


# Loading


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
    origin = _Source(source, revision, subfolder, token, cache_dir, local_files_only).open()
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
    origin = _Source(source, revision, subfolder, **hub).open()
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


def read_federation(directory: Path) -> dict[str, Any]:
    """Reads `federation.json`. Raises `FileNotFoundError` where there is none."""
    return _Source(directory).open().federation


_MIXTURE = (
    f"{{path}} is missing or is not the file that {FEDERATION} lists, so it may belong to another save or another "
    "client. Save or publish the federation again."
)


def _load_checked(path: Path, whose: str) -> dict[str, torch.Tensor]:
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} cannot be read as safetensors ({error}). Files of another kind, such as pickles, are not opened."
        ) from error
    check_tensors(tensors, f"{whose} ({path})")
    return tensors


@dataclass(frozen=True)
class _Adapter:
    """A client's adapter on this machine."""

    folder: Path
    tensors: dict[str, torch.Tensor]
    config: PeftConfig  # To build it with.
    saved_config: PeftConfig


@dataclass(frozen=True)
class _Source:
    """Where a federation is: a folder, or a repository at a revision."""

    location: str | Path
    revision: str | None = None
    subfolder: str | None = None
    token: str | bool | None = None
    cache_dir: str | Path | None = None
    local_files_only: bool = False

    @property
    def is_local(self) -> bool:
        return isinstance(self.location, Path) or os.path.isdir(self.location)

    def fetch(self, name: str) -> Path | None:
        """Path of a file on this machine, or `None` if the source does not have it."""
        if self.is_local:
            path = locate(Path(self.location) / (self.subfolder or ""), name)
            return path if path.is_file() else None
        name = _join_path(self.subfolder or "", name)
        try:
            path = hf_hub_download(
                self.location,
                name,
                revision=self.revision,
                token=self.token,
                cache_dir=self.cache_dir,
                local_files_only=self.local_files_only,
            )
        except RemoteEntryNotFoundError:
            return None
        except RepositoryNotFoundError as error:
            error.append_to_message(f"\nNor is there a folder {str(self.location)!r} on this machine.")
            raise
        except HFValidationError as error:
            raise FileNotFoundError(
                f"{str(self.location)!r} is neither a folder nor the id of a repository ({error})."
            ) from error
        return Path(path)

    def open(self) -> "_Origin":
        """Reads `federation.json` and stays with the commit it was found in, so that all files are of one push."""
        path = self.fetch(FEDERATION)
        if path is None:
            place = _join_path(str(self.location), self.subfolder or "").rstrip("/")
            raise FileNotFoundError(
                f"{place} holds no federation: {FEDERATION} is missing. Pass a folder that `trainer.save_model()` "
                "wrote, or a repository that `trainer.push_to_hub()` wrote."
            )
        federation = read_federation_file(path, str(path))
        if self.is_local:
            return _Origin(self, federation)
        # In the Hub's cache, files lie under `snapshots/<commit>/`.
        depth = len(Path(_join_path(self.subfolder or "", FEDERATION)).parts)
        return _Origin(replace(self, revision=path.parents[depth - 1].name), federation)


@dataclass(frozen=True)
class _Origin:
    """A federation that was found."""

    source: _Source
    federation: dict[str, Any]

    def base_model(self) -> str:
        if not self.federation["base_model"]:
            raise ValueError(
                f"{self.source.location} does not name its base model, since it was built in memory or is not on the "
                "Hub. Pass it as `base_model`."
            )
        return self.federation["base_model"]

    def adapter(self, client_id: str) -> _Adapter:
        """A client's complete adapter, checked against `federation.json`."""
        clients = self.federation["clients"]
        entry = clients.get(client_id, {})
        if entry.get("path") is None:
            if self.federation["client_repositories"] and not self.source.is_local:
                return self._from_client_repository(client_id)
            available = [name for name, other in clients.items() if other.get("path") is not None]
            raise ValueError(
                f"{self.source.location} holds no client {client_id!r}. Its clients are: "
                f"{', '.join(available) or 'none, only the shared tensors were published'}."
            )
        return self.read_adapter(entry["path"], entry["sha256"], whose=f"The adapter of {client_id!r}")

    def _from_client_repository(self, client_id: str) -> _Adapter:
        source = replace(self.source, location=f"{self.source.location}-{client_id}", revision=None, subfolder=None)
        try:
            own = source.open()
        except RepositoryNotFoundError as error:
            raise ValueError(
                f"The clients of {self.source.location} have private repositories of their own. There is no "
                f"{source.location}, or this token may not read it."
            ) from error
        if own.federation["shared_sha256"] != self.federation["shared_sha256"]:
            raise ValueError(
                f"{source.location} holds the adapter of another push than {self.source.location} does at this "
                f"revision: their A differ. To load it as it is, pass {source.location!r} and a revision of that."
            )
        return own.adapter(client_id)

    def read_adapter(self, path: str, expected: str | None, *, whose: str) -> _Adapter:
        config, weights = self.source.fetch(_join_path(path, CONFIG)), self.source.fetch(_join_path(path, WEIGHTS))
        if config is None or weights is None or (expected is not None and file_sha256(weights) != expected):
            place = _join_path(str(self.source.location), _join_path(path, WEIGHTS if config else CONFIG))
            raise ValueError(_MIXTURE.format(path=place))
        tensors = _load_checked(weights, whose)
        saved_config = read_adapter_config(config, self.federation["method"])
        return _Adapter(
            weights.parent,
            tensors,
            config_to_build(saved_config, tensors, f"{whose} ({weights.parent})"),
            saved_config,
        )


def _load_base(name: str, federation: Mapping[str, Any], adapter: _Adapter, kwargs: dict[str, Any]) -> PreTrainedModel:
    kwargs.setdefault("dtype", federation["base_dtype"])
    if federation["quantization_config"] and "quantization_config" not in kwargs:
        logger.info(
            "The base model was quantized in training and is not now. `quantization_config` in %s says how it was.",
            FEDERATION,
        )
    _, kind = TASKS.get(_as_json(adapter.config.task_type), TASKS[None])
    return getattr(transformers, kind).from_pretrained(
        name, **{key: value for key, value in kwargs.items() if value is not None}
    )


def _add_adapter(model: PreTrainedModel | PeftModel, adapter: _Adapter, client_id: str) -> PeftModel:
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
    return _comparable(json.loads(json.dumps(_config_dict(config), default=str)))


def _check_fits(expected: Mapping[str, tuple[int, ...]], adapter: _Adapter, client_id: str) -> None:
    """PEFT ignores tensors too many and warns of missing ones. Here either means that something is wrong."""
    found = {key: tuple(tensor.shape) for key, tensor in adapter.tensors.items()}
    if missing := sorted(expected.keys() - found.keys()):
        problem = f"lacks {missing[0]!r}"
    elif excess := sorted(found.keys() - expected.keys()):
        problem = f"holds {excess[0]!r}, which the base model has no place for"
    elif wrong := [key for key in expected if expected[key] != found[key]]:
        problem = f"holds {wrong[0]!r} with the shape {found[wrong[0]]}, where {expected[wrong[0]]} is needed"
    else:
        return
    raise ValueError(
        f"The adapter of {client_id!r} in {adapter.folder} {problem}. It was made for another base model or another "
        "adapter config."
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
        local (`dict[str, torch.Tensor]`, *optional*):
            What the newcomer starts from of its own. `None` means as the adapter is initialised: B is zero.
    """

    federation: dict[str, Any]
    config: PeftConfig
    saved_config: PeftConfig
    shared: dict[str, torch.Tensor]
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
    origin = _Source(source, revision, subfolder, token).open()
    federation = origin.federation
    if federation["mutates_base"]:
        raise ValueError(
            f"The adapters of {source} were initialised with `init_lora_weights="
            f"{federation['adapter'].get('init_lora_weights')!r}`, which changed the base weights in a way a newcomer "
            "cannot repeat. Federations with the default initialisation can be joined."
        )
    shared = origin.read_adapter("shared", None, whose="The shared part")
    if tensors_sha256(shared.tensors) != federation["shared_sha256"]:
        raise ValueError(_MIXTURE.format(path=f"{source}/shared/{WEIGHTS}"))
    method = next(row for row in ADAPTERS if row.name == federation["method"])

    def local_of(client_id: str) -> dict[str, torch.Tensor]:
        modules, sharing = getattr(shared.config, "modules_to_save", None), federation["share_modules_to_save"]
        tensors = origin.adapter(client_id).tensors
        return {key: t for key, t in tensors.items() if classify(key, method, modules, sharing) == "local"}

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
    return Origin(federation, config, shared.saved_config, clone_tensors(shared.tensors, dtype=torch.float32), local)
