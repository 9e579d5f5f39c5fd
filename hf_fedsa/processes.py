"""The other processes of a run: what the first one does for all, and what to do when one of them is gone."""

import contextlib
import functools
import logging
import os
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch.distributed
from accelerate.utils import broadcast_object_list
from torch.distributed.distributed_c10d import _get_default_store, _set_pg_timeout
from transformers import Trainer

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def first_process_first(is_first: bool) -> Iterator[None]:
    """
    Lets the first process finish what is in this context before the others enter it.

    Raises:
        `RuntimeError`: in the others, if the first one has failed. They would go on to wait for it.
    """
    if not is_first:
        (failure,) = broadcast_object_list([None])
        if failure is not None:
            raise RuntimeError(f"The first process has stopped: {failure}")
        yield
        return
    try:
        yield
    except BaseException as error:
        broadcast_object_list([f"{type(error).__name__}: {error}"])
        raise
    broadcast_object_list([None])


# The launcher

# `torchrun` and `accelerate launch` set this for the processes they start and stop. Others, such as a shell that was
# left by `nohup`, may end before their processes do.
_LAUNCHED = "TORCHELASTIC_RUN_ID"
# The parent as it was on import. Once a launcher has died, its processes have another one.
_this_process, _parent = os.getpid(), os.getppid()
_POLL = 0.5


def exit_without_launcher() -> None:
    """
    Ends this process at once if the launcher that started it has died, which then cannot end it.

    A run that is started in its place would find the files of two runs mixed.
    """
    # A fork has another parent for another reason.
    if _LAUNCHED not in os.environ or os.getpid() != _this_process or os.getppid() == _parent:
        return
    try:
        logger.error("Process %d ends, as the launcher that started it (process %d) has died.", os.getpid(), _parent)
    finally:
        os._exit(1)


@functools.cache
def watch_launcher() -> None:
    """Looks after the launcher for as long as this process lives, also while it waits for other processes."""

    def watch() -> None:
        while True:
            exit_without_launcher()
            time.sleep(_POLL)

    threading.Thread(target=watch, name="watch_launcher", daemon=True).start()


# Processes that do not answer


class ProcessTimeoutError(RuntimeError):
    """Another process of the run does not answer."""


def limit_waiting(timeout: timedelta) -> None:
    """Sets how long processes wait for each other. The Trainer does so where they are on GPUs, and not on a CPU."""
    if torch.distributed.is_initialized():
        _set_pg_timeout(timeout)


def report_step(step: int) -> None:
    """Lets the others know, should they wait for this process in vain, that it has come as far as this step."""
    if not _has_common_store():
        return
    try:
        _get_default_store().set(f"hf_fedsa/step/{torch.distributed.get_rank()}", str(step))
    except torch.distributed.DistError as error:  # The launcher keeps the store.
        exit_without_launcher()
        logger.debug("Step %d could not be reported: %s", step, error)


@contextlib.contextmanager
def explain_timeout(timeout: timedelta) -> Iterator[None]:
    """Says in words what it means that an exchange between processes has timed out."""
    try:
        yield
    except RuntimeError as error:
        if not torch.distributed.is_initialized() or "Timed out waiting" not in str(error):
            raise
        raise ProcessTimeoutError(
            f"{_silent_processes()} not answer: process {torch.distributed.get_rank()} has waited for "
            f"{timeout.total_seconds():.0f} seconds (`ddp_timeout`). Look there for a process that hangs or was "
            "stopped, end the run, and go on with `train(resume_from_checkpoint=True)`. If it was only slow, raise "
            f"`ddp_timeout`. ({error})"
        ) from error


def _silent_processes() -> str:
    """Subject of the sentence: the processes that have not come as far as this one."""
    ranks = range(torch.distributed.get_world_size())
    if _has_common_store():
        keys = {rank: f"hf_fedsa/step/{rank}" for rank in ranks}
        store = _get_default_store()
        steps = {rank: int(store.get(key)) if store.check([key]) else -1 for rank, key in keys.items()}
        behind = [str(rank) for rank in ranks if steps[rank] < steps[torch.distributed.get_rank()]]
        if behind:
            return f"Process {behind[0]} does" if len(behind) == 1 else f"Processes {', '.join(behind)} do"
    return "Another process does"


def _has_common_store() -> bool:
    # On GPUs, torch itself ends a process that waits too long, and nothing is left to explain. A store that is not the
    # launcher's is in the first process, and does not answer if that is the one that hangs.
    return (
        torch.distributed.is_initialized()
        and torch.distributed.get_backend() == "gloo"
        and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    )


# What `Accelerator` does across processes in a step or an evaluation.
_COLLECTIVES = ("gather", "gather_for_metrics", "pad_across_processes", "prepare_data_loader")


@contextlib.contextmanager
def computing_alone(trainer: Trainer) -> Iterator[None]:
    """
    Within this context a Trainer computes for this process alone, where it would gather from all of them.

    Processes train and evaluate clients of their own: there is nothing to gather, and not equally often.
    """
    if trainer.args.world_size == 1:
        yield
        return
    gather = trainer.gather_function
    trainer.gather_function = _unchanged
    for name in _COLLECTIVES:
        setattr(trainer.accelerator, name, _unchanged)
    try:
        yield
    finally:
        for name in _COLLECTIVES:
            delattr(trainer.accelerator, name)
        trainer.gather_function = gather


def _unchanged(data: Any, *args, **kwargs) -> Any:
    return data
