"""What a run publishes, and when, without a trainer."""

import copy
import json
import logging
import threading
import time
from concurrent.futures import Future

import pytest
from conftest import make_args, make_lora, make_model, make_tokenizer
from huggingface_hub.errors import HfHubHTTPError
from local_hub import TOKENS
from peft import get_peft_model

from hf_fedsa.client.parameters import adapter_kind, adapter_tensors
from hf_fedsa.hub import Publisher
from hf_fedsa.hub.saving import describe_federation, save_federation
from hf_fedsa.hub.whole_folder import saving
from hf_fedsa.methods import METHODS, Sharing
from hf_fedsa.tensors import clone_tensors, tensors_sha256

REPO = "me/fed"
CLIENTS = ["a", "b", "c"]


def make(tmp_path, clients=CLIENTS, names_clients=True, **kwargs):
    return Publisher(make_args(tmp_path / "out", **kwargs), clients, names_clients=names_clients)


@pytest.fixture(scope="module")
def model():
    return get_peft_model(make_model(), make_lora(target_modules=["q_proj"]))


def save(model, folder, publisher, joined=(), change=0.0, tokenizer=None):
    """Writes a federation with the publisher's clients, as a run does."""
    tensors = clone_tensors(adapter_tensors(model, "default"))
    shared = {key: tensor for key, tensor in tensors.items() if "lora_A" in key}
    entry = {"num_examples": 4, "last_round": None, "results": {}}
    with saving(folder) as scratch:
        files = publisher.save_processing_files(tokenizer, scratch)
        federation = describe_federation(
            model=model,
            adapter_name="default",
            kind=adapter_kind(model.peft_config["default"]),
            sharing=Sharing({}, METHODS["fedsa"]),
            shared=shared,
            frozen={},
            summary={
                "arguments": {},
                "base_revision": None,
                "card": publisher.card,
                "clients": {client_id: {**entry, "joined": client_id in joined} for client_id in publisher.client_ids},
                "hub_base_model": publisher.hub_base_model,
                "initial_shared_sha256": tensors_sha256(shared),
                "origin": {"rounds_done": 0, "shared_sha256": tensors_sha256(shared)} if joined else None,
                "processing_files": files,
                "results_after_round": 0,
                "returned_rounds": 0,
                "root_adapter": None,
                "rounds_done": 0,
                "share_modules_to_save": False,
            },
        )
        save_federation(
            scratch,
            federation,
            [],
            model=model,
            adapter_name="default",
            shared=shared,
            start={},
            client_tensors=lambda client_id: {k: t + change * ("lora_B" in k) for k, t in tensors.items()},
            initial_tensors={},
            frozen={},
        )


def push(publisher, folder, **kwargs):
    values = {"commit_message": "m", "on_push_begin": lambda args: None, "repo_id": REPO, "clients": ["a"], **kwargs}
    return publisher.push(folder, **values)


class TestWhatIsPublished:
    @pytest.mark.parametrize(
        ("choice", "asked", "expected", "everyone"),
        [
            ("all", None, CLIENTS, True),
            ("none", None, [], False),
            (["c", "a"], None, ["a", "c"], False),
            ("all", "b", ["b"], True),
            ("none", ["a"], ["a"], False),
            (None, "all", CLIENTS, False),
        ],
    )
    def test_the_choice_of_the_call_counts_before_that_of_the_arguments(
        self, tmp_path, choice, asked, expected, everyone
    ):
        publisher = make(tmp_path, hub_clients=choice)
        assert publisher.published_clients(asked) == expected
        assert publisher.publishes_all() == everyone

    def test_without_a_choice_nothing_of_named_clients_is(self, tmp_path):
        publisher = make(tmp_path)
        assert not publisher.publishes_all()
        with pytest.raises(ValueError, match="`hub_clients` is not set"):
            publisher.published_clients()

    def test_a_client_that_is_named_nowhere_is_published_without_a_choice(self, tmp_path):
        assert make(tmp_path, ["only"], names_clients=False).published_clients() == ["only"]

    def test_the_repository_is_named_as_the_trainer_names_it(self, tmp_path):
        assert make(tmp_path).repository_name == "out"
        assert make(tmp_path, hub_model_id="me/other").repository_name == "me/other"

    def test_entries_of_the_card_add_up_where_they_are_kept(self, tmp_path):
        publisher = make(tmp_path)
        publisher.card = publisher.card_with(tags="a", license="mit")
        assert publisher.card_with(model_name="Words") == {"tags": ["a"], "license": "mit", "model_name": "Words"}
        assert publisher.card == {"tags": ["a"], "license": "mit"}


class TestBeforeTraining:
    def test_without_a_push_nothing_is_asked(self, tmp_path, hub, model):
        publisher = make(tmp_path, hub_base_model="me/base")
        publisher.check_permission()
        publisher.check_adapter(model, None)
        assert hub.requests == []
        assert publisher.hub_base_model == "me/base"

    def test_what_may_not_be_pushed_is_refused(self, tmp_path, hub):
        values = {"push_to_hub": True, "hub_model_id": REPO}
        with pytest.raises(ValueError, match="`hub_clients` is not set"):
            make(tmp_path, **values).check_permission()
        assert hub.requests == []
        hub.put(REPO, {}, private=True)
        with pytest.raises(HfHubHTTPError):
            make(tmp_path, hub_clients="all", hub_token=TOKENS["reader"], **values).check_permission()
        make(tmp_path, hub_clients="all", **values).check_permission()
        hub.put("me/open", {})
        with pytest.raises(ValueError, match="is public"):
            make(tmp_path, hub_clients="all", push_to_hub=True, hub_model_id="me/open").check_permission()

    def test_repositories_of_the_clients_are_checked_too(self, tmp_path, hub):
        hub.put(REPO, {}, private=True)
        hub.put(f"{REPO}-b", {})
        values = {"push_to_hub": True, "hub_model_id": REPO, "hub_client_repositories": True}
        make(tmp_path, hub_clients=["a"], **values).check_permission()
        with pytest.raises(ValueError, match="me/fed-b exists and is public"):
            make(tmp_path, hub_clients=["b"], **values).check_permission()

    def test_a_repository_of_another_adapter_is_refused(self, tmp_path, hub, model):
        publisher = make(tmp_path, push_to_hub=True, hub_model_id=REPO, hub_clients="all", hub_base_model="me/base")
        publisher.check_adapter(model, REPO)
        save(model, tmp_path / "out", publisher)
        push(publisher, tmp_path / "out")
        publisher.check_adapter(model, REPO)
        other = get_peft_model(make_model(), make_lora(target_modules=["q_proj"], r=2))
        with pytest.raises(ValueError, match="of another kind: its `r` is 4, this one's is 2"):
            publisher.check_adapter(other, REPO)

    def test_a_base_of_this_machine_is_not_named(self, tmp_path, model):
        model = copy.deepcopy(model)
        model.get_base_model().config._name_or_path = str(tmp_path)
        publisher = make(tmp_path)
        publisher.check_adapter(model, None)
        assert publisher.hub_base_model is None
        model.get_base_model().config._name_or_path = "me/base"
        publisher.check_adapter(model, None)
        assert publisher.hub_base_model == "me/base"


class TestPush:
    def test_callbacks_hear_of_it_first_and_of_no_space(self, tmp_path, hub, model):
        heard = []
        publisher = make(tmp_path, trackio_static_space_id="me/space")
        save(model, tmp_path / "out", publisher)
        push(publisher, tmp_path / "out", on_push_begin=lambda args: heard.append((args, len(hub.requests))))
        ((args, requests),) = heard
        assert args.trackio_static_space_id is False
        assert requests == 0
        assert publisher.args.trackio_static_space_id == "me/space"

    def test_the_arguments_say_what_the_call_does_not(self, tmp_path, hub, model):
        publisher = make(tmp_path, hub_model_id="me/own", hub_clients=["b"], hub_private_repo=False)
        save(model, tmp_path / "out", publisher)
        push(publisher, tmp_path / "out", repo_id=None, clients=None)
        assert not hub.repos["me/own"].private
        published = {name.split("/")[1] for name in hub.files("me/own") if name.startswith("clients/")}
        assert published == {"b"}
        push(publisher, tmp_path / "out", private=True, clients=[])
        assert hub.repos[REPO].private
        assert hub.repos[REPO].commits[-1].message == "m"
        assert not any(name.startswith("clients/") for name in hub.files(REPO))
        with pytest.raises(HfHubHTTPError):
            push(publisher, tmp_path / "out", repo_id="me/x", token=TOKENS["reader"])

    def test_a_push_that_names_nobody_else_may_have_a_space(self, tmp_path, hub, model):
        heard = []
        values = {"trackio_static_space_id": "me/space", "hub_private_repo": False}
        for clients, named in ((["only"], False), (CLIENTS, True)):
            publisher = make(tmp_path, clients, names_clients=named, **values)
            save(model, tmp_path / "out", publisher)
            push(publisher, tmp_path / "out", clients=[], on_push_begin=heard.append)
        assert [args.trackio_static_space_id for args in heard] == ["me/space", False]

    def test_the_branch_is_that_of_the_call_or_of_the_arguments(self, tmp_path, hub, model):
        hub.put(REPO, {}, private=True)
        hub.put(REPO, {}, private=True, revision="trial")
        publisher = make(tmp_path, hub_revision="trial")
        save(model, tmp_path / "out", publisher)
        push(publisher, tmp_path / "out", commit_message="first")
        push(publisher, tmp_path / "out", commit_message="second", revision="main")
        branches = hub.repos[REPO].branches
        assert [branches[name][-1].message for name in ("trial", "main")] == ["first", "second"]

    def test_clients_are_named_and_have_repositories_as_the_arguments_say(self, tmp_path, hub, model):
        publisher = make(tmp_path, hub_name_clients=True)
        save(model, tmp_path / "out", publisher)
        push(publisher, tmp_path / "out")
        assert list(json.loads(hub.files(REPO)["federation.json"])["clients"]) == CLIENTS
        publisher = make(tmp_path, hub_client_repositories=True)
        push(publisher, tmp_path / "out", repo_id="me/own")
        assert "adapter_model.safetensors" in hub.files("me/own-a")
        assert json.loads(hub.files("me/own")["federation.json"])["clients"] == {}

    def test_files_of_a_tokenizer_of_the_users_are_pushed_by_the_run_that_saved_them(self, tmp_path, hub, model):
        class WithWords(type(make_tokenizer())):
            def save_pretrained(self, directory, **kwargs):
                super().save_pretrained(directory, **kwargs)
                with open(f"{directory}/my_words.lst", "w") as file:
                    file.write("words")

        tokenizer, publisher = make_tokenizer(), make(tmp_path)
        tokenizer.__class__ = WithWords
        save(model, tmp_path / "out", publisher, tokenizer=tokenizer)
        assert "my_words.lst" in publisher.processing_files
        push(publisher, tmp_path / "out")
        assert hub.files(REPO)["my_words.lst"] == b"words"
        with pytest.raises(ValueError, match="'my_words.lst'.*no file of a tokenizer"):
            push(make(tmp_path), tmp_path / "out")
        save(model, tmp_path / "out", publisher)
        assert publisher.processing_files == []

    def test_what_the_run_has_pushed_itself_is_its_own(self, tmp_path, hub, model):
        first, newcomer = make(tmp_path), make(tmp_path, ["x"])
        save(model, tmp_path / "out", first)
        push(first, tmp_path / "out")
        for change in (0.1, 0.2):
            save(model, tmp_path / "new", newcomer, joined=["x"], change=change)
            push(newcomer, tmp_path / "new", clients=["x"])
        save(model, tmp_path / "new", newcomer, joined=["x"], change=0.3)
        with pytest.raises(ValueError, match="already holds a client called 'x' that this federation did not put"):
            push(make(tmp_path, ["x"]), tmp_path / "new", clients=["x"])


class TestProgress:
    @pytest.fixture
    def publisher(self, tmp_path):
        publisher = make(tmp_path, hub_clients="none")
        publisher.is_due = True
        return publisher

    @pytest.fixture
    def progress(self, publisher, model, tmp_path):
        saved = []

        def begin(is_pushing=False):
            return publisher.push_progress(
                tmp_path / "out",
                2,
                save=lambda folder: saved.append(save(model, folder, publisher)),
                on_push_begin=lambda args: saved.append("heard"),
                is_pushing=is_pushing,
                repo_id=REPO,
            )

        return begin, saved

    @pytest.mark.parametrize(("strategy", "due"), [("end", False), ("every_save", True), ("checkpoint", True)])
    def test_a_checkpoint_makes_it_due(self, tmp_path, strategy, due):
        publisher = make(tmp_path, hub_strategy=strategy)
        assert not publisher.is_due
        publisher.checkpoint_saved()
        assert publisher.is_due == due

    def test_it_saves_and_pushes_in_the_background(self, publisher, progress, hub):
        begin, saved = progress
        uploading, go_on = threading.Event(), threading.Event()
        hub.before("POST", "/preupload/", lambda: (uploading.set(), go_on.wait(30)))
        future = begin()
        assert isinstance(future, Future)
        assert saved == [None, "heard"]
        assert not publisher.is_due
        assert uploading.wait(30)
        assert not future.done()
        go_on.set()
        future.result(30)
        assert hub.repos[REPO].commits[-1].message == "Training in progress, round 2"

    def test_while_another_is_under_way_it_stays_due(self, publisher, progress, hub):
        begin, saved = progress
        assert begin(is_pushing=True) is None
        assert publisher.is_due
        assert saved == []
        publisher.args.hub_always_push = True
        begin(is_pushing=True).result(30)
        assert not publisher.is_due

    def test_a_failure_is_logged_and_the_next_one_carries_everything(self, publisher, progress, hub, caplog):
        begin, _ = progress
        hub.fail("POST", "/commit/", 500, times=1)
        with caplog.at_level(logging.ERROR):
            assert begin().exception(30) is not None
            # Callbacks of a future may run just after those who wait for it.
            deadline = time.monotonic() + 30
            while "failed" not in caplog.text and time.monotonic() < deadline:
                time.sleep(0.01)
        assert "The push after round 2 failed, the next one carries everything" in caplog.text
        begin().result(30)
        assert json.loads(hub.files(REPO)["federation.json"])["num_clients"] == 3
