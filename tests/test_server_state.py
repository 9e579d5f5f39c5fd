"""A server that stops and goes on, and one whose clients answer in several processes."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from three_floats import KEPT, Processes, far, make_server, make_update, numbers, through_bytes, value

from hf_fedsa.tensors import tensors_sha256


class TestGoingOn:
    EVENTS = [far("b", 1.0, loss=0.5), far("d", 60.0), make_update("c", loss=math.nan), far("a", 61.0, weight=3.0)]

    @pytest.mark.parametrize("stopped_after", range(5))
    def test_in_the_middle_of_a_round(self, stopped_after):
        def begun():
            server = make_server("abcde")
            server.begin_round()
            server.receive(make_update("e", [3.0, 0.5, 4.0]))
            server.end_round(1.0)
            server.begin_round()
            return server

        events = [dataclasses.replace(update, round_index=1) for update in self.EVENTS]
        whole, first = begun(), begun()
        for update in events:
            whole.receive(update)
        for update in events[:stopped_after]:
            first.receive(update)
        first.state.open.seconds += 2.0
        second = make_server("abcde")
        second.load_state_dict(*through_bytes(first))
        assert value(second) == value(first)
        assert second.begin_round()[0] == tuple("abcde")
        for update in events[stopped_after:]:
            assert (second.receive(update) is None) == (update.client_id != "c")
        record = second.end_round(1.5)
        assert record == {**whole.end_round(3.5), "seconds": 3.5}
        assert value(second) == value(whole)
        assert record["clients"] == ["a", "b", "d"]

    def test_it_is_a_copy(self):
        first, second = make_server(), make_server()
        tensors, state = first.state_dict()
        second.load_state_dict(tensors, state)
        second.begin_round()
        second.receive(make_update("a", [9.0, 9.0, 9.0]))
        second.end_round(0.0)
        for tensor in second.shared.values():
            tensor.zero_()
        assert value(first) == value(make_server())
        assert state["history"] == []

    def test_the_state_of_something_else(self):
        tensors, state = make_server().state_dict()
        missing = {name: entry for name, entry in state.items() if name != "last_round" and name != "open"}
        cases = [
            ({**tensors, "shared|x": torch.ones(3)}, state, r"'x' has the shape \[3\] in that state, and \[2\] here"),
            ({k: t for k, t in tensors.items() if k != "shared|y"}, state, "'y' has the shape None in that state"),
            ({k: t for k, t in tensors.items() if "initial" not in k}, state, "not the state of a server"),
            (tensors, {**state, "rounds": 1}, "not the state of a server of this version: .*rounds"),
            (tensors, missing, "not the state of a server of this version: KeyError"),
            ({**tensors, "held|a|x": torch.ones(2)}, state, r"The tensors 'held\|a' are not those of a server"),
            (tensors, {**state, "fingerprint": {"base_model": "other"}}, "have another fingerprint"),
        ]
        server = make_server()
        before = value(server)
        for other_tensors, other_state, problem in cases:
            with pytest.raises(ValueError, match=problem):
                server.load_state_dict(other_tensors, other_state)
            assert value(server) == before

    def test_a_new_run_from_a_as_it_is(self):
        server = make_server()
        server.begin_round()
        server.receive(make_update("a", [1.0, 1.0, 1.0]))
        server.end_round(0.0)
        server.begin_round()
        server.receive(far("a", 60.0, round_index=1))
        server.receive(make_update("b", round_index=1))
        server.restart("second")
        assert numbers(server.shared) == numbers(server.initial_shared) == [1.0, 1.0, 1.0]
        assert dataclasses.asdict(server.state) == {
            "run_id": "second",
            "open": None,
            "last_round": {},
            "history": [],
            "schedule_start": 0,
            "changed": {},
            "seen": {},
        }
        _, broadcast = server.begin_round()
        assert (broadcast.round_index, broadcast.run_id) == (0, "second")
        server.receive(make_update("c", [2.0, 2.0, 2.0]))
        server.end_round(0.0)
        assert numbers(server.shared) == [2.0, 2.0, 2.0]


class TestSeveralProcesses:
    @pytest.mark.parametrize(
        ("settings", "calls", "left_out"),
        [
            ({}, ["gather", "all_reduce 4", "gather"], ["c", "d"]),
            ({"max_update_norm": None}, ["all_reduce 4", "gather"], ["c"]),
            ({"max_update_norm": 2.0}, ["all_reduce 4", "gather"], ["c", "d"]),
            ({"sharing": KEPT}, ["gather", "gather"], ["c"]),
        ],
        ids=["auto", "no limit", "a limit", "A is not trained"],
    )
    def test_replicas_are_one_server(self, settings, calls, left_out):
        # Alone among the clients of its process, the one with the large change would not stand out.
        shares = [["a", "f"], ["b", "d"], ["c"]]
        one, replicas = make_server("abcdef", **settings), [make_server("abcdef", **settings) for _ in shares]
        processes = Processes(3)
        for round_index in range(2):
            changes = {"a": 1.0, "b": 1.1, "c": math.nan, "d": 60.0, "f": 0.9}
            updates = {
                c: far(c, change, round_index=round_index, loss=change, weight=1.0 + i)
                for i, (c, change) in enumerate(changes.items())
            }
            if "sharing" in settings:
                updates = {c: dataclasses.replace(update, shared={}) for c, update in updates.items()}
            for server in (one, *replicas):
                server.begin_round()
            for update in updates.values():
                one.receive(update)
            for server, share in zip(replicas, shares, strict=True):
                for client_id in share:
                    server.receive(updates[client_id])
            processes.run(replicas)
            expected = one.end_round(1.0)
            assert all(value(server) == value(replicas[0]) for server in replicas)
            records = [server.end_round(1.0) for server in replicas]
            assert all(record == records[0] for record in records)
            assert {**records[0], "shared_sha256": None} == {**expected, "shared_sha256": None}
            assert records[0]["shared_sha256"] == tensors_sha256(replicas[0].shared)
            np.testing.assert_allclose(numbers(replicas[0].shared), numbers(one.shared), rtol=0, atol=1e-5)
        assert processes.calls == calls * 2
        assert [*expected["left_out"]] == left_out

    def test_one_client_is_not_compared_to_others(self):
        processes, replicas = Processes(2), [make_server("a"), make_server("a")]
        for server in replicas:
            server.begin_round()
        replicas[1].receive(far("a", 1e3))
        processes.run(replicas)
        assert processes.calls == ["all_reduce 4", "gather"]
        assert all(server.end_round(0.0)["clients"] == ["a"] for server in replicas)
        assert replicas[0].shared["x"][1] == 1e3

    def test_all_are_left_out_or_nobody_has_answered(self):
        for faults in ("b", ""):
            processes, replicas = Processes(2), [make_server("ab"), make_server("ab")]
            for server in replicas:
                server.begin_round()
            for client_id in faults:
                replicas[1].receive(make_update(client_id, loss=math.inf))
            processes.run(replicas)
            told = [server.all_left_out() for server in replicas]
            assert told[0] == told[1]
            assert (told[0] or "").startswith("All 1 clients of round 0" if faults else "")
            records = [server.end_round(0.0) for server in replicas]
            assert records[0] == records[1] and (records[0] is None) == (not faults)
            assert numbers(replicas[0].shared) == [3.0, 0.0, 4.0]
