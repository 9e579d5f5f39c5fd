"""Methods: who holds a factor, and whose turn it is, against the rules in plain NumPy."""

import itertools
import re

import inside
import numpy as np
import pytest
import torch
from conftest import make_args, make_lora, make_model, make_rows, max_difference
from peft import PeftModel, VeraConfig
from three_floats import make_info, make_update, numbers
from transformers import AutoModelForCausalLM

from hf_fedsa import METHODS, FederatedTrainer, Method, load_personalized_model, register_method
from hf_fedsa.methods import Sharing, keeping_shared, method_named
from hf_fedsa.server.server import Server
from hf_fedsa.server.state import ServerSettings

# Rows of every client, two of which take more steps than they have rows for, and who trains in which round.
ROWS = {"ann": 2, "bob": 9, "cat": 3, "dan": 6}
ROUNDS = [("ann", "bob", "cat"), ("bob", "dan"), ("ann", "dan")]
STEPS, BATCH = 3, 2
# Different rows that a client has seen in a round, which is its weight.
WEIGHTS = {client_id: min(rows, STEPS * BATCH) for client_id, rows in ROWS.items()}


def vera(**kwargs):
    return VeraConfig(r=8, target_modules=["q_proj", "v_proj", "up_proj"], **kwargs)


HEAD = {"modules_to_save": ["lm_head"], "target_modules": ["q_proj", "up_proj"]}
KINDS = {
    "lora": (make_lora, {}),
    "rslora": (lambda: make_lora(use_rslora=True), {}),
    "dora": (lambda: make_lora(use_dora=True, target_modules=["q_proj", "up_proj"]), {}),
    "vera": (vera, {}),
    "own head": (lambda: make_lora(**HEAD), {}),
    "shared head": (lambda: make_lora(**HEAD), {"share_modules_to_save": True}),
}


def make_trainer(tmp_path, tokenizer, method, *, peft_config=None, rows=ROWS, sampled=ROUNDS, model=None, **kwargs):
    values = {"num_rounds": len(ROUNDS), "local_steps": STEPS, "per_device_train_batch_size": BATCH, **kwargs}
    values = {"optim": "sgd", "learning_rate": 0.5, "max_grad_norm": 0.0, **values}
    return FederatedTrainer(
        model=make_model() if model is None else model,
        args=make_args(tmp_path, method=method, **values),
        train_dataset={client_id: make_rows(count, seed=i) for i, (client_id, count) in enumerate(rows.items())},
        processing_class=tokenizer,
        peft_config=peft_config or make_lora(),
        client_sampler=sampled and (lambda round_index, num_rows, wanted: sampled[round_index]),
    )


def adapter_of(trainer, client_id):
    """The complete adapter that a client serves with."""
    return {**trainer.shared_state_dict(), **trainer.client_state_dict(client_id)}


# The rules, written anew: which factors are averaged, and which train in rounds 0, 1 and 2.
AVERAGED = {"fedsa": "A", "fedavg": "AB", "ffa": "AB", "share_b": "B", "rolora": "AB", "local": ""}
TRAINED = {name: ["AB"] * 3 for name in AVERAGED} | {"ffa": ["B"] * 3, "rolora": ["B", "A", "B"]}


def factor(key):
    if "lm_head" in key:
        return "head"
    return "A" if re.search(r"lora_A|vera_lambda_d", key) else "B"


class Oracle:
    """A federation in NumPy: what the server holds, what clients keep, and what each was last sent."""

    def __init__(self, method, start, share_heads):
        self.method, self.share_heads = method, share_heads
        values = {key: tensor.double().numpy() for key, tensor in start.items()}
        self.server = {key: value for key, value in values.items() if self.is_averaged(key)}
        self.own = {client_id: {k: v for k, v in values.items() if not self.is_averaged(k)} for client_id in ROWS}
        self.sent = {client_id: {} for client_id in ROWS}

    def is_averaged(self, key):
        return self.share_heads if factor(key) == "head" else factor(key) in AVERAGED[self.method]

    def trains(self, key, round_index):
        return factor(key) == "head" or factor(key) in TRAINED[self.method][round_index]

    def adapter(self, client_id):
        return {**self.server, **self.own[client_id]}

    def bytes_to(self, client_id):
        """Those of every tensor that is not what the client was sent last, of fp32."""
        had, self.sent[client_id] = self.sent[client_id], dict(self.server)
        new = [value for key, value in self.server.items() if not np.array_equal(had.get(key), value)]
        return sum(4 * value.size for value in new)

    def end_round(self, round_index, trained):
        """Takes in what clients have made of their adapters."""
        total = sum(WEIGHTS[client_id] for client_id in trained)
        means = {
            key: sum(WEIGHTS[c] / total * adapter[key] for c, adapter in trained.items())
            for key in self.server
            if self.trains(key, round_index)
        }
        self.server |= means
        for client_id, adapter in trained.items():
            self.own[client_id] = {key: adapter[key] for key in self.own[client_id]}


def close(tensors, expected):
    assert tensors.keys() == expected.keys()
    for key, value in expected.items():
        assert np.abs(tensors[key].double().numpy() - value).max() <= 1e-6 * max(1.0, np.abs(value).max()), key


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", AVERAGED)
def test_three_rounds_are_those_of_the_rule(tmp_path, tokenizer, method, kind):
    make_config, arguments = KINDS[kind]
    trainer = make_trainer(tmp_path, tokenizer, method, peft_config=make_config(), parallel_clients=2, **arguments)
    oracle = Oracle(method, inside.initial_adapter(trainer), bool(arguments))
    watched = inside.watch_clients(trainer)
    trainer.train()
    for round_index, client_ids in enumerate(ROUNDS):
        record = trainer.round_history[round_index]
        assert record["clients"] == list(client_ids) and record["weights"] == {c: WEIGHTS[c] for c in client_ids}
        bytes_down = bytes_up = 0
        trained = {}
        for client_id in client_ids:
            start, end = watched.start[round_index, client_id], watched.end[round_index, client_id]
            close(start, oracle.adapter(client_id))
            moved = {key for key in start if not torch.equal(start[key], end[key])}
            # A has no gradient where B is zero, so a tensor that may train need not move; but each factor must.
            assert moved <= {key for key in start if oracle.trains(key, round_index)}
            assert {factor(key) for key in moved} == {factor(k) for k in start if oracle.trains(k, round_index)}
            returned = watched.returned[round_index, client_id]
            assert returned.keys() == {k for k in oracle.server if oracle.trains(k, round_index)}
            assert all(torch.equal(tensor, end[key]) for key, tensor in returned.items())
            bytes_up += sum(4 * tensor.numel() for tensor in returned.values())
            bytes_down += oracle.bytes_to(client_id)
            trained[client_id] = {key: tensor.double().numpy() for key, tensor in end.items()}
        assert (record["bytes_down"], record["bytes_up"]) == (bytes_down, bytes_up)
        oracle.end_round(round_index, trained)
    for client_id in ROWS:
        close(adapter_of(trainer, client_id), oracle.adapter(client_id))
    close(trainer.shared_state_dict(), oracle.server)


@pytest.mark.parametrize("method", AVERAGED)
def test_how_many_train_side_by_side_changes_nothing(tmp_path, tokenizer, method):
    def weights(parallel_clients):
        trainer = make_trainer(
            tmp_path / str(parallel_clients), tokenizer, method, parallel_clients=parallel_clients, learning_rate=0.1
        )
        trainer.train()
        return {f"{c} {k}": t for c in ROWS for k, t in adapter_of(trainer, c).items()}

    alone = weights(1)
    assert max_difference(weights(2), alone) < 1e-5
    assert max_difference(weights(3), alone) < 1e-5


@pytest.mark.parametrize("optimizer", [{}, {"optim": "adamw_torch", "reset_optimizer": False, "learning_rate": 1e-2}])
@pytest.mark.parametrize("method", ["ffa", "rolora", "share_b", "local"])
def test_a_run_that_was_interrupted_goes_on_bit_for_bit(tmp_path, tokenizer, method, optimizer):
    common = {"save_strategy": "steps", "save_steps": 4, "parallel_clients": 2, "weight_decay": 0.1, **optimizer}
    whole = make_trainer(tmp_path / "whole", tokenizer, method, **common)
    whole.train()
    for step in (4, 8):
        resumed = make_trainer(tmp_path / "whole", tokenizer, method, **common)
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        for client_id in ROWS:
            assert max_difference(adapter_of(resumed, client_id), adapter_of(whole, client_id)) == 0
        bytes_of = [[(r["bytes_down"], r["bytes_up"]) for r in t.round_history] for t in (whole, resumed)]
        assert bytes_of[0] == bytes_of[1]


@pytest.mark.parametrize("method", AVERAGED)
def test_one_client_in_the_loop_of_its_trainer(tmp_path, tokenizer, method):
    rows = {"ann": 8}
    trainer = make_trainer(tmp_path, tokenizer, method, rows=rows, sampled=None, local_steps=None, num_rounds=2)
    watched = inside.watch_clients(trainer)
    trainer.train()
    for round_index, (name, letters) in itertools.product(range(2), [("A", "A"), ("B", "B")]):
        start, end = watched.start[round_index, "ann"], watched.end[round_index, "ann"]
        moves = any(not torch.equal(start[key], end[key]) for key in start if factor(key) == name)
        assert moves == (letters in TRAINED[method][round_index])


def test_a_second_train_goes_on_with_the_method(tmp_path, tokenizer):
    """A frozen factor at the end of a run must be known to the optimizer of the next one."""
    trainer = make_trainer(tmp_path, tokenizer, "rolora", num_rounds=2, sampled=None)
    trainer.train()
    before = adapter_of(trainer, "ann")
    trainer.train()
    after = adapter_of(trainer, "ann")
    assert {factor(key) for key in before if not torch.equal(before[key], after[key])} == {"A", "B"}


# Saved and loaded


@pytest.mark.filterwarnings("error:Found missing adapter keys")
@pytest.mark.parametrize("kind", ["lora", "vera", "own head"])
@pytest.mark.parametrize("method", AVERAGED)
def test_what_is_saved_loads_with_stock_peft(tmp_path, tokenizer, model_dir, method, kind):
    base = AutoModelForCausalLM.from_pretrained(model_dir)
    trainer = make_trainer(tmp_path, tokenizer, method, peft_config=KINDS[kind][0](), model=base)
    trainer.train()
    trainer.save_model()
    inputs = torch.randint(3, 30, (2, 6), generator=torch.Generator().manual_seed(0))
    for client_id in ROWS:
        with trainer.use_client(client_id) as model, torch.no_grad():
            expected = model.eval()(input_ids=inputs).logits
        for loaded in (
            PeftModel.from_pretrained(
                AutoModelForCausalLM.from_pretrained(model_dir), str(tmp_path / "clients" / client_id)
            ),
            load_personalized_model(tmp_path, client_id),
        ):
            with torch.no_grad():
                assert (loaded.eval()(input_ids=inputs).logits - expected).abs().max() < 1e-5


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
@pytest.mark.parametrize("method", AVERAGED)
def test_stock_peft_never_draws_a(tmp_path, tokenizer, model_dir, method):
    """Where clients keep A, the folder `shared` has that of a newcomer: PEFT would draw what is missing."""
    trainer = make_trainer(tmp_path, tokenizer, method, model=AutoModelForCausalLM.from_pretrained(model_dir))
    expected = inside.initial_adapter(trainer)
    trainer.train()
    trainer.save_model()
    expected |= trainer.shared_state_dict()
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_dir), str(tmp_path / "shared"))
    assert max_difference(inside.adapter_tensors_of(loaded), expected) == 0


@pytest.mark.parametrize("train_shared", [False, True])
@pytest.mark.parametrize("method", AVERAGED)
def test_a_newcomer_starts_from_what_is_shared(tmp_path, tokenizer, model_dir, method, train_shared):
    base = AutoModelForCausalLM.from_pretrained(model_dir)
    trainer = make_trainer(tmp_path / "federation", tokenizer, method, model=base)
    initial = inside.initial_adapter(trainer)
    trainer.train()
    trainer.save_model()
    newcomer = FederatedTrainer.from_shared(
        tmp_path / "federation",
        make_args(tmp_path / "new", num_rounds=2, optim="sgd", learning_rate=0.5),
        make_rows(6, seed=9),
        processing_class=tokenizer,
        train_shared=train_shared,
    )
    assert newcomer.args.method == method
    start = adapter_of(newcomer, "newcomer")
    close(start, {key: tensor.numpy() for key, tensor in (initial | trainer.shared_state_dict()).items()})
    newcomer.train()
    end = adapter_of(newcomer, "newcomer")
    moved = {factor(key) for key in start if not torch.equal(start[key], end[key])}
    kept = {"fedsa": {"B"}, "share_b": {"A"}, "local": {"A", "B"}}.get(method, {"B"})
    everything = {factor for turn in TRAINED[method][:2] for factor in turn}
    assert moved == (everything if train_shared else kept)
    newcomer.save_model()
    assert max_difference(inside.adapter_tensors_of(load_personalized_model(tmp_path / "new", "newcomer")), end) == 0


def test_the_card_names_the_method(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer, "ffa", sampled=None, num_rounds=1)
    trainer.train()
    trainer.save_model()
    card = (tmp_path / "README.md").read_text()
    assert "rounds of" not in card and "in 1 round of [FFA-LoRA](https://arxiv.org/abs/2403.12313)" in card
    assert "Selective Aggregation" not in card
    assert "| `lora_A`, `lora_B` | nothing |" in card


# What travels


FACTORS = {"x": "A", "y": "B"}
SHARED = {"x": torch.tensor([3.0, 0.0]), "y": torch.tensor([4.0])}


def make_server(method, clients="ab", **settings):
    sharing = Sharing(FACTORS, METHODS[method])
    shared = {key: tensor for key, tensor in SHARED.items() if sharing.share_of[key] == "shared"}
    values = {"seed": 0, "num_rounds": 6, "max_update_norm": None, **settings}
    infos = {client_id: make_info(client_id) for client_id in clients}
    return Server(shared, infos, ServerSettings(**values), sharing=sharing)


def answer(server, client_ids, value=1.0):
    """Every client returns what it must; the keys that each of them was sent."""
    asked, broadcast = server.begin_round(client_ids)
    sent = {client_id: set(server.message_to(client_id, broadcast).shared) for client_id in asked}
    for client_id in client_ids:
        names = server.sharing.returned(broadcast.trained)
        shared = {key: SHARED[key] + value for key in names}
        assert server.receive(make_update(client_id, shared=shared, round_index=broadcast.round_index)) is None
    server.end_round(0.0)
    return sent


def test_ffa_sends_a_once():
    server = make_server("ffa")
    assert answer(server, "a") == {"a": {"x", "y"}}
    assert answer(server, "ab") == {"a": {"y"}, "b": {"x", "y"}}
    assert answer(server, "ab") == {"a": {"y"}, "b": {"y"}}


def test_rolora_sends_half_per_round_and_what_a_client_has_missed():
    server = make_server("rolora")
    assert answer(server, "ab") == {"a": {"x", "y"}, "b": {"x", "y"}}  # B trains
    assert answer(server, "a", 2.0) == {"a": {"y"}}  # A trains
    assert answer(server, "ab", 3.0) == {"a": {"x"}, "b": {"x", "y"}}  # B trains
    assert answer(server, "ab", 4.0) == {"a": {"y"}, "b": {"y"}}


def test_a_round_that_did_not_count_sends_nothing_again():
    server = make_server("fedavg", min_clients_per_round=2)
    answer(server, "a")
    assert answer(server, "ab") == {"a": set(), "b": {"x", "y"}}
    assert numbers(server.shared) == [4.0, 1.0, 5.0]


def test_a_client_that_comes_back_is_sent_all():
    server = make_server("ffa")
    answer(server, "ab")
    server.deregister("b")
    server.register(make_info("b"))
    assert answer(server, "ab") == {"a": {"y"}, "b": {"x", "y"}}


def test_where_nothing_is_shared_nothing_travels():
    server = make_server("local")
    assert answer(server, "ab") == {"a": set(), "b": set()}
    record = server.state.history[0]
    assert (record["bytes_up"], record["bytes_down"], record["counted"]) == (0, 0, True)


# The table


def test_an_unknown_method_names_the_known_ones(tmp_path):
    with pytest.raises(ValueError, match="`method='fedprox'` is unknown. Known are 'fedsa', 'fedavg', 'ffa'"):
        make_args(tmp_path, method="fedprox")


def test_a_method_is_added_by_a_public_call(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr("hf_fedsa.methods.METHODS", dict(METHODS))
    mine = Method("b_first", shared=("A",), local=("B",), turns=(("B",), ("A", "B")))
    register_method(mine)
    register_method(mine)
    assert method_named("b_first") is mine
    trainer = make_trainer(tmp_path, tokenizer, "b_first")
    watched = inside.watch_clients(trainer)
    trainer.train()
    for (round_index, client_id), start in watched.start.items():
        end = watched.end[round_index, client_id]
        moved = {factor(key) for key in start if not torch.equal(start[key], end[key])}
        assert moved == ({"A", "B"} if round_index == 1 else {"B"})
    assert [record["bytes_up"] > 0 for record in trainer.round_history] == [False, True, False]
    with pytest.raises(ValueError, match="another method named 'fedsa'"):
        register_method(Method("fedsa", shared=("B",), local=("A",)))
    with pytest.raises(TypeError, match="`method` must be a `Method`, got 'fedsa' of type str"):
        register_method("fedsa")


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"shared": ("A",)}, "Each of the factors 'A', 'B' must be in one of them, once"),
        ({"shared": ("A", "B"), "local": ("B",)}, "must be in one of them, once"),
        ({"shared": ("A", "C"), "local": ("B",)}, "must be in one of them, once"),
        ({"shared": "A", "local": ("B",)}, "`shared` of the method 'mine' must be a tuple, got 'A'"),
        ({"shared": ("A", "B"), "turns": ("A",)}, "Each must be a tuple of at least one of the factors"),
        ({"shared": ("A", "B"), "turns": ((),)}, "Each must be a tuple of at least one"),
        ({"shared": ("A", "B"), "turns": (("head",),)}, "Each must be a tuple of at least one"),
        ({"shared": ("A", "B"), "name": "a/b"}, "must be made of letters, digits, '_' and '-', got 'a/b'"),
    ],
)
def test_what_is_no_method(arguments, error):
    with pytest.raises(ValueError, match=re.escape(error)):
        Method(**{"name": "mine", **arguments})


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_newcomer_never_trains_what_it_takes_over(method):
    kept = keeping_shared(method)
    assert not Sharing(FACTORS, kept).returned(kept.trained(0))
    assert kept.trained(0) and set(kept.trained(0)) <= set(kept.local)


def test_another_method_does_not_go_on_from_a_checkpoint(tmp_path, tokenizer):
    make_trainer(tmp_path, tokenizer, "fedavg", save_strategy="epoch").train()
    with pytest.raises(ValueError, match="its `method` is 'fedavg', this run's is 'ffa'"):
        make_trainer(tmp_path, tokenizer, "ffa", save_strategy="epoch").train(resume_from_checkpoint=True)
