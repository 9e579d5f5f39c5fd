"""From what clients return to what they are sent next, in a server and in a run."""

import numpy as np
import pytest
import torch
from conftest import make_args, make_lora, make_model, make_rows, max_difference
from three_floats import make_server, make_update, numbers, through_bytes

from hf_fedsa import FederatedTrainer

OPTIMIZERS = {
    "fedavg": {"server_learning_rate": 0.5},
    "fedavgm": {"server_momentum": 0.5},
    "fedadam": {"server_learning_rate": 0.1, "server_tau": 0.01},
    "fedyogi": {"server_learning_rate": 0.1, "server_beta_1": 0.8, "server_beta_2": 0.9},
}


def by_hand(name, start, means, learning_rate=None, momentum=0.9, beta_1=0.9, beta_2=0.99, tau=1e-3):
    """Three rounds in NumPy: what the server has after each of them."""
    rate = learning_rate or {"fedadam": 0.01, "fedyogi": 0.01}.get(name, 1.0)
    x, m, v = np.array(start), 0.0, np.full(len(start), tau**2)
    for mean in means:
        d = np.array(mean) - x
        if name == "fedavg":
            x = x + rate * d
        elif name == "fedavgm":
            m = momentum * m + d
            x = x + rate * m
        else:
            m = beta_1 * m + (1 - beta_1) * d
            sign = np.sign(v - d**2)
            v = beta_2 * v + (1 - beta_2) * d**2 if name == "fedadam" else v - (1 - beta_2) * d**2 * sign
            x = x + rate * m / (np.sqrt(v) + tau)
        yield x


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_server_takes_its_optimizers_step(name):
    server = make_server("ab", server_optimizer=name, max_update_norm=None, **OPTIMIZERS[name])
    changes = [((1.0, 2.0, 3.0), (4.0, 4.0, 6.0)), ((0.0, 1.0, 0.0), (0.5, 0.0, 2.0)), ((3.0, 0.0, 4.0),) * 2]
    means = [[0.75 * a + 0.25 * b for a, b in zip(*pair, strict=True)] for pair in changes]
    arguments = {key.removeprefix("server_"): value for key, value in OPTIMIZERS[name].items()}
    expected = by_hand(name, numbers(server.shared), means, **arguments)
    for round_index, (pair, after) in enumerate(zip(changes, expected, strict=True)):
        server.begin_round()
        for client_id, returned, weight in zip("ab", pair, (3.0, 1.0), strict=True):
            update = make_update(client_id, returned, round_index=round_index, weight=weight)
            assert server.receive(update) is None
            # It stops and goes on within every round.
            again = make_server("ab", server_optimizer=name, max_update_norm=None, **OPTIMIZERS[name])
            again.load_state_dict(*through_bytes(server))
            server = again
        server.end_round(0.0)
        assert np.abs(np.array(numbers(server.shared)) - after).max() < 1e-6


def test_a_new_run_forgets_the_state():
    server, fresh = (make_server("a", server_optimizer="fedavgm", max_update_norm=None) for _ in range(2))
    for _ in range(2):
        for one in (server, fresh):
            one.begin_round()
            one.receive(make_update("a", (1.0, 1.0, 1.0)))
            one.end_round(0.0)
        assert numbers(server.shared) == numbers(fresh.shared)
        for one in (server, fresh):
            one.restart("another")
        fresh.shared = {key: tensor.clone() for key, tensor in server.shared.items()}


def make_trainer(tmp_path, tokenizer, **kwargs):
    values = {"optim": "sgd", "learning_rate": 0.2, "num_rounds": 4, "clients_per_round": 3, **kwargs}
    return FederatedTrainer(
        model=make_model(),
        args=make_args(tmp_path, parallel_clients=2, save_strategy="steps", **{"save_steps": 4, **values}),
        train_dataset={f"client_{i}": make_rows(4 + i, seed=i) for i in range(4)},
        processing_class=tokenizer,
        peft_config=make_lora(),
    )


@pytest.mark.parametrize(
    "arguments",
    [
        {"server_optimizer": "fedyogi", "method": "rolora"},
        {"server_optimizer": "fedavgm", "method": "fedavg", "server_momentum": 0.5},
        {"aggregator": "median", "method": "rolora"},
        {"aggregator": "krum", "server_optimizer": "fedadam"},
        {"aggregator": "trimmed_mean", "trim_fraction": 0.34, "method": "ffa"},
    ],
    ids=lambda arguments: "-".join(map(str, arguments.values())),
)
def test_a_run_goes_on_bit_for_bit(tmp_path, tokenizer, arguments):
    whole = make_trainer(tmp_path, tokenizer, **arguments)
    whole.train()
    plain = make_trainer(tmp_path / "plain", tokenizer, method=arguments.get("method", "fedsa"))
    plain.train()
    assert max_difference(plain.shared_state_dict(), whole.shared_state_dict()) > 1e-4, "The option has an effect."
    for step in (4, 8):  # Within a wave, and within a round.
        resumed = make_trainer(tmp_path, tokenizer, **arguments)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert max_difference(resumed.shared_state_dict(), whole.shared_state_dict()) == 0
        for client_id in whole.client_ids:
            own, expected = (t.client_state_dict(client_id) for t in (resumed, whole))
            assert own.keys() == expected.keys() and all(torch.equal(own[key], expected[key]) for key in own)


def test_another_optimizer_goes_on_where_it_is_meant(tmp_path, tokenizer):
    make_trainer(tmp_path, tokenizer, server_optimizer="fedavgm", save_steps=6).train()
    checkpoint = str(tmp_path / "checkpoint-6")
    with pytest.raises(ValueError, match="its `server_optimizer` is 'fedavgm', this run's is 'fedadam'"):
        make_trainer(tmp_path, tokenizer, server_optimizer="fedadam").train(resume_from_checkpoint=checkpoint)
    other = make_trainer(
        tmp_path, tokenizer, server_optimizer="fedadam", resume_with_changes=["server_optimizer"], save_steps=100
    )
    other.train(resume_from_checkpoint=checkpoint)
    assert len(other.round_history) == 4


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"server_optimizer": "adam"}, "`server_optimizer='adam'` is not known. Choose one of 'fedavg'"),
        ({"server_momentum": 0.9}, "`server_momentum=0.9` is an argument of fedavgm, and `server_optimizer='fedavg'`"),
        ({"server_optimizer": "fedadam", "server_tau": 0.0}, "`server_tau` must be a positive and finite number"),
        ({"aggregator": "mode"}, "`aggregator` must be one of 'mean', 'median', 'trimmed_mean', 'krum', got 'mode'"),
        ({"trim_fraction": 0.1}, "`trim_fraction=0.1` is an argument of `aggregator='trimmed_mean'`"),
        ({"aggregator": "krum", "krum_byzantine": -1}, "`krum_byzantine` must be at least 0"),
    ],
)
def test_what_the_arguments_refuse(tmp_path, arguments, error):
    with pytest.raises(ValueError, match=error):
        make_args(tmp_path, **arguments)


def test_krum_with_too_few_clients_is_refused_before_a_model_loads(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="`aggregator='krum'` with `krum_byzantine=1` needs 5 clients in a round"):
        FederatedTrainer(
            model="no/such-model",
            args=make_args(tmp_path, aggregator="krum", krum_byzantine=1),
            train_dataset={f"client_{i}": make_rows(4, seed=i) for i in range(4)},
            processing_class=tokenizer,
            peft_config=make_lora(),
        )
