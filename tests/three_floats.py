"""Servers whose A is three floats, updates for them, and processes that have a replica each."""

import json
import threading

import torch
from safetensors.torch import load, save

from hf_fedsa.messages import ClientInfo, Update
from hf_fedsa.methods import METHODS, Sharing, keeping_shared
from hf_fedsa.server.server import Server
from hf_fedsa.server.state import ServerSettings

START = {"x": torch.tensor([3.0, 0.0]), "y": torch.tensor([4.0])}  # Its norm is 5.
FINGERPRINT = {"base_model": "llama", "layout": "f00"}


def make_info(client_id, num_rows=4, num_steps=2, fingerprint=FINGERPRINT):
    return ClientInfo(client_id, num_rows, num_steps, fingerprint=fingerprint)


def make_server(clients="abc", sampler=None, dtypes=None, shared=START, sharing=None, **settings):
    clients = clients if isinstance(clients, dict) else {client_id: make_info(client_id) for client_id in clients}
    values = {"seed": 0, "num_rounds": 3, **settings}
    return Server(
        shared, clients, ServerSettings(**values), sharing=sharing, sampler=sampler, dtypes=dtypes, run_id="run"
    )


# What clients are sent stays as it is, as where a newcomer trains its own part alone.
KEPT = Sharing(dict.fromkeys(START, "A"), keeping_shared(METHODS["fedsa"]))


def make_update(client_id, numbers=(3.0, 0.0, 4.0), round_index=0, loss=1.0, weight=1.0, num_steps=2, **kwargs):
    shared = {"x": torch.tensor(numbers[:2]), "y": torch.tensor(numbers[2:])}
    values = {"shared": shared, "weight": weight, "num_steps": num_steps, "metrics": {"loss": loss}, **kwargs}
    return Update(client_id, round_index, **values)


def far(client_id, change, **kwargs):
    """An update whose change of A has this norm."""
    return make_update(client_id, (3.0, change, 4.0), **kwargs)


def numbers(tensors):
    return [*tensors["x"].tolist(), *tensors["y"].tolist()]


def value(server):
    """All that a server holds, as one that can be compared."""
    tensors, state = server.state_dict()
    return {key: tensor.tolist() for key, tensor in tensors.items()}, json.dumps(state)


def through_bytes(server):
    tensors, state = server.state_dict()
    return load(save(tensors)), json.loads(json.dumps(state))


class Processes:
    """Runs a function in several threads, as processes that exchange what a server's `reduce` asks them to."""

    def __init__(self, count):
        self.barrier = threading.Barrier(count, timeout=10)
        self.given, self.calls = [None] * count, []

    def _exchange(self, rank, name, given):
        self.given[rank] = given
        self.barrier.wait()
        everyone = list(self.given)
        if rank == 0:
            self.calls.append(name)
        self.barrier.wait()
        return everyone

    def reduce(self, rank, server):
        server.reduce(
            lambda flat: torch.stack(self._exchange(rank, f"all_reduce {len(flat)}", flat)).sum(dim=0),
            lambda items: [item for part in self._exchange(rank, "gather", items) for item in part],
        )

    def run(self, servers):
        threads = [threading.Thread(target=self.reduce, args=entry) for entry in enumerate(servers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
