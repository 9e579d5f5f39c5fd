"""Killed at any moment, the run that goes on ends as one that was never interrupted."""

import random
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import max_difference
from safetensors.torch import load_file

DRIVER = Path(__file__).parent / "killed_run.py"


def random_moments(number):
    """Shares of a run's duration after which it is killed."""
    generator = random.Random(7)
    return [f"random_{generator.uniform(0.1, 0.95):.2f}" for _ in range(number)]


@pytest.mark.parametrize(
    "points", [["step", "checkpoint", "manifest", "between_b_and_a"], random_moments(6)], ids=["chosen", "random"]
)
def test_resumed_is_bit_identical(tmp_path, points):
    done = subprocess.run([sys.executable, str(DRIVER), str(tmp_path), *points], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    expected = load_file(tmp_path / "whole" / "end.safetensors")
    assert any(tensor.any() for key, tensor in expected.items() if key.startswith("client_3"))
    for point in points:
        found = load_file(tmp_path / point / "end.safetensors")
        assert max_difference(found, expected) == 0, point
    if "checkpoint" in points:
        lines = dict(line.split(" ", 1) for line in done.stdout.splitlines() if line.split(" ")[0] in points)
        assert set(lines.values()) == {"9 resumed"}
        assert "Passing over" in done.stderr
