"""A federation's folder: old or new at every instant, and nothing but its own files."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys

import inside
import pytest
import torch
from conftest import make_args, make_lora, make_model, make_rows, make_tokenizer
from peft import PeftConfig
from safetensors.torch import load_file
from transformers import AutoTokenizer, TrainerCallback

from hf_fedsa import FederatedTrainer, load_personalized_model
from hf_fedsa.hub.folder import read_saved
from hf_fedsa.hub.processing_files import is_known_processing_file
from hf_fedsa.hub.whole_folder import locate, saving


class Killed(BaseException):
    pass


@contextlib.contextmanager
def killed_at(monkeypatch, rename):
    """Dies before the rename of this number, with nothing cleaned up. Yields whether there was one."""
    replace, count, died = os.replace, [0], []

    def die(source, target):
        if died or count[0] == rename:
            died.append(True)
            raise Killed
        count[0] += 1
        replace(source, target)

    def keep(path, **kwargs):
        return None if died else rmtree(path, **kwargs)

    rmtree = shutil.rmtree
    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", die)
        patched.setattr(os, "fsync", lambda handle: None)
        patched.setattr(shutil, "rmtree", keep)
        with contextlib.suppress(Killed):
            yield died


def write(directory, version, config="same"):
    with saving(directory) as scratch:
        for name in ("clients/a", "clients/b", "shared"):
            (scratch / name).mkdir(parents=True)
            (scratch / name / "adapter_model.safetensors").write_text(version)
            (scratch / name / "adapter_config.json").write_text(config)
        for name in ("federation.json", "rounds.jsonl", "tokenizer.json"):
            (scratch / name).write_text(version)


FILES = [
    *(f"{name}/adapter_model.safetensors" for name in ("clients/a", "clients/b", "shared")),
    "federation.json",
    "rounds.jsonl",
    "tokenizer.json",
]


def versions(directory):
    return {locate(directory, name).read_text() for name in FILES}


class TestKilledWhileSaving:
    @pytest.fixture(autouse=True)
    def no_waiting_for_the_disk(self, monkeypatch):
        monkeypatch.setattr(os, "fsync", lambda handle: None)

    @pytest.mark.parametrize("config", ["same", "other"])
    def test_it_is_the_old_federation_or_the_new_one_and_the_next_save_mends_it(self, tmp_path, monkeypatch, config):
        seen = []
        for rename in range(20):
            directory = tmp_path / str(rename)
            write(directory, "old")
            with killed_at(monkeypatch, rename) as died:
                write(directory, "new", config)
            if not died:
                break
            seen.append(versions(directory))
            assert len(seen[-1]) == 1
            for adapter in ("clients/a", "clients/b", "shared"):
                # Where stock PEFT finds a config, it is that of the weights beside it.
                weights = (directory / adapter / "adapter_model.safetensors").read_text()
                if config == "other" and (directory / adapter / "adapter_config.json").is_file():
                    found = (directory / adapter / "adapter_config.json").read_text()
                    assert (weights, found) in {("old", "same"), ("new", "other")}
            write(directory, "newest")
            assert versions(directory) == {"newest"}
            assert not list(directory.glob(".*"))
        assert seen == [{"old"}] + [{"new"}] * (len(seen) - 1)
        assert len(seen) == 10  # The rename that decides, and one for each of nine files.
        assert versions(directory) == {"new"}

    def test_and_while_the_next_save_mends_it(self, tmp_path, monkeypatch):
        write(tmp_path, "old")
        with killed_at(monkeypatch, 4):
            write(tmp_path, "new")
        with killed_at(monkeypatch, 2):
            write(tmp_path, "newest")
        assert versions(tmp_path) == {"new"}
        write(tmp_path, "newest")
        assert versions(tmp_path) == {"newest"}

    def test_an_error_leaves_the_old_one_and_no_trace(self, tmp_path):
        write(tmp_path, "old")
        with pytest.raises(ValueError, match="no"), saving(tmp_path) as scratch:
            (scratch / "federation.json").write_text("new")
            raise ValueError("no")
        assert versions(tmp_path) == {"old"}
        assert not list(tmp_path.glob(".*"))

    def test_what_dead_processes_were_writing_is_removed_and_what_others_write_is_not(self, tmp_path):
        dead = subprocess.Popen([sys.executable, "-c", ""])
        dead.wait()
        host = socket.gethostname()
        names = [f".saving.{host}-{dead.pid}.0a", ".saving.elsewhere-1.0a", ".saving.x"]
        alive = f".saving.{host}-{os.getppid()}.0a"
        for name in [*names, alive]:
            (tmp_path / name).mkdir()
            (tmp_path / name / "federation.json").write_text("half")
        write(tmp_path, "new")
        assert [path.name for path in tmp_path.glob(".*")] == [alive]
        assert versions(tmp_path) == {"new"}


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("base")
    make_model().save_pretrained(directory)
    return str(directory)


def make_trainer(base_dir, output_dir, clients=2, **kwargs):
    rows = {f"client_{i}": make_rows(4, seed=i) for i in range(clients)} if clients else make_rows(4, seed=0)
    return FederatedTrainer(
        model=base_dir,
        args=make_args(output_dir, **kwargs),
        train_dataset=rows,
        processing_class=make_tokenizer(),
        peft_config=make_lora(target_modules=["q_proj"]),
    )


class TestTrainer:
    @pytest.mark.parametrize("clients", [2, None], ids=["clients", "one_unnamed_client"])
    def test_every_client_loads_whenever_a_save_was_killed(self, base_dir, tmp_path, monkeypatch, clients):
        trainer = make_trainer(base_dir, tmp_path / "out", clients)
        trainer.save_model()
        old = read_saved(tmp_path / "out").federation["shared_sha256"]
        shutil.copytree(tmp_path / "out", tmp_path / "old")
        inside.add_to_shared(trainer, 1)
        seen, rename = [], 0
        while True:
            shutil.rmtree(tmp_path / "out")
            shutil.copytree(tmp_path / "old", tmp_path / "out")
            with killed_at(monkeypatch, rename) as died:
                trainer.save_model()
            saved = read_saved(tmp_path / "out")  # Checks the hashes of all files.
            assert sorted(saved.client_ids) == sorted(trainer.client_ids)
            seen.append(saved.federation["shared_sha256"] != old)
            a = load_file(locate(tmp_path / "out", "shared/adapter_model.safetensors"))
            for client_id in trainer.client_ids:
                adapter = load_file(locate(tmp_path / "out", f"clients/{client_id}/adapter_model.safetensors"))
                assert all(torch.equal(adapter[key], a[key]) for key in a)
                # Stock PEFT finds one client's adapter, old or new.
                stock = tmp_path / "out" / "clients" / client_id
                assert load_file(stock / "adapter_model.safetensors").keys() == adapter.keys()
                assert PeftConfig.from_pretrained(str(stock)).r == 4
            if not died:
                break
            rename += 1
        assert seen == sorted(seen)
        assert 0 < sum(seen) < len(seen)
        assert not list((tmp_path / "out").glob(".*"))

    def test_a_client_loads_from_a_save_that_was_cut_short(self, base_dir, tmp_path, monkeypatch):
        trainer = make_trainer(base_dir, tmp_path)
        trainer.save_model()
        inside.add_to_initial_local(trainer, 1)
        calls = 1
        while not list(tmp_path.glob(".saved.*")):
            with killed_at(monkeypatch, calls):
                trainer.save_model()
            calls += 1
        (tmp_path / "clients" / "client_1" / "adapter_config.json").unlink()
        shutil.copy(tmp_path / "shared" / "adapter_config.json", next(tmp_path.glob(".saved.*")) / "clients/client_1")
        model = load_personalized_model(tmp_path, "client_1")
        found = [p for name, p in model.named_parameters() if "lora_B" in name]
        assert found and all((p == 1).all() for p in found)

    def test_in_the_middle_of_a_round_it_says_whose_b_is_of_it(self, base_dir, tmp_path):
        class Save(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                trainer.save_model(tmp_path / str(state.global_step))

        trainer = make_trainer(base_dir, tmp_path / "out", num_rounds=2, local_steps=2, parallel_clients=1)
        trainer.add_callback(Save())
        trainer.train()
        found = []
        for step in range(1, 9):
            entries = read_saved(tmp_path / str(step)).federation["clients"].values()
            found.append({entry["last_round"] for entry in entries})
        assert found == [{None}, {None, 0}, {None, 0}, {0}, {0}, {0, 1}, {0, 1}, {1}]


class TestProcessingFiles:
    @pytest.mark.parametrize(
        "name",
        [
            "tokenizer.json",
            "chat_template.jinja",
            "additional_chat_templates/tool_use.jinja",
            "qformer_tokenizer/vocab.txt",
            "source.spm",
        ],
    )
    def test_those_of_transformers_are_known(self, name):
        assert is_known_processing_file(name)

    @pytest.mark.parametrize(
        "name",
        [".env", "", ".", "secrets.json", "notes.txt", "x/tokenizer.json", ".git/tokenizer.json", "a\\tokenizer.json"]
        + [
            "additional_chat_templates/.env",
            "additional_chat_templates/x.json",
            "additional_chat_templates/../x.jinja",
        ]
        + ["training_args.bin", "/etc/tokenizer.json", "clients/tokenizer.json", "rounds.jsonl"],
    )
    def test_others_are_not(self, name):
        assert not is_known_processing_file(name)

    def test_what_a_tokenizer_saves_is_known(self, tmp_path):
        tokenizer = make_tokenizer()
        tokenizer.chat_template = {"default": "a", "tool_use": "b"}
        tokenizer.save_pretrained(tmp_path)
        names = [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()]
        assert "additional_chat_templates/tool_use.jinja" in names
        assert all(map(is_known_processing_file, names))
        assert AutoTokenizer.from_pretrained(tmp_path).chat_template == tokenizer.chat_template

    def test_those_of_a_tokenizer_of_the_users_are_saved_and_pushed_by_its_trainer(self, hub, base_dir, tmp_path):
        class WithWords(type(make_tokenizer())):
            def save_pretrained(self, directory, **kwargs):
                super().save_pretrained(directory, **kwargs)
                with open(os.path.join(directory, "my_words.lst"), "w") as file:
                    file.write("words")

        trainer = make_trainer(base_dir, tmp_path, hub_base_model="me/base")
        trainer.processing_class.__class__ = WithWords
        trainer.push_to_hub("me/fed", clients="none")
        assert hub.files("me/fed")["my_words.lst"] == b"words"
        assert "my_words.lst" in json.loads((tmp_path / "federation.json").read_text())["processing_files"]
