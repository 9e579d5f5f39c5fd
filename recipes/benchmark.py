"""
Time and memory of a federation's steps, against the same rows without one.

```bash
make benchmark    # everything, on SmolLM2-135M, to runs/benchmark.json and .png; an hour on two cores
python recipes/benchmark.py --tokens 64 --batch_sizes 1 --side_by_side --output benchmark.json    # one setting
python recipes/benchmark.py --rows train.jsonl  # and the padding of real rows
```

For every precision, row length and batch size, five ways to train one batch of every client take turns in one process:

- `side_by_side`: `FederatedTrainer`, all clients in one forward pass;
- `one_by_one`: `FederatedTrainer` with `parallel_clients=1`;
- `rebuilt`: a new `SFTTrainer` for every client and round on one model, into which the client's adapter is written;
- `sft`: `SFTTrainer`, the rows of all clients as one batch of one adapter;
- `torch`: a loop in plain torch over the same batch, with no Trainer at all.

A step is one batch of every client, so of `one_by_one` and `rebuilt` it is one step of each client. A round is ten
steps and what comes between them: building trainers, loading, averaging and storing clients, logging.

Then, each in a fresh process, throughput and peak memory by the number of clients side by side. Compare ratios of one
run on a machine that does nothing else: absolute times vary. `median [min, max]` are over the steps of all turns.
"""

import argparse
import gc
import json
import math
import multiprocessing
import os
import platform
import resource
import statistics
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

from smollm2 import smollm2_folder

# A round of this many local steps is what round times are given for.
STEPS_PER_ROUND = 10

# Steps of one kind that differ by more than this are not to be trusted.
NOISY = 1.5


@dataclass(frozen=True)
class Setting:
    """What is trained: `clients` times `batch_size` rows of `tokens` tokens per step."""

    model: str
    precision: str
    tokens: int
    batch_size: int
    clients: int

    @property
    def tokens_per_step(self) -> int:
        return self.clients * self.batch_size * self.tokens

    def __str__(self) -> str:
        return f"{self.precision}, {self.clients} clients x {self.batch_size} x {self.tokens} tokens"


@dataclass
class Timing:
    """Seconds per batch of every client, and per round besides its steps: loading, averaging, storing, building."""

    steps: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)

    def add(self, other: "Timing") -> None:
        self.steps += other.steps
        self.between += other.between

    @property
    def round_seconds(self) -> float:
        return STEPS_PER_ROUND * statistics.median(self.steps) + statistics.median(self.between or [0.0])

    def summary(self) -> dict[str, float | list[float]]:
        steps = {"median": statistics.median(self.steps), "min": min(self.steps), "max": max(self.steps)}
        between = statistics.median(self.between) if self.between else None
        return {**steps, "seconds": self.steps, "between_steps_of_a_round": between, "round": self.round_seconds}


def main(args: argparse.Namespace) -> dict:
    from hf_fedsa.files import write_json

    if args.steps < 2:
        raise ValueError(f"`--steps {args.steps}` leaves none to time, as the first one warms up. Pass 2 or more.")
    model = args.model or str(smollm2_folder())
    report = {"machine": describe_machine(), "steps": [], "scaling": [], "padding": []}

    def add(kind: str, result: dict, text: str) -> None:
        report[kind].append(result)
        print(text, flush=True)
        if args.output:  # Each time, so that a run that is stopped leaves what it has measured.
            write_json(Path(args.output), report)

    for precision in args.precisions:
        for batch_size in args.batch_sizes:
            for tokens in args.tokens:
                setting = Setting(model, precision, tokens, batch_size, args.clients)
                result = compare(setting, args.steps, args.repeats)
                add("steps", result, format_steps(result))
    for precision in args.precisions:
        for clients in args.side_by_side:
            setting = Setting(model, precision, args.tokens[0], args.batch_sizes[0], clients)
            result = measure_scaling(setting, args.steps)
            add("scaling", result, format_scaling(result))
    if args.rows:
        for batch_size in args.batch_sizes:
            result = measure_padding(model, args.rows, args.clients, batch_size)
            add("padding", result, format_padding(result))
    if args.plot:
        plot(report, args.plot)
    return report


def describe_machine() -> dict[str, str | int]:
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    return {"device": device, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "torch": torch.__version__}


# Steps


def compare(setting: Setting, steps: int, repeats: int) -> dict:
    """Runs all ways of training in turns, `repeats` times each."""
    timings = {name: Timing() for name in WAYS}
    for _ in range(repeats):
        for name, run in WAYS.items():
            timings[name].add(run(setting, steps))
            gc.collect()
    floor, ours = timings["torch"], timings["side_by_side"]
    return {
        "setting": asdict(setting),
        "ways": {name: timing.summary() for name, timing in timings.items()},
        "side_by_side_over_torch": statistics.median(ours.steps) / statistics.median(floor.steps),
        "side_by_side_over_sft": statistics.median(ours.steps) / statistics.median(timings["sft"].steps),
        "one_by_one_over_side_by_side": timings["one_by_one"].round_seconds / ours.round_seconds,
        "rebuilt_over_side_by_side": timings["rebuilt"].round_seconds / ours.round_seconds,
        "fraction_of_round_between_steps": statistics.median(ours.between) / ours.round_seconds,
    }


def run_side_by_side(setting: Setting, steps: int) -> Timing:
    return run_federated(setting, steps, parallel_clients=setting.clients)


def run_one_by_one(setting: Setting, steps: int) -> Timing:
    timing = run_federated(setting, steps, parallel_clients=1)
    pairs = range(0, len(timing.steps) - setting.clients + 1, setting.clients)
    return Timing([sum(timing.steps[i : i + setting.clients]) for i in pairs], timing.between)


def run_federated(setting: Setting, steps: int, parallel_clients: int) -> Timing:
    """Two rounds, of which the first warms up."""
    trainer = make_federated(setting, steps, parallel_clients)
    watch = Stopwatch.on(trainer)
    trainer.train()
    per_round = steps * math.ceil(setting.clients / parallel_clients)
    return Timing(watch.steps[per_round:], [sum(watch.boundaries[per_round:])])


def run_rebuilt(setting: Setting, steps: int) -> Timing:
    """The common way: one model, one trainer per client and round. The first client warms up."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from trl import SFTTrainer

    model = make_peft_model(setting)
    start = {key: tensor.clone() for key, tensor in get_peft_model_state_dict(model).items()}
    rows = make_rows(setting, steps)
    clients, step_seconds, apart = [dict(start) for _ in range(setting.clients)], [], []
    for i in [0, *range(setting.clients)]:
        began = time.perf_counter()
        set_peft_model_state_dict(model, clients[i])
        batch = {"per_device_train_batch_size": setting.batch_size, "max_steps": steps}
        trainer = SFTTrainer(model=model, args=make_arguments(batch), train_dataset=rows.shard(setting.clients, i))
        watch = Stopwatch.on(trainer)
        trainer.train()
        clients[i] = {key: tensor.clone() for key, tensor in get_peft_model_state_dict(model).items()}
        apart.append(time.perf_counter() - began - steps * statistics.median(watch.steps[1:]))
        step_seconds.append(watch.steps[1:])
    began = time.perf_counter()
    shared = [key for key in start if "lora_A" in key]
    mean = {key: sum(client[key] for client in clients) / len(clients) for key in shared}
    clients = [{**client, **mean} for client in clients]
    averaging = time.perf_counter() - began
    return Timing([sum(step) for step in zip(*step_seconds[1:], strict=True)], [sum(apart[1:]) + averaging])


def run_sft(setting: Setting, steps: int) -> Timing:
    from trl import SFTTrainer

    batch = {"per_device_train_batch_size": setting.clients * setting.batch_size, "max_steps": steps}
    trainer = SFTTrainer(args=make_arguments(batch), train_dataset=make_rows(setting, steps), **make_model(setting))
    watch = Stopwatch.on(trainer)
    trainer.train()
    return Timing(watch.steps[1:])


def run_torch(setting: Setting, steps: int) -> Timing:
    import torch

    model = make_peft_model(setting).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=5e-5, weight_decay=0.0, fused=True)
    rows = torch.tensor(make_rows(setting, steps)["input_ids"]).split(setting.clients * setting.batch_size)
    forget_peak_memory()
    ends = [time.perf_counter()]
    for input_ids in rows:
        input_ids = input_ids.to(model.device)
        loss = model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), labels=input_ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()  # As every Trainer does to log it. On a GPU, the step has ended then.
        ends.append(time.perf_counter())
    return Timing([end - begin for begin, end in zip(ends[1:], ends[2:], strict=False)])


WAYS = {
    "side_by_side": run_side_by_side,
    "one_by_one": run_one_by_one,
    "rebuilt": run_rebuilt,
    "sft": run_sft,
    "torch": run_torch,
}


class Stopwatch:
    """
    Times a Trainer's steps by two callbacks, one before and one after all others.

    `steps` has the seconds from one step's end to the next one's, without `boundaries`, which has those that the other
    callbacks took in that step. Loading, storing and averaging clients are done in callbacks.
    """

    def __init__(self):
        self.steps: list[float] = []
        self.boundaries: list[float] = []
        self.ended = self.entered = self.in_callbacks = 0.0

    @classmethod
    def on(cls, trainer) -> "Stopwatch":
        from transformers import PrinterCallback, TrainerCallback

        watch = cls()
        trainer.remove_callback(PrinterCallback)

        class First(TrainerCallback):
            def on_train_begin(self, *args, **kwargs):
                forget_peak_memory()
                watch.ended = time.perf_counter()

            def on_step_begin(self, *args, **kwargs):
                watch.entered = time.perf_counter()

            on_step_end = on_step_begin

        class Last(TrainerCallback):
            def on_step_begin(self, *args, **kwargs):
                watch.in_callbacks = time.perf_counter() - watch.entered

            def on_step_end(self, *args, **kwargs):
                now = time.perf_counter()
                watch.in_callbacks += now - watch.entered
                watch.steps.append(now - watch.ended - watch.in_callbacks)
                watch.boundaries.append(watch.in_callbacks)
                watch.ended = now

        trainer.callback_handler.callbacks.insert(0, First())
        trainer.add_callback(Last())
        return watch


# Models, arguments and rows


def make_federated(setting: Setting, steps: int, parallel_clients: int):
    from hf_fedsa import FederatedConfig, FederatedTrainer

    rounds = {"num_rounds": 2, "local_steps": steps, "parallel_clients": parallel_clients}
    batch = {"per_device_train_batch_size": setting.batch_size, **rounds}
    rows = make_rows(setting, steps)
    clients = {f"client_{i}": rows.shard(setting.clients, i) for i in range(setting.clients)}
    return FederatedTrainer(args=make_arguments(batch, FederatedConfig), train_dataset=clients, **make_model(setting))


def make_arguments(values: dict, config_class=None):
    from trl import SFTConfig

    return (config_class or SFTConfig)(
        output_dir=tempfile.mkdtemp(),
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        bf16=False,
        gradient_checkpointing=False,
        **values,
    )


def make_model(setting: Setting) -> dict:
    """A Trainer's arguments `model`, `quantization_config` and `peft_config`."""
    import torch
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantization = (
        BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4") if setting.precision == "nf4" else None
    )
    model = AutoModelForCausalLM.from_pretrained(
        setting.model, dtype=torch.float32, quantization_config=quantization, device_map=default_device()
    )
    adapter = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    return {"model": model, "peft_config": adapter}


def default_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def make_peft_model(setting: Setting):
    from peft import get_peft_model

    values = make_model(setting)
    return get_peft_model(values["model"], values["peft_config"])


def make_rows(setting: Setting, steps: int):
    """Rows of random token ids: what a step costs depends on their number alone."""
    import numpy as np
    from datasets import Dataset
    from transformers import AutoConfig

    vocabulary = AutoConfig.from_pretrained(setting.model).vocab_size
    shape = (setting.clients * setting.batch_size * steps, setting.tokens)
    ids = np.random.default_rng(0).integers(vocabulary, size=shape).tolist()
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


# Memory and throughput by the number of clients side by side


def measure_scaling(setting: Setting, steps: int) -> dict:
    """Each in a process of its own, as one process does not give back what it had."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
        federated, torch_ = (
            pool.submit(measure_one, setting, steps, way).result() for way in ("side_by_side", "torch")
        )
    return {
        "setting": asdict(setting),
        "tokens_per_second": setting.tokens_per_step / federated["step"],
        "torch_tokens_per_second": setting.tokens_per_step / torch_["step"],
        "peak_bytes": federated["peak_bytes"],
        "torch_peak_bytes": torch_["peak_bytes"],
    }


def measure_one(setting: Setting, steps: int, way: str) -> dict[str, float]:
    timing = WAYS[way](setting, steps)
    return {"step": statistics.median(timing.steps), "peak_bytes": peak_memory()}


def forget_peak_memory() -> None:
    """Peaks count from here, so not from loading the model. Where that cannot be had, they count from the start."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif (linux := Path("/proc/self/clear_refs")).exists():
        linux.write_text("5")


def peak_memory() -> int:
    """Bytes on the GPU, or resident bytes of the process."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if (linux := Path("/proc/self/status")).exists():
        entries = dict(line.split(":", 1) for line in linux.read_text().splitlines())
        return int(entries["VmHWM"].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)


# Padding


def measure_padding(model: str, file: str, clients: int, batch_size: int) -> dict:
    """Tokens that the batches of a pass over real rows hold, padding included."""
    from datasets import Dataset
    from peft import LoraConfig

    from hf_fedsa import FederatedConfig, FederatedTrainer, partition_iid

    texts = [" ".join(map(str, json.loads(line).values())) for line in Path(file).read_text().splitlines()]
    parts = partition_iid(Dataset.from_dict({"text": texts}), num_clients=clients, seed=0)
    tokens = {}
    for parallel in (1, clients):
        values = {
            "per_device_train_batch_size": batch_size,
            "num_rounds": 1,
            "local_epochs": 1,
            "parallel_clients": parallel,
            "max_length": None,
        }
        trainer = FederatedTrainer(
            model=model,
            args=make_arguments(values, FederatedConfig),
            train_dataset=parts,
            peft_config=LoraConfig(r=1, target_modules="all-linear"),
        )
        batches = [batch["attention_mask"] for batch in trainer.get_train_dataloader()]
        tokens[parallel] = sum(mask.numel() for mask in batches)
    real = int(sum(mask.sum() for mask in batches))
    return {
        "rows": len(texts),
        "clients": clients,
        "batch_size": batch_size,
        "real_tokens": real,
        "one_by_one_over_real": tokens[1] / real,
        "side_by_side_over_one_by_one": tokens[clients] / tokens[1],
    }


# Output


def format_steps(result: dict) -> str:
    lines = [str(Setting(**result["setting"]))]
    for name, way in result["ways"].items():
        lines.append(
            f"  {name:13s} step {way['median']:.3f} s [{way['min']:.3f}, {way['max']:.3f}]   "
            f"round of {STEPS_PER_ROUND} steps {way['round']:.2f} s"
        )
    over = {key: f"{result[key]:.2f} x" for key in result if "_over_" in key}
    lines += [
        f"  a step side by side takes {over['side_by_side_over_torch']} the time of torch, "
        f"{over['side_by_side_over_sft']} that of sft",
        f"  a round rebuilt takes {over['rebuilt_over_side_by_side']} the time of one side by side, one by one "
        f"{over['one_by_one_over_side_by_side']}",
        f"  {result['fraction_of_round_between_steps']:.1%} of a round side by side lies between its steps",
    ]
    noisy = [name for name, way in result["ways"].items() if way["max"] > NOISY * way["min"]]
    if noisy:
        lines.append(f"  NOISY: {', '.join(noisy)} varied by more than {NOISY} x. Is something else running?")
    return "\n".join(lines)


def format_scaling(result: dict) -> str:
    return (
        f"{Setting(**result['setting'])}: {result['tokens_per_second']:.0f} tokens per second (plain torch "
        f"{result['torch_tokens_per_second']:.0f}), peak {result['peak_bytes'] / 2**20:.0f} MiB (plain torch "
        f"{result['torch_peak_bytes'] / 2**20:.0f})"
    )


def format_padding(result: dict) -> str:
    return (
        f"{result['rows']} rows, {result['clients']} clients x {result['batch_size']}: batches of one client hold "
        f"{result['one_by_one_over_real']:.3f} x the rows' tokens, and side by side "
        f"{result['side_by_side_over_one_by_one']:.3f} x as many as that"
    )


def plot(report: dict, file: str) -> None:
    """Three panels: times relative to plain torch, throughput, and peak memory."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (times, throughput, memory) = pyplot.subplots(1, 3, figsize=(16, 5), layout="constrained")
    names = [name for name in WAYS if name != "torch"]
    for i, result in enumerate(report["steps"]):
        floor = result["ways"]["torch"]["round"]
        for j, name in enumerate(names):
            label = name.replace("_", " ") if i == 0 else None
            times.bar(i + 0.2 * j, result["ways"][name]["round"] / floor, width=0.18, color=f"C{j}", label=label)
    settings = [Setting(**result["setting"]) for result in report["steps"]]
    ticks = [f"{s.precision}\n{s.clients} x {s.batch_size} x {s.tokens}" for s in settings]
    times.set_xticks([i + 0.3 for i in range(len(ticks))], ticks, fontsize=8)
    times.axhline(1, color="black", linewidth=0.8)
    times.set(
        title=f"Round of {STEPS_PER_ROUND} steps", ylabel="time over plain torch's", xlabel="clients x rows x tokens"
    )
    for axes, entry, unit, title in (
        (throughput, "tokens_per_second", 1, "Throughput"),
        (memory, "peak_bytes", 2**30, "Peak memory"),
    ):
        for precision, results in by_precision(report["scaling"]):
            counts = [result["setting"]["clients"] for result in results]
            for name, style in ((entry, "o-"), (f"torch_{entry}", "x:")):
                label = f"{precision}, {'plain torch, as many rows' if name != entry else 'side by side'}"
                axes.plot(counts, [result[name] / unit for result in results], style, label=label)
        axes.set(title=title, xlabel="clients side by side", ylabel="GiB" if unit > 1 else "tokens per second", ylim=0)
    for axes in (times, throughput, memory):
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)


def by_precision(results: list[dict]) -> Iterator[tuple[str, list[dict]]]:
    for precision in dict.fromkeys(result["setting"]["precision"] for result in results):
        yield precision, [result for result in results if result["setting"]["precision"] == precision]


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", help="model name or folder; SmolLM2-135M-Instruct if left out")
    parser.add_argument(
        "--precisions", nargs="+", choices=["fp32", "nf4"], default=["fp32", "nf4"], help="of the base"
    )
    parser.add_argument("--tokens", nargs="+", type=int, default=[64, 128], help="tokens per row")
    parser.add_argument("--batch_sizes", nargs="+", type=int, default=[1, 4], help="rows per client and step")
    parser.add_argument("--clients", type=int, default=4, help="clients of a step")
    parser.add_argument("--steps", type=int, default=4, help="steps per client and turn")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each way to train")
    parser.add_argument(
        "--side_by_side",
        nargs="*",
        type=int,
        default=[1, 2, 4, 8],
        help="clients side by side to measure throughput and memory for; none if empty",
    )
    parser.add_argument("--rows", help="jsonl file with rows of text to measure the padding of")
    parser.add_argument("--output", help="JSON file to write")
    parser.add_argument("--plot", help="image file to write; needs matplotlib")
    return parser


if __name__ == "__main__":
    main(make_parser().parse_args())
