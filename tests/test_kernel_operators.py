"""Fused operations as PyTorch sees them: autograd, compilation, registration; which form is taken; what is refused."""

import copy
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from kernel_helpers import DEVICE, DOUBLE, SINGLE, as_tuple, needs_triton, parametrize, randn, step_inputs, strided

from minipref import kernels as K
from minipref.kernels import common
from minipref.models.unet import GEGLU, GroupNormAct

# ------------------------------------------------------------------------------------------------ autograd, compile


def small_calls():
    """name -> (a function of tensors that need gradients, the tensors), tiny and in float64."""
    x, a, b = randn(1, 4, 2, 3), randn(1, 4), randn(1, 4)
    output, x_t, _, x_prev, k_x, k_out, sigma = step_inputs((2, 1, 2, 2), DOUBLE)
    six = [randn(2, 1, 2, 2) for _ in range(6)]
    y = torch.rand(2, dtype=DOUBLE, device=DEVICE)
    s = torch.rand(2, dtype=DOUBLE, device=DEVICE)
    given = {"x_prev": x_prev, "impl": "triton"}
    return {
        "q_sample": (lambda p, q: K.q_sample(p, q, s, 1 - s, impl="triton"), six[:2]),
        "group_norm_act": (lambda *v: K.group_norm_act(*v, 2, impl="triton"), [x, a, b]),
        "geglu": (lambda h: K.geglu(h, impl="triton"), [randn(3, 4)]),
        "ddim_step_logprob": (
            lambda output: K.ddim_step_logprob(output, x_t, k_x, k_out, sigma, **given)[1], [output],
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
    output, x_t, noise, x_prev, k_x, k_out, sigma = step_inputs((2, 1, 2, 2), DOUBLE)
    halves = [v.half() for v in (output, x_t, x_prev)]
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
            (output.requires_grad_(), x_t, k_x, k_out, sigma, x_prev, False, True),
            (output.detach(), x_t, k_x, k_out, sigma, noise, True, False),
            # half-precision latents with single-precision coefficients: the gradient comes back in half precision
            (halves[0].requires_grad_(), halves[1], k_x.float(), k_out.float(), sigma.float(), halves[2], False, True),
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


def graph_names(y):
    """The operations that y's gradient passes through."""
    names, waiting = set(), [y.grad_fn]
    while waiting:
        node = waiting.pop()
        names.add(node.name())
        waiting += [n for n, _ in node.next_functions if n is not None]
    return names


@needs_triton
@parametrize("act", ["silu", "identity"])
def test_a_norm_layer_and_its_fused_form_agree(act, monkeypatch):
    """The layer itself is PyTorch's norm and activation; fused it gives the same, gradients of its weights included."""
    norm, taken = GroupNormAct(2, 6, 1e-3, act).to(DEVICE), []
    torch.nn.init.normal_(norm.weight), torch.nn.init.normal_(norm.bias)
    for layout in ("dense", "channels_last"):
        x, found = strided(randn(3, 6, 4, 4, dtype=SINGLE), layout).requires_grad_(), []
        for fused in (False, True):
            with monkeypatch.context() as patch:
                patch.setattr(norm, "fused", lambda x, fused=fused: fused)
                y = norm(x)
            taken.append("minipref_group_norm_act" in str(graph_names(y)))
            found.append([y, *torch.autograd.grad(y.square().sum(), [x, norm.weight, norm.bias])])
        own = F.group_norm(x, 2, norm.weight, norm.bias, 1e-3)
        assert torch.equal(found[0][0], F.silu(own) if act == "silu" else own)
        assert torch.allclose(found[1][0], found[0][0], atol=1e-6)
        assert all(torch.allclose(p, q, rtol=1e-4, atol=1e-4) for p, q in zip(*(f[1:] for f in found)))
    assert taken == [False, True] * 2


@needs_triton
def test_a_gated_layer_and_its_fused_form_agree(monkeypatch):
    layer, taken, x = GEGLU(3, 4).to(DEVICE), [], randn(2, 5, 3, dtype=SINGLE).requires_grad_()
    found = []
    for fused in (False, True):
        with monkeypatch.context() as patch:
            patch.setattr(layer, "fused", lambda h, fused=fused: fused)
            y = layer(x)
        taken.append("minipref_geglu" in str(graph_names(y)))
        found.append([y, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])])
    assert taken == [False, True] and all(torch.allclose(p, q, rtol=1e-4, atol=1e-5) for p, q in zip(*found))


def test_large_layers_that_cannot_be_fused_are_pytorchs_own(monkeypatch):
    """PyTorch with CUDA and Triton, as Linux installs it, and a tensor on the CPU: nothing but speed may be decided."""
    monkeypatch.setattr(common, "AVAILABLE", True)
    norm, gate = GroupNormAct(2, 8, 1e-5), GEGLU(4, 4)
    x, h = torch.randn(1, 8, 256, 256), torch.randn(1, 16384, 4)
    kernels = (sys.modules[f"minipref.kernels.{name}"] for name in ("group_norm_act", "geglu"))
    assert all(kernel.pays(v) for kernel, v in zip(kernels, (x, gate.proj(h))))  # so large are they
    assert torch.equal(norm(x), F.silu(F.group_norm(x, 2, norm.weight, norm.bias, 1e-5)))
    value, switch = gate.proj(h).chunk(2, -1)
    assert torch.equal(gate(h), value * F.gelu(switch))


class Deciding:
    """A `decide` that counts how often it is asked, and says yes to samples of more than ten numbers."""

    def __init__(self):
        self.calls = 0

    def __call__(self, x):
        self.calls += 1
        return x[0].numel() > 10


def test_a_module_decides_once_for_a_kind_of_input(monkeypatch):
    """The kind is a sample's shape, dtype and device. The batch is none of it: rollout and replay must agree."""
    monkeypatch.setattr(common, "AVAILABLE", True)
    decide = Deciding()
    decision = common.Decision(decide)
    assert decide.calls == 0  # not before it has seen an input
    kinds = [
        (torch.zeros(2, 3, 4), True),
        (torch.zeros(2, 3, 3), False),
        (torch.zeros(2, 3, 4, dtype=torch.float64), True),
        (torch.zeros(2, 3, 4, dtype=torch.float64, device="meta"), True),
    ]
    for asked, (x, answer) in enumerate(kinds, 1):
        for batch in (1, 2, 5, 1):
            assert decision(x[:1].expand(batch, -1, -1)) is answer and decide.calls == asked
    same = copy.deepcopy(decision)  # a policy is a copy of its base
    assert same(kinds[-1][0]) is True and same.decide.calls == len(kinds)


def test_where_nothing_can_be_fused_no_module_ever_decides(monkeypatch):
    monkeypatch.setattr(common, "AVAILABLE", False)
    decide = Deciding()
    decision = common.Decision(decide)
    assert not any(decision(torch.zeros(2, n, dtype=d)) for n in (3, 400) for d in (SINGLE, DOUBLE))
    assert decide.calls == 0


def test_the_layers_of_a_unet_decide_once_for_many_passes(monkeypatch):
    monkeypatch.setattr(common, "AVAILABLE", True)
    for layer, x in ((GroupNormAct(2, 4, 1e-5), torch.zeros(1, 4, 2, 2)), (GEGLU(4, 6), torch.zeros(1, 5, 4))):
        asked, decide = [], layer.fused.decide
        layer.fused.decide = lambda h, asked=asked, decide=decide: asked.append(h.shape) or decide(h)
        for batch in (1, 3, 3):
            layer(x.expand(batch, *x.shape[1:]))
        assert len(asked) == 1


def test_bad_arguments_are_refused_with_names():
    x, v = randn(2, 6, 2, 2), randn(2, 6)
    b = randn(2)
    calls = [
        (lambda: K.group_norm_act(x, v, v, 4), "6 channels cannot be split into 4 groups"),
        (lambda: K.group_norm_act(x, v[0], v, 2), r"\(2, 6, 2, 2\), \(6,\)"),
        (lambda: K.group_norm_act(x, v, v, 2, act="relu"), "act='relu'; choose silu, identity"),
        (lambda: K.geglu(randn(2, 5)), "expected an even number"),
        (lambda: K.q_sample(x, x[:, :1], b, b), "q_sample"),
        (lambda: K.ddim_step_logprob(x, x, b, b, b.abs()), "either noise"),
        (lambda: K.ddim_step_logprob(x, x, b, b, b.abs(), noise=x, x_prev=x), "either noise"),
        (lambda: K.ddim_step_logprob(x[:1], x, b, b, b.abs(), noise=x), r"model_output is \(1, 6, 2, 2\)"),
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
    assert K.ddim_step_logprob(x, x, b, b, b, x_prev=x, impl="triton")[1].shape == (0,)
    assert K.preference_loss_from_predictions(x, x, x, x, x, x, b, 1.0, impl="triton")[1].shape == (0,)


@needs_triton
def test_a_gradient_that_the_fused_form_lacks_is_refused_and_auto_falls_back():
    x, b = randn(2, 1, 2, 2), (0.5 + torch.rand(2, dtype=DOUBLE)).to(DEVICE).requires_grad_()
    with pytest.raises(RuntimeError, match="requires a gradient that the fused form does not have"):
        K.q_sample(x, x, b, b, impl="triton")
    with pytest.raises(RuntimeError, match="requires a gradient that the fused form does not have"):
        K.ddim_step_logprob(x, x, b, b, b, x_prev=x, impl="triton")
    assert K.q_sample(x, x, b, b).requires_grad


@needs_triton
def test_a_step_is_drawn_or_scored_without_the_gradients_that_its_fused_form_lacks():
    """By x_t and through what is drawn: refused where one is wanted; under no_grad none is."""
    output, x_t, noise, x_prev, *coefficients = step_inputs((2, 1, 2, 2), DOUBLE)
    output, leaf = output.requires_grad_(), x_t.clone().requires_grad_()
    for changes in ({"x_t": leaf, "x_prev": x_prev}, {"x_t": x_t, "noise": noise}):
        with pytest.raises(RuntimeError, match="requires a gradient that the fused form does not have"):
            K.ddim_step_logprob(output, **changes, **named(coefficients), impl="triton")
        with torch.no_grad():
            fused = K.ddim_step_logprob(output, **changes, **named(coefficients), impl="triton")
        own = K.ddim_step_logprob(output, **changes, **named(coefficients), impl="torch")
        assert all(torch.allclose(p, q, atol=1e-12) for p, q in zip(fused, own)) and own[1].requires_grad
    scored = K.ddim_step_logprob(output, x_t, *coefficients, x_prev=x_prev, impl="triton")
    assert scored[1].requires_grad and not scored[0].requires_grad


@needs_triton
@parametrize("impl", ["torch", "triton"])
def test_the_probability_of_a_step_without_noise_is_not_finite(impl):
    """sigma = 0 has no density; the latent is the mean all the same, and other samples of the batch are untouched."""
    output, x_t, noise, _, k_x, k_out, sigma = step_inputs((2, 1, 2, 2), DOUBLE)
    sigma[1] = 0
    x_prev, log_p = K.ddim_step_logprob(output, x_t, k_x, k_out, sigma, noise=noise, impl=impl)
    assert torch.allclose(x_prev[1], k_x[1] * x_t[1] + k_out[1] * output[1], atol=1e-12)
    assert log_p.isfinite().tolist() == [True, False] and (impl == "triton" or log_p[1].isnan())


def named(coefficients):
    return dict(zip(("k_x", "k_out", "sigma"), coefficients))


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
    for available in (False, True):  # without Triton, or in its interpreter, it is not
        monkeypatch.setattr(common, "AVAILABLE", available)
        for pays in (False, True):
            assert common.use_triton("auto", "x", [OnGPU()], pays) == (pays and available)
        assert not common.use_triton("auto", "x", [torch.zeros(1)], True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *a: (7, 5))
    assert not common.use_triton("auto", "x", [OnGPU()], True)


@parametrize("interpreted", ["0", "1"])
def test_nothing_is_fused_by_itself_in_the_interpreter_nor_without_cuda(interpreted):
    code = "from minipref.kernels import common; print(common.AVAILABLE, common.INTERPRETED, common.triton is not None)"
    env = {**os.environ, "TRITON_INTERPRET": interpreted}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
    available, own, there = (x == "True" for x in done.stdout.split())
    assert own == (interpreted == "1") and available == (there and not own)
    assert available <= bool(torch.version.cuda)


def test_what_pays_does_not_depend_on_the_batch():
    """Rollout and replay in smaller batches take the same way. A norm, read twice, pays later."""
    pays = sys.modules["minipref.kernels.group_norm_act"].pays
    sample = torch.empty(1, 64, 32, 32, device="meta")  # 65,536 elements
    for n in (1, 2, 100):
        x = sample.expand(n, -1, -1, -1).contiguous()
        assert common.large(x) and not common.large(x[:, :-1])
        wide = torch.empty(n, 512, 32, 32, device="meta")  # eight times as many: two launches more
        for layout in (torch.contiguous_format, torch.channels_last):
            assert not pays(x.contiguous(memory_format=layout)) and pays(wide.contiguous(memory_format=layout))
        assert not pays(wide[:, :511]) and not pays(wide.flatten(2))
