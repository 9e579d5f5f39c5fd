"""What is saved of a federation, and how it is loaded again."""

import json

import inside
import pytest
import torch
from conftest import make_args, make_lora, make_model, make_rows, make_tokenizer, max_difference
from datasets import Dataset
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    LlamaForSequenceClassification,
    PreTrainedModel,
    Trainer,
)

from hf_fedsa import FederatedMixin, FederatedTrainer, hub, load_personalized_model
from hf_fedsa.hub.merging import merge
from hf_fedsa.tensors import tensors_sha256


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("base")
    make_model(hidden_size=64, intermediate_size=128).save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="module")
def inputs():
    return make_tokenizer()("the cat sat on the red mat", return_tensors="pt")


def train(base_dir, output_dir, inputs, **kwargs):
    """Trains and saves a federation, and returns the trainer with every client's logits."""
    trainer = FederatedTrainer(
        model=base_dir,
        args=make_args(output_dir, learning_rate=1e-2),
        train_dataset={f"client_{i}": make_rows(6, seed=i) for i in range(3)},
        peft_config=make_lora(),
        **kwargs,
    )
    trainer.train()
    trainer.save_model()
    logits = {}
    for client_id in trainer.client_ids:
        with trainer.use_client(client_id) as model, torch.no_grad():
            logits[client_id] = model.eval()(**inputs).logits
    return trainer, logits


@pytest.fixture(scope="module")
def saved(base_dir, inputs, tmp_path_factory):
    return train(base_dir, tmp_path_factory.mktemp("out"), inputs)


@torch.no_grad()
def test_a_loaded_client_gives_the_logits_the_trainer_evaluated_with(saved, inputs):
    trainer, logits = saved
    for client_id, expected in logits.items():
        model = load_personalized_model(trainer.args.output_dir, client_id=client_id)
        assert (model(**inputs).logits - expected).abs().max() < 1e-5
        assert not model.training


@torch.no_grad()
def test_merged_is_a_plain_model_with_the_same_logits(saved, inputs):
    trainer, logits = saved
    model = load_personalized_model(trainer.args.output_dir, "client_1", merge=True)
    assert isinstance(model, PreTrainedModel)
    assert not isinstance(model, PeftModel)
    assert (model(**inputs).logits - logits["client_1"]).abs().max() < 1e-5


@torch.no_grad()
def test_an_adapter_goes_on_a_base_that_is_already_loaded(saved, inputs, base_dir):
    trainer, logits = saved
    base = AutoModelForCausalLM.from_pretrained(base_dir)
    model = load_personalized_model(trainer.args.output_dir, "client_2", base_model=base)
    assert model.get_base_model() is base
    assert (model(**inputs).logits - logits["client_2"]).abs().max() < 1e-5
    with pytest.raises(ValueError, match="`dtype`.*already loaded|already loaded.*`dtype`"):
        load_personalized_model(trainer.args.output_dir, "client_2", base_model=base, dtype=torch.float32)


def test_a_quantized_federation_loads_as_stock_peft_loads_it(base_dir, inputs, tmp_path, monkeypatch):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    # Where it can, it computes in bf16 outside of training. What is compared here is what was saved.
    monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: False)
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    trainer, logits = train(base_dir, tmp_path, inputs, quantization_config=quantization)
    assert inside.slot_tensors(trainer, 0, "local").popitem()[1].dtype == torch.bfloat16
    for client_id, expected in logits.items():
        ours = load_personalized_model(tmp_path, client_id, quantization_config=quantization, dtype=torch.float32)
        base = AutoModelForCausalLM.from_pretrained(base_dir, quantization_config=quantization, dtype=torch.float32)
        stock = PeftModel.from_pretrained(base, str(tmp_path / "clients" / client_id)).eval()
        with torch.no_grad():
            assert torch.equal(ours(**inputs).logits, stock(**inputs).logits)
            assert (ours(**inputs).logits - expected).abs().max() < 1e-5


def test_files_hold_a_alone_and_complete_adapters(saved):
    trainer, _ = saved
    out = trainer.args.output_dir
    shared = load_file(f"{out}/shared/adapter_model.safetensors")
    assert all(key.endswith("lora_A.weight") for key in shared)
    assert max_difference(shared, trainer.shared_state_dict()) == 0
    for client_id in trainer.client_ids:
        adapter = load_file(f"{out}/clients/{client_id}/adapter_model.safetensors")
        local = {key: tensor for key, tensor in adapter.items() if key not in shared}
        assert max_difference({key: adapter[key] for key in shared}, shared) == 0
        assert max_difference(local, trainer.client_state_dict(client_id)) == 0
    federation = json.loads(open(f"{out}/federation.json").read())
    assert federation["shared_sha256"] == tensors_sha256(trainer.shared_state_dict())
    assert (federation["method"], federation["adapter_kind"]) == ("fedsa", "lora")
    assert federation["rounds_done"] == 2
    assert list(federation["clients"]) == trainer.client_ids


def test_a_client_that_never_trained_is_saved_with_the_shared_a(base_dir, tmp_path, inputs):
    trainer = FederatedTrainer(
        model=base_dir,
        args=make_args(tmp_path, num_rounds=1, clients_per_round=1),
        train_dataset={f"client_{i}": make_rows(6, seed=i) for i in range(3)},
        peft_config=make_lora(),
    )
    trainer.train()
    trainer.save_model()
    federation = json.loads((tmp_path / "federation.json").read_text())
    waiting = [client_id for client_id, entry in federation["clients"].items() if entry["last_round"] is None]
    assert len(waiting) == 2
    base = AutoModelForCausalLM.from_pretrained(base_dir)
    with torch.no_grad():
        expected = base(**inputs).logits
        model = load_personalized_model(tmp_path, waiting[0], base_model=base)
        assert (model(**inputs).logits - expected).abs().max() < 1e-6


def test_one_unnamed_client_is_also_saved_as_its_trainer_saves(base_dir, tmp_path, inputs):
    trainer = FederatedTrainer(
        model=base_dir,
        args=make_args(tmp_path, num_rounds=1, local_steps=None),
        train_dataset=make_rows(6, seed=0),
        peft_config=make_lora(),
    )
    trainer.train()
    trainer.save_model()
    with torch.no_grad():
        expected = trainer.model.eval()(**inputs).logits
        for folder in (tmp_path, tmp_path / "clients" / "client_0"):
            model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_dir), str(folder)).eval()
            assert (model(**inputs).logits - expected).abs().max() < 1e-6


def test_a_wrong_client_lists_the_ones_there_are(saved):
    with pytest.raises(ValueError, match="no client 'client_9'.*client_0, client_1, client_2"):
        load_personalized_model(saved[0].args.output_dir, "client_9")


def test_a_folder_without_a_federation_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}.*federation.json"):
        load_personalized_model(tmp_path, "client_0")


def test_a_client_store_of_another_run_is_not_overwritten(base_dir, tmp_path):
    def make(name):
        return FederatedTrainer(
            model=base_dir,
            args=make_args(tmp_path / name, client_store_dir=str(tmp_path / "store")),
            train_dataset={f"client_{i}": make_rows(6, seed=i) for i in range(3)},
            peft_config=make_lora(),
        )

    first = make("first")
    first.train()
    files = {path: path.read_bytes() for path in (tmp_path / "store").rglob("*.safetensors")}
    assert len(files) == 3
    second = make("second")
    assert max_difference(first.client_state_dict("client_0"), second.client_state_dict("client_0")) > 0
    assert not any(tensor.any() for tensor in second.client_state_dict("client_0").values())
    with pytest.raises(ValueError, match="`client_store_dir=.*another run"):
        second.train()
    assert {path: path.read_bytes() for path in files} == files
    first.train()


def test_a_file_of_another_save_or_client_is_refused(base_dir, tmp_path, inputs):
    train(base_dir, tmp_path, inputs)
    first, second = (tmp_path / "clients" / name / "adapter_model.safetensors" for name in ("client_0", "client_1"))
    first.write_bytes(second.read_bytes())
    with pytest.raises(ValueError, match="client_0.*another save or another client"):
        load_personalized_model(tmp_path, "client_0")
    load_personalized_model(tmp_path, "client_1")
    (tmp_path / "federation.json").write_text("{")
    with pytest.raises(ValueError, match="federation.json is damaged"):
        load_personalized_model(tmp_path, "client_1")


def test_a_base_with_an_adapter_is_refused(saved, base_dir):
    base = AutoModelForCausalLM.from_pretrained(base_dir)
    load_personalized_model(saved[0].args.output_dir, "client_0", base_model=base)
    with pytest.raises(ValueError, match="already carries an adapter"):
        load_personalized_model(saved[0].args.output_dir, "client_1", base_model=base)


def test_the_base_is_loaded_in_the_dtype_of_training(tmp_path, inputs):
    make_model().to(torch.bfloat16).save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    trainer, logits = train(str(tmp_path / "base"), tmp_path / "out", inputs)
    model = load_personalized_model(tmp_path / "out", "client_1")
    with torch.no_grad():
        assert (model(**inputs).logits - logits["client_1"]).abs().max() < 1e-5


def test_a_classifier_loads_as_a_classifier(tmp_path, inputs):
    config = make_model().config
    config.num_labels = 4
    LlamaForSequenceClassification(config).save_pretrained(tmp_path / "base")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    rows = {f"client_{i}": Dataset.from_dict({"input_ids": [[5, 6, 7]] * 4, "labels": [0, 1, 2, 3]}) for i in range(2)}

    class FederatedClassifier(FederatedMixin, Trainer):
        pass

    peft_config = make_lora(modules_to_save=["score"], task_type="SEQ_CLS")
    trainer = FederatedClassifier(
        model=get_peft_model(base, peft_config), args=make_args(tmp_path / "out"), train_dataset=rows
    )
    trainer.train()
    trainer.save_model()
    with trainer.use_client("client_1") as model, torch.no_grad():
        expected = model.eval()(input_ids=inputs["input_ids"]).logits
    model = load_personalized_model(tmp_path / "out", "client_1")
    with torch.no_grad():
        assert (model(input_ids=inputs["input_ids"]).logits - expected).abs().max() < 1e-5


def test_clients_of_an_earlier_run_are_pointed_out(base_dir, tmp_path, inputs, caplog):
    (tmp_path / "clients" / "gone").mkdir(parents=True)
    train(base_dir, tmp_path, inputs)
    assert "gone" in caplog.text


TIED = [
    ({"target_modules": ["q_proj", "embed_tokens"]}, False),
    ({"target_modules": ["q_proj", "lm_head"]}, False),
    ({"target_modules": ["embed_tokens", "lm_head"]}, False),
    ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, False),
    ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, False),
    ({"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}, False),
    ({"target_modules": ["q_proj"]}, True),
]


@pytest.mark.parametrize(("adapted", "stays_tied"), TIED)
@torch.no_grad()
def test_merging_into_tied_embeddings_changes_no_logits(tmp_path, inputs, adapted, stays_tied):
    base = make_model(tie_word_embeddings=True)
    plain = base(**inputs).logits
    model = get_peft_model(base, make_lora(**adapted)).eval()
    for name, parameter in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    expected = model(**inputs).logits
    assert (expected - plain).abs().max() > 0.002
    merged = merge(model)
    assert torch.allclose(merged(**inputs).logits, expected, atol=1e-4)
    assert merged.config.tie_word_embeddings is stays_tied
    merged.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.allclose(again(**inputs).logits, expected, atol=1e-4)
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == stays_tied


def test_a_client_is_merged_into_tied_embeddings(tmp_path, inputs):
    make_model(tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    trainer = FederatedTrainer(
        model=str(tmp_path / "base"),
        args=make_args(tmp_path / "out", learning_rate=0.5, num_rounds=1),
        train_dataset={f"client_{i}": make_rows(4, seed=i) for i in range(2)},
        processing_class=make_tokenizer(),
        peft_config=make_lora(target_modules=["embed_tokens"]),
    )
    trainer.train()
    trainer.save_model()
    merged = load_personalized_model(tmp_path / "out", "client_1", merge=True)
    with torch.no_grad():
        expected = load_personalized_model(tmp_path / "out", "client_1")(**inputs).logits
        assert torch.allclose(merged(**inputs).logits, expected, atol=1e-4)
    assert not merged.config.tie_word_embeddings


def test_merging_into_a_weight_that_serves_elsewhere_is_refused():
    base = make_model()
    base.model.layers[1].mlp.up_proj.weight = base.model.layers[0].mlp.up_proj.weight
    model = get_peft_model(base, make_lora(target_modules=["layers.0.mlp.up_proj"]))
    before = base.model.layers[1].mlp.up_proj.weight.clone()
    with pytest.raises(ValueError, match="layers.0.mlp.up_proj.*which is also that of 'model.layers.1.mlp.up_proj'"):
        merge(model)
    assert torch.equal(base.model.layers[1].mlp.up_proj.weight, before)


@pytest.mark.parametrize("name", hub.__all__)
def test_every_public_name_is_found(name):
    assert getattr(hub, name) is not None
    assert name in dir(hub)


def test_other_names_are_not():
    with pytest.raises(AttributeError, match="module 'hf_fedsa.hub' has no attribute 'load_everything'"):
        hub.load_everything  # noqa: B018
