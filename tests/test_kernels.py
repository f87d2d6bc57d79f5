"""Fused operations against float64, forward and backward: in Triton's interpreter, or on a GPU where there is one."""

import math
import os
import subprocess
import sys
from pathlib import Path

import mutate
import pytest
import torch
import torch.nn.functional as F

from minipref import kernels as K
from minipref.kernels import common
from minipref.kernels.ddim_step_logprob import ddim_step_logprob_reference
from minipref.kernels.geglu import geglu_reference
from minipref.kernels.group_norm_act import apply_group_norm, group_norm_act_reference
from minipref.kernels.preference_loss import preference_loss_reference
from minipref.kernels.q_sample import q_sample_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(
    common.triton is None, reason="triton is not installed: pip install '.[parity]' on Linux"
)
HALF, SINGLE, DOUBLE = torch.float16, torch.float32, torch.float64
DTYPES = [SINGLE, HALF, DOUBLE] + ([torch.bfloat16] if DEVICE == "cuda" else [])
# Largest error as a share of the largest value.
TOLERANCE = {DOUBLE: 1e-12, SINGLE: 1e-6, HALF: 2e-3, torch.bfloat16: 8e-3}
parametrize = pytest.mark.parametrize


def randn(*shape, dtype=DOUBLE, offset=0.0):
    """Numbers that `dtype` holds exactly, so that float64 starts from the same ones."""
    return (torch.randn(*shape, dtype=DOUBLE) + offset).to(dtype).to(DEVICE)


def strided(x, how):
    """The same numbers, laid out differently."""
    if how == "sliced":  # every second entry of a larger tensor, and not at its beginning
        wide = torch.zeros(*x.shape[:-1], 2 * x.shape[-1] + 1, dtype=x.dtype, device=x.device)
        wide[..., 1::2] = x
        return wide[..., 1::2]
    if how == "transposed":
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    if how == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    assert how == "dense"
    return x.contiguous()


def gradients(function, inputs, weights):
    """Results of function(*inputs), and the gradients of their weighted sum by every input that has one."""
    leaves = [x.detach().clone(memory_format=torch.preserve_format).requires_grad_(x.requires_grad) for x in inputs]
    results = function(*leaves)
    results = results if isinstance(results, tuple) else (results,)
    total = sum((r.double() * w).sum() for r, w in zip(results, weights) if r.requires_grad)
    wanted = [x for x in leaves if x.requires_grad]
    return [r.detach() for r in results], list(torch.autograd.grad(total, wanted))


def agree(kernel, reference, inputs, tolerance, backward=None):
    """Kernel in its dtype against the reference in float64, results and gradients; twice, bit for bit the same.

    The kernel may not err more than twice as much as the reference does in the kernel's own dtype, where that error is
    larger than a few roundings to this dtype (sums are taken in different orders).
    """
    exact = [x.detach().double().requires_grad_(x.requires_grad) for x in inputs]
    weights = [torch.randn(r.shape, dtype=DOUBLE, device=DEVICE) for r in _tuple(reference(*exact))]
    expected, slopes = gradients(reference, exact, weights)
    found, found_slopes = gradients(kernel, inputs, weights)
    again, again_slopes = gradients(kernel, inputs, weights)
    eager, eager_slopes = gradients(reference, inputs, weights)
    backward = backward or tolerance
    pairs = [(f, a, e, x, tolerance) for f, a, e, x in zip(found, again, eager, expected)]
    pairs += [(f, a, e, x, backward) for f, a, e, x in zip(found_slopes, again_slopes, eager_slopes, slopes)]
    for f, a, e, x, limit in pairs:
        scale = x.abs().max().item()
        error, theirs = ((v.double() - x).abs().max().item() for v in (f, e))
        assert torch.equal(f, a)
        assert error <= limit * scale
        if f.dtype != DOUBLE:
            assert error <= 2 * theirs + 4 * torch.finfo(f.dtype).eps * scale


def _tuple(x):
    return x if isinstance(x, tuple) else (x,)


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


def step_inputs(shape, dtype, how="dense"):
    u, e, x, noise, x_prev = (strided(randn(*shape, dtype=dtype), how) for _ in range(5))
    full = common.full_dtype(x)
    k_x, k_eps = (randn(shape[0]).to(full) for _ in range(2))
    return u, e, x, noise, x_prev, k_x, k_eps, (0.2 + torch.rand(shape[0], dtype=DOUBLE)).to(full).to(DEVICE)


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


# ------------------------------------------------------------------------------------------------ autograd, compile


def small_calls():
    """name -> (a function of tensors that need gradients, the tensors), tiny and in float64."""
    x, a, b = randn(1, 4, 2, 3), randn(1, 4), randn(1, 4)
    u, e, x_t, _, x_prev, k_x, k_eps, sigma = step_inputs((2, 1, 2, 2), DOUBLE)
    six = [randn(2, 1, 2, 2) for _ in range(6)]
    y = torch.rand(2, dtype=DOUBLE, device=DEVICE)
    s = torch.rand(2, dtype=DOUBLE, device=DEVICE)
    given = {"x_prev": x_prev, "impl": "triton"}
    return {
        "q_sample": (lambda p, q: K.q_sample(p, q, s, 1 - s, impl="triton"), six[:2]),
        "group_norm_act": (lambda *v: K.group_norm_act(*v, 2, impl="triton"), [x, a, b]),
        "geglu": (lambda h: K.geglu(h, impl="triton"), [randn(3, 4)]),
        "ddim_step_logprob": (
            lambda u, e: K.ddim_step_logprob(u, e, x_t, k_x, k_eps, sigma, 2.0, **given)[1], [u, e],
        ),
        "preference_loss": (
            lambda p, q: K.preference_loss_from_predictions(p, q, *six[2:], y, 0.7, impl="triton"), six[:2],
        ),
    }  # fmt: skip


NAMES = ["q_sample", "group_norm_act", "geglu", "ddim_step_logprob", "preference_loss"]


@needs_triton
@parametrize("name", NAMES)
def test_gradients_are_those_of_finite_differences(name):
    function, tensors = small_calls()[name]
    assert torch.autograd.gradcheck(function, [v.requires_grad_() for v in tensors], fast_mode=True)


@needs_triton
@parametrize("name", NAMES)
def test_operators_keep_pytorchs_rules(name):
    """Schemas, fake results and autograd registration (torch.library.opcheck)."""
    x, a, b = (v.requires_grad_() for v in (randn(1, 4, 2, 3), randn(1, 4), randn(1, 4)))
    u, e, x_t, noise, x_prev, k_x, k_eps, sigma = step_inputs((2, 1, 2, 2), DOUBLE)
    six = [randn(2, 1, 2, 2) for _ in range(6)]
    s = torch.rand(2, dtype=DOUBLE, device=DEVICE)
    arguments = {
        "q_sample": [(six[0].requires_grad_(), six[1], s, s)],
        "group_norm_act": [
            (x, a, b, 2, 1e-5, True),
            (x.detach().contiguous(memory_format=torch.channels_last).requires_grad_(), a, b, 2, 1e-5, False),
            # half-precision pictures with single-precision weights: sums and their gradients are single
            (x.detach().half().requires_grad_(), *(v.detach().float().requires_grad_() for v in (a, b)), 2, 1e-5, True),
        ],
        "geglu": [(randn(3, 4).requires_grad_(),), (randn(3, 4, dtype=torch.float16).requires_grad_(),)],
        "ddim_step_logprob": [
            (u.requires_grad_(), e.requires_grad_(), x_t, k_x, k_eps, sigma, 2.0, x_prev, False, True),
            (u.detach(), None, x_t, k_x, k_eps, sigma, 1.0, noise, True, False),
        ],
        "preference_loss": [(six[2].requires_grad_(), six[3].requires_grad_(), *six[:2], *six[4:], s, 0.7)],
    }[name]
    for given in arguments:
        torch.library.opcheck(getattr(torch.ops.minipref, name).default, given)


@needs_triton
@parametrize("name", NAMES)
def test_operators_leave_no_graph_break(name):
    function, tensors = small_calls()[name]
    tensors = [v.requires_grad_() for v in tensors]
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    for got, expected in zip(_tuple(compiled(*tensors)), _tuple(function(*tensors))):
        assert torch.equal(got, expected)
    slopes = [torch.autograd.grad(_tuple(f(*tensors))[0].sum(), tensors) for f in (compiled, function)]
    assert all(torch.equal(p, q) for p, q in zip(*slopes))


# ------------------------------------------------------------------------------------------------ dispatch


@needs_triton
def test_a_norm_layer_and_its_fused_form_agree():
    norm = torch.nn.GroupNorm(2, 6, eps=1e-3).to(DEVICE)
    torch.nn.init.normal_(norm.weight), torch.nn.init.normal_(norm.bias)
    for layout in ("dense", "channels_last"):
        x = strided(randn(3, 6, 4, 4, dtype=SINGLE), layout).requires_grad_()
        fused, own = (apply_group_norm(norm, x, impl=impl) for impl in ("triton", "torch"))
        slopes = [torch.autograd.grad(y.square().sum(), [x, norm.weight, norm.bias]) for y in (fused, own)]
        assert torch.allclose(fused, own, atol=1e-6)
        assert all(torch.allclose(p, q, rtol=1e-4, atol=1e-4) for p, q in zip(*slopes))


def test_bad_arguments_are_refused_with_names():
    x, v = randn(2, 6, 2, 2), randn(2, 6)
    b = randn(2)
    calls = [
        (lambda: K.group_norm_act(x, v, v, 4), "6 channels cannot be split into 4 groups"),
        (lambda: K.group_norm_act(x, v[0], v, 2), r"\(2, 6, 2, 2\), \(6,\)"),
        (lambda: K.group_norm_act(x, v, v, 2, act="relu"), "act='relu'; choose silu, identity"),
        (lambda: K.geglu(randn(2, 5)), "expected an even number"),
        (lambda: K.q_sample(x, x[:, :1], b, b), "q_sample"),
        (lambda: K.ddim_step_logprob(x, None, x, b, b, b.abs()), "either noise"),
        (lambda: K.ddim_step_logprob(x, None, x, b, b, torch.tensor([0.1, 0.0]), noise=x), "sigma is 0"),
        (lambda: K.ddim_step_logprob(x, x[:1], x, b, b, b.abs(), noise=x), r"eps_cond is \(1, 6, 2, 2\)"),
        (lambda: K.preference_loss_from_predictions(x, x, x, x, x, x[:1], b, 1.0), "six shapes must be equal"),
        (lambda: K.geglu(v, impl="cuda"), "impl='cuda'; choose auto, torch, triton"),
    ]
    for call, said in calls:
        with pytest.raises(ValueError, match=said):
            call()


@needs_triton
def test_empty_batches_are_no_error():
    x, v, b = randn(0, 4, 2, 2), randn(0, 4), randn(0)
    assert K.q_sample(x, x, b, b, impl="triton").shape == x.shape
    assert K.group_norm_act(x, v, v, 2, impl="triton").shape == x.shape and K.geglu(v, impl="triton").shape == (0, 2)
    assert K.ddim_step_logprob(x, None, x, b, b, b, x_prev=x, impl="triton")[1].shape == (0,)
    assert K.preference_loss_from_predictions(x, x, x, x, x, x, b, 1.0, impl="triton")[1].shape == (0,)


@needs_triton
def test_a_gradient_that_the_fused_form_lacks_is_refused_and_auto_falls_back():
    x, b = randn(2, 1, 2, 2), (0.5 + torch.rand(2, dtype=DOUBLE)).to(DEVICE).requires_grad_()
    with pytest.raises(RuntimeError, match="requires a gradient that the fused form does not have"):
        K.q_sample(x, x, b, b, impl="triton")
    with pytest.raises(RuntimeError, match="requires a gradient that the fused form does not have"):
        K.ddim_step_logprob(x, None, x, b, b, b, x_prev=x, impl="triton")
    assert K.q_sample(x, x, b, b).requires_grad


@needs_triton
def test_a_norm_without_weights_is_pytorchs_own():
    norm, x = torch.nn.GroupNorm(2, 4, affine=False), randn(1, 4, 2, 2)
    assert torch.equal(apply_group_norm(norm, x), F.silu(norm(x)))


def test_without_triton_everything_works_and_forcing_it_is_one_clear_error():
    """In a process that cannot import triton."""
    code = """
import sys; sys.modules["triton"] = None
import torch
from minipref import kernels as K
h = torch.randn(3, 8)
assert torch.allclose(K.geglu(h), h[:, :4] * torch.nn.functional.gelu(h[:, 4:]))
import minipref.models.unet, minipref.diffusion, minipref.losses
try:
    K.geglu(h, impl="triton")
except RuntimeError as e:
    print(e)
"""
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    said = "geglu: impl='triton' cannot run: triton is not installed, or PyTorch is built without CUDA"
    assert done.returncode == 0 and done.stdout.strip().startswith(said), done.stderr


class OnGPU:
    """Stands for a tensor on a GPU."""

    is_cuda, requires_grad, dtype, device = True, False, torch.float32, torch.device("cuda", 0)


def test_auto_takes_triton_on_a_gpu_where_it_pays_and_never_the_interpreter(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *a: (9, 0))
    monkeypatch.setattr(common, "triton", True)
    for interpreted in (False, True):
        monkeypatch.setattr(common, "INTERPRETED", interpreted)
        for pays in (False, True):
            assert common.use_triton("auto", "x", [OnGPU()], pays) == (pays and not interpreted)
        assert not common.use_triton("auto", "x", [torch.zeros(1)], True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *a: (7, 5))
    assert not common.use_triton("auto", "x", [OnGPU()], True)


def test_what_pays_does_not_depend_on_the_batch():
    """Rollout and replay in smaller batches take the same way. A group that must be split pays later."""
    pays = sys.modules["minipref.kernels.group_norm_act"].pays
    sample = torch.empty(1, 64, 32, 32, device="meta")  # 65,536 elements
    for n in (1, 2, 100):
        x = sample.expand(n, -1, -1, -1).contiguous()
        assert common.large(x) and not common.large(x[:, :-1])
        assert pays(x, 8) and not pays(x[:, :56].contiguous(), 8)
        spread = x.contiguous(memory_format=torch.channels_last)
        wide = torch.empty(n, 512, 32, 32, device="meta").contiguous(memory_format=torch.channels_last)
        assert not pays(spread, 8) and pays(wide, 8)


@pytest.mark.parametrize("name,old,new", mutate.KERNEL_FAULTS)
def test_the_faults_that_mutate_injects_have_their_place(name, old, new):
    text = (Path(K.__file__).parent / f"{name}.py").read_text(encoding="utf-8")
    assert text.count(old) == 1 and old != new
