"""One step of several clients: one forward pass, a loss and a gradient norm for each.

Two engines behind one protocol. Each is handed the Trainer's own method, and calls it as often as it needs.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from torch.utils.data import DataLoader
from transformers import TrainingArguments

from .data import RoundSampler, SlotCollator, SlotDataset, split_rows
from .noise import ClientNoise
from .slots import SlotRows, Slots


@dataclass
class Step:
    """
    The step in progress, by slot.

    Args:
        items (`dict[int, torch.Tensor | None]`, *optional*):
            Tokens that a client's loss is normalised by.
        batches (`dict[int, int]`, *optional*):
            Micro-batches. A slot that is not named has nothing to do in the step.
        unreadable (`dict[int, tuple[str, str]]`, *optional*):
            Kind and text of the exception that reading a client's rows has raised.
        losses (`list[tuple[int, torch.Tensor]]`, *optional*):
            Slot and loss of every micro-batch, in the order in which they were computed.
    """

    items: dict[int, torch.Tensor | None] = field(default_factory=dict)
    batches: dict[int, int] = field(default_factory=dict)
    unreadable: dict[int, tuple[str, str]] = field(default_factory=dict)
    losses: list[tuple[int, torch.Tensor]] = field(default_factory=list)

    def add_loss(self, slot: int, loss: torch.Tensor) -> None:
        self.losses.append((slot, loss.detach().float()))


class AsTheTrainer:
    """
    One client that trains whole passes, which is what its Trainer does anyway. So loader, packing, gradient
    synchronisation and everything else stay the Trainer's.

    Args:
        slots ([`Slots`]):
            The one slot.
    """

    plans_rounds = False
    noise: ClientNoise | None = None

    def __init__(self, slots: Slots):
        self.slots = slots
        self.step = Step(batches={0: 1})

    def loader(
        self, loader: DataLoader, batches: Callable[[], Iterator], length: int, args: TrainingArguments
    ) -> DataLoader:
        return loader

    def samples(self, parent: Callable, count_items: Callable, epoch_iterator, num_batches, device):
        return parent(epoch_iterator, num_batches, device)

    def train(self, parent: Callable, model: nn.Module, inputs: dict[str, Any], num_items, **_) -> torch.Tensor:
        self.slots.keep_trained()
        self.step = Step(batches={0: 1})
        loss = parent(model, inputs, num_items)
        self.step.add_loss(0, loss)
        return loss

    def loss(self, parent: Callable, score: Callable, model, inputs, return_outputs: bool, num_items):
        return parent(model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items)

    def clip(self, parent: Callable[[], torch.Tensor], unscale: Callable[[], None], max_norm: float) -> torch.Tensor:
        return parent()


class SideBySide:
    """
    Steps of several clients, whose rows are one batch.

    Args:
        slots ([`Slots`]):
            The slots that clients train in.
        noise ([`ClientNoise`], *optional*):
            Noise on the embeddings.
        clients_in_step (`Callable[[], int]`, *optional*):
            Clients in the present step over all processes. `None` if there is one process.
        world_size (`int`, *optional*, defaults to `1`):
            Processes, over which the Trainer takes the mean of the losses it logs.
    """

    plans_rounds = True

    def __init__(
        self,
        slots: Slots,
        noise: ClientNoise | None = None,
        clients_in_step: Callable[[], int] | None = None,
        world_size: int = 1,
    ):
        self.slots, self.noise = slots, noise
        self.clients_in_step, self.world_size = clients_in_step, world_size
        self.step = Step()
        self._dataset: SlotDataset | None = None
        # Rows that the forward pass in progress serves, where it serves several clients at once.
        self._rows: SlotRows | None = None

    # The Trainer's loader already has the right columns and collator; only the order of the rows is ours.
    def loader(
        self, loader: DataLoader, batches: Callable[[], Iterator], length: int, args: TrainingArguments
    ) -> DataLoader:
        """A loader of `(slot, row)` batches with the settings of the Trainer's own."""
        self._dataset = SlotDataset(loader.dataset)
        return DataLoader(
            self._dataset,
            batch_sampler=RoundSampler(batches, length),
            collate_fn=SlotCollator(loader.collate_fn),
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
        )

    def replace_rows(self, dataset: Dataset) -> None:
        """Reads rows from another dataset from the next round on."""
        self._dataset.dataset = dataset

    def samples(self, parent: Callable, count_items: Callable, epoch_iterator, num_batches, device):
        """A step's micro-batches. Each client's loss is normalised by its own tokens, counted as the Trainer would."""
        batches, num_items = parent(epoch_iterator, num_batches, device)
        self.step = step = Step()
        parts: dict[int, list[dict[str, Any]]] = {}
        for batch in batches:
            for slot, error in batch.pop("unreadable").items():
                step.unreadable.setdefault(slot, error)
        for batch in batches:
            for slot, part in split_rows(batch, batch["slot_rows"]):
                parts.setdefault(slot, []).append(part)
        step.items = {slot: count_items(part, device) for slot, part in parts.items()}
        step.batches = {slot: len(part) for slot, part in parts.items()}
        return batches, num_items

    def train(
        self,
        parent: Callable,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items,
        *,
        together: bool,
        accumulating: Callable[[int], contextlib.AbstractContextManager[None]],
        main_input_name: str,
    ) -> torch.Tensor:
        """
        Forward and backward pass of a micro-batch.

        Args:
            parent (`Callable`):
                The Trainer's `training_step`.
            together (`bool`):
                Whether one forward pass yields a loss per row. If not, clients take turns.
            accumulating (`Callable[[int], ContextManager]`):
                Within it the Trainer takes a step to have so many micro-batches.
            main_input_name (`str`):
                Input whose second axis is the sequence.

        Returns:
            `torch.Tensor`: the step's share of the mean loss over clients. What was backpropagated is their sum.
        """
        self.slots.keep_trained()
        before = len(self.step.losses)
        slot_rows: SlotRows = inputs.pop("slot_rows")
        if not slot_rows:
            return torch.zeros((), device=next(iter(self.slots.parameters[0].values())).device)
        if together:
            with self._serving(slot_rows, inputs, main_input_name):
                self._rows = slot_rows
                try:
                    parent(model, inputs, num_items)
                finally:
                    self._rows = None
        else:
            for slot, part in split_rows(inputs, slot_rows):
                # Losses that are not normalised by a count of items are averaged over the client's own micro-batches.
                rows = ((slot, dict(slot_rows)[slot]),)
                with accumulating(self.step.batches[slot]), self._serving(rows, part, main_input_name):
                    client_loss = parent(model, part, self.step.items[slot])
                self.step.add_loss(slot, client_loss)
        return self._loss_to_log([loss for _, loss in self.step.losses[before:]])

    def _loss_to_log(self, losses: list[torch.Tensor]) -> torch.Tensor:
        """
        The Trainer takes the mean over processes, some of which may have fewer clients in this step. A client whose
        loss is not finite is about to be left out, and must not hide those of the others.
        """
        stacked = torch.stack(losses)
        finite = torch.isfinite(stacked)
        mine = len(self.step.batches)
        counted = (mine - (~finite).sum()).clamp(min=1)
        mean = torch.where(finite, stacked, 0).sum() / counted
        return mean * mine * self.world_size / (self.clients_in_step() if self.clients_in_step else mine)

    @contextlib.contextmanager
    def _serving(self, slot_rows: SlotRows, inputs: Mapping[str, Any], main_input_name: str) -> Iterator[None]:
        if self.noise is not None:
            self.noise.set_rows(slot_rows, inputs)
        main_input = inputs.get(main_input_name)
        length = main_input.shape[1] if isinstance(main_input, torch.Tensor) and main_input.dim() > 1 else None
        with self.slots.rows(slot_rows, sequence_length=length):
            yield

    def loss(self, parent: Callable, score: Callable, model, inputs, return_outputs: bool, num_items):
        """
        The sum of the clients' losses, from one forward pass.

        The Trainer computes each client's loss from that client's rows of the outputs, so its loss types and metrics
        apply as they are.

        Args:
            parent (`Callable`):
                The Trainer's `compute_loss`.
            score (`Callable`):
                Runs the model on all rows, and returns what `compute_loss` reads, row by row.
        """
        if self._rows is None:
            return parent(model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items)
        outputs = score(model, inputs)
        total = None
        parts = zip(split_rows(inputs, self._rows), split_rows(outputs, self._rows), strict=True)
        for (slot, client_inputs), (_, client_outputs) in parts:
            replay = _Replay(type(outputs)(**client_outputs))
            loss = parent(replay, client_inputs, num_items_in_batch=self.step.items[slot])
            self.step.add_loss(slot, loss)
            total = loss if total is None else total + loss
        return (total, outputs) if return_outputs else total

    # A client's gradient must not depend on who trains beside it, so each slot is clipped by its own norm.
    def clip(self, parent: Callable[[], torch.Tensor], unscale: Callable[[], None], max_norm: float) -> torch.Tensor:
        """Clips each client's gradients and returns the mean of their norms, as far as they are finite."""
        unscale()
        norms = []
        for slot in self.slots.parameters:
            trained = [p for p in slot.values() if p.grad is not None]
            if trained:
                norms.append(nn.utils.clip_grad_norm_(trained, max_norm))
        # No client has a gradient if none of the step's rows could be read.
        if not norms:
            return torch.zeros((), device=next(iter(self.slots.parameters[0].values())).device)
        finite = torch.isfinite(torch.stack(norms))
        return torch.where(finite, torch.stack(norms), 0).sum() / finite.sum().clamp(min=1)


class _Replay:
    """Stands in for the model where its outputs are already known."""

    def __init__(self, outputs):
        self.outputs = outputs

    def __call__(self, *args, **kwargs):
        return self.outputs


@contextlib.contextmanager
def explaining_memory(num_clients: int, batch_size: int) -> Iterator[None]:
    """Within this context, running out of memory is an error that says what to lower."""
    try:
        yield
    except RuntimeError as error:
        # On the CPU the allocator raises a plain `RuntimeError`.
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        raise torch.OutOfMemoryError(
            f"Out of memory in a step of {num_clients} clients side by side with up to {batch_size} rows each. Lower "
            "`parallel_clients` first, which changes speed and not results; then `per_device_train_batch_size` (with "
            f"`gradient_accumulation_steps` raised to match) or `max_length`. ({error})"
        ) from error
