"""What only a CUDA device can show."""

import pytest
import torch
from conftest import make_args, make_lora, make_model, make_rows, make_tokenizer, max_difference
from test_invariants import weights_of
from transformers import BitsAndBytesConfig

from hf_fedsa import FederatedTrainer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture
def base(tmp_path):
    make_model(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def train(base, output_dir, quantization=None, **kwargs):
    trainer = FederatedTrainer(
        model=base,
        args=make_args(output_dir, use_cpu=False, **kwargs),
        train_dataset={f"client_{i}": make_rows(8, seed=i) for i in range(4)},
        peft_config=make_lora(),
        quantization_config=quantization,
    )
    trainer.train()
    return trainer


def test_side_by_side_gives_the_weights_of_one_after_the_other(base, tmp_path):
    weights = [
        weights_of(train(base, tmp_path / str(parallel), parallel_clients=parallel, learning_rate=1e-3))
        for parallel in (1, 4)
    ]
    assert max_difference(*weights) < 1e-4


def test_qlora_in_bf16_with_paged_8_bit_adamw_learns(base, tmp_path):
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
    trainer = train(
        base, tmp_path / "out", quantization, bf16=True, optim="paged_adamw_8bit", num_rounds=5, local_steps=5
    )
    means = [sum(entry["losses"].values()) / len(entry["losses"]) for entry in trainer.round_history]
    assert means[-1] < means[0]
