"""`FederatedTrainer`: the federated algorithm over TRL's `SFTTrainer`."""

import copy
import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    TrainerCallback,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer
from trl.trainer.utils import FusedCausalLMOutput

from .chat_template import chat_template_at, load_tokenizer, refuse_new_tokens
from .client.data import EMPTY_AFTER_TRUNCATION
from .client.scoring import score_next_tokens
from .config import FederatedConfig
from .hub.folder import read_federation
from .hub.loading import load_origin
from .hub.whole_folder import FEDERATION
from .methods import method_named
from .partition import is_transformed
from .peft_config import validate_peft_config
from .server.sampling import ClientSampler
from .trainer import FederatedMixin
from .transport import Transport


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
        transport ([`~hf_fedsa.transport.Transport`], *optional*):
            Brings rounds from a server elsewhere, see [`FederatedMixin`].
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
        transport: Transport | None = None,
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
            transport=transport,
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
        origin = load_origin(source, init_local, revision=revision, subfolder=subfolder, token=token)
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
        _take_method(args, origin.federation["method"], source)
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
        trainer._federation.start_from(origin, train_shared)
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


def _take_method(args: FederatedConfig, method: str, source: Any) -> None:
    """A newcomer trains by the method of the federation that it joins."""
    if args.method not in (FederatedConfig.method, method):
        raise ValueError(
            f"`method={args.method!r}`, but {source} was trained by {method!r}, which says what of it is "
            "shared. Leave it out."
        )
    args.method = method_named(method).name


def _check_own_folder(args: FederatedConfig, train_dataset: Any) -> None:
    """A newcomer saved over the federation it comes from would take the place of its clients."""
    if not (Path(args.output_dir) / FEDERATION).is_file():
        return
    others = sorted(read_federation(Path(args.output_dir))["clients"].keys() - set(train_dataset or ()))
    if isinstance(train_dataset, Mapping) and others:
        raise ValueError(
            f"`output_dir={args.output_dir!r}` holds a federation with other clients, such as {others[0]!r}. Pass a "
            "folder of its own for the newcomer."
        )


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
            raise ValueError(EMPTY_AFTER_TRUNCATION.format(client_id=client_id, max_length=args.max_length))


def _num_prompt_tokens(tokenizer: Any, prompt: str | list[dict[str, str]], chat_template: str | None) -> int:
    if isinstance(prompt, str):
        return len(tokenizer(prompt)["input_ids"])
    tokens = tokenizer.apply_chat_template(
        prompt, chat_template=chat_template, add_generation_prompt=True, return_dict=True
    )
    return len(tokens["input_ids"])
