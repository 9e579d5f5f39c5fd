"""The public events of rounds, the progress bar, and the Trainer's events as those of rounds."""

from collections.abc import Callable, Mapping
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_jit_checkpoint import JITCheckpointCallback


class FederatedCallback(TrainerCallback):
    """
    A [`~transformers.TrainerCallback`] with two more events. Both are called after the state they describe is in
    place: at `on_round_end` the shared A is already the new average.
    """

    def on_round_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        round_index: int,
        client_ids: tuple[str, ...],
        **kwargs,
    ) -> None:
        """Called when a round's clients have been sampled and none has trained yet."""

    def on_round_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Mapping[str, Any],
        **kwargs,
    ) -> None:
        """Called with the round's entry of `trainer.round_history`."""


class RoundCallback(TrainerCallback):
    """
    Turns the Trainer's events into those of rounds. The trainer adds it itself, before the user's callbacks.

    Args:
        begin_run, begin_round, begin_step, end_step, end_round, end_run (`Callable[[], None]`):
            Called at the beginning and the end of training, of an epoch and of a step.
        is_among_processes (`Callable[[], bool]`):
            Whether each of several processes knows its own clients alone while a round is open.
        is_in_round (`Callable[[], bool]`):
            Whether a round is open.
    """

    def __init__(
        self,
        *,
        begin_run: Callable[[], None],
        begin_round: Callable[[], None],
        begin_step: Callable[[], None],
        end_step: Callable[[], None],
        end_round: Callable[[], None],
        end_run: Callable[[], None],
        is_among_processes: Callable[[], bool],
        is_in_round: Callable[[], bool],
    ):
        self._begin_run, self._begin_round, self._begin_step = begin_run, begin_round, begin_step
        self._end_step, self._end_round, self._end_run = end_step, end_round, end_run
        self._is_among_processes, self._is_in_round = is_among_processes, is_in_round
        self._postponed = {"should_evaluate": False, "should_save": False}

    def on_train_begin(self, args, state, control, **kwargs):
        self._begin_run()

    def on_epoch_begin(self, args, state, control, **kwargs):
        self._begin_round()

    def on_step_begin(self, args, state, control, **kwargs):
        self._begin_step()

    def on_step_end(self, args, state, control, **kwargs):
        self._end_step()
        self._postpone(control)

    def on_epoch_end(self, args, state, control, **kwargs):
        self._end_round()
        self._postpone(control)

    def _postpone(self, control: TrainerControl) -> None:
        """Puts off to the round's end what needs all clients."""
        if not self._is_among_processes():
            return
        for name in self._postponed:
            due = getattr(control, name) or self._postponed[name]
            self._postponed[name] = due and self._is_in_round()
            setattr(control, name, due and not self._is_in_round())

    def on_train_end(self, args, state, control, **kwargs):
        self._end_run()


class JITCheckpointAtStepEnd(TrainerCallback):
    """
    Saves when the process is told to end (`enable_jit_checkpoint`), at the end of the step that is running.

    The Trainer's own callback would save between a step's gradients and its weights, or before the step is counted as
    one of the round. It is kept to listen for the signal. What is saved is an ordinary checkpoint, and the round that
    the end of the run cuts short is not saved over it.

    Args:
        listener (`JITCheckpointCallback`):
            The Trainer's own callback.
    """

    def __init__(self, listener: JITCheckpointCallback):
        self.listener = listener
        self._saved_in_round = False

    def on_train_begin(self, args, state, control, **kwargs):
        self._saved_in_round = False

    def on_step_end(self, args, state, control, **kwargs):
        self._saved_in_round = self._save_if_requested(control)

    def on_epoch_end(self, args, state, control, **kwargs):
        if self._saved_in_round:
            control.should_save = control.should_evaluate = False
        else:
            self._save_if_requested(control)

    def _save_if_requested(self, control: TrainerControl) -> bool:
        manager = self.listener.jit_manager
        if not manager.is_checkpoint_requested:
            return False
        manager.is_checkpoint_requested = False
        # An evaluation may take longer than the process has left.
        control.should_evaluate = False
        control.should_save = control.should_training_stop = True
        return True

    def on_train_end(self, args, state, control, **kwargs):
        self.listener.on_train_end(args, state, control, **kwargs)


class FederatedProgressCallback(ProgressCallback, FederatedCallback):
    """The usual progress bar, with the round and its clients in front."""

    def __init__(self, num_rounds: int | None, max_str_len: int = 100):
        super().__init__(max_str_len=max_str_len)
        self.num_rounds = num_rounds

    def on_round_begin(self, args, state, control, round_index, client_ids, **kwargs):
        if self.training_bar is not None:
            names = ", ".join(client_ids[:3]) + (f" and {len(client_ids) - 3} more" if len(client_ids) > 3 else "")
            of_all = "" if self.num_rounds is None else f"/{self.num_rounds}"
            self.training_bar.set_description(f"Round {round_index + 1}{of_all} ({names})")
