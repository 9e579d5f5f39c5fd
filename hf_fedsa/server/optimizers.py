"""The server's optimizer: from what clients return to what they are sent next."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from ..messages import Tensors


class ServerOptimizer(NamedTuple):
    """
    A server's optimizer as two pure functions and a state that is a value: saving the state is saving the optimizer.

    It takes the change that the clients' mean makes to the shared tensors for a negative gradient. Everything is
    computed in fp32, and no tensor that comes in is changed.

    Args:
        init (`Callable[[Tensors], Tensors]`):
            From the shared tensors to the state before the first round, fp32. Its tensors are named
            `"momentum.<key>"` and `"variance.<key>"` and have the shape of the shared tensor of that key.
        apply (`Callable[[Tensors, Tensors, Tensors], tuple[Tensors, Tensors]]`):
            From the shared tensors, the clients' mean and the state to new shared tensors and a new state. The first
            two hold the keys trained in the round, which may be some of those that the state was made for: the state
            of all others comes out as it went in. Raises a `ValueError` if the three do not fit each other.
    """

    init: Callable[[Tensors], Tensors]
    apply: Callable[[Tensors, Tensors, Tensors], tuple[Tensors, Tensors]]


# One tensor's new value and new state, by the state's part, from its value, its change and its state.
Rule = Callable[[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]], tuple[torch.Tensor, dict[str, torch.Tensor]]]


def _tensor_by_tensor(rule: Rule, initial: Mapping[str, float]) -> ServerOptimizer:
    """An optimizer that does the same to every tensor, with a state of these parts and initial values."""

    @torch.no_grad()
    def init(shared: Tensors) -> Tensors:
        return {
            f"{part}.{key}": torch.full_like(tensor, value, dtype=torch.float32)
            for part, value in initial.items()
            for key, tensor in shared.items()
        }

    @torch.no_grad()
    def apply(shared: Tensors, mean: Tensors, state: Tensors) -> tuple[Tensors, Tensors]:
        _refuse_unfit(shared, mean, state, initial)
        new_shared, new_state = {}, dict(state)
        for key, mean_tensor in mean.items():
            start = shared[key].detach().to(torch.float32)
            own_state = {part: state[f"{part}.{key}"] for part in initial}
            new_shared[key], changed = rule(start, mean_tensor.detach().to(start), own_state)
            new_state |= {f"{part}.{key}": tensor for part, tensor in changed.items()}
        return new_shared, new_state

    return ServerOptimizer(init, apply)


def _refuse_unfit(shared: Tensors, mean: Tensors, state: Tensors, parts: Mapping[str, float]) -> None:
    # Shapes are compared because arithmetic would broadcast one that is wrong.
    if differing := sorted(shared.keys() ^ mean.keys()):
        raise ValueError(
            f"`shared` and `mean` differ in {differing[0]!r}: one of them lacks it. Pass both with the keys that were "
            "trained in the round."
        )
    for key, tensor in shared.items():
        others = {"mean": mean[key]} | {f"{part} in `state`": state.get(f"{part}.{key}") for part in parts}
        for name, other in others.items():
            if other is None:
                raise ValueError(
                    f"`state` has no {name.partition(' ')[0]} of {key!r}. Pass the state that `init` made from all "
                    "shared tensors, or one that came of it."
                )
            if other.shape != tensor.shape:
                raise ValueError(
                    f"{key!r} has shape {tuple(tensor.shape)} in `shared`, and its {name} {tuple(other.shape)}. All "
                    "must be of the same adapter and rank."
                )


def _fedavg(learning_rate: float) -> ServerOptimizer:
    """`x + eta (mean - x)`, for a learning rate of 1 the mean bit for bit."""

    def rule(start, mean, state):
        if learning_rate == 1.0:
            return mean.clone(), {}
        return start + learning_rate * (mean - start), {}

    return _tensor_by_tensor(rule, initial={})


def _fedavgm(learning_rate: float, momentum: float) -> ServerOptimizer:
    """`m = beta m + (mean - x)` and `x + eta m`; https://arxiv.org/abs/1909.06335 has no learning rate eta."""

    def rule(start, mean, state):
        velocity = momentum * state["momentum"] + (mean - start)
        return start + learning_rate * velocity, {"momentum": velocity}

    return _tensor_by_tensor(rule, initial={"momentum": 0.0})


Variance = Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]


def _adam_variance(variance: torch.Tensor, squared: torch.Tensor, beta_2: float) -> torch.Tensor:
    return beta_2 * variance + (1 - beta_2) * squared


def _yogi_variance(variance: torch.Tensor, squared: torch.Tensor, beta_2: float) -> torch.Tensor:
    return variance - (1 - beta_2) * squared * torch.sign(variance - squared)


def _adaptive(
    next_variance: Variance, learning_rate: float, beta_1: float, beta_2: float, tau: float
) -> ServerOptimizer:
    """Algorithm 2 of https://arxiv.org/abs/2003.00295: `x + eta m / (sqrt(v) + tau)`, without a bias correction."""

    def rule(start, mean, state):
        change = mean - start
        momentum = beta_1 * state["momentum"] + (1 - beta_1) * change
        variance = next_variance(state["variance"], change.square(), beta_2)
        new = start + learning_rate * momentum / (variance.sqrt() + tau)
        return new, {"momentum": momentum, "variance": variance}

    # The paper asks for a first variance of at least tau squared.
    return _tensor_by_tensor(rule, initial={"momentum": 0.0, "variance": tau**2})


def _fedadam(**arguments: float) -> ServerOptimizer:
    return _adaptive(_adam_variance, **arguments)


def _fedyogi(**arguments: float) -> ServerOptimizer:
    return _adaptive(_yogi_variance, **arguments)


_ADAPTIVE = {"learning_rate": 1e-2, "beta_1": 0.9, "beta_2": 0.99, "tau": 1e-3}

# What a server optimizer is made by, and its arguments with their defaults.
SERVER_OPTIMIZERS: dict[str, tuple[Callable[..., ServerOptimizer], dict[str, float]]] = {
    "fedavg": (_fedavg, {"learning_rate": 1.0}),
    "fedavgm": (_fedavgm, {"learning_rate": 1.0, "momentum": 0.9}),
    "fedadam": (_fedadam, _ADAPTIVE),
    "fedyogi": (_fedyogi, _ADAPTIVE),
}

_FP32 = torch.finfo(torch.float32)


def _is_positive(value: float) -> bool:
    # A number that is zero or infinite in fp32 is as wrong as one that is so in Python.
    return _FP32.tiny <= value <= _FP32.max


def _is_decay(value: float) -> bool:
    return 0 <= value < 1


# Per argument of any optimizer: what its value must be, and in words.
SERVER_OPTIMIZER_ARGUMENTS: dict[str, tuple[Callable[[float], bool], str]] = {
    "learning_rate": (_is_positive, "a positive and finite number"),
    "momentum": (_is_decay, "at least 0 and less than 1"),
    "beta_1": (_is_decay, "at least 0 and less than 1"),
    "beta_2": (_is_decay, "at least 0 and less than 1"),
    "tau": (_is_positive, "a positive and finite number"),
}


def optimizer_arguments(settings: Any) -> dict[str, float | None]:
    """What settings say of every argument, in fields that are named `server_` and then as it is."""
    return {name: getattr(settings, f"server_{name}") for name in SERVER_OPTIMIZER_ARGUMENTS}


def check_server_optimizer(name: str, arguments: Mapping[str, float | None]) -> None:
    """
    Refuses a server optimizer that cannot be made.

    Args:
        name (`str`):
            The optimizer, a key of `SERVER_OPTIMIZERS`. Users know it as `server_optimizer`.
        arguments (`Mapping[str, float | None]`):
            Its arguments, keys of `SERVER_OPTIMIZER_ARGUMENTS`; users know `momentum` as `server_momentum`, and so on.
            `None` is the optimizer's default, and no argument at all where it takes none of that name.

    Raises:
        `TypeError`: the name is no string, or an argument no number.
        `ValueError`: the optimizer is not known or does not take an argument, or an argument is out of its range.
    """
    if not isinstance(name, str):
        raise TypeError(f"`server_optimizer` must be a str, got {name!r} of type {type(name).__name__}.")
    if name not in SERVER_OPTIMIZERS:
        raise ValueError(f"`server_optimizer={name!r}` is not known. Choose one of {_listed(SERVER_OPTIMIZERS)}.")
    _, defaults = SERVER_OPTIMIZERS[name]
    for argument, value in arguments.items():
        if argument not in SERVER_OPTIMIZER_ARGUMENTS:
            raise ValueError(
                f"`server_{argument}` is an argument of no server optimizer. They take "
                f"{_listed(f'server_{known}' for known in SERVER_OPTIMIZER_ARGUMENTS)}."
            )
        if value is None:
            continue
        if argument not in defaults:
            takers = [other for other, (_, known) in SERVER_OPTIMIZERS.items() if argument in known]
            raise ValueError(
                f"`server_{argument}={value!r}` is an argument of {' and '.join(takers)}, and "
                f"`server_optimizer={name!r}` has no use for it. Leave it out, or choose another `server_optimizer`."
            )
        _check_value(argument, value)


def _check_value(argument: str, value: Any) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"`server_{argument}` must be a number, got {value!r} of type {type(value).__name__}.")
    is_valid, words = SERVER_OPTIMIZER_ARGUMENTS[argument]
    if not (math.isfinite(value) and is_valid(value)):
        raise ValueError(f"`server_{argument}` must be {words}, got {value!r}.")


def _listed(names) -> str:
    return ", ".join(map(repr, names))


def make_server_optimizer(name: str, **arguments: float | None) -> ServerOptimizer:
    """
    Makes a server's optimizer.

    With `x` the shared tensors, `d = mean - x` and the learning rate `eta`, a round makes of `x`

    - `fedavg` (https://arxiv.org/abs/1602.05629): `x + eta d`, for `eta = 1` the mean, bit for bit;
    - `fedavgm` (https://arxiv.org/abs/1909.06335): `x + eta m` with `m = momentum m + d`;
    - `fedadam` (https://arxiv.org/abs/2003.00295, Algorithm 2): `x + eta m / (sqrt(v) + tau)` with
      `m = beta_1 m + (1 - beta_1) d` and `v = beta_2 v + (1 - beta_2) d^2`;
    - `fedyogi` (the same paper): the same with `v = v - (1 - beta_2) d^2 sign(v - d^2)`.

    `m` starts at 0 and `v` at `tau^2`, the least that the paper allows. As in the paper there is no bias correction.
    Momentum 0.9, the two betas and tau are the values of the last paper's experiments. It tunes the learning rate for
    every task, so the default of the adaptive two is a start and no recommendation of the paper.

    Args:
        name (`str`):
            A key of `SERVER_OPTIMIZERS`.
        learning_rate (`float`, *optional*, defaults to `1.0`, and to `1e-2` for `fedadam` and `fedyogi`):
            Server learning rate, positive. The adaptive two move every number by about this much in a round, however
            small its change was: it is the one argument to tune.
        momentum (`float`, *optional*, defaults to `0.9`):
            Momentum of `fedavgm`, in [0, 1).
        beta_1 (`float`, *optional*, defaults to `0.9`), beta_2 (`float`, *optional*, defaults to `0.99`):
            Decay rates of `fedadam` and `fedyogi`, in [0, 1).
        tau (`float`, *optional*, defaults to `1e-3`):
            Adaptivity of `fedadam` and `fedyogi`, positive: changes that are small against it are not made larger.

    Example:

    ```python
    >>> optimizer = make_server_optimizer("fedavgm", momentum=0.5)
    >>> shared = {"A": torch.tensor([0.0])}
    >>> state = optimizer.init(shared)
    >>> for mean in (1.0, 2.0):
    ...     shared, state = optimizer.apply(shared, {"A": torch.tensor([mean])}, state)
    >>> shared
    {'A': tensor([2.5000])}
    ```

    Raises:
        `TypeError`, `ValueError`: see [`check_server_optimizer`].
    """
    check_server_optimizer(name, arguments)
    factory, defaults = SERVER_OPTIMIZERS[name]
    given = {argument: float(value) for argument, value in arguments.items() if value is not None}
    return factory(**(defaults | given))
