"""
A client joins a federation that has been trained: it starts from the shared A and trains its own B.

After the demo, a client with a form of answers that none of the others has, in a minute:

```bash
accelerate launch recipes/gsm8k.py --config recipes/configs/demo.yaml
accelerate launch recipes/onboard_client.py --config recipes/configs/onboard.yaml
```

With rows of your own, jsonl with `prompt` and `completion`, and a federation on the Hub to be added to:

```bash
accelerate launch recipes/onboard_client.py --federation me/gsm8k-fedsa --client_id clinic --rows rows.jsonl \
    --output_dir runs/clinic --push_to_hub --hub_model_id me/gsm8k-fedsa --hub_clients clinic
```

Any argument of `FederatedConfig` and of TRL's `ModelConfig` can follow. The base model and the adapter's settings are
the federation's.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))


@dataclass
class OnboardArguments:
    """
    Arguments of this recipe alone.

    Args:
        federation (`str`):
            Repository on the Hub, or folder, of the federation to join.
        client_id (`str`, *optional*, defaults to `"cashier"`):
            Name of the client that joins.
        rows (`str`, *optional*):
            Jsonl file with `prompt` and `completion`. `None` means generated problems.
        num_examples (`int`, *optional*, defaults to `64`):
            Rows to train on.
        num_eval_examples (`int`, *optional*, defaults to `16`):
            Rows held out.
        init_local (`str`, *optional*, defaults to `"zero"`):
            Where B starts: `"zero"`, the `"mean"` of the other clients', or the id of one of them.
        train_shared (`bool`, *optional*, defaults to `False`):
            Whether A trains too, to be returned to the federation.
    """

    federation: str = field(metadata={"help": "Repository on the Hub, or folder, of the federation to join."})
    client_id: str = field(default="cashier", metadata={"help": "Name of the client that joins."})
    rows: str | None = field(
        default=None, metadata={"help": "Jsonl file with prompt and completion. None: generated problems."}
    )
    num_examples: int = field(default=64, metadata={"help": "Rows to train on."})
    num_eval_examples: int = field(default=16, metadata={"help": "Rows held out."})
    init_local: str = field(
        default="zero", metadata={"help": "Where B starts: zero, the mean of the others', or the id of one of them."}
    )
    train_shared: bool = field(default=False, metadata={"help": "Whether A trains too, to be returned."})


def main(recipe_args, training_args, model_args) -> None:
    from launch import use_all_cores
    from smollm2 import REPOSITORY, smollm2_folder
    from trl import get_quantization_config

    from hf_fedsa import FederatedTrainer

    use_all_cores(training_args)
    # Only what is copied to an accelerator can be pinned for it.
    training_args.dataloader_pin_memory &= training_args.device.type != "cpu"

    # Data
    train, evaluation = make_rows(recipe_args, training_args.seed)

    # The newcomer, on the federation's base unless another copy of it is named
    model = model_args.model_name_or_path
    newcomer = FederatedTrainer.from_shared(
        recipe_args.federation,
        args=training_args,
        train_dataset={recipe_args.client_id: train},
        eval_dataset={recipe_args.client_id: evaluation},
        init_local=recipe_args.init_local,
        train_shared=recipe_args.train_shared,
        model=str(smollm2_folder()) if model == REPOSITORY else model,
        quantization_config=get_quantization_config(model_args),
    )

    # Before, training, after
    before = newcomer.evaluate()["eval_loss"]
    newcomer.train()
    after = newcomer.evaluate()["eval_loss"]
    newcomer.save_model()

    # Report
    if not newcomer.is_world_process_zero():
        return
    starts = {"zero": "the base model", "mean": "the mean of the clients"}
    start = starts.get(recipe_args.init_local, recipe_args.init_local)
    print(f"\nLoss of {recipe_args.client_id} on held-out rows: {before:.3f} as {start}, {after:.3f} trained")
    print(f"Its adapter: {Path(training_args.output_dir) / 'clients' / recipe_args.client_id}")


def make_rows(args: OnboardArguments, seed: int):
    """Training rows and held-out rows."""
    from datasets import load_dataset
    from gsm8k import as_prompts
    from word_problems import NUMBER, AnswerStyle, make_clients

    if args.rows is not None:
        rows = load_dataset("json", data_files=args.rows, split="train").shuffle(seed=seed)
        held_out = min(args.num_eval_examples, len(rows) // 5)
        last = min(len(rows), held_out + args.num_examples)
        return rows.select(range(held_out, last)), rows.select(range(held_out))

    style = AnswerStyle(args.client_id, write_receipt, rf"TOTAL {NUMBER}\Z")
    train, evaluation = make_clients(args.num_examples, args.num_eval_examples, seed=seed, styles=[style])
    return as_prompts(train[args.client_id]), as_prompts(evaluation[args.client_id])


def write_receipt(problem) -> str:
    """Calculations without words, each in brackets, and a total."""
    lines = [f"[{s.left} {s.operator} {s.right} = {s.result}]" for s in problem.steps]
    return " ".join([*lines, f"TOTAL {problem.result}"])


def make_parser():
    from trl import ModelConfig, TrlParser

    from hf_fedsa import FederatedConfig

    return TrlParser((OnboardArguments, FederatedConfig, ModelConfig))


if __name__ == "__main__":
    from launch import quiet_libraries

    quiet_libraries()
    main(*make_parser().parse_args_and_config())
