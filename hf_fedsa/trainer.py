"""`FederatedMixin`, the federated loop over any `Trainer`, and `FederatedTrainer`, over TRL's `SFTTrainer`."""

import contextlib
import copy
import dataclasses
import functools
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path
from statistics import fmean
from typing import Any
from uuid import uuid4

import numpy as np
import pyarrow.compute
import torch
from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset
from huggingface_hub import CommitInfo, HfApi
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer import SCHEDULER_NAME
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_jit_checkpoint import JITCheckpointCallback
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import EvalLoopOutput, HubStrategy, SaveStrategy, TrainOutput, speed_metrics
from transformers.utils import PushInProgress
from trl import SFTConfig, SFTTrainer
from trl.trainer.utils import FusedCausalLMOutput

from . import hub
from .callbacks import FederatedCallback, FederatedProgressCallback, JITCheckpointAtStepEnd, RoundCallback
from .chat_template import chat_template_at, load_tokenizer, refuse_new_tokens
from .checkpoint import (
    STATE_FOLDER,
    CheckpointError,
    Resumption,
    RunState,
    check_changes,
    check_manifest,
    check_position,
    checkpoint_with_copy,
    delete_older_checkpoints,
    make_room,
    newest_whole_checkpoint,
    read_state,
    remove_replaced,
    restore_replaced,
    write_manifest,
)
from .client.base_layers import GradientProbe, keep_layout
from .client.data import RoundSampler, SlotCollator, SlotDataset, split_rows
from .client.local_optimizer import (
    counted,
    counters,
    counters_from,
    fit_groups,
    flatten_state,
    groups_of,
    refuse_kept_weights,
    refuse_optimizer,
    renewed,
    split_groups,
)
from .client.noise import ClientNoise
from .client.parameters import adapter_tensors
from .client.scoring import score_next_tokens
from .client.slots import SlotRows, Slots, mutates_base
from .client.store import ClientStore, ClientStoreError, DiskClientStore, MemoryClientStore
from .client.waves import LocalWork, Round, Wave, match_lengths, plan_round
from .config import DEFAULT_PARALLEL_CLIENTS, FederatedConfig
from .evaluation import kept_in_precision
from .faults import JUDGED_FROM, norm_and_change, outliers
from .files import validate_client_ids, write_json, write_safetensors, write_text
from .hub.card import make_model_card
from .hub.whole_folder import saving
from .identity import (
    SCHEDULES_BY_METRIC,
    defaults_of,
    describe_adapter,
    describe_arguments,
    describe_base,
    plain,
    row_fingerprints,
)
from .metrics import MOST_CLIENTS_IN_LOG, log_line, round_metrics, spread
from .other_trainers import check_trainer, prepare_rows, running_metrics_aside, take_running_metrics
from .partition import is_transformed, join_clients, rows_by_client
from .peft_config import validate_peft_config
from .processes import (
    exit_without_launcher,
    explain_timeout,
    first_process_first,
    limit_waiting,
    report_step,
    watch_launcher,
)
from .run_lock import RunLock
from .seeds import derive_seed
from .server.aggregation import WeightedMean
from .server.sampling import ClientSampler, sample_clients
from .tensors import clone_tensors, count_bytes, tensors_sha256
from .trackers import args_of_push_event, refuse_uploads_of_clients

logger = logging.getLogger(__name__)

# Id of the one client of a `Dataset` that names none.
ONLY_CLIENT = "client_0"


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
        **kwargs,
    ):
        # Arguments
        if not isinstance(args, FederatedConfig):
            raise TypeError(f"`args` must be a `FederatedConfig`, got `{type(args).__name__}`.")
        column = args.client_column

        # Clients
        train_dataset = _as_one_dataset(train_dataset, args, name="train_dataset")
        self._names_clients = column in train_dataset.column_names
        if self._names_clients:
            self.client_ids = list(rows_by_client(train_dataset, column, name="train_dataset"))
        else:
            self.client_ids = [ONLY_CLIENT]
        validate_client_ids(self.client_ids)
        _check_federation_size(args, len(self.client_ids))
        if self._names_clients:
            _refuse_one_best_model(args)
        images = {"image", "images"} & set(train_dataset.column_names)
        if images and len(self.client_ids) > 1:
            raise ValueError(
                f"`train_dataset` has a column `{images.pop()}`, but image batches cannot be divided by client: their "
                "pixels do not come one entry per row. Train on text, or one client at a time."
            )
        if self._names_clients and isinstance(eval_dataset, Mapping):
            # A split in the training set's proportions may leave small clients without evaluation rows.
            eval_dataset = {c: rows for c, rows in eval_dataset.items() if not isinstance(rows, Dataset) or len(rows)}
        if self._names_clients and eval_dataset is not None:
            eval_dataset = _as_one_dataset(eval_dataset, args, name="eval_dataset")
            self._check_eval_clients(eval_dataset, args)

        if isinstance(model, PeftModel):
            _check_peft_model(model)

        # One client that trains whole passes is what the Trainer does anyway, so its own loop and loader are kept.
        single = len(self.client_ids) == 1
        num_slots = _num_slots(args, len(self.client_ids))
        self._keeps_trainer_loop = single and args.local_steps is None and args.local_epochs in (None, 1)
        check_trainer(self, args, model, len(self.client_ids), num_slots)
        if self._names_clients or not self._keeps_trainer_loop:
            _refuse_packing(args)
        if not self._keeps_trainer_loop:
            _refuse_what_needs_the_trainer_loop(args)
            _check_loss_scale(args, num_slots)
            _refuse_another_sampler(self)
            # Clients are not averaged with each other in a step, so no count of tokens is common to the processes.
            args.average_tokens_across_devices = False
        if args.push_to_hub:
            published = self._published_clients(args)
            if args.should_save:
                hub.check_repository(
                    _repository_name(args),
                    clients=published,
                    client_repositories=args.hub_client_repositories,
                    private=args.hub_private_repo,
                    token=args.hub_token,
                    revision=args.hub_revision,
                )
        if self._names_clients:
            refuse_uploads_of_clients(
                args,
                callbacks,
                lambda: args.hub_clients is not None and len(self._published_clients(args)) == len(self.client_ids),
            )
        self._client_sampler = client_sampler or functools.partial(self._sample_clients, args)
        self._resets_optimizer = args.reset_optimizer if args.reset_optimizer is not None else not single
        if not self._keeps_trainer_loop:
            refuse_optimizer(args, keeps_state=not self._resets_optimizer, num_clients=len(self.client_ids))
        self._fresh_optimizer_groups: list[dict[str, Any]] | None = None
        # What the optimizer had counted in a group when its client last took a step.
        self._counts: dict[int, dict[str, Any]] = {}
        # What the step in progress trains, see `get_batch_samples`.
        self._step_items: dict[int, torch.Tensor | None] = {}
        self._step_batches: dict[int, int] = {}
        self._step_rows: SlotRows | None = None
        self._step_losses: list[torch.Tensor] = []
        self._noise: ClientNoise | None = None
        self._noise_handle: torch.utils.hooks.RemovableHandle | None = None
        if args.neftune_noise_alpha is not None and not self._keeps_trainer_loop:
            self._noise = ClientNoise(args.neftune_noise_alpha, args.pad_to_multiple_of)

        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            callbacks=[RoundCallback(self), *(callbacks or [])],
            **kwargs,
        )
        if args.world_size > 1:
            watch_launcher()
            limit_waiting(args.ddp_timeout_delta)
        if any(type(callback) is ProgressCallback for callback in self.callback_handler.callbacks):
            self.pop_callback(ProgressCallback)
            self.add_callback(FederatedProgressCallback(args.rounds))
        if args.enable_jit_checkpoint:
            self.add_callback(JITCheckpointAtStepEnd(self.pop_callback(JITCheckpointCallback)))

        # Rows
        self._rows_of = self._find_rows()
        if self._names_clients:
            self.train_dataset = self.train_dataset.remove_columns(column)
            if self.eval_dataset is not None:
                self.eval_dataset = _split_by_client(self.eval_dataset, column)

        # Slots
        if not isinstance(self.model, PeftModel):
            raise TypeError(
                f"The model is a `{type(self.model).__name__}` without an adapter, but only adapters are trained and "
                "shared. Wrap it with `peft.get_peft_model` first."
            )
        if not isinstance(self.model.get_base_model(), PreTrainedModel):
            raise TypeError(
                f"The base model is a `{type(self.model.get_base_model()).__name__}`, but it must be a "
                "`PreTrainedModel`: what is saved names the base by its config. Derive it from that class."
            )
        validate_peft_config(next(iter(self.model.peft_config.values())))
        if packed := keep_layout(self.model):
            logger.warning(
                "%d base layers had been packed for inference, as the base model was evaluated before it came here. "
                "They are taken back, with scales rounded to bf16. Load the base anew to train on the original.",
                packed,
            )
        self._gradient_probe = GradientProbe(self.model)
        self._base = describe_base(
            self.model.get_base_model(),
            revision=(args.model_init_kwargs or {}).get("revision"),
            sample=not mutates_base(next(iter(self.model.peft_config.values()))),
        )
        self._slots = Slots(
            self.model,
            num_slots,
            share_modules_to_save=args.share_modules_to_save,
            side_by_side=not self._keeps_trainer_loop,
        )

        # State: the server's tensors are fp32 whatever the slots train in, so that an average loses nothing.
        self._shared = clone_tensors(self._slots.select(0, "shared"), dtype=torch.float32)
        self._initial_shared = clone_tensors(self._shared)
        self._initial_local = self._slots.take(0, "local")
        # What some initialisations took out of the base weight, whatever the run starts from.
        self._created = {**self._initial_shared, **self._initial_local}
        self._begun = self._has_run = False
        # A checkpoint whose clients took the place of this trainer's own, for a run that then failed.
        self._replaced_by: Path | None = None
        # Whether slot 0 holds the first client's adapter, for users to read and to write.
        self._at_rest = True
        # Where several processes take turns at a client, they find its B on the disk they have in common.
        store = args.client_store_dir
        if store is None and self.spans_processes:
            store = str(Path(args.output_dir) / "client_store")
        self._store_dir = Path(store) if store is not None else None
        self._run_lock = RunLock({})
        self._clients = _make_store(self._store_dir, "clients")
        self._optimizers = _make_store(self._store_dir, "optimizers")
        self._mean = WeightedMean()
        # Updates of the open round that are judged when it closes, as tensors named `shared|...`, `local|...` and
        # `optimizer|...`.
        self._held: dict[str, dict[str, torch.Tensor]] = {}
        self._progress = RunState()
        self._slot_of: dict[str, int] = {}
        self._displaced: dict[str, torch.Tensor] | None = None
        self._losses: dict[str, torch.Tensor] = {}
        self._loss_counts: dict[str, int] = {}
        self._schedule_at_round_start: dict[str, Any] | None = None
        self._loss_scale_before_wave: dict[str, Any] = {}
        self._resuming = False
        self._resumed = Resumption()
        self._ends_round_first = False
        self._schedule_length = 0
        self._owned_as: str | None = None
        self._rounds: list[Round] = []
        # What is written of the federation
        self._origin: dict[str, Any] | None = None
        self._trains_shared = True
        self._card: dict[str, Any] = {}
        self._push_is_due = False
        self._pushed: set[str] = set()
        self._processing_files: list[str] = []
        self._hub_base_model = args.hub_base_model or hub.name_on_hub(_base_model_name(self.model))
        if args.push_to_hub and args.should_save:
            hub.check_repository(
                self.hub_model_id,
                private=args.hub_private_repo,
                token=args.hub_token,
                revision=args.hub_revision,
                model=self.model,
                hub_base_model=self._hub_base_model,
            )
        self._clock = time.perf_counter()

    # Construction

    def _check_eval_clients(self, eval_dataset: Dataset, args: FederatedConfig) -> None:
        if args.client_column not in eval_dataset.column_names:
            raise ValueError(
                f"`eval_dataset` has no column `{args.client_column}`, so it is not known which client to evaluate on "
                "which rows. Add the column, or pass a dictionary from client id to dataset."
            )
        named = rows_by_client(eval_dataset, args.client_column, name="eval_dataset")
        unseen = sorted(named.keys() - set(self.client_ids))
        if unseen and not args.eval_unseen_clients:
            raise ValueError(
                f"`eval_dataset` has rows of {unseen[0]!r}{_and_more(unseen)}, which has no training rows and so no B "
                "of its own. Remove them, or set `eval_unseen_clients=True` to evaluate such clients with the shared "
                "A and an untrained B."
            )
        validate_client_ids([*self.client_ids, *unseen])

    def _find_rows(self) -> dict[str, list[int]]:
        if not self._names_clients:
            return {ONLY_CLIENT: list(range(len(self.train_dataset)))}
        rows = rows_by_client(self.train_dataset, self.args.client_column, name="train_dataset")
        work = self._local_work()
        for client_id in self.client_ids:
            if not rows.get(client_id):
                raise ValueError(_EMPTY_AFTER_TRUNCATION.format(client_id=client_id, max_length=self._max_length()))
            if work.batches_per_pass(len(rows[client_id])) == 0:
                raise ValueError(
                    f"Client {client_id!r} has {len(rows[client_id])} rows, fewer than one batch of "
                    f"{work.batch_size}, and `dataloader_drop_last=True` drops them. Lower "
                    "`per_device_train_batch_size` or set `dataloader_drop_last=False`."
                )
        return {client_id: rows[client_id] for client_id in self.client_ids}

    def _max_length(self) -> int | None:
        return getattr(self.args, "max_length", None)

    def _local_work(self) -> LocalWork:
        local_epochs = self.args.local_epochs or (1 if self.args.local_steps is None else None)
        return LocalWork(
            batch_size=self.args.per_device_train_batch_size,
            accumulation_steps=self.args.gradient_accumulation_steps,
            local_steps=self.args.local_steps,
            local_epochs=local_epochs,
            drop_last=self.args.dataloader_drop_last,
        )

    def _start_from(self, origin: hub.Origin, train_shared: bool) -> None:
        """Starts from another federation's A, and trains it or not."""
        expected = self._slots.select(0, "shared")
        for key in sorted(expected.keys() | origin.shared.keys()):
            here, there = (list(t[key].shape) if key in t else None for t in (expected, origin.shared))
            if here != there:
                raise ValueError(
                    f"The shared tensors do not fit the base model: {key!r} has the shape {there}, and {here} is "
                    "needed. Leave `model` out to use the base they were trained on."
                )
        frozen = self._frozen_tensors
        if frozen and tensors_sha256(frozen) != origin.federation["frozen_sha256"]:
            raise ValueError(
                "The adapter's constant projections, drawn here from `projection_prng_key`, are not those that the "
                "shared tensors were trained with. Use the version of torch that `federation.json` names."
            )
        self._initial_shared, self._shared = clone_tensors(origin.shared), clone_tensors(origin.shared)
        origin.restore_patterns(self.model.peft_config.values())
        if origin.local is not None:
            if differing := sorted(self._initial_local.keys() ^ origin.local.keys()):
                raise ValueError(
                    f"The adapter to start from (`init_local`) differs from this one in {differing[0]!r}."
                )
            self._initial_local = {key: origin.local[key].to(t.dtype) for key, t in self._initial_local.items()}
        self._slots.load(0, self._initial_shared, self._initial_local)
        self._trains_shared = train_shared
        if not train_shared:
            self._slots.freeze("shared")
        self._origin = {
            "shared_sha256": tensors_sha256(origin.shared),
            "rounds_done": origin.federation["rounds_done"],
            "clients": sorted(origin.federation["clients"]),
        }

    def _take_edits(self) -> None:
        """
        Takes over what has been written into the model's adapter while no run was in progress.

        Only tensors that differ from what was put there, since slots may hold fewer bits than the server.
        """
        if self._slot_of or self._displaced is not None or not (self._at_rest or not self._names_clients):
            return
        self._check_store()
        first = self.client_ids[0]
        placed = self._client_tensors(first)
        edited = {key: t for key, t in self._slots.take(0).items() if not torch.equal(t, placed[key].to(t.dtype))}
        if not edited:
            return
        shared = {key: t.float() for key, t in edited.items() if self._slots.share_of[key] == "shared"}
        local = {key: t for key, t in edited.items() if key not in shared}
        self._shared = {**self._shared, **shared}
        if self._has_run:
            self._clients.put(first, {**self._local_tensors(first), **local})
            self._progress.stored_before = sorted({*self._progress.stored_before, first})
        else:
            self._initial_local = {**self._initial_local, **local}

    # What users read

    @property
    def round_history(self) -> list[dict[str, Any]]:
        """
        One entry per finished round: `round`, `clients`, `losses` and `weights` per client, `bytes_down` and
        `bytes_up` over all clients, `seconds`, the `step` it ended at, and `shared_sha256`, the hash of A after it.
        """
        return copy.deepcopy(self._progress.history)

    def shared_state_dict(self) -> dict[str, torch.Tensor]:
        """
        The server's tensors: A as it was averaged last (or initialised).

        Returns:
            `dict[str, torch.Tensor]`: copies on the CPU, fp32, under the keys PEFT saves them with.
        """
        self._take_edits()
        return clone_tensors(self._shared)

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
        with self._weights_to_be_used():
            return clone_tensors(self._local_tensors(client_id), dtype=torch.float32)

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
        with self._weights_to_be_used():
            tensors = self._client_tensors(client_id)
            before, outer = self._slots.take(0), self._displaced
            self._displaced = outer if outer is not None else before
            try:
                self._slots.load(0, tensors)
                with self._slots.whole_batches(0):
                    yield self.model
            finally:
                self._slots.load(0, before)
                self._displaced = outer

    @contextlib.contextmanager
    def _weights_to_be_used(self) -> Iterator[None]:
        """
        Within this context the slots hold the weights that clients serve with, where the optimizer trains others.

        Afterwards all is bit for bit as it was: an optimizer that converts them there and back rounds twice.
        """
        if not self._slot_of or self._displaced is not None or not self._trains_other_weights:
            yield
            return
        training = {slot: self._slots.take(slot) for slot in self._slot_of.values()}
        groups = [{k: v for k, v in group.items() if k != "params"} for group in self._inner_optimizer.param_groups]
        self._inner_optimizer.eval()
        try:
            yield
        finally:
            for group, before in zip(self._inner_optimizer.param_groups, groups, strict=True):
                group.update(before)
            for slot, tensors in training.items():
                self._slots.load(slot, tensors)

    def _check_client(self, client_id: str) -> None:
        if client_id in self.client_ids:
            return
        if self.args.eval_unseen_clients and isinstance(self.eval_dataset, dict) and client_id in self.eval_dataset:
            return
        raise ValueError(
            f"There is no client {client_id!r}. The clients are: {', '.join(self.client_ids[:20])}"
            f"{_and_more(self.client_ids, 20)}."
        )

    def _take_training(self, client_id: str) -> dict[str, torch.Tensor]:
        """The adapter of a client that is training, also while `use_client` has another one in its slot."""
        slot = self._slot_of[client_id]
        return clone_tensors(self._displaced) if slot == 0 and self._displaced is not None else self._slots.take(slot)

    def _local_tensors(self, client_id: str) -> dict[str, torch.Tensor]:
        if client_id in self._slot_of:
            training = self._take_training(client_id)
            return {key: tensor for key, tensor in training.items() if self._slots.share_of[key] == "local"}
        if client_id in self._held:
            held = self._held[client_id]
            return {name.removeprefix("local|"): t for name, t in held.items() if name.startswith("local|")}
        if self._trains_elsewhere(client_id):
            raise RuntimeError(
                f"Client {client_id!r} trains in another process in the round that is open, so what it holds now is "
                "not known here. Ask in `on_round_end` or after training. (`evaluate` can be called at any time, by "
                "all processes together.)"
            )
        # Not what the store has: that may be of another run until this one has begun, and what is lost must be missed.
        return self._stored("clients", client_id) if self._progress.has_stored(client_id) else self._initial_local

    def _stored(self, store: str, client_id: str) -> dict[str, torch.Tensor]:
        """What a client that has trained has left in a store."""
        self._check_store()
        try:
            return (self._clients if store == "clients" else self._optimizers).get(client_id)
        except ClientStoreError as error:
            checkpoint = checkpoint_with_copy(Path(self.args.output_dir), store, client_id)
            advice = f"{checkpoint or 'But no whole checkpoint'} {'is whole and ' if checkpoint else ''}has one."
            raise ClientStoreError(f"{error} {advice}") from error

    def _client_tensors(self, client_id: str) -> dict[str, torch.Tensor]:
        """The complete adapter a client serves with now, in the dtype of the slots."""
        if client_id in self._slot_of:
            return self._take_training(client_id)
        return {**self._broadcast(), **self._local_tensors(client_id)}

    def _broadcast(self) -> dict[str, torch.Tensor]:
        """The server's tensors as they travel to a client: in the dtype the client trains in."""
        slot = self._slots.select(0, "shared")
        return {key: tensor.to(slot[key].dtype) for key, tensor in self._shared.items()}

    # Data

    def get_train_dataloader(self) -> DataLoader:
        loader = super().get_train_dataloader()
        if self._keeps_trainer_loop:
            return loader
        self._rounds = self._plan_rounds()
        longest = max(round_.num_steps for round_ in self._rounds)
        # The Trainer's loader already has the right columns and collator; only the order of the rows is ours.
        return DataLoader(
            SlotDataset(loader.dataset),
            batch_sampler=RoundSampler(self._micro_batches, longest * self.args.gradient_accumulation_steps),
            collate_fn=SlotCollator(loader.collate_fn),
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            persistent_workers=self.args.dataloader_persistent_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor,
        )

    def _plan_rounds(self) -> list[Round]:
        num_rows = {client_id: len(rows) for client_id, rows in self._rows_of.items()}
        work = self._local_work()
        lengths = None
        if self._row_lengths is not None:
            lengths = {c: float(self._row_lengths[rows].mean()) for c, rows in self._rows_of.items()}
        return [
            plan_round(
                round_index=round_index,
                num_rows=num_rows,
                work=work,
                clients_per_round=self.args.clients_per_round,
                parallel_clients=len(self._slots),
                sampler=self._client_sampler,
                num_processes=self.args.world_size,
                process_index=self.args.process_index,
                row_lengths=lengths,
                trained=self._resumed.trained if round_index == self._progress.rounds_done else (),
            )
            for round_index in range(self.args.rounds)
        ]

    @staticmethod
    def _sample_clients(
        args: FederatedConfig, round_index: int, num_rows: Mapping[str, int], clients_per_round: int | None
    ) -> list[str]:
        return sample_clients(
            num_rows,
            clients_per_round,
            seed=args.seed,
            round_index=round_index,
            weights=num_rows if args.client_sampling == "examples" else None,
        )

    def _micro_batches(self) -> Iterator[list[tuple[int, int]]]:
        """
        The open round's micro-batches as `(slot, row)` pairs. Every step has as many as there are accumulation steps:
        where all clients have run out, the last ones are empty.
        """
        work = self._local_work()
        round_ = self._rounds[self._progress.rounds_done]
        for wave in round_.waves:
            steps = [
                work.steps(len(self._rows_of[client_id]), self._row_order(client_id, round_.round_index, work))
                for client_id in wave.client_ids
            ]
            for step in range(wave.num_steps):
                for i in range(work.accumulation_steps):
                    yield [
                        (slot, self._rows_of[client_id][row])
                        for slot, client_id in enumerate(wave.client_ids)
                        if step < len(steps[slot]) and i < len(steps[slot][step])
                        for row in steps[slot][step][i]
                    ]

    def _row_order(self, client_id: str, round_index: int, work: LocalWork) -> Callable[[int], list[int]]:
        """Order of a client's rows in each pass of a round, from (seed, round, client) alone."""
        rows = self._rows_of[client_id]
        lengths = self._row_lengths[rows] if self._row_lengths is not None else None
        strategy = self.args.train_sampling_strategy
        base_seed = self.args.data_seed if self.args.data_seed is not None else self.args.seed

        def order(pass_index: int) -> list[int]:
            if strategy == "sequential":
                return list(range(len(rows)))
            if len(self.client_ids) == 1:
                # Accelerate shuffles epoch e with the generator seeded `seed + e`; a lone client sees the same rows.
                seed = base_seed + round_index * work.num_passes(len(rows)) + pass_index
            else:
                seed = derive_seed(base_seed, "rows", round_index, client_id, pass_index)
            generator = torch.Generator().manual_seed(seed)
            if strategy == "group_by_length":
                batch = work.batch_size * work.accumulation_steps
                return list(LengthGroupedSampler(batch, lengths=lengths.tolist(), generator=generator))
            shuffled = torch.randperm(len(rows), generator=generator).tolist()
            if len(self.client_ids) == 1 or lengths is None:
                return shuffled
            seed, places = derive_seed(base_seed, "lengths", round_index), work.rows_per_pass(len(rows))
            return match_lengths(shuffled, lengths, seed=seed, start=pass_index * places, places=places)

        return order

    @functools.cached_property
    def _row_lengths(self) -> np.ndarray | None:
        """Length of every training row, in tokens, or `None` where rows have no token ids yet."""
        rows = self.train_dataset.with_format("arrow")
        if self.args.length_column_name in rows.column_names:
            lengths = rows[:][self.args.length_column_name]
            if pyarrow.types.is_integer(lengths.type) and not lengths.null_count:
                return lengths.to_numpy()
        if "input_ids" not in rows.column_names:
            return None
        # A part of the rows at a time: those of a selection are copied.
        lengths = [pyarrow.compute.list_value_length(part["input_ids"]).to_numpy() for part in rows.iter(10_000)]
        return np.concatenate(lengths)

    def set_initial_training_values(self, args: TrainingArguments, dataloader: DataLoader):
        values = super().set_initial_training_values(args, dataloader)
        if self._keeps_trainer_loop:
            return values
        if not self._rounds:
            raise ValueError(
                f"The `get_train_dataloader` of `{type(self).__name__}` did not call the one it overrides, so no "
                "round is planned, and its batches do not say which rows are of which client. Change what "
                "`super().get_train_dataloader()` returns, or pass a `data_collator`."
            )
        epochs, steps_per_epoch, num_examples, _, total_batch_size, steps_in_epoch, _ = values
        # Rounds done may have been of other lengths than they would be by the present arguments.
        max_steps = self._round_began_at() + sum(round_.num_steps for round_ in self._rounds_left())
        work = self._local_work()
        local_steps = sum(work.num_steps(len(self._rows_of[c])) for round_ in self._rounds for c in round_.client_ids)
        num_samples = local_steps * work.batch_size * work.accumulation_steps
        return epochs, steps_per_epoch, num_examples, num_samples, total_batch_size, steps_in_epoch, max_steps

    # The Trainer's `train_loss` is the mean over its steps, in which clients need not be equally many, and the first
    # process's alone. It has no hook between computing and logging that number.
    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "train_loss" in logs and self._progress.history and not self._keeps_trainer_loop:
            logs["train_loss"] = fmean(loss for entry in self._progress.history for loss in entry["losses"].values())
        with running_metrics_aside(self) if "round" in logs else contextlib.nullcontext():
            super().log(logs, start_time)

    # Under `local_epochs`, rounds differ in length, but the Trainer finds the epoch of a step by division.
    def _init_training_state(
        self, max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
    ):
        epochs_trained, steps_trained = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        if self._keeps_trainer_loop:
            # Saved after its last step, the round was to be closed by the end of the epoch, which is not to come.
            self._ends_round_first = resume_from_checkpoint is not None and steps_trained == 0
        if self._keeps_trainer_loop or resume_from_checkpoint is None:
            return epochs_trained, steps_trained
        # Earlier rounds may also have been shorter than planned, if a callback ended them.
        if self._resumed.steps_back:
            self.state.global_step -= self._resumed.steps_back
            taken = self.state.global_step
            self.state.log_history = [line for line in self.state.log_history if line["step"] <= taken]
        steps_trained = self.state.global_step - self._round_began_at()
        return self._progress.rounds_done, steps_trained * self.args.gradient_accumulation_steps

    def _round_began_at(self) -> int:
        """Steps of the rounds done, of a run that goes on."""
        return self._progress.history[-1]["step"] if self._resuming and self._progress.history else 0

    def _rounds_left(self) -> list[Round]:
        return self._rounds[self._progress.rounds_done if self._resuming else 0 :]

    # Computation

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device):
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self._keeps_trainer_loop:
            return batches, num_items
        for batch in batches:
            for slot, (kind, text) in batch.pop("unreadable").items():
                client_id = self._current_wave().client_ids[slot]
                if client_id not in self._progress.left_out:
                    # The text may quote rows and paths, and why a client was left out is published.
                    logger.warning("Rows of client %s cannot be read: %s: %s", client_id, kind, text)
                    self._progress.left_out[client_id] = f"its rows cannot be read ({kind})"
        parts: dict[int, list[dict[str, Any]]] = {}
        for batch in batches:
            for slot, part in split_rows(batch, batch["slot_rows"]):
                parts.setdefault(slot, []).append(part)
        # Each client's loss is normalised by its own tokens, counted the way the Trainer counts a whole batch.
        self._step_items = {slot: self._get_num_items_in_batch(part, device) for slot, part in parts.items()}
        self._step_batches = {slot: len(part) for slot, part in parts.items()}
        return batches, num_items

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        try:
            with contextlib.nullcontext() if self._keeps_trainer_loop else self._alone():
                return self._training_step(model, inputs, num_items_in_batch)
        except RuntimeError as error:
            # On the CPU the allocator raises a plain `RuntimeError`.
            if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
                raise
            raise torch.OutOfMemoryError(
                f"Out of memory in a step of {len(self._slots)} clients side by side with up to "
                f"{self.args.per_device_train_batch_size} rows each. Lower `parallel_clients` first, which changes "
                "speed and not results; then `per_device_train_batch_size` (with `gradient_accumulation_steps` raised "
                f"to match) or `max_length`. ({error})"
            ) from error

    def _training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None
    ) -> torch.Tensor:
        self._step_losses = []
        self._slots.keep_trained()
        if self._keeps_trainer_loop:
            loss = super().training_step(model, inputs, num_items_in_batch)
            self._add_loss(0, loss)
            return loss
        slot_rows: SlotRows = inputs.pop("slot_rows")
        if not slot_rows:
            return torch.zeros((), device=self.args.device)
        if self._serves_clients_together(num_items_in_batch):
            with self._serving(slot_rows, inputs):
                self._step_rows = slot_rows
                try:
                    super().training_step(model, inputs, num_items_in_batch)
                finally:
                    self._step_rows = None
        else:
            accumulation_steps = self.current_gradient_accumulation_steps
            for slot, part in split_rows(inputs, slot_rows):
                # Losses that are not normalised by a count of items are averaged over the client's own micro-batches.
                self.current_gradient_accumulation_steps = self._step_batches[slot]
                with self._serving(((slot, dict(slot_rows)[slot]),), part):
                    client_loss = super().training_step(model, part, self._step_items[slot])
                self._add_loss(slot, client_loss)
            self.current_gradient_accumulation_steps = accumulation_steps
        return self._loss_to_log()

    def _loss_to_log(self) -> torch.Tensor:
        """
        The step's share of the mean loss over clients. What was backpropagated is their sum.

        The Trainer takes the mean over processes, some of which may have fewer clients in this step. A client whose
        loss is not finite is about to be left out, and must not hide those of the others.
        """
        losses = torch.stack(self._step_losses)
        finite = torch.isfinite(losses)
        mine = len(self._step_batches)
        counted = (mine - (~finite).sum()).clamp(min=1)
        mean = torch.where(finite, losses, 0).sum() / counted
        return mean * mine * self.args.world_size / self._clients_in_step()

    def _clients_in_step(self) -> int:
        """Clients that train in the present step, over all processes."""
        if self.args.world_size == 1:
            return len(self._step_batches)
        return sum(steps > self._progress.wave_steps for steps in self._current_wave().steps_of_all)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """
        Within this context the Trainer computes for this process alone, where it would gather from all of them.

        Processes train and evaluate clients of their own: there is nothing to gather, and not equally often.
        """
        if self.args.world_size == 1:
            yield
            return
        gather = self.gather_function
        self.gather_function = _unchanged
        for name in _COLLECTIVES:
            setattr(self.accelerator, name, _unchanged)
        try:
            yield
        finally:
            for name in _COLLECTIVES:
                delattr(self.accelerator, name)
            self.gather_function = gather

    def _serving(self, slot_rows: SlotRows, inputs: Mapping[str, Any]):
        if self._noise is not None:
            self._noise.set_rows(slot_rows, inputs)
        main_input = inputs.get(self._main_input_name)
        length = main_input.shape[1] if isinstance(main_input, torch.Tensor) and main_input.dim() > 1 else None
        return self._slots.rows(slot_rows, sequence_length=length)

    def _overridden(self, name: str) -> bool:
        """Whether a subclass, or an assignment to this trainer, has put another method in the place of ours."""
        return name in vars(self) or getattr(type(self), name) is not getattr(FederatedMixin, name)

    def _serves_clients_together(self, num_items_in_batch) -> bool:
        """Whether one forward pass yields a loss per row. If not, the clients of a step run one after the other."""
        return False

    def _score_rows(self, model: nn.Module, inputs: dict[str, Any]):
        """One forward pass for all rows, returning what `compute_loss` reads, row by row."""
        raise RuntimeError("`_score_rows` is needed where `_serves_clients_together` is true.")

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self._step_rows is None:
            return super().compute_loss(
                model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
            )
        # One forward pass for all clients; then the Trainer computes each client's loss from that client's rows of the
        # outputs, so its loss types and metrics apply as they are.
        outputs = self._score_rows(model, inputs)
        total = None
        parts = zip(split_rows(inputs, self._step_rows), split_rows(outputs, self._step_rows), strict=True)
        for (slot, client_inputs), (_, client_outputs) in parts:
            replay = _Replay(type(outputs)(**client_outputs))
            loss = super().compute_loss(replay, client_inputs, num_items_in_batch=self._step_items[slot])
            self._add_loss(slot, loss)
            total = loss if total is None else total + loss
        return (total, outputs) if return_outputs else total

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

    def _add_loss(self, slot: int, loss: torch.Tensor) -> None:
        client_id = self._client_in(slot)
        loss = loss.detach().float()
        self._losses[client_id] = self._losses.get(client_id, 0.0) + loss
        self._step_losses.append(loss)

    def _client_in(self, slot: int) -> str:
        return next(client_id for client_id, other in self._slot_of.items() if other == slot)

    # A client's gradient must not depend on who trains beside it, so each slot is clipped by its own norm.
    def _clip_grad_norm(self, model):
        if self._keeps_trainer_loop:
            return super()._clip_grad_norm(model)
        return self._clip_slots(self.args.max_grad_norm)

    def _get_grad_norm(self, model, grad_norm=None):
        if self._keeps_trainer_loop or grad_norm is not None:
            return super()._get_grad_norm(model, grad_norm=grad_norm)
        return self._clip_slots(math.inf)

    def _clip_slots(self, max_norm: float) -> torch.Tensor:
        """Clips each client's gradients and returns the mean of their norms, as far as they are finite."""
        self.accelerator.unscale_gradients()
        norms = []
        for slot in range(len(self._slots)):
            trained = [p for p in self._slots.parameters[slot].values() if p.grad is not None]
            if trained:
                norms.append(nn.utils.clip_grad_norm_(trained, max_norm))
        # No client has a gradient if none of the step's rows could be read.
        if not norms:
            return torch.zeros((), device=self.args.device)
        finite = torch.isfinite(torch.stack(norms))
        return torch.where(finite, torch.stack(norms), 0).sum() / finite.sum().clamp(min=1)

    # Optimizer and schedule

    def _note_optimizer(self) -> None:
        """Keeps what the optimizer's groups hold as long as it is fresh. A subclass may have made it."""
        if self._fresh_optimizer_groups is not None:
            return
        known = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        slots = [p for slot in self._slots.parameters for p in slot.values() if p.requires_grad]
        if any(id(p) not in known for p in slots):
            raise ValueError(
                "The optimizer passed in `optimizers` or made by `create_optimizer` does not hold the parameters of "
                "all slots, which the trainer makes. Pass `optimizer_cls_and_kwargs` instead, or set "
                "`parallel_clients=1`."
            )
        if not self._resets_optimizer and len(self.client_ids) > 1 and self._trains_other_weights:
            refuse_kept_weights(type(self._inner_optimizer).__name__)
        if self._counts_by_client:
            split_groups(self._inner_optimizer, self._slots.parameters)
        self._fresh_optimizer_groups = copy.deepcopy(self.optimizer.state_dict()["param_groups"])

    @property
    def _counts_by_client(self) -> bool:
        """Whether clients side by side have counts of their own in the optimizer's groups."""
        return not self._resets_optimizer and len(self._slots) > 1

    @property
    def _inner_optimizer(self) -> torch.optim.Optimizer:
        return getattr(self.optimizer, "optimizer", self.optimizer)

    @property
    def _trains_other_weights(self) -> bool:
        """Whether the optimizer holds other weights while it trains than those to be used: it is schedule-free."""
        return callable(getattr(self._inner_optimizer, "eval", None))

    # Called once the optimizer is there, whoever made it, and before a resumed run's state is in it.
    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer = None):
        if not self._keeps_trainer_loop:
            # The learning rate follows the client's own steps, of which there are fewer than the run's.
            num_training_steps = self._resumed.scheduled_before + sum(r.local_steps for r in self._rounds_left())
            self._schedule_length = num_training_steps
        self._note_optimizer()
        return super().create_scheduler(num_training_steps, optimizer)

    @property
    def _steps_schedule(self) -> bool:
        # Schedulers that follow a metric are stepped by evaluations, not by optimizer steps.
        return not self._keeps_trainer_loop and self.args.lr_scheduler_type not in SCHEDULES_BY_METRIC

    @property
    def _keeps_optimizers(self) -> bool:
        """Whether a client's optimizer state waits with its tensors for its next round."""
        return not self._resets_optimizer and not self._keeps_trainer_loop

    def _rewind_schedule(self) -> None:
        self.lr_scheduler.load_state_dict(copy.deepcopy(self._schedule_at_round_start))
        self._set_rates(self.lr_scheduler.get_last_lr())

    def _set_rates(self, rates: list[float]) -> None:
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

    def _optimizer_entries(self) -> dict[tuple[int, str], int]:
        """Position of every slot's parameters in the optimizer's state dict, as `(slot, key) -> position`."""
        ordered = [p for group in self.optimizer.param_groups for p in group["params"]]
        position = {id(p): i for i, p in enumerate(ordered)}
        return {
            (slot, key): position[id(p)]
            for slot, parameters in enumerate(self._slots.parameters)
            for key, p in parameters.items()
            if id(p) in position
        }

    def _set_optimizer_state(
        self, state: dict[int, dict[str, Any]], counts: Mapping[int, Mapping[str, Any]] | None = None
    ) -> None:
        """Replaces all of the optimizer's state, and what it counts in its groups. Learning rates stay."""
        pairs = zip(self.optimizer.state_dict()["param_groups"], self._fresh_optimizer_groups, strict=True)
        groups = [renewed(group, copy.deepcopy(fresh)) for group, fresh in pairs]
        for index, entries in (counts or {}).items():
            groups[index].update(entries)
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})

    def _take_optimizer_state(self, slot: int) -> dict[str, torch.Tensor]:
        """
        A slot's optimizer state as tensors, numbers among them as tensors without dimensions.

        What the optimizer counts in the slot's parameter groups is named `group|<number>|...`.
        """
        saved = self.optimizer.state_dict()
        taken = {
            f"{key}|{name}": value.detach().cpu().clone() if isinstance(value, torch.Tensor) else torch.tensor(value)
            for (owner, key), position in self._optimizer_entries().items()
            if owner == slot
            for name, value in flatten_state(saved["state"].get(position, {}))
        }
        for number, index in enumerate(groups_of(self.optimizer, self._slots.parameters[slot])):
            changed = counters(saved["param_groups"][index], self._fresh_optimizer_groups[index])
            taken |= {f"group|{number}|{name}": value for name, value in changed.items()}
        return taken

    def _keep_counts(self, trained: list[int]) -> None:
        """Undoes what an optimizer counted for clients that were not in the step. It counts steps, not gradients."""
        for slot in self._slot_of.values():
            for index in groups_of(self.optimizer, self._slots.parameters[slot]):
                group = self.optimizer.param_groups[index]
                if slot in trained or index not in self._counts:
                    self._counts[index] = counted(group)
                else:
                    group.update(counted(self._counts[index]))

    def _load_optimizer_states(self, wave: Wave) -> None:
        state: dict[int, dict[str, Any]] = {}
        counts: dict[int, dict[str, Any]] = {}
        entries = self._optimizer_entries()
        for slot, client_id in enumerate(wave.client_ids):
            if client_id not in self._progress.with_optimizer:
                continue
            groups = groups_of(self.optimizer, self._slots.parameters[slot])
            for name, value in self._stored("optimizers", client_id).items():
                if name.startswith("group|"):
                    _, number, entry_name = name.split("|", maxsplit=2)
                    counts.setdefault(groups[int(number)], {}).update(counters_from({entry_name: value}))
                    continue
                key, *fields, last = name.split("|")
                entry = state.setdefault(entries[slot, key], {})
                for field in fields:
                    entry = entry.setdefault(field, {})
                # Integer tensors without dimensions were Python numbers: torch's own step counters are floats.
                number = value.dim() == 0 and not value.is_floating_point()
                entry[last] = value.item() if number else value
        self._set_optimizer_state(state, counts)

    # Rounds: called by `RoundCallback` from the Trainer's events

    def begin_run(self) -> None:
        """Starts from the present weights, unless a checkpoint has just been loaded."""
        if self._fresh_optimizer_groups is None and not self._keeps_trainer_loop:
            raise ValueError(
                f"The `create_scheduler` of `{type(self).__name__}` did not call the one it overrides, so its "
                "schedule is as long as the run and not as the clients' own steps. Call "
                "`super().create_scheduler(...)`, or set `lr_scheduler_type` and `lr_scheduler_kwargs`."
            )
        if not self._resuming and self._replaced_by is not None:
            raise RuntimeError(
                f"A run that was to go on from {self._replaced_by} has failed after it had put the clients of that "
                "checkpoint in the place of this trainer's own. Resume from a checkpoint, or make a new trainer."
            )
        self._replaced_by = None
        if not self._resuming:
            earlier, run_id = self._progress, uuid4().hex
            with self._first_process_first():
                self._claim_store(run_id, resuming=False)
                if not self._has_run:
                    self._fill_stores({})
            self._slot_of, self._losses, self._loss_counts = {}, {}, {}
            self._take_edits()
            self._initial_shared = clone_tensors(self._shared)
            self._mean, self._held, self._progress = WeightedMean(), {}, earlier.for_next_run(run_id)
        elif self._ends_round_first:
            self.end_round()
        self._resuming = self._ends_round_first = False
        self._begun, self._has_run, self._at_rest = True, True, False
        if self.is_world_process_zero():
            write_json(Path(self.args.output_dir) / _LAST_RUN, {"run_id": self._progress.run_id})
        if self._noise is not None:
            # The Trainer's own hook scales the noise by the length of the whole batch. It takes off this one as well.
            self.neftune_hook_handle.remove()
            embeddings = self.model.get_base_model().get_input_embeddings()
            self.neftune_hook_handle = self._noise_handle = embeddings.register_forward_hook(self._noise)
        if self.spans_processes:
            plans = gather_object([[round_.client_ids for round_ in self._rounds]])
            differing = [i for i, sampled in enumerate(zip(*plans, strict=True)) if len(set(sampled)) > 1]
            if differing:
                raise ValueError(
                    f"`client_sampler` chose other clients for round {differing[0]} in one process than in another. "
                    "It must depend on its arguments alone, so draw from a generator that is seeded by them."
                )

    def _first_process_first(self) -> contextlib.AbstractContextManager[None]:
        return first_process_first(self.is_world_process_zero())

    @contextlib.contextmanager
    def _alone_in_its_folders(self) -> Iterator[None]:
        """Within this context no other run can begin in the folders that this one writes to."""
        folders = {"output_dir": Path(self.args.output_dir)}
        if self._store_dir is not None:
            folders["client_store_dir"] = self._store_dir
        lock = RunLock(folders)
        try:
            with self._first_process_first():
                if self.is_world_process_zero():
                    lock.acquire()
            self._run_lock = lock
            yield
        finally:
            lock.release()

    def _fill_stores(self, folders: Mapping[str, Path]) -> None:
        """Replaces what the stores hold by the files of folders called `clients` and `optimizers`, or by nothing."""
        if self._store_dir is not None and not self.is_world_process_zero():
            return  # The first process has done it for all.
        for name, store in (("clients", self._clients), ("optimizers", self._optimizers)):
            store.clear()
            for path in sorted(folders[name].glob("*.safetensors")) if name in folders else ():
                store.put(path.name.removesuffix(".safetensors"), load_file(path))

    def _claim_store(self, run_id: str, resuming: bool) -> None:
        """Makes sure that a store on disk holds no clients of another run before they are replaced."""
        if self._store_dir is None or not self.is_world_process_zero():
            return
        store, output_dir = self._store_dir.resolve(), Path(self.args.output_dir).resolve()
        # A store inside of the run's folder is moved with it.
        known_as = os.path.relpath(output_dir, store) if store.is_relative_to(output_dir) else str(output_dir)
        this_run = {"output_dir": known_as, "client_ids": sorted(self.client_ids), "run_id": run_id}
        path = self._store_dir / "run.json"
        if not resuming:
            self._check_store()
        owner = self._store_owner()
        ours = self._owned_as is not None and owner.get("run_id") == self._owned_as
        if not ours and (list(self._clients) or list(self._optimizers)):
            same_place = owner.get("output_dir") in (known_as, str(output_dir))
            same_run = owner.get("client_ids") == this_run["client_ids"] and (
                same_place or (resuming and owner.get("run_id") == run_id)
            )
            # A run that died before its first checkpoint has to start anew, and its clients are of no use.
            nothing_to_resume = newest_whole_checkpoint(output_dir, warn=logger.debug) is None
            # One that has finished may have left them nowhere else, in a folder that the user has named.
            nothing_to_resume &= not (owner.get("finished") and self.args.client_store_dir)
            if not (same_run and (resuming or nothing_to_resume)):
                raise ValueError(
                    f"`client_store_dir={str(self._store_dir)!r}` holds the clients of another run, which this one "
                    "would overwrite. Resume that run from a checkpoint, or pass another directory."
                )
        write_json(path, this_run)
        self._owned_as = run_id

    def _store_owner(self) -> dict[str, Any]:
        """What is known of the run whose clients are in the store on disk."""
        path = self._store_dir / "run.json"
        try:
            owner = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        except ValueError:
            owner = {}
        return owner if isinstance(owner, dict) else {}

    def _check_store(self) -> None:
        """Makes sure that the clients in a store on disk are those of this trainer's last run."""
        if self._owned_as is not None and self._store_owner().get("run_id") != self._owned_as:
            raise ClientStoreError(
                f"{self._store_dir} is gone, or another run has used it since this trainer's last one, so its clients "
                "are not those to go on with. Resume from a checkpoint, or make a new trainer."
            )

    def begin_round(self) -> None:
        """Announces the round. Its clients are loaded at its first step."""
        self._clock = time.perf_counter()
        self._gradient_probe.check()
        self._call_round_event(
            "on_round_begin", round_index=self._progress.rounds_done, client_ids=self._current_round().client_ids
        )

    def begin_step(self) -> None:
        """Loads the next wave's clients if none are in the slots, and makes the step's random numbers its own."""
        progress = self._progress
        wave = self._current_wave()
        if not self.model.training:  # Something was evaluated since the last step.
            self._gradient_probe.check()
        if not progress.wave_open:
            self._open_wave(wave)
        if self._counts_by_client and not self._counts:
            self._keep_counts(trained=[])
        if not self._keeps_trainer_loop:
            # From (seed, round, clients, step) alone, so that a step can be replayed whatever was drawn before it.
            torch.manual_seed(
                derive_seed(self.args.seed, "step", progress.rounds_done, *wave.client_ids, progress.wave_steps)
            )

    def end_step(self) -> None:
        """Counts the step and, after the wave's last one, takes the clients out of the slots."""
        report_step(self.state.global_step)
        progress = self._progress
        progress.wave_steps += 1
        slots = [0] if self._keeps_trainer_loop else list(self._step_batches)
        if self._counts_by_client:
            self._keep_counts(slots)
        for slot in slots:
            client_id = self._client_in(slot)
            if client_id not in self._losses and client_id not in progress.left_out:
                raise RuntimeError(
                    f"The step of client {client_id!r} has no loss: the `training_step` of `{type(self).__name__}` "
                    "did not call the one it overrides, which divides the work by client. Call "
                    "`super().training_step`, or put your computation into `compute_loss`."
                )
            self._loss_counts[client_id] = self._loss_counts.get(client_id, 0) + 1
        if self._keeps_trainer_loop:
            return  # The Trainer's loader knows how long the pass is, and ends the epoch.
        if progress.wave_steps == self._current_wave().num_steps:
            self._close_wave()
            if progress.waves_done == len(self._current_round().waves):
                self._close_round()

    def end_round(self) -> None:
        """Closes a round that is still open: one that the Trainer's loop ran, or one that a callback cut short."""
        if self._progress.wave_open:
            self._close_wave()
        if self._progress.round_open:
            self._close_round()

    def end_run(self) -> None:
        """Leaves the model with the first client's adapter. [`use_client`] switches to another."""
        self.end_round()
        if self._push_is_due:
            self._finish_current_push()
            self._push_progress()
        if not self._names_clients:
            self._take_edits()  # The Trainer has put back the best weights, if it was asked to.
        if self._owned_as is not None:
            write_json(self._store_dir / "run.json", {**self._store_owner(), "finished": True})
        self._rest()

    def _rest(self) -> None:
        """Puts the first client's adapter into the model, for users to read and to write."""
        self._slots.load(0, self._client_tensors(self.client_ids[0]))
        for slot in range(1, len(self._slots)):
            # Whatever is made of the model's state dict, it does not hold the B of the clients that came last.
            self._slots.load(slot, self._broadcast(), self._initial_local)
        self._at_rest = True

    def _current_round(self) -> Round:
        if self._keeps_trainer_loop:
            wave = Wave(tuple(self.client_ids), num_steps=0)
            return Round(self._progress.rounds_done, tuple(self.client_ids), (wave,))
        return self._rounds[self._progress.rounds_done]

    def _current_wave(self) -> Wave:
        return self._current_round().waves[self._progress.waves_done]

    def _open_wave(self, wave: Wave) -> None:
        progress = self._progress
        if not progress.round_open:
            progress.round_open = True
            if self._steps_schedule:
                self._schedule_at_round_start = copy.deepcopy(self.lr_scheduler.state_dict())
        elif self._steps_schedule:
            self._rewind_schedule()
        sent = self._broadcast()
        for slot, client_id in enumerate(wave.client_ids):
            self._slots.load(slot, sent, self._local_tensors(client_id))
            progress.bytes_down += count_bytes(sent)
        self._slot_of = {client_id: slot for slot, client_id in enumerate(wave.client_ids)}
        if self._resets_optimizer:
            self._set_optimizer_state({})
        elif self._keeps_optimizers:
            self._load_optimizer_states(wave)
        if self.accelerator.scaler is not None:
            self._loss_scale_before_wave = self.accelerator.scaler.state_dict()
        progress.wave_open, progress.wave_steps = True, 0
        self._counts = {}

    def _before_writing(self) -> None:
        """Ends a run that others may believe dead before it writes between the files of the next one."""
        exit_without_launcher()
        self._run_lock.check()

    def _close_wave(self) -> None:
        self._before_writing()
        progress = self._progress
        wave = self._current_wave()
        if self._trains_other_weights:
            self._inner_optimizer.eval()
        sent = self._broadcast()
        for slot, client_id in enumerate(wave.client_ids):
            if not self._loss_counts.get(client_id) and client_id not in progress.left_out:
                continue  # The run was stopped before its first step ended, so it is as it was.
            returned = self._slots.take(slot, "shared")
            if fault := progress.left_out.get(client_id) or self._fault_of(client_id, slot, sent, returned):
                self._leave_out(client_id, fault)
                continue
            optimizer = self._take_optimizer_state(slot) if self._keeps_optimizers else {}
            if self._stands_out(client_id, sent, returned):
                parts = {"shared": returned, "local": self._slots.take(slot, "local"), "optimizer": optimizer}
                self._held[client_id] = {f"{part}|{key}": t for part, ts in parts.items() for key, t in ts.items()}
            else:
                self._count(client_id, returned, self._slots.select(slot, "local"), optimizer)
        if self._loss_scale_before_wave and any(c in progress.left_out for c in wave.client_ids):
            # A client that is not finite has made the scale ever smaller, and the next ones would start from there.
            self.accelerator.scaler.load_state_dict(self._loss_scale_before_wave)
        self._slot_of = {}
        progress.wave_open, progress.waves_done = False, progress.waves_done + 1

    def _stands_out(
        self, client_id: str, sent: Mapping[str, torch.Tensor], returned: Mapping[str, torch.Tensor]
    ) -> bool:
        """Whether a client's change of A is large enough to be compared to those of the others, once all are known."""
        if self.args.max_update_norm != "auto" or len(self.client_ids) == 1:
            return False
        before, change = norm_and_change(sent, returned)
        self._progress.changes[client_id] = [change, self._loss_counts[client_id]]
        return change > JUDGED_FROM * before

    def _count(
        self,
        client_id: str,
        returned: Mapping[str, torch.Tensor],
        local: Mapping[str, torch.Tensor],
        optimizer: Mapping[str, torch.Tensor],
    ) -> None:
        """Adds a client's A to the average and keeps its B."""
        progress = self._progress
        progress.weights[client_id] = self._weight(client_id)
        if self._trains_shared:
            progress.bytes_up += count_bytes(returned)
            self._mean.add(returned, progress.weights[client_id])
        self._clients.put(client_id, local)
        if self._keeps_optimizers:
            self._optimizers.put(client_id, optimizer)
            progress.with_optimizer = sorted({*progress.with_optimizer, client_id})
        last = progress.last_round.get(client_id)
        progress.staleness[client_id] = None if last is None else progress.rounds_done - last
        progress.last_round[client_id] = progress.rounds_done

    def _judge(self) -> None:
        """
        Leaves out the clients that stand out from the others of the round, and counts the rest of those held back.

        It comes at the round's end, so that it does not matter which clients trained side by side, or in one process.
        """
        if self.args.max_update_norm != "auto" or len(self.client_ids) == 1:
            return
        changes = {client_id: (change, steps) for client_id, (change, steps) in self._progress.changes.items()}
        if self.spans_processes:
            changes = {c: change for part in gather_object([changes]) for c, change in part.items()}
        faults = outliers(changes, norm=float(nn.utils.get_total_norm(t.float() for t in self._broadcast().values())))
        for client_id, tensors in sorted(self._held.items()):  # The order of a resumed run, too.
            if client_id in faults:
                self._leave_out(client_id, faults[client_id])
                continue
            parts: dict[str, dict[str, torch.Tensor]] = {"shared": {}, "local": {}, "optimizer": {}}
            for name, tensor in tensors.items():
                part, key = name.split("|", maxsplit=1)
                parts[part][key] = tensor
            self._count(client_id, parts["shared"], parts["local"], parts["optimizer"])
        self._held = {}

    def _leave_out(self, client_id: str, fault: str) -> None:
        self._progress.left_out[client_id] = fault
        logger.warning("Client %s is left out of round %d: %s.", client_id, self._progress.rounds_done, fault)

    def _fault_of(
        self, client_id: str, slot: int, sent: Mapping[str, torch.Tensor], returned: Mapping[str, torch.Tensor]
    ) -> str | None:
        """Why a client's update must not enter the average, or `None`."""
        loss = float(self._losses[client_id])
        if not math.isfinite(loss):
            return f"its loss is {loss}"
        if not torch.isfinite(nn.utils.get_total_norm(self._slots.select(slot).values())):
            return "its update is not finite"
        if self.args.max_update_norm in (None, "auto"):
            return None
        before, change = norm_and_change(sent, returned)
        # A that starts at zero, as that of embeddings does, has no scale to compare to.
        if before > 0 and change > self.args.max_update_norm * before:
            return (
                f"its A has changed by {change / before:.3g} times the norm it had, more than "
                f"`max_update_norm={self.args.max_update_norm}`"
            )
        return None

    def _weight(self, client_id: str) -> float:
        if self.args.aggregation_weighting == "uniform":
            return 1.0
        num_rows = len(self._rows_of[client_id])
        if self._keeps_trainer_loop:
            return float(num_rows)
        work = self._local_work()
        order = self._row_order(client_id, self._progress.rounds_done, work)
        return float(work.num_examples(num_rows, order, self._loss_counts[client_id]))

    def _close_round(self) -> None:
        self._judge()
        losses = {c: float(self._losses[c]) / self._loss_counts[c] for c in self._progress.weights}
        if self.spans_processes:
            losses = self._combine_processes(losses)
        progress = self._progress
        if not progress.weights and progress.left_out:
            client_id, fault = next(iter(progress.left_out.items()))
            raise RuntimeError(
                f"All {len(progress.left_out)} clients of round {progress.rounds_done} were left out, such as "
                f"{client_id!r}: {fault}. A and every B are as they were before the round, and so is what was saved. "
                "If losses are not finite, lower `learning_rate` or look at the rows. If rows cannot be read, the log "
                "says why."
            )
        if not progress.weights:  # The run was stopped before any client had taken a step.
            self._progress = progress.after_round()
            return
        counted = len(progress.weights) >= self.args.min_clients_per_round
        if self._trains_shared and counted:
            self._shared = self._mean.mean
        if not counted:
            logger.warning(
                "Round %d does not count: %d clients returned an update, and `min_clients_per_round=%d`. A stays as "
                "it was.",
                progress.rounds_done,
                len(progress.weights),
                self.args.min_clients_per_round,
            )
        metrics = round_metrics(
            round_index=progress.rounds_done,
            losses=losses,
            weights=progress.weights,
            left_out=progress.left_out,
            staleness=progress.staleness,
            counted=counted,
            bytes_down=progress.bytes_down,
            bytes_up=progress.bytes_up,
            seconds=progress.seconds + time.perf_counter() - self._clock,
        )
        metrics["step"] = self.state.global_step
        metrics["shared_sha256"] = tensors_sha256(self._shared)
        self._advance_schedule_to_round_end()
        progress.history.append(metrics)
        self._progress = progress.after_round()
        self._mean, self._losses, self._loss_counts = WeightedMean(), {}, {}
        if self.is_world_process_zero():
            self._write_rounds(Path(self.args.output_dir))
        if self._names_clients:
            # Logging clears the flag, but the Trainer's own line for this step is still to come.
            should_log = self.control.should_log
            self.log(log_line(metrics))
            self.control.should_log = should_log
        self._call_round_event("on_round_end", metrics=copy.deepcopy(metrics))
        if self._push_is_due:
            self._push_progress()

    def _combine_processes(self, losses: Mapping[str, float]) -> dict[str, float]:
        """
        Adds up the round over all processes: A as one all-reduce of weighted sums in fp32, and what is reported of it.

        Returns:
            `dict[str, float]`: mean loss of every client of the round.
        """
        progress = self._progress
        if self._trains_shared:
            keys = sorted(self._shared)
            sums = [
                self._mean.mean.get(key, torch.zeros_like(self._shared[key])) * self._mean.total_weight for key in keys
            ]
            total = torch.tensor([self._mean.total_weight], dtype=torch.float32)
            flat = torch.cat([*(tensor.flatten() for tensor in sums), total]).to(self.args.device)
            flat = self.accelerator.reduce(flat, reduction="sum").cpu()
            if (weight := float(flat[-1])) > 0:
                parts = (flat[:-1] / weight).split([self._shared[key].numel() for key in keys])
                mean = {k: part.view_as(self._shared[k]).clone() for k, part in zip(keys, parts, strict=True)}
                self._mean = WeightedMean(mean, weight)
        mine = {
            "losses": dict(losses),
            "weights": progress.weights,
            "left_out": progress.left_out,
            "staleness": progress.staleness,
            "last_round": {c: r for c, r in progress.last_round.items() if r == progress.rounds_done},
            "bytes": [progress.bytes_down, progress.bytes_up],
        }
        everyone = gather_object([mine])
        for name in ("weights", "left_out", "staleness", "last_round"):
            for part in everyone:
                getattr(progress, name).update(part[name])
        if self._keeps_optimizers:
            progress.with_optimizer = sorted({*progress.with_optimizer, *progress.weights})
        progress.bytes_down, progress.bytes_up = (sum(part["bytes"][i] for part in everyone) for i in (0, 1))
        return {client_id: loss for part in everyone for client_id, loss in part["losses"].items()}

    @property
    def spans_processes(self) -> bool:
        """Whether the clients are spread over several processes. One client alone is trained as its Trainer does."""
        return self.args.world_size > 1 and not self._keeps_trainer_loop

    def _trains_elsewhere(self, client_id: str) -> bool:
        """Whether another process trains the client in the open round, and alone knows what it holds."""
        if not (self.spans_processes and self.round_is_open):
            return False
        round_ = self._current_round()
        return client_id in round_.client_ids and not any(client_id in wave.client_ids for wave in round_.waves)

    @property
    def round_is_open(self) -> bool:
        """Whether a client of a round has begun to train, and the round's A is not averaged yet."""
        return self._progress.round_open

    def _advance_schedule_to_round_end(self) -> None:
        """The last wave may have been shorter than the round is on the schedule."""
        if self._steps_schedule:
            for _ in range(self._current_round().local_steps - self._progress.wave_steps):
                self.lr_scheduler.step()

    def _call_round_event(self, event: str, **kwargs) -> None:
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, FederatedCallback):
                getattr(callback, event)(self.args, self.state, self.control, trainer=self, **kwargs)

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
        if not self._names_clients:
            metrics = super().evaluate(eval_dataset, ignore_keys=ignore_keys, metric_key_prefix=metric_key_prefix)
            if own_rows:
                self._keep_results({ONLY_CLIENT: metrics})
            return metrics
        if eval_dataset is None and self.eval_dataset is None:
            return super().evaluate()  # Raises the Trainer's own error.
        if isinstance(eval_dataset, str):
            self._check_client(eval_dataset)
            if eval_dataset not in (self.eval_dataset or {}):
                raise ValueError(
                    f"`eval_dataset` given to the trainer has no rows of {eval_dataset!r}. Pass a dictionary from "
                    "client id to dataset here, or add the client's rows there."
                )
            datasets: Mapping[str, Any] = {eval_dataset: eval_dataset}
        elif eval_dataset is None:
            datasets = {client_id: client_id for client_id in self.eval_dataset}
        else:
            datasets = self._prepare_eval_clients(eval_dataset)

        start_time = time.time()
        metrics: dict[str, float] = {}
        by_name: dict[str, list[float]] = {}
        results: dict[str, dict[str, float]] = {}
        num_samples = num_steps = 0
        mine = self._evaluated_here(list(datasets))
        outputs: dict[str, tuple[dict[str, Any], int]] = {}
        take_running_metrics(self)  # Of whatever was computed in evaluation mode before, as by `predict`.
        for client_id in mine:
            with self._alone(), self.use_client(client_id):
                output = self.evaluation_loop(
                    self.get_eval_dataloader(datasets[client_id]),
                    description=f"Evaluation of {client_id}",
                    prediction_loss_only=True if self.compute_metrics is None else None,
                    ignore_keys=ignore_keys,
                    metric_key_prefix=f"{metric_key_prefix}_{client_id}",
                )
            running = take_running_metrics(self)
            own = {f"{metric_key_prefix}_{client_id}_{name}": value for name, value in running.items()}
            outputs[client_id] = {**output.metrics, **own}, output.num_samples
        if self.args.world_size > 1:
            outputs = {client_id: output for part in gather_object([outputs]) for client_id, output in part.items()}
        for client_id in datasets:
            client_metrics, samples = outputs[client_id]
            num_samples += samples
            num_steps += math.ceil(samples / self.args.eval_batch_size)
            for key, value in client_metrics.items():
                name = key.removeprefix(f"{metric_key_prefix}_{client_id}_")
                if name != "model_preparation_time":
                    metrics[key] = value
                    by_name.setdefault(name, []).append(value)
                    results.setdefault(client_id, {})[f"eval_{name}"] = value
        for name, values in by_name.items():
            if all(isinstance(value, (int, float)) for value in values):
                metrics[f"{metric_key_prefix}_{name}"] = sum(values) / len(values)
        if own_rows:
            self._keep_results(results)
        speed = speed_metrics(metric_key_prefix, start_time, num_samples=num_samples, num_steps=num_steps)
        if len(datasets) > MOST_CLIENTS_IN_LOG:
            self.log({**spread(by_name, metric_key_prefix), **speed})
        else:
            self.log({**metrics, **speed})
        metrics.update(speed)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

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

    def _evaluated_here(self, client_ids: list[str]) -> list[str]:
        """Clients that this process evaluates: those that it trains in the open round, and its share of the others."""
        training = self._current_round().client_ids if self.spans_processes and self.round_is_open else ()
        others = [client_id for client_id in client_ids if client_id not in training]
        return [
            *(c for c in client_ids if c in training and not self._trains_elsewhere(c)),
            *others[self.args.process_index :: self.args.world_size],
        ]

    def _keep_results(self, results: Mapping[str, Mapping[str, Any]]) -> None:
        """Keeps the metrics of clients for the model card."""
        speed = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time", "num_tokens")
        left_out = {"epoch", *(f"eval_{name}" for name in speed)}
        progress = self._progress
        if progress.results_after_round != progress.rounds_done:
            progress.results = {}
        progress.results_after_round = progress.rounds_done
        for client_id, metrics in results.items():
            if client_id in self._rows_of:
                progress.results[client_id] = {
                    name: value if math.isfinite(value) else None
                    for name, value in metrics.items()
                    if isinstance(value, (int, float)) and name not in left_out
                }
        if progress.history:
            progress.history[-1]["results"] = copy.deepcopy(progress.results)
            if self.args.should_save:
                self._write_rounds(Path(self.args.output_dir))

    def _prepare_eval_clients(self, eval_dataset: Dataset | Mapping[str, Dataset]) -> dict[str, Dataset]:
        merged = _as_one_dataset(eval_dataset, self.args, name="eval_dataset")
        self._check_eval_clients(merged, self.args)
        return _split_by_client(self._prepare_rows(merged), self.args.client_column)

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
            if not self._names_clients:
                super().save_model(str(directory), _internal_call=True)
            if self.args.should_save:
                self._save_state(directory)
            self.accelerator.wait_for_everyone()
            return
        self._save_federation(directory)
        if self.args.push_to_hub and not _internal_call and self.args.should_save:
            self._push(directory, commit_message="Model save", revision=self.args.hub_revision)

    def _save_federation(self, directory: Path) -> None:
        if self.spans_processes and self.round_is_open:
            raise RuntimeError(
                "In the middle of a round, each process knows its own clients alone, so the federation cannot be "
                "saved. Save in `on_round_end`, or after training."
            )
        self._finish_current_push()  # It reads the files that are about to be replaced.
        self._take_edits()
        if not self.args.should_save:
            if not self._names_clients:
                super().save_model(str(directory), _internal_call=True)
            return
        hub.warn_of_other_clients(directory, self.client_ids)
        self._processing_files = []
        with saving(directory) as folder:
            if self.processing_class is not None:
                self._processing_files = hub.save_processing_class(self.processing_class, folder)
            if not self._names_clients:
                super().save_model(str(folder), _internal_call=True)
            torch.save(self.args, folder / "training_args.bin")
            with self._weights_to_be_used():
                hub.save_federation(
                    folder,
                    {**self._describe(), "processing_files": self._processing_files},
                    self._progress.history,
                    model=self.model,
                    adapter_name=self._slots.names[0],
                    shared=self._shared,
                    client_tensors=self._client_tensors,
                    initial_tensors=self._created,
                    frozen=self._frozen_tensors,
                )

    @functools.cached_property
    def _frozen_tensors(self) -> dict[str, torch.Tensor]:
        """The adapter's constants, such as VeRA's projections."""
        every = adapter_tensors(self.model, self._slots.names[0])
        return clone_tensors({key: tensor for key, tensor in every.items() if key not in self._slots.parameters[0]})

    def _describe(self) -> dict[str, Any]:
        """What `federation.json` says, but for the hashes of files."""
        progress = self._progress
        clients = {}
        for client_id in self.client_ids:
            clients[client_id] = {
                "num_examples": len(self._rows_of[client_id]),
                "last_round": progress.last_round.get(client_id) if self._origin is None else None,
                "results": progress.results.get(client_id, {}),
                "joined": self._origin is not None,
            }
        summary = {
            "rounds_done": progress.rounds_done,
            "num_rounds": self.args.rounds,
            "aggregation_weighting": self.args.aggregation_weighting,
            "share_modules_to_save": self.args.share_modules_to_save,
            "initial_shared_sha256": tensors_sha256(self._initial_shared),
            "origin": self._origin,
            "root_adapter": None if self._names_clients else ONLY_CLIENT,
            "returned_rounds": 0,
            "hub_base_model": self._hub_base_model,
            "base_revision": (self.args.model_init_kwargs or {}).get("revision"),
            "results_after_round": progress.results_after_round,
            "arguments": {
                "num_rounds": self.args.rounds,
                **{name: getattr(self.args, name) for name in _ARGUMENTS_IN_CARD},
            },
            "card": self._card,
            "processing_files": [],
            "clients": clients,
        }
        return hub.describe_federation(
            model=self.model,
            adapter_name=self._slots.names[0],
            method=self._slots.method,
            shared=self._shared,
            frozen=self._frozen_tensors,
            summary=json.loads(json.dumps(summary, default=str)),
        )

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
        card = _card_entries(model_name, dataset_name, tags, language, license)
        federation = {**self._describe(), "card": {**self._card, **card}}
        write_text(Path(self.args.output_dir) / "README.md", make_model_card(federation, self._progress.history, None))

    def _write_rounds(self, directory: Path) -> None:
        lines = "".join(json.dumps(metrics) + "\n" for metrics in self._progress.history)
        write_text(directory / "rounds.jsonl", lines)

    def _identity(self) -> dict[str, Any]:
        """All that the results depend on, see `hf_fedsa.identity`."""
        config = self._slots.config
        identity = {
            "method": self._slots.method.name,
            "client_ids": sorted(self.client_ids),
            "r": config.r,
            "tensors": {key: list(p.shape) for key, p in self._slots.parameters[0].items()},
            "share_modules_to_save": self.args.share_modules_to_save,
            "origin": self._origin and self._origin["shared_sha256"],
            "trains_shared": self._trains_shared,
            "base_model": _base_model_name(self.model),
            "base": self._base,
            "num_rows": {client_id: len(self._rows_of[client_id]) for client_id in sorted(self.client_ids)},
            "rows": self._row_fingerprints,
            "optimizer": plain(self.optimizer_cls_and_kwargs),
            "adapter": describe_adapter(config),
            "arguments": describe_arguments(self.args),
        }
        if self._keeps_trainer_loop:
            # Its batches are those of all processes together.
            identity["num_processes"] = self.args.world_size
        return identity

    @functools.cached_property
    def _row_fingerprints(self) -> dict[str, str]:
        return row_fingerprints(self._remove_unused_columns(self.train_dataset), self._rows_of)

    def _save_state(self, checkpoint: Path) -> None:
        """All of the federation that a resumed run needs. The Trainer adds optimizer, schedule and generators."""
        folder = checkpoint / STATE_FOLDER
        self._progress.losses = {
            client_id: [float(loss), self._loss_counts.get(client_id, 0)] for client_id, loss in self._losses.items()
        }
        progress = dataclasses.replace(
            self._progress,
            mean_weight=self._mean.total_weight,
            seconds=self._progress.seconds + (time.perf_counter() - self._clock if self._progress.round_open else 0.0),
        )
        server = {f"shared|{key}": tensor for key, tensor in self._shared.items()}
        server |= {f"mean|{key}": tensor for key, tensor in self._mean.mean.items()}
        # Clients that have not trained yet start from these, which a head without a seed has anew in every process.
        server |= {f"initial_shared|{key}": tensor for key, tensor in self._initial_shared.items()}
        server |= {f"initial_local|{key}": tensor for key, tensor in self._initial_local.items()}
        write_safetensors(folder / "server.safetensors", server)
        stored = [("clients", client_id) for client_id in self.client_ids if progress.has_stored(client_id)]
        stored += [("optimizers", client_id) for client_id in progress.with_optimizer]
        for store, client_id in stored:
            write_safetensors(folder / store / f"{client_id}.safetensors", self._stored(store, client_id))
        for client_id, tensors in self._held.items():
            write_safetensors(folder / "held" / f"{client_id}.safetensors", tensors)
        if progress.wave_open:
            slots = {f"{slot}|{k}": t for slot in self._slot_of.values() for k, t in self._slots.take(slot).items()}
            write_safetensors(folder / "slots.safetensors", slots)
        if progress.round_open and self._schedule_at_round_start is not None:
            torch.save(self._schedule_at_round_start, folder / "schedule_at_round_start.pt")
        if self.processing_class is not None:
            self.processing_class.save_pretrained(str(checkpoint))
        torch.save(self.args, checkpoint / "training_args.bin")
        state = {
            "identity": self._identity(),
            "progress": progress.to_dict(),
            "parallel_clients": len(self._slots),
            "num_processes": self.args.world_size,
        }
        if not self._keeps_trainer_loop:
            left = sum(round_.local_steps for round_ in self._rounds[progress.rounds_done :])
            state["scheduled_before"] = self._schedule_length - left
        if progress.round_open:
            state["round_clients"] = self._current_round().client_ids
            state["waves"] = [dataclasses.asdict(wave) for wave in self._current_round().waves]
        write_json(folder / "state.json", state)

    # The manifest must come after everything the Trainer writes, and before it deletes an older checkpoint.
    def _save_checkpoint(self, model, trial):
        self._before_writing()
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        run_dir = Path(self._get_output_dir(trial=trial))
        checkpoint = run_dir / f"checkpoint-{self.state.global_step}"
        try:
            if self.args.should_save:
                make_room(checkpoint)
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save and not self.args.save_only_model:
                write_manifest(checkpoint)
        except (OSError, RuntimeError, SafetensorError) as error:  # As torch and safetensors report a full disk.
            restore_replaced(checkpoint)
            if isinstance(error, ClientStoreError):
                raise  # It says itself what to do, and no disk is full.
            kept = newest_whole_checkpoint(run_dir, warn=logger.warning)
            raise OSError(
                f"{checkpoint} could not be written: {error}. What there was of it has been removed, and "
                f"{kept or 'no earlier checkpoint'} is whole. If the disk is full, make room (`save_total_limit` "
                "keeps fewer checkpoints), and go on with `train(resume_from_checkpoint=True)`."
            ) from error
        finally:
            self.args.save_total_limit = limit
        if self.args.should_save:
            remove_replaced(checkpoint)
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
        chosen = self._published_clients(self.args, clients)
        self._card = {**self._card, **_card_entries(**kwargs)}
        self._save_federation(Path(self.args.output_dir))
        if not self.is_world_process_zero():
            return None
        return self._push(
            Path(self.args.output_dir),
            repo_id=repo_id,
            commit_message=commit_message,
            blocking=blocking,
            token=token,
            revision=revision if revision is not None else self.args.hub_revision,
            private=private,
            clients=chosen,
        )

    def _published_clients(self, args: FederatedConfig, clients: str | list[str] | None = None) -> list[str]:
        choice = clients if clients is not None else args.hub_clients
        if choice is None and not self._names_clients:
            return self.client_ids
        return hub.choose_clients(choice, self.client_ids)

    def _push(
        self,
        directory: Path,
        *,
        commit_message: str,
        revision: str | None,
        repo_id: str | None = None,
        blocking: bool = True,
        token: str | None = None,
        private: bool | None = None,
        clients: list[str] | None = None,
    ) -> CommitInfo | Future[CommitInfo]:
        """Publishes a folder that was just saved."""
        args = self.args
        private = private if private is not None else args.hub_private_repo
        all_named = args.hub_name_clients or not self._names_clients
        event_args = args_of_push_event(args, private=private, all_named=all_named)
        self.callback_handler.on_push_begin(event_args, self.state, self.control)
        saved = hub.read_saved(directory, self._processing_files)
        saved.pushed = self._pushed
        push = functools.partial(
            hub.push_saved,
            saved,
            repo_id or self.hub_model_id or _repository_name(args),
            clients=clients if clients is not None else self._published_clients(args),
            client_repositories=args.hub_client_repositories,
            name_clients=args.hub_name_clients,
            private=private,
            token=token if token is not None else args.hub_token,
            revision=revision,
            commit_message=commit_message,
        )
        if blocking:
            return push()
        future = HfApi().run_as_future(push)
        self.push_in_progress = PushInProgress([future])
        return future

    # The Trainer uploads what it finds in `output_dir`, and would do so in the middle of a round.
    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        self._push_is_due = True
        if not self._progress.round_open:
            self._push_progress()

    def _push_progress(self) -> None:
        """Pushes in the background. A failure is logged: training goes on, and the next push carries everything."""
        running = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if running and not self.args.hub_always_push:
            return  # Still due at the next round end.
        self._push_is_due = False
        rounds_done = self._progress.rounds_done
        directory = Path(self.args.output_dir)
        self._save_federation(directory)
        message = f"Training in progress, round {rounds_done}"
        future = self._push(directory, commit_message=message, revision=self.args.hub_revision, blocking=False)
        future.add_done_callback(functools.partial(_log_failed_push, rounds_done))

    # Resuming

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
        """
        self._resuming, self._resumed = False, Resumption()
        self._slots.keep_trained()  # The optimizer, whoever makes it, takes what trains.
        if self.spans_processes:
            # Prepared as for evaluation, the model is not wrapped in `DistributedDataParallel`: its gradients are
            # those of this process's clients, and are not to be averaged.
            self.accelerator.prepare_model(self.model, evaluation_mode=True)
            self.model._is_accelerate_prepared = True
        with self._alone_in_its_folders(), self._as_it_was_unless_begun():
            checkpoint = self._checkpoint_to_resume(resume_from_checkpoint)
            with explain_timeout(self.args.ddp_timeout_delta):
                output = super().train(checkpoint, trial=trial, ignore_keys_for_eval=ignore_keys_for_eval)
        return TrainOutput(output.global_step, output.metrics["train_loss"], output.metrics)

    @contextlib.contextmanager
    def _as_it_was_unless_begun(self) -> Iterator[None]:
        """
        Leaves a trainer whose run fails fit for the next one.

        A first run that fails before it has begun leaves everything as it was, what was written into the model
        included. One that fails later leaves every client as after the last wave it finished.
        """
        before = self._shared, self._initial_shared, self._initial_local, self._progress
        adapter = self._slots.take(0)
        self._begun = False
        try:
            yield
        except BaseException:
            if self._noise_handle is not None:
                self._noise_handle.remove()
            if not self._begun and not self._has_run:
                self._shared, self._initial_shared, self._initial_local, self._progress = before
                self._held, self._slot_of = {}, {}
                self._slots.load(0, adapter)
            elif self._begun and self._names_clients:
                self._held, self._slot_of = {}, {}
                # What is lost of the store is not to hide what has happened.
                with contextlib.suppress(ClientStoreError):
                    self._rest()
            raise

    def _last_run(self) -> str | None:
        """The run that has begun last in `output_dir`, where that is known."""
        path = Path(self.args.output_dir) / _LAST_RUN
        try:
            return json.loads(path.read_text(encoding="utf-8"))["run_id"] if path.is_file() else None
        except (ValueError, KeyError, TypeError):
            return None

    def _checkpoint_to_resume(self, resume_from_checkpoint: str | bool | None) -> str | bool | None:
        if resume_from_checkpoint is True:
            output_dir, last_run = Path(self.args.output_dir), self._last_run()
            newest = newest_whole_checkpoint(
                output_dir,
                warn=logger.warning,
                accept=lambda path: last_run in (None, read_state(path)["progress"].get("run_id")),
            )
            older = newest_whole_checkpoint(output_dir, warn=logger.debug)
            if newest is None and older is not None:
                raise CheckpointError(
                    f"`resume_from_checkpoint=True`, but the run that began last in {output_dir} has left no whole "
                    f"checkpoint there. {older} is of an earlier run: pass that path to go on from it, or call "
                    "`train()` without it to start from the beginning."
                )
            if newest is None:
                raise CheckpointError(
                    f"`resume_from_checkpoint=True`, but {self.args.output_dir} holds no whole checkpoint. Call "
                    "`train()` without it to start from the beginning."
                )
            return str(newest)
        if resume_from_checkpoint and not Path(resume_from_checkpoint).is_dir():
            raise CheckpointError(
                f"`resume_from_checkpoint={str(resume_from_checkpoint)!r}` is no folder. Pass a `checkpoint-...` "
                "folder of `output_dir`, or `True` for the newest one there."
            )
        return resume_from_checkpoint

    # The Trainer would load one adapter into the model and refuse a folder that holds none.
    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        checkpoint = Path(resume_from_checkpoint)
        check_manifest(checkpoint)
        folder = checkpoint / STATE_FOLDER
        state = read_state(checkpoint)
        changes = check_changes(
            checkpoint,
            self._identity(),
            meant=self.args.resume_with_changes or (),
            defaults=defaults_of(self._slots.config, self.args),
        )
        if not self._keeps_trainer_loop:
            check_position(checkpoint, state, changes, self.args.rounds, self.args.world_size)
        with self._first_process_first():
            self._claim_store(state["progress"].get("run_id", ""), resuming=True)
            # The state of one kind of optimizer is of no use to another.
            kept = ("clients",) if changes & set(_OPTIMIZER_KIND) else ("clients", "optimizers")
            self._replaced_by = checkpoint if self._has_run else None
            self._fill_stores({name: folder / name for name in kept})

        self._progress, self._resumed = self._position_of(state, changes)
        if "optimizers" not in kept:
            self._progress.with_optimizer = []
        server: dict[str, dict[str, torch.Tensor]] = {}
        for name, tensor in load_file(folder / "server.safetensors").items():
            kind, key = name.split("|", 1)
            server.setdefault(kind, {})[key] = tensor
        self._shared = server["shared"]
        self._initial_shared, self._initial_local = server["initial_shared"], server["initial_local"]
        self._mean = WeightedMean(server.get("mean", {}), self._progress.mean_weight)
        self._losses = {client_id: torch.tensor(loss) for client_id, (loss, _) in self._progress.losses.items()}
        self._loss_counts = {client_id: count for client_id, (_, count) in self._progress.losses.items()}
        held = (folder / "held").glob("*.safetensors")
        self._held = {path.name.removesuffix(".safetensors"): load_file(path) for path in sorted(held)}
        schedule = folder / "schedule_at_round_start.pt"
        self._schedule_at_round_start = torch.load(schedule, weights_only=True) if schedule.is_file() else None
        self._slot_of = {}
        if not self._keeps_trainer_loop:
            self._rounds = self._plan_rounds()
        if self._progress.round_open and list(self._current_round().client_ids) != state["round_clients"]:
            raise CheckpointError(
                f"{checkpoint} was written in a round of {', '.join(state['round_clients'])}, and this run would go "
                f"on with {', '.join(self._current_round().client_ids)}. Pass the `client_sampler` of that run, which "
                "must choose the same clients whenever it is asked for the same round."
            )
        if self._progress.wave_open:
            wave = self._current_wave()
            slots = load_file(folder / "slots.safetensors")
            for slot, client_id in enumerate(wave.client_ids):
                prefix = f"{slot}|"
                self._slots.load(slot, {k.removeprefix(prefix): t for k, t in slots.items() if k.startswith(prefix)})
                self._slot_of[client_id] = slot
        elif self._keeps_trainer_loop:
            self._slots.load(0, self._client_tensors(self.client_ids[0]))
        self._resuming = True

    def _position_of(self, state: Mapping[str, Any], changes: frozenset[str]) -> tuple[RunState, Resumption]:
        """
        Where a checkpoint stands, and how the run goes on from there.

        A wave that was saved in the middle by a run with another number of slots begins anew: its clients' B are in
        the store, and their steps depend on nothing else.
        """
        progress = RunState(**state["progress"])
        if self._keeps_trainer_loop:
            return progress, Resumption(changes)
        trained = [
            Wave(**{k: tuple(v) if isinstance(v, list) else v for k, v in w.items()}) for w in state.get("waves", [])
        ]
        goes_on = progress.wave_open and state["parallel_clients"] == len(self._slots)
        steps_back = 0
        if progress.wave_open and not goes_on:
            steps_back = progress.wave_steps
            clients = trained[progress.waves_done].client_ids
            progress = progress.before_wave(clients, bytes_down=len(clients) * count_bytes(self._broadcast()))
        return progress, Resumption(
            changes,
            trained=tuple(trained[: progress.waves_done + goes_on]),
            steps_back=steps_back,
            scheduled_before=state["scheduled_before"],
        )

    # The Trainer would give back the learning rate, the schedule's end and the settings of the run that was saved.
    def _load_optimizer_and_scheduler(self, checkpoint):
        if checkpoint is None:
            return
        if self._keeps_trainer_loop or self._progress.wave_open:
            super()._load_optimizer_and_scheduler(checkpoint)
            if self._resumed.changes & set(_OPTIMIZER_KIND):
                self._set_optimizer_state({})
        else:
            # Between waves the slots hold nobody's state, and there may be more or fewer of them than were saved.
            saved = torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True)
            self.lr_scheduler.load_state_dict(fit_groups(saved, self.lr_scheduler.state_dict()))
            self._set_rates(self.lr_scheduler.get_last_lr())
        if self._schedule_at_round_start is not None:
            self._schedule_at_round_start = fit_groups(self._schedule_at_round_start, self.lr_scheduler.state_dict())
        if not isinstance(self.lr_scheduler, LambdaLR):
            return
        if self._resumed.changes:
            for group, fresh in zip(self.optimizer.param_groups, self._fresh_optimizer_groups, strict=True):
                group.update({k: copy.deepcopy(v) for k, v in fresh.items() if k != "params"}, initial_lr=fresh["lr"])
            self.lr_scheduler.base_lrs = [fresh["lr"] for fresh in self._fresh_optimizer_groups]
        if self._schedule_at_round_start is not None:
            self._schedule_at_round_start = self._schedule_at(self._schedule_at_round_start["last_epoch"])
        self.lr_scheduler.load_state_dict(self._schedule_at(self.lr_scheduler.last_epoch))
        self._set_rates(self.lr_scheduler.get_last_lr())

    def _schedule_at(self, position: int) -> dict[str, Any]:
        """State of the schedule at a local step, counted over all rounds."""
        schedule = self.lr_scheduler
        rates = [rate * f(position) for rate, f in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
        return {**copy.deepcopy(schedule.state_dict()), "last_epoch": position, "_last_lr": rates}


class FederatedTrainer(FederatedMixin, SFTTrainer):
    """
    Drop-in for [`~trl.SFTTrainer`] that trains a federation with FedSA-LoRA (https://arxiv.org/abs/2410.01463):
    clients train both factors of every adapter, only A is averaged between rounds, and each client's B stays its own.

    One dataset without a client column is one client, and the weights are then those of `SFTTrainer` with the same
    arguments and seed.

    Example:

    ```python
    >>> from hf_fedsa import FederatedConfig, FederatedTrainer, FedSALoraConfig

    >>> trainer = FederatedTrainer(
    ...     model="HuggingFaceTB/SmolLM2-135M-Instruct",
    ...     args=FederatedConfig(output_dir="out", num_rounds=10, local_steps=10),
    ...     train_dataset={"hospital_a": rows_a, "hospital_b": rows_b},
    ...     peft_config=FedSALoraConfig(r=8, lora_alpha=16),
    ... )
    >>> trainer.train()
    ```

    Args:
        model (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            See [`~trl.SFTTrainer`].
        args ([`FederatedConfig`] or [`~trl.SFTConfig`], *optional*):
            Arguments of the run. An `SFTConfig` gives one round per epoch.
        train_dataset ([`~datasets.Dataset`] or `dict[str, Dataset]`):
            Rows of the clients, in any format `SFTTrainer` takes: a dictionary from client id to rows, or one dataset
            with a column `args.client_column`.
        eval_dataset ([`~datasets.Dataset`] or `dict[str, Dataset]`, *optional*):
            Evaluation rows, in the same forms.
        peft_config ([`~peft.PeftConfig`], *optional*):
            Adapter, required unless `model` is a `PeftModel`: a [`FedSALoraConfig`], a [`FedSAVeraConfig`], or the
            stock config of either.
        data_collator, processing_class, compute_loss_func, compute_metrics, callbacks, optimizers,
        optimizer_cls_and_kwargs, preprocess_logits_for_metrics, quantization_config, formatting_func:
            See [`~trl.SFTTrainer`].
        client_sampler (`Callable[[int, Mapping[str, int], int | None], Sequence[str]]`, *optional*):
            Chooses a round's clients, see [`FederatedMixin`].
    """

    _tag_names = ["trl", "sft", "hf_fedsa", "federated-learning"]
    _name = "FedSA-LoRA"

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: SFTConfig | TrainingArguments | None = None,
        data_collator: Callable | None = None,
        train_dataset: Dataset | Mapping[str, Dataset] | None = None,
        eval_dataset: Dataset | Mapping[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        compute_loss_func: Callable | None = None,
        compute_metrics: Callable | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        quantization_config: Any | None = None,
        peft_config: PeftConfig | None = None,
        formatting_func: Callable[[dict], str] | None = None,
        client_sampler: ClientSampler | None = None,
    ):
        # Arguments
        args = _as_federated_config(args, model)
        if not isinstance(model, PeftModel):
            validate_peft_config(peft_config)
        _refuse_transforms_to_prepare(args, train_dataset, eval_dataset)
        if train_dataset is None:
            raise ValueError(
                "`train_dataset` is required: a dictionary from client id to `Dataset`, or a `Dataset`. Got None."
            )
        if not isinstance(model, PeftModel):
            refuse_new_tokens(model, args, processing_class)
        if isinstance(model, str) and isinstance(train_dataset, Mapping) and formatting_func is None:
            _check_completions_fit(train_dataset, args, model, processing_class)

        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_loss_func=compute_loss_func,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
            quantization_config=quantization_config,
            peft_config=peft_config,
            formatting_func=formatting_func,
            client_sampler=client_sampler,
        )

    @classmethod
    def from_shared(
        cls,
        source: str | Path,
        args: SFTConfig | TrainingArguments | None = None,
        train_dataset: Dataset | Mapping[str, Dataset] | None = None,
        eval_dataset: Dataset | Mapping[str, Dataset] | None = None,
        *,
        client_id: str = "newcomer",
        init_local: str = "zero",
        train_shared: bool = False,
        model: str | PreTrainedModel | None = None,
        revision: str | None = None,
        subfolder: str | None = None,
        token: str | bool | None = None,
        **kwargs,
    ) -> "FederatedTrainer":
        """
        Makes a trainer for a client that was not there when a federation was trained: it starts from the shared A and
        trains its own B.

        `push_to_hub` adds it to the federation's repository. If it has trained A too, the new A takes the place of the
        old one for all clients of the repository, as after a round in which no other client took part.

        Args:
            source (`str` or `Path`):
                Repository on the Hub, or folder written by `save_model()`.
            args ([`FederatedConfig`] or [`~trl.SFTConfig`], *optional*):
                Arguments of the newcomer's own run.
            train_dataset ([`~datasets.Dataset`] or `dict[str, Dataset]`):
                Rows of the newcomer, or a dictionary from client id to rows for several of them.
            eval_dataset ([`~datasets.Dataset`] or `dict[str, Dataset]`, *optional*):
                Evaluation rows, in the same forms.
            client_id (`str`, *optional*, defaults to `"newcomer"`):
                Name of the newcomer, where `train_dataset` is a `Dataset` that does not name it.
            init_local (`str`, *optional*, defaults to `"zero"`):
                Where B starts: `"zero"`, the `"mean"` over the clients that are published, or the id of one of them.
                With the id of a client that is in `train_dataset` it goes on from its own.
            train_shared (`bool`, *optional*, defaults to `False`):
                Whether A trains too. Off, it is frozen.
            model (`str` or [`~transformers.PreTrainedModel`], *optional*):
                Base model. `None` means the one the federation was trained on.
            revision, subfolder, token:
                See [`~hf_fedsa.load_personalized_model`].
            kwargs:
                Passed to the constructor, e.g. `quantization_config`.

        Raises:
            `ValueError`: a client of this name is already in the federation, or the federation cannot be joined.

        Example:

        ```python
        >>> newcomer = FederatedTrainer.from_shared("me/gsm8k-fedsa", train_dataset=rows, client_id="clinic")
        >>> newcomer.train()
        >>> newcomer.push_to_hub("me/gsm8k-fedsa", clients=["clinic"])
        ```
        """
        origin = hub.load_origin(source, init_local, revision=revision, subfolder=subfolder, token=token)
        column = getattr(args, "client_column", FederatedConfig.client_column)
        if isinstance(train_dataset, Dataset) and column not in train_dataset.column_names:
            train_dataset = {client_id: train_dataset}
            eval_dataset = {client_id: eval_dataset} if isinstance(eval_dataset, Dataset) else eval_dataset
        base = origin.federation["base_model"]
        if model is None:
            if not base:
                raise ValueError(f"{source} does not name its base model. Pass it as `model`.")
            model = base
        # A copy: the caller's object may be meant for another federation next.
        default_name = f"{model.split('/')[-1]}-{client_id}" if isinstance(model, str) else client_id
        args = copy.copy(_as_federated_config(args, model)) if args is not None else FederatedConfig(default_name)
        _check_own_folder(args, train_dataset)
        if isinstance(model, str):
            defaults = {"dtype": origin.federation["base_dtype"]}
            if model == base:
                defaults["revision"] = origin.federation["base_revision"]
            args.model_init_kwargs = {**defaults, **(args.model_init_kwargs or {})}
        if model == base or not isinstance(model, str) or Path(model).is_dir():
            args.hub_base_model = args.hub_base_model or origin.federation["hub_base_model"]
        trainer = cls(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            peft_config=origin.config,
            **kwargs,
        )
        for name in trainer.client_ids:
            if name in origin.federation["clients"] and name != init_local:
                raise ValueError(
                    f"{name!r} is already a client of {source}. Give the newcomer another name (`client_id`), or pass "
                    f"`init_local={name!r}` to go on from that client's own B."
                )
        trainer._start_from(origin, train_shared)
        return trainer

    def _prepare_rows(self, dataset: Dataset) -> Dataset:
        if self._skip_prepare_dataset:
            return dataset
        return self._prepare_dataset(dataset, self.processing_class, self.args, False, self._formatting_func, "eval")

    def _serves_clients_together(self, num_items_in_batch) -> bool:
        # These losses need more of the model than per-token log-probabilities, or look at the batch as a whole.
        return (
            num_items_in_batch is not None
            and self.compute_loss_func is None
            and self.label_smoother is None
            and not self.aux_loss_enabled
            and not self._overridden("compute_loss")
        )

    def _score_rows(self, model: nn.Module, inputs: dict[str, Any]) -> FusedCausalLMOutput:
        """
        Log-probability, entropy and rank of every next token, each of shape `(rows, seq_len - 1)`.

        TRL's fused head saves memory and time on an accelerator. On the CPU it takes about half a step more than plain
        logits. It also reads the head's weight by itself, past a head that each client has its own copy of.
        """
        head = self.model.get_output_embeddings()
        if inputs["input_ids"].device.type != "cpu" and not isinstance(
            head, (BaseTunerLayer, AuxiliaryTrainingWrapper)
        ):
            return model(**{**inputs, "use_cache": False}, fused_lm_head=True)
        logits = model(**{k: v for k, v in inputs.items() if k != "labels"}, use_cache=False).logits
        log_probs, entropy, is_top1, mask = score_next_tokens(logits, inputs["labels"])
        return FusedCausalLMOutput(log_probs=log_probs, entropy=entropy, is_top1=is_top1, label_mask=mask)


class _Replay:
    """Stands in for the model where its outputs are already known."""

    def __init__(self, outputs):
        self.outputs = outputs

    def __call__(self, *args, **kwargs):
        return self.outputs


# Checks before a model loads

_EMPTY_AFTER_TRUNCATION = (
    "Client {client_id!r} has no row left to train on: once rows are cut to `max_length={max_length}`, none has a "
    "token that counts for the loss. Raise `max_length`, check the labels, or leave the client out."
)


def _and_more(items: list, shown: int = 1) -> str:
    return f" and {len(items) - shown} more" if len(items) > shown else ""


def _as_federated_config(args: TrainingArguments | None, model: Any) -> FederatedConfig:
    if args is None:
        name = model if isinstance(model, str) else model.config._name_or_path
        return FederatedConfig(f"{name.split('/')[-1]}-FedSA")
    if isinstance(args, FederatedConfig):
        return args
    if not isinstance(args, TrainingArguments):
        raise TypeError(f"`args` must be a `FederatedConfig` or `SFTConfig`, got `{type(args).__name__}`.")
    # Not `to_dict`, which replaces everything named a token, the end-of-sequence token included, by a placeholder.
    return FederatedConfig(**{f.name: getattr(args, f.name) for f in dataclasses.fields(args) if f.init})


def _check_own_folder(args: FederatedConfig, train_dataset: Any) -> None:
    """A newcomer saved over the federation it comes from would take the place of its clients."""
    if not (Path(args.output_dir) / hub.FEDERATION).is_file():
        return
    others = sorted(hub.read_federation(Path(args.output_dir))["clients"].keys() - set(train_dataset or ()))
    if isinstance(train_dataset, Mapping) and others:
        raise ValueError(
            f"`output_dir={args.output_dir!r}` holds a federation with other clients, such as {others[0]!r}. Pass a "
            "folder of its own for the newcomer."
        )


def _as_one_dataset(dataset: Any, args: FederatedConfig, name: str) -> Dataset:
    if isinstance(dataset, Mapping):
        if not dataset:
            raise ValueError(f"`{name}` is an empty dictionary. Pass at least one client with its rows.")
        if set(dataset) <= {"train", "test", "validation"}:
            raise ValueError(
                f"`{name}` has the keys {', '.join(dataset)}, which look like splits of one dataset, not clients. "
                "Pass a split, or a dictionary from client id to rows."
            )
        validate_client_ids(dataset)
        return join_clients(dataset, args.client_column)
    if isinstance(dataset, IterableDataset):
        raise TypeError(
            f"`{name}` is an `IterableDataset`, which has no length, but rounds are planned from the number of rows "
            "of each client. Pass `Dataset`s; `Dataset.from_generator` makes one."
        )
    if not isinstance(dataset, Dataset):
        raise TypeError(f"`{name}` must be a `Dataset` or a dictionary of them, got `{type(dataset).__name__}`.")
    if len(dataset) == 0:
        raise ValueError(f"`{name}` has no rows.")
    if args.client_column not in dataset.column_names:
        wants_clients = args.client_column != FederatedConfig.client_column or (args.clients_per_round or 1) > 1
        if wants_clients:
            raise ValueError(
                f"`{name}` has no column `{args.client_column}` to tell the clients apart, only: "
                f"{', '.join(dataset.column_names)}. Set `client_column` to one of those, or pass a dictionary from "
                "client id to dataset."
            )
        return dataset
    if getattr(dataset.features[args.client_column], "dtype", None) not in ("string", "large_string"):
        raise TypeError(
            f"Column `{args.client_column}` of `{name}` must hold client ids as strings, got "
            f"{dataset.features[args.client_column]}. Convert it, e.g. with `partition_by_column`."
        )
    return dataset


def _refuse_transforms_to_prepare(args: FederatedConfig, *datasets: Any) -> None:
    if (args.dataset_kwargs or {}).get("skip_prepare_dataset"):
        return
    parts = [part for rows in datasets for part in (rows.values() if isinstance(rows, Mapping) else (rows,))]
    # Rows with images are left as they are.
    if any(is_transformed(part) and len(part) and not {"image", "images"} & set(part[0]) for part in parts):
        raise ValueError(
            "A dataset uses `Dataset.with_transform`, which is applied to rows as they are read, but rows are "
            "tokenized once before training. Pass `dataset_kwargs={'skip_prepare_dataset': True}` (with "
            "`remove_unused_columns=False`) and let the transform return token ids and labels, or apply it with "
            "`Dataset.map`."
        )


def _check_completions_fit(
    clients: Mapping[str, Any], args: FederatedConfig, model: str, processing_class: Any
) -> None:
    """
    Finds a client whose prompts alone fill `max_length`, so that truncation would leave nothing to learn from.

    The trainer finds it too, from the rows themselves, but only after the model is loaded. One row that fits is enough
    to pass a client, so as a rule one row per client is tokenized here.
    """
    if args.max_length is None or args.truncation_mode != "keep_start" or args.completion_only_loss is False:
        return
    tokenizer, template = processing_class, chat_template_at(args.chat_template_path)
    for client_id, rows in clients.items():
        if not isinstance(rows, Dataset) or not {"prompt", "completion"} <= set(rows.column_names):
            continue
        if is_transformed(rows):
            continue
        tokenizer = load_tokenizer(model, args, tokenizer)
        if not any(_num_prompt_tokens(tokenizer, row["prompt"], template) < args.max_length for row in rows):
            raise ValueError(_EMPTY_AFTER_TRUNCATION.format(client_id=client_id, max_length=args.max_length))


def _num_prompt_tokens(tokenizer: Any, prompt: str | list[dict[str, str]], chat_template: str | None) -> int:
    if isinstance(prompt, str):
        return len(tokenizer(prompt)["input_ids"])
    tokens = tokenizer.apply_chat_template(
        prompt, chat_template=chat_template, add_generation_prompt=True, return_dict=True
    )
    return len(tokens["input_ids"])


def _check_federation_size(args: FederatedConfig, num_clients: int) -> None:
    if args.clients_per_round is not None and args.clients_per_round > num_clients:
        raise ValueError(
            f"`clients_per_round={args.clients_per_round}` is more than the {num_clients} clients there are. Lower "
            "it, or leave it out to train all of them in every round."
        )
    per_round = args.clients_per_round or num_clients
    if args.min_clients_per_round > per_round:
        raise ValueError(
            f"`min_clients_per_round={args.min_clients_per_round}` is more than the {per_round} clients of a round, "
            "so no round could count. Lower it."
        )


def _num_slots(args: FederatedConfig, num_clients: int) -> int:
    per_process = math.ceil((args.clients_per_round or num_clients) / args.world_size)
    return min(args.parallel_clients or DEFAULT_PARALLEL_CLIENTS, per_process)


def _check_loss_scale(args: FederatedConfig, num_slots: int) -> None:
    if args.fp16 and num_slots > 1:
        raise ValueError(
            f"`fp16=True` scales the losses of {num_slots} clients side by side by one number, so where one client's "
            "gradients overflow, none of them takes its step. Set `bf16=True` or `parallel_clients=1`."
        )


def _check_peft_model(model: PeftModel) -> None:
    for config in model.peft_config.values():
        validate_peft_config(config)
        if mutates_base(config):
            raise ValueError(
                f"`init_lora_weights={config.init_lora_weights!r}` has changed the base weights of the `PeftModel` "
                "you passed, and what it took out of them is not known here, so the adapters could not be saved for "
                "the original base. Pass the base model and `peft_config` instead."
            )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            "The `PeftModel` you passed has no trainable parameter. Load it with `PeftModel.from_pretrained(..., "
            "is_trainable=True)`."
        )


def _refuse_one_best_model(args: FederatedConfig) -> None:
    if args.load_best_model_at_end:
        raise ValueError(
            "`load_best_model_at_end=True` would put one client's weights in place of all of them. Save at every "
            "evaluation (`save_strategy` and `eval_strategy` alike) and load the checkpoint you prefer."
        )
    if args.save_strategy == SaveStrategy.BEST:
        raise ValueError(
            '`save_strategy="best"` needs one best model, but every client has its own. Use "epoch" to save at '
            "round ends."
        )


def _refuse_packing(args: FederatedConfig) -> None:
    if args.packing or args.eval_packing:
        raise ValueError(
            "`packing=True` joins rows into sequences that no longer say which client they are of. Set "
            "`packing=False` (and leave `eval_packing` out); `train_sampling_strategy='group_by_length'` also saves "
            "padding."
        )


def _refuse_another_sampler(trainer: Trainer) -> None:
    if not type(trainer)._get_train_sampler.__module__.startswith(("transformers.", "trl.")):
        raise ValueError(
            f"`{type(trainer).__name__}` has a `_get_train_sampler` of its own, which would not be asked: every "
            "client's rows are drawn by themselves. Set `train_sampling_strategy` ('sequential' keeps the order of "
            "your rows), and choose the clients of a round with `client_sampler`."
        )


def _refuse_what_needs_the_trainer_loop(args: FederatedConfig) -> None:
    if args.n_gpu > 1:
        raise ValueError(
            f"One process cannot spread a federation over its {args.n_gpu} devices. Launch one process per device "
            "(`accelerate launch --num_processes ...`), or make one visible (`CUDA_VISIBLE_DEVICES=0`)."
        )
    if args.padding_free:
        raise ValueError(
            "`padding_free=True` flattens a batch into one row, in which clients cannot be told apart. Set "
            "`padding_free=False`."
        )
    if args.ignore_data_skip:
        raise ValueError(
            "`ignore_data_skip=True` would resume a round with other rows than those of the clients in training. "
            "Leave it out: finding the place to go on from costs nothing here."
        )
    if args.rounds < 1:
        raise ValueError(
            f"`num_train_epochs={args.num_train_epochs}` leaves no round to train. Set `num_rounds` to at least 1."
        )
    if args.max_steps > 0:
        raise ValueError(
            f"`max_steps={args.max_steps}` would stop in the middle of a round, with some of its clients trained and "
            "others not. Set `num_rounds` with `local_steps` or `local_epochs`."
        )
    if args.enable_jit_checkpoint and args.world_size > 1:
        raise ValueError(
            "`enable_jit_checkpoint=True` saves in the middle of a round, when each of several processes knows its "
            "own clients alone. Leave it out: checkpoints at round ends (`save_strategy='epoch'`) are whole."
        )
    if args.train_sampling_strategy == "batch_rebalance":
        raise ValueError(
            "`train_sampling_strategy='batch_rebalance'` deals rows to processes, but rows belong to clients. Use "
            "'random', 'sequential' or 'group_by_length'."
        )


def _split_by_client(dataset: Dataset, column: str) -> dict[str, Dataset]:
    rows = rows_by_client(dataset, column, name="eval_dataset")
    plain = dataset.remove_columns(column)
    return {client_id: plain.select(indices) for client_id, indices in rows.items()}


# What `Accelerator` does across processes in a step or an evaluation.
_COLLECTIVES = ("gather", "gather_for_metrics", "pad_across_processes", "prepare_data_loader")


def _unchanged(data: Any, *args, **kwargs) -> Any:
    return data


# Names the run that has begun last in `output_dir`, whose checkpoints are those to resume.
_LAST_RUN = "last_run.json"

# Arguments with which the optimizer is of another kind.
_OPTIMIZER_KIND = ("optim", "optim_args", "optim_target_modules", "optimizer_cls_and_kwargs")


# Arguments that the model card lists: those that change what is learned, and none that tells of the machine.
_ARGUMENTS_IN_CARD = (
    "local_steps",
    "local_epochs",
    "clients_per_round",
    "client_sampling",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "optim",
    "weight_decay",
    "max_grad_norm",
    "max_length",
    "completion_only_loss",
    "aggregation_weighting",
    "reset_optimizer",
    "bf16",
    "fp16",
    "seed",
)


def _card_entries(
    model_name: str | None = None,
    dataset_name: str | list[str] | None = None,
    tags: str | list[str] | None = None,
    language: str | list[str] | None = None,
    license: str | None = None,
) -> dict[str, Any]:
    entries = {
        "model_name": model_name,
        "dataset_name": dataset_name,
        "tags": [tags] if isinstance(tags, str) else tags,
        "language": language,
        "license": license,
    }
    return {name: value for name, value in entries.items() if value is not None}


def _log_failed_push(rounds_done: int, future: Future[CommitInfo]) -> None:
    if error := future.exception():
        logger.error("The push after round %d failed, the next one carries everything: %s", rounds_done, error)


def _make_store(directory: Path | None, name: str) -> ClientStore:
    return MemoryClientStore() if directory is None else DiskClientStore(directory / name)


def _repository_name(args: FederatedConfig) -> str:
    return args.hub_model_id or Path(args.output_dir).absolute().name


def _base_model_name(model: PeftModel) -> str:
    return model.get_base_model().config._name_or_path
