"""The mixin over TRL's preference trainers and `Seq2SeqTrainer`: what works, and what is refused with its reason."""

from dataclasses import dataclass

import pytest
import torch
from conftest import make_args, make_lora, make_model, make_tokenizer, max_difference
from datasets import Dataset
from peft import get_peft_model, get_peft_model_state_dict
from transformers import (
    DataCollatorForSeq2Seq,
    LlamaForSequenceClassification,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
)
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, RewardConfig, RewardTrainer

from hf_fedsa import FederatedConfig, FederatedMixin

TARGETS = ["q_proj", "v_proj"]


@dataclass
class FederatedDPOConfig(DPOConfig, FederatedConfig):
    pass


@dataclass
class FederatedRewardConfig(RewardConfig, FederatedConfig):
    pass


@dataclass
class FederatedKTOConfig(KTOConfig, FederatedConfig):
    pass


@dataclass
class FederatedSeq2SeqTrainingArguments(Seq2SeqTrainingArguments, FederatedConfig):
    pass


class FederatedDPOTrainer(FederatedMixin, DPOTrainer):
    pass


class FederatedRewardTrainer(FederatedMixin, RewardTrainer):
    pass


class FederatedKTOTrainer(FederatedMixin, KTOTrainer):
    pass


class FederatedSeq2SeqTrainer(FederatedMixin, Seq2SeqTrainer):
    pass


def settings(config_class, tmp_path, **kwargs):
    common = make_args(tmp_path / "out")
    names = ("per_device_train_batch_size", "use_cpu", "report_to", "save_strategy", "disable_tqdm", "max_length")
    fields = config_class.__dataclass_fields__
    values = {name: getattr(common, name) for name in names if name in fields}
    values |= {"bf16": False, "optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant"}
    values |= {"dataloader_pin_memory": False, "max_grad_norm": 0.0, "train_sampling_strategy": "sequential"}
    values["logging_steps"] = 1
    if "gradient_checkpointing" in fields:
        values["gradient_checkpointing"] = False
    return config_class(str(tmp_path / "out"), **{**values, **kwargs})


def preferences(client: int) -> Dataset:
    prompts = ["the cat sat", "a dog", "bird ran", "one two"]
    replies = [" on the mat", " over two", " under house", " and then"]
    turned = replies[client:] + replies[:client]
    return Dataset.from_dict({"prompt": prompts, "chosen": turned, "rejected": turned[::-1]})


def judged(client: int) -> Dataset:
    rows = preferences(client)
    return Dataset.from_dict(
        {"prompt": rows["prompt"], "completion": rows["chosen"], "label": [True, False, True, False]}
    )


def base_of(kind: str):
    model = make_model()
    if kind != "reward":
        return model
    torch.manual_seed(0)
    model.config.num_labels = 1
    return LlamaForSequenceClassification(model.config)


def adapter(kind: str):
    return make_lora(target_modules=TARGETS, task_type="SEQ_CLS" if kind == "reward" else "CAUSAL_LM")


KINDS = {
    "dpo": (FederatedDPOTrainer, FederatedDPOConfig, DPOTrainer, DPOConfig, preferences, {}),
    "reward": (FederatedRewardTrainer, FederatedRewardConfig, RewardTrainer, RewardConfig, preferences, {}),
    "kto": (
        FederatedKTOTrainer,
        FederatedKTOConfig,
        KTOTrainer,
        KTOConfig,
        judged,
        {"loss_type": "apo_zero_unpaired"},
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_client_learns_what_its_trainer_would_teach_it(kind, tmp_path):
    federated, federated_config, stock, stock_config, rows_of, more = KINDS[kind]
    common = {"processing_class": make_tokenizer(), "peft_config": adapter(kind)}
    data = {f"client_{i}": rows_of(i) for i in range(2)}
    trainer = federated(
        model=base_of(kind),
        args=settings(federated_config, tmp_path, num_rounds=1, parallel_clients=1, **more),
        train_dataset=data,
        eval_dataset=data,
        **common,
    )
    trainer.train()
    # Metrics of a step are in its own line, and those of an evaluation are each client's.
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert len(lines) == 4 and all("num_tokens" in line for line in lines)
    assert all("num_tokens" not in line for line in trainer.state.log_history if "round" in line)
    for client_id, rows in data.items():
        args = settings(stock_config, tmp_path, num_train_epochs=1, **more)
        alone = stock(model=base_of(kind), args=args, train_dataset=rows, **{**common, "peft_config": adapter(kind)})
        alone.train()
        own = trainer.client_state_dict(client_id)
        trained = {key: tensor for key, tensor in get_peft_model_state_dict(alone.model).items() if key in own}
        assert all(tensor.abs().max() > 1e-6 for tensor in trained.values())
        assert max_difference(trained, own) < 1e-6
    prepared = trainer.evaluate()
    names = {key.removeprefix("eval_client_1_") for key in prepared if "client_1" in key} - {"loss"}
    assert names and all(f"eval_{name}" in prepared and f"eval_client_0_{name}" in prepared for name in names)
    raw = trainer.evaluate(data)
    assert raw["eval_client_1_loss"] == pytest.approx(prepared["eval_client_1_loss"], abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_their_clients_train_one_at_a_time(kind, tmp_path):
    federated, config, stock, _, rows_of, more = KINDS[kind]
    with pytest.raises(ValueError, match=f"`{stock.__name__}` cannot train 2 clients side.*`parallel_clients=1`"):
        federated(model="unloaded", args=settings(config, tmp_path, **more), train_dataset=two(rows_of))


def two(rows_of) -> dict[str, Dataset]:
    return {"client_0": rows_of(0), "client_1": rows_of(1)}


@pytest.mark.parametrize("kind", KINDS)
def test_a_config_without_the_trainers_own_arguments_is_refused(kind, tmp_path):
    federated, config, stock, stock_config, rows_of, _ = KINDS[kind]
    name = stock_config.__name__
    with pytest.raises(
        TypeError, match=rf"(?s)arguments of `{name}` that `{stock.__name__}`.*class {config.__name__}\("
    ):
        federated(model="unloaded", args=make_args(tmp_path / "out"), train_dataset=two(rows_of))


def test_a_kl_term_of_other_clients_completions_is_refused(tmp_path):
    args = settings(FederatedKTOConfig, tmp_path, parallel_clients=1)
    with pytest.raises(ValueError, match="`loss_type='kto'`.*another's loss.*'apo_zero_unpaired'"):
        FederatedKTOTrainer(model="unloaded", args=args, train_dataset=two(judged))


@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_a_reference_adapter_beside_the_clients_is_refused(kind, tmp_path):
    federated, config, _, _, rows_of, more = KINDS[kind]
    args = settings(config, tmp_path, parallel_clients=1, **more)
    with pytest.raises(ValueError, match="`model` is a `PeftModel`.*second adapter.*Pass the base model and `peft_"):
        federated(model=get_peft_model(base_of(kind), adapter(kind)), args=args, train_dataset=two(rows_of))


def test_rows_for_evaluate_whose_reference_the_constructor_computes_are_refused(tmp_path):
    trainer = FederatedDPOTrainer(
        model=make_model(),
        args=settings(FederatedDPOConfig, tmp_path, parallel_clients=1, precompute_ref_log_probs=True),
        train_dataset=two(preferences),
        processing_class=make_tokenizer(),
        peft_config=adapter("dpo"),
    )
    with pytest.raises(ValueError, match="`precompute_ref_log_probs=True`.*as `eval_dataset`"):
        trainer.evaluate(two(preferences))


def test_a_trainer_that_keeps_generated_rows_is_refused(tmp_path):
    class GRPOTrainer(RewardTrainer):
        __module__ = "trl.trainer.grpo_trainer"

    class FederatedGRPOTrainer(FederatedMixin, GRPOTrainer):
        pass

    with pytest.raises(ValueError, match="`GRPOTrainer` generates completions for several steps"):
        FederatedGRPOTrainer(model="unloaded", args=make_args(tmp_path / "out"), train_dataset=two(preferences))


class TestSeq2Seq:
    @pytest.fixture
    def make(self, tmp_path):
        def make(config_class=FederatedSeq2SeqTrainingArguments, **kwargs):
            torch.manual_seed(0)
            config = T5Config(vocab_size=44, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, dropout_rate=0.0)
            config.decoder_start_token_id = 0
            model = T5ForConditionalGeneration(config)
            rows = {
                f"client_{i}": Dataset.from_dict(
                    {"input_ids": [[3 + i, 4, 5], [6, 7], [8, 9 + i]], "labels": [[5, 4], [7, 6, 1], [9]]}
                )
                for i in range(2)
            }
            return FederatedSeq2SeqTrainer(
                model=get_peft_model(model, make_lora(target_modules=["q", "v"], lora_dropout=0.0)),
                args=settings(config_class, tmp_path, num_rounds=2, **kwargs),
                train_dataset=rows,
                eval_dataset=rows,
                data_collator=DataCollatorForSeq2Seq(make_tokenizer()),
            )

        return make

    def test_clients_train_alike_in_parallel_and_one_by_one(self, make):
        states = []
        for parallel in (1, 2):
            trainer = make(parallel_clients=parallel)
            trainer.train()
            assert trainer.evaluate().keys() >= {"eval_client_0_loss", "eval_loss"}
            states.append(trainer.client_state_dict("client_1") | trainer.shared_state_dict())
        assert max_difference(*states) < 1e-5

    def test_its_config_is_needed(self, make):
        with pytest.raises(TypeError, match="arguments of `Seq2SeqTrainingArguments` that `Seq2SeqTrainer` reads"):
            make(FederatedConfig)

    def test_generating_in_evaluation_is_refused(self, make):
        with pytest.raises(ValueError, match="`predict_with_generate=True`.*`trainer.use_client"):
            make(predict_with_generate=True)
