"""
A worker of a federation whose server is elsewhere. Run by `test_worker.py`, as

    python tests/worker_run.py FOLDER '["client_0", "client_2"]' '{"lr_scheduler_type": "cosine"}'
"""

import json
import sys
from pathlib import Path

import torch
from conftest import make_args, make_lora, make_model, make_rows, make_tokenizer

from hf_fedsa import FederatedTrainer
from hf_fedsa.worker import OverSocket


def make_worker(folder: Path, client_ids: list[str], seed: int = 0, peft_config=None, **kwargs) -> FederatedTrainer:
    """A worker of some of five unequal clients, with SGD: order and grouping change sums by rounding alone."""
    return FederatedTrainer(
        model=make_model(seed),
        args=make_args(folder, **{"optim": "sgd", "num_rounds": None, **kwargs}),
        train_dataset={name: rows_of(name) for name in client_ids},
        eval_dataset={name: make_rows(3, seed=50) for name in client_ids},
        processing_class=make_tokenizer(),
        peft_config=peft_config or make_lora(),
        transport=OverSocket(folder / "worker"),
    )


def rows_of(client_id: str):
    number = int(client_id.removeprefix("client_"))
    return make_rows(2 + 2 * number, seed=number)


if __name__ == "__main__":
    torch.set_num_threads(1)
    make_worker(Path(sys.argv[1]), json.loads(sys.argv[2]), **json.loads(sys.argv[3])).train()
