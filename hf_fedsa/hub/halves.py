"""A federation saved in two halves: what its server has, without a model, and what each client has."""

import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..adapters import kind_named
from ..files import file_sha256, write_safetensors, write_text
from ..fit import misfit
from ..metrics import rounds_jsonl
from ..tensors import clone_tensors, tensors_sha256
from .federation_file import read_object, read_rounds
from .folder import (
    divide_shared,
    read_federation,
    read_saved,
    sharing_of,
    warn_of_other_clients,
    write_descriptions,
)
from .publication import summarize_results
from .weights import check_tensors, load_checked
from .whole_folder import CONFIG, MIXTURE, ROUNDS, WEIGHTS, join_path, locate, saving

# The server's half


def open_shared(folder: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """
    Reads what a server starts from.

    Args:
        folder (`str` or `Path`):
            Folder that `trainer.save_model()` or [`save_server_half`] wrote.

    Returns:
        `tuple[dict[str, torch.Tensor], dict[str, Any]]`: the shared tensors, fp32, and the contents of
        `federation.json`.

    Raises:
        `FileNotFoundError`: there is no federation.
        `ValueError`: its shared tensors are not those that were saved, or clients elsewhere could not start from it.
    """
    shared, _, federation = _open(Path(folder))
    return shared, federation


def _open(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, Any]]:
    """See [`open_shared`]; in the middle, A as every client has started, where each keeps its own."""
    federation = read_federation(folder)
    if federation["mutates_base"]:
        raise ValueError(
            f"The adapters in {folder} were initialised with `init_lora_weights="
            f"{federation['adapter'].get('init_lora_weights')!r}`, which changed the base weights of one machine in a "
            "way that others cannot repeat. Save a federation with the default initialisation."
        )
    path = _existing(folder, join_path("shared", WEIGHTS))
    shared, start_of_a = divide_shared(load_checked(path, "The shared part"), federation)
    if tensors_sha256(shared) != federation["shared_sha256"]:
        raise ValueError(MIXTURE.format(path=path))
    return clone_tensors(shared, dtype=torch.float32), start_of_a, federation


def save_server_half(
    folder: str | Path,
    *,
    like: str | Path,
    shared: Mapping[str, torch.Tensor],
    rounds: Sequence[Mapping[str, Any]],
    clients: Mapping[str, int],
    arguments: Mapping[str, Any] | None = None,
) -> None:
    """
    Writes what a server has of a federation: all but the clients' adapters, which it never sees.

    The folder is the one that a trainer would have saved and published with `clients="none"`: A, the history, the card
    and `federation.json`, in which no client has an adapter. All of it takes its place at once, or nothing does.
    [`save_client_half`] adds clients to it.

    Args:
        folder (`str` or `Path`):
            Folder to write to. It may be `like`.
        like (`str` or `Path`):
            Folder that the server started from, which has the adapter's config, the tokenizer and the names.
        shared (`Mapping[str, torch.Tensor]`):
            The server's tensors as they are now.
        rounds (`Sequence[Mapping[str, Any]]`):
            The server's history, one entry per finished round. It says when a client last counted and how it did.
        clients (`Mapping[str, int]`):
            Rows of each client.
        arguments (`Mapping[str, Any]`, *optional*):
            Arguments of the run that are not those of `like`, such as `num_rounds`, for the card.

    Raises:
        `FileNotFoundError`: there is no federation in `like`.
        `ValueError`: the shared tensors do not fit those of `like`, are not finite, or are not those after the last
            round.
    """
    folder, like = Path(folder), Path(like)
    start, start_of_a, federation = _open(like)
    if problem := misfit(_shapes(start), _shapes(shared)):
        raise ValueError(
            f"The shared part {problem}: it does not fit the federation in {like}. Pass the folder that the server "
            "has started from."
        )
    shared = clone_tensors(shared, dtype=torch.float32)
    check_tensors(shared, "The shared part")
    digest = tensors_sha256(shared)
    if rounds and rounds[-1]["shared_sha256"] != digest:
        raise ValueError(
            f"The shared tensors are not those after round {rounds[-1]['round']}, the last one of `rounds`: their "
            "SHA-256 differ. Pass the tensors and the history of one moment."
        )
    entries = _entries(clients, rounds, federation)
    described = federation["arguments"] | dict(arguments or {})
    federation |= {
        "rounds_done": len(rounds),
        "returned_rounds": 0,
        "num_rounds": described.get("num_rounds"),
        "arguments": described,
        # A server that goes on with its own folder has started from what that one started from.
        "initial_shared_sha256": federation["initial_shared_sha256"]
        if federation["shared_sha256"] in {entry["shared_sha256"] for entry in rounds}
        else federation["shared_sha256"],
        "shared_sha256": digest,
        "clients": entries,
        "num_clients": len(entries),
        "results": summarize_results(entries, named=entries),
        "results_after_round": max((i for i, entry in enumerate(rounds, start=1) if entry.get("results")), default=0),
        "client_repositories": False,
        "root_adapter": None,
    }
    warn_of_other_clients(folder, ())
    with saving(folder) as scratch:
        for name in [join_path("shared", CONFIG), *federation["processing_files"]]:
            _copy(_existing(like, name), scratch / name)
        write_safetensors(scratch / "shared" / WEIGHTS, {**start_of_a, **shared})
        write_text(scratch / ROUNDS, rounds_jsonl(rounds))
        write_descriptions(scratch, federation, rounds)
        read_saved(scratch, federation["processing_files"])  # What could not be read again does not replace anything.


def _entries(
    clients: Mapping[str, int], rounds: Iterable[Mapping[str, Any]], federation: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """The clients as `federation.json` lists those whose adapters are elsewhere."""
    last_round: dict[str, int] = {}
    results: Mapping[str, Any] = {}
    for entry in rounds:
        if entry["counted"]:
            last_round |= dict.fromkeys(entry["weights"], entry["round"])
        results = entry.get("results", results)
    before = federation["clients"]
    return {
        client_id: {
            "num_examples": num_rows,
            "last_round": last_round.get(client_id),
            "results": dict(results.get(client_id, {})),
            "joined": before.get(client_id, {}).get("joined", federation["origin"] is not None),
            "path": None,
            "sha256": None,
        }
        for client_id, num_rows in clients.items()
    }


# A client's half


def save_client_half(
    folder: str | Path,
    client_id: str,
    *,
    shared: Mapping[str, torch.Tensor],
    local: Mapping[str, torch.Tensor],
) -> None:
    """
    Adds a client's complete adapter to a folder that [`save_server_half`] or a trainer wrote.

    It goes to `clients/<client_id>/`, where stock PEFT loads it, and is listed in `federation.json` and on the card.
    All of it takes its place at once, or nothing does.

    Args:
        folder (`str` or `Path`):
            The folder, whose A is the one that the client goes with.
        client_id (`str`):
            One of the federation's clients.
        shared (`Mapping[str, torch.Tensor]`):
            A as the client has it, in the dtype that it trains in.
        local (`Mapping[str, torch.Tensor]`):
            What the client keeps: B, its own heads, and the adapter's constants where it has any.

    Raises:
        `FileNotFoundError`: there is no federation in the folder.
        `ValueError`: the federation has no such client, A is not that of the folder, or `local` is not the rest of an
            adapter.
    """
    folder = Path(folder)
    saved, federation = open_shared(folder)
    if client_id not in federation["clients"]:
        raise ValueError(
            f"The federation in {folder} has no client {client_id!r}. Its clients are: "
            f"{', '.join(federation['clients']) or 'none'}."
        )
    if problem := misfit(_shapes(saved), _shapes(shared)):
        raise ValueError(
            f"The A of {client_id!r} {problem}: it does not fit the federation in {folder}. It is of another base "
            "model or another adapter config."
        )
    if changed := [key for key in sorted(saved) if not torch.equal(saved[key].to(shared[key]), shared[key])]:
        raise ValueError(
            f"The A of {client_id!r} is not that in {folder}: {changed[0]!r} differs. Save the client with the A of "
            "the last round, or the folder again."
        )
    config = join_path("shared", CONFIG)
    path = _existing(folder, config)
    modules_to_save = read_object(path, str(path)).get("modules_to_save") or []
    _check_local(client_id, shared, local, federation, modules_to_save)
    tensors = {**shared, **local}
    check_tensors(tensors, f"The adapter of {client_id!r}")
    with saving(folder) as scratch:
        place = f"clients/{client_id}"
        write_safetensors(scratch / place / WEIGHTS, tensors)
        _copy(_existing(folder, config), scratch / place / CONFIG)
        entry = {**federation["clients"][client_id], "path": place, "sha256": file_sha256(scratch / place / WEIGHTS)}
        federation["clients"][client_id] = entry
        rounds = read_rounds(locate(folder, ROUNDS))[: federation["rounds_done"]]
        write_descriptions(scratch, federation, rounds)


def _check_local(
    client_id: str,
    shared: Mapping[str, torch.Tensor],
    local: Mapping[str, torch.Tensor],
    federation: Mapping[str, Any],
    modules_to_save: Sequence[str],
) -> None:
    """Raises `ValueError` unless `local` is what a complete adapter has besides `shared`."""
    kind = kind_named(federation["adapter_kind"])
    sharing = sharing_of({**shared, **local}, federation, modules_to_save)
    if excess := sorted(key for key in local if sharing.share_of.get(key) == "shared"):
        raise ValueError(f"`local` of {client_id!r} holds {excess[0]!r}, which is shared. Pass it in `shared` alone.")
    frozen = {key: local[key] for key in local if key not in sharing.share_of}
    if (tensors_sha256(frozen) if frozen else None) != federation["frozen_sha256"]:
        raise ValueError(
            f"`local` of {client_id!r} {'has other constants than' if frozen else 'lacks the constants of'} the "
            f"federation, such as {', '.join(kind.constants) or 'none'}. Pass those that it was trained with."
        )
    # A row of the table lists what belongs together in one order, and then what every module has besides.
    partner = dict(zip(kind.a, kind.b, strict=False))
    partner |= {b: a for a, b in partner.items()}
    whole = {_module_and_name(key) for key in (*shared, *local)}
    needed = []
    for module, name in sorted(whole):
        if name in partner:
            needed += [(module, partner[name]), *((module, other) for other in kind.b[len(kind.a) :])]
    missing = [f"{module}.{name}" for module, name in needed if (module, name) not in whole]
    if not sharing.share_heads:
        missing += [head for head in modules_to_save if not any(f".{head}." in f".{key}." for key in local)]
    if missing:
        raise ValueError(
            f"`local` of {client_id!r} lacks {missing[0]!r}, so with A it is no complete adapter. Pass all that the "
            "client keeps."
        )


def _module_and_name(key: str) -> tuple[str, str]:
    module, _, name = key.removesuffix(".weight").rpartition(".")
    return module, name


# Files


def _shapes(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in tensors.items()}


def _existing(folder: Path, name: str) -> Path:
    path = locate(folder, name)
    if not path.is_file():
        raise ValueError(MIXTURE.format(path=path))
    return path


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
