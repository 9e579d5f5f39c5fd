"""What a run publishes, and when: the check before it, the push that is due, and what each push says."""

import functools
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi
from peft import PeftModel
from transformers.trainer_utils import HubStrategy

from ..config import FederatedConfig
from ..trackers import args_of_push_event
from .card import card_entries
from .folder import read_saved
from .publication import choose_clients, name_on_hub
from .push import check_repository, push_saved
from .saving import save_processing_class

logger = logging.getLogger(__name__)


class Publisher:
    """
    Publishes one run's federation. It reads the folders that the run has saved, and holds no model.

    Args:
        args ([`FederatedConfig`]):
            Arguments of the run.
        client_ids (`Sequence[str]`):
            The clients there are.
        names_clients (`bool`):
            Whether the clients are named. A sole client that is not is published as the model of any Trainer is.

    Attributes:
        card (`dict[str, Any]`):
            What the user has said for the model card.
        hub_base_model (`str`, *optional*):
            Id of the base model on the Hub, known once [`check_adapter`] was called.
        processing_files (`list[str]`):
            Files of the tokenizer or processor that the run has saved last.
        is_due (`bool`):
            Whether a push is due that has not begun.
    """

    def __init__(self, args: FederatedConfig, client_ids: Sequence[str], *, names_clients: bool):
        self.args = args
        self.client_ids = list(client_ids)
        self._gone: set[str] = set()
        self.names_clients = names_clients
        self.card: dict[str, Any] = {}
        self.hub_base_model: str | None = None
        self.processing_files: list[str] = []
        self.is_due = False
        # Hashes of the clients' files that this run has pushed: of these it knows that they are its own.
        self._pushed: set[str] = set()

    # Before training

    def check_permission(self) -> None:
        """
        Checks, before the model is loaded, that the run may push what it is to push.

        Raises:
            `ValueError`: it was not said which clients are published, or the repository is public or not a
                federation's.
            [`~huggingface_hub.errors.HfHubHTTPError`]: the token may not write to it.
        """
        if not self.args.push_to_hub:
            return
        published = self.published_clients()
        if self.args.should_save:
            check_repository(
                self.repository_name,
                clients=published,
                client_repositories=self.args.hub_client_repositories,
                private=self.args.hub_private_repo,
                token=self.args.hub_token,
                revision=self.args.hub_revision,
            )

    def check_adapter(self, model: PeftModel, repo_id: str | None) -> None:
        """
        Checks that the adapter is of the kind that the repository holds, and keeps the name of its base model.

        Args:
            model ([`~peft.PeftModel`]):
                The model, before it trains.
            repo_id (`str`, *optional*):
                Repository that the Trainer has made. Not read unless `args.push_to_hub` is set.

        Raises:
            `ValueError`: the repository holds a federation of another kind.
        """
        self.hub_base_model = self.args.hub_base_model or name_on_hub(model.get_base_model().config._name_or_path)
        if self.args.push_to_hub and self.args.should_save:
            check_repository(
                repo_id,
                private=self.args.hub_private_repo,
                token=self.args.hub_token,
                revision=self.args.hub_revision,
                model=model,
                hub_base_model=self.hub_base_model,
            )

    # What is published

    @property
    def repository_name(self) -> str:
        """Repository to push to where no other is named."""
        return self.args.hub_model_id or Path(self.args.output_dir).absolute().name

    def published_clients(self, clients: str | Sequence[str] | None = None) -> list[str]:
        """
        Ids of the clients whose adapters are published.

        Args:
            clients (`str` or `Sequence[str]`, *optional*):
                `"all"`, `"none"` or ids. Defaults to `args.hub_clients`.

        Raises:
            `ValueError`: neither says it, or a client does not exist.
        """
        choice = clients if clients is not None else self.args.hub_clients
        if choice is None and not self.names_clients:
            return list(self.client_ids)
        if clients is None and isinstance(choice, (list, tuple)):
            choice = [client_id for client_id in choice if client_id not in self._gone]
        return choose_clients(choice, self.client_ids)

    def take_over(self, client_ids: Sequence[str]) -> None:
        """Clients have come or gone. What `args.hub_clients` says of those who are gone says nothing any more."""
        self._gone = {*self._gone, *self.client_ids} - {*client_ids}
        self.client_ids = list(client_ids)

    def publishes_all(self) -> bool:
        """Whether `args.hub_clients` says that the adapters of all clients are published."""
        return self.args.hub_clients is not None and len(self.published_clients()) == len(self.client_ids)

    def card_with(self, **entries) -> dict[str, Any]:
        """[`card`] with further entries: `model_name`, `dataset_name`, `tags`, `language`, `license`."""
        return {**self.card, **card_entries(**entries)}

    def save_processing_files(self, processing_class: Any, directory: Path) -> list[str]:
        """Saves the tokenizer or processor, if there is one, to a folder that is still empty. Returns the names."""
        self.processing_files = [] if processing_class is None else save_processing_class(processing_class, directory)
        return self.processing_files

    # Pushing

    def push(
        self,
        directory: Path,
        *,
        commit_message: str,
        on_push_begin: Callable[[FederatedConfig], object],
        repo_id: str | None = None,
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        clients: Sequence[str] | None = None,
    ) -> CommitInfo | Future[CommitInfo]:
        """
        Publishes a folder that was just saved.

        Args:
            directory (`Path`):
                The folder.
            commit_message (`str`):
                Message of the commit.
            on_push_begin (`Callable[[FederatedConfig], object]`):
                Tells callbacks of the push, with arguments that do not make a tracker publish the clients' metrics.
            repo_id (`str`, *optional*):
                Repository. Defaults to [`repository_name`].
            blocking (`bool`, *optional*, defaults to `True`):
                Whether to return only when the upload has finished.
            token (`str`, *optional*), revision (`str`, *optional*), private (`bool`, *optional*):
                Default to those of `args`.
            clients (`Sequence[str]`, *optional*):
                Ids of the clients to publish. Defaults to [`published_clients`].
        """
        args = self.args
        private = private if private is not None else args.hub_private_repo
        all_named = args.hub_name_clients or not self.names_clients
        on_push_begin(args_of_push_event(args, private=private, all_named=all_named))
        saved = read_saved(directory, self.processing_files)
        saved.pushed = self._pushed
        push = functools.partial(
            push_saved,
            saved,
            repo_id or self.repository_name,
            clients=clients if clients is not None else self.published_clients(),
            client_repositories=args.hub_client_repositories,
            name_clients=args.hub_name_clients,
            private=private,
            token=token if token is not None else args.hub_token,
            revision=revision if revision is not None else args.hub_revision,
            commit_message=commit_message,
        )
        return push() if blocking else HfApi().run_as_future(push)

    def checkpoint_saved(self) -> None:
        """Makes a push due, unless the run pushes at its end alone."""
        if self.args.hub_strategy != HubStrategy.END:
            self.is_due = True

    def push_progress(
        self,
        directory: Path,
        rounds_done: int,
        *,
        save: Callable[[Path], object],
        on_push_begin: Callable[[FederatedConfig], object],
        is_pushing: bool,
        repo_id: str | None = None,
    ) -> Future[CommitInfo] | None:
        """
        Begins the push that is due. A failure is logged: training goes on, and the next push carries everything.

        Args:
            directory (`Path`):
                Folder to save to and push.
            rounds_done (`int`):
                Rounds that are finished.
            save (`Callable[[Path], object]`):
                Saves the federation to a folder. The last push has to be over by then, since it reads the files.
            on_push_begin, repo_id:
                See [`push`].
            is_pushing (`bool`):
                Whether the last push is still under way. Unless `args.hub_always_push` is set, this one then stays
                due.

        Returns:
            `Future` of the commit, or `None` if the push stays due.
        """
        if is_pushing and not self.args.hub_always_push:
            return None
        self.is_due = False
        save(directory)
        future = self.push(
            directory,
            commit_message=f"Training in progress, round {rounds_done}",
            on_push_begin=on_push_begin,
            repo_id=repo_id,
            blocking=False,
        )
        future.add_done_callback(functools.partial(_log_failure, rounds_done))
        return future


def _log_failure(rounds_done: int, future: Future[CommitInfo]) -> None:
    if error := future.exception():
        logger.error("The push after round %d failed, the next one carries everything: %s", rounds_done, error)
