"""Every argument of `SFTTrainer` works in its place, per client and per round."""

import copy
import inspect
import json
import math
import sys

import inside
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import make_args, make_lora, make_model, make_rows, max_difference
from datasets import Dataset, DatasetDict
from peft import LoraConfig, TaskType, get_peft_model, get_peft_model_state_dict
from transformers import (
    DataCollatorWithPadding,
    EarlyStoppingCallback,
    LlamaConfig,
    LlamaForSequenceClassification,
    Trainer,
    TrainerCallback,
    default_data_collator,
)
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from hf_fedsa import FederatedCallback, FederatedConfig, FederatedMixin, FederatedTrainer
from hf_fedsa.server.aggregation import WeightedMean
from hf_fedsa.tensors import tensors_sha256

TRAINER_ARGUMENTS = inspect.signature(FederatedTrainer.__init__).parameters.keys()


@pytest.fixture
def make_trainer(tmp_path, tokenizer):
    """Builds a trainer; keywords that are no argument of the trainer go to its config."""

    def make(train_dataset, trainer_class=FederatedTrainer, **kwargs):
        own = {name: kwargs.pop(name) for name in list(kwargs) if name in TRAINER_ARGUMENTS}
        values = {
            "args": make_args(tmp_path / "out", **kwargs),
            "processing_class": tokenizer,
            "peft_config": None if own.get("peft_config", True) is None else make_lora(),
        }
        own.setdefault("model", make_model())
        return trainer_class(**{**values, "train_dataset": train_dataset, **own})

    return make


@pytest.fixture
def make_trained(make_trainer):
    def make(*args, **kwargs):
        trainer = make_trainer(*args, **kwargs)
        trainer.train()
        return trainer

    return make


@pytest.fixture
def three(clients):
    return {client_id: clients[client_id] for client_id in ("client_0", "client_1", "client_2")}


@pytest.fixture
def unequal():
    """Clients with 8, 5 and 2 rows: 4, 3 and 1 steps of 2 rows in a pass."""
    return {f"client_{i}": make_rows(num_rows, seed=i) for i, num_rows in enumerate((8, 5, 2))}


def weights_of(trainer) -> dict[str, torch.Tensor]:
    """All that was trained: the shared tensors and every client's own."""
    tensors = {f"shared|{key}": tensor for key, tensor in trainer.shared_state_dict().items()}
    for client_id in trainer.client_ids:
        tensors |= {f"{client_id}|{key}": t for key, t in trainer.client_state_dict(client_id).items()}
    return tensors


def alternate(round_index, num_rows, clients_per_round):
    """A sampler that takes the clients in turn."""
    names = sorted(num_rows)
    return [names[(round_index * clients_per_round + i) % len(names)] for i in range(clients_per_round)]


def logged(trainer, key: str) -> list[float]:
    return [line[key] for line in trainer.state.log_history if key in line]


def has_trained(trainer, client_id: str) -> bool:
    """Whether the client's B, which starts at zero, has moved."""
    return all(float(tensor.abs().max()) > 0 for tensor in trainer.client_state_dict(client_id).values())


class Recorder:
    """Mixin that keeps the input ids and labels of every training batch, with the global step."""

    def __init__(self, *args, **kwargs):
        self.seen: list[tuple[int, torch.Tensor, torch.Tensor]] = []
        super().__init__(*args, **kwargs)

    def training_step(self, model, inputs, num_items_in_batch=None):
        if len(inputs["input_ids"]):
            self.seen.append((self.state.global_step, inputs["input_ids"].clone(), inputs["labels"].clone()))
        return super().training_step(model, inputs, num_items_in_batch)


class RecordingTrainer(Recorder, FederatedTrainer):
    pass


class Recording(FederatedCallback):
    """Calls `functions[event](trainer, **kwargs)` and keeps the names of the events."""

    def __init__(self, **functions):
        self.functions = functions
        self.trainer = None
        self.events: list[str] = []

    def _handle(self, event, args, state, control, **kwargs):
        self.events.append(event)
        if event in self.functions:
            self.functions[event](self.trainer, control=control, state=state, **kwargs)

    def on_epoch_begin(self, *args, **kwargs):
        self._handle("on_epoch_begin", *args, **kwargs)

    def on_epoch_end(self, *args, **kwargs):
        self._handle("on_epoch_end", *args, **kwargs)

    def on_step_begin(self, *args, **kwargs):
        self._handle("on_step_begin", *args, **kwargs)

    def on_substep_end(self, *args, **kwargs):
        self._handle("on_substep_end", *args, **kwargs)

    def on_step_end(self, *args, **kwargs):
        self._handle("on_step_end", *args, **kwargs)

    def on_pre_optimizer_step(self, *args, **kwargs):
        self._handle("on_pre_optimizer_step", *args, **kwargs)

    def on_round_begin(self, args, state, control, round_index, client_ids, **kwargs):
        kwargs.pop("trainer")
        self._handle("on_round_begin", args, state, control, round_index=round_index, client_ids=client_ids, **kwargs)

    def on_round_end(self, args, state, control, metrics, **kwargs):
        kwargs.pop("trainer")
        self._handle("on_round_end", args, state, control, metrics=metrics, **kwargs)


def watch(trainer, **functions) -> Recording:
    callback = Recording(**functions)
    callback.trainer = trainer
    trainer.add_callback(callback)
    return callback


# Rows that carry their client and number in every token, so that a recorded batch says whose rows it holds.

TAGGED_VOCABULARY = 100


def tag(client: int, row: int) -> int:
    return 10 * (client + 1) + row


def tagged_rows(client: int, num_rows: int) -> Dataset:
    ids = [[tag(client, row)] * 5 for row in range(num_rows)]
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


def rows_seen(trainer) -> dict[int, list[list[tuple[int, int]]]]:
    """Per global step, its micro-batches as lists of `(client, row)`."""
    steps: dict[int, list[list[tuple[int, int]]]] = {}
    for step, input_ids, _ in trainer.seen:
        batch = [(int(first) // 10 - 1, int(first) % 10) for first in input_ids[:, 0]]
        steps.setdefault(step, []).append(batch)
    return steps


def rows_of_client(trainer, client: int) -> list[list[int]]:
    """The rows of one client, step after step."""
    per_step = [
        [row for batch in batches for owner, row in batch if owner == client]
        for _, batches in sorted(rows_seen(trainer).items())
    ]
    return [rows for rows in per_step if rows]


# Formats of the data


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


PAIRS = [("the cat", "sat on the mat"), ("a dog", "ran"), ("one two", "three four five"), ("red bird", "flew over")]


def language_modeling(pairs) -> dict[str, list]:
    return {"text": [f"{prompt} {completion}" for prompt, completion in pairs]}


def prompt_completion(pairs) -> dict[str, list]:
    return {"prompt": [prompt for prompt, _ in pairs], "completion": [f" {completion}" for _, completion in pairs]}


def conversations(pairs) -> dict[str, list]:
    return {"messages": [[user(prompt), assistant(completion)] for prompt, completion in pairs]}


def conversational_prompt_completion(pairs) -> dict[str, list]:
    return {"prompt": [[user(p)] for p, _ in pairs], "completion": [[assistant(c)] for _, c in pairs]}


def tokenized(pairs) -> dict[str, list]:
    return {"input_ids": [[3 + i, 4, 5, 6] for i in range(len(pairs))]}


def tokenized_with_labels(pairs) -> dict[str, list]:
    return {**tokenized(pairs), "labels": [[-100, -100, 5, 6] for _ in pairs]}


FORMATS = [
    language_modeling,
    prompt_completion,
    conversations,
    conversational_prompt_completion,
    tokenized,
    tokenized_with_labels,
]


def two_clients(make_rows_of) -> dict[str, Dataset]:
    return {
        "client_0": Dataset.from_dict(make_rows_of(PAIRS)),
        "client_1": Dataset.from_dict(make_rows_of(PAIRS[::-1][:3])),
    }


class TestFormats:
    @pytest.mark.parametrize("make_rows_of", FORMATS, ids=lambda function: function.__name__)
    def test_every_format_of_sft_trains_and_evaluates(self, make_trained, make_rows_of):
        data = two_clients(make_rows_of)
        trainer = make_trained(data, eval_dataset=data, num_rounds=1, local_steps=2)
        assert inside.num_rows(trainer) == {"client_0": 4, "client_1": 3}
        assert has_trained(trainer, "client_0") and has_trained(trainer, "client_1")
        metrics = trainer.evaluate()
        assert metrics["eval_loss"] == pytest.approx(
            (metrics["eval_client_0_loss"] + metrics["eval_client_1_loss"]) / 2
        )

    def test_formatting_func_makes_the_text_of_every_client(self, make_trained, tokenizer):
        data = {"client_0": Dataset.from_dict({"q": ["one two"] * 2}), "client_1": Dataset.from_dict({"q": ["six"]})}
        trainer = make_trained(
            data,
            RecordingTrainer,
            formatting_func=lambda row: f"user : {row['q']}",
            num_rounds=1,
            local_steps=1,
        )
        (_, input_ids, _) = trainer.seen[0]
        texts = sorted(tokenizer.batch_decode(input_ids, skip_special_tokens=True))
        assert texts == ["user : one two", "user : one two", "user : six"]

    def test_formatting_func_also_applies_to_rows_passed_to_evaluate(self, make_trainer):
        data = {"client_0": Dataset.from_dict({"q": ["one two"]}), "client_1": Dataset.from_dict({"q": ["six"]})}
        trainer = make_trainer(data, eval_dataset=data, formatting_func=lambda row: f"user : {row['q']}")
        metrics = trainer.evaluate()
        again = trainer.evaluate({"client_1": data["client_1"]})
        assert again["eval_client_1_loss"] == pytest.approx(metrics["eval_client_1_loss"], abs=1e-6)
        assert "eval_client_0_loss" not in again

    def test_only_completions_are_labelled_in_prompt_completion_rows(self, make_trained, tokenizer):
        trainer = make_trained(two_clients(prompt_completion), RecordingTrainer, num_rounds=1, local_steps=2)
        labelled = set()
        for _, input_ids, labels in trainer.seen:
            kept = labels != -100
            assert torch.equal(labels[kept], input_ids[kept])
            for ids, mask in zip(input_ids, kept, strict=True):
                prompt = tokenizer.decode(ids[: int(mask.nonzero()[0])])
                labelled.add((prompt, tokenizer.decode(ids[mask])))
        assert labelled == {(prompt, f"{completion} <eos>") for prompt, completion in PAIRS}

    def test_whole_rows_are_labelled_if_completion_only_loss_is_off(self, make_trained):
        trainer = make_trained(
            two_clients(prompt_completion), RecordingTrainer, completion_only_loss=False, num_rounds=1, local_steps=2
        )
        for _, input_ids, labels in trainer.seen:
            assert torch.equal(labels != -100, input_ids != 0)

    def test_text_is_labelled_up_to_its_padding(self, make_trained):
        trainer = make_trained(two_clients(language_modeling), RecordingTrainer, num_rounds=1, local_steps=2)
        assert any((input_ids == 0).any() for _, input_ids, _ in trainer.seen)
        for _, input_ids, labels in trainer.seen:
            assert torch.equal(labels, torch.where(input_ids == 0, -100, input_ids))

    def test_own_labels_are_used_as_they_are(self, make_trained):
        trainer = make_trained(two_clients(tokenized_with_labels), RecordingTrainer, num_rounds=1, local_steps=2)
        for _, _, labels in trainer.seen:
            assert all(row == [-100, -100, 5, 6] for row in labels.tolist())

    def test_max_length_cuts_the_rows_of_every_client(self, make_trained, three):
        trainer = make_trained(three, RecordingTrainer, max_length=4, num_rounds=1, local_steps=2)
        assert max(input_ids.shape[1] for _, input_ids, _ in trainer.seen) == 4


def as_dict(data):
    return data


def as_dataset_dict(data):
    return DatasetDict(data)


def as_one_dataset(data, column="client_id"):
    """One dataset with a column, the clients' rows interleaved."""
    rows = [(client_id, text) for client_id, part in data.items() for text in part["text"]]
    rows = rows[::2] + rows[1::2]
    return Dataset.from_dict({"text": [text for _, text in rows], column: [client_id for client_id, _ in rows]})


class TestFormsOfTheDataset:
    @pytest.mark.parametrize("form", [as_dataset_dict, as_one_dataset], ids=lambda function: function.__name__)
    def test_every_form_gives_the_clients_the_same_rows(self, make_trainer, unequal, form):
        expected = make_trainer(unequal, eval_dataset=unequal)
        trainer = make_trainer(form(unequal), eval_dataset=form(unequal))
        assert trainer.client_ids == ["client_0", "client_1", "client_2"]
        assert "client_id" not in trainer.train_dataset.column_names
        for client_id in trainer.client_ids:
            rows, expected_rows = (
                t.train_dataset.select(inside.rows_of(t, client_id))["input_ids"] for t in (trainer, expected)
            )
            assert sorted(rows) == sorted(expected_rows)
            assert sorted(trainer.eval_dataset[client_id]["input_ids"]) == sorted(expected_rows)

    @pytest.mark.parametrize("form", [as_dict, as_dataset_dict, as_one_dataset], ids=lambda f: f.__name__)
    def test_every_form_trains(self, make_trained, unequal, form):
        trainer = make_trained(form(unequal), eval_dataset=form(unequal), eval_strategy="epoch", num_rounds=1)
        assert all(has_trained(trainer, client_id) for client_id in unequal)
        assert len(logged(trainer, "eval_client_2_loss")) == 1

    @pytest.mark.parametrize("form", [as_dict, as_one_dataset], ids=lambda form: form.__name__)
    def test_a_transform_is_applied_to_the_rows_of_one_client_at_a_time(self, make_trained, unequal, tokenizer, form):
        def tokenize(batch):
            seen.append(batch)
            ids = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in batch["text"]]
            return {"input_ids": ids, "labels": ids}

        seen = []
        raw = {"dataset_kwargs": {"skip_prepare_dataset": True}, "remove_unused_columns": False}
        settings = {"num_rounds": 1, "train_sampling_strategy": "sequential", "optim": "sgd", "learning_rate": 0.1}
        data = form(unequal)
        if isinstance(data, dict):
            data = {client_id: rows.with_transform(tokenize) for client_id, rows in data.items()}
        else:
            data = data.with_transform(tokenize)
        trainer = make_trained(data, eval_dataset=data, **raw, **settings)
        plain = make_trained(form(unequal), eval_dataset=form(unequal), **settings)
        assert max_difference(weights_of(trainer), weights_of(plain)) < 1e-6
        losses = [t.evaluate()["eval_client_2_loss"] for t in (trainer, plain)]
        assert losses[0] == pytest.approx(losses[1], abs=1e-6)
        owner = {text: client_id for client_id, rows in unequal.items() for text in rows["text"]}
        assert len(seen) > 9 and all(len({owner[text] for text in batch["text"]}) == 1 for batch in seen)
        if form is as_dict:
            assert all(batch.keys() == {"text"} for batch in seen)

    def test_the_client_column_can_be_renamed(self, make_trained, unequal):
        data = as_one_dataset(unequal, column="hospital")
        trainer = make_trained(data, eval_dataset=data, client_column="hospital", num_rounds=1)
        assert trainer.client_ids == ["client_0", "client_1", "client_2"]
        assert all(has_trained(trainer, client_id) for client_id in unequal)
        assert set(trainer.eval_dataset) == set(unequal)

    def test_dictionaries_work_beside_a_renamed_client_column(self, make_trainer, unequal):
        trainer = make_trainer(unequal, client_column="hospital")
        assert trainer.client_ids == ["client_0", "client_1", "client_2"]

    def test_a_plain_dataset_is_one_client(self, make_trained, clients):
        trainer = make_trained(clients["client_0"], eval_dataset=clients["client_1"], num_rounds=1, local_steps=None)
        assert trainer.client_ids == ["client_0"]
        assert trainer.state.global_step == 4
        assert has_trained(trainer, "client_0")
        assert set(trainer.evaluate()) >= {"eval_loss"}

    def test_a_plain_dataset_can_take_local_steps(self, make_trained, clients):
        trainer = make_trained(clients["client_0"], num_rounds=2, local_steps=3)
        assert trainer.state.global_step == 6
        assert [entry["clients"] for entry in trainer.round_history] == [["client_0"]] * 2

    def test_a_dictionary_of_one_client_keeps_its_name(self, make_trained, clients):
        trainer = make_trained({"alone": clients["client_0"]}, eval_dataset={"alone": clients["client_0"]})
        assert trainer.client_ids == ["alone"]
        assert "eval_alone_loss" in trainer.evaluate()


# Rows and steps


class TestRowsAndSteps:
    @pytest.fixture
    def tagged(self):
        return {f"client_{i}": tagged_rows(i, 6) for i in range(3)}

    @pytest.mark.parametrize("parallel", [1, 2, 3])
    def test_batch_size_and_accumulation_are_per_client(self, make_trained, tagged, parallel):
        trainer = make_trained(
            tagged,
            RecordingTrainer,
            model=make_model(vocab_size=TAGGED_VOCABULARY),
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            local_steps=1,
            num_rounds=1,
            parallel_clients=parallel,
        )
        for batches in rows_seen(trainer).values():
            training = {owner for owner, _ in batches[0]}
            assert len(batches) == 2
            for batch in batches:
                assert [[owner for owner, _ in batch].count(client) for client in training] == [2] * len(training)
        for client in range(3):
            (rows,) = rows_of_client(trainer, client)
            assert len(set(rows)) == 4

    def test_parallel_clients_train_in_one_batch(self, make_trained, tagged):
        trainer = make_trained(
            tagged, RecordingTrainer, model=make_model(vocab_size=TAGGED_VOCABULARY), num_rounds=1, local_steps=2
        )
        for batches in rows_seen(trainer).values():
            assert [owner for owner, _ in batches[0]] == [0, 0, 1, 1, 2, 2]

    def test_which_rows_a_client_trains_on_does_not_depend_on_its_neighbours(self, make_trained, tagged):
        settings = {"local_steps": 4, "num_rounds": 2}
        runs = [
            make_trained(
                data,
                RecordingTrainer,
                model=make_model(vocab_size=TAGGED_VOCABULARY),
                parallel_clients=parallel,
                **settings,
            )
            for data, parallel in ((tagged, 3), (tagged, 1), (dict(list(tagged.items())[:2]), 2))
        ]
        for client in (0, 1):
            first = rows_of_client(runs[0], client)
            assert len(first) == 8
            assert all(rows_of_client(run, client) == first for run in runs[1:])

    def test_local_steps_cycles_through_the_rows_and_shuffles_each_pass(self, make_trained, tagged):
        trainer = make_trained(
            tagged,
            RecordingTrainer,
            model=make_model(vocab_size=TAGGED_VOCABULARY),
            local_steps=9,
            num_rounds=1,
        )
        orders = set()
        for client in range(3):
            rows = [row for step in rows_of_client(trainer, client) for row in step]
            passes = [rows[:6], rows[6:12], rows[12:]]
            assert all(sorted(order) == list(range(6)) for order in passes)
            orders |= {tuple(order) for order in passes}
        assert len(orders) > 6

    def test_a_pass_ends_with_its_smaller_batch(self, make_trained):
        trainer = make_trained(
            {"client_0": tagged_rows(0, 5), "client_1": tagged_rows(1, 3)},
            RecordingTrainer,
            model=make_model(vocab_size=TAGGED_VOCABULARY),
            local_steps=4,
            num_rounds=1,
        )
        assert [len(rows) for rows in rows_of_client(trainer, 0)] == [2, 2, 1, 2]
        assert [len(rows) for rows in rows_of_client(trainer, 1)] == [2, 1, 2, 1]

    def test_dataloader_drop_last_leaves_that_batch_out(self, make_trained):
        trainer = make_trained(
            {"client_0": tagged_rows(0, 5), "client_1": tagged_rows(1, 3)},
            RecordingTrainer,
            model=make_model(vocab_size=TAGGED_VOCABULARY),
            local_steps=None,
            local_epochs=1,
            num_rounds=1,
            dataloader_drop_last=True,
        )
        assert [len(rows) for rows in rows_of_client(trainer, 0)] == [2, 2]
        assert [len(rows) for rows in rows_of_client(trainer, 1)] == [2]

    def test_sequential_sampling_keeps_the_order(self, make_trained, tagged):
        trainer = make_trained(
            tagged,
            RecordingTrainer,
            model=make_model(vocab_size=TAGGED_VOCABULARY),
            train_sampling_strategy="sequential",
            num_rounds=1,
        )
        assert all(rows_of_client(trainer, client) == [[0, 1], [2, 3], [4, 5]] for client in range(3))

    def test_group_by_length_saves_padding_and_starts_with_the_longest_row(self, make_trained):
        generator = np.random.default_rng(0)
        lengths = generator.permutation(np.repeat(np.arange(2, 33), 2))
        data = {
            f"client_{i}": Dataset.from_dict({"input_ids": [[3 + i] * int(length) for length in lengths[i::2]]})
            for i in range(2)
        }
        padding = {}
        for strategy in ("random", "group_by_length"):
            trainer = make_trained(
                data,
                RecordingTrainer,
                parallel_clients=1,
                local_steps=None,
                local_epochs=1,
                num_rounds=1,
                train_sampling_strategy=strategy,
            )
            padding[strategy] = sum(int((input_ids == 0).sum()) for _, input_ids, _ in trainer.seen)
        first = {}
        for _, input_ids, _ in trainer.seen:
            first.setdefault(int(input_ids[0, 0]), int((input_ids[0] != 0).sum()))
        assert first == {3: max(lengths[::2]), 4: max(lengths[1::2])}
        assert padding["group_by_length"] < 0.75 * padding["random"]

    def test_a_collator_that_joins_rows_is_refused_side_by_side(self, make_trained, three):
        collator = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
        with pytest.raises(ValueError, match="data collator made a batch of 6 rows into tensors of 1 .`input_ids`"):
            make_trained(three, data_collator=collator, parallel_clients=3)

    @pytest.mark.parametrize("values", [["long"] * 8, [None] * 8, [None, *range(7)], [[1]] * 8, [True] * 8])
    def test_a_column_that_happens_to_be_called_length_is_no_length(self, make_trained, values):
        data = {f"client_{i}": make_rows(8, seed=i) for i in range(2)}
        plain = make_trained(data, RecordingTrainer, num_rounds=1)
        named = make_trained(
            {c: rows.add_column("length", values) for c, rows in data.items()}, RecordingTrainer, num_rounds=1
        )
        assert [ids.tolist() for _, ids, _ in named.seen] == [ids.tolist() for _, ids, _ in plain.seen]

    def test_clients_side_by_side_have_rows_of_like_length(self, make_trained):
        """Also in later passes, which clients begin at different steps, and after a last batch that is not full."""
        data = {
            f"client_{i}": Dataset.from_dict({"input_ids": [[3] * int(n) for n in np.linspace(2, 32, num_rows)]})
            for i, num_rows in enumerate((31, 47, 61))
        }
        tokens = {}
        for parallel in (1, 3):
            trainer = make_trained(data, RecordingTrainer, num_rounds=1, local_steps=60, parallel_clients=parallel)
            tokens[parallel] = sum(input_ids.numel() for _, input_ids, _ in trainer.seen)
        assert tokens[3] < 1.08 * tokens[1], tokens[3] / tokens[1]

    def test_another_data_seed_shuffles_otherwise(self, make_trained, tagged):
        first, second, same = (
            make_trained(
                tagged,
                RecordingTrainer,
                model=make_model(vocab_size=TAGGED_VOCABULARY),
                num_rounds=1,
                data_seed=data_seed,
            )
            for data_seed in (1, 2, 1)
        )
        assert rows_seen(first) == rows_seen(same) != rows_seen(second)

    @pytest.mark.parametrize("parallel", [1, 3])
    def test_local_epochs_gives_every_client_its_own_number_of_steps(self, make_trained, parallel):
        trainer = make_trained(
            {f"client_{i}": tagged_rows(i, num_rows) for i, num_rows in enumerate((8, 5, 2))},
            RecordingTrainer,
            model=make_model(vocab_size=TAGGED_VOCABULARY),
            local_steps=None,
            local_epochs=2,
            num_rounds=2,
            parallel_clients=parallel,
        )
        for client, num_rows, num_steps in ((0, 8, 8), (1, 5, 6), (2, 2, 2)):
            steps = rows_of_client(trainer, client)
            assert len(steps) == 2 * num_steps
            rows = [row for step in steps for row in step]
            assert sorted(rows[:num_rows]) == sorted(rows[-num_rows:]) == list(range(num_rows))
        assert trainer.state.global_step == 2 * (8 if parallel == 3 else 16)

    def test_a_finished_client_stays_as_it_is_while_others_go_on(self, make_trainer, unequal):
        trainer = make_trainer(
            unequal,
            local_steps=None,
            local_epochs=1,
            num_rounds=1,
            parallel_clients=3,
            weight_decay=0.5,
            learning_rate=1e-3,
        )
        after: list[dict[str, dict]] = []

        def take(trainer, **kwargs):
            training = inside.clients_in_slots(trainer).items()
            after.append({client_id: inside.slot_tensors(trainer, slot) for client_id, slot in training})

        watch(trainer, on_step_begin=take)
        trainer.train()
        # Taken before steps 0 to 3, of which the clients take 4, 3 and 1.
        assert len(after) == 4
        for step in (1, 2, 3):
            for client_id, num_steps in (("client_0", 4), ("client_1", 3), ("client_2", 1)):
                moved = max_difference(after[step - 1][client_id], after[step][client_id])
                assert (moved > 0) == (step <= num_steps)
        for client_id in unequal:
            returned = {k: after[-1][client_id][k] for k in trainer.client_state_dict(client_id)}
            same = max_difference(returned, trainer.client_state_dict(client_id)) == 0
            assert same == (client_id != "client_0")

    @pytest.mark.parametrize("weighting", ["examples", "uniform"])
    def test_unequal_clients_train_alike_in_parallel_and_one_by_one(self, make_trained, unequal, weighting):
        one, three = (
            make_trained(
                unequal,
                local_steps=None,
                local_epochs=1,
                gradient_accumulation_steps=2,
                learning_rate=1e-3,
                parallel_clients=parallel,
                aggregation_weighting=weighting,
            )
            for parallel in (1, 3)
        )
        assert max_difference(weights_of(one), weights_of(three)) < 1e-5
        for entry, other in zip(one.round_history, three.round_history, strict=True):
            assert entry["losses"] == pytest.approx(other["losses"], abs=1e-4)
            assert entry["weights"] == other["weights"]

    def test_rounds_of_different_lengths_each_take_their_own_steps(self, make_trained, unequal):
        trainer = make_trained(
            unequal, local_steps=None, local_epochs=1, num_rounds=6, clients_per_round=1, learning_rate=1e-3
        )
        steps = {"client_0": 4, "client_1": 3, "client_2": 1}
        sampled = [entry["clients"][0] for entry in trainer.round_history]
        assert len(set(sampled)) > 1
        ends = np.cumsum([steps[client_id] for client_id in sampled]).tolist()
        assert [entry["step"] for entry in trainer.round_history] == ends
        assert trainer.state.global_step == ends[-1]

    def test_clients_that_are_not_sampled_do_not_change(self, make_trainer, clients):
        trainer = make_trainer(clients, clients_per_round=2, num_rounds=3)
        before: dict[str, dict] = {}

        def remember(trainer, **kwargs):
            before.update({client_id: trainer.client_state_dict(client_id) for client_id in clients})

        def compare(trainer, metrics, **kwargs):
            for client_id in clients:
                moved = max_difference(before[client_id], trainer.client_state_dict(client_id)) > 0
                assert moved == (client_id in metrics["clients"])

        callback = watch(trainer, on_round_begin=remember, on_round_end=compare)
        trainer.train()
        assert callback.events.count("on_round_end") == 3

    def test_dataloader_workers_load_the_same_rows(self, make_trained, three):
        first, second = (make_trained(three, num_rounds=2, dataloader_num_workers=workers) for workers in (0, 1))
        assert max_difference(weights_of(first), weights_of(second)) == 0


# Aggregation


@pytest.fixture
def returned(monkeypatch):
    """What the clients return: `(tensors, weight)` of every call of `WeightedMean.add`."""
    calls = []
    add = WeightedMean.add

    def record(self, tensors, weight):
        calls.append(({key: tensor.clone() for key, tensor in tensors.items()}, weight))
        return add(self, tensors, weight)

    monkeypatch.setattr(WeightedMean, "add", record)
    return calls


class TestAggregation:
    @pytest.mark.parametrize(
        "settings, expected",
        [
            # 2 steps of 2 rows: 4 of 8 rows, 4 of 5, and both of 2, twice.
            ({"local_steps": 2}, [4.0, 4.0, 2.0]),
            # The third step of 5 rows is the odd one; the second pass adds no new row.
            ({"local_steps": 4}, [8.0, 5.0, 2.0]),
            ({"local_steps": 1, "gradient_accumulation_steps": 3}, [6.0, 5.0, 2.0]),
            ({"local_steps": None, "local_epochs": 2}, [8.0, 5.0, 2.0]),
            ({"local_steps": 2, "aggregation_weighting": "uniform"}, [1.0, 1.0, 1.0]),
        ],
        ids=["part of the rows", "all rows", "accumulation", "epochs", "uniform"],
    )
    @pytest.mark.parametrize("parallel", [1, 3])
    def test_weights_are_the_rows_used_or_uniform(self, make_trained, settings, expected, parallel):
        data = {f"client_{i}": tagged_rows(i, num_rows) for i, num_rows in enumerate((8, 5, 2))}
        trainer = make_trained(
            data,
            RecordingTrainer,
            model=make_model(vocab_size=TAGGED_VOCABULARY),
            num_rounds=1,
            parallel_clients=parallel,
            **settings,
        )
        assert trainer.round_history[0]["weights"] == dict(zip(data, expected, strict=True))
        if "aggregation_weighting" not in settings:
            used = [float(len({r for step in rows_of_client(trainer, client) for r in step})) for client in range(3)]
            assert used == expected

    @pytest.mark.parametrize("weighting", ["examples", "uniform"])
    @pytest.mark.parametrize("parallel", [1, 2, 3])
    def test_the_average_is_that_of_numpy(self, make_trainer, unequal, returned, weighting, parallel):
        trainer = make_trainer(
            unequal, local_steps=2, aggregation_weighting=weighting, parallel_clients=parallel, num_rounds=2
        )
        checked = []

        def check(trainer, metrics, **kwargs):
            assert sorted(weight for _, weight in returned) == sorted(metrics["weights"].values())
            shared = trainer.shared_state_dict()
            for key, tensor in shared.items():
                stacked = np.stack([tensors[key].double().numpy() for tensors, _ in returned])
                assert stacked.std(0).max() > 1e-4
                mean = np.average(stacked, axis=0, weights=[weight for _, weight in returned])
                np.testing.assert_allclose(tensor.numpy(), mean, atol=1e-6, rtol=0)
            checked.append(len(returned))
            returned.clear()

        watch(trainer, on_round_end=check)
        trainer.train()
        assert checked == [3, 3]

    def test_only_a_travels(self, make_trained, three, returned):
        make_trained(three, num_rounds=1)
        assert all(".lora_A." in key for tensors, _ in returned for key in tensors)
        assert len(returned[0][0]) == 14

    def test_bytes_are_those_of_a_for_every_client_of_the_round(self, make_trained, clients):
        trainer = make_trained(clients, num_rounds=2, clients_per_round=3, parallel_clients=2)
        one_client = sum(tensor.numel() * 4 for tensor in trainer.shared_state_dict().values())
        for entry in trainer.round_history:
            assert entry["bytes_down"] == entry["bytes_up"] == 3 * one_client


# Precision, memory, gradients


class TestPrecisionAndMemory:
    def test_bf16_computes_in_bf16_and_keeps_weights_in_fp32(self, make_trainer, three):
        trainer = make_trainer(three, bf16=True, num_rounds=1, learning_rate=1e-3)
        dtypes = set()
        layer = trainer.model.base_model.model.model.layers[0].self_attn.q_proj.base_layer
        layer.register_forward_hook(lambda module, inputs, output: dtypes.add(output.dtype))
        trainer.train()
        assert dtypes == {torch.bfloat16}
        assert {p.dtype for p in inside.slot_parameters(trainer, 0).values()} == {torch.float32}
        assert all(math.isfinite(loss) for loss in trainer.round_history[0]["losses"].values())

    def test_bf16_trains_alike_in_parallel_and_one_by_one(self, make_trained, three):
        one, parallel = (
            make_trained(three, bf16=True, num_rounds=1, optim="sgd", learning_rate=0.1, parallel_clients=m)
            for m in (1, 3)
        )
        exact = make_trained(three, num_rounds=1, optim="sgd", learning_rate=0.1)
        scale = max(float(t.abs().max()) for t in exact.client_state_dict("client_0").values())
        for client_id in three:
            states = [t.client_state_dict(client_id) for t in (one, parallel, exact)]
            assert 0 < max_difference(states[1], states[2]) < 0.1 * scale
            assert max_difference(states[0], states[1]) < 0.1 * scale

    @pytest.mark.parametrize("parallel", [1, 3])
    def test_gradient_checkpointing_gives_the_same_weights(self, make_trainer, three, parallel):
        results, calls = [], []
        for checkpointing in (False, True):
            trainer = make_trainer(
                three,
                gradient_checkpointing=checkpointing,
                parallel_clients=parallel,
                num_rounds=1,
                learning_rate=1e-3,
            )
            count = []
            layer = trainer.model.base_model.model.model.layers[0].self_attn.q_proj.base_layer
            layer.register_forward_hook(lambda *args, count=count: count.append(1))
            trainer.train()
            results.append(weights_of(trainer))
            calls.append(len(count))
        assert calls[1] == 2 * calls[0]
        assert max_difference(*results) < 1e-5

    def test_gradient_accumulation_is_one_larger_batch(self, make_trained):
        data = {f"client_{i}": make_rows(4, seed=i) for i in range(3)}
        settings = {"num_rounds": 2, "local_steps": 1, "learning_rate": 1e-3, "train_sampling_strategy": "sequential"}
        split, whole = (
            make_trained(data, per_device_train_batch_size=size, gradient_accumulation_steps=4 // size, **settings)
            for size in (1, 4)
        )
        assert max_difference(weights_of(split), weights_of(whole)) < 1e-5
        assert logged(split, "loss") == pytest.approx(logged(whole, "loss"), abs=1e-4)


class TestClipping:
    SETTINGS = {"optim": "sgd", "learning_rate": 1.0, "num_rounds": 1, "local_steps": 2, "parallel_clients": 3}

    def train(self, make_trainer, data, loud_slot=None, **kwargs):
        """Client states after a round in which one slot's gradients are a thousand times as large."""
        trainer = make_trainer(data, **{**self.SETTINGS, **kwargs})
        if loud_slot is not None:
            for parameter in inside.slot_parameters(trainer, loud_slot).values():
                parameter.register_hook(lambda gradient: gradient * 1000)
        trainer.train()
        return {client_id: trainer.client_state_dict(client_id) for client_id in data}

    @pytest.mark.parametrize("max_grad_norm", [0.01, 1.0])
    def test_huge_gradients_of_one_client_do_not_scale_its_neighbours(self, make_trainer, three, max_grad_norm):
        plain = self.train(make_trainer, three, max_grad_norm=max_grad_norm)
        loud = self.train(make_trainer, three, loud_slot=1, max_grad_norm=max_grad_norm)
        alone = self.train(make_trainer, three, max_grad_norm=max_grad_norm, parallel_clients=1)
        for client_id in ("client_0", "client_2"):
            assert max_difference(plain[client_id], loud[client_id]) == 0
            assert max_difference(plain[client_id], alone[client_id]) < 1e-5

    def test_max_grad_norm_bounds_the_gradient_of_every_client(self, make_trainer, three):
        trainer = make_trainer(three, max_grad_norm=0.01, **self.SETTINGS)
        norms = []

        def measure(trainer, **kwargs):
            for slot in range(inside.num_slots(trainer)):
                gradients = [p.grad for p in inside.slot_parameters(trainer, slot).values()]
                norms.append(float(torch.cat([g.flatten() for g in gradients]).norm()))

        watch(trainer, on_pre_optimizer_step=measure)
        trainer.train()
        assert norms == pytest.approx([0.01] * 6, rel=1e-3)
        assert min(logged(trainer, "grad_norm")) > 0.05

    def test_zero_turns_clipping_off(self, make_trainer, three):
        off = self.train(make_trainer, three, max_grad_norm=0)
        huge = self.train(make_trainer, three, max_grad_norm=1e9)
        tight = self.train(make_trainer, three, max_grad_norm=0.01)
        for client_id in three:
            assert max_difference(off[client_id], huge[client_id]) == 0
            assert max_difference(off[client_id], tight[client_id]) > 1e-3

    def test_zero_still_logs_the_mean_norm(self, make_trained, three):
        together = make_trained(three, max_grad_norm=0, **self.SETTINGS)
        one_by_one = make_trained(three, max_grad_norm=0, **{**self.SETTINGS, "parallel_clients": 1})
        norms = np.array(logged(one_by_one, "grad_norm")).reshape(3, 2)
        assert logged(together, "grad_norm") == pytest.approx(norms.mean(0), rel=1e-3)


# Optimizers and schedules


OPTIMIZERS = ["adamw_torch", "sgd", "adafactor", "adamw_torch_fused", "rmsprop", "adamw_8bit"]


class TestOptimizers:
    @pytest.mark.parametrize("reset", [True, False], ids=["reset", "kept"])
    @pytest.mark.parametrize("optim", OPTIMIZERS)
    def test_every_optimizer_trains_alike_in_parallel_and_one_by_one(self, make_trained, three, optim, reset):
        if optim == "adamw_8bit":
            pytest.importorskip("bitsandbytes")
        # Sums are taken in another order side by side, and these optimizers make full steps of what that changes in
        # gradients near zero: in fp64 there is next to nothing. That of bitsandbytes has no fp64, but an epsilon.
        settings = {"optim": optim, "reset_optimizer": reset, "learning_rate": 1e-3, "local_steps": 2}
        if optim == "adamw_8bit":
            settings["adam_epsilon"] = 1e-3
        dtype = torch.float32 if optim == "adamw_8bit" else torch.float64
        one, parallel = (
            make_trained(three, model=make_model().to(dtype), parallel_clients=m, **settings) for m in (1, 3)
        )
        assert all(has_trained(parallel, client_id) for client_id in three)
        assert max_difference(weights_of(one), weights_of(parallel)) < 1e-5

    def test_kept_state_differs_from_fresh_state(self, make_trained, three):
        fresh, kept, default = (
            make_trained(three, reset_optimizer=reset, local_steps=2, **fixed)
            for reset, fixed in ((True, {}), (False, {}), (None, {}))
        )
        assert max_difference(weights_of(fresh), weights_of(kept)) > 1e-3
        assert max_difference(weights_of(fresh), weights_of(default)) == 0

    def test_fresh_state_is_fresh_in_every_wave(self, make_trainer, three):
        """A client's first step of plain Adam is one learning rate long, whoever was in the slot before."""
        trainer = make_trainer(
            three, parallel_clients=1, local_steps=2, lr_scheduler_type="constant", max_grad_norm=0, weight_decay=0.0
        )
        before, jumps = {}, []

        def measure(trainer, **kwargs):
            if inside.wave_steps(trainer) == 0:
                before.update(inside.slot_tensors(trainer, 0, "local"))

        def measure_after(trainer, **kwargs):
            if inside.wave_is_open(trainer) and inside.wave_steps(trainer) == 1:
                jumps.append(max_difference(before, inside.slot_tensors(trainer, 0, "local")))

        watch(trainer, on_step_begin=measure, on_step_end=measure_after)
        trainer.train()
        assert jumps == pytest.approx([1e-2] * 6, rel=1e-2)

    @pytest.mark.parametrize("parallel", [1, 2])
    def test_kept_state_is_the_clients_own_whoever_trained_in_between(self, make_trainer, clients, parallel):
        trainer = make_trainer(
            clients, clients_per_round=2, num_rounds=4, local_steps=2, parallel_clients=parallel, reset_optimizer=False
        )
        left: dict[str, dict] = {}
        returning = []

        def key_of(trainer, client_id):
            state = inside.optimizer_state(trainer, client_id)
            return {name: tensor for name, tensor in state.items() if name.endswith("|exp_avg_sq")}

        def begin(trainer, **kwargs):
            if inside.wave_steps(trainer) == 0:
                for client_id in inside.clients_in_slots(trainer):
                    if client_id in left:
                        assert max_difference(left[client_id], key_of(trainer, client_id)) == 0
                        returning.append(client_id)
                    else:
                        assert key_of(trainer, client_id) == {}

        def end(trainer, **kwargs):
            for client_id, state in inside.kept_optimizer_states(trainer).items():
                left[client_id] = {name: t for name, t in state.items() if name.endswith("|exp_avg_sq")}

        watch(trainer, on_step_begin=begin, on_round_end=end)
        trainer.train()
        assert len(returning) >= 2

    def test_optimizer_cls_and_kwargs_is_used(self, make_trained, three):
        given = make_trained(three, optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": 0.1}), learning_rate=0.1)
        named = make_trained(three, optim="sgd", learning_rate=0.1)
        assert isinstance(given.optimizer.optimizer, torch.optim.SGD)
        assert max_difference(weights_of(given), weights_of(named)) < 1e-6

    def test_a_ready_optimizer_works_with_one_slot(self, make_trained, three):
        model = get_peft_model(make_model(), make_lora(task_type="CAUSAL_LM"))
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        trainer = make_trained(
            three, model=model, peft_config=None, optimizers=(optimizer, None), parallel_clients=1, num_rounds=1
        )
        assert all(has_trained(trainer, client_id) for client_id in three)

    def test_a_ready_optimizer_without_the_slots_is_refused(self, make_trainer, three):
        model = get_peft_model(make_model(), make_lora(task_type="CAUSAL_LM"))
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        trainer = make_trainer(three, model=model, peft_config=None, optimizers=(optimizer, None), parallel_clients=3)
        with pytest.raises(ValueError, match="does not hold the parameters of all slots.*`optimizer_cls_and_kwargs`"):
            trainer.train()


class Counting(torch.optim.Optimizer):
    """SGD that counts steps in its groups, as AdEMAMix and StableAdamW do, and takes ever smaller ones."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr, "k": 0, "weight_sum": 0.0})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["k"] += 1
            group["weight_sum"] += 1 / 3
            group["step"] = group.get("step", torch.zeros((), dtype=torch.int32))
            group["step"] += 1
            size = group["lr"] * 3 * group["weight_sum"] / (group["k"] * int(group["step"]))
            for p in (p for p in group["params"] if p.grad is not None):
                self.state[p]["seen"] = True
                p.sub_(p.grad, alpha=size)


class ScheduleFree(torch.optim.Optimizer):
    """SGD that trains at `y = 0.1 z + 0.9 x`, as `schedulefree` does, with the mean `x` to be used."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr, "k": 0, "train_mode": False})

    def _switch(self, train, weight):
        for group in self.param_groups:
            if group["train_mode"] != train:
                group["train_mode"] = train
                for p in (p for p in group["params"] if "z" in self.state[p]):
                    p.data.lerp_(self.state[p]["z"], weight)

    def train(self):
        self._switch(True, 0.1)

    def eval(self):
        self._switch(False, 1 - 1 / 0.9)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            assert group["train_mode"]
            group["k"] += 1
            for p in (p for p in group["params"] if p.grad is not None):
                z = self.state[p].setdefault("z", p.detach().clone())
                p.lerp_(z, 1 / group["k"]).sub_(p.grad, alpha=group["lr"] * (1 - 0.9 * (1 - 1 / group["k"])))
                z.sub_(p.grad, alpha=group["lr"])


class TestOptimizersThatCount:
    @pytest.mark.parametrize("reset", [True, False], ids=["reset", "kept"])
    def test_what_is_counted_in_groups_is_the_clients_own(self, make_trained, unequal, reset):
        one, parallel = (
            make_trained(
                unequal,
                optimizer_cls_and_kwargs=(Counting, {"lr": 0.3}),
                lr_scheduler_type="constant",
                local_steps=None,
                local_epochs=1,
                reset_optimizer=reset,
                parallel_clients=m,
            )
            for m in (1, 3)
        )
        assert max_difference(weights_of(one), weights_of(parallel)) < 1e-6
        for trainer in (one, parallel):
            for client_id, steps in zip(unequal, (8, 6, 2), strict=True) if not reset else ():
                kept = inside.kept_optimizer_states(trainer)[client_id]
                assert kept["group|0|number|k"].item() == steps
                assert kept["group|0|tensor|step"].item() == steps
                assert kept["group|0|number|weight_sum"].item() == sum([1 / 3] * steps)
        if reset:
            assert one.optimizer.optimizer.param_groups[0]["k"] == 1  # The last client takes one step.

    def test_idle_clients_are_not_counted_after_a_resume_either(self, make_trainer, unequal, tmp_path):
        def make():
            return make_trainer(
                unequal,
                optimizer_cls_and_kwargs=(Counting, {"lr": 0.3}),
                local_steps=None,
                local_epochs=1,
                reset_optimizer=False,
                parallel_clients=3,
                save_strategy="steps",
                save_steps=1,
            )

        whole, again = make(), make()
        whole.train()
        again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-6"))
        assert max_difference(weights_of(whole), weights_of(again)) == 0

    @pytest.mark.parametrize("optimizer", [Counting, ScheduleFree])
    def test_one_client_is_as_with_sft_trainer(self, make_trained, clients, tokenizer, tmp_path, optimizer):
        rows = clients["client_0"]
        common = {"optimizer_cls_and_kwargs": (optimizer, {"lr": 0.3})}
        federated = make_trained(rows, num_rounds=3, local_steps=4, learning_rate=0.3, **common)
        args = make_args(tmp_path / "plain", num_rounds=3, local_steps=None, learning_rate=0.3)
        plain = SFTTrainer(
            model=make_model(),
            args=args,
            train_dataset=rows,
            processing_class=tokenizer,
            peft_config=make_lora(),
            **common,
        )
        plain.train()
        if optimizer is ScheduleFree:
            plain.optimizer.eval()
        tensors = {**federated.shared_state_dict(), **federated.client_state_dict("client_0")}
        assert max_difference(tensors, get_peft_model_state_dict(plain.model)) < 1e-6

    @pytest.mark.parametrize("parallel", [1, 3])
    def test_mid_round_the_weights_to_be_used_are_served(self, make_trained, make_trainer, three, parallel):
        common = {
            "optimizer_cls_and_kwargs": (ScheduleFree, {"lr": 0.3}),
            "learning_rate": 0.3,
            "lr_scheduler_type": "constant",
            "parallel_clients": parallel,
            "num_rounds": 1,
            "local_steps": 2,
        }
        expected = make_trained(three, **common)
        trainer = make_trainer(three, eval_dataset={c: rows.select([0]) for c, rows in three.items()}, **common)
        served = []

        def serve(trainer, **kwargs):
            state = trainer.optimizer.optimizer.state
            used = {}
            for client_id, slot in inside.clients_in_slots(trainer).items():
                own = inside.slot_parameters(trainer, slot).items()
                used[client_id] = {k: p.detach().lerp(state[p].get("z", p.detach()), 1 - 1 / 0.9) for k, p in own}
            for client_id, tensors in used.items():
                with trainer.use_client(client_id):
                    trainer.optimizer.eval()  # As the evaluation loop does.
                    served.append(max_difference(tensors, inside.slot_tensors(trainer, 0)))
                local = trainer.client_state_dict(client_id)
                served.append(max_difference(local, {key: tensors[key] for key in local}))

        watch(trainer, on_pre_optimizer_step=serve, on_step_end=lambda trainer, **kwargs: trainer.evaluate())
        trainer.train()
        assert max(served) < 1e-6
        assert max_difference(weights_of(trainer), weights_of(expected)) == 0

    def test_a_second_copy_of_the_weights_is_not_kept(self, make_trainer, three):
        trainer = make_trainer(three, optimizer_cls_and_kwargs=(ScheduleFree, {"lr": 0.3}), reset_optimizer=False)
        with pytest.raises(ValueError, match="'ScheduleFree'.*second copy of the weights.*Set `reset_optimizer=True`"):
            trainer.train()

    @pytest.mark.parametrize(
        ("optim", "reset", "message"),
        [
            ("lomo", None, "within the backward pass"),
            ("apollo_adamw", None, "keeps seeds in its state"),
            ("grokadamw", None, "depends on a parameter's place among all"),
            ("galore_adamw_layerwise", None, "within the backward pass"),
            ("adamw_torch_8bit", False, "not made of plain tensors and numbers"),
            ("galore_adamw", False, "not made of plain tensors and numbers"),
            ("schedule_free_adamw", False, "second copy of the weights"),
        ],
    )
    def test_what_cannot_be_shared_is_refused_before_a_model_loads(self, make_trainer, three, optim, reset, message):
        with pytest.raises(ValueError, match=message):
            make_trainer(three, model="not/loaded", optim=optim, reset_optimizer=reset)


SCHEDULES = [
    {"lr_scheduler_type": "linear"},
    {"lr_scheduler_type": "cosine"},
    {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 2},
    {"lr_scheduler_type": "linear", "warmup_steps": 3},
]


class TestSchedules:
    @pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: "-".join(map(str, s.values())))
    def test_the_rate_follows_the_clients_own_steps(self, make_trained, three, schedule):
        settings = {"num_rounds": 2, "local_steps": 3, **schedule}
        one = make_trained(three, parallel_clients=1, **settings)
        parallel = make_trained(three, parallel_clients=3, **settings)
        rates = logged(parallel, "learning_rate")
        assert len(rates) == 6
        assert len(set(rates)) > 2
        assert logged(one, "learning_rate") == pytest.approx([*rates[:3] * 3, *rates[3:] * 3], rel=1e-9, abs=1e-12)

    def test_linear_decays_over_the_local_steps_of_all_rounds(self, make_trained, three):
        trainer = make_trained(three, parallel_clients=1, num_rounds=2, local_steps=2)
        rates = [1e-2 * (1 - step / 4) for step in range(4)]
        assert logged(trainer, "learning_rate") == pytest.approx([*rates[:2] * 3, *rates[2:] * 3])

    def test_warmup_counts_local_steps(self, make_trained, three):
        trainer = make_trained(
            three,
            parallel_clients=1,
            num_rounds=2,
            local_steps=2,
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=3,
        )
        rates = [0.0, 1e-2 / 3, 2e-2 / 3, 1e-2]
        assert logged(trainer, "learning_rate") == pytest.approx([*rates[:2] * 3, *rates[2:] * 3])

    def test_a_round_lasts_as_long_as_its_longest_client(self, make_trained, unequal):
        settings = {"local_steps": None, "local_epochs": 1, "num_rounds": 2}
        rates = [1e-2 * (1 - step / 8) for step in range(8)]
        one = make_trained(unequal, parallel_clients=1, **settings)
        # 4, 3 and 1 steps a round, the longest first.
        expected = [*rates[:4], *rates[:3], rates[0], *rates[4:], *rates[4:7], rates[4]]
        assert logged(one, "learning_rate") == pytest.approx(expected)
        assert logged(make_trained(unequal, **settings), "learning_rate") == pytest.approx(rates)

    @pytest.mark.parametrize("parallel", [1, 3])
    def test_reduce_lr_on_plateau_follows_the_evaluations(self, make_trained, unequal, parallel):
        trainer = make_trained(
            unequal,
            eval_dataset=unequal,
            eval_strategy="epoch",
            num_rounds=4,
            local_steps=None,
            local_epochs=1,
            parallel_clients=parallel,
            lr_scheduler_type="reduce_lr_on_plateau",
            # No improvement is large enough, so every evaluation after the first is on the plateau.
            lr_scheduler_kwargs={"factor": 0.1, "patience": 0, "threshold": 100.0, "threshold_mode": "abs"},
        )
        steps = 4 if parallel == 3 else 4 + 3 + 1
        expected = [rate for rate in (1e-2, 1e-2, 1e-3, 1e-4) for _ in range(steps)]
        assert logged(trainer, "learning_rate") == pytest.approx(expected)


# Evaluation, saving and logging


class TestStrategies:
    @pytest.mark.parametrize("parallel", [1, 3])
    def test_epoch_means_the_end_of_a_round(self, make_trained, three, tmp_path, parallel):
        trainer = make_trained(
            three,
            eval_dataset=three,
            eval_strategy="epoch",
            save_strategy="epoch",
            logging_strategy="epoch",
            parallel_clients=parallel,
        )
        per_round = 3 if parallel == 3 else 9
        ends = [per_round, 2 * per_round]
        assert [line["step"] for line in trainer.state.log_history if "eval_loss" in line] == ends
        assert [line["step"] for line in trainer.state.log_history if "loss" in line] == ends
        assert [line["step"] for line in trainer.state.log_history if "round" in line] == ends
        saved = sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*"))
        assert saved == sorted(f"checkpoint-{step}" for step in ends)

    def test_an_evaluation_at_a_round_end_uses_the_new_average(self, make_trained, three):
        trainer = make_trained(three, eval_dataset=three, eval_strategy="epoch")
        now = trainer.evaluate()
        last = [line for line in trainer.state.log_history if "eval_loss" in line][-2]
        for client_id in three:
            assert last[f"eval_{client_id}_loss"] == pytest.approx(now[f"eval_{client_id}_loss"], abs=1e-6)

    def test_steps_act_within_a_round(self, make_trained, three, tmp_path):
        trainer = make_trained(
            three,
            eval_dataset=three,
            eval_strategy="steps",
            eval_steps=2,
            save_strategy="steps",
            save_steps=2,
            logging_steps=2,
        )
        assert [line["step"] for line in trainer.state.log_history if "eval_loss" in line] == [2, 4, 6]
        assert [line["step"] for line in trainer.state.log_history if "loss" in line] == [2, 4, 6]
        assert {path.name for path in (tmp_path / "out").glob("checkpoint-*")} == {
            "checkpoint-2",
            "checkpoint-4",
            "checkpoint-6",
        }

    @pytest.mark.parametrize("parallel", [1, 2, 3])
    def test_evaluating_within_a_round_does_not_change_training(self, make_trained, three, parallel):
        settings = {"parallel_clients": parallel, "eval_dataset": three}
        plain = make_trained(three, **settings)
        evaluated = make_trained(three, eval_strategy="steps", eval_steps=1, **settings)
        assert len(logged(evaluated, "eval_loss")) == 6 * math.ceil(3 / parallel)
        assert max_difference(weights_of(plain), weights_of(evaluated)) == 0

    def test_save_total_limit_keeps_the_newest(self, make_trained, three, tmp_path):
        make_trained(three, save_strategy="epoch", save_total_limit=1, num_rounds=3, local_steps=1)
        assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-3"]

    def test_eval_on_start_evaluates_the_untrained_clients(self, make_trained, three):
        trainer = make_trained(three, eval_dataset=three, eval_strategy="epoch", eval_on_start=True, num_rounds=1)
        first = next(line for line in trainer.state.log_history if "eval_loss" in line)
        assert first["step"] == 0
        assert len(logged(trainer, "eval_loss")) == 2


def loss_by_hand(trainer, tokenizer, client_id: str, texts: list[str]) -> float:
    """Mean loss per token over a client's rows, one at a time, from the model that the client serves."""
    total, count = 0.0, 0
    with trainer.use_client(client_id) as model, torch.no_grad():
        model.eval()
        for text in texts:
            ids = torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id]])
            logits = model(input_ids=ids).logits[0, :-1]
            total += float(F.cross_entropy(logits, ids[0, 1:], reduction="sum"))
            count += ids.shape[1] - 1
    return total / count


class TestEvaluate:
    @pytest.fixture
    def trainer(self, make_trained, three, held_out):
        return make_trained(three, eval_dataset=held_out, per_device_eval_batch_size=16, learning_rate=5e-2)

    @pytest.fixture
    def held_out(self):
        return {f"client_{i}": make_rows(num_rows, seed=10 + i) for i, num_rows in enumerate((8, 4, 3))}

    def test_every_client_is_evaluated_on_its_rows_with_its_own_adapter(self, trainer, held_out, tokenizer):
        metrics = trainer.evaluate()
        for client_id, rows in held_out.items():
            by_hand = loss_by_hand(trainer, tokenizer, client_id, rows["text"])
            assert metrics[f"eval_{client_id}_loss"] == pytest.approx(by_hand, abs=1e-5)
        other = loss_by_hand(trainer, tokenizer, "client_1", held_out["client_0"]["text"])
        assert abs(metrics["eval_client_0_loss"] - other) > 1e-3

    def test_eval_loss_is_the_mean_over_clients(self, trainer, held_out):
        metrics = trainer.evaluate()
        assert metrics["eval_loss"] == pytest.approx(np.mean([metrics[f"eval_{c}_loss"] for c in held_out]))
        assert {"eval_runtime", "eval_samples_per_second"} <= metrics.keys()

    def test_metrics_of_trl_are_per_client_and_averaged(self, trainer, held_out, tokenizer):
        trainer.predict(trainer.eval_dataset["client_2"].select([0]))  # Keeps metrics that are no client's here.
        metrics = trainer.evaluate()
        for client_id, rows in held_out.items():
            right = []
            for text in rows["text"]:
                ids = torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id]])
                with trainer.use_client(client_id) as model, torch.no_grad():
                    right += (model(input_ids=ids).logits[0, :-1].argmax(-1) == ids[0, 1:]).tolist()
            assert metrics[f"eval_{client_id}_mean_token_accuracy"] == pytest.approx(np.mean(right), abs=1e-6)
        for name in ("mean_token_accuracy", "entropy"):
            values = [metrics[f"eval_{client_id}_{name}"] for client_id in held_out]
            assert len(set(values)) == 3 and metrics[f"eval_{name}"] == pytest.approx(np.mean(values))
            assert trainer.state.log_history[-1][f"eval_{name}"] == metrics[f"eval_{name}"]
        assert trainer.evaluate("client_1")["eval_entropy"] == metrics["eval_client_1_entropy"]
        assert trainer.evaluate(held_out, metric_key_prefix="test")["test_entropy"] == metrics["eval_entropy"]

    def test_a_client_id_evaluates_that_client_alone(self, trainer):
        everyone, one = trainer.evaluate(), trainer.evaluate("client_1")
        assert one["eval_client_1_loss"] == one["eval_loss"] == pytest.approx(everyone["eval_client_1_loss"])
        assert not {"eval_client_0_loss", "eval_client_2_loss"} & one.keys()

    @pytest.mark.parametrize("form", [as_dict, as_dataset_dict, as_one_dataset], ids=lambda f: f.__name__)
    def test_new_rows_are_prepared_like_those_of_the_constructor(self, trainer, tokenizer, form):
        rows = {"client_0": make_rows(3, seed=20), "client_2": make_rows(2, seed=21)}
        metrics = trainer.evaluate(form(rows))
        for client_id in rows:
            by_hand = loss_by_hand(trainer, tokenizer, client_id, rows[client_id]["text"])
            assert metrics[f"eval_{client_id}_loss"] == pytest.approx(by_hand, abs=1e-5)
        assert "eval_client_1_loss" not in metrics

    def test_the_prefix_can_be_chosen(self, trainer):
        metrics = trainer.evaluate({"client_0": make_rows(2, seed=3)}, metric_key_prefix="test")
        assert metrics["test_loss"] == metrics["test_client_0_loss"]
        assert not [key for key in metrics if key.startswith("eval_") and key.endswith("_loss")]

    def test_evaluation_changes_no_weight(self, trainer):
        before = weights_of(trainer)
        trainer.evaluate()
        assert max_difference(before, weights_of(trainer)) == 0

    @pytest.mark.parametrize("setting", ["bf16_full_eval", "fp16_full_eval"])
    @pytest.mark.parametrize("named", [True, False], ids=["clients", "one client"])
    def test_evaluating_in_half_precision_rounds_nothing_for_good(self, make_trainer, three, setting, named):
        rows = three if named else three["client_0"]
        plain = make_trainer(rows, eval_dataset=rows, num_rounds=1)
        trainer = make_trainer(rows, eval_dataset=rows, num_rounds=1, **{setting: True})
        before = copy.deepcopy(trainer.model.state_dict())
        half, full = trainer.evaluate()["eval_loss"], plain.evaluate()["eval_loss"]
        assert half != full and half == pytest.approx(full, abs=0.05)
        trainer.predict(trainer.eval_dataset["client_0"] if named else trainer.eval_dataset)
        trainer.train()
        plain.train()
        trainer.evaluate()
        after, expected = trainer.model.state_dict(), plain.model.state_dict()
        assert {tensor.dtype for tensor in before.values()} == {tensor.dtype for tensor in after.values()}
        assert max_difference(after, expected) == 0 and max_difference(before, after) > 0
        assert max_difference(weights_of(trainer), weights_of(plain)) == 0

    def test_new_rows_of_an_unknown_client_are_refused(self, trainer):
        with pytest.raises(ValueError, match="rows of 'stranger'.*`eval_unseen_clients=True`"):
            trainer.evaluate({"stranger": make_rows(2, seed=3)})

    def test_a_known_client_without_evaluation_rows_is_named(self, make_trainer, three):
        trainer = make_trainer(three, eval_dataset={"client_0": three["client_0"]})
        with pytest.raises(ValueError, match="client_1"):
            trainer.evaluate("client_1")

    def test_without_evaluation_rows_the_trainers_own_error_is_raised(self, make_trainer, three):
        with pytest.raises(ValueError, match="eval_dataset"):
            make_trainer(three).evaluate()

    def test_an_unseen_client_is_evaluated_with_the_shared_a_and_an_untrained_b(self, make_trained, three, tokenizer):
        rows = {"client_0": make_rows(3, seed=20), "stranger": make_rows(4, seed=21)}
        trainer = make_trained(three, eval_dataset=rows, eval_unseen_clients=True)
        metrics = trainer.evaluate()
        assert all(not tensor.any() for tensor in trainer.client_state_dict("stranger").values())
        base = make_model()
        losses = []
        with torch.no_grad():
            for text in rows["stranger"]["text"]:
                ids = torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id]])
                losses.append((float(base(input_ids=ids, labels=ids).loss), ids.shape[1] - 1))
        by_hand = sum(loss * count for loss, count in losses) / sum(count for _, count in losses)
        assert metrics["eval_stranger_loss"] == pytest.approx(by_hand, abs=1e-5)

    @pytest.mark.filterwarnings("ignore:`return_outputs=True`:FutureWarning")
    def test_compute_metrics_is_called_per_client_and_averaged(self, make_trainer, three, held_out):
        def compute_metrics(prediction):
            logits, labels = prediction
            mask = labels[:, 1:] != -100
            right = (logits[:, :-1].argmax(-1) == labels[:, 1:])[mask]
            return {"rows": len(labels), "accuracy": float(right.mean())}

        trainer = make_trainer(three, eval_dataset=held_out, compute_metrics=compute_metrics)
        metrics = trainer.evaluate()
        assert [metrics[f"eval_client_{i}_rows"] for i in range(3)] == [8, 4, 3]
        assert metrics["eval_rows"] == 5
        accuracies = [metrics[f"eval_client_{i}_accuracy"] for i in range(3)]
        assert metrics["eval_accuracy"] == pytest.approx(np.mean(accuracies))

    @pytest.mark.filterwarnings("ignore:`return_outputs=True`:FutureWarning")
    def test_preprocess_logits_for_metrics_is_applied(self, make_trainer, three, held_out):
        shapes = []

        def compute_metrics(prediction):
            shapes.append(prediction.predictions.ndim)
            return {}

        trainer = make_trainer(
            three,
            eval_dataset=held_out,
            compute_metrics=compute_metrics,
            preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
        )
        trainer.evaluate()
        assert shapes == [2, 2, 2]


class TestLogging:
    def test_the_logged_loss_is_the_mean_over_clients(self, make_trained, three):
        settings = {"num_rounds": 1, "local_steps": 3}
        one = make_trained(three, parallel_clients=1, **settings)
        parallel = make_trained(three, parallel_clients=3, **settings)
        by_client = np.array(logged(one, "loss")).reshape(3, 3)
        assert logged(parallel, "loss") == pytest.approx(by_client.mean(0), abs=1e-4)
        for trainer in (one, parallel):
            losses = trainer.round_history[0]["losses"]
            assert list(losses.values()) == pytest.approx(by_client.mean(1), abs=1e-4)

    def test_the_loss_of_the_run_is_the_mean_over_rounds_and_clients(self, make_trainer, three):
        for parallel in (1, 2, 3):
            trainer = make_trainer(three, parallel_clients=parallel, num_rounds=2)
            output = trainer.train()
            losses = [loss for entry in trainer.round_history for loss in entry["losses"].values()]
            assert output.training_loss == output.metrics["train_loss"] == pytest.approx(np.mean(losses))
            assert trainer.state.log_history[-1]["train_loss"] == output.training_loss
            # A mean over steps is another number where a step has fewer clients.
            assert output.metrics["train_samples_per_second"] * output.metrics["train_runtime"] == pytest.approx(
                2 * 3 * 3 * 2, rel=0.02
            )

    def test_operations_are_counted_for_one_adapter_per_token(self, make_trained):
        clients = {f"client_{i}": make_rows(4, seed=i, min_words=6, max_words=6) for i in range(3)}
        counts = [make_trained(clients, parallel_clients=n, num_rounds=1).state.total_flos for n in (1, 3)]
        assert counts[0] == counts[1] > 0

    def test_the_loss_of_a_step_is_the_mean_over_those_that_still_train(self, make_trained, unequal):
        settings = {"num_rounds": 1, "local_steps": None, "local_epochs": 1}
        one = logged(make_trained(unequal, parallel_clients=1, **settings), "loss")
        by_client = [one[:4], one[4:7], one[7:]]
        expected = [np.mean([losses[step] for losses in by_client if step < len(losses)]) for step in range(4)]
        parallel = make_trained(unequal, parallel_clients=3, **settings)
        assert logged(parallel, "loss") == pytest.approx(expected, abs=1e-4)

    @pytest.mark.parametrize("parallel", [1, 3])
    def test_the_rounds_line_swallows_no_step(self, make_trained, three, parallel):
        trainer = make_trained(three, logging_steps=1, parallel_clients=parallel)
        num_steps = 2 * 3 * 3 // parallel
        lines = [line for line in trainer.state.log_history if "loss" in line]
        assert [line["step"] for line in lines] == list(range(1, num_steps + 1))
        for line in lines:
            assert {"mean_token_accuracy", "entropy", "num_tokens", "learning_rate", "grad_norm"} <= line.keys()
            assert line["entropy"] == pytest.approx(math.log(43), abs=0.1)
        tokens = [line["num_tokens"] for line in lines]
        assert all(before < after for before, after in zip(tokens[:-1], tokens[1:], strict=True))
        rounds = [line for line in trainer.state.log_history if "round" in line]
        assert [line["round"] for line in rounds] == [0, 1]
        assert all("entropy" not in line and "loss" not in line for line in rounds)

    def test_every_token_is_counted_once(self, make_trained, three):
        trainer = make_trained(three, RecordingTrainer)
        seen = sum(int((input_ids != 0).sum()) for _, input_ids, _ in trainer.seen)
        assert logged(trainer, "num_tokens")[-1] == seen

    def test_the_rounds_line_sums_the_round_up(self, make_trained, three):
        trainer = make_trained(three)
        lines = [line for line in trainer.state.log_history if "round" in line]
        for line, entry in zip(lines, trainer.round_history, strict=True):
            losses = list(entry["losses"].values())
            assert line["round_loss"] == pytest.approx(np.mean(losses))
            assert (line["round_loss_best"], line["round_loss_worst"]) == (min(losses), max(losses))
            assert line["round_clients"] == 3
            assert line["step"] == entry["step"]

    def test_tensorboard_gets_steps_rounds_and_clients(self, make_trained, three, tmp_path, monkeypatch):
        event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
        monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
        trainer = make_trained(three, eval_dataset=three, eval_strategy="epoch", report_to="tensorboard")
        events = event_accumulator.EventAccumulator(str(tmp_path / "events"))
        events.Reload()
        rounds = events.Scalars("train/round_loss")
        assert [event.value for event in rounds] == pytest.approx(logged(trainer, "round_loss"), rel=1e-5)
        assert len(events.Scalars("train/loss")) == 6
        assert len(events.Scalars("eval/client_2_loss")) == 2

    def test_trackio_gets_steps_rounds_and_clients(self, make_trained, three, tmp_path, monkeypatch):
        sqlite_storage = pytest.importorskip("trackio.sqlite_storage")
        # Trackio reads its folder from the environment once, when it is imported.
        for name, module in list(sys.modules.items()):
            if name.split(".")[0] == "trackio" and hasattr(module, "TRACKIO_DIR"):
                monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "trackio")
        trainer = make_trained(
            three,
            eval_dataset=three,
            eval_strategy="epoch",
            report_to="trackio",
            project="federation",
            run_name="run",
            trackio_space_id=None,
        )
        lines = sqlite_storage.SQLiteStorage.get_logs("federation", "run")
        by_key = {key: [line[key] for line in lines if key in line] for key in ("train/loss", "train/round_loss")}
        assert by_key["train/loss"] == pytest.approx(logged(trainer, "loss"))
        assert by_key["train/round_loss"] == pytest.approx(logged(trainer, "round_loss"))
        assert sum("eval/client_2_loss" in line for line in lines) == 2
        assert (tmp_path / "trackio").is_dir()

    def test_the_progress_bar_names_the_round_and_its_clients(self, make_trainer, clients):
        trainer = make_trainer(clients, disable_tqdm=False, local_steps=1)
        texts = []

        def read(trainer, **kwargs):
            for callback in trainer.callback_handler.callbacks:
                if getattr(callback, "training_bar", None) is not None:
                    texts.append(callback.training_bar.desc)

        watch(trainer, on_step_begin=read)
        trainer.train()
        names = "(client_0, client_1, client_2 and 1 more)"
        assert [text.removesuffix(": ") for text in texts] == [f"Round 1/2 {names}", f"Round 2/2 {names}"]


# Callbacks


class TestCallbacks:
    @pytest.mark.parametrize("parallel", [1, 2, 3])
    def test_an_epoch_is_a_round_however_many_waves_it_takes(self, make_trainer, three, parallel):
        trainer = make_trainer(three, parallel_clients=parallel)
        callback = watch(trainer)
        trainer.train()
        events = callback.events
        assert events.count("on_epoch_begin") == events.count("on_epoch_end") == 2
        assert events.count("on_round_begin") == events.count("on_round_end") == 2
        assert events.count("on_step_end") == 2 * 3 * math.ceil(3 / parallel)
        of_rounds = [event for event in events if "round" in event or "epoch" in event]
        assert of_rounds[:4] == of_rounds[4:]
        assert of_rounds.index("on_round_begin") < of_rounds.index("on_round_end") < 4

    def test_a_plain_trainer_callback_passed_in_sees_every_step(self, make_trained, three):
        class Steps(TrainerCallback):
            def __init__(self):
                self.steps = []

            def on_step_end(self, args, state, control, **kwargs):
                self.steps.append(state.global_step)

        callback = Steps()
        make_trained(three, callbacks=[callback])
        assert callback.steps == list(range(1, 7))

    def test_round_events_say_which_round_and_clients(self, make_trained, clients):
        calls = []

        class Rounds(FederatedCallback):
            def on_round_begin(self, args, state, control, round_index, client_ids, trainer, **kwargs):
                assert isinstance(args, FederatedConfig)
                calls.append(("begin", round_index, client_ids, state.global_step))

            def on_round_end(self, args, state, control, metrics, trainer, **kwargs):
                calls.append(("end", metrics["round"], tuple(metrics["clients"]), state.global_step))
                assert metrics == trainer.round_history[-1]

        trainer = make_trained(clients, callbacks=[Rounds()], clients_per_round=2, num_rounds=3, local_steps=2)
        sampled = [tuple(entry["clients"]) for entry in trainer.round_history]
        assert len(set(sampled)) > 1
        expected = []
        for index, client_ids in enumerate(sampled):
            expected.append(("begin", index, client_ids, 2 * index))
            expected.append(("end", index, client_ids, 2 * index + 2))
        assert calls == expected

    @pytest.mark.parametrize("parallel", [1, 3])
    def test_at_the_end_of_a_round_the_average_is_in_place(self, make_trainer, three, returned, parallel):
        trainer = make_trainer(three, parallel_clients=parallel)
        shared = [trainer.shared_state_dict()]

        def check(trainer, **kwargs):
            now = trainer.shared_state_dict()
            mean = {key: sum(tensors[key] for tensors, _ in returned[-3:]) / 3 for key in now}
            assert max_difference(now, mean) < 1e-6
            assert max_difference(now, shared[-1]) > 1e-4
            shared.append(now)

        watch(trainer, on_round_end=check)
        trainer.train()
        assert len(shared) == 3

    def test_a_stop_within_a_round_closes_it_with_the_clients_that_trained(self, make_trainer, three, returned):
        trainer = make_trainer(three, parallel_clients=1, local_steps=3)

        def stop(trainer, control, state, **kwargs):
            control.should_training_stop = state.global_step == 4

        callback = watch(trainer, on_step_end=stop)
        trainer.train()
        assert trainer.state.global_step == 4
        assert callback.events.count("on_round_end") == callback.events.count("on_epoch_end") == 1
        (entry,) = trainer.round_history
        assert (entry["clients"], entry["step"]) == (["client_0", "client_1"], 4)
        assert entry["weights"] == {"client_0": 6.0, "client_1": 2.0}
        assert has_trained(trainer, "client_0") and has_trained(trainer, "client_1")
        assert not has_trained(trainer, "client_2")
        # A large change waits for the round's end, so it may come after one that was returned later.
        assert sorted(weight for _, weight in returned) == [2.0, 6.0]
        mean = {key: sum(weight / 8 * tensors[key] for tensors, weight in returned) for key in returned[0][0]}
        assert max_difference(mean, trainer.shared_state_dict()) < 1e-6
        assert inside.clients_in_slots(trainer) == {}

    def test_a_stop_within_a_parallel_wave_keeps_what_was_trained(self, make_trainer, three):
        trainer = make_trainer(three, parallel_clients=3, local_steps=3)

        def stop(trainer, control, state, **kwargs):
            control.should_training_stop = state.global_step == 2

        watch(trainer, on_step_end=stop)
        trainer.train()
        (entry,) = trainer.round_history
        assert entry["weights"] == dict.fromkeys(three, 4.0)
        shorter = make_trainer(three, parallel_clients=3, local_steps=2, num_rounds=3, learning_rate=1e-2)
        watch(shorter, on_round_end=lambda trainer, control, **kwargs: setattr(control, "should_training_stop", True))
        shorter.train()
        assert shorter.state.global_step == 2
        assert max_difference(weights_of(trainer), weights_of(shorter)) < 1e-6

    def test_a_stop_within_a_step_closes_the_round(self, make_trainer, three):
        trainer = make_trainer(three, gradient_accumulation_steps=2, local_steps=2)

        def stop(trainer, control, state, **kwargs):
            control.should_training_stop = state.global_step == 1

        watch(trainer, on_substep_end=stop)
        trainer.train()
        assert trainer.state.global_step == 1
        assert [entry["weights"] for entry in trainer.round_history] == [dict.fromkeys(three, 4.0)]

    def test_a_stop_before_the_first_step_ends_leaves_no_round(self, make_trainer, three):
        trainer = make_trainer(three, gradient_accumulation_steps=2, local_steps=2)
        before = weights_of(trainer)
        watch(
            trainer, on_substep_end=lambda trainer, control, **kwargs: setattr(control, "should_training_stop", True)
        )
        trainer.train()
        assert trainer.state.global_step == 0
        assert max_difference(before, weights_of(trainer)) == 0

    def test_an_epoch_stop_ends_the_round_and_the_next_one_follows(self, make_trainer, three):
        trainer = make_trainer(three, parallel_clients=1, local_steps=2, num_rounds=2)

        def stop(trainer, control, state, **kwargs):
            if state.global_step == 3:
                control.should_epoch_stop = True

        watch(trainer, on_step_end=stop)
        trainer.train()
        assert [entry["clients"] for entry in trainer.round_history] == [["client_0", "client_1"], sorted(three)]
        assert [entry["step"] for entry in trainer.round_history] == [3, 9]
        # The second round starts where it would have started.
        rates = logged(trainer, "learning_rate")
        assert rates[3:5] == pytest.approx([5e-3, 2.5e-3])

    @pytest.mark.parametrize("metric", ["eval_loss", "eval_mean_token_accuracy"])
    def test_early_stopping_ends_the_run_between_rounds(self, make_trained, three, metric):
        trainer = make_trained(
            three,
            eval_dataset=three,
            eval_strategy="epoch",
            metric_for_best_model=metric,
            greater_is_better=metric != "eval_loss",
            callbacks=[EarlyStoppingCallback(early_stopping_patience=1, early_stopping_threshold=100.0)],
            num_rounds=5,
        )
        assert len(trainer.round_history) == 2
        assert trainer.state.global_step == 6

    @pytest.mark.parametrize("reset", [True, False], ids=["fresh", "kept"])
    def test_training_again_goes_on_from_the_present_weights(self, make_trainer, clients, reset):
        """As rounds of one longer run do, but for the round index, which the random orders follow."""
        common = {
            "optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
            "lr_scheduler_type": "constant",
            "train_sampling_strategy": "sequential",
            "reset_optimizer": reset,
        }
        whole = make_trainer(clients, num_rounds=4, clients_per_round=2, client_sampler=alternate, **common)
        whole.train()
        trainer = make_trainer(clients, num_rounds=2, clients_per_round=2, client_sampler=alternate, **common)
        trainer.train()
        trainer.train()
        assert max_difference(weights_of(whole), weights_of(trainer)) < 1e-6
        assert [entry["round"] for entry in trainer.round_history] == [0, 1]
        assert trainer.round_history[-1]["shared_sha256"] == tensors_sha256(trainer.shared_state_dict())

    def test_what_is_written_into_the_model_is_where_all_clients_start(self, make_trainer, three, tmp_path):
        trainer = make_trainer(three, num_rounds=1, local_steps=1, parallel_clients=2, learning_rate=1e-9)
        start = {}
        with torch.no_grad():
            for key, parameter in inside.slot_parameters(trainer, 0).items():
                start[key] = parameter.normal_().clone()
        shared = trainer.shared_state_dict()
        assert max_difference(shared, {key: start[key] for key in shared}) == 0
        trainer.train()
        for client_id in three:
            local = trainer.client_state_dict(client_id)
            assert max_difference(local, {key: start[key] for key in local}) < 1e-6
        assert max_difference(trainer.shared_state_dict(), {key: start[key] for key in shared}) < 1e-6

        before = trainer.client_state_dict("client_1")
        with torch.no_grad():
            for key, parameter in inside.slot_parameters(trainer, 0).items():
                start[key] = parameter.fill_(0.5).clone()
        for read, expected in (("client_0", start), ("client_1", before)):
            local = trainer.client_state_dict(read)
            assert max_difference(local, {key: expected[key] for key in local}) == 0
        assert all((tensor == 0.5).all() for tensor in trainer.shared_state_dict().values())
        with trainer.use_client("client_1"):
            assert max_difference(inside.slot_tensors(trainer, 0, "local"), before) == 0

    def test_clients_that_have_not_trained_start_there_after_a_resume_too(self, make_trainer, three):
        trainers = []
        for resume in (None, True):
            trainer = make_trainer(
                three,
                num_rounds=3,
                local_steps=1,
                client_sampler=lambda round_index, *_: [f"client_{round_index}"],
                save_strategy="epoch",
            )
            with torch.no_grad():
                for parameter in inside.slot_parameters(trainer, 0).values():
                    parameter.fill_(0.25 if resume is None else 0.5)
            trainer.train(resume_from_checkpoint=resume and trainer.args.output_dir + "/checkpoint-1")
            trainers.append(trainer)
        assert max_difference(*map(weights_of, trainers)) == 0


# What users read


class TestReading:
    @pytest.mark.parametrize("parallel", [1, 3])
    def test_use_client_serves_the_shared_a_with_the_clients_b(self, make_trained, three, parallel):
        trainer = make_trained(three, parallel_clients=parallel)
        for client_id in three:
            expected = {**trainer.shared_state_dict(), **trainer.client_state_dict(client_id)}
            with trainer.use_client(client_id) as model:
                assert model is trainer.model
                assert max_difference(expected, inside.slot_tensors(trainer, 0)) == 0

    def test_use_client_puts_the_slot_back(self, make_trained, three):
        trainer = make_trained(three)
        before = inside.slot_tensors(trainer, 0)
        with trainer.use_client("client_2"):
            assert max_difference(before, inside.slot_tensors(trainer, 0)) > 0
        assert max_difference(before, inside.slot_tensors(trainer, 0)) == 0
        with pytest.raises(RuntimeError, match="inside"), trainer.use_client("client_2"):
            raise RuntimeError("inside")
        assert max_difference(before, inside.slot_tensors(trainer, 0)) == 0

    def test_contexts_of_two_clients_nest(self, make_trained, three):
        trainer = make_trained(three)
        with trainer.use_client("client_1"):
            outer = inside.slot_tensors(trainer, 0)
            with trainer.use_client("client_2"):
                assert max_difference(outer, inside.slot_tensors(trainer, 0)) > 0
            assert max_difference(outer, inside.slot_tensors(trainer, 0)) == 0

    @pytest.mark.parametrize("parallel", [1, 3])
    def test_use_client_in_a_callback_does_not_disturb_training(self, make_trained, make_trainer, three, parallel):
        plain = make_trained(three, parallel_clients=parallel)
        trainer = make_trainer(three, parallel_clients=parallel)
        ids = torch.tensor([[3, 4, 5, 6]])
        outputs: dict[str, list] = {client_id: [] for client_id in three}

        def read(trainer, **kwargs):
            before = [inside.slot_tensors(trainer, slot) for slot in range(inside.num_slots(trainer))]
            for client_id in three:
                with trainer.use_client(client_id) as model, torch.no_grad():
                    outputs[client_id].append(model(input_ids=ids).logits)
            for slot, tensors in enumerate(before):
                assert max_difference(tensors, inside.slot_tensors(trainer, slot)) == 0

        watch(trainer, on_step_end=read)
        trainer.train()
        assert max_difference(weights_of(plain), weights_of(trainer)) == 0
        final = [outputs[client_id][-1] for client_id in three]
        assert all(not torch.equal(final[0], other) for other in final[1:])

    @pytest.mark.parametrize("parallel", [1, 3])
    def test_a_look_at_the_base_model_does_not_disturb_training(self, make_trained, make_trainer, three, parallel):
        plain = make_trained(three, parallel_clients=parallel, gradient_accumulation_steps=2)
        trainer = make_trainer(three, parallel_clients=parallel, gradient_accumulation_steps=2)

        def look(trainer, **kwargs):
            with trainer.model.disable_adapter(), torch.no_grad():
                trainer.model(input_ids=torch.tensor([[3, 4, 5, 6]]))

        look(trainer)
        watch(trainer, on_step_end=look, on_round_begin=look, on_substep_end=look)
        trainer.train()
        assert max_difference(weights_of(plain), weights_of(trainer)) == 0

    def test_use_client_serves_a_training_client_as_it_is(self, make_trainer, three):
        trainer = make_trainer(three, parallel_clients=3, num_rounds=1)
        checked = []

        def read(trainer, **kwargs):
            for client_id, slot in inside.clients_in_slots(trainer).items():
                live = inside.slot_tensors(trainer, slot)
                with trainer.use_client(client_id):
                    assert max_difference(live, inside.slot_tensors(trainer, 0)) == 0
                checked.append(client_id)

        watch(trainer, on_step_end=read)
        trainer.train()
        # The round's last step has put the clients away.
        assert checked == [*three] * 2

    def test_round_history_has_an_entry_per_round(self, make_trained, clients):
        trainer = make_trained(clients, clients_per_round=3, num_rounds=2, parallel_clients=2)
        assert [entry["round"] for entry in trainer.round_history] == [0, 1]
        for entry in trainer.round_history:
            assert entry.keys() == {
                "round",
                "clients",
                "losses",
                "weights",
                "left_out",
                "staleness",
                "counted",
                "bytes_down",
                "bytes_up",
                "seconds",
                "step",
                "shared_sha256",
            }
            assert len(entry["clients"]) == 3
            assert list(entry["losses"]) == list(entry["weights"]) == entry["clients"] == sorted(entry["clients"])
            assert entry["seconds"] > 0
        assert [entry["step"] for entry in trainer.round_history] == [6, 12]

    def test_round_history_is_a_copy(self, make_trained, three):
        trainer = make_trained(three, num_rounds=1)
        trainer.round_history[0]["losses"].clear()
        trainer.round_history.clear()
        assert len(trainer.round_history[0]["losses"]) == 3

    def test_rounds_jsonl_is_the_history(self, make_trainer, three, tmp_path):
        trainer = make_trainer(three)
        lengths = []

        def read(trainer, **kwargs):
            lines = (tmp_path / "out" / "rounds.jsonl").read_text().splitlines()
            assert [json.loads(line) for line in lines] == trainer.round_history
            lengths.append(len(lines))

        watch(trainer, on_round_end=read)
        trainer.train()
        assert lengths == [1, 2]
        trainer.save_model(str(tmp_path / "saved"))
        saved = (tmp_path / "saved" / "rounds.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in saved] == trainer.round_history

    @pytest.mark.parametrize("parallel", [1, 3])
    def test_state_dicts_are_independent_fp32_copies_at_any_time(self, make_trainer, three, parallel):
        trainer = make_trainer(three, parallel_clients=parallel)
        reads = []

        def read(trainer, **kwargs):
            for take in (trainer.shared_state_dict, *(lambda c=c: trainer.client_state_dict(c) for c in three)):
                first = take()
                assert {(t.dtype, t.device.type, t.requires_grad) for t in first.values()} == {
                    (torch.float32, "cpu", False)
                }
                kept = copy.deepcopy(first)
                for tensor in first.values():
                    tensor.fill_(7.0)
                assert max_difference(kept, take()) == 0
            reads.append({client_id: trainer.client_state_dict(client_id) for client_id in three})

        read(trainer)
        watch(trainer, on_step_begin=read, on_step_end=read)
        trainer.train()
        read(trainer)
        assert all(not tensor.any() for tensor in reads[0]["client_0"].values())
        # Before the first step, and after it: a client that trains is read as it is.
        assert max_difference(reads[0]["client_0"], reads[2]["client_0"]) > 0

    def test_shared_and_client_tensors_divide_the_adapter(self, make_trained, three):
        trainer = make_trained(three, num_rounds=1)
        shared, local = trainer.shared_state_dict(), trainer.client_state_dict("client_0")
        assert all(".lora_A." in key for key in shared) and all(".lora_B." in key for key in local)
        assert len(shared) == len(local) == 14

    @pytest.mark.parametrize(
        "read",
        [
            lambda trainer: trainer.client_state_dict("client_9"),
            lambda trainer: trainer.evaluate("client_9"),
            lambda trainer: trainer.use_client("client_9").__enter__(),
        ],
        ids=["client_state_dict", "evaluate", "use_client"],
    )
    def test_an_unknown_client_is_an_error_that_lists_the_known(self, make_trainer, three, read):
        trainer = make_trainer(three, eval_dataset=three)
        with pytest.raises(ValueError, match="no client 'client_9'.*client_0, client_1, client_2"):
            read(trainer)

    def test_a_long_list_of_clients_is_cut(self, make_trainer):
        trainer = make_trainer({f"client_{i:02}": make_rows(1, seed=i) for i in range(25)}, parallel_clients=1)
        with pytest.raises(ValueError, match="client_19 and 5 more"):
            trainer.client_state_dict("nobody")


# Arguments of the constructor


class TestNoise:
    @pytest.mark.parametrize("turns", [False, True], ids=["together", "in turns"])
    @pytest.mark.parametrize("longer", [6, 24])
    def test_the_noise_of_a_client_does_not_depend_on_its_neighbours_padding(self, make_trainer, longer, turns):
        lengths = {"client_0": 6, "client_1": longer}
        rows = {
            client_id: Dataset.from_dict({"input_ids": [[3 + i] * n for i in range(4)], "labels": [[3] * n] * 4})
            for client_id, n in lengths.items()
        }
        trainer = make_trainer(
            rows,
            trainer_class=OwnLoss if turns else FederatedTrainer,
            neftune_noise_alpha=5.0,
            parallel_clients=2,
            num_rounds=1,
            local_steps=2,
        )
        noise = []

        def measure(module, inputs, output):
            noise.append((output - module.weight[inputs[0]]).detach().abs().amax(dim=(1, 2)))

        def begin(trainer, state, **kwargs):
            if state.global_step == 0:
                trainer.model.get_base_model().get_input_embeddings().register_forward_hook(measure)

        watch(trainer, on_step_begin=begin)
        trainer.train()
        # Two rows of each client, the client with the longer rows in the first slot.
        expected = [5.0 / math.sqrt(n * 32) for n in (longer, 6) for _ in range(2)] * 2
        for largest, bound in zip(torch.cat(noise).tolist(), expected, strict=True):
            assert 0.9 * bound < largest <= bound * (1 + 1e-5)
        trainer.model.train()
        trainer.model.get_base_model().get_input_embeddings()(torch.tensor([[3, 4]]))
        assert noise[-1].max() == 0


class OwnLoss(FederatedTrainer):
    """As users write it: the model's own loss, and something of theirs on top."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs, num_items_in_batch=num_items_in_batch)
        loss = 2 * outputs.loss
        return (loss, outputs) if return_outputs else loss


class LossWithOutputs(FederatedTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        loss = loss + 0.1 * loss.detach() * loss
        return (loss, outputs) if return_outputs else loss


class OwnOptimizer(FederatedTrainer):
    def create_optimizer(self, model=None):
        if self.optimizer is None:
            trained = [p for p in self.model.parameters() if p.requires_grad]
            self.optimizer = torch.optim.SGD(trained, lr=0.1, momentum=0.9)
        return self.optimizer


class TestSubclasses:
    """What users of TRL override works, the clients of a step taking turns where they must, or it is refused."""

    @pytest.mark.parametrize("trainer_class", [OwnLoss, LossWithOutputs, OwnOptimizer])
    def test_it_trains_alike_in_parallel_and_one_by_one(self, make_trained, three, trainer_class):
        one, parallel = (
            make_trained(
                three, trainer_class=trainer_class, optim="sgd", learning_rate=0.1, num_rounds=1, parallel_clients=m
            )
            for m in (1, 3)
        )
        assert all(has_trained(parallel, client_id) for client_id in three)
        assert max_difference(weights_of(one), weights_of(parallel)) < 1e-5
        assert logged(parallel, "loss")[0] == pytest.approx(sum(logged(one, "loss")[::3]) / 3, rel=1e-5)

    def test_a_loss_of_ones_own_is_that_of_sft_trainer(self, make_trained, tmp_path, tokenizer, clients):
        common = {"optim": "sgd", "learning_rate": 0.1, "num_rounds": None, "local_steps": None, "num_train_epochs": 1}
        federated = make_trained({"only": clients["client_0"]}, trainer_class=OwnLoss, **common, seed=3)

        class OwnLossOfSFT(SFTTrainer):
            compute_loss = OwnLoss.compute_loss

        args = make_args(tmp_path / "plain", **common, seed=3)
        plain = OwnLossOfSFT(
            model=make_model(),
            args=args,
            train_dataset=clients["client_0"],
            processing_class=tokenizer,
            peft_config=make_lora(),
        )
        plain.train()
        tensors = {**federated.shared_state_dict(), **federated.client_state_dict("only")}
        assert max_difference(tensors, get_peft_model_state_dict(plain.model)) < 1e-6

    def test_a_loss_put_in_afterwards(self, make_trainer, three):
        trainer = make_trainer(three, num_rounds=1, local_steps=1, parallel_clients=3)
        seen = []

        def compute_loss(model, inputs, return_outputs=False, num_items_in_batch=None):
            seen.append(len(inputs["input_ids"]))
            return model(**inputs, num_items_in_batch=num_items_in_batch).loss

        trainer.compute_loss = compute_loss
        trainer.train()
        assert seen == [2, 2, 2]

    def test_a_sampler_of_ones_own_is_refused(self, make_trainer, three):
        class OwnSampler(FederatedTrainer):
            def _get_train_sampler(self, train_dataset=None):
                return torch.utils.data.SequentialSampler(self.train_dataset)

        with pytest.raises(ValueError, match="`OwnSampler` has a `_get_train_sampler`.*would not be asked.*Set"):
            make_trainer(three, trainer_class=OwnSampler, model="not/loaded")
        make_trainer(
            three["client_0"], trainer_class=OwnSampler, num_rounds=None, local_steps=None, num_train_epochs=1
        )

    def test_a_loader_that_divides_nothing_by_client_is_refused(self, make_trainer, three):
        class OwnLoader(FederatedTrainer):
            def get_train_dataloader(self):
                return SFTTrainer.get_train_dataloader(self)

        with pytest.raises(
            ValueError, match="`get_train_dataloader` of `OwnLoader` did not call the one it overrides"
        ):
            make_trainer(three, trainer_class=OwnLoader).train()

    def test_a_step_that_divides_nothing_by_client_is_refused(self, make_trainer, three):
        class OwnStep(FederatedTrainer):
            def training_step(self, model, inputs, num_items_in_batch=None):
                return torch.zeros(())

        with pytest.raises(RuntimeError, match="'client_0' has no loss: the `training_step` of `OwnStep`.*super()"):
            make_trainer(three, trainer_class=OwnStep, parallel_clients=1).train()


class TestConstructor:
    def test_it_takes_the_arguments_of_sft_trainer_in_its_order(self):
        theirs = list(inspect.signature(FederatedTrainer.__mro__[2].__init__).parameters)
        assert FederatedTrainer.__mro__[2].__name__ == "SFTTrainer"
        assert list(TRAINER_ARGUMENTS)[: len(theirs)] == theirs

    def test_an_sft_config_gives_one_round_per_epoch(self, make_trained, three, tmp_path):
        values = {name: getattr(make_args(tmp_path / "out"), name) for name in ("use_cpu", "report_to", "max_length")}
        args = SFTConfig(
            str(tmp_path / "out"),
            **values,
            bf16=False,
            gradient_checkpointing=False,
            num_train_epochs=2,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            eos_token="<eos>",
            disable_tqdm=True,
            save_strategy="no",
        )
        trainer = make_trained(three, args=args)
        assert len(trainer.round_history) == 2
        assert trainer.state.global_step == 4
        assert (trainer.args.learning_rate, trainer.args.eos_token) == (1e-2, "<eos>")

    def test_without_args_the_folder_is_named_after_the_model(self, three, model_dir, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        # The defaults ask for bf16, which a machine without a GPU refuses.
        monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
        trainer = FederatedTrainer(model_dir, train_dataset=three, peft_config=make_lora())
        assert trainer.args.output_dir == f"{model_dir.split('/')[-1]}-FedSA"
        assert trainer.args.rounds == 3

    def test_a_model_is_loaded_by_name_with_its_tokenizer(self, make_trained, three, model_dir):
        by_name = make_trained(
            three,
            model=model_dir,
            processing_class=None,
            model_init_kwargs={"dtype": "float32"},
            num_rounds=1,
        )
        given = make_trained(three, num_rounds=1)
        assert max_difference(weights_of(by_name), weights_of(given)) < 1e-6

    def test_a_peft_model_starts_from_the_adapter_it_has(self, make_trainer, three):
        model = get_peft_model(make_model(), make_lora(task_type="CAUSAL_LM"))
        start = {key.replace(".default", ""): t.clone() for key, t in model.state_dict().items() if "lora_A" in key}
        trainer = make_trainer(three, model=model, peft_config=None, num_rounds=1)
        assert max_difference(start, trainer.shared_state_dict()) == 0
        trainer.train()
        assert all(has_trained(trainer, client_id) for client_id in three)

    def test_a_stock_lora_config_will_do(self, make_trained, three):
        stock = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
        trainer, ours = make_trained(three, peft_config=stock, num_rounds=1), make_trained(three, num_rounds=1)
        assert max_difference(weights_of(trainer), weights_of(ours)) < 1e-6

    def test_a_data_collator_is_used(self, make_trained, three):
        class Collator(DataCollatorForLanguageModeling):
            calls = 0

            def torch_call(self, examples):
                type(self).calls += 1
                return super().torch_call(examples)

        trainer = make_trained(three, data_collator=Collator(pad_token_id=0, pad_to_multiple_of=16), num_rounds=1)
        assert Collator.calls == 3
        plain = make_trained(three, num_rounds=1)
        assert max_difference(weights_of(trainer), weights_of(plain)) < 1e-4

    @pytest.mark.parametrize("parallel", [1, 3])
    def test_compute_loss_func_is_called_per_client(self, make_trained, three, parallel):
        rows = []

        def double(outputs, labels, num_items_in_batch=None):
            rows.append(len(labels))
            loss = F.cross_entropy(
                outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
            )
            return 2 * loss / num_items_in_batch

        settings = {"num_rounds": 1, "optim": "sgd", "max_grad_norm": 0, "parallel_clients": parallel}
        trainer = make_trained(three, compute_loss_func=double, learning_rate=0.05, **settings)
        plain = make_trained(three, learning_rate=0.1, **settings)
        assert rows == [2] * 9
        assert max_difference(weights_of(trainer), weights_of(plain)) < 1e-5
        assert logged(trainer, "loss") == pytest.approx([2 * loss for loss in logged(plain, "loss")], abs=1e-3)

    @pytest.mark.parametrize(
        "settings",
        [{"label_smoothing_factor": 0.1}, {"loss_type": "dft"}],
        ids=lambda settings: next(iter(settings)),
    )
    def test_loss_settings_act_alike_in_parallel_and_one_by_one(self, make_trained, three, settings):
        one, parallel = (
            make_trained(three, num_rounds=1, learning_rate=1e-3, parallel_clients=m, **settings) for m in (1, 3)
        )
        assert max_difference(weights_of(one), weights_of(parallel)) < 1e-5
        plain = make_trained(three, num_rounds=1, learning_rate=1e-3)
        assert abs(logged(parallel, "loss")[0] - logged(plain, "loss")[0]) > 1e-4

    def test_quantization_config_loads_the_base_in_four_bits(self, make_trained, three, model_dir):
        bitsandbytes = pytest.importorskip("bitsandbytes")
        from transformers import BitsAndBytesConfig

        trainer = make_trained(
            three,
            model=model_dir,
            num_rounds=1,
            quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
        )
        layer = trainer.model.base_model.model.model.layers[0].self_attn.q_proj.base_layer
        assert isinstance(layer, bitsandbytes.nn.Linear4bit)
        assert all(has_trained(trainer, client_id) for client_id in three)
        assert {t.dtype for t in trainer.shared_state_dict().values()} == {torch.float32}

    def test_dataset_kwargs_can_skip_the_preparation(self, make_trained):
        data = {f"client_{i}": Dataset.from_dict({"input_ids": [[3 + i, 4, 5]] * 4}) for i in range(2)}
        data = {c: rows.add_column("labels", [[3, 4, 5]] * 4) for c, rows in data.items()}
        trainer = make_trained(
            data, dataset_kwargs={"skip_prepare_dataset": True}, remove_unused_columns=False, num_rounds=1
        )
        assert all(has_trained(trainer, client_id) for client_id in data)


# Another Trainer


class FederatedClassifier(FederatedMixin, Trainer):
    pass


def make_classifier(**lora):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=43,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        num_labels=2,
    )
    values = {"task_type": TaskType.SEQ_CLS, "target_modules": ["q_proj", "v_proj"], "modules_to_save": ["score"]}
    return get_peft_model(LlamaForSequenceClassification(config), make_lora(**{**values, **lora}))


def labelled_rows(client: int, num_rows: int = 8, min_words: int = 6, max_words: int = 6) -> Dataset:
    """Rows whose first token says the label, and which label it says depends on the client."""
    generator = np.random.default_rng(client)
    words = [generator.integers(5, 43, generator.integers(min_words, max_words + 1)).tolist() for _ in range(num_rows)]
    labels = [row % 2 for row in range(num_rows)]
    ids = [[3 + (label + client) % 2] * 3 + rest for label, rest in zip(labels, words, strict=True)]
    return Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids], "labels": labels})


HEAD = "base_model.model.score.weight"


def has_trained_head(trainer, client_id: str) -> bool:
    before, after = inside.initial_local(trainer), trainer.client_state_dict(client_id)
    return max_difference({HEAD: before[HEAD]}, {HEAD: after[HEAD]}) > 0


class Doubling(DataCollatorWithPadding):
    """Two views of every row, as contrastive training has them."""

    def __call__(self, features):
        return super().__call__([row for row in features for _ in range(2)])


class TestClassifier:
    def test_a_collator_that_multiplies_rows_is_refused_side_by_side(self, make, tokenizer):
        data = {f"client_{i}": labelled_rows(i) for i in range(3)}
        with pytest.raises(ValueError, match="data collator made a batch of 6 rows into.*12.*`parallel_clients=1`"):
            make(data, collator=Doubling(tokenizer), parallel_clients=3)

    @pytest.mark.parametrize("parallel", [1, 3])
    def test_entries_that_are_no_tensors_are_divided_by_client_too(self, make, tokenizer, monkeypatch, parallel):
        class Texts(DataCollatorWithPadding):
            def __call__(self, features):
                texts = [str(row["input_ids"]) for row in features]
                return {**super().__call__(features), "texts": texts, "more": {"array": np.array(texts)}}

        def compute_loss(trainer, model, inputs, **kwargs):
            texts, more = inputs.pop("texts"), inputs.pop("more")
            assert texts == list(more["array"]) == [str(ids) for ids in inputs["input_ids"].tolist()]
            seen.append(len(texts))
            return super(FederatedClassifier, trainer).compute_loss(model, inputs, **kwargs)

        seen = []
        monkeypatch.setattr(FederatedClassifier, "compute_loss", compute_loss, raising=False)
        make({f"client_{i}": labelled_rows(i) for i in range(3)}, collator=Texts(tokenizer), parallel_clients=parallel)
        assert seen == [2] * 18

    def test_it_is_right_for_one_client_at_a_time(self, make, tokenizer):
        data = {f"client_{i}": labelled_rows(i) for i in range(3)}
        trained = make(data, collator=Doubling(tokenizer), parallel_clients=1)
        assert len(set(trained.round_history[0]["losses"].values())) == 3

    def test_a_base_that_is_no_pretrained_model_is_refused(self, make):
        model = get_peft_model(
            torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2)), LoraConfig(r=2, target_modules=["0"])
        )
        with pytest.raises(TypeError, match="The base model is a `Sequential`, but it must be a `PreTrainedModel`"):
            make({"a": labelled_rows(0), "b": labelled_rows(1)}, model=model)

    @pytest.fixture
    def make(self, tmp_path, tokenizer):
        def make(data, model=None, collator=None, eval_dataset=None, **kwargs):
            values = {
                name: value
                for name, value in make_args(tmp_path / "out", **kwargs).__dict__.items()
                if name in FederatedConfig.__dataclass_fields__ and FederatedConfig.__dataclass_fields__[name].init
            }
            trainer = FederatedClassifier(
                model=model or make_classifier(),
                args=FederatedConfig(**values),
                train_dataset=data,
                eval_dataset=eval_dataset,
                data_collator=collator or DataCollatorWithPadding(tokenizer),
            )
            trainer.train()
            return trainer

        return make

    @pytest.fixture
    def data(self):
        return {f"client_{i}": labelled_rows(i) for i in range(3)}

    def test_the_loss_falls_although_clients_contradict_each_other(self, make, data):
        trainer = make(data, num_rounds=4, local_steps=8, learning_rate=2e-2, per_device_train_batch_size=4)
        losses = [entry["losses"] for entry in trainer.round_history]
        assert all(losses[-1][client_id] < 0.5 * losses[0][client_id] for client_id in data)

    def test_heads_stay_with_their_clients(self, make, data):
        trainer = make(data)
        heads = [trainer.client_state_dict(client_id)[HEAD] for client_id in data]
        assert HEAD not in trainer.shared_state_dict()
        assert all(float((heads[0] - other).abs().max()) > 1e-4 for other in heads[1:])

    def test_share_modules_to_save_averages_the_heads(self, make, data, returned):
        trainer = make(data, share_modules_to_save=True)
        shared = trainer.shared_state_dict()[HEAD]
        assert all(HEAD not in trainer.client_state_dict(client_id) for client_id in data)
        last = [tensors[HEAD] for tensors, _ in returned[-3:]]
        assert torch.allclose(shared, sum(last) / 3, atol=1e-6)
        for client_id in data:
            with trainer.use_client(client_id):
                assert torch.equal(inside.slot_tensors(trainer, 0)[HEAD], shared)

    @pytest.mark.parametrize("share", [False, True], ids=["own heads", "shared heads"])
    @pytest.mark.parametrize("accumulation", [1, 2])
    def test_parallel_clients_train_alike(self, make, share, accumulation):
        data = {f"client_{i}": labelled_rows(i, num_rows) for i, num_rows in enumerate((8, 5, 3))}
        one, three = (
            make(
                data,
                share_modules_to_save=share,
                gradient_accumulation_steps=accumulation,
                parallel_clients=parallel,
                learning_rate=1e-3,
                local_steps=None,
                local_epochs=1,
            )
            for parallel in (1, 3)
        )
        assert max_difference(weights_of(one), weights_of(three)) < 1e-5
        for first, second in zip(one.round_history, three.round_history, strict=True):
            assert first["losses"] == pytest.approx(second["losses"], abs=1e-4)

    @pytest.mark.parametrize("parallel", [1, 3])
    def test_a_loss_that_counts_no_items_is_averaged_over_the_clients_own_micro_batches(
        self, make, monkeypatch, parallel
    ):
        inside.count_no_items(monkeypatch, FederatedClassifier)
        data = {f"client_{i}": labelled_rows(i, num_rows) for i, num_rows in enumerate((8, 2, 2))}
        settings = {"num_rounds": 1, "local_steps": 1, "optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0}
        # Two rows fill one micro-batch, so for these clients accumulation has nothing to accumulate.
        split, whole = (
            make(data, gradient_accumulation_steps=steps, parallel_clients=parallel, **settings) for steps in (2, 1)
        )
        for client_id in ("client_1", "client_2"):
            assert has_trained_head(split, client_id)
            states = [trainer.client_state_dict(client_id) for trainer in (split, whole)]
            assert max_difference(*states) < 1e-6
            losses = [trainer.round_history[0]["losses"][client_id] for trainer in (split, whole)]
            assert losses[0] == pytest.approx(losses[1], abs=1e-5)

    def test_rows_of_different_lengths_are_padded(self, make):
        data = {f"client_{i}": labelled_rows(i, min_words=1, max_words=9) for i in range(2)}
        one, two = (make(data, parallel_clients=parallel, learning_rate=1e-3) for parallel in (1, 2))
        assert max_difference(weights_of(one), weights_of(two)) < 1e-5

    def test_the_default_collator_works(self, make, data):
        trainer = make(data, collator=default_data_collator, num_rounds=1)
        padded = make(data, num_rounds=1)
        assert max_difference(weights_of(trainer), weights_of(padded)) < 1e-6

    def test_the_logged_loss_is_the_mean_over_clients(self, make, data):
        one, three = (make(data, num_rounds=1, parallel_clients=parallel) for parallel in (1, 3))
        by_client = np.array(logged(one, "loss")).reshape(3, 3)
        assert logged(three, "loss") == pytest.approx(by_client.mean(0), abs=1e-4)

    def test_evaluation_is_per_client(self, make, data):
        trainer = make(data, eval_dataset=data, eval_strategy="epoch")
        metrics = trainer.evaluate()
        losses = [metrics[f"eval_{client_id}_loss"] for client_id in data]
        assert metrics["eval_loss"] == pytest.approx(np.mean(losses))
        assert len(logged(trainer, "eval_client_1_loss")) == 3

    def test_a_model_without_adapter_is_refused(self, make, data):
        with pytest.raises(TypeError, match="without an adapter.*`peft.get_peft_model`"):
            make(data, model=make_classifier().unload())
