"""Clients that come and go between rounds: who trains, from what, and what is left of them."""

import json

import inside
import pytest
from conftest import make_args, make_lora, make_model, make_rows, make_tokenizer
from worker_run import rows_of

from hf_fedsa import FederatedCallback, FederatedTrainer, load_personalized_model
from hf_fedsa.tensors import tensors_sha256

FOUNDERS = ("client_0", "client_1", "client_2")


class AtRoundEnd(FederatedCallback):
    """Calls a function with the trainer and the round's record at the end of a round."""

    def __init__(self, **functions):
        self.functions = functions

    def on_round_end(self, args, state, control, metrics, trainer, **kwargs):
        if function := self.functions.get(f"round_{metrics['round']}"):
            function(trainer)


def make_trainer(folder, client_ids=FOUNDERS, sampler=None, base=None, **kwargs):
    functions = {name: kwargs.pop(name) for name in list(kwargs) if name.startswith("round_")}
    values = {"optim": "sgd", "learning_rate": 0.1, "num_rounds": 3, "parallel_clients": 1}
    return FederatedTrainer(
        model=base or make_model(),
        args=make_args(folder, **{**values, **kwargs}),
        train_dataset={name: rows_of(name) for name in client_ids},
        eval_dataset={name: make_rows(3, seed=50) for name in client_ids},
        processing_class=make_tokenizer(),
        peft_config=make_lora(),
        callbacks=[AtRoundEnd(**functions)],
        client_sampler=sampler,
    )


def add(client_id="client_3", **kwargs):
    return lambda trainer: trainer.add_client(client_id, rows_of(client_id), **kwargs)


def remove(client_id="client_1", **kwargs):
    return lambda trainer: trainer.remove_client(client_id, **kwargs)


def same(first, second):
    return tensors_sha256(first) == tensors_sha256(second)


def clients_of_rounds(trainer):
    return [record["clients"] for record in trainer.round_history]


def rates(trainer):
    return [line["learning_rate"] for line in trainer.state.log_history if "learning_rate" in line]


@pytest.fixture(params=["memory", "disk"])
def store(request, tmp_path):
    return lambda name: {"client_store_dir": str(tmp_path / name)} if request.param == "disk" else {}


class TestNewcomer:
    @pytest.mark.parametrize("steps", [{}, {"local_steps": None, "local_epochs": 1}], ids=["steps", "epochs"])
    def test_it_trains_as_one_that_was_there_and_sat_out(self, tmp_path, store, steps):
        came = make_trainer(tmp_path / "came", round_0=add(), **store("came_store"), **steps)
        came.train()
        everyone = [*FOUNDERS, "client_3"]
        waited = make_trainer(
            tmp_path / "waited",
            everyone,
            sampler=lambda index, num_rows, wanted: everyone[:3] if index == 0 else everyone,
            **store("waited_store"),
            **steps,
        )
        waited.train()
        assert clients_of_rounds(came) == [[*FOUNDERS], everyone, everyone]
        for mine, wanted in zip(came.round_history, waited.round_history, strict=True):
            names = mine.keys() - {"seconds"}
            if not steps:
                assert {name: mine[name] for name in names} == {name: wanted[name] for name in names}
        if not steps:  # A newcomer makes the schedule longer where it is longer itself.
            assert same(came.shared_state_dict(), waited.shared_state_dict())
            for client_id in everyone:
                assert same(came.client_state_dict(client_id), waited.client_state_dict(client_id))
        assert came.state.max_steps == came.state.global_step == waited.state.global_step
        assert rates(came)[-1] < 0.02

    def test_its_b_is_the_initial_one_until_it_trains(self, tmp_path):
        seen = {}

        def come(trainer):
            add()(trainer)
            seen["b"] = trainer.client_state_dict("client_3")

        trainer = make_trainer(tmp_path, round_0=come)
        trainer.train()
        assert same(seen["b"], inside.initial_local(trainer))
        assert not same(trainer.client_state_dict("client_3"), seen["b"])

    def test_between_two_runs_with_rows_to_evaluate_on(self, tmp_path):
        trainer = make_trainer(tmp_path, num_rounds=1)
        trainer.train()
        trainer.add_client("client_3", rows_of("client_3"), make_rows(3, seed=50))
        assert "eval_client_3_loss" in trainer.evaluate()
        trainer.train()
        assert clients_of_rounds(trainer) == [[*FOUNDERS, "client_3"]]

    @pytest.mark.parametrize(
        ("arguments", "reason"),
        [
            (("client_1", make_rows(4, seed=0)), "There is a client 'client_1' already"),
            (("../x", make_rows(4, seed=0)), "cannot name a folder"),
            (("new", make_rows(4, seed=0).rename_column("text", "other")), "other"),
            (("new", make_rows(4, seed=0).select([])), "new"),
        ],
    )
    def test_errors_change_nothing(self, tmp_path, arguments, reason):
        trainer = make_trainer(tmp_path, num_rounds=1)
        with pytest.raises((ValueError, KeyError), match=reason):
            trainer.add_client(*arguments)
        assert trainer.client_ids == [*FOUNDERS] and set(inside.num_rows(trainer)) == {*FOUNDERS}
        trainer.train()
        assert clients_of_rounds(trainer) == [[*FOUNDERS]]

    def test_in_the_middle_of_a_round(self, tmp_path):
        class Amid(FederatedCallback):
            def on_step_end(self, args, state, control, **kwargs):
                if state.global_step == 1:
                    for change in (add(), remove()):
                        with pytest.raises(RuntimeError, match="in the middle of a round"):
                            change(trainer)

        trainer = make_trainer(tmp_path, num_rounds=1)
        trainer.add_callback(Amid())
        trainer.train()
        assert clients_of_rounds(trainer) == [[*FOUNDERS]]


class TestRemoved:
    def test_it_is_not_sampled_and_the_plan_follows(self, tmp_path, store):
        trainer = make_trainer(tmp_path, round_0=remove("client_2"), **store("store"))
        trainer.train()
        assert clients_of_rounds(trainer) == [[*FOUNDERS], ["client_0", "client_1"], ["client_0", "client_1"]]
        assert trainer.state.max_steps == trainer.state.global_step == 3 * (3 + 2 + 2)
        assert rates(trainer)[-1] < 0.02
        assert "client_2" in trainer.round_history[0]["losses"]
        assert "client_2" in inside.client_store(trainer)
        with pytest.raises(ValueError, match="There is no client 'client_2'"):
            trainer.client_state_dict("client_2")
        assert trainer.evaluate().keys().isdisjoint({"eval_client_2_loss"})

    def test_forgotten_nothing_is_left_of_it(self, tmp_path, store):
        trainer = make_trainer(
            tmp_path, round_1=remove(forget=True), optim="adamw_torch", reset_optimizer=False, **store("store")
        )
        trainer.train()
        assert "client_1" not in json.dumps(trainer.round_history)
        assert "client_1" not in (tmp_path / "rounds.jsonl").read_text()
        assert "client_1" not in inside.client_store(trainer)
        assert "client_1" not in inside.kept_optimizer_states(trainer)
        assert not list((tmp_path / "store").rglob("client_1/*"))
        assert clients_of_rounds(trainer) == [["client_0", "client_2"]] * 3

    def test_the_only_client_of_all_rounds_forgotten(self, tmp_path):
        trainer = make_trainer(
            tmp_path, sampler=lambda index, num_rows, wanted: ["client_1"], num_rounds=1, round_0=remove(forget=True)
        )
        trainer.train()
        assert clients_of_rounds(trainer) == [[]]

    @pytest.mark.parametrize(
        ("arguments", "reason"),
        [({"clients_per_round": 3}, "clients_per_round=3"), ({"min_clients_per_round": 3}, "min_clients_per_round=3")],
    )
    def test_too_few_left(self, tmp_path, arguments, reason):
        trainer = make_trainer(tmp_path, **arguments)
        with pytest.raises(ValueError, match=reason):
            trainer.remove_client("client_1")
        with pytest.raises(ValueError, match="There is no client 'nobody'"):
            trainer.remove_client("nobody")
        assert trainer.client_ids == [*FOUNDERS] and "client_1" in inside.num_rows(trainer)


def test_what_is_saved_knows_the_clients_that_there_are(tmp_path):
    make_model().save_pretrained(tmp_path / "base")
    trainer = make_trainer(tmp_path / "run", base=str(tmp_path / "base"), round_0=add(), round_1=remove())
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    said = json.loads((tmp_path / "saved" / "federation.json").read_text())
    assert sorted(said["clients"]) == ["client_0", "client_2", "client_3"]
    load_personalized_model(tmp_path / "saved", "client_3")
    assert not (tmp_path / "saved" / "clients" / "client_1").exists()


def test_a_checkpoint_resumes_in_a_trainer_that_has_the_client_from_the_start(tmp_path):
    whole = make_trainer(tmp_path / "whole", round_0=add(), save_strategy="epoch")
    whole.train()
    checkpoint = sorted((tmp_path / "whole").glob("checkpoint-*"), key=lambda path: int(path.name[11:]))[1]
    resumed = make_trainer(tmp_path / "whole", [*FOUNDERS, "client_3"])
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert same(resumed.shared_state_dict(), whole.shared_state_dict())
    for client_id in whole.client_ids:
        assert same(resumed.client_state_dict(client_id), whole.client_state_dict(client_id))
