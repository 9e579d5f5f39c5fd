"""One federation in several processes: the weights of one process, and nothing of a client but A on the wire."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import inside
import pytest
from conftest import max_difference, plan_round
from federation_run import CLIENTS, make_clients, make_trainer, report
from safetensors.torch import load_file

from hf_fedsa import processes
from hf_fedsa.client.waves import LocalWork
from hf_fedsa.server.sampling import sample_clients

# Sums are taken in another order by several processes. Adam would make full steps of what that changes.
SUMMED = {"optim": "sgd", "learning_rate": 0.5}
RUN = Path(__file__).parent / "federation_run.py"


def command(folder, processes, arguments):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return [*launcher, str(RUN), str(folder), json.dumps(arguments)]


def environment():
    return {**os.environ, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}


def launch(folder, processes, **arguments):
    folder.mkdir(exist_ok=True)
    done = subprocess.run(
        command(folder, processes, arguments), capture_output=True, text=True, timeout=300, env=environment()
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done


def alone(folder, resume=None, **arguments):
    folder.mkdir(exist_ok=True)
    trainer = make_trainer(folder, **arguments)
    trainer.train(resume_from_checkpoint=resume)
    report(trainer, folder)


def ends(folder, rank=0):
    return load_file(folder / f"end-{rank}.safetensors"), json.loads((folder / f"end-{rank}.json").read_text())


@pytest.mark.parametrize(
    ("processes", "arguments"),
    [
        (2, {"num_rounds": 2, "local_steps": 3, "parallel_clients": 2, **SUMMED}),
        (
            3,
            {
                "num_rounds": 3,
                "local_epochs": 1,
                "local_steps": None,
                "clients_per_round": 4,
                "parallel_clients": 1,
                **SUMMED,
            },
        ),
    ],
    ids=["two", "three"],
)
def test_the_weights_of_one_process(tmp_path, processes, arguments):
    alone(tmp_path / "one", looks=True, **arguments)
    launch(tmp_path / "many", processes, looks=True, **arguments)
    expected, told = ends(tmp_path / "one")
    middles = [ends(tmp_path / "many", rank)[1]["middle"] for rank in range(processes)]
    for middle in [told["middle"], *middles]:
        for client_id, loss in middle["known"].items():
            assert loss == pytest.approx(middle["losses"][client_id], abs=1e-6)
    assert [*told["middle"]["known"]] == [*told["middle"]["losses"]] == [*CLIENTS]
    assert all(middle["losses"] == middles[0]["losses"] for middle in middles)
    for client_id in CLIENTS:
        knowing = [client_id in middle["known"] for middle in middles]
        assert sum(knowing) == (1 if client_id in told["history"][0]["clients"] else processes)
    for rank in range(processes):
        found, also_told = ends(tmp_path / "many", rank)
        assert max_difference(found, expected) < 1e-6
        trained = {key: tensor for key, tensor in found.items() if "lora_B" in key}
        assert max(tensor.abs().max() for tensor in trained.values()) > 1e-2
        for ours, theirs in zip(also_told["history"], told["history"], strict=True):
            for name in ("round", "clients", "weights", "bytes_up", "bytes_down", "staleness", "counted"):
                assert ours[name] == theirs[name]
            assert ours["losses"] == pytest.approx(theirs["losses"], abs=1e-5)
        for name in ("train_loss", "train_samples"):
            assert also_told["run"][name] == pytest.approx(told["run"][name], rel=1e-2)
        assert {f"eval_{client_id}_mean_token_accuracy" for client_id in CLIENTS} <= told["metrics"].keys()
        losses = {key: value for key, value in told["metrics"].items() if key.endswith(("_loss", "_entropy"))}
        assert {key: also_told["metrics"][key] for key in losses} == pytest.approx(losses, abs=1e-5)
    saved = [sorted(p.relative_to(f).as_posix() for p in f.rglob("adapter_*")) for f in tmp_path.glob("*")]
    assert saved[0] == saved[1] and len(saved[0]) == 2 * (len(CLIENTS) + 1)


def test_nothing_but_sums_of_a_crosses(tmp_path):
    launch(tmp_path, 2, num_rounds=2, local_steps=2, record=True)
    expected, _ = ends(tmp_path)
    size = sum(tensor.numel() for key, tensor in expected.items() if key.startswith("shared|"))
    calls = [json.loads(line) for line in (tmp_path / "collectives-0.jsonl").read_text().splitlines()]
    # Beside them, the Trainer gathers one loss per process for its log.
    assert [call["numbers"] for call in calls if call["numbers"] > 1] == [size + 1] * 2
    assert {call["name"] for call in calls if call["numbers"] > 1} == {"all_reduce"}
    assert not [call for call in calls if call["in_step"]]


def test_processes_that_would_train_other_rounds_are_stopped(tmp_path):
    done = subprocess.run(
        command(tmp_path, 2, {"sampler_of_its_own": True, "clients_per_round": 2}),
        capture_output=True,
        text=True,
        timeout=300,
        env=environment(),
    )
    assert done.returncode != 0
    assert "`client_sampler` chose other clients for round 0 in one process than in another" in done.stderr


def test_checkpoints_are_of_round_ends_and_go_on_in_any_number_of_processes(tmp_path):
    arguments = {"num_rounds": 3, "local_steps": 3, "eval_strategy": "epoch", "optim": "sgd", "learning_rate": 1.0}
    launch(tmp_path / "two", 2, **arguments, save_strategy="steps", save_steps=2)
    expected, _ = ends(tmp_path / "two")
    steps = sorted(int(path.name.split("-")[1]) for path in (tmp_path / "two").glob("checkpoint-*"))
    assert steps == [3, 6, 9]

    # One process takes two waves for what two processes do in one.
    alone(tmp_path / "one", **arguments, save_strategy="epoch", resume=str(tmp_path / "two" / "checkpoint-3"))
    assert sorted(path.name for path in (tmp_path / "one").glob("checkpoint-*")) == ["checkpoint-15", "checkpoint-9"]
    launch(tmp_path / "again", 2, **arguments, resume=str(tmp_path / "one" / "checkpoint-9"))
    for name in ("one", "again"):
        found, told = ends(tmp_path / name)
        assert max_difference(found, expected) < 1e-5
        assert len(told["history"]) == 3


@contextlib.contextmanager
def running(folder, **arguments):
    """Two processes in their second round, as `(launcher, {rank: process id}, log)`. None of them is left after."""
    log = folder / "log"
    arguments = {"num_rounds": 100000, "local_steps": 3, **arguments}
    with open(log, "w") as file:
        launcher = subprocess.Popen(
            command(folder, 2, arguments), stdout=file, stderr=file, env=environment(), start_new_session=True
        )
    workers = {}
    try:
        wait_until(lambda: "'round': 1" in log.read_text(), seconds=120)
        for pid in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split():
            variables = dict(
                line.split("=", 1) for line in Path(f"/proc/{pid}/environ").read_text().split("\0") if line
            )
            workers[int(variables["RANK"])] = int(pid)
        yield launcher, workers, log
    finally:
        for pid in [launcher.pid, *workers.values()]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        launcher.wait()


def wait_until(condition, seconds):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert condition()


def test_ctrl_c_ends_all_processes(tmp_path):
    with running(tmp_path) as (launcher, workers, _):
        os.killpg(launcher.pid, signal.SIGINT)
        launcher.wait(timeout=60)
        assert [pid for pid in workers.values() if os.path.exists(f"/proc/{pid}")] == []
    assert not (tmp_path / "run.lock").exists()


def test_no_process_outlives_its_launcher(tmp_path):
    with running(tmp_path) as (launcher, workers, log):
        launcher.kill()
        wait_until(lambda: not any(inside.is_running(pid) for pid in workers.values()), seconds=20)
        assert f"the launcher that started it (process {launcher.pid}) has died" in log.read_text()


def test_a_process_that_hangs_does_not_keep_the_others_waiting(tmp_path):
    with running(tmp_path, ddp_timeout=3, num_rounds=1000) as (_, workers, log):
        os.kill(workers[1], signal.SIGSTOP)
        wait_until(lambda: "ProcessTimeoutError" in log.read_text(), seconds=30)
        wait_until(lambda: not inside.is_running(workers[0]), seconds=20)
    # Stopped at the end of a step, it is as far as the one that waits.
    found = re.search(
        r"(\w+ \w+) does not answer: process 0 has waited for 3 seconds \(`ddp_timeout`\)", log.read_text()
    )
    assert found and found[1] in ("Process 1", "Another process")


class TestLauncher:
    @pytest.fixture(autouse=True)
    def orphan(self, monkeypatch):
        inside.lose_launcher(monkeypatch)
        monkeypatch.setattr(os, "_exit", lambda status: pytest.fail("ended"))

    def test_a_process_without_one_goes_on_when_its_shell_ends(self, monkeypatch):
        monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
        processes.exit_without_launcher()

    def test_a_fork_of_a_process_that_has_one_goes_on(self, monkeypatch):
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
        inside.become_a_fork(monkeypatch)
        processes.exit_without_launcher()


class TestFirstProcess:
    def test_its_failure_reaches_those_who_wait_for_it(self, monkeypatch):
        sent = []
        monkeypatch.setattr(processes, "broadcast_object_list", lambda told: sent.append(told[0]) or told)
        with pytest.raises(OSError, match="full"), processes.first_process_first(True):
            raise OSError("the disk is full")
        monkeypatch.setattr(processes, "broadcast_object_list", lambda told: sent)
        with pytest.raises(RuntimeError, match="first process has stopped: OSError: the disk is full"):
            with processes.first_process_first(False):
                pytest.fail("it went on")


class TestDealing:
    WORK = LocalWork(batch_size=1, accumulation_steps=1, local_steps=None, local_epochs=1)

    def plans(self, num_rows, processes, parallel_clients, lengths=None):
        def sampler(round_index, rows, number):
            return sample_clients(rows, number, seed=0, round_index=round_index)

        return [
            plan_round(
                0,
                num_rows,
                self.WORK,
                None,
                parallel_clients=parallel_clients,
                sampler=sampler,
                num_processes=processes,
                process_index=i,
                row_lengths=lengths,
            )
            for i in range(processes)
        ]

    @pytest.mark.parametrize("processes", [1, 2, 3])
    @pytest.mark.parametrize("parallel_clients", [1, 2, 4])
    def test_every_client_once_and_steps_in_common(self, processes, parallel_clients):
        num_rows = {name: len(rows) for name, rows in make_clients().items()}
        plans = self.plans(num_rows, processes, parallel_clients)
        dealt = [c for plan in plans for wave in plan.waves for c in wave.client_ids]
        assert sorted(dealt) == sorted(num_rows)
        assert len({tuple(wave.num_steps for wave in plan.waves) for plan in plans}) == 1
        for plan in plans:
            for wave in plan.waves:
                assert len(wave.client_ids) <= parallel_clients
                assert wave.num_steps == max(wave.steps_of_all)
        assert sum(len(wave.steps_of_all) for wave in plans[0].waves) == len(num_rows)

    def test_a_wave_is_spread_before_a_process_is_filled(self):
        plans = self.plans(dict.fromkeys("abc", 4), 3, 4)
        assert [len(plan.waves[0].client_ids) for plan in plans] == [1, 1, 1]

    def test_long_rows_weigh_more(self):
        lengths = {"a": 100.0, "b": 50.0, "c": 50.0}
        first, second = self.plans(dict.fromkeys("abc", 4), 2, 2, lengths)
        assert (first.waves[0].client_ids, second.waves[0].client_ids) == (("a",), ("b", "c"))
