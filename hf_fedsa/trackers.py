"""What experiment trackers would upload of the clients, and how they are kept from it."""

import copy
import logging
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from transformers.integrations import integration_utils as integrations

from .config import FederatedConfig

logger = logging.getLogger(__name__)


def _is_on(name: str, default: str = "FALSE") -> bool:
    return os.environ.get(name, default).upper() in integrations.ENV_VARS_TRUE_VALUES


def _wandb_uploads(callback: Any) -> bool:
    return os.environ.get("WANDB_LOG_MODEL") in ("end", "checkpoint")


def _dvclive_uploads(callback: Any) -> bool:
    named = callback is not None and callback._log_model is not None
    return bool(callback._log_model) if named else _is_on("HF_DVCLIVE_LOG_MODEL") or _dvclive_all()


def _dvclive_all() -> bool:
    return os.environ.get("HF_DVCLIVE_LOG_MODEL", "").lower() == "all"


@dataclass(frozen=True)
class _Uploader:
    """
    A tracker of transformers that can upload checkpoints, `output_dir` or the model, each with the B of clients in it.

    Args:
        callback (`type`):
            Class of its callback.
        uploads (`Callable[[Any], bool]`):
            Whether it does, given the callback, or `None` where the Trainer is yet to make it.
        remedy (`str`):
            How to keep the tracker and stop the upload.
        pushes (`bool`, *optional*, defaults to `False`):
            Whether it makes a plain Trainer of the same arguments to save the model with. That Trainer also pushes all
            of `output_dir` if `push_to_hub` is set.
    """

    callback: type
    uploads: Callable[[Any], bool]
    remedy: str
    pushes: bool = False


_UPLOADERS = {
    "wandb": _Uploader(integrations.WandbCallback, _wandb_uploads, "Unset `WANDB_LOG_MODEL`", pushes=True),
    "comet_ml": _Uploader(
        integrations.CometCallback, lambda callback: _is_on("COMET_LOG_ASSETS"), "Unset `COMET_LOG_ASSETS`"
    ),
    "dagshub": _Uploader(
        integrations.DagsHubCallback,
        lambda callback: _is_on("HF_DAGSHUB_LOG_ARTIFACTS") or _is_on("HF_MLFLOW_LOG_ARTIFACTS"),
        "Unset `HF_DAGSHUB_LOG_ARTIFACTS` and `HF_MLFLOW_LOG_ARTIFACTS`",
    ),
    "mlflow": _Uploader(
        integrations.MLflowCallback,
        lambda callback: _is_on("HF_MLFLOW_LOG_ARTIFACTS"),
        "Unset `HF_MLFLOW_LOG_ARTIFACTS`",
    ),
    "neptune": _Uploader(
        integrations.NeptuneCallback,
        lambda callback: callback is not None and callback._log_checkpoints is not None,
        "Leave `log_checkpoints` of the `NeptuneCallback` out",
    ),
    # These two do so unless they are told not to.
    "clearml": _Uploader(
        integrations.ClearMLCallback, lambda callback: _is_on("CLEARML_LOG_MODEL", "TRUE"), "Set `CLEARML_LOG_MODEL=0`"
    ),
    "flyte": _Uploader(
        integrations.FlyteCallback,
        lambda callback: callback is None or callback.sync_checkpoints,
        "Pass `FlyteCallback(sync_checkpoints=False)` in `callbacks`",
    ),
    "dvclive": _Uploader(integrations.DVCLiveCallback, _dvclive_uploads, "Unset `HF_DVCLIVE_LOG_MODEL`", pushes=True),
}


def refuse_uploads_of_clients(
    args: FederatedConfig, callbacks: Iterable[Any] | None, all_published: Callable[[], bool]
) -> None:
    """
    Checks that no tracker uploads what `hub_clients` does not name.

    Args:
        args ([`FederatedConfig`]):
            Arguments of the run.
        callbacks (`Iterable[TrainerCallback]`, *optional*):
            The user's callbacks.
        all_published (`Callable[[], bool]`):
            Whether the adapters of all clients are meant to be published.

    Raises:
        `ValueError`: one would.
    """
    # A subclass stands before its parent in the table, and is found first.
    found = {name: None for name in args.report_to if name in _UPLOADERS}
    for callback in callbacks or ():
        kind = callback if isinstance(callback, type) else type(callback)
        for name, uploader in _UPLOADERS.items():
            if issubclass(kind, uploader.callback):
                found[name] = None if kind is callback else callback
                break
    for name, callback in found.items():
        uploader = _UPLOADERS[name]
        if not uploader.uploads(callback):
            continue
        if args.push_to_hub and uploader.pushes:
            raise ValueError(
                f"The tracker `{name}` is set to log the model, for which it makes a plain Trainer that would push "
                f"all of `output_dir` whatever `hub_clients` says, since `push_to_hub=True`. {uploader.remedy}."
            )
        if not all_published():
            raise ValueError(
                f"The tracker `{name}` is set to upload checkpoints or the model, which hold what the clients never "
                f"shared in training, and `hub_clients={args.hub_clients!r}` does not publish them all. "
                f'{uploader.remedy}, or say `hub_clients="all"`.'
            )


def args_of_push_event(args: FederatedConfig, *, private: bool | None, all_named: bool) -> FederatedConfig:
    """
    Arguments to tell callbacks of a push with.

    On that event trackio publishes the metrics of all clients, by name, in a static Space, which is always public.
    So it is told not to, unless the push itself is public and names all clients.
    """
    if private is False and all_named:
        return args
    if space := args.trackio_static_space_id:
        logger.warning(
            "The metrics are not published in the Space %s: static Spaces are public, and the metrics name every "
            "client. That takes `hub_private_repo=False` and `hub_name_clients=True`. Set "
            "`trackio_static_space_id=False` to silence this.",
            space,
        )
    args = copy.copy(args)
    args.trackio_static_space_id = False
    return args
