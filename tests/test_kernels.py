"""Fused operations against float64, forward and backward: in Triton's interpreter, or on a GPU where there is one."""

import math
import sys

import pytest
import torch
import torch.nn.functional as F
from kernel_helpers import (
    DEVICE,
    DOUBLE,
    DTYPES,
    HALF,
    SINGLE,
    TOLERANCE,
    agree,
    needs_triton,
    parametrize,
    randn,
    step_inputs,
    strided,
)

from minipref import kernels as K
from minipref.kernels import common
from minipref.kernels.ddim_step_logprob import ddim_step_logprob_reference
from minipref.kernels.geglu import geglu_reference
from minipref.kernels.group_norm_act import group_norm_act_reference
from minipref.kernels.preference_loss import preference_loss_reference
from minipref.kernels.q_sample import q_sample_reference

# ------------------------------------------------------------------------------------------------ the specifications


def test_the_specifications_are_pytorchs_own_operations_in_float64():
    x, weight, bias = randn(2, 6, 5, 4, offset=3.0), randn(6), randn(6)
    a, b = (v.expand(2, 6) for v in (weight, bias))
    norm = F.group_norm(x, 3, weight, bias, 1e-3)
    assert torch.allclose(group_norm_act_reference(x, a, b, 3, 1e-3), F.silu(norm), atol=1e-12)
    assert torch.allclose(group_norm_act_reference(x, a, b, 3, 1e-3, "identity"), norm, atol=1e-12)
    scale, shift = randn(2, 6), randn(2, 6)
    modulated = norm * (1 + scale)[:, :, None, None] + shift[:, :, None, None]
    found = group_norm_act_reference(x, weight * (1 + scale), bias * (1 + scale) + shift, 3, 1e-3, "identity")
    assert torch.allclose(found, modulated, atol=1e-12)
    h = randn(3, 4, 10)
    assert torch.allclose(geglu_reference(h), h[..., :5] * F.gelu(h[..., 5:]), atol=1e-12)
    x0, noise = randn(2, 3, 2, 2), randn(2, 3, 2, 2)
    abar = torch.tensor([0.25, 0.64], dtype=DOUBLE, device=DEVICE)
    expected = torch.stack([0.5 * x0[0] + math.sqrt(0.75) * noise[0], 0.8 * x0[1] + 0.6 * noise[1]])
    assert torch.allclose(q_sample_reference(x0, noise, abar.sqrt(), (1 - abar).sqrt()), expected, atol=1e-12)


def test_the_step_and_the_loss_specified_here_are_those_of_the_papers_files():
    from minipref.diffusion import Schedule, ScheduleConfig, ddim_step
    from minipref.losses import denoising_loss, preference_loss, preference_margin

    schedule, t, t_prev = Schedule(ScheduleConfig()), torch.tensor([700, 320]), torch.tensor([400, 120])
    u, e, x, noise = (randn(2, 3, 4, 4) for _ in range(4))
    k_x, k_eps, sigma = (v.to(DEVICE) for v in schedule.coefficients(t, t_prev, 0.7))
    x_prev, log_p = ddim_step(schedule, u + 2.5 * (e - u), x, t, t_prev, eta=0.7, noise=noise)
    found, found_log_p = ddim_step_logprob_reference(u, e, x, k_x, k_eps, sigma, 2.5, noise)
    assert torch.allclose(found, x_prev, atol=1e-12) and torch.allclose(found_log_p, log_p, atol=1e-12)
    six = [randn(4, 3, 2, 2) for _ in range(6)]
    label = torch.rand(4, dtype=DOUBLE, device=DEVICE)
    errors = [denoising_loss(p, g) for p, g in ((0, 4), (2, 4), (1, 5), (3, 5)) for p, g in [(six[p], six[g])]]
    margin = preference_margin(*errors)
    loss, found_margin = preference_loss_reference(*six, label, 1.7)
    assert torch.allclose(found_margin, margin, atol=1e-12)
    assert torch.allclose(loss, preference_loss(margin, label, 1.7), atol=1e-12)


# ------------------------------------------------------------------------------------------------ kernels, float64


@needs_triton
@parametrize("dtype", DTYPES, ids=str)
@parametrize(
    "shape,how",
    [((2, 4, 8, 8), "dense"), ((3, 5, 7, 3), "sliced"), ((1, 2049), "dense"), ((2, 4, 3, 3), "channels_last")],
)
def test_q_sample(shape, how, dtype):
    x0, noise = (strided(randn(*shape, dtype=dtype), how).requires_grad_() for _ in range(2))
    abar = torch.rand(shape[0], dtype=DOUBLE).to(DEVICE)
    a, s = abar.sqrt().to(common.full_dtype(x0)), (1 - abar).sqrt().to(common.full_dtype(x0))

    def kernel(x0, noise):
        return K.q_sample(x0, noise, a, s, impl="triton")

    def reference(x0, noise):
        return q_sample_reference(x0, noise, a, s)

    agree(kernel, reference, [x0, noise], TOLERANCE[dtype])


GROUPS = [  # shape, groups
    ((2, 8, 4, 4), 4),
    ((1, 20, 5, 7), 2),  # ten channels a group: not a power of two; 35 pixels
    ((2, 3, 6, 6), 1),  # one group
    ((2, 6, 1, 1), 3),  # one pixel
    ((1, 4, 33, 31), 2),  # 1023 pixels: several tiles, the last one not full
]


@needs_triton
@parametrize("dtype", DTYPES, ids=str)
@parametrize("act", ["silu", "identity"])
@parametrize("held", [{}, {"HELD": 0, "TILE_C": 4, "TILE_P": 16}], ids=["held", "split"])
@parametrize("shape,groups", GROUPS)
def test_group_norm_act(shape, groups, act, held, dtype, monkeypatch):
    module = sys.modules["minipref.kernels.group_norm_act"]
    for name, value in held.items():
        monkeypatch.setattr(module, name, value)
    x = randn(*shape, dtype=dtype).requires_grad_()
    a, b = (randn(*shape[:2], dtype=dtype).requires_grad_() for _ in range(2))

    def kernel(x, a, b):
        return K.group_norm_act(x, a, b, groups, 2**-7, act, impl="triton")

    def reference(x, a, b):
        return group_norm_act_reference(x, a, b, groups, 2**-7, act)

    agree(kernel, reference, [x, a, b], TOLERANCE[dtype], 2 * TOLERANCE[dtype])


@needs_triton
@parametrize("dtype", DTYPES, ids=str)
@parametrize("offset", [10.0, 100.0])
def test_group_norm_act_of_pictures_far_from_zero(offset, dtype):
    """In fp32 the mean of numbers around 100 costs two digits; nobody can give them back."""
    x = randn(2, 8, 6, 6, dtype=dtype, offset=offset).requires_grad_()
    a, b = (randn(2, 8, dtype=dtype).requires_grad_() for _ in range(2))
    tolerance = {DOUBLE: 1e-11, SINGLE: 2e-5}.get(dtype, TOLERANCE[dtype])
    agree(
        lambda *v: K.group_norm_act(*v, 4, impl="triton"), lambda *v: group_norm_act_reference(*v, 4),
        [x, a, b], tolerance, 2 * tolerance,
    )  # fmt: skip


@needs_triton
@parametrize("shape,groups", [((3, 70, 9, 9), 7), ((1, 6, 20, 20), 3)])
def test_group_norm_act_in_its_own_tiles(shape, groups):
    """More channels than a tile has, and more pixels; channels_last is always split, NCHW held."""
    for how in ("channels_last", "dense"):
        x = strided(randn(*shape, dtype=SINGLE), how).requires_grad_()
        a, b = (randn(*shape[:2], dtype=SINGLE).requires_grad_() for _ in range(2))
        agree(
            lambda *v: K.group_norm_act(*v, groups, impl="triton"), lambda *v: group_norm_act_reference(*v, groups),
            [x, a, b], 1e-6, 2e-6,
        )  # fmt: skip


@needs_triton
@parametrize("how", ["channels_last", "transposed", "sliced"])
def test_group_norm_act_keeps_or_mends_the_layout(how):
    x = strided(randn(2, 6, 5, 4, dtype=SINGLE), how).requires_grad_()
    a, b = (randn(6, 2, dtype=SINGLE).T.requires_grad_() for _ in range(2))
    agree(
        lambda *v: K.group_norm_act(*v, 3, impl="triton"), lambda *v: group_norm_act_reference(*v, 3), [x, a, b], 1e-6
    )  # fmt: skip
    y = K.group_norm_act(x, a, b, 3, impl="triton")
    last = torch.channels_last
    assert y.is_contiguous(memory_format=last if how == "channels_last" else torch.contiguous_format)


@needs_triton
@parametrize("dtype", DTYPES, ids=str)
@parametrize("shape,how", [((6, 32), "dense"), ((2, 3, 14), "sliced"), ((1, 4098), "dense"), ((4, 6), "transposed")])
def test_geglu(shape, how, dtype):
    h = strided(3 * randn(*shape, dtype=dtype), how).requires_grad_()
    agree(lambda h: K.geglu(h, impl="triton"), geglu_reference, [h], TOLERANCE[dtype])


@needs_triton
@parametrize("dtype", DTYPES, ids=str)
@parametrize("guided", [True, False])
@parametrize("draw", [True, False])
@parametrize("shape,how", [((2, 4, 4, 4), "dense"), ((3, 3, 5, 7), "sliced"), ((1, 4, 33, 32), "dense")])
def test_ddim_step_logprob(shape, how, draw, guided, dtype):
    """x_prev like the other kernels; log p to 1e-6 absolute, its gradient to 1e-4."""
    u, e, x, noise, x_prev, k_x, k_eps, sigma = step_inputs(shape, dtype, how)
    w = 2.5 if guided else 1.0
    # What is scored lies where a policy a little off would have drawn it.
    x_prev = ddim_step_logprob_reference(u, e if guided else None, 1.01 * x, k_x, k_eps, sigma, w, x_prev)[0]
    u, e = u.requires_grad_(), e.requires_grad_()

    def step(function, u, e, **how):
        coefficients = [v.double() if u.dtype == DOUBLE else v for v in (k_x, k_eps, sigma)]
        given = {"noise" if draw else "x_prev": (noise if draw else x_prev).to(u.dtype)}
        return function(u, e if guided else None, x.to(u.dtype), *coefficients, w, **given, **how)

    inputs = [u, e] if guided else [u]

    def of(function, **more):
        return lambda *v: step(function, v[0], v[-1], **more)

    results = of(K.ddim_step_logprob, impl="triton")(*inputs)
    exact = of(ddim_step_logprob_reference)(*[v.detach().double() for v in inputs])
    assert results[0].dtype == dtype and results[1].dtype == common.full_dtype(x) and not results[0].requires_grad
    assert ((results[0].double() - exact[0]).abs().max() / exact[0].abs().max()).item() <= TOLERANCE[dtype]
    if draw and dtype in (HALF, torch.bfloat16):  # drawn, rounded, then scored: a replay of what was kept agrees
        rest = u, e if guided else None, x, k_x, k_eps, sigma, w
        replayed = K.ddim_step_logprob(*rest, x_prev=results[0], impl="triton")[1]
        assert torch.equal(replayed, results[1])
        return
    assert (results[1].double() - exact[1]).abs().max().item() <= (1e-12 if dtype == DOUBLE else 1e-6)
    if not draw:
        slopes = torch.autograd.grad(results[1].sum(), inputs)
        doubles = [v.detach().double().requires_grad_() for v in inputs]
        expected = torch.autograd.grad(of(ddim_step_logprob_reference)(*doubles)[1].sum(), doubles)
        limit = {DOUBLE: 1e-11, SINGLE: 1e-4}.get(dtype, TOLERANCE[dtype])
        for s, x_ in zip(slopes, expected):
            assert ((s.double() - x_).abs().max() / x_.abs().max()).item() <= limit


@needs_triton
@parametrize("dtype", DTYPES, ids=str)
@parametrize("shape,how", [((3, 4, 4, 4), "dense"), ((2, 3, 5, 7), "sliced"), ((1, 4, 33, 32), "dense")])
def test_preference_loss(shape, how, dtype):
    six = [strided(randn(*shape, dtype=dtype), how) for _ in range(6)]
    six[0].requires_grad_(), six[1].requires_grad_()
    label = torch.rand(shape[0], device=DEVICE).to(common.full_dtype(six[0]))
    for beta in (0.5, 30.0):  # 30: the sigmoid is nearly flat on one side
        agree(
            lambda *v, beta=beta: K.preference_loss_from_predictions(*v, label, beta, impl="triton"),
            lambda *v, beta=beta: preference_loss_reference(*v, label, beta),
            six, {SINGLE: 2e-6}.get(dtype, TOLERANCE[dtype]), 2 * TOLERANCE[dtype],
        )  # fmt: skip


@needs_triton
def test_preference_loss_starts_at_log_two_and_stays_finite():
    p, q, target = (randn(2, 3, 4, 4, dtype=SINGLE) for _ in range(3))
    label = torch.tensor([0.2, 1.0], device=DEVICE)
    loss, margin = K.preference_loss_from_predictions(p, q, p, q, target, target, label, 5.0, impl="triton")
    assert loss.item() == pytest.approx(math.log(2), abs=1e-6) and margin.tolist() == [0, 0]
    loss, _ = K.preference_loss_from_predictions(p, 9 * q, p, q, target, target, label, 1e4, impl="triton")
    assert loss.isfinite()
