"""The first thing that two federations say differently."""

import pytest

from hf_fedsa.fit import first_difference, misfit


@pytest.mark.parametrize(
    ("expected", "found", "names", "difference"),
    [
        ({"a": 1}, {"a": 1}, None, None),
        ({"b": 1, "a": 1}, {"b": 2, "a": 2}, None, ("a", 1, 2)),
        ({"a": 1}, {"a": 1, "b": 2}, None, ("b", None, 2)),
        ({"a": 1, "b": 2}, {"a": 1}, None, ("b", 2, None)),
        ({"a": None}, {}, None, None),
        ({"b": 1, "a": 1}, {"b": 2, "a": 2}, ["b", "a"], ("b", 1, 2)),
        ({"a": 1}, {"a": 1, "b": 2}, ["a"], None),
        ({}, {}, None, None),
    ],
)
def test_it_is_found_by_name(expected, found, names, difference):
    assert first_difference(expected, found, names) == difference


@pytest.mark.parametrize(
    ("expected", "found", "problem"),
    [
        ({"a": (2,)}, {"a": (2,)}, None),
        ({"b": (2,), "c": (1,), "a": (2,)}, {"c": (2,), "x": (1,)}, "lacks 'a'"),
        ({"c": (1,)}, {"c": (2,), "x": (1,), "w": (1,)}, "holds 'w', which the base model has no place for"),
        ({"c": (1,), "a": (3, 4)}, {"a": (3,), "c": (2,)}, r"holds 'c' with the shape (2,), where (1,) is needed"),
    ],
)
def test_what_is_missing_is_said_before_what_is_too_many_and_that_before_shapes(expected, found, problem):
    assert misfit(expected, found) == problem
