"""The model that users are handed: what is saved of it is one client's, and its copies are models of their own."""

import copy
import functools
from pathlib import Path

import inside
import pytest
import torch
from conftest import make_args, make_lora, make_model, make_rows, make_tokenizer, max_difference
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file

from hf_fedsa import FederatedTrainer

IDS = torch.tensor([[3, 4, 5, 6, 7]])


def make_trainer(folder, **kwargs):
    return FederatedTrainer(
        make_model(),
        args=make_args(folder, num_rounds=1, local_steps=2, **kwargs),
        train_dataset={f"client_{i}": make_rows(4, seed=i) for i in range(3)},
        processing_class=make_tokenizer(),
        peft_config=make_lora(),
    )


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    trainer = make_trainer(tmp_path_factory.mktemp("run"))
    assert inside.num_slots(trainer) == 3
    trainer.train()
    return trainer


def adapter_of(trainer, client_id: str) -> dict[str, torch.Tensor]:
    return {**trainer.shared_state_dict(), **trainer.client_state_dict(client_id)}


def files_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits


class TestSaving:
    ONE_ADAPTER = {"README.md", "adapter_config.json", "adapter_model.safetensors"}

    def test_within_use_client_the_client_alone_is_saved(self, trainer, tmp_path):
        with trainer.use_client("client_1") as model:
            model.save_pretrained(tmp_path)
            expected = logits(model)
        assert files_in(tmp_path) == self.ONE_ADAPTER
        saved = load_file(tmp_path / "adapter_model.safetensors")
        assert max_difference(saved, adapter_of(trainer, "client_1")) == 0
        stock = PeftModel.from_pretrained(make_model(), tmp_path)
        assert float((logits(stock) - expected).abs().max()) < 1e-5

    def test_within_use_client_the_client_alone_is_pushed(self, trainer, hub):
        with trainer.use_client("client_2") as model:
            model.push_to_hub("me/one", private=True)
        assert hub.files("me/one").keys() == {".gitattributes", *self.ONE_ADAPTER}

    def test_after_training_it_is_the_first_client(self, trainer, tmp_path):
        trainer.model.save_pretrained(tmp_path)
        assert files_in(tmp_path) == self.ONE_ADAPTER
        saved = load_file(tmp_path / "adapter_model.safetensors")
        assert max_difference(saved, adapter_of(trainer, "client_0")) == 0
        assert max_difference(get_peft_model_state_dict(trainer.model), saved) == 0

    def test_after_training_the_state_dict_holds_no_other_clients_b(self, trainer):
        others = {k: t for k, t in trainer.model.state_dict().items() if "lora_B.slot_" in k}
        assert len(others) == 2 * 14 and not any(tensor.any() for tensor in others.values())

    def test_a_slot_is_no_client_and_is_refused_by_name(self, trainer, tmp_path):
        with pytest.raises(ValueError, match="`selected_adapters` names 'slot_1'.*`trainer.use_client"):
            trainer.model.save_pretrained(tmp_path, selected_adapters=["default", "slot_1"])
        assert not any(tmp_path.iterdir())
        trainer.model.save_pretrained(tmp_path, True, ["default"])
        assert files_in(tmp_path) == self.ONE_ADAPTER


@pytest.fixture(scope="module")
def copied(trainer):
    with trainer.use_client("client_1") as model:
        return copy.deepcopy(model), logits(model)


class TestCopies:
    def test_a_copy_is_the_client_that_it_was_made_of(self, copied):
        model, expected = copied
        assert float((logits(model) - expected).abs().max()) < 1e-5

    def test_a_copy_computes_with_its_own_weights(self, copied, trainer):
        model, expected = copied
        changed, original = copy.deepcopy(model), logits(trainer.model)
        with torch.no_grad():
            for name, parameter in changed.named_parameters():
                if "lora_B.default" in name or "norm" in name:
                    parameter.add_(0.5)
        assert float((logits(changed) - expected).abs().max()) > 0.1
        assert torch.equal(logits(trainer.model), original)
        assert float((logits(model) - expected).abs().max()) < 1e-5

    def test_a_copy_learns_by_itself(self, copied):
        model = copy.deepcopy(copied[0]).train()
        model(input_ids=IDS, labels=IDS).loss.backward()
        assert all(p.grad is not None for name, p in model.named_parameters() if ".default" in name)

    def test_a_copy_saves_one_client_too(self, copied, tmp_path):
        copied[0].save_pretrained(tmp_path)
        assert files_in(tmp_path) == TestSaving.ONE_ADAPTER
        saved = load_file(tmp_path / "adapter_model.safetensors")
        assert max_difference(saved, get_peft_model_state_dict(copied[0])) == 0

    def test_a_layer_of_the_copy_belongs_to_the_copy(self, copied, trainer):
        def layer(model):
            return model.base_model.model.model.layers[0].self_attn.q_proj

        for model in (copied[0], trainer.model):
            forward = layer(model).forward
            assert isinstance(forward, functools.partial) and forward.args[0] is layer(model)
            assert forward.args[1].__self__ is layer(model)
        assert layer(copied[0]).forward.args[3] is not inside.routing_of(trainer)
        assert layer(copied[0]).forward.args[3].active_rows is None
