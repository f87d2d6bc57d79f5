"""Guidance, one DDIM step and its log-probability, in one pass (PrefPaint Eq. 2; Ho & Salimans 2022).

    forward    eps    = eps_uncond + w·(eps_cond − eps_uncond)
               mean   = k_x·x_t + k_eps·eps
               x_prev = mean + sigma·noise, rounded to x_t's dtype (or given)
               log p  = mean over n of −(x_prev − mean)²/(2·sigma²) − log sigma − log(2·pi)/2
    backward   d log p/d eps = k_eps·(x_prev − mean)/(sigma²·n);  times w for eps_cond, times 1 − w for eps_uncond

x_prev is an action: it is scored as a constant and carries no gradient. x_t and the coefficients carry none either.

Passes over a tensor of the latent's size: about 43 forward and 71 backward in PyTorch, a few for each elementary
operation; fused, 4 reads and 1 write forward (x_prev when it is drawn, d log p/d eps when it is scored and a gradient
is wanted), 1 read and 1 or 2 writes backward. Latents are small beside what the UNet moves: at Stable Diffusion's size
this saves 0.3 % of a step, and one program a sample leaves most of a large GPU idle. It is here to be read. The
sampling loop guides in PyTorch and calls this with `eps_cond` None.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .common import accumulator, full_dtype, large, on_device, power_of_two, tl, triton, use_triton

# ------------------------------------------------------------------------------------------------ the specification


def ddim_step_logprob_reference(
    eps_uncond: Tensor,
    eps_cond: Tensor | None,
    x_t: Tensor,
    k_x: Tensor,
    k_eps: Tensor,
    sigma: Tensor,
    guidance: float,
    noise: Tensor | None = None,
    x_prev: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """eps, x_t, noise, x_prev (B, C, H, W); k_x, k_eps, sigma (B,) -> x_prev like x_t, log p (B,) fp32 (fp64)."""
    full = full_dtype(x_t)
    k_x, k_eps, sigma = (v.to(full)[:, None, None, None] for v in (k_x, k_eps, sigma))
    eps = eps_uncond.to(full)
    if eps_cond is not None:
        eps = eps + guidance * (eps_cond.to(full) - eps)
    mean = k_x * x_t.to(full) + k_eps * eps
    if x_prev is None:
        assert noise is not None
        x_prev = (mean + sigma * noise.to(full)).to(x_t.dtype)
    x_prev = x_prev.detach()
    per_dimension = -0.5 * ((x_prev.to(full) - mean) / sigma) ** 2 - sigma.log() - 0.5 * math.log(2 * math.pi)
    return x_prev, per_dimension.flatten(1).mean(1)


# ------------------------------------------------------------------------------------------------ Triton
# A program owns one sample, so that its sum needs no atomics.

if triton is not None:

    @triton.jit
    def _forward(
        U, E, X, GIVEN, OUT, KX, KE, SIGMA, LOGP, D, n: tl.constexpr,
        w, GUIDED: tl.constexpr, DRAW: tl.constexpr, KEEP: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        b = tl.program_id(0).to(tl.int64)
        k_x, k_eps = tl.load(KX + b).to(ACC), tl.load(KE + b).to(ACC)
        sigma = tl.load(SIGMA + b).to(ACC)
        total = tl.zeros([BLOCK], ACC)
        for start in range(0, n, BLOCK):
            i = start + tl.arange(0, BLOCK)
            inside = i < n
            eps = tl.load(U + b * n + i, mask=inside, other=0.0).to(ACC)
            if GUIDED:
                eps += w * (tl.load(E + b * n + i, mask=inside, other=0.0).to(ACC) - eps)
            mean = k_x * tl.load(X + b * n + i, mask=inside, other=0.0).to(ACC) + k_eps * eps
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
                tl.store(D + b * n + i, (k_eps / (sigma * n)) * z, mask=inside)
        log_p = -0.5 * tl.sum(total, 0) / n - tl.log(sigma) - 0.9189385332046727
        tl.store(LOGP + b, log_p)

    @triton.jit
    def _backward(G, D, DU, DE, n, w, GUIDED: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr):
        b = tl.program_id(0).to(tl.int64)
        i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = i < n
        d = tl.load(D + b * n + i, mask=inside, other=0.0) * tl.load(G + b).to(ACC)
        if GUIDED:
            tl.store(DU + b * n + i, ((1.0 - w) * d).to(DU.dtype.element_ty), mask=inside)
            tl.store(DE + b * n + i, (w * d).to(DE.dtype.element_ty), mask=inside)
        else:
            tl.store(DU + b * n + i, d.to(DU.dtype.element_ty), mask=inside)


@torch.library.custom_op(
    "minipref::ddim_step_logprob",
    mutates_args=(),
    schema="(Tensor eps_uncond, Tensor? eps_cond, Tensor x_t, Tensor k_x, Tensor k_eps, Tensor sigma, float guidance,"
    " Tensor given, bool draw, bool keep) -> (Tensor, Tensor, Tensor)",
)
def _ddim_step_logprob(eps_uncond, eps_cond, x_t, k_x, k_eps, sigma, guidance, given, draw, keep):
    u, x_t, given = eps_uncond.contiguous(), x_t.contiguous(), given.contiguous()
    e = u if eps_cond is None else eps_cond.contiguous()
    out, log_p, d = _results(x_t, draw, keep)
    n = math.prod(x_t.shape[1:])
    if x_t.numel():
        with on_device(x_t):
            _forward[(len(x_t),)](
                u, e, x_t, given, out, k_x.contiguous(), k_eps.contiguous(), sigma.contiguous(), log_p, d, n, guidance,
                GUIDED=eps_cond is not None, DRAW=draw, KEEP=keep, ACC=accumulator(x_t), BLOCK=power_of_two(n, 4096),
            )  # fmt: skip
    return out, log_p, d


def _results(x_t: Tensor, draw: bool, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Room for x_prev (where it is drawn), log p, and d log p/d eps (where it is kept)."""
    dense = torch.empty_like(x_t, memory_format=torch.contiguous_format)
    return (
        dense if draw else x_t.new_empty(0),
        x_t.new_empty(x_t.shape[0], dtype=full_dtype(x_t)),
        torch.empty_like(dense, dtype=full_dtype(x_t)) if keep else x_t.new_empty(0, dtype=full_dtype(x_t)),
    )


@_ddim_step_logprob.register_fake
def _(eps_uncond, eps_cond, x_t, k_x, k_eps, sigma, guidance, given, draw, keep):
    return _results(x_t, draw, keep)


@torch.library.custom_op(
    "minipref::ddim_step_logprob_backward",
    mutates_args=(),
    schema="(Tensor g, Tensor d, ScalarType dtype, float guidance, bool guided) -> (Tensor, Tensor)",
)
def _ddim_step_logprob_backward(g, d, dtype, guidance, guided):
    du = torch.empty_like(d, dtype=dtype)
    de = torch.empty_like(du) if guided else du.new_empty(0)
    n = math.prod(d.shape[1:])
    block = power_of_two(n, 2048)
    if d.numel():
        with on_device(d):
            _backward[(len(d), -(-n // block))](
                g.contiguous(), d, du, de, n, guidance, GUIDED=guided, ACC=accumulator(d), BLOCK=block
            )
    return du, de


@_ddim_step_logprob_backward.register_fake
def _(g, d, dtype, guidance, guided):
    du = torch.empty_like(d, dtype=dtype)
    return du, torch.empty_like(du) if guided else du.new_empty(0)


def _save(ctx, inputs, output):
    ctx.guidance, ctx.guided, ctx.dtype = inputs[6], inputs[1] is not None, inputs[0].dtype
    ctx.save_for_backward(output[2])
    ctx.mark_non_differentiable(output[0], output[2])


def _grads(ctx, _, g, *__):
    du, de = _ddim_step_logprob_backward(g, ctx.saved_tensors[0], ctx.dtype, ctx.guidance, ctx.guided)
    return du, de if ctx.guided else None, *[None] * 8


torch.library.register_autograd("minipref::ddim_step_logprob", _grads, setup_context=_save)

# ------------------------------------------------------------------------------------------------ dispatch


def ddim_step_logprob(
    eps_uncond: Tensor,
    eps_cond: Tensor | None,
    x_t: Tensor,
    k_x: Tensor,
    k_eps: Tensor,
    sigma: Tensor,
    guidance: float = 1.0,
    *,
    noise: Tensor | None = None,
    x_prev: Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """-> x_prev (B, C, H, W) in x_t's dtype, drawn with `noise` or the one given; log p (B,), mean over dimensions.

    eps_uncond, eps_cond (None: no guidance), x_t, noise, x_prev (B, C, H, W); k_x, k_eps, sigma (B,) fp32 or fp64 from
    `Schedule.coefficients`. sigma = 0 has no density: refused where sigma is on the CPU; elsewhere, where looking would
    wait for the device, and in compiled code its log p is not finite.
    """
    if (noise is None) == (x_prev is None):
        raise ValueError("ddim_step_logprob: pass either noise (to draw) or x_prev (to score)")
    given = {"eps_uncond": eps_uncond, "eps_cond": eps_cond, "noise": noise, "x_prev": x_prev}
    for name, v in given.items():
        if v is not None and v.shape != x_t.shape:
            raise ValueError(f"ddim_step_logprob: {name} is {tuple(v.shape)} but x_t is {tuple(x_t.shape)}")
    looks = sigma.device.type == "cpu" and not torch.compiler.is_compiling()
    if looks and not bool((sigma > 0).all()):
        raise ValueError("ddim_step_logprob: sigma is 0 somewhere: that step is deterministic and has no density")
    constants = k_x, k_eps, sigma
    k_x, k_eps, sigma = (v.to(full_dtype(x_t)).to(x_t.device, non_blocking=True) for v in constants)
    others = [v for v in given.values() if v is not None]
    if use_triton(impl, "ddim_step_logprob", [x_t, *others], large(x_t), constants):
        keep = torch.is_grad_enabled() and any(v is not None and v.requires_grad for v in (eps_uncond, eps_cond))
        known = noise if x_prev is None else x_prev
        assert known is not None
        drawn, log_p, _ = _ddim_step_logprob(
            eps_uncond, eps_cond, x_t.detach(), k_x, k_eps, sigma, float(guidance), known.detach(), x_prev is None, keep
        )
        return drawn if x_prev is None else x_prev.detach(), log_p
    return ddim_step_logprob_reference(eps_uncond, eps_cond, x_t.detach(), k_x, k_eps, sigma, guidance, noise, x_prev)
