"""What arguments and clients make of a federation, and what of it cannot work: known before a model loads."""

import logging
import math
from dataclasses import dataclass
from typing import Any

from peft import PeftModel
from transformers import Trainer
from transformers.trainer_utils import SaveStrategy

from .client.data import ClientRows
from .client.local_optimizer import SCHEDULES_BY_METRIC, refuse_optimizer
from .config import DEFAULT_PARALLEL_CLIENTS, FederatedConfig
from .messages import Broadcast
from .methods import Method
from .other_trainers import check_trainer, refuse_another_sampler
from .peft_config import check_peft_model
from .server.aggregation import TRIM_FRACTION, check_clients_of_round, num_trimmed
from .server.sampling import ClientSampler

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Shape:
    """
    What arguments and clients make of a federation, before there is a model.

    Args:
        num_slots (`int`):
            Clients that can train at the same time in a process.
        is_alone (`bool`):
            Whether there is one client, and no server elsewhere.
        whole_passes (`bool`):
            Whether that client trains whole passes, which is what its Trainer does anyway.
        resets_optimizer (`bool`):
            Whether a client starts each round with a fresh optimizer state.
        is_elsewhere (`bool`):
            Whether the server is in another place, with clients that are not known here.
    """

    num_slots: int
    is_alone: bool
    whole_passes: bool
    resets_optimizer: bool
    is_elsewhere: bool

    @classmethod
    def of(cls, args: FederatedConfig, rows: ClientRows, is_elsewhere: bool) -> "Shape":
        """
        The shape of a federation.

        Args:
            args ([`FederatedConfig`]):
                Arguments of the run.
            rows ([`ClientRows`]):
                The clients' rows.
            is_elsewhere (`bool`):
                Whether the server is in another place, with clients that are not known here.
        """
        is_alone = len(rows.client_ids) == 1 and not is_elsewhere
        resets = args.reset_optimizer if args.reset_optimizer is not None else not is_alone
        return cls(
            num_slots=check_federation(args, rows),
            is_alone=is_alone,
            whole_passes=is_alone and args.local_steps is None and args.local_epochs in (None, 1),
            resets_optimizer=resets,
            is_elsewhere=is_elsewhere,
        )


def refuse_before_model(trainer: Trainer, model: Any, args: FederatedConfig, rows: ClientRows, shape: Shape) -> None:
    """
    Refuses, before a model loads, what cannot work.

    Args:
        trainer ([`~transformers.Trainer`]):
            The Trainer that is being made.
        model (`Any`):
            What it was given as a model.
        args ([`FederatedConfig`]), rows ([`ClientRows`]), shape ([`Shape`]):
            Arguments, clients, and what they make of the federation.

    Raises:
        `TypeError`, `ValueError`: says what cannot work, why, and what to do.
    """
    if isinstance(model, PeftModel):
        check_peft_model(model)
    check_trainer(trainer, args, model, len(rows.client_ids), shape.num_slots)
    if rows.are_named or not shape.whole_passes:
        refuse_packing(args)
    if not shape.whole_passes:
        refuse_what_needs_the_trainer_loop(args)
        refuse_loss_scale(args, shape.num_slots)
        refuse_another_sampler(trainer)
        num_clients = len(rows.client_ids) + shape.is_elsewhere  # There are others elsewhere.
        refuse_optimizer(args.optim, keeps_state=not shape.resets_optimizer, num_clients=num_clients)


def check_federation(args: FederatedConfig, rows: ClientRows) -> int:
    """
    Checks that arguments and clients go together.

    Returns:
        `int`: clients that can train at the same time in a process.

    Raises:
        `ValueError`: they do not.
    """
    num_clients = len(rows.client_ids)
    check_federation_size(args, num_clients)
    if rows.are_named:
        refuse_one_best_model(args)
    images = {"image", "images"} & set(rows.joined.column_names)
    if images and num_clients > 1:
        raise ValueError(
            f"`train_dataset` has a column `{images.pop()}`, but image batches cannot be divided by client: their "
            "pixels do not come one entry per row. Train on text, or one client at a time."
        )
    return num_slots(args, num_clients)


def check_federation_size(args: FederatedConfig, num_clients: int) -> None:
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
    check_clients_of_round(per_round, args.aggregator, args.krum_byzantine)
    trim_fraction = TRIM_FRACTION if args.trim_fraction is None else args.trim_fraction
    if args.aggregator == "trimmed_mean" and trim_fraction and not num_trimmed(trim_fraction, per_round):
        logger.warning(
            "`aggregator='trimmed_mean'` cuts none of the %d clients of a round with `trim_fraction=%s`, so it is the "
            "plain mean. Set `trim_fraction` to at least %.3g to cut one at either end, or to 0 if that is meant.",
            per_round,
            trim_fraction,
            1 / per_round,
        )


def num_slots(args: FederatedConfig, num_clients: int) -> int:
    per_process = math.ceil((args.clients_per_round or num_clients) / args.world_size)
    return min(args.parallel_clients or DEFAULT_PARALLEL_CLIENTS, per_process)


def refuse_loss_scale(args: FederatedConfig, num_slots: int) -> None:
    if args.fp16 and num_slots > 1:
        raise ValueError(
            f"`fp16=True` scales the losses of {num_slots} clients side by side by one number, so where one client's "
            "gradients overflow, none of them takes its step. Set `bf16=True` or `parallel_clients=1`."
        )


def refuse_one_best_model(args: FederatedConfig) -> None:
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


def refuse_packing(args: FederatedConfig) -> None:
    if args.packing or args.eval_packing:
        raise ValueError(
            "`packing=True` joins rows into sequences that no longer say which client they are of. Set "
            "`packing=False` (and leave `eval_packing` out); `train_sampling_strategy='group_by_length'` also saves "
            "padding."
        )


def refuse_what_needs_the_trainer_loop(args: FederatedConfig) -> None:
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


def refuse_elsewhere(args: FederatedConfig, rows: ClientRows, client_sampler: ClientSampler | None) -> None:
    """
    Refuses what cannot work where the server is elsewhere, and what is its own to say.

    Raises:
        `ValueError`: says what, and what to do.
    """
    if not rows.are_named:
        raise ValueError(
            "`transport` brings rounds of a server that knows clients by their names, but `train_dataset` names none. "
            "Pass a dictionary from client id to rows, or add a column that names the client."
        )
    if args.world_size > 1:
        raise ValueError(
            f"`transport` serves one process, but this run has {args.world_size}. Start one process per worker, each "
            "with clients and a folder of its own."
        )
    theirs = {
        "num_rounds": args.num_rounds,
        "clients_per_round": args.clients_per_round,
        "client_sampler": client_sampler,
        "client_sampling": None if args.client_sampling == "uniform" else args.client_sampling,
        "min_clients_per_round": None if args.min_clients_per_round == 1 else args.min_clients_per_round,
        "aggregator": None if args.aggregator == "mean" else args.aggregator,
        "server_optimizer": None if args.server_optimizer == "fedavg" else args.server_optimizer,
        "server_learning_rate": args.server_learning_rate,
    }
    for name, value in theirs.items():
        if value is not None:
            raise ValueError(
                f"`{name}={value!r}` is for the server to say, and `transport` says that it is elsewhere. Leave it "
                "out."
            )


# Schedules that are the same however long they are.
_ENDLESS_SCHEDULES = ("constant", "constant_with_warmup", "inverse_sqrt", *SCHEDULES_BY_METRIC)


def refuse_endless_schedule(args: FederatedConfig, length: int | None) -> None:
    """
    Refuses a learning rate schedule that needs an end, where the federation has none.

    Args:
        args ([`FederatedConfig`]):
            Names the schedule.
        length (`int`, *optional*):
            Its length in local steps. `None` if the federation has no fixed end.

    Raises:
        `ValueError`: it needs one.
    """
    name = args.lr_scheduler_type
    if length is None and 0 < args.warmup_steps < 1:
        raise ValueError(
            f"`warmup_steps={args.warmup_steps}` is a fraction of all steps, but the federation has no fixed end. Set "
            "it to a number of local steps, or give the server a number of rounds."
        )
    if length is None and name not in _ENDLESS_SCHEDULES:
        raise ValueError(
            f"`lr_scheduler_type='{getattr(name, 'value', name)}'` needs to know how many steps there will be, but "
            "the federation has no fixed end. Set it to 'constant' or 'constant_with_warmup' (`warmup_steps` counts "
            "local steps), or give the server a number of rounds."
        )


def problem_of_broadcast(args: FederatedConfig, broadcast: Broadcast, method: Method) -> str | None:
    """Why no client here can train with what a server elsewhere has sent, or `None`."""
    trained = method.trained(broadcast.round_index)
    if broadcast.trained != trained:
        sent, here = (", ".join(factors) or "nothing" for factors in (broadcast.trained, trained))
        return (
            f"`trained` is {sent}, but with the method {method.name!r} of this worker {here} train in round "
            f"{broadcast.round_index}. Both sides need the same method."
        )
    try:
        refuse_endless_schedule(args, broadcast.schedule_steps)
    except ValueError as error:
        return str(error)
    return None
