"""4-bit base layers stay as training needs them, on CPUs that pack them for inference and on others."""

import pytest
import torch
from conftest import make_args, make_lora, make_model, make_rows, make_tokenizer, max_difference
from peft import get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TrainerCallback

from hf_fedsa import FederatedTrainer
from hf_fedsa.client.base_layers import GradientProbe, keep_layout, unpack
from hf_fedsa.hub.merging import merge

bitsandbytes = pytest.importorskip("bitsandbytes")


@pytest.fixture(autouse=True)
def packing_cpu(monkeypatch):
    """As on a CPU with AVX-512 bf16: evaluation packs 4-bit weights in place, and then they have no gradient."""
    multiply = bitsandbytes.functional.gemv_4bit
    monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: True)
    monkeypatch.setattr(bitsandbytes.functional, "gemv_4bit", lambda *args, **kw: multiply(*args, **kw).detach())


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("base")
    # Packing needs outputs by 32 and inputs by 64.
    make_model(hidden_size=64, intermediate_size=128, num_key_value_heads=4, initializer_range=0.2).save_pretrained(
        directory
    )
    return str(directory)


def load_base(base_dir, **kwargs):
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", **kwargs)
    return AutoModelForCausalLM.from_pretrained(base_dir, quantization_config=config, dtype=torch.float32)


def layers_of(model):
    return [module for module in model.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]


def is_packed(layer):
    return getattr(layer.weight.quant_state, "packing_format_for_cpu", False)


def run_in_evaluation_mode(model):
    """What packs the weights. On CPUs that cannot compute with them, it may fail after that."""
    for layer in layers_of(model):
        layer.eval()
        try:
            layer(torch.ones(1, layer.in_features))
        except (AttributeError, RuntimeError, ValueError):
            pass


def dequantized(model):
    return {
        str(i): bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        for i, layer in enumerate(layers_of(model))
    }


def make_trainer(base, output_dir, **kwargs):
    callbacks = kwargs.pop("callbacks", None)
    return FederatedTrainer(
        model=base,
        args=make_args(
            output_dir, **{"num_rounds": 2, "local_steps": 2, "optim": "sgd", "learning_rate": 1.0, **kwargs}
        ),
        train_dataset={f"client_{i}": make_rows(4, seed=i) for i in range(2)},
        eval_dataset={f"client_{i}": make_rows(2, seed=9) for i in range(2)},
        processing_class=make_tokenizer(),
        peft_config=make_lora(),
        callbacks=callbacks,
    )


def weights_of(trainer):
    return {
        **trainer.shared_state_dict(),
        **{f"{c}|{k}": t for c in trainer.client_ids for k, t in trainer.client_state_dict(c).items()},
    }


class EvaluatesInBetween(TrainerCallback):
    """A user's own code: it puts the model into evaluation mode, runs it, and leaves it so."""

    def on_step_end(self, args, state, control, model, **kwargs):
        model.eval()
        with torch.no_grad():
            model(input_ids=torch.tensor([[3, 4, 5]]))


def test_whatever_evaluates_the_model_training_is_the_same(base_dir, tmp_path):
    plain = make_trainer(load_base(base_dir), tmp_path)
    start = weights_of(plain)
    plain.train()
    trainer = make_trainer(load_base(base_dir), tmp_path, callbacks=[EvaluatesInBetween()], eval_strategy="epoch")
    trainer.evaluate()
    with trainer.use_client("client_1") as model:
        model.eval()
        model.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=2)
    trainer.train()
    trainer.evaluate()
    assert not any(map(is_packed, layers_of(trainer.model)))
    assert max_difference(weights_of(trainer), weights_of(plain)) == 0
    # Every adapter has learned, and not only those that the residual stream leads to.
    trained = weights_of(plain)
    assert all((trained[key] - start[key]).abs().max() > 1e-6 for key in trained)


@pytest.mark.parametrize("double", [False, True], ids=["plain scales", "quantized scales"])
def test_a_base_used_before_is_taken_back(base_dir, double):
    base = load_base(base_dir, bnb_4bit_use_double_quant=double)
    original = dequantized(base)
    run_in_evaluation_mode(base)
    assert all(map(is_packed, layers_of(base)))
    assert keep_layout(base) == len(layers_of(base))
    assert keep_layout(base) == 0
    rounded = dequantized(base)
    for name, weight in original.items():
        # The scales have kept the 8 bits of bf16.
        assert ((rounded[name] - weight).abs() <= 2**-8 * weight.abs()).all(), name
        assert weight.abs().max() > 0.1
    run_in_evaluation_mode(base)
    assert not any(map(is_packed, layers_of(base)))
    assert max_difference(dequantized(base), rounded) == 0


def test_a_trainer_given_a_used_base_learns_and_says_so(base_dir, tmp_path, caplog):
    base = load_base(base_dir)
    run_in_evaluation_mode(base)
    trainer = make_trainer(base, tmp_path)
    assert "14 base layers had been packed for inference" in caplog.text
    start = weights_of(trainer)
    trainer.train()
    assert all((tensor - start[key]).abs().max() > 1e-6 for key, tensor in weights_of(trainer).items())


def test_a_model_of_odd_size_can_be_evaluated(base_dir, tmp_path):
    make_model(hidden_size=48, intermediate_size=80).save_pretrained(tmp_path / "base")
    trainer = make_trainer(load_base(tmp_path / "base"), tmp_path / "out")
    assert trainer.evaluate()["eval_loss"] > 0


def test_merging_into_a_base_used_before_merges_into_its_weights(base_dir):
    bases = [load_base(base_dir), load_base(base_dir)]
    run_in_evaluation_mode(bases[0])
    unpack(bases[1])
    merged = []
    for base in bases:
        model = get_peft_model(base, make_lora())
        with torch.no_grad():
            for i, parameter in enumerate(p for name, p in model.named_parameters() if "lora_" in name):
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)) * 0.1)
        merged.append(dequantized(merge(model)))
    assert max_difference(*merged) < 0.2 < max(weight.abs().max() for weight in merged[0].values())


class TestProbe:
    class WithoutGradient(nn.Linear):
        """A base layer of a class of its own whose forward is cut off from the graph."""

        def forward(self, x):
            return super().forward(x).detach()

    class WithZeroGradient(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 0

    def model_with(self, kind):
        model = get_peft_model(make_model(), make_lora())
        layer = model.base_model.model.model.layers[1].mlp.up_proj
        layer.base_layer = kind(layer.in_features, layer.out_features, bias=False)
        return model

    @pytest.mark.parametrize("kind", [WithoutGradient, WithZeroGradient])
    def test_one_layer_without_a_gradient_is_found(self, kind):
        with pytest.raises(RuntimeError, match=f"`{kind.__name__}` pass no gradient"):
            GradientProbe(self.model_with(kind)).check()

    def test_a_packed_layer_is_found_wherever_it_is(self, base_dir):
        model = get_peft_model(load_base(base_dir), make_lora(target_modules=["q_proj"]))
        probe = GradientProbe(model)
        probe.check()
        run_in_evaluation_mode(model.base_model.model.model.layers[1].mlp.down_proj)
        with pytest.raises(RuntimeError, match="`Linear4bit` pass no gradient"):
            probe.check()

    def test_it_leaves_the_layers_and_random_numbers_alone(self, base_dir):
        model = get_peft_model(load_base(base_dir, bnb_4bit_compute_dtype=None), make_lora()).eval()
        before = [dict(vars(layer)) for layer in layers_of(model)], torch.get_rng_state()
        GradientProbe(model).check()
        assert [dict(vars(layer)) for layer in layers_of(model)] == before[0]
        assert torch.equal(torch.get_rng_state(), before[1])

    def test_training_stops_where_a_round_begins(self, base_dir, tmp_path):
        trainer = make_trainer(load_base(base_dir), tmp_path)
        run_in_evaluation_mode(trainer.model)  # Not packed: the trainer has seen to that.
        for layer in layers_of(trainer.model):
            layer.support_avx512bf16_for_cpu = True
        run_in_evaluation_mode(trainer.model)
        with pytest.raises(RuntimeError, match="pass no gradient"):
            trainer.train()

    def test_training_stops_after_an_evaluation(self, base_dir, tmp_path):
        class Packs(TrainerCallback):
            def on_step_end(self, args, state, control, model, **kwargs):
                for layer in layers_of(model):
                    layer.support_avx512bf16_for_cpu = True
                model.eval()
                run_in_evaluation_mode(model)

        trainer = make_trainer(load_base(base_dir), tmp_path, callbacks=[Packs()])
        with pytest.raises(RuntimeError, match="pass no gradient"):
            trainer.train()
        assert trainer.state.global_step == 1


def test_evaluating_in_half_precision_leaves_a_quantized_model_as_it_was(base_dir, tmp_path):
    trainer = make_trainer(load_base(base_dir), tmp_path, bf16_full_eval=True)
    before = {key: tensor.clone() for key, tensor in trainer.model.state_dict().items()}
    half = trainer.evaluate()["eval_loss"]
    after = trainer.model.state_dict()
    assert all(torch.equal(after[key], tensor) and after[key].dtype == tensor.dtype for key, tensor in before.items())
    trainer.args.bf16_full_eval = False
    full = trainer.evaluate()["eval_loss"]
    assert half != full and half == pytest.approx(full, rel=0.05)
