"""Who may ask a worker, and for what: its own user, one federation, no pickle, from a process that starts at once."""

import contextlib
import dataclasses
import json
import os
import pickle
import re
import signal
import threading
from multiprocessing.connection import Client
from pathlib import Path

import pytest
import torch
from fake_worker import (
    FINGERPRINT,
    LIKE,
    Asking,
    FakeTrainer,
    ask,
    at_work,
    broadcast,
    facts,
    python,
    raw,
    raw_connection,
    until,
    worker_process,
)
from inside import training_in

from hf_fedsa.messages import Update, to_bytes
from hf_fedsa.run_lock import RunLockError
from hf_fedsa.worker import OverSocket, connection, flat, listener, outbox, over_socket
from hf_fedsa.worker.connection import NoWorkerError, WorkerConnection, WorkerError, pack, unpack
from hf_fedsa.worker.flat import to_flat

MODULES = [Path(module.__file__) for module in (over_socket, connection, listener, outbox, flat)]
LIGHT = """
import sys
import time
start = time.process_time()
from hf_fedsa.worker.connection import FlatMessage, NoWorkerError, WorkerConnection
seconds = time.process_time() - start
"""


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
            until(lambda: training_in(trainer.transport))
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
            pytest.param(b"", "no frame", id="empty"),
            pytest.param(b"\0\0\0\xffcut", "no frame", id="cut"),
            pytest.param(b"\0\0\0\x02[]", "no frame", id="list"),
            pytest.param(pickle.dumps(broadcast()), "no frame", id="pickle"),
            pytest.param(
                pack({"version": 2, "kind": "infos"}), "version 2, where this side speaks version 1", id="version"
            ),
            pytest.param(
                pack({"kind": "shell"}),
                "no request `kind='shell'`. It knows evaluate, infos, stop, train",
                id="unknown kind",
            ),
            pytest.param(pack({"kind": ["train"]}), "`kind=.*must be of type str", id="kind of another type"),
            pytest.param(pack({"kind": "train"}), "`client_id=None` .* must be of type str", id="no client"),
            pytest.param(
                pack({"kind": "train", "client_id": "ann"}, b"nothing"),
                "7 bytes that are no whole message",
                id="bytes",
            ),
            pytest.param(
                pack({"kind": "train", "client_id": "ann"}, to_bytes(broadcast())[:-1]),
                "no whole message",
                id="cut message",
            ),
            pytest.param(
                pack({"kind": "train", "client_id": "ann"}, to_bytes(Update("ann", 0, {}, 1.0, 1))),
                "A `Update`, where",
                id="another message",
            ),
            pytest.param(
                pack({"kind": "train", "client_id": "ann", "together": True}, to_bytes(broadcast())),
                "type int",
                id="together",
            ),
            pytest.param(
                pack({"kind": "train", "client_id": "ann", "layout": "a"}), "`values=None`", id="layout without values"
            ),
            pytest.param(
                pack({"kind": "train", "client_id": "ann", "fingerprint": "x"}), "type dict", id="fingerprint"
            ),
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
                patched.setattr(over_socket, "write_json", full)
                with pytest.raises(WorkerError, match="could not answer the request: OSError.'No space left"):
                    ask(tmp_path)
            assert ask(tmp_path).client_id == "ann"
        assert trainer.trained == ["ann"]

    def test_a_request_that_is_too_long(self, tmp_path, monkeypatch):
        monkeypatch.setattr(over_socket, "MOST_AT_LEAST", 4000)
        with at_work(tmp_path) as trainer:
            shared = {"q.lora_A": torch.zeros(1 << 20)}
            with pytest.raises(WorkerError, match="longer than the 4000 bytes"):
                ask(tmp_path, message=broadcast(shared=shared))
            assert ask(tmp_path).client_id == "ann"
        assert trainer.trained == ["ann"]

    def test_more_is_taken_where_more_is_shared(self, tmp_path, monkeypatch):
        monkeypatch.setattr(over_socket, "MOST_AT_LEAST", 0)
        transport = OverSocket(tmp_path)
        host = FakeTrainer(tmp_path)
        host.shared_like = lambda: {"A": torch.zeros(1 << 10, dtype=torch.bfloat16)}
        transport.connect(host)
        try:
            most = 4 * 4 * (1 << 10)
            assert "no frame" in raw(tmp_path, b" " * most)["error"]
            with raw_connection(tmp_path) as connection:
                os.write(connection.fileno(), (most + 1).to_bytes(4, "big"))
                assert f"longer than the {most} bytes" in unpack(connection.recv_bytes())[0]["error"]
        finally:
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

        monkeypatch.setattr(listener.os, "open", without_modes)
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
                connection.refuse_writable(tmp_path)

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
        monkeypatch.setattr(listener, "FAMILY", "AF_INET")
        with at_work(tmp_path):
            host, _ = json.loads((tmp_path / "worker.json").read_text())["address"]
            assert host == "127.0.0.1" and ask(tmp_path).client_id == "ann"

    def test_a_long_temporary_folder_is_avoided(self, tmp_path, monkeypatch):
        monkeypatch.setattr(listener.tempfile, "tempdir", str(tmp_path / ("long" * 25)))
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
            asking = python(relay, tmp_path, json.dumps(flat.values), flat.layout)
            assert asking.stdout.readline() == "0 32\n"
            assert process.stdout.readline() == "hangs\n"
            process.send_signal(signal.SIGKILL)
            said, _ = asking.communicate(timeout=20)
        lost, loaded = said.splitlines()
        assert lost.startswith("lost The worker in") and "ended before it answered" in lost
        assert re.fullmatch(r"[0-9.]+", loaded) and float(loaded) < 0.5
