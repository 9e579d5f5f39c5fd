"""What hf_fedsa relies on in transformers, TRL, PEFT, accelerate and torch beyond their documented interfaces.

A failure here means that a dependency has changed: its message says what hf_fedsa relied on, and where.
"""

import ast
import copy
import inspect
import mmap
import os
import re
import signal
from datetime import timedelta
from pathlib import Path

import accelerate
import inside
import peft.import_utils
import pytest
import torch
import transformers
import trl
from accelerate.data_loader import skip_first_batches
from conftest import make_args, make_lora, make_model, make_rows
from datasets import Dataset
from peft import LoraConfig, PeftModel, VeraConfig, get_peft_model, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from torch.distributed.distributed_c10d import _get_default_store, _set_pg_timeout
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import integration_utils as integrations
from transformers.trainer import SCHEDULER_NAME
from transformers.trainer_callback import CallbackHandler, ProgressCallback
from transformers.trainer_jit_checkpoint import JITCheckpointCallback
from transformers.trainer_pt_utils import LengthGroupedSampler
from trl import SFTConfig, SFTTrainer
from trl.trainer.utils import FusedCausalLMOutput

import hf_fedsa
from hf_fedsa import FederatedTrainer
from hf_fedsa.client.scoring import score_next_tokens
from hf_fedsa.hub.processing_files import is_known_processing_file
from hf_fedsa.trainer import FederatedMixin

PACKAGE = Path(hf_fedsa.__file__).parent


# Names and signatures

# Private upstream name: what it is on, its parameters (None for what is no function), and what hf_fedsa does with it.
PRIVATE_NAMES = {
    "_init_training_state": (
        Trainer,
        ("max_steps", "num_update_steps_per_epoch", "num_train_epochs", "resume_from_checkpoint", "trial"),
        "overrides it to say at which round and step a resumed run goes on",
    ),
    "_clip_grad_norm": (Trainer, ("model",), "overrides it to clip every client by its own norm"),
    "_get_grad_norm": (Trainer, ("model", "grad_norm"), "overrides it to log the mean of the clients' norms"),
    "_save_checkpoint": (SFTTrainer, ("model", "trial"), "overrides it to write the manifest after everything else"),
    "_load_from_checkpoint": (
        Trainer,
        ("resume_from_checkpoint", "model"),
        "overrides it to load the federation in place of one adapter",
    ),
    "_load_optimizer_and_scheduler": (
        Trainer,
        ("checkpoint",),
        "overrides it to go on with the schedule of the present arguments, and with other numbers of slots",
    ),
    "_remove_unused_columns": (
        Trainer,
        ("dataset", "description"),
        "calls it to hash what is trained on of every client's rows",
    ),
    "_get_train_sampler": (Trainer, ("train_dataset",), "refuses a subclass that overrides it, which has no effect"),
    "_push_from_checkpoint": (
        Trainer,
        ("checkpoint_folder",),
        "overrides it to push at round ends what the user chose to publish",
    ),
    "_finish_current_push": (Trainer, (), "calls it before it replaces files that a push is reading"),
    "_is_accelerate_prepared": (
        accelerate.Accelerator,
        None,
        "sets it on the model so that several processes do not average its gradients",
    ),
    "_get_num_items_in_batch": (Trainer, ("batch_samples", "device"), "calls it to count each client's own tokens"),
    "_get_output_dir": (Trainer, ("trial",), "calls it to find the checkpoint that was just written"),
    "_prepare_dataset": (
        SFTTrainer,
        ("dataset", "processing_class", "args", "packing", "formatting_func", "dataset_name"),
        "calls it to prepare the rows passed to `evaluate`",
    ),
    "_skip_prepare_dataset": (SFTTrainer, None, "reads it to leave rows alone that are prepared"),
    "_formatting_func": (SFTTrainer, None, "reads it to prepare the rows passed to `evaluate`"),
    "_metrics": (SFTTrainer, None, "sets it aside for a round's line, and takes what an evaluation kept in it"),
    "_exit": (os, None, "calls it to end a process whose launcher has died"),
    "_active_adapter": (BaseTunerLayer, None, "sets it to switch one layer to another client"),
    "_name_or_path": (transformers.PreTrainedConfig, None, "reads it to name the base model"),
}
CLASS_ATTRIBUTES = {"_tag_names": list, "_name": str}


def parameter_names(function) -> tuple[str, ...]:
    return tuple(name for name in inspect.signature(function).parameters if name != "self")


@pytest.mark.parametrize(
    "name", [name for name, (_, parameters, _) in PRIVATE_NAMES.items() if parameters is not None]
)
def test_private_methods_have_the_parameters_hf_fedsa_passes(name):
    owner, parameters, purpose = PRIVATE_NAMES[name]
    method = inspect.getattr_static(owner, name, None)
    assert method is not None, f"{owner.__name__}.{name} is gone, but hf_fedsa {purpose}."
    assert parameter_names(method) == parameters, (
        f"{owner.__name__}.{name} takes {parameter_names(method)}, no longer {parameters}; hf_fedsa {purpose}."
    )


@pytest.mark.parametrize(("name", "kind"), CLASS_ATTRIBUTES.items())
def test_identity_is_in_class_attributes(name, kind):
    assert isinstance(getattr(SFTTrainer, name, None), kind), (
        f"SFTTrainer.{name} is no longer a {kind.__name__}; FederatedTrainer sets it for model cards and tags."
    )


# Set in constructors of trackers, see `test_what_makes_a_tracker_upload`.
SET_BY_TRACKERS = {"_log_checkpoints", "_log_model"}


# Takes the repository first, as `model.push_to_hub` does. Upstream calls it by keywords.
OWN_SIGNATURE = ("push_to_hub",)


def overrides() -> list[tuple[type, str]]:
    found = []
    for ours in (FederatedMixin, FederatedTrainer):
        for name, value in vars(ours).items():
            upstream = inspect.getattr_static(SFTTrainer, name, None)
            if inspect.isfunction(value) and inspect.isfunction(upstream) and name != "__init__":
                found.append((ours, name))
    return found


@pytest.mark.parametrize(("ours", "name"), overrides(), ids=lambda value: getattr(value, "__name__", value))
def test_overrides_can_be_called_the_way_upstream_calls_them(ours, name):
    upstream = inspect.signature(getattr(SFTTrainer, name))
    if list(upstream.parameters) == ["self", "args", "kwargs"]:
        upstream = inspect.signature(getattr(Trainer, name))
    signature = inspect.signature(getattr(ours, name))
    passes_on = any(p.kind == inspect.Parameter.VAR_KEYWORD for p in signature.parameters.values())
    keyword_only = [name for name, p in signature.parameters.items() if p.kind == inspect.Parameter.KEYWORD_ONLY]
    names, expected = [n for n in signature.parameters if n not in keyword_only], list(upstream.parameters)
    if name in OWN_SIGNATURE:
        assert set(expected) <= set(names)
        return
    kept = names == expected or (passes_on and expected[: len(names) - 2] == names[:-2])
    assert kept, f"{name} takes {expected[1:]} upstream, but {names[1:]} in hf_fedsa.{ours.__name__}."
    for parameter in set(names) & set(expected):
        optional = upstream.parameters[parameter].default is not inspect.Parameter.empty
        ours_optional = signature.parameters[parameter].default is not inspect.Parameter.empty
        assert ours_optional or not optional, f"`{parameter}` of {name} is optional upstream, but not in hf_fedsa."


def test_a_model_that_is_marked_as_prepared_is_not_wrapped():
    source = inspect.getsource(accelerate.Accelerator.prepare_model)
    mark, wrap = source.find('"_is_accelerate_prepared"'), source.find("DistributedDataParallel")
    assert 0 < mark < wrap, "Accelerator.prepare_model no longer leaves a model alone that is marked as prepared."
    model = torch.nn.Linear(2, 2)
    model._is_accelerate_prepared = True
    assert accelerate.Accelerator(cpu=True).prepare_model(model) is model


@pytest.mark.parametrize("name", ["gather", "gather_for_metrics", "pad_across_processes", "prepare_data_loader"])
def test_what_is_left_out_when_a_process_computes_alone_exists(name):
    assert callable(getattr(accelerate.Accelerator, name, None)), f"Accelerator.{name} is gone, see `_COLLECTIVES`."


@pytest.mark.parametrize("trainer", [trl.DPOTrainer, trl.KTOTrainer, trl.RewardTrainer])
def test_preference_trainers_prepare_rows_by_these_arguments(trainer):
    parameters = list(inspect.signature(trainer._prepare_dataset).parameters)
    assert parameters == ["self", "dataset", "processing_class", "args", "dataset_name"], (
        "hf_fedsa prepares the rows passed to `evaluate` with it."
    )


@pytest.mark.parametrize(("name", "config"), inside.CONFIG_OF_TRAINER.items())
def test_what_is_known_of_other_trainers_is_known_by_their_names(name, config):
    origin = transformers if name == "Seq2SeqTrainer" else trl
    assert getattr(origin, name).__name__ == name and getattr(origin, config).__name__ == config


@pytest.mark.parametrize("name", inside.TRAINERS_THAT_GENERATE_ROWS)
def test_trainers_that_keep_generated_rows_are_known_by_their_names(name):
    assert "self._buffered_inputs" in inspect.getsource(getattr(trl, name)._prepare_inputs)


def test_what_is_said_of_processes_that_do_not_answer_can_be_known(tmp_path):
    """By way of private functions of `torch.distributed`, and the words of gloo; see `processes.py`."""
    distributed = torch.distributed
    assert parameter_names(_set_pg_timeout) == ("timeout", "group")
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    if library.is_file():
        with open(library, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            assert content.find(b"Timed out waiting ") >= 0, "gloo has other words for a timeout."
    distributed.init_process_group(
        "gloo", store=distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    try:
        _set_pg_timeout(timedelta(seconds=7))
        store = _get_default_store()
        store.set("step", "3")
        assert (store.check(["step"]), store.check(["other"]), int(store.get("step"))) == (True, False, 3)
    finally:
        distributed.destroy_process_group()


def test_upstream_pushes_by_keywords():
    calls = re.findall(r"self\.push_to_hub\(([^)]*)\)", inspect.getsource(Trainer) + inspect.getsource(SFTTrainer))
    assert calls
    assert all(re.match(r"\w+=", call) for call in calls)


def test_construction_takes_what_sft_trainer_takes():
    *upstreams, sampler, transport = parameter_names(FederatedTrainer.__init__)
    assert (sampler, transport) == ("client_sampler", "transport")
    assert tuple(upstreams) == parameter_names(SFTTrainer.__init__), (
        "SFTTrainer's constructor has changed; FederatedTrainer is to take the same arguments in the same order."
    )


def is_set_on_self(node: ast.AST) -> bool:
    is_store = isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
    return is_store and isinstance(node.value, ast.Name) and node.value.id == "self"


def private_attributes_used() -> set[str]:
    """Names like `_x` that hf_fedsa reads, calls or sets as attributes, or defines over upstream's."""
    used, own = set(), set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute):
                used.add(node.attr)
                if is_set_on_self(node):
                    own.add(node.attr)
            elif isinstance(node, ast.ClassDef):
                own |= {member.name for member in node.body if isinstance(member, ast.FunctionDef)}
    overridden = {name for _, name in overrides()}
    return {name for name in (used - own) | overridden if re.match(r"_[a-z]", name)}


def test_every_private_upstream_name_in_use_has_a_contract():
    without = private_attributes_used() - PRIVATE_NAMES.keys() - CLASS_ATTRIBUTES.keys() - SET_BY_TRACKERS
    assert not without, f"hf_fedsa uses {sorted(without)} of upstream; add them to PRIVATE_NAMES, with a test."


def test_every_contract_is_about_a_name_in_use():
    assert PRIVATE_NAMES.keys() <= private_attributes_used()


def test_the_trainers_own_names_are_free_upstream(tokenizer, tmp_path):
    nodes = ast.walk(ast.parse((PACKAGE / "trainer.py").read_text(encoding="utf-8")))
    own = {node.attr for node in nodes if is_set_on_self(node) and node.attr.startswith("_")}
    own |= {name for name in (*vars(FederatedMixin), *vars(FederatedTrainer)) if re.match(r"_[a-z]", name)}
    trainer = make_sft(tokenizer, tmp_path, num_train_epochs=1)
    trainer.train()
    taken = own & {*dir(SFTTrainer), *vars(trainer)}
    expected = {name for _, name in overrides()} | CLASS_ATTRIBUTES.keys()
    assert taken - expected == set(), f"hf_fedsa's {sorted(taken - expected)} now mean something to SFTTrainer."
    assert inside.A_NAME_OF_THE_TRAINER in own


# The training loop


class Recorder(SFTTrainer):
    """Writes down what the training loop calls, in order."""

    def __init__(self, *args, **kwargs):
        self.calls: list[str] = []
        self.details: dict[str, list] = {}
        super().__init__(*args, callbacks=[EventRecorder(self)], **kwargs)

    def record(self, name, detail=None):
        self.calls.append(name)
        self.details.setdefault(name, []).append(detail)

    def get_train_dataloader(self):
        self.record("get_train_dataloader")
        self.loader = RecordedLoader(self, super().get_train_dataloader())
        return self.loader

    def set_initial_training_values(self, args, dataloader):
        values = super().set_initial_training_values(args, dataloader)
        self.record("set_initial_training_values", values)
        return values

    def _init_training_state(self, *args):
        values = super()._init_training_state(*args)
        self.record("_init_training_state", (args, values))
        return values

    def _load_from_checkpoint(self, *args, **kwargs):
        self.record("_load_from_checkpoint", (args, kwargs))

    def create_optimizer(self, *args, **kwargs):
        self.record("create_optimizer", (args, kwargs))
        optimizer = super().create_optimizer(*args, **kwargs)
        optimizer.register_step_post_hook(lambda *_: self.record("optimizer.step"))
        return optimizer

    def create_scheduler(self, *args, **kwargs):
        self.record("create_scheduler", (args, kwargs))
        return super().create_scheduler(*args, **kwargs)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.record("get_batch_samples", (num_batches, len(batches), num_items))
        return batches, num_items

    def _get_num_items_in_batch(self, batch_samples, device):
        self.record("_get_num_items_in_batch")
        return super()._get_num_items_in_batch(batch_samples, device)

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.record("training_step", (inputs["input_ids"].clone(), num_items_in_batch))
        self.record("accumulation", self.current_gradient_accumulation_steps)
        return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(self, model, inputs, *args, **kwargs):
        self.record("compute_loss", (args, kwargs))
        return super().compute_loss(model, inputs, *args, **kwargs)

    def _clip_grad_norm(self, *args, **kwargs):
        self.record("_clip_grad_norm", (args, kwargs, self.has_gradients()))
        return super()._clip_grad_norm(*args, **kwargs)

    def _get_grad_norm(self, *args, **kwargs):
        self.record("_get_grad_norm", (args, kwargs))
        return super()._get_grad_norm(*args, **kwargs)

    def _save_checkpoint(self, *args, **kwargs):
        self.record("_save_checkpoint", (args, kwargs))
        super()._save_checkpoint(*args, **kwargs)
        self.record("checkpoint written")

    def save_model(self, *args, **kwargs):
        self.record("save_model", (args, kwargs))
        super().save_model(*args, **kwargs)

    def log(self, logs, *args, **kwargs):
        self.record("log", dict(logs))
        super().log(logs, *args, **kwargs)

    def has_gradients(self) -> bool:
        return any(p.grad is not None and bool(p.grad.any()) for p in self.model.parameters())


class RecordedLoader(DataLoader):
    def __init__(self, trainer: Recorder, loader: DataLoader):
        super().__init__(
            loader.dataset, batch_size=trainer.args.per_device_train_batch_size, collate_fn=loader.collate_fn
        )
        self.trainer = trainer

    def __iter__(self):
        self.trainer.record("iter(dataloader)")
        return super().__iter__()


class EventRecorder(TrainerCallback):
    def __init__(self, trainer: Recorder):
        self.trainer = trainer


def _recorder_of(event: str):
    def on_event(self, args, state, control, **kwargs):
        scheduler = kwargs.get("lr_scheduler")
        detail = {
            "step": state.global_step,
            "scheduler_steps": None if scheduler is None else scheduler.last_epoch,
            "has_gradients": self.trainer.has_gradients(),
            "loader": kwargs.get("train_dataloader"),
        }
        self.trainer.record(event, detail)

    return on_event


for _event in ("train_begin", "train_end", "epoch_begin", "epoch_end", "step_begin", "step_end", "substep_end"):
    setattr(EventRecorder, f"on_{_event}", _recorder_of(f"on_{_event}"))


def sft_args(output_dir, **kwargs) -> SFTConfig:
    federated = make_args(output_dir)
    names = (
        "bf16",
        "gradient_checkpointing",
        "save_strategy",
        "disable_tqdm",
        "use_cpu",
        "max_length",
        "logging_steps",
    )
    values = {name: getattr(federated, name) for name in names}
    return SFTConfig(
        str(output_dir),
        **{
            **values,
            "report_to": "none",
            "dataloader_pin_memory": False,
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-2,
            **kwargs,
        },
    )


def make_sft(tokenizer, output_dir, num_rows=4, cls=SFTTrainer, peft_config=None, **kwargs):
    return cls(
        model=make_model(),
        args=sft_args(output_dir, **kwargs),
        train_dataset=make_rows(num_rows, seed=0),
        processing_class=tokenizer,
        peft_config=peft_config or make_lora(),
    )


def run_recorder(tokenizer, output_dir, resume_from_checkpoint=None, **kwargs) -> Recorder:
    trainer = make_sft(tokenizer, output_dir, cls=Recorder, **{"num_train_epochs": 1, **kwargs})
    trainer.train(resume_from_checkpoint)
    return trainer


def assert_in_order(calls: list[str], expected: list[str], reliance: str) -> None:
    """`expected` occurs in `calls` in this order, other calls between."""
    position = 0
    for name in expected:
        assert name in calls[position:], f"{name} is not called after {expected[: expected.index(name)]}: {reliance}"
        position = calls.index(name, position) + 1


@pytest.fixture
def two_steps(tokenizer, tmp_path):
    """Four rows, two steps, a checkpoint after each."""
    return run_recorder(tokenizer, tmp_path, save_strategy="steps", save_steps=1)


def test_the_run_is_planned_before_it_starts(two_steps):
    assert_in_order(
        two_steps.calls,
        [
            "get_train_dataloader",
            "set_initial_training_values",
            "_init_training_state",
            "create_optimizer",
            "create_scheduler",
            "on_train_begin",
            "on_epoch_begin",
            "iter(dataloader)",
            "get_batch_samples",
        ],
        "rounds are planned in `get_train_dataloader`; steps, schedule and optimizer follow from the plan.",
    )


def test_a_step_draws_its_batches_before_it_begins_and_ends_before_it_is_saved(two_steps):
    begin = two_steps.calls.index("get_batch_samples")
    step = two_steps.calls[begin : two_steps.calls.index("checkpoint written") + 1]
    kept = [name for name in step if name not in ("accumulation", "_get_num_items_in_batch")]
    assert kept == [
        "get_batch_samples",
        "on_step_begin",
        "training_step",
        "compute_loss",
        "_clip_grad_norm",
        "_get_grad_norm",
        "optimizer.step",
        "on_step_end",
        "log",
        "_save_checkpoint",
        "save_model",
        "checkpoint written",
    ], (
        "hf_fedsa counts each client's tokens in `get_batch_samples`, loads clients at `on_step_begin`, clips before "
        "the optimizer's step, closes waves and rounds at `on_step_end`, and saves after that."
    )


def test_batches_are_counted_while_they_are_drawn(two_steps):
    assert two_steps.calls.count("_get_num_items_in_batch") == two_steps.calls.count("get_batch_samples") == 2, (
        "hf_fedsa replaces the count of a whole batch by one per client in `get_batch_samples`."
    )


def test_loss_is_asked_for_once_per_step_and_by_these_names(two_steps):
    for args, kwargs in two_steps.details["compute_loss"]:
        assert args == ()
        assert kwargs.keys() == {"num_items_in_batch"}, "hf_fedsa tells a training step's loss by its context alone."


def test_the_schedule_has_been_stepped_when_a_step_ends(two_steps):
    steps = [(event["step"], event["scheduler_steps"]) for event in two_steps.details["on_step_end"]]
    assert steps == [(1, 1), (2, 2)], (
        "At `on_step_end` the scheduler must be one step ahead: hf_fedsa stores and rewinds it there, at wave ends."
    )


def test_gradients_are_there_to_clip_and_gone_when_a_step_ends(two_steps):
    assert [has_gradients for *_, has_gradients in two_steps.details["_clip_grad_norm"]] == [True, True]
    assert not any(event["has_gradients"] for event in two_steps.details["on_step_end"]), (
        "A client that has run out of steps must have no gradient: `zero_grad` is to come before `on_step_end`."
    )


def test_an_epoch_ends_after_its_last_step_has_been_saved_and_before_the_run_does(two_steps):
    last = len(two_steps.calls) - 1 - two_steps.calls[::-1].index("checkpoint written")
    assert_in_order(
        two_steps.calls[last:],
        ["checkpoint written", "on_epoch_end", "on_train_end"],
        "hf_fedsa closes an open round at `on_epoch_end`.",
    )
    assert two_steps.calls.count("on_epoch_end") == 1


def test_epoch_checkpoints_are_saved_after_the_epoch_has_ended(tokenizer, tmp_path):
    trainer = run_recorder(tokenizer, tmp_path, save_strategy="epoch", num_train_epochs=2)
    kept = [name for name in trainer.calls if name in ("on_epoch_end", "_save_checkpoint", "on_epoch_begin")]
    assert kept == ["on_epoch_begin", "on_epoch_end", "_save_checkpoint"] * 2, (
        "hf_fedsa closes the round at `on_epoch_end`, so that a checkpoint of an epoch holds the new average."
    )


def test_checkpoints_save_the_model_by_an_internal_call(two_steps):
    directory = Path(two_steps.args.output_dir)
    assert [(args, kwargs) for args, kwargs in two_steps.details["save_model"]] == [
        ((str(directory / f"checkpoint-{step}"),), {"_internal_call": True}) for step in (1, 2)
    ], "hf_fedsa writes its state where `save_model(checkpoint, _internal_call=True)` says, and skips what users get."


def test_a_checkpoint_is_called_for_its_step_and_lies_in_the_output_folder(two_steps):
    assert two_steps._get_output_dir(trial=None) == two_steps.args.output_dir
    written = sorted(path.name for path in Path(two_steps.args.output_dir).glob("checkpoint-*"))
    assert written == ["checkpoint-1", "checkpoint-2"], "hf_fedsa writes its manifest into `checkpoint-<step>`."


def test_everything_of_a_checkpoint_is_written_when_saving_it_returns(two_steps):
    names = {path.name for path in (Path(two_steps.args.output_dir) / "checkpoint-2").iterdir()}
    assert {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"} <= names, (
        "The manifest is written after `super()._save_checkpoint`, and a checkpoint is resumed from these."
    )


def test_optimizer_and_scheduler_are_created_from_the_model_and_the_planned_steps(two_steps):
    assert two_steps.details["create_optimizer"] == [((), {})], "hf_fedsa finds the optimizer's own groups there."
    assert two_steps.details["create_scheduler"] == [((), {"num_training_steps": 2})], (
        "hf_fedsa replaces `num_training_steps` by the number of local steps."
    )


def test_gradient_norms_are_passed_by_these_names(two_steps):
    for args, kwargs, _ in two_steps.details["_clip_grad_norm"]:
        assert (len(args), kwargs) == (1, {})
    for args, kwargs in two_steps.details["_get_grad_norm"]:
        assert (len(args), kwargs.keys()) == (1, {"grad_norm"})


def test_without_clipping_only_the_norm_is_asked_for(tokenizer, tmp_path):
    trainer = run_recorder(tokenizer, tmp_path, max_grad_norm=0.0)
    assert "_clip_grad_norm" not in trainer.calls
    assert [kwargs["grad_norm"] for _, kwargs in trainer.details["_get_grad_norm"]] == [None, None], (
        "With `max_grad_norm=0` hf_fedsa computes the clients' norms in `_get_grad_norm(grad_norm=None)`."
    )


def test_a_known_gradient_norm_is_passed_through(tokenizer, tmp_path):
    trainer = make_sft(tokenizer, tmp_path)
    assert float(trainer._get_grad_norm(trainer.model, grad_norm=torch.tensor(1.5))) == 1.5


def test_the_loop_iterates_over_the_loader_it_was_given(two_steps):
    assert {id(event["loader"]) for event in two_steps.details["on_step_begin"]} == {id(two_steps.loader)}, (
        "The Trainer must not wrap the loader: accelerate would deal rows of a step to processes and move `slot_rows`."
    )


def test_the_loader_is_iterated_anew_in_every_epoch_after_it_began(tokenizer, tmp_path):
    trainer = run_recorder(tokenizer, tmp_path, num_train_epochs=2)
    kept = [name for name in trainer.calls if name in ("on_epoch_begin", "iter(dataloader)", "on_epoch_end")]
    assert kept == ["on_epoch_begin", "iter(dataloader)", "on_epoch_end"] * 2, (
        "Each iteration of the loader yields the round that is open; the one before is closed at `on_epoch_end`."
    )


def test_initial_values_are_these_seven(tokenizer, tmp_path):
    trainer = run_recorder(tokenizer, tmp_path, num_rows=5, num_train_epochs=3, gradient_accumulation_steps=2)
    assert trainer.details["set_initial_training_values"] == [(3, 2, 5, 15, 4, 3, 6)], (
        "hf_fedsa replaces the samples and the steps in (epochs, update steps per epoch, examples, samples, total "
        "batch size, steps in epoch, max steps)."
    )


def test_micro_batches_of_a_step_are_drawn_together(tokenizer, tmp_path):
    trainer = run_recorder(tokenizer, tmp_path, num_rows=5, gradient_accumulation_steps=2)
    drawn = [(asked, got) for asked, got, _ in trainer.details["get_batch_samples"]]
    assert drawn == [(2, 2), (1, 1)], "hf_fedsa counts a client's tokens over all micro-batches of a step."
    assert trainer.details["accumulation"] == [2, 2, 1], (
        "hf_fedsa sets `current_gradient_accumulation_steps` to a client's own number of micro-batches."
    )
    assert trainer.calls.count("on_step_begin") == 2
    assert trainer.calls.count("on_substep_end") == 1


def test_an_epoch_may_end_before_its_loader_said_it_would(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(RecordedLoader, "__len__", lambda self: 3)
    trainer = run_recorder(tokenizer, tmp_path, num_train_epochs=2)
    assert [got for _, got, _ in trainer.details["get_batch_samples"]] == [1, 1, 0] * 2
    assert trainer.calls.count("on_step_begin") == trainer.calls.count("on_step_end") == 4, (
        "Rounds may be shorter than the longest one, which is the length of the loader: missing batches are no steps."
    )
    assert trainer.state.global_step == 4


def test_an_epoch_without_batches_ends_the_run(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(RecordedLoader, "__iter__", lambda self: iter(()))
    # Whether transformers' messages reach the root logger, where `caplog` listens, depends on its version.
    warned = []
    monkeypatch.setattr(transformers.trainer.logger, "warning", lambda message, *args: warned.append(message))
    trainer = run_recorder(tokenizer, tmp_path, num_train_epochs=3)
    assert trainer.state.global_step == 0 and trainer.calls.count("on_epoch_begin") == 1, (
        "A worker that is told to stop has begun an epoch, in which no round comes. It ends the run."
    )
    assert trainer.calls.count("on_epoch_end") == trainer.calls.count("on_train_end") == 1
    assert any("There seems not to be a single sample in your epoch_iterator" in message for message in warned)


def test_an_epoch_ends_where_the_flag_is_set_while_no_batch_is_drawn(tokenizer, tmp_path, monkeypatch):
    draw = Recorder.get_batch_samples

    def draw_and_stop(self, *arguments):
        batches, num_items = draw(self, *arguments)
        self.control.should_epoch_stop = not batches
        return batches, num_items

    monkeypatch.setattr(Recorder, "get_batch_samples", draw_and_stop)
    monkeypatch.setattr(RecordedLoader, "__len__", lambda self: 5)
    trainer = run_recorder(tokenizer, tmp_path, num_train_epochs=2)
    assert [got for _, got, _ in trainer.details["get_batch_samples"]] == [1, 1, 0] * 2, (
        "Where the length of a round is not known, the loader says more than there will be, and is not asked on."
    )
    assert trainer.calls.count("on_epoch_end") == 2


def test_resuming_loads_the_federation_before_anything_is_planned(tokenizer, tmp_path):
    run_recorder(tokenizer, tmp_path, save_strategy="steps", save_steps=1)
    checkpoint = str(tmp_path / "checkpoint-1")
    trainer = run_recorder(tokenizer, tmp_path, resume_from_checkpoint=checkpoint)
    assert trainer.details["_load_from_checkpoint"] == [((checkpoint,), {})]
    assert_in_order(
        trainer.calls,
        ["_load_from_checkpoint", "get_train_dataloader", "_init_training_state", "on_train_begin"],
        "the rounds done, which `_load_from_checkpoint` reads, decide where the run goes on.",
    )


def test_a_resumed_run_skips_the_batches_it_has_trained(tokenizer, tmp_path):
    whole = run_recorder(tokenizer, tmp_path, save_strategy="steps", save_steps=1, num_train_epochs=2)
    trainer = run_recorder(
        tokenizer, tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-3"), num_train_epochs=2
    )
    ((_, values),) = trainer.details["_init_training_state"]
    assert values == (1, 1), "`_init_training_state` returns (epochs, micro-batches of the epoch) already trained."
    assert trainer.calls.count("on_epoch_begin") == 1
    ((inputs, _),) = trainer.details["training_step"]
    torch.testing.assert_close(inputs, whole.details["training_step"][3][0])


def test_the_loop_obeys_what_a_resumed_state_says(tokenizer, tmp_path, monkeypatch):
    run_recorder(tokenizer, tmp_path, save_strategy="steps", save_steps=1)
    upstream = SFTTrainer._init_training_state

    def elsewhere(self, *args):
        upstream(self, *args)
        return 2, 0

    monkeypatch.setattr(SFTTrainer, "_init_training_state", elsewhere)
    trainer = run_recorder(
        tokenizer, tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-1"), num_train_epochs=3
    )
    assert trainer.calls.count("on_epoch_begin") == 1, (
        "hf_fedsa says in `_init_training_state` how many rounds are done."
    )
    assert trainer.calls.count("training_step") == 2


def test_resuming_restores_optimizer_and_schedule_before_training_begins(tokenizer, tmp_path):
    run_recorder(tokenizer, tmp_path, save_strategy="steps", save_steps=1)
    trainer = run_recorder(tokenizer, tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    (begin,) = trainer.details["on_train_begin"]
    assert (begin["step"], begin["scheduler_steps"]) == (1, 1)


def test_a_checkpoint_holds_the_schedule_by_itself(tokenizer, tmp_path):
    trainer = run_recorder(tokenizer, tmp_path, save_strategy="steps", save_steps=1, lr_scheduler_type="cosine")
    state = torch.load(tmp_path / "checkpoint-1" / SCHEDULER_NAME, weights_only=True)
    schedule = trainer.lr_scheduler
    assert isinstance(schedule, LambdaLR) and state.keys() == schedule.state_dict().keys(), "See `_schedule_at`."
    (rate,), (function,) = {*schedule.base_lrs}, {*schedule.lr_lambdas}
    assert state["_last_lr"] == [rate * function(state["last_epoch"])] * len(trainer.optimizer.param_groups)
    schedule.load_state_dict({**state, "last_epoch": 0, "_last_lr": [3.0] * len(state["_last_lr"])})
    assert (schedule.last_epoch, set(schedule.get_last_lr())) == (0, {3.0})


def test_a_training_step_averages_over_the_number_of_micro_batches_it_finds(tokenizer, tmp_path):
    losses = []
    for number in (1, 4):
        trainer = make_sft(tokenizer, tmp_path)
        trainer.model_accepts_loss_kwargs = False
        trainer.create_optimizer()
        trainer.current_gradient_accumulation_steps = number
        batch = next(iter(trainer.get_train_dataloader()))
        losses.append(float(trainer.training_step(trainer.model, batch, None)))
    assert losses[1] == pytest.approx(losses[0] / 4), (
        "hf_fedsa sets `current_gradient_accumulation_steps` around `training_step` to a client's own micro-batches."
    )


def test_a_training_step_runs_backward(tokenizer, tmp_path):
    trainer = make_sft(tokenizer, tmp_path)
    trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 1
    batch = next(iter(trainer.get_train_dataloader()))
    loss = trainer.training_step(trainer.model, batch, None)
    assert not loss.requires_grad
    assert any(p.grad is not None and p.grad.any() for p in trainer.model.parameters()), (
        "The rows of a step are set around `training_step`, and must enclose the backward pass."
    )


def test_items_of_a_list_of_batches_are_the_labels_that_count_after_the_shift(tokenizer, tmp_path):
    trainer = make_sft(tokenizer, tmp_path)
    first = {"labels": torch.tensor([[5, 6, -100], [-100, 7, 8]])}
    second = {"labels": torch.tensor([[9, 9, 9]])}
    device = torch.device("cpu")
    assert int(trainer._get_num_items_in_batch([first], device)) == 3
    assert int(trainer._get_num_items_in_batch([first, second], device)) == 5
    empty = {"input_ids": torch.zeros((0, 1), dtype=torch.long), "labels": torch.zeros((0, 1), dtype=torch.long)}
    assert int(trainer._get_num_items_in_batch([empty], device)) == 0, "Micro-batches without rows have no items."


def test_users_callbacks_come_in_the_order_in_which_they_are_passed(tokenizer, tmp_path):
    first, second = TrainerCallback(), TrainerCallback()
    trainer = SFTTrainer(
        model=make_model(),
        args=sft_args(tmp_path),
        train_dataset=make_rows(4, seed=0),
        processing_class=tokenizer,
        peft_config=make_lora(),
        callbacks=[first, second],
    )
    callbacks = trainer.callback_handler.callbacks
    assert isinstance(trainer.callback_handler, CallbackHandler)
    assert callbacks.index(first) < callbacks.index(second), (
        "Rounds are opened and closed by a callback that must run before those of the user."
    )


def test_who_listens_for_the_signal_to_end_is_a_callback_that_can_be_asked(tokenizer, tmp_path):
    handler = signal.getsignal(signal.SIGTERM)
    trainer = make_sft(tokenizer, tmp_path, enable_jit_checkpoint=True)
    (listener,) = [c for c in trainer.callback_handler.callbacks if isinstance(c, JITCheckpointCallback)]
    assert listener.jit_manager.is_checkpoint_requested is False, "hf_fedsa asks it whether to save, and answers it."
    assert signal.getsignal(signal.SIGTERM) != handler
    listener.on_train_end(None, None, None)
    assert signal.getsignal(signal.SIGTERM) == handler


def test_logging_clears_the_flag_that_asks_for_it(tokenizer, tmp_path):
    trainer = make_sft(tokenizer, tmp_path)
    trainer.control.should_log = True
    trainer.log({"loss": 1.0})
    assert not trainer.control.should_log, "hf_fedsa restores `should_log` after a round's line; it need no longer."


# Progress bar


def test_the_progress_bar_lives_from_the_beginning_to_the_end_of_training(tokenizer, tmp_path):
    seen = []

    class Watcher(TrainerCallback):
        def on_epoch_begin(self, args, state, control, **kwargs):
            seen.append(progress.training_bar)

    trainer = make_sft(tokenizer, tmp_path, disable_tqdm=False, num_train_epochs=1)
    (progress,) = [c for c in trainer.callback_handler.callbacks if type(c) is ProgressCallback]
    assert progress.training_bar is None, "`training_bar` is None where there is no bar to describe."
    trainer.add_callback(Watcher())
    trainer.train()
    assert callable(getattr(seen[0], "set_description", None)), "hf_fedsa puts the round into the bar's description."


def test_the_progress_bar_takes_a_maximal_length():
    assert parameter_names(ProgressCallback.__init__) == ("max_str_len",)


# TRL


def test_preparation_keeps_an_extra_column_row_by_row(tokenizer, tmp_path):
    trainer = make_sft(tokenizer, tmp_path)
    rows = make_rows(6, seed=1).add_column("client_id", ["a", "b", "a", "c", "b", "c"])
    prepared = trainer._prepare_dataset(rows, tokenizer, trainer.args, False, None, "eval")
    assert {"input_ids", "client_id"} <= set(prepared.column_names), "Rows are told apart by a column of their own."
    expected = {(row["client_id"], tuple(tokenizer(row["text"])["input_ids"])) for row in rows}
    eos = tokenizer.eos_token_id
    found = {(row["client_id"], tuple(token for token in row["input_ids"] if token != eos)) for row in prepared}
    assert found == expected


def test_preparation_applies_the_formatting_function(tokenizer, tmp_path):
    def formatting_func(row):
        return row["question"] + " is " + row["answer"]

    rows = Dataset.from_dict({"question": ["the cat"] * 4, "answer": ["red"] * 4})
    trainer = SFTTrainer(
        model=make_model(),
        args=sft_args(tmp_path),
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=make_lora(),
        formatting_func=formatting_func,
    )
    assert trainer._formatting_func is formatting_func
    prepared = trainer._prepare_dataset(rows, tokenizer, trainer.args, False, trainer._formatting_func, "eval")
    assert tokenizer.decode(prepared[0]["input_ids"]).startswith("the cat is red")


@pytest.mark.parametrize("skip", [True, False])
def test_whether_rows_come_prepared_is_known(tokenizer, tmp_path, skip):
    rows = Dataset.from_dict({"input_ids": [[5, 6, 7]] * 4, "labels": [[5, 6, 7]] * 4})
    trainer = SFTTrainer(
        model=make_model(),
        args=sft_args(tmp_path, dataset_kwargs={"skip_prepare_dataset": True} if skip else None),
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=make_lora(),
    )
    assert bool(trainer._skip_prepare_dataset) is skip


def test_running_metrics_are_lists_that_go_out_with_the_next_log(tokenizer, tmp_path):
    trainer = make_sft(tokenizer, tmp_path)
    trainer.model.train()
    trainer._metrics["train"]["entropy"] = [1.0, 3.0]
    trainer._metrics["eval"]["entropy"] = [7.0]
    trainer.log({"loss": 1.0})
    assert trainer.state.log_history[-1]["entropy"] == 2.0
    assert not trainer._metrics["train"], "hf_fedsa sets the running metrics aside so that a round's line takes none."
    assert trainer._metrics["eval"]["entropy"] == [7.0]
    trainer._metrics["train"]["new"].append(1.0)


class Stand:
    """Stands in for the model: writes down how it is called and what is read of its outputs."""

    def __init__(self, outputs: FusedCausalLMOutput):
        self.outputs = outputs
        self.calls: list[tuple[tuple, dict]] = []
        self.read: set[str] = set()

    def __call__(self, *args, **kwargs):
        self.calls.append((args, kwargs))
        return self

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        self.read.add(name)
        return getattr(self.outputs, name)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("loss_type", ["nll", "dft"])
@pytest.mark.parametrize("num_items", [None, torch.tensor(5)])
def test_the_loss_needs_one_call_and_four_fields(tokenizer, tmp_path, loss_type, mode, num_items):
    trainer = make_sft(tokenizer, tmp_path, loss_type=loss_type)
    trainer.model.train(mode == "train")
    mask = torch.tensor([[True, True, False]])
    log_probs = torch.tensor([[-1.0, -2.0, 0.0]])
    stand = Stand(
        FusedCausalLMOutput(log_probs=log_probs, entropy=mask.float(), is_top1=torch.zeros_like(mask), label_mask=mask)
    )
    inputs = {name: torch.ones((1, 4), dtype=torch.long) for name in ("input_ids", "attention_mask", "labels")}
    loss = trainer.compute_loss(stand, inputs, num_items_in_batch=num_items)
    assert len(stand.calls) == 1, "One forward pass for all clients is replayed to `compute_loss` once per client."
    args, kwargs = stand.calls[0]
    assert args == ()
    assert kwargs["fused_lm_head"] is True
    assert stand.read == {"log_probs", "entropy", "is_top1", "label_mask"}, (
        f"`SFTTrainer.compute_loss` reads {sorted(stand.read)} of the outputs; `_score_rows` is to provide them all."
    )
    weights = log_probs.exp() if loss_type == "dft" else torch.ones_like(log_probs)
    expected = -(log_probs * weights).sum() / (2 if num_items is None else 5)
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize(
    ("attribute", "value"), [("compute_loss_func", None), ("label_smoother", None), ("aux_loss_enabled", False)]
)
def test_what_rules_out_one_forward_pass_for_all_is_known(tokenizer, tmp_path, attribute, value):
    assert getattr(make_sft(tokenizer, tmp_path), attribute) == value


def test_label_smoothing_is_known(tokenizer, tmp_path):
    assert make_sft(tokenizer, tmp_path, label_smoothing_factor=0.1).label_smoother is not None


def test_fused_outputs_take_any_of_the_four_fields_and_list_only_those_given():
    fields = {name: torch.ones(2, 3) for name in ("log_probs", "entropy", "is_top1", "label_mask")}
    outputs = FusedCausalLMOutput(**fields)
    assert dict(outputs.items()).keys() == fields.keys(), (
        "hf_fedsa splits the fields that are there by client and builds the same output from the parts."
    )
    assert type(outputs)(**dict(outputs.items())).log_probs is fields["log_probs"]


def test_the_fused_head_scores_tokens_as_the_plain_logits_do(tokenizer, tmp_path):
    trainer = make_sft(tokenizer, tmp_path)
    model = trainer.model.eval()
    ids = torch.randint(2, 40, (3, 7), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[0, :3], labels[2, -1] = -100, -100
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    with torch.no_grad():
        fused = model(**inputs, use_cache=False, fused_lm_head=True)
        logits = model(input_ids=ids).logits
    log_probs, entropy, is_top1, mask = score_next_tokens(logits, labels)
    assert fused.log_probs.shape == (3, 6)
    torch.testing.assert_close(fused.log_probs, log_probs)
    torch.testing.assert_close(fused.entropy, entropy)
    assert torch.equal(fused.label_mask.bool(), mask)
    assert torch.equal(fused.is_top1.bool(), is_top1), (
        "hf_fedsa scores with the fused head on an accelerator and with plain logits on the CPU."
    )


def test_the_fused_head_is_a_wrapper_of_the_classes_forward_on_the_instance(tokenizer, tmp_path):
    base = make_sft(tokenizer, tmp_path).model.get_base_model()
    assert inspect.unwrap(base.__dict__["forward"].__func__) is inspect.unwrap(type(base).forward), (
        "hf_fedsa takes TRL's forward off a copy of the model, which would compute with the original's weights."
    )


def test_a_cloned_chat_template_fills_the_vocabulary_up():
    default = inspect.signature(trl.clone_chat_template).parameters["resize_to_multiple_of"].default
    assert default == inside.MULTIPLE_OF_CLONED_VOCABULARIES, (
        "hf_fedsa says before the model loads whether a chat template adds tokens."
    )


def test_model_tags_come_from_the_class_attribute(tokenizer, tmp_path):
    class Tagged(SFTTrainer):
        _tag_names = ["some-tag"]

    assert "some-tag" in make_sft(tokenizer, tmp_path, cls=Tagged).model.model_tags


def test_sft_trainer_has_the_adapters_name_and_no_other(tokenizer, tmp_path):
    assert list(make_sft(tokenizer, tmp_path).model.peft_config) == ["default"]


# PEFT


def two_adapters(config):
    model = get_peft_model(make_model(), config)
    model.add_adapter("other", copy.deepcopy(config))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if {"default", "other"} & set(name.split(".")):
            parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
            parameter.requires_grad_(True)
    return model.eval()


ADAPTERS = {
    "lora": lambda: LoraConfig(r=4, target_modules=["q_proj"]),
    "dora": lambda: LoraConfig(r=4, target_modules=["q_proj"], use_dora=True),
    "vera": lambda: VeraConfig(r=4, target_modules=["q_proj"]),
    "embedding": lambda: LoraConfig(r=4, target_modules=["embed_tokens"]),
    "modules_to_save": lambda: LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]),
}


@pytest.mark.parametrize("config", ADAPTERS.values(), ids=ADAPTERS)
def test_a_layer_is_switched_by_its_active_adapter_without_freezing_the_others(config):
    model = two_adapters(config())
    ids = torch.randint(2, 40, (2, 5), generator=torch.Generator().manual_seed(1))
    layers = [m for m in model.modules() if isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        first = model(input_ids=ids).logits
        for layer in layers:
            assert hasattr(layer, "_active_adapter"), f"{type(layer).__name__} has no `_active_adapter`."
            layer._active_adapter = ["other"]
            assert layer.active_adapters == ["other"]
        switched = model(input_ids=ids).logits
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trained
    model.set_adapter("other")
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    assert not torch.allclose(first, expected)
    assert torch.equal(switched, expected), "hf_fedsa switches a layer to a client by setting `_active_adapter`."


def test_all_adapters_are_saved_unless_some_are_named():
    parameters = list(inspect.signature(PeftModel.save_pretrained).parameters)
    assert parameters[1:4] == ["save_directory", "safe_serialization", "selected_adapters"], (
        "hf_fedsa passes the third one, so that a model handed to a user saves one client."
    )


def test_set_adapter_freezes_the_adapter_it_leaves():
    model = two_adapters(ADAPTERS["lora"]())
    model.set_adapter("other")
    assert not any(p.requires_grad for name, p in model.named_parameters() if ".default." in name), (
        "`set_adapter` no longer freezes: hf_fedsa could use it in place of `_active_adapter`."
    )


def test_variants_of_lora_are_marked_in_the_metadata_of_their_fields():
    marked = {name for name, field in LoraConfig.__dataclass_fields__.items() if field.metadata.get("is_lora_variant")}
    assert {"use_dora", "alora_invocation_tokens", "arrow_config"} <= marked, (
        "`adapter_kind` refuses unknown variants of LoRA by this mark; without it their tensors might be sent wrongly."
    )
    assert not {"use_rslora", "lora_bias", "r", "init_lora_weights"} & marked


@pytest.mark.parametrize(
    ("kwargs", "is_variant"), [({}, False), ({"use_rslora": True}, False), ({"use_dora": True}, True)]
)
def test_layers_of_a_variant_say_so(kwargs, is_variant):
    model = get_peft_model(make_model(), LoraConfig(r=4, target_modules=["q_proj"], **kwargs))
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    assert bool(layer.lora_variant) is is_variant, (
        "Layers with `lora_variant` are not served by plain LoRA's products."
    )


@pytest.mark.parametrize("config", ADAPTERS.values(), ids=ADAPTERS)
def test_the_saved_tensors_are_the_live_ones(config):
    model = two_adapters(config())
    tensors = get_peft_model_state_dict(model, adapter_name="other", save_embedding_layers=False)
    parameters = {p.data_ptr() for name, p in model.named_parameters() if "other" in name.split(".")}
    constants = {key for key in tensors if "vera_A" in key or "vera_B" in key}
    addresses = {tensor.data_ptr() for key, tensor in tensors.items() if key not in constants}
    assert addresses == parameters, "hf_fedsa finds an adapter's parameters by the addresses of its saved tensors."
    assert not any({"default", "other"} & set(key.split(".")) for key in tensors), "Keys carry no adapter name."


def test_embeddings_of_the_base_model_are_left_out_on_demand():
    model = get_peft_model(make_model(), LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"]))
    keys = get_peft_model_state_dict(model, save_embedding_layers=False)
    assert all("lora_" in key for key in keys)


def test_bitsandbytes_is_asked_for_by_these_names():
    assert callable(peft.import_utils.is_bnb_available)
    assert callable(peft.import_utils.is_bnb_4bit_available)


def test_a_loaded_model_knows_where_it_came_from(model_dir):
    model = get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(model_dir), make_lora())
    assert model.get_base_model().config._name_or_path == model_dir, "Saved adapters name their base model by it."


# Loaders and samplers


class Rows(torch.utils.data.Dataset):
    def __init__(self):
        self.asked: list[list[int]] = []

    def __len__(self):
        return 10

    def __getitems__(self, keys):
        self.asked.append(list(keys))
        return list(keys)


class Batches(torch.utils.data.Sampler):
    """Has a length and nothing else: no `batch_size`, no `drop_last`."""

    def __len__(self):
        return 4

    def __iter__(self):
        return iter([[0, 1], [2], [], [3, 4, 5]])


def plain_loader(rows, collate_fn=list):
    return DataLoader(rows, batch_sampler=Batches(), collate_fn=collate_fn)


def test_a_loader_fetches_whole_batches_also_empty_ones():
    rows = Rows()
    assert list(plain_loader(rows)) == [[0, 1], [2], [], [3, 4, 5]], (
        "A step in which all clients have run out of rows is an empty batch of the sampler."
    )
    assert rows.asked == [[0, 1], [2], [], [3, 4, 5]], "torch fetches a batch with `__getitems__`, in one call."


def test_skipping_batches_of_a_plain_loader_keeps_its_sampler_and_collator_and_reads_no_skipped_row():
    rows = Rows()
    skipped = skip_first_batches(plain_loader(rows, collate_fn=tuple), 2)
    assert list(skipped) == [(), (3, 4, 5)], "A resumed round goes on after the batches that were trained."
    assert rows.asked == [[], [3, 4, 5]]


def test_datasets_hand_out_rows_in_batches():
    rows = Dataset.from_dict({"x": [1, 2, 3]}).__getitems__([2, 0])
    assert rows == [{"x": 3}, {"x": 1}], "hf_fedsa fetches the rows of all clients of a step in one call."


def epoch_orders(trainer, num_epochs: int) -> list[list[int]]:
    loader = trainer.get_train_dataloader()
    ids = [tuple(row) for row in trainer.train_dataset["input_ids"]]
    assert len(set(ids)) == len(ids)
    orders = []
    for epoch in range(num_epochs):
        loader.set_epoch(epoch)
        rows = [row for batch in loader for row in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
        orders.append([ids.index(tuple(row[mask.bool()].tolist())) for row, mask in rows])
    return orders


@pytest.mark.parametrize(("seeds", "first"), [({"seed": 5}, 5), ({"seed": 5, "data_seed": 9}, 9)])
def test_epoch_e_is_shuffled_by_the_seed_plus_e(tokenizer, tmp_path, seeds, first):
    trainer = make_sft(tokenizer, tmp_path, num_rows=9, **seeds)
    expected = [
        torch.randperm(9, generator=torch.Generator().manual_seed(first + epoch)).tolist() for epoch in range(3)
    ]
    assert epoch_orders(trainer, 3) == expected, (
        f"accelerate {accelerate.__version__} shuffles differently; a lone client is to see the rows SFTTrainer sees."
    )


def test_sorting_by_length_takes_a_generator():
    lengths = [5, 1, 4, 2, 3, 6, 8, 7]
    orders = [
        list(LengthGroupedSampler(2, lengths=lengths, generator=torch.Generator().manual_seed(seed)))
        for seed in (1, 1, 2)
    ]
    assert sorted(orders[0]) == list(range(8))
    assert orders[0] == orders[1]
    assert orders[0] != orders[2]


def test_a_schedule_free_optimizer_is_reached_through_its_wrapper():
    accelerator_optimizer = accelerate.Accelerator(cpu=True).prepare(
        torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=1)
    )
    assert isinstance(accelerator_optimizer.optimizer, torch.optim.SGD), "`_close_wave` asks the optimizer inside."


def test_arguments_are_rebuilt_from_their_fields(tmp_path):
    args = sft_args(tmp_path)
    fields = {name: getattr(args, name) for name, field in SFTConfig.__dataclass_fields__.items() if field.init}
    rebuilt = SFTConfig(**fields)
    assert isinstance(rebuilt, TrainingArguments)
    assert rebuilt.to_dict() == args.to_dict(), (
        "An `SFTConfig` passed to `FederatedTrainer` is rebuilt field by field."
    )


def test_bitsandbytes_packs_for_inference_by_these_names():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    layer = bitsandbytes.nn.Linear4bit(64, 32, bias=False, compress_statistics=False, quant_type="nf4").to("cpu")
    forward = inspect.getsource(bitsandbytes.nn.Linear4bit.forward)
    assert "support_avx512bf16_for_cpu" in vars(layer) and "self.support_avx512bf16_for_cpu" in forward, (
        "hf_fedsa.client.base_layers clears this flag of a `Linear4bit`, so that evaluation does not pack its weight"
    )
    weight, state = layer.weight.data.clone(), layer.weight.quant_state
    scales = state.absmax.clone()
    packed, state = bitsandbytes.functional._convert_weight_packed_for_cpu(weight.clone(), state)
    assert state.packing_format_for_cpu is True and not torch.equal(packed.flatten(), weight.flatten())
    assert torch.equal(state.absmax.T.flatten(), scales.bfloat16()), "base_layers takes them back from here"
    state.original_nested = False
    unpacked, state = bitsandbytes.functional._convert_weight_packed_for_cpu_inverse(packed, state)
    assert torch.equal(unpacked, weight) and state.packing_format_for_cpu is False and state.dtype == torch.float32, (
        "hf_fedsa.client.base_layers takes packed layers back by this function"
    )


# Trackers


def overriding(event):
    callbacks = integrations.INTEGRATION_TO_CALLBACK.items()
    return {name for name, kind in callbacks if getattr(kind, event) is not getattr(TrainerCallback, event)}


def test_trackers_that_can_upload_are_known():
    """`trackers.py` refuses or stills those that upload what holds clients. A new one needs a rule there."""
    known = inside.TRACKERS_THAT_UPLOAD
    assert overriding("on_push_begin") == {"trackio"}
    assert overriding("on_save") - known == {"trackio", "swanlab"}, "these two upload nothing on this event"
    uploading = {
        name
        for name, kind in integrations.INTEGRATION_TO_CALLBACK.items()
        if re.search(r"output_dir|fake_trainer|log_artifact|upload", inspect.getsource(kind.on_train_end))
    }
    assert uploading - known == set()


@pytest.mark.parametrize(
    ("callback", "relied_on"),
    [
        (integrations.TrackioCallback.on_push_begin, "args.trackio_static_space_id is False"),
        (integrations.WandbCallback.__init__, 'os.getenv("WANDB_LOG_MODEL", "false")'),
        (integrations.CometCallback.setup, 'os.getenv("COMET_LOG_ASSETS", "FALSE")'),
        (integrations.MLflowCallback.setup, 'os.getenv("HF_MLFLOW_LOG_ARTIFACTS", "FALSE")'),
        (integrations.DagsHubCallback.setup, 'os.getenv("HF_DAGSHUB_LOG_ARTIFACTS", "FALSE")'),
        (integrations.ClearMLCallback.setup, "CLEARML_LOG_MODEL"),
        (integrations.NeptuneCallback.__init__, "self._log_checkpoints = log_checkpoints"),
        (integrations.FlyteCallback.__init__, "self.sync_checkpoints = sync_checkpoints"),
        (integrations.DVCLiveCallback.__init__, "self._log_model = log_model"),
    ],
)
def test_what_makes_a_tracker_upload(callback, relied_on):
    assert relied_on in inspect.getsource(callback), "trackers.py reads the same setting"


# Files of tokenizers


def test_every_vocabulary_of_transformers_is_known():
    """`push_federation` uploads files of tokenizers by their names."""
    sources = [*Path(transformers.__file__).parent.glob("models/*/tokenization_*.py")]
    sources += [*Path(transformers.__file__).parent.glob("tokenization_*.py")]
    tables = [re.findall(r"VOCAB_FILES_NAMES = (\{.*?\})", path.read_text(), flags=re.DOTALL) for path in sources]
    names = {name for found in tables for table in found for name in re.findall(r': "([^"]+)"', table)}
    assert len(names) > 15
    assert {name for name in names if not is_known_processing_file(name)} == set()
    utils = transformers.utils
    for name in (
        *(utils.FEATURE_EXTRACTOR_NAME, utils.IMAGE_PROCESSOR_NAME, utils.VIDEO_PROCESSOR_NAME, utils.PROCESSOR_NAME),
        *(utils.AUDIO_TOKENIZER_NAME, utils.hub.CHAT_TEMPLATE_FILE, utils.hub.LEGACY_PROCESSOR_CHAT_TEMPLATE_FILE),
        f"{utils.hub.CHAT_TEMPLATE_DIR}/tool_use.jinja",
    ):
        assert is_known_processing_file(name)


def test_a_trainer_has_no_public_name_that_no_user_may_call():
    own = {name for kind in (FederatedTrainer, FederatedMixin) for name in vars(kind) if not name.startswith("_")}
    inherited = {name for kind in SFTTrainer.__mro__ for name in vars(kind)}
    documented = {"add_client", "client_state_dict", "from_shared", "remove_client", "round_history"}
    assert own - inherited == documented | {"shared_state_dict", "use_client"}
