"""A worker without a model, in a thread or in a process of its own, and those who ask it."""

import contextlib
import dataclasses
import json
import shutil
import subprocess
import sys
import threading
import time
from multiprocessing.connection import Client, answer_challenge, deliver_challenge
from pathlib import Path

import torch

from hf_fedsa.messages import Broadcast, ClientInfo, Update
from hf_fedsa.tensors import tensors_sha256
from hf_fedsa.worker import OverSocket
from hf_fedsa.worker.connection import NoWorkerError, WorkerConnection, unpack

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

    def refuse(self, client_id, broadcast):
        return None

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
        self.thread = threading.Thread(target=self.run, args=(arguments, keywords))
        self.thread.start()

    def run(self, arguments, keywords):
        try:
            self.result = ask(*arguments, **keywords)
        except Exception as error:
            self.error = error

    def get(self):
        self.thread.join(20)
        assert not self.thread.is_alive()
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
    deliver_challenge(connection, key)
    return connection


def raw(folder, frame):
    with raw_connection(folder) as connection:
        connection.send_bytes(frame)
        return unpack(connection.recv_bytes())[0]


# Processes of their own


def python(code, *arguments):
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE)


@contextlib.contextmanager
def worker_process(folder, **arguments):
    code = f"import runpy; runpy.run_path({__file__!r}, run_name='__main__')"
    process = python(code, folder, json.dumps(arguments))
    try:
        assert process.stdout.readline() == "ready\n"
        socket_folder = Path(json.loads((folder / "worker.json").read_text())["address"]).parent
        yield process
    finally:
        process.kill()
        process.wait(20)
        process.stdout.close()
    shutil.rmtree(socket_folder, ignore_errors=True)


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
