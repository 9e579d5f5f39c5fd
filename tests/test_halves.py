"""A federation saved in two halves: the server's, without a model, and each client's."""

import copy
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import make_args, make_lora, make_model, make_rows, make_tokenizer
from peft import PeftModel, VeraConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import hf_fedsa
from hf_fedsa import FederatedTrainer, list_clients, load_personalized_model, push_federation
from hf_fedsa.hub.card import make_model_card
from hf_fedsa.hub.folder import read_federation, read_saved
from hf_fedsa.hub.halves import open_shared, save_client_half, save_server_half
from hf_fedsa.tensors import tensors_sha256

KINDS = {
    "lora": make_lora(target_modules=["q_proj", "up_proj", "embed_tokens"], rank_pattern={"up_proj": 2}),
    "rslora": make_lora(use_rslora=True),
    "dora": make_lora(use_dora=True, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "vera": VeraConfig(r=8, target_modules=["q_proj", "v_proj"]),
}
CLIENTS = {"bank": 4, "clinic": 6, "shop": 8}


@dataclass
class Run:
    """A run by a trainer: the folders it saved before and after, and what a server and the clients would hold."""

    start: Path
    whole: Path
    shared: dict
    rounds: list
    kept: dict
    logits: dict

    def local(self, client_id):
        """B, and the constants, which are in the files that the trainer has saved."""
        saved = load_file(weights(self.whole, client_id))
        return {**self.kept[client_id], **{k: t for k, t in saved.items() if k.startswith("base_model.vera_")}}

    def save_server(self, folder, **changes):
        values = {"like": self.start, "shared": self.shared, "rounds": self.rounds, "clients": CLIENTS}
        save_server_half(folder, **{**values, **changes})

    def save_client(self, folder, client_id, **changes):
        save_client_half(folder, client_id, **{"shared": self.shared, "local": self.local(client_id), **changes})

    def save(self, folder):
        self.save_server(folder)
        for client_id in CLIENTS:
            self.save_client(folder, client_id)


def weights(folder, client_id):
    return folder / "clients" / client_id / "adapter_model.safetensors"


def contents(folder):
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if path.suffix != ".bin" and path.name[0] != "."}


INPUTS = make_tokenizer()("the cat sat on the red mat", return_tensors="pt")


def train(folder, base, kind, **kwargs):
    trainer = FederatedTrainer(
        model=base,
        args=make_args(
            folder / "whole", learning_rate=5e-2, clients_per_round=2, num_rounds=3, local_steps=1, **kwargs
        ),
        train_dataset={client_id: make_rows(n, seed=n) for client_id, n in CLIENTS.items()},
        eval_dataset={client_id: make_rows(2, seed=50 + n) for client_id, n in CLIENTS.items()},
        peft_config=copy.deepcopy(KINDS[kind]),
    )
    trainer.save_model(str(folder / "start"))
    trainer.train()
    trainer.evaluate()
    trainer.save_model()
    logits = {}
    for client_id in CLIENTS:
        with trainer.use_client(client_id) as model, torch.no_grad():
            logits[client_id] = model.eval()(**INPUTS).logits
    return Run(
        start=folder / "start",
        whole=folder / "whole",
        shared=trainer.shared_state_dict(),
        rounds=trainer.round_history,
        kept={client_id: trainer.client_state_dict(client_id) for client_id in CLIENTS},
        logits=logits,
    )


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("base")
    make_model().save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="module")
def runs(base_dir, tmp_path_factory):
    made = {}

    def run(kind):
        if kind not in made:
            made[kind] = train(tmp_path_factory.mktemp(kind), base_dir, kind)
        return made[kind]

    return run


@pytest.fixture
def run(runs):
    return runs("lora")


@pytest.mark.parametrize("kind", KINDS)
class TestBothHalves:
    def test_they_are_what_a_trainer_saves(self, runs, kind, tmp_path):
        runs(kind).save(tmp_path)
        found, expected = contents(tmp_path), contents(runs(kind).whole)
        own = {name for name in expected if name in ("run.json", "last_run.json") or name.startswith("client_store")}
        assert found.keys() == expected.keys() - own
        # The trainer's card lists the arguments in their own order, and this one in that of `federation.json`.
        expected["README.md"] = make_model_card(read_federation(runs(kind).whole), runs(kind).rounds, None).encode()
        for name, content in found.items():
            assert content == expected[name], name

    def test_every_client_gives_the_logits_it_was_evaluated_with(self, runs, kind, tmp_path, base_dir):
        runs(kind).save(tmp_path)
        assert read_saved(tmp_path).client_ids == list(CLIENTS)  # Checks every hash.
        for client_id, expected in runs(kind).logits.items():
            ours = load_personalized_model(tmp_path, client_id)
            base = AutoModelForCausalLM.from_pretrained(base_dir)
            stock = PeftModel.from_pretrained(base, str(tmp_path / "clients" / client_id)).eval()
            with torch.no_grad():
                torch.testing.assert_close(ours(**INPUTS).logits, expected, atol=1e-5, rtol=0)
                assert torch.equal(stock(**INPUTS).logits, ours(**INPUTS).logits)


class TestOpening:
    def test_it_gives_the_tensors_and_the_description_that_were_saved(self, run):
        shared, federation = open_shared(run.whole)
        assert shared.keys() == run.shared.keys()
        assert all(
            torch.equal(shared[key], tensor) and shared[key].dtype == torch.float32
            for key, tensor in run.shared.items()
        )
        assert federation == read_federation(run.whole)

    def test_tensors_of_another_save_are_refused(self, run, tmp_path):
        shutil.copytree(run.whole, tmp_path / "mixed")
        shutil.copytree(run.start / "shared", tmp_path / "mixed" / "shared", dirs_exist_ok=True)
        with pytest.raises(ValueError, match="shared/adapter_model.safetensors is missing or is not the file"):
            open_shared(tmp_path / "mixed")

    def test_without_a_federation_it_says_what_to_pass(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="holds no federation.*trainer.save_model"):
            open_shared(tmp_path)

    def test_an_initialisation_that_changed_the_base_is_refused(self, run, tmp_path):
        shutil.copytree(run.start, tmp_path / "start")
        federation = read_federation(run.start)
        federation |= {"mutates_base": True, "adapter": {**federation["adapter"], "init_lora_weights": "pissa"}}
        (tmp_path / "start" / "federation.json").write_text(json.dumps(federation))
        for use in (lambda: open_shared(tmp_path / "start"), lambda: run.save_client(tmp_path / "start", "bank")):
            with pytest.raises(ValueError, match="init_lora_weights='pissa'`, which changed the base weights"):
                use()


class TestServersHalf:
    def test_no_client_has_an_adapter_and_every_client_is_listed(self, run, tmp_path):
        run.save_server(tmp_path)
        federation = read_saved(tmp_path).federation
        assert {c: entry["num_examples"] for c, entry in federation["clients"].items()} == CLIENTS
        assert all(entry["path"] is None and entry["sha256"] is None for entry in federation["clients"].values())
        assert list_clients(tmp_path) == []
        assert not (tmp_path / "clients").exists()
        assert "No client's adapter is in this folder" in (tmp_path / "README.md").read_text()
        with pytest.raises(ValueError, match="only the shared tensors were published"):
            load_personalized_model(tmp_path, "bank")

    def test_published_it_is_what_is_published_of_the_whole_without_clients(self, run, tmp_path, hub):
        run.save_server(tmp_path)
        for name, folder in (("me/half", tmp_path), ("me/whole", run.whole)):
            push_federation(folder, name, clients="none")
        half, whole = hub.files("me/half"), hub.files("me/whole")
        assert half.keys() == whole.keys()
        for name, content in half.items():
            assert content.replace(b"me/half", b"me/whole").replace(b"# half", b"# whole") == whole[name], name

    def test_a_newcomer_starts_from_it(self, run, tmp_path, base_dir):
        run.save_server(tmp_path / "half")
        newcomer = FederatedTrainer.from_shared(
            tmp_path / "half", train_dataset=make_rows(4, seed=9), client_id="x", args=make_args(tmp_path / "own")
        )
        assert tensors_sha256(newcomer.shared_state_dict()) == tensors_sha256(run.shared)

    def test_neither_transformers_nor_peft_is_loaded(self, run, tmp_path):
        program = """
            import json, sys, types
            package = types.ModuleType("hf_fedsa")
            package.__path__ = [sys.argv[1]]
            sys.modules["hf_fedsa"] = package
            from hf_fedsa.hub import open_shared, save_server_half
            shared, federation = open_shared(sys.argv[2])
            rounds = [json.loads(line) for line in open(sys.argv[2] + "/rounds.jsonl")]
            clients = {client_id: entry["num_examples"] for client_id, entry in federation["clients"].items()}
            save_server_half(sys.argv[3], like=sys.argv[2], shared=shared, rounds=rounds, clients=clients)
            loaded = {"transformers", "peft", "trl", "datasets", "accelerate"} & sys.modules.keys()
            sys.exit(f"loads {sorted(loaded)}" if loaded else 0)
        """
        program = "\n".join(line.strip() for line in program.splitlines())
        package = str(Path(hf_fedsa.__file__).parent)
        subprocess.run([sys.executable, "-c", program, package, str(run.whole), str(tmp_path)], check=True)
        assert read_saved(tmp_path).federation["rounds_done"] == 3

    def test_saved_round_by_round_in_its_own_folder_it_keeps_where_it_started(self, run, tmp_path):
        shutil.copytree(run.start, tmp_path / "own")
        shared = run.shared
        for done in (1, 2, 3):
            rounds = [dict(entry) for entry in run.rounds[:done]]
            shared = {key: tensor + done for key, tensor in run.shared.items()}
            rounds[-1]["shared_sha256"] = tensors_sha256(shared)
            run.save_server(tmp_path / "own", like=tmp_path / "own", shared=shared, rounds=kept(rounds, tmp_path))
        federation = read_saved(tmp_path / "own").federation
        assert federation["rounds_done"] == 3
        assert federation["initial_shared_sha256"] == read_federation(run.start)["shared_sha256"]

    def test_a_server_that_starts_from_a_trained_federation_descends_from_that(self, run, tmp_path):
        run.save_server(tmp_path, like=run.whole, rounds=[])
        federation = read_saved(tmp_path).federation
        assert federation["initial_shared_sha256"] == read_federation(run.whole)["shared_sha256"]
        assert federation["rounds_done"] == 0
        assert {entry["last_round"] for entry in federation["clients"].values()} == {None}

    def test_a_round_that_did_not_count_is_nobodys_last(self, run, tmp_path):
        rounds = copy.deepcopy(run.rounds)
        rounds[-1]["counted"] = False
        run.save_server(tmp_path, rounds=rounds)
        found = {entry["last_round"] for entry in read_federation(tmp_path)["clients"].values()}
        assert 2 not in found
        assert found & {0, 1}

    def test_what_a_repository_said_of_its_own_adapters_is_not_said_of_the_folder(self, run, tmp_path):
        shutil.copytree(run.whole, tmp_path / "start")
        federation = read_federation(run.whole)
        federation |= {"client_repositories": True, "returned_rounds": 2, "root_adapter": "bank"}
        federation["clients"]["shop"]["joined"] = True
        (tmp_path / "start" / "federation.json").write_text(json.dumps(federation))
        run.save_server(tmp_path / "half", like=tmp_path / "start")
        found = read_saved(tmp_path / "half").federation
        assert (found["client_repositories"], found["returned_rounds"], found["root_adapter"]) == (False, 0, None)
        assert [client_id for client_id, entry in found["clients"].items() if entry["joined"]] == ["shop"]

    def test_arguments_of_the_server_are_on_the_card(self, run, tmp_path):
        run.save_server(tmp_path, arguments={"num_rounds": 77, "min_clients_per_round": 5})
        assert read_federation(tmp_path)["num_rounds"] == 77
        card = (tmp_path / "README.md").read_text()
        assert "| `num_rounds` | `77` |" in card
        assert "| `min_clients_per_round` | `5` |" in card
        assert "| `optim` |" in card

    def test_adapters_of_an_earlier_a_are_pointed_out(self, run, tmp_path, caplog):
        run.save(tmp_path)
        assert "earlier run" not in caplog.text
        run.save_server(tmp_path)
        assert "bank, clinic, shop of an earlier run" in caplog.text

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (
                lambda run: {"shared": {**run.shared, first(run): torch.zeros(2, 2)}},
                r"with the shape \(2, 2\), where \(4, ",
            ),
            (
                lambda run: {"shared": {**run.shared, "x": torch.zeros(2)}},
                "holds 'x', which the base model has no place for",
            ),
            (lambda run: {"shared": without(run.shared, first(run))}, "The shared part lacks 'base_model"),
            (lambda run: {"shared": {key: t + 1 for key, t in run.shared.items()}}, "not those after round 2"),
            (lambda run: {"shared": {key: t * torch.nan for key, t in run.shared.items()}}, "NaN or infinite"),
            (lambda run: {"clients": {"../x": 1}}, "cannot name a folder"),
            (lambda run: {"clients": {"x": -1}}, "`num_examples` is -1"),
            (lambda run: {"rounds": [{**entry, "losses": {}} for entry in run.rounds]}, "`losses` are not those"),
        ],
        ids=["shape", "one more", "one less", "other round", "NaN", "id", "rows", "history"],
    )
    def test_what_cannot_be_right_replaces_nothing(self, run, tmp_path, change, message):
        run.save_server(tmp_path)
        before = contents(tmp_path)
        with pytest.raises(ValueError, match=message):
            run.save_server(tmp_path, **change(run))
        assert contents(tmp_path) == before
        assert not list(tmp_path.glob(".*"))


def first(run):
    return min(run.shared)


def without(tensors, *keys):
    return {key: tensor for key, tensor in tensors.items() if key not in keys}


def kept(rounds, folder):
    """The history of a server: rounds stay as they were recorded."""
    path = folder / "history.json"
    before = json.loads(path.read_text()) if path.exists() else []
    rounds = [*before, rounds[-1]]
    path.write_text(json.dumps(rounds))
    return rounds


class TestClientsHalf:
    def test_others_stay_as_they_are(self, run, tmp_path):
        run.save_server(tmp_path)
        run.save_client(tmp_path, "shop")
        assert list_clients(tmp_path) == read_saved(tmp_path).client_ids == ["shop"]
        before = weights(tmp_path, "shop").read_bytes()
        run.save_client(tmp_path, "bank")
        assert read_saved(tmp_path).client_ids == ["bank", "shop"]
        assert weights(tmp_path, "shop").read_bytes() == before

    def test_lines_of_rounds_that_came_later_stay(self, run, tmp_path):
        run.save_server(tmp_path)
        lines = (tmp_path / "rounds.jsonl").read_text()
        later = {**json.loads(lines.splitlines()[-1]), "bytes_up": 987654321}
        (tmp_path / "rounds.jsonl").write_text(f"{lines}{json.dumps(later)}\n")
        run.save_client(tmp_path, "bank")
        assert len((tmp_path / "rounds.jsonl").read_text().splitlines()) == 4
        card = (tmp_path / "README.md").read_text()
        assert "in 3 rounds of" in card
        assert "987,654,321" not in card

    def test_a_in_the_dtype_of_training_is_that_of_the_folder(self, run, tmp_path):
        run.save_server(tmp_path)
        halved = {key: tensor.bfloat16() for key, tensor in run.shared.items()}
        local = {key: tensor.bfloat16() for key, tensor in run.local("bank").items()}
        run.save_client(tmp_path, "bank", shared=halved, local=local)
        found = load_file(weights(tmp_path, "bank"))
        assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
        assert read_saved(tmp_path).client_ids == ["bank"]
        halved[first(run)] = halved[first(run)] * 1.01
        with pytest.raises(ValueError, match="The A of 'bank' is not that in"):
            run.save_client(tmp_path, "bank", shared=halved, local=local)

    def test_a_client_of_no_federation_is_refused(self, run, tmp_path):
        run.save_server(tmp_path)
        with pytest.raises(ValueError, match="has no client 'gym'. Its clients are: bank, clinic, shop"):
            save_client_half(tmp_path, "gym", shared=run.shared, local=run.local("bank"))

    def test_the_a_of_another_round_is_refused_and_replaces_nothing(self, run, tmp_path):
        run.save_server(tmp_path)
        before = contents(tmp_path)
        with pytest.raises(ValueError, match="The A of 'bank' is not that in .* differs"):
            run.save_client(tmp_path, "bank", shared=open_shared(run.start)[0])
        with pytest.raises(ValueError, match="The A of 'bank' lacks 'base_model"):
            run.save_client(tmp_path, "bank", shared=without(run.shared, first(run)))
        assert contents(tmp_path) == before

    @pytest.mark.parametrize("kind", KINDS)
    def test_whatever_is_missing_is_named(self, runs, kind, tmp_path):
        run = runs(kind)
        run.save_server(tmp_path)
        local = run.local("bank")
        for key in local:
            name = "lacks the constants|other constants" if key.startswith("base_model.vera_") else "lacks '"
            with pytest.raises(ValueError, match=f"`local` of 'bank' (has )?({name})"):
                run.save_client(tmp_path, "bank", local=without(local, key))
        assert list_clients(tmp_path) == []

    def test_what_does_not_belong_there_is_refused(self, runs, tmp_path):
        run = runs("vera")
        run.save_server(tmp_path)
        local = run.local("bank")
        with pytest.raises(ValueError, match="which is shared"):
            run.save_client(tmp_path, "bank", local={**local, **run.shared})
        with pytest.raises(ValueError, match="is no factor of the adapter kind"):
            run.save_client(tmp_path, "bank", local={**local, "base_model.model.x.weight": torch.zeros(2)})
        with pytest.raises(ValueError, match="NaN or infinite"):
            run.save_client(
                tmp_path,
                "bank",
                local={k: t if "vera_A" in k or "vera_B" in k else t * torch.nan for k, t in local.items()},
            )
        changed = {key: tensor + ("vera_A" in key) for key, tensor in local.items()}
        with pytest.raises(ValueError, match="has other constants than the federation, such as vera_A, vera_B"):
            run.save_client(tmp_path, "bank", local=changed)

    def test_heads_that_are_shared_come_with_a(self, base_dir, tmp_path):
        run = train(tmp_path / "run", base_dir, "dora", share_modules_to_save=True)
        assert any("lm_head" in key for key in run.shared)
        run.save(tmp_path / "halves")
        assert read_saved(tmp_path / "halves").client_ids == list(CLIENTS)

    def test_a_file_that_changed_since_is_refused_on_loading(self, run, tmp_path):
        run.save(tmp_path)
        save_file(load_file(weights(tmp_path, "bank")), weights(tmp_path, "clinic"), metadata={"format": "pt"})
        with pytest.raises(ValueError, match="clinic.*is not the file that federation.json lists"):
            load_personalized_model(tmp_path, "clinic")
