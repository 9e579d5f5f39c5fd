"""A trainer serves the rounds of a server elsewhere: what it computes is what it would have with the server in it."""

import contextlib
import json
import math
import subprocess
import sys
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path

import inside
import pytest
import torch
from conftest import make_lora, make_model, make_rows, max_difference
from fake_worker import Asking, ask, until
from peft import get_peft_model_state_dict
from safetensors.torch import load_file
from worker_run import CLIENTS, make_trainer, make_worker, rows_of

from hf_fedsa import FederatedCallback, FedSAVeraConfig, load_personalized_model
from hf_fedsa.messages import Broadcast, to_bytes
from hf_fedsa.run_lock import RunLockError
from hf_fedsa.server import Server, ServerSettings
from hf_fedsa.tensors import tensors_sha256
from hf_fedsa.worker import NoWorkerError, OverSocket, WorkerConnection, WorkerError
from hf_fedsa.worker.flat import to_flat


def make_vera(key=0):
    return FedSAVeraConfig(r=4, target_modules=["q_proj", "v_proj"], projection_prng_key=key)


class Rates(FederatedCallback):
    """Learning rate of every local step, by round, client and step."""

    def __init__(self):
        self.found = {}

    def on_round_begin(self, args, state, control, round_index, client_ids, **kwargs):
        self.round_index = round_index

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
        for client_id in inside.clients_in_slots(self.trainer):
            step = inside.wave_steps(self.trainer)
            self.found[self.round_index, client_id, step] = optimizer.param_groups[0]["lr"]


def watched(make, *arguments, **kwargs):
    rates = Rates()
    rates.trainer = make(*arguments, callbacks=[rates, *kwargs.pop("callbacks", [])], **kwargs)
    return rates.trainer, rates.found


@contextlib.contextmanager
def at_work(trainer):
    """A worker in a thread of its own. What it raises is raised here."""
    errors = []

    def train():
        try:
            trainer.train()
        except BaseException as error:
            errors.append(error)

    folder = worker_folder(trainer)
    thread = threading.Thread(target=train)
    thread.start()
    until(lambda: (folder / "worker.json").exists() or not thread.is_alive())
    try:
        yield folder
    finally:
        with contextlib.suppress(NoWorkerError), WorkerConnection(folder) as connection:
            connection.stop()
        thread.join(60)
        assert not thread.is_alive()
    if errors:
        raise errors[0]


def worker_folder(trainer) -> Path:
    return Path(trainer.args.output_dir) / "worker"


def stored(folder, client_id, store="clients"):
    """What a worker has stored of a client, by round."""
    files = sorted((folder / "client_store" / store / client_id).glob("round-*.safetensors"))
    return {int(path.stem.removeprefix("round-")): load_file(path) for path in files}


def request(trainer_or_shared, round_index=0, add=0.0, last=None, **fields):
    """A broadcast to one client or several, all of which have the same past."""
    shared = trainer_or_shared if isinstance(trainer_or_shared, dict) else trainer_or_shared.shared_state_dict()
    last_counted = last if isinstance(last, dict) else dict.fromkeys(CLIENTS, last)
    values = {"schedule_start": 3 * round_index, "schedule_steps": 15, "run_id": "a_run", **fields}
    shared = {key: tensor + add for key, tensor in shared.items()}
    return Broadcast(round_index, shared, last_counted=last_counted, **values)


def same(first, second):
    return tensors_sha256(first) == tensors_sha256(second)


def serve_round(server, folders, order=()):
    """
    One round of a server whose clients live in the workers of these folders, one worker after the other. Updates
    arrive as in `order`, or else in the order of the clients' ids.
    """
    client_ids, broadcast = server.begin_round()
    updates = {}
    for folder, living in folders.items():
        here = [client_id for client_id in client_ids if client_id in living]
        asking = {client_id: Asking(folder, client_id, broadcast, together=len(here)) for client_id in here}
        updates |= {client_id: one.get() for client_id, one in asking.items()}
    for client_id in [*order] or sorted(updates):
        assert server.receive(updates[client_id]) is None
    return server.end_round(0.0)


def make_server(trainer, folders, shared=None, **settings):
    """A server that samples as the one in a trainer does, of the clients in these workers."""
    infos = {}
    for folder in folders:
        with WorkerConnection(folder) as connection:
            infos |= {info.client_id: info for info in connection.infos()}
    args = trainer.args
    values = {"seed": args.seed, "num_rounds": args.num_rounds, "clients_per_round": args.clients_per_round}
    return Server(shared or trainer.shared_state_dict(), infos, ServerSettings(**values | settings), run_id="a_run")


class TestTheSameAsInProcess:
    @pytest.mark.parametrize(
        "arguments",
        [
            {"lr_scheduler_type": "cosine"},
            {"lr_scheduler_type": "linear", "local_steps": None, "local_epochs": 1},
            {"optim": "adamw_torch", "reset_optimizer": False, "aggregation_weighting": "uniform"},
        ],
        ids=["steps", "epochs", "kept optimizer"],
    )
    def test_five_clients_in_two_workers(self, tmp_path, arguments):
        common = {"num_rounds": 4, "clients_per_round": 3, **arguments}
        expected, rates = watched(make_trainer, tmp_path / "in_process", **common)
        halves = {"first": CLIENTS[:3], "second": CLIENTS[3:]}
        workers = {name: watched(make_worker, tmp_path / name, here, **arguments) for name, here in halves.items()}
        with contextlib.ExitStack() as stack:
            folders = {stack.enter_context(at_work(w)): w.client_ids for w, _ in workers.values()}
            server = make_server(expected, folders)
            expected.train()
            # The one in process receives updates as its clients take turns.
            turns = [[c for index, c, step in rates if index == r and step == 0] for r in range(4)]
            records = [serve_round(server, folders, order) for order in turns]
        found_rates = {key: rate for _, found in workers.values() for key, rate in found.items()}
        assert found_rates == rates and len(set(rates.values())) > 3
        for record, wanted in zip(records, expected.round_history, strict=True):
            for name in record.keys() - {"seconds", "step"}:
                assert record[name] == wanted[name], name
        assert same(server.shared, expected.shared_state_dict())
        took_part = {client_id: max(r["round"] for r in records if client_id in r["clients"]) for client_id in CLIENTS}
        assert len({*took_part.values()}) > 1
        for folder, client_ids in folders.items():
            for client_id in client_ids:
                assert same(stored(folder, client_id)[took_part[client_id]], expected.client_state_dict(client_id))
        for trainer, _ in workers.values():
            for client_id in trainer.client_ids:
                assert same(trainer.client_state_dict(client_id), expected.client_state_dict(client_id))

    def test_side_by_side_in_a_worker(self, tmp_path):
        expected = make_trainer(tmp_path / "in_process", num_rounds=2)
        worker = make_worker(tmp_path, parallel_clients=None)
        with at_work(worker) as folder:
            server = make_server(expected, [folder])
            expected.train()
            for _ in range(2):
                serve_round(server, {folder: CLIENTS})
        assert [len(record["clients"]) for record in worker.round_history] == [5, 5]
        assert worker.state.global_step < expected.state.global_step
        assert max_difference(server.shared, expected.shared_state_dict()) < 1e-6
        for client_id in CLIENTS:
            assert max_difference(worker.client_state_dict(client_id), expected.client_state_dict(client_id)) < 1e-6

    # Of one client alone, the Trainer's own loop would train whole passes.
    def test_a_worker_of_one_client(self, tmp_path):
        arguments = {"local_steps": None, "local_epochs": 1, "gradient_accumulation_steps": 2}
        expected, rates = watched(make_trainer, tmp_path / "in_process", num_rounds=1, **arguments)
        worker, found_rates = watched(make_worker, tmp_path, ["client_3"], **arguments)
        with at_work(worker) as folder:
            message = request(expected, schedule_steps=expected.args.num_rounds * 3)
            update = ask(folder, "client_3", message)
        expected.train()
        assert found_rates == {key: rate for key, rate in rates.items() if key[1] == "client_3"}
        [record] = expected.round_history
        assert update.metrics == {"loss": record["losses"]["client_3"]}
        assert update.weight == record["weights"]["client_3"] == len(rows_of("client_3"))
        assert same(worker.client_state_dict("client_3"), expected.client_state_dict("client_3"))


class TestRounds:
    def test_skipped_and_repeated(self, tmp_path):
        worker, rates = watched(make_worker, tmp_path, ["client_1"], lr_scheduler_type="linear")
        sent = {index: request(worker, index, last=last) for index, last in ((0, None), (3, 0), (4, 3))}
        with at_work(worker) as folder:
            for message in sent.values():
                first, steps = ask(folder, "client_1", to_bytes(message)), worker.state.global_step
                assert ask(folder, "client_1", to_bytes(message)) == first
                assert worker.state.global_step == steps
        assert worker.state.global_step == 9
        assert [record["round"] for record in worker.round_history] == [0, 3, 4]
        assert [rates[index, "client_1", 0] for index in sent] == pytest.approx([0.1, 0.1 * 6 / 15, 0.1 * 3 / 15])

    def test_the_schedule_gets_longer(self, tmp_path):
        worker, rates = watched(make_worker, tmp_path, ["client_1"], lr_scheduler_type="linear")
        with at_work(worker) as folder:
            for index, length in enumerate((9, 9, 18, 36)):
                message = request(worker, index, last=index - 1 if index else None, schedule_steps=length)
                ask(folder, "client_1", message)
        expected = [0.1 * (length - step) / length for length, step in ((9, 0), (9, 3), (18, 6), (36, 9))]
        assert [rates[index, "client_1", 0] for index in range(4)] == pytest.approx(expected)
        # Called again, it begins with a schedule of its own.
        first = next(iter(rates.items()))
        rates.clear()
        with at_work(worker) as folder:
            ask(folder, "client_1", request(worker, 4, last=3, schedule_steps=36))
        assert rates[4, "client_1", 0] == pytest.approx(0.1 * 24 / 36)
        assert first[1] == 0.1

    def test_without_an_end(self, tmp_path):
        worker, rates = watched(make_worker, tmp_path / "constant", ["client_1"], lr_scheduler_type="constant")
        with at_work(worker) as folder:
            for index in range(2):
                ask(folder, "client_1", request(worker, index, last=index - 1 if index else None, schedule_steps=None))
        assert set(rates.values()) == {0.1} and len(rates) == 6

    @pytest.mark.parametrize(
        ("arguments", "reason"),
        [
            ({"lr_scheduler_type": "cosine"}, "`lr_scheduler_type='cosine'` needs to know how many steps"),
            ({"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 0.1}, "`warmup_steps=0.1` is a fraction"),
        ],
    )
    def test_a_schedule_that_needs_an_end_is_refused_before_the_client_trains(self, tmp_path, arguments, reason):
        worker = make_worker(tmp_path, ["client_1"], **arguments)
        with at_work(worker) as folder:
            with pytest.raises(WorkerError, match=reason):
                ask(folder, "client_1", request(worker, schedule_steps=None))
            assert worker.state.global_step == 0 and stored(folder, "client_1") == {}
            assert ask(folder, "client_1", request(worker)).fault is None
            # Evaluating needs no schedule.
            with WorkerConnection(folder) as connection:
                assert connection.evaluate("client_1", request(worker, schedule_steps=None))["eval_loss"] > 0

    def test_what_is_to_train_is_what_trains_here(self, tmp_path):
        worker = make_worker(tmp_path, ["client_1"])
        with at_work(worker) as folder:
            with pytest.raises(
                WorkerError, match="`trained` is B, but with the method 'fedsa' .* A, B train in round 0"
            ):
                ask(folder, "client_1", request(worker, trained=("B",)))
        assert worker.round_history == []


class TestBByRound:
    @pytest.mark.parametrize("restarted", [False, True])
    def test_rounds_that_did_not_count_are_as_if_they_had_not_been(self, tmp_path, restarted):
        kept = {"optim": "adamw_torch", "learning_rate": 1e-2, "reset_optimizer": False}

        def run(folder, rounds):
            worker = make_worker(folder, ["client_1", "client_2"], **kept)
            shared = worker.shared_state_dict()
            parts = [[part] for part in rounds] if restarted else [rounds]
            for part in parts:
                worker = make_worker(folder, ["client_1", "client_2"], **kept) if restarted else worker
                with at_work(worker) as at:
                    for index, last in part:
                        message = request(shared, index, add=0.01 * index, last={"client_1": last, "client_2": 0})
                        update = ask(at, "client_1", message)
                        assert len(stored(at, "client_1")) <= 2 and len(stored(at, "client_1", "optimizers")) <= 2
            return update, stored(at, "client_1")[index], stored(at, "client_1", "optimizers")[index]

        # Two in a row, and then one that did.
        found = run(tmp_path / "found", [(0, None), (1, 0), (2, 0), (3, 0), (5, 3)])
        wanted = run(tmp_path / "wanted", [(0, None), (3, 0), (5, 3)])
        for first, second in zip(found[1:], wanted[1:], strict=True):
            assert same(first, second)
        assert same(found[0].shared, wanted[0].shared) and found[0].metrics == wanted[0].metrics
        if not restarted:
            # It is not the first round that did not count either.
            never = run(tmp_path / "never", [(1, None), (2, None), (3, None)])
            anew = run(tmp_path / "anew", [(3, None)])
            assert same(never[1], anew[1]) and same(never[2], anew[2]) and not same(never[1], found[1])

    def test_a_round_that_the_store_has_not_is_refused_and_the_worker_goes_on(self, tmp_path):
        worker = make_worker(tmp_path, ["client_1"])
        with at_work(worker) as folder:
            with pytest.raises(WorkerError, match="counted for client 'client_1' is 7, .*has the rounds of nobody"):
                ask(folder, "client_1", request(worker, 8, last=7))
            ask(folder, "client_1", request(worker, 0))
            with pytest.raises(WorkerError, match="is 7, .*which has the rounds 0. Put the store back"):
                ask(folder, "client_1", request(worker, 8, last=7))
            assert ask(folder, "client_1", request(worker, 8, last=0)).fault is None

    def test_a_store_of_a_simulation_is_not_overwritten(self, tmp_path):
        store = str(tmp_path / "store")
        make_trainer(tmp_path / "in_process", ["client_0", "client_1"], client_store_dir=store).train()
        with pytest.raises(ValueError, match="holds the clients of a run that has its server in it"):
            make_worker(tmp_path, ["client_1"], client_store_dir=store)


class TestFaults:
    def test_a_sole_client_that_is_left_out_answers(self, tmp_path):
        class Break(FederatedCallback):
            def on_step_begin(self, args, state, control, **kwargs):
                if state.global_step in (4, 7):
                    with torch.no_grad():
                        for parameter in inside.slot_parameters(worker, 0, "local").values():
                            parameter.fill_(math.nan)

        worker = make_worker(tmp_path, ["client_1"], callbacks=[Break()])
        with at_work(worker) as folder:
            ask(folder, "client_1", request(worker, 0))
            before = stored(folder, "client_1")
            update = ask(folder, "client_1", request(worker, 1, last=0))
            assert update.fault == "its loss is nan" and update.shared == {} and update.weight == 0.0
            after = stored(folder, "client_1")
            assert after.keys() == before.keys() == {0} and same(after[0], before[0])
            ask(folder, "client_1", request(worker, 2, last=0))
            assert ask(folder, "client_1", request(worker, 3, last=0)).fault is None
        assert [record["clients"] for record in worker.round_history] == [["client_1"], [], [], ["client_1"]]
        reference = make_worker(tmp_path / "reference", ["client_1"])
        with at_work(reference) as folder:
            ask(folder, "client_1", request(reference, 0))
            ask(folder, "client_1", request(reference, 3, last=0))
        assert same(worker.client_state_dict("client_1"), reference.client_state_dict("client_1"))

    def test_nothing_but_faults(self, tmp_path):
        class Break(FederatedCallback):
            def on_step_begin(self, args, state, control, **kwargs):
                with torch.no_grad():
                    for parameter in inside.slot_parameters(worker, 0, "local").values():
                        parameter.fill_(math.nan)

        worker = make_worker(tmp_path, ["client_1"], callbacks=[Break()])
        with at_work(worker) as folder:
            assert ask(folder, "client_1", request(worker)).fault == "its loss is nan"
        assert stored(folder, "client_1") == {}


class TestFingerprint:
    @pytest.fixture(scope="class")
    def fingerprint(self, tmp_path_factory):
        def of(**arguments):
            worker = make_worker(tmp_path_factory.mktemp("server"), ["client_0"], **arguments)
            with at_work(worker) as folder, WorkerConnection(folder) as connection:
                return connection.infos()[0].fingerprint

        return {"lora": of(), "vera": of(peft_config=make_vera())}

    @pytest.mark.parametrize(
        ("kind", "arguments", "name"),
        [
            ("lora", {"peft_config": make_lora(r=2)}, "adapter.r"),
            ("lora", {"peft_config": make_lora(lora_alpha=16)}, "adapter.lora_alpha"),
            ("lora", {"peft_config": make_lora(use_rslora=True)}, "adapter.use_rslora"),
            ("lora", {"peft_config": make_lora(use_dora=True)}, "adapter.use_dora"),
            ("lora", {"peft_config": make_lora(target_modules=["q_proj"])}, "adapter.target_modules"),
            ("lora", {"base": 1}, "base.weights"),
            ("vera", {"peft_config": ("vera", 1)}, "adapter.projection_prng_key"),
            ("vera", {}, "adapter[a-z._]*"),
        ],
    )
    def test_a_client_that_differs_is_refused_by_what_differs(self, tmp_path, fingerprint, kind, arguments, name):
        if "base" in arguments:
            arguments = {"base": make_model(seed=arguments["base"])}
        if isinstance(arguments.get("peft_config"), tuple):
            arguments = {"peft_config": make_vera(arguments["peft_config"][1])}
        worker = make_worker(tmp_path, ["client_0"], **arguments)
        with at_work(worker) as folder:
            with pytest.raises(WorkerError, match=f"client 'client_0' differ in `{name}`: "):
                ask(folder, "client_0", request(worker), fingerprint=fingerprint[kind])
        assert worker.state.global_step == 0

    def test_one_that_does_not_is_taken(self, tmp_path, fingerprint):
        # Neither rows nor training arguments need to be equal.
        worker = make_worker(tmp_path, ["client_3"], learning_rate=0.5, per_device_train_batch_size=1)
        with at_work(worker) as folder:
            assert ask(folder, "client_3", request(worker), fingerprint=fingerprint["lora"]).fault is None


class TestEvaluate:
    def test_between_rounds_it_changes_nothing(self, tmp_path):
        def run(folder, evaluates):
            worker = make_worker(folder, ["client_1", "client_2"], optim="adamw_torch", reset_optimizer=False)
            shared, found = worker.shared_state_dict(), []
            with at_work(worker) as at:
                for index in range(3):
                    last = {"client_1": index - 1 if index else None}
                    if evaluates:
                        with WorkerConnection(at) as connection:
                            for client_id in ("client_1", "client_2"):
                                message = request(shared, index, add=0.5 * index, last=last)
                                found.append(connection.evaluate(client_id, message))
                    ask(at, "client_1", request(shared, index, add=0.01 * index, last=last))
            return worker, found

        worker, found = run(tmp_path / "evaluated", evaluates=True)
        plain, _ = run(tmp_path / "plain", evaluates=False)
        assert same(worker.client_state_dict("client_1"), plain.client_state_dict("client_1"))
        lines = [line for line in worker.state.log_history if "grad_norm" in line]
        assert len(lines) == 9 and not any(name.startswith("eval") for line in lines for name in line)
        assert lines == [line for line in plain.state.log_history if "grad_norm" in line]
        # A client that has not trained has a B of zeros.
        assert len({metrics["eval_loss"] for metrics in found}) == 3

    def test_it_is_what_the_client_gets_in_process(self, tmp_path):
        expected = make_trainer(tmp_path / "in_process", ["client_1", "client_2"], num_rounds=1)
        worker = make_worker(tmp_path, ["client_1", "client_2"])
        with at_work(worker) as folder, WorkerConnection(folder) as connection:
            server = make_server(expected, [folder])
            expected.train()
            serve_round(server, {folder: ["client_1", "client_2"]})
            shared = expected.shared_state_dict()
            found = {c: connection.evaluate(c, request(shared, 1, last=0)) for c in ("client_1", "client_2")}
            with pytest.raises(WorkerError, match="`client_id='client_0'` does not live in this worker"):
                connection.evaluate("client_0", request(shared, 1))
        wanted = expected.evaluate()
        for client_id, metrics in found.items():
            assert metrics["eval_loss"] == wanted[f"eval_{client_id}_loss"]
            assert metrics["eval_mean_token_accuracy"] == wanted[f"eval_{client_id}_mean_token_accuracy"]
            assert metrics["num_examples"] == 3

    def test_without_rows(self, tmp_path):
        worker = make_worker(tmp_path, ["client_1"])
        worker.eval_dataset = None
        with at_work(worker) as folder, WorkerConnection(folder) as connection:
            with pytest.raises(WorkerError, match="Client 'client_1' has no evaluation rows here"):
                connection.evaluate("client_1", request(worker))
            assert ask(folder, "client_1", request(worker)).fault is None


class TestEnd:
    def test_stopped_it_saves_what_its_clients_serve_with(self, tmp_path):
        make_model().save_pretrained(tmp_path / "base")
        worker = make_worker(tmp_path, ["client_1", "client_2"], base=str(tmp_path / "base"))
        with at_work(worker) as folder:
            sent = request(worker, add=0.01)
            ask(folder, "client_1", sent)
        worker.save_model(str(tmp_path / "saved"))
        for client_id in ("client_1", "client_2"):
            model = load_personalized_model(tmp_path / "saved", client_id)
            assert same(
                get_peft_model_state_dict(model, adapter_name=model.active_adapter),
                {**sent.shared, **worker.client_state_dict(client_id)},
            )
        said = json.loads((tmp_path / "saved" / "federation.json").read_text())["clients"]
        assert [said[client_id]["last_round"] for client_id in ("client_1", "client_2")] == [0, None]
        assert max(t.abs().max() for t in worker.client_state_dict("client_1").values()) > 0

    def test_stopped_before_any_round(self, tmp_path, caplog):
        worker = make_worker(tmp_path, ["client_1"], eval_strategy="epoch", save_strategy="epoch")
        before = worker.shared_state_dict(), worker.client_state_dict("client_1")
        with at_work(worker):
            pass
        assert worker.state.global_step == 0 and worker.round_history == []
        assert same(worker.shared_state_dict(), before[0]) and same(worker.client_state_dict("client_1"), before[1])

    def test_evaluation_and_checkpoints_at_rounds_ends(self, tmp_path):
        worker = make_worker(tmp_path, ["client_1"], eval_strategy="epoch", save_strategy="epoch")
        with at_work(worker) as folder:
            first = ask(folder, "client_1", request(worker))
            second = ask(folder, "client_1", request(worker, 1, last=0))
        plain = make_worker(tmp_path / "plain", ["client_1"])
        with at_work(plain) as folder:
            assert same(ask(folder, "client_1", request(plain)).shared, first.shared)
            assert same(ask(folder, "client_1", request(plain, 1, last=0)).shared, second.shared)
        assert any("eval_client_1_loss" in line for line in worker.state.log_history)

    def test_an_error_in_training_reaches_those_who_wait(self, tmp_path):
        class Fail(FederatedCallback):
            def on_step_end(self, args, state, control, **kwargs):
                if state.global_step == 2 and not self.failed:
                    self.failed = True
                    raise FloatingPointError("the machine is on fire")

        fail = Fail()
        fail.failed = False
        worker = make_worker(tmp_path, ["client_1"], callbacks=[fail])
        with pytest.raises(FloatingPointError, match="on fire"):
            with at_work(worker) as folder:
                with pytest.raises(WorkerError, match="without an update of the client 'client_1'"):
                    ask(folder, "client_1", request(worker))
        # It can be started again, and the client has lost nothing.
        with at_work(worker) as folder:
            again = ask(folder, "client_1", request(worker))
        plain = make_worker(tmp_path / "plain", ["client_1"])
        with at_work(plain) as folder:
            assert same(ask(folder, "client_1", request(plain)).shared, again.shared)


class TestRefused:
    def test_to_resume(self, tmp_path):
        make_trainer(tmp_path, ["client_1", "client_2"], save_strategy="epoch").train()
        worker = make_worker(tmp_path, ["client_1", "client_2"])
        with pytest.raises(ValueError, match="`resume_from_checkpoint=True`, but the server is elsewhere"):
            worker.train(resume_from_checkpoint=True)

    @pytest.mark.parametrize("name", ["output_dir", "worker"])
    def test_a_second_worker(self, tmp_path, name):
        worker = make_worker(tmp_path, ["client_1"])
        folders = {"output_dir": tmp_path / "other", "worker": worker_folder(worker)}
        where = tmp_path if name == "output_dir" else tmp_path / "other"
        other = make_worker(where, ["client_1"], transport=OverSocket(folders[name]))
        with at_work(worker) as folder:
            with pytest.raises(RunLockError):
                other.train()
            assert ask(folder, "client_1", request(worker)).fault is None

    @pytest.mark.parametrize(
        ("arguments", "reason"),
        [
            ({"num_rounds": 3}, "`num_rounds=3` is for the server to say"),
            ({"clients_per_round": 1}, "`clients_per_round=1` is for the server to say"),
            ({"clients_per_round": 5}, "`clients_per_round=5` is for the server to say"),
            ({"min_clients_per_round": 2}, "`min_clients_per_round=2` is for the server to say"),
            ({"client_sampling": "examples"}, "`client_sampling='examples'` is for the server to say"),
            ({"client_sampler": len}, "`client_sampler=.*` is for the server to say"),
            ({"rows": make_rows(4, seed=0)}, "`train_dataset` names none. Pass a dictionary"),
            ({"optim": "schedule_free_adamw", "reset_optimizer": False}, "holds a second copy of the weights"),
        ],
    )
    def test_what_cannot_work(self, tmp_path, arguments, reason):
        with pytest.raises(ValueError, match=reason):
            make_worker(tmp_path, ["client_1"], **arguments)

    def test_clients_that_come_and_go_while_it_is_at_work(self, tmp_path):
        class Change(FederatedCallback):
            def on_round_end(self, args, state, control, trainer, **kwargs):
                with pytest.raises(RuntimeError, match="`add_client` while this worker is at work"):
                    trainer.add_client("client_3", rows_of("client_3"))
                with pytest.raises(RuntimeError, match="`remove_client` while this worker is at work"):
                    trainer.remove_client("client_2")
                self.called = True

        change = Change()
        worker = make_worker(tmp_path, ["client_1", "client_2"], callbacks=[change])
        with at_work(worker) as folder:
            ask(folder, "client_1", request(worker))
        assert change.called
        worker.add_client("client_3", rows_of("client_3"))
        worker.remove_client("client_2")
        with at_work(worker) as folder:
            with WorkerConnection(folder) as connection:
                assert [info.client_id for info in connection.infos()] == ["client_1", "client_3"]
            assert ask(folder, "client_3", request(worker, 1)).weight == 6
            assert ask(folder, "client_1", request(worker, 2, last=0)).fault is None


def test_neither_b_nor_rows_cross_the_socket(tmp_path, monkeypatch):
    crossed = []
    for name, of_result in (("send_bytes", False), ("recv_bytes", True)):
        method = getattr(Connection, name)

        def note(self, *arguments, method=method, of_result=of_result):
            result = method(self, *arguments)
            crossed.append(bytes(result if of_result else arguments[0]))
            return result

        monkeypatch.setattr(Connection, name, note)
    worker = make_worker(tmp_path, ["client_1", "client_2"])
    b = []
    with at_work(worker) as folder:
        shared = worker.shared_state_dict()
        for index in range(2):
            last = index - 1 if index else None
            for form in (to_flat, lambda message: message):
                update = ask(folder, "client_1", form(request(shared, index, last={"client_1": last})))
            with WorkerConnection(folder) as connection:
                connection.evaluate("client_1", request(shared, index))
                connection.infos()
            b += [tensor for tensors in stored(folder, "client_1").values() for tensor in tensors.values()]
    everything = b"".join(crossed)
    returned = [row.numpy().tobytes() for tensor in update.shared.values() for row in tensor]
    assert len(crossed) > 20 and all(row in everything for row in returned)
    assert len(b) >= 28 and not any(row.numpy().tobytes() in everything for tensor in b for row in tensor)
    for row in worker.train_dataset:
        assert rows_of("client_1")[0]["text"].encode() not in everything
        for numbers in (row["input_ids"], row["input_ids"][:4]):
            assert torch.tensor(numbers).numpy().tobytes() not in everything
            assert torch.tensor(numbers, dtype=torch.int32).numpy().tobytes() not in everything
            assert json.dumps(numbers).encode()[1:-1] not in everything


class Process:
    """A worker in a process of its own, made beforehand, and at work when it is told to."""

    def __init__(self, folder, client_ids, hang=None):
        self.folder = folder / "worker"
        arguments = [json.dumps(value) for value in (client_ids, {}, *([hang] if hang else []))]
        command = [sys.executable, str(Path(__file__).with_name("worker_run.py")), str(folder), *arguments]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, text=True, **pipes)

    def begin(self):
        (self.folder / "worker.json").unlink(missing_ok=True)
        self.process.stdin.write("begin\n")
        self.process.stdin.flush()
        deadline = time.monotonic() + 60
        while not (self.folder / "worker.json").exists():
            assert self.process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)

    def said_that_it_hangs(self):
        return any(line == "hangs\n" for line in self.process.stdout)

    def kill(self):
        self.process.kill()
        self.process.wait(20)
        self.process.stdout.close()
        self.process.stdin.close()


def test_a_killed_worker_goes_on_bit_for_bit(tmp_path):
    here, elsewhere = CLIENTS[:3], CLIENTS[3:]
    processes = [Process(tmp_path / "killed", here, hang) for hang in (None, ["client_2", 1], None)]
    try:
        expected, rates = watched(make_trainer, tmp_path / "in_process", num_rounds=3)
        shared = expected.shared_state_dict()
        expected.train()
        turns = [[c for index, c, step in rates if index == r and step == 0] for r in range(3)]
        with at_work(make_worker(tmp_path / "other", elsewhere)) as other:
            first_one, second_one, third_one = processes
            first_one.begin()
            folder = first_one.folder
            folders = {folder: here, other: elsewhere}
            server = make_server(expected, folders, shared=shared)
            _, first = server.begin_round()
            serve_round(server, folders, turns[0])
            answered = ask(folder, "client_2", to_bytes(first))

            # Killed after it has answered: a repeat is answered from the outbox, and the next round goes on.
            first_one.kill()
            path = folder / "client_store" / "clients" / "client_2" / "round-0.safetensors"
            written = path.stat().st_mtime_ns
            second_one.begin()
            assert ask(folder, "client_2", to_bytes(first)) == answered
            assert path.stat().st_mtime_ns == written

            # Killed in the middle of training: a repeat trains from the B before.
            _, second = server.begin_round()
            asking = Asking(folder, "client_2", second)
            assert second_one.said_that_it_hangs()
            second_one.kill()
            with pytest.raises(NoWorkerError):
                asking.get()
            third_one.begin()
            for order in turns[1:]:
                serve_round(server, folders, order)
            with WorkerConnection(folder) as connection:
                connection.stop()
            assert third_one.process.wait(30) == 0
    finally:
        for process in processes:
            process.kill()
    assert same(server.shared, expected.shared_state_dict())
    for record, wanted in zip(server.state.history, expected.round_history, strict=True):
        assert record["losses"] == wanted["losses"] and record["weights"] == wanted["weights"]
    for place, client_ids in folders.items():
        for client_id in client_ids:
            assert same(stored(place, client_id)[2], expected.client_state_dict(client_id))


@pytest.mark.parametrize("line", ["import hf_fedsa.worker.connection", "from hf_fedsa.worker import WorkerConnection"])
def test_to_ask_a_worker_is_light(line):
    code = (
        f"import sys, time; start = time.process_time(); {line}; print(time.process_time() - start, "
        "*sorted({'torch', 'transformers', 'numpy', 'safetensors', 'peft', 'datasets'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    seconds, *loaded = done.stdout.split()
    assert loaded == [] and float(seconds) < 0.5
