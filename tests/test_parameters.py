"""What is shared and what stays: the table, the keys, and the tensors behind them."""

from dataclasses import fields

import pytest
import torch
from conftest import make_model, max_difference
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
    get_peft_model_state_dict,
)

from hf_fedsa.adapters import ADAPTERS, factor_of
from hf_fedsa.client.parameters import adapter_kind, adapter_parameters, adapter_tensors
from hf_fedsa.tensors import clone_tensors, count_bytes, load_tensors, tensors_sha256

LAYER = "base_model.model.model.layers.0.self_attn.q_proj"
ROWS = {row.name: row for row in ADAPTERS}
OTHER_VARIANTS = sorted(
    f.name for f in fields(LoraConfig) if f.metadata.get("is_lora_variant") and f.name != "use_dora"
)

CONFIGS = {
    "lora": lambda: LoraConfig(r=4, target_modules=["q_proj", "down_proj"]),
    "rslora": lambda: LoraConfig(r=4, target_modules=["q_proj", "down_proj"], use_rslora=True),
    "dora": lambda: LoraConfig(r=4, target_modules=["q_proj", "down_proj"], use_dora=True),
    "vera": lambda: VeraConfig(r=4, target_modules=["q_proj"]),
    "embedding": lambda: LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"]),
    "head": lambda: LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "lora_bias": lambda: LoraConfig(r=4, target_modules=["q_proj"], lora_bias=True),
}


def make_peft_model(kind: str, adapter_name: str = "default"):
    return get_peft_model(make_model(), CONFIGS[kind](), adapter_name=adapter_name)


class TestTable:
    @pytest.mark.parametrize(
        "config, name",
        [
            (LoraConfig(), "lora"),
            (LoraConfig(use_rslora=True), "rslora"),
            (LoraConfig(use_dora=True), "dora"),
            (LoraConfig(use_dora=True, use_rslora=True), "dora"),
            (LoraConfig(init_lora_weights="pissa"), "lora"),
            (VeraConfig(), "vera"),
        ],
        ids=["lora", "rslora", "dora", "dora+rslora", "lora+pissa", "vera"],
    )
    def test_each_config_has_its_row(self, config, name):
        assert adapter_kind(config).name == name

    @pytest.mark.parametrize(
        "name, a, b, constants",
        [
            ("lora", {"lora_A", "lora_embedding_A"}, {"lora_B", "lora_embedding_B"}, set()),
            ("rslora", {"lora_A", "lora_embedding_A"}, {"lora_B", "lora_embedding_B"}, set()),
            ("dora", {"lora_A", "lora_embedding_A"}, {"lora_B", "lora_embedding_B", "lora_magnitude_vector"}, set()),
            ("vera", {"vera_lambda_d"}, {"vera_lambda_b"}, {"vera_A", "vera_B"}),
        ],
    )
    def test_rows_are_those_of_the_paper(self, name, a, b, constants):
        row = ROWS[name]
        assert (set(row.a), set(row.b), set(row.constants)) == (a, b, constants)

    @pytest.mark.parametrize(
        "config",
        [
            LoHaConfig(),
            LoKrConfig(),
            IA3Config(),
            AdaLoraConfig(total_step=10),
            PrefixTuningConfig(num_virtual_tokens=2),
            PromptTuningConfig(num_virtual_tokens=2),
        ],
        ids=lambda config: type(config).__name__,
    )
    def test_an_adapter_without_a_row_is_refused(self, config):
        with pytest.raises(ValueError, match=rf"`peft_config` is a {type(config).__name__}.*Covered are: dora, lora"):
            adapter_kind(config)

    def test_peft_still_marks_its_lora_variants(self):
        assert "alora_invocation_tokens" in OTHER_VARIANTS
        assert "use_bdlora" in OTHER_VARIANTS

    @pytest.mark.parametrize("flag", OTHER_VARIANTS)
    def test_a_lora_variant_without_a_row_is_refused(self, flag):
        config = LoraConfig()
        setattr(config, flag, object())
        with pytest.raises(ValueError, match=rf"LoraConfig\({flag}\).*Covered are"):
            adapter_kind(config)

    def test_a_known_flag_does_not_hide_an_unknown_one(self):
        with pytest.raises(ValueError, match="alora_invocation_tokens"):
            adapter_kind(LoraConfig(use_dora=True, alora_invocation_tokens=[1, 2], task_type="CAUSAL_LM"))

    @pytest.mark.parametrize("value", [None, {"r": 8}, "lora", LoraConfig], ids=["None", "dict", "str", "class"])
    def test_what_is_no_config_is_a_type_error(self, value):
        with pytest.raises(TypeError, match=f"`peft_config` must be.*got `{type(value).__name__}`"):
            adapter_kind(value)


class TestFactorOf:
    @pytest.mark.parametrize(
        "kind, key, factor",
        [
            ("lora", f"{LAYER}.lora_A.weight", "A"),
            ("lora", f"{LAYER}.lora_B.weight", "B"),
            ("lora", f"{LAYER}.lora_B.bias", "B"),
            ("lora", "base_model.model.model.embed_tokens.lora_embedding_A", "A"),
            ("lora", "base_model.model.model.embed_tokens.lora_embedding_B", "B"),
            ("rslora", f"{LAYER}.lora_A.weight", "A"),
            ("rslora", f"{LAYER}.lora_B.weight", "B"),
            ("dora", f"{LAYER}.lora_A.weight", "A"),
            ("dora", f"{LAYER}.lora_B.weight", "B"),
            ("dora", f"{LAYER}.lora_magnitude_vector", "B"),
            ("dora", f"{LAYER}.lora_magnitude_vector.weight", "B"),
            ("vera", f"{LAYER}.vera_lambda_d", "A"),
            ("vera", f"{LAYER}.vera_lambda_b", "B"),
            ("vera", "base_model.vera_A", "constant"),
            ("vera", "base_model.vera_B", "constant"),
        ],
    )
    def test_last_component_decides(self, kind, key, factor):
        assert factor_of(key, ROWS[kind]) == factor

    @pytest.mark.parametrize(
        "key, factor",
        [
            ("base_model.model.my_lora_A_proj.lora_B.weight", "B"),
            ("base_model.model.lora_A.lora_B.weight", "B"),
            ("base_model.model.lora_B.lora_A.weight", "A"),
        ],
    )
    def test_the_name_of_the_adapted_module_does_not_matter(self, key, factor):
        assert factor_of(key, ROWS["lora"]) == factor

    @pytest.mark.parametrize(
        "kind, key",
        [
            ("lora", f"{LAYER}.lora_A_extra.weight"),
            ("lora", f"{LAYER}.my_lora_A.weight"),
            ("lora", "base_model.model.my_lora_A_proj.weight"),
            ("lora", "base_model.model.lora_A.q_proj.weight"),
            ("lora", f"{LAYER}.lora_A.default.weight"),
            ("lora", f"{LAYER}.lora_a.weight"),
            ("lora", f"{LAYER}.lora_magnitude_vector"),
            ("lora", f"{LAYER}.base_layer.weight"),
            ("lora", "base_model.vera_A"),
            ("lora", "weight"),
            ("vera", f"{LAYER}.lora_A.weight"),
        ],
    )
    def test_an_unknown_key_is_refused(self, kind, key):
        with pytest.raises(ValueError, match=f"`{key}` is no factor of the adapter kind `{kind}`"):
            factor_of(key, ROWS[kind])

    @pytest.mark.parametrize("kind", sorted(ROWS))
    def test_a_module_trained_in_full_is_a_head(self, kind):
        assert factor_of("base_model.model.score.weight", ROWS[kind], modules_to_save=["score"]) == "head"

    def test_a_head_may_have_parts(self):
        key = "base_model.model.classifier.dense.lora_free.bias"
        assert factor_of(key, ROWS["lora"], modules_to_save=["classifier"]) == "head"
        assert factor_of(key, ROWS["lora"], modules_to_save=["model.classifier"]) == "head"

    def test_a_head_is_matched_by_whole_components(self):
        with pytest.raises(ValueError, match="modules_to_save: score"):
            factor_of("base_model.model.my_score.weight", ROWS["lora"], modules_to_save=["score"])


@pytest.mark.filterwarnings("ignore:Adapter .* LoRA tensor", "ignore:`lora_bias=True` was passed")
class TestAdapterParameters:
    # Keys that PEFT saves beside the trained tensors: the embedding under an adapter, and VeRA's constants.
    CONSTANTS = {
        "embedding": {"base_model.model.model.embed_tokens.base_layer.weight"},
        "vera": {"base_model.vera_A", "base_model.vera_B"},
    }

    @pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
    @pytest.mark.parametrize("kind", sorted(CONFIGS))
    def test_keys_are_those_peft_saves(self, kind):
        model = make_peft_model(kind)
        saved = get_peft_model_state_dict(model)
        parameters = adapter_parameters(model, "default")
        assert saved.keys() - parameters.keys() == self.CONSTANTS.get(kind, set())
        assert parameters.keys() <= saved.keys()

    @pytest.mark.parametrize("kind", sorted(CONFIGS))
    def test_they_are_all_the_parameters_that_train(self, kind):
        model = make_peft_model(kind)
        trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
        assert {id(parameter) for parameter in adapter_parameters(model, "default").values()} == trained

    @pytest.mark.parametrize("kind", sorted(CONFIGS))
    def test_each_is_the_live_tensor_behind_its_key(self, kind):
        model = make_peft_model(kind)
        parameters = adapter_parameters(model, "default")
        with torch.no_grad():
            for number, parameter in enumerate(parameters.values()):
                parameter.fill_(number)
        saved = get_peft_model_state_dict(model, save_embedding_layers=False)
        for number, key in enumerate(parameters):
            assert torch.all(saved[key] == number), key

    @pytest.mark.parametrize("kind", sorted(CONFIGS))
    def test_every_tensor_is_a_factor(self, kind):
        model = make_peft_model(kind)
        config = model.peft_config["default"]
        factors = {
            key: factor_of(key, adapter_kind(config), config.modules_to_save)
            for key in adapter_tensors(model, "default")
        }
        trained = adapter_parameters(model, "default").keys()
        assert {key for key, factor in factors.items() if factor != "constant"} == set(trained)
        assert {"A", "B"} <= set(factors.values())

    def test_shapes_are_those_of_the_two_factors(self):
        parameters = adapter_parameters(make_peft_model("dora"), "default")
        layer = "base_model.model.model.layers.1.mlp.down_proj"
        shapes = {key.removeprefix(f"{layer}."): tuple(p.shape) for key, p in parameters.items() if layer in key}
        assert shapes == {"lora_A.weight": (4, 48), "lora_B.weight": (32, 4), "lora_magnitude_vector": (32,)}

    @pytest.mark.parametrize("kind", sorted(set(CONFIGS) - {"embedding"}))
    def test_two_adapters_have_the_same_keys_and_different_parameters(self, kind):
        model = make_peft_model(kind, adapter_name="slot_0")
        model.add_adapter("slot_1", CONFIGS[kind]())
        first, second = adapter_parameters(model, "slot_0"), adapter_parameters(model, "slot_1")
        assert list(first) == list(second)
        assert not {id(p) for p in first.values()} & {id(p) for p in second.values()}

    def test_the_order_is_that_of_the_keys(self):
        keys = list(adapter_parameters(make_peft_model("dora"), "default"))
        assert keys == sorted(keys)


class TestCloneTensors:
    def test_a_clone_does_not_follow_the_model(self):
        parameters = adapter_parameters(make_peft_model("lora"), "default")
        before = clone_tensors(parameters)
        expected = {key: parameter.detach().numpy().copy() for key, parameter in parameters.items()}
        with torch.no_grad():
            for parameter in parameters.values():
                parameter.add_(1.0)
        for key, tensor in before.items():
            assert (tensor.numpy() == expected[key]).all()

    def test_the_model_does_not_follow_a_clone(self):
        parameter = torch.nn.Parameter(torch.ones(3))
        clone_tensors({"a": parameter})["a"].zero_()
        assert parameter.tolist() == [1.0, 1.0, 1.0]

    def test_a_clone_is_plain_detached_and_contiguous(self):
        clone = clone_tensors({"a": torch.nn.Parameter(torch.randn(4, 3)).T})["a"]
        assert not clone.requires_grad
        assert clone.is_leaf
        assert clone.is_contiguous()
        assert clone.shape == (3, 4)

    def test_the_dtype_is_kept_or_the_one_asked_for(self):
        tensors = {"a": torch.ones(2, dtype=torch.bfloat16), "b": torch.ones(2)}
        assert [t.dtype for t in clone_tensors(tensors).values()] == [torch.bfloat16, torch.float32]
        assert [t.dtype for t in clone_tensors(tensors, dtype=torch.float32).values()] == [torch.float32] * 2
        assert tensors["a"].dtype == torch.bfloat16


class TestLoadTensors:
    def test_load_undoes_a_change_in_place(self):
        parameters = adapter_parameters(make_peft_model("lora"), "default")
        addresses = [parameter.data_ptr() for parameter in parameters.values()]
        before = clone_tensors(parameters)
        with torch.no_grad():
            for parameter in parameters.values():
                parameter.add_(1.0)
        load_tensors(parameters, before)
        assert max_difference(clone_tensors(parameters), before) == 0.0
        assert [parameter.data_ptr() for parameter in parameters.values()] == addresses

    def test_load_casts_to_the_parameter(self):
        parameter = torch.nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
        load_tensors({"a": parameter}, {"a": torch.tensor([1.0 + 2.0**-12])})
        assert parameter.dtype == torch.bfloat16
        assert parameter.item() == 1.0

    def test_a_part_of_an_adapter_leaves_the_rest(self):
        parameters = {"a": torch.nn.Parameter(torch.zeros(2)), "b": torch.nn.Parameter(torch.full((2,), 7.0))}
        load_tensors(parameters, {"a": torch.ones(2)})
        assert parameters["a"].tolist() == [1.0, 1.0]
        assert parameters["b"].tolist() == [7.0, 7.0]

    def test_what_was_loaded_is_not_referenced(self):
        parameter, source = torch.nn.Parameter(torch.zeros(2)), torch.ones(2)
        load_tensors({"a": parameter}, {"a": source})
        source.fill_(9.0)
        assert parameter.tolist() == [1.0, 1.0]

    @pytest.mark.parametrize("shape", [(3, 2), (1, 3), (3,), ()], ids=str)
    def test_another_shape_is_refused_even_if_it_would_broadcast(self, shape):
        parameter = torch.nn.Parameter(torch.zeros(2, 3))
        with pytest.raises(ValueError, match=r"`x.lora_A.weight` has shape .* model's is \(2, 3\).*another rank"):
            load_tensors({"x.lora_A.weight": parameter}, {"x.lora_A.weight": torch.ones(shape)})
        assert not parameter.any()

    def test_an_unknown_name_is_refused_before_anything_is_written(self):
        parameter = torch.nn.Parameter(torch.zeros(2))
        with pytest.raises(KeyError, match=r"no adapter tensor named 'b' \(2 unknown"):
            load_tensors({"a": parameter}, {"a": torch.ones(2), "c": torch.ones(2), "b": torch.ones(2)})
        assert not parameter.any()


def test_bytes_are_values_times_their_size():
    tensors = {
        "a": torch.zeros(3, 4),
        "b": torch.zeros(5, dtype=torch.bfloat16),
        "c": torch.zeros(100)[::10],
    }
    assert count_bytes(tensors) == 3 * 4 * 4 + 5 * 2 + 10 * 4
    assert count_bytes({}) == 0


class TestSha256:
    TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}

    def test_the_order_of_the_names_does_not_matter(self):
        assert tensors_sha256(self.TENSORS) == tensors_sha256(dict(reversed(self.TENSORS.items())))

    def test_the_memory_layout_does_not_matter(self):
        transposed = {**self.TENSORS, "a": self.TENSORS["a"].T.contiguous().T}
        assert tensors_sha256(transposed) == tensors_sha256(self.TENSORS)

    @pytest.mark.parametrize(
        "change",
        [
            {"a": torch.arange(6.0).reshape(2, 3).nextafter(torch.tensor(9.0))},
            {"a": torch.arange(6.0).reshape(3, 2)},
            {"a": torch.arange(6.0).reshape(2, 3).view(torch.int32)},
            {"c": torch.ones(1)},
        ],
        ids=["value", "shape", "dtype", "name"],
    )
    def test_any_change_shows(self, change):
        assert tensors_sha256({**self.TENSORS, **change}) != tensors_sha256(self.TENSORS)

    def test_the_digest_stays_the_same_over_versions(self):
        digest = tensors_sha256({"a": torch.tensor([1.0, 2.0])})
        assert digest == "dc260e6f27dab85d889269d2c06ec392f94bfc283d453c1a9176d532767318fc"

    def test_scalars_and_empty_tensors_have_a_digest(self):
        digests = {tensors_sha256({"a": tensor}) for tensor in (torch.tensor(1.0), torch.ones(1), torch.ones(0))}
        assert len(digests) == 3
