"""The recipes as users run them, against a Hub."""

import contextlib
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_model, make_tokenizer

from hf_fedsa import list_clients, load_personalized_model

# What libraries say that a user can do nothing about.
NOISE = ("FutureWarning", "pin_memory", "kernels", "gemv_4bit", "Map:", "examples/s")
RECIPES = Path(__file__).parent.parent / "recipes"
REPO = "me/gsm8k-fedsa"


def launch(recipe, *arguments):
    command = [sys.executable, "-m", "accelerate.commands.launch", str(RECIPES / recipe), *map(str, arguments)]
    common = ["--use_cpu", "--bf16", "false", "--gradient_checkpointing", "false", "--report_to", "none"]
    common += ["--save_strategy", "no", "--max_length", "64", "--num_rounds", "1", "--local_steps", "2"]
    done = subprocess.run([*command, *common], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [noise for noise in NOISE if noise in done.stderr + done.stdout] == []
    return done.stdout


def test_gsm8k_is_pushed_and_a_newcomer_joins(hub, tmp_path):
    base = tmp_path / "base"
    make_model().save_pretrained(base)
    make_tokenizer().save_pretrained(base)
    hub.put("me/base", {path.name: path.read_bytes() for path in base.iterdir()})
    output = launch(
        "gsm8k.py",
        *("--model_name_or_path", "me/base", "--dataset_name", "word_problems", "--lora_target_modules", "all-linear"),
        *("--examples_per_client", 4, "--eval_examples_per_client", 2, "--max_new_tokens", 2, "--dtype", "float32"),
        *("--output_dir", tmp_path / "out", "--push_to_hub", "--hub_model_id", REPO),
    )
    assert f"On the Hub: {REPO}" in output
    assert "exact match" in output and f"Personalised adapters: {tmp_path / 'out' / 'clients'}" in output
    assert hub.repos[REPO].private
    assert list_clients(REPO) == ["engineer", "ledger", "teacher"]
    output = launch(
        "onboard_client.py",
        *("--federation", REPO, "--num_examples", 8, "--num_eval_examples", 4, "--output_dir", tmp_path / "new"),
        *("--push_to_hub", "--hub_model_id", REPO, "--hub_clients", "cashier", "--learning_rate", "0.1"),
    )
    assert "Loss of cashier on held-out rows" in output
    assert list_clients(REPO) == ["cashier", "engineer", "ledger", "teacher"]
    assert json.loads(hub.files(REPO)["federation.json"])["rounds_done"] == 1
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        model = load_personalized_model(REPO, "cashier")
        first = model(input_ids=ids).logits
        model = load_personalized_model(REPO, "ledger", base_model=model)
        assert (model(input_ids=ids).logits - first).abs().max() > 1e-6


@pytest.mark.parametrize(
    ("after", "learned"), [((0.6, 0.4), False), ((0.5, 0.4), True), ((0.5, math.nan), False)], ids=str
)
def test_a_client_that_has_not_learned_is_an_error(monkeypatch, after, learned):
    monkeypatch.syspath_prepend(str(RECIPES))
    from gsm8k import check_that_all_have_learned

    before, after = {"a": 1.0, "b": 2.0}, dict(zip("ab", after, strict=True))
    with contextlib.nullcontext() if learned else pytest.raises(SystemExit, match="Not all clients have learned"):
        check_that_all_have_learned(before, after, max_ratio=0.5)
