"""Arguments: what is refused and why, what is derived, and how they are given on the command line."""

import re
import warnings

import pytest
from conftest import make_args
from peft import LoraConfig, PeftConfig, VeraConfig
from transformers import HfArgumentParser
from transformers.integrations.deepspeed import deepspeed_config, unset_hf_deepspeed_config
from trl import SFTConfig, TrlParser

from hf_fedsa import FederatedConfig, FedSALoraConfig, FedSAVeraConfig
from hf_fedsa.config import DEFAULT_PARALLEL_CLIENTS
from hf_fedsa.peft_config import validate_peft_config

COUNTS = ["num_rounds", "local_steps", "local_epochs", "clients_per_round", "parallel_clients"]
OWN_FIELDS = sorted(
    FederatedConfig.__dataclass_fields__.keys() - SFTConfig.__dataclass_fields__.keys(),
    key=list(FederatedConfig.__dataclass_fields__).index,
)


def make_config(tmp_path, **kwargs) -> FederatedConfig:
    """A config with none of our own fields set unless asked for."""
    return make_args(tmp_path, **{"num_rounds": None, "local_steps": None, **kwargs})


@pytest.fixture
def forget_deepspeed():
    """transformers keeps the DeepSpeed config it saw last for the whole process, and PEFT asks for it."""
    yield
    unset_hf_deepspeed_config()


class TestRefused:
    @pytest.mark.parametrize("name", COUNTS)
    @pytest.mark.parametrize("value", [0, -3])
    def test_a_count_below_one(self, tmp_path, name, value):
        with pytest.raises(
            ValueError, match=f"`{name}` must be at least 1, got {value}. Leave it out for the default"
        ):
            make_config(tmp_path, **{name: value})

    @pytest.mark.parametrize("name", COUNTS)
    @pytest.mark.parametrize("value", [2.0, "2", True, [2]], ids=repr)
    def test_a_count_that_is_no_int(self, tmp_path, name, value):
        message = f"`{name}` must be an int or None, got {value!r} of type {type(value).__name__}"
        with pytest.raises(TypeError, match=re.escape(message)):
            make_config(tmp_path, **{name: value})

    @pytest.mark.parametrize(
        "kwargs, message",
        [
            ({"local_steps": 5, "local_epochs": 2}, "`local_steps=5` and `local_epochs=2` both say .* Pass one"),
            ({"aggregation_weighting": "size"}, "`aggregation_weighting` must be 'examples' or 'uniform', got 'size'"),
            ({"fsdp": True}, "`fsdp=True` shards parameters over processes"),
            ({"auto_find_batch_size": True}, "`auto_find_batch_size=True` restarts training with another batch size"),
        ],
        ids=[
            "two lengths",
            "weighting",
            "fsdp",
            "batch size",
        ],
    )
    def test_what_cannot_work(self, tmp_path, kwargs, message):
        with pytest.raises(ValueError, match=message):
            make_config(tmp_path, **kwargs)

    @pytest.mark.parametrize("value", [{"zero_optimization": {"stage": 2}}, "ds_config.json"], ids=["dict", "file"])
    def test_deepspeed_before_transformers_takes_note(self, tmp_path, value, forget_deepspeed):
        with pytest.raises(ValueError, match="`deepspeed` shards parameters over processes"):
            make_config(tmp_path, deepspeed=value)
        assert deepspeed_config() is None

    def test_the_parents_own_checks_still_run(self, tmp_path):
        with pytest.raises(ValueError, match="load_best_model_at_end requires"):
            make_config(tmp_path, load_best_model_at_end=True, save_strategy="epoch", eval_strategy="steps")


class TestDerived:
    def test_rounds_are_the_trainers_epochs(self, tmp_path):
        args = make_config(tmp_path, num_rounds=7)
        assert args.rounds == 7
        assert args.num_train_epochs == 7

    def test_num_rounds_wins_over_num_train_epochs(self, tmp_path):
        args = make_config(tmp_path, num_rounds=7, num_train_epochs=2)
        assert (args.rounds, args.num_train_epochs) == (7, 7)

    @pytest.mark.parametrize("epochs, rounds", [(1, 1), (4.0, 4), (2.5, 3), (0.2, 1)])
    def test_without_num_rounds_an_epoch_is_a_round(self, tmp_path, epochs, rounds):
        args = make_config(tmp_path, num_train_epochs=epochs)
        assert args.rounds == rounds
        assert args.num_rounds is None
        assert args.num_train_epochs == epochs

    def test_defaults(self, tmp_path):
        args = make_config(tmp_path)
        assert {name: getattr(args, name) for name in OWN_FIELDS} == {
            "num_rounds": None,
            "local_steps": None,
            "local_epochs": None,
            "clients_per_round": None,
            "client_sampling": "uniform",
            "parallel_clients": None,
            "client_store_dir": None,
            "resume_with_changes": None,
            "method": "fedsa",
            "server_optimizer": "fedavg",
            "server_learning_rate": None,
            "server_momentum": None,
            "server_beta_1": None,
            "server_beta_2": None,
            "server_tau": None,
            "aggregator": "mean",
            "trim_fraction": None,
            "krum_byzantine": None,
            "aggregation_weighting": "examples",
            "share_modules_to_save": False,
            "reset_optimizer": None,
            "client_column": "client_id",
            "eval_unseen_clients": False,
            "min_clients_per_round": 1,
            "max_update_norm": "auto",
            "hub_clients": None,
            "hub_client_repositories": None,
            "hub_name_clients": False,
            "hub_base_model": None,
        }
        assert args.rounds == SFTConfig.__dataclass_fields__["num_train_epochs"].default == 3

    def test_the_defaults_of_the_parent_are_kept(self):
        parent, ours = SFTConfig.__dataclass_fields__, FederatedConfig.__dataclass_fields__
        assert {name: ours[name].default for name in parent} == {name: parent[name].default for name in parent}

    def test_ours_reach_to_dict(self, tmp_path):
        values = make_config(tmp_path, num_rounds=2, clients_per_round=3).to_dict()
        assert (values["num_rounds"], values["clients_per_round"], values["num_train_epochs"]) == (2, 3, 2)

    @pytest.mark.parametrize("name", COUNTS)
    def test_one_is_enough(self, tmp_path, name):
        assert getattr(make_config(tmp_path, **{name: 1}), name) == 1


class TestDocumentation:
    @pytest.mark.parametrize("name", OWN_FIELDS)
    def test_every_field_has_help_without_a_raw_percent_sign(self, name):
        text = FederatedConfig.__dataclass_fields__[name].metadata["help"]
        assert text.endswith(".")
        assert "%" not in text

    def test_the_docstring_lists_the_fields_in_their_order(self):
        listed = re.findall(r"^ {8}(\w+) \(`", FederatedConfig.__doc__, flags=re.MULTILINE)
        assert listed == OWN_FIELDS

    def test_help_says_how_many_clients_train_side_by_side(self):
        assert (
            f"up to {DEFAULT_PARALLEL_CLIENTS}"
            in FederatedConfig.__dataclass_fields__["parallel_clients"].metadata["help"]
        )


@pytest.mark.parametrize("parser_class", [HfArgumentParser, TrlParser])
class TestCommandLine:
    def parse(self, parser_class, tmp_path, *arguments) -> FederatedConfig:
        common = ["--output_dir", str(tmp_path), "--use_cpu", "--bf16", "False", "--report_to", "none"]
        (args,) = parser_class(FederatedConfig).parse_args_into_dataclasses(args=[*common, *map(str, arguments)])
        return args

    def test_nothing_given_is_the_default(self, parser_class, tmp_path):
        args = self.parse(parser_class, tmp_path)
        assert {name: getattr(args, name) for name in OWN_FIELDS} == {
            name: FederatedConfig.__dataclass_fields__[name].default for name in OWN_FIELDS
        }

    @pytest.mark.parametrize(
        "arguments, name, value",
        [
            (["--num_rounds", 9], "num_rounds", 9),
            (["--local_steps", 9], "local_steps", 9),
            (["--local_epochs", 9], "local_epochs", 9),
            (["--clients_per_round", 9], "clients_per_round", 9),
            (["--parallel_clients", 9], "parallel_clients", 9),
            (["--client_store_dir", "some/where"], "client_store_dir", "some/where"),
            (["--aggregation_weighting", "uniform"], "aggregation_weighting", "uniform"),
            (["--share_modules_to_save"], "share_modules_to_save", True),
            (["--reset_optimizer", "False"], "reset_optimizer", False),
            (["--reset_optimizer", "True"], "reset_optimizer", True),
            (["--max_update_norm", "2.5"], "max_update_norm", 2.5),
            (["--max_update_norm", "auto"], "max_update_norm", "auto"),
            (["--client_column", "owner"], "client_column", "owner"),
            (["--eval_unseen_clients"], "eval_unseen_clients", True),
        ],
        ids=lambda value: value[0] + "=" + str(value[-1]) if isinstance(value, list) else "",
    )
    def test_each_field_can_be_given(self, parser_class, tmp_path, arguments, name, value):
        given = getattr(self.parse(parser_class, tmp_path, *arguments), name)
        assert given == value
        assert type(given) is type(value)

    def test_validation_runs_on_the_command_line(self, parser_class, tmp_path):
        with pytest.raises(ValueError, match="`local_steps=2` and `local_epochs=1`"):
            self.parse(parser_class, tmp_path, "--local_steps", 2, "--local_epochs", 1)

    @pytest.mark.parametrize("arguments", [["--aggregation_weighting", "size"], ["--num_rounds", "many"]], ids=str)
    def test_the_parser_refuses_what_it_can(self, parser_class, tmp_path, arguments, capsys):
        with pytest.raises(SystemExit):
            self.parse(parser_class, tmp_path, *arguments)
        assert f"{arguments[0]}" in capsys.readouterr().err

    def test_help_renders(self, parser_class, capsys):
        with pytest.raises(SystemExit) as exit:
            parser_class(FederatedConfig).parse_args_into_dataclasses(args=["--help"])
        assert exit.value.code == 0
        text = capsys.readouterr().out
        assert all(f"--{name}" in text for name in OWN_FIELDS)


def test_a_yaml_file_gives_the_arguments(tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(
        f"output_dir: {tmp_path}\nuse_cpu: true\nbf16: false\nreport_to: none\n"
        "num_rounds: 6\nlocal_steps: 4\nreset_optimizer: false\naggregation_weighting: uniform\n"
    )
    (args,) = TrlParser(FederatedConfig).parse_args_and_config(["--config", str(config), "--local_steps", "8"])
    assert (args.num_rounds, args.local_steps, args.reset_optimizer) == (6, 8, False)
    assert args.aggregation_weighting == "uniform"


LORA = {
    "plain": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "all-linear": {"target_modules": "all-linear", "lora_dropout": 0.05},
    "rslora": {"use_rslora": True, "target_modules": ["q_proj"]},
    "dora": {"use_dora": True, "target_modules": ["q_proj"]},
    "pissa": {"init_lora_weights": "pissa", "target_modules": ["q_proj"]},
    "patterns": {
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {"q_proj": 4},
        "target_modules": ["q_proj", "o_proj"],
    },
    "head": {"modules_to_save": ["score"], "target_modules": ["q_proj"], "task_type": "SEQ_CLS"},
    "lora bias": {"lora_bias": True, "target_modules": ["q_proj"]},
}
VERA = {
    "plain": {"r": 16, "target_modules": ["q_proj", "v_proj"]},
    "options": {"d_initial": 0.2, "projection_prng_key": 3, "target_modules": ["q_proj"]},
    "head": {"modules_to_save": ["score"], "target_modules": ["q_proj"]},
}
PAIRS = [
    *(pytest.param(FedSALoraConfig, LoraConfig, kwargs, id=f"lora {name}") for name, kwargs in LORA.items()),
    *(pytest.param(FedSAVeraConfig, VeraConfig, kwargs, id=f"vera {name}") for name, kwargs in VERA.items()),
]


class TestPeftConfigs:
    @pytest.mark.parametrize("ours, stock, kwargs", PAIRS)
    def test_stock_peft_reads_a_stock_config_without_a_warning(self, tmp_path, ours, stock, kwargs):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ours(**kwargs).save_pretrained(tmp_path)
            loaded = PeftConfig.from_pretrained(tmp_path)
        assert type(loaded) is stock
        assert normalised(loaded.to_dict()) == normalised(stock(**kwargs).to_dict())

    @pytest.mark.parametrize("ours, stock, kwargs", PAIRS)
    def test_the_saved_file_is_that_of_the_stock_config(self, tmp_path, ours, stock, kwargs):
        ours(**kwargs).save_pretrained(tmp_path / "ours")
        stock(**kwargs).save_pretrained(tmp_path / "stock")
        saved = [(tmp_path / name / "adapter_config.json").read_text() for name in ("ours", "stock")]
        assert saved[0] == saved[1]

    @pytest.mark.parametrize("ours, stock", [(FedSALoraConfig, LoraConfig), (FedSAVeraConfig, VeraConfig)])
    def test_it_takes_the_stock_arguments_and_no_more(self, ours, stock):
        assert ours.__dataclass_fields__.keys() == stock.__dataclass_fields__.keys()
        assert isinstance(ours(), stock)

    def test_our_arguments_do_not_belong_here(self):
        with pytest.raises(TypeError, match="unexpected keyword argument 'num_rounds'"):
            FedSALoraConfig(num_rounds=3)

    @pytest.mark.parametrize(
        "kwargs, message",
        [
            ({"bias": "all"}, "`bias='all'` trains the base model's own biases"),
            ({"bias": "lora_only"}, "`bias='lora_only'` trains the base model's own biases"),
            ({"trainable_token_indices": [1, 2]}, "`trainable_token_indices` trains rows of .*`modules_to_save`"),
            ({"layer_replication": [(0, 2), (1, 2)]}, "`layer_replication` builds another base model inside PEFT"),
            ({"alora_invocation_tokens": [1], "task_type": "CAUSAL_LM"}, "alora_invocation_tokens.*Covered are"),
        ],
        ids=["bias all", "bias lora_only", "tokens", "replication", "variant"],
    )
    def test_lora_that_cannot_be_split_is_refused(self, kwargs, message):
        with pytest.raises(ValueError, match=message):
            FedSALoraConfig(**kwargs)
        with pytest.raises(ValueError, match=message):
            validate_peft_config(LoraConfig(**kwargs))

    @pytest.mark.parametrize("bias", ["all", "vera_only"])
    def test_vera_that_trains_base_biases_is_refused(self, bias):
        with pytest.raises(ValueError, match=f"`bias='{bias}'` trains the base model's own biases"):
            FedSAVeraConfig(bias=bias)

    def test_the_stock_checks_still_run(self):
        with pytest.raises(ValueError, match="layers_pattern"):
            FedSALoraConfig(target_modules=["q_proj"], layers_pattern="layers")

    def test_no_config_is_refused_with_a_hint(self):
        with pytest.raises(ValueError, match="`peft_config` is None.*`FedSALoraConfig`"):
            validate_peft_config(None)

    def test_another_type_is_refused(self):
        with pytest.raises(TypeError, match="`peft_config` must be a `peft.PeftConfig`, got `dict`"):
            validate_peft_config({"r": 8})

    @pytest.mark.parametrize(
        "config", [LoraConfig(), LoraConfig(use_dora=True), VeraConfig()], ids=["lora", "dora", "vera"]
    )
    def test_stock_configs_will_do(self, config):
        assert validate_peft_config(config) is None


def normalised(values: dict) -> dict:
    return {key: sorted(value) if isinstance(value, (set, list)) else value for key, value in values.items()}
