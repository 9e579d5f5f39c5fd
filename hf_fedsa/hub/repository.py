"""What a repository holds at the head of a branch, and whether it may be written to."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from ..fit import first_difference
from .federation_file import read_federation_file, read_object, read_rounds
from .saved_config import comparable
from .whole_folder import CONFIG, FEDERATION, ROUNDS, join_path

logger = logging.getLogger(__name__)


def open_api(token: str | None) -> HfApi:
    """The Hub, for requests that name this package."""
    return HfApi(token=token, library_name="hf_fedsa", library_version=version("hf_fedsa"))


def full_name(api: HfApi, repo_id: str) -> str:
    """Id of a repository with its owner, who is the user of the token if none is named."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"`repo_id={repo_id!r}` cannot name a repository; a `commit_message` can. {error}") from error
    return repo_id if "/" in repo_id else f"{api.whoami()['name']}/{repo_id}"


def read_or_create(api: HfApi, repo_id: str, *, revision: str | None, private: bool | None) -> "Remote":
    """Reads a repository, after creating it if need be."""
    remote = Remote.read(api, repo_id, revision=revision, private=private)
    if remote is None:
        api.create_repo(repo_id, private=private is not False, exist_ok=True)
        remote = Remote.read(api, repo_id, revision=revision, private=private)
    return remote


@dataclass
class Remote:
    """What a repository holds at the head of a branch."""

    head: str
    federation: dict[str, Any] | None = None
    rounds: list[dict[str, Any]] = field(default_factory=list)
    fetch: Callable[[str], Path] | None = None

    @classmethod
    def read(cls, api: HfApi, repo_id: str, *, revision: str | None, private: bool | None) -> "Remote | None":
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
            comparable(config),
            comparable(read_object(self.fetch(join_path(path, CONFIG)), f"{CONFIG} of {repo_id}")),
        )
        if path == "" and self.federation["mutates_base"]:
            return  # A client's adapter has twice the rank then.
        if base_model and self.federation["base_model"]:
            ours["base_model"], theirs["base_model"] = base_model, self.federation["base_model"]
        if difference := first_difference(ours, theirs):
            key, here, there = difference
            raise ValueError(
                f"The repository {repo_id} holds a federation of another kind: its `{key}` is {there!r}, this one's "
                f"is {here!r}. Push to another repository."
            )
