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

from minipref import diffusion
from minipref import kernels as K
from minipref.diffusion import Schedule, ScheduleConfig
from minipref.kernels import common
from minipref.kernels.ddim_step_logprob import ddim_step_logprob_reference, step_gaussian
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


def test_the_step_specified_here_is_that_of_the_papers_file():
    assert diffusion.gaussian_log_prob is sys.modules["minipref.kernels.ddim_step_logprob"].gaussian_log_prob
    s, t, t_prev = Schedule(ScheduleConfig()), torch.tensor([700, 320]), torch.tensor([400, 120])
    output, x, noise = (randn(2, 3, 4, 4) for _ in range(3))
    coefficients = [v.to(DEVICE) for v in s.coefficients(t, t_prev, 0.7)]
    x_prev, log_p = diffusion.ddim_step(s, output, x, t, t_prev, eta=0.7, noise=noise)
    drawn, drawn_log_p = ddim_step_logprob_reference(output, x, *coefficients, noise)
    assert torch.equal(drawn, x_prev) and torch.equal(drawn_log_p, log_p)


def test_the_step_and_its_probability_are_those_of_a_normal_distribution():
    """mean = k_x·x_t + k_out·model_output, x_prev = mean + sigma·noise; log p per dimension, by torch's own Normal."""
    output, x, noise, x_prev, k_x, k_out, sigma = step_inputs((2, 3, 4, 4), DOUBLE)
    mean = torch.stack([k_x[b] * x[b] + k_out[b] * output[b] for b in range(2)])
    for given in ({"noise": noise}, {"x_prev": x_prev}):
        point, log_p = ddim_step_logprob_reference(output, x, k_x, k_out, sigma, **given)
        expected = torch.stack([mean[b] + sigma[b] * noise[b] for b in range(2)]) if "noise" in given else x_prev
        density = [torch.distributions.Normal(mean[b], sigma[b]).log_prob(expected[b]).mean() for b in range(2)]
        assert torch.allclose(point, expected, atol=1e-12) and torch.allclose(log_p, torch.stack(density), atol=1e-12)
    found_mean, found_sigma = step_gaussian(output, x, k_x, k_out, sigma)
    assert torch.allclose(found_mean, mean, atol=1e-12) and torch.equal(found_sigma, sigma[:, None, None, None])
    # A Gaussian that is at hand is taken as it is.
    at_hand = K.ddim_step_logprob(output, x, k_x, k_out, sigma, x_prev=x_prev, gaussian=(mean + 1, found_sigma))[1]
    moved = ddim_step_logprob_reference(output, x, k_x, k_out, sigma, x_prev=x_prev - 1)[1]
    assert torch.allclose(at_hand, moved, atol=1e-12)


def test_the_loss_of_pairs_is_equation_seven():
    """Errors, margin and Bradley–Terry terms written out in float64, pair by pair (RPO Eq. 7)."""
    six, y, beta = [randn(4, 3, 2, 2) for _ in range(6)], torch.rand(4, dtype=DOUBLE, device=DEVICE), 1.7
    loss, margin = preference_loss_reference(*six, y, beta)
    pred_ref, pred_gen, base_ref, base_gen, target_ref, target_gen = six
    terms = []
    for b in range(4):
        ref = ((base_ref[b] - target_ref[b]) ** 2).mean() - ((pred_ref[b] - target_ref[b]) ** 2).mean()
        gen = ((base_gen[b] - target_gen[b]) ** 2).mean() - ((pred_gen[b] - target_gen[b]) ** 2).mean()
        assert margin[b].item() == pytest.approx((ref - gen).item(), abs=1e-12)
        p = 1 / (1 + math.exp(-beta * (ref - gen).item()))
        terms.append(-(y[b].item() * math.log(p) + (1 - y[b].item()) * math.log(1 - p)))
    assert loss.item() == pytest.approx(sum(terms) / 4, abs=1e-12)


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
    ((1, 4, 13, 11), 2),  # 143 pixels: several tiles, the last one not full
]


@needs_triton
@parametrize("dtype", DTYPES, ids=str)
@parametrize("act", ["silu", "identity"])
@parametrize("tile", [None, (4, 16)], ids=["its own tiles", "small tiles"])
@parametrize("shape,groups", GROUPS)
def test_group_norm_act(shape, groups, act, tile, dtype, monkeypatch):
    module = sys.modules["minipref.kernels.group_norm_act"]
    for name, value in zip(("TILE_C", "TILE_P"), tile or ()):
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
    """More channels than a tile has, and more pixels."""
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
@parametrize("draw", [True, False])
@parametrize(
    "shape,how",
    [((2, 4, 4, 4), "dense"), ((3, 3, 5, 7), "sliced"), ((1, 4, 33, 32), "dense"), ((2, 4, 3, 5), "channels_last")],
)
def test_ddim_step_logprob(shape, how, draw, dtype):
    """x_prev like the other kernels; log p to 1e-6 absolute, its gradient to 1e-4."""
    output, x, noise, x_prev, k_x, k_out, sigma = step_inputs(shape, dtype, how)
    # What is scored lies where a policy a little off would have drawn it.
    x_prev = ddim_step_logprob_reference(output, 1.01 * x, k_x, k_out, sigma, x_prev)[0]

    def step(function, output, **how):
        coefficients = [v.double() if output.dtype == DOUBLE else v for v in (k_x, k_out, sigma)]
        given = {"noise" if draw else "x_prev": (noise if draw else x_prev).to(output.dtype)}
        return function(output, x.to(output.dtype), *coefficients, **given, **how)

    output.requires_grad_(not draw)  # what is drawn carries none in the fused form
    found = step(K.ddim_step_logprob, output, impl="triton")
    exact = step(ddim_step_logprob_reference, output.detach().double())
    assert found[0].dtype == dtype and found[1].dtype == common.full_dtype(x) and not found[0].requires_grad
    assert ((found[0].double() - exact[0]).abs().max() / exact[0].abs().max()).item() <= TOLERANCE[dtype]
    if draw and dtype in (HALF, torch.bfloat16):  # drawn, rounded, then scored: a replay of what was kept agrees
        replayed = K.ddim_step_logprob(output, x, k_x, k_out, sigma, x_prev=found[0], impl="triton")[1]
        assert torch.equal(replayed, found[1])
        return
    assert (found[1].double() - exact[1]).abs().max().item() <= (1e-12 if dtype == DOUBLE else 1e-6)
    if not draw:
        (slope,) = torch.autograd.grad(found[1].sum(), output)
        double = output.detach().double().requires_grad_()
        (expected,) = torch.autograd.grad(step(ddim_step_logprob_reference, double)[1].sum(), double)
        limit = {DOUBLE: 1e-11, SINGLE: 1e-4}.get(dtype, TOLERANCE[dtype])
        assert slope.dtype == dtype
        assert ((slope.double() - expected).abs().max() / expected.abs().max()).item() <= limit


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
