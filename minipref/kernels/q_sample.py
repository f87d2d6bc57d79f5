"""x_t = sqrt(abar_t)·x_0 + sqrt(1 − abar_t)·noise, in one pass (DDPM, Ho et al. 2020, Eq. 4).

    forward    x_t = a_b·x_0 + s_b·noise
    backward   dx_0 = a_b·dx_t,  dnoise = s_b·dx_t

Passes over a tensor of the latent's size: PyTorch multiplies twice (2 reads, 2 writes) and adds (2 reads, 1 write), 7;
fused, 2 reads and 1 write, 3. The simplest of the kernels, and the one to read first.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .common import accumulator, full_dtype, large, on_device, power_of_two, tl, triton, use_triton

# ------------------------------------------------------------------------------------------------ the specification


def q_sample_reference(x0: Tensor, noise: Tensor, a: Tensor, s: Tensor) -> Tensor:
    """x0, noise (B, …), a and s (B,) -> x_t like x0, computed in fp32 (fp64 for fp64)."""
    full = full_dtype(x0)
    shape = (-1,) + (1,) * (x0.ndim - 1)
    return (a.to(full).view(shape) * x0.to(full) + s.to(full).view(shape) * noise.to(full)).to(x0.dtype)


# ------------------------------------------------------------------------------------------------ Triton

if triton is not None:

    @triton.jit
    def _forward(X0, NOISE, A, S, OUT, n, ACC: tl.constexpr, BLOCK: tl.constexpr):
        b = tl.program_id(0).to(tl.int64)
        i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = i < n
        x0 = tl.load(X0 + b * n + i, mask=inside, other=0.0).to(ACC)
        noise = tl.load(NOISE + b * n + i, mask=inside, other=0.0).to(ACC)
        x_t = tl.load(A + b).to(ACC) * x0 + tl.load(S + b).to(ACC) * noise
        tl.store(OUT + b * n + i, x_t.to(OUT.dtype.element_ty), mask=inside)

    @triton.jit
    def _backward(G, A, S, DX0, DNOISE, n, ACC: tl.constexpr, BLOCK: tl.constexpr):
        b = tl.program_id(0).to(tl.int64)
        i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = i < n
        g = tl.load(G + b * n + i, mask=inside, other=0.0).to(ACC)
        tl.store(DX0 + b * n + i, (tl.load(A + b).to(ACC) * g).to(DX0.dtype.element_ty), mask=inside)
        tl.store(DNOISE + b * n + i, (tl.load(S + b).to(ACC) * g).to(DNOISE.dtype.element_ty), mask=inside)


def _grid(x: Tensor) -> tuple[tuple[int, int], int, int]:
    n = math.prod(x.shape[1:])
    block = power_of_two(n, 2048)
    return (len(x), -(-n // block)), n, block


@torch.library.custom_op(
    "minipref::q_sample", mutates_args=(), schema="(Tensor x0, Tensor noise, Tensor a, Tensor s) -> Tensor"
)
def _q_sample(x0: Tensor, noise: Tensor, a: Tensor, s: Tensor) -> Tensor:
    x0, noise, out = x0.contiguous(), noise.contiguous(), torch.empty_like(x0, memory_format=torch.contiguous_format)
    grid, n, block = _grid(x0)
    if x0.numel():
        with on_device(x0):
            _forward[grid](x0, noise, a.contiguous(), s.contiguous(), out, n, ACC=accumulator(x0), BLOCK=block)
    return out


@_q_sample.register_fake
def _(x0, noise, a, s):
    return torch.empty_like(x0, memory_format=torch.contiguous_format)


@torch.library.custom_op(
    "minipref::q_sample_backward", mutates_args=(), schema="(Tensor g, Tensor a, Tensor s) -> (Tensor, Tensor)"
)
def _q_sample_backward(g: Tensor, a: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    g = g.contiguous()
    dx0, dnoise = torch.empty_like(g), torch.empty_like(g)
    grid, n, block = _grid(g)
    if g.numel():
        with on_device(g):
            _backward[grid](g, a.contiguous(), s.contiguous(), dx0, dnoise, n, ACC=accumulator(g), BLOCK=block)
    return dx0, dnoise


@_q_sample_backward.register_fake
def _(g, a, s):
    return tuple(torch.empty_like(g, memory_format=torch.contiguous_format) for _ in range(2))


def _save(ctx, inputs, output):
    ctx.save_for_backward(inputs[2], inputs[3])


def _grads(ctx, g):
    dx0, dnoise = _q_sample_backward(g, *ctx.saved_tensors)
    return dx0, dnoise, None, None


torch.library.register_autograd("minipref::q_sample", _grads, setup_context=_save)

# ------------------------------------------------------------------------------------------------ dispatch


def q_sample(x0: Tensor, noise: Tensor, a: Tensor, s: Tensor, *, impl: str = "auto") -> Tensor:
    """a_b·x0 + s_b·noise: x0, noise (B, …) of one dtype, a = sqrt(abar) and s = sqrt(1 − abar) (B,) without gradient.

    Computed in fp32 (fp64 for fp64) and rounded to x0's dtype once.
    """
    if x0.shape != noise.shape or a.shape != (len(x0),) or s.shape != (len(x0),):
        shapes = ", ".join(str(tuple(v.shape)) for v in (x0, noise, a, s))
        raise ValueError(f"q_sample: x0, noise, a, s are {shapes}; expected (B, …) twice and (B,) twice")
    if use_triton(impl, "q_sample", [x0, noise, a, s], large(x0), [a, s]):
        return _q_sample(x0, noise, a, s)
    return q_sample_reference(x0, noise, a, s)
