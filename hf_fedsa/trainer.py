"""`FederatedMixin` over any `Trainer`: a round from its beginning to its end, and what users call."""

import contextlib
import copy
import functools
import logging
import math
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from huggingface_hub import CommitInfo
from peft import PeftModel
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments
from transformers.trainer import SCHEDULER_NAME
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_jit_checkpoint import JITCheckpointCallback
from transformers.trainer_utils import EvalLoopOutput, TrainOutput, speed_metrics
from transformers.utils import PushInProgress

from .callbacks import FederatedCallback, FederatedProgressCallback, JITCheckpointAtStepEnd, RoundCallback
from .checkpoint import SavedRun
from .checkpoint_folder import STATE_FOLDER, delete_older_checkpoints, writing_checkpoint
from .client.base_layers import GradientProbe, keep_layout
from .client.data import ONLY_CLIENT, ClientRows, and_more
from .client.slots import mutates_base
from .client.step import explaining_memory
from .client.waves import Round
from .config import FederatedConfig
from .description import describe, fingerprint_of, identity_of, save
from .evaluation import ClientMetrics, kept_in_precision
from .federation import Federation
from .files import write_text
from .host import TrainerHost
from .hub.card import make_model_card
from .hub.folder import warn_of_other_clients
from .hub.publisher import Publisher
from .hub.whole_folder import saving
from .identity import describe_base, row_fingerprints
from .messages import Broadcast, Tensors, Update
from .metrics import log_line, mean_over_rounds
from .other_trainers import prepare_rows, running_metrics_aside, take_running_metrics
from .peft_config import check_model
from .processes import (
    computing_alone,
    exit_without_launcher,
    explain_timeout,
    first_process_first,
    limit_waiting,
    report_step,
    watch_launcher,
)
from .refusals import Shape, refuse_before_model, refuse_elsewhere, refuse_endless_schedule
from .run import Run, checkpoint_to_resume, note_last_run
from .server.sampling import ClientSampler
from .tensors import clone_tensors
from .trackers import refuse_uploads_of_clients
from .transport import Transport

logger = logging.getLogger(__name__)

# More rounds, or steps of a round, than there will be, where the Trainer wants a number that is not known.
_ENDLESS = 10**9


class FederatedMixin:
    """
    Federated training as a mixin over a [`~transformers.Trainer`]: many clients train in one `train()` call, only the
    shared tensors of their adapters are averaged between rounds, and every client keeps the rest.

    Put it before the Trainer: `class FederatedClassifier(FederatedMixin, Trainer)`. The model must be a
    [`~peft.PeftModel`] once the Trainer is constructed. A Trainer whose forward pass cannot serve several clients at
    once runs the clients of a wave one after the other within a step.

    Args:
        model (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Passed to the Trainer.
        args ([`FederatedConfig`]):
            Arguments of the run. A Trainer that reads a config of its own, as `DPOTrainer` does, needs a dataclass
            derived from both: `class FederatedDPOConfig(DPOConfig, FederatedConfig)`.
        train_dataset ([`~datasets.Dataset`] or `dict[str, Dataset]`):
            Rows of the clients: a dictionary (or [`~datasets.DatasetDict`]) from client id to rows, or one dataset
            with a column `args.client_column`. One dataset without that column is one client.
        eval_dataset ([`~datasets.Dataset`] or `dict[str, Dataset]`, *optional*):
            Evaluation rows, in the same forms.
        callbacks (`list[TrainerCallback]`, *optional*):
            Callbacks. A [`FederatedCallback`] also receives the round events.
        client_sampler (`Callable[[int, Mapping[str, int], int | None], Sequence[str]]`, *optional*):
            Chooses a round's clients, in place of `args.client_sampling`. It is called with the round's index, the
            number of rows of every client and `args.clients_per_round`, for all rounds before training, and again to
            resume, so it must depend on nothing else.
        transport ([`~hf_fedsa.transport.Transport`], *optional*):
            Brings rounds from a server elsewhere, such as [`~hf_fedsa.worker.OverSocket`]. `train()` then serves them
            until it is told to stop. `None` runs the whole federation here.
        kwargs:
            Passed to the Trainer.
    """

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: FederatedConfig,
        *,
        train_dataset: Dataset | Mapping[str, Dataset],
        eval_dataset: Dataset | Mapping[str, Dataset] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        client_sampler: ClientSampler | None = None,
        transport: Transport | None = None,
        **kwargs,
    ):
        # Arguments and clients: what can be refused is refused before a model loads
        if not isinstance(args, FederatedConfig):
            raise TypeError(f"`args` must be a `FederatedConfig`, got `{type(args).__name__}`.")
        self._rows = rows = ClientRows(
            train_dataset, args.client_column, expects_names=args.expects_clients, unseen=args.eval_unseen_clients
        )
        self.client_ids = rows.client_ids
        if transport is not None:
            refuse_elsewhere(args, rows, client_sampler)
        shape = Shape.of(args, rows, is_elsewhere=transport is not None)
        eval_dataset = rows.join_eval(eval_dataset)
        refuse_before_model(self, model, args, rows, shape)
        self._publisher = Publisher(args, self.client_ids, names_clients=rows.are_named)
        self._publisher.check_permission()
        if rows.are_named:
            refuse_uploads_of_clients(args, callbacks, self._publisher.publishes_all)
        if not shape.whole_passes:
            # Clients are not averaged with each other in a step, so no count of tokens is common to the processes.
            args.average_tokens_across_devices = False

        super().__init__(
            model=model,
            args=args,
            train_dataset=rows.joined,
            eval_dataset=eval_dataset,
            callbacks=[self._round_callback(), *(callbacks or [])],
            **kwargs,
        )
        if args.world_size > 1:
            watch_launcher()
            limit_waiting(args.ddp_timeout_delta)
        if any(type(callback) is ProgressCallback for callback in self.callback_handler.callbacks):
            self.pop_callback(ProgressCallback)
            self.add_callback(FederatedProgressCallback(args.rounds if transport is None else None))
        if args.enable_jit_checkpoint:
            self.add_callback(JITCheckpointAtStepEnd(self.pop_callback(JITCheckpointCallback)))

        # Rows
        work = args.local_work
        self.train_dataset = rows.find(
            self.train_dataset,
            batches=work.batches_per_pass,
            batch_size=work.batch_size,
            max_length=getattr(args, "max_length", None),
        )
        if rows.are_named and self.eval_dataset is not None:
            self.eval_dataset = rows.split(self.eval_dataset)

        # Model
        config = check_model(self.model)
        keep_layout(self.model)
        self._gradient_probe = GradientProbe(self.model)
        revision = (args.model_init_kwargs or {}).get("revision")
        base = describe_base(self.model.get_base_model(), revision=revision, sample=not mutates_base(config))

        # Federation
        self._federation = federation = Federation(
            self.model, args, rows, shape, self.accelerator, transport=transport, client_sampler=client_sampler
        )
        self._slots, self._server, self._transport = federation.slots, federation.server, federation.transport
        self._client, self._local = federation.client, federation.engine
        self._run = Run(base=base)
        self._rounds: list[Round] = []
        self._schedule_length: int | None = None
        self._clock = time.perf_counter()
        self._publisher.check_adapter(self.model, self.hub_model_id)

    # Rounds: an epoch of the Trainer is a round, and a step is a local step of every client in a slot

    def _round_callback(self) -> RoundCallback:
        return RoundCallback(
            begin_run=self._begin_run,
            begin_round=self._begin_round,
            begin_step=self._begin_step,
            end_step=self._end_step,
            end_round=self._end_round,
            end_run=self._end_run,
            is_among_processes=lambda: self._federation.spans_processes,
            is_in_round=lambda: self._client.state.round_open,
        )

    def _begin_run(self) -> None:
        """Starts from the present weights, unless a checkpoint has just been loaded."""
        if self._local.plans_rounds and not self._federation.optimizer.is_noted:
            raise ValueError(
                f"The `create_scheduler` of `{type(self).__name__}` did not call the one it overrides, so its "
                "schedule is as long as the run and not as the clients' own steps. Call "
                "`super().create_scheduler(...)`, or set `lr_scheduler_type` and `lr_scheduler_kwargs`."
            )
        self._federation.optimizer.use(self.optimizer, self.lr_scheduler)
        run = self._run
        run.refuse_lost_clients()
        if self._federation.is_elsewhere:
            self._client.go_on_from_stores(self.client_ids)
        elif not run.resuming:
            with first_process_first(self.is_world_process_zero()):
                self._federation.claim_stores(clear=not run.has_run)
            self._client.begin_run()
        elif run.ends_round_first:
            self._client.open(*self._transport.open_round())
            self._end_round()
        run.begin()
        if self.is_world_process_zero():
            note_last_run(Path(self.args.output_dir), self._server.state.run_id)
        if self._local.noise is not None:
            # The Trainer's own hook scales the noise by the length of the whole batch. It takes off this one as well.
            self.neftune_hook_handle.remove()
            embeddings = self.model.get_base_model().get_input_embeddings()
            self.neftune_hook_handle = embeddings.register_forward_hook(self._local.noise)
        self._transport.check_plan([round_.client_ids for round_ in self._rounds])

    def _begin_round(self) -> None:
        """The server samples clients and sends them A."""
        opened = self._transport.open_round()
        self._clock = time.perf_counter()
        if opened is None:
            self._client.open_none()
            self.control.should_training_stop = True
            return
        if self._federation.is_elsewhere:
            self._follow(opened[1])
        self._client.open(*opened)
        self._gradient_probe.check()
        round_ = self._client.round
        self._call_round_event("on_round_begin", round_index=round_.round_index, client_ids=round_.client_ids)

    def _follow(self, broadcast: Broadcast) -> None:
        """Takes over A and the place on the schedule from a server elsewhere."""
        self._federation.note_broadcast(broadcast)
        refuse_endless_schedule(self.args, broadcast.schedule_steps)
        self._make_schedule(broadcast.schedule_steps)
        self._federation.optimizer.move_to(broadcast.schedule_start)

    def _make_schedule(self, length: int | None) -> None:
        """Makes the schedule anew if it is to have another length, in local steps. It stands at its beginning then."""
        optimizer, length = self._federation.optimizer, length or 1
        if not optimizer.steps_schedule or length == self._schedule_length:
            return
        self.lr_scheduler = None
        self.callback_handler.lr_scheduler = self.create_scheduler(length, self.optimizer)
        optimizer.use(self.optimizer, self.lr_scheduler)

    def _begin_step(self) -> None:
        """Every client of the wave starts from A as it was sent and its own B."""
        if not self.model.training:  # Something was evaluated since the last step.
            self._gradient_probe.check()
        self._client.begin_step(self.accelerator.scaler)
        if self._local.plans_rounds:
            torch.manual_seed(self._client.step_seed)

    def _end_step(self) -> None:
        """After a wave's last step, every client returns its A, and its B is in the store."""
        report_step(self.state.global_step)
        if self._local.plans_rounds and not self._federation.is_elsewhere:
            # The Trainer counts in shares of what was the longest round at first. With a newcomer it may be longer.
            self.state.epoch = min(self.state.epoch, self._server.state.rounds_done + 1)
        if self._client.ends_wave:
            self._before_writing()
        self._send(self._client.end_step(self._local.step, type(self).__name__, self.accelerator.scaler))
        if self._client.has_finished:
            self._close_round()

    def _end_round(self) -> None:
        """Ends a round whose end the Trainer's loop knows, or that a callback cut short."""
        if not self._client.state.round_open:
            return
        self._before_writing()
        self._send(self._client.close(self.accelerator.scaler))
        self._close_round()

    def _send(self, updates: list[Update]) -> None:
        for update in updates:
            self._transport.send(update)
            if self._federation.is_elsewhere:
                self._federation.note_update(update)

    def _close_round(self) -> None:
        """The server makes the weighted mean of what was returned the new A."""
        seconds, step = time.perf_counter() - self._clock, self.state.global_step
        record = self._transport.close_round(seconds, step)
        if record is None and not self._client.has_answered:
            self._client.reopen()
            return
        if record is None:
            record = self._federation.note_round(seconds, step)
            self._client.end_round(None)
        else:
            self._client.end_round(record["clients"] if record["counted"] else ())
        if self.is_world_process_zero():
            self._federation.write_rounds()
        if self._rows.are_named:
            # Logging clears the flag, but the Trainer's own line for this step is still to come.
            should_log = self.control.should_log
            self.log(log_line(record))
            self.control.should_log = should_log
        self._call_round_event("on_round_end", metrics=copy.deepcopy(record))
        if self._publisher.is_due:
            self._push_progress()

    def _end_run(self) -> None:
        """Leaves the model with the first client's adapter. [`use_client`] switches to another."""
        self._end_round()
        if self._publisher.is_due:
            self._finish_current_push()
            self._push_progress()
        if not self._rows.are_named:
            self._take_edits()  # The Trainer has put back the best weights, if it was asked to.
        self._federation.stores.mark_finished()
        self._federation.rest()
        self._run.at_rest = True

    def _before_writing(self) -> None:
        """Ends a run that others may believe dead before it writes between the files of the next one."""
        exit_without_launcher()
        self._run.lock.check()

    def _call_round_event(self, event: str, **kwargs) -> None:
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, FederatedCallback):
                getattr(callback, event)(self.args, self.state, self.control, trainer=self, **kwargs)

    # The Trainer's steps, for several clients

    def get_train_dataloader(self) -> DataLoader:
        loader = super().get_train_dataloader()
        if self._local.plans_rounds:
            if self._client.planner is None:  # Nothing runs yet: the loader is looked at.
                self._federation.prepare()
            self._rounds = self._federation.plan_rounds()
        longest = max((round_.num_steps for round_ in self._rounds), default=0)
        length = longest * self.args.gradient_accumulation_steps
        next_round = self._rounds[min(self._server.state.rounds_done, len(self._rounds) - 1)] if self._rounds else None
        batches = functools.partial(self._client.batches, next_round)
        return self._local.loader(loader, batches, length, self.args)

    def set_initial_training_values(self, args: TrainingArguments, dataloader: DataLoader):
        values = super().set_initial_training_values(args, dataloader)
        if not self._local.plans_rounds:
            return values
        if not self._rounds:
            raise ValueError(
                f"The `get_train_dataloader` of `{type(self).__name__}` did not call the one it overrides, so no "
                "round is planned, and its batches do not say which rows are of which client. Change what "
                "`super().get_train_dataloader()` returns, or pass a `data_collator`."
            )
        epochs, _, num_examples, _, total_batch_size, steps_in_epoch, _ = values
        # A round ends where its batches do. It may be longer than any is now, if clients come.
        steps_per_epoch = _ENDLESS
        if self._federation.is_elsewhere:
            epochs, max_steps = _ENDLESS, _ENDLESS * self._rounds[0].num_steps
            return epochs, steps_per_epoch, num_examples, max_steps, total_batch_size, steps_in_epoch, max_steps
        # Rounds done may have been of other lengths than they would be by the present arguments.
        left = self._rounds[self._server.state.rounds_done :]
        max_steps = self._round_began_at() + sum(round_.num_steps for round_ in left)
        planner, work = self._client.planner, args.local_work
        local_steps = sum(planner.num_steps(c) for round_ in self._rounds for c in round_.client_ids)
        num_samples = local_steps * work.batch_size * work.accumulation_steps
        return epochs, steps_per_epoch, num_examples, num_samples, total_batch_size, steps_in_epoch, max_steps

    # Under `local_epochs`, rounds differ in length, but the Trainer finds the epoch of a step by division.
    def _init_training_state(
        self, max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
    ):
        epochs_trained, steps_trained = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        if not self._local.plans_rounds:
            # Saved after its last step, the round was to be closed by the end of the epoch, which is not to come.
            self._run.ends_round_first = resume_from_checkpoint is not None and steps_trained == 0
        if not self._local.plans_rounds or resume_from_checkpoint is None:
            return epochs_trained, steps_trained
        # Earlier rounds may also have been shorter than planned, if a callback ended them.
        if self._run.steps_back:
            self.state.global_step -= self._run.steps_back
            taken = self.state.global_step
            self.state.log_history = [line for line in self.state.log_history if line["step"] <= taken]
        steps_trained = self.state.global_step - self._round_began_at()
        return self._server.state.rounds_done, steps_trained * self.args.gradient_accumulation_steps

    def _round_began_at(self) -> int:
        """Steps of the rounds done, of a run that goes on."""
        history = self._server.state.history
        return history[-1]["step"] if history else 0

    # Called once the optimizer is there, whoever made it, and before a resumed run's state is in it.
    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer = None):
        if self._local.plans_rounds and not self._federation.is_elsewhere:
            # The learning rate follows the client's own steps, of which there are fewer than the run's.
            num_training_steps = self._server.schedule_steps()
        self._schedule_length = num_training_steps
        self._federation.optimizer.note(self.optimizer)
        return super().create_scheduler(num_training_steps, optimizer)

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device):
        parent, count_items = super().get_batch_samples, self._get_num_items_in_batch
        batches, num_items = self._local.samples(parent, count_items, epoch_iterator, num_batches, device)
        if self._local.plans_rounds and not batches:
            self.control.should_epoch_stop = True  # The round is over.
        return batches, num_items

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        with self._alone(), explaining_memory(len(self._slots), self.args.per_device_train_batch_size):
            return self._local.train(
                super().training_step,
                model,
                inputs,
                num_items_in_batch,
                together=self._serves_clients_together(num_items_in_batch),
                accumulating=self._accumulating,
                main_input_name=self._main_input_name,
            )

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        parent, score = super().compute_loss, self._score_rows
        return self._local.loss(parent, score, model, inputs, return_outputs, num_items_in_batch)

    def _clip_grad_norm(self, model):
        parent = functools.partial(super()._clip_grad_norm, model)
        return self._local.clip(parent, self.accelerator.unscale_gradients, self.args.max_grad_norm)

    def _get_grad_norm(self, model, grad_norm=None):
        parent = functools.partial(super()._get_grad_norm, model, grad_norm=grad_norm)
        return (
            self._local.clip(parent, self.accelerator.unscale_gradients, math.inf) if grad_norm is None else parent()
        )

    def _alone(self) -> contextlib.AbstractContextManager[None]:
        return computing_alone(self) if self._local.plans_rounds else contextlib.nullcontext()

    @contextlib.contextmanager
    def _accumulating(self, num_batches: int) -> Iterator[None]:
        """Within this context the Trainer takes a step to have so many micro-batches."""
        before = self.current_gradient_accumulation_steps
        self.current_gradient_accumulation_steps = num_batches
        try:
            yield
        finally:
            self.current_gradient_accumulation_steps = before

    def _overridden(self, name: str) -> bool:
        """Whether a subclass, or an assignment to this trainer, has put another method in the place of ours."""
        return name in vars(self) or getattr(type(self), name) is not getattr(FederatedMixin, name)

    def _serves_clients_together(self, num_items_in_batch) -> bool:
        """Whether one forward pass yields a loss per row. If not, the clients of a step run one after the other."""
        return False

    def _score_rows(self, model: nn.Module, inputs: dict[str, Any]):
        """One forward pass for all rows, returning what `compute_loss` reads, row by row."""
        raise RuntimeError("`_score_rows` is needed where `_serves_clients_together` is true.")

    # The Trainer walks over the model for this at every step, and counts the adapters of all slots for every token.
    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        main_input = inputs.get(self._main_input_name)
        return 0 if main_input is None else main_input.numel() * self._operations_per_token

    @functools.cached_property
    def _operations_per_token(self) -> int:
        of_all_slots = super().floating_point_ops({self._main_input_name: torch.empty(1)})
        other_slots = 6 * sum(p.numel() for slot in self._slots.parameters[1:] for p in slot.values())
        return max(0, of_all_slots - other_slots)  # It is 0 for models that cannot tell.

    @property
    def _main_input_name(self) -> str:
        return getattr(self.model, "main_input_name", "input_ids")

    # The Trainer's `train_loss` is the mean over its steps, in which clients need not be equally many, and the first
    # process's alone. It has no hook between computing and logging that number.
    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "train_loss" in logs and self._local.plans_rounds:
            if (loss := mean_over_rounds(self._server.state.history)) is not None:
                logs["train_loss"] = loss
        with running_metrics_aside(self) if "round" in logs else contextlib.nullcontext():
            super().log(logs, start_time)

    # What users read

    @property
    def round_history(self) -> list[dict[str, Any]]:
        """
        One entry per finished round: `round`, `clients`, `losses` and `weights` per client, `bytes_down` and
        `bytes_up` over all clients, `seconds`, the `step` it ended at, and `shared_sha256`, the hash of A after it.
        """
        return copy.deepcopy(self._server.state.history)

    def shared_state_dict(self) -> dict[str, torch.Tensor]:
        """
        The server's tensors: A as it was averaged last (or initialised).

        Returns:
            `dict[str, torch.Tensor]`: copies on the CPU, fp32, under the keys PEFT saves them with.
        """
        self._take_edits()
        return clone_tensors(self._server.shared)

    def client_state_dict(self, client_id: str) -> dict[str, torch.Tensor]:
        """
        What a client keeps: its B as trained so far, and its copy of any `modules_to_save` that is not shared.

        Args:
            client_id (`str`):
                One of `client_ids`.

        Returns:
            `dict[str, torch.Tensor]`: copies on the CPU, fp32, under the keys PEFT saves them with.

        Raises:
            `ValueError`: there is no such client.
            `RuntimeError`: another process trains it in the round that is open.
            [`~hf_fedsa.client.store.ClientStoreError`]: it has trained, and its tensors are gone or damaged.
        """
        self._check_client(client_id)
        self._take_edits()
        with self._client.weights_to_be_used():
            return clone_tensors(self._client.local_of(client_id), dtype=torch.float32)

    @contextlib.contextmanager
    def use_client(self, client_id: str) -> Iterator[PeftModel]:
        """
        Within this context the model is the client's: the base with the shared A and the client's own B. A client that
        is training at the moment is served as it is, mid-round. What the model's `save_pretrained` and `push_to_hub`
        save is this client's adapter alone.

        Example:

        ```python
        >>> with trainer.use_client("client_1") as model:
        ...     model.generate(**inputs)
        ```
        """
        self._check_client(client_id)
        self._take_edits()
        with self._client.weights_to_be_used():
            with self._slots.showing(self._federation.adapter_of(client_id)):
                yield self.model

    def _check_client(self, client_id: str) -> None:
        if client_id in self.client_ids:
            return
        if self.args.eval_unseen_clients and isinstance(self.eval_dataset, dict) and client_id in self.eval_dataset:
            return
        raise ValueError(
            f"There is no client {client_id!r}. The clients are: {', '.join(self.client_ids[:20])}"
            f"{and_more(self.client_ids, 20)}."
        )

    def _take_edits(self) -> None:
        """Takes over what has been written into the model's adapter while no run was in progress."""
        if self._run.at_rest or not self._rows.are_named:
            self._federation.take_edits(self._run.has_run)

    # Clients that come and go

    def add_client(self, client_id: str, train_dataset: Dataset, eval_dataset: Dataset | None = None) -> None:
        """
        Lets another client take part from the next round on, with a B of its own that starts as everyone's did. One
        that was here before and was not forgotten has the B that it left with.

        Call it between two `train()`, or in `on_round_end`; of several processes, in all of them. Rounds that are left
        are sampled and planned anew, and the learning rate schedule is as long as they are.

        Args:
            client_id (`str`):
                The client.
            train_dataset ([`~datasets.Dataset`]):
                Its rows, in the form of the other clients'.
            eval_dataset ([`~datasets.Dataset`], *optional*):
                Evaluation rows, in the same form.

        Raises:
            `ValueError`: there is a client of this name, or its rows do not go with those of the others.
            `RuntimeError`: a round is open, or it is called within [`use_client`].
        """
        self._refuse_in_round("add_client")
        self._refuse_newcomers()
        self._take_edits()
        rows = {client_id: train_dataset}
        prepared = self._prepare_rows(self._rows.join_newcomer(rows, "train_dataset"))
        held_out = None
        if eval_dataset is not None:
            joined = self._rows.join_newcomer({client_id: eval_dataset}, "eval_dataset")
            held_out = self._rows.split(self._prepare_rows(joined))[client_id]
        self.train_dataset = self._federation.add_client(client_id, self.train_dataset, prepared)
        if held_out is not None:
            self.eval_dataset = {**(self.eval_dataset or {}), client_id: held_out}
        self._clients_have_changed()

    def remove_client(self, client_id: str, forget: bool = False) -> None:
        """
        Lets a client take part no more, from the next round on. Its B stays in the store, and is saved no more.

        Call it between two `train()`, or in `on_round_end`; of several processes, in all of them.

        Args:
            client_id (`str`):
                The client.
            forget (`bool`, *optional*, defaults to `False`):
                Whether its B and optimizer state are deleted from the store, and its name and numbers from
                `round_history`. **This does not undo what A has averaged**: A stays as it is, and so do the other
                clients' B, which were trained with it. Checkpoints, saved folders, logs and repositories that were
                written before keep what they hold.

        Raises:
            `ValueError`: there is no such client, or too few would be left for a round.
            `RuntimeError`: a round is open, or it is called within [`use_client`].
        """
        self._refuse_in_round("remove_client")
        self._check_client(client_id)
        self._take_edits()
        self._federation.remove_client(client_id, forget=forget)
        if isinstance(self.eval_dataset, dict):
            self.eval_dataset = {other: rows for other, rows in self.eval_dataset.items() if other != client_id}
        self._clients_have_changed()

    def _refuse_in_use(self, name: str) -> None:
        """Leaving `use_client` puts back what was in the model before, and would undo what comes in between."""
        if self._slots.is_shown:
            raise RuntimeError(
                f"`{name}` within `use_client`, whose client is in the model. Call it after the `with`."
            )

    def _refuse_in_round(self, name: str) -> None:
        self._refuse_in_use(name)
        if self._client.state.round_open:
            raise RuntimeError(f"`{name}` in the middle of a round. Call it in `on_round_end`, or after training.")
        if self._federation.is_elsewhere and not self._run.at_rest:
            raise RuntimeError(
                f"`{name}` while this worker is at work: the server knows its clients as they were when `train()` was "
                "called. Stop the worker, and call it before the next `train()`."
            )
        if not self._rows.are_named:
            raise ValueError(
                f"`{name}`: the rows given to this trainer name no client, so it has a single one. Make it with a "
                "dictionary from client id to rows."
            )

    def _refuse_newcomers(self) -> None:
        """Refuses them where what the trainer was made for does not go with them."""
        if self._federation.shape.is_alone:
            raise ValueError(
                "`add_client`: this trainer was made with one client, which is trained as its Trainer does (its "
                "random orders, an optimizer that is not reset). Make one with all clients that there are."
            )
        if not self._run.at_rest and self.args.dataloader_persistent_workers:
            raise ValueError(
                "`add_client` with `dataloader_persistent_workers=True`: processes that load rows go on with those "
                "that there were. Leave it out, or add clients between two `train()`."
            )

    def _clients_have_changed(self) -> None:
        """Plans the rounds that are left anew."""
        self.client_ids = self._rows.client_ids
        self._publisher.take_over(self.client_ids)
        self.__dict__.pop("_row_fingerprints", None)
        if self._run.at_rest:
            self._federation.rest()  # The first client may be another one.
            return
        self._federation.prepare()
        self._rounds = self._federation.plan_rounds()
        self._local.replace_rows(self._remove_unused_columns(self.train_dataset))
        left = self._rounds[self._server.state.rounds_done :]
        self.state.max_steps = self.state.global_step + sum(round_.num_steps for round_ in left)
        self._make_schedule(self._server.schedule_steps())
        self._federation.optimizer.move_to(self._server.state.schedule_start)

    # Evaluation

    def evaluate(
        self,
        eval_dataset: Dataset | Mapping[str, Dataset] | str | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """
        Evaluates every client on its own rows with its own adapter. Of several processes, all must call it.

        Args:
            eval_dataset ([`~datasets.Dataset`], `dict[str, Dataset]` or `str`, *optional*):
                Rows in the forms of the constructor's `eval_dataset`, which is the default. A client id evaluates that
                client alone.
            ignore_keys (`list[str]`, *optional*):
                Keys of the model's output to ignore when gathering predictions.
            metric_key_prefix (`str`, *optional*, defaults to `"eval"`):
                Prefix of the metrics' names.

        Returns:
            `dict[str, float]`: `eval_<client_id>_loss` for every client, and `eval_loss`, their mean; likewise for
            metrics of `compute_metrics` and those that TRL's trainers log, such as `mean_token_accuracy`.
        """
        own_rows = metric_key_prefix == "eval" and (eval_dataset is None or isinstance(eval_dataset, str))
        if not self._rows.are_named:
            metrics = super().evaluate(eval_dataset, ignore_keys=ignore_keys, metric_key_prefix=metric_key_prefix)
            if own_rows:
                self._keep_results({ONLY_CLIENT: metrics})
            return metrics
        if eval_dataset is None and self.eval_dataset is None:
            return super().evaluate()  # Raises the Trainer's own error.
        datasets = self._rows_to_evaluate(eval_dataset)
        start_time = time.time()
        take_running_metrics(self)  # Of whatever was computed in evaluation mode before, as by `predict`.
        outputs = {
            client_id: self._evaluate_client(client_id, datasets[client_id], ignore_keys, metric_key_prefix)
            for client_id in self._federation.evaluated_here(list(datasets))
        }
        if self.args.world_size > 1:
            outputs = {client_id: output for part in gather_object([outputs]) for client_id, output in part.items()}
        found = ClientMetrics(outputs, list(datasets), metric_key_prefix, self.args.eval_batch_size)
        if own_rows:
            self._keep_results(found.by_client)
        speed = speed_metrics(metric_key_prefix, start_time, num_samples=found.num_samples, num_steps=found.num_steps)
        self.log({**found.to_log(), **speed})
        metrics = {**found.all, **speed}
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _rows_to_evaluate(self, eval_dataset: Dataset | Mapping[str, Dataset] | str | None) -> Mapping[str, Any]:
        """Per client, its rows, or its id where they are those given to the constructor."""
        if isinstance(eval_dataset, str):
            self._check_client(eval_dataset)
            if eval_dataset not in (self.eval_dataset or {}):
                raise ValueError(
                    f"`eval_dataset` given to the trainer has no rows of {eval_dataset!r}. Pass a dictionary from "
                    "client id to dataset here, or add the client's rows there."
                )
            return {eval_dataset: eval_dataset}
        if eval_dataset is None:
            return {client_id: client_id for client_id in self.eval_dataset}
        return self._rows.split(self._prepare_rows(self._rows.join_named_eval(eval_dataset)))

    def _evaluate_client(
        self, client_id: str, rows: Dataset | str, ignore_keys: list[str] | None, prefix: str
    ) -> tuple[dict[str, Any], int]:
        """A client's metrics with its own adapter, and the number of rows."""
        with self.use_client(client_id):
            return self._evaluate_rows(rows, f"{prefix}_{client_id}", ignore_keys, description=client_id)

    def _evaluate_rows(
        self, rows: Dataset | str, prefix: str, ignore_keys: list[str] | None, description: str
    ) -> tuple[dict[str, Any], int]:
        with self._alone():
            output = self.evaluation_loop(
                self.get_eval_dataloader(rows),
                description=f"Evaluation of {description}",
                prediction_loss_only=True if self.compute_metrics is None else None,
                ignore_keys=ignore_keys,
                metric_key_prefix=prefix,
            )
        running = {f"{prefix}_{name}": value for name, value in take_running_metrics(self).items()}
        return {**output.metrics, **running}, output.num_samples

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        casts = self.args.bf16_full_eval or self.args.fp16_full_eval
        with kept_in_precision(self.model) if casts else contextlib.nullcontext():
            return super().evaluation_loop(
                dataloader,
                description,
                prediction_loss_only=prediction_loss_only,
                ignore_keys=ignore_keys,
                metric_key_prefix=metric_key_prefix,
            )

    def _keep_results(self, results: Mapping[str, Mapping[str, Any]]) -> None:
        self._federation.add_results(results)
        if self._server.state.history and self.args.should_save:
            self._federation.write_rounds()

    def _prepare_rows(self, dataset: Dataset) -> Dataset:
        """Does to rows what the Trainer's constructor does, such as tokenizing them."""
        return prepare_rows(self, dataset)

    # Saving

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """
        Saves what the clients serve with.

        Writes `shared/` (A alone, fp32), `clients/<client_id>/` (complete adapters, which load with stock PEFT),
        `federation.json`, `rounds.jsonl`, a model card and the tokenizer to `output_dir`. One client that is named
        nowhere is also saved the way its Trainer saves, in `output_dir` itself.
        """
        directory = Path(output_dir if output_dir is not None else self.args.output_dir)
        if _internal_call and not self.args.save_only_model:
            if not self._rows.are_named:
                super().save_model(str(directory), _internal_call=True)
            if self.args.should_save:
                self._save_state(directory)
            self.accelerator.wait_for_everyone()
            return
        self._save_federation(directory)
        if self.args.push_to_hub and not _internal_call and self.args.should_save:
            self._publisher.push(directory, commit_message="Model save", on_push_begin=self._on_push_begin)

    def _save_federation(self, directory: Path) -> None:
        if self._federation.spans_processes and self._client.state.round_open:
            raise RuntimeError(
                "In the middle of a round, each process knows its own clients alone, so the federation cannot be "
                "saved. Save in `on_round_end`, or after training."
            )
        self._finish_current_push()  # It reads the files that are about to be replaced.
        self._take_edits()
        if not self.args.should_save:
            if not self._rows.are_named:
                super().save_model(str(directory), _internal_call=True)
            return
        warn_of_other_clients(directory, self.client_ids)
        with saving(directory) as folder:
            self._publisher.save_processing_files(self.processing_class, folder)
            if not self._rows.are_named:
                super().save_model(str(folder), _internal_call=True)
            torch.save(self.args, folder / "training_args.bin")
            save(self._federation, folder, self._publisher)

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | list[str] | None = None,
        tags: str | list[str] | None = None,
        *,
        language: str | list[str] | None = None,
        license: str | None = None,
    ) -> None:
        """
        Writes the model card of the federation as it stands to `output_dir`.

        Args:
            model_name (`str`, *optional*):
                Title of the card.
            dataset_name (`str` or `list[str]`, *optional*), tags (`str` or `list[str]`, *optional*),
            language (`str` or `list[str]`, *optional*), license (`str`, *optional*):
                Entries of its metadata.
        """
        if not self.is_world_process_zero():
            return
        card = self._publisher.card_with(
            model_name=model_name, dataset_name=dataset_name, tags=tags, language=language, license=license
        )
        federation = {**describe(self._federation, self._publisher), "processing_files": [], "card": card}
        text = make_model_card(federation, self._server.state.history, None)
        write_text(Path(self.args.output_dir) / "README.md", text)

    def _identity(self) -> dict[str, Any]:
        return identity_of(self._federation, self._run.base, self._row_fingerprints, self.optimizer_cls_and_kwargs)

    @functools.cached_property
    def _row_fingerprints(self) -> dict[str, str]:
        return row_fingerprints(self._remove_unused_columns(self.train_dataset), self._rows.of)

    def _save_state(self, checkpoint: Path) -> None:
        self._federation.save_state(checkpoint / STATE_FOLDER, self._identity(), time.perf_counter() - self._clock)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(str(checkpoint))
        torch.save(self.args, checkpoint / "training_args.bin")

    # The manifest must come after everything the Trainer writes, and before it deletes an older checkpoint.
    def _save_checkpoint(self, model, trial):
        args = self.args
        self._before_writing()
        checkpoint = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        limit, args.save_total_limit = args.save_total_limit, None
        try:
            with writing_checkpoint(checkpoint, here=args.should_save, to_resume=not args.save_only_model):
                super()._save_checkpoint(model, trial)
                self.accelerator.wait_for_everyone()
        finally:
            args.save_total_limit = limit
        if args.should_save:
            delete_older_checkpoints(checkpoint, limit, best=self.state.best_model_checkpoint)

    # Hub

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Creates the repository, as a private one unless `private` or `args.hub_private_repo` is `False`."""
        private = private if private is not None else self.args.hub_private_repo
        super().init_hf_repo(token=token, private=private is not False)

    def push_to_hub(
        self,
        repo_id: str | None = None,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        *,
        clients: str | list[str] | None = None,
        **kwargs,
    ) -> CommitInfo | Future[CommitInfo] | None:
        """
        Saves the federation to `output_dir` and publishes it, in one commit.

        Differs from the Trainer's method in its first argument. Pass the message as `commit_message`.

        Args:
            repo_id (`str`, *optional*):
                Repository. Defaults to `args.hub_model_id`, else the name of `output_dir`.
            commit_message (`str`, *optional*, defaults to `"End of training"`):
                Message of the commit.
            blocking (`bool`, *optional*, defaults to `True`):
                Whether to return only when the upload has finished.
            token (`str`, *optional*), revision (`str`, *optional*):
                Token with write permission, and branch. Default to `args.hub_token` and `args.hub_revision`.
            private (`bool`, *optional*):
                Whether the repository is private. Defaults to `args.hub_private_repo`. If that is `None` too, it is
                created as a private one, and one that is public is refused.
            clients (`str` or `list[str]`, *optional*):
                Clients whose adapters are published: `"all"`, `"none"` or their ids. Defaults to `args.hub_clients`.
                One of the two must be set, unless there is one client that is named nowhere.
            kwargs:
                `model_name`, `dataset_name`, `tags`, `language` and `license`, for the model card.

        Returns:
            [`~huggingface_hub.CommitInfo`], a `Future` of it if `blocking=False`, or `None` in processes other than
            the first.

        Raises:
            `ValueError`: it was not said which clients are published, or the repository holds something else. See
                [`~hf_fedsa.hub.push_federation`].
        """
        chosen = self._publisher.published_clients(clients)
        self._publisher.card = self._publisher.card_with(**kwargs)
        self._save_federation(Path(self.args.output_dir))
        if not self.is_world_process_zero():
            return None
        pushed = self._publisher.push(
            Path(self.args.output_dir),
            commit_message=commit_message,
            on_push_begin=self._on_push_begin,
            repo_id=repo_id or self.hub_model_id,
            blocking=blocking,
            token=token,
            revision=revision,
            private=private,
            clients=chosen,
        )
        if not blocking:
            self.push_in_progress = PushInProgress([pushed])
        return pushed

    def _on_push_begin(self, args: TrainingArguments) -> None:
        self.callback_handler.on_push_begin(args, self.state, self.control)

    # The Trainer uploads what it finds in `output_dir`, and would do so in the middle of a round.
    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self.is_world_process_zero():
            return
        self._publisher.checkpoint_saved()
        if self._publisher.is_due and not self._client.state.round_open:
            self._push_progress()

    def _push_progress(self) -> None:
        """Pushes in the background, unless the last push is still under way."""
        future = self._publisher.push_progress(
            Path(self.args.output_dir),
            self._server.state.rounds_done,
            save=self._save_federation,
            on_push_begin=self._on_push_begin,
            is_pushing=self.push_in_progress is not None and not self.push_in_progress.is_done(),
            repo_id=self.hub_model_id,
        )
        if future is not None:
            self.push_in_progress = PushInProgress([future])

    # Running and resuming

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any | None = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """
        Runs all rounds.

        It starts from the weights that are in the model. What was written into its adapter before is where all clients
        start. Called again, it goes on as the Trainer does: from A and every client's B as they are, with optimizer
        states that are kept (`reset_optimizer`), and with rounds, schedule, random orders and `round_history` from the
        beginning. Between two calls the model holds the first client's adapter, so what is written into it changes A
        and that client's B.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*):
                Checkpoint to go on from, or `True` for the newest whole one in `output_dir`. The result is that of a
                run that was never interrupted. The run may have more rounds than were planned, other
                `parallel_clients` and, at a round's end, another number of processes; for anything else that results
                depend on, see `args.resume_with_changes`.
            trial, ignore_keys_for_eval:
                See [`~transformers.Trainer.train`].

        Raises:
            [`~hf_fedsa.checkpoint.CheckpointError`]: the checkpoint is damaged, was written by another federation, or
                stands where this run cannot go on.
            [`~hf_fedsa.run_lock.RunLockError`]: another run is at work in `output_dir` or `client_store_dir`.
            `RuntimeError`: it is called within [`use_client`].
        """
        self._refuse_in_use("train")
        self._run.prepare()
        self._slots.keep_trained()  # The optimizer, whoever makes it, takes what trains.
        if self._federation.spans_processes:
            # Prepared as for evaluation, the model is not wrapped in `DistributedDataParallel`: its gradients are
            # those of this process's clients, and are not to be averaged.
            self.accelerator.prepare_model(self.model, evaluation_mode=True)
            self.model._is_accelerate_prepared = True
        with self._alone_in_its_folders(), self._federation.as_it_was_unless_begun(self._run):
            checkpoint = checkpoint_to_resume(Path(self.args.output_dir), resume_from_checkpoint)
            if checkpoint and self._federation.is_elsewhere:
                raise ValueError(
                    f"`resume_from_checkpoint={resume_from_checkpoint!r}`, but the server is elsewhere, and its "
                    "requests say where to go on. Call `train()` without it: what clients have is in their store."
                )
            self._federation.prepare()
            if not checkpoint:
                self._take_edits()
                self._server.restart(uuid4().hex)
            self._transport.connect(self._host())
            try:
                with explain_timeout(self.args.ddp_timeout_delta):
                    output = super().train(checkpoint, trial=trial, ignore_keys_for_eval=ignore_keys_for_eval)
            finally:
                self._transport.close()
        return TrainOutput(output.global_step, output.metrics["train_loss"], output.metrics)

    def _host(self) -> TrainerHost:
        fingerprint = functools.partial(fingerprint_of, self._federation, self._run.base)
        return TrainerHost(self._federation, fingerprint, self._evaluate_elsewhere)

    def _evaluate_elsewhere(self, client_id: str, shared: Tensors) -> dict[str, float]:
        """A client's metrics with an A that a server elsewhere has sent and its own B."""
        if client_id not in (self.eval_dataset or {}):
            raise ValueError(f"Client {client_id!r} has no evaluation rows here.")
        take_running_metrics(self)
        was_training = self.model.training
        with self._slots.showing({**shared, **self._client.local_of(client_id)}):
            metrics, num_examples = self._evaluate_rows(client_id, "eval", None, description=client_id)
        self.model.train(was_training)
        return {"num_examples": num_examples, **{k: v for k, v in metrics.items() if isinstance(v, (int, float))}}

    @contextlib.contextmanager
    def _alone_in_its_folders(self) -> Iterator[None]:
        """Within this context no other run can begin in the folders that this one writes to."""
        with self._run.alone_in(self._federation.folders, is_first=self.is_world_process_zero()):
            try:
                yield
            except BaseException:
                if self._local.noise is not None and self.neftune_hook_handle is not None:
                    self.neftune_hook_handle.remove()
                raise

    # The Trainer would load one adapter into the model and refuse a folder that holds none.
    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        self._federation.resume(SavedRun(Path(resume_from_checkpoint)), self._run, self._identity())

    # The Trainer would give back the learning rate, the schedule's end and the settings of the run that was saved.
    def _load_optimizer_and_scheduler(self, checkpoint):
        if checkpoint is None:
            return
        self._federation.optimizer.use(self.optimizer, self.lr_scheduler)
        if not self._local.plans_rounds or self._client.state.wave_open:
            super()._load_optimizer_and_scheduler(checkpoint)
            if self._run.changes_optimizer:
                self._federation.optimizer.reset()
        else:
            # Between waves the slots hold nobody's state, and there may be more or fewer of them than were saved.
            self._federation.optimizer.load_schedule(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))
        self._federation.optimizer.go_on(changed=bool(self._run.changes))
