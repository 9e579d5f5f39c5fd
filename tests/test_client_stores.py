"""The stores of a run: never another run's, filled from checkpoints, and begun with what counted."""

import json
import shutil

import pytest
from test_store import assert_identical, make_tensors

from hf_fedsa.client.store import BEFORE, ClientStoreError, ClientStores
from hf_fedsa.files import write_safetensors


class Runs:
    """Makes the stores of trainers, and counts how often they ask for checkpoints."""

    def __init__(self, tmp_path, kind):
        self.tmp_path, self.kind = tmp_path, kind
        self.resumable = False
        self.asked = 0

    def nothing_to_resume(self) -> bool:
        self.asked += 1
        return not self.resumable

    def make(self, output_dir="out", directory="store", client_ids=("b", "a"), named_by_user=True, is_first=True):
        return ClientStores(
            self.tmp_path / directory if self.kind == "disk" else None,
            self.tmp_path / output_dir,
            client_ids,
            named_by_user=named_by_user,
            is_first=is_first,
        )

    def claim(self, stores, run_id, resuming=False):
        stores.claim(run_id, resuming, self.nothing_to_resume)

    def ran(self, run_id="first", finished=False, **kwargs):
        stores = self.make(**kwargs)
        self.claim(stores, run_id)
        stores.clients.put("a", 0, make_tensors())
        if finished:
            stores.mark_finished()
        return stores


@pytest.fixture
def runs(tmp_path):
    return Runs(tmp_path, "disk")


@pytest.fixture(params=["memory", "disk"])
def any_runs(request, tmp_path):
    return Runs(tmp_path, request.param)


ANOTHER = (
    "`client_store_dir=.*store'` holds the clients of another run, which this one would overwrite. Resume that run"
)


class TestClaims:
    def owner(self, runs, directory="store"):
        return json.loads((runs.tmp_path / directory / "run.json").read_text())

    def test_in_memory_there_is_nothing_to_claim(self, tmp_path):
        runs = Runs(tmp_path, "memory")
        stores = runs.ran(finished=True)
        assert stores.directory is None
        stores.check()
        runs.claim(stores, "second")
        stores.check()
        assert list(tmp_path.iterdir()) == []

    def test_an_empty_folder_is_anyones(self, runs):
        stores = runs.make()
        stores.check()
        runs.claim(stores, "first")
        stores.check()
        assert self.owner(runs) == {
            "client_ids": ["a", "b"],
            "output_dir": str((runs.tmp_path / "out").resolve()),
            "run_id": "first",
        }
        assert runs.asked == 0
        runs.claim(runs.make(output_dir="elsewhere", client_ids=["x"]), "second")

    @pytest.mark.parametrize("store", ["clients", "optimizers"])
    def test_clients_of_another_run_are_not_overwritten(self, runs, store):
        first = runs.make(client_ids=["x"])
        runs.claim(first, "first")
        getattr(first, store).put("x", 0, make_tensors())
        for resuming in (False, True):
            second = runs.make()
            with pytest.raises(ValueError, match=ANOTHER):
                runs.claim(second, "second", resuming)
            assert self.owner(runs)["run_id"] == "first"
            second.check()
        first.check()

    def test_of_a_run_that_died_before_its_first_checkpoint_the_next_one_takes_the_place(self, runs):
        runs.ran()
        runs.claim(runs.make(), "second")
        assert runs.asked == 1
        assert self.owner(runs)["run_id"] == "second"

    @pytest.mark.parametrize(
        "there",
        [{"output_dir": "other"}, {"client_ids": ["a"]}, {"finished": True}, {"resumable": True}],
        ids=lambda there: next(iter(there)),
    )
    def test_a_new_run_takes_no_other_place(self, runs, there):
        runs.resumable = there.pop("resumable", False)
        runs.ran(**there)
        with pytest.raises(ValueError, match=ANOTHER):
            runs.claim(runs.make(), "second")

    def test_of_a_finished_run_a_folder_that_nobody_named_is_taken(self, runs):
        runs.ran(finished=True, named_by_user=False)
        runs.claim(runs.make(named_by_user=False), "second")

    def test_a_run_that_resumes_takes_its_own_clients(self, runs):
        runs.resumable = True
        runs.ran(finished=True)
        runs.claim(runs.make(), "first", resuming=True)
        runs.claim(runs.make(), "of an earlier checkpoint", resuming=True)
        assert runs.asked == 0

    def test_a_run_that_has_moved_is_known_by_its_name(self, runs):
        runs.ran(output_dir="old")
        with pytest.raises(ValueError, match=ANOTHER):
            runs.claim(runs.make(output_dir="new"), "another", resuming=True)
        with pytest.raises(ValueError, match=ANOTHER):
            runs.claim(runs.make(output_dir="new"), "first")
        with pytest.raises(ValueError, match=ANOTHER):
            runs.claim(runs.make(output_dir="new", client_ids=["a"]), "first", resuming=True)
        runs.claim(runs.make(output_dir="new"), "first", resuming=True)

    def test_a_store_within_the_runs_folder_moves_with_it(self, runs):
        runs.ran(output_dir="old", directory="old/store")
        assert self.owner(runs, "old/store")["output_dir"] == ".."
        (runs.tmp_path / "old").rename(runs.tmp_path / "new")
        runs.claim(runs.make(output_dir="new", directory="new/store"), "second")

    def test_a_store_within_the_runs_folder_is_also_known_by_the_whole_path(self, runs):
        runs.ran(directory="out/store")
        owner = {**self.owner(runs, "out/store"), "output_dir": str((runs.tmp_path / "out").resolve())}
        (runs.tmp_path / "out" / "store" / "run.json").write_text(json.dumps(owner))
        runs.claim(runs.make(directory="out/store"), "second")

    def test_a_trainer_goes_on_with_its_own_clients(self, runs):
        stores = runs.ran(finished=True)
        runs.resumable = True
        for resuming in (False, True):
            runs.claim(stores, f"second_{resuming}", resuming)
            stores.check()
            assert "finished" not in self.owner(runs)
        assert runs.asked == 0

    @pytest.mark.parametrize("owner", ["gone", '{"run_id": "second"}', "{damaged", "[]", "null"])
    def test_a_trainer_does_not_go_on_with_clients_of_another(self, runs, owner):
        stores = runs.ran()
        path = runs.tmp_path / "store" / "run.json"
        if owner == "gone":
            shutil.rmtree(path.parent)
        else:
            path.write_text(owner)
        for read in (
            stores.check,
            lambda: runs.claim(stores, "next"),
            lambda: stores.get("clients", "a", 0, lambda: "Nowhere."),
            lambda: stores.save(runs.tmp_path / "checkpoint", "clients", "a", [0], lambda: "Nowhere."),
        ):
            with pytest.raises(ClientStoreError, match="is gone, or another run has used it since .*a new trainer"):
                read()
        stores.mark_finished()
        assert path.read_text() == owner if owner != "gone" else not path.exists()

    def test_a_trainer_that_resumes_brings_its_clients_back(self, runs):
        stores = runs.ran()
        shutil.rmtree(runs.tmp_path / "store")
        runs.claim(stores, "first", resuming=True)
        stores.check()

    @pytest.mark.parametrize("owner", ["{damaged", "[]", "\udcff"])
    def test_clients_of_nobody_known_are_not_overwritten(self, runs, owner):
        runs.ran()
        (runs.tmp_path / "store" / "run.json").write_bytes(owner.encode(errors="surrogateescape"))
        for resuming in (False, True):
            with pytest.raises(ValueError, match=ANOTHER):
                runs.claim(runs.make(), "first", resuming)

    def test_other_processes_claim_nothing(self, runs):
        runs.ran(client_ids=["x"])
        before = self.owner(runs)
        other = runs.make(is_first=False)
        runs.claim(other, "second")
        other.check()
        other.mark_finished()
        assert self.owner(runs) == before

    def test_the_end_of_a_run_is_noted(self, runs):
        stores = runs.ran(finished=True)
        assert self.owner(runs)["finished"] is True
        assert self.owner(runs)["client_ids"] == ["a", "b"]
        stores.check()


class TestClientStores:
    def test_clients_and_optimizers_are_kept_apart(self, any_runs):
        stores = any_runs.make()
        stores.clients.put("a", 0, make_tensors(0))
        stores.optimizers.put("a", 0, make_tensors(1))
        for seed, name in enumerate(("clients", "optimizers")):
            assert_identical(stores.get(name, "a", 0, pytest.fail), make_tensors(seed))
            if any_runs.kind == "disk":
                assert (any_runs.tmp_path / "store" / name / "a" / "round-0.safetensors").is_file()

    def test_what_is_missing_says_where_else_it_is(self, any_runs):
        stores = any_runs.make()
        message = "No tensors are stored for client 'a'.*which holds a copy. There is one."
        for read in (
            lambda: stores.get("clients", "a", 3, lambda: "There is one."),
            lambda: stores.save(any_runs.tmp_path / "c", "optimizers", "a", [3], lambda: "There is one."),
        ):
            with pytest.raises(ClientStoreError, match=message):
                read()
        assert not (any_runs.tmp_path / "c").exists()

    def test_what_is_saved_fills_other_stores(self, any_runs, tmp_path):
        stores = any_runs.make()
        saved = [("clients", "a", (BEFORE, 4)), ("clients", "b", (0, 1)), ("optimizers", "a", (4,))]
        for name, client_id, rounds in saved:
            for round_index in rounds:
                getattr(stores, name).put(client_id, round_index, make_tensors(round_index + 1))
            stores.save(tmp_path / "checkpoint", name, client_id, rounds, pytest.fail)
        assert (tmp_path / "checkpoint" / "clients" / "a" / "before.safetensors").is_file()

        other = any_runs.make(directory="other")
        other.clients.put("c", 0, make_tensors())
        other.clients.put("a", 9, make_tensors())
        other.fill({name: tmp_path / "checkpoint" / name for name in ("clients", "optimizers")})
        assert (list(other.clients), list(other.optimizers)) == (["a", "b"], ["a"])
        for name, client_id, rounds in saved:
            assert getattr(other, name).rounds(client_id) == list(rounds)
            for round_index in rounds:
                assert_identical(other.get(name, client_id, round_index, pytest.fail), make_tensors(round_index + 1))

    def test_only_the_rounds_that_are_named_are_saved(self, any_runs, tmp_path):
        stores = any_runs.make()
        for round_index in (2, 3):
            stores.clients.put("a", round_index, make_tensors())
        stores.save(tmp_path / "checkpoint", "clients", "a", [3], pytest.fail)
        stores.save(tmp_path / "checkpoint", "clients", "b", [], pytest.fail)
        assert [p.name for p in (tmp_path / "checkpoint").rglob("*.safetensors")] == ["round-3.safetensors"]

    def test_what_no_folder_fills_is_empty(self, any_runs, tmp_path):
        stores = any_runs.make()
        stores.clients.put("a", 0, make_tensors(0))
        stores.optimizers.put("a", 0, make_tensors(1))
        stores.save(tmp_path / "checkpoint", "clients", "a", [0], pytest.fail)
        stores.fill({"clients": tmp_path / "checkpoint" / "clients", "optimizers": tmp_path / "absent"})
        assert (list(stores.clients), list(stores.optimizers)) == (["a"], [])
        stores.optimizers.put("a", 0, make_tensors(1))
        stores.fill({"clients": tmp_path / "checkpoint" / "clients"})
        assert (list(stores.clients), list(stores.optimizers)) == (["a"], [])
        stores.fill({"optimizers": tmp_path / "checkpoint" / "clients"})
        assert (list(stores.clients), list(stores.optimizers)) == ([], ["a"])
        stores.fill({})
        assert (list(stores.clients), list(stores.optimizers)) == ([], [])

    def test_a_run_begins_with_what_counted_last_in_the_one_before(self, any_runs):
        stores = any_runs.make()
        for client_id, rounds in {"a": (3, 4), "b": (3, 4), "c": (BEFORE, 2), "d": (BEFORE, 1)}.items():
            for round_index in rounds:
                stores.clients.put(client_id, round_index, make_tensors(round_index + 1))
                stores.optimizers.put(client_id, round_index, make_tensors(round_index + 11))
        stores.begin_run({"a": 4, "b": 3, "c": BEFORE}, {"a": 4, "c": 2})
        assert {c: stores.clients.rounds(c) for c in "abcd"} == {"a": [BEFORE], "b": [BEFORE], "c": [BEFORE], "d": []}
        assert {c: stores.optimizers.rounds(c) for c in "abcd"} == {"a": [BEFORE], "b": [], "c": [BEFORE], "d": []}
        for client_id, seed in {"a": 5, "b": 4, "c": 0}.items():
            assert_identical(stores.get("clients", client_id, BEFORE, pytest.fail), make_tensors(seed))
        for client_id, seed in {"a": 15, "c": 13}.items():
            assert_identical(stores.get("optimizers", client_id, BEFORE, pytest.fail), make_tensors(seed))

    @pytest.mark.parametrize("name", ["clients", "optimizers"])
    @pytest.mark.parametrize("lost", [("b", 2), ("c", 2)], ids=["a_round", "a_client"])
    def test_a_run_does_not_begin_where_something_is_lost(self, any_runs, name, lost):
        """An older round must not take its place."""
        stores = any_runs.make()
        for client_id in ("a", "b"):
            for store in (stores.clients, stores.optimizers):
                for round_index in (0, 1):
                    store.put(client_id, round_index, make_tensors(round_index))
        counted = {"clients": {"a": 1}, "optimizers": {"a": 1}}
        counted[name][lost[0]] = lost[1]
        with pytest.raises(ClientStoreError, match=f"No tensors are stored for client '{lost[0]}'"):
            stores.begin_run(**counted)
        for store in (stores.clients, stores.optimizers):
            assert [store.rounds(client_id) for client_id in ("a", "b", "c")] == [[0, 1], [0, 1], []]

    def test_only_the_first_process_changes_what_all_share(self, runs, tmp_path):
        stores = runs.make()
        stores.clients.put("a", 1, make_tensors())
        other = runs.make(is_first=False)
        other.fill({})
        other.begin_run({"a": 1}, {})
        assert stores.clients.rounds("a") == [1]
        stores.begin_run({"a": 1}, {})
        assert other.clients.rounds("a") == [BEFORE]

    def test_every_process_fills_its_own_memory(self, tmp_path):
        write_safetensors(tmp_path / "clients" / "a" / "round-2.safetensors", make_tensors())
        stores = Runs(tmp_path, "memory").make(is_first=False)
        stores.fill({"clients": tmp_path / "clients"})
        stores.begin_run({"a": 2}, {})
        assert_identical(stores.get("clients", "a", BEFORE, pytest.fail), make_tensors())
