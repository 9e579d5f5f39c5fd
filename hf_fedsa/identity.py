"""What makes a run the run it is: everything that its results depend on, as JSON."""

import dataclasses
import hashlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from enum import Enum
from typing import Any

import numpy as np
import pyarrow
import pyarrow.compute
import torch
from datasets import Dataset
from peft import PeftConfig
from transformers import PreTrainedModel, TrainingArguments

from .client.local_optimizer import SCHEDULES_BY_METRIC

# Arguments that no result depends on, beyond the rounding of floating-point numbers. All others count, those that a
# later version of TRL adds included: naming a change that is none is a nuisance, missing one is a wrong result.
_WITHOUT_EFFECT = frozenset(
    (
        # Names, places and what resuming itself is told
        *("output_dir", "run_name", "project", "client_store_dir", "client_column", "local_rank"),
        *("resume_from_checkpoint", "resume_with_changes", "restore_callback_states_from_checkpoint"),
        "ignore_data_skip",
        # The run's length, which may be raised: the schedule is that of the new length from there on
        *("num_rounds", "num_train_epochs", "max_steps"),
        # Logs and checkpoints
        *("report_to", "disable_tqdm", "debug", "skip_memory_metrics", "include_num_input_tokens_seen"),
        *("enable_jit_checkpoint", "load_best_model_at_end", "push_to_hub"),
        # Evaluation
        *("do_train", "do_eval", "do_predict", "per_device_eval_batch_size", "prediction_loss_only"),
        *("include_for_metrics", "batch_eval_metrics", "bf16_full_eval", "fp16_full_eval"),
        *("metric_for_best_model", "greater_is_better"),
        # Where and how fast it is computed
        *("parallel_clients", "use_cpu", "full_determinism", "auto_find_batch_size", "torch_empty_cache_steps"),
        *("gradient_checkpointing", "gradient_checkpointing_kwargs", "activation_checkpointing", "use_cache"),
        *("activation_checkpointing_kwargs", "activation_offloading", "pad_to_multiple_of"),
        *("torch_compile", "torch_compile_backend", "torch_compile_mode", "use_liger_kernel", "liger_kernel_config"),
        *("fsdp", "fsdp_config", "deepspeed", "parallelism_config", "dataset_num_proc"),
        *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers"),
        *("dataloader_prefetch_factor", "dataloader_multiprocessing_context"),
        # Told by the rows, by the loaded model, or by name
        *("chat_template_path", "model_init_kwargs", "trust_remote_code", "method"),
    )
)
_PREFIXES_WITHOUT_EFFECT = ("eval_", "logging_", "log_", "save_", "hub_", "trackio_", "ddp_")
# Schedules of `SCHEDULES_BY_METRIC` follow what evaluations find.
_EVALUATION = ("eval_strategy", "eval_steps", "eval_delay", "metric_for_best_model", "greater_is_better")

# Entries of an adapter's config that say where it comes from, or nothing about training.
_ADAPTER_WITHOUT_EFFECT = ("base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping")

# What no run can go on with, and why.
FIXED = {
    "method": "what one method shares is not what another does",
    "adapter_kind": "the tensors of one kind are not those of another",
    "client_ids": "every client's B belongs to that client",
    "r": "the tensors have the shapes of their rank",
    "tensors": "the tensors have the shapes of their layers",
    "target_modules": "the tensors are those of their layers",
    "modules_to_save": "the tensors are those of their layers",
    "share_modules_to_save": "other tensors would be averaged",
    "origin": "the run starts from other tensors",
    "trains_shared": "a run that trains A is not one that does not",
}
# What may differ beside arguments and entries of the adapter's config, by the name under which a change is meant.
_OTHERS = {
    "base_model": "base_model",
    "base": "base_model",
    "num_rows": "train_dataset",
    "rows": "train_dataset",
    "num_processes": "num_processes",
    "optimizer": "optimizer_cls_and_kwargs",
}


def describe_arguments(args: TrainingArguments) -> dict[str, Any]:
    """The arguments that count, by name."""
    watched = _EVALUATION if args.lr_scheduler_type in SCHEDULES_BY_METRIC else ()
    return {
        field.name: plain(getattr(args, field.name))
        for field in dataclasses.fields(args)
        if field.name in watched
        or not (field.name in _WITHOUT_EFFECT or field.name.startswith(_PREFIXES_WITHOUT_EFFECT))
    }


def describe_adapter(config: PeftConfig) -> dict[str, Any]:
    """The entries of an adapter's config that count, by name."""
    return {name: plain(value) for name, value in config.to_dict().items() if name not in _ADAPTER_WITHOUT_EFFECT}


def describe_base(model: PreTrainedModel, revision: str | None, sample: bool = True) -> dict[str, Any]:
    """
    What is known of the base model's weights beside its name. `sample` looks at them, which is of no use where the
    adapter's initialisation has changed them.
    """
    quantization = getattr(model.config, "quantization_config", None) or {}
    entries = quantization if isinstance(quantization, Mapping) else quantization.to_dict()
    names = ("quant_method", "load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type")
    kept = {name: plain(entries[name]) for name in names if name in entries}
    weights = _sample_sha256(model) if sample else None
    return {"dtype": str(model.dtype), "revision": revision, "weights": weights, **kept}


def _sample_sha256(model: PreTrainedModel) -> str:
    """SHA-256 over a few numbers of every weight that is neither quantized nor an adapter's. It takes milliseconds."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if parameter.is_floating_point() and not any(part in name for part in _OF_ADAPTERS):
            flat = parameter.detach().flatten()
            sample = flat[:: max(1, flat.numel() // _SAMPLED)][:_SAMPLED].cpu().contiguous()
            digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


_SAMPLED = 64
# The original of a head that is trained in full may be random.
_OF_ADAPTERS = (".lora_", ".vera_", "modules_to_save", "original_module")


def plain(value: Any) -> Any:
    """A value as JSON has it, the same in every process: objects by the name of their class, not by their address."""
    if isinstance(value, Enum):
        return value.value
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {str(name): plain(entry) for name, entry in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, value))
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, torch.dtype):
        return str(value)
    named = value if isinstance(value, type) or inspect.isroutine(value) else type(value)
    return f"{named.__module__}.{named.__qualname__}"


# Rows


def row_fingerprints(dataset: Dataset, rows_of: Mapping[str, Sequence[int]]) -> dict[str, str]:
    """
    A hash of every client's rows, in their order: the same in every process, whatever the cache says and wherever in
    the dataset the client's rows are.

    Args:
        dataset ([`~datasets.Dataset`]):
            All rows, with the columns that are trained on.
        rows_of (`Mapping[str, Sequence[int]]`):
            Per client, the numbers of its rows.
    """
    client_ids = list(rows_of)
    owner = np.full(len(dataset), -1)
    for i, rows in enumerate(rows_of.values()):
        owner[list(rows)] = i
    digests: dict[tuple[int, str], Any] = {}
    start = 0
    # A part of the rows at a time, since those of a selection are copied.
    for part in dataset.with_format("arrow").iter(10_000):
        owners = owner[start : start + len(part)]
        start += len(part)
        order = np.argsort(owners, kind="stable")
        clients, firsts = np.unique(owners[order], return_index=True)
        bounds = list(zip(clients, firsts, [*firsts[1:], len(part)], strict=True))
        for name in part.column_names:
            for kind, bytes_of in _contents(part[name].combine_chunks().take(pyarrow.array(order))):
                for client, first, last in bounds:
                    digest = digests.setdefault((client, f"{name}|{kind}"), hashlib.sha256())
                    digest.update(bytes_of(first, last))
    of_client: dict[int, list[str]] = {i: [] for i in range(len(client_ids))}
    for (client, name), digest in sorted(digests.items(), key=lambda item: item[0]):
        if client >= 0:
            of_client[client].append(f"{name}={digest.hexdigest()}")
    return {
        client_id: hashlib.sha256("\n".join(of_client[i]).encode()).hexdigest()
        for i, client_id in enumerate(client_ids)
    }


def _contents(column: pyarrow.Array) -> Iterator[tuple[str, Callable[[int, int], bytes]]]:
    """What the rows from one to another hold, as bytes: numbers, lists of numbers, or anything else."""
    is_list = pyarrow.types.is_list(column.type) or pyarrow.types.is_large_list(column.type)
    values = column.flatten() if is_list else column
    numbers = None if column.null_count or values.null_count else _numbers(values)
    if numbers is None:
        yield "rows", lambda first, last: "".join(f"{row!r}\n" for row in column[first:last].to_pylist()).encode()
    elif is_list:
        lengths = pyarrow.compute.list_value_length(column).to_numpy().astype(np.int64)
        ends = np.concatenate([[0], np.cumsum(lengths)])
        yield "lengths", lambda first, last: lengths[first:last].tobytes()
        yield "values", lambda first, last: numbers[ends[first] : ends[last]].tobytes()
    else:
        yield "values", lambda first, last: numbers[first:last].tobytes()


def _numbers(values: pyarrow.Array) -> np.ndarray | None:
    """Numbers in one width, since 32 bits or 64 make no difference to a row."""
    if pyarrow.types.is_boolean(values.type) or pyarrow.types.is_integer(values.type):
        if values.type != pyarrow.uint64():
            return values.cast(pyarrow.int64()).to_numpy()
    elif pyarrow.types.is_float32(values.type) or pyarrow.types.is_float64(values.type):
        return values.cast(pyarrow.float64()).to_numpy()
    return None


# Differences


@dataclasses.dataclass(frozen=True)
class Change:
    """
    One difference between a run that was saved and the one that would go on with it.

    Args:
        name (`str`):
            What the user says to mean it.
        shown (`str`):
            Where exactly it is.
        before (`Any`), now (`Any`):
            Both values.
    """

    name: str
    shown: str
    before: Any
    now: Any


def find_changes(saved: Mapping[str, Any], current: Mapping[str, Any], defaults: Mapping[str, Any]) -> list[Change]:
    """
    Compares two identities, but for what is [`FIXED`].

    What the saved one lacks, since it is of an older version, is compared to the default, as far as it is known.
    """
    changes = []
    for key in current.keys() - FIXED.keys() - {"arguments", "adapter"}:
        before, now = saved.get(key), current[key]
        if before != now:
            changes.append(Change(_OTHERS[key], *_first_difference(key, before, now)))
    for group in ("arguments", "adapter"):
        before, now = {**defaults, **saved.get(group, {})}, current[group]
        for name in now.keys() - FIXED.keys():
            if before.get(name) != now[name]:
                changes.append(Change(name, name, before.get(name), now[name]))
    return sorted(changes, key=lambda change: (change.name, change.shown))


def _first_difference(key: str, before: Any, now: Any) -> tuple[str, Any, Any]:
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        entry = next(name for name in [*before, *now] if before.get(name) != now.get(name))
        return f"{key}.{entry}", before.get(entry), now.get(entry)
    return key, before, now


def defaults_of(*configs: Any) -> dict[str, Any]:
    """Defaults of dataclasses' fields."""
    return {
        field.name: plain(field.default_factory() if field.default is dataclasses.MISSING else field.default)
        for config in configs
        for field in dataclasses.fields(config)
        if field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
    }


def check_names_of_changes(names: Iterable[str], known: Iterable[str] | None = None) -> None:
    """
    Checks what the user means to change.

    Raises:
        `ValueError`: a change cannot be made, or `known` has no such name.
    """
    for name in names:
        if name in FIXED:
            raise ValueError(
                f"`resume_with_changes` names {name!r}, which cannot change: {FIXED[name]}. Start a new run in "
                "another `output_dir`; `FederatedTrainer.from_shared` starts one from the shared A of this."
            )
        if known is not None and name not in {*known, *_OTHERS.values()}:
            raise ValueError(
                f"`resume_with_changes` names {name!r}, which is no argument, no entry of the adapter's config, and "
                f"none of {', '.join(sorted(set(_OTHERS.values())))}."
            )


def describe_run(
    *,
    args: TrainingArguments,
    rows_of: Mapping[str, Sequence[int]],
    config: PeftConfig,
    method: str,
    kind: str,
    parameters: Mapping[str, torch.Tensor],
    origin: str | None,
    trains_shared: bool,
    base_model: str,
    base: Mapping[str, Any],
    row_fingerprints: Mapping[str, str],
    optimizer: Any,
) -> dict[str, Any]:
    """
    All that the results of a run depend on.

    Args:
        args (`TrainingArguments`):
            Its arguments.
        rows_of (`Mapping[str, Sequence[int]]`), row_fingerprints (`Mapping[str, str]`):
            Every client's rows, and their hashes.
        method (`str`):
            The method's name.
        config (`PeftConfig`), kind (`str`), parameters (`Mapping[str, torch.Tensor]`):
            The adapter, its kind, and its tensors.
        origin (`str`, *optional*), trains_shared (`bool`):
            Hash of the shared tensors that a newcomer starts from, and whether they train.
        base_model (`str`), base (`Mapping[str, Any]`):
            Name and description of the base model.
        optimizer (`Any`):
            `optimizer_cls_and_kwargs`.
    """
    client_ids = sorted(rows_of)
    return {
        "method": method,
        "adapter_kind": kind,
        "client_ids": client_ids,
        "r": config.r,
        "tensors": {key: list(p.shape) for key, p in parameters.items()},
        "share_modules_to_save": args.share_modules_to_save,
        "origin": origin,
        "trains_shared": trains_shared,
        "base_model": base_model,
        "base": base,
        "num_rows": {client_id: len(rows_of[client_id]) for client_id in client_ids},
        "rows": row_fingerprints,
        "optimizer": plain(optimizer),
        "adapter": describe_adapter(config),
        "arguments": describe_arguments(args),
    }
