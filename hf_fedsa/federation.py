"""One federation as a trainer holds it: its server, its clients, and what carries messages between them."""

import contextlib
import copy
import functools
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from datasets import Dataset
from peft import PeftModel

from .checkpoint import SavedRun, check_changes, check_position, save_run
from .checkpoint_folder import newest_whole_checkpoint, where_else
from .client.data import ClientRows
from .client.local_optimizer import SCHEDULES_BY_METRIC, LocalOptimizer
from .client.noise import ClientNoise
from .client.parameters import adapter_tensors
from .client.runtime import ClientRuntime
from .client.slots import Slots
from .client.step import AsTheTrainer, SideBySide
from .client.store import ClientStoreError, ClientStores
from .client.waves import Round, WavePlanner, WholePasses
from .config import FederatedConfig, client_settings, server_settings, store_directory
from .evaluation import EvaluationResults
from .files import write_text
from .fit import first_difference, shapes_of
from .hub.loading import Origin
from .identity import defaults_of
from .messages import Broadcast, ClientInfo, Tensors, Update
from .methods import keeping_shared, method_named
from .metrics import round_metrics, rounds_jsonl
from .processes import first_process_first
from .refusals import Shape, check_federation_size
from .run import Run
from .server.sampling import ClientSampler
from .server.server import Server
from .tensors import clone_tensors, count_bytes, tensors_sha256
from .transport import AcrossProcesses, InProcess, Transport

logger = logging.getLogger(__name__)


class Federation:
    """
    The objects of one federation, put together, saved and restored.

    Args:
        model ([`~peft.PeftModel`]):
            The base model with one adapter.
        args ([`FederatedConfig`]):
            Arguments of the run.
        rows ([`ClientRows`]):
            The clients' rows, once prepared.
        shape ([`Shape`]):
            What arguments and clients make of it.
        accelerator ([`~accelerate.Accelerator`]):
            Connects the processes of the run.
        transport ([`Transport`], *optional*):
            Brings rounds from a server elsewhere. `None` puts the server into this process.
        client_sampler (`ClientSampler`, *optional*):
            Chooses a round's clients.
    """

    def __init__(
        self,
        model: PeftModel,
        args: FederatedConfig,
        rows: ClientRows,
        shape: Shape,
        accelerator: Accelerator,
        *,
        transport: Transport | None = None,
        client_sampler: ClientSampler | None = None,
    ):
        self.model, self.args, self.rows, self.shape = model, args, rows, shape
        self.client_ids = rows.client_ids
        spans_processes = args.world_size > 1 and not shape.whole_passes
        self.slots = slots = Slots(
            model,
            shape.num_slots,
            method_named(args.method),
            share_modules_to_save=args.share_modules_to_save,
            side_by_side=not shape.whole_passes,
        )

        # The server's tensors are fp32 whatever the slots train in, so that an average loses nothing. Where it is
        # elsewhere, this is what is known of it here.
        sent = slots.select(0, "shared")
        self.server = Server(
            clone_tensors(sent, dtype=torch.float32),
            {info.client_id: info for info in self.client_infos()},
            server_settings(args),
            sharing=slots.sharing,
            sampler=client_sampler,
            dtypes={key: tensor.dtype for key, tensor in sent.items()},
        )
        if transport is None:
            transport = AcrossProcesses(self.server, accelerator) if spans_processes else InProcess(self.server)
        self.transport: Transport = transport

        # The clients
        self.stores = ClientStores(
            store_directory(args, spans_processes, self.transport.folder),
            Path(args.output_dir),
            self.client_ids,
            named_by_user=args.client_store_dir is not None,
            is_first=accelerator.is_main_process,
        )
        if self.is_elsewhere:
            self.stores.refuse_claimed()
        self.optimizer = LocalOptimizer(
            slots,
            resets=shape.resets_optimizer,
            keeps=not shape.resets_optimizer and not shape.whole_passes,
            steps_schedule=not shape.whole_passes and args.lr_scheduler_type not in SCHEDULES_BY_METRIC,
            many=not shape.is_alone,
        )
        self.client = ClientRuntime(
            slots,
            self.stores,
            self.optimizer,
            client_settings(args),
            initial_local=slots.take(0, "local"),
            where_else=functools.partial(where_else, Path(args.output_dir)),
            follows=self.is_elsewhere,
        )
        self.engine = self._engine(spans_processes)
        self.results = EvaluationResults()
        # What some initialisations took out of the base weight, whatever the run starts from.
        self.created = {**clone_tensors(self.server.shared), **self.client.initial_local}
        # Updates of the open round that have gone to a server elsewhere, without their tensors, and their bytes.
        self._noted: list[tuple[Update, int]] = []
        # The federation that a newcomer comes from.
        self.origin: dict[str, Any] | None = None

    def _engine(self, spans_processes: bool) -> AsTheTrainer | SideBySide:
        if self.shape.whole_passes:
            return AsTheTrainer(self.slots)
        noise = None
        if self.args.neftune_noise_alpha is not None:
            noise = ClientNoise(self.args.neftune_noise_alpha, self.args.pad_to_multiple_of)
        of_all = self.client.clients_in_step if spans_processes else None
        return SideBySide(self.slots, noise, clients_in_step=of_all, world_size=self.args.world_size)

    # Who and when

    @property
    def spans_processes(self) -> bool:
        """Whether the clients are spread over several processes. One client alone is trained as its Trainer does."""
        return self.args.world_size > 1 and self.engine.plans_rounds

    @property
    def is_elsewhere(self) -> bool:
        """Whether the server is in another place. The one here then knows no more than A and what happened here."""
        return self.transport.folder is not None

    def client_infos(self) -> list[ClientInfo]:
        """What the server is told of every client that lives here."""
        work = self.args.local_work
        return [ClientInfo(c, len(rows), num_steps=work.num_steps(len(rows))) for c, rows in self.rows.of.items()]

    def prepare(self) -> None:
        """Follows the arguments as they are when a run begins."""
        self.server.settings = server_settings(self.args)
        self.client.settings = client_settings(self.args)
        # The optimizer that is made next must know all that ever has its turn.
        self.slots.train(self.slots.sharing.ever_trained)
        self._register()
        self.client.planner = self._planner()

    def _planner(self) -> WavePlanner | WholePasses:
        args, of = self.args, self.rows.of
        if not self.engine.plans_rounds:
            return WholePasses(self.client_ids[0], len(of[self.client_ids[0]]))
        return WavePlanner(
            of,
            args.local_work,
            parallel_clients=len(self.slots),
            seed=args.data_seed if args.data_seed is not None else args.seed,
            order=args.train_sampling_strategy,
            lengths=self.rows.lengths(args.length_column_name),
            as_alone=self.shape.is_alone,
            num_processes=args.world_size,
            process_index=args.process_index,
        )

    def add_client(self, client_id: str, train_dataset: Dataset, prepared: Dataset) -> Dataset:
        """
        Takes in a newcomer.

        Args:
            client_id (`str`):
                The client.
            train_dataset (`Dataset`), prepared (`Dataset`):
                Prepared rows of the other clients and of the newcomer.

        Returns:
            `Dataset`: the rows of all.
        """
        self.rows.prepared = train_dataset
        together = self.rows.add(client_id, prepared)
        self._take_over_clients()
        return together

    def remove_client(self, client_id: str, forget: bool) -> None:
        """
        Takes a client out. `forget` deletes what it has stored, and its name and numbers from the record.

        Raises:
            `ValueError`: too few are left for a round.
        """
        if len(self.client_ids) == 1:
            raise ValueError(f"{client_id!r} is the only client, and a federation needs one. Add another one first.")
        check_federation_size(self.args, len(self.client_ids) - 1)
        self.server.deregister(client_id, forget=forget)
        self.rows.remove(client_id)
        self.results.by_client.pop(client_id, None)
        if forget:
            self.client.forget(client_id)
        self._take_over_clients()

    def _take_over_clients(self) -> None:
        self.client_ids = self.rows.client_ids
        self.stores.take_over(self.client_ids)
        self._register()

    def _register(self) -> None:
        for info in self.client_infos():
            if (reason := self.server.register(info)) is not None:
                raise ValueError(f"Client {info.client_id!r} cannot take part: {reason}")

    def plan_rounds(self) -> list[Round]:
        """
        Every round of the run, those done included: how many steps there are, and how long the schedule is.

        Of a server elsewhere it is not known. A round of all clients that live here is as long as one can be.
        """
        client, done = self.client, self.server.state.rounds_done
        if (expected := self.transport.expected_rounds()) is None:
            return [client.planner.plan(0, self.client_ids)]
        return [
            client.planner.plan(index, client_ids, client.trained if index == done else ())
            for index, client_ids in enumerate(expected)
        ]

    def note_broadcast(self, broadcast: Broadcast) -> None:
        """Takes over A from a server elsewhere."""
        self.server.shared = {key: broadcast.shared[key].float() for key in self.server.shared}
        self.server.state.run_id = broadcast.run_id

    def note_update(self, update: Update) -> None:
        """Keeps what is to be recorded of an update that has gone to a server elsewhere."""
        self._noted.append((replace(update, shared={}), count_bytes(update.shared)))

    def note_round(self, seconds: float, step: int) -> dict[str, Any]:
        """
        Records what clients here did in a round whose record a server elsewhere keeps.

        Returns:
            `dict`: an entry of `round_history`. Whether the round has counted is not known: it is taken to.
        """
        updates, bytes_up = [update for update, _ in self._noted], sum(size for _, size in self._noted)
        self._noted = []
        answered = [update for update in updates if update.fault is None]
        record = round_metrics(
            round_index=self.client.state.round_index,
            losses={update.client_id: update.metrics["loss"] for update in answered},
            weights={update.client_id: update.weight for update in answered},
            left_out={update.client_id: update.fault for update in updates if update.fault is not None},
            staleness={update.client_id: None for update in answered},
            counted=True,
            bytes_down=len(updates) * count_bytes(self.server.sent()),
            bytes_up=bytes_up,
            seconds=seconds,
        )
        record |= {"step": step, "shared_sha256": tensors_sha256(self.server.shared)}
        state = self.server.state
        state.history.append(record)
        state.last_round |= dict.fromkeys(record["clients"], record["round"])
        return record

    def evaluated_here(self, client_ids: Sequence[str]) -> list[str]:
        """Clients that this process evaluates: those that it trains in the open round, and its share of the others."""
        client = self.client
        training = client.round.client_ids if self.spans_processes and client.state.round_open else ()
        others = [client_id for client_id in client_ids if client_id not in training]
        return [
            *(c for c in client_ids if c in training and not client.trains_elsewhere(c)),
            *others[self.args.process_index :: self.args.world_size],
        ]

    # The model between two runs

    def rest(self) -> None:
        """Puts the first client's adapter into the model, for users to read and to write."""
        self.client.rest(self.client_ids[0], self.server.sent())

    def take_edits(self, has_run: bool) -> None:
        """
        Takes over what has been written into the model's adapter since [`rest`].

        Only tensors that differ from what was put there, since slots may hold fewer bits than the server.

        Args:
            has_run (`bool`):
                Whether clients have trained. If not, all of them start from what has been written.
        """
        if not self.client.is_at_rest:
            return
        self.stores.check()
        first = self.client_ids[0]
        edited = self.client.edits(first, self.server.sent())
        if not edited:
            return
        shared = {key: t.float() for key, t in edited.items() if self.slots.sharing.share_of[key] == "shared"}
        self.server.shared = {**self.server.shared, **shared}
        local = {key: t for key, t in edited.items() if key not in shared}
        self.client.replace_local(first, local, of_everyone=not has_run)

    def adapter_of(self, client_id: str) -> Tensors:
        """The complete adapter a client serves with now."""
        return self.client.adapter_of(client_id, self.server.sent())

    def start_of_a(self) -> Tensors:
        """A as a client has it that has not trained, where each keeps its own."""
        factors, local = self.slots.sharing.factors, self.client.initial_local
        return {key: tensor for key, tensor in local.items() if factors[key] == "A"}

    def start_from(self, origin: Origin, train_shared: bool) -> None:
        """
        Starts from another federation's A, and trains it or not.

        Raises:
            `ValueError`: it does not fit the model that is here.
        """
        expected = shapes_of(self.slots.select(0, "shared"))
        if difference := first_difference(expected, shapes_of(origin.shared)):
            key, here, there = difference
            raise ValueError(
                f"The shared tensors do not fit the base model: {key!r} has the shape {there}, and {here} is "
                "needed. Leave `model` out to use the base they were trained on."
            )
        if self.frozen and tensors_sha256(self.frozen) != origin.federation["frozen_sha256"]:
            raise ValueError(
                "The adapter's constant projections, drawn here from `projection_prng_key`, are not those that the "
                "shared tensors were trained with. Use the version of torch that `federation.json` names."
            )
        server, client = self.server, self.client
        started = clone_tensors({key: origin.shared[key] for key in server.shared})
        if not train_shared:
            self.slots.use(keeping_shared(self.slots.sharing.method))
            server.sharing = self.slots.sharing
        kept = {key: t for key, t in started.items() if self.slots.sharing.share_of[key] == "local"}
        given, like = {**kept, **origin.start}, self.slots.parameters[0]
        client.initial_local = client.initial_local | {key: t.to(like[key].dtype) for key, t in given.items()}
        server.shared = {key: t for key, t in started.items() if key not in kept}
        server.initial_shared = clone_tensors(server.shared)
        origin.restore_patterns(self.model.peft_config.values())
        if origin.local is not None:
            if differing := sorted(client.initial_local.keys() ^ origin.local.keys()):
                raise ValueError(
                    f"The adapter to start from (`init_local`) differs from this one in {differing[0]!r}."
                )
            client.initial_local = {key: origin.local[key].to(t.dtype) for key, t in client.initial_local.items()}
        self.slots.load(0, server.shared, client.initial_local)
        self.origin = {
            "shared_sha256": tensors_sha256(origin.shared),
            "rounds_done": origin.federation["rounds_done"],
            "clients": sorted(origin.federation["clients"]),
        }

    # What is said of it

    @functools.cached_property
    def frozen(self) -> Tensors:
        """The adapter's constants, such as VeRA's projections."""
        every = adapter_tensors(self.model, self.slots.names[0])
        return clone_tensors({key: tensor for key, tensor in every.items() if key not in self.slots.parameters[0]})

    @property
    def base_model_name(self) -> str:
        return self.model.get_base_model().config._name_or_path

    def add_results(self, results: Mapping[str, Mapping[str, Any]]) -> None:
        """Keeps what clients were evaluated to, for the model card and for the last round's record."""
        state = self.server.state
        known = {client_id: metrics for client_id, metrics in results.items() if client_id in self.rows.of}
        self.results.add(known, state.rounds_done)
        if state.history:
            state.history[-1]["results"] = copy.deepcopy(self.results.by_client)

    def write_rounds(self) -> None:
        """Writes `rounds.jsonl` to the run's folder."""
        write_text(Path(self.args.output_dir) / "rounds.jsonl", rounds_jsonl(self.server.state.history))

    # Going on

    @property
    def folders(self) -> dict[str, Path]:
        """Folders that a run writes to, by the argument that names them."""
        folders = {"output_dir": Path(self.args.output_dir)}
        if self.stores.directory is not None:
            folders["client_store_dir"] = self.stores.directory
        return folders

    def claim_stores(self, clear: bool) -> None:
        """Makes the stores those of a run that begins. `clear` empties them: no client has trained yet."""
        self.stores.claim(self.server.state.run_id, resuming=False, nothing_to_resume=self._leaves_nothing)
        if clear:
            self.stores.fill({})

    def _leaves_nothing(self) -> bool:
        """Whether there is no whole checkpoint to go on from."""
        return newest_whole_checkpoint(Path(self.args.output_dir).resolve(), warn=logger.debug) is None

    def save_state(self, folder: Path, identity: Mapping[str, Any], seconds: float) -> None:
        """Writes what a resumed run needs of the federation to a checkpoint, see [`save_run`]."""
        save_run(
            folder,
            server=self.server,
            client=self.client,
            results=self.results,
            identity=identity,
            num_processes=self.args.world_size,
            seconds=seconds,
        )

    def resume(self, saved: SavedRun, run: Run, identity: Mapping[str, Any]) -> None:
        """
        Goes on where a saved run stood.

        Args:
            saved ([`SavedRun`]):
                The run that was saved.
            run ([`Run`]):
                The run that goes on.
            identity (`Mapping[str, Any]`):
                All that its results depend on.

        Raises:
            [`CheckpointError`]: it is another run, or cannot go on from there.
        """
        run.changes = check_changes(
            saved.checkpoint,
            identity,
            meant=self.args.resume_with_changes or (),
            defaults=defaults_of(self.slots.config, self.args),
        )
        if self.engine.plans_rounds:
            check_position(saved.checkpoint, saved.state, run.changes, self.args.rounds, self.args.world_size)
        # The state of one kind of optimizer is of no use to another.
        kept = ("clients",) if run.changes_optimizer else ("clients", "optimizers")
        with first_process_first(self.args.process_index == 0):
            self.stores.claim(saved.run_id, resuming=True, nothing_to_resume=self._leaves_nothing)
            run.replaced_by = saved.checkpoint if run.has_run else None
            self.stores.fill({name: saved.folder / name for name in kept})
        saved.load_server(self.server)
        run.steps_back = saved.load_clients(self.client, with_optimizers=not run.changes_optimizer)
        self.results = saved.results
        if not self.engine.plans_rounds and not self.client.state.wave_open:
            self.slots.load(0, self.adapter_of(self.client_ids[0]))
        if self.client.state.round_open:  # Its clients may be looked at before the Trainer's loop opens it.
            self.client.open(*self.transport.open_round())
        run.resuming = True

    @contextlib.contextmanager
    def as_it_was_unless_begun(self, run: Run) -> Iterator[None]:
        """
        Leaves a federation whose run fails fit for the next one.

        A first run that fails before it has begun leaves everything as it was, what was written into the model
        included. A later one leaves the record of the one before. One that fails once it has begun leaves every client
        as after the last wave it finished.
        """
        server, client, replaced_by = self.server, self.client, run.replaced_by
        saved, state, initial_local = server.state_dict(), copy.deepcopy(client.state), client.initial_local
        adapter = self.slots.take(0)
        try:
            yield
        except BaseException:
            if not run.begun and not run.has_run:
                server.load_state_dict(*saved)
                client.initial_local = initial_local
                client.resume(state, (), {})
                self.slots.load(0, adapter)
            elif not run.begun and run.replaced_by is replaced_by:
                server.load_state_dict(*saved)
            elif run.begun and self.rows.are_named:
                client.abandon(list(server.state.open.weights) if server.state.open else [])
                # What is lost of the store is not to hide what has happened.
                with contextlib.suppress(ClientStoreError):
                    self.rest()
                    run.at_rest = True
            raise
