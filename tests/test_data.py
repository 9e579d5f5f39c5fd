"""Whose is what in a batch of several clients."""

import numpy as np
import pytest
import torch

from hf_fedsa.client.data import rows_of

# Rows 1 and 2 of 3.
PART = {"name": "entry", "start": 1, "count": 2, "total": 3}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (["a", "b", "c"], ["b", "c"]),
        (("a", "b", "c"), ("b", "c")),
        ([["a"], ["b", "b"], ["c"] * 3], [["b", "b"], ["c"] * 3]),
        ([{"q": 0}, {"q": 1}, {"q": 2}], [{"q": 1}, {"q": 2}]),
        ({"texts": ["a", "b", "c"], "more": {"n": (0, 1, 2)}}, {"texts": ["b", "c"], "more": {"n": (1, 2)}}),
        ([("a", "b", "c"), ("d", "e", "f")], [("b", "c"), ("e", "f")]),
        ("a task", "a task"),
        (None, None),
        (True, True),
        ({}, {}),
    ],
)
def test_every_entry_has_its_rows_and_plain_values_are_everyones(value, expected):
    part = rows_of(value, **PART)
    assert part == expected and type(part) is type(expected)


@pytest.mark.parametrize("make", [torch.tensor, np.array], ids=["torch", "numpy"])
def test_the_first_axis_has_the_rows(make):
    rows = make([[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]])
    assert (rows_of(rows, **PART) == rows[1:3]).all()
    for common in (make([[0, 1]]), make(7)):
        assert rows_of(common, **PART) is common
    (column,) = rows_of([rows], **PART)
    assert (column == rows[1:3]).all()


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (["a", "b", "c", "d"], "`list` of length 4,"),
        ([], "`list` of length 0"),
        (torch.zeros(6, 2), r"`Tensor` of shape \(6, 2\)"),
        (np.zeros(2), r"`ndarray` of shape \(2,\)"),
        ([torch.zeros(3)] * 3, "`list` of length 3 of items of length 3"),
        ([("a", "b", "c")] * 3, "`list` of length 3 of items of length 3"),
        ([("a", "b", "c"), ("d", "e")], "`list` of length 2 of items of length 2, 3"),
        ({"a": {"b": ["x"]}}, r"`entry\.a\.b` of a batch of 3 rows a `list` of length 1"),
        ({"a", "b", "c"}, "a `set`"),
    ],
    ids=lambda value: str(value)[:20] if isinstance(value, str) else "",
)
def test_what_cannot_be_told_apart_is_refused(value, says):
    with pytest.raises(ValueError, match=f"(?s){says}.*not known which.*`parallel_clients=1`"):
        rows_of(value, **PART)
