"""Who holds a factor, and whose turn it is: the table of methods."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

Share = Literal["shared", "local"]

FACTORS = ("A", "B")


def is_method_name(name: object) -> bool:
    """Whether a method may have this name."""
    return isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name) is not None


@dataclass(frozen=True)
class Method:
    """
    A federated method, as data.

    Args:
        name (`str`):
            What users call it.
        shared (`tuple[str, ...]`):
            Factors that the server holds and averages. Every round starts from them.
        local (`tuple[str, ...]`, *optional*, defaults to `()`):
            Factors that a client keeps. They never leave it.
        turns (`tuple[tuple[str, ...], ...]`, *optional*, defaults to `()`):
            Factors that train in round 0, 1, ..., from the start again after the last. Empty means all, always.
        title (`str`, *optional*):
            What the model card calls it. `None` means its name.
        reference (`str`, *optional*):
            Address of the paper, for the model card.

    Modules trained in full (`modules_to_save`) are no factor: they train in every round of every method, and
    `share_modules_to_save` says whether they are averaged.

    Raises:
        `ValueError`: a factor is unknown, is held twice or by nobody, or has a turn that it cannot have.
    """

    name: str
    shared: tuple[str, ...]
    local: tuple[str, ...] = ()
    turns: tuple[tuple[str, ...], ...] = ()
    title: str | None = None
    reference: str | None = None

    def __post_init__(self):
        if not is_method_name(self.name):
            raise ValueError(f"The name of a method must be made of letters, digits, '_' and '-', got {self.name!r}.")
        for field in ("shared", "local", "turns"):
            if not isinstance(getattr(self, field), tuple):
                raise ValueError(
                    f"`{field}` of the method {self.name!r} must be a tuple, got {getattr(self, field)!r}."
                )
        held = (*self.shared, *self.local)
        if sorted(held) != sorted(FACTORS):
            raise ValueError(
                f"The method {self.name!r} has `shared={self.shared}` and `local={self.local}`. Each of the factors "
                f"{_list(FACTORS)} must be in one of them, once."
            )
        if not all(isinstance(turn, tuple) and turn and set(turn) <= set(held) for turn in self.turns):
            raise ValueError(
                f"The method {self.name!r} has `turns={self.turns}`. Each must be a tuple of at least one of the "
                f"factors {_list(FACTORS)}."
            )

    def trained(self, round_index: int) -> tuple[str, ...]:
        """The factors that train in a round."""
        return self.turns[round_index % len(self.turns)] if self.turns else FACTORS


_ROWS = (
    Method("fedsa", shared=("A",), local=("B",), title="FedSA-LoRA", reference="https://arxiv.org/abs/2410.01463"),
    Method("fedavg", shared=("A", "B"), title="FedAvg (FedIT)", reference="https://arxiv.org/abs/2305.05644"),
    # A is the random start that all clients have in common.
    Method("ffa", shared=("A", "B"), turns=(("B",),), title="FFA-LoRA", reference="https://arxiv.org/abs/2403.12313"),
    Method("share_b", shared=("B",), local=("A",), title="shared-B LoRA"),
    # B comes first: it is zero at the start, and A has no gradient then.
    Method(
        "rolora",
        shared=("A", "B"),
        turns=(("B",), ("A",)),
        title="RoLoRA",
        reference="https://arxiv.org/abs/2409.02346",
    ),
    Method("local", shared=(), local=("A", "B"), title="LoRA of each client alone"),
)
METHODS: dict[str, Method] = {row.name: row for row in _ROWS}


def register_method(method: Method) -> None:
    """
    Makes a method known under its name, so that `FederatedConfig(method=...)` takes it.

    It must be registered in every process that trains, resumes or joins a federation of it. To load a client's model,
    nothing of it need be known.

    Example:

    ```python
    >>> register_method(Method("fedsa_b_first", shared=("A",), local=("B",), turns=(("B",), ("A", "B"))))
    ```

    Raises:
        `TypeError`: it is no [`Method`].
        `ValueError`: there is another one of this name.
    """
    if not isinstance(method, Method):
        raise TypeError(f"`method` must be a `Method`, got {method!r} of type {type(method).__name__}.")
    if METHODS.setdefault(method.name, method) != method:
        raise ValueError(f"There is another method named {method.name!r}. Give this one another name.")


def method_named(name: str) -> Method:
    """
    The method of a name.

    Raises:
        `ValueError`: there is none. The message names those there are.
    """
    if name not in METHODS:
        raise ValueError(
            f"`method={name!r}` is unknown. Known are {_list(METHODS)}; `hf_fedsa.register_method` adds one."
        )
    return METHODS[name]


def keeping_shared(method: Method) -> Method:
    """
    The method by which a newcomer trains that takes over what others have averaged and leaves it as it is.

    It trains what clients keep. Where they keep nothing, it is B that is its own from then on.
    """
    if method.local:
        return replace(method, turns=(method.local,))
    return replace(method, shared=("A",), local=("B",), turns=(("B",),))


class Sharing:
    """
    A method on one adapter's tensors: what is shared, what stays with the client, and what has its turn.

    Args:
        factors (`Mapping[str, str]`):
            Factor of every tensor, by its key, see [`~hf_fedsa.adapters.factor_of`]. Constants are left out.
        method ([`Method`]):
            The method.
        share_heads (`bool`, *optional*, defaults to `False`):
            Whether modules trained in full are averaged. Off, each client keeps its own.

    Attributes:
        share_of (`dict[str, str]`):
            `"shared"` or `"local"`, by key.
    """

    def __init__(self, factors: Mapping[str, str], method: Method, share_heads: bool = False):
        self.factors = {key: factor for key, factor in factors.items() if factor != "constant"}
        self.method, self.share_heads = method, share_heads
        self.share_of: dict[str, Share] = {
            key: "shared" if (share_heads if factor == "head" else factor in method.shared) else "local"
            for key, factor in self.factors.items()
        }

    def trained(self, factors: Iterable[str]) -> frozenset[str]:
        """Keys of the tensors that train in a round whose turn it is of these factors."""
        training = {*factors, "head"}
        return frozenset(key for key, factor in self.factors.items() if factor in training)

    def returned(self, factors: Iterable[str]) -> frozenset[str]:
        """Keys of the tensors that a client returns from such a round: shared, and trained."""
        return frozenset(key for key in self.trained(factors) if self.share_of[key] == "shared")

    @property
    def ever_trained(self) -> frozenset[str]:
        """Keys of the tensors that train in some round."""
        return self.trained({factor for turn in self.method.turns or (FACTORS,) for factor in turn})

    @property
    def returns_anything(self) -> bool:
        """Whether there is a round from which clients return something."""
        return any(self.share_of[key] == "shared" for key in self.ever_trained)


def _list(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))
