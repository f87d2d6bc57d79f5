"""Feature extractors of the reward model: (completion, masked picture, mask) -> z, behind one interface.

PrefPaint's is a CLIP image tower with a small head; small pictures need the convolutional tower, which looks at single
pixels. Both are called as `features(images, masked, masks)` and carry their `config`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .clip import CLIP, CLIPConfig, VisionTower, pixel_values


@dataclass(frozen=True)
class FeatureConfig:
    """The convolutional tower."""

    pixel_width: int  # channels of the layers that see one pixel at a time
    widths: tuple[int, ...]  # channels at full, half, quarter … resolution
    dim: int  # d, the length of z (PrefPaint: 256)


class RewardFeatures(nn.Module):
    """A convolutional tower.

    Two layers look at single pixels (is this a clean colour?), the next at full resolution, nothing is normalised, and
    mean *and* maximum over the hole are kept at every depth: with normalisation or means alone, texture is lost.
    """

    def __init__(self, config: FeatureConfig):
        super().__init__()
        self.config = config
        c_in, pixel = config.pixel_width, config.pixel_width
        alone = (nn.Conv2d(7, pixel, 1), nn.ReLU(), nn.Conv2d(pixel, pixel, 1), nn.ReLU())
        stages = [nn.Sequential(*alone)]
        for i, c in enumerate(config.widths):
            first = nn.Conv2d(c_in, c, 3, stride=1 if i == 0 else 2, padding=1)
            stages.append(nn.Sequential(first, nn.ReLU(), nn.Conv2d(c, c, 3, padding=1), nn.ReLU()))
            c_in = c
        self.stages = nn.ModuleList(stages)
        pooled = 2 * (pixel + sum(config.widths))
        self.project = nn.Sequential(nn.Linear(pooled, config.dim), nn.ReLU(), nn.Linear(config.dim, config.dim))

    def forward(self, images: Tensor, masked: Tensor, masks: Tensor) -> Tensor:
        """images, masked (B, 3, H, W) in [0, 1], masks (B, 1, H, W) -> (B, d)."""
        h, hole, pooled = torch.cat([images * 2 - 1, masked * 2 - 1, masks], dim=1), masks, []
        for stage in self.stages:
            h = stage(h)
            hole = F.adaptive_max_pool2d(hole, h.shape[-2:])
            pooled.append((h * hole).sum((2, 3)) / hole.sum((2, 3)).clamp(min=1))
            pooled.append((h * hole).amax((2, 3)))  # h ≥ 0, so what lies outside cannot win
        return self.project(torch.cat(pooled, dim=1))


@dataclass(frozen=True)
class ClipFeatureConfig:
    """PrefPaint's extractor: a CLIP image tower and a head."""

    clip: dict  # fields of CLIPConfig; only its vision tower is built
    dim: int  # d, the length of z (PrefPaint: 256)
    heads: int = 16  # of the head's encoder layer (PrefPaint: 16)
    dropout: float = 0.1


class ClipFeatures(nn.Module):
    """CLIP embeds completion and masked picture; the pair passes one transformer encoder layer and two linear ones.

    The encoder layer sees a sequence of length one, and no non-linearity stands between the last layers, as in
    PrefPaint's code. The mask is not an input; it shows as grey in the masked picture.
    """

    def __init__(self, config: ClipFeatureConfig):
        super().__init__()
        self.config = config
        names = {f.name for f in fields(CLIPConfig)}
        values: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in config.clip.items() if k in names
        }
        self.clip_config = c = CLIPConfig(**values)
        P = c.projection_dim
        self.vision_model = VisionTower(c)
        self.visual_projection = nn.Linear(c.vision_hidden_size, P, bias=False)
        self.mix = nn.TransformerEncoderLayer(2 * P, config.heads, 2 * P, config.dropout, batch_first=True)
        self.project = nn.Sequential(nn.Linear(2 * P, P), nn.Dropout(config.dropout), nn.Linear(P, config.dim))

    @staticmethod
    def start_from(clip: CLIP, dim: int, freeze: float) -> ClipFeatures:
        """The tower of a trained CLIP, the first `freeze` of its layers frozen (PrefPaint: 0.7), and a fresh head.

        1 freezes the whole tower, 0 nothing.
        """
        if not 0 <= freeze <= 1:
            raise ValueError(f"freeze={freeze}: choose a share of the layers, 0 to 1")
        c = clip.config
        features = ClipFeatures(ClipFeatureConfig({f.name: getattr(c, f.name) for f in fields(c)}, dim))
        features.vision_model.load_state_dict(clip.vision_model.state_dict())
        features.visual_projection.load_state_dict(clip.visual_projection.state_dict())
        tower, layers = features.vision_model, list(features.vision_model.encoder.layers)
        frozen: list[nn.Module] = layers[: round(freeze * len(layers))]
        if frozen:
            frozen += [tower.embeddings, tower.pre_layrnorm]
        if freeze == 1:
            frozen += [tower, features.visual_projection]
        for module in frozen:
            module.requires_grad_(False)
        return features

    def embed(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> CLIP's image embedding before it is brought to unit length, (B, P)."""
        return self.visual_projection(self.vision_model(pixel_values(images, self.clip_config))[1])

    def forward(self, images: Tensor, masked: Tensor, masks: Tensor) -> Tensor:
        """images, masked (B, 3, H, W) in [0, 1], masks (B, 1, H, W) -> (B, d)."""
        both = torch.cat([self.embed(images), self.embed(masked)], dim=1)
        return self.project(self.mix(both[:, None])[:, 0])
