"""What must always hold, one test per claim."""

import os
import subprocess
import sys
import warnings

import inside
import numpy as np
import pytest
import torch
from conftest import make_args, make_lora, make_model, make_rows, max_difference
from peft import PeftModel, get_peft_model_state_dict
from transformers import AutoModelForCausalLM, TrainerCallback
from trl import SFTConfig, SFTTrainer

from hf_fedsa import FederatedCallback, FederatedConfig, FederatedTrainer, FedSAVeraConfig
from hf_fedsa.client.parameters import adapter_tensors
from hf_fedsa.server.aggregation import WeightedMean
from hf_fedsa.tensors import count_bytes


def make_trainer(tmp_path, tokenizer, clients, *, peft_config=None, callbacks=None, model=None, **kwargs):
    kwargs = {"learning_rate": 1e-3, **kwargs}
    return FederatedTrainer(
        model=model if model is not None else make_model(),
        args=make_args(tmp_path, **kwargs),
        train_dataset=clients,
        processing_class=tokenizer,
        peft_config=peft_config or make_lora(),
        callbacks=callbacks,
    )


def weights_of(trainer):
    """All tensors of a federation, shared ones and every client's own."""
    weights = {f"shared {key}": tensor for key, tensor in trainer.shared_state_dict().items()}
    for client_id in sorted(trainer.client_ids):
        weights |= {f"{client_id} {key}": tensor for key, tensor in trainer.client_state_dict(client_id).items()}
    return weights


def vera():
    return FedSAVeraConfig(r=8, target_modules=["q_proj", "v_proj", "up_proj"])


# 1. One client, nothing else: the weights of `SFTTrainer`.

PLAIN = {
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "use_cpu": True,
}


@pytest.mark.parametrize("rows_per_step", [(2, 1), (2, 2)], ids=["batches", "accumulation"])
@pytest.mark.parametrize("arguments", [SFTConfig, FederatedConfig])
def test_one_client_gives_the_weights_of_sft_trainer_bit_for_bit(tmp_path, tokenizer, arguments, rows_per_step):
    batch_size, accumulation = rows_per_step
    rows = make_rows(11, seed=3)
    common = {
        "per_device_train_batch_size": batch_size,
        "gradient_accumulation_steps": accumulation,
        "num_train_epochs": 3,
        "learning_rate": 1e-2,
        **PLAIN,
    }
    plain = SFTTrainer(
        model=make_model(),
        args=SFTConfig(str(tmp_path), **common),
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=make_lora(lora_dropout=0.1),
    )
    plain.train()
    federated = FederatedTrainer(
        model=make_model(),
        args=arguments(str(tmp_path), **common),
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=make_lora(lora_dropout=0.1),
    )
    federated.train()
    assert max_difference(get_peft_model_state_dict(plain.model), get_peft_model_state_dict(federated.model)) == 0
    assert len(federated.round_history) == 3
    losses = [[entry["loss"] for entry in t.state.log_history if "loss" in entry] for t in (plain, federated)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("arguments", [SFTConfig, FederatedConfig])
def test_training_twice_and_from_edited_weights_is_as_with_sft_trainer(tmp_path, tokenizer, arguments):
    ends = []
    for trainer_class, config in ((SFTTrainer, SFTConfig), (FederatedTrainer, arguments)):
        trainer = trainer_class(
            model=make_model(),
            args=config(str(tmp_path), per_device_train_batch_size=2, num_train_epochs=2, learning_rate=1e-2, **PLAIN),
            train_dataset=make_rows(7, seed=3),
            processing_class=tokenizer,
            peft_config=make_lora(lora_dropout=0.1),
        )
        for seed in (1, 2, None):
            if seed is not None:
                torch.manual_seed(seed)
                with torch.no_grad():
                    for parameter in trainer.model.parameters():
                        if parameter.requires_grad:
                            parameter.normal_(std=0.1)
                torch.manual_seed(seed)
            trainer.train()
            ends.append({key: t.clone() for key, t in get_peft_model_state_dict(trainer.model).items()})
    for plain, federated in zip(ends[:3], ends[3:], strict=True):
        assert max_difference(plain, federated) == 0
    assert len(trainer.round_history) == 2


def files_in(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "saving",
    [
        {"save_strategy": "epoch", "load_best_model_at_end": True, "save_total_limit": 1},
        {"save_strategy": "best", "load_best_model_at_end": True},
        {"save_strategy": "epoch", "save_only_model": True, "eval_on_start": True},
    ],
    ids=["best model", "save best", "only model"],
)
def test_one_client_logs_and_saves_as_sft_trainer_does(tmp_path, tokenizer, model_dir, saving):
    runs = []
    for trainer_class, name in ((SFTTrainer, "plain"), (FederatedTrainer, "federated")):
        common = {"eval_strategy": "epoch", "metric_for_best_model": "loss", "greater_is_better": True, **saving}
        trainer = trainer_class(
            model=model_dir,
            args=SFTConfig(str(tmp_path / name), num_train_epochs=3, learning_rate=1e-2, **{**PLAIN, **common}),
            train_dataset=make_rows(11, seed=3),
            eval_dataset=make_rows(4, seed=4),
            processing_class=tokenizer,
            peft_config=make_lora(),
        )
        metrics = trainer.train().metrics
        measured = [[k for k in line if "_runtime" in k or "_per_second" in k] for line in trainer.state.log_history]
        log = [
            {key: value for key, value in line.items() if key not in out}
            for line, out in zip(trainer.state.log_history, measured, strict=True)
        ]
        state = {key: getattr(trainer.state, key) for key in ("global_step", "best_global_step", "best_metric")}
        runs.append((log, measured, state, set(metrics), trainer))
    *plain, stock = runs[0]
    *federated, trainer = runs[1]
    assert federated == plain
    assert max_difference(get_peft_model_state_dict(stock.model), get_peft_model_state_dict(trainer.model)) == 0
    tensors = {**trainer.shared_state_dict(), **trainer.client_state_dict("client_0")}
    assert max_difference(tensors, get_peft_model_state_dict(stock.model)) == 0
    assert len(trainer.round_history) == 3
    folders = [sorted(path.name for path in (tmp_path / name).glob("checkpoint-*")) for name in ("plain", "federated")]
    assert folders[0] == folders[1]
    for folder in folders[0]:
        checkpoints = [tmp_path / name / folder for name in ("plain", "federated")]
        assert files_in(checkpoints[0]) <= files_in(checkpoints[1])
        first, second = (
            get_peft_model_state_dict(PeftModel.from_pretrained(make_model(), str(path))) for path in checkpoints
        )
        assert max_difference(first, second) == 0


def test_one_named_client_in_the_rounds_loop_gives_the_weights_of_sft_trainer(tmp_path, tokenizer):
    rows = make_rows(11, seed=3)
    common = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-3,
        **PLAIN,
    }
    plain = SFTTrainer(
        model=make_model(),
        args=SFTConfig(str(tmp_path), num_train_epochs=4, **common),
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=make_lora(),
    )
    federated = FederatedTrainer(
        model=make_model(),
        args=FederatedConfig(str(tmp_path), num_rounds=2, local_epochs=2, **common),
        train_dataset={"only": rows},
        processing_class=tokenizer,
        peft_config=make_lora(),
    )
    plain.train()
    federated.train()
    assert federated.state.global_step == plain.state.global_step
    assert federated.state.total_flos == plain.state.total_flos
    assert max_difference(get_peft_model_state_dict(plain.model), get_peft_model_state_dict(federated.model)) < 1e-5


# 2. `parallel_clients` is an execution detail.


@pytest.mark.parametrize("adapter", ["lora", "rslora", "dora", "vera"])
@pytest.mark.parametrize("length", [{"local_steps": 3}, {"local_epochs": 2}], ids=["steps", "epochs"])
def test_parallel_clients_does_not_change_weights(tmp_path, tokenizer, adapter, length):
    clients = {f"client_{i}": make_rows(4 + 3 * i, seed=i) for i in range(4)}
    flags = {"rslora": {"use_rslora": True}, "dora": {"use_dora": True}}
    weights = {}
    for parallel in (1, 2, 4):
        peft_config = vera() if adapter == "vera" else make_lora(**flags.get(adapter, {}))
        trainer = make_trainer(
            tmp_path,
            tokenizer,
            clients,
            peft_config=peft_config,
            parallel_clients=parallel,
            gradient_accumulation_steps=2,
            local_steps=length.get("local_steps"),
            local_epochs=length.get("local_epochs"),
        )
        trainer.train()
        weights[parallel] = weights_of(trainer)
    assert max_difference(weights[1], weights[2]) < 1e-5
    assert max_difference(weights[1], weights[4]) < 1e-5


# 3. and 4. B is the client's own; who does not train does not change.


class Recorder(FederatedCallback):
    """Every client's B before and after every round, and the base weights."""

    def __init__(self):
        self.before, self.after, self.sampled = [], [], []

    def on_round_begin(self, args, state, control, round_index, client_ids, trainer, **kwargs):
        self.before.append({c: trainer.client_state_dict(c) for c in trainer.client_ids})
        self.sampled.append(set(client_ids))

    def on_round_end(self, args, state, control, metrics, trainer, **kwargs):
        self.after.append({c: trainer.client_state_dict(c) for c in trainer.client_ids})


@pytest.mark.parametrize("parallel", [1, 2])
@pytest.mark.parametrize("store", ["memory", "disk"])
def test_a_client_keeps_its_b_whoever_trains_in_between(tmp_path, tokenizer, clients, parallel, store):
    recorder = Recorder()
    trainer = make_trainer(
        tmp_path,
        tokenizer,
        clients,
        callbacks=[recorder],
        num_rounds=6,
        clients_per_round=2,
        parallel_clients=parallel,
        client_store_dir=str(tmp_path / "store") if store == "disk" else None,
    )
    at_load = {}

    def record(slot):
        at_load[slot] = inside.slot_tensors(trainer, slot, "local")

    inside.after_loading_slot(trainer, record)

    class AtFirstStep(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            for client_id, slot in inside.clients_in_slots(trainer).items():
                if inside.wave_steps(trainer) == 0:
                    assert max_difference(at_load[slot], recorder.before[-1][client_id]) == 0

    trainer.add_callback(AtFirstStep())
    trainer.train()
    assert len({frozenset(sampled) for sampled in recorder.sampled}) > 1
    for i, sampled in enumerate(recorder.sampled):
        for client_id in trainer.client_ids:
            changed = max_difference(recorder.before[i][client_id], recorder.after[i][client_id]) > 0
            assert changed == (client_id in sampled)
        if i:
            for client_id in trainer.client_ids:
                assert max_difference(recorder.after[i - 1][client_id], recorder.before[i][client_id]) == 0
    finals = [recorder.after[-1][client_id] for client_id in trainer.client_ids]
    assert all(max_difference(finals[0], other) > 1e-4 for other in finals[1:])


@pytest.mark.parametrize("peft_config", [make_lora(), vera()], ids=["lora", "vera"])
def test_base_weights_and_projections_never_change_and_are_not_counted_as_traffic(
    tmp_path, tokenizer, clients, peft_config
):
    trainer = make_trainer(tmp_path, tokenizer, clients, peft_config=peft_config)
    slots = [inside.slot_parameters(trainer, slot) for slot in range(inside.num_slots(trainer))]
    trained = {id(p) for slot in slots for p in slot.values()}
    frozen = {n: p for n, p in trainer.model.named_parameters() if id(p) not in trained}
    frozen |= {n: b for n, b in trainer.model.named_buffers() if "vera" in n}
    before = {name: tensor.detach().clone() for name, tensor in frozen.items()}
    trainer.train()
    assert all(torch.equal(before[name], tensor) for name, tensor in frozen.items())
    shared_bytes = count_bytes(trainer.shared_state_dict())
    suffix = "vera_lambda_d" if isinstance(peft_config, FedSAVeraConfig) else "lora_A.weight"
    adapter = adapter_tensors(trainer.model, "default")
    assert shared_bytes == sum(t.numel() * 4 for key, t in adapter.items() if key.endswith(suffix))
    for entry in trainer.round_history:
        assert entry["bytes_up"] == entry["bytes_down"] == len(entry["clients"]) * shared_bytes


# 5. A is the weighted mean of what the clients returned.


@pytest.mark.parametrize("weighting", ["examples", "uniform"])
@pytest.mark.parametrize("parallel", [1, 4])
def test_a_is_the_weighted_mean_of_what_clients_returned(tmp_path, tokenizer, weighting, parallel):
    clients = {f"client_{i}": make_rows(3 + 4 * i, seed=i) for i in range(4)}
    trainer = make_trainer(
        tmp_path,
        tokenizer,
        clients,
        aggregation_weighting=weighting,
        parallel_clients=parallel,
        local_steps=None,
        local_epochs=1,
        num_rounds=1,
    )
    returned = {}

    def record():
        for client_id, slot in inside.clients_in_slots(trainer).items():
            returned[client_id] = inside.slot_tensors(trainer, slot, "shared")

    inside.around_closing_wave(trainer, before=record)
    trainer.train()
    weights = {c: float(len(rows)) if weighting == "examples" else 1.0 for c, rows in clients.items()}
    assert trainer.round_history[0]["weights"] == weights
    for key, mean in trainer.shared_state_dict().items():
        expected = np.average(
            [returned[c][key].double().numpy() for c in clients], axis=0, weights=[weights[c] for c in clients]
        )
        assert np.abs(mean.numpy() - expected).max() < 1e-6


# 6. The order of the clients does not matter.


def test_permuting_the_clients_changes_nothing(tmp_path, tokenizer, clients):
    weights = []
    for names in (list(clients), list(reversed(clients))):
        trainer = make_trainer(
            tmp_path, tokenizer, {n: clients[n] for n in names}, clients_per_round=3, parallel_clients=2
        )
        trainer.train()
        weights.append(weights_of(trainer))
    assert max_difference(*weights) < 1e-5


# 8. Saved adapters load with stock PEFT and give the trainer's logits.


@pytest.mark.parametrize(
    "peft_config",
    [
        make_lora(),
        make_lora(use_rslora=True),
        make_lora(use_dora=True),
        make_lora(target_modules=["q_proj", "embed_tokens"]),
        make_lora(init_lora_weights="pissa"),
        make_lora(init_lora_weights="pissa_niter_4", use_rslora=True),
        make_lora(init_lora_weights="olora", rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 3}),
        make_lora(init_lora_weights="gaussian", modules_to_save=["lm_head"]),
        vera(),
    ],
    ids=["lora", "rslora", "dora", "embedding", "pissa", "pissa_niter", "olora", "head", "vera"],
)
def test_saved_adapters_load_with_stock_peft_and_give_the_trainers_logits(
    tmp_path, tokenizer, clients, model_dir, peft_config
):
    trainer = make_trainer(tmp_path, tokenizer, clients, peft_config=peft_config, model=model_dir, learning_rate=1e-2)
    with torch.no_grad():
        for parameter in inside.slot_parameters(trainer, 0).values():
            parameter.mul_(1.1)  # Not what an initialisation has taken out of the base.
    trainer.train()
    trainer.save_model()
    inputs = tokenizer("the cat sat on the red mat", return_tensors="pt")
    logits = []
    for client_id in trainer.client_ids:
        with trainer.use_client(client_id) as model, torch.no_grad():
            logits.append(model.eval()(**inputs).logits)
        base = AutoModelForCausalLM.from_pretrained(model_dir)
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("error")
            # PEFT itself still asks for an attribute that transformers has renamed.
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
            stock = PeftModel.from_pretrained(base, str(tmp_path / "clients" / client_id)).eval()
            assert (stock(**inputs).logits - logits[-1]).abs().max() < 1e-5
    assert (logits[0] - logits[1]).abs().max() > 1e-4


# 9. What was sent differs from what was received and equals the live weights.


def test_what_is_sent_differs_from_what_is_received_and_equals_the_live_weights(
    tmp_path, tokenizer, clients, monkeypatch
):
    trainer = make_trainer(tmp_path, tokenizer, clients)
    received, sent, live = [], [], []

    def record_received(client_ids):
        received.append([inside.slot_tensors(trainer, slot, "shared") for slot in range(len(client_ids))])
        assert all(max_difference(got, trainer.shared_state_dict()) == 0 for got in received[-1])

    def record_live():
        live[:] = [
            {key: p.detach().clone() for key, p in inside.slot_parameters(trainer, slot, "shared").items()}
            for slot in inside.clients_in_slots(trainer).values()
        ]

    def compare():
        for tensors, expected in zip(sent[-len(live) :], live, strict=True):
            assert max_difference(tensors, expected) == 0

    add = WeightedMean.add
    monkeypatch.setattr(
        WeightedMean, "add", lambda self, tensors, weight: (sent.append(tensors), add(self, tensors, weight))
    )
    inside.after_opening_wave(trainer, record_received)
    inside.around_closing_wave(trainer, before=record_live, after=compare)
    trainer.train()
    first_round = zip(received[0], sent[:4], strict=True)
    assert all(max_difference(got, returned) > 1e-5 for got, returned in first_round)
    assert max_difference(received[0][0], received[1][0]) > 1e-5


# 10. More clients cost no memory but their stored B.

_MEMORY_PROBE = """
import sys
sys.path.insert(0, sys.argv[1])
import resource, tempfile
import conftest
from conftest import make_args, make_lora, make_model, make_rows
from hf_fedsa import FederatedTrainer
from hf_fedsa.tensors import count_bytes
tokenizer = conftest.make_tokenizer()
num_clients = int(sys.argv[2])
trainer = FederatedTrainer(
    model=make_model(hidden_size=512, intermediate_size=1024),
    args=make_args(tempfile.mkdtemp(), num_rounds=30, clients_per_round=4, local_steps=1),
    train_dataset={f"client_{i}": make_rows(2, seed=i) for i in range(num_clients)},
    processing_class=tokenizer,
    peft_config=make_lora(r=128),
)
trainer.train()
trained = len({c for entry in trainer.round_history for c in entry["clients"]})
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(trained, peak, count_bytes(trainer.client_state_dict("client_0")))
"""


def test_memory_grows_with_clients_by_their_stored_b_alone(tmp_path):
    peaks = {}
    for num_clients in (4, 40):
        done = subprocess.run(
            [sys.executable, "-c", _MEMORY_PROBE, os.path.dirname(__file__), str(num_clients)],
            capture_output=True,
            text=True,
            # Freed tensors go back to the system at once, so that the peak is what was held.
            env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},
        )
        assert done.returncode == 0, done.stderr[-2000:]
        trained, peak, stored = map(int, done.stdout.split()[-3:])
        assert trained > 0.9 * num_clients
        # The system rounds each tensor up to whole pages.
        peaks[num_clients] = peak - 1.05 * trained * stored
    assert peaks[40] < peaks[4]
