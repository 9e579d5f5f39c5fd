"""The model card, and what decides whom and what it names."""

import ast
import copy
import json
import math
import re
import shutil

import pytest
import torch
from conftest import make_args, make_lora, make_model, make_rows, make_tokenizer
from huggingface_hub import ModelCard
from peft import LoraConfig, VeraConfig, get_peft_model
from transformers import BitsAndBytesConfig

from hf_fedsa import FederatedTrainer
from hf_fedsa.client.parameters import adapter_kind
from hf_fedsa.hub.card import make_model_card, summarize
from hf_fedsa.hub.publication import choose_clients, name_on_hub, only_named, summarize_results
from hf_fedsa.hub.saving import describe_federation
from hf_fedsa.methods import METHODS, Sharing

REPO = "me/fed"
TOKEN = "hf_a_token_that_is_nobodys"
QUANTIZATION = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_compute_dtype": "bfloat16"}

# Three clients with the losses 1, 2 and 6: the mean is 3, the variance (4 + 1 + 9) / 3. Their accuracies are 0.5, 0.25
# and 0.75: the mean is 0.5, the variance (0 + 1 + 1) / 16 / 3.
LOSS = {"mean": 3.0, "std": math.sqrt(14 / 3), "min": 1.0, "max": 6.0, "clients": 3}
ACCURACY = {"mean": 0.5, "std": math.sqrt(1 / 24), "min": 0.25, "max": 0.75, "clients": 3}


def make_client(client_id, num_examples=10, loss=None, accuracy=None, **changes):
    results = {"eval_loss": loss, "eval_accuracy": accuracy}
    return {
        "num_examples": num_examples,
        "path": f"clients/{client_id}",
        "results": {name: value for name, value in results.items() if value is not None},
        "joined": False,
        **changes,
    }


def make_clients(*client_ids, **changes):
    return {client_id: make_client(client_id, **changes) for client_id in client_ids}


def make_federation(**changes):
    """What the card reads of a `federation.json`."""
    clients = {
        "north": make_client("north", 11, 1.0, 0.5),
        "south": make_client("south", 22, 2.0, 0.25),
        "west": make_client("west", 33, 6.0, 0.75),
    }
    federation = {
        "card": {},
        "hub_base_model": "me/base",
        "task_type": None,
        "method": "fedsa",
        "adapter_kind": "lora",
        "clients": clients,
        "num_clients": len(changes.get("clients", clients)),
        "client_repositories": False,
        "rounds_done": 20,
        "shared_tensors": ["lora_A"],
        "local_tensors": ["lora_B"],
        "share_modules_to_save": False,
        "adapter": {"r": 4, "target_modules": ["k_proj", "q_proj"]},
        "arguments": {"local_steps": 7},
        "results": {"eval_loss": LOSS, "eval_accuracy": ACCURACY},
        "results_after_round": 19,
        "base_dtype": "bfloat16",
        "quantization_config": None,
        "processing_files": ["tokenizer.json", "tokenizer_config.json"],
        "mutates_base": False,
        "versions": {"hf_fedsa": "0.1.0", "peft": "0.21.2"},
    }
    return {**federation, **changes}


def make_round(round_index, losses, **changes):
    return {
        "round": round_index,
        "clients": list(losses),
        "losses": dict(losses),
        "weights": dict.fromkeys(losses, 2.0),
        "bytes_down": 300,
        "bytes_up": 200,
        "seconds": 1.5,
        "shared_sha256": "aa",
        **changes,
    }


def make_card(*, rounds=(), repo_id=REPO, **changes):
    return make_model_card(make_federation(**changes), rounds, repo_id)


def metadata(card):
    return ModelCard(card).data.to_dict()


def introduction(card):
    return ModelCard(card).text.partition("\n## ")[0]


def section(card, title):
    """Text under a heading, or `None` if there is no such heading."""
    found = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", card, re.MULTILINE | re.DOTALL)
    return found and found[1]


def table(card, title):
    """Header and rows of a section's table as lists of cells. All rows have as many cells as the header."""
    header, rule, *rows = [
        [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        for line in section(card, title).splitlines()
        if line.startswith("|")
    ]
    assert all(set(cell) == {"-"} for cell in rule)
    assert all(len(row) == len(header) for row in (rule, *rows))
    return header, rows


def code_blocks(card):
    return re.findall(r"^```python\n(.*?)^```", card, re.MULTILINE | re.DOTALL)


def calls(card):
    """Arguments of every call in the code of a card, by the name of what is called."""

    def value(node):
        return node.value if isinstance(node, ast.Constant) else ast.unparse(node)

    found = {}
    for block in code_blocks(card):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Call):
                arguments = {keyword.arg: value(keyword.value) for keyword in node.keywords}
                found[ast.unparse(node.func)] = ([value(argument) for argument in node.args], arguments)
    return found


class TestMetadata:
    def test_an_adapter_of_its_base(self):
        assert metadata(make_card()) == {
            "base_model": "me/base",
            "base_model_relation": "adapter",
            "library_name": "peft",
            "pipeline_tag": "text-generation",
            "tags": ["federated-learning", "fedsa", "hf_fedsa", "lora"],
        }

    @pytest.mark.parametrize(
        ("task_type", "pipeline"),
        [
            (None, "text-generation"),
            ("CAUSAL_LM", "text-generation"),
            ("SEQ_CLS", "text-classification"),
            ("SEQ_2_SEQ_LM", "text2text-generation"),
            ("TOKEN_CLS", "token-classification"),
            ("QUESTION_ANS", "question-answering"),
            ("FEATURE_EXTRACTION", "feature-extraction"),
        ],
    )
    def test_the_pipeline_is_that_of_the_task(self, task_type, pipeline):
        assert metadata(make_card(task_type=task_type))["pipeline_tag"] == pipeline

    def test_what_the_user_says_of_it(self):
        entries = {
            "license": "apache-2.0",
            "dataset_name": ["me/rows", "me/more_rows"],
            "language": ["en", "no"],  # YAML takes a bare `no` for false.
        }
        data = metadata(make_card(card=entries))
        assert data["license"] == "apache-2.0"
        assert data["datasets"] == ["me/rows", "me/more_rows"]
        assert data["language"] == ["en", "no"]

    def test_tags_of_the_user_are_sorted_in_and_none_is_there_twice(self):
        data = metadata(make_card(card={"tags": ["zebra", "maths", "hf_fedsa", "apple"]}, adapter_kind="dora"))
        assert data["tags"] == ["apple", "dora", "federated-learning", "fedsa", "hf_fedsa", "maths", "zebra"]

    def test_a_base_that_is_not_on_the_hub_is_not_linked(self):
        card = make_card(hub_base_model=None)
        assert metadata(card).keys() == {"library_name", "pipeline_tag", "tags"}
        assert "not on the Hub" in introduction(card)
        assert "huggingface.co" not in card
        assert "None" not in card
        assert "None" not in make_card(hub_base_model=None, repo_id=None)


class TestIntroduction:
    @pytest.mark.parametrize(
        ("repo_id", "entries", "title"),
        [
            ("me/fed", {}, "# fed"),
            (None, {}, "# LoRA federation"),
            ("me/fed", {"model_name": "Word problems"}, "# Word problems"),
            (None, {"model_name": "Word problems"}, "# Word problems"),
        ],
    )
    def test_the_title(self, repo_id, entries, title):
        assert introduction(make_card(repo_id=repo_id, card=entries)).strip().startswith(f"{title}\n")

    def test_the_base_the_clients_and_the_rounds(self):
        text = introduction(make_card())
        assert "[me/base](https://huggingface.co/me/base)" in text
        assert "by 3 clients" in text
        assert "in 20 rounds" in text
        assert "arxiv.org/abs/2410.01463" in text

    @pytest.mark.parametrize(
        ("method", "name"), [("lora", "LoRA"), ("rslora", "rsLoRA"), ("dora", "DoRA"), ("vera", "VeRA"), ("x", "x")]
    )
    def test_the_method(self, method, name):
        assert re.search(rf"^{name} adapters", introduction(make_card(adapter_kind=method)), re.MULTILINE)

    def test_clients_that_are_not_listed_are_counted(self):
        assert "by 40 clients" in introduction(make_card(num_clients=40))

    def test_a_federation_in_a_folder_is_named_after_its_method(self):
        assert introduction(make_card(repo_id=None, adapter_kind="dora")).strip().startswith("# DoRA federation\n")

    def test_one_client_is_singular(self):
        rounds = [make_round(0, {"north": 1.0})]
        results = {"eval_loss": {"mean": 1.0, "std": 0.0, "min": 1.0, "max": 1.0, "clients": 1}}
        card = make_card(clients=make_clients("north", loss=1.0), results=results, rounds=rounds)
        assert "by 1 client " in introduction(card)
        assert "The adapter of the client is here." in introduction(card)
        assert "1 client received" in section(card, "What was shared")
        assert "1 clients" not in card

    def test_one_round_is_singular(self):
        assert "in 1 round of" in introduction(make_card(rounds_done=1))
        assert "after 1 round." in section(make_card(rounds_done=1, results_after_round=1), "Results")

    def test_one_byte_is_singular(self):
        text = section(make_card(rounds=[make_round(0, {"a": 1.0}, bytes_down=1, bytes_up=1)]), "What was shared")
        assert "1 byte in total and sent 1 byte." in text

    def test_several_clients_are_plural(self):
        card = make_card(rounds=[make_round(0, {"north": 1.0, "west": 2.0})])
        assert "2 clients received" in section(card, "What was shared")
        assert "over 3 clients." in section(card, "Results")
        assert not re.search(r"[02-9] client\b", card)

    def test_which_adapters_are_published(self):
        two, hidden = make_clients("north", "south"), make_clients("west", path=None)
        assert "The adapters of all clients are here." in introduction(make_card(clients=two))
        for card in (make_card(clients={**two, **hidden}), make_card(clients=two, num_clients=5)):
            assert "The adapters of 2 clients are here." in introduction(card)
        for none in ({}, hidden):
            assert "No client's adapter is here." in introduction(make_card(clients=none, num_clients=5))

    def test_one_published_adapter_of_several_is_singular(self):
        assert "The adapter of 1 client is here." in introduction(make_card(clients=make_clients("a"), num_clients=5))

    def test_in_a_folder_adapters_are_in_the_folder(self):
        assert "The adapters of all clients are in this folder." in introduction(make_card(repo_id=None))
        card = make_card(repo_id=None, clients=make_clients("north"), num_clients=3)
        assert "The adapter of 1 client is in this folder." in introduction(card)

    def test_clients_that_joined_later_are_counted_apart(self):
        clients = make_clients("north", "south") | make_clients("clinic", joined=True)
        text = introduction(make_card(clients=clients, num_clients=5))
        assert "by 4 clients" in text
        assert "1 joined later." in text
        assert "joined" not in introduction(make_card())

    def test_a_federation_of_newcomers_alone_has_none_that_joined_later(self):
        text = introduction(make_card(clients=make_clients("clinic", "ward", joined=True)))
        assert "by 2 clients" in text
        assert "joined later" not in text

    def test_clients_with_private_repositories_of_their_own(self):
        text = introduction(make_card(clients={}, num_clients=3, client_repositories=True))
        assert "private repositories of their own, named after this one and the client" in text
        assert "here" not in text.split()
        assert "adapter is" not in text and "adapters of all" not in text


class TestWhatWasShared:
    def test_tensors_are_on_their_side_of_the_table(self):
        card = make_card(shared_tensors=["vera_lambda_d"], local_tensors=["vera_lambda_b", "score"])
        header, rows = table(card, "What was shared")
        assert "averaged" in header[0] and "kept" in header[1]
        assert rows == [["`vera_lambda_d`", "`vera_lambda_b`, `score`"]]

    def test_bytes_are_those_of_the_last_round(self):
        losses = {"north": 1.0, "south": 2.0}
        first = make_round(0, {"north": 1.0}, bytes_down=555, bytes_up=666)
        last = make_round(1, losses, bytes_down=12345678, bytes_up=9876)
        text = section(make_card(rounds=[first, last]), "What was shared")
        assert "2 clients received 12,345,678 bytes in total and sent 9,876 bytes." in text
        assert "555" not in text and "666" not in text

    def test_before_the_first_round_no_bytes_are_told(self):
        assert "bytes" not in make_card(rounds=[])

    def test_clients_of_the_last_round_that_are_not_named_are_counted(self):
        rounds = only_named([make_round(0, {"north": 1.0, "hidden": 2.0, "other": 3.0})], {"north"})
        card = make_card(rounds=rounds, clients=make_clients("north"), num_clients=9)
        assert "3 clients received" in section(card, "What was shared")
        assert "hidden" not in card

    @pytest.mark.parametrize(("shared", "words"), [(True, "averaged too"), (False, "stay with the client")])
    def test_modules_trained_in_full(self, shared, words):
        adapter = {"r": 4, "modules_to_save": ["score", "embed_tokens"]}
        text = section(make_card(adapter=adapter, share_modules_to_save=shared), "What was shared")
        line = next(line for line in text.splitlines() if "in full" in line)
        assert "`score`, `embed_tokens`" in line
        assert words in line

    def test_without_such_modules_nothing_is_said_of_them(self):
        assert "in full" not in make_card(share_modules_to_save=True)

    def test_what_leaves_the_clients_is_no_secret(self):
        text = section(make_card(), "What was shared")
        assert "What is shared leaves the clients." in text
        assert "carries information about it" in text
        assert "not a privacy guarantee" in text
        assert "secure aggregation or differential privacy, and hf_fedsa applies neither" in text
        assert "complete adapter also holds what the client kept back" in text


class TestResults:
    def test_summary_of_two_clients(self):
        assert summarize([1.0, 4.0]) == {"mean": 2.5, "std": 1.5, "min": 1.0, "max": 4.0, "clients": 2}

    def test_summary_of_three_clients(self):
        # Of the clients there are, not of a sample of them: the variance divides by 3.
        assert summarize([2.0, 6.0, 1.0]) == pytest.approx(LOSS)
        assert summarize([0.5, 0.25, 0.75]) == pytest.approx(ACCURACY)

    def test_summary_of_one_client(self):
        assert summarize([7]) == {"mean": 7.0, "std": 0.0, "min": 7, "max": 7, "clients": 1}

    def test_every_client_and_the_spread(self):
        header, rows = table(make_card(), "Results")
        assert header == ["client", "training rows", "eval_accuracy", "eval_loss"]
        assert [[cell.strip("*") for cell in row] for row in rows] == [
            ["north", "11", "0.5", "1"],
            ["south", "22", "0.25", "2"],
            ["west", "33", "0.75", "6"],
            ["mean", "", "0.5", "3"],
            ["standard deviation", "", "0.2041", "2.16"],
            ["smallest", "", "0.25", "1"],
            ["largest", "", "0.75", "6"],
        ]

    def test_the_round_they_are_of_and_the_clients_they_are_over(self):
        text = section(make_card(), "Results")
        assert "after 19 rounds." in text
        assert "over 3 clients." in text

    def test_training_that_went_on_after_the_evaluation_is_told(self):
        further = "The adapters were trained further since."
        assert further in section(make_card(rounds_done=20, results_after_round=19), "Results")
        assert further not in section(make_card(rounds_done=20, results_after_round=20), "Results")

    def test_an_evaluation_before_training_is_told(self):
        text = section(make_card(rounds_done=20, results_after_round=0), "Results")
        assert "before training. The adapters were trained further since." in text
        text = section(make_card(rounds_done=0, results_after_round=0), "Results")
        assert "before training." in text and "further" not in text

    def test_clients_are_in_natural_order(self):
        clients = make_clients("client_10", "client_2", "client_1", "b", "a10", "a9", loss=1.0)
        _, rows = table(make_card(clients=clients, results={}), "Results")
        assert [row[0] for row in rows] == ["a9", "a10", "b", "client_1", "client_2", "client_10"]

    def test_of_one_client_there_is_no_spread(self):
        results = {"eval_loss": {"mean": 1.0, "std": 0.0, "min": 1.0, "max": 1.0, "clients": 1}}
        card = make_card(clients=make_clients("north", loss=1.0), results=results)
        assert table(card, "Results")[1] == [["north", "10", "1"]]
        assert "Mean and spread" not in card

    def test_without_extremes_there_are_no_rows_of_them(self):
        loss = {name: LOSS[name] for name in ("mean", "std", "clients")}
        _, rows = table(make_card(results={"eval_loss": loss}, clients={}, num_clients=3), "Results")
        assert rows == [["**mean**", "", "3"], ["standard deviation", "", "2.16"]]

    @pytest.mark.parametrize(
        ("value", "shown"),
        [
            (12345, "12,345"),
            (7, "7"),
            (0, "0"),
            (12345.0, "12,345"),
            (-1234567.8, "-1,234,568"),
            (0.123456, "0.1235"),
            (0.5, "0.5"),
            (0.00001234, "1.234e-05"),
            (None, ""),
        ],
    )
    def test_numbers_are_short_and_whole_numbers_are_not_rounded(self, value, shown):
        clients = {"north": make_client("north", 1234567, results={"eval_correct": value})}
        _, rows = table(make_card(results={}, clients=clients), "Results")
        assert rows == [["north", "1,234,567", shown]]

    def test_a_client_that_diverged_has_an_empty_cell(self):
        clients = {"north": make_client("north", results={"eval_loss": None}), "south": make_client("south", loss=2.0)}
        results = summarize_results(clients, named=clients)
        _, rows = table(make_card(results=results, clients=clients), "Results")
        assert rows == [["north", "10", ""], ["south", "10", "2"]]

    def test_metrics_of_fewer_clients_do_not_lower_the_count(self):
        results = {"eval_accuracy": {**ACCURACY, "clients": 2}, "eval_loss": LOSS}
        assert "over 3 clients." in section(make_card(results=results), "Results")

    def test_a_client_without_results_has_no_row(self):
        clients = {"north": make_client("north", loss=1.0, accuracy=0.5), "south": make_client("south")}
        _, rows = table(make_card(clients=clients), "Results")
        assert "north" in [row[0] for row in rows]
        assert "south" not in [row[0] for row in rows]

    def test_a_metric_that_a_client_lacks_is_an_empty_cell(self):
        _, rows = table(make_card(clients=make_clients("north", loss=0.125)), "Results")
        assert rows[0] == ["north", "10", "", "0.125"]

    def test_a_client_that_is_named_and_not_published_keeps_its_row(self):
        _, rows = table(make_card(clients=make_clients("north", loss=1.0, path=None)), "Results")
        assert rows[0][0] == "north"

    def test_the_spread_is_there_where_no_client_is_named(self):
        _, rows = table(make_card(clients={}, num_clients=3), "Results")
        assert [row[0].strip("*") for row in rows] == ["mean", "standard deviation", "smallest", "largest"]

    def test_only_clients_that_are_listed_are_named(self):
        rounds = [make_round(0, {"north": 1.0, "hidden": 2.0})]
        card = make_card(rounds=rounds, clients=make_clients("north", loss=1.0), num_clients=2)
        assert "hidden" not in card
        assert "north" in card

    def test_clients_that_joined_later_are_said_to_be_left_out(self):
        clients = make_clients("north", loss=1.0)
        assert "joined later" not in section(make_card(clients=clients), "Results")
        clients["clinic"] = make_client("clinic", loss=9.0, joined=True)
        card = make_card(clients=clients, num_clients=4)
        assert "clinic (joined later)" in [row[0] for row in table(card, "Results")[1]]
        assert "over 3 clients of the first training." in section(card, "Results")

    def test_of_newcomers_alone_none_is_left_out(self):
        clients = make_clients("clinic", "ward", loss=1.0, joined=True)
        card = make_card(clients=clients, results=summarize_results(clients, named=clients))
        assert [row[0] for row in table(card, "Results")[1][:2]] == ["clinic", "ward"]
        assert "over 2 clients." in section(card, "Results")

    def test_before_an_evaluation_there_is_no_section(self):
        card = make_card(results={}, results_after_round=0, clients=make_clients("north"))
        assert section(card, "Results") is None
        assert "None" not in card


class TestLoading:
    def test_both_ways_load_the_same_client(self):
        found = calls(make_card(clients=make_clients("south", "west")))
        assert found["load_personalized_model"] == ([REPO], {"client_id": "south"})
        assert found["AutoModelForCausalLM.from_pretrained"] == (["me/base"], {"dtype": "bfloat16"})
        assert found["PeftModel.from_pretrained"] == (["base", REPO], {"subfolder": "clients/south"})

    def test_a_newcomer_starts_from_the_same_repository(self):
        arguments, keywords = calls(make_card())["FederatedTrainer.from_shared"]
        assert arguments == [REPO]
        assert "train_dataset" in keywords

    def test_the_client_that_is_loaded_is_the_first_in_natural_order(self):
        card = make_card(clients=make_clients("client_10", "client_2"))
        assert calls(card)["load_personalized_model"] == ([REPO], {"client_id": "client_2"})

    def test_an_adapter_at_the_root_has_no_subfolder(self):
        found = calls(make_card(clients=make_clients("south", path=""), num_clients=3))
        assert found["PeftModel.from_pretrained"] == (["base", REPO], {})
        assert found["load_personalized_model"] == ([REPO], {"client_id": "south"})

    def test_a_clients_own_repository_cannot_be_joined(self):
        card = make_card(clients=make_clients("north", path=""), num_clients=3)
        assert "from_shared" not in card
        assert "load_personalized_model" in calls(card)

    @pytest.mark.parametrize(
        ("task_type", "kind"),
        [
            ("SEQ_CLS", "AutoModelForSequenceClassification"),
            ("TOKEN_CLS", "AutoModelForTokenClassification"),
            ("QUESTION_ANS", "AutoModelForQuestionAnswering"),
            ("SEQ_2_SEQ_LM", "AutoModelForSeq2SeqLM"),
            ("FEATURE_EXTRACTION", "AutoModel"),
            ("CAUSAL_LM", "AutoModelForCausalLM"),
            (None, "AutoModelForCausalLM"),
        ],
    )
    def test_the_base_is_loaded_with_the_class_of_its_task(self, task_type, kind):
        card = make_card(task_type=task_type)
        assert [name for name in calls(card) if name.startswith("Auto")] == [f"{kind}.from_pretrained"]
        for block in code_blocks(card):
            exec("\n".join(line for line in block.splitlines() if line.startswith("from ")), {})

    @pytest.mark.parametrize(
        "task_type", ["SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "SEQ_2_SEQ_LM", "FEATURE_EXTRACTION"]
    )
    def test_only_a_federation_of_language_models_can_be_joined(self, task_type):
        assert "from_shared" not in make_card(task_type=task_type)
        for language in (None, "CAUSAL_LM"):
            assert "FederatedTrainer.from_shared" in calls(make_card(task_type=language))

    def test_without_a_base_on_the_hub_the_code_has_a_place_for_it(self):
        card = make_card(hub_base_model=None)
        found = calls(card)
        assert found["AutoModelForCausalLM.from_pretrained"][0] == ["path/to/the/base/model"]
        assert found["load_personalized_model"] == (
            [REPO],
            {"client_id": "north", "base_model": "path/to/the/base/model"},
        )
        assert found["FederatedTrainer.from_shared"][1]["model"] == "path/to/the/base/model"
        with_base = calls(make_card())
        assert "base_model" not in with_base["load_personalized_model"][1]
        assert "model" not in with_base["FederatedTrainer.from_shared"][1]

    def test_the_tokenizer_is_offered_where_there_is_one(self):
        assert f'`AutoTokenizer.from_pretrained("{REPO}")`' in section(make_card(), "How to load it")
        assert "okenizer" not in make_card(processing_files=[])

    def test_a_folder_is_loaded_from_a_path(self):
        card = make_card(repo_id=None)
        sources = {arguments[-1] for name, (arguments, _) in calls(card).items() if "Auto" not in name and arguments}
        assert sources == {"path/to/this/folder"}
        assert "None" not in card

    def test_a_client_that_is_not_published_is_not_offered(self):
        clients = {"north": make_client("north", path=None), "south": make_client("south")}
        card = make_card(clients=clients)
        assert calls(card)["load_personalized_model"] == ([REPO], {"client_id": "south"})
        assert "north" not in "".join(code_blocks(card))

    def test_without_a_published_client_none_is_offered(self):
        found = calls(make_card(clients=make_clients("north", "south", path=None)))
        assert found.keys() == {"FederatedTrainer.from_shared", "newcomer.train"}

    def test_clients_with_repositories_of_their_own_load_by_name(self):
        clients = make_clients("north", path=None)
        card = make_card(clients=clients, num_clients=3, client_repositories=True)
        arguments, keywords = calls(card)["load_personalized_model"]
        assert arguments == [REPO]
        assert keywords.keys() == {"client_id"}
        assert "PeftModel.from_pretrained" not in calls(card)
        assert "north" not in "".join(code_blocks(card))

    def test_a_base_that_training_changed_cannot_be_joined(self):
        card = make_card(mutates_base=True)
        assert "from_shared" not in card
        assert calls(card)["load_personalized_model"] == ([REPO], {"client_id": "north"})

    def test_the_quantization_of_a_base_is_told_where_clients_are_loaded(self):
        card = make_card(quantization_config=QUANTIZATION)
        text = section(card, "How to load it")
        assert "`quantization_config`" in text
        (settings,) = re.findall(r"^```json\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
        assert json.loads(settings) == QUANTIZATION
        assert "quantiz" not in make_card(quantization_config=None)

    def test_without_a_published_client_quantization_is_not_told_of(self):
        assert "quantiz" not in make_card(quantization_config=QUANTIZATION, clients={}, num_clients=3)

    @pytest.mark.parametrize(
        "changes",
        [
            {},
            {"quantization_config": QUANTIZATION, "hub_base_model": None},
            {"task_type": "SEQ_CLS", "processing_files": []},
            {"clients": make_clients("a.b-c_1", path="")},
            {"clients": {}, "num_clients": 3},
            {"clients": {}, "num_clients": 3, "client_repositories": True},
            {"mutates_base": True},
        ],
        ids=["plain", "quantized", "classifier", "root", "none", "repositories", "mutates"],
    )
    @pytest.mark.parametrize("repo_id", [REPO, None])
    def test_the_code_is_python_and_what_it_imports_exists(self, repo_id, changes):
        blocks = code_blocks(make_card(repo_id=repo_id, **changes))
        assert blocks
        for block in blocks:
            compile(block, "card", "exec")
            imports = [line for line in block.splitlines() if line.startswith("from ")]
            assert imports
            exec("\n".join(imports), {})

    def test_every_fence_is_closed(self):
        # Three ways to load, and the citation; the settings of a quantization.
        for card, blocks in ((make_card(), 4), (make_card(quantization_config=QUANTIZATION), 5)):
            fences = [line for line in card.splitlines() if line.startswith("```")]
            assert [fence == "```" for fence in fences] == [False, True] * blocks


class TestTraining:
    def test_what_is_not_set_is_left_out(self):
        arguments = {"local_epochs": None, "optim": "", "weight_decay": 0.0, "bf16": False, "seed": 0}
        adapter = {"r": 4, "modules_to_save": None, "layers_to_transform": [], "rank_pattern": {}}
        _, rows = table(make_card(arguments=arguments, adapter=adapter), "Training")
        assert rows == [["`r`", "`4`"], ["`weight_decay`", "`0.0`"], ["`seed`", "`0`"]]

    def test_lists_are_spelled_out(self):
        _, rows = table(make_card(), "Training")
        assert ["`target_modules`", "`k_proj`, `q_proj`"] in rows
        assert ["`local_steps`", "`7`"] in rows

    @pytest.mark.parametrize(
        ("layers", "words"), [((0, 1), "in 2 layers"), ((3, 10, 11), "in 3 layers"), ((7,), "in 1 layer")]
    )
    def test_modules_that_are_adapted_in_every_layer_are_named_once(self, layers, words):
        names = [f"model.layers.{i}.self_attn.{name}" for i in layers for name in ("q_proj", "k_proj")]
        _, rows = table(make_card(adapter={"target_modules": names}), "Training")
        assert rows[0] == ["`target_modules`", f"`k_proj`, `q_proj` {words}"]

    def test_modules_that_are_adapted_in_some_layers_are_spelled_out(self):
        names = [f"model.layers.{i}.self_attn.q_proj" for i in range(3)] + ["model.layers.1.self_attn.k_proj"]
        _, rows = table(make_card(adapter={"target_modules": names}), "Training")
        assert rows[0] == ["`target_modules`", ", ".join(f"`{name}`" for name in names)]

    def test_modules_outside_of_the_layers_are_spelled_out(self):
        names = [*(f"model.layers.{i}.mlp.up_proj" for i in range(2)), "lm_head"]
        _, rows = table(make_card(adapter={"target_modules": names}), "Training")
        assert rows[0] == ["`target_modules`", ", ".join(f"`{name}`" for name in names)]

    @pytest.mark.parametrize("value", [r".*\.(q_proj|v_proj)", ["a|b", "c"]])
    def test_a_value_with_a_bar_does_not_break_the_table(self, value):
        _, rows = table(make_card(adapter={"target_modules": value}, arguments={"optim": "a|b"}), "Training")
        text = ", ".join(f"`{item}`" for item in value) if isinstance(value, list) else f"`{value}`"
        assert [[cell.replace(r"\|", "|") for cell in row] for row in rows] == [
            ["`target_modules`", text],
            ["`optim`", "`a|b`"],
        ]

    def test_versions_are_told(self):
        assert "hf_fedsa 0.1.0, peft 0.21.2." in section(make_card(), "Training")

    def test_the_paper_is_cited(self):
        assert "Selective Aggregation for Low-Rank Adaptation" in section(make_card(), "Citation")


class TestText:
    def test_it_is_the_same_every_time(self):
        federation, rounds = make_federation(card={"tags": list("gfedcba")}), [make_round(0, {"north": 1.0})]
        first = make_model_card(federation, rounds, REPO)
        assert make_model_card(copy.deepcopy(federation), copy.deepcopy(rounds), REPO) == first
        results = {"eval_accuracy": ACCURACY, "eval_loss": LOSS}
        assert list(results) != list(federation["results"])
        reordered = {**federation, "card": {"tags": list("abcdefg")}, "results": results}
        assert make_model_card(reordered, rounds, REPO) == first

    def test_what_it_is_given_is_not_changed(self):
        federation, rounds = make_federation(), [make_round(0, {"north": 1.0})]
        before = copy.deepcopy((federation, rounds))
        make_model_card(federation, rounds, REPO)
        assert (federation, rounds) == before

    def test_sections_that_have_nothing_to_say_leave_no_gap(self):
        card = make_card(results={}, mutates_base=True)
        assert "\n\n\n" not in card
        assert card.endswith("```\n")


class TestChooseClients:
    CLIENTS = ("north", "south", "west")

    @pytest.mark.parametrize(
        ("choice", "chosen"),
        [
            ("all", ["north", "south", "west"]),
            (["all"], ["north", "south", "west"]),
            ("none", []),
            (["none"], []),
            ([], []),
            ("south", ["south"]),
            (["south"], ["south"]),
            (("west", "north"), ["north", "west"]),
            (["south", "south"], ["south"]),
        ],
    )
    def test_the_clients_in_their_order(self, choice, chosen):
        assert choose_clients(choice, self.CLIENTS) == chosen

    def test_nothing_said_is_not_everything(self):
        with pytest.raises(ValueError, match="`hub_clients` is not set.*all 3 clients"):
            choose_clients(None, self.CLIENTS)

    @pytest.mark.parametrize("choice", ["east", ["north", "east"], ["east", "all"], "", "nort"])
    def test_an_unknown_client_is_named_with_those_there_are(self, choice):
        unknown = choice if isinstance(choice, str) else "east"
        with pytest.raises(ValueError, match=f"names {unknown!r}, which is not a client.*north, south, west"):
            choose_clients(choice, self.CLIENTS)

    @pytest.mark.parametrize("choice", [["north", "all"], ["none", "north"]])
    def test_all_and_none_are_no_ids_in_a_list(self, choice):
        with pytest.raises(ValueError, match="which is not a client"):
            choose_clients(choice, self.CLIENTS)

    @pytest.mark.parametrize("name", ["all", "none"])
    def test_a_client_called_like_a_choice_is_not_guessed_at(self, name):
        for choice in (name, [name], ["north", name]):
            with pytest.raises(ValueError, match=f"could mean the client called '{name}'"):
                choose_clients(choice, ["north", name])
        other = {"all": "none", "none": "all"}[name]
        assert choose_clients(other, ["north", name]) == {"none": [], "all": ["north", name]}[other]
        assert choose_clients("north", ["north", name]) == ["north"]


class TestOnlyNamed:
    # The mean of the losses is 4.
    ROUNDS = [make_round(0, {"east": 7.0, "north": 1.0, "south": 2.0, "west": 6.0}), make_round(1, {"south": 4.0})]

    def test_others_are_counted_and_left_to_the_mean(self):
        first, second = only_named(self.ROUNDS, {"south"})
        assert first["clients"] == ["south"]
        assert first["losses"] == {"south": 2.0}
        assert first["weights"] == {"south": 2.0}
        assert (first["num_clients"], first["loss"]) == (4, 4.0)
        assert (second["num_clients"], second["losses"]) == (1, {"south": 4.0})

    @pytest.mark.parametrize("names", [{"north", "south"}, {"north", "south", "west"}])
    def test_losses_of_one_or_two_others_leave_no_trace(self, names):
        changed = copy.deepcopy(self.ROUNDS)
        for client_id in {"east", "north", "south", "west"} - names:
            changed[0]["losses"][client_id] = 99.0
        assert only_named(changed, names) == only_named(self.ROUNDS, names)
        assert [entry["num_clients"] for entry in only_named(self.ROUNDS, names)] == [4, 1]

    def test_no_name_of_another_is_left(self):
        text = json.dumps(only_named(self.ROUNDS, {"south"}))
        assert "south" in text
        assert not any(name in text for name in ("east", "north", "west"))
        nobody = json.dumps(only_named(self.ROUNDS, set()))
        assert not any(name in nobody for name in ("east", "north", "south", "west"))

    def test_an_entry_by_client_that_is_new_is_cut_too(self):
        rounds = [make_round(0, {"north": 1.0, "south": 2.0}, steps={"north": 3, "south": 4}, first={"north": 9.0})]
        (only,) = only_named(rounds, {"south"})
        assert only["steps"] == {"south": 4}
        assert only["first"] == {}

    def test_all_else_stays(self):
        for entry, before in zip(only_named(self.ROUNDS, set()), self.ROUNDS, strict=True):
            for name in ("round", "bytes_down", "bytes_up", "seconds", "shared_sha256"):
                assert entry[name] == before[name]

    def test_with_all_named_nothing_is_lost(self):
        for entry, before in zip(
            only_named(self.ROUNDS, {"east", "north", "south", "west"}), self.ROUNDS, strict=True
        ):
            assert before.items() <= entry.items()

    def test_what_it_is_given_is_not_changed(self):
        before = copy.deepcopy(self.ROUNDS)
        only_named(self.ROUNDS, set())
        assert before == self.ROUNDS

    def test_counts_that_are_there_already_are_kept(self):
        for names in ({"south"}, {"north", "south"}, set()):
            once = only_named(self.ROUNDS, names)
            assert only_named(once, names) == once
            counts = [(entry["num_clients"], entry.get("loss")) for entry in once]
            assert [(e["num_clients"], e.get("loss")) for e in only_named(once, set())] == counts


class TestSummarizeResults:
    CLIENTS = {
        name: make_client(name, loss=loss)
        for name, loss in {"a": 1.0, "b": 2.0, "c": 4.0, "d": 8.0, "e": 16.0}.items()
    }

    def test_with_all_named_it_is_over_all_of_them(self):
        summary = summarize_results(self.CLIENTS, named=self.CLIENTS)
        assert summary == {"eval_loss": summarize([1.0, 2.0, 4.0, 8.0, 16.0])}

    @pytest.mark.parametrize("named", [["a", "b", "c", "d"], ["a", "b", "c"]], ids=["one", "two"])
    def test_numbers_of_one_or_two_unnamed_clients_leave_no_trace(self, named):
        summary = summarize_results(self.CLIENTS, named)
        assert summary == {"eval_loss": summarize([self.CLIENTS[name]["results"]["eval_loss"] for name in named])}
        changed = {c: entry if c in named else make_client(c, loss=99.0) for c, entry in self.CLIENTS.items()}
        assert summarize_results(changed, named) == summary

    def test_three_unnamed_clients_are_in_the_mean_and_the_spread_and_no_extreme_is_told(self):
        every = summarize([1.0, 2.0, 4.0, 8.0, 16.0])
        summary = summarize_results(self.CLIENTS, ["a", "b"])
        assert summary == {"eval_loss": {name: every[name] for name in ("mean", "std", "clients")}}
        assert summary["eval_loss"]["clients"] == 5

    @pytest.mark.parametrize("unnamed", [1, 2])
    def test_of_one_or_two_clients_that_are_all_unnamed_nothing_is_told(self, unnamed):
        clients = {name: self.CLIENTS[name] for name in list(self.CLIENTS)[:unnamed]}
        assert summarize_results(clients, named=[]) == {}

    def test_three_clients_that_are_all_unnamed_have_a_mean(self):
        clients = {name: self.CLIENTS[name] for name in ("a", "b", "d")}
        summary = summarize_results(clients, named=[])
        assert summary["eval_loss"].keys() == {"mean", "std", "clients"}
        assert summary["eval_loss"]["mean"] == pytest.approx(11 / 3)

    def test_a_client_without_a_number_is_not_in_the_mean(self):
        clients = {
            **make_clients("a", loss=1.0),
            "b": make_client("b", results={"eval_loss": None}),
            "c": make_client("c"),
        }
        assert summarize_results(clients, named=clients) == {"eval_loss": summarize([1.0])}

    def test_a_metric_that_no_client_has_a_number_of_is_not_there(self):
        clients = {"b": make_client("b", results={"eval_loss": None})}
        assert summarize_results(clients, named=clients) == {}

    def test_the_card_tells_no_number_of_one_unnamed_client(self):
        named = ["a", "b", "c", "d"]
        clients = {name: self.CLIENTS[name] for name in named}
        card = make_card(clients=clients, num_clients=5, results=summarize_results(self.CLIENTS, named))
        assert "over 4 clients." in section(card, "Results")
        assert "16" not in section(card, "Results")


class TestNameOnHub:
    @pytest.mark.parametrize("name", ["me/base", "base", "me/Base-1.5_b"])
    def test_an_id_is_one(self, name):
        assert name_on_hub(name) == name

    @pytest.mark.parametrize(
        "name",
        [None, "", "/srv/models/gone", "./gone", "../gone", "~/gone", "runs/a/gone", "gone/", "C:\\models\\gone"],
    )
    def test_a_folder_that_is_gone_is_none(self, name):
        assert name_on_hub(name) is None

    def test_a_folder_that_is_there_is_none(self, tmp_path, monkeypatch):
        (tmp_path / "me" / "base").mkdir(parents=True)
        assert name_on_hub("me/base") == "me/base"
        monkeypatch.chdir(tmp_path)
        assert name_on_hub("me/base") is None
        assert name_on_hub(str(tmp_path)) is None


class TestDescription:
    """The entries that the card reads, as `describe_federation` fills them."""

    CLIENTS = {
        "north": {"num_examples": 3, "results": {"eval_loss": 1.0}},
        "south": {"num_examples": 4, "results": {}},
    }

    def describe(self, config=None, *, base="", dtype=torch.float32, quantization=None, **summary):
        model = make_model().to(dtype)
        model.config._name_or_path = base
        if quantization is not None:
            model.config.quantization_config = quantization
        model = get_peft_model(model, config or make_lora())
        kind = adapter_kind(model.peft_config["default"])
        defaults = {"hub_base_model": None, "clients": self.CLIENTS}
        return describe_federation(
            model=model,
            adapter_name="default",
            kind=kind,
            sharing=Sharing({}, METHODS["fedsa"]),
            shared={},
            frozen={},
            summary={**defaults, **summary},
        )

    def test_clients_are_counted_and_placed(self):
        federation = self.describe(rounds_done=5)
        assert federation["num_clients"] == 2
        assert federation["clients"] == {
            "north": {**self.CLIENTS["north"], "path": "clients/north"},
            "south": {**self.CLIENTS["south"], "path": "clients/south"},
        }
        assert federation["results"] == {"eval_loss": summarize([1.0])}
        assert federation["client_repositories"] is False
        assert federation["rounds_done"] == 5

    def test_a_folder_is_not_a_base_on_the_hub_unless_it_is_said_to_be(self, tmp_path):
        federation = self.describe(base=str(tmp_path))
        assert federation["hub_base_model"] is None
        assert federation["base_model"] == str(tmp_path)
        federation = self.describe(base=str(tmp_path), hub_base_model="me/base")
        assert federation["hub_base_model"] == "me/base"
        assert federation["base_model"] == str(tmp_path)

    @pytest.mark.parametrize(
        ("config", "name", "local"),
        [
            (LoraConfig(target_modules="all-linear"), "lora", "lora_B"),
            (LoraConfig(target_modules="all-linear", use_rslora=True), "rslora", "lora_B"),
            (LoraConfig(target_modules="all-linear", use_dora=True), "dora", "lora_magnitude_vector"),
            (VeraConfig(target_modules=["q_proj", "o_proj"]), "vera", "vera_lambda_b"),
        ],
        ids=["lora", "rslora", "dora", "vera"],
    )
    def test_the_method_and_its_tensors(self, config, name, local):
        federation = self.describe(config)
        assert (federation["method"], federation["adapter_kind"]) == ("fedsa", name)
        assert local in federation["local_tensors"]
        assert local not in federation["shared_tensors"]
        assert federation["shared_tensors"]

    def test_the_dtype_is_one_that_from_pretrained_takes(self):
        assert self.describe()["base_dtype"] == "float32"
        assert self.describe(dtype=torch.bfloat16)["base_dtype"] == "bfloat16"

    def test_the_task_is_plain_text(self):
        federation = self.describe(make_lora(task_type="FEATURE_EXTRACTION"))
        assert json.loads(json.dumps(federation["task_type"])) == "FEATURE_EXTRACTION"
        assert json.loads(json.dumps(self.describe()["task_type"])) == "CAUSAL_LM"

    @pytest.mark.parametrize(("init", "mutates"), [("pissa", True), ("gaussian", False), (True, False)])
    def test_an_initialisation_that_changes_the_base_is_marked(self, init, mutates):
        assert self.describe(make_lora(init_lora_weights=init))["mutates_base"] is mutates

    def test_the_adapter_is_told_without_defaults(self):
        adapter = self.describe(LoraConfig(r=8, target_modules={"v_proj", "k_proj"}, lora_dropout=0.5))["adapter"]
        assert adapter == {"r": 8, "lora_alpha": 8, "target_modules": ["k_proj", "v_proj"], "lora_dropout": 0.5}

    def test_a_plain_base_is_not_quantized(self):
        assert self.describe()["quantization_config"] is None

    def test_the_quantization_of_a_base_can_be_made_again_from_what_is_told(self):
        config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=5.0, llm_int8_skip_modules=["lm_head"])
        settings = self.describe(quantization=config)["quantization_config"]
        assert json.loads(json.dumps(settings)) == settings
        assert BitsAndBytesConfig(**settings).to_dict() == config.to_dict()
        assert self.describe(quantization=QUANTIZATION)["quantization_config"] == QUANTIZATION
        # The texts that a base was calibrated with are those of whoever quantized it.
        calibrated = {**QUANTIZATION, "dataset": ["a patient's letter"], "tokenizer": "/home/me/base"}
        assert self.describe(quantization=calibrated)["quantization_config"] == QUANTIZATION


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A federation that was trained, evaluated and saved, the metrics of its clients, and its card."""
    base, out = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("out")
    make_model().save_pretrained(base)
    make_tokenizer().save_pretrained(base)
    trainer = FederatedTrainer(
        model=str(base),
        args=make_args(out, hub_token=TOKEN),
        train_dataset={f"client_{i}": make_rows(6 + i, seed=i) for i in range(3)},
        eval_dataset={f"client_{i}": make_rows(3, seed=50 + i) for i in range(3)},
        peft_config=make_lora(),
    )
    trainer.train()
    metrics = trainer.evaluate()
    trainer.save_model()
    return trainer, metrics, (out / "README.md").read_text()


class TestOfATrainedFederation:
    def test_it_parses_and_tells_of_the_run(self, saved):
        trainer, _, card = saved
        assert metadata(card)["library_name"] == "peft"
        assert "base_model" not in metadata(card)
        assert "by 3 clients in 2 rounds" in introduction(card)
        last = trainer.round_history[-1]
        assert f"received {last['bytes_down']:,} bytes in total and sent {last['bytes_up']:,} bytes." in card
        assert calls(card)["load_personalized_model"][1] == {
            "client_id": "client_0",
            "base_model": "path/to/the/base/model",
        }
        assert calls(card)["PeftModel.from_pretrained"][1] == {"subfolder": "clients/client_0"}
        assert ["`local_steps`", "`3`"] in table(card, "Training")[1]

    def test_it_gives_what_each_client_was_evaluated_with(self, saved):
        trainer, metrics, card = saved
        header, rows = table(card, "Results")
        losses = [metrics[f"eval_{client_id}_loss"] for client_id in trainer.client_ids]
        assert len(set(losses)) == 3
        column = header.index("eval_loss")
        expected = [
            (client_id, str(6 + i), f"{loss:.4g}")
            for i, (client_id, loss) in enumerate(zip(trainer.client_ids, losses, strict=True))
        ]
        assert [(row[0], row[1], row[column]) for row in rows[:3]] == expected
        spread = {row[0].strip("*"): row[column] for row in rows[3:]}
        mean = sum(losses) / 3
        assert metrics["eval_loss"] == pytest.approx(mean)
        assert spread == {
            "mean": f"{mean:.4g}",
            "standard deviation": f"{math.sqrt(sum((loss - mean) ** 2 for loss in losses) / 3):.4g}",
            "smallest": f"{min(losses):.4g}",
            "largest": f"{max(losses):.4g}",
        }
        assert "after 2 rounds." in section(card, "Results")
        assert "further" not in section(card, "Results")

    def test_of_one_unnamed_client_speed_is_no_result(self, tmp_path):
        trainer = FederatedTrainer(
            model=make_model(),
            args=make_args(tmp_path, num_rounds=1, local_steps=1),
            train_dataset=make_rows(4, seed=0),
            eval_dataset=make_rows(2, seed=50),
            peft_config=make_lora(),
            processing_class=make_tokenizer(),
        )
        trainer.train()
        metrics = trainer.evaluate()
        assert {"eval_runtime", "epoch"} <= metrics.keys()
        trainer.save_model()
        card = (tmp_path / "README.md").read_text()
        header, rows = table(card, "Results")
        assert rows[0][:2] == ["client_0", "4"]
        assert rows[0][header.index("eval_loss")] == f"{metrics['eval_loss']:.4g}"
        assert not any(word in name for name in header for word in ("time", "per_second", "epoch"))
        assert "by 1 client " in introduction(card)

    def save_with_base(self, model, out, **arguments):
        trainer = FederatedTrainer(
            model=model,
            args=make_args(out, num_rounds=1, local_steps=1, **arguments),
            train_dataset={"a": make_rows(4, 0), "b": make_rows(4, 1)},
            peft_config=make_lora(),
            processing_class=make_tokenizer(),
        )
        if isinstance(model, str):
            shutil.rmtree(model)
        trainer.save_model()
        return json.loads((out / "federation.json").read_text()), (out / "README.md").read_text()

    @pytest.mark.parametrize("folder", ["base", "me/base", "./me/base"])
    def test_a_base_folder_that_is_gone_is_not_on_the_hub(self, folder, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        make_model().save_pretrained(folder)
        federation, card = self.save_with_base(folder, tmp_path / "out")
        assert federation["hub_base_model"] is None
        assert "base_model" not in metadata(card)
        assert "me/base" not in card

    def test_a_base_folder_can_be_said_to_be_on_the_hub(self, tmp_path):
        make_model().save_pretrained(tmp_path / "base")
        federation, card = self.save_with_base(str(tmp_path / "base"), tmp_path / "out", hub_base_model="me/base")
        assert federation["hub_base_model"] == "me/base"
        assert metadata(card)["base_model"] == "me/base"

    def test_a_base_made_in_memory_is_on_the_hub_only_under_a_name_of_its_own(self, tmp_path):
        federation, card = self.save_with_base(make_model(), tmp_path / "none")
        assert federation["hub_base_model"] is None
        assert "base_model" not in metadata(card)
        model = make_model()
        model.config._name_or_path = "me/base"
        federation, card = self.save_with_base(model, tmp_path / "named")
        assert federation["hub_base_model"] == "me/base"
        assert metadata(card)["base_model"] == "me/base"

    def test_metrics_that_are_not_finite_are_left_out(self, tmp_path):
        values = iter([0.5, math.nan, math.inf, 0.25])
        client_ids = [f"client_{i}" for i in range(4)]
        trainer = FederatedTrainer(
            model=make_model(),
            args=make_args(tmp_path, num_rounds=1, local_steps=1),
            train_dataset={client_id: make_rows(4, seed=i) for i, client_id in enumerate(client_ids)},
            eval_dataset={client_id: make_rows(2, seed=50 + i) for i, client_id in enumerate(client_ids)},
            peft_config=make_lora(),
            processing_class=make_tokenizer(),
            compute_metrics=lambda prediction: {"score": next(values)},
        )
        trainer.train()
        trainer.evaluate()
        trainer.save_model()
        text = (tmp_path / "federation.json").read_text()
        federation = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
        scores = [entry["results"]["eval_score"] for entry in federation["clients"].values()]
        assert scores == [0.5, None, None, 0.25]
        assert federation["results"]["eval_score"] == summarize([0.5, 0.25])
        assert federation["results"]["eval_loss"]["clients"] == 4
        header, rows = table((tmp_path / "README.md").read_text(), "Results")
        column = header.index("eval_score")
        assert [row[column] for row in rows[:5]] == ["0.5", "", "", "0.25", "0.375"]

    def test_results_of_a_newcomer_alone_are_its_own(self, saved, tmp_path):
        newcomer = FederatedTrainer.from_shared(
            saved[0].args.output_dir,
            args=make_args(tmp_path, num_rounds=1, local_steps=1),
            train_dataset=make_rows(4, 2),
            eval_dataset=make_rows(2, 3),
            client_id="clinic",
        )
        newcomer.train()
        loss = newcomer.evaluate()["eval_loss"]
        newcomer.save_model()
        card = (tmp_path / "README.md").read_text()
        header, rows = table(card, "Results")
        assert [(row[0], row[header.index("eval_loss")]) for row in rows] == [("clinic", f"{loss:.4g}")]
        assert "by 1 client in 1 round" in introduction(card)
        assert "joined later" not in card
        assert "first training" not in card

    def test_nothing_of_this_machine_is_in_it(self, saved):
        trainer, _, card = saved
        for secret in (trainer.args.output_dir, trainer.model.get_base_model().config._name_or_path, TOKEN):
            assert secret
            assert secret not in card

    def test_it_is_the_card_of_what_is_saved_beside_it(self, saved):
        trainer, _, card = saved
        trainer.save_model()
        with open(f"{trainer.args.output_dir}/README.md") as file:
            assert file.read() == card

    def test_federation_json_has_what_the_card_reads(self, saved):
        with open(f"{saved[0].args.output_dir}/federation.json") as file:
            federation = json.load(file)
        example = make_federation()
        assert example.keys() <= federation.keys()
        for entry in federation["clients"].values():
            assert example["clients"]["north"].keys() <= entry.keys()
        assert federation["results"]["eval_loss"].keys() == LOSS.keys()
        assert make_round(0, {"a": 1.0}).keys() <= saved[0].round_history[-1].keys()

    def test_create_model_card_adds_what_it_is_told(self, saved, tmp_path, monkeypatch):
        trainer, _, card = saved
        monkeypatch.setattr(trainer.args, "output_dir", str(tmp_path))
        trainer.create_model_card("Words", "me/rows", "maths", language="en", license="mit")
        written = (tmp_path / "README.md").read_text()
        added = {"datasets": "me/rows", "language": "en", "license": "mit"}
        tags = sorted([*metadata(card)["tags"], "maths"])
        assert metadata(written) == {**metadata(card), **added, "tags": tags}
        assert ModelCard(written).text.strip().startswith("# Words\n")
        assert table(written, "Results") == table(card, "Results")
