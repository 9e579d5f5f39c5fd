"""Slots: clients side by side give what each gives alone, whatever the layer, and nothing passes between them."""

import copy
import random
from dataclasses import dataclass
from functools import partial

import numpy as np
import peft.tuners.lora
import pytest
import torch
from conftest import make_lora, make_model
from peft import LoHaConfig, LoraConfig, VeraConfig, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.vera import VeraLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
)

from hf_fedsa.adapters import ADAPTERS, AdapterKind
from hf_fedsa.client import parameters, slots
from hf_fedsa.client.slots import Slots

NUM_SLOTS = 3
LENGTH = 6
VOCABULARY = 40

LINEAR_LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

ROWS = {
    "equal": ((0, 2), (1, 2), (2, 2)),
    "unequal": ((0, 1), (1, 3), (2, 2)),
    "slot_1_absent": ((0, 2), (2, 2)),
    "one_slot": ((1, 2),),
    "equal_in_reverse": ((2, 2), (0, 2)),
    "unequal_in_reverse": ((2, 3), (1, 1), (0, 2)),
}


# Models, one per layer kind


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv1d(5, 6, kernel_size=3, padding=1)
        self.conv2 = nn.Conv2d(1, 4, kernel_size=3, padding=1)
        self.out = nn.Linear(4 * 6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (rows, 5, length)
        x = torch.tanh(self.conv1(x))  # (rows, 6, length)
        x = torch.tanh(self.conv2(x[:, None]))  # (rows, 4, 6, length)
        return self.out(x.flatten(1, 2).mT)


def base_llama(**config):
    return make_model(vocab_size=VOCABULARY, **config)


def base_gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_positions=16, n_embd=32, n_layer=2, n_head=2, attn_pdrop=0, embd_pdrop=0)
    )


def base_classifier():
    torch.manual_seed(0)
    return LlamaForSequenceClassification(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_labels=3,
            pad_token_id=0,
        )
    )


def base_convolutions():
    torch.manual_seed(0)
    return Convolutions()


def base_quantized(directory, **config):
    pytest.importorskip("bitsandbytes", reason="quantized layers need bitsandbytes")
    base_llama(hidden_size=64, intermediate_size=128).save_pretrained(directory)
    return AutoModelForCausalLM.from_pretrained(
        directory, quantization_config=BitsAndBytesConfig(**config), device_map={"": "cpu"}, dtype=torch.float32
    )


def lora(**kwargs):
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": LINEAR_LAYERS, **kwargs})


def vera(**kwargs):
    return VeraConfig(**{"r": 8, "target_modules": LINEAR_LAYERS, **kwargs})


NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
INT8 = {"load_in_8bit": True}

# Layer kind: base model, adapter config.
KINDS = {
    "lora": (base_llama, lora),
    "rslora": (base_llama, partial(lora, use_rslora=True)),
    "lora_bias": (base_llama, partial(lora, lora_bias=True)),
    "rank_pattern": (base_llama, partial(lora, rank_pattern={"q_proj": 2}, alpha_pattern={"up_proj": 32})),
    "vera": (base_llama, vera),
    "dora": (base_llama, partial(lora, use_dora=True)),
    "embedding": (base_llama, partial(lora, target_modules=["embed_tokens", "q_proj"])),
    "convolution": (base_convolutions, partial(lora, target_modules=["conv1", "conv2", "out"])),
    "lm_head_to_save": (base_llama, partial(lora, modules_to_save=["lm_head"])),
    "lm_head_to_save_vera": (base_llama, partial(vera, modules_to_save=["lm_head"])),
    "classifier": (base_classifier, partial(lora, task_type="SEQ_CLS")),
    "conv1d_gpt2": (base_gpt2, partial(lora, target_modules=["c_attn", "c_fc", "c_proj"], fan_in_fan_out=True)),
    "nf4": (partial(base_quantized, **NF4), lora),
    "nf4_vera": (partial(base_quantized, **NF4), vera),
    "nf4_dora": (partial(base_quantized, **NF4), partial(lora, use_dora=True)),
    "int8": (partial(base_quantized, **INT8), lora),
}
# With other neighbours sums are taken in another order, so what must be equal is computed in fp64. Quantized layers
# cannot: there, small gradients are little more than rounding errors, which are judged by the size of all together.
QUANTIZED_TOLERANCE = 2e-5
# Activations are rounded to 8 bits, so that a difference of one float in a layer's input can grow to a rounding step.
TOLERANCE = {
    "nf4": QUANTIZED_TOLERANCE,
    "nf4_vera": QUANTIZED_TOLERANCE,
    "nf4_dora": QUANTIZED_TOLERANCE,
    "int8": 3e-2,
}
# bf16 holds 8 bits of a number, and sums are taken in another order.
BF16_TOLERANCE = 3e-2


def build(kind: str, directory=None):
    base, config = KINDS[kind]
    return get_peft_model(base(directory) if kind.startswith(("nf4", "int8")) else base(), config())


def randomise(of: Slots, scale: float = 0.3) -> None:
    """B is zero at the start, and slots are equal: both would hide a mixed-up slot."""
    for index in range(len(of)):
        generator = torch.Generator().manual_seed(100 + index)
        for key, parameter in of.parameters[index].items():
            values = scale * torch.randn(parameter.shape, generator=generator)
            # Magnitudes of DoRA are norms.
            parameter.data.copy_(values.abs() + 0.5 if "magnitude" in key else values)


def make_slots(model, num_slots: int = NUM_SLOTS, scale: float = 0.3, **kwargs) -> Slots:
    made = Slots(model, num_slots, **kwargs)
    randomise(made, scale)
    return made


def make_inputs(model, num_rows: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    if isinstance(model.get_base_model(), Convolutions):
        return torch.randn(num_rows, 5, LENGTH, generator=generator).to(next(model.parameters()).dtype)
    # No padding token, whose first occurrence would end a row for a classifier.
    return torch.randint(1, VOCABULARY, (num_rows, LENGTH), generator=generator)


def outputs_of(model, inputs: torch.Tensor) -> torch.Tensor:
    outputs = model(inputs)
    return outputs if isinstance(outputs, torch.Tensor) else outputs.logits


def backward(outputs: torch.Tensor, rows: slice = slice(None)) -> None:
    """A loss that is a sum over rows, with a weight of its own for every output."""
    weights = torch.randn((16, *outputs.shape[1:]), generator=torch.Generator().manual_seed(8))
    (outputs.float() * weights[rows][: len(outputs)]).sum().backward()


def gradients(model, adapter_name: str) -> dict[str, torch.Tensor | None]:
    """Gradients of one adapter by parameter name without the adapter's, found without the help of `Slots`."""
    return {
        ".".join(part for part in name.split(".") if part != adapter_name): parameter.grad
        for name, parameter in model.named_parameters()
        if adapter_name in name.split(".")
    }


def relative_difference(first: torch.Tensor, second: torch.Tensor) -> float:
    with torch.no_grad():
        return float((first - second).abs().max() / second.abs().max().clamp(min=1e-30))


def relative_distance(first: list[torch.Tensor], second: list[torch.Tensor]) -> float:
    """Over all tensors together: where values are rounded, small gradients are little more than rounding errors."""
    first, second = (torch.cat([tensor.detach().float().flatten() for tensor in t]) for t in (first, second))
    return float((first - second).norm() / second.norm())


@dataclass
class Federation:
    """Slots, and models with one stock PEFT adapter that hold the same tensors: one per slot."""

    model: nn.Module
    slots: Slots
    alone: list[nn.Module]
    tolerance: float = 1e-5

    def side_by_side(self, slot_rows):
        self.model.zero_grad()
        inputs = make_inputs(self.model, sum(count for _, count in slot_rows))
        with self.slots.rows(slot_rows, sequence_length=LENGTH):
            outputs = outputs_of(self.model, inputs)
            backward(outputs)
        return outputs.detach()

    def one_by_one(self, slot_rows):
        inputs = make_inputs(self.model, sum(count for _, count in slot_rows))
        outputs, start = [], 0
        for slot, count in slot_rows:
            self.alone[slot].zero_grad()
            rows = slice(start, start + count)
            outputs.append(outputs_of(self.alone[slot], inputs[rows]))
            backward(outputs[-1], rows)
            start += count
        return torch.cat(outputs).detach()

    def check(self, slot_rows):
        together, apart = self.side_by_side(slot_rows), self.one_by_one(slot_rows)
        if self.tolerance > 1e-5:
            assert relative_distance([together], [apart]) < self.tolerance
        else:
            assert relative_difference(together, apart) < self.tolerance
        for slot, _ in slot_rows:
            self.check_gradients(slot)
        present = {slot for slot, _ in slot_rows}
        for slot in set(range(len(self.slots))) - present:
            assert all(gradient is None for gradient in gradients(self.model, self.slots.names[slot]).values())

    def check_gradients(self, slot):
        together = gradients(self.model, self.slots.names[slot])
        apart = gradients(self.alone[slot], "default")
        trained = [name for name, gradient in apart.items() if gradient is not None]
        assert trained, "the reference trains nothing"
        assert together.keys() == apart.keys()
        assert all(together[name] is not None for name in trained)
        if self.tolerance > 1e-5:
            together, apart = ([gradients[name] for name in trained] for gradients in (together, apart))
            assert relative_distance(together, apart) < self.tolerance
            return
        for name in trained:
            assert relative_difference(together[name], apart[name]) < self.tolerance, name


def with_references(model, **kwargs) -> Federation:
    reference = copy.deepcopy(model)
    made = make_slots(model, **kwargs)
    alone = []
    for index in range(len(made)):
        one = copy.deepcopy(reference)
        tensors = get_peft_model_state_dict(model, adapter_name=made.names[index], save_embedding_layers=False)
        live = get_peft_model_state_dict(one, save_embedding_layers=False)
        assert live.keys() == tensors.keys()
        with torch.no_grad():
            for key, tensor in tensors.items():
                live[key].copy_(tensor)
        alone.append(one)
    return Federation(model, made, alone)


@pytest.fixture(scope="module")
def federation(request, tmp_path_factory):
    model = build(request.param, tmp_path_factory.mktemp("base")).eval()
    federation = with_references(model, scale=0.1 if request.param == "int8" else 0.3)
    federation.tolerance = TOLERANCE.get(request.param, 1e-5)
    return federation


@pytest.fixture(scope="module")
def exact_federation(request, tmp_path_factory):
    model = build(request.param, tmp_path_factory.mktemp("base")).eval()
    if request.param not in TOLERANCE:
        model = model.double()
    federation = with_references(model, scale=0.1 if request.param == "int8" else 0.3)
    federation.tolerance = TOLERANCE.get(request.param, 1e-5)
    return federation


# Side by side equals alone


@pytest.mark.parametrize("slot_rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("exact_federation", KINDS, ids=KINDS, indirect=True)
def test_outputs_and_gradients_are_those_of_every_client_alone(exact_federation, slot_rows):
    exact_federation.check(slot_rows)


@pytest.mark.parametrize("slot_rows", [ROWS["equal"], ROWS["unequal_in_reverse"]], ids=["equal", "unequal"])
@pytest.mark.parametrize("kind", ["nf4", "nf4_vera", "int8"])
def test_a_quantized_layer_by_itself_is_exact(kind, slot_rows, tmp_path):
    federation = with_references(build(kind, tmp_path))
    x = torch.randn(6, LENGTH, 64, generator=torch.Generator().manual_seed(3))

    def layer(model):
        return model.get_base_model().model.layers[0].mlp.up_proj

    with federation.slots.rows(slot_rows):
        together = layer(federation.model)(x)
        backward(together)
    start = 0
    for slot, count in slot_rows:
        rows = slice(start, start + count)
        alone = layer(federation.alone[slot])(x[rows])
        backward(alone, rows)
        assert relative_difference(together[rows], alone) < 1e-5
        federation.check_gradients(slot)
        start += count


@pytest.mark.parametrize("federation", KINDS, ids=KINDS, indirect=True)
def test_clients_differ_so_that_a_mixed_up_slot_would_show(federation):
    first, second = (federation.one_by_one(((slot, 2),)) for slot in (0, 1))
    assert relative_distance([first], [second]) > 5 * BF16_TOLERANCE


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("lora", "Linear"),
        ("vera", "Linear"),
        ("embedding", "Embedding"),
        ("convolution", "Conv2d"),
        ("nf4", "Linear4bit"),
        ("nf4_vera", "Linear"),
        ("int8", "Linear8bitLt"),
    ],
)
def test_every_kind_is_built_of_the_layer_it_is_named_for(kind, expected, tmp_path):
    layers = {type(m).__name__ for m in build(kind, tmp_path).modules() if isinstance(m, (LoraLayer, VeraLayer))}
    assert expected in layers


def test_a_classifiers_head_is_a_slot_parameter():
    made = Slots(build("classifier"), 2)
    assert {key for key in made.parameters[1] if "score" in key} == {"base_model.model.score.weight"}


@pytest.mark.parametrize("kind", ["lora", "vera", "dora", "embedding"])
def test_outside_of_rows_the_first_slot_serves_every_row(kind):
    federation = with_references(build(kind).eval())
    inputs = make_inputs(federation.model, 4)
    expected = outputs_of(federation.alone[0], inputs)
    torch.testing.assert_close(outputs_of(federation.model, inputs), expected)
    with federation.slots.rows(((2, 2), (1, 2))):
        outputs_of(federation.model, inputs)
    torch.testing.assert_close(outputs_of(federation.model, inputs), expected)


def test_outside_of_rows_the_first_slot_serves_again_after_a_forward_pass_that_failed():
    federation = with_references(build("dora").eval())
    inputs = make_inputs(federation.model, 4)
    with pytest.raises(ValueError, match="rows"), federation.slots.rows(((1, 2), (2, 3))):
        outputs_of(federation.model, inputs)
    torch.testing.assert_close(outputs_of(federation.model, inputs), outputs_of(federation.alone[0], inputs))


@pytest.mark.parametrize("kind", ["lora", "vera", "dora", "embedding", "lm_head_to_save"])
def test_side_by_side_forward_passes_leave_every_slot_trainable(kind):
    federation = with_references(build(kind).eval())
    federation.side_by_side(ROWS["equal"])
    for slot in federation.slots.parameters:
        assert all(parameter.requires_grad for parameter in slot.values())


@pytest.mark.parametrize("kind", ["lora", "vera", "dora", "embedding", "lm_head_to_save"])
def test_base_weights_get_no_gradient(kind):
    federation = with_references(build(kind).eval())
    federation.side_by_side(ROWS["equal"])
    adapters = {id(p) for slot in federation.slots.parameters for p in slot.values()}
    assert all(p.grad is None for p in federation.model.parameters() if id(p) not in adapters)


@pytest.mark.parametrize("kind", ["lora", "vera", "dora", "embedding"])
def test_disabled_adapters_are_disabled_side_by_side_too(kind):
    federation = with_references(build(kind).eval())
    inputs = make_inputs(federation.model, 4)
    with federation.model.disable_adapter():
        expected = outputs_of(federation.model, inputs)
        with federation.slots.rows(((0, 2), (1, 2)), sequence_length=LENGTH):
            outputs = outputs_of(federation.model, inputs)
    torch.testing.assert_close(outputs, expected)


# Ways of training


@pytest.mark.parametrize("slot_rows", [ROWS["equal"], ROWS["unequal_in_reverse"]], ids=["equal", "unequal"])
@pytest.mark.parametrize("kind", ["lora", "vera", "dora", "lm_head_to_save"])
def test_gradients_under_activation_checkpointing_are_those_without(kind, slot_rows):
    federation = with_references(build(kind))
    federation.model.gradient_checkpointing_enable({"use_reentrant": False})
    federation.model.train()
    calls = []
    layer = federation.model.get_base_model().model.layers[0]
    layer.self_attn.register_forward_hook(lambda *_: calls.append(1))
    federation.check(slot_rows)
    assert len(calls) == 2, "activations were not recomputed, so nothing is tested"


@pytest.mark.parametrize("slot_rows", [ROWS["equal"], ROWS["unequal"]], ids=["equal", "unequal"])
@pytest.mark.parametrize("kind", ["lora", "lora_bias", "vera", "dora", "embedding", "lm_head_to_save"])
def test_under_autocast_each_client_gets_what_it_gets_alone_under_autocast(kind, slot_rows):
    federation = with_references(build(kind).eval(), scale=0.1)
    federation.tolerance = BF16_TOLERANCE
    exact = federation.one_by_one(slot_rows)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        federation.check(slot_rows)
        rounded = federation.side_by_side(slot_rows)
    assert relative_difference(rounded, exact) > 1e-4, "nothing ran in bf16"


def test_autocast_does_not_change_the_dtype_of_a_layers_outputs(tmp_path):
    """A quantized layer returns the dtype it was given, whatever autocast says."""
    federation = with_references(build("nf4", tmp_path))
    layer = federation.model.get_base_model().model.layers[0].mlp.up_proj
    x = torch.randn(6, LENGTH, 64, generator=torch.Generator().manual_seed(3))
    with torch.autocast("cpu", dtype=torch.bfloat16), federation.slots.rows(ROWS["equal"]):
        assert layer(x).dtype == layer.base_layer(x).dtype == torch.float32


@pytest.mark.parametrize("base_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("slot_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", ["lora", "lora_bias", "vera"])
def test_base_and_adapter_may_differ_in_dtype(kind, base_dtype, slot_dtype):
    model = build(kind).eval().to(base_dtype)
    for name, parameter in model.named_parameters():
        if "default" in name:
            parameter.data = parameter.data.to(slot_dtype)
    if kind == "vera" and slot_dtype != base_dtype:
        for module in model.modules():
            if isinstance(module, VeraLayer):
                module.vera_A["default"].data = module.vera_A["default"].data.to(slot_dtype)
                module.vera_B["default"].data = module.vera_B["default"].data.to(slot_dtype)
    federation = with_references(model, scale=0.1)
    federation.tolerance = BF16_TOLERANCE if torch.bfloat16 in (base_dtype, slot_dtype) else QUANTIZED_TOLERANCE
    for slot_rows in (ROWS["equal"], ROWS["unequal"]):
        federation.check(slot_rows)
        assert federation.side_by_side(slot_rows).dtype == base_dtype


@pytest.mark.parametrize("kind", ["lora", "vera"])
def test_dropout_is_off_in_evaluation_and_on_in_training(kind):
    base, config = KINDS[kind]
    federation = with_references(get_peft_model(base().double(), config(**{f"{kind}_dropout": 0.5})).eval())
    for slot_rows in (ROWS["equal"], ROWS["unequal"]):
        federation.check(slot_rows)
    evaluated = federation.side_by_side(ROWS["equal"])
    federation.model.train()
    for slot_rows in (ROWS["equal"], ROWS["unequal"]):
        trained = federation.side_by_side(slot_rows)
        assert trained.isfinite().all()
        for slot, _ in slot_rows:
            assert all(g.isfinite().all() for g in gradients(federation.model, federation.slots.names[slot]).values())
    assert relative_difference(federation.side_by_side(ROWS["equal"]), evaluated) > 1e-2


def count_base_forwards(model) -> dict[str, int]:
    calls: dict[str, int] = {}
    for name, module in model.named_modules():
        if isinstance(module, (LoraLayer, VeraLayer)):
            calls[name] = 0

            def count(*_, name=name):
                calls[name] += 1

            module.base_layer.register_forward_hook(count)
    return calls


@pytest.mark.parametrize("slot_rows", [ROWS["equal"], ROWS["unequal_in_reverse"]], ids=["equal", "unequal"])
@pytest.mark.parametrize("kind", ["lora", "rslora", "lora_bias", "vera", "conv1d_gpt2", "nf4", "nf4_vera", "int8"])
def test_the_base_layer_runs_once_however_many_clients_there_are(kind, slot_rows, tmp_path):
    model = build(kind, tmp_path).eval()
    made = make_slots(model)
    calls = count_base_forwards(model)
    with made.rows(slot_rows, sequence_length=LENGTH):
        outputs_of(model, make_inputs(model, sum(count for _, count in slot_rows)))
    assert calls
    assert set(calls.values()) == {1}


def test_a_layer_without_a_batched_form_runs_once_per_client():
    model = build("dora").eval()
    made = make_slots(model)
    calls = count_base_forwards(model)
    with made.rows(ROWS["equal"]):
        outputs_of(model, make_inputs(model, 6))
    # DoRA also asks the base layer for its bias-free product, so only a multiple of the clients is certain.
    assert all(number >= NUM_SLOTS and number % NUM_SLOTS == 0 for number in calls.values())


# Rows that cannot be told apart


@pytest.mark.parametrize("kind", ["lora", "vera", "dora"])
def test_an_input_whose_rows_cannot_be_told_apart_is_refused(kind):
    model = build(kind)
    made = make_slots(model)
    layer = model.get_base_model().model.layers[0].mlp.up_proj
    message = r"\(5, 7, 32\).* 4 rows.*`parallel_clients=1`"
    with made.rows(((0, 2), (1, 2)), sequence_length=LENGTH), pytest.raises(ValueError, match=message):
        layer(torch.randn(5, 7, 32))


def test_flattened_rows_are_refused_where_the_length_of_a_row_is_not_known():
    model = build("lora")
    made = make_slots(model)
    layer = model.get_base_model().model.layers[0].mlp.up_proj
    with made.rows(((0, 2), (1, 2))), pytest.raises(ValueError, match="`parallel_clients=1`"):
        layer(torch.randn(4 * LENGTH, 32))


@pytest.mark.parametrize("slot_rows", [ROWS["equal"], ROWS["unequal_in_reverse"]], ids=["equal", "unequal"])
@pytest.mark.parametrize("kind", ["lora", "lora_bias", "vera", "dora"])
def test_rows_and_tokens_flattened_into_one_axis_are_told_apart(kind, slot_rows):
    federation = with_references(build(kind).eval())
    x = torch.randn(6 * LENGTH, 32, generator=torch.Generator().manual_seed(3))
    with federation.slots.rows(slot_rows, sequence_length=LENGTH):
        together = federation.model.get_base_model().model.layers[0].mlp.up_proj(x)
    parts = x.split([count * LENGTH for _, count in slot_rows])
    apart = [
        federation.alone[slot].get_base_model().model.layers[0].mlp.up_proj(part)
        for (slot, _), part in zip(slot_rows, parts, strict=True)
    ]
    assert together.shape == (6 * LENGTH, 48)
    assert relative_difference(together, torch.cat(apart)) < 1e-5


def test_experts_that_get_several_tensors_per_token_are_right_or_refused():
    torch.manual_seed(0)
    model = get_peft_model(
        MixtralForCausalLM(
            MixtralConfig(
                vocab_size=VOCABULARY,
                hidden_size=32,
                intermediate_size=32,
                num_hidden_layers=1,
                num_attention_heads=2,
                num_key_value_heads=2,
                num_local_experts=4,
                max_position_embeddings=16,
            )
        ),
        lora(target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]),
    ).eval()
    federation = with_references(model, num_slots=2)
    try:
        together = federation.side_by_side(((0, 2), (1, 2)))
    except ValueError as error:
        assert "`parallel_clients=1`" in str(error)
    else:
        assert relative_difference(together, federation.one_by_one(((0, 2), (1, 2)))) < 1e-5


# Loading and taking


def random_like(tensors: dict[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {key: torch.randn(t.shape, generator=generator).to(t.dtype) for key, t in tensors.items()}


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for key in first:
        assert first[key].dtype == second[key].dtype
        assert torch.equal(first[key], second[key]), key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["lora", "lora_bias", "vera", "dora", "embedding", "lm_head_to_save", "convolution"])
def test_what_is_loaded_into_a_slot_is_taken_out_bit_for_bit(kind, dtype):
    made = make_slots(build(kind).to(dtype))
    loaded = [random_like(made.take(slot), seed=slot) for slot in range(NUM_SLOTS)]
    for slot in (2, 0, 1):
        made.load(slot, loaded[slot])
    for slot in range(NUM_SLOTS):
        taken = made.take(slot)
        assert {tensor.dtype for tensor in taken.values()} == {dtype}
        assert_same(taken, loaded[slot])


@pytest.mark.parametrize("kind", ["lora", "lora_bias", "vera", "dora", "embedding", "lm_head_to_save", "convolution"])
def test_slots_share_no_memory(kind):
    made = make_slots(build(kind))
    addresses = [p.data_ptr() for slot in made.parameters for p in slot.values()]
    assert len(set(addresses)) == len(addresses)


def test_loading_one_slot_leaves_the_others_and_the_rest_of_the_model_as_they_are():
    model = build("lm_head_to_save")
    made = make_slots(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    made.load(1, random_like(made.take(1), seed=5))
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if "slot_1" in name.split(".")}


def test_loading_a_part_leaves_the_other_part():
    made = make_slots(build("lora"))
    local = made.take(1, "local")
    shared = random_like(made.take(1, "shared"), seed=3)
    made.load(1, shared)
    assert_same(made.take(1, "local"), local)
    assert_same(made.take(1, "shared"), shared)


def test_loading_takes_both_parts_at_once():
    made = make_slots(build("lora"))
    shared, local = random_like(made.take(0, "shared"), seed=1), random_like(made.take(0, "local"), seed=2)
    made.load(2, shared, local)
    assert_same(made.take(2), dict(sorted({**shared, **local}.items())))


@pytest.mark.parametrize(
    ("kind", "shared", "local"),
    [
        ("lora", {"lora_A"}, {"lora_B"}),
        ("lora_bias", {"lora_A"}, {"lora_B"}),
        ("vera", {"vera_lambda_d"}, {"vera_lambda_b"}),
        ("dora", {"lora_A"}, {"lora_B", "lora_magnitude_vector"}),
        ("embedding", {"lora_A", "lora_embedding_A"}, {"lora_B", "lora_embedding_B"}),
        ("lm_head_to_save", {"lora_A"}, {"lora_B", "lm_head"}),
    ],
)
def test_shared_and_local_divide_what_a_slot_holds(kind, shared, local):
    made = make_slots(build(kind))

    def names(tensors):
        return {key.removesuffix(".weight").removesuffix(".bias").rpartition(".")[2] for key in tensors}

    assert names(made.take(1, "shared")) == shared
    assert names(made.take(1, "local")) == local
    assert sorted([*made.take(1, "shared"), *made.take(1, "local")]) == sorted(made.take(1))


def test_modules_to_save_are_shared_on_demand():
    made = make_slots(build("lm_head_to_save"), share_modules_to_save=True)
    assert "base_model.model.lm_head.weight" in made.take(1, "shared")
    assert "base_model.model.lm_head.weight" not in made.take(1, "local")


def test_what_is_taken_is_a_copy():
    made = make_slots(build("lora"))
    taken = made.take(1)
    kept = {key: tensor.clone() for key, tensor in taken.items()}
    for parameter in made.parameters[1].values():
        parameter.data.add_(1.0)
    assert_same(taken, kept)
    assert not any(tensor.requires_grad for tensor in taken.values())


def test_what_is_loaded_is_copied():
    made = make_slots(build("lora"))
    loaded = random_like(made.take(1), seed=4)
    made.load(1, loaded)
    expected = made.take(1)
    for tensor in loaded.values():
        tensor.add_(1.0)
    assert_same(made.take(1), expected)


def test_selected_tensors_are_the_ones_that_train():
    made = make_slots(build("lora"))
    selected = made.select(2, "shared")
    assert all(parameter is made.parameters[2][key] for key, parameter in selected.items())
    assert all("lora_A" in key for key in selected)


# Adding slots


def test_a_model_with_two_adapters_is_refused():
    model = build("lora")
    model.add_adapter("other", lora())
    with pytest.raises(ValueError, match="default, other.*exactly one"):
        Slots(model, 2)


def test_without_side_by_side_no_adapter_is_added_and_no_forward_replaced():
    model = build("lora")
    made = Slots(model, 1, side_by_side=False)
    assert len(made) == 1
    assert list(model.peft_config) == ["default"]
    assert all("forward" not in vars(module) for module in model.modules() if isinstance(module, LoraLayer))


@pytest.mark.parametrize("kind", ["lora", "vera", "dora", "embedding", "lm_head_to_save", "convolution"])
def test_slots_are_ordinary_adapters_that_start_as_the_first_one(kind):
    model = build(kind)
    live = get_peft_model_state_dict(model, save_embedding_layers=False)
    first = {key: tensor.clone() for key, tensor in live.items()}
    made = Slots(model, NUM_SLOTS)
    assert list(model.peft_config) == list(made.names) == ["default", "slot_1", "slot_2"]
    for name in made.names:
        assert_same(get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False), first)
    assert model.active_adapters == ["default"]


@pytest.mark.parametrize("kind", ["lora", "vera", "dora", "embedding", "lm_head_to_save", "convolution"])
def test_adding_slots_moves_no_global_generator(kind):
    model = build(kind)
    torch.manual_seed(11)
    before = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
    Slots(model, NUM_SLOTS)
    after = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]


@pytest.mark.parametrize("kind", ["lora", "vera", "dora", "embedding", "lm_head_to_save", "convolution"])
def test_added_slots_have_the_dtypes_of_the_first(kind):
    model = build(kind)
    for index, (name, parameter) in enumerate(model.named_parameters()):
        if "default" in name and index % 2:
            parameter.data = parameter.data.to(torch.bfloat16)
    made = Slots(model, NUM_SLOTS)
    dtypes = [{key: parameter.dtype for key, parameter in slot.items()} for slot in made.parameters]
    assert set(dtypes[0].values()) == {torch.float32, torch.bfloat16}
    assert dtypes == [dtypes[0]] * NUM_SLOTS


@pytest.mark.parametrize("kind", ["lora", "vera", "dora", "embedding", "lm_head_to_save", "convolution"])
def test_added_slots_train_what_the_first_trains(kind):
    model = build(kind)
    frozen = next(p for name, p in model.named_parameters() if "default" in name)
    frozen.requires_grad_(False)
    made = Slots(model, NUM_SLOTS)
    trained = [{key: parameter.requires_grad for key, parameter in slot.items()} for slot in made.parameters]
    assert sum(not train for train in trained[0].values()) == 1
    assert trained == [trained[0]] * NUM_SLOTS
    slot_parameters = {id(p) for slot in made.parameters for p in slot.values()}
    assert not any(p.requires_grad for p in model.parameters() if id(p) not in slot_parameters)


def test_vera_projections_exist_once_and_are_no_slot_parameters():
    model = build("vera")
    made = Slots(model, NUM_SLOTS)
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    for name in made.names[1:]:
        assert torch.equal(layer.vera_A[name], layer.vera_A["default"])
        assert torch.equal(layer.vera_B[name], layer.vera_B["default"])
    assert not any("vera_A" in key or "vera_B" in key for slot in made.parameters for key in slot)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_2", "olora"])
def test_an_initialisation_that_changes_the_base_weight_changes_it_once(init):
    untouched = base_llama().model.layers[0].self_attn.q_proj.weight
    weights, starts = [], []
    for num_slots in (1, NUM_SLOTS):
        torch.manual_seed(0)
        model = get_peft_model(base_llama(), lora(init_lora_weights=init))
        made = Slots(model, num_slots)
        weights.append(model.get_base_model().model.layers[0].self_attn.q_proj.base_layer.weight)
        starts.append([made.take(slot) for slot in range(num_slots)])
    assert torch.equal(weights[0], weights[1])
    assert relative_difference(weights[0], untouched) > 1e-2, "the initialisation left the base weight as it was"
    for start in starts[1]:
        assert_same(start, starts[0][0])


def test_the_models_own_config_keeps_its_initialisation():
    model = get_peft_model(base_llama(), lora(init_lora_weights="pissa"))
    made = Slots(model, 2)
    assert model.peft_config["default"].init_lora_weights == "pissa"
    assert made.config is model.peft_config["default"]


@pytest.mark.parametrize(
    ("init", "mutates"),
    [
        ("pissa", True),
        ("pissa_niter_4", True),
        ("olora", True),
        ("corda", True),
        ("lora_ga", True),
        ("loftq", True),
        (True, False),
        (False, False),
        ("gaussian", False),
        ("orthogonal", False),
    ],
)
def test_initialisations_that_change_the_base_weight_are_known(init, mutates):
    config = lora()
    config.init_lora_weights = init
    assert slots.mutates_base(config) is mutates


def test_the_packages_own_config_makes_slots():
    federation = with_references(get_peft_model(base_llama().double(), make_lora()).eval())
    federation.check(ROWS["unequal"])


# A new variant


def test_a_batched_forward_added_to_the_table_is_used(monkeypatch):
    calls = []

    def batched(layer, x, names, counts):
        calls.append((names, tuple(counts)))
        parts = zip(names, x.split(list(counts)), strict=True)
        delta = [layer.lora_B[n](layer.lora_A[n](rows)) * layer.scaling[n] for n, rows in parts]
        return layer.base_layer(x) + torch.cat(delta)

    monkeypatch.setitem(slots.BATCHED_FORWARDS, peft.tuners.lora.Conv2d, batched)
    federation = with_references(build("convolution").eval())
    base_calls = count_base_forwards(federation.model)
    federation.check(((2, 1), (0, 2)))
    assert calls == [(("slot_2", "default"), (1, 2))]
    conv1, conv2 = (next(n for name, n in base_calls.items() if name.endswith(layer)) for layer in ("conv1", "conv2"))
    assert (conv1, conv2) == (2, 1)


def test_a_variant_of_a_batched_layer_keeps_its_own_forward(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("DoRA went through the batched form of plain LoRA")

    monkeypatch.setitem(slots.BATCHED_FORWARDS, peft.tuners.lora.Linear, refuse)
    with_references(build("dora").eval()).check(ROWS["equal"])


def test_an_adapter_is_added_by_one_row_of_the_table(monkeypatch):
    config = LoHaConfig(r=4, alpha=8, target_modules=["q_proj", "up_proj"], init_weights=False)
    with pytest.raises(ValueError, match="no row"):
        Slots(get_peft_model(base_llama(), copy.deepcopy(config)), 2)
    row = AdapterKind("loha", "LOHA", a=("hada_w1_a", "hada_w2_a"), b=("hada_w1_b", "hada_w2_b"))
    monkeypatch.setattr(parameters, "ADAPTERS", (*ADAPTERS, row))
    federation = with_references(get_peft_model(base_llama(), config).eval())
    for slot_rows in ROWS.values():
        federation.check(slot_rows)
    assert {key.rpartition(".")[2] for key in federation.slots.take(1, "shared")} == {"hada_w1_a", "hada_w2_a"}


def test_heads_trained_in_full_are_served_by_client():
    model = build("lm_head_to_save").eval()
    made = make_slots(model)
    head = model.get_base_model().lm_head
    assert isinstance(head, ModulesToSaveWrapper)
    x = torch.randn(4, LENGTH, 32)
    with made.rows(((2, 1), (0, 3))):
        together = head(x)
    expected = [head.modules_to_save["slot_2"](x[:1]), head.modules_to_save["default"](x[1:])]
    torch.testing.assert_close(together, torch.cat(expected))


def test_low_rank_products_are_computed_in_the_precision_of_the_adapter():
    model = get_peft_model(base_llama().double(), lora()).eval()
    slots = make_slots(model)
    layer = model.get_base_model().model.layers[0].mlp.up_proj
    x = torch.randn(6, LENGTH, 32, generator=torch.Generator().manual_seed(3)).double()
    with torch.no_grad(), slots.rows(((0, 6),)):
        found = layer(x)
    with torch.no_grad():
        assert relative_difference(found, layer(x)) < 1e-14


# Tied adapters

TIED_TARGETS = {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}
TIED_HEADS = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}


@pytest.mark.parametrize("num_slots", [1, 2])
@pytest.mark.parametrize("tied", [TIED_TARGETS, TIED_HEADS], ids=["transposed", "the same"])
def test_an_adapter_of_a_head_tied_to_that_of_the_embedding_is_refused(tied, num_slots):
    model = get_peft_model(base_llama(tie_word_embeddings=True), lora(**tied))
    with pytest.raises(ValueError, match="made `.*lm_head.*` and `.*embed_tokens.*` one tensor.*tying=False`"):
        Slots(model, num_slots)


def test_without_tied_words_the_option_changes_nothing():
    with pytest.warns(UserWarning, match="no tied modules were found"):
        model = get_peft_model(base_llama(), lora(**TIED_TARGETS))
        made = Slots(model, 2)
    assert not any("lm_head" in key for key in made.sharing.share_of)
