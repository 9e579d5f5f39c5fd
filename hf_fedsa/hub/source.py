"""Where a federation is, a folder or a repository, and its adapters, fetched and checked."""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HFValidationError, RemoteEntryNotFoundError, RepositoryNotFoundError
from peft import PeftConfig

from ..files import file_sha256
from .adapter_config import config_to_build, read_adapter_config
from .federation_file import read_federation_file
from .folder import no_federation
from .weights import load_checked
from .whole_folder import CONFIG, FEDERATION, MIXTURE, WEIGHTS, join_path, locate


@dataclass(frozen=True)
class ClientAdapter:
    """A client's adapter on this machine."""

    folder: Path
    tensors: dict[str, torch.Tensor]
    config: PeftConfig  # To build it with.
    saved_config: PeftConfig


@dataclass(frozen=True)
class Source:
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
        name = join_path(self.subfolder or "", name)
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

    def open(self) -> "FoundFederation":
        """Reads `federation.json` and stays with the commit it was found in, so that all files are of one push."""
        path = self.fetch(FEDERATION)
        if path is None:
            place = join_path(str(self.location), self.subfolder or "").rstrip("/")
            raise FileNotFoundError(no_federation(place))
        federation = read_federation_file(path, str(path))
        if self.is_local:
            return FoundFederation(self, federation)
        # In the Hub's cache, files lie under `snapshots/<commit>/`.
        depth = len(Path(join_path(self.subfolder or "", FEDERATION)).parts)
        return FoundFederation(replace(self, revision=path.parents[depth - 1].name), federation)


@dataclass(frozen=True)
class FoundFederation:
    """A federation that was found."""

    source: Source
    federation: dict[str, Any]

    def base_model(self) -> str:
        """Name of the base model. Raises `ValueError` if the federation does not say it."""
        if not self.federation["base_model"]:
            raise ValueError(
                f"{self.source.location} does not name its base model, since it was built in memory or is not on the "
                "Hub. Pass it as `base_model`."
            )
        return self.federation["base_model"]

    def adapter(self, client_id: str) -> ClientAdapter:
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

    def _from_client_repository(self, client_id: str) -> ClientAdapter:
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

    def read_adapter(self, path: str, expected: str | None, *, whose: str) -> ClientAdapter:
        """The adapter in a folder of the federation, whose tensors' file has the SHA-256 `expected`."""
        config, weights = self.source.fetch(join_path(path, CONFIG)), self.source.fetch(join_path(path, WEIGHTS))
        if config is None or weights is None or (expected is not None and file_sha256(weights) != expected):
            place = join_path(str(self.source.location), join_path(path, WEIGHTS if config else CONFIG))
            raise ValueError(MIXTURE.format(path=place))
        tensors = load_checked(weights, whose)
        saved_config = read_adapter_config(config, self.federation["adapter_kind"])
        return ClientAdapter(
            weights.parent,
            tensors,
            config_to_build(saved_config, tensors, f"{whose} ({weights.parent})"),
            saved_config,
        )
