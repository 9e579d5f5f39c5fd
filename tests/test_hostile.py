"""Federations from anyone: whatever their files say, loading works or says what is wrong with them."""

import contextlib
import copy
import json
import math
import random
import resource
import shutil
import time
from pathlib import Path

import pytest
import torch
from conftest import make_args, make_lora, make_model, make_rows, make_tokenizer
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file

from hf_fedsa import FederatedTrainer, list_clients, load_personalized_model, push_federation
from hf_fedsa.files import file_sha256
from hf_fedsa.hub.folder import read_saved
from hf_fedsa.hub.loading import load_origin
from hf_fedsa.hub.publication import published_files
from hf_fedsa.hub.repository import Remote
from hf_fedsa.tensors import tensors_sha256


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    directory = tmp_path_factory.mktemp("pristine")
    trainer = FederatedTrainer(
        model=make_model(),
        args=make_args(directory, num_rounds=1),
        train_dataset={f"client_{i}": make_rows(4, seed=i) for i in range(2)},
        eval_dataset={f"client_{i}": make_rows(2, seed=9 + i) for i in range(2)},
        processing_class=make_tokenizer(),
        peft_config=make_lora(
            target_modules=["q_proj", "v_proj"],
            rank_pattern={r".*\.0\..*q_proj": 2},
            alpha_pattern={"v_proj": 3},
            modules_to_save=["lm_head"],
        ),
    )
    trainer.train()
    trainer.evaluate()
    trainer.save_model()
    return directory


@pytest.fixture
def saved(pristine, tmp_path):
    shutil.copytree(pristine, tmp_path / "saved")
    return tmp_path / "saved"


@pytest.fixture
def base():
    return make_model()


@contextlib.contextmanager
def unchanged(base):
    before = {key: tensor.clone() for key, tensor in base.state_dict().items()}
    modules = [type(module) for module in base.modules()]
    yield
    after = base.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert [type(module) for module in base.modules()] == modules


def load(source, base, client_id="client_0"):
    model = load_personalized_model(source, client_id, base_model=base)
    assert isinstance(model, PeftModel)
    return model


def change(path: Path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def change_client(source: Path, client_id="client_0", **values):
    federation = json.loads((source / "federation.json").read_text())
    federation["clients"][client_id].update(values)
    change(source / "federation.json", clients=federation["clients"])


def rewrite_tensors(source: Path, folder: str, update):
    """Changes tensors and gives `federation.json` their hash, as someone who means to would."""
    path = source / folder / "adapter_model.safetensors"
    tensors = load_file(path)
    update(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    if folder == "shared":
        change(source / "federation.json", shared_sha256=tensors_sha256(tensors))
        lines = [json.loads(line) for line in (source / "rounds.jsonl").read_text().splitlines()]
        lines[-1]["shared_sha256"] = tensors_sha256(tensors)
        (source / "rounds.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    else:
        change_client(source, folder.split("/")[1], sha256=file_sha256(path))


class TestNotFinite:
    """Adapters with NaN load anywhere, and make every output NaN."""

    @staticmethod
    def spoil(value):
        def update(tensors):
            key = next(key for key in sorted(tensors) if "lora_A" in key)
            tensors[key][0, 0] = value

        return update

    @pytest.mark.parametrize("value", [math.nan, -math.inf])
    def test_a_client(self, saved, base, value):
        rewrite_tensors(saved, "clients/client_1", self.spoil(value))
        message = "adapter of 'client_1' .*holds 'base_model.*lora_A.weight' with 1 of .* NaN or infinite"
        with pytest.raises(ValueError, match=message):
            load_personalized_model(saved, ["client_0", "client_1"], base_model=base)
        with pytest.raises(ValueError, match=message):
            load_origin(saved, "client_1", revision=None, subfolder=None, token=None)
        with pytest.raises(ValueError, match=message):
            push_federation(saved, "me/fed", clients="all")
        load(saved, base)

    def test_the_shared_part(self, saved):
        rewrite_tensors(saved, "shared", self.spoil(math.nan))
        with pytest.raises(ValueError, match="shared part .*lora_A.weight.*NaN"):
            load_origin(saved, "zero", revision=None, subfolder=None, token=None)
        with pytest.raises(ValueError, match="shared part .*lora_A.weight.*NaN"):
            push_federation(saved, "me/fed", clients="none")


class TestFederationFile:
    @pytest.mark.parametrize(
        ("values", "says"),
        [
            ({"rounds_done": "3"}, "`rounds_done` is '3', and a whole number from 0 on is expected"),
            ({"rounds_done": 10**30}, "`rounds_done` is 1000"),
            ({"base_dtype": "nn"}, "`base_dtype` is 'nn'"),
            ({"base_dtype": 3}, "`base_dtype` is 3"),
            ({"base_model": ["x"]}, "`base_model` is"),
            ({"adapter_kind": "ia3"}, "`adapter_kind` is 'ia3', and one of dora"),
            ({"mutates_base": "no"}, "`mutates_base` is 'no', and true or false"),
            ({"clients": []}, "`clients` is"),
            ({"clients": {"a": 3}}, "the client 'a' is 3"),
            ({"clients": {"../a": {}}}, "client id '../a' cannot name a folder"),
            ({"origin": {"shared_sha256": "x", "rounds_done": 1}}, "`origin`.*`shared_sha256` is 'x'"),
            ({"processing_files": "tokenizer.json"}, "`processing_files` is"),
            ({"quantization_config": 4}, "`quantization_config` is 4"),
            ({"card": {"tags": "x"}}, "`card`.*`tags` is 'x'"),
            ({"versions": {"torch": 2}}, "`versions` is"),
            ({"results": {"eval_loss": 3}}, "`results` is"),
            ({"results": {"eval_loss": {"mean": math.nan, "std": 0, "clients": 1}}}, "`results` is"),
            ({"task_type": {}}, "`task_type` is"),
            ({"root_adapter": "nobody"}, "`root_adapter` is 'nobody'"),
        ],
    )
    def test_a_field_that_is_not_what_it_should_be_is_named(self, saved, values, says):
        change(saved / "federation.json", **values)
        with pytest.raises(ValueError, match=says):
            list_clients(saved)

    @pytest.mark.parametrize(
        ("values", "says"),
        [
            ({"num_examples": "many"}, "client 'client_0'.*`num_examples` is 'many'"),
            ({"results": {"eval_loss": "low"}}, "client 'client_0'.*`results` is"),
            ({"path": 3}, "the adapter of 'client_0' is said to be in 3"),
            ({"sha256": "x"}, "`sha256` is 'x'"),
        ],
    )
    def test_and_so_is_one_of_a_client(self, saved, values, says):
        change_client(saved, **values)
        with pytest.raises(ValueError, match=says):
            list_clients(saved)

    @pytest.mark.parametrize("depth", [30, 100_000])
    def test_nesting_has_an_end(self, saved, depth):
        text = (saved / "federation.json").read_text().rstrip().removesuffix("}")
        (saved / "federation.json").write_text(text + ', "arguments": ' + "[" * depth + "]" * depth + "}")
        with pytest.raises(ValueError, match="federation.json is damaged"):
            list_clients(saved)

    @pytest.mark.parametrize(
        ("line", "says"),
        [
            ("{", "Line 1 of .*rounds.jsonl is damaged"),
            ("3", "Line 1 of .*it holds 3"),
            ('{"round": 0}', "Line 1 of .*has no `bytes_down`"),
        ],
    )
    def test_a_round(self, saved, line, says):
        (saved / "rounds.jsonl").write_text(line + "\n")
        with pytest.raises(ValueError, match=says):
            read_saved(saved)


class TestAdapterConfig:
    CONFIG = Path("clients/client_0/adapter_config.json")

    @pytest.mark.parametrize(
        ("values", "says"),
        [
            (
                {"peft_type": "XLORA", "adapters": {"a": "someone/else"}},
                "`peft_type` is 'XLORA', and one of LORA, VERA",
            ),
            ({"peft_type": None}, "`peft_type` is None"),
            ({"r": 10**7}, "adapter of 'client_0'.*lora_A.*shape .4, 32.*by its config the rank is 10000000"),
            ({"r": 0}, "`r` is 0"),
            ({"r": True}, "`r` is True"),
            ({"rank_pattern": {"q_proj": 10**7}}, "by its config the rank is 10000000"),
            ({"rank_pattern": {"q_proj": "2"}}, "`rank_pattern` is"),
            ({"lora_alpha": math.inf}, "`lora_alpha` is inf"),
            ({"lora_dropout": 2}, "`lora_dropout` is 2, and a number between 0 and 1"),
            ({"target_modules": 3}, "`target_modules` is 3"),
            ({"target_modules": [3]}, "`target_modules` is"),
            ({"layer_replication": [[0, 2], [0, 2]]}, "`layer_replication` builds another base"),
            ({"bias": "all"}, "`bias='all'` trains the base model's own"),
            ({"trainable_token_indices": [1]}, "`trainable_token_indices`"),
            ({"init_lora_weights": "pissa"}, "`init_lora_weights='pissa'`, which changes the base weights"),
            ({"megatron_config": {"x": 1}, "megatron_core": "antigravity"}, "`megatron_config` is"),
            ({"arrow_config": {"top_k": 1}}, "`arrow_config` is"),
            ({"use_dora": True}, "kind 'dora', and the federation's is 'lora'"),
            ({"modules_to_save": ["(a+)+$"]}, "`modules_to_save` is .*a list of names of modules"),
            ({"alpha_pattern": {"(a+)+$": 1}}, "pattern .* in `alpha_pattern`, which might take forever"),
            ({"alpha_pattern": {"a?" * 20 + "a" * 20: 1}}, "in `alpha_pattern`, which might take forever"),
            ({"rank_pattern": {"(a|aa)" * 20: 1}}, "in `rank_pattern`, which might take forever"),
            ({"rank_pattern": {"q_(proj": 4}}, "in `rank_pattern`, which is no regular expression"),
            ({"alpha_pattern": {f"x{i}": 1 for i in range(500)}}, "500 patterns in `alpha_pattern` for 4 modules"),
        ],
    )
    def test_what_no_federation_needs_is_refused_before_anything_is_built(self, saved, base, values, says):
        change(saved / self.CONFIG, **values)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with unchanged(base), pytest.raises(ValueError, match=says):
            load(saved, base)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # Kilobytes.

    def test_an_initialisation_that_changes_the_base_is_refused_for_a_newcomer_too(self, saved):
        change(saved / "shared/adapter_config.json", init_lora_weights="olora")
        with pytest.raises(ValueError, match="`init_lora_weights='olora'`, which changes the base weights"):
            load_origin(saved, "zero", revision=None, subfolder=None, token=None)

    SLOW = r"(.*.*)*(.*.*)*(\w+\.)*!"

    @pytest.mark.parametrize(
        "values",
        [
            {"target_modules": SLOW},
            {"exclude_modules": SLOW},
            {"layers_to_transform": [0], "layers_pattern": f"({SLOW})"},
            {"target_modules": [f"x{i}" for i in range(100_000)]},
        ],
    )
    def test_a_regular_expression_takes_no_time(self, saved, base, values):
        change(saved / self.CONFIG, **values)
        began = time.monotonic()
        load(saved, base)
        assert time.monotonic() - began < 20

    def test_a_layer_that_peft_cannot_adapt_leaves_the_base_as_it_was(self, saved, base):
        def update(tensors):
            tensors["base_model.model.model.norm.lora_A.weight"] = torch.zeros(4, 32)
            tensors["base_model.model.model.norm.lora_B.weight"] = torch.zeros(32, 4)

        rewrite_tensors(saved, "clients/client_0", update)
        change(saved / self.CONFIG, target_modules=["q_proj", "v_proj", "norm"])
        with unchanged(base), pytest.raises(ValueError, match="not supported"):
            load(saved, base)


@torch.no_grad()
def test_patterns_mean_what_they_mean_to_peft(pristine, base):
    ids = torch.arange(3, 12)[None]
    ours = load(pristine, base)
    stock = PeftModel.from_pretrained(make_model(), str(pristine / "clients/client_0"), adapter_name="client_0").eval()
    assert torch.equal(ours(ids).logits, stock(ids).logits)
    scales, expected = (
        {name: m.scaling["client_0"] for name, m in model.named_modules() if isinstance(m, LoraLayer)}
        for model in (ours, stock)
    )
    assert scales == expected
    assert set(scales.values()) == {4.0, 2.0, 0.75}


def test_a_newcomer_saves_the_patterns_of_its_federation(tmp_path):
    base = tmp_path / "base"
    make_model().save_pretrained(base)
    make_tokenizer().save_pretrained(base)
    rows = {"client_0": make_rows(4, seed=0)}
    patterns = {"target_modules": r".*\.(q|v)_proj", "alpha_pattern": {r".*\.0\..*": 3}}
    trainer = FederatedTrainer(
        model=str(base), args=make_args(tmp_path / "out"), train_dataset=rows, peft_config=make_lora(**patterns)
    )
    trainer.save_model()
    newcomer = FederatedTrainer.from_shared(
        tmp_path / "out", args=make_args(tmp_path / "new"), train_dataset=make_rows(4, seed=1)
    )
    newcomer.save_model()
    theirs, ours = (
        json.loads((tmp_path / name / "shared/adapter_config.json").read_text()) for name in ("out", "new")
    )
    assert ours == theirs
    assert ours["target_modules"] == patterns["target_modules"]


VALUES = [None, True, -1, 0, 3, 10**7, 10**30, 1.5, math.nan, math.inf, "", "x", "../x", "a\0", "\ud800", "(a+)+$", []]
VALUES += [[None], [[1]], ["q_proj"], {}, {"a": None}, {"a": {"b": 1}}, {"": []}, "lora_A", [0] * 50]


def mutate(value, generator):
    """Replaces, removes or adds something anywhere in a value of JSON."""
    places = []

    def visit(item):
        if isinstance(item, (dict, list)):
            for key in list(item) if isinstance(item, dict) else range(len(item)):
                places.append((item, key))
                visit(item[key])

    value = copy.deepcopy(value)
    visit(value)
    if not places:
        return generator.choice(VALUES)
    container, key = generator.choice(places)
    what = generator.random()
    if what < 0.7:
        container[key] = copy.deepcopy(generator.choice(VALUES))
    elif what < 0.85:
        del container[key]
    elif isinstance(container, dict):
        container[generator.choice(["x", "r", "path", "clients"])] = copy.deepcopy(generator.choice(VALUES))
    else:
        container.append(generator.choice(VALUES))
    return value


@pytest.mark.parametrize("name", ["federation.json", "rounds.jsonl", "clients/client_0/adapter_config.json", "shared"])
def test_whatever_is_changed_it_loads_or_says_why_not(saved, name):
    path = saved / (f"{name}/adapter_config.json" if name == "shared" else name)
    original = path.read_text()
    generator = random.Random(name)
    outcomes = {"works": 0, "says": 0}

    def publish():
        found = read_saved(saved)
        files, _ = published_files(
            found,
            Remote("head"),
            repo_id="me/fed",
            published=found.client_ids[:1],
            name_clients=False,
            client_repositories=False,
        )
        assert "README.md" in files

    for _ in range(60):
        path.write_text(json.dumps(mutate(json.loads(original), generator)) + "\n")
        for use in (
            lambda: load(saved, make_model()),
            lambda: load_origin(saved, generator.choice(["zero", "mean"]), revision=None, subfolder=None, token=None),
            publish,
        ):
            try:
                use()
            except (ValueError, FileNotFoundError) as error:
                assert len(str(error)) > 20
                outcomes["says"] += 1
            else:
                outcomes["works"] += 1
    assert min(outcomes.values()) > 5
