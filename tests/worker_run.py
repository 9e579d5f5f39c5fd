"""
A worker of a federation whose server is elsewhere, and the federation it is part of. Run by `test_worker.py`, as

    python tests/worker_run.py FOLDER '["client_0", "client_2"]' '{"lr_scheduler_type": "cosine"}' '["client_2", 1]'

where the last argument, if given, names a client and a round in which its second step never ends. It is at work once a
line comes in.
"""

import json
import sys
import time
from pathlib import Path

import torch
from conftest import make_args, make_lora, make_model, make_rows, make_tokenizer

from hf_fedsa import FederatedCallback, FederatedTrainer
from hf_fedsa.worker import OverSocket

CLIENTS = [f"client_{i}" for i in range(5)]


def make_trainer(folder: Path, client_ids=CLIENTS, *, base=None, peft_config=None, callbacks=None, **kwargs):
    """Some of five unequal clients, with SGD. The server is in this process unless there is a `transport`."""
    transport, sampler, rows = (kwargs.pop(name, None) for name in ("transport", "client_sampler", "rows"))
    elsewhere = {"num_rounds": None} if transport else {}
    return FederatedTrainer(
        model=base or make_model(),
        args=make_args(folder, **{"optim": "sgd", "learning_rate": 0.1, "parallel_clients": 1, **elsewhere, **kwargs}),
        train_dataset=rows or {name: rows_of(name) for name in client_ids},
        eval_dataset={name: make_rows(3, seed=50) for name in client_ids},
        processing_class=make_tokenizer(),
        peft_config=peft_config or make_lora(),
        callbacks=callbacks,
        client_sampler=sampler,
        transport=transport,
    )


def make_worker(folder: Path, client_ids=CLIENTS, **kwargs) -> FederatedTrainer:
    return make_trainer(folder, client_ids, **{"transport": OverSocket(folder / "worker", wait=20.0), **kwargs})


def rows_of(client_id: str):
    number = int(client_id.removeprefix("client_"))
    return make_rows(2 + 2 * number, seed=number)


class Hang(FederatedCallback):
    def __init__(self, client_id, round_index):
        self.client_id, self.round_index = client_id, round_index
        self.hangs, self.steps = False, 0

    def on_round_begin(self, args, state, control, round_index, client_ids, **kwargs):
        self.hangs = round_index == self.round_index and self.client_id in client_ids
        self.steps = 0

    def on_step_end(self, args, state, control, **kwargs):
        self.steps += 1
        if self.hangs and self.steps == 2:
            sys.stdout.write("hangs\n")
            sys.stdout.flush()
            time.sleep(600)


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, client_ids, arguments = Path(sys.argv[1]), *map(json.loads, sys.argv[2:4])
    hang = [Hang(*json.loads(sys.argv[4]))] if len(sys.argv) > 4 else None
    worker = make_worker(folder, client_ids, callbacks=hang, **arguments)
    sys.stdin.readline()
    worker.train()
