"""The conditional UNet of Stable Diffusion 1.x/2.x, from scratch, small enough to train on a laptop.

Configuration names and state-dict keys are those of diffusers' `UNet2DConditionModel`: published weights
load here, ours load there. One class serves the toy preset and Stable Diffusion; only `UNetConfig` differs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..kernels import apply_group_norm
from .layers import (
    Downsample2D,
    ResnetBlock2D,
    TimestepEmbedding,
    Transformer2DModel,
    Upsample2D,
    timestep_embedding,
)


@dataclass(frozen=True)
class UNetConfig:
    """Names and defaults of diffusers' configuration file (Stable Diffusion 1.5 where it says nothing)."""

    sample_size: int = 64  # latent height and width that it was trained at; any size runs
    in_channels: int = 4  # 9 for Stable Diffusion inpainting: latent 4, mask 1, masked image 4
    out_channels: int = 4
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    mid_block_type: str = "UNetMidBlock2DCrossAttn"
    up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    cross_attention_dim: int = 768
    # Kept under diffusers' name with its odd meaning: this is the NUMBER OF HEADS, not their width.
    attention_head_dim: int | tuple[int, ...] = 8
    use_linear_projection: bool = False  # True in Stable Diffusion 2.x
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    flip_sin_to_cos: bool = True
    freq_shift: float = 0.0

    def __post_init__(self):
        levels = len(self.block_out_channels)
        if not (len(self.down_block_types) == len(self.up_block_types) == levels):
            raise ValueError(
                f"UNetConfig: block_out_channels has {levels} levels, down_block_types {len(self.down_block_types)}, "
                f"up_block_types {len(self.up_block_types)}; the three must be equally long"
            )
        unknown = set(self.down_block_types) - {"DownBlock2D", "CrossAttnDownBlock2D"}
        unknown |= set(self.up_block_types) - {"UpBlock2D", "CrossAttnUpBlock2D"}
        unknown |= {self.mid_block_type} - {"UNetMidBlock2DCrossAttn"}
        if unknown:
            raise ValueError(f"UNetConfig: unknown block type {sorted(unknown)}; see minipref/models/unet.py")
        if len(self.heads) != levels:
            raise ValueError(f"UNetConfig: attention_head_dim has {len(self.heads)} entries for {levels} levels")
        bad = [c for c in self.block_out_channels if c % self.norm_num_groups]
        if bad:
            raise ValueError(f"UNetConfig: {bad} channels cannot be split into norm_num_groups={self.norm_num_groups}")

    @property
    def heads(self) -> tuple[int, ...]:
        h = self.attention_head_dim
        return (h,) * len(self.block_out_channels) if isinstance(h, int) else tuple(h)


class _Block(nn.Module):
    """Residual blocks, each followed by a transformer where the block type has cross-attention."""

    def __init__(self, cfg: UNetConfig, widths_in: list[int], width: int, heads: int | None):
        super().__init__()
        time_dim = 4 * cfg.block_out_channels[0]
        self.resnets = nn.ModuleList(
            ResnetBlock2D(c, width, time_dim, cfg.norm_num_groups, cfg.norm_eps) for c in widths_in
        )
        if heads is not None:
            self.attentions = nn.ModuleList(
                Transformer2DModel(
                    width, cfg.cross_attention_dim, heads, cfg.norm_num_groups, cfg.use_linear_projection
                )
                for _ in widths_in
            )

    def layer(self, i: int, x: Tensor, emb: Tensor, context: Tensor) -> Tensor:
        x = self.resnets[i](x, emb)
        return self.attentions[i](x, context) if hasattr(self, "attentions") else x


class _DownBlock(_Block):
    def __init__(self, cfg: UNetConfig, c_in: int, c_out: int, heads: int | None, downsample: bool):
        super().__init__(cfg, [c_in] + [c_out] * (cfg.layers_per_block - 1), c_out, heads)
        if downsample:
            self.downsamplers = nn.ModuleList([Downsample2D(c_out)])

    def forward(self, x: Tensor, emb: Tensor, context: Tensor) -> list[Tensor]:
        skips = []
        for i in range(len(self.resnets)):
            x = self.layer(i, x, emb, context)
            skips.append(x)
        if hasattr(self, "downsamplers"):
            skips.append(self.downsamplers[0](x))
        return skips  # the last one goes on down


class _UpBlock(_Block):
    def __init__(self, cfg: UNetConfig, widths_in: list[int], c_out: int, heads: int | None, upsample: bool):
        super().__init__(cfg, widths_in, c_out, heads)
        if upsample:
            self.upsamplers = nn.ModuleList([Upsample2D(c_out)])

    def forward(self, x: Tensor, skips: list[Tensor], emb: Tensor, context: Tensor) -> Tensor:
        for i in range(len(self.resnets)):
            x = self.layer(i, torch.cat([x, skips.pop()], dim=1), emb, context)
        if hasattr(self, "upsamplers"):
            x = self.upsamplers[0](x, skips[-1].shape[-2:])
        return x


class _MidBlock(nn.Module):
    def __init__(self, cfg: UNetConfig, width: int, heads: int):
        super().__init__()
        time_dim = 4 * cfg.block_out_channels[0]
        self.resnets = nn.ModuleList(
            ResnetBlock2D(width, width, time_dim, cfg.norm_num_groups, cfg.norm_eps) for _ in range(2)
        )
        self.attentions = nn.ModuleList(
            [Transformer2DModel(width, cfg.cross_attention_dim, heads, cfg.norm_num_groups, cfg.use_linear_projection)]
        )

    def forward(self, x: Tensor, emb: Tensor, context: Tensor) -> Tensor:
        x = self.resnets[0](x, emb)
        return self.resnets[1](self.attentions[0](x, context), emb)


class UNet(nn.Module):
    """Predicts epsilon or v from a noisy latent, the time and the text (diffusers: UNet2DConditionModel)."""

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = cfg = config
        widths, heads, levels = cfg.block_out_channels, cfg.heads, len(cfg.block_out_channels)
        self.conv_in = nn.Conv2d(cfg.in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(widths[0], 4 * widths[0])

        self.down_blocks = nn.ModuleList()
        skip_widths = [widths[0]]  # what each up-block residual block will concatenate, in push order
        for i, kind in enumerate(cfg.down_block_types):
            last = i == levels - 1
            block_heads = heads[i] if kind == "CrossAttnDownBlock2D" else None
            self.down_blocks.append(_DownBlock(cfg, widths[max(i - 1, 0)], widths[i], block_heads, not last))
            skip_widths += [widths[i]] * (cfg.layers_per_block + (not last))

        self.mid_block = _MidBlock(cfg, widths[-1], heads[-1])

        self.up_blocks = nn.ModuleList()
        below = widths[-1]
        for i, kind in enumerate(cfg.up_block_types):
            level = levels - 1 - i
            block_heads = heads[level] if kind == "CrossAttnUpBlock2D" else None
            widths_in = []
            for _ in range(cfg.layers_per_block + 1):
                widths_in.append(below + skip_widths.pop())
                below = widths[level]
            self.up_blocks.append(_UpBlock(cfg, widths_in, widths[level], block_heads, level > 0))

        self.conv_norm_out = nn.GroupNorm(cfg.norm_num_groups, widths[0], eps=cfg.norm_eps)
        self.conv_out = nn.Conv2d(widths[0], cfg.out_channels, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        """x (B, in_channels, h, w), t (B,) training-schedule times, context (B, L, cross_attention_dim)
        -> (B, out_channels, h, w)."""
        cfg = self.config
        if x.ndim != 4 or x.shape[1] != cfg.in_channels:
            raise ValueError(f"UNet: x is {tuple(x.shape)}, expected (B, {cfg.in_channels}, h, w)")
        if t.shape != x.shape[:1]:
            raise ValueError(f"UNet: t is {tuple(t.shape)}, expected ({x.shape[0]},)")
        if context.ndim != 3 or context.shape[::2] != (x.shape[0], cfg.cross_attention_dim):
            expected = f"({x.shape[0]}, L, {cfg.cross_attention_dim})"
            raise ValueError(f"UNet: context is {tuple(context.shape)}, expected {expected}")

        emb = timestep_embedding(
            t, cfg.block_out_channels[0], flip_sin_to_cos=cfg.flip_sin_to_cos, freq_shift=cfg.freq_shift
        )
        emb = self.time_embedding(emb.to(x.dtype))  # (B, E)
        x = self.conv_in(x)
        skips = [x]
        for block in self.down_blocks:
            skips += block(skips[-1], emb, context)
        x = self.mid_block(skips[-1], emb, context)
        for block in self.up_blocks:
            x = block(x, skips, emb, context)
        return self.conv_out(apply_group_norm(self.conv_norm_out, x))
