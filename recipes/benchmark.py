"""
Time of a step with clients side by side, against plain `SFTTrainer` on the same tokens in the same process.

```bash
python recipes/benchmark.py                          # SmolLM2-135M, 4 clients, 64 and 128 tokens, fp32 and NF4
python recipes/benchmark.py --tokens 64 --steps 12   # one row length, more steps
```

Three trainers take turns, `--repeats` times each:

(a) `FederatedTrainer`, all clients side by side in one forward pass;
(b) `FederatedTrainer` with `parallel_clients=1`, so each client takes a step of its own;
(c) `SFTTrainer` with the rows of all clients in one batch.

A time is that of training one batch of every client, everything between two optimizer steps included. Ratios of one
process are compared, since absolute times vary with the machine.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

from smollm2 import smollm2_folder


def main(args: argparse.Namespace) -> None:
    model = args.model or str(smollm2_folder())
    results = []
    for precision in args.precisions:
        for tokens in args.tokens:
            results.append(compare(model, precision, tokens, args))
            print(format_result(results[-1]))
    if args.output:
        Path(args.output).write_text(json.dumps(results, indent=2) + "\n")


def compare(model: str, precision: str, tokens: int, args: argparse.Namespace) -> dict:
    """Runs the three trainers in turns and returns their seconds per batch of every client."""
    seconds: dict[str, list[float]] = {"a": [], "b": [], "c": []}
    for _ in range(args.repeats):
        for name in seconds:
            # One at a time takes a step per client, so as many steps see as many rows.
            steps = args.steps if name == "a" else args.steps * (args.clients if name == "b" else 1)
            times = step_times(make_trainer(name, model, precision, tokens, steps, args))
            group = args.clients if name == "b" else 1
            times = [sum(times[i : i + group]) for i in range(0, len(times) - group + 1, group)]
            seconds[name].extend(times[1:])  # The first batch warms caches up.
    return {
        "precision": precision,
        "tokens": tokens,
        "clients": args.clients,
        "batch_size": args.batch_size,
        "seconds": {name: spread(times) for name, times in seconds.items()},
        "a_over_c": statistics.median(seconds["a"]) / statistics.median(seconds["c"]),
        "b_over_a": statistics.median(seconds["b"]) / statistics.median(seconds["a"]),
    }


def spread(times: list[float]) -> dict[str, float]:
    return {"median": statistics.median(times), "min": min(times), "max": max(times), "batches": len(times)}


def format_result(result: dict) -> str:
    parts = [f"({name}) {s['median']:.3f} s [{s['min']:.3f}, {s['max']:.3f}]" for name, s in result["seconds"].items()]
    setting = (
        f"{result['precision']}, {result['clients']} clients x {result['batch_size']} x {result['tokens']} tokens"
    )
    ratios = f"(a)/(c) {result['a_over_c']:.2f}  (b)/(a) {result['b_over_a']:.2f}"
    return f"{setting}:  {'  '.join(parts)}  {ratios}"


def make_trainer(name: str, model: str, precision: str, tokens: int, steps: int, args: argparse.Namespace):
    import torch
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig
    from trl import SFTConfig, SFTTrainer

    from hf_fedsa import FederatedConfig, FederatedTrainer

    common = {
        "output_dir": tempfile.mkdtemp(),
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "bf16": False,
        "gradient_checkpointing": False,
    }
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4") if precision == "nf4" else None
    trainer_arguments = {
        "model": model,
        "quantization_config": quantization,
        "peft_config": LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"),
    }
    rows = make_rows(args.clients * args.batch_size * args.steps, tokens)
    if name == "c":
        arguments = SFTConfig(per_device_train_batch_size=args.clients * args.batch_size, max_steps=steps, **common)
        return SFTTrainer(args=arguments, train_dataset=rows, **trainer_arguments)
    arguments = FederatedConfig(
        num_rounds=1,
        local_steps=args.steps,
        parallel_clients=args.clients if name == "a" else 1,
        per_device_train_batch_size=args.batch_size,
        **common,
    )
    clients = {f"client_{i}": rows.shard(args.clients, i) for i in range(args.clients)}
    torch.manual_seed(0)
    return FederatedTrainer(args=arguments, train_dataset=clients, **trainer_arguments)


def make_rows(num_rows: int, tokens: int):
    """Rows of random token ids: what a step costs depends on their number alone."""
    import numpy as np
    from datasets import Dataset

    ids = np.random.default_rng(0).integers(100, 40000, size=(num_rows, tokens)).tolist()
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


def step_times(trainer) -> list[float]:
    """Seconds from one optimizer step to the next."""
    from transformers import TrainerCallback

    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            ends.append(time.perf_counter())

    trainer.add_callback(Clock())
    start = time.perf_counter()
    trainer.train()
    return [end - begin for begin, end in zip([start, *ends], ends, strict=False)]


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", help="model name or folder; SmolLM2-135M-Instruct if left out")
    parser.add_argument("--precisions", nargs="+", choices=["fp32", "nf4"], default=["fp32", "nf4"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[64, 128], help="tokens per row")
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--batch_size", type=int, default=1, help="rows per client and step")
    parser.add_argument("--steps", type=int, default=6, help="steps per client and turn; the first is not counted")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each trainer")
    parser.add_argument("--output", help="JSON file to write")
    return parser


if __name__ == "__main__":
    main(make_parser().parse_args())
