"""B by round: what a client has is kept bit for bit, for its last two rounds."""

import random

import inside
import pytest
import torch

from hf_fedsa.client.store import BEFORE, ClientStoreError, DiskClientStore, MemoryClientStore
from hf_fedsa.tensors import count_bytes


def make_tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "layers.0.q_proj.lora_B.weight": torch.randn(6, 4, generator=generator),
        "layers.0.v_proj.lora_B.weight": torch.randn(6, 4, generator=generator).to(torch.bfloat16),
        "step": torch.tensor(3 + seed),
    }


def assert_identical(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for key in first:
        assert first[key].dtype == second[key].dtype
        assert first[key].shape == second[key].shape
        one, other = (tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (first[key], second[key]))
        assert torch.equal(one, other)


@pytest.fixture(params=["memory", "disk"])
def store(request, tmp_path):
    return MemoryClientStore() if request.param == "memory" else DiskClientStore(tmp_path / "clients")


class TestTensors:
    def test_they_come_back_bit_for_bit(self, store):
        tensors = make_tensors()
        store.put("client_0", 0, tensors)
        assert_identical(store.get("client_0", 0), tensors)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
    def test_the_odd_values_of_a_dtype_survive(self, store, dtype):
        tiny = torch.finfo(dtype).tiny
        tensors = {"a": torch.tensor([0.0, -0.0, tiny, tiny / 4, float("inf"), float("nan"), 1 / 3], dtype=dtype)}
        for round_index in range(4):  # The later ones are written into the room of dropped ones.
            store.put("client_0", round_index, tensors)
            assert_identical(store.get("client_0", round_index), tensors)

    def test_scalars_empty_tensors_and_views_survive(self, store):
        for round_index in range(4):
            stacked = torch.randn(2, 3, 4)
            tensors = {
                "scalar": torch.tensor(1.5 + round_index),
                "empty": torch.zeros(0, 3),
                "transposed": torch.randn(4, 3).T,
                "first": stacked[0],
                "second": stacked[1],
            }
            store.put("client_0", round_index, tensors)
            assert_identical(store.get("client_0", round_index), tensors)

    def test_a_client_may_have_no_tensors(self, store):
        store.put("client_0", 0, {})
        assert "client_0" in store
        assert store.get("client_0", 0) == {}

    def test_a_client_is_forgotten(self, store):
        for round_index in range(3):
            store.put("client_0", round_index, make_tensors(round_index))
            store.put("client_1", round_index, make_tensors(round_index))
        store.forget("client_0"), store.forget("client_2")
        assert list(store) == ["client_1"] and store.rounds("client_0") == [] and store.rounds("client_1") == [1, 2]
        store.put("client_0", 0, make_tensors())
        assert store.rounds("client_0") == [0]

    def test_parameters_come_back_as_plain_tensors(self, store):
        for round_index in range(4):
            store.put("client_0", round_index, {"a": torch.nn.Parameter(torch.ones(2))})
            tensor = store.get("client_0", round_index)["a"]
            assert not tensor.requires_grad
            assert tensor.tolist() == [1.0, 1.0]

    def test_what_was_put_can_change_after(self, store):
        for round_index in range(4):
            tensors = make_tensors()
            store.put("client_0", round_index, tensors)
            for tensor in tensors.values():
                tensor.fill_(9)
            assert_identical(store.get("client_0", round_index), make_tensors())

    def test_what_was_got_can_change_after(self, store):
        store.put("client_0", 0, make_tensors())
        for tensor in store.get("client_0", 0).values():
            tensor.fill_(9)
        assert_identical(store.get("client_0", 0), make_tensors())

    def test_what_was_got_stays_when_rounds_go(self, store):
        store.put("client_0", 0, make_tensors())
        got = store.get("client_0", 0)
        for round_index in range(1, 5):
            store.put("client_0", round_index, make_tensors(round_index))
        assert_identical(got, make_tensors())

    def test_clients_and_rounds_are_kept_apart(self, store):
        names = [(f"client_{i}", r) for r in (BEFORE, 0, 4) for i in range(3)]
        for seed, (client_id, round_index) in enumerate(names):
            store.put(client_id, round_index, make_tensors(seed))
        for seed, (client_id, round_index) in enumerate(names):
            if round_index >= 0:
                assert_identical(store.get(client_id, round_index), make_tensors(seed))

    @pytest.mark.parametrize(
        "other",
        [
            make_tensors(5),
            {"other": torch.ones(1)},
            {**make_tensors(), "step": torch.tensor([4])},
            {**make_tensors(), "step": torch.tensor(2.5)},
        ],
        ids=["values", "keys", "shape", "dtype"],
    )
    def test_the_last_put_of_a_round_counts(self, store, other):
        store.put("client_0", 1, make_tensors(1))
        store.put("client_0", 2, make_tensors(2))
        store.put("client_0", 2, other)
        assert_identical(store.get("client_0", 2), other)
        assert_identical(store.get("client_0", 1), make_tensors(1))

    @pytest.mark.parametrize("round_index", [0, BEFORE])
    def test_a_missing_client_is_named(self, store, round_index):
        store.put("client_0", round_index, make_tensors())
        with pytest.raises(ClientStoreError, match="No tensors are stored for client 'client_1'.*Resume from a check"):
            store.get("client_1", round_index)

    def test_another_round_is_never_given_in_place_of_a_missing_one(self, store):
        store.put("client_0", 3, make_tensors())
        store.put("client_0", 5, make_tensors())
        for missing in (BEFORE, 0, 4, 6):
            with pytest.raises(ClientStoreError) as error:
                store.get("client_0", missing)
            assert ("before" if missing == BEFORE else str(missing)) in str(error.value)


class TestRounds:
    @pytest.mark.parametrize(
        ("put", "left"),
        [
            ([0], [0]),
            ([0, 1], [0, 1]),
            ([0, 1, 2], [1, 2]),
            ([2, 9, 10, 100], [10, 100]),
            ([BEFORE, 0], [BEFORE, 0]),
            ([BEFORE, 3, 4], [3, 4]),
            ([3, 3, 3], [3]),
            ([3, 4, 4], [3, 4]),
            # A run that went back: what came after is of no use.
            ([3, 7, 5], [3, 5]),
            ([3, 7, 1], [1]),
            ([3, 7, 3], [3]),
            ([0, 1, BEFORE], [BEFORE]),
        ],
    )
    def test_the_newest_older_one_and_the_new_one_stay(self, store, put, left):
        store.put("other", 0, make_tensors())
        for seed, round_index in enumerate(put):
            store.put("client_0", round_index, make_tensors(seed))
        assert store.rounds("client_0") == left
        for round_index in left:
            seed = max(i for i, r in enumerate(put) if r == round_index)
            assert_identical(store.get("client_0", round_index), make_tensors(seed))
        assert store.rounds("other") == [0]

    def test_an_unknown_client_has_none(self, store):
        assert store.rounds("client_0") == []

    @pytest.mark.parametrize(("keep", "left"), [(2, [2]), (7, [7]), (None, []), (5, []), (BEFORE, [])])
    def test_keeping_one_drops_the_others(self, store, keep, left):
        for client_id in ("client_0", "client_1"):
            for round_index in (2, 7):
                store.put(client_id, round_index, make_tensors(round_index))
        store.keep("client_0", keep)
        assert store.rounds("client_0") == left
        assert ("client_0" in store) == bool(left)
        assert list(store) == [*(["client_0"] if left else []), "client_1"]
        for round_index in left:
            assert_identical(store.get("client_0", round_index), make_tensors(round_index))
        assert_identical(store.get("client_1", 2), make_tensors(2))
        store.keep("client_9", 0)
        assert "client_9" not in store

    def test_a_round_that_did_not_count_leaves_what_was_before(self, store):
        store.put("client_0", 0, make_tensors(0))
        for lost in range(1, 6):
            store.put("client_0", lost, make_tensors(lost))
            store.keep("client_0", 0)
        store.put("client_0", 6, make_tensors(6))
        assert_identical(store.get("client_0", 0), make_tensors(0))

    @pytest.mark.parametrize(
        ("rounds", "old", "new", "left"),
        [
            ([4], 4, BEFORE, [BEFORE]),
            ([BEFORE, 4], 4, BEFORE, [BEFORE]),
            ([3, 4], 4, BEFORE, [BEFORE, 3]),
            ([3, 4], 3, BEFORE, [BEFORE, 4]),
            ([BEFORE, 0], BEFORE, BEFORE, [BEFORE, 0]),
            ([3, 4], 4, 4, [3, 4]),
        ],
    )
    def test_a_round_gets_another_name(self, store, rounds, old, new, left):
        for round_index in rounds:
            store.put("client_0", round_index, make_tensors(round_index + 1))
        store.rename("client_0", old, new)
        assert store.rounds("client_0") == left
        assert_identical(store.get("client_0", new), make_tensors(old + 1))
        for other in left:
            if other != new:
                assert_identical(store.get("client_0", other), make_tensors(other + 1))

    def test_what_is_missing_has_no_other_name(self, store):
        store.put("client_0", BEFORE, make_tensors())
        for client_id, old in (("client_0", 3), ("client_1", BEFORE)):
            with pytest.raises(ClientStoreError, match=f"No tensors are stored for client '{client_id}'"):
                store.rename(client_id, old, BEFORE)
        assert_identical(store.get("client_0", BEFORE), make_tensors())

    def test_other_numbers_are_no_rounds(self, store):
        store.put("client_0", 0, make_tensors())
        for change in (lambda: store.put("client_0", -2, {}), lambda: store.rename("client_0", 0, -2)):
            with pytest.raises(ValueError, match=r"`round_index=-2` is no round. Rounds are counted from 0"):
                change()
        assert store.rounds("client_0") == [0]


class TestClients:
    def test_it_knows_whom_it_holds(self, store):
        assert "client_0" not in store
        store.put("client_0", 0, make_tensors())
        assert "client_0" in store
        assert "client" not in store
        assert "client_1" not in store

    def test_clients_come_sorted(self, store):
        ids = ["b", "client_10", "client_2", "a.safetensors", "round-0.safetensors", "Z", "a"]
        for client_id in ids:
            store.put(client_id, 0, make_tensors())
        assert list(store) == sorted(ids)

    def test_a_fresh_store_is_empty(self, store):
        assert list(store) == []

    def test_clear_forgets_everyone(self, store):
        store.clear()
        for seed in range(3):
            store.put(f"client_{seed}", 0, make_tensors(seed))
            store.put(f"client_{seed}", 1, make_tensors(seed))
        store.clear()
        assert list(store) == []
        assert "client_0" not in store
        with pytest.raises(ClientStoreError):
            store.get("client_0", 1)
        store.put("client_0", 0, make_tensors(7))
        assert_identical(store.get("client_0", 0), make_tensors(7))

    def test_clients_may_come_and_go_while_it_is_walked(self, store):
        for seed in range(3):
            store.put(f"client_{seed}", 0, make_tensors(seed))
        for client_id in store:
            store.keep(client_id, None)
            store.put(f"{client_id}_new", 0, make_tensors())
        assert list(store) == [f"client_{i}_new" for i in range(3)]


def addresses(store, client_id: str, round_index: int) -> set[int]:
    return {tensor.data_ptr() for tensor in inside.tensors_stored(store)[client_id][round_index].values()}


def bytes_stored(store) -> int:
    return sum(count_bytes(tensors) for rounds in inside.tensors_stored(store).values() for tensors in rounds.values())


def bytes_taken(store) -> int:
    return bytes_stored(store) + sum(count_bytes(tensors) for tensors in inside.room_in(store))


class TestMemoryClientStore:
    def test_a_client_is_written_where_its_own_tensors_lay(self):
        store = MemoryClientStore()
        store.put("client_0", 0, make_tensors(0))
        store.put("client_0", 1, make_tensors(1))
        before = addresses(store, "client_0", 0) | addresses(store, "client_0", 1)
        for round_index in range(2, 7):
            store.put("client_0", round_index, make_tensors(round_index))
            two = addresses(store, "client_0", round_index - 1) | addresses(store, "client_0", round_index)
            assert two == before
            assert_identical(store.get("client_0", round_index - 1), make_tensors(round_index - 1))
        again = addresses(store, "client_0", 6)
        store.put("client_0", 6, make_tensors(60))
        assert addresses(store, "client_0", 6) == again

    @pytest.mark.parametrize("drop", ["keep", "rename"])
    def test_a_client_is_written_where_tensors_of_another_lay(self, drop):
        store = MemoryClientStore()
        store.put("client_0", 0, make_tensors(0))
        store.put("client_0", 1, make_tensors(1))
        freed = addresses(store, "client_0", 0)
        if drop == "keep":
            store.keep("client_0", 1)
        else:
            store.rename("client_0", 1, 0)
        shuffled = dict(reversed(make_tensors(2).items()))
        store.put("client_1", 1, shuffled)
        assert addresses(store, "client_1", 1) == freed
        assert_identical(store.get("client_1", 1), shuffled)

    def test_it_takes_no_more_than_was_needed_at_once(self):
        def layout(seed):
            return make_tensors(seed) if draws.random() < 0.8 else {"other": torch.full((50,), float(seed))}

        store, draws, needed, stored = MemoryClientStore(), random.Random(0), 0, {}
        reused = 0
        for seed in range(600):
            client_id, round_index = f"client_{draws.randrange(4)}", draws.randrange(6)
            action = draws.choice(["put"] * 6 + ["keep", "keep_none", "rename", "clear" if seed % 5 == 0 else "put"])
            if action == "put":
                tensors, room = layout(seed), bytes_taken(store) - bytes_stored(store)
                store.put(client_id, round_index, tensors)
                reused += bytes_taken(store) - bytes_stored(store) < room
                stored[client_id, round_index] = tensors
            elif action == "clear":
                store.clear()
                assert bytes_taken(store) == 0
            elif action == "rename" and (rounds := store.rounds(client_id)):
                store.rename(client_id, rounds[-1], round_index)
                stored[client_id, round_index] = stored[client_id, rounds[-1]]
            else:
                store.keep(client_id, None if action == "keep_none" else round_index)
            needed = max(needed, bytes_stored(store))
            assert bytes_taken(store) <= needed
            for owner in store:
                for r in store.rounds(owner):
                    assert_identical(store.get(owner, r), stored[owner, r])
        assert reused > 20

    def test_nothing_of_a_forgotten_client_is_kept_as_room(self):
        store = MemoryClientStore()
        for round_index in range(2):
            store.put("client_0", round_index, make_tensors(round_index))
        store.keep("client_0", 1)
        assert inside.room_in(store)
        store.forget("client_0")
        assert inside.room_in(store) == []

    def test_room_of_another_layout_is_given_back(self):
        store = MemoryClientStore()
        for i in range(10):
            store.put(f"client_{i}", 0, {"a": torch.ones(100)})
            store.keep(f"client_{i}", None)
        store.put("client_0", 0, {"b": torch.ones(100)})
        assert bytes_taken(store) == bytes_stored(store) == 400

    @pytest.mark.parametrize(("round_index", "left"), [(1, [0]), (2, [1])])
    def test_half_of_a_copy_is_never_returned(self, monkeypatch, round_index, left):
        def interrupted(self, other):
            if other.dim() == 0:
                raise KeyboardInterrupt
            return copy(self, other)

        store = MemoryClientStore()
        for r in (0, 1):
            store.put("client_0", r, make_tensors(r))
        copy = torch.Tensor.copy_
        monkeypatch.setattr(torch.Tensor, "copy_", interrupted)
        with pytest.raises(KeyboardInterrupt):
            store.put("client_0", round_index, make_tensors(9))
        monkeypatch.undo()
        assert store.rounds("client_0") == left
        assert_identical(store.get("client_0", left[0]), make_tensors(left[0]))
