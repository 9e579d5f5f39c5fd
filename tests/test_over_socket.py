"""A resident worker and those who ask it: trained once, by its own user, in one federation, and never by a pickle."""

import contextlib
import dataclasses
import json
import logging
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
from multiprocessing.connection import Client, answer_challenge
from pathlib import Path

import pytest
import torch

from hf_fedsa import outbox, worker, worker_connection, worker_socket
from hf_fedsa.flat import from_flat, to_flat
from hf_fedsa.messages import Broadcast, ClientInfo, MessageError, Update, from_bytes, to_bytes
from hf_fedsa.run_lock import RunLockError
from hf_fedsa.tensors import layout_sha256, tensors_sha256
from hf_fedsa.worker import OverSocket
from hf_fedsa.worker_connection import FlatMessage, NoWorkerError, WorkerConnection, WorkerError, pack, unpack

PACKAGE = Path(worker.__file__).parent
MODULES = [Path(module.__file__) for module in (worker, worker_connection, worker_socket, outbox)]
LIKE = {"q.lora_A": torch.zeros(2, 3, dtype=torch.bfloat16), "v.lora_A": torch.zeros(2)}
FINGERPRINT = {"base_model": "tiny", "adapter": {"r": 2, "target_modules": ["q", "v"]}}


def broadcast(round_index=0, value=1.0, **fields):
    shared = {key: torch.full_like(tensor, value) for key, tensor in LIKE.items()}
    return Broadcast(**{"round_index": round_index, "shared": shared, "run_id": "a_run", **fields})


def facts(message):
    return dataclasses.replace(message, shared={}), tensors_sha256(message.shared)


class FakeTrainer:
    """Pulls rounds, and trains by adding 1 to A and counting. Each client's own value is what it has added up."""

    def __init__(self, folder, clients=("ann", "bob"), pause=0.0, **arguments):
        self.transport = OverSocket(folder, **{"wait": 0.0, **arguments})
        self.clients = clients
        self.pause = pause
        self.rounds = []
        self.trained = []
        self.may_train = threading.Event()
        self.may_train.set()
        self.thread_of_evaluation = None

    def client_infos(self):
        return [ClientInfo(client_id, num_rows=4, num_steps=2, fingerprint=FINGERPRINT) for client_id in self.clients]

    def shared_like(self):
        return LIKE

    def evaluate(self, client_id, shared):
        if shared["v.lora_A"][0] < 0:
            raise FloatingPointError("a negative A")
        self.thread_of_evaluation = threading.current_thread()
        return {"loss": float(shared["v.lora_A"].sum()) + self.trained.count(client_id)}

    def train_client(self, client_id, sent):
        self.trained.append(client_id)
        metrics = {"loss": float(len(self.trained))}
        if sent.shared["v.lora_A"][0] == 13:
            return Update(client_id, sent.round_index, {}, 0.0, 0, metrics, fault="its loss is nan")
        shared = {key: tensor + 1 for key, tensor in sent.shared.items()}
        return Update(client_id, sent.round_index, shared, 4.0, 2, metrics)

    def run(self):
        try:
            while (opened := self.transport.open_round()) is not None:
                client_ids, sent = opened
                self.rounds.append(opened)
                assert self.may_train.wait(20)
                time.sleep(self.pause)
                for client_id in client_ids:
                    if sent.shared["v.lora_A"][0] != 17:
                        self.transport.send(self.train_client(client_id, sent))
                self.transport.close_round(self.pause)
        finally:
            self.transport.close()


@contextlib.contextmanager
def at_work(folder, **arguments):
    trainer = FakeTrainer(folder, **arguments)
    trainer.transport.connect(trainer)
    thread = threading.Thread(target=trainer.run)
    thread.start()
    try:
        yield trainer
    finally:
        trainer.may_train.set()
        with contextlib.suppress(NoWorkerError), WorkerConnection(folder) as connection:
            connection.stop()
        thread.join(20)
        assert not thread.is_alive()


def ask(folder, client_id="ann", message=None, **arguments):
    with WorkerConnection(folder, timeout=20) as connection:
        return connection.train(client_id, message or broadcast(), **arguments)


class Asking:
    """A request in a thread of its own, and what came of it."""

    def __init__(self, *arguments, **keywords):
        self.result = self.error = None
        self._thread = threading.Thread(target=self._ask, args=(arguments, keywords))
        self._thread.start()

    def _ask(self, arguments, keywords):
        try:
            self.result = ask(*arguments, **keywords)
        except Exception as error:
            self.error = error

    def get(self):
        self._thread.join(20)
        assert not self._thread.is_alive()
        if self.error:
            raise self.error
        return self.result


def until(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def raw_connection(folder):
    """A connection that has shown the key and sends what it likes."""
    connection = Client(json.loads((folder / "worker.json").read_text())["address"])
    key = (folder / "worker.key").read_bytes()
    answer_challenge(connection, key)
    worker_connection.deliver_challenge(connection, key)
    return connection


def raw(folder, frame):
    with raw_connection(folder) as connection:
        connection.send_bytes(frame)
        return unpack(connection.recv_bytes())[0]


class TestRound:
    def test_the_update_comes_back(self, tmp_path):
        with at_work(tmp_path / "worker") as trainer:
            update = ask(tmp_path / "worker", "ann", broadcast(3, last_counted={"ann": 1, "elsewhere": 2}))
        assert (update.client_id, update.round_index, update.weight, update.metrics) == ("ann", 3, 4.0, {"loss": 1.0})
        assert update.shared["q.lora_A"].dtype == torch.bfloat16
        assert all(torch.equal(update.shared[key], torch.full_like(LIKE[key], 2.0)) for key in LIKE)
        [(client_ids, sent)] = trainer.rounds
        assert client_ids == ("ann",) and sent.last_counted == {"ann": 1} and sent.run_id == "a_run"

    def test_flat_keyed_and_bytes_give_the_same(self, tmp_path):
        message = broadcast()
        with at_work(tmp_path) as trainer:
            keyed = ask(tmp_path, message=message)
            as_bytes = ask(tmp_path, message=to_bytes(message))
            flat = ask(tmp_path, message=to_flat(message))
            # The server may hold fp32, which clients do not train in.
            wide = dataclasses.replace(message, shared={key: t.float() for key, t in message.shared.items()})
            assert facts(ask(tmp_path, message=wide)) == facts(keyed)
        assert trainer.trained == ["ann"]
        assert facts(keyed) == facts(from_bytes(as_bytes)) == facts(from_flat(Update, flat, LIKE))
        assert torch.frombuffer(bytearray(flat.array), dtype=torch.float32).tolist() == [2.0] * 8

    @pytest.mark.parametrize("form", [lambda message: message, to_flat])
    def test_a_client_that_is_left_out_answers_too(self, tmp_path, form):
        with at_work(tmp_path):
            found = ask(tmp_path, message=form(broadcast(value=13.0)))
        update = from_flat(Update, found, LIKE) if isinstance(found, FlatMessage) else found
        assert update.fault == "its loss is nan" and update.shared == {}

    def test_a_client_without_an_update_gets_an_error(self, tmp_path):
        with at_work(tmp_path):
            with pytest.raises(WorkerError, match="Round 0 ended in the worker without an update of the client 'ann'"):
                ask(tmp_path, message=broadcast(value=17.0))
            assert ask(tmp_path, message=broadcast(1)).round_index == 1

    def test_an_update_that_nobody_asked_for_is_refused(self, tmp_path):
        with at_work(tmp_path) as trainer, pytest.raises(ValueError, match="'bob' in round 0 answers no request"):
            trainer.transport.send(Update("bob", 0, {}, 1.0, 1))

    def test_the_schedule_is_known_before_the_first_round_opens(self, tmp_path):
        trainer = FakeTrainer(tmp_path)
        trainer.transport.connect(trainer)
        asking = Asking(tmp_path, message=broadcast(3, schedule_start=6, schedule_steps=20))
        assert trainer.transport.schedule() == (6, 20)
        thread = threading.Thread(target=trainer.run)
        thread.start()
        assert asking.get().round_index == 3
        with WorkerConnection(tmp_path) as connection:
            connection.stop()
        thread.join(20)
        assert trainer.rounds[0][1].schedule_steps == 20

    def test_no_schedule_if_it_stops_before(self, tmp_path):
        trainer = FakeTrainer(tmp_path)
        trainer.transport.connect(trainer)
        with WorkerConnection(tmp_path) as connection:
            connection.stop()
            assert trainer.transport.schedule() == (0, None)
            assert trainer.transport.open_round() is None
        trainer.transport.close()

    def test_the_schedule_does_not_wait_for_a_train_request_behind_an_evaluation(self, tmp_path):
        trainer = FakeTrainer(tmp_path)
        trainer.transport.connect(trainer)
        with raw_connection(tmp_path) as connection:
            header = {"kind": "evaluate", "client_id": "ann"}
            connection.send_bytes(pack(header, to_bytes(broadcast(schedule_start=4, schedule_steps=9))))
            assert trainer.transport.schedule() == (4, 9)
            trainer.transport.close()
            assert "has ended" in unpack(connection.recv_bytes())[0]["error"]


class TestTogether:
    def test_two_clients_are_one_round(self, tmp_path):
        with at_work(tmp_path, wait=20.0) as trainer:
            first = Asking(tmp_path, "bob", broadcast(last_counted={"bob": 4, "ann": None}), together=2)
            time.sleep(0.1)
            assert trainer.rounds == []
            second = Asking(tmp_path, "ann", to_flat(broadcast(last_counted={"bob": 4, "ann": None})), together=2)
            assert first.get().client_id == "bob" and second.get().values["client_id"] == "ann"
        assert [client_ids for client_ids, _ in trainer.rounds] == [("ann", "bob")]
        assert trainer.rounds[0][1].last_counted == {"ann": None, "bob": 4}

    def test_a_late_one_is_a_further_round_that_does_not_wait(self, tmp_path):
        with at_work(tmp_path, wait=0.3) as trainer:
            start = time.monotonic()
            ask(tmp_path, "ann", together=2)
            assert time.monotonic() - start >= 0.3
            trainer.transport.wait = 60.0
            assert ask(tmp_path, "bob", together=2).client_id == "bob"
        assert [(client_ids, sent.round_index) for client_ids, sent in trainer.rounds] == [
            (("ann",), 0),
            (("bob",), 0),
        ]

    @pytest.mark.parametrize(
        "fields", [{"round_index": 1}, {"value": 2.0}, {"schedule_start": 1}, {"trained": ("A",)}]
    )
    def test_who_was_sent_something_else_waits_for_a_turn(self, tmp_path, fields):
        with at_work(tmp_path, wait=0.2) as trainer:
            first = Asking(tmp_path, "ann", broadcast(), together=2)
            until(lambda: trainer.transport._waiting)
            second = Asking(tmp_path, "bob", broadcast(**fields), together=2)
            first.get(), second.get()
        assert [client_ids for client_ids, _ in trainer.rounds] == [("ann",), ("bob",)]

    def test_of_one_client_the_newest_round_wins(self, tmp_path):
        with at_work(tmp_path, wait=20.0) as trainer:
            old = Asking(tmp_path, "ann", broadcast(0), together=2)
            until(lambda: trainer.transport._waiting)
            new = Asking(tmp_path, "ann", broadcast(1))
            with pytest.raises(WorkerError, match="for round 1, has taken the place of this one for round 0 .*'ann'"):
                old.get()
            assert new.get().round_index == 1
        assert trainer.trained == ["ann"]


class TestRepeated:
    def test_it_trains_once(self, tmp_path):
        with at_work(tmp_path) as trainer:
            trainer.may_train.clear()
            asking = [Asking(tmp_path)]
            until(lambda: trainer.transport._training)
            asking.append(Asking(tmp_path))
            until(lambda: len(trainer.transport._socket._connections) == 2)
            trainer.may_train.set()
            updates = [facts(request.get()) for request in asking] + [facts(ask(tmp_path))]
        assert trainer.trained == ["ann"] and updates == [updates[0]] * 3
        with at_work(tmp_path) as trainer:
            assert facts(ask(tmp_path)) == updates[0]
        assert trainer.trained == []

    @pytest.mark.parametrize("change", [{"value": 2.0}, {"last_counted": {"ann": 0}}, {"round_index": 1}])
    def test_something_else_is_trained(self, tmp_path, change):
        with at_work(tmp_path) as trainer:
            ask(tmp_path)
            ask(tmp_path, message=broadcast(last_counted={"bob": 0}))
            assert trainer.trained == ["ann"]
            ask(tmp_path, message=broadcast(**change))
        assert trainer.trained == ["ann", "ann"]

    def test_an_older_round_is_refused(self, tmp_path):
        with at_work(tmp_path) as trainer:
            ask(tmp_path, message=broadcast(4))
            with pytest.raises(WorkerError, match="is for round 3, but the client 'ann' has gone on to round 4"):
                ask(tmp_path, message=broadcast(3))
            trainer.may_train.clear()
            asking = Asking(tmp_path, message=broadcast(6))
            until(lambda: trainer.transport._training)
            with pytest.raises(WorkerError, match="is for round 5, but .*'ann' has gone on to round 6"):
                ask(tmp_path, message=broadcast(5))
            assert ask(tmp_path, message=broadcast(4)).round_index == 4
            trainer.may_train.set()
            asking.get()
            assert ask(tmp_path, "bob", broadcast(3)).round_index == 3
        assert trainer.trained == ["ann", "ann", "bob"]

    @pytest.mark.parametrize("position", [-1, 300, 5])
    def test_a_damaged_outbox_is_passed_over_with_a_warning(self, tmp_path, caplog, position):
        with at_work(tmp_path):
            ask(tmp_path), ask(tmp_path, "bob")
        path = tmp_path / "outbox" / "ann.safetensors"
        damaged = bytearray(path.read_bytes())
        damaged[position] ^= 1
        path.write_bytes(damaged)
        with caplog.at_level(logging.WARNING), at_work(tmp_path) as trainer:
            assert "ann.safetensors holds no update of the client 'ann'" in caplog.text
            ask(tmp_path), ask(tmp_path, "bob")
        assert trainer.trained == ["ann"]

    def test_another_clients_is_not_taken(self, tmp_path, caplog):
        with at_work(tmp_path):
            ask(tmp_path)
        (tmp_path / "outbox" / "ann.safetensors").rename(tmp_path / "outbox" / "bob.safetensors")
        with at_work(tmp_path):
            assert ask(tmp_path, "bob").client_id == "bob"
        assert "bob.safetensors holds no update of the client 'bob'" in caplog.text

    def test_one_that_is_damaged_while_the_worker_lives_too(self, tmp_path, caplog):
        with at_work(tmp_path) as trainer:
            ask(tmp_path)
            (tmp_path / "outbox" / "ann.safetensors").write_bytes(b"half a fi")
            ask(tmp_path), ask(tmp_path)
        assert trainer.trained == ["ann", "ann"] and "holds no update" in caplog.text

    def test_nothing_is_answered_that_is_not_in_the_outbox(self, tmp_path, monkeypatch):
        def full(*arguments):
            raise OSError("No space left on device")

        monkeypatch.setattr(outbox, "write_safetensors", full)
        trainer = FakeTrainer(tmp_path)
        trainer.transport.connect(trainer)
        asking = Asking(tmp_path)
        with pytest.raises(OSError, match="No space left"):
            trainer.run()
        with pytest.raises(WorkerError, match="The worker has ended|without an update"):
            asking.get()


class TestRefused:
    @pytest.mark.parametrize("form", [lambda message: message, to_flat])
    @pytest.mark.parametrize(
        "shared",
        [{"q.lora_A": torch.zeros(2, 3)}, {**LIKE, "v.lora_A": torch.zeros(3)}, {**LIKE, "o.lora_A": torch.zeros(1)}],
        ids=["missing", "other shape", "unknown"],
    )
    def test_another_layout(self, tmp_path, form, shared):
        with at_work(tmp_path) as trainer:
            with pytest.raises(WorkerError, match=r"The array has layout \w{12}, but the 2 tensors|_A` has shape"):
                ask(tmp_path, message=form(broadcast(shared=shared)))
        assert trainer.rounds == []

    def test_an_array_of_another_length(self, tmp_path):
        flat = to_flat(broadcast())
        with at_work(tmp_path):
            for array in (flat.array[:-4], flat.array[:-1], flat.array * 2, b""):
                with pytest.raises(WorkerError, match="array that does not make up a message"):
                    ask(tmp_path, message=dataclasses.replace(flat, array=array))

    @pytest.mark.parametrize("changed", [{"round_index": "0"}, {"round_index": None}, {"epoch": 1}])
    def test_values_that_are_no_broadcast(self, tmp_path, changed):
        flat = to_flat(broadcast())
        with at_work(tmp_path), pytest.raises(WorkerError, match=f"{next(iter(changed))}"):
            ask(tmp_path, message=dataclasses.replace(flat, values=flat.values | changed))

    def test_another_fingerprint(self, tmp_path):
        with at_work(tmp_path) as trainer:
            other = {**FINGERPRINT, "adapter": {"r": 4, "target_modules": ["q", "v"]}}
            with pytest.raises(WorkerError, match="client 'ann' differ in `adapter.r`: 4 there, 2 here"):
                ask(tmp_path, fingerprint=other)
            with pytest.raises(WorkerError, match="differ in `constants`: 'abc' there, None here"):
                ask(tmp_path, fingerprint={**FINGERPRINT, "constants": "abc"})
            with pytest.raises(WorkerError, match="differ in `adapter`: None there"):
                ask(tmp_path, fingerprint={})
            assert trainer.rounds == []
            ask(tmp_path, fingerprint=FINGERPRINT)

    def test_another_run(self, tmp_path):
        with at_work(tmp_path) as trainer:
            ask(tmp_path)
            with pytest.raises(WorkerError, match="of the run 'b_run', but .* in the run 'a_run' .*run.json.*folder"):
                ask(tmp_path, "bob", broadcast(run_id="b_run"))
            with WorkerConnection(tmp_path) as connection, pytest.raises(WorkerError, match="in the run 'a_run'"):
                connection.evaluate("bob", broadcast(run_id="b_run"))
        with at_work(tmp_path), pytest.raises(WorkerError, match="in the run 'a_run'"):
            ask(tmp_path, message=broadcast(1, run_id=""))
        assert trainer.trained == ["ann"]

    def test_another_run_before_anything_was_trained_is_not(self, tmp_path):
        with at_work(tmp_path) as trainer:
            trainer.may_train.clear()
            asking = Asking(tmp_path, message=broadcast(value=17.0))
            until(lambda: trainer.transport._training)
            with pytest.raises(WorkerError, match="in the run 'a_run'"):
                ask(tmp_path, "bob", broadcast(run_id="b_run"))
            trainer.may_train.set()
            with pytest.raises(WorkerError, match="without an update"):
                asking.get()
            ask(tmp_path, "bob", broadcast(run_id="b_run"))
        assert json.loads((tmp_path / "run.json").read_text()) == {"run_id": "b_run"}

    def test_an_unknown_client(self, tmp_path):
        with at_work(tmp_path), pytest.raises(WorkerError, match="`client_id='eve'` does not live .* has ann, bob"):
            ask(tmp_path, "eve")

    @pytest.mark.parametrize(
        ("frame", "error"),
        [
            (b"", "no frame"),
            (b"\0\0\0\xffcut", "no frame"),
            (b"\0\0\0\x02[]", "no frame"),
            (pickle.dumps(broadcast()), "no frame"),
            (pack({"version": 2, "kind": "infos"}), "version 2, where this side speaks version 1"),
            (pack({"kind": "shell"}), "no request `kind='shell'`. It knows evaluate, infos, stop, train"),
            (pack({"kind": ["train"]}), "`kind=.*must be of type str"),
            (pack({"kind": "train"}), "`client_id=None` .* must be of type str"),
            (pack({"kind": "train", "client_id": "ann"}, b"nothing"), "7 bytes that are no whole message"),
            (pack({"kind": "train", "client_id": "ann"}, to_bytes(broadcast())[:-1]), "no whole message"),
            (pack({"kind": "train", "client_id": "ann"}, to_bytes(Update("ann", 0, {}, 1.0, 1))), "A `Update`, where"),
            (pack({"kind": "train", "client_id": "ann", "together": True}, to_bytes(broadcast())), "type int"),
            (pack({"kind": "train", "client_id": "ann", "layout": "a"}), "`values=None`"),
            (pack({"kind": "train", "client_id": "ann", "fingerprint": "x"}), "type dict"),
        ],
    )
    def test_what_is_no_request_gets_an_error_and_the_worker_goes_on(self, tmp_path, frame, error):
        with at_work(tmp_path):
            with raw_connection(tmp_path) as connection:
                connection.send_bytes(frame)
                reply = unpack(connection.recv_bytes())[0]["error"]
                assert re.search(error, reply) and "could not answer" not in reply
                connection.send_bytes(pack({"kind": "infos"}))
                assert len(unpack(connection.recv_bytes())[0]["infos"]) == 2
            assert ask(tmp_path).client_id == "ann"

    def test_what_nobody_foresaw_is_answered_too(self, tmp_path, monkeypatch):
        def full(*arguments):
            raise OSError("No space left on device")

        with at_work(tmp_path) as trainer:
            with monkeypatch.context() as patched:
                patched.setattr(worker, "write_json", full)
                with pytest.raises(WorkerError, match="could not answer the request: OSError.'No space left"):
                    ask(tmp_path)
            assert ask(tmp_path).client_id == "ann"
        assert trainer.trained == ["ann"]

    def test_a_request_that_is_too_long(self, tmp_path, monkeypatch):
        monkeypatch.setattr(worker, "MOST_AT_LEAST", 4000)
        with at_work(tmp_path) as trainer:
            shared = {"q.lora_A": torch.zeros(1 << 20)}
            with pytest.raises(WorkerError, match="longer than the 4000 bytes"):
                ask(tmp_path, message=broadcast(shared=shared))
            assert ask(tmp_path).client_id == "ann"
        assert trainer.trained == ["ann"]

    def test_more_is_taken_where_more_is_shared(self, tmp_path, monkeypatch):
        monkeypatch.setattr(worker, "MOST_AT_LEAST", 0)
        transport = OverSocket(tmp_path)
        host = FakeTrainer(tmp_path)
        host.shared_like = lambda: {"A": torch.zeros(1 << 10, dtype=torch.bfloat16)}
        transport.connect(host)
        assert transport._socket._most_bytes == 4 * 4 * (1 << 10)
        transport.close()


class Executed:
    """Leaves a file where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


class TestPickle:
    def test_it_is_never_executed(self, tmp_path):
        with at_work(tmp_path):
            trap = pickle.dumps(Executed(tmp_path / "executed"))
            with raw_connection(tmp_path) as connection:
                connection.send(Executed(tmp_path / "executed"))
                assert "no frame" in unpack(connection.recv_bytes())[0]["error"]
            header = {"kind": "train", "client_id": "ann"}
            assert "no whole message" in raw(tmp_path, pack(header, trap))["error"]
            assert not (tmp_path / "executed").exists()
        pickle.loads(trap)
        assert (tmp_path / "executed").exists()

    def test_nothing_here_pickles(self):
        for path in MODULES:
            text = path.read_text(encoding="utf-8")
            assert not re.search(r"(accepted|connection)\.(send|recv)\(|pickle\.|import pickle|torch\.load\b", text), (
                path
            )


class TestWhoMayConnect:
    def test_another_key_is_refused(self, tmp_path, caplog):
        with at_work(tmp_path) as trainer:
            key = (tmp_path / "worker.key").read_bytes()
            (tmp_path / "worker.key").write_bytes(key[:-1] + bytes([key[-1] ^ 1]))
            with pytest.raises(WorkerError, match="has another key than"):
                WorkerConnection(tmp_path, timeout=20)
            (tmp_path / "worker.key").write_bytes(key)
            until(lambda: "does not have the key" in caplog.text)
            assert ask(tmp_path).client_id == "ann"
        assert len(key) == 32 and trainer.trained == ["ann"]

    def test_a_key_is_made_for_each_start(self, tmp_path):
        keys = []
        for _ in range(2):
            with at_work(tmp_path):
                keys.append((tmp_path / "worker.key").read_bytes())
                assert (tmp_path / "worker.key").stat().st_mode & 0o777 == 0o600
        assert keys[0] != keys[1]

    def test_a_new_folder_is_private(self, tmp_path):
        with at_work(tmp_path / "a" / "worker"):
            address = Path(json.loads((tmp_path / "a" / "worker" / "worker.json").read_text())["address"])
            for folder in (tmp_path / "a" / "worker", tmp_path / "a" / "worker" / "outbox", address.parent):
                assert folder.stat().st_mode & 0o777 == 0o700
            assert len(os.fsencode(address)) <= 100
        assert not address.parent.exists()

    @pytest.mark.parametrize("mode", [0o640, 0o604, 0o620])
    def test_a_key_that_others_can_read_is_refused(self, tmp_path, mode):
        with at_work(tmp_path):
            (tmp_path / "worker.key").chmod(mode)
            with pytest.raises(PermissionError, match=rf"worker.key has mode {mode:04o}, .*chmod -R go-rwx.*new key"):
                WorkerConnection(tmp_path)
            (tmp_path / "worker.key").chmod(0o600)

    def test_a_file_system_that_keeps_no_file_private_is_refused(self, tmp_path, monkeypatch):
        transport = OverSocket(tmp_path)
        open_file = os.open

        def without_modes(path, flags, mode=0o777, **keywords):
            handle = open_file(path, flags, mode, **keywords)
            os.fchmod(handle, 0o644)
            return handle

        monkeypatch.setattr(worker_socket.os, "open", without_modes)
        with pytest.raises(PermissionError, match="on another one"):
            transport.connect(FakeTrainer(tmp_path))
        assert not (tmp_path / "worker.key").exists()

    @pytest.mark.parametrize("mode", [0o770, 0o707, 0o1777])
    def test_a_folder_that_others_can_write_to_is_refused(self, tmp_path, mode):
        folder = tmp_path / "worker"
        folder.mkdir()
        folder.chmod(mode)
        with pytest.raises(PermissionError, match=rf"`folder='{folder}'` has mode {mode & 0o777:04o}, .*chmod"):
            OverSocket(folder).connect(FakeTrainer(folder))
        folder.chmod(0o700)
        (folder / "outbox").mkdir()
        (folder / "outbox").chmod(mode)
        with pytest.raises(PermissionError, match="outbox'` has mode"):
            OverSocket(folder).connect(FakeTrainer(folder))
        (folder / "outbox").chmod(0o700)
        with at_work(folder):
            folder.chmod(mode)
            with pytest.raises(PermissionError, match="has mode"):
                WorkerConnection(folder)
            folder.chmod(0o700)

    def test_a_folder_of_another_user_is_refused(self, tmp_path, monkeypatch):
        with monkeypatch.context() as patched:
            patched.setattr(os, "geteuid", lambda: 4242)
            patched.setattr(os, "stat", lambda path: os.stat_result([0o700, 0, 0, 0, 4243, *[0] * 5]))
            with pytest.raises(PermissionError, match="belongs to the user with number 4243, .* runs as 4242"):
                worker_connection.refuse_writable(tmp_path)

    def test_one_without_the_key_is_not_heard(self, tmp_path):
        with at_work(tmp_path):
            with Client(json.loads((tmp_path / "worker.json").read_text())["address"]) as stranger:
                stranger.recv_bytes()
                stranger.send_bytes(b"x" * 16)
                assert b"FAILURE" in stranger.recv_bytes()
                with contextlib.suppress(BrokenPipeError):
                    stranger.send_bytes(pack({"kind": "stop"}))
                with pytest.raises((EOFError, ConnectionResetError)):
                    stranger.recv_bytes()
            assert ask(tmp_path).client_id == "ann"

    def test_one_that_says_nothing_keeps_nobody_out(self, tmp_path):
        with at_work(tmp_path):
            silent = Client(json.loads((tmp_path / "worker.json").read_text())["address"])
            assert ask(tmp_path).client_id == "ann"
            silent.close()

    def test_a_port_where_there_are_no_socket_files(self, tmp_path, monkeypatch):
        monkeypatch.setattr(worker_socket, "FAMILY", "AF_INET")
        with at_work(tmp_path):
            host, _ = json.loads((tmp_path / "worker.json").read_text())["address"]
            assert host == "127.0.0.1" and ask(tmp_path).client_id == "ann"

    def test_a_long_temporary_folder_is_avoided(self, tmp_path, monkeypatch):
        monkeypatch.setattr(worker_socket.tempfile, "tempdir", str(tmp_path / ("long" * 25)))
        (tmp_path / ("long" * 25)).mkdir()
        with at_work(tmp_path / "worker"):
            assert ask(tmp_path / "worker").client_id == "ann"
        assert list((tmp_path / ("long" * 25)).iterdir()) == []


class TestOneWorker:
    def test_a_second_one_is_refused(self, tmp_path):
        with at_work(tmp_path):
            with pytest.raises(RunLockError, match=f"`folder='{tmp_path}'` has a worker already"):
                OverSocket(tmp_path).connect(FakeTrainer(tmp_path))
            assert ask(tmp_path).client_id == "ann"

    def test_nothing_of_it_is_left_but_what_it_answered(self, tmp_path):
        with at_work(tmp_path) as trainer:
            ask(tmp_path)
        assert sorted(path.name for path in tmp_path.rglob("*")) == ["ann.safetensors", "outbox", "run.json"]
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("worker-")]
        trainer.transport.close()

    def test_bad_arguments(self, tmp_path):
        with pytest.raises(ValueError, match="`wait=-1` must be 0 or more seconds"):
            OverSocket(tmp_path, wait=-1)
        with pytest.raises(ValueError, match="without clients"):
            OverSocket(tmp_path).connect(FakeTrainer(tmp_path, clients=()))
        with pytest.raises(ValueError, match="cannot name a folder"):
            OverSocket(tmp_path).connect(FakeTrainer(tmp_path, clients=("../ann",)))
        (tmp_path / "run.json").write_text("[]")
        with pytest.raises(ValueError, match="run.json is damaged.*write the `run_id`"):
            OverSocket(tmp_path).connect(FakeTrainer(tmp_path))
        assert not list(tmp_path.rglob("run.lock"))


class TestBetweenRounds:
    def test_infos_at_any_time(self, tmp_path):
        with at_work(tmp_path) as trainer, WorkerConnection(tmp_path) as connection:
            trainer.may_train.clear()
            asking = Asking(tmp_path)
            until(lambda: trainer.transport._training)
            assert connection.infos() == trainer.client_infos()
            trainer.may_train.set()
            asking.get()

    @pytest.mark.parametrize("form", [lambda message: message, to_bytes, to_flat])
    def test_evaluation_in_the_thread_that_trains(self, tmp_path, form):
        with at_work(tmp_path) as trainer, WorkerConnection(tmp_path) as connection:
            assert connection.evaluate("ann", form(broadcast(value=3.0))) == {"loss": 6.0}
            ask(tmp_path)
            assert connection.evaluate("ann", form(broadcast(value=3.0))) == {"loss": 7.0}
            assert connection.evaluate("bob", form(broadcast(value=3.0)), fingerprint=FINGERPRINT) == {"loss": 6.0}
            assert trainer.thread_of_evaluation not in (threading.main_thread(), None)
            assert not trainer.thread_of_evaluation.name.startswith("worker-")

    def test_it_waits_for_the_round_to_end(self, tmp_path):
        with at_work(tmp_path) as trainer, raw_connection(tmp_path) as connection:
            trainer.may_train.clear()
            asking = Asking(tmp_path)
            until(lambda: trainer.transport._training)
            connection.send_bytes(pack({"kind": "evaluate", "client_id": "ann"}, to_bytes(broadcast())))
            assert not connection.poll(0.2)
            trainer.may_train.set()
            asking.get()
            assert unpack(connection.recv_bytes())[0]["metrics"] == {"loss": 3.0}

    def test_its_error_is_answered_and_the_worker_goes_on(self, tmp_path):
        with at_work(tmp_path), WorkerConnection(tmp_path) as connection:
            with pytest.raises(WorkerError, match="client 'ann' failed in the worker: FloatingPointError"):
                connection.evaluate("ann", broadcast(value=-1.0))
            assert connection.evaluate("ann", broadcast()) == {"loss": 2.0}
            assert connection.train("ann", broadcast()).client_id == "ann"


class TestEnd:
    def test_stop_answers_those_who_wait(self, tmp_path):
        with at_work(tmp_path) as trainer:
            trainer.may_train.clear()
            training = Asking(tmp_path)
            until(lambda: trainer.transport._training)
            waiting = Asking(tmp_path, "bob")
            until(lambda: trainer.transport._waiting)
            with raw_connection(tmp_path) as connection, WorkerConnection(tmp_path) as stopping:
                connection.send_bytes(pack({"kind": "evaluate", "client_id": "ann"}, to_bytes(broadcast())))
                until(lambda: trainer.transport._evaluations)
                stopping.stop()
                assert "told to stop" in unpack(connection.recv_bytes())[0]["error"]
                with pytest.raises(WorkerError, match="told to stop"):
                    waiting.get()
                with pytest.raises(WorkerError, match="told to stop"):
                    stopping.train("bob", broadcast())
                trainer.may_train.set()
                assert training.get().client_id == "ann"

    def test_close_answers_those_who_wait_and_those_who_train(self, tmp_path):
        trainer = FakeTrainer(tmp_path)
        trainer.transport.connect(trainer)
        training = Asking(tmp_path)
        assert trainer.transport.open_round()[0] == ("ann",)
        waiting = Asking(tmp_path, "bob")
        until(lambda: trainer.transport._waiting)
        with WorkerConnection(tmp_path) as idle:
            trainer.transport.close()
            with pytest.raises(WorkerError, match="without an update"):
                training.get()
            with pytest.raises(WorkerError, match="The worker has ended"):
                waiting.get()
            with pytest.raises(NoWorkerError, match="ended before it answered"):
                idle.infos()
        with pytest.raises(NoWorkerError, match=f"No worker is at work in `folder='{tmp_path}'`"):
            WorkerConnection(tmp_path)
        assert trainer.transport.open_round() is None

    def test_one_who_does_not_read_does_not_keep_it(self, tmp_path, monkeypatch):
        monkeypatch.setattr(worker_socket, "PATIENCE", 0.2)
        trainer = FakeTrainer(tmp_path, clients=["c" * 90 + str(index) for index in range(5000)])
        trainer.transport.connect(trainer)
        with raw_connection(tmp_path) as connection:
            connection.send_bytes(pack({"kind": "infos"}))
            assert connection.poll(20)
            trainer.transport.close()
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("worker-")]

    def test_a_connection_that_dies_amid_a_request_harms_nobody(self, tmp_path):
        with at_work(tmp_path) as trainer:
            half = raw_connection(tmp_path)
            os.write(half.fileno(), (1000).to_bytes(4, "big") + b"ten bytes.")
            half.close()
            trainer.may_train.clear()
            gone = raw_connection(tmp_path)
            gone.send_bytes(pack({"kind": "train", "client_id": "ann"}, to_bytes(broadcast())))
            until(lambda: trainer.transport._training)
            gone.close()
            trainer.may_train.set()
            assert ask(tmp_path, "bob").client_id == "bob"
            assert ask(tmp_path).client_id == "ann"
        assert trainer.trained == ["ann", "bob"]

    def test_a_wait_has_an_end_and_the_update_is_there_later(self, tmp_path):
        with at_work(tmp_path) as trainer:
            trainer.may_train.clear()
            with WorkerConnection(tmp_path, timeout=0.1) as connection:
                with pytest.raises(TimeoutError, match="`timeout=0.1` seconds. It goes on"):
                    connection.train("ann", broadcast())
                with pytest.raises(ValueError, match="has been closed"):
                    connection.infos()
            trainer.may_train.set()
            assert ask(tmp_path).client_id == "ann"
        assert trainer.trained == ["ann"]


class TestFlat:
    def test_round_trip(self):
        update = Update(
            "ann", 2, {key: torch.randn(t.shape).to(t.dtype) for key, t in LIKE.items()}, 3.0, 5, {"loss": 1.5}
        )
        flat = to_flat(update)
        assert json.loads(json.dumps(flat.values)) == flat.values
        assert flat.layout == layout_sha256(LIKE)
        assert facts(from_flat(Update, flat, LIKE)) == facts(update)
        message = broadcast(last_counted={"ann": None})
        assert facts(from_flat(Broadcast, to_flat(message), LIKE)) == facts(message)

    def test_a_dtype_that_would_come_back_changed(self):
        like = {"v.lora_A": torch.zeros(2, dtype=torch.float64)}
        flat = to_flat(broadcast(shared={"v.lora_A": torch.zeros(2)}))
        with pytest.raises(MessageError, match="is torch.float64, which a flat array of fp32 does not hold"):
            from_flat(Broadcast, flat, like)

    def test_a_kind_of_other_fields(self):
        with pytest.raises(MessageError, match="`Update` with an array that does not make up a message"):
            from_flat(Update, to_flat(broadcast()), LIKE)


# Processes of their own. They import what they need without the rest of the package.

STUB = f"""
import sys, types
package = types.ModuleType("hf_fedsa")
package.__path__ = [{str(PACKAGE)!r}]
sys.modules["hf_fedsa"] = package
"""
LIGHT = """
import time
start = time.process_time()
from hf_fedsa.worker_connection import FlatMessage, NoWorkerError, WorkerConnection
seconds = time.process_time() - start
"""


def python(code, *arguments, **keywords):
    return subprocess.Popen([sys.executable, "-c", STUB + code, *map(str, arguments)], text=True, **keywords)


@contextlib.contextmanager
def worker_process(folder, **arguments):
    code = f"import runpy; runpy.run_path({__file__!r}, run_name='__main__')"
    process = python(code, folder, json.dumps(arguments), stdout=subprocess.PIPE)
    try:
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.kill()
        process.wait(20)
        process.stdout.close()


class TestProcesses:
    def test_killed_and_started_again_it_answers_without_training(self, tmp_path):
        with worker_process(tmp_path) as process:
            update = ask(tmp_path)
            assert update.metrics == {"loss": 1.0}
            socket_folder = Path(json.loads((tmp_path / "worker.json").read_text())["address"]).parent
            process.kill()
            process.wait(20)
            with pytest.raises(NoWorkerError, match="No worker is at work"):
                WorkerConnection(tmp_path)
            assert socket_folder.exists()
        with worker_process(tmp_path) as process:
            assert not socket_folder.exists()
            with pytest.raises(RunLockError, match=f"has a worker already.*by process {process.pid}"):
                OverSocket(tmp_path).connect(FakeTrainer(tmp_path))
            assert facts(ask(tmp_path)) == facts(update)
            # It is the first that this process trains.
            assert ask(tmp_path, "bob").metrics == {"loss": 1.0}
            with WorkerConnection(tmp_path) as connection:
                connection.stop()
            assert process.stdout.read() == "bob\n" and process.wait(20) == 0

    def test_killed_amid_a_request_and_asked_by_a_light_process(self, tmp_path):
        flat = to_flat(broadcast())
        (tmp_path / "array").write_bytes(flat.array)
        relay = LIGHT + (
            "import json\n"
            "folder, values, layout = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]\n"
            "array = open(folder + '/array', 'rb').read()\n"
            "with WorkerConnection(folder) as connection:\n"
            "    for index in range(2):\n"
            "        values['round_index'] = index\n"
            "        try:\n"
            "            update = connection.train('ann', FlatMessage(values, array, layout))\n"
            "            print(update.values['round_index'], len(update.array), flush=True)\n"
            "        except NoWorkerError as error:\n"
            "            print('lost', error)\n"
            "print(seconds, *sorted({'torch', 'numpy', 'transformers', 'safetensors'} & set(sys.modules)))\n"
        )
        with worker_process(tmp_path, hangs_in_round=1) as process:
            asking = python(relay, tmp_path, json.dumps(flat.values), flat.layout, stdout=subprocess.PIPE)
            assert asking.stdout.readline() == "0 32\n"
            assert process.stdout.readline() == "hangs\n"
            process.send_signal(signal.SIGKILL)
            said, _ = asking.communicate(timeout=20)
        lost, loaded = said.splitlines()
        assert lost.startswith("lost The worker in") and "ended before it answered" in lost
        assert re.fullmatch(r"[0-9.]+", loaded) and float(loaded) < 0.5


class HangingTrainer(FakeTrainer):
    hangs_in_round = None

    def train_client(self, client_id, sent):
        if sent.round_index == self.hangs_in_round:
            sys.stdout.write("hangs\n")
            sys.stdout.flush()
            time.sleep(60)
        return super().train_client(client_id, sent)


def main(folder, hangs_in_round=None):
    assert not {"transformers", "peft", "trl", "datasets"} & set(sys.modules)
    trainer = HangingTrainer(folder)
    trainer.hangs_in_round = hangs_in_round
    trainer.transport.connect(trainer)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    trainer.run()
    sys.stdout.write("".join(f"{client_id}\n" for client_id in trainer.trained))


if __name__ == "__main__":
    main(sys.argv[1], **json.loads(sys.argv[2]))
