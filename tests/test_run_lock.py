"""One run at a time in a folder, also after one that was killed, and across machines that share a disk."""

import contextlib
import json
import os
import signal
import threading
import time

import inside
import pytest
from conftest import make_args, make_lora, make_model, make_rows, max_difference
from test_invariants import weights_of
from transformers import TrainerCallback

from hf_fedsa import FederatedTrainer, run_lock
from hf_fedsa.run_lock import LOCK, RunLock, RunLockError

pytestmark = pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="needs /proc")


def lock(*folders):
    return RunLock({f"argument_{i}": folder for i, folder in enumerate(folders)})


def rewrite(path, **changes):
    """As if the lock had been taken by another process."""
    path.write_text(json.dumps({**json.loads(path.read_text()), "token": "another", **changes}))


@contextlib.contextmanager
def fork(work):
    """Runs `work` in a child process, which then waits to be killed."""
    ready, told = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(ready)
        try:
            work()
            os.write(told, b"x")
            signal.pause()
        finally:
            os._exit(1)
    os.close(told)
    try:
        assert os.read(ready, 1) == b"x"
        yield child
    finally:
        os.close(ready)
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(run_lock, "HEARTBEAT", 0.02)
    monkeypatch.setattr(run_lock, "PATIENCE", 0.3)


class TestOneMachine:
    def test_it_is_there_from_acquire_to_release(self, tmp_path):
        held = lock(tmp_path / "new", tmp_path)
        held.acquire()
        assert (tmp_path / "new" / LOCK).is_file() and (tmp_path / LOCK).is_file()
        held.check()
        held.release()
        held.release()
        assert list(tmp_path.rglob(LOCK)) == []
        held.acquire()
        held.release()

    def test_a_second_one_is_refused_and_told_who_is_there(self, tmp_path):
        def hold():
            lock(tmp_path).acquire()

        with fork(hold) as child:
            with pytest.raises(RunLockError, match=f"`argument_0='{tmp_path}'` is in use by process {child} .*stop"):
                lock(tmp_path).acquire()
            assert json.loads((tmp_path / LOCK).read_text())["pid"] == child
            os.kill(child, signal.SIGKILL)
            # Dead, but nobody has asked for its status yet.
            while inside.is_running(child):
                time.sleep(0.001)
            again = lock(tmp_path)
            again.acquire()
            again.release()

    def test_the_first_folder_is_free_again_if_the_second_is_not(self, tmp_path):
        held = lock(tmp_path / "b")
        held.acquire()
        with pytest.raises(RunLockError, match="`argument_1=.*of this same process"):
            lock(tmp_path / "a", tmp_path / "b").acquire()
        assert list(tmp_path.rglob(LOCK)) == [tmp_path / "b" / LOCK]
        with pytest.raises(RunLockError, match="running already"):
            held.acquire()
        held.release()

    def test_one_folder_under_two_names_is_one(self, tmp_path):
        (tmp_path / "link").symlink_to(tmp_path)
        held = lock(tmp_path, tmp_path / "link")
        held.acquire()
        held.release()

    @pytest.mark.parametrize(
        "change",
        [{"started": "1"}, {"pid": 2**22 + 1}, {}],
        ids=["its_number_is_anothers_now", "no_such_process", "a_release_that_failed"],
    )
    def test_a_dead_one_is_taken_over(self, tmp_path, change, caplog):
        lock(tmp_path).acquire()
        rewrite(tmp_path / LOCK, **change)
        lock(tmp_path).acquire()
        assert "Taking over" in caplog.text

    @pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": 1}'])
    def test_one_that_was_never_written_whole_is_free(self, tmp_path, content):
        (tmp_path / LOCK).write_text(content)
        lock(tmp_path).acquire()

    def test_a_fork_neither_holds_nor_releases(self, tmp_path):
        held = lock(tmp_path)
        held.acquire()

        def release():
            held.release()
            held.check()
            with contextlib.suppress(RunLockError):
                lock(tmp_path).acquire()
                os._exit(1)

        with fork(release):
            held.check()
            held.release()
            again = lock(tmp_path)
            again.acquire()
            again.release()

    def test_of_many_at_once_one_gets_it(self, tmp_path):
        """Also where all of them find a dead one's lock."""
        for _ in range(20):
            lock(tmp_path).acquire()
            rewrite(tmp_path / LOCK, started="1")
            got, start = [], threading.Barrier(4)

            def take(got=got, start=start):
                mine = lock(tmp_path)
                start.wait()
                with contextlib.suppress(RunLockError):
                    mine.acquire()
                    got.append(mine)

            threads = [threading.Thread(target=take) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert len(got) == 1
            got[0].check()
            got[0].release()

    def test_a_folder_that_was_deleted_is_no_error(self, tmp_path):
        held = lock(tmp_path / "a")
        held.acquire()
        (tmp_path / "a" / LOCK).unlink()
        held.check()
        assert (tmp_path / "a" / LOCK).is_file()
        (tmp_path / "a" / LOCK).unlink()
        (tmp_path / "a").rmdir()
        held.release()

    def test_it_does_without_flock(self, tmp_path, monkeypatch):
        def refuse(*args):
            raise OSError(run_lock.errno.ENOLCK, "No locks available")

        monkeypatch.setattr(run_lock.fcntl, "flock", refuse)
        held = lock(tmp_path)
        held.acquire()
        with pytest.raises(RunLockError):
            lock(tmp_path).acquire()
        held.release()
        assert not (tmp_path / LOCK).exists()


class TestTwoMachines:
    def test_one_that_lives_is_recognised_by_its_touch(self, tmp_path, quick):
        held = lock(tmp_path)
        held.acquire()
        rewrite(tmp_path / LOCK, machine="elsewhere", host="node7")
        with inside.kept_alive(tmp_path / LOCK), pytest.raises(RunLockError, match="on node7"):
            lock(tmp_path).acquire()

    @pytest.mark.parametrize("here", ["this", None], ids=["linux", "no_linux"])
    def test_one_that_is_silent_is_taken_over_and_stops_when_it_wakes(self, tmp_path, quick, monkeypatch, here):
        if here is None:
            inside.hide_machine(monkeypatch)
        first = lock(tmp_path)
        first.acquire()
        inside.suspend(first)
        inside.move_to(first, tmp_path / LOCK, machine="elsewhere" if here else None, host="node7")
        second = lock(tmp_path)
        second.acquire()
        with pytest.raises(RunLockError, match="has been taken over by .*It stops here"):
            first.check()
        first.release()
        second.check()
        second.release()


class Nested(TrainerCallback):
    """Starts another run while one is in its second step."""

    def __init__(self, make):
        self.make, self.error = make, None

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            with pytest.raises(RunLockError) as caught:
                self.make().train()
            self.error = str(caught.value)


@pytest.mark.parametrize("common", ["output_dir", "client_store_dir"])
def test_a_run_keeps_a_second_one_out_of_its_folders(tmp_path, tokenizer, common):
    def make(folder, store, *callbacks):
        return FederatedTrainer(
            model=make_model(),
            args=make_args(tmp_path / folder, client_store_dir=str(tmp_path / store)),
            train_dataset={f"client_{i}": make_rows(4, seed=i) for i in range(2)},
            processing_class=tokenizer,
            peft_config=make_lora(),
            callbacks=list(callbacks),
        )

    second = ("a", "other_store") if common == "output_dir" else ("b", "store")
    nested = Nested(lambda: make(*second))
    trainer, alone = make("a", "store", nested), make("c", "third_store")
    trainer.train()
    assert nested.error.startswith(f"`{common}=") and "of this same process" in nested.error
    assert list(tmp_path.rglob(LOCK)) == []
    alone.train()
    assert max_difference(weights_of(trainer), weights_of(alone)) == 0


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_run_that_is_interrupted_lets_the_next_one_in(tmp_path, tokenizer, error):
    class Interrupt(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            assert (tmp_path / LOCK).is_file()
            raise error

    trainer = FederatedTrainer(
        model=make_model(),
        args=make_args(tmp_path),
        train_dataset={"client_0": make_rows(4, seed=0)},
        processing_class=tokenizer,
        peft_config=make_lora(),
        callbacks=[Interrupt()],
    )
    with pytest.raises(error):
        trainer.train()
    assert not (tmp_path / LOCK).exists()
