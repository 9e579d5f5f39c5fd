"""Clients' tensors as files: whole whatever happens, shared by processes, and apart from what others put there."""

import os
import shutil
import signal
from pathlib import Path

import pytest
from conftest import max_difference
from safetensors.torch import load_file
from test_store import assert_identical, make_tensors

from hf_fedsa import files
from hf_fedsa.client.store import BEFORE, ClientStoreError, DiskClientStore


class TestDiskClientStore:
    @pytest.fixture
    def store(self, tmp_path):
        return DiskClientStore(tmp_path)

    def names(self, store):
        return sorted(str(p.relative_to(store.directory)) for p in store.directory.rglob("*") if p.is_file())

    def test_another_process_finds_the_clients_again(self, store):
        store.put("client_0", 3, make_tensors())
        again = DiskClientStore(str(store.directory))
        assert list(again) == ["client_0"]
        assert again.rounds("client_0") == [3]
        assert_identical(again.get("client_0", 3), make_tensors())

    def test_a_round_is_one_stock_safetensors_file(self, store):
        for round_index in (BEFORE, 10):
            store.put("client_0", round_index, make_tensors())
        assert self.names(store) == ["client_0/before.safetensors", "client_0/round-10.safetensors"]
        assert store.path("client_0", 10) == store.directory / "client_0" / "round-10.safetensors"
        assert max_difference(load_file(store.path("client_0", BEFORE)), make_tensors()) == 0.0

    def test_a_missing_file_is_named(self, store):
        for round_index, name in ((2, "round-2"), (BEFORE, "before")):
            path = store.directory / "client_0" / f"{name}.safetensors"
            with pytest.raises(ClientStoreError, match=f"client 'client_0': {path} is missing.*Resume from a checkp"):
                store.get("client_0", round_index)

    @pytest.mark.parametrize("keep", [0, 1, 7, 40, -1], ids=lambda keep: f"{keep}_bytes")
    def test_a_truncated_file_is_a_store_error(self, store, keep):
        store.put("client_0", 2, make_tensors())
        path = store.path("client_0", 2)
        path.write_bytes(path.read_bytes()[:keep])
        with pytest.raises(
            ClientStoreError, match=f"client 'client_0' in {path} cannot be read.*Resume from a checkpoint"
        ):
            store.get("client_0", 2)

    @pytest.mark.parametrize("content", [b"not safetensors at all", b"\xff" * 64, b"\x02" + b"\x00" * 7 + b"[]"])
    def test_a_garbled_file_is_a_store_error(self, store, content):
        store.put("client_0", 0, make_tensors())
        store.path("client_0", 0).write_bytes(content)
        with pytest.raises(ClientStoreError, match="client 'client_0' in .*cannot be read"):
            store.get("client_0", 0)

    def test_a_damaged_round_does_not_harm_others(self, store):
        for client_id in ("client_0", "client_1"):
            for round_index in (0, 1):
                store.put(client_id, round_index, make_tensors(round_index))
        store.path("client_0", 1).write_bytes(b"")
        assert_identical(store.get("client_0", 0), make_tensors(0))
        assert_identical(store.get("client_1", 1), make_tensors(1))
        store.put("client_0", 1, make_tensors(2))
        assert_identical(store.get("client_0", 1), make_tensors(2))

    FOREIGN = (
        "notes.txt",
        "before.safetensors",
        "client_9.safetensors",
        "empty/notes.txt",
        ".client_1/round-0.safetensors",
        "client_0/.round-7.safetensors.abc.tmp",
        "client_0/.round-8.safetensors",
        "client_0/round-7.safetensors.tmp",
        "client_0/round-07.safetensors",
        "client_0/round--1.safetensors",
        "client_0/round-.safetensors",
        "client_0/round-x.safetensors",
        "client_0/Round-7.safetensors",
        "client_0/adapter_model.safetensors",
        "client_0/round-9.safetensors/notes.txt",
        "client_2/.round-0.safetensors.abc.tmp",
    )

    def test_foreign_files_are_no_rounds_and_stay(self, store):
        for name in self.FOREIGN:
            path = store.directory / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"mine")
        for round_index in range(3):
            store.put("client_0", round_index, make_tensors())
        assert list(store) == ["client_0"]
        assert store.rounds("client_0") == [1, 2]
        for other in ("notes.txt", "empty", "client_2", "client_9.safetensors"):
            assert other not in store
        store.keep("client_0", 2)
        store.keep("empty", None)
        store.clear()
        assert self.names(store) == sorted(self.FOREIGN)

    def test_clear_leaves_no_empty_folders(self, store):
        store.put("client_0", 0, make_tensors())
        (store.directory / "notes.txt").write_text("mine")
        store.clear()
        assert [path.name for path in store.directory.iterdir()] == ["notes.txt"]

    @pytest.mark.parametrize("step", ["save_file", "replace"])
    @pytest.mark.parametrize(
        "error", [OSError("No space left on device"), KeyboardInterrupt()], ids=["full", "stopped"]
    )
    def test_a_put_that_fails_leaves_all_as_it_was(self, store, monkeypatch, step, error):
        def half(tensors, name, metadata):
            with open(name, "wb") as file:
                file.write(b"half of it")
            raise error

        def fail(*args):
            raise error

        for round_index in (1, 2):
            store.put("client_0", round_index, make_tensors(round_index))
        before = self.names(store)
        monkeypatch.setattr(*((files, "save_file", half) if step == "save_file" else (os, "replace", fail)))
        for client_id, round_index in (("client_0", 2), ("client_0", 3), ("client_1", 0)):
            with pytest.raises(type(error)):
                store.put(client_id, round_index, make_tensors(9))
        monkeypatch.undo()
        assert self.names(store) == before
        assert list(store) == ["client_0"]
        for round_index in (1, 2):
            assert_identical(store.get("client_0", round_index), make_tensors(round_index))

    @pytest.mark.skipif(os.name != "posix", reason="forks")
    @pytest.mark.parametrize("at", ["save_file", "replace", "unlink"])
    def test_a_process_killed_in_the_middle_of_a_put_leaves_whole_rounds(self, store, monkeypatch, at):
        def die(*args, **kwargs):
            os.kill(os.getpid(), signal.SIGKILL)

        def half(tensors, name, metadata):
            Path(name).write_bytes(b"half of it")
            die()

        for round_index in (1, 2):
            store.put("client_0", round_index, make_tensors(round_index))
        where, what = {"save_file": (files, half), "replace": (os, die), "unlink": (Path, die)}[at]
        child = os.fork()
        if not child:
            try:
                monkeypatch.setattr(where, at, what)
                store.put("client_0", 3, make_tensors(3))
            finally:
                os._exit(0)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
        assert store.rounds("client_0") == ([1, 2, 3] if at == "unlink" else [1, 2])
        for round_index in store.rounds("client_0"):
            assert_identical(store.get("client_0", round_index), make_tensors(round_index))
        store.put("client_0", 3, make_tensors(4))
        assert store.rounds("client_0") == [2, 3]
        assert_identical(store.get("client_0", 3), make_tensors(4))

    @pytest.mark.parametrize(
        "change",
        [
            lambda store: store.put("client_0", 3, make_tensors(3)),
            lambda store: store.keep("client_0", None),
            lambda store: store.clear(),
        ],
        ids=["put", "keep", "clear"],
    )
    def test_another_process_may_have_deleted_a_file_already(self, store, monkeypatch, change):
        for round_index in (1, 2):
            store.put("client_0", round_index, make_tensors(round_index))
        rounds = DiskClientStore.rounds

        def overtaken(self, client_id):
            found = rounds(self, client_id)
            shutil.rmtree(self.directory / client_id)
            return found

        walked = list(store)
        monkeypatch.setattr(DiskClientStore, "rounds", overtaken)
        monkeypatch.setattr(DiskClientStore, "__iter__", lambda self: iter(walked))
        change(store)
        monkeypatch.undo()
        assert list(store) == []
