"""What cannot work is refused before a model loads, with what was passed, why it cannot work and what to do."""

import re
import shutil
from hashlib import sha256
from pathlib import Path

import inside
import pytest
import torch
from conftest import make_args, make_lora, make_model, make_rows
from datasets import Dataset, DatasetDict, IterableDataset
from peft import LoHaConfig, LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from trl import SFTConfig

from hf_fedsa import FederatedMixin, FederatedTrainer
from hf_fedsa.checkpoint_folder import CheckpointError


@pytest.fixture
def rows():
    return {"client_0": make_rows(4, seed=0), "client_1": make_rows(4, seed=1)}


@pytest.fixture
def build(tmp_path, rows):
    """Builds a trainer whose model does not exist: an attempt to load it is another error than those expected."""

    def build(train_dataset="two clients", eval_dataset=None, args=None, peft_config="lora", **config):
        return FederatedTrainer(
            model=str(tmp_path / "no_such_model"),
            args=make_args(tmp_path / "out", **config) if args is None else args,
            train_dataset=rows if isinstance(train_dataset, str) else train_dataset,
            eval_dataset=eval_dataset,
            peft_config=make_lora() if peft_config == "lora" else peft_config,
        )

    return build


@pytest.fixture
def refuses(build, tmp_path):
    """Checks that building fails with exactly this type and that the message says each of these in this order."""

    def check(error_type, *says, **kwargs):
        with pytest.raises(error_type) as caught:
            build(**kwargs)
        assert caught.type is error_type
        assert re.search(".*".join(says), str(caught.value), flags=re.DOTALL), str(caught.value)
        assert not (tmp_path / "out" / "federation.json").exists()

    return check


def with_column(values, column="client_id") -> Dataset:
    return make_rows(len(values), seed=0).add_column(column, values)


def test_one_loss_scale_for_several_clients(refuses, tmp_path):
    args = make_args(tmp_path / "out")
    args.fp16 = True  # `TrainingArguments` refuses it by itself where there is no GPU.
    refuses(ValueError, "`fp16=True`", "2 clients side by side", "bf16=True", "parallel_clients=1", args=args)
    args.parallel_clients = 1
    refuses(OSError, "no_such_model", args=args)


class TestAccepted:
    """The opposite of a refusal: the checks pass and the model is asked for."""

    @pytest.mark.parametrize(
        "kwargs",
        [
            {},
            {"train_dataset": with_column(["a", "b"])},
            {"eval_dataset": {"client_9": make_rows(2, seed=5)}, "eval_unseen_clients": True},
            {"train_dataset": make_rows(4, seed=0), "local_steps": None, "max_steps": 3},
            {"train_dataset": make_rows(4, seed=0), "local_steps": None, "packing": True},
            {"clients_per_round": 2},
        ],
        ids=["dictionary", "column", "unseen clients", "max_steps alone", "packing alone", "clients_per_round"],
    )
    def test_valid_input_gets_as_far_as_loading_the_model(self, build, kwargs):
        with pytest.raises(OSError, match="no_such_model"):
            build(**kwargs)


class TestAdapter:
    def test_no_adapter(self, refuses):
        refuses(
            ValueError, "`peft_config` is None", "needs an adapter to share", "`FedSALoraConfig`", peft_config=None
        )

    def test_an_adapter_without_a_rule(self, refuses):
        refuses(ValueError, "LoHaConfig", "which of its tensors are shared", "Use one of", peft_config=LoHaConfig())

    def test_biases_of_the_base_model(self, refuses):
        refuses(
            ValueError,
            "`bias='all'`",
            "base model's own biases",
            'Set `bias="none"`',
            peft_config=LoraConfig(r=4, bias="all"),
        )

    def test_something_else_than_a_config(self, refuses):
        refuses(TypeError, "`peft_config` must be", "`dict`", "Pass a `FedSALoraConfig`", peft_config={"r": 4})

    def test_a_peft_model_with_an_adapter_without_a_rule(self, rows, tmp_path):
        model = get_peft_model(make_model(), LoHaConfig(target_modules=["q_proj"]))
        with pytest.raises(ValueError, match="LoHaConfig.*which of its tensors are shared.*Use one of"):
            FederatedTrainer(model, make_args(tmp_path), train_dataset=rows)

    def test_a_peft_model_with_two_adapters(self, rows, tmp_path, tokenizer):
        model = get_peft_model(make_model(), make_lora())
        model.add_adapter("second", make_lora())
        with pytest.raises(ValueError, match="adapters default, second.*exactly one.*Delete the others"):
            FederatedTrainer(model, make_args(tmp_path), train_dataset=rows, processing_class=tokenizer)


class TestClients:
    def test_no_dataset(self, refuses):
        refuses(
            ValueError, "`train_dataset` is required", "a dictionary from client id to `Dataset`", train_dataset=None
        )

    @pytest.mark.parametrize("empty", [{}, DatasetDict()], ids=["dict", "DatasetDict"])
    def test_no_clients(self, refuses, empty):
        refuses(ValueError, "`train_dataset` is an empty dictionary", "at least one client", train_dataset=empty)

    def test_a_client_without_rows(self, refuses, rows):
        rows["client_1"] = rows["client_1"].select([])
        refuses(ValueError, "'client_1' has no rows", "cannot train", "Leave it out", train_dataset=rows)

    def test_a_dataset_without_rows(self, refuses):
        refuses(ValueError, "`train_dataset` has no rows", train_dataset=make_rows(2, seed=0).select([]))

    def test_rows_that_are_no_dataset(self, refuses):
        refuses(
            TypeError,
            "client 'client_0'",
            "`datasets.Dataset`, got `list`",
            train_dataset={"client_0": [{"text": ""}]},
        )

    def test_a_list_in_place_of_a_dataset(self, refuses):
        refuses(TypeError, "`train_dataset` must be a `Dataset`", "got `list`", train_dataset=[{"text": "the"}])

    @pytest.mark.parametrize("alone", [True, False], ids=["alone", "of a client"])
    def test_a_streamed_dataset(self, refuses, alone):
        streamed = IterableDataset.from_generator(lambda: iter([{"text": "the"}]))
        if alone:
            refuses(TypeError, "`train_dataset` is an `IterableDataset`", "no length", "Pass", train_dataset=streamed)
        else:
            refuses(TypeError, "client 'a'", "got `IterableDataset`", "no length", train_dataset={"a": streamed})

    def test_a_streamed_eval_dataset(self, refuses):
        streamed = IterableDataset.from_generator(lambda: iter([{"text": "the", "client_id": "client_0"}]))
        refuses(TypeError, "`eval_dataset` is an `IterableDataset`", "no length", eval_dataset=streamed)

    def test_streamed_eval_datasets_of_clients(self, refuses):
        streamed = IterableDataset.from_generator(lambda: iter([{"text": "the"}]))
        refuses(TypeError, "client 'client_0'", "got `Iterable", "no length", eval_dataset={"client_0": streamed})

    @pytest.mark.parametrize("name", ["train_dataset", "eval_dataset"])
    def test_a_transform_of_rows_that_are_to_be_tokenized(self, refuses, rows, name):
        transformed = {client_id: part.with_transform(dict) for client_id, part in rows.items()}
        refuses(ValueError, "`Dataset.with_transform`", "skip_prepare_dataset", "`Dataset.map`", **{name: transformed})

    @pytest.mark.parametrize("other", [None, lambda batch: batch], ids=["none", "another"])
    def test_transforms_that_differ(self, refuses, rows, other):
        data = {"a": rows["client_0"].with_transform(dict), "b": rows["client_1"]}
        data["b"] = data["b"] if other is None else data["b"].with_transform(other)
        settings = {"dataset_kwargs": {"skip_prepare_dataset": True}, "remove_unused_columns": False}
        for train_dataset in (data, dict(reversed(data.items()))):
            refuses(
                ValueError,
                "another transform than those of",
                "same function",
                "map`",
                **settings,
                train_dataset=train_dataset,
            )

    def test_a_renamed_column_that_is_missing(self, refuses):
        refuses(
            ValueError,
            "`train_dataset` has no column `hospital`",
            "tell the clients apart, only: text",
            "Set `client_column`",
            train_dataset=make_rows(4, seed=0),
            client_column="hospital",
        )

    def test_a_missing_column_where_several_clients_are_sampled(self, refuses):
        refuses(
            ValueError,
            "no column `client_id`",
            "dictionary from client id",
            train_dataset=make_rows(4, seed=0),
            clients_per_round=2,
        )

    def test_a_column_with_nulls(self, refuses):
        refuses(
            ValueError,
            "Column `client_id` of `train_dataset` is null in row 1",
            "Fill or drop",
            train_dataset=with_column(["a", None, "b"]),
        )

    @pytest.mark.parametrize(
        "values", [[1, 2, 3], [1.0, 2.0, 3.0], [["a"], ["b"], ["c"]]], ids=["int", "float", "list"]
    )
    def test_a_column_that_is_no_text(self, refuses, values):
        refuses(
            TypeError,
            "Column `client_id` of `train_dataset`",
            "as strings",
            "Convert it",
            train_dataset=with_column(values),
        )

    @pytest.mark.parametrize(
        "client_id",
        ["../escape", "a/b", "a\\b", "", ".", "..", ".hidden", "-rf", "a b", "a\n", "a\0b", "klinik_ä", "x" * 97],
        ids=repr,
    )
    @pytest.mark.parametrize("form", ["dictionary", "column"])
    def test_an_id_that_cannot_name_a_folder(self, refuses, rows, client_id, form):
        data = {client_id: rows["client_0"], "b": rows["client_1"]}
        if form == "column":
            data = with_column([client_id, "b"])
        refuses(
            ValueError,
            re.escape(f"client id {client_id!r}"),
            "cannot name a folder",
            "Use up to 96 letters",
            train_dataset=data,
        )

    def test_an_id_that_is_no_text(self, refuses, rows):
        refuses(TypeError, "must be strings, got 3 of type int", train_dataset={3: rows["client_0"]})

    @pytest.mark.parametrize("form", ["dictionary", "column"])
    def test_ids_that_differ_in_case_only(self, refuses, rows, form):
        data = {"Ward": rows["client_0"], "ward": rows["client_1"]}
        if form == "column":
            data = with_column(["Ward", "ward"])
        refuses(ValueError, "'Ward' and 'ward' differ in case only", "share a folder", "Rename", train_dataset=data)

    def test_an_eval_client_whose_id_differs_in_case_only(self, refuses):
        refuses(
            ValueError,
            "differ in case only",
            eval_dataset={"Client_0": make_rows(2, seed=0)},
            eval_unseen_clients=True,
        )

    def test_clients_with_different_columns(self, refuses, rows):
        rows["client_1"] = rows["client_1"].rename_column("text", "content")
        refuses(
            ValueError,
            "'client_0' and 'client_1' differ in the columns content, text",
            "Bring all clients to the same columns",
            train_dataset=rows,
        )

    def test_clients_whose_columns_hold_different_types(self, refuses, rows):
        rows["client_1"] = Dataset.from_dict({"text": [1, 2, 3]})
        refuses(ValueError, "'client_0'", "'client_1'", "text", train_dataset=rows)

    def test_a_client_column_that_contradicts_the_dictionary(self, refuses, rows):
        rows["client_1"] = with_column(["client_1", "client_2"])
        refuses(ValueError, "client 'client_1'", "column `client_id` with other values", "Rename", train_dataset=rows)

    @pytest.mark.parametrize("column", ["image", "images"])
    @pytest.mark.parametrize("form", ["dictionary", "column"])
    def test_images_of_several_clients(self, refuses, column, form):
        data = {c: make_rows(2, seed=i).add_column(column, [[0], [1]]) for i, c in enumerate(("client_0", "client_1"))}
        if form == "column":
            data = with_column(["a", "b"]).add_column(column, [[0], [1]])
        refuses(ValueError, f"`{column}`", train_dataset=data)


class TestEvalClients:
    @pytest.mark.parametrize("form", ["dictionary", "column"])
    def test_a_client_that_never_trains(self, refuses, form):
        data = {"client_0": make_rows(2, seed=0), "client_9": make_rows(2, seed=1)}
        if form == "column":
            data = with_column(["client_0", "client_9"])
        refuses(
            ValueError,
            "`eval_dataset` has rows of 'client_9'",
            "no training rows",
            "Remove them, or set `eval_unseen_clients=True`",
            eval_dataset=data,
        )

    def test_rows_of_no_client(self, refuses):
        refuses(
            ValueError,
            "`eval_dataset` has no column `client_id`",
            "not known which client",
            "Add the column, or pass a dictionary",
            eval_dataset=make_rows(2, seed=0),
        )

    def test_a_column_with_nulls(self, refuses):
        refuses(
            ValueError,
            "Column `client_id` of `eval_dataset` is null in row 1",
            "Fill or drop",
            eval_dataset=with_column(["client_0", None]),
        )

    def test_no_clients(self, refuses):
        refuses(ValueError, "`eval_dataset` is an empty dictionary", "at least one client", eval_dataset={})

    def test_an_id_that_cannot_name_a_folder(self, refuses):
        refuses(
            ValueError,
            "'../x' cannot name a folder",
            eval_dataset={"../x": make_rows(2, seed=0)},
            eval_unseen_clients=True,
        )


class TestArguments:
    @pytest.mark.parametrize(
        "config, says",
        [
            ({"clients_per_round": 3}, ["`clients_per_round=3` is more than the 2 clients", "Lower it"]),
            (
                {"local_steps": 2, "local_epochs": 1},
                ["`local_steps=2` and `local_epochs=1`", "both say", "Pass one of them"],
            ),
            ({"packing": True}, ["`packing=True`", "no longer say which client", "Set `packing=False`"]),
            ({"eval_packing": True}, ["packing", "no longer say which client", "leave `eval_packing` out"]),
            ({"padding_free": True}, ["`padding_free=True`", "cannot be told apart", "Set `padding_free=False`"]),
            ({"max_steps": 5}, ["`max_steps=5`", "middle of a round", "Set `num_rounds`"]),
            (
                {"train_sampling_strategy": "batch_rebalance"},
                ["`train_sampling_strategy='batch_rebalance'`", "rows belong to clients", "Use 'random'"],
            ),
            ({"fsdp": True}, ["`fsdp=True`", "each process trains clients of its own", "Leave it out"]),
            (
                {"load_best_model_at_end": True, "eval_strategy": "epoch", "save_strategy": "epoch"},
                ["`load_best_model_at_end=True`", "one client's weights in place of all", "load the checkpoint"],
            ),
            ({"save_strategy": "best"}, ['`save_strategy="best"`', "every client has its own", 'Use "epoch"']),
            (
                {"auto_find_batch_size": True},
                ["`auto_find_batch_size=True`", "restarts training", "Set `per_device_train_batch_size`"],
            ),
            ({"parallel_clients": 0}, ["`parallel_clients` must be at least 1, got 0", "Leave it out"]),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
    )
    def test_what_cannot_work(self, refuses, config, says):
        refuses(ValueError, *says, **config)

    def test_deepspeed(self, refuses):
        try:
            refuses(
                ValueError,
                "`deepspeed`",
                "each process trains clients of its own",
                "Leave it out",
                deepspeed={"zero_optimization": {"stage": 2}},
            )
        finally:
            unset_hf_deepspeed_config()

    def test_args_of_another_type(self, refuses, tmp_path):
        refuses(TypeError, "`args` must be a `FederatedConfig`", "got `dict`", args={"output_dir": str(tmp_path)})

    @pytest.mark.parametrize(
        "setting, says",
        [
            ({"packing": True}, "`packing=True`"),
            ({"max_steps": 5}, "`max_steps=5`"),
            ({"save_strategy": "best"}, "save_strategy"),
        ],
        ids=["packing", "max_steps", "best"],
    )
    def test_an_sft_config_is_held_to_the_same(self, build, tmp_path, setting, says):
        args = SFTConfig(str(tmp_path), bf16=False, use_cpu=True, gradient_checkpointing=False, **setting)
        with pytest.raises(ValueError, match=says):
            build(args=args)

    def test_args_of_another_type_for_another_trainer(self, rows, tmp_path):
        class Federated(FederatedMixin, Trainer):
            pass

        args = TrainingArguments(str(tmp_path), use_cpu=True)
        with pytest.raises(TypeError, match="`args` must be a `FederatedConfig`, got `TrainingArguments`"):
            Federated(model=None, args=args, train_dataset=rows)


class TestRowsThatTruncationEmpties:
    """Known only once the rows are tokenized, so these have a model."""

    def build(self, data, tmp_path, tokenizer, **config):
        return FederatedTrainer(
            make_model(),
            make_args(tmp_path, **config),
            train_dataset=data,
            processing_class=tokenizer,
            peft_config=make_lora(),
        )

    def test_a_client_whose_prompts_fill_max_length_is_named(self, tmp_path, tokenizer):
        data = {
            "client_0": Dataset.from_dict({"prompt": ["the cat"], "completion": [" sat"]}),
            "client_1": Dataset.from_dict({"prompt": ["one two three four five six"], "completion": [" seven"]}),
        }
        with pytest.raises(ValueError, match="Client 'client_1' has no row left.*`max_length=6`.*Raise `max_length`"):
            self.build(data, tmp_path, tokenizer, max_length=6)
        trainer = self.build(data, tmp_path, tokenizer, max_length=7)
        assert inside.num_rows(trainer) == {"client_0": 1, "client_1": 1}

    def test_all_clients_emptied_is_the_same_error(self, tmp_path, tokenizer):
        rows = Dataset.from_dict({"prompt": ["one two three four five six"], "completion": [" seven"]})
        with pytest.raises(ValueError, match="Client 'client_0' has no row left.*`max_length=6`.*Raise `max_length`"):
            self.build({"client_0": rows, "client_1": rows}, tmp_path, tokenizer, max_length=6)

    def test_a_client_with_less_than_a_batch_where_rests_are_dropped_is_named(self, tmp_path, tokenizer):
        data = {"client_0": make_rows(4, seed=0), "client_1": make_rows(1, seed=1)}
        with pytest.raises(ValueError, match="'client_1' has 1 rows, fewer than one batch of 2.*drop_last"):
            self.build(data, tmp_path, tokenizer, dataloader_drop_last=True)


def digests(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


class TestCheckpoints:
    CONFIG = {"num_rounds": 2, "local_steps": 2, "save_strategy": "steps", "save_steps": 1, "learning_rate": 1e-3}

    def build(self, output_dir, tokenizer, data, peft_config=None, **config) -> FederatedTrainer:
        return FederatedTrainer(
            make_model(num_hidden_layers=1),
            make_args(output_dir, **{**self.CONFIG, **config}),
            train_dataset=data,
            processing_class=tokenizer,
            peft_config=peft_config or make_lora(),
        )

    @pytest.fixture
    def output_dir(self, tmp_path, tokenizer, rows):
        self.build(tmp_path / "out", tokenizer, rows).train()
        return tmp_path / "out"

    def test_the_checkpoint_itself_is_good(self, output_dir, tokenizer, rows):
        trainer = self.build(output_dir, tokenizer, rows)
        trainer.train(resume_from_checkpoint=str(output_dir / "checkpoint-1"))
        assert trainer.state.global_step == 4

    @pytest.mark.parametrize(
        "change, says",
        [
            (
                lambda data: {"data": {"client_0": data["client_0"], "other": data["client_1"]}},
                "`client_ids`.*'other'",
            ),
            (lambda data: {"data": {**data, "client_2": data["client_0"]}}, "`client_ids`.*'client_2'"),
            (
                lambda data: {"data": {**data, "client_1": make_rows(7, seed=9)}},
                "`num_rows.client_1` is 4, this run's is 7",
            ),
            (lambda data: {"peft_config": make_lora(r=2)}, "`r` is 4, this run's is 2"),
            (lambda data: {"peft_config": make_lora(use_dora=True)}, "`adapter_kind` is 'lora', this run's is 'dora'"),
            (
                lambda data: {"peft_config": make_lora(use_rslora=True)},
                "`adapter_kind` is 'lora', this run's is 'rslora'",
            ),
            (lambda data: {"peft_config": make_lora(lora_alpha=4)}, "`lora_alpha` is 8, this run's is 4"),
            (lambda data: {"peft_config": make_lora(target_modules=["q_proj"])}, "`tensors.base_model.*"),
            (lambda data: {"seed": 7}, "`seed` is 42, this run's is 7"),
            (lambda data: {"clients_per_round": 1}, "`clients_per_round` is None, this run's is 1"),
        ],
        ids=["renamed", "one more", "rows", "rank", "dora", "rslora", "alpha", "targets", "seed", "per round"],
    )
    @pytest.mark.parametrize("automatic", [False, True], ids=["by name", "newest"])
    def test_of_another_federation(self, output_dir, tokenizer, rows, change, says, automatic):
        trainer = self.build(output_dir, tokenizer, **{"data": rows, **change(rows)})
        before = digests(output_dir)
        name = "checkpoint-4" if automatic else "checkpoint-1"
        with pytest.raises(CheckpointError, match=f"{name} was written by another federation.*{says}.*Resume with"):
            trainer.train(resume_from_checkpoint=automatic or str(output_dir / name))
        assert digests(output_dir) == before
        assert trainer.round_history == []

    @pytest.mark.parametrize(
        "pattern", ["*/server.safetensors", "*/slots.safetensors", "optimizer.pt", "*/state.json"]
    )
    def test_with_a_truncated_file(self, output_dir, tokenizer, rows, pattern):
        (path,) = (output_dir / "checkpoint-1").glob(pattern)
        path.write_bytes(path.read_bytes()[:-10])
        trainer = self.build(output_dir, tokenizer, rows)
        before = digests(output_dir)
        with pytest.raises(CheckpointError, match=f"checkpoint-1 is damaged: .*{path.name} is not the file .*earlier"):
            trainer.train(resume_from_checkpoint=str(output_dir / "checkpoint-1"))
        assert digests(output_dir) == before

    def test_with_a_changed_byte(self, output_dir, tokenizer, rows):
        (path,) = (output_dir / "checkpoint-1").glob("*/server.safetensors")
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        trainer = self.build(output_dir, tokenizer, rows)
        before = digests(output_dir)
        with pytest.raises(CheckpointError, match="checkpoint-1 is damaged: .*server.safetensors"):
            trainer.train(resume_from_checkpoint=str(output_dir / "checkpoint-1"))
        assert digests(output_dir) == before

    def test_with_a_missing_file(self, output_dir, tokenizer, rows):
        (path,) = (output_dir / "checkpoint-1").glob("*/slots.safetensors")
        path.unlink()
        trainer = self.build(output_dir, tokenizer, rows)
        before = digests(output_dir)
        with pytest.raises(CheckpointError, match="checkpoint-1 is damaged: .*slots.safetensors is missing.*earlier"):
            trainer.train(resume_from_checkpoint=str(output_dir / "checkpoint-1"))
        assert digests(output_dir) == before

    def test_that_was_never_finished(self, output_dir, tokenizer, rows):
        (path,) = (output_dir / "checkpoint-1").glob("*/manifest.json")
        path.unlink()
        trainer = self.build(output_dir, tokenizer, rows)
        before = digests(output_dir)
        with pytest.raises(CheckpointError, match="checkpoint-1 is not a finished checkpoint.*manifest.*earlier"):
            trainer.train(resume_from_checkpoint=str(output_dir / "checkpoint-1"))
        assert digests(output_dir) == before

    @pytest.mark.parametrize("automatic", [False, True], ids=["by name", "newest"])
    def test_that_is_not_there(self, tmp_path, tokenizer, rows, automatic):
        trainer = self.build(tmp_path / "out", tokenizer, rows)
        message = "holds no whole checkpoint.*without it" if automatic else "checkpoint-9'` is no folder.*newest"
        with pytest.raises(CheckpointError, match=message):
            trainer.train(resume_from_checkpoint=automatic or str(tmp_path / "out" / "checkpoint-9"))

    def test_a_damaged_newest_is_passed_over(self, output_dir, tokenizer, rows):
        expected = self.build(output_dir.parent / "whole", tokenizer, rows)
        expected.train()
        for name in ("checkpoint-3", "checkpoint-4"):
            (path,) = (output_dir / name).glob("*/server.safetensors")
            path.write_bytes(path.read_bytes()[:-10])
        trainer = self.build(output_dir, tokenizer, rows)
        trainer.train(resume_from_checkpoint=True)
        assert trainer.state.global_step == 4
        for key, tensor in expected.shared_state_dict().items():
            assert torch.equal(tensor, trainer.shared_state_dict()[key])

    def test_all_damaged_is_an_error_and_nothing_starts_anew(self, output_dir, tokenizer, rows):
        for folder in output_dir.glob("checkpoint-*"):
            if folder.name != "checkpoint-4":
                shutil.rmtree(folder)
        (path,) = (output_dir / "checkpoint-4").glob("*/server.safetensors")
        path.write_bytes(path.read_bytes()[:-10])
        trainer = self.build(output_dir, tokenizer, rows)
        before = digests(output_dir)
        with pytest.raises(CheckpointError, match="holds no whole checkpoint.*Call `train\\(\\)` without it"):
            trainer.train(resume_from_checkpoint=True)
        assert digests(output_dir) == before


class TestPeftModel:
    def build(self, tmp_path, tokenizer, rows, model):
        return FederatedTrainer(
            model=model, args=make_args(tmp_path / "out"), train_dataset=rows, processing_class=tokenizer
        )

    def test_one_whose_base_was_changed_by_its_initialisation(self, tmp_path, tokenizer, rows):
        model = get_peft_model(make_model(), LoraConfig(init_lora_weights="pissa", target_modules=["q_proj"]))
        with pytest.raises(ValueError, match="`init_lora_weights='pissa'`.*changed the base.*Pass the base model"):
            self.build(tmp_path, tokenizer, rows, model)

    def test_one_that_is_frozen(self, tmp_path, tokenizer, rows):
        model = get_peft_model(make_model(), LoraConfig(target_modules=["q_proj"]))
        model.requires_grad_(False)
        with pytest.raises(ValueError, match="no trainable parameter.*is_trainable=True"):
            self.build(tmp_path, tokenizer, rows, model)

    def test_one_that_is_ready_to_train_is_taken(self, tmp_path, tokenizer, rows):
        model = get_peft_model(make_model(), LoraConfig(target_modules=["q_proj"]))
        assert self.build(tmp_path, tokenizer, rows, model).client_ids == ["client_0", "client_1"]


def test_splits_in_place_of_clients(refuses):
    refuses(
        ValueError,
        "`train_dataset` has the keys train, test",
        "splits",
        "Pass a split",
        train_dataset={"train": make_rows(4, seed=0), "test": make_rows(4, seed=1)},
    )


def test_eval_clients_without_rows_are_left_out(tmp_path, tokenizer, rows):
    empty = make_rows(1, seed=2).select([])
    trainer = FederatedTrainer(
        model=make_model(),
        args=make_args(tmp_path / "out"),
        train_dataset=rows,
        eval_dataset={"client_0": make_rows(2, seed=3), "client_1": empty},
        processing_class=tokenizer,
        peft_config=make_lora(),
    )
    assert list(trainer.eval_dataset) == ["client_0"]
