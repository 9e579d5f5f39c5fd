"""Servers whose A is three floats, and updates for them."""

import json

import torch
from safetensors.torch import load, save

from hf_fedsa.messages import ClientInfo, Update
from hf_fedsa.server.server import Server
from hf_fedsa.server.state import ServerSettings

START = {"x": torch.tensor([3.0, 0.0]), "y": torch.tensor([4.0])}  # Its norm is 5.
FINGERPRINT = {"base_model": "llama", "layout": "f00"}


def make_info(client_id, num_rows=4, num_steps=2, fingerprint=FINGERPRINT):
    return ClientInfo(client_id, num_rows, num_steps, fingerprint=fingerprint)


def make_server(clients="abc", sampler=None, dtypes=None, shared=START, **settings):
    clients = clients if isinstance(clients, dict) else {client_id: make_info(client_id) for client_id in clients}
    values = {"seed": 0, "num_rounds": 3, **settings}
    return Server(shared, clients, ServerSettings(**values), sampler=sampler, dtypes=dtypes, run_id="run")


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
