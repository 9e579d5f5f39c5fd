"""A federation on disk: written, read, checked."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..adapters import factor_of, kind_named, last_component
from ..files import file_sha256, write_json, write_safetensors, write_text
from ..methods import Sharing, method_named
from ..tensors import tensors_sha256
from .card import make_model_card
from .federation_file import read_federation_file, read_object, read_rounds
from .processing_files import is_known_processing_file
from .weights import load_checked
from .whole_folder import CARD, CONFIG, FEDERATION, MIXTURE, ROUNDS, WEIGHTS, join_path, locate, locate_own

logger = logging.getLogger(__name__)

# Writing


def write_adapter(directory: Path, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Path:
    """Writes an adapter as PEFT saves it, and returns the path of its tensors."""
    path = directory / WEIGHTS
    write_safetensors(path, tensors)
    write_json(directory / CONFIG, config)
    return path


def write_descriptions(directory: Path, federation: Mapping[str, Any], rounds: Sequence[Mapping[str, Any]]) -> None:
    """Writes the model card and `federation.json`."""
    write_text(directory / CARD, make_model_card(federation, rounds, repo_id=None))
    write_json(directory / FEDERATION, federation)


def warn_of_other_clients(directory: Path, client_ids: Iterable[str]) -> None:
    """Warns of clients in a folder that a save of these leaves as they are."""
    saved = {path.name for path in (directory / "clients").glob("*") if path.is_dir()}
    if others := sorted(saved - set(client_ids)):
        logger.warning(
            "%s also holds %s of an earlier run, made for another A. Remove them unless you want to keep them.",
            directory / "clients",
            ", ".join(others),
        )


# Reading


def read_federation(directory: Path) -> dict[str, Any]:
    """Reads `federation.json`. Raises `FileNotFoundError` where there is none."""
    path = locate(directory, FEDERATION)
    if not path.is_file():
        raise FileNotFoundError(no_federation(str(directory)))
    return read_federation_file(path, str(path))


def divide_shared(
    tensors: Mapping[str, torch.Tensor], federation: Mapping[str, Any]
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """
    Divides what is in the folder `shared`.

    Args:
        tensors (`Mapping[str, torch.Tensor]`):
            Its tensors.
        federation (`Mapping[str, Any]`):
            Contents of `federation.json`.

    Returns:
        `tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]`: the server's tensors, and A as every client has
        started where each keeps its own.
    """
    start = {key: tensor for key, tensor in tensors.items() if last_component(key) in federation["local_tensors"]}
    return {key: tensor for key, tensor in tensors.items() if key not in start}, start


def sharing_of(keys: Iterable[str], federation: Mapping[str, Any], modules_to_save: Iterable[str] | None) -> Sharing:
    """
    The method of a federation on an adapter's tensors.

    Raises:
        `ValueError`: the method is not known here, or a tensor is no factor of the adapter.
    """
    kind = kind_named(federation["adapter_kind"])
    factors = {key: factor_of(key, kind, modules_to_save) for key in keys}
    return Sharing(factors, method_named(federation["method"]), federation["share_modules_to_save"])


def no_federation(place: str) -> str:
    """What to say where `federation.json` is missing."""
    return (
        f"{place} holds no federation: {FEDERATION} is missing. Pass a folder that `trainer.save_model()` "
        "wrote, or a repository that `trainer.push_to_hub()` wrote."
    )


def read_saved(directory: str | Path, processing_files: Iterable[str] = ()) -> "SavedFederation":
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
    return SavedFederation.read(Path(directory), processing_files)


@dataclass
class SavedFederation:
    """A federation in a folder, whose files are those that its `federation.json` lists."""

    directory: Path
    federation: dict[str, Any]
    rounds: list[dict[str, Any]]
    shared: dict[str, torch.Tensor]
    # Hashes of the clients' files that this process has pushed: of these it knows that they are its own.
    pushed: set[str] = field(default_factory=set)

    @classmethod
    def read(cls, directory: Path, processing_files: Iterable[str] = ()) -> "SavedFederation":
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
        shared = load_checked(locate(directory, f"shared/{WEIGHTS}"), "The shared part")
        shared, _ = divide_shared(shared, federation)
        if tensors_sha256(shared) != federation["shared_sha256"]:
            raise ValueError(MIXTURE.format(path=directory / "shared" / WEIGHTS))
        if rounds and rounds[-1]["shared_sha256"] != federation["shared_sha256"]:
            raise ValueError(MIXTURE.format(path=directory / ROUNDS))
        for client_id, entry in federation["clients"].items():
            if entry["path"] is not None:
                path = locate(directory, join_path(entry["path"], WEIGHTS))
                if not path.is_file() or file_sha256(path) != entry["sha256"]:
                    raise ValueError(MIXTURE.format(path=path))
                load_checked(path, f"The adapter of {client_id!r}")
        return cls(directory, federation, rounds, shared)

    @property
    def config(self) -> dict[str, Any]:
        """Config of the adapters."""
        return self.read_config("shared")

    def read_config(self, folder: str) -> dict[str, Any]:
        """Config of the adapter in a folder."""
        path = locate(self.directory, join_path(folder, CONFIG))
        if not path.is_file():
            raise ValueError(MIXTURE.format(path=path))
        return read_object(path, str(path))

    @property
    def processing_files(self) -> dict[str, bytes | Path]:
        """Files of the tokenizer or processor, by their names."""
        return {name: locate(self.directory, name) for name in self.federation["processing_files"]}

    @property
    def client_ids(self) -> list[str]:
        """Clients whose adapters are here."""
        return [client_id for client_id, entry in self.federation["clients"].items() if entry["path"] is not None]


def _adapter_paths(folder: str) -> list[str]:
    return [join_path(folder, CONFIG), join_path(folder, WEIGHTS)]


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
            raise ValueError(MIXTURE.format(path=directory / name))
