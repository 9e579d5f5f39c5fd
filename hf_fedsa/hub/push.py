"""Repositories and commits: what is checked before a push, and the push."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import validate_repo_id

from .folder import SavedFederation, read_saved
from .publication import choose_clients, client_repository_files, published_files
from .repository import Remote, full_name, open_api, read_or_create
from .saved_config import config_dict, config_to_save

if TYPE_CHECKING:
    from peft import PeftModel

logger = logging.getLogger(__name__)


def check_repository(
    repo_id: str,
    *,
    private: bool | None,
    token: str | None,
    revision: str | None,
    clients: Sequence[str] = (),
    client_repositories: bool | None = None,
    model: "PeftModel | None" = None,
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
    api = open_api(token)
    repo_id = full_name(api, repo_id)
    remote = read_or_create(api, repo_id, revision=revision, private=private)
    if model is None:
        api.auth_check(repo_id, write=True)
        if client_repositories or (remote.federation is not None and remote.federation["client_repositories"]):
            _read_client_repositories(api, [f"{repo_id}-{client_id}" for client_id in clients])
    elif remote.federation is not None:
        config = config_to_save(model, model.active_adapter)
        remote.check_same_adapter(hub_base_model, config_dict(config), repo_id)


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


def push_saved(
    saved: SavedFederation,
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
    api = open_api(token)
    repo_id = full_name(api, repo_id)
    if not saved.federation["hub_base_model"]:
        logger.warning(
            "The base model %r was not loaded from the Hub, where others could find it, so its name is not pushed. "
            "Set `hub_base_model` to its id there.",
            saved.federation["base_model"],
        )
    remote = Remote.read(api, repo_id, revision=revision, private=private)
    if client_repositories is None:
        client_repositories = bool(remote and remote.federation and remote.federation["client_repositories"])

    def plan(remote: Remote) -> tuple[dict[str, bytes | Path], list[CommitOperationDelete]]:
        return published_files(
            saved,
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
            remote = read_or_create(api, repo_id, revision=revision, private=private)
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


def _push_to_client_repositories(
    api: HfApi, saved: SavedFederation, repo_id: str, chosen: Sequence[str], message: str
) -> None:
    names = {client_id: f"{repo_id}-{client_id}" for client_id in saved.client_ids}
    remotes = _read_client_repositories(api, [names[client_id] for client_id in chosen])
    for client_id, remote in zip(chosen, remotes, strict=True):
        if remote is not None and remote.federation is not None:
            if list(remote.federation["clients"]) != [client_id] or remote.federation["clients"][client_id]["path"]:
                raise ValueError(f"The repository {names[client_id]} exists and holds another federation. Rename it.")
            remote.check_same_adapter(saved.federation["hub_base_model"], saved.config, names[client_id], path="")
    for client_id, remote in zip(chosen, remotes, strict=True):
        remote = remote or read_or_create(api, names[client_id], revision=None, private=True)
        files = client_repository_files(saved, client_id, repo_id=names[client_id])
        _commit(api, names[client_id], files, [], remote=remote, revision=None, message=message)
    if left := [name for c, name in names.items() if c not in chosen and api.repo_exists(name)]:
        logger.warning(
            "%s still exist, of clients that are not pushed now. Delete them (`HfApi().delete_repo`) to take the "
            "adapters back.",
            ", ".join(left),
        )


def _read_client_repositories(api: HfApi, names: Sequence[str]) -> list[Remote | None]:
    for name in names:
        validate_repo_id(name)
    return [Remote.read(api, name, revision=None, private=True) for name in names]


def _commit(
    api: HfApi,
    repo_id: str,
    files: Mapping[str, bytes | Path],
    deleted: Sequence[CommitOperationDelete],
    *,
    remote: Remote,
    revision: str | None,
    message: str,
) -> CommitInfo:
    added = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in files.items()]
    return api.create_commit(
        repo_id, [*deleted, *added], commit_message=message, revision=revision, parent_commit=remote.head
    )
