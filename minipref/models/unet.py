"""The conditional UNet of Stable Diffusion 1.x/2.x, from scratch, small enough to train on a laptop.

Configuration names and state-dict keys are those of diffusers' `UNet2DConditionModel`: published weights
load here, ours load there. One class serves the toy preset and Stable Diffusion; only `UNetConfig` differs.

Shapes: B batch · C channels · H,W spatial · N tokens · L text tokens · D text width · E time-embedding width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import geglu
from ..kernels.common import Decision
from ..kernels.geglu import fuses as geglu_fuses
from ..kernels.group_norm_act import fuses as group_norm_fuses


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
            down, up = len(self.down_block_types), len(self.up_block_types)
            raise ValueError(
                f"UNetConfig: {levels} block_out_channels, {down} down and {up} up blocks; expected as many"
            )
        unknown = set(self.down_block_types) - {"DownBlock2D", "CrossAttnDownBlock2D"}
        unknown |= set(self.up_block_types) - {"UpBlock2D", "CrossAttnUpBlock2D"}
        if unknown := unknown | {self.mid_block_type} - {"UNetMidBlock2DCrossAttn"}:
            raise ValueError(f"UNetConfig: unknown block type {sorted(unknown)}; see minipref/models/unet.py")
        if len(self.heads) != levels:
            raise ValueError(f"UNetConfig: attention_head_dim has {len(self.heads)} entries for {levels} levels")
        if bad := [c for c in self.block_out_channels if c % self.norm_num_groups]:
            raise ValueError(f"UNetConfig: {bad} channels cannot be split into norm_num_groups={self.norm_num_groups}")

    @property
    def heads(self) -> tuple[int, ...]:
        h = self.attention_head_dim
        return (h,) * len(self.block_out_channels) if isinstance(h, int) else tuple(h)


def timestep_embedding(t: Tensor, dim: int, *, flip_sin_to_cos: bool = True, freq_shift: float = 0.0) -> Tensor:
    """Sinusoidal embedding of the diffusion time (Ho et al. 2020; Vaswani et al. 2017).

    t (B,) -> (B, dim), fp32. `flip_sin_to_cos` puts the cosines first, as Stable Diffusion does.
    """
    half = dim // 2
    freqs = torch.exp(
        -math.log(10_000) * torch.arange(half, dtype=torch.float32, device=t.device) / (half - freq_shift)
    )
    angles = t.float()[:, None] * freqs[None]  # (B, half)
    parts = [angles.cos(), angles.sin()] if flip_sin_to_cos else [angles.sin(), angles.cos()]
    emb = torch.cat(parts, dim=1)
    return F.pad(emb, (0, 1)) if dim % 2 else emb  # (B, dim)


class TimestepEmbedding(nn.Module):
    def __init__(self, dim_in: int, dim_out: int):
        super().__init__()
        self.linear_1 = nn.Linear(dim_in, dim_out)
        self.linear_2 = nn.Linear(dim_out, dim_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class GroupNormAct(nn.GroupNorm):
    """GroupNorm and an activation, "silu" or "identity": fused where that pays, else PyTorch's own operations."""

    def __init__(self, groups: int, channels: int, eps: float, act: str = "silu"):
        super().__init__(groups, channels, eps)
        self.act, self.fused = act, Decision(group_norm_fuses)

    def forward(self, x: Tensor) -> Tensor:
        if self.fused(x):
            a, b = (v.expand(len(x), -1) for v in (self.weight, self.bias))
            return torch.ops.minipref.group_norm_act(x, a, b, self.num_groups, self.eps, self.act == "silu")[0]
        return F.silu(super().forward(x)) if self.act == "silu" else super().forward(x)


class ResnetBlock2D(nn.Module):
    """GroupNorm → SiLU → conv, + time, GroupNorm → SiLU → conv, + shortcut."""

    def __init__(self, cfg: UNetConfig, c_in: int, c_out: int):
        super().__init__()
        groups, eps, time_dim = cfg.norm_num_groups, cfg.norm_eps, 4 * cfg.block_out_channels[0]
        self.norm1 = GroupNormAct(groups, c_in, eps)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time_emb_proj = nn.Linear(time_dim, c_out)
        self.norm2 = GroupNormAct(groups, c_out, eps)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else None

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv1(self.norm1(x))
        h = h + self.time_emb_proj(F.silu(emb))[:, :, None, None]
        h = self.conv2(self.norm2(h))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Attention(nn.Module):
    """Multi-head attention; self-attention where no context is given. Queries, keys and values carry no bias."""

    def __init__(self, dim: int, context_dim: int, heads: int):
        super().__init__()
        if dim % heads:
            raise ValueError(f"attention over {dim} channels cannot be split into {heads} heads")
        self.heads = heads
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(context_dim, dim, bias=False)
        self.to_v = nn.Linear(context_dim, dim, bias=False)
        # diffusers keeps a dropout at index 1 of to_out; it has no parameters.
        self.to_out = nn.ModuleList([nn.Linear(dim, dim), nn.Identity()])

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        source = x if context is None else context
        source = source[:1] if source.stride(0) == 0 else source  # one text for all: its keys and values once
        q, k, v = (
            proj(y).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B or 1, heads, N or L, C/heads)
            for proj, y in ((self.to_q, x), (self.to_k, source), (self.to_v, source))
        )
        out = F.scaled_dot_product_attention(q, *(y.expand(len(x), -1, -1, -1) for y in (k, v)))
        return self.to_out[0](out.transpose(1, 2).flatten(2))  # (B, N, C)


class GEGLU(nn.Module):
    """h, gate = x W + b;  h · gelu(gate)  (Shazeer 2020, erf form)."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.proj = nn.Linear(dim, 2 * hidden)
        self.fused = Decision(geglu_fuses)

    def forward(self, x: Tensor) -> Tensor:
        h = self.proj(x)
        return torch.ops.minipref.geglu(h) if self.fused(h) else geglu(h, impl="torch")


class FeedForward(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.net = nn.ModuleList([GEGLU(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim)])

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](self.net[0](x))


class BasicTransformerBlock(nn.Module):
    """Self-attention, cross-attention to the text, feed-forward; each pre-normed and residual."""

    def __init__(self, dim: int, context_dim: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn1 = Attention(dim, dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.attn2 = Attention(dim, context_dim, heads)
        self.norm3 = nn.LayerNorm(dim)
        self.ff = FeedForward(dim)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class Transformer2DModel(nn.Module):
    """A transformer block over the H·W positions of a feature map, with a residual around it."""

    def __init__(self, cfg: UNetConfig, channels: int, heads: int):
        super().__init__()
        self.use_linear = cfg.use_linear_projection
        self.norm = GroupNormAct(cfg.norm_num_groups, channels, 1e-6, "identity")  # not 1e-5: as published
        make = nn.Linear if self.use_linear else (lambda i, o: nn.Conv2d(i, o, 1))
        self.proj_in = make(channels, channels)
        self.transformer_blocks = nn.ModuleList([BasicTransformerBlock(channels, cfg.cross_attention_dim, heads)])
        self.proj_out = make(channels, channels)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        H, W = x.shape[-2:]
        h = self.norm(x)
        h = h if self.use_linear else self.proj_in(h)
        h = h.flatten(2).transpose(1, 2)  # (B, H·W, C)
        h = self.proj_in(h) if self.use_linear else h
        for block in self.transformer_blocks:
            h = block(h, context)
        h = self.proj_out(h) if self.use_linear else h
        h = h.transpose(1, 2).unflatten(2, (H, W))  # (B, C, H, W)
        return x + (h if self.use_linear else self.proj_out(h))


class Downsample2D(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Upsample2D(nn.Module):
    """Nearest-neighbour enlargement to `size` (the next skip's, so that odd sizes fit), then a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        return self.conv(F.interpolate(x, size=size, mode="nearest"))


class _Block(nn.Module):
    """Residual blocks, each followed by a transformer where the block type has cross-attention."""

    def __init__(self, cfg: UNetConfig, widths_in: list[int], width: int, heads: int | None):
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock2D(cfg, c, width) for c in widths_in)
        if heads is not None:
            self.attentions = nn.ModuleList(Transformer2DModel(cfg, width, heads) for _ in widths_in)

    def layer(self, i: int, x: Tensor, emb: Tensor, context: Tensor) -> Tensor:
        x = self.resnets[i](x, emb)
        return self.attentions[i](x, context) if hasattr(self, "attentions") else x


class _DownBlock(_Block):
    def __init__(self, cfg: UNetConfig, c_in: int, c_out: int, heads: int | None, downsample: bool):
        super().__init__(cfg, [c_in] + [c_out] * (cfg.layers_per_block - 1), c_out, heads)
        if downsample:
            self.downsamplers = nn.ModuleList([Downsample2D(c_out)])

    def forward(self, x: Tensor, emb: Tensor, context: Tensor) -> tuple[Tensor, ...]:
        skips: tuple[Tensor, ...] = ()
        for i in range(len(self.resnets)):
            x = self.layer(i, x, emb, context)
            skips += (x,)
        return (*skips, self.downsamplers[0](x)) if hasattr(self, "downsamplers") else skips  # the last goes on down


class _UpBlock(_Block):
    def __init__(self, cfg: UNetConfig, widths_in: list[int], c_out: int, heads: int | None, upsample: bool):
        super().__init__(cfg, widths_in, c_out, heads)
        if upsample:
            self.upsamplers = nn.ModuleList([Upsample2D(c_out)])

    def forward(
        self, x: Tensor, skips: tuple[Tensor, ...], emb: Tensor, context: Tensor, size: tuple[int, int] | None
    ) -> Tensor:
        """`skips`: this block's own, the last made first read; `size`: height and width to enlarge to, None at the top.

        Nothing is taken off a caller's list: recomputing the block (checkpointing) reads the same skips again.
        """
        for i in range(len(self.resnets)):
            x = self.layer(i, torch.cat([x, skips[-1 - i]], dim=1), emb, context)
        return x if size is None else self.upsamplers[0](x, size)


class _MidBlock(nn.Module):
    def __init__(self, cfg: UNetConfig, width: int, heads: int):
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock2D(cfg, width, width) for _ in range(2))
        self.attentions = nn.ModuleList([Transformer2DModel(cfg, width, heads)])

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

        self.conv_norm_out = GroupNormAct(cfg.norm_num_groups, widths[0], cfg.norm_eps)
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
        skips: tuple[Tensor, ...] = (x,)
        for block in self.down_blocks:
            skips += block(skips[-1], emb, context)
        x = self.mid_block(skips[-1], emb, context)
        n = cfg.layers_per_block + 1
        for block in self.up_blocks:
            skips, own = skips[:-n], skips[-n:]
            x = block(x, own, emb, context, skips[-1].shape[-2:] if skips else None)
        return self.conv_out(self.conv_norm_out(x))
