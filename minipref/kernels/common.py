"""What every kernel file shares: is Triton there, which implementation runs, in which precision it adds up."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# Triton's interpreter runs kernels on a CPU, slowly, for tests. The variable is read when triton is imported.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

triton: Any = None
tl: Any = None
if INTERPRETED or torch.version.cuda:  # elsewhere it could not run: importing it would only take time
    try:
        import triton  # type: ignore[no-redef]
        import triton.language as tl  # type: ignore[no-redef]
    except ImportError:
        pass

AVAILABLE = triton is not None and not INTERPRETED  # whether "auto" can take a fused form at all, on this machine
IMPLEMENTATIONS = ("auto", "torch", "triton")
LARGE = 1 << 16  # elements of one sample from which "auto" takes a fused operation: a prediction, see `large`
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def use_triton(
    impl: str, name: str, tensors: list[Tensor], pays: bool, constants: Sequence[Tensor | None] = ()
) -> bool:
    """Whether an operation runs in Triton.

    "auto": where it can and `pays` says that it is not slower there; "torch": never; "triton": always, or an error that
    says why it cannot. `constants` are the inputs for which the fused form has no gradient.
    """
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"{name}: impl={impl!r}; choose {', '.join(IMPLEMENTATIONS)}")
    if impl == "torch" or (impl == "auto" and not AVAILABLE):
        return False
    reason = _why_not(tensors)
    if not reason and any(c is not None and c.requires_grad for c in constants):
        reason = "an input requires a gradient that the fused form does not have"
    if impl == "triton" and reason:
        raise RuntimeError(f"{name}: impl='triton' cannot run: {reason}; impl='auto' falls back to PyTorch")
    if impl == "auto":
        return not reason and pays and tensors[0].is_cuda
    return True


class Decision:
    """Whether the input of a module takes the fused form, `decide(x)`: asked again only when the kind of input (shape
    of a sample, dtype, device) is another than at the last pass."""

    def __init__(self, decide: Callable[[Tensor], bool]):
        self.decide, self.kind, self.answer = decide, None, False

    def __call__(self, x: Tensor) -> bool:
        if not AVAILABLE:
            return False
        kind: Any = (x.shape[1:], x.dtype, x.device)
        if kind != self.kind:
            self.kind, self.answer = kind, self.decide(x)
        return self.answer


def large(x: Tensor, line: int = LARGE) -> bool:
    """Whether a sample of x is so large that bytes cost more than launches (batches of about 16 supposed).

    The batch does not count: a rollout and its replay in smaller batches must take the same way, or they would round
    differently.
    """
    return math.prod(x.shape[1:]) >= line


def _why_not(tensors: list[Tensor]) -> str:
    if triton is None:
        return "triton is not installed, or PyTorch is built without CUDA"
    devices = {x.device for x in tensors}
    if len(devices) > 1:
        return f"the tensors are on {', '.join(sorted(map(str, devices)))}"
    if not (tensors[0].is_cuda or (INTERPRETED and tensors[0].device.type == "cpu")):
        return f"the tensors are on {tensors[0].device}, not on a CUDA device"
    if tensors[0].is_cuda and torch.cuda.get_device_capability(tensors[0].device) < (8, 0):
        return "the GPU is older than compute capability 8.0"
    if tensors[0].dtype not in DTYPES:
        return f"dtype {tensors[0].dtype} is not supported"
    if INTERPRETED and tensors[0].dtype == torch.bfloat16:
        return "Triton's interpreter computes bfloat16 wrongly"
    return ""


def on_device(x: Tensor):
    """Triton launches on the current device: makes it the tensor's."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def accumulator(x: Tensor):
    """The dtype that a kernel computes and adds up in: fp32, or fp64 for fp64."""
    return tl.float64 if x.dtype == torch.float64 else tl.float32


def full_dtype(x: Tensor) -> torch.dtype:
    """The same, of PyTorch."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def power_of_two(n: int, largest: int) -> int:
    """The smallest power of two that is not below n, or `largest`."""
    return min(1 << max(n - 1, 0).bit_length(), largest)
