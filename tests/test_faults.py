"""What goes wrong in a round, and what of it the federation feels."""

import json
import math
import resource

import inside
import pytest
import torch
from conftest import make_args, make_lora, make_model, make_rows, make_tokenizer, max_difference
from transformers import TrainerCallback

from hf_fedsa import FederatedTrainer, load_personalized_model


@pytest.fixture
def base_dir(tmp_path):
    make_model().save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


class Corrupt(TrainerCallback):
    """Writes a value into the tensors of one client at the end of a step, as a diverged client has it."""

    def __init__(self, client_id, value, kind="lora_B", step=2):
        self.client_id, self.value, self.kind, self.step = client_id, value, kind, step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step and self.client_id in inside.clients_in_slots(self.trainer):
            slot = inside.slot_of(self.trainer, self.client_id)
            with torch.no_grad():
                for key, parameter in inside.slot_parameters(self.trainer, slot).items():
                    if self.kind in key:
                        parameter.fill_(self.value) if self.value != self.value else parameter.mul_(self.value)


def make_trainer(base_dir, output_dir, clients=None, callback=None, **kwargs):
    trainer = FederatedTrainer(
        model=base_dir,
        args=make_args(output_dir, **kwargs),
        train_dataset=clients or {f"client_{i}": make_rows(8, seed=i) for i in range(3)},
        peft_config=make_lora(),
    )
    if callback is not None:
        callback.trainer = trainer
        trainer.add_callback(callback)
    return trainer


class TestLeftOut:
    # Sums are taken in another order with other neighbours. Adam would make full steps of what that changes.
    SUMMED = {"num_rounds": 1, "optim": "sgd", "learning_rate": 0.5}

    @pytest.mark.parametrize("parallel_clients", [1, 3])
    @pytest.mark.parametrize(
        ("value", "kind", "reason"),
        [(math.nan, "lora_B", "its loss is nan"), (1e6, "lora_A", "times the median of the round's 3 clients")],
    )
    def test_the_others_train_as_if_it_were_not_there(
        self, base_dir, tmp_path, caplog, parallel_clients, value, kind, reason
    ):
        step = 2 if parallel_clients == 3 else 5  # The second client's last step of the round.
        trainer = make_trainer(
            base_dir,
            tmp_path / "faulty",
            callback=Corrupt("client_1", value, kind, step),
            parallel_clients=parallel_clients,
            **self.SUMMED,
        )
        trainer.train()
        others = {f"client_{i}": make_rows(8, seed=i) for i in (0, 2)}
        expected = make_trainer(base_dir, tmp_path / "others", others, parallel_clients=1, **self.SUMMED)
        expected.train()
        assert max_difference(trainer.shared_state_dict(), expected.shared_state_dict()) < 1e-6
        for client_id in others:
            found, wanted = (t.client_state_dict(client_id) for t in (trainer, expected))
            assert max_difference(found, wanted) < 1e-6
            assert max(tensor.abs().max() for tensor in wanted.values()) > 1e-2
        entry = trainer.round_history[0]
        assert list(entry["left_out"]) == ["client_1"]
        assert reason in entry["left_out"]["client_1"]
        assert entry["clients"] == ["client_0", "client_2"]
        assert "Client client_1 is left out of round 0" in caplog.text
        logged = next(line for line in trainer.state.log_history if "round" in line)
        assert logged["round_clients_left_out"] == 1
        assert math.isfinite(logged["round_loss"])

    def test_its_b_is_put_back_and_it_may_come_back(self, base_dir, tmp_path):
        states = {}

        class Watch(TrainerCallback):
            def on_epoch_end(self, args, state, control, **kwargs):
                states[round(state.epoch)] = trainer.client_state_dict("client_1")

        trainer = make_trainer(base_dir, tmp_path, callback=Corrupt("client_1", math.nan, step=4), num_rounds=3)
        trainer.add_callback(Watch())
        trainer.train()
        assert max_difference(states[1], states[2]) == 0
        assert max_difference(states[2], states[3]) > 0
        assert all(torch.isfinite(tensor).all() for tensor in states[3].values())
        assert [list(entry["left_out"]) for entry in trainer.round_history] == [[], ["client_1"], []]
        assert trainer.round_history[2]["staleness"] == {"client_0": 1, "client_1": 2, "client_2": 1}

    def test_the_optimizer_state_of_a_client_is_put_back_too(self, base_dir, tmp_path):
        trainer = make_trainer(
            base_dir, tmp_path, callback=Corrupt("client_1", math.nan, step=4), num_rounds=3, reset_optimizer=False
        )
        trainer.train()
        assert all(torch.isfinite(tensor).all() for tensor in trainer.client_state_dict("client_1").values())

    def test_an_update_that_is_not_finite(self, base_dir, tmp_path):
        class AfterTheLastLoss(Corrupt):
            def on_optimizer_step(self, args, state, control, **kwargs):
                super().on_step_begin(args, state, control)

            def on_step_begin(self, args, state, control, **kwargs):
                pass

        trainer = make_trainer(base_dir, tmp_path, callback=AfterTheLastLoss("client_1", math.nan), num_rounds=1)
        trainer.train()
        assert trainer.round_history[0]["left_out"] == {"client_1": "its update is not finite"}

    def test_no_limit(self, base_dir, tmp_path):
        trainer = make_trainer(
            base_dir, tmp_path, callback=Corrupt("client_1", 1e3, "lora_A"), num_rounds=1, max_update_norm=None
        )
        trainer.train()
        assert trainer.round_history[0]["left_out"] == {}

    def test_resumed_in_the_middle_of_the_round(self, base_dir, tmp_path):
        def make(output_dir):
            return make_trainer(
                base_dir,
                output_dir,
                Unreadable.clients(),
                num_rounds=2,
                save_strategy="steps",
                save_steps=1,
                parallel_clients=3,
            )

        whole = make(tmp_path / "whole")
        Unreadable.install(whole, "client_1", only_round=0)
        whole.train()
        again = make(tmp_path / "whole")
        Unreadable.install(again, "client_1", only_round=-1)
        again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
        assert list(again.round_history[0]["left_out"]) == ["client_1"]
        # Its rows can be read again, and the others' are padded to them.
        assert max_difference(again.shared_state_dict(), whole.shared_state_dict()) < 1e-5

    def test_all_of_them_is_an_error_and_nothing_saved_is_replaced(self, base_dir, tmp_path):
        class All(Corrupt):
            def on_step_begin(self, args, state, control, **kwargs):
                for client_id in ("client_0", "client_1", "client_2"):
                    self.client_id = client_id
                    super().on_step_begin(args, state, control)

        trainer = make_trainer(
            base_dir, tmp_path / "out", callback=All("", math.nan, step=5), num_rounds=3, save_strategy="epoch"
        )
        with pytest.raises(RuntimeError, match="All 3 clients of round 1 were left out, such as 'client_0': its loss"):
            trainer.train()
        assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-3"]
        assert all(torch.isfinite(tensor).all() for tensor in trainer.shared_state_dict().values())
        again = make_trainer(base_dir, tmp_path / "out", num_rounds=3)
        again.train(resume_from_checkpoint=True)
        assert len(again.round_history) == 3


class Attacker(TrainerCallback):
    """Makes the change of A that one client returns, in every round, 99 times as large as the A it was sent."""

    def __init__(self, client_id, last_step):
        self.client_id, self.last_step = client_id, last_step

    def on_optimizer_step(self, args, state, control, **kwargs):
        slot = inside.slot_of(self.trainer, self.client_id)
        if slot is not None and inside.wave_steps(self.trainer) == self.last_step:
            with torch.no_grad():
                for parameter in inside.slot_parameters(self.trainer, slot, "shared").values():
                    parameter.mul_(100)


class TestOutliers:
    # At the higher rate the honest clients' changes are of the size of A, so they are held back too.
    @pytest.mark.parametrize("rate", [0.5, 20.0])
    def test_one_of_five_is_left_out_in_every_round_whoever_trains_beside_it(self, base_dir, tmp_path, rate):
        clients = {f"client_{i}": make_rows(8, seed=i) for i in range(5)}
        common = {"num_rounds": 3, "local_steps": 2, "optim": "sgd", "learning_rate": rate, "max_grad_norm": 1.0}
        honest = {client_id: rows for client_id, rows in clients.items() if client_id != "client_1"}
        expected = make_trainer(base_dir, tmp_path / "honest", honest, **common)
        expected.train()
        assert all(entry["left_out"] == {} for entry in expected.round_history)
        for parallel in (1, 5):
            trainer = make_trainer(
                base_dir,
                tmp_path / f"out-{parallel}",
                clients,
                Attacker("client_1", last_step=1),
                parallel_clients=parallel,
                **common,
            )
            trainer.train()
            assert [list(entry["left_out"]) for entry in trainer.round_history] == [["client_1"]] * 3
            assert max_difference(trainer.shared_state_dict(), expected.shared_state_dict()) < 1e-4 * max(1, rate)
            assert not inside.updates_held_back(trainer)

    def test_it_is_judged_alike_after_a_resume_in_the_middle_of_the_round(self, base_dir, tmp_path):
        def make(output_dir):
            return make_trainer(
                base_dir,
                output_dir,
                callback=Attacker("client_0", last_step=1),
                num_rounds=2,
                local_steps=2,
                learning_rate=0.3,
                reset_optimizer=False,
                save_strategy="steps",
                save_steps=4,
                parallel_clients=1,
            )

        whole = make(tmp_path / "whole")
        whole.train()
        state = json.loads((tmp_path / "whole" / "checkpoint-4" / "federation_state" / "state.json").read_text())
        assert len(state["server"]["open"]["held"]) == 2
        again = make(tmp_path / "again")
        again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
        assert max_difference(again.shared_state_dict(), whole.shared_state_dict()) == 0
        for one, other in zip(whole.round_history, again.round_history, strict=True):
            assert one["left_out"] == other["left_out"]
            assert list(one["left_out"]) == ["client_0"]
        for client_id in whole.client_ids:
            assert max_difference(again.client_state_dict(client_id), whole.client_state_dict(client_id)) == 0


class TestLogs:
    @pytest.mark.parametrize("parallel_clients", [1, 3])
    def test_the_losses_of_the_others_are_logged(self, base_dir, tmp_path, parallel_clients):
        corrupt = Corrupt("client_1", math.nan, step=0 if parallel_clients == 3 else 3)
        trainer = make_trainer(base_dir, tmp_path, callback=corrupt, num_rounds=1, parallel_clients=parallel_clients)
        output = trainer.train()
        losses = list(trainer.round_history[0]["losses"].values())
        assert len(losses) == 2
        assert output.training_loss == pytest.approx(sum(losses) / 2)
        if parallel_clients == 3:
            logged = [line for line in trainer.state.log_history if "loss" in line]
            assert sum(line["loss"] for line in logged) / 3 == pytest.approx(sum(losses) / 2, abs=1e-3)
            assert all(0 < line["grad_norm"] < math.inf for line in logged)

    def test_a_bad_clients_overflows_do_not_shrink_the_next_ones_loss_scale(self, base_dir, tmp_path):
        trainer = make_trainer(
            base_dir, tmp_path, callback=Corrupt("client_1", math.nan, step=3), num_rounds=1, parallel_clients=1
        )
        scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
        trainer.accelerator.scaler = scaler
        scales = []

        class Record(TrainerCallback):
            def on_step_end(self, *args, **kwargs):
                scales.append(scaler.get_scale())

        trainer.add_callback(Record())
        trainer.create_optimizer()
        trainer.train()
        assert list(trainer.round_history[0]["left_out"]) == ["client_1"]
        assert scales[2] == 16 and scales[4] < 16, "nothing overflowed, so nothing is tested"
        assert scales[5:] == [16.0] * 4


class Unreadable:
    """Rows that raise when they are read, as those on a disk that has gone do."""

    @staticmethod
    def clients(num_rows=8):
        return {f"client_{i}": make_rows(num_rows, seed=i) for i in range(3)}

    @staticmethod
    def install(trainer, client_id, only_round=None, only_row=None):
        rows = inside.rows_of(trainer, client_id)
        rows = set(rows if only_row is None else [rows[only_row]])

        def read(batch):
            numbers = batch.pop("number")
            now = len(trainer.round_history)
            if rows & set(numbers) and only_round in (None, now):
                raise OSError("the disk is gone")
            return batch

        dataset = trainer.train_dataset
        trainer.train_dataset = dataset.add_column("number", list(range(len(dataset))))
        trainer.args.remove_unused_columns = False
        trainer.train_dataset.set_transform(read)


class TestUnreadableRows:
    @pytest.mark.parametrize("parallel_clients", [1, 3])
    def test_the_client_is_left_out_for_the_round_and_comes_back(self, base_dir, tmp_path, caplog, parallel_clients):
        trainer = make_trainer(
            base_dir, tmp_path, Unreadable.clients(), num_rounds=3, parallel_clients=parallel_clients
        )
        Unreadable.install(trainer, "client_1", only_round=1)
        trainer.train()
        history = trainer.round_history
        assert [list(entry["left_out"]) for entry in history] == [[], ["client_1"], []]
        # What an exception says may quote rows and paths, and this entry is published.
        assert history[1]["left_out"]["client_1"] == "its rows cannot be read (OSError)"
        assert "Rows of client client_1 cannot be read: OSError: the disk is gone" in caplog.text
        assert "disk is gone" not in (tmp_path / "rounds.jsonl").read_text()
        assert "Client client_1 is left out of round 1" in caplog.text
        assert history[2]["clients"] == ["client_0", "client_1", "client_2"]

    def test_one_row_is_enough(self, base_dir, tmp_path):
        trainer = make_trainer(
            base_dir, tmp_path, Unreadable.clients(), num_rounds=1, local_steps=None, local_epochs=1
        )
        Unreadable.install(trainer, "client_2", only_row=3)
        trainer.train()
        assert list(trainer.round_history[0]["left_out"]) == ["client_2"]

    def test_the_others_do_not_feel_it(self, base_dir, tmp_path):
        trainer = make_trainer(base_dir, tmp_path / "a", Unreadable.clients(), num_rounds=1)
        Unreadable.install(trainer, "client_1")
        trainer.train()
        others = {name: rows for name, rows in Unreadable.clients().items() if name != "client_1"}
        expected = make_trainer(base_dir, tmp_path / "b", others, num_rounds=1)
        expected.train()
        assert max_difference(trainer.shared_state_dict(), expected.shared_state_dict()) < 1e-6

    def test_all_of_them(self, base_dir, tmp_path, caplog):
        trainer = make_trainer(base_dir, tmp_path, Unreadable.clients(), num_rounds=1)
        for client_id in trainer.client_ids:
            rows = inside.rows_of(trainer, client_id)
            assert rows

        def read(batch):
            raise OSError("the disk is gone")

        trainer.train_dataset.set_transform(read)
        message = r"All 3 clients of round 0 were left out.*cannot be read \(OSError\).*the log says why"
        with pytest.raises(RuntimeError, match=message):
            trainer.train()
        assert "OSError: the disk is gone" in caplog.text


class TestMinimum:
    def test_a_round_of_too_few_does_not_move_a(self, base_dir, tmp_path, caplog):
        trainer = make_trainer(
            base_dir, tmp_path, callback=Corrupt("client_1", math.nan), num_rounds=2, min_clients_per_round=3
        )
        before = trainer.shared_state_dict()
        seen = {}

        class Watch(TrainerCallback):
            def on_epoch_end(self, args, state, control, **kwargs):
                seen[round(state.epoch)] = trainer.shared_state_dict()

        trainer.add_callback(Watch())
        trainer.train()
        assert [entry["counted"] for entry in trainer.round_history] == [False, True]
        assert max_difference(seen[1], before) == 0
        assert max_difference(seen[2], before) > 0
        assert "Round 0 does not count: 2 clients returned an update" in caplog.text
        assert any(tensor.any() for tensor in trainer.client_state_dict("client_0").values())

    @pytest.mark.parametrize("parallel_clients", [1, 3])
    def test_a_round_of_too_few_leaves_every_client_as_it_was(self, base_dir, tmp_path, parallel_clients):
        clients, optimizers = [], []

        class Watch(TrainerCallback):
            def on_epoch_end(self, args, state, control, **kwargs):
                clients.append({c: trainer.client_state_dict(c) for c in trainer.client_ids})
                optimizers.append(inside.kept_optimizer_states(trainer))

        trainer = make_trainer(
            base_dir,
            tmp_path,
            callback=Corrupt("client_1", math.nan, step=4 if parallel_clients == 3 else 13),
            num_rounds=3,
            min_clients_per_round=3,
            parallel_clients=parallel_clients,
            reset_optimizer=False,
        )
        trainer.add_callback(Watch())
        trainer.train()
        assert [entry["counted"] for entry in trainer.round_history] == [True, False, True]
        for seen in (clients, optimizers):
            assert all(len(part) == 3 for part in seen)
            for client_id in trainer.client_ids:
                assert max_difference(seen[1][client_id], seen[0][client_id]) == 0
                assert max_difference(seen[2][client_id], seen[1][client_id]) > 0
        assert set(trainer.round_history[2]["staleness"].values()) == {2}

    def test_more_than_a_round_has(self, base_dir, tmp_path):
        with pytest.raises(ValueError, match="`min_clients_per_round=3` is more than the 2 clients of a round"):
            make_trainer(base_dir, tmp_path, min_clients_per_round=3, clients_per_round=2)


class TestMemory:
    def test_the_message_says_what_to_lower(self, base_dir, tmp_path):
        class Full(TrainerCallback):
            def on_step_begin(self, args, state, control, model, **kwargs):
                def forward(*args, **kwargs):
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

                model.forward = forward

        trainer = make_trainer(base_dir, tmp_path, parallel_clients=3)
        trainer.add_callback(Full())
        with pytest.raises(
            torch.OutOfMemoryError, match="3 clients side by side.*Lower `parallel_clients` first.*2 GiB"
        ):
            trainer.train()

    def test_other_errors_are_passed_on(self, base_dir, tmp_path):
        class Broken(TrainerCallback):
            def on_step_begin(self, args, state, control, model, **kwargs):
                def forward(*args, **kwargs):
                    raise RuntimeError("a bug")

                model.forward = forward

        trainer = make_trainer(base_dir, tmp_path)
        trainer.add_callback(Broken())
        with pytest.raises(RuntimeError, match="^a bug$"):
            trainer.train()


class TestSampling:
    def test_a_function_of_the_users(self, base_dir, tmp_path):
        def odd_and_even(round_index, num_rows, clients_per_round):
            assert num_rows == {"client_0": 8, "client_1": 8, "client_2": 8}
            return ["client_1"] if round_index % 2 else ["client_0", "client_2"]

        trainer = FederatedTrainer(
            model=base_dir,
            args=make_args(tmp_path, num_rounds=3),
            train_dataset=Unreadable.clients(),
            peft_config=make_lora(),
            client_sampler=odd_and_even,
        )
        trainer.train()
        assert [entry["clients"] for entry in trainer.round_history] == [
            ["client_0", "client_2"],
            ["client_1"],
            ["client_0", "client_2"],
        ]

    def test_by_the_number_of_rows(self, base_dir, tmp_path):
        clients = {"large": make_rows(40, 0), "small": make_rows(2, 1), "tiny": make_rows(1, 2)}
        trainer = make_trainer(
            base_dir, tmp_path, clients, num_rounds=12, local_steps=1, clients_per_round=1, client_sampling="examples"
        )
        trainer.train()
        drawn = [entry["clients"][0] for entry in trainer.round_history]
        assert drawn.count("large") >= 9

    def test_staleness_is_reported(self, base_dir, tmp_path):
        trainer = FederatedTrainer(
            model=base_dir,
            args=make_args(tmp_path, num_rounds=4, local_steps=1),
            train_dataset=Unreadable.clients(),
            peft_config=make_lora(),
            client_sampler=lambda t, rows, k: ["client_1", "client_2"] if t in (0, 3) else ["client_2"],
        )
        trainer.train()
        assert [entry["staleness"] for entry in trainer.round_history] == [
            {"client_1": None, "client_2": None},
            {"client_2": 1},
            {"client_2": 1},
            {"client_1": 3, "client_2": 1},
        ]
        last = [line for line in trainer.state.log_history if "round" in line][-1]
        assert (last["round_staleness"], last["round_staleness_worst"]) == (2.0, 3)
        lines = [json.loads(line) for line in (tmp_path / "rounds.jsonl").read_text().splitlines()]
        assert lines[-1]["staleness"] == {"client_1": 3, "client_2": 1}


def test_left_out_clients_are_not_named_on_the_hub(hub, base_dir, tmp_path):
    trainer = make_trainer(
        base_dir, tmp_path / "out", callback=Corrupt("client_1", math.nan), num_rounds=1, hub_base_model="me/base"
    )
    trainer.train()
    trainer.push_to_hub("me/fed", clients=["client_0"])
    sent = b"".join(content for _, content in [*hub.uploaded_files(), *hub.uploaded_samples()])
    assert b"client_0" in sent
    assert b"client_1" not in sent
    assert json.loads(hub.files("me/fed")["rounds.jsonl"])["left_out"] == {}


class TestFullDisk:
    """The kernel refuses to let files grow, which is as close to a full disk as a test can come without one."""

    class Fill(TrainerCallback):
        def __init__(self, step, limit):
            self.step, self.limit = step, limit

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == self.step:
                _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
                resource.setrlimit(resource.RLIMIT_FSIZE, (self.limit, hard))

    @pytest.fixture(autouse=True)
    def unlimited(self):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        yield
        resource.setrlimit(resource.RLIMIT_FSIZE, before)

    @pytest.mark.parametrize("limit", [20_000, 60_000])
    def test_the_last_good_checkpoint_stays(self, base_dir, tmp_path, limit):
        def make(folder):
            return make_trainer(base_dir, tmp_path / folder, num_rounds=3, save_strategy="epoch", save_total_limit=1)

        whole = make("whole")
        whole.train()
        full = make("full")
        full.add_callback(self.Fill(6, limit))
        with pytest.raises(
            OSError, match="checkpoint-6 could not be written: .*checkpoint-3 is whole.*save_total_limit"
        ):
            full.train()
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        assert sorted(path.name for path in (tmp_path / "full").glob("checkpoint-*")) == ["checkpoint-3"]
        again = make("full")
        again.train(resume_from_checkpoint=True)
        assert max_difference(again.shared_state_dict(), whole.shared_state_dict()) == 0

    def test_what_was_saved_before_stays(self, base_dir, tmp_path):
        trainer = make_trainer(base_dir, tmp_path, num_rounds=1)
        trainer.save_model()
        before = {path: path.read_bytes() for path in tmp_path.rglob("*.safetensors")}
        trainer.train()
        resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, resource.RLIM_INFINITY))
        with pytest.raises(OSError, match="adapter_model.safetensors could not be written.*Is the disk full"):
            trainer.save_model()
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        assert {path: path.read_bytes() for path in tmp_path.rglob("*.safetensors")} == before
        assert not list(tmp_path.rglob(".*"))
        for client_id in trainer.client_ids:
            load_personalized_model(tmp_path, client_id, base_model=make_model())
