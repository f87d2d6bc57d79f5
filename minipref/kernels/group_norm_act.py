"""Group normalisation, an affine map per sample and channel, and SiLU, in one pass (Wu & He 2018).

    forward    xhat = (x − mean)·rstd           over the channels of a group and all pixels, rstd = 1/sqrt(var + eps)
               u    = a_nc·xhat + b_nc
               y    = u·sigmoid(u)              or y = u
    backward   du    = dy·sigmoid(u)·(1 + u·(1 − sigmoid(u)))
               db_nc = Σ du,  da_nc = Σ du·xhat          over the pixels of a channel
               dx    = rstd·(a·du − m1 − xhat·m2)        m1, m2: means over the group of a·du and a·du·xhat

With a = weight·(1 + scale) and b = bias·(1 + scale) + shift, built in PyTorch, one kernel serves the plain, the affine
and the time-modulated norm, and autograd hands every parameter its gradient without atomics.

Passes over a tensor of x's size: PyTorch's GroupNorm reads twice and writes once, SiLU reads and writes once more, 5;
the backward reads dy and u and writes du, then reads du and x twice and writes dx, 8. Fused: programs own tiles of
channels × pixels, and the partial sums of the tiles are joined in between: 2 reads and 1 write, backward 4 and 1. The
least that must move is 1 read and 1 write, backward 2 and 1: that is 67 % and 60 % of it, unless the cache serves the
second read. Chan's formula joins means and centred squares without the cancellation of E[x²] − E[x]².

Sums are joined in a fixed order: no atomics, the same bits every time. eps reaches the kernel in fp32 (as w and beta
do those of the other kernels), so that float64 on a GPU is good to about 1e-8 only.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .common import LARGE, accumulator, full_dtype, large, on_device, tl, triton, use_triton

ACTIVATIONS = ("silu", "identity")
SPLIT = 8 * LARGE  # elements of a sample from which it pays: two launches and the joining in between
TILE_C, TILE_P = 64, 64  # channels and pixels of a tile, where a group is split

# ------------------------------------------------------------------------------------------------ the specification


def group_norm_act_reference(
    x: Tensor, a: Tensor, b: Tensor, groups: int, eps: float = 1e-5, act: str = "silu"
) -> Tensor:
    """x (N, C, H, W), a and b (N, C) -> like x, computed in fp32 (fp64 for fp64)."""
    full = full_dtype(x)
    grouped = x.to(full).unflatten(1, (groups, -1))
    mean = grouped.mean((2, 3, 4), keepdim=True)
    centred = grouped - mean
    rstd = (centred.square().mean((2, 3, 4), keepdim=True) + eps).rsqrt()
    u = a.to(full)[:, :, None, None] * (centred * rstd).flatten(1, 2) + b.to(full)[:, :, None, None]
    return (F.silu(u) if act == "silu" else u).to(x.dtype)


# ------------------------------------------------------------------------------------------------ Triton
# `sn`, `sc` and `sp` are the strides of sample, channel and pixel: NCHW and channels_last are the same program.

if triton is not None:

    @triton.jit
    def _slope(u, du, SILU: tl.constexpr):
        """du through the activation."""
        if SILU:
            s = 1.0 / (1.0 + tl.exp(-u))
            du = du * s * (1.0 + u * (1.0 - s))
        return du

    @triton.jit
    def _sums(
        X, SUM, SQUARES, C, P, sn, sc, sp, chunks, ACC: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr
    ):  # fmt: skip
        """Of each tile: sum over its pixels, and squares around the tile's own mean, (N, chunks, C)."""
        n, chunk = tl.program_id(0), tl.program_id(2)
        c, p = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C), chunk * BLOCK_P + tl.arange(0, BLOCK_P)
        inside = (c < C)[:, None] & (p < P)[None, :]
        where = n.to(tl.int64) * sn + c[:, None].to(tl.int64) * sc + p[None, :] * sp
        x = tl.load(X + where, mask=inside, other=0.0).to(ACC)
        total = tl.sum(x, 1)
        mean = total / tl.minimum(BLOCK_P, P - chunk * BLOCK_P)
        centred = tl.where(inside, x - mean[:, None], 0.0)
        at = (n * chunks + chunk) * C + c
        tl.store(SUM + at, total, mask=c < C)
        tl.store(SQUARES + at, tl.sum(centred * centred, 1), mask=c < C)

    @triton.jit
    def _write(
        X, A, B, Y, MEAN, RSTD, C, P, sn, sc, sp, groups, per_group,
        SILU: tl.constexpr, ACC: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
    ):  # fmt: skip
        n = tl.program_id(0)
        c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
        p = tl.program_id(2) * BLOCK_P + tl.arange(0, BLOCK_P)
        inside = (c < C)[:, None] & (p < P)[None, :]
        where = n.to(tl.int64) * sn + c[:, None].to(tl.int64) * sc + p[None, :] * sp
        mean = tl.load(MEAN + n * groups + c // per_group, mask=c < C, other=0.0)
        rstd = tl.load(RSTD + n * groups + c // per_group, mask=c < C, other=0.0)
        a = tl.load(A + n * C + c, mask=c < C, other=0.0).to(ACC)
        b = tl.load(B + n * C + c, mask=c < C, other=0.0).to(ACC)
        x = tl.load(X + where, mask=inside, other=0.0).to(ACC)
        u = a[:, None] * ((x - mean[:, None]) * rstd[:, None]) + b[:, None]
        y = u / (1.0 + tl.exp(-u)) if SILU else u
        tl.store(Y + where, y.to(Y.dtype.element_ty), mask=inside)

    @triton.jit
    def _backward_tile(
        G, X, A, B, MEAN, RSTD, DX, DA, DB, M1, M2, C, P, sn, sc, sp, groups, per_group, chunks,
        SUMS: tl.constexpr, SILU: tl.constexpr, ACC: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
    ):  # fmt: skip
        """First (SUMS) the tile's parts of da and db, (N, chunks, C); then, with the group's m1 and m2 known, dx."""
        n, chunk = tl.program_id(0), tl.program_id(2)
        c, p = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C), chunk * BLOCK_P + tl.arange(0, BLOCK_P)
        inside = (c < C)[:, None] & (p < P)[None, :]
        where = n.to(tl.int64) * sn + c[:, None].to(tl.int64) * sc + p[None, :] * sp
        group = n * groups + c // per_group
        mean = tl.load(MEAN + group, mask=c < C, other=0.0)
        rstd = tl.load(RSTD + group, mask=c < C, other=0.0)
        a = tl.load(A + n * C + c, mask=c < C, other=0.0).to(ACC)
        b = tl.load(B + n * C + c, mask=c < C, other=0.0).to(ACC)
        xhat = (tl.load(X + where, mask=inside, other=0.0).to(ACC) - mean[:, None]) * rstd[:, None]
        du = _slope(a[:, None] * xhat + b[:, None], tl.load(G + where, mask=inside, other=0.0).to(ACC), SILU)
        if SUMS:
            at = (n * chunks + chunk) * C + c
            tl.store(DB + at, tl.sum(du, 1), mask=c < C)
            tl.store(DA + at, tl.sum(du * xhat, 1), mask=c < C)
        else:
            m1 = tl.load(M1 + group, mask=c < C, other=0.0)
            m2 = tl.load(M2 + group, mask=c < C, other=0.0)
            dx = rstd[:, None] * (a[:, None] * du - m1[:, None] - xhat * m2[:, None])
            tl.store(DX + where, dx.to(DX.dtype.element_ty), mask=inside)


def _dense(x: Tensor) -> Tensor:
    """x itself where it is NCHW or channels_last in memory, else a copy that is NCHW."""
    if x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last):
        return x
    return x.contiguous()


def _strides(x: Tensor) -> tuple[int, int, int]:
    """Of sample, channel and pixel: NCHW, where the pixels of all rows lie side by side, or channels_last."""
    N, C, H, W = x.shape
    return (C * H * W, H * W, 1) if x.is_contiguous() else (C * H * W, 1, C)


def _tiles(x: Tensor) -> tuple[tuple[int, int, int], int]:
    """Grid of (sample, channel block, chunk of pixels), and the number of chunks."""
    N, C, H, W = x.shape
    chunks = -(-H * W // TILE_P)
    return (N, -(-C // TILE_C), chunks), chunks


def _join(total: Tensor, squares: Tensor, pixels: int, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """Group means and 1/standard deviations (N, groups) from the sums of tiles (N, chunks, C) (Chan et al. 1983)."""
    N, chunks, C = total.shape
    sizes = torch.full((chunks, 1), float(TILE_P), dtype=total.dtype, device=total.device)
    sizes[-1] = pixels - (chunks - 1) * TILE_P
    count = pixels * C // groups
    mean = total.unflatten(2, (groups, -1)).sum((1, 3)) / count
    apart = total / sizes - mean.repeat_interleave(C // groups, 1)[:, None]  # (N, chunks, C)
    variance = (squares + sizes * apart.square()).unflatten(2, (groups, -1)).sum((1, 3)) / count
    return mean, (variance + eps).rsqrt()


@torch.library.custom_op(
    "minipref::group_norm_act",
    mutates_args=(),
    schema="(Tensor x, Tensor a, Tensor b, int groups, float eps, bool silu) -> (Tensor, Tensor, Tensor)",
)
def _group_norm_act(x: Tensor, a: Tensor, b: Tensor, groups: int, eps: float, silu: bool):
    x, a, b = _dense(x), a.contiguous(), b.contiguous()
    N, C, H, W = x.shape
    y = torch.empty_like(x)
    mean, rstd = (torch.empty(N, groups, dtype=full_dtype(x), device=x.device) for _ in range(2))
    if x.numel() == 0:
        return y, mean, rstd
    shape = C, H * W, *_strides(x)
    with on_device(x):
        grid, chunks = _tiles(x)
        total, squares = (torch.empty(N, chunks, C, dtype=full_dtype(x), device=x.device) for _ in range(2))
        options = {"ACC": accumulator(x), "BLOCK_C": TILE_C, "BLOCK_P": TILE_P}
        _sums[grid](x, total, squares, *shape, chunks, **options)
        mean, rstd = (v.contiguous() for v in _join(total, squares, H * W, groups, eps))
        _write[grid](x, a, b, y, mean, rstd, *shape, groups, C // groups, SILU=silu, **options)
    return y, mean, rstd


@_group_norm_act.register_fake
def _(x, a, b, groups, eps, silu):
    mean, rstd = (x.new_empty((x.shape[0], groups), dtype=full_dtype(x)) for _ in range(2))
    return torch.empty_like(_dense(x)), mean, rstd


@torch.library.custom_op(
    "minipref::group_norm_act_backward",
    mutates_args=(),
    schema="(Tensor g, Tensor x, Tensor a, Tensor b, Tensor mean, Tensor rstd, int groups, bool silu)"
    " -> (Tensor, Tensor, Tensor)",
)
def _group_norm_act_backward(
    g: Tensor, x: Tensor, a: Tensor, b: Tensor, mean: Tensor, rstd: Tensor, groups: int, silu: bool
):
    x, a, b = _dense(x), a.contiguous(), b.contiguous()
    g = g.contiguous() if x.is_contiguous() else g.contiguous(memory_format=torch.channels_last)
    N, C, H, W = x.shape
    dx = torch.empty_like(x)
    if x.numel() == 0:
        return dx, torch.zeros_like(a), torch.zeros_like(b)
    shape = C, H * W, *_strides(x), groups, C // groups
    with on_device(x):
        grid, chunks = _tiles(x)
        parts_a, parts_b = (torch.empty(N, chunks, C, dtype=full_dtype(x), device=x.device) for _ in range(2))
        options = {"ACC": accumulator(x), "SILU": silu, "BLOCK_C": TILE_C, "BLOCK_P": TILE_P}
        first = g, x, a, b, mean, rstd, dx, parts_a, parts_b
        _backward_tile[grid](*first, mean, rstd, *shape, chunks, SUMS=True, **options)
        da, db = parts_a.sum(1), parts_b.sum(1)
        count = C // groups * H * W
        m1, m2 = ((a.to(v) * v).unflatten(1, (groups, -1)).sum(2) / count for v in (db, da))
        _backward_tile[grid](*first, m1, m2, *shape, chunks, SUMS=False, **options)
    return dx, da.to(a.dtype), db.to(b.dtype)


@_group_norm_act_backward.register_fake
def _(g, x, a, b, mean, rstd, groups, silu):
    return torch.empty_like(_dense(x)), *(torch.empty_like(v, memory_format=torch.contiguous_format) for v in (a, b))


def _save(ctx, inputs, output):
    x, a, b, ctx.groups, _, ctx.silu = inputs
    ctx.save_for_backward(x, a, b, output[1], output[2])
    ctx.mark_non_differentiable(output[1], output[2])


def _grads(ctx, g, *_):
    dx, da, db = _group_norm_act_backward(g, *ctx.saved_tensors, ctx.groups, ctx.silu)
    return dx, da, db, None, None, None


torch.library.register_autograd("minipref::group_norm_act", _grads, setup_context=_save)

# ------------------------------------------------------------------------------------------------ dispatch


def pays(x: Tensor) -> bool:
    """Where the saved passes outweigh the launches: a prediction from byte counts, large feature maps only."""
    return x.ndim == 4 and large(x, SPLIT)


def fuses(x: Tensor) -> bool:
    """Whether "auto" takes the fused form for x."""
    return use_triton("auto", "group_norm_act", [x], pays(x))


def group_norm_act(
    x: Tensor, a: Tensor, b: Tensor, groups: int, eps: float = 1e-5, act: str = "silu", *, impl: str = "auto"
) -> Tensor:
    """act(a·GroupNorm(x) + b): x (N, C, H, W), NCHW or channels_last, a and b (N, C) -> like x.

    Statistics and sums in fp32 (fp64 for fp64): the mean first, then the centred variance.
    """
    if x.ndim != 4 or a.shape != x.shape[:2] or b.shape != x.shape[:2]:
        shapes = ", ".join(str(tuple(v.shape)) for v in (x, a, b))
        raise ValueError(f"group_norm_act: x, a, b are {shapes}; expected (N, C, H, W) and (N, C) twice")
    if groups < 1 or x.shape[1] % groups:
        raise ValueError(f"group_norm_act: {x.shape[1]} channels cannot be split into {groups} groups")
    if act not in ACTIVATIONS:
        raise ValueError(f"group_norm_act: act={act!r}; choose {', '.join(ACTIVATIONS)}")
    if use_triton(impl, "group_norm_act", [x, a, b], pays(x)):
        return _group_norm_act(x, a, b, groups, eps, act == "silu")[0]
    return group_norm_act_reference(x, a, b, groups, eps, act)
