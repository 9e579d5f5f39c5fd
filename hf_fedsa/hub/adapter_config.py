"""An adapter's config, which may come from anyone: checked before anything is built from it."""

import copy
import dataclasses
import re
import typing
from collections.abc import Mapping
from pathlib import Path
from types import NoneType
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftConfig, VeraConfig
from peft.utils.peft_types import PeftType, TaskType

from ..adapters import ADAPTERS
from ..client.parameters import adapter_kind
from ..client.slots import mutates_base
from ..peft_config import validate_peft_config
from .federation_file import brief, is_number, is_text, is_whole, read_object
from .weights import LONGEST_NAME

# Others load further repositories or have no rule of what is shared.
_CONFIGS: dict[str, type[PeftConfig]] = {"LORA": LoraConfig, "VERA": VeraConfig}
# They name modules to import or files to read, or settings of an initialisation that is over.
_MUST_BE_DEFAULT = ("megatron_config", "arrow_config", "loftq_config", "eva_config", "corda_config", "lora_ga_config")
_SHARES = ("lora_dropout", "vera_dropout")
_MODULE = re.compile(r"[\w.\-]+")

# Config


def read_adapter_config(path: Path, kind_name: str) -> PeftConfig:
    """
    Reads an `adapter_config.json`.

    Args:
        path (`Path`):
            The file.
        kind_name (`str`):
            The federation's row of `ADAPTERS`.

    Raises:
        `ValueError`: a field is not what PEFT expects there, or asks for more than an adapter of that kind needs.
    """
    values = read_object(path, str(path))
    kind = _CONFIGS.get(values["peft_type"]) if isinstance(values.get("peft_type"), str) else None
    if kind is None:
        raise ValueError(
            f"{path}: `peft_type` is {brief(values.get('peft_type'))}, and one of {', '.join(_CONFIGS)} is expected. "
            "Adapters of other kinds have no rule of what is shared, and some load other repositories."
        )
    defaults, hints = kind().to_dict(), typing.get_type_hints(kind)
    for field in values.keys() & hints.keys():
        _check_field(field, values[field], hints[field], defaults, path)
    try:
        config = kind.from_pretrained(str(path.parent))
        validate_peft_config(config)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} cannot be used: {error}") from error
    if adapter_kind(config).name != kind_name:
        raise ValueError(
            f"{path} is the config of an adapter of the kind {adapter_kind(config).name!r}, and the federation's is "
            f"{kind_name!r}."
        )
    return config


def _check_field(field: str, value: Any, hint: Any, defaults: Mapping[str, Any], path: Path) -> None:
    expected = None
    if field in _MUST_BE_DEFAULT:
        if value not in (None, defaults.get(field), {}):
            expected = "nothing: it is of no use to load an adapter"
    elif field in ("rank_pattern", "alpha_pattern"):
        fits = _is_rank if field == "rank_pattern" else is_number
        if not (value is None or (isinstance(value, dict) and all(map(is_text, value)) and _all(fits, value))):
            expected = "an object from patterns to " + ("ranks" if field == "rank_pattern" else "numbers")
    elif field == "modules_to_save":
        # PEFT puts these names into regular expressions.
        if not (value is None or (isinstance(value, list) and all(map(_is_module, value)))):
            expected = "a list of names of modules"
    elif field == "r":
        expected = None if _is_rank(value) else "a whole number from 1 on"
    elif field == "lora_alpha":
        expected = None if is_number(value) else "a finite number"
    elif field in _SHARES:
        expected = None if is_number(value) and 0 <= value <= 1 else "a number between 0 and 1"
    elif field == "init_lora_weights":
        expected = None if isinstance(value, bool) or is_text(value) else "true, false or a name"
    elif not _fits(value, hint):
        expected = str(hint).replace("typing.", "")
    if expected is not None:
        raise ValueError(f"{path}: `{field}` is {brief(value)}, and {expected} is expected.")


def _all(fits, value: Mapping[str, Any]) -> bool:
    return all(map(fits, value.values()))


def _is_rank(value: Any) -> bool:
    return is_whole(value) and value >= 1


def _is_module(value: Any) -> bool:
    return isinstance(value, str) and _MODULE.fullmatch(value) is not None


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value of JSON is of the type that a field of a PEFT config is annotated with."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return isinstance(value, str) and value in arguments
    if origin in (list, tuple):
        return isinstance(value, list) and all(_fits(item, arguments[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(item, arguments[1]) for item in value.values())
    if arguments:
        return any(_fits(value, argument) for argument in arguments)
    if hint is int:
        return is_whole(value)
    if hint is float:
        return is_number(value)
    if hint in (str, TaskType, PeftType):
        return is_text(value)
    if dataclasses.is_dataclass(hint):
        return False
    return isinstance(value, NoneType if hint is None else hint)


# To build from


def config_to_build(config: PeftConfig, tensors: Mapping[str, torch.Tensor], place: str) -> PeftConfig:
    """
    A config for an adapter that is about to be filled with tensors.

    Nothing is initialised that is overwritten anyway, and modules are named where the config has regular expressions
    for them: PEFT would match those against every module of the base, in whatever time they take.

    Args:
        config ([`~peft.PeftConfig`]):
            The adapter's config.
        tensors (`Mapping[str, torch.Tensor]`):
            The adapter, or the shared part of it.
        place (`str`):
            What to call it in messages.

    Raises:
        `ValueError`: the config's ranks are not those of the tensors, or a pattern cannot be matched safely, or
            loading it would change the base model.
    """
    if mutates_base(config):
        raise ValueError(
            f"{place} has `init_lora_weights={config.init_lora_weights!r}`, which changes the base weights. "
            "Federations are saved without: it was tampered with, or is no client's adapter."
        )
    ranks = _ranks(config, tensors)
    if not ranks:
        raise ValueError(f"{place} holds no tensor of an adapter of `peft_type={config.peft_type.value}`.")
    built = copy.deepcopy(config)
    if isinstance(config, LoraConfig):
        if built.init_lora_weights not in (True, False, "mica"):
            built.init_lora_weights = True
        _name_modules_of_patterns(built, ranks, place)
        rank_of = {module: built.rank_pattern.get(re.escape(module), config.r) for module in ranks}
    else:
        rank_of = dict.fromkeys(ranks, config.r)
    experts = bool(getattr(config, "target_parameters", None))
    for module, (found, key) in ranks.items():
        # Where single parameters are adapted, one tensor holds the ranks of all experts.
        if found != rank_of[module] and not (experts and found and found % rank_of[module] == 0):
            raise ValueError(
                f"{place} holds {key!r} with the shape {tuple(tensors[key].shape)}, and by its config the rank is "
                f"{rank_of[module]}. One of the two is of another adapter or was tampered with."
            )
    if experts:
        _refuse_regular_expressions(built, place)
    elif _has_regular_expressions(config) or len(config.target_modules or ()) > 10 * len(ranks) + 100:
        built.target_modules = sorted(ranks)
        built.layers_to_transform = built.layers_pattern = None
        if isinstance(built, LoraConfig):
            built.exclude_modules = None
    return built


def _ranks(config: PeftConfig, tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, str]]:
    """Rank of every adapted module, by its name, as the shapes have it, and the key of the tensor that has it."""
    (names,) = {row.a for row in ADAPTERS if row.peft_type == config.peft_type.value}
    ranks = {}
    for key, tensor in tensors.items():
        module, _, name = key.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".")
        if name in names:
            ranks[module] = (tensor.shape[0] if tensor.dim() else 0, key)
    return ranks


def _has_regular_expressions(config: PeftConfig) -> bool:
    named = (config.target_modules, getattr(config, "exclude_modules", None))
    return any(isinstance(value, str) for value in named) or bool(config.layers_pattern)


def _refuse_regular_expressions(config: PeftConfig, place: str) -> None:
    if _has_regular_expressions(config):
        raise ValueError(
            f"{place} adapts single parameters (`target_parameters`) and names modules by a regular expression. Which "
            "modules those are cannot be told from the tensors. Save it with lists of names."
        )


def _name_modules_of_patterns(config: LoraConfig, modules: typing.Collection[str], place: str) -> None:
    """Replaces the patterns of ranks and alphas by the names of the modules they match."""
    for field in ("rank_pattern", "alpha_pattern"):
        given = getattr(config, field) or {}
        if len(given) > max(len(modules), 100):
            raise ValueError(f"{place} has {len(given)} patterns in `{field}` for {len(modules)} modules.")
        patterns = [(_compiled(text, field, place), value) for text, value in given.items()]
        found = {}
        for module in modules if patterns else ():
            values = [value for pattern, value in patterns if pattern.match(module)]
            if values:
                found[re.escape(module)] = values[0]
        setattr(config, field, found)


def _compiled(text: str, field: str, place: str) -> re.Pattern[str]:
    """A pattern as PEFT reads it, if its form bounds the time it can take: what multiplies it is counted."""
    repeats, alternatives = len(re.findall(r"[*+?{]", text)), text.count("|")
    repeats_a_group = re.search(r"\)[*+?{]", text)
    if len(text) > LONGEST_NAME or repeats > 3 or alternatives > 8 or repeats_a_group:
        raise ValueError(
            f"{place} has the pattern {text[:100]!r} in `{field}`, which might take forever to match: it repeats a "
            "group, or has more than 3 repetitions or 8 alternatives. Write the names of the modules out."
        )
    try:
        return re.compile(rf"(.*\.)?({text})$")
    except (re.error, OverflowError) as error:
        raise ValueError(f"{place} has {text!r} in `{field}`, which is no regular expression: {error}.") from error
