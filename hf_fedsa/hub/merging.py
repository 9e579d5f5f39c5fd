"""An adapter merged into its base."""

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from ..client.base_layers import unpack


def merge(model: PeftModel) -> PreTrainedModel:
    """
    Merges the active adapter into the base weights, and returns the base.

    Where input and output embeddings are one weight and only one of them is adapted, or each in its own way, they are
    two weights afterwards, and the model's config says so.

    Raises:
        `ValueError`: an adapted weight also serves in another place, which would change with it.
    """
    base = model.get_base_model()
    unpack(base)  # PEFT would read the weights in the layout that they are saved in.
    holders: dict[int, list[nn.Module]] = {}
    for module in base.modules():
        for parameter in module.parameters(recurse=False):
            holders.setdefault(id(parameter), []).append(module)
    adapted = [layer.get_base_layer() for layer in base.modules() if isinstance(layer, BaseTunerLayer)]
    tied = [(layer, name) for layer in adapted for name in _tied_parameters(layer, holders)]
    if tied:
        _check_untieable(base, tied, holders)
        for layer, name in tied:
            parameter = getattr(layer, name)
            setattr(layer, name, nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad))
        base.config.tie_word_embeddings = False
        base.config.get_text_config().tie_word_embeddings = False
        base.all_tied_weights_keys = base.get_expanded_tied_weights_keys(all_submodels=True)
    return model.merge_and_unload()


def _tied_parameters(layer: nn.Module, holders: dict[int, list[nn.Module]]) -> list[str]:
    return [name for name, parameter in layer.named_parameters(recurse=False) if len(holders[id(parameter)]) > 1]


def _check_untieable(
    base: PreTrainedModel, tied: list[tuple[nn.Module, str]], holders: dict[int, list[nn.Module]]
) -> None:
    embeddings = [base.get_input_embeddings(), base.get_output_embeddings()]
    embeddings = [layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer for layer in embeddings]
    names = {module: name.removesuffix(".base_layer") for name, module in base.named_modules()}
    for layer, name in tied:
        for holder in holders[id(getattr(layer, name))]:
            if holder is not layer and not any(holder is embedding for embedding in embeddings):
                raise ValueError(
                    f"`merge=True` cannot merge into the weight of {names[layer]!r}, which is also that of "
                    f"{names[holder]!r}: both would change. Load the client without merging, or make the two weights "
                    "separate in the base model first."
                )
