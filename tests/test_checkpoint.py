"""Stop anywhere, resume, and get the weights of a run that was never interrupted."""

import hashlib
import json
import os
import shutil
import signal
import time
from pathlib import Path

import inside
import pytest
import torch
from conftest import make_args, make_lora, make_model, make_rows, max_difference
from test_invariants import weights_of
from transformers import TrainerCallback
from trl import SFTConfig

from hf_fedsa import FederatedConfig, FederatedTrainer
from hf_fedsa.checkpoint_folder import CheckpointError
from hf_fedsa.client.parameters import adapter_tensors


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


def make_trainer(directory, tokenizer, setting, callbacks=(), **arguments):
    arguments = {"num_rounds": 3, "clients_per_round": 3, "save_strategy": "steps", "save_steps": 1, **arguments}
    arguments = {**SETTINGS[setting], **arguments}
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


def assert_same_run(first, second):
    assert max_difference(weights_of(first), weights_of(second)) == 0
    histories = [[{**entry, "seconds": None} for entry in run.round_history] for run in (first, second)]
    assert histories[0] == histories[1]
    assert first.state.global_step == second.state.global_step


SINGLE = {
    "num_train_epochs": 3,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-2,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": "none",
    "save_strategy": "steps",
    "save_steps": 1,
    "disable_tqdm": True,
    "use_cpu": True,
}


def make_single(directory, tokenizer, *callbacks, args=None, **arguments):
    return FederatedTrainer(
        model=make_model(),
        args=args or SFTConfig(str(directory), **{**SINGLE, **arguments}),
        train_dataset=make_rows(7, seed=1),
        processing_class=tokenizer,
        peft_config=make_lora(lora_dropout=0.1),
        callbacks=list(callbacks),
    )


class Terminate(TrainerCallback):
    """What the Trainer does some seconds after SIGTERM, at an event of the n-th step."""

    def __init__(self, event, step):
        setattr(self, event, self.request)
        self.step = step

    def request(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            signal.getsignal(signal.SIGTERM).__self__.is_checkpoint_requested = True


# The event at which the request is found, the steps done by then, and those in the checkpoint.
TERMINATIONS = [
    ("on_step_begin", 1, 2),
    ("on_pre_optimizer_step", 4, 5),
    ("on_step_end", 6, 6),
    ("on_epoch_end", 6, 6),
]


@pytest.mark.parametrize(("event", "step", "saved"), TERMINATIONS)
def test_a_run_that_was_told_to_end_goes_on(tmp_path, tokenizer, event, step, saved):
    def make(directory, *callbacks):
        values = {"enable_jit_checkpoint": True, "save_strategy": "epoch", "num_rounds": 2}
        return make_trainer(directory, tokenizer, "waves", callbacks, **values)

    handler = signal.getsignal(signal.SIGTERM)
    stopped = make(tmp_path / "stopped", Terminate(event, step))
    stopped.train()
    assert signal.getsignal(signal.SIGTERM) == handler
    assert [path.name for path in (tmp_path / "stopped").glob("checkpoint-*")] == [f"checkpoint-{saved}"]
    assert stopped.state.global_step == saved
    whole, resumed = make(tmp_path / "whole"), make(tmp_path / "stopped")
    whole.train()
    resumed.train(resume_from_checkpoint=True)
    assert_same_run(resumed, whole)


@pytest.mark.parametrize(("event", "step"), [("on_pre_optimizer_step", 1), ("on_step_end", 4)])
def test_a_single_client_that_was_told_to_end_goes_on(tmp_path, tokenizer, event, step):
    make_single(tmp_path, tokenizer, Terminate(event, step), enable_jit_checkpoint=True, save_strategy="no").train()
    whole, resumed = make_single(tmp_path / "whole", tokenizer), make_single(tmp_path, tokenizer)
    whole.train()
    resumed.train(resume_from_checkpoint=True)
    assert_same_run(resumed, whole)


def test_saving_when_told_to_end_is_refused_in_several_processes(tmp_path, monkeypatch):
    args = make_args(tmp_path, enable_jit_checkpoint=True)
    monkeypatch.setattr(type(args), "world_size", 2)
    with pytest.raises(ValueError, match="`enable_jit_checkpoint=True` saves in the middle of a round"):
        FederatedTrainer(
            model="no/such/model",
            args=args,
            train_dataset={f"client_{i}": make_rows(4, seed=i) for i in range(2)},
            peft_config=make_lora(),
        )


def test_a_resumed_single_client_is_the_uninterrupted_one_bit_for_bit(tmp_path, tokenizer):
    whole = make_single(tmp_path / "whole", tokenizer)
    whole.train()
    for step in (2, 4, 9):
        with pytest.raises(Interrupted):
            make_single(tmp_path / str(step), tokenizer, InterruptAfterSave(step)).train()
        resumed = make_single(tmp_path / str(step), tokenizer)
        resumed.train(resume_from_checkpoint=True)
        assert_same_run(resumed, whole)


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
        {"arguments": {"learning_rate": 0.02}},
        {"clients": {f"client_{i}": make_rows(3 + 2 * i, seed=10 + i) for i in range(4)}},
    ],
    ids=["clients", "rank", "variant", "seed", "learning_rate", "rows"],
)
def test_a_checkpoint_of_another_federation_is_refused(tmp_path, tokenizer, change):
    checkpoint = interrupted(tmp_path, tokenizer)
    before = fingerprint(tmp_path)
    arguments = {"num_rounds": 3, "clients_per_round": min(3, len(change.get("clients", "...")))}
    arguments |= SETTINGS["waves"]
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


def test_more_rounds_go_on_with_the_schedule_of_the_longer_run(tmp_path, tokenizer):
    rates = Records()
    make_trainer(tmp_path / "longer", tokenizer, "waves", [rates], num_rounds=3, save_strategy="no").train()
    make_trainer(tmp_path, tokenizer, "waves", num_rounds=2).train()
    for step in (8, 12):  # In the middle of a wave, and at the end.
        resumed_rates = Records()
        resumed = make_trainer(tmp_path / str(step), tokenizer, "waves", [resumed_rates], save_strategy="no")
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert [entry["round"] for entry in resumed.round_history] == [0, 1, 2]
        assert resumed.state.global_step == resumed.state.max_steps == 18
        assert resumed_rates.steps == {s: rate for s, rate in rates.steps.items() if s > step}


def test_fewer_rounds_than_there_were_are_refused(tmp_path, tokenizer):
    interrupted(tmp_path, tokenizer, step=8)
    with pytest.raises(CheckpointError, match="`num_rounds=1`, but .*checkpoint-8 stands in round 2. Set"):
        make_trainer(tmp_path, tokenizer, "waves", num_rounds=1).train(resume_from_checkpoint=True)
    shorter = make_trainer(tmp_path, tokenizer, "waves", num_rounds=2)
    shorter.train(resume_from_checkpoint=True)
    assert len(shorter.round_history) == 2


def test_a_single_client_may_train_longer(tmp_path, tokenizer):
    rates, resumed_rates = Records(), Records()
    make_single(tmp_path / "longer", tokenizer, rates, num_train_epochs=3, save_strategy="no").train()
    make_single(tmp_path, tokenizer, num_train_epochs=2).train()
    make_single(tmp_path, tokenizer, resumed_rates, num_train_epochs=3).train(resume_from_checkpoint=True)
    assert resumed_rates.steps == {s: rate for s, rate in rates.steps.items() if s > 8}


def test_a_change_that_is_meant_holds_from_there_on(tmp_path, tokenizer):
    rates = Records()
    make_trainer(tmp_path / "whole", tokenizer, "waves", [rates], save_strategy="no").train()
    changes = {
        "learning_rate": 0.04,
        "weight_decay": 0.5,
        "local_steps": 2,
        "optim": "sgd",
        "resume_with_changes": ["learning_rate", "weight_decay", "local_steps", "optim"],
    }
    checkpoint = interrupted(tmp_path, tokenizer, step=8)
    with pytest.raises(CheckpointError, match="in the middle of a round.*such as .*checkpoint-6"):
        make_trainer(tmp_path, tokenizer, "waves", **changes).train(resume_from_checkpoint=str(checkpoint))
    resumed_rates = Records()
    resumed = make_trainer(tmp_path, tokenizer, "waves", [resumed_rates], **changes)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert resumed.state.global_step == resumed.state.max_steps == 6 + 2 * 4
    (group, *_) = resumed.optimizer.param_groups
    assert (group["weight_decay"], group["momentum"]) == (0.5, 0)
    # Of 3 + 2 + 2 local steps, 3 are done.
    expected = [0.04 * (1 - position / 7) for position in (4, 5, 4, 5, 6, 7, 6, 7)]
    assert list(resumed_rates.steps.values()) == pytest.approx(expected)

    again = make_trainer(tmp_path, tokenizer, "waves", **{**changes, "resume_with_changes": None})
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-13"))
    assert_same_run(again, resumed)


def test_a_change_of_the_single_clients_optimizer_that_is_meant_holds(tmp_path, tokenizer):
    make_single(tmp_path, tokenizer, num_train_epochs=1).train()
    changes = {"learning_rate": 0.04, "weight_decay": 0.5, "num_train_epochs": 2}
    args = FederatedConfig(
        str(tmp_path), **{**SINGLE, **changes}, resume_with_changes=["learning_rate", "weight_decay"]
    )
    rates = Records()
    resumed = make_single(tmp_path, tokenizer, rates, args=args)
    resumed.train(resume_from_checkpoint=True)
    assert list(rates.steps.values()) == pytest.approx([0.04 * (1 - step / 8) for step in (5, 6, 7, 8)])
    assert resumed.optimizer.param_groups[0]["weight_decay"] == 0.5
    assert all(float(state["step"]) == 8 for state in resumed.optimizer.state.values())


def test_another_number_of_slots_goes_on_from_anywhere(tmp_path, tokenizer):
    """Three clients per round, 3 steps each: two slots take 3 steps for the first two and 3 for the last one."""

    def resume(name, checkpoint, **slots):
        resumed = make_trainer(tmp_path / name, tokenizer, "waves", **values, **slots)
        resumed.train(resume_from_checkpoint=str(checkpoint))
        assert max_difference(weights_of(resumed), weights_of(whole)) < 1e-5
        for ours, theirs in zip(resumed.round_history, whole.round_history, strict=True):
            for name in ("round", "clients", "weights", "bytes_up", "bytes_down", "staleness"):
                assert ours[name] == theirs[name]
            assert ours["losses"] == pytest.approx(theirs["losses"], abs=1e-5)
        steps = [line["step"] for line in resumed.state.log_history if "loss" in line]
        assert steps == list(range(1, resumed.state.max_steps + 1))
        return resumed.state.max_steps

    values = {"optim": "sgd", "learning_rate": 1.0, "num_rounds": 2}
    whole = make_trainer(tmp_path, tokenizer, "waves", **values)
    whole.train()
    # At a round's end; in its first wave, which begins anew; between its waves; in its second wave.
    assert resume("end", tmp_path / "checkpoint-6", parallel_clients=1) == 6 + 9
    assert resume("first", tmp_path / "checkpoint-8", parallel_clients=1) == 6 + 9
    assert resume("wider", tmp_path / "checkpoint-8", parallel_clients=3) == 6 + 3
    assert resume("between", tmp_path / "checkpoint-9", parallel_clients=1) == 6 + 6
    assert resume("second", tmp_path / "checkpoint-11", parallel_clients=3) == 6 + 6
    # A round that was grouped anew, 4 steps of which are done, goes on with what is left of it.
    assert resume("again", tmp_path / "first" / "checkpoint-10") == 6 + 3 + 3


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


def test_clients_can_be_looked_at_before_a_resumed_round_goes_on(tmp_path, tokenizer):
    def look(trainer):
        return {client_id: trainer.client_state_dict(client_id) for client_id in trainer.client_ids}

    class Look(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            self.seen = look(self.trainer)

        def on_save(self, args, state, control, **kwargs):
            if state.global_step == 4:  # The first step of the second wave: one client is done, one trains.
                self.saved = look(self.trainer)

    first, again = Look(), Look()
    first.trainer = make_trainer(tmp_path / "first", tokenizer, "waves", [first], parallel_clients=1)
    first.trainer.train()
    again.trainer = make_trainer(tmp_path / "again", tokenizer, "waves", [again], parallel_clients=1)
    again.trainer.train(resume_from_checkpoint=str(tmp_path / "first" / "checkpoint-4"))
    assert all(max_difference(again.seen[client_id], first.saved[client_id]) == 0 for client_id in first.saved)
    assert len({str(sorted(map(torch.Tensor.tolist, tensors.values()))) for tensors in first.saved.values()}) == 3


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


class SetClockBack(TrainerCallback):
    """Every checkpoint is of a later day than those after it."""

    def on_save(self, args, state, control, **kwargs):
        day = time.time() + 86400 * (100 - state.global_step)
        os.utime(Path(args.output_dir) / f"checkpoint-{state.global_step}", (day, day))


def test_no_checkpoint_is_deleted_before_the_next_one_is_whole(tmp_path, tokenizer, monkeypatch):
    def make():
        return FederatedTrainer(
            model=make_model(),
            args=make_args(tmp_path, num_rounds=3, save_strategy="epoch", save_total_limit=1),
            train_dataset={f"client_{i}": make_rows(4, seed=i) for i in range(2)},
            processing_class=tokenizer,
            peft_config=make_lora(),
            callbacks=[SetClockBack()],
        )

    written = []

    def dying(checkpoint):
        if written:
            raise Interrupted
        written.append(checkpoint)

    inside.before_writing_manifest(monkeypatch, dying)
    with pytest.raises(Interrupted):
        make().train()
    monkeypatch.undo()
    assert written[0].is_dir()
    resumed = make()
    resumed.train(resume_from_checkpoint=True)
    assert len(resumed.round_history) == 3
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-9"]

    # Written again, the only one there is stays until the new one is whole.
    inside.before_writing_manifest(monkeypatch, dying)
    with pytest.raises(Interrupted):
        inside.save_checkpoint(resumed)
    monkeypatch.undo()
    again = make()
    again.train(resume_from_checkpoint=True)
    assert_same_run(again, resumed)
    inside.save_checkpoint(again)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-9"]


def test_a_checkpoint_holds_all_that_was_written_with_it_and_nothing_else(tmp_path, tokenizer):
    strange = [f"checkpoint-2/federation_state/{kind}/client_3.safetensors" for kind in ("clients", "optimizers")]
    for name in (*strange, "checkpoint-2/federation_state/manifest.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"of another run")
    interrupted(tmp_path, tokenizer, step=2)
    assert not [name for name in strange if (tmp_path / name).exists()]
    resumed, whole = make_trainer(tmp_path, tokenizer, "waves"), make_trainer(tmp_path / "whole", tokenizer, "waves")
    # As where every process draws other numbers for what is not loaded.
    inside.add_to_initial_tensors(resumed, 1)
    resumed.train(resume_from_checkpoint=True)
    whole.train()
    assert_same_run(resumed, whole)


def test_a_plain_run_after_a_failed_resume_starts_from_the_beginning(tmp_path, tokenizer, monkeypatch):
    interrupted(tmp_path, tokenizer)
    trainer = make_trainer(tmp_path, tokenizer, "waves")

    def fail():
        raise OSError("unreadable")

    inside.before_reading_optimizer(monkeypatch, trainer, fail)
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


def make_with_store(output_dir, store, tokenizer, clients=("a", "b"), **kwargs):
    return FederatedTrainer(
        model=make_model(),
        args=make_args(
            output_dir, **{"save_strategy": "epoch", "num_rounds": 1, "client_store_dir": str(store), **kwargs}
        ),
        train_dataset={client_id: make_rows(4, seed=0) for client_id in clients},
        processing_class=tokenizer,
        peft_config=make_lora(),
    )


@pytest.mark.parametrize("clients", [("x", "y"), ("a", "b")], ids=["other_clients", "same_clients"])
def test_resuming_leaves_a_client_store_of_another_run_alone(tmp_path, tokenizer, clients):
    make_with_store(tmp_path / "mine", tmp_path / "store", tokenizer).train()
    shutil.move(tmp_path / "store", tmp_path / "elsewhere")
    make_with_store(tmp_path / "other", tmp_path / "store", tokenizer, clients).train()
    before = fingerprint(tmp_path / "store")
    mine = make_with_store(tmp_path / "mine", tmp_path / "store", tokenizer)
    untrained = mine.client_state_dict("a")
    with pytest.raises(ValueError, match="holds the clients of another run"):
        mine.train(resume_from_checkpoint=True)
    assert fingerprint(tmp_path / "store") == before
    assert max_difference(mine.client_state_dict("a"), untrained) == 0


@pytest.mark.parametrize("inside", [True, False], ids=["with_its_store", "without_its_store"])
def test_a_run_goes_on_where_its_folder_was_moved_to(tmp_path, tokenizer, inside):
    def make(folder, num_rounds):
        store = tmp_path / folder / "client_store" if inside else tmp_path / "store"
        return make_with_store(tmp_path / folder, store, tokenizer, num_rounds=num_rounds)

    whole = make("old", 1)
    whole.train()
    (tmp_path / "old").rename(tmp_path / "new")
    with pytest.raises(ValueError, match="holds the clients of another run"):
        make("new", 1).train()
    moved = make("new", 2)
    moved.train(resume_from_checkpoint=True)
    assert len(moved.round_history) == 2
    if inside:
        # Before its first checkpoint, there is nothing to go on from.
        for checkpoint in (tmp_path / "new").glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
        (tmp_path / "new").rename(tmp_path / "newer")
        with pytest.raises(ValueError, match="holds the clients of another run"):
            make("newer", 1).train()  # It has finished, and the store may be all that is left of it.
        owner = tmp_path / "newer" / "client_store" / "run.json"
        owner.write_text(json.dumps({**json.loads(owner.read_text()), "finished": False}))
        make("newer", 1).train()


def test_clients_in_training_are_told_apart_within_use_client(tmp_path, tokenizer):
    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if inside.clients_in_slots(trainer):
                outside = {c: trainer.client_state_dict(c) for c in trainer.client_ids}
                with trainer.use_client("client_2"), trainer.use_client("client_1"):
                    within = {c: trainer.client_state_dict(c) for c in trainer.client_ids}
                    with trainer.use_client("client_0") as model:
                        served = adapter_tensors(model, "default")
                        assert max_difference(outside["client_0"], {k: served[k] for k in outside["client_0"]}) == 0
                assert all(max_difference(outside[c], within[c]) == 0 for c in trainer.client_ids)
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
