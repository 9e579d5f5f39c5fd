"""The model card, and what decides whom and what it names."""

import ast
import copy
import json
import math
import re

import pytest
import torch
from conftest import make_args, make_lora, make_model, make_rows, make_tokenizer
from huggingface_hub import ModelCard
from peft import LoraConfig, VeraConfig, get_peft_model

from hf_fedsa import FederatedTrainer
from hf_fedsa.hub import _only_named, choose_clients, describe_federation
from hf_fedsa.model_card import make_model_card, summarize
from hf_fedsa.parameters import method_for

REPO = "me/fed"
TOKEN = "hf_a_token_that_is_nobodys"

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
        "method": "lora",
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
        "quantized": False,
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
    """Rows of a section's table as lists of cells, without the header. All have as many cells as the header."""
    header, rule, *rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
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
            "tags": ["federated-learning", "hf_fedsa", "lora"],
        }

    @pytest.mark.parametrize(
        ("task_type", "pipeline"),
        [
            (None, "text-generation"),
            ("CAUSAL_LM", "text-generation"),
            ("SEQ_CLS", "text-classification"),
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
        data = metadata(make_card(card={"tags": ["zebra", "maths", "hf_fedsa", "apple"]}, method="dora"))
        assert data["tags"] == ["apple", "dora", "federated-learning", "hf_fedsa", "maths", "zebra"]

    def test_a_base_that_is_not_on_the_hub_is_not_linked(self):
        card = make_card(hub_base_model=None)
        assert metadata(card).keys() == {"library_name", "pipeline_tag", "tags"}
        assert "not on the Hub" in introduction(card)
        assert "huggingface.co" not in card
        assert "None" not in card


class TestIntroduction:
    @pytest.mark.parametrize(
        ("repo_id", "entries", "title"),
        [
            ("me/fed", {}, "# fed"),
            (None, {}, "# A federation"),
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
        assert re.search(rf"^{name} adapters", introduction(make_card(method=method)), re.MULTILINE)

    def test_clients_that_are_not_listed_are_counted(self):
        assert "by 40 clients" in introduction(make_card(num_clients=40))

    def test_one_client_is_singular(self):
        rounds = [make_round(0, {"north": 1.0})]
        results = {"eval_loss": {"mean": 1.0, "std": 0.0, "min": 1.0, "max": 1.0, "clients": 1}}
        card = make_card(clients=make_clients("north", loss=1.0), results=results, rounds=rounds)
        assert "by 1 client " in introduction(card)
        assert "1 client received" in section(card, "What was shared")
        assert "over 1 client." in section(card, "Results")
        assert "1 clients" not in card

    def test_several_clients_are_plural(self):
        card = make_card(rounds=[make_round(0, {"north": 1.0, "west": 2.0})])
        assert "2 clients received" in section(card, "What was shared")
        assert "over 3 clients." in section(card, "Results")
        assert not re.search(r"[02-9] client\b", card)

    def test_which_adapters_are_published(self):
        two, hidden = make_clients("north", "south"), make_clients("west", path=None)
        assert "adapters of all clients are published" in introduction(make_card(clients=two))
        for card in (make_card(clients={**two, **hidden}), make_card(clients=two, num_clients=5)):
            assert "adapters of 2 of them are published" in introduction(card)
        for none in ({}, hidden):
            assert "No client's adapter is published" in introduction(make_card(clients=none, num_clients=5))

    def test_clients_with_private_repositories_of_their_own(self):
        text = introduction(make_card(clients={}, num_clients=3, client_repositories=True))
        assert "private repository" in text
        assert "published here" not in text


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
        assert "2 clients received 12,345,678 bytes and sent 9,876 bytes" in text
        assert "555" not in text and "666" not in text

    def test_before_the_first_round_no_bytes_are_told(self):
        assert "bytes" not in make_card(rounds=[])

    def test_clients_of_the_last_round_that_are_not_named_are_counted(self):
        rounds = _only_named([make_round(0, {"north": 1.0, "hidden": 2.0, "other": 3.0})], {"north"})
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
        assert re.search(r"shared tensors leave the client", text)
        assert re.search(r"carry information about", text)
        assert re.search(r"not a privacy guarantee", text)
        assert re.search(r"secure aggregation or differential privacy, which were not used", text)


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
        assert "after round 19" in text
        assert "over 3 clients" in text

    def test_metrics_of_fewer_clients_do_not_lower_the_count(self):
        results = {"eval_accuracy": {**ACCURACY, "clients": 2}, "eval_loss": LOSS}
        assert "over 3 clients" in section(make_card(results=results), "Results")

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
        assert "joined later" in section(make_card(clients=clients), "Results")

    def test_before_an_evaluation_there_is_no_section(self):
        card = make_card(results={}, results_after_round=None, clients=make_clients("north"))
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

    def test_an_adapter_at_the_root_has_no_subfolder(self):
        found = calls(make_card(clients=make_clients("south", path=""), num_clients=3))
        assert found["PeftModel.from_pretrained"] == (["base", REPO], {})
        assert found["load_personalized_model"] == ([REPO], {"client_id": "south"})

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

    def test_a_quantized_base_is_told_of_where_clients_are_loaded(self):
        assert "`quantization_config`" in section(make_card(quantized=True), "How to load it")
        assert "quantiz" not in make_card(quantized=False)

    @pytest.mark.parametrize(
        "changes",
        [
            {},
            {"quantized": True, "hub_base_model": None},
            {"clients": make_clients("a.b-c_1", path="")},
            {"clients": {}, "num_clients": 3},
            {"clients": {}, "num_clients": 3, "client_repositories": True},
            {"mutates_base": True},
        ],
        ids=["plain", "quantized", "root", "none", "repositories", "mutates"],
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
        fences = [line for line in make_card().splitlines() if line.startswith("```")]
        assert [fence == "```" for fence in fences] == [False, True] * (len(fences) // 2)
        assert len(fences) == 2 * (3 + 1)  # Three ways to load, and the citation.


class TestTraining:
    def test_what_is_not_set_is_left_out(self):
        arguments = {"local_epochs": None, "optim": "", "weight_decay": 0.0, "bf16": False, "seed": 0}
        adapter = {"r": 4, "modules_to_save": None, "layers_to_transform": [], "rank_pattern": {}}
        _, rows = table(make_card(arguments=arguments, adapter=adapter), "Training")
        assert rows == [["`r`", "`4`"], ["`weight_decay`", "`0.0`"], ["`bf16`", "`False`"], ["`seed`", "`0`"]]

    def test_lists_are_spelled_out(self):
        _, rows = table(make_card(), "Training")
        assert ["`target_modules`", "`k_proj`, `q_proj`"] in rows
        assert ["`local_steps`", "`7`"] in rows

    def test_modules_that_are_adapted_in_every_layer_are_named_once(self):
        names = [f"model.layers.{i}.self_attn.{name}" for i in range(2) for name in ("q_proj", "k_proj")]
        _, rows = table(make_card(adapter={"target_modules": names}), "Training")
        assert rows[0] == ["`target_modules`", "`k_proj`, `q_proj`"]

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
    # The mean of the losses is 3.
    ROUNDS = [make_round(0, {"north": 1.0, "south": 2.0, "west": 6.0}), make_round(1, {"south": 4.0})]

    def test_others_are_counted_and_left_to_the_mean(self):
        first, second = _only_named(self.ROUNDS, {"south"})
        assert first["clients"] == ["south"]
        assert first["losses"] == {"south": 2.0}
        assert first["weights"] == {"south": 2.0}
        assert (first["num_clients"], first["loss"]) == (3, 3.0)
        assert (second["num_clients"], second["loss"]) == (1, 4.0)

    def test_no_name_of_another_is_left(self):
        text = json.dumps(_only_named(self.ROUNDS, {"south"}))
        assert "south" in text
        assert "north" not in text and "west" not in text
        nobody = json.dumps(_only_named(self.ROUNDS, set()))
        assert not any(name in nobody for name in ("north", "south", "west"))

    def test_an_entry_by_client_that_is_new_is_cut_too(self):
        rounds = [make_round(0, {"north": 1.0, "south": 2.0}, steps={"north": 3, "south": 4}, first={"north": 9.0})]
        (only,) = _only_named(rounds, {"south"})
        assert only["steps"] == {"south": 4}
        assert only["first"] == {}

    def test_all_else_stays(self):
        for entry, before in zip(_only_named(self.ROUNDS, set()), self.ROUNDS, strict=True):
            for name in ("round", "bytes_down", "bytes_up", "seconds", "shared_sha256"):
                assert entry[name] == before[name]

    def test_with_all_named_nothing_is_lost(self):
        for entry, before in zip(_only_named(self.ROUNDS, {"north", "south", "west"}), self.ROUNDS, strict=True):
            assert before.items() <= entry.items()

    def test_what_it_is_given_is_not_changed(self):
        before = copy.deepcopy(self.ROUNDS)
        _only_named(self.ROUNDS, set())
        assert before == self.ROUNDS

    def test_counts_that_are_there_already_are_kept(self):
        (once,) = _only_named(self.ROUNDS[:1], {"south"})
        assert _only_named([once], {"south"}) == [once]


class TestDescription:
    """The entries that the card reads, as `describe_federation` fills them."""

    def describe(self, config=None, *, base="", dtype=torch.float32, **summary):
        model = make_model().to(dtype)
        model.config._name_or_path = base
        model = get_peft_model(model, config or make_lora())
        defaults = {"hub_base_model": None, "clients": {"north": {"num_examples": 3}, "south": {"num_examples": 4}}}
        return describe_federation(
            model=model,
            adapter_name="default",
            method=method_for(model.peft_config["default"]),
            shared={},
            frozen={},
            summary={**defaults, **summary},
        )

    def test_clients_are_counted_and_placed(self):
        federation = self.describe(rounds_done=5)
        assert federation["num_clients"] == 2
        assert federation["clients"] == {
            "north": {"num_examples": 3, "path": "clients/north"},
            "south": {"num_examples": 4, "path": "clients/south"},
        }
        assert federation["client_repositories"] is False
        assert federation["rounds_done"] == 5

    def test_a_folder_is_not_a_base_on_the_hub(self, tmp_path):
        federation = self.describe(base=str(tmp_path))
        assert federation["hub_base_model"] is None
        assert federation["base_model"] == str(tmp_path)
        federation = self.describe(base=str(tmp_path), hub_base_model="me/base")
        assert federation["hub_base_model"] == "me/base"

    def test_a_name_is_a_base_on_the_hub(self):
        assert self.describe(base="me/base")["hub_base_model"] == "me/base"

    def test_a_base_made_in_memory_is_not_on_the_hub(self):
        assert self.describe()["hub_base_model"] is None

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
        assert federation["method"] == name
        assert local in federation["local_tensors"]
        assert local not in federation["shared_tensors"]
        assert federation["shared_tensors"]

    def test_the_dtype_is_one_that_from_pretrained_takes(self):
        assert self.describe()["base_dtype"] == "float32"
        assert self.describe(dtype=torch.bfloat16)["base_dtype"] == "bfloat16"

    def test_the_task_is_plain_text(self):
        federation = self.describe(make_lora(task_type="FEATURE_EXTRACTION"))
        assert json.loads(json.dumps(federation["task_type"])) == "FEATURE_EXTRACTION"
        assert self.describe()["task_type"] is None

    @pytest.mark.parametrize(("init", "mutates"), [("pissa", True), ("gaussian", False), (True, False)])
    def test_an_initialisation_that_changes_the_base_is_marked(self, init, mutates):
        assert self.describe(make_lora(init_lora_weights=init))["mutates_base"] is mutates

    def test_the_adapter_is_told_without_defaults(self):
        adapter = self.describe(LoraConfig(r=8, target_modules={"v_proj", "k_proj"}, lora_dropout=0.5))["adapter"]
        assert adapter == {"r": 8, "lora_alpha": 8, "target_modules": ["k_proj", "v_proj"], "lora_dropout": 0.5}

    def test_a_plain_base_is_not_quantized(self):
        assert self.describe()["quantized"] is False


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
        assert f"received {last['bytes_down']:,} bytes and sent {last['bytes_up']:,} bytes" in card
        assert calls(card)["load_personalized_model"][1] == {"client_id": "client_0"}
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
        assert "after round 2" in section(card, "Results")

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
