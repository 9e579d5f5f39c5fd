"""However many clients of a round a transport brings at a time, the same updates come back."""

import dataclasses

import inside
import pytest
from conftest import make_args, make_lora, make_model, make_rows, make_tokenizer, max_difference

from hf_fedsa import FederatedCallback, FederatedTrainer
from hf_fedsa.server import Server, ServerSettings

NAMES = [f"client_{i}" for i in range(5)]


class AFewAtATime:
    """A server elsewhere that asks `size` clients at a time to train in its round."""

    def __init__(self, folder, size, num_rounds=2):
        self.folder, self.size, self.num_rounds = folder, size, num_rounds
        self.server, self.left, self.updates, self.closed = None, [], [], False

    def connect(self, host):
        infos = {info.client_id: info for info in host.client_infos()}
        settings = ServerSettings(seed=42, num_rounds=self.num_rounds)
        shared = {key: tensor.float() for key, tensor in host.shared_like().items()}
        self.server = Server(shared, infos, settings, run_id="run")

    def expected_rounds(self):
        return None

    def check_plan(self, rounds):
        pass

    def open_round(self):
        if not self.left:
            if self.server.state.open is not None:
                self.server.end_round(seconds=0.0)
            if self.server.state.rounds_done == self.num_rounds:
                return None
            self.left = list(self.server.begin_round()[0])
        here, self.left = self.left[: self.size], self.left[self.size :]
        return tuple(here), self.server.begin_round()[1]

    def send(self, update):
        self.updates.append(update)
        assert self.server.receive(update) is None

    def close_round(self, seconds, step):
        return None

    def close(self):
        self.closed = True


def train(folder, size, parallel_clients=2, **kwargs):
    transport = AFewAtATime(folder / "worker", size)
    values = {"optim": "sgd", "learning_rate": 0.5, "lr_scheduler_type": "cosine", "num_rounds": None, **kwargs}
    trainer = FederatedTrainer(
        model=make_model(),
        args=make_args(folder, parallel_clients=parallel_clients, **values),
        train_dataset={name: make_rows(2 + 2 * i, seed=i) for i, name in enumerate(NAMES)},
        processing_class=make_tokenizer(),
        peft_config=make_lora(),
        transport=transport,
    )
    trainer.train()
    assert transport.closed
    return trainer, transport


@pytest.mark.parametrize("work", [{"local_steps": 3}, {"local_steps": None, "local_epochs": 1}])
def test_any_set_of_clients_gives_the_same_updates(tmp_path, work):
    runs = {size: train(tmp_path / str(size), size, **work) for size in (1, 2, 5)}
    expected = {(u.round_index, u.client_id): u for u in runs[1][1].updates}
    assert len(expected) == 10
    for trainer, transport in runs.values():
        found = {(u.round_index, u.client_id): u for u in transport.updates}
        assert found.keys() == expected.keys()
        for key, update in found.items():
            assert max_difference(update.shared, expected[key].shared) < 1e-6
            assert (update.weight, update.num_steps) == (expected[key].weight, expected[key].num_steps)
            assert update.metrics["loss"] == pytest.approx(expected[key].metrics["loss"], abs=1e-5)
        for name in NAMES:
            both = trainer.client_state_dict(name), runs[1][0].client_state_dict(name)
            assert max_difference(*both) < 1e-6
        rates = [line["learning_rate"] for line in trainer.state.log_history if "learning_rate" in line]
        assert rates[0] == 0.5 and min(rates) < 0.25, "every wave of the first round begins at the first rate"


def test_a_set_larger_than_the_slots_trains_in_waves(tmp_path):
    one, _ = train(tmp_path / "one", size=5, parallel_clients=1)
    all_, _ = train(tmp_path / "all", size=5, parallel_clients=5)
    assert one.state.global_step == 5 * all_.state.global_step == 30
    for name in NAMES:
        assert max_difference(one.client_state_dict(name), all_.client_state_dict(name)) < 1e-6


def test_in_process_is_a_server_elsewhere_that_asks_all_at_once(tmp_path):
    elsewhere, transport = train(tmp_path / "elsewhere", size=5)
    here = FederatedTrainer(
        model=make_model(),
        args=make_args(
            tmp_path / "here", parallel_clients=2, optim="sgd", learning_rate=0.5, lr_scheduler_type="cosine"
        ),
        train_dataset={name: make_rows(2 + 2 * i, seed=i) for i, name in enumerate(NAMES)},
        processing_class=make_tokenizer(),
        peft_config=make_lora(),
    )
    here.train()
    assert max_difference(here.shared_state_dict(), transport.server.shared) == 0
    for name in NAMES:
        assert max_difference(here.client_state_dict(name), elsewhere.client_state_dict(name)) == 0
    for record, other in zip(here.round_history, transport.server.state.history, strict=True):
        assert {**record, "seconds": 0, "step": 0} == {**other, "seconds": 0, "step": 0}


def test_rounds_that_do_not_count_one_after_the_other_leave_b_as_it_was(tmp_path):
    class Loses(AFewAtATime):
        def send(self, update):
            if update.round_index in (1, 2):
                lost = dataclasses.replace(update, shared={}, fault="it was lost on the way")
                assert self.server.receive(lost) == "it was lost on the way"
            else:
                super().send(update)

    class Watch(FederatedCallback):
        ended: dict = {}

        def on_round_end(self, args, state, control, metrics, trainer, **kwargs):
            self.ended[metrics["round"]] = trainer.client_state_dict("client_3")

    watch = Watch()
    transport = Loses(tmp_path / "worker", size=5, num_rounds=4)
    trainer = FederatedTrainer(
        model=make_model(),
        args=make_args(
            tmp_path,
            num_rounds=None,
            reset_optimizer=False,
            lr_scheduler_type="constant",
            train_sampling_strategy="sequential",
        ),
        train_dataset={"client_3": make_rows(8, seed=3)},
        processing_class=make_tokenizer(),
        peft_config=make_lora(),
        transport=transport,
        callbacks=[watch],
    )
    trainer.train()
    assert [record["counted"] for record in transport.server.state.history] == [True, False, False, True]
    store = inside.client_store(trainer)
    assert store.rounds("client_3") == [0, 3]
    assert max_difference(store.get("client_3", 0), watch.ended[0]) == 0
    assert max_difference(watch.ended[1], watch.ended[2]) == 0, "both began from the same A, B and optimizer state"
    assert max_difference(watch.ended[3], watch.ended[0]) > 0
