"""The model card of a saved or published federation."""

from collections.abc import Mapping, Sequence
from statistics import fmean, pstdev
from typing import Any

from huggingface_hub import ModelCardData

PAPER = "https://arxiv.org/abs/2410.01463"
_CITATION = """\
@inproceedings{guo2025selective,
    title     = {Selective Aggregation for Low-Rank Adaptation in Federated Learning},
    author    = {Pengxin Guo and Shuang Zeng and Yanran Wang and Huijie Fan and Feifei Wang and Liangqiong Qu},
    booktitle = {International Conference on Learning Representations},
    year      = {2025},
    url       = {https://arxiv.org/abs/2410.01463}
}"""

_METHODS = {"lora": "LoRA", "rslora": "rsLoRA", "dora": "DoRA", "vera": "VeRA"}
_PIPELINES = {
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
    "FEATURE_EXTRACTION": "feature-extraction",
}
_QUANTIZED = """
The base was quantized in training. Pass the same `quantization_config` to have it quantized again."""


def make_model_card(federation: Mapping[str, Any], rounds: Sequence[Mapping[str, Any]], repo_id: str | None) -> str:
    """
    Writes the model card.

    Args:
        federation (`Mapping[str, Any]`):
            Contents of `federation.json`. Only the clients it lists are named.
        rounds (`Sequence[Mapping[str, Any]]`):
            Lines of `rounds.jsonl`.
        repo_id (`str`, *optional*):
            Repository the card is for. `None` for a local folder.

    Returns:
        `str`: Markdown with a metadata header.
    """
    name = federation["card"].get("model_name") or (repo_id or "A federation").split("/")[-1]
    parts = [
        f"---\n{_metadata(federation).to_yaml()}\n---",
        f"# {name}",
        _introduction(federation),
        _sharing_section(federation, rounds),
        _results_section(federation),
        _loading_section(federation, repo_id or "path/to/this/folder"),
        _training_section(federation),
        f"## Citation\n\n```bibtex\n{_CITATION}\n```",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def summarize(values: Sequence[float]) -> dict[str, float]:
    """Mean, population standard deviation, extremes and number of a metric over clients."""
    return {
        "mean": fmean(values),
        "std": pstdev(values),
        "min": min(values),
        "max": max(values),
        "clients": len(values),
    }


def _metadata(federation: Mapping[str, Any]) -> ModelCardData:
    card = federation["card"]
    base = federation["hub_base_model"]
    relation = {"base_model_relation": "adapter"} if base else {}
    return ModelCardData(
        base_model=base,
        library_name="peft",
        pipeline_tag=_PIPELINES.get(federation["task_type"], "text-generation"),
        language=card.get("language"),
        license=card.get("license"),
        datasets=card.get("dataset_name"),
        tags=sorted({"hf_fedsa", "federated-learning", federation["method"], *card.get("tags", ())}),
        **relation,
    )


def _base_link(federation: Mapping[str, Any]) -> str:
    base = federation["hub_base_model"]
    if base is None:
        return "a base model that is not on the Hub"
    return f"[{base}](https://huggingface.co/{base})"


def _introduction(federation: Mapping[str, Any]) -> str:
    method = _METHODS.get(federation["method"], federation["method"])
    number, published = federation["num_clients"], _published(federation)
    clients = f"{number} client{'s' if number != 1 else ''}"
    if federation["client_repositories"]:
        where = "Each client's adapter is in a private repository of its own."
    elif not published:
        where = "No client's adapter is published here."
    elif len(published) == number:
        where = "The adapters of all clients are published here."
    else:
        where = f"The adapters of {len(published)} of them are published here."
    return (
        f"{method} adapters of {_base_link(federation)}, trained by {clients} in {federation['rounds_done']} rounds "
        f"with [FedSA-LoRA]({PAPER}), without pooling their data. {where}"
    )


def _sharing_section(federation: Mapping[str, Any], rounds: Sequence[Mapping[str, Any]]) -> str:
    shared = ", ".join(f"`{name}`" for name in federation["shared_tensors"])
    local = ", ".join(f"`{name}`" for name in federation["local_tensors"])
    heads = "are averaged too" if federation["share_modules_to_save"] else "stay with the client"
    lines = [
        "## What was shared",
        "",
        "| averaged between rounds | kept by each client |",
        "|---|---|",
        f"| {shared} | {local} |",
    ]
    if federation["adapter"].get("modules_to_save"):
        modules = ", ".join(f"`{name}`" for name in federation["adapter"]["modules_to_save"])
        lines += ["", f"Modules trained in full ({modules}) {heads}."]
    if rounds:
        last = rounds[-1]
        number = last.get("num_clients", len(last["clients"]))
        lines += [
            "",
            f"In the last round {number} client{'s' if number != 1 else ''} received {last['bytes_down']:,} bytes and "
            f"sent {last['bytes_up']:,} bytes in all.",
        ]
    lines += [
        "",
        "The shared tensors leave the clients. They are computed from the clients' data and carry information about "
        "it. Keeping the rest is not a privacy guarantee: that takes secure aggregation or differential privacy, "
        "which were not used here. Whoever publishes a client's complete adapter publishes more than training shared.",
    ]
    return "\n".join(lines)


def _results_section(federation: Mapping[str, Any]) -> str:
    summary = federation["results"]
    if not summary:
        return ""
    names = sorted(summary)
    header = ["client", "training rows", *names]
    lines = ["## Results", "", f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    for client_id, entry in federation["clients"].items():
        if entry.get("results"):
            values = [_number(entry["results"].get(name)) for name in names]
            lines.append(f"| {client_id} | {entry['num_examples']} | {' | '.join(values)} |")
    for label, key in (
        ("**mean**", "mean"),
        ("standard deviation", "std"),
        ("smallest", "min"),
        ("largest", "max"),
    ):
        lines.append(f"| {label} | | {' | '.join(_number(summary[name][key]) for name in names)} |")
    number = max(entry["clients"] for entry in summary.values())
    lines += [
        "",
        f"Each client with its own adapter on its own held-out rows, after round {federation['results_after_round']}. "
        f"Mean and spread are over {number} client{'s' if number != 1 else ''}.",
    ]
    if any(entry.get("joined") for entry in federation["clients"].values()):
        lines[-1] += " Clients that joined later are not counted in them."
    return "\n".join(lines)


def _loading_section(federation: Mapping[str, Any], source: str) -> str:
    published = _published(federation)
    parts = ["## How to load it"]
    if published:
        client_id = published[0]
        path = federation["clients"][client_id]["path"]
        subfolder = f', subfolder="{path}"' if path else ""
        base = federation["hub_base_model"] or "the base model"
        parts += [
            "A client's model, with hf_fedsa:",
            f"```python\nfrom hf_fedsa import load_personalized_model\n\n"
            f'model = load_personalized_model("{source}", client_id="{client_id}")\n```',
            "or with PEFT alone:",
            "```python\nfrom peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
            f'base = AutoModelForCausalLM.from_pretrained("{base}", dtype="{federation["base_dtype"]}")\n'
            f'model = PeftModel.from_pretrained(base, "{source}"{subfolder})\n```',
        ]
        if federation["quantized"]:
            parts.append(_QUANTIZED.strip())
    elif federation["client_repositories"]:
        parts.append(
            "A client's model, for those who may read its repository:\n\n"
            f"```python\nfrom hf_fedsa import load_personalized_model\n\n"
            f'model = load_personalized_model("{source}", client_id="...")\n```'
        )
    if not federation["mutates_base"]:
        parts.append(
            "A new client starts from the shared tensors and trains its own:\n\n"
            "```python\nfrom hf_fedsa import FederatedTrainer\n\n"
            f'newcomer = FederatedTrainer.from_shared("{source}", train_dataset=rows)\nnewcomer.train()\n```'
        )
    return "\n\n".join(parts)


def _training_section(federation: Mapping[str, Any]) -> str:
    adapter = dict(federation["adapter"])
    if isinstance(adapter.get("target_modules"), list):
        # PEFT writes "all-linear" out, layer by layer.
        adapter["target_modules"] = sorted({name.rpartition(".")[2] for name in adapter["target_modules"]})
    rows = {**adapter, **federation["arguments"]}
    lines = ["## Training", "", "| argument | value |", "|---|---|"]
    lines += [f"| `{name}` | {_cell(value)} |" for name, value in rows.items() if value not in (None, "", [], {})]
    lines += ["", "Versions: " + ", ".join(f"{name} {v}" for name, v in federation["versions"].items()) + "."]
    return "\n".join(lines)


def _published(federation: Mapping[str, Any]) -> list[str]:
    return [client_id for client_id, entry in federation["clients"].items() if entry.get("path") is not None]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _cell(value: Any) -> str:
    return ", ".join(f"`{item}`" for item in value) if isinstance(value, list) else f"`{value}`"
