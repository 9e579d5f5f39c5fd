"""Aggregators that a few clients cannot take along: by hand, against plain NumPy, in a server and in a run."""

import math

import inside
import numpy as np
import pytest
import torch
from conftest import make_args, make_lora, make_model, make_rows, make_tokenizer, max_difference
from three_floats import KEPT, Processes, make_server, make_update, numbers, through_bytes, value
from transformers import TrainerCallback

from hf_fedsa import FederatedConfig, FederatedTrainer
from hf_fedsa.config import ARGUMENTS_IN_CARD, server_settings
from hf_fedsa.server.aggregation import AGGREGATORS, check_aggregator, make_aggregator, weighted_mean

ROBUST = ("median", "trimmed_mean", "krum")


def aggregate(aggregator, clients, weights=None):
    for client_id, values in clients.items():
        aggregator.add(client_id, {"a": torch.tensor(values)}, (weights or {}).get(client_id, 1.0))
    return aggregator.result()["a"].tolist()


def random_clients(num_clients, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        f"c{i:02d}": {"a": torch.randn(4, 6, generator=generator), "b": torch.randn(5, generator=generator)}
        for i in range(num_clients)
    }


def krum_in_numpy(rows, byzantine):
    distances = ((rows[:, None] - rows[None]) ** 2).sum(axis=-1)
    scores = [np.sort(np.delete(row, i))[: len(rows) - byzantine - 2].sum() for i, row in enumerate(distances)]
    return rows[int(np.argmin(scores))]


class TestByHand:
    def test_median_of_three_and_of_four(self):
        clients = {"a": [1.0, 9.0], "b": [5.0, 2.0], "c": [99.0, 4.0]}
        assert aggregate(make_aggregator("median"), clients) == [5.0, 4.0]
        assert aggregate(make_aggregator("median"), {**clients, "d": [2.0, -99.0]}) == [3.5, 3.0]

    @pytest.mark.parametrize(
        ("trim_fraction", "expected"), [(0.0, 23.0), (0.2, 4.0), (0.39, 4.0), (0.4, 3.0), (0.49, 3.0), (None, 23.0)]
    )
    def test_trimmed_mean_of_five(self, trim_fraction, expected):
        clients = {"a": [1.0], "b": [103.0], "c": [3.0], "d": [8.0], "e": [0.0]}
        assert aggregate(make_aggregator("trimmed_mean", trim_fraction=trim_fraction), clients) == [expected]

    def test_what_is_cut_is_not_less_for_a_rounding_of_the_product(self):
        assert 0.29 * 100 < 29
        clients = {f"{i:03d}": [float(i >= 71)] for i in range(100)}
        assert aggregate(make_aggregator("trimmed_mean", trim_fraction=0.29), clients) == [0.0]

    def test_krum_of_five(self):
        # One may be bad, so two neighbours count: 0 -> 1 + 4, 1 -> 1 + 1, 2 -> 1 + 4, 4 -> 4 + 9, 50 -> far.
        clients = {"a": [0.0], "b": [1.0], "c": [2.0], "d": [4.0], "e": [50.0]}
        assert aggregate(make_aggregator("krum", krum_byzantine=1), clients) == [1.0]
        # None may be bad, so three count, 50 not among them: 0 -> 21, 1 -> 11, 2 -> 9.
        assert aggregate(make_aggregator("krum", krum_byzantine=0), clients) == [2.0]

    def test_krum_of_equal_scores_takes_the_smaller_id(self):
        # Of three, the nearest one counts, which is as far from each of them.
        numbers_of = {"a": [1.0], "b": [4.0], "c": [7.0]}
        for order in ("abc", "cba"):
            assert aggregate(make_aggregator("krum"), {c: numbers_of[c] for c in order}) == [1.0]

    def test_krum_measures_all_tensors_together(self):
        # By "x" alone it would be b, by both it is c.
        clients = {"a": (0.0, 0.0), "b": (1.0, 90.0), "c": (3.0, 1.0), "d": (7.0, 2.0), "e": (2.0, -90.0)}
        aggregator = make_aggregator("krum", krum_byzantine=1)
        for client_id, (x, y) in clients.items():
            aggregator.add(client_id, {"x": torch.tensor([x]), "y": torch.tensor([[y]])}, 1.0)
        assert {key: tensor.item() for key, tensor in aggregator.result().items()} == {"x": 3.0, "y": 1.0}

    def test_as_many_bad_ones_as_fit_are_the_default(self):
        for num_clients, byzantine in ((3, 0), (4, 0), (5, 1), (6, 1), (7, 2)):
            clients = random_clients(num_clients, seed=num_clients)
            results = []
            for given in (None, byzantine):
                aggregator = make_aggregator("krum", krum_byzantine=given)
                for client_id, tensors in clients.items():
                    aggregator.add(client_id, tensors, 1.0)
                results.append(aggregator.result())
            assert max_difference(*results) == 0


class TestNumpy:
    @pytest.mark.parametrize("num_clients", [3, 4, 7, 20])
    @pytest.mark.parametrize("seed", range(3))
    def test_it_is_the_rule_in_float64(self, num_clients, seed):
        clients = random_clients(num_clients, seed)
        rows = np.stack([np.concatenate([t["a"].flatten(), t["b"]]) for t in clients.values()]).astype(np.float64)
        cut = int(0.3 * num_clients + 1e-9)
        byzantine = (num_clients - 3) // 2
        expected = {
            "median": np.median(rows, axis=0),
            "trimmed_mean": np.sort(rows, axis=0)[cut : num_clients - cut].mean(axis=0),
            "krum": krum_in_numpy(rows, byzantine),
        }
        for name in ROBUST:
            aggregator = make_aggregator(name, trim_fraction=0.3 if name == "trimmed_mean" else None)
            for client_id, tensors in clients.items():
                aggregator.add(client_id, tensors, 1.0)
            result = aggregator.result()
            found = np.concatenate([result["a"].flatten(), result["b"]])
            np.testing.assert_allclose(found, expected[name], rtol=0, atol=1e-6)


class TestEvery:
    @pytest.mark.parametrize("name", AGGREGATORS)
    def test_nobody(self, name):
        assert make_aggregator(name).result() == {}

    @pytest.mark.parametrize("name", ROBUST)
    def test_order_and_weights_do_not_matter(self, name):
        clients = random_clients(6)
        results = []
        for order in (sorted(clients), sorted(clients, reverse=True)):
            aggregator = make_aggregator(name)
            for i, client_id in enumerate(order):
                aggregator.add(client_id, clients[client_id], 1.0 + 100 * i)
            results.append(aggregator.result())
        assert max_difference(*results) == 0

    @pytest.mark.parametrize("name", AGGREGATORS)
    def test_it_keeps_fp32_copies_and_leaves_what_it_is_given(self, name):
        aggregator = make_aggregator(name)
        given = [{"a": torch.tensor([0.5 + i, 1.0], dtype=torch.bfloat16)} for i in (0, 2, 1)]
        before = [tensors["a"].clone() for tensors in given]
        for client_id, tensors in zip("abc", given, strict=True):
            aggregator.add(client_id, tensors, 1.0)
        assert all(torch.equal(tensors["a"], saved) for tensors, saved in zip(given, before, strict=True))
        for tensors in given:
            tensors["a"].fill_(1e6)
        result = aggregator.result()["a"]
        assert result.dtype == torch.float32
        assert result.tolist() == ([0.5, 1.0] if name == "krum" else [1.5, 1.0])

    @pytest.mark.parametrize("name", AGGREGATORS)
    def test_what_cannot_be_added(self, name):
        aggregator = make_aggregator(name)
        aggregator.add("a", {"a": torch.ones(2)}, 1.0)
        for tensors, weight, problem in (
            ({"a": torch.ones(2)}, math.nan, "`weight` must be a positive number"),
            ({"b": torch.ones(2)}, 1.0, "differ from the earlier ones' in 'a'"),
            ({"a": torch.ones(3)}, 1.0, "has shape"),
        ):
            with pytest.raises(ValueError, match=problem):
                aggregator.add("b", tensors, weight)

    @pytest.mark.parametrize("name", ROBUST)
    def test_a_client_counts_once(self, name):
        aggregator = make_aggregator(name)
        aggregator.add("a", {"a": torch.ones(2)}, 1.0)
        with pytest.raises(ValueError, match="Client 'a' has been added already"):
            aggregator.add("a", {"a": torch.ones(2)}, 1.0)

    def test_krum_of_too_few(self):
        aggregator = make_aggregator("krum", krum_byzantine=1)
        for client_id in "abcd":
            aggregator.add(client_id, {"a": torch.ones(2)}, 1.0)
        with pytest.raises(ValueError, match="`aggregator='krum'` needs 5 clients in a round, but 4 have"):
            aggregator.result()


WRONG = [
    ({"aggregator": "mode"}, ValueError, "`aggregator` must be one of 'mean', 'median', 'trimmed_mean', 'krum', got"),
    ({"trim_fraction": 0.1}, ValueError, "an argument of `aggregator='trimmed_mean'`, but `aggregator='mean'`"),
    ({"aggregator": "median", "krum_byzantine": 1}, ValueError, "an argument of `aggregator='krum'`"),
    ({"aggregator": "trimmed_mean", "trim_fraction": 0.5}, ValueError, r"must be in \[0, 0.5\), got 0.5"),
    ({"aggregator": "trimmed_mean", "trim_fraction": -0.1}, ValueError, r"must be in \[0, 0.5\), got -0.1"),
    ({"aggregator": "trimmed_mean", "trim_fraction": math.nan}, ValueError, r"must be in \[0, 0.5\), got nan"),
    ({"aggregator": "trimmed_mean", "trim_fraction": "0.1"}, TypeError, "`trim_fraction` must be a number or None"),
    ({"aggregator": "krum", "krum_byzantine": -1}, ValueError, "`krum_byzantine` must be at least 0, got -1"),
    ({"aggregator": "krum", "krum_byzantine": 1.0}, TypeError, "`krum_byzantine` must be an int or None, got 1.0"),
]


class TestArguments:
    @pytest.mark.parametrize(("arguments", "error", "problem"), WRONG)
    def test_the_same_is_refused_everywhere(self, tmp_path, arguments, error, problem):
        name, others = arguments.get("aggregator", "mean"), {k: v for k, v in arguments.items() if k != "aggregator"}
        for make in (
            lambda: check_aggregator(name, **others),
            lambda: make_aggregator(name, **others),
            lambda: make_server("abc", **arguments),
            lambda: make_args(tmp_path, **arguments),
        ):
            with pytest.raises(error, match=problem):
                make()

    def test_they_reach_the_server_and_the_card(self, tmp_path):
        args = make_args(tmp_path, aggregator="trimmed_mean", trim_fraction=0.3)
        settings = server_settings(args)
        assert (settings.aggregator, settings.trim_fraction, settings.krum_byzantine) == ("trimmed_mean", 0.3, None)
        assert settings.new_aggregator().trim_fraction == 0.3
        assert server_settings(make_args(tmp_path, aggregator="krum", krum_byzantine=2)).krum_byzantine == 2
        assert {"aggregator", "trim_fraction", "krum_byzantine"} <= {*ARGUMENTS_IN_CARD}
        assert FederatedConfig.__dataclass_fields__["aggregator"].metadata["choices"] == [*AGGREGATORS]

    @pytest.mark.parametrize(
        ("clients_per_round", "krum_byzantine", "given", "needed"),
        [(4, 1, " with `krum_byzantine=1`", 5), (2, None, "", 3)],
    )
    def test_krum_needs_clients(self, tmp_path, clients_per_round, krum_byzantine, given, needed):
        krum = {"aggregator": "krum", "krum_byzantine": krum_byzantine, "clients_per_round": clients_per_round}
        problem = f"`aggregator='krum'`{given} needs {needed} clients in a round .*a round has {clients_per_round}, so"
        with pytest.raises(ValueError, match=problem):
            make_server("abcdef", **krum)
        make_server("abcdef", **{**krum, "clients_per_round": needed})
        with pytest.raises(ValueError, match=problem):
            FederatedTrainer(  # Before the model loads, which is not there.
                model=str(tmp_path / "nowhere"),
                args=make_args(tmp_path, **krum),
                train_dataset={f"client_{i}": make_rows(4, seed=i) for i in range(6)},
                peft_config=make_lora(),
            )

    @pytest.mark.parametrize(("trim_fraction", "warns"), [(None, True), (0.2, True), (0.34, False), (0.0, False)])
    def test_a_trimmed_mean_that_trims_nothing_is_almost_surely_a_mistake(
        self, tmp_path, caplog, trim_fraction, warns
    ):
        FederatedTrainer(
            model=make_model(),
            args=make_args(tmp_path, aggregator="trimmed_mean", trim_fraction=trim_fraction),
            train_dataset={f"client_{i}": make_rows(4, seed=i) for i in range(3)},
            peft_config=make_lora(),
            processing_class=make_tokenizer(),
        )
        assert ("cuts none of the 3 clients of a round" in caplog.text) == warns


CHANGES = {
    "a": [3.1, 0.0, 4.0],
    "b": [3.0, 0.2, 4.1],
    "c": [2.9, 0.1, 4.2],
    "d": [3.0, 0.1, 4.0],
    "e": [9.0, 1.0, 4.0],
}


def begun(name, clients="abcdef", **settings):
    server = make_server(clients, aggregator=name, **settings)
    server.begin_round()
    return server


class TestServer:
    @pytest.mark.parametrize("name", AGGREGATORS)
    @pytest.mark.parametrize("stopped_after", range(6))
    def test_going_on_in_the_middle_of_a_round(self, name, stopped_after):
        updates = [make_update(c, v, weight=1.0 + i) for i, (c, v) in enumerate(CHANGES.items())]
        whole, first = begun(name), begun(name)
        for update in updates:
            whole.receive(update)
        for update in updates[:stopped_after]:
            first.receive(update)
        second = make_server("abcdef", aggregator=name)
        second.load_state_dict(*through_bytes(first))
        assert value(second) == value(first)
        for update in updates[stopped_after:]:
            assert second.receive(update) is None
        assert second.end_round(1.0) == whole.end_round(1.0)
        assert value(second) == value(whole)

    @pytest.mark.parametrize("name", ROBUST)
    def test_what_is_held_is_a_part_for_each_client(self, name):
        server = begun(name, max_update_norm=None)
        for client_id in "ab":
            server.receive(make_update(client_id, CHANGES[client_id]))
        tensors, state = server.state_dict()
        assert {part for part, _, _ in (key.rpartition("|") for key in tensors)} == {
            "shared",
            "initial_shared",
            "update|a",
            "update|b",
        }
        assert "mean_weight" not in state
        server.end_round(0.0)
        assert not any(key.startswith("update") for key in server.state_dict()[0])

    @pytest.mark.parametrize("name", ROBUST)
    def test_a_round_of_another_aggregator_is_not_gone_on_with_but_an_end_is(self, name):
        for first, second in (("mean", name), (name, "mean")):
            server, other = begun(first), make_server("abcdef", aggregator=second)
            other.load_state_dict(*through_bytes(server))
            for client_id in "abc":
                server.receive(make_update(client_id, CHANGES[client_id]))
            before = value(other)
            with pytest.raises(ValueError, match=f"with `aggregator='{second}'`"):
                other.load_state_dict(*through_bytes(server))
            assert value(other) == before
            server.end_round(0.0)
            other.load_state_dict(*through_bytes(server))
            assert numbers(other.shared) == numbers(server.shared)

    def test_the_settings_of_the_next_round_may_be_others(self):
        server = begun("mean", max_update_norm=None)
        other = make_server("abcdef", aggregator="median", max_update_norm=None).settings
        for client_id, numbers_of in CHANGES.items():
            server.receive(make_update(client_id, numbers_of))
        server.end_round(0.0)
        server.settings = other
        server.begin_round()
        for client_id, numbers_of in CHANGES.items():
            server.receive(make_update(client_id, numbers_of, round_index=1))
        server.end_round(0.0)
        np.testing.assert_allclose(numbers(server.shared), [3.0, 0.1, 4.0], atol=1e-6)

    @pytest.mark.parametrize("name", AGGREGATORS)
    @pytest.mark.parametrize("limit", ["auto", None])
    def test_replicas_are_one_server(self, name, limit):
        shares = [["e", "a"], ["c", "d", "b"], []]
        settings = {"trim_fraction": 0.2} if name == "trimmed_mean" else {}
        one, *replicas = (begun(name, max_update_norm=limit, **settings) for _ in range(4))
        processes = Processes(3)
        for client_id, numbers_of in CHANGES.items():
            one.receive(make_update(client_id, numbers_of))
        for server, share in zip(replicas, shares, strict=True):
            for client_id in share:
                server.receive(make_update(client_id, CHANGES[client_id]))
        processes.run(replicas)
        assert all(value(server) == value(replicas[0]) for server in replicas)
        one.end_round(0.0)
        for server in replicas:
            server.end_round(0.0)
            tolerance = 1e-6 if name == "mean" else 0
            np.testing.assert_allclose(numbers(server.shared), numbers(one.shared), rtol=0, atol=tolerance)
        facts = ["gather"] if limit == "auto" else []
        exchange = ["all_reduce 4"] if name == "mean" else ["gather", f"all_reduce {4 if limit else 5}"]
        assert processes.calls == [*facts, *exchange, "gather"]

    @pytest.mark.parametrize("name", ROBUST)
    def test_nobody_in_any_process(self, name):
        processes, replicas = Processes(2), [begun(name), begun(name)]
        processes.run(replicas)
        assert [server.end_round(0.0) for server in replicas] == [None, None]

    @pytest.mark.parametrize("forget", [False, True])
    def test_who_leaves_after_it_has_answered_stays_in_the_round(self, forget):
        server = begun("median", max_update_norm=None)
        for client_id, numbers_of in CHANGES.items():
            server.receive(make_update(client_id, numbers_of))
        server.deregister("e", forget=forget)
        record = server.end_round(0.0)
        np.testing.assert_allclose(numbers(server.shared), np.median([*CHANGES.values()], axis=0), atol=1e-6)
        assert record["clients"] == ([*"abcd"] if forget else [*"abcde"])

    def test_a_round_of_too_few_for_krum_does_not_count(self, caplog):
        server = begun("krum", krum_byzantine=1)
        for client_id in "abcd":
            server.receive(make_update(client_id, CHANGES[client_id]))
        record = server.end_round(0.0)
        assert not record["counted"] and numbers(server.shared) == [3.0, 0.0, 4.0]
        assert server.state.last_round == {}
        assert caplog.messages == [
            "Round 0 does not count: 4 clients returned an update, and `aggregator=krum` needs 5. What is shared "
            "stays as it was."
        ]

    def test_where_a_is_not_trained_krum_needs_nobody(self):
        server = begun("krum", sharing=KEPT)
        server.receive(make_update("a", shared={}))
        assert server.end_round(0.0)["counted"]


class TestOneBadClient:
    """Of five, it returns its change times 100 or -10, which is of no size that anybody judges here."""

    HONEST = {"a": [3.1, 0.1, 4.0], "b": [3.0, 0.2, 4.1], "c": [3.1, 0.1, 4.1], "d": [3.0, 0.1, 4.0]}

    @pytest.mark.parametrize("scale", [100, -10])
    @pytest.mark.parametrize("bad", ["0", "e"])
    def test_it_takes_the_mean_along_and_no_other(self, scale, bad):
        wrong = [3.0 + 0.1 * scale, 0.15 * scale, 4.0 + 0.1 * scale]
        honest = np.array([*self.HONEST.values()])
        for name in AGGREGATORS:
            settings = {"trim_fraction": 0.2} if name == "trimmed_mean" else {}
            server = begun(name, ["a", "b", "c", "d", bad], max_update_norm=None, **settings)
            for client_id, numbers_of in {**self.HONEST, bad: wrong}.items():
                server.receive(make_update(client_id, numbers_of))
            server.end_round(0.0)
            found = np.array(numbers(server.shared))
            within = np.all((found >= honest.min(axis=0) - 1e-6) & (found <= honest.max(axis=0) + 1e-6))
            assert within == (name != "mean"), name


class Scale(TrainerCallback):
    """Makes the change of A that one client returns `scale` times as large."""

    def __init__(self, client_id, scale, last_step):
        self.client_id, self.scale, self.last_step = client_id, scale, last_step

    def on_optimizer_step(self, args, state, control, **kwargs):
        slot = inside.slot_of(self.trainer, self.client_id)
        if slot is not None and inside.wave_steps(self.trainer) == self.last_step:
            sent = self.trainer.shared_state_dict()
            with torch.no_grad():
                for key, parameter in inside.slot_parameters(self.trainer, slot, "shared").items():
                    parameter.copy_(sent[key] + self.scale * (parameter - sent[key]))


def make_trainer(output_dir, sizes=(8,) * 5, scale=None, **kwargs):
    values = {"num_rounds": 2, "local_steps": 3, "parallel_clients": 5, **kwargs}
    trainer = FederatedTrainer(
        model=make_model(),
        args=make_args(output_dir, **values),
        train_dataset={f"client_{i}": make_rows(n, seed=i) for i, n in enumerate(sizes)},
        peft_config=make_lora(),
        processing_class=make_tokenizer(),
    )
    if scale is not None:
        bad = Scale("client_1", scale, last_step=values["local_steps"] - 1)
        bad.trainer = trainer
        trainer.add_callback(bad)
    return trainer


class TestRuns:
    @pytest.mark.parametrize("name", AGGREGATORS)
    def test_resumed_in_the_middle_of_a_round(self, tmp_path, name):
        common = {"aggregator": name, "parallel_clients": 2, "save_strategy": "steps", "save_steps": 5}
        whole = make_trainer(tmp_path, **common)
        whole.train()
        again = make_trainer(tmp_path, **common)
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
        assert max_difference(again.shared_state_dict(), whole.shared_state_dict()) == 0
        assert max_difference(again.shared_state_dict(), inside.initial_shared(again)) > 0

    def test_another_aggregator_is_another_run(self, tmp_path):
        make_trainer(tmp_path, save_strategy="epoch").train()
        with pytest.raises(ValueError, match="aggregator"):
            make_trainer(tmp_path, aggregator="median").train(resume_from_checkpoint=True)
        changed = make_trainer(
            tmp_path, aggregator="median", num_rounds=3, resume_with_changes=["aggregator", "num_rounds"]
        )
        changed.train(resume_from_checkpoint=True)
        assert len(changed.round_history) == 3

    @pytest.mark.parametrize("rate", [5e-4, 1e-2])
    def test_a_change_scaled_by_ten_is_left_out_by_default(self, tmp_path, rate):
        trainer = make_trainer(
            tmp_path, scale=10, local_steps=10, num_rounds=2, learning_rate=rate, lr_scheduler_type="constant"
        )
        trainer.train()
        # In the first round A has hardly moved at the lower rate: B starts at zero.
        found = [list(entry["left_out"]) for entry in trainer.round_history]
        assert found[1] == ["client_1"] and found[0] in ([], ["client_1"]), found

    @pytest.mark.parametrize("optim", ["adamw_torch", "sgd"])
    @pytest.mark.parametrize("rate", [1e-3, 1e-1])
    def test_no_honest_client_is_left_out_however_unequal_their_rows_are(self, tmp_path, optim, rate):
        trainer = make_trainer(
            tmp_path,
            sizes=(1, 1, 2, 3, 30),
            optim=optim,
            learning_rate=rate,
            local_steps=None,
            local_epochs=1,
            per_device_train_batch_size=1,
        )
        trainer.train()
        assert [entry["left_out"] for entry in trainer.round_history] == [{}, {}]


def test_the_mean_is_the_streaming_one():
    clients = random_clients(7)
    aggregator = make_aggregator("mean")
    for i, (client_id, tensors) in enumerate(clients.items()):
        aggregator.add(client_id, tensors, 1.0 + i)
    expected = weighted_mean((tensors, 1.0 + i) for i, tensors in enumerate(clients.values()))
    assert max_difference(aggregator.result(), expected) == 0
