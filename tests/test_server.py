"""A server's rounds, with three floats and no model."""

import dataclasses
import math
import re

import numpy as np
import pytest
import torch
from three_floats import KEPT, START, far, make_server, make_update, numbers, value

from hf_fedsa.faults import judge
from hf_fedsa.metrics import log_line
from hf_fedsa.server.aggregation import WeightedMean, weighted_mean
from hf_fedsa.tensors import tensors_sha256


def test_three_rounds_of_some_of_the_clients_by_hand():
    chosen = ["ba", "cb", "a"]
    server = make_server(sampler=lambda round_index, num_rows, clients_per_round: list(chosen[round_index]))
    a = np.array([3.0, 0.0, 4.0])
    bytes_of_a = 3 * 4
    returned = [
        {"a": (a + 0.1, 1.0, 0.5), "b": (a - 0.2, 3.0, 1.5)},
        {"b": (a * 1.1, 2.0, 0.25), "c": (a * 0.9 + 0.3, 6.0, 0.75)},
        {"a": (a + [0.0, 1.0, 0.0], 5.0, 0.125)},
    ]
    stale = [{"a": None, "b": None}, {"b": 1, "c": None}, {"a": 2}]
    last = [{"a": None, "b": None}, {"b": 0, "c": None}, {"a": 0}]
    for round_index, updates in enumerate(returned):
        client_ids, broadcast = server.begin_round()
        assert client_ids == tuple(sorted(chosen[round_index]))
        assert (broadcast.round_index, broadcast.run_id, broadcast.trained) == (round_index, "run", ("A", "B"))
        assert broadcast.last_counted == last[round_index]
        assert (broadcast.schedule_start, broadcast.schedule_steps) == (2 * round_index, 6)
        assert tensors_sha256(broadcast.shared) == tensors_sha256(server.shared)
        for client_id, (tensors, weight, loss) in updates.items():
            update = make_update(client_id, tensors.tolist(), round_index, loss=loss, weight=weight)
            assert server.receive(update) is None
        record = server.end_round(1.23456, step=7 + round_index)
        a = np.average([t for t, _, _ in updates.values()], axis=0, weights=[w for _, w, _ in updates.values()])
        np.testing.assert_allclose(numbers(server.shared), a, rtol=0, atol=1e-6)
        assert record == {
            "round": round_index,
            "clients": [*client_ids],
            "losses": {client_id: loss for client_id, (_, _, loss) in updates.items()},
            "weights": {client_id: weight for client_id, (_, weight, _) in updates.items()},
            "left_out": {},
            "staleness": stale[round_index],
            "counted": True,
            "bytes_down": len(client_ids) * bytes_of_a,
            "bytes_up": len(client_ids) * bytes_of_a,
            "seconds": 1.235,
            "step": 7 + round_index,
            "shared_sha256": tensors_sha256(server.shared),
        }
        assert [*record][-2:] == ["step", "shared_sha256"]
    assert server.state.rounds_done == 3
    assert server.state.last_round == {"a": 2, "b": 1, "c": 1}
    assert numbers(server.initial_shared) == [3.0, 0.0, 4.0]


def test_the_mean_is_taken_in_the_order_of_arrival():
    updates = [make_update(c, [3.0 + i / 70, i / 110, 4.0 - i / 130], weight=1 + i) for i, c in enumerate("cabd")]

    def mean_of(order):
        server = make_server("abcd")
        server.begin_round()
        for update in order:
            server.receive(update)
        server.end_round(0.0)
        return tensors_sha256(server.shared)

    for order in (updates, updates[::-1]):
        assert mean_of(order) == tensors_sha256(weighted_mean((update.shared, update.weight) for update in order))
    assert mean_of(updates) != mean_of(updates[::-1])


def test_what_is_given_to_a_server_is_copied():
    shared = {key: tensor.clone() for key, tensor in START.items()}
    server = make_server(shared=shared)
    server.begin_round()
    updates = [make_update("a"), far("b", 4.0)]  # One of them is held back.
    for update in updates:
        server.receive(update)
    for tensors in (shared, *(update.shared for update in updates)):
        tensors["x"].fill_(1e6)
    server.end_round(0.0)
    assert numbers(server.shared) == [3.0, 2.0, 4.0]
    server.restart("second")
    server.shared["y"].fill_(1e6)
    assert numbers(server.initial_shared) == [3.0, 2.0, 4.0]


def test_the_a_that_a_server_begins_with_is_its_own_and_in_fp32():
    shared = {"x": torch.tensor([3.0, 0.0]), "y": torch.tensor([4.0], dtype=torch.bfloat16, requires_grad=True)}
    server = make_server(shared=shared)
    shared["x"].fill_(1e6)
    assert numbers(server.shared) == [3.0, 0.0, 4.0]
    assert {(tensor.dtype, tensor.requires_grad) for tensor in server.shared.values()} == {(torch.float32, False)}


def test_a_travels_in_the_dtype_of_training_and_is_kept_in_fp32():
    server = make_server("ab", dtypes={"x": torch.bfloat16}, shared={**START, "x": torch.tensor([1 + 2**-9, 0.0])})
    _, broadcast = server.begin_round()
    assert {key: tensor.dtype for key, tensor in broadcast.shared.items()} == {"x": torch.bfloat16, "y": torch.float32}
    assert server.shared["x"][0] == 1 + 2**-9
    for client_id, number in (("a", 1.0), ("b", 1.0 + 2**-7)):
        returned = {"x": torch.tensor([number, 0.0], dtype=torch.bfloat16), "y": torch.tensor([4.0])}
        assert server.receive(make_update(client_id, shared=returned)) is None
    record = server.end_round(0.0)
    assert server.shared["x"].tolist() == [1 + 2**-8, 0.0]
    assert record["bytes_up"] == record["bytes_down"] == 2 * (2 * 2 + 4)


def test_a_round_that_is_open_is_begun_again_as_it_is():
    server = make_server("abcd", clients_per_round=2)
    first_ids, first = server.begin_round(available=["b", "d", "stranger"])
    assert first_ids == ("b", "d")
    server.receive(make_update("b", [1.0, 1.0, 1.0]))
    before = value(server)
    for available in (None, ["a", "c"]):
        again_ids, again = server.begin_round(available)
        assert again_ids == first_ids
        assert tensors_sha256(again.shared) == tensors_sha256(first.shared)
        assert dataclasses.replace(again, shared={}) == dataclasses.replace(first, shared={})
    assert value(server) == before


class TestRefused:
    """Nothing changes: neither state nor mean nor log."""

    CASES = {
        "another round": (make_update("a", round_index=1), "it is of round 1, and round 0 is open"),
        "no client": (make_update("z"), "client 'z' was not sampled for round 0"),
        "not sampled": (make_update("d"), "client 'd' was not sampled for round 0"),
        "answered": (make_update("b"), "client 'b' has answered in round 0 already"),
        "held back": (make_update("e"), "client 'e' has answered in round 0 already"),
        "left out": (make_update("c"), r"client 'c' is left out \(no rows\) in round 0 already"),
        "fault twice": (make_update("c", fault="no rows"), "client 'c' is left out"),
        "weight 0": (make_update("a", weight=0.0), "its `weight` is 0.0, not a positive number"),
        "weight below 0": (make_update("a", weight=-1), "its `weight` is -1"),
        "weight nan": (make_update("a", weight=math.nan), "its `weight` is nan"),
        "weight inf": (make_update("a", weight=math.inf), "its `weight` is inf"),
        "weight huge": (make_update("a", weight=10**400), "its `weight` is 1000"),
        "no step": (make_update("a", num_steps=0), "its `num_steps` is 0"),
        "too many steps": (make_update("a", num_steps=10**400), "its `num_steps` is 1000"),
        "no loss": (make_update("a", metrics={"perplexity": 1.0}), r"no `loss`, but \['perplexity'\]"),
        "lacks": (make_update("a", shared={"x": torch.ones(2)}), "it lacks 'y', and must have the 2 tensors"),
        "has": (make_update("a", shared={**START, "B": torch.ones(2)}), "it has 'B', and must have the 2 tensors"),
        "empty": (make_update("a", shared={}), "it lacks 'x'"),
        "shape": (
            make_update("a", shared={**START, "x": torch.ones(2, 1)}),
            r"'x' has shape \(2, 1\), and \(2,\) was",
        ),
        "dtype": (make_update("a", shared={**START, "x": torch.ones(2, dtype=torch.int64)}), "'x' is torch.int64"),
    }

    @pytest.mark.parametrize("case", CASES)
    def test_in_an_open_round(self, case, caplog):
        update, reason = self.CASES[case]
        server = make_server("abcde", sampler=lambda *_: ["a", "b", "c", "e"])
        server.begin_round()
        server.receive(make_update("b"))
        server.receive(far("e", 4.0))
        server.receive(make_update("c", shared={}, fault="no rows"))
        caplog.clear()
        before = value(server)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(WeightedMean, "add", lambda *_: pytest.fail("the mean was touched"))
            found = server.receive(update)
        assert re.search(reason, found), found
        assert value(server) == before
        assert not caplog.records

    def test_when_no_round_is_open(self):
        server = make_server()
        before = value(server)
        assert server.receive(make_update("a")) == "it is of round 0, and no round is open"
        server.begin_round()
        server.receive(make_update("a"))
        server.end_round(0.0)
        assert server.receive(make_update("b")) == "it is of round 0, and no round is open"
        assert value(server) != before
        for call in (server.all_left_out, lambda: server.end_round(0.0), lambda: server.reduce(None, None)):
            with pytest.raises(RuntimeError, match="No round is open. Call `begin_round` first"):
                call()

    def test_tensors_where_a_is_not_trained(self):
        server = make_server(sharing=KEPT)
        server.begin_round()
        before = value(server)
        assert server.receive(make_update("a")) == "it has 'x', and A is not trained here"
        assert value(server) == before

    def test_a_refused_client_may_answer_again(self):
        server = make_server("a")
        server.begin_round()
        assert server.receive(make_update("a", weight=0)) is not None
        assert server.receive(make_update("a", [1.0, 1.0, 1.0])) is None
        assert server.end_round(0.0)["clients"] == ["a"]


class TestLeftOut:
    CASES = {
        "fault": (make_update("b", shared={}, weight=0.0, num_steps=0, metrics={}, fault="no rows"), "no rows"),
        "loss": (make_update("b", loss=math.nan), "its loss is nan"),
        "huge loss": (make_update("b", loss=10**400), "its loss is inf"),
        "nan": (make_update("b", [math.nan, 0.0, 0.0]), "its update is not finite"),
        "inf": (make_update("b", [0.0, 0.0, -math.inf]), "its update is not finite"),
        "norm": (
            far("b", 11.0),
            "its A has changed by 2.2 times the norm it had, more than `max_update_norm=2.0`",
        ),
    }

    @pytest.mark.parametrize("case", CASES)
    def test_the_others_are_averaged_as_if_it_were_not_there(self, case, caplog):
        update, fault = self.CASES[case]
        server = make_server("abc", max_update_norm=2.0)
        server.begin_round()
        server.receive(make_update("a", [1.0, 2.0, 3.0], weight=1.0))
        tensors = value(server)[0]
        assert server.receive(update) == fault
        assert value(server)[0] == tensors
        assert server.all_left_out() is None
        server.receive(make_update("c", [5.0, -2.0, 3.0], weight=3.0))
        record = server.end_round(0.0)
        assert numbers(server.shared) == [4.0, -1.0, 3.0]
        assert record["left_out"] == {"b": fault}
        assert record["clients"] == ["a", "c"] and record["counted"]
        assert record["bytes_up"] == 2 * 12 and record["bytes_down"] == 3 * 12
        assert "b" not in server.state.last_round
        assert caplog.messages == [f"Client b is left out of round 0: {fault}."]
        assert server.begin_round()[1].last_counted == {"a": 0, "b": None, "c": 0}

    def test_no_limit(self):
        server = make_server("abc", max_update_norm=None)
        server.begin_round()
        for client_id, change in (("a", 0.0), ("b", 0.0), ("c", 3e6)):
            assert server.receive(far(client_id, change)) is None
        server.end_round(0.0)
        assert numbers(server.shared) == [3.0, 1e6, 4.0]

    def test_everyone(self, caplog):
        server = make_server("abc")
        server.begin_round()
        server.receive(make_update("b", loss=math.inf))
        server.receive(make_update("a", shared={}, fault="no rows"))
        assert server.all_left_out() == (
            "All 2 clients of round 0 were left out, such as 'b': its loss is inf. What is shared and what "
            "clients keep are as they were before the round, and so is what was saved. If losses are not finite, "
            "lower `learning_rate` or look at the rows. If rows cannot be read, the log says why."
        )
        assert server.state.open is not None
        record = server.end_round(0.0)
        assert numbers(server.shared) == [3.0, 0.0, 4.0]
        assert (record["counted"], record["clients"], record["losses"]) == (False, [], {})
        assert server.state.rounds_done == 1 and server.state.last_round == {}
        assert "Round 0 does not count: 0 clients returned an update" in caplog.text
        line = log_line(record)
        assert (line["round_clients"], line["round_clients_left_out"]) == (0, 2)
        assert not {"round_loss", "round_loss_std", "round_loss_best", "round_loss_worst"} & line.keys()

    def test_nobody(self):
        server = make_server("abc")
        server.begin_round()
        before = value(make_server("abc"))
        assert server.all_left_out() is None
        assert server.end_round(3.0) is None
        assert value(server) == before
        assert server.begin_round()[1].round_index == 0


class TestJudge:
    """What client and server ask alike."""

    def test_b_that_is_not_finite(self):
        local = {"B": torch.tensor([0.0, math.nan])}
        assert judge(START, START, 1.0, "auto", local=local) == "its update is not finite"
        assert judge({}, START, 1.0, 2.0, local=local) == "its update is not finite"
        assert judge(START, START, 1.0, "auto", local={"B": torch.ones(2)}) is None

    def test_a_that_is_not_trained_has_not_changed(self):
        assert judge({}, START, 1.0, 1e-9, local={"B": torch.ones(2)}) is None
        assert judge({}, {}, math.nan, None) == "its loss is nan"

    @pytest.mark.parametrize("limit", [None, "auto", 2.0, 2])
    def test_a_that_starts_at_zero_has_no_scale(self, limit):
        zero = {key: torch.zeros_like(tensor) for key, tensor in START.items()}
        assert judge(START, zero, 1.0, limit) is None

    @pytest.mark.parametrize(("change", "limit", "fault"), [(9.9, 2.0, False), (10.1, 2.0, True), (10.1, None, False)])
    def test_the_limit(self, change, limit, fault):
        assert (judge(far("a", change).shared, START, 1.0, limit) is not None) == fault


class TestHeldBack:
    def run(self, changes, order="abcd", steps=None):
        server = make_server(order)
        server.begin_round()
        returned = {c: server.receive(far(c, changes[c], num_steps=(steps or {}).get(c, 2))) for c in order}
        assert returned == dict.fromkeys(order)
        return server

    def test_a_change_is_judged_against_the_others_once_all_are_known(self, caplog):
        server = self.run({"a": 60.0, "b": 0.1, "c": 0.12, "d": 0.09})
        assert [*server.state.open.held] == ["a"] and [*server.state.open.weights] == ["b", "c", "d"]
        record = server.end_round(0.0)
        fault = "its A has changed by 60, more than 6 times the median of the round's 4 clients, 0.1"
        assert record["left_out"] == {"a": fault}
        assert caplog.messages == [f"Client a is left out of round 0: {fault}."]
        assert server.shared["x"][1].item() == pytest.approx((0.1 + 0.12 + 0.09) / 3, abs=1e-6)

    def test_large_changes_of_all_count_in_the_order_of_the_clients(self):
        changes = {"a": 62.7, "b": 62.7, "c": 0.1, "d": 57.3}
        server = self.run(changes, order="dbca")
        record = server.end_round(0.0)
        assert record["left_out"] == {} and record["clients"] == [*"abcd"]
        by_client, by_arrival = (
            weighted_mean((far(c, changes[c]).shared, 1.0) for c in order) for order in ("cabd", "cdba")
        )
        assert tensors_sha256(server.shared) == tensors_sha256(by_client) != tensors_sha256(by_arrival)

    def test_of_one_that_took_more_steps_more_is_expected(self):
        server = self.run({"a": 60.0, "b": 1.0, "c": 1.2, "d": 0.9}, steps={"a": 200})
        assert server.end_round(0.0)["left_out"] == {}

    def test_of_two_clients_each_is_compared_to_a(self):
        server = self.run({"a": 160.0, "b": 140.0}, order="ab")
        assert server.end_round(0.0)["left_out"] == {
            "a": "its A has changed by 32 times the norm it had, more than 30"
        }

    def test_one_client_alone_is_not_compared(self):
        server = make_server("a")
        server.begin_round()
        server.receive(far("a", 1e6))
        assert server.state.open.changes == server.state.open.held == {}
        server.end_round(0.0)
        assert server.shared["x"][1] == 1e6

    def test_everyone_who_answered_is_held_back_and_left_out(self):
        server = self.run({"a": 160.0, "b": 170.0}, order="ab")
        before = value(server)
        assert server.all_left_out().startswith(
            "All 2 clients of round 0 were left out, such as 'a': its A has changed"
        )
        assert value(server) == before
        assert server.end_round(0.0)["left_out"].keys() == {"a", "b"}

    def test_one_of_those_held_back_counts(self):
        server = self.run({"a": 160.0, "b": 4.0}, order="ab")
        assert server.all_left_out() is None
        assert server.end_round(0.0)["clients"] == ["b"]


def test_too_few_for_the_round_to_count(caplog):
    server = make_server("abc", min_clients_per_round=2)
    for round_index, answering in enumerate(("abc", "a", "ab")):
        server.begin_round()
        for client_id in answering:
            server.receive(make_update(client_id, [3.0, 1.0 + round_index, 4.0], round_index))
        a, last = numbers(server.shared), dict(server.state.last_round)
        record = server.end_round(0.0)
        assert record["counted"] == (round_index != 1)
        if round_index == 1:
            assert numbers(server.shared) == a and server.state.last_round == last == dict.fromkeys("abc", 0)
            assert record["clients"] == ["a"] and record["bytes_up"] == 12
    assert numbers(server.shared) == [3.0, 3.0, 4.0]
    assert record["staleness"] == {"a": 2, "b": 2}
    assert caplog.messages == [
        "Round 1 does not count: 1 clients returned an update, and `min_clients_per_round=2` needs 2. "
        "What is shared stays as it was."
    ]


def test_a_that_is_not_trained_stays_and_nothing_goes_up():
    server = make_server("ab", sharing=KEPT)
    assert server.begin_round()[1].trained == ("B",)
    for client_id in "ab":
        assert server.receive(make_update(client_id, shared={})) is None
    record = server.end_round(0.0)
    assert numbers(server.shared) == [3.0, 0.0, 4.0]
    assert (record["counted"], record["bytes_up"], record["bytes_down"]) == (True, 0, 2 * 12)
    assert server.state.last_round == {"a": 0, "b": 0}
