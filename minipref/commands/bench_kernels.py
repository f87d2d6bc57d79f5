"""Times of the fused kernels at the sizes of three UNets: `python -m minipref bench --part kernels --device cuda`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import kernels as K
from ..kernels import common
from ..kernels.ddim_step_logprob import ddim_step_logprob_reference
from ..kernels.preference_loss import preference_loss_reference
from ..kernels.q_sample import q_sample_reference
from ..models.unet import GEGLU, UNet, UNetConfig
from ..presets import SD15_INPAINT_UNET, SMALL_UNET

MID = UNetConfig(  # 31 million parameters
    in_channels=9, block_out_channels=(128, 256, 256), attention_head_dim=4, cross_attention_dim=256,
    layers_per_block=1,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
)  # fmt: skip


def norms_and_gates(config: UNetConfig, batch: int, size: int) -> tuple[list[tuple], list[tuple]]:
    """The different shapes of (GroupNorm input, groups) and of GEGLU inputs in a UNet, largest first, none computed."""
    norms, gates = set(), set()
    with torch.device("meta"):
        unet = UNet(config)
        for module in unet.modules():
            if isinstance(module, nn.GroupNorm):
                module.register_forward_pre_hook(lambda m, x: norms.add((tuple(x[0].shape), m.num_groups)))
            if isinstance(module, GEGLU):
                module.proj.register_forward_hook(lambda m, x, y: gates.add(tuple(y.shape)))
        x, t = torch.empty(batch, config.in_channels, size, size), torch.empty(batch, dtype=torch.long)
        unet(x, t, torch.empty(batch, 77, config.cross_attention_dim))

    def elements(shape: tuple[int, ...]) -> int:
        return torch.Size(shape).numel()

    return (
        sorted(norms, key=lambda v: -elements(v[0])),
        sorted(gates, key=lambda v: -elements(v)),
    )


@dataclass(frozen=True)
class Case:
    """One operation at one size: `eager` and `fused` take `inputs`; the least bytes that must move each way."""

    name: str
    eager: Callable
    fused: Callable
    inputs: list[Tensor]
    forward_bytes: int
    backward_bytes: int


SIZES = (  # name, UNet, batch, latent size, dtype
    ("toy", SMALL_UNET, 64, 16, torch.float32),
    ("mid", MID, 64, 32, torch.bfloat16),
    ("sd", SD15_INPAINT_UNET, 16, 64, torch.bfloat16),
)


def cases(device: torch.device, sizes: Iterable[tuple] = SIZES) -> Iterable[Case]:
    """Every kernel at the sizes of the toy (fp32), a mid-sized UNet (bf16) and Stable Diffusion 1.5 (bf16)."""
    for name, config, batch, size, dtype in sizes:
        norms, gates = norms_and_gates(config, batch, size)

        def make(*shape: int, grad: bool = False, dtype: torch.dtype = dtype) -> Tensor:
            return torch.randn(*shape, device=device, dtype=dtype, requires_grad=grad)

        for layout in (torch.contiguous_format, torch.channels_last):
            for shape, groups in norms[:2] + norms[-1:]:
                x = make(*shape).to(memory_format=layout).requires_grad_()
                weight, bias = make(shape[1], grad=True), make(shape[1], grad=True)
                moved = x.numel() * x.element_size()

                def eager(x, weight, bias, groups=groups):
                    return F.silu(F.group_norm(x, groups, weight, bias))

                def fused(x, weight, bias, groups=groups):
                    a, b = (v.expand(len(x), -1) for v in (weight, bias))
                    return K.group_norm_act(x, a, b, groups, impl="triton")

                where = "NHWC" if layout == torch.channels_last else "NCHW"
                label = f"group_norm_act {name} {'×'.join(map(str, shape))} {where}"
                yield Case(label, eager, fused, [x, weight, bias], 2 * moved, 3 * moved)
        for shape in gates[:2]:
            h = make(*shape, grad=True)
            moved = h.numel() * h.element_size() // 2  # of y

            def gated(h):
                value, gate = h.chunk(2, -1)
                return value * F.gelu(gate)

            label = f"geglu {name} {'×'.join(map(str, shape))}"
            yield Case(label, gated, lambda h: K.geglu(h, impl="triton"), [h], 3 * moved, 5 * moved)
        latent = batch, config.out_channels, size, size
        one = make(*latent).numel() * make(1).element_size()
        a, s, sigma = (make(batch, dtype=torch.float32).abs() + 0.1 for _ in range(3))
        label = "×".join(map(str, latent))
        yield Case(
            f"q_sample {name} {label}",
            lambda x, e, a=a, s=s: q_sample_reference(x, e, a, s),
            lambda x, e, a=a, s=s: K.q_sample(x, e, a, s, impl="triton"),
            [make(*latent, grad=True), make(*latent, grad=True)], 3 * one, 3 * one,
        )  # fmt: skip
        step = {"x_t": make(*latent), "k_x": a, "k_out": s, "sigma": sigma, "x_prev": make(*latent)}
        slope = make(*latent).numel() * 4  # d log p/d model_output, fp32
        yield Case(
            f"ddim_step_logprob {name} {label}",
            lambda out, step=step: ddim_step_logprob_reference(out, **step)[1],
            lambda out, step=step: K.ddim_step_logprob(out, **step, impl="triton")[1],
            [make(*latent, grad=True)], 3 * one + slope, one + slope,
        )  # fmt: skip
        pair: dict[str, Any] = {k: make(*latent) for k in ("base_ref", "base_gen", "target_ref", "target_gen")}
        pair |= {"label": torch.rand(batch, device=device), "beta": 1.0}
        yield Case(
            f"preference_loss {name} {label}",
            lambda p, q, pair=pair: preference_loss_reference(p, q, **pair)[0],
            lambda p, q, pair=pair: K.preference_loss_from_predictions(p, q, **pair, impl="triton")[0],
            [make(*latent, grad=True), make(*latent, grad=True)], 6 * one, 6 * one,
        )  # fmt: skip


def milliseconds(function: Callable) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile by CUDA events."""
    return common.triton.testing.do_bench(function, quantiles=[0.5, 0.2, 0.8])


def copy_bandwidth(device: torch.device, megabytes: int = 512) -> float:
    """Bytes read and written a second by a plain copy."""
    source = torch.empty(megabytes << 20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / (milliseconds(lambda: target.copy_(source))[0] / 1000)


def kernel_table(device: torch.device) -> str:
    bandwidth = copy_bandwidth(device)
    lines = [
        f"Copy bandwidth: {bandwidth / 1e12:.2f} TB/s. Times in ms: median (20th–80th percentile). Share: least bytes "
        "over the time of the fused kernel, of the copy bandwidth. Peak: memory above the inputs, MiB.",
        "",
        "| operation | pass | PyTorch | torch.compile | fused | share | peaks in this order |",
        "|---|---|---|---|---|---|---|",
    ]
    for case in cases(device):
        lines += rows(case, bandwidth)
    return "\n".join(lines)


def rows(case: Case, bandwidth: float) -> list[str]:
    """One line a pass: times of the three forms, the fused one's share of the bandwidth, peak memory of all three."""
    torch._dynamo.reset()
    forms = {"eager": case.eager, "compiled": torch.compile(case.eager), "fused": case.fused}
    outputs = {k: f(*case.inputs) for k, f in forms.items()}
    expected = outputs["eager"].detach()
    # The gradient comes in each form's own layout, as from a layer that follows it.
    incoming = torch.randn(expected.shape, device=expected.device, dtype=expected.dtype)
    grads = {k: torch.empty_like(y).copy_(incoming) for k, y in outputs.items()}

    def backward(form: str) -> tuple[Tensor, ...]:
        return torch.autograd.grad(outputs[form], case.inputs, grads[form], retain_graph=True)

    slopes = {k: backward(k) for k in forms}
    for form in ("compiled", "fused"):
        for a, b in zip((outputs[form], *slopes[form]), (outputs["eager"], *slopes["eager"])):
            wrong = float((a - b).detach().abs().max() / b.detach().abs().max().clamp(min=1e-6))
            if not wrong < 0.05:
                raise RuntimeError(f"{case.name}: {form} differs from PyTorch by {wrong:.2g}")

    def both(form: str) -> tuple[Tensor, ...]:
        return torch.autograd.grad(forms[form](*case.inputs), case.inputs, grads[form])

    passes: dict[str, tuple[Callable[[str], Any], int]] = {
        "forward": (lambda form: forms[form](*case.inputs), case.forward_bytes),
        "backward": (backward, case.backward_bytes),
        "both": (both, case.forward_bytes + case.backward_bytes),
    }
    lines = []
    for name, (call, least) in passes.items():
        times, peaks = {}, []
        for form in forms:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            call(form)
            peaks.append(f"{(torch.cuda.max_memory_allocated() - before) / 2**20:.0f}")
            times[form] = milliseconds(partial(call, form))
        cells = [f"{m:.3f} ({lo:.3f}–{hi:.3f})" for m, lo, hi in times.values()]
        share = least / (times["fused"][0] / 1000) / bandwidth
        lines.append(f"| {case.name} | {name} | {' | '.join(cells)} | {share:.0%} | {' / '.join(peaks)} |")
    return lines
