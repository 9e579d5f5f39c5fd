"""Arguments of a federated run."""

import contextlib
import math
from dataclasses import dataclass, field
from pathlib import Path

from transformers.trainer_utils import HubStrategy
from trl import SFTConfig

from .client.state import ClientSettings
from .client.waves import LocalWork
from .faults import check_max_update_norm
from .identity import check_names_of_changes
from .methods import method_named
from .server.aggregation import AGGREGATORS, check_aggregator
from .server.optimizers import (
    SERVER_OPTIMIZER_ARGUMENTS,
    SERVER_OPTIMIZERS,
    check_server_optimizer,
    optimizer_arguments,
)
from .server.sampling import check_client_sampling
from .server.state import ServerSettings

# Adapters that train at the same time unless the user says otherwise. Four rows fill the wide matrix products of small
# batches; beyond that, activations grow faster than the time saved on reading the base weights.
DEFAULT_PARALLEL_CLIENTS = 4


# Arguments that the model card lists: those that change what is learned, and none that tells of the machine.
ARGUMENTS_IN_CARD = (
    "method",
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
    "aggregator",
    "trim_fraction",
    "krum_byzantine",
    "server_optimizer",
    *(f"server_{name}" for name in SERVER_OPTIMIZER_ARGUMENTS),
    "aggregation_weighting",
    "reset_optimizer",
    "bf16",
    "fp16",
    "seed",
)


@dataclass
class FederatedConfig(SFTConfig):
    """
    Configuration class for [`FederatedTrainer`].

    Takes every argument of [`~trl.SFTConfig`]. `per_device_train_batch_size`, `gradient_accumulation_steps` and
    `max_grad_norm` are per client. One epoch of the Trainer is one round, so `eval_strategy="epoch"` and
    `save_strategy="epoch"` act at round ends and `num_train_epochs` is set to `num_rounds`.

    Parameters:
        > Rounds

        num_rounds (`int`, *optional*):
            Communication rounds, T in the paper. If `None`, it is derived: one round per epoch of `num_train_epochs`.
        local_steps (`int`, *optional*):
            Optimizer steps each client takes per round, cycling through its rows, shuffled anew on each pass.
            Exclusive with `local_epochs`. `None` means `local_epochs` counts. The clients' random orders depend on
            each other: at the same step they have rows of like rank by length, which saves padding side by side.
        local_epochs (`int`, *optional*):
            Passes each client makes over its rows per round. If both this and `local_steps` are `None`, it is 1.
        clients_per_round (`int`, *optional*):
            Clients sampled for each round, without replacement. `None` means all.
        client_sampling (`str`, *optional*, defaults to `"uniform"`):
            How they are sampled: `"uniform"`, or `"examples"` with probabilities proportional to the number of rows.
            The trainer's `client_sampler` takes a function of your own.

        > Method

        method (`str`, *optional*, defaults to `"fedsa"`):
            Who holds a factor of the adapter, and whose turn it is to train:

            - `"fedsa"`: A is averaged, B stays with the client.
            - `"fedavg"` (FedIT): both are averaged.
            - `"ffa"`: A stays as it started, B trains and is averaged.
            - `"share_b"`: B is averaged, A stays with the client.
            - `"rolora"`: both are averaged; B trains in the first round, A in the second, and so on in turn.
            - `"local"`: nothing is averaged.

            [`register_method`] adds one.

        > Execution

        parallel_clients (`int`, *optional*):
            Clients that train side by side in one forward pass, per process. It changes speed and memory, not results
            (dropout and other noise draw other numbers). `None` means as many as a round samples, up to 4. `1` trains
            them one after the other with the least memory.
        client_store_dir (`str`, *optional*):
            Directory for the tensors of clients that are not training. `None` keeps them in memory, or, with several
            processes, in `client_store` in `output_dir`, which all processes must see.

        resume_with_changes (`list[str]`, *optional*):
            What may differ between a checkpoint and the run that goes on from it: names of arguments, of entries of
            the adapter's config, and `"train_dataset"`, `"base_model"` or `"optimizer_cls_and_kwargs"`. Everything
            that results depend on is compared, and any other difference is an error. A change holds from the
            checkpoint on, which must be of a round's end; `num_rounds` and what results do not depend on may always
            change. `None` means that nothing may.

        > Aggregation

        aggregator (`str`, *optional*, defaults to `"mean"`):
            How a round's clients become the new A: `"mean"`, or a rule that a minority of them cannot take along.
            `"median"` and `"trimmed_mean"` (https://arxiv.org/abs/1803.01498) act on every number alone, `"krum"`
            (https://arxiv.org/abs/1703.02757) takes the A of the client that is closest to its neighbours. These give
            no weights to clients, whatever `aggregation_weighting` is, and hold the A of all clients of the round, in
            every process.
        trim_fraction (`float`, *optional*):
            Fraction of a round's clients that `"trimmed_mean"` cuts at either end, from 0 to less than 0.5, rounded
            down to whole clients. `None` means 0.1.
        krum_byzantine (`int`, *optional*):
            Clients of a round, f, that may return anything in `"krum"`. It needs 2 f + 3 clients; a round with fewer
            does not count. `None` means as many as each round allows.
        aggregation_weighting (`str`, *optional*, defaults to `"examples"`):
            Weight of a client in the average of A: `"examples"` for the number of different rows it trained on in the
            round, `"uniform"` for the plain mean. It is that of `aggregator="mean"`; the others have no weights.
        server_optimizer (`str`, *optional*, defaults to `"fedavg"`):
            How the server goes from what it has sent to what the clients' updates have become: `"fedavg"` takes that
            as it is, `"fedavgm"` (https://arxiv.org/abs/1909.06335) adds momentum, `"fedadam"` and `"fedyogi"`
            (https://arxiv.org/abs/2003.00295) take steps of their own size. Its state is in the checkpoints.
        server_learning_rate (`float`, *optional*):
            Learning rate of the server, 1 if `None`; 0.01 for `"fedadam"` and `"fedyogi"`, where it is about how far
            every number moves in a round, and the one argument to tune.
        server_momentum (`float`, *optional*):
            Momentum of `"fedavgm"`, 0.9 if `None`.
        server_beta_1 (`float`, *optional*):
            Decay rate of the mean of changes in `"fedadam"` and `"fedyogi"`, 0.9 if `None`.
        server_beta_2 (`float`, *optional*):
            Decay rate of their variance, 0.99 if `None`.
        server_tau (`float`, *optional*):
            Adaptivity of these two, 0.001 if `None`: changes that are small against it are not made larger.
        share_modules_to_save (`bool`, *optional*, defaults to `False`):
            Whether modules trained in full (`modules_to_save`, such as a classification head) are averaged too. Off,
            every client keeps its own.
        reset_optimizer (`bool`, *optional*):
            Whether a client starts each round with a fresh optimizer state. If `False`, the state is kept with the
            client. If `None`, it is derived: `True`, unless there is only one client.

        > Faults

        min_clients_per_round (`int`, *optional*, defaults to `1`):
            Clients that must return an update for a round to count. If fewer do, A and every B stay as they were.
        max_update_norm (`float` or `"auto"`, *optional*, defaults to `"auto"`):
            Largest change of A that a client may return, as a multiple of the norm of the A it was sent (Frobenius
            norms over all layers). A client beyond it is left out of the round, as are those with a loss or an update
            that is not finite. `"auto"` leaves out those whose change is more than 6 times the median of the round's
            clients (in all, per step and per step squared), and more than 0.05 times the norm of A; of fewer than 3
            clients, those beyond 30 times the norm; a federation of one client has no limit. Whoever is beyond 0.05
            times the norm is kept aside, in memory, until the round ends. Measured on a tiny Llama with clipped
            gradients, no honest client was left out, and of changes scaled by 10 all were (Adam, rates from 5e-4 on),
            but where clients take 1 to 60 steps less than half. `None` sets no limit. No limit on size stops a small
            change, however it is meant, or one in a harmful direction.
            `aggregator` is for these, and nothing is for half of the clients acting together.

        > Data

        client_column (`str`, *optional*, defaults to `"client_id"`):
            Column that names the client of a row, where `train_dataset` is one `Dataset`. Dictionaries of datasets get
            it added.
        eval_unseen_clients (`bool`, *optional*, defaults to `False`):
            Whether `eval_dataset` may hold clients that never train. They are evaluated with the shared A and an
            untrained B. Off, such a client is an error.

        > Hub

        hub_clients (`list[str]` or `str`, *optional*):
            Clients whose complete adapters are pushed: `"all"`, `"none"`, or their ids. It must be set to push a
            federation, since these hold what a client never shared in training.
        hub_client_repositories (`bool`, *optional*):
            Whether the adapter of each of them goes to a repository of its own, `<hub_model_id>-<client_id>`, which is
            always private. Off, they go to `clients/` in `hub_model_id`. `None` means as it is there, else off.
        hub_name_clients (`bool`, *optional*, defaults to `False`):
            Whether clients whose adapters are not in `hub_model_id` are named there, with their results. Off, they are
            counted.
        hub_base_model (`str`, *optional*):
            Id of the base model on the Hub, where it was loaded from a local folder. `None` means the name it was
            loaded by.

    Unlike its parent, it creates repositories as private ones unless `hub_private_repo=False`.
    """

    num_rounds: int | None = field(
        default=None,
        metadata={"help": "Communication rounds. If None, derived: one round per epoch of num_train_epochs."},
    )
    local_steps: int | None = field(
        default=None,
        metadata={
            "help": "Optimizer steps each client takes per round, cycling through its rows. Exclusive with "
            "local_epochs. None means local_epochs counts."
        },
    )
    local_epochs: int | None = field(
        default=None,
        metadata={
            "help": "Passes each client makes over its rows per round. If both this and local_steps are None, it is 1."
        },
    )
    clients_per_round: int | None = field(
        default=None, metadata={"help": "Clients sampled for each round, without replacement. None means all."}
    )
    client_sampling: str = field(
        default="uniform",
        metadata={
            "help": "How a round's clients are sampled: all alike, or with probabilities proportional to their number "
            "of rows.",
            "choices": ["uniform", "examples"],
        },
    )
    method: str = field(
        default="fedsa",
        metadata={
            "help": "Who holds a factor of the adapter, and whose turn it is to train: fedsa (A is averaged), fedavg "
            "(A and B), ffa (B, and A is frozen), share_b (B), rolora (B and A in turn) or local (nothing)."
        },
    )
    parallel_clients: int | None = field(
        default=None,
        metadata={
            "help": "Clients that train side by side in one forward pass. Changes speed and memory, not results. None "
            "means as many as a round samples, up to 4."
        },
    )
    client_store_dir: str | None = field(
        default=None,
        metadata={
            "help": "Directory for the tensors of clients that are not training. None keeps them in memory, or, with "
            "several processes, in output_dir."
        },
    )
    resume_with_changes: list[str] | None = field(
        default=None,
        metadata={
            "help": "Names of what may differ between a checkpoint and the run that goes on from it: arguments, "
            "entries of the adapter's config, train_dataset, base_model. Any other difference in what results depend "
            "on is an error."
        },
    )
    aggregator: str = field(
        default="mean",
        metadata={
            "help": "How a round's clients become the new A. All but mean resist a minority of bad clients, give no "
            "weights to clients, and hold the A of all of a round.",
            "choices": [*AGGREGATORS],
        },
    )
    trim_fraction: float | None = field(
        default=None,
        metadata={
            "help": "Fraction of a round's clients that trimmed_mean cuts at either end, less than 0.5. None means "
            "0.1."
        },
    )
    krum_byzantine: int | None = field(
        default=None,
        metadata={
            "help": "Clients of a round, f, that may return anything in krum, which needs 2 f + 3. None means as many "
            "as each round allows."
        },
    )
    aggregation_weighting: str = field(
        default="examples",
        metadata={
            "help": "Weight of a client in the average of A: the number of different rows it trained on in the round, "
            "or the same for all. Without effect unless aggregator is mean.",
            "choices": ["examples", "uniform"],
        },
    )
    server_optimizer: str = field(
        default="fedavg",
        metadata={
            "help": "How the server goes from what it has sent to what the clients' updates have become. fedavg takes "
            "that as it is.",
            "choices": [*SERVER_OPTIMIZERS],
        },
    )
    server_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Learning rate of the server. None means 1, and 0.01 for fedadam and fedyogi."},
    )
    server_momentum: float | None = field(default=None, metadata={"help": "Momentum of fedavgm. None means 0.9."})
    server_beta_1: float | None = field(
        default=None, metadata={"help": "Decay rate of the mean in fedadam and fedyogi. None means 0.9."}
    )
    server_beta_2: float | None = field(
        default=None, metadata={"help": "Decay rate of the variance in fedadam and fedyogi. None means 0.99."}
    )
    server_tau: float | None = field(
        default=None, metadata={"help": "Adaptivity of fedadam and fedyogi. None means 0.001."}
    )
    share_modules_to_save: bool = field(
        default=False,
        metadata={
            "help": "Whether modules trained in full (modules_to_save) are averaged. Off, each client keeps its own."
        },
    )
    reset_optimizer: bool | None = field(
        default=None,
        metadata={
            "help": "Whether a client starts each round with a fresh optimizer state. If None, derived: yes, unless "
            "there is only one client."
        },
    )
    min_clients_per_round: int = field(
        default=1,
        metadata={"help": "Clients that must return an update for a round to count. If fewer do, A stays as it was."},
    )
    max_update_norm: float | str | None = field(
        default="auto",
        metadata={
            "help": "Largest change of A that a client may return, as a multiple of the norm of the A it was sent. "
            "auto compares it to the median change of the round's clients. None sets no limit. It does not stop small "
            "changes or half of the clients acting together."
        },
    )
    client_column: str = field(
        default="client_id",
        metadata={"help": "Column that names the client of a row, where train_dataset is one Dataset."},
    )
    eval_unseen_clients: bool = field(
        default=False,
        metadata={"help": "Whether eval_dataset may hold clients that never train. Off, such a client is an error."},
    )
    hub_clients: list[str] | None = field(
        default=None,
        metadata={
            "help": "Clients whose complete adapters are pushed: all, none, or their ids. Must be set to push a "
            "federation."
        },
    )
    hub_client_repositories: bool | None = field(
        default=None,
        metadata={
            "help": "Whether the adapter of each of them goes to a private repository of its own, "
            "<hub_model_id>-<client_id>. None means as it is there already, else no."
        },
    )
    hub_name_clients: bool = field(
        default=False,
        metadata={
            "help": "Whether clients whose adapters are not in hub_model_id are named there. Off, only counted."
        },
    )
    hub_base_model: str | None = field(
        default=None,
        metadata={"help": "Id of the base model on the Hub, where it was loaded from a local folder."},
    )

    def __post_init__(self):
        counts = ("num_rounds", "local_steps", "local_epochs", "clients_per_round", "parallel_clients")
        for name in (*counts, "min_clients_per_round"):
            value = getattr(self, name)
            if value is None and name in counts:
                continue
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"`{name}` must be an int or None, got {value!r} of type {type(value).__name__}.")
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}. Leave it out for the default.")
        if self.local_steps is not None and self.local_epochs is not None:
            raise ValueError(
                f"`local_steps={self.local_steps}` and `local_epochs={self.local_epochs}` both say how long a client "
                "trains per round. Pass one of them."
            )
        method_named(self.method)
        if self.aggregation_weighting not in ("examples", "uniform"):
            raise ValueError(
                f"`aggregation_weighting` must be 'examples' or 'uniform', got {self.aggregation_weighting!r}."
            )
        check_client_sampling(self.client_sampling)
        check_aggregator(self.aggregator, trim_fraction=self.trim_fraction, krum_byzantine=self.krum_byzantine)
        if isinstance(self.max_update_norm, str):  # As the command line has it.
            with contextlib.suppress(ValueError):
                self.max_update_norm = float(self.max_update_norm)
        check_max_update_norm(self.max_update_norm)
        check_server_optimizer(self.server_optimizer, optimizer_arguments(self))
        if self.deepspeed is not None:
            raise ValueError(
                "`deepspeed` shards parameters over processes, but here each process trains clients of its own. Leave "
                "it out; `bitsandbytes` quantization saves the memory instead."
            )
        if self.fsdp:
            raise ValueError(
                f"`fsdp={self.fsdp!r}` shards parameters over processes, but here each process trains clients of its "
                "own. Leave it out; `bitsandbytes` quantization saves the memory instead."
            )
        if isinstance(self.resume_with_changes, str):
            self.resume_with_changes = [self.resume_with_changes]
        check_names_of_changes(self.resume_with_changes or ())
        if isinstance(self.hub_clients, str):
            self.hub_clients = [self.hub_clients]
        if self.num_rounds is not None:
            self.num_train_epochs = self.num_rounds
        super().__post_init__()
        if self.push_to_hub and self.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            raise ValueError(
                f'`hub_strategy="{self.hub_strategy.value}"` would upload checkpoints, which hold the B of every '
                'client. Use "every_save", which uploads what `hub_clients` names, and keep the checkpoints here.'
            )
        if self.auto_find_batch_size:
            raise ValueError(
                "`auto_find_batch_size=True` restarts training with another batch size, after clients have already "
                "changed. Set `per_device_train_batch_size` or lower `parallel_clients`."
            )

    @property
    def rounds(self) -> int:
        """Number of rounds, given or derived."""
        return self.num_rounds if self.num_rounds is not None else math.ceil(self.num_train_epochs)

    @property
    def expects_clients(self) -> bool:
        """Whether rows that name no client would be a mistake."""
        return self.client_column != FederatedConfig.client_column or (self.clients_per_round or 1) > 1

    @property
    def local_work(self) -> LocalWork:
        """How much a client trains in a round."""
        return LocalWork(
            batch_size=self.per_device_train_batch_size,
            accumulation_steps=self.gradient_accumulation_steps,
            local_steps=self.local_steps,
            local_epochs=self.local_epochs or (1 if self.local_steps is None else None),
            drop_last=self.dataloader_drop_last,
        )


def server_settings(args: FederatedConfig) -> ServerSettings:
    """What the arguments tell the server."""
    return ServerSettings(
        seed=args.seed,
        num_rounds=args.rounds,
        clients_per_round=args.clients_per_round,
        client_sampling=args.client_sampling,
        min_clients_per_round=args.min_clients_per_round,
        max_update_norm=args.max_update_norm,
        aggregator=args.aggregator,
        trim_fraction=args.trim_fraction,
        krum_byzantine=args.krum_byzantine,
        server_optimizer=args.server_optimizer,
        **{f"server_{name}": value for name, value in optimizer_arguments(args).items()},
    )


def client_settings(args: FederatedConfig) -> ClientSettings:
    """What the arguments tell the clients."""
    return ClientSettings(
        seed=args.seed,
        weighting=args.aggregation_weighting,
        max_update_norm=None if args.max_update_norm == "auto" else args.max_update_norm,
    )


def store_directory(args: FederatedConfig, spans_processes: bool, worker: Path | None = None) -> Path | None:
    """Where clients wait that are not training. In memory if there is no such folder."""
    if args.client_store_dir is not None:
        return Path(args.client_store_dir)
    if worker is not None:
        return worker / "client_store"
    # Where several processes take turns at a client, they find its B on the disk they have in common.
    return Path(args.output_dir) / "client_store" if spans_processes else None
