"""A resident worker pulls its rounds from those who ask: trained once, side by side, and answered in the end."""

import dataclasses
import json
import logging
import os
import threading
import time

import pytest
import torch
from fake_worker import FINGERPRINT, LIKE, Asking, FakeTrainer, ask, at_work, broadcast, facts, raw_connection, until
from inside import connections_of, evaluations_in, training_in, waiting_in

from hf_fedsa.messages import Broadcast, MessageError, Update, from_bytes, to_bytes
from hf_fedsa.tensors import layout_sha256
from hf_fedsa.worker import listener, outbox
from hf_fedsa.worker.connection import FlatMessage, NoWorkerError, WorkerConnection, WorkerError, pack, unpack
from hf_fedsa.worker.flat import from_flat, to_flat


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
            until(lambda: waiting_in(trainer.transport))
            second = Asking(tmp_path, "bob", broadcast(**fields), together=2)
            first.get(), second.get()
        assert [client_ids for client_ids, _ in trainer.rounds] == [("ann",), ("bob",)]

    def test_of_one_client_the_newest_round_wins(self, tmp_path):
        with at_work(tmp_path, wait=20.0) as trainer:
            old = Asking(tmp_path, "ann", broadcast(0), together=2)
            until(lambda: waiting_in(trainer.transport))
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
            until(lambda: training_in(trainer.transport))
            asking.append(Asking(tmp_path))
            until(lambda: len(connections_of(trainer.transport)) == 2)
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
            until(lambda: training_in(trainer.transport))
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


class TestBetweenRounds:
    def test_infos_at_any_time(self, tmp_path):
        with at_work(tmp_path) as trainer, WorkerConnection(tmp_path) as connection:
            trainer.may_train.clear()
            asking = Asking(tmp_path)
            until(lambda: training_in(trainer.transport))
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
            until(lambda: training_in(trainer.transport))
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
            until(lambda: training_in(trainer.transport))
            waiting = Asking(tmp_path, "bob")
            until(lambda: waiting_in(trainer.transport))
            with raw_connection(tmp_path) as connection, WorkerConnection(tmp_path) as stopping:
                connection.send_bytes(pack({"kind": "evaluate", "client_id": "ann"}, to_bytes(broadcast())))
                until(lambda: evaluations_in(trainer.transport))
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
        until(lambda: waiting_in(trainer.transport))
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
        monkeypatch.setattr(listener, "PATIENCE", 0.2)
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
            until(lambda: training_in(trainer.transport))
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
