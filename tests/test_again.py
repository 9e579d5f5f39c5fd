"""One trainer, several runs: what a run that fails leaves, and what the next one starts from."""

import json

import inside
import pytest
import torch
from conftest import make_args, make_lora, make_model, make_rows, make_tokenizer, max_difference
from test_invariants import weights_of
from transformers import TrainerCallback

from hf_fedsa import FederatedTrainer
from hf_fedsa.checkpoint_folder import CheckpointError
from hf_fedsa.client.store import ClientStoreError


class Stop(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.step = None
            raise InterruptedError


def make_trainer(directory, seed=0, callbacks=(), **arguments):
    return FederatedTrainer(
        model=make_model(seed),
        args=make_args(
            directory, **{"num_rounds": 1, "local_steps": 2, "optim": "sgd", "learning_rate": 0.5, **arguments}
        ),
        train_dataset={f"client_{i}": make_rows(4, seed=i) for i in range(3)},
        processing_class=make_tokenizer(),
        peft_config=make_lora(),
        callbacks=list(callbacks),
    )


def edit(trainer, value=0.3):
    with torch.no_grad():
        for parameter in inside.slot_parameters(trainer, 0, "shared").values():
            parameter.fill_(value)


@pytest.fixture(scope="module")
def edited(tmp_path_factory):
    trainer = make_trainer(tmp_path_factory.mktemp("edited"))
    edit(trainer)
    trainer.train()
    return weights_of(trainer)


def test_a_refused_resume_leaves_what_was_written_into_the_model(tmp_path, edited):
    trainer = make_trainer(tmp_path)
    edit(trainer)
    with pytest.raises(CheckpointError, match="holds no whole checkpoint"):
        trainer.train(resume_from_checkpoint=True)
    trainer.train()
    assert max_difference(weights_of(trainer), edited) == 0


def test_what_is_written_into_the_model_after_a_run_that_failed_counts(tmp_path, edited):
    trainer = make_trainer(tmp_path, callbacks=[Stop(1)])
    with pytest.raises(InterruptedError):
        trainer.train()
    edit(trainer)
    trainer.train()
    assert max_difference(weights_of(trainer), edited) == 0


def test_noise_is_added_once_after_a_run_that_failed(tmp_path):
    trainer = make_trainer(tmp_path, callbacks=[Stop(1)], neftune_noise_alpha=5.0)
    embeddings = trainer.model.get_base_model().get_input_embeddings()
    with pytest.raises(InterruptedError):
        trainer.train()
    assert not embeddings._forward_hooks
    trainer.train()
    assert not embeddings._forward_hooks


def test_a_store_that_another_trainer_has_used_is_not_read(tmp_path):
    arguments = {"client_store_dir": str(tmp_path / "store"), "save_strategy": "no"}
    first = make_trainer(tmp_path / "out", **arguments)
    first.train()
    before = first.client_state_dict("client_2")
    with pytest.raises(ValueError, match="holds the clients of another run"):
        make_trainer(tmp_path / "out", learning_rate=0.1, **arguments).train()  # They may be nowhere else.
    assert max_difference(first.client_state_dict("client_2"), before) == 0
    owner = json.loads((tmp_path / "store" / "run.json").read_text())
    (tmp_path / "store" / "run.json").write_text(json.dumps({**owner, "run_id": "another", "finished": False}))
    (stored,) = (tmp_path / "store" / "clients" / "client_0").iterdir()
    other = stored.read_bytes()
    for read in (first.shared_state_dict, lambda: first.client_state_dict("client_2"), first.save_model, first.train):
        with pytest.raises(ClientStoreError, match="another run has used it"):
            read()
    assert stored.read_bytes() == other
    (tmp_path / "store" / "run.json").write_text("{damaged")
    with pytest.raises(ValueError, match="holds the clients of another run"):
        make_trainer(tmp_path / "out", **arguments).train()


def test_a_resume_takes_the_checkpoints_of_the_run_that_began_last(tmp_path):
    trainer = make_trainer(tmp_path, num_rounds=2, save_strategy="epoch")
    trainer.train()
    trainer.add_callback(Stop(3))
    with pytest.raises(InterruptedError):
        trainer.train()  # Its first round's checkpoint is there, and the second one is of the run before.
    resumed = make_trainer(tmp_path, num_rounds=2, save_strategy="epoch")
    resumed.train(resume_from_checkpoint=True)
    trainer.train()
    third = weights_of(trainer)
    assert len(resumed.round_history) == 2

    whole = make_trainer(tmp_path / "whole", num_rounds=2)
    whole.train()
    whole.train()
    assert max_difference(weights_of(resumed), weights_of(whole)) < 1e-6
    assert max_difference(third, weights_of(whole)) > 1e-4
    # A run that has left none: what is there is of others.
    trainer.add_callback(Stop(1))
    with pytest.raises(InterruptedError):
        trainer.train()
    with pytest.raises(CheckpointError, match="the run that began last in .* has left no whole checkpoint"):
        make_trainer(tmp_path, num_rounds=2, save_strategy="epoch").train(resume_from_checkpoint=True)


def test_clients_that_a_failed_resume_has_replaced_are_not_gone_on_from(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, save_strategy="epoch")
    trainer.train()

    def fail():
        raise OSError("unreadable")

    inside.before_reading_optimizer(monkeypatch, trainer, fail)
    with pytest.raises(OSError, match="unreadable"):
        trainer.train(resume_from_checkpoint=True)
    monkeypatch.undo()
    history = trainer.round_history
    with pytest.raises(RuntimeError, match="has failed after it had put the clients of that checkpoint in the place"):
        trainer.train()
    assert trainer.round_history == history != []
    trainer.train(resume_from_checkpoint=True)


def test_another_base_is_another_run(tmp_path):
    make_trainer(tmp_path, save_strategy="epoch").train()
    with pytest.raises(CheckpointError, match="weights"):
        make_trainer(tmp_path, seed=5, save_strategy="epoch").train(resume_from_checkpoint=True)


@pytest.mark.parametrize(("before", "after"), [(3, 1), (1, 3), (2, 3)])
def test_kept_optimizer_states_go_on_in_another_number_of_slots(tmp_path, before, after):
    arguments = {"num_rounds": 2, "reset_optimizer": False, "save_strategy": "steps", "save_steps": 1}
    arguments |= {"optim": "sgd", "optim_args": "momentum=0.9", "learning_rate": 0.1, "weight_decay": 0.01}
    whole = make_trainer(tmp_path, parallel_clients=before, **arguments)
    whole.train()
    steps = sorted(int(path.name.split("-")[1]) for path in tmp_path.glob("checkpoint-*"))
    for step in (steps[0], steps[len(steps) // 2 - 1]):  # In the middle of a wave, and at a round's end.
        resumed = make_trainer(tmp_path, parallel_clients=after, **{**arguments, "save_strategy": "no"})
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert max_difference(weights_of(resumed), weights_of(whole)) < 1e-6


def test_a_manifest_of_another_form_is_damaged(tmp_path):
    make_trainer(tmp_path, save_strategy="epoch").train()
    (manifest,) = tmp_path.glob("checkpoint-*/federation_state/manifest.json")
    for content in ("[]", "null", '{"federation_state/state.json": {}}'):
        manifest.write_text(content)
        with pytest.raises(CheckpointError, match="holds no whole checkpoint"):
            make_trainer(tmp_path).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("name", ["train", "add_client", "remove_client"])
def test_no_run_begins_and_no_client_comes_or_goes_while_one_is_looked_at(tmp_path, name):
    """Leaving `use_client` would put back the adapter from before, which would then pass for an edit."""
    trainer = make_trainer(tmp_path)
    trainer.train()
    before = weights_of(trainer)
    arguments = {"train": (), "add_client": ("client_3", make_rows(4, seed=3)), "remove_client": ("client_0",)}[name]
    with trainer.use_client("client_1"), pytest.raises(RuntimeError, match=f"`{name}` within `use_client`"):
        getattr(trainer, name)(*arguments)
    assert max_difference(weights_of(trainer), before) == 0
    getattr(trainer, name)(*arguments)


def test_a_second_run_that_fails_before_it_begins_leaves_the_record_of_the_first(tmp_path, monkeypatch):
    def fail():
        raise InterruptedError

    trainer = make_trainer(tmp_path)
    trainer.train()
    local, history = trainer.client_state_dict("client_1"), trainer.round_history
    edit(trainer)
    edited = trainer.shared_state_dict()
    monkeypatch.setattr(trainer, "get_train_dataloader", fail)
    with pytest.raises(InterruptedError):
        trainer.train()
    monkeypatch.undo()
    assert trainer.round_history == history and len(history) == 1
    assert max_difference(trainer.shared_state_dict(), edited) == 0
    assert max_difference(trainer.client_state_dict("client_1"), local) == 0
    trainer.train()
    assert len(trainer.round_history) == 1 and trainer.round_history != history
