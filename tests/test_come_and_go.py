"""Clients that come and go: from the next round on, and as if they had always, or never again, taken part."""

import json

import inside
import pytest
import torch
from conftest import make_args, make_lora, make_model, make_rows, make_tokenizer
from datasets import Dataset

from hf_fedsa import FederatedCallback, FederatedTrainer, load_personalized_model
from hf_fedsa.messages import Broadcast

ROWS = {"ann": 4, "bob": 6, "eve": 16}


class After(FederatedCallback):
    """Does something to the trainer when a round has ended."""

    def __init__(self, round_index, function):
        self.round_index, self.function = round_index, function

    def on_round_end(self, args, state, control, trainer, metrics, **kwargs):
        if metrics["round"] == self.round_index:
            self.function(trainer)


class Elsewhere:
    """A transport of two rounds, whose server is elsewhere."""

    def __init__(self, folder):
        self.folder = folder

    def connect(self, host):
        self.rounds = [0, 1]
        self.shared = host.shared_like()
        self.client_ids = tuple(info.client_id for info in host.client_infos())

    def expected_rounds(self):
        return None

    def check_plan(self, rounds):
        pass

    def open_round(self):
        if not self.rounds:
            return None
        return self.client_ids, Broadcast(self.rounds.pop(0), self.shared, schedule_start=0, schedule_steps=6)

    def send(self, update):
        pass

    def close_round(self, seconds, step):
        return None

    def close(self):
        pass


def rows_of(client_id):
    return make_rows(ROWS.get(client_id, 6), seed=sum(map(ord, client_id)))


def eval_rows_of(client_id):
    return make_rows(3, seed=1 + sum(map(ord, client_id)))


def make_trainer(
    folder,
    client_ids=("ann", "bob"),
    callbacks=(),
    client_sampler=None,
    *,
    eval_dataset=None,
    transport=None,
    read=lambda rows: rows,
    **kwargs,
):
    trainer = FederatedTrainer(
        model=make_model(),
        args=make_args(folder, **{"optim": "sgd", "num_rounds": 4, "parallel_clients": 2, **kwargs}),
        train_dataset={client_id: read(rows_of(client_id)) for client_id in client_ids},
        eval_dataset=eval_dataset,
        processing_class=make_tokenizer(),
        peft_config=make_lora(),
        callbacks=list(callbacks),
        client_sampler=client_sampler,
        transport=transport,
    )
    # No B is zero, so that it can be told where one started.
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name and parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 10)
    return trainer


def comes(client_id="eve", after=1, **rows):
    return After(after, lambda trainer: trainer.add_client(client_id, rows_of(client_id), **rows))


def goes(client_id="eve", after=1, forget=False):
    return After(after, lambda trainer: trainer.remove_client(client_id, forget=forget))


def without_eve_until(first):
    def sampler(round_index, num_rows, clients_per_round):
        return [client_id for client_id in num_rows if client_id != "eve" or round_index >= first]

    return sampler


def without_eve_after(last):
    def sampler(round_index, num_rows, clients_per_round):
        return [client_id for client_id in num_rows if client_id != "eve" or round_index <= last]

    return sampler


def clients_on(hub):
    return {path.split("/")[1] for path in hub.files("me/fed") if path.startswith("clients/")}


def assert_equal(first, second):
    assert first.keys() == second.keys()
    for key in first:
        assert torch.equal(first[key], second[key]), key


def differ(first, second):
    return any(not torch.equal(first[key], second[key]) for key in first)


def records_of(trainer):
    return [{k: v for k, v in record.items() if k != "seconds"} for record in trainer.round_history]


def log_of(trainer):
    # An epoch is a share of the longest round that was planned at first.
    timed = ("runtime", "per_second", "seconds", "total_flos", "epoch")
    return [
        {k: v for k, v in line.items() if not any(name in k for name in timed)} for line in trainer.state.log_history
    ]


def assert_same_run(first, second):
    assert first.client_ids == second.client_ids
    assert_equal(first.shared_state_dict(), second.shared_state_dict())
    for client_id in first.client_ids:
        assert_equal(first.client_state_dict(client_id), second.client_state_dict(client_id))
    assert records_of(first) == records_of(second)


def rates_of(trainer):
    return [line["learning_rate"] for line in trainer.state.log_history if "learning_rate" in line]


KEPT = {"optim": "adamw_torch", "reset_optimizer": False}


class TestComes:
    @pytest.mark.parametrize("kwargs", [{}, {"client_store_dir": True}, KEPT], ids=["memory", "disk", "kept"])
    def test_it_is_as_if_it_had_always_been_there_and_not_been_sampled(self, tmp_path, kwargs):
        runs = []
        for name, client_ids, callbacks in (("a", ("ann", "bob"), [comes()]), ("b", tuple(ROWS), [])):
            if "client_store_dir" in kwargs:
                kwargs = {**kwargs, "client_store_dir": str(tmp_path / f"store_{name}")}
            trainer = make_trainer(tmp_path / name, client_ids, callbacks, without_eve_until(2), **kwargs)
            trainer.train()
            runs.append(trainer)
        assert [record["clients"] for record in runs[0].round_history] == [["ann", "bob"]] * 2 + [list(ROWS)] * 2
        assert_same_run(*runs)
        assert log_of(runs[0]) == log_of(runs[1])

    def test_before_the_first_run(self, tmp_path):
        trainer = make_trainer(tmp_path / "a")
        trainer.add_client("eve", rows_of("eve"), eval_rows_of("eve"))
        trainer.train()
        whole = make_trainer(tmp_path / "b", tuple(ROWS))
        whole.train()
        assert_same_run(trainer, whole)

    def test_it_starts_with_the_initial_b(self, tmp_path):
        found = {}

        class Looks(FederatedCallback):
            def on_round_begin(self, args, state, control, trainer, round_index, client_ids, **kwargs):
                found[round_index] = {client_id: trainer.client_state_dict(client_id) for client_id in client_ids}

        trainer = make_trainer(tmp_path, callbacks=[comes(), Looks()])
        trainer.train()
        assert_equal(found[2]["eve"], found[0]["ann"])
        assert differ(found[2]["ann"], found[0]["ann"])
        assert trainer.round_history[2]["staleness"] == {"ann": 1, "bob": 1, "eve": None}
        assert differ(trainer.client_state_dict("eve"), found[0]["ann"])

    def test_steps_and_schedule_follow(self, tmp_path):
        trainer = make_trainer(
            tmp_path,
            callbacks=[comes()],
            local_steps=None,
            local_epochs=1,
            parallel_clients=3,
            lr_scheduler_type="linear",
            learning_rate=1.0,
            max_grad_norm=0.01,
        )
        trainer.train()
        # Of 2 rows a step: 3 steps of Bob's, then 8 of Eve's, who are 2 side by side as at the start.
        steps = [record["step"] for record in trainer.round_history]
        assert trainer.state.max_steps == trainer.state.global_step == steps[-1]
        before = [1 - i / 12 for i in range(6)]
        after = [1 - i / 22 for i in range(6, 22)]
        assert rates_of(trainer)[:6] == pytest.approx(before)
        epochs = [line["epoch"] for line in trainer.state.log_history]
        assert epochs == sorted(epochs) and epochs[-1] == 4
        assert sorted(set(rates_of(trainer)[6:]), reverse=True) == pytest.approx(after)

    def test_rows_that_a_transform_makes(self, tmp_path):
        def tokenize(batch):
            ids = [make_tokenizer()(text)["input_ids"] for text in batch["text"]]
            return {"input_ids": ids, "labels": ids}

        def other(batch):
            return tokenize(batch)

        kwargs = {"dataset_kwargs": {"skip_prepare_dataset": True}, "remove_unused_columns": False, "num_rounds": 2}
        trainer = make_trainer(tmp_path / "a", read=lambda rows: rows.with_transform(tokenize), **kwargs)
        for rows in (rows_of("eve"), rows_of("eve").with_transform(other)):
            with pytest.raises(ValueError, match="The rows of 'eve' have another format or transform"):
                trainer.add_client("eve", rows)
        trainer.add_client("eve", rows_of("eve").with_transform(tokenize))
        trainer.train()
        whole = make_trainer(tmp_path / "b", tuple(ROWS), read=lambda rows: rows.with_transform(tokenize), **kwargs)
        whole.train()
        assert_same_run(trainer, whole)

    def test_processes_that_load_rows_see_its_rows(self, tmp_path):
        def run(folder, client_ids, callbacks, workers):
            trainer = make_trainer(
                folder, client_ids, callbacks, without_eve_until(1), num_rounds=2, dataloader_num_workers=workers
            )
            trainer.train()
            return trainer

        assert_same_run(
            run(tmp_path / "a", ("ann", "bob"), [comes(after=0)], 1), run(tmp_path / "b", tuple(ROWS), [], 0)
        )

    def test_evaluation_rows(self, tmp_path):
        trainer = make_trainer(
            tmp_path,
            callbacks=[
                comes(after=0, eval_dataset=eval_rows_of("eve")),
                comes("max", after=1),
                goes("bob", after=2),
            ],
            eval_dataset={"ann": eval_rows_of("ann"), "bob": eval_rows_of("bob")},
            eval_strategy="epoch",
        )
        trainer.train()
        evaluated = [
            {name for name in ("ann", "bob", "eve", "max") if f"eval_{name}_loss" in line}
            for line in trainer.state.log_history
            if "eval_loss" in line
        ]
        assert evaluated == [{"ann", "bob", "eve"}] * 2 + [{"ann", "eve"}] * 2
        assert trainer.evaluate("eve")["eval_eve_loss"] == pytest.approx(trainer.evaluate()["eval_eve_loss"])
        assert set(trainer.round_history[-1]["results"]) == {"ann", "eve"}

    def test_first_evaluation_rows_of_all(self, tmp_path):
        trainer = make_trainer(tmp_path, callbacks=[comes(after=0, eval_dataset=eval_rows_of("eve"))])
        trainer.train()
        assert "eval_eve_loss" in trainer.evaluate()


class TestGoes:
    def test_it_is_as_if_it_were_not_sampled_any_more(self, tmp_path):
        runs = []
        for name, callbacks, sampler in (("a", [goes()], None), ("b", [], without_eve_after(1))):
            trainer = make_trainer(tmp_path / name, tuple(ROWS), callbacks, sampler)
            trainer.train()
            runs.append(trainer)
        assert runs[0].client_ids == ["ann", "bob"] and records_of(runs[0]) == records_of(runs[1])
        assert_equal(runs[0].shared_state_dict(), runs[1].shared_state_dict())
        for client_id in runs[0].client_ids:
            assert_equal(runs[0].client_state_dict(client_id), runs[1].client_state_dict(client_id))
        assert log_of(runs[0]) == log_of(runs[1])

    def test_steps_and_schedule_follow(self, tmp_path):
        trainer = make_trainer(
            tmp_path,
            tuple(ROWS),
            callbacks=[goes()],
            local_steps=None,
            local_epochs=1,
            parallel_clients=3,
            lr_scheduler_type="linear",
            learning_rate=1.0,
            max_grad_norm=0.01,
        )
        trainer.train()
        assert trainer.state.max_steps == trainer.state.global_step == 8 + 8 + 3 + 3
        expected = [1 - i / 32 for i in range(16)] + [1 - i / 22 for i in range(16, 22)]
        assert rates_of(trainer) == pytest.approx(expected)

    def test_a_sampler_that_named_it_in_earlier_rounds(self, tmp_path):
        def sampler(round_index, num_rows, clients_per_round):
            return ["ann", "eve"] if round_index == 0 else ["ann", "bob"]

        trainer = make_trainer(tmp_path, tuple(ROWS), [goes(after=0)], sampler)
        trainer.train()
        assert [record["clients"] for record in trainer.round_history] == [["ann", "eve"]] + [["ann", "bob"]] * 3

    @pytest.mark.parametrize("forget", [False, True])
    def test_it_comes_back(self, tmp_path, forget):
        kept = {}

        def note(trainer):
            kept.update(trainer.client_state_dict("eve"))

        class Looks(FederatedCallback):
            def on_round_begin(self, args, state, control, trainer, round_index, client_ids, **kwargs):
                if round_index == 2:
                    kept["again"] = trainer.client_state_dict("eve")

        initial = make_trainer(tmp_path / "other", tuple(ROWS)).client_state_dict("eve")
        callbacks = [After(0, note), goes(after=0, forget=forget), comes(after=1), Looks()]
        trainer = make_trainer(tmp_path, tuple(ROWS), callbacks)
        trainer.train()
        again = kept.pop("again")
        assert_equal(again, initial if forget else kept)
        assert trainer.round_history[2]["staleness"]["eve"] == (None if forget else 2)


class TestForget:
    @pytest.mark.parametrize("on_disk", [False, True])
    def test_nothing_names_it_any_more(self, tmp_path, on_disk):
        store = tmp_path / "store"
        seen = []

        def look(trainer):
            seen.append(("eve" in inside.client_store(trainer), "eve" in inside.kept_optimizer_states(trainer)))

        trainer = make_trainer(
            tmp_path / "out",
            tuple(ROWS),
            [After(1, look), goes(forget=True), After(1, look)],
            eval_dataset={client_id: eval_rows_of(client_id) for client_id in ROWS},
            eval_strategy="epoch",
            client_store_dir=str(store) if on_disk else None,
            num_rounds=3,
            **KEPT,
        )
        trainer.train()
        assert seen == [(True, True), (False, False)]
        assert "eve" not in json.dumps(trainer.round_history)
        assert "eve" not in (tmp_path / "out" / "rounds.jsonl").read_text()
        assert trainer.round_history[0]["clients"] == ["ann", "bob"]
        with pytest.raises(ValueError, match="There is no client 'eve'"):
            trainer.client_state_dict("eve")
        for path in tmp_path.rglob("*"):
            assert "eve" not in path.name
            assert path.suffix not in (".json", ".jsonl") or "eve" not in path.read_text(), path

    @pytest.mark.parametrize("on_disk", [False, True])
    def test_without_it_all_stays_but_the_client(self, tmp_path, on_disk):
        store = str(tmp_path / "store") if on_disk else None
        trainer = make_trainer(tmp_path, tuple(ROWS), [goes()], client_store_dir=store)
        trainer.train()
        assert "eve" in inside.client_store(trainer)
        assert "eve" in trainer.round_history[0]["losses"]

    def test_a_stays_as_it_is(self, tmp_path):
        runs = [make_trainer(tmp_path / str(f), tuple(ROWS), [goes(forget=f)]) for f in (False, True)]
        for trainer in runs:
            trainer.train()
        assert_equal(runs[0].shared_state_dict(), runs[1].shared_state_dict())
        for client_id in ("ann", "bob"):
            assert_equal(runs[0].client_state_dict(client_id), runs[1].client_state_dict(client_id))


class TestBetweenRuns:
    def test_a_newcomer_has_no_ones_b(self, tmp_path):
        trainer = make_trainer(tmp_path, ("bob", "eve"), num_rounds=1)
        initial = trainer.client_state_dict("bob")
        trainer.train()
        shared = trainer.shared_state_dict()
        before = {client_id: trainer.client_state_dict(client_id) for client_id in trainer.client_ids}
        trainer.add_client("ann", rows_of("ann"))
        assert trainer.client_ids == ["ann", "bob", "eve"]
        assert_equal(trainer.client_state_dict("ann"), initial)
        assert_equal(trainer.shared_state_dict(), shared)
        for client_id, tensors in before.items():
            assert_equal(trainer.client_state_dict(client_id), tensors)
        with trainer.use_client("ann"):
            pass
        trainer.train()
        assert trainer.round_history[0]["clients"] == ["ann", "bob", "eve"]

    @pytest.mark.parametrize("forget", [False, True])
    def test_the_first_one_leaves_its_b_to_nobody(self, tmp_path, forget):
        trainer = make_trainer(tmp_path, tuple(ROWS), num_rounds=1)
        trainer.train()
        before = {client_id: trainer.client_state_dict(client_id) for client_id in trainer.client_ids}
        trainer.remove_client("ann", forget=forget)
        for client_id in ("bob", "eve"):
            assert_equal(trainer.client_state_dict(client_id), before[client_id])
        held = {
            name.replace(".default.weight", ".weight"): parameter.detach()
            for name, parameter in trainer.model.named_parameters()
            if ".default." in name and "lora_B" in name
        }
        assert_equal(held, {key: before["bob"][key] for key in held})
        trainer.train()
        assert trainer.round_history[0]["clients"] == ["bob", "eve"]

    def test_what_was_written_into_the_model_is_still_the_first_clients(self, tmp_path):
        trainer = make_trainer(tmp_path, ("bob", "eve"), num_rounds=1)
        initial = trainer.client_state_dict("bob")
        trainer.train()
        with torch.no_grad():
            for name, parameter in trainer.model.named_parameters():
                if ".default." in name and "lora_B" in name:
                    parameter.fill_(0.25)
        trainer.add_client("ann", rows_of("ann"))
        assert all((tensor == 0.25).all() for tensor in trainer.client_state_dict("bob").values())
        assert_equal(trainer.client_state_dict("ann"), initial)

    def test_what_was_written_into_the_model_is_not_lost_with_the_first_client(self, tmp_path):
        trainer = make_trainer(tmp_path, tuple(ROWS), num_rounds=1)
        trainer.train()
        with torch.no_grad():
            for name, parameter in trainer.model.named_parameters():
                if ".default." in name and "lora_A" in name:
                    parameter.fill_(0.25)
        trainer.remove_client("ann")
        assert all((tensor == 0.25).all() for tensor in trainer.shared_state_dict().values())

    def test_steps_follow(self, tmp_path):
        trainer = make_trainer(tmp_path, num_rounds=1, local_steps=None, local_epochs=1)
        trainer.train()
        assert trainer.state.global_step == 3
        trainer.add_client("eve", rows_of("eve"))
        trainer.train()
        assert trainer.state.max_steps == trainer.state.global_step > 8
        trainer.remove_client("eve")
        trainer.train()
        assert trainer.state.max_steps == trainer.state.global_step == 3


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    return make_trainer(tmp_path_factory.mktemp("run"), tuple(ROWS), clients_per_round=2, min_clients_per_round=2)


class TestRefused:
    @pytest.fixture(autouse=True)
    def unchanged(self, trainer):
        before = trainer.client_ids, len(trainer.train_dataset), trainer.eval_dataset
        yield
        assert before == (trainer.client_ids, len(trainer.train_dataset), trainer.eval_dataset)

    @pytest.mark.parametrize("name", ["eve", "Eve"])
    def test_a_name_that_is_taken(self, trainer, name):
        with pytest.raises(ValueError, match=r"There is a client 'eve' already|'Eve' .*'eve'|'eve' .*'Eve'"):
            trainer.add_client(name, rows_of("max"))

    def test_a_name_that_is_no_name(self, trainer):
        with pytest.raises(ValueError, match="cannot name a folder"):
            trainer.add_client("../max", rows_of("max"))

    def test_an_unknown_client(self, trainer):
        with pytest.raises(ValueError, match="There is no client 'max'. The clients are: ann, bob, eve"):
            trainer.remove_client("max")

    def test_no_rows(self, trainer):
        with pytest.raises(ValueError, match="Client 'max' has no rows"):
            trainer.add_client("max", rows_of("max").select([]))
        with pytest.raises(TypeError, match="must be a `datasets.Dataset`"):
            trainer.add_client("max", [1])

    def test_rows_of_which_nothing_is_left(self, tmp_path):
        def rows(words):
            return Dataset.from_dict({"prompt": ["the cat " * words] * 4, "completion": ["sat"] * 4})

        trainer = FederatedTrainer(
            model=make_model(),
            args=make_args(tmp_path),
            train_dataset={client_id: rows(2) for client_id in ("ann", "bob")},
            processing_class=make_tokenizer(),
            peft_config=make_lora(),
        )
        with pytest.raises(ValueError, match="Client 'max' has no row left .* `max_length=32`"):
            trainer.add_client("max", rows(40))
        assert trainer.client_ids == ["ann", "bob"]

    def test_other_columns(self, trainer):
        rows = Dataset.from_dict({"prompt": ["the cat"], "completion": ["sat"]})
        with pytest.raises(ValueError, match="'max' have no column `text`"):
            trainer.add_client("max", rows)

    def test_evaluation_rows_that_cannot_be(self, trainer):
        with pytest.raises(ValueError, match="Client 'max' has no rows"):
            trainer.add_client("max", rows_of("max"), rows_of("max").select([]))

    def test_too_few_are_left(self, tmp_path):
        trainer = make_trainer(tmp_path, clients_per_round=2)
        with pytest.raises(ValueError, match="`clients_per_round=2` is more than the 1 clients"):
            trainer.remove_client("ann")
        trainer = make_trainer(tmp_path, min_clients_per_round=2)
        with pytest.raises(ValueError, match="`min_clients_per_round=2` is more than the 1 clients"):
            trainer.remove_client("ann")
        assert trainer.client_ids == ["ann", "bob"]

    def test_nobody_is_left(self, tmp_path):
        trainer = make_trainer(tmp_path)
        trainer.remove_client("ann")
        with pytest.raises(ValueError, match="'bob' is the only client"):
            trainer.remove_client("bob")
        assert trainer.client_ids == ["bob"]

    def test_in_the_middle_of_a_round(self, tmp_path):
        errors = []

        class InRound(FederatedCallback):
            def on_step_end(self, args, state, control, **kwargs):
                if state.global_step == 1:
                    for function in (
                        lambda: trainer.add_client("eve", rows_of("eve")),
                        lambda: trainer.remove_client("ann"),
                    ):
                        with pytest.raises(
                            RuntimeError, match="in the middle of a round. Call it in `on_round_end`"
                        ) as e:
                            function()
                        errors.append(e)

        trainer = make_trainer(tmp_path, callbacks=[InRound()], num_rounds=1)
        trainer.train()
        assert len(errors) == 2 and trainer.client_ids == ["ann", "bob"]

    def test_a_client_without_a_name(self, tmp_path):
        trainer = FederatedTrainer(
            model=make_model(),
            args=make_args(tmp_path),
            train_dataset=rows_of("ann"),
            processing_class=make_tokenizer(),
            peft_config=make_lora(),
        )
        with pytest.raises(ValueError, match="name no client"):
            trainer.add_client("eve", rows_of("eve"))
        with pytest.raises(ValueError, match="name no client"):
            trainer.remove_client("client_0")

    def test_a_newcomer_to_one_that_trains_as_its_trainer_does(self, tmp_path):
        trainer = make_trainer(tmp_path, ("ann",))
        with pytest.raises(ValueError, match="was made with one client, which is trained as its Trainer does"):
            trainer.add_client("eve", rows_of("eve"))
        with pytest.raises(ValueError, match="'ann' is the only client"):
            trainer.remove_client("ann")

    def test_processes_that_go_on_with_the_rows_there_were(self, tmp_path):
        errors = []

        def add(trainer):
            trainer.args.dataloader_persistent_workers = True
            with pytest.raises(ValueError, match="`dataloader_persistent_workers=True`") as error:
                trainer.add_client("eve", rows_of("eve"))
            errors.append(error)

        trainer = make_trainer(tmp_path, callbacks=[After(0, add)], num_rounds=2)
        trainer.train()
        assert errors and trainer.client_ids == ["ann", "bob"]
        trainer.add_client("eve", rows_of("eve"))

    def test_while_a_server_elsewhere_is_served(self, tmp_path):
        errors = []

        def change(trainer):
            for function in (lambda: trainer.add_client("eve", rows_of("eve")), lambda: trainer.remove_client("ann")):
                with pytest.raises(RuntimeError, match="while this worker is at work"):
                    function()
                errors.append(function)

        trainer = make_trainer(
            tmp_path, callbacks=[After(0, change)], num_rounds=None, transport=Elsewhere(tmp_path / "worker")
        )
        trainer.train()
        assert len(errors) == 2 and trainer.state.global_step == 6
        trainer.add_client("eve", rows_of("eve"))
        trainer.train()
        assert trainer.client_ids == ["ann", "bob", "eve"] and trainer.state.global_step == 12

    def test_fewer_rows_than_a_batch(self, tmp_path):
        trainer = make_trainer(tmp_path, dataloader_drop_last=True)
        with pytest.raises(ValueError, match="Client 'eve' has 1 rows, fewer than one batch of 2"):
            trainer.add_client("eve", rows_of("eve").select([0]))
        assert trainer.client_ids == ["ann", "bob"]
        trainer.add_client("eve", rows_of("eve"))


class TestSaved:
    def test_the_folder_has_the_clients_that_there_are(self, tmp_path):
        make_model().save_pretrained(tmp_path / "base")
        make_tokenizer().save_pretrained(tmp_path / "base")
        trainer = FederatedTrainer(
            model=str(tmp_path / "base"),
            args=make_args(tmp_path / "out", optim="sgd", num_rounds=3),
            train_dataset={client_id: rows_of(client_id) for client_id in ("ann", "bob")},
            peft_config=make_lora(),
            callbacks=[comes(after=0), goes("bob", after=1)],
        )
        trainer.train()
        trainer.save_model()
        saved = json.loads((tmp_path / "out" / "federation.json").read_text())
        assert sorted(saved["clients"]) == ["ann", "eve"]
        assert sorted(path.name for path in (tmp_path / "out" / "clients").iterdir()) == ["ann", "eve"]
        model = load_personalized_model(tmp_path / "out", "eve")
        inputs = make_tokenizer()("the cat sat", return_tensors="pt")
        with torch.no_grad(), trainer.use_client("eve") as own:
            assert torch.allclose(model(**inputs).logits, own(**inputs).logits, atol=1e-5)
        with pytest.raises(ValueError, match="bob"):
            load_personalized_model(tmp_path / "out", "bob")

    def test_who_is_gone_is_not_published(self, tmp_path, hub):
        trainer = make_trainer(tmp_path, tuple(ROWS), num_rounds=1, hub_clients=["bob", "eve"])
        trainer.train()
        trainer.remove_client("bob")
        trainer.push_to_hub("me/fed")
        assert clients_on(hub) == {"eve"}
        trainer.add_client("max", rows_of("max"))
        trainer.push_to_hub("me/fed", clients="all")
        assert clients_on(hub) == {"ann", "eve", "max"}
        with pytest.raises(ValueError, match="`hub_clients` names 'bob', which is not a client"):
            trainer.push_to_hub("me/fed", clients=["bob"])

    @pytest.mark.parametrize("on_disk", [False, True])
    def test_a_checkpoint_is_that_of_the_clients_there_were(self, tmp_path, on_disk):
        def kwargs(name):
            return {
                "save_strategy": "epoch",
                "client_store_dir": str(tmp_path / f"store_{name}") if on_disk else None,
                **KEPT,
            }

        class Stop(Exception):
            pass

        def stop(trainer):
            raise Stop

        whole = make_trainer(tmp_path / "whole", callbacks=[comes(), goes("bob", after=1)], **kwargs("whole"))
        whole.train()
        callbacks = [comes(), goes("bob", after=1), After(2, stop)]
        killed = make_trainer(tmp_path / "killed", callbacks=callbacks, **kwargs("killed"))
        with pytest.raises(Stop):
            killed.train()
        resumed = make_trainer(tmp_path / "killed", ("ann", "eve"), **kwargs("killed"))
        resumed.train(resume_from_checkpoint=True)
        assert [record["clients"] for record in resumed.round_history] == [["ann", "bob"]] * 2 + [["ann", "eve"]] * 2
        assert_same_run(whole, resumed)
        assert resumed.state.global_step == whole.state.global_step == resumed.state.max_steps

    def test_a_checkpoint_from_before_a_client_came(self, tmp_path):
        class Stop(Exception):
            pass

        def stop(trainer):
            raise Stop

        kwargs = {"save_strategy": "epoch", "client_store_dir": str(tmp_path / "store")}
        killed = make_trainer(tmp_path / "run", callbacks=[comes(after=1), After(1, stop)], **kwargs)
        with pytest.raises(Stop):
            killed.train()
        assert json.loads((tmp_path / "store" / "run.json").read_text())["client_ids"] == ["ann", "bob", "eve"]
        resumed = make_trainer(tmp_path / "run", **kwargs)
        resumed.train(resume_from_checkpoint=True)
        assert resumed.round_history[-1]["clients"] == ["ann", "bob"]
