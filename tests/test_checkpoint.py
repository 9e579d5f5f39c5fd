"""Stop anywhere, resume, and get the weights of a run that was never interrupted."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import make_args, make_lora, make_model, make_rows, max_difference
from test_invariants import weights_of
from transformers import TrainerCallback
from trl import SFTConfig

from hf_fedsa import FederatedTrainer
from hf_fedsa.parameters import adapter_tensors
from hf_fedsa.state import CheckpointError, write_manifest


class Interrupted(Exception):
    pass


class InterruptAfterSave(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_save(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Interrupted


class Records(TrainerCallback):
    """Clients in the slots, and the learning rate, at every step."""

    def __init__(self):
        self.steps = {}

    def on_step_end(self, args, state, control, optimizer, **kwargs):
        self.steps[state.global_step] = optimizer.param_groups[0]["lr"]


SETTINGS = {
    "waves": {"parallel_clients": 2},
    "side_by_side": {"parallel_clients": 3},
    "unequal_epochs": {"local_steps": None, "local_epochs": 2, "parallel_clients": 2},
    "dropout": {"parallel_clients": 2},
    "kept_optimizer": {"reset_optimizer": False, "parallel_clients": 2},
    "disk_store": {"parallel_clients": 1},
    "accumulation": {"gradient_accumulation_steps": 2, "parallel_clients": 2},
}


def make_trainer(directory, tokenizer, setting, callbacks=()):
    arguments = {"num_rounds": 3, "clients_per_round": 3, "save_strategy": "steps", "save_steps": 1}
    arguments |= SETTINGS[setting]
    if setting == "disk_store":
        arguments["client_store_dir"] = str(directory / "store")
    return FederatedTrainer(
        model=make_model(),
        args=make_args(directory, **arguments),
        train_dataset={f"client_{i}": make_rows(3 + 2 * i, seed=i) for i in range(4)},
        processing_class=tokenizer,
        peft_config=make_lora(lora_dropout=0.2 if setting == "dropout" else 0.0),
        callbacks=list(callbacks),
    )


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path, tokenizer, setting):
    records = Records()
    whole = make_trainer(tmp_path / "whole", tokenizer, setting, [records])
    whole.train()
    steps = whole.state.global_step
    # In the first wave, at a wave's end, at a round's end, and late in the run.
    for step in sorted({1, 2, 3, steps // 2, steps - 1}):
        directory = tmp_path / f"stopped_at_{step}"
        stopped = make_trainer(directory, tokenizer, setting, [InterruptAfterSave(step)])
        with pytest.raises(Interrupted):
            stopped.train()
        resumed_records = Records()
        resumed = make_trainer(directory, tokenizer, setting, [resumed_records])
        resumed.train(resume_from_checkpoint=True)
        assert resumed.state.global_step == steps
        assert max_difference(weights_of(whole), weights_of(resumed)) == 0
        expected = {s: rate for s, rate in records.steps.items() if s > step}
        assert resumed_records.steps == expected
        for first, second in zip(whole.round_history, resumed.round_history, strict=True):
            assert {k: v for k, v in first.items() if k != "seconds"} == {
                k: v for k, v in second.items() if k != "seconds"
            }
        lines = (directory / "rounds.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in lines] == resumed.round_history


def test_a_resumed_single_client_is_the_uninterrupted_one_bit_for_bit(tmp_path, tokenizer):
    def make(directory, *callbacks):
        arguments = SFTConfig(
            str(directory),
            num_train_epochs=3,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            save_strategy="steps",
            save_steps=1,
            disable_tqdm=True,
            use_cpu=True,
        )
        return FederatedTrainer(
            model=make_model(),
            args=arguments,
            train_dataset=make_rows(7, seed=1),
            processing_class=tokenizer,
            peft_config=make_lora(lora_dropout=0.1),
            callbacks=list(callbacks),
        )

    whole = make(tmp_path / "whole")
    whole.train()
    for step in (2, 4, 9):
        with pytest.raises(Interrupted):
            make(tmp_path / str(step), InterruptAfterSave(step)).train()
        resumed = make(tmp_path / str(step))
        resumed.train(resume_from_checkpoint=True)
        assert max_difference(weights_of(whole), weights_of(resumed)) == 0


def test_a_second_run_of_one_trainer_can_be_resumed(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer, "waves")
    trainer.train()
    first = weights_of(trainer)
    trainer.train()
    assert max_difference(first, weights_of(trainer)) > 0
    assert len(trainer.round_history) == 3
    again = make_trainer(tmp_path, tokenizer, "waves")
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert max_difference(weights_of(again), weights_of(trainer)) == 0


def fingerprint(directory: Path) -> dict[str, str]:
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def interrupted(tmp_path, tokenizer, step=4):
    with pytest.raises(Interrupted):
        make_trainer(tmp_path, tokenizer, "waves", [InterruptAfterSave(step)]).train()
    return tmp_path / f"checkpoint-{step}"


@pytest.mark.parametrize(
    "damage",
    [
        lambda checkpoint: (checkpoint / "optimizer.pt").write_bytes(b"short"),
        lambda checkpoint: (checkpoint / "federation_state" / "server.safetensors").unlink(),
        lambda checkpoint: (checkpoint / "federation_state" / "manifest.json").unlink(),
    ],
    ids=["truncated", "missing", "unfinished"],
)
def test_a_damaged_checkpoint_is_named_and_passed_over(tmp_path, tokenizer, damage, caplog):
    checkpoint = interrupted(tmp_path, tokenizer)
    damage(checkpoint)
    before = fingerprint(tmp_path)
    with pytest.raises(CheckpointError, match=str(checkpoint)):
        make_trainer(tmp_path, tokenizer, "waves").train(resume_from_checkpoint=str(checkpoint))
    assert fingerprint(tmp_path) == before

    whole = make_trainer(tmp_path / "whole", tokenizer, "waves")
    whole.train()
    resumed = make_trainer(tmp_path, tokenizer, "waves")
    resumed.train(resume_from_checkpoint=True)
    assert "checkpoint-4" in caplog.text
    assert max_difference(weights_of(whole), weights_of(resumed)) == 0


@pytest.mark.parametrize(
    "change",
    [
        {"clients": {"client_0": make_rows(3, seed=0), "other": make_rows(5, seed=1)}},
        {"peft_config": make_lora(r=2)},
        {"peft_config": make_lora(use_rslora=True)},
        {"arguments": {"seed": 7}},
        {"arguments": {"parallel_clients": 1}},
    ],
    ids=["clients", "rank", "variant", "seed", "parallel_clients"],
)
def test_a_checkpoint_of_another_federation_is_refused(tmp_path, tokenizer, change):
    checkpoint = interrupted(tmp_path, tokenizer)
    before = fingerprint(tmp_path)
    arguments = {"num_rounds": 3, "clients_per_round": 2 if "clients" in change else 3, **SETTINGS["waves"]}
    trainer = FederatedTrainer(
        model=make_model(),
        args=make_args(tmp_path, **{**arguments, **change.get("arguments", {})}),
        train_dataset=change.get("clients", {f"client_{i}": make_rows(3 + 2 * i, seed=i) for i in range(4)}),
        processing_class=tokenizer,
        peft_config=change.get("peft_config", make_lora()),
    )
    shared = trainer.shared_state_dict()
    with pytest.raises(CheckpointError, match="another federation"):
        trainer.train(resume_from_checkpoint=str(checkpoint))
    assert fingerprint(tmp_path) == before
    assert max_difference(shared, trainer.shared_state_dict()) == 0


def test_resuming_with_nothing_to_resume_says_so(tmp_path, tokenizer):
    with pytest.raises(CheckpointError, match="no whole checkpoint"):
        make_trainer(tmp_path, tokenizer, "waves").train(resume_from_checkpoint=True)


def test_more_rounds_can_be_added_to_a_finished_run(tmp_path, tokenizer):
    make_trainer(tmp_path, tokenizer, "waves").train()
    longer = FederatedTrainer(
        model=make_model(),
        args=make_args(tmp_path, num_rounds=4, clients_per_round=3, **SETTINGS["waves"]),
        train_dataset={f"client_{i}": make_rows(3 + 2 * i, seed=i) for i in range(4)},
        processing_class=tokenizer,
        peft_config=make_lora(),
    )
    longer.train(resume_from_checkpoint=True)
    assert [entry["round"] for entry in longer.round_history] == [0, 1, 2, 3]


def test_no_folder_of_a_checkpoint_loads_as_an_adapter_with_b_alone(tmp_path, tokenizer):
    checkpoint = interrupted(tmp_path, tokenizer)
    assert not list(checkpoint.rglob("adapter_config.json"))
    assert not list(checkpoint.rglob("adapter_model.*"))


def test_evaluation_in_the_middle_of_a_round_changes_nothing(tmp_path, tokenizer):
    weights = []
    for strategy in ("no", "steps"):
        trainer = FederatedTrainer(
            model=make_model(),
            args=make_args(tmp_path, parallel_clients=2, eval_strategy=strategy, eval_steps=1),
            train_dataset={f"client_{i}": make_rows(3 + 2 * i, seed=i) for i in range(4)},
            eval_dataset={f"client_{i}": make_rows(3, seed=10 + i) for i in range(4)},
            processing_class=tokenizer,
            peft_config=make_lora(lora_dropout=0.2),
        )
        trainer.train()
        weights.append(weights_of(trainer))
    assert torch.equal(torch.tensor(max_difference(*weights)), torch.tensor(0.0))


def test_a_round_that_a_callback_cut_short_does_not_mislead_a_resumed_run(tmp_path, tokenizer):
    class StopEpoch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                control.should_epoch_stop = True

    whole = make_trainer(tmp_path / "whole", tokenizer, "waves", [StopEpoch()])
    whole.train()
    with pytest.raises(Interrupted):
        make_trainer(tmp_path, tokenizer, "waves", [StopEpoch(), InterruptAfterSave(6)]).train()
    resumed = make_trainer(tmp_path, tokenizer, "waves", [StopEpoch()])
    resumed.train(resume_from_checkpoint=True)
    assert max_difference(weights_of(whole), weights_of(resumed)) == 0


def test_no_checkpoint_is_deleted_before_the_next_one_is_whole(tmp_path, tokenizer, monkeypatch):
    def make():
        return FederatedTrainer(
            model=make_model(),
            args=make_args(tmp_path, num_rounds=3, save_strategy="epoch", save_total_limit=1),
            train_dataset={f"client_{i}": make_rows(4, seed=i) for i in range(2)},
            processing_class=tokenizer,
            peft_config=make_lora(),
        )

    written = []

    def dying(checkpoint):
        if written:
            raise Interrupted
        written.append(checkpoint)
        write_manifest(checkpoint)

    monkeypatch.setattr("hf_fedsa.trainer.write_manifest", dying)
    with pytest.raises(Interrupted):
        make().train()
    monkeypatch.undo()
    assert written[0].is_dir()
    resumed = make()
    resumed.train(resume_from_checkpoint=True)
    assert len(resumed.round_history) == 3
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-9"]


def test_a_plain_run_after_a_failed_resume_starts_from_the_beginning(tmp_path, tokenizer, monkeypatch):
    interrupted(tmp_path, tokenizer)
    trainer = make_trainer(tmp_path, tokenizer, "waves")

    def fail(checkpoint):
        raise OSError("unreadable")

    monkeypatch.setattr(trainer, "_load_optimizer_and_scheduler", fail)
    with pytest.raises(OSError, match="unreadable"):
        trainer.train(resume_from_checkpoint=True)
    monkeypatch.undo()
    trainer.train()
    assert [entry["round"] for entry in trainer.round_history] == [0, 1, 2]


def test_skipping_no_data_on_resume_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`ignore_data_skip=True`"):
        FederatedTrainer(
            model="no/such/model",
            args=make_args(tmp_path, ignore_data_skip=True),
            train_dataset={f"client_{i}": make_rows(4, seed=i) for i in range(2)},
            peft_config=make_lora(),
        )


def test_resuming_leaves_a_client_store_of_another_run_alone(tmp_path, tokenizer):
    def make(name, clients):
        return FederatedTrainer(
            model=make_model(),
            args=make_args(
                tmp_path / name, save_strategy="epoch", num_rounds=1, client_store_dir=str(tmp_path / "store")
            ),
            train_dataset={client_id: make_rows(4, seed=0) for client_id in clients},
            processing_class=tokenizer,
            peft_config=make_lora(),
        )

    make("mine", ["a", "b"]).train()
    shutil.move(tmp_path / "store", tmp_path / "elsewhere")
    make("other", ["x", "y"]).train()
    before = fingerprint(tmp_path / "store")
    with pytest.raises(ValueError, match="holds the clients of another run"):
        make("mine", ["a", "b"]).train(resume_from_checkpoint=True)
    assert fingerprint(tmp_path / "store") == before


def test_clients_in_training_are_told_apart_within_use_client(tmp_path, tokenizer):
    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if trainer._slot_of:
                outside = {c: trainer.client_state_dict(c) for c in trainer.client_ids}
                with trainer.use_client("client_2"), trainer.use_client("client_1"):
                    inside = {c: trainer.client_state_dict(c) for c in trainer.client_ids}
                    with trainer.use_client("client_0") as model:
                        served = adapter_tensors(model, "default")
                        assert max_difference(outside["client_0"], {k: served[k] for k in outside["client_0"]}) == 0
                assert all(max_difference(outside[c], inside[c]) == 0 for c in trainer.client_ids)
                looked.append(state.global_step)

    looked = []
    trainer = make_trainer(tmp_path, tokenizer, "side_by_side", [Look()])
    trainer.train()
    assert looked


def test_a_run_with_another_client_sampler_is_refused(tmp_path, tokenizer):
    """It would go on with one client's B under another's name."""

    def make(client_sampler=None, callbacks=()):
        return FederatedTrainer(
            model=make_model(),
            args=make_args(tmp_path, num_rounds=2, clients_per_round=2, save_strategy="steps", save_steps=1),
            train_dataset={f"client_{i}": make_rows(8, seed=i) for i in range(4)},
            processing_class=tokenizer,
            peft_config=make_lora(),
            client_sampler=client_sampler,
            callbacks=list(callbacks),
        )

    def sampler(round_index, num_rows, clients_per_round):
        return ["client_1", "client_3"] if round_index == 0 else ["client_0", "client_2"]

    with pytest.raises(Interrupted):
        make(sampler, [InterruptAfterSave(5)]).train()
    for other in (None, lambda *_: ["client_1", "client_2"], lambda *_: ["client_0"]):
        with pytest.raises(CheckpointError, match="written in a round of client_0, client_2.*`client_sampler`"):
            make(other).train(resume_from_checkpoint=True)
    resumed, whole = make(sampler), make(sampler)
    resumed.train(resume_from_checkpoint=True)
    whole.train()
    assert max_difference(weights_of(resumed), weights_of(whole)) == 0
