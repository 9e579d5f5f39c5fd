"""
Golden records of training runs, to prove that a restructuring of the package changes no number.

    python tests/golden.py record FOLDER [names...]   # With the code before.
    python tests/golden.py compare FOLDER [names...]  # With the code after: prints each run's first difference.

A record holds hashes of the weights, the history of rounds, the log and an evaluation, so nothing that is computed may
differ in its last bit. Such numbers depend on the machine and on the versions of the libraries: records are made anew
where they are compared, and are not kept in the project. Only what the package documents for its users is called,
since everything else may move.
"""

import argparse
import contextlib
import hashlib
import io
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import federation_run
import torch
from conftest import make_args, make_lora, make_model, make_rows, make_tokenizer
from datasets import Dataset, disable_progress_bars
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import (
    BitsAndBytesConfig,
    DataCollatorWithPadding,
    LlamaForSequenceClassification,
    Trainer,
    TrainerCallback,
    set_seed,
)
from trl import DPOConfig, DPOTrainer

import hf_fedsa
from hf_fedsa import FederatedCallback, FederatedConfig, FederatedMixin, FederatedTrainer, FedSAVeraConfig

SCHEDULED = {"num_rounds": 3, "lr_scheduler_type": "cosine", "warmup_steps": 2}
BY_EPOCHS = {"num_rounds": 3, "local_steps": None, "local_epochs": 1}
EVERY_STEP = {"save_strategy": "steps", "save_steps": 1}

# What a run leaves to be recorded, in order: trainers that have trained, or anything else that JSON can hold.
Run = Callable[[Path], Iterator[Any]]


# What is recorded


def hash_of(tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for key in sorted(tensors):
        tensor = tensors[key].detach().cpu().contiguous()
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_times(entry) for key, entry in value.items() if not is_time(key)}
    if isinstance(value, (list, tuple)):
        return [without_times(entry) for entry in value]
    return value


def is_time(key: str) -> bool:
    # The last one is computed back from a runtime.
    return key.endswith(("_runtime", "_per_second")) or key in ("seconds", "round_seconds", "train_samples")


def weights_of(trainer: FederatedMixin) -> dict[str, Any]:
    return {
        "shared": hash_of(trainer.shared_state_dict()),
        "clients": {client_id: hash_of(trainer.client_state_dict(client_id)) for client_id in trainer.client_ids},
    }


def describe(trainer: FederatedMixin) -> dict[str, Any]:
    """In the order in which a difference tells most: the log knows its step."""
    record = {
        "log_history": list(trainer.state.log_history),  # Without the evaluation below.
        "round_history": list(trainer.round_history),
        "global_step": trainer.state.global_step,
        "weights": weights_of(trainer),
    }
    return without_times({**record, "evaluation": trainer.evaluate()})


# Federations


def unequal_clients(sizes: tuple[int, ...] = (9, 6, 4, 2, 7), first_seed: int = 0) -> dict[str, Dataset]:
    """Clients of different numbers of rows, and of short and long rows."""
    return {
        f"client_{i}": make_rows(size, seed=first_seed + i, min_words=3 + 2 * (i % 3), max_words=6 + 4 * (i % 3))
        for i, size in enumerate(sizes)
    }


def small_clients() -> dict[str, Dataset]:
    return unequal_clients((6, 3, 5))


def held_out(train_dataset: Any) -> Any:
    if isinstance(train_dataset, Dataset):
        return make_rows(3, seed=50)
    return unequal_clients((3,) * len(train_dataset), first_seed=50)


def saved_base(folder: Path) -> str:
    make_model().save_pretrained(folder / "base")
    make_tokenizer().save_pretrained(folder / "base")
    return str(folder / "base")


def federation(folder: Path, arguments: dict[str, Any], **kwargs) -> FederatedTrainer:
    rows = kwargs.pop("train_dataset", None) or unequal_clients()
    defaults = {
        "model": make_model(),
        "eval_dataset": held_out(rows),
        "processing_class": make_tokenizer(),
        "peft_config": make_lora(),
    }
    return FederatedTrainer(args=make_args(folder / "out", **arguments), train_dataset=rows, **{**defaults, **kwargs})


def trained(folder: Path, arguments: dict[str, Any], **kwargs) -> Iterator[Any]:
    trainer = federation(folder, arguments, **kwargs)
    trainer.train()
    yield trainer


def resumed(
    folder: Path, step: int, arguments: dict[str, Any], changes: dict[str, Any], make_kwargs: Callable[[], dict] = dict
) -> Iterator[Any]:
    """A whole run, and one that goes on from its checkpoint of a step."""
    yield from trained(folder, arguments, **make_kwargs())
    trainer = federation(folder, {**arguments, **changes}, **make_kwargs())
    trainer.train(resume_from_checkpoint=str(folder / "out" / f"checkpoint-{step}"))
    yield trainer


def with_dropout(folder: Path, **arguments) -> Iterator[Any]:
    return trained(folder, {**SCHEDULED, **arguments}, peft_config=make_lora(lora_dropout=0.1))


# Callbacks


class Stop(TrainerCallback):
    """Ends the run after a step: by asking the Trainer to, or by failing once."""

    def __init__(self, step: int, fails: bool = False):
        self.step, self.fails = step, fails

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step != self.step:
            return
        if self.fails:
            self.step = None
            raise InterruptedError
        control.should_training_stop = True


class Corrupt(TrainerCallback):
    """Multiplies one of the factors of one of the clients in training, after the optimizer's step."""

    def __init__(self, step: int, adapter: int, factor: str, value: float):
        self.step, self.adapter, self.factor, self.value = step, adapter, factor, value

    def on_optimizer_step(self, args, state, control, model, **kwargs):
        if state.global_step == self.step:
            name = list(model.peft_config)[self.adapter]
            multiply(model, f"{self.factor}.{name}.", self.value)


def multiply(model: torch.nn.Module, part: str, value: float) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if part in name:
                parameter.mul_(value)


class Look(FederatedCallback):
    """Writes down what is seen of the clients, in training and not, at every event."""

    def __init__(self):
        self.trainer, self.seen = None, []

    def on_round_begin(self, args, state, control, round_index, client_ids, **kwargs):
        self.seen.append({"begins": round_index, "clients": list(client_ids)})

    def on_step_end(self, args, state, control, **kwargs):
        self.seen.append({"step": state.global_step, **weights_of(self.trainer), "logits": self._logits()})

    def on_round_end(self, args, state, control, metrics, **kwargs):
        self.seen.append(without_times({"ends": dict(metrics), **weights_of(self.trainer)}))

    @torch.no_grad()
    def _logits(self) -> dict[str, str]:
        inputs = make_tokenizer()("the cat sat on the red mat", return_tensors="pt")
        logits = {}
        for client_id in self.trainer.client_ids:
            with self.trainer.use_client(client_id) as model:
                logits[client_id] = hash_of({"logits": model(**inputs).logits})
        return logits


class Disk(FederatedCallback):
    """Rows as a transform reads them, and in one round those of one client cannot be read."""

    def __init__(self, lost: Dataset, round_index: int):
        self.lost, self.round_index, self.gone = set(lost["text"]), round_index, False
        self.tokenizer = make_tokenizer()

    def on_round_begin(self, args, state, control, round_index, client_ids, **kwargs):
        self.gone = round_index == self.round_index

    def read(self, batch: dict[str, list]) -> dict[str, list]:
        if self.gone and self.lost & set(batch["text"]):
            raise OSError("the disk is gone")
        ids = [self.tokenizer(text)["input_ids"] for text in batch["text"]]
        return {"input_ids": ids, "labels": ids}


# Optimizers


class ScheduleFree(torch.optim.Optimizer):
    """SGD that trains at `y = 0.1 z + 0.9 x`, as `schedulefree` does, with the mean `x` to be used."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr, "k": 0, "train_mode": False})

    def _switch(self, train: bool, weight: float) -> None:
        for group in self.param_groups:
            if group["train_mode"] != train:
                group["train_mode"] = train
                for p in (p for p in group["params"] if "z" in self.state[p]):
                    p.data.lerp_(self.state[p]["z"], weight)

    def train(self):
        self._switch(True, 0.1)

    def eval(self):
        self._switch(False, 1 - 1 / 0.9)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["k"] += 1
            for p in (p for p in group["params"] if p.grad is not None):
                z = self.state[p].setdefault("z", p.detach().clone())
                p.lerp_(z, 1 / group["k"]).sub_(p.grad, alpha=group["lr"] * (1 - 0.9 * (1 - 1 / group["k"])))
                z.sub_(p.grad, alpha=group["lr"])


# Other trainers


class FederatedClassifier(FederatedMixin, Trainer):
    pass


@dataclass
class FederatedDPOConfig(DPOConfig, FederatedConfig):
    pass


class FederatedDPOTrainer(FederatedMixin, DPOTrainer):
    pass


def classifier(**adapter) -> torch.nn.Module:
    config = make_model(num_labels=2).config
    torch.manual_seed(0)
    values = {"task_type": "SEQ_CLS", "target_modules": ["q_proj", "v_proj"], "modules_to_save": ["score"]}
    return get_peft_model(LlamaForSequenceClassification(config), make_lora(**{**values, **adapter}))


def labelled(rows: Dataset) -> Dataset:
    tokens = make_tokenizer()(list(rows["text"]))
    ids, masks = tokens["input_ids"], tokens["attention_mask"]
    return Dataset.from_dict({"input_ids": ids, "attention_mask": masks, "labels": [i % 2 for i in range(len(ids))]})


def classified(folder: Path, arguments: dict[str, Any], **adapter) -> Iterator[Any]:
    rows = small_clients()
    trainer = FederatedClassifier(
        model=classifier(**adapter),
        args=make_args(folder / "out", **arguments),
        train_dataset={client_id: labelled(own) for client_id, own in rows.items()},
        eval_dataset={client_id: labelled(own) for client_id, own in held_out(rows).items()},
        data_collator=DataCollatorWithPadding(make_tokenizer()),
    )
    trainer.train()
    yield trainer


def preferred(folder: Path) -> Iterator[Any]:
    def preferences(rows: Dataset) -> Dataset:
        texts = list(rows["text"])
        return Dataset.from_dict({"prompt": texts, "chosen": texts[1:] + texts[:1], "rejected": texts[::-1]})

    rows = small_clients()
    trainer = FederatedDPOTrainer(
        model=make_model(),
        args=FederatedDPOConfig(
            str(folder / "out"),
            num_rounds=2,
            local_steps=3,
            parallel_clients=1,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            max_length=32,
            bf16=False,
            gradient_checkpointing=False,
            use_cpu=True,
            dataloader_pin_memory=False,
            report_to="none",
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
        ),
        train_dataset={client_id: preferences(own) for client_id, own in rows.items()},
        eval_dataset={client_id: preferences(own) for client_id, own in held_out(rows).items()},
        processing_class=make_tokenizer(),
        peft_config=make_lora(target_modules=["q_proj", "v_proj"]),
    )
    trainer.train()
    yield trainer


# Runs that take more than arguments


def quantized(folder: Path, **arguments) -> Iterator[Any]:
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    rows = small_clients()
    return trained(folder, arguments, model=saved_base(folder), quantization_config=config, train_dataset=rows)


def faulty(folder: Path, corrupt: Corrupt, arguments: dict[str, Any]) -> Iterator[Any]:
    return trained(folder, {"num_rounds": 3, **arguments}, train_dataset=small_clients(), callbacks=[corrupt])


def unreadable(folder: Path, **arguments) -> Iterator[Any]:
    rows = small_clients()
    disk = Disk(rows["client_1"], round_index=1)
    raw = {"dataset_kwargs": {"skip_prepare_dataset": True}, "remove_unused_columns": False}
    return trained(
        folder,
        {"num_rounds": 3, **raw, **arguments},
        train_dataset={client_id: own.with_transform(disk.read) for client_id, own in rows.items()},
        eval_dataset={client_id: own.with_transform(disk.read) for client_id, own in held_out(rows).items()},
        callbacks=[disk],
    )


def looked_into(folder: Path, **kwargs) -> Iterator[Any]:
    look = Look()
    look.trainer = federation(folder, {"parallel_clients": 2}, callbacks=[look], **kwargs)
    look.trainer.train()
    yield look.seen
    yield look.trainer


def trained_twice(folder: Path) -> Iterator[Any]:
    trainer = federation(folder, SCHEDULED)
    for _ in range(2):
        trainer.train()
        yield trainer


def trained_after_an_edit(folder: Path) -> Iterator[Any]:
    trainer = federation(folder, {"parallel_clients": 1})
    multiply(trainer.model, "lora_A", 1.5)
    trainer.train()
    yield trainer


def trained_after_a_failure(folder: Path) -> Iterator[Any]:
    trainer = federation(folder, {"parallel_clients": 2}, callbacks=[Stop(4, fails=True)])
    with contextlib.suppress(InterruptedError):
        trainer.train()
    yield weights_of(trainer)
    trainer.train()
    yield trainer


def joined(folder: Path, **kwargs) -> Iterator[Any]:
    trainer = federation(folder, {}, model=saved_base(folder))
    trainer.train()
    trainer.save_model()
    newcomer = FederatedTrainer.from_shared(
        folder / "out",
        args=make_args(folder / "joined", num_rounds=3),
        train_dataset=make_rows(6, seed=30),
        eval_dataset=make_rows(3, seed=31),
        client_id="clinic",
        **kwargs,
    )
    yield weights_of(newcomer)
    newcomer.train()
    yield newcomer


def in_processes(folder: Path) -> Iterator[Any]:
    """Two processes, and then one that goes on from their first round."""
    folder = folder / "processes"
    folder.mkdir()
    arguments = {"num_rounds": 2, "parallel_clients": 2, "save_strategy": "epoch", "eval_strategy": "epoch"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    subprocess.run(
        [*launcher, federation_run.__file__, str(folder), json.dumps(arguments)],
        check=True,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"},
    )
    for rank in range(2):
        yield without_times(json.loads((folder / f"end-{rank}.json").read_text()))
        yield hash_of(load_file(folder / f"end-{rank}.safetensors"))
    trainer = federation_run.make_trainer(folder, **arguments)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-6"))
    yield trainer


def take_turns(round_index: int, num_rows: dict[str, int], clients_per_round: int) -> list[str]:
    clients = sorted(num_rows)
    return [clients[(round_index * clients_per_round + i) % len(clients)] for i in range(clients_per_round)]


RUNS: dict[str, Run] = {
    # Side by side or in turns
    "one_in_turn": partial(with_dropout, parallel_clients=1),
    "two_beside": partial(with_dropout, parallel_clients=2),
    "four_beside": partial(with_dropout, parallel_clients=4),
    "neftune": lambda folder: trained(folder, {"neftune_noise_alpha": 5.0, "parallel_clients": 2}),
    "sampled_by_examples": lambda folder: trained(
        folder,
        {**SCHEDULED, "clients_per_round": 3, "client_sampling": "examples", "aggregation_weighting": "uniform"},
    ),
    "stored_on_disk": lambda folder: trained(
        folder,
        {**SCHEDULED, "clients_per_round": 2, "client_store_dir": str(folder / "store")},
        client_sampler=take_turns,
    ),
    "local_epochs": lambda folder: trained(folder, {**BY_EPOCHS, "parallel_clients": 2}),
    "accumulated_by_length": lambda folder: trained(
        folder,
        {**BY_EPOCHS, "gradient_accumulation_steps": 2, "train_sampling_strategy": "group_by_length"},
    ),
    # One client
    "one_client_drop_in": lambda folder: trained(
        folder, {"num_rounds": None, "num_train_epochs": 3, "local_steps": None}, train_dataset=make_rows(7, seed=1)
    ),
    "one_client_local_steps": lambda folder: trained(folder, SCHEDULED, train_dataset=make_rows(7, seed=1)),
    # Optimizers
    "kept_optimizer": lambda folder: trained(folder, {**SCHEDULED, "reset_optimizer": False, "parallel_clients": 2}),
    "sgd": lambda folder: trained(folder, {**SCHEDULED, "optim": "sgd", "learning_rate": 0.5, "max_grad_norm": 0.3}),
    "schedule_free": lambda folder: trained(
        folder,
        {**BY_EPOCHS, "learning_rate": 0.3, "lr_scheduler_type": "constant", "parallel_clients": 3},
        optimizer_cls_and_kwargs=(ScheduleFree, {"lr": 0.3}),
    ),
    "schedule_free_looked_into": lambda folder: looked_into(
        folder, optimizer_cls_and_kwargs=(ScheduleFree, {"lr": 0.3})
    ),
    # Adapters and bases
    "qlora": partial(quantized, parallel_clients=3),
    "qlora_in_turn": partial(quantized, parallel_clients=1),
    "qlora_in_bf16": partial(quantized, parallel_clients=2, bf16=True),
    "gradient_checkpointing": lambda folder: trained(folder, {"gradient_checkpointing": True, "bf16": True}),
    "vera_with_heads": lambda folder: trained(
        folder, {}, peft_config=FedSAVeraConfig(r=8, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"])
    ),
    "dora_with_shared_heads": lambda folder: trained(
        folder, {"share_modules_to_save": True}, peft_config=make_lora(use_dora=True, modules_to_save=["lm_head"])
    ),
    "rslora": lambda folder: trained(folder, {}, peft_config=make_lora(use_rslora=True)),
    # Other trainers
    "classifier": lambda folder: classified(folder, {"parallel_clients": 3, **BY_EPOCHS}),
    "classifier_with_shared_heads": lambda folder: classified(
        folder, {"parallel_clients": 2, "share_modules_to_save": True}, use_rslora=True
    ),
    "dpo": preferred,
    # Faults
    "outlier_in_turn": lambda folder: faulty(
        folder, Corrupt(step=14, adapter=0, factor="lora_A", value=100), {"parallel_clients": 1}
    ),
    "outlier_beside": lambda folder: faulty(
        folder,
        Corrupt(step=5, adapter=1, factor="lora_A", value=100),
        {
            "parallel_clients": 3,
            "optim": "sgd",
            "learning_rate": 20.0,
            "max_grad_norm": 1.0,
            "max_update_norm": "auto",
        },
    ),
    "outlier_by_limit": lambda folder: faulty(
        folder,
        Corrupt(step=5, adapter=1, factor="lora_A", value=3),
        {"parallel_clients": 3, "max_update_norm": 1.0, "reset_optimizer": False},
    ),
    "loss_not_finite": lambda folder: faulty(
        folder, Corrupt(step=3, adapter=1, factor="lora_B", value=float("nan")), {"parallel_clients": 3}
    ),
    "update_not_finite": lambda folder: faulty(
        folder,
        Corrupt(step=2, adapter=0, factor="lora_A", value=float("nan")),
        {"parallel_clients": 2, "min_clients_per_round": 3, "reset_optimizer": False},
    ),
    "unreadable_beside": partial(unreadable, parallel_clients=3),
    "unreadable_in_turn": partial(unreadable, parallel_clients=1),
    # Stopped, resumed, again
    "stopped_within_a_round": lambda folder: trained(
        folder, {**SCHEDULED, "parallel_clients": 2}, callbacks=[Stop(13)]
    ),
    "resumed_within_a_wave": lambda folder: resumed(
        folder,
        14,
        {**SCHEDULED, **EVERY_STEP, "parallel_clients": 2, "reset_optimizer": False},
        {},
        lambda: {"peft_config": make_lora(lora_dropout=0.1)},
    ),
    "resumed_within_a_wave_of_epochs": lambda folder: resumed(
        folder, 7, {**BY_EPOCHS, **EVERY_STEP, "parallel_clients": 2}, {}
    ),
    "resumed_with_a_client_held": lambda folder: resumed(
        folder,
        4,
        {**EVERY_STEP, "parallel_clients": 1},
        {},
        lambda: {"train_dataset": small_clients(), "callbacks": [Corrupt(2, 0, "lora_A", 100)]},
    ),
    "resumed_with_other_neighbours": lambda folder: resumed(
        folder, 9, {**SCHEDULED, "save_strategy": "epoch", "parallel_clients": 2}, {"parallel_clients": 4}
    ),
    "resumed_for_more_rounds_at_another_rate": lambda folder: resumed(
        folder,
        6,
        {"save_strategy": "epoch", "parallel_clients": 4},
        {"num_rounds": 3, "learning_rate": 3e-3, "resume_with_changes": ["learning_rate"]},
    ),
    "trained_twice": trained_twice,
    "trained_after_an_edit": trained_after_an_edit,
    "trained_after_a_failure": trained_after_a_failure,
    # Looked at, joined, in processes
    "evaluated_within_a_round": lambda folder: trained(
        folder, {"eval_strategy": "steps", "eval_steps": 2, "parallel_clients": 2}
    ),
    "looked_into": looked_into,
    "newcomer": joined,
    "newcomer_from_the_mean": partial(joined, init_local="mean", train_shared=True),
    "in_processes": in_processes,
}


# Recording and comparing


def observe(name: str) -> Any:
    """What a run's record holds, as it is read from a file."""
    set_seed(0)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        stages = RUNS[name](Path(folder))
        found = [describe(stage) if isinstance(stage, FederatedMixin) else stage for stage in stages]
    return json.loads(json.dumps(found))


def first_difference(expected: Any, found: Any, path: str = "") -> str | None:
    if isinstance(expected, dict) and isinstance(found, dict) and expected.keys() == found.keys():
        pairs = ((f"{path}/{key}", expected[key], found[key]) for key in expected)
    elif isinstance(expected, list) and isinstance(found, list) and len(expected) == len(found):
        pairs = ((f"{path}/{i}", *pair) for i, pair in enumerate(zip(expected, found, strict=True)))
    else:
        # As text: a NaN equals itself, and 1 is not 1.0.
        texts = [json.dumps(value) for value in (expected, found)]
        return None if texts[0] == texts[1] else f"{path}: {texts[0]} before, {texts[1]} now"
    return next(filter(None, (first_difference(one, other, where) for where, one, other in pairs)), None)


def record(file: Path, name: str) -> str:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(observe(name), indent=1))
    return "recorded"


def compare(file: Path, name: str) -> str:
    if not file.exists():
        return f"no record in {file.parent}"
    try:
        found = observe(name)
    except Exception:
        return f"fails\n{traceback.format_exc()}"
    return first_difference(json.loads(file.read_text()), found) or "equal"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["record", "compare"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*", help=f"runs, all by default: {', '.join(RUNS)}")
    given = parser.parse_args()
    if unknown := set(given.names) - RUNS.keys():
        parser.error(f"no such runs: {', '.join(sorted(unknown))}")
    torch.set_num_threads(1)
    disable_progress_bars()
    action = {"record": record, "compare": compare}[given.action]
    sys.stdout.write(f"hf_fedsa in {Path(hf_fedsa.__file__).parent}\n")
    outcomes = []
    for name in given.names or RUNS:
        start = time.monotonic()
        outcomes.append(action(given.folder / f"{name}.json", name))
        sys.stdout.write(f"{name} ({time.monotonic() - start:.1f} s): {outcomes[-1]}\n")
        sys.stdout.flush()
    return int(any(outcome not in ("recorded", "equal") for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
