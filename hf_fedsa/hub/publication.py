"""What a repository is to hold, and what of unnamed clients it says."""

import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from statistics import fmean
from typing import Any

from huggingface_hub import CommitOperationDelete
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors.torch import save as to_safetensors

from ..files import file_sha256
from ..metrics import rounds_jsonl
from .card import make_model_card, summarize
from .folder import SavedFederation
from .repository import Remote
from .weights import load_checked
from .whole_folder import CARD, CONFIG, FEDERATION, MIXTURE, ROUNDS, WEIGHTS, join_path, locate

logger = logging.getLogger(__name__)


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


def summarize_results(clients: Mapping[str, Mapping[str, Any]], named: Iterable[str]) -> dict[str, dict[str, float]]:
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


def only_named(rounds: Iterable[Mapping[str, Any]], names: set[str]) -> list[dict[str, Any]]:
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


def published_files(
    saved: SavedFederation,
    remote: Remote,
    *,
    repo_id: str,
    published: Sequence[str],
    name_clients: bool,
    client_repositories: bool,
) -> tuple[dict[str, bytes | Path], list[CommitOperationDelete]]:
    """What the repository is to hold, and what is to be deleted from it."""
    here = [] if client_repositories else published
    files = {**saved.processing_files, **_adapter_files(saved, "shared", "shared")}
    for client_id in here:
        path = saved.federation["clients"][client_id]["path"]
        files |= _adapter_files(saved, path, path)
    root = saved.federation["root_adapter"] if saved.federation["root_adapter"] in here else None
    if root is not None:
        files |= _adapter_files(saved, saved.federation["clients"][root]["path"], "")
    names = list(saved.federation["clients"]) if name_clients else here
    federation = _published_federation(saved, names, here)
    federation |= {"client_repositories": client_repositories, "root_adapter": root}
    if client_repositories:
        for client_id in set(names) & set(published):
            federation["clients"][client_id]["repository"] = f"{repo_id}-{client_id}"
    rounds = only_named(saved.rounds, set(names))
    deleted: list[CommitOperationDelete] = []
    if remote.federation is not None:
        federation, rounds, carried = _join(saved, federation, rounds, remote, repo_id)
        files |= carried
        deleted = _deletions(remote, federation, repo_id)
    files |= _descriptions(federation, rounds, repo_id)
    return files, deleted


def _deletions(remote: Remote, federation: Mapping[str, Any], repo_id: str) -> list[CommitOperationDelete]:
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


def client_repository_files(saved: SavedFederation, client_id: str, repo_id: str) -> dict[str, bytes | Path]:
    """What a client's own repository is to hold."""
    federation = _published_federation(saved, [client_id], [client_id])
    entry = {**federation["clients"][client_id], "path": ""}
    federation |= {"client_repositories": False, "root_adapter": None, "clients": {client_id: entry}}
    path = saved.federation["clients"][client_id]["path"]
    rounds = only_named(saved.rounds, {client_id})
    return {**saved.processing_files, **_adapter_files(saved, path, ""), **_descriptions(federation, rounds, repo_id)}


def _adapter_files(saved: SavedFederation, source: str, target: str) -> dict[str, bytes | Path]:
    config = saved.read_config(source)
    # A local folder's name means nothing to others, and may say more than its owner wants to.
    config["base_model_name_or_path"] = saved.federation["hub_base_model"]
    return {
        join_path(target, CONFIG): _json_bytes(config),
        join_path(target, WEIGHTS): locate(saved.directory, join_path(source, WEIGHTS)),
    }


def _published_federation(saved: SavedFederation, names: Sequence[str], published: Sequence[str]) -> dict[str, Any]:
    entries = {}
    for client_id in names:
        entry = saved.federation["clients"][client_id]
        entries[client_id] = dict(entry) if client_id in published else {**entry, "path": None, "sha256": None}
    origin = saved.federation["origin"]
    return {
        **saved.federation,
        "base_model": saved.federation["hub_base_model"],
        # The names of the clients it was joined from are not this federation's to publish.
        "origin": origin and {key: value for key, value in origin.items() if key != "clients"},
        "clients": entries,
        "results": summarize_results(saved.federation["clients"], named=names),
    }


def _join(
    saved: SavedFederation, federation: dict[str, Any], rounds: list[dict[str, Any]], remote: Remote, repo_id: str
) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, bytes | Path]]:
    """
    Joins this federation with what the repository holds.

    Returns:
        `federation.json`, `rounds.jsonl`, and, where A has changed, files of clients known there alone.
    """
    there = remote.federation
    remote.check_same_adapter(federation["base_model"], saved.config, repo_id)
    # Not the clients of a federation that was trained anew: their B would be joined with an A they never saw.
    lineage = {saved.federation["initial_shared_sha256"], *(entry["shared_sha256"] for entry in saved.rounds)}
    descends = there["shared_sha256"] in lineage
    others = {c: entry for c, entry in there["clients"].items() if c not in saved.federation["clients"]}
    newcomer = saved.federation["origin"] is not None
    if (others or newcomer or there["returned_rounds"]) and not descends:
        what = f"clients that this federation does not know ({', '.join(others)})" if others else "a federation"
        raise ValueError(
            f"{repo_id} holds {what}, with an A that this one was not trained from. Start again from what is "
            "there now (`FederatedTrainer.from_shared`), or push to another repository."
        )
    _check_names(saved, there, repo_id)
    carried: dict[str, bytes | Path] = {}
    if there["shared_sha256"] != saved.federation["shared_sha256"]:
        for client_id, entry in others.items():
            if entry.get("path"):
                carried |= _with_new_shared(saved, client_id, entry, remote)
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


def _check_names(saved: SavedFederation, there: Mapping[str, Any], repo_id: str) -> None:
    """Raises `ValueError` if a client of the repository has the name of one of these, and is another."""
    known = set((saved.federation["origin"] or {}).get("clients", ()))
    for client_id, entry in saved.federation["clients"].items():
        other = there["clients"].get(client_id)
        if other is None or client_id in known or other["sha256"] in {*saved.pushed, entry["sha256"]}:
            continue
        if other["joined"] or entry["joined"]:
            raise ValueError(
                f"{repo_id} already holds a client called {client_id!r} that this federation did not put there. "
                "Give one of them another name."
            )


def _with_new_shared(
    saved: SavedFederation, client_id: str, entry: dict[str, Any], remote: Remote
) -> dict[str, bytes | Path]:
    """A client's complete adapter with this federation's A in place of the one it had. Updates its `entry`."""
    if saved.federation["mutates_base"]:
        raise ValueError(
            f"The repository also holds the client {client_id!r}, whose adapter cannot be given the new A: "
            f"`init_lora_weights` changed the base weights. Push to another repository."
        )
    path = remote.fetch(join_path(entry["path"], WEIGHTS))
    if file_sha256(path) != entry["sha256"]:
        raise ValueError(MIXTURE.format(path=path))
    tensors = load_checked(path, f"The adapter of {client_id!r} in the repository")
    if wrong := [key for key, new in saved.shared.items() if key not in tensors or tensors[key].shape != new.shape]:
        raise ValueError(
            f"The adapter of the client {client_id!r} in the repository has no `{wrong[0]}` of the shape it has "
            "here, so it was made for another base model. Push to another repository."
        )
    tensors |= {key: new.to(tensors[key].dtype) for key, new in saved.shared.items()}
    content = to_safetensors(tensors, metadata={"format": "pt"})
    entry["sha256"] = sha256(content).hexdigest()
    files: dict[str, bytes | Path] = {join_path(entry["path"], WEIGHTS): content}
    if remote.federation["root_adapter"] == client_id:
        files[WEIGHTS] = content
    return files


def _descriptions(
    federation: Mapping[str, Any], rounds: Sequence[Mapping[str, Any]], repo_id: str
) -> dict[str, bytes | Path]:
    return {
        FEDERATION: _json_bytes(federation),
        ROUNDS: rounds_jsonl(rounds).encode(),
        CARD: make_model_card(federation, rounds, repo_id).encode(),
    }


def _json_bytes(value: Any) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()
