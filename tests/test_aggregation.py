"""The weighted mean against numbers worked out by hand and against plain NumPy."""

import numpy as np
import pytest
import torch

from hf_fedsa.faults import outliers
from hf_fedsa.server.aggregation import WeightedMean, weighted_mean


def make_updates(num_clients: int, seed: int = 0) -> list[tuple[dict[str, torch.Tensor], float]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            {"a": torch.randn(4, 8, generator=generator), "b": torch.randn(5, generator=generator)},
            float(torch.randint(1, 500, (), generator=generator)),
        )
        for _ in range(num_clients)
    ]


def test_two_clients_and_three_floats_by_hand():
    # (1 * [1, 2, 3] + 3 * [5, -2, 3]) / 4
    mean = weighted_mean([({"a": torch.tensor([1.0, 2.0, 3.0])}, 1), ({"a": torch.tensor([5.0, -2.0, 3.0])}, 3)])
    assert mean["a"].tolist() == [4.0, -1.0, 3.0]


def test_three_clients_by_hand():
    # (2 * 1 + 1 * 7 + 1 * -1) / 4
    updates = [({"a": torch.tensor([1.0])}, 2), ({"a": torch.tensor([7.0])}, 1), ({"a": torch.tensor([-1.0])}, 1)]
    assert weighted_mean(updates)["a"].item() == pytest.approx(2.0, abs=1e-6)


@pytest.mark.parametrize("num_clients", [2, 7, 100])
def test_it_is_numpys_mean_in_float64(num_clients):
    updates = make_updates(num_clients, seed=num_clients)
    mean = weighted_mean(updates)
    weights = [weight for _, weight in updates]
    for key in ("a", "b"):
        stacked = np.stack([tensors[key].double().numpy() for tensors, _ in updates])
        expected = np.average(stacked, axis=0, weights=weights)
        np.testing.assert_allclose(mean[key].numpy(), expected, rtol=0, atol=1e-6)


def test_equal_weights_are_the_plain_mean():
    updates = [(tensors, 1.0) for tensors, _ in make_updates(9)]
    expected = torch.stack([tensors["a"] for tensors, _ in updates]).double().mean(dim=0)
    torch.testing.assert_close(weighted_mean(updates)["a"].double(), expected, rtol=0, atol=1e-6)


def test_the_scale_of_the_weights_does_not_matter():
    updates = make_updates(9)
    scaled = [(tensors, weight / 1024) for tensors, weight in updates]
    first, second = weighted_mean(updates), weighted_mean(scaled)
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_the_order_of_the_clients_does_not_matter():
    updates = make_updates(20)
    forward, backward = weighted_mean(updates), weighted_mean(reversed(updates))
    for key in forward:
        torch.testing.assert_close(forward[key], backward[key], rtol=0, atol=1e-6)


@pytest.mark.parametrize("weight", [1, 0.1, 3.0, 1e9])
def test_one_client_alone_comes_back_bit_for_bit(weight):
    tensors = make_updates(1)[0][0]
    mean = weighted_mean([(tensors, weight)])
    assert mean.keys() == tensors.keys()
    assert all(torch.equal(mean[key], tensors[key]) for key in tensors)


@pytest.mark.parametrize(
    ("changes", "norm", "expected"),
    [
        ({"a": (1.0, 1), "b": (1.2, 1), "c": (0.9, 1), "d": (6.1, 1)}, 2.0, ["d"]),
        ({"a": (1.0, 1), "b": (1.2, 1), "c": (0.9, 1), "d": (5.9, 1)}, 2.0, []),
        # Not 0.05 of the norm of A: nobody looks.
        ({"a": (0.001, 1), "b": (0.001, 1), "c": (0.001, 1), "d": (0.09, 1)}, 2.0, []),
        ({"a": (0.001, 1), "b": (0.001, 1), "c": (0.001, 1), "d": (0.11, 1)}, 2.0, ["d"]),
        # Ten times as many steps.
        ({"a": (1.0, 1), "b": (1.2, 1), "c": (0.9, 1), "d": (9.0, 10)}, 2.0, []),
        # The more B has grown, the faster A changes: 60 steps go 900 times as far as 2.
        ({"a": (0.1, 2), "b": (0.1, 2), "c": (0.1, 2), "d": (90.0, 60)}, 1.0, []),
        ({"a": (0.1, 2), "b": (0.1, 2), "c": (0.1, 2), "d": (600.0, 60)}, 1.0, ["d"]),
        # After one step A is as it was, which says nothing of 30.
        ({"a": (0.0, 1), "b": (0.0, 1), "c": (0.0, 1), "d": (0.4, 30)}, 1.0, []),
        ({"a": (0.1, 1), "b": (0.1, 1), "c": (0.1, 1), "d": (9.0, 10**300)}, 1.0, []),
        # B starts at zero, so A has no gradient in the first step.
        ({"a": (0.0, 1), "b": (0.0, 1), "c": (99.0, 1)}, 1.0, ["c"]),
        # A starts at zero.
        ({"a": (1.0, 1), "b": (1.0, 1), "c": (6.1, 1)}, 0.0, ["c"]),
        # Half of the clients.
        ({"a": (1.0, 1), "b": (1.0, 1), "c": (99.0, 1), "d": (99.0, 1)}, 1.0, ["c", "d"]),
        # Too few to compare.
        ({"a": (1.0, 1), "b": (29.0, 1)}, 1.0, []),
        ({"a": (1.0, 1), "b": (31.0, 1)}, 1.0, ["b"]),
        ({"a": (1.0, 1), "b": (31.0, 1)}, 0.0, []),
        ({}, 1.0, []),
    ],
)
def test_outliers_by_hand(changes, norm, expected):
    faults = outliers(changes, norm)
    assert list(faults) == expected
    assert all("its A has changed by" in fault for fault in faults.values())


def test_clients_that_agree_come_back_bit_for_bit():
    tensors = make_updates(1)[0][0]
    mean = weighted_mean([(tensors, weight) for weight in (1, 7, 0.3)])
    assert all(torch.equal(mean[key], tensors[key]) for key in tensors)


def test_bf16_clients_are_averaged_in_fp32():
    # 1 + 1/128 is the next bf16 after 1, so three quarters of the way up is between the two.
    low, high = torch.tensor([1.0], dtype=torch.bfloat16), torch.tensor([1.0 + 2**-7], dtype=torch.bfloat16)
    mean = weighted_mean([({"a": low}, 1), ({"a": high}, 3)])["a"]
    assert mean.dtype == torch.float32
    assert mean.item() == 1.0 + 0.75 * 2**-7


def test_many_small_bf16_updates_are_not_lost():
    updates = [({"a": torch.tensor([1.0 if i else 2.0], dtype=torch.bfloat16)}, 1) for i in range(512)]
    assert weighted_mean(updates)["a"].item() == pytest.approx(1.0 + 1 / 512, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_the_clients_sent_is_not_changed(dtype):
    updates = [({key: t.to(dtype) for key, t in tensors.items()}, weight) for tensors, weight in make_updates(3)]
    before = [{key: tensor.clone() for key, tensor in tensors.items()} for tensors, _ in updates]
    weighted_mean(updates)
    for (tensors, _), saved in zip(updates, before, strict=True):
        assert all(torch.equal(tensors[key], saved[key]) for key in saved)


def test_the_result_does_not_share_memory_with_a_client():
    tensors = {"a": torch.ones(3)}
    weighted_mean([(tensors, 1)])["a"].zero_()
    assert tensors["a"].tolist() == [1.0, 1.0, 1.0]


def test_the_mean_has_no_graph():
    parameter = torch.nn.Parameter(torch.ones(2))
    mean = weighted_mean([({"a": parameter}, 1), ({"a": parameter * 2}, 1)])["a"]
    assert not mean.requires_grad
    assert mean.tolist() == [1.5, 1.5]


def test_a_client_is_done_with_once_the_next_is_asked_for():
    def updates():
        for value in (0.0, 1.0, 2.0):
            tensors = {"a": torch.full((2,), value)}
            yield tensors, 1
            tensors["a"].fill_(1e6)

    assert weighted_mean(updates())["a"].tolist() == [1.0, 1.0]


class TestRunningMean:
    def test_it_goes_on_bit_for_bit_where_it_stopped(self):
        updates = make_updates(6)
        whole, first = WeightedMean(), WeightedMean()
        for tensors, weight in updates:
            whole.add(tensors, weight)
        for tensors, weight in updates[:3]:
            first.add(tensors, weight)
        second = WeightedMean({key: mean.clone() for key, mean in first.mean.items()}, first.total_weight)
        for tensors, weight in updates[3:]:
            second.add(tensors, weight)
        assert second.total_weight == whole.total_weight == sum(weight for _, weight in updates)
        assert all(torch.equal(second.mean[key], whole.mean[key]) for key in whole.mean)

    def test_the_mean_it_starts_from_is_not_changed(self):
        start = {"a": torch.ones(2)}
        running = WeightedMean(start, total_weight=1.0)
        running.add({"a": torch.full((2,), 3.0)}, weight=1.0)
        assert running.mean["a"].tolist() == [2.0, 2.0]
        assert start["a"].tolist() == [1.0, 1.0]

    def test_a_fresh_one_is_empty(self):
        assert WeightedMean().mean == {}
        assert WeightedMean().total_weight == 0.0


class TestErrors:
    @pytest.mark.parametrize("weight", [0, 0.0, -1, float("nan"), float("inf")])
    @pytest.mark.parametrize("position", [0, 1])
    def test_a_weight_must_be_positive_and_finite(self, weight, position):
        updates = [({"a": torch.ones(1)}, 1.0), ({"a": torch.ones(1)}, 1.0)]
        updates[position] = (updates[position][0], weight)
        with pytest.raises(ValueError, match=f"`weight` must be a positive number, got {weight}"):
            weighted_mean(updates)

    @pytest.mark.parametrize(
        "names, differing", [(["a", "b", "c"], "c"), (["a"], "b"), (["a", "x"], "b")], ids=["more", "fewer", "other"]
    )
    def test_clients_must_send_the_same_names(self, names, differing):
        running = WeightedMean()
        running.add({"a": torch.ones(1), "b": torch.ones(1)}, 1)
        with pytest.raises(ValueError, match=f"differ from the earlier ones' in '{differing}'"):
            running.add({name: torch.zeros(1) for name in names}, 1)

    def test_a_refused_client_leaves_no_trace(self):
        running = WeightedMean()
        running.add({"a": torch.ones(1)}, 2)
        for tensors, weight in (({"b": torch.zeros(1)}, 1), ({"a": torch.zeros(1)}, 0)):
            with pytest.raises(ValueError):
                running.add(tensors, weight)
        assert running.total_weight == 2
        assert running.mean["a"].item() == 1.0

    @pytest.mark.parametrize("shape", [(3, 2), (1, 3), (3,)], ids=str)
    def test_another_shape_is_not_broadcast(self, shape):
        with pytest.raises((ValueError, RuntimeError)):
            weighted_mean([({"a": torch.ones(2, 3)}, 1), ({"a": torch.zeros(shape)}, 1)])

    @pytest.mark.parametrize("updates", [[], iter(())], ids=["list", "iterator"])
    def test_there_must_be_an_update(self, updates):
        with pytest.raises(ValueError, match="`updates` is empty"):
            weighted_mean(updates)
