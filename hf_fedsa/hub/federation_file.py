"""`federation.json` and `rounds.jsonl`, which may come from anyone: checked so that all else can rely on them."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ..adapters import ADAPTERS
from ..files import validate_client_ids
from ..methods import is_method_name
from .card import TASKS
from .processing_files import may_be_processing_file

Check = tuple[Callable[[Any], bool], str]

# JSON


def read_json(path: Path, name: str) -> Any:
    """
    Reads JSON.

    Args:
        path (`Path`):
            The file.
        name (`str`):
            What to call it in messages.

    Raises:
        `ValueError`: it is none, or is nested deeper than any of ours.
    """
    return _parse(path.read_bytes(), name)


def read_object(path: Path, name: str) -> dict[str, Any]:
    """[`read_json`] of an object."""
    value = read_json(path, name)
    if not isinstance(value, dict):
        raise ValueError(f"{name} is damaged: it holds {brief(value)} where an object of JSON is expected.")
    return value


_DEEPEST = 20


def _parse(content: bytes, name: str) -> Any:
    try:
        value = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is damaged ({error}). Save or publish the federation again.") from error
    level = [value]
    for _ in range(_DEEPEST):
        containers = (item.values() if isinstance(item, dict) else item for item in level if not _is_plain(item))
        level = [child for items in containers for child in items]
    if level:
        raise ValueError(f"{name} is damaged: it is nested more than {_DEEPEST} levels deep.")
    return value


def _is_plain(value: Any) -> bool:
    return not isinstance(value, (dict, list))


def brief(value: Any) -> str:
    """A value as messages show it."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


# Kinds of values


def is_number(value: Any) -> bool:
    # Far below the largest float, so that sums and means of them are numbers too. JSON as Python reads it has NaN.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300


def is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def is_text(value: Any) -> bool:
    """A string that can stand in a line and in a file."""
    return isinstance(value, str) and not set(value) & set("\0\r\n") and _can_be_encoded(value)


def _can_be_encoded(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_count(value: Any) -> bool:
    return is_whole(value) and value >= 0


def _is_hash(value: Any) -> bool:
    return isinstance(value, str) and len(value) == 64 and not set(value) - set("0123456789abcdef")


def _list_of(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(check, value))


def _dict_of(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(map(is_text, value)) and all(map(check, value.values()))


def _or_none(check: Check) -> Check:
    return lambda value: value is None or check[0](value), f"{check[1]}, or null,"


def _is_name_of_dtype(value: Any) -> bool:
    found = getattr(torch, value, None) if isinstance(value, str) else None
    return isinstance(found, torch.dtype) and found.is_floating_point


def _is_number_or_none(value: Any) -> bool:
    return value is None or is_number(value)


def _is_anything(value: Any) -> bool:
    return True


_TEXT = (is_text, "a line of text")
_TEXTS = (_list_of(is_text), "a list of strings")
_FLAG = (lambda value: isinstance(value, bool), "true or false")
_COUNT = (_is_count, "a whole number from 0 on")
_HASH = (_is_hash, "a SHA-256 of 64 hexadecimal digits")
_OBJECT = (_dict_of(_is_anything), "an object")
_NUMBERS = (_dict_of(is_number), "an object of finite numbers")
_NUMBERS_OR_NONE = (_dict_of(_is_number_or_none), "an object of finite numbers or nulls")
_WORDS = (lambda value: is_text(value) or _TEXTS[0](value), "a string or a list of strings")

_KINDS = [row.name for row in ADAPTERS]

# Every field that is read, and those that other versions may lack.
_FEDERATION: dict[str, Check] = {
    "adapter": _OBJECT,
    "adapter_kind": (lambda value: value in _KINDS, f"one of {', '.join(_KINDS)}"),
    "arguments": _OBJECT,
    "base_dtype": (_is_name_of_dtype, "the name of a floating-point dtype of torch"),
    "base_model": _or_none(_TEXT),
    "base_revision": _or_none(_TEXT),
    "card": _OBJECT,
    "client_repositories": _FLAG,
    "clients": _OBJECT,
    "frozen_sha256": _or_none(_HASH),
    "hub_base_model": _or_none(_TEXT),
    "initial_shared_sha256": _HASH,
    "local_tensors": _TEXTS,
    "method": (is_method_name, "the name of a method"),
    "mutates_base": _FLAG,
    "num_clients": _COUNT,
    "origin": _or_none(_OBJECT),
    "processing_files": _TEXTS,
    "quantization_config": _or_none(_OBJECT),
    "results": (_dict_of(_NUMBERS[0]), "an object of objects of finite numbers"),
    "results_after_round": _COUNT,
    "returned_rounds": _COUNT,
    "root_adapter": _or_none(_TEXT),
    "rounds_done": _COUNT,
    "share_modules_to_save": _FLAG,
    "shared_sha256": _HASH,
    "shared_tensors": _TEXTS,
    "task_type": (lambda value: _is_plain(value) and value in TASKS, f"one of {', '.join(map(str, TASKS))}"),
    "versions": (_dict_of(is_text), "an object of strings"),
}
_CLIENT: dict[str, Check] = {
    "joined": _FLAG,
    "last_round": _or_none(_COUNT),
    "num_examples": _COUNT,
    "path": _or_none(_TEXT),
    "results": _NUMBERS_OR_NONE,
    "sha256": _or_none(_HASH),
}
_CLIENT_OPTIONAL: dict[str, Check] = {"repository": _TEXT}
_ORIGIN: dict[str, Check] = {"rounds_done": _COUNT, "shared_sha256": _HASH}
_ORIGIN_OPTIONAL: dict[str, Check] = {"clients": _TEXTS}
_CARD_OPTIONAL: dict[str, Check] = {
    "model_name": _TEXT,
    "dataset_name": _WORDS,
    "language": _WORDS,
    "license": _TEXT,
    "tags": _TEXTS,
}
_ADAPTER_OPTIONAL: dict[str, Check] = {
    "target_modules": _or_none(_WORDS),
    "modules_to_save": _or_none(_TEXTS),
}
_SUMMARY: dict[str, Check] = {
    "clients": _COUNT,
    "mean": (is_number, "a finite number"),
    "std": (is_number, "a finite number"),
}
_ROUND: dict[str, Check] = {
    "bytes_down": _COUNT,
    "bytes_up": _COUNT,
    "clients": _TEXTS,
    "losses": (_dict_of(lambda value: isinstance(value, float) or is_number(value)), "an object of numbers"),
    "round": _COUNT,
    "shared_sha256": _HASH,
}
_ROUND_OPTIONAL: dict[str, Check] = {
    "left_out": (_dict_of(is_text), "an object of strings"),
    "num_clients": _COUNT,
    "results": (_dict_of(_NUMBERS_OR_NONE[0]), "an object of objects of finite numbers or nulls"),
    "staleness": (_dict_of(lambda value: value is None or _is_count(value)), "an object of whole numbers or nulls"),
    "weights": _NUMBERS,
}


def _check(value: Mapping[str, Any], name: str, fields: Mapping[str, Check], optional: Mapping[str, Check]) -> None:
    for field, (fits, expected) in {**fields, **optional}.items():
        if field not in value:
            if field in fields:
                raise ValueError(f"{name} has no `{field}`, so it was not written by this version of hf_fedsa.")
        elif not fits(value[field]):
            raise ValueError(f"{name} is damaged: `{field}` is {brief(value[field])}, and {expected} is expected.")


# Files


def read_federation_file(path: Path, name: str) -> dict[str, Any]:
    """
    Reads a `federation.json`.

    Args:
        path (`Path`):
            The file.
        name (`str`):
            What to call it in messages.

    Raises:
        `ValueError`: it is damaged or of another version. The message names the field.
    """
    federation = read_json(path, name)
    if isinstance(federation, dict) and "adapter_kind" not in federation and federation.get("method") in _KINDS:
        # Version 0.1.0 knew one method, and called the adapter's kind by that name.
        federation |= {"adapter_kind": federation["method"], "method": "fedsa"}
    _check(federation if isinstance(federation, dict) else {}, name, _FEDERATION, {})
    _check(federation["card"], f"`card` of {name}", {}, _CARD_OPTIONAL)
    _check(federation["adapter"], f"`adapter` of {name}", {}, _ADAPTER_OPTIONAL)
    if federation["origin"] is not None:
        _check(federation["origin"], f"`origin` of {name}", _ORIGIN, _ORIGIN_OPTIONAL)
    for metric, summary in federation["results"].items():
        _check(summary, f"`results[{metric!r}]` of {name}", _SUMMARY, {})
    for file in federation["processing_files"]:
        if not may_be_processing_file(file):
            raise ValueError(f"{name} is damaged: {file!r} is no file of a tokenizer or processor.")
    validate_client_ids(federation["clients"])
    for client_id, entry in federation["clients"].items():
        _check_client(client_id, entry, name)
    if federation["root_adapter"] not in (None, *federation["clients"]):
        raise ValueError(f"{name} is damaged: `root_adapter` is {federation['root_adapter']!r}, which is no client.")
    return federation


def _check_client(client_id: str, entry: Any, name: str) -> None:
    if not isinstance(entry, dict):
        raise ValueError(f"{name} is damaged: the client {client_id!r} is {brief(entry)}, and an object is expected.")
    path = entry.get("path")
    if path not in (None, "", f"clients/{client_id}"):
        raise ValueError(f"{name} is damaged: the adapter of {client_id!r} is said to be in {brief(path)}.")
    if path is not None and not isinstance(entry.get("sha256"), str):
        raise ValueError(f"{name} is damaged: the adapter of {client_id!r} has no hash.")
    _check(entry, f"The client {client_id!r} of {name}", _CLIENT, _CLIENT_OPTIONAL)


def read_rounds(path: Path) -> list[dict[str, Any]]:
    """Reads a `rounds.jsonl`, which need not exist. Raises `ValueError` if it is damaged."""
    if not path.is_file():
        return []
    rounds = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        name = f"Line {number} of {path}"
        entry = _parse(line, name)
        if not isinstance(entry, dict):
            raise ValueError(f"{name} is damaged: it holds {brief(entry)} where an object of JSON is expected.")
        _check(entry, name, _ROUND, _ROUND_OPTIONAL)
        if set(entry["losses"]) != set(entry["clients"]):
            raise ValueError(f"{name} is damaged: its `losses` are not those of its `clients`.")
        rounds.append(entry)
    return rounds
