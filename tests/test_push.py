"""Pushing to a Hub and loading from it, over HTTP."""

import base64
import json
import logging
import pickle
import subprocess
import sys
import time
from hashlib import sha256

import pytest
import torch
from conftest import make_args, make_lora, make_model, make_rows, make_tokenizer
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from local_hub import TOKENS
from peft import PeftModel, VeraConfig
from safetensors.torch import load, save
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_fedsa import FederatedCallback, FederatedTrainer, list_clients, load_personalized_model, push_federation
from hf_fedsa.tensors import tensors_sha256

REPO = "me/fed"


@pytest.fixture(scope="module")
def inputs():
    return make_tokenizer()("the cat sat on the red mat", return_tensors="pt")


@pytest.fixture(scope="module")
def base_files(tmp_path_factory):
    directory = tmp_path_factory.mktemp("base")
    make_model(hidden_size=64, intermediate_size=128).save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture
def hub_with_base(hub, base_files):
    hub.put("me/base", base_files)
    return hub


@pytest.fixture
def make_trainer(hub_with_base, tmp_path):
    def make(peft_config=None, clients=3, model="me/base", **kwargs):
        kwargs = {"output_dir": tmp_path / "out", "learning_rate": 5e-2, **kwargs}
        trainer = FederatedTrainer(
            model=model,
            args=make_args(**kwargs),
            train_dataset={f"client_{i}": make_rows(6, seed=i) for i in range(clients)},
            eval_dataset={f"client_{i}": make_rows(2, seed=50 + i) for i in range(clients)},
            peft_config=peft_config or make_lora(),
        )
        # Base models and checks of permission are not what these tests count.
        hub_with_base.requests.clear()
        return trainer

    return make


@pytest.fixture
def trained(make_trainer):
    trainer = make_trainer()
    trainer.train()
    return trainer


@torch.no_grad()
def logits_of(trainer, inputs):
    logits = {}
    for client_id in trainer.client_ids:
        with trainer.use_client(client_id) as model:
            logits[client_id] = model.eval()(**inputs).logits
    return logits


@torch.no_grad()
def difference(model, inputs, expected):
    return float((model(**inputs).logits - expected).abs().max())


def client_files(client_id):
    return {f"clients/{client_id}/adapter_config.json", f"clients/{client_id}/adapter_model.safetensors"}


def replace_in_repo(hub, path, content, repo=REPO):
    """Replaces a client's weights and gives `federation.json` their hash, as someone who means to would."""
    federation = json.loads(hub.files(repo)["federation.json"])
    for entry in federation["clients"].values():
        if entry["path"] and path.startswith(f"{entry['path']}/"):
            entry["sha256"] = sha256(content).hexdigest()
    hub.put(repo, {path: content, "federation.json": json.dumps(federation).encode()})


class TestLayout:
    def test_one_private_repository_one_commit(self, trained, hub):
        trained.push_to_hub(REPO, clients="all")
        repo = hub.repos[REPO]
        assert repo.private
        assert len(repo.commits) == 2  # The Hub's own first one, and ours.
        files = set(hub.files(REPO))
        assert {"README.md", "federation.json", "rounds.jsonl", "tokenizer.json"} <= files
        assert {"shared/adapter_config.json", "shared/adapter_model.safetensors"} <= files
        for client_id in trained.client_ids:
            assert client_files(client_id) <= files
        assert not any("checkpoint" in name or name.endswith((".bin", ".pt")) for name in files)

    def test_nothing_of_this_machine_is_pushed(self, make_trainer, hub, model_dir, tmp_path, caplog):
        trainer = make_trainer(model=model_dir, hub_token=TOKENS["me"])
        trainer.train()
        trainer.push_to_hub(REPO, clients="all")
        assert "hub_base_model" in caplog.text
        everything = hub.uploaded_bytes() + b"".join(content for _, content in hub.uploaded_files())
        for secret in (model_dir, str(tmp_path), TOKENS["me"]):
            assert secret.encode() not in everything
        again = make_trainer(model=model_dir, hub_base_model="me/base")
        again.push_to_hub("me/named", clients="all")
        assert (
            json.loads(hub.files("me/named")["clients/client_0/adapter_config.json"])["base_model_name_or_path"]
            == "me/base"
        )

    def test_each_client_in_a_repository_of_its_own(self, make_trainer, hub, inputs):
        trainer = make_trainer(hub_client_repositories=True, hub_private_repo=False)
        trainer.train()
        logits = logits_of(trainer, inputs)
        trainer.push_to_hub(REPO, clients=["client_0", "client_2"])
        assert not hub.repos[REPO].private
        assert hub.repos[f"{REPO}-client_0"].private and hub.repos[f"{REPO}-client_2"].private
        assert f"{REPO}-client_1" not in hub.repos
        assert not any(name.startswith("clients/") for name in hub.files(REPO))
        assert b"client_0" not in b"".join(hub.files(REPO).values())
        assert list_clients(REPO) == []
        assert difference(load_personalized_model(REPO, "client_2"), inputs, logits["client_2"]) < 1e-5
        base = AutoModelForCausalLM.from_pretrained("me/base")
        stock = PeftModel.from_pretrained(base, f"{REPO}-client_0").eval()
        assert difference(stock, inputs, logits["client_0"]) < 1e-5
        with pytest.raises(ValueError, match="private repositories.*client_1"):
            load_personalized_model(REPO, "client_1")

    def test_repositories_of_clients_that_are_left_out_are_pointed_out(self, make_trainer, hub, caplog):
        trainer = make_trainer(hub_client_repositories=True)
        trainer.push_to_hub(REPO, clients="all")
        trainer.push_to_hub(REPO, clients=["client_1"])
        assert f"{REPO}-client_0, {REPO}-client_2 still exist" in caplog.text

    def test_a_clients_repository_is_never_public(self, make_trainer, hub):
        trainer = make_trainer(hub_client_repositories=True, hub_private_repo=False)
        hub.put(f"{REPO}-client_0", {"README.md": b"---\n---\n"})
        with pytest.raises(ValueError, match=f"{REPO}-client_0 exists and is public"):
            trainer.push_to_hub(REPO, clients="all")

    def test_one_unnamed_client_is_pushed_as_any_trainers(self, hub_with_base, tmp_path, inputs):
        trainer = FederatedTrainer(
            model="me/base",
            args=make_args(tmp_path, local_steps=None, push_to_hub=True, hub_model_id="fed"),
            train_dataset=make_rows(6, seed=0),
            peft_config=make_lora(),
        )
        trainer.train()
        trainer.push_to_hub()
        expected = logits_of(trainer, inputs)["client_0"]
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("me/base"), REPO).eval()
        assert difference(model, inputs, expected) < 1e-5
        assert AutoTokenizer.from_pretrained(REPO)("the cat")["input_ids"]

    def test_it_is_taken_back_whole(self, hub_with_base, tmp_path):
        trainer = FederatedTrainer(
            model="me/base",
            args=make_args(tmp_path, local_steps=None),
            train_dataset=make_rows(6, seed=0),
            peft_config=make_lora(),
        )
        trainer.push_to_hub(REPO)
        assert "adapter_model.safetensors" in hub_with_base.files(REPO)
        trainer.push_to_hub(REPO, clients="none")
        weights = [name for name in hub_with_base.files(REPO) if name.endswith(".safetensors")]
        assert weights == ["shared/adapter_model.safetensors"]

    def test_what_lies_in_the_folder_itself_is_not_read(self, hub_with_base, tmp_path):
        trainer = FederatedTrainer(
            model="me/base",
            args=make_args(tmp_path, local_steps=None),
            train_dataset=make_rows(6, seed=0),
            peft_config=make_lora(),
        )
        trainer.save_model()
        (tmp_path / "adapter_model.safetensors").write_bytes(b"of another run")
        push_federation(tmp_path, REPO, clients="all")
        files = hub_with_base.files(REPO)
        assert files["adapter_model.safetensors"] == files["clients/client_0/adapter_model.safetensors"]


class TestChoice:
    def test_without_a_choice_nothing_is_sent(self, trained, hub):
        with pytest.raises(ValueError, match="`hub_clients` is not set"):
            trained.push_to_hub(REPO)
        assert hub.requests == []
        assert REPO not in hub.repos

    def test_without_a_choice_push_to_hub_is_refused_before_the_model_loads(self, hub, tmp_path):
        with pytest.raises(ValueError, match="`hub_clients` is not set"):
            FederatedTrainer(
                model="me/nowhere",
                args=make_args(tmp_path, push_to_hub=True),
                train_dataset={"a": make_rows(4, 0), "b": make_rows(4, 1)},
                peft_config=make_lora(),
            )
        assert hub.requests == []

    @pytest.mark.parametrize("name", ["every_byte", "names"])
    def test_no_tensor_and_no_name_of_an_unpublished_client_leaves(self, make_trainer, hub, name):
        trainer = make_trainer(num_rounds=3, clients_per_round=2)
        trainer.train()
        trainer.evaluate()
        trainer.push_to_hub(REPO, clients=["client_1"])
        contents = [*hub.uploaded_files(), *hub.uploaded_samples()]
        contents += [(request.path, request.body) for request in hub.requests]
        assert len(contents) > 20
        if name == "names":
            for path, content in contents:
                for hidden in ("client_0", "client_2"):
                    assert hidden not in path
                    assert hidden.encode() not in content
            return
        hidden = {}
        for client_id in ("client_0", "client_2"):
            for tensor in trainer.client_state_dict(client_id).values():
                if tensor.any():
                    hidden[client_id, tensor.numpy().tobytes()] = True
        published = [tensor.numpy().tobytes() for tensor in trainer.client_state_dict("client_1").values()]
        assert hidden
        sent = b"".join(content for _, content in contents)
        assert all(values in sent for values in published)
        assert not any(values in sent for _, values in hidden)

    @pytest.mark.parametrize(("clients", "published"), [(3, 1), (5, 2), (4, 1)])
    def test_numbers_of_unnamed_clients_cannot_be_computed(self, make_trainer, hub, clients, published):
        trainer = make_trainer(clients=clients)
        trainer.train()
        metrics = trainer.evaluate()
        names = trainer.client_ids[:published]
        trainer.push_to_hub(REPO, clients=names)
        federation = json.loads(hub.files(REPO)["federation.json"])
        results = federation["results"]["eval_loss"]
        unnamed = clients - published
        assert results["clients"] == (published if unnamed < 3 else clients)
        assert ("min" in results) == (unnamed < 3)
        hidden = {name: metrics[f"eval_{name}_loss"] for name in trainer.client_ids[published:]}
        rest = results["mean"] * results["clients"] - sum(metrics[f"eval_{name}_loss"] for name in names)
        assert all(abs(rest - loss) > 1e-3 for loss in hidden.values())
        for line in hub.files(REPO)["rounds.jsonl"].splitlines():
            assert ("loss" in json.loads(line)) == (unnamed >= 3)

    def test_only_the_shared_tensors(self, trained, hub):
        trained.push_to_hub(REPO, clients="none")
        assert not any(name.startswith("clients") for name in hub.files(REPO))
        for _, content in hub.uploaded_files():
            if content[8:9] == b"{":
                assert all(key.endswith("lora_A.weight") for key in load(content))
        with pytest.raises(ValueError, match="only the shared tensors were published"):
            load_personalized_model(REPO, "client_0")

    def test_a_narrower_choice_takes_clients_back(self, trained, hub, caplog):
        trained.push_to_hub(REPO, clients="all")
        trained.push_to_hub(REPO, clients=["client_1"])
        assert {name for name in hub.files(REPO) if name.startswith("clients")} == client_files("client_1")
        assert "no longer publishes clients/client_0, clients/client_2" in caplog.text
        assert list_clients(REPO) == ["client_1"]

    def test_a_client_called_none_among_all(self, hub_with_base, tmp_path):
        trainer = FederatedTrainer(
            model="me/base",
            args=make_args(tmp_path, hub_clients="all"),
            train_dataset={"none": make_rows(4, 0), "some": make_rows(4, 1)},
            peft_config=make_lora(),
        )
        trainer.push_to_hub(REPO)
        assert list_clients(REPO) == ["none", "some"]

    def test_settings_that_name_files_here_are_left_out(self, trained, hub):
        config = trained.model.peft_config["default"]
        config.corda_config = {"cache_file": "/home/alice/secret"}
        trained.push_to_hub(REPO, clients="all")
        assert not any(b"alice" in content for content in hub.files(REPO).values())

    def test_an_unknown_client(self, trained, hub):
        with pytest.raises(ValueError, match="'client_9', which is not a client.*client_0, client_1, client_2"):
            trained.push_to_hub(REPO, clients=["client_9"])
        assert hub.requests == []

    def test_a_commit_message_in_place_of_the_repository(self, trained, hub):
        with pytest.raises(ValueError, match="commit_message"):
            trained.push_to_hub("End of training", clients="all")
        assert REPO not in hub.repos

    @pytest.mark.parametrize("strategy", ["checkpoint", "all_checkpoints"])
    def test_strategies_that_upload_checkpoints_are_refused(self, tmp_path, strategy):
        with pytest.raises(ValueError, match=f'hub_strategy="{strategy}".*B of every client'):
            make_args(tmp_path, push_to_hub=True, hub_strategy=strategy)

    def test_a_public_repository_is_refused_unless_asked_for(self, trained, hub):
        hub.put(REPO, {"README.md": b"---\n---\n"})
        with pytest.raises(ValueError, match="exists and is public"):
            trained.push_to_hub(REPO, clients="all")
        assert len(hub.repos[REPO].commits) == 2
        trained.push_to_hub(REPO, clients="all", private=False)
        assert "federation.json" in hub.files(REPO)

    def test_the_message_and_the_branch(self, trained, hub):
        hub.put(REPO, {}, private=True)
        hub.put(REPO, {}, private=True, revision="trial")
        trained.push_to_hub(REPO, clients="all", commit_message="Seven rounds", revision="trial")
        assert hub.repos[REPO].branches["trial"][-1].message == "Seven rounds"
        assert "federation.json" not in hub.files(REPO)
        assert list_clients(REPO, revision="trial") == trained.client_ids


class TestAgain:
    def test_unchanged_sends_nothing_and_commits_nothing(self, trained, hub):
        trained.push_to_hub(REPO, clients="all")
        first = hub.bytes_uploaded()
        hub.requests.clear()
        trained.push_to_hub(REPO, clients="all")
        assert len(hub.repos[REPO].commits) == 2
        assert not [request for request in hub.requests if request.method == "PUT" or "/commit/" in request.path]
        assert hub.bytes_uploaded() < first / 5

    def test_from_another_process_is_unchanged_too(self, trained, hub, tmp_path):
        trained.push_to_hub(REPO, clients="all")
        code = "import hf_fedsa, sys; hf_fedsa.push_federation(sys.argv[1], sys.argv[2], clients='all')"
        subprocess.run([sys.executable, "-c", code, str(tmp_path / "out"), REPO], check=True)
        assert len(hub.repos[REPO].commits) == 2

    def test_more_rounds_send_what_changed(self, make_trainer, hub, tmp_path, inputs):
        trainer = make_trainer(num_rounds=1, save_strategy="epoch")
        trainer.train()
        trainer.push_to_hub(REPO, clients="all")
        old = logits_of(trainer, inputs)
        first = hub.repos[REPO].commits[-1]
        longer = make_trainer(num_rounds=2, save_strategy="epoch")
        longer.train(resume_from_checkpoint=True)
        longer.push_to_hub(REPO, clients="all")
        second = hub.repos[REPO].commits[-1]
        assert second.parent == first.oid
        sent = {path for path, _ in hub.uploaded_files() if not path[:1].isdigit() and "/" not in path}
        assert {"federation.json", "rounds.jsonl", "README.md"} <= sent
        assert not any(path.startswith("tokenizer") for path in sent)
        new = logits_of(longer, inputs)
        for client_id in old:
            before = load_personalized_model(REPO, client_id, revision=first.oid)
            assert difference(before, inputs, old[client_id]) < 1e-5
            assert difference(load_personalized_model(REPO, client_id), inputs, new[client_id]) < 1e-5

    def test_interrupted_then_again(self, trained, hub, inputs):
        trained.push_to_hub(REPO, clients=["client_0"])
        before = hub.files(REPO)
        hub.requests.clear()
        hub.cut("/upload/", after_bytes=1000, times=20)
        with pytest.raises(RuntimeError, match="Error while uploading"):
            trained.push_to_hub(REPO, clients="all")
        assert hub.files(REPO) == before
        hub.faults.clear()
        hub.requests.clear()
        trained.push_to_hub(REPO, clients="all")
        puts = [request for request in hub.requests if request.method == "PUT"]
        assert len(puts) <= 2  # client_0 and A are there already.
        assert list_clients(REPO) == trained.client_ids

    def test_committed_but_the_answer_was_lost(self, trained, hub):
        hub.cut_response("/commit/", 0, reset=True)
        with pytest.raises(Exception):  # noqa: B017  # The client passes on what its HTTP library raises.
            trained.push_to_hub(REPO, clients="all")
        assert len(hub.repos[REPO].commits) == 2
        trained.push_to_hub(REPO, clients="all")
        assert len(hub.repos[REPO].commits) == 2

    def test_rate_limited(self, trained, hub):
        hub.fail("POST", "/preupload/", 429, headers={"Retry-After": "0"})  # The client waits and tries again.
        hub.fail("POST", "/commit/", 429, message="You have exceeded the number of commits per hour.")
        with pytest.raises(HfHubHTTPError, match="commits per hour"):
            trained.push_to_hub(REPO, clients="all")
        assert "federation.json" not in hub.files(REPO)
        trained.push_to_hub(REPO, clients="all")
        assert list_clients(REPO) == trained.client_ids

    def test_server_errors_are_passed_on(self, trained, hub):
        hub.fail("POST", "/commit/", 503)
        with pytest.raises(HfHubHTTPError, match="503"):
            trained.push_to_hub(REPO, clients="all")
        assert "federation.json" not in hub.files(REPO)


class TestRefused:
    def test_a_token_without_write_rights(self, trained, hub):
        with pytest.raises(HfHubHTTPError, match="403"):
            trained.push_to_hub(REPO, clients="all", token=TOKENS["reader"])
        assert REPO not in hub.repos

    @pytest.mark.parametrize("exists", [True, False])
    def test_it_is_found_out_before_the_model_loads(self, hub, tmp_path, exists):
        if exists:
            hub.put(REPO, {}, private=True)
        with pytest.raises(HfHubHTTPError, match="403"):
            FederatedTrainer(
                model="me/nowhere",
                args=make_args(
                    tmp_path, push_to_hub=True, hub_model_id=REPO, hub_clients="all", hub_token=TOKENS["reader"]
                ),
                train_dataset={"a": make_rows(4, 0), "b": make_rows(4, 1)},
                peft_config=make_lora(),
            )

    @pytest.mark.parametrize("path", ["model.safetensors", "adapter_model.bin", "config.json"])
    def test_a_repository_of_something_else(self, trained, hub, path):
        hub.put(REPO, {path: b"{}"}, private=True)
        before = hub.files(REPO)
        with pytest.raises(ValueError, match=f"is not a federation: it holds {path}"):
            trained.push_to_hub(REPO, clients="all")
        assert hub.files(REPO) == before

    @pytest.mark.parametrize(
        ("peft_config", "difference"),
        [
            (lambda: make_lora(r=2), "`r` is 4, this one's is 2"),
            (lambda: make_lora(target_modules=["q_proj"]), "`target_modules`"),
            (lambda: make_lora(use_rslora=True), "`use_rslora` is False, this one's is True"),
            (lambda: VeraConfig(r=4, target_modules=["q_proj"]), "`"),
        ],
    )
    def test_a_federation_of_another_adapter(self, make_trainer, hub, peft_config, difference, tmp_path):
        make_trainer().push_to_hub(REPO, clients="all")
        before = hub.files(REPO)
        other = make_trainer(peft_config=peft_config(), output_dir=tmp_path / "other")
        with pytest.raises(ValueError, match=f"another kind: its {difference}"):
            other.push_to_hub(REPO, clients="all")
        assert hub.files(REPO) == before
        with pytest.raises(ValueError, match="another kind"):
            make_trainer(
                peft_config=peft_config(),
                output_dir=tmp_path / "early",
                push_to_hub=True,
                hub_model_id=REPO,
                hub_clients="all",
            )

    def test_a_federation_of_another_base(self, make_trainer, hub, base_files, tmp_path):
        make_trainer().push_to_hub(REPO, clients="all")
        hub.put("me/base2", base_files)
        other = make_trainer(model="me/base2", output_dir=tmp_path / "other")
        with pytest.raises(ValueError, match="`base_model` is 'me/base', this one's is 'me/base2'"):
            other.push_to_hub(REPO, clients="all")

    def test_a_folder_that_is_not_whole(self, trained, hub, tmp_path):
        trained.save_model()
        out = tmp_path / "out"
        path = out / "clients" / "client_1" / "adapter_model.safetensors"
        path.write_bytes((out / "clients" / "client_0" / "adapter_model.safetensors").read_bytes())
        hub.requests.clear()
        with pytest.raises(ValueError, match="client_1.*is not the file"):
            push_federation(out, REPO, clients="all")
        assert hub.requests == []


class TestDuringTraining:
    def test_every_save_pushes_at_round_ends(self, make_trainer, hub):
        class Finish(FederatedCallback):
            def on_round_end(self, args, state, control, metrics, **kwargs):
                seen.append((metrics["round"], len(hub.repos[REPO].commits)))

        seen = []
        trainer = make_trainer(
            num_rounds=3,
            local_steps=4,
            parallel_clients=3,
            save_strategy="steps",
            save_steps=1,
            push_to_hub=True,
            hub_model_id=REPO,
            hub_clients="all",
            hub_always_push=True,
        )
        trainer.add_callback(Finish())
        trainer.train()
        commits = hub.repos[REPO].commits[1:]
        assert 1 <= len(commits) <= 3
        assert all(commit.message.startswith("Training in progress, round") for commit in commits)
        for commit in commits:
            federation = json.loads(commit.files["federation.json"])
            assert commit.message.endswith(str(federation["rounds_done"]))
            for client_id, entry in federation["clients"].items():
                content = commit.files[f"clients/{client_id}/adapter_model.safetensors"]
                assert sha256(content).hexdigest() == entry["sha256"]
        assert json.loads(hub.files(REPO)["federation.json"])["rounds_done"] == 3

    def test_the_end_strategy_pushes_when_saved(self, make_trainer, hub):
        trainer = make_trainer(
            save_strategy="epoch", push_to_hub=True, hub_model_id=REPO, hub_clients="all", hub_strategy="end"
        )
        trainer.train()
        assert len(hub.repos[REPO].commits) == 1
        trainer.save_model()
        assert hub.repos[REPO].commits[-1].message == "Model save"

    def test_a_failed_push_does_not_stop_training(self, make_trainer, hub, caplog):
        hub.fail("POST", "/commit/", 500, times=1)
        trainer = make_trainer(
            num_rounds=3, save_strategy="epoch", push_to_hub=True, hub_model_id=REPO, hub_clients="all"
        )
        with caplog.at_level(logging.ERROR, logger="hf_fedsa"):
            trainer.train()
        assert "The push after round 1 failed" in caplog.text
        assert json.loads(hub.files(REPO)["federation.json"])["rounds_done"] == 3


STOCK = """
import sys, warnings, logging, io
stream = io.StringIO()
logging.basicConfig(stream=stream, level=logging.WARNING)
# On some CPUs bitsandbytes says at import that the package `kernels` would make it faster.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
from safetensors.torch import save_file
from transformers.utils import logging as hf_logging
hf_logging.enable_propagation(); hf_logging.disable_default_handler()
ids, out = eval(sys.argv[1]), {}
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for client_id in sys.argv[3:]:
        base = AutoModelForCausalLM.from_pretrained("me/base")
        model = PeftModel.from_pretrained(base, "me/fed", subfolder=f"clients/{client_id}").eval()
        with torch.no_grad():
            out[client_id] = model(input_ids=torch.tensor(ids)).logits
save_file(out, sys.argv[2])
assert "hf_fedsa" not in sys.modules and "trl" not in sys.modules
print(stream.getvalue())
# What transformers 5 says to PEFT 0.21 whatever is loaded.
upstream = "is_gradient_checkpointing` is deprecated"
print("".join(str(w.message) for w in caught if upstream not in str(w.message)))
"""


def fresh_environment(tmp_path, **extra):
    import os

    return {**os.environ, "HF_HOME": str(tmp_path / "empty"), **extra}


class TestLoading:
    @pytest.fixture
    def pushed(self, trained, hub, inputs):
        trained.push_to_hub(REPO, clients="all")
        return trained, logits_of(trained, inputs)

    def test_stock_peft_in_a_fresh_process_without_a_warning(self, pushed, inputs, tmp_path):
        trainer, logits = pushed
        out = tmp_path / "logits.safetensors"
        command = [sys.executable, "-c", STOCK, str(inputs["input_ids"].tolist()), str(out), *trainer.client_ids]
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=fresh_environment(tmp_path))
        assert done.stdout.strip() == ""
        for client_id, found in load(out.read_bytes()).items():
            assert (found - logits[client_id]).abs().max() < 1e-5

    def test_ours(self, pushed, inputs):
        trainer, logits = pushed
        assert list_clients(REPO) == trainer.client_ids
        for client_id in trainer.client_ids:
            model = load_personalized_model(REPO, client_id)
            assert difference(model, inputs, logits[client_id]) < 1e-5
            assert model.active_adapter == client_id

    def test_from_a_folder_called_snapshots(self, pushed, hub):
        hub.put("me/odd", {f"snapshots/v1/{name}": content for name, content in hub.files(REPO).items()})
        model = load_personalized_model("me/odd", "client_1", subfolder="snapshots/v1")
        assert model.active_adapter == "client_1"

    def test_from_a_folder_in_a_repository(self, pushed, hub, inputs):
        _, logits = pushed
        hub.put("me/many", {f"runs/first/{name}": content for name, content in hub.files(REPO).items()})
        assert list_clients("me/many", subfolder="runs/first")
        model = load_personalized_model("me/many", "client_1", subfolder="runs/first")
        assert difference(model, inputs, logits["client_1"]) < 1e-5
        with pytest.raises(FileNotFoundError, match="me/many/runs/second holds no federation"):
            load_personalized_model("me/many", "client_1", subfolder="runs/second")

    def test_a_private_repository_needs_a_token(self, pushed, tmp_path):
        with pytest.raises(RepositoryNotFoundError, match="nor is there a folder|Nor is there a folder"):
            load_personalized_model(REPO, "client_1", token=TOKENS["other"], cache_dir=tmp_path)
        load_personalized_model(REPO, "client_1", token=TOKENS["reader"], cache_dir=tmp_path)

    def test_offline_from_the_cache(self, pushed, hub, inputs, tmp_path):
        _, logits = pushed
        load_personalized_model(REPO, "client_1", cache_dir=tmp_path)
        hub.requests.clear()
        model = load_personalized_model(REPO, "client_1", cache_dir=tmp_path, local_files_only=True)
        assert hub.requests == []
        assert difference(model, inputs, logits["client_1"]) < 1e-5
        with pytest.raises(FileNotFoundError):
            load_personalized_model(REPO, "client_2", cache_dir=tmp_path, local_files_only=True)

    def test_all_files_are_of_the_commit_that_was_found_first(self, pushed, hub, inputs, tmp_path):
        _, logits = pushed

        def push_again():
            hub.put(REPO, {"clients/client_1/adapter_model.safetensors": b"of another push"})

        hub.before("GET", "clients/client_1/adapter_config.json", push_again)
        model = load_personalized_model(REPO, "client_1", cache_dir=tmp_path)
        assert len(hub.repos[REPO].commits) == 3
        assert difference(model, inputs, logits["client_1"]) < 1e-5
        with pytest.raises(ValueError, match="is not the file that federation.json lists"):
            load_personalized_model(REPO, "client_1", cache_dir=tmp_path)

    def test_a_wrong_client_lists_the_ones_there_are(self, pushed):
        with pytest.raises(ValueError, match="no client 'client_9'.*client_0, client_1, client_2"):
            load_personalized_model(REPO, "client_9")

    def test_a_repository_without_a_federation(self, hub_with_base):
        with pytest.raises(FileNotFoundError, match="me/base holds no federation"):
            list_clients("me/base")

    def test_neither_a_folder_nor_a_repository(self, hub):
        with pytest.raises(FileNotFoundError, match="neither a folder nor"):
            list_clients("no/such/folder")

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda tensors, key: tensors.update({key: torch.zeros(3, 3)}), r"\(3, 3\)"),
            (lambda tensors, key: tensors.update({"base_model.model.extra.lora_A.weight": torch.ones(2)}), "extra"),
            (lambda tensors, key: tensors.pop(key), "lacks"),
        ],
        ids=["shape", "excess", "missing"],
    )
    def test_tensors_that_do_not_fit(self, pushed, hub, inputs, change, message):
        path = "clients/client_1/adapter_model.safetensors"
        tensors = load(hub.files(REPO)[path])
        change(tensors, sorted(tensors)[0])
        replace_in_repo(hub, path, save(tensors))
        base = AutoModelForCausalLM.from_pretrained("me/base")
        before = {key: tensor.clone() for key, tensor in base.state_dict().items()}
        with pytest.raises(ValueError, match=f"adapter of 'client_1'.*{message}"):
            load_personalized_model(REPO, "client_1", base_model=base)
        after = base.state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(after[key], before[key]) for key in before)
        load_personalized_model(REPO, "client_0", base_model=base)

    def test_a_pickle_is_never_opened(self, pushed, hub, tmp_path):
        class Opened:
            def __reduce__(self):
                return (open, (str(tmp_path / "opened"), "w"))

        path = "clients/client_1/adapter_model.safetensors"
        replace_in_repo(hub, path, pickle.dumps(Opened()))
        with pytest.raises(ValueError, match="cannot be read as safetensors"):
            load_personalized_model(REPO, "client_1")
        files = {**hub.files(REPO), "clients/client_1/adapter_model.bin": pickle.dumps(Opened())}
        del files[path]
        hub.put("me/pickled", files)
        with pytest.raises(ValueError, match="adapter_model.safetensors is missing"):
            load_personalized_model("me/pickled", "client_1")
        assert not (tmp_path / "opened").exists()

    def test_vera_projections_are_restored(self, make_trainer, hub, inputs):
        trainer = make_trainer(peft_config=VeraConfig(r=4, target_modules=["q_proj", "v_proj"]), clients=2)
        trainer.train()
        trainer.push_to_hub(REPO, clients="all")
        for client_id, expected in logits_of(trainer, inputs).items():
            model = load_personalized_model(REPO, client_id)
            assert difference(model, inputs, expected) < 1e-5
            with torch.no_grad():
                for name, buffer in model.named_buffers():
                    if "vera_" in name:
                        buffer.add_(1.0)
            assert difference(model, inputs, expected) > 1e-3
            again = load_personalized_model(REPO, client_id, base_model=model)
            assert again is model
            assert difference(again, inputs, expected) < 1e-5


class TestRaces:
    def test_two_first_pushes_at_once_are_joined_or_refused(self, make_trainer, hub, tmp_path):
        first, second = (make_trainer(output_dir=tmp_path / name, seed=i) for i, name in enumerate("ab"))
        for trainer in (first, second):
            trainer.train()
        hub.before("POST", "/repos/create", lambda: second.push_to_hub(REPO, clients="all"))
        first.push_to_hub(REPO, clients="all")
        for client_id in first.client_ids:
            load_personalized_model(REPO, client_id)
        assert json.loads(hub.files(REPO)["federation.json"])["shared_sha256"] == tensors_sha256(
            first.shared_state_dict()
        )

    def test_a_public_repository_that_appears_meanwhile(self, trained, hub):
        hub.before("POST", "/repos/create", lambda: hub.put(REPO, {"README.md": b"---\n---\n"}))
        with pytest.raises(ValueError, match="exists and is public"):
            trained.push_to_hub(REPO, clients="all")
        assert "federation.json" not in hub.files(REPO)

    def test_a_push_in_the_background_is_of_one_moment(self, make_trainer, hub):
        trainer = make_trainer(num_rounds=1)
        trainer.train()
        hub.before("POST", "/preupload/", lambda: time.sleep(1.0))
        future = trainer.push_to_hub(REPO, clients="all", blocking=False)
        trainer.train()
        trainer.save_model()
        pushed = future.result().oid
        for client_id in trainer.client_ids:
            load_personalized_model(REPO, client_id)
        assert hub.repos[REPO].commits[-1].oid == pushed

    def test_a_later_push_is_the_later_one(self, trained, hub):
        hub.before("POST", "/preupload/", lambda: time.sleep(1.0))
        first = trained.push_to_hub(REPO, clients="all", blocking=False)
        trained.push_to_hub(REPO, clients="none")
        first.result()
        assert list_clients(REPO) == []

    def test_rounds_of_a_later_run_in_the_folder_are_not_pushed(self, make_trainer, hub, tmp_path):
        trainer = make_trainer(num_rounds=2)
        trainer.train()
        trainer.save_model()
        make_trainer(num_rounds=3, seed=5).train()
        with pytest.raises(ValueError, match="rounds.jsonl is missing or is not the file"):
            push_federation(tmp_path / "out", REPO, clients="all")


class TestClientRepositories:
    def test_none_is_written_if_one_holds_something_else(self, make_trainer, hub, tmp_path):
        make_trainer(output_dir=tmp_path / "other").push_to_hub(f"{REPO}-client_2", clients="all")
        trainer = make_trainer(hub_client_repositories=True)
        with pytest.raises(ValueError, match=f"{REPO}-client_2 exists and holds another federation"):
            trainer.push_to_hub(REPO, clients="all")
        assert f"{REPO}-client_0" not in hub.repos
        assert REPO not in hub.repos

    def test_none_is_written_if_the_main_one_refuses(self, make_trainer, hub, tmp_path):
        make_trainer(hub_client_repositories=True).push_to_hub(REPO, clients="all")
        before = hub.files(f"{REPO}-client_0")
        other = make_trainer(hub_client_repositories=True, peft_config=make_lora(r=2), output_dir=tmp_path / "other")
        with pytest.raises(ValueError, match="another kind"):
            other.push_to_hub(REPO, clients="all")
        assert hub.files(f"{REPO}-client_0") == before

    def test_an_adapter_of_another_push_is_refused(self, make_trainer, hub):
        trainer = make_trainer(hub_client_repositories=True, num_rounds=1, save_strategy="epoch")
        trainer.train()
        trainer.push_to_hub(REPO, clients="all")
        first = hub.repos[REPO].commits[-1].oid
        longer = make_trainer(hub_client_repositories=True, num_rounds=2, save_strategy="epoch")
        longer.train(resume_from_checkpoint=True)
        longer.push_to_hub(REPO, clients="all")
        load_personalized_model(REPO, "client_0")
        with pytest.raises(ValueError, match="adapter of another push"):
            load_personalized_model(REPO, "client_0", revision=first)

    def test_names_are_checked_before_training(self, hub_with_base, tmp_path):
        with pytest.raises(ValueError, match=r"a\.\.b"):
            FederatedTrainer(
                model="me/base",
                args=make_args(
                    tmp_path, push_to_hub=True, hub_model_id=REPO, hub_clients="all", hub_client_repositories=True
                ),
                train_dataset={"a..b": make_rows(4, 0), "c": make_rows(4, 1)},
                peft_config=make_lora(),
            )

    def test_only_the_published_ones_are_listed(self, make_trainer, hub):
        trainer = make_trainer(hub_client_repositories=True, hub_name_clients=True)
        trainer.push_to_hub(REPO, clients=["client_1"])
        assert list_clients(REPO) == ["client_1"]
        assert b"client_0" in hub.files(REPO)["federation.json"]


class TestTampered:
    """A `federation.json` may come from anyone."""

    @pytest.mark.parametrize("path", ["../../secrets", "/etc", "clients/client_1", "shared"])
    def test_an_adapter_elsewhere(self, trained, tmp_path, path):
        trained.save_model()
        file = tmp_path / "out" / "federation.json"
        federation = json.loads(file.read_text())
        federation["clients"]["client_0"]["path"] = path
        file.write_text(json.dumps(federation))
        with pytest.raises(ValueError, match="the adapter of 'client_0' is said to be in"):
            load_personalized_model(tmp_path / "out", "client_0")

    @pytest.mark.parametrize(
        "name",
        ["../secret.txt", "/etc/passwd", "training_args.bin", "clients/client_0/x.json"]
        + [".env", ".git/config", "secrets.json", "notes/tokenizer.json", ""],
    )
    def test_files_outside_of_the_folder_are_not_pushed(self, trained, hub, tmp_path, name):
        trained.save_model()
        file = tmp_path / "out" / "federation.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "processing_files": [name]}))
        hub.requests.clear()
        with pytest.raises(ValueError, match="is no file of a tokenizer or processor"):
            push_federation(tmp_path / "out", REPO, clients="all")
        assert hub.requests == []

    @pytest.mark.parametrize(
        "name",
        ["tokenizer.json", "rounds.jsonl", "shared", "clients", "clients/client_1", "shared/adapter_config.json"]
        + ["clients/client_1/adapter_model.safetensors", "federation.json"],
    )
    def test_a_link_is_not_followed(self, trained, hub, tmp_path, name):
        trained.save_model()
        inside = tmp_path / "out" / name
        outside = inside.rename(tmp_path / "elsewhere")
        inside.symlink_to(outside)
        hub.requests.clear()
        with pytest.raises(ValueError, match=f"{name}.* is not itself in the folder: a link leads to .*/elsewhere"):
            push_federation(tmp_path / "out", REPO, clients="all")
        assert hub.requests == []
        load_personalized_model(tmp_path / "out", "client_1")  # As from a cache, whose files are links.
        linked = tmp_path / "linked"
        inside.unlink()
        outside.rename(inside)
        linked.symlink_to(tmp_path / "out")
        push_federation(linked, REPO, clients="all")

    def test_nor_one_to_a_file_beside_it(self, trained, hub, tmp_path):
        trained.save_model()
        (tmp_path / "out" / ".env").write_text("SECRET=1")
        (tmp_path / "out" / "tokenizer.json").unlink()
        (tmp_path / "out" / "tokenizer.json").symlink_to(".env")
        with pytest.raises(ValueError, match="tokenizer.json is not itself in the folder"):
            push_federation(tmp_path / "out", REPO, clients="all")

    @pytest.mark.parametrize("content", ["[]", "{}", '{"clients": {}}'])
    def test_another_format(self, tmp_path, content):
        (tmp_path / "federation.json").write_text(content)
        with pytest.raises(ValueError, match="was not written by this version"):
            list_clients(tmp_path)


class TestManyClients:
    NAMES = ("client_1", "client_10", "a.b", "lora-lab", "0", "q_proj", "keys", "veracity")

    @pytest.fixture
    def served(self, hub_with_base, tmp_path, inputs):
        trainer = FederatedTrainer(
            model="me/base",
            args=make_args(tmp_path, learning_rate=5e-2, num_rounds=1),
            train_dataset={name: make_rows(4, seed=i) for i, name in enumerate(self.NAMES)},
            peft_config=make_lora(modules_to_save=["lm_head"]),
        )
        trainer.train()
        trainer.save_model()
        return tmp_path, logits_of(trainer, inputs)

    def test_all_at_once_as_named_adapters(self, served, inputs):
        source, logits = served
        model = load_personalized_model(source, self.NAMES)
        assert difference(model, inputs, logits["client_1"]) < 1e-5
        assert "client_10" in model.peft_config
        for name in reversed(self.NAMES):
            assert load_personalized_model(source, name, base_model=model) is model
            assert difference(model, inputs, logits[name]) < 1e-5
        model.set_adapter("client_10")
        assert difference(model, inputs, logits["client_10"]) < 1e-5

    def test_one_after_the_other_on_one_base(self, served, inputs):
        source, logits = served
        base = AutoModelForCausalLM.from_pretrained("me/base")
        pointers = {key: parameter.data_ptr() for key, parameter in base.named_parameters()}
        model = base
        for name in self.NAMES:
            model = load_personalized_model(source, name, base_model=model)
            assert difference(model, inputs, logits[name]) < 1e-5
        assert len(model.peft_config) == len(self.NAMES)
        assert {p.data_ptr() for p in model.parameters()} >= set(pointers.values())

    def test_an_adapter_of_the_same_name_from_elsewhere_is_replaced(self, served, hub_with_base, inputs, tmp_path):
        source, logits = served
        other = tmp_path / "other"
        trainer = FederatedTrainer(
            model="me/base",
            args=make_args(other, learning_rate=5e-2, num_rounds=2, seed=7),
            train_dataset={"client_1": make_rows(4, seed=90), "client_2": make_rows(4, seed=91)},
            peft_config=make_lora(modules_to_save=["lm_head"]),
        )
        trainer.train()
        trainer.save_model()
        expected = logits_of(trainer, inputs)["client_1"]
        model = load_personalized_model(source, "client_1")
        load_personalized_model(other, "client_1", base_model=model)
        assert difference(model, inputs, expected) < 1e-5

    def test_a_client_is_not_merged_under_the_others(self, served, inputs):
        source, logits = served
        model = load_personalized_model(source, ["a.b", "0"])
        with pytest.raises(ValueError, match="`merge=True`.*under all adapters"):
            load_personalized_model(source, "0", base_model=model, merge=True)
        assert difference(model, inputs, logits["a.b"]) < 1e-5

    def test_names_that_look_escaped_are_not_mistaken(self, hub_with_base, tmp_path, inputs):
        names = ("a.b", f"escaped-{b'a.b'.hex()}", "base_model")
        trainer = FederatedTrainer(
            model="me/base",
            args=make_args(tmp_path, learning_rate=5e-2, num_rounds=1),
            train_dataset={name: make_rows(4, seed=i) for i, name in enumerate(names)},
            peft_config=make_lora(),
        )
        trainer.train()
        trainer.save_model()
        logits = logits_of(trainer, inputs)
        model = load_personalized_model(tmp_path, names)
        for name in names:
            load_personalized_model(tmp_path, name, base_model=model)
            assert difference(model, inputs, logits[name]) < 1e-5

    def test_the_scale_is_that_of_the_adapter_loaded_last(self, make_trainer, inputs, tmp_path):
        first = make_trainer(output_dir=tmp_path / "first")
        second = make_trainer(peft_config=make_lora(lora_alpha=64), output_dir=tmp_path / "second")
        for trainer in (first, second):
            trainer.train()
            trainer.save_model()
        model = load_personalized_model(tmp_path / "first", ["client_1", "client_2"])
        load_personalized_model(tmp_path / "second", "client_1", base_model=model)
        assert difference(model, inputs, logits_of(second, inputs)["client_1"]) < 1e-5
        model.set_adapter("client_2")
        assert difference(model, inputs, logits_of(first, inputs)["client_2"]) < 1e-5
        alone = load_personalized_model(tmp_path / "first", "client_1")
        load_personalized_model(tmp_path / "second", "client_1", base_model=alone)
        assert difference(alone, inputs, logits_of(second, inputs)["client_1"]) < 1e-5

    def test_several_cannot_be_merged_into_one(self, served):
        with pytest.raises(ValueError, match="`merge=True` makes one plain model"):
            load_personalized_model(served[0], ["a.b", "0"], merge=True)


def test_uploads_are_recorded_in_full(hub):
    """The tests above search what was sent, so it must be there to be found."""
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi()
    api.create_repo(REPO)
    api.create_commit(
        REPO,
        [CommitOperationAdd("a.safetensors", save({"x": torch.arange(300.0)})), CommitOperationAdd("b.txt", b"text")],
        commit_message="both",
    )
    contents = [content for _, content in hub.uploaded_files()]
    assert b"text" in contents
    assert any(torch.arange(300.0).numpy().tobytes() in content for content in contents)
    assert base64.b64encode(b"text") in hub.uploaded_bytes()
