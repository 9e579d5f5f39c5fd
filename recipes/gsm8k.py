"""
Federated fine-tuning with FedSA-LoRA on GSM8K: every client learns to answer in its own form, with a common A.

On a laptop, with generated problems:

```bash
accelerate launch recipes/gsm8k.py --config recipes/configs/demo.yaml
```

The setting of the paper, on a GPU:

```bash
accelerate launch recipes/gsm8k.py --config recipes/configs/llama3_8b_qlora.yaml
```

With rows of your own, jsonl with `question` and `answer` (steps, then `#### result` on a line), dealt to the clients:

```bash
accelerate launch recipes/gsm8k.py --config recipes/configs/demo.yaml --dataset_name train.jsonl --test_file test.jsonl
```

Any argument of `FederatedConfig` and of TRL's `ModelConfig` can follow and overrides the file. To publish the result,
privately unless `--hub_private_repo false`:

```bash
accelerate launch recipes/gsm8k.py --config recipes/configs/demo.yaml --push_to_hub --hub_model_id me/gsm8k-fedsa
```

With rows of your own, also say which clients' adapters to publish: `--hub_clients all`, `none`, or their ids.
"""

import math
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

GENERATED = "word_problems"


@dataclass
class GSM8KArguments:
    """
    Arguments of this recipe alone.

    Args:
        dataset_name (`str`, *optional*, defaults to `"openai/gsm8k"`):
            Dataset on the Hub, a jsonl file with `question` and `answer`, or `word_problems` for generated ones.
        test_file (`str`, *optional*):
            Held-out rows, where `dataset_name` is a file.
        num_clients (`int`, *optional*, defaults to `3`):
            Clients that the rows are dealt to.
        examples_per_client (`int`, *optional*):
            Training rows per client. `None` deals all there are.
        eval_examples_per_client (`int`, *optional*, defaults to `32`):
            Held-out rows per client, for the loss and for exact match.
        answer_formats (`bool`, *optional*, defaults to `False`):
            Whether clients write the answers each in its own form. Generated problems always do.
        adapter (`str`, *optional*, defaults to `"lora"`):
            `"lora"`, set by the `lora_*` arguments, or `"vera"`.
        vera_r (`int`, *optional*, defaults to `256`):
            Rank of VeRA's projections.
        max_new_tokens (`int`, *optional*, defaults to `256`):
            Longest answer to generate.
        max_loss_ratio (`float`, *optional*):
            Share of its loss before training that a client may have left after it. If one has more, the recipe ends
            with an error, once everything is saved. `None` asks for nothing.
        cross_evaluation (`bool`, *optional*, defaults to `False`):
            Whether to print the loss of every client's adapter on every client's rows.
    """

    dataset_name: str = field(
        default="openai/gsm8k", metadata={"help": "Dataset on the Hub, a jsonl file, or word_problems."}
    )
    test_file: str | None = field(default=None, metadata={"help": "Held-out rows, where dataset_name is a file."})
    num_clients: int = field(default=3, metadata={"help": "Clients that the rows are dealt to."})
    examples_per_client: int | None = field(default=None, metadata={"help": "Training rows per client. None: all."})
    eval_examples_per_client: int = field(default=32, metadata={"help": "Held-out rows per client."})
    answer_formats: bool = field(
        default=False, metadata={"help": "Whether clients write the answers each in its own form."}
    )
    adapter: str = field(default="lora", metadata={"help": "Adapter to train.", "choices": ["lora", "vera"]})
    vera_r: int = field(default=256, metadata={"help": "Rank of VeRA's projections."})
    max_new_tokens: int = field(default=256, metadata={"help": "Longest answer to generate."})
    max_loss_ratio: float | None = field(
        default=None,
        metadata={
            "help": "Share of its loss that a client may have left after training, or it is an error. None: any."
        },
    )
    cross_evaluation: bool = field(
        default=False, metadata={"help": "Whether to print every adapter's loss on every client's rows."}
    )


def main(recipe_args, training_args, model_args) -> None:
    from launch import use_all_cores
    from smollm2 import REPOSITORY, smollm2_folder
    from trl import get_peft_config, get_quantization_config

    from hf_fedsa import FederatedTrainer, FedSAVeraConfig

    # Model and adapter
    model = model_args.model_name_or_path
    if model == REPOSITORY:
        with training_args.main_process_first():
            model, training_args.hub_base_model = str(smollm2_folder()), REPOSITORY
    use_all_cores(training_args)
    # Only what is copied to an accelerator can be pinned for it.
    training_args.dataloader_pin_memory &= training_args.device.type != "cpu"
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "dtype": model_args.dtype,
        "attn_implementation": model_args.attn_implementation,
    }
    if recipe_args.adapter == "vera":
        peft_config = FedSAVeraConfig(
            r=recipe_args.vera_r, target_modules=model_args.lora_target_modules, task_type="CAUSAL_LM"
        )
    else:
        model_args.use_peft = True
        peft_config = get_peft_config(model_args)

    # Data. Clients that public rows are dealt to have nothing to hide.
    train, evaluation, readers = make_clients(recipe_args, training_args.seed)
    if training_args.hub_clients is None and recipe_args.test_file is None:
        training_args.hub_clients = ["all"]
    trainer = FederatedTrainer(
        model=model,
        args=training_args,
        train_dataset={name: as_prompts(rows) for name, rows in train.items()},
        eval_dataset={name: as_prompts(rows) for name, rows in evaluation.items()},
        peft_config=peft_config,
        quantization_config=get_quantization_config(model_args),
    )

    # Before, training, after
    def announce(text: str) -> None:
        if trainer.is_world_process_zero():
            print(text, flush=True)

    announce(f"Loss of {len(train)} clients on their held-out rows, before they train")
    before = losses(trainer)
    announce("\nTraining")
    checkpoint = training_args.resume_from_checkpoint
    trainer.train(resume_from_checkpoint=True if str(checkpoint).lower() == "true" else checkpoint)
    trainer.save_model()
    announce("\nLoss and answers of each client on its held-out rows, with its own adapter")
    after = losses(trainer)
    matches = exact_match(trainer, evaluation, readers, recipe_args.max_new_tokens)

    # Report
    cross = cross_table(trainer) if recipe_args.cross_evaluation else None
    announce(results_table(trainer, before, after, matches))
    if cross is not None:
        announce(cross)
    announce(f"Personalised adapters: {Path(training_args.output_dir) / 'clients'}")
    if training_args.push_to_hub:
        announce(f"On the Hub: {trainer.hub_model_id}")
    if recipe_args.max_loss_ratio is not None:
        check_that_all_have_learned(before, after, recipe_args.max_loss_ratio)
        announce(f"Every client has at most {recipe_args.max_loss_ratio:.0%} of its loss left.")


# Data


def make_clients(args: GSM8KArguments, seed: int):
    """Returns training rows, held-out rows and a reader of the final result, each by client."""
    from datasets import load_dataset

    from hf_fedsa import partition_iid

    if args.dataset_name == GENERATED:
        from word_problems import STYLES, make_clients

        train, evaluation = make_clients(args.examples_per_client or 256, args.eval_examples_per_client, seed=seed)
        return train, evaluation, {style.name: style.read for style in STYLES}

    if args.dataset_name.endswith((".jsonl", ".json")):
        if args.test_file is None:
            raise ValueError("`test_file` is missing: exact match needs held-out rows beside `dataset_name`.")
        files = {"train": args.dataset_name, "test": args.test_file}
        splits = load_dataset("json", data_files=files)
    else:
        splits = load_dataset(args.dataset_name, "main")

    def take(rows, per_client):
        total = len(rows) if per_client is None else min(len(rows), per_client * args.num_clients)
        return rows.shuffle(seed=seed).select(range(total))

    train, evaluation = partition_iid(
        take(splits["train"], args.examples_per_client),
        args.num_clients,
        seed=seed,
        eval_dataset=take(splits["test"], args.eval_examples_per_client),
    )
    names = list(train)
    formats = list(FORMATS.values()) if args.answer_formats else [FORMATS["gsm8k"]]
    readers = {}
    for i, name in enumerate(names):
        write, readers[name] = formats[i % len(formats)]
        for split in (train, evaluation):
            split[name] = split[name].map(lambda row, write=write: {"answer": write(*parse_gsm8k(row["answer"]))})
    return train, evaluation, readers


def parse_gsm8k(answer: str) -> tuple[str, str]:
    """Splits a GSM8K answer into its steps, without the calculator marks, and its result."""
    steps, _, result = answer.rpartition("\n#### ")
    return re.sub(r"<<.*?>>", "", steps), result.strip().replace(",", "")


def last_match(pattern: str) -> Callable[[str], str | None]:
    compiled = re.compile(pattern)

    def read(text: str) -> str | None:
        found = compiled.findall(text)
        return found[-1].replace(",", "").rstrip(".") if found else None

    return read


NUMBER = r"(-?\d[\d,]*\.?\d*)"
# Ways to write an answer, and to read the result from one written that way.
FORMATS: dict[str, tuple[Callable[[str, str], str], Callable[[str], str | None]]] = {
    "gsm8k": (lambda steps, result: f"{steps}\n#### {result}", last_match(rf"#### {NUMBER}")),
    "result_first": (lambda steps, result: f"RESULT = {result}\n{steps}", last_match(rf"RESULT = {NUMBER}")),
    "tagged": (
        lambda steps, result: f"<work>\n{steps}\n</work><result>{result}</result>",
        last_match(rf"<result>{NUMBER}</result>"),
    ),
}


def prompt_of(question: str) -> str:
    return f"Question: {question}\nAnswer:"


def as_prompts(rows):
    """GSM8K rows as TRL's prompt-completion rows, so that only the answer counts for the loss."""
    return rows.map(
        lambda row: {"prompt": prompt_of(row["question"]), "completion": " " + row["answer"]},
        remove_columns=rows.column_names,
    )


# Measuring


def losses(trainer) -> dict[str, float]:
    """Loss of every client on its held-out rows, with its own adapter."""
    metrics = trainer.evaluate()
    return {client_id: metrics[f"eval_{client_id}_loss"] for client_id in trainer.eval_dataset}


def exact_match(trainer, evaluation, readers, max_new_tokens: int) -> dict[str, list[bool]]:
    """Per client, whether the result that each answer to a held-out row states is the right one."""
    matches = {}
    for client_id in trainer.eval_dataset:
        rows, read = evaluation[client_id], readers[client_id]
        with trainer.use_client(client_id) as model:
            prompts = [prompt_of(question) for question in rows["question"]]
            texts = generate(model, trainer.processing_class, prompts, max_new_tokens)
        matches[client_id] = [read(text) == read(answer) for text, answer in zip(texts, rows["answer"], strict=True)]
    return matches


def check_that_all_have_learned(before: dict[str, float], after: dict[str, float], max_ratio: float) -> None:
    # Not `>`: a loss that is no number has not fallen.
    failed = [client_id for client_id in before if not after[client_id] <= max_ratio * before[client_id]]
    if failed:
        changes = ", ".join(f"{c} from {before[c]:.3f} to {after[c]:.3f}" for c in failed)
        raise SystemExit(f"Not all clients have learned (`max_loss_ratio={max_ratio}`): {changes}.")


def generate(model, tokenizer, prompts, max_new_tokens: int, batch_size: int = 32) -> list[str]:
    """Greedy answers to prompts, in batches."""
    import torch

    model.eval()
    texts = []
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        inputs = tokenizer(batch, return_tensors="pt", padding=True, padding_side="left").to(model.device)
        with torch.inference_mode():
            output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        texts += tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts


# Report


def results_table(trainer, before: dict[str, float], after: dict[str, float], matches: dict[str, list[bool]]) -> str:
    """Per client: loss before and after, exact match with its standard error, and the bytes that left it."""
    sent = dict.fromkeys(trainer.client_ids, 0)
    for entry in trainer.round_history:
        for client_id in entry["clients"]:
            sent[client_id] += entry["bytes_up"] // len(entry["clients"])
    rows = [["client", "loss before", "loss after", "exact match ± standard error", "bytes that left"]]
    for client_id, hits in matches.items():
        share = sum(hits) / len(hits)
        error = math.sqrt(share * (1 - share) / len(hits))
        rows.append(
            [
                client_id,
                f"{before[client_id]:.3f}",
                f"{after[client_id]:.3f}",
                f"{sum(hits)} of {len(hits)}, {share:.1%} ± {error:.1%}",
                f"{sent[client_id]:,}",
            ]
        )
    return "\n" + format_table(rows)


def cross_table(trainer) -> str:
    """Loss of every client's adapter (across) on every client's held-out rows (down)."""
    clients = list(trainer.eval_dataset)
    rows = [["loss on rows of", *(f"adapter of {client_id}" for client_id in clients)]]
    for owner in clients:
        # Each client is evaluated with its own adapter, here on rows that are another's.
        metrics = trainer.evaluate(dict.fromkeys(clients, trainer.eval_dataset[owner]), metric_key_prefix="cross")
        rows.append([owner, *(f"{metrics[f'cross_{other}_loss']:.3f}" for other in clients)])
    return "\n" + format_table(rows)


def format_table(rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    )


def make_parser():
    from trl import ModelConfig, TrlParser

    from hf_fedsa import FederatedConfig

    return TrlParser((GSM8KArguments, FederatedConfig, ModelConfig))


if __name__ == "__main__":
    from launch import quiet_libraries

    quiet_libraries()
    main(*make_parser().parse_args_and_config())
