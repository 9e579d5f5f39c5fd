"""What experiment trackers upload of the clients."""

from types import SimpleNamespace

import pytest
from conftest import make_args, make_lora, make_model, make_rows, make_tokenizer
from transformers import TrainerCallback
from transformers.integrations import integration_utils as integrations

from hf_fedsa import FederatedTrainer
from hf_fedsa.trackers import args_of_push_event, refuse_uploads_of_clients


class TestPushEvent:
    """On `on_push_begin` trackio publishes what it has logged in a static Space, which cannot be private."""

    @pytest.fixture
    def synced(self, monkeypatch):
        pytest.importorskip("trackio")
        synced = []

        class Context:
            def get(self):
                return "project"

        class Trackio:
            context_vars = SimpleNamespace(current_project=Context())
            sync = staticmethod(lambda **kwargs: synced.append(kwargs) or kwargs["space_id"])

        tracker = integrations.TrackioCallback()
        tracker._trackio = Trackio
        return synced, tracker

    @pytest.mark.parametrize(
        ("arguments", "spaces"),
        [
            ({"hub_clients": "none"}, 0),
            ({"hub_clients": "all"}, 0),
            ({"hub_clients": "none", "hub_private_repo": False}, 0),
            ({"hub_clients": "none", "hub_name_clients": True}, 0),
            ({"hub_clients": "none", "trackio_static_space_id": "me/space"}, 0),
            ({"hub_clients": "none", "hub_private_repo": False, "hub_name_clients": True}, 1),
        ],
    )
    def test_a_push_publishes_no_metrics_of_clients_in_a_space(self, hub, synced, tmp_path, caplog, arguments, spaces):
        synced, tracker = synced
        trainer = FederatedTrainer(
            model=make_model(),
            args=make_args(tmp_path, **arguments),
            train_dataset={f"client_{i}": make_rows(4, seed=i) for i in range(2)},
            processing_class=make_tokenizer(),
            peft_config=make_lora(target_modules=["q_proj"]),
        )
        trainer.add_callback(tracker)
        trainer.push_to_hub("me/fed")
        assert len(synced) == spaces
        assert ("me/space" in caplog.text) == ("trackio_static_space_id" in arguments)

    def test_other_callbacks_still_hear_of_it_and_the_arguments_stay(self, tmp_path):
        args = make_args(tmp_path, trackio_static_space_id="me/space")
        told = args_of_push_event(args, private=None, all_named=False)
        assert told.trackio_static_space_id is False
        assert args.trackio_static_space_id == "me/space"
        assert told.output_dir == args.output_dir


class TestUploadsOfClients:
    """Trackers that upload checkpoints, `output_dir` or the model would upload every client's B."""

    UPLOADING = [
        ("wandb", {"WANDB_LOG_MODEL": "checkpoint"}),
        ("wandb", {"WANDB_LOG_MODEL": "end"}),
        ("comet_ml", {"COMET_LOG_ASSETS": "1"}),
        ("mlflow", {"HF_MLFLOW_LOG_ARTIFACTS": "TRUE"}),
        ("dagshub", {"HF_DAGSHUB_LOG_ARTIFACTS": "yes"}),
        ("dagshub", {"HF_MLFLOW_LOG_ARTIFACTS": "yes"}),
        ("clearml", {}),
        ("flyte", {}),
        ("dvclive", {"HF_DVCLIVE_LOG_MODEL": "true"}),
        ("dvclive", {"HF_DVCLIVE_LOG_MODEL": "all"}),
    ]
    LOGGING = [
        ("wandb", {}),
        ("wandb", {"WANDB_LOG_MODEL": "false"}),
        ("comet_ml", {}),
        ("mlflow", {}),
        ("dagshub", {}),
        ("clearml", {"CLEARML_LOG_MODEL": "0"}),
        ("neptune", {}),
        ("dvclive", {}),
        ("trackio", {"WANDB_LOG_MODEL": "end"}),
        ("tensorboard", {}),
    ]

    @pytest.fixture
    def check(self, tmp_path, monkeypatch):
        for name in ("WANDB_LOG_MODEL", "COMET_LOG_ASSETS", "CLEARML_LOG_MODEL", "HF_DVCLIVE_LOG_MODEL"):
            monkeypatch.delenv(name, raising=False)
        for name in ("HF_MLFLOW_LOG_ARTIFACTS", "HF_DAGSHUB_LOG_ARTIFACTS"):
            monkeypatch.delenv(name, raising=False)

        def check(report_to=(), environment=(), callbacks=None, all_published=False, **kwargs):
            for name, value in dict(environment).items():
                monkeypatch.setenv(name, value)
            args = make_args(tmp_path, **kwargs)
            args.report_to = list(report_to)
            refuse_uploads_of_clients(args, callbacks, lambda: all_published)

        return check

    @pytest.mark.parametrize(("tracker", "environment"), UPLOADING)
    def test_one_that_uploads_them_is_refused(self, check, tracker, environment):
        with pytest.raises(ValueError, match=f"tracker `{tracker}` is set to .*{next(iter(environment), '')}"):
            check([tracker], environment)

    @pytest.mark.parametrize(("tracker", "environment"), LOGGING)
    def test_one_that_logs_numbers_is_not(self, check, tracker, environment):
        check([tracker], environment)

    def test_all_clients_may_be_said_to_be_public(self, check):
        check(["wandb"], {"WANDB_LOG_MODEL": "checkpoint"}, all_published=True)

    def test_a_plain_trainer_that_pushes_by_itself_is_refused_in_any_case(self, check):
        with pytest.raises(ValueError, match="would push all of `output_dir`"):
            check(["wandb"], {"WANDB_LOG_MODEL": "end"}, all_published=True, push_to_hub=True)

    @pytest.mark.parametrize(
        ("kind", "attributes", "uploads"),
        [
            (integrations.NeptuneCallback, {"_log_checkpoints": "last"}, True),
            (integrations.NeptuneCallback, {"_log_checkpoints": None}, False),
            (integrations.FlyteCallback, {"sync_checkpoints": True}, True),
            (integrations.FlyteCallback, {"sync_checkpoints": False}, False),
            (integrations.DVCLiveCallback, {"_log_model": "all"}, True),
            (integrations.DVCLiveCallback, {"_log_model": None}, False),
        ],
    )
    def test_callbacks_that_the_user_made(self, check, monkeypatch, kind, attributes, uploads):
        monkeypatch.setattr(kind, "__del__", lambda self: None, raising=False)
        callback = object.__new__(kind)
        vars(callback).update(attributes)
        if uploads:
            with pytest.raises(ValueError, match="is set to upload checkpoints"):
                check(callbacks=[TrainerCallback(), callback])
        else:
            check(callbacks=[TrainerCallback, callback])

    def test_it_is_refused_before_the_model_loads(self, check, monkeypatch, tmp_path):
        class Clearml(integrations.ClearMLCallback):
            pass

        with pytest.raises(ValueError, match="`clearml` is set to upload.*CLEARML_LOG_MODEL=0"):
            FederatedTrainer(
                model=str(tmp_path / "no_such_model"),
                args=make_args(tmp_path),
                train_dataset={f"client_{i}": make_rows(4, seed=i) for i in range(2)},
                peft_config=make_lora(),
                callbacks=[Clearml],
            )
