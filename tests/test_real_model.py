"""The main job on SmolLM2-135M-Instruct in 4 bit. Run with `make test-slow`."""

from pathlib import Path

import inside
import pytest
import torch
from conftest import make_args, make_lora
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from hf_fedsa import FederatedTrainer
from hf_fedsa.client.base_layers import keep_layout
from hf_fedsa.tensors import count_bytes

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def recipes(monkeypatch_module):
    monkeypatch_module.syspath_prepend(str(Path(__file__).parents[1] / "recipes"))


@pytest.fixture(scope="module")
def monkeypatch_module():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def base(recipes):
    from smollm2 import smollm2_folder

    return str(smollm2_folder())


QUANTIZATION = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")


def make_trainer(base, output_dir, **kwargs):
    from gsm8k import as_prompts
    from word_problems import make_clients

    train, evaluation = make_clients(num_examples=24, num_eval=4)
    arguments = {"num_rounds": 3, "local_steps": 4, "learning_rate": 2e-3, "max_length": 96, **kwargs}
    return FederatedTrainer(
        model=base,
        args=make_args(output_dir, **arguments),
        train_dataset={name: as_prompts(rows) for name, rows in train.items()},
        eval_dataset={name: as_prompts(rows) for name, rows in evaluation.items()},
        peft_config=make_lora(r=8, lora_alpha=16),
        quantization_config=QUANTIZATION,
    )


def test_clients_learn_their_own_form_and_load_with_stock_peft(base, tmp_path):
    trainer = make_trainer(base, tmp_path)
    clients = trainer.client_ids
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    for owner in clients:
        assert after[f"eval_{owner}_loss"] < 0.5 * before[f"eval_{owner}_loss"]
        others = trainer.evaluate(dict.fromkeys(clients, trainer.eval_dataset[owner]), metric_key_prefix="cross")
        assert min(clients, key=lambda client_id: others[f"cross_{client_id}_loss"]) == owner

    shared = inside.slot_parameters(trainer, 0, "shared")
    assert all(entry["bytes_up"] == len(clients) * count_bytes(shared) for entry in trainer.round_history)

    trainer.save_model()
    inputs = AutoTokenizer.from_pretrained(base)("Question: Ada has 3 pens.\nAnswer:", return_tensors="pt")
    for client_id in clients:
        with trainer.use_client(client_id) as model, torch.no_grad():
            expected = model.eval()(**inputs).logits
        model = AutoModelForCausalLM.from_pretrained(base, quantization_config=QUANTIZATION, dtype=torch.float32)
        keep_layout(model)  # As in the trainer: some CPUs compute in bf16 else.
        model = PeftModel.from_pretrained(model, str(tmp_path / "clients" / client_id)).eval()
        with torch.no_grad():
            assert (model(**inputs).logits - expected).abs().max() < 1e-3


def distance(first, second):
    return sum(float((first[key] - second[key]).square().sum()) for key in first) ** 0.5


def test_the_number_of_clients_side_by_side_does_not_change_a_qlora_run(base, tmp_path):
    shared = []
    for parallel in (1, 3):
        trainer = make_trainer(base, tmp_path / str(parallel), parallel_clients=parallel, num_rounds=1, local_steps=2)
        start = trainer.shared_state_dict()
        trainer.train()
        shared.append(trainer.shared_state_dict())
    # Slots are bf16 here, so the last float of a gradient may flip the rounding of a weight, but only of a few.
    differing = [distance(first, second) for first, second in (shared, (start, shared[0]))]
    assert differing[0] < 0.1 * differing[1]
