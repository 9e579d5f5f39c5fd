"""Mean and spread over clients: the numbers that the log, evaluations and the model card show."""

import random
from statistics import fmean, pstdev

import pytest

from hf_fedsa.hub.card import summarize
from hf_fedsa.metrics import log_line, over_clients, round_metrics, spread


def numbers(count, seed):
    generator = random.Random(seed)
    return [generator.uniform(0, 3) for _ in range(count)]


def record(losses, staleness, left_out=None):
    return round_metrics(
        round_index=2,
        losses=losses,
        weights=dict.fromkeys(losses, 1.0),
        left_out=left_out or {},
        staleness=staleness,
        counted=True,
        bytes_down=7,
        bytes_up=5,
        seconds=1.23456,
    )


def test_by_hand():
    assert over_clients([1.0, 4.0]) == {"mean": 2.5, "std": 1.5, "min": 1.0, "max": 4.0}
    assert over_clients([]) == {}
    assert over_clients([1.0, float("inf")]) == {"mean": float("inf"), "min": 1.0, "max": float("inf")}
    assert over_clients([7, 8], mean=min) == {"mean": 7, "std": 0.5, "min": 7, "max": 8}


@pytest.mark.parametrize("seed", range(40))
def test_each_number_is_computed_as_it_is_where_it_is_shown(seed):
    values = numbers(1 + seed % 13, seed)
    stale = [random.Random(seed).randrange(1, 9) for _ in values]
    losses = {f"client_{i:02d}": number for i, number in enumerate(values)}
    line = log_line(record(losses, {"new": None, **dict(zip(losses, stale, strict=True))}, {"x": "no rows"}))
    assert [*line.items()] == [
        ("round", 2),
        ("round_loss", sum(values) / len(values)),
        ("round_loss_std", pstdev(values)),
        ("round_loss_best", min(values)),
        ("round_loss_worst", max(values)),
        ("round_clients", len(values)),
        ("round_clients_left_out", 1),
        ("round_staleness", sum(stale) / len(stale)),
        ("round_staleness_worst", max(stale)),
        ("round_bytes_down", 7),
        ("round_bytes_up", 5),
        ("round_seconds", 1.235),
    ]
    assert [*spread({"loss": values, "name": ["a", None]}, "eval").items()] == [
        ("eval_loss", fmean(values)),
        ("eval_loss_std", pstdev(values)),
        ("eval_loss_min", min(values)),
        ("eval_loss_max", max(values)),
        ("eval_clients", max(2, len(values))),
    ]
    assert summarize(values) == {
        "mean": fmean(values),
        "std": pstdev(values),
        "min": min(values),
        "max": max(values),
        "clients": len(values),
    }


def test_the_two_means_differ_in_their_last_bit():
    assert any(sum(values) / len(values) != fmean(values) for values in (numbers(10, seed) for seed in range(40)))


def test_a_round_of_no_client_and_one_where_nobody_is_stale():
    line = log_line(record({}, {}, {"a": "no rows", "b": "no rows"}))
    assert line == {
        "round": 2,
        "round_clients": 0,
        "round_clients_left_out": 2,
        "round_bytes_down": 7,
        "round_bytes_up": 5,
        "round_seconds": 1.235,
    }
    assert "round_staleness" not in log_line(record({"a": 1.0}, {"a": None}))
    assert summarize([]) == {"clients": 0}


def test_an_evaluation_that_is_not_finite_has_no_deviation():
    assert spread({"loss": [1.0, float("inf")]}, "eval") == {
        "eval_loss": float("inf"),
        "eval_loss_min": 1.0,
        "eval_loss_max": float("inf"),
        "eval_clients": 2,
    }
