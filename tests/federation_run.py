"""
A federation in as many processes as a launcher starts. Run by `test_processes.py`, e.g.

    ACCELERATE_USE_CPU=1 torchrun --nproc_per_node 2 tests/federation_run.py OUT '{"num_rounds": 2}'
"""

import json
import os
import sys
from pathlib import Path

import inside
import torch
from conftest import make_args, make_lora, make_model, make_rows, make_tokenizer
from safetensors.torch import save_file
from transformers import TrainerCallback

from hf_fedsa import FederatedTrainer

# Unequal clients: 5 of them, of 2 to 10 rows and short to long rows.
CLIENTS = {f"client_{i}": (2 + 2 * i, 4 + 2 * (i % 3), 6 + 4 * (i % 3)) for i in range(5)}


def make_clients():
    return {
        name: make_rows(rows, seed=i, min_words=low, max_words=high)
        for i, (name, (rows, low, high)) in enumerate(CLIENTS.items())
    }


class Look(TrainerCallback):
    """Evaluates in the middle of a round, and then again every client of which this process knows what it holds."""

    def __init__(self):
        self.trainer, self.losses, self.known = None, {}, {}

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step != 2:
            return
        metrics = self.trainer.evaluate()
        self.losses = {client_id: metrics[f"eval_{client_id}_loss"] for client_id in CLIENTS}
        for client_id in CLIENTS:
            try:
                self.trainer.client_state_dict(client_id)
                with inside.without_gathering(self.trainer), self.trainer.use_client(client_id):
                    loader = self.trainer.get_eval_dataloader(client_id)
                    found = self.trainer.evaluation_loop(loader, description="", prediction_loss_only=True)
            except RuntimeError as error:
                assert f"Client {client_id!r} trains in another process" in str(error)
            else:
                self.known[client_id] = found.metrics["eval_loss"]


def make_trainer(folder: Path, sampler_of_its_own: bool = False, looks: bool = False, **kwargs) -> FederatedTrainer:
    def sampler(round_index, num_rows, clients_per_round):
        return sorted(num_rows)[int(os.environ["RANK"]) :][:clients_per_round]

    look = Look()
    look.trainer = FederatedTrainer(
        model=make_model(),
        args=make_args(folder, **kwargs),
        train_dataset=make_clients(),
        eval_dataset={name: make_rows(3, seed=50 + i) for i, name in enumerate(CLIENTS)},
        processing_class=make_tokenizer(),
        peft_config=make_lora(),
        client_sampler=sampler if sampler_of_its_own else None,
        callbacks=[look] if looks else [],
    )
    look.trainer.look = look
    return look.trainer


def report(trainer: FederatedTrainer, folder: Path) -> None:
    metrics = trainer.evaluate()
    trainer.save_model()
    tensors = {f"shared|{key}": tensor for key, tensor in trainer.shared_state_dict().items()}
    for client_id in trainer.client_ids:
        tensors |= {f"{client_id}|{key}": tensor for key, tensor in trainer.client_state_dict(client_id).items()}
    rank = trainer.args.process_index
    save_file(tensors, folder / f"end-{rank}.safetensors")
    logs = [line for line in trainer.state.log_history if "loss" in line]
    last = next(line for line in trainer.state.log_history if "train_loss" in line)
    run = {
        "train_loss": last["train_loss"],
        "train_samples": last["train_samples_per_second"] * last["train_runtime"],
    }
    summary = {"metrics": metrics, "history": trainer.round_history, "logs": logs, "run": run}
    summary["middle"] = {"losses": trainer.look.losses, "known": trainer.look.known}
    (folder / f"end-{rank}.json").write_text(json.dumps(summary))


def record_collectives(trainer: FederatedTrainer, path: Path) -> None:
    """Writes down every collective that carries tensors: its name, its size, and whether it is part of a step."""
    in_step = False
    step = trainer.training_step

    def training_step(*args, **kwargs):
        nonlocal in_step
        in_step = True
        try:
            return step(*args, **kwargs)
        finally:
            in_step = False

    def wrap(name):
        call = getattr(torch.distributed, name)

        def recorded(*args, **kwargs):
            tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
            numbers = [tensor.numel() for tensor in tensors if tensor.is_floating_point()]
            with path.open("a") as file:
                file.write(json.dumps({"name": name, "numbers": max(numbers, default=0), "in_step": in_step}) + "\n")
            return call(*args, **kwargs)

        setattr(torch.distributed, name, recorded)

    trainer.training_step = training_step
    for name in ("all_reduce", "all_gather", "all_gather_into_tensor", "broadcast", "reduce", "gather", "scatter"):
        wrap(name)


def main(folder: Path, arguments: dict) -> None:
    torch.set_num_threads(1)
    resume, record = arguments.pop("resume", None), arguments.pop("record", False)
    trainer = make_trainer(folder, **arguments)
    if record:
        record_collectives(trainer, folder / f"collectives-{trainer.args.process_index}.jsonl")
    trainer.train(resume_from_checkpoint=resume)
    report(trainer, folder)
    trainer.end()


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
