"""A client that joins after training: it starts from the shared A and trains its own B."""

import json
from pathlib import Path

import pytest
import torch
from conftest import make_args, make_lora, make_model, make_rows, make_tokenizer, max_difference
from datasets import Dataset
from peft import VeraConfig
from safetensors.torch import load, load_file
from transformers import AutoModelForCausalLM, TrainerCallback

from hf_fedsa import FederatedTrainer, list_clients, load_personalized_model
from hf_fedsa.client.parameters import adapter_tensors
from hf_fedsa.tensors import tensors_sha256
from hf_fedsa.trainer import FederatedMixin

REPO = "me/fed"


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("base")
    make_model().save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="module")
def inputs():
    return make_tokenizer()("the cat sat on the red mat", return_tensors="pt")


def train_federation(base_dir, output_dir, peft_config=None, **kwargs):
    trainer = FederatedTrainer(
        model=base_dir,
        args=make_args(output_dir, **{"learning_rate": 5e-2, "hub_base_model": base_dir, **kwargs}),
        train_dataset={f"client_{i}": make_rows(6, seed=i) for i in range(3)},
        peft_config=peft_config or make_lora(),
    )
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def federation(base_dir, tmp_path_factory):
    trainer = train_federation(base_dir, tmp_path_factory.mktemp("federation"))
    trainer.save_model()
    return trainer


def join(source, output_dir, rows=None, **kwargs):
    args = {key: kwargs.pop(key) for key in list(kwargs) if key in make_args(output_dir).to_dict()}
    return FederatedTrainer.from_shared(
        source,
        args=make_args(output_dir, **{"learning_rate": 5e-2, **args}),
        train_dataset=rows if rows is not None else make_rows(6, seed=30),
        **kwargs,
    )


@torch.no_grad()
def logits_of(trainer, client_id, inputs):
    with trainer.use_client(client_id) as model:
        return model.eval()(**inputs).logits


class TestStart:
    def test_zero_b_is_the_base_model(self, federation, base_dir, inputs, tmp_path):
        newcomer = join(federation.args.output_dir, tmp_path)
        assert newcomer.client_ids == ["newcomer"]
        assert max_difference(newcomer.shared_state_dict(), federation.shared_state_dict()) == 0
        assert not any(tensor.any() for tensor in newcomer.client_state_dict("newcomer").values())
        with torch.no_grad():
            expected = AutoModelForCausalLM.from_pretrained(base_dir)(**inputs).logits
        assert (logits_of(newcomer, "newcomer", inputs) - expected).abs().max() < 1e-6

    def test_mean_b(self, federation, tmp_path):
        newcomer = join(federation.args.output_dir, tmp_path, init_local="mean")
        states = [federation.client_state_dict(client_id) for client_id in federation.client_ids]
        for key, tensor in newcomer.client_state_dict("newcomer").items():
            assert torch.allclose(tensor, sum(state[key] for state in states) / 3, atol=1e-7)

    def test_the_b_of_a_named_client(self, federation, inputs, tmp_path):
        newcomer = join(federation.args.output_dir, tmp_path, init_local="client_2", client_id="clinic")
        assert max_difference(newcomer.client_state_dict("clinic"), federation.client_state_dict("client_2")) == 0
        expected = logits_of(federation, "client_2", inputs)
        assert (logits_of(newcomer, "clinic", inputs) - expected).abs().max() < 1e-6

    def test_a_client_goes_on_from_its_own(self, federation, tmp_path):
        rows = {"client_1": make_rows(6, seed=1)}
        again = join(federation.args.output_dir, tmp_path, rows, init_local="client_1")
        before = federation.client_state_dict("client_1")
        assert max_difference(again.client_state_dict("client_1"), before) == 0
        again.train()
        assert max_difference(again.client_state_dict("client_1"), before) > 0

    def test_several_newcomers(self, federation, tmp_path):
        rows = {"x": make_rows(6, seed=31), "y": make_rows(6, seed=32)}
        newcomers = join(federation.args.output_dir, tmp_path, rows)
        newcomers.train()
        assert max_difference(newcomers.client_state_dict("x"), newcomers.client_state_dict("y")) > 0


class TestTraining:
    @pytest.mark.parametrize("local_steps", [3, None], ids=["our_batches", "the_trainers_loop"])
    def test_a_is_frozen_and_does_not_travel(self, federation, tmp_path, local_steps):
        newcomer = join(federation.args.output_dir, tmp_path, local_steps=local_steps)
        newcomer.train()
        assert max_difference(newcomer.shared_state_dict(), federation.shared_state_dict()) == 0
        assert any(tensor.any() for tensor in newcomer.client_state_dict("newcomer").values())
        for entry in newcomer.round_history:
            assert entry["bytes_up"] == 0
            assert entry["shared_sha256"] == tensors_sha256(federation.shared_state_dict())

    def test_a_does_not_move_within_a_round_either(self, federation, tmp_path):
        class Watch(TrainerCallback):
            def on_step_end(self, args, state, control, model, **kwargs):
                moved.append(
                    [n for n, p in model.named_parameters() if "lora_A" in n and not torch.equal(p, before[n])]
                )

        newcomer = join(federation.args.output_dir, tmp_path)
        before = {name: p.detach().clone() for name, p in newcomer.model.named_parameters()}
        moved = []
        newcomer.add_callback(Watch())
        newcomer.train()
        assert moved == [[]] * 6

    def test_a_trains_if_asked_to(self, federation, tmp_path):
        newcomer = join(federation.args.output_dir, tmp_path, train_shared=True)
        newcomer.train()
        assert max_difference(newcomer.shared_state_dict(), federation.shared_state_dict()) > 0
        assert newcomer.round_history[-1]["bytes_up"] > 0

    def test_it_beats_the_base_model_on_its_own_rows(self, federation, tmp_path):
        rows = Dataset.from_dict({"text": ["the cat sat on the red mat", "the dog ran under the green tree"] * 6})
        newcomer = join(
            federation.args.output_dir, tmp_path, rows, eval_dataset=rows, local_steps=20, learning_rate=0.2
        )
        before = newcomer.evaluate()["eval_newcomer_loss"]  # With a B of zero, the loss of the base model.
        newcomer.train()
        assert newcomer.evaluate()["eval_newcomer_loss"] < before - 0.2  # In nats per token.

    def test_stopped_and_resumed_is_the_same(self, federation, tmp_path):
        whole = join(federation.args.output_dir, tmp_path / "whole", save_strategy="steps", save_steps=2)
        whole.train()
        again = join(federation.args.output_dir, tmp_path / "whole", save_strategy="steps", save_steps=2)
        again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
        assert max_difference(again.client_state_dict("newcomer"), whole.client_state_dict("newcomer")) == 0

    def test_not_resumed_as_another_kind_of_run(self, federation, tmp_path):
        join(federation.args.output_dir, tmp_path, save_strategy="steps", save_steps=2).train()
        thawed = join(federation.args.output_dir, tmp_path, train_shared=True)
        with pytest.raises(ValueError, match="`trains_shared` is False"):
            thawed.train(resume_from_checkpoint=True)

    def test_vera(self, base_dir, inputs, tmp_path):
        config = VeraConfig(r=4, target_modules=["q_proj", "v_proj"])
        federation = train_federation(base_dir, tmp_path / "federation", config)
        federation.save_model()
        newcomer = join(tmp_path / "federation", tmp_path / "new", init_local="client_0")
        expected = logits_of(federation, "client_0", inputs)
        assert (logits_of(newcomer, "newcomer", inputs) - expected).abs().max() < 1e-6
        newcomer.train()
        newcomer.save_model()
        model = load_personalized_model(tmp_path / "new", "newcomer")
        with torch.no_grad():
            assert (model(**inputs).logits - logits_of(newcomer, "newcomer", inputs)).abs().max() < 1e-5

    def test_vera_with_other_projections_is_refused(self, base_dir, tmp_path):
        config = VeraConfig(r=4, target_modules=["q_proj", "v_proj"])
        train_federation(base_dir, tmp_path / "federation", config).save_model()
        path = tmp_path / "federation" / "federation.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "frozen_sha256": "0" * 64}))
        with pytest.raises(ValueError, match="projection_prng_key"):
            join(tmp_path / "federation", tmp_path / "new")

    def test_heads_of_the_clients_own(self, base_dir, tmp_path):
        federation = train_federation(base_dir, tmp_path / "federation", make_lora(modules_to_save=["lm_head"]))
        federation.save_model()
        newcomer = join(tmp_path / "federation", tmp_path / "new", init_local="client_1")
        expected = federation.client_state_dict("client_1")
        assert max_difference(newcomer.client_state_dict("newcomer"), expected) == 0
        assert any("lm_head" in key for key in expected)


class TestPushing:
    @pytest.fixture
    def published(self, hub, base_dir, tmp_path):
        trainer = train_federation(base_dir, tmp_path / "federation", save_strategy="epoch")
        trainer.push_to_hub(REPO, clients="all")
        return trainer

    def test_it_joins_the_repository(self, published, hub, inputs, tmp_path):
        before = hub.files(REPO)
        newcomer = join(REPO, tmp_path / "new", client_id="clinic")
        newcomer.train()
        hub.requests.clear()
        newcomer.push_to_hub(REPO, clients=["clinic"])
        after = hub.files(REPO)
        assert list_clients(REPO) == ["client_0", "client_1", "client_2", "clinic"]
        assert {name for name in after if after[name] != before.get(name)} == {
            "README.md",
            "federation.json",
            "clients/clinic/adapter_config.json",
            "clients/clinic/adapter_model.safetensors",
        }
        model = load_personalized_model(REPO, "clinic")
        with torch.no_grad():
            assert (model(**inputs).logits - logits_of(newcomer, "clinic", inputs)).abs().max() < 1e-5
        federation = json.loads(after["federation.json"])
        assert federation["num_clients"] == 4
        assert federation["rounds_done"] == 2
        assert after["rounds.jsonl"] == before["rounds.jsonl"]
        newcomer.push_to_hub(REPO, clients=["clinic"])
        assert hub.files(REPO) == after

    def test_a_new_a_is_for_all(self, published, hub, tmp_path):
        newcomer = join(REPO, tmp_path / "new", client_id="clinic", train_shared=True)
        newcomer.train()
        newcomer.push_to_hub(REPO, clients=["clinic"])
        files = hub.files(REPO)
        shared = load(files["shared/adapter_model.safetensors"])
        assert max_difference(shared, newcomer.shared_state_dict()) == 0
        for client_id in published.client_ids:
            tensors = load(files[f"clients/{client_id}/adapter_model.safetensors"])
            assert max_difference({key: tensors[key] for key in shared}, shared) == 0
            local = {key: tensor for key, tensor in tensors.items() if key not in shared}
            assert max_difference(local, published.client_state_dict(client_id)) == 0
            load_personalized_model(REPO, client_id)  # The hashes are those of the new files.
        rounds = [json.loads(line) for line in files["rounds.jsonl"].splitlines()]
        assert [entry["round"] for entry in rounds] == [0, 1, 2, 3]
        assert rounds[-1]["clients"] == ["clinic"]
        federation = json.loads(files["federation.json"])
        assert federation["rounds_done"] == 4
        assert federation["shared_sha256"] == tensors_sha256(shared) == rounds[-1]["shared_sha256"]
        newcomer.push_to_hub(REPO, clients=["clinic"])
        assert hub.files(REPO) == files

    def test_the_federation_trains_on_and_keeps_the_newcomer(self, published, hub, base_dir, tmp_path):
        newcomer = join(REPO, tmp_path / "new", client_id="clinic")
        newcomer.train()
        newcomer.push_to_hub(REPO, clients=["clinic"])
        longer = FederatedTrainer(
            model=base_dir,
            args=make_args(
                tmp_path / "federation",
                learning_rate=5e-2,
                hub_base_model=base_dir,
                save_strategy="epoch",
                num_rounds=3,
            ),
            train_dataset={f"client_{i}": make_rows(6, seed=i) for i in range(3)},
            peft_config=make_lora(),
        )
        longer.train(resume_from_checkpoint=True)
        longer.push_to_hub(REPO, clients="all")
        tensors = load(hub.files(REPO)["clients/clinic/adapter_model.safetensors"])
        shared = longer.shared_state_dict()
        assert max_difference({key: tensors[key] for key in shared}, shared) == 0
        local = newcomer.client_state_dict("clinic")
        assert max_difference({key: tensors[key] for key in local}, local) == 0
        assert json.loads(hub.files(REPO)["federation.json"])["num_clients"] == 4

    def test_a_has_moved_on_meanwhile(self, published, hub, tmp_path):
        late = join(REPO, tmp_path / "late", client_id="late")
        first = join(REPO, tmp_path / "first", client_id="first", train_shared=True)
        late.train()
        first.train()
        first.push_to_hub(REPO, clients=["first"])
        before = hub.files(REPO)
        with pytest.raises(ValueError, match="an A that this one was not trained from.*from_shared"):
            late.push_to_hub(REPO, clients=["late"])
        assert hub.files(REPO) == before

    def test_two_at_the_same_time(self, published, hub, tmp_path):
        x = join(REPO, tmp_path / "x", client_id="x")
        y = join(REPO, tmp_path / "y", client_id="y")
        x.train()
        y.train()
        hub.before("POST", "/commit/", lambda: y.push_to_hub(REPO, clients=["y"]))
        x.push_to_hub(REPO, clients=["x"])
        assert list_clients(REPO) == ["client_0", "client_1", "client_2", "x", "y"]

    def test_a_federation_trained_anew_does_not_take_the_newcomers(self, published, hub, base_dir, tmp_path):
        newcomer = join(REPO, tmp_path / "new", client_id="clinic")
        newcomer.train()
        newcomer.push_to_hub(REPO, clients=["clinic"])
        before = hub.files(REPO)
        anew = train_federation(base_dir, tmp_path / "anew", seed=9)
        with pytest.raises(ValueError, match=r"clients that this federation does not know \(clinic\)"):
            anew.push_to_hub(REPO, clients="all")
        assert hub.files(REPO) == before

    def test_a_federation_trained_anew_with_the_same_clients_takes_their_place(self, published, base_dir, tmp_path):
        anew = train_federation(base_dir, tmp_path / "anew", seed=9)
        anew.push_to_hub(REPO, clients="all")
        model = load_personalized_model(REPO, "client_0")
        shared = anew.shared_state_dict()
        found = {key: tensor for key, tensor in adapter_tensors(model, "client_0").items() if key in shared}
        assert max_difference(found, shared) == 0

    def test_taken_back_it_is_gone(self, published, hub, tmp_path):
        newcomer = join(REPO, tmp_path / "new", client_id="clinic")
        newcomer.train()
        newcomer.push_to_hub(REPO, clients=["clinic"])
        newcomer.push_to_hub(REPO, clients="none")
        assert list_clients(REPO) == ["client_0", "client_1", "client_2"]
        assert b"clinic" not in b"".join(hub.files(REPO).values())
        join(REPO, tmp_path / "next", init_local="mean")

    def test_where_clients_have_private_repositories_so_has_the_newcomer(self, hub, base_dir, tmp_path):
        federation = train_federation(base_dir, tmp_path / "federation", hub_client_repositories=True)
        federation.push_to_hub(REPO, clients="all", private=False)
        newcomer = join(REPO, tmp_path / "new", client_id="clinic")
        newcomer.train()
        with pytest.raises(ValueError, match="exists and is public"):
            newcomer.push_to_hub(REPO, clients=["clinic"])
        newcomer.push_to_hub(REPO, clients=["clinic"], private=False)
        assert hub.repos[f"{REPO}-clinic"].private
        assert b"clinic" not in b"".join(hub.files(REPO).values())
        load_personalized_model(REPO, "clinic")

    def test_of_the_same_name_as_another_newcomer(self, published, hub, tmp_path):
        first, second = (join(REPO, tmp_path / name, make_rows(6, seed=ord(name))) for name in "xy")
        first.train()
        second.train()
        first.push_to_hub(REPO, clients="all")
        first.push_to_hub(REPO, clients="all")
        before = hub.files(REPO)
        with pytest.raises(ValueError, match="already holds a client called 'newcomer'"):
            second.push_to_hub(REPO, clients="all")
        assert hub.files(REPO) == before

    def test_of_the_name_of_a_client_that_is_not_published(self, hub, base_dir, tmp_path):
        federation = train_federation(base_dir, tmp_path / "federation")
        federation.push_to_hub(REPO, clients=["client_0"])
        newcomer = join(REPO, tmp_path / "new", client_id="client_1")
        newcomer.train()
        newcomer.push_to_hub(REPO, clients=["client_1"])
        before = hub.files(REPO)
        with pytest.raises(ValueError, match="already holds a client called 'client_1'"):
            federation.push_to_hub(REPO, clients=["client_0"])
        assert hub.files(REPO) == before

    def test_an_a_returned_without_a_client_is_not_lost(self, published, hub, tmp_path):
        newcomer = join(REPO, tmp_path / "new", client_id="clinic", train_shared=True)
        newcomer.train()
        newcomer.push_to_hub(REPO, clients="none")
        before = hub.files(REPO)
        with pytest.raises(ValueError, match="an A that this one was not trained from"):
            published.push_to_hub(REPO, clients="all")
        assert hub.files(REPO) == before

    def test_the_root_adapter_stays_its_owners(self, hub, base_dir, tmp_path, inputs):
        owner = FederatedTrainer(
            model=base_dir,
            args=make_args(tmp_path / "owner", learning_rate=5e-2, local_steps=None, hub_base_model=base_dir),
            train_dataset=make_rows(6, seed=0),
            peft_config=make_lora(),
        )
        owner.train()
        owner.push_to_hub(REPO)
        for name in ("x", "y"):
            newcomer = join(REPO, tmp_path / name, client_id=name, train_shared=True)
            newcomer.train()
            newcomer.push_to_hub(REPO, clients=[name])
        files = hub.files(REPO)
        assert files["adapter_model.safetensors"] == files["clients/client_0/adapter_model.safetensors"]
        root = load(files["adapter_model.safetensors"])
        local = owner.client_state_dict("client_0")
        assert max_difference({key: root[key] for key in local}, local) == 0

    def test_on_another_base_of_the_hub(self, hub, base_dir, tmp_path):
        files = {path.name: path.read_bytes() for path in Path(base_dir).iterdir()}
        for name in ("me/base", "me/base2"):
            hub.put(name, files)
        federation = FederatedTrainer(
            model="me/base",
            args=make_args(tmp_path / "federation"),
            train_dataset={"a": make_rows(4, 0), "b": make_rows(4, 1)},
            peft_config=make_lora(),
        )
        federation.push_to_hub(REPO, clients="all")
        newcomer = join(REPO, tmp_path / "new", model="me/base2")
        with pytest.raises(ValueError, match="`base_model` is 'me/base', this one's is 'me/base2'"):
            newcomer.push_to_hub(REPO, clients="all")

    def test_into_a_repository_of_its_own(self, published, hub, tmp_path):
        newcomer = join(REPO, tmp_path / "new", client_id="clinic")
        newcomer.train()
        newcomer.push_to_hub("me/clinic", clients=["clinic"])
        assert list_clients("me/clinic") == ["clinic"]
        load_personalized_model("me/clinic", "clinic")


def test_the_arguments_are_not_changed(federation, tmp_path):
    args = make_args(tmp_path)
    before = dict(vars(args))
    FederatedTrainer.from_shared(federation.args.output_dir, args=args, train_dataset=make_rows(4, 0))
    assert vars(args) == before


class TestRefused:
    def test_a_folder_that_holds_the_federation(self, federation):
        with pytest.raises(ValueError, match="holds a federation with other clients, such as 'client_0'"):
            join(federation.args.output_dir, federation.args.output_dir)

    def test_a_word_that_is_also_a_client(self, base_dir, tmp_path):
        trainer = FederatedTrainer(
            model=base_dir,
            args=make_args(tmp_path / "federation"),
            train_dataset={"mean": make_rows(4, 0), "b": make_rows(4, 1)},
            peft_config=make_lora(),
        )
        trainer.save_model()
        with pytest.raises(ValueError, match="could mean the client of that name"):
            join(tmp_path / "federation", tmp_path / "new", init_local="mean")

    def test_a_name_that_is_taken(self, federation, tmp_path):
        with pytest.raises(ValueError, match="'client_1' is already a client.*init_local='client_1'"):
            join(federation.args.output_dir, tmp_path, client_id="client_1")

    def test_a_client_that_does_not_exist(self, federation, tmp_path):
        with pytest.raises(ValueError, match="no client 'client_9'.*client_0, client_1, client_2"):
            join(federation.args.output_dir, tmp_path, init_local="client_9")

    def test_another_base_model(self, federation, tmp_path):
        with pytest.raises(ValueError, match="do not fit the base model"):
            join(
                federation.args.output_dir,
                tmp_path,
                model=make_model(hidden_size=64, intermediate_size=128),
                processing_class=make_tokenizer(),
            )

    def test_a_shared_file_that_was_changed(self, federation, base_dir, tmp_path):
        train_federation(base_dir, tmp_path).save_model()
        path = tmp_path / "shared" / "adapter_model.safetensors"
        tensors = load_file(path)
        from safetensors.torch import save_file

        save_file({key: tensor + 1 for key, tensor in tensors.items()}, path)
        with pytest.raises(ValueError, match="shared/adapter_model.safetensors.*is not the file"):
            join(tmp_path, tmp_path / "new")

    def test_an_initialisation_that_changed_the_base(self, base_dir, tmp_path):
        train_federation(base_dir, tmp_path, make_lora(init_lora_weights="pissa")).save_model()
        with pytest.raises(ValueError, match="changed the base weights"):
            join(tmp_path, tmp_path / "new")


def test_it_belongs_to_the_sft_trainer_alone():
    assert not hasattr(FederatedMixin, "from_shared")
