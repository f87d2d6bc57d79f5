"""Fused operations as PyTorch sees them: autograd, compilation, registration; which form is taken; what is refused."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from kernel_helpers import DEVICE, DOUBLE, SINGLE, as_tuple, needs_triton, parametrize, randn, step_inputs, strided

from minipref import kernels as K
from minipref.kernels import common
from minipref.kernels.group_norm_act import apply_group_norm

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
    for got, expected in zip(as_tuple(compiled(*tensors)), as_tuple(function(*tensors))):
        assert torch.equal(got, expected)
    slopes = [torch.autograd.grad(as_tuple(f(*tensors))[0].sum(), tensors) for f in (compiled, function)]
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
