"""The chat template that TRL will set, read before a model is loaded."""

import math
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase
from trl import SFTConfig

# TRL fills the vocabulary up to a multiple of this when it takes a template from another tokenizer.
_VOCABULARY_MULTIPLE = 64


def load_tokenizer(model: Any, args: SFTConfig, processing_class: Any = None) -> Any:
    """The tokenizer (or processor) that a trainer uses, without its model."""
    if processing_class is not None:
        return processing_class
    name = model if isinstance(model, str) else model.config._name_or_path
    revision = (args.model_init_kwargs or {}).get("revision") if isinstance(model, str) else None
    return AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=args.trust_remote_code)


def chat_template_at(path: str | None) -> str | None:
    """The template of `chat_template_path`: a file, or that of another tokenizer. `None` is the model's own."""
    if path is None:
        return None
    if _is_template(path):
        return Path(path).read_text(encoding="utf-8")
    return AutoTokenizer.from_pretrained(path).get_chat_template()


def refuse_new_tokens(model: Any, args: SFTConfig, processing_class: Any = None) -> None:
    """
    Refuses a chat template from a tokenizer with tokens that the model does not know.

    Raises:
        `ValueError`: the model would be given new embeddings, which no saved adapter fits without.
    """
    path = args.chat_template_path
    if path is None or _is_template(path):
        return
    tokenizer = load_tokenizer(model, args, processing_class)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        tokenizer = tokenizer.tokenizer
    known = tokenizer.get_vocab()
    source = AutoTokenizer.from_pretrained(path)
    new = [token.content for token in source.added_tokens_decoder.values() if token.content not in known]
    size = len(known) + len(new)
    filled = math.ceil(size / _VOCABULARY_MULTIPLE) * _VOCABULARY_MULTIPLE
    if filled == len(known):
        return
    what = f"{len(new)} tokens, such as {new[0]!r}," if new else f"{filled - size} tokens to fill it up"
    raise ValueError(
        f"`chat_template_path={path!r}` adds {what} to the vocabulary of {len(known)}, and the model gets a random "
        "embedding for each. Adapters trained on it would load on no base model but this one, which is not saved. "
        "Pass the template alone, as a `.jinja` file of tokens that the model has; or add the tokens yourself "
        "(`trl.clone_chat_template`), save that model with its tokenizer, and pass its folder as `model`, with the "
        "embedding and the head in `modules_to_save`."
    )


def _is_template(path: str) -> bool:
    return path.endswith((".jinja", ".j2")) and Path(path).is_file()
