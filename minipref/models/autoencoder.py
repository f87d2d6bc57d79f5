"""Pictures ↔ latents. Pictures are float32 in [0, 1] outside and [−1, 1] inside; masks are 1 in the hole."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor


class SpaceToDepth:
    """The toy's codec: each `factor`×`factor` square of pixels becomes the channels of one position. Lossless.

    (B, 3, H, W) in [0, 1] ↔ (B, 3·factor², H/factor, W/factor) in [−1, 1].
    """

    def __init__(self, factor: int = 2):
        self.factor = factor

    @staticmethod
    def with_channels(channels: int) -> SpaceToDepth:
        """The codec whose latents have so many channels; ValueError where there is none."""
        factor = math.isqrt(max(channels, 0) // 3)
        if factor < 1 or 3 * factor**2 != channels:
            raise ValueError(f"no space-to-depth codec has latents of {channels} channels (3, 12, 27, 48 …)")
        return SpaceToDepth(factor)

    @property
    def channels(self) -> int:
        return 3 * self.factor**2

    @property
    def mask_channels(self) -> int:
        return self.factor**2

    def encode(self, images: Tensor) -> Tensor:
        H, W = images.shape[-2:]
        if H % self.factor or W % self.factor:
            raise ValueError(f"SpaceToDepth: {H}×{W} pixels cannot be split into squares of {self.factor}")
        return F.pixel_unshuffle(images * 2 - 1, self.factor)

    def decode(self, latents: Tensor) -> Tensor:
        return (F.pixel_shuffle(latents, self.factor) / 2 + 0.5).clamp(0, 1)

    def encode_mask(self, masks: Tensor) -> Tensor:
        """(B, 1, H, W) -> (B, factor², H/factor, W/factor), nothing lost."""
        return F.pixel_unshuffle(masks, self.factor)
