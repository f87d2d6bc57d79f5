"""One DDIM step and its log-probability, in one pass (PrefPaint Eq. 2).

    forward    mean   = k_x·x_t + k_out·model_output
               x_prev = mean + sigma·noise, rounded to x_t's dtype (or given)
               log p  = mean over n of −(x_prev − mean)²/(2·sigma²) − log sigma − log(2·pi)/2
    backward   d log p/d model_output = k_out·(x_prev − mean)/(sigma²·n)

x_prev is an action: it is scored as a constant and carries no gradient. x_t and the coefficients carry none either.

Passes over a tensor of the latent's size: about 30 forward and 40 backward in PyTorch, a few for each elementary
operation; fused, 3 reads and 1 write forward (x_prev when it is drawn, d log p/d model_output when it is scored and a
gradient is wanted), 1 read and 1 write backward. Latents are small beside what the UNet moves: at Stable Diffusion's
size this saves 0.3 % of a step, and one program a sample leaves most of a large GPU idle. It is here to be read.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .common import accumulator, full_dtype, large, on_device, power_of_two, tl, triton, use_triton

# ------------------------------------------------------------------------------------------------ the specification


def gaussian_log_prob(x: Tensor, mean: Tensor, sigma: Tensor) -> Tensor:
    """log N(x; mean, sigma²·I) divided by n, the number of dimensions: x, mean (B, C, H, W), sigma (B, 1, 1, 1) -> (B,)

    The *mean* over dimensions, as DDPO and PrefPaint have it: the sum over n = 16,384 of them overflows exp() in a
    probability ratio. A difference of two such numbers is the joint log-ratio divided by n.
    """
    z = (x - mean) / sigma
    per_dimension = -0.5 * z**2 - sigma.log() - 0.5 * math.log(2 * math.pi)
    return per_dimension.flatten(1).mean(1)


def step_gaussian(
    model_output: Tensor, x_t: Tensor, k_x: Tensor, k_out: Tensor, sigma: Tensor
) -> tuple[Tensor, Tensor]:
    """The Gaussian of a step: model_output, x_t (B, C, H, W), coefficients (B,) -> mean like x_t, sigma (B, 1, 1, 1);
    fp32 (fp64 for fp64)."""
    full = full_dtype(x_t)
    k_x, k_out, sigma = (v.to(full)[:, None, None, None] for v in (k_x, k_out, sigma))
    return k_x * x_t.to(full) + k_out * model_output.to(full), sigma


def ddim_step_logprob_reference(
    model_output: Tensor,
    x_t: Tensor,
    k_x: Tensor,
    k_out: Tensor,
    sigma: Tensor,
    noise: Tensor | None = None,
    x_prev: Tensor | None = None,
    gaussian: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """model_output, x_t, noise, x_prev (B, C, H, W); k_x, k_out, sigma (B,) -> x_prev like x_t, log p (B,) fp32 (fp64).

    Draws with `noise`, or scores the x_prev it is given. A drawn latent is rounded to x_t's dtype *before* it is
    scored, so that a later replay scores the same number. Unlike the fused form it has a gradient by x_t, too.
    """
    mean, deviation = gaussian or step_gaussian(model_output, x_t, k_x, k_out, sigma)
    if x_prev is None:
        assert noise is not None
        x_prev = (mean + deviation * noise).to(x_t.dtype)
    return x_prev, gaussian_log_prob(x_prev.to(mean.dtype), mean, deviation)


# ------------------------------------------------------------------------------------------------ Triton
# A program owns one sample, so that its sum needs no atomics.

if triton is not None:

    @triton.jit
    def _forward(
        M, X, GIVEN, OUT, KX, KO, SIGMA, LOGP, D, n: tl.constexpr,
        DRAW: tl.constexpr, KEEP: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        b = tl.program_id(0).to(tl.int64)
        k_x, k_out = tl.load(KX + b).to(ACC), tl.load(KO + b).to(ACC)
        sigma = tl.load(SIGMA + b).to(ACC)
        total = tl.zeros([BLOCK], ACC)
        for start in range(0, n, BLOCK):
            i = start + tl.arange(0, BLOCK)
            inside = i < n
            output = tl.load(M + b * n + i, mask=inside, other=0.0).to(ACC)
            mean = k_x * tl.load(X + b * n + i, mask=inside, other=0.0).to(ACC) + k_out * output
            given = tl.load(GIVEN + b * n + i, mask=inside, other=0.0).to(ACC)  # the noise, or x_prev
            if DRAW:
                drawn = mean + sigma * given
                kept = drawn.to(OUT.dtype.element_ty)
                tl.store(OUT + b * n + i, kept, mask=inside)
                x_prev = kept.to(ACC)  # what a replay will read
            else:
                x_prev = given
            z = tl.where(inside, (x_prev - mean) / sigma, 0.0)
            total += z * z
            if KEEP:
                tl.store(D + b * n + i, (k_out / (sigma * n)) * z, mask=inside)
        log_p = -0.5 * tl.sum(total, 0) / n - tl.log(sigma) - 0.9189385332046727
        tl.store(LOGP + b, log_p)

    @triton.jit
    def _backward(G, D, DM, n, ACC: tl.constexpr, BLOCK: tl.constexpr):
        b = tl.program_id(0).to(tl.int64)
        i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = i < n
        d = tl.load(D + b * n + i, mask=inside, other=0.0) * tl.load(G + b).to(ACC)
        tl.store(DM + b * n + i, d.to(DM.dtype.element_ty), mask=inside)


@torch.library.custom_op(
    "minipref::ddim_step_logprob",
    mutates_args=(),
    schema="(Tensor model_output, Tensor x_t, Tensor k_x, Tensor k_out, Tensor sigma, Tensor given, bool draw,"
    " bool keep) -> (Tensor, Tensor, Tensor)",
)
def _ddim_step_logprob(model_output, x_t, k_x, k_out, sigma, given, draw, keep):
    model_output, x_t, given = model_output.contiguous(), x_t.contiguous(), given.contiguous()
    coefficients = k_x.contiguous(), k_out.contiguous(), sigma.contiguous()
    out, log_p, d = _results(x_t, draw, keep)
    n = math.prod(x_t.shape[1:])
    if x_t.numel():
        with on_device(x_t):
            _forward[(len(x_t),)](
                model_output, x_t, given, out, *coefficients, log_p, d, n,
                DRAW=draw, KEEP=keep, ACC=accumulator(x_t), BLOCK=power_of_two(n, 4096),
            )  # fmt: skip
    return out, log_p, d


def _results(x_t: Tensor, draw: bool, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Room for x_prev (where it is drawn), log p, and d log p/d model_output (where it is kept)."""
    dense = torch.empty_like(x_t, memory_format=torch.contiguous_format)
    return (
        dense if draw else x_t.new_empty(0),
        x_t.new_empty(x_t.shape[0], dtype=full_dtype(x_t)),
        torch.empty_like(dense, dtype=full_dtype(x_t)) if keep else x_t.new_empty(0, dtype=full_dtype(x_t)),
    )


@_ddim_step_logprob.register_fake
def _(model_output, x_t, k_x, k_out, sigma, given, draw, keep):
    return _results(x_t, draw, keep)


@torch.library.custom_op(
    "minipref::ddim_step_logprob_backward", mutates_args=(), schema="(Tensor g, Tensor d, ScalarType dtype) -> Tensor"
)
def _ddim_step_logprob_backward(g, d, dtype):
    slope, n = torch.empty_like(d, dtype=dtype), math.prod(d.shape[1:])
    block = power_of_two(n, 2048)
    if d.numel():
        with on_device(d):
            _backward[(len(d), -(-n // block))](g.contiguous(), d, slope, n, ACC=accumulator(d), BLOCK=block)
    return slope


@_ddim_step_logprob_backward.register_fake
def _(g, d, dtype):
    return torch.empty_like(d, dtype=dtype)


def _save(ctx, inputs, output):
    ctx.dtype = inputs[0].dtype
    ctx.save_for_backward(output[2])
    ctx.mark_non_differentiable(output[0], output[2])


def _grads(ctx, _, g, *__):
    return _ddim_step_logprob_backward(g, ctx.saved_tensors[0], ctx.dtype), *[None] * 7


torch.library.register_autograd("minipref::ddim_step_logprob", _grads, setup_context=_save)

# ------------------------------------------------------------------------------------------------ dispatch


def ddim_step_logprob(
    model_output: Tensor,
    x_t: Tensor,
    k_x: Tensor,
    k_out: Tensor,
    sigma: Tensor,
    *,
    noise: Tensor | None = None,
    x_prev: Tensor | None = None,
    gaussian: tuple[Tensor, Tensor] | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """-> x_prev (B, C, H, W) in x_t's dtype, drawn with `noise` or the one given; log p (B,), mean over dimensions.

    model_output, x_t, noise, x_prev (B, C, H, W); k_x, k_out, sigma (B,) fp32 or fp64 from `Schedule.coefficients`.
    `gaussian`: what `step_gaussian` gives, where it is at hand. Where sigma = 0 the step has no density: its log p is
    NaN (or, fused, not finite). The fused form has no gradient by x_t and x_prev; where one
    is wanted, "auto" takes PyTorch.
    """
    if (noise is None) == (x_prev is None):
        raise ValueError("ddim_step: pass either noise (to draw) or x_prev (to score)")
    for name, v in {"model_output": model_output, "noise": noise, "x_prev": x_prev}.items():
        if v is not None and v.shape != x_t.shape:
            raise ValueError(f"ddim_step: {name} is {tuple(v.shape)} but x_t is {tuple(x_t.shape)}")
    given = noise if x_prev is None else x_prev
    assert given is not None
    wants = torch.is_grad_enabled()
    constants = [
        k_x,
        k_out,
        sigma,
        *([x_t] if wants else []),
        *([model_output if x_prev is None else x_prev] if wants else []),
    ]
    if use_triton(impl, "ddim_step_logprob", [x_t, model_output, given], large(x_t), constants):
        k_x, k_out, sigma = (v.to(full_dtype(x_t)).to(x_t.device, non_blocking=True) for v in (k_x, k_out, sigma))
        keep = wants and model_output.requires_grad
        drawn, log_p, _ = _ddim_step_logprob(
            model_output, x_t.detach(), k_x, k_out, sigma, given.detach(), x_prev is None, keep
        )
        return drawn if x_prev is None else x_prev.detach(), log_p
    return ddim_step_logprob_reference(model_output, x_t, k_x, k_out, sigma, noise, x_prev, gaussian)
