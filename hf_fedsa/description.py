"""What is said of a federation: to other clients, in its folder, and to a run that resumes it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .client.data import ONLY_CLIENT
from .config import ARGUMENTS_IN_CARD
from .federation import Federation
from .hub.publisher import Publisher
from .hub.saved_config import comparable, config_dict
from .hub.saving import describe_federation, save_federation
from .identity import describe_run
from .tensors import layout_sha256, tensors_sha256


def fingerprint_of(federation: Federation, base: Mapping[str, Any]) -> dict[str, Any]:
    """
    What must be equal on all clients of a federation.

    Args:
        base (`Mapping[str, Any]`):
            Description of the base model, see [`describe_base`]. Its name may differ: it may be a local folder's.
    """
    return {
        "method": federation.slots.sharing.method.name,
        "adapter_kind": federation.slots.kind.name,
        "adapter": comparable(config_dict(federation.slots.config)),
        "share_modules_to_save": federation.args.share_modules_to_save,
        "layout": layout_sha256(federation.slots.select(0, "shared")),
        "frozen": tensors_sha256(federation.frozen) if federation.frozen else None,
        "base": {name: value for name, value in base.items() if name != "revision"},
    }


def describe(federation: Federation, publisher: Publisher) -> dict[str, Any]:
    """What `federation.json` says, but for the hashes of files."""
    state, client = federation.server.state, federation.client.state
    # In the middle of a round, B of those that have returned an update is of that round already.
    last_round = state.last_round | dict.fromkeys(client.returned, client.round_index)
    clients = {}
    for client_id in federation.client_ids:
        clients[client_id] = {
            "num_examples": len(federation.rows.of[client_id]),
            "last_round": last_round.get(client_id) if federation.origin is None else None,
            "results": federation.results.by_client.get(client_id, {}),
            "joined": federation.origin is not None,
        }
    summary = {
        "rounds_done": state.rounds_done,
        "num_rounds": federation.args.rounds,
        "aggregation_weighting": federation.args.aggregation_weighting,
        "share_modules_to_save": federation.args.share_modules_to_save,
        "initial_shared_sha256": tensors_sha256(federation.server.initial_shared),
        "origin": federation.origin,
        "root_adapter": None if federation.rows.are_named else ONLY_CLIENT,
        "returned_rounds": 0,
        "hub_base_model": publisher.hub_base_model,
        "base_revision": (federation.args.model_init_kwargs or {}).get("revision"),
        "results_after_round": federation.results.after_round,
        "arguments": {
            "num_rounds": federation.args.rounds,
            **{name: getattr(federation.args, name) for name in ARGUMENTS_IN_CARD},
        },
        "card": publisher.card,
        "processing_files": publisher.processing_files,
        "clients": clients,
    }
    return describe_federation(
        model=federation.model,
        adapter_name=federation.slots.names[0],
        kind=federation.slots.kind,
        sharing=federation.slots.sharing,
        shared=federation.server.shared,
        frozen=federation.frozen,
        summary=json.loads(json.dumps(summary, default=str)),
    )


def save(federation: Federation, folder: Path, publisher: Publisher) -> None:
    """Writes what the clients serve with, and what is said of the federation, to an empty folder."""
    with federation.client.weights_to_be_used():
        save_federation(
            folder,
            describe(federation, publisher),
            federation.server.state.history,
            model=federation.model,
            adapter_name=federation.slots.names[0],
            shared=federation.server.shared,
            start=federation.start_of_a(),
            client_tensors=federation.adapter_of,
            initial_tensors=federation.created,
            frozen=federation.frozen,
        )


def identity_of(
    federation: Federation, base: Mapping[str, Any], fingerprints: Mapping[str, str], optimizer: Any
) -> dict[str, Any]:
    """
    All that the results depend on, see `hf_fedsa.identity`.

    Args:
        base (`Mapping[str, Any]`):
            Description of the base model.
        fingerprints (`Mapping[str, str]`):
            Hashes of the clients' rows.
        optimizer (`Any`):
            `optimizer_cls_and_kwargs`.
    """
    found = describe_run(
        args=federation.args,
        rows_of=federation.rows.of,
        config=federation.slots.config,
        method=federation.slots.sharing.method.name,
        kind=federation.slots.kind.name,
        parameters=federation.slots.parameters[0],
        origin=federation.origin and federation.origin["shared_sha256"],
        trains_shared=federation.slots.sharing.returns_anything,
        base_model=federation.base_model_name,
        base=base,
        row_fingerprints=fingerprints,
        optimizer=optimizer,
    )
    if not federation.engine.plans_rounds:
        # Its batches are those of all processes together.
        found["num_processes"] = federation.args.world_size
    return found
