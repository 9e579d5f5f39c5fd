"""Which factor an adapter's tensor is, A or B, by adapter kind."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

# `A` and `B` are the two low-rank factors. A `head` is a module trained in full; a `constant` never trains or travels.
Factor = Literal["A", "B", "head", "constant"]


@dataclass(frozen=True)
class AdapterKind:
    """
    The factors of one kind of adapter.

    Args:
        name (`str`):
            Identifier written to `federation.json`.
        peft_type (`str`):
            The PEFT type the row applies to, e.g. `"LORA"`.
        a (`tuple[str, ...]`):
            Last component of the keys of tensors that are factor A.
        b (`tuple[str, ...]`):
            Last component of the keys of tensors that are factor B, each in the place of its A, and then of what
            belongs to B besides.
        constants (`tuple[str, ...]`, *optional*, defaults to `()`):
            Last component of the keys of constants that PEFT may save but that never train and never travel.
        flag (`str`, *optional*):
            Config field that must be set for the row to apply. `None` means the row is the type's default.
    """

    name: str
    peft_type: str
    a: tuple[str, ...]
    b: tuple[str, ...]
    constants: tuple[str, ...] = ()
    flag: str | None = None


_LORA_A = ("lora_A", "lora_embedding_A")
_LORA_B = ("lora_B", "lora_embedding_B")

# The first row that fits a config is its kind, so a row with a flag stands before the default of its type.
ADAPTERS: tuple[AdapterKind, ...] = (
    AdapterKind("dora", "LORA", _LORA_A, (*_LORA_B, "lora_magnitude_vector"), flag="use_dora"),
    AdapterKind("rslora", "LORA", _LORA_A, _LORA_B, flag="use_rslora"),
    AdapterKind("lora", "LORA", _LORA_A, _LORA_B),
    AdapterKind("vera", "VERA", ("vera_lambda_d",), ("vera_lambda_b",), constants=("vera_A", "vera_B")),
)


def kind_named(name: str) -> AdapterKind:
    """The row of this name. Raises `StopIteration` if there is none: names from elsewhere are checked where read."""
    return next(row for row in ADAPTERS if row.name == name)


def factor_of(key: str, kind: AdapterKind, modules_to_save: Iterable[str] | None = None) -> Factor:
    """
    Says which factor the tensor saved under `key` is.

    Args:
        key (`str`):
            Key as PEFT saves it, i.e. without the adapter's name.
        kind ([`AdapterKind`]):
            The adapter's row.
        modules_to_save (`Iterable[str]`, *optional*):
            The PEFT config's `modules_to_save`: modules trained in full, such as a classification head.

    Raises:
        `ValueError`: the key is none of the kind's. A guess could send a client's own tensor to the server.
    """
    name = last_component(key)
    if name in kind.a:
        return "A"
    if name in kind.b:
        return "B"
    if name in kind.constants:
        return "constant"
    if any(f".{module}." in f".{key}." for module in modules_to_save or ()):
        return "head"
    raise ValueError(
        f"The adapter tensor `{key}` is no factor of the adapter kind `{kind.name}` (A: {', '.join(kind.a)}; B: "
        f"{', '.join(kind.b)}; modules_to_save: {', '.join(modules_to_save or ()) or 'none'}). Add its last component "
        "to a row of `hf_fedsa.adapters.ADAPTERS`."
    )


def last_component(key: str) -> str:
    """The part of a key that says what the tensor is, such as `lora_A`."""
    parts = key.split(".")
    return parts[-2] if parts[-1] in ("weight", "bias") and len(parts) > 1 else parts[-1]
