"""Hundreds of clients of which a few train: the others cost disk only."""

import json
import os
import shutil
from collections import Counter
from pathlib import Path

import inside
import pytest
from conftest import make_args, make_lora, make_model, make_rows, make_tokenizer
from transformers import TrainerCallback

from hf_fedsa import FederatedTrainer
from hf_fedsa.client.store import ClientStoreError

CLIENTS = 500


def make_trainer(output_dir, clients=CLIENTS, callbacks=(), **kwargs):
    rows = make_rows(2, seed=0)
    return FederatedTrainer(
        model=make_model(),
        args=make_args(output_dir, **{"num_rounds": 3, "local_steps": 1, "clients_per_round": 10, **kwargs}),
        train_dataset={f"client_{i:03}": rows for i in range(clients)},
        eval_dataset={f"client_{i:03}": rows.select([0]) for i in range(min(clients, 12))},
        processing_class=make_tokenizer(),
        peft_config=make_lora(),
        callbacks=list(callbacks),
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    directory = tmp_path_factory.mktemp("many")
    trainer = make_trainer(directory / "out", client_store_dir=str(directory / "store"), save_strategy="epoch")
    trainer.train()
    return trainer


def test_only_clients_that_have_trained_are_on_the_disk(trained):
    drawn = {client_id for entry in trained.round_history for client_id in entry["clients"]}
    files = os.listdir(os.path.join(trained.args.client_store_dir, "clients"))
    assert sorted(files) == sorted(drawn)
    assert 20 < len(drawn) <= 30
    assert not os.path.exists(os.path.join(trained.args.output_dir, "clients"))


def test_memory_holds_no_client_that_is_not_training(trained):
    assert not [value for value in vars(inside.client_store(trained)).values() if isinstance(value, dict)]
    assert inside.clients_in_slots(trained) == {}


def test_a_round_touches_its_own_clients_alone(trained, monkeypatch):
    touched = Counter()
    inside.on_use_of_disk_stores(monkeypatch, lambda client_id: touched.update([client_id]))
    trained.args.save_strategy = "no"
    again = make_trainer(
        trained.args.output_dir + "_again", client_store_dir=trained.args.client_store_dir + "_again", num_rounds=2
    )
    again.train()
    sampled = [client_id for entry in again.round_history for client_id in entry["clients"]]
    assert set(touched) <= {*sampled, again.client_ids[0]}
    assert max(touched.values()) <= 4


def test_the_log_has_the_spread_and_the_file_has_everyone(trained):
    metrics = trained.evaluate()
    assert len([key for key in metrics if key.startswith("eval_client_")]) >= 12
    logged = trained.state.log_history[-1]
    assert not any("client_0" in key for key in logged)
    losses = [metrics[f"eval_client_{i:03}_loss"] for i in range(12)]
    assert logged["eval_loss"] == pytest.approx(sum(losses) / 12)
    assert (logged["eval_loss_min"], logged["eval_loss_max"]) == (min(losses), max(losses))
    assert logged["eval_clients"] == 12
    with open(os.path.join(trained.args.output_dir, "rounds.jsonl")) as file:
        last = json.loads(file.readlines()[-1])
    assert last["results"]["client_007"]["eval_loss"] == metrics["eval_client_007_loss"]
    assert len(last["losses"]) == 10


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"half")], ids=["missing", "damaged"])
def test_a_client_whose_file_is_gone_is_not_taken_for_a_new_one(trained, damage):
    client_id = trained.round_history[0]["clients"][0]
    (path,) = (Path(trained.args.client_store_dir) / "clients" / client_id).iterdir()
    content = path.read_bytes()
    newest = Path(trained.args.output_dir) / "checkpoint-9"
    damage(path)
    trained.state.global_step += 1
    try:
        for read in (
            lambda: trained.client_state_dict(client_id),
            lambda: trained.evaluate({client_id: make_rows(1, seed=0)}),
            trained.save_model,
            lambda: inside.save_checkpoint(trained),
        ):
            with pytest.raises(ClientStoreError, match=f"{client_id}.*{path} .*{newest} is whole and has one"):
                read()
        assert not newest.with_name("checkpoint-10").exists()
    finally:
        path.write_bytes(content)
        trained.state.global_step -= 1
    trained.client_state_dict(client_id)


@pytest.mark.parametrize("name", ["clients", "optimizers"])
@pytest.mark.parametrize("resumed", [False, True], ids=["", "resumed"])
def test_a_run_stops_where_a_client_has_lost_its_tensors(tmp_path, name, resumed):
    class Lose(TrainerCallback):
        def on_epoch_begin(self, args, state, control, **kwargs):
            if round(state.epoch) == 1 + resumed:
                shutil.rmtree(tmp_path / "store" / name / "client_001")

    def make(*callbacks):
        return make_trainer(
            tmp_path / "out",
            clients=2,
            clients_per_round=2,
            client_store_dir=str(tmp_path / "store"),
            reset_optimizer=False,
            save_strategy="epoch" if resumed else "no",
            callbacks=list(callbacks),
        )

    if resumed:
        make().train()
        trainer, advice = make(Lose()), "checkpoint-[23] is whole and has one"
    else:
        trainer, advice = make(Lose()), "no whole checkpoint has one"
    lost = rf"'client_001': .*{name}/client_001/round-\d+.safetensors is missing.*{advice}"
    with pytest.raises(ClientStoreError, match=lost):
        trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2") if resumed else None)


def test_few_clients_are_logged_one_by_one(tmp_path):
    trainer = make_trainer(tmp_path, clients=12, num_rounds=1)
    trainer.eval_dataset = {c: rows for c, rows in trainer.eval_dataset.items() if c < "client_003"}
    trainer.evaluate()
    assert {f"eval_client_{i:03}_loss" for i in range(3)} < trainer.state.log_history[-1].keys()
