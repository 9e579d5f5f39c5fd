"""The first thing that two federations say differently."""

import pytest

from hf_fedsa.fit import first_difference


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
