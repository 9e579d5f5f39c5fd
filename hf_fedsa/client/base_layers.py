"""Base layers that stay as training needs them: not packed for inference, and with a gradient for their input."""

import logging
from collections.abc import Hashable, Iterator

import torch
from peft import PeftModel
from peft.import_utils import is_bnb_4bit_available, is_bnb_available
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

logger = logging.getLogger(__name__)


def keep_layout(model: nn.Module) -> int:
    """
    Keeps 4-bit layers in the layout that they train in, and takes those that were packed for inference back to it.

    On CPUs with AVX-512 bf16, bitsandbytes packs the weight of a `Linear4bit` in place at its first forward pass in
    evaluation mode. From then on the layer computes in bf16, by an operation that has no gradient, in training too
    (0.50: `nn/modules.py`, `autograd/_functions.py`). Packing also rounds the scales of the blocks to bf16, so it
    cannot be undone without a trace: what is not packed yet must not be.

    Returns:
        `int`: number of layers that had been packed. Their weights are those that they were used with since: the
        scales of their blocks have 8 bits of precision.
    """
    for layer in _layers_of_4_bit(model):
        layer.support_avx512bf16_for_cpu = False
    if packed := unpack(model):
        logger.warning(
            "%d base layers had been packed for inference, as the base model was evaluated before it came here. "
            "They are taken back, with scales rounded to bf16. Load the base anew to train on the original.",
            packed,
        )
    return packed


def unpack(model: nn.Module) -> int:
    """Takes 4-bit layers back that were packed for inference, to be packed again when it comes to that."""
    packed = [m for m in _layers_of_4_bit(model) if getattr(m.weight.quant_state, "packing_format_for_cpu", False)]
    for layer in packed:
        _unpack(layer)
    return len(packed)


def _layers_of_4_bit(model: nn.Module) -> Iterator[nn.Module]:
    if is_bnb_4bit_available():
        from bitsandbytes.nn import Linear4bit

        yield from (module for module in model.modules() if isinstance(module, Linear4bit))


@torch.no_grad()
def _unpack(layer: nn.Module) -> None:
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

    state = layer.weight.quant_state
    scales = state.absmax.T.reshape(-1).float()  # (blocks,)
    # bitsandbytes would round the scales once more, or leave them transposed if they had not been quantized.
    state.original_nested = False
    layer.weight.data, state = _convert_weight_packed_for_cpu_inverse(layer.weight.data, state)
    state.absmax = scales


class GradientProbe:
    """
    Asks every kind of quantized base layer for the gradient of its input.

    A layer without one cuts the adapters below it off, but for what goes around it on the residual stream. Training
    goes on, the loss falls a little, and nothing tells that most adapters learn next to nothing.

    Args:
        model ([`~peft.PeftModel`]):
            Model whose base layers are asked, with an adapter or without.
    """

    def __init__(self, model: PeftModel):
        self._dtype = model.get_base_model().dtype
        adapted = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
        quantized = {m.get_base_layer(): m.in_features for m in adapted if _may_be_quantized(m.get_base_layer())}
        # Gradients also pass through layers that have no adapter.
        quantized |= {layer: layer.in_features for layer in model.modules() if isinstance(layer, _bnb_layers())}
        self._in_features: dict[nn.Module, int] = quantized

    def check(self) -> None:
        """
        Takes milliseconds, and leaves layers and random numbers as they are.

        Raises:
            `RuntimeError`: a layer has no gradient for its input.
        """
        for layer in {_kind_of(layer): layer for layer in self._in_features}.values():
            if not self._passes_gradient(layer):
                raise RuntimeError(
                    f"The quantized base layers of the kind `{type(layer).__name__}` pass no gradient to their input, "
                    "so most adapters would learn nothing while the loss still falls a little. Something has put them "
                    "into a form for inference. Load the base model anew, and evaluate it through the trainer "
                    "(`evaluate`, `use_client`)."
                )

    def _passes_gradient(self, layer: nn.Module) -> bool:
        device = next(tensor.device for tensors in (layer.parameters(), layer.buffers()) for tensor in tensors)
        x = torch.ones(1, self._in_features[layer], dtype=self._dtype, device=device, requires_grad=True)
        before = layer.training, dict(vars(layer))
        layer.train()
        try:
            with torch.enable_grad():
                output = layer(x)
                if not output.requires_grad:
                    return False
                (gradient,) = torch.autograd.grad(output.float().square().sum(), x, allow_unused=True)
        finally:
            layer.train(before[0])
            # A `Linear4bit` takes the dtype of its first input for all that follow.
            vars(layer).update(before[1])
        return gradient is not None and bool(gradient.isfinite().all() and gradient.any())


def _bnb_layers() -> tuple[type[nn.Module], ...]:
    if not is_bnb_available():
        return ()
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    return Linear4bit, Linear8bitLt


def _may_be_quantized(layer: nn.Module) -> bool:
    """Whether it is none of torch's own layers, which have a gradient in every mode. Embeddings have ids as input."""
    return type(layer).__module__.partition(".")[0] != "torch" and not isinstance(layer, nn.Embedding)


def _kind_of(layer: nn.Module) -> Hashable:
    """Layers alike in this compute alike: class, dtype, and how the weight is quantized and laid out."""
    weight = getattr(layer, "weight", None)
    state = getattr(weight, "quant_state", None)
    layout = {} if state is None else vars(state)
    plain = tuple((k, v) for k, v in sorted(layout.items()) if isinstance(v, (bool, int, str)))
    return type(layer), getattr(weight, "dtype", None), plain
