"""The model card of a saved or published federation."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import ModelCardData

from ..methods import METHODS
from ..metrics import over_clients

_CITATION = """\
@inproceedings{guo2025selective,
    title     = {Selective Aggregation for Low-Rank Adaptation in Federated Learning},
    author    = {Pengxin Guo and Shuang Zeng and Yanran Wang and Huijie Fan and Feifei Wang and Liangqiong Qu},
    booktitle = {International Conference on Learning Representations},
    year      = {2025},
    url       = {https://arxiv.org/abs/2410.01463}
}"""

_KINDS = {"lora": "LoRA", "rslora": "rsLoRA", "dora": "DoRA", "vera": "VeRA"}
# By the adapter's task: the Hub's name for it, and the class of the base model.
TASKS = {
    "SEQ_CLS": ("text-classification", "AutoModelForSequenceClassification"),
    "TOKEN_CLS": ("token-classification", "AutoModelForTokenClassification"),
    "QUESTION_ANS": ("question-answering", "AutoModelForQuestionAnswering"),
    "SEQ_2_SEQ_LM": ("text2text-generation", "AutoModelForSeq2SeqLM"),
    "FEATURE_EXTRACTION": ("feature-extraction", "AutoModel"),
    "CAUSAL_LM": ("text-generation", "AutoModelForCausalLM"),
    None: ("text-generation", "AutoModelForCausalLM"),
}


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
    name = federation["card"].get("model_name") or (repo_id or f"{_kind(federation)} federation").split("/")[-1]
    parts = [
        f"---\n{_metadata(federation).to_yaml()}\n---",
        f"# {name}",
        _introduction(federation, "here" if repo_id else "in this folder"),
        _sharing_section(federation, rounds),
        _results_section(federation),
        _loading_section(federation, repo_id or "path/to/this/folder"),
        _training_section(federation),
        f"## Citation\n\n```bibtex\n{_CITATION}\n```" if federation["method"] == "fedsa" else "",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def card_entries(
    model_name: str | None = None,
    dataset_name: str | list[str] | None = None,
    tags: str | list[str] | None = None,
    language: str | list[str] | None = None,
    license: str | None = None,
) -> dict[str, Any]:
    """What a user says of a federation for its card, as `federation.json` holds it."""
    entries = {
        "model_name": model_name,
        "dataset_name": dataset_name,
        "tags": [tags] if isinstance(tags, str) else tags,
        "language": language,
        "license": license,
    }
    return {name: value for name, value in entries.items() if value is not None}


def summarize(values: Sequence[float]) -> dict[str, float]:
    """Mean, population standard deviation, extremes and number of a metric over clients."""
    return {**over_clients(values), "clients": len(values)}


def _metadata(federation: Mapping[str, Any]) -> ModelCardData:
    card = federation["card"]
    base = federation["hub_base_model"]
    relation = {"base_model_relation": "adapter"} if base else {}
    return ModelCardData(
        base_model=base,
        library_name="peft",
        pipeline_tag=TASKS[federation["task_type"]][0],
        language=card.get("language"),
        license=card.get("license"),
        datasets=card.get("dataset_name"),
        tags=sorted(
            {"hf_fedsa", "federated-learning", federation["method"], federation["adapter_kind"], *card.get("tags", ())}
        ),
        **relation,
    )


def _kind(federation: Mapping[str, Any]) -> str:
    return _KINDS.get(federation["adapter_kind"], federation["adapter_kind"])


def _method(federation: Mapping[str, Any]) -> str:
    """The method's name, with a link to its paper. One that is not known here is called as in `federation.json`."""
    method = METHODS.get(federation["method"])
    title = (method and method.title) or federation["method"]
    return f"[{title}]({method.reference})" if method and method.reference else title


def _base_link(federation: Mapping[str, Any]) -> str:
    base = federation["hub_base_model"]
    return f"[{base}](https://huggingface.co/{base})" if base else "a base model that is not on the Hub"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _introduction(federation: Mapping[str, Any], where: str) -> str:
    joined = len(_joined_later(federation))
    number, published = federation["num_clients"], len(_published(federation))
    if federation["client_repositories"]:
        which = "Adapters of clients are in private repositories of their own, named after this one and the client."
    elif not published:
        which = f"No client's adapter is {where}."
    elif published < number:
        which = f"The {'adapter' if published == 1 else 'adapters'} of {_count(published, 'client')} "
        which += f"{'is' if published == 1 else 'are'} {where}."
    else:
        which = f"The {'adapter of the client is' if number == 1 else 'adapters of all clients are'} {where}."
    which = f"{joined} joined later. {which}" if joined else which
    return (
        f"{_kind(federation)} adapters of {_base_link(federation)}, trained by {_count(number - joined, 'client')} "
        f"in {_count(federation['rounds_done'], 'round')} of {_method(federation)}, each client on its own rows. "
        f"{which}"
    )


def _sharing_section(federation: Mapping[str, Any], rounds: Sequence[Mapping[str, Any]]) -> str:
    shared = ", ".join(f"`{name}`" for name in federation["shared_tensors"])
    local = ", ".join(f"`{name}`" for name in federation["local_tensors"])
    lines = [
        "## What was shared",
        "",
        "| averaged between rounds | kept by each client |",
        "|---|---|",
        f"| {shared or 'nothing'} | {local or 'nothing'} |",
    ]
    if federation["adapter"].get("modules_to_save"):
        modules = ", ".join(f"`{name}`" for name in federation["adapter"]["modules_to_save"])
        heads = "are averaged too" if federation["share_modules_to_save"] else "stay with the client"
        lines += ["", f"Modules trained in full ({modules}) {heads}."]
    if rounds:
        last = rounds[-1]
        number = last.get("num_clients", len(last["clients"]))
        lines += [
            "",
            f"In the last round {_count(number, 'client')} received {_count(last['bytes_down'], 'byte')} in total and "
            f"sent {_count(last['bytes_up'], 'byte')}.",
        ]
    lines += [
        "",
        "What is shared leaves the clients. It is computed from their data and carries information about it. Keeping "
        "the rest is not a privacy guarantee: that takes secure aggregation or differential privacy, and hf_fedsa "
        "applies neither. A client's complete adapter also holds what the client kept back in training.",
    ]
    return "\n".join(lines)


def _results_section(federation: Mapping[str, Any]) -> str:
    summary = federation["results"]
    named = {c: entry for c, entry in federation["clients"].items() if entry.get("results")}
    names = sorted(summary.keys() | {name for entry in named.values() for name in entry["results"]})
    if not names:
        return ""
    joined_later = _joined_later(federation)
    lines = ["## Results", "", f"| client | training rows | {' | '.join(names)} |", "|---|---|" + "---|" * len(names)]
    for client_id in sorted(named, key=_natural):
        entry = named[client_id]
        label = f"{client_id} (joined later)" if client_id in joined_later else client_id
        values = [_number(entry["results"].get(name)) for name in names]
        lines.append(f"| {label} | {_number(entry['num_examples'])} | {' | '.join(values)} |")
    number = max((entry["clients"] for entry in summary.values()), default=0)
    labels = {"mean": "**mean**", "std": "standard deviation", "min": "smallest", "max": "largest"}
    for key, label in labels.items():
        if number > 1 and all(key in entry for entry in summary.values()):
            values = [_number(summary.get(name, {}).get(key)) for name in names]
            lines.append(f"| {label} | | {' | '.join(values)} |")
    after = federation["results_after_round"]
    text = "Each client with its own adapter on its own held-out rows"
    if not summary:
        text += "."
    else:
        text += f", after {_count(after, 'round')}." if after else ", before training."
        text += " The adapters were trained further since." if after < federation["rounds_done"] else ""
    if number > 1:
        text += f" Mean and spread are over {_count(number, 'client')}"
        text += " of the first training." if joined_later & named.keys() else "."
    return "\n".join([*lines, "", text])


def _joined_later(federation: Mapping[str, Any]) -> set[str]:
    """The newcomers among the clients, unless the federation has no others."""
    joined = {client_id for client_id, entry in federation["clients"].items() if entry.get("joined")}
    return joined if federation["num_clients"] > len(joined) else set()


def _loading_section(federation: Mapping[str, Any], source: str) -> str:
    published = sorted(_published(federation), key=_natural)
    base = federation["hub_base_model"]
    ours = "" if base else ', base_model="path/to/the/base/model"'
    parts = ["## How to load it"]
    if published:
        client_id = published[0]
        path = federation["clients"][client_id]["path"]
        subfolder = f', subfolder="{path}"' if path else ""
        kind = TASKS[federation["task_type"]][1]
        parts += [
            "A client's model, with hf_fedsa:",
            f"```python\nfrom hf_fedsa import load_personalized_model\n\n"
            f'model = load_personalized_model("{source}", client_id="{client_id}"{ours})\n```',
            "or with PEFT alone:",
            f"```python\nfrom peft import PeftModel\nfrom transformers import {kind}\n\n"
            f"base = {kind}.from_pretrained(\n"
            f'    "{base or "path/to/the/base/model"}", dtype="{federation["base_dtype"]}"\n)\n'
            f'model = PeftModel.from_pretrained(base, "{source}"{subfolder})\n```',
        ]
        if federation["quantization_config"]:
            settings = json.dumps(federation["quantization_config"], indent=2, sort_keys=True)
            parts.append(
                "The base was quantized in training. To have it so again, pass to either a `quantization_config` made "
                f"from\n\n```json\n{settings}\n```"
            )
        parts.append(
            f'`AutoTokenizer.from_pretrained("{source}")` loads the tokenizer.'
            if federation["processing_files"]
            else ""
        )
    elif federation["client_repositories"]:
        parts.append(
            "A client's model, for those who may read its repository:\n\n"
            f"```python\nfrom hf_fedsa import load_personalized_model\n\n"
            f'model = load_personalized_model("{source}", client_id="...")\n```'
        )
    # A client's own repository has its adapter at the root, and no shared tensors apart from it.
    can_be_joined = not published or federation["clients"][published[0]]["path"]
    if can_be_joined and not federation["mutates_base"] and federation["task_type"] in (None, "CAUSAL_LM"):
        model = "" if base else ', model="path/to/the/base/model"'
        parts.append(
            "A new client starts from the shared tensors and trains its own:\n\n"
            "```python\nfrom hf_fedsa import FederatedTrainer\n\n"
            f'newcomer = FederatedTrainer.from_shared("{source}", train_dataset=rows, client_id="..."{model})\n'
            "newcomer.train()\n```"
        )
    return "\n\n".join(part for part in parts if part)


def _training_section(federation: Mapping[str, Any]) -> str:
    rows = {**federation["adapter"], **federation["arguments"]}
    lines = ["## Training", "", "| argument | value |", "|---|---|"]
    lines += [
        f"| `{name}` | {_modules(value) if name == 'target_modules' else _cell(value)} |"
        for name, value in rows.items()
        if value is not False and value not in (None, "", [], {})
    ]
    lines += ["", "Versions: " + ", ".join(f"{name} {v}" for name, v in federation["versions"].items()) + "."]
    return "\n".join(lines)


def _published(federation: Mapping[str, Any]) -> list[str]:
    return [client_id for client_id, entry in federation["clients"].items() if entry.get("path") is not None]


def _natural(client_id: str) -> list[tuple[int, str]]:
    """Orders `client_2` before `client_10`."""
    return [(int(part) if part.isdigit() else 0, part) for part in re.split(r"(\d+)", client_id)]


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if isinstance(value, int) or abs(value) >= 1000 else f"{value:.4g}"


def _modules(names: Any) -> str:
    """Module names, without the layers where all layers have the same. PEFT writes "all-linear" out layer by layer."""
    if not isinstance(names, list):
        return _cell(names)
    last = sorted({name.rpartition(".")[2] for name in names})
    layers = {found[0] for name in names if (found := re.findall(r"\.(\d+)\.", name))}
    whole = layers and len(names) == len(last) * len(layers)
    return f"{_cell(last)} in {_count(len(layers), 'layer')}" if whole else _cell(names)


def _cell(value: Any) -> str:
    text = ", ".join(f"`{item}`" for item in value) if isinstance(value, list) else f"`{value}`"
    return " ".join(text.split()).replace("|", "\\|")
