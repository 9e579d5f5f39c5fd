"""Names of the files of a tokenizer or processor."""

from pathlib import PurePosixPath

from .whole_folder import FEDERATION, ROUNDS

_CHAT_TEMPLATE, _OLD_CHAT_TEMPLATE = "chat_template.jinja", "chat_template.json"
_CHAT_TEMPLATES = "additional_chat_templates"
# What `save_pretrained` of those of transformers writes beside the files that `_VOCABULARIES` lists.
_SETTINGS = {
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
    "audio_tokenizer_config.json",
    _CHAT_TEMPLATE,
    _OLD_CHAT_TEMPLATE,
}
_VOCABULARIES = {
    "bpe.codes",
    "byte_maps.json",
    "dict.txt",
    "emoji.json",
    "entity_vocab.json",
    "merges.txt",
    "normalizer.json",
    "prophetnet.tokenizer",
    "sentencepiece.bpe.model",
    "sentencepiece.model",
    "source.spm",
    "spiece.model",
    "spm.model",
    "spm_char.model",
    "target.spm",
    "target_vocab.json",
    "tekken.json",
    "tokenizer.model",
    "vocab-src.json",
    "vocab-tgt.json",
    "vocab.json",
    "vocab.txt",
    "word_pronunciation.json",
    "word_shape.json",
}


def may_be_processing_file(name: str) -> bool:
    """Whether a tokenizer or processor, which may be the user's own, can have a file of this name."""
    path = PurePosixPath(name)
    return (
        bool(path.parts)
        and not path.is_absolute()
        and "\\" not in name
        and not any(part.startswith(".") for part in path.parts)
        and path.parts[0] not in ("clients", "shared", ROUNDS, FEDERATION)
        and path.suffix not in (".bin", ".pt", ".pth", ".pkl", ".safetensors")
    )


def is_known_processing_file(name: str) -> bool:
    """Whether `save_pretrained` of a tokenizer or processor of transformers writes a file of this name."""
    if not may_be_processing_file(name):
        return False
    *folders, file = PurePosixPath(name).parts
    if folders == [_CHAT_TEMPLATES]:
        return file.endswith(".jinja")
    # Processors with several tokenizers save the others in folders of their own.
    in_place = not folders or (len(folders) == 1 and "tokenizer" in folders[0])
    return in_place and file in _SETTINGS | _VOCABULARIES
