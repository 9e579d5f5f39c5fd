"""`chat_template_path`: a template is used from the first check to the checkpoint, and new tokens are refused."""

import pytest
from conftest import WORDS, make_args, make_lora, make_model, make_tokenizer
from datasets import Dataset
from transformers import AddedToken

from hf_fedsa import FederatedTrainer

TEMPLATE = (
    "{% for message in messages %}{{ 'very happy ' + message['role'] + ' : ' + message['content'] + ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'very happy assistant : ' }}{% endif %}"
)
# Tokens of the prompt under it: "very happy user : the cat very happy assistant :".
PROMPT_TOKENS = 10


def rows() -> dict[str, Dataset]:
    conversation = {
        "prompt": [[{"role": "user", "content": "the cat"}]] * 4,
        "completion": [[{"role": "assistant", "content": "sat on"}]] * 4,
    }
    return {f"client_{i}": Dataset.from_dict(conversation) for i in range(2)}


@pytest.fixture
def tokenizer_without_template():
    """Of 64 tokens, which is what TRL fills a vocabulary up to."""
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([f"word_{i}" for i in range(64 - len(WORDS) - 3)])
    tokenizer.chat_template = None
    assert len(tokenizer) == 64
    return tokenizer


@pytest.fixture
def base(tmp_path, tokenizer_without_template):
    make_model(vocab_size=64).save_pretrained(tmp_path / "base")
    tokenizer_without_template.save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


@pytest.fixture
def source(tmp_path):
    """Makes the folder of another tokenizer, with some tokens more."""

    def make(*new):
        tokenizer = make_tokenizer()
        tokenizer.add_tokens([AddedToken(token) for token in new])
        tokenizer.chat_template = TEMPLATE
        tokenizer.save_pretrained(tmp_path / "source")
        return str(tmp_path / "source")

    return make


@pytest.fixture
def template(tmp_path):
    (tmp_path / "template.jinja").write_text(TEMPLATE)
    return str(tmp_path / "template.jinja")


def make_trainer(model, path, tmp_path, **kwargs):
    args = make_args(tmp_path / "out", chat_template_path=path, num_rounds=1, local_steps=1, **kwargs)
    return FederatedTrainer(model, args=args, train_dataset=rows(), peft_config=make_lora())


@pytest.mark.parametrize("kind", ["file", "tokenizer"])
def test_a_template_is_used_and_saved(kind, base, template, source, tmp_path):
    path = template if kind == "file" else source()
    trainer = make_trainer(base, path, tmp_path, save_strategy="epoch", max_length=PROMPT_TOKENS + 1)
    text = trainer.processing_class.decode(trainer.train_dataset[0]["input_ids"])
    assert text == "very happy user : the cat very happy assistant : sat"
    trainer.train()
    saved = tmp_path / "out" / "checkpoint-1" / "chat_template.jinja"
    assert saved.read_text() == TEMPLATE


@pytest.mark.parametrize("kind", ["file", "tokenizer"])
def test_prompts_that_fill_max_length_under_the_template_are_found_without_the_model(
    kind, base, template, source, tmp_path
):
    (tmp_path / "base" / "model.safetensors").unlink()
    path = template if kind == "file" else source()
    with pytest.raises(ValueError, match=f"'client_0' has no row left.*`max_length={PROMPT_TOKENS}`"):
        make_trainer(base, path, tmp_path, max_length=PROMPT_TOKENS)


@pytest.mark.parametrize("loaded", [False, True], ids=["by name", "loaded"])
def test_a_template_with_new_tokens_is_refused_without_the_model(loaded, base, source, tmp_path):
    path = source("<im_start>", "<im_end>")
    model = base
    if loaded:
        model = make_model(vocab_size=64)
        model.config._name_or_path = base
    else:
        (tmp_path / "base" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="`chat_template_path=.*adds 2 tokens, such as '<im_start>'.*`.jinja` file"):
        make_trainer(model, path, tmp_path)


def test_a_vocabulary_that_would_be_filled_up_is_refused(base, source, tmp_path):
    make_tokenizer().save_pretrained(base)
    with pytest.raises(ValueError, match="adds 20 tokens to fill it up to the vocabulary of 44"):
        make_trainer(base, source(), tmp_path)
