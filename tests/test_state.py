"""What survives a round: client stores, atomic files, and checkpoints that are whole."""

import json
import os

import pytest
import torch
from conftest import max_difference
from safetensors.torch import load_file

from hf_fedsa import files
from hf_fedsa.checkpoint import (
    STATE_FOLDER,
    CheckpointError,
    RunState,
    check_manifest,
    check_same_federation,
    delete_older_checkpoints,
    make_room,
    newest_whole_checkpoint,
    remove_replaced,
    restore_replaced,
    write_manifest,
)
from hf_fedsa.client.store import ClientStoreError, DiskClientStore, MemoryClientStore
from hf_fedsa.files import file_sha256, validate_client_ids, write_json, write_safetensors, write_text


def make_tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "layers.0.q_proj.lora_B.weight": torch.randn(6, 4, generator=generator),
        "layers.0.v_proj.lora_B.weight": torch.randn(6, 4, generator=generator).to(torch.bfloat16),
        "step": torch.tensor(3 + seed),
    }


def make_store(kind: str, directory):
    return MemoryClientStore() if kind == "memory" else DiskClientStore(directory / "clients")


@pytest.fixture(params=["memory", "disk"])
def store(request, tmp_path):
    return make_store(request.param, tmp_path)


def assert_identical(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for key in first:
        assert first[key].dtype == second[key].dtype
        assert first[key].shape == second[key].shape
        one, other = (tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (first[key], second[key]))
        assert torch.equal(one, other)


class TestClientStore:
    def test_tensors_come_back_bit_for_bit(self, store):
        tensors = make_tensors()
        store.put("client_0", tensors)
        assert_identical(store.get("client_0"), tensors)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
    def test_the_odd_values_of_a_dtype_survive(self, store, dtype):
        tiny = torch.finfo(dtype).tiny
        tensors = {"a": torch.tensor([0.0, -0.0, tiny, tiny / 4, float("inf"), float("nan"), 1 / 3], dtype=dtype)}
        store.put("client_0", tensors)
        assert_identical(store.get("client_0"), tensors)

    def test_scalars_empty_tensors_and_views_survive(self, store):
        stacked = torch.randn(2, 3, 4)
        tensors = {
            "scalar": torch.tensor(1.5),
            "empty": torch.zeros(0, 3),
            "transposed": torch.randn(4, 3).T,
            "first": stacked[0],
            "second": stacked[1],
        }
        store.put("client_0", tensors)
        assert_identical(store.get("client_0"), tensors)

    def test_a_client_may_have_no_tensors(self, store):
        store.put("client_0", {})
        assert "client_0" in store
        assert store.get("client_0") == {}

    def test_parameters_come_back_as_plain_tensors(self, store):
        store.put("client_0", {"a": torch.nn.Parameter(torch.ones(2))})
        tensor = store.get("client_0")["a"]
        assert not tensor.requires_grad
        assert tensor.tolist() == [1.0, 1.0]

    def test_what_was_put_can_change_after(self, store):
        tensors = make_tensors()
        store.put("client_0", tensors)
        for tensor in tensors.values():
            tensor.fill_(9)
        assert_identical(store.get("client_0"), make_tensors())

    def test_what_was_got_can_change_after(self, store):
        store.put("client_0", make_tensors())
        for tensor in store.get("client_0").values():
            tensor.fill_(9)
        assert_identical(store.get("client_0"), make_tensors())

    def test_clients_are_kept_apart(self, store):
        for seed in range(3):
            store.put(f"client_{seed}", make_tensors(seed))
        for seed in range(3):
            assert_identical(store.get(f"client_{seed}"), make_tensors(seed))

    def test_the_last_put_counts(self, store):
        store.put("client_0", make_tensors(0))
        store.put("client_0", {"other": torch.ones(1)})
        assert_identical(store.get("client_0"), {"other": torch.ones(1)})

    def test_a_missing_client_is_named(self, store):
        store.put("client_0", make_tensors())
        with pytest.raises(ClientStoreError, match="No tensors are stored for client 'client_1'"):
            store.get("client_1")

    def test_it_knows_whom_it_holds(self, store):
        assert "client_0" not in store
        store.put("client_0", make_tensors())
        assert "client_0" in store
        assert "client" not in store
        assert "client_1" not in store

    def test_clients_come_sorted(self, store):
        ids = ["b", "client_10", "client_2", "a.safetensors", "Z", "a"]
        for client_id in ids:
            store.put(client_id, make_tensors())
        assert list(store) == sorted(ids)

    def test_a_fresh_store_is_empty(self, store):
        assert list(store) == []

    def test_clear_forgets_everyone(self, store):
        store.clear()
        for seed in range(3):
            store.put(f"client_{seed}", make_tensors(seed))
        store.clear()
        assert list(store) == []
        assert "client_0" not in store
        with pytest.raises(ClientStoreError):
            store.get("client_0")
        store.put("client_0", make_tensors(7))
        assert_identical(store.get("client_0"), make_tensors(7))

    def test_clients_may_leave_while_it_is_walked(self, store):
        for seed in range(3):
            store.put(f"client_{seed}", make_tensors(seed))
        for client_id in store:
            store.put(client_id, {"a": torch.zeros(1)})
            store.put(f"{client_id}_new", {"a": torch.zeros(1)})
        assert len(list(store)) == 6


class TestDiskClientStore:
    def test_another_process_finds_the_clients_again(self, tmp_path):
        DiskClientStore(tmp_path).put("client_0", make_tensors())
        again = DiskClientStore(str(tmp_path))
        assert list(again) == ["client_0"]
        assert_identical(again.get("client_0"), make_tensors())

    def test_a_client_is_one_stock_safetensors_file(self, tmp_path):
        DiskClientStore(tmp_path).put("client_0", make_tensors())
        assert [path.name for path in tmp_path.iterdir()] == ["client_0.safetensors"]
        assert max_difference(load_file(tmp_path / "client_0.safetensors"), make_tensors()) == 0.0

    def test_a_missing_file_is_named(self, tmp_path):
        path = tmp_path / "client_0.safetensors"
        with pytest.raises(ClientStoreError, match=f"client 'client_0': {path} is missing.*Resume from a checkpoint"):
            DiskClientStore(tmp_path).get("client_0")

    @pytest.mark.parametrize("keep", [0, 1, 7, 40, -1], ids=lambda keep: f"{keep}_bytes")
    def test_a_truncated_file_is_a_store_error(self, tmp_path, keep):
        store = DiskClientStore(tmp_path)
        store.put("client_0", make_tensors())
        path = tmp_path / "client_0.safetensors"
        path.write_bytes(path.read_bytes()[:keep])
        with pytest.raises(ClientStoreError, match="client 'client_0' in .*cannot be read.*Resume from a checkpoint"):
            store.get("client_0")

    @pytest.mark.parametrize("content", [b"not safetensors at all", b"\xff" * 64, b"\x02" + b"\x00" * 7 + b"[]"])
    def test_a_garbled_file_is_a_store_error(self, tmp_path, content):
        store = DiskClientStore(tmp_path)
        (tmp_path / "client_0.safetensors").write_bytes(content)
        with pytest.raises(ClientStoreError, match="client 'client_0' in .*cannot be read"):
            store.get("client_0")

    def test_a_damaged_client_does_not_harm_the_others(self, tmp_path):
        store = DiskClientStore(tmp_path)
        store.put("client_0", make_tensors(0))
        store.put("client_1", make_tensors(1))
        (tmp_path / "client_0.safetensors").write_bytes(b"")
        assert_identical(store.get("client_1"), make_tensors(1))
        store.put("client_0", make_tensors(2))
        assert_identical(store.get("client_0"), make_tensors(2))

    def test_left_over_temporary_files_are_no_clients(self, tmp_path):
        store = DiskClientStore(tmp_path)
        store.put("client_0", make_tensors())
        (tmp_path / ".client_1.safetensors.abc.tmp").write_bytes(b"half")
        (tmp_path / ".client_2.safetensors").write_bytes(b"half")
        (tmp_path / "notes.txt").write_text("mine")
        assert list(store) == ["client_0"]

    def test_clear_leaves_other_files_alone(self, tmp_path):
        store = DiskClientStore(tmp_path)
        store.put("client_0", make_tensors())
        (tmp_path / "notes.txt").write_text("mine")
        store.clear()
        assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]

    def test_a_put_that_fails_keeps_the_old_tensors(self, tmp_path, monkeypatch):
        store = DiskClientStore(tmp_path)
        store.put("client_0", make_tensors(0))

        def disk_full(tensors, name, metadata):
            with open(name, "wb") as file:
                file.write(b"half of it")
            raise OSError("No space left on device")

        monkeypatch.setattr(files, "save_file", disk_full)
        for client_id in ("client_0", "client_1"):
            with pytest.raises(OSError, match="No space left"):
                store.put(client_id, make_tensors(1))
        assert [path.name for path in tmp_path.iterdir()] == ["client_0.safetensors"]
        assert_identical(store.get("client_0"), make_tensors(0))


class TestAtomicFiles:
    WRITERS = {
        "text": lambda path: write_text(path, "new"),
        "json": lambda path: write_json(path, {"new": 1}),
        "safetensors": lambda path: write_safetensors(path, make_tensors()),
    }
    all_writers = pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)

    @pytest.fixture
    def target(self, tmp_path):
        path = tmp_path / "folder" / "file"
        path.parent.mkdir()
        path.write_bytes(b"old")
        return path

    @all_writers
    def test_the_new_file_takes_the_place_of_the_old(self, target, write):
        write(target)
        assert b"old" not in target.read_bytes()
        assert [path.name for path in target.parent.iterdir()] == ["file"]

    @all_writers
    def test_a_reader_sees_the_old_file_until_the_new_is_whole(self, target, write, monkeypatch):
        seen = []
        replace = os.replace

        def look(source, destination):
            seen.append((target.read_bytes(), os.path.getsize(source) > 0, os.path.dirname(source)))
            replace(source, destination)

        monkeypatch.setattr(os, "replace", look)
        write(target)
        # A rename is atomic only within a file system, so the temporary file stands beside its target.
        assert seen == [(b"old", True, str(target.parent))]

    @all_writers
    @pytest.mark.parametrize("step", ["fsync", "chmod", "replace"])
    def test_a_failing_write_leaves_the_old_file_alone(self, target, write, step, monkeypatch):
        def fail(*args):
            raise OSError("Input/output error")

        monkeypatch.setattr(os, step, fail)
        with pytest.raises(OSError, match="Input/output error"):
            write(target)
        assert target.read_bytes() == b"old"
        assert [path.name for path in target.parent.iterdir()] == ["file"]

    def test_an_interrupt_leaves_no_temporary_file(self, target, monkeypatch):
        def interrupt(*args):
            raise KeyboardInterrupt

        monkeypatch.setattr(os, "replace", interrupt)
        with pytest.raises(KeyboardInterrupt):
            write_text(target, "new")
        assert [path.name for path in target.parent.iterdir()] == ["file"]

    def test_text_that_cannot_be_encoded_leaves_the_old_file_alone(self, target):
        with pytest.raises(UnicodeEncodeError):
            write_text(target, "new \ud800")
        assert target.read_bytes() == b"old"
        assert [path.name for path in target.parent.iterdir()] == ["file"]

    def test_a_value_that_is_no_json_leaves_the_old_file_alone(self, target):
        with pytest.raises(TypeError):
            write_json(target, {"a": object()})
        assert target.read_bytes() == b"old"

    @all_writers
    def test_folders_are_made(self, target, write):
        path = target.parent / "fresh"
        write(path)
        assert path.is_file()

    def test_deep_folders_are_made(self, tmp_path):
        write_text(tmp_path / "a" / "b" / "file", "x")
        assert (tmp_path / "a" / "b" / "file").read_text() == "x"

    @pytest.mark.skipif(os.name != "posix", reason="file modes are POSIX")
    @all_writers
    def test_others_may_read_the_file_as_the_umask_says(self, target, write):
        previous = os.umask(0o027)
        try:
            write(target)
            assert target.stat().st_mode & 0o777 == 0o640
            assert os.umask(0o027) == 0o027
        finally:
            os.umask(previous)

    def test_json_reads_back_and_is_sorted(self, tmp_path):
        write_json(tmp_path / "a.json", {"b": [1, 2.5], "a": {"ü": None}})
        text = (tmp_path / "a.json").read_text(encoding="utf-8")
        assert json.loads(text) == {"b": [1, 2.5], "a": {"ü": None}}
        assert text.index('"a"') < text.index('"b"')

    def test_safetensors_read_back(self, tmp_path):
        write_safetensors(tmp_path / "a.safetensors", make_tensors())
        assert_identical(load_file(tmp_path / "a.safetensors"), make_tensors())

    def test_the_digest_of_a_file_is_that_of_its_bytes(self, tmp_path):
        (tmp_path / "a").write_bytes(b"abc")
        assert file_sha256(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        (tmp_path / "a").write_bytes(b"a" * 1_000_000)
        assert file_sha256(tmp_path / "a") == "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0"


class TestClientIds:
    def test_ordinary_ids_pass(self):
        validate_client_ids(["client_0", "client_10", "Hospital-A", "v1.2", "0", "x" * 96, "a..b"])

    @pytest.mark.parametrize(
        "client_id",
        [
            "",
            " ",
            "a b",
            ".",
            "..",
            "../x",
            "..\\x",
            ".hidden",
            "a/b",
            "/a",
            "a\\b",
            "C:a",
            "-a",
            "_a",
            "a\n",
            "a\0",
            "a*",
            "~a",
            "x" * 97,
            "klinik_münchen",
            "客户",
            "١",
        ],
    )
    def test_an_id_that_cannot_name_a_folder_is_refused(self, client_id):
        with pytest.raises(ValueError, match="cannot name a folder. Use up to 96 letters") as error:
            validate_client_ids(["client_0", client_id])
        assert repr(client_id) in str(error.value)

    @pytest.mark.parametrize("client_id", [0, None, b"a", ("a",)])
    def test_an_id_must_be_text(self, client_id):
        with pytest.raises(TypeError, match=f"must be strings, got .* of type {type(client_id).__name__}"):
            validate_client_ids(["client_0", client_id])

    def test_ids_may_not_differ_in_case_only(self):
        with pytest.raises(ValueError, match="'Client_0' and 'client_0' differ in case only"):
            validate_client_ids(["Client_0", "client_1", "client_0"])


class TestRunState:
    def test_it_survives_json(self):
        run = RunState(rounds_done=3, losses={"a": [1.5, 2]}, last_round={"a": 2}, history=[{"round": 0}])
        assert RunState(**json.loads(json.dumps(run.to_dict()))) == run

    def test_two_states_share_nothing(self):
        first, second = RunState(), RunState()
        first.losses["a"] = [1.0, 1]
        first.last_round["a"] = 0
        first.history.append({})
        assert second == RunState()

    def test_a_dictionary_of_it_does_not_follow_the_state(self):
        run = RunState(losses={"a": [1.0, 1]})
        saved = run.to_dict()
        run.losses["a"][0] = 5.0
        assert saved["losses"] == {"a": [1.0, 1]}


def make_checkpoint(path):
    (path / STATE_FOLDER / "clients").mkdir(parents=True)
    (path / "trainer_state.json").write_text('{"global_step": 4}')
    (path / STATE_FOLDER / "clients" / "client_0.safetensors").write_bytes(b"0123456789")
    (path / STATE_FOLDER / "state.json").write_text("{}")
    write_manifest(path)
    return path


FILES = ["trainer_state.json", f"{STATE_FOLDER}/state.json", f"{STATE_FOLDER}/clients/client_0.safetensors"]


def truncate_manifest(checkpoint) -> None:
    path = checkpoint / STATE_FOLDER / "manifest.json"
    path.write_bytes(path.read_bytes()[:-20])


class TestManifest:
    def test_a_whole_checkpoint_passes(self, tmp_path):
        check_manifest(make_checkpoint(tmp_path))

    def test_it_may_be_moved(self, tmp_path):
        check_manifest(make_checkpoint(tmp_path / "old").rename(tmp_path / "new"))

    def test_every_file_is_listed(self, tmp_path):
        make_checkpoint(tmp_path)
        assert sorted(json.loads((tmp_path / STATE_FOLDER / "manifest.json").read_text())) == sorted(FILES)

    @pytest.mark.parametrize("name", FILES)
    def test_a_missing_file_is_named(self, tmp_path, name):
        (make_checkpoint(tmp_path) / name).unlink()
        with pytest.raises(CheckpointError, match=f"is damaged: {name} is missing. Resume from an earlier"):
            check_manifest(tmp_path)

    @pytest.mark.parametrize("name", FILES)
    def test_a_truncated_file_is_named(self, tmp_path, name):
        path = make_checkpoint(tmp_path) / name
        size = path.stat().st_size
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(
            CheckpointError, match=rf"is damaged: {name} is not the file .*\({size - 1} bytes, {size} expected\)"
        ):
            check_manifest(tmp_path)

    @pytest.mark.parametrize("name", FILES)
    def test_a_flipped_bit_is_found(self, tmp_path, name):
        path = make_checkpoint(tmp_path) / name
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=f"is damaged: {name} is not the file that was written"):
            check_manifest(tmp_path)

    def test_without_a_manifest_it_was_never_finished(self, tmp_path):
        (make_checkpoint(tmp_path) / STATE_FOLDER / "manifest.json").unlink()
        with pytest.raises(
            CheckpointError, match=f"not a finished checkpoint.*{STATE_FOLDER}/manifest.json is missing"
        ):
            check_manifest(tmp_path)

    def test_a_truncated_manifest_is_a_checkpoint_error(self, tmp_path):
        truncate_manifest(make_checkpoint(tmp_path))
        with pytest.raises(CheckpointError, match="manifest.json"):
            check_manifest(tmp_path)

    def test_a_manifest_can_be_written_again(self, tmp_path):
        make_checkpoint(tmp_path)
        (tmp_path / "trainer_state.json").write_text('{"global_step": 5}')
        write_manifest(tmp_path)
        check_manifest(tmp_path)


class TestNewestCheckpoint:
    @pytest.fixture
    def output_dir(self, tmp_path):
        for step in (2, 10, 9):
            make_checkpoint(tmp_path / f"checkpoint-{step}")
        return tmp_path

    def test_the_highest_step_counts(self, output_dir):
        warnings = []
        assert newest_whole_checkpoint(output_dir, warn=warnings.append) == output_dir / "checkpoint-10"
        assert warnings == []

    def test_damaged_ones_are_passed_over_with_a_warning(self, output_dir):
        (output_dir / "checkpoint-10" / "trainer_state.json").unlink()
        (output_dir / "checkpoint-9" / STATE_FOLDER / "manifest.json").unlink()
        warnings = []
        assert newest_whole_checkpoint(output_dir, warn=warnings.append) == output_dir / "checkpoint-2"
        assert len(warnings) == 2
        assert "Passing over" in warnings[0] and "checkpoint-10" in warnings[0] and "trainer_state.json" in warnings[0]
        assert "Passing over" in warnings[1] and "checkpoint-9" in warnings[1] and "manifest.json" in warnings[1]

    def test_a_truncated_manifest_is_passed_over(self, output_dir):
        truncate_manifest(output_dir / "checkpoint-10")
        warnings = []
        assert newest_whole_checkpoint(output_dir, warn=warnings.append) == output_dir / "checkpoint-9"
        assert len(warnings) == 1

    def test_none_is_left_if_all_are_damaged(self, output_dir):
        for step in (2, 9, 10):
            (output_dir / f"checkpoint-{step}" / "trainer_state.json").write_text("")
        warnings = []
        assert newest_whole_checkpoint(output_dir, warn=warnings.append) is None
        assert len(warnings) == 3

    def test_other_names_are_no_checkpoints(self, tmp_path):
        for name in ("checkpoint-5.tmp", "checkpoint-", "checkpoint-x", "my-checkpoint-7", "shared"):
            make_checkpoint(tmp_path / name)
        (tmp_path / "checkpoint-8").write_text("a file")
        warnings = []
        assert newest_whole_checkpoint(tmp_path, warn=warnings.append) is None
        assert warnings == []

    def test_a_folder_that_is_not_there_has_none(self, tmp_path):
        assert newest_whole_checkpoint(tmp_path / "absent", warn=pytest.fail) is None


class TestReplacing:
    """A checkpoint that is written where another one of its step lies."""

    @pytest.fixture
    def checkpoint(self, tmp_path):
        return make_checkpoint(tmp_path / "checkpoint-9")

    def newest(self, checkpoint):
        return newest_whole_checkpoint(checkpoint.parent, warn=lambda message: None)

    def test_a_finished_one_is_found_until_the_new_one_is_whole(self, checkpoint):
        make_room(checkpoint)
        assert not checkpoint.exists()
        assert (old := self.newest(checkpoint)) is not None
        checkpoint.mkdir()
        (checkpoint / "half").write_text("")
        assert self.newest(checkpoint) == old
        make_room(checkpoint)  # Of what was not finished nothing is kept.
        assert self.newest(checkpoint) == old
        make_checkpoint(checkpoint)
        assert self.newest(checkpoint) == checkpoint
        remove_replaced(checkpoint)
        assert list(checkpoint.parent.iterdir()) == [checkpoint]

    def test_one_that_could_not_be_written_leaves_the_old_one_in_place(self, checkpoint):
        make_room(checkpoint)
        checkpoint.mkdir()
        restore_replaced(checkpoint)
        assert list(checkpoint.parent.iterdir()) == [checkpoint]
        check_manifest(checkpoint)

    def test_one_that_could_not_be_begun_leaves_the_old_one_in_place(self, checkpoint):
        restore_replaced(checkpoint)
        check_manifest(checkpoint)

    def test_nothing_is_needed_where_nothing_is(self, tmp_path):
        for change in (make_room, remove_replaced, restore_replaced):
            change(tmp_path / "checkpoint-1")
        assert not list(tmp_path.iterdir())


class TestDeletingOlder:
    @pytest.mark.parametrize(
        ("there", "newest", "limit", "left"),
        [
            ([2, 4, 10], 10, 1, {10}),
            ([2, 4, 10], 10, 2, {4, 10}),
            ([2, 4, 10], 10, None, {2, 4, 10}),
            ([2, 4, 10], 10, 0, {2, 4, 10}),
            ([2, 4], 4, 5, {2, 4}),
            # Of another run, which went further.
            ([3, 6, 50], 6, 1, {6}),
            ([3, 6, 50, 40], 6, 2, {3, 6}),
        ],
    )
    def test_steps_count_and_not_the_clock(self, tmp_path, there, newest, limit, left):
        for step in there:
            (tmp_path / f"checkpoint-{step}").mkdir()
            os.utime(tmp_path / f"checkpoint-{step}", (0, 10**9 - step))
        (tmp_path / "checkpoint-x").mkdir()
        delete_older_checkpoints(tmp_path / f"checkpoint-{newest}", limit)
        assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-x", *(f"checkpoint-{step}" for step in left)}

    def test_what_a_crash_left_of_a_replacement_counts(self, tmp_path):
        for name in ("checkpoint-3.replaced", "checkpoint-3", "checkpoint-6"):
            (tmp_path / name).mkdir()
        delete_older_checkpoints(tmp_path / "checkpoint-6", 1)
        assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-6"]


class TestSameFederation:
    CURRENT = {"clients": ["a", "b"], "method": "lora", "base_model": "tiny"}

    def test_the_same_passes(self, tmp_path):
        check_same_federation(dict(self.CURRENT), self.CURRENT, tmp_path)

    @pytest.mark.parametrize(
        "key, value", [("clients", ["a", "c"]), ("method", "dora"), ("base_model", None)], ids=lambda v: str(v)
    )
    def test_the_difference_is_named(self, tmp_path, key, value):
        with pytest.raises(CheckpointError) as error:
            check_same_federation({**self.CURRENT, key: value}, self.CURRENT, tmp_path)
        assert f"its `{key}` is {value!r}, this run's is {self.CURRENT[key]!r}" in str(error.value)
        assert str(tmp_path) in str(error.value)

    def test_what_an_older_checkpoint_lacks_is_a_difference(self, tmp_path):
        saved = {key: value for key, value in self.CURRENT.items() if key != "method"}
        with pytest.raises(CheckpointError, match="its `method` is None, this run's is 'lora'"):
            check_same_federation(saved, self.CURRENT, tmp_path)

    def test_a_long_value_is_cut(self, tmp_path):
        many = [f"client_{i}" for i in range(1000)]
        with pytest.raises(CheckpointError) as error:
            check_same_federation({"clients": many[:-1]}, {"clients": many}, tmp_path)
        assert len(str(error.value)) < 1000
        assert "client_0" in str(error.value)

    def test_a_checkpoint_error_is_a_value_error(self):
        assert issubclass(CheckpointError, ValueError)
