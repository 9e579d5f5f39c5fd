"""The files of a checkpoint: the state of a run, whole or refused, old ones replaced or deleted."""

import json
import os

import pytest

from hf_fedsa.checkpoint import check_same_federation
from hf_fedsa.checkpoint_folder import (
    STATE_FOLDER,
    CheckpointError,
    check_manifest,
    delete_older_checkpoints,
    make_room,
    newest_whole_checkpoint,
    remove_replaced,
    restore_replaced,
    write_manifest,
)
from hf_fedsa.client.state import ClientState


class TestClientState:
    def test_it_survives_json(self):
        run = ClientState(round_index=3, losses={"a": [1.5, 2]}, counted={"a": 2}, returned=["b"])
        assert ClientState(**json.loads(json.dumps(run.to_dict()))) == run

    def test_two_states_share_nothing(self):
        first, second = ClientState(), ClientState()
        first.losses["a"] = [1.0, 1]
        first.counted["a"] = 0
        first.returned.append("a")
        assert second == ClientState()

    def test_a_dictionary_of_it_does_not_follow_the_state(self):
        run = ClientState(losses={"a": [1.0, 1]})
        saved = run.to_dict()
        run.losses["a"][0] = 5.0
        assert saved["losses"] == {"a": [1.0, 1]}


def make_checkpoint(path):
    (path / STATE_FOLDER / "clients" / "client_0").mkdir(parents=True)
    (path / "trainer_state.json").write_text('{"global_step": 4}')
    (path / STATE_FOLDER / "clients" / "client_0" / "round-0.safetensors").write_bytes(b"0123456789")
    (path / STATE_FOLDER / "state.json").write_text("{}")
    write_manifest(path)
    return path


FILES = ["trainer_state.json", f"{STATE_FOLDER}/state.json", f"{STATE_FOLDER}/clients/client_0/round-0.safetensors"]


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
