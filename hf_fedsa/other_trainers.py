"""What is known of Trainers that `FederatedMixin` may stand before: what they need, and what they would do wrong."""

import contextlib
from collections.abc import Iterator
from statistics import fmean
from typing import Any

from datasets import Dataset
from peft import PeftModel
from transformers import Trainer

from .config import FederatedConfig

# Trainer: the config it reads. Its rows pass through `_prepare_dataset`, but for those of `Seq2SeqTrainer`.
_CONFIG_OF = {
    "DPOTrainer": "DPOConfig",
    "KTOTrainer": "KTOConfig",
    "RewardTrainer": "RewardConfig",
    "Seq2SeqTrainer": "Seq2SeqTrainingArguments",
}
# Their losses look at several sequences of a row at once, or at the model without its adapter in the same step.
_ONE_CLIENT_AT_A_TIME = ("DPOTrainer", "KTOTrainer", "RewardTrainer")
# They keep generated rows over several steps.
_GENERATE_ROWS = ("DistillationTrainer", "GRPOTrainer", "RLOOTrainer")
# They keep metrics of the steps since the last line of the log, and add them to the next.
_RUNNING_METRICS = ("SFTTrainer", *_ONE_CLIENT_AT_A_TIME)


def _known_as(trainer: Trainer, names) -> str | None:
    """Which class of transformers or TRL among `names` a trainer is derived from."""
    bases = (base.__name__ for base in type(trainer).__mro__ if base.__module__.startswith(("trl.", "transformers.")))
    return next((name for name in bases if name in names), None)


def check_trainer(trainer: Trainer, args: FederatedConfig, model: Any, num_clients: int, num_slots: int) -> None:
    """
    Refuses what a Trainer would do wrong with several clients, before it loads a model.

    Raises:
        `TypeError`: `args` lacks the arguments of the Trainer.
        `ValueError`: the Trainer would mix clients, or cannot train them in this way.
    """
    if generates := _known_as(trainer, _GENERATE_ROWS):
        raise ValueError(
            f"`{generates}` generates completions for several steps at once and keeps them, so that a client would "
            "train on those of another. `FederatedMixin` goes with Trainers whose steps depend on their own rows "
            "alone, such as `SFTTrainer`, `DPOTrainer`, `RewardTrainer` and `Trainer`."
        )
    name = _known_as(trainer, _CONFIG_OF)
    if name is None:
        return
    config = _CONFIG_OF[name]
    if config not in (base.__name__ for base in type(args).__mro__):
        raise TypeError(
            f"`args` is a `{type(args).__name__}`, without the arguments of `{config}` that `{name}` reads. Derive "
            f"one config from both, its own first so that its defaults hold:\n\n    @dataclasses.dataclass\n    class "
            f"Federated{config}({config}, FederatedConfig):\n        pass\n"
        )
    if name == "KTOTrainer" and num_clients > 1 and args.loss_type != "apo_zero_unpaired":
        raise ValueError(
            f"`loss_type={args.loss_type!r}` estimates a KL term from prompts with the completions of neighbouring "
            "rows, which `KTOTrainer` pairs before rows are dealt to clients: one client's text would enter another's "
            "loss. Set `loss_type='apo_zero_unpaired'`, which needs no such pairs."
        )
    if name == "Seq2SeqTrainer" and args.predict_with_generate:
        raise ValueError(
            "`predict_with_generate=True` takes its settings from `Seq2SeqTrainer.evaluate`, which knows no clients. "
            "Leave it out, and generate within `trainer.use_client(client_id)`."
        )
    if name in ("DPOTrainer", "KTOTrainer") and isinstance(model, PeftModel):
        raise ValueError(
            f"`model` is a `PeftModel`, to which `{name}` adds a second adapter as the reference, one that the "
            "clients side by side would have in common. Pass the base model and `peft_config`: the reference is then "
            "the model without its adapter."
        )
    if name in _ONE_CLIENT_AT_A_TIME and num_slots > 1:
        raise ValueError(
            f"`{name}` cannot train {num_slots} clients side by side: its batches hold several sequences per row, or "
            "it takes the adapters off in the middle of a step. Set `parallel_clients=1`."
        )


def prepare_rows(trainer: Trainer, dataset: Dataset) -> Dataset:
    """
    Does to rows passed to `evaluate` what the Trainer's constructor does, such as tokenizing them.

    Raises:
        `ValueError`: the constructor alone can do it.
    """
    name = _known_as(trainer, _ONE_CLIENT_AT_A_TIME)
    if name is None:
        return dataset
    if getattr(trainer.args, "precompute_ref_log_probs", False):
        raise ValueError(
            "`precompute_ref_log_probs=True` computes the reference of evaluation rows in the constructor. Pass them "
            "there as `eval_dataset`, or leave it out."
        )
    return trainer._prepare_dataset(dataset, trainer.processing_class, trainer.args, "eval")


def take_running_metrics(trainer: Trainer) -> dict[str, float]:
    """
    Mean of every metric that a trainer of TRL has kept in evaluation mode, which it is then without.

    The trainer adds them to what is logged next: all clients' together, and not to what `evaluate` returns.
    """
    if _known_as(trainer, _RUNNING_METRICS) is None:
        return {}
    kept = trainer._metrics["eval"]
    # A count of what was trained on, not of what was evaluated.
    return {name: fmean(values) for name in list(kept) if name != "num_tokens" and (values := kept.pop(name))}


@contextlib.contextmanager
def running_metrics_aside(trainer: Trainer) -> Iterator[None]:
    """Within this context a line is logged without them: a round's line must not take them from the training log."""
    if _known_as(trainer, _RUNNING_METRICS) is None:
        yield
        return
    metrics = trainer._metrics["train" if trainer.model.training else "eval"]
    kept = metrics.copy()
    metrics.clear()
    yield
    metrics.update(kept)


def refuse_another_sampler(trainer: Trainer) -> None:
    if not type(trainer)._get_train_sampler.__module__.startswith(("transformers.", "trl.")):
        raise ValueError(
            f"`{type(trainer).__name__}` has a `_get_train_sampler` of its own, which would not be asked: every "
            "client's rows are drawn by themselves. Set `train_sampling_strategy` ('sequential' keeps the order of "
            "your rows), and choose the clients of a round with `client_sampler`."
        )
