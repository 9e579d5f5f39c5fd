"""The recipes as users run them, against a Hub."""

import json
import subprocess
import sys
from pathlib import Path

import torch
from conftest import make_model, make_tokenizer

from hf_fedsa import list_clients, load_personalized_model

RECIPES = Path(__file__).parent.parent / "recipes"
REPO = "me/gsm8k-fedsa"


def launch(recipe, *arguments):
    command = [sys.executable, "-m", "accelerate.commands.launch", str(RECIPES / recipe), *map(str, arguments)]
    common = ["--use_cpu", "--bf16", "false", "--gradient_checkpointing", "false", "--report_to", "none"]
    common += ["--save_strategy", "no", "--max_length", "64", "--num_rounds", "1", "--local_steps", "2"]
    done = subprocess.run([*command, *common], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
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
