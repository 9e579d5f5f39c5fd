"""What a run's results depend on is told from what they do not, the same in every process."""

import dataclasses
import functools
import json
from enum import Enum

import inside
import pytest
import torch
from conftest import make_args, make_lora
from datasets import Dataset, Value

from hf_fedsa import FederatedConfig
from hf_fedsa.checkpoint import check_changes, check_position
from hf_fedsa.checkpoint_folder import FORMAT, STATE_FOLDER, CheckpointError, write_manifest
from hf_fedsa.files import write_json
from hf_fedsa.identity import (
    FIXED,
    Change,
    check_names_of_changes,
    defaults_of,
    describe_adapter,
    describe_arguments,
    find_changes,
    plain,
    row_fingerprints,
)

WITH_EFFECT = {
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",
    "lr_scheduler_kwargs": {"num_cycles": 2},
    "warmup_steps": 2,
    "optim": "sgd",
    "optim_args": "momentum=0.9",
    "weight_decay": 0.1,
    "adam_beta2": 0.98,
    "max_grad_norm": 0.5,
    "label_smoothing_factor": 0.1,
    "neftune_noise_alpha": 5.0,
    "bf16": True,
    "tf32": False,
    "seed": 7,
    "data_seed": 7,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 2,
    "local_steps": 4,
    "clients_per_round": 1,
    "client_sampling": "examples",
    "aggregation_weighting": "uniform",
    "aggregator": "median",
    "reset_optimizer": False,
    "min_clients_per_round": 2,
    "max_update_norm": None,
    "max_length": 16,
    "loss_type": "dft",
    "completion_only_loss": False,
    "train_sampling_strategy": "sequential",
    "dataloader_drop_last": True,
}
WITHOUT_EFFECT = {
    "num_rounds": 5,
    "parallel_clients": 1,
    "client_store_dir": "elsewhere",
    "logging_steps": 7,
    "save_strategy": "epoch",
    "save_total_limit": 2,
    "eval_steps": 3,
    "report_to": [],
    "run_name": "other",
    "per_device_eval_batch_size": 1,
    "hub_model_id": "me/other",
    "dataloader_num_workers": 2,
    "gradient_checkpointing": True,
    "resume_with_changes": ["seed"],
    "enable_jit_checkpoint": True,
}


class TestArguments:
    @pytest.mark.parametrize("name", WITH_EFFECT)
    def test_what_changes_results_counts(self, tmp_path, name):
        before, now = (describe_arguments(make_args(tmp_path, **kw)) for kw in ({}, {name: WITH_EFFECT[name]}))
        assert before[name] != now[name]
        assert {key for key in before if before[key] != now[key]} == {name}

    @pytest.mark.parametrize("name", WITHOUT_EFFECT)
    def test_what_does_not_is_left_out(self, tmp_path, name):
        before, now = (describe_arguments(make_args(tmp_path, **kw)) for kw in ({}, {name: WITHOUT_EFFECT[name]}))
        assert before == now

    def test_it_is_json_and_tells_no_token_and_no_folder(self, tmp_path):
        args = make_args(tmp_path / "here", hub_token="hf_secret", model_init_kwargs={"token": "hf_secret"})
        text = json.dumps(describe_arguments(args))
        assert "hf_secret" not in text and "here" not in text

    def test_evaluations_count_where_the_schedule_follows_them(self, tmp_path):
        args = make_args(tmp_path, lr_scheduler_type="reduce_lr_on_plateau", eval_strategy="epoch")
        assert describe_arguments(args)["eval_strategy"] == "epoch"
        assert "eval_strategy" not in describe_arguments(make_args(tmp_path))

    def test_a_field_that_is_new_counts(self, tmp_path):
        @dataclasses.dataclass
        class Later(FederatedConfig):
            new_loss: str = "plain"

        args = Later(str(tmp_path), use_cpu=True, bf16=False)
        assert describe_arguments(args)["new_loss"] == "plain"

    def test_every_exception_is_an_argument(self):
        fields = {field.name for field in dataclasses.fields(FederatedConfig)}
        assert inside.ARGUMENTS_WITHOUT_EFFECT <= fields, "An argument of transformers or TRL is gone."
        for prefix in inside.PREFIXES_OF_ARGUMENTS_WITHOUT_EFFECT:
            assert any(name.startswith(prefix) for name in fields)

    def test_an_adapter_is_its_settings(self):
        before, now = describe_adapter(make_lora()), describe_adapter(make_lora(lora_dropout=0.1))
        assert {key for key in before if before[key] != now[key]} == {"lora_dropout"}
        assert describe_adapter(make_lora(inference_mode=True)) == before


class Color(Enum):
    RED = "red"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"b", "a"}, ["a", "b"]),
        ((1, None), [1, None]),
        (Color.RED, "red"),
        (torch.bfloat16, "torch.bfloat16"),
        (torch.optim.SGD, "torch.optim.sgd.SGD"),
        (make_lora, "conftest.make_lora"),
        (functools.partial(make_lora, r=2), "functools.partial"),
        ({1: Change("a", "b", None, 2)}, {"1": {"name": "a", "shown": "b", "before": None, "now": 2}}),
    ],
)
def test_values_are_plain(value, expected):
    assert plain(value) == expected


EXPECTED = "c2c6be16733916fad21fd472cc0bd2e5fa3706aad14bad0a566b1a1080441b80"


def fingerprints(rows, rows_of=None, **columns):
    dataset = Dataset.from_dict({"input_ids": rows, **columns})
    return row_fingerprints(dataset, rows_of or {"a": range(len(rows))})


class TestRows:
    ROWS = [[1, 2, 3], [4], [], [5, 6]]

    def test_they_are_the_same_in_every_process(self):
        (found,) = fingerprints(self.ROWS).values()
        assert found == EXPECTED

    @pytest.mark.parametrize(
        "rows",
        [
            [[1, 2, 3], [4], [], [5, 7]],
            [[1, 2], [3, 4], [], [5, 6]],
            [[4], [1, 2, 3], [], [5, 6]],
            [[1, 2, 3], [4], [5, 6]],
            [[1, 2, 3], [4], None, [5, 6]],
        ],
        ids=["value", "bounds", "order", "number", "null"],
    )
    def test_any_difference_shows(self, rows):
        assert fingerprints(rows) != fingerprints(self.ROWS)

    @pytest.mark.parametrize("column", [[0, 1, 2, 3], [0.5, 1.5, 2.5, 3.5], ["a", "b", "c", "d"], [[[1]], [], [], []]])
    def test_every_column_counts(self, column):
        changed = [*column[:-1], column[0]]
        assert fingerprints(self.ROWS, label=column) != fingerprints(self.ROWS, label=changed)
        assert fingerprints(self.ROWS, label=column) == fingerprints(self.ROWS, label=list(column))

    def test_the_width_of_numbers_does_not_count(self):
        dataset = Dataset.from_dict({"input_ids": self.ROWS})
        narrow = dataset.cast_column("input_ids", [Value("int32")])
        rows_of = {"a": range(4)}
        assert row_fingerprints(narrow, rows_of) == row_fingerprints(dataset, rows_of)

    def test_a_client_is_known_wherever_its_rows_are(self):
        """Also across the parts in which the rows are read."""
        mine, other = [[i, i + 1] for i in range(7)], [[0]] * 12_000
        alone = fingerprints(mine)["a"]
        rows = mine[:3] + other + mine[3:]
        everyone = fingerprints(rows, {"b": range(3, 12_003), "a": [0, 1, 2, *range(12_003, 12_007)]})
        assert everyone["a"] == alone
        shuffled = Dataset.from_dict({"input_ids": rows[::-1]}).select(range(len(rows))[::-1])
        assert row_fingerprints(shuffled, {"a": [0, 1, 2, *range(12_003, 12_007)]})["a"] == alone

    def test_clients_without_rows_have_a_fingerprint(self):
        assert fingerprints([[1]], {"a": [0], "b": []})["b"]


def make_identity(**changes):
    values = {
        "method": "fedsa",
        "adapter_kind": "lora",
        "client_ids": ["a", "b"],
        "r": 4,
        "base_model": "tiny",
        "num_rows": {"a": 3, "b": 4},
        "rows": {"a": "1f", "b": "2e"},
        "optimizer": None,
        "adapter": {"lora_dropout": 0.0, "r": 4},
        "arguments": {"learning_rate": 0.1, "seed": 42, "max_length": 32},
    }
    for name, value in changes.items():
        group = next((g for g in ("arguments", "adapter") if name in values[g]), None)
        values = {**values, **({group: {**values[group], name: value}} if group else {name: value})}
    return values


def checkpoint_of(path, identity_, rounds_done=0, round_open=False):
    state = {
        "format": FORMAT,
        "identity": identity_,
        "server": {"history": [{}] * rounds_done},
        "client": {"round_open": round_open},
        "num_processes": 1,
        "parallel_clients": 2,
    }
    write_json(path / STATE_FOLDER / "state.json", state)
    write_manifest(path)
    return state


class TestChanges:
    def check(self, path, current, meant=(), defaults=None):
        return check_changes(path, current, meant=meant, defaults=defaults or {"logging_steps": 1})

    @pytest.fixture
    def saved(self, tmp_path):
        checkpoint_of(tmp_path / "checkpoint-6", make_identity())
        return tmp_path / "checkpoint-6"

    def test_the_same_run_passes(self, saved):
        assert self.check(saved, make_identity()) == frozenset()
        assert self.check(saved, make_identity(), meant=["learning_rate", "logging_steps"]) == frozenset()

    @pytest.mark.parametrize(
        ("change", "name", "says"),
        [
            ({"learning_rate": 0.2}, "learning_rate", "`learning_rate` is 0.1, this run's is 0.2"),
            ({"lora_dropout": 0.5}, "lora_dropout", "`lora_dropout` is 0.0, this run's is 0.5"),
            ({"rows": {"a": "1f", "b": "3d"}}, "train_dataset", "`rows.b` is '2e', this run's is '3d'"),
            ({"num_rows": {"a": 9, "b": 4}}, "train_dataset", "`num_rows.a` is 3, this run's is 9"),
            ({"base_model": "moved"}, "base_model", "`base_model` is 'tiny', this run's is 'moved'"),
            ({"optimizer": ["SGD"]}, "optimizer_cls_and_kwargs", "`optimizer` is None, this run's is"),
        ],
    )
    def test_a_change_is_named_and_can_be_meant(self, saved, change, name, says):
        with pytest.raises(CheckpointError, match=says) as error:
            self.check(saved, make_identity(**change))
        assert f"If the change is meant, set `resume_with_changes=['{name}']`." in str(error.value)
        assert self.check(saved, make_identity(**change), meant=[name]) == {name}

    def test_all_changes_are_named_at_once(self, saved):
        current = make_identity(learning_rate=0.2, seed=1, max_length=8, lora_dropout=0.1)
        with pytest.raises(CheckpointError, match="; and 1 more") as error:
            self.check(saved, current)
        assert "['learning_rate', 'lora_dropout', 'max_length', 'seed']" in str(error.value)

    def test_what_an_older_version_did_not_know_is_compared_to_its_default(self, saved):
        current = make_identity()
        current["arguments"] = {**current["arguments"], "new": 1}
        assert self.check(saved, current, defaults={"new": 1}) == frozenset()
        with pytest.raises(CheckpointError, match="`new` is 2, this run's is 1"):
            self.check(saved, current, defaults={"new": 2})

    def test_a_schedule_that_follows_evaluations_has_no_place_on_another(self, saved):
        checkpoint_of(saved, make_identity())
        with pytest.raises(CheckpointError, match="One follows evaluations"):
            current = make_identity()
            current["arguments"]["lr_scheduler_type"] = "greedy"
            self.check(saved, current, meant=["lr_scheduler_type"], defaults={"lr_scheduler_type": "linear"})

    def test_an_older_checkpoint_of_this_run_is_pointed_at(self, saved):
        checkpoint_of(saved.with_name("checkpoint-3"), make_identity(learning_rate=0.2))
        with pytest.raises(CheckpointError, match=r"checkpoint-3 is of this run\.$"):
            self.check(saved, make_identity(learning_rate=0.2))

    @pytest.mark.parametrize("name", FIXED)
    def test_what_cannot_change_cannot_be_meant(self, tmp_path, name):
        with pytest.raises(ValueError, match=f"`resume_with_changes` names '{name}', which cannot change: "):
            make_args(tmp_path, resume_with_changes=[name])

    def test_a_name_that_is_none_is_refused(self, saved):
        with pytest.raises(ValueError, match="names 'learning_rat', which is no argument"):
            self.check(saved, make_identity(), meant=["learning_rat"])
        check_names_of_changes(["anything"])  # The adapter's entries are not known before there is one.

    def test_one_name_may_stand_alone(self, tmp_path):
        assert make_args(tmp_path, resume_with_changes="seed").resume_with_changes == ["seed"]

    def test_defaults_are_those_of_the_fields(self, tmp_path):
        defaults = defaults_of(make_lora(), make_args(tmp_path))
        assert defaults["lora_dropout"] == 0.0 and defaults["max_update_norm"] == "auto"
        assert defaults["lr_scheduler_type"] == "linear"

    def test_every_group_of_an_identity_has_a_name(self):
        assert find_changes({}, make_identity(), {})


class TestPosition:
    """The last checkpoint is of a round's middle, the one before it of its beginning."""

    @pytest.fixture
    def folder(self, tmp_path):
        checkpoint_of(tmp_path / "checkpoint-6", make_identity(), rounds_done=1)
        return tmp_path

    def check(self, folder, changes=(), num_rounds=3, num_processes=1, **progress):
        path = folder / "checkpoint-8"
        state = checkpoint_of(path, make_identity(), **progress)
        check_position(path, state, frozenset(changes), num_rounds=num_rounds, num_processes=num_processes)

    @pytest.mark.parametrize("num_rounds", [2, 3])
    def test_a_run_may_end_where_it_stands(self, folder, num_rounds):
        self.check(folder, num_rounds=num_rounds, rounds_done=2)
        self.check(folder, num_rounds=num_rounds, rounds_done=1, round_open=True)

    @pytest.mark.parametrize("progress", [{"rounds_done": 2}, {"rounds_done": 1, "round_open": True}])
    def test_fewer_rounds_than_there_were_are_refused(self, folder, progress):
        where = "in" if "round_open" in progress else "after"
        with pytest.raises(CheckpointError, match=f"`num_rounds=1`, but .*checkpoint-8 stands {where} round 2. Set"):
            self.check(folder, num_rounds=1, **progress)

    def test_changes_and_other_processes_wait_for_a_rounds_end(self, folder):
        self.check(folder, changes=["seed"], num_processes=2, rounds_done=2)
        with pytest.raises(CheckpointError, match=r"of processes \(1\) than resumes it \(2\).*as .*checkpoint-6\."):
            self.check(folder, num_processes=2, rounds_done=1, round_open=True)
        with pytest.raises(CheckpointError, match=r"with another `max_length`, `seed`.*such as .*checkpoint-6\."):
            self.check(folder, changes=["seed", "max_length"], rounds_done=1, round_open=True)
