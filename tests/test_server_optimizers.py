"""The server's optimizers against rounds worked out by hand in plain Python floats."""

import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_fedsa.server.optimizers import (
    SERVER_OPTIMIZER_ARGUMENTS,
    SERVER_OPTIMIZERS,
    check_server_optimizer,
    make_server_optimizer,
)

START = {"a": [1.0, -2.0], "b": [0.5, 0.0, 4.0]}
# What clients return on average. Both keys in the first and last round, one of them in the second.
MEANS = [
    {"a": [1.5, -2.0], "b": [0.25, 1.0, 4.001]},
    {"a": [3.0, -1.0]},
    {"a": [0.0, 0.5], "b": [-1.0, 2.0, 4.0]},
]


def tensors(values: dict[str, list[float]]) -> dict[str, torch.Tensor]:
    return {key: torch.tensor(numbers) for key, numbers in values.items()}


def run(optimizer, means=MEANS, shared=None, state=None):
    """Shared tensors and state after these rounds."""
    shared = tensors(START) if shared is None else shared
    state = optimizer.init(shared) if state is None else state
    for mean in means:
        trained, state = optimizer.apply({key: shared[key] for key in mean}, tensors(mean), state)
        shared = shared | trained
    return shared, state


def number_by_number(step, initial: tuple[float, ...]) -> dict[str, list[float]]:
    """What a rule on one number makes of all of them, in fp64. It maps (x, mean, *state) to (x, *state)."""
    result = {}
    for key, numbers in START.items():
        result[key] = []
        for position, number in enumerate(numbers):
            state = initial
            for mean in MEANS:
                if key in mean:
                    number, *state = step(number, mean[key][position], *state)
            result[key].append(number)
    return result


def fedavg_step(eta):
    return lambda x, mean: (x + eta * (mean - x),)


def fedavgm_step(eta, beta):
    def step(x, mean, momentum):
        momentum = beta * momentum + mean - x
        return x + eta * momentum, momentum

    return step


def fedadam_step(eta, beta_1, beta_2, tau):
    def step(x, mean, momentum, variance):
        change = mean - x
        momentum = beta_1 * momentum + (1 - beta_1) * change
        variance = beta_2 * variance + (1 - beta_2) * change**2
        return x + eta * momentum / (math.sqrt(variance) + tau), momentum, variance

    return step


def fedyogi_step(eta, beta_1, beta_2, tau):
    def step(x, mean, momentum, variance):
        change = mean - x
        momentum = beta_1 * momentum + (1 - beta_1) * change
        if variance > change**2:
            variance -= (1 - beta_2) * change**2
        elif variance < change**2:
            variance += (1 - beta_2) * change**2
        return x + eta * momentum / (math.sqrt(variance) + tau), momentum, variance

    return step


CASES = {
    "fedavg": ("fedavg", {"learning_rate": 0.25}, fedavg_step(0.25), ()),
    "fedavgm": ("fedavgm", {}, fedavgm_step(1.0, 0.9), (0.0,)),
    "fedavgm set": ("fedavgm", {"learning_rate": 0.5, "momentum": 0.25}, fedavgm_step(0.5, 0.25), (0.0,)),
    "fedadam": ("fedadam", {}, fedadam_step(1e-2, 0.9, 0.99, 1e-3), (0.0, 1e-6)),
    "fedadam set": (
        "fedadam",
        {"learning_rate": 0.5, "beta_1": 0.5, "beta_2": 0.75, "tau": 0.125},
        fedadam_step(0.5, 0.5, 0.75, 0.125),
        (0.0, 0.015625),
    ),
    "fedyogi": ("fedyogi", {}, fedyogi_step(1e-2, 0.9, 0.99, 1e-3), (0.0, 1e-6)),
    "fedyogi set": (
        "fedyogi",
        {"learning_rate": 0.5, "beta_1": 0.5, "beta_2": 0.75, "tau": 0.5},
        fedyogi_step(0.5, 0.5, 0.75, 0.5),
        (0.0, 0.25),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_three_rounds_are_those_of_the_rule_on_every_number(case):
    name, arguments, step, initial = CASES[case]
    shared, _ = run(make_server_optimizer(name, **arguments))
    expected = number_by_number(step, initial)
    assert shared.keys() == expected.keys()
    for key, numbers in expected.items():
        np.testing.assert_allclose(shared[key].double().numpy(), numbers, rtol=1e-6, atol=1e-6)


def test_momentum_by_hand():
    # m = 2, x = 2; m = 0.5 * 2 + (2 - 2) = 1, x = 3; m = 0.5 * 1 + (1 - 3) = -1.5, x = 1.5.
    optimizer = make_server_optimizer("fedavgm", momentum=0.5)
    shared, state = run(optimizer, [{"a": [2.0]}, {"a": [2.0]}, {"a": [1.0]}], shared=tensors({"a": [0.0]}))
    assert shared["a"].tolist() == [1.5] and state["momentum.a"].tolist() == [-1.5]


def test_adam_and_yogi_by_hand():
    # tau = 1, so v_0 = 1; d = 3: m = 0.5 * 3 = 1.5.
    # Adam: v = 0.75 + 0.25 * 9 = 3. Yogi: v < d^2, so v = 1 + 0.25 * 9 = 3.25.
    arguments = {"learning_rate": 1.0, "beta_1": 0.5, "beta_2": 0.75, "tau": 1.0}
    for name, variance in (("fedadam", 3.0), ("fedyogi", 3.25)):
        shared, state = run(make_server_optimizer(name, **arguments), [{"a": [3.0]}], shared=tensors({"a": [0.0]}))
        assert state["momentum.a"].tolist() == [1.5] and state["variance.a"].tolist() == [variance]
        assert shared["a"].item() == pytest.approx(1.5 / (math.sqrt(variance) + 1), rel=1e-6)


def test_yogi_comes_down_by_the_square_and_not_by_a_part_of_itself():
    # v_0 = 4 > d^2 = 1: v = 4 - 0.25 * 1, where Adam's is 0.75 * 4 + 0.25 * 1.
    for name, variance in (("fedyogi", 3.75), ("fedadam", 3.25)):
        optimizer = make_server_optimizer(name, beta_2=0.75, tau=2.0)
        assert run(optimizer, [{"a": [1.0]}], shared=tensors({"a": [0.0]}))[1]["variance.a"].tolist() == [variance]


def test_fedavg_is_the_mean_bit_for_bit():
    generator = torch.Generator().manual_seed(0)
    shared = {"a": torch.randn(200, generator=generator) * 1e4}
    mean = {"a": torch.randn(200, generator=generator)}
    assert not torch.equal(shared["a"] + (mean["a"] - shared["a"]), mean["a"])  # There is something to lose.
    for optimizer in (make_server_optimizer("fedavg"), make_server_optimizer("fedavg", learning_rate=1)):
        new, state = optimizer.apply(shared, mean, optimizer.init(shared))
        assert torch.equal(new["a"], mean["a"]) and new["a"].data_ptr() != mean["a"].data_ptr() and state == {}


def test_an_argument_of_none_is_the_default():
    for name, (_, defaults) in SERVER_OPTIMIZERS.items():
        shared, _ = run(make_server_optimizer(name))
        for arguments in (dict.fromkeys(SERVER_OPTIMIZER_ARGUMENTS), defaults):
            again, _ = run(make_server_optimizer(name, **arguments))
            assert all(torch.equal(again[key], shared[key]) for key in shared)


@pytest.mark.parametrize("name", SERVER_OPTIMIZERS)
def test_keys_that_were_not_trained_keep_their_state(name):
    optimizer = make_server_optimizer(name)
    shared, before = run(optimizer, MEANS[:1])
    new, after = optimizer.apply({"a": shared["a"]}, {"a": torch.tensor([7.0, 8.0])}, before)
    assert new.keys() == {"a"} and after.keys() == before.keys()
    for key in before:
        assert torch.equal(after[key], before[key]) == key.endswith(".b"), key


@pytest.mark.parametrize("name", SERVER_OPTIMIZERS)
def test_inputs_are_untouched(name):
    optimizer = make_server_optimizer(name)
    shared = tensors(START)
    state = optimizer.init(shared)
    for mean in MEANS:
        given = ({key: shared[key] for key in mean}, tensors(mean), state)
        copies = [{key: tensor.clone() for key, tensor in each.items()} for each in given]
        new, state = optimizer.apply(*given)
        for each, copy in zip(given, copies, strict=True):
            assert each.keys() == copy.keys() and all(torch.equal(each[key], copy[key]) for key in copy)
        inputs = {tensor.data_ptr() for each in given[:2] for tensor in each.values()}
        assert inputs.isdisjoint(tensor.data_ptr() for tensor in (new | state).values())
        shared = shared | new


@pytest.mark.parametrize("name", SERVER_OPTIMIZERS)
def test_the_state_is_a_value(name, tmp_path):
    shared, state = run(make_server_optimizer(name), MEANS[:1])
    save_file(shared, tmp_path / "shared.safetensors")
    save_file(state, tmp_path / "state.safetensors")
    straight = run(make_server_optimizer(name), MEANS[1:], shared, state)
    loaded = load_file(tmp_path / "shared.safetensors"), load_file(tmp_path / "state.safetensors")
    resumed = run(make_server_optimizer(name), MEANS[1:], *loaded)
    for one, other in zip(straight, resumed, strict=True):
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    assert all(tensor.dtype == torch.float32 for tensor in state.values())
    assert len(state) == {"fedavg": 0, "fedavgm": 2, "fedadam": 4, "fedyogi": 4}[name]
    assert not any("|" in key for key in state)


@pytest.mark.parametrize("name", SERVER_OPTIMIZERS)
def test_all_is_computed_in_fp32(name):
    optimizer = make_server_optimizer(name)
    shared = {"a": torch.tensor([1.0, 256.0], dtype=torch.bfloat16)}
    mean = {"a": torch.tensor([1.0009765625, 256.125])}
    state = optimizer.init(shared)
    new, state = optimizer.apply(shared, mean, state)
    wide, wide_state = optimizer.apply({"a": shared["a"].float()}, mean, optimizer.init({"a": shared["a"].float()}))
    assert new["a"].dtype == torch.float32 and torch.equal(new["a"], wide["a"])
    assert all(tensor.dtype == torch.float32 and torch.equal(tensor, wide_state[key]) for key, tensor in state.items())


# Refusals


@pytest.mark.parametrize(
    ("name", "arguments", "error", "words"),
    [
        ("adam", {}, ValueError, "`server_optimizer='adam'` is not known.*'fedavg', 'fedavgm', 'fedadam', 'fedyogi'"),
        (None, {}, TypeError, "`server_optimizer` must be a str, got None of type NoneType"),
        (["fedavg"], {}, TypeError, "of type list"),
        (
            "fedavg",
            {"momentum": 0.9},
            ValueError,
            "`server_momentum=0.9` is an argument of fedavgm, and `server_optimizer='fedavg'` has no use for it",
        ),
        ("fedavgm", {"tau": 1e-3}, ValueError, "is an argument of fedadam and fedyogi"),
        ("fedadam", {"momentum": 0.9}, ValueError, "is an argument of fedavgm"),
        ("fedyogi", {"momentum": 0.0}, ValueError, "is an argument of fedavgm"),
        ("fedavg", {"lr": 1.0}, ValueError, "`server_lr` is an argument of no server optimizer.*'server_tau'"),
        ("fedavg", {"learning_rate": 0}, ValueError, "`server_learning_rate` must be a positive and finite number"),
        ("fedavg", {"learning_rate": -1.0}, ValueError, "got -1.0"),
        ("fedavg", {"learning_rate": float("inf")}, ValueError, "got inf"),
        ("fedavg", {"learning_rate": float("nan")}, ValueError, "got nan"),
        ("fedavg", {"learning_rate": 1e39}, ValueError, "got 1e[+]39"),
        (
            "fedavg",
            {"learning_rate": True},
            TypeError,
            "`server_learning_rate` must be a number, got True",
        ),
        ("fedavg", {"learning_rate": "1"}, TypeError, "got '1' of type str"),
        ("fedavgm", {"momentum": 1.0}, ValueError, "`server_momentum` must be at least 0 and less than 1, got 1.0"),
        ("fedavgm", {"momentum": -0.1}, ValueError, "got -0.1"),
        ("fedavgm", {"momentum": False}, TypeError, "of type bool"),
        ("fedadam", {"beta_1": 1}, ValueError, "`server_beta_1` must be"),
        ("fedadam", {"beta_1": float("nan")}, ValueError, "`server_beta_1` must be"),
        ("fedyogi", {"beta_2": 1.5}, ValueError, "`server_beta_2` must be"),
        ("fedyogi", {"beta_2": -1}, ValueError, "`server_beta_2` must be"),
        ("fedyogi", {"tau": 0.0}, ValueError, "`server_tau` must be a positive"),
        ("fedadam", {"tau": 1e-50}, ValueError, "`server_tau` must be a positive"),
        ("fedadam", {"tau": [1]}, TypeError, "`server_tau` must be a number"),
    ],
)
def test_what_cannot_be_made_is_refused(name, arguments, error, words):
    with pytest.raises(error, match=words):
        check_server_optimizer(name, arguments)
    with pytest.raises(error, match=words):
        make_server_optimizer(name, **arguments)


def test_what_can_be_made_is_not_refused():
    check_server_optimizer("fedavg", {"learning_rate": 2, "momentum": None, "tau": None})
    check_server_optimizer("fedavgm", {"momentum": 0})
    check_server_optimizer("fedyogi", {"beta_1": 0.0, "beta_2": 0.999, "tau": 1e-9, "learning_rate": 1e-3})


@pytest.mark.parametrize("name", SERVER_OPTIMIZERS)
def test_tensors_that_do_not_fit_are_refused(name):
    optimizer = make_server_optimizer(name)
    shared = tensors(START)
    state = optimizer.init(shared)
    with pytest.raises(ValueError, match="`shared` and `mean` differ in 'b'"):
        optimizer.apply(shared, {"a": shared["a"]}, state)
    with pytest.raises(ValueError, match="'a' has shape .2,. in `shared`, and its mean .1,."):
        optimizer.apply({"a": shared["a"]}, {"a": torch.zeros(1)}, state)
    if not state:
        return
    with pytest.raises(ValueError, match="`state` has no momentum of 'c'"):
        optimizer.apply({"c": shared["a"]}, {"c": shared["a"]}, state)
    with pytest.raises(ValueError, match="its momentum in `state` .1,."):
        optimizer.apply({"a": shared["a"]}, {"a": shared["a"]}, state | {"momentum.a": torch.zeros(1)})
