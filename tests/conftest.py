"""A two-layer Llama and a word tokenizer, both made in memory, and federations of a few rows."""

from local_hub import HUB  # isort: skip  # Sets what `huggingface_hub` reads on import.

import gc

import numpy as np
import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_fedsa import FederatedConfig, FedSALoraConfig
from hf_fedsa.client.waves import WavePlanner
from hf_fedsa.server.sampling import ask_sampler

WORDS = (
    "the a cat dog bird sat ran flew on under over mat tree house red blue green big small and then it was very happy "
    "sad one two three four five six seven eight nine ten user assistant system : is"
).split()

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ' : ' + message['content'] + ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant : ' }}{% endif %}"
)


@pytest.fixture(scope="session", autouse=True)
def frozen_imports():
    """Every `train()` collects garbage, and would go through all imported modules each time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def hub():
    HUB.reset()
    yield HUB
    HUB.reset()


def make_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        chat_template=CHAT_TEMPLATE,
    )


@pytest.fixture
def tokenizer():
    return make_tokenizer()


def make_model(seed: int = 0, **config) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    values = {
        "vocab_size": len(WORDS) + 3,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 1,
    }
    return LlamaForCausalLM(LlamaConfig(**{**values, **config}))


def make_rows(num_rows: int, seed: int, min_words: int = 4, max_words: int = 10) -> Dataset:
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    return Dataset.from_dict(
        {
            "text": [
                " ".join(WORDS[draw(0, 40)] for _ in range(draw(min_words, max_words + 1))) for _ in range(num_rows)
            ]
        }
    )


@pytest.fixture
def clients():
    return {f"client_{i}": make_rows(8, seed=i) for i in range(4)}


@pytest.fixture
def model_dir(tmp_path_factory, tokenizer):
    """The tiny model in a folder of its own, so that saved adapters can name their base."""
    directory = tmp_path_factory.mktemp("base")
    make_model().save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


def make_args(output_dir, **kwargs) -> FederatedConfig:
    values = {
        "num_rounds": 2,
        "local_steps": 3,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "max_length": 32,
    }
    return FederatedConfig(str(output_dir), **{**values, **kwargs})


def make_lora(**kwargs) -> FedSALoraConfig:
    return FedSALoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **kwargs})


def max_difference(first: dict, second: dict) -> float:
    assert first.keys() == second.keys()
    return max(float((first[key].float() - second[key].float()).abs().max()) for key in first)


def plan_round(
    round_index,
    num_rows,
    work,
    clients_per_round,
    *,
    parallel_clients,
    sampler,
    num_processes=1,
    process_index=0,
    row_lengths=None,
    trained=(),
):
    """A round as it is sampled by a server and planned by clients with these numbers of rows, of these lengths."""
    client_ids = ask_sampler(sampler, round_index, num_rows, clients_per_round)
    ends = np.cumsum(list(num_rows.values()))
    rows_of = {c: list(range(end - num_rows[c], end)) for c, end in zip(num_rows, ends, strict=True)}
    lengths = None
    if row_lengths is not None:
        lengths = np.concatenate([np.full(n, row_lengths[client_id]) for client_id, n in num_rows.items()])
    planner = WavePlanner(
        rows_of,
        work,
        parallel_clients=parallel_clients,
        seed=0,
        lengths=lengths,
        num_processes=num_processes,
        process_index=process_index,
    )
    return planner.plan(round_index, client_ids, trained)
