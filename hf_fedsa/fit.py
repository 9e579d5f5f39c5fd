"""Whether one federation fits another: the first thing that the two say differently."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def shapes_of(tensors: "Mapping[str, torch.Tensor]") -> dict[str, list[int]]:
    """Shapes of tensors by name, as messages show them."""
    return {key: list(tensor.shape) for key, tensor in tensors.items()}


def first_difference(
    expected: Mapping[str, Any], found: Mapping[str, Any], names: Iterable[str] | None = None
) -> tuple[str, Any, Any] | None:
    """
    Compares two descriptions, such as shapes of tensors by name or the entries of a config.

    Args:
        expected (`Mapping[str, Any]`):
            What is needed.
        found (`Mapping[str, Any]`):
            What there is.
        names (`Iterable[str]`, *optional*):
            Names to compare, in this order. `None` means all of both, sorted.

    Returns:
        `tuple[str, Any, Any]`: the first name under which they differ, and what `expected` and `found` have there.
        One that lacks the name has `None`, and so is equal to one that says `None`. If nothing differs, `None`.
    """
    for name in sorted(expected.keys() | found.keys()) if names is None else names:
        if expected.get(name) != found.get(name):
            return name, expected.get(name), found.get(name)
    return None


def misfit(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> str | None:
    """What is wrong with an adapter of the shapes `found` where `expected` are needed, for a message."""
    missing, excess = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    difference = first_difference(expected, found, names=[*missing, *excess, *expected])
    if difference is None:
        return None
    name, needed, held = difference
    if held is None:
        return f"lacks {name!r}"
    if needed is None:
        return f"holds {name!r}, which the base model has no place for"
    return f"holds {name!r} with the shape {held}, where {needed} is needed"
