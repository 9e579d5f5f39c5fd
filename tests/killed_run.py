"""
A federation that kills itself with SIGKILL, is resumed, and must end as one that was never interrupted.

Run by `test_killed.py` in a process of its own: every run below is a fork, so that libraries are imported once.
"""

import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

import inside
import pytest
import torch
from conftest import make_args, make_lora, make_model, make_rows, make_tokenizer
from safetensors.torch import save_file
from transformers import TrainerCallback

from hf_fedsa import FederatedTrainer

DURATION = 0.0  # Seconds that a whole run takes.


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class InAStep(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 8:
            die()


def install(point: str, federation: FederatedTrainer) -> None:
    if point == "step":
        federation.add_callback(InAStep())
    elif point == "between_b_and_a":
        inside.before_closing_round(federation, lambda: die() if len(federation.round_history) == 1 else None)
    elif point == "checkpoint":

        def half(path: Path) -> None:
            if "checkpoint-8" in str(path) and "server" in path.name:
                path.parent.mkdir(parents=True, exist_ok=True)
                (path.parent / f".{path.name}.half.tmp").write_bytes(b"half a file")
                die()

        inside.before_writing_file(pytest.MonkeyPatch(), half)
    elif point == "manifest":
        inside.before_writing_manifest(
            pytest.MonkeyPatch(), lambda checkpoint: die() if checkpoint.name == "checkpoint-8" else None
        )
    elif point.startswith("random_"):
        threading.Timer(float(point.removeprefix("random_")) * DURATION, die).start()


def run(folder: Path, point: str | None, store: bool, resume: bool) -> None:
    federation = FederatedTrainer(
        model=make_model(),
        args=make_args(
            folder,
            num_rounds=3,
            local_steps=2,
            parallel_clients=2,
            save_strategy="steps",
            save_steps=1,
            save_total_limit=2,
            client_store_dir=str(folder / "store") if store else None,
        ),
        train_dataset={f"client_{i}": make_rows(6, seed=i) for i in range(4)},
        processing_class=make_tokenizer(),
        peft_config=make_lora(),
    )
    if point is not None:
        install(point, federation)
    federation.train(resume_from_checkpoint=True if resume else None)
    tensors = {f"shared|{key}": tensor for key, tensor in federation.shared_state_dict().items()}
    for client_id in federation.client_ids:
        tensors |= {f"{client_id}|{key}": tensor for key, tensor in federation.client_state_dict(client_id).items()}
    save_file(tensors, folder / "end.safetensors")


def fork(*arguments) -> int:
    """Runs in a child process and returns its status: 0, or the signal it died of."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            run(*arguments)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def main(folder: Path, points: list[str]) -> None:
    global DURATION
    torch.set_num_threads(1)
    start = time.monotonic()
    assert fork(folder / "whole", None, False, False) == 0
    DURATION = time.monotonic() - start
    for index, point in enumerate(points):
        store = index % 2 == 1
        killed = fork(folder / point, point, store, False)
        assert killed in (signal.SIGKILL, 0), (point, killed)
        assert killed == signal.SIGKILL or point.startswith("random_"), point
        found = any((folder / point).glob("checkpoint-*/federation_state/manifest.json"))
        if killed == signal.SIGKILL:
            assert fork(folder / point, None, store, found) == 0, point
        sys.stdout.write(f"{point} {killed} {'resumed' if found else 'from the beginning'}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
