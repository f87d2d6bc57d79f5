"""h·gelu(gate), the gated activation of Stable Diffusion's feed-forward layers (Shazeer 2020), in the erf form.

    forward    y = h·gelu(g),  gelu(g) = g·Phi(g),  Phi(g) = (1 + erf(g/sqrt(2)))/2
    backward   dh = dy·gelu(g),  dg = dy·h·(Phi(g) + g·phi(g)),  phi(g) = exp(−g²/2)/sqrt(2·pi)

Passes over a tensor of y's size: PyTorch reads g and writes gelu(g), reads it and h and writes y, 5 forward; backward
it writes dh, d gelu, dg and then copies dh and dg side by side (`cat`), 13. Fused: 2 reads and 1 write forward, 3 reads
and 2 writes backward: both halves of the gradient are written where they belong.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .common import accumulator, full_dtype, large, on_device, power_of_two, tl, triton, use_triton

# ------------------------------------------------------------------------------------------------ the specification


def geglu_reference(h: Tensor) -> Tensor:
    """h (…, 2n), values then gates -> (…, n), computed in fp32 (fp64 for fp64)."""
    value, gate = h.to(full_dtype(h)).chunk(2, dim=-1)
    return (value * (gate * 0.5 * (1 + torch.erf(gate / math.sqrt(2))))).to(h.dtype)


# ------------------------------------------------------------------------------------------------ Triton

if triton is not None:

    @triton.jit
    def _forward(H, Y, n, ACC: tl.constexpr, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = i < n
        value = tl.load(H + row * 2 * n + i, mask=inside, other=0.0).to(ACC)
        gate = tl.load(H + row * 2 * n + n + i, mask=inside, other=0.0).to(ACC)
        y = value * gate * 0.5 * (1.0 + tl.erf(gate * 0.7071067811865476))
        tl.store(Y + row * n + i, y.to(Y.dtype.element_ty), mask=inside)

    @triton.jit
    def _backward(G, H, DH, n, ACC: tl.constexpr, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = i < n
        value = tl.load(H + row * 2 * n + i, mask=inside, other=0.0).to(ACC)
        gate = tl.load(H + row * 2 * n + n + i, mask=inside, other=0.0).to(ACC)
        g = tl.load(G + row * n + i, mask=inside, other=0.0).to(ACC)
        below = 0.5 * (1.0 + tl.erf(gate * 0.7071067811865476))  # Phi
        density = tl.exp(-0.5 * gate * gate) * 0.3989422804014327  # phi
        tl.store(DH + row * 2 * n + i, (g * gate * below).to(DH.dtype.element_ty), mask=inside)
        d_gate = g * value * (below + gate * density)
        tl.store(DH + row * 2 * n + n + i, d_gate.to(DH.dtype.element_ty), mask=inside)


def _grid(rows: int, n: int) -> tuple[tuple[int, int], int]:
    block = power_of_two(n, 2048)
    return (rows, -(-n // block)), block


@torch.library.custom_op("minipref::geglu", mutates_args=(), schema="(Tensor h) -> Tensor")
def _geglu(h: Tensor) -> Tensor:
    h, n = h.contiguous(), h.shape[-1] // 2
    y = h.new_empty(*h.shape[:-1], n)
    grid, block = _grid(y.numel() // max(n, 1), n)
    if y.numel():
        with on_device(h):
            _forward[grid](h, y, n, ACC=accumulator(h), BLOCK=block)
    return y


@_geglu.register_fake
def _(h):
    return h.new_empty(*h.shape[:-1], h.shape[-1] // 2)


@torch.library.custom_op("minipref::geglu_backward", mutates_args=(), schema="(Tensor g, Tensor h) -> Tensor")
def _geglu_backward(g: Tensor, h: Tensor) -> Tensor:
    g, h, n = g.contiguous(), h.contiguous(), h.shape[-1] // 2
    dh = torch.empty_like(h)
    grid, block = _grid(g.numel() // max(n, 1), n)
    if g.numel():
        with on_device(h):
            _backward[grid](g, h, dh, n, ACC=accumulator(h), BLOCK=block)
    return dh


@_geglu_backward.register_fake
def _(g, h):
    return torch.empty_like(h, memory_format=torch.contiguous_format)


def _save(ctx, inputs, output):
    ctx.save_for_backward(inputs[0])


def _grads(ctx, g):
    return _geglu_backward(g, ctx.saved_tensors[0])


torch.library.register_autograd("minipref::geglu", _grads, setup_context=_save)

# ------------------------------------------------------------------------------------------------ dispatch


def pays(h: Tensor) -> bool:
    """Where the saved passes outweigh the launches: a prediction from byte counts, wide rows only."""
    return large(h)


def fuses(h: Tensor) -> bool:
    """Whether "auto" takes the fused form for h."""
    return use_triton("auto", "geglu", [h], pays(h))


def geglu(h: Tensor, *, impl: str = "auto") -> Tensor:
    """h (…, 2n), n values and their n gates -> values·gelu(gates), (…, n)."""
    if h.shape[-1] % 2:
        raise ValueError(f"geglu: the last axis has {h.shape[-1]} entries; expected an even number, values and gates")
    if use_triton(impl, "geglu", [h], pays(h)):
        return _geglu(h)
    value, gate = h.chunk(2, dim=-1)
    return value * torch.nn.functional.gelu(gate)
