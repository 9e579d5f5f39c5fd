"""Noise on the embeddings in training (NEFTune, https://arxiv.org/abs/2310.05914) for rows of several clients."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .slots import SlotRows


class ClientNoise:
    """
    Forward hook of an embedding layer that adds uniform noise of at most `alpha / sqrt(tokens * features)`, where a
    client's tokens are those of its own longest row: it does not matter how far its rows are padded beside others.

    Args:
        alpha (`float`):
            Scale of the noise, `neftune_noise_alpha`.
        multiple (`int`, *optional*):
            Number of tokens that rows are padded to a multiple of, which counts as it does for a client alone.
    """

    def __init__(self, alpha: float, multiple: int | None = None):
        self.alpha = alpha
        self.multiple = multiple or 1
        self.lengths: list[tuple[int, int]] = []

    def set_rows(self, slot_rows: SlotRows, inputs: Mapping[str, Any]) -> None:
        """Takes note of the rows of the next batch: how many of each client, and how long the longest is."""
        mask = inputs.get("attention_mask")
        self.lengths, start = [], 0
        for _, count in slot_rows:
            # Tokens that any row of the client has, on whichever side the others are padded.
            length = 0 if mask is None else int(mask[start : start + count].any(dim=0).sum())
            self.lengths.append((count, math.ceil(length / self.multiple) * self.multiple))
            start += count

    def __call__(self, module: nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
        if not module.training:
            return output
        features, longest = output.shape[-1], output.shape[1]
        scales = [
            self.alpha / math.sqrt((min(length, longest) or longest) * features)
            for count, length in self.lengths
            for _ in range(count)
        ]
        scale = torch.tensor(scales, device=output.device, dtype=output.dtype).view(-1, 1, 1)  # (rows, 1, 1)
        return output + torch.empty_like(output).uniform_(-1.0, 1.0) * scale
