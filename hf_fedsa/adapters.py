"""Which adapter tensor is shared with the server and which stays with the client, by adapter kind."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class AdapterKind:
    """
    How one adapter's tensors are divided between server and client.

    Args:
        name (`str`):
            Identifier written to `federation.json`.
        peft_type (`str`):
            The PEFT type the row applies to, e.g. `"LORA"`.
        shared (`tuple[str, ...]`):
            Last component of the keys of tensors that are averaged between rounds.
        local (`tuple[str, ...]`):
            Last component of the keys of tensors that never leave the client.
        frozen (`tuple[str, ...]`, *optional*, defaults to `()`):
            Last component of the keys of constants that PEFT may save but that never train and never travel.
        flag (`str`, *optional*):
            Config field that must be set for the row to apply. `None` means the row is the type's default.
    """

    name: str
    peft_type: str
    shared: tuple[str, ...]
    local: tuple[str, ...]
    frozen: tuple[str, ...] = ()
    flag: str | None = None


# The first row that fits a config is its method, so a row with a flag stands before the default of its type. The split
# of A and B is that of FedSA-LoRA, https://arxiv.org/abs/2410.01463, sections 3.2 (LoRA) and 3.3 (rsLoRA, VeRA).
_LORA_SHARED = ("lora_A", "lora_embedding_A")

_LORA_LOCAL = ("lora_B", "lora_embedding_B")

ADAPTERS: tuple[AdapterKind, ...] = (
    AdapterKind("dora", "LORA", _LORA_SHARED, (*_LORA_LOCAL, "lora_magnitude_vector"), flag="use_dora"),
    AdapterKind("rslora", "LORA", _LORA_SHARED, _LORA_LOCAL, flag="use_rslora"),
    AdapterKind("lora", "LORA", _LORA_SHARED, _LORA_LOCAL),
    AdapterKind("vera", "VERA", ("vera_lambda_d",), ("vera_lambda_b",), frozen=("vera_A", "vera_B")),
)

Share = Literal["shared", "local", "frozen"]


def classify(
    key: str,
    method: AdapterKind,
    modules_to_save: Iterable[str] | None = None,
    share_modules_to_save: bool = False,
) -> Share:
    """
    Says where the tensor saved under `key` belongs.

    Args:
        key (`str`):
            Key as PEFT saves it, i.e. without the adapter's name.
        method ([`AdapterKind`]):
            The adapter's row.
        modules_to_save (`Iterable[str]`, *optional*):
            The PEFT config's `modules_to_save`: modules trained in full, such as a classification head.
        share_modules_to_save (`bool`, *optional*, defaults to `False`):
            Whether those modules are averaged. Off, each client keeps its own.

    Raises:
        `ValueError`: the key is none of the method's. A guess could send a client's own tensor to the server.
    """
    parts = key.split(".")
    name = parts[-2] if parts[-1] in ("weight", "bias") and len(parts) > 1 else parts[-1]
    if name in method.shared:
        return "shared"
    if name in method.local:
        return "local"
    if name in method.frozen:
        return "frozen"
    if any(f".{module}." in f".{key}." for module in modules_to_save or ()):
        return "shared" if share_modules_to_save else "local"
    raise ValueError(
        f"The adapter tensor `{key}` is neither shared nor local under method `{method.name}` (shared: "
        f"{', '.join(method.shared)}; local: {', '.join(method.local)}; modules_to_save: "
        f"{', '.join(modules_to_save or ()) or 'none'}). Add its last component to a row of "
        "`hf_fedsa.adapters.ADAPTERS`."
    )
