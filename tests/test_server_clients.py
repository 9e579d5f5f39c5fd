"""Who takes part in a federation, which of them a round samples, and what a server knows without a model."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from three_floats import FINGERPRINT, START, far, make_info, make_server, make_update, numbers, value

import hf_fedsa
from hf_fedsa.server.sampling import TooFewClientsError, ask_sampler, sample_clients
from hf_fedsa.server.server import Server
from hf_fedsa.server.state import ServerSettings

PACKAGE = Path(hf_fedsa.__file__).parent


def one_round(server, answering, **kwargs):
    round_index = server.state.rounds_done
    server.begin_round()
    for client_id in answering:
        assert server.receive(make_update(client_id, round_index=round_index, **kwargs)) is None
    return server.end_round(0.0)


class TestSampling:
    @pytest.mark.parametrize("sampling", ["uniform", "examples"])
    def test_the_rounds_of_the_seed(self, sampling):
        clients = {f"client_{i}": make_info(f"client_{i}", num_rows=1 + 5 * i) for i in range(9)}
        num_rows = {client_id: info.num_rows for client_id, info in clients.items()}
        server = make_server(clients, seed=7, clients_per_round=3, num_rounds=8, client_sampling=sampling)
        weights = num_rows if sampling == "examples" else None
        expected = [tuple(sample_clients(num_rows, 3, seed=7, round_index=t, weights=weights)) for t in range(8)]
        assert server.planned_rounds() == expected
        for round_index, client_ids in enumerate(expected):
            assert server.begin_round()[0] == client_ids
            assert server.planned_rounds() == expected[round_index:]
            for client_id in client_ids:
                server.receive(make_update(client_id, round_index=round_index))
            server.end_round(0.0)
        assert server.planned_rounds() == []

    def test_a_sampler_is_asked_with_those_who_are_available(self):
        asked = []

        def sampler(round_index, num_rows, clients_per_round):
            asked.append((round_index, num_rows, clients_per_round))
            return [*num_rows][::-1][:clients_per_round]

        clients = {client_id: make_info(client_id, num_rows=i + 1) for i, client_id in enumerate("abcd")}
        server = make_server(clients, sampler, num_rounds=1, clients_per_round=2)
        assert server.begin_round(["c", "a", "x"])[0] == ("a", "c")
        assert asked[0] == (0, {"a": 1, "c": 3}, 2)

    @pytest.mark.parametrize(
        ("chosen", "error", "problem"),
        [
            (None, TypeError, "returned None for round 0, not a list of client ids"),
            ("ab", TypeError, "returned 'ab' for round 0, not a list of client ids"),
            ([], ValueError, r"returned no client for round 0: \[\]. It must return at least one"),
            (["b", "a", "b"], ValueError, r"returned a client twice for round 0: \['a', 'b', 'b'\]"),
            (["a", "z"], ValueError, "returned 'z', which is no client for round 0"),
        ],
    )
    def test_a_sampler_that_is_wrong(self, chosen, error, problem):
        server = make_server(sampler=lambda *_: chosen)
        for ask in (server.begin_round, server.planned_rounds, lambda: server.begin_round(["a", "b"])):
            with pytest.raises(error, match=f"`client_sampler` {problem}"):
                ask()
        with pytest.raises(error, match=f"`client_sampler` {problem}"):
            ask_sampler(lambda *_: chosen, 0, {"a": 1, "b": 1}, None)
        assert server.state.open is None

    def test_a_sampler_that_fails_in_a_later_round_does_so_before_the_first(self):
        server = make_server(sampler=lambda t, rows, k: ["a"] if t < 2 else [])
        with pytest.raises(ValueError, match="returned no client for round 2"):
            server.begin_round()
        assert server.state.open is None

    @pytest.mark.parametrize(
        ("clients", "available", "wanted", "problem"),
        [
            ("abc", ["a"], 2, r"Round 0 needs 2 clients \(`clients_per_round=2`\), but of the 3 .* registered 1 are"),
            ("abc", [], None, r"Round 0 needs 1 clients .* of the 3 that are registered 0 are available"),
            ("a", None, 2, "of the 1 that are registered 1 are available. Wait for more, or lower"),
            ({}, None, None, "of the 0 that are registered 0 are available"),
        ],
    )
    def test_too_few_are_there(self, clients, available, wanted, problem):
        server = make_server(clients, clients_per_round=wanted)
        with pytest.raises(TooFewClientsError, match=problem):
            server.begin_round(available)
        assert server.state.open is None
        for client_id in "bcd":
            server.register(make_info(client_id))
        assert server.begin_round(["b", "c", "d"])[0]


class TestSchedule:
    CLIENTS = {client_id: make_info(client_id, num_steps=n) for client_id, n in (("a", 1), ("b", 4), ("c", 10))}

    def test_a_round_is_as_long_as_its_client_with_most_steps(self):
        chosen = ["ab", "a", "bc", "b"]
        server = make_server(dict(self.CLIENTS), lambda t, rows, k: list(chosen[t]), num_rounds=4)
        # 4 + 1 + 10 + 4
        for round_index, start in enumerate([0, 4, 5, 15]):
            assert server.schedule_steps() == 19
            _, broadcast = server.begin_round()
            assert (broadcast.schedule_start, broadcast.schedule_steps) == (start, 19)
            assert server.schedule_steps() == 19
            # A round is as long as it was planned, also if its longest client does not answer.
            for client_id in chosen[round_index].replace("c", ""):
                server.receive(make_update(client_id, round_index=round_index))
            server.end_round(0.0)
        assert server.schedule_steps() == server.state.schedule_start == 19

    def test_more_rounds_are_a_longer_schedule(self):
        server = make_server("ab", num_rounds=2)
        one_round(server, "ab")
        server.settings = ServerSettings(seed=0, num_rounds=5)
        assert server.schedule_steps() == 10
        assert server.begin_round()[1].schedule_steps == 10

    def test_those_who_come_and_leave_change_what_is_to_come_and_not_what_was(self):
        server = make_server({"a": self.CLIENTS["a"]}, num_rounds=3)
        one_round(server, "a")
        assert server.schedule_steps() == 3
        server.register(self.CLIENTS["c"])
        assert server.schedule_steps() == 1 + 10 + 10
        server.begin_round()
        server.deregister("c")
        assert server.schedule_steps() == 1 + 10 + 1
        server.deregister("a")
        assert server.begin_round()[1].schedule_steps == 1 + 10 + 10

    def test_no_fixed_end(self):
        server = make_server("abc", num_rounds=None)
        for round_index in range(5):
            assert server.begin_round()[1].schedule_steps is None
            assert server.state.schedule_start == 2 * round_index
            server.receive(make_update("a", round_index=round_index))
            server.end_round(0.0)
        assert server.schedule_steps() is None
        with pytest.raises(ValueError, match="`num_rounds` is None: the federation has no fixed end"):
            server.planned_rounds()


class TestRegister:
    def test_from_the_next_round_on(self):
        server = make_server("ab")
        server.begin_round()
        assert server.register(make_info("c")) is None
        assert server.begin_round()[0] == ("a", "b")
        assert "was not sampled" in server.receive(make_update("c"))
        server.receive(make_update("a"))
        server.end_round(0.0)
        client_ids, broadcast = server.begin_round()
        assert client_ids == ("a", "b", "c")
        assert broadcast.last_counted == {"a": 0, "b": None, "c": None}

    def test_again_with_other_rows(self):
        server = make_server("ab")
        assert server.register(make_info("a", num_rows=9, num_steps=7)) is None
        assert [*server.clients] == ["a", "b"] and server.schedule_steps() == 21

    def test_the_first_clients_fingerprint_is_the_federations(self):
        server = make_server({})
        assert server.fingerprint is None
        assert server.register(make_info("a")) is None
        assert server.fingerprint == FINGERPRINT

    @pytest.mark.parametrize(
        ("info", "reason"),
        [
            (
                make_info("c", fingerprint={**FINGERPRINT, "layout": "bar"}),
                "its `layout` is 'bar', and that of the federation is 'f00'. All clients need the same base model",
            ),
            (make_info("c", fingerprint={"layout": "f00"}), "its `base_model` is None, and that .* is 'llama'"),
            (make_info("c", fingerprint={**FINGERPRINT, "method": "ffa"}), "its `method` is 'ffa', and that .* None"),
            (make_info("a", fingerprint={}), "its `base_model` is None"),
            (make_info("c", num_rows=0), "its `num_rows` is 0. A client needs rows"),
            (make_info("c", num_steps=0), "its `num_steps` is 0. A client needs rows"),
            (make_info("../c"), "'../c' cannot name a folder"),
            (make_info("c|x"), "cannot name a folder"),
            (make_info("A"), "'a' and 'A' differ in case only"),
        ],
    )
    def test_refused(self, info, reason):
        server = make_server("ab")
        before, clients = value(server), dict(server.clients)
        found = server.register(info)
        assert re.search(reason, found), found
        assert (value(server), server.clients) == (before, clients)
        if info.client_id not in clients:
            with pytest.raises(ValueError, match=reason):
                make_server({**clients, info.client_id: info})

    def test_a_client_under_another_name(self):
        with pytest.raises(ValueError, match="has the client 'b' under the name 'a'"):
            make_server({"a": make_info("b")})

    def test_a_fingerprint_outlasts_a_restart_and_those_who_had_it(self):
        server = make_server("a")
        server.deregister("a")
        again = make_server({})
        tensors, state = server.state_dict()
        again.load_state_dict(tensors, json.loads(json.dumps(state)))
        for replica in (server, again):
            assert "its `layout` is" in replica.register(make_info("b", fingerprint={"base_model": "llama"}))

    def test_an_update_is_taken_before_its_client_is_back_after_a_restart(self):
        first, server = make_server("abc"), make_server({})
        first.begin_round()
        server.load_state_dict(*first.state_dict())
        for client_id, change in zip("abc", (1.0, 1.1, 60.0), strict=True):
            assert server.receive(far(client_id, change)) is None
        assert server.begin_round()[1].schedule_steps == 6
        assert [*server.end_round(0.0)["left_out"]] == ["c"]


class TestDeregister:
    def test_it_is_in_no_later_round(self):
        server = make_server("abc")
        one_round(server, "abc")
        server.deregister("b")
        assert server.planned_rounds() == [("a", "c")] * 2
        assert one_round(server, "ac")["clients"] == ["a", "c"]
        assert server.state.history[0]["clients"] == ["a", "b", "c"]
        assert server.register(make_info("b")) is None
        assert server.begin_round()[1].last_counted == {"a": 1, "b": 0, "c": 1}

    @pytest.mark.parametrize("forget", [False, True])
    def test_in_the_open_round_before_it_has_answered(self, forget):
        server = make_server("abc")
        server.begin_round()
        server.deregister("b", forget=forget)
        reason = "client 'b' is left out (it has left the federation) in round 0 already"
        assert server.receive(make_update("b")) == reason
        server.receive(make_update("a"))
        assert server.end_round(0.0)["left_out"] == ({} if forget else {"b": "it has left the federation"})

    @pytest.mark.parametrize("forget", [False, True])
    def test_in_the_open_round_after_it_has_answered(self, forget):
        server = make_server("abc")
        server.begin_round()
        for client_id, number in (("a", 0.125), ("b", 0.25)):  # Too little to be held back.
            server.receive(make_update(client_id, [3.0, number, 4.0]))
        server.deregister("b", forget=forget)
        record = server.end_round(0.0)
        assert numbers(server.shared) == [3.0, 0.1875, 4.0]
        assert record["clients"] == (["a"] if forget else ["a", "b"])
        assert server.state.last_round == ({"a": 0} if forget else {"a": 0, "b": 0})

    @pytest.mark.parametrize("forget", [False, True])
    def test_in_the_open_round_while_it_is_held_back(self, forget):
        server = make_server("abc")
        server.begin_round()
        for client_id in "abc":
            server.receive(far(client_id, 4.0 if client_id == "b" else 1.0))
        server.deregister("b", forget=forget)
        assert server.end_round(0.0)["clients"] == (["a", "c"] if forget else ["a", "b", "c"])
        assert server.shared["x"][1].item() == pytest.approx(1.0 if forget else 2.0)

    def test_nothing_of_a_forgotten_client_is_left_in_the_state(self):
        server = make_server(["anna", "bert", "carl"])
        one_round(server, ["anna", "bert", "carl"])
        server.begin_round()
        server.receive(make_update("anna", round_index=1))
        server.receive(make_update("bert", round_index=1, loss=float("nan")))
        server.end_round(0.0)
        server.state.history[-1]["results"] = {"anna": {"eval_loss": 1.0}, "bert": {"eval_loss": 2.0}}
        server.begin_round()
        server.receive(make_update("bert", round_index=2))
        a = numbers(server.shared)
        server.deregister("bert", forget=True)
        server.receive(make_update("anna", round_index=2))
        server.end_round(0.0)
        assert "bert" not in json.dumps(server.state_dict()[1])
        assert numbers(server.shared) == a
        first, second, third = server.state.history
        for name in ("clients", "losses", "weights", "staleness"):
            assert [*first[name]] == ["anna", "carl"]
        assert second["left_out"] == {} and second["results"] == {"anna": {"eval_loss": 1.0}}
        assert third["clients"] == ["anna"]
        with pytest.raises(ValueError, match="There is no client 'bert' to take out"):
            server.deregister("bert", forget=True)

    def test_one_that_has_left_before_can_be_forgotten(self):
        server = make_server("ab")
        one_round(server, "ab")
        server.deregister("b")
        with pytest.raises(ValueError, match="There is no client 'b'"):
            server.deregister("b")
        server.deregister("b", forget=True)
        assert server.state.history[0]["clients"] == ["a"] and server.state.last_round == {"a": 0}


class TestSettings:
    @pytest.mark.parametrize(
        ("settings", "error", "problem"),
        [
            ({"num_rounds": -1}, ValueError, "`num_rounds` must be at least 0, got -1"),
            ({"num_rounds": 1.5}, TypeError, "`num_rounds` must be an int, got 1.5 of type float"),
            ({"clients_per_round": 0}, ValueError, "`clients_per_round` must be at least 1, got 0"),
            ({"clients_per_round": True}, TypeError, "`clients_per_round` must be an int"),
            ({"min_clients_per_round": None}, TypeError, "`min_clients_per_round` must be an int"),
            (
                {"min_clients_per_round": 3, "clients_per_round": 2},
                ValueError,
                "`min_clients_per_round=3` is more than the 2 clients of a round",
            ),
            ({"client_sampling": "rows"}, ValueError, "`client_sampling` must be 'uniform' or 'examples', got 'rows'"),
            ({"max_update_norm": "2"}, TypeError, "`max_update_norm` must be a number, 'auto' or None, got '2'"),
            ({"max_update_norm": 0}, ValueError, "`max_update_norm` must be a positive number"),
            ({"max_update_norm": float("nan")}, ValueError, "`max_update_norm` must be a positive number"),
        ],
    )
    def test_refused(self, settings, error, problem):
        with pytest.raises(error, match=problem):
            ServerSettings(**{"seed": 0, "num_rounds": 1, **settings})


HEAVY = ("transformers", "peft", "trl", "datasets", "accelerate", "huggingface_hub", "bitsandbytes", "flwr")


def imported_modules(path):
    """Absolute names of all that a file of the package imports, wherever in it."""
    package = ["hf_fedsa", *path.relative_to(PACKAGE).parent.parts]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            yield from (f"{module}.{alias.name}" for alias in node.names)


class TestWithoutAModel:
    def test_what_a_server_imports(self):
        files, seen = [*(PACKAGE / "server").glob("*.py")], set()
        assert files
        while files:
            path = files.pop()
            if path in seen:
                continue
            seen.add(path)
            for name in imported_modules(path):
                parts = name.split(".")
                assert parts[0] not in HEAVY, f"{path} imports {name}"
                if parts[0] == "hf_fedsa":
                    forbidden = ("client", "hub", "trainer", "flower", "transport")
                    assert parts[1] not in forbidden, f"{path} imports {name}"
                    options = [PACKAGE.joinpath(*parts[1:n]).with_suffix(".py") for n in (2, 3, 4)]
                    files += [option for option in options if option.is_file()]
        assert {"messages.py", "faults.py", "metrics.py", "tensors.py", "files.py"} <= {path.name for path in seen}

    def test_a_servers_process_loads_nothing_heavy(self):
        code = (
            "import sys, types\n"
            "package = types.ModuleType('hf_fedsa')\n"
            f"package.__path__ = [{str(PACKAGE)!r}]\n"
            "sys.modules['hf_fedsa'] = package\n"
            "import hf_fedsa.server\n"
            f"print([name for name in {HEAVY} if name in sys.modules])\n"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "[]"


def test_a_server_needs_no_more_than_a_and_settings():
    server = Server(START, {}, ServerSettings(seed=0, num_rounds=None))
    assert server.register(make_info("a")) is None
    assert one_round(server, "a", numbers=(1.0, 2.0, 3.0))["counted"]
    assert numbers(server.shared) == [1.0, 2.0, 3.0]
