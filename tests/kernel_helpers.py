"""What the tests of the kernels share: where they run, numbers of every layout, and what agreement is."""

import pytest
import torch

from minipref.kernels import common

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
    weights = [torch.randn(r.shape, dtype=DOUBLE, device=DEVICE) for r in as_tuple(reference(*exact))]
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


def as_tuple(x):
    return x if isinstance(x, tuple) else (x,)


def step_inputs(shape, dtype, how="dense"):
    """model_output, x_t, noise, x_prev of this shape; k_x, k_out, sigma (B,)."""
    output, x_t, noise, x_prev = (strided(randn(*shape, dtype=dtype), how) for _ in range(4))
    full = common.full_dtype(x_t)
    k_x, k_out = (randn(shape[0]).to(full) for _ in range(2))
    return output, x_t, noise, x_prev, k_x, k_out, (0.2 + torch.rand(shape[0], dtype=DOUBLE)).to(full).to(DEVICE)
